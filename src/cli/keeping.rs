//! The history of a process that delivers: the daemon, and the demo.

use super::open::store_of;
use crate::{
    config::{Config, StoreConfig},
    history::{
        Keeper,
        deliveries::{Recorder, recording},
        newcomers::Announced,
        replay::Replays,
    },
    queue::Queue,
    store::sqlite::SqliteStore,
    supervisor::reload::Reloader,
    telemetry::{metrics::Metrics, resources, status::Observer},
};

/// What is remembered, and by which tasks.
pub(super) struct History {
    pub(super) store: SqliteStore,
    /// What the board reports to, so that deliveries are recorded.
    pub(super) observers: Vec<Observer>,
    /// `None` if none is kept.
    recorder: Option<Recorder>,
}

impl History {
    pub(super) fn start(config: &Config, metrics: &Metrics) -> Self {
        if config.store == StoreConfig::None {
            let why = "nothing is remembered: [store] url is \"none\"";
            let store = SqliteStore::off(store_of(config), why);
            return Self { store, observers: Vec::new(), recorder: None };
        }
        let store = SqliteStore::start(store_of(config));
        if !config.keeps_history() {
            return Self { store, observers: Vec::new(), recorder: None };
        }
        let (observer, recorder) = recording(&resources::host_name(), metrics);
        Self { store, observers: vec![observer], recorder: Some(recorder) }
    }

    /// Begins to fill the store.
    pub(super) fn keep(
        self,
        queue: &impl Queue,
        reloader: &Reloader,
        replays: Replays,
        announced: Announced,
    ) -> Option<Keeper> {
        let (recorder, subscribers) = (self.recorder?, reloader.subscribers());
        let (queue, store) = (queue.clone(), self.store);
        Some(Keeper::start(queue, store, recorder, subscribers, replays, announced))
    }
}

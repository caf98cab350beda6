//! History: what fills the store, and what answers from it.

pub mod deliveries;
mod events;
pub mod replay;
pub mod resend;
pub mod whereabouts;

use std::{future::Future, time::Duration};

use tokio::{sync::watch, task::JoinHandle, time::timeout};

pub use self::events::Keeps;
use crate::{
    config::Subscribers,
    queue::{Queue, ReplayFloor},
    store::Store,
};

/// The time that the end of a daemon has for what is still to be recorded.
const END_TIMEOUT: Duration = Duration::from_secs(5);

/// The tasks that fill the store of a daemon, and keep it within its limits.
#[derive(Debug)]
pub struct Keeper {
    stop: watch::Sender<Stop>,
    events: JoinHandle<()>,
    others: JoinHandle<()>,
}

/// How far the end has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Stop {
    No,
    /// No more events are taken from the queue.
    Events,
    /// No more deliveries follow.
    All,
}

impl Keeper {
    /// Starts the tasks. Neither the queue nor any delivery ever waits for them.
    pub fn start<Q: Queue, S: Store>(
        queue: Q,
        store: S,
        recorder: deliveries::Recorder,
        subscribers: watch::Receiver<Subscribers>,
        replays: replay::Replays,
    ) -> Self {
        let (stop, stops) = watch::channel(Stop::No);
        let asked = store.clone();
        queue.keep_for_replays(ReplayFloor::new(move || {
            let store = asked.clone();
            async move { store.replay_floor().await }
        }));
        let replaying = replays.run(queue.clone(), store.clone(), subscribers.clone());
        let (keeps, kept) = watch::channel(Keeps::Unknown);
        let events = {
            let (store, stops) = (store.clone(), stops.clone());
            tokio::spawn(async move {
                events::record(&queue, &store, &keeps, reached(stops, Stop::Events)).await;
                store.leave_the_queue().await;
            })
        };
        let mut draining = stop.subscribe();
        let others = tokio::spawn(async move {
            // All of these read the queue.
            let upkeep = async {
                tokio::join!(
                    replaying,
                    events::trim(&store),
                    events::record_patterns(&store, subscribers)
                );
            };
            let upkeep = async {
                tokio::select! {
                    () = upkeep => {}
                    _ = draining.wait_for(|reached| *reached >= Stop::Events) => {}
                }
            };
            let recording = recorder.run(store.clone(), kept, reached(stops, Stop::All));
            let (complete, ()) = tokio::join!(recording, upkeep);
            store.close(complete).await;
        });
        Self { stop, events, others }
    }

    /// Takes no more events, once `drains` completes, and completes when the queue is not used any
    /// more.
    pub async fn done_with_the_queue(&mut self, drains: impl Future<Output = ()>) {
        drains.await;
        self.stop.send_replace(Stop::Events);
        // A panic is in the log; the queue is not used after it either.
        (&mut self.events).await.ok();
    }

    /// Records what is still to be recorded, and closes the store.
    pub async fn close(self) {
        self.stop.send_replace(Stop::All);
        if timeout(END_TIMEOUT, self.others).await.is_err() {
            tracing::warn!(
                "the store was not closed in time; the last deliveries may be missing in history"
            );
        }
    }
}

async fn reached(mut stops: watch::Receiver<Stop>, stop: Stop) {
    // An error means that the keeper is gone.
    stops.wait_for(|reached| *reached >= stop).await.ok();
}

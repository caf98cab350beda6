//! History: what fills the store, and what answers from it.

mod changes;
pub mod deliveries;
mod events;
mod losses;
pub mod newcomers;
pub mod replay;
pub mod resend;
pub mod whereabouts;

use std::{future::Future, time::Duration};

use tokio::{
    sync::watch,
    task::JoinHandle,
    time::{sleep, timeout},
};

pub use self::events::Keeps;
use crate::{
    clock,
    config::Subscribers,
    queue::{Queue, ReplayFloor},
    store::Store,
};

/// The longest that the end of a daemon waits for history; a shorter drain's limit counts instead.
const END_TIMEOUT: Duration = Duration::from_secs(5);

/// The longest that history may take after a second signal: a sound store needs less.
const HURRIED_END_TIMEOUT: Duration = Duration::from_secs(1);

/// The tasks that fill the store of a daemon, and keep it within its limits.
#[derive(Debug)]
pub struct Keeper {
    stop: watch::Sender<Stop>,
    events: JoinHandle<()>,
    others: JoinHandle<()>,
    /// The part of the end's time that the events have used.
    spent: Duration,
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
        announced: newcomers::Announced,
    ) -> Self {
        let (stop, stops) = watch::channel(Stop::No);
        let asked = store.clone();
        queue.keep_for_replays(ReplayFloor::new(move || {
            let store = asked.clone();
            async move { store.replay_floor().await }
        }));
        let (keeps, kept) = watch::channel(Keeps::Unknown);
        let introducing =
            newcomers::run(announced, queue.clone(), store.clone(), kept.clone(), replays.clone());
        let replaying = replays.run(queue.clone(), store.clone(), subscribers.clone());
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
                    introducing,
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
        Self { stop, events, others, spent: Duration::ZERO }
    }

    /// Takes no more events, once `drains` completes, and completes when the queue is not used any
    /// more. A store or a queue that hangs gets half of the end's time, of which `limit` is the most.
    pub async fn done_with_the_queue(
        &mut self,
        drains: impl Future<Output = ()>,
        limit: &watch::Receiver<Duration>,
    ) {
        drains.await;
        let limit = limit.borrow().max(HURRIED_END_TIMEOUT);
        self.stop.send_replace(Stop::Events);
        let begun = clock::instant();
        // A panic is in the log; the queue is not used after it either.
        if timeout(limit.min(END_TIMEOUT) / 2, &mut self.events).await.is_err() {
            self.events.abort();
            tracing::warn!(
                "history did not end in time; events that are not stored yet wait in the queue"
            );
        }
        self.spent = clock::instant() - begun;
    }

    /// Records what is still to be recorded, and closes the store: within the end's time, of which
    /// `limit` is the most, or soon after `hurry` completes.
    pub async fn close(self, limit: Duration, hurry: impl Future<Output = ()>) {
        self.events.abort();
        self.stop.send_replace(Stop::All);
        let limit = limit.clamp(HURRIED_END_TIMEOUT, END_TIMEOUT);
        let left = limit.saturating_sub(self.spent);
        let hurried = async {
            hurry.await;
            sleep(HURRIED_END_TIMEOUT).await;
        };
        let why = tokio::select! {
            biased;
            _ = self.others => return,
            () = sleep(left) => "in time",
            () = hurried => "before a second signal ended the daemon",
        };
        tracing::warn!(
            "the store was not closed {why}; the last deliveries may be missing in history"
        );
    }
}

async fn reached(mut stops: watch::Receiver<Stop>, stop: Stop) {
    // An error means that the keeper is gone.
    stops.wait_for(|reached| *reached >= stop).await.ok();
}

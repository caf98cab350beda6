//! New subscribers with a `start_from`: a replay of what history has from before they were bound.
//!
//! That a subscriber is new is recorded before it is bound: afterwards nothing would show it. When
//! history has all events from before the binding, the subscriber's first replay is stored, together
//! with the record that this is done. A daemon that is killed at any moment makes one replay.
//!
//! The replay ends where the subscriber's own events begin: on the embedded queue with the event
//! before them; on RabbitMQ, which has no numbers, a little later, so that some events come twice.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, SystemTime},
};

use tokio::{
    sync::{mpsc, oneshot, watch},
    time::{sleep, timeout},
};

use super::{
    events::Keeps,
    replay::{self, Replays},
};
use crate::{
    clock,
    config::Subscribers,
    delivery::SubscriberName,
    policy::retry::Backoff,
    queue::{Begin, Queue},
    store::{EventNumber, HistoryState, MAX_RUNNING, Newcomer, Replay, Store, StoreError},
    telemetry::outage::{News, Outage},
};

/// The longest that the queue may take to say what is bound.
const BOUND_TIMEOUT: Duration = Duration::from_secs(10);

/// The longest that a binding waits for the store.
const STORE_TIMEOUT: Duration = Duration::from_secs(5);

/// The time between two looks whether the store is open, or history past a binding.
const SOON: Duration = Duration::from_millis(20);
const POLL: Duration = Duration::from_millis(500);

/// The time between two looks whether another replay may run.
const FULL: Duration = Duration::from_secs(2);

/// The longest that the queue may take to say how far history is.
const BEGIN_TIMEOUT: Duration = Duration::from_secs(10);

/// The shortest and the longest time between two tries with the store.
const FIRST_BACKOFF: Duration = Duration::from_millis(200);
const MAX_BACKOFF: Duration = Duration::from_secs(5);

/// Subscribers that are about to be bound.
#[derive(Debug)]
struct Configured {
    subscribers: Subscribers,
    done: oneshot::Sender<()>,
}

/// Says which subscribers are about to be bound. The default is that of a daemon without history:
/// it says nothing.
#[derive(Debug, Clone, Default)]
pub struct Newcomers(Option<mpsc::Sender<Configured>>);

/// The other end.
#[derive(Debug)]
pub struct Announced(mpsc::Receiver<Configured>);

impl Newcomers {
    pub fn new() -> (Self, Announced) {
        let (sender, receiver) = mpsc::channel(1);
        (Self(Some(sender)), Announced(receiver))
    }

    /// Has it recorded which of these subscribers are new. To be awaited before they are bound, also
    /// for the first time. Takes a bounded time, and waits for no store that is away.
    pub async fn announce(&self, subscribers: &Subscribers) {
        let Some(sender) = &self.0 else { return };
        let (done, recorded) = oneshot::channel();
        let configured = Configured { subscribers: subscribers.clone(), done };
        if sender.send(configured).await.is_ok() {
            // An error means that the daemon stops.
            recorded.await.ok();
        }
    }
}

/// Makes the first replays of new subscribers, until it is dropped.
pub(super) async fn run<Q: Queue, S: Store>(
    Announced(mut announced): Announced,
    queue: Q,
    store: S,
    keeps: watch::Receiver<Keeps>,
    replays: Replays,
) {
    let mut task = Task::new(queue, store, keeps, replays);
    loop {
        let round = async {
            match task.round().await {
                Some(wait) => sleep(wait).await,
                None => std::future::pending().await,
            }
        };
        // A round that is dropped is begun again: the store knows what it has done.
        tokio::select! {
            configured = announced.recv() => {
                let Some(Configured { subscribers, done }) = configured else { return };
                task.configure(subscribers).await;
                // The fleet may be gone.
                done.send(()).ok();
            }
            () = round => {}
        }
    }
}

struct Task<Q, S> {
    queue: Q,
    store: S,
    keeps: watch::Receiver<Keeps>,
    replays: Replays,
    /// The subscribers that were bound before the first one with a `start_from` came; `None` until
    /// then, and as long as the queue has not said it. RabbitMQ is asked by a message of its own, which
    /// other daemons are spared.
    bound: Option<BTreeSet<SubscriberName>>,
    configured: Subscribers,
    unrecorded: Vec<Newcomer>,
    recorded: BTreeSet<SubscriberName>,
    /// The new subscribers without their first replay, and from when on they get events.
    waiting: BTreeMap<SubscriberName, SystemTime>,
    /// The last rows of first replays that are not stored yet. Whatever history has by the time that
    /// one may run, the subscriber's own events begin there.
    ends: BTreeMap<SubscriberName, EventNumber>,
    outage: Outage,
    backoff: Backoff,
}

impl<Q: Queue, S: Store> Task<Q, S> {
    fn new(queue: Q, store: S, keeps: watch::Receiver<Keeps>, replays: Replays) -> Self {
        Self {
            queue,
            store,
            keeps,
            replays,
            bound: None,
            configured: Subscribers::default(),
            unrecorded: Vec::new(),
            recorded: BTreeSet::new(),
            waiting: BTreeMap::new(),
            ends: BTreeMap::new(),
            outage: Outage::default(),
            backoff: Backoff::new(FIRST_BACKOFF, MAX_BACKOFF),
        }
    }

    /// These subscribers are about to be bound.
    async fn configure(&mut self, subscribers: Subscribers) {
        let now = clock::now();
        for s in subscribers.iter() {
            let is_known = self.recorded.contains(&s.name)
                || self.unrecorded.iter().any(|known| known.name == s.name);
            if !is_known {
                let start_from = s.start_from.map(|start| start.at(now));
                self.unrecorded.push(Newcomer { name: s.name.clone(), start_from });
            }
        }
        self.configured = subscribers;
        if self.unrecorded.iter().any(|s| s.start_from.is_some()) {
            if self.bound.is_none() {
                // A failure is not kept: a subscriber that a later reload adds may be bound.
                let bound = timeout(BOUND_TIMEOUT, self.queue.bound()).await;
                self.bound = bound.ok().and_then(Result::ok);
            }
            // Delivery waits for no store. A record that is dropped here is made again.
            let recorded = timeout(STORE_TIMEOUT, self.record_before_binding()).await;
            let failed = recorded
                .map_or_else(|_| Some(StoreError::away("the store does not answer")), Result::err);
            if let Some(e) = failed {
                tracing::warn!(
                    error = %e,
                    "it cannot be recorded yet that subscribers with `start_from` are new: what history has for them waits for the store"
                );
            }
        }
    }

    /// Waits while the store is being opened.
    async fn record_before_binding(&mut self) -> Result<(), StoreError> {
        loop {
            match self.record().await {
                Err(_) if self.store.condition().history == HistoryState::Opening => {
                    sleep(SOON).await;
                }
                recorded => return recorded,
            }
        }
    }

    /// Records the subscribers, and learns which ones wait for their first replay.
    async fn record(&mut self) -> Result<(), StoreError> {
        let bound = self.bound.clone();
        let found = self.store.introduce(self.unrecorded.clone(), bound, clock::now()).await?;
        self.recorded.extend(self.unrecorded.drain(..).map(|known| known.name));
        self.waiting = found.waiting.into_iter().collect();
        for subscriber in found.not_new {
            tracing::warn!(
                subscriber = subscriber.as_str(),
                "`start_from` does nothing: the subscriber got events before it was recorded as new; `hooktrail replay` sends what history has"
            );
        }
        Ok(())
    }

    /// Does what can be done now. Returns the time until the next round; `None` if only an
    /// announcement makes one necessary.
    async fn round(&mut self) -> Option<Duration> {
        match self.step().await {
            Ok(wait) => {
                self.outage.end();
                self.backoff.reset();
                wait
            }
            Err(e) => {
                // Away: that is logged by the code that found it.
                if self.outage.failed(&e.to_string()) == News::First && !e.is_away() {
                    tracing::warn!(error = %e, "new subscribers wait for the store");
                }
                Some(self.backoff.grow())
            }
        }
    }

    async fn step(&mut self) -> Result<Option<Duration>, StoreError> {
        if !self.unrecorded.is_empty() {
            self.record().await?;
        }
        if self.waiting.is_empty() {
            return Ok(None);
        }
        let keeps = *self.keeps.borrow();
        let (mut begins, wait) = match keeps {
            Keeps::Unknown => return Ok(Some(POLL)),
            // The daemon whose store has history does it.
            Keeps::Elsewhere => (self.nothing_for(|_| true), POLL),
            Keeps::Here => (self.nothing_for(|has_start| !has_start), POLL),
        };
        let mut wait = wait;
        if keeps == Keeps::Here {
            self.find_ends().await?;
            let free = MAX_RUNNING.saturating_sub(self.store.running_replays().await?.len());
            if free == 0 {
                wait = FULL;
            } else {
                begins.extend(self.ready(free).await?);
            }
        }
        if !begins.is_empty() {
            self.begin(begins).await?;
        }
        Ok((!self.waiting.is_empty()).then_some(wait))
    }

    /// Those for which nothing is to be replayed, by whether they are configured with a
    /// `start_from`.
    fn nothing_for(&self, is_done: impl Fn(bool) -> bool) -> Vec<(SubscriberName, Option<Replay>)> {
        let has_start = |name: &SubscriberName| {
            self.configured.iter().any(|s| s.name == *name && s.start_from.is_some())
        };
        let names = self.waiting.keys().filter(|name| is_done(has_start(name)));
        names.map(|name| (name.clone(), None)).collect()
    }

    /// Asks how far history is for those that wait. The first answer is where a replay ends.
    async fn find_ends(&mut self) -> Result<(), StoreError> {
        let names: Vec<SubscriberName> =
            self.waiting.keys().filter(|name| !self.ends.contains_key(*name)).cloned().collect();
        for name in names {
            let upto = match timeout(BEGIN_TIMEOUT, self.queue.begin(&name)).await {
                Ok(Ok(Begin::After(number))) => number,
                // Read after the answer: what history has by then, and no less.
                Ok(Ok(Begin::Passed)) => {
                    self.store.reach().await?.last.map_or(EventNumber(0), |(number, _)| number)
                }
                Ok(Ok(Begin::Waits)) | Err(_) => continue,
                Ok(Err(e)) => {
                    tracing::debug!(subscriber = name.as_str(), error = %e, "how far history is, is not known yet");
                    continue;
                }
            };
            self.ends.insert(name, upto);
        }
        Ok(())
    }

    /// The first replays of those for which history has everything, at most `free`.
    async fn ready(
        &self,
        free: usize,
    ) -> Result<Vec<(SubscriberName, Option<Replay>)>, StoreError> {
        let mut ready = Vec::new();
        for (name, since) in &self.waiting {
            let configured =
                self.configured.iter().find(|s| s.name == *name && s.start_from.is_some());
            let (Some(subscriber), Some(upto)) = (configured, self.ends.get(name)) else {
                continue;
            };
            let now = clock::now();
            let replay = replay::first(&self.store, subscriber, *since, *upto, now).await?;
            ready.push((name.clone(), replay));
            if ready.len() == free {
                break;
            }
        }
        Ok(ready)
    }

    /// Stores the replays, as many as may run.
    async fn begin(
        &mut self,
        begins: Vec<(SubscriberName, Option<Replay>)>,
    ) -> Result<(), StoreError> {
        let done = self.store.begin_newcomers(begins.clone()).await?;
        for (name, replay) in begins.iter().filter(|(name, _)| done.contains(name)) {
            self.ends.remove(name);
            let since = self.waiting.remove(name).map(clock::rfc3339_seconds);
            match replay {
                Some(replay) => tracing::info!(
                    subscriber = name.as_str(),
                    replay = replay.id,
                    since,
                    "a new subscriber gets what history has from before it was bound"
                ),
                None => tracing::debug!(
                    subscriber = name.as_str(),
                    since,
                    "a new subscriber gets nothing of history"
                ),
            }
        }
        self.replays.changed();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{
        config::testing,
        queue::fake::Fake,
        store::{NewRow, fake::FakeStore},
    };

    const HOUR: Duration = Duration::from_secs(3600);

    fn configuration(subscribers: &[(&str, &str)]) -> Subscribers {
        let one = |(name, lines): &(&str, &str)| Arc::new(testing::subscriber(name, lines));
        subscribers.iter().map(one).collect()
    }

    const START: &str = "start_from = \"-1h\"";

    fn row(at: SystemTime) -> NewRow {
        NewRow {
            number: None,
            at,
            event_type: "a".to_owned(),
            message_id: None,
            body: r#"{"event":"a"}"#.into(),
            redelivered: false,
            tenant: None,
        }
    }

    /// History has two old events and `recent` ones, numbered from 3 on.
    async fn with_events(recent: u32) -> FakeStore {
        let store = FakeStore::default();
        let now = clock::now();
        let old = std::iter::repeat_n(row(now - 2 * HOUR), 2);
        let rows = old.chain((0..recent).map(|_| row(now - HOUR / 2)));
        store.append(rows.collect()).await.expect("appends");
        store
    }

    fn task(queue: &Fake, store: &FakeStore, keeps: Keeps) -> Task<Fake, FakeStore> {
        let keeps = watch::Sender::new(keeps).subscribe();
        Task::new(queue.clone(), store.clone(), keeps, Replays::default())
    }

    /// The subscribers of the replays, with the rows before the first and up to the last.
    async fn replays(store: &FakeStore) -> Vec<(String, i64, i64)> {
        let of = |replay: Replay| {
            assert!(replay.order.by == "start_from" && replay.order.bound_at.is_some());
            (replay.subscriber.to_string(), replay.order.after.0, replay.progress.upto.0)
        };
        let all = store.running_replays().await.expect("reads");
        all.into_iter().map(|replay| of(replay.expect("can be read"))).collect()
    }

    #[tokio::test]
    async fn a_new_subscriber_gets_one_replay_that_ends_where_its_own_events_begin() {
        let (queue, store) = (Fake::default(), with_events(5).await);
        queue.was_bound(Some(&["old"]));
        let all = configuration(&[("new", START), ("old", START), ("plain", "")]);
        let mut before = task(&queue, &store, Keeps::Here);
        before.configure(all.clone()).await;
        assert_eq!(before.round().await, Some(POLL), "history may lack some");
        assert_eq!(replays(&store).await, []);
        // Killed; by now it is bound.
        queue.was_bound(Some(&["new", "old", "plain"]));
        let mut after = task(&queue, &store, Keeps::Here);
        after.configure(all.clone()).await;
        queue.begins("new", Begin::After(EventNumber(5)));
        assert_eq!(after.round().await, None);
        assert_eq!(replays(&store).await, [("new".to_owned(), 2, 5)]);
        // Removed, and added again.
        after.configure(configuration(&[])).await;
        after.configure(all.clone()).await;
        assert_eq!(after.round().await, None);
        let mut third = task(&queue, &store, Keeps::Here);
        queue.was_bound(Some(&[]));
        third.configure(all).await;
        assert_eq!(third.round().await, None);
        assert_eq!(replays(&store).await.len(), 1);
    }

    #[tokio::test]
    async fn what_is_bound_is_asked_for_when_the_first_start_from_comes_and_counts_from_then_on() {
        for (first, replayed) in [(START, true), ("", false)] {
            let (queue, store) = (Fake::default(), with_events(5).await);
            queue.was_bound(Some(&["a"]));
            let mut task = task(&queue, &store, Keeps::Here);
            task.configure(configuration(&[("a", first)])).await;
            task.round().await;
            // Another daemon was reloaded first.
            queue.was_bound(Some(&["a", "b"]));
            queue.begins("b", Begin::Passed);
            task.configure(configuration(&[("a", START), ("b", START)])).await;
            assert_eq!(task.round().await, None);
            let expected = replayed.then(|| ("b".to_owned(), 2, 7));
            assert_eq!(replays(&store).await, expected.into_iter().collect::<Vec<_>>());
        }
    }

    #[tokio::test]
    async fn a_store_that_is_away_delays_nothing_and_learns_later_who_is_new() {
        let (queue, store) = (Fake::default(), with_events(5).await);
        store.memory().away = Some(StoreError::away("away"));
        store.memory().state.history = HistoryState::Away("away".to_owned());
        queue.begins("a", Begin::Passed);
        let (newcomers, announced) = Newcomers::new();
        let keeps = watch::Sender::new(Keeps::Here).subscribe();
        let running = tokio::spawn(run(announced, queue, store.clone(), keeps, Replays::default()));
        newcomers.announce(&configuration(&[("a", START)])).await;
        assert!(store.memory().introduced.is_empty());
        store.memory().away = None;
        let made = async {
            while replays(&store).await.is_empty() {
                sleep(SOON).await;
            }
        };
        timeout(Duration::from_secs(60), made).await.expect("it is made when the store is back");
        drop(newcomers);
        running.await.expect("ends");
        Newcomers::default().announce(&configuration(&[("a", START)])).await;
    }

    #[tokio::test]
    async fn a_store_that_hangs_delays_a_binding_for_a_bounded_time() {
        let (queue, store) = (Fake::default(), with_events(5).await);
        store.memory().hangs = true;
        let mut task = task(&queue, &store, Keeps::Here);
        let bounded = timeout(2 * STORE_TIMEOUT, task.configure(configuration(&[("a", START)])));
        bounded.await.expect("the subscriber is bound although nothing is recorded");
        store.memory().hangs = false;
        queue.begins("a", Begin::Passed);
        assert_eq!(task.round().await, None);
        assert_eq!(replays(&store).await.len(), 1);
    }

    #[tokio::test]
    async fn nothing_is_replayed_where_history_is_elsewhere_or_the_configuration_wants_none_any_more()
     {
        for (keeps, configured) in [
            (Keeps::Elsewhere, &[("a", START)][..]),
            (Keeps::Here, &[("a", "")]),
            (Keeps::Here, &[]),
        ] {
            let (queue, store) = (Fake::default(), with_events(5).await);
            queue.begins("a", Begin::Passed);
            let mut task = task(&queue, &store, Keeps::Unknown);
            task.configure(configuration(&[("a", START)])).await;
            assert_eq!(task.round().await, Some(POLL), "it is not known yet");
            task.keeps = watch::Sender::new(keeps).subscribe();
            task.configure(configuration(configured)).await;
            assert_eq!(task.round().await, None);
            assert_eq!(replays(&store).await, []);
            task.keeps = watch::Sender::new(Keeps::Here).subscribe();
            task.configure(configuration(&[("a", START)])).await;
            assert_eq!(task.round().await, None);
            assert_eq!(replays(&store).await, [], "it is not new any more");
        }
    }

    #[tokio::test]
    async fn while_ten_replays_run_new_subscribers_wait_and_none_is_forgotten() {
        let (queue, store) = (Fake::default(), with_events(5).await);
        let names: Vec<String> = (0..15).map(|n| format!("s-{n:02}")).collect();
        let all: Vec<(&str, &str)> = names.iter().map(|name| (name.as_str(), START)).collect();
        names.iter().for_each(|name| queue.begins(name, Begin::Passed));
        let mut task = task(&queue, &store, Keeps::Here);
        task.configure(configuration(&all)).await;
        assert_eq!(task.round().await, Some(POLL));
        assert_eq!(replays(&store).await.len(), MAX_RUNNING);
        store.append(vec![row(clock::now()); 3]).await.expect("appends");
        assert_eq!(task.round().await, Some(FULL));
        assert_eq!(replays(&store).await.len(), MAX_RUNNING);
        let ids: Vec<String> = {
            let all = store.running_replays().await.expect("reads").into_iter().flatten();
            all.map(|replay| replay.id).collect()
        };
        for id in ids {
            let cancelled = crate::store::ReplayChange::Cancelled;
            store.change_replay(&id, cancelled, clock::now()).await.expect("changes");
        }
        assert_eq!(task.round().await, None);
        let late = replays(&store).await;
        assert_eq!(late.len(), 5);
        assert!(
            late.iter().all(|(_, _, upto)| *upto == 7),
            "they get the rest themselves: {late:?}"
        );
        let made: BTreeSet<String> = {
            let all = store.memory().replays.clone().into_iter().flatten();
            all.map(|replay| replay.subscriber.to_string()).collect()
        };
        assert_eq!(made.len(), 15);
    }
}

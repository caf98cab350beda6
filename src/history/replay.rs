//! Replays: rows of history go to a subscriber again, in batches of their own.
//!
//! One task runs all replays of a daemon. It puts few batches at a time into a subscriber's queue,
//! so that retries and new events go on between them. What it does is in the store before the next
//! step: a daemon that is killed repeats at most one batch, under the same id and with the same
//! bytes.

mod filling;

use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use tokio::{
    sync::{Notify, watch},
    time::sleep,
};

pub(super) use self::filling::as_sent;
use self::filling::{Filled, Filling, Pace, Values, is_chosen};
use crate::{
    clock,
    config::{Subscriber, Subscribers},
    delivery::{BatchId, PauseState, SubscriberName},
    event::Pattern,
    policy::retry::Backoff,
    queue::{Queue, QueueError},
    store::{
        BatchEnds, Changed, Delivery, DeliveryState, EventNumber, Extent, MAX_ROWS, Replay,
        ReplayChange, ReplayOrder, ReplayProgress, ReplayState, Store, StoreError,
        UnreadableReplay,
    },
    telemetry::outage::{News, Outage},
};

/// Batches of a replay in a subscriber's queue, or in flight.
pub const MAX_UNFINISHED: usize = 8;

/// Bytes of events that are read at once.
const READ_BYTES: usize = 4 << 20;

/// The time between two polls while a replay waits: for batches to be finished, a pause to end, its
/// rate.
const POLL: Duration = Duration::from_millis(200);

/// The time between two polls while no replay runs. A new one is noticed at once.
const IDLE: Duration = Duration::from_secs(5);

/// The time between two looks at the batches of replays that have ended, and the number of the latest
/// replays that are looked at.
const SETTLE: Duration = Duration::from_secs(5);
const SETTLED: usize = 100;

/// The shortest and the longest time between two tries with the store or a queue.
const FIRST_BACKOFF: Duration = Duration::from_millis(200);
const MAX_BACKOFF: Duration = Duration::from_secs(5);

/// The time for which the store may lack a batch, or its end, before the queue is asked. That costs
/// a broker a pass through all retries.
const ASK_QUEUE_AFTER: Duration = Duration::from_secs(60);

/// The task's other end: says that replays were made or changed. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct Replays(Arc<Notify>);

impl Replays {
    /// Says that a replay was made, or goes on.
    pub fn changed(&self) {
        self.0.notify_one();
    }

    /// Runs the replays of a daemon, until it is dropped.
    pub async fn run<Q: Queue, S: Store>(
        self,
        queue: Q,
        store: S,
        subscribers: watch::Receiver<Subscribers>,
    ) {
        let mut runner = Runner::new(queue, store, subscribers);
        let mut outage = Outage::default();
        let mut backoff = Backoff::new(FIRST_BACKOFF, MAX_BACKOFF);
        loop {
            let wait = match runner.round().await {
                Ok(wait) => {
                    outage.end();
                    backoff.reset();
                    wait
                }
                Err(e) => {
                    // Away: that is logged by the code that found it.
                    if outage.failed(&e.to_string()) == News::First && !e.is_away() {
                        tracing::warn!(error = %e, "replays wait for the store");
                    }
                    backoff.grow()
                }
            };
            tokio::select! {
                () = sleep(wait) => {}
                () = self.0.notified() => {}
            }
        }
    }
}

/// What a replay is asked to send.
#[derive(Debug, Clone)]
pub struct Wanted {
    pub since: SystemTime,
    pub until: Option<SystemTime>,
    /// Of the subscriber's events those whose type matches it.
    pub events: Option<Pattern>,
    /// Events in a second, at most.
    pub rate: Option<u32>,
}

/// A new replay, with all that is frozen at its start. It is not stored yet.
///
/// # Errors
/// The store cannot be read.
pub async fn new<S: Store>(
    store: &S,
    subscriber: &Subscriber,
    wanted: Wanted,
    by: &str,
    now: SystemTime,
) -> Result<Replay, StoreError> {
    let extent = match store.extent(wanted.since, wanted.until, None).await? {
        Some(extent) => extent,
        // Nothing yet.
        None => {
            let last = store.reach().await?.last.map_or(EventNumber(0), |(number, _)| number);
            Extent { after: last, upto: last, rows: 0 }
        }
    };
    Ok(replay(subscriber, wanted, by, extent, now))
}

/// The first replay of a new subscriber: what history has from a time on and up to a row. `None` if
/// there is nothing.
pub(super) async fn first<S: Store>(
    store: &S,
    subscriber: &Subscriber,
    since: SystemTime,
    upto: EventNumber,
    now: SystemTime,
) -> Result<Option<Replay>, StoreError> {
    let Some(extent) = store.extent(since, None, Some(upto)).await? else { return Ok(None) };
    let wanted = Wanted { since, until: None, events: None, rate: None };
    let mut replay = replay(subscriber, wanted, "start_from", extent, now);
    replay.order.bound_at = Some(now);
    Ok(Some(replay))
}

fn replay(
    subscriber: &Subscriber,
    wanted: Wanted,
    by: &str,
    extent: Extent,
    now: SystemTime,
) -> Replay {
    Replay {
        row: 0,
        id: clock::replay_id(),
        subscriber: subscriber.name.clone(),
        order: ReplayOrder {
            by: by.to_owned(),
            since: wanted.since,
            until: wanted.until,
            patterns: subscriber.events.clone(),
            tenant: subscriber.tenant.clone(),
            events: wanted.events,
            after: extent.after,
            rate: wanted.rate,
            format: subscriber.format,
            max_events: max_events(subscriber),
            max_bytes: subscriber.batch.max_bytes,
            event_ids: subscriber.event_ids,
            metadata: subscriber.metadata.clone(),
            bound_at: None,
        },
        progress: ReplayProgress::begin(extent.after, extent.upto, extent.rows),
        state: ReplayState::Running,
        created_at: now,
        changed_at: now,
    }
}

/// The most events of a batch; no more than `http.rate` lets go at once.
fn max_events(subscriber: &Subscriber) -> usize {
    let by_rate = subscriber.http.rate.map_or(usize::MAX, |rate| rate.max_events());
    subscriber.batch.max_events.min(by_rate)
}

/// Counts the events that a replay would send. Also returns whether all were counted before the
/// deadline.
///
/// # Errors
/// The store cannot be read.
pub async fn count<S: Store>(
    store: &S,
    replay: &Replay,
    subscriber: &Subscriber,
    deadline: Instant,
) -> Result<(u64, bool), StoreError> {
    let (mut after, mut events) = (replay.progress.position, 0);
    let values = Values::of(subscriber);
    loop {
        let rows = store.rows(after, replay.progress.upto, MAX_ROWS, READ_BYTES).await?;
        let Some(last) = rows.last() else { return Ok((events, true)) };
        after = last.number;
        events += rows.iter().filter(|row| is_chosen(&replay.order, row, &values)).count() as u64;
        if clock::instant() >= deadline {
            return Ok((events, false));
        }
    }
}

/// The states of a replay's batches, as far as history knows. Together they are all its batches.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Outcome {
    pub ends: BatchEnds,
    /// Attempted, and to be attempted again.
    pub retrying: u64,
    /// In the subscriber's queue without an attempt, in flight, or paused.
    pub waiting: u64,
    /// History lacks their end: it was dropped or removed, or an earlier version did not count it.
    pub unknown: u64,
}

/// The states of a replay's batches. `from`: when the deliveries in history begin.
///
/// # Errors
/// The store cannot be read.
pub async fn outcome<S: Store>(
    store: &S,
    replay: &Replay,
    from: Option<SystemTime>,
    now: SystemTime,
) -> Result<Outcome, StoreError> {
    let ReplayProgress { ends, batches, unfinished, .. } = &replay.progress;
    let mut outcome = Outcome { ends: *ends, ..Outcome::default() };
    // Of a replay from before that time an end may have been removed.
    let is_recent = replay.changed_at.checked_add(ASK_QUEUE_AFTER).is_none_or(|then| now < then);
    let is_covered = is_recent || from.is_some_and(|from| from <= replay.changed_at);
    for id in unfinished {
        match store.delivery(id.as_str()).await? {
            Some(delivery) if outcome.ends.count(&delivery.state) => {}
            Some(delivery) if delivery.doubt(now).is_some() => {}
            Some(delivery) if matches!(delivery.state, DeliveryState::Retrying { .. }) => {
                outcome.retrying += 1;
            }
            Some(_) => outcome.waiting += 1,
            // Not attempted yet.
            None => outcome.waiting += u64::from(is_covered),
        }
    }
    let known = outcome.ends.sum() + outcome.retrying + outcome.waiting;
    outcome.unknown = batches.saturating_sub(known);
    Ok(outcome)
}

impl Outcome {
    /// What the record alone says.
    pub fn recorded(replay: &Replay) -> Self {
        let ReplayProgress { ends, batches, .. } = replay.progress;
        Self { ends, unknown: batches.saturating_sub(ends.sum()), ..Self::default() }
    }
}

struct Runner<Q, S> {
    queue: Q,
    store: S,
    subscribers: watch::Receiver<Subscribers>,
    /// By the id of the replay.
    works: HashMap<String, Work>,
    /// The ids of the replays whose records cannot be read, which the log has.
    unreadable: HashSet<String>,
    /// When it looked at the batches of replays that have ended.
    settled: Option<Instant>,
}

/// A running replay in memory.
struct Work {
    filling: Filling,
    /// The last row that was read.
    read_to: EventNumber,
    /// No row is left, as far as is known.
    is_at_end: bool,
    ready: VecDeque<Filled>,
    /// The batches in the subscriber's queue, and since when that is known here.
    unfinished: Vec<(BatchId, Instant)>,
    ends: BatchEnds,
    /// The batch that is in the queue already, and not recorded yet.
    enqueued: Option<BatchId>,
    /// When the queue was asked last, and which batches it did not have.
    asked: Option<(Instant, HashSet<BatchId>)>,
    pace: Pace,
    outage: Outage,
    /// When to try the queue again.
    retry_at: Option<Instant>,
    backoff: Backoff,
}

impl Work {
    fn new(replay: &Replay, values: Values, now: Instant) -> Self {
        let unfinished = replay.progress.unfinished.iter();
        Self {
            filling: Filling::new(replay, values),
            read_to: replay.progress.position,
            is_at_end: false,
            ready: VecDeque::new(),
            unfinished: unfinished.map(|id| (id.clone(), now)).collect(),
            ends: replay.progress.ends,
            enqueued: None,
            asked: None,
            pace: Pace::new(replay.order.rate),
            outage: Outage::default(),
            retry_at: None,
            backoff: Backoff::new(FIRST_BACKOFF, MAX_BACKOFF),
        }
    }

    /// Reads again what is not in the queue yet: it is chosen and redacted in another way now.
    fn refill(&mut self, replay: &Replay, values: Values) {
        self.filling = Filling::new(replay, values);
        self.read_to = replay.progress.position;
        self.is_at_end = false;
        self.ready.clear();
    }

    /// A progress with what is known of its batches now.
    fn with_batches(&self, progress: &ReplayProgress) -> ReplayProgress {
        let unfinished = self.unfinished.iter().map(|(id, _)| id.clone()).collect();
        ReplayProgress { unfinished, ends: self.ends, ..progress.clone() }
    }
}

/// The result of a step.
enum Stepped {
    /// There may be more to do at once.
    On,
    Waits,
    /// The replay is not running any more.
    Ended,
}

impl<Q: Queue, S: Store> Runner<Q, S> {
    fn new(queue: Q, store: S, subscribers: watch::Receiver<Subscribers>) -> Self {
        let (works, unreadable) = (HashMap::new(), HashSet::new());
        Self { queue, store, subscribers, works, unreadable, settled: None }
    }

    /// The replays that run and can be read. The others must not keep them from running.
    async fn running(&mut self) -> Result<Vec<Replay>, StoreError> {
        let (mut running, mut unreadable) = (Vec::new(), HashSet::new());
        for recorded in self.store.running_replays().await? {
            match recorded {
                Ok(replay) => running.push(replay),
                Err(it) => {
                    let UnreadableReplay { id, subscriber, why, .. } = *it;
                    if !self.unreadable.contains(&id) {
                        tracing::error!(
                            replay = id,
                            subscriber,
                            error = why,
                            "replay does not run"
                        );
                    }
                    unreadable.insert(id);
                }
            }
        }
        self.unreadable = unreadable;
        Ok(running)
    }

    /// One step of each subscriber's oldest replay. Returns the time until the next round.
    async fn round(&mut self) -> Result<Duration, StoreError> {
        let running = self.running().await?;
        self.works.retain(|id, _| running.iter().any(|replay| replay.id == *id));
        let mut wait = if running.is_empty() { IDLE } else { POLL };
        let mut begun: HashSet<&SubscriberName> = HashSet::new();
        for replay in &running {
            if !begun.insert(&replay.subscriber) {
                continue;
            }
            match self.step(replay).await? {
                Stepped::On => wait = Duration::ZERO,
                Stepped::Waits => {}
                Stepped::Ended => {
                    self.works.remove(&replay.id);
                    wait = Duration::ZERO;
                }
            }
        }
        self.settle().await?;
        Ok(wait)
    }

    /// Counts the ends of batches that were in a queue still when their replay ended.
    async fn settle(&mut self) -> Result<(), StoreError> {
        let now = clock::instant();
        if self.settled.is_some_and(|at| now.saturating_duration_since(at) < SETTLE) {
            return Ok(());
        }
        self.settled = Some(now);
        let latest = self.store.replays(None, SETTLED).await?;
        let ended = latest.rows.iter().flatten().filter(|r| r.state != ReplayState::Running);
        for Replay { id, progress, .. } in ended {
            let (mut ends, mut unfinished) = (progress.ends, Vec::new());
            for batch in &progress.unfinished {
                let delivery = self.store.delivery(batch.as_str()).await?;
                if !delivery.is_some_and(|delivery| ends.count(&delivery.state)) {
                    unfinished.push(batch.clone());
                }
            }
            if unfinished.len() < progress.unfinished.len() {
                let change = ReplayChange::Settled { ends, unfinished };
                self.store.change_replay(id, change, clock::now()).await?;
            }
        }
        Ok(())
    }

    async fn step(&mut self, replay: &Replay) -> Result<Stepped, StoreError> {
        let name = &replay.subscriber;
        let configured = self.subscribers.borrow().iter().find(|s| s.name == *name).cloned();
        let Some(subscriber) = configured else {
            let why = format!("subscriber `{name}` is not configured any more");
            return self.fail(replay, why).await;
        };
        if subscriber.tenant != replay.order.tenant {
            let why =
                format!("subscriber `{name}` is not the same any more: it has another tenant");
            return self.fail(replay, why).await;
        }
        if is_paused(&self.queue, &subscriber) {
            return Ok(Stepped::Waits);
        }
        let now = clock::instant();
        let values = Values::of(&subscriber);
        let entry = self.works.entry(replay.id.clone());
        let work = entry.or_insert_with(|| Work::new(replay, values.clone(), now));
        if *work.filling.values() != values {
            work.refill(replay, values);
        }
        forget_finished(&self.queue, &self.store, &subscriber, work).await?;
        let waits = work.unfinished.len() >= MAX_UNFINISHED
            || !work.pace.wait(now).is_zero()
            || work.retry_at.is_some_and(|at| at > now);
        if waits {
            return Ok(Stepped::Waits);
        }
        if work.ready.is_empty() && !work.is_at_end {
            read(&self.store, work).await?;
            return Ok(Stepped::On);
        }
        match work.ready.front() {
            Some(_) => self.enqueue(replay).await,
            None => self.end(replay).await,
        }
    }

    /// Puts the next batch into the queue, then records that.
    async fn enqueue(&mut self, replay: &Replay) -> Result<Stepped, StoreError> {
        let Some(work) = self.works.get_mut(&replay.id) else { return Ok(Stepped::On) };
        let Some(next) = work.ready.front() else { return Ok(Stepped::On) };
        let (id, events) = (next.batch.id.clone(), next.batch.events);
        let name = &replay.subscriber;
        let now = clock::instant();
        // The daemon may have been killed after the batch was enqueued, and before that was recorded.
        let is_known = work.enqueued.as_ref() == Some(&id)
            || self.store.delivery(id.as_str()).await?.is_some();
        if !is_known && let Err(e) = self.queue.enqueue(name, vec![next.batch.clone()]).await {
            work.retry_at = Some(now + work.backoff.grow());
            log_outage(&mut work.outage, replay, &e);
            return Ok(Stepped::Waits);
        }
        // A record that fails is tried again alone: the queue has the batch.
        work.enqueued = Some(id.clone());
        work.outage.end();
        work.backoff.reset();
        work.retry_at = None;
        let mut progress = work.with_batches(&next.progress);
        progress.unfinished.push(id.clone());
        let change = ReplayChange::Progressed(progress);
        let changed = self.store.change_replay(&replay.id, change, clock::now()).await?;
        if !matches!(changed, Some(Changed::Yes(_))) {
            return Ok(Stepped::Ended);
        }
        work.ready.pop_front();
        work.unfinished.push((id, now));
        work.pace.spend(events, now);
        Ok(Stepped::On)
    }

    /// There are no more rows.
    async fn end(&mut self, replay: &Replay) -> Result<Stepped, StoreError> {
        let Some(work) = self.works.get_mut(&replay.id) else { return Ok(Stepped::On) };
        let upto = work.filling.progress().upto;
        let progress = work.with_batches(work.filling.progress());
        let completed = ReplayChange::Completed(ReplayProgress { position: upto, ..progress });
        if let Some(Changed::Yes(ended)) =
            self.store.change_replay(&replay.id, completed, clock::now()).await?
            && let Ok(ended) = *ended
        {
            let ReplayProgress { enqueued, batches, missing, unusable, .. } = ended.progress;
            tracing::info!(
                replay = replay.id,
                subscriber = replay.subscriber.as_str(),
                enqueued,
                batches,
                missing,
                unusable,
                "replay done"
            );
        }
        Ok(Stepped::Ended)
    }

    async fn fail(&self, replay: &Replay, why: String) -> Result<Stepped, StoreError> {
        tracing::warn!(
            replay = replay.id,
            subscriber = replay.subscriber.as_str(),
            why,
            "replay failed"
        );
        self.store.change_replay(&replay.id, ReplayChange::Failed(why), clock::now()).await?;
        Ok(Stepped::Ended)
    }
}

fn is_paused<Q: Queue>(queue: &Q, subscriber: &Subscriber) -> bool {
    let states = queue.pause_states();
    let states = states.borrow();
    // Not known yet: as if it were.
    subscriber.paused
        || states
            .as_ref()
            .is_none_or(|states| states.get(&subscriber.name).and_then(PauseState::pause).is_some())
}

/// Reads the next rows into batches.
async fn read<S: Store>(store: &S, work: &mut Work) -> Result<(), StoreError> {
    let upto = work.filling.progress().upto;
    let rows = store.rows(work.read_to, upto, MAX_ROWS, READ_BYTES).await?;
    work.is_at_end = rows.is_empty();
    if work.is_at_end {
        work.ready.extend(work.filling.end());
    }
    for row in &rows {
        work.read_to = row.number;
        work.ready.extend(work.filling.add(row));
    }
    Ok(())
}

/// Forgets the batches that are in the subscriber's queue no more.
async fn forget_finished<Q: Queue, S: Store>(
    queue: &Q,
    store: &S,
    subscriber: &Subscriber,
    work: &mut Work,
) -> Result<(), StoreError> {
    let now = clock::instant();
    let mut overdue = HashSet::new();
    let mut kept = Vec::new();
    for (id, since) in std::mem::take(&mut work.unfinished) {
        let delivery = match store.delivery(id.as_str()).await {
            Ok(delivery) => delivery,
            Err(e) => {
                kept.push((id, since));
                work.unfinished.append(&mut kept);
                return Err(e);
            }
        };
        if delivery.as_ref().is_some_and(|delivery| work.ends.count(&delivery.state)) {
            continue;
        }
        let is_unknown = is_unknown(delivery.as_ref(), clock::now(), subscriber.longest_attempt());
        if is_unknown && now.saturating_duration_since(since) > ASK_QUEUE_AFTER {
            overdue.insert(id.clone());
        }
        kept.push((id, since));
    }
    work.unfinished = kept;
    let is_time = work
        .asked
        .as_ref()
        .is_none_or(|(at, _)| now.saturating_duration_since(*at) > ASK_QUEUE_AFTER);
    if overdue.is_empty() || !is_time {
        return Ok(());
    }
    // A batch in flight is in no list; twice in a row none is.
    let before = work.asked.take().map(|(_, absent)| absent).unwrap_or_default();
    let absent = match queue.waiting(&subscriber.name).await {
        Ok(list) if list.unseen == 0 => {
            let waiting: HashSet<&BatchId> = list.batches.iter().map(|w| &w.batch_id).collect();
            overdue.into_iter().filter(|id| !waiting.contains(id)).collect()
        }
        _ => HashSet::new(),
    };
    work.unfinished.retain(|(id, _)| !(absent.contains(id) && before.contains(id)));
    work.asked = Some((now, absent));
    Ok(())
}

/// Whether the store may lack an enqueued batch, or its end.
fn is_unknown(delivery: Option<&Delivery>, now: SystemTime, longest_attempt: Duration) -> bool {
    let Some(delivery) = delivery else { return true };
    let ends_by = match &delivery.state {
        DeliveryState::Retrying { due } => *due,
        _ => delivery.changed_at,
    };
    now > ends_by + longest_attempt
}

fn log_outage(outage: &mut Outage, replay: &Replay, e: &QueueError) {
    let (id, subscriber) = (replay.id.as_str(), replay.subscriber.as_str());
    match outage.failed(&e.to_string()) {
        News::Known => {
            tracing::debug!(replay = id, subscriber, error = %e, "replay still waits for the queue");
        }
        News::First | News::OtherReason => {
            tracing::warn!(replay = id, subscriber, error = %e, "replay waits for the queue");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::{
        config::testing,
        delivery::{Batch, Pause, Reason},
        event::Tenant,
        queue::fake::Fake,
        store::{
            Added, Change, Contents, DeliveryChange, NewRow, fake::FakeStore,
            replays_for_tests::replay,
        },
    };

    /// A daemon with history and one subscriber.
    struct World {
        queue: Fake,
        store: FakeStore,
        subscribers: watch::Sender<Subscribers>,
    }

    impl World {
        /// History has this many events, of which every second one is chosen.
        async fn with_events(events: u32) -> Self {
            let world = Self {
                queue: Fake::default(),
                store: FakeStore::default(),
                subscribers: watch::Sender::new(Vec::new().into()),
            };
            world.configure(&["a"]);
            world.append(events).await;
            world
        }

        fn configure(&self, names: &[&str]) {
            let all = names.iter().map(|name| Arc::new(testing::subscriber(name, "")));
            self.subscribers.send_replace(all.collect());
        }

        async fn append(&self, events: u32) {
            let event = |n: u32| {
                let event_type = if n.is_multiple_of(2) { "user.a" } else { "other.a" };
                NewRow {
                    number: None,
                    at: replay("", "a").created_at,
                    event_type: event_type.to_owned(),
                    message_id: None,
                    body: format!(r#"{{"event":"{event_type}","n":{n}}}"#).into(),
                    redelivered: false,
                    tenant: None,
                }
            };
            self.store.append((0..events).map(event).collect()).await.expect("appends");
        }

        /// Adds a replay of the first rows.
        async fn add(&self, id: &str, rows: u32) {
            let mut new = replay(id, "a");
            new.order.rate = None;
            new.order.bound_at = None;
            new.order.event_ids = false;
            new.progress.ends = BatchEnds::default();
            new.progress.unfinished.clear();
            new.progress.upto = EventNumber(rows.into());
            new.progress.rows = rows.into();
            assert_eq!(self.store.add_replay(new, None).await, Ok(Added::New));
        }

        fn daemon(&self) -> Runner<Fake, FakeStore> {
            Runner::new(self.queue.clone(), self.store.clone(), self.subscribers.subscribe())
        }

        /// Delivers what is in the queue of the subscriber. Returns the number of batches.
        async fn deliver(&self) -> usize {
            let batches = self.queue.take_enqueued("a");
            for batch in &batches {
                self.record(batch, Change::Delivered).await;
            }
            batches.len()
        }

        /// A batch is attempted, and this became of it.
        async fn record(&self, batch: &Batch, end: Change) {
            let contents = Contents {
                format: Some(batch.format),
                events: batch.events,
                bytes: batch.body.len() as u64,
                sha256: None,
                prints: batch.prints.clone(),
                replay: batch.replay,
                parent: None,
            };
            let started = Change::Started { attempt: 1, contents, by: "me".to_owned() };
            let change = |change| DeliveryChange {
                id: batch.id.clone(),
                subscriber: "a".into(),
                at: clock::now(),
                change,
            };
            self.store.record(vec![change(started), change(end)]).await.expect("records");
        }

        /// Begins the batches in the queue, the first to last, and ends each with one of these.
        async fn end_with<const N: usize>(&self, ends: [Change; N]) {
            let batches = self.queue.take_enqueued("a");
            assert_eq!(batches.len(), N);
            for (batch, end) in batches.iter().zip(ends) {
                self.record(batch, end).await;
            }
        }

        async fn replay(&self, id: &str) -> Replay {
            self.store.replay(id).await.expect("reads").expect("is there").expect("can be read")
        }

        async fn until_state(
            &self,
            daemon: &mut Runner<Fake, FakeStore>,
            id: &str,
            state: &str,
        ) -> Replay {
            for _ in 0..1000 {
                settle(daemon).await;
                let replay = self.replay(id).await;
                if replay.state.name() == state {
                    return replay;
                }
                if self.deliver().await == 0 {
                    // It waits until it tries the queue again.
                    sleep(Duration::from_millis(10)).await;
                }
            }
            panic!("it is never {state}");
        }
    }

    /// Lets the daemon do all that it can do without others.
    async fn settle(daemon: &mut Runner<Fake, FakeStore>) {
        while daemon.round().await.is_ok_and(|wait| wait.is_zero()) {}
    }

    #[tokio::test]
    async fn a_replay_puts_a_few_batches_at_a_time_into_the_queue_and_ends_with_all_of_them() {
        let world = World::with_events(200).await;
        world.add("rpl_1", 200).await;
        let mut daemon = world.daemon();
        settle(&mut daemon).await;
        assert_eq!(world.queue.enqueued().len(), MAX_UNFINISHED);
        assert_eq!(world.replay("rpl_1").await.progress.unfinished.len(), MAX_UNFINISHED);
        assert_eq!(world.deliver().await, MAX_UNFINISHED);
        settle(&mut daemon).await;
        assert_eq!(world.queue.enqueued().len(), 2 * MAX_UNFINISHED);
        let done = world.until_state(&mut daemon, "rpl_1", "done").await.progress;
        assert_eq!((done.read, done.matched, done.enqueued), (200, 100, 100));
        assert_eq!((done.batches, done.missing, done.position), (34, 0, EventNumber(200)));
        assert_eq!(done.ends.sum() + done.unfinished.len() as u64, 34, "{done:?}");
        let all = world.queue.enqueued();
        assert!(all.iter().all(|batch| batch.replay));
        let ids: BTreeSet<&BatchId> = all.iter().map(|batch| &batch.id).collect();
        assert_eq!((ids.len(), all.len()), (34, 34));
        assert!(all[0].body.starts_with(br#"{"event":"user.a","n":0}"#));
    }

    #[tokio::test]
    async fn what_is_to_be_redacted_or_not_sent_any_more_is_in_no_batch_that_comes_into_the_queue_from_then_on()
     {
        let world = World::with_events(200).await;
        world.add("rpl_1", 200).await;
        let mut daemon = world.daemon();
        settle(&mut daemon).await;
        let known: BTreeSet<BatchId> = world.queue.enqueued().into_iter().map(|b| b.id).collect();
        assert_eq!(known.len(), MAX_UNFINISHED);
        let text = |batch: &Batch| String::from_utf8_lossy(&batch.body).into_owned();
        for batch in world.queue.enqueued() {
            assert!(text(&batch).contains(r#""n":"#) && !text(&batch).contains("FILTERED"));
        }
        let lines = "redact = [\"/n\"]\nmatch = { \"/event\" = [\"user.a\"] }";
        let redacting = Arc::new(testing::subscriber("a", lines));
        world.subscribers.send_replace(vec![redacting].into());
        let done = world.until_state(&mut daemon, "rpl_1", "done").await.progress;
        assert_eq!((done.read, done.matched, done.enqueued), (200, 100, 100), "each event once");
        let (before, after): (Vec<Batch>, Vec<Batch>) =
            world.queue.enqueued().into_iter().partition(|batch| known.contains(&batch.id));
        assert_eq!(before.len(), MAX_UNFINISHED);
        let events = |all: &[Batch]| all.iter().map(|batch| batch.events).sum::<u32>();
        assert_eq!(events(&before) + events(&after), 100);
        for batch in &after {
            let filtered = text(batch).matches(r#""n":"[FILTERED]""#).count();
            assert_eq!(filtered, batch.events as usize, "{}", text(batch));
        }
    }

    #[tokio::test]
    async fn a_daemon_that_was_killed_goes_on_where_it_was_and_repeats_no_batch() {
        let world = World::with_events(100).await;
        world.add("rpl_1", 100).await;
        let mut daemon = world.daemon();
        settle(&mut daemon).await;
        drop(daemon);
        world.deliver().await;
        // Killed between the queue's answer and the record of it.
        let recorded = world.replay("rpl_1").await.progress;
        assert_eq!(recorded.position, EventNumber(47), "eight batches of three");
        {
            let mut memory = world.store.memory();
            let replay = memory.replays[0].as_mut().expect("can be read");
            // As it was before the last of them.
            replay.progress.position = EventNumber(41);
            (replay.progress.read, replay.progress.matched) = (41, 21);
            replay.progress.enqueued -= 3;
            replay.progress.batches -= 1;
            replay.progress.unfinished.pop();
        }
        let mut daemon = world.daemon();
        let done = world.until_state(&mut daemon, "rpl_1", "done").await.progress;
        let all = world.queue.enqueued();
        let ids: BTreeSet<&BatchId> = all.iter().map(|batch| &batch.id).collect();
        assert_eq!((ids.len(), all.len()), (17, 17));
        assert_eq!((done.batches, done.ends.sum() + done.unfinished.len() as u64), (17, 17));
    }

    #[tokio::test]
    async fn what_became_of_each_batch_is_known_also_after_the_last_is_in_the_queue() {
        let world = World::with_events(30).await;
        world.add("rpl_1", 30).await;
        let outcome = async || {
            let replay = world.replay("rpl_1").await;
            outcome(&world.store, &replay, None, clock::now()).await.expect("reads")
        };
        assert_eq!(outcome().await, Outcome::default());
        let mut daemon = world.daemon();
        settle(&mut daemon).await;
        let done = world.replay("rpl_1").await;
        assert_eq!((done.state.name(), done.progress.batches), ("done", 5), "none is delivered");
        assert_eq!(outcome().await, Outcome { waiting: 5, ..Outcome::default() });
        let soon = clock::now() + Duration::from_secs(60);
        let reason = Reason::Exhausted;
        world
            .end_with([
                Change::Delivered,
                Change::Dead { reason, contents: None },
                Change::Split,
                Change::Retrying { due: soon },
                Change::Retrying { due: SystemTime::UNIX_EPOCH },
            ])
            .await;
        let ends = BatchEnds { delivered: 1, dead: 1, split: 1 };
        let found = Outcome { ends, retrying: 1, waiting: 0, unknown: 1 };
        assert_eq!(outcome().await, found);
        // The dead letter is replayed after it was counted, and history forgets what was delivered.
        daemon.settled = None;
        settle(&mut daemon).await;
        let counted = world.replay("rpl_1").await;
        assert_eq!((counted.progress.ends, counted.progress.unfinished.len()), (ends, 2));
        assert_eq!(counted.changed_at, done.changed_at);
        world.store.memory().deliveries.retain(|d| counted.progress.unfinished.contains(&d.id));
        assert_eq!(outcome().await, found);
        // One batch was counted; of the others history has only one.
        let mut later = done;
        later.progress.ends.delivered = 1;
        later.progress.unfinished.remove(0);
        let ends = BatchEnds { delivered: 1, ..BatchEnds::default() };
        let (changed_at, hour) = (later.changed_at, Duration::from_secs(3600));
        for (from, now, waiting) in [
            (None, changed_at, 2),
            (None, changed_at + hour, 0),
            (Some(changed_at), changed_at + hour, 2),
            (Some(changed_at + Duration::from_secs(1)), changed_at + hour, 0),
        ] {
            let found = super::outcome(&world.store, &later, from, now).await.expect("reads");
            assert_eq!((found.ends, found.waiting), (ends, waiting), "{from:?} {now:?}");
            assert_eq!(found.ends.sum() + found.retrying + found.waiting + found.unknown, 5);
        }
    }

    #[tokio::test]
    async fn a_replay_waits_for_a_paused_subscriber_the_queue_and_the_store() {
        let world = World::with_events(10).await;
        let pause = Pause { why: String::new(), since: clock::now(), by: "operator".to_owned() };
        world.queue.record(&"a".into(), PauseState::Paused(pause)).await.expect("records");
        world.add("rpl_1", 10).await;
        let mut daemon = world.daemon();
        settle(&mut daemon).await;
        assert!(world.queue.enqueued().is_empty(), "paused");
        world.queue.refuse(Some(QueueError::new("away")));
        let resumed = PauseState::Resumed { at: clock::now() };
        world.queue.record(&"a".into(), resumed).await.expect("records");
        settle(&mut daemon).await;
        assert!(world.queue.enqueued().is_empty(), "the queue is away");
        world.store.memory().away = Some(StoreError::away("away"));
        world.queue.refuse(None);
        settle(&mut daemon).await;
        assert!(world.queue.enqueued().is_empty(), "the store is away");
        world.store.memory().away = None;
        world.until_state(&mut daemon, "rpl_1", "done").await;
        assert_eq!(world.queue.enqueued().len(), 2);
    }

    #[tokio::test]
    async fn a_removed_subscriber_fails_its_replay_and_a_cancelled_one_goes_on_when_continued() {
        let world = World::with_events(100).await;
        world.add("rpl_1", 100).await;
        let mut daemon = world.daemon();
        settle(&mut daemon).await;
        let change = |change| world.store.change_replay("rpl_1", change, clock::now());
        change(ReplayChange::Cancelled).await.expect("changes");
        settle(&mut daemon).await;
        world.deliver().await;
        settle(&mut daemon).await;
        assert_eq!(world.queue.enqueued().len(), MAX_UNFINISHED);
        world.configure(&["b"]);
        change(ReplayChange::Continued).await.expect("changes");
        let failed = world.until_state(&mut daemon, "rpl_1", "failed").await;
        assert!(failed.state.why().is_some_and(|why| why.contains("not configured")));
        world.configure(&["a"]);
        change(ReplayChange::Continued).await.expect("changes");
        let done = world.until_state(&mut daemon, "rpl_1", "done").await.progress;
        assert_eq!((done.enqueued, world.queue.enqueued().len()), (50, 17));
    }

    #[tokio::test]
    async fn a_replay_never_goes_on_to_a_subscriber_of_another_tenant_with_the_same_name() {
        let world = World::with_events(200).await;
        world.add("rpl_1", 200).await;
        let mut other = testing::subscriber("a", "");
        other.tenant = Tenant::try_new("B");
        let mut daemon = world.daemon();
        settle(&mut daemon).await;
        world.deliver().await;
        let before = world.queue.enqueued().len();
        world.subscribers.send_replace(vec![Arc::new(other)].into());
        let failed = world.until_state(&mut daemon, "rpl_1", "failed").await;
        assert!(
            matches!(&failed.state, ReplayState::Failed(why) if why.contains("another tenant")),
            "{failed:?}"
        );
        world
            .store
            .change_replay("rpl_1", ReplayChange::Continued, clock::now())
            .await
            .expect("is stored");
        settle(&mut daemon).await;
        assert_eq!(world.replay("rpl_1").await.state.name(), "failed");
        assert_eq!(world.queue.enqueued().len(), before, "it got nothing");
    }

    #[tokio::test]
    async fn rows_that_retention_removed_are_reported_missing() {
        let world = World::with_events(100).await;
        world.store.memory().events.retain(|row| !(10..30).contains(&row.number.0));
        world.add("rpl_1", 100).await;
        let mut daemon = world.daemon();
        let done = world.until_state(&mut daemon, "rpl_1", "done").await.progress;
        assert_eq!((done.missing, done.read, done.enqueued), (20, 80, 40));
    }

    #[tokio::test]
    async fn of_two_replays_of_a_subscriber_the_later_one_waits() {
        let world = World::with_events(100).await;
        world.add("rpl_1", 100).await;
        world.add("rpl_2", 100).await;
        let mut daemon = world.daemon();
        settle(&mut daemon).await;
        assert_eq!(world.queue.enqueued().len(), MAX_UNFINISHED);
        world.until_state(&mut daemon, "rpl_2", "done").await;
        let all = world.queue.enqueued();
        let ids: BTreeSet<&BatchId> = all.iter().map(|batch| &batch.id).collect();
        assert_eq!(ids.len(), 34, "batches of both");
    }

    #[tokio::test]
    async fn a_replay_whose_record_cannot_be_read_keeps_no_other_from_running() {
        let world = World::with_events(10).await;
        let recorded = |state: &str| UnreadableReplay {
            row: 1,
            id: "rpl_1".to_owned(),
            subscriber: "a".to_owned(),
            state: state.to_owned(),
            created_at: clock::now(),
            changed_at: clock::now(),
            why: "of a later version".to_owned(),
        };
        world.store.memory().replays.push(Err(Box::new(recorded("running"))));
        world.add("rpl_2", 10).await;
        let mut daemon = world.daemon();
        world.until_state(&mut daemon, "rpl_2", "done").await;
        assert!(daemon.unreadable.contains("rpl_1"));
        let cancelled =
            world.store.change_replay("rpl_1", ReplayChange::Cancelled, clock::now()).await;
        assert!(matches!(&cancelled, Ok(Some(Changed::Yes(it))) if it.is_err()), "{cancelled:?}");
        settle(&mut daemon).await;
        assert!(daemon.unreadable.is_empty());
    }
}

//! Deliveries on their way into history.
//!
//! An observer of the lanes makes [`DeliveryChange`]s of their events, and puts them into a bounded
//! channel: no lane ever waits for the store. A task, [`Recorder::run`], hands them to the store in
//! groups. Changes for which there is no room are dropped, counted, and recorded as a
//! [`Gap`](crate::store::Gap). While another store has history they are dropped alone: this one keeps
//! none.

use std::{
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, SystemTime},
};

use tokio::{
    sync::{
        Notify,
        mpsc::{self, error::TryRecvError},
        watch,
    },
    time::{sleep, timeout},
};

use super::{
    changes::{each_change, weight},
    events::Keeps,
    losses::{Losses, QUIET, WHAT},
};
use crate::{
    clock,
    policy::retry::Backoff,
    store::{Change, DeliveryChange, Store},
    telemetry::{
        metrics::Metrics,
        outage::{News, Outage},
        status::Observer,
    },
};

/// The most changes that wait for the store.
const MAX_WAITING: usize = 8192;

/// Of these places the last are not for attempts that begin: a batch without its begin is missing,
/// but one without its end would seem to be in flight.
const FOR_ENDS: usize = MAX_WAITING / 4;

/// Bytes of the changes that wait, about, those included that the store is being handed.
const MAX_WAITING_BYTES: usize = 16 << 20;

/// The most changes that the store gets at once.
const GROUP: usize = 500;

/// The longest time that a change waits for others, for which the store commits only once.
const GATHER: Duration = Duration::from_millis(250);

/// The time after which a group that the store does not take is dropped, so that what happened
/// since then has its place.
const GIVE_UP: Duration = Duration::from_secs(60);

/// The shortest and the longest time between two tries.
const FIRST_BACKOFF: Duration = Duration::from_millis(200);
const MAX_BACKOFF: Duration = Duration::from_secs(5);

/// The time that the end of the daemon has for what waits.
const FLUSH: Duration = Duration::from_secs(2);

/// The observer of a daemon's lanes, and the task that records what it observes. `by` is the
/// daemon's name.
pub fn recording(by: &str, metrics: &Metrics) -> (Observer, Recorder) {
    let (sender, inbox) = mpsc::channel(MAX_WAITING);
    let shared = Arc::new(Shared {
        bytes: AtomicUsize::new(0),
        enough: Notify::new(),
        losses: Mutex::default(),
        count: Box::new(metrics.dropped_history(WHAT)),
    });
    let waiting = Waiting { sender, shared: shared.clone() };
    let by = by.to_owned();
    let observer = Observer::new(move |subscriber, event| {
        let at = clock::now();
        each_change(event, &by, at, |id, change| {
            waiting.add(DeliveryChange { id, subscriber: subscriber.clone(), at, change });
        });
    });
    let backoff = Backoff::new(FIRST_BACKOFF, MAX_BACKOFF);
    let recorder = Recorder { inbox, shared, outage: Outage::default(), backoff };
    (observer.with_digests(), recorder)
}

/// What the observer and the task share.
struct Shared {
    /// Bytes of what waits, and of what the store is being handed.
    bytes: AtomicUsize,
    /// A whole group waits.
    enough: Notify,
    losses: Mutex<Losses>,
    count: Box<dyn Fn(u64) + Send + Sync>,
}

impl Shared {
    fn losses(&self) -> MutexGuard<'_, Losses> {
        self.losses.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes of this time were dropped.
    fn lose(&self, from: SystemTime, until: SystemTime, number: u64) {
        (self.count)(number);
        self.losses().add(from, until, number);
    }
}

/// The lanes' end of the channel.
struct Waiting {
    sender: mpsc::Sender<DeliveryChange>,
    shared: Arc<Shared>,
}

impl Waiting {
    fn add(&self, change: DeliveryChange) {
        let (shared, at, bytes) = (&self.shared, change.at, weight(&change));
        let room = self.sender.capacity();
        let reserved = if matches!(change.change, Change::Started { .. }) { FOR_ENDS } else { 0 };
        let fits = shared.bytes.load(Ordering::Relaxed) + bytes <= MAX_WAITING_BYTES;
        if room <= reserved || !fits {
            return shared.lose(at, at, 1);
        }
        shared.bytes.fetch_add(bytes, Ordering::Relaxed);
        if self.sender.try_send(change).is_err() {
            shared.bytes.fetch_sub(bytes, Ordering::Relaxed);
            return shared.lose(at, at, 1);
        }
        if MAX_WAITING - room + 1 >= GROUP {
            shared.enough.notify_one();
        }
    }
}

/// The task that hands changes to the store.
pub struct Recorder {
    inbox: mpsc::Receiver<DeliveryChange>,
    shared: Arc<Shared>,
    outage: Outage,
    backoff: Backoff,
}

impl fmt::Debug for Recorder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Recorder").finish_non_exhaustive()
    }
}

impl Recorder {
    /// Works until `ended` completes, at the earliest when all lanes have ended; then hands over
    /// what waits, as far as the store takes it within 2 s. Returns whether the store has all of it,
    /// or the gap that it leaves.
    pub async fn run<S: Store>(
        self,
        store: S,
        keeps: watch::Receiver<Keeps>,
        ended: impl Future<Output = ()>,
    ) -> bool {
        let (stop, stopped) = watch::channel(false);
        let shared = self.shared.clone();
        let mut work = std::pin::pin!(self.work(store, keeps, stopped));
        tokio::select! {
            () = &mut work => return shared.losses().span.is_none(),
            () = ended => {}
        }
        stop.send_replace(true);
        let is_done = timeout(FLUSH, work).await.is_ok();
        let complete = is_done && shared.losses().span.is_none();
        if !complete {
            tracing::warn!(
                "history lacks the last deliveries: the store did not take them in time"
            );
        }
        complete
    }

    async fn work<S: Store>(
        mut self,
        store: S,
        mut keeps: watch::Receiver<Keeps>,
        mut stopped: watch::Receiver<bool>,
    ) {
        let mut group = Vec::with_capacity(GROUP);
        loop {
            tokio::select! {
                () = self.gather(&mut group) => {}
                () = until(&mut stopped) => {}
            }
            let end = *stopped.borrow();
            while self.fill(&mut group) {
                self.hand_over(&store, &mut keeps, &group, &mut stopped).await;
                let bytes = group.drain(..).map(|change| weight(&change)).sum();
                self.shared.bytes.fetch_sub(bytes, Ordering::Relaxed);
            }
            if *keeps.borrow() != Keeps::Elsewhere {
                self.record_gap(&store, end).await;
            }
            if end {
                return;
            }
        }
    }

    /// Waits until there is a group to hand over, or a gap to record.
    async fn gather(&mut self, group: &mut Vec<DeliveryChange>) {
        let is_losing = self.shared.losses().span.is_some();
        let first = self.inbox.recv();
        let first = if is_losing { timeout(QUIET, first).await.ok() } else { Some(first.await) };
        match first {
            Some(Some(change)) => {
                group.push(change);
                timeout(GATHER, self.shared.enough.notified()).await.ok();
            }
            // No lane is left, and only the end is to come.
            Some(None) => std::future::pending().await,
            None => {}
        }
    }

    /// Fills a group with what waits; false if nothing does.
    fn fill(&mut self, group: &mut Vec<DeliveryChange>) -> bool {
        while group.len() < GROUP {
            match self.inbox.try_recv() {
                Ok(change) => group.push(change),
                Err(TryRecvError::Empty | TryRecvError::Disconnected) => break,
            }
        }
        !group.is_empty()
    }

    /// Hands a group to the store. A group that the store does not take is lost in the end.
    async fn hand_over<S: Store>(
        &mut self,
        store: &S,
        keeps: &mut watch::Receiver<Keeps>,
        group: &[DeliveryChange],
        stopped: &mut watch::Receiver<bool>,
    ) {
        let give_up = clock::instant() + GIVE_UP;
        loop {
            let kept = *keeps.borrow_and_update();
            let handed = match kept {
                // The recorder of events adds the gap of that time.
                Keeps::Elsewhere => return,
                // Nothing is recorded, and a store that is away says why.
                Keeps::Unknown => Vec::new(),
                Keeps::Here => group.to_vec(),
            };
            let why = match store.record(handed).await {
                Ok(()) if kept == Keeps::Here => break,
                Ok(()) => "it is not known yet which store has history".to_owned(),
                Err(e) => e.to_string(),
            };
            // At the start of a daemon it is usual for a moment that nothing is known.
            if kept == Keeps::Here || clock::instant() >= give_up {
                self.failed(&why);
            }
            if *stopped.borrow() || clock::instant() >= give_up {
                let at = || group.iter().map(|change| change.at);
                if let (Some(from), Some(until)) = (at().min(), at().max()) {
                    self.shared.lose(from, until, group.len() as u64);
                }
                return;
            }
            tokio::select! {
                () = sleep(self.backoff.grow()) => {}
                () = until(stopped) => {}
                Ok(()) = keeps.changed() => {}
            }
        }
        self.backoff.reset();
        self.shared.losses().works();
        if self.outage.end() {
            tracing::info!("history records deliveries again");
        }
    }

    fn failed(&mut self, why: &str) {
        match self.outage.failed(why) {
            News::First => {
                tracing::warn!(
                    error = why,
                    "history cannot record deliveries; they go on without it"
                );
            }
            News::OtherReason => {
                tracing::warn!(error = why, "history still cannot record deliveries");
            }
            News::Known => {
                tracing::debug!(error = why, "history still cannot record deliveries");
            }
        }
        self.shared.losses().outage = Some(why.to_owned());
    }

    async fn record_gap<S: Store>(&self, store: &S, end: bool) {
        let Some(gap) = self.shared.losses().take(end) else { return };
        if let Err(e) = store.add_gap(gap.clone()).await {
            self.shared.losses().put_back(gap, e.to_string());
        }
    }
}

/// Completes when the daemon ends.
async fn until(stopped: &mut watch::Receiver<bool>) {
    stopped.wait_for(|stopped| *stopped).await.ok(); // without its sender, the task is gone too
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        delivery::{Batch, Disposition, Outcome, Print, Prints},
        history::changes::tests::{batch, ended, started},
        store::{DeliveryState, StoreError, fake::FakeStore},
        telemetry::{
            lane_event::LaneEvent,
            status::{Board, LaneReporter},
        },
    };

    const NOW: SystemTime = SystemTime::UNIX_EPOCH;
    fn here() -> watch::Receiver<Keeps> {
        watch::Sender::new(Keeps::Here).subscribe()
    }

    /// A lane with a recorder of its events.
    struct Fixture {
        board: Board,
        lane: LaneReporter,
        recorder: Recorder,
        store: FakeStore,
    }

    impl Fixture {
        fn new() -> Self {
            let metrics = Metrics::new(NOW);
            let (observer, recorder) = recording("here", &metrics);
            let board = Board::observed(metrics, [observer]);
            let lane = board.lane(&"a".into());
            Self { board, lane, recorder, store: FakeStore::default() }
        }

        fn delivered(&self, id: &str) {
            let (batch, outcome) = (batch(id), Outcome::Delivered { status: 200 });
            self.lane.report(&started(&batch));
            self.lane.report(&ended(&batch, &outcome, Disposition::Delivered));
        }

        fn dropped(&self) -> u64 {
            dropped(&self.board)
        }
    }

    fn dropped(board: &Board) -> u64 {
        let text = board.metrics().expose();
        let sample = "hooktrail_history_dropped_total{what=\"deliveries\"} ";
        let value = text.lines().find_map(|line| line.strip_prefix(sample)).expect("exposed");
        value.parse().expect("a number")
    }

    fn ended_with<'a>(batch: &'a Batch, outcome: &'a Outcome) -> LaneEvent<'a> {
        ended(batch, outcome, Disposition::Delivered)
    }

    async fn eventually(what: &str, is_so: impl Fn() -> bool) {
        let waiting = async {
            while !is_so() {
                sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(Duration::from_secs(30), waiting).await.unwrap_or_else(|_| panic!("never: {what}"));
    }

    #[tokio::test]
    async fn what_waits_at_the_end_is_recorded() {
        let fixture = Fixture::new();
        for n in 0..1000 {
            fixture.delivered(&format!("msg_{n}"));
        }
        let (store, dropped) = (fixture.store.clone(), fixture.dropped());
        fixture.recorder.run(store.clone(), here(), std::future::ready(())).await;
        let memory = store.memory();
        let is_whole = |d: &crate::store::Delivery| {
            matches!(d.state, DeliveryState::Delivered { .. })
                && d.subscriber == *"a"
                && d.attempts.iter().all(|a| a.by == "here" && a.end.is_some())
        };
        assert_eq!(memory.deliveries.iter().filter(|d| is_whole(d)).count(), 1000);
        assert_eq!((dropped, memory.gaps.len()), (0, 0));
    }

    #[tokio::test]
    async fn what_has_no_room_is_dropped_and_counted_and_a_gap_and_ends_have_room_for_longer() {
        let fixture = Fixture::new();
        let outcome = Outcome::Delivered { status: 200 };
        let before = clock::now();
        let batches: Vec<Batch> = (0..MAX_WAITING).map(|n| batch(&format!("msg_{n}"))).collect();
        batches.iter().for_each(|batch| fixture.lane.report(&started(batch)));
        assert_eq!(fixture.dropped(), FOR_ENDS as u64);
        for batch in &batches[..FOR_ENDS] {
            fixture.lane.report(&ended(batch, &outcome, Disposition::Delivered));
        }
        assert_eq!(fixture.dropped(), 2 * FOR_ENDS as u64, "two changes each");
        let store = fixture.store.clone();
        fixture.recorder.run(store.clone(), here(), std::future::ready(())).await;
        let memory = store.memory();
        assert_eq!(memory.deliveries.len(), MAX_WAITING - FOR_ENDS);
        let [gap] = &memory.gaps[..] else { panic!("{:?}", memory.gaps) };
        assert_eq!((gap.what, gap.missing), ("deliveries", Some(2 * FOR_ENDS as u64)));
        assert!(before <= gap.from && gap.from <= gap.until && gap.until <= clock::now());
    }

    #[tokio::test]
    async fn a_few_batches_with_very_many_events_fill_no_memory() {
        let fixture = Fixture::new();
        let prints: Vec<Print> = vec![Print::of(b"a"); 100_000];
        for n in 0..50 {
            let batch = batch(&format!("msg_{n}"));
            fixture.lane.report(&started(&Batch { prints: Some(prints.clone().into()), ..batch }));
        }
        let most = (MAX_WAITING_BYTES / size_of_val(&prints[..])) as u64;
        assert_eq!(fixture.dropped(), 50 - most);
        let store = fixture.store.clone();
        let (recorder, shared) = (fixture.recorder, fixture.lane);
        let bytes = recorder.shared.clone();
        recorder.run(store.clone(), here(), std::future::ready(())).await;
        drop(shared);
        assert_eq!(store.memory().deliveries.len() as u64, most);
        assert_eq!(bytes.bytes.load(Ordering::Relaxed), 0, "there is room again");
    }

    #[tokio::test]
    async fn a_store_that_comes_back_gets_what_waited() {
        let fixture = Fixture::new();
        let store = fixture.store.clone();
        store.memory().away = Some(StoreError::away("it is not open"));
        let shared = fixture.recorder.shared.clone();
        let (end, ended) = tokio::sync::oneshot::channel::<()>();
        let Fixture { board, lane, recorder, store: given } = fixture;
        let running = tokio::spawn(recorder.run(given, here(), async { drop(ended.await) }));
        let report = |id: &str| {
            let (batch, outcome) = (batch(id), Outcome::Delivered { status: 200 });
            lane.report(&started(&batch));
            lane.report(&super::tests::ended(&batch, &outcome, Disposition::Delivered));
        };
        report("msg_1");
        eventually("the store is found away", || shared.losses().outage.is_some()).await;
        report("msg_2");
        store.memory().away = None;
        eventually("both are recorded", || store.memory().deliveries.len() == 2).await;
        assert!(shared.losses().outage.is_none() && store.memory().gaps.is_empty());
        store.memory().away = Some(StoreError::new("the disk is full"));
        report("msg_3");
        drop(end);
        running.await.expect("ends");
        assert_eq!(store.memory().deliveries.len(), 2);
        let text = board.metrics().expose();
        let lost = "hooktrail_history_dropped_total{what=\"deliveries\"} 3\n";
        assert!(text.contains(lost), "what cannot be recorded at the end is counted: {text}");
    }

    #[tokio::test]
    async fn while_the_store_is_away_a_limited_number_of_changes_is_held_and_the_others_are_a_gap()
    {
        const DELIVERIES: usize = 100_000;
        let fixture = Fixture::new();
        let (store, shared) = (fixture.store.clone(), fixture.recorder.shared.clone());
        store.memory().away = Some(StoreError::away("the disk is almost full"));
        let (end, ended) = tokio::sync::oneshot::channel::<()>();
        let running =
            tokio::spawn(fixture.recorder.run(store.clone(), here(), async { drop(ended.await) }));
        let (whole, outcome) = (batch("msg_1"), Outcome::Delivered { status: 200 });
        let one = weight(&DeliveryChange {
            id: whole.id.clone(),
            subscriber: "a".into(),
            at: NOW,
            change: Change::Delivered,
        });
        for n in 0..DELIVERIES {
            // The recorder takes what it may hold meanwhile.
            if n % 1000 == 0 {
                tokio::task::yield_now().await;
            }
            fixture.lane.report(&started(&whole));
            fixture.lane.report(&ended_with(&whole, &outcome));
        }
        let held = shared.bytes.load(Ordering::Relaxed);
        assert!(held <= MAX_WAITING_BYTES && held >= MAX_WAITING / 2 * one, "{held} bytes");
        let dropped = dropped(&fixture.board);
        let waiting = 3 * DELIVERIES as u64 - dropped;
        assert!(waiting <= (MAX_WAITING + GROUP) as u64, "{waiting} wait");
        store.memory().away = None;
        eventually("what waited is recorded", || store.memory().changes as u64 == waiting).await;
        drop(end);
        running.await.expect("ends");
        let gaps = store.memory().gaps.clone();
        let [gap] = &gaps[..] else { panic!("{gaps:?}") };
        assert_eq!((gap.what, gap.missing), ("deliveries", Some(dropped)));
        assert!(gap.why.contains("the disk is almost full"), "{}", gap.why);
        assert_eq!(shared.bytes.load(Ordering::Relaxed), 0, "nothing is held any more");
    }

    #[tokio::test]
    async fn what_the_store_is_being_handed_counts_as_held() {
        let fixture = Fixture::new();
        let (store, shared) = (fixture.store.clone(), fixture.recorder.shared.clone());
        store.memory().away = Some(StoreError::away("it is not open"));
        let prints: Prints = Some(vec![Print::of(b"a"); 100_000].into());
        let (end, ended) = tokio::sync::oneshot::channel::<()>();
        let running =
            tokio::spawn(fixture.recorder.run(store.clone(), here(), async { drop(ended.await) }));
        let report = |n: usize| {
            let batch = batch(&format!("msg_{n}"));
            fixture.lane.report(&started(&Batch { prints: prints.clone(), ..batch }));
        };
        (0..50).for_each(report);
        eventually("the store is found away", || shared.losses().outage.is_some()).await;
        (50..100).for_each(report);
        let most = (MAX_WAITING_BYTES / (100_000 * Print::LEN)) as u64;
        assert_eq!(dropped(&fixture.board), 100 - most);
        store.memory().away = None;
        drop(end);
        running.await.expect("ends");
        assert_eq!(store.memory().changes as u64, most);
    }

    #[tokio::test]
    async fn deliveries_are_recorded_only_where_history_is() {
        let fixture = Fixture::new();
        let (store, shared) = (fixture.store.clone(), fixture.recorder.shared.clone());
        let keeps = watch::Sender::new(Keeps::Unknown);
        let (end, ended) = tokio::sync::oneshot::channel::<()>();
        let running = tokio::spawn(
            fixture.recorder.run(store.clone(), keeps.subscribe(), async { drop(ended.await) }),
        );
        let outcome = Outcome::Delivered { status: 200 };
        let report = |id: &str| {
            let batch = batch(id);
            fixture.lane.report(&started(&batch));
            fixture.lane.report(&ended_with(&batch, &outcome));
        };
        let recorded =
            || store.memory().deliveries.iter().map(|d| d.id.clone()).collect::<Vec<_>>();
        report("msg_1");
        eventually("it is tried", || store.memory().records > 0).await;
        assert!(recorded().is_empty(), "it is not known yet");
        keeps.send_replace(Keeps::Here);
        eventually("it is recorded", || recorded() == ["msg_1".into()]).await;
        keeps.send_replace(Keeps::Elsewhere);
        report("msg_2");
        eventually("it is dropped", || shared.bytes.load(Ordering::Relaxed) == 0).await;
        keeps.send_replace(Keeps::Here);
        report("msg_3");
        eventually("it is recorded", || recorded() == ["msg_1".into(), "msg_3".into()]).await;
        drop(end);
        running.await.expect("ends");
        // The recorder of events adds the gap of the other store's time.
        assert_eq!((dropped(&fixture.board), store.memory().gaps.len()), (0, 0));
    }
}

//! Deliveries on their way into history.
//!
//! An observer of the lanes makes [`DeliveryChange`]s of their events, and puts them into a bounded
//! channel: no lane ever waits for the store. A task, [`Recorder::run`], hands them to the store in
//! groups. Changes for which there is no room are dropped, counted, and recorded as a [`Gap`]. While
//! another store has history they are dropped alone: this one keeps none.

use std::{
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use tokio::{
    sync::{
        Notify,
        mpsc::{self, error::TryRecvError},
        watch,
    },
    time::{sleep, timeout},
};

use super::events::Keeps;
use crate::{
    clock,
    delivery::{Batch, BatchId, Disposition},
    policy::retry::Backoff,
    store::{AttemptEnd, Change, Contents, DeliveryChange, Gap, Store},
    telemetry::{
        lane_event::{AttemptEnded, Died, LaneEvent, Settled},
        metrics::Metrics,
        outage::{News, Outage},
        status::Observer,
    },
};

/// What a [`Gap`] of this room lacks, and the label of the metric.
const WHAT: &str = "deliveries";

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

/// The time without a loss after which a gap is over.
const QUIET: Duration = Duration::from_secs(5);

/// The time of losses after which they are recorded, although they go on.
const LONG_GAP: Duration = Duration::from_secs(5 * 60);

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

/// Calls `change` for each change that a lane's event means.
fn each_change(
    event: &LaneEvent<'_>,
    by: &str,
    now: SystemTime,
    mut change: impl FnMut(BatchId, Change),
) {
    match event {
        LaneEvent::AttemptStarted { batch, sha256, .. } => {
            let (attempt, contents) = (batch.attempts, contents(batch, *sha256));
            change(batch.id.clone(), Change::Started { attempt, contents, by: by.to_owned() });
        }
        LaneEvent::AttemptEnded(AttemptEnded { batch, outcome, disposition, took, .. }) => {
            if let Some(end) = AttemptEnd::of(outcome) {
                let attempt = batch.attempts;
                change(batch.id.clone(), Change::Ended { attempt, took: *took, end });
            }
            // The receiver has it, whatever becomes of the ack.
            if *disposition == Disposition::Delivered {
                change(batch.id.clone(), Change::Delivered);
            }
        }
        LaneEvent::Unsent { batch_id, .. } => change((*batch_id).clone(), Change::Interrupted),
        LaneEvent::Settled(settled) => each_settled(settled, now, change),
        LaneEvent::NotSettled(settled) => {
            for id in unsettled(settled) {
                change(id, Change::Interrupted);
            }
        }
        _ => {}
    }
}

fn each_settled(settled: &Settled, now: SystemTime, mut change: impl FnMut(BatchId, Change)) {
    match settled {
        Settled::Retries { batches, split, delay, .. } => {
            let due = now + *delay;
            if let Some(whole) = split {
                change(whole.clone(), Change::Split);
            }
            for batch in batches {
                let id = batch.id.clone();
                change(
                    id,
                    match split {
                        Some(_) => Change::Half { due, contents: contents(batch, None) },
                        None => Change::Retrying { due },
                    },
                );
            }
        }
        Settled::DeadLetters(died) => {
            for died in died {
                let Died { reason, batch_id, format, events, bytes, prints } = died.clone();
                let id = batch_id.unwrap_or_else(BatchId::random);
                let contents = Contents {
                    format,
                    events,
                    bytes: bytes as u64,
                    sha256: None,
                    prints,
                    replay: false,
                    parent: id.parent(),
                };
                change(id, Change::Dead { reason, contents: Some(contents) });
            }
        }
        Settled::Paused(id) => change(id.clone(), Change::Paused),
        Settled::Delivered | Settled::Recognised { .. } => {}
    }
}

/// The attempted batches of a settlement, except those that the receiver has accepted.
fn unsettled(settled: &Settled) -> Vec<BatchId> {
    match settled {
        Settled::Retries { batches, split, .. } => split.as_ref().map_or_else(
            || batches.iter().map(|b| b.id.clone()).collect(),
            |whole| vec![whole.clone()],
        ),
        Settled::DeadLetters(died) => died.iter().filter_map(|d| d.batch_id.clone()).collect(),
        Settled::Paused(id) => vec![id.clone()],
        Settled::Delivered | Settled::Recognised { .. } => Vec::new(),
    }
}

fn contents(batch: &Batch, sha256: Option<[u8; 32]>) -> Contents {
    Contents {
        format: Some(batch.format),
        events: batch.events,
        bytes: batch.body.len() as u64,
        sha256,
        prints: batch.prints.clone(),
        replay: batch.replay,
        parent: batch.id.parent(),
    }
}

/// About the bytes that a change takes.
fn weight(change: &DeliveryChange) -> usize {
    let more = match &change.change {
        Change::Started { contents, .. }
        | Change::Half { contents, .. }
        | Change::Dead { contents: Some(contents), .. } => {
            contents.prints.as_ref().map_or(0, |prints| size_of_val(&**prints))
        }
        Change::Ended { end, .. } => end.excerpt.len(),
        _ => 0,
    };
    size_of::<DeliveryChange>() + change.id.as_str().len() + more
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

/// Changes that were dropped and are in no gap of the store yet.
#[derive(Debug, Default)]
struct Losses {
    span: Option<(SystemTime, SystemTime)>,
    number: u64,
    /// When the last of them was dropped.
    last: Option<Instant>,
    /// Why the store took none; `None` if it was only too slow.
    outage: Option<String>,
}

impl Losses {
    fn add(&mut self, from: SystemTime, until: SystemTime, number: u64) {
        let (first, last) = self.span.unwrap_or((from, until));
        self.span = Some((first.min(from), last.max(until)));
        self.number += number;
        self.last = Some(clock::instant());
    }

    /// The store takes changes.
    fn works(&mut self) {
        // What is lost from now on has another reason.
        self.outage = self.outage.take().filter(|_| self.span.is_some());
    }

    /// The gap that is to be recorded now. `end`: no more losses follow.
    fn take(&mut self, end: bool) -> Option<Gap> {
        let (from, until) = self.span?;
        let is_over = self.last.is_none_or(|last| clock::instant() - last >= QUIET);
        let is_long = until.duration_since(from).is_ok_and(|long| long >= LONG_GAP);
        if !(end || is_over || is_long) {
            return None;
        }
        let why = match self.outage.take() {
            Some(why) => format!("the store did not take them: {why}"),
            None => "there were more than the store took".to_owned(),
        };
        self.span = None;
        let missing = Some(std::mem::take(&mut self.number));
        Some(Gap { from, until, what: WHAT, why, missing })
    }

    /// Takes back a gap that could not be recorded.
    fn put_back(&mut self, gap: Gap, why: String) {
        let (first, last) = self.span.unwrap_or((gap.from, gap.until));
        self.span = Some((first.min(gap.from), last.max(gap.until)));
        self.number += gap.missing.unwrap_or_default();
        self.last = Some(clock::instant());
        self.outage = Some(why);
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
        delivery::{AttemptLog, Failure, FailureKind, Outcome, PauseCause, Print, Prints, Reason},
        event::payload::Format,
        store::{DeliveryState, StoreError, fake::FakeStore},
        telemetry::status::{Board, LaneReporter},
    };

    const NOW: SystemTime = SystemTime::UNIX_EPOCH;
    const SECOND: Duration = Duration::from_secs(1);

    fn batch(id: &str) -> Batch {
        Batch {
            id: id.into(),
            body: "{}".into(),
            format: Format::Json,
            events: 2,
            attempts: 1,
            first_attempt_at: None,
            traceparent: None,
            attempt_log: AttemptLog::default(),
            prints: Some([Print::of(b"a"), Print::of(b"b")].into()),
            replay: true,
        }
    }

    fn started(batch: &Batch) -> LaneEvent<'_> {
        LaneEvent::AttemptStarted { number: 1, batch, sha256: Some([7; 32]) }
    }

    fn ended<'a>(
        batch: &'a Batch,
        outcome: &'a Outcome,
        disposition: Disposition,
    ) -> LaneEvent<'a> {
        let (number, shortened_from, took) = (1, None, SECOND);
        LaneEvent::AttemptEnded(AttemptEnded {
            number,
            batch,
            outcome,
            disposition,
            shortened_from,
            took,
        })
    }

    #[test]
    fn each_event_of_a_lane_is_recorded_as_the_changes_that_it_means() {
        let (whole, half) = (batch("msg_1"), batch("msg_1_0"));
        let contents = |sha256, parent: Option<&str>| Contents {
            format: Some(Format::Json),
            events: 2,
            bytes: 2,
            sha256,
            prints: whole.prints.clone(),
            replay: true,
            parent: parent.map(BatchId::from),
        };
        let begun = |parent| Change::Started {
            attempt: 1,
            contents: contents(Some([7; 32]), parent),
            by: "here".to_owned(),
        };
        let end = |status, failure, excerpt: &str| Change::Ended {
            attempt: 1,
            took: SECOND,
            end: AttemptEnd { status, failure, excerpt: excerpt.to_owned() },
        };
        let accepted = Outcome::Delivered { status: 204 };
        let failure = Failure::Status { status: 503, excerpt: "busy".to_owned() };
        let refused = Outcome::Retry { failure, retry_after: None };
        let retries = |batches: &[&Batch], split: Option<&str>| Settled::Retries {
            batches: batches.iter().map(|b| (*b).clone()).collect(),
            split: split.map(BatchId::from),
            delay: SECOND,
            arrived_at: NOW,
        };
        let due = NOW + SECOND;
        let died = Died {
            reason: Reason::Refused,
            batch_id: Some(half.id.clone()),
            format: Some(Format::Json),
            events: 2,
            bytes: 2,
            prints: whole.prints.clone(),
        };
        let dead = || Settled::DeadLetters(vec![died.clone()]);
        let given_up = Contents { replay: false, ..contents(None, Some("msg_1")) };
        let retry = Disposition::Retry { delay: SECOND };
        for (event, expected) in [
            (started(&whole), vec![("msg_1", begun(None))]),
            (started(&half), vec![("msg_1_0", begun(Some("msg_1")))]),
            (
                ended(&whole, &accepted, Disposition::Delivered),
                vec![("msg_1", end(Some(204), None, "")), ("msg_1", Change::Delivered)],
            ),
            (
                ended(&whole, &refused, retry),
                vec![("msg_1", end(Some(503), Some(FailureKind::Status), "busy"))],
            ),
            (
                ended(&whole, &refused, Disposition::Paused(PauseCause::Exhausted)),
                vec![("msg_1", end(Some(503), Some(FailureKind::Status), "busy"))],
            ),
            (
                LaneEvent::Unsent { number: 1, batch_id: &whole.id, why: "no port" },
                vec![("msg_1", Change::Interrupted)],
            ),
            (
                LaneEvent::Settled(retries(&[&whole], None)),
                vec![("msg_1", Change::Retrying { due })],
            ),
            (
                LaneEvent::Settled(retries(&[&half], Some("msg_1"))),
                vec![
                    ("msg_1", Change::Split),
                    ("msg_1_0", Change::Half { due, contents: contents(None, Some("msg_1")) }),
                ],
            ),
            (
                LaneEvent::Settled(dead()),
                vec![(
                    "msg_1_0",
                    Change::Dead { reason: Reason::Refused, contents: Some(given_up) },
                )],
            ),
            (
                LaneEvent::Settled(Settled::Paused(whole.id.clone())),
                vec![("msg_1", Change::Paused)],
            ),
            (LaneEvent::Settled(Settled::Delivered), vec![]),
            (LaneEvent::NotSettled(retries(&[&whole], None)), vec![("msg_1", Change::Interrupted)]),
            (
                LaneEvent::NotSettled(retries(&[&half], Some("msg_1"))),
                vec![("msg_1", Change::Interrupted)],
            ),
            (LaneEvent::NotSettled(dead()), vec![("msg_1_0", Change::Interrupted)]),
            (
                LaneEvent::NotSettled(Settled::Paused(whole.id.clone())),
                vec![("msg_1", Change::Interrupted)],
            ),
            (LaneEvent::NotSettled(Settled::Delivered), vec![]),
            (LaneEvent::QueueRestored, vec![]),
        ] {
            let mut changes = Vec::new();
            each_change(&event, "here", NOW, |id, change| changes.push((id, change)));
            let expected: Vec<_> =
                expected.into_iter().map(|(id, change)| (BatchId::from(id), change)).collect();
            assert_eq!(changes, expected, "{event:?}");
        }
    }

    #[test]
    fn an_event_that_died_without_an_attempt_is_a_delivery_of_its_own() {
        let died = Died {
            reason: Reason::TooLarge,
            batch_id: None,
            format: None,
            events: 1,
            bytes: 9,
            prints: None,
        };
        let mut ids = Vec::new();
        let event = LaneEvent::Settled(Settled::DeadLetters(vec![died.clone(), died.clone()]));
        each_change(&event, "here", NOW, |id, change| {
            assert!(matches!(change, Change::Dead { contents: Some(_), .. }), "{change:?}");
            ids.push(id);
        });
        assert!(ids.len() == 2 && ids[0] != ids[1], "{ids:?}");
        let event = LaneEvent::NotSettled(Settled::DeadLetters(vec![died]));
        each_change(&event, "here", NOW, |id, _| panic!("{id} was never attempted"));
    }

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

    #[test]
    fn losses_are_one_gap_until_they_are_over_or_last_for_long() {
        let mut losses = Losses::default();
        assert_eq!(losses.take(true), None);
        losses.add(NOW + SECOND, NOW + SECOND, 1);
        losses.add(NOW, NOW + 2 * SECOND, 3);
        assert_eq!(losses.take(false), None, "more may follow");
        losses.outage = Some("the disk is full".to_owned());
        let gap = losses.take(true).expect("a gap");
        assert_eq!((gap.from, gap.until, gap.missing), (NOW, NOW + 2 * SECOND, Some(4)));
        assert!(gap.why.contains("the disk is full"), "{}", gap.why);
        losses.put_back(gap, "away".to_owned());
        losses.add(NOW, NOW + LONG_GAP, 1);
        let gap = losses.take(false).expect("it lasts for long");
        assert_eq!((gap.from, gap.until, gap.missing), (NOW, NOW + LONG_GAP, Some(5)));
        assert_eq!(losses.take(true), None);
    }
}

//! What lanes and queue say of themselves: for `/metrics`, for `hooktrail status`, for the API.
//!
//! A lane reports to its [`LaneStatus`] what it does; whoever asks gets a [`View`] of it. The
//! figures are this daemon's own: with several on the same queues each knows what it did itself.
//! The way back has one word: an operator wants the subscriber tried now ([`Board::try_now`]).

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    hash::{DefaultHasher, Hash as _, Hasher as _},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use tokio::sync::{Notify, watch};

use crate::{
    delivery::{Depth, Depths, DispositionKind, FailureKind, Pause, Reason, SubscriberName},
    policy::circuit_breaker::CircuitState,
    telemetry::{
        metrics::{Exposition, Metrics, SubscriberMetrics},
        troubles::Troubles,
    },
};

/// Rates are those of so long.
const RECENT: Duration = Duration::from_secs(60);

/// Success rate and percentiles are those of the latest attempts: so many, and none older than
/// this.
const ATTEMPTS: usize = 500;
const ATTEMPTS_AGE: Duration = Duration::from_secs(15 * 60);

/// Retries of a subscriber that are remembered until they come again; what is beyond that is not
/// counted.
const MAX_SCHEDULED: usize = 10_000;

/// A retry that did not come so long after it was due went to another daemon.
const MISSED: Duration = Duration::from_secs(15 * 60);

/// Whoever asks for the depths of the queues gets none that are older, unless a look takes longer.
const FRESH: Duration = Duration::from_secs(1);

/// A request that has no answer for so long is told of, if none was accepted since it began.
const LONG_WAIT: Duration = Duration::from_secs(5);

/// All that is known of the lanes and the queue. Clones are the same.
#[derive(Debug, Clone)]
pub struct Board(Arc<BoardInner>);

#[derive(Debug)]
struct BoardInner {
    metrics: Metrics,
    lanes: Mutex<BTreeMap<SubscriberName, LaneStatus>>,
    depths: watch::Sender<Option<Looked>>,
    wanted: Notify,
    troubles: Mutex<Option<watch::Receiver<Troubles>>>,
}

/// The latest look at the queues.
#[derive(Debug, Clone)]
pub struct Looked {
    pub at: SystemTime,
    /// Why they could not be looked at.
    pub found: Result<Depths, String>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Board {
    pub fn new(metrics: Metrics) -> Self {
        Self(Arc::new(BoardInner {
            metrics,
            lanes: Mutex::default(),
            depths: watch::Sender::default(),
            wanted: Notify::new(),
            troubles: Mutex::default(),
        }))
    }

    pub fn metrics(&self) -> &Metrics {
        &self.0.metrics
    }

    /// Of a subscriber that is configured now.
    pub fn lane(&self, subscriber: &SubscriberName) -> LaneStatus {
        let new =
            || LaneStatus(Arc::new(Mutex::new(Seen::new(self.0.metrics.subscriber(subscriber)))));
        lock(&self.0.lanes).entry(subscriber.clone()).or_insert_with(new).clone()
    }

    /// Has one batch tried as soon as none is under way, if the subscriber's circuit is open or its
    /// receiver asked to be left alone; else nothing follows.
    pub fn try_now(&self, subscriber: &str) {
        let lane = lock(&self.0.lanes).get(subscriber).cloned();
        if let Some(lane) = lane {
            lane.seen().tries.send_modify(|n| *n += 1);
        }
    }

    /// It is not configured any more and nothing of it is under way.
    pub fn forget(&self, subscriber: &str) {
        lock(&self.0.lanes).remove(subscriber);
        self.0.metrics.forget(subscriber);
    }

    /// From now on these are the queue's own.
    pub fn follow(&self, troubles: watch::Receiver<Troubles>) {
        *lock(&self.0.troubles) = Some(troubles);
    }

    fn troubles(&self) -> Troubles {
        lock(&self.0.troubles)
            .as_ref()
            .map(|troubles| troubles.borrow().clone())
            .unwrap_or_default()
    }

    /// What is wrong with the queue: what it says of itself, or else why it could not be looked at.
    pub fn queue_error(&self) -> Option<String> {
        self.troubles()
            .of_queue()
            .or_else(|| self.0.depths.borrow().as_ref()?.found.as_ref().err().cloned())
    }

    pub fn view(&self, subscriber: &str, now: Instant, time: SystemTime) -> Option<View> {
        let lane = lock(&self.0.lanes).get(subscriber)?.clone();
        let mut view = lane.view(now, time);
        // What the queue says comes before what the lane has seen of it, which may be an earlier
        // error.
        if !matches!(view.state, State::Paused(_))
            && let Some(why) = self.troubles().of_subscriber(subscriber)
        {
            view.state = State::QueueFails(why.to_owned());
        }
        Some(view)
    }

    /// All metrics in a format, as they are now.
    pub fn expose_as(&self, format: Exposition) -> String {
        let troubles = self.troubles();
        for (name, lane) in &*lock(&self.0.lanes) {
            let seen = lock(&lane.0);
            seen.metrics.up(seen.trouble.is_none()
                && (seen.paused.is_some() || troubles.of_subscriber(name).is_none()));
        }
        self.metrics().expose_as(format)
    }

    /// Requests without an answer, of each subscriber that has any.
    pub fn in_flight(&self) -> BTreeMap<SubscriberName, u32> {
        let lanes = lock(&self.0.lanes);
        lanes
            .iter()
            .map(|(name, lane)| (name.clone(), lane.seen().in_flight))
            .filter(|(_, n)| *n > 0)
            .collect()
    }

    /// What a look at the queues found.
    pub fn looked(&self, at: SystemTime, found: Result<Depths, String>) {
        // A lane that has nothing to do says nothing.
        lock(&self.0.lanes).values().for_each(|lane| lane.forget_missed(at));
        if let Ok(depths) = &found {
            let metrics = &self.0.metrics;
            let of_each = || depths.subscribers.values().map(|d| d.delayed).sum();
            metrics.set_delayed_retries(depths.delayed.unwrap_or_else(of_each));
            metrics.set_orphans(depths.orphans);
            metrics.set_removed(
                &depths
                    .removed
                    .iter()
                    .map(|(name, d)| (name.clone(), d.events + d.batches() + d.dead))
                    .collect(),
            );
            for (name, lane) in &*lock(&self.0.lanes) {
                let Depth { events, retries, dead, .. } =
                    depths.subscribers.get(name).copied().unwrap_or_default();
                lock(&lane.0).metrics.queues([events, retries, dead]);
            }
        }
        self.0.depths.send_replace(Some(Looked { at, found }));
    }

    /// The latest look at the queues, after a new one if that comes soon.
    pub async fn depths(&self, now: SystemTime) -> Option<Looked> {
        let mut depths = self.0.depths.subscribe();
        let found = depths.borrow_and_update().clone();
        if found.as_ref().is_some_and(|l| now.duration_since(l.at).is_ok_and(|age| age >= FRESH)) {
            self.0.wanted.notify_one();
            let _in_time = tokio::time::timeout(FRESH, depths.changed()).await.is_ok();
        }
        depths.borrow().clone()
    }

    /// Until somebody asks for the depths and they are old.
    pub async fn wanted(&self) {
        self.0.wanted.notified().await;
    }
}

/// What one lane says of itself. Clones are the same.
#[derive(Debug, Clone)]
pub struct LaneStatus(Arc<Mutex<Seen>>);

#[derive(Debug)]
struct Seen {
    metrics: SubscriberMetrics,
    paused: Option<Pause>,
    circuit: Circuit,
    circuit_since: Option<SystemTime>,
    held_until: Option<SystemTime>,
    trouble: Option<String>,
    in_hand: u64,
    /// Requests without an answer.
    in_flight: u32,
    /// When what was given back with a circuit that opened, or with a queue that was lost, had
    /// arrived.
    oldest: Option<SystemTime>,
    scheduled: Scheduled,
    attempts: VecDeque<Attempt>,
    /// When the requests under way were begun, by a number.
    under_way: BTreeMap<u64, Instant>,
    begun: u64,
    /// Events delivered in each of the last seconds, the latest last.
    delivered: VecDeque<(Instant, u64)>,
    delivered_in_all: u64,
    last_delivered_at: Option<SystemTime>,
    last_error: Option<LastError>,
    failing: bool,
    /// How often an operator wanted the subscriber tried.
    tries: watch::Sender<u64>,
}

#[derive(Debug, Clone, Copy)]
struct Attempt {
    at: Instant,
    took: Duration,
    ok: bool,
}

/// Retries that have not come again.
#[derive(Debug, Default)]
struct Scheduled {
    /// By what stands for the batch's id: when it is due, and when its first event had arrived.
    batches: HashMap<u64, (SystemTime, SystemTime)>,
    dues: Times,
    arrivals: Times,
}

impl Scheduled {
    fn key(batch_id: &str) -> u64 {
        let mut hasher = DefaultHasher::new();
        batch_id.hash(&mut hasher);
        hasher.finish()
    }

    fn insert(&mut self, batch_id: &str, due: SystemTime, arrived: SystemTime) {
        self.remove(Self::key(batch_id));
        self.batches.insert(Self::key(batch_id), (due, arrived));
        self.dues.add(due);
        self.arrivals.add(arrived);
    }

    fn remove(&mut self, key: u64) -> bool {
        let found = self.batches.remove(&key);
        if let Some((due, arrived)) = found {
            self.dues.remove(due);
            self.arrivals.remove(arrived);
        }
        found.is_some()
    }

    /// Forgets those that went to another daemon.
    fn forget_missed(&mut self, time: SystemTime) -> bool {
        if self.dues.first().is_none_or(|due| due + MISSED > time) {
            return false;
        }
        let missed: Vec<u64> = self
            .batches
            .iter()
            .filter(|(_, (due, _))| *due + MISSED <= time)
            .map(|(key, _)| *key)
            .collect();
        for key in missed {
            self.remove(key);
        }
        true
    }
}

/// Points in time, of which the first is known at once.
#[derive(Debug, Default)]
struct Times(BTreeMap<SystemTime, u32>);

impl Times {
    fn add(&mut self, at: SystemTime) {
        *self.0.entry(at).or_default() += 1;
    }

    fn remove(&mut self, at: SystemTime) {
        if let Some(n) = self.0.get_mut(&at) {
            *n -= 1;
            if *n == 0 {
                self.0.remove(&at);
            }
        }
    }

    fn first(&self) -> Option<SystemTime> {
        self.0.keys().next().copied()
    }
}

/// What the circuit breaker does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Circuit {
    Closed,
    /// Nothing is sent before then.
    Open {
        until: SystemTime,
    },
    HalfOpen,
}

impl Circuit {
    pub const fn state(self) -> CircuitState {
        match self {
            Self::Closed => CircuitState::Closed,
            Self::Open { .. } => CircuitState::Open,
            Self::HalfOpen => CircuitState::HalfOpen,
        }
    }
}

/// The latest attempt that failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LastError {
    pub at: SystemTime,
    /// Nothing that the receiver wrote.
    pub failure: FailureKind,
    pub status: Option<u16>,
    pub cause: Option<String>,
}

/// A request that is under way, until this is dropped.
#[derive(Debug)]
pub struct InFlight {
    lane: LaneStatus,
    number: u64,
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.lane.seen().under_way.remove(&self.number);
    }
}

/// An attempt that has ended.
#[derive(Debug)]
pub struct Ended {
    pub disposition: DispositionKind,
    pub failure: Option<LastError>,
    pub took: Duration,
}

/// How a lane is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct View {
    pub state: State,
    pub circuit: Circuit,
    /// Events that the lane has taken and not settled.
    pub in_hand: u64,
    /// Batches whose time to be tried again has not come, as far as this daemon knows.
    pub retries_scheduled: usize,
    pub next_retry_at: Option<SystemTime>,
    pub delivered: u64,
    /// In thousandths of an event a second.
    pub delivered_per_s_milli: u64,
    /// Of the latest attempts, in thousandths; `None` without any.
    pub success_milli: Option<u64>,
    pub p50: Option<Duration>,
    pub p99: Option<Duration>,
    pub oldest_event_at: Option<SystemTime>,
    pub last_delivered_at: Option<SystemTime>,
    pub last_error: Option<LastError>,
}

/// What an operator has to know first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    Ok,
    /// A request has no answer for long, and none was accepted since it began.
    Waiting {
        since: SystemTime,
    },
    /// The latest attempt failed.
    Retrying,
    CircuitOpen {
        until: SystemTime,
    },
    /// The receiver asked for it with `Retry-After`.
    Held {
        until: SystemTime,
    },
    Paused(Pause),
    /// The lane cannot use its queue.
    QueueFails(String),
}

impl State {
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Waiting { .. } => "waiting",
            Self::Retrying => "retrying",
            Self::CircuitOpen { .. } => "circuit_open",
            Self::Held { .. } => "held",
            Self::Paused(_) => "paused",
            Self::QueueFails(_) => "queue_fails",
        }
    }
}

impl Seen {
    fn new(metrics: SubscriberMetrics) -> Self {
        metrics.circuit(CircuitState::Closed, None);
        metrics.up(true);
        Self {
            metrics,
            paused: None,
            circuit: Circuit::Closed,
            circuit_since: None,
            held_until: None,
            trouble: None,
            in_hand: 0,
            in_flight: 0,
            oldest: None,
            scheduled: Scheduled::default(),
            attempts: VecDeque::new(),
            under_way: BTreeMap::new(),
            begun: 0,
            delivered: VecDeque::new(),
            delivered_in_all: 0,
            last_delivered_at: None,
            last_error: None,
            failing: false,
            tries: watch::Sender::new(0),
        }
    }

    fn oldest(&self) -> Option<SystemTime> {
        self.scheduled.arrivals.first().into_iter().chain(self.oldest).min()
    }

    /// For how long the oldest request has had no answer, if that is long and nothing was accepted
    /// meanwhile.
    fn waits(&self, now: Instant) -> Option<Duration> {
        let begun = *self.under_way.values().next()?;
        let accepted = self.attempts.iter().rev().find(|a| a.ok).is_some_and(|a| a.at >= begun);
        let waits = now.saturating_duration_since(begun);
        (waits >= LONG_WAIT && !accepted).then_some(waits)
    }

    fn tell_retries(&self) {
        self.metrics.retries(self.scheduled.batches.len(), self.scheduled.dues.first());
        self.metrics.oldest(self.oldest());
    }
}

impl LaneStatus {
    fn seen(&self) -> MutexGuard<'_, Seen> {
        lock(&self.0)
    }

    /// Changes when an operator wants the subscriber tried now.
    pub fn tries(&self) -> watch::Receiver<u64> {
        self.seen().tries.subscribe()
    }

    pub fn received(&self, events: u64) {
        self.seen().metrics.received(events);
    }

    /// Came again, and were settled already.
    pub fn recognised(&self, events: u64) {
        self.seen().metrics.recognised(events);
    }

    pub fn begins(&self, batch_id: &str, events: u32, bytes: usize, now: Instant) -> InFlight {
        let mut seen = self.seen();
        seen.begun += 1;
        let number = seen.begun;
        seen.under_way.insert(number, now);
        seen.metrics.attempt_begins(events, bytes);
        seen.in_flight += 1;
        if seen.scheduled.remove(Scheduled::key(batch_id)) {
            seen.tell_retries();
        }
        InFlight { lane: self.clone(), number }
    }

    pub fn ended(&self, ended: Ended, now: Instant) {
        let mut seen = self.seen();
        seen.metrics.attempt_ends(
            ended.disposition,
            ended.failure.as_ref().map(|e| e.failure),
            ended.took,
        );
        seen.in_flight = seen.in_flight.saturating_sub(1);
        seen.failing = ended.failure.is_some();
        if seen.attempts.len() == ATTEMPTS {
            seen.attempts.pop_front();
        }
        seen.attempts.push_back(Attempt { at: now, took: ended.took, ok: ended.failure.is_none() });
        if ended.failure.is_some() {
            seen.last_error = ended.failure;
        }
    }

    /// An attempt that had begun was none: nothing of it was sent.
    pub fn not_sent(&self, why: &str, at: SystemTime) {
        let mut seen = self.seen();
        seen.metrics.attempt_was_none();
        seen.last_error = Some(LastError {
            at,
            failure: FailureKind::Internal,
            status: None,
            cause: Some(why.to_owned()),
        });
    }

    /// Those that were under way are gone with their lane.
    pub fn panicked(&self) {
        let mut seen = self.seen();
        seen.metrics.attempts_are_gone();
        seen.metrics.panicked();
        (seen.in_hand, seen.in_flight, seen.oldest) = (0, 0, None);
    }

    pub fn delivered(
        &self,
        events: u32,
        lag: Option<Duration>,
        since_arrival: Option<Duration>,
        now: Instant,
        time: SystemTime,
    ) {
        let mut seen = self.seen();
        seen.metrics.delivered(events, lag, since_arrival);
        seen.delivered_in_all += u64::from(events);
        seen.last_delivered_at = Some(time);
        match seen.delivered.back_mut() {
            Some((second, count))
                if now.saturating_duration_since(*second) < Duration::from_secs(1) =>
            {
                *count += u64::from(events)
            }
            _ => seen.delivered.push_back((now, events.into())),
        }
        while seen
            .delivered
            .front()
            .is_some_and(|(at, _)| now.saturating_duration_since(*at) > RECENT)
        {
            seen.delivered.pop_front();
        }
    }

    pub fn dead(&self, reason: Reason, letters: u64) {
        self.seen().metrics.dead(reason, letters);
    }

    /// A batch comes again at `due`; its first event had arrived at `arrived`.
    pub fn scheduled(
        &self,
        batch_id: &str,
        due: SystemTime,
        arrived: SystemTime,
        time: SystemTime,
    ) {
        let mut seen = self.seen();
        seen.scheduled.forget_missed(time);
        if seen.scheduled.batches.len() < MAX_SCHEDULED {
            seen.scheduled.insert(batch_id, due, arrived);
            seen.tell_retries();
        }
    }

    /// What the lane holds now: so many events, the oldest of which arrived at `oldest`.
    pub fn holds(&self, events: u64, oldest: Option<SystemTime>) {
        let mut seen = self.seen();
        (seen.in_hand, seen.oldest) = (events, oldest);
        seen.metrics.oldest(seen.oldest());
    }

    /// All that it held was given back; its oldest event still waits.
    pub fn gave_back(&self) {
        self.seen().in_hand = 0;
    }

    pub fn circuit(&self, circuit: Circuit, time: SystemTime) {
        let mut seen = self.seen();
        if circuit == seen.circuit {
            return;
        }
        seen.circuit = circuit;
        seen.circuit_since =
            if circuit == Circuit::Closed { None } else { seen.circuit_since.or(Some(time)) };
        seen.metrics.circuit(circuit.state(), seen.circuit_since);
    }

    pub fn held(&self, until: Option<SystemTime>) {
        self.seen().held_until = until;
    }

    pub fn paused(&self, pause: Option<Pause>) {
        let mut seen = self.seen();
        seen.metrics.paused(pause.is_some());
        seen.paused = pause;
    }

    /// Why the lane cannot use its queue.
    pub fn trouble(&self, why: Option<String>) {
        let mut seen = self.seen();
        seen.metrics.up(why.is_none());
        seen.trouble = why;
    }

    fn forget_missed(&self, time: SystemTime) {
        let mut seen = self.seen();
        if seen.scheduled.forget_missed(time) {
            seen.tell_retries();
        }
    }

    fn view(&self, now: Instant, time: SystemTime) -> View {
        self.forget_missed(time);
        let seen = self.seen();
        let state = match (&seen.paused, &seen.trouble, seen.circuit, seen.held_until) {
            (Some(pause), ..) => State::Paused(pause.clone()),
            (_, Some(why), ..) => State::QueueFails(why.clone()),
            (_, _, Circuit::Open { until }, _) => State::CircuitOpen { until },
            (_, _, _, Some(until)) if until > time => State::Held { until },
            _ if seen.failing => State::Retrying,
            _ => seen.waits(now).map_or(State::Ok, |waits| State::Waiting {
                since: time.checked_sub(waits).unwrap_or(time),
            }),
        };
        let recent = |a: &&Attempt| now.saturating_duration_since(a.at) <= ATTEMPTS_AGE;
        let attempts: Vec<&Attempt> = seen.attempts.iter().filter(recent).collect();
        let mut durations: Vec<Duration> = attempts.iter().map(|a| a.took).collect();
        durations.sort_unstable();
        let ok = attempts.iter().filter(|a| a.ok).count() as u64;
        let events: u64 = seen
            .delivered
            .iter()
            .filter(|(at, _)| now.saturating_duration_since(*at) <= RECENT)
            .map(|(_, n)| n)
            .sum();
        View {
            state,
            circuit: seen.circuit,
            in_hand: seen.in_hand,
            retries_scheduled: seen
                .scheduled
                .batches
                .values()
                .filter(|(due, _)| *due > time)
                .count(),
            next_retry_at: seen.scheduled.dues.first(),
            delivered: seen.delivered_in_all,
            delivered_per_s_milli: events * 1000 / RECENT.as_secs(),
            success_milli: (!attempts.is_empty()).then(|| ok * 1000 / attempts.len() as u64),
            p50: percentile(&durations, 50),
            p99: percentile(&durations, 99),
            oldest_event_at: seen.oldest(),
            last_delivered_at: seen.last_delivered_at,
            last_error: seen.last_error.clone(),
        }
    }
}

/// The smallest value that is not exceeded by so many of a hundred.
fn percentile(sorted: &[Duration], percent: usize) -> Option<Duration> {
    sorted.get((sorted.len() * percent).div_ceil(100).saturating_sub(1)).copied()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock;

    fn secs(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    fn board() -> Board {
        Board::new(Metrics::new(SystemTime::UNIX_EPOCH))
    }

    fn failed(at: SystemTime) -> Option<LastError> {
        Some(LastError { at, failure: FailureKind::Status, status: Some(503), cause: None })
    }

    #[test]
    fn the_state_is_what_an_operator_has_to_know_first() {
        let (board, now, time) = (board(), clock::instant(), clock::now());
        let lane = board.lane(&"a".into());
        let state = || board.view("a", now, time).expect("it is there").state;
        assert_eq!(state(), State::Ok);
        let ended = |failure| Ended { disposition: DispositionKind::Retry, failure, took: secs(1) };
        lane.ended(ended(failed(time)), now);
        assert_eq!(state(), State::Retrying);
        lane.held(Some(time + secs(5)));
        assert_eq!(state(), State::Held { until: time + secs(5) });
        lane.circuit(Circuit::Open { until: time + secs(9) }, time);
        assert_eq!(state(), State::CircuitOpen { until: time + secs(9) });
        lane.trouble(Some("gone".to_owned()));
        assert_eq!(state(), State::QueueFails("gone".to_owned()));
        let pause = Pause { why: "w".to_owned(), since: time, by: "operator".to_owned() };
        lane.paused(Some(pause.clone()));
        assert_eq!(state(), State::Paused(pause));
        lane.paused(None);
        lane.trouble(None);
        lane.circuit(Circuit::Closed, time);
        lane.held(Some(time));
        lane.ended(Ended { disposition: DispositionKind::Delivered, ..ended(None) }, now);
        assert_eq!(state(), State::Ok, "a time that has come holds nothing");
        assert_eq!(
            board.view("a", now, time).expect("it is there").last_error,
            failed(time),
            "it is still told"
        );
        assert_eq!(board.view("b", now, time), None);
    }

    #[test]
    fn a_request_without_an_answer_is_told_of_unless_others_are_accepted() {
        let (board, now, time) = (board(), clock::instant(), clock::now());
        let lane = board.lane(&"a".into());
        let state = |after: Duration| {
            board.view("a", now + after, time + after).expect("it is there").state
        };
        let first = lane.begins("msg_1", 1, 1, now);
        assert_eq!(state(secs(4)), State::Ok);
        assert_eq!(state(secs(18)), State::Waiting { since: time });
        let second = lane.begins("msg_2", 1, 1, now + secs(1));
        lane.ended(
            Ended { disposition: DispositionKind::Delivered, failure: None, took: secs(1) },
            now + secs(2),
        );
        drop(second);
        assert_eq!(state(secs(18)), State::Ok, "others are accepted");
        drop(first);
        let _third = lane.begins("msg_3", 1, 1, now + secs(20));
        assert_eq!(state(secs(30)), State::Waiting { since: time + secs(20) });
        lane.ended(
            Ended { disposition: DispositionKind::Retry, failure: failed(time), took: secs(1) },
            now + secs(30),
        );
        assert_eq!(state(secs(40)), State::Retrying, "why is known");
    }

    #[test]
    fn rates_and_percentiles_are_of_the_latest() {
        let (board, start, time) = (board(), clock::instant(), clock::now());
        let lane = board.lane(&"a".into());
        for n in 0..100 {
            let failure = if n % 10 == 0 { failed(time) } else { None };
            lane.ended(
                Ended {
                    disposition: if n % 10 == 0 {
                        DispositionKind::Retry
                    } else {
                        DispositionKind::Delivered
                    },
                    failure,
                    took: secs(n),
                },
                start,
            );
            lane.delivered(3, Some(secs(1)), None, start + Duration::from_millis(n * 100), time);
        }
        let view = board.view("a", start + secs(10), time).expect("it is there");
        assert_eq!(
            (view.delivered, view.delivered_per_s_milli, view.success_milli),
            (300, 5000, Some(900))
        );
        assert_eq!((view.p50, view.p99), (Some(secs(49)), Some(secs(98))));
        let later = board.view("a", start + secs(1000), time).expect("it is there");
        assert_eq!(
            (later.delivered, later.delivered_per_s_milli, later.success_milli, later.p50),
            (300, 0, None, None)
        );
    }

    #[test]
    fn the_oldest_event_is_in_hand_or_in_a_retry() {
        let (board, now, time) = (board(), clock::instant(), clock::now());
        let lane = board.lane(&"a".into());
        lane.holds(2, Some(time - secs(10)));
        lane.scheduled("msg_1", time + secs(60), time - secs(30), time);
        lane.scheduled("msg_2", time + secs(30), time - secs(20), time);
        let view = board.view("a", now, time).expect("it is there");
        assert_eq!((view.oldest_event_at, view.retries_scheduled), (Some(time - secs(30)), 2));
        assert_eq!(view.next_retry_at, Some(time + secs(30)));
        drop(lane.begins("msg_1", 1, 1, now));
        lane.gave_back();
        let view = board.view("a", now, time).expect("it is there");
        assert_eq!(
            (view.oldest_event_at, view.in_hand, view.retries_scheduled),
            (Some(time - secs(20)), 0, 1)
        );
        let text = board.metrics().expose();
        assert!(text.contains("hooktrail_retries_waiting{subscriber=\"a\"} 1"), "{text}");
        let view = board.view("a", now, time + secs(3600)).expect("it is there");
        assert_eq!(view.retries_scheduled, 0, "another daemon had it");
        lane.holds(0, None);
        lane.scheduled("msg_3", time, time, time);
        assert!(
            !board
                .metrics()
                .expose()
                .contains("hooktrail_oldest_event_timestamp_seconds{subscriber=\"a\"} 0")
        );
        board.looked(time + secs(3600), Err("away".to_owned()));
        assert!(
            board
                .metrics()
                .expose()
                .contains("hooktrail_oldest_event_timestamp_seconds{subscriber=\"a\"} 0"),
            "nobody has to ask"
        );
    }

    #[test]
    fn a_look_at_the_queues_is_told_by_subscriber() {
        let board = board();
        board.lane(&"a".into());
        let depth = Depth { events: 5, retries: 1, delayed: 3, dead: 2 };
        let depths = Depths {
            subscribers: [("a".into(), depth)].into(),
            removed: [("gone".into(), depth)].into(),
            delayed: Some(7),
            orphans: 4,
        };
        board.looked(clock::now(), Ok(depths.clone()));
        let text = board.metrics().expose();
        for line in [
            "hooktrail_queue_messages{subscriber=\"a\",queue=\"dead\"} 2",
            "hooktrail_queue_messages{subscriber=\"a\",queue=\"retry\"} 1",
            "hooktrail_removed_subscriber_messages{subscriber=\"gone\"} 11",
            "hooktrail_delayed_retries 7",
            "hooktrail_orphans 4",
        ] {
            assert!(text.contains(line), "{line}: {text}");
        }
        board.looked(clock::now(), Ok(Depths { delayed: None, ..depths }));
        let text = board.metrics().expose();
        assert!(text.contains("hooktrail_delayed_retries 3"), "those of each subscriber: {text}");
        board.forget("a");
        assert!(!board.metrics().expose().contains("subscriber=\"a\""));
    }
}

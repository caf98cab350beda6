//! The requests and answers of the admin API: the daemon writes them, commands read them.
//!
//! The JSON of this API is public: names, and null or absent, stay as they are. A daemon may be
//! older or newer than the command that asks it, so a reader ignores fields that it does not know,
//! and a field that is added later gets `#[serde(default)]`. `docs/admin.yaml` describes the same;
//! a test compares the two.

mod dead;
mod history;
mod managed;
mod problem;
mod replay;
pub mod summary;
pub mod words;

use std::{
    borrow::Cow,
    collections::BTreeSet,
    fmt,
    time::{Duration, SystemTime},
};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};
use serde_json::{Map, Value};

pub use self::dead::{DeadLetter, DeadLetters, LettersDone, LettersRequest, Step, WholeLetter};
pub use self::history::{
    Attempt, Delivery, DeliveryList, Event, EventList, EventWhere, EventWithBytes, Gap, Party,
    Reach, Whereabouts,
};
pub use self::managed::{
    NewSecret, Origin, RotateSecret, Stamp, SubscriberChange, SubscriberDetails, SubscriberRemoval,
};
pub use self::problem::{BadEvent, FieldError, PROBLEM_JSON, Problem, ProblemKind};
pub use self::replay::{
    Operation, OperationList, Replay, ReplayList, ReplayOutcome, ReplayPreview, ReplayRequest,
    Resent,
};
use crate::{
    clock,
    config::changes,
    delivery::{self, AttemptResult, Depth, Failure, FailureKind, SubscriberName},
    endpoint::test_event::Report,
    policy::circuit_breaker::CircuitState,
    queue::{self, Hastened},
    supervisor::reload,
    telemetry::status,
};

/// A point in time, written as RFC 3339 to the millisecond.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Time(pub SystemTime);

impl Time {
    /// The time since then, zero if it is yet to come.
    pub fn ago(self, now: SystemTime) -> Duration {
        now.duration_since(self.0).unwrap_or_default()
    }

    /// The time until then, zero if it has passed.
    pub fn left(self, now: SystemTime) -> Duration {
        self.0.duration_since(now).unwrap_or_default()
    }
}

impl fmt::Display for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&clock::rfc3339(self.0))
    }
}

impl Serialize for Time {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Time {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let text = Cow::<str>::deserialize(from)?;
        let at: jiff::Timestamp = text.parse().map_err(D::Error::custom)?;
        at.try_into().map(Self).map_err(D::Error::custom)
    }
}

/// Events that are durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Accepted {
    pub accepted: usize,
    pub unmatched: usize,
}

/// The daemon that listens.
#[derive(Debug, Serialize, Deserialize)]
pub struct Introduction {
    #[serde(default)]
    pub version: String,
    /// The path of its configuration, absolute.
    pub config: String,
    pub pid: u32,
    /// Shows that the daemon knows the token; present if the request had a proof.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proof: Option<String>,
}

/// The daemon, its queue and all its subscribers.
#[derive(Debug, Serialize, Deserialize)]
pub struct Overview {
    #[serde(default)]
    pub version: String,
    pub phase: String,
    #[serde(default)]
    pub config: Configuration,
    pub queue: QueueState,
    /// Absent from a daemon of an earlier version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub history: Option<HistoryHealth>,
    #[serde(default)]
    pub subscribers: Vec<Subscriber>,
    /// The list goes on `after` this subscriber; absent at its end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
    /// Removed subscribers whose queues are not pruned yet.
    #[serde(default)]
    pub removed: Vec<Removed>,
}

#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Configuration {
    pub file: String,
    /// The mistakes found when it was last read, a line each.
    pub problem: Option<String>,
    pub held: Option<HeldRemovals>,
}

/// Removals that wait for an operator.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct HeldRemovals {
    pub subscribers: BTreeSet<String>,
    pub why: String,
}

impl From<reload::Held> for HeldRemovals {
    fn from(reload::Held { subscribers, why }: reload::Held) -> Self {
        Self { subscribers: names(subscribers), why }
    }
}

#[derive(Debug, Default, Serialize, Deserialize)]
pub struct QueueState {
    pub up: bool,
    pub looked_at: Option<Time>,
    pub error: Option<String>,
    /// Retries of all subscribers that are not due; `None` where each subscriber has its own.
    pub delayed_retries: Option<u64>,
    pub orphans: Option<u64>,
}

/// Whether events and deliveries are remembered.
#[derive(Debug, Serialize, Deserialize)]
pub struct HistoryHealth {
    /// `kept`; `incomplete`: events do not come into it; `opening`; `stopped`: it can be read alone;
    /// `away`; `off` by the configuration.
    pub state: String,
    /// Why it is not kept, or is incomplete.
    pub why: Option<String>,
    /// What is wrong with the store besides.
    pub warning: Option<String>,
    /// Where it begins; `None` if it has none, or cannot be read now.
    pub events_from: Option<Time>,
    pub deliveries_from: Option<Time>,
    /// Why it begins there.
    pub begins_there: Option<String>,
    pub last_event_at: Option<Time>,
    /// Bytes of its file.
    pub bytes: Option<u64>,
}

/// The contents of a removed subscriber's queues.
#[derive(Debug, Serialize, Deserialize)]
pub struct Removed {
    pub subscriber: String,
    pub events: u64,
    pub retries: u64,
    pub dead: u64,
}

impl Removed {
    pub fn new(subscriber: &str, depth: Depth) -> Self {
        let (events, retries, dead) = (depth.events, depth.batches(), depth.dead);
        Self { subscriber: subscriber.to_owned(), events, retries, dead }
    }
}

/// One subscriber.
#[derive(Debug, Serialize, Deserialize)]
pub struct Subscriber {
    pub subscriber: String,
    pub state: State,
    /// Absent from a daemon of an earlier version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub origin: Option<Origin>,
    /// The tenant whose events it gets; absent where it gets those of all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tenant: Option<String>,
    /// Why it is inactive.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
    /// `None` until its lane has started.
    #[serde(flatten)]
    pub lane: Option<Lane>,
}

impl Subscriber {
    /// Its pause, if it is paused.
    pub fn paused(&self) -> Option<&Paused> {
        self.lane.as_ref()?.paused.as_ref()
    }
}

/// The state of a subscriber: of several, the one that an operator has to know first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    Starting,
    Ok,
    Waiting,
    Retrying,
    CircuitOpen,
    Held,
    Paused,
    QueueFails,
    /// Made over the API, and not able to run.
    Inactive,
    /// One that only a newer daemon knows.
    #[serde(untagged)]
    Other(String),
}

impl State {
    /// All that this version knows.
    pub const KNOWN: [Self; 9] = [
        Self::Starting,
        Self::Ok,
        Self::Waiting,
        Self::Retrying,
        Self::CircuitOpen,
        Self::Held,
        Self::Paused,
        Self::QueueFails,
        Self::Inactive,
    ];

    pub fn name(&self) -> &str {
        match self {
            Self::Starting => "starting",
            Self::Ok => "ok",
            Self::Waiting => "waiting",
            Self::Retrying => "retrying",
            Self::CircuitOpen => "circuit_open",
            Self::Held => "held",
            Self::Paused => "paused",
            Self::QueueFails => "queue_fails",
            Self::Inactive => "inactive",
            Self::Other(name) => name,
        }
    }
}

impl From<&status::State> for State {
    fn from(state: &status::State) -> Self {
        match state {
            status::State::Ok => Self::Ok,
            status::State::Waiting { .. } => Self::Waiting,
            status::State::Retrying => Self::Retrying,
            status::State::CircuitOpen { .. } => Self::CircuitOpen,
            status::State::Held { .. } => Self::Held,
            status::State::Paused(_) => Self::Paused,
            status::State::QueueFails(_) => Self::QueueFails,
        }
    }
}

/// The figures of a lane and its queues.
#[derive(Debug, Serialize, Deserialize)]
pub struct Lane {
    pub paused: Option<Paused>,
    #[serde(default)]
    pub circuit: Circuit,
    pub held_until: Option<Time>,
    pub waiting_since: Option<Time>,
    pub queue_error: Option<String>,
    /// Events in its queue; `None` before the queues were first inspected.
    pub backlog: Option<u64>,
    /// Events that this daemon has taken and not settled. Required: a subscriber without it has no
    /// lane yet.
    pub in_hand: u64,
    /// Failed batches that wait for a retry.
    pub in_retry: Option<u64>,
    pub next_retry_at: Option<Time>,
    pub dead: Option<u64>,
    /// Events delivered since this daemon started.
    #[serde(default)]
    pub delivered: u64,
    #[serde(default)]
    pub delivered_per_s: f64,
    /// The share of the latest attempts that were accepted, 0 to 1.
    pub success_rate: Option<f64>,
    /// Duration of the latest attempts in seconds.
    pub p50_s: Option<f64>,
    pub p99_s: Option<f64>,
    pub oldest_event_at: Option<Time>,
    pub oldest_event_age_s: Option<f64>,
    pub last_delivered_at: Option<Time>,
    /// Requests are sent plain, because the receiver refused a compressed one.
    #[serde(default)]
    pub compression_refused: bool,
    pub last_error: Option<LastError>,
}

impl Lane {
    /// Whether it has nothing in hand and nothing to retry.
    pub fn is_idle(&self) -> bool {
        self.in_retry == Some(0) && self.in_hand == 0
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Paused {
    pub why: String,
    pub since: Time,
    pub by: String,
}

impl Paused {
    /// Whether only a change of the configuration ends it.
    pub fn is_fixed(&self) -> bool {
        self.by == "configuration"
    }
}

impl From<delivery::Pause> for Paused {
    fn from(delivery::Pause { why, since, by }: delivery::Pause) -> Self {
        Self { why, since: Time(since), by }
    }
}

#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Circuit {
    pub state: String,
    pub until: Option<Time>,
}

impl Circuit {
    /// Its state; `None` for one that only a newer daemon knows.
    pub fn state(&self) -> Option<CircuitState> {
        CircuitState::ALL.into_iter().find(|state| state.name() == self.state)
    }
}

/// The latest attempt that failed.
#[derive(Debug, Serialize, Deserialize)]
pub struct LastError {
    pub at: Time,
    pub failure: String,
    pub status: Option<u16>,
    pub cause: Option<String>,
}

impl LastError {
    /// The kind of failure; `None` for one that only a newer daemon knows.
    pub fn failure(&self) -> Option<FailureKind> {
        FailureKind::ALL.into_iter().find(|kind| kind.name() == self.failure)
    }
}

/// The body of a request to pause or resume a subscriber, to test it, or to reload.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChangeRequest {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
}

/// A subscriber after a pause or a resume.
#[derive(Debug, Serialize, Deserialize)]
pub struct PauseChange {
    pub subscriber: String,
    pub state: State,
    /// False if it was so before.
    pub changed: bool,
    #[serde(flatten)]
    pub paused: Option<Paused>,
}

/// A test event and its answer.
#[derive(Debug, Serialize, Deserialize)]
pub struct Tested {
    pub subscriber: String,
    pub url: String,
    /// The headers that were sent, in their order; secrets are redacted.
    pub headers: Map<String, Value>,
    pub body: String,
    pub status: Option<u16>,
    pub answer: Option<String>,
    pub failure: Option<String>,
    pub error: Option<String>,
    pub duration_ms: u64,
    pub outcome: String,
    pub verdict: String,
}

impl From<&Report> for Tested {
    fn from(report: &Report) -> Self {
        let headers = report.attempt.headers.iter();
        let shown = |value: &Option<String>| value.as_deref().unwrap_or("[redacted]").into();
        let (answer, failure) = (report.attempt.answer.as_ref(), report.failure());
        Self {
            subscriber: report.subscriber.to_string(),
            url: report.url.clone(),
            headers: headers.map(|(name, value)| (name.clone(), shown(value))).collect(),
            body: String::from_utf8_lossy(&report.body).into_owned(),
            status: answer.map(|(status, _)| *status),
            answer: answer.map(|(_, text)| text.clone()),
            failure: failure.map(|failure| Failure::name(failure).to_owned()),
            error: failure.and_then(Failure::cause).map(str::to_owned),
            duration_ms: report.took.as_millis() as u64,
            outcome: report.outcome.to_owned(),
            verdict: report.verdict.clone(),
        }
    }
}

/// The batches that wait for a retry, the first due first.
#[derive(Debug, Serialize, Deserialize)]
pub struct WaitingList {
    pub subscriber: String,
    /// All that wait, listed or not.
    pub waiting: usize,
    /// Messages of all subscribers that could not be read in time.
    pub unseen: u64,
    pub batches: Vec<WaitingBatch>,
}

/// A batch that waits for a retry.
#[derive(Debug, Serialize, Deserialize)]
pub struct WaitingBatch {
    /// Its place in the list, from 1.
    pub number: usize,
    pub id: String,
    pub events: u32,
    pub attempts: u32,
    /// The status of the last answer.
    pub status: Option<u16>,
    /// Why the last attempt had no answer.
    pub failure: Option<String>,
    pub first_attempt_at: Option<Time>,
    pub last_attempt_at: Option<Time>,
    pub due_at: Option<Time>,
    pub bytes: usize,
}

impl WaitingBatch {
    pub fn new(number: usize, waiting: &queue::Waiting) -> Self {
        let (status, failure) = match waiting.last.as_ref().map(|last| &last.result) {
            Some(AttemptResult::Status(status)) => (Some(*status), None),
            Some(AttemptResult::Failure(name)) => (None, Some(name.to_string())),
            None => (None, None),
        };
        Self {
            number,
            id: waiting.batch_id.to_string(),
            events: waiting.events,
            attempts: waiting.attempts,
            status,
            failure,
            first_attempt_at: waiting.first_attempt_at.map(Time),
            last_attempt_at: waiting.last.as_ref().map(|last| Time(last.at)),
            due_at: waiting.due.map(Time),
            bytes: waiting.bytes,
        }
    }
}

/// The body of a request for retries now: for all batches, for those with these ids, or for none,
/// with one batch tried.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RetryNow {
    /// Not `null`: that could be meant for none as well as for all.
    #[serde(default, deserialize_with = "present", skip_serializing_if = "Option::is_none")]
    pub ids: Option<BTreeSet<String>>,
    /// The caller has made batches due in the queue itself.
    #[serde(default)]
    pub try_only: bool,
}

/// A value that may be left out, and is not `null`.
fn present<'de, T: Deserialize<'de>, D: Deserializer<'de>>(from: D) -> Result<Option<T>, D::Error> {
    T::deserialize(from).map(Some)
}

/// Retries that are due now.
#[derive(Debug, Serialize, Deserialize)]
pub struct Retried {
    pub subscriber: String,
    /// Batches that are due now and were not before.
    pub moved: u64,
    pub already_due: u64,
    pub not_found: Vec<String>,
    pub unseen: u64,
    /// The state before.
    pub state: State,
    pub paused: Option<Paused>,
    /// One batch is tried although the circuit was open, or the receiver had asked for a wait.
    pub tried_now: bool,
}

impl Retried {
    pub fn new(
        subscriber: &str,
        done: Hastened,
        (state, paused): (State, Option<Paused>),
        tried_now: bool,
    ) -> Self {
        let Hastened { moved, due: already_due, missing: not_found, unseen } = done;
        let subscriber = subscriber.to_owned();
        Self { subscriber, moved, already_due, not_found, unseen, state, paused, tried_now }
    }
}

/// The changes that a reload would make.
#[derive(Debug, Serialize, Deserialize)]
pub struct ReloadPreview {
    #[serde(flatten)]
    pub changes: Changes,
    /// A changed file alone does not do it: only an operator removes this many subscribers.
    #[serde(default)]
    pub waits_for_operator: bool,
}

/// The changes that a reload has made.
#[derive(Debug, Serialize, Deserialize)]
pub struct Reloaded {
    #[serde(flatten)]
    pub changes: Changes,
    /// Subscribers whose queue could not be bound yet.
    #[serde(default)]
    pub not_bound: BTreeSet<String>,
}

impl From<reload::Reloaded> for Reloaded {
    fn from(reload::Reloaded { changes, not_bound }: reload::Reloaded) -> Self {
        Self { changes: changes.into(), not_bound: names(not_bound) }
    }
}

/// The keys that differ between two configurations.
#[derive(Debug, Serialize, Deserialize)]
pub struct Changes {
    pub changes: Vec<Change>,
    /// Keys outside of subscribers whose new values are used.
    #[serde(default)]
    pub settings: Vec<String>,
    /// Keys whose new values are used after a restart.
    #[serde(default)]
    pub needs_restart: Vec<String>,
}

impl From<changes::Changes> for Changes {
    fn from(found: changes::Changes) -> Self {
        let changes::Changes { changes, settings, needs_restart } = found;
        Self {
            changes: changes.into_iter().map(Change::from).collect(),
            settings: texts(settings),
            needs_restart: texts(needs_restart),
        }
    }
}

/// The change of one subscriber.
#[derive(Debug, Serialize, Deserialize)]
pub struct Change {
    pub subscriber: String,
    pub change: String,
    /// Keys of one that is changed.
    pub keys: Vec<String>,
}

impl From<changes::Change> for Change {
    fn from(changes::Change { subscriber, change, keys }: changes::Change) -> Self {
        Self {
            subscriber: subscriber.to_string(),
            change: change.name().to_owned(),
            keys: texts(keys),
        }
    }
}

fn names(names: BTreeSet<SubscriberName>) -> BTreeSet<String> {
    names.iter().map(ToString::to_string).collect()
}

fn texts(keys: Vec<&'static str>) -> Vec<String> {
    keys.into_iter().map(str::to_owned).collect()
}

#[cfg(test)]
mod tests;

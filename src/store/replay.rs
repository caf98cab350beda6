//! Replays and operations: what operators have asked for, and how far it has come.

use std::time::SystemTime;

use super::{delivery::DeliveryState, row::EventNumber};
use crate::{
    delivery::{BatchId, SubscriberName},
    event::{Pattern, Tenant, entry::Metadata, payload::Format},
};

/// The most operations that are kept: the latest.
pub const MAX_OPERATIONS: i64 = 100_000;

/// The most replays that are kept beside those that run: the latest.
pub const MAX_REPLAYS: i64 = 10_000;

/// The most replays that run when one is added or continued.
pub const MAX_RUNNING: usize = 10;

/// What an operator has done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Operation {
    /// Its row: later ones were recorded later.
    pub row: i64,
    pub new: NewOperation,
}

/// An operation on its way into the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewOperation {
    pub at: SystemTime,
    /// The name of the token; empty where a request needs none.
    pub by: String,
    /// `pause`, `replay` …
    pub what: &'static str,
    /// The subscriber, or an id; empty of an operation on all.
    pub subject: String,
    /// A short text without a secret, a header, or the path of a URL.
    pub details: String,
}

impl NewOperation {
    /// All operations.
    pub const NAMES: [&'static str; 15] = [
        "pause",
        "resume",
        "retry",
        "test",
        "reload",
        "resend",
        "replay",
        "continue_replay",
        "cancel_replay",
        "replay_dead",
        "purge_dead",
        "add_subscriber",
        "change_subscriber",
        "delete_subscriber",
        "rotate_secret",
    ];
}

/// Rows of history that are sent to a subscriber again, in batches of their own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Replay {
    /// Its row: later ones were made later; 0 before it is stored.
    pub row: i64,
    /// `rpl_` and 32 hexadecimal digits.
    pub id: String,
    pub subscriber: SubscriberName,
    pub order: ReplayOrder,
    pub progress: ReplayProgress,
    pub state: ReplayState,
    pub created_at: SystemTime,
    pub changed_at: SystemTime,
}

/// A replay whose record cannot be read: of a later version, or damaged. It does not run, and can
/// only be cancelled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnreadableReplay {
    pub row: i64,
    pub id: String,
    /// As recorded; perhaps no valid name.
    pub subscriber: String,
    /// As recorded: `running`, or the name of an end.
    pub state: String,
    pub created_at: SystemTime,
    pub changed_at: SystemTime,
    /// What cannot be read, and the remedy.
    pub why: String,
}

/// A replay as it is recorded.
pub type Recorded = Result<Replay, Box<UnreadableReplay>>;

/// The key that a client gave to its request: it may send the request again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RequestKey {
    /// The client: the name of its token. Clients do not share their keys.
    pub by: String,
    pub key: String,
    /// SHA-256 of what was requested.
    pub sha256: [u8; 32],
}

/// The result of adding a replay.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Added {
    New,
    /// The same request with the same key has made this one before.
    Before(Box<Recorded>),
    /// The key was given to another request before.
    OtherRequest,
    /// These run already: [`MAX_RUNNING`] or more.
    TooMany(Vec<Recorded>),
}

/// The result of changing a replay.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Changed {
    Yes(Box<Recorded>),
    /// Its state forbids the change, or its record cannot be read.
    No(Box<Recorded>),
    /// It does not go on, since these run already: [`MAX_RUNNING`] or more.
    TooMany(Vec<Recorded>),
}

/// What is replayed. It never changes, so that a batch that is made twice has the same bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReplayOrder {
    /// The name of the token; the configuration's key for `start_from`.
    pub by: String,
    /// From this time on.
    pub since: SystemTime,
    /// Before this time; `None`: up to the start of the replay.
    pub until: Option<SystemTime>,
    /// The subscriber's patterns when the replay was made.
    pub patterns: Vec<Pattern>,
    /// The subscriber's tenant; `None`: it gets the events of all.
    pub tenant: Option<Tenant>,
    /// Of these events those whose type matches it too.
    pub events: Option<Pattern>,
    /// The rows begin after this one.
    pub after: EventNumber,
    /// Events in a second, at most.
    pub rate: Option<u32>,
    pub format: Format,
    /// What the format puts beside each event.
    pub metadata: Metadata,
    /// The most events of a batch.
    pub max_events: usize,
    /// The most bytes of a request body.
    pub max_bytes: usize,
    /// Whether events without a field `event_id` get one.
    pub event_ids: bool,
    /// When the subscriber was new, if it is its first replay, by `start_from`.
    pub bound_at: Option<SystemTime>,
}

/// A subscriber that is configured, and was not before, as far as this process knows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Newcomer {
    pub name: SubscriberName,
    /// From when on it also gets what history has.
    pub start_from: Option<SystemTime>,
}

/// The result of recording subscribers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Introduced {
    /// All new subscribers whose first replay is not made yet, with the time from which on they get
    /// events.
    pub waiting: Vec<(SubscriberName, SystemTime)>,
    /// Of those that were recorded now: subscribers that have a `start_from` and are not new.
    pub not_new: Vec<SubscriberName>,
}

/// How far a replay has come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReplayProgress {
    /// The last row whose events are in the subscriber's queue.
    pub position: EventNumber,
    /// The last row of the replay.
    pub upto: EventNumber,
    /// The rows that history had between the first and the last when the replay was made.
    pub rows: u64,
    /// Rows up to the position that were there.
    pub read: u64,
    /// Events that were chosen.
    pub matched: u64,
    /// Events that are in the subscriber's queue, or were.
    pub enqueued: u64,
    pub batches: u64,
    /// Chosen events that cannot be sent: invalid, too large, or kept without their bytes.
    pub unusable: u64,
    /// Rows that retention removed first; known at the end.
    pub missing: u64,
    /// The ends of batches that are in the subscriber's queue no more.
    pub ends: BatchEnds,
    /// The batches that are in the subscriber's queue, as far as is known.
    pub unfinished: Vec<BatchId>,
}

/// Batches by their ends. Each counts by the end that was found first: a dead letter that is replayed
/// later stays dead here.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct BatchEnds {
    pub delivered: u64,
    pub dead: u64,
    /// Their halves went on, each a batch.
    pub split: u64,
}

impl BatchEnds {
    /// Counts a batch, if its state is an end; false if it is none.
    pub const fn count(&mut self, state: &DeliveryState) -> bool {
        let ended = match state {
            DeliveryState::Delivered { .. } => &mut self.delivered,
            DeliveryState::Dead { .. } => &mut self.dead,
            DeliveryState::Split => &mut self.split,
            DeliveryState::InFlight
            | DeliveryState::Retrying { .. }
            | DeliveryState::Paused
            | DeliveryState::Interrupted => return false,
        };
        *ended += 1;
        true
    }

    /// All that have ended.
    pub const fn sum(self) -> u64 {
        self.delivered + self.dead + self.split
    }
}

impl ReplayProgress {
    /// The progress of a replay of so many rows, after one and up to another, that has read none.
    pub const fn begin(after: EventNumber, upto: EventNumber, rows: u64) -> Self {
        Self {
            position: after,
            upto,
            rows,
            read: 0,
            matched: 0,
            enqueued: 0,
            batches: 0,
            unusable: 0,
            missing: 0,
            ends: BatchEnds { delivered: 0, dead: 0, split: 0 },
            unfinished: Vec::new(),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReplayState {
    Running,
    /// All batches are in the subscriber's queue.
    Done,
    Cancelled,
    /// It cannot go on, for this reason.
    Failed(String),
}

impl ReplayState {
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Done => "done",
            Self::Cancelled => "cancelled",
            Self::Failed(_) => "failed",
        }
    }

    /// The reason of a failure.
    pub fn why(&self) -> Option<&str> {
        match self {
            Self::Failed(why) => Some(why),
            _ => None,
        }
    }

    /// Reads a stored state; `None` for an unknown name.
    pub fn read(name: &str, why: Option<String>) -> Option<Self> {
        let states = [Self::Running, Self::Done, Self::Cancelled];
        let failed = || Self::Failed(why.unwrap_or_default());
        let found = states.into_iter().find(|state| state.name() == name);
        found.or_else(|| (name == "failed").then(failed))
    }
}

/// A change of a replay.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReplayChange {
    Progressed(ReplayProgress),
    Completed(ReplayProgress),
    /// Of the batches of a replay that does not run any more some have ended.
    Settled {
        ends: BatchEnds,
        unfinished: Vec<BatchId>,
    },
    Failed(String),
    Cancelled,
    Continued,
}

impl Replay {
    /// The replay as it was when it was made.
    #[must_use]
    pub fn as_made(&self) -> Self {
        let ReplayProgress { upto, rows, .. } = self.progress;
        Self {
            progress: ReplayProgress::begin(self.order.after, upto, rows),
            state: ReplayState::Running,
            changed_at: self.created_at,
            ..self.clone()
        }
    }

    /// Changes the replay; false, and nothing has changed, if its state forbids that. A replay that
    /// was cancelled takes no progress of who has not heard of that.
    pub fn apply(&mut self, change: ReplayChange, now: SystemTime) -> bool {
        let is_running = self.state == ReplayState::Running;
        let can_go_on = matches!(self.state, ReplayState::Cancelled | ReplayState::Failed(_));
        match change {
            ReplayChange::Settled { ends, unfinished } if !is_running => {
                self.progress = ReplayProgress { ends, unfinished, ..self.progress.clone() };
                return true;
            }
            ReplayChange::Progressed(progress) if is_running => self.progress = progress,
            ReplayChange::Completed(progress) if is_running => {
                let rows = progress.rows.max(progress.read);
                self.progress = ReplayProgress { missing: rows - progress.read, ..progress };
                self.state = ReplayState::Done;
            }
            ReplayChange::Failed(why) if is_running => self.state = ReplayState::Failed(why),
            ReplayChange::Cancelled if is_running => self.state = ReplayState::Cancelled,
            ReplayChange::Continued if can_go_on => self.state = ReplayState::Running,
            _ => return false,
        }
        self.changed_at = now;
        true
    }
}

/// The rows of a span of time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// They begin after this row.
    pub after: EventNumber,
    /// The last of them.
    pub upto: EventNumber,
    /// Their number, a few outside of the span of time included.
    pub rows: u64,
}

#[cfg(test)]
pub(crate) mod tests {
    use std::time::Duration;

    use super::*;

    /// A replay of all events from the first 100 rows.
    pub(crate) fn replay(id: &str, subscriber: &str) -> Replay {
        let at = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000);
        Replay {
            row: 0,
            id: id.to_owned(),
            subscriber: subscriber.into(),
            order: ReplayOrder {
                tenant: None,
                by: "ops".to_owned(),
                since: at - Duration::from_secs(3600),
                until: None,
                patterns: vec![Pattern::all()],
                events: Some(Pattern::try_new("user.*").expect("a pattern")),
                after: EventNumber(0),
                rate: Some(7),
                format: Format::JsonLines,
                metadata: Metadata { source: Some("/audit".to_owned()), ..Metadata::default() },
                max_events: 3,
                max_bytes: 1000,
                event_ids: true,
                bound_at: Some(at),
            },
            progress: ReplayProgress {
                position: EventNumber(0),
                upto: EventNumber(100),
                rows: 100,
                read: 0,
                matched: 0,
                enqueued: 0,
                batches: 0,
                unusable: 0,
                missing: 0,
                ends: BatchEnds { delivered: 4, dead: 3, split: 2 },
                unfinished: vec!["msg_1".into()],
            },
            state: ReplayState::Running,
            created_at: at,
            changed_at: at,
        }
    }

    #[test]
    fn a_cancelled_replay_takes_no_progress_and_goes_on_where_it_was() {
        let mut replay = replay("rpl_1", "a");
        let now = replay.created_at + Duration::from_secs(1);
        let at = |position, read| ReplayProgress {
            position: EventNumber(position),
            read,
            ..self::replay("", "a").progress
        };
        assert!(replay.apply(ReplayChange::Progressed(at(10, 10)), now));
        assert!(!replay.apply(ReplayChange::Continued, now), "it runs");
        assert!(replay.apply(ReplayChange::Cancelled, now));
        for change in [
            ReplayChange::Progressed(at(20, 20)),
            ReplayChange::Completed(at(100, 100)),
            ReplayChange::Failed(String::new()),
            ReplayChange::Cancelled,
        ] {
            let before = replay.clone();
            assert!(!replay.apply(change, now + Duration::from_secs(1)));
            assert_eq!(replay, before);
        }
        assert_eq!(replay.progress.position, EventNumber(10));
        assert!(replay.apply(ReplayChange::Continued, now));
        assert!(replay.apply(ReplayChange::Completed(at(100, 60)), now));
        assert_eq!((replay.state.name(), replay.progress.missing), ("done", 40));
        assert!(!replay.apply(ReplayChange::Continued, now), "it is done");
        let ends = BatchEnds { delivered: 1, ..BatchEnds::default() };
        let settled = || ReplayChange::Settled { ends, unfinished: Vec::new() };
        let changed_at = replay.changed_at;
        assert!(replay.apply(settled(), now + Duration::from_secs(9)));
        assert_eq!((replay.progress.ends, replay.changed_at), (ends, changed_at));
        let mut running = self::replay("rpl_2", "a");
        assert!(!running.apply(settled(), now), "its runner counts");
    }

    #[test]
    fn states_are_read_by_their_names() {
        let why = "removed".to_owned();
        for state in [
            ReplayState::Running,
            ReplayState::Done,
            ReplayState::Cancelled,
            ReplayState::Failed(why),
        ] {
            let read = ReplayState::read(state.name(), state.why().map(str::to_owned));
            assert_eq!(read, Some(state));
        }
        assert_eq!(ReplayState::read("other", None), None);
    }
}

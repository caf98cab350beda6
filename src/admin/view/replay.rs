//! Replays, resends and operations as the API answers with them.

use serde::{Deserialize, Serialize};

use super::{Reach, Time};
use crate::{
    history::replay::Outcome,
    page::{Cursor, List},
    store::{self, BatchEnds, Page, Recorded, ReplayState, UnreadableReplay},
    wording::counted,
};

/// The body of a request to replay history to a subscriber.
#[derive(Debug, Default, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReplayRequest {
    /// Events from this time on; required.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub since: Option<Time>,
    /// Events before this time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub until: Option<Time>,
    /// A pattern: of the subscriber's events those whose type matches it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub events: Option<String>,
    /// Events in a second, at most.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate: Option<u32>,
    /// Only counts.
    #[serde(default)]
    pub dry_run: bool,
}

/// The events that a replay would send.
#[derive(Debug, Serialize, Deserialize)]
pub struct ReplayPreview {
    pub subscriber: String,
    /// Events that were chosen.
    pub events: u64,
    /// False if the time was over before all were counted: there are more.
    pub complete: bool,
    pub history: Reach,
}

/// A replay.
#[derive(Debug, Serialize, Deserialize)]
pub struct Replay {
    pub id: String,
    pub subscriber: String,
    /// `running`, `done`, `cancelled`, `failed`; `unreadable` if it would run, and its record cannot
    /// be read.
    pub state: String,
    /// Why it failed, or what of its record cannot be read: then the numbers are 0.
    pub why: Option<String>,
    pub by: String,
    pub created_at: Time,
    pub changed_at: Time,
    /// Null if the record cannot be read.
    pub since: Option<Time>,
    pub until: Option<Time>,
    pub events: Option<String>,
    pub rate: Option<u32>,
    /// Rows of history that it reads, and has read.
    pub rows: u64,
    pub read: u64,
    /// Events that were chosen; in the subscriber's queue, or were; cannot be sent.
    pub matched: u64,
    pub enqueued: u64,
    pub unusable: u64,
    pub batches: u64,
    pub outcome: ReplayOutcome,
    /// Rows that were removed before they were read; known at the end.
    pub missing: u64,
    /// It is the first of a new subscriber: `start_from`.
    pub start_from: bool,
}

/// What became of a replay's batches, as far as history knows. Together they are all.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub struct ReplayOutcome {
    pub delivered: u64,
    pub dead: u64,
    /// Their halves went on, each a batch.
    pub split: u64,
    /// Attempted, and to be attempted again.
    pub retrying: u64,
    /// In the subscriber's queue without an attempt, in flight, or paused.
    pub waiting: u64,
    /// History lacks their end.
    pub unknown: u64,
}

impl ReplayOutcome {
    /// A batch in each state.
    #[cfg(test)]
    pub(in crate::admin) const ONE_EACH: Self =
        Self { delivered: 1, dead: 1, split: 1, retrying: 1, waiting: 1, unknown: 1 };

    /// The states that batches are in, with how many are.
    pub(crate) fn states(self) -> impl Iterator<Item = (&'static str, u64)> {
        let Self { delivered, dead, split, retrying, waiting, unknown } = self;
        [
            ("delivered", delivered),
            ("retrying", retrying),
            ("waiting", waiting),
            ("dead", dead),
            ("split", split),
            ("unknown", unknown),
        ]
        .into_iter()
        .filter(|(_, batches)| *batches > 0)
    }
}

/// `2 delivered, 1 dead`.
impl std::fmt::Display for ReplayOutcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let states: Vec<_> = self.states().map(|(state, n)| format!("{n} {state}")).collect();
        f.write_str(&states.join(", "))
    }
}

impl From<Outcome> for ReplayOutcome {
    fn from(of: Outcome) -> Self {
        let Outcome { ends: BatchEnds { delivered, dead, split }, retrying, waiting, unknown } = of;
        Self { delivered, dead, split, retrying, waiting, unknown }
    }
}

impl Replay {
    /// A replay as its record has it: what became of its batches is not asked.
    pub fn recorded(recorded: &Recorded) -> Self {
        match recorded {
            Ok(replay) => Self::new(replay),
            Err(unreadable) => Self::unreadable(unreadable),
        }
    }

    fn unreadable(it: &UnreadableReplay) -> Self {
        let ended = ReplayState::read(&it.state, None).filter(|s| *s != ReplayState::Running);
        Self {
            id: it.id.clone(),
            subscriber: it.subscriber.clone(),
            state: ended.as_ref().map_or("unreadable", ReplayState::name).to_owned(),
            why: Some(it.why.clone()),
            by: String::new(),
            created_at: Time(it.created_at),
            changed_at: Time(it.changed_at),
            since: None,
            until: None,
            events: None,
            rate: None,
            rows: 0,
            read: 0,
            matched: 0,
            enqueued: 0,
            unusable: 0,
            batches: 0,
            outcome: ReplayOutcome::default(),
            missing: 0,
            start_from: false,
        }
    }

    pub fn new(replay: &store::Replay) -> Self {
        let store::Replay { order, progress, .. } = replay;
        Self {
            id: replay.id.clone(),
            subscriber: replay.subscriber.as_str().to_owned(),
            state: replay.state.name().to_owned(),
            why: replay.state.why().map(str::to_owned),
            by: order.by.clone(),
            created_at: Time(replay.created_at),
            changed_at: Time(replay.changed_at),
            since: Some(Time(order.since)),
            until: order.until.map(Time),
            events: order.events.as_ref().map(|pattern| pattern.as_str().to_owned()),
            rate: order.rate,
            rows: progress.rows,
            read: progress.read,
            matched: progress.matched,
            enqueued: progress.enqueued,
            unusable: progress.unusable,
            batches: progress.batches,
            outcome: ReplayOutcome::default(),
            missing: progress.missing,
            start_from: order.bound_at.is_some(),
        }
    }
}

/// A part of the list of replays, the latest first.
#[derive(Debug, Serialize, Deserialize)]
pub struct ReplayList {
    pub replays: Vec<Replay>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
}

impl ReplayList {
    pub(in crate::admin) fn new(replays: Vec<Replay>, following: Option<i64>) -> Self {
        Self { replays, next: next(List::Replays, following) }
    }
}

/// A delivery that is sent again.
#[derive(Debug, Serialize, Deserialize)]
pub struct Resent {
    pub id: String,
    pub subscriber: String,
    pub events: u32,
    pub bytes: u64,
}

impl Resent {
    /// What the record of the operation says of it.
    pub(in crate::admin) fn details(&self) -> String {
        format!("to {}, {}", self.subscriber, counted(self.events, "event(s)"))
    }
}

/// A part of the list of operations, the latest first.
#[derive(Debug, Serialize, Deserialize)]
pub struct OperationList {
    pub operations: Vec<Operation>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
}

/// What an operator has done over the API.
#[derive(Debug, Serialize, Deserialize)]
pub struct Operation {
    pub at: Time,
    /// The name of the token; null where none was needed.
    pub by: Option<String>,
    pub what: String,
    /// The subscriber, or an id; null of one on all.
    pub subject: Option<String>,
    pub details: Option<String>,
}

impl OperationList {
    pub fn new(page: Page<store::Operation>) -> Self {
        let some = |text: String| Some(text).filter(|text| !text.is_empty());
        let operation = |operation: store::Operation| {
            let store::NewOperation { at, by, what, subject, details } = operation.new;
            let (by, subject, details) = (some(by), some(subject), some(details));
            Operation { at: Time(at), by, what: what.to_owned(), subject, details }
        };
        Self {
            next: next(List::Operations, page.next),
            operations: page.rows.into_iter().map(operation).collect(),
        }
    }
}

fn next(list: List, row: Option<i64>) -> Option<String> {
    row.map(|row| Cursor { list, row }.to_string())
}

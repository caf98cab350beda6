//! A batch as history has it: its state, its attempts, and how each change makes the next.

use std::time::{Duration, SystemTime};

use crate::{
    delivery::{BatchId, Failure, FailureKind, Outcome, Prints, Reason, SubscriberName},
    event::payload::Format,
};

/// Bytes of a failed attempt's answer or cause that are kept.
const MAX_EXCERPT: usize = 1024;

/// The most attempts that are kept of a delivery: the first and the latest.
const MAX_ATTEMPTS: usize = 100;

/// Something that happened to a batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeliveryChange {
    pub id: BatchId,
    pub subscriber: SubscriberName,
    pub at: SystemTime,
    pub change: Change,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// An attempt has begun. Each carries the contents: the rows of a batch may have been lost.
    Started {
        attempt: u32,
        contents: Contents,
        by: String,
    },
    Ended {
        attempt: u32,
        took: Duration,
        end: AttemptEnd,
    },
    /// The batch waits for its next attempt; durable.
    Retrying {
        due: SystemTime,
    },
    /// The receiver accepted it.
    Delivered,
    /// It was given up; durable. With the contents, since it may have had no attempt.
    Dead {
        reason: Reason,
        contents: Option<Contents>,
    },
    /// It waits until its subscriber is resumed; durable.
    Paused,
    /// Its halves go on, each a batch; durable.
    Split,
    /// It is a half of a batch that was split, and waits for its first attempt; durable.
    Half {
        due: SystemTime,
        contents: Contents,
    },
    /// Nothing was sent, or what followed could not be stored: its events are delivered again,
    /// perhaps in another batch.
    Interrupted,
}

/// What a batch is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Contents {
    /// `None` of a single event that never became a batch.
    pub format: Option<Format>,
    pub events: u32,
    /// Bytes of the body.
    pub bytes: u64,
    /// `None` if it was not computed.
    pub sha256: Option<[u8; 32]>,
    pub prints: Prints,
    /// An operator sent it again.
    pub replay: bool,
    /// The batch that this is a half of.
    pub parent: Option<BatchId>,
}

/// The end of an attempt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AttemptEnd {
    pub status: Option<u16>,
    /// `None` of a success.
    pub failure: Option<FailureKind>,
    /// The begin of the receiver's answer, or why there was none; empty of a success.
    pub excerpt: String,
}

impl AttemptEnd {
    /// `None` if nothing was sent.
    pub fn of(outcome: &Outcome) -> Option<Self> {
        let none = String::new();
        match outcome {
            Outcome::Delivered { status } => {
                Some(Self { status: Some(*status), failure: None, excerpt: none })
            }
            Outcome::Unsent { .. } => None,
            _ => outcome.failure().map(|failure| {
                let text = match failure {
                    Failure::Status { excerpt, .. } => excerpt.as_str(),
                    other => other.cause().unwrap_or_default(),
                };
                Self {
                    status: failure.status(),
                    failure: Some(failure.kind()),
                    excerpt: text[..text.floor_char_boundary(MAX_EXCERPT)].to_owned(),
                }
            }),
        }
    }
}

/// A batch and what became of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Delivery {
    /// Its row: later ones were begun later.
    pub row: i64,
    pub id: BatchId,
    pub subscriber: SubscriberName,
    pub contents: Contents,
    pub state: DeliveryState,
    /// When its first attempt began, as far as history knows; for a batch without one when it was
    /// given up.
    pub begun_at: SystemTime,
    pub changed_at: SystemTime,
    /// Oldest first.
    pub attempts: Vec<DeliveryAttempt>,
}

/// The deliveries whose batches hold an event.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct WithEvent {
    pub deliveries: Vec<Delivery>,
    /// Deliveries of that time whose batches' prints are not known.
    pub without_prints: u64,
    /// The time was over when the search had come this far; later deliveries were not read.
    pub searched_until: Option<SystemTime>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeliveryAttempt {
    /// From 1.
    pub number: u32,
    pub at: SystemTime,
    /// The daemon that made it.
    pub by: String,
    /// `None` while there is no answer yet.
    pub end: Option<(Duration, AttemptEnd)>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DeliveryState {
    InFlight,
    Retrying {
        due: SystemTime,
    },
    Delivered {
        at: SystemTime,
    },
    Dead {
        reason: Reason,
    },
    Paused,
    Split,
    /// The daemon ended before the answer, or could not store what followed. Its events are
    /// delivered again, perhaps in another batch.
    Interrupted,
}

impl DeliveryState {
    pub const NAMES: [&'static str; 7] =
        ["in_flight", "retrying", "delivered", "dead", "paused", "split", "interrupted"];

    pub const fn name(&self) -> &'static str {
        match self {
            Self::InFlight => "in_flight",
            Self::Retrying { .. } => "retrying",
            Self::Delivered { .. } => "delivered",
            Self::Dead { .. } => "dead",
            Self::Paused => "paused",
            Self::Split => "split",
            Self::Interrupted => "interrupted",
        }
    }
}

impl Delivery {
    /// The delivery that a first change begins; `None` if it does not say what the batch is made
    /// of.
    pub fn begin(row: i64, change: &DeliveryChange) -> Option<Self> {
        let (Change::Started { contents, .. }
        | Change::Half { contents, .. }
        | Change::Dead { contents: Some(contents), .. }) = &change.change
        else {
            return None;
        };
        let mut begun = Self {
            row,
            id: change.id.clone(),
            subscriber: change.subscriber.clone(),
            contents: contents.clone(),
            state: DeliveryState::InFlight,
            begun_at: change.at,
            changed_at: change.at,
            attempts: Vec::new(),
        };
        begun.apply(change);
        Some(begun)
    }

    /// Changes the delivery by what happened.
    pub fn apply(&mut self, change: &DeliveryChange) {
        let at = change.at;
        self.changed_at = at;
        self.state = match &change.change {
            Change::Started { attempt, contents, by } => {
                // A batch that an operator replays is sent again from attempt 1.
                self.contents.replay |= contents.replay;
                if self.contents.sha256.is_none() {
                    self.contents.sha256 = contents.sha256;
                }
                if self.contents.prints.is_none() {
                    self.contents.prints = contents.prints.clone();
                }
                self.attempts.push(DeliveryAttempt {
                    number: *attempt,
                    at,
                    by: by.clone(),
                    end: None,
                });
                if self.attempts.len() > MAX_ATTEMPTS {
                    self.attempts.remove(1);
                }
                DeliveryState::InFlight
            }
            Change::Ended { attempt, took, end } => {
                let open = self.attempts.iter_mut().rev();
                if let Some(open) =
                    open.into_iter().find(|a| a.number == *attempt && a.end.is_none())
                {
                    open.end = Some((*took, end.clone()));
                }
                return;
            }
            Change::Retrying { due } | Change::Half { due, .. } => {
                DeliveryState::Retrying { due: *due }
            }
            Change::Delivered => DeliveryState::Delivered { at },
            Change::Dead { reason, .. } => DeliveryState::Dead { reason: *reason },
            Change::Paused => DeliveryState::Paused,
            Change::Split => DeliveryState::Split,
            Change::Interrupted => DeliveryState::Interrupted,
        };
    }
}

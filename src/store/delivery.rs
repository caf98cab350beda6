//! A batch as history has it: its state, its attempts, and how each change makes the next.

use std::time::{Duration, SystemTime};

use crate::{
    clock,
    delivery::{BatchId, Failure, FailureKind, Outcome, Prints, Reason, SubscriberName},
    event::payload::Format,
};

/// Bytes of a failed attempt's answer or cause that are kept.
const MAX_EXCERPT: usize = 1024;

/// The most attempts that are kept of a delivery: the first and the latest.
const MAX_ATTEMPTS: usize = 100;

/// The time by which an attempt may be late, an eighth of its delay apart: its turn may come later.
const LATE: Duration = Duration::from_secs(5 * 60);

/// The time by which the end of an attempt is recorded; no attempt takes as long.
const LONGEST_ATTEMPT: Duration = Duration::from_secs(15 * 60);

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

    /// The name of a state that is not known any more, as [`Delivery::doubt`] says.
    pub const UNKNOWN: &'static str = "unknown";

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
    /// Why the recorded state may not hold any more: what followed long ago is not recorded. Another
    /// daemon may have made it, whose deliveries are not in this history, or it was lost with a
    /// process.
    pub fn doubt(&self, now: SystemTime) -> Option<String> {
        let time = clock::rfc3339_seconds;
        match &self.state {
            DeliveryState::Retrying { due } => {
                let delay = due.duration_since(self.changed_at).unwrap_or_default();
                (now > *due + LATE + delay / 8).then(|| {
                    format!(
                        "its next attempt was due at {}, and none is recorded: it may still wait, or another daemon may have made it",
                        time(*due)
                    )
                })
            }
            DeliveryState::InFlight => (now > self.changed_at + LONGEST_ATTEMPT)
                .then(|| format!("its attempt of {} has no end in history", time(self.changed_at))),
            _ => None,
        }
    }

    /// The name of the state, as far as it is known.
    pub fn known_state(&self, now: SystemTime) -> &'static str {
        self.doubt(now).map_or(self.state.name(), |_| DeliveryState::UNKNOWN)
    }

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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::delivery::Print;

    fn at(second: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(second)
    }

    fn change(second: u64, change: Change) -> DeliveryChange {
        let subscriber = SubscriberName::try_new("siem").expect("a name");
        DeliveryChange { id: BatchId::from("msg_1"), subscriber, at: at(second), change }
    }

    fn contents() -> Contents {
        Contents {
            format: Some(Format::Json),
            events: 2,
            bytes: 77,
            sha256: None,
            prints: None,
            replay: false,
            parent: None,
        }
    }

    fn started(attempt: u32) -> Change {
        Change::Started { attempt, contents: contents(), by: "host:1".to_owned() }
    }

    fn ended(attempt: u32, status: u16) -> Change {
        let failure = (status >= 300).then_some(FailureKind::Status);
        let end = AttemptEnd { status: Some(status), failure, excerpt: String::new() };
        Change::Ended { attempt, took: Duration::from_millis(5), end }
    }

    /// A delivery after these changes, one a second.
    fn after(changes: impl IntoIterator<Item = Change>) -> Delivery {
        let mut changes = changes.into_iter().zip(10..).map(|(c, second)| change(second, c));
        let mut delivery = Delivery::begin(1, &changes.next().expect("one")).expect("begins");
        changes.for_each(|change| delivery.apply(&change));
        delivery
    }

    #[test]
    fn each_change_makes_the_next_state() {
        let due = at(99);
        let reason = Reason::Exhausted;
        for (changes, state) in [
            (vec![], DeliveryState::InFlight),
            (vec![ended(1, 200)], DeliveryState::InFlight),
            (vec![ended(1, 200), Change::Delivered], DeliveryState::Delivered { at: at(12) }),
            (vec![ended(1, 503), Change::Retrying { due }], DeliveryState::Retrying { due }),
            (vec![Change::Retrying { due }, started(2)], DeliveryState::InFlight),
            (vec![ended(1, 410), Change::Paused], DeliveryState::Paused),
            (vec![ended(1, 413), Change::Split], DeliveryState::Split),
            (vec![Change::Dead { reason, contents: None }], DeliveryState::Dead { reason }),
            (vec![Change::Dead { reason, contents: None }, started(1)], DeliveryState::InFlight),
        ] {
            let count = changes.len() as u64;
            let delivery = after([started(1)].into_iter().chain(changes));
            assert_eq!(delivery.state, state);
            assert_eq!((delivery.begun_at, delivery.changed_at), (at(10), at(10 + count)));
        }
    }

    #[test]
    fn only_a_change_that_has_the_contents_begins_a_delivery() {
        let reason = Reason::InvalidEvent;
        let dead = |contents| change(10, Change::Dead { reason, contents });
        let begun = Delivery::begin(3, &dead(Some(contents()))).expect("begins");
        assert_eq!((begun.row, begun.attempts.len()), (3, 0));
        assert_eq!(begun.state, DeliveryState::Dead { reason });
        for other in [Change::Delivered, Change::Paused, Change::Split, ended(1, 200)] {
            assert_eq!(Delivery::begin(1, &change(10, other)), None);
        }
        assert_eq!(Delivery::begin(1, &dead(None)), None);
    }

    #[test]
    fn an_attempt_ends_once_and_the_latest_of_its_number() {
        let retried = [started(1), ended(1, 503), started(1), ended(1, 200), ended(1, 500)];
        let ends = |d: &Delivery| {
            let end = |a: &DeliveryAttempt| a.end.as_ref().and_then(|(_, end)| end.status);
            d.attempts.iter().map(end).collect::<Vec<_>>()
        };
        assert_eq!(ends(&after(retried)), [Some(503), Some(200)]);
        assert_eq!(ends(&after([started(1), ended(2, 503)])), [None], "it is not known");
    }

    #[test]
    fn the_first_attempt_and_the_latest_are_kept() {
        let delivery = after((1..=250).map(started));
        let numbers: Vec<u32> = delivery.attempts.iter().map(|a| a.number).collect();
        assert_eq!(numbers.len(), MAX_ATTEMPTS);
        assert_eq!((numbers[0], numbers[1], numbers[99]), (1, 152, 250));
    }

    #[test]
    fn later_contents_add_what_was_not_known() {
        let known = Contents {
            sha256: Some([7; 32]),
            prints: Some([Print::of(b"a")].into()),
            replay: true,
            ..contents()
        };
        let again = |contents| Change::Started { attempt: 1, contents, by: String::new() };
        let delivery = after([started(1), again(known.clone()), started(2)]);
        assert_eq!(delivery.contents, known);
    }

    #[test]
    fn the_end_of_an_attempt_has_the_begin_of_the_answer() {
        let answer = Failure::Status { status: 503, excerpt: "é".repeat(600) };
        let end = AttemptEnd::of(&Outcome::Retry { failure: answer, retry_after: None });
        let end = end.expect("it was sent");
        assert_eq!((end.status, end.excerpt.len()), (Some(503), MAX_EXCERPT));
        assert_eq!(AttemptEnd::of(&Outcome::Unsent { why: "no sockets".to_owned() }), None);
        let accepted = AttemptEnd::of(&Outcome::Delivered { status: 204 }).expect("it was sent");
        assert_eq!((accepted.status, accepted.failure), (Some(204), None));
    }

    #[test]
    fn a_state_has_one_of_the_names() {
        let (at, due, reason) = (at(1), at(2), Reason::Refused);
        let states = [
            DeliveryState::InFlight,
            DeliveryState::Retrying { due },
            DeliveryState::Delivered { at },
            DeliveryState::Dead { reason },
            DeliveryState::Paused,
            DeliveryState::Split,
            DeliveryState::Interrupted,
        ];
        assert_eq!(states.map(|s| s.name()), DeliveryState::NAMES);
    }
}

//! Events as history has them, and what an answer says of what it lacks.

use std::{collections::BTreeMap, fmt, time::SystemTime};

use bytes::Bytes;

use crate::{
    delivery::SubscriberName,
    event::{Tenant, audience::Interest},
};

/// The number of an event in history. Numbers grow; a message id is an attribute that several
/// events may share.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EventNumber(pub i64);

impl fmt::Display for EventNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// An event on its way into history, or in the log of the embedded queue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewRow {
    /// `None` if the store is to number it.
    pub number: Option<EventNumber>,
    /// Its AMQP timestamp, if that is sane; otherwise when hooktrail first saw it.
    pub at: SystemTime,
    pub event_type: String,
    pub message_id: Option<String>,
    pub body: Bytes,
    /// The queue delivered it once before, or more often.
    pub redelivered: bool,
    pub tenant: Option<Tenant>,
}

/// An event of history.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EventRow {
    pub number: EventNumber,
    pub at: SystemTime,
    pub event_type: String,
    pub message_id: Option<String>,
    /// The published bytes; `None` if history keeps fields alone.
    pub body: Option<Bytes>,
    /// The number of published bytes.
    pub bytes: u64,
    /// The SHA-256 of the published bytes.
    pub sha256: [u8; 32],
    pub details: crate::event::details::Details,
    /// Known of events that the embedded queue has.
    pub tenant: Option<Tenant>,
}

impl EventRow {
    /// The message id; an event without one has `sha256-` and the SHA-256 of its bytes.
    pub fn id(&self) -> String {
        self.message_id.clone().unwrap_or_else(|| {
            let digits = self.sha256.iter().map(|byte| format!("{byte:02x}"));
            format!("sha256-{}", digits.collect::<String>())
        })
    }

    /// Whether an id is this event's: its message id, or `sha256-` with the digest of its bytes in
    /// hexadecimal digits.
    pub fn has_id(&self, id: &str) -> bool {
        let is_digest = |digits: &str| {
            digits.len() == 2 * self.sha256.len()
                && self.sha256.iter().enumerate().all(|(n, byte)| {
                    digits.get(2 * n..2 * n + 2).is_some_and(|d| d == format!("{byte:02x}"))
                })
        };
        self.message_id.as_deref() == Some(id) || id.strip_prefix("sha256-").is_some_and(is_digest)
    }
}

/// What became of appended events.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Appended {
    pub events: usize,
    /// Redeliveries of events that were there.
    pub repeats: usize,
    /// The number of the last row.
    pub last: Option<EventNumber>,
}

/// A part of a list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page<T> {
    pub rows: Vec<T>,
    /// The list goes on before this row; `None` at its end.
    pub next: Option<i64>,
    /// The time was over when the search had come this far back.
    pub searched_back_to: Option<SystemTime>,
}

/// How many events each of some hours has, the first hour first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EventCounts {
    pub hours: Vec<u64>,
    /// The time, from and until, of which not all events are counted.
    pub uncounted: Option<(SystemTime, SystemTime)>,
}

/// How many events each type has.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TypeCounts {
    pub types: BTreeMap<String, u64>,
    /// Events of further types: producers choose them, and no more than [`MAX_TYPES`](Self::MAX_TYPES)
    /// are told apart.
    pub others: u64,
    /// Events from before this time are not counted: the time for it was over.
    pub counted_back_to: Option<SystemTime>,
}

impl TypeCounts {
    /// The most types that are told apart.
    pub const MAX_TYPES: usize = 1000;

    pub(super) fn add(&mut self, event_type: &str) {
        if let Some(count) = self.types.get_mut(event_type) {
            *count += 1;
        } else if self.types.len() < Self::MAX_TYPES {
            self.types.insert(event_type.to_owned(), 1);
        } else {
            self.others += 1;
        }
    }
}

/// A time of which history may lack something.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gap {
    pub from: SystemTime,
    pub until: SystemTime,
    /// `events` or `deliveries`.
    pub what: &'static str,
    pub why: String,
    /// How many are missing, where that is known.
    pub missing: Option<u64>,
}

/// How far history reaches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reach {
    /// The oldest event that an answer can have; `None` if there is none.
    pub events_from: Option<SystemTime>,
    pub deliveries_from: Option<SystemTime>,
    /// Why it begins there, in words for a reader.
    pub why: String,
    /// The last event that was ever added to history, with its time; of one that was removed the
    /// latest that it can have.
    pub last: Option<(EventNumber, SystemTime)>,
    /// Oldest first.
    pub gaps: Vec<Gap>,
    /// Bytes on the disk.
    pub bytes: u64,
    pub events: u64,
    pub deliveries: u64,
}

impl Reach {
    /// Until when it is known which events history has: the time of the last one, or, of history
    /// that began again and has none yet, the end of the gap that says so. `None` if nothing was
    /// ever there to be lacked.
    pub fn known_until(&self) -> Option<SystemTime> {
        let gaps = || self.gaps.iter().filter(|gap| gap.what == "events").map(|gap| gap.until);
        self.last.map(|(_, at)| at).or_else(|| gaps().max())
    }
}

/// The patterns of a subscriber for a time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subscription {
    pub subscriber: SubscriberName,
    pub interest: Interest,
    pub from: SystemTime,
    /// `None` if they hold today.
    pub until: Option<SystemTime>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn what_history_lacks_is_known_until_its_last_event_or_the_gap_with_which_it_began_again() {
        let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        let gap = |what, until| Gap {
            from: at(1),
            until: at(until),
            what,
            why: "it began again".to_owned(),
            missing: None,
        };
        let reach = |last: Option<u64>, gaps: Vec<Gap>| Reach {
            events_from: None,
            deliveries_from: None,
            why: String::new(),
            last: last.map(|seconds| (EventNumber(1), at(seconds))),
            gaps,
            bytes: 0,
            events: 0,
            deliveries: 0,
        };
        assert_eq!(reach(None, vec![]).known_until(), None);
        assert_eq!(reach(None, vec![gap("deliveries", 9)]).known_until(), None);
        let both = vec![gap("events", 5), gap("events", 4), gap("deliveries", 9)];
        assert_eq!(reach(None, both.clone()).known_until(), Some(at(5)));
        assert_eq!(reach(Some(3), both).known_until(), Some(at(3)));
    }
}

//! The batch: the events of one request body, and everything that makes a retry the same request.

use std::{fmt, time::SystemTime};

use bytes::Bytes;
use sha2::{Digest as _, Sha256};

use super::{
    attempt_log::AttemptLog,
    print::{Print, Prints},
};
use crate::{clock, event::payload::Format};

/// The id of a batch, which receivers get as `webhook-id`: `msg_` and 32 hexadecimal digits. The id
/// of a part is the whole batch's id, `_`, and a 0 or 1 for each split, such as `msg_…_01`; so the
/// same part always has the same id.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BatchId(String);

impl BatchId {
    /// A new id with 128 random bits. It has no dot, which Standard Webhooks uses as a separator.
    pub fn random() -> Self {
        Self(clock::batch_id())
    }

    /// The id of the first attempt of these events of a log in this `form`, each with its number
    /// there, its time and its print: who sends the same ones again, after a crash, sends them under the same id.
    /// The times and prints keep the ids of a log that was restored or begun anew apart from those
    /// before.
    pub fn of_events(
        subscriber: &str,
        form: &str,
        events: impl IntoIterator<Item = (u64, Option<SystemTime>, Print)>,
    ) -> Self {
        let mut hash = Sha256::new();
        for text in [subscriber, form] {
            hash.update((text.len() as u64).to_be_bytes());
            hash.update(text);
        }
        for (number, at, print) in events {
            let since = at.and_then(|at| at.duration_since(SystemTime::UNIX_EPOCH).ok());
            hash.update(number.to_be_bytes());
            hash.update(since.unwrap_or_default().as_nanos().to_be_bytes());
            hash.update(print.as_bytes());
        }
        let digest: [u8; 32] = hash.finalize().into();
        let (half, _) = digest.split_at(16);
        Self(half.iter().fold("msg_".to_owned(), |id, byte| id + &format!("{byte:02x}")))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether this is the id of a part.
    pub fn is_half(&self) -> bool {
        let is_path = |path: &str| path.bytes().all(|b| matches!(b, b'0' | b'1'));
        self.0.rsplit_once('_').is_some_and(|(parent, path)| parent.contains('_') && is_path(path))
    }

    /// The id of the batch that this is a half of; `None` if it is whole.
    #[must_use]
    pub fn parent(&self) -> Option<Self> {
        let is_half = Some(&self.0).filter(|_| self.is_half());
        let shorter = is_half.map(|id| &id[..id.len() - 1]);
        shorter.map(|id| Self(id.strip_suffix('_').unwrap_or(id).to_owned()))
    }

    /// How many events there may be in the whole batch before this part, if it has `events`: its
    /// halves were made of more than one, and the first of two has the larger half.
    pub fn places(&self, events: usize) -> Vec<usize> {
        let path = self.0.rsplit_once('_').filter(|_| self.is_half()).map_or("", |(_, path)| path);
        let place = |whole: usize| {
            path.bytes().try_fold((0, whole), |(before, length), digit| {
                let first = length.div_ceil(2);
                match digit {
                    _ if length < 2 => None,
                    b'0' => Some((before, first)),
                    _ => Some((before + first, length - first)),
                }
            })
        };
        // Each split at most doubles it, and one more event for each that was odd.
        let most = (events + 1).saturating_mul(1 << path.len().min(16)).min(LARGEST.max(events));
        let mut places: Vec<usize> = (events..=most)
            .filter_map(|whole| place(whole).filter(|(_, length)| *length == events))
            .map(|(before, _)| before)
            .collect();
        places.dedup();
        places
    }

    /// The ids of the two parts.
    #[must_use]
    pub fn halves(&self) -> [Self; 2] {
        let separator = if self.is_half() { "" } else { "_" };
        ['0', '1'].map(|digit| Self(format!("{}{separator}{digit}", self.0)))
    }
}

impl fmt::Display for BatchId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// An id that was stored with its batch.
impl From<String> for BatchId {
    fn from(id: String) -> Self {
        Self(id)
    }
}

impl From<&str> for BatchId {
    fn from(id: &str) -> Self {
        Self(id.to_owned())
    }
}

/// The most events of a batch.
const LARGEST: usize = 65_535;

/// A batch. Its bytes and its id never change; a queue stores it as one message, the envelope.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    pub id: BatchId,
    /// The exact request body.
    pub body: Bytes,
    pub format: Format,
    pub events: u32,
    /// The number of attempts begun; 0 after a replay.
    pub attempts: u32,
    /// The time when the first attempt began; `None` before it.
    pub first_attempt_at: Option<SystemTime>,
    /// The W3C Trace Context of the first event's producer.
    pub traceparent: Option<String>,
    pub attempt_log: AttemptLog,
    pub prints: Prints,
    /// Whether an operator replayed it: it was a dead letter before.
    pub replay: bool,
}

impl Batch {
    /// Splits the batch into two parts without attempts; their time runs from the whole batch's
    /// first attempt. `None` for a single event.
    pub fn halves(&self) -> Option<Vec<Self>> {
        let entries = self.format.entries(&self.body).filter(|entries| entries.len() > 1)?;
        let (first, second) = entries.split_at(entries.len().div_ceil(2));
        let prints = Print::split(&self.prints, first.len(), entries.len());
        let half = |id: BatchId, entries: &[&[u8]], prints: Prints| Self {
            id,
            body: self
                .format
                .splice(entries.iter().copied(), entries.iter().map(|e| e.len()).sum())
                .into(),
            events: u32::try_from(entries.len()).unwrap_or(u32::MAX),
            attempts: 0,
            prints,
            ..self.clone()
        };
        let [first_id, second_id] = self.id.halves();
        let [first_prints, second_prints] = prints;
        Some(vec![half(first_id, first, first_prints), half(second_id, second, second_prints)])
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn each_half_has_the_prints_of_its_events_unless_the_body_has_another_number_of_them() {
        let events = [&br#"{"event":"a"}"#[..], br#"{"event":"b"}"#, br#"{"event":"c"}"#];
        let prints: Vec<Print> = events.iter().map(|e| Print::of(e)).collect();
        for format in [Format::Json, Format::JsonLines, Format::JsonArray] {
            let whole = Batch {
                id: BatchId::from("msg_1"),
                body: format.splice(events.into_iter(), 39).into(),
                format,
                events: 3,
                attempts: 2,
                first_attempt_at: None,
                traceparent: None,
                attempt_log: AttemptLog::default(),
                prints: Some(prints.clone().into()),
                replay: false,
            };
            let halves = |batch: &Batch| -> Vec<Prints> {
                batch.halves().expect("three events").into_iter().map(|half| half.prints).collect()
            };
            assert_eq!(halves(&whole), [Some(prints[..2].into()), Some(prints[2..].into())]);
            let others = Batch { prints: Some(prints[..2].into()), ..whole };
            assert_eq!(halves(&others), [None, None]);
        }
    }

    #[test]
    fn the_same_events_of_a_log_have_the_same_id_and_others_another() {
        let at = |millis| Some(SystemTime::UNIX_EPOCH + Duration::from_millis(millis));
        let events = [(7, at(1), Print::of(b"a")), (9, at(1), Print::of(b"b"))];
        let id = |events: &[_]| BatchId::of_events("s", "f", events.iter().copied());
        let of_these = id(&events);
        assert_eq!(id(&events), of_these);
        assert_eq!(of_these.as_str().len(), BatchId::random().as_str().len());
        assert!(of_these.as_str().starts_with("msg_") && !of_these.is_half());
        let [first, second] = events;
        for others in [
            vec![first],
            vec![second, first],
            vec![first, second, second],
            vec![(8, at(1), Print::of(b"a")), second],
            vec![(7, at(2), Print::of(b"a")), second],
            vec![(7, None, Print::of(b"a")), second],
            vec![(7, at(1), Print::of(b"x")), second],
        ] {
            assert_ne!(id(&others), of_these, "{others:?}");
        }
        for (subscriber, form) in [("t", "f"), ("s", "g"), ("sf", "")] {
            assert_ne!(BatchId::of_events(subscriber, form, events), of_these);
        }
    }

    #[test]
    fn the_places_of_a_part_are_those_that_its_number_of_events_allows() {
        let places = |id: &str, events| BatchId::from(id).places(events);
        assert_eq!((places("msg_1", 5), places("msg_1_0", 5)), (vec![0], vec![0]));
        assert_eq!(places("msg_1_1", 5), [5, 6]);
        assert_eq!(places("msg_1_01", 1), [1, 2]);
        for whole in 1..40 {
            let mut parts = vec![(BatchId::from("msg_1"), 0, whole)];
            while let Some((id, before, length)) = parts.pop() {
                assert!(id.places(length).contains(&before), "{id} of {whole}");
                if length > 1 {
                    let ([a, b], first) = (id.halves(), usize::div_ceil(length, 2));
                    parts.push((a, before, first));
                    parts.push((b, before + first, length - first));
                }
            }
        }
    }

    #[test]
    fn the_id_of_a_half_is_always_the_same_and_is_known_as_one() {
        let whole = BatchId::from("msg_0123");
        assert!(!whole.is_half());
        let [first, second] = whole.halves();
        assert_eq!((first.as_str(), second.as_str()), ("msg_0123_0", "msg_0123_1"));
        assert!(first.is_half() && second.is_half());
        assert_eq!(second.halves().map(|id| id.to_string()), ["msg_0123_10", "msg_0123_11"]);
        for id in [&whole, &first, &second] {
            assert_eq!(id.halves().map(|half| half.parent()), [Some(id.clone()), Some(id.clone())]);
        }
        assert_eq!(whole.parent(), None);
        assert!(!BatchId::random().is_half() && !BatchId::from("0_1").is_half());
    }
}

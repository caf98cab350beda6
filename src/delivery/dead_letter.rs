//! Dead letters: what could not be delivered, and why.

use std::time::{Duration, SystemTime};

use bytes::Bytes;

use super::{
    attempt_log::AttemptLog,
    batch::{Batch, BatchId},
    outcome::Failure,
    print::{Print, Prints},
};
use crate::event::payload::Format;

/// The content of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum MessageKind {
    Event,
    Batch,
}

impl MessageKind {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Event => "event",
            Self::Batch => "batch",
        }
    }
}

/// The reason why something became a dead letter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reason {
    Exhausted,
    /// The receiver refuses it, and accepts other batches.
    Refused,
    InvalidEvent,
    TooLarge,
    /// By the broker itself: any other limit of a policy.
    DeliveryLimit,
    /// By the broker itself: the time to live passed, of a policy or of the producer's `expiration`.
    /// Also an orphan that was not a dead letter.
    Expired,
}

impl Reason {
    pub const ALL: [Self; 6] = [
        Self::Exhausted,
        Self::Refused,
        Self::InvalidEvent,
        Self::TooLarge,
        Self::DeliveryLimit,
        Self::Expired,
    ];

    /// The reasons of hooktrail's own dead letters, which it counts; it does not see those of the
    /// broker.
    pub const OWN: [Self; 4] = [Self::Exhausted, Self::Refused, Self::InvalidEvent, Self::TooLarge];

    pub const fn name(self) -> &'static str {
        match self {
            Self::Exhausted => "exhausted",
            Self::Refused => "refused",
            Self::InvalidEvent => "invalid_event",
            Self::TooLarge => "too_large",
            Self::DeliveryLimit => "delivery_limit",
            Self::Expired => "expired",
        }
    }

    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|r| r.name() == name)
    }
}

/// A batch or an event that was given up, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeadLetter {
    pub kind: MessageKind,
    pub reason: Reason,
    /// The exact request body of a batch, or the event as it was published.
    pub body: Bytes,
    pub content_type: Option<String>,
    /// The encoding of an event that is stored as its producer encoded it, as the producer named
    /// it.
    pub content_encoding: Option<String>,
    /// The batch's id, or the producer's message id of an event.
    pub id: Option<String>,
    pub events: u32,
    pub attempts: u32,
    /// The status of the last answer.
    pub status: Option<u16>,
    /// A text for operators, cut to [`MAX_ERROR_LEN`].
    pub error: String,
    pub first_attempt_at: Option<SystemTime>,
    pub died_at: Option<SystemTime>,
    pub attempt_log: AttemptLog,
    pub prints: Prints,
}

impl DeadLetter {
    /// The dead letter of a batch after an attempt. `shortened_from` is a `Retry-After` of the
    /// receiver that the schedule did not grant.
    pub fn of_batch(
        batch: Batch,
        reason: Reason,
        failure: &Failure,
        shortened_from: Option<Duration>,
        now: SystemTime,
    ) -> Self {
        let note = shortened_from.map(|wish| {
            format!("; its Retry-After of {} s ends after retry.max_elapsed_time", wish.as_secs())
        });
        let note = note.unwrap_or_default();
        let text = failure.to_string();
        Self {
            kind: MessageKind::Batch,
            reason,
            content_type: Some(batch.format.label().to_owned()),
            content_encoding: None,
            id: Some(batch.id.to_string()),
            body: batch.body,
            events: batch.events,
            attempts: batch.attempts,
            status: failure.status(),
            error: format!(
                "{}{note}",
                &text[..text.floor_char_boundary(MAX_ERROR_LEN - note.len())]
            ),
            first_attempt_at: batch.first_attempt_at,
            died_at: Some(now),
            attempt_log: batch.attempt_log,
            prints: batch.prints,
        }
    }

    /// The dead letter of an event without an attempt. `id` is its producer's message id. An event
    /// that could not be decoded has the print of its encoded bytes.
    pub fn of_event(
        body: Bytes,
        content_type: Option<String>,
        id: Option<String>,
        reason: Reason,
        error: String,
        now: SystemTime,
    ) -> Self {
        Self {
            kind: MessageKind::Event,
            reason,
            prints: Some([Print::of(&body)].into()),
            body,
            content_type: Some(content_type.unwrap_or_else(|| "application/json".to_owned())),
            content_encoding: None,
            id,
            events: 1,
            attempts: 0,
            status: None,
            error,
            first_attempt_at: None,
            died_at: Some(now),
            attempt_log: AttemptLog::default(),
        }
    }

    /// The dead letter of a message in a retry queue that is no batch.
    pub fn not_a_batch(
        body: Bytes,
        content_type: Option<String>,
        id: Option<String>,
        error: String,
        now: SystemTime,
    ) -> Self {
        let event = Self::of_event(body, None, id, Reason::InvalidEvent, error, now);
        let (kind, prints) = (MessageKind::Batch, None);
        Self { kind, content_type, events: 0, prints, ..event }
    }

    /// The format of a batch's body, by its content type.
    pub fn format(&self) -> Option<Format> {
        Format::labelled(self.content_type.as_deref()?)
    }

    /// The batch to replay: with its id, attempts and elapsed time counted from zero, and marked as
    /// a replay.
    pub(crate) fn to_batch(&self) -> Batch {
        Batch {
            id: self.id.clone().map_or_else(BatchId::random, BatchId::from),
            body: self.body.clone(),
            format: self.format().unwrap_or(Format::Json),
            events: self.events,
            attempts: 0,
            first_attempt_at: None,
            traceparent: None,
            attempt_log: self.attempt_log.clone(),
            prints: self.prints.clone(),
            replay: true,
        }
    }
}

/// The longest error of a dead letter, in bytes.
pub const MAX_ERROR_LEN: usize = 1024;

/// Cuts a text to [`MAX_ERROR_LEN`] between two characters.
pub fn cut_error(text: &str) -> &str {
    &text[..text.floor_char_boundary(MAX_ERROR_LEN)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_cut_at_a_character() {
        let text = "é".repeat(600);
        assert_eq!(cut_error(&text).len(), 1024);
        assert_eq!(cut_error(&text[..1000]).len(), 1000);
        assert_eq!(cut_error(&format!("x{text}")).len(), 1023);
    }

    #[test]
    fn a_reason_has_one_name() {
        for r in Reason::ALL {
            assert_eq!(Reason::from_name(r.name()), Some(r));
        }
    }
}

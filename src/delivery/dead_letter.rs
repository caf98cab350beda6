//! What could not be delivered, and why.

use std::time::{Duration, SystemTime};

use bytes::Bytes;

use super::{
    attempt_log::AttemptLog,
    batch::{Batch, BatchId},
    outcome::Failure,
};
use crate::event::payload::Format;

/// What a message holds.
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

/// Why something was given up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reason {
    Exhausted,
    /// The receiver does not accept it, and accepts others.
    Refused,
    InvalidEvent,
    TooLarge,
    /// The broker's own doing: more deliveries than a policy allows.
    DeliveryLimit,
    /// The broker's own doing: a policy's time to live.
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

    /// Those of hooktrail's own, which it counts; it does not see what the broker gives up.
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

/// A batch or an event that could not be delivered, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeadLetter {
    pub kind: MessageKind,
    pub reason: Reason,
    /// The exact request body of a batch, or the event as it was published.
    pub body: Bytes,
    pub content_type: Option<String>,
    /// Of an event that is still as its producer encoded it, in the producer's words.
    pub content_encoding: Option<String>,
    /// The batch's id, or the producer's message id of an event.
    pub id: Option<String>,
    pub events: u32,
    pub attempts: u32,
    /// The last answer's.
    pub status: Option<u16>,
    /// For an operator to read; cut to [`MAX_ERROR_LEN`].
    pub error: String,
    pub first_attempt_at: Option<SystemTime>,
    pub died_at: Option<SystemTime>,
    pub story: AttemptLog,
}

impl DeadLetter {
    /// A batch that is given up after an attempt. `shortened`: the receiver asked for this wait,
    /// which the schedule did not grant.
    pub fn of_batch(
        batch: Batch,
        reason: Reason,
        failure: &Failure,
        shortened: Option<Duration>,
        now: SystemTime,
    ) -> Self {
        let note = shortened.map(|wish| {
            format!("; its Retry-After of {} s ends after retry.max_elapsed_time", wish.as_secs())
        });
        let note = note.unwrap_or_default();
        let text = failure.to_string();
        Self {
            kind: MessageKind::Batch,
            reason,
            content_type: Some(batch.format.content_type().to_owned()),
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
            story: batch.story,
        }
    }

    /// An event that is given up without an attempt. `id` is its producer's message id.
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
            story: AttemptLog::default(),
        }
    }

    /// A message among the retries that is no batch.
    pub fn not_a_batch(
        body: Bytes,
        content_type: Option<String>,
        id: Option<String>,
        error: String,
        now: SystemTime,
    ) -> Self {
        let event = Self::of_event(body, None, id, Reason::InvalidEvent, error, now);
        Self { kind: MessageKind::Batch, content_type, events: 0, ..event }
    }

    /// How the events stand in the body of a batch, if its content type says so.
    pub fn format(&self) -> Option<Format> {
        [Format::Json, Format::JsonLines]
            .into_iter()
            .find(|f| self.content_type.as_deref() == Some(f.content_type()))
    }

    /// The batch to replay: with its id, its attempts and elapsed time counted from zero, and
    /// marked as a replay.
    pub(crate) fn to_batch(&self) -> Batch {
        Batch {
            id: self.id.clone().map_or_else(BatchId::random, BatchId::from),
            body: self.body.clone(),
            format: self.format().unwrap_or(Format::Json),
            events: self.events,
            attempts: 0,
            first_attempt_at: None,
            traceparent: None,
            story: self.story.clone(),
            replay: true,
        }
    }
}

/// The longest error that a dead letter carries, in bytes.
pub const MAX_ERROR_LEN: usize = 1024;

/// Cuts a text to [`MAX_ERROR_LEN`] at a character's border.
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

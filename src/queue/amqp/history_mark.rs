//! Marks in the queue of history: that one was taken shows that everything before it was.
//!
//! A new subscriber may want what was published before it was bound. Those events have reached the
//! queue of history a moment after it was bound, and a mark is put behind them. The number of ready
//! messages would not show it: they may be on their way to a consumer, or unacked at one whose
//! connection is half gone.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use bytes::Bytes;
use lapin::{BasicProperties, message::Delivery, types::ShortString};

use super::message::Message;

/// Time in which an event that the exchange has routed reaches its queues.
const ROUTED: Duration = Duration::from_secs(2);

/// Time after which a mark that was not taken is sent again: the queue was deleted, or has dropped
/// it at its limit.
const LOST: Duration = Duration::from_secs(60);

/// The AMQP property `type` of a mark.
const KIND: &str = "hooktrail.mark";

/// The marks of this process.
#[derive(Debug, Default)]
pub(super) struct Marks(Mutex<Sent>);

#[derive(Debug, Default)]
struct Sent {
    /// The last one, and when it was sent.
    last: Option<(String, Instant)>,
    /// When the last one that was taken, with all before it, had been sent.
    passed: Option<Instant>,
}

/// What follows for a subscriber.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Marked {
    /// Everything from before it was bound is in the store.
    Passed,
    /// A mark with the given id is to be sent now.
    Send,
    Waits,
}

impl Marks {
    fn sent(&self) -> MutexGuard<'_, Sent> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `bound`: since when the subscriber gets its events itself; `id`: that of the next mark.
    pub(super) fn check(&self, bound: Instant, now: Instant, id: &str) -> Marked {
        let mut sent = self.sent();
        let from = bound + ROUTED;
        if sent.passed.is_some_and(|passed| passed >= from) {
            return Marked::Passed;
        }
        let is_on_its_way =
            sent.last.as_ref().is_some_and(|(_, at)| *at >= from && now < *at + LOST);
        if now < from || is_on_its_way {
            return Marked::Waits;
        }
        sent.last = Some((id.to_owned(), now));
        Marked::Send
    }

    /// The mark was not sent.
    pub(super) fn unsent(&self, id: &str) {
        self.sent().last.take_if(|(last, _)| last == id);
    }

    /// When the mark with this id was sent; `None` if another one was sent since.
    pub(super) fn sent_at(&self, id: &str) -> Option<Instant> {
        self.sent().last.as_ref().filter(|(last, _)| last == id).map(|(_, at)| *at)
    }

    /// Everything that was in the queue before the mark of this moment is in the store.
    pub(super) fn passed(&self, at: Instant) {
        let mut sent = self.sent();
        sent.passed = sent.passed.max(Some(at));
    }
}

/// A mark for the queue of history.
pub(super) fn message(queue: String, id: &str) -> Message {
    let properties = BasicProperties::default().with_delivery_mode(2).with_type(KIND.into());
    Message::to_queue(queue, Bytes::new(), properties.with_message_id(id.into()))
}

/// The id of a mark; `None` of an event, which no client can make look like one through an exchange
/// of events.
pub(super) fn id_of(delivery: &Delivery) -> Option<&str> {
    let properties = &delivery.properties;
    let is_mark = delivery.exchange.as_str().is_empty()
        && properties.kind().as_ref().is_some_and(|kind| kind.as_str() == KIND);
    if !is_mark {
        return None;
    }
    Some(properties.message_id().as_ref().map_or("", ShortString::as_str))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock;

    #[test]
    fn history_is_past_a_binding_when_a_mark_was_taken_that_was_sent_later() {
        let marks = Marks::default();
        let bound = clock::instant();
        let after = |seconds| bound + Duration::from_secs(seconds);
        assert_eq!(marks.check(bound, after(1), "m-1"), Marked::Waits, "some may be on their way");
        assert_eq!(marks.check(bound, after(2), "m-1"), Marked::Send);
        assert_eq!(marks.check(bound, after(3), "m-2"), Marked::Waits, "it is not taken yet");
        assert_eq!((marks.sent_at("m-1"), marks.sent_at("m-2")), (Some(after(2)), None));
        marks.passed(after(2));
        assert_eq!(marks.check(bound, after(3), "m-2"), Marked::Passed);
        assert_eq!(marks.check(after(1), after(4), "m-2"), Marked::Send, "bound later");
        assert_eq!(marks.check(after(1), after(63), "m-3"), Marked::Waits);
        assert_eq!(marks.check(after(1), after(64), "m-3"), Marked::Send, "m-2 is lost");
        assert_eq!(marks.sent_at("m-2"), None);
        marks.unsent("m-3");
        assert_eq!(marks.check(after(1), after(65), "m-4"), Marked::Send);
        marks.passed(after(2));
        assert_eq!(marks.check(bound, after(66), "m-5"), Marked::Passed);
    }
}

//! Marks in the queue of history: that one was taken shows that everything before it was.
//!
//! A new subscriber may want what was published before it was bound. Those events have reached the
//! queue of history a moment after it was bound, and a mark is put behind them. The number of ready
//! messages would not show it: they may be on their way to a consumer, or unacked at one whose
//! connection is half gone.

use std::{
    collections::VecDeque,
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

/// Marks on their way that are known. A mark is sent every [`LOST`] while history is far behind.
const MAX_MARKS: usize = 16;

/// The AMQP property `type` of a mark.
const KIND: &str = "hooktrail.mark";

/// The marks of this process.
#[derive(Debug, Default)]
pub(super) struct Marks(Mutex<Sent>);

#[derive(Debug, Default)]
struct Sent {
    /// Those that were not taken yet, and when they were sent; the oldest first.
    on_their_way: VecDeque<(String, Instant)>,
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
        let is_on_its_way = sent.on_their_way.iter().any(|(_, at)| *at >= from && now < *at + LOST);
        if now < from || is_on_its_way {
            return Marked::Waits;
        }
        // The oldest are taken first: were they given up for later ones, a history that is far behind
        // would never come to one.
        sent.on_their_way.truncate(MAX_MARKS - 1);
        sent.on_their_way.push_back((id.to_owned(), now));
        Marked::Send
    }

    /// The mark was not sent.
    pub(super) fn unsent(&self, id: &str) {
        self.sent().on_their_way.retain(|(sent, _)| sent != id);
    }

    /// The mark with this id was taken. Returns when it was sent: everything before it was taken too.
    ///
    /// One that was redelivered proves nothing, and is forgotten: a channel that is closed gives
    /// messages back in any order, so that events from before the mark may come after it.
    pub(super) fn taken(&self, id: &str, is_redelivered: bool) -> Option<Instant> {
        if is_redelivered {
            self.unsent(id);
        }
        self.sent().on_their_way.iter().find(|(sent, _)| sent == id).map(|(_, at)| *at)
    }

    /// Everything that was in the queue before the mark of this moment is in the store.
    pub(super) fn passed(&self, at: Instant) {
        let mut sent = self.sent();
        sent.passed = sent.passed.max(Some(at));
        // Those that were sent before are taken, or lost.
        sent.on_their_way.retain(|(_, sent)| *sent > at);
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

    /// Moments after one at which a subscriber is bound.
    fn bound() -> (Instant, impl Fn(u64) -> Instant) {
        let bound = clock::instant();
        (bound, move |seconds| bound + Duration::from_secs(seconds))
    }

    #[test]
    fn history_is_past_a_binding_when_a_mark_was_taken_that_was_sent_later() {
        let (marks, (bound, after)) = (Marks::default(), bound());
        assert_eq!(marks.check(bound, after(1), "m-1"), Marked::Waits, "some may be on their way");
        assert_eq!(marks.check(bound, after(2), "m-1"), Marked::Send);
        assert_eq!(marks.check(bound, after(3), "m-2"), Marked::Waits, "it is not taken yet");
        assert_eq!((marks.taken("m-1", false), marks.taken("m-2", false)), (Some(after(2)), None));
        marks.passed(after(2));
        assert_eq!(marks.check(bound, after(3), "m-2"), Marked::Passed);
        assert_eq!(marks.check(after(1), after(4), "m-2"), Marked::Send, "bound later");
        assert_eq!(marks.check(after(1), after(63), "m-3"), Marked::Waits);
        assert_eq!(marks.check(after(1), after(64), "m-3"), Marked::Send, "m-2 may be lost");
        marks.unsent("m-3");
        assert_eq!(marks.check(after(1), after(65), "m-4"), Marked::Send);
        marks.passed(after(2));
        assert_eq!(marks.check(bound, after(66), "m-5"), Marked::Passed);
    }

    #[test]
    fn a_mark_that_is_redelivered_proves_nothing_and_the_next_one_is_sent_at_once() {
        let (marks, (bound, after)) = (Marks::default(), bound());
        assert_eq!(marks.check(bound, after(2), "m-1"), Marked::Send);
        assert_eq!(marks.taken("m-1", true), None);
        assert_eq!(marks.taken("m-1", false), None, "its place is not known any more");
        assert_eq!(marks.check(bound, after(3), "m-2"), Marked::Send);
        assert_eq!(marks.taken("m-2", false), Some(after(3)));
    }

    /// Each mark is more than a minute on its way: it counts although later ones were sent.
    #[test]
    fn a_history_that_is_far_behind_comes_to_an_earlier_mark() {
        let (marks, (bound, after)) = (Marks::default(), bound());
        let ids: Vec<String> = (0..100).map(|n| format!("m-{n}")).collect();
        for (n, id) in (0..).zip(&ids) {
            assert_eq!(marks.check(bound, after(2 + 60 * n), id), Marked::Send);
        }
        assert_eq!(marks.sent().on_their_way.len(), MAX_MARKS);
        assert_eq!(marks.taken("m-99", false), Some(after(2 + 60 * 99)), "nor the last");
        assert_eq!(marks.taken("m-0", false), Some(after(2)));
        marks.passed(after(2));
        assert_eq!(marks.check(bound, after(6000), "m-100"), Marked::Passed);
        assert_eq!(marks.taken("m-0", false), None, "it was taken");
    }
}

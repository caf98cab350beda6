//! What delivery needs of a queue, in hooktrail's words.
//!
//! One implementation for each kind of queue; nothing outside of it knows the queue's protocol.

pub mod amqp;
pub mod embedded;
mod removals;
mod waiting;

use std::{
    collections::BTreeSet,
    fmt,
    future::Future,
    sync::Arc,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use tokio::sync::watch;

pub use self::{
    removals::{Changing, HeldRemovals, Removals, some_of},
    waiting::{Hastened, Waiting, WaitingList},
};
use crate::{
    config::{Subscriber, Subscribers},
    delivery::{
        Batch, BatchId, DeadLetter, Depths, MessageKind, Standing, Standings, SubscriberName,
    },
    telemetry::finding::Finding,
    telemetry::troubles::Troubles,
};

/// The queue as the daemon uses it.
pub trait Queue: Clone + Send + Sync + 'static {
    type Source: Source;
    type Settler: Settler;
    type DeadLetters: DeadLetters;

    /// Makes ready what the subscribers need, at the start and each time that others are
    /// configured; what they need no more stays until [`chores`](Self::chores) sees to it. Waits
    /// for the queue without end. What only one subscriber needs is a concern of
    /// [`open`](Self::open): returns the names of those who do not have it yet.
    ///
    /// # Errors
    /// What there is cannot be used and will not change by itself.
    fn prepare(
        &self,
        subscribers: &[Arc<Subscriber>],
    ) -> impl Future<Output = Result<BTreeSet<SubscriberName>, QueueError>> + Send;

    /// What is to be done beside the lanes, such as taking away what only earlier configurations
    /// needed. Ends soon after `stopping` became true, with nothing half done that would be done
    /// twice.
    fn chores(
        &self,
        subscribers: watch::Receiver<Subscribers>,
        stopping: watch::Receiver<bool>,
    ) -> impl Future<Output = ()> + Send;

    /// Says goodbye, when the lanes have ended.
    fn close(&self) -> impl Future<Output = ()> + Send;

    /// Begins to take from a subscriber's queue. What was taken before and not settled comes again.
    fn open(
        &self,
        subscriber: &Subscriber,
        window: Window,
    ) -> impl Future<Output = Result<(Self::Source, Self::Settler), QueueError>> + Send;

    /// Waits until retries and dead letters can be written again.
    fn writable(&self) -> impl Future<Output = ()> + Send;

    /// Makes ready what is missing for events to wait for a daemon that has not run yet. Changes
    /// nothing that is there.
    ///
    /// # Errors
    /// The queue refuses, and why.
    fn ensure(
        &self,
        subscribers: &[Arc<Subscriber>],
    ) -> impl Future<Output = Result<(), QueueError>> + Send;

    /// Stores events for all whose patterns match them, and returns when that is durable: what
    /// became of each, in order. At most [`MAX_GROUP`] at once.
    ///
    /// # Errors
    /// It is not known whether they are stored.
    fn publish(
        &self,
        events: Vec<NewEvent>,
    ) -> impl Future<Output = Result<Vec<Published>, QueueError>> + Send;

    /// Whether events could be stored now, as far as is known without asking.
    fn is_reachable(&self) -> bool {
        true
    }

    /// What keeps the queue from its work, as far as it was noticed. One that notices nothing has
    /// none.
    fn troubles(&self) -> watch::Receiver<Troubles> {
        watch::Sender::default().subscribe()
    }

    /// Whether events come faster than they are stored, so that new ones should come later.
    fn is_behind(&self) -> bool {
        false
    }

    /// Who may be unbound because the configuration does not have it any more.
    fn removals(&self) -> &Removals;

    /// Who is paused and who was resumed, as every daemon on the same queues records it; `None`
    /// until that is known.
    fn standings(&self) -> watch::Receiver<Option<Standings>>;

    /// Records that a subscriber is paused or resumed, and returns when that is durable and in
    /// [`standings`](Self::standings).
    ///
    /// # Errors
    /// It is not known whether it was recorded.
    fn record(
        &self,
        subscriber: &SubscriberName,
        standing: Standing,
    ) -> impl Future<Output = Result<(), QueueError>> + Send;

    /// # Errors
    /// Nothing is known of such a subscriber, or the queue cannot be reached.
    fn dead_letters(
        &self,
        subscriber: &str,
    ) -> impl Future<Output = Result<Self::DeadLetters, QueueError>> + Send;

    /// What waits for its next attempt, what is due and not taken yet among it.
    ///
    /// # Errors
    /// Nothing is known of such a subscriber, or the queue cannot be reached; nothing has changed.
    fn waiting(
        &self,
        subscriber: &str,
    ) -> impl Future<Output = Result<WaitingList, QueueError>> + Send;

    /// Makes the next attempt due now, of all that waits or of the batches with these ids. Bytes,
    /// ids and attempts stay as they are; what waits for other subscribers keeps its order and its
    /// time.
    ///
    /// # Errors
    /// Nothing is known of such a subscriber, or the queue was lost. What was not moved by then
    /// still waits as it did; how many were, the error says.
    fn hasten(
        &self,
        subscriber: &str,
        ids: Option<BTreeSet<BatchId>>,
    ) -> impl Future<Output = Result<Hastened, QueueError>> + Send;

    /// How much there is in the queues of these subscribers, and what is left of others.
    ///
    /// # Errors
    /// The queue cannot be asked.
    fn depths(
        &self,
        subscribers: &[Arc<Subscriber>],
    ) -> impl Future<Output = Result<Depths, QueueError>> + Send;

    /// Who gets events, as the queue has it recorded: for commands, which do not know whether a
    /// daemon runs and with which configuration.
    ///
    /// # Errors
    /// The queue cannot be asked.
    fn bound(&self) -> impl Future<Output = Result<BTreeSet<SubscriberName>, QueueError>> + Send;

    /// Deletes what there is of a subscriber that is not configured any more.
    ///
    /// # Errors
    /// Somebody still works with it; or it holds something, unless `with_events` says that this is
    /// to be lost; or the queue cannot be asked.
    fn prune(
        &self,
        subscriber: &SubscriberName,
        with_events: bool,
    ) -> impl Future<Output = Result<(), QueueError>> + Send;

    /// What there is for this configuration and what can go wrong with it, without changing
    /// anything; what could not be looked at is said. In bounded time, but for the time that a
    /// broker takes which answers slowly.
    ///
    /// # Errors
    /// The queue cannot be asked at all.
    fn inspect(
        &self,
        subscribers: &[Arc<Subscriber>],
    ) -> impl Future<Output = Result<Vec<Finding>, QueueError>> + Send;
}

/// An event on its way into the queue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewEvent {
    pub event_type: String,
    pub message_id: Option<String>,
    pub body: Bytes,
    /// The producer's, as W3C Trace Context has it.
    pub traceparent: Option<Arc<str>>,
}

/// W3C Trace Context has 55 characters; what is far longer is something else.
pub const MAX_TRACEPARENT: usize = 256;

/// How many events are best published in one call: they become durable together.
pub const MAX_GROUP: usize = 1000;

/// What the queue says of a published event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Published {
    Stored,
    /// No queue is bound for its type.
    Unmatched,
    Refused,
}

impl Published {
    /// What became of the event; `is_wanted`: a pattern of the configuration matches its type.
    pub const fn arrival(self, is_wanted: bool) -> Arrival {
        match self {
            Self::Refused => Arrival::Refused,
            Self::Unmatched if is_wanted => Arrival::Unbound,
            Self::Stored if is_wanted => Arrival::Stored,
            Self::Stored | Self::Unmatched => Arrival::Unmatched,
        }
    }
}

/// What became of a published event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arrival {
    Stored,
    /// Published, and no subscriber wants it.
    Unmatched,
    /// A subscriber wants it and did not get it: the broker has lost a binding, or has none yet.
    Unbound,
    Refused,
}

/// A walk through dead letters, oldest first. What is neither replayed nor purged keeps its order.
///
/// Takes no memory for what it has passed by, however many there are.
pub trait DeadLetters: Send {
    /// How many there are still to come. Those that die during the walk are not part of it.
    fn left(&self) -> u32;

    /// # Errors
    /// The queue was lost; nothing has gone but what was replayed or purged.
    fn next(&mut self) -> impl Future<Output = Result<Option<Held>, QueueError>> + Send;

    /// Sends letters on their way again: durable first, and only then no dead letters any more.
    /// Returns those whose subscriber has no queue any more: they stay where they are.
    ///
    /// # Errors
    /// Those that are not on their way are still dead letters.
    fn replay(
        &mut self,
        letters: Vec<Held>,
    ) -> impl Future<Output = Result<Vec<Held>, QueueError>> + Send;

    /// Deletes letters for good.
    ///
    /// # Errors
    /// The queue was lost; those that are not deleted are still there.
    fn purge(&mut self, letters: Vec<Held>) -> impl Future<Output = Result<(), QueueError>> + Send;

    /// Gives back what was looked at, in its order.
    ///
    /// # Errors
    /// The queue was lost before it answered; the letters are still there.
    fn close(self) -> impl Future<Output = Result<(), QueueError>> + Send;
}

/// A dead letter of a walk.
#[derive(Debug)]
pub struct Held {
    pub letter: DeadLetter,
    /// Whose it is; of an orphan that is not always known.
    pub subscriber: Option<String>,
    pub(crate) tag: u64,
}

#[cfg(test)]
impl Held {
    /// For a queue that needs no tag.
    pub(crate) fn new(letter: DeadLetter, subscriber: Option<String>) -> Self {
        Self { letter, subscriber, tag: 0 }
    }
}

/// The bytes of events that a lane takes from a broker and has not settled, unless [`FEWEST`] of
/// them are more.
pub const MOST_BYTES: u64 = 64 << 20;

/// So many events are taken whatever their size: the first of a queue, whose sizes nobody knows,
/// and the largest.
pub const FEWEST: u16 = 16;

/// How much may be taken and not yet settled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    pub events: u16,
    pub envelopes: u16,
}

impl Window {
    /// Of a subscriber: for each request in flight its batch and one that fills meanwhile.
    pub fn of(subscriber: &Subscriber) -> Self {
        let slots = subscriber.http.concurrency;
        let clamp = |n: usize| u16::try_from(n).unwrap_or(u16::MAX);
        Self { events: clamp(2 * slots * subscriber.batch.max_events), envelopes: clamp(slots) }
    }

    /// The longest that a message of this window is held before it is settled, if each batch has so
    /// many events and each attempt takes [all the time it may](Subscriber::longest_attempt): its
    /// wait for company, the attempts before its own, and that. Retries that are due come on top.
    pub fn longest_hold(self, subscriber: &Subscriber, events_in_a_batch: usize) -> Duration {
        let at_once = subscriber.http.concurrency * events_in_a_batch.max(1);
        let attempts = usize::from(self.events).div_ceil(at_once).max(1);
        subscriber.batch.max_wait
            + subscriber
                .longest_attempt()
                .saturating_mul(u32::try_from(attempts).unwrap_or(u32::MAX))
    }

    /// With fewer events in each batch than this a message of this window could be held for longer
    /// than `limit`; with as many as a batch may have that is not looked at.
    pub fn fewest_events(self, subscriber: &Subscriber, limit: Duration) -> usize {
        // The more events in a batch, the fewer attempts, so that the hold only falls.
        let (mut few, mut enough) = (0, subscriber.batch.max_events);
        while enough - few > 1 {
            let middle = few + (enough - few) / 2;
            if self.longest_hold(subscriber, middle) > limit {
                few = middle
            } else {
                enough = middle
            }
        }
        enough
    }
}

/// The taking end of a subscriber's queue.
pub trait Source: Send {
    /// Waits for at least one message and appends those that are there, at most about `max`,
    /// envelopes before events. Can be dropped while it waits without losing any.
    ///
    /// # Errors
    /// The queue is gone: whatever was taken from this source comes again from the next.
    fn take(
        &mut self,
        into: &mut Vec<Taken>,
        max: usize,
    ) -> impl Future<Output = Result<(), QueueError>> + Send;

    /// Nothing more is taken before something is settled, although the window would allow it: what
    /// is held is large.
    fn is_full(&self) -> bool {
        false
    }

    /// Gives back what was not settled, to the places it had.
    fn close(self) -> impl Future<Output = ()> + Send;
}

/// The settling end. Clones settle for the same source.
pub trait Settler: Clone + Send + Sync + 'static {
    /// Makes the settlement durable, then takes the messages out of the queue.
    ///
    /// # Errors
    /// The messages are still in the queue and come again.
    fn settle(
        &self,
        receipts: Vec<Receipt>,
        settlement: Settlement,
    ) -> impl Future<Output = Result<(), SettleError>> + Send;
}

/// Stands for a message that was taken, at the source it was taken from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Receipt {
    pub(crate) from: MessageKind,
    pub(crate) tag: u64,
}

/// A message as it was taken.
#[derive(Debug)]
pub enum Taken {
    Event(Event),
    Batch(Batch, Receipt),
    /// A message that is no envelope where one should be, or no event that can be read, as the dead
    /// letter that it becomes.
    Unusable(DeadLetter, Receipt),
    /// What comes again although it was settled: only its ack was lost. To be acked, and not
    /// attempted.
    Known {
        events: u32,
        receipt: Receipt,
    },
}

/// An event as it was published; whether it is a valid one is for the lane to say.
#[derive(Debug)]
pub struct Event {
    pub body: Vec<u8>,
    /// The producer's, if there is one.
    pub message_id: Option<String>,
    pub content_type: Option<String>,
    /// When it was published, where the queue tells that.
    pub published_at: Option<SystemTime>,
    /// The producer's, as W3C Trace Context has it.
    pub traceparent: Option<String>,
    pub receipt: Receipt,
}

/// What became of messages.
#[derive(Debug)]
pub enum Settlement {
    Delivered,
    /// Comes again as envelopes, in their order, not before `delay` from now.
    Retry {
        batches: Vec<Batch>,
        delay: Duration,
    },
    Dead(Vec<DeadLetter>),
}

/// Why a settlement did not happen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SettleError {
    /// The source is gone and its messages with it: forget them, they come again.
    Gone,
    /// The queue did not confirm; nothing may be written for these messages until they come again.
    Unconfirmed(String),
}

impl fmt::Display for SettleError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Gone => f.write_str("the connection to the queue is gone"),
            Self::Unconfirmed(why) => f.write_str(why),
        }
    }
}

impl std::error::Error for SettleError {}

/// Something is wrong with the queue. Names the queue, says what was found and what to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QueueError {
    text: String,
    needs_operator: bool,
    remedy: Option<String>,
}

impl QueueError {
    /// What may pass by itself.
    pub fn new(text: impl Into<String>) -> Self {
        Self { text: text.into(), needs_operator: false, remedy: None }
    }

    /// What stays until somebody changes the queue or the configuration.
    pub fn needs_operator(text: impl Into<String>) -> Self {
        Self { text: text.into(), needs_operator: true, remedy: None }
    }

    /// With what puts it right, a command where there is one.
    #[must_use]
    pub fn remedied(self, remedy: impl Into<String>) -> Self {
        Self { remedy: Some(remedy.into()), ..self }
    }

    /// What is wrong, without the remedy.
    pub fn what(&self) -> &str {
        &self.text
    }

    pub fn remedy(&self) -> Option<&str> {
        self.remedy.as_deref()
    }

    pub fn is_for_operator(&self) -> bool {
        self.needs_operator
    }
}

impl fmt::Display for QueueError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)?;
        self.remedy.as_ref().map_or(Ok(()), |remedy| write!(f, "; {remedy}"))
    }
}

impl std::error::Error for QueueError {}

#[cfg(test)]
pub(crate) mod fake;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_published_event_that_is_wanted_and_reached_no_queue_is_unbound() {
        for (published, is_wanted, arrival) in [
            (Published::Stored, true, Arrival::Stored),
            (Published::Stored, false, Arrival::Unmatched),
            (Published::Unmatched, true, Arrival::Unbound),
            (Published::Unmatched, false, Arrival::Unmatched),
            (Published::Refused, true, Arrival::Refused),
            (Published::Refused, false, Arrival::Refused),
        ] {
            assert_eq!(published.arrival(is_wanted), arrival, "{published:?} {is_wanted}");
        }
    }
}

//! What delivery needs of a queue, in hooktrail's words.
//!
//! One implementation for each kind of queue; nothing outside of it knows the queue's protocol.

pub mod amqp;
pub mod embedded;

use std::{
    collections::BTreeMap,
    fmt,
    future::Future,
    sync::Arc,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use tokio::sync::watch;

use crate::{
    clock,
    config::{Subscriber, Subscribers},
    payload::Format,
};

/// The queue as the daemon uses it.
pub trait Queue: Clone + Send + Sync + 'static {
    type Source: Source;
    type Settler: Settler;
    type DeadLetters: DeadLetters;

    /// Makes ready what the subscribers need, at the start and each time that others are configured; what they need no
    /// more stays until [`chores`](Self::chores) sees to it. Waits for the queue without end. What only one subscriber
    /// needs is a concern of [`open`](Self::open).
    ///
    /// # Errors
    /// What there is cannot be used and will not change by itself.
    fn prepare(&self, subscribers: &[Arc<Subscriber>]) -> impl Future<Output = Result<(), QueueError>> + Send;

    /// What is to be done beside the lanes, such as taking away what only earlier configurations
    /// needed; without end.
    fn chores(&self, subscribers: watch::Receiver<Subscribers>) -> impl Future<Output = ()> + Send;

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

    /// Makes ready what is missing for events to wait for a daemon that has not run yet. Changes nothing
    /// that is there.
    ///
    /// # Errors
    /// The queue refuses, and why.
    fn ensure(&self, subscribers: &[Arc<Subscriber>]) -> impl Future<Output = Result<(), QueueError>> + Send;

    /// Stores events for all whose patterns match them, and returns when that is durable: what became of
    /// each, in order. At most [`MAX_GROUP`] at once.
    ///
    /// # Errors
    /// It is not known whether they are stored.
    fn publish(&self, events: Vec<NewEvent>) -> impl Future<Output = Result<Vec<Published>, QueueError>> + Send;

    /// Whether events could be stored now, as far as is known without asking.
    fn is_reachable(&self) -> bool {
        true
    }

    /// Whether events come faster than they are stored, so that new ones should come later.
    fn is_behind(&self) -> bool {
        false
    }

    /// Who is paused and who was resumed, as every daemon on the same queues records it; `None` until that is known.
    fn standings(&self) -> watch::Receiver<Option<Standings>>;

    /// Records that a subscriber is paused or resumed, and returns when that is durable and in [`standings`](Self::standings).
    ///
    /// # Errors
    /// It is not known whether it was recorded.
    fn record(&self, subscriber: &str, standing: Standing) -> impl Future<Output = Result<(), QueueError>> + Send;

    /// # Errors
    /// Nothing is known of such a subscriber, or the queue cannot be reached.
    fn dead_letters(&self, subscriber: &str) -> impl Future<Output = Result<Self::DeadLetters, QueueError>> + Send;

    /// How much there is in the queues of these subscribers, and what is left of others.
    ///
    /// # Errors
    /// The queue cannot be asked.
    fn depths(&self, subscribers: &[Arc<Subscriber>]) -> impl Future<Output = Result<Depths, QueueError>> + Send;

    /// Deletes what there is of a subscriber that is not configured any more, whatever it holds.
    ///
    /// # Errors
    /// Somebody still works for it, or the queue cannot be asked.
    fn prune(&self, subscriber: &str) -> impl Future<Output = Result<(), QueueError>> + Send;

    /// What there is for this configuration, without changing anything.
    ///
    /// # Errors
    /// The queue cannot be asked.
    fn inspect(&self, subscribers: &[Arc<Subscriber>]) -> impl Future<Output = Result<Vec<Finding>, QueueError>> + Send;
}

/// Of each subscriber that was ever paused, what was recorded last.
pub type Standings = Arc<BTreeMap<String, Standing>>;

/// Whether a subscriber gets what waits for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Standing {
    Paused(Pause),
    /// Attempts and elapsed time of batches from before then begin anew.
    Resumed {
        at: SystemTime,
    },
}

impl Standing {
    pub fn pause(&self) -> Option<&Pause> {
        match self {
            Self::Paused(pause) => Some(pause),
            Self::Resumed { .. } => None,
        }
    }
}

/// Why a subscriber gets nothing until it is resumed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pause {
    /// For an operator to read.
    pub why: String,
    pub since: SystemTime,
    /// `receiver`, `retry.on_exhausted` or `operator`.
    pub by: String,
}

/// An event on its way into the queue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewEvent {
    pub event_type: String,
    pub message_id: Option<String>,
    pub body: Bytes,
    /// The producer's, as W3C Trace Context has it.
    pub traceparent: Option<String>,
}

/// How much a subscriber has in its queues, without what lanes have taken.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Depth {
    /// Events to deliver.
    pub events: u64,
    /// Batches whose time to be tried again has come; with the embedded queue, all that wait for it.
    pub retries: u64,
    pub dead: u64,
}

impl Depth {
    pub fn is_empty(self) -> bool {
        self == Self::default()
    }
}

/// How much there is in the queues.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Depths {
    /// By subscriber; those without queues are not there.
    pub subscribers: BTreeMap<String, Depth>,
    /// Of subscribers that are not configured any more and were not pruned.
    pub removed: BTreeMap<String, Depth>,
    /// Batches of all subscribers whose time to be tried again has not come; `None` where they are among the
    /// [`retries`](Depth::retries) of each.
    pub delayed: Option<u64>,
    /// What could not be routed back.
    pub orphans: u64,
}

/// W3C Trace Context has 55 characters; what is far longer is something else.
pub const MAX_TRACEPARENT: usize = 256;

/// How many events are best published in one call: they become durable together.
pub const MAX_GROUP: usize = 1000;

/// What became of published events.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Published {
    Stored,
    /// No pattern matches its type, so nobody gets it.
    Unmatched,
    Refused,
}

/// What a look at the queue found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Finding {
    Queue {
        name: String,
        messages: u32,
        /// Where that is known.
        consumers: Option<u32>,
    },
    Absent {
        name: String,
    },
    Harmful(String),
}

/// A walk through a subscriber's dead letters, oldest first. What is neither replayed nor purged keeps its order.
pub trait DeadLetters: Send {
    /// How many there are still to come. Those that die during the walk are not part of it.
    fn left(&self) -> u32;

    /// # Errors
    /// The queue was lost; nothing has gone but what was replayed or purged.
    fn next(&mut self) -> impl Future<Output = Result<Option<Held>, QueueError>> + Send;

    /// Sends letters on their way again: durable first, and only then no dead letters any more.
    ///
    /// # Errors
    /// Those that are not on their way are still dead letters.
    fn replay(&self, letters: Vec<Held>) -> impl Future<Output = Result<(), QueueError>> + Send;

    /// Deletes a letter for good.
    ///
    /// # Errors
    /// The queue was lost; the letter is still there.
    fn purge(&self, held: &Held) -> impl Future<Output = Result<(), QueueError>> + Send;

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
    pub(crate) tag: u64,
}

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

    /// The longest that a message of this window is held before it is settled, if each batch has so many
    /// events and each attempt takes all the time it may: its wait for company, the attempts before its
    /// own, and that. Retries that are due come on top.
    pub fn longest_hold(self, subscriber: &Subscriber, events_in_a_batch: usize) -> Duration {
        let at_once = subscriber.http.concurrency * events_in_a_batch.max(1);
        let attempts = usize::from(self.events).div_ceil(at_once).max(1);
        subscriber.batch.max_wait + subscriber.http.timeout.saturating_mul(u32::try_from(attempts).unwrap_or(u32::MAX))
    }
}

/// The taking end of a subscriber's queue.
pub trait Source: Send {
    /// Waits for at least one message and appends those that are there, at most about `max`,
    /// envelopes before events. Can be dropped while it waits without losing any.
    ///
    /// # Errors
    /// The queue is gone: whatever was taken from this source comes again from the next.
    fn take(&mut self, into: &mut Vec<Taken>, max: usize) -> impl Future<Output = Result<(), QueueError>> + Send;

    /// Gives back what was not settled, to the places it had.
    fn close(self) -> impl Future<Output = ()> + Send;
}

/// The settling end. Clones settle for the same source.
pub trait Settler: Clone + Send + Sync + 'static {
    /// Makes the settlement durable, then takes the messages out of the queue.
    ///
    /// # Errors
    /// The messages are still in the queue and come again.
    fn settle(&self, receipts: Vec<Receipt>, settlement: Settlement) -> impl Future<Output = Result<(), SettleError>> + Send;
}

/// Stands for a message that was taken, at the source it was taken from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Receipt {
    pub(crate) from: Kind,
    pub(crate) tag: u64,
}

/// What a message holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    Event,
    Batch,
}

impl Kind {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Event => "event",
            Self::Batch => "batch",
        }
    }
}

/// A message as it was taken.
#[derive(Debug)]
pub enum Taken {
    Event(Event),
    Envelope(Envelope, Receipt),
    /// A message where an envelope should be, as the dead letter that it becomes.
    NotAnEnvelope(DeadLetter, Receipt),
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

/// A batch that failed at least once: everything that makes the next attempt the same request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Envelope {
    pub batch_id: String,
    /// The exact request body.
    pub body: Bytes,
    pub format: Format,
    pub events: u32,
    /// Attempts made; 0 after a replay.
    pub attempts: u32,
    /// Of the first attempt; `None` before it.
    pub first_attempt_at: Option<SystemTime>,
    /// Of the first event's producer, as W3C Trace Context has it.
    pub traceparent: Option<String>,
}

/// Why something was given up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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
    pub const ALL: [Self; 6] = [Self::Exhausted, Self::Refused, Self::InvalidEvent, Self::TooLarge, Self::DeliveryLimit, Self::Expired];

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

/// What could not be delivered, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeadLetter {
    pub kind: Kind,
    pub reason: Reason,
    /// The exact request body of a batch, or the event as it was published.
    pub body: Bytes,
    pub content_type: Option<String>,
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
}

impl DeadLetter {
    /// A batch as it comes back: under its id, with attempts and elapsed time begun anew.
    pub(crate) fn to_envelope(&self) -> Envelope {
        let format = [Format::Json, Format::JsonLines].into_iter().find(|f| self.content_type.as_deref() == Some(f.content_type()));
        Envelope {
            batch_id: self.id.clone().unwrap_or_else(clock::batch_id),
            body: self.body.clone(),
            format: format.unwrap_or(Format::Json),
            events: self.events,
            attempts: 0,
            first_attempt_at: None,
            traceparent: None,
        }
    }
}

/// The longest error that a dead letter carries, in bytes.
pub const MAX_ERROR_LEN: usize = 1024;

/// Cuts a text to [`MAX_ERROR_LEN`] at a character's border.
pub fn cut_error(text: &str) -> &str {
    &text[..text.floor_char_boundary(MAX_ERROR_LEN)]
}

/// What became of messages.
#[derive(Debug)]
pub enum Settlement {
    Delivered,
    /// Comes again as envelopes, in their order, not before `delay` from now.
    Retry {
        envelopes: Vec<Envelope>,
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
}

impl QueueError {
    /// What may pass by itself.
    pub fn new(text: impl Into<String>) -> Self {
        Self { text: text.into(), needs_operator: false }
    }

    /// What stays until somebody changes the queue or the configuration.
    pub fn needs_operator(text: impl Into<String>) -> Self {
        Self { text: text.into(), needs_operator: true }
    }

    pub fn is_for_operator(&self) -> bool {
        self.needs_operator
    }
}

impl fmt::Display for QueueError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for QueueError {}

#[cfg(test)]
pub(crate) mod fake;

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

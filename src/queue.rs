//! The traits of a queue, as delivery needs them.
//!
//! One implementation for each kind of queue; nothing outside of it knows the queue's protocol.

pub mod amqp;
pub mod embedded;
mod history;
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
    history::{Begin, GROUP_BYTES, HistorySource, HistoryStart, ReplayFloor},
    removals::{Changing, HeldRemovals, Removals, Sharing, some_of},
    waiting::{Hastened, Waiting, WaitingList},
};
use crate::{
    config::{Subscriber, Subscribers},
    delivery::{
        Batch, BatchId, DeadLetter, Depths, MessageKind, PauseState, PauseStates, Print,
        SubscriberName,
    },
    event::{InvalidEvent, Tenant, head},
    policy::rate::RateOf,
    store::EventNumber,
    telemetry::finding::Finding,
    telemetry::troubles::Troubles,
};

/// The queue as the daemon uses it.
pub trait Queue: Clone + Send + Sync + 'static {
    type Source: Source;
    type Settler: Settler;
    type DeadLetters: DeadLetters;
    type History: HistorySource;

    /// Prepares the queues of these subscribers, at the start and each time that others are
    /// configured. What they need no more is removed by the [background tasks](Self::background).
    /// Waits for the queue indefinitely. Returns the subscribers whose own queues are not ready:
    /// [`open`](Self::open) declares them.
    ///
    /// # Errors
    /// The queue is unusable until an operator acts.
    fn prepare(
        &self,
        subscribers: &[Arc<Subscriber>],
    ) -> impl Future<Output = Result<BTreeSet<SubscriberName>, QueueError>> + Send;

    /// Runs the background tasks alongside the lanes, such as removing what only earlier
    /// configurations needed. Ends soon after `stopping` became true, and leaves nothing half done
    /// that would be done twice.
    fn background(
        &self,
        subscribers: watch::Receiver<Subscribers>,
        stopping: watch::Receiver<bool>,
    ) -> impl Future<Output = ()> + Send;

    /// Closes the connections, when the lanes have ended.
    fn close(&self) -> impl Future<Output = ()> + Send;

    /// Opens a subscriber's queue. Messages that were taken before and not settled are redelivered.
    fn open(
        &self,
        subscriber: &Subscriber,
        window: Window,
    ) -> impl Future<Output = Result<(Self::Source, Self::Settler), QueueError>> + Send;

    /// Waits until it is known that this store has the history of the queue; claims it if no store
    /// has.
    ///
    /// # Errors
    /// Another store has it, until an operator moves it; or it cannot be claimed.
    fn claim_history(
        &self,
        _start: &HistoryStart,
    ) -> impl Future<Output = Result<(), QueueError>> + Send {
        std::future::ready(Ok(()))
    }

    /// Opens the source of history, [claimed](Self::claim_history). Waits for the queue indefinitely.
    ///
    /// # Errors
    /// The queue cannot be read; or another store has its history.
    fn history(
        &self,
        start: HistoryStart,
    ) -> impl Future<Output = Result<Self::History, QueueError>> + Send;

    /// How far the history that this process takes has the events from before a subscriber was bound.
    /// To be asked until it [waits](Begin::Waits) no more.
    ///
    /// # Errors
    /// The queue cannot be reached.
    fn begin(
        &self,
        subscriber: &SubscriberName,
    ) -> impl Future<Output = Result<Begin, QueueError>> + Send;

    /// The id of the store that has the history of this queue; the inner `None` if no store has it, and
    /// the outer one while that is not known. Always none where daemons cannot share the queue.
    fn history_store(&self) -> watch::Receiver<Option<Option<String>>> {
        watch::Sender::new(Some(None)).subscribe()
    }

    /// The same of the store that has subscribers made over the API.
    fn subscribers_store(&self) -> watch::Receiver<Option<Option<String>>> {
        watch::Sender::new(Some(None)).subscribe()
    }

    /// Records that this store has subscribers made over the API: of the daemons that share the queue
    /// only its own changes them, and no other one unbinds anybody.
    ///
    /// # Errors
    /// Another store has some; or it cannot be recorded.
    fn claim_subscribers(
        &self,
        _store: &str,
    ) -> impl Future<Output = Result<(), QueueError>> + Send {
        std::future::ready(Ok(()))
    }

    /// Sets whom to ask for the floor of running replays, before events are deleted that they may
    /// have to read. Of no effect in a queue that keeps no event for history.
    fn keep_for_replays(&self, _floor: ReplayFloor) {}

    /// Waits until retries and dead letters can be written.
    fn writable(&self) -> impl Future<Output = ()> + Send;

    /// Declares what is missing for events to wait for a daemon that has not run yet. Changes
    /// nothing that exists.
    ///
    /// # Errors
    /// The queue refuses it.
    fn ensure(
        &self,
        subscribers: &[Arc<Subscriber>],
    ) -> impl Future<Output = Result<(), QueueError>> + Send;

    /// Stores events for all subscribers whose patterns match them. Returns the outcome of each in
    /// order, when that is durable. At most [`MAX_GROUP`] at once.
    ///
    /// # Errors
    /// It is unknown whether they are stored.
    fn publish(
        &self,
        events: Vec<NewEvent>,
    ) -> impl Future<Output = Result<Vec<Published>, QueueError>> + Send;

    /// Whether events could be stored now, as far as is known without a request.
    fn is_reachable(&self) -> bool {
        true
    }

    /// The outages of the queue. A queue that notices none has none.
    fn troubles(&self) -> watch::Receiver<Troubles> {
        watch::Sender::default().subscribe()
    }

    /// Whether events arrive faster than they are stored, so that producers should wait.
    fn is_behind(&self) -> bool {
        false
    }

    /// Decides which subscribers may be unbound because they are not configured any more.
    fn removals(&self) -> &Removals;

    /// The pauses and resumptions that all daemons on the same queues have recorded; `None` until
    /// they are known.
    fn pause_states(&self) -> watch::Receiver<Option<PauseStates>>;

    /// Records that a subscriber is paused or resumed. Returns when that is durable and in
    /// [`pause_states`](Self::pause_states).
    ///
    /// # Errors
    /// It is unknown whether it was recorded.
    fn record(
        &self,
        subscriber: &SubscriberName,
        pause_state: PauseState,
    ) -> impl Future<Output = Result<(), QueueError>> + Send;

    /// # Errors
    /// The subscriber is unknown, or the queue cannot be reached.
    fn dead_letters(
        &self,
        subscriber: &str,
    ) -> impl Future<Output = Result<Self::DeadLetters, QueueError>> + Send;

    /// The batches that wait for their next attempt, including those that are due and not taken yet.
    ///
    /// # Errors
    /// The subscriber is unknown, or the queue cannot be reached; nothing has changed.
    fn waiting(
        &self,
        subscriber: &str,
    ) -> impl Future<Output = Result<WaitingList, QueueError>> + Send;

    /// Makes the next attempt due now, of all waiting batches or of those with these ids. Bytes,
    /// ids and numbers of attempts stay the same; batches of other subscribers keep their order and
    /// their time.
    ///
    /// # Errors
    /// The subscriber is unknown, or the queue was lost. The error says how many batches were
    /// moved; the others still wait as they did.
    fn hasten(
        &self,
        subscriber: &str,
        ids: Option<BTreeSet<BatchId>>,
    ) -> impl Future<Output = Result<Hastened, QueueError>> + Send;

    /// Adds batches to those that wait for an attempt, due now; durable when it returns. One whose
    /// id waits already is not added where the queue sees that. Events are not taken before them.
    ///
    /// # Errors
    /// The subscriber has no queue, or the queue was lost: some may have been added.
    fn enqueue(
        &self,
        subscriber: &SubscriberName,
        batches: Vec<Batch>,
    ) -> impl Future<Output = Result<(), QueueError>> + Send;

    /// The depths of these subscribers' queues, and of what is left of removed subscribers.
    ///
    /// # Errors
    /// The queue cannot be reached.
    fn depths(
        &self,
        subscribers: &[Arc<Subscriber>],
    ) -> impl Future<Output = Result<Depths, QueueError>> + Send;

    /// What the queue knows of an event of history that these subscribers were to get, in their order.
    ///
    /// # Errors
    /// The queue cannot be read.
    fn progress(
        &self,
        subscribers: &[SubscriberName],
        _event: EventNumber,
    ) -> impl Future<Output = Result<Vec<Progress>, QueueError>> + Send {
        std::future::ready(Ok(vec![Progress::Unknown; subscribers.len()]))
    }

    /// Whether a batch waits for an attempt, or is in flight; `None` if the queue would have to be read
    /// for that.
    ///
    /// # Errors
    /// The queue cannot be read.
    fn has_batch(
        &self,
        _subscriber: &SubscriberName,
        _id: &BatchId,
    ) -> impl Future<Output = Result<Option<bool>, QueueError>> + Send {
        std::future::ready(Ok(None))
    }

    /// The subscribers that get events, as the queue has recorded it: for commands, which do not
    /// know whether a daemon runs, nor its configuration.
    ///
    /// # Errors
    /// The queue cannot be reached.
    fn bound(&self) -> impl Future<Output = Result<BTreeSet<SubscriberName>, QueueError>> + Send;

    /// Deletes the queues of a subscriber that is not configured any more.
    ///
    /// # Errors
    /// A daemon or a command still uses them; or they hold messages, unless `with_events` permits
    /// their loss; or the queue cannot be reached.
    fn prune(
        &self,
        subscriber: &SubscriberName,
        with_events: bool,
    ) -> impl Future<Output = Result<(), QueueError>> + Send;

    /// Inspects what exists for this configuration and what can go wrong with it. Changes nothing,
    /// and reports what it could not inspect. Takes a bounded time, unless the broker answers
    /// slowly.
    ///
    /// # Errors
    /// The queue cannot be reached at all.
    fn inspect(
        &self,
        subscribers: &[Arc<Subscriber>],
    ) -> impl Future<Output = Result<Vec<Finding>, QueueError>> + Send;
}

/// What the queue knows of an event and a subscriber.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Progress {
    /// The event is still in the subscriber's queue, or was taken and has no attempt yet.
    Waits,
    /// The subscriber's queue is past the event.
    Passed,
    /// So many events are in the subscriber's queue; whether it is one of them is not known.
    Among(u64),
    /// The queue keeps no such place.
    #[default]
    Unknown,
}

/// An event on its way into the queue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewEvent {
    pub event_type: String,
    pub message_id: Option<String>,
    pub body: Bytes,
    /// The producer's, as W3C Trace Context has it.
    pub traceparent: Option<Arc<str>>,
    /// Whose it is. Only the embedded queue knows tenants.
    pub tenant: Option<Tenant>,
}

/// Bytes of a trace context; W3C Trace Context has 55 characters.
pub const MAX_TRACEPARENT: usize = 256;

/// Events that are best published in one call: they become durable together.
pub const MAX_GROUP: usize = 1000;

/// The queue's answer for a published event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Published {
    Stored,
    /// No queue is bound for its type.
    Unmatched,
    Refused,
}

impl Published {
    /// The arrival of the event. `is_wanted`: a pattern of the configuration matches its type.
    pub const fn arrival(self, is_wanted: bool) -> Arrival {
        match self {
            Self::Refused => Arrival::Refused,
            Self::Unmatched if is_wanted => Arrival::Unbound,
            Self::Stored if is_wanted => Arrival::Stored,
            Self::Stored | Self::Unmatched => Arrival::Unmatched,
        }
    }
}

/// The arrival of a published event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arrival {
    Stored,
    /// Published, and no subscriber wants it.
    Unmatched,
    /// A subscriber wants it and did not get it: the broker has lost a binding, or has none yet.
    Unbound,
    Refused,
}

/// A walk through dead letters, oldest first. Those that are neither replayed nor purged keep their
/// order.
///
/// Takes no memory for the dead letters that it has passed, however many there are.
pub trait DeadLetters: Send {
    /// The number of dead letters still to be passed. Those that are added during the walk are not
    /// part of it.
    fn left(&self) -> u32;

    /// # Errors
    /// The queue was lost; only what was replayed or purged has been removed.
    fn next(&mut self) -> impl Future<Output = Result<Option<Held>, QueueError>> + Send;

    /// Replays dead letters: they are durable in their queue before they are removed here. Returns
    /// those whose subscriber has no queue any more: they stay.
    ///
    /// # Errors
    /// Those that were not replayed are still dead letters.
    fn replay(
        &mut self,
        letters: Vec<Held>,
    ) -> impl Future<Output = Result<Vec<Held>, QueueError>> + Send;

    /// Deletes dead letters.
    ///
    /// # Errors
    /// The queue was lost; those that are not deleted are still there.
    fn purge(&mut self, letters: Vec<Held>) -> impl Future<Output = Result<(), QueueError>> + Send;

    /// Requeues the dead letters that were passed, in their order.
    ///
    /// # Errors
    /// The queue was lost before it answered; the dead letters are still there.
    fn close(self) -> impl Future<Output = Result<(), QueueError>> + Send;
}

/// A dead letter of a walk.
#[derive(Debug)]
pub struct Held {
    pub letter: DeadLetter,
    /// Its subscriber, which is not always known of an orphan.
    pub subscriber: Option<String>,
    pub(crate) tag: u64,
}

#[cfg(test)]
impl Held {
    /// A dead letter of a queue that needs no tag.
    pub(crate) fn new(letter: DeadLetter, subscriber: Option<String>) -> Self {
        Self { letter, subscriber, tag: 0 }
    }
}

/// Bytes of events that a lane may have unsettled at a broker, unless the first [`FEWEST`] events
/// are larger.
pub const MOST_BYTES: u64 = 64 << 20;

/// Events that are taken whatever their size: the first ones of a queue, whose sizes are unknown,
/// and the largest.
pub const FEWEST: u16 = 16;

/// RabbitMQ's default consumer timeout: a consumer that has a message unacked for longer loses its
/// channel.
pub const CONSUMER_TIMEOUT: Duration = Duration::from_secs(30 * 60);

/// The most messages that a lane may have unsettled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    pub events: u16,
    pub envelopes: u16,
}

impl Window {
    /// The window of a subscriber: for each request in flight its batch, and one that fills
    /// meanwhile; one that is made for the next request, and one whose ack is under way. Without the
    /// last two if a message could wait for longer than [`CONSUMER_TIMEOUT`] with them.
    pub fn of(subscriber: &Subscriber) -> Self {
        let slots = subscriber.http.concurrency;
        let (most, fewest) = (2 * slots + 2, 2 * slots);
        let window = Self::of_batches(most, subscriber);
        match window.longest_hold(subscriber, subscriber.batch.max_events) {
            hold if hold > CONSUMER_TIMEOUT => Self::of_batches(fewest, subscriber),
            _ => window,
        }
    }

    fn of_batches(batches: usize, subscriber: &Subscriber) -> Self {
        let clamp = |n: usize| u16::try_from(n).unwrap_or(u16::MAX);
        let max_events = subscriber.batch.max_events;
        let fits = subscriber.http.rate.map_or(usize::MAX, |rate| rate.window(max_events));
        let events = clamp((batches * max_events).min(fits));
        Self { events, envelopes: clamp(subscriber.http.concurrency) }
    }

    /// The longest time that a message of this window is unsettled, if each batch has
    /// `events_in_a_batch` events and each attempt takes [its
    /// longest](Subscriber::longest_attempt): the time until its batch is full, the attempts before
    /// its own, their wait for `http.rate`, and its own. Due retries come on top.
    pub fn longest_hold(self, subscriber: &Subscriber, events_in_a_batch: usize) -> Duration {
        let at_once = subscriber.http.concurrency * events_in_a_batch.max(1);
        let attempts = usize::from(self.events).div_ceil(at_once).max(1);
        let requests = u64::from(self.events).div_ceil(events_in_a_batch.max(1) as u64);
        let rate = subscriber.http.rate.map(|rate| match rate.of {
            RateOf::Requests => rate.time_of(requests),
            RateOf::Events => rate.time_of(self.events.into()),
        });
        subscriber.batch.max_wait
            + rate.unwrap_or_default()
            + subscriber
                .longest_attempt()
                .saturating_mul(u32::try_from(attempts).unwrap_or(u32::MAX))
    }

    /// The number of events in each batch below which a message of this window could be unsettled
    /// for longer than `limit`. At most `max_events`, for which that is not checked.
    pub fn fewest_events(self, subscriber: &Subscriber, limit: Duration) -> usize {
        // The more events in a batch, the fewer attempts, so that the time only falls.
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
    /// Waits for at least one message, and appends those that are there: at most about `max`,
    /// envelopes before events. Loses none if it is dropped while it waits.
    ///
    /// # Errors
    /// The queue is gone: what was taken from this source is redelivered by the next one.
    fn take(
        &mut self,
        into: &mut Vec<Taken>,
        max: usize,
    ) -> impl Future<Output = Result<(), QueueError>> + Send;

    /// Whether the byte limit, not the window, stops further takes.
    fn is_full(&self) -> bool {
        false
    }

    /// Requeues what was not settled.
    fn close(self) -> impl Future<Output = ()> + Send;
}

/// The settling end. Clones settle for the same source.
pub trait Settler: Clone + Send + Sync + 'static {
    /// Makes the settlement durable, then removes the messages from the queue. That first attempts
    /// were delivered may become durable a moment later: who is killed meanwhile repeats them.
    ///
    /// # Errors
    /// The messages are still in the queue and are redelivered.
    fn settle(
        &self,
        receipts: Vec<Receipt>,
        settlement: Settlement,
    ) -> impl Future<Output = Result<(), SettleError>> + Send;
}

/// A taken message's token, valid only at its source.
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
    /// A message of the retry queue that is not an envelope, or an unreadable event; already as its
    /// dead letter.
    Unusable(DeadLetter, Receipt),
    /// A redelivery of a message that was settled: only its ack was lost. Ack it without an
    /// attempt.
    AlreadySettled {
        events: u32,
        receipt: Receipt,
    },
}

/// An event as it was published. The lane decides whether it is valid.
#[derive(Debug)]
pub struct Event {
    /// Shared by all lanes that have it in memory.
    pub body: Bytes,
    /// The producer's, if there is one.
    pub message_id: Option<String>,
    pub content_type: Option<String>,
    /// When it was published, where the queue knows that.
    pub published_at: Option<SystemTime>,
    /// The producer's, as W3C Trace Context has it.
    pub traceparent: Option<String>,
    /// What its body was found to be.
    pub checked: Checked,
    /// Its number in the log, where there is one: the same whenever it is taken.
    pub number: Option<u64>,
    pub receipt: Receipt,
}

/// What the body of an event was found to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checked {
    /// The field `timestamp`; an error if it is no event.
    pub timestamp: Result<Option<u64>, InvalidEvent>,
    pub print: Print,
}

impl Checked {
    pub fn of(body: &[u8]) -> Self {
        Self::with(body, Print::of(body))
    }

    /// The same, where its print is known.
    pub fn with(body: &[u8], print: Print) -> Self {
        Self { timestamp: head(body).map(|head| head.timestamp), print }
    }
}

/// The result of settled messages.
#[derive(Debug)]
pub enum Settlement {
    Delivered,
    /// They come back as envelopes, in their order, not before `delay` from now.
    Retry {
        batches: Vec<Batch>,
        delay: Duration,
    },
    Dead(Vec<DeadLetter>),
}

/// Why a settlement did not happen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SettleError {
    /// The source is gone, and its messages with it: forget them, they are redelivered.
    Gone,
    /// The queue did not confirm; nothing may be written for these messages until they are
    /// redelivered.
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

/// A failure of the queue. Names the queue, says what was found and what to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QueueError {
    text: String,
    needs_operator: bool,
    is_of_another_store: bool,
    is_unwritable: bool,
    remedy: Option<String>,
}

impl QueueError {
    /// A failure that may end by itself.
    pub fn new(text: impl Into<String>) -> Self {
        Self {
            text: text.into(),
            needs_operator: false,
            is_of_another_store: false,
            is_unwritable: false,
            remedy: None,
        }
    }

    /// The queue takes no writes: what is delivered could not be recorded.
    pub fn unwritable(text: impl Into<String>) -> Self {
        Self { is_unwritable: true, ..Self::new(text) }
    }

    /// A failure that stays until an operator changes the queue or the configuration.
    pub fn needs_operator(text: impl Into<String>) -> Self {
        Self { needs_operator: true, ..Self::new(text) }
    }

    /// Another store has the history of the queue, or the subscribers made over the API, until an
    /// operator moves that.
    pub fn another_store(text: impl Into<String>) -> Self {
        Self { is_of_another_store: true, ..Self::needs_operator(text) }
    }

    /// Adds the remedy, a command where there is one.
    #[must_use]
    pub fn remedied(self, remedy: impl Into<String>) -> Self {
        Self { remedy: Some(remedy.into()), ..self }
    }

    /// The failure, without the remedy.
    pub fn what(&self) -> &str {
        &self.text
    }

    pub fn remedy(&self) -> Option<&str> {
        self.remedy.as_deref()
    }

    pub fn is_for_operator(&self) -> bool {
        self.needs_operator
    }

    pub fn is_unwritable(&self) -> bool {
        self.is_unwritable
    }

    /// The finding that the queue could not be inspected.
    pub fn to_finding(&self) -> Finding {
        let finding =
            Finding::harmful("queue", self.what()).risking("nothing is taken in or delivered");
        match self.remedy() {
            Some(remedy) => finding.with_remedy(remedy),
            None => finding,
        }
    }

    /// Whether what was asked for is another store's.
    pub fn is_of_another_store(&self) -> bool {
        self.is_of_another_store
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
    use crate::config::testing;

    #[test]
    fn a_window_has_two_batches_for_each_request_and_two_more_where_a_broker_has_the_patience() {
        let events = |lines: &str| {
            let config = testing::embedded(&testing::table("a", lines));
            Window::of(&config.subscribers[0]).events
        };
        assert_eq!(events("batch.max_events = 100"), 400);
        assert_eq!(events("batch.max_events = 100\nhttp.concurrency = 8"), 1800);
        // An attempt may wait for as long as it takes: four of them are 20 min and 40 min.
        assert_eq!(events("batch.max_events = 100\nhttp.timeout = \"150s\""), 400);
        assert_eq!(events("batch.max_events = 100\nhttp.timeout = \"5m\""), 200);
        assert_eq!(events("batch.max_events = 10000\nhttp.concurrency = 8"), u16::MAX);
    }

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

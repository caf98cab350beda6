//! The store: what hooktrail remembers of events and deliveries, behind one trait.
//!
//! Delivery never depends on it. A store that is away, slow or full costs history, which then has a
//! [`Gap`], and nothing else.

mod delivery;
mod filter;
mod replay;
mod row;
pub mod sqlite;
mod state;
mod subscriber;
#[cfg(test)]
pub(crate) mod testing;
pub mod words;

use std::{
    collections::BTreeSet,
    fmt,
    future::Future,
    time::{Duration, SystemTime},
};

pub use self::{
    delivery::{
        AttemptEnd, Change, Contents, Delivery, DeliveryAttempt, DeliveryChange, DeliveryState,
        WithEvent,
    },
    filter::{By, DeliveryFilter, EventFilter, event_time},
    replay::{
        Added, BatchEnds, Changed, Extent, Introduced, MAX_OPERATIONS, MAX_REPLAYS, MAX_RUNNING,
        NewOperation, Newcomer, Operation, Recorded, Replay, ReplayChange, ReplayOrder,
        ReplayProgress, ReplayState, RequestKey, UnreadableReplay,
    },
    row::{
        Appended, EventCounts, EventNumber, EventRow, Gap, NewRow, Page, Reach, Subscription,
        TypeCounts,
    },
    state::{HistoryState, StoreState},
    subscriber::{Deleted, KeptSubscriber, KeptSubscribers, Put, Stamp, StoredSubscriber},
};
use tokio::sync::watch;

use crate::{
    crypto::secret::Secret,
    delivery::{Print, SubscriberName},
    event::audience::Interest,
};

/// The most rows that one answer has, and one transaction reads.
pub const MAX_ROWS: usize = 500;

/// The most events that [`Store::append`] takes at once.
pub const MAX_APPEND: usize = 1000;

/// What a daemon remembers. Clones share it.
///
/// Every call but [`writable`](Self::writable) answers in a bounded time, also while the store is
/// away. Nothing of what an implementation is made of is visible through it.
pub trait Store: Clone + Send + Sync + 'static {
    /// Waits until the store is open to be written, however long that takes, and tries a write that a
    /// full disk refuses.
    ///
    /// # Errors
    /// It is refused, or the store was closed.
    fn writable(&self) -> impl Future<Output = Result<(), StoreError>> + Send;

    /// Adds events, oldest first, and returns when they are durable. A row without a number gets the
    /// next one. Skips repeats: a redelivered event with the message id and the bytes of a row among
    /// the latest 100,000.
    ///
    /// # Errors
    /// None of them is stored.
    fn append(
        &self,
        events: Vec<NewRow>,
    ) -> impl Future<Output = Result<Appended, StoreError>> + Send;

    /// Lists events that a filter selects, newest row first, before the row `before`; as far as that
    /// can be read within `time`.
    ///
    /// # Errors
    /// The store cannot be read.
    fn events(
        &self,
        filter: &EventFilter,
        before: Option<EventNumber>,
        limit: usize,
        time: Duration,
    ) -> impl Future<Output = Result<Page<EventRow>, StoreError>> + Send;

    /// Counts the events that a filter selects by `hours`, the first of which begins at `since`, as
    /// far as that can be done within `time`. Those of the filter's own time alone, if it has one.
    /// Without a filter it takes milliseconds, however many there are.
    ///
    /// # Errors
    /// The store cannot be read.
    fn count_by_hour(
        &self,
        filter: &EventFilter,
        since: SystemTime,
        hours: usize,
        time: Duration,
    ) -> impl Future<Output = Result<EventCounts, StoreError>> + Send;

    /// Counts the events from `since` on by their types, from the latest one back, as far as that can
    /// be done within `time`.
    ///
    /// # Errors
    /// The store cannot be read.
    fn count_by_type(
        &self,
        since: SystemTime,
        time: Duration,
    ) -> impl Future<Output = Result<TypeCounts, StoreError>> + Send;

    /// The event with a number.
    ///
    /// # Errors
    /// The store cannot be read.
    fn event(
        &self,
        number: EventNumber,
    ) -> impl Future<Output = Result<Option<EventRow>, StoreError>> + Send;

    /// The events with an id, newest first: a message id, or `sha256-` with the SHA-256 of an
    /// event's bytes in hexadecimal digits. At most [`MAX_ROWS`].
    ///
    /// # Errors
    /// The store cannot be read.
    fn events_with_id(
        &self,
        id: &str,
    ) -> impl Future<Output = Result<Vec<EventRow>, StoreError>> + Send;

    /// Rows in their order, after the row `after` and up to `upto`: at most `limit`, and no more
    /// than about `bytes` of bodies.
    ///
    /// # Errors
    /// The store cannot be read.
    fn rows(
        &self,
        after: EventNumber,
        upto: EventNumber,
        limit: usize,
        bytes: usize,
    ) -> impl Future<Output = Result<Vec<EventRow>, StoreError>> + Send;

    /// Takes changes of deliveries, oldest first.
    ///
    /// # Errors
    /// None of them is stored.
    fn record(
        &self,
        changes: Vec<DeliveryChange>,
    ) -> impl Future<Output = Result<(), StoreError>> + Send;

    /// Lists deliveries that a filter selects, the latest begun first, before the row `before`.
    ///
    /// # Errors
    /// The store cannot be read.
    fn deliveries(
        &self,
        filter: &DeliveryFilter,
        before: Option<i64>,
        limit: usize,
        time: Duration,
    ) -> impl Future<Output = Result<Page<Delivery>, StoreError>> + Send;

    /// The delivery of the batch with an id.
    ///
    /// # Errors
    /// The store cannot be read.
    fn delivery(
        &self,
        id: &str,
    ) -> impl Future<Output = Result<Option<Delivery>, StoreError>> + Send;

    /// The deliveries to some subscribers, begun from `since` on and before `until`, whose batches
    /// hold an event with this print. Answers for the first of the subscribers, in their order: for
    /// as many as can be read within `time`, and at least for one, which alone may be cut short. Of
    /// each the oldest first, at most [`MAX_ROWS`].
    ///
    /// # Errors
    /// The store cannot be read.
    fn deliveries_with(
        &self,
        subscribers: &[SubscriberName],
        print: Print,
        since: SystemTime,
        until: SystemTime,
        time: Duration,
    ) -> impl Future<Output = Result<Vec<WithEvent>, StoreError>> + Send;

    /// Records what each subscriber is to get from now on. One that is not among them has none.
    ///
    /// # Errors
    /// Nothing has changed.
    fn subscribed(
        &self,
        all: Vec<(SubscriberName, Interest)>,
        now: SystemTime,
    ) -> impl Future<Output = Result<(), StoreError>> + Send;

    /// What all subscribers were to get, with the times from and until which they held, as far as
    /// history reaches.
    ///
    /// # Errors
    /// The store cannot be read.
    fn subscriptions(&self) -> impl Future<Output = Result<Vec<Subscription>, StoreError>> + Send;

    /// Records a time of which history may lack events or deliveries.
    ///
    /// # Errors
    /// It is not recorded.
    fn add_gap(&self, gap: Gap) -> impl Future<Output = Result<(), StoreError>> + Send;

    /// How far history reaches back, and what it lacks.
    ///
    /// # Errors
    /// The store cannot be read.
    fn reach(&self) -> impl Future<Output = Result<Reach, StoreError>> + Send;

    /// The rows that may have events from `since` on and before `until`, at most up to the row
    /// `upto`; `None` if there are none.
    ///
    /// # Errors
    /// The store cannot be read.
    fn extent(
        &self,
        since: SystemTime,
        until: Option<SystemTime>,
        upto: Option<EventNumber>,
    ) -> impl Future<Output = Result<Option<Extent>, StoreError>> + Send;

    /// Stores a new replay; durable when it returns. With a key only once: it is kept as long as the
    /// replay. Of the replays that have ended only the latest [`MAX_REPLAYS`] are kept.
    ///
    /// # Errors
    /// It is not stored, or it is unknown whether it is.
    fn add_replay(
        &self,
        replay: Replay,
        key: Option<RequestKey>,
    ) -> impl Future<Output = Result<Added, StoreError>> + Send;

    /// Changes a replay as [`Replay::apply`] does; durable when it returns. Returns the replay as it
    /// is now; `None` if there is no such replay.
    ///
    /// # Errors
    /// It has not changed, or that is unknown.
    fn change_replay(
        &self,
        id: &str,
        change: ReplayChange,
        now: SystemTime,
    ) -> impl Future<Output = Result<Option<Changed>, StoreError>> + Send;

    /// Lists replays, the latest first, before the row `before`.
    ///
    /// # Errors
    /// The store cannot be read.
    fn replays(
        &self,
        before: Option<i64>,
        limit: usize,
    ) -> impl Future<Output = Result<Page<Recorded>, StoreError>> + Send;

    /// The replay with an id.
    ///
    /// # Errors
    /// The store cannot be read.
    fn replay(&self, id: &str)
    -> impl Future<Output = Result<Option<Recorded>, StoreError>> + Send;

    /// All replays that run, oldest first. What they have still to read is not trimmed.
    ///
    /// # Errors
    /// The store cannot be read.
    fn running_replays(&self) -> impl Future<Output = Result<Vec<Recorded>, StoreError>> + Send;

    /// The number of the last row that no running replay has still to read, one that cannot be read
    /// and that of a new subscriber which is not made yet included; `None` if there are none.
    ///
    /// # Errors
    /// The store cannot be read.
    fn replay_floor(&self) -> impl Future<Output = Result<Option<EventNumber>, StoreError>> + Send;

    /// Records subscribers, all at once, and those that were `bound` before them; what is
    /// recorded stays as it is. A subscriber with a `start_from` is new if it is recorded now and
    /// was not bound. What was bound may be unknown: then a store in which nothing is recorded takes
    /// none for new, as it does not know any.
    ///
    /// # Errors
    /// Nothing has changed, or that is unknown.
    fn introduce(
        &self,
        newcomers: Vec<Newcomer>,
        bound: Option<BTreeSet<SubscriberName>>,
        now: SystemTime,
    ) -> impl Future<Output = Result<Introduced, StoreError>> + Send;

    /// Stores the first replays of new subscribers, as many as may [run](MAX_RUNNING), and records
    /// with each that it is made; without one, that there is nothing to replay. Returns the
    /// subscribers that wait no more.
    ///
    /// # Errors
    /// Nothing has changed, or that is unknown.
    fn begin_newcomers(
        &self,
        replays: Vec<(SubscriberName, Option<Replay>)>,
    ) -> impl Future<Output = Result<BTreeSet<SubscriberName>, StoreError>> + Send;

    /// The subscribers made over the API. With the store away, or if it lacks some that were not
    /// deleted, it is the last set that is known: only [`delete_subscriber`](Self::delete_subscriber)
    /// removes one. Waits some seconds for a store that is being opened.
    fn subscribers(&self) -> impl Future<Output = KeptSubscribers> + Send;

    /// Changes whenever [`subscribers`](Self::subscribers) may answer otherwise although nothing was
    /// put or deleted: the store came back or was replaced, or the fate of a change was unknown.
    fn subscribers_to_read(&self) -> watch::Receiver<u64>;

    /// Stores a subscriber made over the API, and the operation; durable when it returns. `expected`
    /// is the version that it must have; `None`: there must be none of the name.
    ///
    /// # Errors
    /// It is not stored, or that [is unknown](StoreError::is_unknown).
    fn put_subscriber(
        &self,
        name: &SubscriberName,
        document: Secret,
        expected: Option<u64>,
        operation: NewOperation,
    ) -> impl Future<Output = Result<Put, StoreError>> + Send;

    /// Deletes a subscriber made over the API if it has this version, and records the operation;
    /// durable when it returns. `drops`: its queues are to be deleted too, which is remembered until
    /// they [are](Self::dropped), also if there is none of the name.
    ///
    /// # Errors
    /// It is not deleted, or that [is unknown](StoreError::is_unknown).
    fn delete_subscriber(
        &self,
        name: &SubscriberName,
        expected: u64,
        drops: bool,
        operation: NewOperation,
    ) -> impl Future<Output = Result<Deleted, StoreError>> + Send;

    /// The deleted subscribers whose queues are still to be deleted.
    ///
    /// # Errors
    /// The store cannot be read.
    fn dropping(&self)
    -> impl Future<Output = Result<BTreeSet<SubscriberName>, StoreError>> + Send;

    /// The queues of a deleted subscriber are deleted, or are those of another one by now.
    ///
    /// # Errors
    /// Nothing has changed, or that is unknown.
    fn dropped(&self, name: &SubscriberName)
    -> impl Future<Output = Result<(), StoreError>> + Send;

    /// Records an operation; durable when it returns. Only the latest [`MAX_OPERATIONS`] are kept.
    ///
    /// # Errors
    /// It is not recorded.
    fn add_operation(
        &self,
        operation: NewOperation,
    ) -> impl Future<Output = Result<(), StoreError>> + Send;

    /// Lists operations, the latest first, before the row `before`.
    ///
    /// # Errors
    /// The store cannot be read.
    fn operations(
        &self,
        before: Option<i64>,
        limit: usize,
    ) -> impl Future<Output = Result<Page<Operation>, StoreError>> + Send;

    /// Removes a little of what is older than the retention, or more than fits, or else arranges a
    /// little of what stays so that it is searched sooner; true if there may be more to do.
    ///
    /// # Errors
    /// The store cannot be written.
    fn trim(&self, now: SystemTime) -> impl Future<Output = Result<bool, StoreError>> + Send;

    /// The id of the store, made once; a history belongs to one store.
    ///
    /// # Errors
    /// It cannot be read.
    fn id(&self) -> impl Future<Output = Result<String, StoreError>> + Send;

    /// Closes what it has open of the queue, after which only its own files are read.
    fn leave_the_queue(&self) -> impl Future<Output = ()> + Send;

    /// The state of the store now, for status and health.
    fn condition(&self) -> StoreState;

    /// Completes what is begun, and closes. `complete`: every change of a delivery was recorded or is
    /// in a gap; otherwise the next process records one.
    fn close(&self, complete: bool) -> impl Future<Output = ()> + Send;
}

/// A log that keeps the events' bytes itself, so that the store does not keep them twice: that of
/// the embedded queue. Its numbers are those of history.
///
/// Calls block for a read of a disk; each thread has a log of its own.
pub trait EventLog: Send {
    /// The events with these numbers, as far as they are there, in the order of the numbers, and how
    /// many of the numbers were looked up: no more than about `bytes` of bodies are returned, unless
    /// one alone has more.
    ///
    /// # Errors
    /// The log cannot be read.
    fn get(
        &mut self,
        numbers: &[EventNumber],
        bytes: usize,
    ) -> Result<(Vec<NewRow>, usize), StoreError>;

    /// The first events after a number: at most `limit`, and no more than about `bytes` of bodies
    /// unless one alone has more.
    ///
    /// # Errors
    /// The log cannot be read.
    fn after(
        &mut self,
        number: EventNumber,
        limit: usize,
        bytes: usize,
    ) -> Result<Vec<NewRow>, StoreError>;

    /// The time of which the last answer of [`after`](Self::after) lacks events, because they were
    /// deleted before; `None` if it lacks none. It begins with the event before them that this log
    /// has read, or at the epoch: the caller knows the last event that it has.
    fn gap(&self) -> Option<Gap> {
        None
    }

    /// The last events before a number, the latest first: at most `limit`, and no more than about
    /// `bytes` of bodies unless one alone has more.
    ///
    /// # Errors
    /// The log cannot be read.
    fn before(
        &mut self,
        number: EventNumber,
        limit: usize,
        bytes: usize,
    ) -> Result<Vec<NewRow>, StoreError>;

    /// The number of events after a number and up to another that are there.
    ///
    /// # Errors
    /// The log cannot be read.
    fn count(&mut self, after: EventNumber, upto: EventNumber) -> Result<u64, StoreError>;

    /// The numbers of the first and the last event; `None` if there is none.
    ///
    /// # Errors
    /// The log cannot be read.
    fn bounds(&mut self) -> Result<Option<(EventNumber, EventNumber)>, StoreError>;

    /// The last number that was ever given, also of an event that is not there any more; 0 if none
    /// was.
    ///
    /// # Errors
    /// The log cannot be read.
    fn end(&mut self) -> Result<EventNumber, StoreError> {
        Ok(self.bounds()?.map_or(EventNumber(0), |(_, last)| last))
    }
}

/// A failure of the store: what was found, and the remedy where there is one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoreError {
    text: String,
    kind: Kind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Away,
    Unknown,
    Other,
}

impl StoreError {
    pub fn new(text: impl Into<String>) -> Self {
        Self { text: text.into(), kind: Kind::Other }
    }

    /// The store is not open: it is off, or could not be opened yet.
    pub fn away(text: impl Into<String>) -> Self {
        Self { text: text.into(), kind: Kind::Away }
    }

    /// It is unknown whether the store has made a change.
    pub fn unknown(text: impl Into<String>) -> Self {
        Self { text: text.into(), kind: Kind::Unknown }
    }

    pub fn is_away(&self) -> bool {
        self.kind == Kind::Away
    }

    /// Whether the change may be stored all the same.
    pub fn is_unknown(&self) -> bool {
        self.kind == Kind::Unknown
    }
}

impl fmt::Display for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for StoreError {}

#[cfg(test)]
pub(crate) mod fake;

#[cfg(test)]
pub(crate) use self::replay::tests as replays_for_tests;

//! The events of history, as a queue hands them out.

use std::{fmt, future::Future, sync::Arc, time::SystemTime};

use futures_util::future::BoxFuture;

use super::QueueError;
use crate::store::{EventNumber, Gap, NewRow, StoreError};

/// The store that a queue hands its events to, and how far it has come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HistoryStart {
    /// The id of the store; `None` if it is not known. On RabbitMQ one store alone has the history of
    /// a prefix.
    pub store: Option<String>,
    /// The number and the time of the last event in the store.
    pub last: Option<(EventNumber, SystemTime)>,
    /// Until when it is known what the store lacks; `None` if history begins with its first event.
    pub known_until: Option<SystemTime>,
}

/// The end of a queue that gives every event, whether a subscriber wants it or not, to history.
pub trait HistorySource: Send {
    /// Waits for an event, and appends those that are there, oldest first: perhaps none, at most `max`,
    /// and no more than about [`GROUP_BYTES`] of bodies, unless one alone has more. Loses none if it
    /// is dropped while it waits. A queue gives a limited number of events before the first of them
    /// are [stored](Self::stored).
    ///
    /// # Errors
    /// The queue is gone: events that are not [stored](Self::stored) are given again by the next
    /// source. Or another store has the history of this queue.
    fn take(
        &mut self,
        into: &mut Vec<NewRow>,
        max: usize,
    ) -> impl Future<Output = Result<(), QueueError>> + Send;

    /// Everything that was taken is in the store: the queue does not give it again. To be awaited to
    /// its end; a source on which it was dropped has to be closed.
    ///
    /// # Errors
    /// The queue is gone, and may give again what is in the store, as redelivered.
    fn stored(&mut self) -> impl Future<Output = Result<(), QueueError>> + Send;

    /// Times of which the queue has lost events, each returned once. To be asked after each
    /// [`take`](Self::take).
    fn gaps(&mut self) -> Vec<Gap>;

    /// Gives back what is not stored. The caller closes a source while its store is away: a queue
    /// bears unsettled events for minutes only.
    fn close(self) -> impl Future<Output = ()> + Send;
}

/// How far history has the events from before a subscriber was bound, which are not in its queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Begin {
    /// Some may be missing still, or that is not known.
    Waits,
    /// It has all of them, and they end with this number.
    After(EventNumber),
    /// It has all of them. The latest of its events may be the subscriber's own.
    Passed,
}

/// Bytes of bodies that one [`take`](HistorySource::take) returns, approximately.
pub const GROUP_BYTES: usize = 8 << 20;

/// Asks for the number of the last event that no running replay has still to read; `None` if no
/// replay runs.
#[derive(Clone)]
pub struct ReplayFloor(Arc<dyn Fn() -> Floor + Send + Sync>);

type Floor = BoxFuture<'static, Result<Option<EventNumber>, StoreError>>;

impl ReplayFloor {
    pub fn new<F>(ask: impl Fn() -> F + Send + Sync + 'static) -> Self
    where
        F: Future<Output = Result<Option<EventNumber>, StoreError>> + Send + 'static,
    {
        Self(Arc::new(move || Box::pin(ask())))
    }

    /// # Errors
    /// The store cannot be read.
    pub(super) async fn ask(&self) -> Result<Option<EventNumber>, StoreError> {
        (self.0)().await
    }
}

impl fmt::Debug for ReplayFloor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReplayFloor").finish_non_exhaustive()
    }
}

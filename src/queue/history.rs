//! The events of history, as a queue hands them out.

use std::{future::Future, time::SystemTime};

use super::QueueError;
use crate::store::{EventNumber, Gap, NewRow};

/// The store that a queue hands its events to, and how far it has come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HistoryStart {
    /// The id of the store. On RabbitMQ one store alone has the history of a prefix.
    pub store: String,
    /// The number and the time of the last event in the store.
    pub last: Option<(EventNumber, SystemTime)>,
}

/// The end of a queue that gives every event, whether a subscriber wants it or not, to history.
pub trait HistorySource: Send {
    /// Waits for at least one event, and appends those that are there, oldest first: at most `max`,
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

/// Bytes of bodies that one [`take`](HistorySource::take) returns, approximately.
pub const GROUP_BYTES: usize = 8 << 20;

/// The source of a queue that hands out no events.
#[derive(Debug)]
pub enum NoHistory {}

impl HistorySource for NoHistory {
    async fn take(&mut self, _: &mut Vec<NewRow>, _: usize) -> Result<(), QueueError> {
        match *self {}
    }

    async fn stored(&mut self) -> Result<(), QueueError> {
        match *self {}
    }

    fn gaps(&mut self) -> Vec<Gap> {
        match *self {}
    }

    async fn close(self) {
        match self {}
    }
}

//! Batches that wait for their next attempt, as an operator sees them.

use std::time::SystemTime;

use crate::delivery::{Batch, BatchId, FailedAttempt};

/// A batch that waits for its next attempt, without its body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Waiting {
    pub batch_id: BatchId,
    pub events: u32,
    /// Attempts made; 0 after a replay.
    pub attempts: u32,
    /// The last failed attempt, if the batch has one.
    pub last: Option<FailedAttempt>,
    pub first_attempt_at: Option<SystemTime>,
    /// When the next attempt is due; `None` where the batch does not say.
    pub due: Option<SystemTime>,
    /// Bytes of the request body.
    pub bytes: usize,
}

impl Waiting {
    pub(crate) fn new(batch: &Batch, due: Option<SystemTime>) -> Self {
        Self {
            batch_id: batch.id.clone(),
            events: batch.events,
            attempts: batch.attempts,
            last: batch.attempt_log.last().cloned(),
            first_attempt_at: batch.first_attempt_at,
            due,
            bytes: batch.body.len(),
        }
    }

    pub fn is_due(&self, now: SystemTime) -> bool {
        self.due.is_some_and(|due| due <= now)
    }
}

/// All batches of a subscriber that wait for their next attempts.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct WaitingList {
    /// In the order of their due times; those without one come last.
    pub batches: Vec<Waiting>,
    /// Messages of any subscriber that could not be reached in the time that a pass through a queue
    /// may take.
    pub unseen: u64,
}

/// The result of making next attempts due now.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Hastened {
    /// Batches whose next attempt is due now and was not before.
    pub moved: u64,
    /// Batches that were due already.
    pub due: u64,
    /// Ids that were asked for and that nothing has that waits.
    pub missing: Vec<String>,
    /// The same as in a [`WaitingList`].
    pub unseen: u64,
}

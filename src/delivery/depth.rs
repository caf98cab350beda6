//! The number of messages in the queues.

use std::collections::BTreeMap;

use super::subscriber_name::SubscriberName;

/// The number of messages in a subscriber's queues, without those that lanes have taken.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Depth {
    /// Events to deliver.
    pub events: u64,
    /// Batches whose retry is due.
    pub retries: u64,
    /// Batches whose retry is not due. 0 on RabbitMQ, which counts them for all subscribers
    /// together.
    pub delayed: u64,
    pub dead: u64,
}

impl Depth {
    pub fn is_empty(self) -> bool {
        self == Self::default()
    }

    /// Batches that wait for a retry, if they are counted for the subscriber alone.
    pub const fn batches(self) -> u64 {
        self.retries + self.delayed
    }
}

/// The number of messages in the queues.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Depths {
    /// By subscriber; those without queues are left out.
    pub subscribers: BTreeMap<SubscriberName, Depth>,
    /// By removed subscriber that was not pruned.
    pub removed: BTreeMap<SubscriberName, Depth>,
    /// Batches of all subscribers whose retry is not due; `None` if they are counted for
    /// [each](Depth::delayed).
    pub delayed: Option<u64>,
    /// The number of orphans.
    pub orphans: u64,
    /// Events in RabbitMQ that wait for history; `None` if there is no such queue.
    pub history: Option<u64>,
}

//! How much there is in the queues.

use std::collections::BTreeMap;

use super::subscriber_name::SubscriberName;

/// How much a subscriber has in its queues, without what lanes have taken.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Depth {
    /// Events to deliver.
    pub events: u64,
    /// Batches whose time to be tried again has come.
    pub retries: u64,
    /// Batches whose time has not come. 0 on RabbitMQ, where they are counted for all subscribers
    /// together.
    pub delayed: u64,
    pub dead: u64,
}

impl Depth {
    pub fn is_empty(self) -> bool {
        self == Self::default()
    }

    /// Batches to be tried again, as far as they are counted for the subscriber alone.
    pub const fn batches(self) -> u64 {
        self.retries + self.delayed
    }
}

/// How much there is in the queues.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Depths {
    /// By subscriber; those without queues are not there.
    pub subscribers: BTreeMap<SubscriberName, Depth>,
    /// Of subscribers that are not configured any more and were not pruned.
    pub removed: BTreeMap<SubscriberName, Depth>,
    /// Batches of all subscribers whose time to be tried again has not come; `None` where they are
    /// counted for [each](Depth::delayed).
    pub delayed: Option<u64>,
    /// What could not be routed back.
    pub orphans: u64,
}

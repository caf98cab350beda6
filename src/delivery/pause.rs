//! Pausing a subscriber.

use std::{collections::BTreeMap, sync::Arc, time::SystemTime};

use super::subscriber_name::SubscriberName;

/// The last record of each subscriber that was ever paused.
pub type PauseStates = Arc<BTreeMap<SubscriberName, PauseState>>;

/// Whether a subscriber is paused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PauseState {
    Paused(Pause),
    /// Batches from before `at` count attempts and elapsed time from zero.
    Resumed {
        at: SystemTime,
    },
}

impl PauseState {
    pub fn pause(&self) -> Option<&Pause> {
        match self {
            Self::Paused(pause) => Some(pause),
            Self::Resumed { .. } => None,
        }
    }
}

/// The pause of a subscriber, which gets nothing until it is resumed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pause {
    /// The reason, for operators.
    pub why: String,
    pub since: SystemTime,
    /// `receiver`, `retry.on_exhausted`, `order`, `operator` or `configuration`.
    pub by: String,
}

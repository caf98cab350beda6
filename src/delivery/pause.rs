//! Pausing a subscriber.

use std::{collections::BTreeMap, sync::Arc, time::SystemTime};

use super::subscriber_name::SubscriberName;

/// Of each subscriber that was ever paused, what was recorded last.
pub type Standings = Arc<BTreeMap<SubscriberName, Standing>>;

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

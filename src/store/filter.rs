//! What a list is of.

use std::time::SystemTime;

use crate::event::Pattern;

/// Selects events. All that is set has to hold.
#[derive(Debug, Clone, Default)]
pub struct EventFilter {
    pub event_type: Option<Pattern>,
    /// The actor's id or name, exact.
    pub actor: Option<String>,
    /// The resource's id or name, exact.
    pub resource: Option<String>,
    /// The message id, or `sha256-…`, exact.
    pub id: Option<String>,
    /// Words that all occur, the last one as a prefix.
    pub text: Option<String>,
    /// From this time on.
    pub since: Option<SystemTime>,
    /// Before this time.
    pub until: Option<SystemTime>,
    pub by: By,
}

/// The time that `since` and `until` mean.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum By {
    /// The time that history has for it: see `EventRow::at`.
    #[default]
    At,
    /// The event's own field `timestamp`. An event without a readable one is not selected.
    EventTime,
}

/// Selects deliveries. All that is set has to hold.
#[derive(Debug, Clone, Default)]
pub struct DeliveryFilter {
    pub subscriber: Option<String>,
    /// The name of a state.
    pub state: Option<String>,
    /// Begun from this time on.
    pub since: Option<SystemTime>,
    /// Begun before this time.
    pub until: Option<SystemTime>,
}

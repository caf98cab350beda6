//! A lane's status as an operator sees it.

use std::time::{Duration, SystemTime};

use crate::{
    delivery::{FailureKind, Pause},
    telemetry::lane_event::Circuit,
};

/// The latest attempt that failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LastError {
    pub at: SystemTime,
    /// Nothing that the receiver wrote.
    pub failure: FailureKind,
    pub status: Option<u16>,
    pub cause: Option<String>,
}

/// A lane's status at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct View {
    pub state: State,
    pub circuit: Circuit,
    /// Events that the lane has taken and not settled.
    pub unsettled: u64,
    /// Batches that are not due yet, as far as this daemon knows.
    pub retries_scheduled: usize,
    pub next_retry_at: Option<SystemTime>,
    pub delivered: u64,
    /// Thousandths of an event a second.
    pub delivered_per_s_milli: u64,
    /// Thousandths of the latest attempts; `None` without any.
    pub success_milli: Option<u64>,
    pub p50: Option<Duration>,
    pub p99: Option<Duration>,
    pub oldest_event_at: Option<SystemTime>,
    pub last_delivered_at: Option<SystemTime>,
    /// Requests are sent plain, because the receiver refused a compressed one.
    pub compression_refused: bool,
    pub last_error: Option<LastError>,
}

/// The most important fact about a lane.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    Ok,
    /// A request has had no answer for long, and none was accepted since it began.
    Waiting {
        since: SystemTime,
    },
    /// The latest attempt failed.
    Retrying,
    CircuitOpen {
        until: SystemTime,
    },
    /// The receiver asked for a hold with `Retry-After`.
    Held {
        until: SystemTime,
    },
    Paused(Pause),
    /// The lane cannot use its queue.
    QueueFails(String),
}

impl State {
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Waiting { .. } => "waiting",
            Self::Retrying => "retrying",
            Self::CircuitOpen { .. } => "circuit_open",
            Self::Held { .. } => "held",
            Self::Paused(_) => "paused",
            Self::QueueFails(_) => "queue_fails",
        }
    }
}

//! The decision about a batch that follows from an attempt.

use std::time::Duration;

use super::dead_letter::Reason;

/// The decision about a batch that follows from an attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Disposition {
    Delivered,
    /// The same request is sent again.
    Retry {
        delay: Duration,
    },
    /// Each part is sent as a batch of its own.
    Split {
        delay: Duration,
    },
    DeadLetter(Reason),
    /// The batch stays in the queue, and the subscriber gets nothing until it is resumed.
    Paused(PauseCause),
    /// Nothing was sent, so it was no attempt: the batch is requeued unchanged.
    GivenBack,
}

/// The reason why an attempt pauses its subscriber.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PauseCause {
    /// The receiver answered 410 Gone.
    Gone,
    /// The last attempt that `[retry]` allows failed, and `retry.on_exhausted` is `pause`.
    Exhausted,
    /// The receiver refuses an event, and no other may overtake it.
    Refused,
}

/// A disposition without its details: the `outcome` of log lines and metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum DispositionKind {
    Delivered,
    Retry,
    Split,
    DeadLetter,
    Paused,
}

impl DispositionKind {
    pub const ALL: [Self; 5] =
        [Self::Delivered, Self::Retry, Self::Split, Self::DeadLetter, Self::Paused];

    pub const fn name(self) -> &'static str {
        match self {
            Self::Delivered => "delivered",
            Self::Retry => "retry",
            Self::Split => "split",
            Self::DeadLetter => "dead_letter",
            Self::Paused => "paused",
        }
    }
}

impl Disposition {
    /// The kind; `None` if there was no attempt.
    pub const fn kind(self) -> Option<DispositionKind> {
        match self {
            Self::Delivered => Some(DispositionKind::Delivered),
            Self::Retry { .. } => Some(DispositionKind::Retry),
            Self::Split { .. } => Some(DispositionKind::Split),
            Self::DeadLetter(_) => Some(DispositionKind::DeadLetter),
            Self::Paused(_) => Some(DispositionKind::Paused),
            Self::GivenBack => None,
        }
    }

    /// The delay before the retry.
    pub const fn delay(self) -> Option<Duration> {
        match self {
            Self::Retry { delay } | Self::Split { delay } => Some(delay),
            Self::Delivered | Self::DeadLetter(_) | Self::Paused(_) | Self::GivenBack => None,
        }
    }

    pub const fn reason(self) -> Option<Reason> {
        match self {
            Self::DeadLetter(reason) => Some(reason),
            _ => None,
        }
    }
}

//! What an attempt came to.

use std::{fmt, time::Duration};

/// What an attempt came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    Delivered {
        status: u16,
    },
    Retry {
        failure: Failure,
        retry_after: Option<Duration>,
    },
    /// The endpoint asks to be left alone.
    Gone {
        failure: Failure,
    },
    /// The batch, or its one event, is more than the receiver takes at once.
    TooLarge {
        failure: Failure,
        retry_after: Option<Duration>,
    },
    /// Something in the batch is not accepted, or nothing is.
    Refused {
        failure: Failure,
        retry_after: Option<Duration>,
    },
    /// Nothing of the request was sent, for a lack of this daemon's own: it was no attempt.
    Unsent {
        why: String,
    },
}

impl Outcome {
    pub const fn failure(&self) -> Option<&Failure> {
        match self {
            Self::Delivered { .. } | Self::Unsent { .. } => None,
            Self::Retry { failure, .. }
            | Self::Gone { failure }
            | Self::TooLarge { failure, .. }
            | Self::Refused { failure, .. } => Some(failure),
        }
    }
}

/// Why an attempt failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Failure {
    /// An answer that is not a success, and the beginning of its text, on one line.
    Status {
        status: u16,
        excerpt: String,
    },
    Dns(String),
    AddressBlocked(String),
    Connect(String),
    Tls(String),
    Timeout,
    /// The connection ended before a status was read.
    Reset {
        why: String,
        /// The body was still being sent.
        while_sending: bool,
    },
    /// What came is not HTTP.
    BadAnswer(String),
    /// The attempt could not be made at all.
    Internal(String),
}

impl Failure {
    pub const fn kind(&self) -> FailureKind {
        match self {
            Self::Status { .. } => FailureKind::Status,
            Self::Dns(_) => FailureKind::Dns,
            Self::AddressBlocked(_) => FailureKind::AddressBlocked,
            Self::Connect(_) => FailureKind::Connect,
            Self::Tls(_) => FailureKind::Tls,
            Self::Timeout => FailureKind::Timeout,
            Self::Reset { .. } => FailureKind::Reset,
            Self::BadAnswer(_) => FailureKind::BadAnswer,
            Self::Internal(_) => FailureKind::Internal,
        }
    }

    pub const fn name(&self) -> &'static str {
        self.kind().name()
    }

    pub const fn status(&self) -> Option<u16> {
        match self {
            Self::Status { status, .. } => Some(*status),
            _ => None,
        }
    }

    /// What this side found out about it: nothing that the receiver wrote, so that it may be
    /// logged.
    pub fn cause(&self) -> Option<&str> {
        match self {
            Self::Status { .. } | Self::Timeout => None,
            Self::Dns(why)
            | Self::AddressBlocked(why)
            | Self::Connect(why)
            | Self::Tls(why)
            | Self::Reset { why, .. }
            | Self::BadAnswer(why)
            | Self::Internal(why) => Some(why),
        }
    }
}

/// With all details, for a dead letter: the receiver's text included.
impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())?;
        match self {
            Self::Status { status, excerpt } if excerpt.is_empty() => write!(f, " {status}"),
            Self::Status { status, excerpt } => write!(f, " {status}: {excerpt}"),
            _ => self.cause().map_or(Ok(()), |why| write!(f, ": {why}")),
        }
    }
}

/// A failure without its details: the `failure` of log lines and metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum FailureKind {
    Status,
    Dns,
    AddressBlocked,
    Connect,
    Tls,
    Timeout,
    Reset,
    BadAnswer,
    Internal,
}

impl FailureKind {
    pub const ALL: [Self; 9] = [
        Self::Status,
        Self::Dns,
        Self::AddressBlocked,
        Self::Connect,
        Self::Tls,
        Self::Timeout,
        Self::Reset,
        Self::BadAnswer,
        Self::Internal,
    ];

    pub const fn name(self) -> &'static str {
        match self {
            Self::Status => "status",
            Self::Dns => "dns",
            Self::AddressBlocked => "address_blocked",
            Self::Connect => "connect",
            Self::Tls => "tls",
            Self::Timeout => "timeout",
            Self::Reset => "reset",
            Self::BadAnswer => "bad_answer",
            Self::Internal => "internal",
        }
    }
}

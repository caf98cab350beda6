//! The outcome of an attempt.

use std::{fmt, time::Duration};

/// The outcome of an attempt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    Delivered {
        status: u16,
    },
    Retry {
        failure: Failure,
        retry_after: Option<Duration>,
    },
    /// The endpoint answered that it will take no more requests (410 Gone).
    Gone {
        failure: Failure,
    },
    /// The batch, or its one event, is larger than the receiver accepts.
    TooLarge {
        failure: Failure,
        retry_after: Option<Duration>,
    },
    /// The receiver refuses something in the batch, or every batch.
    Refused {
        failure: Failure,
        retry_after: Option<Duration>,
    },
    /// Nothing was sent because this daemon lacks a resource: it was no attempt.
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

/// The failure of an attempt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Failure {
    /// An answer that is no success, with the beginning of its text on one line.
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
    /// The answer is not HTTP.
    BadAnswer(String),
    /// There is no token for the request, so it was not sent.
    Auth(String),
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
            Self::Auth(_) => FailureKind::Auth,
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

    /// The details that this side found out. They contain nothing that the receiver wrote, so they
    /// may be logged.
    pub fn cause(&self) -> Option<&str> {
        match self {
            Self::Status { .. } | Self::Timeout => None,
            Self::Dns(why)
            | Self::AddressBlocked(why)
            | Self::Connect(why)
            | Self::Tls(why)
            | Self::Reset { why, .. }
            | Self::BadAnswer(why)
            | Self::Auth(why)
            | Self::Internal(why) => Some(why),
        }
    }
}

/// The failure with all details, the receiver's text included, for a dead letter.
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
    Auth,
    Internal,
}

impl FailureKind {
    pub const ALL: [Self; 10] = [
        Self::Status,
        Self::Dns,
        Self::AddressBlocked,
        Self::Connect,
        Self::Tls,
        Self::Timeout,
        Self::Reset,
        Self::BadAnswer,
        Self::Auth,
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
            Self::Auth => "auth",
            Self::Internal => "internal",
        }
    }
}

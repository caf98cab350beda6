//! The errors of commands, with their exit codes.

use std::fmt;

use super::text::visible;
use crate::{config::ConfigError, queue::QueueError};

/// The error of a command.
#[derive(Debug)]
pub enum Failed {
    /// Exit code 2.
    Usage(String),
    /// Exit code 2.
    Config(ConfigError),
    /// Exit code 1.
    Runtime(String),
    /// Already reported, in the log or in the output; with this exit code.
    Logged(u8),
}

impl Failed {
    /// 2 for usage and configuration, 1 for failures at run time.
    pub const fn exit_code(&self) -> u8 {
        match self {
            Self::Usage(_) | Self::Config(_) => 2,
            Self::Runtime(_) => 1,
            Self::Logged(code) => *code,
        }
    }
}

/// The printed text; empty if it was already reported.
impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Usage(why) | Self::Runtime(why) => write!(f, "hooktrail: {why}"),
            Self::Config(e) => write!(f, "{e}"),
            Self::Logged(_) => Ok(()),
        }
    }
}

impl From<QueueError> for Failed {
    fn from(e: QueueError) -> Self {
        // The text may quote names that others chose: a message's id, a type of event.
        Self::Runtime(visible(&e.to_string()))
    }
}

impl From<std::io::Error> for Failed {
    fn from(e: std::io::Error) -> Self {
        Self::Runtime(e.to_string())
    }
}

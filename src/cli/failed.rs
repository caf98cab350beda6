//! Why a command fails, and with which exit code.

use std::fmt;

use super::text::visible;
use crate::{config::ConfigError, queue::QueueError};

/// Why a command did not do what it was asked.
#[derive(Debug)]
pub enum Failed {
    /// Exit code 2.
    Usage(String),
    /// Exit code 2.
    Config(ConfigError),
    /// Exit code 1.
    Runtime(String),
    /// It is said already, in the log or in what was printed; with this exit code.
    Logged(u8),
}

impl Failed {
    /// 2 for usage and configuration, 1 for what failed at run time.
    pub const fn exit_code(&self) -> u8 {
        match self {
            Self::Usage(_) | Self::Config(_) => 2,
            Self::Runtime(_) => 1,
            Self::Logged(code) => *code,
        }
    }
}

/// As it is printed; nothing of what is said already.
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
        // It may name what others chose: a message's id, a type of event.
        Self::Runtime(visible(&e.to_string()))
    }
}

impl From<std::io::Error> for Failed {
    fn from(e: std::io::Error) -> Self {
        Self::Runtime(e.to_string())
    }
}

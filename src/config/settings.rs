//! A checked configuration, and what of it belongs to no subscriber.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use super::subscriber::Subscribers;
use crate::crypto::secret::{Secret, SecretUrl};

/// A checked configuration.
#[derive(Debug, Clone)]
pub struct Config {
    pub path: PathBuf,
    /// All that was read for it: the file, its includes and the folders they are looked for in,
    /// secrets, certificates.
    pub files: Vec<PathBuf>,
    /// Those of the folders in which a pattern of `include` has found a file.
    pub folders: Vec<PathBuf>,
    /// For requests in flight when the daemon is told to stop.
    pub shutdown_timeout: Duration,
    pub queue: QueueConfig,
    pub admin: AdminConfig,
    pub log: LogConfig,
    /// In the order of the file.
    pub subscribers: Subscribers,
}

/// From `[queue]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QueueConfig {
    pub backend: Backend,
    /// Whatever the backend: events may be left there from before a change.
    pub embedded: EmbeddedConfig,
}

/// Which queue `[queue] url` names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Backend {
    Embedded,
    Amqp(AmqpConfig),
}

/// Of `[queue]` what the embedded queue needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EmbeddedConfig {
    pub data_dir: PathBuf,
    /// Of events that every subscriber is done with.
    pub retention: Duration,
}

/// Of `[queue]` what RabbitMQ needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AmqpConfig {
    pub url: SecretUrl,
    pub intake: Intake,
    pub prefix: String,
    /// Of the management plugin's HTTP API, for a look at what AMQP does not show.
    pub management_url: Option<Box<SecretUrl>>,
}

/// Where events come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Intake {
    /// Producers publish to this topic exchange.
    Exchange(String),
    /// An existing queue that a relay takes events from.
    SourceQueue(String),
}

/// From `[admin]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdminConfig {
    pub listen: SocketAddr,
    /// Of whoever uses `/api`; never `None` where others than this machine's can connect.
    pub token: Option<Secret>,
}

/// From `[log]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogConfig {
    pub json: bool,
    pub level: tracing::Level,
}

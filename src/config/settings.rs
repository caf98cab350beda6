//! A checked configuration and its parts that belong to no subscriber.

use std::{net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use ipnet::IpNet;
use url::Url;

use super::subscriber::Subscribers;
use crate::{
    crypto::{
        seal::SealKey,
        secret::{Secret, SecretUrl},
    },
    event::{Pattern, TenantPlace},
};

/// The commented default configuration, every key in it.
pub const DEFAULT: &str = include_str!("../../config/hooktrail.toml");

/// Each subscriber has three queues of its own on RabbitMQ, which it keeps on each node.
const DEFAULT_MAX_ON_RABBITMQ: usize = 50;

/// In the embedded queue a subscriber is a few rows.
const DEFAULT_MAX_EMBEDDED: usize = 10_000;

/// So many subscribers have series of their own in the metrics if nothing else is configured: each has
/// about a hundred.
const MOST_WITH_OWN_SERIES: usize = 1_000;

/// A checked configuration.
#[derive(Debug, Clone)]
pub struct Config {
    pub path: PathBuf,
    /// Every path that was read: the file, its includes and the folders that are searched for them,
    /// secrets, certificates.
    pub files: Vec<PathBuf>,
    /// The folders in which a pattern of `include` found a file.
    pub folders: Vec<PathBuf>,
    /// The longest time that requests in flight get when the daemon stops.
    pub shutdown_timeout: Duration,
    pub queue: QueueConfig,
    pub store: StoreConfig,
    /// The keys of `[store] keys`, the one that seals first. If there is none, one is made.
    pub store_keys: Vec<SealKey>,
    pub history: HistoryConfig,
    pub admin: AdminConfig,
    pub log: LogConfig,
    pub metrics: MetricsConfig,
    /// In the order of the files.
    pub subscribers: Subscribers,
    pub groups: Groups,
}

/// The file with the groups of defaults, as it was read: those of subscribers that are made later.
#[derive(Debug, Clone)]
pub struct Groups {
    pub(super) path: PathBuf,
    /// There may be secrets in it.
    pub(super) text: Secret,
}

impl Config {
    /// Whether events and deliveries are kept.
    pub fn keeps_history(&self) -> bool {
        self.store != StoreConfig::None && !self.history.retention.is_zero()
    }

    /// The most subscribers, those of files included, up to which the API makes another.
    pub fn max_subscribers(&self) -> usize {
        self.admin.max_subscribers.unwrap_or(match self.queue.backend {
            Backend::Amqp(_) => DEFAULT_MAX_ON_RABBITMQ,
            Backend::Embedded => DEFAULT_MAX_EMBEDDED,
        })
    }

    /// Whether each subscriber has series of its own in the metrics, or all are counted together.
    pub fn metrics_per_subscriber(&self) -> bool {
        self.metrics.per_subscriber.unwrap_or(self.subscribers.len() <= MOST_WITH_OWN_SERIES)
    }

    /// The time for which events are kept in history: on the embedded queue, which has their bytes,
    /// no longer than it keeps them.
    pub fn history_retention(&self) -> Duration {
        match self.queue.backend {
            Backend::Embedded => self.history.retention.min(self.queue.embedded.retention),
            Backend::Amqp(_) => self.history.retention,
        }
    }
}

/// The table `[queue]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QueueConfig {
    pub backend: Backend,
    /// Set for every backend: after a change of `url`, events may still wait in the embedded queue.
    pub embedded: EmbeddedConfig,
    /// The RabbitMQ that events come through into the embedded queue.
    pub intake: Option<Box<IntakeConfig>>,
}

/// The queue that `queue.url` names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Backend {
    Embedded,
    Amqp(AmqpConfig),
}

/// The keys of `[queue]` for the embedded queue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EmbeddedConfig {
    pub data_dir: PathBuf,
    /// The time for which settled events are kept.
    pub retention: Duration,
    /// What history needs of its events; `None` if there is none.
    pub history: Option<HistoryConfig>,
    /// Where the tenant of an event is; `None` where events have none.
    pub tenant: Option<TenantPlace>,
    /// Whether each subscriber must have a tenant.
    pub tenants_required: bool,
}

/// The keys of `[queue]` for RabbitMQ.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AmqpConfig {
    pub url: SecretUrl,
    pub intake: Intake,
    pub prefix: String,
    /// The URL of the management plugin's API, for inspections of what AMQP does not show.
    pub management_url: Option<Box<SecretUrl>>,
    /// Whether events are kept in history, which has a queue of its own there.
    pub keeps_history: bool,
    /// Whether this configuration has a store, whose subscribers may be those that count there.
    pub has_store: bool,
    /// Whether subscribers are made over the API.
    pub manages: bool,
}

/// The keys of `[queue]` for a RabbitMQ that events come through into the embedded queue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IntakeConfig {
    /// Its URL, the source of the events, and the prefix.
    pub amqp: AmqpConfig,
    /// The patterns that the intake queue is bound to the exchange with; none with a source queue.
    pub bind: Vec<Pattern>,
}

/// The source of events.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Intake {
    /// Producers publish to this topic exchange.
    Exchange(String),
    /// The relay takes events from this existing queue.
    SourceQueue(String),
}

/// The table `[store]`: what hooktrail remembers, in `[queue] data_dir`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StoreConfig {
    /// The files `store.db` and `history.db`.
    Sqlite,
    None,
}

/// The table `[history]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HistoryConfig {
    /// The time for which events and deliveries are kept; zero: none are.
    pub retention: Duration,
    /// Bytes of `history.db`.
    pub max_bytes: u64,
    /// Whether events are kept with their bytes.
    pub bodies: bool,
}

/// The table `[admin]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdminConfig {
    pub listen: SocketAddr,
    /// The value of `token`. If other machines can connect there is this token, or one of `tokens`.
    pub token: Option<Secret>,
    /// The tables `[[admin.tokens]]`.
    pub tokens: Vec<Token>,
    /// Where browsers find the console, if a proxy with TLS is before it.
    pub public_url: Option<PublicUrl>,
    /// Whether subscribers can be made, changed and removed over the API.
    pub manage: bool,
    pub max_subscribers: Option<usize>,
    /// The endpoints that subscribers made over the API may have.
    pub api_subscribers: Reach,
}

/// The table `[admin.api_subscribers]`: the addresses that requests may go to, which no client of the
/// API can widen.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Reach {
    pub allow_http: bool,
    /// Networks that are allowed although they are not public.
    pub allow_addresses: Vec<IpNet>,
    pub proxy: Option<SecretUrl>,
}

/// The address at which browsers find the console: `https`, a host, and a port that is not the
/// usual one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublicUrl(Url);

impl PublicUrl {
    /// # Errors
    /// It has another scheme than `https`, or more than a host and a port.
    pub fn try_new(text: &str) -> Result<Self, &'static str> {
        const WRONG: &str = "must be https:// with a host, and a port if it is not 443: \"https://hooktrail.example.com\"";
        let url = Url::parse(text).map_err(|_| WRONG)?;
        let is_bare = url.path() == "/"
            && url.query().is_none()
            && url.fragment().is_none()
            && url.username().is_empty()
            && url.password().is_none();
        if url.scheme() == "https" && url.has_host() && is_bare {
            Ok(Self(url))
        } else {
            Err(WRONG)
        }
    }

    /// Scheme, host and port, as a browser sends them in `origin`.
    pub fn origin(&self) -> String {
        self.0.origin().ascii_serialization()
    }

    /// Host and port, as a browser sends them in `host`.
    pub fn host(&self) -> &str {
        &self.0[url::Position::BeforeHost..url::Position::AfterPort]
    }
}

impl AdminConfig {
    /// The name of the token `[admin] token`, which no other token has.
    pub const TOKEN: &str = "token";

    /// Every token, that of `[admin] token` first.
    pub fn all_tokens(&self) -> Vec<Token> {
        let name = Self::TOKEN.into();
        let own = self.token.clone().map(|secret| Token { name, secret, role: Role::Admin });
        own.into_iter().chain(self.tokens.iter().cloned()).collect()
    }

    /// The token that commands send: `[admin] token`, or else the first one of role `admin`.
    pub fn command_token(&self) -> Option<&Secret> {
        let first = self.tokens.iter().find(|token| token.role == Role::Admin);
        self.token.as_ref().or_else(|| first.map(|token| &token.secret))
    }
}

/// A bearer token of `/api`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Token {
    /// Unique. Operations are recorded with it.
    pub name: Arc<str>,
    /// Unique too.
    pub secret: Secret,
    pub role: Role,
}

/// The requests that a token may make.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// All requests.
    Admin,
    /// Requests that change nothing.
    Read,
    /// Publishing events, and nothing else.
    Intake,
}

impl Role {
    pub fn name(self) -> &'static str {
        match self {
            Self::Admin => "admin",
            Self::Read => "read",
            Self::Intake => "intake",
        }
    }

    /// Whether a token of this role may make a request that needs `needed`.
    pub fn may(self, needed: Self) -> bool {
        self == Self::Admin || self == needed
    }
}

/// The table `[metrics]`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MetricsConfig {
    /// `None`: as their number is at the start.
    pub per_subscriber: Option<bool>,
}

/// The table `[log]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogConfig {
    pub json: bool,
    pub level: tracing::Level,
}

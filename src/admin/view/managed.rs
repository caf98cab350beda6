//! Subscribers that are made, changed and removed over the API.

use std::fmt;

use serde::{Deserialize, Serialize, Serializer};
use serde_json::Value;

use super::Time;
use crate::{config, store};

/// The place where a subscriber is configured.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "from", rename_all = "snake_case")]
pub enum Origin {
    File {
        file: String,
        /// Its table begins there.
        line: usize,
    },
    Api {
        /// Its `ETag`, without quotes.
        version: String,
        /// Absent if it cannot be read.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        created: Option<Stamp>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        changed: Option<Stamp>,
    },
}

impl Origin {
    /// That of a subscriber of a file.
    pub fn of_file(origin: &config::Origin) -> Option<Self> {
        match origin {
            config::Origin::File { path, line } => {
                Some(Self::File { file: path.display().to_string(), line: *line })
            }
            config::Origin::Api => None,
        }
    }

    /// That of a subscriber that was made over the API.
    pub fn of_store(kept: &store::KeptSubscriber) -> Self {
        let (created, changed) = match kept {
            store::KeptSubscriber::Open(stored) => {
                (Some((&stored.created).into()), Some((&stored.changed).into()))
            }
            store::KeptSubscriber::Locked { .. } => (None, None),
        };
        Self::Api { version: kept.version().to_string(), created, changed }
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File { file, line } => write!(f, "{file}:{line}"),
            Self::Api { changed: Some(Stamp { at, by }), .. } => write!(f, "API, {by}, {at}"),
            Self::Api { changed: None, .. } => f.write_str("API"),
        }
    }
}

/// When something was done, and with whose token.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stamp {
    pub at: Time,
    pub by: String,
}

impl From<&store::Stamp> for Stamp {
    fn from(stamp: &store::Stamp) -> Self {
        Self { at: Time(stamp.at), by: stamp.by.clone() }
    }
}

/// One subscriber with its configuration.
#[derive(Debug, Serialize, Deserialize)]
pub struct SubscriberDetails {
    #[serde(flatten)]
    pub status: super::Subscriber,
    /// Every key with its value, defaults included, without secrets; absent if it cannot be read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub settings: Option<Value>,
    /// What was made over the API, without secrets. It can be sent back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub document: Option<Value>,
    /// The subscriber of this name that was made over the API, while one of a file wins over it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shadows: Option<Origin>,
}

/// A subscriber that was made or changed.
#[derive(Debug, Serialize, Deserialize)]
pub struct SubscriberChange {
    pub subscriber: String,
    /// The new `ETag`, without quotes.
    pub version: String,
    /// Whether its queue gets its events; otherwise that is retried until it does.
    pub bound: bool,
    /// Events count from then on; absent before it is bound, and of a change.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub active_since: Option<Time>,
    /// The signing secret that was made. It is not shown again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret: Option<NewSecret>,
    /// The secret before signs too, until then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub overlap_until: Option<Time>,
    /// Why it does not work with it yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
}

/// A secret that is told once: in this answer, and nowhere else.
#[derive(Clone, Deserialize)]
#[serde(transparent)]
pub struct NewSecret(String);

impl NewSecret {
    /// The secret, to be shown to whoever asked for it.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl From<String> for NewSecret {
    fn from(secret: String) -> Self {
        Self(secret)
    }
}

impl Serialize for NewSecret {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

impl fmt::Debug for NewSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[redacted]")
    }
}

/// A subscriber that was removed.
#[derive(Debug, Serialize, Deserialize)]
pub struct SubscriberRemoval {
    pub subscriber: String,
    /// `kept`, `dropped`, or `dropping`: not deleted yet, because the queue is still in use.
    pub backlog: String,
}

/// The body of a request to rotate a signing secret.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RotateSecret {
    /// How long the secret before signs too; 24 h if it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub overlap: Option<String>,
}

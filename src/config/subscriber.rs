//! A subscriber as it is configured.

use std::{
    fmt,
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime},
};

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use http::{HeaderName, HeaderValue};

use super::model::Model;
use crate::{
    clock,
    crypto::{
        secret::{Secret, SecretUrl},
        signature::Signer,
        tls::TlsPolicy,
    },
    delivery::SubscriberName,
    event::{
        Pattern, Tenant,
        audience::{Audience, Interest},
        condition::Conditions,
        entry::Metadata,
        payload::Format,
        redaction::Redaction,
    },
    policy::{
        address::AddressPolicy, answer::Success, batching::BatchPolicy,
        circuit_breaker::BreakerPolicy, rate::Rate, retry::RetryPolicy,
    },
    wording::span,
};

/// The configured subscribers, in the order of the files.
pub type Subscribers = Arc<[Arc<Subscriber>]>;

/// The patterns of subscribers; the owner of a pattern is its subscriber's index.
pub fn audience(subscribers: &[Arc<Subscriber>]) -> Audience {
    let patterns = |(index, s)| -> (u32, &Arc<Subscriber>) { (index, s) };
    let all = (0..).zip(subscribers).map(patterns);
    Audience::new(
        all.flat_map(|(index, s)| s.events.iter().map(move |p| (index, s.tenant.as_ref(), p))),
    )
}

/// The place where a subscriber is configured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// Its table begins at this line.
    File { path: PathBuf, line: usize },
    /// It was made over the API.
    Api,
}

/// The group `http` of a subscriber.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HttpPolicy {
    /// The longest time from a request's start on a connection to its answer's status; see
    /// [`Subscriber::longest_attempt`].
    pub timeout: Duration,
    pub connect_timeout: Duration,
    /// The most requests in flight.
    pub concurrency: usize,
    pub success: Success,
    pub compression: Compression,
    /// The most that is sent in a second.
    pub rate: Option<Rate>,
    pub allow_http: bool,
    pub addresses: AddressPolicy,
    /// With a proxy, the proxy resolves names and decides which addresses are allowed.
    pub proxy: Option<SecretUrl>,
}

impl Subscriber {
    /// What it is to get.
    pub fn interest(&self) -> Interest {
        Interest { patterns: self.events.clone(), tenant: self.tenant.clone() }
    }

    /// Whether one of its patterns matches an event's type.
    pub fn wants(&self, event_type: &str) -> bool {
        self.events.iter().any(|pattern| pattern.matches(event_type))
    }

    /// The longest that an attempt takes. Over HTTP/2, if the receiver allows fewer concurrent
    /// requests, one may wait for a stream as long as those before it take, and its own timeout
    /// starts after that. Over HTTP/1.1 it waits only for a connection.
    pub fn longest_attempt(&self) -> Duration {
        let HttpPolicy { timeout, connect_timeout, proxy, compression, .. } = &self.http;
        // HTTP/2 is negotiated in the TLS handshake only.
        let over_http_1 = self.url.expose().scheme() == "http" && proxy.is_none();
        let wait = if over_http_1 { *connect_timeout.min(timeout) } else { *timeout };
        // A request that is refused because it is compressed is sent a second time.
        let requests = if *compression == Compression::Gzip { 2 } else { 1 };
        let sent = (wait + *timeout + HttpPolicy::MARGIN) * requests;
        match self.auth {
            // One whose token is refused is sent again with another token.
            Some(Auth::OAuth2(_)) => (*timeout + sent) * 2,
            _ => sent,
        }
    }
}

/// The key `http.compression`: how request bodies are compressed. They are signed before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    None,
    Gzip,
}

impl Compression {
    /// The name in the configuration.
    pub const fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Gzip => "gzip",
        }
    }
}

impl HttpPolicy {
    /// The time that an attempt may take beyond its timeouts: for its own timeouts to fire first,
    /// and to read the answer's body.
    pub const MARGIN: Duration = Duration::from_secs(2);
}

/// The key `auth`: how a request authenticates.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Auth {
    /// HTTP Basic, RFC 7617.
    Basic { username: String, password: Secret },
    /// A bearer token, RFC 6750.
    Bearer(Secret),
    /// A bearer token that is fetched.
    OAuth2(ClientCredentials),
}

/// The key `auth.oauth2`: where tokens come from, and for whom (RFC 6749, section 4.4).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientCredentials {
    pub token_url: SecretUrl,
    pub client_id: String,
    pub client_secret: Secret,
    pub scope: Option<String>,
    /// What some servers want to know besides.
    pub audience: Option<String>,
}

impl Auth {
    /// The value of the header `authorization`; `None` if it is fetched.
    pub fn header(&self) -> Option<Secret> {
        match self {
            Self::Basic { username, password } => {
                let pair = BASE64.encode(format!("{username}:{}", password.expose()));
                Some(Secret::new(format!("Basic {pair}")))
            }
            Self::Bearer(token) => Some(Secret::new(format!("Bearer {}", token.expose()))),
            Self::OAuth2(_) => None,
        }
    }
}

/// The key `start_from`: from when on a new subscriber gets the events that history has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StartFrom {
    /// This long before it is bound.
    Before(Duration),
    At(SystemTime),
}

impl StartFrom {
    /// The point in time, for a subscriber that is bound `now`.
    pub fn at(self, now: SystemTime) -> SystemTime {
        let epoch = SystemTime::UNIX_EPOCH;
        match self {
            Self::Before(ago) => now.checked_sub(ago).map_or(epoch, |at| at.max(epoch)),
            Self::At(at) => at,
        }
    }
}

impl fmt::Display for StartFrom {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Before(ago) => write!(f, "-{}", span(*ago)),
            Self::At(at) => f.write_str(&clock::rfc3339(*at)),
        }
    }
}

/// One `[[subscriber]]`, with the defaults of its groups filled in.
#[derive(Debug, Clone)]
pub struct Subscriber {
    pub name: SubscriberName,
    pub origin: Origin,
    pub url: SecretUrl,
    pub events: Vec<Pattern>,
    /// The tenant whose events it gets; `None`: those of all.
    pub tenant: Option<Tenant>,
    /// The model of its receiver, as the key `preset` names it.
    pub preset: Option<&'static Model>,
    pub format: Format,
    /// The `content-type` of requests in this format, if it is not the format's own.
    pub content_type: Option<HeaderValue>,
    /// What the format puts beside each event.
    pub metadata: Metadata,
    pub secrets: Vec<Secret>,
    /// The key of `v1a` signatures.
    pub signing_key: Option<Secret>,
    pub signer: Signer,
    /// Headers added to each request; the values may be secrets.
    pub headers: Vec<(HeaderName, Secret)>,
    pub auth: Option<Auth>,
    pub tls: TlsPolicy,
    pub batch: BatchPolicy,
    pub http: HttpPolicy,
    pub retry: RetryPolicy,
    pub circuit_breaker: BreakerPolicy,
    /// The key `order`: nothing overtakes a batch that failed.
    pub in_order: bool,
    /// Which events of its patterns it gets.
    pub conditions: Conditions,
    /// What it is not to see of them.
    pub redaction: Redaction,
    /// Whether events without a field `event_id` get one, the producer's message id.
    pub event_ids: bool,
    /// Paused by the configuration, whatever the queue has recorded.
    pub paused: bool,
    /// A subscriber that is not new has no use for it.
    pub start_from: Option<StartFrom>,
}

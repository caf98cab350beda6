//! A subscriber as it is configured.

use std::{sync::Arc, time::Duration};

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use http::HeaderName;

use crate::{
    crypto::{
        secret::{Secret, SecretUrl},
        signature::Signer,
        tls::TlsPolicy,
    },
    delivery::SubscriberName,
    event::{Pattern, payload::Format},
    policy::{
        address::AddressPolicy, answer::Success, batching::BatchPolicy,
        circuit_breaker::BreakerPolicy, retry::RetryPolicy,
    },
};

/// Those that are configured, in the order of the file.
pub type Subscribers = Arc<[Arc<Subscriber>]>;

/// From `[http]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HttpPolicy {
    /// From when a request is on a connection until its answer's status; see
    /// [`Subscriber::longest_attempt`].
    pub timeout: Duration,
    pub connect_timeout: Duration,
    /// Requests in flight to the subscriber.
    pub concurrency: usize,
    pub success: Success,
    pub allow_http: bool,
    pub addresses: AddressPolicy,
    /// Then it decides about the addresses of names.
    pub proxy: Option<SecretUrl>,
}

impl Subscriber {
    /// Whether one of its patterns matches an event's type.
    pub fn wants(&self, event_type: &str) -> bool {
        self.events.iter().any(|pattern| pattern.matches(event_type))
    }

    /// The longest that an attempt takes. Over HTTP/2, where the receiver allows fewer requests at
    /// once, one may wait for a place on the connection as long as those before it take; its own
    /// time begins then. Over HTTP/1.1 it waits only for a connection.
    pub fn longest_attempt(&self) -> Duration {
        let HttpPolicy { timeout, connect_timeout, proxy, .. } = &self.http;
        // HTTP/2 is agreed on within TLS.
        let over_http_1 = self.url.expose().scheme() == "http" && proxy.is_none();
        let wait = if over_http_1 { *connect_timeout.min(timeout) } else { *timeout };
        wait + *timeout + HttpPolicy::MARGIN
    }
}

impl HttpPolicy {
    /// What an attempt may take beyond its times: that its own limits come first, and that the text
    /// of an answer is read.
    pub const MARGIN: Duration = Duration::from_secs(2);
}

/// How a request says whom it is from, from `auth`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Auth {
    /// RFC 7617.
    Basic { username: String, password: Secret },
    /// RFC 6750.
    Bearer(Secret),
}

impl Auth {
    /// The value of the header `authorization`.
    pub fn header(&self) -> Secret {
        match self {
            Self::Basic { username, password } => Secret::new(format!(
                "Basic {}",
                BASE64.encode(format!("{username}:{}", password.expose()))
            )),
            Self::Bearer(token) => Secret::new(format!("Bearer {}", token.expose())),
        }
    }
}

/// One `[[subscriber]]` with its groups' defaults filled in.
#[derive(Debug, Clone)]
pub struct Subscriber {
    pub name: SubscriberName,
    pub url: SecretUrl,
    pub events: Vec<Pattern>,
    pub format: Format,
    pub secrets: Vec<Secret>,
    pub signer: Signer,
    /// What the configuration adds to each request; the values may be secrets.
    pub headers: Vec<(HeaderName, Secret)>,
    pub auth: Option<Auth>,
    pub tls: TlsPolicy,
    pub batch: BatchPolicy,
    pub http: HttpPolicy,
    pub retry: RetryPolicy,
    pub circuit_breaker: BreakerPolicy,
    /// Events that have no field `event_id` get one: the producer's message id.
    pub event_ids: bool,
    /// Whatever the queue's record says.
    pub paused: bool,
}

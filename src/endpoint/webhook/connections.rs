//! The connections to an endpoint: their age, and which of them have answered before.

use std::{
    collections::HashSet,
    net::SocketAddr,
    sync::{Arc, Mutex, OnceLock, PoisonError, atomic::Ordering},
    time::{Duration, Instant},
};

use hyper_util::client::legacy::{self, connect::HttpInfo};
use reqwest::{Client, Proxy, Response, Url, redirect, retry};
use url::Host;

use super::{
    errors,
    resolver::{GuardedResolver, Lookup},
};
use crate::{
    clock,
    config::{HttpPolicy, Subscriber},
    crypto::tls::SystemRoots,
};

/// The age from which a connection gets no further request, so that a name that leads elsewhere by
/// then is followed, also under steady traffic. It is the TTL of many names.
pub(super) const MAX_AGE: Duration = Duration::from_secs(5 * 60);

/// The most connections that are remembered to have answered; with more, all are forgotten.
const MAX_ANSWERED: usize = 4096;

/// The settings of connections, and the current ones.
#[derive(Debug)]
pub(super) struct Connections {
    tls: rustls::ClientConfig,
    http: HttpPolicy,
    route: Route,
    kept: Mutex<Kept>,
    /// Keeps no connection: each request has one of its own.
    single: OnceLock<Client>,
}

#[derive(Debug)]
enum Route {
    Direct(Arc<GuardedResolver>),
    /// Only the proxy's name is resolved here; the proxy decides where it connects to.
    Through(Box<Proxy>),
}

/// A client that keeps its connections for the next request.
#[derive(Debug, Clone)]
pub(super) struct Kept {
    pub(super) client: Client,
    since: Instant,
    pub(super) answered: Arc<Answered>,
}

impl Connections {
    /// # Errors
    /// The TLS configuration cannot be built.
    pub(super) fn try_new(
        subscriber: &Subscriber,
        system: &SystemRoots,
        lookup: Lookup,
    ) -> Result<Self, String> {
        let tls = subscriber.tls.client_config(system)?;
        let http = subscriber.http.clone();
        let route = match &http.proxy {
            None => Route::Direct(Arc::new(GuardedResolver::new(http.addresses.clone(), lookup))),
            Some(proxy) => Route::Through(Box::new(
                Proxy::all(proxy.expose().clone()).map_err(|e| errors::chain(&e.without_url()))?,
            )),
        };
        let client = client(&tls, &http, &route, http.concurrency)?;
        let kept = Mutex::new(Kept { client, since: clock::instant(), answered: Arc::default() });
        Ok(Self { tls, http, route, kept, single: OnceLock::new() })
    }

    /// A client without connections older than [`MAX_AGE`]. Requests in flight keep theirs.
    ///
    /// # Errors
    /// As [`try_new`](Self::try_new).
    pub(super) fn kept(&self, now: Instant) -> Result<Kept, String> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if now.saturating_duration_since(kept.since) >= MAX_AGE {
            let client = client(&self.tls, &self.http, &self.route, self.http.concurrency)?;
            *kept = Kept { client, since: now, answered: Arc::default() };
        }
        Ok(kept.clone())
    }

    /// Whether an endpoint has only IPv4 addresses, as far as that is known.
    pub(super) fn only_v4(&self, url: &Url) -> bool {
        match (&self.route, url.host()) {
            (Route::Direct(_), Some(Host::Ipv4(_))) => true,
            (Route::Direct(resolver), Some(Host::Domain(_))) => {
                resolver.only_v4.load(Ordering::Relaxed)
            }
            _ => false,
        }
    }

    /// A client that makes a connection for each request.
    ///
    /// # Errors
    /// As [`try_new`](Self::try_new).
    pub(super) fn single(&self) -> Result<Client, String> {
        if let Some(single) = self.single.get() {
            return Ok(single.clone());
        }
        let client = client(&self.tls, &self.http, &self.route, 0)?;
        Ok(self.single.get_or_init(|| client).clone())
    }
}

fn client(
    tls: &rustls::ClientConfig,
    http: &HttpPolicy,
    route: &Route,
    idle: usize,
) -> Result<Client, String> {
    let HttpPolicy { timeout, connect_timeout, .. } = http;
    let client = Client::builder()
        .tls_backend_preconfigured(tls.clone())
        // Within the time of an attempt, so that a longer wait is known to be for something else.
        .connect_timeout(*connect_timeout.min(timeout))
        .pool_max_idle_per_host(idle)
        .pool_idle_timeout(Duration::from_secs(30))
        .tcp_keepalive(Duration::from_secs(30))
        // HTTP/2 has only one connection: one that died in silence must not cost two waits.
        .http2_keep_alive_interval(Some(*timeout / 3))
        .http2_keep_alive_timeout(*connect_timeout)
        // A receiver that has accepted a batch must not be refused for how its proxy writes headers
        // (RFC 9112, sections 5.1 and 5.2, lets a user agent read them so). Not
        // `http1_max_headers`: with any number set, hyper fills a list of that length for each
        // `100 Continue`, and with 1,000 a flood of those took 47 s of a thread.
        .http1_allow_obsolete_multiline_headers_in_responses(true)
        .http1_allow_spaces_after_header_name_in_responses(true)
        .http1_ignore_invalid_headers_in_responses(true)
        .redirect(redirect::Policy::none())
        .retry(retry::never())
        .no_proxy();
    let client = match route {
        Route::Direct(resolver) => client.dns_resolver(resolver.clone()),
        Route::Through(proxy) => client.proxy(Proxy::clone(proxy)),
    };
    client.build().map_err(|e| errors::chain(&e.without_url()))
}

/// The two ends of a connection.
type Ends = (SocketAddr, SocketAddr);

/// Connections that have answered. The next request on one of them may cross the receiver's closing
/// it.
#[derive(Debug, Default)]
pub(super) struct Answered(Mutex<HashSet<Ends>>);

impl Answered {
    pub(super) fn add(&self, response: &Response) {
        if let Some(info) = response.extensions().get::<HttpInfo>() {
            self.add_ends((info.local_addr(), info.remote_addr()));
        }
    }

    fn add_ends(&self, ends: Ends) {
        let mut answered = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if answered.len() >= MAX_ANSWERED {
            answered.clear();
        }
        answered.insert(ends);
    }

    /// Whether a request failed on one of them.
    pub(super) fn has(&self, e: &legacy::Error) -> bool {
        let mut known = http::Extensions::new();
        if let Some(connected) = e.connect_info() {
            connected.get_extras(&mut known);
        }
        let ends = known.get::<HttpInfo>().map(|info| (info.local_addr(), info.remote_addr()));
        ends.is_some_and(|ends| {
            self.0.lock().unwrap_or_else(PoisonError::into_inner).contains(&ends)
        })
    }
}

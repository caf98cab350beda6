//! One attempt: a signed request to a receiver, and what came of it. Nothing else knows reqwest.

use std::{
    error::Error as _,
    fmt,
    io::ErrorKind,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use reqwest::{
    Client, Proxy, Url,
    dns::{Addrs, Name, Resolve, Resolving},
    header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, RETRY_AFTER, USER_AGENT},
    redirect, retry,
};

use tokio::sync::Semaphore;

use crate::{
    address::AddressPolicy,
    answer::{Answer, Success},
    clock,
    config::{HttpPolicy, Subscriber},
    payload::Format,
    retry::MAX_DELAY,
    signature::Signer,
    tls::SystemRoots,
};

/// The most of an answer's body that is read, in bytes; what follows is not waited for.
const MAX_ANSWER: usize = 64 * 1024;

/// What of an answer's text is kept for a dead letter, in bytes.
const MAX_EXCERPT: usize = 1024;

const EXCEPTIONS: &str = "see http.allow_addresses and http.allow_private_addresses";

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
            Self::Retry { failure, .. } | Self::Gone { failure } | Self::TooLarge { failure, .. } | Self::Refused { failure, .. } => {
                Some(failure)
            }
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
    /// A stable name for logs and metrics.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Status { .. } => "status",
            Self::Dns(_) => "dns",
            Self::AddressBlocked(_) => "address_blocked",
            Self::Connect(_) => "connect",
            Self::Tls(_) => "tls",
            Self::Timeout => "timeout",
            Self::Reset { .. } => "reset",
            Self::BadAnswer(_) => "bad_answer",
            Self::Internal(_) => "internal",
        }
    }

    pub const fn status(&self) -> Option<u16> {
        match self {
            Self::Status { status, .. } => Some(*status),
            _ => None,
        }
    }

    /// What this side found out about it: nothing that the receiver wrote, so that it may be logged.
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

/// The whole story, for a dead letter: a receiver's text included.
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

/// What is sent in one attempt.
#[derive(Debug, Clone)]
pub struct Request {
    pub batch_id: String,
    /// From 1.
    pub attempt: u32,
    pub format: Format,
    pub body: Bytes,
    /// An operator has sent the batch again.
    pub replay: bool,
}

/// What came back.
struct Response {
    status: u16,
    retry_after: Option<Duration>,
    /// Its beginning.
    text: Vec<u8>,
}

/// An attempt as an operator looks at it.
#[derive(Debug)]
pub struct Rehearsal {
    /// What was sent; `None` is a secret.
    pub headers: Vec<(String, Option<String>)>,
    /// The status, and the beginning of the text on one line.
    pub answer: Option<(u16, String)>,
    pub outcome: Outcome,
}

/// A subscriber's endpoint: its own connections, so that no other's requests wait for them.
#[derive(Debug, Clone)]
pub struct Webhook {
    client: Client,
    url: Url,
    /// Those that the configuration names, `authorization` among them.
    own_headers: HeaderMap,
    signer: Signer,
    success: Success,
    timeout: Duration,
    /// A literal address is not resolved, so the resolver never sees it. The configuration refuses
    /// one that is not allowed; this is for a subscriber that came another way.
    literal_blocked: Option<&'static str>,
}

impl Webhook {
    /// # Errors
    /// The TLS configuration cannot be built, because the system has no root certificates for example.
    pub fn try_new(subscriber: &Subscriber, system: &SystemRoots) -> Result<Self, String> {
        Self::with_lookup(subscriber, system, Lookup::of_system())
    }

    /// The same endpoint under another configuration. Where that leaves alone what connections are made of, they are kept.
    ///
    /// # Errors
    /// As [`try_new`](Self::try_new).
    pub fn renewed(&self, old: &Subscriber, new: &Subscriber, system: &SystemRoots) -> Result<Self, String> {
        let made_of = |s: &Subscriber| {
            let HttpPolicy { timeout, connect_timeout, concurrency, addresses, proxy, .. } = s.http.clone();
            (timeout, connect_timeout, concurrency, addresses, proxy)
        };
        if made_of(old) == made_of(new) && old.tls.is_same(&new.tls) {
            return Self::with_client(self.client.clone(), new);
        }
        Self::try_new(new, system)
    }

    fn with_lookup(subscriber: &Subscriber, system: &SystemRoots, lookup: Lookup) -> Result<Self, String> {
        let HttpPolicy { timeout, connect_timeout, concurrency, addresses, proxy, .. } = &subscriber.http;
        let client = Client::builder()
            .tls_backend_preconfigured(subscriber.tls.client_config(system)?)
            .connect_timeout(*connect_timeout)
            .timeout(*timeout)
            .pool_max_idle_per_host(*concurrency)
            .pool_idle_timeout(Duration::from_secs(30))
            .tcp_keepalive(Duration::from_secs(30))
            // Over HTTP/2 one connection is all there is: one that died in silence is not to be waited for twice.
            .http2_keep_alive_interval(Some(*timeout / 3))
            .http2_keep_alive_timeout(*connect_timeout)
            .redirect(redirect::Policy::none())
            .retry(retry::never())
            .no_proxy();
        let client = match proxy {
            None => client.dns_resolver(Arc::new(GuardedResolver { policy: addresses.clone(), lookup })),
            // It alone is resolved here, and where it leads is its own decision.
            Some(proxy) => client.proxy(Proxy::all(proxy.expose().clone()).map_err(|e| chain(&e.without_url()))?),
        };
        let client = client.build().map_err(|e| chain(&e.without_url()))?;
        Self::with_client(client, subscriber)
    }

    fn with_client(client: Client, subscriber: &Subscriber) -> Result<Self, String> {
        let url = subscriber.url.expose().clone();
        let literal_blocked = subscriber.http.addresses.check_literal(&url).err();
        let (own_headers, signer) = (own_headers(subscriber)?, subscriber.signer.clone());
        let HttpPolicy { timeout, success, .. } = subscriber.http;
        Ok(Self { client, url, own_headers, signer, success, timeout, literal_blocked })
    }

    /// Makes one attempt. It ends within the configured timeout whatever the receiver does.
    pub async fn send(&self, request: Request) -> Outcome {
        match self.request(&request) {
            Ok(headers) => self.judge(self.exchange(headers, request.body).await),
            Err(failure) => retry(failure),
        }
    }

    /// As [`send`](Self::send), and tells what was sent and what came back.
    pub async fn rehearse(&self, request: Request) -> Rehearsal {
        let headers = match self.request(&request) {
            Ok(headers) => headers,
            Err(failure) => return Rehearsal { headers: Vec::new(), answer: None, outcome: retry(failure) },
        };
        let shown = |(name, value): (&HeaderName, &HeaderValue)| {
            let value = if value.is_sensitive() { None } else { value.to_str().ok().map(str::to_owned) };
            (name.to_string(), value)
        };
        let sent = headers.iter().map(shown).collect();
        let result = self.exchange(headers, request.body).await;
        let answer = result.as_ref().ok().map(|r| (r.status, excerpt(&r.text)));
        Rehearsal { headers: sent, answer, outcome: self.judge(result) }
    }

    /// The headers of an attempt that is made now, if it may be made at all.
    fn request(&self, request: &Request) -> Result<HeaderMap, Failure> {
        if let Some(what) = self.literal_blocked {
            return Err(Failure::AddressBlocked(format!("the URL's address is not a public one ({what}); {EXCEPTIONS}")));
        }
        self.headers(request, clock::now()).map_err(Failure::Internal)
    }

    /// Sends a request and reads the answer, within the timeout.
    async fn exchange(&self, headers: HeaderMap, body: Bytes) -> Result<Response, Failure> {
        // The client has the same limit; this one also bounds whatever it does besides.
        let limit = self.timeout + Duration::from_secs(1);
        let exchange = async {
            let mut response = self.client.post(self.url.clone()).headers(headers).body(body).send().await?;
            let status = response.status().as_u16();
            let now = clock::now();
            let retry_after = response.headers().get(RETRY_AFTER).and_then(|v| v.to_str().ok()).and_then(|v| parse_retry_after(v, now));
            let mut text = Vec::new();
            let mut read = 0;
            // The answer is read to its end, so that the connection can be used again and a receiver that
            // breaks off is noticed, but only so far.
            while read < MAX_ANSWER
                && let Some(chunk) = response.chunk().await?
            {
                read += chunk.len();
                text.extend_from_slice(&chunk[..chunk.len().min(MAX_EXCERPT - text.len())]);
            }
            Ok(Response { status, retry_after, text })
        };
        tokio::time::timeout(limit, exchange).await.map_err(|_| Failure::Timeout)?.map_err(classify)
    }

    fn judge(&self, result: Result<Response, Failure>) -> Outcome {
        let Response { status, retry_after, text } = match result {
            Ok(response) => response,
            Err(failure) => return retry(failure),
        };
        let failure = Failure::Status { status, excerpt: excerpt(&text) };
        match Answer::of(status, self.success) {
            Answer::Accepted => Outcome::Delivered { status },
            Answer::Later => Outcome::Retry { failure, retry_after },
            Answer::Gone => Outcome::Gone { failure },
            Answer::TooLarge => Outcome::TooLarge { failure, retry_after },
            Answer::Refused => Outcome::Refused { failure, retry_after },
        }
    }

    fn headers(&self, request: &Request, now: SystemTime) -> Result<HeaderMap, String> {
        let mut headers = self.own_headers.clone();
        headers.insert(USER_AGENT, HeaderValue::from_static(concat!("hooktrail/", env!("CARGO_PKG_VERSION"))));
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(request.format.content_type()));
        headers.insert(HeaderName::from_static("x-hooktrail-attempt"), HeaderValue::from(request.attempt));
        if request.replay {
            headers.insert(HeaderName::from_static("x-hooktrail-replay"), HeaderValue::from_static("true"));
        }
        for (name, value) in self.signer.headers(&request.batch_id, clock::unix_seconds(now), &request.body) {
            let name = HeaderName::try_from(name).map_err(|e| e.to_string())?;
            headers.insert(name, HeaderValue::try_from(value).map_err(|e| e.to_string())?);
        }
        Ok(headers)
    }
}

/// The headers that every request of a subscriber has. Marked as sensitive, so that they are not printed, and
/// HTTP/2 does not put them into its table.
fn own_headers(subscriber: &Subscriber) -> Result<HeaderMap, String> {
    let authorization = subscriber.auth.as_ref().map(|auth| (AUTHORIZATION, auth.header()));
    let mut headers = HeaderMap::new();
    for (name, value) in subscriber.headers.iter().cloned().chain(authorization) {
        let mut value = HeaderValue::try_from(value.expose()).map_err(|_| format!("header `{name}` cannot be sent"))?;
        value.set_sensitive(true);
        headers.insert(name, value);
    }
    Ok(headers)
}

fn retry(failure: Failure) -> Outcome {
    Outcome::Retry { failure, retry_after: None }
}

/// Readable on one line, whatever the receiver sent.
fn excerpt(text: &[u8]) -> String {
    let text = String::from_utf8_lossy(text);
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect::<String>().trim().to_owned()
}

/// RFC 9110, section 10.2.3: a number of seconds or a date. At most [`MAX_DELAY`].
pub fn parse_retry_after(value: &str, now: SystemTime) -> Option<Duration> {
    let value = value.trim();
    let wait = if !value.is_empty() && value.bytes().all(|b| b.is_ascii_digit()) {
        // More digits than a number holds are still a wish to wait long.
        value.parse().map_or(MAX_DELAY, Duration::from_secs)
    } else {
        httpdate::parse_http_date(value).ok()?.duration_since(now).unwrap_or_default()
    };
    Some(wait.min(MAX_DELAY))
}

/// The causes of an error, without the URL.
fn chain(e: &reqwest::Error) -> String {
    let mut text = Vec::new();
    let mut cause = e.source();
    while let Some(c) = cause {
        text.push(c.to_string());
        cause = c.source();
    }
    // Each level repeats the next in its own text: the last one says it best.
    text.pop().unwrap_or_else(|| e.to_string())
}

fn classify(e: reqwest::Error) -> Failure {
    let e = e.without_url();
    let mut cause = e.source();
    while let Some(c) = cause {
        if let Some(blocked) = c.downcast_ref::<Blocked>() {
            return Failure::AddressBlocked(blocked.to_string());
        }
        if let Some(ResolveError(why)) = c.downcast_ref::<ResolveError>() {
            return Failure::Dns(why.clone());
        }
        if let Some(tls) = tls_error(c) {
            return Failure::Tls(tls);
        }
        cause = c.source();
    }
    if e.is_timeout() {
        return Failure::Timeout;
    }
    let why = chain(&e);
    if e.is_connect() {
        Failure::Connect(why)
    } else if e.is_builder() {
        Failure::Internal(why)
    } else if is_io(&e) {
        Failure::Reset { why, while_sending: false }
    } else {
        Failure::BadAnswer(why)
    }
}

fn tls_error(e: &(dyn std::error::Error + 'static)) -> Option<String> {
    if let Some(tls) = e.downcast_ref::<rustls::Error>() {
        return Some(tls.to_string());
    }
    // The connector puts the I/O error of the handshake into one of its own, and `source` passes by what is inside.
    tls_error(e.downcast_ref::<std::io::Error>()?.get_ref()?)
}

/// Whether the connection broke, rather than what came over it being wrong.
fn is_io(e: &reqwest::Error) -> bool {
    let mut cause = e.source();
    while let Some(c) = cause {
        let io = c.downcast_ref::<std::io::Error>();
        // hyper reports malformed chunks as I/O errors of these kinds; no connection breaks with them.
        if io.is_some_and(|e| matches!(e.kind(), ErrorKind::InvalidInput | ErrorKind::InvalidData)) {
            return false;
        }
        // Canceled: it was gone before the request was on its way.
        let ended = |e: &hyper::Error| e.is_canceled() || e.is_closed() || e.is_incomplete_message();
        if io.is_some() || c.downcast_ref().is_some_and(ended) {
            return true;
        }
        cause = c.source();
    }
    false
}

/// Resolves names and lets through only addresses that may be connected to: those that it returns
/// are the ones connected to, so nothing can change between the look and the connection.
#[derive(Debug)]
struct GuardedResolver {
    policy: AddressPolicy,
    lookup: Lookup,
}

type Found = BoxFuture<'static, std::io::Result<Vec<SocketAddr>>>;

/// Asks for the addresses of a name.
#[derive(Clone)]
struct Lookup(Arc<dyn Fn(String) -> Found + Send + Sync>);

/// Names that are asked for at once for a subscriber. The system's resolver has a thread for each, also when nobody waits for its
/// answer any more; all subscribers share 512 of them, and a name server that hangs must not use them up.
const LOOKUPS: usize = 4;

impl Lookup {
    fn of_system() -> Self {
        Self(Arc::new(|name| Box::pin(async move { Ok(tokio::net::lookup_host((name, 0)).await?.collect()) }))).at_a_time(LOOKUPS)
    }

    /// Each counts until it has its answer, whoever still waits for that.
    fn at_a_time(self, limit: usize) -> Self {
        let room = Arc::new(Semaphore::new(limit));
        Self(Arc::new(move |name| {
            let (room, lookup) = (room.clone(), self.0.clone());
            Box::pin(async move {
                let permit = room.acquire_owned().await;
                let found = tokio::spawn(async move {
                    let found = lookup(name).await;
                    drop(permit);
                    found
                });
                found.await.map_err(std::io::Error::other)?
            })
        }))
    }
}

impl fmt::Debug for Lookup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Lookup")
    }
}

#[derive(Debug)]
struct Blocked {
    address: std::net::IpAddr,
    what: &'static str,
}

impl fmt::Display for Blocked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the name resolves to {}, which is not a public address ({}); {EXCEPTIONS}", self.address, self.what)
    }
}

impl std::error::Error for Blocked {}

#[derive(Debug)]
struct ResolveError(String);

impl fmt::Display for ResolveError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for ResolveError {}

impl Resolve for GuardedResolver {
    fn resolve(&self, name: Name) -> Resolving {
        let policy = self.policy.clone();
        let found = (self.lookup.0)(name.as_str().to_owned());
        Box::pin(async move {
            let found = found.await.map_err(|e| ResolveError(e.to_string()))?;
            permitted(&policy, found.into_iter())
        })
    }
}

/// The addresses that may be connected to.
fn permitted(policy: &AddressPolicy, found: impl Iterator<Item = SocketAddr>) -> Result<Addrs, Box<dyn std::error::Error + Send + Sync>> {
    let mut blocked = None;
    let mut allowed = Vec::new();
    for address in found {
        match policy.check(address.ip()) {
            Ok(()) => allowed.push(address),
            Err(what) => blocked = Some(Blocked { address: address.ip(), what }),
        }
    }
    match (allowed.is_empty(), blocked) {
        (true, Some(blocked)) => Err(Box::new(blocked)),
        (true, None) => Err(Box::new(ResolveError("the name has no address".to_owned()))),
        (false, _) => Ok(Box::new(allowed.into_iter())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        collections::VecDeque,
        sync::{
            Mutex,
            atomic::{AtomicUsize, Ordering},
        },
    };
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    #[test]
    fn retry_after_is_seconds_or_a_date() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(784_111_777); // Sun, 06 Nov 1994 08:49:37 GMT
        for (value, expected) in [
            ("120", Some(120)),
            (" 0 ", Some(0)),
            ("Sun, 06 Nov 1994 08:50:37 GMT", Some(60)),
            ("Sunday, 06-Nov-94 08:50:37 GMT", Some(60)),
            ("Sun, 06 Nov 1994 08:00:00 GMT", Some(0)),
            ("99999999999999999999999", Some(MAX_DELAY.as_secs())),
            ("86400000", Some(MAX_DELAY.as_secs())),
            ("", None),
            ("-1", None),
            ("1.5", None),
            ("soon", None),
        ] {
            assert_eq!(parse_retry_after(value, now), expected.map(Duration::from_secs), "{value}");
        }
    }

    #[test]
    fn of_a_name_with_several_addresses_only_the_permitted_ones_are_connected_to() {
        let of = |ips: &[&str]| {
            let addresses: Vec<SocketAddr> = ips.iter().map(|ip| SocketAddr::new(ip.parse().expect("an address"), 0)).collect();
            permitted(&AddressPolicy::default(), addresses.into_iter()).map(|a| a.map(|a| a.ip().to_string()).collect::<Vec<_>>())
        };
        assert_eq!(of(&["1.1.1.1", "127.0.0.1"]).expect("one is public"), ["1.1.1.1"]);
        let e = of(&["10.0.0.1", "::1"]).expect_err("none is public");
        assert!(e.downcast_ref::<Blocked>().is_some(), "{e}");
        assert!(of(&[]).expect_err("none at all").to_string().contains("no address"));
    }

    /// A subscriber with this URL that may connect to what `http` allows.
    fn subscriber(url: &str, http: &str) -> Subscriber {
        rustls::crypto::ring::default_provider().install_default().ok();
        let text = format!(
            "[queue]\nurl = \"amqp://unused\"\n[[subscriber]]\nname = \"a\"\nurl = \"{url}\"\nsignatures = []\nhttp = {{ allow_http = true, {http} }}\n"
        );
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("h.toml");
        std::fs::write(&path, text).expect("writes");
        let config = crate::config::load(&path).unwrap_or_else(|e| panic!("{e}"));
        Subscriber::clone(&config.subscribers[0])
    }

    fn request() -> Request {
        Request { batch_id: "msg_1".to_owned(), attempt: 1, format: Format::Json, body: Bytes::from_static(b"{}"), replay: false }
    }

    #[tokio::test]
    async fn a_literal_address_that_is_not_allowed_is_not_connected_to_even_if_the_configuration_did_not_refuse_it() {
        let socket = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        socket.set_nonblocking(true).expect("sets");
        let url = format!("http://{}/", socket.local_addr().expect("an address"));
        let mut subscriber = subscriber(&url, "allow_private_addresses = true");
        subscriber.http.addresses = AddressPolicy::default();
        let webhook = Webhook::try_new(&subscriber, &SystemRoots::load().expect("roots")).expect("builds");
        let outcome = webhook.send(request()).await;
        assert!(
            matches!(&outcome, Outcome::Retry { failure: Failure::AddressBlocked(why), .. } if why.contains("loopback")),
            "{outcome:?}"
        );
        assert_eq!(socket.accept().map(drop).map_err(|e| e.kind()), Err(ErrorKind::WouldBlock), "not even a connection");
    }

    /// Answers each connection once and counts them.
    async fn counting(address: &str) -> (SocketAddr, Arc<AtomicUsize>) {
        let socket = tokio::net::TcpListener::bind(address).await.expect("a port");
        let (local, count) = (socket.local_addr().expect("an address"), Arc::new(AtomicUsize::new(0)));
        let counter = count.clone();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = socket.accept().await {
                counter.fetch_add(1, Ordering::SeqCst);
                tokio::spawn(async move {
                    let mut request = [0; 4096];
                    let _read = stream.read(&mut request).await?;
                    stream.write_all(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 0\r\n\r\n").await
                });
            }
        });
        (local, count)
    }

    /// What an attempt comes to when a name is answered with these addresses, one answer after the other.
    async fn attempts(port: u16, answers: &[&[&str]]) -> Vec<Outcome> {
        // Of the loopback addresses one stands for those that may be connected to.
        let subscriber = subscriber(&format!("http://rebinding.example:{port}/"), "allow_addresses = [\"127.0.0.1\"]");
        let of = |ips: &&[&str]| ips.iter().map(|ip| SocketAddr::new(ip.parse().expect("an address"), 0)).collect();
        let answers: Arc<Mutex<VecDeque<Vec<SocketAddr>>>> = Arc::new(Mutex::new(answers.iter().map(of).collect()));
        let asked = answers.clone();
        let lookup = Lookup(Arc::new(move |name| {
            assert_eq!(name, "rebinding.example");
            let answer = asked.lock().expect("not poisoned").pop_front().expect("is asked no more often");
            Box::pin(async move { Ok(answer) })
        }));
        let webhook = Webhook::with_lookup(&subscriber, &SystemRoots::load().expect("roots"), lookup).expect("builds");
        let mut outcomes = Vec::new();
        while !answers.lock().expect("not poisoned").is_empty() {
            outcomes.push(webhook.send(request()).await);
        }
        outcomes
    }

    #[tokio::test]
    async fn the_address_that_was_checked_is_the_one_that_is_connected_to_at_each_attempt() {
        let (allowed, to_allowed) = counting("127.0.0.1:0").await;
        let (_, to_blocked) = counting(&format!("127.0.0.2:{}", allowed.port())).await;
        let outcomes =
            attempts(allowed.port(), &[&["127.0.0.1"], &["127.0.0.2"], &["127.0.0.2", "127.0.0.1"], &["127.0.0.2", "::1"]]).await;
        let delivered = |o: &Outcome| *o == Outcome::Delivered { status: 200 };
        let blocked = |o: &Outcome| matches!(o, Outcome::Retry { failure: Failure::AddressBlocked(_), .. });
        assert!(delivered(&outcomes[0]) && blocked(&outcomes[1]), "a name that changes: {outcomes:?}");
        assert!(delivered(&outcomes[2]) && blocked(&outcomes[3]), "a name with several addresses: {outcomes:?}");
        assert_eq!((to_allowed.load(Ordering::SeqCst), to_blocked.load(Ordering::SeqCst)), (2, 0));
    }

    #[tokio::test]
    async fn no_spelling_of_localhost_as_a_name_gets_through() {
        for name in ["localhost", "LOCALHOST", "LocalHost", "localhost.", "a.localhost", "localhost.localdomain", "ip6-localhost"] {
            let url: Url = format!("http://{name}/").parse().expect("a URL");
            let resolver = GuardedResolver { policy: AddressPolicy::default(), lookup: Lookup::of_system() };
            let name: Name = url.host_str().expect("a host").parse().expect("a name");
            let resolved = resolver.resolve(name).await.map(|a| a.collect::<Vec<_>>());
            let e = resolved.expect_err(url.as_str());
            assert!(e.is::<Blocked>() || e.is::<ResolveError>(), "{url}: {e}");
        }
    }

    #[tokio::test]
    async fn lookups_that_hang_use_up_no_more_than_their_share_of_threads_whoever_still_waits_for_them() {
        let (asked, answers) = (Arc::new(AtomicUsize::new(0)), Arc::new(Semaphore::new(0)));
        let (counts, waits) = (asked.clone(), answers.clone());
        let hangs = Lookup(Arc::new(move |_| {
            counts.fetch_add(1, Ordering::SeqCst);
            let waits = waits.clone();
            Box::pin(async move {
                waits.acquire().await.expect("open").forget();
                Ok(Vec::new())
            })
        }));
        let lookup = hangs.at_a_time(2);
        for _ in 0..10 {
            let given_up = tokio::time::timeout(Duration::from_millis(10), (lookup.0)("a.example".to_owned())).await;
            assert!(given_up.is_err());
        }
        assert_eq!(asked.load(Ordering::SeqCst), 2);
        answers.add_permits(3);
        assert_eq!((lookup.0)("a.example".to_owned()).await.expect("answers"), []);
        assert_eq!(asked.load(Ordering::SeqCst), 3);
    }

    #[test]
    fn a_tls_error_is_found_inside_of_io_errors() {
        let tls = || rustls::Error::DecryptError;
        let once = std::io::Error::other(tls());
        let twice = std::io::Error::other(std::io::Error::other(tls()));
        assert_eq!(tls_error(&once), Some(tls().to_string()));
        assert_eq!(tls_error(&twice), Some(tls().to_string()));
        assert_eq!(tls_error(&std::io::Error::other("something else")), None);
        assert_eq!(tls_error(&std::io::Error::from(ErrorKind::ConnectionReset)), None);
    }

    #[test]
    fn an_excerpt_is_one_readable_line() {
        assert_eq!(excerpt(b" a\r\n\x1b[31mb\xff\n"), "a   [31mb\u{fffd}");
    }
}

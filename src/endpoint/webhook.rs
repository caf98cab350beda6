//! One attempt: a signed request to a receiver, and its outcome. No other module sends requests to
//! receivers.

mod body;
mod compression;
mod connections;
mod errors;
mod resolver;
mod tokens;

use std::{
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use bytes::Bytes;
use percent_encoding::percent_decode_str;
use reqwest::{
    Body, StatusCode, Url,
    header::{
        AUTHORIZATION, CONTENT_ENCODING, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue,
        RETRY_AFTER, USER_AGENT,
    },
};

use self::{
    body::{Late, Outgoing, Progress},
    compression::{Coding, Compressing, GZIP, compressed, is_about_coding},
    connections::Connections,
    errors::NotAnswered,
    resolver::Lookup,
    tokens::{NoToken, Token, Tokens},
};
use crate::{
    clock,
    config::{Auth, Compression, HttpPolicy, Subscriber, changes::Differences, keys::Affects},
    crypto::{secret::Secret, signature::Signer, tls::SystemRoots},
    delivery::{BatchId, Failure, Outcome, is_traceparent},
    event::payload::Format,
    policy::{
        answer::{Answer, Success},
        retry::MAX_DELAY,
    },
};

/// Bytes of an answer's body that are read; the rest is not awaited.
const MAX_ANSWER: usize = 64 * 1024;

/// The longest wait for an answer's body. The status has decided the outcome; the body is read so
/// that the connection can be reused, and for the reader of a dead letter.
const BODY_TIME: Duration = Duration::from_secs(1);

const _: () = assert!(
    body::GRACE.as_secs() + BODY_TIME.as_secs() == HttpPolicy::MARGIN.as_secs(),
    "what an attempt may take"
);

/// Bytes of an answer's text that are kept for a dead letter.
const MAX_EXCERPT: usize = 1024;

/// The answer to a token that is not, or no longer, taken.
const UNAUTHORIZED: u16 = StatusCode::UNAUTHORIZED.as_u16();

const NO_STREAM: &str = "over HTTP/2 the receiver allows fewer requests at once, and none of them ended within http.timeout: \
                         set http.concurrency to what it allows";

const EXCEPTIONS: &str = "see http.allow_addresses and http.allow_private_addresses";

/// The request of one attempt.
#[derive(Debug, Clone)]
pub struct Request {
    pub batch_id: BatchId,
    /// From 1.
    pub attempt: u32,
    pub format: Format,
    pub body: Bytes,
    pub traceparent: Option<String>,
    /// An operator replayed the batch.
    pub replay: bool,
}

/// An answer.
struct Response {
    status: u16,
    retry_after: Option<Duration>,
    /// The beginning of its text.
    text: Vec<u8>,
}

/// An attempt with everything that an operator wants to see of it.
#[derive(Debug)]
pub struct TestAttempt {
    /// The headers that were sent; the value of a secret one is `None`.
    pub headers: Vec<(String, Option<String>)>,
    /// It was sent compressed before, and answered 415.
    pub refused_coding: bool,
    /// The status, and the beginning of the text on one line.
    pub answer: Option<(u16, String)>,
    pub outcome: Outcome,
}

/// A request that was sent, and what came of it.
struct Sent {
    headers: HeaderMap,
    result: Result<Response, NotAnswered>,
    /// How it was sent last.
    coding: Coding,
}

impl Sent {
    fn nothing(why: NotAnswered) -> Self {
        Self { headers: HeaderMap::new(), result: Err(why), coding: Coding::Plain }
    }
}

/// Why there is no token.
#[derive(Debug)]
pub struct TokenError {
    pub why: String,
    /// There will be none as long as the configuration is as it is.
    pub is_final: bool,
}

/// A subscriber's endpoint. It has its own connections, so that no other subscriber's requests wait
/// for them.
#[derive(Debug, Clone)]
pub struct Webhook {
    connections: Arc<Connections>,
    url: Url,
    /// The headers of the configuration, `authorization` among them.
    own_headers: HeaderMap,
    /// The subscriber's format, and the content type that goes with it instead of its own.
    content_type: (Format, Option<HeaderValue>),
    signer: Signer,
    success: Success,
    timeout: Duration,
    compressing: Option<Arc<Compressing>>,
    tokens: Option<Arc<Tokens>>,
    /// A literal address is not resolved, so the resolver cannot refuse it. The configuration refuses
    /// one that is not allowed; this is for subscribers from anywhere else.
    literal_blocked: Option<&'static str>,
}

impl Webhook {
    /// # Errors
    /// The TLS configuration cannot be built, because the system has no root certificates for
    /// example.
    pub fn try_new(subscriber: &Subscriber, system: &SystemRoots) -> Result<Self, String> {
        Self::with_lookup(subscriber, system, Lookup::of_system())
    }

    /// The same endpoint under another configuration. Its connections are kept if no setting of
    /// theirs has changed.
    ///
    /// # Errors
    /// As [`try_new`](Self::try_new).
    pub fn renewed(
        &self,
        old: &Subscriber,
        new: &Subscriber,
        system: &SystemRoots,
    ) -> Result<Self, String> {
        if Differences::between(old, new).affect(Affects::Connections) {
            return Self::try_new(new, system);
        }
        let renewed = Self::with_connections(self.connections.clone(), new)?;
        if old.auth == new.auth && old.http == new.http {
            return Ok(Self { tokens: self.tokens.clone(), ..renewed });
        }
        Ok(renewed)
    }

    fn with_lookup(
        subscriber: &Subscriber,
        system: &SystemRoots,
        lookup: Lookup,
    ) -> Result<Self, String> {
        Self::with_connections(
            Arc::new(Connections::try_new(subscriber, system, lookup)?),
            subscriber,
        )
    }

    fn with_connections(
        connections: Arc<Connections>,
        subscriber: &Subscriber,
    ) -> Result<Self, String> {
        let mut url = subscriber.url.expose().clone();
        // They are sent as a header, which `own_headers` makes.
        url.set_username("").ok();
        url.set_password(None).ok();
        let literal_blocked = subscriber.http.addresses.check_literal(&url).err();
        let (own_headers, signer) = (own_headers(subscriber)?, subscriber.signer.clone());
        let HttpPolicy { timeout, success, compression, .. } = subscriber.http;
        let compressing = (compression == Compression::Gzip).then(Arc::default);
        let content_type = (subscriber.format, subscriber.content_type.clone());
        Ok(Self {
            connections,
            url,
            own_headers,
            content_type,
            signer,
            success,
            timeout,
            compressing,
            tokens: Tokens::of(subscriber).map(Arc::new),
            literal_blocked,
        })
    }

    /// Makes one attempt. It ends within [`Subscriber::longest_attempt`] whatever the receiver
    /// does.
    pub async fn send(&self, request: Request) -> Outcome {
        self.send_at(request, clock::instant()).await
    }

    async fn send_at(&self, request: Request, now: Instant) -> Outcome {
        self.judge(self.authorized(&request, now).await.result)
    }

    /// Whether its receiver took no compressed request.
    pub fn refuses_compression(&self) -> bool {
        self.compressing.as_ref().is_some_and(|compressing| compressing.is_refused())
    }

    /// The next request is compressed again, if that is configured.
    pub fn compress_again(&self) {
        if let Some(compressing) = &self.compressing {
            compressing.set_refused(false);
        }
    }

    /// As [`send`](Self::send), and returns what was sent and answered.
    pub async fn test(&self, request: Request) -> TestAttempt {
        let Sent { headers, result, coding } = self.authorized(&request, clock::instant()).await;
        let mut sent = shown(&headers);
        if coding == Coding::Gzip {
            sent.push((CONTENT_ENCODING.to_string(), Some(GZIP.to_owned())));
        }
        let answer = result.as_ref().ok().map(|r| (r.status, excerpt(&r.text)));
        TestAttempt {
            headers: sent,
            refused_coding: coding == Coding::PlainAgain,
            answer,
            outcome: self.judge(result),
        }
    }

    /// The headers of an attempt now.
    ///
    /// # Errors
    /// The attempt may not be made.
    fn request(&self, request: &Request) -> Result<HeaderMap, Failure> {
        if let Some(what) = self.literal_blocked {
            return Err(Failure::AddressBlocked(format!(
                "the URL's address is not a public one ({what}); {EXCEPTIONS}"
            )));
        }
        self.headers(request, clock::now()).map_err(Failure::Internal)
    }

    /// Fetches a token, where requests need one; returns how long it is valid.
    pub async fn token(&self) -> Option<Result<Duration, TokenError>> {
        let token = self.tokens.as_ref()?.current(&self.connections).await;
        Some(token.map(|token| token.lifetime()).map_err(|why| match why {
            NoToken::Lacking(why) | NoToken::Away(why) => TokenError { why, is_final: false },
            NoToken::Refused(why) => TokenError { why, is_final: true },
        }))
    }

    /// Sends the request with a token, where requests need one. One whose token is refused is sent
    /// again with another.
    async fn authorized(&self, request: &Request, now: Instant) -> Sent {
        let Some(tokens) = &self.tokens else { return self.signed(request, None, now).await };
        let token = match tokens.current(&self.connections).await {
            Ok(token) => token,
            Err(why) => return Sent::nothing(why.into()),
        };
        // It may have taken a while.
        let sent = self.signed(request, Some(&token), clock::instant()).await;
        if !sent.result.as_ref().is_ok_and(|answer| answer.status == UNAUTHORIZED) {
            return sent;
        }
        match tokens.instead_of(&token, &self.connections).await {
            None => sent,
            Some(token) => self.signed(request, Some(&token), clock::instant()).await,
        }
    }

    /// Signs the request now, and sends it.
    async fn signed(&self, request: &Request, token: Option<&Token>, now: Instant) -> Sent {
        let headers = match self.request(request) {
            Ok(headers) => headers,
            Err(failure) => return Sent::nothing(NotAnswered::Failed(failure)),
        };
        let headers = match token {
            Some(token) => token.on(headers),
            None => headers,
        };
        let (result, coding) = self.attempt(headers.clone(), request.body.clone(), now).await;
        Sent { headers, result, coding }
    }

    /// Sends the request compressed, where that is configured and was not refused. One that is
    /// refused for that is sent again as it is. Returns how it was sent last.
    async fn attempt(
        &self,
        headers: HeaderMap,
        body: Bytes,
        now: Instant,
    ) -> (Result<Response, NotAnswered>, Coding) {
        let Some(compressing) = self.compressing.as_ref().filter(|c| !c.is_refused()) else {
            return (self.exchange(headers, body, now).await, Coding::Plain);
        };
        let small = match compressed(&body).await {
            Ok(small) => small,
            Err(why) => return (Err(NotAnswered::Failed(Failure::Internal(why))), Coding::Gzip),
        };
        let mut with_coding = headers.clone();
        with_coding.insert(CONTENT_ENCODING, HeaderValue::from_static(GZIP));
        let answer = self.exchange(with_coding, small, now).await;
        if !answer.as_ref().is_ok_and(|answer| is_about_coding(answer.status)) {
            return (answer, Coding::Gzip);
        }
        let plain = self.exchange(headers, body, clock::instant()).await;
        let is_accepted =
            |answer: &Response| Answer::of(answer.status, self.success) == Answer::Accepted;
        if plain.as_ref().is_ok_and(is_accepted) {
            compressing.set_refused(true);
        }
        (plain, Coding::PlainAgain)
    }

    /// Sends a request and reads the answer. `http.timeout` applies once to getting a connection and
    /// once to the answer.
    async fn exchange(
        &self,
        headers: HeaderMap,
        body: Bytes,
        now: Instant,
    ) -> Result<Response, NotAnswered> {
        let progress = Arc::new(Progress::default());
        let response = tokio::select! {
            response = self.answer(headers, body, &progress, now) => response?,
            late = progress.late(self.timeout) => return Err(match late {
                Late::Unsent => NotAnswered::Unsent(NO_STREAM.to_owned()),
                Late::Unanswered => NotAnswered::Failed(Failure::Timeout),
            }),
        };
        let now = clock::now();
        let retry_after = response
            .headers()
            .get(RETRY_AFTER)
            .and_then(|v| v.to_str().ok())
            .and_then(|v| parse_retry_after(v, now));
        Ok(Response {
            status: response.status().as_u16(),
            retry_after,
            text: beginning(response).await,
        })
    }

    /// Returns the answer once its headers are read. A request that the receiver did not process is
    /// resent at once, on a connection of its own.
    async fn answer(
        &self,
        headers: HeaderMap,
        body: Bytes,
        progress: &Arc<Progress>,
        now: Instant,
    ) -> Result<reqwest::Response, NotAnswered> {
        let internal = |why| NotAnswered::Failed(Failure::Internal(why));
        let kept = self.connections.kept(now).map_err(internal)?;
        let mut client = kept.client;
        for sent in 1.. {
            let body = Body::wrap(Outgoing::new(body.clone(), progress.clone()));
            let answer =
                client.post(self.url.clone()).headers(headers.clone()).body(body).send().await;
            match answer {
                Ok(response) => {
                    kept.answered.add(&response);
                    return Ok(response);
                }
                Err(e) if sent <= errors::resends(&e, progress, &kept.answered) => {
                    client = self.connections.single().map_err(internal)?;
                    progress.again();
                }
                Err(e) => {
                    return Err(errors::classify(e, progress, self.connections.only_v4(&self.url)));
                }
            }
        }
        unreachable!("it is sent until it is answered or has failed")
    }

    fn judge(&self, result: Result<Response, NotAnswered>) -> Outcome {
        let Response { status, retry_after, text } = match result {
            Ok(response) => response,
            Err(NotAnswered::Failed(failure)) => return retry(failure),
            Err(NotAnswered::Unsent(why)) => return Outcome::Unsent { why },
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
        headers(self.own_headers.clone(), &self.content_type, &self.signer, request, now)
    }
}

/// The headers that a request of a subscriber would have now, in their order; the value of a secret
/// one is `None`. Those of the connection come with it: `host`, `content-length`, `accept`.
///
/// # Errors
/// A header cannot be sent.
pub fn example_headers(
    subscriber: &Subscriber,
    request: &Request,
) -> Result<Vec<(String, Option<String>)>, String> {
    let own = own_headers(subscriber)?;
    let content_type = (subscriber.format, subscriber.content_type.clone());
    let headers = headers(own, &content_type, &subscriber.signer, request, clock::now());
    let token = matches!(subscriber.auth, Some(Auth::OAuth2(_)));
    let token = token.then(|| (AUTHORIZATION.to_string(), None));
    headers.map(|headers| shown(&headers).into_iter().chain(token).collect())
}

fn headers(
    mut headers: HeaderMap,
    (format, content_type): &(Format, Option<HeaderValue>),
    signer: &Signer,
    request: &Request,
    now: SystemTime,
) -> Result<HeaderMap, String> {
    headers.insert(
        USER_AGENT,
        HeaderValue::from_static(concat!("hooktrail/", env!("CARGO_PKG_VERSION"))),
    );
    // A batch that was stored under another format has that one's.
    let other = content_type.as_ref().filter(|_| *format == request.format);
    let of_format = || HeaderValue::from_static(request.format.content_type());
    headers.insert(CONTENT_TYPE, other.cloned().unwrap_or_else(of_format));
    headers
        .insert(HeaderName::from_static("x-hooktrail-attempt"), HeaderValue::from(request.attempt));
    let traceparent = request.traceparent.as_deref().filter(|text| is_traceparent(text));
    if let Some(value) = traceparent.and_then(|text| HeaderValue::from_str(text).ok()) {
        headers.insert(HeaderName::from_static("traceparent"), value);
    }
    if request.replay {
        headers.insert(
            HeaderName::from_static("x-hooktrail-replay"),
            HeaderValue::from_static("true"),
        );
    }
    for (name, value) in
        signer.headers(request.batch_id.as_str(), clock::unix_seconds(now), &request.body)
    {
        let name = HeaderName::try_from(name).map_err(|e| e.to_string())?;
        headers.insert(name, HeaderValue::try_from(value).map_err(|e| e.to_string())?);
    }
    Ok(headers)
}

/// Headers without the values of secret ones.
fn shown(headers: &HeaderMap) -> Vec<(String, Option<String>)> {
    let shown = |(name, value): (&HeaderName, &HeaderValue)| {
        let value =
            if value.is_sensitive() { None } else { value.to_str().ok().map(str::to_owned) };
        (name.to_string(), value)
    };
    headers.iter().map(shown).collect()
}

/// The headers of every request of a subscriber. They are marked as sensitive, so that they are not
/// printed, and HTTP/2 does not put them into its table.
fn own_headers(subscriber: &Subscriber) -> Result<HeaderMap, String> {
    let authorization = subscriber.auth.as_ref().and_then(Auth::header);
    let authorization = authorization.or_else(|| of_userinfo(subscriber.url.expose()));
    let authorization = authorization.map(|value| (AUTHORIZATION, value));
    let mut headers = HeaderMap::new();
    for (name, value) in subscriber.headers.iter().cloned().chain(authorization) {
        let mut value = HeaderValue::try_from(value.expose())
            .map_err(|_| format!("header `{name}` cannot be sent"))?;
        value.set_sensitive(true);
        headers.insert(name, value);
    }
    Ok(headers)
}

/// The value of `authorization` for the name and the password in a URL (RFC 7617).
fn of_userinfo(url: &Url) -> Option<Secret> {
    let decoded = |text: &str| percent_decode_str(text).collect::<Vec<u8>>();
    let (name, password) = (decoded(url.username()), url.password().map(decoded));
    if name.is_empty() && password.is_none() {
        return None;
    }
    let pair = [name, password.unwrap_or_default()].join(&b':');
    Some(Secret::new(format!("Basic {}", BASE64.encode(pair))))
}

/// Reads the beginning of an answer's body. A short body is read to its end, so that the connection
/// can be reused. A failure costs the connection and nothing else: the status has decided before.
async fn beginning(mut response: reqwest::Response) -> Vec<u8> {
    let mut text = Vec::new();
    let reading = async {
        let mut read = 0;
        while read < MAX_ANSWER
            && let Ok(Some(chunk)) = response.chunk().await
        {
            read += chunk.len();
            text.extend_from_slice(&chunk[..chunk.len().min(MAX_EXCERPT - text.len())]);
        }
    };
    tokio::time::timeout(BODY_TIME, reading).await.ok();
    text
}

fn retry(failure: Failure) -> Outcome {
    Outcome::Retry { failure, retry_after: None }
}

/// The text on one line, without control characters.
fn excerpt(text: &[u8]) -> String {
    let text = String::from_utf8_lossy(text);
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect::<String>().trim().to_owned()
}

/// Reads `Retry-After` (RFC 9110, section 10.2.3): a number of seconds, or a date. Returns at most
/// [`MAX_DELAY`].
pub fn parse_retry_after(value: &str, now: SystemTime) -> Option<Duration> {
    let value = value.trim();
    let wait = if !value.is_empty() && value.bytes().all(|b| b.is_ascii_digit()) {
        // More digits than a number holds still mean a long wait.
        value.parse().map_or(MAX_DELAY, Duration::from_secs)
    } else {
        httpdate::parse_http_date(value).ok()?.duration_since(now).unwrap_or_default()
    };
    Some(wait.min(MAX_DELAY))
}

#[cfg(test)]
mod tests {
    use super::{
        connections::MAX_AGE,
        errors::tls_error,
        resolver::{Blocked, GuardedResolver, ResolveError, permitted},
        *,
    };
    use crate::{config::testing, policy::address::AddressPolicy};
    use reqwest::dns::{Name, Resolve as _};
    use std::{
        collections::VecDeque,
        io::ErrorKind,
        net::SocketAddr,
        sync::{
            Mutex,
            atomic::{AtomicUsize, Ordering},
        },
    };
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        sync::Semaphore,
    };

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
            let addresses: Vec<SocketAddr> =
                ips.iter().map(|ip| SocketAddr::new(ip.parse().expect("an address"), 0)).collect();
            permitted(&AddressPolicy::default(), addresses.into_iter())
                .map(|a| a.map(|a| a.ip().to_string()).collect::<Vec<_>>())
        };
        assert_eq!(of(&["1.1.1.1", "127.0.0.1"]).expect("one is public"), ["1.1.1.1"]);
        let e = of(&["10.0.0.1", "::1"]).expect_err("none is public");
        assert!(e.downcast_ref::<Blocked>().is_some(), "{e}");
        assert!(of(&[]).expect_err("none at all").to_string().contains("no address"));
    }

    /// A subscriber with this URL that may connect to what `http` allows.
    fn subscriber(url: &str, http: &str) -> Subscriber {
        rustls::crypto::ring::default_provider().install_default().ok();
        testing::subscriber(
            "a",
            &format!("url = \"{url}\"\nhttp = {{ allow_http = true, {http} }}"),
        )
    }

    fn request() -> Request {
        Request {
            batch_id: "msg_1".into(),
            attempt: 1,
            format: Format::Json,
            body: Bytes::from_static(b"{}"),
            traceparent: None,
            replay: false,
        }
    }

    #[tokio::test]
    async fn a_literal_address_that_is_not_allowed_is_not_connected_to_even_if_the_configuration_did_not_refuse_it()
     {
        let socket = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        socket.set_nonblocking(true).expect("sets");
        let url = format!("http://{}/", socket.local_addr().expect("an address"));
        let mut subscriber = subscriber(&url, "allow_private_addresses = true");
        subscriber.http.addresses = AddressPolicy::default();
        let webhook =
            Webhook::try_new(&subscriber, &SystemRoots::load().expect("roots")).expect("builds");
        let outcome = webhook.send(request()).await;
        assert!(
            matches!(&outcome, Outcome::Retry { failure: Failure::AddressBlocked(why), .. } if why.contains("loopback")),
            "{outcome:?}"
        );
        assert_eq!(
            socket.accept().map(drop).map_err(|e| e.kind()),
            Err(ErrorKind::WouldBlock),
            "not even a connection"
        );
    }

    /// Answers each connection once and counts them.
    async fn counting(address: &str) -> (SocketAddr, Arc<AtomicUsize>) {
        let socket = tokio::net::TcpListener::bind(address).await.expect("a port");
        let (local, count) =
            (socket.local_addr().expect("an address"), Arc::new(AtomicUsize::new(0)));
        let counter = count.clone();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = socket.accept().await {
                counter.fetch_add(1, Ordering::SeqCst);
                tokio::spawn(async move {
                    let mut request = [0; 4096];
                    let _read = stream.read(&mut request).await?;
                    stream
                        .write_all(
                            b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 0\r\n\r\n",
                        )
                        .await
                });
            }
        });
        (local, count)
    }

    /// What an attempt comes to when a name is answered with these addresses, one answer after the
    /// other.
    async fn attempts(port: u16, answers: &[&[&str]]) -> Vec<Outcome> {
        // Of the loopback addresses one stands for those that may be connected to.
        let subscriber = subscriber(
            &format!("http://rebinding.example:{port}/"),
            "allow_addresses = [\"127.0.0.1\"]",
        );
        let of = |ips: &&[&str]| {
            ips.iter().map(|ip| SocketAddr::new(ip.parse().expect("an address"), 0)).collect()
        };
        let answers: Arc<Mutex<VecDeque<Vec<SocketAddr>>>> =
            Arc::new(Mutex::new(answers.iter().map(of).collect()));
        let asked = answers.clone();
        let lookup = Lookup(Arc::new(move |name| {
            assert_eq!(name, "rebinding.example");
            let answer =
                asked.lock().expect("not poisoned").pop_front().expect("is asked no more often");
            Box::pin(async move { Ok(answer) })
        }));
        let webhook =
            Webhook::with_lookup(&subscriber, &SystemRoots::load().expect("roots"), lookup)
                .expect("builds");
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
        let outcomes = attempts(
            allowed.port(),
            &[&["127.0.0.1"], &["127.0.0.2"], &["127.0.0.2", "127.0.0.1"], &["127.0.0.2", "::1"]],
        )
        .await;
        let delivered = |o: &Outcome| *o == Outcome::Delivered { status: 200 };
        let blocked =
            |o: &Outcome| matches!(o, Outcome::Retry { failure: Failure::AddressBlocked(_), .. });
        assert!(
            delivered(&outcomes[0]) && blocked(&outcomes[1]),
            "a name that changes: {outcomes:?}"
        );
        assert!(
            delivered(&outcomes[2]) && blocked(&outcomes[3]),
            "a name with several addresses: {outcomes:?}"
        );
        assert_eq!((to_allowed.load(Ordering::SeqCst), to_blocked.load(Ordering::SeqCst)), (2, 0));
    }

    #[tokio::test]
    async fn a_token_is_fetched_from_no_address_that_is_not_allowed() {
        let (allowed, _) = counting("127.0.0.1:0").await;
        let (inner, to_inner) = counting("127.0.0.2:0").await;
        let fetching = |token_url: &str| {
            let mut subscriber =
                subscriber(&format!("http://{allowed}/"), "allow_addresses = [\"127.0.0.1\"]");
            subscriber.auth = Some(Auth::OAuth2(crate::config::ClientCredentials {
                token_url: crate::crypto::secret::SecretUrl::new(token_url.parse().expect("a URL")),
                client_id: "c".to_owned(),
                client_secret: Secret::new("hunter2"),
                scope: None,
                audience: None,
            }));
            let lookup = Lookup(Arc::new(move |_| Box::pin(async move { Ok(vec![inner]) })));
            Webhook::with_lookup(&subscriber, &SystemRoots::load().expect("roots"), lookup)
                .expect("builds")
        };
        for token_url in
            [format!("http://inner.example:{}/", inner.port()), format!("http://{inner}/")]
        {
            let outcome = fetching(&token_url).send(request()).await;
            let Outcome::Retry { failure: Failure::Auth(why), .. } = &outcome else {
                panic!("{outcome:?}")
            };
            assert!(why.contains("loopback") && !why.contains("hunter2"), "{why}");
            let token = fetching(&token_url).token().await.expect("needs one");
            assert!(token.expect_err("none").is_final);
        }
        assert_eq!(to_inner.load(Ordering::SeqCst), 0);
    }

    /// Answers each request of each connection, and counts the connections.
    async fn keeping(address: &str) -> (SocketAddr, Arc<AtomicUsize>) {
        let socket = tokio::net::TcpListener::bind(address).await.expect("a port");
        let (local, count) =
            (socket.local_addr().expect("an address"), Arc::new(AtomicUsize::new(0)));
        let counter = count.clone();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = socket.accept().await {
                counter.fetch_add(1, Ordering::SeqCst);
                tokio::spawn(async move {
                    let mut read = Vec::new();
                    loop {
                        read.push(stream.read_u8().await?);
                        // The body of a request of these tests.
                        if read.ends_with(b"\r\n\r\n{}") {
                            read.clear();
                            stream
                                .write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
                                .await?;
                        }
                    }
                    #[allow(unreachable_code, reason = "says what the errors are")]
                    std::io::Result::Ok(())
                });
            }
        });
        (local, count)
    }

    #[tokio::test]
    async fn no_request_goes_over_a_connection_that_is_old_so_that_a_name_that_leads_elsewhere_is_followed()
     {
        let (first, to_first) = keeping("127.0.0.1:0").await;
        let (_, to_second) = keeping(&format!("127.0.0.2:{}", first.port())).await;
        let subscriber = subscriber(
            &format!("http://moving.example:{}/", first.port()),
            "allow_private_addresses = true",
        );
        let leads_to = Arc::new(Mutex::new("127.0.0.1"));
        let now_leads_to = leads_to.clone();
        let lookup = Lookup(Arc::new(move |_| {
            let ip = leads_to.lock().expect("not poisoned").parse().expect("an address");
            Box::pin(async move { Ok(vec![SocketAddr::new(ip, 0)]) })
        }));
        let webhook =
            Webhook::with_lookup(&subscriber, &SystemRoots::load().expect("roots"), lookup)
                .expect("builds");
        let start = clock::instant();
        let reached = || (to_first.load(Ordering::SeqCst), to_second.load(Ordering::SeqCst));
        for (age, expected) in [(0, (1, 0)), (299, (1, 0)), (301, (1, 1)), (302, (1, 1))] {
            let outcome = webhook.send_at(request(), start + Duration::from_secs(age)).await;
            assert_eq!(outcome, Outcome::Delivered { status: 200 });
            assert_eq!(reached(), expected, "after {age} s");
            *now_leads_to.lock().expect("not poisoned") = "127.0.0.2";
        }
        assert_eq!(MAX_AGE, Duration::from_secs(300));
    }

    #[tokio::test]
    async fn no_spelling_of_localhost_as_a_name_gets_through() {
        for name in [
            "localhost",
            "LOCALHOST",
            "LocalHost",
            "localhost.",
            "a.localhost",
            "localhost.localdomain",
            "ip6-localhost",
        ] {
            let url: Url = format!("http://{name}/").parse().expect("a URL");
            let resolver = GuardedResolver::new(AddressPolicy::default(), Lookup::of_system());
            let name: Name = url.host_str().expect("a host").parse().expect("a name");
            let resolved = resolver.resolve(name).await.map(|a| a.collect::<Vec<_>>());
            let e = resolved.expect_err(url.as_str());
            assert!(e.is::<Blocked>() || e.is::<ResolveError>(), "{url}: {e}");
        }
    }

    #[tokio::test]
    async fn lookups_that_hang_occupy_no_more_than_their_share_of_threads_even_when_nothing_waits_for_them()
     {
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
            let given_up =
                tokio::time::timeout(Duration::from_millis(10), (lookup.0)("a.example".to_owned()))
                    .await;
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

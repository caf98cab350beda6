//! The admin listener: whether the daemon is alive and ready, its metrics, what an operator asks of it (`control`), and
//! the intake of events (`intake`).
//!
//! Nothing is changed by a GET. No web page can use a listener on its visitor's machine: what comes from another site is
//! refused, what changes something needs a `content-type` that a browser does not send there without asking first, and
//! where there is no token, a name that somebody else made lead here is not answered either.

mod connections;
mod control;
mod intake;
mod introduction;

use std::{future::Future, net::IpAddr, sync::Arc, time::Duration};

use axum::{
    Router,
    body::Body,
    extract::{Request, State},
    http::{HeaderMap, HeaderName, StatusCode, header},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use futures_util::StreamExt as _;
use serde_json::json;
use subtle::ConstantTimeEq as _;
use tokio::{
    net::TcpListener,
    sync::{Semaphore, oneshot, watch},
    task::JoinHandle,
    time::timeout,
};

#[cfg(any(test, fuzzing))]
pub(crate) use self::intake::read_all;
pub use self::intake::{MAX_BODY, MAX_EVENTS};
use self::{
    connections::Bounds,
    intake::{Intake, ROOM},
};
use crate::{
    config::AdminConfig,
    crypto::secret::Secret,
    queue::Queue,
    supervisor::{fleet::Phase, reload::Reloader},
    telemetry::{metrics, status::Board},
};

/// A client that keeps its connection between requests asks at least that often, a scrape of Prometheus each minute.
const BOUNDS: Bounds = Bounds { at_a_time: 256, head_within: Duration::from_secs(75), read_within: READ_TIMEOUT };

/// How long a body may take to come: less than the time that a drain has by default.
const READ_TIMEOUT: Duration = Duration::from_secs(30);

/// How much of the body of a refused request is read, so that its client gets to see the answer.
const MAX_DISCARDED: usize = 64 * 1024 * 1024;

/// How long the last answers may take to leave.
const GOODBYE: Duration = Duration::from_secs(2);

/// When to come again, in seconds.
const AGAIN_SOON: u32 = 1;
const AGAIN_LATER: u32 = 5;

/// The listener, bound and not yet serving.
#[derive(Debug)]
pub struct Admin {
    socket: TcpListener,
    port: u16,
    token: Option<Secret>,
}

impl Admin {
    /// # Errors
    /// The address cannot be listened on. No other one takes its place: commands would then ask, and give the token to, whoever has it.
    pub async fn bind(config: &AdminConfig) -> std::io::Result<Self> {
        let socket = TcpListener::bind(config.listen).await?;
        let listens = socket.local_addr()?;
        tracing::info!(addr = %listens, "admin listening");
        Ok(Self { socket, port: listens.port(), token: config.token.clone() })
    }

    /// Serves from now on, and takes events for `queue` while `phase` is [`Phase::Running`].
    pub fn serve<Q: Queue>(self, queue: Q, reloader: &Reloader, board: &Board, phase: watch::Receiver<Phase>) -> Serving {
        let room = Arc::new(Semaphore::new(ROOM as usize));
        let token = self.token.map(Arc::new);
        let (readiness, asked, reloads) = (phase.clone(), queue.clone(), reloader.clone());
        let (exposed, looked_at, holds) = (board.clone(), queue.clone(), reloader.clone());
        let expose = move |format| {
            exposed.metrics().set_queue_up(looked_at.is_reachable());
            exposed.metrics().set_held_removals(holds.held().map_or(0, |held| held.subscribers.len()));
            exposed.expose_as(format)
        };
        let introduction = introduction::routes(token.clone(), self.port, &reloader.config().path);
        let control = control::routes(queue.clone(), reloader.clone(), board.clone(), phase.clone());
        let intake = Intake::new(queue, reloader.subscribers(), phase.clone(), board.metrics().clone(), room.clone());
        let api = Router::new()
            .route("/v1/events", post(intake::take_events::<Q>))
            .with_state(Arc::new(intake))
            .merge(control)
            .fallback(not_found)
            .method_not_allowed_fallback(wrong_method)
            .layer(middleware::from_fn_with_state(token, authorized))
            .merge(introduction);
        let app = Router::new()
            .route("/healthz", get(async || "ok\n"))
            .route("/readyz", get(move || std::future::ready(ready(*readiness.borrow(), asked.is_reachable(), &reloads))))
            .route(
                "/metrics",
                get(async move |headers: HeaderMap| {
                    let format = metrics::Exposition::accepted(header_text(&headers, header::ACCEPT));
                    ([(header::CONTENT_TYPE, format.content_type())], expose(format))
                }),
            )
            .nest("/api", api)
            .fallback(not_found)
            .method_not_allowed_fallback(wrong_method);
        let (close, closing) = oneshot::channel::<()>();
        Serving { room, phase, close, server: tokio::spawn(connections::serve(self.socket, app, BOUNDS, closing)) }
    }
}

/// The listener while it serves.
#[derive(Debug)]
pub struct Serving {
    room: Arc<Semaphore>,
    phase: watch::Receiver<Phase>,
    close: oneshot::Sender<()>,
    server: JoinHandle<()>,
}

impl Serving {
    /// Completes when the daemon drains and no request has anything more to ask of the queue.
    pub fn done_with_the_queue(&self) -> impl Future<Output = ()> + use<> {
        let (room, mut phase) = (self.room.clone(), self.phase.clone());
        async move {
            // Errors mean that whoever tells the phase, or the listener, has ended.
            phase.wait_for(|p| *p == Phase::Draining).await.ok();
            room.acquire_many(ROOM).await.ok();
        }
    }

    /// Lets the last answers leave and ends.
    pub async fn close(self) {
        drop(self.close);
        if timeout(GOODBYE, self.server).await.is_err() {
            tracing::debug!("admin connections were still open at the end");
        }
    }
}

/// A configuration that is wrong is no reason to take the daemon out of service: it works with the one before.
fn ready(phase: Phase, reachable: bool, reloads: &Reloader) -> (StatusCode, String) {
    let (status, word) = readiness(phase, reachable);
    let problem = reloads.problem().map(|why| format!("the configuration was not reloaded:\n{why}\n")).unwrap_or_default();
    let held = reloads.held().map(|held| format!("removals wait for an operator: {}\n", held.why)).unwrap_or_default();
    (status, format!("{word}\n{problem}{held}"))
}

fn readiness(phase: Phase, reachable: bool) -> (StatusCode, &'static str) {
    match phase {
        Phase::Running if !reachable => (StatusCode::SERVICE_UNAVAILABLE, "without its queue"),
        Phase::Running => (StatusCode::OK, "ready"),
        Phase::Starting => (StatusCode::SERVICE_UNAVAILABLE, "starting"),
        Phase::Draining => (StatusCode::SERVICE_UNAVAILABLE, "draining"),
    }
}

async fn not_found() -> Refusal {
    let why = "there is nothing here; events are taken by POST /api/v1/events, the rest of the API is in docs/admin.yaml";
    Refusal::new(StatusCode::NOT_FOUND, why.to_owned())
}

async fn wrong_method(request: Request) -> Response {
    let (parts, body) = request.into_parts();
    discard(&parts.headers, body).await;
    Refusal::new(StatusCode::METHOD_NOT_ALLOWED, "not with this method; the header `allow` names those that are".to_owned()).into_response()
}

/// Why a request is taken for one that a web page made somebody's browser send.
fn from_elsewhere(headers: &HeaderMap, has_token: bool) -> Option<&'static str> {
    let text = |name| header_text(headers, name);
    if !matches!(text(HeaderName::from_static("sec-fetch-site")), "" | "none" | "same-origin") {
        return Some("it comes from a page of another site");
    }
    let host = text(header::HOST);
    let origin = text(header::ORIGIN);
    if !origin.is_empty() && origin.split_once("://").is_none_or(|(_, o)| !o.eq_ignore_ascii_case(host)) {
        return Some("it comes from a page of another origin");
    }
    // Any name can be made to lead to this machine, and a page of that name is then of this origin.
    if !has_token && !is_of_this_machine(host) {
        return Some("without [admin] token only an IP address or `localhost` is answered to");
    }
    None
}

/// Whether a header `host` names no name that somebody else gives addresses to.
fn is_of_this_machine(host: &str) -> bool {
    let without_port = host.rsplit_once(':').filter(|(_, port)| port.bytes().all(|b| b.is_ascii_digit())).map_or(host, |(name, _)| name);
    let name = without_port.trim_start_matches('[').trim_end_matches(']');
    host.is_empty() || name.eq_ignore_ascii_case("localhost") || name.parse::<IpAddr>().is_ok()
}

/// Lets through what carries the token, if there is one, and what no web page has sent.
async fn authorized(State(token): State<Option<Arc<Secret>>>, request: Request, next: Next) -> Response {
    if let Some(why) = from_elsewhere(request.headers(), token.is_some()) {
        let (parts, body) = request.into_parts();
        discard(&parts.headers, body).await;
        return forbidden(why);
    }
    let Some(token) = token else { return next.run(request).await };
    if carries(request.headers(), &token) {
        return next.run(request).await;
    }
    let (parts, body) = request.into_parts();
    discard(&parts.headers, body).await;
    unauthorized()
}

fn forbidden(why: &str) -> Response {
    Refusal::new(StatusCode::FORBIDDEN, format!("this request is refused: {why}")).into_response()
}

/// Whether a request has the token; compared in constant time.
fn carries(headers: &HeaderMap, token: &Secret) -> bool {
    let given = header_text(headers, header::AUTHORIZATION).split_once(' ');
    let given = given.filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer")).map_or("", |(_, given)| given.trim());
    bool::from(given.as_bytes().ct_eq(token.expose().as_bytes()))
}

fn unauthorized() -> Response {
    let why = "give the token of [admin] token, as `authorization: Bearer TOKEN`";
    let mut answer = Refusal::new(StatusCode::UNAUTHORIZED, why.to_owned()).into_response();
    answer.headers_mut().insert(header::WWW_AUTHENTICATE, header::HeaderValue::from_static("Bearer"));
    answer
}

fn header_text(headers: &HeaderMap, name: HeaderName) -> &str {
    headers.get(name).and_then(|v| v.to_str().ok()).unwrap_or_default()
}

/// Without its parameters, in lower case.
fn media_type(headers: &HeaderMap) -> String {
    header_text(headers, header::CONTENT_TYPE).split(';').next().unwrap_or_default().trim().to_ascii_lowercase()
}

fn is_json(headers: &HeaderMap) -> bool {
    media_type(headers) == "application/json"
}

/// Reads a body that nobody wants: a client that still sends when the connection closes may never see
/// the answer. One that asked before sending is not told to send.
async fn discard(headers: &HeaderMap, body: Body) {
    if headers.contains_key(header::EXPECT) {
        return;
    }
    let mut chunks = body.into_data_stream();
    let reading = async {
        let mut read = 0;
        while let Some(Ok(chunk)) = chunks.next().await {
            read += chunk.len();
            if read > MAX_DISCARDED {
                return;
            }
        }
    };
    timeout(READ_TIMEOUT, reading).await.ok();
}

/// Why a request's events were not taken.
#[derive(Debug)]
struct Refusal {
    status: StatusCode,
    why: String,
    retry_after: Option<u32>,
    /// The first bad events, and how many there are.
    invalid: Option<(Vec<BadEvent>, usize)>,
}

#[derive(Debug, serde::Serialize)]
struct BadEvent {
    /// In the order of the request, from 0.
    index: usize,
    /// Of JSON Lines, from 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    line: Option<usize>,
    reason: String,
}

impl Refusal {
    fn new(status: StatusCode, why: String) -> Self {
        Self { status, why, retry_after: None, invalid: None }
    }

    fn bad(why: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, why.into())
    }

    fn too_large() -> Self {
        let why = format!("the body has more than {MAX_BODY} bytes, inflated or not; send fewer events at once");
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, why)
    }

    fn too_many(events: usize) -> Self {
        let why = format!("{events} events are more than the {MAX_EVENTS} of one request; send fewer at once");
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, why)
    }

    fn behind() -> Self {
        let why = "more events come than can be stored now; nothing of this request was taken, send it again later".to_owned();
        Self { retry_after: Some(AGAIN_SOON), ..Self::new(StatusCode::TOO_MANY_REQUESTS, why) }
    }

    fn busy() -> Self {
        let why = "too many such requests are worked on already; send it again later".to_owned();
        Self { retry_after: Some(AGAIN_SOON), ..Self::new(StatusCode::TOO_MANY_REQUESTS, why) }
    }

    fn unavailable(why: String) -> Self {
        Self { retry_after: Some(AGAIN_LATER), ..Self::new(StatusCode::SERVICE_UNAVAILABLE, why) }
    }

    fn not_running(phase: Phase) -> Self {
        let state = if phase == Phase::Starting { "starting" } else { "stopping" };
        Self::unavailable(format!("hooktrail is {state}; nothing of this request was taken, send it again later"))
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let mut answer = json!({ "error": self.why });
        if let Some((events, count)) = self.invalid {
            answer["invalid"] = count.into();
            answer["events"] = json!(events);
        }
        let mut answer = json_answer(self.status, &answer);
        if let Some(seconds) = self.retry_after {
            answer.headers_mut().insert(header::RETRY_AFTER, seconds.into());
        }
        answer
    }
}

fn json_answer(status: StatusCode, body: &serde_json::Value) -> Response {
    (status, [(header::CONTENT_TYPE, "application/json")], format!("{body}\n")).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        let pair = |(name, value): &(&'static str, &'static str)| (HeaderName::from_static(name), header::HeaderValue::from_static(value));
        pairs.iter().map(pair).collect()
    }

    #[test]
    fn what_a_web_page_sends_is_told_from_what_a_program_sends() {
        for (pairs, token, ok) in [
            (&[("host", "127.0.0.1:8787")][..], false, true),
            (&[("host", "localhost:8787")], false, true),
            (&[("host", "[::1]:8787")], false, true),
            (&[("host", "[::1]")], false, true),
            (&[], false, true),
            (&[("host", "rebound.example:8787")], false, false),
            (&[("host", "hooktrail.internal:8787")], true, true),
            (&[("host", "127.0.0.1:8787"), ("origin", "http://127.0.0.1:8787")], false, true),
            (&[("host", "127.0.0.1:8787"), ("origin", "http://evil.example")], false, false),
            (&[("host", "127.0.0.1:8787"), ("origin", "null")], true, false),
            (&[("host", "127.0.0.1:8787"), ("sec-fetch-site", "cross-site")], false, false),
            (&[("host", "127.0.0.1:8787"), ("sec-fetch-site", "same-site")], true, false),
            (&[("host", "127.0.0.1:8787"), ("sec-fetch-site", "same-origin")], false, true),
            (&[("host", "127.0.0.1:8787"), ("sec-fetch-site", "none")], false, true),
        ] {
            assert_eq!(from_elsewhere(&headers(pairs), token).is_none(), ok, "{pairs:?}");
        }
    }

    #[tokio::test]
    async fn a_wrong_configuration_and_one_that_is_held_back_are_reported_and_take_nothing_out_of_service() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("h.toml");
        let write = |text: &str| std::fs::write(&path, format!("[queue]\nurl = \"embedded\"\n{text}")).expect("writes");
        write("[[subscriber]]\nname = \"a\"\nurl = \"https://example.com/\"\nsignatures = []\n");
        let config = crate::config::load(&path).unwrap_or_else(|e| panic!("{e}"));
        let metrics = metrics::Metrics::new(crate::clock::now());
        let (reloader, _changes) =
            Reloader::new(config, metrics, crate::queue::Removals::default(), crate::telemetry::log::Level::default());
        assert_eq!(ready(Phase::Running, true, &reloader), (StatusCode::OK, "ready\n".to_owned()));
        for (text, parts) in [("[x]\n", ["not reloaded", "h.toml:3:2: x"]), ("", ["wait for an operator", "(a)"])] {
            write(text);
            assert!(reloader.reload(crate::supervisor::reload::Because::Files("test")).await.is_err());
            let (status, told) = ready(Phase::Running, true, &reloader);
            assert!(status == StatusCode::OK && told.starts_with("ready\n") && parts.iter().all(|p| told.contains(p)), "{told}");
        }
        assert_eq!(readiness(Phase::Running, false).0, StatusCode::SERVICE_UNAVAILABLE);
    }
}

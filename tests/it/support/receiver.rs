//! A receiver on a port of its own that records requests and answers as a test says.

use std::{
    collections::BTreeSet,
    io::Read as _,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::{Duration, SystemTime},
};

use axum::{
    Router,
    body::{Body, Bytes},
    extract::{ConnectInfo, DefaultBodyLimit, State},
    http::{HeaderMap, Response},
};
use hooktrail::crypto::{secret::Secret, signature};
use tokio::{net::TcpListener, sync::watch, task::JoinHandle};

use super::{daemon::SECRET, eventually};

/// A request as it came.
#[derive(Debug, Clone)]
pub(crate) struct Request {
    pub(crate) headers: HeaderMap,
    /// Inflated, if it came compressed.
    pub(crate) body: Bytes,
    pub(crate) at: SystemTime,
    /// The answer.
    pub(crate) status: u16,
    /// The connection that it came over.
    pub(crate) peer: SocketAddr,
}

impl Request {
    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).and_then(|v| v.to_str().ok()).unwrap_or_default()
    }

    pub(crate) fn id(&self) -> &str {
        self.header("webhook-id")
    }

    pub(crate) fn attempt(&self) -> u32 {
        self.header("x-hooktrail-attempt").parse().expect("an attempt number")
    }

    /// The numbers of numbered events (see [`event`]).
    pub(crate) fn numbers(&self) -> Vec<u64> {
        self.events().iter().map(|e| e["n"].as_u64().expect("a number")).collect()
    }

    pub(crate) fn events(&self) -> Vec<serde_json::Value> {
        use serde_json::Value;
        // The objects of splunk_hec and the lines of jsonl follow each other without a comma.
        let values = serde_json::Deserializer::from_slice(&self.body).into_iter::<Value>();
        let values: Vec<Value> = values.map(|v| v.expect("a JSON body")).collect();
        let values = match &values[..] {
            [Value::Array(all)] => all.clone(),
            [one] if one["events"].is_array() => one["events"].as_array().expect("one").clone(),
            _ => values,
        };
        let event_of = |value: Value| match (&value["event"], &value["data"]) {
            (hec @ Value::Object(_), _) => hec.clone(),
            (_, data @ Value::Object(_)) if value["specversion"] == "1.0" => data.clone(),
            _ => value,
        };
        values.into_iter().map(event_of).collect()
    }

    /// Verifies as a receiver does.
    pub(crate) fn verified(&self) -> bool {
        let now = self.at.duration_since(SystemTime::UNIX_EPOCH).expect("after 1970").as_secs();
        let header = |name: &str| self.headers.get(name).and_then(|v| v.to_str().ok());
        signature::verify(&Secret::new(SECRET), header, &self.body, now).is_ok()
    }
}

/// A numbered event of about 400 bytes, as audit events are.
pub(crate) fn event(n: u64) -> String {
    format!(
        r#"{{"event":"activity_log.user.updated","description":"updated the user profile","n":{n},"actor":{{"id":783,"type":"user","name":"Jane Doe"}},"resource":{{"id":"{n}","type":"user","name":"John Doe the {n}th of his name"}},"changes":{{"name":{{"to":"[FILTERED]","from":"[FILTERED]"}},"locale":{{"from":"en","to":"de"}},"time_zone":{{"from":"Etc/UTC","to":"Europe/Kyiv"}}}},"timestamp":1733739084}}"#
    )
}

/// The answer to give.
#[derive(Debug, Clone)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(&'static str, String)>,
    pub(crate) body: &'static str,
    pub(crate) after: Duration,
    /// Answers when the condition is true, or when its sender is gone.
    pub(crate) when: Option<watch::Receiver<bool>>,
}

pub(crate) fn status(status: u16) -> Answer {
    Answer { status, headers: Vec::new(), body: "", after: Duration::ZERO, when: None }
}

impl Answer {
    pub(crate) fn after(self, after: Duration) -> Self {
        Self { after, ..self }
    }

    pub(crate) fn when(self, gate: &watch::Sender<bool>) -> Self {
        Self { when: Some(gate.subscribe()), ..self }
    }

    pub(crate) fn header(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }

    pub(crate) fn body(self, body: &'static str) -> Self {
        Self { body, ..self }
    }
}

type Script = Box<dyn Fn(&Request, usize) -> Answer + Send + Sync>;

struct Shared {
    script: Mutex<Arc<Script>>,
    requests: Mutex<Vec<Request>>,
}

pub(crate) struct Receiver {
    pub(crate) url: String,
    shared: Arc<Shared>,
    server: JoinHandle<()>,
}

impl Receiver {
    /// `script` gets the request and its number, from 0.
    pub(crate) async fn start(
        script: impl Fn(&Request, usize) -> Answer + Send + Sync + 'static,
    ) -> Self {
        let shared = Arc::new(Shared {
            script: Mutex::new(Arc::new(Box::new(script))),
            requests: Mutex::default(),
        });
        let socket = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let url = format!("http://{}/hook/token", socket.local_addr().expect("an address"));
        let app = Router::new()
            .fallback(receive)
            .layer(DefaultBodyLimit::max(64 << 20))
            .with_state(shared.clone())
            .into_make_service_with_connect_info::<SocketAddr>();
        let server = tokio::spawn(async move { axum::serve(socket, app).await.expect("serves") });
        Self { url, shared, server }
    }

    pub(crate) async fn accepting() -> Self {
        Self::start(|_, _| status(200)).await
    }

    /// From now on answers differently.
    pub(crate) fn now(&self, script: impl Fn(&Request, usize) -> Answer + Send + Sync + 'static) {
        *self.shared.script.lock().expect("not poisoned") = Arc::new(Box::new(script));
    }

    pub(crate) fn requests(&self) -> Vec<Request> {
        self.shared.requests.lock().expect("not poisoned").clone()
    }

    /// Takes the requests that came since the last call.
    pub(crate) fn take_requests(&self) -> Vec<Request> {
        std::mem::take(&mut *self.shared.requests.lock().expect("not poisoned"))
    }

    /// The number of connections that the requests came over.
    pub(crate) fn connections(&self) -> usize {
        self.requests().iter().map(|r| r.peer).collect::<BTreeSet<_>>().len()
    }

    pub(crate) fn count(&self) -> usize {
        self.shared.requests.lock().expect("not poisoned").len()
    }

    /// The numbers of all events that were accepted, in the order of their coming.
    pub(crate) fn accepted(&self) -> Vec<u64> {
        let requests = self.shared.requests.lock().expect("not poisoned");
        requests.iter().filter(|r| r.status < 300).flat_map(Request::numbers).collect()
    }

    pub(crate) async fn wait_requests(&self, n: usize) -> Vec<Request> {
        eventually(&format!("{n} requests, there are {}", self.count()), async || {
            self.count() >= n
        })
        .await;
        self.requests()
    }

    /// Waits until each of the events `0..n` was accepted at least once.
    pub(crate) async fn wait_all(&self, n: u64) {
        let (mut seen, mut looked_at) = (std::collections::HashSet::new(), 0);
        eventually(&format!("{n} events accepted"), async || {
            let new = self.shared.requests.lock().expect("not poisoned")[looked_at..].to_vec();
            looked_at += new.len();
            seen.extend(new.iter().filter(|r| r.status < 300).flat_map(Request::numbers));
            seen.len() as u64 == n
        })
        .await;
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.server.abort();
    }
}

async fn receive(
    State(shared): State<Arc<Shared>>,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
    headers: HeaderMap,
    body: Bytes,
) -> Response<Body> {
    let body = if headers.get("content-encoding").is_some_and(|coding| coding == "gzip") {
        let mut inflated = Vec::new();
        flate2::read::GzDecoder::new(&body[..]).read_to_end(&mut inflated).expect("gzip");
        inflated.into()
    } else {
        body
    };
    let mut request = Request { headers, body, at: SystemTime::now(), status: 0, peer };
    let script = shared.script.lock().expect("not poisoned").clone();
    let answer = {
        let mut requests = shared.requests.lock().expect("not poisoned");
        let answer = script(&request, requests.len());
        request.status = answer.status;
        requests.push(request);
        answer
    };
    tokio::time::sleep(answer.after).await;
    if let Some(mut gate) = answer.when {
        gate.wait_for(|open| *open).await.ok();
    }
    let mut response = Response::builder().status(answer.status);
    for (name, value) in answer.headers {
        response = response.header(name, value);
    }
    response.body(Body::from(answer.body)).expect("an answer")
}

//! The demo's receivers, as a receiver's owner would write them.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use axum::{
    Router,
    body::Bytes,
    extract::State,
    http::{HeaderMap, StatusCode},
};
use bytesize::ByteSize;
use tokio::net::TcpListener;

use super::{
    sample::event_ids,
    stage::{Stage, Tone},
};
use crate::{
    cli::failed::Failed,
    clock,
    crypto::{secret::Secret, signature},
    wording::counted,
};

/// A receiver: verifies, then stores.
pub(super) struct Receiver {
    pub(super) name: &'static str,
    pub(super) url: String,
    accepted: Arc<Mutex<BTreeMap<String, usize>>>,
    server: tokio::task::JoinHandle<()>,
}

struct Endpoint {
    name: &'static str,
    secret: Secret,
    stage: Stage,
    answer: fn(Duration, &[u8]) -> u16,
    accepted: Arc<Mutex<BTreeMap<String, usize>>>,
}

impl Receiver {
    pub(super) async fn start(
        name: &'static str,
        secret: &str,
        stage: Stage,
        answer: fn(Duration, &[u8]) -> u16,
    ) -> Result<Self, Failed> {
        let socket = TcpListener::bind("127.0.0.1:0").await?;
        let url = format!("http://{}/hooks/audit", socket.local_addr()?);
        let accepted = Arc::new(Mutex::default());
        let endpoint = Endpoint {
            name,
            secret: Secret::new(secret),
            stage,
            answer,
            accepted: accepted.clone(),
        };
        let app = Router::new().fallback(receive).with_state(Arc::new(endpoint));
        let server = tokio::spawn(async move { drop(axum::serve(socket, app).await) });
        Ok(Self { name, url, accepted, server })
    }

    /// The number of times that each event was accepted.
    pub(super) fn accepted(&self) -> BTreeMap<String, usize> {
        self.accepted.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.server.abort();
    }
}

async fn receive(State(e): State<Arc<Endpoint>>, headers: HeaderMap, body: Bytes) -> StatusCode {
    let header = |name: &str| headers.get(name).and_then(|v| v.to_str().ok());
    let status =
        match signature::verify(&e.secret, header, &body, clock::unix_seconds(clock::now())) {
            Ok(_) => (e.answer)(e.stage.elapsed(), &body),
            Err(_) => 401,
        };
    if status == 200 {
        let ids = event_ids(&body);
        let attempt = header("x-hooktrail-attempt").unwrap_or("?");
        let attempt = if attempt == "1" { String::new() } else { format!(", attempt {attempt}") };
        let what = format!(
            "accepted {}, {}, signature verified{attempt}",
            counted(ids.len(), "event(s)"),
            ByteSize(body.len() as u64)
        );
        e.stage.report(e.name, Tone::Good, &what);
        let mut accepted = e.accepted.lock().unwrap_or_else(PoisonError::into_inner);
        for id in ids {
            *accepted.entry(id).or_default() += 1;
        }
    }
    StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
}

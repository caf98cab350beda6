//! Pausing and resuming subscribers over HTTP.

use std::{sync::Arc, time::Duration};

use axum::{
    Router,
    body::Body,
    extract::{Path, State},
    http::{HeaderMap, StatusCode},
    response::{IntoResponse as _, Response},
    routing::post,
};
use serde_json::json;
use tokio::time::timeout;

use super::{READ_TIMEOUT, Refusal, discard, is_json, json_answer};
use crate::{
    clock,
    config::Subscriber,
    queue::{Pause, Queue, Standing},
};

/// The longest body, and so about the longest reason.
const MAX_REQUEST: usize = 4096;

/// After a start the queue has to tell who is paused before that can be changed.
const WAIT_FOR_STANDINGS: Duration = Duration::from_secs(10);

struct Control<Q> {
    queue: Q,
    subscribers: Vec<Arc<Subscriber>>,
}

/// What a request may hold.
#[derive(Debug, Default, serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Wish {
    why: Option<String>,
}

pub(super) fn routes<Q: Queue>(queue: Q, subscribers: &[Arc<Subscriber>]) -> Router {
    let control = Arc::new(Control { queue, subscribers: subscribers.to_vec() });
    let pause = async |State(control): State<Arc<Control<Q>>>, Path(name): Path<String>, headers: HeaderMap, body: Body| {
        control.answer(&name, &headers, body, true).await
    };
    let resume = async |State(control): State<Arc<Control<Q>>>, Path(name): Path<String>, headers: HeaderMap, body: Body| {
        control.answer(&name, &headers, body, false).await
    };
    Router::new()
        .route("/v1/subscribers/{name}/pause", post(pause))
        .route("/v1/subscribers/{name}/resume", post(resume))
        .with_state(control)
}

impl<Q: Queue> Control<Q> {
    async fn answer(&self, name: &str, headers: &HeaderMap, mut body: Body, pause: bool) -> Response {
        match self.change(name, headers, &mut body, pause).await {
            Ok(answer) => json_answer(StatusCode::OK, &answer),
            Err(refusal) => {
                discard(headers, body).await;
                refusal.into_response()
            }
        }
    }

    async fn change(&self, name: &str, headers: &HeaderMap, body: &mut Body, pause: bool) -> Result<serde_json::Value, Refusal> {
        // A browser does not send this to another origin without asking first.
        if !is_json(headers) {
            let why = "the content-type must be application/json; the body is {}, or for a pause {\"why\":\"…\"}";
            return Err(Refusal::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, why.to_owned()));
        }
        let reading = timeout(READ_TIMEOUT, axum::body::to_bytes(std::mem::take(body), MAX_REQUEST));
        let too_long = || Refusal::bad(format!("the body has more than {MAX_REQUEST} bytes, or did not come whole"));
        let body = reading.await.ok().and_then(Result::ok).ok_or_else(too_long)?;
        let wish = if body.is_empty() { Ok(Wish::default()) } else { serde_json::from_slice(&body) };
        let wish: Wish = wish.map_err(|e| Refusal::bad(format!("the body is not {{}} or {{\"why\":\"…\"}}: {e}")))?;
        let Some(subscriber) = self.subscribers.iter().find(|s| s.name == name) else {
            return Err(Refusal::new(StatusCode::NOT_FOUND, "no subscriber of that name is configured".to_owned()));
        };
        if subscriber.paused && !pause {
            let why = format!("`{name}` is paused by the configuration; take `paused = true` out of it and restart");
            return Err(Refusal::new(StatusCode::CONFLICT, why));
        }
        let mut standings = self.queue.standings();
        let known = timeout(WAIT_FOR_STANDINGS, standings.wait_for(Option::is_some)).await;
        let Some(known) = known.ok().and_then(Result::ok).and_then(|known| known.clone()) else {
            return Err(Refusal::unavailable("who is paused is not known yet; try again".to_owned()));
        };
        let before = known.get(name).and_then(Standing::pause).cloned();
        let changed = before.is_some() != pause;
        let now = clock::now();
        let after = match (pause, before) {
            (true, Some(before)) => Some(before), // the first reason counts
            (true, None) => {
                let why = wish.why.unwrap_or_else(|| "an operator asked for it".to_owned());
                Some(Pause { why, since: now, by: "operator".to_owned() })
            }
            (false, _) => None,
        };
        if changed {
            let standing = after.clone().map_or(Standing::Resumed { at: now }, Standing::Paused);
            self.queue.record(name, standing).await.map_err(|e| Refusal::unavailable(format!("it could not be recorded: {e}")))?;
        }
        Ok(match after {
            Some(Pause { why, since, by }) => {
                let since = humantime::format_rfc3339_millis(since).to_string();
                json!({ "subscriber": name, "state": "paused", "changed": changed, "why": why, "since": since, "by": by })
            }
            None => json!({ "subscriber": name, "state": "running", "changed": changed }),
        })
    }
}

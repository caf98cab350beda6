//! Refusals, and the parts of a request that all of the listener reads.

use std::time::Duration;

use axum::{
    body::Body,
    extract::Request,
    http::{HeaderMap, HeaderName, StatusCode, header},
    response::{IntoResponse, Response},
};
use futures_util::StreamExt as _;
use serde::Serialize;
use tokio::time::timeout;

use super::view::{BadEvent, Refused};
use crate::{policy::batching::BatchPolicy, supervisor::fleet::Phase};

/// The longest body in bytes, inflated or not: as long as a request to a receiver, so that each
/// event that is taken can be delivered.
pub const MAX_BODY: usize = BatchPolicy::MAX_BYTES as usize;

/// The most events of one request.
pub const MAX_EVENTS: usize = 50_000;

/// The timeout of a body: less than the time that a drain has by default.
pub(super) const READ_TIMEOUT: Duration = Duration::from_secs(30);

/// The bytes of a refused request's body that are read, so that its client sees the answer.
pub(super) const MAX_DISCARDED: usize = 64 * 1024 * 1024;

/// Values of `retry-after`, in seconds.
pub(super) const AGAIN_SOON: u32 = 1;
pub(super) const AGAIN_LATER: u32 = 5;

pub(super) fn unauthorized() -> Response {
    let why = "give the token of [admin] token, as `authorization: Bearer TOKEN`";
    let mut answer = Refusal::new(StatusCode::UNAUTHORIZED, why.to_owned()).into_response();
    answer
        .headers_mut()
        .insert(header::WWW_AUTHENTICATE, header::HeaderValue::from_static("Bearer"));
    answer
}

pub(super) fn header_text(headers: &HeaderMap, name: HeaderName) -> &str {
    headers.get(name).and_then(|v| v.to_str().ok()).unwrap_or_default()
}

/// The content type without its parameters, in lower case.
pub(super) fn media_type(headers: &HeaderMap) -> String {
    header_text(headers, header::CONTENT_TYPE)
        .split(';')
        .next()
        .unwrap_or_default()
        .trim()
        .to_ascii_lowercase()
}

pub(super) fn is_json(headers: &HeaderMap) -> bool {
    media_type(headers) == "application/json"
}

/// Reads the body of a refused request: a client that still sends when the connection closes may
/// never see the answer. A client that asked before sending (`expect`) does not send it.
pub(super) async fn discard(headers: &HeaderMap, body: Body) {
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

/// The refusal of a request.
#[derive(Debug)]
pub(super) struct Refusal {
    pub(super) status: StatusCode,
    pub(super) why: String,
    pub(super) retry_after: Option<u32>,
    /// The first invalid events, and the number of all.
    pub(super) invalid: Option<(Vec<BadEvent>, usize)>,
}

impl Refusal {
    pub(super) fn new(status: StatusCode, why: String) -> Self {
        Self { status, why, retry_after: None, invalid: None }
    }

    pub(super) fn bad(why: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, why.into())
    }

    pub(super) fn too_large() -> Self {
        let why = format!(
            "the body has more than {MAX_BODY} bytes, inflated or not; send fewer events at once"
        );
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, why)
    }

    pub(super) fn too_many(events: usize) -> Self {
        let why = format!(
            "{events} events are more than the {MAX_EVENTS} of one request; send fewer at once"
        );
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, why)
    }

    pub(super) fn behind() -> Self {
        let why = "more events arrive than can be stored now; nothing of this request was taken, send it again later".to_owned();
        Self { retry_after: Some(AGAIN_SOON), ..Self::new(StatusCode::TOO_MANY_REQUESTS, why) }
    }

    pub(super) fn busy() -> Self {
        let why = "too many of these requests are in progress; send it again later".to_owned();
        Self { retry_after: Some(AGAIN_SOON), ..Self::new(StatusCode::TOO_MANY_REQUESTS, why) }
    }

    pub(super) fn unavailable(why: String) -> Self {
        Self { retry_after: Some(AGAIN_LATER), ..Self::new(StatusCode::SERVICE_UNAVAILABLE, why) }
    }

    pub(super) fn not_running(phase: Phase) -> Self {
        let state = if phase == Phase::Starting { "starting" } else { "stopping" };
        Self::unavailable(format!(
            "hooktrail is {state}; nothing of this request was taken, send it again later"
        ))
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let (events, invalid) = self.invalid.unzip();
        let mut answer = json_answer(self.status, &Refused { error: self.why, invalid, events });
        if let Some(seconds) = self.retry_after {
            answer.headers_mut().insert(header::RETRY_AFTER, seconds.into());
        }
        answer
    }
}

pub(super) fn json_answer(status: StatusCode, body: &impl Serialize) -> Response {
    let body = match serde_json::to_string(body) {
        Ok(body) => body,
        // Cannot happen with today's answers, which are plain data.
        Err(e) => return (StatusCode::INTERNAL_SERVER_ERROR, e.to_string()).into_response(),
    };
    (status, [(header::CONTENT_TYPE, "application/json")], format!("{body}\n")).into_response()
}

pub(super) fn forbidden(why: &str) -> Response {
    Refusal::new(StatusCode::FORBIDDEN, format!("this request is refused: {why}")).into_response()
}

pub(super) async fn not_found() -> Refusal {
    let why = "there is nothing here; events are taken by POST /api/v1/events, the rest of the API is in docs/admin.yaml";
    Refusal::new(StatusCode::NOT_FOUND, why.to_owned())
}

pub(super) async fn wrong_method(request: Request) -> Response {
    let (parts, body) = request.into_parts();
    discard(&parts.headers, body).await;
    Refusal::new(
        StatusCode::METHOD_NOT_ALLOWED,
        "not with this method; the header `allow` names those that are".to_owned(),
    )
    .into_response()
}

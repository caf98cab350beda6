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

use super::view::{BadEvent, FieldError, PROBLEM_JSON, Problem, ProblemKind};
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
    pub(super) kind: ProblemKind,
    pub(super) why: String,
    pub(super) retry_after: Option<u32>,
    /// The parameters or fields at fault.
    pub(super) fields: Vec<FieldError>,
    /// The first invalid events, and the number of all.
    pub(super) invalid: Option<(Vec<BadEvent>, usize)>,
}

impl Refusal {
    pub(super) fn new(status: StatusCode, why: String) -> Self {
        let (kind, fields) = (ProblemKind::Status, Vec::new());
        Self { status, kind, why, retry_after: None, fields, invalid: None }
    }

    pub(super) fn of_kind(status: StatusCode, kind: ProblemKind, why: impl Into<String>) -> Self {
        Self { kind, ..Self::new(status, why.into()) }
    }

    pub(super) fn bad(why: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, why.into())
    }

    /// Refuses a request for one parameter of its query, or one field of its body.
    pub(super) fn field(field: impl Into<String>, detail: impl Into<String>) -> Self {
        Self::fields(vec![FieldError { field: field.into(), detail: detail.into() }])
    }

    pub(super) fn fields(fields: Vec<FieldError>) -> Self {
        let each = fields.iter().map(|e| format!("`{}` {}", e.field, e.detail));
        let why = each.collect::<Vec<_>>().join("; ");
        let kind = ProblemKind::Field;
        Self { fields, ..Self::of_kind(StatusCode::BAD_REQUEST, kind, why) }
    }

    pub(super) fn unauthorized() -> Self {
        let why = "give a token of this daemon's configuration, as `authorization: Bearer TOKEN`: [admin] token, or one of [[admin.tokens]]";
        Self::of_kind(StatusCode::UNAUTHORIZED, ProblemKind::Token, why)
    }

    /// Refuses a request that a web page may have sent.
    pub(super) fn from_elsewhere(why: &str) -> Self {
        let why = format!("this request is refused: {why}");
        Self::of_kind(StatusCode::FORBIDDEN, ProblemKind::Origin, why)
    }

    pub(super) fn too_large() -> Self {
        let why = format!(
            "the body has more than {MAX_BODY} bytes, inflated or not; send fewer events at once"
        );
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, why)
    }

    pub(super) fn late() -> Self {
        let why = format!("the body did not come within {} s", READ_TIMEOUT.as_secs());
        Self::new(StatusCode::REQUEST_TIMEOUT, why)
    }

    pub(super) fn ended_early(why: &axum::Error) -> Self {
        Self::bad(format!("the body ended early: {why}"))
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
        let title = self.kind.title().or(self.status.canonical_reason());
        let problem = Problem {
            kind: self.kind,
            title: title.unwrap_or_default().to_owned(),
            status: self.status.as_u16(),
            detail: self.why,
            field: self.fields.first().map(|e| e.field.clone()),
            errors: (!self.fields.is_empty()).then_some(self.fields),
            invalid,
            events,
        };
        let mut answer = json(self.status, PROBLEM_JSON, &problem);
        let headers = answer.headers_mut();
        if let Some(seconds) = self.retry_after {
            headers.insert(header::RETRY_AFTER, seconds.into());
        }
        if self.status == StatusCode::UNAUTHORIZED {
            // RFC 9110, section 11.6.1: each such answer has it.
            headers.insert(header::WWW_AUTHENTICATE, header::HeaderValue::from_static("Bearer"));
        }
        answer
    }
}

pub(super) fn json_answer(status: StatusCode, body: &impl Serialize) -> Response {
    json(status, "application/json", body)
}

/// The answer of a request with a result.
pub(super) fn answer<A: Serialize>(result: Result<A, Refusal>) -> Response {
    match result {
        Ok(found) => json_answer(StatusCode::OK, &found),
        Err(refusal) => refusal.into_response(),
    }
}

fn json(status: StatusCode, media_type: &'static str, body: &impl Serialize) -> Response {
    let body = match serde_json::to_string(body) {
        Ok(body) => body,
        // Cannot happen with today's answers, which are plain data.
        Err(e) => return (StatusCode::INTERNAL_SERVER_ERROR, e.to_string()).into_response(),
    };
    (status, [(header::CONTENT_TYPE, media_type)], format!("{body}\n")).into_response()
}

pub(super) async fn not_found() -> Refusal {
    let why = "there is nothing here; the console is at /console/, events are taken by POST /api/v1/events, the rest of the API is in docs/admin.yaml";
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

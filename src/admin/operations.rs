//! The operations of operators over this API: each that succeeds is recorded, as far as the store
//! can be written. No request waits for that, or fails because of it.

use std::sync::Arc;

use axum::{
    Router,
    extract::{Request, State},
    http::Method,
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::get,
};

use tokio::sync::Semaphore;

use super::{
    answer::{Refusal, answer},
    ending::{MOST_TO_THEIR_END, to_its_end},
    guard::{Caller, with_token},
    query::{FromQuery, Parameters, Query},
    view::OperationList,
};
use crate::{
    clock,
    page::List,
    store::{NewOperation, Store},
};

/// The most characters of a subject that are recorded.
const MAX_SUBJECT: usize = 128;

/// What a handler adds to the record of its operation: a short text without secrets.
#[derive(Debug, Clone)]
pub(super) struct Details(pub(super) String);

/// Marks the answer of a request that changed nothing: it only counted.
#[derive(Debug, Clone, Copy)]
pub(super) struct DryRun;

/// Marks the answer of a request that failed when a part of it was done.
#[derive(Debug, Clone, Copy)]
pub(super) struct Partly;

pub(super) fn routes<S: Store>(store: S) -> Router {
    Router::new()
        .route("/v1/operations", get(list::<S>))
        .route_layer(middleware::from_fn(with_token))
        .with_state(store)
}

struct Part {
    limit: usize,
    before: Option<i64>,
}

impl FromQuery for Part {
    fn from_query(given: &mut Parameters) -> Self {
        let before = given.cursor(List::Operations).map(|cursor| cursor.row);
        Self { limit: given.limit(), before }
    }
}

async fn list<S: Store>(
    State(store): State<S>,
    Query(Part { limit, before }): Query<Part>,
) -> Response {
    let page = store.operations(before, limit).await;
    answer(page.map(OperationList::new).map_err(|e| Refusal::unavailable(e.to_string())))
}

/// The operation of a request, and its subject.
fn operation_of(method: &Method, path: &str) -> Option<(&'static str, String)> {
    if method != Method::POST {
        return None;
    }
    let parts: Vec<&str> = path.strip_prefix("/v1/")?.split('/').collect();
    let (what, subject) = match parts[..] {
        ["reload"] => ("reload", ""),
        ["subscribers", name, what] => (
            ["pause", "resume", "retry", "test", "replay"]
                .into_iter()
                .find(|known| *known == what)?,
            name,
        ),
        ["subscribers", name, "dead", "replay"] => ("replay_dead", name),
        ["subscribers", name, "dead", "purge"] => ("purge_dead", name),
        ["deliveries", id, "resend"] => ("resend", id),
        ["replays", id, "continue"] => ("continue_replay", id),
        ["replays", id, "cancel"] => ("cancel_replay", id),
        _ => return None,
    };
    Some((what, subject.chars().take(MAX_SUBJECT).collect()))
}

/// Records operations.
#[derive(Clone)]
pub(super) struct Recorder<S> {
    store: S,
    room: Arc<Semaphore>,
}

impl<S> Recorder<S> {
    pub(super) fn new(store: S) -> Self {
        Self { store, room: Arc::new(Semaphore::new(MOST_TO_THEIR_END)) }
    }
}

/// Records the operations behind it that have succeeded, or have done a part. Each ends, and is
/// recorded, although its client leaves.
pub(super) async fn recorded<S: Store>(
    State(Recorder { store, room }): State<Recorder<S>>,
    request: Request,
    next: Next,
) -> Response {
    let Some(operation) = operation_of(request.method(), request.uri().path()) else {
        return next.run(request).await;
    };
    let work = async move { Ok(run(store, operation, request, next).await) };
    to_its_end(&room, work).await.unwrap_or_else(IntoResponse::into_response)
}

async fn run<S: Store>(
    store: S,
    (what, subject): (&'static str, String),
    request: Request,
    next: Next,
) -> Response {
    let caller = request.extensions().get::<Caller>().cloned();
    let response = next.run(request).await;
    let marks = response.extensions();
    let is_done = if response.status().is_success() {
        marks.get::<DryRun>().is_none()
    } else {
        marks.get::<Partly>().is_some()
    };
    if is_done {
        let details = response.extensions().get::<Details>().cloned();
        let details = details.map(|Details(text)| text).unwrap_or_default();
        record(store, caller.as_ref(), what, subject, details);
    }
    response
}

/// Records an operation that has succeeded, without waiting for that.
pub(super) fn record<S: Store>(
    store: S,
    by: Option<&Caller>,
    what: &'static str,
    subject: String,
    details: String,
) {
    let by = by.and_then(|caller| caller.token.as_deref()).unwrap_or_default().to_owned();
    let new = NewOperation { at: clock::now(), by, what, subject, details };
    tokio::spawn(async move {
        if let Err(e) = store.add_operation(new).await {
            tracing::debug!(error = %e, what, "an operation is not recorded");
        }
    });
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use axum::{body::Body, routing::post};
    use hyper::service::Service as _;
    use hyper_util::service::TowerToHyperService;
    use tokio::{sync::Notify, time::timeout};

    use super::*;
    use crate::store::fake::FakeStore;

    /// The timeout of this test, long enough for any machine.
    const PATIENCE: Duration = Duration::from_secs(60);

    #[tokio::test]
    async fn an_operation_ends_and_is_recorded_although_its_client_leaves() {
        let store = FakeStore::default();
        let (began, goes_on) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
        let (begins, waits) = (began.clone(), goes_on.clone());
        let pause = async move || {
            begins.notify_one();
            waits.notified().await;
            "paused"
        };
        let recorder = Recorder::new(store.clone());
        let app = Router::new()
            .route("/v1/subscribers/{name}/pause", post(pause))
            .layer(middleware::from_fn_with_state(recorder, recorded::<FakeStore>));
        let request = Request::post("/v1/subscribers/a/pause").body(Body::empty());
        let asked = TowerToHyperService::new(app).call(request.expect("a request"));
        tokio::select! {
            _ = asked => panic!("it is answered before it ends"),
            () = began.notified() => {}
        }
        goes_on.notify_one();
        let recorded = async {
            while store.operations(None, 1).await.expect("a list").rows.is_empty() {
                tokio::task::yield_now().await;
            }
        };
        timeout(PATIENCE, recorded).await.expect("it is recorded");
    }

    #[test]
    fn each_operation_has_its_name_and_nothing_else_is_one() {
        let mut known = Vec::new();
        for (path, subject) in [
            ("/v1/subscribers/a/pause", "a"),
            ("/v1/subscribers/a/resume", "a"),
            ("/v1/subscribers/a/retry", "a"),
            ("/v1/subscribers/a/test", "a"),
            ("/v1/reload", ""),
            ("/v1/deliveries/msg_1/resend", "msg_1"),
            ("/v1/subscribers/a/replay", "a"),
            ("/v1/replays/rpl_1/continue", "rpl_1"),
            ("/v1/replays/rpl_1/cancel", "rpl_1"),
            ("/v1/subscribers/a/dead/replay", "a"),
            ("/v1/subscribers/a/dead/purge", "a"),
        ] {
            let (what, found) = operation_of(&Method::POST, path).expect(path);
            assert_eq!(found, subject);
            assert_eq!(operation_of(&Method::GET, path), None);
            known.push(what);
        }
        // The store records those of subscribers itself, with the change.
        assert_eq!(known, NewOperation::NAMES[..known.len()]);
        for path in [
            "/v1/events",
            "/v1/subscribers/a/dead",
            "/v1/subscribers/a/dead/x",
            "/v1/replays/a",
            "/v1/reload/x",
            "/",
        ] {
            assert_eq!(operation_of(&Method::POST, path), None, "{path}");
        }
    }
}

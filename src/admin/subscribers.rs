//! Subscribers that are made, changed and removed over the API. Each request needs a token.
//!
//! The work is done by functions of [`Control`], which the console uses too.

mod managing;

use std::sync::Arc;

use axum::{
    Extension, Router,
    body::Body,
    extract,
    http::{HeaderMap, HeaderValue, StatusCode, header},
    middleware,
    response::{IntoResponse, Response},
    routing::{post, put},
};

pub(super) use self::managing::{Backlog, Draft, PLACEHOLDER, Sample, Signed};
use super::{
    answer::{Refusal, discard, json_answer},
    body::{self, FromBody},
    control::Control,
    guard::{Caller, with_token},
    query::{FromQuery, Name, Parameters, Query},
    versions::{Expected, etag},
    view::{RotateSecret, SubscriberChange},
};
use crate::{config::managed::Document, queue::Queue, store::Store};

type This<Q, S> = extract::State<Arc<Control<Q, S>>>;

pub(super) fn routes<Q: Queue, S: Store>(control: Arc<Control<Q, S>>) -> Router {
    Router::new()
        .route("/v1/subscribers", post(add))
        .route("/v1/subscribers/{name}", put(replace).patch(patch).delete(remove))
        .route("/v1/subscribers/{name}/rotate-secret", post(rotate))
        .route_layer(middleware::from_fn(with_token))
        .with_state(control)
}

/// The most bytes of a subscriber's keys.
const MAX_DOCUMENT: usize = 64 * 1024;

impl FromBody for Document {
    const MAX: usize = MAX_DOCUMENT;
    const SHAPE: &'static str =
        "{\"name\":\"…\",\"url\":\"https://…\"}, with other keys of a subscriber";
}

/// A merge patch of a subscriber.
#[derive(Default, serde::Deserialize)]
#[serde(transparent)]
struct Patch(Document);

impl FromBody for Patch {
    const MAX: usize = MAX_DOCUMENT;
    const SHAPE: &'static str =
        "the keys to change, such as {\"events\":[\"user.*\"]}; a null removes a key";
    const MEDIA_TYPES: &'static [&'static str] =
        &["application/merge-patch+json", "application/json"];
}

impl FromBody for RotateSecret {
    const MAX: usize = 4096;
    const SHAPE: &'static str = "{}, or {\"overlap\":\"24h\"}";
}

impl FromQuery for Backlog {
    fn from_query(given: &mut Parameters) -> Self {
        let backlog = given.take("backlog", |text| match text {
            "keep" => Ok(Self::Keep),
            "drop" => Ok(Self::Drop),
            _ => Err("must be `keep` or `drop`"),
        });
        backlog.unwrap_or(Self::Unsaid)
    }
}

async fn add<Q: Queue, S: Store>(
    extract::State(control): This<Q, S>,
    Extension(caller): Extension<Caller>,
    headers: HeaderMap,
    body: Body,
) -> Response {
    let add = async |(), document: Document| {
        let added = control.add(&caller, document).await?;
        let path = format!("/api/v1/subscribers/{}", added.subscriber);
        let status = if added.bound { StatusCode::CREATED } else { StatusCode::ACCEPTED };
        let mut response = changed(status, &added);
        if let Ok(path) = HeaderValue::from_str(&path) {
            response.headers_mut().insert(header::LOCATION, path);
        }
        Ok(response)
    };
    requested(headers, body, Ok(()), add).await
}

async fn replace<Q: Queue, S: Store>(
    extract::State(control): This<Q, S>,
    Extension(caller): Extension<Caller>,
    Name(name): Name,
    headers: HeaderMap,
    body: Body,
) -> Response {
    let expected = Expected::of(&headers);
    let replace = async |expected, document| {
        control.replace(&caller, &name, expected, document).await.map(|done| after(&done))
    };
    requested(headers, body, expected, replace).await
}

async fn patch<Q: Queue, S: Store>(
    extract::State(control): This<Q, S>,
    Extension(caller): Extension<Caller>,
    Name(name): Name,
    headers: HeaderMap,
    body: Body,
) -> Response {
    let expected = Expected::of(&headers);
    let patch = async |expected, Patch(patch)| {
        control.patch(&caller, &name, expected, patch).await.map(|done| after(&done))
    };
    requested(headers, body, expected, patch).await
}

async fn remove<Q: Queue, S: Store>(
    extract::State(control): This<Q, S>,
    Extension(caller): Extension<Caller>,
    Name(name): Name,
    Query(backlog): Query<Backlog>,
    headers: HeaderMap,
) -> Response {
    let work = async {
        let expected = Expected::of(&headers)?;
        let removed = control.remove(&caller, &name, expected, backlog).await?;
        let is_done = removed.backlog != "dropping";
        let status = if is_done { StatusCode::OK } else { StatusCode::ACCEPTED };
        Ok::<_, Refusal>(json_answer(status, &removed))
    };
    work.await.unwrap_or_else(IntoResponse::into_response)
}

async fn rotate<Q: Queue, S: Store>(
    extract::State(control): This<Q, S>,
    Extension(caller): Extension<Caller>,
    Name(name): Name,
    headers: HeaderMap,
    body: Body,
) -> Response {
    let rotate = async |(), wanted: RotateSecret| {
        control.rotate_secret(&caller, &name, wanted).await.map(|done| after(&done))
    };
    requested(headers, body, Ok(()), rotate).await
}

/// Answers a request with a body, which is read only if the request's headers are in order. A body
/// that is not read is discarded, so that the client gets the refusal.
async fn requested<H, B: FromBody>(
    headers: HeaderMap,
    mut body: Body,
    of_headers: Result<H, Refusal>,
    does: impl AsyncFnOnce(H, B) -> Result<Response, Refusal>,
) -> Response {
    let work = async {
        let of_headers = of_headers?;
        let wanted = body::json(&headers, &mut body).await?;
        does(of_headers, wanted).await
    };
    match work.await {
        Ok(response) => response,
        Err(refusal) => {
            discard(&headers, body).await;
            refusal.into_response()
        }
    }
}

fn after(done: &SubscriberChange) -> Response {
    changed(if done.bound { StatusCode::OK } else { StatusCode::ACCEPTED }, done)
}

fn changed(status: StatusCode, change: &SubscriberChange) -> Response {
    let mut response = json_answer(status, change);
    response.headers_mut().extend(etag(&change.version));
    response
}

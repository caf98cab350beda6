//! The body of a request: read within bounds, and checked where it is JSON.

use axum::{
    body::Body,
    http::{HeaderMap, StatusCode},
};
use bytes::{Bytes, BytesMut};
use futures_util::StreamExt as _;
use serde::de::{DeserializeOwned, Error as _};
use serde_json::{Map, Value};
use tokio::time::timeout;

use super::{
    answer::{READ_TIMEOUT, Refusal, media_type},
    view::{FieldError, ProblemKind},
};

/// The most bytes for which memory is taken before they arrive: a length that is only announced must
/// not reserve memory.
const MAX_ANNOUNCED: usize = 64 * 1024;

/// The body of a request that can change something, as a JSON object. An empty one is the default.
pub(super) trait FromBody: DeserializeOwned + Default {
    /// The longest body in bytes.
    const MAX: usize;
    /// The shape of a valid body, for the error.
    const SHAPE: &'static str;
    /// The content types that it may have: none that a web page can send elsewhere unasked.
    const MEDIA_TYPES: &'static [&'static str] = &["application/json"];
}

/// The reason why a body was not read.
#[derive(Debug)]
pub(super) enum Unread {
    /// The rest of it was put back.
    TooLong,
    EndedEarly(axum::Error),
}

/// Reads a body of at most `most` bytes; `length` is the one that the client has announced.
pub(super) async fn read(
    body: &mut Body,
    length: Option<usize>,
    most: usize,
) -> Result<Bytes, Unread> {
    let mut bytes = BytesMut::with_capacity(length.unwrap_or(0).min(MAX_ANNOUNCED));
    let mut chunks = std::mem::take(body).into_data_stream();
    while let Some(chunk) = chunks.next().await {
        let chunk = chunk.map_err(Unread::EndedEarly)?;
        if bytes.len() + chunk.len() > most {
            *body = Body::from_stream(chunks);
            return Err(Unread::TooLong);
        }
        bytes.extend_from_slice(&chunk);
    }
    Ok(bytes.freeze())
}

/// Reads a body that is a JSON object. The refusal names the field at fault.
pub(super) async fn json<W: FromBody>(headers: &HeaderMap, body: &mut Body) -> Result<W, Refusal> {
    // A browser does not send this to another origin without asking first.
    if !W::MEDIA_TYPES.contains(&media_type(headers).as_str()) {
        let types = W::MEDIA_TYPES.join(" or ");
        let why = format!("the content-type must be {types}; the body is {}", W::SHAPE);
        return Err(Refusal::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, why));
    }
    let reading = timeout(READ_TIMEOUT, read(body, None, W::MAX));
    let body = reading.await.map_err(|_| Refusal::late())?.map_err(|why| match why {
        Unread::TooLong => {
            let why = format!("the body has more than {} bytes", W::MAX);
            Refusal::new(StatusCode::PAYLOAD_TOO_LARGE, why)
        }
        Unread::EndedEarly(e) => Refusal::ended_early(&e),
    })?;
    parsed(&body)
}

fn parsed<W: FromBody>(body: &[u8]) -> Result<W, Refusal> {
    let found: Result<W, serde_json::Error> = match body.trim_ascii_start() {
        [] if body.is_empty() => Ok(W::default()),
        [b'{', ..] => serde_json::from_slice(body),
        // A derived type is read from an array too, field by field.
        _ => Err(serde_json::Error::custom("it is no JSON object")),
    };
    found.map_err(|e| {
        let why = format!("the body is not {}: {e}", W::SHAPE);
        let detail = e.to_string();
        let field = field_at_fault::<W>(body).map(|field| FieldError { field, detail });
        let (status, kind) = (StatusCode::BAD_REQUEST, ProblemKind::Field);
        Refusal { fields: field.into_iter().collect(), ..Refusal::of_kind(status, kind, why) }
    })
}

/// The first field of a body that alone is not valid either. It works for types whose fields can
/// all be left out, as those of requests can.
fn field_at_fault<W: FromBody>(body: &[u8]) -> Option<String> {
    let fields: Map<String, Value> = serde_json::from_slice(body).ok()?;
    let is_wrong = |(name, value): &(String, Value)| {
        W::deserialize(Value::Object(Map::from_iter([(name.clone(), value.clone())]))).is_err()
    };
    fields.into_iter().find(is_wrong).map(|(name, _)| name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admin::view::RetryNow;

    fn wrong(body: &str) -> (String, Option<String>) {
        let refusal = parsed::<RetryNow>(body.as_bytes()).expect_err(body);
        assert_eq!(refusal.status, 400);
        (refusal.why, refusal.fields.into_iter().next().map(|e| e.field))
    }

    #[test]
    fn the_field_at_fault_is_named_whatever_is_wrong_with_it() {
        for (body, part, field) in [
            (r#"{"try_only":1}"#, "invalid type", Some("try_only")),
            (r#"{"try_only":true,"ids":["a",7]}"#, "invalid type", Some("ids")),
            (r#"{"ids":null}"#, "invalid type", Some("ids")),
            (r#"{"ids":[],"all":true}"#, "unknown field", Some("all")),
            (r#"{"ids":[],"ids":[]}"#, "duplicate field", None),
            (r#"{"ids":[]"#, "EOF", None),
            (r#"{} {}"#, "trailing", None),
            (r#"[["a"],true]"#, "it is no JSON object", None),
            ("null", "it is no JSON object", None),
            (" ", "it is no JSON object", None),
        ] {
            let (why, named) = wrong(body);
            assert!(
                why.contains(part) && why.contains(RetryNow::SHAPE) && named.as_deref() == field,
                "{body}: {why}: {named:?}"
            );
        }
        for body in ["", "{}", " {\n} "] {
            let read = parsed::<RetryNow>(body.as_bytes()).expect(body);
            assert!(read.ids.is_none() && !read.try_only);
        }
    }

    #[tokio::test]
    async fn a_body_is_read_up_to_its_limit_and_the_rest_is_left() {
        let chunked = || {
            let chunks = ["12", "34", "56"].map(Ok::<_, std::io::Error>);
            Body::from_stream(futures_util::stream::iter(chunks))
        };
        let mut body = chunked();
        assert_eq!(read(&mut body, Some(usize::MAX), 6).await.expect("it fits"), "123456");
        let mut body = chunked();
        assert!(matches!(read(&mut body, None, 3).await, Err(Unread::TooLong)));
        let rest = axum::body::to_bytes(body, 10).await.expect("the rest");
        assert_eq!(rest, "56");
    }
}

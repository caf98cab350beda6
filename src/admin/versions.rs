//! Versions of what can be changed: `ETag` and `If-Match`.

use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};

use super::{
    answer::{Refusal, header_text},
    view::ProblemKind,
};

/// The header `etag` of a version.
pub(super) fn etag(version: &str) -> Option<(HeaderName, HeaderValue)> {
    let value = HeaderValue::from_str(&format!("\"{version}\"")).ok()?;
    Some((header::ETAG, value))
}

/// The versions that a request takes: its header `if-match` (RFC 9110, section 13.1.1).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Expected {
    Any,
    OneOf(Vec<u64>),
}

impl Expected {
    pub(super) fn of(headers: &HeaderMap) -> Result<Self, Refusal> {
        let Some(_) = headers.get(header::IF_MATCH) else {
            let why = "give the version that you know, as `If-Match` with the `ETag` of GET: a change that somebody else has made meanwhile is not overwritten";
            return Err(Refusal::of_kind(
                StatusCode::PRECONDITION_REQUIRED,
                ProblemKind::Version,
                why,
            ));
        };
        let given = header_text(headers, header::IF_MATCH).trim();
        if given == "*" {
            return Ok(Self::Any);
        }
        // A weak one, `W/"…"`, never matches; nor does what is no version.
        let version = |text: &str| text.trim().strip_prefix('"')?.strip_suffix('"')?.parse().ok();
        Ok(Self::OneOf(given.split(',').filter_map(version).collect()))
    }

    pub(super) fn includes(&self, version: u64) -> bool {
        match self {
            Self::Any => true,
            Self::OneOf(versions) => versions.contains(&version),
        }
    }
}

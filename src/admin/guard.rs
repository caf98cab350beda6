//! Lets through requests that carry the token and that no web page has sent.

use std::{net::IpAddr, sync::Arc};

use axum::{
    extract::{Request, State},
    http::{HeaderMap, HeaderName, header},
    middleware::Next,
    response::{IntoResponse as _, Response},
};
use subtle::ConstantTimeEq as _;

use super::answer::{Refusal, discard, header_text};
use crate::crypto::secret::Secret;

/// The reason to refuse a request as one that a web page made a browser send.
pub(super) fn from_elsewhere(headers: &HeaderMap, has_token: bool) -> Option<&'static str> {
    let text = |name| header_text(headers, name);
    if !matches!(text(HeaderName::from_static("sec-fetch-site")), "" | "none" | "same-origin") {
        return Some("it comes from a page of another site");
    }
    let host = text(header::HOST);
    let origin = text(header::ORIGIN);
    if !origin.is_empty()
        && origin.split_once("://").is_none_or(|(_, o)| !o.eq_ignore_ascii_case(host))
    {
        return Some("it comes from a page of another origin");
    }
    // The owner of any name can make it lead to this machine, and a page of that name is then of
    // this origin.
    if !has_token && !is_of_this_machine(host) {
        return Some("without [admin] token only an IP address or `localhost` is answered to");
    }
    None
}

/// Whether a header `host` has an IP address or `localhost`, which no other party can make lead
/// here.
pub(super) fn is_of_this_machine(host: &str) -> bool {
    let without_port = host
        .rsplit_once(':')
        .filter(|(_, port)| port.bytes().all(|b| b.is_ascii_digit()))
        .map_or(host, |(name, _)| name);
    let name = without_port.trim_start_matches('[').trim_end_matches(']');
    host.is_empty() || name.eq_ignore_ascii_case("localhost") || name.parse::<IpAddr>().is_ok()
}

/// Lets through requests with the token, if there is one, that no web page has sent.
pub(super) async fn authorized(
    State(token): State<Option<Arc<Secret>>>,
    request: Request,
    next: Next,
) -> Response {
    if let Some(why) = from_elsewhere(request.headers(), token.is_some()) {
        let (parts, body) = request.into_parts();
        discard(&parts.headers, body).await;
        return Refusal::from_elsewhere(why).into_response();
    }
    let Some(token) = token else { return next.run(request).await };
    if carries(request.headers(), &token) {
        return next.run(request).await;
    }
    let (parts, body) = request.into_parts();
    discard(&parts.headers, body).await;
    Refusal::unauthorized().into_response()
}

/// Whether a request has the token; compared in constant time.
pub(super) fn carries(headers: &HeaderMap, token: &Secret) -> bool {
    let given = header_text(headers, header::AUTHORIZATION).split_once(' ');
    let given = given
        .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"))
        .map_or("", |(_, given)| given.trim());
    bool::from(given.as_bytes().ct_eq(token.expose().as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        let pair = |(name, value): &(&'static str, &'static str)| {
            (HeaderName::from_static(name), header::HeaderValue::from_static(value))
        };
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
}

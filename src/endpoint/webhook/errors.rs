//! The meaning of the client's errors.

use std::{error::Error, io::ErrorKind};

use hyper_util::client::legacy;

use super::{
    body::Progress,
    connections::Answered,
    resolver::{Blocked, ResolveError},
};
use crate::{delivery::Failure, telemetry::resources};

/// The most resends of a request in one attempt because the receiver did not process it. HTTP/2
/// reports that, and may do so on each connection: a receiver that refuses everything must not get
/// requests indefinitely.
const MOST_REFUSED: u32 = 3;

/// An error and its causes, down to the first.
fn causes<'e>(e: &'e (dyn Error + 'static)) -> impl Iterator<Item = &'e (dyn Error + 'static)> {
    std::iter::successors(Some(e), |&e| e.source())
}

fn cause<E: Error + 'static>(e: &reqwest::Error) -> Option<&E> {
    causes(e).find_map(<dyn Error>::downcast_ref)
}

/// The first cause of an error, without the URL and without the receiver's text: a GOAWAY frame can
/// hold any text.
pub(super) fn chain(e: &reqwest::Error) -> String {
    if let Some(h2) = cause::<h2::Error>(e).filter(|h2| h2.is_remote()) {
        let ended = if h2.is_go_away() { "connection" } else { "stream" };
        let reason = h2.reason().unwrap_or(h2::Reason::PROTOCOL_ERROR);
        return format!("the receiver ended the {ended}: {}", reason.description());
    }
    // Each level repeats the next in its own text; the last is the clearest.
    causes(e).skip(1).last().map_or_else(|| e.to_string(), ToString::to_string)
}

/// The number of resends at once, in all, that this error of a request with this progress allows.
/// Receivers know the batch by its id, so a resend does no harm if the first was processed.
pub(super) fn resends(e: &reqwest::Error, progress: &Progress, answered: &Answered) -> u32 {
    let client = cause::<legacy::Error>(e);
    if let Some(h2) = cause::<h2::Error>(e).filter(|h2| h2.is_remote()) {
        // RFC 9113, sections 6.8 and 8.7: it was not processed.
        let going_away = h2.is_go_away() && h2.reason() == Some(h2::Reason::NO_ERROR);
        let refused = h2.is_reset() && h2.reason() == Some(h2::Reason::REFUSED_STREAM);
        return if going_away || refused { MOST_REFUSED } else { 0 };
    }
    let over_h2 =
        client.and_then(legacy::Error::connect_info).is_some_and(|c| c.is_negotiated_h2());
    if over_h2
        && !progress.has_begun()
        && cause::<hyper::Error>(e).is_some_and(hyper::Error::is_canceled)
    {
        // It waited for a stream of a connection that ended.
        return MOST_REFUSED;
    }
    // Many servers close a connection after some seconds without a request, and the next request
    // may cross that.
    u32::from(ended(e) && client.is_some_and(|client| answered.has(client)))
}

/// Why there is no answer.
#[derive(Debug)]
pub(super) enum NotAnswered {
    /// Nothing was sent, and the receiver is not the cause.
    Unsent(String),
    Failed(Failure),
}

/// The meaning of an error of a request with this progress. `only_v4`: the endpoint has only IPv4
/// addresses.
pub(super) fn classify(e: reqwest::Error, progress: &Progress, only_v4: bool) -> NotAnswered {
    match own_lack(&e, only_v4) {
        Some(what) => NotAnswered::Unsent(what.to_owned()),
        None => NotAnswered::Failed(failure(e, progress)),
    }
}

/// What this process lacks to connect, if that is the cause.
fn own_lack(e: &reqwest::Error, only_v4: bool) -> Option<&'static str> {
    if let Some(ResolveError(unresolved)) = cause(e) {
        return resources::lacking(unresolved).or_else(resources::without_descriptors);
    }
    if !e.is_connect() {
        return None;
    }
    causes(e).filter_map(|c| c.downcast_ref::<std::io::Error>()).find_map(|io| {
        // For an IPv6 address it means that this machine has no IPv6.
        let about_the_address = io.kind() == ErrorKind::AddrNotAvailable && !only_v4;
        if about_the_address { None } else { resources::lacking(io) }
    })
}

fn failure(e: reqwest::Error, progress: &Progress) -> Failure {
    let e = e.without_url();
    if let Some(blocked) = cause::<Blocked>(&e) {
        return Failure::AddressBlocked(blocked.to_string());
    }
    if let Some(unresolved) = cause::<ResolveError>(&e) {
        return Failure::Dns(unresolved.to_string());
    }
    if let Some(tls) = causes(&e).find_map(tls_error) {
        return Failure::Tls(tls);
    }
    if e.is_timeout() {
        return Failure::Timeout;
    }
    if let Some(why) = causes(&e).find_map(proxy_error) {
        return Failure::Connect(why);
    }
    let why = chain(&e);
    if e.is_connect() {
        Failure::Connect(why)
    } else if e.is_builder() {
        Failure::Internal(why)
    } else if ended(&e) {
        Failure::Reset { why, while_sending: progress.is_sending() || is_of_writing(&e) }
    } else {
        Failure::BadAnswer(why)
    }
}

pub(super) fn tls_error(e: &(dyn Error + 'static)) -> Option<String> {
    if let Some(tls) = e.downcast_ref::<rustls::Error>() {
        return Some(tls.to_string());
    }
    // The connector puts the I/O error of the handshake into one of its own, and `source` skips the
    // inner one.
    tls_error(e.downcast_ref::<std::io::Error>()?.get_ref()?)
}

/// A proxy's refusal to open a tunnel. The connector knows 200 as consent and distinguishes 407; its
/// error has nothing but the text.
fn proxy_error(e: &(dyn Error + 'static)) -> Option<String> {
    let text = e.to_string();
    let (_, why) = text.split_once("tunnel error: ")?;
    let why = match why {
        "proxy authorization required" => "the proxy answered 407: check user and password in http.proxy".to_owned(),
        "unsuccessful" => {
            "the proxy refused the tunnel: it answered CONNECT with another status than 200 and 407; see its log and what it allows"
                .to_owned()
        }
        "unexpected end of file" => {
            "the proxy closed the connection instead of answering CONNECT; is http.proxy a proxy for HTTP?".to_owned()
        }
        why => format!("the proxy opened no tunnel: {why}"),
    };
    Some(why)
}

/// Whether the connection broke during a write: hyper reports that for a body.
fn is_of_writing(e: &reqwest::Error) -> bool {
    causes(e)
        .filter_map(|c| c.downcast_ref::<hyper::Error>())
        .any(hyper::Error::is_body_write_aborted)
        || causes(e)
            .filter_map(|c| c.downcast_ref::<std::io::Error>())
            .any(|io| io.kind() == ErrorKind::BrokenPipe)
}

/// Whether the connection or the stream ended, and not the answer was wrong.
fn ended(e: &reqwest::Error) -> bool {
    causes(e).skip(1).any(|c| {
        if let Some(io) = c.downcast_ref::<std::io::Error>() {
            // hyper reports malformed chunks as I/O errors of these kinds; no connection breaks
            // with them.
            return !matches!(io.kind(), ErrorKind::InvalidInput | ErrorKind::InvalidData);
        }
        if let Some(h2) = c.downcast_ref::<h2::Error>() {
            return h2.is_remote() && (h2.is_reset() || h2.is_go_away());
        }
        // Canceled: it was gone before the request was on its way.
        c.downcast_ref::<hyper::Error>()
            .is_some_and(|e| e.is_canceled() || e.is_closed() || e.is_incomplete_message())
    })
}

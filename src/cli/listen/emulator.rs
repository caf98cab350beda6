//! What a known receiver makes of a request, by its model.

use std::{
    collections::HashMap,
    time::{Duration, SystemTime},
};

use axum::http::HeaderMap;
use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use serde_json::value::RawValue;

use super::text;
use crate::{
    clock,
    config::model::{Model, Refusal},
    crypto::{
        secret::Secret,
        signature::{self, Encoding, Scheme, Signer},
    },
    event::{head, payload::Format},
};

/// A request as it came.
pub(super) struct Given<'a> {
    pub(super) headers: &'a HeaderMap,
    pub(super) raw: &'a [u8],
    /// The body inflated; `None` of one that is not compressed, or is not gzip.
    pub(super) body: Option<&'a [u8]>,
}

/// The receiver's answer, and what becomes of the events.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Verdict {
    pub(super) status: u16,
    pub(super) body: &'static str,
    pub(super) refusal: Option<Refusal>,
    /// Events that it has accepted and drops, because they are too old.
    pub(super) dropped: usize,
}

impl Verdict {
    /// For people.
    pub(super) fn words(&self, model: &Model) -> String {
        match (self.refusal, self.dropped) {
            (Some(why), _) => format!("REFUSED as {} would: {}", model.name, why.name()),
            (None, 0) => format!("taken as {} would", model.name),
            (None, dropped) => format!(
                "taken as {} would, which DROPS {dropped} of them for their age",
                model.name
            ),
        }
    }
}

/// With `secrets` the keys, tokens and signatures must be right; without, they must be there.
pub(super) fn judge(
    model: &Model,
    given: &Given<'_>,
    secrets: &[Secret],
    now: SystemTime,
) -> Verdict {
    match taken(model, given, secrets, now) {
        Ok(events) => {
            let (status, body) = model.success;
            let is_old =
                |event: &&RawValue| model.max_age.is_some_and(|age| is_older(event, age, now));
            let dropped = events.iter().map(|event| &**event).filter(is_old).count();
            Verdict { status, body, refusal: None, dropped }
        }
        Err(refusal) => {
            let (status, body) = (model.refusal)(refusal);
            Verdict { status, body, refusal: Some(refusal), dropped: 0 }
        }
    }
}

/// The events that it reads.
fn taken(
    model: &Model,
    given: &Given<'_>,
    secrets: &[Secret],
    now: SystemTime,
) -> Result<Vec<Box<RawValue>>, Refusal> {
    keys(model, given, secrets)?;
    if !model.takes_type(text(given.headers, "content-type").unwrap_or_default()) {
        return Err(Refusal::ContentType);
    }
    let body = match text(given.headers, "content-encoding") {
        None => given.raw,
        Some("gzip") if model.gzip => given.body.ok_or(Refusal::NotJson)?,
        Some(_) => return Err(Refusal::Coding),
    };
    signature(model, given, secrets, now)?;
    if model.max_bytes.is_some_and(|most| body.len() > most) {
        return Err(Refusal::TooLarge);
    }
    if body.trim_ascii().is_empty() {
        return Err(Refusal::Empty);
    }
    // Raw: some events are no values for serde_json, such as those with 1e400.
    let values = serde_json::Deserializer::from_slice(body).into_iter::<Box<RawValue>>();
    let values = values.collect::<Result<Vec<_>, _>>().map_err(|_| Refusal::NotJson)?;
    let events = model.formats.iter().find_map(|format| events(*format, &values));
    let events = events.ok_or(Refusal::Shape)?;
    if events.iter().any(|event| matches!(event.get(), "null" | "\"\"")) {
        return Err(Refusal::Blank);
    }
    if model.max_events.is_some_and(|most| events.len() > most) {
        return Err(Refusal::TooManyEvents);
    }
    Ok(events)
}

/// The events of a body's values, if it is of this format.
fn events(format: Format, values: &[Box<RawValue>]) -> Option<Vec<Box<RawValue>>> {
    let objects = |values: &[Box<RawValue>]| {
        values.iter().all(|value| value.get().starts_with('{')).then(|| values.to_vec())
    };
    match (format, values) {
        (Format::JsonArray | Format::CloudEventsBatch, [one]) => {
            objects(&serde_json::from_str::<Vec<Box<RawValue>>>(one.get()).ok()?)
        }
        (Format::Json, [one]) => {
            objects(&serde_json::from_str::<Vec<Box<RawValue>>>(field(one, "events")?.get()).ok()?)
        }
        (Format::Single, [_]) | (Format::JsonLines, _) => objects(values),
        (Format::SplunkHec, all) => all.iter().map(|one| field(one, "event")).collect(),
        (Format::Slack, [one]) => field(one, "text")
            .filter(|text| text.get().starts_with('"') && text.get() != "\"\"")
            .map(|text| vec![text]),
        _ => None,
    }
}

/// The value of an object's field.
fn field(object: &RawValue, name: &str) -> Option<Box<RawValue>> {
    serde_json::from_str::<HashMap<String, Box<RawValue>>>(object.get()).ok()?.remove(name)
}

fn keys(model: &Model, given: &Given<'_>, secrets: &[Secret]) -> Result<(), Refusal> {
    let is_right = |key: &str| secrets.is_empty() || secrets.iter().any(|s| s.expose() == key);
    for name in model.headers {
        let key = text(given.headers, name).ok_or(Refusal::NoCredentials)?;
        if !is_right(key) {
            return Err(Refusal::WrongCredentials);
        }
    }
    if model.authorization.is_empty() {
        return Ok(());
    }
    let value = text(given.headers, "authorization").ok_or(Refusal::NoCredentials)?;
    let (scheme, token) = value.split_once(' ').ok_or(Refusal::BadCredentials)?;
    if !model.authorization.contains(&scheme) {
        return Err(Refusal::BadCredentials);
    }
    let token = match scheme {
        "Basic" => {
            let pair = BASE64.decode(token).ok().and_then(|pair| String::from_utf8(pair).ok());
            let password = pair.as_ref().and_then(|pair| pair.split_once(':'));
            password.ok_or(Refusal::BadCredentials)?.1.to_owned()
        }
        _ => token.to_owned(),
    };
    if is_right(&token) { Ok(()) } else { Err(Refusal::WrongCredentials) }
}

fn signature(
    model: &Model,
    given: &Given<'_>,
    secrets: &[Secret],
    now: SystemTime,
) -> Result<(), Refusal> {
    let Some((header, prefix)) = model.signature.filter(|_| !secrets.is_empty()) else {
        return Ok(());
    };
    let signature = text(given.headers, header).ok_or(Refusal::NoCredentials)?;
    let signed =
        if model.verifies_compressed { given.raw } else { given.body.unwrap_or(given.raw) };
    let is_genuine = match header {
        "webhook-signature" | "mailtrap-signature" => {
            let seconds = clock::unix_seconds(now);
            let header = |name: &str| text(given.headers, name);
            secrets.iter().any(|s| signature::verify(s, header, signed, seconds).is_ok())
        }
        _ => secrets.iter().any(|secret| {
            let (header, prefix) = (header.to_owned(), prefix.to_owned());
            let scheme = Scheme::Custom { header, prefix, encoding: Encoding::Hex };
            let signer = Signer::try_new(vec![scheme], std::slice::from_ref(secret));
            let expected = signer.map(|signer| signer.headers("", 0, signed)).unwrap_or_default();
            expected.iter().any(|(_, value)| value == signature)
        }),
    };
    if is_genuine { Ok(()) } else { Err(Refusal::WrongCredentials) }
}

/// Whether an event's `timestamp` is older than this. In milliseconds it is as well as in seconds.
fn is_older(event: &RawValue, age: Duration, now: SystemTime) -> bool {
    const MILLISECONDS: u64 = 100_000_000_000;
    let at = head(event.get().as_bytes()).ok().and_then(|head| head.timestamp);
    let at = at.map(|at| match at {
        MILLISECONDS.. => Duration::from_millis(at),
        _ => Duration::from_secs(at),
    });
    let at = at.and_then(|since| SystemTime::UNIX_EPOCH.checked_add(since));
    at.is_some_and(|at| now.duration_since(at).is_ok_and(|old| old > age))
}

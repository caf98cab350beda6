//! What a known receiver makes of a request, by its model.

use std::time::{Duration, SystemTime};

use axum::http::HeaderMap;
use serde_json::{Value, value::RawValue};

use super::text;
use crate::{
    clock,
    config::model::{Model, Refusal},
    crypto::{
        secret::Secret,
        signature::{self, Encoding, Scheme, Signer},
    },
    event::payload::Format,
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
                |event: &&Value| model.max_age.is_some_and(|age| is_older(event, age, now));
            let dropped = events.iter().filter(is_old).count();
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
) -> Result<Vec<Value>, Refusal> {
    credentials(model, given, secrets, now)?;
    let content_type = text(given.headers, "content-type").unwrap_or_default();
    if !model.content_types.is_empty() && !model.content_types.contains(&content_type) {
        return Err(Refusal::ContentType);
    }
    let body = match text(given.headers, "content-encoding") {
        None => given.raw,
        Some("gzip") if model.gzip => given.body.ok_or(Refusal::NotJson)?,
        Some(_) => return Err(Refusal::Coding),
    };
    if model.max_bytes.is_some_and(|most| body.len() > most) {
        return Err(Refusal::TooLarge);
    }
    if body.trim_ascii().is_empty() {
        return Err(Refusal::Empty);
    }
    let values = serde_json::Deserializer::from_slice(body).into_iter::<Box<RawValue>>();
    let values = values.collect::<Result<Vec<_>, _>>().map_err(|_| Refusal::NotJson)?;
    // What serde_json cannot hold, such as 1e400, others can: it is some value.
    let values: Vec<Value> =
        values.iter().map(|raw| serde_json::from_str(raw.get()).unwrap_or_default()).collect();
    let events = model.formats.iter().find_map(|format| events(*format, &values));
    let events = events.ok_or(Refusal::Shape)?;
    if model.max_events.is_some_and(|most| events.len() > most) {
        return Err(Refusal::TooManyEvents);
    }
    Ok(events)
}

/// The events of a body's values, if it is of this format.
fn events(format: Format, values: &[Value]) -> Option<Vec<Value>> {
    let objects = |values: &[Value]| values.iter().all(Value::is_object).then(|| values.to_vec());
    match (format, values) {
        (Format::JsonArray | Format::CloudEventsBatch, [Value::Array(all)]) => objects(all),
        (Format::Json, [one]) => objects(one.get("events")?.as_array()?),
        (Format::Single, [one]) => objects(std::slice::from_ref(one)),
        (Format::JsonLines, all) => objects(all),
        (Format::SplunkHec, all) => all.iter().map(|one| one.get("event").cloned()).collect(),
        (Format::Slack, [one]) => {
            one.get("text")?.as_str().filter(|text| !text.is_empty()).map(|_| vec![one.clone()])
        }
        _ => None,
    }
}

fn credentials(
    model: &Model,
    given: &Given<'_>,
    secrets: &[Secret],
    now: SystemTime,
) -> Result<(), Refusal> {
    let is_right = |key: &str| secrets.is_empty() || secrets.iter().any(|s| s.expose() == key);
    for name in model.headers {
        let key = text(given.headers, name).ok_or(Refusal::NoCredentials)?;
        if !is_right(key) {
            return Err(Refusal::WrongCredentials);
        }
    }
    if let Some(scheme) = model.authorization {
        let value = text(given.headers, "authorization").ok_or(Refusal::NoCredentials)?;
        let (given_scheme, token) = value.split_once(' ').ok_or(Refusal::BadCredentials)?;
        if given_scheme != scheme {
            return Err(Refusal::BadCredentials);
        }
        if !is_right(token) {
            return Err(Refusal::WrongCredentials);
        }
    }
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

/// Whether an event's `timestamp` is older than this.
fn is_older(event: &Value, age: Duration, now: SystemTime) -> bool {
    let at = event.get("timestamp").and_then(Value::as_u64).map(Duration::from_secs);
    let at = at.and_then(|since| SystemTime::UNIX_EPOCH.checked_add(since));
    at.is_some_and(|at| now.duration_since(at).is_ok_and(|old| old > age))
}

//! Events, envelopes and dead letters as AMQP messages.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use lapin::{
    BasicProperties,
    message::Delivery,
    types::{AMQPValue, FieldTable, ShortString},
};

use super::wire::Arrival;
use crate::{
    clock,
    delivery::{AttemptLog, Batch, DeadLetter, MessageKind, Print, Prints, Reason, cut_error},
    event::{
        event_type,
        inflate::{Broken, Coding, inflate},
        payload::Format,
    },
    queue::{Checked, Event, MAX_TRACEPARENT, Receipt, Taken, Waiting},
};

const KIND: &str = "x-hooktrail-kind";
const REASON: &str = "x-hooktrail-reason";
const BATCH_ID: &str = "x-hooktrail-batch-id";
const ATTEMPTS: &str = "x-hooktrail-attempts";
const STATUS: &str = "x-hooktrail-status";
const CONTENT_ENCODING: &str = "x-hooktrail-content-encoding";
const ERROR: &str = "x-hooktrail-error";
const EVENTS: &str = "x-hooktrail-events";
const FIRST_ATTEMPT_AT: &str = "x-hooktrail-first-attempt-at";
const DIED_AT: &str = "x-hooktrail-died-at";
/// W3C Trace Context, as producers write it into a header.
const TRACEPARENT: &str = "traceparent";
/// Header in which kombu says how it compressed a body; its `content_encoding` is the charset.
const COMPRESSION: &str = "compression";
/// The attempt log; see [`AttemptLog::to_text`].
const ATTEMPT_LOG: &str = "x-hooktrail-story";
/// The prints of the events; see [`Print::to_text`]. Absent where they are unknown or too many.
const PRINTS: &str = "x-hooktrail-event-prints";
/// `true` if an operator has replayed the message; otherwise absent.
const REPLAY: &str = "x-hooktrail-replay";
/// When a retry leaves the ladder, in Unix milliseconds; not in envelopes of earlier versions.
const DUE_AT: &str = "x-hooktrail-due-at";

/// A message to be published, with its destination.
#[derive(Debug, Clone)]
pub(super) struct Message {
    pub(super) exchange: String,
    pub(super) routing_key: String,
    pub(super) body: Bytes,
    pub(super) properties: BasicProperties,
}

impl Message {
    /// A message that goes directly into a queue.
    pub(super) fn to_queue(queue: String, body: Bytes, properties: BasicProperties) -> Self {
        Self { exchange: String::new(), routing_key: queue, body, properties }
    }
}

/// Properties are never copied: a copied `x-death`, `CC`, `expiration` or `user_id` would make the
/// broker delay, misroute, drop or refuse the message.
fn properties(content_type: Option<&str>, message_id: Option<&str>) -> BasicProperties {
    let short = |s: &str| ShortString::try_new(s).ok();
    let mut p = BasicProperties::default().with_delivery_mode(2);
    if let Some(t) = content_type.and_then(short) {
        p = p.with_content_type(t);
    }
    if let Some(id) = message_id.and_then(short) {
        p = p.with_message_id(id);
    }
    p
}

fn text(value: &str) -> AMQPValue {
    AMQPValue::LongString(value.into())
}

fn time(value: SystemTime) -> AMQPValue {
    text(&clock::rfc3339(value))
}

/// An event for the exchange.
pub(super) fn event(
    body: Bytes,
    message_id: Option<&str>,
    traceparent: Option<&str>,
) -> (Bytes, BasicProperties) {
    let now = clock::unix_seconds(clock::now());
    let mut p = properties(Some("application/json"), message_id).with_timestamp(now);
    if let Some(trace) = traceparent.filter(|t| t.len() <= MAX_TRACEPARENT) {
        let mut headers = FieldTable::default();
        headers.insert(TRACEPARENT.into(), text(trace));
        p = p.with_headers(headers);
    }
    (body, p)
}

/// The trace context that a producer, or hooktrail, wrote into a header.
fn traceparent(p: &BasicProperties) -> Option<String> {
    let headers = Headers(p.headers().as_ref());
    headers.text(TRACEPARENT).ok().flatten().filter(|t| t.len() <= MAX_TRACEPARENT)
}

/// The text of a header with its exact bytes; `None` if there is none of this name, or it has another
/// type, or is not UTF-8.
pub(super) fn exact_text<'p>(p: &'p BasicProperties, name: &str) -> Option<&'p str> {
    match Headers(p.headers().as_ref()).get(name)? {
        AMQPValue::LongString(text) => std::str::from_utf8(text.as_bytes()).ok(),
        _ => None,
    }
}

/// The message id and the trace context of an event's producer.
pub(super) fn origin(p: &BasicProperties) -> (Option<String>, Option<Arc<str>>) {
    // An empty id is none: two events that have it are no copies of one.
    let id = owned(p.message_id()).filter(|id| !id.is_empty());
    (id, traceparent(p).map(Into::into))
}

/// The properties of an event from a source queue, for the internal exchange: content type, message
/// id, timestamp and `traceparent`, and nothing else.
pub(super) fn relayed(from: &BasicProperties) -> BasicProperties {
    let id = from.message_id().as_ref().map(ShortString::as_str);
    let mut p = properties(
        Some(from.content_type().as_ref().map_or("application/json", ShortString::as_str)),
        id,
    );
    if let Some(t) = from.timestamp() {
        p = p.with_timestamp(*t);
    }
    if let Some(trace) = traceparent(from) {
        let mut headers = FieldTable::default();
        headers.insert(TRACEPARENT.into(), text(&trace));
        p = p.with_headers(headers);
    }
    p
}

/// A dead event as it returns into the main queue.
pub(super) fn event_again(letter: &DeadLetter) -> (Bytes, BasicProperties) {
    let p = properties(
        Some(letter.content_type.as_deref().unwrap_or("application/json")),
        letter.id.as_deref(),
    );
    (letter.body.clone(), encoded(p, letter.content_encoding.as_deref()))
}

fn encoded(p: BasicProperties, encoding: Option<&str>) -> BasicProperties {
    match encoding.and_then(|e| ShortString::try_new(e).ok()) {
        Some(encoding) => p.with_content_encoding(encoding),
        None => p,
    }
}

pub(super) fn envelope(e: &Batch) -> (Bytes, BasicProperties) {
    let mut h = FieldTable::default();
    h.insert(BATCH_ID.into(), text(e.id.as_str()));
    h.insert(ATTEMPTS.into(), AMQPValue::LongLongInt(e.attempts.into()));
    h.insert(EVENTS.into(), AMQPValue::LongLongInt(e.events.into()));
    if let Some(at) = e.first_attempt_at {
        h.insert(FIRST_ATTEMPT_AT.into(), time(at));
    }
    if let Some(trace) = &e.traceparent {
        h.insert(TRACEPARENT.into(), text(trace));
    }
    if !e.attempt_log.is_empty() {
        h.insert(ATTEMPT_LOG.into(), text(&e.attempt_log.to_text()));
    }
    if let Some(prints) = Print::to_text(&e.prints) {
        h.insert(PRINTS.into(), text(&prints));
    }
    if e.replay {
        h.insert(REPLAY.into(), text("true"));
    }
    (e.body.clone(), properties(Some(e.format.label()), Some(e.id.as_str())).with_headers(h))
}

/// Adds to an envelope when it leaves the ladder.
pub(super) fn with_due(properties: BasicProperties, due: SystemTime) -> BasicProperties {
    let millis = due.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_millis();
    let mut headers = properties.headers().clone().unwrap_or_default();
    headers
        .insert(DUE_AT.into(), AMQPValue::LongLongInt(i64::try_from(millis).unwrap_or(i64::MAX)));
    properties.with_headers(headers)
}

pub(super) fn dead_letter(d: &DeadLetter) -> (Bytes, BasicProperties) {
    let mut h = FieldTable::default();
    h.insert(KIND.into(), text(d.kind.name()));
    h.insert(REASON.into(), text(d.reason.name()));
    if let (MessageKind::Batch, Some(id)) = (d.kind, &d.id) {
        h.insert(BATCH_ID.into(), text(id));
    }
    h.insert(ATTEMPTS.into(), AMQPValue::LongLongInt(d.attempts.into()));
    if let Some(status) = d.status {
        h.insert(STATUS.into(), AMQPValue::LongLongInt(status.into()));
    }
    if let Some(encoding) = &d.content_encoding {
        h.insert(CONTENT_ENCODING.into(), text(encoding));
    }
    h.insert(ERROR.into(), text(cut_error(&d.error)));
    h.insert(EVENTS.into(), AMQPValue::LongLongInt(d.events.into()));
    if let Some(at) = d.first_attempt_at {
        h.insert(FIRST_ATTEMPT_AT.into(), time(at));
    }
    if let Some(at) = d.died_at {
        h.insert(DIED_AT.into(), time(at));
    }
    if !d.attempt_log.is_empty() {
        h.insert(ATTEMPT_LOG.into(), text(&d.attempt_log.to_text()));
    }
    if let Some(prints) = Print::to_text(&d.prints) {
        h.insert(PRINTS.into(), text(&prints));
    }
    let p = properties(d.content_type.as_deref(), d.id.as_deref()).with_headers(h);
    (d.body.clone(), encoded(p, d.content_encoding.as_deref()))
}

fn is_own(header: &str) -> bool {
    header.starts_with("x-hooktrail-") || header == TRACEPARENT
}

/// A message of hooktrail's own that is moved to another queue: with its own headers, and without
/// the broker's.
pub(super) fn untouched(d: Delivery) -> (Bytes, BasicProperties) {
    let from = &d.properties;
    let short = |s: &Option<ShortString>| s.as_ref().map(|s| s.as_str().to_owned());
    let mut headers = FieldTable::default();
    for (name, value) in
        from.headers().iter().flat_map(|h| h.inner()).filter(|(name, _)| is_own(name.as_str()))
    {
        headers.insert(name.clone(), value.clone());
    }
    let p = properties(short(from.content_type()).as_deref(), short(from.message_id()).as_deref())
        .with_headers(headers);
    (Bytes::from(d.data), p)
}

/// The same as [`untouched`], for a retry that is due now.
pub(super) fn due_now(d: Delivery) -> (Bytes, BasicProperties) {
    let (body, properties) = untouched(d);
    let mut headers = FieldTable::default();
    for (name, value) in properties
        .headers()
        .iter()
        .flat_map(FieldTable::inner)
        .filter(|(name, _)| name.as_str() != DUE_AT)
    {
        headers.insert(name.clone(), value.clone());
    }
    (body, properties.with_headers(headers))
}

/// The headers of a message, read with the types that hooktrail writes.
struct Headers<'a>(Option<&'a FieldTable>);

impl<'a> Headers<'a> {
    fn get(&self, name: &str) -> Option<&'a AMQPValue> {
        self.0.and_then(|h| h.inner().get(name))
    }

    fn text(&self, name: &str) -> Result<Option<String>, String> {
        match self.get(name) {
            None => Ok(None),
            Some(AMQPValue::LongString(s)) => {
                Ok(Some(String::from_utf8_lossy(s.as_bytes()).into_owned()))
            }
            Some(AMQPValue::ShortString(s)) => Ok(Some(s.as_str().to_owned())),
            Some(other) => Err(format!("header `{name}` is {:?}, not a string", other.get_type())),
        }
    }

    fn integer(&self, name: &str) -> Result<Option<u32>, String> {
        let Some(n) = self.any_integer(name)? else { return Ok(None) };
        u32::try_from(n).map(Some).map_err(|_| format!("header `{name}` is {n}, out of range"))
    }

    /// Reads any integer type of AMQP: other clients choose theirs by the value.
    fn any_integer(&self, name: &str) -> Result<Option<i128>, String> {
        let n: i128 = match self.get(name) {
            None => return Ok(None),
            Some(AMQPValue::ShortShortInt(n)) => (*n).into(),
            Some(AMQPValue::ShortShortUInt(n)) => (*n).into(),
            Some(AMQPValue::ShortInt(n)) => (*n).into(),
            Some(AMQPValue::ShortUInt(n)) => (*n).into(),
            Some(AMQPValue::LongInt(n)) => (*n).into(),
            Some(AMQPValue::LongUInt(n)) => (*n).into(),
            Some(AMQPValue::LongLongInt(n)) => (*n).into(),
            Some(other) => {
                return Err(format!("header `{name}` is {:?}, not an integer", other.get_type()));
            }
        };
        Ok(Some(n))
    }

    /// Reads a time that RFC 3339 can express: a later one could not be shown.
    fn unix_millis(&self, name: &str) -> Option<SystemTime> {
        let millis = u64::try_from(self.any_integer(name).ok()??)
            .ok()
            .filter(|ms| *ms < 253_402_300_800_000)?;
        Some(SystemTime::UNIX_EPOCH + Duration::from_millis(millis))
    }

    fn time(&self, name: &str) -> Result<Option<SystemTime>, String> {
        let Some(text) = self.text(name)? else { return Ok(None) };
        humantime::parse_rfc3339(&text)
            .map(Some)
            .map_err(|_| format!("header `{name}` is not an RFC 3339 time"))
    }

    /// A message of an earlier version has none.
    fn attempt_log(&self) -> AttemptLog {
        self.text(ATTEMPT_LOG)
            .ok()
            .flatten()
            .map(|text| AttemptLog::from_text(&text))
            .unwrap_or_default()
    }

    /// A message of an earlier version has none.
    fn prints(&self, events: u32) -> Prints {
        self.text(PRINTS).ok().flatten().and_then(|text| Print::read_text(&text, events))
    }
}

fn owned(s: &Option<ShortString>) -> Option<String> {
    s.as_ref().map(|s| s.as_str().to_owned())
}

/// The encoding of a message's body, in its producer's words; `None` if it is plain.
fn encoding(p: &BasicProperties) -> Option<String> {
    let property = p.content_encoding().as_ref().map(|e| e.as_str().to_owned());
    let header = || Headers(p.headers().as_ref()).text(COMPRESSION).ok().flatten();
    let is_encoded = |e: &String| Coding::of(e) != Coding::Plain;
    // As long as the property can be: it is written there when the event is replayed.
    property.filter(is_encoded).or_else(header).filter(is_encoded).filter(|e| e.len() <= 255)
}

/// An event that is not encoded as its property says, or in a way that cannot be decoded.
#[derive(Debug)]
pub(super) struct Undecoded {
    pub(super) reason: Reason,
    pub(super) error: String,
    encoding: String,
}

/// The body of an event that arrived compressed; `None` if it arrived plain.
///
/// # Errors
/// It cannot be inflated, or is then longer than `most` bytes.
pub(super) fn decoded(
    p: &BasicProperties,
    body: &[u8],
    most: usize,
) -> Result<Option<Vec<u8>>, Undecoded> {
    let Some(encoding) = encoding(p) else { return Ok(None) };
    // The producer only says that it is compressed.
    if event_type(body).is_ok() {
        return Ok(None);
    }
    let error = match Coding::of(&encoding) {
        Coding::Plain => return Ok(None),
        Coding::Compressed => match inflate(body, most) {
            Ok(body) => return Ok(Some(body)),
            Err(Broken::TooLong) => {
                let error =
                    format!("inflated, it has more than {most} bytes, and a request body must not");
                return Err(Undecoded { reason: Reason::TooLarge, error, encoding });
            }
            Err(Broken::Bytes(e)) => {
                format!("the event is not encoded as its content_encoding `{encoding}` says: {e}")
            }
        },
        Coding::Unknown => format!(
            "the event's content_encoding `{encoding}` is not one that can be undone here: gzip, deflate or none"
        ),
    };
    Err(Undecoded { reason: Reason::InvalidEvent, error, encoding })
}

impl Undecoded {
    /// The dead letter, with the body as it arrived.
    pub(super) fn dead_letter(self, d: Arrival) -> DeadLetter {
        let letter = DeadLetter::of_event(
            d.body,
            owned(d.properties.content_type()),
            owned(d.properties.message_id()),
            self.reason,
            self.error,
            clock::now(),
        );
        DeadLetter { content_encoding: Some(self.encoding), ..letter }
    }
}

/// Reads an event, of whose body this is the SHA-256. `most`: bytes that its body can have.
pub(super) fn taken_event(d: Arrival, sha256: &[u8; 32], most: usize) -> Taken {
    let receipt = Receipt { from: MessageKind::Event, tag: d.tag };
    let (body, print) = match decoded(&d.properties, &d.body, most) {
        Ok(None) => (d.body.clone(), Print::from_sha256(sha256)),
        Ok(Some(body)) => {
            let print = Print::of(&body);
            (body.into(), print)
        }
        Err(undecoded) => return Taken::Unusable(undecoded.dead_letter(d), receipt),
    };
    let content_type = d
        .properties
        .content_type()
        .as_ref()
        .map(ShortString::as_str)
        .filter(|t| *t != "application/json");
    Taken::Event(Event {
        message_id: owned(d.properties.message_id()),
        content_type: content_type.map(str::to_owned),
        published_at: d.properties.timestamp().and_then(|t| clock::sane(t, clock::now())),
        traceparent: traceparent(&d.properties),
        receipt,
        checked: Checked::with(&body, print),
        body,
        number: None,
    })
}

pub(super) fn taken_envelope(d: Arrival) -> Taken {
    let receipt = Receipt { from: MessageKind::Batch, tag: d.tag };
    match read_envelope(&d.properties, &d.body) {
        Ok(envelope) => Taken::Batch(envelope, receipt),
        Err(why) => {
            let content_type = owned(d.properties.content_type());
            let id = owned(d.properties.message_id());
            let error = format!("a message in the retry queue is not an envelope: {why}");
            let letter = DeadLetter::not_a_batch(d.body, content_type, id, error, clock::now());
            Taken::Unusable(letter, receipt)
        }
    }
}

fn read_envelope(p: &BasicProperties, body: &Bytes) -> Result<Batch, String> {
    let h = Headers(p.headers().as_ref());
    let batch_id = h.text(BATCH_ID)?.ok_or_else(|| format!("it has no header `{BATCH_ID}`"))?;
    let sound = (1..=255).contains(&batch_id.len())
        && batch_id.bytes().all(|b| b.is_ascii_graphic() && b != b'.');
    if !sound {
        return Err(format!(
            "header `{BATCH_ID}` is not 1 to 255 printable characters without a dot"
        ));
    }
    if body.is_empty() {
        return Err("it is empty".to_owned());
    }
    let content_type = p.content_type().as_ref().map_or("", ShortString::as_str);
    let format = Format::labelled(content_type);
    let events = h.integer(EVENTS)?.unwrap_or(0);
    Ok(Batch {
        id: batch_id.into(),
        body: body.clone(),
        format: format
            .ok_or_else(|| format!("its content type `{content_type}` is not that of a batch"))?,
        events,
        attempts: h.integer(ATTEMPTS)?.ok_or_else(|| format!("it has no header `{ATTEMPTS}`"))?,
        first_attempt_at: h.time(FIRST_ATTEMPT_AT)?,
        traceparent: traceparent(p),
        attempt_log: h.attempt_log(),
        prints: h.prints(events),
        replay: h.text(REPLAY).ok().flatten().as_deref() == Some("true"),
    })
}

/// A waiting batch by its envelope; `None` if the message is none.
pub(super) fn waiting(d: &Delivery) -> Option<Waiting> {
    let envelope = read_envelope(&d.properties, &Bytes::copy_from_slice(&d.data)).ok()?;
    Some(Waiting::new(&envelope, Headers(d.properties.headers().as_ref()).unix_millis(DUE_AT)))
}

/// Reads a message of a dead queue. One that the broker put there has no headers of hooktrail's.
pub(super) fn read_dead_letter(d: Delivery) -> DeadLetter {
    let h = Headers(d.properties.headers().as_ref());
    let ok = |r: Result<Option<String>, String>| r.ok().flatten();
    let batch_id = ok(h.text(BATCH_ID));
    let kind = match ok(h.text(KIND)).as_deref() {
        Some("batch") => MessageKind::Batch,
        Some(_) => MessageKind::Event,
        None if batch_id.is_some() => MessageKind::Batch, // an envelope that the broker moved
        None => MessageKind::Event,
    };
    let reason = ok(h.text(REASON)).and_then(|r| Reason::from_name(&r));
    let death = if reason.is_none() { h.death() } else { Death::default() };
    let events = h.integer(EVENTS).ok().flatten().unwrap_or(1);
    DeadLetter {
        kind,
        error: ok(h.text(ERROR))
            .unwrap_or_else(|| if reason.is_none() { death.error() } else { String::new() }),
        reason: reason.unwrap_or_else(|| death.reason()),
        content_type: owned(d.properties.content_type()),
        content_encoding: ok(h.text(CONTENT_ENCODING)).or_else(|| encoding(&d.properties)),
        id: batch_id.or_else(|| owned(d.properties.message_id())),
        events,
        attempts: h.integer(ATTEMPTS).ok().flatten().unwrap_or(0),
        status: h.integer(STATUS).ok().flatten().and_then(|n| u16::try_from(n).ok()),
        first_attempt_at: h.time(FIRST_ATTEMPT_AT).ok().flatten(),
        died_at: h.time(DIED_AT).ok().flatten().or(death.at),
        attempt_log: h.attempt_log(),
        prints: h.prints(events),
        body: d.data.into(),
    }
}

/// The broker's record of a message that it dead-lettered.
#[derive(Debug, Default)]
struct Death {
    expired: bool,
    at: Option<SystemTime>,
    queue: Option<String>,
    /// The property `expiration` of its producer, in milliseconds, which the broker has removed.
    expiration: Option<String>,
}

impl Death {
    const fn reason(&self) -> Reason {
        if self.expired { Reason::Expired } else { Reason::DeliveryLimit }
    }

    fn error(&self) -> String {
        let queue = self.queue.as_ref().map(|q| format!(" in queue `{q}`")).unwrap_or_default();
        match &self.expiration {
            Some(ms) => format!(
                "its producer gave it an `expiration` of {ms} ms, and it expired{queue} before it was taken; without that property it waits"
            ),
            None if self.expired => format!(
                "expired{queue}: a policy gives messages a time to live (rabbitmqctl list_policies)"
            ),
            None => format!(
                "moved here by the broker{queue}; a policy limits the queue (rabbitmqctl list_policies)"
            ),
        }
    }
}

impl Headers<'_> {
    /// The latest entry of the header `x-death` (RabbitMQ's documentation, "Dead Lettered Effects
    /// on Messages"), as far as it is readable.
    fn death(&self) -> Death {
        let first_reason = self.text("x-first-death-reason").ok().flatten();
        let latest = match self.get("x-death") {
            Some(AMQPValue::FieldArray(deaths)) => deaths.as_slice().first(),
            _ => None,
        };
        let Some(AMQPValue::FieldTable(latest)) = latest else {
            return Death {
                expired: first_reason.as_deref() == Some("expired"),
                ..Death::default()
            };
        };
        let latest = Headers(Some(latest));
        let short = |name| latest.text(name).ok().flatten().filter(|text| text.len() <= 255);
        let at = match latest.get("time") {
            Some(AMQPValue::Timestamp(seconds)) => clock::sane(*seconds, clock::now()),
            _ => None,
        };
        Death {
            expired: short("reason").or(first_reason).as_deref() == Some("expired"),
            at,
            queue: short("queue"),
            expiration: short("original-expiration"),
        }
    }
}

/// Reads an orphan: a batch that could not be routed back, or an invalid event of a source queue.
pub(super) fn read_orphan(d: Delivery, subscriber: Option<&str>) -> DeadLetter {
    let is_dead_letter = Headers(d.properties.headers().as_ref()).get(REASON).is_some();
    let letter = read_dead_letter(d);
    if is_dead_letter {
        return letter;
    }
    let error = match subscriber {
        Some(name) => format!("when it was due the retry queue of `{name}` did not exist"),
        None => "nothing says whose it is".to_owned(),
    };
    DeadLetter { reason: Reason::Expired, error, ..letter }
}

#[cfg(test)]
mod tests {
    use sha2::{Digest as _, Sha256};

    use super::*;
    use crate::delivery::{AttemptResult, FailedAttempt};

    /// An attempt log that is as long as possible.
    fn an_attempt_log() -> AttemptLog {
        let at = SystemTime::UNIX_EPOCH + Duration::from_millis(253_402_300_799_999);
        let mut log = AttemptLog::default();
        for n in 0..100 {
            log.add(FailedAttempt {
                number: u32::MAX - n,
                at,
                result: AttemptResult::Failure("a_failure_of_thirty_two_letters_".to_owned()),
            });
        }
        log
    }

    fn prints(n: usize) -> Prints {
        Some(vec![Print::of(b"{}"); n].into())
    }

    fn delivery(body: &[u8], properties: BasicProperties) -> Delivery {
        let mut d = Delivery::mock(7, "".into(), "".into(), false, body.to_vec());
        d.properties = properties;
        d
    }

    fn taken(d: Delivery, most: usize) -> Taken {
        let sha256 = Sha256::digest(&d.data).into();
        taken_event(d.into(), &sha256, most)
    }

    fn an_envelope() -> Batch {
        Batch {
            id: "msg_1".into(),
            body: Bytes::from_static(b"{\"events\":[]}"),
            format: Format::JsonLines,
            events: 3,
            attempts: 2,
            first_attempt_at: Some(
                SystemTime::UNIX_EPOCH + Duration::from_millis(1_700_000_000_123),
            ),
            traceparent: Some("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".into()),
            attempt_log: an_attempt_log(),
            prints: prints(3),
            replay: true,
        }
    }

    #[test]
    fn an_envelope_survives_the_broker() {
        let e = an_envelope();
        let (body, properties) = envelope(&e);
        match taken_envelope(delivery(&body, properties).into()) {
            Taken::Batch(found, receipt) => assert_eq!((found, receipt.tag), (e, 7)),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_retry_tells_when_it_comes_back_until_it_is_sent_now_and_a_time_that_makes_no_sense_is_none()
     {
        let e = an_envelope();
        let due = SystemTime::UNIX_EPOCH + Duration::from_millis(1_800_000_000_123);
        let (body, plain) = envelope(&e);
        let dated = with_due(plain.clone(), due);
        let found = waiting(&delivery(&body, dated.clone())).expect("an envelope");
        assert_eq!(found, Waiting::new(&e, Some(due)));
        assert_eq!(
            (found.batch_id.as_str(), found.attempts, found.last.as_ref()),
            ("msg_1", 2, e.attempt_log.last())
        );
        let (sent, properties) = due_now(delivery(&body, dated));
        assert_eq!((&sent, &properties), (&body, &plain), "but for the time it is the same");
        for odd in [
            AMQPValue::LongLongInt(-1),
            AMQPValue::LongLongInt(i64::MAX),
            text("soon"),
            AMQPValue::Boolean(true),
        ] {
            let mut h = plain.headers().clone().expect("headers");
            h.insert(DUE_AT.into(), odd);
            assert_eq!(
                waiting(&delivery(&body, plain.clone().with_headers(h))).expect("an envelope").due,
                None
            );
        }
        assert_eq!(waiting(&delivery(b"no envelope", BasicProperties::default())), None);
    }

    #[test]
    fn an_envelope_of_an_earlier_version_has_no_story_and_no_prints_and_what_cannot_be_read_is_none()
     {
        let attempt_log = AttemptLog::default();
        let e = Batch { attempt_log, prints: None, replay: false, ..an_envelope() };
        let (body, properties) = envelope(&e);
        let mut h = properties.headers().clone().expect("headers");
        assert!(
            [ATTEMPT_LOG, PRINTS, REPLAY].iter().all(|name| !h.contains_key(name)),
            "as the earlier version wrote it"
        );
        for value in [
            None,
            Some(AMQPValue::Boolean(true)),
            Some(text("what is this")),
            Some(text(&Print::to_text(&prints(1)).expect("one"))),
        ] {
            if let Some(value) = value {
                h.insert(ATTEMPT_LOG.into(), value.clone());
                h.insert(PRINTS.into(), value.clone());
                h.insert(REPLAY.into(), value);
            }
            match taken_envelope(delivery(&body, properties.clone().with_headers(h.clone())).into())
            {
                Taken::Batch(found, _) => assert_eq!(found, e),
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn a_message_that_is_not_an_envelope_becomes_a_dead_letter_that_says_why() {
        let with = |name: &str, value: Option<AMQPValue>| {
            let (_, p) = envelope(&an_envelope());
            let mut h = FieldTable::default();
            for (k, v) in p.headers().as_ref().expect("headers").inner() {
                if k.as_str() != name {
                    h.insert(k.clone(), v.clone());
                }
            }
            if let Some(v) = value {
                h.insert(name.into(), v);
            }
            p.with_headers(h)
        };
        let (_, plain) = envelope(&an_envelope());
        for (body, properties, why) in [
            (&b"x"[..], BasicProperties::default(), "no header `x-hooktrail-batch-id`"),
            (b"", plain.clone(), "it is empty"),
            (b"x", plain.with_content_type("text/plain".into()), "content type `text/plain`"),
            (b"x", with(BATCH_ID, Some(AMQPValue::Boolean(true))), "is Boolean, not a string"),
            (b"x", with(BATCH_ID, Some(text("a.b"))), "without a dot"),
            (b"x", with(ATTEMPTS, None), "no header `x-hooktrail-attempts`"),
            (b"x", with(ATTEMPTS, Some(text("2"))), "is LongString, not an integer"),
            (b"x", with(ATTEMPTS, Some(AMQPValue::LongLongInt(-1))), "is -1, out of range"),
            (b"x", with(EVENTS, Some(AMQPValue::Double(1.0))), "not an integer"),
            (b"x", with(FIRST_ATTEMPT_AT, Some(text("yesterday"))), "not an RFC 3339 time"),
        ] {
            match taken_envelope(delivery(body, properties).into()) {
                Taken::Unusable(letter, _) => {
                    assert!(letter.error.contains(why), "{}", letter.error);
                    assert_eq!(
                        (letter.kind, letter.reason),
                        (MessageKind::Batch, Reason::InvalidEvent)
                    );
                    assert_eq!(&letter.body[..], body);
                }
                other => panic!("{why}: {other:?}"),
            }
        }
    }

    #[test]
    fn a_dead_letter_survives_the_broker_and_stays_under_16_kib_of_headers() {
        let letter = DeadLetter {
            kind: MessageKind::Batch,
            reason: Reason::Exhausted,
            body: Bytes::from_static(b"body"),
            content_type: Some("application/json".into()),
            content_encoding: Some("e".repeat(255)),
            id: Some("m".repeat(255)),
            events: 768,
            attempts: 16,
            status: Some(503),
            error: "e".repeat(5000),
            first_attempt_at: Some(SystemTime::UNIX_EPOCH),
            died_at: Some(SystemTime::UNIX_EPOCH + Duration::from_secs(9)),
            attempt_log: an_attempt_log(),
            prints: prints(Print::MAX_STORED),
        };
        let (body, properties) = dead_letter(&letter);
        let value =
            |v: &AMQPValue| if let AMQPValue::LongString(s) = v { s.as_bytes().len() } else { 8 };
        let headers: usize = properties
            .headers()
            .iter()
            .flat_map(FieldTable::inner)
            .map(|(k, v)| k.as_str().len() + 6 + value(v))
            .sum();
        assert!(headers < 16 * 1024, "{headers} bytes");
        let found = read_dead_letter(delivery(&body, properties));
        assert_eq!(found, DeadLetter { error: "e".repeat(1024), ..letter });
    }

    #[test]
    fn what_the_broker_moved_itself_is_read_too() {
        let mut h = FieldTable::default();
        h.insert("x-first-death-reason".into(), text("expired"));
        let found = read_dead_letter(delivery(b"{}", BasicProperties::default().with_headers(h)));
        assert_eq!((found.kind, found.reason), (MessageKind::Event, Reason::Expired));
        assert!(found.error.contains("time to live"), "{}", found.error);
        let (body, p) = envelope(&an_envelope());
        let found = read_dead_letter(delivery(&body, p));
        assert_eq!(
            (found.kind, found.reason, found.id.as_deref(), found.attempts),
            (MessageKind::Batch, Reason::DeliveryLimit, Some("msg_1"), 2)
        );
        assert!(found.error.contains("policy"));
        assert_eq!(found.prints, prints(3), "the envelope had them");
    }

    #[test]
    fn an_event_that_its_producer_let_expire_is_told_from_one_of_a_policy() {
        let at = clock::unix_seconds(clock::now()) - 60;
        let died = |expiration: Option<&str>, reason: &str, time: AMQPValue| {
            let mut death = FieldTable::default();
            death.insert("reason".into(), text(reason));
            death.insert("queue".into(), text("hooktrail.sub.a"));
            death.insert("time".into(), time);
            if let Some(ms) = expiration {
                death.insert("original-expiration".into(), text(ms));
            }
            let mut h = FieldTable::default();
            h.insert(
                "x-death".into(),
                AMQPValue::FieldArray(vec![AMQPValue::FieldTable(death)].into()),
            );
            read_dead_letter(delivery(b"{}", BasicProperties::default().with_headers(h)))
        };
        let seconds = |letter: &DeadLetter| letter.died_at.map(clock::unix_seconds);
        let by_producer = died(Some("5000"), "expired", AMQPValue::Timestamp(at));
        assert_eq!((by_producer.reason, seconds(&by_producer)), (Reason::Expired, Some(at)));
        for part in ["producer", "expiration", "5000 ms", "hooktrail.sub.a"] {
            assert!(by_producer.error.contains(part), "{}", by_producer.error);
        }
        let by_policy = died(None, "expired", AMQPValue::Timestamp(at));
        assert_eq!((by_policy.reason, seconds(&by_policy)), (Reason::Expired, Some(at)));
        assert!(
            by_policy.error.contains("policy") && !by_policy.error.contains("producer"),
            "{}",
            by_policy.error
        );
        let limited = died(None, "delivery_limit", AMQPValue::Timestamp(u64::MAX));
        assert_eq!((limited.reason, limited.died_at), (Reason::DeliveryLimit, None));
        assert_eq!(died(None, "expired", text("yesterday")).died_at, None);
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        use std::io::Write as _;
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        encoder.write_all(bytes).expect("writes");
        encoder.finish().expect("ends")
    }

    #[test]
    fn a_compressed_event_is_inflated_and_what_cannot_be_is_a_dead_letter_that_can_be_sent_again() {
        let plain = br#"{"event":"a.b","n":1}"#;
        let zipped = gzip(plain);
        let encoded =
            |encoding: &str| BasicProperties::default().with_content_encoding(encoding.into());
        let mut by_kombu = FieldTable::default();
        by_kombu.insert(COMPRESSION.into(), text("application/x-gzip"));
        for (body, properties) in [
            (&plain[..], BasicProperties::default()),
            (plain, encoded("utf-8")),
            (plain, encoded("gzip")), // it only says so
            (plain, encoded("iso-8859-1")),
            (&zipped, encoded("gzip")),
            (&zipped, encoded("gzip:UTF-8")),
            (&zipped, encoded("utf-8").with_headers(by_kombu)),
        ] {
            match taken(delivery(body, properties.clone()), plain.len()) {
                Taken::Event(event) => assert_eq!(event.body[..], plain[..]),
                other => panic!("{properties:?}: {other:?}"),
            }
        }
        for (body, encoding, most, reason, why) in [
            (&zipped[..], "br", 100, Reason::InvalidEvent, "content_encoding `br`"),
            (
                &zipped[..zipped.len() - 4],
                "gzip",
                100,
                Reason::InvalidEvent,
                "content_encoding `gzip` says",
            ),
            (&zipped, "gzip", plain.len() - 1, Reason::TooLarge, "more than 20 bytes"),
        ] {
            let Taken::Unusable(letter, receipt) = taken(delivery(body, encoded(encoding)), most)
            else {
                panic!("{encoding}")
            };
            assert!(letter.reason == reason && letter.error.contains(why), "{}", letter.error);
            assert_eq!(
                (&letter.body[..], receipt.from, letter.content_encoding.as_deref()),
                (body, MessageKind::Event, Some(encoding))
            );
            // As it is kept, and as it is sent again.
            let (kept, properties) = dead_letter(&letter);
            let letter = read_dead_letter(delivery(&kept, properties));
            let (again, properties) = event_again(&letter);
            assert_eq!(
                (&again[..], properties.content_encoding().as_ref().map(ShortString::as_str)),
                (body, Some(encoding))
            );
        }
    }

    #[test]
    fn a_timestamp_that_cannot_be_meant_is_none() {
        let published_at = |t: u64| match taken(
            delivery(b"{}", BasicProperties::default().with_timestamp(t)),
            100,
        ) {
            Taken::Event(event) => event.published_at,
            other => panic!("{other:?}"),
        };
        let now = clock::unix_seconds(clock::now());
        assert_eq!(published_at(now).map(clock::unix_seconds), Some(now));
        // Some clients write milliseconds, some 0 for none.
        for wrong in [0, now * 1000, now + 7 * 24 * 3600, u64::MAX] {
            assert_eq!(published_at(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn a_relayed_event_carries_four_things_and_no_more() {
        let mut h = FieldTable::default();
        for name in ["traceparent", "x-death", "CC", "other"] {
            h.insert(name.into(), text(name));
        }
        let from = BasicProperties::default()
            .with_message_id("id".into())
            .with_timestamp(5)
            .with_user_id("guest".into())
            .with_expiration("1".into())
            .with_headers(h);
        let p = relayed(&from);
        assert_eq!(
            (p.message_id().as_ref().map(ShortString::as_str), *p.timestamp(), *p.delivery_mode()),
            (Some("id"), Some(5), Some(2))
        );
        assert_eq!((p.user_id(), p.expiration()), (&None, &None));
        assert_eq!(p.headers().as_ref().expect("headers").inner().len(), 1);
    }
}

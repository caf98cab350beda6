//! The intake: events over HTTP.
//!
//! Events of a request that is answered 202 are durable; a request that is refused with another
//! status than 503 has left no trace.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use axum::{
    body::Body,
    extract::{Request, State},
    http::{HeaderMap, HeaderName, StatusCode, header},
    response::{IntoResponse as _, Response},
};
use bytes::Bytes;
use serde::de::{Deserializer as _, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;
use tokio::{
    sync::{Semaphore, SemaphorePermit, watch},
    time::timeout,
};

use super::{
    answer::{
        MAX_BODY, MAX_EVENTS, READ_TIMEOUT, Refusal, discard, header_text, json_answer, media_type,
    },
    body::{self, Unread},
    view::{Accepted, BadEvent, ProblemKind},
};
use crate::{
    clock,
    config::{Subscribers, audience},
    event::{
        InvalidEvent, Key, MAX_TENANT, Tenant, TenantPlace,
        audience::Audience,
        event_type,
        inflate::{Broken, gunzip},
    },
    failpoint::{Step, reached},
    queue::{Arrival, MAX_GROUP, MAX_TRACEPARENT, NewEvent, Published, Queue},
    supervisor::fleet::Phase,
    telemetry::{
        metrics::Metrics,
        outage::{News, Outage},
    },
    wording::{agreed, counted},
};

/// The header that says whose the events of a request are.
const TENANT: HeaderName = HeaderName::from_static("x-hooktrail-tenant");

/// The most invalid events that an answer lists.
const MAX_REPORTED: usize = 100;

/// The most memory for bodies, in units of 1 KiB.
pub(super) const ROOM: u32 = 64 * 1024;

/// The least that a request counts for, in the same units: events take more than their bytes.
const LEAST_ROOM: u32 = 16;

/// Bytes that an event takes in addition to its own: its type, its id, and their allocations.
const EVENT_COST: usize = 256;

/// The timeout of the wait for room, after which the client is asked to try again.
const WAIT_FOR_ROOM: Duration = Duration::from_secs(1);

/// The timeout of the wait for a queue that cannot be reached: it may be about to return.
const WAIT_FOR_QUEUE: Duration = Duration::from_secs(1);

/// The longest body in bytes that is parsed in place; longer ones would delay other work of the
/// thread.
const QUICK: usize = 64 * 1024;

/// The intake of events.
pub(super) struct Intake<Q> {
    queue: Q,
    subscribers: watch::Receiver<Subscribers>,
    /// The patterns of the subscribers of the last request.
    wanted: Mutex<(Subscribers, Arc<Audience>)>,
    /// Where the tenant of an event is.
    tenant: Option<TenantPlace>,
    phase: watch::Receiver<Phase>,
    metrics: Metrics,
    room: Arc<Semaphore>,
    /// The time in which events cannot be stored: its begin and its end are logged, not each
    /// request.
    outage: Mutex<Outage>,
}

/// The encoding of a body.
#[derive(Debug, Clone, Copy)]
struct Encoding {
    lines: bool,
    gzip: bool,
}

pub(super) async fn take_events<Q: Queue>(
    State(intake): State<Arc<Intake<Q>>>,
    request: Request,
) -> Response {
    let (parts, mut body) = request.into_parts();
    match intake.take(&parts.headers, &mut body).await {
        Ok(answer) => json_answer(StatusCode::ACCEPTED, &answer),
        Err(refusal) => {
            discard(&parts.headers, body).await;
            refusal.into_response()
        }
    }
}

impl<Q: Queue> Intake<Q> {
    /// `room`: while all of the [`ROOM`] is free, nothing is being taken.
    pub(super) fn new(
        queue: Q,
        subscribers: watch::Receiver<Subscribers>,
        tenant: Option<TenantPlace>,
        phase: watch::Receiver<Phase>,
        metrics: Metrics,
        room: Arc<Semaphore>,
    ) -> Self {
        let (wanted, outage) = (Mutex::default(), Mutex::default());
        Self { queue, subscribers, wanted, tenant, phase, metrics, room, outage }
    }

    async fn take(&self, headers: &HeaderMap, body: &mut Body) -> Result<Accepted, Refusal> {
        let encoding = Encoding::of(headers)?;
        let tenant = self.tenant_beside(headers)?;
        let length: Option<usize> = header_text(headers, header::CONTENT_LENGTH).parse().ok();
        if length.is_some_and(|l| l > MAX_BODY) {
            return Err(Refusal::too_large());
        }
        let room = self.room(length, encoding).await?;
        // Read after the room is taken: a drain waits for requests that have room.
        let mut phase = self.phase.clone();
        let running = *phase.borrow_and_update();
        if running != Phase::Running {
            return Err(Refusal::not_running(running));
        }
        if !self.queue.is_reachable()
            && timeout(WAIT_FOR_QUEUE, self.queue.writable()).await.is_err()
        {
            let why = "the queue cannot be reached, or takes nothing; nothing of this request was taken, send it again later";
            return Err(Refusal::unavailable(why.to_owned()));
        }
        let body = tokio::select! {
            body = timeout(READ_TIMEOUT, body::read(body, length, MAX_BODY)) => {
                body.map_err(|_| Refusal::late())?.map_err(|why| match why {
                    Unread::TooLong => Refusal::too_large(),
                    Unread::EndedEarly(e) => Refusal::ended_early(&e),
                })?
            }
            _ = phase.wait_for(|p| *p != Phase::Running) => return Err(Refusal::not_running(Phase::Draining)),
        };
        let place = self.tenant.clone();
        let parse = move |body: Bytes| {
            let mut events = events_of(&body, encoding)?;
            for event in &mut events {
                event.tenant = place.as_ref().and_then(|p| p.tenant(tenant.as_ref(), &event.body));
            }
            Ok(events)
        };
        let events = if body.len() <= QUICK && !encoding.gzip {
            parse(body)?
        } else {
            let parsing =
                tokio::task::spawn_blocking(move || inflated(body, encoding).and_then(parse));
            parsing.await.map_err(|_| {
                Refusal::new(
                    StatusCode::INTERNAL_SERVER_ERROR,
                    "the body could not be read".to_owned(),
                )
            })??
        };
        let _more = self.room_of(&events, room.num_permits())?;
        self.publish(with_trace(events, headers)).await
    }

    /// The tenant that a request's header says its events are of.
    fn tenant_beside(&self, headers: &HeaderMap) -> Result<Option<Tenant>, Refusal> {
        let mut all = headers.get_all(&TENANT).iter();
        let Some(value) = all.next() else { return Ok(None) };
        let why = match &self.tenant {
            // Taken for a filter, a header that is ignored would show events to others.
            None => format!(
                "the header {TENANT} says nothing here: [queue] tenant is not set; leave it out"
            ),
            Some(TenantPlace::Pointer(pointer)) => {
                format!(
                    "the header {TENANT} says nothing here: the tenant is each event's own `{pointer}`; leave it out"
                )
            }
            Some(TenantPlace::Header(_)) => {
                let tenant = std::str::from_utf8(value.as_bytes()).ok().and_then(Tenant::try_new);
                match tenant {
                    Some(tenant) if all.next().is_none() => return Ok(Some(tenant)),
                    Some(_) => format!("the header {TENANT} is there twice"),
                    None => format!(
                        "the header {TENANT} must be UTF-8 and have 1 to {MAX_TENANT} bytes"
                    ),
                }
            }
        };
        Err(Refusal::bad(why))
    }

    /// Takes more room for many small events, which need more than their bytes. It does not wait:
    /// other requests wait for the room that this one has.
    fn room_of(
        &self,
        events: &[NewEvent],
        has: usize,
    ) -> Result<Option<SemaphorePermit<'_>>, Refusal> {
        let needed = (events.len() * EVENT_COST).div_ceil(1024).min(ROOM as usize);
        let Some(more) = needed.checked_sub(has).and_then(|more| u32::try_from(more).ok()) else {
            return Ok(None);
        };
        self.room.try_acquire_many(more).map(Some).map_err(|_| Refusal::behind())
    }

    async fn room(
        &self,
        length: Option<usize>,
        encoding: Encoding,
    ) -> Result<SemaphorePermit<'_>, Refusal> {
        let most = |length: Option<usize>| {
            length.unwrap_or(MAX_BODY) + if encoding.gzip { MAX_BODY } else { 0 }
        };
        let units =
            u32::try_from(most(length).div_ceil(1024)).unwrap_or(ROOM).clamp(LEAST_ROOM, ROOM);
        if self.queue.is_behind() {
            return Err(Refusal::behind());
        }
        match timeout(WAIT_FOR_ROOM, self.room.acquire_many(units)).await {
            Ok(Ok(room)) => Ok(room),
            _ => Err(Refusal::behind()),
        }
    }

    fn outage(&self) -> MutexGuard<'_, Outage> {
        self.outage.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns when all events are durable.
    async fn publish(&self, events: Vec<NewEvent>) -> Result<Accepted, Refusal> {
        let count = events.len();
        let (mut stored, mut unmatched, mut refused, mut unbound) = (0, 0, 0, 0);
        let mut events = events.into_iter();
        loop {
            let group: Vec<NewEvent> = events.by_ref().take(MAX_GROUP).collect();
            if group.is_empty() {
                break;
            }
            // Other subscribers' patterns are not in this configuration, so the queue's answer
            // counts. Read before the configuration: when it becomes false, the new configuration
            // is in use.
            let others_may_be_bound = self.queue.removals().others_may_be_bound();
            let wanted = self.wanted();
            let wanted: Vec<bool> = group
                .iter()
                .map(|e| wanted.matches(e.tenant.as_ref().map(Tenant::as_str), &e.event_type))
                .collect();
            let published = match self.queue.publish(group).await {
                Ok(published) => published,
                Err(e) => {
                    if self.outage().failed(&e.to_string()) == News::First {
                        tracing::warn!(error = %e, "events cannot be stored; producers are answered 503");
                    }
                    return Err(Refusal::unavailable(format!(
                        "{e}; {stored} of {} {} stored before, and a part of the rest may have been: \
                         send the request again later, which may repeat events",
                        counted(count, "event(s)"),
                        agreed(&stored, "(was|were)")
                    )));
                }
            };
            for (published, is_wanted) in published.into_iter().zip(wanted) {
                let by_others = others_may_be_bound && published == Published::Stored;
                match published.arrival(is_wanted || by_others) {
                    Arrival::Refused => refused += 1,
                    Arrival::Unbound => unbound += 1,
                    Arrival::Stored => stored += 1,
                    Arrival::Unmatched => {
                        stored += 1;
                        unmatched += 1;
                    }
                }
            }
        }
        reached(Step::Stored);
        if self.outage().end() {
            tracing::info!("events are stored again");
        }
        if refused + unbound > 0 {
            return Err(Refusal::unavailable(format!(
                "the queue refused {refused} of {}, and {unbound} reached no subscriber's queue although a pattern matches (hooktrail check \
                 --connect); the other {stored} {} stored: send the request again later, which repeats those",
                counted(count, "event(s)"),
                agreed(&stored, "(was|were)")
            )));
        }
        self.metrics.accepted((stored - unmatched) as u64, unmatched as u64);
        Ok(Accepted { accepted: stored, unmatched })
    }

    /// The patterns of the configuration in use.
    fn wanted(&self) -> Arc<Audience> {
        let now = self.subscribers.borrow().clone();
        let mut wanted = self.wanted.lock().unwrap_or_else(PoisonError::into_inner);
        if !Arc::ptr_eq(&wanted.0, &now) {
            *wanted = (now.clone(), Arc::new(audience(&now)));
        }
        wanted.1.clone()
    }
}

impl Encoding {
    fn of(headers: &HeaderMap) -> Result<Self, Refusal> {
        let lines = match media_type(headers).as_str() {
            "application/json" => false,
            "application/jsonl" | "application/x-ndjson" => true,
            _ => {
                let why = "the content-type must be application/json (one event, or {\"events\":[…]}), or application/jsonl or \
                           application/x-ndjson (one event a line)";
                return Err(Refusal::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, why.to_owned()));
            }
        };
        let gzip = match header_text(headers, header::CONTENT_ENCODING)
            .trim()
            .to_ascii_lowercase()
            .as_str()
        {
            "" | "identity" if headers.get_all(header::CONTENT_ENCODING).iter().count() <= 1 => {
                false
            }
            "gzip" | "x-gzip" if headers.get_all(header::CONTENT_ENCODING).iter().count() == 1 => {
                true
            }
            _ => {
                let why = "the content-encoding must be gzip, or none";
                return Err(Refusal::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, why.to_owned()));
            }
        };
        Ok(Self { lines, gzip })
    }
}

/// Gives each event the request's `traceparent`.
fn with_trace(mut events: Vec<NewEvent>, headers: &HeaderMap) -> Vec<NewEvent> {
    let trace = header_text(headers, HeaderName::from_static("traceparent"));
    if !trace.is_empty() && trace.len() <= MAX_TRACEPARENT {
        let trace: Arc<str> = trace.into();
        events.iter_mut().for_each(|e| e.traceparent = Some(trace.clone()));
    }
    events
}

fn inflated(body: Bytes, encoding: Encoding) -> Result<Bytes, Refusal> {
    if !encoding.gzip {
        return Ok(body);
    }
    match gunzip(&body, MAX_BODY) {
        Ok(body) => Ok(body.into()),
        Err(Broken::TooLong) => Err(Refusal::too_large()),
        Err(Broken::Bytes(e)) => {
            Err(Refusal::bad(format!("the body is not gzip, as its content-encoding says: {e}")))
        }
    }
}

/// The events of a body, each with its exact bytes.
fn events_of(body: &Bytes, encoding: Encoding) -> Result<Vec<NewEvent>, Refusal> {
    let mut found = Found::default();
    if encoding.lines {
        for (n, line) in body.split(|b| *b == b'\n').enumerate() {
            match trimmed(line) {
                b"" => {}
                event => found.add(body, event, Some(n + 1)),
            }
        }
    } else {
        match shape(body)? {
            Shape::Event => found.add(body, trimmed(body), None),
            Shape::Events(events) => {
                events.0.iter().for_each(|e| found.add(body, e.get().as_bytes(), None))
            }
        }
    }
    found.into_events()
}

/// Trims white space of JSON (RFC 8259, section 2), which is less than that of ASCII.
fn trimmed(mut text: &[u8]) -> &[u8] {
    while let [b' ' | b'\t' | b'\n' | b'\r', rest @ ..]
    | [rest @ .., b' ' | b'\t' | b'\n' | b'\r'] = text
    {
        text = rest;
    }
    text
}

#[derive(Default)]
struct Found {
    events: Vec<NewEvent>,
    bad: Vec<BadEvent>,
    count: usize,
    bad_count: usize,
}

impl Found {
    fn add(&mut self, body: &Bytes, event: &[u8], line: Option<usize>) {
        let index = self.count;
        self.count += 1;
        match event_type(event) {
            Err(why) => {
                self.bad_count += 1;
                if self.bad.len() < MAX_REPORTED {
                    self.bad.push(BadEvent { index, line, reason: why.to_string() });
                }
            }
            // Events of a refused request are not kept.
            Ok(_) if self.bad_count > 0 || index >= MAX_EVENTS => self.events.clear(),
            Ok(event_type) => {
                let event_type = event_type.into_owned();
                self.events.push(NewEvent {
                    event_type,
                    message_id: Some(clock::event_id()),
                    body: body.slice_ref(event),
                    traceparent: None,
                    tenant: None,
                });
            }
        }
    }

    fn into_events(self) -> Result<Vec<NewEvent>, Refusal> {
        if self.count > MAX_EVENTS {
            return Err(Refusal::too_many(self.count));
        }
        if self.bad_count > 0 {
            let (bad, all) = (self.bad_count, counted(self.count, "event(s)"));
            let why = format!(
                "{bad} of {all} {} not valid; nothing of this request was taken",
                agreed(&bad, "(is|are)")
            );
            let (status, kind) = (StatusCode::BAD_REQUEST, ProblemKind::Events);
            return Err(Refusal {
                invalid: Some((self.bad, self.bad_count)),
                ..Refusal::of_kind(status, kind, why)
            });
        }
        if self.events.is_empty() {
            return Err(Refusal::bad("there is no event in the body"));
        }
        Ok(self.events)
    }
}

/// The kinds of a JSON body.
enum Shape<'a> {
    Event,
    Events(Elements<'a>),
}

/// An object with a field `event` is an event, whatever its other fields.
fn shape(body: &[u8]) -> Result<Shape<'_>, Refusal> {
    if body.starts_with(b"\xef\xbb\xbf") {
        return Err(Refusal::bad(InvalidEvent::ByteOrderMark.to_string()));
    }
    // The bytes around the events must be UTF-8 too, though they are not used.
    let text = std::str::from_utf8(body)
        .map_err(|e| Refusal::bad(format!("the body is not UTF-8 at byte {}", e.valid_up_to())))?;
    let mut json = serde_json::Deserializer::from_str(text);
    let fields = json
        .deserialize_map(Fields { event: false, events: Vec::new() })
        .and_then(|fields| json.end().map(|()| fields));
    let fields = fields.map_err(|e| Refusal::bad(format!("the body is not a JSON object: {e}")))?;
    match fields.events[..] {
        _ if fields.event => Ok(Shape::Event),
        [events] => match serde_json::from_str::<Elements<'_>>(events.get()) {
            Ok(events) if events.1 > MAX_EVENTS => Err(Refusal::too_many(events.1)),
            Ok(events) => Ok(Shape::Events(events)),
            Err(_) => Err(Refusal::field("events", "is not an array")),
        },
        // Taking one of them would lose the events of the other.
        [_, _, ..] => Err(Refusal::field("events", "is there twice")),
        [] => Err(Refusal::bad(
            "the body has neither a field `event`, as an event has, nor `events`, an array of events",
        )),
    }
}

struct Fields<'a> {
    event: bool,
    /// At most two fields `events`.
    events: Vec<&'a RawValue>,
}

impl<'de> Visitor<'de> for Fields<'de> {
    type Value = Self;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("one event or {\"events\":[…]}")
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<Self, A::Error> {
        while let Some(key) = map.next_key::<Key<'_>>()? {
            if key.is("events") && self.events.len() < 2 {
                self.events.push(map.next_value()?);
            } else {
                self.event |= key.is("event");
                map.next_value::<IgnoredAny>()?;
            }
        }
        Ok(self)
    }
}

/// At most [`MAX_EVENTS`] elements of an array, and the number of all.
struct Elements<'a>(Vec<&'a RawValue>, usize);

impl<'de: 'a, 'a> serde::Deserialize<'de> for Elements<'a> {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        d.deserialize_seq(Self(Vec::new(), 0))
    }
}

impl<'de: 'a, 'a> Visitor<'de> for Elements<'a> {
    type Value = Self;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an array")
    }

    fn visit_seq<A: SeqAccess<'de>>(mut self, mut seq: A) -> Result<Self, A::Error> {
        while let Some(element) = seq.next_element::<&'a RawValue>()? {
            self.1 += 1;
            if self.0.len() < MAX_EVENTS {
                self.0.push(element);
            }
        }
        Ok(self)
    }
}

/// An inflated body, and the result: its events, or the refusal's status and the places of invalid
/// events.
#[cfg(any(test, fuzzing))]
pub(crate) type Read = (Bytes, Result<Vec<NewEvent>, (u16, Vec<usize>)>);

/// `None` if the body cannot be inflated.
#[cfg(any(test, fuzzing))]
pub(crate) fn read_all(body: &[u8], lines: bool, gzip: bool) -> Option<Read> {
    let encoding = Encoding { lines, gzip };
    let body = inflated(Bytes::copy_from_slice(body), encoding).ok()?;
    let places = |refusal: Refusal| {
        let (bad, count) = refusal.invalid.unwrap_or_default();
        assert!(
            bad.len() == count.min(MAX_REPORTED) && bad.iter().all(|b| b.line.is_some() == lines)
        );
        (refusal.status.as_u16(), bad.iter().map(|b| b.index).collect())
    };
    let events = events_of(&body, encoding).map_err(places);
    Some((body, events))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{admin::answer::AGAIN_LATER, queue::fake::Fake};

    const JSON: Encoding = Encoding { lines: false, gzip: false };
    const LINES: Encoding = Encoding { lines: true, gzip: false };

    fn bodies(body: &'static str, encoding: Encoding) -> Vec<String> {
        let events = events_of(&Bytes::from_static(body.as_bytes()), encoding)
            .unwrap_or_else(|e| panic!("{body}: {}", e.why));
        events.iter().map(|e| String::from_utf8(e.body.to_vec()).expect("text")).collect()
    }

    fn refusal(body: impl AsRef<[u8]>, encoding: Encoding) -> Refusal {
        events_of(&Bytes::copy_from_slice(body.as_ref()), encoding).expect_err("must be refused")
    }

    #[test]
    fn events_keep_their_bytes() {
        let odd = r#"{ "n":18446744073709551616,"event" : "a","s":"\u00e9\/", "events":[1] }"#;
        assert_eq!(
            bodies(
                concat!(
                    "\n",
                    r#"{ "n":18446744073709551616,"event" : "a","s":"\u00e9\/", "events":[1] }"#,
                    " \r\n"
                ),
                JSON
            ),
            [odd]
        );
        assert_eq!(
            bodies(
                r#" {"sent_at":1,"events" : [ {"event":"a","x":1e400} ,{"y":[ 1 ],"event":"b"}]}"#,
                JSON
            ),
            [r#"{"event":"a","x":1e400}"#, r#"{"y":[ 1 ],"event":"b"}"#]
        );
        assert_eq!(
            bodies(r#"{"\ud800":1,"\u0065vents":[{"\udc00":2,"event":"a"}]}"#, JSON),
            [r#"{"\udc00":2,"event":"a"}"#]
        );
        assert_eq!(
            bodies("{\"event\":\"a\"}\r\n\n  \n {\"event\": \"b\"}", LINES),
            [r#"{"event":"a"}"#, r#"{"event": "b"}"#]
        );
        let events =
            events_of(&Bytes::from_static(br#"{"event":"x.\u0079"}"#), JSON).expect("an event");
        assert_eq!(events[0].event_type, "x.y");
        assert!(
            events[0]
                .message_id
                .as_deref()
                .is_some_and(|id| id.starts_with("evt_") && id.len() == 36)
        );
    }

    #[test]
    fn what_is_wrong_is_told_with_its_place_and_nothing_is_taken() {
        for (body, part) in [
            ("", "not a JSON object"),
            ("[]", "not a JSON object"),
            ("7", "not a JSON object"),
            ("{\"event\":\"a\"} {\"event\":\"b\"}", "not a JSON object: trailing characters"),
            ("{}", "neither a field `event`"),
            ("{\"events\":{}}", "not an array"),
            ("{\"events\":[]}", "no event in the body"),
            ("{\"events\":[{\"event\":\"a\"}],\"events\":[]}", "`events` is there twice"),
            ("{\"events\":[{\"event\":\"a\"},]}", "not a JSON object"),
            ("\u{feff}{\"event\":\"a\"}", "byte-order mark"),
        ] {
            let refusal = refusal(body, JSON);
            assert!(refusal.status == 400 && refusal.why.contains(part), "{body}: {refusal:?}");
        }
        assert_eq!(
            refusal(b"{\"events\":[{\"event\":\"a\"}],\"by\":\"\xff\"}", JSON).why,
            "the body is not UTF-8 at byte 32"
        );
        let invalid = refusal("{\"event\":\"a\"}\n\x0c{\"event\":\"b\"}\x0c\n", LINES)
            .invalid
            .expect("a list");
        assert_eq!(
            invalid.0.iter().map(|b| b.line).collect::<Vec<_>>(),
            [Some(2)],
            "a form feed is no white space of JSON"
        );
        let invalid = refusal(r#"{"events":[{"event":"a"},{"x":1},7,{"event":"b"}]}"#, JSON)
            .invalid
            .expect("a list");
        assert_eq!(
            invalid.0.iter().map(|b| (b.index, b.line)).collect::<Vec<_>>(),
            [(1, None), (2, None)]
        );
        let invalid = refusal("{\"event\":\"a\"}\n\nnonsense\n{\"event\":\"\u{0}\"}", LINES)
            .invalid
            .expect("a list");
        assert_eq!(
            invalid.0.iter().map(|b| (b.index, b.line)).collect::<Vec<_>>(),
            [(1, Some(3)), (2, Some(4))]
        );
        assert!(invalid.0[0].reason.contains("not JSON"), "{invalid:?}");
        let one = refusal(r#"{"event":7}"#, JSON).invalid.expect("a list");
        assert_eq!((one.0[0].index, one.1), (0, 1));
        let many = refusal("x\n".repeat(MAX_EVENTS), LINES).invalid.expect("a list");
        assert_eq!((many.0.len(), many.1), (MAX_REPORTED, MAX_EVENTS));
        for (body, encoding) in [
            (format!("{{\"events\":[{}1]}}", "1,".repeat(MAX_EVENTS)), JSON),
            ("{\"event\":\"a\"}\n".repeat(MAX_EVENTS + 1), LINES),
        ] {
            assert_eq!(refusal(body, encoding).status, 413);
        }
        let deep = format!("{{\"events\":[{}{}]}}", "[".repeat(1_000_000), "]".repeat(1_000_000));
        assert!(refusal(deep, JSON).why.contains("1 of 1 event is not valid"));
    }

    /// The intake of a running daemon without subscribers.
    fn running(room: Arc<Semaphore>) -> (watch::Sender<Phase>, Intake<Fake>) {
        let (sender, phase) = watch::channel(Phase::Running);
        let none = watch::Sender::new(Subscribers::default()).subscribe();
        let metrics = Metrics::new(clock::now());
        (sender, Intake::new(Fake::default(), none, None, phase, metrics, room))
    }

    #[tokio::test]
    async fn what_the_queue_does_not_take_is_answered_with_what_may_have_happened() {
        let room = Arc::new(Semaphore::new(ROOM as usize));
        let (_phase, intake) = running(room);
        let mut headers = HeaderMap::new();
        headers.insert(
            header::CONTENT_TYPE,
            header::HeaderValue::from_static("application/json; charset=utf-8"),
        );
        let refusal = intake
            .take(&headers, &mut Body::from(r#"{"event":"a"}"#))
            .await
            .expect_err("the fake takes none");
        assert_eq!(
            (refusal.status, refusal.retry_after),
            (StatusCode::SERVICE_UNAVAILABLE, Some(AGAIN_LATER))
        );
        assert!(
            refusal
                .why
                .contains("0 of 1 event were stored before, and a part of the rest may have been"),
            "{}",
            refusal.why
        );
    }

    #[tokio::test]
    async fn many_small_events_count_for_what_they_take_in_memory() {
        let room = Arc::new(Semaphore::new(ROOM as usize));
        let (_phase, intake) = running(room.clone());
        let mut headers = HeaderMap::new();
        headers.insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/jsonl"));
        let lines = "{\"event\":\"a\"}\n".repeat(MAX_EVENTS);
        headers.insert(header::CONTENT_LENGTH, lines.len().into());
        let (few, many) = ("{\"event\":\"a\"}\n", lines.as_str());
        let status = async |body: &str| {
            intake
                .take(&headers, &mut Body::from(body.to_owned()))
                .await
                .expect_err("the fake takes none")
                .status
        };
        // Three of them are on their way, and there is room for the bytes of many more.
        let others = room
            .clone()
            .acquire_many_owned(3 * (MAX_EVENTS * EVENT_COST / 1024) as u32)
            .await
            .expect("open");
        assert_eq!(
            status(many).await,
            StatusCode::SERVICE_UNAVAILABLE,
            "it comes as far as the queue"
        );
        let more = room.clone().acquire_many_owned(16 * 1024).await.expect("open");
        assert_eq!(
            (status(many).await, status(few).await),
            (StatusCode::TOO_MANY_REQUESTS, StatusCode::SERVICE_UNAVAILABLE)
        );
        drop((others, more));
        assert_eq!(room.available_permits(), ROOM as usize, "all of it is given back");
    }

    #[test]
    fn a_compressed_body_is_inflated_no_further_than_a_plain_one_may_be_long() {
        use std::io::Write as _;
        let gzip = |bytes: &[u8]| {
            let mut encoder =
                flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
            encoder.write_all(bytes).expect("writes");
            Bytes::from(encoder.finish().expect("ends"))
        };
        let encoding = Encoding { lines: false, gzip: true };
        assert_eq!(inflated(gzip(b"{}"), encoding).expect("inflates"), "{}");
        assert_eq!(
            inflated(gzip(&vec![b' '; MAX_BODY]), encoding).expect("inflates").len(),
            MAX_BODY
        );
        assert_eq!(
            inflated(gzip(&vec![b' '; 20 * MAX_BODY]), encoding).expect_err("too long").status,
            413
        );
        assert!(
            inflated(Bytes::from_static(b"{}"), encoding)
                .expect_err("not gzip")
                .why
                .contains("not gzip")
        );
        let cut = gzip(b"{\"event\":\"a\"}");
        assert_eq!(inflated(cut.slice(..cut.len() - 4), encoding).expect_err("cut").status, 400);
    }
}

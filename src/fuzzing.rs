//! What must hold for bytes that strangers write: the bodies of the fuzz targets in `fuzz/`. The
//! tests below run them over the corpora that are kept there. No program holds this: it is compiled
//! for `cargo fuzz` and for tests alone.

use std::{
    fmt,
    time::{Duration, SystemTime},
};

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Value, json, value::RawValue};

use crate::{
    admin, clock, config,
    crypto::{
        secret::Secret,
        signature::{Encoding, KEY_BYTES, Scheme, Signer, TOLERANCE_SECONDS, standard_key, verify},
    },
    delivery::AttemptLog,
    endpoint::webhook::parse_retry_after,
    event::{self, MAX_DEPTH, MAX_TYPE_LEN, Pattern, payload::Format},
    policy::{
        batching,
        retry::{MAX_DELAY, Next, RetryPolicy},
    },
    queue::amqp,
};

/// What tries one input, and panics if something does not hold.
pub type Target = fn(&[u8]);

/// All of them. Each has a file, a corpus and a `[[bin]]` of its name in `fuzz/`.
pub const TARGETS: &[(&str, Target)] = &[
    ("config", config),
    ("event", event),
    ("intake", intake),
    ("message", message),
    ("pattern", pattern),
    ("retry_after", retry_after),
    ("signature", signature),
    ("splice", splice),
    ("story", story),
    ("wire", wire),
];

/// Stands between the parts of an input that has several. It is in no JSON, and a text file can
/// hold it.
const SEPARATOR: u8 = 0x1e;

/// The fields of a JSON object in their order, as serde_json finds them.
struct Fields<'a>(Vec<(String, &'a RawValue)>);

impl<'de: 'a, 'a> Deserialize<'de> for Fields<'a> {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        d.deserialize_map(Self(Vec::new()))
    }
}

impl<'de: 'a, 'a> Visitor<'de> for Fields<'a> {
    type Value = Self;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<Self, A::Error> {
        while let Some((key, value)) = map.next_entry::<&RawValue, _>()? {
            // One with half of a surrogate pair is its text, which is no name that is looked for.
            self.0.push((
                serde_json::from_str(key.get()).unwrap_or_else(|_| key.get().to_owned()),
                value,
            ));
        }
        Ok(self)
    }
}

impl<'a> Fields<'a> {
    fn of(json: &'a [u8]) -> Option<Self> {
        serde_json::from_slice(json).ok()
    }

    fn last(&self, name: &str) -> Option<&'a str> {
        self.0.iter().rev().find(|(n, _)| n == name).map(|(_, value)| value.get())
    }
}

/// What stands in an object or array, whatever its keys.
struct Inner<'a>(Vec<&'a RawValue>);

impl<'de: 'a, 'a> Deserialize<'de> for Inner<'a> {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        d.deserialize_any(Self(Vec::new()))
    }
}

impl<'de: 'a, 'a> Visitor<'de> for Inner<'a> {
    type Value = Self;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object or an array")
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<Self, A::Error> {
        while let Some((RawKey, value)) = map.next_entry()? {
            self.0.push(value);
        }
        Ok(self)
    }

    fn visit_seq<A: SeqAccess<'de>>(mut self, mut seq: A) -> Result<Self, A::Error> {
        while let Some(value) = seq.next_element()? {
            self.0.push(value);
        }
        Ok(self)
    }
}

/// A key with whatever escapes.
struct RawKey;

impl<'de> Deserialize<'de> for RawKey {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        <&RawValue>::deserialize(d).map(|_| Self)
    }
}

/// How deep a JSON value nests, level by level.
fn depth(json: &str) -> usize {
    let brackets = json.bytes().filter(|b| matches!(b, b'{' | b'[')).count();
    if brackets <= MAX_DEPTH {
        return brackets; // no more than that, which is all that is asked
    }
    let mut level: Vec<&str> = vec![json];
    for depth in 0.. {
        level.retain(|value| value.trim_start().starts_with(['{', '[']));
        if level.is_empty() {
            return depth;
        }
        let nested =
            level.into_iter().filter_map(|value| serde_json::from_str::<Inner<'_>>(value).ok());
        level = nested.flat_map(|inner| inner.0).map(RawValue::get).collect();
    }
    usize::MAX
}

/// Type and time of an event as a plain parser finds them.
fn plain_head(bytes: &[u8]) -> Option<(String, Option<u64>)> {
    let fields = Fields::of(bytes)?;
    let event_type: String = serde_json::from_str(fields.last("event")?).ok()?;
    let text = std::str::from_utf8(bytes).ok()?;
    let timestamp = fields.last("timestamp").and_then(|t| serde_json::from_str(t).ok());
    (event_type.len() <= MAX_TYPE_LEN && depth(text) <= MAX_DEPTH)
        .then_some((event_type, timestamp))
}

/// The scan agrees with a parser on what is an event, and on its fields; an id is added to it and
/// nothing else is changed.
pub fn event(bytes: &[u8]) {
    let head = event::head(bytes);
    let expected = plain_head(bytes);
    let found = head.as_ref().ok().map(|h| (h.event_type.clone().into_owned(), h.timestamp));
    assert_eq!(found, expected, "{head:?}");
    assert_eq!(event::event_type(bytes).ok(), head.as_ref().ok().map(|h| h.event_type.clone()));
    match head {
        Err(why) => assert!(why.to_string().starts_with("the event")),
        Ok(head) => with_id(bytes, &head),
    }
}

fn with_id(bytes: &[u8], head: &event::Head<'_>) {
    let fields = Fields::of(bytes).expect("an event");
    let id = "\u{1b}\"\\é";
    let Some(new) = event::with_id(bytes, id) else {
        assert!(fields.last("event_id").is_some());
        return;
    };
    assert!(fields.last("event_id").is_none());
    assert_eq!(event::head(&new).as_ref(), Ok(head));
    let kept = bytes.iter().rposition(|b| *b == b'}').expect("an object");
    assert!(new.starts_with(&bytes[..kept]) && new.ends_with(&bytes[kept..]));
    let new_fields = Fields::of(&new).expect("an event");
    assert_eq!(new_fields.0.len(), fields.0.len() + 1);
    assert_eq!(
        new_fields.last("event_id").and_then(|v| serde_json::from_str::<String>(v).ok()).as_deref(),
        Some(id)
    );
    assert_eq!(event::with_id(&new, id), None);
}

const WHITE_SPACE: [char; 4] = [' ', '\t', '\r', '\n'];

fn spliced(format: Format, events: &[&[u8]]) -> Vec<u8> {
    format.splice(events.iter().copied(), events.iter().map(|e| e.len()).sum())
}

/// As a receiver reads a body: the events, each with its text.
fn received(format: Format, body: &[u8]) -> Vec<&RawValue> {
    let text = std::str::from_utf8(body).expect("UTF-8");
    match format {
        Format::Json => {
            let fields = Fields::of(body).expect("an object");
            assert_eq!(fields.0.len(), 1);
            serde_json::from_str(fields.last("events").expect("the field `events`"))
                .expect("an array")
        }
        Format::JsonLines => {
            let lines = text.strip_suffix('\n').expect("the last line is ended").split('\n');
            lines.map(|line| serde_json::from_str(line).expect("each line is JSON")).collect()
        }
    }
}

fn has_float(value: &Value) -> bool {
    match value {
        Value::Number(n) => n.is_f64(),
        Value::Array(all) => all.iter().any(has_float),
        Value::Object(all) => all.values().any(has_float),
        _ => false,
    }
}

/// Events that are spliced together parse to the same values as if each had been parsed and all
/// been serialised, and are found again in the body, whole or in halves.
pub fn splice(bytes: &[u8]) {
    let events: Vec<&[u8]> =
        bytes.split(|b| *b == SEPARATOR).filter(|e| event::head(e).is_ok()).collect();
    if events.is_empty() {
        return;
    }
    for format in [Format::Json, Format::JsonLines] {
        let body = spliced(format, &events);
        let longest = format.body_len(events.len(), events.iter().map(|e| e.len()).sum());
        assert!(body.len() == longest || format == Format::JsonLines && body.len() < longest);

        let read = received(format, &body);
        assert_eq!(read.len(), events.len());
        let mut values = Vec::new();
        for (event, read) in events.iter().zip(&read) {
            let text = std::str::from_utf8(event).expect("UTF-8");
            let kept = if format == Format::Json {
                text.to_owned()
            } else {
                text.replace(['\r', '\n'], "")
            };
            assert_eq!(read.get(), kept.trim_matches(WHITE_SPACE), "each byte is kept");
            assert_eq!(event::head(read.get().as_bytes()), event::head(event));
            let value: Option<Value> = serde_json::from_str(text).ok();
            assert_eq!(
                serde_json::from_str::<Value>(read.get()).ok(),
                value,
                "each event has its values"
            );
            values.extend(value);
        }
        // Some are no values to serde_json: 1e400, half of a surrogate pair, or what nests deep.
        let parsed: Option<Value> =
            if format == Format::Json { serde_json::from_slice(&body).ok() } else { None };
        if let (true, Some(parsed)) = (values.len() == events.len(), parsed) {
            let serialised = json!({ "events": values }).to_string();
            assert_eq!(parsed.to_string(), serialised);
            assert!(
                has_float(&parsed)
                    || serde_json::from_str::<Value>(&serialised).ok() == Some(parsed)
            );
        }

        let found = format.events(&body).expect("a body of its own");
        assert!(format == Format::JsonLines || found == events);
        assert_eq!(
            found.iter().map(|e| event::head(e)).collect::<Vec<_>>(),
            events.iter().map(|e| event::head(e)).collect::<Vec<_>>()
        );
        assert_eq!(spliced(format, &found), body, "what is found makes the same body");
        let first = format.first_event(&body).expect("a first event");
        assert_eq!(event::head(first), event::head(events[0]));
        if found.len() > 1 {
            let (first, second) = found.split_at(found.len().div_ceil(2));
            let halves = [spliced(format, first), spliced(format, second)];
            let again: Vec<&[u8]> = halves
                .iter()
                .flat_map(|half| format.events(half).expect("a body of its own"))
                .collect();
            assert_eq!(again, found, "nothing is lost between the halves");
        }
    }
}

/// A pattern, then an event type: the answer is that of trying each way in which the pattern may
/// match.
pub fn pattern(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let (pattern, event_type) = text.split_once(char::from(SEPARATOR)).unwrap_or((text, "a.b"));
    let Ok(checked) = Pattern::try_new(pattern) else { return };
    assert_eq!(checked.as_str(), pattern);
    let parts: Vec<&str> = pattern.split('.').collect();
    let words: Vec<&str> =
        if event_type.is_empty() { Vec::new() } else { event_type.split('.').collect() };
    let matches = checked.matches(event_type);
    if parts.iter().filter(|p| **p == "#").count() <= 4 && words.len() <= 16 {
        assert_eq!(matches, matches_some_way(&parts, &words));
    }
}

fn matches_some_way(pattern: &[&str], words: &[&str]) -> bool {
    match (pattern, words) {
        ([], []) => true,
        (["#", rest @ ..], _) => (0..=words.len()).any(|n| matches_some_way(rest, &words[n..])),
        ([part, rest @ ..], [word, words @ ..]) => {
            (*part == "*" || part == word) && matches_some_way(rest, words)
        }
        _ => false,
    }
}

/// How an input of [`intake`] begins.
const LINES: u8 = b'L';
const GZIP: u8 = b'Z';
const GZIP_LINES: u8 = b'z';

/// The intake takes what a plain reading of the body finds, each event with its bytes, and all or
/// nothing.
pub fn intake(bytes: &[u8]) {
    let Some((kind, body)) = bytes.split_first() else { return };
    let (lines, gzip) = (matches!(*kind, LINES | GZIP_LINES), matches!(*kind, GZIP | GZIP_LINES));
    let Some((body, taken)) = admin::read_all(body, lines, gzip) else { return };
    let expected = if lines { events_in_lines(&body) } else { events_in_object(&body) };
    match (taken, expected) {
        (Ok(taken), Some(expected)) => {
            assert_eq!(taken.iter().map(|e| &e.body[..]).collect::<Vec<_>>(), expected);
            for event in taken {
                assert_eq!(
                    plain_head(&event.body).map(|(t, _)| t).as_ref(),
                    Some(&event.event_type)
                );
                assert!(event.message_id.is_some());
            }
        }
        (Ok(taken), None) => panic!("{} events of what is none", taken.len()),
        (Err((status, _)), Some(expected)) if expected.len() > admin::MAX_EVENTS => {
            assert_eq!(status, 413)
        }
        (Err((status, bad)), expected) => {
            let expected = expected.unwrap_or_default();
            let is_bad = |(n, event): (usize, &&[u8])| plain_head(event).is_none().then_some(n);
            let expected_bad: Vec<usize> =
                expected.iter().enumerate().filter_map(is_bad).take(100).collect();
            assert_eq!(status, 400);
            assert!(
                bad == expected_bad && (expected.is_empty() || !bad.is_empty()),
                "{bad:?}, not {expected_bad:?}"
            );
        }
    }
}

fn events_in_lines(body: &[u8]) -> Option<Vec<&[u8]>> {
    let is_blank = |line: &&[u8]| line.iter().all(|b| b" \t\r".contains(b));
    let lines = body.split(|b| *b == b'\n').filter(|line| !is_blank(line));
    Some(lines.map(without_space).collect())
}

fn without_space(text: &[u8]) -> &[u8] {
    let is_text = |b: &u8| !WHITE_SPACE.contains(&char::from(*b));
    match (text.iter().position(is_text), text.iter().rposition(is_text)) {
        (Some(first), Some(last)) => &text[first..=last],
        _ => &[],
    }
}

/// The events of one object, or itself if it is one; `None` of what is not such an object.
fn events_in_object(body: &[u8]) -> Option<Vec<&[u8]>> {
    let fields = Fields::of(body)?;
    if fields.last("event").is_some() {
        return Some(vec![without_space(body)]);
    }
    let mut events = fields.0.iter().filter(|(name, _)| name == "events");
    let (Some((_, events)), None) = (events.next(), events.next()) else { return None };
    let events: Vec<&RawValue> = serde_json::from_str(events.get()).ok()?;
    Some(events.into_iter().map(|e| e.get().as_bytes()).collect())
}

/// The length of a message's properties in two bytes, these, then the body.
pub fn message(bytes: &[u8]) {
    let Some(([a, b], rest)) = bytes.split_first_chunk() else { return };
    let (properties, body) =
        rest.split_at(usize::from(u16::from_be_bytes([*a, *b])).min(rest.len()));
    amqp::fuzzing::message(properties, body);
}

/// The longest frame (0: any) in two bytes, how many bytes are asked for at once, four sizes of
/// pieces, then what the broker sends.
pub fn wire(bytes: &[u8]) {
    let Some(([a, b, at_once, pieces @ ..], sent)) = bytes.split_first_chunk::<7>() else { return };
    let frame_max = match u16::from_be_bytes([*a, *b]) {
        0 => usize::MAX,
        n => n.into(),
    };
    amqp::fuzzing::wire(frame_max, sent, &pieces.map(usize::from), usize::from(*at_once).max(1));
}

/// What a story's text says is kept in a text that says the same, and is short.
pub fn story(bytes: &[u8]) {
    let story = AttemptLog::from_text(&String::from_utf8_lossy(bytes));
    let (first, _, last) = story.parts();
    assert!(first.len() <= AttemptLog::FIRST && last.len() <= AttemptLog::LAST);
    let text = story.to_text();
    assert!(
        text.len() < 3 * 1024 && text.bytes().all(|b| b.is_ascii_graphic()),
        "{} bytes",
        text.len()
    );
    assert_eq!(AttemptLog::from_text(&text), story);
    for attempt in first.iter().chain(last) {
        assert!(
            humantime::parse_rfc3339(&clock::rfc3339(attempt.at)).is_ok(),
            "its time can be shown"
        );
    }
}

/// The time in four bytes, then the header's value: it is read as seconds or as a date, and keeps a
/// batch no longer than 72 h.
pub fn retry_after(bytes: &[u8]) {
    let Some((now, value)) = bytes.split_first_chunk() else { return };
    let now = SystemTime::UNIX_EPOCH + Duration::from_secs(u32::from_be_bytes(*now).into());
    let Ok(value) = std::str::from_utf8(value) else { return };
    let text = value.trim();
    let expected = if !text.is_empty() && text.chars().all(|c| c.is_ascii_digit()) {
        let digits = text.trim_start_matches('0');
        let seconds = if digits.len() > 18 {
            u64::MAX
        } else {
            digits.bytes().fold(0, |n, b| 10 * n + u64::from(b - b'0'))
        };
        Some(Duration::from_secs(seconds))
    } else {
        let date = text.parse::<httpdate::HttpDate>().ok().map(SystemTime::from);
        date.map(|date| date.duration_since(now).unwrap_or_default())
    };
    let found = parse_retry_after(value, now);
    assert_eq!(found, expected.map(|wait| wait.min(MAX_DELAY)));
    let policy = RetryPolicy::default();
    match policy.next(1, now, now, found, 0.5) {
        Next::After(delay) => assert_eq!(delay, found.unwrap_or_default().max(policy.interval(1))),
        Next::Exhausted => panic!("no limit is reached at once"),
    }
}

/// A key, an id, a time, a body, then a header of somebody's: what is signed is verified, what is
/// changed is not.
pub fn signature(bytes: &[u8]) {
    let mut parts = bytes.splitn(5, |b| *b == SEPARATOR);
    let mut part = || parts.next().unwrap_or_default();
    let (key, id, at, body, forged) = (part(), part(), part(), part(), part());
    let as_written = Secret::new(String::from_utf8_lossy(key));
    if let Ok(key) = standard_key(&as_written) {
        assert!(KEY_BYTES.contains(&key.len()) && as_written.expose().starts_with("whsec_"));
    }
    let mut key = key[..key.len().min(*KEY_BYTES.end())].to_vec();
    key.resize(key.len().max(*KEY_BYTES.start()), 7);
    let [current, previous, other] = [0, 1, 2].map(|n| {
        key[0] = key[0].wrapping_add(n);
        Secret::new(format!("whsec_{}", BASE64.encode(&key)))
    });
    let id = String::from_utf8_lossy(id);
    let at = at.iter().fold(0_u64, |n, b| (n << 8) | u64::from(*b));
    let custom = |header: &str, encoding| Scheme::Custom {
        header: header.to_owned(),
        prefix: "v=".to_owned(),
        encoding,
    };
    let schemes = vec![
        Scheme::StandardWebhooks,
        Scheme::Mailtrap,
        custom("x-hex", Encoding::Hex),
        custom("x-base64", Encoding::Base64),
    ];
    let signer =
        Signer::try_new(schemes, &[current.clone(), previous.clone()]).expect("sound secrets");
    let headers = signer.headers(&id, at, body);
    let value = |name: &str| headers.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str());
    let mac = BASE64
        .decode(value("x-base64").and_then(|v| v.strip_prefix("v=")).expect("signed"))
        .expect("base64");
    let hex: String = mac.iter().map(|b| format!("{b:02x}")).collect();
    assert_eq!(
        (value("x-hex"), value("mailtrap-signature")),
        (Some(&*format!("v={hex}")), Some(&*hex))
    );

    for (secret, ok) in [(&current, true), (&previous, true), (&other, false)] {
        assert_eq!(verify(secret, value, body, at).is_ok(), ok);
    }
    let plain = |name: &str| value(name).filter(|_| name == "mailtrap-signature");
    for (secret, ok) in [(&current, true), (&previous, false)] {
        assert_eq!(verify(secret, plain, body, 0).is_ok(), ok);
    }
    for (now, ok) in [
        (at.saturating_sub(TOLERANCE_SECONDS), true),
        (at.saturating_add(TOLERANCE_SECONDS), true),
        (at.wrapping_add(TOLERANCE_SECONDS + 1), false),
        (at.wrapping_sub(TOLERANCE_SECONDS + 1), false),
    ] {
        assert_eq!(verify(&current, value, body, now).is_ok(), ok, "{at} at {now}");
    }

    let mut changed = if body.is_empty() { vec![0] } else { body.to_vec() };
    let place = forged.len() % changed.len();
    changed[place] ^= if body.is_empty() { 0 } else { 1 << (forged.len() % 8) };
    assert!(
        verify(&current, value, &changed, at).is_err()
            && verify(&current, plain, &changed, at).is_err()
    );
    let differs = |name: &str, with: &str| {
        let with =
            |n: &str| if n == name { Some(with.to_owned()) } else { value(n).map(str::to_owned) };
        let all: Vec<(&str, Option<String>)> =
            ["webhook-id", "webhook-timestamp", "webhook-signature"].map(|n| (n, with(n))).into();
        let found = verify(
            &current,
            |n| all.iter().find(|(name, _)| *name == n).and_then(|(_, v)| v.as_deref()),
            body,
            at,
        );
        assert!(found.is_err(), "{name}: {all:?}");
    };
    differs("webhook-id", &format!("{id}x"));
    differs("webhook-timestamp", &(at ^ 1).to_string());
    // Nobody guesses a signature: whatever a stranger writes there is refused.
    let forged = String::from_utf8_lossy(forged);
    differs("webhook-signature", &forged);
    differs("webhook-timestamp", &format!("{forged}{}", at ^ 1));
    assert!(
        verify(&current, |name| (name == "mailtrap-signature").then_some(&*forged), body, at)
            .is_err()
    );
}

/// What the environment holds: a secret, and words that are none.
fn environment(name: &str) -> Option<String> {
    match name {
        "SECRET" => Some("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw".to_owned()),
        "PASSWORD" => Some(PASSWORD.to_owned()),
        "EMPTY" => Some(String::new()),
        _ => None,
    }
}

const PASSWORD: &str = "Tell/Nobody+This";

/// Beside the configuration.
const FILES: &[(&str, &str)] = &[
    ("secret", "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw\n"),
    (
        "more.toml",
        "[[subscriber]]\nname = \"more\"\nurl = \"https://example.com/\"\nsecrets = [\"file:secret\"]\n",
    ),
    ("ca.pem", "no certificate"),
];

/// Keys whose values may be secrets.
const SECRET_KEYS: &[&str] =
    &["url", "token", "secrets", "password", "bearer", "headers", "proxy", "management_url"];

/// Whatever stands in a configuration, each mistake in it has a place there and no message quotes a
/// secret; what is accepted keeps within the limits.
pub fn config(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    match config::from_text(text, &environment, FILES) {
        Ok(found) => within_limits(&found),
        Err(why) => {
            assert!(!why.problems.is_empty());
            let lines: Vec<&str> = text.split('\n').collect();
            for problem in &why.problems {
                assert!(!problem.message.is_empty() && !problem.to_string().is_empty());
                if let (Some((line, column)), true) =
                    (problem.place, problem.file.ends_with("hooktrail.toml"))
                {
                    assert!(
                        line >= 1 && column >= 1 && column <= lines[line - 1].chars().count() + 1,
                        "{problem}"
                    );
                }
                let is_secret = SECRET_KEYS
                    .iter()
                    .any(|key| problem.key.split(['.', '[']).any(|part| part == *key));
                assert!(
                    !is_secret || text.contains(PASSWORD) || !problem.message.contains(PASSWORD),
                    "{problem}"
                );
            }
        }
    }
}

fn within_limits(config: &config::Config) {
    let nothing = config.changes_to(config).expect("the same queue");
    assert!(nothing.changes.is_empty() && nothing.needs_restart.is_empty());
    assert!(config.admin.token.is_some() || config.admin.listen.ip().to_canonical().is_loopback());
    let minutes = |n: u64| Duration::from_secs(60 * n);
    let mut names = std::collections::HashSet::new();
    for s in config.subscribers.iter() {
        assert!(names.insert(&s.name));
        assert!(
            s.url.expose().scheme() == "https"
                || s.url.expose().scheme() == "http" && s.http.allow_http
        );
        assert!(s.http.addresses.check_literal(s.url.expose()).is_ok());
        assert!(
            !s.events.is_empty()
                && s.events.iter().all(|p| Pattern::try_new(p.as_str()).as_ref() == Ok(p))
        );
        assert!((1..=65_535).contains(&s.batch.max_events) && s.batch.max_wait <= minutes(2));
        let bytes = u64::try_from(s.batch.max_bytes).expect("fits");
        assert!(
            (batching::BatchPolicy::MIN_BYTES..=batching::BatchPolicy::MAX_BYTES).contains(&bytes)
        );
        assert!(
            !s.http.timeout.is_zero()
                && s.http.timeout <= minutes(5)
                && !s.http.connect_timeout.is_zero()
        );
        assert!((1..=100).contains(&s.http.concurrency));
        assert!(
            s.circuit_breaker.open_for <= s.circuit_breaker.max_open_for
                && s.circuit_breaker.max_open_for <= minutes(24 * 60)
        );
        assert!(
            s.headers.iter().all(|(_, value)| http::HeaderValue::from_str(value.expose()).is_ok())
        );
        assert!(
            s.auth
                .as_ref()
                .is_none_or(|a| http::HeaderValue::from_str(a.header().expose()).is_ok())
        );
        let signed = s.signer.headers("msg_1", 1, b"{}");
        assert!(s.signer.schemes().is_empty() || !s.secrets.is_empty() && !signed.is_empty());
        assert!(signed.iter().all(|(n, v)| http::HeaderName::try_from(n).is_ok()
            && http::HeaderValue::from_str(v).is_ok()));
        assert!(RetryPolicy::try_new(s.retry.options()).is_ok());
        for (attempt, random) in [(1, 0.0), (2, 1.0), (1000, 0.5)] {
            assert!(s.retry.interval(attempt) <= MAX_DELAY);
            match s.retry.next(
                attempt,
                SystemTime::UNIX_EPOCH,
                SystemTime::UNIX_EPOCH,
                None,
                random,
            ) {
                Next::After(delay) => assert!(delay <= s.retry.options().max_interval),
                Next::Exhausted => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{collections::BTreeSet, path::Path};

    fn folder(name: &str) -> BTreeSet<String> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz").join(name);
        let entries =
            std::fs::read_dir(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[test]
    fn what_must_hold_for_strangers_bytes_holds_for_the_corpora() {
        for (name, target) in TARGETS {
            let files = folder(&format!("corpus/{name}"));
            assert!(files.len() > 3, "the corpus of {name} has {} files", files.len());
            for file in files {
                let path = Path::new(env!("CARGO_MANIFEST_DIR"))
                    .join("fuzz/corpus")
                    .join(name)
                    .join(&file);
                println!("{name}: {file}");
                target(&std::fs::read(path).unwrap());
            }
        }
    }

    #[test]
    fn each_target_has_its_program_its_dictionary_and_its_corpus() {
        let names: BTreeSet<String> = TARGETS.iter().map(|(name, _)| (*name).to_owned()).collect();
        assert_eq!(folder("corpus"), names);
        assert_eq!(folder("fuzz_targets"), names.iter().map(|name| format!("{name}.rs")).collect());
        assert_eq!(
            folder("dictionaries"),
            names.iter().map(|name| format!("{name}.dict")).collect()
        );
        let manifest =
            std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/Cargo.toml"))
                .unwrap();
        for name in names {
            assert!(
                manifest
                    .contains(&format!("name = \"{name}\"\npath = \"fuzz_targets/{name}.rs\"\n")),
                "no [[bin]] {name}"
            );
        }
    }
}

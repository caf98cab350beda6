//! Events, request bodies, and patterns.

use std::borrow::Cow;

use serde_json::{Value, json, value::RawValue};

use super::json::{Fields, SEPARATOR, WHITE_SPACE, plain_head};
use crate::event::{
    self, Pattern,
    entry::{self, Entry, Metadata, event_in},
    payload::Format,
    redaction::{Place, Redaction, With},
};

/// The scan agrees with a parser on what is an event and on its fields; adding an id changes
/// nothing else.
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
    let Some(event::WithId { body: new, added }) = event::with_id(bytes, id) else {
        assert!(fields.last("event_id").is_some());
        return;
    };
    assert!(fields.last("event_id").is_none());
    assert_eq!(event::head(&new).as_ref(), Ok(head));
    let kept = bytes.iter().rposition(|b| *b == b'}').expect("an object");
    assert!(new.starts_with(&bytes[..kept]) && new.ends_with(&bytes[kept..]));
    assert_eq!([&new[..added.start], &new[added.end..]].concat(), bytes, "as it was published");
    let new_fields = Fields::of(&new).expect("an event");
    assert_eq!(new_fields.0.len(), fields.0.len() + 1);
    assert_eq!(
        new_fields.last("event_id").and_then(|v| serde_json::from_str::<String>(v).ok()).as_deref(),
        Some(id)
    );
    assert_eq!(event::with_id(&new, id), None);
}

fn spliced(format: Format, entries: &[&[u8]]) -> Vec<u8> {
    format.splice(entries.iter().copied(), entries.iter().map(|e| e.len()).sum())
}

/// The events of a body as a receiver reads them, each with its text; of `slack` its lines.
fn received(format: Format, body: &[u8]) -> Vec<&RawValue> {
    let text = std::str::from_utf8(body).expect("UTF-8");
    match format {
        Format::Json => {
            let fields = Fields::of(body).expect("an object");
            assert_eq!(fields.0.len(), 1);
            serde_json::from_str(fields.last("events").expect("the field `events`"))
                .expect("an array")
        }
        Format::JsonArray => serde_json::from_slice(body).expect("an array"),
        Format::Single => vec![serde_json::from_slice(body).expect("an event")],
        Format::SplunkHec => serde_json::Deserializer::from_slice(body)
            .into_iter::<&RawValue>()
            .map(|one| part(one.expect("an object"), "event"))
            .collect(),
        Format::CloudEventsBatch => {
            let all: Vec<&RawValue> = serde_json::from_slice(body).expect("an array");
            all.into_iter().map(|one| part(one, "data")).collect()
        }
        Format::Slack => unreachable!("its lines hold no events"),
        Format::JsonLines => {
            let lines = text.strip_suffix('\n').expect("the last line is ended").split('\n');
            lines.map(|line| serde_json::from_str(line).expect("each line is JSON")).collect()
        }
    }
}

/// The value of an object's field.
fn part<'b>(object: &'b RawValue, name: &str) -> &'b RawValue {
    let fields = Fields::of(object.get().as_bytes()).expect("an object");
    serde_json::from_str(fields.last(name).expect("the field")).expect("a value")
}

/// The lines of `slack` are as many as there are events, and none can do anything in a chat.
fn lines(body: &[u8], events: usize) {
    let body: Value = serde_json::from_slice(body).expect("JSON");
    let text = body["text"].as_str().expect("a text");
    assert_eq!(text.split('\n').count(), events);
    assert!(!text.contains(['<', '>', '\r', '\u{2028}', '\u{2029}']));
    let mentions = |rest: &str| rest.starts_with(char::is_alphanumeric);
    let mut before = ' ';
    for (at, c) in text.char_indices() {
        assert!(c != '@' || before.is_ascii_alphanumeric() || !mentions(&text[at + 1..]));
        assert!((before, c) != (']', '(') && (before, c) != ('`', '`'));
        before = c;
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

/// Spliced events parse to the same values as if each had been parsed and all been serialised; they
/// are found again in the body, whole or in halves.
pub fn splice(bytes: &[u8]) {
    let events: Vec<&[u8]> =
        bytes.split(|b| *b == SEPARATOR).filter(|e| event::head(e).is_ok()).collect();
    if events.is_empty() {
        return;
    }
    let all = &events;
    for format in Format::ALL {
        let events = &all[..format.most_events().unwrap_or(all.len()).min(all.len())];
        let metadata = Metadata { source: Some("/a".to_owned()), ..Metadata::default() };
        let made: Result<Vec<Option<Entry>>, _> =
            events.iter().map(|event| entry::of(format, &metadata, event, None)).collect();
        // An event with an empty type is no CloudEvent.
        let Ok(made) = made else { continue };
        let parts = events.iter().zip(&made).map(|(event, entry)| (*event, entry.as_ref()));
        let body = entry::body(format, ("msg_1", 0), parts.clone(), 0);
        let most = parts.map(|(e, entry)| entry.map_or(e.len(), Entry::max_len)).sum();
        let longest = format.body_len(events.len(), most);
        let is_shorter = matches!(format, Format::JsonLines | Format::CloudEventsBatch);
        assert!(body.len() == longest || is_shorter && body.len() < longest);

        let entries = format.entries(&body).expect("a body of its own");
        assert_eq!(entries.len(), events.len());
        assert_eq!(spliced(format, &entries), body, "what is found makes the same body");
        let first = format.first_entry(&body).expect("a first entry");
        assert_eq!(first.trim_ascii(), entries[0].trim_ascii());
        if entries.len() > 1 {
            let (first, second) = entries.split_at(entries.len().div_ceil(2));
            let halves = [spliced(format, first), spliced(format, second)];
            let again: Vec<&[u8]> = halves
                .iter()
                .flat_map(|half| format.entries(half).expect("a body of its own"))
                .collect();
            assert_eq!(again, entries, "nothing is lost between the halves");
        }
        if format == Format::Slack {
            lines(&body, events.len());
            continue;
        }

        let read = received(format, &body);
        assert_eq!(read.len(), events.len());
        let mut values = Vec::new();
        for (event, read) in events.iter().zip(&read) {
            let text = std::str::from_utf8(event).expect("UTF-8");
            let kept = if format == Format::JsonLines {
                text.replace(['\r', '\n'], "")
            } else {
                text.to_owned()
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
        // Some events are no values for serde_json: 1e400, half of a surrogate pair, deep nesting.
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

        let found: Vec<&[u8]> =
            entries.iter().map(|one| event_in(format, one).expect("an event")).collect();
        let heads = |events: &[&[u8]]| -> Vec<_> {
            events
                .iter()
                .map(|e| event::head(e).map(|h| (h.event_type.into_owned(), h.timestamp)))
                .collect()
        };
        assert_eq!(heads(&found), heads(events));
    }
}

/// Input: places, each with a separator behind it, then an event. Redacting nothing gives the same
/// bytes; whatever is redacted, it is an event with the same type still, and all bytes outside of the
/// values are kept.
pub fn redact(bytes: &[u8]) {
    let mut parts: Vec<&[u8]> = bytes.split(|b| *b == SEPARATOR).collect();
    let Some(event) = parts.pop().filter(|event| event::head(event).is_ok()) else { return };
    let event_text = std::str::from_utf8(event).expect("UTF-8");
    let text = |part: &[u8]| std::str::from_utf8(part).ok().map(str::to_owned);
    let places = parts.into_iter().filter_map(text).filter_map(|p| Place::try_new(&p).ok());
    let places: Vec<Place> = places.take(8).collect();
    let with = || With::Text("\u{1}".to_owned());
    assert_eq!(Redaction::new(Vec::new(), with()).apply(event_text).ok(), Some(None));
    let redaction = Redaction::new(places, with());
    let Some(redacted) = redaction.apply(event_text).expect("an event can be read") else { return };
    let type_of = |text: &str| event::event_type(text.as_bytes()).map(Cow::into_owned);
    assert_eq!(type_of(&redacted), type_of(event_text));
    // What stands for a value is in no event: a raw control character is no JSON.
    const STAND_IN: &str = "\"\\u0001\"";
    let mut rest = event_text;
    let kept: Vec<&str> = redacted.split(STAND_IN).collect();
    if !event_text.contains("\\u0001") {
        for (n, part) in kept.iter().enumerate() {
            let at = if n == 0 { 0 } else { rest.find(part).expect("the bytes between are kept") };
            assert!(n > 0 || rest.starts_with(part), "the beginning is kept");
            rest = &rest[at + part.len()..];
        }
        assert!(event_text.ends_with(kept.last().expect("one at least")));
    }
    // Nothing is left to be redacted but what stands for it.
    assert_eq!(
        redaction.apply(&redacted).expect("an event").as_deref().unwrap_or(&redacted),
        redacted
    );
}

/// Input: a pattern, then an event type. The answer is the same as that of trying every way to
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

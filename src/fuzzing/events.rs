//! Events, request bodies, and patterns.

use serde_json::{Value, json, value::RawValue};

use super::json::{Fields, SEPARATOR, WHITE_SPACE, plain_head};
use crate::event::{self, Pattern, payload::Format};

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

fn spliced(format: Format, events: &[&[u8]]) -> Vec<u8> {
    format.splice(events.iter().copied(), events.iter().map(|e| e.len()).sum())
}

/// The events of a body as a receiver reads them, each with its text.
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
        let body = spliced(format, events);
        let longest = format.body_len(events.len(), events.iter().map(|e| e.len()).sum());
        assert!(body.len() == longest || format == Format::JsonLines && body.len() < longest);

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

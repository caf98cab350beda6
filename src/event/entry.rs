//! An entry: what stands for one event in a request body.
//!
//! Most formats have the event itself. Others put it beside what their receivers need, and `slack`
//! has a line about it for people.

use std::{
    borrow::Cow,
    time::{Duration, SystemTime},
};

use serde_json::value::RawValue;

use super::{
    details::{Details, Party},
    key::string,
    payload::Format,
    scan::{Part, Parts},
};
use crate::clock;

/// What a subscriber's configuration says beside each of its events.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Metadata {
    /// Of `splunk_hec` and `cloudevents_batch`.
    pub source: Option<String>,
    /// Of `splunk_hec`.
    pub sourcetype: Option<String>,
    /// Of `splunk_hec`.
    pub index: Option<String>,
}

/// An entry that is not the event itself, made before its batch has an id.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    head: Vec<u8>,
    /// What follows the id of a CloudEvent without a message id: that of the batch in which the event
    /// is sent first, of which later ones are halves, and its place there.
    behind_id: Option<Vec<u8>>,
}

/// The longest such id as JSON: that of a batch that is no half, a dot, and a place of five digits.
const LONGEST_ID: usize = "\"msg_00000000000000000000000000000000.65535\"".len();

/// The last second of a `time`: a larger number is one in milliseconds.
const LAST_SECOND: f64 = 4_102_444_799.0;

/// Put after an `@` that could begin a mention: without width, and no part of a name.
const ZERO_WIDTH_SPACE: char = '\u{200b}';

/// Makes the entry of an event; `None` in a format in which it is the event itself.
///
/// # Errors
/// The event has no entry in this format; why, as a sentence.
pub fn of(
    format: Format,
    metadata: &Metadata,
    event: &[u8],
    message_id: Option<&str>,
) -> Result<Option<Entry>, &'static str> {
    let whole = |head| Entry { head, behind_id: None };
    Ok(match format {
        Format::Json | Format::JsonLines | Format::JsonArray | Format::Single => None,
        Format::SplunkHec => Some(whole(splunk_hec(metadata, event))),
        Format::CloudEventsBatch => Some(cloud_event(metadata, event, message_id)?),
        Format::Slack => Some(whole(line(event))),
    })
}

impl Entry {
    /// An upper bound for its bytes, exact unless its batch gives it an id.
    pub fn max_len(&self) -> usize {
        let behind = self.behind_id.as_ref().map(|rest| LONGEST_ID + rest.len());
        self.head.len() + behind.unwrap_or_default()
    }

    /// The entry with this place in the batch with this id.
    fn at(&self, batch_id: &str, place: usize) -> Cow<'_, [u8]> {
        let Some(rest) = &self.behind_id else { return Cow::Borrowed(&self.head) };
        let id = json_text(&format!("{batch_id}.{place}"));
        Cow::Owned([&self.head, id.as_bytes(), rest].concat())
    }
}

/// The request body of events, each with its entry, if that is another text. The first of them has
/// `before` others before it in the batch with this id.
pub fn body<'e>(
    format: Format,
    (batch_id, before): (&str, usize),
    events: impl ExactSizeIterator<Item = (&'e [u8], Option<&'e Entry>)>,
    bytes: usize,
) -> Vec<u8> {
    if is_event(format) {
        return format.splice(events.map(|(event, _)| event), bytes);
    }
    let entry = |(n, (event, entry)): (usize, (&'e [u8], Option<&'e Entry>))| {
        entry.map_or(Cow::Borrowed(event), |entry| entry.at(batch_id, before + n + 1))
    };
    let entries: Vec<Cow<'_, [u8]>> = events.enumerate().map(entry).collect();
    format.splice(entries.iter().map(|entry| &**entry), bytes)
}

/// The event in an entry; `None` if there is none, as in a line for people.
pub fn event_in(format: Format, entry: &[u8]) -> Option<&[u8]> {
    #[derive(serde::Deserialize)]
    struct Parts<'e> {
        #[serde(borrow, alias = "data")]
        event: &'e RawValue,
    }
    match format {
        Format::Json | Format::JsonLines | Format::JsonArray | Format::Single => Some(entry),
        Format::SplunkHec | Format::CloudEventsBatch => {
            let parts: Parts<'_> = serde_json::from_slice(entry).ok()?;
            Some(parts.event.get().as_bytes())
        }
        Format::Slack => None,
    }
}

/// Whether an entry has all bytes of its event, so that one that is too large alone does not fit.
pub const fn holds_event(format: Format) -> bool {
    !matches!(format, Format::Slack)
}

/// Whether events with the same bytes can have entries that differ.
pub const fn has_identity(format: Format) -> bool {
    matches!(format, Format::CloudEventsBatch)
}

/// Whether an entry is the event itself.
const fn is_event(format: Format) -> bool {
    match format {
        Format::Json | Format::JsonLines | Format::JsonArray | Format::Single => true,
        Format::SplunkHec | Format::CloudEventsBatch | Format::Slack => false,
    }
}

fn splunk_hec(metadata: &Metadata, event: &[u8]) -> Vec<u8> {
    let Metadata { source, sourcetype, index } = metadata;
    let (_, timestamp) = head(event);
    let mut object = Object::with_room_for(event);
    if let Some(time) = timestamp.filter(|time| seconds(time).is_some()) {
        object.add("time", time);
    }
    for (name, text) in [("source", source), ("sourcetype", sourcetype), ("index", index)] {
        if let Some(text) = text {
            object.add_text(name, text);
        }
    }
    object.end("event", event)
}

fn cloud_event(
    metadata: &Metadata,
    event: &[u8],
    message_id: Option<&str>,
) -> Result<Entry, &'static str> {
    let (event_type, timestamp) = head(event);
    let event_type = event_type.unwrap_or("\"\"");
    if event_type == "\"\"" {
        return Err("the event's field `event` is empty, and the `type` of a CloudEvent is not");
    }
    let mut rest = Object::with_room_for(event);
    rest.add_text("source", metadata.source.as_deref().unwrap_or_default());
    rest.add("type", event_type);
    if let Some(time) = timestamp.and_then(seconds) {
        rest.add_text("time", &rfc3339(time));
    }
    let mut rest = rest.end("data", event);
    // It follows another field.
    rest[0] = b',';
    let before_id = br#"{"specversion":"1.0","id":"#;
    Ok(match message_id.filter(|id| !id.is_empty()) {
        Some(id) => {
            let head = [before_id, json_text(id).as_bytes(), &rest].concat();
            Entry { head, behind_id: None }
        }
        None => Entry { head: before_id.to_vec(), behind_id: Some(rest) },
    })
}

/// An object that is written field by field; the last one is the event.
struct Object(Vec<u8>);

impl Object {
    fn with_room_for(event: &[u8]) -> Self {
        let mut bytes = Vec::with_capacity(event.len() + 256);
        bytes.push(b'{');
        Self(bytes)
    }

    fn add(&mut self, name: &str, json: &str) {
        for part in ["\"", name, "\":", json, ","] {
            self.0.extend_from_slice(part.as_bytes());
        }
    }

    fn add_text(&mut self, name: &str, text: &str) {
        self.add(name, &json_text(text));
    }

    fn end(mut self, name: &str, event: &[u8]) -> Vec<u8> {
        for part in [b"\"", name.as_bytes(), b"\":", event, b"}"] {
            self.0.extend_from_slice(part);
        }
        self.0
    }
}

fn json_text(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// The last fields `event` and `timestamp` as they are written.
fn head(event: &[u8]) -> (Option<&str>, Option<&str>) {
    let (mut event_type, mut timestamp) = (None, None);
    let parts = std::str::from_utf8(event).ok().and_then(Parts::of);
    for part in parts.into_iter().flatten() {
        match part {
            Ok(Part { key: Some(key), value }) if key.is("event") => event_type = Some(value),
            Ok(Part { key: Some(key), value }) if key.is("timestamp") => timestamp = Some(value),
            Ok(_) => {}
            Err(_) => return (None, None),
        }
    }
    (event_type, timestamp)
}

/// A number of Unix seconds that can be meant as one.
fn seconds(json: &str) -> Option<f64> {
    // Rust reads more than JSON's numbers, such as `inf`, but JSON's texts begin with a `"`.
    let seconds: f64 = json.parse().ok()?;
    (0.0..=LAST_SECOND).contains(&seconds).then_some(seconds)
}

fn rfc3339(seconds: f64) -> String {
    let at = SystemTime::UNIX_EPOCH + Duration::from_secs_f64(seconds);
    if seconds.fract() == 0.0 { clock::rfc3339_seconds(at) } else { clock::rfc3339(at) }
}

/// The line about an event, as the inside of a JSON string: who, what, on what, when.
fn line(event: &[u8]) -> Vec<u8> {
    let Details { timestamp, actor, resource, description } = Details::of(event);
    let event_type = head(event).0.and_then(|json| string(json)?.ok());
    let name = |party: &Party| party.name.clone().or_else(|| party.id.clone());
    let mut line = name(&actor).map_or_else(String::new, |actor| format!("{actor}: "));
    let mut what = [description.map(Cow::Owned), event_type].into_iter().flatten();
    line.push_str(what.find(|text| !text.is_empty()).as_deref().unwrap_or("an event"));
    if let Some(resource) = name(&resource) {
        line.push_str(&format!(" [{resource}]"));
    }
    if let Some(time) = timestamp {
        let text = seconds(&time).map_or_else(|| time.clone(), rfc3339);
        line.push_str(&format!(" ({text})"));
    }
    let json = json_text(&inert(&line));
    json.trim_start_matches('"').strip_suffix('"').unwrap_or_default().as_bytes().to_vec()
}

/// A stranger's text without effect in a chat: one line in reading order, which mentions nobody, and
/// has no link with another text or image (`[text](…)`) and no block of code.
fn inert(text: &str) -> String {
    let mut inert = String::with_capacity(text.len() + 16);
    let mut before = ' ';
    for c in text.chars() {
        match (c, before) {
            ('(', ']') | ('`', '`') => inert.push(ZERO_WIDTH_SPACE),
            _ => {}
        }
        match c {
            '&' => inert.push_str("&amp;"),
            '<' => inert.push_str("&lt;"),
            '>' => inert.push_str("&gt;"),
            _ if c.is_control() || is_layout(c) => inert.push(' '),
            '@' if !before.is_ascii_alphanumeric() => {
                inert.push('@');
                inert.push(ZERO_WIDTH_SPACE);
            }
            _ => inert.push(c),
        }
        before = c;
    }
    inert
}

/// Characters that break lines, or change the order in which what follows is read (Unicode Standard
/// Annex 9).
const fn is_layout(c: char) -> bool {
    matches!(c, '\u{200e}' | '\u{200f}' | '\u{61c}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    const ID: &str = "msg_0123456789abcdef0123456789abcdef";

    fn metadata() -> Metadata {
        let text = |text: &str| Some(text.to_owned());
        Metadata { source: text("a \"b\""), sourcetype: text("audit"), index: text("main") }
    }

    /// The body of events with their message ids, and its longest length by the entries' own.
    fn made(
        format: Format,
        metadata: &Metadata,
        events: &[(&str, Option<&str>)],
    ) -> (Vec<u8>, usize) {
        let entry = |(event, id): &(&str, Option<&str>)| {
            of(format, metadata, event.as_bytes(), *id).expect("has one")
        };
        let entries: Vec<Option<Entry>> = events.iter().map(entry).collect();
        let both = events.iter().map(|(event, _)| event.as_bytes()).zip(&entries);
        let bytes = both.clone().map(|(e, entry)| entry.as_ref().map_or(e.len(), Entry::max_len));
        let bytes = bytes.sum();
        let parts = both.map(|(event, entry)| (event, entry.as_ref()));
        (body(format, (ID, 0), parts, bytes), format.body_len(events.len(), bytes))
    }

    fn text(format: Format, metadata: &Metadata, events: &[(&str, Option<&str>)]) -> String {
        String::from_utf8(made(format, metadata, events).0).expect("UTF-8")
    }

    #[test]
    fn an_event_for_splunk_keeps_its_bytes_beside_its_time_and_what_is_configured() {
        let hec = |event: &str| text(Format::SplunkHec, &Metadata::default(), &[(event, None)]);
        let odd = "{ \"event\":\n\"a\", \"n\":1e400 }";
        assert_eq!(hec(odd), format!("{{\"event\":{odd}}}"));
        for (timestamp, is_time) in [
            ("0", true),
            ("1735830138", true),
            ("1735830138.25", true),
            ("1.7e9", true),
            ("4102444799", true),
            ("4102444800", false),
            ("1735830138000", false),
            ("-1", false),
            ("1e400", false),
            ("\"1735830138\"", false),
            ("null", false),
            ("[1]", false),
        ] {
            let event = format!("{{\"timestamp\":7,\"event\":\"a\",\"timestamp\":{timestamp}}}");
            let time = if is_time { format!("\"time\":{timestamp},") } else { String::new() };
            assert_eq!(hec(&event), format!("{{{time}\"event\":{event}}}"));
        }
        let all = text(Format::SplunkHec, &metadata(), &[("{\"event\":\"a\"}", None); 2]);
        let one =
            r#"{"source":"a \"b\"","sourcetype":"audit","index":"main","event":{"event":"a"}}"#;
        assert_eq!(all, [one, one].concat());
    }

    #[test]
    fn a_cloud_event_has_the_producers_id_or_its_place_in_the_first_batch() {
        let events = [
            (r#"{"event":"a\n","timestamp":1735830138}"#, Some("id \"1\"")),
            (r#"{"event":"b","timestamp":1735830138.5}"#, None),
            (r#"{"event":"c","timestamp":"now"}"#, Some("")),
        ];
        let text = text(Format::CloudEventsBatch, &metadata(), &events);
        let batch: Value = serde_json::from_str(&text).expect("JSON");
        let expected = |n: usize, id: &str, event_type: &str, time: Value| {
            let data: Value = serde_json::from_str(events[n].0).expect("JSON");
            let mut expected = json!({
                "specversion": "1.0", "id": id, "source": "a \"b\"", "type": event_type, "time": time, "data": data,
            });
            if time.is_null() {
                expected.as_object_mut().expect("an object").remove("time");
            }
            expected
        };
        assert_eq!(
            batch,
            json!([
                expected(0, "id \"1\"", "a\n", "2025-01-02T15:02:18Z".into()),
                expected(1, &format!("{ID}.2"), "b", "2025-01-02T15:02:18.500Z".into()),
                expected(2, &format!("{ID}.3"), "c", Value::Null),
            ])
        );
        assert!(text.contains(r#""type":"a\n""#) && text.contains(events[0].0));
    }

    #[test]
    fn a_line_for_people_says_who_did_what_and_drives_nothing() {
        let line = |event: &str| {
            let text = text(Format::Slack, &Metadata::default(), &[(event, None)]);
            let body: Value = serde_json::from_str(&text).expect("JSON");
            body["text"].as_str().expect("a text").to_owned()
        };
        for (event, expected) in [
            (
                r#"{"event":"report.shared","actor":{"id":"7","name":"Ada"},"description":"shared a report","resource":{"id":"r/1"},"timestamp":1735830138}"#,
                "Ada: shared a report [r/1] (2025-01-02T15:02:18Z)",
            ),
            (r#"{"event":"report.shared"}"#, "report.shared"),
            (r#"{"event":"a","description":""}"#, "a"),
            (r#"{"event":"","timestamp":"noon"}"#, "an event (noon)"),
            (
                r#"{"event":"a","actor":"<!channel>","description":"@here & @\u2028@all\n<https://e.example|x>"}"#,
                "&lt;!channel&gt;: @\u{200b}here &amp; @\u{200b} @\u{200b}all &lt;https://e.example|x&gt;",
            ),
            (r#"{"event":"a","description":"ada@example.com"}"#, "ada@example.com"),
            (
                r#"{"event":"a","description":"\u00e9@all [x](y) ```z \u202eb"}"#,
                "\u{e9}@\u{200b}all [x]\u{200b}(y) `\u{200b}`\u{200b}`z  b",
            ),
            (r#"{"event":"a","description":"\"\"\"\\n"}"#, "\"\"\"\\n"),
        ] {
            assert_eq!(line(event), expected);
        }
        let two = [(r#"{"event":"a"}"#, None), (r#"{"event":"b"}"#, None)];
        assert_eq!(text(Format::Slack, &Metadata::default(), &two), r#"{"text":"a\nb"}"#);
    }

    fn event_type_is_empty(event: &str) -> bool {
        let event: Value = serde_json::from_str(event).expect("JSON");
        event["event"] == ""
    }

    fn event() -> impl Strategy<Value = String> {
        let timestamp = prop_oneof![Just(None), any::<u32>().prop_map(Some)];
        ("\\PC{0,12}", "\\PC{0,12}", timestamp, any::<bool>()).prop_map(|(kind, s, t, pretty)| {
            let value = json!({ "event": kind, "timestamp": t, "description": s, "data": [{ "event": s }] });
            if pretty { serde_json::to_string_pretty(&value) } else { serde_json::to_string(&value) }
                .expect("prints")
        })
    }

    proptest! {
        #[test]
        fn the_events_of_a_body_are_found_again_with_each_byte(
            events in proptest::collection::vec((event(), proptest::option::of("\\PC{0,8}")), 1..8)
        ) {
            for format in Format::ALL {
                let most = format.most_events().unwrap_or(events.len());
                let events: Vec<(&str, Option<&str>)> =
                    events.iter().take(most).map(|(event, id)| (&**event, id.as_deref())).collect();
                let nameless = events.iter().any(|(event, _)| event_type_is_empty(event));
                if format == Format::CloudEventsBatch && nameless {
                    continue;
                }
                let (body, longest) = made(format, &metadata(), &events);
                let entries = format.entries(&body).expect("made by splice");
                prop_assert_eq!(entries.len(), events.len());
                prop_assert_eq!(format.first_entry(&body), entries.first().copied());
                prop_assert!(body.len() <= longest);
                for (entry, (event, _)) in entries.into_iter().zip(events) {
                    match (format, event_in(format, entry)) {
                        (Format::Slack, found) => prop_assert_eq!(found, None),
                        (Format::JsonLines, found) => prop_assert!(found.is_some()),
                        (_, found) => prop_assert_eq!(found, Some(event.as_bytes())),
                    }
                }
            }
        }
    }
}

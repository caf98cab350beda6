//! The definition of an audit event.
//!
//! An event is delivered with the bytes that it was published with, so they are checked without
//! building a value: numbers such as 2^64-1 or 1e400 and escapes keep their spelling, because
//! nothing parses and prints them.

pub mod audience;
mod check;
pub mod condition;
pub mod details;
pub mod entry;
mod fields;
pub mod inflate;
mod key;
pub mod matcher;
mod pattern;
pub mod payload;
mod pointer;
pub mod redaction;
mod scan;
mod tenant;

pub use self::{
    key::Key,
    pattern::{MAX_TYPE_LEN, Pattern},
    pointer::Pointer,
    tenant::{MAX_TENANT, NotATenant, Tenant, TenantPlace},
};

use std::{borrow::Cow, fmt, ops::Range};

use serde::de::{Deserializer as _, IgnoredAny};
use serde_json::value::RawValue;

use self::fields::{HasKey, HeadFields};

/// The deepest nesting of objects and arrays in an event, in levels.
///
/// Receivers parse recursively; common parsers stop at depths between 100 and 1,000.
pub const MAX_DEPTH: usize = 128;

/// The reason why a message body is not an event. Its text is a whole sentence, which an operator
/// reads in the dead letter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum InvalidEvent {
    Empty,
    ByteOrderMark,
    NotUtf8 { at: usize },
    TooDeep,
    NotAnObject,
    NotJson(String),
    TypeMissing,
    TypeNotAString,
    TypeTooLong(usize),
}

impl fmt::Display for InvalidEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Empty => f.write_str("the event is empty"),
            Self::ByteOrderMark => {
                f.write_str("the event begins with a byte-order mark, which JSON does not allow")
            }
            Self::NotUtf8 { at } => write!(f, "the event is not UTF-8 at byte {at}"),
            Self::TooDeep => write!(f, "the event nests deeper than {MAX_DEPTH} levels"),
            Self::NotAnObject => f.write_str("the event is JSON but not an object"),
            Self::NotJson(why) => write!(f, "the event is not JSON: {why}"),
            Self::TypeMissing => f.write_str("the event has no field `event`"),
            Self::TypeNotAString => f.write_str("the event's field `event` is not a string"),
            Self::TypeTooLong(len) => {
                write!(
                    f,
                    "the event's field `event` has {len} bytes, more than the {MAX_TYPE_LEN} of a routing key"
                )
            }
        }
    }
}

impl std::error::Error for InvalidEvent {}

/// The fields of an event that delivery needs.
#[derive(Debug, PartialEq, Eq)]
pub struct Head<'e> {
    /// The type: the string field `event`.
    pub event_type: Cow<'e, str>,
    /// The time: the field `timestamp` in Unix seconds, if it is a whole number.
    pub timestamp: Option<u64>,
}

/// Checks that `body` is one event and returns its type.
///
/// # Errors
/// Those of [`head`].
pub fn event_type(body: &[u8]) -> Result<Cow<'_, str>, InvalidEvent> {
    head(body).map(|head| head.event_type)
}

/// Checks that `body` is one event.
///
/// If several fields have one name, the last one counts, as for common parsers.
///
/// # Errors
/// The first mistake.
pub fn head(body: &[u8]) -> Result<Head<'_>, InvalidEvent> {
    if body.starts_with(b"\xef\xbb\xbf") {
        return Err(InvalidEvent::ByteOrderMark);
    }
    let text =
        std::str::from_utf8(body).map_err(|e| InvalidEvent::NotUtf8 { at: e.valid_up_to() })?;
    if let Some(check::Found { event_type, timestamp }) = check::fields(text) {
        return read_head(event_type, timestamp);
    }
    match text.trim_start_matches([' ', '\t', '\r', '\n']).as_bytes().first() {
        None => return Err(InvalidEvent::Empty),
        Some(b'{') if deeper_than(body, MAX_DEPTH) => return Err(InvalidEvent::TooDeep),
        Some(b'{') => {}
        Some(_) => {
            return Err(match serde_json::from_str::<IgnoredAny>(text) {
                Ok(_) => InvalidEvent::NotAnObject,
                Err(e) => InvalidEvent::NotJson(e.to_string()),
            });
        }
    }
    let mut json = serde_json::Deserializer::from_str(text);
    let found = json.deserialize_map(HeadFields).and_then(|found| json.end().map(|()| found));
    let (event_type, timestamp) = found.map_err(|e| InvalidEvent::NotJson(e.to_string()))?;
    read_head(event_type.map(RawValue::get), timestamp.map(RawValue::get))
}

/// Reads the fields as they are written.
fn read_head<'e>(
    event_type: Option<&'e str>,
    timestamp: Option<&str>,
) -> Result<Head<'e>, InvalidEvent> {
    let event_type = event_type.ok_or(InvalidEvent::TypeMissing)?;
    let event_type = key::string(event_type).ok_or(InvalidEvent::TypeNotAString)?;
    let event_type = event_type
        .map_err(|e| InvalidEvent::NotJson(format!("its field `event`, read alone: {e}")))?;
    match event_type.len() {
        len if len > MAX_TYPE_LEN => Err(InvalidEvent::TypeTooLong(len)),
        _ => Ok(Head { event_type, timestamp: timestamp.and_then(|t| t.parse().ok()) }),
    }
}

/// The field that [`with_id`] adds.
const ID_FIELD: &str = "event_id";
const ID_FIELDS: &[&str] = &[ID_FIELD];

/// An event with a field that was not published.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WithId {
    pub body: Vec<u8>,
    /// The bytes of the field; without them the body is as it was published.
    pub added: Range<usize>,
}

/// Appends a field `event_id` with `id`; `None` if the event has a field of that name, or is no
/// event. All other bytes stay as they are.
pub fn with_id(body: &[u8], id: &str) -> Option<WithId> {
    let text = std::str::from_utf8(body).ok()?;
    let has_id =
        serde_json::Deserializer::from_str(text).deserialize_map(HasKey(ID_FIELDS)).ok()?;
    let end = text.rfind('}').filter(|_| !has_id)?;
    let id = serde_json::Value::from(id).to_string();
    let body = [&text[..end], ",\"", ID_FIELD, "\":", &id, &text[end..]].concat().into_bytes();
    let added = end..end + body.len() - text.len();
    Some(WithId { body, added })
}

/// Whether brackets outside strings nest deeper than `limit`. Exact for valid JSON; the parser
/// refuses everything else anyway.
fn deeper_than(body: &[u8], limit: usize) -> bool {
    // Mostly there are not that many, and to count them is quick.
    if body.iter().filter(|b| matches!(b, b'{' | b'[')).count() <= limit {
        return false;
    }
    let (mut depth, mut in_string, mut escaped) = (0_usize, false, false);
    for &b in body {
        if in_string {
            match b {
                _ if escaped => escaped = false,
                b'\\' => escaped = true,
                b'"' => in_string = false,
                _ => {}
            }
            continue;
        }
        match b {
            b'"' => in_string = true,
            b'{' | b'[' => {
                depth += 1;
                if depth > limit {
                    return true;
                }
            }
            b'}' | b']' => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn nested(depth: usize) -> String {
        // The outer object counts as the first level.
        format!(r#"{{"event":"a","x":{}{}}}"#, "[".repeat(depth - 1), "]".repeat(depth - 1))
    }

    #[test]
    fn an_object_with_a_string_event_is_an_event_whatever_else_it_holds() {
        for (body, expected) in [
            (r#"{"event":"a.b"}"#, "a.b"),
            (" \t\r\n{\"event\":\"a\"}\n", "a"),
            (r#"{"n":18446744073709551615,"m":1e400,"event":"a"}"#, "a"),
            (r#"{"event":1,"event":"last"}"#, "last"),
            (
                r#"{"event":1e400,"event":"\ud800","event":{"\ud800":1},"event":"last of what only others can read"}"#,
                "last of what only others can read",
            ),
            (r#"{"\u0065vent":"escaped key"}"#, "escaped key"),
            (r#"{"event":"\u00e9\n"}"#, "\u{e9}\n"),
            (r#"{"event":"a","s":"\ud800"}"#, "a"),
            (r#"{"\ud800":1,"event":"a","\udc00\ud800x":{"\ud800":1}}"#, "a"),
            (
                r#"{"x":"[[[{{{\"","event":"brackets in strings do not nest"}"#,
                "brackets in strings do not nest",
            ),
        ] {
            assert_eq!(event_type(body.as_bytes()).as_deref(), Ok(expected), "{body}");
        }
        assert!(event_type(nested(MAX_DEPTH).as_bytes()).is_ok());
    }

    #[test]
    fn everything_else_is_refused_with_its_reason() {
        for (body, reason) in [
            (&b""[..], "the event is empty"),
            (b"  \n", "empty"),
            (b"\xef\xbb\xbf{\"event\":\"a\"}", "byte-order mark"),
            (b"{\"event\":\"\xff\"}", "UTF-8 at byte 10"),
            (b"not json", "not JSON"),
            (b"[1]", "not an object"),
            (b"\"event\"", "not an object"),
            (b"NaN", "not JSON"),
            (b"{\"event\":\"a\",\"x\":NaN}", "not JSON"),
            (b"{\"event\":\"a\"} {\"event\":\"b\"}", "not JSON"),
            (b"{\"event\":\"a\",}", "not JSON"),
            (b"{\"event\":\"a\n\"}", "not JSON"),
            (b"{\"event\":\"a\",\"\n\":1}", "not JSON"),
            (b"{\"event\":\"a\",\"\\ud80x\":1}", "not JSON"),
            (b"{\"event\":\"a\",\"\\x\":1}", "not JSON"),
            (b"{\"x\":1}", "no field `event`"),
            (b"{\"event\":null}", "not a string"),
            (b"{\"event\":1e400}", "not a string"),
            (b"{\"event\":\"\\ud800\"}", "field `event`, read alone: unexpected end of hex escape"),
            (b"{\"event\":{\"a\":[1]}}", "not a string"),
            (b"{\"event\":[\"a\"]}", "not a string"),
            (b"{\"event\":\"first\",\"event\":2}", "not a string"),
        ] {
            let why = event_type(body).expect_err("must be refused").to_string();
            assert!(
                why.starts_with("the event") && why.contains(reason),
                "{}: {why}",
                String::from_utf8_lossy(body)
            );
        }
        assert_eq!(event_type(nested(MAX_DEPTH + 1).as_bytes()), Err(InvalidEvent::TooDeep));
        assert_eq!(event_type(nested(100_000).as_bytes()), Err(InvalidEvent::TooDeep));
        let long = format!(r#"{{"event":"{}"}}"#, "x".repeat(256));
        assert_eq!(event_type(long.as_bytes()), Err(InvalidEvent::TypeTooLong(256)));
    }

    #[test]
    fn the_time_of_an_event_is_its_last_timestamp_if_that_is_whole_seconds() {
        for (body, expected) in [
            (r#"{"event":"a","timestamp":1733739084}"#, Some(1_733_739_084)),
            (r#"{"timestamp":1,"event":"a","tim\u0065stamp": 2 }"#, Some(2)),
            (r#"{"event":"a","timestamp":1,"timestamp":"soon"}"#, None),
            (r#"{"event":"a","timestamp":1e400}"#, None),
            (r#"{"event":"a","timestamp":-1,"x":{"timestamp":3}}"#, None),
            (r#"{"event":"a","timestamp":[{"timestamp":4}]}"#, None),
            (r#"{"event":"a"}"#, None),
        ] {
            assert_eq!(head(body.as_bytes()).expect("an event").timestamp, expected, "{body}");
        }
        assert!(head(br#"{"event":"a","timestamp":}"#).is_err());
    }

    #[test]
    fn an_event_without_an_id_gets_one_and_keeps_its_bytes() {
        for (body, expected) in [
            (r#"{"event":"a"}"#, Some(r#"{"event":"a","event_id":"x\"\\é"}"#)),
            (
                "{ \"event\" : \"a\" ,\n\"n\":1e400 }\n",
                Some("{ \"event\" : \"a\" ,\n\"n\":1e400 ,\"event_id\":\"x\\\"\\\\é\"}\n"),
            ),
            (
                r#"{"event":"a","x":{"event_id":1},"s":"}"}"#,
                Some(r#"{"event":"a","x":{"event_id":1},"s":"}","event_id":"x\"\\é"}"#),
            ),
            (r#"{"event_id":null,"event":"a"}"#, None),
            (r#"{"event":"a","\u0065vent_id":"has one"}"#, None),
            (
                r#"{"event":"a","\ud800":"\ud800"}"#,
                Some(r#"{"event":"a","\ud800":"\ud800","event_id":"x\"\\é"}"#),
            ),
        ] {
            let found = with_id(body.as_bytes(), "x\"\\é")
                .map(|e| String::from_utf8(e.body).expect("utf-8"));
            assert_eq!(found.as_deref(), expected, "{body}");
        }
    }

    proptest! {
        #[test]
        fn agrees_with_a_parser_on_what_is_an_event(body in "\\PC{0,40}|[{}\\[\\]\",:a-e\\\\ 0-9]{0,40}") {
            let parsed = serde_json::from_str::<serde_json::Value>(&body).ok();
            let expected = parsed.as_ref().and_then(|v| v.get("event")).and_then(|v| v.as_str());
            let found = event_type(body.as_bytes()).ok();
            prop_assert_eq!(found.as_deref(), expected);
        }
    }
}

//! JSON as a plain parser reads it.

use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;

use crate::event::{MAX_DEPTH, MAX_TYPE_LEN};

/// Separates the parts of an input. It occurs in no JSON, and a text file can contain it.
pub(super) const SEPARATOR: u8 = 0x1e;

pub(super) const WHITE_SPACE: [char; 4] = [' ', '\t', '\r', '\n'];

/// The fields of a JSON object in their order, as serde_json parses them.
pub(super) struct Fields<'a>(pub(super) Vec<(String, &'a RawValue)>);

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
            // A key with half of a surrogate pair stays as written; no such name is searched for.
            self.0.push((
                serde_json::from_str(key.get()).unwrap_or_else(|_| key.get().to_owned()),
                value,
            ));
        }
        Ok(self)
    }
}

impl<'a> Fields<'a> {
    pub(super) fn of(json: &'a [u8]) -> Option<Self> {
        serde_json::from_slice(json).ok()
    }

    pub(super) fn last(&self, name: &str) -> Option<&'a str> {
        self.0.iter().rev().find(|(n, _)| n == name).map(|(_, value)| value.get())
    }
}

/// The values in an object or array.
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

/// A key with any escapes.
struct RawKey;

impl<'de> Deserialize<'de> for RawKey {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        <&RawValue>::deserialize(d).map(|_| Self)
    }
}

/// The depth of a JSON value, counted level by level.
fn depth(json: &str) -> usize {
    let brackets = json.bytes().filter(|b| matches!(b, b'{' | b'[')).count();
    if brackets <= MAX_DEPTH {
        return brackets; // an upper bound, which is enough below the limit
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

/// Type and time of an event as a plain parser reads them.
pub(super) fn plain_head(bytes: &[u8]) -> Option<(String, Option<u64>)> {
    let fields = Fields::of(bytes)?;
    let event_type: String = serde_json::from_str(fields.last("event")?).ok()?;
    let text = std::str::from_utf8(bytes).ok()?;
    let timestamp = fields.last("timestamp").and_then(|t| serde_json::from_str(t).ok());
    (event_type.len() <= MAX_TYPE_LEN && depth(text) <= MAX_DEPTH)
        .then_some((event_type, timestamp))
}

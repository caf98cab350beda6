//! The fields of an event that people look for.

use std::{borrow::Cow, fmt};

use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::value::RawValue;

/// Bytes of a field that are kept.
pub const MAX_FIELD: usize = 1024;

/// The fields of an event that people look for, as far as it has them. An event is a stranger's: a
/// field of another type is kept as its JSON text.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Details {
    pub timestamp: Option<String>,
    pub actor: Party,
    pub resource: Party,
    pub description: Option<String>,
}

/// An actor or a resource.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Party {
    pub id: Option<String>,
    pub kind: Option<String>,
    pub name: Option<String>,
}

impl Details {
    /// The details of an event; none of a body that is no JSON object.
    pub fn of(body: &[u8]) -> Self {
        let Ok(text) = std::str::from_utf8(body) else { return Self::default() };
        let mut json = serde_json::Deserializer::from_str(text);
        json.deserialize_map(DetailFields).unwrap_or_default()
    }
}

struct DetailFields;

impl<'de> Visitor<'de> for DetailFields {
    type Value = Details;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Details, A::Error> {
        let mut found = Details::default();
        while let Some(key) = map.next_key::<Key<'_>>()? {
            let Key(key) = key;
            // The last field of a name counts, as for common parsers.
            match &*key {
                "timestamp" => found.timestamp = text(map.next_value()?),
                "description" => found.description = text(map.next_value()?),
                "actor" => found.actor = Party::of(map.next_value()?),
                "resource" => found.resource = Party::of(map.next_value()?),
                _ => drop(map.next_value::<IgnoredAny>()?),
            }
        }
        Ok(found)
    }
}

impl Party {
    /// The party of an object; a value of another type is its name.
    fn of(json: &RawValue) -> Self {
        if !json.get().starts_with('{') {
            return Self { name: text(json), ..Self::default() };
        }
        serde_json::Deserializer::from_str(json.get())
            .deserialize_map(PartyFields)
            .unwrap_or_default()
    }
}

struct PartyFields;

impl<'de> Visitor<'de> for PartyFields {
    type Value = Party;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Party, A::Error> {
        let mut found = Party::default();
        while let Some(key) = map.next_key::<Key<'_>>()? {
            let Key(key) = key;
            match &*key {
                "id" => found.id = text(map.next_value()?),
                "type" => found.kind = text(map.next_value()?),
                "name" => found.name = text(map.next_value()?),
                _ => drop(map.next_value::<IgnoredAny>()?),
            }
        }
        Ok(found)
    }
}

/// A field's name, borrowed unless it has escapes.
struct Key<'k>(Cow<'k, str>);

impl<'de: 'k, 'k> Deserialize<'de> for Key<'k> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Borrowed;
        impl<'de> Visitor<'de> for Borrowed {
            type Value = Cow<'de, str>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a field's name")
            }

            fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Self::Value, E> {
                Ok(Cow::Borrowed(text))
            }

            fn visit_str<E>(self, text: &str) -> Result<Self::Value, E> {
                Ok(Cow::Owned(text.to_owned()))
            }
        }
        from.deserialize_str(Borrowed).map(Self)
    }
}

/// A string's text, or another value's JSON; `None` for null. At most [`MAX_FIELD`] bytes.
fn text(json: &RawValue) -> Option<String> {
    let json = json.get();
    if json == "null" {
        return None;
    }
    let plain = json.strip_prefix('"').and_then(|rest| rest.strip_suffix('"'));
    let text: Cow<'_, str> = match plain {
        Some(text) if !text.contains('\\') => Cow::Borrowed(text),
        // An escaped lone surrogate has no text; its spelling is shown instead.
        Some(_) => serde_json::from_str(json).unwrap_or(Cow::Borrowed(json)),
        None => Cow::Borrowed(json),
    };
    Some(text[..text.floor_char_boundary(MAX_FIELD)].to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn party(id: &str, kind: &str, name: &str) -> Party {
        let some = |text: &str| (!text.is_empty()).then(|| text.to_owned());
        Party { id: some(id), kind: some(kind), name: some(name) }
    }

    #[test]
    fn fields_are_found_whatever_their_types() {
        let details = |json: &str| Details::of(json.as_bytes());
        let usual = details(
            r#"{"event":"a","timestamp":1735830138,"actor":{"id":7,"type":"user","name":"A\u0064a"},
                "resource":{"id":"r/1","name":"Report"},"description":"shared \"it\"","changes":{"id":1}}"#,
        );
        assert_eq!(usual.timestamp.as_deref(), Some("1735830138"));
        assert_eq!(usual.actor, party("7", "user", "Ada"));
        assert_eq!(usual.resource, party("r/1", "", "Report"));
        assert_eq!(usual.description.as_deref(), Some("shared \"it\""));
        assert_eq!(details(r#"{"actor":"root"}"#).actor, party("", "", "root"));
        assert_eq!(details(r#"{"actor":[1,"x"]}"#).actor, party("", "", r#"[1,"x"]"#));
        assert_eq!(details(r#"{"actor":{"id":{"a":1}}}"#).actor, party(r#"{"a":1}"#, "", ""));
        assert_eq!(details(r#"{"timestamp":1.5e300}"#).timestamp.as_deref(), Some("1.5e300"));
        assert_eq!(details(r#"{"actor":null,"description":null}"#), Details::default());
        assert_eq!(
            details(r#"{"actor":"a","actor":{"id":"b"}}"#).actor,
            party("b", "", ""),
            "the last one counts"
        );
        for none in ["", "[]", "{", "7", "\u{feff}{}", "{\"actor\":}"] {
            assert_eq!(details(none), Details::default(), "{none}");
        }
        assert_eq!(Details::of(b"{\"description\":\"\xff\"}"), Details::default());
        let long = details(&format!(r#"{{"description":"{}"}}"#, "ä".repeat(2000)));
        assert_eq!(long.description.map(|d| d.len()), Some(MAX_FIELD));
        assert_eq!(
            details(r#"{"description":"\ud800"}"#).description.as_deref(),
            Some(r#""\ud800""#)
        );
    }
}

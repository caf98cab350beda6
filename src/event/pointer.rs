//! JSON Pointer (RFC 6901): a place in an event.

use std::fmt;

use serde::de::{Deserializer as _, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;

use super::{
    key::Key,
    scan::{Part, Parts},
};

/// A place in a JSON document, such as `/actor/id`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pointer {
    text: String,
    /// The names and indexes on the way, unescaped.
    steps: Vec<String>,
}

impl Pointer {
    /// # Errors
    /// Says what is wrong with the text, as the end of a sentence that begins with it.
    pub fn try_new(text: &str) -> Result<Self, &'static str> {
        let Some(path) = text.strip_prefix('/') else {
            return Err("must begin with `/`, such as \"/account_id\"");
        };
        // After each `~` comes what it stands for.
        let is_escaped = |step: &str| {
            step.split('~').skip(1).all(|rest| rest.starts_with('0') || rest.starts_with('1'))
        };
        let mut steps = Vec::new();
        for step in path.split('/') {
            if !is_escaped(step) {
                return Err("has a `~` that is neither `~0`, for `~`, nor `~1`, for `/`");
            }
            // In this order, or `~01` would become `/`.
            steps.push(step.replace("~1", "/").replace("~0", "~"));
        }
        Ok(Self { text: text.to_owned(), steps })
    }

    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// The names and indexes on the way, unescaped.
    pub(super) fn steps(&self) -> &[String] {
        &self.steps
    }

    /// The JSON text at this place; `None` if the document has none. Of several fields of one name
    /// the last one counts, as for common parsers.
    pub fn find<'e>(&self, document: &'e str) -> Option<&'e str> {
        self.steps.iter().try_fold(document, |json, step| {
            let mut parser = serde_json::Deserializer::from_str(json);
            let found = parser.deserialize_any(Step(step)).ok()?;
            found.map(RawValue::get)
        })
    }
}

impl Pointer {
    /// As [`find`](Self::find), in a document that was checked.
    pub(super) fn find_checked<'e>(&self, document: &'e str) -> Option<&'e str> {
        self.steps.iter().try_fold(document, |json, step| {
            let (step, mut found) = (Step(step), None);
            let index = step.index();
            for (n, part) in Parts::of(json)?.enumerate() {
                let Part { key, value } = part.ok()?;
                if key.map_or(Some(n) == index, |key| key.is(step.0)) {
                    found = Some(value);
                }
            }
            found
        })
    }
}

impl fmt::Display for Pointer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// Visits an object or an array, and keeps what this name or index has.
struct Step<'s>(&'s str);

impl Step<'_> {
    /// The index that it means; one with a zero before it is none.
    fn index(&self) -> Option<usize> {
        let is_index = self.0 == "0" || !self.0.starts_with(['0', '+']);
        self.0.parse().ok().filter(|_| is_index)
    }
}

impl<'de> Visitor<'de> for Step<'_> {
    type Value = Option<&'de RawValue>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object or an array")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut found = None;
        while let Some(key) = map.next_key::<Key<'_>>()? {
            if key.is(self.0) {
                found = Some(map.next_value()?);
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        Ok(found)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
        let (mut found, index) = (None, self.index());
        let mut at = 0;
        while let Some(element) = seq.next_element::<&RawValue>()? {
            if Some(at) == index {
                found = Some(element);
            }
            at += 1;
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;

    fn found<'e>(pointer: &str, document: &'e str) -> Option<&'e str> {
        Pointer::try_new(pointer).expect("a pointer").find(document)
    }

    #[test]
    fn a_place_is_found_by_names_and_indexes_and_keeps_its_spelling() {
        let document = r#"{"a":1e400,"b":{"c":[10,{"d":"\u0041"}]},"":{"":0},"m~n":8,"a/b":1,"\u0065":"e","01":[7],"x":1,"x":2,"\ud800":3}"#;
        for (pointer, expected) in [
            ("/a", Some("1e400")),
            ("/b/c/0", Some("10")),
            ("/b/c/1/d", Some(r#""\u0041""#)),
            ("/b/c/2", None),
            ("/b/c/-", None),
            ("/b/c/00", None),
            ("/b/c/+1", None),
            ("/b/c/-1", None),
            ("/b/c/18446744073709551616", None),
            ("/", Some("{\"\":0}")),
            ("//", Some("0")),
            ("/m~0n", Some("8")),
            ("/a~1b", Some("1")),
            ("/e", Some("\"e\"")),
            ("/01/0", Some("7")),
            ("/x", Some("2")),
            ("/a/b", None),
            ("/e/0", None),
            ("/nothing", None),
        ] {
            assert_eq!(found(pointer, document), expected, "{pointer}");
        }
        assert_eq!(found("/~01", r#"{"~1":1,"/":2}"#), Some("1"));
        for none in ["", "[]", "7", "{", "not json", "null"] {
            assert_eq!(found("/a", none), None, "{none}");
        }
    }

    #[test]
    fn what_is_no_pointer_is_refused_with_what_is_wrong() {
        for (text, why) in [
            ("", "must begin with"),
            ("a", "must begin with"),
            ("#/a", "must begin with"),
            ("/~", "has a `~`"),
            ("/a~2", "has a `~`"),
            ("/~0~", "has a `~`"),
            ("/~~0", "has a `~`"),
        ] {
            let error = Pointer::try_new(text).expect_err("is none");
            assert!(error.starts_with(why), "{text}: {error}");
        }
    }

    proptest! {
        #[test]
        fn finds_what_a_parser_finds(
            steps in prop::collection::vec("[ab01~/]{0,2}", 1..4),
            document in r#"\{("(a|b|0|1)":(\{"(a|b|~|/)":[0-9]\}|\[[0-9],[0-9]\]|[0-9]),){0,4}"c":0\}"#,
        ) {
            let escaped = steps.iter().map(|s| s.replace('~', "~0").replace('/', "~1"));
            let pointer: String = escaped.map(|step| format!("/{step}")).collect();
            let parsed: Value = serde_json::from_str(&document).expect("is JSON");
            let expected = parsed.pointer(&pointer).map(Value::to_string);
            prop_assert_eq!(found(&pointer, &document), expected.as_deref());
        }
    }
}

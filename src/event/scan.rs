//! The parts of an object or an array, found by the structure of its text alone.
//!
//! An event is checked once, by a parser. What looks for values in it afterwards need not check it
//! again: quotes, brackets and commas say where each value ends, which is a few times quicker.

use std::fmt;

use super::key::Key;

/// The text is no JSON: a value does not end, or what is between two is neither.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Malformed;

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("it is no JSON")
    }
}

/// A value as it is written, and its key, if it is in an object.
pub(super) struct Part<'j> {
    pub(super) key: Option<Key<'j>>,
    pub(super) value: &'j str,
}

/// The parts of an object or an array, in their order. It ends with the first that is malformed.
pub(super) struct Parts<'j> {
    text: &'j str,
    at: usize,
    /// What closes it; `None` once it is closed.
    close: Option<u8>,
    is_first: bool,
}

impl<'j> Parts<'j> {
    /// `None` for another value.
    pub(super) fn of(text: &'j str) -> Option<Self> {
        let at = after_space(text.as_bytes(), 0);
        let close = match text.as_bytes().get(at)? {
            b'{' => b'}',
            b'[' => b']',
            _ => return None,
        };
        Some(Self { text, at: at + 1, close: Some(close), is_first: true })
    }

    fn part(&mut self, close: u8) -> Result<Option<Part<'j>>, Malformed> {
        let bytes = self.text.as_bytes();
        self.at = after_space(bytes, self.at);
        if self.byte() == Some(close) {
            return Ok(None);
        }
        if !std::mem::replace(&mut self.is_first, false) {
            self.pass(b',')?;
        }
        let key = if close == b'}' {
            let key = self.value()?;
            self.at = after_space(bytes, self.at);
            self.pass(b':')?;
            Some(Key::written(key).ok_or(Malformed)?)
        } else {
            None
        };
        Ok(Some(Part { key, value: self.value()? }))
    }

    fn byte(&self) -> Option<u8> {
        self.text.as_bytes().get(self.at).copied()
    }

    /// Passes this byte, and the white space behind it.
    fn pass(&mut self, byte: u8) -> Result<(), Malformed> {
        if self.byte() != Some(byte) {
            return Err(Malformed);
        }
        self.at = after_space(self.text.as_bytes(), self.at + 1);
        Ok(())
    }

    fn value(&mut self) -> Result<&'j str, Malformed> {
        let end = end_of(self.text.as_bytes(), self.at).ok_or(Malformed)?;
        let value = self.text.get(self.at..end).ok_or(Malformed)?;
        self.at = end;
        Ok(value)
    }
}

impl<'j> Iterator for Parts<'j> {
    type Item = Result<Part<'j>, Malformed>;

    fn next(&mut self) -> Option<Self::Item> {
        let part = self.part(self.close?);
        if !matches!(part, Ok(Some(_))) {
            self.close = None;
        }
        part.transpose()
    }
}

fn after_space(bytes: &[u8], from: usize) -> usize {
    let is_space = |b: &u8| matches!(b, b' ' | b'\t' | b'\n' | b'\r');
    from + bytes.get(from..).unwrap_or_default().iter().take_while(|b| is_space(b)).count()
}

/// The end of the value that begins here; `None` if it has none.
fn end_of(bytes: &[u8], from: usize) -> Option<usize> {
    match bytes.get(from)? {
        b'"' => end_of_text(bytes, from),
        b'{' | b'[' => end_of_nested(bytes, from),
        _ => {
            let ends =
                |b: &u8| matches!(b, b',' | b':' | b']' | b'}' | b' ' | b'\t' | b'\n' | b'\r');
            let len = bytes[from..].iter().take_while(|b| !ends(b)).count();
            (len > 0).then_some(from + len)
        }
    }
}

fn end_of_text(bytes: &[u8], from: usize) -> Option<usize> {
    let mut at = from + 1;
    loop {
        match bytes.get(at)? {
            b'"' => return Some(at + 1),
            b'\\' => at += 2,
            _ => at += 1,
        }
    }
}

fn end_of_nested(bytes: &[u8], from: usize) -> Option<usize> {
    let (mut at, mut depth) = (from, 0_usize);
    loop {
        match bytes.get(at)? {
            b'"' => {
                at = end_of_text(bytes, at)?;
                continue;
            }
            b'{' | b'[' => depth += 1,
            b'}' | b']' => depth -= 1,
            _ => {}
        }
        at += 1;
        if depth == 0 {
            return Some(at);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Map, Value, value::RawValue};

    use super::*;

    fn parts(text: &str) -> Option<Vec<(Option<String>, String)>> {
        let part = |part: Result<Part<'_>, Malformed>| {
            let Part { key, value } = part.ok()?;
            Some((key.map(|key| key.as_written().to_owned()), value.to_owned()))
        };
        Parts::of(text)?.map(part).collect()
    }

    #[test]
    fn parts_are_as_they_are_written() {
        let text = " {\n\"a\" : 1e400 ,\"b\\\"}\":\"]\\\\\",\"a\":{\"x\":[\"}\",{}]}, \"\":[] ,\"t\":true}";
        let expected = [
            ("\"a\"", "1e400"),
            ("\"b\\\"}\"", "\"]\\\\\""),
            ("\"a\"", "{\"x\":[\"}\",{}]}"),
            ("\"\"", "[]"),
            ("\"t\"", "true"),
        ];
        let expected = expected.map(|(key, value)| (Some(key.to_owned()), value.to_owned()));
        assert_eq!(parts(text), Some(expected.to_vec()));
        let elements =
            [(None, "1".to_owned()), (None, "[2, 3]".to_owned()), (None, "\"é\"".to_owned())];
        assert_eq!(parts("[1,[2, 3] ,\"é\"]"), Some(elements.to_vec()));
        assert_eq!(parts("{ }"), Some(Vec::new()));
        for neither in ["1", "\"{}\"", "", " "] {
            assert_eq!(parts(neither), None, "{neither}");
        }
    }

    #[test]
    fn what_is_no_json_is_an_error_and_no_panic() {
        for text in [
            "{",
            "{\"a\"",
            "{\"a\":",
            "{\"a\":1",
            "{\"a\" 1}",
            "{\"a\":1 \"b\":2}",
            "{\"a\":1,}",
            "{1:2}",
            "{a:1}",
            "{\"a\":\"",
            "{\"a\":\"\\",
            "{\"a\":[1}",
            "[1 2]",
            "[,]",
            "[1,]",
            "{\"é\\",
            "[\"\\é",
            "{:1}",
            "{\"a\"::1}",
        ] {
            let wrong = |part: Result<Part<'_>, Malformed>| part.is_err();
            assert!(Parts::of(text).expect("opens").any(wrong), "{text}");
        }
    }

    fn value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            any::<i32>().prop_map(Value::from),
            any::<bool>().prop_map(Value::from),
            "[a-c\"\\\\{}\\[\\],: é]{0,6}".prop_map(Value::from)
        ];
        leaf.prop_recursive(4, 32, 5, |inner| {
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
                proptest::collection::vec(("[a-c\"\\\\}é]{0,3}", inner), 0..5)
                    .prop_map(|all| Value::Object(all.into_iter().collect::<Map<_, _>>())),
            ]
        })
    }

    proptest! {
        #[test]
        fn it_is_the_same_as_of_a_parser(value in value(), pretty in any::<bool>()) {
            let text = if pretty { serde_json::to_string_pretty(&value) } else { serde_json::to_string(&value) };
            let text = text.expect("JSON");
            let raw = |raw: &RawValue| raw.get().to_owned();
            let expected: Option<Vec<String>> = match &value {
                Value::Object(_) => {
                    let fields: Map<String, Value> = serde_json::from_str(&text).expect("JSON");
                    let same: Vec<Value> = parts(&text).expect("an object").iter()
                        .map(|(_, value)| serde_json::from_str(value).expect("JSON")).collect();
                    prop_assert_eq!(fields.values().cloned().collect::<Vec<_>>(), same);
                    parts(&text).map(|all| all.into_iter().map(|(_, value)| value).collect())
                }
                Value::Array(_) => {
                    let elements: Vec<&RawValue> = serde_json::from_str(&text).expect("JSON");
                    Some(elements.into_iter().map(raw).collect())
                }
                _ => None,
            };
            let found = parts(&text).map(|all| all.into_iter().map(|(_, value)| value).collect::<Vec<_>>());
            prop_assert_eq!(found, expected);
        }

        #[test]
        fn no_text_makes_it_panic_or_go_on_without_end(text in "[{}\\[\\]\",:\\\\a1 é\\n]{0,40}") {
            if let Some(parts) = Parts::of(&text) {
                prop_assert!(parts.take(100).count() < 100);
            }
        }
    }
}

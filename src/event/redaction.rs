//! Values of an event that a receiver is not to see.

use std::ops::Range;

use super::{
    key::Key,
    pointer::Pointer,
    scan::{Malformed, Part, Parts},
};
use crate::crypto::signature::TokenKey;

/// The keys `redact` and `redact_with` of a subscriber. Nothing is redacted without places.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Redaction {
    places: Vec<Place>,
    with: With,
}

/// What stands for a value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum With {
    /// This text.
    Text(String),
    /// The first 32 hexadecimal digits of an HMAC-SHA256 over the value's JSON bytes: the same value
    /// has the same token.
    Hmac(TokenKey),
}

/// The text that stands for a value where no other is configured.
pub const FILTERED: &str = "[FILTERED]";

impl Default for Redaction {
    fn default() -> Self {
        Self { places: Vec::new(), with: With::Text(FILTERED.to_owned()) }
    }
}

/// A JSON Pointer in which `*` is every name and index of one level.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    text: String,
    steps: Vec<Step>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Step {
    Any,
    Name(String),
}

impl Step {
    fn is_name(&self, key: &Key<'_>) -> bool {
        match self {
            Self::Any => true,
            Self::Name(name) => key.is(name),
        }
    }

    fn is_index(&self, index: usize) -> bool {
        match self {
            Self::Any => true,
            Self::Name(name) => *name == index.to_string(),
        }
    }
}

impl Place {
    /// # Errors
    /// Says what is wrong with the text, as the end of a sentence that begins with it.
    pub fn try_new(text: &str) -> Result<Self, &'static str> {
        let pointer = Pointer::try_new(text)?;
        let step = |name: &String| if name == "*" { Step::Any } else { Step::Name(name.clone()) };
        let steps: Vec<Step> = pointer.steps().iter().map(step).collect();
        let is_type = |step: &Step| match step {
            Step::Any => true,
            Step::Name(name) => name == "event",
        };
        match &steps[..] {
            [only] if is_type(only) => {
                Err("would redact the field `event`, without which it is no event")
            }
            _ => Ok(Self { text: text.to_owned(), steps }),
        }
    }

    pub fn as_str(&self) -> &str {
        &self.text
    }
}

impl Redaction {
    pub fn new(places: Vec<Place>, with: With) -> Self {
        Self { places, with }
    }

    pub fn places(&self) -> &[Place] {
        &self.places
    }

    pub fn with(&self) -> &With {
        &self.with
    }

    pub fn is_none(&self) -> bool {
        self.places.is_empty()
    }

    /// What tells this redaction from another, without a secret.
    pub fn label(&self) -> String {
        let with = match &self.with {
            With::Text(text) => format!("text {text}"),
            With::Hmac(key) => format!("hmac {}", key.token(b"")),
        };
        let places: Vec<&str> = self.places.iter().map(Place::as_str).collect();
        format!("{}\0{with}", places.join("\0"))
    }

    /// The event, which was checked, without these values; `None` if it has none of them. All other
    /// bytes are as they were.
    ///
    /// # Errors
    /// The event cannot be read, and is not to be sent.
    pub fn apply(&self, event: &str) -> Result<Option<String>, Malformed> {
        let steps: Vec<&[Step]> = self.places.iter().map(|place| &place.steps[..]).collect();
        let mut hits = Vec::new();
        find(event, event, &steps, &mut hits)?;
        if hits.is_empty() {
            return Ok(None);
        }
        let text = match &self.with {
            With::Text(text) => serde_json::Value::from(text.as_str()).to_string(),
            With::Hmac(_) => String::new(),
        };
        let mut redacted = String::with_capacity(event.len() + hits.len() * text.len().max(34));
        let mut from = 0;
        for Range { start, end } in hits {
            redacted.push_str(&event[from..start]);
            match &self.with {
                With::Text(_) => redacted.push_str(&text),
                With::Hmac(key) => {
                    let token = key.token(&event.as_bytes()[start..end]);
                    redacted.extend(["\"", &token, "\""]);
                }
            }
            from = end;
        }
        redacted.push_str(&event[from..]);
        Ok(Some(redacted))
    }
}

/// Appends where in `event` the values are to which the `steps` lead from `json`, a part of it, in
/// their order. One that is within another has no place of its own.
fn find(
    event: &str,
    json: &str,
    steps: &[&[Step]],
    hits: &mut Vec<Range<usize>>,
) -> Result<(), Malformed> {
    for (index, part) in Parts::of(json).into_iter().flatten().enumerate() {
        let Part { key, value } = part?;
        let leads = |step: &Step| match &key {
            Some(key) => step.is_name(key),
            None => step.is_index(index),
        };
        let after = |steps: &&[Step]| matches!(steps, [step, ..] if leads(step));
        let rest: Vec<&[Step]> =
            steps.iter().copied().filter(after).map(|steps| &steps[1..]).collect();
        if rest.iter().any(|steps| steps.is_empty()) {
            let start = value.as_ptr().addr() - event.as_ptr().addr();
            hits.push(start..start + value.len());
        } else if !rest.is_empty() {
            find(event, value, &rest, hits)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;
    use crate::crypto::secret::Secret;

    fn redaction(places: &[&str], with: With) -> Redaction {
        let places = places.iter().map(|text| Place::try_new(text).expect("a place")).collect();
        Redaction::new(places, with)
    }

    fn filtered(places: &[&str], event: &str) -> Option<String> {
        redaction(places, With::Text("[X]".to_owned())).apply(event).expect("an event")
    }

    #[test]
    fn values_are_replaced_wherever_they_are_and_all_else_keeps_its_bytes() {
        let event = "{ \"event\":\"a\",\n\"n\":1e400, \"actor\" : { \"email\" : \"a@b\", \"id\":7 }, \"changes\":{\"x\":{\"from\":1,\"to\":2},\"y\":{\"from\":[{}]}} }";
        for (places, from, to) in [
            (&["/actor/email"][..], "\"a@b\"", "\"[X]\""),
            (&["/actor"], "{ \"email\" : \"a@b\", \"id\":7 }", "\"[X]\""),
            // The outer one counts.
            (&["/actor", "/actor/email"], "{ \"email\" : \"a@b\", \"id\":7 }", "\"[X]\""),
            (&["/n"], "1e400", "\"[X]\""),
            (&["/*/id"], ":7 ", ":\"[X]\" "),
        ] {
            assert_eq!(filtered(places, event), Some(event.replacen(from, to, 1)), "{places:?}");
        }
        let both = event.replace("{\"from\":1,", "{\"from\":\"[X]\",").replace("[{}]", "\"[X]\"");
        assert_eq!(filtered(&["/changes/*/from"], event), Some(both));
        for nothing in
            [&["/nothing"][..], &["/actor/email/x"], &["/event/x"], &["/changes/x/from/0"], &[]]
        {
            assert_eq!(filtered(nothing, event), None, "{nothing:?}");
        }
    }

    #[test]
    fn keys_are_compared_unescaped_every_one_is_hit_and_arrays_have_indexes() {
        for (places, event, expected) in [
            (
                &["/a"][..],
                r#"{"a":1,"\u0061":2,"a":[3]}"#,
                Some(r#"{"a":"[X]","\u0061":"[X]","a":"[X]"}"#),
            ),
            (&["/a~1b/m~0n"], r#"{"a/b":{"m~n":1}}"#, Some(r#"{"a/b":{"m~n":"[X]"}}"#)),
            (&["/a/1"], r#"{"a":[1,2,3]}"#, Some(r#"{"a":[1,"[X]",3]}"#)),
            (&["/a/01"], r#"{"a":[1,2,3]}"#, None),
            (&["/a/*"], r#"{"a":[1,{"b":2}],"a":{}}"#, Some(r#"{"a":["[X]","[X]"],"a":{}}"#)),
            (&["/*/*"], r#"{"\ud800":{"\udc00":1}}"#, Some(r#"{"\ud800":{"\udc00":"[X]"}}"#)),
        ] {
            assert_eq!(filtered(places, event).as_deref(), expected, "{places:?}");
        }
    }

    #[test]
    fn a_token_is_of_the_values_bytes_and_the_key() {
        let with = |key: &str| With::Hmac(TokenKey::new(Secret::new(key)));
        let apply = |key: &str, event: &str| {
            let found = redaction(&["/a"], with(key)).apply(event).expect("an event");
            let event: Value = serde_json::from_str(&found.expect("a hit")).expect("JSON");
            event["a"].as_str().expect("a text").to_owned()
        };
        let one = apply("k", r#"{"a":"x"}"#);
        // The beginning of: printf '"x"' | openssl dgst -sha256 -hmac k
        assert_eq!(one, "ecf3c0320fef18cdb7a5169e505bbde3");
        assert_eq!(apply("k", r#"{ "a" : "x" }"#), one);
        for (key, event) in
            [("k", r#"{"a":"y"}"#), ("l", r#"{"a":"x"}"#), ("k", r#"{"a":"\u0078"}"#)]
        {
            assert_ne!(apply(key, event), one, "{event}");
        }
    }

    #[test]
    fn what_would_take_the_type_away_is_no_place() {
        for wrong in ["", "actor", "/event", "/*", "/~", "/a~2"] {
            assert!(Place::try_new(wrong).is_err(), "{wrong}");
        }
        for sound in ["/event/*", "/a", "/*/x", "/"] {
            assert_eq!(Place::try_new(sound).expect("sound").as_str(), sound);
        }
    }

    fn value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            any::<i32>().prop_map(Value::from),
            "[a-c\"\\\\]{0,4}".prop_map(Value::from)
        ];
        leaf.prop_recursive(4, 24, 4, |inner| {
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                proptest::collection::btree_map("[a-c]", inner, 0..4).prop_map(|m| json!(m)),
            ]
        })
    }

    /// The same on values.
    fn redacted(value: &mut Value, steps: &[Step]) {
        let [step, rest @ ..] = steps else {
            *value = json!("[X]");
            return;
        };
        match value {
            Value::Object(fields) => {
                for (name, inner) in fields {
                    let is_it = matches!(step, Step::Any) || *step == Step::Name(name.clone());
                    if is_it {
                        redacted(inner, rest);
                    }
                }
            }
            Value::Array(items) => {
                for (n, inner) in items.iter_mut().enumerate() {
                    if step.is_index(n) {
                        redacted(inner, rest);
                    }
                }
            }
            _ => {}
        }
    }

    proptest! {
        #[test]
        fn it_is_the_same_as_on_values(
            inner in value(),
            places in proptest::collection::vec("(/(a|b|c|[*]|0|1)){2,4}", 0..4),
            pretty in any::<bool>(),
        ) {
            let event = json!({ "event": "a", "a": inner });
            let text = if pretty { serde_json::to_string_pretty(&event) } else { serde_json::to_string(&event) }
                .expect("prints");
            let places: Vec<Place> = places.iter().map(|p| Place::try_new(p).expect("a place")).collect();
            let mut expected = event.clone();
            // The longest first: the outer one of two counts.
            let mut steps: Vec<_> = places.iter().map(|place| place.steps.clone()).collect();
            steps.sort_by_key(|steps| std::cmp::Reverse(steps.len()));
            for steps in &steps {
                redacted(&mut expected, steps);
            }
            let found = Redaction::new(places, With::Text("[X]".to_owned())).apply(&text).expect("an event");
            let parsed: Value = serde_json::from_str(found.as_deref().unwrap_or(&text)).expect("JSON");
            prop_assert_eq!(parsed, expected);
        }
    }
}

//! Which events of its patterns a subscriber gets, by their values.

use super::{key::string, pointer::Pointer};

/// The key `match` of a subscriber: all must hold.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Conditions(Vec<Condition>);

/// One of its entries: the value at this place is one of these.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Condition {
    pub place: Pointer,
    /// As text: that of a string, or the JSON of a number, `true`, `false` or `null`.
    pub values: Vec<String>,
}

impl Conditions {
    pub fn new(all: Vec<Condition>) -> Self {
        Self(all)
    }

    pub fn all(&self) -> &[Condition] {
        &self.0
    }

    /// Whether an event is wanted. What is absent is no match, and neither is an object or an array.
    pub fn hold(&self, event: &[u8]) -> bool {
        if self.0.is_empty() {
            return true;
        }
        let Ok(event) = std::str::from_utf8(event) else { return false };
        self.0.iter().all(|condition| condition.holds(event))
    }
}

impl Condition {
    fn holds(&self, event: &str) -> bool {
        let Some(json) = self.place.find_checked(event) else { return false };
        match string(json) {
            Some(Ok(text)) => self.values.iter().any(|value| *value == *text),
            // Half of a surrogate pair is no text.
            Some(Err(_)) => false,
            None => !json.starts_with(['{', '[']) && self.values.iter().any(|value| value == json),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scalars_are_compared_by_their_text_and_all_must_hold() {
        let event = br#"{"event":"a","actor":{"type":"us\u0065r"},"id":42,"f":1.50,"t":true,"n":null,"o":{},"l":[1],"e":"","s":"\ud800","x":1,"x":2}"#;
        let condition = |place: &str, values: &[&str]| Condition {
            place: Pointer::try_new(place).expect("a pointer"),
            values: values.iter().map(|v| (*v).to_owned()).collect(),
        };
        for (place, values, holds) in [
            ("/actor/type", &["admin", "user"][..], true),
            ("/actor/type", &["us\\u0065r"], false),
            ("/id", &["42"], true),
            ("/id", &["42.0"], false),
            ("/f", &["1.5"], false),
            ("/f", &["1.50"], true),
            ("/t", &["true"], true),
            ("/n", &["null"], true),
            ("/o", &["{}"], false),
            ("/l", &["[1]"], false),
            ("/l/0", &["1"], true),
            ("/e", &[""], true),
            ("/s", &["\\ud800"], false),
            ("/x", &["1"], false),
            ("/x", &["2"], true),
            ("/nothing", &["null", ""], false),
        ] {
            let all = Conditions::new(vec![condition(place, values)]);
            assert_eq!(all.hold(event), holds, "{place} {values:?}");
            let with_one = vec![condition("/event", &["a"]), condition(place, values)];
            assert_eq!(Conditions::new(with_one).hold(event), holds);
        }
        let other = vec![condition("/event", &["b"]), condition("/id", &["42"])];
        assert!(!Conditions::new(other).hold(event));
        assert!(Conditions::default().hold(b"no JSON"));
    }
}

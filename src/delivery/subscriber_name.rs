//! The name of a subscriber.

use std::{borrow::Borrow, fmt, ops::Deref, sync::Arc};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

/// The name of a subscriber, 1 to 64 of `a-z`, `0-9` and `-`. Clones share its text.
///
/// It has no dots: it is the last word of routing keys in the delay ladder.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SubscriberName(Arc<str>);

impl SubscriberName {
    /// # Errors
    /// The text is not a subscriber's name.
    pub fn try_new(text: &str) -> Result<Self, NotAName> {
        let is_name = (1..=64).contains(&text.len())
            && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
        if is_name { Ok(Self(text.into())) } else { Err(NotAName) }
    }

    /// A name that somebody configures: as [`try_new`](Self::try_new), and it begins and ends with a
    /// letter or digit. What is stored may have older names.
    ///
    /// # Errors
    /// The text is none; the rule.
    pub fn configured(text: &str) -> Result<Self, String> {
        let name = Self::try_new(text).ok().filter(|name| name.trim_matches('-') == &**name);
        name.ok_or_else(|| format!("must be {}", Self::RULE))
    }

    /// What a configured name consists of.
    pub const RULE: &str = "1 to 64 of a-z, 0-9 and `-`, with a letter or digit first and last";

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// A text is not a subscriber's name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NotAName;

impl fmt::Display for NotAName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("must be 1 to 64 of a-z, 0-9 and `-`")
    }
}

impl std::error::Error for NotAName {}

impl Deref for SubscriberName {
    type Target = str;

    fn deref(&self) -> &str {
        &self.0
    }
}

impl AsRef<str> for SubscriberName {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

impl Borrow<str> for SubscriberName {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl PartialEq<str> for SubscriberName {
    fn eq(&self, other: &str) -> bool {
        self.as_str() == other
    }
}

impl PartialEq<&str> for SubscriberName {
    fn eq(&self, other: &&str) -> bool {
        self.as_str() == *other
    }
}

impl PartialEq<String> for SubscriberName {
    fn eq(&self, other: &String) -> bool {
        self.as_str() == other
    }
}

impl fmt::Display for SubscriberName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self)
    }
}

/// As its text: logs print names and sets of names with it.
impl fmt::Debug for SubscriberName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self.as_str(), f)
    }
}

impl Serialize for SubscriberName {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self)
    }
}

impl<'de> Deserialize<'de> for SubscriberName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::try_new(&String::deserialize(deserializer)?).map_err(D::Error::custom)
    }
}

/// For tests, which know their names.
#[cfg(test)]
impl From<&str> for SubscriberName {
    fn from(text: &str) -> Self {
        Self::try_new(text).expect("a subscriber's name")
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn a_name_has_1_to_64_lowercase_letters_digits_and_hyphens() {
        let longest = "a".repeat(64);
        for text in ["a", "0", "-", "siem-2", &longest] {
            assert_eq!(SubscriberName::try_new(text).expect("a name"), *text);
        }
        let too_long = "a".repeat(65);
        for text in ["", "A", "a.b", "a b", "a_b", "ä", "a\n", &too_long] {
            assert_eq!(SubscriberName::try_new(text), Err(NotAName), "{text}");
        }
        for (text, may_be_configured) in [
            ("a", true),
            ("0-a", true),
            ("a--0", true),
            ("-", false),
            ("-a", false),
            ("a-", false),
            ("A", false),
        ] {
            assert_eq!(SubscriberName::configured(text).is_ok(), may_be_configured, "{text}");
        }
    }

    #[test]
    fn a_name_is_printed_stored_and_found_as_its_text() {
        let name = SubscriberName::from("siem");
        assert_eq!(format!("{name} {name:?} {name:>6}"), "siem \"siem\"   siem");
        let json = serde_json::to_string(&name).expect("prints");
        assert_eq!(json, "\"siem\"");
        assert_eq!(serde_json::from_str::<SubscriberName>(&json).expect("reads"), name);
        assert!(serde_json::from_str::<SubscriberName>("\"a.b\"").is_err());
        assert!(BTreeSet::from([name]).contains("siem"));
    }
}

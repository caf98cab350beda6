//! What is read of an event's fields, without a value of the others.

use serde::de::{Deserialize as _, IgnoredAny, MapAccess, Visitor};
use serde_json::value::RawValue;

use super::key::Key;

/// Visits the fields of the object and keeps only the last `event` and the last `timestamp`.
pub(super) struct HeadFields;

impl<'de> Visitor<'de> for HeadFields {
    type Value = (Option<&'de RawValue>, Option<&'de RawValue>);

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let (mut event_type, mut timestamp) = (None, None);
        while let Some(which) = map.next_key_seed(WhichKey(&["event", "timestamp"]))? {
            // Raw: the value may be any JSON, even a number that Rust cannot represent, and a later
            // field may be the one that counts.
            match which {
                Some(0) => event_type = Some(map.next_value()?),
                Some(_) => timestamp = Some(map.next_value()?),
                None => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        Ok((event_type, timestamp))
    }
}

/// Visits the fields of the object and returns whether one has this name.
pub(super) struct HasKey(pub(super) &'static [&'static str]);

impl<'de> Visitor<'de> for HasKey {
    type Value = bool;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<bool, A::Error> {
        let mut found = false;
        while let Some(which) = map.next_key_seed(WhichKey(self.0))? {
            found |= which.is_some();
            map.next_value::<IgnoredAny>()?;
        }
        Ok(found)
    }
}

/// Reads a key, and returns its index among these names.
struct WhichKey(&'static [&'static str]);

impl<'de> serde::de::DeserializeSeed<'de> for WhichKey {
    type Value = Option<usize>;
    fn deserialize<D: serde::Deserializer<'de>>(self, d: D) -> Result<Self::Value, D::Error> {
        let key = Key::deserialize(d)?;
        Ok(self.0.iter().position(|name| key.is(name)))
    }
}

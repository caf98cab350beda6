//! Names of fields in an object, and texts.

use std::borrow::Cow;

use serde_json::value::RawValue;

/// A key as written in an object. A key with half of a surrogate pair is valid JSON too (RFC 8259,
/// section 8.2), though not every parser reads it.
#[derive(Debug)]
pub struct Key<'e>(&'e str);

impl<'e> Key<'e> {
    /// `None` if it is no text in quotes.
    pub(super) fn written(json: &'e str) -> Option<Self> {
        (json.len() > 1 && json.starts_with('"')).then_some(Self(json))
    }

    #[cfg(test)]
    pub(super) fn as_written(&self) -> &'e str {
        self.0
    }

    /// Whether it is this key; it may be written with escapes.
    pub fn is(&self, name: &str) -> bool {
        let text = self.0;
        if text.contains('\\') {
            return serde_json::from_str::<Cow<'_, str>>(text).is_ok_and(|key| key == name);
        }
        text.get(1..text.len() - 1) == Some(name)
    }
}

impl<'de: 'e, 'e> serde::Deserialize<'de> for Key<'e> {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        <&RawValue>::deserialize(d).map(|raw| Self(raw.get()))
    }
}

/// The text of a JSON string; `None` if the value has another type.
pub(super) fn string(json: &str) -> Option<serde_json::Result<Cow<'_, str>>> {
    let text = json.strip_prefix('"')?.strip_suffix('"')?;
    Some(if text.contains('\\') {
        serde_json::from_str(json).map(Cow::Owned)
    } else {
        Ok(Cow::Borrowed(text))
    })
}

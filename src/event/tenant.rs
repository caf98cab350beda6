//! Tenants: whose an event is, for subscribers that get the events of one tenant alone.

use std::{borrow::Borrow, fmt, str::FromStr, sync::Arc};

use super::{key::string, pointer::Pointer};

/// The most bytes of a tenant.
pub const MAX_TENANT: usize = 255;

/// The name of a tenant: a text of 1 to [`MAX_TENANT`] bytes. Two are one tenant if their bytes are
/// equal; nothing is normalised.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Tenant(Arc<str>);

impl Tenant {
    /// `None` if the text is empty or too long.
    pub fn try_new(text: &str) -> Option<Self> {
        (1..=MAX_TENANT).contains(&text.len()).then(|| Self(text.into()))
    }

    /// The tenant of a JSON value: the text of a string, or the digits of an integer. `None` of
    /// everything else.
    fn of_json(json: &str) -> Option<Self> {
        if let Some(text) = string(json) {
            return Self::try_new(&text.ok()?);
        }
        let digits = json.strip_prefix('-').unwrap_or(json);
        let is_integer = digits.bytes().all(|b| b.is_ascii_digit());
        is_integer.then(|| Self::try_new(json)).flatten()
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// A text is not a tenant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NotATenant;

impl fmt::Display for NotATenant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "must have 1 to {MAX_TENANT} bytes")
    }
}

impl std::error::Error for NotATenant {}

impl FromStr for Tenant {
    type Err = NotATenant;

    fn from_str(text: &str) -> Result<Self, NotATenant> {
        Self::try_new(text).ok_or(NotATenant)
    }
}

impl Borrow<str> for Tenant {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Tenant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Where the tenant of an event is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TenantPlace {
    /// Beside the event: this header of an AMQP message, or `x-hooktrail-tenant` of a request.
    Header(String),
    /// In the event.
    Pointer(Pointer),
}

impl TenantPlace {
    /// The tenant of an event that came with this one beside it.
    pub fn tenant(&self, beside: Option<&Tenant>, event: &[u8]) -> Option<Tenant> {
        match self {
            Self::Header(_) => beside.cloned(),
            Self::Pointer(pointer) => {
                let event = std::str::from_utf8(event).ok()?;
                Tenant::of_json(pointer.find(event)?)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tenant_is_a_text_or_an_integer_with_its_exact_bytes() {
        let pointer = Pointer::try_new("/account/id").expect("a pointer");
        let place = TenantPlace::Pointer(pointer);
        let longest = "x".repeat(MAX_TENANT);
        for (json, expected) in [
            ("\"42\"", Some("42")),
            ("42", Some("42")),
            ("-7", Some("-7")),
            ("18446744073709551616", Some("18446744073709551616")),
            (r#""\u0034\u0032""#, Some("42")),
            ("\"Å\"", Some("Å")),
            // Another spelling of the same letter.
            ("\"A\u{30a}\"", Some("A\u{30a}")),
            ("\" a \"", Some(" a ")),
            ("\"\"", None),
            (&format!("\"{longest}\""), Some(&*longest)),
            (&format!("\"{longest}x\""), None),
            (&format!("\"{}\"", "x".repeat(1 << 20)), None),
            (&"1".repeat(MAX_TENANT + 1), None),
            ("1.0", None),
            ("1e3", None),
            ("true", None),
            ("null", None),
            ("{\"id\":1}", None),
            ("[1]", None),
            (r#""\ud800""#, None),
        ] {
            let event =
                format!("{{\"event\":\"a\",\"account\":{{\"id\":\"before\",\"id\":{json}}}}}");
            let found = place.tenant(Tenant::try_new("beside").as_ref(), event.as_bytes());
            assert_eq!(found.as_ref().map(Tenant::as_str), expected, "{json}");
        }
        let without = place.tenant(Tenant::try_new("beside").as_ref(), b"{\"event\":\"a\"}");
        assert_eq!(without, None, "what is beside the event does not count");
    }

    #[test]
    fn a_tenant_beside_the_event_counts_whatever_the_event_says() {
        let place = TenantPlace::Header("tenant".to_owned());
        let beside = Tenant::try_new("a");
        assert_eq!(place.tenant(beside.as_ref(), b"{\"tenant\":\"b\"}"), beside);
        assert_eq!(place.tenant(None, b"{\"tenant\":\"b\"}"), None);
    }
}

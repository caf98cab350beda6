//! The keys `match`, `redact` and `redact_with`: which events a subscriber gets by their values, and
//! which values it does not see.

use toml::de::DeValue;

use super::signing;
use crate::{
    config::{
        document::{Section, Value},
        keys,
        reader::Reader,
    },
    crypto::signature::TokenKey,
    event::{
        Pointer,
        condition::{Condition, Conditions},
        redaction::{FILTERED, Place, Redaction, With},
    },
};

pub(super) fn conditions(reader: &Reader<'_>, section: &Section<'_>) -> Option<Conditions> {
    let Some(value) = section.get("match") else { return Some(Conditions::default()) };
    let entries = reader.entries(&value)?;
    let found: Vec<Condition> =
        entries.iter().filter_map(|(place, values)| condition(reader, place, values)).collect();
    (found.len() == entries.len()).then(|| Conditions::new(found))
}

fn condition(reader: &Reader<'_>, place: &str, value: &Value<'_>) -> Option<Condition> {
    let pointer = Pointer::try_new(place).map_err(|why| {
        reader.report(value, format!("`{place}` is no place in an event: it {why}"))
    });
    let items = reader.array(value)?;
    if items.is_empty() {
        reader.report(
            value,
            "is empty, so no event would match; name at least one value, or leave it out",
        );
        return None;
    }
    let values: Vec<String> = items.iter().filter_map(|item| scalar(reader, item)).collect();
    let place = pointer.ok()?;
    (values.len() == items.len()).then_some(Condition { place, values })
}

/// A value that is compared, as text.
fn scalar(reader: &Reader<'_>, item: &Value<'_>) -> Option<String> {
    match item.value {
        DeValue::Integer(n) => i64::from_str_radix(&n.as_str().replace('_', ""), n.radix())
            .map(|n| n.to_string())
            .map_err(|e| reader.report(item, format!("is a number that cannot be read: {e}")))
            .ok(),
        DeValue::Boolean(b) => Some(b.to_string()),
        DeValue::String(_) => reader.string(item),
        _ => {
            reader.report(
                item,
                "must be a text, a whole number, true or false; write any other number as the text that events have, such as \"1.50\", and null as \"null\"",
            );
            None
        }
    }
}

pub(super) fn redaction(reader: &Reader<'_>, section: &Section<'_>) -> Option<Redaction> {
    let with = match section.get("redact_with") {
        None => Some(With::Text(FILTERED.to_owned())),
        Some(value) => with(reader, &value),
    };
    let value = section.get("redact");
    let items = value.as_ref().map_or(Some(Vec::new()), |value| reader.array(value))?;
    if let Some(value) = section.get("redact_with").filter(|_| items.is_empty()) {
        reader.report(
            &value,
            "does nothing without `redact`, the places of the values; add that, or remove this",
        );
        return None;
    }
    let place = |item: &Value<'_>| {
        let text = reader.string(item)?;
        Place::try_new(&text).map_err(|why| reader.report(item, format!("`{text}` {why}"))).ok()
    };
    let places: Vec<Place> = items.iter().filter_map(place).collect();
    (places.len() == items.len()).then_some(Redaction::new(places, with?))
}

fn with(reader: &Reader<'_>, value: &Value<'_>) -> Option<With> {
    if Reader::is_string(value) {
        return reader.string(value).map(With::Text);
    }
    let table = reader.section(value, keys::REDACT_WITH)?;
    let Some(key) = table.get("hmac") else {
        reader.report_missing(
            &table,
            "hmac",
            "is required in this form: a secret, such as \"${KEY}\" or \"file:PATH\"",
        );
        return None;
    };
    signing::secret(reader, &key).map(|key| With::Hmac(TokenKey::new(key)))
}

//! The fields of the form, and the document of the API that they make.

use serde_json::{Value, json};

use crate::{
    admin::{
        answer::Refusal,
        console::form::Form,
        view::{FieldError, ProblemKind},
    },
    config::managed::Document,
};

/// The fields of the form, with the keys of the document whose mistakes stand beside each.
pub(super) const FIELDS: [(&str, &str); 20] = [
    ("name", "name"),
    ("url", "url"),
    ("preset", "preset"),
    ("format", "format"),
    ("content_type", "content_type"),
    ("source", "source"),
    ("sourcetype", "sourcetype"),
    ("index", "index"),
    ("events", "events"),
    ("tenant", "tenant"),
    ("signature", "signatures"),
    ("secret", "secrets"),
    ("description", "description"),
    ("start_paused", "start_paused"),
    ("conditions", "match"),
    ("redact", "redact"),
    ("redact_with", "redact_with"),
    ("rate", "http.rate"),
    ("compression", "http.compression"),
    ("order", "order"),
];

/// The field with the version that a form changes.
pub(super) const VERSION: &str = "version";

/// The signature of requests: a value of the form, what people read, and the key of the document.
pub(super) const SIGNATURES: [(&str, &str, &[&str]); 3] = [
    ("standard-webhooks", "Standard Webhooks", &["standard-webhooks"]),
    ("mailtrap", "Mailtrap", &["mailtrap"]),
    ("none", "None: receivers cannot tell who sent it", &[]),
];

/// The value of what the form has no choice for, and of what a preset sets: it is left alone.
pub(super) const AS_IT_IS: &str = "as-it-is";

/// The keys that go with some formats.
pub(super) const OF_FORMATS: [&str; 4] = ["content_type", "source", "sourcetype", "index"];

/// The field that says that a form has those of [`more`]: of a box that is not checked it has
/// nothing.
pub(super) const MORE: &str = "more";

/// The keys of the last fields, each with its value; null for one that was left empty. What the form
/// cannot show is not among them.
fn more(form: &Form) -> Vec<(&'static str, Value)> {
    if form.get(MORE).is_empty() {
        return Vec::new();
    }
    let or_null = |text: &str| if text.is_empty() { Value::Null } else { text.into() };
    let order = if form.get("order") == "on" { "strict".into() } else { Value::Null };
    let all_or_null = |lines: Vec<Value>| match lines.is_empty() {
        true => Value::Null,
        false => Value::Array(lines),
    };
    let rate = form.get("rate").trim();
    let rate = match rate.strip_prefix(OF_EVENTS) {
        Some(events) => json!({ "events": events.trim() }),
        None => or_null(rate),
    };
    let http = json!({ "rate": rate, "compression": or_null(form.get("compression")) });
    let mut keys = vec![
        ("preset", or_null(form.get("preset"))),
        ("redact", all_or_null(lines(form, "redact").map(Value::from).collect())),
        ("redact_with", or_null(form.get("redact_with"))),
        ("http", http),
        ("order", order),
    ];
    if form.get("conditions") != AS_IT_IS {
        keys.push(("match", conditions(form)));
    }
    keys
}

/// What a rate of events begins with.
const OF_EVENTS: &str = "events ";

/// What is between a place and its value.
const IS: &str = " = ";

fn lines<'f>(form: &'f Form, field: &str) -> impl Iterator<Item = &'f str> {
    form.get(field).lines().map(str::trim).filter(|line| !line.is_empty())
}

/// Lines such as `/actor/type = user`; of one place several are alternatives.
fn conditions(form: &Form) -> Value {
    let mut found = serde_json::Map::new();
    for line in lines(form, "conditions") {
        let whole = line.split_once(IS).map(|(place, value)| (place, value.trim_start()));
        let empty = || line.strip_suffix(IS.trim_end()).map(|place| (place, ""));
        // Without a value there is none to compare with, which is a mistake.
        let (place, value) = match whole.or_else(empty) {
            Some((place, value)) => (place, Some(value)),
            None => (line, None),
        };
        let values = found.entry(place.trim_end()).or_insert_with(|| json!([]));
        if let Some(values) = values.as_array_mut() {
            values.extend(value.map(Value::from));
        }
    }
    if found.is_empty() { Value::Null } else { Value::Object(found) }
}

/// The lines that show conditions; [`AS_IT_IS`] if lines cannot.
fn shown(given: Option<&Value>) -> String {
    let text_of = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let places = given.and_then(Value::as_object).into_iter().flatten();
    let texts = |(place, values): (&String, &Value)| -> (String, Vec<String>) {
        (place.clone(), values.as_array().into_iter().flatten().map(text_of).collect())
    };
    let all: Vec<(String, Vec<String>)> = places.map(texts).collect();
    let each = |(place, values): &(String, Vec<String>)| {
        values.iter().map(|value| format!("{place}{IS}{value}")).collect::<Vec<_>>()
    };
    let text = all.iter().flat_map(each).collect::<Vec<_>>().join("\n");
    let again = conditions(&Form::default().with("conditions", text.clone()));
    let same = all.iter().all(|(place, values)| again.get(place) == Some(&json!(values)));
    if same && again.as_object().map_or(0, serde_json::Map::len) == all.len() {
        text
    } else {
        AS_IT_IS.to_owned()
    }
}

/// The field with the receiver that the form was shown with.
pub(super) const PRESET_SHOWN: &str = "preset_shown";

/// Whether another receiver was chosen: it brings its own in place of what the form began with.
fn brings_its_own(form: &Form) -> bool {
    let chosen = form.get("preset");
    !chosen.is_empty() && chosen != form.get(PRESET_SHOWN)
}

fn format(form: &Form) -> &str {
    let chosen = form.get("format").trim();
    if chosen == "json" && brings_its_own(form) { "" } else { chosen }
}

/// The document of a new webhook.
pub(super) fn document(form: &Form) -> Document {
    let mut document = Document::default();
    for key in ["name", "url", "description"].into_iter().chain(OF_FORMATS) {
        let typed = form.get(key).trim();
        if !typed.is_empty() {
            document.set(key, typed.into());
        }
    }
    if !format(form).is_empty() {
        document.set("format", format(form).into());
    }
    for (key, value) in more(form) {
        let value = match value {
            Value::Object(mut keys) if key == "http" => {
                keys.retain(|_, value| !value.is_null());
                if keys.is_empty() { Value::Null } else { Value::Object(keys) }
            }
            other => other,
        };
        if !value.is_null() {
            document.set(key, value);
        }
    }
    // As it was typed: bytes decide.
    if !form.get("tenant").is_empty() {
        document.set("tenant", form.get("tenant").into());
    }
    let patterns = patterns(form);
    if !patterns.is_empty() {
        document.set("events", patterns.into());
    }
    match signatures(form) {
        Some([scheme]) if *scheme == SIGNATURES[0].0 => {}
        Some(schemes) => document.set("signatures", json!(schemes)),
        None => {}
    }
    if !form.get("secret").trim().is_empty() {
        document.set("secrets", json!([form.get("secret").trim()]));
    }
    if form.get("start_paused") == "on" {
        document.set("start_paused", true.into());
    }
    document
}

/// The merge patch of a change: what the form has no field for stays as it is.
pub(super) fn patch(form: &Form) -> Document {
    let mut patch = Document::default();
    let or_null = |text: &str| if text.is_empty() { Value::Null } else { text.into() };
    // A URL is not optional: an empty one is a mistake, not its removal.
    patch.set("url", form.get("url").trim().into());
    patch.set("description", or_null(form.get("description").trim()));
    if form.get("format") != AS_IT_IS {
        patch.set("format", or_null(format(form)));
    }
    for (key, value) in more(form) {
        patch.set(key, value);
    }
    // A form that was opened before there were these fields has none of them.
    for (key, typed) in form.fields().filter(|(key, _)| OF_FORMATS.contains(key)) {
        patch.set(key, or_null(typed.trim()));
    }
    let patterns = patterns(form);
    patch.set("events", if patterns.is_empty() { Value::Null } else { patterns.into() });
    match signatures(form) {
        Some([scheme]) if *scheme == SIGNATURES[0].0 && brings_its_own(form) => {
            patch.set("signatures", Value::Null);
        }
        Some(schemes) => patch.set("signatures", json!(schemes)),
        None => {}
    }
    if !form.get("secret").trim().is_empty() {
        patch.set("secrets", json!([form.get("secret").trim()]));
    }
    patch
}

pub(super) fn patterns(form: &Form) -> Vec<String> {
    let apart = |c: char| c == ',' || c.is_whitespace();
    form.get("events").split(apart).filter(|p| !p.is_empty()).map(str::to_owned).collect()
}

fn signatures(form: &Form) -> Option<&'static [&'static str]> {
    let chosen = form.get("signature");
    SIGNATURES.iter().find(|(value, ..)| *value == chosen).map(|(.., schemes)| *schemes)
}

/// The form that shows a document.
pub(super) fn filled(document: &Value, version: &str) -> Form {
    let text = |key: &str| document.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
    let events = document.get("events").and_then(Value::as_array);
    let events = events.into_iter().flatten().filter_map(Value::as_str).collect::<Vec<_>>();
    let of_preset = |or: &'static str| if document.get("preset").is_some() { AS_IT_IS } else { or };
    let format = document.get("format").and_then(Value::as_str).unwrap_or(of_preset("json"));
    let signature = match document.get("signatures") {
        None => of_preset(SIGNATURES[0].0),
        Some(given) => {
            let known = SIGNATURES.iter().find(|(.., schemes)| json!(schemes) == *given);
            known.map_or(AS_IT_IS, |(value, ..)| *value)
        }
    };
    let of_formats = OF_FORMATS.into_iter();
    let form = of_formats.fold(Form::default(), |form, key| form.with(key, text(key)));
    let redact = document.get("redact").and_then(Value::as_array).into_iter().flatten();
    let redact: Vec<&str> = redact.filter_map(Value::as_str).collect();
    let http = |key: &str| document.get("http").and_then(|http| http.get(key));
    let rate = match http("rate") {
        Some(Value::String(rate)) => rate.clone(),
        Some(rate) => {
            let events = rate.get("events").and_then(Value::as_str).unwrap_or_default();
            format!("{OF_EVENTS}{events}")
        }
        None => String::new(),
    };
    let form = form
        .with(MORE, "1".to_owned())
        .with("preset", text("preset"))
        .with(PRESET_SHOWN, text("preset"))
        .with("conditions", shown(document.get("match")))
        .with("redact", redact.join("\n"))
        .with("redact_with", text("redact_with"))
        .with("rate", rate)
        .with(
            "compression",
            http("compression").and_then(Value::as_str).unwrap_or_default().to_owned(),
        )
        .with("order", document.get("order").map_or("", |_| "on").to_owned());
    form.with("url", text("url"))
        .with("format", format.to_owned())
        .with("events", events.join("\n"))
        .with("signature", signature.to_owned())
        .with("description", text("description"))
        .with(VERSION, version.to_owned())
}

/// A refusal whose fields are those of the form.
pub(super) fn of_form(mut refusal: Refusal) -> Refusal {
    if refusal.fields.is_empty() && refusal.kind == ProblemKind::Exists {
        // Another webhook has the name, here or in a file.
        refusal.fields.push(FieldError { field: "name".to_owned(), detail: refusal.why.clone() });
    }
    for wrong in &mut refusal.fields {
        let (key, rest) = match wrong.field.find(['[', '.']) {
            Some(at) => wrong.field.split_at(at),
            None => (wrong.field.as_str(), ""),
        };
        let of = |key: &str| FIELDS.iter().find(|(_, of)| *of == key);
        let Some((field, _)) = of(&wrong.field).or_else(|| of(key)) else { continue };
        let index = rest.strip_prefix('[').and_then(|rest| rest.split_once(']'));
        let nth = index.and_then(|(n, _)| n.parse::<usize>().ok()).filter(|_| key == "events");
        if let Some(nth) = nth {
            wrong.detail = format!("pattern {}: {}", nth + 1, wrong.detail);
        }
        wrong.field = (*field).to_owned();
    }
    refusal
}

#[cfg(test)]
mod tests;

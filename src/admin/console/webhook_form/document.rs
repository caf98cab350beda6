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
pub(super) const FIELDS: [(&str, &str); 13] = [
    ("name", "name"),
    ("url", "url"),
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

/// The document of a new webhook.
pub(super) fn document(form: &Form) -> Document {
    let mut document = Document::default();
    for key in ["name", "url", "format", "description"].into_iter().chain(OF_FORMATS) {
        let typed = form.get(key).trim();
        if !typed.is_empty() {
            document.set(key, typed.into());
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
        patch.set("format", or_null(form.get("format")));
    }
    // A form that was opened before there were these fields has none of them.
    for (key, typed) in form.fields().filter(|(key, _)| OF_FORMATS.contains(key)) {
        patch.set(key, or_null(typed.trim()));
    }
    let patterns = patterns(form);
    patch.set("events", if patterns.is_empty() { Value::Null } else { patterns.into() });
    if let Some(schemes) = signatures(form) {
        patch.set("signatures", json!(schemes));
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
        let Some((field, _)) = FIELDS.iter().find(|(_, of)| *of == key) else { continue };
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

//! Values as TOML, without secrets.

use std::{fmt::Display, time::Duration};

use serde_json::Value;

use crate::{
    crypto::{
        secret::SecretUrl,
        signature::{Encoding, Scheme},
    },
    wording::span,
};

pub(super) const REDACTED: &str = "[redacted]";

pub(super) fn quoted(text: &str) -> String {
    // TOML has all escapes of JSON.
    Value::from(text).to_string().replace("${", "$${")
}

pub(super) fn word(text: &str) -> Option<String> {
    Some(quoted(text))
}

pub(super) fn plain(value: impl Display) -> Option<String> {
    Some(value.to_string())
}

pub(super) fn duration(value: Duration) -> Option<String> {
    plain(format_args!("\"{}\"", span(value)))
}

pub(super) fn url(url: &SecretUrl) -> Option<String> {
    plain(format_args!("\"{url}\"  # the rest is not shown"))
}

pub(super) fn redacted() -> Option<String> {
    word(REDACTED)
}

pub(super) fn list(items: impl Iterator<Item = String>) -> Option<String> {
    plain(format_args!("[{}]", items.collect::<Vec<_>>().join(", ")))
}

pub(super) fn table(entries: impl Iterator<Item = String>) -> String {
    format!("{{ {} }}", entries.collect::<Vec<_>>().join(", "))
}

pub(super) fn scheme(scheme: &Scheme) -> String {
    match scheme {
        Scheme::StandardWebhooks => quoted("standard-webhooks"),
        Scheme::Ed25519 => quoted("standard-webhooks-ed25519"),
        Scheme::Mailtrap => quoted("mailtrap"),
        Scheme::Custom { header, prefix, encoding } => {
            let encoding = match encoding {
                Encoding::Hex => "hex",
                Encoding::Base64 => "base64",
            };
            format!(
                "{{ header = {}, prefix = {}, encoding = \"{encoding}\" }}",
                quoted(header),
                quoted(prefix)
            )
        }
    }
}

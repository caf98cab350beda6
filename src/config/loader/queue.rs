//! `[queue]`.

use std::{path::PathBuf, time::Duration};

use url::Url;

use crate::{
    config::{
        document::{Section, Value},
        keys,
        reader::Reader,
        settings::{AmqpConfig, Backend, EmbeddedConfig, Intake, QueueConfig},
        spelling::nearness,
    },
    crypto::secret::SecretUrl,
};

const MISSING: &str = "is required: \"embedded\", or the URL of a RabbitMQ, such as \"amqp://user:password@127.0.0.1:5672/%2f\"";

pub(super) fn queue(reader: &Reader<'_>, root: &Section<'_>) -> Option<QueueConfig> {
    let Some(section) = root.get("queue") else {
        reader.report_missing(root, "queue.url", MISSING);
        return None;
    };
    let section = reader.section(&section, keys::QUEUE)?;
    let url = url(reader, &section);
    let intake = intake(reader, &section);
    let prefix = prefix(reader, &section);
    let data_dir = data_dir(reader, &section);
    let retention = match section.get("retention") {
        None => Some(Duration::from_secs(7 * 24 * 3600)),
        Some(v) => reader.duration(&v, None),
    };
    let embedded = EmbeddedConfig { data_dir: data_dir?, retention: retention?, history: None };
    let management_url = match section.get("management_url") {
        None => Some(None),
        Some(v) => management_url(reader, &v).map(|url| Some(Box::new(url))),
    };
    let (intake, prefix, management_url) = (intake?, prefix?, management_url?);
    let backend = url?.map_or(Backend::Embedded, |url| {
        // Known once all tables are read.
        let (keeps_history, has_store, manages) = (false, false, false);
        Backend::Amqp(AmqpConfig {
            url,
            intake,
            prefix,
            management_url,
            keeps_history,
            has_store,
            manages,
        })
    });
    Some(QueueConfig { backend, embedded })
}

/// The URL of RabbitMQ; `Some(None)` for the embedded queue.
fn url(reader: &Reader<'_>, section: &Section<'_>) -> Option<Option<SecretUrl>> {
    let Some(value) = section.get("url") else {
        reader.report_missing(section, "url", MISSING);
        return None;
    };
    let text = reader.string(&value)?;
    if text == "embedded" {
        return Some(None);
    }
    let is_amqp = |url: &Url| {
        matches!(url.scheme(), "amqp" | "amqps") && url.host_str().is_some_and(|h| !h.is_empty())
    };
    if let Some(url) = text.parse().ok().filter(is_amqp) {
        return Some(Some(SecretUrl::new(url)));
    }
    // Not quoted: the text may contain a password.
    let why = if text.is_empty() {
        "is empty; give \"embedded\", or the URL of a RabbitMQ, amqp://… or amqps://…"
    } else if nearness(&text, "embedded").is_some() {
        // A text this close to the word has no room for a password.
        "is neither \"embedded\" nor an amqp:// or amqps:// URL with a host; did you mean \"embedded\"?"
    } else {
        "is neither \"embedded\" nor an amqp:// or amqps:// URL with a host"
    };
    reader.report(&value, why);
    None
}

fn intake(reader: &Reader<'_>, section: &Section<'_>) -> Option<Intake> {
    let name = |v: &Value<'_>| {
        let name = reader.string(v)?;
        if name.is_empty() || name.len() > 255 {
            reader.report(v, "must have 1 to 255 bytes");
            return None;
        }
        Some(name)
    };
    match (section.get("exchange"), section.get("source_queue")) {
        (Some(_), Some(v)) => {
            reader.report(&v, "cannot be combined with `exchange`; remove one of the two");
            None
        }
        (None, Some(v)) => name(&v).map(Intake::SourceQueue),
        (Some(v), None) => name(&v).map(Intake::Exchange),
        (None, None) => Some(Intake::Exchange("audit".to_owned())),
    }
}

fn prefix(reader: &Reader<'_>, section: &Section<'_>) -> Option<String> {
    let Some(value) = section.get("prefix") else { return Some("hooktrail".to_owned()) };
    let prefix = reader.string(&value)?;
    let ok = (1..=64).contains(&prefix.len())
        && prefix.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
    if !ok {
        reader.report(&value, "must be 1 to 64 letters, digits, `-`, `_` or `.`");
    }
    ok.then_some(prefix)
}

fn data_dir(reader: &Reader<'_>, section: &Section<'_>) -> Option<PathBuf> {
    let Some(value) = section.get("data_dir") else {
        return Some(section.source.relative("data"));
    };
    let dir = reader.string(&value)?;
    if dir.is_empty() {
        reader.report(&value, "is empty; name a directory for the embedded queue");
        return None;
    }
    Some(section.source.relative(&dir))
}

fn management_url(reader: &Reader<'_>, value: &Value<'_>) -> Option<SecretUrl> {
    let url = reader.string(value)?.parse::<Url>().ok();
    let found = url.filter(|url| {
        let has_host = url.host_str().is_some_and(|h| !h.is_empty());
        matches!(url.scheme(), "http" | "https")
            && has_host
            && url.query().is_none()
            && url.fragment().is_none()
    });
    if found.is_none() {
        // Not quoted: the text may contain a password.
        reader.report(value, "is not the URL of a RabbitMQ's management plugin; write one such as \"http://127.0.0.1:15672\"");
    }
    found.map(SecretUrl::new)
}

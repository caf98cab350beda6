//! `[queue]`.

use std::{path::PathBuf, time::Duration};

use url::Url;

use crate::{
    config::{
        document::{Section, Value},
        keys,
        reader::Reader,
        settings::{AmqpConfig, Backend, EmbeddedConfig, Intake, IntakeConfig, QueueConfig},
        spelling::nearness,
    },
    crypto::secret::SecretUrl,
    event::{Pattern, Pointer, TenantPlace},
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
    let management_url = match section.get("management_url") {
        None => Some(None),
        Some(v) => management_url(reader, &v).map(|url| Some(Box::new(url))),
    };
    let through = match section.get("intake") {
        None => Some(None),
        Some(value) => through(reader, &value, &url).map(Some),
    };
    let bind = bind(reader, &section, &intake);
    let tenant = tenant(reader, &section, &url);
    let tenants_required = tenants_required(reader, &section);
    let embedded = EmbeddedConfig {
        data_dir: data_dir?,
        retention: retention?,
        history: None,
        tenant: tenant?,
        tenants_required: tenants_required?,
    };
    let (intake, prefix, management_url) = (intake?, prefix?, management_url?);
    let (url, through, bind) = (url?, through?, bind?);
    // Known once all tables are read.
    let (keeps_history, has_store, manages) = (false, false, false);
    let amqp =
        |url| AmqpConfig { url, intake, prefix, management_url, keeps_history, has_store, manages };
    let (backend, intake) = match (url, through) {
        (Some(url), _) => (Backend::Amqp(amqp(url)), None),
        (None, Some(url)) => {
            (Backend::Embedded, Some(Box::new(IntakeConfig { amqp: amqp(url), bind })))
        }
        (None, None) => (Backend::Embedded, None),
    };
    Some(QueueConfig { backend, embedded, intake })
}

/// The URL of the RabbitMQ that events come through into the embedded queue.
fn through(
    reader: &Reader<'_>,
    value: &Value<'_>,
    queue: &Option<Option<SecretUrl>>,
) -> Option<SecretUrl> {
    let text = reader.string(value)?;
    let Some(url) = broker(&text) else {
        // Not quoted: the text may contain a password.
        reader.report(value, "is not an amqp:// or amqps:// URL with a host; give the URL of the RabbitMQ that events come through, or leave `intake` out");
        return None;
    };
    if matches!(queue, Some(Some(_))) {
        reader.report(value, "is for url = \"embedded\": with the URL of a RabbitMQ events wait in its queues; set `url` to \"embedded\", or remove `intake`");
        return None;
    }
    Some(url)
}

/// Where the tenant of an event is.
fn tenant(
    reader: &Reader<'_>,
    section: &Section<'_>,
    queue: &Option<Option<SecretUrl>>,
) -> Option<Option<TenantPlace>> {
    let Some(value) = section.get("tenant") else { return Some(None) };
    let table = reader.section(&value, keys::TENANT)?;
    let place = match (table.get("header"), table.get("pointer")) {
        (Some(header), None) => {
            let name = reader.string(&header)?;
            // A longer one is no key of an AMQP table.
            let ok = (1..=255).contains(&name.len());
            if !ok {
                reader.report(&header, "must have 1 to 255 bytes, the name of an AMQP header");
            }
            ok.then_some(TenantPlace::Header(name))
        }
        (None, Some(pointer)) => match Pointer::try_new(&reader.string(&pointer)?) {
            Ok(pointer) => Some(TenantPlace::Pointer(pointer)),
            Err(why) => {
                reader.report(&pointer, format!("{why}; it is a JSON Pointer (RFC 6901)"));
                None
            }
        },
        (Some(_), Some(_)) | (None, None) => {
            reader.report(&value, "must be either { header = \"…\" } or { pointer = \"/…\" }");
            None
        }
    };
    if matches!(queue, Some(Some(_))) {
        reader.report(&value, "is for url = \"embedded\": RabbitMQ's queues know no tenant; set `url` to \"embedded\" and `intake` to this RabbitMQ, or remove `tenant`");
        return None;
    }
    place.map(Some)
}

/// Whether each subscriber must have a tenant.
fn tenants_required(reader: &Reader<'_>, section: &Section<'_>) -> Option<bool> {
    let value = section.get("tenants");
    let words = [("optional", false), ("required", true)];
    if let Some(value) = &value
        && section.get("tenant").is_none()
    {
        reader.report(value, "is for `tenant`, which says where the tenant of an event is; set that, or remove `tenants`");
        return None;
    }
    reader.one_of(value, &words)
}

/// The patterns that the intake queue is bound with.
fn bind(
    reader: &Reader<'_>,
    section: &Section<'_>,
    intake: &Option<Intake>,
) -> Option<Vec<Pattern>> {
    let source_queue = matches!(intake, Some(Intake::SourceQueue(_)));
    let Some(value) = section.get("bind") else {
        return Some(if source_queue { Vec::new() } else { vec![Pattern::all()] });
    };
    let wrong = if section.get("intake").is_none() {
        "is for `intake`: it says what of the exchange goes into the embedded queue; set `intake`, or remove `bind`"
    } else if source_queue {
        "cannot be combined with `source_queue`, whose owner binds it; remove one of the two"
    } else {
        return reader.patterns(
            &value,
            "is empty, so nothing would come in; leave `bind` out for all events, or name some",
        );
    };
    reader.report(&value, wrong);
    None
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
    if let Some(url) = broker(&text) {
        return Some(Some(url));
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

/// The URL of a RabbitMQ; `None` if the text is none.
fn broker(text: &str) -> Option<SecretUrl> {
    let is_amqp = |url: &Url| {
        matches!(url.scheme(), "amqp" | "amqps") && url.host_str().is_some_and(|h| !h.is_empty())
    };
    text.parse().ok().filter(is_amqp).map(SecretUrl::new)
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

//! Subscribers that are made over the API: a JSON document in, a checked subscriber out, by the
//! loader that files use.
//!
//! A client of the API is trusted less than the author of a file. A document names no file and no
//! variable of the environment, and its requests go only where `[admin.api_subscribers]` allows.

mod body;

use std::{collections::HashMap, time::SystemTime};

use serde_json::Value as Json;
use toml::de::DeTable;

pub use self::body::{Document, REDACTED, RETIRING, Wrong};
use super::{
    document::{Problem, Section, Source, Value},
    keys::{self, Key},
    listing::subscriber_as_toml,
    loader::{self, Defaults, Tenants},
    reader::Reader,
    settings::Config,
    subscriber::Subscriber,
};

/// The most characters of a description.
const MAX_DESCRIPTION: usize = 1000;

/// The keys of `[http]` that say where requests may go: they come from `[admin.api_subscribers]`.
const REACH: [&str; 4] = ["allow_http", "allow_private_addresses", "allow_addresses", "proxy"];

/// A checked document, or all that is wrong with it.
pub type Checked = Result<Subscriber, Vec<Wrong>>;

/// Checks documents, in their order: each is a subscriber of its own, with the defaults of this
/// configuration. Secrets that are retired by `now` do not count.
pub fn check(config: &Config, documents: &[&Document], now: SystemTime) -> Vec<Checked> {
    check_with(config, documents, now, &|name| std::env::var(name).ok())
}

/// Checks with these variables of the environment, which the file's groups may have. A document with
/// a reference to one is refused before.
fn check_with(
    config: &Config,
    documents: &[&Document],
    now: SystemTime,
    env: &dyn Fn(&str) -> Option<String>,
) -> Vec<Checked> {
    let reader = Reader::new(env);
    let groups = Source::file(config.groups.path.clone(), config.groups.text.expose().to_owned());
    let parsed = reader.parse(&groups);
    let root = reader.root(&groups, &parsed, keys::ROOT);
    let group = |key, keys| root.get(key).and_then(|v| reader.section(&v, keys));
    let http = http_defaults(&reader, &root);
    let presets = loader::presets();
    let documents_of: Vec<_> = presets.iter().map(|(_, source)| reader.parse(source)).collect();
    let defaults = Defaults {
        batch: group("batch", keys::BATCH),
        http: Some(Section { source: &groups, path: "http".to_owned(), span: 0..0, table: &http }),
        own_http: keys::MANAGED_HTTP,
        retry: group("retry", keys::RETRY),
        circuit_breaker: group("circuit_breaker", keys::BREAKER),
        presets: loader::sections(&reader, &presets, &documents_of),
        // They have no `start_from`.
        no_replay: None,
        no_order: loader::no_order(Some(&config.queue)),
        tenants: Tenants::of(Some(&config.queue)),
    };
    documents.iter().map(|document| one(document, &defaults, now, env)).collect()
}

/// The group `http` of subscribers that are made over the API: the file's keys that a document may
/// have too, and where requests may go.
fn http_defaults<'d>(reader: &Reader<'_>, root: &Section<'d>) -> DeTable<'d> {
    let mut http = DeTable::new();
    let mut take = |section: Option<Section<'d>>, keys| {
        http.extend(section.map(|section| known(section.table, keys)).unwrap_or_default());
    };
    let of = |table: &Section<'d>, key, keys| table.get(key).and_then(|v| reader.section(&v, keys));
    take(of(root, "http", keys::HTTP), keys::MANAGED_HTTP);
    let admin = of(root, "admin", keys::ADMIN);
    take(admin.and_then(|admin| of(&admin, "api_subscribers", keys::REACH)), keys::REACH);
    http
}

/// The keys of a table that are known.
fn known<'d>(table: &DeTable<'d>, keys: &[Key]) -> DeTable<'d> {
    let is_known = |name: &str| keys.iter().any(|key| key.name() == name);
    let all = table.iter().filter(|(name, _)| is_known(name.get_ref()));
    all.map(|(name, value)| (name.clone(), value.clone())).collect()
}

fn one(
    document: &Document,
    defaults: &Defaults<'_>,
    now: SystemTime,
    env: &dyn Fn(&str) -> Option<String>,
) -> Checked {
    let keys = document.effective(now);
    let wrong = body::unsound(&keys);
    if !wrong.is_empty() {
        return Err(wrong);
    }
    let reader = Reader::new(env);
    let text = body::as_toml(&keys);
    let source = Source::request(text);
    let parsed = reader.parse(&source);
    let whole = reader.root(&source, &parsed, keys::MANAGED);
    // The loader knows more keys, and some name files: it does not see them.
    let keys = known(whole.table, keys::MANAGED);
    let found = read(&reader, &Section { table: &keys, ..whole }, defaults);
    let (problems, _) = reader.finish();
    match found {
        Some(subscriber) if problems.is_empty() => Ok(subscriber),
        _ => Err(problems.into_iter().map(wrong_key).collect()),
    }
}

fn read<'d>(
    reader: &Reader<'_>,
    section: &Section<'d>,
    defaults: &Defaults<'d>,
) -> Option<Subscriber> {
    if let Some(value) = section.get("description") {
        description(reader, &value);
    }
    reader.flag(section.get("start_paused"));
    loader::of_section(reader, section, defaults, &mut HashMap::new())
}

fn description(reader: &Reader<'_>, value: &Value<'_>) {
    if let Some(text) = reader.string(value)
        && text.chars().count() > MAX_DESCRIPTION
    {
        reader.report(value, format!("must have at most {MAX_DESCRIPTION} characters"));
    }
}

/// A problem of a document, for its author, who cannot change the daemon's files.
fn wrong_key(Problem { key, message, .. }: Problem) -> Wrong {
    let name = key.rsplit('.').next().unwrap_or(&key);
    let is_unknown = message.starts_with("unknown key");
    let of_files = || keys::SUBSCRIBER.iter().any(|of_files| of_files.path == key);
    let detail = if is_unknown && key.starts_with("http.") && REACH.contains(&name) {
        "is set for all subscribers made over the API, by [admin.api_subscribers] of the daemon's configuration; leave it out".to_owned()
    } else if is_unknown && of_files() {
        "is a key of subscribers in files alone; leave it out".to_owned()
    } else {
        message
    };
    Wrong { field: key, detail }
}

/// A document as TOML for a file: secrets become variables of the environment.
pub fn as_file(name: &str, document: &Document) -> String {
    body::as_file(name, document)
}

/// A subscriber's settings with their defaults, as JSON and without secrets.
pub fn settings(subscriber: &Subscriber) -> Json {
    let text = subscriber_as_toml(subscriber);
    let parsed: Option<Json> = toml::from_str(&text).ok();
    let first = parsed.and_then(|all| all.get("subscriber")?.get(0).cloned());
    first.unwrap_or_default()
}

#[cfg(test)]
mod tests;

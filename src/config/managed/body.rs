//! The document of a subscriber that was made over the API.

use std::{fmt, fmt::Write as _, time::SystemTime};

use serde::Deserialize;
use serde_json::{Map, Value};
use url::{Origin, Url};

use crate::{
    config::variables::REFERENCE,
    crypto::secret::{Secret, SecretUrl},
};

/// The text that stands for a secret where a document is shown.
pub const REDACTED: &str = "[redacted]";

/// The key of the secrets that sign on for a while after a rotation: for each the secret, and the
/// time until which it signs. Clients cannot set it.
pub const RETIRING: &str = "retiring_secrets";

/// The most levels of a document; the deepest valid key has three.
const MAX_DEPTH: usize = 5;

/// A key of a document that is not valid.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wrong {
    /// With dots and indexes, such as `signatures[0].header`.
    pub field: String,
    /// What would be right, without secrets.
    pub detail: String,
}

/// The keys of a subscriber as a client gave them, in JSON. There are secrets in it.
#[derive(Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(transparent)]
pub struct Document(Map<String, Value>);

/// A secret that signs until a time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Retiring {
    pub secret: Secret,
    pub until: SystemTime,
}

impl fmt::Debug for Document {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(REDACTED)
    }
}

impl From<Map<String, Value>> for Document {
    fn from(keys: Map<String, Value>) -> Self {
        Self(keys)
    }
}

impl Document {
    /// Reads a stored document; `None` if it is no JSON object.
    pub fn parse(text: &Secret) -> Option<Self> {
        serde_json::from_str(text.expose()).ok().map(Self)
    }

    /// The document as it is stored.
    pub fn text(&self) -> Secret {
        Secret::new(Value::Object(self.0.clone()).to_string())
    }

    pub fn get(&self, key: &str) -> Option<&Value> {
        self.0.get(key)
    }

    pub fn set(&mut self, key: &str, value: Value) {
        self.0.insert(key.to_owned(), value);
    }

    pub fn take(&mut self, key: &str) -> Option<Value> {
        self.0.remove(key)
    }

    /// The names of its keys.
    pub fn keys(&self) -> Vec<String> {
        self.0.keys().cloned().collect()
    }

    /// The name, if the document has one that is a text.
    pub fn name(&self) -> Option<&str> {
        self.get("name")?.as_str()
    }

    /// The document after a merge patch (RFC 7396): a null removes a key.
    #[must_use]
    pub fn merged(&self, patch: &Self) -> Self {
        let mut merged = self.0.clone();
        merge(&mut merged, &patch.0);
        Self(merged)
    }

    /// The keys that are checked: with the secrets that still sign at `now`.
    pub(super) fn effective(&self, now: SystemTime) -> Map<String, Value> {
        let retiring = self.retiring();
        let mut keys = self.0.clone();
        keys.remove(RETIRING);
        let live = retiring.into_iter().filter(|r| r.until > now);
        let live: Vec<Value> = live.map(|r| r.secret.expose().into()).collect();
        if let Some(Value::Array(secrets)) = keys.get_mut("secrets") {
            secrets.extend(live);
        }
        keys
    }

    /// The secrets that sign on after a rotation, the latest first.
    pub fn retiring(&self) -> Vec<Retiring> {
        let read = |entry: &Value| {
            let until: jiff::Timestamp = entry.get("until")?.as_str()?.parse().ok()?;
            let secret = Secret::new(entry.get("secret")?.as_str()?);
            Some(Retiring { secret, until: until.try_into().ok()? })
        };
        let entries = self.get(RETIRING).and_then(Value::as_array);
        entries.into_iter().flatten().filter_map(read).collect()
    }

    /// The document without secrets, and without what hooktrail has added.
    pub fn redacted(&self) -> Value {
        let mut keys = self.0.clone();
        keys.remove(RETIRING);
        for (key, value) in &mut keys {
            match key.as_str() {
                "url" => redact_url(value),
                "secrets" | "signing_key" | "headers" => redact_leaves(value),
                "auth" => redact_auth(value),
                // A text is none; whatever else it was given is not shown.
                "redact_with" if !value.is_string() => redact_leaves(value),
                _ => {}
            }
        }
        Value::Object(keys)
    }

    /// The document with the values of `before` where it repeats what is shown of them: what was
    /// read can be written back.
    #[must_use]
    pub fn restored(&self, before: &Self) -> Self {
        let mut keys = Value::Object(self.0.clone());
        restore(&mut keys, &before.redacted(), &Value::Object(before.0.clone()));
        match keys {
            Value::Object(keys) => Self(keys),
            _ => self.clone(),
        }
    }

    /// The stored values that requests would carry to another origin than the one they were given for:
    /// headers and authentication of `before` that `given`, the client's words, does not give itself.
    pub fn carried_elsewhere(&self, given: &Self, before: &Self) -> Option<Carried> {
        let is_elsewhere = |place: &Place| self.target(place) != before.target(place);
        let by = [URL, TOKEN_URL].into_iter().find(is_elsewhere)?;
        let is_kept = |key: &str, path: &[&str]| {
            let own = self.at(key, path);
            own.is_some() && own == before.at(key, path) && own != given.at(key, path)
        };
        let headers = self.get("headers").and_then(Value::as_object);
        let headers = headers.into_iter().flat_map(Map::keys);
        let headers = headers.filter(|name| is_kept("headers", &[name.as_str()]));
        let headers = headers.map(|name| format!("headers.{name}"));
        // Of a token's endpoint nothing but the client's secret is known there.
        let to_receiver = by.key == URL.key;
        let auth = CREDENTIALS.iter().filter(|path| is_kept("auth", path));
        let auth = auth.map(|path| format!("auth.{}", path.join(".")));
        let all: Vec<String> = match to_receiver {
            true => headers.chain(auth).collect(),
            false => auth.filter(|key| key == CLIENT_SECRET).collect(),
        };
        (!all.is_empty()).then_some(Carried { by: by.key, keys: all })
    }

    fn at(&self, key: &str, path: &[&str]) -> Option<&Value> {
        path.iter().try_fold(self.get(key)?, |value, part| value.get(part))
    }

    /// Where requests to a URL go, if it has one there: to scheme, host and port. Of servers of
    /// tokens many share those, and the path says whose it is.
    fn target(&self, place: &Place) -> Option<(Origin, String)> {
        let url: Url = self.at(place.first, place.rest)?.as_str()?.trim().parse().ok()?;
        let path = if place.key == URL.key {
            String::new()
        } else {
            url[url::Position::BeforePath..].to_owned()
        };
        Some((url.origin(), path))
    }
}

fn merge(target: &mut Map<String, Value>, patch: &Map<String, Value>) {
    for (key, value) in patch {
        match value {
            Value::Null => drop(target.remove(key)),
            Value::Object(patch) => {
                let at = target.entry(key.clone()).or_insert_with(|| Map::new().into());
                if !at.is_object() {
                    *at = Map::new().into();
                }
                if let Value::Object(at) = at {
                    merge(at, patch);
                }
            }
            other => drop(target.insert(key.clone(), other.clone())),
        }
    }
}

/// Shows of a URL what no secret can be in.
fn redact_url(value: &mut Value) {
    let url = value.as_str().and_then(|text| text.parse().ok());
    let Some(url) = url.map(SecretUrl::new) else {
        *value = REDACTED.into();
        return;
    };
    // Also where nothing is left out, so that what is shown can be told from what was given.
    let is_whole = value.as_str() == Some(url.with_path().as_str());
    if !is_whole {
        let rest =
            if url.with_path().contains(REDACTED) { String::new() } else { format!("?{REDACTED}") };
        *value = format!("{}{rest}", url.with_path()).into();
    }
}

/// The places of secrets below `auth`.
const CREDENTIALS: [&[&str]; 3] =
    [&["bearer"], &["basic", "password"], &["oauth2", "client_secret"]];
const CLIENT_SECRET: &str = "auth.oauth2.client_secret";

/// The place of a URL in a document.
struct Place {
    key: &'static str,
    first: &'static str,
    rest: &'static [&'static str],
}

const URL: Place = Place { key: "url", first: "url", rest: &[] };
const TOKEN_URL: Place =
    Place { key: "auth.oauth2.token_url", first: "auth", rest: &["oauth2", "token_url"] };

/// Stored values that a changed URL would take to another origin.
#[derive(Debug, PartialEq, Eq)]
pub struct Carried {
    /// The key of that URL.
    pub by: &'static str,
    /// The keys of the values.
    pub keys: Vec<String>,
}

fn redact_leaves(value: &mut Value) {
    match value {
        Value::Array(items) => items.iter_mut().for_each(redact_leaves),
        Value::Object(entries) => entries.values_mut().for_each(redact_leaves),
        other => *other = REDACTED.into(),
    }
}

/// Hides everything but who it is for, and where tokens come from.
fn redact_auth(value: &mut Value) {
    const SHOWN: [&str; 5] = [
        "/basic/username",
        "/oauth2/token_url",
        "/oauth2/client_id",
        "/oauth2/scope",
        "/oauth2/audience",
    ];
    let shown = SHOWN.map(|path| value.pointer(path).filter(|text| text.is_string()).cloned());
    redact_leaves(value);
    for (path, shown) in SHOWN.into_iter().zip(shown) {
        if let (Some(at), Some(shown)) = (value.pointer_mut(path), shown) {
            *at = shown;
        }
    }
    if let Some(url) = value.pointer_mut("/oauth2/token_url") {
        redact_url(url);
    }
}

fn restore(value: &mut Value, shown: &Value, before: &Value) {
    match (value, shown, before) {
        (Value::Object(entries), Value::Object(shown), Value::Object(before)) => {
            for (key, value) in entries {
                if let (Some(shown), Some(before)) = (shown.get(key), before.get(key)) {
                    restore(value, shown, before);
                }
            }
        }
        (Value::Array(items), Value::Array(shown), Value::Array(before))
            if items.len() == shown.len() =>
        {
            let all = items.iter_mut().zip(shown).zip(before);
            all.for_each(|((value, shown), before)| restore(value, shown, before));
        }
        (value, shown, before) => {
            if value == shown {
                before.clone_into(value);
            }
        }
    }
}

/// What no document may have, whatever its keys mean.
pub(super) fn unsound(keys: &Map<String, Value>) -> Vec<Wrong> {
    let mut wrong = Vec::new();
    for (key, value) in keys {
        check(key, value, 1, &mut wrong);
    }
    let secrets = keys.get("secrets").and_then(Value::as_array).into_iter().flatten();
    let secrets = secrets.enumerate().map(|(n, value)| (format!("secrets[{n}]"), value));
    let auth = keys.get("auth");
    let auth = CREDENTIALS.iter().filter_map(|path| {
        let value = path.iter().try_fold(auth?, |value, part| value.get(part))?;
        Some((format!("auth.{}", path.join(".")), value))
    });
    let key = keys.get("signing_key").map(|value| ("signing_key".to_owned(), value));
    if keys.get("redact_with").is_some_and(|value| !value.is_string()) {
        let detail = "must be a text for a subscriber made over the API";
        wrong.push(Wrong { field: "redact_with".to_owned(), detail: detail.to_owned() });
    }
    for (field, value) in secrets.chain(auth).chain(key) {
        if value.as_str().is_some_and(|text| text.starts_with("file:")) {
            let detail =
                "no file is read for a subscriber made over the API; give the value itself";
            wrong.push(Wrong { field, detail: detail.to_owned() });
        }
    }
    wrong
}

fn check(field: &str, value: &Value, depth: usize, wrong: &mut Vec<Wrong>) {
    let mut report =
        |detail: &str| wrong.push(Wrong { field: field.to_owned(), detail: detail.to_owned() });
    if depth > MAX_DEPTH {
        return report("has more levels than any key has");
    }
    match value {
        Value::Null => report("is null; leave the key out"),
        Value::String(text) if text.contains(REFERENCE) => {
            report(
                "`${…}` is not replaced in a subscriber made over the API; give the value itself",
            );
        }
        Value::String(text) if text.contains(REDACTED) => {
            report(
                "stands for a value that is not shown, and differs from what is shown of it; give the value itself",
            );
        }
        Value::Array(items) => {
            for (n, item) in items.iter().enumerate() {
                check(&format!("{field}[{n}]"), item, depth + 1, wrong);
            }
        }
        Value::Object(entries) => {
            for (key, value) in entries {
                check(&format!("{field}.{key}"), value, depth + 1, wrong);
            }
        }
        Value::String(_) | Value::Bool(_) | Value::Number(_) => {}
    }
}

/// The keys as TOML, a line each.
pub(super) fn as_toml(keys: &Map<String, Value>) -> String {
    let mut out = String::new();
    for (key, value) in keys {
        // Writing to a string cannot fail.
        writeln!(out, "{} = {}", quoted(key), inline(value)).ok();
    }
    out
}

fn inline(value: &Value) -> String {
    let joined = |all: Vec<String>| all.join(", ");
    match value {
        // Refused before: TOML has no null.
        Value::Null => quoted(""),
        Value::String(text) => quoted(text),
        Value::Bool(_) | Value::Number(_) => value.to_string(),
        Value::Array(items) => format!("[{}]", joined(items.iter().map(inline).collect())),
        Value::Object(entries) => {
            let entry = |(key, value): (&String, &Value)| {
                let is_bare = !key.is_empty()
                    && key.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-'));
                let key = if is_bare { key.clone() } else { quoted(key) };
                format!("{key} = {}", inline(value))
            };
            format!("{{ {} }}", joined(entries.iter().map(entry).collect()))
        }
    }
}

/// A text of TOML, which has all escapes of JSON and lets nobody write DEL as it is.
fn quoted(text: &str) -> String {
    Value::from(text).to_string().replace('\u{7f}', "\\u007f")
}

/// The keys that stand first in a file, in this order.
const FIRST: [&str; 6] = ["name", "url", "events", "format", "secrets", "signatures"];

pub(super) fn as_file(name: &str, document: &Document) -> String {
    let variable = |what: &str| {
        let name = format!("{name}_{what}").to_ascii_uppercase();
        let name: String =
            name.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect();
        // A name of the environment does not begin with a digit.
        let prefix = if name.starts_with(|c: char| c.is_ascii_digit()) { "HOOK_" } else { "" };
        format!("${{{prefix}{name}}}")
    };
    let mut keys = document.0.clone();
    for own in [RETIRING, "start_paused"] {
        keys.remove(own);
    }
    let description = keys.remove("description");
    let url = document.get("url");
    let is_shown = url.and_then(Value::as_str).is_some_and(|text| !text.contains(REDACTED));
    if !is_shown || document.redacted().get("url") != url {
        keys.insert("url".to_owned(), variable("URL").into());
    }
    if let Some(Value::Array(secrets)) = keys.get_mut("secrets") {
        for (n, secret) in secrets.iter_mut().enumerate() {
            let what = if n == 0 { "SECRET".to_owned() } else { format!("SECRET_{}", n + 1) };
            *secret = variable(&what).into();
        }
    }
    if let Some(key) = keys.get_mut("signing_key") {
        *key = variable("SIGNING_KEY").into();
    }
    if let Some(Value::Object(headers)) = keys.get_mut("headers") {
        for (header, value) in headers {
            *value = variable(&format!("HEADER_{header}")).into();
        }
    }
    if let Some(auth) = keys.get_mut("auth") {
        for (path, what) in CREDENTIALS.iter().zip(["TOKEN", "PASSWORD", "CLIENT_SECRET"]) {
            if let Some(value) = auth.pointer_mut(&format!("/{}", path.join("/"))) {
                *value = variable(what).into();
            }
        }
        let shown = document.redacted();
        let hidden = |at: &Value| shown.pointer("/auth/oauth2/token_url") != Some(at);
        if let Some(url) = auth.pointer_mut("/oauth2/token_url").filter(|url| hidden(url)) {
            *url = variable("TOKEN_URL").into();
        }
    }
    let mut out = String::new();
    for line in description.iter().filter_map(Value::as_str).flat_map(str::lines) {
        writeln!(out, "# {}", line.escape_default()).ok();
    }
    out.push_str("[[subscriber]]\n");
    let known = |key: &String| FIRST.iter().position(|first| first == key).unwrap_or(FIRST.len());
    let mut order: Vec<&String> = keys.keys().collect();
    order.sort_by_key(|key| known(key));
    for key in order {
        writeln!(out, "{key} = {}", inline(&keys[key])).ok();
    }
    out
}

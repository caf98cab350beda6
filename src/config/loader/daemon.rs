//! `[store]`, `[history]`, `[admin]`, `[metrics]` and `[log]`.

use std::{
    net::{Ipv4Addr, SocketAddr},
    time::Duration,
};

use super::{policies, signing, tokens};
use crate::{
    config::{
        document::{Section, Value},
        keys,
        limits::MAX_SUBSCRIBERS,
        reader::Reader,
        settings::{
            AdminConfig, Config, HistoryConfig, LogConfig, MetricsConfig, PublicUrl, Reach,
            StoreConfig,
        },
    },
    crypto::seal::SealKey,
};

/// The most keys of the store: one seals, and the others are on their way out.
const MAX_STORE_KEYS: usize = 10;

const DEFAULT_RETENTION: Duration = Duration::from_secs(7 * 24 * 3600);

const DEFAULT_HISTORY_BYTES: u64 = 2 << 30;

/// Less would hold no more than minutes of events.
const LEAST_HISTORY_BYTES: u64 = 16 << 20;

const MOST_HISTORY_BYTES: u64 = 64 << 40;

/// Reads `[store]`: its kind, and its keys.
pub(in crate::config) fn store(
    reader: &Reader<'_>,
    root: &Section<'_>,
) -> Option<(StoreConfig, Vec<SealKey>)> {
    let section = match root.get("store") {
        Some(v) => Some(reader.section(&v, keys::STORE)?),
        None => None,
    };
    let get = |key| section.as_ref().and_then(|s| s.get(key));
    let url =
        reader.one_of(get("url"), &[("sqlite", StoreConfig::Sqlite), ("none", StoreConfig::None)]);
    let keys = match get("keys") {
        None => Some(Vec::new()),
        Some(v) => store_keys(reader, &v),
    };
    Some((url?, keys?))
}

fn store_keys(reader: &Reader<'_>, value: &Value<'_>) -> Option<Vec<SealKey>> {
    let items = reader.array(value)?;
    if items.is_empty() || items.len() > MAX_STORE_KEYS {
        reader.report(value, format!("must have 1 to {MAX_STORE_KEYS} keys, the one that seals first; leave it out, and one is made"));
        return None;
    }
    let read = |item: &Value<'_>| {
        let text = signing::secret(reader, item)?;
        SealKey::try_new(&text).map_err(|why| reader.report(item, why)).ok()
    };
    let keys: Vec<_> = items.iter().filter_map(read).collect();
    (keys.len() == items.len()).then_some(keys)
}

pub(in crate::config) fn history(reader: &Reader<'_>, root: &Section<'_>) -> Option<HistoryConfig> {
    let section = match root.get("history") {
        Some(v) => Some(reader.section(&v, keys::HISTORY)?),
        None => None,
    };
    let get = |key| section.as_ref().and_then(|s| s.get(key));
    let retention = reader.duration_or(get("retention"), DEFAULT_RETENTION.as_secs(), None);
    let max_bytes = match get("max_bytes") {
        None => Some(DEFAULT_HISTORY_BYTES),
        Some(v) => reader.size(&v, LEAST_HISTORY_BYTES..=MOST_HISTORY_BYTES),
    };
    let bodies = get("bodies").map_or(Some(true), |v| reader.bool(&v));
    Some(HistoryConfig { retention: retention?, max_bytes: max_bytes?, bodies: bodies? })
}

pub(in crate::config) fn admin(reader: &Reader<'_>, root: &Section<'_>) -> Option<AdminConfig> {
    let section = match root.get("admin") {
        Some(v) => Some(reader.section(&v, keys::ADMIN)?),
        None => None,
    };
    let get = |key| section.as_ref().and_then(|s| s.get(key));
    let listen = match get("listen") {
        None => Some(SocketAddr::from((Ipv4Addr::LOCALHOST, 8787))),
        Some(v) => reader.string(&v).and_then(|text| {
            let found = text.parse().ok();
            if found.is_none() {
                reader.report(&v, format!("`{text}` is not an address; write an IP address and a port such as \"127.0.0.1:8787\" or \"[::1]:8787\"; port 0 takes a free one"));
            }
            found
        }),
    };
    let token = match get("token") {
        None => Some(None),
        Some(v) => tokens::secret(reader, &v).map(Some),
    };
    let tokens = match get("tokens") {
        None => Some(Vec::new()),
        Some(v) => tokens::tokens(reader, &v, token.as_ref().and_then(Option::as_ref)),
    };
    let manage = reader.flag(get("manage"));
    let max_subscribers = match get("max_subscribers") {
        None => Some(None),
        Some(v) => {
            reader.integer(&v, 1..=MAX_SUBSCRIBERS).and_then(|n| n.try_into().ok()).map(Some)
        }
    };
    let api_subscribers = match get("api_subscribers") {
        None => Some(Reach::default()),
        Some(v) => policies::reach(reader, &v),
    };
    let public_url = match get("public_url") {
        None => Some(None),
        Some(v) => reader.string(&v).and_then(|text| {
            PublicUrl::try_new(&text).map_err(|why| reader.report(&v, why)).ok().map(Some)
        }),
    };
    let (listen, token, tokens, public_url) = (listen?, token?, tokens?, public_url?);
    if token.is_none()
        && tokens.is_empty()
        && let Some(v) = get("listen").filter(|_| !listen.ip().to_canonical().is_loopback())
    {
        reader.report(&v, format!("{listen} is not a loopback address, so others could publish events; set `token`, such as \"${{HOOKTRAIL_ADMIN_TOKEN}}\", or listen on \"127.0.0.1:8787\""));
        return None;
    }
    let manage = manage?;
    if let Some(v) = get("manage").filter(|_| manage && token.is_none() && tokens.is_empty()) {
        reader.report(&v, "needs a token: set `token`, such as \"${HOOKTRAIL_ADMIN_TOKEN}\"");
        return None;
    }
    Some(AdminConfig {
        listen,
        token,
        tokens,
        public_url,
        manage,
        max_subscribers: max_subscribers?,
        api_subscribers: api_subscribers?,
    })
}

/// Checks that there is a store for the subscribers that are made over the API.
pub(in crate::config) fn agree_on_management(
    reader: &Reader<'_>,
    root: &Section<'_>,
    config: &Config,
) -> Option<()> {
    if !config.admin.manage || config.store != StoreConfig::None {
        return Some(());
    }
    let admin = root.get("admin").and_then(|v| reader.section(&v, keys::ADMIN))?;
    reader.report(
        &admin.get("manage")?,
        "needs a store, and [store] url is \"none\"; make that \"sqlite\"",
    );
    None
}

pub(in crate::config) fn metrics(reader: &Reader<'_>, root: &Section<'_>) -> Option<MetricsConfig> {
    let section = match root.get("metrics") {
        Some(v) => Some(reader.section(&v, keys::METRICS)?),
        None => None,
    };
    let per_subscriber = match section.as_ref().and_then(|s| s.get("per_subscriber")) {
        Some(v) => Some(reader.bool(&v)?),
        None => None,
    };
    Some(MetricsConfig { per_subscriber })
}

pub(in crate::config) fn log(reader: &Reader<'_>, root: &Section<'_>) -> Option<LogConfig> {
    let section = match root.get("log") {
        Some(v) => Some(reader.section(&v, keys::LOG)?),
        None => None,
    };
    let get = |key| section.as_ref().and_then(|s| s.get(key));
    let json = reader.one_of(get("format"), &[("text", false), ("json", true)]);
    let level = reader.one_of(
        get("level"),
        &[
            ("info", tracing::Level::INFO),
            ("error", tracing::Level::ERROR),
            ("warn", tracing::Level::WARN),
            ("debug", tracing::Level::DEBUG),
            ("trace", tracing::Level::TRACE),
        ],
    );
    Some(LogConfig { json: json?, level: level? })
}

//! `start_from` of a subscriber.

use std::time::SystemTime;

use crate::config::{
    document::{Section, Value},
    reader::Reader,
    settings::{Backend, HistoryConfig, QueueConfig, StoreConfig},
    subscriber::StartFrom,
};

/// Why nothing of history can be sent again with this configuration, and the remedy; `None` if it
/// can, or if a part could not be read, which is reported already.
pub(super) fn forbidden(
    queue: Option<&QueueConfig>,
    store: Option<StoreConfig>,
    history: Option<HistoryConfig>,
) -> Option<&'static str> {
    let (queue, store, history) = (queue?, store?, history?);
    let is_embedded = matches!(queue.backend, Backend::Embedded);
    Some(if store == StoreConfig::None {
        "needs the events of history, and [store] url is \"none\"; set that to \"sqlite\", or leave `start_from` out"
    } else if history.retention.is_zero() {
        "needs the events of history, and [history] retention is \"0s\"; set that to a time such as \"7d\", or leave `start_from` out"
    } else if is_embedded && queue.embedded.retention.is_zero() {
        "needs the events of history, and [queue] retention is \"0s\"; set that to a time such as \"7d\", or leave `start_from` out"
    } else if !history.bodies {
        "needs the bytes of events, and [history] bodies is false; set that to true, or leave `start_from` out"
    } else {
        return None;
    })
}

pub(super) fn start_from(
    reader: &Reader<'_>,
    section: &Section<'_>,
    forbidden: Option<&'static str>,
) -> Option<Option<StartFrom>> {
    let Some(value) = section.get("start_from") else { return Some(None) };
    let found = read(reader, &value);
    if let Some(why) = forbidden {
        reader.report(&value, why);
        return None;
    }
    found.map(Some)
}

fn read(reader: &Reader<'_>, value: &Value<'_>) -> Option<StartFrom> {
    let text = reader.string(value)?;
    let text = text.trim();
    let found = match text.strip_prefix('-') {
        Some(ago) => humantime::parse_duration(ago).ok().map(StartFrom::Before),
        // A time in the future is no mistake: the clock of a machine that starts may be behind.
        None => absolute(text).map(StartFrom::At),
    };
    if found.is_none() {
        reader.report(
            value,
            format!(
                "`{text}` is not a begin; write a time before the subscriber is new, such as \"-7d\", or a point in time with its zone, such as \"2026-01-31T12:00:00Z\""
            ),
        );
    }
    found
}

/// A point in time as RFC 3339, not before 1970.
fn absolute(text: &str) -> Option<SystemTime> {
    let at = text.parse::<jiff::Timestamp>().ok()?;
    SystemTime::try_from(at).ok().filter(|at| *at >= SystemTime::UNIX_EPOCH)
}

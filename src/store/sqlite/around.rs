//! What belongs to events and deliveries: who wanted what, what is missing, how far history reaches.

use std::{collections::BTreeMap, ops::ControlFlow, time::SystemTime};

use rusqlite::{Connection, OptionalExtension as _, Row, params};

use super::{
    chunk::{self, Chunk},
    deliveries,
    fault::{Fault, millis, time},
    source::{Found, Source},
};
use crate::{
    clock,
    config::HistoryConfig,
    delivery::SubscriberName,
    event::{Pattern, Tenant, audience::Interest},
    store::{EventNumber, Gap, Reach, Subscription},
    wording,
};

/// Milliseconds between two gaps of one cause that are one gap.
const ADJOINING: i64 = 10_000;

/// The most gaps: with more, the oldest ones of a kind become one.
const MAX_GAPS: i64 = 200;

/// A single value that is kept.
pub(super) fn get(db: &Connection, key: &str) -> rusqlite::Result<Option<i64>> {
    db.prepare_cached("SELECT value FROM meta WHERE key = ?1")?
        .query_row([key], |row| row.get(0))
        .optional()
}

/// The id of the store, which is made when it is first asked for.
pub(super) fn store_id(db: &Connection) -> rusqlite::Result<String> {
    if let Some(id) = get_text(db, "id")? {
        return Ok(id);
    }
    let id = clock::store_id();
    set(db, "id", &id)?;
    Ok(id)
}

pub(super) fn get_text(db: &Connection, key: &str) -> rusqlite::Result<Option<String>> {
    db.prepare_cached("SELECT value FROM meta WHERE key = ?1")?
        .query_row([key], |row| row.get(0))
        .optional()
}

pub(super) fn set(db: &Connection, key: &str, value: impl rusqlite::ToSql) -> rusqlite::Result<()> {
    db.execute("INSERT OR REPLACE INTO meta (key, value) VALUES (?1, ?2)", params![key, value])
        .map(drop)
}

/// Returns whether it was set.
pub(super) fn remove(db: &Connection, key: &str) -> rusqlite::Result<bool> {
    db.execute("DELETE FROM meta WHERE key = ?1", [key]).map(|rows| rows > 0)
}

/// Records what subscribers are to get from now on.
pub(super) fn subscribed(
    db: &Connection,
    all: &[(SubscriberName, Interest)],
    now: i64,
) -> rusqlite::Result<()> {
    let texts = all.iter().map(|(name, Interest { patterns, tenant })| {
        let patterns: Vec<&str> = patterns.iter().map(Pattern::as_str).collect();
        let patterns = serde_json::Value::from(patterns).to_string();
        (name.as_str(), (patterns, tenant.as_ref().map(Tenant::to_string)))
    });
    let mut wanted: BTreeMap<&str, (String, Option<String>)> = texts.collect();
    let held: Vec<(i64, String, (String, Option<String>))> = db
        .prepare("SELECT id, subscriber, patterns, tenant FROM subscription WHERE until IS NULL")?
        .query_map([], |row| Ok((row.get(0)?, row.get(1)?, (row.get(2)?, row.get(3)?))))?
        .collect::<rusqlite::Result<_>>()?;
    for (id, name, held) in held {
        if wanted.get(name.as_str()) == Some(&held) {
            wanted.remove(name.as_str());
        } else {
            db.execute("UPDATE subscription SET until = ?2 WHERE id = ?1", [id, now])?;
        }
    }
    for (name, (patterns, tenant)) in wanted {
        db.execute(
            "INSERT INTO subscription (subscriber, patterns, tenant, since) VALUES (?1, ?2, ?3, ?4)",
            params![name, patterns, tenant, now],
        )?;
    }
    Ok(())
}

pub(super) fn subscriptions(db: &Connection, horizon: i64) -> rusqlite::Result<Vec<Subscription>> {
    let read = |row: &Row<'_>| {
        let patterns: Vec<String> =
            serde_json::from_str(row.get_ref(1)?.as_str()?).unwrap_or_default();
        let patterns = patterns.iter().filter_map(|p| Pattern::try_new(p).ok()).collect();
        let Ok(subscriber) = SubscriberName::try_new(row.get_ref(0)?.as_str()?) else {
            return Ok(None);
        };
        let (from, until) = (time(row.get(2)?), row.get::<_, Option<i64>>(3)?.map(time));
        let tenant = row.get_ref(4)?.as_str_or_null()?.and_then(Tenant::try_new);
        Ok(Some(Subscription { subscriber, interest: Interest { patterns, tenant }, from, until }))
    };
    db.prepare_cached(
        "SELECT subscriber, patterns, since, until, tenant FROM subscription WHERE until IS NULL OR until >= ?1 ORDER BY since, id",
    )?
    .query_map([horizon], read)?
    .filter_map(rusqlite::Result::transpose)
    .collect()
}

/// Records a gap from the latest change of a delivery on: the process that made the later ones has
/// not recorded them.
pub(super) fn lack_the_last(db: &Connection, why: String, now: SystemTime) -> rusqlite::Result<()> {
    let since = match get(db, deliveries::RECORDED)? {
        Some(recorded) => recorded,
        None => get(db, "begun")?.unwrap_or(0),
    };
    let (from, until) = (time(since).min(now), now);
    add_gap(db, &Gap { from, until, what: "deliveries", why, missing: None })
}

/// Adds a gap; one that adjoins others of its cause becomes one with them.
pub(super) fn add_gap(db: &Connection, gap: &Gap) -> rusqlite::Result<()> {
    let (mut since, mut until) = (millis(gap.from), millis(gap.until).max(millis(gap.from)));
    let mut missing = gap.missing.map(|n| i64::try_from(n).unwrap_or(i64::MAX));
    let near: Vec<(i64, i64, i64, Option<i64>)> = db
        .prepare_cached(
            "SELECT id, since, until, missing FROM gap WHERE what = ?1 AND why = ?2 AND since <= ?4 AND until >= ?3",
        )?
        .query_map(
            params![gap.what, gap.why, since.saturating_sub(ADJOINING), until.saturating_add(ADJOINING)],
            |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?)),
        )?
        .collect::<rusqlite::Result<_>>()?;
    for (id, from, to, lacks) in near {
        since = since.min(from);
        until = until.max(to);
        missing = missing.zip(lacks).map(|(a, b)| a.saturating_add(b));
        db.execute("DELETE FROM gap WHERE id = ?1", [id])?;
    }
    db.execute(
        "INSERT INTO gap (what, since, until, why, missing) VALUES (?1, ?2, ?3, ?4, ?5)",
        params![gap.what, since, until, gap.why, missing],
    )?;
    join_oldest(db, gap.what)
}

/// Joins the two oldest gaps of a kind if there are too many.
fn join_oldest(db: &Connection, what: &str) -> rusqlite::Result<()> {
    let count: i64 =
        db.query_row("SELECT count(*) FROM gap WHERE what = ?1", [what], |row| row.get(0))?;
    if count <= MAX_GAPS {
        return Ok(());
    }
    let oldest: Vec<(i64, i64, i64)> = db
        .prepare("SELECT id, since, until FROM gap WHERE what = ?1 ORDER BY since LIMIT 2")?
        .query_map([what], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))?
        .collect::<rusqlite::Result<_>>()?;
    if let [(first, _, until), (second, _, later)] = oldest[..] {
        db.execute("DELETE FROM gap WHERE id = ?1", [second])?;
        db.execute(
            "UPDATE gap SET until = ?2, why = 'several causes', missing = NULL WHERE id = ?1",
            [first, until.max(later)],
        )?;
    }
    Ok(())
}

fn gaps(db: &Connection, horizon: i64) -> rusqlite::Result<Vec<Gap>> {
    let read = |row: &Row<'_>| {
        Ok(Gap {
            what: match row.get_ref(0)?.as_str()? {
                "deliveries" => "deliveries",
                _ => "events",
            },
            from: time(row.get(1)?),
            until: time(row.get(2)?),
            why: row.get(3)?,
            missing: row.get::<_, Option<i64>>(4)?.and_then(|n| u64::try_from(n).ok()),
        })
    };
    db.prepare_cached(
        "SELECT what, since, until, why, missing FROM gap WHERE until >= ?1 ORDER BY since, id",
    )?
    .query_map([horizon], read)?
    .collect()
}

/// How far history reaches.
pub(super) fn reach(
    db: &Connection,
    source: &mut Source<'_>,
    config: &HistoryConfig,
    horizon: i64,
) -> Result<Reach, Fault> {
    let mut chunks = Chunk::list(db)?;
    let last = last(db, source, chunks.first(), horizon)?;
    chunks.retain(|chunk| chunk.max_at >= horizon);
    let oldest = match chunks.last() {
        Some(chunk) => first_event(db, source, chunk)?,
        None => None,
    };
    let (deliveries_from, deliveries) = deliveries::extent(db)?;
    let shown = |at: i64| time(at.max(horizon));
    Ok(Reach {
        events_from: oldest.map(|(at, _)| shown(at)),
        deliveries_from: deliveries_from.map(shown),
        why: why(db, config, horizon, oldest.is_some_and(|(_, is_first)| !is_first))?,
        last,
        gaps: gaps(db, horizon)?,
        bytes: u64::try_from(file_bytes(db)?.0).unwrap_or(0),
        events: u64::try_from(chunks.iter().map(|chunk| chunk.events).sum::<i64>()).unwrap_or(0),
        deliveries,
    })
}

/// The last event that was ever added, also if it was removed: then the latest time that it can have.
fn last(
    db: &Connection,
    source: &mut Source<'_>,
    latest: Option<&Chunk>,
    horizon: i64,
) -> Result<Option<(EventNumber, SystemTime)>, Fault> {
    let last = chunk::last_event(db)?;
    let at = match latest.filter(|chunk| chunk.last == last) {
        Some(chunk) => match source.event(db, chunk, last)? {
            Some(row) => row.at,
            // The log has deleted it.
            None => time(chunk.max_at),
        },
        None => time(horizon),
    };
    Ok((last > 0).then_some((EventNumber(last), at)))
}

/// The time of the first event of a chunk that is still there, and whether it is the chunk's first.
fn first_event(
    db: &Connection,
    source: &mut Source<'_>,
    chunk: &Chunk,
) -> Result<Option<(i64, bool)>, Fault> {
    let mut first = None;
    let mut each = |found: Found<'_>| {
        first = Some((found.at()?, found.number()? == chunk.first));
        Ok(ControlFlow::Break(()))
    };
    let _ends = source.range(db, chunk, (chunk.first, i64::MAX), &mut each)?;
    Ok(first)
}

/// Why history begins where it does.
fn why(
    db: &Connection,
    config: &HistoryConfig,
    horizon: i64,
    is_cut_by_log: bool,
) -> rusqlite::Result<String> {
    let begun = get(db, "begun")?.unwrap_or(0);
    let cut_at = get(db, "cut_at")?;
    if is_cut_by_log {
        return Ok(format!(
            "retention of the embedded queue, or of {}",
            wording::span(config.retention)
        ));
    }
    if cut_at.is_some_and(|at| at > horizon) {
        let bytes = usize::try_from(config.max_bytes).unwrap_or(usize::MAX);
        return Ok(format!("max_bytes of {}", wording::size(bytes)));
    }
    if begun < horizon {
        return Ok(format!("retention of {}", wording::span(config.retention)));
    }
    let on = clock::rfc3339_seconds(time(begun));
    Ok(match get_text(db, "begun_because")? {
        Some(because) => format!("history began on {on}: {because}"),
        None => format!("history began on {on}"),
    })
}

/// Bytes of the file, and of it those in use.
pub(super) fn file_bytes(db: &Connection) -> rusqlite::Result<(i64, i64)> {
    let pragma = |name| db.pragma_query_value(None, name, |row| row.get::<_, i64>(0));
    let (size, pages, free) =
        (pragma("page_size")?, pragma("page_count")?, pragma("freelist_count")?);
    Ok((pages.saturating_mul(size), (pages - free).saturating_mul(size)))
}

/// Removes a little of what is too old or too much; true if there may be more. Events after
/// `spared` are not too old, and may be twice as many.
pub(super) fn trim(
    db: &Connection,
    log: &mut Source<'_>,
    config: &HistoryConfig,
    spared: Option<i64>,
    now: SystemTime,
) -> Result<bool, Fault> {
    let horizon = horizon(config, now);
    let log_from = match log {
        Source::Log(log, _) => log.bounds()?.map(|(first, _)| first),
        Source::Tables => None,
    };
    let oldest = Chunk::oldest(db)?;
    if let Some(chunk) = &oldest {
        let is_gone = log_from.is_some_and(|EventNumber(first)| chunk.last < first);
        let is_spared = spared.is_some_and(|after| chunk.last > after);
        if (chunk.max_at < horizon && !is_spared) || is_gone {
            chunk.remove(db)?;
            return Ok(true);
        }
    }
    let (_, used) = file_bytes(db)?;
    // A replay keeps its rows beyond the limit, but not without a limit: it may wait for long.
    let replayed = oldest.as_ref().zip(spared).is_some_and(|(chunk, after)| chunk.last > after);
    let max = i64::try_from(config.max_bytes).unwrap_or(i64::MAX);
    let max = if replayed { max.saturating_mul(2) } else { max };
    // A chunk's worth of room: the file must not grow beyond its limit until the next call.
    if used > max - max / 16 {
        let (begun, _) = deliveries::extent(db)?;
        return match oldest {
            Some(chunk) if begun.is_none_or(|begun| chunk.begun <= begun) => {
                set(db, "cut_at", chunk.max_at)?;
                chunk.remove(db)?;
                Ok(true)
            }
            _ => Ok(deliveries::trim(db, horizon, true)? > 0),
        };
    }
    db.prepare_cached("DELETE FROM subscription WHERE until < ?1")?.execute([horizon])?;
    db.prepare_cached("DELETE FROM gap WHERE until < ?1")?.execute([horizon])?;
    Ok(deliveries::trim(db, horizon, false)? == deliveries::TRIMMED)
}

/// The oldest time that is shown, in Unix milliseconds.
pub(super) fn horizon(config: &HistoryConfig, now: SystemTime) -> i64 {
    now.checked_sub(config.retention).map_or(0, millis)
}

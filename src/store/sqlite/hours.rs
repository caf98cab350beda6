//! How many events each hour has. The hours are counted while events are added, so that ten million
//! events are counted by reading some hundred rows.

use std::collections::BTreeMap;

use rusqlite::{Connection, params};

use super::{
    chunk::Chunk,
    fault::{millis, time},
};
use crate::store::EventCounts;

/// Milliseconds of an hour.
pub(super) const HOUR: i64 = 3_600_000;

/// The most hours of a chunk. Producers choose the times of events, and could fill the file with them.
const MAX_HOURS: i64 = 200;

/// Events that are added to a chunk, by their hours since 1970.
#[derive(Debug, Default)]
pub(super) struct Hours(BTreeMap<i64, i64>);

impl Hours {
    /// Counts an event of a time in Unix milliseconds.
    pub(super) fn add(&mut self, at: i64) {
        *self.0.entry(at.div_euclid(HOUR)).or_default() += 1;
    }

    pub(super) fn save(self, db: &Connection, chunk: i64) -> rusqlite::Result<()> {
        let mut known = db.prepare_cached(
            "UPDATE event_hour SET events = events + ?3 WHERE chunk = ?1 AND hour = ?2",
        )?;
        for (hour, events) in self.0 {
            if known.execute([chunk, hour, events])? == 0 {
                db.prepare_cached(
                    "INSERT INTO event_hour (chunk, hour, events) SELECT ?1, ?2, ?3
                     WHERE (SELECT count(*) FROM event_hour WHERE chunk = ?1) < ?4",
                )?
                .execute(params![chunk, hour, events, MAX_HOURS])?;
            }
        }
        Ok(())
    }
}

/// Counts all events of some hours, the first one given in Unix milliseconds.
pub(super) fn of_all(db: &Connection, since: i64, hours: usize) -> rusqlite::Result<EventCounts> {
    let first = since.div_euclid(HOUR);
    let until = since.saturating_add(HOUR.saturating_mul(i64::try_from(hours).unwrap_or(i64::MAX)));
    let mut counts = EventCounts { hours: vec![0; hours], uncounted: None };
    let mut counted: BTreeMap<i64, i64> = BTreeMap::new();
    let mut statement = db.prepare_cached("SELECT chunk, hour, events FROM event_hour")?;
    let mut rows = statement.query([])?;
    while let Some(row) = rows.next()? {
        let (chunk, hour, events): (i64, i64, i64) = (row.get(0)?, row.get(1)?, row.get(2)?);
        *counted.entry(chunk).or_default() += events;
        let at = usize::try_from(hour.saturating_sub(first)).ok();
        if let Some(count) = at.and_then(|at| counts.hours.get_mut(at)) {
            *count += events.unsigned_abs();
        }
    }
    for chunk in Chunk::list(db)? {
        let is_whole = counted.get(&chunk.id).copied().unwrap_or(0) >= chunk.events;
        if is_whole || chunk.max_at < since || chunk.min_at >= until {
            continue;
        }
        let (from, to) = (chunk.min_at.max(since), chunk.max_at.min(until));
        let (from, to) = match counts.uncounted {
            Some((before, after)) => (from.min(millis(before)), to.max(millis(after))),
            None => (from, to),
        };
        counts.uncounted = Some((time(from), time(to)));
    }
    Ok(counts)
}

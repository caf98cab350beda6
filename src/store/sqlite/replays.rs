//! Replays, operations, and which subscribers were ever configured: in the precious file.

use std::{
    collections::BTreeSet,
    time::{Instant, SystemTime},
};

use rusqlite::{Connection, OptionalExtension as _, Row, params, types::FromSql};
use serde::{Deserialize, Serialize};

use super::{
    chunk::Chunk,
    fault::{Fault, millis, time},
    source::Source,
};
use crate::{
    clock,
    delivery::{BatchId, SubscriberName},
    event::{Pattern, Tenant, entry::Metadata, payload::Format},
    store::{
        Added, BatchEnds, Changed, EventNumber, Extent, Introduced, MAX_OPERATIONS, MAX_REPLAYS,
        MAX_RUNNING, NewOperation, Newcomer, Operation, Page, Recorded, Replay, ReplayChange,
        ReplayOrder, ReplayProgress, ReplayState, RequestKey, UnreadableReplay,
    },
};

/// A [`ReplayOrder`] as it is stored.
#[derive(Serialize, Deserialize)]
struct StoredOrder {
    by: String,
    since: i64,
    until: Option<i64>,
    patterns: Vec<String>,
    /// Records of an earlier version have none.
    #[serde(default)]
    tenant: Option<String>,
    events: Option<String>,
    after: i64,
    rate: Option<u32>,
    /// Of a version that knew two formats.
    is_lines: bool,
    #[serde(default)]
    format: Option<String>,
    #[serde(default)]
    metadata: StoredMetadata,
    max_events: usize,
    max_bytes: usize,
    event_ids: bool,
    bound_at: Option<i64>,
}

/// A [`Metadata`] as it is stored.
#[derive(Default, Serialize, Deserialize)]
struct StoredMetadata {
    source: Option<String>,
    sourcetype: Option<String>,
    index: Option<String>,
}

impl From<Metadata> for StoredMetadata {
    fn from(Metadata { source, sourcetype, index }: Metadata) -> Self {
        Self { source, sourcetype, index }
    }
}

impl From<StoredMetadata> for Metadata {
    fn from(StoredMetadata { source, sourcetype, index }: StoredMetadata) -> Self {
        Self { source, sourcetype, index }
    }
}

impl From<&ReplayOrder> for StoredOrder {
    fn from(o: &ReplayOrder) -> Self {
        let text = |pattern: &Pattern| pattern.as_str().to_owned();
        Self {
            by: o.by.clone(),
            since: millis(o.since),
            until: o.until.map(millis),
            patterns: o.patterns.iter().map(text).collect(),
            tenant: o.tenant.as_ref().map(Tenant::to_string),
            events: o.events.as_ref().map(text),
            after: o.after.0,
            rate: o.rate,
            is_lines: o.format == Format::JsonLines,
            format: Some(o.format.name().to_owned()),
            metadata: o.metadata.clone().into(),
            max_events: o.max_events,
            max_bytes: o.max_bytes,
            event_ids: o.event_ids,
            bound_at: o.bound_at.map(millis),
        }
    }
}

impl TryFrom<StoredOrder> for ReplayOrder {
    /// A pattern or a tenant that is none.
    type Error = String;

    fn try_from(o: StoredOrder) -> Result<Self, String> {
        let patterns: Result<_, _> = o.patterns.iter().map(|text| Pattern::try_new(text)).collect();
        // One that cannot be read must not become the events of all.
        let tenant =
            |text: String| Tenant::try_new(&text).ok_or_else(|| format!("`{text}` is no tenant"));
        let named = |name: String| {
            let found = Format::ALL.into_iter().find(|format| format.name() == name);
            found.ok_or_else(|| format!("`{name}` is no format"))
        };
        let format = match o.format {
            Some(name) => named(name)?,
            None if o.is_lines => Format::JsonLines,
            None => Format::Json,
        };
        Ok(Self {
            by: o.by,
            since: time(o.since),
            until: o.until.map(time),
            patterns: patterns?,
            tenant: o.tenant.map(tenant).transpose()?,
            events: o.events.map(|text| Pattern::try_new(&text)).transpose()?,
            after: EventNumber(o.after),
            rate: o.rate,
            format,
            metadata: o.metadata.into(),
            max_events: o.max_events,
            max_bytes: o.max_bytes,
            event_ids: o.event_ids,
            bound_at: o.bound_at.map(time),
        })
    }
}

/// A [`ReplayProgress`] as it is stored.
#[derive(Serialize, Deserialize)]
struct StoredProgress {
    position: i64,
    upto: i64,
    rows: u64,
    read: u64,
    matched: u64,
    enqueued: u64,
    batches: u64,
    unusable: u64,
    missing: u64,
    /// Records of an earlier version have no ends.
    #[serde(default)]
    delivered: u64,
    #[serde(default)]
    dead: u64,
    #[serde(default)]
    split: u64,
    unfinished: Vec<String>,
}

impl From<&ReplayProgress> for StoredProgress {
    fn from(p: &ReplayProgress) -> Self {
        Self {
            position: p.position.0,
            upto: p.upto.0,
            rows: p.rows,
            read: p.read,
            matched: p.matched,
            enqueued: p.enqueued,
            batches: p.batches,
            unusable: p.unusable,
            missing: p.missing,
            delivered: p.ends.delivered,
            dead: p.ends.dead,
            split: p.ends.split,
            unfinished: p.unfinished.iter().map(|id| id.as_str().to_owned()).collect(),
        }
    }
}

impl From<StoredProgress> for ReplayProgress {
    fn from(p: StoredProgress) -> Self {
        Self {
            position: EventNumber(p.position),
            upto: EventNumber(p.upto),
            rows: p.rows,
            read: p.read,
            matched: p.matched,
            enqueued: p.enqueued,
            batches: p.batches,
            unusable: p.unusable,
            missing: p.missing,
            ends: BatchEnds { delivered: p.delivered, dead: p.dead, split: p.split },
            unfinished: p.unfinished.into_iter().map(BatchId::from).collect(),
        }
    }
}

const COLUMNS: &str = "row, id, subscriber, state, why, created_at, changed_at, ordered, progress";

/// Reads a record. One that cannot be read must not hide the others.
fn read(row: &Row<'_>) -> rusqlite::Result<Recorded> {
    let why = match readable(row) {
        Ok(replay) => return Ok(Ok(replay)),
        Err(why) => why,
    };
    fn get<T: FromSql + Default>(row: &Row<'_>, n: usize) -> T {
        row.get(n).unwrap_or_default()
    }
    let id: String = get(row, 1);
    let why = format!(
        "its record cannot be read: {why}; if a later version of hooktrail made it, start that one; \
         `hooktrail replay cancel {id}` ends it"
    );
    Ok(Err(Box::new(UnreadableReplay {
        row: row.get(0)?,
        id,
        subscriber: get(row, 2),
        state: get(row, 3),
        created_at: time(get(row, 5)),
        changed_at: time(get(row, 6)),
        why,
    })))
}

fn readable(row: &Row<'_>) -> Result<Replay, String> {
    fn get<T: FromSql>(row: &Row<'_>, n: usize) -> Result<T, String> {
        row.get(n).map_err(|e| e.to_string())
    }
    let [name, state, order, progress]: [String; 4] =
        [get(row, 2)?, get(row, 3)?, get(row, 7)?, get(row, 8)?];
    let order: StoredOrder = serde_json::from_str(&order).map_err(|e| format!("order: {e}"))?;
    let progress: StoredProgress =
        serde_json::from_str(&progress).map_err(|e| format!("progress: {e}"))?;
    Ok(Replay {
        row: get(row, 0)?,
        id: get(row, 1)?,
        subscriber: SubscriberName::try_new(&name).map_err(|e| format!("subscriber: {e}"))?,
        state: ReplayState::read(&state, get(row, 4)?)
            .ok_or_else(|| format!("no state is called `{state}`"))?,
        created_at: time(get(row, 5)?),
        changed_at: time(get(row, 6)?),
        order: order.try_into()?,
        progress: progress.into(),
    })
}

const fn row_of(recorded: &Recorded) -> i64 {
    match recorded {
        Ok(replay) => replay.row,
        Err(unreadable) => unreadable.row,
    }
}

fn json(value: &impl Serialize) -> rusqlite::Result<String> {
    serde_json::to_string(value).map_err(|e| rusqlite::Error::ToSqlConversionFailure(e.into()))
}

pub(super) fn add(
    db: &Connection,
    replay: &Replay,
    key: Option<&RequestKey>,
) -> rusqlite::Result<Added> {
    if let Some(key) = key
        && let Some(before) = made_with(db, key)?
    {
        return Ok(before);
    }
    let running = running(db)?;
    if running.len() >= MAX_RUNNING {
        return Ok(Added::TooMany(running));
    }
    insert(db, replay)?;
    if let Some(RequestKey { by, key, sha256 }) = key {
        db.prepare_cached("INSERT INTO request (by, key, sha256, replay) VALUES (?1, ?2, ?3, ?4)")?
            .execute(params![by, key, sha256, replay.id])?;
    }
    Ok(Added::New)
}

/// The result of a request whose key was given before.
fn made_with(db: &Connection, key: &RequestKey) -> rusqlite::Result<Option<Added>> {
    let known: Option<(Vec<u8>, String)> = db
        .prepare_cached("SELECT sha256, replay FROM request WHERE by = ?1 AND key = ?2")?
        .query_row([&key.by, &key.key], |row| Ok((row.get(0)?, row.get(1)?)))
        .optional()?;
    let Some((sha256, id)) = known else { return Ok(None) };
    let made = one(db, &id)?.filter(|_| sha256 == key.sha256);
    Ok(Some(made.map_or(Added::OtherRequest, |made| Added::Before(Box::new(made)))))
}

fn insert(db: &Connection, replay: &Replay) -> rusqlite::Result<()> {
    db.prepare_cached(
        "INSERT INTO replay (id, subscriber, state, why, created_at, changed_at, position, ordered, progress) \
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9)",
    )?
    .execute(params![
        replay.id,
        replay.subscriber.as_str(),
        replay.state.name(),
        replay.state.why(),
        millis(replay.created_at),
        millis(replay.changed_at),
        replay.progress.position.0,
        json(&StoredOrder::from(&replay.order))?,
        json(&StoredProgress::from(&replay.progress))?
    ])?;
    let oldest = db.last_insert_rowid() - MAX_REPLAYS;
    let ended = "row <= ?1 AND state <> 'running'";
    db.prepare_cached(&format!(
        "DELETE FROM request WHERE replay IN (SELECT id FROM replay WHERE {ended})"
    ))?
    .execute([oldest])?;
    db.prepare_cached(&format!("DELETE FROM replay WHERE {ended}"))?.execute([oldest]).map(drop)
}

pub(super) fn change(
    db: &Connection,
    id: &str,
    change: ReplayChange,
    now: SystemTime,
) -> rusqlite::Result<Option<Changed>> {
    let Some(found) = one(db, id)? else { return Ok(None) };
    let mut replay = match found {
        Ok(replay) => replay,
        Err(unreadable) if change == ReplayChange::Cancelled && unreadable.state == "running" => {
            db.prepare_cached("UPDATE replay SET state = ?2, changed_at = ?3 WHERE id = ?1")?
                .execute(params![id, ReplayState::Cancelled.name(), millis(now)])?;
            return Ok(one(db, id)?.map(|it| Changed::Yes(Box::new(it))));
        }
        Err(unreadable) => return Ok(Some(Changed::No(Box::new(Err(unreadable))))),
    };
    let goes_on = change == ReplayChange::Continued;
    if !replay.apply(change, now) {
        return Ok(Some(Changed::No(Box::new(Ok(replay)))));
    }
    if goes_on {
        let running = running(db)?;
        if running.len() >= MAX_RUNNING {
            return Ok(Some(Changed::TooMany(running)));
        }
    }
    db.prepare_cached(
        "UPDATE replay SET state = ?2, why = ?3, changed_at = ?4, position = ?5, progress = ?6 WHERE id = ?1",
    )?
    .execute(params![
        id,
        replay.state.name(),
        replay.state.why(),
        millis(replay.changed_at),
        replay.progress.position.0,
        json(&StoredProgress::from(&replay.progress))?
    ])?;
    Ok(Some(Changed::Yes(Box::new(Ok(replay)))))
}

pub(super) fn one(db: &Connection, id: &str) -> rusqlite::Result<Option<Recorded>> {
    db.prepare_cached(&format!("SELECT {COLUMNS} FROM replay WHERE id = ?1"))?
        .query_row([id], read)
        .optional()
}

pub(super) fn list(
    db: &Connection,
    before: Option<i64>,
    limit: usize,
) -> rusqlite::Result<Page<Recorded>> {
    let sql = format!("SELECT {COLUMNS} FROM replay WHERE row < ?1 ORDER BY row DESC LIMIT ?2");
    let rows = db
        .prepare_cached(&sql)?
        .query_map(params![before.unwrap_or(i64::MAX), ask_for(limit)], read)?
        .collect::<rusqlite::Result<Vec<_>>>()?;
    Ok(page(rows, limit, row_of))
}

pub(super) fn running(db: &Connection) -> rusqlite::Result<Vec<Recorded>> {
    db.prepare_cached(&format!(
        "SELECT {COLUMNS} FROM replay WHERE state = 'running' ORDER BY row"
    ))?
    .query_map([], read)?
    .collect()
}

/// The number of the last row that no running replay has still to read; `None` if none runs.
pub(super) fn floor(db: &Connection) -> rusqlite::Result<Option<i64>> {
    db.prepare_cached("SELECT min(position) FROM replay WHERE state = 'running'")?
        .query_row([], |row| row.get(0))
}

pub(super) fn introduce(
    db: &Connection,
    newcomers: &[Newcomer],
    bound: Option<&BTreeSet<SubscriberName>>,
    now: SystemTime,
) -> rusqlite::Result<Introduced> {
    let is_used: bool =
        db.query_row("SELECT EXISTS (SELECT 1 FROM subscriber)", [], |row| row.get(0))?;
    let mut add = db.prepare_cached(
        "INSERT OR IGNORE INTO subscriber (name, since, start_from) VALUES (?1, ?2, ?3)",
    )?;
    let mut not_new = Vec::new();
    for Newcomer { name, start_from } in newcomers {
        let is_new = bound.map_or(is_used, |bound| !bound.contains(name));
        let waits = start_from.filter(|_| is_new).map(millis);
        let is_added = add.execute(params![name.as_str(), millis(now), waits])? > 0;
        if is_added && start_from.is_some() && !is_new {
            not_new.push(name.clone());
        }
    }
    for name in bound.into_iter().flatten() {
        add.execute(params![name.as_str(), millis(now), None::<i64>])?;
    }
    let waiting = db
        .prepare_cached(
            "SELECT name, start_from FROM subscriber WHERE start_from IS NOT NULL ORDER BY since, name",
        )?
        .query_map([], |row| Ok((row.get::<_, String>(0)?, row.get(1)?)))?
        .collect::<rusqlite::Result<Vec<_>>>()?;
    let known = |(name, at): (String, i64)| Some((SubscriberName::try_new(&name).ok()?, time(at)));
    Ok(Introduced { waiting: waiting.into_iter().filter_map(known).collect(), not_new })
}

/// From when on the new subscribers get events whose first replays are not made yet, in Unix
/// milliseconds; `None` if there are none.
pub(super) fn earliest_start(db: &Connection) -> rusqlite::Result<Option<i64>> {
    db.prepare_cached("SELECT min(start_from) FROM subscriber")?.query_row([], |row| row.get(0))
}

pub(super) fn begin_newcomers(
    db: &Connection,
    replays: &[(SubscriberName, Option<Replay>)],
) -> rusqlite::Result<BTreeSet<SubscriberName>> {
    let mut free = MAX_RUNNING.saturating_sub(running(db)?.len());
    let mut done = db.prepare_cached(
        "UPDATE subscriber SET start_from = NULL WHERE name = ?1 AND start_from IS NOT NULL",
    )?;
    let mut begun = BTreeSet::new();
    for (name, replay) in replays {
        if replay.is_some() && free == 0 {
            continue;
        }
        let waited = done.execute([name.as_str()])? > 0;
        if let Some(replay) = replay.as_ref().filter(|_| waited) {
            insert(db, replay)?;
            free -= 1;
        }
        begun.insert(name.clone());
    }
    Ok(begun)
}

pub(super) fn add_operation(db: &Connection, new: &NewOperation) -> rusqlite::Result<()> {
    let NewOperation { at, by, what, subject, details } = new;
    db.prepare_cached(
        "INSERT INTO operation (at, by, what, subject, details) VALUES (?1, ?2, ?3, ?4, ?5)",
    )?
    .execute(params![millis(*at), by, what, subject, details])?;
    let oldest = db.last_insert_rowid() - MAX_OPERATIONS;
    db.prepare_cached("DELETE FROM operation WHERE row <= ?1")?.execute([oldest]).map(drop)
}

pub(super) fn operations(
    db: &Connection,
    before: Option<i64>,
    limit: usize,
) -> rusqlite::Result<Page<Operation>> {
    let read = |row: &Row<'_>| {
        let stored: String = row.get(3)?;
        // One of a later version has no name here.
        let what = NewOperation::NAMES.into_iter().find(|name| *name == stored);
        let new = NewOperation {
            at: time(row.get(1)?),
            by: row.get(2)?,
            what: what.unwrap_or("other"),
            subject: row.get(4)?,
            details: row.get(5)?,
        };
        Ok(Operation { row: row.get(0)?, new })
    };
    let rows = db
        .prepare_cached(
            "SELECT row, at, by, what, subject, details FROM operation WHERE row < ?1 ORDER BY row DESC LIMIT ?2",
        )?
        .query_map(params![before.unwrap_or(i64::MAX), ask_for(limit)], read)?
        .collect::<rusqlite::Result<Vec<_>>>()?;
    Ok(page(rows, limit, |operation| operation.row))
}

/// One more than the limit, to see whether there are more.
fn ask_for(limit: usize) -> i64 {
    i64::try_from(limit).unwrap_or(i64::MAX).saturating_add(1)
}

fn page<T>(mut rows: Vec<T>, limit: usize, row: impl Fn(&T) -> i64) -> Page<T> {
    let more = rows.len() > limit;
    rows.truncate(limit);
    let next = if more { rows.last().map(row) } else { None };
    Page { rows, next, searched_back_to: None }
}

/// The chunks that may have events of a span of time. Their rows are counted until the deadline;
/// behind it a chunk's own number is taken, which has those too that a log has deleted. They are the
/// oldest, so these are counted first.
pub(super) fn extent(
    db: &Connection,
    source: &mut Source<'_>,
    (since, until): (SystemTime, Option<SystemTime>),
    upto: Option<EventNumber>,
    deadline: Instant,
) -> Result<Option<Extent>, Fault> {
    let upto = upto.map_or(i64::MAX, |upto| upto.0);
    let (since, until) = (millis(since), until.map_or(i64::MAX, millis));
    let mut all = Chunk::list(db)?;
    let is_in = |chunk: &&Chunk| {
        let is_meant = chunk.max_at >= since && chunk.min_at <= until;
        is_meant && chunk.first <= upto && chunk.events > 0
    };
    let first = all.iter().filter(is_in).map(|chunk| chunk.first).min();
    let last = all.iter().filter(is_in).map(|chunk| chunk.last).max();
    let Some((first, last)) = first.zip(last) else { return Ok(None) };
    all.retain(|chunk| chunk.first >= first && chunk.last <= last);
    let mut rows = 0;
    for chunk in all.iter().rev() {
        let is_late = clock::instant() >= deadline && chunk.last <= upto;
        rows +=
            if is_late { chunk.events.unsigned_abs() } else { source.count(db, chunk, upto)? };
    }
    Ok(Some(Extent { after: EventNumber(first - 1), upto: EventNumber(last.min(upto)), rows }))
}

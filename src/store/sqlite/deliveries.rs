//! Deliveries: one row a batch.

use std::{
    collections::{HashMap, hash_map::Entry},
    time::{Duration, Instant},
};

use rusqlite::{Connection, OptionalExtension as _, Row, params};
use serde_json::{Value, json};

use super::fault::{millis, span, time};
use crate::{
    clock,
    delivery::{BatchId, FailureKind, Print, Prints, Reason, SubscriberName},
    event::payload::Format,
    store::{
        AttemptEnd, Contents, Delivery, DeliveryAttempt, DeliveryChange, DeliveryFilter,
        DeliveryState, MAX_ROWS, Page, WithEvent,
    },
};

/// Rows between two marks.
const MARK_EVERY: i64 = 512;

/// Rows that are removed at once.
pub(super) const TRIMMED: usize = 500;

const COLUMNS: &str = "row, id, subscriber, state, state_at, reason, begun_at, changed_at, format, events, bytes, sha256, replay, parent, attempts, prints";

const DELIVERED: i64 = 2;

/// The key of the time of the latest change.
pub(super) const RECORDED: &str = "recorded";

/// Takes changes, oldest first. A change of a batch that is not known, and does not say what the
/// batch is made of, is skipped: its row was removed.
pub(super) fn record(db: &Connection, changes: &[DeliveryChange]) -> rusqlite::Result<()> {
    let mut order = Vec::new();
    let mut changed: HashMap<&str, Option<Delivery>> = HashMap::new();
    for change in changes {
        let id = change.id.as_str();
        let delivery = match changed.entry(id) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(unknown) => {
                order.push(id);
                unknown.insert(one(db, id)?)
            }
        };
        match delivery {
            Some(delivery) => delivery.apply(change),
            None => *delivery = Delivery::begin(0, change),
        }
    }
    for id in order {
        match changed.remove(id).flatten() {
            Some(delivery) if delivery.row == 0 => insert(db, &delivery)?,
            Some(delivery) => update(db, &delivery)?,
            None => {}
        }
    }
    match changes.iter().map(|change| millis(change.at)).max() {
        Some(at) => db
            .prepare_cached("INSERT OR REPLACE INTO meta (key, value) VALUES (?1, ?2)")?
            .execute(params![RECORDED, at])
            .map(drop),
        None => Ok(()),
    }
}

/// The delivery of the batch with an id.
pub(super) fn one(db: &Connection, id: &str) -> rusqlite::Result<Option<Delivery>> {
    let sql = format!("SELECT {COLUMNS} FROM delivery WHERE id = ?1");
    Ok(db.prepare_cached(&sql)?.query_row([id], read).optional()?.flatten())
}

fn insert(db: &Connection, d: &Delivery) -> rusqlite::Result<()> {
    let sql = "INSERT INTO delivery (id, subscriber, parent, format, begun_at, state, state_at, reason, changed_at, events, bytes, sha256, replay, attempts, prints)
        VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15)";
    let (state, state_at, reason) = state_columns(&d.state);
    let c = &d.contents;
    db.prepare_cached(sql)?.execute(params![
        d.id.as_str(),
        d.subscriber.as_str(),
        c.parent.as_ref().map(BatchId::as_str),
        c.format.map(format_number),
        millis(d.begun_at),
        state,
        state_at,
        reason,
        millis(d.changed_at),
        c.events,
        i64::try_from(c.bytes).unwrap_or(i64::MAX),
        c.sha256,
        c.replay,
        attempts_text(&d.attempts),
        prints_blob(&c.prints),
    ])?;
    let row = db.last_insert_rowid();
    if row % MARK_EVERY == 0 {
        mark(db, row)?;
    }
    Ok(())
}

fn update(db: &Connection, d: &Delivery) -> rusqlite::Result<()> {
    let sql = "UPDATE delivery SET state = ?2, state_at = ?3, reason = ?4, changed_at = ?5, sha256 = ?6, replay = ?7, attempts = ?8, prints = ?9 WHERE row = ?1";
    let (state, state_at, reason) = state_columns(&d.state);
    let c = &d.contents;
    db.prepare_cached(sql)?.execute(params![
        d.row,
        state,
        state_at,
        reason,
        millis(d.changed_at),
        c.sha256,
        c.replay,
        attempts_text(&d.attempts),
        prints_blob(&c.prints),
    ])?;
    Ok(())
}

/// Remembers when the rows before this one were begun. The clock may be stepped, so that the rows'
/// own times are in no order.
fn mark(db: &Connection, row: i64) -> rusqlite::Result<()> {
    db.execute(
        "INSERT OR REPLACE INTO delivery_mark (row, begun_at)
         SELECT ?1, max(
            coalesce((SELECT begun_at FROM delivery_mark WHERE row < ?1 ORDER BY row DESC LIMIT 1), 0),
            coalesce((SELECT max(begun_at) FROM delivery WHERE row < ?1 AND row >= coalesce((SELECT max(row) FROM delivery_mark WHERE row < ?1), 0)), 0))",
        [row],
    )
    .map(drop)
}

/// The first row that may be begun at a time or later.
fn first_since(db: &Connection, since: i64) -> rusqlite::Result<i64> {
    db.prepare_cached("SELECT max(row) FROM delivery_mark WHERE begun_at < ?1")?
        .query_row([since], |row| row.get::<_, Option<i64>>(0))
        .map(Option::unwrap_or_default)
}

/// Makes those in flight interrupted: the daemon that made their attempts has ended.
pub(super) fn interrupt(db: &Connection) -> rusqlite::Result<usize> {
    let (in_flight, ..) = state_columns(&DeliveryState::InFlight);
    let (interrupted, ..) = state_columns(&DeliveryState::Interrupted);
    db.execute(
        "UPDATE delivery SET state = ?2 WHERE state = ?1 AND state <> 2",
        [in_flight, interrupted],
    )
}

/// Lists the deliveries that a filter selects.
pub(super) fn list(
    db: &Connection,
    filter: &DeliveryFilter,
    before: Option<i64>,
    limit: usize,
    deadline: Instant,
    horizon: i64,
) -> rusqlite::Result<Page<Delivery>> {
    let mut page = Page { rows: Vec::new(), next: None, searched_back_to: None };
    // Those of an unknown state are stored with the state that they had.
    let is_unknown = filter.state.as_deref() == Some(DeliveryState::UNKNOWN);
    let state = filter.state.as_deref().filter(|_| !is_unknown).map(state_number);
    if limit == 0 || state == Some(None) {
        return Ok(page);
    }
    let (state, now) = (state.flatten(), clock::now());
    let since = filter.since.map_or(horizon, |since| millis(since).max(horizon));
    let mut sql = format!("SELECT {COLUMNS} FROM delivery WHERE row < ?1 AND row >= ?2");
    sql.push_str(match &filter.subscriber {
        Some(_) => " AND subscriber = ?3",
        None => " AND ?3 IS NULL",
    });
    sql.push_str(match state {
        None if is_unknown => " AND ?4 IS NULL AND state < 2 AND state <> 2",
        None => " AND ?4 IS NULL",
        // The index has no others.
        Some(DELIVERED) => " AND state = ?4",
        Some(_) => " AND state = ?4 AND state <> 2",
    });
    sql.push_str(" ORDER BY row DESC");
    let mut statement = db.prepare_cached(&sql)?;
    let first = first_since(db, since)?;
    let before = before.unwrap_or(i64::MAX);
    let mut rows = statement.query(params![before, first, filter.subscriber, state])?;
    while let Some(row) = rows.next()? {
        let (number, begun): (i64, i64) = (row.get(0)?, row.get(6)?);
        let begun_at = time(begun);
        let is_selected = begun >= since && filter.until.is_none_or(|until| begun < millis(until));
        if is_selected
            && let Some(delivery) = read(row)?
            && filter.state.as_ref().is_none_or(|wanted| delivery.known_state(now) == wanted)
        {
            if page.rows.len() == limit {
                page.next = page.rows.last().map(|d| d.row);
                return Ok(page);
            }
            page.rows.push(delivery);
        }
        if clock::instant() >= deadline {
            page.next = Some(number);
            page.searched_back_to = Some(begun_at);
            return Ok(page);
        }
    }
    Ok(page)
}

/// The deliveries to the first of some subscribers, begun from one time on and before another, whose
/// batches hold an event.
pub(super) fn with_event(
    db: &Connection,
    subscribers: &[SubscriberName],
    print: Print,
    times: (i64, i64),
    deadline: Instant,
) -> rusqlite::Result<Vec<WithEvent>> {
    let first = first_since(db, times.0)?;
    let mut all = Vec::new();
    for subscriber in subscribers {
        let found = of_subscriber(db, subscriber.as_str(), print, (first, times), deadline)?;
        let is_late = clock::instant() >= deadline;
        // The next call begins with it, and has the whole time for it.
        if is_late && found.searched_until.is_some() && !all.is_empty() {
            break;
        }
        all.push(found);
        if is_late {
            break;
        }
    }
    Ok(all)
}

/// Those to a subscriber from a row on, the oldest first.
fn of_subscriber(
    db: &Connection,
    subscriber: &str,
    print: Print,
    (first, (since, until)): (i64, (i64, i64)),
    deadline: Instant,
) -> rusqlite::Result<WithEvent> {
    let mut found = WithEvent::default();
    let mut one = db.prepare_cached(&format!("SELECT {COLUMNS} FROM delivery WHERE row = ?1"))?;
    let mut statement = db.prepare_cached(
        "SELECT row, begun_at, prints FROM delivery WHERE subscriber = ?1 AND row >= ?2 ORDER BY row",
    )?;
    let mut rows = statement.query(params![subscriber, first])?;
    while let Some(row) = rows.next()? {
        let begun: i64 = row.get(1)?;
        if (since..until).contains(&begun) {
            match row.get_ref(2)?.as_blob_or_null()? {
                None => found.without_prints += 1,
                Some(prints) if has_print(prints, print) => {
                    found.deliveries.extend(one.query_row([row.get::<_, i64>(0)?], read)?);
                }
                Some(_) => {}
            }
        }
        // Later rows were begun later, unless the clock was stepped by more than that.
        let is_past = begun.saturating_sub(span(STEP)) >= until;
        let is_full = found.deliveries.len() >= MAX_ROWS;
        if is_past {
            break;
        }
        if is_full || clock::instant() >= deadline {
            found.searched_until = Some(time(begun));
            break;
        }
    }
    Ok(found)
}

/// The most that a clock is stepped back.
const STEP: Duration = Duration::from_secs(3600);

fn has_print(prints: &[u8], print: Print) -> bool {
    prints.chunks_exact(Print::LEN).any(|p| p == print.as_bytes())
}

/// Removes some that have not changed since a time, or, `by_force`, the oldest ones; the number of
/// them.
pub(super) fn trim(db: &Connection, horizon: i64, by_force: bool) -> rusqlite::Result<usize> {
    let (upto, unchanged_since) =
        if by_force { (i64::MAX, i64::MAX) } else { (first_since(db, horizon)?, horizon) };
    let removed = db
        .prepare_cached(
            "DELETE FROM delivery WHERE row IN (SELECT row FROM delivery WHERE row < ?1 AND changed_at < ?2 ORDER BY row LIMIT ?3)",
        )?
        .execute(params![upto, unchanged_since, i64::try_from(TRIMMED).unwrap_or(i64::MAX)])?;
    if removed > 0 {
        // The last mark before the first row stays.
        db.execute(
            "DELETE FROM delivery_mark WHERE row < (SELECT max(row) FROM delivery_mark WHERE row <= coalesce((SELECT min(row) FROM delivery), 0))",
            [],
        )?;
    }
    Ok(removed)
}

/// When the oldest was begun, in Unix milliseconds, and how many there are.
pub(super) fn extent(db: &Connection) -> rusqlite::Result<(Option<i64>, u64)> {
    let oldest: Option<(i64, i64)> = db
        .query_row("SELECT row, begun_at FROM delivery ORDER BY row LIMIT 1", [], |row| {
            Ok((row.get(0)?, row.get(1)?))
        })
        .optional()?;
    let Some((first, begun)) = oldest else { return Ok((None, 0)) };
    // To count them takes as long as to read them all. Few are removed from the middle.
    let last: i64 = db.query_row("SELECT max(row) FROM delivery", [], |row| row.get(0))?;
    Ok((Some(begun), u64::try_from(last - first + 1).unwrap_or(0)))
}

/// `None` of a row whose subscriber has no valid name.
fn read(row: &Row<'_>) -> rusqlite::Result<Option<Delivery>> {
    let Ok(subscriber) = SubscriberName::try_new(row.get_ref(2)?.as_str()?) else {
        return Ok(None);
    };
    let state_at: Option<i64> = row.get(4)?;
    let reason: Option<String> = row.get(5)?;
    let parent: Option<String> = row.get(13)?;
    Ok(Some(Delivery {
        row: row.get(0)?,
        id: BatchId::from(row.get::<_, String>(1)?),
        subscriber,
        state: state(row.get(3)?, time(state_at.unwrap_or(0)), reason.as_deref()),
        begun_at: time(row.get(6)?),
        changed_at: time(row.get(7)?),
        contents: Contents {
            format: row.get::<_, Option<i64>>(8)?.map(|n| match n {
                1 => Format::JsonLines,
                2 => Format::JsonArray,
                3 => Format::Single,
                4 => Format::SplunkHec,
                5 => Format::CloudEventsBatch,
                6 => Format::Slack,
                _ => Format::Json,
            }),
            events: row.get(9)?,
            bytes: u64::try_from(row.get::<_, i64>(10)?).unwrap_or(0),
            sha256: row.get(11)?,
            replay: row.get(12)?,
            parent: parent.map(BatchId::from),
            prints: row.get_ref(15)?.as_blob_or_null()?.map(prints),
        },
        attempts: attempts(row.get_ref(14)?.as_str()?),
    }))
}

const fn format_number(format: Format) -> i64 {
    match format {
        Format::Json => 0,
        Format::JsonLines => 1,
        Format::JsonArray => 2,
        Format::Single => 3,
        Format::SplunkHec => 4,
        Format::CloudEventsBatch => 5,
        Format::Slack => 6,
    }
}

fn state_number(name: &str) -> Option<i64> {
    let index = DeliveryState::NAMES.iter().position(|n| *n == name)?;
    i64::try_from(index).ok()
}

fn state_columns(state: &DeliveryState) -> (i64, Option<i64>, Option<&'static str>) {
    let number = state_number(state.name()).unwrap_or(0);
    match state {
        DeliveryState::Retrying { due: at } | DeliveryState::Delivered { at } => {
            (number, Some(millis(*at)), None)
        }
        DeliveryState::Dead { reason } => (number, None, Some(reason.name())),
        _ => (number, None, None),
    }
}

/// The state of a row.
fn state(number: i64, at: std::time::SystemTime, reason: Option<&str>) -> DeliveryState {
    match number {
        0 => DeliveryState::InFlight,
        1 => DeliveryState::Retrying { due: at },
        DELIVERED => DeliveryState::Delivered { at },
        3 => DeliveryState::Dead {
            reason: reason.and_then(Reason::from_name).unwrap_or(Reason::Exhausted),
        },
        4 => DeliveryState::Paused,
        5 => DeliveryState::Split,
        _ => DeliveryState::Interrupted,
    }
}

fn prints_blob(prints: &Prints) -> Option<Vec<u8>> {
    prints.as_ref().map(|prints| prints.iter().flat_map(|p| *p.as_bytes()).collect())
}

fn prints(blob: &[u8]) -> std::sync::Arc<[Print]> {
    let print = |bytes: &[u8]| bytes.try_into().map(Print::from_bytes);
    blob.chunks_exact(Print::LEN).flat_map(print).collect()
}

/// The attempts as JSON, each as number, time, daemon, and of an ended one its duration in
/// milliseconds, status, failure and excerpt.
fn attempts_text(attempts: &[DeliveryAttempt]) -> String {
    let one = |a: &DeliveryAttempt| {
        let at = millis(a.at);
        match &a.end {
            None => json!([a.number, at, a.by]),
            Some((took, end)) => json!([
                a.number,
                at,
                a.by,
                span(*took),
                end.status,
                end.failure.map(FailureKind::name),
                end.excerpt
            ]),
        }
    };
    Value::Array(attempts.iter().map(one).collect()).to_string()
}

/// Reads what [`attempts_text`] wrote, and skips what it cannot read.
fn attempts(text: &str) -> Vec<DeliveryAttempt> {
    let Ok(Value::Array(all)) = serde_json::from_str(text) else { return Vec::new() };
    all.iter().filter_map(attempt).collect()
}

fn attempt(value: &Value) -> Option<DeliveryAttempt> {
    let [number, at, by, end @ ..] = &value.as_array()?[..] else { return None };
    let end = match end {
        [took, status, failure, excerpt] => {
            let failure = failure.as_str();
            let kind = FailureKind::ALL.into_iter().find(|k| Some(k.name()) == failure);
            let end = AttemptEnd {
                status: status.as_u64().and_then(|s| u16::try_from(s).ok()),
                // One of a later version.
                failure: kind.or_else(|| failure.map(|_| FailureKind::Internal)),
                excerpt: excerpt.as_str()?.to_owned(),
            };
            Some((Duration::from_millis(took.as_u64()?), end))
        }
        _ => None,
    };
    Some(DeliveryAttempt {
        number: u32::try_from(number.as_u64()?).ok()?,
        at: time(at.as_i64()?),
        by: by.as_str()?.to_owned(),
        end,
    })
}

//! Events that are added.

use std::collections::{HashMap, HashSet};

use rusqlite::{
    Connection,
    types::{ToSqlOutput, ValueRef},
};
use sha2::{Digest as _, Sha256};

use super::{
    chunk::{self, Chunk, Limits, MAX_TYPES, Types},
    fault::{Fault, millis},
    hours::Hours,
    source::{Found, Source, fields_text, insert, type_column},
    tokens::{Indexed, id_query},
};
use crate::{
    event::{Tenant, details::Details},
    store::{Appended, EventNumber, NewRow},
};

/// The number of latest events among which a repeat is recognised, at least.
const RECENT: i64 = 100_000;

/// Bytes of an event's row and words besides its body, about.
const ROW_BYTES: usize = 110;

/// How events are added.
#[derive(Debug, Clone, Copy)]
pub(super) struct Manner {
    /// The events are stored here, and not in a log of their own.
    pub(super) has_rows: bool,
    /// They are stored with all their bytes.
    pub(super) has_bodies: bool,
    pub(super) limits: Limits,
    /// Unix milliseconds.
    pub(super) now: i64,
    /// The first number, and the last one, that this process may give.
    pub(super) numbers: (i64, i64),
}

/// What the writing thread remembers from one call to the next. It may be wrong after a transaction
/// that was rolled back: it is compared with the chunk before it is used.
#[derive(Debug, Default)]
pub(super) struct Memory {
    chunk: i64,
    types: HashMap<String, i64>,
    tokens: String,
}

impl Memory {
    fn follow(&mut self, db: &Connection, chunk: &Chunk) -> rusqlite::Result<()> {
        let known = i64::try_from(self.types.len()).unwrap_or(i64::MAX);
        if self.chunk != chunk.id || known != chunk.types {
            let types = Types::of(db, chunk);
            self.types = types.names()?.iter().cloned().zip(0..).collect();
            self.chunk = chunk.id;
        }
        Ok(())
    }

    /// The number of a type that is listed, or can be.
    fn listed(
        &mut self,
        db: &Connection,
        chunk: &mut Chunk,
        name: &str,
    ) -> rusqlite::Result<Option<i64>> {
        if let Some(number) = self.types.get(name) {
            return Ok(Some(*number));
        }
        if chunk.types >= MAX_TYPES {
            return Ok(None);
        }
        let number = chunk::add_type(db, chunk, name)?;
        self.types.insert(name.to_owned(), number);
        Ok(Some(number))
    }
}

/// Adds events; `None`, and none are added, if more numbers have to be reserved.
pub(super) fn append(
    db: &Connection,
    memory: &mut Memory,
    manner: &Manner,
    events: &[NewRow],
) -> Result<Option<Appended>, Fault> {
    let repeats = repeats(db, manner, events)?;
    let mut last = chunk::last_event(db)?;
    let mut next = last.saturating_add(1).max(manner.numbers.0);
    let most = i64::try_from(events.len()).unwrap_or(i64::MAX);
    if manner.has_rows && next.saturating_add(most) > manner.numbers.1 {
        return Ok(None);
    }
    let mut appended = Appended::default();
    let mut adding: Option<Adding<'_>> = None;
    for (n, event) in events.iter().enumerate() {
        let number = event.number.map_or(next, |n| n.0);
        if number <= last || repeats.contains(&n) {
            appended.repeats += 1;
            continue;
        }
        if let Some(full) = adding.take_if(|a| a.chunk.is_full(&manner.limits, manner.now)) {
            full.save(db)?;
        }
        let to = match &mut adding {
            Some(to) => to,
            None => adding.insert(Adding::open(db, memory, manner, number)?),
        };
        to.add(db, memory, manner, number, event)?;
        last = number;
        next = number.saturating_add(1);
        appended.events += 1;
    }
    if let Some(adding) = adding {
        adding.save(db)?;
    }
    appended.last = (last > 0).then_some(EventNumber(last));
    Ok(Some(appended))
}

/// A chunk that events are added to.
struct Adding<'d> {
    chunk: Chunk,
    row: Option<rusqlite::CachedStatement<'d>>,
    words: rusqlite::CachedStatement<'d>,
    hours: Hours,
}

impl<'d> Adding<'d> {
    /// Opens the latest chunk, or begins one if that is full.
    fn open(
        db: &'d Connection,
        memory: &mut Memory,
        manner: &Manner,
        first: i64,
    ) -> rusqlite::Result<Self> {
        let chunk = match Chunk::latest(db)? {
            Some(chunk) if !chunk.is_full(&manner.limits, manner.now) => chunk,
            _ => Chunk::begin(db, manner.now, first, manner.has_rows)?,
        };
        memory.follow(db, &chunk)?;
        let row = manner.has_rows.then(|| insert(db, &chunk)).transpose()?;
        let words = format!("INSERT INTO {} (rowid, words) VALUES (?1, ?2)", chunk.words());
        Ok(Self { row, words: db.prepare_cached(&words)?, chunk, hours: Hours::default() })
    }

    fn add(
        &mut self,
        db: &Connection,
        memory: &mut Memory,
        manner: &Manner,
        number: i64,
        event: &NewRow,
    ) -> rusqlite::Result<()> {
        let details = Details::of(&event.body);
        let sha256: [u8; 32] = Sha256::digest(&event.body).into();
        let has_body = manner.has_bodies;
        let listed = memory.listed(db, &mut self.chunk, &event.event_type)?;
        let at = millis(event.at);
        let mut bytes = ROW_BYTES;
        if let Some(row) = &mut self.row {
            let body = if has_body {
                ToSqlOutput::Borrowed(ValueRef::Blob(&event.body))
            } else {
                ToSqlOutput::Owned(fields_text(&details, event.body.len(), &sha256).into())
            };
            bytes += if has_body { event.body.len() } else { 200 };
            let event_type = type_column(listed, &event.event_type);
            row.execute((number, at, event_type, &event.message_id, body))?;
        }
        let indexed = Indexed {
            event_type: &event.event_type,
            message_id: event.message_id.as_deref(),
            sha256: &sha256,
            details: &details,
            body: has_body.then_some(&event.body),
            tenant: event.tenant.as_ref().map(Tenant::as_str),
        };
        indexed.write(&mut memory.tokens);
        self.words.execute((number, &memory.tokens))?;
        let chunk = &mut self.chunk;
        chunk.last = number;
        chunk.events += 1;
        chunk.bytes = chunk.bytes.saturating_add(i64::try_from(bytes).unwrap_or(i64::MAX));
        chunk.min_at = chunk.min_at.min(at);
        chunk.max_at = chunk.max_at.max(at);
        self.hours.add(at);
        Ok(())
    }

    /// Stores what has changed of the chunk.
    fn save(self, db: &Connection) -> rusqlite::Result<()> {
        self.hours.save(db, self.chunk.id)?;
        self.chunk.save(db)
    }
}

/// The indices of redelivered events that are there already, by their message id and bytes.
fn repeats(db: &Connection, manner: &Manner, events: &[NewRow]) -> Result<HashSet<usize>, Fault> {
    let mut repeats = HashSet::new();
    let mut chunks: Option<Vec<Chunk>> = None;
    // Those of this call too: a group may hold both deliveries.
    let mut before: HashMap<&str, Vec<&NewRow>> = HashMap::new();
    let has_redelivered = events.iter().any(|e| e.redelivered);
    for (n, event) in events.iter().enumerate().filter(|_| has_redelivered) {
        let Some(id) = event.message_id.as_deref() else { continue };
        let here = before.entry(id).or_default();
        if event.redelivered && event.number.is_none() {
            let chunks = match &mut chunks {
                Some(chunks) => chunks,
                None => chunks.insert(recent(db)?),
            };
            let is_here = here.iter().any(|e| e.body == event.body);
            if is_here || is_stored(db, manner, chunks, id, event)? {
                repeats.insert(n);
                continue;
            }
        }
        here.push(event);
    }
    Ok(repeats)
}

/// The latest chunks, with at least [`RECENT`] events.
fn recent(db: &Connection) -> rusqlite::Result<Vec<Chunk>> {
    let mut events = 0;
    let mut chunks = Chunk::list(db)?;
    let enough = chunks.iter().position(|chunk| {
        events += chunk.events;
        events >= RECENT
    });
    chunks.truncate(enough.map_or(chunks.len(), |n| n + 1));
    Ok(chunks)
}

fn is_stored(
    db: &Connection,
    manner: &Manner,
    chunks: &[Chunk],
    id: &str,
    event: &NewRow,
) -> Result<bool, Fault> {
    if !manner.has_rows {
        return Ok(false);
    }
    let query = id_query(id);
    let mut is_stored = false;
    let sha256: [u8; 32] = Sha256::digest(&event.body).into();
    for chunk in chunks {
        let types = Types::of(db, chunk);
        let mut compare = |found: Found<'_>| {
            let row = found.to_row()?;
            is_stored = row.message_id.as_deref() == Some(id) && row.sha256 == sha256;
            Ok(if is_stored {
                std::ops::ControlFlow::Break(())
            } else {
                std::ops::ControlFlow::Continue(())
            })
        };
        if Source::Tables.find(db, (chunk, &types), &query, i64::MAX, &mut compare)?.is_break() {
            return Ok(true);
        }
    }
    Ok(false)
}

//! Where the events' bytes are: in the chunks' tables, or in the log of the embedded queue.

use std::ops::ControlFlow;

use bytes::Bytes;
use rusqlite::{
    Connection, OptionalExtension as _, Row,
    types::{FromSqlError, ToSqlOutput, ValueRef},
};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use super::{
    chunk::{Chunk, Types},
    fault::{Fault, millis, time},
    tokens::push_hex,
};
use crate::{
    event::details::{Details, Party},
    store::{EventLog, EventNumber, EventRow, NewRow},
};

/// Events that are read from a log at once, and bytes of their bodies, approximately.
const AT_ONCE: usize = 64;
const AT_ONCE_BYTES: usize = 4 << 20;

/// Where the events' bytes are.
pub(super) enum Source<'l> {
    Tables,
    /// With or without their bodies.
    Log(&'l mut dyn EventLog, bool),
}

/// An event that a query has come to; read as far as that is asked for.
pub(super) enum Found<'f> {
    Row(&'f Row<'f>, &'f Types<'f>),
    /// With or without its body.
    Logged(&'f NewRow, bool),
}

impl Found<'_> {
    pub(super) fn number(&self) -> rusqlite::Result<i64> {
        match self {
            Self::Row(row, _) => row.get(0),
            Self::Logged(row, _) => Ok(row.number.map_or(0, |n| n.0)),
        }
    }

    /// Unix milliseconds.
    pub(super) fn at(&self) -> rusqlite::Result<i64> {
        match self {
            Self::Row(row, _) => row.get(1),
            Self::Logged(row, _) => Ok(millis(row.at)),
        }
    }

    pub(super) fn event_type(&self) -> rusqlite::Result<&str> {
        match self {
            Self::Row(row, types) => match row.get_ref(2)? {
                ValueRef::Integer(number) => Ok(types.name(number)?.unwrap_or_default()),
                listed => Ok(listed.as_str()?),
            },
            Self::Logged(row, _) => Ok(&row.event_type),
        }
    }

    pub(super) fn to_row(&self) -> rusqlite::Result<EventRow> {
        let row = match self {
            Self::Logged(row, has_body) => {
                let number = row.number.unwrap_or(EventNumber(0));
                let (body, id) = (row.body.clone(), row.message_id.clone());
                let mut found = with_body(number, row.at, &row.event_type, id, body);
                found.tenant.clone_from(&row.tenant);
                found.body.take_if(|_| !has_body);
                return Ok(found);
            }
            Self::Row(row, _) => row,
        };
        let number = EventNumber(self.number()?);
        let (at, event_type) = (time(self.at()?), self.event_type()?);
        let message_id: Option<String> = row.get(3)?;
        match row.get_ref(4)? {
            ValueRef::Text(text) => {
                let (details, bytes, sha256) = fields(text).ok_or(FromSqlError::InvalidType)?;
                let event_type = event_type.to_owned();
                Ok(EventRow {
                    number,
                    at,
                    event_type,
                    message_id,
                    body: None,
                    bytes,
                    sha256,
                    details,
                    tenant: None,
                })
            }
            body => {
                let body = Bytes::copy_from_slice(body.as_blob()?);
                Ok(with_body(number, at, event_type, message_id, body))
            }
        }
    }
}

fn with_body(
    number: EventNumber,
    at: std::time::SystemTime,
    event_type: &str,
    message_id: Option<String>,
    body: Bytes,
) -> EventRow {
    EventRow {
        number,
        at,
        event_type: event_type.to_owned(),
        message_id,
        bytes: body.len() as u64,
        sha256: Sha256::digest(&body).into(),
        details: Details::of(&body),
        body: Some(body),
        tenant: None,
    }
}

/// The value for the column `type`.
pub(super) fn type_column(listed: Option<i64>, name: &str) -> ToSqlOutput<'_> {
    match listed {
        Some(number) => ToSqlOutput::Owned(number.into()),
        None => ToSqlOutput::Borrowed(ValueRef::Text(name.as_bytes())),
    }
}

/// The fields of an event that is kept without its bytes, as text.
pub(super) fn fields_text(details: &Details, bytes: usize, sha256: &[u8; 32]) -> String {
    let Details { timestamp, actor, resource, description } = details;
    let party = |p: &Party| json!([p.id, p.kind, p.name]);
    let mut digest = String::with_capacity(64);
    push_hex(sha256, &mut digest);
    json!([bytes, digest, timestamp, party(actor), party(resource), description]).to_string()
}

/// Reads what [`fields_text`] wrote.
fn fields(text: &[u8]) -> Option<(Details, u64, [u8; 32])> {
    let Ok(Value::Array(values)) = serde_json::from_slice(text) else { return None };
    let [bytes, digest, timestamp, actor, resource, description] = &values[..] else { return None };
    let text = |v: &Value| v.as_str().map(str::to_owned);
    let party = |v: &Value| {
        let [id, kind, name] = &v.as_array()?[..] else { return None };
        Some(Party { id: text(id), kind: text(kind), name: text(name) })
    };
    let digits = digest.as_str().filter(|d| d.len() == 64)?;
    let mut sha256 = [0; 32];
    for (n, byte) in sha256.iter_mut().enumerate() {
        *byte = u8::from_str_radix(digits.get(2 * n..2 * n + 2)?, 16).ok()?;
    }
    let details = Details {
        timestamp: text(timestamp),
        actor: party(actor)?,
        resource: party(resource)?,
        description: text(description),
    };
    Some((details, bytes.as_u64()?, sha256))
}

const COLUMNS: &str = "number, at, type, message_id, body";

/// Called with each event; `Break` ends the query.
pub(super) type Each<'e> = dyn FnMut(Found<'_>) -> rusqlite::Result<ControlFlow<()>> + 'e;

impl Source<'_> {
    /// Reads a chunk's events before a number, the latest first.
    pub(super) fn scan(
        &mut self,
        db: &Connection,
        (chunk, types): (&Chunk, &Types<'_>),
        before: i64,
        each: &mut Each<'_>,
    ) -> Result<ControlFlow<()>, Fault> {
        let (log, has_bodies) = match self {
            Self::Tables => {
                let sql = format!(
                    "SELECT {COLUMNS} FROM {} WHERE number < ?1 ORDER BY number DESC",
                    chunk.rows()
                );
                let mut statement = db.prepare_cached(&sql)?;
                let mut rows = statement.query([before])?;
                while let Some(row) = rows.next()? {
                    if each(Found::Row(row, types))?.is_break() {
                        return Ok(ControlFlow::Break(()));
                    }
                }
                return Ok(ControlFlow::Continue(()));
            }
            Self::Log(log, has_bodies) => (log, *has_bodies),
        };
        let mut before = EventNumber(before.min(chunk.last.saturating_add(1)));
        loop {
            let rows = log.before(before, AT_ONCE, AT_ONCE_BYTES)?;
            let Some(last) = rows.last().and_then(|row| row.number) else {
                return Ok(ControlFlow::Continue(()));
            };
            for row in &rows {
                if row.number.is_none_or(|n| n.0 < chunk.first) {
                    return Ok(ControlFlow::Continue(()));
                }
                if each(Found::Logged(row, has_bodies))?.is_break() {
                    return Ok(ControlFlow::Break(()));
                }
            }
            before = last;
        }
    }

    /// Reads a chunk's events before a number that its index finds for a query, the latest first.
    pub(super) fn find(
        &mut self,
        db: &Connection,
        (chunk, types): (&Chunk, &Types<'_>),
        query: &str,
        before: i64,
        each: &mut Each<'_>,
    ) -> Result<ControlFlow<()>, Fault> {
        let words = chunk.words();
        let sql = format!(
            "SELECT rowid FROM {words} WHERE {words} MATCH ?1 AND rowid < ?2 ORDER BY rowid DESC"
        );
        let mut statement = db.prepare_cached(&sql)?;
        let mut numbers = statement.query((query, before))?;
        let (log, has_bodies) = match self {
            Self::Tables => {
                // Prepared when it is needed: most chunks have nothing of most queries.
                let mut one = None;
                while let Some(found) = numbers.next()? {
                    let number: i64 = found.get(0)?;
                    let one = match &mut one {
                        Some(one) => one,
                        none => none.insert(row_of(db, chunk)?),
                    };
                    let row = one.query_row([number], |row| each(Found::Row(row, types)));
                    if row.optional()?.is_some_and(|flow| flow.is_break()) {
                        return Ok(ControlFlow::Break(()));
                    }
                }
                return Ok(ControlFlow::Continue(()));
            }
            Self::Log(log, has_bodies) => (log, *has_bodies),
        };
        loop {
            let mut batch = Vec::with_capacity(AT_ONCE);
            while batch.len() < AT_ONCE
                && let Some(found) = numbers.next()?
            {
                batch.push(EventNumber(found.get(0)?));
            }
            if batch.is_empty() {
                return Ok(ControlFlow::Continue(()));
            }
            let mut left = &batch[..];
            while !left.is_empty() {
                let (rows, looked_up) = log.get(left, AT_ONCE_BYTES)?;
                for row in &rows {
                    if each(Found::Logged(row, has_bodies))?.is_break() {
                        return Ok(ControlFlow::Break(()));
                    }
                }
                left = left.get(looked_up.max(1)..).unwrap_or_default();
            }
        }
    }

    /// Reads a chunk's event with a number.
    pub(super) fn event(
        &mut self,
        db: &Connection,
        chunk: &Chunk,
        number: i64,
    ) -> Result<Option<EventRow>, Fault> {
        match self {
            Self::Tables => {
                let types = Types::of(db, chunk);
                let read = |row: &Row<'_>| Found::Row(row, &types).to_row();
                Ok(row_of(db, chunk)?.query_row([number], read).optional()?)
            }
            Self::Log(log, has_bodies) => {
                let rows = log.get(&[EventNumber(number)], AT_ONCE_BYTES)?.0;
                let row = rows.first().map(|row| Found::Logged(row, *has_bodies).to_row());
                Ok(row.transpose()?)
            }
        }
    }

    /// The number of a chunk's events up to a number that are there: of the chunk's own number a log
    /// may have deleted some.
    pub(super) fn count(
        &mut self,
        db: &Connection,
        chunk: &Chunk,
        upto: i64,
    ) -> Result<u64, Fault> {
        match self {
            Self::Tables if chunk.last <= upto => Ok(chunk.events.unsigned_abs()),
            Self::Tables => {
                let sql = format!("SELECT count(*) FROM {} WHERE number <= ?1", chunk.rows());
                let count: i64 = db.prepare_cached(&sql)?.query_row([upto], |row| row.get(0))?;
                Ok(count.unsigned_abs())
            }
            Self::Log(log, _) => {
                let last = chunk.last.min(upto);
                Ok(log.count(EventNumber(chunk.first - 1), EventNumber(last))?)
            }
        }
    }

    /// Reads a chunk's events from one number to another, both included, in their order.
    pub(super) fn range(
        &mut self,
        db: &Connection,
        chunk: &Chunk,
        (first, last): (i64, i64),
        each: &mut Each<'_>,
    ) -> Result<ControlFlow<()>, Fault> {
        let (log, has_bodies) = match self {
            Self::Tables => {
                let types = Types::of(db, chunk);
                let sql = format!(
                    "SELECT {COLUMNS} FROM {} WHERE number BETWEEN ?1 AND ?2 ORDER BY number",
                    chunk.rows()
                );
                let mut statement = db.prepare_cached(&sql)?;
                let mut rows = statement.query([first, last])?;
                while let Some(row) = rows.next()? {
                    if each(Found::Row(row, &types))?.is_break() {
                        return Ok(ControlFlow::Break(()));
                    }
                }
                return Ok(ControlFlow::Continue(()));
            }
            Self::Log(log, has_bodies) => (log, *has_bodies),
        };
        let mut after = EventNumber(first - 1);
        loop {
            let rows = log.after(after, AT_ONCE, AT_ONCE_BYTES)?;
            let Some(end) = rows.last().and_then(|row| row.number) else {
                return Ok(ControlFlow::Continue(()));
            };
            for row in &rows {
                if row.number.is_none_or(|n| n.0 > last) {
                    return Ok(ControlFlow::Continue(()));
                }
                if each(Found::Logged(row, has_bodies))?.is_break() {
                    return Ok(ControlFlow::Break(()));
                }
            }
            after = end;
        }
    }
}

/// The statement that reads the event with a number.
fn row_of<'d>(
    db: &'d Connection,
    chunk: &Chunk,
) -> rusqlite::Result<rusqlite::CachedStatement<'d>> {
    db.prepare_cached(&format!("SELECT {COLUMNS} FROM {} WHERE number = ?1", chunk.rows()))
}

/// The statement that adds an event.
pub(super) fn insert<'d>(
    db: &'d Connection,
    chunk: &Chunk,
) -> rusqlite::Result<rusqlite::CachedStatement<'d>> {
    db.prepare_cached(&format!(
        "INSERT INTO {} ({COLUMNS}) VALUES (?1, ?2, ?3, ?4, ?5)",
        chunk.rows()
    ))
}

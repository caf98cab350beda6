//! Chunks: runs of events, each with its own tables, so that the oldest ones are removed at once.
//!
//! To delete single rows from a full-text index costs as much as to add them, and more the larger it
//! is. To drop a chunk of 50,000 events takes some 40 ms (measured).

use std::cell::OnceCell;

use rusqlite::{Connection, OptionalExtension as _, Row, params};

/// The most events of a chunk.
pub(super) const MAX_EVENTS: i64 = 50_000;

/// The most types of a chunk that are listed: the types of others stand with each event.
pub(super) const MAX_TYPES: i64 = 1000;

/// The limits of a history: when a chunk is full, and what is too old to be shown.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// Events of a chunk.
    pub(super) events: i64,
    /// Bytes of a chunk.
    pub(super) bytes: i64,
    /// Milliseconds from a chunk's first event to its last one.
    pub(super) span: i64,
}

/// A chunk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Chunk {
    pub(super) id: i64,
    /// When it was begun, in Unix milliseconds.
    pub(super) begun: i64,
    /// The numbers of the first and the last event.
    pub(super) first: i64,
    pub(super) last: i64,
    pub(super) events: i64,
    /// Bytes of the events and their words, about.
    pub(super) bytes: i64,
    /// The earliest and the latest time of an event, in Unix milliseconds.
    pub(super) min_at: i64,
    pub(super) max_at: i64,
    /// The number of listed types. With [`MAX_TYPES`] there may be others.
    pub(super) types: i64,
}

const COLUMNS: &str = "id, begun, first, last, events, bytes, min_at, max_at, types";

impl Chunk {
    fn read(row: &Row<'_>) -> rusqlite::Result<Self> {
        Ok(Self {
            id: row.get(0)?,
            begun: row.get(1)?,
            first: row.get(2)?,
            last: row.get(3)?,
            events: row.get(4)?,
            bytes: row.get(5)?,
            min_at: row.get(6)?,
            max_at: row.get(7)?,
            types: row.get(8)?,
        })
    }

    /// All chunks, the latest first.
    pub(super) fn list(db: &Connection) -> rusqlite::Result<Vec<Self>> {
        db.prepare_cached(&format!("SELECT {COLUMNS} FROM chunk ORDER BY id DESC"))?
            .query_map([], Self::read)?
            .collect()
    }

    pub(super) fn latest(db: &Connection) -> rusqlite::Result<Option<Self>> {
        db.prepare_cached(&format!("SELECT {COLUMNS} FROM chunk ORDER BY id DESC LIMIT 1"))?
            .query_row([], Self::read)
            .optional()
    }

    pub(super) fn oldest(db: &Connection) -> rusqlite::Result<Option<Self>> {
        db.prepare_cached(&format!("SELECT {COLUMNS} FROM chunk ORDER BY id LIMIT 1"))?
            .query_row([], Self::read)
            .optional()
    }

    /// The first chunk after another that takes no more events: the latest one may.
    pub(super) fn first_full_after(db: &Connection, id: i64) -> rusqlite::Result<Option<Self>> {
        db.prepare_cached(&format!(
            "SELECT {COLUMNS} FROM chunk WHERE id > ?1 AND id < (SELECT max(id) FROM chunk) ORDER BY id LIMIT 1"
        ))?
        .query_row([id], Self::read)
        .optional()
    }

    /// Begins a chunk. `has_rows`: it stores the events themselves, and not their words alone.
    pub(super) fn begin(
        db: &Connection,
        now: i64,
        first: i64,
        has_rows: bool,
    ) -> rusqlite::Result<Self> {
        db.execute(
            "INSERT INTO chunk (begun, first, last, events, bytes, min_at, max_at, types) VALUES (?1, ?2, ?2 - 1, 0, 0, ?3, ?4, 0)",
            params![now, first, i64::MAX, i64::MIN],
        )?;
        let id = db.last_insert_rowid();
        let chunk = Self {
            id,
            begun: now,
            first,
            last: first - 1,
            events: 0,
            bytes: 0,
            min_at: i64::MAX,
            max_at: i64::MIN,
            types: 0,
        };
        if has_rows {
            // `type`: the number of a listed type, or a type. `body`: a BLOB of the published bytes,
            // or a TEXT of the fields that are kept.
            db.execute_batch(&format!(
                "CREATE TABLE {} (number INTEGER PRIMARY KEY, at INTEGER NOT NULL, type NOT NULL, message_id TEXT, body NOT NULL)",
                chunk.rows()
            ))?;
        }
        db.execute_batch(&format!(
            "CREATE VIRTUAL TABLE {} USING fts5(words, content='', detail=none, columnsize=0, tokenize=\"ascii tokenchars '_'\")",
            chunk.words()
        ))?;
        // Parts of the index that are merged at once. The default, 4, takes an eighth more CPU; more
        // than this makes searches slower (measured).
        let words = chunk.words();
        db.execute(&format!("INSERT INTO {words} ({words}, rank) VALUES ('automerge', 8)"), [])?;
        Ok(chunk)
    }

    /// Stores what has changed but for its types.
    pub(super) fn save(&self, db: &Connection) -> rusqlite::Result<()> {
        db.prepare_cached(
            "UPDATE chunk SET last = ?2, events = ?3, bytes = ?4, min_at = ?5, max_at = ?6, types = ?7 WHERE id = ?1",
        )?
        .execute(params![
            self.id, self.last, self.events, self.bytes, self.min_at, self.max_at, self.types
        ])
        .map(drop)
    }

    pub(super) fn is_full(&self, limits: &Limits, now: i64) -> bool {
        self.events >= limits.events
            || self.bytes >= limits.bytes
            || (self.events > 0 && now.saturating_sub(self.begun) >= limits.span)
    }

    /// Removes the chunk and its events. Numbers do not go back.
    pub(super) fn remove(&self, db: &Connection) -> rusqlite::Result<()> {
        db.execute_batch(&format!(
            "DROP TABLE IF EXISTS {}; DROP TABLE IF EXISTS {}",
            self.rows(),
            self.words()
        ))?;
        db.execute("DELETE FROM chunk_type WHERE chunk = ?1", [self.id])?;
        db.execute("DELETE FROM event_hour WHERE chunk = ?1", [self.id])?;
        db.execute("DELETE FROM chunk WHERE id = ?1", [self.id])?;
        db.execute(
            "INSERT INTO meta (key, value) VALUES ('last_event', ?1) ON CONFLICT (key) DO UPDATE SET value = max(value, excluded.value)",
            [self.last],
        )?;
        Ok(())
    }

    /// The table of its events.
    pub(super) fn rows(&self) -> String {
        format!("event_{}", self.id)
    }

    /// Its full-text index.
    pub(super) fn words(&self) -> String {
        format!("word_{}", self.id)
    }
}

/// The number of the last event; 0 if there never was one.
pub(super) fn last_event(db: &Connection) -> rusqlite::Result<i64> {
    let removed: Option<i64> = db
        .prepare_cached("SELECT value FROM meta WHERE key = 'last_event'")?
        .query_row([], |row| row.get(0))
        .optional()?;
    let there = Chunk::latest(db)?.map(|chunk| chunk.last);
    Ok(removed.max(there).unwrap_or(0))
}

/// The number of the last event before those that may be from a time on, in Unix milliseconds.
pub(super) fn last_before(db: &Connection, since: i64) -> rusqlite::Result<i64> {
    let first: Option<i64> = db
        .prepare_cached("SELECT min(first) FROM chunk WHERE max_at >= ?1")?
        .query_row([since], |row| row.get(0))?;
    first.map_or_else(|| last_event(db), |first| Ok(first - 1))
}

/// The listed types of a chunk. They are read when they are first needed: most searches find nothing
/// in most chunks.
pub(super) struct Types<'d> {
    db: &'d Connection,
    chunk: i64,
    /// In the order of their numbers, which begin at 0.
    names: OnceCell<Vec<String>>,
}

impl<'d> Types<'d> {
    pub(super) const fn of(db: &'d Connection, chunk: &Chunk) -> Self {
        Self { db, chunk: chunk.id, names: OnceCell::new() }
    }

    pub(super) fn name(&self, number: i64) -> rusqlite::Result<Option<&str>> {
        let names = self.names()?;
        Ok(usize::try_from(number).ok().and_then(|n| names.get(n)).map(String::as_str))
    }

    pub(super) fn names(&self) -> rusqlite::Result<&[String]> {
        match self.names.get() {
            Some(names) => Ok(names),
            None => {
                let names = self.read()?;
                Ok(self.names.get_or_init(|| names))
            }
        }
    }

    fn read(&self) -> rusqlite::Result<Vec<String>> {
        self.db
            .prepare_cached("SELECT type FROM chunk_type WHERE chunk = ?1 ORDER BY number")?
            .query_map([self.chunk], |row| row.get(0))?
            .collect()
    }
}

/// Lists a type of a chunk, whose number is the number of types so far.
pub(super) fn add_type(db: &Connection, chunk: &mut Chunk, name: &str) -> rusqlite::Result<i64> {
    let number = chunk.types;
    db.prepare_cached("INSERT INTO chunk_type (chunk, number, type) VALUES (?1, ?2, ?3)")?
        .execute(params![chunk.id, number, name])?;
    chunk.types += 1;
    Ok(number)
}

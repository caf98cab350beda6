//! Subscribers made over the API: their rows in the precious file, and how these are sealed.

use std::collections::{BTreeMap, BTreeSet};

use rusqlite::{Connection, OptionalExtension as _, params};

use super::{
    fault::{millis, time},
    replays,
};
use crate::{
    crypto::{
        seal::{SealKeys, Sealed, Unopened},
        secret::Secret,
    },
    delivery::SubscriberName,
    store::{Deleted, NewOperation, Put, Stamp, StoredSubscriber, subscriber::next_version},
};

/// The most rows of deleted subscribers that are kept: the latest.
const MAX_DELETED: i64 = 100_000;

/// A row, as the store and its copy have it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct SealedRow {
    pub(super) name: String,
    pub(super) version: u64,
    /// `None`: it was deleted.
    pub(super) sealed: Option<Sealed>,
    pub(super) created: Stamp,
    pub(super) changed: Stamp,
}

/// Rows by their names.
pub(super) type Rows = BTreeMap<String, SealedRow>;

impl SealedRow {
    /// What the sealed text belongs to.
    fn belongs_to(name: &str, version: u64) -> Vec<u8> {
        [b"hooktrail subscriber 1\0", name.as_bytes(), b"\0", &version.to_be_bytes()].concat()
    }

    /// Opens the document. The inner error: why it cannot be opened.
    ///
    /// `None` if the subscriber was deleted.
    pub(super) fn open(&self, keys: &SealKeys) -> Option<Result<Secret, Unopened>> {
        let sealed = self.sealed.as_ref()?;
        Some(keys.open(sealed, &Self::belongs_to(&self.name, self.version)))
    }

    /// Seals the document with the first key, if another one has sealed it; whether it has changed.
    ///
    /// # Errors
    /// It cannot be opened.
    pub(super) fn seal_again(
        &mut self,
        keys: &SealKeys,
        nonce: [u8; 12],
    ) -> Result<bool, Unopened> {
        let is_first = |sealed: &Sealed| keys.first().is_some_and(|key| key.id() == sealed.key);
        let Some(document) = self.open(keys).transpose()? else { return Ok(false) };
        if self.sealed.as_ref().is_some_and(is_first) {
            return Ok(false);
        }
        let belongs = Self::belongs_to(&self.name, self.version);
        self.sealed = Some(keys.seal(&document, &belongs, nonce).ok_or(Unopened::NoKey)?);
        Ok(true)
    }
}

const COLUMNS: &str = "name, version, key, sealed, created_at, created_by, changed_at, changed_by";

fn read(row: &rusqlite::Row<'_>) -> rusqlite::Result<SealedRow> {
    let key: Option<String> = row.get(2)?;
    let bytes: Option<Vec<u8>> = row.get(3)?;
    let stamp = |at, by| -> rusqlite::Result<Stamp> {
        Ok(Stamp { at: time(row.get(at)?), by: row.get(by)? })
    };
    Ok(SealedRow {
        name: row.get(0)?,
        version: u64::try_from(row.get::<_, i64>(1)?).unwrap_or(0),
        sealed: key.zip(bytes).map(|(key, bytes)| Sealed { key, bytes }),
        created: stamp(4, 5)?,
        changed: stamp(6, 7)?,
    })
}

/// All rows, those of deleted subscribers included.
pub(super) fn all(db: &Connection) -> rusqlite::Result<Rows> {
    db.prepare_cached(&format!("SELECT {COLUMNS} FROM sealed_subscriber"))?
        .query_map([], |row| read(row).map(|row| (row.name.clone(), row)))?
        .collect()
}

fn one(db: &Connection, name: &str) -> rusqlite::Result<Option<SealedRow>> {
    db.prepare_cached(&format!("SELECT {COLUMNS} FROM sealed_subscriber WHERE name = ?1"))?
        .query_row([name], read)
        .optional()
}

/// Writes a row over the one of its name.
pub(super) fn write(db: &Connection, row: &SealedRow) -> rusqlite::Result<()> {
    let SealedRow { name, version, sealed, created, changed } = row;
    db.prepare_cached(&format!(
        "INSERT OR REPLACE INTO sealed_subscriber ({COLUMNS}) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)"
    ))?
    .execute(params![
        name,
        i64::try_from(*version).unwrap_or(i64::MAX),
        sealed.as_ref().map(|sealed| &sealed.key),
        sealed.as_ref().map(|sealed| &sealed.bytes),
        millis(created.at),
        created.by,
        millis(changed.at),
        changed.by,
    ])
    .map(drop)
}

/// The row before a change, and the next version; or the version that there is, if another one is
/// expected.
type Found = Result<(Option<SealedRow>, u64), Option<u64>>;

/// A change of a subscriber.
pub(super) struct Change {
    pub(super) name: SubscriberName,
    pub(super) expected: Option<u64>,
    pub(super) operation: NewOperation,
}

impl Change {
    fn find(&self, db: &Connection) -> rusqlite::Result<Found> {
        let before = one(db, &self.name)?;
        let version = before.as_ref().filter(|row| row.sealed.is_some()).map(|row| row.version);
        if version != self.expected {
            return Ok(Err(version));
        }
        let next = next_version(before.as_ref().map(|row| row.version), self.operation.at);
        Ok(Ok((before, next)))
    }

    fn stamp(&self) -> Stamp {
        // As it is read again.
        Stamp { at: time(millis(self.operation.at)), by: self.operation.by.clone() }
    }
}

/// Stores a subscriber, sealed with the first of the keys. Also returns the row.
pub(super) fn put(
    db: &Connection,
    change: &Change,
    document: Secret,
    keys: &SealKeys,
    nonce: [u8; 12],
) -> rusqlite::Result<(Put, Option<SealedRow>)> {
    let (before, version) = match change.find(db)? {
        Ok(found) => found,
        Err(version) => return Ok((Put::Differs(version), None)),
    };
    let changed = change.stamp();
    let before = before.filter(|row| row.sealed.is_some());
    let created = before.map_or_else(|| changed.clone(), |row| row.created);
    let belongs = SealedRow::belongs_to(&change.name, version);
    let row = SealedRow {
        name: change.name.to_string(),
        version,
        sealed: keys.seal(&document, &belongs, nonce),
        created: created.clone(),
        changed: changed.clone(),
    };
    write(db, &row)?;
    replays::add_operation(db, &change.operation)?;
    let name = change.name.clone();
    Ok((Put::Stored(StoredSubscriber { name, version, document, created, changed }), Some(row)))
}

/// Deletes a subscriber, and remembers whether its queues are to be deleted. Also returns the row.
pub(super) fn delete(
    db: &Connection,
    change: &Change,
    drops: bool,
) -> rusqlite::Result<(Deleted, Option<SealedRow>)> {
    let found = change.find(db)?;
    match (&found, drops) {
        (Err(Some(_)), _) => {}
        (_, true) => db
            .prepare_cached("INSERT OR IGNORE INTO dropping (name) VALUES (?1)")?
            .execute([change.name.as_str()])
            .map(drop)?,
        (_, false) => dropped(db, &change.name)?,
    }
    let (before, version) = match found {
        Ok(found) => found,
        Err(version) => return Ok((Deleted::Differs(version), None)),
    };
    let changed = change.stamp();
    let row = SealedRow {
        name: change.name.to_string(),
        version,
        sealed: None,
        created: before.map_or_else(|| changed.clone(), |row| row.created),
        changed,
    };
    write(db, &row)?;
    db.prepare_cached(
        "DELETE FROM sealed_subscriber WHERE sealed IS NULL AND version <= \
         (SELECT version FROM sealed_subscriber WHERE sealed IS NULL ORDER BY version DESC LIMIT 1 OFFSET ?1)",
    )?
    .execute([MAX_DELETED])?;
    replays::add_operation(db, &change.operation)?;
    Ok((Deleted::Yes, Some(row)))
}

/// The deleted subscribers whose queues are still to be deleted.
pub(super) fn dropping(db: &Connection) -> rusqlite::Result<BTreeSet<SubscriberName>> {
    let mut all = db.prepare_cached("SELECT name FROM dropping")?;
    let names = all.query_map([], |row| row.get::<_, String>(0))?;
    // Only valid names are written.
    names
        .filter_map(|name| name.map(|name| SubscriberName::try_new(&name).ok()).transpose())
        .collect()
}

pub(super) fn dropped(db: &Connection, name: &SubscriberName) -> rusqlite::Result<()> {
    db.prepare_cached("DELETE FROM dropping WHERE name = ?1")?.execute([name.as_str()]).map(drop)
}

//! The schemas of the two files.

use std::{
    path::{Path, PathBuf},
    time::SystemTime,
};

use crate::{
    clock,
    failpoint::Step,
    sqlite::{Options, Schema, Synchronous, with_suffix},
};

/// May be deleted: events, deliveries, and what belongs to them.
const HISTORY: &[&str] = &[
    "
    -- Single values: when and why this file was begun, the last number of removed events.
    CREATE TABLE meta (key TEXT PRIMARY KEY, value NOT NULL) WITHOUT ROWID;
    -- Runs of events; each has a table event_ID, unless the events are in a log of their own, and a
    -- full-text index word_ID. Times in Unix milliseconds.
    CREATE TABLE chunk (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        begun INTEGER NOT NULL,
        first INTEGER NOT NULL,
        last INTEGER NOT NULL,
        events INTEGER NOT NULL,
        bytes INTEGER NOT NULL,
        min_at INTEGER NOT NULL,
        max_at INTEGER NOT NULL,
        types INTEGER NOT NULL
    );
    CREATE TABLE chunk_type (
        chunk INTEGER NOT NULL,
        number INTEGER NOT NULL,
        type TEXT NOT NULL,
        PRIMARY KEY (chunk, number)
    ) WITHOUT ROWID;
    CREATE TABLE delivery (
        row INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL,
        subscriber TEXT NOT NULL,
        -- As in DeliveryState::NAMES.
        state INTEGER NOT NULL,
        -- When a retry is due, or when it was delivered.
        state_at INTEGER,
        reason TEXT,
        begun_at INTEGER NOT NULL,
        changed_at INTEGER NOT NULL,
        -- 0: JSON, 1: JSON Lines.
        format INTEGER,
        events INTEGER NOT NULL,
        bytes INTEGER NOT NULL,
        sha256 BLOB,
        replay INTEGER NOT NULL,
        parent TEXT,
        attempts TEXT NOT NULL,
        prints BLOB
    );
    CREATE UNIQUE INDEX delivery_id ON delivery (id);
    CREATE INDEX delivery_subscriber ON delivery (subscriber, row);
    -- All but those that are delivered, which are most.
    CREATE INDEX delivery_state ON delivery (state, row) WHERE state <> 2;
    -- Every some hundred rows: all rows before this one were begun at this time at the latest.
    CREATE TABLE delivery_mark (row INTEGER PRIMARY KEY, begun_at INTEGER NOT NULL);
    CREATE TABLE subscription (
        id INTEGER PRIMARY KEY,
        subscriber TEXT NOT NULL,
        -- A JSON array.
        patterns TEXT NOT NULL,
        since INTEGER NOT NULL,
        -- NULL: they hold today.
        until INTEGER
    );
    CREATE TABLE gap (
        id INTEGER PRIMARY KEY,
        what TEXT NOT NULL,
        since INTEGER NOT NULL,
        until INTEGER NOT NULL,
        why TEXT NOT NULL,
        missing INTEGER
    );
",
    "
    -- How many events of a chunk are of an hour, in hours since 1970. What is missing to the chunk's
    -- number was added before this table, or is of further hours.
    CREATE TABLE event_hour (
        chunk INTEGER NOT NULL,
        hour INTEGER NOT NULL,
        events INTEGER NOT NULL,
        PRIMARY KEY (chunk, hour)
    ) WITHOUT ROWID;
",
    "
    ALTER TABLE subscription ADD COLUMN tenant TEXT;
",
];

/// Precious: what cannot be made again.
const STORE: &[&str] = &[
    "
    -- Single values: the id of the store, and the last number that was reserved for events.
    CREATE TABLE meta (key TEXT PRIMARY KEY, value NOT NULL) WITHOUT ROWID;
",
    "
    -- What operators have done. Times in Unix milliseconds, here and below.
    CREATE TABLE operation (
        row INTEGER PRIMARY KEY AUTOINCREMENT,
        at INTEGER NOT NULL,
        by TEXT NOT NULL,
        what TEXT NOT NULL,
        subject TEXT NOT NULL,
        details TEXT NOT NULL
    );
    CREATE TABLE replay (
        row INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        subscriber TEXT NOT NULL,
        -- As ReplayState::name has it.
        state TEXT NOT NULL,
        why TEXT,
        created_at INTEGER NOT NULL,
        changed_at INTEGER NOT NULL,
        -- The last row of history that was enqueued.
        position INTEGER NOT NULL,
        -- JSON: what is frozen, and how far it has come.
        ordered TEXT NOT NULL,
        progress TEXT NOT NULL
    );
    CREATE INDEX replay_running ON replay (row) WHERE state = 'running';
    -- The subscribers that were ever configured, and since when.
    CREATE TABLE subscriber (name TEXT PRIMARY KEY, since INTEGER NOT NULL) WITHOUT ROWID;
",
    "
    -- The requests that clients may send again: whose, its key, the SHA-256 of what was requested,
    -- and the replay that it made.
    CREATE TABLE request (
        by TEXT NOT NULL,
        key TEXT NOT NULL,
        sha256 BLOB NOT NULL,
        replay TEXT NOT NULL,
        PRIMARY KEY (by, key)
    ) WITHOUT ROWID;
    CREATE INDEX request_replay ON request (replay);
",
    "
    -- Subscribers made over the API, sealed. A row without is one that was deleted: only such a row
    -- says so, and it keeps the version from being given again.
    CREATE TABLE sealed_subscriber (
        name TEXT PRIMARY KEY,
        version INTEGER NOT NULL,
        -- The id of the key.
        key TEXT,
        sealed BLOB,
        created_at INTEGER NOT NULL,
        created_by TEXT NOT NULL,
        changed_at INTEGER NOT NULL,
        changed_by TEXT NOT NULL
    );
    CREATE INDEX sealed_subscriber_deleted ON sealed_subscriber (version) WHERE sealed IS NULL;
",
    "
    -- Of a new subscriber whose first replay is not made yet: from when on it gets events.
    ALTER TABLE subscriber ADD COLUMN start_from INTEGER;
",
    "
    -- Deleted subscribers whose queues are still to be deleted, with all that they hold.
    CREATE TABLE dropping (name TEXT PRIMARY KEY) WITHOUT ROWID;
",
];

pub(super) const HISTORY_FILE: &str = "history.db";
pub(super) const STORE_FILE: &str = "store.db";
pub(super) const LOCK: &str = "store.lock";
/// The last known subscribers made over the API, sealed as they are in the store.
pub(super) const COPY_FILE: &str = "subscribers.sealed";
/// What a file is called while it is written.
pub(super) const PART: &str = ".part";
/// What a damaged file is called that was moved away, before a time.
pub(super) const ASIDE: &str = ".damaged-";
/// The key that seals them, unless others are configured.
pub(super) const KEY_FILE: &str = "store.key";

/// Bytes of a page of history. An event of 400 bytes and its words take 511 bytes of the file with
/// it (measured).
const PAGE: u32 = 8192;

/// Bytes of pages that each connection to history keeps.
const CACHE: usize = 16 << 20;

/// Niceness of the thread that writes history: deliveries go first.
const NICE: i32 = 10;

pub(super) const fn history() -> Options {
    let schema = Schema { application_id: 0x6869_7374, migrations: HISTORY };
    Options {
        synchronous: Synchronous::Normal,
        page_size: Some(PAGE),
        cache: Some(CACHE),
        empties_log: true,
        nice: NICE,
        steps: Some([Step::HistoryCommitting, Step::HistoryCommitted]),
        damaged: "it is set aside, and history begins again",
        ..Options::new("history", "history", schema)
    }
}

pub(super) const fn store() -> Options {
    let schema = Schema { application_id: 0x7374_6f72, migrations: STORE };
    Options {
        empties_log: true,
        backs_up: true,
        // A secret that was replaced or removed is not left in it, sealed as it is.
        overwrites: true,
        steps: Some([Step::StoreCommitting, Step::StoreCommitted]),
        damaged: "stop hooktrail, keep a copy, and put a backup in its place, or move it away",
        ..Options::new("store", "store", schema)
    }
}

/// Where a damaged file is set aside: its name and the time, to the microsecond. Two files of one
/// second must not have one name: the second would replace the first.
pub(super) fn aside_path(path: &Path) -> PathBuf {
    let now = clock::now();
    let second: String =
        clock::rfc3339_seconds(now).chars().filter(|c| !"-:Z".contains(*c)).collect();
    let micros = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().subsec_micros();
    with_suffix(path, &format!("{ASIDE}{second}{micros:06}Z"))
}

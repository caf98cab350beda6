//! The database file with its schema, its lock, and its place.

use std::{
    fs::{File, TryLockError},
    io::Write as _,
    os::unix::fs::DirBuilderExt as _,
    path::Path,
    sync::Arc,
};

use rusqlite::{
    Connection, ToSql,
    types::{FromSql, FromSqlError, FromSqlResult, ToSqlOutput, ValueRef},
};
use tokio::sync::watch;

use super::place::{Place, other_than};
use crate::{
    delivery::SubscriberName,
    event::Tenant,
    failpoint::Step,
    queue::QueueError,
    sqlite::{self, Database, Reader, Schema, with_suffix},
};

impl From<sqlite::Error> for QueueError {
    fn from(e: sqlite::Error) -> Self {
        let text = e.to_string();
        if e.is_for_operator() { Self::needs_operator(text) } else { Self::new(text) }
    }
}

impl ToSql for SubscriberName {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        self.as_str().to_sql()
    }
}

impl ToSql for Tenant {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        Ok(self.as_str().into())
    }
}

impl FromSql for Tenant {
    fn column_result(value: ValueRef<'_>) -> FromSqlResult<Self> {
        Self::try_new(value.as_str()?).ok_or(FromSqlError::InvalidType)
    }
}

impl FromSql for SubscriberName {
    fn column_result(value: ValueRef<'_>) -> FromSqlResult<Self> {
        Self::try_new(value.as_str()?).map_err(FromSqlError::other)
    }
}

/// Migrations, each by one version of the schema; the first from an empty file. Never changed once
/// released.
const MIGRATIONS: &[&str] = &[
    "
    CREATE TABLE event (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        type TEXT NOT NULL,
        message_id TEXT,
        -- Unix milliseconds.
        at INTEGER NOT NULL,
        -- Replayed for one subscriber, whatever its patterns; '': it matched no subscriber.
        only_for TEXT,
        body BLOB NOT NULL
    );
    -- What a subscriber is to get of the log: what its patterns match after one number and up to another;
    -- the segment without an end is that of today's configuration.
    CREATE TABLE segment (
        id INTEGER PRIMARY KEY,
        subscriber TEXT NOT NULL,
        patterns TEXT NOT NULL,
        after INTEGER NOT NULL,
        upto INTEGER
    );
    CREATE INDEX segment_subscriber ON segment (subscriber, after);
    -- What of the log a subscriber is done with beyond what comes before it: runs of numbers.
    CREATE TABLE ahead (
        subscriber TEXT NOT NULL,
        first INTEGER NOT NULL,
        last INTEGER NOT NULL,
        PRIMARY KEY (subscriber, first)
    ) WITHOUT ROWID;
    CREATE TABLE retry (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        subscriber TEXT NOT NULL,
        -- Unix milliseconds.
        due INTEGER NOT NULL,
        batch_id TEXT NOT NULL,
        content_type TEXT NOT NULL,
        events INTEGER NOT NULL,
        attempts INTEGER NOT NULL,
        first_attempt_at INTEGER,
        body BLOB NOT NULL
    );
    CREATE INDEX retry_due ON retry (subscriber, due, id);
    CREATE TABLE dead (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        subscriber TEXT NOT NULL,
        kind TEXT NOT NULL,
        reason TEXT NOT NULL,
        letter_id TEXT,
        content_type TEXT,
        events INTEGER NOT NULL,
        attempts INTEGER NOT NULL,
        status INTEGER,
        error TEXT NOT NULL,
        first_attempt_at INTEGER,
        died_at INTEGER,
        body BLOB NOT NULL
    );
    CREATE INDEX dead_subscriber ON dead (subscriber, id);
",
    "
    -- Who is paused, and who was resumed when; times in Unix milliseconds.
    CREATE TABLE standing (
        subscriber TEXT PRIMARY KEY,
        why TEXT,
        by TEXT,
        since INTEGER,
        resumed_at INTEGER
    ) WITHOUT ROWID;
",
    "
    -- As W3C Trace Context has it; of a retry that of its first event.
    ALTER TABLE event ADD COLUMN traceparent TEXT;
    ALTER TABLE retry ADD COLUMN traceparent TEXT;
    -- The failed attempts, as `AttemptLog::to_text` writes them; NULL where there is none, as before this version.
    ALTER TABLE retry ADD COLUMN story TEXT;
    -- An operator has sent it again.
    ALTER TABLE retry ADD COLUMN replay INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE dead ADD COLUMN story TEXT;
",
    "
    -- Unix milliseconds; NULL of those from before this version. Later than now: the clock was set back since.
    ALTER TABLE retry ADD COLUMN scheduled_at INTEGER;
",
    "
    -- 8 bytes for each event, in their order; NULL where they are unknown or too many.
    ALTER TABLE retry ADD COLUMN prints BLOB;
    ALTER TABLE dead ADD COLUMN prints BLOB;
",
    "
    -- Events that matched no subscriber: history alone has them.
    CREATE INDEX event_unmatched ON event (seq, at) WHERE only_for = '';
",
    "
    -- `after` when the segment was begun; NULL where that was before this version.
    ALTER TABLE segment ADD COLUMN begun INTEGER;
",
    "
    -- One row. `segments` is another number after each change of what the subscribers are to get; how far they have
    -- come is no such change. At random, so that a number of a change that was rolled back does not come again.
    CREATE TABLE log_state (segments INTEGER NOT NULL);
    INSERT INTO log_state (segments) VALUES (random());
    CREATE TRIGGER segment_begun AFTER INSERT ON segment BEGIN UPDATE log_state SET segments = random(); END;
    CREATE TRIGGER segment_deleted AFTER DELETE ON segment BEGIN UPDATE log_state SET segments = random(); END;
    CREATE TRIGGER segment_changed AFTER UPDATE OF subscriber, patterns, upto, begun ON segment
        BEGIN UPDATE log_state SET segments = random(); END;
",
    "
    -- When a subscriber is done with a segment that has ended, nothing changes of what it is to get.
    DROP TRIGGER segment_deleted;
    CREATE TRIGGER segment_deleted AFTER DELETE ON segment WHEN OLD.upto IS NULL
        BEGIN UPDATE log_state SET segments = random(); END;
",
    "
    -- The bindings of the queue that events come through, as this daemon has made them: AMQP lists none.
    CREATE TABLE intake_binding (
        queue TEXT NOT NULL,
        exchange TEXT NOT NULL,
        pattern TEXT NOT NULL,
        PRIMARY KEY (queue, exchange, pattern)
    ) WITHOUT ROWID;
",
    "
    -- Whose an event is; NULL if that is nobody in particular.
    ALTER TABLE event ADD COLUMN tenant TEXT;
    CREATE INDEX event_tenant ON event (tenant, seq) WHERE tenant IS NOT NULL;
    -- The tenants of the subscribers that have one. A row holds as long as something is left of its subscriber.
    CREATE TABLE tenancy (subscriber TEXT PRIMARY KEY, tenant TEXT NOT NULL) WITHOUT ROWID;
",
    "
    -- The number of its first event, or of that of the batch that it is a part of; NULL where it is not known: an
    -- operator has sent it again, or it is from before this version.
    ALTER TABLE retry ADD COLUMN seq INTEGER;
    CREATE INDEX retry_in_order ON retry (subscriber, seq, batch_id) WHERE NOT replay;
    CREATE INDEX retry_replay ON retry (subscriber, due, id) WHERE replay;
",
];

/// Mark of hooktrail's files (`PRAGMA application_id`).
const APPLICATION_ID: i32 = 0x686f_6f6b;

const FILE: &str = "hooktrail.db";
pub(super) const LOCK: &str = "hooktrail.lock";
const OPENING: &str = "hooktrail.opening";

/// The options of the file, for a daemon or for commands.
const fn options(is_daemon: bool) -> sqlite::Options {
    let schema = Schema { application_id: APPLICATION_ID, migrations: MIGRATIONS };
    sqlite::Options {
        empties_log: is_daemon,
        steps: Some([Step::Committing, Step::Committed]),
        ..sqlite::Options::new("embedded queue", "hooktrail", schema)
    }
}

/// An open database. Clones share it.
#[derive(Debug, Clone)]
pub(super) struct Store(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    database: Database,
    place: Arc<Place>,
    /// The daemon's lock.
    lock: Option<File>,
}

/// The use of the database.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Access {
    /// The daemon, exclusively.
    Daemon,
    /// Publishing, alongside a daemon or without one.
    Create,
    /// Commands on an existing database.
    Existing,
}

impl Store {
    pub(super) fn open(data_dir: &Path, access: Access) -> Result<Self, QueueError> {
        let path = data_dir.join(FILE);
        if access == Access::Existing && !exists(data_dir)? {
            return Err(QueueError::needs_operator(format!(
                "there is no embedded queue in `{}`: nothing was ever published to it, or [queue] data_dir means another directory",
                data_dir.display()
            )));
        }
        // Other users must not read events.
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(data_dir).map_err(|e| {
            denied(&format!("[queue] data_dir `{}` cannot be made", data_dir.display()), &e)
        })?;
        // A starting daemon has recorded which files are its own before others check.
        let opening = sqlite::opening(&path)?;
        let lock = if access == Access::Daemon { Some(lock(data_dir)?) } else { None };
        if let (None, Some(lost)) = (&lock, lost_by_a_daemon(data_dir)) {
            return Err(lost);
        }
        let database = Database::open_during(&opening, &path, &options(access == Access::Daemon))?;
        let place = Arc::new(place(&path, lock.as_ref())?);
        Ok(Self(Arc::new(Inner { database, place, lock })))
    }

    /// Its files as they were when they were opened.
    pub(super) fn place(&self) -> Arc<Place> {
        self.0.place.clone()
    }

    /// Closes the connections: all that a daemon has written is then in the database itself, and
    /// not in the write-ahead log. Nothing can be read or written afterwards.
    pub(super) async fn close(&self) {
        // These are not its files any more; the write-ahead log is deleted with the last connection
        // to it.
        if let Some(Err(e)) = self.0.lock.as_ref().map(|lock| lock.set_len(0)) {
            tracing::debug!(error = %e, "the lock still names the files");
        }
        self.0.database.close().await;
    }

    pub(super) fn path(&self) -> &Path {
        self.0.database.path()
    }

    /// Counts this process's commits.
    pub(super) fn commits(&self) -> watch::Receiver<u64> {
        self.0.database.commits()
    }

    /// Runs a part of a transaction and returns when that is on the disk.
    ///
    /// # Errors
    /// Nothing of it is on the disk.
    pub(super) async fn write<T: Send + 'static>(
        &self,
        part: impl FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, QueueError> {
        Ok(self.0.database.write(part).await?)
    }

    /// Whether too many jobs wait, so that producers should wait.
    pub(super) fn is_behind(&self) -> bool {
        self.0.database.is_behind()
    }

    pub(super) async fn read<T: Send + 'static>(
        &self,
        query: impl FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, QueueError> {
        Ok(self.0.database.read(query).await?)
    }

    /// The same as [`read`](Self::read), for long queries.
    pub(super) async fn read_long<T: Send + 'static>(
        &self,
        query: impl FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, QueueError> {
        Ok(self.0.database.read_long(query).await?)
    }
}

/// Opens the file of an existing queue to read it on one thread.
pub(super) fn open_reader(data_dir: &Path) -> Result<Reader, QueueError> {
    if let Some(lost) = lost_by_a_daemon(data_dir) {
        return Err(lost);
    }
    Ok(Reader::open(&data_dir.join(FILE), &options(false))?)
}

/// The error for a file that is unusable for this process, with the remedy.
fn denied(what: &str, e: &std::io::Error) -> QueueError {
    sqlite::denied(what, e).into()
}

/// Whether there is a database, also one that a daemon has open and that is not at its path any
/// more.
///
/// # Errors
/// The user may not read it, or not even the directory.
pub(super) fn exists(data_dir: &Path) -> Result<bool, QueueError> {
    let file = data_dir.join(FILE);
    // Readers write too: to the index of the write-ahead log.
    let usable =
        || rustix::fs::access(&file, rustix::fs::Access::READ_OK | rustix::fs::Access::WRITE_OK);
    let found = file.try_exists().and_then(|there| {
        if there { usable().map(|()| true).map_err(Into::into) } else { Ok(false) }
    });
    let there = found.map_err(|e| {
        denied(&format!("the embedded queue `{}` cannot be read", file.display()), &e)
    })?;
    Ok(there || lost_by_a_daemon(data_dir).is_some())
}

/// The open files as they are now; recorded in the daemon's lock for other processes.
fn place(database: &Path, lock: Option<&File>) -> Result<Place, QueueError> {
    let lock_file = lock.map(|_| database.with_file_name(LOCK));
    let place = Place::of(
        [database.to_owned(), with_suffix(database, "-wal"), with_suffix(database, "-shm")]
            .into_iter()
            .chain(lock_file),
    );
    if let Some(mut lock) = lock {
        lock.set_len(0).and_then(|()| lock.write_all(place.to_text().as_bytes())).map_err(|e| {
            QueueError::needs_operator(format!(
                "`{}` cannot be written: {e}",
                database.with_file_name(LOCK).display()
            ))
        })?;
    }
    Ok(place)
}

/// The error if a daemon works in the directory and has other files open than those there: a new
/// file would take events that are never delivered.
fn lost_by_a_daemon(data_dir: &Path) -> Option<QueueError> {
    let lock = File::open(data_dir.join(LOCK)).ok()?;
    let text = std::io::read_to_string(&lock).ok()?;
    let (file, pid) = other_than(&text, data_dir)?;
    // Without a daemon its record says nothing: its files may have been restored from a backup.
    // Tried last: while this holds the lock, even for a moment, no daemon gets it.
    let Err(TryLockError::WouldBlock) = lock.try_lock_shared() else { return None };
    Some(QueueError::needs_operator(format!(
        "the daemon that works on `{}` (process {pid}) has another file open than `{}`, which was deleted, moved or replaced under it; nothing was written. Its log says how to copy what it holds (docs/operations.md, \"The embedded queue's file is lost\")",
        data_dir.display(),
        file.display()
    )))
}

/// Deletes the database and its other files; last the lock, which keeps daemons away.
pub(super) fn delete(path: &Path) -> Result<(), QueueError> {
    let dir = path.parent().unwrap_or(Path::new("."));
    for file in [
        path.to_owned(),
        with_suffix(path, "-wal"),
        with_suffix(path, "-shm"),
        dir.join(OPENING),
        dir.join(LOCK),
    ] {
        match std::fs::remove_file(&file) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                return Err(QueueError::needs_operator(format!(
                    "`{}` cannot be deleted: {e}",
                    file.display()
                )));
            }
            Ok(()) | Err(_) => {}
        }
    }
    Ok(())
}

/// The lock ends with the process, in any case.
fn lock(data_dir: &Path) -> Result<File, QueueError> {
    let path = data_dir.join(LOCK);
    let file = File::options().create(true).truncate(false).write(true).open(&path);
    let locked = file.and_then(|file| match file.try_lock() {
        Ok(()) => Ok(Some(file)),
        Err(TryLockError::WouldBlock) => Ok(None),
        Err(TryLockError::Error(e)) => Err(e),
    });
    match locked {
        Ok(Some(file)) => Ok(file),
        Ok(None) => Err(QueueError::needs_operator(format!(
            "another daemon works on `{}`: the embedded queue is for one; several share a RabbitMQ ([queue] url)",
            data_dir.display()
        ))),
        Err(e) => Err(denied(&format!("`{}` cannot be locked", path.display()), &e)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_may_open_a_new_file_at_once() {
        for _ in 0..5 {
            let dir = tempfile::tempdir().expect("a directory");
            std::thread::scope(|all| {
                for _ in 0..12 {
                    all.spawn(|| {
                        Store::open(&dir.path().join("data"), Access::Create)
                            .unwrap_or_else(|e| panic!("{e}"))
                    });
                }
            });
        }
    }

    #[tokio::test]
    async fn what_an_earlier_version_wrote_is_read_without_an_attempt_log_and_without_prints() {
        let dir = tempfile::tempdir().expect("a directory");
        let old = Connection::open(dir.path().join(FILE)).expect("opens");
        old.execute_batch(&MIGRATIONS[..2].concat()).expect("the schema of then");
        old.pragma_update(None, "user_version", 2).expect("sets");
        old.pragma_update(None, "application_id", APPLICATION_ID).expect("sets");
        old.execute_batch(
            "INSERT INTO retry (subscriber, due, batch_id, content_type, events, attempts, body) VALUES ('a', 0, 'msg_1', 'application/json', 1, 3, x'7b7d');
             INSERT INTO dead (subscriber, kind, reason, events, attempts, error, body) VALUES ('a', 'batch', 'exhausted', 1, 3, '', x'7b7d');",
        )
        .expect("writes");
        drop(old);
        let store = Store::open(dir.path(), Access::Existing).expect("opens");
        let query = |db: &Connection| {
            let retry: (u32, Option<String>, bool, Option<Vec<u8>>) =
                db.query_row("SELECT attempts, story, replay, prints FROM retry", [], |r| {
                    Ok((r.get(0)?, r.get(1)?, r.get(2)?, r.get(3)?))
                })?;
            let dead: (u32, Option<String>, Option<Vec<u8>>) =
                db.query_row("SELECT attempts, story, prints FROM dead", [], |r| {
                    Ok((r.get(0)?, r.get(1)?, r.get(2)?))
                })?;
            Ok((retry, dead))
        };
        assert_eq!(
            store.read(query).await.expect("reads"),
            ((3, None, false, None), (3, None, None))
        );
    }

    #[tokio::test]
    async fn a_daemon_that_has_closed_leaves_everything_in_the_database_itself() {
        let dir = tempfile::tempdir().expect("a directory");
        let store = Store::open(dir.path(), Access::Daemon).expect("opens");
        let insert = |db: &Connection| {
            db.execute("INSERT INTO event (type, at, body) VALUES ('a', 0, zeroblob(100000))", [])
        };
        store.write(insert).await.expect("writes");
        let wal = dir.path().join("hooktrail.db-wal");
        assert!(std::fs::metadata(&wal).is_ok_and(|m| m.len() > 0));
        // Another process may have it open.
        let other = Store::open(dir.path(), Access::Existing).expect("opens");
        let in_line = store.write(insert);
        tokio::join!(
            async { in_line.await.expect("what was asked before is done") },
            store.close()
        );
        assert!(std::fs::metadata(&wal).is_ok_and(|m| m.len() == 0), "nothing is left in the log");
        store.write(insert).await.expect_err("it is closed");
        store.close().await;
        let count = |store: Store| async move {
            store
                .read(|db| db.query_row("SELECT count(*) FROM event", [], |r| r.get::<_, u32>(0)))
                .await
        };
        assert_eq!(count(other.clone()).await.expect("reads"), 2);
        other.close().await;
        assert!(!wal.exists(), "the last one deletes it");
        assert_eq!(
            count(Store::open(dir.path(), Access::Existing).expect("opens")).await.expect("reads"),
            2
        );
    }

    #[tokio::test]
    async fn a_part_that_panics_ends_neither_the_threads_nor_what_comes_after_it() {
        let dir = tempfile::tempdir().expect("a directory");
        let store = Store::open(dir.path(), Access::Daemon).expect("opens");
        assert!(store.write(|_| -> rusqlite::Result<()> { panic!("on purpose") }).await.is_err());
        assert!(store.read(|_| -> rusqlite::Result<()> { panic!("on purpose") }).await.is_err());
        store
            .write(|db| db.execute("INSERT INTO event (type, at, body) VALUES ('a', 0, x'')", []))
            .await
            .expect("writes");
        let count: u32 = store
            .read(|db| db.query_row("SELECT count(*) FROM event", [], |r| r.get(0)))
            .await
            .expect("reads");
        assert_eq!(count, 1);
    }
}

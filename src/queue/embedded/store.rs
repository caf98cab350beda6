//! The database file: opened, locked, brought to today's schema, written by one thread that commits
//! what has gathered meanwhile in one go, read by another.

use std::{
    fs::{File, TryLockError},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use rusqlite::{Connection, ErrorCode, OpenFlags, TransactionBehavior};
use tokio::sync::{mpsc, oneshot, watch};

use crate::{
    failpoint::{Step, reached},
    queue::QueueError,
};

/// Each takes the schema one version further; the first from an empty file. Never changed once released.
const MIGRATIONS: &[&str] = &[
    "
    CREATE TABLE event (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        type TEXT NOT NULL,
        message_id TEXT,
        -- Unix milliseconds.
        at INTEGER NOT NULL,
        -- Replayed for one subscriber, whatever its patterns.
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
    -- The failed attempts, as `Story::to_text` writes them; NULL where there is none, as before this version.
    ALTER TABLE retry ADD COLUMN story TEXT;
    -- An operator has sent it again.
    ALTER TABLE retry ADD COLUMN replay INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE dead ADD COLUMN story TEXT;
",
    "
    -- Unix milliseconds; NULL of those from before this version. Later than now: the clock was set back since.
    ALTER TABLE retry ADD COLUMN scheduled_at INTEGER;
",
];

/// Marks the file as hooktrail's (`PRAGMA application_id`).
const APPLICATION_ID: i32 = 0x686f_6f6b;

const FILE: &str = "hooktrail.db";
pub(super) const LOCK: &str = "hooktrail.lock";
const OPENING: &str = "hooktrail.opening";

/// How long one process waits for another's transaction.
const BUSY: Duration = Duration::from_secs(10);

/// Jobs that wait for the writing thread; more wait in line.
const JOBS: usize = 1024;

/// Jobs in one transaction.
const GROUP: usize = 256;

/// An open database. Clones are the same.
#[derive(Debug, Clone)]
pub(super) struct Store(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    path: PathBuf,
    writer: mpsc::Sender<WriteJob>,
    reader: mpsc::Sender<ReadJob>,
    /// For queries that may take long: no lane waits behind them.
    looker: mpsc::Sender<ReadJob>,
    /// Counts the commits of this process.
    commits: watch::Receiver<u64>,
    /// Held by the daemon.
    _lock: Option<File>,
}

type ReadJob = Box<dyn FnOnce(&Connection) + Send>;
/// Does its part of a transaction, and returns what is to be done once it is known whether that was committed.
type WriteJob = Box<dyn FnOnce(&Connection) -> Box<dyn FnOnce(Result<(), String>)> + Send>;

/// What a process wants of the database.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Access {
    /// All of it, alone: there is one daemon.
    Daemon,
    /// To publish beside a daemon or without one.
    Create,
    /// To look at what is there.
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
        // Events are nobody else's to read.
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(data_dir)
            .map_err(|e| denied(&format!("[queue] data_dir `{}` cannot be made", data_dir.display()), &e))?;
        let lock = if access == Access::Daemon { Some(lock(data_dir)?) } else { None };
        // SQLite does not wait for another process where that makes a new file a write-ahead-logged one.
        let _opening = opening(data_dir)?;
        // In a directory that was there before, too. SQLite gives what it puts beside the file the same mode, and says better
        // than this what is wrong with a file that cannot be opened.
        File::options().create(true).truncate(false).write(true).mode(0o600).open(&path).ok();
        let error = |e: rusqlite::Error| needs_operator(&path, &e);
        let mut writer = connect(&path).map_err(error)?;
        migrate(&mut writer, &path)?;
        let (reader, looker) = (connect(&path).map_err(error)?, connect(&path).map_err(error)?);
        let (write_jobs, inbox) = mpsc::channel(JOBS);
        let (commits, committed) = watch::channel(0);
        thread("hooktrail-writer", move || write(&writer, inbox, &commits));
        let (reader, looker) = (read("hooktrail-reader", reader), read("hooktrail-looker", looker));
        Ok(Self(Arc::new(Inner { path, writer: write_jobs, reader, looker, commits: committed, _lock: lock })))
    }

    pub(super) fn path(&self) -> &Path {
        &self.0.path
    }

    /// Counts this process's commits.
    pub(super) fn commits(&self) -> watch::Receiver<u64> {
        self.0.commits.clone()
    }

    /// Runs a part of a transaction and returns when that is on the disk.
    ///
    /// # Errors
    /// Nothing of it is.
    pub(super) async fn write<T: Send + 'static>(
        &self,
        part: impl FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, QueueError> {
        let (reply, answer) = oneshot::channel();
        let job: WriteJob = Box::new(move |db| {
            let done = savepoint(db, part);
            Box::new(move |committed| {
                let result = match (done, committed) {
                    (Ok(value), Ok(())) => Ok(value),
                    (Ok(_) | Err(rusqlite::Error::InvalidQuery), Err(why)) => Err(why),
                    (Err(e), _) => Err(explain(&e)),
                };
                reply.send(result).ok(); // whoever asked may have given up
            })
        });
        if self.0.writer.send(job).await.is_err() {
            return Err(self.error("its writing thread has ended"));
        }
        match answer.await {
            Ok(result) => result.map_err(|why| self.error(&why)),
            Err(_) => Err(self.error("the change was given up, by a panic or at the end; nothing of it is stored")),
        }
    }

    /// Whether so many jobs wait that new events should come later.
    pub(super) fn is_behind(&self) -> bool {
        self.0.writer.capacity() < JOBS / 2
    }

    pub(super) async fn read<T: Send + 'static>(
        &self,
        query: impl FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, QueueError> {
        self.ask(&self.0.reader, query).await
    }

    /// As [`read`](Self::read), for what may take long.
    pub(super) async fn look<T: Send + 'static>(
        &self,
        query: impl FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, QueueError> {
        self.ask(&self.0.looker, query).await
    }

    async fn ask<T: Send + 'static>(
        &self,
        thread: &mpsc::Sender<ReadJob>,
        query: impl FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, QueueError> {
        let (reply, answer) = oneshot::channel();
        let job: ReadJob = Box::new(move |db| drop(reply.send(query(db))));
        if thread.send(job).await.is_err() {
            return Err(self.error("its reading thread has ended"));
        }
        match answer.await {
            Ok(result) => result.map_err(|e| self.error(&explain(&e))),
            Err(_) => Err(self.error("the query was given up, by a panic or at the end")),
        }
    }

    fn error(&self, why: &str) -> QueueError {
        QueueError::new(format!("embedded queue `{}`: {why}", self.0.path.display()))
    }
}

/// Starts a thread that answers queries, one after the other.
fn read(name: &str, db: Connection) -> mpsc::Sender<ReadJob> {
    let (jobs, mut inbox) = mpsc::channel::<ReadJob>(JOBS);
    thread(name, move || {
        while let Some(job) = inbox.blocking_recv() {
            // A query that panics is that query's end; whoever asked is told by the dropped reply.
            catch_unwind(AssertUnwindSafe(|| job(&db))).ok();
        }
    });
    jobs
}

fn thread(name: &str, body: impl FnOnce() + Send + 'static) {
    // It ends with its inbox; a process that cannot start a thread cannot work at all.
    std::thread::Builder::new().name(name.to_owned()).spawn(body).expect("a thread for the embedded queue");
}

/// Whether there is a database.
///
/// # Errors
/// Who asks may not read it, or not even see whether it is there.
pub(super) fn exists(data_dir: &Path) -> Result<bool, QueueError> {
    let file = data_dir.join(FILE);
    // What reads it writes too: to the write-ahead log's index.
    let usable = || rustix::fs::access(&file, rustix::fs::Access::READ_OK | rustix::fs::Access::WRITE_OK);
    let looked = file.try_exists().and_then(|there| if there { usable().map(|()| true).map_err(Into::into) } else { Ok(false) });
    looked.map_err(|e| denied(&format!("the embedded queue `{}` cannot be read", file.display()), &e))
}

/// Why a file is of no use to this process, and what to do about it.
fn denied(what: &str, e: &std::io::Error) -> QueueError {
    let remedy = match e.kind() {
        std::io::ErrorKind::PermissionDenied => "; run this as the service's user (sudo -u hooktrail …)",
        _ => "",
    };
    QueueError::needs_operator(format!("{what}: {e}{remedy}"))
}

/// Waits until no other process opens the database; as long as the file lives, none does.
fn opening(data_dir: &Path) -> Result<File, QueueError> {
    let path = data_dir.join(OPENING);
    let file = File::options().create(true).truncate(false).write(true).open(&path);
    let locked = file.and_then(|file| file.lock().map(|()| file));
    locked.map_err(|e| denied(&format!("`{}` cannot be locked", path.display()), &e))
}

/// Deletes the database and what is beside it; the lock that keeps daemons away goes last.
pub(super) fn delete(path: &Path) -> Result<(), QueueError> {
    let beside = |suffix: &str| {
        let mut name = path.as_os_str().to_owned();
        name.push(suffix);
        PathBuf::from(name)
    };
    let dir = path.parent().unwrap_or(Path::new("."));
    for file in [path.to_owned(), beside("-wal"), beside("-shm"), dir.join(OPENING), dir.join(LOCK)] {
        match std::fs::remove_file(&file) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                return Err(QueueError::needs_operator(format!("`{}` cannot be deleted: {e}", file.display())));
            }
            Ok(()) | Err(_) => {}
        }
    }
    Ok(())
}

/// The lock ends with the process, however that ends.
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

fn connect(path: &Path) -> rusqlite::Result<Connection> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_CREATE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let db = Connection::open_with_flags(path, flags)?;
    db.busy_timeout(BUSY)?;
    db.pragma_update(None, "journal_mode", "WAL")?;
    // Each commit is on the disk when it returns, as far as the disk keeps its word.
    db.pragma_update(None, "synchronous", "FULL")?;
    // The write-ahead log is given back after a burst.
    db.pragma_update(None, "journal_size_limit", 64 << 20)?;
    db.set_prepared_statement_cache_capacity(64);
    Ok(db)
}

fn migrate(db: &mut Connection, path: &Path) -> Result<(), QueueError> {
    let error = |e: rusqlite::Error| needs_operator(path, &e);
    // At once for writing: two processes may open a new file together.
    let change = db.transaction_with_behavior(TransactionBehavior::Immediate).map_err(error)?;
    let version: u32 = change.pragma_query_value(None, "user_version", |row| row.get(0)).map_err(error)?;
    let id: i32 = change.pragma_query_value(None, "application_id", |row| row.get(0)).map_err(error)?;
    let is_empty: bool = change.query_row("SELECT NOT EXISTS (SELECT 1 FROM sqlite_master)", [], |row| row.get(0)).map_err(error)?;
    if id != APPLICATION_ID && (version > 0 || id != 0 || !is_empty) {
        return Err(QueueError::needs_operator(format!(
            "`{}` is a database of another program; choose another [queue] data_dir",
            path.display()
        )));
    }
    let known = u32::try_from(MIGRATIONS.len()).unwrap_or(u32::MAX);
    if version > known {
        return Err(QueueError::needs_operator(format!(
            "`{}` was written by a later version of hooktrail (schema {version}; this one knows {known}); run that version, or a newer one",
            path.display()
        )));
    }
    if version < known {
        for migration in &MIGRATIONS[version as usize..] {
            change.execute_batch(migration).map_err(error)?;
        }
        change.pragma_update(None, "user_version", known).map_err(error)?;
        change.pragma_update(None, "application_id", APPLICATION_ID).map_err(error)?;
    }
    change.commit().map_err(error)
}

/// Commits what has gathered, over and over.
fn write(db: &Connection, mut inbox: mpsc::Receiver<WriteJob>, commits: &watch::Sender<u64>) {
    while let Some(first) = inbox.blocking_recv() {
        let begun = db.execute_batch("BEGIN IMMEDIATE").map_err(|e| explain(&e));
        let mut done = Vec::new();
        let mut next = Some(first);
        let mut panicked = false;
        while let Some(job) = next {
            match catch_unwind(AssertUnwindSafe(|| job(db))) {
                Ok(answer) => done.push(answer),
                // It may have stopped anywhere: the group is not committed, and its asker told by the dropped reply.
                Err(_) => panicked = true,
            }
            // A full disk can end the whole transaction: what follows must not be committed by itself.
            next = if done.len() < GROUP && !panicked && !db.is_autocommit() { inbox.try_recv().ok() } else { None };
        }
        let committed = begun.and_then(|()| {
            if panicked || db.is_autocommit() {
                return Err("the transaction was rolled back".to_owned());
            }
            reached(Step::Committing);
            let committed = db.execute_batch("COMMIT").map_err(|e| explain(&e));
            reached(Step::Committed);
            committed
        });
        if committed.is_err() && !db.is_autocommit() {
            db.execute_batch("ROLLBACK").ok(); // if that fails too, the next BEGIN says so
        }
        for answer in done {
            answer(committed.clone());
        }
        if committed.is_ok() {
            commits.send_modify(|n| *n += 1);
        }
    }
}

/// A part that fails takes nothing of the others with it.
fn savepoint<T>(db: &Connection, part: impl FnOnce(&Connection) -> rusqlite::Result<T>) -> rusqlite::Result<T> {
    if db.is_autocommit() {
        return Err(rusqlite::Error::InvalidQuery); // BEGIN failed; the group is told why
    }
    db.execute_batch("SAVEPOINT part")?;
    let done = part(db);
    if done.is_err() && !db.is_autocommit() {
        db.execute_batch("ROLLBACK TO part")?;
    }
    if !db.is_autocommit() {
        db.execute_batch("RELEASE part")?;
    }
    done
}

fn needs_operator(path: &Path, e: &rusqlite::Error) -> QueueError {
    QueueError::needs_operator(format!("embedded queue `{}`: {}", path.display(), explain(e)))
}

/// What an error of SQLite means and what to do, where that is known.
fn explain(e: &rusqlite::Error) -> String {
    let remedy = match e.sqlite_error_code() {
        Some(ErrorCode::DiskFull) => "the disk is full; nothing is lost, and it goes on when there is room again",
        Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => {
            "the file is damaged: stop hooktrail, keep a copy, and save what can be read of it (docs/operations.md, \"Disaster recovery\"), or move it away to begin anew"
        }
        Some(ErrorCode::ReadOnly | ErrorCode::CannotOpen | ErrorCode::PermissionDenied) => {
            "check the permissions of the directory and its files, and run this as the service's user (sudo -u hooktrail …)"
        }
        Some(ErrorCode::SystemIoFailure) => "the disk failed or is full; check it",
        Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => "another process holds it",
        _ => return e.to_string(),
    };
    format!("{e}: {remedy}")
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
                    all.spawn(|| Store::open(&dir.path().join("data"), Access::Create).unwrap_or_else(|e| panic!("{e}")));
                }
            });
        }
    }

    #[tokio::test]
    async fn what_an_earlier_version_wrote_is_read_without_a_story() {
        let dir = tempfile::tempdir().expect("a directory");
        let old = connect(&dir.path().join(FILE)).expect("opens");
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
            let retry: (u32, Option<String>, bool) =
                db.query_row("SELECT attempts, story, replay FROM retry", [], |r| Ok((r.get(0)?, r.get(1)?, r.get(2)?)))?;
            let dead: (u32, Option<String>) = db.query_row("SELECT attempts, story FROM dead", [], |r| Ok((r.get(0)?, r.get(1)?)))?;
            Ok((retry, dead))
        };
        assert_eq!(store.read(query).await.expect("reads"), ((3, None, false), (3, None)));
    }

    #[tokio::test]
    async fn a_part_that_panics_ends_neither_the_threads_nor_what_comes_after_it() {
        let dir = tempfile::tempdir().expect("a directory");
        let store = Store::open(dir.path(), Access::Daemon).expect("opens");
        assert!(store.write(|_| -> rusqlite::Result<()> { panic!("told to") }).await.is_err());
        assert!(store.read(|_| -> rusqlite::Result<()> { panic!("told to") }).await.is_err());
        store.write(|db| db.execute("INSERT INTO event (type, at, body) VALUES ('a', 0, x'')", [])).await.expect("writes");
        let count: u32 = store.read(|db| db.query_row("SELECT count(*) FROM event", [], |r| r.get(0))).await.expect("reads");
        assert_eq!(count, 1);
    }
}

//! The database file: opened, locked, migrated to today's schema. One thread writes, and commits
//! all jobs that have gathered meanwhile together; another one reads.

use std::{
    fs::{File, TryLockError},
    io::Write as _,
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use rusqlite::{
    Connection, ErrorCode, OpenFlags, ToSql, TransactionBehavior,
    types::{FromSql, FromSqlError, FromSqlResult, ToSqlOutput, ValueRef},
};
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::timeout,
};

use super::place::{Place, other_than};
use crate::{
    clock,
    delivery::SubscriberName,
    failpoint::{Step, reached},
    queue::QueueError,
};

impl ToSql for SubscriberName {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        self.as_str().to_sql()
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
];

/// Mark of hooktrail's files (`PRAGMA application_id`).
const APPLICATION_ID: i32 = 0x686f_6f6b;

const FILE: &str = "hooktrail.db";
pub(super) const LOCK: &str = "hooktrail.lock";
const OPENING: &str = "hooktrail.opening";

/// Timeout of waiting for another process's transaction.
const BUSY: Duration = Duration::from_secs(10);

/// Timeout of opening the file while other processes use it.
const OPENS_WITHIN: Duration = Duration::from_secs(20);

/// Timeout of one step of it, before it is tried again.
const OPENS_STEP: Duration = Duration::from_secs(1);

/// Time between two tries to open a file that another process uses.
const BUSY_REST: Duration = Duration::from_millis(20);

/// Jobs that wait for the writing thread; more wait before they are added.
const JOBS: usize = 1024;

/// Jobs in one transaction.
const GROUP: usize = 256;

/// Timeout of each thread at the end: a longer query ends with the process.
const END_TIMEOUT: Duration = Duration::from_secs(5);

/// Timeout of other processes at the end, before the write-ahead log is left to them.
const END_BUSY_TIMEOUT: Duration = Duration::from_secs(1);

/// An open database. Clones share it.
#[derive(Debug, Clone)]
pub(super) struct Store(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    path: PathBuf,
    place: Arc<Place>,
    writer: mpsc::Sender<Job<WriteJob>>,
    reader: mpsc::Sender<Job<ReadJob>>,
    /// For queries that may take long: no lane waits behind them.
    looker: mpsc::Sender<Job<ReadJob>>,
    /// Counts the commits of this process.
    commits: watch::Receiver<u64>,
    /// The daemon's lock.
    lock: Option<File>,
}

/// A message to a thread.
enum Job<J> {
    Do(J),
    /// Close the connection and end; later jobs are refused.
    End(oneshot::Sender<()>),
}

type ReadJob = Box<dyn FnOnce(&Connection) + Send>;
/// A part of a transaction. Returns what to do once it is known whether that was committed.
type WriteJob = Box<dyn FnOnce(&Connection) -> Box<dyn FnOnce(Result<(), String>)> + Send>;

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
        Self::open_within(OPENS_WITHIN, data_dir, access)
    }

    fn open_within(time: Duration, data_dir: &Path, access: Access) -> Result<Self, QueueError> {
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
        // SQLite does not wait for another process that turns a new file into a write-ahead-logged
        // one. And a starting daemon has recorded which files are its own before others check.
        let _opening = opening(data_dir)?;
        let lock = if access == Access::Daemon { Some(lock(data_dir)?) } else { None };
        if let (None, Some(lost)) = (&lock, lost_by_a_daemon(data_dir)) {
            return Err(lost);
        }
        // In an existing directory too. SQLite gives its other files the same mode, and explains
        // better why a file cannot be opened.
        File::options().create(true).truncate(false).write(true).mode(0o600).open(&path).ok();
        let error = |e: rusqlite::Error| needs_operator(&path, &e);
        let until = clock::instant() + time;
        let connect = || patiently(until, || connect(&path)).map_err(error);
        let mut writer = connect()?;
        patiently(until, || migrate(&mut writer, &path)).map_err(error)??;
        let (reader, looker) = (connect()?, connect()?);
        for db in [&writer, &reader, &looker] {
            db.busy_timeout(BUSY).map_err(error)?;
        }
        let place = place(&path, lock.as_ref())?;
        let (write_jobs, inbox) = mpsc::channel(JOBS);
        let (commits, committed) = watch::channel(0);
        let empties = access == Access::Daemon;
        thread("hooktrail-writer", move || write(writer, inbox, &commits, empties));
        let (reader, looker) = (read("hooktrail-reader", reader), read("hooktrail-looker", looker));
        Ok(Self(Arc::new(Inner {
            path,
            place: Arc::new(place),
            writer: write_jobs,
            reader,
            looker,
            commits: committed,
            lock,
        })))
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
        let (reader, looker, writer) = (&self.0.reader, &self.0.looker, &self.0.writer);
        // The writer last, so that no reader here keeps it from emptying the log.
        tokio::join!(end(reader), end(looker));
        end(writer).await;
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
    /// Nothing of it is on the disk.
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
                reply.send(result).ok(); // the caller may have given up
            })
        });
        if self.0.writer.send(Job::Do(job)).await.is_err() {
            return Err(self.error("its writing thread has ended"));
        }
        match answer.await {
            Ok(result) => result.map_err(|why| self.error(&why)),
            Err(_) => Err(self.error(
                "the change was given up, by a panic or at the end; nothing of it is stored",
            )),
        }
    }

    /// Whether too many jobs wait, so that producers should wait.
    pub(super) fn is_behind(&self) -> bool {
        self.0.writer.capacity() < JOBS / 2
    }

    pub(super) async fn read<T: Send + 'static>(
        &self,
        query: impl FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, QueueError> {
        self.ask(&self.0.reader, query).await
    }

    /// The same as [`read`](Self::read), for long queries.
    pub(super) async fn read_long<T: Send + 'static>(
        &self,
        query: impl FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, QueueError> {
        self.ask(&self.0.looker, query).await
    }

    async fn ask<T: Send + 'static>(
        &self,
        thread: &mpsc::Sender<Job<ReadJob>>,
        query: impl FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, QueueError> {
        let (reply, answer) = oneshot::channel();
        let job: ReadJob = Box::new(move |db| drop(reply.send(query(db))));
        if thread.send(Job::Do(job)).await.is_err() {
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
fn read(name: &str, db: Connection) -> mpsc::Sender<Job<ReadJob>> {
    let (jobs, mut inbox) = mpsc::channel(JOBS);
    thread(name, move || {
        while let Some(job) = inbox.blocking_recv() {
            match job {
                // A panic ends only that query; the dropped reply notifies its caller.
                Job::Do(job) => {
                    let job: ReadJob = job;
                    catch_unwind(AssertUnwindSafe(|| job(&db))).ok();
                }
                Job::End(ended) => {
                    drop((inbox, db));
                    ended.send(()).ok(); // the caller may have given up
                    return;
                }
            }
        }
    });
    jobs
}

/// Ends a thread when it has done all earlier jobs.
async fn end<J>(thread: &mpsc::Sender<Job<J>>) {
    let (ended, end) = oneshot::channel();
    let ending = async {
        if thread.send(Job::End(ended)).await.is_ok() {
            end.await.ok();
        }
    };
    if timeout(END_TIMEOUT, ending).await.is_err() {
        tracing::debug!("a query of the embedded queue still ran at the end");
    }
}

fn thread(name: &str, body: impl FnOnce() + Send + 'static) {
    // It ends with its inbox. A process that cannot start a thread cannot work at all.
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(body)
        .expect("a thread for the embedded queue");
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

/// The error for a file that is unusable for this process, with the remedy.
fn denied(what: &str, e: &std::io::Error) -> QueueError {
    let remedy = match e.kind() {
        std::io::ErrorKind::PermissionDenied => {
            "; run this as the service's user (sudo -u hooktrail …)"
        }
        _ => "",
    };
    QueueError::needs_operator(format!("{what}: {e}{remedy}"))
}

/// The open files as they are now; recorded in the daemon's lock for other processes.
fn place(database: &Path, lock: Option<&File>) -> Result<Place, QueueError> {
    let with_suffix = |suffix: &str| {
        let mut name = database.as_os_str().to_owned();
        name.push(suffix);
        PathBuf::from(name)
    };
    let lock_file = lock.map(|_| database.with_file_name(LOCK));
    let place = Place::of(
        [database.to_owned(), with_suffix("-wal"), with_suffix("-shm")]
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

/// Waits until no other process opens the database; while the returned file is open, none does.
fn opening(data_dir: &Path) -> Result<File, QueueError> {
    let path = data_dir.join(OPENING);
    let file = File::options().create(true).truncate(false).write(true).open(&path);
    let locked = file.and_then(|file| file.lock().map(|()| file));
    locked.map_err(|e| denied(&format!("`{}` cannot be locked", path.display()), &e))
}

/// Deletes the database and its other files; last the lock, which keeps daemons away.
pub(super) fn delete(path: &Path) -> Result<(), QueueError> {
    let with_suffix = |suffix: &str| {
        let mut name = path.as_os_str().to_owned();
        name.push(suffix);
        PathBuf::from(name)
    };
    let dir = path.parent().unwrap_or(Path::new("."));
    for file in [
        path.to_owned(),
        with_suffix("-wal"),
        with_suffix("-shm"),
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

/// Tries again while another process uses the file: SQLite's own timeout does not hold for all
/// steps of opening a file that a killed daemon has left.
#[expect(
    clippy::disallowed_methods,
    reason = "SQLite does not report when another process is done"
)]
fn patiently<T>(
    until: Instant,
    mut attempt: impl FnMut() -> rusqlite::Result<T>,
) -> rusqlite::Result<T> {
    loop {
        match attempt() {
            Err(e) if is_busy(&e) && clock::instant() < until => std::thread::sleep(BUSY_REST),
            done => return done,
        }
    }
}

fn is_busy(e: &rusqlite::Error) -> bool {
    matches!(e.sqlite_error_code(), Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked))
}

fn connect(path: &Path) -> rusqlite::Result<Connection> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE
        | OpenFlags::SQLITE_OPEN_CREATE
        | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let db = Connection::open_with_flags(path, flags)?;
    db.busy_timeout(OPENS_STEP)?;
    db.pragma_update(None, "journal_mode", "WAL")?;
    // Each commit is on the disk when it returns, if the disk does not lie.
    db.pragma_update(None, "synchronous", "FULL")?;
    // The write-ahead log shrinks after a burst.
    db.pragma_update(None, "journal_size_limit", 64 << 20)?;
    db.set_prepared_statement_cache_capacity(64);
    Ok(db)
}

/// The inner error: the file is not one of this program.
fn migrate(db: &mut Connection, path: &Path) -> rusqlite::Result<Result<(), QueueError>> {
    // For writing at once: two processes may open a new file together.
    let change = db.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let version: u32 = change.pragma_query_value(None, "user_version", |row| row.get(0))?;
    let id: i32 = change.pragma_query_value(None, "application_id", |row| row.get(0))?;
    let is_empty: bool =
        change
            .query_row("SELECT NOT EXISTS (SELECT 1 FROM sqlite_master)", [], |row| row.get(0))?;
    if id != APPLICATION_ID && (version > 0 || id != 0 || !is_empty) {
        return Ok(Err(QueueError::needs_operator(format!(
            "`{}` is a database of another program; choose another [queue] data_dir",
            path.display()
        ))));
    }
    let known = u32::try_from(MIGRATIONS.len()).unwrap_or(u32::MAX);
    if version > known {
        return Ok(Err(QueueError::needs_operator(format!(
            "`{}` was written by a later version of hooktrail (schema {version}; this one knows {known}); run that version, or a newer one",
            path.display()
        ))));
    }
    if version < known {
        for migration in &MIGRATIONS[version as usize..] {
            change.execute_batch(migration)?;
        }
        change.pragma_update(None, "user_version", known)?;
        change.pragma_update(None, "application_id", APPLICATION_ID)?;
    }
    change.commit().map(Ok)
}

/// Commits the jobs that have gathered, until the end. `empties`: then moves the write-ahead log
/// into the database.
fn write(
    db: Connection,
    mut inbox: mpsc::Receiver<Job<WriteJob>>,
    commits: &watch::Sender<u64>,
    empties: bool,
) {
    let mut end = None;
    while end.is_none() {
        match inbox.blocking_recv() {
            Some(Job::Do(first)) => end = write_group(&db, first, &mut inbox, commits),
            Some(Job::End(ended)) => end = Some(ended),
            None => return,
        }
    }
    drop(inbox);
    if empties {
        // Without it the data is in the log: another process that has it open prevents this.
        let emptied = db
            .busy_timeout(END_BUSY_TIMEOUT)
            .and_then(|()| db.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(())));
        if let Err(e) = emptied {
            tracing::debug!(error = %e, "the write-ahead log stays as it is");
        }
    }
    drop(db);
    end.and_then(|ended| ended.send(()).ok()); // the caller may have given up
}

/// Commits a job and those that have arrived meanwhile in one transaction. Returns the sender to
/// notify if the end was requested.
fn write_group(
    db: &Connection,
    first: WriteJob,
    inbox: &mut mpsc::Receiver<Job<WriteJob>>,
    commits: &watch::Sender<u64>,
) -> Option<oneshot::Sender<()>> {
    let mut end = None;
    let begun = db.execute_batch("BEGIN IMMEDIATE").map_err(|e| explain(&e));
    let mut done = Vec::new();
    let mut next = Some(first);
    let mut panicked = false;
    while let Some(job) = next {
        match catch_unwind(AssertUnwindSafe(|| job(db))) {
            Ok(answer) => done.push(answer),
            // It may have stopped anywhere: the group is not committed, and the dropped reply
            // notifies its caller.
            Err(_) => panicked = true,
        }
        // A full disk can end the whole transaction: the following parts must not be committed
        // alone.
        let more = done.len() < GROUP && !panicked && !db.is_autocommit() && end.is_none();
        next = match more.then(|| inbox.try_recv()) {
            Some(Ok(Job::Do(job))) => Some(job),
            Some(Ok(Job::End(ended))) => {
                end = Some(ended);
                None
            }
            Some(Err(_)) | None => None,
        };
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
    end
}

/// Runs a part so that its failure affects no other.
fn savepoint<T>(
    db: &Connection,
    part: impl FnOnce(&Connection) -> rusqlite::Result<T>,
) -> rusqlite::Result<T> {
    if db.is_autocommit() {
        return Err(rusqlite::Error::InvalidQuery); // BEGIN failed; the group gets the reason
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

/// Explains an error of SQLite, with the remedy where it is known.
fn explain(e: &rusqlite::Error) -> String {
    let remedy = match e.sqlite_error_code() {
        Some(ErrorCode::DiskFull) => {
            "the disk is full; nothing is lost, and it goes on when there is room again"
        }
        Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => {
            "the file is damaged: stop hooktrail, keep a copy, and save what can be read of it (docs/operations.md, \"Disaster recovery\"), or move it away to start with an empty one"
        }
        Some(ErrorCode::ReadOnly | ErrorCode::CannotOpen | ErrorCode::PermissionDenied) => {
            "check the permissions of the directory and its files, and run this as the service's user (sudo -u hooktrail …)"
        }
        Some(ErrorCode::SystemIoFailure) => "the disk failed or is full; check it",
        _ if is_busy(e) => {
            "another process holds it: wait until that is done; `fuser hooktrail.db` in that directory shows which one it is. If it is the \
             running hooktrail daemon, do not end it"
        }
        _ => return e.to_string(),
    };
    format!("{e}: {remedy}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_another_process_is_busy_with_is_tried_again() {
        let failed = |code| rusqlite::Error::SqliteFailure(rusqlite::ffi::Error::new(code), None);
        let mut left = 3;
        let until = clock::instant() + OPENS_WITHIN;
        let opened = patiently(until, || {
            left -= 1;
            if left > 0 { Err(failed(rusqlite::ffi::SQLITE_BUSY_RECOVERY)) } else { Ok("opened") }
        });
        assert_eq!(opened, Ok("opened"));
        let mut tried = 0;
        let damaged = patiently(until, || {
            tried += 1;
            Err::<(), _>(failed(rusqlite::ffi::SQLITE_CORRUPT))
        });
        assert!(damaged.is_err() && tried == 1, "nothing else is");
    }

    #[test]
    fn all_of_opening_has_one_time_and_its_error_ends_no_daemon() {
        let dir = tempfile::tempdir().expect("a directory");
        drop(Store::open(dir.path(), Access::Create).expect("opens"));
        let other = connect(&dir.path().join(FILE)).expect("opens");
        other.execute_batch("BEGIN IMMEDIATE").expect("holds it");
        let begun = clock::instant();
        let time = OPENS_STEP * 2;
        let error = Store::open_within(time, dir.path(), Access::Create)
            .expect_err("it is held")
            .to_string();
        let waited = clock::instant() - begun;
        assert!(
            waited >= time && waited < BUSY,
            "{waited:?}: a step that fails is tried again, but not for longer"
        );
        assert!(
            error.contains("wait until that is done") && error.contains("do not end it"),
            "{error}"
        );
        other.execute_batch("ROLLBACK").expect("is done");
        Store::open_within(Duration::ZERO, dir.path(), Access::Create).expect("opens");
    }

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
    async fn what_an_earlier_version_wrote_is_read_without_an_attempt_log() {
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
                db.query_row("SELECT attempts, story, replay FROM retry", [], |r| {
                    Ok((r.get(0)?, r.get(1)?, r.get(2)?))
                })?;
            let dead: (u32, Option<String>) =
                db.query_row("SELECT attempts, story FROM dead", [], |r| {
                    Ok((r.get(0)?, r.get(1)?))
                })?;
            Ok((retry, dead))
        };
        assert_eq!(store.read(query).await.expect("reads"), ((3, None, false), (3, None)));
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

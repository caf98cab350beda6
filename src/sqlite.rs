//! A SQLite file: opened, migrated to its program's schema, written by one thread that commits what
//! has gathered together, and read by others.
//!
//! - `error`: what failed, and what to do
//! - `schema`: checks and migrations
//! - `threads`: one that writes in groups, others that read
//!
//! A file that several processes may open is opened by each with [`Database::open`], one after the
//! other: SQLite does not wait for another process that turns a new file into a write-ahead-logged
//! one. Commands that change nothing use [`Database::open_read_only`].

mod error;
mod schema;
mod threads;

use std::{
    fs::File,
    os::unix::fs::OpenOptionsExt as _,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use rusqlite::{Connection, OpenFlags};
use tokio::sync::{mpsc, oneshot, watch};

use self::{
    error::{About, Fault, is_busy},
    threads::{JOBS, Job, ReadJob, WriteJob, Writer, savepoint},
};
pub use self::{
    error::{Error, Kind, denied},
    schema::{Schema, with_suffix},
};
use crate::{clock, failpoint::Step};

/// Timeout of one step of opening a file, before it is tried again.
const OPENS_STEP: Duration = Duration::from_secs(1);

/// Time between two tries to open a file that another process uses.
const BUSY_REST: Duration = Duration::from_millis(20);

/// Bytes to which the write-ahead log shrinks after a burst.
const MAX_LOG: i64 = 64 << 20;

/// Which commits survive a power cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Synchronous {
    /// All: each commit is on the disk when it returns, if the disk does not lie.
    Full,
    /// All but the last ones; the file stays sound.
    Normal,
}

/// How a file is opened. Begin with [`Options::new`].
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Name of the file in messages, such as `embedded queue`.
    pub label: &'static str,
    pub schema: Schema,
    /// Make the file if it is missing, readable for its user alone.
    pub create: bool,
    pub synchronous: Synchronous,
    /// Bytes of a page of a new file; `None` leaves SQLite's own.
    pub page_size: Option<u32>,
    /// Bytes of pages that each connection keeps; `None` leaves SQLite's own.
    pub cache: Option<usize>,
    /// Timeout of opening the file while other processes use it.
    pub opens_within: Duration,
    /// Timeout of waiting for another process's transaction.
    pub busy: Duration,
    /// Move the write-ahead log into the file when it is closed.
    pub empties_log: bool,
    /// Overwrite what is deleted with zeros.
    pub overwrites: bool,
    /// Copy the file to `NAME.before-N` before its schema N is migrated.
    pub backs_up: bool,
    /// The beginning of the threads' names, at most 8 bytes: Linux cuts names after 15.
    pub threads: &'static str,
    /// Niceness of the writing thread, on Linux; 0 leaves that of the process.
    pub nice: i32,
    /// The steps before and after a commit, where a test can end the process.
    pub steps: Option<[Step; 2]>,
    /// The remedy for a damaged file.
    pub damaged: &'static str,
}

impl Options {
    /// The options of a file that must not lose a commit.
    pub const fn new(label: &'static str, threads: &'static str, schema: Schema) -> Self {
        Self {
            label,
            schema,
            create: true,
            synchronous: Synchronous::Full,
            page_size: None,
            cache: None,
            opens_within: Duration::from_secs(20),
            busy: Duration::from_secs(10),
            empties_log: false,
            overwrites: false,
            backs_up: false,
            threads,
            nice: 0,
            steps: None,
            damaged: "stop hooktrail, keep a copy, and save what can be read of it (docs/operations.md, \"Disaster recovery\"), or move it away to start with an empty one",
        }
    }

    fn about(&self, path: &Path) -> About {
        About { label: self.label, path: path.to_owned(), damaged: self.damaged }
    }
}

/// An open file. Clones share it; its threads end with the last clone, or [when it is
/// closed](Self::close).
#[derive(Debug, Clone)]
pub struct Database(Arc<Inner>);

struct Inner {
    about: About,
    /// `None`: opened for reading only.
    writer: Option<mpsc::Sender<Job<WriteJob>>>,
    reader: mpsc::Sender<Job<ReadJob>>,
    /// For queries that may take long: no other waits behind them.
    looker: mpsc::Sender<Job<ReadJob>>,
    /// Counts the commits of this process.
    commits: watch::Receiver<u64>,
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Database").field("path", &self.about.path).finish_non_exhaustive()
    }
}

/// While it lives, no other process opens the file.
#[derive(Debug)]
pub struct Opening {
    _lock: File,
}

/// Waits until no other process opens the file. The lock is `NAME.opening`, without the extension
/// of the file.
///
/// # Errors
/// It cannot be locked.
pub fn opening(path: &Path) -> Result<Opening, Error> {
    let path = path.with_extension("opening");
    let file = File::options().create(true).truncate(false).write(true).open(&path);
    let locked = file.and_then(|file| file.lock().map(|()| file));
    match locked {
        Ok(_lock) => Ok(Opening { _lock }),
        Err(e) => Err(denied(&format!("`{}` cannot be locked", path.display()), &e)),
    }
}

/// Makes or migrates a file, and closes it.
///
/// # Errors
/// The same as those of [`Database::open`].
pub fn migrate(path: &Path, options: &Options) -> Result<(), Error> {
    let opening = opening(path)?;
    open_migrated(&opening, path, options, clock::instant() + options.opens_within).map(drop)
}

impl Database {
    /// Opens a file, and migrates it. Waits for other processes that open it; so it blocks its
    /// thread.
    ///
    /// # Errors
    /// It cannot be opened; it is of another program, or of a later version of this one.
    pub fn open(path: &Path, options: &Options) -> Result<Self, Error> {
        Self::open_during(&opening(path)?, path, options)
    }

    /// The same as [`open`](Self::open), for a caller who has something else to do while no other
    /// process opens the file.
    ///
    /// # Errors
    /// The same as those of [`open`](Self::open).
    pub fn open_during(opening: &Opening, path: &Path, options: &Options) -> Result<Self, Error> {
        let about = options.about(path);
        let until = clock::instant() + options.opens_within;
        let writer = open_migrated(opening, path, options, until)?;
        let connect = || patiently(until, || connect(path, options));
        let ready = |db: Connection| db.busy_timeout(options.busy).map(|()| db);
        let connections = (|| Ok((ready(writer)?, ready(connect()?)?, ready(connect()?)?)))();
        let (writer, reader, looker) = connections.map_err(|e| about.unopened(&e))?;
        let (commits, committed) = watch::channel(0);
        let writer = Writer {
            db: writer,
            about: about.clone(),
            commits,
            empties: options.empties_log,
            steps: options.steps,
            nice: options.nice,
        };
        let writer = writer.start(&format!("{}-writer", options.threads));
        Ok(Self::new(about, Some(writer), [reader, looker], committed, options))
    }

    /// Opens an existing file to read it, also while another process writes it. Changes neither the
    /// file nor its schema.
    ///
    /// # Errors
    /// It is [missing](Kind::Missing), or its schema is not this version's, or the user may not
    /// read it.
    pub fn open_read_only(path: &Path, options: &Options) -> Result<Self, Error> {
        let connections = [Reader::open(path, options)?.db, Reader::open(path, options)?.db];
        let (_, never) = watch::channel(0);
        Ok(Self::new(options.about(path), None, connections, never, options))
    }

    fn new(
        about: About,
        writer: Option<mpsc::Sender<Job<WriteJob>>>,
        [reader, looker]: [Connection; 2],
        commits: watch::Receiver<u64>,
        options: &Options,
    ) -> Self {
        let reader = threads::read(&format!("{}-reader", options.threads), reader);
        let looker = threads::read(&format!("{}-looker", options.threads), looker);
        Self(Arc::new(Inner { about, writer, reader, looker, commits }))
    }

    /// Closes the connections. Nothing can be read or written afterwards.
    pub async fn close(&self) {
        let Inner { about, writer, reader, looker, .. } = &*self.0;
        // The writer last, so that no reader here keeps it from emptying the log.
        tokio::join!(threads::end(reader, about.label), threads::end(looker, about.label));
        if let Some(writer) = writer {
            threads::end(writer, about.label).await;
        }
    }

    pub fn path(&self) -> &Path {
        self.0.about.path()
    }

    /// Counts this process's commits.
    pub fn commits(&self) -> watch::Receiver<u64> {
        self.0.commits.clone()
    }

    /// Whether too many jobs wait to be written, so that producers should wait.
    pub fn is_behind(&self) -> bool {
        self.0.writer.as_ref().is_some_and(|writer| writer.capacity() < JOBS / 2)
    }

    /// Runs a part of a transaction, and returns when that is committed. A part that fails changes
    /// nothing, and no other part.
    ///
    /// # Errors
    /// Nothing of it is on the disk, or that [is unknown](Error::is_unknown).
    pub async fn write<T: Send + 'static>(
        &self,
        part: impl FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, Error> {
        let Some(writer) = &self.0.writer else {
            return Err(self.closed("it is open for reading only"));
        };
        let (reply, answer) = oneshot::channel();
        let about = self.0.about.clone();
        let job: WriteJob = Box::new(move |db| {
            let done = savepoint(db, part);
            Box::new(move |committed| {
                let result = match (done, committed) {
                    (Ok(value), Ok(())) => Ok(value),
                    (Ok(_) | Err(rusqlite::Error::InvalidQuery), Err(fault)) => Err(fault),
                    (Err(e), _) => Err(about.explain(&e)),
                };
                reply.send(result).ok(); // the caller may have given up
            })
        });
        if writer.send(Job::Do(job)).await.is_err() {
            return Err(self.closed("its writing thread has ended"));
        }
        match answer.await {
            Ok(result) => result.map_err(|fault| self.0.about.error(fault)),
            Err(_) => Err(self.given_up(
                "the change was given up, by a panic or at the end; nothing of it is stored",
            )),
        }
    }

    /// Answers a query, behind others.
    ///
    /// # Errors
    /// The file cannot be read, or the database is closed.
    pub async fn read<T: Send + 'static>(
        &self,
        query: impl FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, Error> {
        self.ask(&self.0.reader, query).await
    }

    /// The same as [`read`](Self::read), for long queries.
    ///
    /// # Errors
    /// The same as those of [`read`](Self::read).
    pub async fn read_long<T: Send + 'static>(
        &self,
        query: impl FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, Error> {
        self.ask(&self.0.looker, query).await
    }

    async fn ask<T: Send + 'static>(
        &self,
        thread: &mpsc::Sender<Job<ReadJob>>,
        query: impl FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, Error> {
        let (reply, answer) = oneshot::channel();
        let job: ReadJob = Box::new(move |db| drop(reply.send(query(db))));
        if thread.send(Job::Do(job)).await.is_err() {
            return Err(self.closed("its reading thread has ended"));
        }
        match answer.await {
            Ok(result) => result.map_err(|e| self.0.about.error(self.0.about.explain(&e))),
            Err(_) => Err(self.given_up("the query was given up, by a panic or at the end")),
        }
    }

    fn closed(&self, why: &str) -> Error {
        self.0.about.error(Fault::new(Kind::Closed, why))
    }

    fn given_up(&self, why: &str) -> Error {
        self.0.about.error(Fault::new(Kind::Other, why))
    }
}

/// A connection for one thread, which reads an existing file and blocks meanwhile.
pub struct Reader {
    about: About,
    db: Connection,
}

impl std::fmt::Debug for Reader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reader").field("path", &self.about.path).finish_non_exhaustive()
    }
}

impl Reader {
    /// # Errors
    /// The same as those of [`Database::open_read_only`].
    pub fn open(path: &Path, options: &Options) -> Result<Self, Error> {
        let about = options.about(path);
        must_exist(path, options)?;
        let until = clock::instant() + options.opens_within;
        // Readers write as well: to the index of the write-ahead log, not to the file.
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let connect = || {
            let db = Connection::open_with_flags(path, flags)?;
            db.busy_timeout(OPENS_STEP)?;
            set_cache(&db, options)?;
            let expected = options.schema.expect(&db, path)?;
            db.busy_timeout(options.busy)?;
            Ok(expected.map(|()| db))
        };
        let db = patiently(until, connect).map_err(|e| about.unopened(&e))??;
        Ok(Self { about, db })
    }

    /// Answers a query.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn read<T>(
        &mut self,
        query: impl FnOnce(&Connection) -> rusqlite::Result<T>,
    ) -> Result<T, Error> {
        query(&self.db).map_err(|e| self.about.error(self.about.explain(&e)))
    }
}

fn must_exist(path: &Path, options: &Options) -> Result<(), Error> {
    let label = options.label;
    match path.try_exists() {
        Ok(true) => Ok(()),
        Ok(false) => {
            let text = format!("there is no {label} `{}`", path.display());
            Err(Error::for_operator(Kind::Missing, text))
        }
        Err(e) => Err(denied(&format!("{label} `{}` cannot be read", path.display()), &e)),
    }
}

fn open_migrated(
    _: &Opening,
    path: &Path,
    options: &Options,
    until: Instant,
) -> Result<Connection, Error> {
    if options.create {
        // SQLite gives its other files the same mode, and explains better why a file cannot be
        // made. A file that exists is not opened here: to close it would drop the locks that this
        // process may have on it.
        File::options().create_new(true).write(true).mode(0o600).open(path).ok();
    } else {
        must_exist(path, options)?;
    }
    let about = options.about(path);
    let opened = |e: rusqlite::Error| about.unopened(&e);
    let mut db = patiently(until, || connect(path, options)).map_err(opened)?;
    if options.backs_up {
        patiently(until, || options.schema.back_up(&db, path)).map_err(opened)??;
    }
    patiently(until, || options.schema.migrate(&mut db, path)).map_err(opened)??;
    Ok(db)
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

fn connect(path: &Path, options: &Options) -> rusqlite::Result<Connection> {
    let mut flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    flags.set(OpenFlags::SQLITE_OPEN_CREATE, options.create);
    let db = Connection::open_with_flags(path, flags)?;
    db.busy_timeout(OPENS_STEP)?;
    // Before the log is turned on, which fixes it.
    if let Some(bytes) = options.page_size {
        db.pragma_update(None, "page_size", bytes)?;
    }
    db.pragma_update(None, "journal_mode", "WAL")?;
    let synchronous = match options.synchronous {
        Synchronous::Full => "FULL",
        Synchronous::Normal => "NORMAL",
    };
    db.pragma_update(None, "synchronous", synchronous)?;
    db.pragma_update(None, "journal_size_limit", MAX_LOG)?;
    db.pragma_update(None, "secure_delete", options.overwrites)?;
    set_cache(&db, options)?;
    Ok(db)
}

fn set_cache(db: &Connection, options: &Options) -> rusqlite::Result<()> {
    if let Some(bytes) = options.cache {
        // A negative number is in KiB.
        let kib = i64::try_from(bytes >> 10).unwrap_or(i64::MAX);
        db.pragma_update(None, "cache_size", -kib)?;
    }
    db.set_prepared_statement_cache_capacity(64);
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    const FIRST: &str = "CREATE TABLE note (text TEXT NOT NULL);";
    const SECOND: &str = "ALTER TABLE note ADD COLUMN at INTEGER;";
    const OLD: Options = options(&[FIRST]);
    const NEW: Options = options(&[FIRST, SECOND]);

    const fn options(migrations: &'static [&'static str]) -> Options {
        Options::new("notes", "notes", Schema { application_id: 7, migrations })
    }

    async fn add(notes: &Database, text: &'static str) -> Result<(), Error> {
        let insert = "INSERT INTO note (text) VALUES (?1)";
        notes.write(move |db| db.execute(insert, [text]).map(drop)).await
    }

    async fn count(notes: &Database) -> Result<u32, Error> {
        notes.read(|db| db.query_row("SELECT count(*) FROM note", [], |r| r.get(0))).await
    }

    fn user_version(path: &Path) -> u32 {
        let db = Connection::open(path).expect("opens");
        db.pragma_query_value(None, "user_version", |row| row.get(0)).expect("reads")
    }

    #[test]
    fn a_file_that_another_process_is_busy_with_is_tried_again() {
        let failed = |code| rusqlite::Error::SqliteFailure(rusqlite::ffi::Error::new(code), None);
        let mut left = 3;
        let until = clock::instant() + OLD.opens_within;
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
        let path = dir.path().join("notes.db");
        migrate(&path, &OLD).expect("is made");
        let other = Connection::open(&path).expect("opens");
        other.execute_batch("BEGIN IMMEDIATE").expect("holds it");
        let begun = clock::instant();
        let time = OPENS_STEP * 2;
        let error =
            Database::open(&path, &Options { opens_within: time, ..OLD }).expect_err("it is held");
        let waited = clock::instant() - begun;
        assert!(
            waited >= time && waited < OLD.busy,
            "{waited:?}: a step that fails is tried again, but not for longer"
        );
        assert_eq!((error.kind(), error.is_for_operator()), (Kind::Busy, true));
        let text = error.to_string();
        assert!(
            text.contains("wait until that is done")
                && text.contains("do not end it")
                && text.contains("`fuser notes.db`"),
            "{text}"
        );
        other.execute_batch("ROLLBACK").expect("is done");
        Database::open(&path, &Options { opens_within: Duration::ZERO, ..OLD }).expect("opens");
    }

    #[tokio::test]
    async fn a_file_is_copied_before_it_is_migrated_and_only_then() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("notes.db");
        let options = |of: Options| Options { backs_up: true, ..of };
        let copies = || {
            let names = std::fs::read_dir(dir.path()).expect("a directory");
            names
                .filter_map(|entry| entry.expect("an entry").file_name().into_string().ok())
                .filter(|name| name.contains("before"))
                .collect::<Vec<_>>()
        };
        let notes = Database::open(&path, &options(OLD)).expect("opens");
        add(&notes, "kept").await.expect("writes");
        notes.close().await;
        assert_eq!(copies(), [""; 0], "a new file is not migrated");
        // One that an earlier try has left behind.
        std::fs::write(dir.path().join("notes.db.before-1.part"), "half").expect("writes");
        Database::open(&path, &options(NEW)).expect("opens").close().await;
        Database::open(&path, &options(NEW)).expect("opens").close().await;
        assert_eq!(copies(), ["notes.db.before-1"]);
        let copy = dir.path().join("notes.db.before-1");
        let mode = std::fs::metadata(&copy).expect("is there").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!((user_version(&path), user_version(&copy)), (2, 1));
        let notes = Database::open(&copy, &OLD).expect("opens");
        assert_eq!(count(&notes).await, Ok(1));
    }

    #[tokio::test]
    async fn a_file_that_cannot_be_copied_is_not_migrated() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("notes.db");
        migrate(&path, &OLD).expect("is made");
        std::fs::create_dir(dir.path().join("notes.db.before-1")).expect("is in the way");
        let error = migrate(&path, &Options { backs_up: true, ..NEW }).expect_err("is refused");
        assert!(
            error.is_for_operator() && error.to_string().contains("notes.db.before-1"),
            "{error}"
        );
        assert_eq!(user_version(&path), 1);
    }

    #[test]
    fn a_file_of_another_program_or_a_later_version_is_refused_and_not_changed() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("notes.db");
        migrate(&path, &NEW).expect("is made");
        let foreign = Schema { application_id: 8, ..NEW.schema };
        for (options, kind, text) in [
            (
                OLD,
                Kind::Later,
                "was written by a later version of hooktrail (schema 2; this one knows 1)",
            ),
            (Options { schema: foreign, ..NEW }, Kind::Foreign, "is a database of another program"),
        ] {
            for opened in
                [Database::open(&path, &options), Database::open_read_only(&path, &options)]
            {
                let error = opened.expect_err("is refused");
                assert_eq!((error.kind(), error.is_for_operator()), (kind, true));
                assert!(error.to_string().contains(text), "{error}");
            }
        }
        migrate(&path, &NEW).expect("is as it was");
    }

    #[tokio::test]
    async fn who_only_reads_sees_commits_and_changes_nothing() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("notes.db");
        let missing = Database::open_read_only(&path, &OLD).expect_err("is not there");
        assert_eq!(missing.kind(), Kind::Missing);
        assert_eq!(std::fs::read_dir(dir.path()).expect("a directory").count(), 0);
        let notes = Database::open(&path, &OLD).expect("opens");
        let reader = Database::open_read_only(&path, &OLD).expect("opens");
        add(&notes, "one").await.expect("writes");
        assert_eq!(count(&reader).await, Ok(1));
        let refused = add(&reader, "two").await.expect_err("reads only");
        assert_eq!(refused.kind(), Kind::Closed);
        let change = |db: &Connection| db.execute("DELETE FROM note", []);
        reader.read(change).await.expect_err("the connection reads only");
        notes.close().await;
        assert_eq!(count(&reader).await, Ok(1), "without the writer too");
        let earlier = Database::open_read_only(&path, &NEW).expect_err("is not migrated");
        assert_eq!(earlier.kind(), Kind::Earlier);
        assert_eq!(user_version(&path), 1);
        reader.close().await;
        assert_eq!(count(&reader).await.expect_err("is closed").kind(), Kind::Closed);
    }

    #[tokio::test]
    async fn a_damaged_file_and_one_that_is_no_database_are_told_from_others() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("notes.db");
        std::fs::write(&path, [b'x'; 4096]).expect("writes");
        let error = Database::open(&path, &OLD).expect_err("is none");
        assert_eq!(error.kind(), Kind::Damaged);
        std::fs::remove_file(&path).expect("deletes");
        let notes = Database::open(&path, &OLD).expect("opens");
        add(&notes, "lost").await.expect("writes");
        notes.close().await;
        let mut bytes = std::fs::read(&path).expect("reads");
        bytes[4096..].fill(0x55);
        std::fs::write(&path, bytes).expect("writes");
        let notes = Database::open(&path, &OLD).expect("its first page is sound");
        let error = count(&notes).await.expect_err("is damaged");
        assert_eq!((error.kind(), error.is_for_operator()), (Kind::Damaged, false));
        assert!(error.to_string().contains(OLD.damaged), "{error}");
    }

    #[tokio::test]
    async fn a_full_file_is_said_and_other_parts_of_the_group_are_kept() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("notes.db");
        let notes = Database::open(&path, &OLD).expect("opens");
        notes
            .write(|db| db.pragma_update(None, "max_page_count", 8).map(drop))
            .await
            .expect("is limited");
        let fill = "INSERT INTO note (text) VALUES (zeroblob(1000000))";
        let full = notes.write(move |db| db.execute(fill, [])).await.expect_err("is full");
        assert_eq!((full.kind(), full.is_for_operator()), (Kind::DiskFull, false));
        add(&notes, "small").await.expect("goes on");
        assert_eq!(count(&notes).await, Ok(1));
    }

    #[tokio::test]
    async fn the_file_has_the_pages_and_the_durability_of_its_options() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("notes.db");
        let options = Options {
            page_size: Some(16384),
            cache: Some(1 << 20),
            synchronous: Synchronous::Normal,
            ..OLD
        };
        let notes = Database::open(&path, &options).expect("opens");
        let pragmas = |db: &Connection| {
            let pragma = |name| db.pragma_query_value(None, name, |row| row.get::<_, i64>(0));
            Ok((pragma("page_size")?, pragma("cache_size")?, pragma("synchronous")?))
        };
        assert_eq!(notes.write(pragmas).await, Ok((16384, -1024, 1)));
        let mode = std::fs::metadata(&path).expect("is there").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[cfg(target_os = "linux")]
    #[tokio::test]
    async fn only_the_writing_thread_steps_back() {
        /// The niceness of the calling thread, or of the process's first one.
        fn nice(of: &str) -> i32 {
            let stat = std::fs::read_to_string(format!("/proc/{of}/stat")).expect("reads");
            let behind_name = stat.rsplit(')').next().expect("fields");
            behind_name.split_whitespace().nth(16).and_then(|n| n.parse().ok()).expect("a number")
        }
        let dir = tempfile::tempdir().expect("a directory");
        let before = (nice("self"), nice("thread-self"));
        let options = Options { nice: 10, ..OLD };
        let notes = Database::open(&dir.path().join("notes.db"), &options).expect("opens");
        assert_eq!(notes.write(|_| Ok(nice("thread-self"))).await, Ok(10));
        assert_eq!(notes.read(|_| Ok(nice("thread-self"))).await, Ok(before.1));
        assert_eq!((nice("self"), nice("thread-self")), before);
    }
}

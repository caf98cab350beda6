//! The files: opened, set aside, begun again.

use std::{
    fs::{File, TryLockError},
    io::ErrorKind,
    os::unix::fs::{DirBuilderExt as _, FileExt as _, MetadataExt as _},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicI64, Ordering},
    },
    time::{Duration, SystemTime},
};

use rusqlite::Connection;

use super::{
    append::Memory,
    around,
    chunk::{self, Chunk},
    deliveries,
    fault::{Fault, millis, time},
    schema::{self, ASIDE, HISTORY_FILE, LOCK, STORE_FILE},
    source::Source,
};
use crate::{
    clock,
    config::HistoryConfig,
    crypto::seal::SealKey,
    sqlite::{self, Database, Kind, with_suffix},
    store::{EventLog, Gap, StoreError},
};

/// Opens the log of the events, for one thread.
pub type OpenLog = Arc<dyn Fn() -> Result<Box<dyn EventLog>, StoreError> + Send + Sync>;

/// What a store needs to be opened.
#[derive(Clone)]
pub struct SqliteConfig {
    /// The directory of the files.
    pub data_dir: PathBuf,
    pub history: HistoryConfig,
    /// The log of the events, where they are kept in one; otherwise they are kept here.
    pub log: Option<OpenLog>,
    /// The keys that seal subscribers, the first one first; without one a key in a file.
    pub keys: Vec<SealKey>,
    /// Why no history is kept, if none is: then only `store.db` is opened.
    pub without_history: Option<String>,
}

impl std::fmt::Debug for SqliteConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { data_dir, history, log, keys, without_history } = self;
        f.debug_struct("SqliteConfig")
            .field("data_dir", data_dir)
            .field("history", history)
            .field("has_log", &log.is_some())
            .field("keys", keys)
            .field("without_history", without_history)
            .finish()
    }
}

impl SqliteConfig {
    pub(super) fn history_path(&self) -> PathBuf {
        self.data_dir.join(HISTORY_FILE)
    }
}

/// Numbers that are reserved at once. A history that was deleted, or lost its last events in a power
/// cut, goes on behind them: no number is given twice.
pub(super) const RESERVED: i64 = 1_000_000;

/// The key, in the precious file, of whether there ever was a history.
const HAD_HISTORY: &str = "had_history";

/// Key in history's file: it was begun while the precious file was away, which alone can say whether
/// there was a history before.
const BEGUN_ALONE: &str = "begun_alone";

/// Why history began again, where there is no more to be said of it.
const GONE: &str = "the file before it was deleted or emptied";

/// Damaged files that are kept.
const KEPT: usize = 3;

/// A thread that reads the log.
#[derive(Debug, Clone, Copy)]
pub(super) enum By {
    Writer = 0,
    Reader = 1,
    Looker = 2,
}

/// The open files.
pub(super) struct Open {
    pub(super) history: Database,
    /// The file that is open; `None` if that is not known.
    identity: Option<(u64, u64)>,
    /// `None` if it cannot be opened, or was opened for reading only.
    pub(super) store: Option<Database>,
    pub(super) memory: Mutex<Memory>,
    /// The first number that this process may give, and the last one so far.
    pub(super) first: i64,
    pub(super) last: AtomicI64,
    pub(super) is_damaged: AtomicBool,
    has_bodies: bool,
    log: Option<OpenLog>,
    /// The log is not opened any more.
    has_left_log: AtomicBool,
    /// One for each thread, opened when it is first needed.
    logs: [Mutex<Option<Box<dyn EventLog>>>; 3],
}

impl std::fmt::Debug for Open {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Open").field("history", &self.history).finish_non_exhaustive()
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Open {
    fn new(
        config: &SqliteConfig,
        history: Database,
        store: Option<Database>,
        numbers: (i64, i64),
    ) -> Self {
        Self {
            history,
            identity: identity(&config.history_path()),
            store,
            memory: Mutex::default(),
            first: numbers.0,
            last: AtomicI64::new(numbers.1),
            is_damaged: AtomicBool::new(false),
            has_bodies: config.history.bodies,
            log: config.log.clone(),
            has_left_log: AtomicBool::new(false),
            logs: Default::default(),
        }
    }

    /// The events are stored here, and not in a log of their own.
    pub(super) fn has_rows(&self) -> bool {
        self.log.is_none()
    }

    /// Whether its file is still at its path.
    pub(super) fn is_at(&self, path: &Path) -> bool {
        self.identity.is_none() || identity(path) == self.identity
    }

    /// Calls `with` with the source of the events' bytes.
    pub(super) fn with_source<T>(
        &self,
        by: By,
        with: impl FnOnce(&mut Source<'_>) -> Result<T, Fault>,
    ) -> Result<T, Fault> {
        let Some(open) = &self.log else { return with(&mut Source::Tables) };
        let mut log = lock(&self.logs[by as usize]);
        let log = match &mut *log {
            Some(log) => log,
            None if self.has_left_log.load(Ordering::Relaxed) => {
                return Err(StoreError::away("the daemon is stopping".to_owned()).into());
            }
            None => log.insert(open()?),
        };
        with(&mut Source::Log(&mut **log, self.has_bodies))
    }

    /// Closes the log, when its readers have answered. Blocks its thread.
    pub(super) fn leave_log(&self) {
        self.has_left_log.store(true, Ordering::Relaxed);
        for log in &self.logs {
            drop(lock(log).take());
        }
    }

    /// Reserves more numbers. If they cannot be recorded, those that history has are.
    pub(super) async fn reserve(&self) {
        let upto = self.last.load(Ordering::Relaxed).saturating_add(RESERVED);
        if let Some(store) = &self.store {
            let reserve = move |db: &Connection| around::set(db, "numbers", upto);
            if let Err(e) = store.write(reserve).await {
                tracing::warn!(error = %e, "the numbers of events are not recorded; history goes on");
            }
        }
        self.last.fetch_max(upto, Ordering::Relaxed);
    }

    /// Closes history. `is_sound`: the numbers that were not given can be given later.
    pub(super) async fn close(&self, is_sound: bool) {
        let last = match is_sound {
            true => self.history.read(chunk::last_event).await.ok(),
            false => None,
        };
        self.history.close().await;
        let Some(store) = &self.store else { return };
        if let Some(last) = last.filter(|_| self.has_rows()) {
            let last = last.max(self.first - 1);
            let given = store.write(move |db| around::set(db, "numbers", last)).await;
            if let Err(e) = given {
                tracing::debug!(error = %e, "the reserved numbers of events are skipped");
            }
        }
    }
}

/// The device and the inode of the file at a path.
fn identity(path: &Path) -> Option<(u64, u64)> {
    std::fs::metadata(path).ok().map(|file| (file.dev(), file.ino()))
}

/// The daemon's lock of the store. It ends with the process, in any case. The file has a text while
/// a process may know of deliveries that the store lacks.
#[derive(Debug)]
pub(super) struct StoreLock {
    file: File,
    /// The process before has left nothing unrecorded.
    pub(super) ended_well: bool,
}

impl StoreLock {
    /// This process leaves nothing unrecorded.
    pub(super) fn ends_well(&self) {
        if let Err(e) = self.file.set_len(0) {
            tracing::debug!(error = %e, "the next start records a gap of deliveries");
        }
    }
}

/// Locks the store for this daemon.
pub(super) fn lock_store(data_dir: &Path) -> Result<StoreLock, StoreError> {
    let away = |what: String| StoreError::away(what);
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(data_dir).map_err(|e| {
        away(
            sqlite::denied(
                &format!("[queue] data_dir `{}` cannot be made", data_dir.display()),
                &e,
            )
            .to_string(),
        )
    })?;
    let path = data_dir.join(LOCK);
    let file = File::options().create(true).truncate(false).write(true).open(&path);
    let locked = file.map_err(TryLockError::Error).and_then(|file| {
        file.try_lock()?;
        let ended_well = file.metadata().map_err(TryLockError::Error)?.len() == 0;
        // On the disk before anything is recorded: history can lose what it recorded last when the
        // power goes, and has a gap for that only if this is still there.
        let marked = file.write_all_at(b"open\n", 0).and_then(|()| file.sync_all());
        marked.and_then(|()| File::open(data_dir)?.sync_all()).map_err(TryLockError::Error)?;
        Ok(StoreLock { file, ended_well })
    });
    locked.map_err(|e| match e {
        TryLockError::WouldBlock => away(format!(
            "another daemon has the store in `{}`: each needs a [queue] data_dir of its own",
            data_dir.display()
        )),
        TryLockError::Error(e) => {
            away(sqlite::denied(&format!("`{}` cannot be locked", path.display()), &e).to_string())
        }
    })
}

/// History's file, as it was opened.
pub(super) struct Files {
    history: Database,
    /// Why history begins again, if it does.
    because: Option<String>,
}

/// Opens history's file; blocks its thread. `because`: why history begins again, if it does.
pub(super) fn open_files(
    config: &SqliteConfig,
    mut because: Option<String>,
) -> Result<Files, StoreError> {
    let path = config.history_path();
    let history = match open_history(&path, &mut because) {
        Err(e) if e.kind() == Kind::Damaged => {
            because = Some(set_aside(&path)?);
            open_history(&path, &mut because)
        }
        opened => opened,
    };
    let history = history.map_err(|e| StoreError::away(e.to_string()))?;
    Ok(Files { history, because })
}

/// The precious file.
#[derive(Debug, Clone)]
pub(super) struct Precious {
    pub(super) db: Database,
    identity: Option<(u64, u64)>,
}

impl Precious {
    /// Opens it; blocks its thread.
    pub(super) fn open(config: &SqliteConfig) -> Result<Self, sqlite::Error> {
        let path = config.data_dir.join(STORE_FILE);
        if !path.exists() {
            remove_logs(&path);
        }
        let db = Database::open(&path, &schema::store())?;
        Ok(Self { identity: identity(&path), db })
    }

    /// Whether it is still at its path: what is written to a deleted file is lost.
    pub(super) fn is_at_its_path(&self) -> bool {
        self.identity.is_none() || identity(self.db.path()) == self.identity
    }
}

/// Removes what SQLite has left of a file that is missing: it would be applied to the next one.
fn remove_logs(path: &Path) -> bool {
    let removed = |suffix| std::fs::remove_file(with_suffix(path, suffix)).is_ok();
    removed("-wal") | removed("-shm")
}

fn open_history(path: &Path, because: &mut Option<String>) -> Result<Database, sqlite::Error> {
    if !path.exists() && remove_logs(path) && because.is_none() {
        *because = Some("the file before it was deleted".to_owned());
    }
    Database::open(path, &schema::history())
}

/// Moves a damaged history away, and returns why history begins again.
pub(super) fn set_aside(path: &Path) -> Result<String, StoreError> {
    let aside = schema::aside_path(path);
    for suffix in ["", "-wal", "-shm"] {
        match std::fs::rename(with_suffix(path, suffix), with_suffix(&aside, suffix)) {
            Err(e) if e.kind() != ErrorKind::NotFound => {
                let what = format!("`{}` is damaged and cannot be set aside", path.display());
                return Err(StoreError::away(sqlite::denied(&what, &e).to_string()));
            }
            _ => {}
        }
    }
    tracing::error!(
        file = %path.display(), set_aside = %aside.display(),
        "history is damaged; it was set aside and begins again"
    );
    remove_oldest_aside(path);
    Ok(format!(
        "the file before it was damaged, and set aside as `{}`",
        aside.file_name().unwrap_or_default().to_string_lossy()
    ))
}

/// A disk that damages file after file must not be filled by them.
pub(super) fn remove_oldest_aside(path: &Path) {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let prefix = format!("{name}{ASIDE}");
    let dir = path.parent().unwrap_or(Path::new("."));
    let names = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let names = names.filter_map(|entry| entry.file_name().into_string().ok());
    let mut aside: Vec<String> = names
        .filter(|name| {
            name.starts_with(&prefix) && !name.contains("-wal") && !name.contains("-shm")
        })
        .collect();
    aside.sort_unstable();
    for name in aside.iter().rev().skip(KEPT) {
        tracing::warn!(
            file = %dir.join(name).display(),
            "this damaged file is removed: the {KEPT} that were set aside after it are kept"
        );
        for suffix in ["", "-wal", "-shm"] {
            std::fs::remove_file(with_suffix(&dir.join(name), suffix)).ok(); // it may have none
        }
    }
}

/// Makes an opened history this daemon's, beside the precious file; `None`, and it is closed, if it
/// is damaged. `lacks`: why a history that goes on lacks the last deliveries.
pub(super) async fn adopt(
    config: &SqliteConfig,
    files: Files,
    store: Option<Database>,
    lacks: Option<String>,
) -> Result<Option<Open>, StoreError> {
    let Files { history, mut because } = files;
    let had_history = match &store {
        Some(store) => store.read(|db| around::get(db, HAD_HISTORY)).await.unwrap_or_default(),
        None => None,
    };
    if had_history.is_some() {
        because.get_or_insert_with(|| GONE.to_owned());
    }
    let is_alone = store.is_none();
    let log_end = match config.log.clone() {
        Some(open) => {
            let end = tokio::task::spawn_blocking(move || open()?.end()).await;
            Some(end.map_err(|e| StoreError::away(e.to_string()))??.0)
        }
        None => None,
    };
    let (now, retention) = (clock::now(), config.history.retention);
    let adopt = move |db: &Connection| {
        if around::get(db, "begun")?.is_none() {
            around::set(db, "begun", millis(now))?;
            if let Some(because) = because {
                began_again(db, &because, now, retention)?;
            } else if is_alone {
                around::set(db, BEGUN_ALONE, 1)?;
            }
        } else if let Some(lacks) = lacks {
            around::lack_the_last(db, lacks, now)?;
        }
        if !is_alone && around::remove(db, BEGUN_ALONE)? && had_history.is_some() {
            let begun = around::get(db, "begun")?.map_or(now, time);
            began_again(db, GONE, begun, retention)?;
        }
        deliveries::interrupt(db)?;
        adopt_events(db, log_end, now)
    };
    let away = |e: sqlite::Error| StoreError::away(e.to_string());
    let last = match history.write(adopt).await {
        Err(e) if e.kind() == Kind::Damaged => {
            // The write-ahead log is deleted with the last connection, by its name.
            history.close().await;
            return Ok(None);
        }
        adopted => adopted.map_err(away)?,
    };
    if let Some(store) = store.as_ref().filter(|_| had_history.is_none()) {
        // Not needed for history itself: a later start tries it again.
        if let Err(e) = store.write(|db| around::set(db, HAD_HISTORY, 1)).await {
            tracing::debug!(error = %e, "it is not recorded that there is a history");
        }
    }
    let numbers = match (&store, log_end) {
        (_, Some(_)) => (1, i64::MAX),
        (None, None) => {
            let first = last.saturating_add(RESERVED);
            (first, first.saturating_add(RESERVED))
        }
        (Some(store), None) => {
            store.write(move |db| reserve_first(db, last)).await.map_err(away)?
        }
    };
    Ok(Some(Open::new(config, history, store, numbers)))
}

/// Records that there was a history before the one that began then: it has a gap.
fn began_again(
    db: &Connection,
    because: &str,
    begun: SystemTime,
    retention: Duration,
) -> rusqlite::Result<()> {
    around::set(db, "begun_because", because)?;
    let from = begun.checked_sub(retention).unwrap_or(begun);
    for what in ["events", "deliveries"] {
        let why = format!("history began again: {because}");
        around::add_gap(db, &Gap { from, until: begun, what, why, missing: None })?;
    }
    Ok(())
}

/// Reserves numbers behind all that were reserved before. Returns the first and the last of them.
fn reserve_first(db: &Connection, last: i64) -> rusqlite::Result<(i64, i64)> {
    around::store_id(db)?;
    let given = around::get(db, "numbers")?.unwrap_or(0).max(last);
    let upto = given.saturating_add(RESERVED);
    around::set(db, "numbers", upto)?;
    Ok((given + 1, upto))
}

/// Removes events that were numbered by another queue than today's. Returns the last number.
fn adopt_events(db: &Connection, log_end: Option<i64>, now: SystemTime) -> rusqlite::Result<i64> {
    let has_log = i64::from(log_end.is_some());
    let had_log = around::get(db, "has_log")?.unwrap_or(has_log);
    let last = chunk::last_event(db)?;
    // A log that ends before it is another one.
    if had_log != has_log || log_end.is_some_and(|end| end < last) {
        for chunk in Chunk::list(db)? {
            chunk.remove(db)?;
        }
        db.execute("DELETE FROM meta WHERE key = 'last_event'", [])?;
        around::set(db, "begun", millis(now))?;
        around::set(
            db,
            "begun_because",
            "the queue's log began again, or another queue took its place",
        )?;
    }
    around::set(db, "has_log", has_log)?;
    chunk::last_event(db)
}

/// Opens the files to read them, also without a daemon, or while one writes them.
pub(super) fn open_to_read(config: &SqliteConfig) -> Result<Open, StoreError> {
    let history = Database::open_read_only(&config.history_path(), &schema::history())
        .map_err(|e| StoreError::away(e.to_string()))?;
    Ok(Open::new(config, history, None, (0, 0)))
}

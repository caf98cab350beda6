//! Subscribers made over the API: changed in the precious file and then in its copy, and read from
//! both. Only a deletion removes one.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use rusqlite::Connection;
use tokio::{
    sync::{Mutex, OwnedMutexGuard, watch},
    time::timeout,
};

use super::{
    copy::{Contents, Copy},
    keyring::Keyring,
    open::{self, Precious, SqliteConfig},
    schema::STORE_FILE,
    sealed::{self, Change, Rows, SealedRow},
};
use crate::{
    clock,
    crypto::{
        seal::{SealKeys, Unopened},
        secret::Secret,
    },
    delivery::SubscriberName,
    sqlite::{self, Database},
    store::{Deleted, KeptSubscriber, KeptSubscribers, Put, StoreError, StoredSubscriber},
    wording,
};

/// The longest time of a change, before its fate is unknown, and of a read.
const TIMEOUT: Duration = Duration::from_secs(15);

/// Lines of the copy beside two for each row, before it is rewritten.
const SPARE_LINES: usize = 1000;

/// Names that a message lists.
const NAMES: usize = 10;

/// The subscribers of a store.
#[derive(Debug)]
pub(super) struct Kept {
    keyring: Keyring,
    /// Held during each change, so that the copy follows in the same order.
    copy: Arc<Mutex<Copy>>,
    /// The copy may lack changes.
    is_behind: AtomicBool,
    /// Counts how often they have to be read again.
    pub(super) to_read: watch::Sender<u64>,
}

impl Kept {
    pub(super) fn new(config: &SqliteConfig) -> Self {
        let (keys, data_dir) = (SealKeys::new(config.keys.clone()), &config.data_dir);
        Self {
            keyring: Keyring::new(keys, data_dir),
            copy: Arc::new(Mutex::new(Copy::new(data_dir))),
            is_behind: AtomicBool::new(false),
            to_read: watch::Sender::default(),
        }
    }

    /// They may be others than was last said.
    pub(super) fn read_again(&self) {
        self.to_read.send_modify(|n| *n += 1);
    }

    pub(super) async fn put(
        &self,
        db: &Database,
        change: Change,
        document: Secret,
    ) -> Result<Put, StoreError> {
        let copy = self.copy.clone().lock_owned().await;
        let (keys, copy) = self.keys_to_seal(db, copy).await?;
        let nonce = clock::secret_bytes();
        let put = move |db: &Connection| sealed::put(db, &change, document, &keys, nonce);
        self.change(db, copy, put).await
    }

    pub(super) async fn delete(
        &self,
        db: &Database,
        change: Change,
    ) -> Result<Deleted, StoreError> {
        let copy = self.copy.clone().lock_owned().await;
        self.change(db, copy, move |db| sealed::delete(db, &change)).await
    }

    /// The keys, the first made now if there is none yet, and nothing is sealed with a lost one.
    async fn keys_to_seal(
        &self,
        db: &Database,
        mut copy: OwnedMutexGuard<Copy>,
    ) -> Result<(SealKeys, OwnedMutexGuard<Copy>), StoreError> {
        let keyring = self.keyring.clone();
        let keys = blocking(move || keyring.read()).await?;
        if keys.first().is_some() {
            return Ok((keys, copy));
        }
        let stored = db.read(sealed::all).await.map_err(|e| StoreError::new(e.to_string()))?;
        let (read, copy) = blocking(move || (copy.read(), copy)).await;
        let place = self.keyring.place();
        let copied = read.map_err(|e| {
            StoreError::new(format!("no key is made while the copy cannot be read: {e}"))
        })?;
        let rows = || stored.values().chain(copied.rows.values());
        if rows().any(|row| row.sealed.is_some()) {
            return Err(StoreError::new(format!(
                "{place} is missing, and subscribers are sealed with it: put it back from a backup, or delete those subscribers"
            )));
        }
        let keyring = self.keyring.clone();
        Ok((blocking(move || keyring.make()).await?, copy))
    }

    /// Makes a change, and then the same in the copy.
    async fn change<T: Send + 'static>(
        &self,
        db: &Database,
        copy: OwnedMutexGuard<Copy>,
        change: impl FnOnce(&Connection) -> rusqlite::Result<(T, Option<SealedRow>)> + Send + 'static,
    ) -> Result<T, StoreError> {
        let unknown = |why: String| {
            self.is_behind.store(true, Ordering::Relaxed);
            self.read_again();
            StoreError::unknown(why)
        };
        let (done, row) = match timeout(TIMEOUT, db.write(change)).await {
            Ok(Ok(changed)) => changed,
            Ok(Err(e)) if e.is_unknown() => return Err(unknown(e.to_string())),
            Ok(Err(e)) => return Err(StoreError::new(e.to_string())),
            Err(_) => {
                let why = format!(
                    "`{}` has not answered for {} s: it is unknown whether the change is stored",
                    db.path().display(),
                    TIMEOUT.as_secs()
                );
                return Err(unknown(why));
            }
        };
        if let Some(row) = row {
            self.follow(db, copy, row).await;
        }
        Ok(done)
    }

    /// Brings a row into the copy. A failure does not undo the change, which is stored.
    async fn follow(&self, db: &Database, copy: OwnedMutexGuard<Copy>, row: SealedRow) {
        let (appended, mut copy) = blocking(move || (copy.append(&row), copy)).await;
        let followed = match appended {
            Ok(true) => Ok(()),
            Ok(false) => match db.read(sealed::all).await {
                Ok(rows) => blocking(move || copy.rewrite(rows.values())).await,
                Err(e) => Err(std::io::Error::other(e)),
            },
            Err(e) => Err(e),
        };
        if let Err(e) = followed {
            self.is_behind.store(true, Ordering::Relaxed);
            tracing::error!(
                error = %e,
                "the change of a subscriber is stored, and its copy could not be written; it is tried again"
            );
        }
    }

    /// The subscribers to go on with, from the precious file and its copy; what one of them lacks is
    /// put back.
    pub(super) async fn read(&self, db: Result<Database, StoreError>) -> KeptSubscribers {
        let mut copy = self.copy.clone().lock_owned().await;
        let keyring = self.keyring.clone();
        let (keys, read, copy) = blocking(move || (keyring.read(), copy.read(), copy)).await;
        let (keys, keys_error) = match keys {
            Ok(keys) => (keys, None),
            Err(e) => (SealKeys::default(), Some(e)),
        };
        let mut kept = KeptSubscribers::default();
        let contents = read.unwrap_or_else(|e| {
            kept.problems.push(format!("`{}` cannot be read: {e}", copy.path().display()));
            Contents { is_there: true, damaged: 1, ..Contents::default() }
        });
        let stored = match &db {
            Ok(db) => read_all(db).await,
            Err(e) => Err(e.clone()),
        };
        let rows = match (db, stored) {
            (Ok(db), Ok(stored)) => {
                self.reconcile(&db, copy, stored, contents, &keys, &mut kept).await
            }
            (Err(e), _) | (_, Err(e)) => {
                kept.may_lack = !contents.is_there || contents.damaged > 0;
                kept.problems.push(away(&e, &contents, &copy));
                contents.rows
            }
        };
        let why = |row: &SealedRow, why| match &keys_error {
            Some(e) => e.to_string(),
            None => locked(row, why, &self.keyring.place()),
        };
        open_all(rows, &keys, why, &mut kept);
        kept
    }

    /// Compares the store with its copy, and puts back what either lacks. Returns the rows.
    async fn reconcile(
        &self,
        db: &Database,
        mut copy: OwnedMutexGuard<Copy>,
        stored: Rows,
        contents: Contents,
        keys: &SealKeys,
        kept: &mut KeptSubscribers,
    ) -> Rows {
        let Merged { rows, put_back, lost, older, undead } = merge(stored, &contents.rows, keys);
        let path = db.path().display().to_string();
        for (names, what) in [
            (&lost, "lacked subscribers that were not deleted over the API; they go on"),
            (
                &older,
                "has an older version of subscribers than the last one known; the last one goes on",
            ),
            (&undead, "has subscribers that were deleted over the API; they stay deleted"),
        ] {
            if !names.is_empty() {
                kept.problems.push(format!(
                    "`{path}` {what}: {}. It may be a backup, or another file: `{}` has the last state",
                    listed(names),
                    copy.path().display()
                ));
            }
        }
        if !put_back.is_empty()
            && let Err(e) =
                db.write(move |db| put_back.iter().try_for_each(|row| sealed::write(db, row))).await
        {
            kept.problems
                .push(format!("the last state of the subscribers cannot be put back: {e}"));
            return rows;
        }
        let is_current = contents.damaged == 0
            && contents.rows == rows
            && contents.lines <= 2 * rows.len() + SPARE_LINES
            && !self.is_behind.load(Ordering::Relaxed);
        if is_current || (rows.is_empty() && !contents.is_there) {
            return rows;
        }
        let of = copy.path().display().to_string();
        let (written, rows) = blocking(move || (copy.rewrite(rows.values()), rows)).await;
        self.is_behind.store(written.is_err(), Ordering::Relaxed);
        if let Err(e) = written {
            kept.problems.push(format!(
                "`{of}`, the copy of the subscribers, cannot be written: {e}; check the disk and the directory"
            ));
        }
        rows
    }

    /// Whether the copy may lack changes.
    pub(super) fn is_behind(&self) -> bool {
        self.is_behind.load(Ordering::Relaxed)
    }
}

/// What came of sealing all subscribers again.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Resealed {
    /// The number of those that another key had sealed.
    pub resealed: usize,
    /// The number of those that the first key had sealed.
    pub were: usize,
    /// Those that cannot be opened.
    pub locked: Vec<String>,
    /// What else is wrong with them.
    pub problems: Vec<String>,
}

/// Seals all subscribers with the first key, in the store and in its copy; without a daemon.
///
/// # Errors
/// A daemon has the store, or it cannot be read or written, or there is no key.
pub async fn seal_again(config: &SqliteConfig) -> Result<Resealed, StoreError> {
    let path = config.data_dir.join(STORE_FILE);
    if !path.exists() {
        return Err(StoreError::new(format!("there is no store `{}`", path.display())));
    }
    let held = open::lock_store(&config.data_dir)?;
    let with = config.clone();
    let opened = blocking(move || Precious::open(&with)).await;
    let db = opened.map_err(|e| StoreError::new(e.to_string()))?.db;
    let resealed = Kept::new(config).seal_again(&db).await;
    db.close().await;
    if held.ended_well {
        held.ends_well();
    }
    resealed
}

impl Kept {
    async fn seal_again(&self, db: &Database) -> Result<Resealed, StoreError> {
        // First of all what one of the two lacks.
        let KeptSubscribers { problems, .. } = self.read(Ok(db.clone())).await;
        let keyring = self.keyring.clone();
        let keys = blocking(move || keyring.read()).await?;
        if keys.first().is_none() {
            return Err(StoreError::new(format!("{} has no key", self.keyring.place())));
        }
        let failed = |e: sqlite::Error| StoreError::new(e.to_string());
        let seal = move |db: &Connection| seal_rows(db, &keys);
        let mut resealed = db.write(seal).await.map_err(failed)?;
        resealed.problems = problems;
        let rows = db.read(sealed::all).await.map_err(failed)?;
        let mut copy = self.copy.clone().lock_owned().await;
        let of = copy.path().display().to_string();
        blocking(move || copy.rewrite(rows.values())).await.map_err(|e| {
            StoreError::new(
                sqlite::denied(
                    &format!("`{of}` cannot be written; the old key is needed for it"),
                    &e,
                )
                .to_string(),
            )
        })?;
        Ok(resealed)
    }
}

fn seal_rows(db: &Connection, keys: &SealKeys) -> rusqlite::Result<Resealed> {
    let mut result = Resealed::default();
    for mut row in sealed::all(db)?.into_values().filter(|row| row.sealed.is_some()) {
        match row.seal_again(keys, clock::secret_bytes()) {
            Ok(true) => {
                sealed::write(db, &row)?;
                result.resealed += 1;
            }
            Ok(false) => result.were += 1,
            Err(_) => result.locked.push(row.name),
        }
    }
    Ok(result)
}

async fn read_all(db: &Database) -> Result<Rows, StoreError> {
    match timeout(TIMEOUT, db.read(sealed::all)).await {
        Ok(read) => read.map_err(|e| StoreError::new(e.to_string())),
        Err(_) => Err(StoreError::new(format!(
            "`{}` has not answered for {} s",
            db.path().display(),
            TIMEOUT.as_secs()
        ))),
    }
}

/// Says that the store is away, and what that means for the subscribers.
fn away(e: &StoreError, contents: &Contents, copy: &Copy) -> String {
    let copy = copy.path().display();
    let then = if !contents.is_there {
        format!(
            "there is no copy `{copy}` of the subscribers made over the API: if there are any, they are not served, and none is removed"
        )
    } else if contents.damaged > 0 {
        format!(
            "the copy `{copy}` of the subscribers made over the API is damaged: those that it lacks are not served, and none is removed"
        )
    } else {
        format!("the subscribers made over the API go on as in `{copy}`")
    };
    format!("{e}; {then}")
}

/// Why a subscriber is locked.
fn locked(row: &SealedRow, why: Unopened, place: &str) -> String {
    match why {
        Unopened::NoKey => {
            let key = row.sealed.as_ref().map_or("", |sealed| &sealed.key);
            format!(
                "it is sealed with the key {key}, which {place} does not have: put that key back, or delete the subscriber over the API"
            )
        }
        Unopened::Damaged => {
            "its record is damaged, and so is the copy: set the subscriber again, or delete it, over the API".to_owned()
        }
    }
}

fn open_all(
    rows: Rows,
    keys: &SealKeys,
    why: impl Fn(&SealedRow, Unopened) -> String,
    kept: &mut KeptSubscribers,
) {
    for row in rows.into_values() {
        let Some(opened) = row.open(keys) else { continue };
        let Ok(name) = SubscriberName::try_new(&row.name) else {
            kept.problems
                .push("a stored subscriber has no valid name; it is left alone".to_owned());
            continue;
        };
        kept.all.push(match opened {
            Ok(document) => KeptSubscriber::Open(StoredSubscriber {
                name,
                version: row.version,
                document,
                created: row.created,
                changed: row.changed,
            }),
            Err(e) => KeptSubscriber::Locked { name, version: row.version, why: why(&row, e) },
        });
    }
}

/// The rows of the store and of its copy together.
#[derive(Debug, Default, PartialEq, Eq)]
struct Merged {
    rows: Rows,
    /// Those that the store has to get from the copy.
    put_back: Vec<SealedRow>,
    /// Subscribers that the store lacked.
    lost: Vec<String>,
    /// Subscribers of which the store had an older version.
    older: Vec<String>,
    /// Deleted subscribers that the store still had.
    undead: Vec<String>,
}

/// Takes the later row of each name; of two with the same version the one that can be opened.
fn merge(stored: Rows, copied: &Rows, keys: &SealKeys) -> Merged {
    let mut merged = Merged { rows: stored, ..Merged::default() };
    for (name, copy) in copied {
        let row = merged.rows.get(name);
        let is_open = |row: &SealedRow| row.open(keys).is_none_or(|opened| opened.is_ok());
        let wins = row.is_none_or(|row| {
            row.version < copy.version
                || (row.version == copy.version && !is_open(row) && is_open(copy))
        });
        if !wins {
            continue;
        }
        let is_kept = row.is_some_and(|row| row.sealed.is_some());
        match (is_kept, copy.sealed.is_some()) {
            (false, true) => merged.lost.push(name.clone()),
            (true, true) if row.is_some_and(|row| row.version < copy.version) => {
                merged.older.push(name.clone());
            }
            (true, false) => merged.undead.push(name.clone()),
            (true, true) | (false, false) => {}
        }
        merged.put_back.push(copy.clone());
        merged.rows.insert(name.clone(), copy.clone());
    }
    merged
}

/// Some names, and how many more there are.
fn listed(names: &[String]) -> String {
    let some: Vec<String> = names.iter().take(NAMES).map(|name| format!("`{name}`")).collect();
    match names.len().saturating_sub(NAMES) {
        0 => some.join(", "),
        more => format!("{} and {} more", some.join(", "), wording::grouped(more as u64)),
    }
}

/// Runs what blocks its thread.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(e) => std::panic::resume_unwind(e.into_panic()),
    }
}

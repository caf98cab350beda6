//! Subscribers made over the API: changed in the precious file and then in its copy, and read from
//! both. Only a deletion removes one.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use rusqlite::Connection;
use tokio::{
    sync::{Mutex, OwnedMutexGuard, watch},
    task::JoinHandle,
    time::{Instant, timeout, timeout_at},
};

use super::{
    copy::{Contents, Copy},
    keyring::Keyring,
    merge::{Merged, merge},
    open::{self, SqliteConfig},
    schema::{self, COPY_FILE, STORE_FILE},
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

/// The longest time of a change, before its fate is unknown, and of a read of all files together.
const TIMEOUT: Duration = Duration::from_secs(15);

/// Names that a message lists.
const NAMES: usize = 10;

/// The subscribers of a store.
#[derive(Debug)]
pub(super) struct Kept {
    pub(super) keyring: Keyring,
    /// Held during each change, so that the copy follows in the same order.
    pub(super) copy: Arc<Mutex<Copy>>,
    copy_path: PathBuf,
    lag: Arc<Lag>,
    /// Counts how often they have to be read again.
    pub(super) to_read: watch::Sender<u64>,
    problems: std::sync::Mutex<Problems>,
    pub(super) timeout: Duration,
}

/// Whether the copy lacks changes of the store, or has what was replaced or deleted. Numbers, since a
/// read that brings the copy up to date may be given up at any moment.
#[derive(Debug, Default)]
struct Lag {
    marks: AtomicU64,
    /// The marks that the copy has caught up with.
    done: AtomicU64,
}

impl Lag {
    fn mark(&self) {
        self.marks.fetch_add(1, Ordering::Relaxed);
    }

    fn marks(&self) -> u64 {
        self.marks.load(Ordering::Relaxed)
    }

    fn caught_up(&self, marks: u64) {
        self.done.fetch_max(marks, Ordering::Relaxed);
    }

    fn is_behind(&self) -> bool {
        self.done.load(Ordering::Relaxed) < self.marks()
    }
}

/// What is wrong with the subscribers.
#[derive(Debug, Default)]
struct Problems {
    /// All that were reported last, or wait for the next reader.
    known: Vec<String>,
    /// Those that the background task has found since, for the next reader.
    unread: Vec<String>,
    /// What was reported last of [`KeptSubscribers::may_lack`].
    may_lack: bool,
    /// The damaged copies that were there at the last read.
    aside: Vec<PathBuf>,
}

impl Kept {
    pub(super) fn new(config: &SqliteConfig) -> Self {
        let (keys, data_dir) = (SealKeys::new(config.keys.clone()), &config.data_dir);
        Self {
            keyring: Keyring::new(keys, data_dir),
            copy: Arc::new(Mutex::new(Copy::new(data_dir))),
            copy_path: data_dir.join(COPY_FILE),
            lag: Arc::default(),
            to_read: watch::Sender::default(),
            problems: std::sync::Mutex::default(),
            timeout: TIMEOUT,
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
        let replaces = change.expected.is_some();
        let prepared = async {
            let copy = self.copy.clone().lock_owned().await;
            self.keys_to_seal(db, copy).await
        };
        let (keys, copy) =
            timeout(self.timeout, prepared).await.map_err(|_| self.unchanged())??;
        let nonce = clock::secret_bytes();
        let put = move |db: &Connection| sealed::put(db, &change, document, &keys, nonce);
        self.change(db, copy, replaces, put).await
    }

    pub(super) async fn delete(
        &self,
        db: &Database,
        change: Change,
        drops: bool,
    ) -> Result<Deleted, StoreError> {
        let copy = timeout(self.timeout, self.copy.clone().lock_owned()).await;
        let copy = copy.map_err(|_| self.unchanged())?;
        self.change(db, copy, true, move |db| sealed::delete(db, &change, drops)).await
    }

    /// The error of a change that was not begun.
    fn unchanged(&self) -> StoreError {
        StoreError::new(format!(
            "an earlier change, or a read of `{}` or of the key, has not ended for {} s: nothing has changed; check the disk",
            self.copy_path.display(),
            self.timeout.as_secs()
        ))
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
        // The copy stays held until the key is made, also when the change is given up before.
        let (made, copy) = blocking(move || (keyring.make(), copy)).await;
        Ok((made?, copy))
    }

    /// Makes a change, and then the same in the copy. `replaces`: what was there before may be no
    /// longer in it.
    async fn change<T: Send + 'static>(
        &self,
        db: &Database,
        copy: OwnedMutexGuard<Copy>,
        replaces: bool,
        change: impl FnOnce(&Connection) -> rusqlite::Result<(T, Option<SealedRow>)> + Send + 'static,
    ) -> Result<T, StoreError> {
        let unknown = |why: String| {
            self.lag.mark();
            self.read_again();
            StoreError::unknown(why)
        };
        let with = db.clone();
        let mut writing = tokio::spawn(async move { with.write(change).await });
        let (done, row) = match timeout(self.timeout, &mut writing).await {
            Ok(Ok(Ok(changed))) => changed,
            Ok(Ok(Err(e))) if e.is_unknown() => return Err(unknown(e.to_string())),
            Ok(Ok(Err(e))) => return Err(StoreError::new(e.to_string())),
            Ok(Err(e)) => return Err(unknown(e.to_string())),
            Err(_) => {
                self.read_again_after(writing);
                let why = format!(
                    "`{}` has not answered for {} s: it is unknown whether the change is stored",
                    db.path().display(),
                    self.timeout.as_secs()
                );
                return Err(unknown(why));
            }
        };
        if replaces {
            self.lag.mark();
        }
        if let Some(row) = row {
            self.follow(db, copy, row).await;
        }
        Ok(done)
    }

    /// A change goes on whose caller had its answer: the subscribers are read again when it has
    /// ended, and the copy follows.
    fn read_again_after<T: Send + 'static>(&self, writing: JoinHandle<T>) {
        let (lag, to_read) = (self.lag.clone(), self.to_read.clone());
        tokio::spawn(async move {
            drop(writing.await);
            lag.mark();
            to_read.send_modify(|n| *n += 1);
        });
    }

    /// Brings a row into the copy. A failure does not undo the change, which is stored.
    async fn follow(&self, db: &Database, mut copy: OwnedMutexGuard<Copy>, row: SealedRow) {
        let until = self.until();
        let appending = blocking(move || (copy.append(&row), copy));
        let failed = match timeout_at(until, appending).await {
            Ok((Ok(true), _)) => return,
            // What it has is not known: that is not overwritten unread.
            Ok((Ok(false), copy)) => {
                let (kept, _) = self.read_files(Ok(db.clone()), copy, until).await;
                self.hand_over(kept);
                return;
            }
            Ok((Err(e), _)) => e,
            Err(e) => e.into(),
        };
        self.lag.mark();
        tracing::error!(
            error = %failed,
            "the change of a subscriber is stored, and its copy could not be written; it is tried again"
        );
    }

    pub(super) fn until(&self) -> Instant {
        Instant::from_std(clock::instant()) + self.timeout
    }

    /// Keeps new problems for the next reader, which logs them. Has the subscribers read again if
    /// problems are new or have ended.
    fn hand_over(&self, kept: KeptSubscribers) {
        let KeptSubscribers { problems, may_lack, .. } = kept;
        let mut of = open::lock(&self.problems);
        let new: Vec<String> = problems.iter().filter(|p| !of.known.contains(p)).cloned().collect();
        let is_other = of.known != problems || of.may_lack != may_lack;
        of.unread.extend(new);
        (of.known, of.may_lack) = (problems, may_lack);
        drop(of);
        if is_other {
            self.read_again();
        }
    }

    /// Brings the copy up to date, in the background.
    pub(super) async fn catch_up(&self, db: Database) {
        let (kept, _) = self.read_until(Ok(db), self.until()).await;
        self.hand_over(kept);
    }

    /// Has the subscribers read again if a damaged copy was removed since the last read: then they
    /// need no longer be protected.
    pub(super) async fn check_aside(&self) {
        let known = open::lock(&self.problems).aside.clone();
        if known.is_empty() {
            return;
        }
        let copy = Copy::at(self.copy_path.clone());
        // That nothing was found out changes nothing.
        let found = timeout(self.timeout, blocking(move || copy.aside())).await;
        if matches!(found, Ok(Ok(found)) if found != known) {
            self.read_again();
        }
    }

    /// The subscribers to go on with, from the precious file and its copy; what one of them lacks is
    /// put back. Answers in time, whichever file hangs.
    pub(super) async fn read(&self, db: Result<Database, StoreError>) -> KeptSubscribers {
        let (mut kept, _) = self.read_until(db, self.until()).await;
        let mut of = open::lock(&self.problems);
        for problem in std::mem::take(&mut of.unread) {
            if !kept.problems.contains(&problem) {
                kept.problems.push(problem);
            }
        }
        of.known.clone_from(&kept.problems);
        of.may_lack = kept.may_lack;
        kept
    }

    /// Also returns whether both files have what was read.
    pub(super) async fn read_until(
        &self,
        db: Result<Database, StoreError>,
        until: Instant,
    ) -> (KeptSubscribers, bool) {
        match timeout_at(until, self.copy.clone().lock_owned()).await {
            Ok(copy) => self.read_files(db, copy, until).await,
            Err(_) => (self.unread(), false),
        }
    }

    /// Nothing could be read in time.
    fn unread(&self) -> KeptSubscribers {
        self.read_again();
        let why = format!(
            "`{}` and the key could not be read within {} s: those subscribers made over the API that are not known are not served, and none is removed; check the disk",
            self.copy_path.display(),
            self.timeout.as_secs()
        );
        KeptSubscribers { may_lack: true, problems: vec![why], ..KeptSubscribers::default() }
    }

    async fn read_files(
        &self,
        db: Result<Database, StoreError>,
        mut copy: OwnedMutexGuard<Copy>,
        until: Instant,
    ) -> (KeptSubscribers, bool) {
        // A change that ends later marks it again.
        let (marks, was_behind) = (self.lag.marks(), self.lag.is_behind());
        let (keyring, is_ours) = (self.keyring.clone(), db.is_ok());
        let reading = blocking(move || {
            if is_ours {
                keyring.clean();
                copy.clean();
            }
            (keyring.read(), copy.read(), copy.aside(), copy)
        });
        let Ok((keys, read, found_aside, copy)) = timeout_at(until, reading).await else {
            return (self.unread(), false);
        };
        let (keys, keys_error) = match keys {
            Ok(keys) => (keys, None),
            Err(e) => (SealKeys::default(), Some(e)),
        };
        let mut kept = KeptSubscribers::default();
        let mut aside_files = found_aside.unwrap_or_else(|e| {
            // Read again soon.
            self.lag.mark();
            kept.may_lack = true;
            kept.problems.push(unlisted(&self.copy_path, &e));
            open::lock(&self.problems).aside.clone()
        });
        let stored = match &db {
            Ok(db) => self.read_all(db, until).await,
            Err(e) => Err(e.clone()),
        };
        let copies = Copies { copy, was_behind, until };
        let (rows, in_step) = match (db, stored, read) {
            (Ok(db), Ok(stored), Ok(contents)) => {
                let (rows, written) =
                    self.reconcile(&db, copies, stored, contents, &keys, &mut kept).await;
                let in_step = written.is_some();
                aside_files.extend(written.flatten());
                (rows, in_step)
            }
            (Ok(_), Ok(stored), Err(e)) => {
                // It is not overwritten, and read again soon.
                self.lag.mark();
                kept.may_lack = true;
                kept.problems.push(unreadable(&self.copy_path, &e));
                (stored, false)
            }
            (Err(e), _, read) | (_, Err(e), read) => {
                let contents = read.unwrap_or_else(|e| {
                    kept.problems.push(unreadable(&self.copy_path, &e));
                    Contents { is_there: true, damaged: 1, ..Contents::default() }
                });
                // The last change may be the line that is torn.
                kept.may_lack |= !contents.is_there || contents.damaged > 0 || contents.is_torn;
                kept.problems.push(away(&e, &contents, &copies.copy));
                (contents.rows, false)
            }
        };
        if in_step {
            self.lag.caught_up(marks);
        }
        open::lock(&self.problems).aside.clone_from(&aside_files);
        if let Some(aside) = aside(&aside_files) {
            kept.may_lack = true;
            kept.problems.push(aside);
        }
        let why = |row: &SealedRow, why| match &keys_error {
            Some(e) => e.to_string(),
            None => locked(row, why, &self.keyring.place()),
        };
        open_all(rows, &keys, why, &mut kept);
        (kept, in_step)
    }

    /// Compares the store with its copy, and puts back what either lacks. Returns the rows, and, if
    /// both have them, the damaged copy that was set aside.
    async fn reconcile(
        &self,
        db: &Database,
        copies: Copies,
        stored: Rows,
        contents: Contents,
        keys: &SealKeys,
        kept: &mut KeptSubscribers,
    ) -> (Rows, Option<Option<PathBuf>>) {
        let Copies { mut copy, was_behind, until } = copies;
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
            && let Err(e) = put_back_into(db, put_back, until).await
        {
            kept.problems
                .push(format!("the last state of the subscribers cannot be put back: {e}"));
            return (rows, None);
        }
        let is_current = contents.damaged == 0
            && !contents.is_torn
            && contents.rows == rows
            && contents.lines == rows.len()
            && !was_behind;
        if is_current || (rows.is_empty() && !contents.is_there) {
            return (rows, Some(None));
        }
        let is_damaged = contents.damaged > 0;
        let to_write = rows.clone();
        let writing = blocking(move || {
            let mut aside = None;
            if is_damaged {
                aside = Some(copy.set_aside()?);
                open::remove_oldest_aside(copy.path());
            }
            copy.rewrite(to_write.values()).map(|()| aside)
        });
        let written = match timeout_at(until, writing).await {
            Ok(written) => written,
            Err(e) => Err(e.into()),
        };
        if let Err(e) = &written {
            self.lag.mark();
            kept.may_lack |= is_damaged;
            kept.problems.push(format!(
                "`{}`, the copy of the subscribers, cannot be written: {e}; check the disk and the directory",
                self.copy_path.display()
            ));
        }
        (rows, written.ok())
    }

    /// What the files have that belong to a store which is off, for this reason: nobody serves it,
    /// and nobody may remove it.
    pub(super) async fn left(&self, data_dir: &Path, why: &str) -> KeptSubscribers {
        let reading = async {
            let mut copy = Copy::at(self.copy_path.clone());
            let (read, aside) = blocking(move || (copy.read(), copy.aside())).await;
            (read, aside, stored_in(&data_dir.join(STORE_FILE)).await)
        };
        let mut found = Vec::new();
        let mut names = BTreeSet::new();
        let mut add = |rows: Rows| {
            names.extend(rows.into_values().filter(|row| row.sealed.is_some()).map(|row| row.name));
        };
        match timeout(self.timeout, reading).await {
            Ok((copied, aside_files, stored)) => {
                match aside_files {
                    Ok(files) => found.extend(aside(&files)),
                    Err(e) => found.push(unlisted(&self.copy_path, &e)),
                }
                match copied {
                    Ok(contents) if contents.damaged > 0 => {
                        found.push(format!("`{}` is damaged", self.copy_path.display()));
                        add(contents.rows);
                    }
                    Ok(contents) => add(contents.rows),
                    Err(e) => found.push(unreadable(&self.copy_path, &e)),
                }
                match stored {
                    Ok(rows) => add(rows),
                    Err(e) => found.push(e.to_string()),
                }
            }
            Err(_) => return self.unread(),
        }
        let mut kept = KeptSubscribers::default();
        let names: Vec<String> = names.into_iter().collect();
        if !names.is_empty() {
            found.insert(
                0,
                format!("its files have subscribers made over the API: {}", listed(&names)),
            );
        }
        if !found.is_empty() {
            kept.may_lack = true;
            kept.problems.push(format!(
                "{why}, and in `{}` {}. They are not served, and nobody is removed: set [store] url = \"sqlite\", or move `{STORE_FILE}` and `{COPY_FILE}` away",
                data_dir.display(),
                found.join("; ")
            ));
        }
        kept
    }

    async fn read_all(&self, db: &Database, until: Instant) -> Result<Rows, StoreError> {
        match timeout_at(until, db.read(sealed::all)).await {
            Ok(read) => read.map_err(|e| StoreError::new(e.to_string())),
            Err(_) => Err(StoreError::new(format!(
                "`{}` has not answered for {} s",
                db.path().display(),
                self.timeout.as_secs()
            ))),
        }
    }

    /// Whether the copy may lack changes, or has what was replaced.
    pub(super) fn is_behind(&self) -> bool {
        self.lag.is_behind()
    }
}

#[cfg(test)]
impl Kept {
    pub(super) async fn copy_for_tests(&self) -> OwnedMutexGuard<Copy> {
        self.copy.clone().lock_owned().await
    }

    pub(super) fn fall_behind(&self) {
        self.lag.mark();
    }
}

/// The copy while it is compared.
struct Copies {
    copy: OwnedMutexGuard<Copy>,
    was_behind: bool,
    until: Instant,
}

async fn put_back_into(
    db: &Database,
    rows: Vec<SealedRow>,
    until: Instant,
) -> Result<(), StoreError> {
    let write = move |db: &Connection| rows.iter().try_for_each(|row| sealed::write(db, row));
    match timeout_at(until, db.write(write)).await {
        Ok(written) => written.map_err(|e| StoreError::new(e.to_string())),
        Err(_) => {
            let path = db.path().display();
            Err(StoreError::new(format!("`{path}` has not answered yet, and may take it later")))
        }
    }
}

/// The rows of a store that no process has to have open; none if there is no file.
async fn stored_in(path: &Path) -> Result<Rows, StoreError> {
    let of = path.to_owned();
    let opened = blocking(move || Database::open_read_only(&of, &schema::store())).await;
    let db = match opened {
        Ok(db) => db,
        Err(e) if e.kind() == sqlite::Kind::Missing => return Ok(Rows::default()),
        Err(e) => return Err(StoreError::new(e.to_string())),
    };
    let rows = db.read(sealed::all).await;
    db.close().await;
    rows.map_err(|e| StoreError::new(e.to_string()))
}

fn unreadable(copy: &Path, e: &std::io::Error) -> String {
    format!(
        "the copy `{}` of the subscribers made over the API cannot be read: {e}; those that it alone has are not served, and none is removed",
        copy.display()
    )
}

/// Says that it is not known whether there are damaged copies that were set aside.
fn unlisted(copy: &Path, e: &std::io::Error) -> String {
    format!(
        "the directory of `{}` cannot be read: {e}; whether a damaged copy of the subscribers made over the API is there is not known, and none is removed",
        copy.display()
    )
}

/// Says that there are damaged copies that were set aside.
fn aside(files: &[PathBuf]) -> Option<String> {
    let first = files.first()?.display();
    let more = match files.len() - 1 {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    Some(format!(
        "`{first}`{more} is a damaged copy of the subscribers made over the API that was set aside: those that it alone has are not served, and none is removed. Make those again that are missing, then delete it"
    ))
}

/// Says that the store is away, and what that means for the subscribers.
fn away(e: &StoreError, contents: &Contents, copy: &Copy) -> String {
    let copy = copy.path().display();
    let then = if !contents.is_there {
        format!(
            "there is no copy `{copy}` of the subscribers made over the API: if there are any, they are not served, and none is removed"
        )
    } else if contents.damaged > 0 || contents.is_torn {
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

/// Some names, and how many more there are.
fn listed(names: &[String]) -> String {
    let some: Vec<String> = names.iter().take(NAMES).map(|name| format!("`{name}`")).collect();
    match names.len().saturating_sub(NAMES) {
        0 => some.join(", "),
        more => format!("{} and {} more", some.join(", "), wording::grouped(more as u64)),
    }
}

/// Runs what blocks its thread.
pub(super) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(e) => std::panic::resume_unwind(e.into_panic()),
    }
}

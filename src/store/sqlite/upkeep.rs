//! The background task of a store: opens its files, checks them, and begins history again when it
//! was deleted or damaged.

use std::{
    path::Path,
    sync::{Arc, Mutex, Weak, atomic::Ordering},
    time::{Duration, SystemTime},
};

use tokio::{
    sync::{Notify, watch},
    time::timeout,
};

use super::{
    around,
    chunk::Limits,
    kept::Kept,
    open::{self, Open, Precious, SqliteConfig, StoreLock, lock},
};
use crate::{
    clock,
    sqlite::{self, Database, Kind},
    store::{Gap, HistoryState, KeptSubscribers, StoreError, StoreState},
    wording,
};

/// Time between two checks of the files and the disk, and between two tries to open them.
const CHECK: Duration = Duration::from_secs(3);

/// The longest time for which the subscribers wait for the precious file.
const OPENING: Duration = Duration::from_secs(5);

/// Bytes of a disk that must be free, unless a tenth of it is less.
const MUST_BE_FREE: u64 = 1 << 30;

/// The free bytes of a disk that this user may write, and all its bytes.
pub(super) type Disk = fn(&Path) -> Option<(u64, u64)>;

/// The precious file, or why it is not open.
#[derive(Debug, Clone)]
pub(super) enum PreciousState {
    Opening,
    Open(Precious),
    /// It is opened again and again. `with_all`: nothing of the store can be opened.
    Away {
        why: String,
        with_all: bool,
    },
    /// It is not opened, for this reason.
    Off(String),
    Closed,
}

/// What the clones of a store share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) config: SqliteConfig,
    pub(super) limits: Limits,
    pub(super) state: watch::Sender<StoreState>,
    pub(super) kept: Kept,
    precious: watch::Sender<PreciousState>,
    disk: Disk,
    open: Mutex<Option<Arc<Open>>>,
    /// The files have to be checked now.
    wake: Arc<Notify>,
    /// The daemon's.
    store_lock: Mutex<Option<StoreLock>>,
    /// Held while files are opened or closed.
    changing: tokio::sync::Mutex<Changing>,
}

#[derive(Debug, Default)]
struct Changing {
    is_closed: bool,
    /// Why history begins again when it is opened next.
    because: Option<String>,
    /// It was open before.
    was_open: bool,
    /// When it stopped because of the disk.
    stopped: Option<SystemTime>,
}

impl Shared {
    pub(super) fn new(config: SqliteConfig, limits: Limits, disk: Disk) -> Self {
        Self {
            kept: Kept::new(&config),
            config,
            limits,
            state: watch::Sender::default(),
            precious: watch::Sender::new(PreciousState::Opening),
            disk,
            open: Mutex::default(),
            wake: Arc::default(),
            store_lock: Mutex::default(),
            changing: tokio::sync::Mutex::default(),
        }
    }

    /// Checks the files now and again, until the store is closed or dropped.
    pub(super) fn keep(self: &Arc<Self>) {
        let (shared, wake) = (Arc::downgrade(self), self.wake.clone());
        tokio::spawn(keep(shared, wake));
    }

    /// Uses files that were opened for reading only.
    pub(super) fn use_to_read(&self, open: Open) {
        *lock(&self.open) = Some(Arc::new(open));
        self.without_precious("`store.db` is open in the daemon alone");
        self.set(HistoryState::Open);
    }

    /// The precious file is not opened, for this reason.
    pub(super) fn without_precious(&self, why: &str) {
        self.precious.send_replace(PreciousState::Off(why.to_owned()));
    }

    /// The files, if they may be read.
    pub(super) fn open(&self) -> Result<Arc<Open>, StoreError> {
        let open = lock(&self.open).clone();
        if let Some(open) = open.filter(|open| !open.is_damaged.load(Ordering::Relaxed)) {
            return Ok(open);
        }
        Err(StoreError::away(match &self.state.borrow().history {
            HistoryState::Opening | HistoryState::Open => "history is being opened".to_owned(),
            HistoryState::Stopped(why) | HistoryState::Away(why) | HistoryState::Off(why) => {
                why.clone()
            }
            HistoryState::Closed => "history is closed".to_owned(),
        }))
    }

    /// The precious file, if it is open.
    pub(super) fn precious(&self) -> Result<Database, StoreError> {
        match &*self.precious.borrow() {
            PreciousState::Open(precious) if precious.is_at_its_path() => Ok(precious.db.clone()),
            PreciousState::Open(precious) => {
                self.wake.notify_one();
                let path = precious.db.path().display();
                Err(StoreError::away(format!("`{path}` was deleted or moved, and is opened again")))
            }
            PreciousState::Opening => Err(StoreError::away("`store.db` is being opened")),
            PreciousState::Away { why, .. } | PreciousState::Off(why) => {
                Err(StoreError::away(why.clone()))
            }
            PreciousState::Closed => Err(StoreError::away("the store is closed")),
        }
    }

    /// Brings the copy of the subscribers up to date, if it is behind.
    async fn catch_up(&self) {
        if self.kept.is_behind()
            && let Ok(db) = self.precious()
        {
            self.kept.catch_up(db).await;
        }
    }

    /// The subscribers to go on with. Waits a while for a precious file that is being opened.
    pub(super) async fn subscribers(&self) -> KeptSubscribers {
        let mut precious = self.precious.subscribe();
        let decided = precious.wait_for(|state| !matches!(state, PreciousState::Opening));
        // Behind that time, or when the store is gone: as with one that is away.
        let off = match timeout(OPENING, decided).await {
            Ok(Ok(state)) => match &*state {
                PreciousState::Off(why) => Some(why.clone()),
                _ => None,
            },
            Ok(Err(_)) | Err(_) => None,
        };
        match off {
            Some(why) => self.kept.left(&self.config.data_dir, &why).await,
            None => self.kept.read(self.precious()).await,
        }
    }

    /// The files, if they may be written.
    pub(super) fn writable(&self) -> Result<Arc<Open>, StoreError> {
        if let HistoryState::Stopped(why) = &self.state.borrow().history {
            return Err(StoreError::away(why.clone()));
        }
        self.open()
    }

    /// The error of a request. A damaged file is not used any more.
    pub(super) fn failed(&self, open: &Open, e: &sqlite::Error) -> StoreError {
        match e.kind() {
            Kind::Damaged => {
                open.is_damaged.store(true, Ordering::Relaxed);
                self.wake.notify_one();
                StoreError::away(e.to_string())
            }
            Kind::Closed => StoreError::away(e.to_string()),
            _ => StoreError::new(e.to_string()),
        }
    }

    /// Completes what is begun, and closes the files. `complete`: nothing of deliveries is
    /// unrecorded.
    pub(super) async fn close(&self, complete: bool) {
        let mut changing = self.changing.lock().await;
        changing.is_closed = true;
        let held = lock(&self.store_lock).take();
        // What was recorded is committed. Closing the files can take longer than the end of a daemon,
        // which would look like a kill.
        if let Some(held) = &held
            && complete
            && (changing.was_open || held.ended_well)
        {
            held.ends_well();
        }
        let open = lock(&self.open).take();
        if let Some(open) = open {
            open.close(!open.is_damaged.load(Ordering::Relaxed)).await;
        }
        self.close_precious().await;
        drop(held);
        self.set(HistoryState::Closed);
        self.wake.notify_one();
    }

    /// Logs a state when it begins and when it ends.
    fn set(&self, history: HistoryState) {
        let before = self.state.borrow().clone();
        let warning = match &*self.precious.borrow() {
            PreciousState::Away { why, with_all } if !with_all || self.is_without_history() => {
                Some(why.clone())
            }
            _ => None,
        };
        let now = StoreState { history, warning };
        if before == now {
            return;
        }
        match (&before.history, &now.history) {
            (_, HistoryState::Away(why)) => {
                tracing::error!(error = why, "history is away; deliveries go on");
            }
            (_, HistoryState::Stopped(why)) => {
                tracing::error!(error = why, "history has stopped; deliveries go on");
            }
            (HistoryState::Away(_) | HistoryState::Stopped(_), HistoryState::Open) => {
                tracing::info!("history goes on");
            }
            _ => {}
        }
        if let Some(warning) = now.warning.as_ref().filter(|_| now.warning != before.warning) {
            tracing::error!(error = warning, "the store is not sound; history goes on without it");
        }
        self.state.send_replace(now);
    }

    fn is_without_history(&self) -> bool {
        self.config.without_history.is_some()
    }

    /// Opens the precious file if it is not open, without holding up [`close`](Self::close): another
    /// process may hold it for long. `None` if it is open.
    async fn open_precious(&self) -> Option<PreciousState> {
        let moved = match &*self.precious.borrow() {
            PreciousState::Open(precious) if precious.is_at_its_path() => return None,
            PreciousState::Open(precious) => Some(precious.clone()),
            _ => None,
        };
        if let Some(moved) = moved {
            tracing::error!(
                file = %moved.db.path().display(),
                "the store was deleted or moved while the daemon runs; it is opened again"
            );
            // Before the next one is opened: with its last connection a file's write-ahead log is
            // deleted, by its name.
            self.precious.send_replace(PreciousState::Opening);
            moved.db.close().await;
        }
        let away = |why: String, with_all| Some(PreciousState::Away { why, with_all });
        if let Err(e) = self.lock_store() {
            return away(e.to_string(), true);
        }
        let config = self.config.clone();
        match tokio::task::spawn_blocking(move || Precious::open(&config)).await {
            Ok(Ok(precious)) => Some(PreciousState::Open(precious)),
            Ok(Err(e)) => away(e.to_string(), e.kind() == Kind::Later),
            Err(e) => away(e.to_string(), false),
        }
    }

    /// Uses what was opened, if it was.
    fn install(&self, opened: PreciousState) -> bool {
        let is_open = matches!(opened, PreciousState::Open(_));
        let before = self.precious.send_replace(opened);
        if is_open {
            if matches!(before, PreciousState::Away { .. }) {
                tracing::info!("`store.db` can be opened again");
            }
            self.kept.read_again();
        }
        is_open
    }

    async fn close_precious(&self) {
        let before = self.precious.send_replace(PreciousState::Closed);
        if let PreciousState::Open(precious) = before {
            precious.db.close().await;
        }
    }

    /// Opens the files, or checks them; false once the store is closed.
    async fn step(&self) -> bool {
        if self.changing.lock().await.is_closed {
            return false;
        }
        let opened = self.open_precious().await;
        let mut changing = self.changing.lock().await;
        if changing.is_closed {
            if let Some(opened) = opened {
                self.precious.send_replace(opened);
            }
            self.close_precious().await;
            lock(&self.store_lock).take();
            return false;
        }
        let anew = opened.is_some_and(|opened| self.install(opened));
        match &self.config.without_history {
            Some(why) => self.set(HistoryState::Off(why.clone())),
            None => self.step_history(&mut changing, anew).await,
        }
        true
    }

    /// Opens history, or checks it. `anew`: it is closed before.
    async fn step_history(&self, changing: &mut Changing, anew: bool) {
        let open = lock(&self.open).clone();
        match open {
            Some(open) if anew => {
                lock(&self.open).take();
                open.close(!open.is_damaged.load(Ordering::Relaxed)).await;
                self.open_files(changing).await;
            }
            Some(open) => self.check(&open, changing).await,
            None => {
                self.open_files(changing).await;
                let open = lock(&self.open).clone();
                if let Some(open) = open {
                    self.check_disk(&open, changing).await;
                }
            }
        }
    }

    async fn open_files(&self, changing: &mut Changing) {
        let opened = match self.lock_store() {
            Ok(ended_well) => {
                let lacks = match (changing.was_open, ended_well) {
                    (true, _) => Some("the file was away meanwhile".to_owned()),
                    (false, false) => Some(
                        "the daemon was killed, or the store was away when it ended".to_owned(),
                    ),
                    (false, true) => None,
                };
                self.try_open(changing.because.clone(), lacks).await
            }
            Err(e) => Err(e),
        };
        match opened {
            Ok(open) => {
                (changing.because, changing.was_open) = (None, true);
                *lock(&self.open) = Some(Arc::new(open));
                self.set(HistoryState::Open);
            }
            Err(e) => self.set(HistoryState::Away(e.to_string())),
        }
    }

    /// Whether the process before has left nothing unrecorded.
    fn lock_store(&self) -> Result<bool, StoreError> {
        let mut held = lock(&self.store_lock);
        let held = match &mut *held {
            Some(held) => held,
            none => none.insert(open::lock_store(&self.config.data_dir)?),
        };
        Ok(held.ended_well)
    }

    async fn try_open(
        &self,
        mut because: Option<String>,
        lacks: Option<String>,
    ) -> Result<Open, StoreError> {
        let store = match &*self.precious.borrow() {
            PreciousState::Open(precious) => Some(precious.db.clone()),
            // One of a later version is refused with all that belongs to it.
            PreciousState::Away { why, with_all: true } => {
                return Err(StoreError::away(why.clone()));
            }
            _ => None,
        };
        let path = self.config.history_path();
        for _ in 0..2 {
            let (config, because_of) = (self.config.clone(), because.take());
            let open = move || open::open_files(&config, because_of);
            let files = tokio::task::spawn_blocking(open).await;
            let files = files.map_err(|e| StoreError::away(e.to_string()))??;
            match open::adopt(&self.config, files, store.clone(), lacks.clone()).await? {
                Some(open) => return Ok(open),
                None => because = Some(open::set_aside(&path)?),
            }
        }
        let text =
            format!("`{}` was damaged as soon as it was made; check the disk", path.display());
        Err(StoreError::away(text))
    }

    async fn check(&self, open: &Arc<Open>, changing: &mut Changing) {
        let path = self.config.history_path();
        let is_damaged = open.is_damaged.load(Ordering::Relaxed);
        if !is_damaged && open.is_at(&path) {
            self.check_disk(open, changing).await;
            return;
        }
        lock(&self.open).take();
        self.set(HistoryState::Opening);
        open.close(false).await;
        let why = if is_damaged {
            open::set_aside(&path)
        } else {
            tracing::error!(file = %path.display(), "history was deleted or moved; it begins again");
            Ok("the file before it was deleted or moved".to_owned())
        };
        match why {
            Ok(because) => {
                changing.because = Some(because);
                self.open_files(changing).await;
            }
            Err(e) => self.set(HistoryState::Away(e.to_string())),
        }
    }

    async fn check_disk(&self, open: &Open, changing: &mut Changing) {
        let Some((free, all)) = (self.disk)(&self.config.data_dir) else { return };
        let least = (all / 10).min(MUST_BE_FREE);
        if free < least {
            // Also before it ends: the daemon may be stopped until then.
            let from = *changing.stopped.get_or_insert_with(clock::now);
            if let Err(e) = self.lack(open, from).await {
                tracing::debug!(error = %e, "the gap of a full disk is not recorded yet");
            }
            let bytes =
                |n: u64| wording::size(usize::try_from(n >> 20 << 20).unwrap_or(usize::MAX));
            let why = format!(
                "the disk of `{}` is almost full: {} are free, and history needs {}; make room, or lower [history] max_bytes",
                self.config.data_dir.display(),
                bytes(free),
                bytes(least)
            );
            // The figures change; the first ones stay.
            if !matches!(self.state.borrow().history, HistoryState::Stopped(_)) {
                self.set(HistoryState::Stopped(why));
            }
            return;
        }
        let Some(from) = changing.stopped else { return };
        match self.lack(open, from).await {
            Ok(()) => {
                changing.stopped = None;
                self.set(HistoryState::Open);
            }
            Err(e) => drop(self.failed(open, &e)),
        }
    }

    /// Records that deliveries may be missing from a time until now.
    async fn lack(&self, open: &Open, from: SystemTime) -> Result<(), sqlite::Error> {
        let gap = Gap {
            from,
            until: clock::now(),
            what: "deliveries",
            why: "the disk was almost full".to_owned(),
            missing: None,
        };
        open.history.write(move |db| around::add_gap(db, &gap)).await
    }
}

/// Checks the files until the store is closed or dropped.
async fn keep(shared: Weak<Shared>, wake: Arc<Notify>) {
    while let Some(shared) = shared.upgrade() {
        if !shared.step().await {
            return;
        }
        shared.catch_up().await;
        shared.kept.check_aside().await;
        drop(shared);
        // Early, if a request has found damage.
        drop(timeout(CHECK, wake.notified()).await);
    }
}

/// The free and all bytes of the disk of a directory.
pub(super) fn free_and_all(dir: &Path) -> Option<(u64, u64)> {
    let disk = rustix::fs::statvfs(dir).ok()?;
    Some((disk.f_bavail.saturating_mul(disk.f_frsize), disk.f_blocks.saturating_mul(disk.f_frsize)))
}

#[cfg(test)]
impl Shared {
    pub(super) async fn crash(&self) {
        self.changing.lock().await.is_closed = true;
        let open = lock(&self.open).take().expect("is open");
        open.close(false).await;
        self.close_precious().await;
        lock(&self.store_lock).take();
    }
}

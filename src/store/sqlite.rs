//! The store in two SQLite files: `history.db`, which may be deleted, and `store.db`, which is
//! precious.
//!
//! A background task opens them, and again whenever they cannot be used: nothing waits for it. It
//! also notices that the file was deleted or damaged, and that the disk is almost full.

mod append;
mod around;
mod chunk;
mod copy;
mod deliveries;
mod fault;
mod hours;
mod kept;
mod keyring;
mod merge;
mod open;
mod pack;
mod replays;
mod reseal;
mod schema;
mod sealed;
mod search;
mod source;
#[cfg(test)]
mod tests;
mod tokens;
mod upkeep;

use std::{
    collections::BTreeSet,
    path::Path,
    sync::{Arc, atomic::Ordering},
    time::{Duration, SystemTime},
};

use rusqlite::Connection;
use tokio::sync::watch;

use self::{
    append::Manner,
    chunk::{Limits, MAX_EVENTS},
    fault::{Fault, millis, span},
    open::{By, Open, lock},
    schema::{ASIDE, COPY_FILE, HISTORY_FILE, KEY_FILE, LOCK, PART, STORE_FILE},
    search::Search,
    source::Source,
    upkeep::{Disk, Shared, free_and_all},
};
pub use self::{
    open::{OpenLog, SqliteConfig},
    reseal::{Resealed, seal_again},
};
use super::{
    Added, Appended, Changed, Deleted, Delivery, DeliveryChange, DeliveryFilter, EventCounts,
    EventFilter, EventNumber, EventRow, Extent, Gap, HistoryState, Introduced, KeptSubscribers,
    MAX_APPEND, MAX_ROWS, NewOperation, NewRow, Newcomer, Operation, Page, Put, Reach, Recorded,
    Replay, ReplayChange, RequestKey, Store, StoreError, StoreState, Subscription, TypeCounts,
    WithEvent,
};
use crate::{
    clock,
    crypto::secret::Secret,
    delivery::{Print, SubscriberName},
    event::audience::Interest,
    sqlite::Database,
};

/// Parts of a history that one chunk has at most: so much is removed at once.
const PARTS: u32 = 16;

/// The store. Clones share it.
#[derive(Debug, Clone)]
pub struct SqliteStore(Arc<Shared>);

impl SqliteStore {
    /// Starts the store of a daemon. Returns at once: the files are opened in the background, and
    /// until then requests are answered with an error that [is away](StoreError::is_away).
    ///
    /// Must be called in a tokio runtime.
    pub fn start(config: SqliteConfig) -> Self {
        Self::start_with(config, MAX_EVENTS, free_and_all)
    }

    fn start_with(config: SqliteConfig, chunk_events: i64, disk: Disk) -> Self {
        let store = Self::new(config, chunk_events, disk);
        store.0.keep();
        store
    }

    /// A store that keeps nothing, for this reason.
    pub fn off(config: SqliteConfig, why: &str) -> Self {
        let store = Self::new(config, MAX_EVENTS, free_and_all);
        store
            .0
            .state
            .send_replace(StoreState { history: HistoryState::Off(why.to_owned()), warning: None });
        store.0.without_precious(why);
        store
    }

    /// Opens history to read it, also without a daemon or while one writes it. Blocks its thread.
    ///
    /// # Errors
    /// There is none, or it cannot be read.
    pub fn read_only(config: SqliteConfig) -> Result<Self, StoreError> {
        let open = open::open_to_read(&config)?;
        let store = Self::new(config, MAX_EVENTS, free_and_all);
        store.0.use_to_read(open);
        Ok(store)
    }

    fn new(config: SqliteConfig, chunk_events: i64, disk: Disk) -> Self {
        let history = &config.history;
        let limits = Limits {
            events: chunk_events,
            bytes: i64::try_from(history.max_bytes / u64::from(PARTS)).unwrap_or(i64::MAX),
            span: span(history.retention / PARTS),
        };
        Self(Arc::new(Shared::new(config, limits, disk)))
    }

    /// The state of the store, for status and health.
    pub fn state(&self) -> watch::Receiver<StoreState> {
        self.0.state.subscribe()
    }

    /// The oldest time that is shown, in Unix milliseconds.
    fn horizon(&self) -> i64 {
        around::horizon(&self.0.config.history, clock::now())
    }

    /// Reads, with the source of the events' bytes.
    async fn read<T: Send + 'static>(
        &self,
        by: By,
        query: impl FnOnce(&Connection, &mut Source<'_>) -> Result<T, Fault> + Send + 'static,
    ) -> Result<T, StoreError> {
        let open = self.0.open()?;
        let with = open.clone();
        let query = move |db: &Connection| {
            // One view of the file: a chunk may be removed meanwhile.
            let view = db.unchecked_transaction()?;
            let answer = Fault::apart(with.with_source(by, |source| query(&view, source)))?;
            view.finish()?;
            Ok(answer)
        };
        let answer = match by {
            By::Looker => open.history.read_long(query).await,
            By::Writer | By::Reader => open.history.read(query).await,
        };
        answer.map_err(|e| self.0.failed(&open, &e)).flatten()
    }

    async fn write<T: Send + 'static>(
        &self,
        open: &Arc<Open>,
        part: impl FnOnce(&Connection, &Open) -> Result<T, Fault> + Send + 'static,
    ) -> Result<T, StoreError> {
        let with = open.clone();
        let part = move |db: &Connection| Fault::apart(part(db, &with));
        open.history.write(part).await.map_err(|e| self.0.failed(open, &e)).flatten()
    }

    /// Writes without more than the connection.
    async fn change(
        &self,
        part: impl FnOnce(&Connection) -> rusqlite::Result<()> + Send + 'static,
    ) -> Result<(), StoreError> {
        let open = self.0.writable()?;
        self.write(&open, move |db, _| Ok(part(db)?)).await
    }
}

impl SqliteStore {
    /// Reads the precious file.
    async fn read_precious<T: Send + 'static>(
        &self,
        query: impl FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, StoreError> {
        self.0.precious()?.read(query).await.map_err(|e| StoreError::new(e.to_string()))
    }

    /// Writes the precious file.
    async fn precious<T: Send + 'static>(
        &self,
        part: impl FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, StoreError> {
        self.0.precious()?.write(part).await.map_err(|e| match e.is_unknown() {
            true => StoreError::unknown(e.to_string()),
            false => StoreError::new(e.to_string()),
        })
    }
}

impl SqliteStore {
    /// The number of the last event that no replay has still to read, one that is to be made for a
    /// new subscriber included; `None` if there are none.
    async fn spared(&self, open: &Arc<Open>, store: &Database) -> Result<Option<i64>, StoreError> {
        let read = |db: &Connection| Ok((replays::floor(db)?, replays::earliest_start(db)?));
        let failed = |e: crate::sqlite::Error| StoreError::new(e.to_string());
        let (floor, since) = store.read(read).await.map_err(failed)?;
        let Some(since) = since else { return Ok(floor) };
        let before = open.history.read(move |db| chunk::last_before(db, since)).await;
        let before = before.map_err(|e| self.0.failed(open, &e))?;
        Ok(Some(floor.map_or(before, |floor| floor.min(before))))
    }
}

/// The id of the store in a directory, also while a daemon has it open.
///
/// # Errors
/// There is none, or it cannot be read.
pub async fn recorded_id(data_dir: &Path) -> Result<String, StoreError> {
    let path = data_dir.join(STORE_FILE);
    let failed = |e: crate::sqlite::Error| StoreError::new(e.to_string());
    let store = Database::open_read_only(&path, &schema::store()).map_err(failed)?;
    let id = store.read(|db| around::get_text(db, "id")).await.map_err(failed);
    store.close().await;
    id?.ok_or_else(|| StoreError::new(format!("`{}` has no id yet", path.display())))
}

/// Deletes the files of a store that nothing uses: history, what was set aside of it, and the
/// precious part.
///
/// # Errors
/// A file cannot be deleted.
pub fn delete_store(data_dir: &Path) -> std::io::Result<()> {
    for entry in std::fs::read_dir(data_dir)? {
        let entry = entry?;
        let name = entry.file_name();
        let is_ours = |name: &str| {
            let of = |file: &str| name == file || name.starts_with(&format!("{file}-"));
            let aside = |file: &str| name.starts_with(&format!("{file}{ASIDE}"));
            of(HISTORY_FILE)
                || of(STORE_FILE)
                || [LOCK, "history.opening", "store.opening", COPY_FILE, KEY_FILE]
                    .contains(&name.trim_end_matches(PART))
                || aside(HISTORY_FILE)
                || aside(COPY_FILE)
                || name.starts_with(&format!("{STORE_FILE}.before-"))
        };
        if name.to_str().is_some_and(is_ours) {
            std::fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

impl Store for SqliteStore {
    async fn writable(&self) -> Result<(), StoreError> {
        let is_settled =
            |s: &StoreState| matches!(s.history, HistoryState::Open | HistoryState::Closed);
        // An error means that the store is gone; the write says so.
        self.state().wait_for(is_settled).await.ok();
        // What is added and removed in one transaction needs no room.
        self.change(|db| db.execute(PROBE, []).map(drop)).await?;
        self.change(|db| db.execute("DELETE FROM meta WHERE key = 'probe'", []).map(drop)).await
    }

    async fn append(&self, events: Vec<NewRow>) -> Result<Appended, StoreError> {
        if events.len() > MAX_APPEND {
            return Err(StoreError::new(format!("more than {MAX_APPEND} events at once")));
        }
        let open = self.0.writable()?;
        let events: Arc<[NewRow]> = events.into();
        let (limits, has_bodies) = (self.0.limits, self.0.config.history.bodies);
        loop {
            let events = events.clone();
            let append = move |db: &Connection, open: &Open| {
                let manner = Manner {
                    has_rows: open.has_rows(),
                    has_bodies,
                    limits,
                    now: millis(clock::now()),
                    numbers: (open.first, open.last.load(Ordering::Relaxed)),
                };
                append::append(db, &mut lock(&open.memory), &manner, &events)
            };
            match self.write(&open, append).await? {
                Some(appended) => return Ok(appended),
                None => open.reserve().await,
            }
        }
    }

    async fn events(
        &self,
        filter: &EventFilter,
        before: Option<EventNumber>,
        limit: usize,
        time: Duration,
    ) -> Result<Page<EventRow>, StoreError> {
        let horizon = self.horizon();
        let (filter, limit) = (filter.clone(), limit.min(MAX_ROWS));
        // A list without a filter does not wait behind searches.
        let by = if filter.is_all() { By::Reader } else { By::Looker };
        let search = move |db: &Connection, source: &mut Source<'_>| {
            let deadline = clock::instant() + time;
            search::events(db, source, &Search { filter, before, limit, deadline, horizon })
        };
        self.read(by, search).await
    }

    async fn count_by_hour(
        &self,
        filter: &EventFilter,
        since: SystemTime,
        hours: usize,
        time: Duration,
    ) -> Result<EventCounts, StoreError> {
        if filter.is_all() {
            let count = move |db: &Connection, _: &mut Source<'_>| {
                Ok(hours::of_all(db, millis(since), hours)?)
            };
            return self.read(By::Reader, count).await;
        }
        let (horizon, number) = (self.horizon(), u32::try_from(hours).unwrap_or(u32::MAX));
        let until = since.checked_add(HOUR.saturating_mul(number));
        let of = |own: Option<SystemTime>| own.filter(|_| filter.by == super::By::At);
        let filter = EventFilter {
            since: of(filter.since).max(Some(since)),
            until: of(filter.until).into_iter().chain(until).min(),
            ..filter.clone()
        };
        let count = move |db: &Connection, source: &mut Source<'_>| {
            let deadline = clock::instant() + time;
            let search = Search { filter, before: None, limit: usize::MAX, deadline, horizon };
            search::count(db, source, &search, millis(since), hours)
        };
        self.read(By::Looker, count).await
    }

    async fn count_by_type(
        &self,
        since: SystemTime,
        time: Duration,
    ) -> Result<TypeCounts, StoreError> {
        let horizon = self.horizon();
        let filter = EventFilter { since: Some(since), ..EventFilter::default() };
        let count = move |db: &Connection, source: &mut Source<'_>| {
            let deadline = clock::instant() + time;
            let search = Search { filter, before: None, limit: usize::MAX, deadline, horizon };
            search::count_types(db, source, &search)
        };
        self.read(By::Looker, count).await
    }

    async fn event(&self, number: EventNumber) -> Result<Option<EventRow>, StoreError> {
        let horizon = self.horizon();
        self.read(By::Reader, move |db, source| search::event(db, source, number, horizon)).await
    }

    async fn events_with_id(&self, id: &str) -> Result<Vec<EventRow>, StoreError> {
        let filter = EventFilter { id: Some(id.to_owned()), ..EventFilter::default() };
        Ok(self.events(&filter, None, MAX_ROWS, ID_TIME).await?.rows)
    }

    async fn rows(
        &self,
        after: EventNumber,
        upto: EventNumber,
        limit: usize,
        bytes: usize,
    ) -> Result<Vec<EventRow>, StoreError> {
        let rows = move |db: &Connection, source: &mut Source<'_>| {
            search::rows(db, source, (after, upto), limit, bytes)
        };
        self.read(By::Reader, rows).await
    }

    async fn record(&self, changes: Vec<DeliveryChange>) -> Result<(), StoreError> {
        self.change(move |db| deliveries::record(db, &changes)).await
    }

    async fn deliveries(
        &self,
        filter: &DeliveryFilter,
        before: Option<i64>,
        limit: usize,
        time: Duration,
    ) -> Result<Page<Delivery>, StoreError> {
        let (filter, horizon, limit) = (filter.clone(), self.horizon(), limit.min(MAX_ROWS));
        let list = move |db: &Connection, _: &mut Source<'_>| {
            let deadline = clock::instant() + time;
            Ok(deliveries::list(db, &filter, before, limit, deadline, horizon)?)
        };
        self.read(By::Looker, list).await
    }

    async fn deliveries_with(
        &self,
        subscribers: &[SubscriberName],
        print: Print,
        since: SystemTime,
        until: SystemTime,
        time: Duration,
    ) -> Result<Vec<WithEvent>, StoreError> {
        let subscribers = subscribers.to_vec();
        let times = (millis(since), millis(until));
        let find = move |db: &Connection, _: &mut Source<'_>| {
            let deadline = clock::instant() + time;
            Ok(deliveries::with_event(db, &subscribers, print, times, deadline)?)
        };
        self.read(By::Looker, find).await
    }

    async fn delivery(&self, id: &str) -> Result<Option<Delivery>, StoreError> {
        let id = id.to_owned();
        self.read(By::Reader, move |db, _| Ok(deliveries::one(db, &id)?)).await
    }

    async fn subscribed(
        &self,
        all: Vec<(SubscriberName, Interest)>,
        now: SystemTime,
    ) -> Result<(), StoreError> {
        self.change(move |db| around::subscribed(db, &all, millis(now))).await
    }

    async fn subscriptions(&self) -> Result<Vec<Subscription>, StoreError> {
        let horizon = self.horizon();
        self.read(By::Reader, move |db, _| Ok(around::subscriptions(db, horizon)?)).await
    }

    async fn add_gap(&self, gap: Gap) -> Result<(), StoreError> {
        self.change(move |db| around::add_gap(db, &gap)).await
    }

    async fn reach(&self) -> Result<Reach, StoreError> {
        let (history, horizon) = (self.0.config.history, self.horizon());
        let reach = move |db: &Connection, source: &mut Source<'_>| {
            around::reach(db, source, &history, horizon)
        };
        self.read(By::Reader, reach).await
    }

    async fn extent(
        &self,
        since: SystemTime,
        until: Option<SystemTime>,
        upto: Option<EventNumber>,
    ) -> Result<Option<Extent>, StoreError> {
        let extent = move |db: &Connection, source: &mut Source<'_>| {
            let deadline = clock::instant() + COUNT_TIME;
            replays::extent(db, source, (since, until), upto, deadline)
        };
        self.read(By::Looker, extent).await
    }

    async fn add_replay(
        &self,
        replay: Replay,
        key: Option<RequestKey>,
    ) -> Result<Added, StoreError> {
        self.precious(move |db| replays::add(db, &replay, key.as_ref())).await
    }

    async fn change_replay(
        &self,
        id: &str,
        change: ReplayChange,
        now: SystemTime,
    ) -> Result<Option<Changed>, StoreError> {
        let id = id.to_owned();
        self.precious(move |db| replays::change(db, &id, change, now)).await
    }

    async fn replays(
        &self,
        before: Option<i64>,
        limit: usize,
    ) -> Result<Page<Recorded>, StoreError> {
        let limit = limit.min(MAX_ROWS);
        self.read_precious(move |db| replays::list(db, before, limit)).await
    }

    async fn replay(&self, id: &str) -> Result<Option<Recorded>, StoreError> {
        let id = id.to_owned();
        self.read_precious(move |db| replays::one(db, &id)).await
    }

    async fn running_replays(&self) -> Result<Vec<Recorded>, StoreError> {
        self.read_precious(replays::running).await
    }

    async fn replay_floor(&self) -> Result<Option<EventNumber>, StoreError> {
        let open = self.0.open()?;
        let store = self.0.precious()?;
        Ok(self.spared(&open, &store).await?.map(EventNumber))
    }

    async fn introduce(
        &self,
        newcomers: Vec<Newcomer>,
        bound: Option<BTreeSet<SubscriberName>>,
        now: SystemTime,
    ) -> Result<Introduced, StoreError> {
        self.precious(move |db| replays::introduce(db, &newcomers, bound.as_ref(), now)).await
    }

    async fn begin_newcomers(
        &self,
        replays: Vec<(SubscriberName, Option<Replay>)>,
    ) -> Result<BTreeSet<SubscriberName>, StoreError> {
        self.precious(move |db| replays::begin_newcomers(db, &replays)).await
    }

    async fn subscribers(&self) -> KeptSubscribers {
        self.0.subscribers().await
    }

    fn subscribers_to_read(&self) -> watch::Receiver<u64> {
        self.0.kept.to_read.subscribe()
    }

    async fn put_subscriber(
        &self,
        name: &SubscriberName,
        document: Secret,
        expected: Option<u64>,
        operation: NewOperation,
    ) -> Result<Put, StoreError> {
        let change = sealed::Change { name: name.clone(), expected, operation };
        let (shared, db) = (self.0.clone(), self.0.precious()?);
        whole(async move { shared.kept.put(&db, change, document).await }).await
    }

    async fn delete_subscriber(
        &self,
        name: &SubscriberName,
        expected: u64,
        drops: bool,
        operation: NewOperation,
    ) -> Result<Deleted, StoreError> {
        let change = sealed::Change { name: name.clone(), expected: Some(expected), operation };
        let (shared, db) = (self.0.clone(), self.0.precious()?);
        whole(async move { shared.kept.delete(&db, change, drops).await }).await
    }

    async fn dropping(&self) -> Result<BTreeSet<SubscriberName>, StoreError> {
        self.read_precious(sealed::dropping).await
    }

    async fn dropped(&self, name: &SubscriberName) -> Result<(), StoreError> {
        let name = name.clone();
        self.precious(move |db| sealed::dropped(db, &name)).await
    }

    async fn add_operation(&self, operation: NewOperation) -> Result<(), StoreError> {
        self.precious(move |db| replays::add_operation(db, &operation)).await
    }

    async fn operations(
        &self,
        before: Option<i64>,
        limit: usize,
    ) -> Result<Page<Operation>, StoreError> {
        let limit = limit.min(MAX_ROWS);
        self.read_precious(move |db| replays::operations(db, before, limit)).await
    }

    async fn trim(&self, now: SystemTime) -> Result<bool, StoreError> {
        // Also while history has stopped: it makes room.
        let open = self.0.open()?;
        let history = self.0.config.history;
        let spared = match &open.store {
            Some(store) => self.spared(&open, store).await?,
            None => None,
        };
        let trim = move |db: &Connection, open: &Open| {
            open.with_source(By::Writer, |source| around::trim(db, source, &history, spared, now))
        };
        if self.write(&open, trim).await? {
            return Ok(true);
        }
        // It takes room for a while.
        let Ok(open) = self.0.writable() else { return Ok(false) };
        self.write(&open, |db, _| Ok(pack::pack(db)?)).await
    }

    async fn id(&self) -> Result<String, StoreError> {
        self.precious(around::store_id).await
    }

    async fn leave_the_queue(&self) {
        let Ok(open) = self.0.open() else { return };
        // Without it the log's last reader keeps the queue from emptying its write-ahead log.
        if let Err(e) = tokio::task::spawn_blocking(move || open.leave_log()).await {
            tracing::debug!(error = %e, "the log was not closed");
        }
    }

    fn condition(&self) -> StoreState {
        self.0.state.borrow().clone()
    }

    async fn close(&self, complete: bool) {
        self.0.close(complete).await;
    }
}

/// Makes a change of a subscriber to its end, also if its caller has gone: the copy must follow.
async fn whole<T: Send + 'static>(
    change: impl Future<Output = Result<T, StoreError>> + Send + 'static,
) -> Result<T, StoreError> {
    tokio::spawn(change).await.unwrap_or_else(|e| Err(StoreError::unknown(e.to_string())))
}

const HOUR: Duration = Duration::from_secs(3600);

/// Writes 64 KiB, to try whether there is room.
const PROBE: &str = "INSERT OR REPLACE INTO meta (key, value) VALUES ('probe', zeroblob(65536))";

/// The time for which the rows of a new replay are counted.
const COUNT_TIME: Duration = Duration::from_secs(1);

/// The longest time of a search by id.
const ID_TIME: Duration = Duration::from_secs(2);

#[cfg(test)]
impl SqliteStore {
    /// Closes the files as the end of a process does.
    async fn crash(&self) {
        self.0.crash().await;
    }
}

//! The embedded queue: one ordered log of events for all subscribers, a cursor for each, retries
//! with their due times and dead letters, in one SQLite database.
//!
//! - `store`: the file, its schema and its lock
//! - `place`: whether the open files are still those at their paths
//! - `segments`: what the subscribers are to get of the log
//! - `backlog`: counts what the subscribers have still to get
//! - `consumer`: source and settler of a subscriber
//! - `budget`: the memory of what all lanes have in hand
//! - `head`: hands over what was read of the log to the lanes that want it
//! - `reader`: reads the log once for all lanes
//! - `passes`: which part of it is read next for lanes that are behind
//! - `keep`: stores how far the lanes are, of all of them together
//! - `ring`: the last events in memory, for all lanes
//! - `dead`: a walk through dead letters
//! - `waiting`: lists batches that wait for their next attempt, and makes them due now
//! - `trim`: deletes what nothing needs any more
//! - `append`: stores events, those too that come through a broker
//! - `history`: the log as the source of history; `feed`: hands its events over
//! - `doctor`: what can lose or hold up events
//!
//! The log is filtered when it is read, once for all lanes that are where it ends, by the patterns that were configured when the event was
//! stored: each change of them begins another segment of the log. An event that matches no
//! subscriber is stored for history alone, if there is one.

mod append;
mod backlog;
mod budget;
mod consumer;
mod dead;
mod doctor;
mod feed;
mod head;
mod history;
mod keep;
mod passes;
mod place;
mod reader;
mod ring;
mod segments;
mod store;
mod trim;
mod waiting;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    time::{Duration, SystemTime},
};

use rusqlite::{Connection, OptionalExtension as _, Row, Rows, Statement, params};
use tokio::sync::{Mutex as AsyncMutex, watch};

pub use self::{
    append::{Appended, Delivered, Inflow, Invalid},
    consumer::{Settler, Source},
    dead::DeadLetters,
    feed::History,
    history::{HistoryPosition, Log},
};
use self::{
    backlog::{backlogs, depths},
    budget::Budget,
    consumer::{LaneRef, Unsettled},
    dead::orphans,
    head::Head,
    history::{TakenTo, Untaken},
    keep::Keeper,
    segments::Segments,
    store::{Access, Store},
    trim::Replayed,
};
use crate::{
    config::{EmbeddedConfig, HistoryConfig, Subscriber, Subscribers},
    delivery::{Batch, BatchId, Depths, Pause, PauseState, PauseStates, SubscriberName},
    event::{Pattern, Tenant},
    policy::retry::Backoff,
    queue::{
        Begin, Hastened, HistoryStart, MAX_TRACEPARENT, NewEvent, Progress, Published, Queue,
        QueueError, Removals, ReplayFloor, WaitingList, Window,
    },
    store::EventNumber,
    telemetry::{finding::Finding, metrics::Metrics, troubles::Troubles},
};

/// Time between two polls for commits of other processes: `publish` and `dead` alongside a daemon.
const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// Time between two reports of how the lanes are.
const REPORT_INTERVAL: Duration = Duration::from_secs(1);

/// Time between two checks that the files are still at their paths; they are also checked each time
/// that events are stored.
const CHECK_PLACE: Duration = Duration::from_secs(10);

/// The database. Clones share it.
#[derive(Debug, Clone)]
pub struct EmbeddedQueue(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    store: Store,
    retention: Duration,
    history: Option<HistoryConfig>,
    history_position: HistoryPosition,
    /// What history has not taken, as far as it was counted.
    untaken: AsyncMutex<Untaken>,
    replay_floor: Mutex<Option<ReplayFloor>>,
    replayed: AsyncMutex<Replayed>,
    /// As they were read last.
    segments: Mutex<Arc<Segments>>,
    head: Arc<Head>,
    budget: Arc<Budget>,
    keeper: Arc<Keeper>,
    /// Counts commits that may have something for a lane.
    news: watch::Sender<u64>,
    pause_states: watch::Sender<Option<PauseStates>>,
    removals: Removals,
    /// The subscribers that were prepared last.
    prepared: Mutex<BTreeSet<SubscriberName>>,
    /// Those that have another tenant than what is left of them.
    refused: Mutex<BTreeSet<SubscriberName>>,
    /// The latest session of each subscriber.
    lanes: Mutex<BTreeMap<SubscriberName, LaneRef>>,
    /// Brings events from elsewhere, alongside the lanes.
    inflow: OnceLock<Arc<dyn Inflow>>,
    /// Where it reports how its lanes are.
    metrics: OnceLock<Metrics>,
}

impl EmbeddedQueue {
    /// Opens the database for the daemon, exclusively.
    ///
    /// # Errors
    /// It cannot be opened, or another daemon has it.
    pub fn for_daemon(config: &EmbeddedConfig) -> Result<Self, QueueError> {
        Self::open(config, Access::Daemon)
    }

    /// Opens the database for publishing, alongside a daemon or without one.
    ///
    /// # Errors
    /// It cannot be opened.
    pub fn for_publishing(config: &EmbeddedConfig) -> Result<Self, QueueError> {
        Self::open(config, Access::Create)
    }

    /// Opens an existing database.
    ///
    /// # Errors
    /// It cannot be opened, or there is none.
    pub fn existing(config: &EmbeddedConfig) -> Result<Self, QueueError> {
        Self::open(config, Access::Existing)
    }

    /// Whether there is a database.
    ///
    /// # Errors
    /// The user may not read the directory.
    pub fn exists(config: &EmbeddedConfig) -> Result<bool, QueueError> {
        store::exists(&config.data_dir)
    }

    fn open(config: &EmbeddedConfig, access: Access) -> Result<Self, QueueError> {
        let store = Store::open(&config.data_dir, access)?;
        let news = watch::Sender::new(0);
        let (retention, history) = (config.retention, config.history);
        let (history_position, untaken) = (HistoryPosition::default(), AsyncMutex::default());
        let (pause_states, removals) = (watch::Sender::new(None), Removals::default());
        let (prepared, lanes) = (Mutex::default(), Mutex::default());
        let keeper = Arc::new(Keeper::new(store.clone()));
        Ok(Self(Arc::new(Inner {
            store,
            retention,
            history,
            history_position,
            untaken,
            replay_floor: Mutex::default(),
            replayed: AsyncMutex::default(),
            segments: Mutex::default(),
            head: Arc::default(),
            budget: Arc::default(),
            keeper,
            news,
            pause_states,
            removals,
            prepared,
            refused: Mutex::default(),
            lanes,
            inflow: OnceLock::new(),
            metrics: OnceLock::new(),
        })))
    }

    /// Sets where it reports how its lanes are. Of no effect if that is set already.
    #[must_use]
    pub fn measured_by(self, metrics: Metrics) -> Self {
        self.0.metrics.get_or_init(|| metrics);
        self
    }

    /// Reports how the lanes are, each second.
    async fn report_lanes(&self) {
        let Some(metrics) = self.0.metrics.get() else { return };
        let (mut reads, mut events) = (0, 0);
        loop {
            let (in_hand, in_line) = self.0.budget.use_now();
            let (behind, all_reads, all_events) = self.0.head.behind();
            metrics.set_lanes(in_hand, in_line, behind);
            metrics.passed(all_reads - reads, all_events - events);
            (reads, events) = (all_reads, all_events);
            tokio::time::sleep(REPORT_INTERVAL).await;
        }
    }

    /// Whether there is a database with undelivered events.
    ///
    /// # Errors
    /// It cannot be read.
    pub async fn holds_undelivered(config: &EmbeddedConfig) -> Result<bool, QueueError> {
        if !Self::exists(config)? {
            return Ok(false);
        }
        let queue = Self::existing(config)?;
        queue
            .store()
            .read(|db| {
                let retries: bool =
                    db.query_row("SELECT EXISTS (SELECT 1 FROM retry)", [], |r| r.get(0))?;
                Ok(retries || !backlogs(db, &BTreeMap::new())?.iter().all(|(_, n)| *n == 0))
            })
            .await
    }

    fn store(&self) -> &Store {
        &self.0.store
    }

    fn lanes(&self) -> MutexGuard<'_, BTreeMap<SubscriberName, LaneRef>> {
        self.0.lanes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Deletes the database with all that is in it. It has to be open [for the
    /// daemon](Self::for_daemon).
    ///
    /// # Errors
    /// A file cannot be deleted.
    pub fn delete(self) -> Result<(), QueueError> {
        store::delete(self.store().path())
    }

    /// The depth of each subscriber, whether it is configured or not.
    ///
    /// # Errors
    /// The database cannot be read.
    pub async fn everything(&self) -> Result<Depths, QueueError> {
        self.store()
            .read_long(|db| {
                let (subscribers, orphans) = (depths(db, &BTreeMap::new())?, orphans(db)?);
                Ok(Depths { subscribers, orphans, ..Depths::default() })
            })
            .await
    }

    /// A walk through the dead letters of the log: what came through a broker and is no event.
    ///
    /// # Errors
    /// The database cannot be read.
    pub async fn orphans(&self) -> Result<DeadLetters, QueueError> {
        DeadLetters::of_log(self.store().clone(), self.0.head.clone()).await
    }

    /// The log as the source of history, for one thread.
    ///
    /// # Errors
    /// The file is lost, or cannot be opened.
    pub fn event_log(&self) -> Result<Log, QueueError> {
        Log::open(self.store().path().parent().unwrap_or(Path::new(".")))
    }

    /// Where the recorder of history reports how far it has taken the log: what it has not taken is
    /// kept, up to `max_bytes` of `[history]`.
    pub fn history_position(&self) -> HistoryPosition {
        self.0.history_position.clone()
    }

    /// The pauses that are recorded, for a command without a daemon.
    ///
    /// # Errors
    /// The database cannot be read.
    pub async fn recorded_pauses(&self) -> Result<PauseStates, QueueError> {
        self.store().read(pause_states).await.map(Arc::new)
    }

    /// Counts changes that may be events, of this process and, within 100 ms, of others.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.0.news.subscribe()
    }

    /// Ends the segments of former configurations and begins segments for the current ones. Returns the
    /// subscribers that have none, because what is left of them is another tenant's.
    async fn bind(
        &self,
        subscribers: &[Arc<Subscriber>],
        only_missing: bool,
    ) -> Result<BTreeSet<SubscriberName>, QueueError> {
        let wanted: Vec<Wanted> = subscribers.iter().map(|s| Wanted::of(s)).collect();
        let removals = (!only_missing).then(|| self.0.removals.clone());
        let Synced { changes, refused } =
            self.store().write(move |db| sync_segments(db, &wanted, removals.as_ref())).await?;
        for change in changes {
            tracing::warn!("{change}");
        }
        let mut known = self.refused();
        for (_, why) in refused.iter().filter(|(name, _)| !known.contains(name)) {
            tracing::error!("{why}");
        }
        *known = refused.into_iter().map(|(name, _)| name).collect();
        Ok(known.clone())
    }

    /// Binds newly configured subscribers. `prepare` has bound them, unless the write failed, or what is
    /// left of them is another tenant's: that may be delivered, or purged, at any time.
    async fn bind_again(&self, mut subscribers: watch::Receiver<Subscribers>) {
        let mut removals = self.0.removals.changes();
        let mut waits = Backoff::new(Duration::from_millis(200), Duration::from_secs(10));
        let mut some_lack = !self.refused().is_empty();
        loop {
            let again = if some_lack { waits.grow() } else { Duration::ZERO };
            tokio::select! {
                changed = subscribers.changed() => match changed {
                    Ok(()) => waits.reset(),
                    Err(_) => return,
                },
                Ok(()) = removals.changed() => waits.reset(),
                () = tokio::time::sleep(again), if some_lack => {}
            }
            let current = subscribers.borrow_and_update().clone();
            some_lack = match self.bind(&current, false).await {
                Ok(refused) => !refused.is_empty(),
                Err(e) => {
                    tracing::warn!(error = %e, "newly configured subscribers are not bound yet; trying again");
                    true
                }
            };
        }
    }

    fn refused(&self) -> MutexGuard<'_, BTreeSet<SubscriberName>> {
        self.0.refused.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The segments. Another process may change them at any time, so they are read in the
    /// transaction that reads or writes events.
    fn segments(&self, db: &Connection) -> rusqlite::Result<Arc<Segments>> {
        let known = self.0.segments.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let Some(changed) = known.changed(db)? else { return Ok(known) };
        let changed = Arc::new(changed);
        *self.0.segments.lock().unwrap_or_else(PoisonError::into_inner) = changed.clone();
        Ok(changed)
    }

    /// Checks periodically, so that a lost file is noticed without a publish.
    async fn check_place(&self) {
        loop {
            let place = self.store().place();
            // On a thread that may wait for the disk. An error means that the thread has ended.
            let check = move |_: &_| {
                drop(place.check());
                Ok(())
            };
            self.store().read(check).await.ok();
            tokio::time::sleep(CHECK_PLACE).await;
        }
    }

    /// Wakes the lanes after another process's commit and after this one's.
    async fn poll_commits(&self) {
        let mut commits = self.store().commits();
        let mut version = 0;
        loop {
            tokio::select! {
                changed = commits.changed() => if changed.is_err() { return },
                () = tokio::time::sleep(POLL_INTERVAL) => {
                    let now = self.store().read(|db| db.pragma_query_value(None, "data_version", |row| row.get::<_, i64>(0))).await;
                    match now {
                        Ok(now) if now != version => version = now,
                        _ => continue,
                    }
                }
            }
            self.0.news.send_modify(|n| *n += 1);
        }
    }
}

impl Queue for EmbeddedQueue {
    type Source = Source;
    type Settler = Settler;
    type DeadLetters = DeadLetters;
    type History = History;

    async fn prepare(
        &self,
        subscribers: &[Arc<Subscriber>],
    ) -> Result<BTreeSet<SubscriberName>, QueueError> {
        // Before anything is changed: a refusal has changed nothing.
        let mut found = self.store().read(pause_states).await?;
        let refused = self.bind(subscribers, false).await?;
        let names: BTreeSet<SubscriberName> = subscribers.iter().map(|s| s.name.clone()).collect();
        let before = std::mem::replace(
            &mut *self.0.prepared.lock().unwrap_or_else(PoisonError::into_inner),
            names.clone(),
        );
        self.0.pause_states.send_modify(|all| match all {
            None => *all = Some(Arc::new(found)),
            // Only this daemon changes them, except for new subscribers: a command may have pruned
            // one of the same name.
            Some(all) => {
                for name in names.difference(&before) {
                    match found.remove(name) {
                        Some(pause_state) => {
                            drop(Arc::make_mut(all).insert(name.clone(), pause_state))
                        }
                        None => drop(Arc::make_mut(all).remove(name)),
                    }
                }
            }
        });
        Ok(refused)
    }

    async fn background(
        &self,
        subscribers: watch::Receiver<Subscribers>,
        stopping: watch::Receiver<bool>,
    ) {
        let mut ends = stopping.clone();
        // It ends by itself: what it has taken it stores first.
        let inflow = async {
            if let Some(inflow) = self.0.inflow.get() {
                inflow.run(self.clone(), stopping.clone()).await;
            }
        };
        // Each step is a transaction.
        let tasks = async {
            tokio::join!(
                self.poll_commits(),
                self.read_for_all(),
                self.0.budget.mind_the_line(),
                self.keep_cursors(),
                self.trim_periodically(),
                self.bind_again(subscribers),
                self.check_place(),
                self.report_lanes()
            )
        };
        let tasks = async {
            tokio::select! {
                _ = ends.wait_for(|stops| *stops) => {}
                _ = tasks => {}
            }
        };
        tokio::join!(inflow, tasks);
    }

    async fn close(&self) {
        if let Err(e) = self.0.keeper.store_all().await {
            tracing::warn!(error = %e, "what was delivered last cannot be recorded, and will be delivered again");
        }
        self.store().close().await;
    }

    async fn open(
        &self,
        subscriber: &Subscriber,
        window: Window,
    ) -> Result<(Source, Settler), QueueError> {
        let (source, settler) = consumer::open(self, subscriber, window).await?;
        self.lanes().insert(subscriber.name.clone(), settler.lane());
        Ok((source, settler))
    }

    async fn history(&self, start: HistoryStart) -> Result<History, QueueError> {
        Ok(History::open(self, &start))
    }

    async fn begin(&self, subscriber: &SubscriberName) -> Result<Begin, QueueError> {
        let TakenTo::Event(taken) = self.0.history_position.get() else { return Ok(Begin::Waits) };
        let name = subscriber.clone();
        self.store().read(move |db| history::begin(db, &name, taken)).await
    }

    fn keep_for_replays(&self, floor: ReplayFloor) {
        *self.0.replay_floor.lock().unwrap_or_else(PoisonError::into_inner) = Some(floor);
    }

    async fn writable(&self) {
        let mut waits = Backoff::new(Duration::from_millis(200), Duration::from_secs(10));
        // A page is written and dropped, which a full disk refuses.
        let probe = |db: &Connection| {
            db.execute_batch("CREATE TABLE probe (x); INSERT INTO probe VALUES (zeroblob(65536)); DROP TABLE probe")
        };
        while let Err(e) = self.store().write(probe).await {
            tracing::debug!(error = %e, "the embedded queue still refuses writes");
            tokio::time::sleep(waits.grow()).await;
        }
    }

    async fn ensure(&self, subscribers: &[Arc<Subscriber>]) -> Result<(), QueueError> {
        self.bind(subscribers, true).await.map(drop)
    }

    async fn publish(&self, events: Vec<NewEvent>) -> Result<Vec<Published>, QueueError> {
        self.insert(events, Vec::new()).await
    }

    fn is_reachable(&self) -> bool {
        !self.store().place().is_lost()
    }

    fn troubles(&self) -> watch::Receiver<Troubles> {
        let inflow = self.0.inflow.get();
        inflow.map_or_else(|| watch::Sender::default().subscribe(), |inflow| inflow.troubles())
    }

    fn is_behind(&self) -> bool {
        self.store().is_behind()
    }

    fn removals(&self) -> &Removals {
        &self.0.removals
    }

    fn pause_states(&self) -> watch::Receiver<Option<PauseStates>> {
        self.0.pause_states.subscribe()
    }

    async fn record(
        &self,
        subscriber: &SubscriberName,
        pause_state: PauseState,
    ) -> Result<(), QueueError> {
        let (name, stands) = (subscriber.clone(), pause_state.clone());
        self.store().write(move |db: &Connection| set_pause_state(db, &name, &stands)).await?;
        self.0.pause_states.send_modify(|all| {
            drop(Arc::make_mut(all.get_or_insert_default()).insert(subscriber.clone(), pause_state))
        });
        Ok(())
    }

    async fn dead_letters(&self, subscriber: &str) -> Result<DeadLetters, QueueError> {
        DeadLetters::of_subscriber(self.store().clone(), self.0.head.clone(), subscriber).await
    }

    async fn waiting(&self, subscriber: &str) -> Result<WaitingList, QueueError> {
        waiting::list(self, subscriber).await
    }

    async fn hasten(
        &self,
        subscriber: &str,
        ids: Option<BTreeSet<BatchId>>,
    ) -> Result<Hastened, QueueError> {
        waiting::hasten(self, subscriber, ids).await
    }

    async fn enqueue(
        &self,
        subscriber: &SubscriberName,
        batches: Vec<Batch>,
    ) -> Result<(), QueueError> {
        waiting::enqueue(self, subscriber, batches).await
    }

    async fn depths(&self, subscribers: &[Arc<Subscriber>]) -> Result<Depths, QueueError> {
        let place = self.store().place();
        // A failure is the keeper's to report: what is not stored counts as waiting.
        self.0.keeper.store_all().await.ok();
        // Before the database is read: messages settled meanwhile are not counted, and messages
        // taken meanwhile count as not taken.
        let unsettled: BTreeMap<SubscriberName, Unsettled> = self
            .lanes()
            .iter()
            .filter_map(|(name, lane)| Some((name.clone(), lane.held()?)))
            .collect();
        let read = move |db: &Connection| {
            // One snapshot: a batch that fails meanwhile is among the events or among the retries.
            let db = db.unchecked_transaction()?;
            place.check().map_or_else(
                || Ok(Ok((depths(&db, &unsettled)?, orphans(&db)?))),
                |lost| Ok(Err(lost)),
            )
        };
        // A failure is reported as the queue's: status and log say the same.
        let found = self.store().read_long(read).await?;
        let (mut found, orphans) = found.map_err(QueueError::needs_operator)?;
        let (mut configured, mut removed) = (BTreeMap::new(), BTreeMap::new());
        for s in subscribers {
            configured.insert(s.name.clone(), found.remove(&s.name).unwrap_or_default());
        }
        removed.extend(found.into_iter().filter(|(_, depth)| !depth.is_empty()));
        Ok(Depths { subscribers: configured, removed, delayed: None, orphans, history: None })
    }

    async fn progress(
        &self,
        subscribers: &[SubscriberName],
        event: EventNumber,
    ) -> Result<Vec<Progress>, QueueError> {
        self.0.keeper.store_all().await.ok(); // what is not stored waits
        let names = subscribers.to_vec();
        self.store().read_long(move |db| progress(db, &names, event.0)).await
    }

    async fn has_batch(
        &self,
        subscriber: &SubscriberName,
        id: &BatchId,
    ) -> Result<Option<bool>, QueueError> {
        let (name, id) = (subscriber.clone(), id.clone());
        let has = move |db: &Connection| {
            db.prepare_cached(
                "SELECT EXISTS (SELECT 1 FROM retry WHERE subscriber = ?1 AND batch_id = ?2)",
            )?
            .query_row(params![name, id.as_str()], |r| r.get(0))
        };
        self.store().read(has).await.map(Some)
    }

    async fn bound(&self) -> Result<BTreeSet<SubscriberName>, QueueError> {
        let open = |db: &Connection| {
            let mut query =
                db.prepare("SELECT DISTINCT subscriber FROM segment WHERE upto IS NULL")?;
            query.query_map([], |r| r.get(0))?.collect()
        };
        self.store().read(open).await
    }

    async fn prune(
        &self,
        subscriber: &SubscriberName,
        with_events: bool,
    ) -> Result<(), QueueError> {
        let name = subscriber.clone();
        let delete = move |db: &Connection| {
            let open: bool = db.query_row(
                "SELECT EXISTS (SELECT 1 FROM segment WHERE subscriber = ?1 AND upto IS NULL)",
                [&name],
                |r| r.get(0),
            )?;
            // In the same transaction: newer messages are counted.
            let full = !with_events && !backlog::is_empty(db, &name)?;
            if open || full {
                return Ok(if open { Pruned::StillOpen } else { Pruned::Full });
            }
            {
                for table in ["segment", "ahead", "retry", "dead", "standing", "tenancy"] {
                    db.execute(&format!("DELETE FROM {table} WHERE subscriber = ?1"), [&name])?;
                }
            }
            Ok(Pruned::Done)
        };
        match self.store().write(delete).await? {
            Pruned::Done => Ok(()),
            Pruned::Full => Err(QueueError::new(format!(
                "`{subscriber}` has messages by now; nothing was deleted"
            ))),
            Pruned::StillOpen => Err(QueueError::new(format!(
                "`{subscriber}` still gets events; take it out of the configuration, and start or reload the daemon once with that"
            ))),
        }
    }

    async fn inspect(&self, subscribers: &[Arc<Subscriber>]) -> Result<Vec<Finding>, QueueError> {
        let mut findings = doctor::inspect(self, subscribers).await;
        if let Some(inflow) = self.0.inflow.get() {
            findings.extend(inflow.inspect().await);
        }
        Ok(findings)
    }
}

/// The result of deleting a subscriber.
enum Pruned {
    Done,
    /// It has messages.
    Full,
    /// It is configured.
    StillOpen,
}

fn pause_states(db: &Connection) -> rusqlite::Result<BTreeMap<SubscriberName, PauseState>> {
    let mut query =
        db.prepare_cached("SELECT subscriber, why, by, since, resumed_at FROM standing")?;
    let rows = query.query_map([], |r| {
        let pause_state = match r.get::<_, Option<i64>>(4)? {
            Some(at) => PauseState::Resumed { at: from_millis(at) },
            None => PauseState::Paused(Pause {
                why: r.get(1)?,
                by: r.get(2)?,
                since: from_millis(r.get(3)?),
            }),
        };
        Ok((r.get(0)?, pause_state))
    })?;
    rows.collect()
}

fn set_pause_state(
    db: &Connection,
    subscriber: &str,
    pause_state: &PauseState,
) -> rusqlite::Result<()> {
    let mut set =
        db.prepare_cached("INSERT OR REPLACE INTO standing (subscriber, why, by, since, resumed_at) VALUES (?1, ?2, ?3, ?4, ?5)")?;
    let none = None::<i64>;
    match pause_state {
        PauseState::Paused(Pause { why, by, since }) => {
            set.execute(params![subscriber, why, by, millis(*since), none])?
        }
        PauseState::Resumed { at } => {
            set.execute(params![subscriber, none, none, none, millis(*at)])?
        }
    };
    Ok(())
}

fn millis(at: SystemTime) -> i64 {
    let since = at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

fn from_millis(millis: i64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_millis(u64::try_from(millis).unwrap_or(0))
}

/// Patterns as a JSON array: they may have any character.
fn patterns_text(patterns: &[Pattern]) -> String {
    serde_json::Value::from(patterns.iter().map(Pattern::as_str).collect::<Vec<_>>()).to_string()
}

fn parse_patterns(text: &str) -> Vec<Pattern> {
    let texts: Vec<String> = serde_json::from_str(text).unwrap_or_default();
    texts.iter().filter_map(|p| Pattern::try_new(p).ok()).collect()
}

/// The number of the newest event, deleted ones included.
fn newest(db: &Connection) -> rusqlite::Result<i64> {
    let seq = db
        .query_row("SELECT seq FROM sqlite_sequence WHERE name = 'event'", [], |r| r.get(0))
        .optional()?;
    Ok(seq.unwrap_or(0))
}

/// What a configured subscriber is to get.
struct Wanted {
    name: SubscriberName,
    tenant: Option<Tenant>,
    patterns: String,
}

impl Wanted {
    fn of(subscriber: &Subscriber) -> Self {
        Self {
            name: subscriber.name.clone(),
            tenant: subscriber.tenant.clone(),
            patterns: patterns_text(&subscriber.events),
        }
    }
}

/// What has changed of the segments, for the log.
#[derive(Default)]
struct Synced {
    changes: Vec<String>,
    /// Subscribers whose segments stay as they are, and why.
    refused: Vec<(SubscriberName, String)>,
}

/// Without `removals` only missing segments are added.
fn sync_segments(
    db: &Connection,
    wanted: &[Wanted],
    removals: Option<&Removals>,
) -> rusqlite::Result<Synced> {
    let newest = newest(db)?;
    let open: BTreeMap<SubscriberName, (i64, String)> = db
        .prepare("SELECT id, subscriber, patterns FROM segment WHERE upto IS NULL")?
        .query_map([], |r| Ok((r.get(1)?, (r.get(0)?, r.get(2)?))))?
        .collect::<rusqlite::Result<_>>()?;
    let mut synced = Synced::default();
    for Wanted { name, tenant, patterns } in wanted {
        let old = open.get(name);
        if let Err(recorded) = keep_tenant(db, name, tenant.as_ref(), old.is_some())? {
            let why = other_tenant(name, recorded.as_ref(), tenant.as_ref());
            synced.refused.push((name.clone(), why));
            continue;
        }
        match old {
            Some((_, old)) if old == patterns || removals.is_none() => continue,
            Some((id, old)) => {
                end_segment(db, *id, name, &parse_patterns(old), newest)?;
                synced.changes.push(format!(
                    "subscriber `{name}`: its patterns have changed, for events from now on"
                ));
            }
            None => {}
        }
        db.execute(
            "INSERT INTO segment (subscriber, patterns, after, begun) VALUES (?1, ?2, ?3, ?3)",
            params![name, patterns, newest],
        )?;
    }
    if let Some(removals) = removals {
        let wanted: BTreeSet<SubscriberName> = wanted.iter().map(|w| w.name.clone()).collect();
        removals.judge(&open.keys().cloned().collect(), &wanted);
        let gone = |name: &SubscriberName| !wanted.contains(name) && removals.may_unbind(name);
        for (name, (id, patterns)) in open.iter().filter(|(name, _)| gone(name)) {
            end_segment(db, *id, name, &parse_patterns(patterns), newest)?;
            synced.changes.push(format!("subscriber `{name}` is not configured any more and gets no more events; its backlog stays"));
        }
        // Names come and go for years.
        db.execute(
            "DELETE FROM tenancy WHERE NOT EXISTS (SELECT 1 FROM segment s WHERE s.subscriber = tenancy.subscriber) \
             AND NOT EXISTS (SELECT 1 FROM retry r WHERE r.subscriber = tenancy.subscriber) \
             AND NOT EXISTS (SELECT 1 FROM dead d WHERE d.subscriber = tenancy.subscriber)",
            [],
        )?;
    }
    Ok(synced)
}

/// Records the tenant of a subscriber.
///
/// # Errors
/// It has another one, and something is left of that: that one.
fn keep_tenant(
    db: &Connection,
    subscriber: &SubscriberName,
    tenant: Option<&Tenant>,
    is_bound: bool,
) -> rusqlite::Result<Result<(), Option<Tenant>>> {
    let recorded = tenant_of(db, subscriber)?;
    if recorded.as_ref() == tenant {
        return Ok(Ok(()));
    }
    if is_bound || !backlog::is_empty(db, subscriber)? {
        return Ok(Err(recorded));
    }
    match tenant {
        Some(tenant) => db
            .prepare_cached("INSERT OR REPLACE INTO tenancy (subscriber, tenant) VALUES (?1, ?2)")?
            .execute(params![subscriber, tenant])?,
        None => {
            db.prepare_cached("DELETE FROM tenancy WHERE subscriber = ?1")?.execute([subscriber])?
        }
    };
    Ok(Ok(()))
}

/// What is wrong with a subscriber whose tenant was another one.
fn other_tenant(
    subscriber: &SubscriberName,
    recorded: Option<&Tenant>,
    configured: Option<&Tenant>,
) -> String {
    let text = |tenant: Option<&Tenant>| {
        tenant.map_or_else(|| "no tenant".to_owned(), |tenant| format!("the tenant `{tenant}`"))
    };
    format!(
        "subscriber `{subscriber}` is configured with {}, and what the queue has of it is from when it had {}; a name keeps its tenant: \
         give the subscriber another name, or its old tenant again and restart the daemon, or purge what is left of it; nothing of it was \
         changed, and it gets nothing meanwhile",
        text(configured),
        text(recorded)
    )
}

/// Shortens a segment to its undelivered events: others must not be kept for it.
fn end_segment(
    db: &Connection,
    id: i64,
    subscriber: &str,
    patterns: &[Pattern],
    newest: i64,
) -> rusqlite::Result<()> {
    let tenant = tenant_of(db, subscriber)?;
    let filter = Filter { subscriber, tenant: tenant.as_ref(), patterns };
    let after: i64 = db.query_row("SELECT after FROM segment WHERE id = ?1", [id], |r| r.get(0))?;
    let mut first = None;
    each_waiting(db, &filter, after, newest, |seq| {
        first = Some(seq);
        false
    })?;
    match first {
        Some(seq) => db.execute(
            "UPDATE segment SET after = ?2, upto = ?3 WHERE id = ?1",
            params![id, seq - 1, newest],
        )?,
        None => db.execute("DELETE FROM segment WHERE id = ?1", [id])?,
    };
    Ok(())
}

/// Calls `found` with the number of each undelivered event of a segment, until that returns false.
fn each_waiting(
    db: &Connection,
    filter: &Filter<'_>,
    after: i64,
    upto: i64,
    mut found: impl FnMut(i64) -> bool,
) -> rusqlite::Result<()> {
    let ahead = consumer::ahead(db, filter.subscriber)?;
    let mut query = db.prepare_cached(&filter.select("seq, type, only_for"))?;
    let mut rows = filter.query(&mut query, after, upto)?;
    while let Some(row) = rows.next()? {
        let seq = row.get(0)?;
        let waits = filter.wants(&filter.addressed(row)?);
        if waits && !ahead.iter().any(|run| run.contains(&seq)) && !found(seq) {
            break;
        }
    }
    Ok(())
}

/// How far each of the subscribers has come with an event.
fn progress(
    db: &Connection,
    subscribers: &[SubscriberName],
    event: i64,
) -> rusqlite::Result<Vec<Progress>> {
    let row = db
        .prepare_cached("SELECT type, only_for, tenant FROM event WHERE seq = ?1")?
        .query_row([event], |r| Ok((r.get::<_, String>(0)?, r.get(1)?, r.get(2)?)))
        .optional()?;
    let Some((event_type, only_for, tenant)) = row else {
        return Ok(vec![Progress::Passed; subscribers.len()]);
    };
    let (only_for, tenant): (Option<String>, Option<String>) = (only_for, tenant);
    let addressed = Addressed {
        event_type: &event_type,
        only_for: only_for.as_deref(),
        tenant: tenant.as_deref(),
    };
    let mut segments = db.prepare_cached(
        "SELECT patterns FROM segment WHERE subscriber = ?1 AND after < ?2 AND coalesce(upto, ?2) >= ?2",
    )?;
    let mut of_one = |name: &SubscriberName| {
        let mut rows = segments.query(params![name, event])?;
        let tenant = tenant_of(db, name)?;
        while let Some(row) = rows.next()? {
            let patterns = parse_patterns(row.get_ref(0)?.as_str()?);
            let filter = Filter { subscriber: name, tenant: tenant.as_ref(), patterns: &patterns };
            if filter.wants(&addressed) {
                let is_settled = consumer::ahead(db, name)?.iter().any(|run| run.contains(&event));
                return Ok(if is_settled { Progress::Passed } else { Progress::Waits });
            }
        }
        Ok(Progress::Passed)
    };
    subscribers.iter().map(&mut of_one).collect()
}

/// What decides whom an event is for.
#[derive(Debug, Clone, Copy)]
struct Addressed<'e> {
    event_type: &'e str,
    /// The only subscriber that it is for.
    only_for: Option<&'e str>,
    tenant: Option<&'e str>,
}

impl<'e> Addressed<'e> {
    /// Reads a row whose columns from the second on are `type, only_for`.
    fn read(row: &'e Row<'_>, tenant: Option<&'e str>) -> rusqlite::Result<Self> {
        Ok(Self {
            event_type: row.get_ref(1)?.as_str()?,
            only_for: row.get_ref(2)?.as_str_or_null()?,
            tenant,
        })
    }

    /// Whether a subscriber of this tenant may get it; without one it gets those of all.
    fn is_of(&self, tenant: Option<&Tenant>) -> bool {
        tenant.is_none_or(|tenant| self.tenant == Some(tenant.as_str()))
    }

    fn matches(&self, patterns: &[Pattern]) -> bool {
        patterns.iter().any(|pattern| pattern.matches(self.event_type))
    }
}

/// What a segment takes of the log.
#[derive(Debug, Clone, Copy)]
struct Filter<'s> {
    subscriber: &'s str,
    tenant: Option<&'s Tenant>,
    patterns: &'s [Pattern],
}

impl<'s> Filter<'s> {
    /// The statement that reads these columns after one number and up to another, in their order. By an
    /// index where it is for one tenant; the tenants of others are not read, since they are stored
    /// behind the bodies.
    fn select(&self, columns: &str) -> String {
        let of_tenant = self.tenant.map_or("", |_| " AND tenant = ?3");
        format!("SELECT {columns} FROM event WHERE seq > ?1 AND seq <= ?2{of_tenant} ORDER BY seq")
    }

    fn query<'q>(
        &self,
        select: &'q mut Statement<'_>,
        after: i64,
        upto: i64,
    ) -> rusqlite::Result<Rows<'q>> {
        match self.tenant {
            Some(tenant) => select.query(params![after, upto, tenant]),
            None => select.query(params![after, upto]),
        }
    }

    /// Whom a row is for that its statement has found.
    fn addressed<'e>(&self, row: &'e Row<'_>) -> rusqlite::Result<Addressed<'e>>
    where
        's: 'e,
    {
        Addressed::read(row, self.tenant.map(Tenant::as_str))
    }

    fn wants(&self, event: &Addressed<'_>) -> bool {
        match event.only_for {
            Some(only) => only == self.subscriber,
            None => event.is_of(self.tenant) && event.matches(self.patterns),
        }
    }
}

/// The tenant of a subscriber, as it was recorded.
fn tenant_of(db: &Connection, subscriber: &str) -> rusqlite::Result<Option<Tenant>> {
    db.prepare_cached("SELECT tenant FROM tenancy WHERE subscriber = ?1")?
        .query_row([subscriber], |r| r.get(0))
        .optional()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        clock,
        config::testing,
        delivery::{AttemptLog, DeadLetter, Failure, Print, Prints, Reason},
        event::payload::Format,
        queue::{DeadLetters as _, Receipt, Settlement, Settler as _, Source as _, Taken},
    };

    pub(super) const WINDOW: Window = Window { events: 1000, envelopes: 10 };

    pub(super) fn config(dir: &tempfile::TempDir, retention: Duration) -> EmbeddedConfig {
        EmbeddedConfig {
            data_dir: dir.path().to_owned(),
            retention,
            history: None,
            tenant: None,
            tenants_required: false,
        }
    }

    pub(super) fn subscribers(of: &[(&str, &str)]) -> Subscribers {
        let table = |(name, pattern): &(&str, &str)| {
            testing::table(name, &format!("events = [\"{pattern}\"]"))
        };
        testing::embedded(&of.iter().map(table).collect::<String>()).subscribers
    }

    pub(super) async fn publish(
        queue: &EmbeddedQueue,
        event_type: &str,
        count: usize,
    ) -> Vec<Published> {
        let event = NewEvent {
            event_type: event_type.to_owned(),
            message_id: None,
            body: format!("{{\"event\":\"{event_type}\"}}").into(),
            traceparent: None,
            tenant: None,
        };
        queue.publish(vec![event; count]).await.expect("publishes")
    }

    /// A batch of one event.
    pub(super) fn batch(id: &str) -> Batch {
        Batch {
            id: id.into(),
            body: "{\"events\":[{}]}".into(),
            format: Format::Json,
            events: 1,
            attempts: 0,
            first_attempt_at: None,
            traceparent: None,
            attempt_log: AttemptLog::default(),
            prints: None,
            replay: false,
        }
    }

    /// Takes what arrives within a moment.
    pub(super) async fn take(source: &mut Source) -> Vec<Receipt> {
        let mut taken = Vec::new();
        tokio::time::timeout(Duration::from_millis(300), source.take(&mut taken, 100)).await.ok();
        let receipt = |t: &Taken| match t {
            Taken::Event(e) => e.receipt,
            Taken::Batch(_, receipt)
            | Taken::Unusable(_, receipt)
            | Taken::AlreadySettled { receipt, .. } => *receipt,
        };
        taken.iter().map(receipt).collect()
    }

    /// Configures as a reload does, before it gives the queue other subscribers.
    fn configure(queue: &EmbeddedQueue, subscribers: &[Arc<Subscriber>]) {
        queue.removals().configure(subscribers.iter().map(|s| s.name.clone()).collect(), true);
    }

    pub(super) async fn stored(queue: &EmbeddedQueue) -> u32 {
        queue
            .store()
            .read(|db| db.query_row("SELECT count(*) FROM event", [], |r| r.get(0)))
            .await
            .expect("counts")
    }

    /// Subscribers of all events, each with its tenant; empty: none.
    fn of_tenants(of: &[(&str, &str)]) -> Subscribers {
        let names: Vec<(&str, &str)> = of.iter().map(|(name, _)| (*name, "#")).collect();
        let with_tenant = |(s, (_, tenant)): (&Arc<Subscriber>, &(&str, &str))| {
            Arc::new(Subscriber { tenant: Tenant::try_new(tenant), ..Subscriber::clone(s) })
        };
        subscribers(&names).iter().zip(of).map(with_tenant).collect()
    }

    async fn publish_of(queue: &EmbeddedQueue, tenants: &[&str]) -> Vec<Published> {
        let event = |tenant: &&str| NewEvent {
            event_type: "x".to_owned(),
            message_id: Some(clock::event_id()),
            body: "{\"event\":\"x\"}".into(),
            traceparent: None,
            tenant: Tenant::try_new(tenant),
        };
        queue.publish(tenants.iter().map(event).collect()).await.expect("publishes")
    }

    #[tokio::test]
    async fn a_subscriber_of_a_tenant_finds_its_events_without_those_of_others_on_its_way() {
        let dir = tempfile::tempdir().expect("a directory");
        let all = of_tenants(&[("a", "A"), ("b", "B"), ("all", "")]);
        let (queue, _stop) = head::tests::running(&dir, &all);
        queue.0.head.holds_at_most(0);
        queue.prepare(&all).await.expect("prepares");
        // One of A's in each 1,000, more than one query reads.
        let mut expected: BTreeMap<&str, Vec<u64>> = BTreeMap::new();
        for part in 0..4 {
            let mut tenants = vec!["B"; 999];
            tenants.insert(500, "A");
            publish_of(&queue, &tenants).await;
            expected.entry("A").or_default().push(part * 1000 + 501);
        }
        assert_eq!(publish_of(&queue, &["a", "", "A "]).await, [Published::Stored; 3]);
        let (mut source, settler) = queue.open(&all[0], WINDOW).await.expect("opens");
        let mut seen = Vec::new();
        while seen.len() < 4 {
            let receipts = head::tests::take(&mut source).await;
            seen.extend(receipts.iter().map(|r| r.tag));
            head::tests::settle(&settler, receipts).await;
        }
        assert_eq!(seen, expected["A"]);
        assert_eq!(take(&mut source).await, [], "of no other tenant, and of none");
        assert_eq!(queue.0.head.passes(), 0, "nothing was read for it that is not its own");
        publish_of(&queue, &["B", "A"]).await;
        let receipts = head::tests::take(&mut source).await;
        assert_eq!(receipts.iter().map(|r| r.tag).collect::<Vec<_>>(), [4005], "of the ring");
        let depths = queue.depths(&all).await.expect("counts");
        let events = |name: &str| depths.subscribers[name].events;
        assert_eq!((events("a"), events("b"), events("all")), (0, 3997, 4005));
    }

    #[tokio::test]
    async fn only_the_subscribers_of_its_tenant_and_of_all_get_an_event() {
        let dir = tempfile::tempdir().expect("a directory");
        let queue =
            EmbeddedQueue::for_daemon(&config(&dir, Duration::from_secs(3600))).expect("opens");
        let all = of_tenants(&[("a", "A"), ("b", "B")]);
        queue.prepare(&all).await.expect("prepares");
        use Published::{Stored, Unmatched};
        let published = publish_of(&queue, &["A", "B", "C", "", "a"]).await;
        assert_eq!(published, [Stored, Stored, Unmatched, Unmatched, Unmatched]);
        for (subscriber, tag) in all.iter().zip([1, 2]) {
            let (mut source, _settler) = queue.open(subscriber, WINDOW).await.expect("opens");
            let tags: Vec<u64> = take(&mut source).await.iter().map(|r| r.tag).collect();
            assert_eq!(tags, [tag], "{}", subscriber.name);
        }
    }

    #[tokio::test]
    async fn a_name_keeps_its_tenant_until_nothing_is_left_of_it() {
        let dir = tempfile::tempdir().expect("a directory");
        let queue =
            EmbeddedQueue::for_daemon(&config(&dir, Duration::from_secs(3600))).expect("opens");
        let with = |tenant: &str| of_tenants(&[("a", tenant), ("other", "")]);
        let events = async |n: u64| {
            let depths = queue.depths(&with("")).await.expect("counts");
            assert_eq!(depths.subscribers["a"].events, n);
        };
        queue.prepare(&with("A")).await.expect("prepares");
        publish_of(&queue, &["A", "B"]).await;
        for another in ["B", ""] {
            let others = with(another);
            queue.prepare(&others).await.expect("others go on");
            let refused = queue.open(&others[0], WINDOW).await.expect_err("is another's");
            assert!(refused.is_for_operator(), "{refused}");
            assert!(refused.to_string().contains("the tenant `A`"), "{refused}");
            publish_of(&queue, &["B"]).await;
            events(1).await;
        }
        // Removed, and its backlog is still there.
        let none = of_tenants(&[("other", "")]);
        configure(&queue, &none);
        queue.prepare(&none).await.expect("prepares");
        configure(&queue, &with("B"));
        queue.prepare(&with("B")).await.expect("prepares");
        queue.open(&with("B")[0], WINDOW).await.expect_err("is still another's");
        publish_of(&queue, &["B"]).await;
        events(1).await;
        configure(&queue, &none);
        queue.prepare(&none).await.expect("prepares");
        queue.prune(&"a".into(), true).await.expect("prunes");
        configure(&queue, &with("B"));
        queue.prepare(&with("B")).await.expect("prepares");
        publish_of(&queue, &["A", "B", "B"]).await;
        events(2).await;
        queue.open(&with("B")[0], WINDOW).await.expect("opens");
    }

    #[tokio::test]
    async fn nothing_is_kept_of_the_tenant_of_a_name_of_which_nothing_is_left() {
        let dir = tempfile::tempdir().expect("a directory");
        let queue =
            EmbeddedQueue::for_daemon(&config(&dir, Duration::from_secs(3600))).expect("opens");
        let recorded = async || {
            let names = "SELECT coalesce(group_concat(subscriber, ' '), '') FROM tenancy";
            let names = |db: &Connection| db.query_row(names, [], |r| r.get::<_, String>(0));
            queue.store().read(names).await.expect("reads")
        };
        queue.prepare(&of_tenants(&[("drained", "A"), ("behind", "B")])).await.expect("prepares");
        publish_of(&queue, &["B"]).await;
        assert_eq!(recorded().await, "behind drained");
        let none = of_tenants(&[("other", "")]);
        configure(&queue, &none);
        queue.prepare(&none).await.expect("prepares");
        assert_eq!(recorded().await, "behind", "it has a backlog");
        queue.prune(&"behind".into(), true).await.expect("prunes");
        assert_eq!(recorded().await, "");
    }

    #[tokio::test]
    async fn a_tenants_lane_whose_bytes_are_used_up_waits_until_some_are_settled() {
        let dir = tempfile::tempdir().expect("a directory");
        let all = of_tenants(&[("a", "A")]);
        let (queue, _stop) = head::tests::running(&dir, &all);
        queue.0.head.holds_at_most(0);
        queue.prepare(&all).await.expect("prepares");
        let large = || NewEvent {
            event_type: "x".to_owned(),
            message_id: None,
            body: vec![b'x'; 4 << 20].into(),
            traceparent: None,
            tenant: Tenant::try_new("A"),
        };
        for _ in 0..20 {
            queue.publish(vec![large()]).await.expect("publishes");
        }
        let (mut source, settler) = queue.open(&all[0], WINDOW).await.expect("opens");
        let mut receipts = Vec::new();
        while receipts.len() < 16 {
            receipts.extend(head::tests::take(&mut source).await);
        }
        assert_eq!(receipts.len(), 16);
        let (mut none, mut polls) = (Vec::new(), 0);
        let waits = async {
            let mut taking = std::pin::pin!(source.take(&mut none, 100));
            std::future::poll_fn(|context| {
                polls += 1;
                taking.as_mut().poll(context)
            })
            .await
        };
        tokio::time::timeout(Duration::from_millis(500), waits).await.expect_err("it waits");
        assert!(none.is_empty() && polls < 50, "{polls} looks within a moment");
        head::tests::settle(&settler, receipts).await;
        assert!(!head::tests::take(&mut source).await.is_empty());
    }

    #[tokio::test]
    async fn a_name_that_was_refused_gets_its_events_as_soon_as_nothing_is_left_of_its_other_tenant()
     {
        let dir = tempfile::tempdir().expect("a directory");
        let (of_a, of_b) = (of_tenants(&[("a", "A")]), of_tenants(&[("a", "B")]));
        let queue =
            EmbeddedQueue::for_daemon(&config(&dir, Duration::from_secs(3600))).expect("opens");
        queue.prepare(&of_a).await.expect("prepares");
        publish_of(&queue, &["A"]).await;
        let none = of_tenants(&[]);
        configure(&queue, &none);
        queue.prepare(&none).await.expect("prepares");
        configure(&queue, &of_b);
        let refused = queue.prepare(&of_b).await.expect("prepares");
        assert_eq!(refused, ["a".into()].into());
        let (_configured, current) = watch::channel(of_b.clone());
        let binding = queue.clone();
        tokio::spawn(async move { binding.bind_again(current).await });
        queue.open(&of_b[0], WINDOW).await.expect_err("is another's");
        let (mut source, settler) = queue.open(&of_a[0], WINDOW).await.expect("opens");
        let receipts = take(&mut source).await;
        settler.settle(receipts, Settlement::Delivered).await.expect("settles");
        queue.0.keeper.store_all().await.expect("writes");
        drop(source);
        let bound = async {
            while queue.open(&of_b[0], WINDOW).await.is_err() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), bound).await.expect("is bound");
        assert_eq!(
            publish_of(&queue, &["B", "A"]).await,
            [Published::Stored, Published::Unmatched]
        );
    }

    #[tokio::test]
    async fn a_dead_event_of_a_tenants_subscriber_comes_back_to_it_alone() {
        let dir = tempfile::tempdir().expect("a directory");
        let queue =
            EmbeddedQueue::for_daemon(&config(&dir, Duration::from_secs(3600))).expect("opens");
        let all = of_tenants(&[("a", "A"), ("a2", "A"), ("all", "")]);
        queue.prepare(&all).await.expect("prepares");
        publish_of(&queue, &["A"]).await;
        let (mut source, settler) = queue.open(&all[0], WINDOW).await.expect("opens");
        let receipts = take(&mut source).await;
        let letter = DeadLetter::of_event(
            "{\"event\":\"x\"}".into(),
            None,
            None,
            Reason::InvalidEvent,
            String::new(),
            clock::now(),
        );
        settler.settle(receipts, Settlement::Dead(vec![letter])).await.expect("settles");
        let mut walk = queue.dead_letters("a").await.expect("opens");
        let held = walk.next().await.expect("reads").expect("has one");
        walk.replay(vec![held]).await.expect("replays");
        walk.close().await.expect("closes");
        let tags: Vec<u64> = take(&mut source).await.iter().map(|r| r.tag).collect();
        assert_eq!(tags, [2]);
        for other in &all[1..] {
            let (mut source, _settler) = queue.open(other, WINDOW).await.expect("opens");
            let tags: Vec<u64> = take(&mut source).await.iter().map(|r| r.tag).collect();
            assert_eq!(tags, [1], "{}", other.name);
        }
    }

    #[tokio::test]
    async fn retention_deletes_what_all_are_done_with_and_nothing_else() {
        let dir = tempfile::tempdir().expect("a directory");
        let both = subscribers(&[("a", "#"), ("b", "x")]);
        let (a, b) = (both[0].clone(), both[1].clone());
        {
            let patient =
                EmbeddedQueue::for_daemon(&config(&dir, Duration::from_secs(3600))).expect("opens");
            patient.prepare(&both).await.expect("prepares");
            publish(&patient, "x", 10).await;
            let (mut source, settler) = patient.open(&a, WINDOW).await.expect("opens");
            let receipts = take(&mut source).await;
            assert_eq!(receipts.len(), 10);
            settler.settle(receipts, Settlement::Delivered).await.expect("settles");
            patient.trim().await.expect("trims");
            assert_eq!(stored(&patient).await, 10, "not older than the retention");
        }
        let queue = EmbeddedQueue::for_publishing(&config(&dir, Duration::ZERO)).expect("opens");
        tokio::time::sleep(Duration::from_millis(5)).await;
        queue.trim().await.expect("trims");
        assert_eq!(stored(&queue).await, 10, "the other one has not got them");
        let (mut source, settler) = queue.open(&b, WINDOW).await.expect("opens");
        let receipts = take(&mut source).await;
        settler.settle(receipts[..4].to_vec(), Settlement::Delivered).await.expect("settles");
        queue.trim().await.expect("trims");
        assert_eq!(stored(&queue).await, 6);
        settler.settle(receipts[4..].to_vec(), Settlement::Delivered).await.expect("settles");
        queue.trim().await.expect("trims");
        assert_eq!(stored(&queue).await, 0);
    }

    #[tokio::test]
    async fn how_far_many_are_with_an_event_is_told_in_their_order() {
        let dir = tempfile::tempdir().expect("a directory");
        let queue =
            EmbeddedQueue::for_daemon(&config(&dir, Duration::from_secs(3600))).expect("opens");
        let all = subscribers(&[("ahead", "x"), ("done", "x"), ("other", "y"), ("waits", "x")]);
        queue.prepare(&all).await.expect("prepares");
        publish(&queue, "x", 3).await;
        let change = "UPDATE segment SET after = 2 WHERE subscriber = 'done'; INSERT INTO ahead VALUES ('ahead', 2, 3)";
        queue.store().write(move |db| db.execute_batch(change)).await.expect("writes");
        let names = ["waits", "done", "unknown", "ahead", "other"].map(SubscriberName::from);
        use Progress::{Passed, Waits};
        for (event, expected) in [
            (1, [Waits, Passed, Passed, Waits, Passed]),
            (2, [Waits, Passed, Passed, Passed, Passed]),
            (3, [Waits, Waits, Passed, Passed, Passed]),
            (4, [Passed; 5]),
        ] {
            let found = queue.progress(&names, EventNumber(event)).await.expect("reads");
            assert_eq!(found, expected, "event {event}");
        }
    }

    #[tokio::test]
    async fn a_subscriber_that_is_gone_keeps_only_its_backlog() {
        let dir = tempfile::tempdir().expect("a directory");
        let queue = EmbeddedQueue::for_daemon(&config(&dir, Duration::ZERO)).expect("opens");
        let all = subscribers(&[("a", "#"), ("nothing", "y"), ("last", "z")]);
        queue.prepare(&all).await.expect("prepares");
        publish(&queue, "x", 5).await;
        publish(&queue, "z", 1).await;
        configure(&queue, &all[..1]);
        queue.prepare(&all[..1]).await.expect("prepares");
        let (mut source, settler) = queue.open(&all[0], WINDOW).await.expect("opens");
        let receipts = take(&mut source).await;
        settler.settle(receipts, Settlement::Delivered).await.expect("settles");
        tokio::time::sleep(Duration::from_millis(5)).await;
        queue.trim().await.expect("trims");
        assert_eq!(stored(&queue).await, 1, "that of `last`");
        let left = queue.store().read(|db| backlogs(db, &BTreeMap::new())).await.expect("counts");
        assert_eq!(left, [("a".into(), 0), ("last".into(), 1)]);
    }

    #[tokio::test]
    async fn a_long_running_producer_notices_that_patterns_have_changed() {
        let dir = tempfile::tempdir().expect("a directory");
        let config = config(&dir, Duration::ZERO);
        let producer = EmbeddedQueue::for_publishing(&config).expect("opens");
        producer.ensure(&subscribers(&[("a", "x")])).await.expect("makes ready");
        assert_eq!(publish(&producer, "y", 1).await, [Published::Unmatched]);
        let daemon = EmbeddedQueue::for_daemon(&config).expect("opens");
        daemon.prepare(&subscribers(&[("a", "y")])).await.expect("prepares");
        assert_eq!(publish(&producer, "y", 1).await, [Published::Stored]);
        assert_eq!(publish(&producer, "x", 1).await, [Published::Unmatched]);
    }

    #[tokio::test]
    async fn what_is_settled_out_of_order_does_not_come_again() {
        let dir = tempfile::tempdir().expect("a directory");
        let queue = EmbeddedQueue::for_daemon(&config(&dir, Duration::ZERO)).expect("opens");
        let a = subscribers(&[("a", "x")]);
        queue.prepare(&a).await.expect("prepares");
        for _ in 0..3 {
            publish(&queue, "x", 3).await;
            publish(&queue, "y", 2).await;
        }
        let mut expected: Vec<_> = Vec::new();
        for round in 0..4 {
            let (mut source, settler) = queue.open(&a[0], WINDOW).await.expect("opens");
            let receipts = take(&mut source).await;
            if round == 0 {
                expected.clone_from(&receipts);
                assert_eq!(expected.len(), 9);
            }
            assert_eq!(receipts, expected, "in round {round}");
            // The last and the middle one, never the first.
            for at in [expected.len() - 1, expected.len() / 2] {
                let receipt = expected.remove(at);
                settler.settle(vec![receipt], Settlement::Delivered).await.expect("settles");
            }
            let left =
                queue.store().read(|db| backlogs(db, &BTreeMap::new())).await.expect("counts");
            assert_eq!(left, [("a".into(), u32::try_from(expected.len()).expect("few"))]);
        }
        let (mut source, settler) = queue.open(&a[0], WINDOW).await.expect("opens");
        let last = take(&mut source).await;
        assert_eq!(last, expected);
        settler.settle(last, Settlement::Delivered).await.expect("settles");
        publish(&queue, "x", 1).await;
        let rows: u32 = queue
            .store()
            .read(|db| db.query_row("SELECT count(*) FROM ahead", [], |r| r.get(0)))
            .await
            .expect("counts");
        assert_eq!(rows, 0, "nothing is ahead of the cursor any more");
        let (mut source, _) = queue.open(&a[0], WINDOW).await.expect("opens");
        assert_eq!(take(&mut source).await.len(), 1);
    }

    #[tokio::test]
    async fn a_batch_keeps_its_prints_as_a_retry_and_as_a_dead_letter_if_they_are_not_too_many() {
        let dir = tempfile::tempdir().expect("a directory");
        let queue = EmbeddedQueue::for_daemon(&config(&dir, Duration::ZERO)).expect("opens");
        let a = subscribers(&[("a", "x")]);
        queue.prepare(&a).await.expect("prepares");
        let most = Print::MAX_STORED;
        for (printed, events, kept) in
            [(2, 2, true), (most, most, true), (most + 1, most + 1, false), (2, 3, false)]
        {
            let prints: Prints = Some(vec![Print::of(b"{}"); printed].into());
            let kept = prints.clone().filter(|_| kept);
            publish(&queue, "x", 1).await;
            let batch = Batch {
                events: events.try_into().expect("few"),
                attempts: 1,
                prints,
                ..batch("msg_1")
            };
            let (mut source, settler) = queue.open(&a[0], WINDOW).await.expect("opens");
            let receipts = take(&mut source).await;
            let retry = Settlement::Retry { batches: vec![batch.clone()], delay: Duration::ZERO };
            settler.settle(receipts, retry).await.expect("settles");
            let mut taken = Vec::new();
            source.take(&mut taken, 1).await.expect("takes");
            let Some(Taken::Batch(found, receipt)) = taken.pop() else { panic!("no retry") };
            assert_eq!(found, Batch { prints: kept.clone(), ..batch.clone() }, "{events}");
            let now = clock::now();
            let letter =
                DeadLetter::of_batch(batch, Reason::Exhausted, &Failure::Timeout, None, now);
            let dead = Settlement::Dead(vec![letter]);
            settler.settle(vec![receipt], dead).await.expect("settles");
            let mut letters = queue.dead_letters("a").await.expect("opens");
            let held = letters.next().await.expect("reads").expect("one");
            assert_eq!(held.letter.prints, kept, "{events}");
            letters.purge(vec![held]).await.expect("purges");
        }
    }

    /// A queue whose subscriber `a` has a dead letter of each size, each with its number as id.
    async fn with_letters(dir: &tempfile::TempDir, sizes: &[usize]) -> EmbeddedQueue {
        let queue = EmbeddedQueue::for_daemon(&config(dir, Duration::ZERO)).expect("opens");
        let a = subscribers(&[("a", "x")]);
        queue.prepare(&a).await.expect("prepares");
        publish(&queue, "x", 1).await;
        let (mut source, settler) = queue.open(&a[0], WINDOW).await.expect("opens");
        let receipts = take(&mut source).await;
        let letter = |(n, size): (usize, &usize)| {
            let (body, id) = (vec![b'x'; *size].into(), Some(n.to_string()));
            let now = clock::now();
            DeadLetter::of_event(body, None, id, Reason::InvalidEvent, String::new(), now)
        };
        let dead = Settlement::Dead(sizes.iter().enumerate().map(letter).collect());
        settler.settle(receipts, dead).await.expect("settles");
        queue
    }

    /// The ids of the letters that are left of a walk.
    async fn ids(mut walk: DeadLetters) -> Vec<usize> {
        let mut ids = Vec::new();
        while let Some(held) = walk.next().await.expect("reads") {
            ids.push(held.letter.id.expect("an id").parse().expect("a number"));
        }
        ids
    }

    #[tokio::test]
    async fn dead_letters_are_read_many_at_once_but_not_more_than_a_mebibyte() {
        let dir = tempfile::tempdir().expect("a directory");
        let queue = with_letters(&dir, &[10; 600]).await;
        assert_eq!(ids(queue.dead_letters("a").await.expect("opens")).await.len(), 600);
        // Those that were read are passed although another walk has purged them.
        let mut walk = queue.dead_letters("a").await.expect("opens");
        let first = walk.next().await.expect("reads").expect("one");
        purge_all(&queue).await;
        let second = walk.next().await.expect("reads").expect("another");
        assert_eq!(walk.left(), 598);
        // Each is replayed only if it is still there.
        let left = walk.replay(vec![first, second]).await.expect("replays");
        assert!(left.is_empty());
        assert_eq!(ids(walk).await, (2..256).collect::<Vec<_>>());
        let depths = queue.depths(&subscribers(&[("a", "x")])).await.expect("counts");
        assert!(depths.subscribers["a"].is_empty(), "{depths:?}");

        let large = tempfile::tempdir().expect("a directory");
        let queue = with_letters(&large, &[600_000; 5]).await;
        let mut walk = queue.dead_letters("a").await.expect("opens");
        walk.next().await.expect("reads").expect("one");
        purge_all(&queue).await;
        assert_eq!(ids(walk).await, [1]);
    }

    async fn purge_all(queue: &EmbeddedQueue) {
        let mut walk = queue.dead_letters("a").await.expect("opens");
        let mut letters = Vec::new();
        while let Some(held) = walk.next().await.expect("reads") {
            letters.push(held);
        }
        walk.purge(letters).await.expect("purges");
    }

    #[tokio::test]
    async fn an_enqueued_batch_is_taken_before_events_and_waits_once() {
        let dir = tempfile::tempdir().expect("a directory");
        let queue =
            EmbeddedQueue::for_daemon(&config(&dir, Duration::from_secs(60))).expect("opens");
        let subscribers = subscribers(&[("a", "x")]);
        queue.prepare(&subscribers).await.expect("prepares");
        publish(&queue, "x", 1).await;
        let batch = |id: &str| Batch { replay: true, ..batch(id) };
        let name = &subscribers[0].name;
        for batches in [vec![batch("msg_1"), batch("msg_2")], vec![batch("msg_1")]] {
            queue.enqueue(name, batches).await.expect("enqueues");
        }
        assert!(queue.enqueue(&"b".into(), vec![batch("msg_3")]).await.is_err(), "is unknown");
        let (mut source, _settler) = queue.open(&subscribers[0], WINDOW).await.expect("opens");
        let mut taken = Vec::new();
        while taken.len() < 3 {
            source.take(&mut taken, 10).await.expect("takes");
        }
        let ids: Vec<Option<Batch>> = taken
            .into_iter()
            .map(|taken| match taken {
                Taken::Batch(batch, _) => Some(batch),
                _ => None,
            })
            .collect();
        assert_eq!(ids, [Some(batch("msg_1")), Some(batch("msg_2")), None]);
    }

    #[tokio::test]
    async fn large_events_are_taken_a_few_at_a_time() {
        let dir = tempfile::tempdir().expect("a directory");
        let queue = EmbeddedQueue::for_daemon(&config(&dir, Duration::ZERO)).expect("opens");
        let a = subscribers(&[("a", "x")]);
        queue.prepare(&a).await.expect("prepares");
        // Of these 16 have more bytes than are taken of smaller ones, of which 64 fit.
        for (mib, count, most) in [(5, 20, 16), (1, 80, 64)] {
            let event = NewEvent {
                event_type: "x".to_owned(),
                message_id: None,
                body: vec![b'x'; mib << 20].into(),
                traceparent: None,
                tenant: None,
            };
            for _ in 0..count {
                queue.publish(vec![event.clone()]).await.expect("publishes");
            }
            let (mut source, settler) = queue.open(&a[0], WINDOW).await.expect("opens");
            let mut receipts = Vec::new();
            let mut take = async || {
                let mut taken = Vec::new();
                tokio::time::timeout(Duration::from_secs(30), source.take(&mut taken, 100))
                    .await
                    .expect("more comes")
                    .expect("takes");
                let receipt =
                    |t: &Taken| if let Taken::Event(e) = t { e.receipt } else { panic!("{t:?}") };
                (taken.iter().map(receipt).collect::<Vec<_>>(), source.is_full())
            };
            loop {
                let (taken, is_full) = take().await;
                receipts.extend(taken);
                if is_full && receipts.len() >= most {
                    break;
                }
            }
            assert_eq!(receipts.len(), most, "events of {mib} MiB");
            settler
                .settle(receipts.split_off(most - 2), Settlement::Delivered)
                .await
                .expect("settles");
            let (taken, is_full) = take().await;
            assert_eq!((taken.len(), is_full), (2, true), "for as many there is room");
            receipts.extend(taken);
            while !receipts.is_empty() {
                settler
                    .settle(std::mem::take(&mut receipts), Settlement::Delivered)
                    .await
                    .expect("settles");
                if queue.store().read(|db| backlogs(db, &BTreeMap::new())).await.expect("counts")
                    != [("a".into(), 0)]
                {
                    receipts.extend(take().await.0);
                }
            }
        }
    }

    #[tokio::test]
    async fn the_cursor_follows_what_is_for_nobody_here() {
        let dir = tempfile::tempdir().expect("a directory");
        let queue = EmbeddedQueue::for_daemon(&config(&dir, Duration::ZERO)).expect("opens");
        let both = subscribers(&[("a", "x"), ("b", "y")]);
        queue.prepare(&both).await.expect("prepares");
        publish(&queue, "y", 5).await;
        let (mut source, _settler) = queue.open(&both[0], WINDOW).await.expect("opens");
        let mut taken = Vec::new();
        tokio::time::timeout(Duration::from_secs(6), source.take(&mut taken, 100))
            .await
            .expect_err("nothing is for it");
        let after: i64 = queue
            .store()
            .read(|db| {
                db.query_row("SELECT after FROM segment WHERE subscriber = 'a'", [], |r| r.get(0))
            })
            .await
            .expect("a segment");
        assert_eq!(after, 5);
    }

    #[tokio::test]
    async fn of_two_pauses_at_once_neither_is_lost_whichever_is_heard_of_first() {
        let dir = tempfile::tempdir().expect("a directory");
        let queue = EmbeddedQueue::for_daemon(&config(&dir, Duration::ZERO)).expect("opens");
        queue.prepare(&subscribers(&[("a", "x"), ("b", "x")])).await.expect("prepares");
        // Both are written in one go, once both have been asked for.
        let (go_on, held) = std::sync::mpsc::channel::<()>();
        let store = queue.store().clone();
        let holding = tokio::spawn(async move { store.write(move |_| Ok(held.recv().ok())).await });
        let paused = |by: &str| {
            PauseState::Paused(Pause {
                why: "asked".to_owned(),
                since: SystemTime::UNIX_EPOCH,
                by: by.to_owned(),
            })
        };
        tokio::task::yield_now().await;
        let names = ["a", "b"].map(SubscriberName::from);
        let mut a = std::pin::pin!(queue.record(&names[0], paused("one")));
        let mut b = std::pin::pin!(queue.record(&names[1], paused("two")));
        tokio::select! {
            biased;
            _ = &mut a => panic!("it is held"),
            _ = &mut b => panic!("it is held"),
            () = std::future::ready(()) => {}
        }
        go_on.send(()).expect("it is held");
        holding.await.expect("does not panic").expect("writes");
        b.await.expect("is recorded");
        a.await.expect("is recorded");
        let known = queue.pause_states().borrow().clone().expect("known");
        assert_eq!(*known, [("a".into(), paused("one")), ("b".into(), paused("two"))].into());
        assert_eq!(queue.store().read(pause_states).await.expect("reads"), *known);
    }

    /// Whether a subscriber gets events that come now.
    async fn is_bound(queue: &EmbeddedQueue, subscriber: &'static str) -> bool {
        let open = "SELECT EXISTS (SELECT 1 FROM segment WHERE subscriber = ?1 AND upto IS NULL)";
        queue
            .store()
            .read(move |db| db.query_row(open, [subscriber], |r| r.get(0)))
            .await
            .expect("reads")
    }

    pub(super) async fn until(what: &str, mut condition: impl AsyncFnMut() -> bool) {
        let waiting = async {
            while !condition().await {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), waiting)
            .await
            .unwrap_or_else(|_| panic!("never: {what}"));
    }

    #[tokio::test]
    async fn who_was_removed_and_comes_back_is_bound_again_even_if_the_file_takes_nothing_at_first()
    {
        let dir = tempfile::tempdir().expect("a directory");
        let queue =
            EmbeddedQueue::for_daemon(&config(&dir, Duration::from_secs(3600))).expect("opens");
        let both = subscribers(&[("a", "x"), ("b", "x")]);
        queue.prepare(&both).await.expect("prepares");
        publish(&queue, "x", 2).await;
        // A change that was not prepared: that had taken too long.
        let configured = watch::Sender::new(both.clone());
        let (tasks, current) = (queue.clone(), configured.subscribe());
        let (_stop, stopping) = watch::channel(false);
        let tasks = tokio::spawn(async move { tasks.background(current, stopping).await });
        configure(&queue, &both[..1]);
        configured.send_replace(both[..1].into());
        until("b is unbound", async || !is_bound(&queue, "b").await).await;
        publish(&queue, "x", 3).await;
        let refuse = "CREATE TRIGGER refuse BEFORE INSERT ON segment BEGIN SELECT RAISE(ABORT, 'not now'); END";
        queue.store().write(|db| db.execute_batch(refuse)).await.expect("writes");
        let commits = queue.store().commits();
        let before = *commits.borrow();
        configure(&queue, &both);
        configured.send_replace(both.clone());
        // One may still be that of the trigger.
        until("it was tried", async || *commits.borrow() >= before + 2).await;
        assert!(!is_bound(&queue, "b").await);
        queue.store().write(|db| db.execute_batch("DROP TRIGGER refuse")).await.expect("writes");
        until("b is bound again", async || is_bound(&queue, "b").await).await;
        assert_eq!(publish(&queue, "x", 4).await, [Published::Stored; 4]);
        let (mut source, settler) = queue.open(&both[1], WINDOW).await.expect("opens");
        let mut receipts = take(&mut source).await;
        receipts.extend(take(&mut source).await);
        assert_eq!(receipts.len(), 6, "what had come before it was removed, and what comes now");
        settler.settle(receipts, Settlement::Delivered).await.expect("settles");
        queue.0.keeper.store_all().await.expect("writes");
        assert_eq!(
            queue.store().read(|db| backlogs(db, &BTreeMap::new())).await.expect("counts"),
            [("a".into(), 9), ("b".into(), 0)]
        );
        tasks.abort();
    }

    #[tokio::test]
    async fn unbinding_that_is_tried_again_spares_who_has_come_back_meanwhile() {
        let dir = tempfile::tempdir().expect("a directory");
        let queue =
            EmbeddedQueue::for_daemon(&config(&dir, Duration::from_secs(3600))).expect("opens");
        let both = subscribers(&[("a", "x"), ("b", "x")]);
        queue.prepare(&both).await.expect("prepares");
        publish(&queue, "x", 1).await;
        let segment = async || {
            let of_b = "SELECT id, upto FROM segment WHERE subscriber = 'b'";
            let read = |db: &Connection| {
                db.query_row(of_b, [], |r| {
                    Ok::<(i64, Option<i64>), rusqlite::Error>((r.get(0)?, r.get(1)?))
                })
            };
            queue.store().read(read).await.expect("reads")
        };
        let before = segment().await;
        let configured = watch::Sender::new(both.clone());
        let (tasks, current) = (queue.clone(), configured.subscribe());
        let (_stop, stopping) = watch::channel(false);
        let tasks = tokio::spawn(async move { tasks.background(current, stopping).await });
        let refuse = "CREATE TRIGGER refuse BEFORE UPDATE ON segment BEGIN SELECT RAISE(ABORT, 'not now'); END";
        queue.store().write(|db| db.execute_batch(refuse)).await.expect("writes");
        let commits = queue.store().commits();
        let commits_before = *commits.borrow();
        configure(&queue, &both[..1]);
        configured.send_replace(both[..1].into());
        // One may still be that of the trigger.
        until("it was tried", async || *commits.borrow() >= commits_before + 2).await;
        configure(&queue, &both);
        queue.prepare(&both).await.expect("it is bound still");
        configure(&queue, &both);
        configured.send_replace(both.clone());
        queue.store().write(|db| db.execute_batch("DROP TRIGGER refuse")).await.expect("writes");
        // One more, who is bound after what was still to be tried again.
        configured.send_replace(subscribers(&[("a", "x"), ("b", "x"), ("c", "x")]));
        until("another one is bound", async || is_bound(&queue, "c").await).await;
        assert_eq!(segment().await, before);
        tasks.abort();
    }

    #[tokio::test]
    async fn a_preparation_that_fails_has_changed_nothing() {
        let dir = tempfile::tempdir().expect("a directory");
        let queue =
            EmbeddedQueue::for_daemon(&config(&dir, Duration::from_secs(3600))).expect("opens");
        let both = subscribers(&[("a", "x"), ("b", "x")]);
        queue.prepare(&both).await.expect("prepares");
        let rename = async |from: &'static str, to: &'static str| {
            let rename = move |db: &Connection| {
                db.execute_batch(&format!("ALTER TABLE {from} RENAME TO {to}"))
            };
            queue.store().write(rename).await.expect("writes");
        };
        rename("standing", "hidden").await;
        configure(&queue, &both[..1]);
        queue.prepare(&both[..1]).await.expect_err("pauses are unknown");
        rename("hidden", "standing").await;
        publish(&queue, "x", 1).await;
        let (mut source, _settler) = queue.open(&both[1], WINDOW).await.expect("opens");
        assert_eq!(take(&mut source).await.len(), 1, "who was to be taken out still gets events");
    }

    #[tokio::test]
    async fn a_prune_that_refuses_changes_nothing() {
        let dir = tempfile::tempdir().expect("a directory");
        let queue =
            EmbeddedQueue::for_daemon(&config(&dir, Duration::from_secs(3600))).expect("opens");
        let both = subscribers(&[("a", "x"), ("b", "x")]);
        queue.prepare(&both).await.expect("prepares");
        publish(&queue, "x", 2).await;
        let paused = PauseState::Paused(Pause {
            why: "asked".to_owned(),
            since: SystemTime::UNIX_EPOCH,
            by: "operator".to_owned(),
        });
        queue.record(&"b".into(), paused.clone()).await.expect("is recorded");
        let everything = async || {
            let segments = "SELECT group_concat(subscriber || ' ' || patterns || ' ' || after || ' ' || coalesce(upto, '-')) FROM segment";
            let all = |db: &Connection| {
                Ok((
                    db.query_row(segments, [], |r| r.get::<_, String>(0))?,
                    backlogs(db, &BTreeMap::new())?,
                    pause_states(db)?,
                ))
            };
            queue.store().read(all).await.expect("reads")
        };
        let before = everything().await;
        let refused = async |with_events| {
            queue.prune(&"b".into(), with_events).await.expect_err("refuses").to_string()
        };
        assert!(refused(true).await.contains("still gets events"));
        assert_eq!(everything().await, before);
        configure(&queue, &both[..1]);
        queue.prepare(&both[..1]).await.expect("prepares");
        let before = everything().await;
        assert!(refused(false).await.contains("has messages by now"));
        assert_eq!(everything().await, before);
        queue.prepare(&both).await.expect("prepares");
        publish(&queue, "x", 1).await;
        let (mut source, _settler) = queue.open(&both[1], WINDOW).await.expect("opens");
        let taken = take(&mut source).await.len() + take(&mut source).await.len();
        assert_eq!(taken, 3, "it is as if no prune had been tried");
        assert_eq!(
            queue.pause_states().borrow().as_ref().and_then(|all| all.get("b").cloned()),
            Some(paused)
        );
    }
}

//! The state that the files of the queue share: connections, the publisher, and what this daemon
//! knows.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    panic::AssertUnwindSafe,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use futures_util::FutureExt as _;
use tokio::{
    sync::{Notify, watch},
    time::timeout_at,
};

use super::{
    connection::{Dialer, Role},
    history_mark::Marks,
    history_state::HistoryState,
    matching::Matching,
    pool::{Lease, Pool},
    prefetch::Sizes,
    publisher::Publisher,
    record::Patterns,
    redelivery::LostAcks,
    requests::Broker,
    topology::Topology,
};
use crate::{
    clock,
    config::{AmqpConfig, Subscriber},
    delivery::{PauseState, PauseStates, SubscriberName},
    event::Pattern,
    policy::retry::Backoff,
    queue::{QueueError, Removals},
    telemetry::{
        metrics::Metrics,
        outage::ReportedOutage,
        troubles::{Harms, Troubles},
    },
};

/// The broker counts a new consumer within this time. Until then another daemon's may be taken for
/// this one's own.
const COUNTED: Duration = Duration::from_secs(2);

/// The longest time for which events wait until the record is read, which says what others have bound.
const RECORD_READ: Duration = Duration::from_secs(5);

#[derive(Debug)]
pub(super) struct Shared {
    pub(super) topology: Topology,
    pub(super) dialer: Dialer,
    pub(super) consuming: Pool,
    pub(super) declaring: Arc<Pool>,
    pub(super) publisher: OnceLock<Publisher>,
    pub(super) pause_states: watch::Sender<Option<PauseStates>>,
    /// Pauses that this daemon has recorded and not read yet: they count already.
    pub(super) recorded: Mutex<HashMap<SubscriberName, PauseState>>,
    pub(super) removals: Removals,
    /// Subscribers that were removed, by the record.
    pub(super) removed: watch::Sender<BTreeSet<SubscriberName>>,
    /// Patterns of the subscribers that were prepared last: these are never unbound.
    pub(super) prepared: tokio::sync::Mutex<HashMap<SubscriberName, BTreeSet<String>>>,
    /// The record is followed, so that it need not be read.
    pub(super) follows: AtomicBool,
    /// Number of this daemon's consumers, by subscriber.
    pub(super) consumers: Mutex<HashMap<SubscriberName, u32>>,
    /// When the latest of these consumers was begun.
    pub(super) consuming_since: Mutex<Option<Instant>>,
    /// Subscribers whose queue ended its connection when it was consumed: they get a connection of
    /// their own.
    pub(super) suspects: Mutex<HashSet<SubscriberName>>,
    /// By subscriber.
    pub(super) lost_acks: Mutex<HashMap<SubscriberName, Arc<LostAcks>>>,
    /// By subscriber.
    pub(super) sizes: Mutex<HashMap<SubscriberName, Arc<Mutex<Sizes>>>>,
    pub(super) troubles: watch::Sender<Troubles>,
    /// The patterns bound to the exchange of the events: by the record, once a daemon has read it;
    /// in a command by its configuration.
    pub(super) bound: Mutex<Patterns>,
    /// When all bindings were last declared.
    pub(super) sound: Mutex<Option<SystemTime>>,
    /// Notified when a message found no queue, or a lane no exchange.
    pub(super) unbound: Notify,
    /// A settlement found no queue, and restoring it has failed.
    pub(super) damaged: watch::Sender<bool>,
    pub(super) history: HistoryState,
    /// The store that has subscribers made over the API, by the record; `None` until that was read.
    pub(super) manager: watch::Sender<Option<Option<String>>>,
    pub(super) marks: Marks,
    /// Since when this process knows that a subscriber's patterns are bound.
    pub(super) bound_since: Mutex<HashMap<SubscriberName, (Vec<Pattern>, Instant)>>,
    /// The patterns that are bound to the exchange of the events, of all daemons: by the record,
    /// and those that this process has bound and not recorded yet.
    pub(super) matching: Mutex<Arc<Matching>>,
    /// Until when events wait for the record to be read, from the first one that did.
    awaits_record: OnceLock<Instant>,
    /// Held by the task that restores what is missing.
    pub(super) restoring: tokio::sync::Mutex<()>,
}

impl Shared {
    pub(super) fn new(config: AmqpConfig, metrics: Metrics) -> Self {
        let dialer = Dialer::new(config.url.clone(), metrics);
        let troubles = watch::Sender::default();
        Self {
            consuming: Pool::new(dialer.clone(), Role::Consuming, &troubles),
            declaring: Arc::new(Pool::new(dialer.clone(), Role::Declaring, &troubles)),
            dialer,
            topology: Topology::new(config),
            publisher: OnceLock::new(),
            pause_states: watch::Sender::new(None),
            recorded: Mutex::default(),
            removals: Removals::default(),
            removed: watch::Sender::default(),
            prepared: tokio::sync::Mutex::default(),
            follows: AtomicBool::new(false),
            consumers: Mutex::default(),
            consuming_since: Mutex::default(),
            suspects: Mutex::default(),
            lost_acks: Mutex::default(),
            sizes: Mutex::default(),
            troubles,
            bound: Mutex::default(),
            sound: Mutex::default(),
            unbound: Notify::new(),
            damaged: watch::Sender::new(false),
            history: HistoryState::default(),
            manager: watch::Sender::default(),
            marks: Marks::default(),
            bound_since: Mutex::default(),
            matching: Mutex::default(),
            awaits_record: OnceLock::new(),
            restoring: tokio::sync::Mutex::default(),
        }
    }

    /// Makes requests that the broker may refuse.
    pub(super) fn broker(&self) -> Broker<'_> {
        Broker::new(&self.declaring)
    }

    /// The publisher, which connects at the first call.
    pub(super) fn publisher(&self) -> &Publisher {
        self.publisher.get_or_init(|| self.new_publisher(Role::Publishing))
    }

    pub(super) fn new_publisher(&self, role: Role) -> Publisher {
        Publisher::start(
            self.topology.clone(),
            self.dialer.clone(),
            self.declaring.clone(),
            role,
            &self.troubles,
        )
    }

    /// Declares a subscriber's three queues and their bindings.
    pub(super) async fn ensure_subscriber(
        &self,
        broker: &mut Broker<'_>,
        subscriber: &Subscriber,
    ) -> Result<(), QueueError> {
        self.topology.ensure_subscriber(broker, subscriber).await?;
        let mut all = self.bound_since();
        if all.get(&subscriber.name).is_none_or(|(patterns, _)| *patterns != subscriber.events) {
            let bound = (subscriber.events.clone(), clock::instant());
            all.insert(subscriber.name.clone(), bound);
        }
        Ok(())
    }

    pub(super) fn bound_since(
        &self,
    ) -> MutexGuard<'_, HashMap<SubscriberName, (Vec<Pattern>, Instant)>> {
        self.bound_since.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn outage(&self, what: impl Into<String>) -> ReportedOutage {
        ReportedOutage::new(what, Harms::Queue, &self.troubles)
    }

    pub(super) fn bound(&self) -> MutexGuard<'_, Patterns> {
        self.bound.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the patterns that an event is compared with.
    pub(super) fn matches_by(&self, change: impl FnOnce(&Matching) -> Matching) {
        let mut matching = self.matching.lock().unwrap_or_else(PoisonError::into_inner);
        *matching = Arc::new(change(&matching));
    }

    /// The patterns that events of these types are compared with. If one of them seems to find no
    /// subscriber, a daemon waits a little until it has read what others have bound. `None`: it has
    /// not.
    pub(super) async fn matching<'t>(
        &self,
        mut types: impl Iterator<Item = &'t str>,
    ) -> Option<Arc<Matching>> {
        let known = || self.matching.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let matching = known();
        if !self.follows() || types.all(|event_type| matching.matches(event_type)) {
            return Some(matching);
        }
        let mut recorded = self.history.recorded.subscribe();
        // Once for all events: they are not to wait for a record that cannot be read.
        let until = *self.awaits_record.get_or_init(|| clock::instant() + RECORD_READ);
        timeout_at(until.into(), recorded.wait_for(Option::is_some)).await.ok()?.ok()?;
        Some(known())
    }

    /// Whether this process follows the record, as a daemon does.
    pub(super) fn follows(&self) -> bool {
        self.follows.load(Ordering::Relaxed)
    }

    pub(super) fn recorded(&self) -> MutexGuard<'_, HashMap<SubscriberName, PauseState>> {
        self.recorded.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A consumer is about to be begun.
    pub(super) fn begins_to_consume(&self) {
        *self.consuming_since.lock().unwrap_or_else(PoisonError::into_inner) =
            Some(clock::instant());
    }

    /// Whether the broker has counted all of this daemon's consumers.
    pub(super) fn consumers_are_counted(&self) -> bool {
        let since = *self.consuming_since.lock().unwrap_or_else(PoisonError::into_inner);
        since.is_none_or(|since| clock::instant() - since >= COUNTED)
    }

    pub(super) fn consumers(&self) -> MutexGuard<'_, HashMap<SubscriberName, u32>> {
        self.consumers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The settlements of a subscriber's lost sessions whose acks may be lost.
    pub(super) fn lost_acks(&self, subscriber: &SubscriberName) -> Arc<LostAcks> {
        let mut all = self.lost_acks.lock().unwrap_or_else(PoisonError::into_inner);
        let now = clock::instant();
        all.retain(|_, left| Arc::strong_count(left) > 1 || !left.is_empty(now));
        all.entry(subscriber.clone()).or_default().clone()
    }

    /// The sizes of a subscriber's messages.
    pub(super) fn sizes(&self, subscriber: &SubscriberName) -> Arc<Mutex<Sizes>> {
        self.sizes
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .entry(subscriber.clone())
            .or_default()
            .clone()
    }

    /// The number of this daemon's consumers of a subscriber.
    pub(super) fn consumers_of(&self, subscriber: &str) -> u32 {
        self.consumers().get(subscriber).copied().unwrap_or(0)
    }

    /// Leases two channels for a subscriber's two queues.
    pub(super) async fn leases(&self, suspect: bool) -> Result<[Lease; 2], QueueError> {
        if suspect {
            let own = self.consuming.own().await;
            return Ok([own.lease().await?, own.lease().await?]);
        }
        Ok([self.consuming.lease().await?, self.consuming.lease().await?])
    }

    /// Counts a consumer of a subscriber's queue, until the guard is dropped.
    pub(super) fn consumes(self: &Arc<Self>, subscriber: &SubscriberName) -> Consumes {
        *self.consumers().entry(subscriber.clone()).or_default() += 1;
        self.begins_to_consume();
        Consumes { shared: self.clone(), subscriber: subscriber.clone() }
    }
}

/// Counts as a consumer of a subscriber's queue.
#[derive(Debug)]
pub(super) struct Consumes {
    pub(super) shared: Arc<Shared>,
    subscriber: SubscriberName,
}

impl Consumes {
    /// Another consumer replaces the one before.
    pub(super) fn rebegin(&self) {
        self.shared.begins_to_consume();
    }
}

impl Drop for Consumes {
    fn drop(&mut self) {
        let mut consumers = self.shared.consumers();
        if let Some(n) = consumers.get_mut(&self.subscriber) {
            *n -= 1;
            if *n == 0 {
                consumers.remove(&self.subscriber);
            }
        }
    }
}

pub(super) async fn stopped(mut stopping: watch::Receiver<bool>) {
    stopping.wait_for(|stops| *stops).await.ok();
}

/// Runs a background task, and restarts it after a panic.
pub(super) async fn supervised<F: Future<Output = ()>>(what: &str, task: impl Fn() -> F) {
    let mut waits = Backoff::new(Duration::from_secs(1), Duration::from_secs(60));
    while AssertUnwindSafe(task()).catch_unwind().await.is_err() {
        tracing::error!("{what} panicked and restarts");
        tokio::time::sleep(waits.grow()).await;
    }
}

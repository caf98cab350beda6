//! The queue on RabbitMQ. Nothing outside of this module knows AMQP.
//!
//! - `wire`: reads the socket: deliveries go to their consumers, everything else to lapin, made harmless
//! - `ladder`: how any delay is made of 19 queues
//! - `prefetch`: how many messages may be on their way, by their sizes
//! - `broker_error`: what the broker says to a request that it does not carry out
//! - `connection`, `pool`: connecting indefinitely, channels shared among connections
//! - `message`: events, envelopes and dead letters as messages
//! - `topology`: names and arguments; `requests`: requests and refusals; `declarations`: declares
//!   and binds what `topology` names
//! - `publisher`: confirmed publishing from one task
//! - `redelivery`: messages that were settled and are redelivered, because their ack was lost
//! - `management`: the HTTP API of the management plugin
//! - `record`: the records of the state stream; `snapshot`, `state_stream`: reading and writing
//!   them
//! - `matching`: which events find a subscriber; `history_mark`: whether history is past
//!   a moment; `history_state`: what its tasks share
//! - `shared`: what the files below share
//! - `unusable`: queues that cannot be consumed
//! - `restore`: redeclares what belongs to hooktrail alone and was deleted
//! - `walk`: a read of each message of a queue, in their order
//! - `consumer`: source and settler of a subscriber
//! - `ownership`: what several daemons decide about bindings; `upkeep`: bindings that were deleted;
//!   `follow`: carries both out
//! - `history_queue`: keeps the queue of all events, and unbinds it where it would hold up
//!   producers; `history_feed`: takes from it
//! - `relay`: the source queue; `orphans`: their sweep; `intake`: new events
//! - `waiting`: batches that wait for their next attempt; `dead`: dead letters and orphans
//! - `depths`: numbers of messages; `doctor`: what can lose or hold up events
//! - `line`: consumers that wait for a queue one behind the other; `scribe`: moves events into the
//!   embedded queue
//! - `repair`, `prune`: deletes and redeclares broken queues; deletes queues that are not needed
//!   any more

mod broker_error;
mod connection;
mod consumer;
mod dead;
mod declarations;
mod depths;
mod doctor;
mod follow;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod history_feed;
mod history_mark;
mod history_queue;
mod history_state;
mod intake;
mod ladder;
mod line;
mod management;
mod matching;
mod message;
mod orphans;
mod ownership;
mod pool;
mod prefetch;
mod prune;
mod publisher;
mod record;
mod redelivery;
mod relay;
mod repair;
mod requests;
mod restore;
mod scribe;
mod shared;
mod snapshot;
mod state_stream;
mod topology;
mod unusable;
mod upkeep;
mod waiting;
mod walk;
mod wire;

use std::{
    collections::{BTreeSet, HashMap},
    sync::{Arc, PoisonError},
    time::Duration,
};

use tokio::{sync::watch, time::timeout};

use self::{
    connection::{Connected, Role},
    history_mark::Marked,
    publisher::PublishResult,
    record::Patterns,
    shared::{Shared, stopped, supervised},
};
pub use self::{
    consumer::{Settler, Source},
    dead::DeadLetters,
    doctor::inspect_intake,
    history_feed::History,
    ladder::{Hold, hold},
    repair::Repaired,
    scribe::Scribe,
    topology::{Footprint, footprint, intake_footprint},
};
use crate::{
    clock,
    config::{AmqpConfig, Subscriber, Subscribers},
    delivery::{Batch, BatchId, Depths, PauseState, PauseStates, SubscriberName},
    queue::{
        Begin, Hastened, HistoryStart, NewEvent, Progress, Published, Queue, QueueError, Removals,
        WaitingList, Window,
    },
    store::EventNumber,
    telemetry::{finding::Finding, metrics::Metrics, troubles::Troubles},
};

/// The broker and what hooktrail keeps in it. Clones share everything.
#[derive(Debug, Clone)]
pub struct AmqpQueue(Arc<Shared>);

/// Subscribers that may have a connection of their own.
const MAX_QUARANTINES: usize = 8;

/// Timeout of a claim to the subscribers made over the API: a client waits for it.
const CLAIM_TIMEOUT: Duration = Duration::from_secs(10);

impl AmqpQueue {
    pub fn new(config: AmqpConfig, metrics: Metrics) -> Self {
        Self(Arc::new(Shared::new(config, metrics)))
    }

    /// Connects once, for commands that must not wait for the broker indefinitely.
    ///
    /// # Errors
    /// The broker cannot be reached, and why.
    pub async fn ping(&self) -> Result<(), QueueError> {
        let Connected { connection, counted: _open, .. } =
            self.0.dialer.connect(Role::Declaring).await?;
        connection::close(&connection).await;
        Ok(())
    }

    /// Deletes and redeclares the broken queues of a subscriber and the broken shared ones, and
    /// declares those that are missing. Does not touch sound queues; nor, without `force`, a queue
    /// whose messages may come back.
    ///
    /// # Errors
    /// The broker cannot be reached or refuses; or a queue fails for another reason, and nothing
    /// was changed.
    pub async fn repair(
        &self,
        subscriber: &Subscriber,
        force: bool,
    ) -> Result<Vec<Repaired>, QueueError> {
        repair::repair(&self.0, subscriber, force).await
    }

    /// Deletes everything that is declared under this prefix for these subscribers. The exchange
    /// that producers publish to goes too `with_exchange`; where events come from a source queue
    /// that is hooktrail's own.
    ///
    /// # Errors
    /// The broker cannot be reached or refuses.
    pub async fn remove<S: AsRef<str>>(
        &self,
        subscribers: impl IntoIterator<Item = S>,
        with_exchange: bool,
    ) -> Result<(), QueueError> {
        prune::remove(&self.0, subscribers, with_exchange).await
    }

    /// The depths of all queues under this prefix: of every subscriber that the record, this
    /// configuration or the management API knows.
    ///
    /// # Errors
    /// The broker cannot be reached; or a daemon or a command works with the prefix, which the
    /// error shows by a queue or a subscriber.
    pub async fn everything(&self, configured: &[Arc<Subscriber>]) -> Result<Depths, QueueError> {
        prune::everything(&self.0, configured).await
    }

    /// A walk through the orphans: batches that could not be routed back, and invalid events of a
    /// source queue.
    ///
    /// # Errors
    /// The broker cannot be reached, or no daemon has run with this prefix.
    pub async fn orphans(&self) -> Result<DeadLetters, QueueError> {
        DeadLetters::of_orphans(&self.0).await
    }

    /// Names the store of this process, so that an [inspection](Queue::inspect) compares it with those
    /// that have history, and subscribers made over the API.
    #[must_use]
    pub fn with_store(self, store: String) -> Self {
        self.0.history.own.get_or_init(|| store);
        self
    }

    /// The id of the store that has history, by the record; for commands.
    ///
    /// # Errors
    /// The broker cannot be reached.
    pub async fn history_store(&self) -> Result<Option<String>, QueueError> {
        state_stream::store(&self.0).await
    }

    /// The id of the store that has subscribers made over the API, by the record; for commands.
    ///
    /// # Errors
    /// The broker cannot be reached.
    pub async fn subscribers_store(&self) -> Result<Option<String>, QueueError> {
        state_stream::manager(&self.0).await
    }

    /// Has the subscribers made over the API be those of this store, whichever had them before: the
    /// daemon of that one changes none any more.
    ///
    /// # Errors
    /// It is unknown whether it was recorded.
    pub async fn adopt_subscribers(&self, store: &str) -> Result<(), QueueError> {
        self.0.topology.ensure_state(&mut self.0.broker()).await?;
        state_stream::adopt_subscribers(&self.0, store).await
    }

    /// Gives history to this store, whichever had it before: the daemon of that one ends its
    /// history, and goes on delivering.
    ///
    /// # Errors
    /// It is unknown whether it was recorded.
    pub async fn adopt_history(&self, store: &str) -> Result<(), QueueError> {
        self.0.topology.ensure_state(&mut self.0.broker()).await?;
        state_stream::adopt(&self.0, store).await
    }

    /// Returns the subscribers whose queues are not ready.
    async fn try_prepare(
        &self,
        subscribers: &[Arc<Subscriber>],
    ) -> Result<BTreeSet<SubscriberName>, QueueError> {
        let shared = &*self.0;
        let prepared: HashMap<_, BTreeSet<String>> = patterns(subscribers);
        shared.matches_by(|matching| matching.with_own(prepared.values().flatten()));
        // One that is added again is bound anew.
        shared.bound_since().retain(|name, _| prepared.contains_key(name));
        *shared.prepared.lock().await = prepared;
        let mut broker = shared.broker();
        shared.topology.find_source(&mut broker).await?;
        shared.topology.ensure_shared(&mut broker).await?;
        let mut unready = BTreeSet::new();
        for s in subscribers {
            if let Err(e) = shared.ensure_subscriber(&mut broker, s).await {
                tracing::error!(subscriber = s.name.as_str(), error = %e, "its queues are not ready");
                unready.insert(s.name.clone());
            }
        }
        *shared.sound.lock().unwrap_or_else(PoisonError::into_inner) = Some(clock::now());
        Ok(unready)
    }
}

fn patterns<C: FromIterator<(SubscriberName, BTreeSet<String>)>>(
    subscribers: &[Arc<Subscriber>],
) -> C {
    let of = |s: &Arc<Subscriber>| {
        (s.name.clone(), s.events.iter().map(|p| p.as_str().to_owned()).collect())
    };
    subscribers.iter().map(of).collect()
}

impl Queue for AmqpQueue {
    type Source = Source;
    type Settler = Settler;
    type DeadLetters = DeadLetters;
    type History = History;

    async fn prepare(
        &self,
        subscribers: &[Arc<Subscriber>],
    ) -> Result<BTreeSet<SubscriberName>, QueueError> {
        self.0.publisher(); // connects meanwhile
        let mut preparing = self.0.outage("making queues and bindings ready");
        loop {
            match self.try_prepare(subscribers).await {
                Err(e) if !e.is_for_operator() => preparing.failed(&e).await,
                done => return done,
            }
        }
    }

    async fn background(
        &self,
        subscribers: watch::Receiver<Subscribers>,
        stopping: watch::Receiver<bool>,
    ) {
        let shared = &*self.0;
        let relay =
            supervised("the relay", || relay::relay(shared, subscribers.clone(), stopping.clone()));
        let others = async {
            tokio::join!(
                supervised("following the record", || follow::follow(shared, subscribers.clone())),
                supervised("the upkeep of the delay ladder", || restore::check_own(shared)),
                supervised("the sweep of orphans", || orphans::sweep(shared, subscribers.clone())),
                supervised("the upkeep of the queue of history", || history_queue::keep(shared)),
            )
        };
        tokio::select! {
            // Stored events that are not acked would be relayed again by the next daemon.
            _ = async { tokio::join!(relay, stopped(stopping.clone())) } => {}
            _ = others => {}
        }
    }

    async fn close(&self) {
        if let Some(publisher) = self.0.publisher.get() {
            publisher.close().await;
        }
        self.0.consuming.close().await;
        self.0.declaring.close().await;
    }

    async fn open(
        &self,
        subscriber: &Subscriber,
        window: Window,
    ) -> Result<(Source, Settler), QueueError> {
        let shared = &self.0;
        let name = &subscriber.name;
        let suspects = || shared.suspects.lock().unwrap_or_else(PoisonError::into_inner);
        // With many of them the broker itself fails, and more connections would not help.
        let suspect =
            Some(suspects()).is_some_and(|all| all.contains(name) && all.len() <= MAX_QUARANTINES);
        if let Err(e) = shared.ensure_subscriber(&mut shared.broker(), subscriber).await {
            // Perhaps the exchange is missing, which no lane declares.
            shared.unbound.notify_one();
            return Err(e);
        }
        let leases = shared.leases(suspect).await?;
        // Counted before the broker counts it.
        let consumes = shared.consumes(name);
        match Source::open(leases, subscriber, window, consumes).await {
            Ok(opened) => Ok(opened),
            Err(unusable) => {
                if unusable.is_broken() {
                    suspects().insert(name.clone());
                }
                Err(unusable.into_error(name))
            }
        }
    }

    async fn claim_history(&self, start: &HistoryStart) -> Result<(), QueueError> {
        history_feed::claim(&self.0, start).await.map(drop)
    }

    fn history_store(&self) -> watch::Receiver<Option<Option<String>>> {
        self.0.history.recorded.subscribe()
    }

    fn subscribers_store(&self) -> watch::Receiver<Option<Option<String>>> {
        self.0.manager.subscribe()
    }

    async fn claim_subscribers(&self, store: &str) -> Result<(), QueueError> {
        let late = || {
            let why =
                format!("no record was written and read within {} s", CLAIM_TIMEOUT.as_secs());
            state_stream::error(&self.0.topology, &why)
        };
        let claim = state_stream::claim_subscribers(&self.0, store);
        timeout(CLAIM_TIMEOUT, claim).await.unwrap_or_else(|_| Err(late()))
    }

    async fn history(&self, start: HistoryStart) -> Result<History, QueueError> {
        History::open(&self.0, start).await
    }

    async fn begin(&self, subscriber: &SubscriberName) -> Result<Begin, QueueError> {
        let shared = &*self.0;
        let bound = shared.bound_since().get(subscriber).map(|(_, since)| *since);
        // Unbound, its queue may be broken.
        let Some(bound) = bound.filter(|_| shared.history.is_bound()) else {
            return Ok(Begin::Waits);
        };
        let id = clock::batch_id();
        match shared.marks.check(bound, clock::instant(), &id) {
            Marked::Passed => return Ok(Begin::Passed),
            Marked::Waits => return Ok(Begin::Waits),
            Marked::Send if shared.publisher().is_writable() => {}
            Marked::Send => {
                shared.marks.unsent(&id);
                return Ok(Begin::Waits);
            }
        }
        let mark = history_mark::message(shared.topology.history(), &id);
        let published = shared.publisher().publish(vec![mark]).await;
        if !matches!(published.as_deref(), Ok([PublishResult::Stored])) {
            shared.marks.unsent(&id);
            shared.history.suspect();
        }
        published.map(|_| Begin::Waits)
    }

    async fn writable(&self) {
        let mut damaged = self.0.damaged.subscribe();
        loop {
            // An error means that the sender is gone.
            damaged.wait_for(|damaged| !damaged).await.ok();
            self.0.publisher().writable().await;
            if !*damaged.borrow() {
                return;
            }
        }
    }

    async fn ensure(&self, subscribers: &[Arc<Subscriber>]) -> Result<(), QueueError> {
        let topology = &self.0.topology;
        let configured: Patterns = patterns(subscribers);
        *self.0.bound() = configured.clone();
        let mut broker = self.0.broker();
        topology.ensure_shared(&mut broker).await?;
        for s in subscribers {
            if broker.depth(&topology.main(&s.name)).await?.is_none() {
                topology.ensure_subscriber(&mut broker, s).await?;
            }
        }
        // With history no event is returned: only the record says which ones find a subscriber.
        let has_history = broker.depth(&topology.history()).await?.is_some();
        let (recorded, removed) =
            if has_history { state_stream::bound(&self.0).await? } else { Default::default() };
        let unrecorded = configured
            .iter()
            .filter(|(name, _)| !recorded.contains_key(*name) && !removed.contains(*name));
        let own = unrecorded.flat_map(|(_, patterns)| patterns);
        self.0.matches_by(|matching| matching.with_recorded(&recorded).with_own(own));
        Ok(())
    }

    async fn publish(&self, events: Vec<NewEvent>) -> Result<Vec<Published>, QueueError> {
        intake::publish(&self.0, events).await
    }

    fn is_reachable(&self) -> bool {
        self.0.publisher().is_writable()
            && !self.0.troubles.borrow().has(&Role::Consuming.connection())
    }

    fn troubles(&self) -> watch::Receiver<Troubles> {
        self.0.troubles.subscribe()
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
        let shared = &*self.0;
        shared.recorded().insert(subscriber.clone(), pause_state.clone());
        let recorded =
            state_stream::record(&shared.topology, shared.publisher(), subscriber, &pause_state);
        if let Err(e) = recorded.await {
            shared.recorded().remove(subscriber);
            return Err(e);
        }
        // The followed record brings it too, a little later.
        shared.pause_states.send_modify(|all| {
            if let Some(all) = all {
                Arc::make_mut(all).insert(subscriber.clone(), pause_state);
            }
        });
        Ok(())
    }

    async fn dead_letters(&self, subscriber: &str) -> Result<DeadLetters, QueueError> {
        DeadLetters::of_subscriber(&self.0, subscriber).await
    }

    async fn waiting(&self, subscriber: &str) -> Result<WaitingList, QueueError> {
        waiting::list(&self.0, subscriber).await
    }

    async fn hasten(
        &self,
        subscriber: &str,
        ids: Option<BTreeSet<BatchId>>,
    ) -> Result<Hastened, QueueError> {
        waiting::hasten(&self.0, subscriber, ids).await
    }

    async fn enqueue(
        &self,
        subscriber: &SubscriberName,
        batches: Vec<Batch>,
    ) -> Result<(), QueueError> {
        waiting::enqueue(&self.0, subscriber, &batches).await
    }

    async fn depths(&self, subscribers: &[Arc<Subscriber>]) -> Result<Depths, QueueError> {
        depths::depths(&self.0, subscribers).await
    }

    async fn progress(
        &self,
        subscribers: &[SubscriberName],
        _event: EventNumber,
    ) -> Result<Vec<Progress>, QueueError> {
        let mut broker = self.0.broker();
        let mut found = Vec::with_capacity(subscribers.len());
        for subscriber in subscribers {
            // A queue of RabbitMQ can be read only by taking from it.
            let waiting = broker.messages(&self.0.topology.main(subscriber)).await?;
            found.push(waiting.map_or(Progress::Unknown, Progress::Among));
        }
        Ok(found)
    }

    async fn bound(&self) -> Result<BTreeSet<SubscriberName>, QueueError> {
        state_stream::all_bound(&self.0).await
    }

    async fn prune(
        &self,
        subscriber: &SubscriberName,
        with_events: bool,
    ) -> Result<(), QueueError> {
        prune::prune(&self.0, subscriber, with_events).await
    }

    async fn inspect(&self, subscribers: &[Arc<Subscriber>]) -> Result<Vec<Finding>, QueueError> {
        doctor::inspect(&self.0, subscribers).await
    }
}

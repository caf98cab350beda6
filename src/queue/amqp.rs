//! The queue on RabbitMQ. Nothing outside of this module knows AMQP.
//!
//! - `topology`: names, declarations, conflicts
//! - `ladder`: how any delay is made of 19 queues
//! - `message`: events, envelopes and dead letters as messages
//! - `wire`: what no message may do to a connection
//! - `connection`: connecting without end, channels shared among connections
//! - `publisher`: confirmed publishing from one task
//! - `lane`: source and settler of a subscriber
//! - `prefetch`: how many messages may be on their way, by their sizes
//! - `repeats`: what was settled and comes again, because its ack was lost
//! - `state`: what earlier configurations bound
//! - `upkeep`: what somebody has deleted is put back
//! - `relay`: the source queue, and the sweep of orphans
//! - `walk`: a look at each message of a queue, in their order
//! - `dead`: looking at dead letters and orphans
//! - `waiting`: looking at what waits for its next attempt, and making that due now
//! - `doctor`: what of all that can lose or hold up events; `management`: the HTTP API that it asks

mod connection;
mod dead;
mod doctor;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod ladder;
mod lane;
mod management;
mod message;
mod prefetch;
mod publisher;
mod record;
mod relay;
mod repeats;
mod snapshot;
mod state;
mod topology;
mod upkeep;
mod waiting;
mod walk;
mod wire;

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    panic::AssertUnwindSafe,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use futures_util::{FutureExt as _, future::try_join_all};
use tokio::sync::{Notify, watch};

use self::{
    connection::{Dialer, Lease, NOT_FOUND, Pool, Role},
    lane::Unusable,
    message::Message,
    prefetch::Sizes,
    publisher::{Fate, Publisher},
    record::Patterns,
    relay::{Relay, Sweep},
    repeats::Remembered,
    state::Reconciler,
    topology::{Broker, Topology},
};
pub use self::{
    dead::DeadLetters,
    ladder::{Hold, hold},
    lane::{Settler, Source},
    topology::{Footprint, footprint},
};
use crate::{
    clock,
    config::{AmqpConfig, Intake, Subscriber, Subscribers},
    delivery::{BatchId, Depth, Depths, Standing, Standings, SubscriberName},
    policy::retry::Waits,
    queue::{Hastened, NewEvent, Published, Queue, QueueError, Removals, WaitingList, Window},
    telemetry::{
        finding::Finding,
        metrics::Metrics,
        outage::ReportedOutage,
        troubles::{Harms, Troubles},
    },
    wording::counted,
};

/// The broker and what hooktrail keeps in it. Clones are the same.
#[derive(Debug, Clone)]
pub struct AmqpQueue(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    topology: Topology,
    dialer: Dialer,
    consuming: Pool,
    declaring: Arc<Pool>,
    publisher: OnceLock<Publisher>,
    standings: watch::Sender<Option<Standings>>,
    /// What this daemon has recorded of whom, until it has read that: it counts already.
    recorded: Mutex<HashMap<SubscriberName, Standing>>,
    removals: Removals,
    /// Subscribers that the record says were removed.
    removed: watch::Sender<BTreeSet<SubscriberName>>,
    /// The patterns of those for whom this was made ready last: what they want is not unbound.
    prepared: tokio::sync::Mutex<HashMap<SubscriberName, BTreeSet<String>>>,
    /// The record is followed, so nobody has to read it.
    follows: AtomicBool,
    /// How often this daemon consumes the queue of a subscriber now.
    consumers: Mutex<HashMap<SubscriberName, u32>>,
    /// When the latest of these consumers began.
    consuming_since: Mutex<Option<Instant>>,
    /// Subscribers whose queue took its connection down when it was consumed: they get one of their
    /// own.
    suspects: Mutex<HashSet<SubscriberName>>,
    /// By subscriber.
    remembered: Mutex<HashMap<SubscriberName, Arc<Remembered>>>,
    /// By subscriber.
    sizes: Mutex<HashMap<SubscriberName, Arc<Mutex<Sizes>>>>,
    troubles: watch::Sender<Troubles>,
    /// What the record says that is bound to the exchange of the events, once a daemon has read it;
    /// of a command what it is configured with.
    bound: Mutex<Patterns>,
    /// Whether the witness was there at the start.
    witnessed: OnceLock<bool>,
    /// When all that should be bound was last seen to.
    sound: Mutex<Option<SystemTime>>,
    /// A message found no queue, or a lane no exchange.
    unbound: Notify,
    /// A settlement found no queue, and that could not be put right at once.
    damaged: watch::Sender<bool>,
    /// Held by whoever puts back what is missing.
    mending: tokio::sync::Mutex<()>,
}

/// RabbitMQ's default: a consumer that holds a message for longer loses its channel.
pub const CONSUMER_TIMEOUT: Duration = Duration::from_secs(30 * 60);

/// The broker counts a consumer within this time; until then another daemon's may be taken for this
/// one's own.
const COUNTED: Duration = Duration::from_secs(2);

/// So many subscribers may have a connection of their own.
const MAX_QUARANTINES: usize = 8;

/// What `repair` did with a queue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Repaired {
    Sound(String),
    /// It was missing.
    Declared(String),
    Redeclared {
        queue: String,
        why: String,
    },
}

impl AmqpQueue {
    pub fn new(config: AmqpConfig, metrics: Metrics) -> Self {
        let dialer = Dialer::new(config.url.clone(), metrics);
        let troubles = watch::Sender::default();
        Self(Arc::new(Inner {
            consuming: Pool::new(dialer.clone(), Role::Consuming, &troubles),
            declaring: Arc::new(Pool::new(dialer.clone(), Role::Declaring, &troubles)),
            dialer,
            topology: Topology::new(config),
            publisher: OnceLock::new(),
            standings: watch::Sender::new(None),
            recorded: Mutex::default(),
            removals: Removals::default(),
            removed: watch::Sender::default(),
            prepared: tokio::sync::Mutex::default(),
            follows: AtomicBool::new(false),
            consumers: Mutex::default(),
            consuming_since: Mutex::default(),
            suspects: Mutex::default(),
            remembered: Mutex::default(),
            sizes: Mutex::default(),
            troubles,
            bound: Mutex::default(),
            witnessed: OnceLock::new(),
            sound: Mutex::default(),
            unbound: Notify::new(),
            damaged: watch::Sender::new(false),
            mending: tokio::sync::Mutex::default(),
        }))
    }

    /// Looks once whether the broker can be reached, for commands that must not wait for it without
    /// end.
    ///
    /// # Errors
    /// It cannot, and why.
    pub async fn ping(&self) -> Result<(), QueueError> {
        let (connection, _open) = self.0.dialer.connect(Role::Declaring).await?;
        connection::close(&connection).await;
        Ok(())
    }

    fn topology(&self) -> &Topology {
        &self.0.topology
    }

    /// For requests that the broker may refuse.
    fn pool(&self) -> &Pool {
        &self.0.declaring
    }

    fn broker(&self) -> Broker<'_> {
        Broker::new(&self.0.declaring)
    }

    /// Connects by itself when it is first asked for.
    fn publisher(&self) -> &Publisher {
        self.0.publisher.get_or_init(|| self.new_publisher(Role::Publishing))
    }

    fn new_publisher(&self, role: Role) -> Publisher {
        Publisher::start(
            self.topology().clone(),
            self.0.dialer.clone(),
            self.0.declaring.clone(),
            role,
            &self.0.troubles,
        )
    }

    fn outage(&self, what: impl Into<String>) -> ReportedOutage {
        ReportedOutage::new(what, Harms::Queue, &self.0.troubles)
    }

    fn bound(&self) -> MutexGuard<'_, Patterns> {
        self.0.bound.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether this is a daemon, which follows the record.
    fn follows(&self) -> bool {
        self.0.follows.load(Ordering::Relaxed)
    }

    fn recorded(&self) -> MutexGuard<'_, HashMap<SubscriberName, Standing>> {
        self.0.recorded.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns whose queues are not ready.
    async fn try_prepare(
        &self,
        subscribers: &[Arc<Subscriber>],
    ) -> Result<BTreeSet<SubscriberName>, QueueError> {
        let patterns = |s: &Arc<Subscriber>| {
            (s.name.clone(), s.events.iter().map(|p| p.as_str().to_owned()).collect())
        };
        *self.0.prepared.lock().await = subscribers.iter().map(patterns).collect();
        let mut broker = self.broker();
        self.topology().find_source(&mut broker).await?;
        self.topology().ensure_shared(&mut broker).await?;
        self.first_witness(&mut broker).await;
        let mut unready = BTreeSet::new();
        for s in subscribers {
            if let Err(e) = self.topology().ensure_subscriber(&mut broker, s).await {
                tracing::error!(subscriber = s.name.as_str(), error = %e, "its queues are not ready");
                unready.insert(s.name.clone());
            }
        }
        *self.0.sound.lock().unwrap_or_else(PoisonError::into_inner) = Some(clock::now());
        Ok(unready)
    }

    /// Follows the record: who is paused, and what only earlier configurations had, which it takes
    /// away. Beside the lanes, because it has to publish, and a broker that blocks publishing can
    /// still be consumed.
    async fn follow_state(&self, subscribers: watch::Receiver<Subscribers>) {
        self.0.follows.store(true, Ordering::Relaxed);
        let mut reconciler = Reconciler::new(self, subscribers);
        let mut following = self.outage("following the record of bindings and pauses");
        loop {
            let Err(e) = reconciler.follow(&mut following).await;
            following.failed(&e).await;
        }
    }

    async fn relay(
        &self,
        subscribers: watch::Receiver<Subscribers>,
        stopping: watch::Receiver<bool>,
    ) {
        let Intake::SourceQueue(queue) = self.topology().intake() else { return };
        // A connection of its own: a subscriber's retries must not wait behind the relay's stream.
        let publisher = self.new_publisher(Role::Relaying);
        let relay = Relay {
            topology: self.topology(),
            pool: &self.0.consuming,
            publisher: &publisher,
            metrics: &self.0.dialer.metrics,
            queue,
            subscribers: &subscribers,
            stopping: &stopping,
            unbound: &self.0.unbound,
            troubles: &self.0.troubles,
        };
        let mut relaying = self.outage(format!("the relay from queue `{queue}`"));
        let mut sizes = Sizes::default();
        loop {
            let mut configured = subscribers.clone();
            let opened = async {
                // An event relayed before a queue is bound would pass that queue by.
                let mut broker = self.broker();
                self.topology().find_source(&mut broker).await?;
                self.topology().ensure_shared(&mut broker).await?;
                let current = configured.borrow_and_update().clone();
                for s in current.iter() {
                    self.topology().ensure_subscriber(&mut broker, s).await?;
                }
                drop(broker);
                relay.open(&sizes).await
            };
            let relayed = tokio::select! {
                () = stopped(stopping.clone()) => return,
                opened = opened => match opened {
                    Ok(opened) => relay.run(opened, &mut sizes, &mut relaying, &mut configured).await,
                    Err(e) => Err(e),
                },
            };
            if let Err(e) = relayed {
                tokio::select! {
                    () = stopped(stopping.clone()) => return,
                    () = relaying.failed(&e) => {}
                }
            }
        }
    }

    async fn sweep(&self, mut subscribers: watch::Receiver<Subscribers>) {
        let mut sweep = Sweep {
            topology: self.topology(),
            consuming: &self.0.consuming,
            declaring: &self.0.declaring,
            publisher: self.publisher(),
            configured: HashSet::new(),
            foreign: None,
        };
        let mut sweeping = self.outage("the sweep of orphans");
        loop {
            sweep.configure(&subscribers.borrow_and_update());
            match sweep.run().await {
                Ok(moved) => {
                    sweeping.recovered();
                    if moved > 0 {
                        tracing::info!(
                            batches = moved,
                            "moved orphans back into their retry queues"
                        );
                    }
                    tokio::select! {
                        () = tokio::time::sleep(relay::SWEEP_INTERVAL) => {}
                        Ok(()) = subscribers.changed() => {}
                    }
                }
                Err(e) => sweeping.failed(&e).await,
            }
        }
    }

    /// What no queue has taken is in none, and can be published again once what should be bound is.
    async fn publish_again(
        &self,
        messages: &[Message],
        fates: &mut [Fate],
    ) -> Result<(), QueueError> {
        let is_event = |m: &Message| m.exchange == self.topology().events();
        let lost: Vec<usize> = (0..fates.len())
            .filter(|n| fates[*n] == Fate::Unroutable && messages.get(*n).is_some_and(is_event))
            .collect();
        let types = lost.iter().map(|n| messages[*n].routing_key.clone()).collect();
        if lost.is_empty() || !self.bind_again(&types).await? {
            return Ok(());
        }
        let again =
            self.publisher().publish(lost.iter().map(|n| messages[*n].clone()).collect()).await?;
        lost.into_iter().zip(again).for_each(|(n, fate)| fates[n] = fate);
        Ok(())
    }

    /// Deletes everything that is declared under this prefix for these subscribers. The exchange
    /// that producers publish to goes too `with_exchange`; where events come from a source queue
    /// that is hooktrail's own.
    ///
    /// # Errors
    /// The broker cannot be reached or does not obey.
    pub async fn remove<S: AsRef<str>>(
        &self,
        subscribers: impl IntoIterator<Item = S>,
        with_exchange: bool,
    ) -> Result<(), QueueError> {
        let topology = self.topology();
        let mut broker = self.broker();
        let own =
            subscribers.into_iter().flat_map(|name| topology.subscriber_queues(name.as_ref()));
        for (queue, _) in own.chain(topology.shared_queues()) {
            broker.delete_queue(&queue).await?;
        }
        broker.delete_queue(&topology.state()).await?;
        broker.delete_queue(&topology.snapshot()).await?;
        let is_own = with_exchange || matches!(topology.intake(), Intake::SourceQueue(_));
        for exchange in
            topology.exchanges().into_iter().filter(|name| is_own || *name != topology.events())
        {
            broker.delete_exchange(&exchange).await?;
        }
        broker.delete_exchange(&topology.witness()).await
    }

    /// What there is under this prefix, of every subscriber that the record, this configuration or
    /// the management API knows.
    ///
    /// # Errors
    /// The broker cannot be asked; or a daemon or a command works with the prefix: which queue, or
    /// which subscriber, shows it.
    pub async fn everything(&self, configured: &[Arc<Subscriber>]) -> Result<Depths, QueueError> {
        let topology = self.topology();
        let mut names: BTreeSet<SubscriberName> =
            configured.iter().map(|s| s.name.clone()).collect();
        names.extend(doctor::names_below(topology).await);
        let asked = state::who_works(self).await?;
        names.extend(asked.known);
        if let Some(name) = asked.works {
            return Err(QueueError::new(format!(
                "a daemon works with prefix `{}`: it answers for `{name}`. Stop every daemon that has this prefix first",
                topology.prefix()
            )));
        }
        let mut broker = self.broker();
        let mut depths = Depths::default();
        for name in names {
            let queues = topology.subscriber_queues(&name).map(|(queue, _)| queue);
            self.may_be_pruned(&mut broker, &name, &queues, true).await?;
            if let Some(depth) = self.depth(&mut broker, &name).await? {
                depths.subscribers.insert(name, depth);
            }
        }
        self.shared_depths(&mut broker, &mut depths).await?;
        Ok(depths)
    }

    async fn shared_depths(
        &self,
        broker: &mut Broker<'_>,
        depths: &mut Depths,
    ) -> Result<(), QueueError> {
        let mut delayed = 0;
        for level in 0..ladder::LEVELS {
            delayed += broker.messages(&self.topology().level(level)).await?.unwrap_or(0);
        }
        depths.delayed = Some(delayed);
        depths.orphans = broker.messages(&self.topology().orphans()).await?.unwrap_or(0);
        Ok(())
    }

    /// Deletes and redeclares those queues of a subscriber, and of the shared ones, that the broker
    /// has lost the use of, and declares those that are missing. Sound queues are not touched; nor
    /// is one with messages that may come back, unless `force` says so.
    ///
    /// # Errors
    /// The broker cannot be reached or does not obey; or what is wrong is not for this to change,
    /// which is said, and nothing is changed.
    pub async fn repair(
        &self,
        subscriber: &Subscriber,
        force: bool,
    ) -> Result<Vec<Repaired>, QueueError> {
        let mut broker = self.broker();
        let own = self.topology().subscriber_queues(&subscriber.name);
        let own_names = own.clone().map(|(queue, _)| queue);
        let queues: Vec<_> = own.into_iter().chain(self.topology().shared_queues()).collect();
        let states = try_join_all(queues.iter().map(|(queue, _)| self.usable(queue))).await?;
        let mut broken = Vec::new();
        for ((queue, arguments), state) in queues.iter().zip(states) {
            let Err(unusable) = state else { continue };
            let exists = unusable.why.code != Some(NOT_FOUND);
            if exists && !unusable.is_broken() {
                let e = unusable.into_error(&subscriber.name);
                return Err(QueueError::new(format!(
                    "{e}; that is not for `repair` to change, and nothing was changed"
                )));
            }
            broken.push((queue, arguments, exists, unusable.why.to_string()));
        }
        // The broker cannot say what is in a queue that it cannot use. But when those that all
        // subscribers share are dumb too, or it counts messages, a node is missing rather than the
        // queue lost.
        let shared_is_dumb = broken
            .iter()
            .any(|(queue, _, exists, _)| *exists && own_names.iter().all(|own| own != *queue));
        for (queue, _, exists, _) in &broken {
            let messages =
                if *exists { broker.depth(queue).await?.map_or(0, |d| d.messages) } else { 0 };
            if !force && *exists && (shared_is_dumb || messages > 0) {
                return Err(QueueError::new(format!(
                    "queue `{queue}` does not answer, and what is in it may come back: is a node of the cluster missing (rabbitmqctl cluster_status)? \
                     If it is declared anew its events are lost; say --yes if that is meant. Nothing was changed"
                )));
            }
        }
        let mut report: Vec<_> = queues
            .iter()
            .filter(|(q, _)| broken.iter().all(|b| b.0 != q))
            .map(|(q, _)| Repaired::Sound(q.clone()))
            .collect();
        for (queue, arguments, exists, why) in broken {
            if exists {
                broker.delete_queue(queue).await?;
            }
            broker.ensure_queue(queue, arguments.clone()).await?;
            let queue = queue.clone();
            report.push(if exists {
                Repaired::Redeclared { queue, why }
            } else {
                Repaired::Declared(queue)
            });
        }
        // Their bindings.
        self.topology().ensure_shared(&mut broker).await?;
        self.topology().ensure_subscriber(&mut broker, subscriber).await?;
        Ok(report)
    }

    /// Whether a queue can be consumed, tried on a connection of its own. Broken is what is broken
    /// more than once: a queue whose process is just being restarted is not.
    async fn usable(&self, queue: &str) -> Result<Result<(), Unusable>, QueueError> {
        let mut waits = Waits::new(Duration::from_millis(500), Duration::from_secs(1));
        let mut tries = 2;
        loop {
            tries -= 1;
            match self.try_once(queue).await? {
                Err(e) if e.is_broken() && tries > 0 => tokio::time::sleep(waits.grow()).await,
                tried => return Ok(tried),
            }
        }
    }

    async fn try_once(&self, queue: &str) -> Result<Result<(), Unusable>, QueueError> {
        let lease = self.0.consuming.quarantine().await?.lease().await?;
        Ok(lane::try_consume(&lease, queue).await)
    }

    /// Until the guard is dropped, this daemon consumes the queue of a subscriber.
    fn consumes(&self, subscriber: &SubscriberName) -> Consumes {
        *self.consumers().entry(subscriber.clone()).or_default() += 1;
        self.begins_to_consume();
        Consumes { queue: self.clone(), subscriber: subscriber.clone() }
    }

    /// A consumer is about to begin, or to begin again.
    fn begins_to_consume(&self) {
        *self.0.consuming_since.lock().unwrap_or_else(PoisonError::into_inner) =
            Some(clock::instant());
    }

    /// Whether the broker has counted all of this daemon's consumers by now.
    fn consumers_are_counted(&self) -> bool {
        let since = *self.0.consuming_since.lock().unwrap_or_else(PoisonError::into_inner);
        since.is_none_or(|since| clock::instant() - since >= COUNTED)
    }

    fn consumers(&self) -> MutexGuard<'_, HashMap<SubscriberName, u32>> {
        self.0.consumers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What its lost sessions have left.
    fn remembered(&self, subscriber: &SubscriberName) -> Arc<Remembered> {
        let mut all = self.0.remembered.lock().unwrap_or_else(PoisonError::into_inner);
        let now = clock::instant();
        all.retain(|_, left| Arc::strong_count(left) > 1 || !left.is_empty(now));
        all.entry(subscriber.clone()).or_default().clone()
    }

    /// What is known of the sizes of its messages.
    fn sizes(&self, subscriber: &SubscriberName) -> Arc<Mutex<Sizes>> {
        self.0
            .sizes
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .entry(subscriber.clone())
            .or_default()
            .clone()
    }

    /// How often it does now.
    fn consumers_of(&self, subscriber: &str) -> u32 {
        self.consumers().get(subscriber).copied().unwrap_or(0)
    }

    /// Whether nobody works with these queues and nothing is in them that is not meant to be lost.
    async fn may_be_pruned(
        &self,
        broker: &mut Broker<'_>,
        subscriber: &str,
        queues: &[String],
        with_events: bool,
    ) -> Result<(), QueueError> {
        for queue in queues {
            let Some(depth) = broker.depth(queue).await? else { continue };
            if depth.consumers > 0 {
                return Err(QueueError::new(format!(
                    "somebody still works with queue `{queue}`; take `{subscriber}` out of every daemon's configuration first"
                )));
            }
            // What a walk holds is not counted.
            if broker.is_walked(queue).await? {
                return Err(QueueError::new(format!(
                    "a `hooktrail dead` command is looking at queue `{queue}`; wait for its end"
                )));
            }
            if depth.messages > 0 && !with_events {
                return Err(QueueError::new(format!(
                    "queue `{queue}` holds {} by now; nothing was deleted",
                    counted(depth.messages, "message(s)")
                )));
            }
        }
        Ok(())
    }

    /// Who was removed and not pruned. A daemon follows the record; a command reads it.
    async fn removed(&self) -> Result<BTreeSet<SubscriberName>, QueueError> {
        if self.follows() {
            Ok(self.0.removed.borrow().clone())
        } else {
            state::removed(self).await
        }
    }

    async fn depth(
        &self,
        broker: &mut Broker<'_>,
        subscriber: &str,
    ) -> Result<Option<Depth>, QueueError> {
        let topology = self.topology();
        let (events, retries, dead) = (
            broker.messages(&topology.main(subscriber)).await?,
            broker.messages(&topology.retry(subscriber)).await?,
            broker.messages(&topology.dead(subscriber)).await?,
        );
        let of = |n: Option<u64>| n.unwrap_or(0);
        let there = events.is_some() || retries.is_some() || dead.is_some();
        Ok(there.then(|| Depth {
            events: of(events),
            retries: of(retries),
            delayed: 0,
            dead: of(dead),
        }))
    }

    /// What could not be routed back to its subscriber, and invalid events of a source queue.
    ///
    /// # Errors
    /// The broker cannot be reached, or no daemon has run with this prefix.
    pub async fn orphans(&self) -> Result<DeadLetters, QueueError> {
        DeadLetters::of_orphans(self).await
    }

    /// Two channels for a subscriber's two queues.
    async fn leases(&self, suspect: bool) -> Result<[Lease; 2], QueueError> {
        if suspect {
            let own = self.0.consuming.quarantine().await?;
            return Ok([own.lease().await?, own.lease().await?]);
        }
        Ok([self.0.consuming.lease().await?, self.0.consuming.lease().await?])
    }
}

impl Queue for AmqpQueue {
    type Source = Source;
    type Settler = Settler;
    type DeadLetters = DeadLetters;

    async fn prepare(
        &self,
        subscribers: &[Arc<Subscriber>],
    ) -> Result<BTreeSet<SubscriberName>, QueueError> {
        self.publisher(); // connects meanwhile
        let mut preparing = self.outage("making queues and bindings ready");
        loop {
            match self.try_prepare(subscribers).await {
                Err(e) if !e.is_for_operator() => preparing.failed(&e).await,
                done => return done,
            }
        }
    }

    async fn chores(
        &self,
        subscribers: watch::Receiver<Subscribers>,
        stopping: watch::Receiver<bool>,
    ) {
        let relay = kept("the relay", || self.relay(subscribers.clone(), stopping.clone()));
        let others = async {
            tokio::join!(
                kept("following the record", || self.follow_state(subscribers.clone())),
                kept("the upkeep of the delay ladder", || self.keep_own()),
                kept("the sweep of orphans", || self.sweep(subscribers.clone())),
            )
        };
        tokio::select! {
            // What is stored and not acked would be relayed again by the next daemon.
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
        let name = &subscriber.name;
        let suspects = || self.0.suspects.lock().unwrap_or_else(PoisonError::into_inner);
        // With many of them it is the broker that fails, and more connections would not help it.
        let suspect =
            Some(suspects()).is_some_and(|all| all.contains(name) && all.len() <= MAX_QUARANTINES);
        if let Err(e) = self.topology().ensure_subscriber(&mut self.broker(), subscriber).await {
            // The exchange itself, perhaps, which no lane declares.
            self.0.unbound.notify_one();
            return Err(e);
        }
        let leases = self.leases(suspect).await?;
        // Counted before the broker counts it.
        let consumes = self.consumes(name);
        match Source::open(
            leases,
            self.topology(),
            self.publisher().clone(),
            subscriber,
            window,
            self.remembered(name),
            consumes,
        )
        .await
        {
            Ok(opened) => Ok(opened),
            Err(unusable) => {
                if unusable.is_broken() {
                    suspects().insert(name.clone());
                }
                Err(unusable.into_error(name))
            }
        }
    }

    async fn writable(&self) {
        let mut damaged = self.0.damaged.subscribe();
        loop {
            // An error means that whoever tells it is gone.
            damaged.wait_for(|damaged| !damaged).await.ok();
            self.publisher().writable().await;
            if !*damaged.borrow() {
                return;
            }
        }
    }

    async fn ensure(&self, subscribers: &[Arc<Subscriber>]) -> Result<(), QueueError> {
        let patterns = |s: &Arc<Subscriber>| {
            (s.name.clone(), s.events.iter().map(|p| p.as_str().to_owned()).collect())
        };
        *self.bound() = subscribers.iter().map(patterns).collect();
        let mut broker = self.broker();
        self.topology().ensure_shared(&mut broker).await?;
        for s in subscribers {
            if broker.depth(&self.topology().main(&s.name)).await?.is_none() {
                self.topology().ensure_subscriber(&mut broker, s).await?;
            }
        }
        Ok(())
    }

    async fn publish(&self, events: Vec<NewEvent>) -> Result<Vec<Published>, QueueError> {
        let message = |NewEvent { event_type, message_id, body, traceparent }| {
            let (body, properties) =
                message::event(body, message_id.as_deref(), traceparent.as_deref());
            match self.topology().intake() {
                Intake::Exchange(exchange) => Message {
                    exchange: exchange.clone(),
                    routing_key: event_type,
                    body,
                    properties,
                },
                Intake::SourceQueue(queue) => Message::to_queue(queue.clone(), body, properties),
            }
        };
        let messages: Vec<Message> = events.into_iter().map(message).collect();
        let publisher = self.publisher();
        publisher.ready().await?;
        let published = publisher.publish(messages.clone()).await;
        if published.is_err() {
            // The exchange may be gone, which costs the channel.
            self.0.unbound.notify_one();
        }
        let mut fates = published?;
        self.publish_again(&messages, &mut fates).await?;
        let published = |fate| match fate {
            Fate::Stored => Published::Stored,
            Fate::Unroutable => Published::Unmatched,
            Fate::Refused => Published::Refused,
        };
        Ok(fates.into_iter().map(published).collect())
    }

    fn is_reachable(&self) -> bool {
        self.publisher().is_writable()
            && !self.0.troubles.borrow().has(&Role::Consuming.connection())
    }

    fn troubles(&self) -> watch::Receiver<Troubles> {
        self.0.troubles.subscribe()
    }

    fn removals(&self) -> &Removals {
        &self.0.removals
    }

    fn standings(&self) -> watch::Receiver<Option<Standings>> {
        self.0.standings.subscribe()
    }

    async fn record(
        &self,
        subscriber: &SubscriberName,
        standing: Standing,
    ) -> Result<(), QueueError> {
        self.recorded().insert(subscriber.clone(), standing.clone());
        if let Err(e) =
            state::record(self.topology(), self.publisher(), subscriber, &standing).await
        {
            self.recorded().remove(subscriber);
            return Err(e);
        }
        // What is followed brings it too, a little later.
        self.0.standings.send_modify(|all| {
            if let Some(all) = all {
                Arc::make_mut(all).insert(subscriber.clone(), standing);
            }
        });
        Ok(())
    }

    async fn dead_letters(&self, subscriber: &str) -> Result<DeadLetters, QueueError> {
        DeadLetters::of_subscriber(self, subscriber).await
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

    async fn depths(&self, subscribers: &[Arc<Subscriber>]) -> Result<Depths, QueueError> {
        let mut broker = self.broker();
        let mut depths = Depths::default();
        for s in subscribers {
            if let Some(depth) = self.depth(&mut broker, &s.name).await? {
                depths.subscribers.insert(s.name.clone(), depth);
            }
        }
        let removed = self.removed().await?;
        for name in removed.into_iter().filter(|name| !depths.subscribers.contains_key(name)) {
            if let Some(depth) = self.depth(&mut broker, &name).await? {
                depths.removed.insert(name, depth);
            }
        }
        self.shared_depths(&mut broker, &mut depths).await?;
        Ok(depths)
    }

    async fn bound(&self) -> Result<BTreeSet<SubscriberName>, QueueError> {
        state::all_bound(self).await
    }

    async fn prune(
        &self,
        subscriber: &SubscriberName,
        with_events: bool,
    ) -> Result<(), QueueError> {
        let mut broker = self.broker();
        let topology = self.topology();
        let queues = topology.subscriber_queues(subscriber).map(|(queue, _)| queue);
        self.may_be_pruned(&mut broker, subscriber, &queues, with_events).await?;
        // Retries that come due from now on become orphans instead of going with their queue; what
        // came before is seen.
        topology.unbind_retry(&mut broker, subscriber).await?;
        if let Err(e) = self.may_be_pruned(&mut broker, subscriber, &queues, with_events).await {
            // If this fails, whoever configures it again binds it.
            topology.bind_retry(&mut broker, subscriber).await.ok();
            return Err(e);
        }
        for queue in &queues {
            broker.delete_queue(queue).await?;
        }
        state::forget(self.topology(), self.publisher(), subscriber).await?;
        self.0.removed.send_if_modified(|all| all.remove(subscriber));
        Ok(())
    }

    async fn inspect(&self, subscribers: &[Arc<Subscriber>]) -> Result<Vec<Finding>, QueueError> {
        doctor::inspect(self, subscribers).await
    }
}

/// Counts as a consumer of a subscriber's queue.
#[derive(Debug)]
struct Consumes {
    queue: AmqpQueue,
    subscriber: SubscriberName,
}

impl Consumes {
    /// Another consumer takes the place of the one before.
    fn begin_again(&self) {
        self.queue.begins_to_consume();
    }
}

impl Drop for Consumes {
    fn drop(&mut self) {
        let mut consumers = self.queue.consumers();
        if let Some(n) = consumers.get_mut(&self.subscriber) {
            *n -= 1;
            if *n == 0 {
                consumers.remove(&self.subscriber);
            }
        }
    }
}

async fn stopped(mut stopping: watch::Receiver<bool>) {
    stopping.wait_for(|stops| *stops).await.ok();
}

/// Does a chore, over panics too.
async fn kept<F: Future<Output = ()>>(what: &str, chore: impl Fn() -> F) {
    let mut waits = Waits::new(Duration::from_secs(1), Duration::from_secs(60));
    while AssertUnwindSafe(chore()).catch_unwind().await.is_err() {
        tracing::error!("{what} panicked and begins again");
        tokio::time::sleep(waits.grow()).await;
    }
}

//! The queue on RabbitMQ. Nothing outside of this module knows AMQP.
//!
//! - `topology`: names, declarations, conflicts
//! - `ladder`: how any delay is made of 19 queues
//! - `message`: events, envelopes and dead letters as messages
//! - `wire`: what no message may do to a connection
//! - `connection`: connecting without end, channels shared among connections
//! - `publisher`: confirmed publishing from one task
//! - `lane`: source and settler of a subscriber
//! - `state`: what earlier configurations bound
//! - `relay`: the source queue, and the sweep of orphans
//! - `dead`: looking at dead letters

mod connection;
mod dead;
mod ladder;
mod lane;
mod message;
mod publisher;
mod relay;
mod state;
mod topology;
mod wire;

use std::{
    collections::HashSet,
    sync::{Arc, Mutex, OnceLock, PoisonError},
};

use bytes::Bytes;

use self::{
    connection::{Lease, Pool, pauses},
    message::Message,
    publisher::{Fate, Publisher},
    topology::{Broker, Topology},
};
pub use self::{
    dead::{DeadLetters, Held},
    lane::{Settler, Source},
};
use crate::{
    config::{Intake, QueueConfig, Subscriber},
    queue::{Queue, QueueError, Window},
};

/// The broker and what hooktrail keeps in it. Clones are the same.
#[derive(Debug, Clone)]
pub struct AmqpQueue(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    topology: Topology,
    pool: Pool,
    publisher: OnceLock<Publisher>,
    /// Subscribers whose queue took its connection down when it was consumed: they get one of their own.
    suspects: Mutex<HashSet<String>>,
}

/// What became of published events.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Published {
    Stored,
    /// No queue is bound for its type.
    Unmatched,
    Refused,
}

/// What `repair` did with a queue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Repaired {
    Sound(String),
    Redeclared { queue: String, why: String },
}

/// A line of `check --connect`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Finding {
    Queue { name: String, messages: u32, consumers: u32 },
    Absent { name: String },
    Harmful(String),
}

impl AmqpQueue {
    pub fn new(config: QueueConfig) -> Self {
        let pool = Pool::new(config.url.clone(), "consuming");
        Self(Arc::new(Inner { topology: Topology::new(config), pool, publisher: OnceLock::new(), suspects: Mutex::default() }))
    }

    /// Looks once whether the broker can be reached, for commands that must not wait for it without end.
    ///
    /// # Errors
    /// It cannot, and why.
    pub async fn ping(&self) -> Result<(), QueueError> {
        let connection = connection::connect(self.0.topology.url(), "ping").await?;
        connection::close(&connection).await;
        Ok(())
    }

    fn topology(&self) -> &Topology {
        &self.0.topology
    }

    fn pool(&self) -> &Pool {
        &self.0.pool
    }

    fn publisher(&self) -> &Publisher {
        self.0.publisher.get_or_init(|| Publisher::start(self.0.topology.clone(), "publishing"))
    }

    async fn try_prepare(&self, subscribers: &[Arc<Subscriber>]) -> Result<(), QueueError> {
        let lease = self.pool().lease().await?;
        let connection = lease.connection();
        self.topology().ensure_shared(connection).await?;
        for s in subscribers {
            if let Err(e) = self.topology().ensure_subscriber(connection, s).await {
                tracing::error!(subscriber = s.name, error = %e, "its queues are not ready");
            }
        }
        Ok(())
    }

    /// Takes away what only earlier configurations had. Beside the lanes, because it has to publish,
    /// and a broker that blocks publishing can still be consumed.
    async fn reconcile(&self, subscribers: &[Arc<Subscriber>]) {
        let mut pauses = pauses();
        loop {
            let reconciled = async {
                let lease = self.pool().lease().await?;
                state::reconcile(self.topology(), lease.connection(), self.publisher(), subscribers).await
            };
            match reconciled.await {
                Ok(()) => return,
                Err(e) => tracing::warn!(error = %e, "bindings of earlier configurations could not be looked at; trying again"),
            }
            tokio::time::sleep(pauses.grow()).await;
        }
    }

    async fn relay(&self, subscribers: &[Arc<Subscriber>]) {
        let Intake::SourceQueue(queue) = self.topology().intake() else { return };
        // A connection of its own: a subscriber's retries must not wait behind the relay's stream.
        let publisher = Publisher::start(self.topology().clone(), "relaying");
        let mut pauses = pauses();
        loop {
            let run = async {
                let lease = self.pool().lease().await?;
                // An event relayed before a queue is bound would pass that queue by.
                for s in subscribers {
                    self.topology().ensure_subscriber(lease.connection(), s).await?;
                }
                drop(lease);
                pauses.reset();
                relay::relay(self.topology(), self.pool(), &publisher, queue, subscribers).await
            };
            if let Err(e) = run.await {
                tracing::warn!(queue, error = %e, "the relay stopped; starting it again");
            }
            tokio::time::sleep(pauses.grow()).await;
        }
    }

    async fn sweep(&self, subscribers: &[Arc<Subscriber>]) {
        let names: HashSet<String> = subscribers.iter().map(|s| s.name.clone()).collect();
        loop {
            match relay::sweep(self.topology(), self.pool(), self.publisher(), &names).await {
                Ok(0) => {}
                Ok(moved) => tracing::warn!(batches = moved, "moved orphans back into their retry queues"),
                Err(e) => tracing::warn!(error = %e, "orphans could not be looked at"),
            }
            tokio::time::sleep(relay::SWEEP_INTERVAL).await;
        }
    }

    /// Publishes events with their types as producers do, each confirmed.
    ///
    /// # Errors
    /// Not known to be stored: the broker was lost or did not answer in time.
    pub async fn publish_events(&self, events: Vec<(String, Bytes, Option<String>)>) -> Result<Vec<Published>, QueueError> {
        let messages = events.into_iter().map(|(event_type, body, id)| {
            let (body, properties) = message::event(body, id.as_deref());
            match self.topology().intake() {
                Intake::Exchange(exchange) => Message { exchange: exchange.clone(), routing_key: event_type, body, properties },
                Intake::SourceQueue(queue) => Message::to_queue(queue.clone(), body, properties),
            }
        });
        let fates = self.publisher().publish(messages.collect()).await?;
        let published = |fate| match fate {
            Fate::Stored => Published::Stored,
            Fate::Unroutable => Published::Unmatched,
            Fate::Refused => Published::Refused,
        };
        Ok(fates.into_iter().map(published).collect())
    }

    /// Declares the subscribers' queues where they are missing, so that events published before the
    /// daemon's first run wait for it.
    ///
    /// # Errors
    /// The broker refuses, and why.
    pub async fn ensure(&self, subscribers: &[Arc<Subscriber>]) -> Result<(), QueueError> {
        let lease = self.pool().lease().await?;
        let broker = Broker(lease.connection());
        self.topology().ensure_shared(lease.connection()).await?;
        for s in subscribers {
            if broker.depth(&self.topology().main(&s.name)).await?.is_none() {
                self.topology().ensure_subscriber(lease.connection(), s).await?;
            }
        }
        Ok(())
    }

    /// # Errors
    /// There is no such queue, or the broker cannot be reached.
    pub async fn dead_letters(&self, subscriber: &str) -> Result<DeadLetters, QueueError> {
        DeadLetters::open(self, subscriber).await
    }

    /// What is in the broker for this configuration, without changing anything.
    ///
    /// # Errors
    /// The broker cannot be asked.
    pub async fn inspect(&self, subscribers: &[Arc<Subscriber>]) -> Result<Vec<Finding>, QueueError> {
        let lease = self.pool().lease().await?;
        let broker = Broker(lease.connection());
        let mut findings = Vec::new();
        let shared = self.topology().shared_queues();
        let own = subscribers.iter().flat_map(|s| self.topology().subscriber_queues(&s.name));
        if let Err(e) = self.topology().inspect_intake(lease.connection()).await {
            findings.push(Finding::Harmful(e.to_string()));
        }
        for (name, arguments) in own.chain(shared) {
            match broker.depth(&name).await {
                Ok(None) => findings.push(Finding::Absent { name }),
                Err(e) => findings.push(Finding::Harmful(e.to_string())),
                Ok(Some(depth)) => {
                    // It exists, so this declares nothing and compares its arguments.
                    if let Err(e) = broker.ensure_queue(&name, arguments).await {
                        findings.push(Finding::Harmful(e.to_string()));
                    }
                    findings.push(Finding::Queue { name, messages: depth.messages, consumers: depth.consumers });
                }
            }
        }
        Ok(findings)
    }

    /// Deletes and redeclares those queues of a subscriber, and of the shared ones, that the broker
    /// has lost the use of. Sound queues are not touched.
    ///
    /// # Errors
    /// The broker cannot be reached or does not obey.
    pub async fn repair(&self, subscriber: &Subscriber) -> Result<Vec<Repaired>, QueueError> {
        let mut report = Vec::new();
        let own = self.topology().subscriber_queues(&subscriber.name);
        let mut redeclared = false;
        for (queue, arguments) in own.into_iter().chain(self.topology().shared_queues()) {
            match self.usable(&queue).await? {
                Ok(()) => report.push(Repaired::Sound(queue)),
                Err(why) => {
                    // A connection for each step: the broken queue may take it down.
                    let q = self.pool().quarantine().await?.lease().await?;
                    Broker(q.connection()).delete_queue(&queue).await?;
                    let q = self.pool().quarantine().await?.lease().await?;
                    Broker(q.connection()).ensure_queue(&queue, arguments).await?;
                    report.push(Repaired::Redeclared { queue, why });
                    redeclared = true;
                }
            }
        }
        if redeclared {
            let q = self.pool().quarantine().await?.lease().await?;
            self.topology().ensure_shared(q.connection()).await?;
            self.topology().ensure_subscriber(q.connection(), subscriber).await?;
        }
        Ok(report)
    }

    /// Whether a queue can be consumed, tried on a connection of its own. An absent one cannot.
    async fn usable(&self, queue: &str) -> Result<Result<(), String>, QueueError> {
        let lease = self.pool().quarantine().await?.lease().await?;
        Ok(lane::try_consume(&lease, queue).await.map_err(|e| e.to_string()))
    }

    /// Two channels for a subscriber's two queues.
    async fn leases(&self, suspect: bool) -> Result<[Lease; 2], QueueError> {
        if suspect {
            let own = self.pool().quarantine().await?;
            return Ok([own.lease().await?, own.lease().await?]);
        }
        Ok([self.pool().lease().await?, self.pool().lease().await?])
    }
}

impl Queue for AmqpQueue {
    type Source = Source;
    type Settler = Settler;

    async fn prepare(&self, subscribers: &[Arc<Subscriber>]) -> Result<(), QueueError> {
        let mut pauses = pauses();
        loop {
            match self.try_prepare(subscribers).await {
                Err(e) if !e.is_for_operator() => tracing::warn!(error = %e, "the broker is not ready; trying again"),
                done => return done,
            }
            tokio::time::sleep(pauses.grow()).await;
        }
    }

    async fn chores(&self, subscribers: &[Arc<Subscriber>]) {
        tokio::join!(self.reconcile(subscribers), self.relay(subscribers), self.sweep(subscribers));
    }

    async fn close(&self) {
        if let Some(publisher) = self.0.publisher.get() {
            publisher.close().await;
        }
        self.pool().close().await;
    }

    async fn open(&self, subscriber: &Subscriber, window: Window) -> Result<(Source, Settler), QueueError> {
        let name = &subscriber.name;
        let suspects = || self.0.suspects.lock().unwrap_or_else(PoisonError::into_inner);
        let suspect = suspects().contains(name);
        let leases = self.leases(suspect).await?;
        let opened = async {
            self.topology().ensure_subscriber(leases[0].connection(), subscriber).await?;
            Source::open(leases, self.topology(), self.publisher().clone(), name, window).await
        };
        let opened = opened.await;
        match &opened {
            Ok(_) => drop(suspects().remove(name)),
            // The broker closes the whole connection over a queue that it has lost the use of.
            Err(e) if e.to_string().contains("(541)") => drop(suspects().insert(name.clone())),
            Err(_) => {}
        }
        opened
    }

    async fn writable(&self) {
        self.publisher().writable().await;
    }
}

/// How many events are best published in one call: the confirms of all of them are awaited together.
pub const MAX_GROUP: usize = 1000;

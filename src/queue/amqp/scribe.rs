//! The scribe: moves events from a queue of the broker into the embedded log, and acks them when they
//! are on the disk.
//!
//! Producers publish to an exchange, from which one queue, `PREFIX.intake`, gets all that is bound; or
//! the scribe takes from a queue of its owner's. One daemon at a time takes.

use std::{collections::BTreeSet, fmt::Display, pin::pin, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use lapin::{message::Delivery, options::BasicAckOptions};
use tokio::{
    sync::watch,
    time::{MissedTickBehavior, interval, sleep, timeout},
};

use super::{
    broker_error::{BrokerError, answer},
    connection::{Dialer, Role},
    declarations::source_is_stream,
    doctor::inspect_intake,
    line::{Line, Sharing},
    message,
    pool::Pool,
    prefetch::{Sizes, size},
    relay::is_of_stream,
    requests::Broker,
    shared::{stopped, supervised},
    topology::Topology,
    unusable::Unusable,
};
use crate::{
    clock,
    config::{Intake, IntakeConfig},
    delivery::Reason,
    event::{Tenant, TenantPlace, event_type},
    failpoint::{Step, reached},
    policy::batching::BatchPolicy,
    queue::{
        MAX_GROUP, NewEvent, Queue as _, QueueError,
        embedded::{Appended, Delivered, EmbeddedQueue, Inflow, Invalid},
    },
    telemetry::{
        finding::Finding,
        metrics::Metrics,
        outage::ReportedOutage,
        troubles::{Harms, Troubles},
    },
    wording::visible,
};

/// The most events that may be on their way to the scribe; their [sizes](Sizes) may allow fewer.
const PREFETCH: u16 = 5000;

/// Bytes of events that are stored together: no more are added once these are exceeded.
const GROUP_BYTES: usize = 1 << 20;

/// The longest that an event waits for others that are stored together with it.
const GROUP_WAIT: Duration = Duration::from_millis(20);

/// Time between two checks that exchange, queue and bindings exist.
const CHECK_INTERVAL: Duration = Duration::from_secs(10);

/// A consumer that has not failed for this long works.
const STEADY: Duration = Duration::from_secs(1);

/// The longest that the last acks of a consumer take to arrive.
const LAST_ACKS: Duration = Duration::from_secs(2);

/// The longest that a start waits for the broker, which may be away.
const START_TIMEOUT: Duration = Duration::from_secs(5);

/// The scribe of a daemon. Clones share it.
#[derive(Debug, Clone)]
pub struct Scribe(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    config: IntakeConfig,
    /// Where the tenant of an event is.
    tenant: Option<TenantPlace>,
    topology: Topology,
    /// The queue that events are taken from.
    queue: String,
    pool: Pool,
    metrics: Metrics,
    troubles: watch::Sender<Troubles>,
}

/// Events that are stored together.
#[derive(Debug, Default)]
struct Group {
    events: Vec<Delivered>,
    bytes: usize,
    /// Tag of the last one.
    tag: u64,
}

impl Group {
    fn is_full(&self) -> bool {
        self.events.len() >= MAX_GROUP || self.bytes >= GROUP_BYTES
    }
}

impl Scribe {
    /// `tenant`: where that of an event is.
    pub fn new(config: IntakeConfig, tenant: Option<TenantPlace>, metrics: Metrics) -> Self {
        let topology = Topology::new(config.amqp.clone());
        let dialer = Dialer::new(config.amqp.url.clone(), metrics.clone());
        let troubles = watch::Sender::default();
        let pool = Pool::new(dialer, Role::Intake, &troubles);
        let queue = match &config.amqp.intake {
            Intake::Exchange(_) => topology.intake_queue(),
            Intake::SourceQueue(name) => name.clone(),
        };
        Self(Arc::new(Inner { config, tenant, topology, queue, pool, metrics, troubles }))
    }

    /// Checks that no events wait where this configuration does not take them. A broker that does not
    /// answer now is asked before anything is taken from it.
    ///
    /// # Errors
    /// There are, or could be.
    pub async fn may_start(&self) -> Result<(), QueueError> {
        let mut broker = Broker::new(&self.0.pool);
        match timeout(START_TIMEOUT, self.0.topology.find_former(&mut broker)).await {
            Ok(Err(e)) if e.is_for_operator() => Err(e),
            Ok(Ok(()) | Err(_)) | Err(_) => Ok(()),
        }
    }
}

impl Inflow for Scribe {
    fn run(&self, log: EmbeddedQueue, stopping: watch::Receiver<bool>) -> BoxFuture<'_, ()> {
        Box::pin(async move {
            supervised("the scribe", || self.0.run(&log, &stopping)).await;
            self.0.pool.close().await;
        })
    }

    fn troubles(&self) -> watch::Receiver<Troubles> {
        self.0.troubles.subscribe()
    }

    fn inspect(&self) -> BoxFuture<'_, Vec<Finding>> {
        Box::pin(inspect_intake(&self.0.config.amqp))
    }
}

impl Inner {
    async fn run(&self, log: &EmbeddedQueue, stopping: &watch::Receiver<bool>) {
        self.metrics.set_intake_up(false);
        let what = format!("the intake from queue `{}`", self.queue);
        let mut scribing = ReportedOutage::new(what, Harms::Queue, &self.troubles);
        let what = format!("checking what queue `{}` needs", self.queue);
        let mut checking = ReportedOutage::new(what, Harms::Queue, &self.troubles);
        loop {
            // What has come into the queue since the last session may be larger.
            let sizes = Sizes::default();
            let opened = tokio::select! {
                () = stopped(stopping.clone()) => return,
                opened = self.open(log, &sizes, &mut checking) => opened,
            };
            let ended = match opened {
                Ok(line) => {
                    let mut session = Session { scribe: self, log, line, sizes, is_active: false };
                    let ended = session.run(stopping, &mut scribing, &mut checking).await;
                    session.line.close().await;
                    ended
                }
                Err(e) => Err(e),
            };
            let Err(e) = ended else { return };
            self.metrics.set_intake_up(false);
            tokio::select! {
                () = stopped(stopping.clone()) => return,
                () = scribing.failed(&e) => {}
            }
        }
    }

    async fn open(
        &self,
        log: &EmbeddedQueue,
        sizes: &Sizes,
        checking: &mut ReportedOutage,
    ) -> Result<Line, QueueError> {
        // What is taken meanwhile would be requeued, which brokers count, and is kept from another
        // daemon.
        log.writable().await;
        let mut broker = Broker::new(&self.pool);
        self.topology.find_former(&mut broker).await?;
        self.ensure_queue(&mut broker, log).await?;
        match self.ensure_bound(&mut broker, log, false).await {
            Ok(()) => checking.recovered(),
            // What waits in the queue is taken, whatever there is to mend.
            Err(e) => checking.fails(&e),
        }
        self.is_free(&mut broker).await?;
        drop(broker);
        let lease = self.pool.lease().await?;
        let sharing = match self.config.amqp.intake {
            Intake::Exchange(_) => Sharing::SingleActive,
            Intake::SourceQueue(_) => Sharing::Exclusive,
        };
        let opened = Line::open(lease, self.queue.clone(), sharing, PREFETCH, sizes).await;
        opened.map_err(|unusable| self.unusable(&unusable))
    }

    fn error(&self, why: &BrokerError) -> QueueError {
        QueueError::new(format!("queue `{}` cannot be consumed: {why}", self.queue))
    }

    /// Waits for another consumer of a source queue. A quorum queue does not refuse a second one to
    /// an exclusive one (measured on 3.10).
    async fn is_free(&self, broker: &mut Broker<'_>) -> Result<(), QueueError> {
        let Intake::SourceQueue(queue) = &self.config.amqp.intake else { return Ok(()) };
        match broker.depth(queue).await? {
            Some(depth) if depth.consumers > 0 => Err(taken(queue)),
            _ => Ok(()),
        }
    }

    /// Makes sure that no other consumer has come between two of this daemon's. The one before counts
    /// until its acks have arrived.
    async fn is_free_again(&self) -> Result<(), QueueError> {
        let (mut broker, end) = (Broker::new(&self.pool), clock::instant() + LAST_ACKS);
        loop {
            match self.is_free(&mut broker).await {
                Err(_) if clock::instant() < end => sleep(LAST_ACKS / 50).await,
                found => return found,
            }
        }
    }

    fn unusable(&self, unusable: &Unusable) -> QueueError {
        let error = self.error(&unusable.why);
        if unusable.why.text.contains("exclusive") {
            return error.remedied(WAITS);
        }
        if unusable.is_broken() {
            return error.remedied(
                "if that stays so, the broker has lost the use of it: delete it (rabbitmqctl delete_queue), and it is declared again",
            );
        }
        error
    }

    /// Declares the queue if it is missing.
    async fn ensure_queue(
        &self,
        broker: &mut Broker<'_>,
        log: &EmbeddedQueue,
    ) -> Result<(), QueueError> {
        if let Intake::SourceQueue(_) = self.topology.intake() {
            return self.topology.find_source(broker).await;
        }
        broker.ensure_queue(&self.queue, self.topology.intake_arguments()).await?;
        if broker.take_declared().is_empty() {
            return Ok(());
        }
        let name = &self.queue;
        if log.bindings(name).await?.is_empty() {
            tracing::info!(name, "declared");
        } else {
            tracing::error!(name, "was missing and is redeclared: events that were in it are lost");
        }
        Ok(())
    }

    /// Declares the exchange if it is missing, and binds the queue as configured. What is not
    /// configured any more is unbound by the daemon that is `active`: to one that waits for the queue
    /// it is not known what that one wants.
    async fn ensure_bound(
        &self,
        broker: &mut Broker<'_>,
        log: &EmbeddedQueue,
        active: bool,
    ) -> Result<(), QueueError> {
        let Intake::Exchange(exchange) = self.topology.intake() else { return Ok(()) };
        self.topology.ensure_events(broker).await?;
        for name in broker.take_declared() {
            tracing::info!(name, "declared");
        }
        let bound = log.bindings(&self.queue).await?;
        let wanted: BTreeSet<_> =
            self.config.bind.iter().map(|p| (exchange.clone(), p.as_str().to_owned())).collect();
        if !wanted.is_subset(&bound) {
            // Before they are made, so that none is forgotten.
            log.record_bindings(&self.queue, wanted.union(&bound).cloned().collect()).await?;
        }
        for (exchange, pattern) in &wanted {
            broker.bind(&self.queue, exchange, pattern).await?;
        }
        if !active || bound.is_subset(&wanted) {
            return Ok(());
        }
        for (exchange, pattern) in bound.difference(&wanted) {
            broker.unbind(&self.queue, exchange, pattern).await?;
            tracing::info!(queue = self.queue, exchange, pattern, "unbound");
        }
        log.record_bindings(&self.queue, wanted).await
    }

    /// Checks what the queue needs, and how much waits in it.
    async fn check(&self, log: &EmbeddedQueue, active: bool) -> Result<(), QueueError> {
        let mut broker = Broker::new(&self.pool);
        self.ensure_queue(&mut broker, log).await?;
        self.ensure_bound(&mut broker, log, active).await?;
        if let Some(waiting) = broker.messages(&self.queue).await? {
            self.metrics.set_intake_waiting(waiting);
        }
        Ok(())
    }

    /// The event of a message, with the type by which it was routed. With a source queue that is the
    /// type that its body says.
    fn delivered(&self, mut delivery: Delivery) -> Delivered {
        let most = BatchPolicy::MAX_BYTES as usize;
        let key = delivery.routing_key.as_str().to_owned();
        let invalid = |reason, why: &dyn Display| Invalid {
            reason,
            error: format!("published as `{}`: {why}", visible(&key)),
        };
        let decoded = match message::decoded(&delivery.properties, &delivery.data, most) {
            Ok(None) => Ok(()),
            Ok(Some(body)) => {
                delivery.data = body;
                Ok(())
            }
            // It is kept as it arrived.
            Err(why) => Err(invalid(why.reason, &why.error)),
        };
        let checked = decoded.and_then(|()| {
            let bytes = delivery.data.len();
            if bytes > most {
                let why = format!("it has {bytes} bytes, and a request body at most {most}");
                return Err(invalid(Reason::TooLarge, &why));
            }
            event_type(&delivery.data).map_err(|why| invalid(Reason::InvalidEvent, &why))
        });
        let (event_type, invalid) = match (checked, self.topology.intake()) {
            (Ok(event_type), Intake::SourceQueue(_)) => (event_type.into_owned(), None),
            (Ok(_), Intake::Exchange(_)) => (key, None),
            (Err(invalid), _) => (key.clone(), Some(invalid)),
        };
        let is_repeated = delivery.redelivered;
        let (message_id, traceparent) = message::origin(&delivery.properties);
        let body = Bytes::from(delivery.data);
        let place = self.tenant.as_ref();
        let tenant = place.and_then(|place| {
            let beside = match place {
                TenantPlace::Header(name) => message::exact_text(&delivery.properties, name),
                TenantPlace::Pointer(_) => None,
            };
            place.tenant(beside.and_then(Tenant::try_new).as_ref(), &body)
        });
        let event = NewEvent { event_type, message_id, body, traceparent, tenant };
        Delivered { event, is_repeated, invalid }
    }
}

/// What is to be done where another consumer has a source queue.
const WAITS: &str = "a [queue] source_queue has one consumer: the daemon waits until another daemon, or another program, takes from it no more. (A classic queue with x-single-active-consumer refuses it always: declare it without that)";

fn taken(queue: &str) -> QueueError {
    QueueError::new(format!("another consumer takes from queue `{queue}`")).remedied(WAITS)
}

/// The scribe with a consumer.
struct Session<'s> {
    scribe: &'s Inner,
    log: &'s EmbeddedQueue,
    line: Line,
    sizes: Sizes,
    /// Something was delivered: no other daemon has the queue.
    is_active: bool,
}

impl Session<'_> {
    /// Stores events until that fails, or until it is stopped: what it has begun to store it acks
    /// first.
    async fn run(
        &mut self,
        stopping: &watch::Receiver<bool>,
        scribing: &mut ReportedOutage,
        checking: &mut ReportedOutage,
    ) -> Result<(), QueueError> {
        let mut checks = interval(CHECK_INTERVAL);
        checks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut steady = pin!(sleep(STEADY));
        let mut is_steady = false;
        let mut is_known = matches!(self.scribe.config.amqp.intake, Intake::Exchange(_));
        loop {
            let first = tokio::select! {
                biased;
                () = stopped(stopping.clone()) => return Ok(()),
                _ = checks.tick() => {
                    match self.scribe.check(self.log, self.is_active).await {
                        Ok(()) => checking.recovered(),
                        // What waits in the queue is taken all the same; a queue that is gone ends
                        // its consumer.
                        Err(e) => checking.fails(&e),
                    }
                    continue;
                }
                () = &mut steady, if !is_steady => {
                    is_steady = true;
                    self.works(scribing);
                    continue;
                }
                first = self.line.next() => first.map_err(|why| self.scribe.error(&why))?,
            };
            let Some(first) = first else {
                self.scribe.is_free_again().await?;
                let begun = self.line.begin(&self.sizes).await;
                begun.map_err(|unusable| self.scribe.unusable(&unusable))?;
                continue;
            };
            // Where the user may not declare the queue, only a message shows what it is.
            if !std::mem::replace(&mut is_known, true) && self.is_of_stream(&first).await? {
                return Err(source_is_stream(&self.scribe.queue));
            }
            self.is_active = true;
            let group = self.gather(first).await?;
            reached(Step::Taken);
            self.store(&group).await?;
            reached(Step::Scribed);
            let fitted = self.line.fit(&self.sizes, group.events.len()).await;
            fitted.map_err(|why| self.scribe.error(&why))?;
            self.ack(&group).await?;
            reached(Step::Acked);
            is_steady = true;
            self.works(scribing);
        }
    }

    fn works(&self, scribing: &mut ReportedOutage) {
        self.scribe.metrics.set_intake_up(true);
        scribing.recovered();
    }

    async fn is_of_stream(&self, delivery: &Delivery) -> Result<bool, QueueError> {
        let asked = is_of_stream(&self.line.lease, &self.scribe.queue, delivery).await;
        asked.map_err(|why| self.scribe.error(&why))
    }

    /// Takes the first event and those that come soon after it.
    async fn gather(&mut self, first: Delivery) -> Result<Group, QueueError> {
        let mut over = pin!(sleep(GROUP_WAIT));
        let (mut group, mut next) = (Group::default(), Some(first));
        while let Some(delivery) = next {
            group.tag = delivery.delivery_tag;
            let arrived = size(delivery.data.len(), &delivery.properties);
            let delivered = self.scribe.delivered(delivery);
            // A body that arrived compressed is larger now.
            let bytes = arrived.max(delivered.event.body.len());
            self.sizes.saw(bytes);
            group.bytes += bytes;
            group.events.push(delivered);
            // One that is taken has to be stored: the ack is for all up to the last one.
            if group.is_full() || group.events.len() >= self.line.prefetch() {
                break;
            }
            next = tokio::select! {
                biased;
                next = self.line.next() => next.map_err(|why| self.scribe.error(&why))?,
                () = &mut over => None,
            };
        }
        Ok(group)
    }

    /// Stores a group.
    ///
    /// # Errors
    /// The log refuses it, or perhaps has it: it is delivered again.
    async fn store(&self, group: &Group) -> Result<(), QueueError> {
        let Inner { queue, metrics, .. } = self.scribe;
        let results = self.log.append(&group.events).await.map_err(|why| {
            QueueError::new(format!("events of queue `{queue}` cannot be stored: {why}"))
        })?;
        for (what, result) in [
            ("stored", Appended::Stored),
            ("unmatched", Appended::Unmatched),
            ("known", Appended::Known),
            ("invalid", Appended::Invalid),
        ] {
            let events = results.iter().filter(|r| **r == result).count();
            metrics.taken_in(what, events as u64);
        }
        self.tell_invalid(group, &results);
        Ok(())
    }

    /// Tells of the dead letters among what was stored: how many there are, and why the first is one.
    fn tell_invalid(&self, group: &Group, results: &[Appended]) {
        let all = group.events.iter().zip(results);
        let new = all.filter(|(_, result)| **result == Appended::Invalid);
        let mut why = new.filter_map(|(delivered, _)| delivered.invalid.as_ref());
        if let Some(Invalid { error, .. }) = why.next() {
            tracing::warn!(
                queue = self.scribe.queue,
                messages = 1 + why.count(),
                error,
                "what is no event is a dead letter: hooktrail dead list @log"
            );
        }
    }

    async fn ack(&self, group: &Group) -> Result<(), QueueError> {
        let options = BasicAckOptions { multiple: true };
        let acked = answer(self.line.lease.channel.basic_ack(group.tag, options)).await;
        acked.map_err(|why| self.scribe.error(&why))
    }
}

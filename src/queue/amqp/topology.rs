//! Queues, exchanges and bindings: what they are called, and how they come to be.

use std::collections::BTreeSet;

use lapin::{
    Channel, ExchangeKind,
    options::{
        BasicGetOptions, ExchangeBindOptions, ExchangeDeclareOptions, ExchangeDeleteOptions,
        ExchangeUnbindOptions, QueueBindOptions, QueueDeclareOptions, QueueDeleteOptions,
    },
    types::{AMQPValue, FieldTable},
};

use super::{
    connection::{BrokerError, CHANNELS_PER_CONNECTION, Lease, NOT_FOUND, Pool, answer},
    ladder,
};
use crate::{
    clock,
    config::{AmqpConfig, Intake, Subscriber},
    crypto::secret::SecretUrl,
    failpoint::{Step, reached},
    queue::QueueError,
};

/// More deliveries than ever happen. Off (`-1`) means the opposite on RabbitMQ 3.10, where the
/// first requeue drops the message; and 4.x has a limit of 20 unless told otherwise.
pub(super) const DELIVERY_LIMIT: i64 = 1_000_000_000;

/// Knows the names, and declares what is missing.
#[derive(Debug, Clone)]
pub(super) struct Topology {
    config: AmqpConfig,
}

/// What a configuration needs of the broker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Footprint {
    pub queues: usize,
    /// How many of them all subscribers share.
    pub shared: usize,
    /// Of each node that has a copy of each queue; about.
    pub descriptors: usize,
    /// Of each daemon.
    pub connections: usize,
}

/// File descriptors that a quorum queue takes of a node (measured on 3.10: about 300 queues exhaust
/// 927).
pub(super) const DESCRIPTORS_PER_QUEUE: usize = 3;

/// What so many subscribers need of the broker; `relays`: their events come from a source queue.
pub fn footprint(subscribers: usize, relays: bool) -> Footprint {
    // The ladder, the orphans, the record.
    let shared = ladder::LEVELS as usize + 2;
    let queues = 3 * subscribers + shared;
    let consuming = (2 * subscribers + usize::from(relays)).div_ceil(CHANNELS_PER_CONNECTION);
    // One to publish, one to declare.
    let connections = 2 + usize::from(relays) + consuming;
    Footprint { queues, shared, descriptors: DESCRIPTORS_PER_QUEUE * queues, connections }
}

/// What a queue is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part<'n> {
    Main(&'n str),
    Retry(&'n str),
    Dead(&'n str),
    Level(u32),
    Orphans,
    State,
}

/// What there is in a queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Depth {
    pub(super) messages: u32,
    pub(super) consumers: u32,
}

impl Topology {
    pub(super) fn new(config: AmqpConfig) -> Self {
        Self { config }
    }

    pub(super) fn url(&self) -> &SecretUrl {
        &self.config.url
    }

    pub(super) fn management_url(&self) -> Option<&SecretUrl> {
        self.config.management_url.as_deref()
    }

    pub(super) fn prefix(&self) -> &str {
        &self.config.prefix
    }

    pub(super) fn intake(&self) -> &Intake {
        &self.config.intake
    }

    fn named(&self, rest: &str) -> String {
        format!("{}.{rest}", self.config.prefix)
    }

    pub(super) fn main(&self, subscriber: &str) -> String {
        self.named(&format!("sub.{subscriber}"))
    }

    pub(super) fn retry(&self, subscriber: &str) -> String {
        self.named(&format!("sub.{subscriber}.retry"))
    }

    pub(super) fn dead(&self, subscriber: &str) -> String {
        self.named(&format!("sub.{subscriber}.dead"))
    }

    /// The queue and the exchange of a level of the ladder.
    pub(super) fn level(&self, level: u32) -> String {
        self.named(&format!("delay.{level:02}"))
    }

    /// The exchange at the end of the ladder.
    pub(super) fn due(&self) -> String {
        self.named("delay")
    }

    /// The queue and the exchange for what could not be routed back.
    pub(super) fn orphans(&self) -> String {
        self.named("orphans")
    }

    pub(super) fn state(&self) -> String {
        self.named("state")
    }

    pub(super) fn snapshot(&self) -> String {
        self.named("state.snapshot")
    }

    /// A queue that nobody has and nobody will.
    pub(super) fn nobodys(&self) -> String {
        self.named(&format!("nobodys-{}", clock::batch_id()))
    }

    /// The exchange that subscribers' queues are bound to.
    pub(super) fn events(&self) -> String {
        match &self.config.intake {
            Intake::Exchange(name) => name.clone(),
            Intake::SourceQueue(_) => self.named("events"),
        }
    }

    /// The exchange of [`witness`](Self::ensure_witness).
    pub(super) fn witness(&self) -> String {
        self.named("witness")
    }

    /// What belongs to no subscriber: the events' exchange, the ladder, the orphans.
    pub(super) async fn ensure_shared(&self, broker: &mut Broker<'_>) -> Result<(), QueueError> {
        self.ensure_events(broker).await?;
        self.ensure_own(broker).await
    }

    /// What of that nobody else has any business with: the ladder and the orphans.
    pub(super) async fn ensure_own(&self, broker: &mut Broker<'_>) -> Result<(), QueueError> {
        let orphans = self.orphans();
        broker.ensure_queue(&orphans, keeping_arguments()).await?;
        broker.exchange(&orphans, ExchangeKind::Fanout, FieldTable::default()).await?;
        broker.bind(&orphans, &orphans, "").await?;
        // Without it a message for a subscriber whose retry queue is gone would stick in a level,
        // and 32 of them wedge it.
        broker
            .exchange(
                &self.due(),
                ExchangeKind::Topic,
                table(&[("alternate-exchange", text(&orphans))]),
            )
            .await?;
        for level in 0..ladder::LEVELS {
            broker.exchange(&self.level(level), ExchangeKind::Topic, FieldTable::default()).await?;
        }
        for level in 0..ladder::LEVELS {
            let name = self.level(level);
            let below = if level == 0 { self.due() } else { self.level(level - 1) };
            broker.ensure_queue(&name, self.level_arguments(level)).await?;
            broker.bind(&name, &name, &ladder::binding_key(level, '1')).await?;
            broker.bind_exchange(&below, &name, &ladder::binding_key(level, '0')).await?;
        }
        Ok(())
    }

    /// Whether the exchange that producers publish to is there.
    pub(super) async fn has_events(&self, broker: &mut Broker<'_>) -> Result<bool, QueueError> {
        broker.has_exchange(&self.events()).await
    }

    /// Whether the witness is there: an exchange that nobody publishes to, bound to the one of the
    /// events. It is deleted with its last binding, and so with that exchange: whoever deletes the
    /// events' exchange and declares it anew takes all bindings away, and this is the only thing
    /// that AMQP shows of it.
    pub(super) async fn has_witness(&self, broker: &mut Broker<'_>) -> Result<bool, QueueError> {
        broker.has_exchange(&self.witness()).await
    }

    /// Declares the witness. Who may not bind it has one that never goes, and so tells nothing.
    pub(super) async fn ensure_witness(&self, broker: &mut Broker<'_>) -> Result<(), QueueError> {
        let witness = self.witness();
        let options = ExchangeDeclareOptions {
            durable: true,
            auto_delete: true,
            ..ExchangeDeclareOptions::default()
        };
        let declared = broker
            .ask(async |c| {
                c.exchange_declare(
                    witness.as_str().into(),
                    ExchangeKind::Fanout,
                    options,
                    FieldTable::default(),
                )
                .await
            })
            .await;
        declared.map_err(|e| e.into_error("exchange", &witness))?;
        broker.bind_exchange(&self.events(), &witness, "").await
    }

    /// From then on the witness is not one of that exchange any more.
    pub(super) async fn release_witness(
        &self,
        broker: &mut Broker<'_>,
        exchange: &str,
    ) -> Result<(), QueueError> {
        let witness = self.witness();
        let unbound = broker.ask(async |c| {
            let options = ExchangeUnbindOptions::default();
            c.exchange_unbind(
                exchange.into(),
                witness.as_str().into(),
                "".into(),
                options,
                FieldTable::default(),
            )
            .await
        });
        match unbound.await {
            Ok(()) | Err(Refused::NotFound) => Ok(()),
            Err(e) => Err(e.into_error("exchange", &witness)),
        }
    }

    /// Looks at where events come from, and declares nothing that is not there.
    pub(super) async fn inspect_intake(&self, broker: &mut Broker<'_>) -> Result<(), QueueError> {
        match &self.config.intake {
            Intake::Exchange(_) => {
                if self.has_events(broker).await? {
                    self.ensure_events(broker).await
                } else {
                    Ok(())
                }
            }
            Intake::SourceQueue(_) => self.find_source(broker).await,
        }
    }

    /// Whether the source queue is there, if events come from one, and can be taken from without a
    /// loss.
    pub(super) async fn find_source(&self, broker: &mut Broker<'_>) -> Result<(), QueueError> {
        let Intake::SourceQueue(queue) = &self.config.intake else { return Ok(()) };
        if broker.depth(queue).await?.is_none() {
            let missing = format!(
                "[queue] source_queue `{queue}` does not exist; hooktrail takes from it but does not declare it"
            );
            return Err(QueueError::needs_operator(missing));
        }
        if broker.is_stream(queue).await { Err(source_is_stream(queue)) } else { Ok(()) }
    }

    pub(super) async fn ensure_events(&self, broker: &mut Broker<'_>) -> Result<(), QueueError> {
        let events = self.events();
        broker.ensure_exchange(&events).await.map_err(|e| match (&e, &self.config.intake) {
            (Refused::Inequivalent { argument, wanted, found }, Intake::Exchange(_)) if argument == "type" => {
                QueueError::needs_operator(format!(
                    "exchange `{events}` is of type {found}, not {wanted}: it cannot route by patterns; \
                 bind a queue of your own to it and name that as [queue] source_queue instead of exchange"
                ))
            }
            _ => e.into_error("exchange", &events),
        })
    }

    fn level_arguments(&self, level: u32) -> FieldTable {
        let below = if level == 0 { self.due() } else { self.level(level - 1) };
        let ttl = i64::from(1_u32 << level) * 1000;
        let [a, b, c] = at_least_once(&below);
        quorum(&[("x-message-ttl", AMQPValue::LongLongInt(ttl)), a, b, c])
    }

    /// The arguments of a subscriber's main and retry queue: what a policy of the broker's owner
    /// makes the broker throw out goes into the dead queue, at least once, instead of nowhere.
    fn working_arguments(&self, subscriber: &str) -> FieldTable {
        let [a, b, c] = at_least_once("");
        quorum(&[("x-dead-letter-routing-key", text(&self.dead(subscriber))), a, b, c])
    }

    /// What a subscriber needs beside its events: where its retries and dead letters go.
    pub(super) async fn ensure_ways_back(
        &self,
        broker: &mut Broker<'_>,
        subscriber: &str,
    ) -> Result<(), QueueError> {
        let [dead, retry, _] = self.subscriber_queues(subscriber);
        for (queue, arguments) in [dead, retry] {
            broker.ensure_queue(&queue, arguments).await?;
        }
        self.bind_retry(broker, subscriber).await
    }

    /// A subscriber's three queues and their bindings.
    pub(super) async fn ensure_subscriber(
        &self,
        broker: &mut Broker<'_>,
        subscriber: &Subscriber,
    ) -> Result<(), QueueError> {
        let name = &subscriber.name;
        for (queue, arguments) in self.subscriber_queues(name) {
            broker.ensure_queue(&queue, arguments).await?;
        }
        // The retry queue is bound before anything can be sent up the ladder for it.
        self.bind_retry(broker, name).await?;
        for pattern in &subscriber.events {
            broker.bind(&self.main(name), &self.events(), pattern.as_str()).await?;
        }
        Ok(())
    }

    /// The same for a subscriber that had them: declares of its queues those that are missing, and
    /// binds `patterns`.
    pub(super) async fn put_back_subscriber(
        &self,
        broker: &mut Broker<'_>,
        name: &str,
        patterns: &BTreeSet<String>,
    ) -> Result<(), QueueError> {
        for (queue, arguments) in self.subscriber_queues(name) {
            if broker.depth(&queue).await?.is_none() {
                broker.ensure_queue(&queue, arguments).await?;
            }
        }
        self.bind_retry(broker, name).await?;
        for pattern in patterns {
            broker.bind(&self.main(name), &self.events(), pattern).await?;
        }
        Ok(())
    }

    pub(super) async fn bind_retry(
        &self,
        broker: &mut Broker<'_>,
        name: &str,
    ) -> Result<(), QueueError> {
        broker.bind(&self.retry(name), &self.due(), &format!("#.{name}")).await
    }

    /// From then on nothing comes back from the ladder for this subscriber.
    pub(super) async fn unbind_retry(
        &self,
        broker: &mut Broker<'_>,
        name: &str,
    ) -> Result<(), QueueError> {
        broker.unbind(&self.retry(name), &self.due(), &format!("#.{name}")).await
    }

    /// Every queue of a subscriber with its arguments, in the order they are to be declared.
    pub(super) fn subscriber_queues(&self, name: &str) -> [(String, FieldTable); 3] {
        let working = || self.working_arguments(name);
        [
            (self.dead(name), keeping_arguments()),
            (self.retry(name), working()),
            (self.main(name), working()),
        ]
    }

    /// The queues that all subscribers share.
    pub(super) fn shared_queues(&self) -> Vec<(String, FieldTable)> {
        let levels = (0..ladder::LEVELS).map(|l| (self.level(l), self.level_arguments(l)));
        std::iter::once((self.orphans(), keeping_arguments())).chain(levels).collect()
    }

    /// What a queue's name says that it is for.
    pub(super) fn part<'n>(&self, queue: &'n str) -> Option<Part<'n>> {
        let rest = queue.strip_prefix(&self.config.prefix)?.strip_prefix('.')?;
        match rest.split('.').collect::<Vec<_>>()[..] {
            ["sub", name] => Some(Part::Main(name)),
            ["sub", name, "retry"] => Some(Part::Retry(name)),
            ["sub", name, "dead"] => Some(Part::Dead(name)),
            ["delay", level] => level.parse().ok().map(Part::Level),
            ["orphans"] => Some(Part::Orphans),
            ["state"] => Some(Part::State),
            _ => None,
        }
    }

    /// Every exchange, the one that producers publish to among them.
    pub(super) fn exchanges(&self) -> Vec<String> {
        (0..ladder::LEVELS)
            .map(|l| self.level(l))
            .chain([self.due(), self.orphans(), self.events()])
            .collect()
    }

    /// The stream of changes.
    pub(super) async fn ensure_state(&self, broker: &mut Broker<'_>) -> Result<(), QueueError> {
        let arguments = table(&[("x-queue-type", text("stream"))]);
        broker.ensure_queue(&self.state(), arguments).await.map_err(|e| {
            let hint = if e.to_string().contains("feature flag") {
                "; enable it: rabbitmqctl enable_feature_flag stream_queue"
            } else {
                ""
            };
            QueueError::new(format!("{e}{hint}"))
        })
    }

    pub(super) async fn ensure_snapshot(&self, broker: &mut Broker<'_>) -> Result<(), QueueError> {
        let arguments = table(&[
            ("x-queue-type", text("stream")),
            // The newest segment stays in any case, and with it the newest snapshot.
            ("x-max-length-bytes", AMQPValue::LongLongInt(64 << 20)),
            ("x-stream-max-segment-size-bytes", AMQPValue::LongLongInt(16 << 20)),
        ]);
        broker.ensure_queue(&self.snapshot(), arguments).await
    }
}

/// An exclusive queue that lives as long as a walk through `queue`: what a walk has passed by is
/// unacknowledged and not counted, so that the queue looks empty to everybody else.
pub(super) fn walk_of(queue: &str) -> String {
    format!("{queue}.walk")
}

/// Dead-letters at least once. Without `reject-publish` the broker silently falls back to at most
/// once.
fn at_least_once(exchange: &str) -> [(&'static str, AMQPValue); 3] {
    [
        ("x-dead-letter-exchange", text(exchange)),
        ("x-dead-letter-strategy", text("at-least-once")),
        ("x-overflow", text("reject-publish")),
    ]
}

fn text(value: &str) -> AMQPValue {
    AMQPValue::LongString(value.into())
}

fn table(pairs: &[(&str, AMQPValue)]) -> FieldTable {
    let mut t = FieldTable::default();
    for (k, v) in pairs {
        t.insert((*k).into(), v.clone());
    }
    t
}

fn quorum(more: &[(&str, AMQPValue)]) -> FieldTable {
    let mut t = table(more);
    t.insert("x-queue-type".into(), text("quorum"));
    t.insert("x-delivery-limit".into(), AMQPValue::LongLongInt(DELIVERY_LIMIT));
    t
}

/// The arguments of a queue that keeps what it has: under a policy of the broker's owner that
/// limits its length it takes no more, where by default it would throw out the oldest.
fn keeping_arguments() -> FieldTable {
    quorum(&[("x-overflow", text("reject-publish"))])
}

/// A stream keeps what was taken: who comes back reads it again from its beginning, or misses what
/// came meanwhile.
pub(super) fn source_is_stream(queue: &str) -> QueueError {
    QueueError::needs_operator(format!(
        "[queue] source_queue `{queue}` is a stream: hooktrail keeps no position in it, so that what comes while no daemon reads it \
         would never be delivered"
    ))
    .remedied("bind a quorum queue to the exchange that fills the stream, and name that as source_queue")
}

/// Why the broker did not do what it was asked.
pub(super) enum Refused {
    NotFound,
    /// It exists with another value of an argument.
    Inequivalent {
        argument: String,
        wanted: String,
        found: String,
    },
    Forbidden(String),
    Other(String),
}

impl Refused {
    fn from_error(e: &BrokerError) -> Self {
        let message = e.to_string();
        match e.code {
            Some(NOT_FOUND) => Self::NotFound,
            Some(403) => Self::Forbidden(message),
            Some(406) => inequivalent(&message).unwrap_or(Self::Other(message)),
            _ => Self::Other(message),
        }
    }

    pub(super) fn into_error(self, what: &str, name: &str) -> QueueError {
        match self {
            Self::NotFound => QueueError::new(format!("{what} `{name}` does not exist")),
            Self::Inequivalent { argument, wanted, found } => QueueError::needs_operator(format!(
                "{what} `{name}` exists with {argument} = {found}, where hooktrail needs {wanted}: with that it can lose events; \
                 delete it when it is empty, or choose another [queue] prefix"
            )),
            Self::Forbidden(why) => QueueError::needs_operator(format!(
                "{what} `{name}`: the user of [queue] url may not do this: {why}"
            )),
            Self::Other(why) => QueueError::new(format!("{what} `{name}`: {why}")),
        }
    }
}

/// Reads the broker's `inequivalent arg 'A' for queue 'Q' in vhost 'V': received 'X' but current is
/// 'Y'`.
fn inequivalent(message: &str) -> Option<Refused> {
    let rest = message.split_once("inequivalent arg '")?.1;
    let (argument, rest) = rest.split_once('\'')?;
    let (_, rest) = rest.split_once("received ")?;
    let (wanted, found) = rest.split_once(" but current is ")?;
    // "none", or "the value 'X' of type 'longstr'", or just "'X'".
    let value =
        |s: &str| match s.split('\'').nth(1).unwrap_or(s.split_whitespace().next().unwrap_or(s)) {
            "" => "\"\"".to_owned(), // the default exchange
            value => value.to_owned(),
        };
    Some(Refused::Inequivalent {
        argument: argument.to_owned(),
        wanted: value(wanted),
        found: value(found),
    })
}

/// Requests that the broker may refuse, one after the other. A refusal closes their channel, and
/// the next request gets another.
pub(super) struct Broker<'p> {
    pool: &'p Pool,
    lease: Option<Lease>,
    /// Queues and exchanges that were not there and are now.
    declared: Vec<String>,
}

impl<'p> Broker<'p> {
    pub(super) fn new(pool: &'p Pool) -> Self {
        Self { pool, lease: None, declared: Vec::new() }
    }

    /// Queues and exchanges that were declared since this was asked last.
    pub(super) fn take_declared(&mut self) -> Vec<String> {
        std::mem::take(&mut self.declared)
    }

    async fn ask<T>(
        &mut self,
        request: impl AsyncFnOnce(&Channel) -> lapin::Result<T>,
    ) -> Result<T, Refused> {
        let lease = match self.lease.take().filter(|l| l.channel.status().connected()) {
            Some(lease) => lease,
            None => self.pool.lease().await.map_err(|e| Refused::Other(e.to_string()))?,
        };
        let answer = answer(request(&lease.channel)).await.map_err(|e| Refused::from_error(&e))?;
        self.lease = Some(lease);
        reached(Step::Declared);
        Ok(answer)
    }

    /// What is in a queue; `None` if there is no such queue.
    pub(super) async fn depth(&mut self, queue: &str) -> Result<Option<Depth>, QueueError> {
        let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
        match self
            .ask(async |c| c.queue_declare(queue.into(), passive, FieldTable::default()).await)
            .await
        {
            Ok(q) => Ok(Some(Depth { messages: q.message_count(), consumers: q.consumer_count() })),
            Err(Refused::NotFound) => Ok(None),
            Err(other) => Err(other.into_error("queue", queue)),
        }
    }

    /// Whether a walk goes through a queue; see [`walk_of`].
    pub(super) async fn is_walked(&mut self, queue: &str) -> Result<bool, QueueError> {
        let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
        let walk = walk_of(queue);
        match self
            .ask(async |c| {
                c.queue_declare(walk.as_str().into(), passive, FieldTable::default()).await
            })
            .await
        {
            Ok(_) => Ok(true),
            Err(Refused::NotFound) => Ok(false),
            Err(Refused::Other(why)) if why.contains("RESOURCE_LOCKED") => Ok(true),
            Err(other) => Err(other.into_error("queue", &walk)),
        }
    }

    /// Whether a queue that is there is a stream: the broker says so when it is declared with a
    /// type that does not exist, which declares nothing. Who may not declare it is not told.
    pub(super) async fn is_stream(&mut self, queue: &str) -> bool {
        let asked = self.compare(queue, table(&[("x-queue-type", text("hooktrail-asks"))])).await;
        matches!(asked, Err(Refused::Inequivalent { argument, found, .. }) if argument == "x-queue-type" && found == "stream")
    }

    /// How many messages are ready in a queue; `None` if there is no such queue.
    pub(super) async fn messages(&mut self, queue: &str) -> Result<Option<u64>, QueueError> {
        Ok(self.depth(queue).await?.map(|d| d.messages.into()))
    }

    /// Declares a queue if it is absent, and compares its arguments if it is there.
    pub(super) async fn ensure_queue(
        &mut self,
        queue: &str,
        arguments: FieldTable,
    ) -> Result<(), QueueError> {
        let existed = self.depth(queue).await?.is_some();
        let keeps = arguments == keeping_arguments();
        let durable = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
        match self.ask(async |c| c.queue_declare(queue.into(), durable, arguments).await).await {
            Ok(_) => {
                if !existed {
                    tracing::debug!(queue, "declared");
                    self.declared.push(queue.to_owned());
                }
                Ok(())
            }
            // Whoever may not declare can still use what somebody else declared.
            Err(Refused::Forbidden(_)) if existed => Ok(()),
            // What keeps dead letters and has no limit serves as well without it.
            Err(Refused::Inequivalent { argument, .. }) if keeps && argument == "x-overflow" => {
                Ok(())
            }
            Err(other) => Err(other.into_error("queue", queue)),
        }
    }

    /// Whether one more queue could be declared: tried with one that only this connection has and
    /// that is deleted at once.
    pub(super) async fn try_declare(&mut self, name: &str) -> Result<(), Refused> {
        let exclusive = QueueDeclareOptions {
            exclusive: true,
            auto_delete: true,
            ..QueueDeclareOptions::default()
        };
        self.ask(async |c| c.queue_declare(name.into(), exclusive, FieldTable::default()).await)
            .await?;
        self.ask(async |c| c.queue_delete(name.into(), QueueDeleteOptions::default()).await)
            .await
            .map(drop)
    }

    /// Compares the arguments of a queue that is there. Whoever may not declare it cannot.
    pub(super) async fn compare(
        &mut self,
        queue: &str,
        arguments: FieldTable,
    ) -> Result<(), Refused> {
        let durable = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
        self.ask(async |c| c.queue_declare(queue.into(), durable, arguments).await).await.map(drop)
    }

    /// What the user may not do of what hooktrail does: tried with a queue and a routing key that
    /// nobody has, so that nothing changes. RabbitMQ looks at permissions before it looks whether
    /// there is such a thing.
    pub(super) async fn forbidden(&mut self, queue: &str, exchange: &str) -> Vec<String> {
        let mut forbidden = Vec::new();
        let mut refused = |what: &str, answer: Result<(), Refused>| {
            if let Err(Refused::Forbidden(_)) = answer {
                forbidden.push(what.to_owned());
            }
        };
        let unused =
            QueueDeleteOptions { if_unused: true, if_empty: true, ..QueueDeleteOptions::default() };
        refused(
            "configure its queues",
            self.ask(async |c| c.queue_delete(queue.into(), unused).await.map(drop)).await,
        );
        refused(
            "read its queues",
            self.ask(async |c| {
                c.basic_get(queue.into(), BasicGetOptions::default()).await.map(drop)
            })
            .await,
        );
        let unbound = self
            .ask(async |c| {
                c.queue_unbind(queue.into(), exchange.into(), queue.into(), FieldTable::default())
                    .await
            })
            .await;
        let reads_exchange = format!("read exchange `{exchange}`");
        match &unbound {
            Err(Refused::Forbidden(why)) if why.contains("exchange '") => {
                refused(&reads_exchange, unbound)
            }
            _ => refused("write to its queues", unbound),
        }
        let writes = self.ask(async |c| {
            let (to, from) = (exchange.into(), exchange.into());
            c.exchange_unbind(
                to,
                from,
                queue.into(),
                ExchangeUnbindOptions::default(),
                FieldTable::default(),
            )
            .await
        });
        let writes = writes.await;
        if !forbidden.contains(&reads_exchange) && matches!(writes, Err(Refused::Forbidden(_))) {
            forbidden.push(format!("write to exchange `{exchange}`"));
        }
        forbidden
    }

    async fn declare_exchange(
        &mut self,
        name: &str,
        kind: ExchangeKind,
        passive: bool,
        arguments: FieldTable,
    ) -> Result<(), Refused> {
        let options =
            ExchangeDeclareOptions { durable: true, passive, ..ExchangeDeclareOptions::default() };
        self.ask(async |c| c.exchange_declare(name.into(), kind, options, arguments).await).await
    }

    /// Whether there is such an exchange, of whatever type.
    pub(super) async fn has_exchange(&mut self, name: &str) -> Result<bool, QueueError> {
        match self.declare_exchange(name, ExchangeKind::Topic, true, FieldTable::default()).await {
            Ok(()) => Ok(true),
            Err(Refused::NotFound) => Ok(false),
            Err(e) => Err(e.into_error("exchange", name)),
        }
    }

    /// The exchange that producers publish to: declared if absent; otherwise only its type matters.
    async fn ensure_exchange(&mut self, name: &str) -> Result<(), Refused> {
        let existed = match self
            .declare_exchange(name, ExchangeKind::Topic, true, FieldTable::default())
            .await
        {
            Ok(()) => true,
            Err(Refused::NotFound) => false,
            Err(other) => return Err(other),
        };
        match self.declare_exchange(name, ExchangeKind::Topic, false, FieldTable::default()).await {
            Ok(()) => {
                if !existed {
                    self.declared.push(name.to_owned());
                }
                Ok(())
            }
            // An alternate exchange, say, or one that is deleted with its last binding: the owner's
            // choice.
            Err(Refused::Inequivalent { argument, .. }) if existed && argument != "type" => Ok(()),
            Err(Refused::Forbidden(_)) if existed => Ok(()),
            Err(other) => Err(other),
        }
    }

    /// An exchange of hooktrail's own.
    async fn exchange(
        &mut self,
        name: &str,
        kind: ExchangeKind,
        arguments: FieldTable,
    ) -> Result<(), QueueError> {
        let exists =
            self.declare_exchange(name, kind.clone(), true, FieldTable::default()).await.is_ok();
        match self.declare_exchange(name, kind, false, arguments).await {
            Err(Refused::Forbidden(_)) if exists => Ok(()),
            Ok(()) if !exists => {
                self.declared.push(name.to_owned());
                Ok(())
            }
            answer => answer.map_err(|e| e.into_error("exchange", name)),
        }
    }

    pub(super) async fn bind(
        &mut self,
        queue: &str,
        exchange: &str,
        key: &str,
    ) -> Result<(), QueueError> {
        let bound = self.ask(async |c| {
            c.queue_bind(
                queue.into(),
                exchange.into(),
                key.into(),
                QueueBindOptions::default(),
                FieldTable::default(),
            )
            .await
        });
        bound.await.map_err(|e| match e {
            Refused::NotFound => {
                QueueError::new(format!("queue `{queue}` cannot be bound: exchange `{exchange}` does not exist, or the queue does not"))
            }
            e => e.into_error("the binding of queue", queue),
        })
    }

    pub(super) async fn unbind(
        &mut self,
        queue: &str,
        exchange: &str,
        key: &str,
    ) -> Result<(), QueueError> {
        let unbound = self.ask(async |c| {
            c.queue_unbind(queue.into(), exchange.into(), key.into(), FieldTable::default()).await
        });
        match unbound.await {
            Ok(()) | Err(Refused::NotFound) => Ok(()),
            Err(e) => Err(e.into_error("the binding of queue", queue)),
        }
    }

    pub(super) async fn delete_queue(&mut self, queue: &str) -> Result<(), QueueError> {
        let deleted =
            self.ask(async |c| c.queue_delete(queue.into(), QueueDeleteOptions::default()).await);
        match deleted.await {
            Ok(_) | Err(Refused::NotFound) => Ok(()),
            Err(e) => Err(e.into_error("queue", queue)),
        }
    }

    pub(super) async fn delete_exchange(&mut self, exchange: &str) -> Result<(), QueueError> {
        let deleted = self.ask(async |c| {
            c.exchange_delete(exchange.into(), ExchangeDeleteOptions::default()).await
        });
        deleted.await.map_err(|e| e.into_error("exchange", exchange))
    }

    async fn bind_exchange(&mut self, to: &str, from: &str, key: &str) -> Result<(), QueueError> {
        let bound = self.ask(async |c| {
            c.exchange_bind(
                to.into(),
                from.into(),
                key.into(),
                ExchangeBindOptions::default(),
                FieldTable::default(),
            )
            .await
        });
        bound.await.map_err(|e| e.into_error("the binding of exchange", to))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_brokers_word_of_a_conflict_is_understood() {
        for (message, argument, wanted, found) in [
            (
                "PRECONDITION_FAILED - inequivalent arg 'type' for exchange 'audit' in vhost '/': received 'topic' but current is 'fanout' (406)",
                "type",
                "topic",
                "fanout",
            ),
            (
                "PRECONDITION_FAILED - inequivalent arg 'x-delivery-limit' for queue 'q' in vhost '/': received none but current is the value '5' of type 'signedint' (406)",
                "x-delivery-limit",
                "none",
                "5",
            ),
            (
                "PRECONDITION_FAILED - inequivalent arg 'x-queue-type' for queue 'q' in vhost '/': received the value 'quorum' of type 'longstr' but current is none (406)",
                "x-queue-type",
                "quorum",
                "none",
            ),
            (
                "PRECONDITION_FAILED - inequivalent arg 'x-dead-letter-exchange' for queue 'q' in vhost '/': received the value '' of type 'longstr' but current is none (406)",
                "x-dead-letter-exchange",
                "\"\"",
                "none",
            ),
        ] {
            match inequivalent(message) {
                Some(Refused::Inequivalent { argument: a, wanted: w, found: f }) => {
                    assert_eq!((a.as_str(), w.as_str(), f.as_str()), (argument, wanted, found))
                }
                _ => panic!("{message}"),
            }
        }
        assert!(inequivalent("PRECONDITION_FAILED - something else").is_none());
    }
}

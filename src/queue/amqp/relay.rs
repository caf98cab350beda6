//! The relay from a source queue.

use bytes::Bytes;
use futures_util::{FutureExt as _, StreamExt as _};
use lapin::{
    Consumer,
    message::Delivery,
    options::{
        BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicQosOptions,
        QueueDeclareOptions,
    },
    types::FieldTable,
};
use tokio::sync::{Notify, watch};

use super::{
    broker_error::{BrokerError, answer},
    connection::Role,
    declarations::source_is_stream,
    message::{self, Message},
    pool::{Lease, Pool},
    prefetch::{Sizes, is_other, size},
    publisher::{PublishResult, Publisher},
    shared::{Shared, stopped},
    topology::Topology,
};
use crate::{
    clock,
    config::{Intake, Subscribers},
    delivery::{DeadLetter, Reason},
    event::event_type,
    failpoint::{Step, reached},
    policy::batching::BatchPolicy,
    queue::QueueError,
    telemetry::{
        metrics::Metrics,
        outage::ReportedOutage,
        troubles::{Harms, Troubles},
    },
};

/// The most messages that may be on their way to the relay; their [sizes](Sizes) may allow fewer.
const PREFETCH: u16 = 500;

/// Messages that are published together, and their bytes: no more are added once these are
/// exceeded.
const GROUP: usize = 250;
const GROUP_BYTES: usize = 16 << 20;

/// Takes events from the source queue and republishes them by their type.
pub(super) struct Relay<'a> {
    pub(super) topology: &'a Topology,
    pub(super) pool: &'a Pool,
    pub(super) publisher: &'a Publisher,
    pub(super) metrics: &'a Metrics,
    pub(super) queue: &'a str,
    pub(super) subscribers: &'a watch::Receiver<Subscribers>,
    pub(super) stopping: &'a watch::Receiver<bool>,
    /// Notified when no queue is bound for a wanted event.
    pub(super) unbound: &'a Notify,
    pub(super) troubles: &'a watch::Sender<Troubles>,
    pub(super) shared: &'a Shared,
}

/// A consumer of the source queue.
pub(super) struct Opened {
    lease: Lease,
    consumer: Consumer,
    prefetch: u16,
}

/// Messages that are published together.
struct Group {
    messages: Vec<Message>,
    /// Tag of the last one.
    tag: u64,
    /// The consumer's stream has ended behind them.
    is_last: bool,
}

impl Relay<'_> {
    fn error(&self, why: &BrokerError) -> QueueError {
        QueueError::new(format!("source queue `{}` cannot be consumed: {why}", self.queue))
    }

    pub(super) async fn open(&self, sizes: &Sizes) -> Result<Opened, QueueError> {
        let prefetch = sizes.allow(PREFETCH);
        let lease = self.pool.lease().await?;
        let consumer = self.consume(&lease, prefetch).await?;
        Ok(Opened { lease, consumer, prefetch })
    }

    async fn consume(&self, lease: &Lease, prefetch: u16) -> Result<Consumer, QueueError> {
        let queue = self.queue;
        let consume = async {
            lease.channel.basic_qos(prefetch, BasicQosOptions::default()).await?;
            lease
                .channel
                .basic_consume(
                    queue.into(),
                    "".into(),
                    BasicConsumeOptions::default(),
                    FieldTable::default(),
                )
                .await
        };
        let consumer = answer(consume).await.map_err(|why| self.error(&why))?;
        tracing::debug!(queue, prefetch, "relaying events");
        Ok(consumer)
    }

    /// Relays until it fails, until it is stopped, or until others are configured: their queues
    /// have to be bound before more is relayed. Acks first what it has begun to publish.
    pub(super) async fn run(
        &self,
        Opened { lease, mut consumer, mut prefetch }: Opened,
        sizes: &mut Sizes,
        relaying: &mut ReportedOutage,
        configured: &mut watch::Receiver<Subscribers>,
    ) -> Result<(), QueueError> {
        let queue = self.queue;
        let mut is_known = false;
        // A consumer's stream ends once.
        let (mut cancelled, mut ended) = (false, false);
        loop {
            if ended && !cancelled {
                return Err(QueueError::new(format!(
                    "the broker cancelled the consumer of source queue `{queue}`"
                )));
            }
            if ended {
                prefetch = sizes.allow(PREFETCH);
                consumer = self.consume(&lease, prefetch).await?;
                cancelled = false;
            }
            let first = tokio::select! {
                biased;
                () = stopped(self.stopping.clone()) => return Ok(()),
                Ok(()) = configured.changed() => return Ok(()),
                first = consumer.next() => first,
            };
            let Some(first) = first else {
                ended = true;
                continue;
            };
            let first = first.map_err(|e| self.error(&e.into()))?;
            // Where the user may not declare the queue, only a message shows what it is.
            if !std::mem::replace(&mut is_known, true)
                && is_of_stream(&lease, queue, &first).await.map_err(|why| self.error(&why))?
            {
                return Err(source_is_stream(queue));
            }
            let group = self.take(first, &mut consumer, sizes)?;
            ended = group.is_last;
            // A client whose reload was answered may have published one of these since.
            if configured.has_changed().unwrap_or(false) {
                return Ok(());
            }
            self.relay(&lease, group).await?;
            relaying.recovered();
            if !cancelled && !ended && is_other(prefetch, sizes.allow(PREFETCH), PREFETCH) {
                // A consumer's prefetch cannot be changed. What was delivered to this one is
                // relayed before the next one begins: requeued it would count against the queue's
                // delivery limit.
                let tag = consumer.tag();
                answer(lease.channel.basic_cancel(tag, BasicCancelOptions::default()))
                    .await
                    .map_err(|why| self.error(&why))?;
                cancelled = true;
            }
        }
    }

    /// Takes the first message and those that have arrived with it.
    fn take(
        &self,
        first: Delivery,
        consumer: &mut Consumer,
        sizes: &mut Sizes,
    ) -> Result<Group, QueueError> {
        let mut group = Group { messages: Vec::new(), tag: 0, is_last: false };
        let (mut next, mut bytes) = (Some(first), 0);
        while let Some(delivery) = next {
            group.tag = delivery.delivery_tag;
            sizes.saw(size(delivery.data.len(), &delivery.properties));
            let message = relayed(self.topology, delivery);
            // A body that arrived compressed is larger now.
            bytes += message.body.len();
            group.messages.push(message);
            let arrived = if group.messages.len() < GROUP && bytes < GROUP_BYTES {
                consumer.next().now_or_never()
            } else {
                None
            };
            group.is_last = matches!(arrived, Some(None));
            next = arrived.flatten().transpose().map_err(|e| self.error(&e.into()))?;
        }
        Ok(group)
    }

    /// Publishes a group, counts it, and acks it.
    async fn relay(&self, lease: &Lease, group: Group) -> Result<(), QueueError> {
        let Group { messages, tag, .. } = group;
        let (all, invalid) =
            (messages.len(), messages.iter().filter(|m| m.exchange.is_empty()).count());
        let unmatched = self.publish(lease, messages).await?;
        self.metrics.relayed("invalid", invalid as u64);
        self.metrics.relayed("unmatched", unmatched as u64);
        self.metrics.relayed("routed", (all - invalid - unmatched) as u64);
        if unmatched > 0 {
            let queue = self.queue;
            tracing::info!(
                queue,
                events = unmatched,
                "events that no subscriber's pattern matches"
            );
        }
        reached(Step::Relayed);
        answer(lease.channel.basic_ack(tag, BasicAckOptions { multiple: true }))
            .await
            .map_err(|why| self.error(&why))
    }

    /// Publishes until each message is stored or unmatched; returns the number of unmatched ones.
    ///
    /// # Errors
    /// Among others: a queue is gone.
    async fn publish(&self, lease: &Lease, messages: Vec<Message>) -> Result<usize, QueueError> {
        let mut unmatched = 0;
        let mut refused = Vec::new();
        let subscribers = self.subscribers.borrow().clone();
        let results = self.published(&messages).await?;
        let stored = messages.iter().zip(&results).filter(|(message, result)| {
            !message.exchange.is_empty() && **result == PublishResult::Stored
        });
        let types = stored.map(|(message, _)| message.routing_key.as_str());
        let matching = self.shared.matching(types).await;
        for (message, result) in messages.into_iter().zip(results) {
            if message.exchange.is_empty() {
                match result {
                    PublishResult::Stored => {}
                    PublishResult::Refused => refused.push(message),
                    PublishResult::Unroutable => return Err(gone(&message)),
                }
                continue;
            }
            let wanting = || subscribers.iter().filter(|s| s.wants(&message.routing_key));
            match (result, wanting().next()) {
                // Stored for history alone.
                (PublishResult::Stored, None)
                    if matching.as_ref().is_some_and(|all| !all.matches(&message.routing_key)) =>
                {
                    unmatched += 1
                }
                (PublishResult::Stored, _) => {}
                (PublishResult::Unroutable, None) => unmatched += 1,
                (PublishResult::Refused, None) => refused.push(message),
                // A queue has not taken it, the broker does not say which; the others have. So each
                // gets it once more directly, and only one that refuses again gets it more often.
                // If no queue is bound for a wanted event, it arrives all the same.
                (PublishResult::Refused | PublishResult::Unroutable, Some(s)) => {
                    if result == PublishResult::Unroutable {
                        self.unbound.notify_one();
                        tracing::warn!(
                            routing_key = message.routing_key,
                            subscriber = s.name.as_str(),
                            "no queue is bound for an event that a subscriber wants; it is published to the queue directly"
                        );
                    }
                    let to_each = wanting().map(|s| {
                        Message::to_queue(
                            self.topology.main(&s.name),
                            message.body.clone(),
                            message.properties.clone(),
                        )
                    });
                    refused.extend(to_each);
                }
            }
        }
        if !refused.is_empty() {
            tracing::debug!(
                messages = refused.len(),
                "a queue refused events; each queue that wants them gets them directly"
            );
            self.insist(lease, refused).await?;
        }
        Ok(unmatched)
    }

    /// Publishes messages once.
    async fn published(&self, messages: &[Message]) -> Result<Vec<PublishResult>, QueueError> {
        let published = self.publisher.publish(messages.to_vec()).await;
        if !matches!(&published, Ok(results) if !results.contains(&PublishResult::Refused)) {
            // Perhaps the queue of history cannot take them.
            self.shared.history.suspect();
        }
        published
    }

    /// Publishes refused messages until they are taken.
    async fn insist(&self, lease: &Lease, mut refused: Vec<Message>) -> Result<(), QueueError> {
        let mut handing_over =
            ReportedOutage::new("a queue's room for relayed events", Harms::Queue, self.troubles);
        loop {
            let results = self.published(&refused).await?;
            if let Some((m, _)) = refused
                .iter()
                .zip(&results)
                .find(|(m, result)| **result == PublishResult::Unroutable && m.exchange.is_empty())
            {
                return Err(gone(m));
            }
            if !lease.channel.status().connected() {
                // They are redelivered, to this daemon or to another.
                return Err(QueueError::new(format!(
                    "the channel of source queue `{}` was lost while another queue refused events",
                    self.queue
                )));
            }
            let mut results = results.into_iter();
            refused.retain(|_| results.next() == Some(PublishResult::Refused));
            let Some(first) = refused.first() else { break };
            let why = format!(
                "`{}` refuses events, and the relay waits for it, so all subscribers do: it is full by a policy, or unusable (hooktrail repair SUBSCRIBER)",
                first.routing_key
            );
            let why = QueueError::new(why);
            tokio::select! {
                () = stopped(self.stopping.clone()) => return Err(QueueError::new("the daemon stops while a queue refuses relayed events")),
                () = handing_over.failed(&why) => {}
            }
        }
        handing_over.recovered();
        Ok(())
    }
}

/// Whether the source is a stream: it marks each message with its offset, which a shovel may have
/// copied, and the broker counts none of its consumers.
pub(super) async fn is_of_stream(
    lease: &Lease,
    queue: &str,
    delivery: &Delivery,
) -> Result<bool, BrokerError> {
    let headers = delivery.properties.headers().as_ref();
    if !headers.is_some_and(|headers| headers.contains_key("x-stream-offset")) {
        return Ok(false);
    }
    let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
    let found =
        answer(lease.channel.queue_declare(queue.into(), passive, FieldTable::default())).await?;
    Ok(found.consumer_count() == 0)
}

fn gone(message: &Message) -> QueueError {
    QueueError::new(format!(
        "queue `{}` does not exist any more; it is redeclared",
        message.routing_key
    ))
}

/// The message that is published for one of the source queue: an event by its type, or an orphan
/// with the reason.
fn relayed(topology: &Topology, mut delivery: Delivery) -> Message {
    match message::decoded(&delivery.properties, &delivery.data, BatchPolicy::MAX_BYTES as usize) {
        Ok(None) => {}
        Ok(Some(body)) => delivery.data = body,
        Err(undecoded) => return orphan(topology, &undecoded.dead_letter(delivery.into())),
    }
    let routed = event_type(&delivery.data).map(|t| t.into_owned());
    match routed {
        Ok(routing_key) => Message {
            exchange: topology.events(),
            routing_key,
            properties: message::relayed(&delivery.properties),
            body: Bytes::from(delivery.data),
        },
        Err(why) => {
            let owned =
                |s: &Option<lapin::types::ShortString>| s.as_ref().map(|s| s.as_str().to_owned());
            let letter = DeadLetter::of_event(
                Bytes::from(delivery.data),
                None,
                owned(delivery.properties.message_id()),
                Reason::InvalidEvent,
                why.to_string(),
                clock::now(),
            );
            let content_type = owned(delivery.properties.content_type());
            let letter = DeadLetter { content_type, ..letter };
            orphan(topology, &letter)
        }
    }
}

fn orphan(topology: &Topology, letter: &DeadLetter) -> Message {
    tracing::warn!(
        error = letter.error,
        "an invalid event in the source queue goes to `{}`",
        topology.orphans()
    );
    let (body, properties) = message::dead_letter(letter);
    Message::to_queue(topology.orphans(), body, properties)
}

/// Relays from the source queue, if there is one, until it is stopped.
pub(super) async fn relay(
    shared: &Shared,
    subscribers: watch::Receiver<Subscribers>,
    stopping: watch::Receiver<bool>,
) {
    let Intake::SourceQueue(queue) = shared.topology.intake() else { return };
    // A connection of its own: a subscriber's retries must not wait behind the relayed events.
    let publisher = shared.new_publisher(Role::Relaying);
    let relay = Relay {
        topology: &shared.topology,
        pool: &shared.consuming,
        publisher: &publisher,
        metrics: &shared.dialer.metrics,
        queue,
        subscribers: &subscribers,
        stopping: &stopping,
        unbound: &shared.unbound,
        troubles: &shared.troubles,
        shared,
    };
    let mut relaying = shared.outage(format!("the relay from queue `{queue}`"));
    let mut sizes = Sizes::default();
    loop {
        let mut configured = subscribers.clone();
        let opened = async {
            // An event that is relayed before a queue is bound would miss that queue.
            let mut broker = shared.broker();
            shared.topology.find_source(&mut broker).await?;
            shared.topology.ensure_shared(&mut broker).await?;
            let current = configured.borrow_and_update().clone();
            for s in current.iter() {
                shared.ensure_subscriber(&mut broker, s).await?;
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

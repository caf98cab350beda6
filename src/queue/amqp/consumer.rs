//! The source and the settler of a subscriber's two queues.

use std::{
    pin::Pin,
    sync::{Arc, MutexGuard, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use futures_util::future::poll_fn;
use lapin::{
    Channel,
    options::{BasicAckOptions, BasicCancelOptions, BasicQosOptions},
    types::ShortString,
};
use sha2::{Digest as _, Sha256};
use tokio::{
    sync::{Mutex, Notify},
    task::JoinHandle,
    time::timeout,
};

use super::{
    broker_error::{BrokerError, answer},
    ladder,
    message::{self, Message},
    pool::Lease,
    prefetch::{Sizes, is_other, size},
    publisher::PublishResult,
    redelivery::{Fingerprint, LostAcks, Track},
    restore,
    shared::{Consumes, Shared},
    topology::Topology,
    unusable::Unusable,
    wire::{Arrival, Consumer},
};
use crate::{
    clock,
    config::Subscriber,
    delivery::{MessageKind, SubscriberName},
    failpoint::{Step, reached},
    queue::{self, QueueError, Receipt, SettleError, Settlement, Taken, Window},
};

/// Timeout of a replacement of the consumer at the end of a session.
const REPLACEMENT_TIMEOUT: Duration = Duration::from_secs(2);

/// The task that begins another consumer on the same channel; `None` if that is not needed any
/// more.
///
/// A task of its own: it holds the lock over acks for a moment, and the lane must not wait for that
/// while it takes nothing.
type Replacement = JoinHandle<Result<Option<Consumer>, BrokerError>>;

/// The number of messages that the consumer of a feed may have unacked. It changes only with
/// another consumer.
struct Prefetch {
    now: u16,
    window: u16,
    /// The latest tag when this consumer was begun.
    since: u64,
    replacement: Option<(u16, Replacement)>,
}

impl Drop for Prefetch {
    fn drop(&mut self) {
        if let Some((_, replacement)) = &self.replacement {
            replacement.abort();
        }
    }
}

/// A consumer on a channel of its own, so that one `ack` with `multiple` cannot settle another
/// queue's messages.
struct Feed {
    lease: Arc<Lease>,
    consumer: Consumer,
    queue: String,
}

impl Feed {
    async fn open(lease: Lease, queue: String, prefetch: u16) -> Result<Self, Unusable> {
        match consume(&lease, &queue, prefetch).await {
            Ok(consumer) => Ok(Self { lease: Arc::new(lease), consumer, queue }),
            Err(why) => Err(Unusable { queue, why }),
        }
    }

    /// The next delivery, if there is one. Any end of the stream means that the channel is
    /// unusable.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<Arrival, QueueError>> {
        self.consumer.poll_next(cx).map(|next| match next {
            Some(Ok(arrival)) => Ok(arrival),
            Some(Err(e)) => {
                Err(QueueError::new(format!("the consumer of queue `{}` ended: {e}", self.queue)))
            }
            None => Err(QueueError::new(format!(
                "the broker cancelled the consumer of queue `{}`: it was deleted or moved",
                self.queue
            ))),
        })
    }

    /// Closing requeues everything at once and in its order. Cancelling the consumer first would
    /// not: messages on their way are then requeued before those delivered earlier (measured).
    /// Returns whether the broker has answered, and so has received all acks before.
    async fn close(&self) -> bool {
        let closed = answer(self.lease.channel.close(200, "requeued".into())).await;
        if let Err(why) = &closed {
            tracing::debug!(queue = self.queue, error = %why, "the channel was gone before it was closed");
        }
        closed.is_ok()
    }
}

pub struct Source {
    events: Feed,
    prefetch: Prefetch,
    envelopes: Feed,
    settler: Settler,
    /// Until the channels are closed.
    consumes: Consumes,
}

impl std::fmt::Debug for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Source").field("queue", &self.events.queue).finish_non_exhaustive()
    }
}

impl Source {
    pub(super) async fn open(
        [for_events, for_envelopes]: [Lease; 2],
        subscriber: &Subscriber,
        window: Window,
        consumes: Consumes,
    ) -> Result<(Self, Settler), Unusable> {
        let (name, shared) = (&subscriber.name, &consumes.shared);
        let topology = &shared.topology;
        let envelopes = Feed::open(for_envelopes, topology.retry(name), window.envelopes).await?;
        let sizes = shared.sizes(name);
        let now = sizes.lock().unwrap_or_else(PoisonError::into_inner).first(window.events);
        let prefetch = Prefetch { now, window: window.events, since: 0, replacement: None };
        let events = Feed::open(for_events, topology.main(name), now).await?;
        let settler = Settler(Arc::new(Inner {
            shared: shared.clone(),
            subscriber: name.clone(),
            most: subscriber.batch.max_bytes,
            acks: Mutex::default(),
            acked: Notify::new(),
            sizes,
            tracks: std::sync::Mutex::new(Tracks {
                events: Track::new(window.events),
                envelopes: Track::new(window.envelopes),
            }),
            lost_acks: shared.lost_acks(name),
            events: events.lease.clone(),
            envelopes: envelopes.lease.clone(),
        }));
        settler.0.lost_acks.opened(clock::instant());
        Ok((Self { events, prefetch, envelopes, settler: settler.clone(), consumes }, settler))
    }

    /// The next event if there is one, and room for it.
    fn poll_events(&mut self, cx: &mut Context<'_>) -> Poll<Result<Taken, QueueError>> {
        if let Some((next, replacement)) = &mut self.prefetch.replacement {
            let replaced = match Pin::new(replacement).poll(cx) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Ok(replaced)) => replaced,
                // A panic of the task is one of the lane.
                Poll::Ready(Err(e)) => std::panic::resume_unwind(e.into_panic()),
            };
            let next = *next;
            self.prefetch.replacement = None;
            match replaced {
                Ok(Some(consumer)) => {
                    self.events.consumer = consumer;
                    self.consumes.rebegin();
                    self.prefetch.now = next;
                    self.prefetch.since = self.settler.0.tracks().events.latest();
                }
                Ok(None) => {}
                Err(why) => {
                    let why = format!(
                        "queue `{}` cannot be consumed with another prefetch: {why}",
                        self.events.queue
                    );
                    return Poll::Ready(Err(QueueError::new(why)));
                }
            }
        }
        let inner = &*self.settler.0;
        let taken = match self.events.poll(cx) {
            Poll::Ready(taken) => taken.map(|d| inner.taken_event(d)),
            Poll::Pending => return Poll::Pending,
        };
        if taken.is_ok() {
            self.fit();
        }
        Poll::Ready(taken)
    }

    /// The most messages that the broker may have delivered and no ack for: of earlier consumers those
    /// that are known, and of this one its prefetch.
    fn most_unacked(&self) -> u64 {
        let Prefetch { now, since, ref replacement, .. } = self.prefetch;
        let tracks = self.settler.0.tracks();
        let latest = replacement.as_ref().map_or(0, |(next, _)| *next);
        let earlier = tracks.events.unacked_after(0) - tracks.events.unacked_after(since);
        earlier + u64::from(now) + u64::from(latest)
    }

    /// Replaces the consumer by one with the prefetch that the sizes of the messages allow now,
    /// if that is much more or less.
    ///
    /// Only when the prefetch is exhausted and no ack is being written: a message on its way would
    /// be requeued behind later ones.
    fn fit(&mut self) {
        let (now, window, since) = (self.prefetch.now, self.prefetch.window, self.prefetch.since);
        let inner = &self.settler.0;
        let next = inner.sizes().allow(window);
        if !is_other(now, next, window) || !inner.is_exhausted(since, now) {
            return;
        }
        let replacement = replace(
            inner.clone(),
            self.events.consumer.tag(),
            self.events.queue.clone(),
            since,
            now,
            next,
        );
        self.consumes.rebegin();
        self.prefetch.replacement = Some((next, tokio::spawn(replacement)));
    }
}

/// Cancels a consumer and begins another on the same channel: delivered messages stay unacked on
/// the channel, and keep their tags.
async fn replace(
    inner: Arc<Inner>,
    tag: ShortString,
    queue: String,
    since: u64,
    now: u16,
    next: u16,
) -> Result<Option<Consumer>, BrokerError> {
    let channel = &inner.events.channel;
    {
        let _no_ack = inner.acks.lock().await;
        if !inner.is_exhausted(since, now) {
            return Ok(None);
        }
        answer(channel.basic_cancel(tag, BasicCancelOptions::default())).await?;
    }
    // Unacked messages count too, until there is room for them alongside new ones.
    while next < now && inner.tracks().events.unacked_after(0) > u64::from(next) {
        inner.acked.notified().await;
    }
    consume(&inner.events, &queue, next).await.map(Some)
}

/// Begins to consume, with so many messages unacked at most.
async fn consume(lease: &Lease, queue: &str, prefetch: u16) -> Result<Consumer, BrokerError> {
    // Before consuming: a consumer's own buffer has no limit.
    answer(lease.channel.basic_qos(prefetch, BasicQosOptions::default())).await?;
    Consumer::begin(&lease.channel, lease.inboxes(), queue).await
}

impl queue::Source for Source {
    async fn take(&mut self, into: &mut Vec<Taken>, max: usize) -> Result<(), QueueError> {
        let before = into.len();
        poll_fn(|cx| {
            let end = before + max;
            while into.len() < end {
                match self.envelopes.poll(cx) {
                    Poll::Ready(Ok(d)) => into.push(self.settler.0.taken_envelope(d)),
                    Poll::Ready(Err(e)) => return Poll::Ready(Err(e)),
                    Poll::Pending => break,
                }
            }
            while into.len() < end {
                match self.poll_events(cx) {
                    Poll::Ready(Ok(taken)) => into.push(taken),
                    Poll::Ready(Err(e)) => return Poll::Ready(Err(e)),
                    Poll::Pending => break,
                }
            }
            if into.len() == before { Poll::Pending } else { Poll::Ready(Ok(())) }
        })
        .await
    }

    fn is_full(&self) -> bool {
        let (now, window, since) = (self.prefetch.now, self.prefetch.window, self.prefetch.since);
        let grows = self.prefetch.replacement.as_ref().is_some_and(|(next, _)| *next > now);
        now < window && !grows && self.settler.0.is_exhausted(since, now)
    }

    async fn close(mut self) {
        // Closing the channel fails while a `basic.consume` is unanswered.
        if let Some((_, replacement)) = &mut self.prefetch.replacement
            && let Ok(Ok(Ok(Some(consumer)))) = timeout(REPLACEMENT_TIMEOUT, replacement).await
        {
            self.events.consumer = consumer;
        }
        let inner = &*self.settler.0;
        inner.sizes().requeued(self.most_unacked());
        if let Err(why) = inner.ack_stragglers().await {
            tracing::debug!(queue = self.events.queue, error = %why, "what was settled out of order is redelivered");
        }
        let closed = [self.envelopes.close().await, self.events.close().await];
        let tracks = inner.tracks();
        for (track, closed) in [&tracks.envelopes, &tracks.events].into_iter().zip(closed) {
            if !closed {
                inner.lost_acks.add(track, clock::instant());
            }
        }
    }
}

#[derive(Clone)]
pub struct Settler(Arc<Inner>);

struct Inner {
    shared: Arc<Shared>,
    subscriber: SubscriberName,
    /// Bytes that an event can have.
    most: usize,
    /// Held over an ack, so that acks reach the broker in ascending order.
    acks: Mutex<()>,
    acked: Notify,
    sizes: Arc<std::sync::Mutex<Sizes>>,
    tracks: std::sync::Mutex<Tracks>,
    lost_acks: Arc<LostAcks>,
    events: Arc<Lease>,
    envelopes: Arc<Lease>,
}

struct Tracks {
    events: Track,
    envelopes: Track,
}

impl Tracks {
    fn of(&mut self, from: MessageKind) -> &mut Track {
        match from {
            MessageKind::Event => &mut self.events,
            MessageKind::Batch => &mut self.envelopes,
        }
    }
}

impl std::fmt::Debug for Settler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Settler").field("subscriber", &self.0.subscriber).finish_non_exhaustive()
    }
}

impl queue::Settler for Settler {
    async fn settle(
        &self,
        receipts: Vec<Receipt>,
        settlement: Settlement,
    ) -> Result<(), SettleError> {
        let inner = &*self.0;
        let accepted = matches!(settlement, Settlement::Delivered);
        if !inner.are_alive(&receipts) {
            if accepted {
                inner.settled(&receipts, accepted);
            }
            return Err(SettleError::Gone);
        }
        let messages = inner.messages(settlement);
        if !messages.is_empty() {
            inner.store(messages).await?;
            reached(Step::Confirmed);
        }
        inner.ack(receipts, accepted).await?;
        reached(Step::Acked);
        Ok(())
    }
}

impl Inner {
    fn channel(&self, from: MessageKind) -> &Channel {
        match from {
            MessageKind::Event => &self.events.channel,
            MessageKind::Batch => &self.envelopes.channel,
        }
    }

    fn are_alive(&self, receipts: &[Receipt]) -> bool {
        receipts.iter().all(|r| self.channel(r.from).status().connected())
    }

    fn tracks(&self) -> MutexGuard<'_, Tracks> {
        self.tracks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn sizes(&self) -> MutexGuard<'_, Sizes> {
        self.sizes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the consumer that was begun after a tag has as many messages unacked as it may.
    fn is_exhausted(&self, since: u64, prefetch: u16) -> bool {
        self.tracks().events.unacked_after(since) >= u64::from(prefetch)
    }

    fn taken_event(&self, d: Arrival) -> Taken {
        let size = size(d.body.len(), &d.properties);
        let sha256 = Sha256::digest(&d.body).into();
        let id = d.properties.message_id().as_ref().map(ShortString::as_str);
        let fingerprint = Fingerprint::event(id, &sha256);
        let known = self.track(MessageKind::Event, d.tag, Some(fingerprint), d.redelivered);
        let taken = if known {
            let receipt = Receipt { from: MessageKind::Event, tag: d.tag };
            Taken::AlreadySettled { events: 1, receipt }
        } else {
            message::taken_event(d, &sha256, self.most)
        };
        // As it is kept in memory: a body that arrived compressed is larger.
        let held = if let Taken::Event(event) = &taken { event.body.len() } else { 0 };
        self.sizes().saw(size.max(held));
        taken
    }

    fn taken_envelope(&self, d: Arrival) -> Taken {
        let (tag, redelivered) = (d.tag, d.redelivered);
        let taken = message::taken_envelope(d);
        let fingerprint = match &taken {
            Taken::Batch(batch, _) => {
                Some(Fingerprint::envelope(batch.id.as_str(), batch.attempts))
            }
            _ => None,
        };
        let known = self.track(MessageKind::Batch, tag, fingerprint, redelivered);
        match taken {
            Taken::Batch(e, receipt) if known => {
                Taken::AlreadySettled { events: e.events, receipt }
            }
            other => other,
        }
    }

    /// Tracks a delivery. Returns whether it is the redelivery of a settled one.
    fn track(
        &self,
        from: MessageKind,
        tag: u64,
        fingerprint: Option<Fingerprint>,
        redelivered: bool,
    ) -> bool {
        let known = fingerprint
            .filter(|_| redelivered)
            .and_then(|fingerprint| self.lost_acks.recognise(fingerprint, clock::instant()));
        self.tracks().of(from).taken(tag, fingerprint, known);
        known.is_some()
    }

    fn messages(&self, settlement: Settlement) -> Vec<Message> {
        match settlement {
            Settlement::Delivered => Vec::new(),
            Settlement::Retry { batches, delay } => batches
                .iter()
                .map(|batch| retry_message(&self.shared.topology, &self.subscriber, batch, delay))
                .collect(),
            Settlement::Dead(letters) => {
                let dead = self.shared.topology.dead(&self.subscriber);
                letters
                    .iter()
                    .map(|letter| {
                        let (body, properties) = message::dead_letter(letter);
                        Message::to_queue(dead.clone(), body, properties)
                    })
                    .collect()
            }
        }
    }

    async fn store(&self, messages: Vec<Message>) -> Result<(), SettleError> {
        let place = messages
            .first()
            .map(|m| if m.exchange.is_empty() { m.routing_key.clone() } else { m.exchange.clone() })
            .unwrap_or_default();
        let unconfirmed = |e: QueueError| SettleError::Unconfirmed(e.to_string());
        let mut left = messages;
        for may_restore in [true, false] {
            let results =
                self.shared.publisher().publish(left.clone()).await.map_err(unconfirmed)?;
            if results.contains(&PublishResult::Refused) {
                return Err(SettleError::Unconfirmed(format!(
                    "the broker refuses messages for `{place}`: it is full by a policy, or unusable (hooktrail repair {})",
                    self.subscriber
                )));
            }
            // A returned message is in no queue, so that it can be published again without a
            // duplicate.
            let mut results = results.into_iter();
            left.retain(|_| results.next() != Some(PublishResult::Stored));
            if left.is_empty() {
                return Ok(());
            }
            if may_restore {
                restore::restore_for(&self.shared, &self.subscriber).await.map_err(|e| {
                    SettleError::Unconfirmed(format!("a queue behind `{place}` does not exist any more and cannot be declared: {e}"))
                })?;
            }
        }
        Err(SettleError::Unconfirmed(format!(
            "messages for `{place}` find no queue, although all queues exist"
        )))
    }

    fn settled(&self, receipts: &[Receipt], accepted: bool) {
        let mut tracks = self.tracks();
        for r in receipts {
            tracks.of(r.from).settled(r.tag, accepted);
        }
    }

    async fn ack(&self, receipts: Vec<Receipt>, accepted: bool) -> Result<(), SettleError> {
        let _rising = self.acks.lock().await;
        self.settled(&receipts, accepted);
        // No ack is written to a channel that is gone.
        if !self.are_alive(&receipts) {
            return Err(SettleError::Gone);
        }
        let now = clock::instant();
        for r in receipts.iter().filter(|r| r.from == MessageKind::Batch) {
            self.tracks().envelopes.acks(r.tag, now);
            ack(&self.envelopes.channel, r.tag, false).await.map_err(|_| SettleError::Gone)?;
        }
        let prefix = self.tracks().events.acks_prefix(now);
        if let Some(tag) = prefix {
            ack(&self.events.channel, tag, true).await.map_err(|_| SettleError::Gone)?;
            self.acked.notify_one();
        }
        Ok(())
    }

    /// Acks settled deliveries that stand behind an unsettled one, one by one. Requeued, they would
    /// be redelivered, and each probe of a circuit would write another dead letter.
    async fn ack_stragglers(&self) -> Result<(), BrokerError> {
        let _rising = self.acks.lock().await;
        let stragglers = self.tracks().events.stragglers();
        for tag in stragglers {
            if self.events.channel.status().connected() {
                self.tracks().events.acks(tag, clock::instant());
                ack(&self.events.channel, tag, false).await?;
            }
        }
        Ok(())
    }
}

async fn ack(channel: &Channel, tag: u64, multiple: bool) -> Result<(), BrokerError> {
    answer(channel.basic_ack(tag, BasicAckOptions { multiple })).await
}

/// The message that brings an envelope back after `delay`, or at once if that is zero.
pub(super) fn retry_message(
    topology: &Topology,
    subscriber: &str,
    envelope: &queue::Batch,
    delay: Duration,
) -> Message {
    let (body, properties) = message::envelope(envelope);
    if delay.is_zero() {
        return Message::to_queue(topology.retry(subscriber), body, properties);
    }
    let seconds = ladder::seconds(delay);
    let properties =
        message::with_due(properties, clock::now() + Duration::from_secs(seconds.into()));
    Message {
        exchange: topology.level(ladder::entry_level(seconds)),
        routing_key: ladder::routing_key(seconds, subscriber),
        body,
        properties,
    }
}

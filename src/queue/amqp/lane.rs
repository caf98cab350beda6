//! A subscriber's two queues as the lane sees them: a source and its settler.

use std::{
    pin::Pin,
    sync::{Arc, MutexGuard, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use futures_util::{FutureExt as _, Stream as _, future::poll_fn};
use lapin::{
    Channel, Consumer,
    message::Delivery,
    options::{BasicAckOptions, BasicConsumeOptions, BasicQosOptions},
    types::{FieldTable, ShortString},
};
use tokio::sync::Mutex;

use super::{
    AmqpQueue, Consumes,
    connection::{BrokerError, INTERNAL_ERROR, Lease, answer},
    ladder,
    message::{self, Message},
    publisher::{Fate, Publisher},
    repeats::{Mark, Remembered, Track},
    topology::Topology,
};
use crate::{
    clock,
    config::Subscriber,
    failpoint::{Step, reached},
    queue::{self, Kind, QueueError, Receipt, SettleError, Settlement, Taken, Window},
};

/// Both ends of one channel, so that one `ack` with `multiple` cannot settle another queue's messages.
struct Feed {
    lease: Arc<Lease>,
    consumer: Consumer,
    queue: String,
}

impl Feed {
    async fn open(lease: Lease, queue: String, prefetch: u16) -> Result<Self, Unusable> {
        let open = async {
            // Before consuming: the consumer's own buffer has no limit.
            lease.channel.basic_qos(prefetch, BasicQosOptions::default()).await?;
            lease.channel.basic_consume(queue.as_str().into(), "".into(), BasicConsumeOptions::default(), FieldTable::default()).await
        };
        match answer(open).await {
            Ok(consumer) => Ok(Self { lease: Arc::new(lease), consumer, queue }),
            Err(why) => Err(Unusable { queue, why }),
        }
    }

    /// The next delivery if there is one. The end of the stream in any form means that the channel is of no use any more.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<Delivery, QueueError>> {
        Pin::new(&mut self.consumer).poll_next(cx).map(|next| match next {
            Some(Ok(delivery)) => Ok(delivery),
            Some(Err(e)) => Err(QueueError::new(format!("the consumer of queue `{}` ended: {}", self.queue, BrokerError::from(e)))),
            None => Err(QueueError::new(format!("the broker cancelled the consumer of queue `{}`: it was deleted or moved", self.queue))),
        })
    }

    /// Closing gives everything back at once and in its order. Cancelling the consumer first would
    /// not: what the broker has on its way then goes back before what was delivered earlier (measured).
    /// Returns whether the broker has answered, and so has taken all acks before.
    async fn close(&self) -> bool {
        let closed = answer(self.lease.channel.close(200, "given back".into())).await;
        if let Err(why) = &closed {
            tracing::debug!(queue = self.queue, error = %why, "the channel was gone before it was closed");
        }
        closed.is_ok()
    }
}

/// A queue that cannot be consumed.
#[derive(Debug)]
pub(super) struct Unusable {
    queue: String,
    pub(super) why: BrokerError,
}

impl Unusable {
    /// The broker has lost the use of the queue. It closes the whole connection of who consumes it, at
    /// once or after a minute without an answer.
    pub(super) fn is_broken(&self) -> bool {
        self.why.silent || self.why.code == Some(INTERNAL_ERROR)
    }

    pub(super) fn into_error(self, subscriber: &str) -> QueueError {
        let remedy = if self.is_broken() {
            format!("; if that stays so, the broker has lost the use of it, and `hooktrail repair {subscriber}` declares it anew")
        } else {
            String::new()
        };
        QueueError::new(format!("queue `{}` cannot be consumed: {}{remedy}", self.queue, self.why))
    }
}

/// Whether a queue can be consumed; takes nothing out of it.
pub(super) async fn try_consume(lease: &Lease, queue: &str) -> Result<(), Unusable> {
    let consume = async {
        lease.channel.basic_qos(1, BasicQosOptions::default()).await?;
        // Held until the channel is closed: dropped before, it is cancelled, and a channel that closes takes that for an error.
        let _consumer = lease.channel.basic_consume(queue.into(), "".into(), BasicConsumeOptions::default(), FieldTable::default()).await?;
        lease.channel.close(200, "tried".into()).await
    };
    answer(consume).await.map_err(|why| Unusable { queue: queue.to_owned(), why })
}

pub struct Source {
    events: Feed,
    envelopes: Feed,
    settler: Settler,
    /// Until the channels are closed.
    _consumes: Consumes,
}

impl std::fmt::Debug for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Source").field("queue", &self.events.queue).finish_non_exhaustive()
    }
}

impl Source {
    pub(super) async fn open(
        [for_events, for_envelopes]: [Lease; 2],
        topology: &Topology,
        publisher: Publisher,
        subscriber: &Subscriber,
        window: Window,
        remembered: Arc<Remembered>,
        consumes: Consumes,
    ) -> Result<(Self, Settler), Unusable> {
        let name = &subscriber.name;
        let envelopes = Feed::open(for_envelopes, topology.retry(name), window.envelopes).await?;
        let events = Feed::open(for_events, topology.main(name), window.events).await?;
        let settler = Settler(Arc::new(Inner {
            queue: consumes.queue.clone(),
            subscriber: name.clone(),
            most: subscriber.batch.max_bytes,
            topology: topology.clone(),
            publisher,
            acks: Mutex::default(),
            tracks: std::sync::Mutex::new(Tracks { events: Track::new(window.events), envelopes: Track::new(window.envelopes) }),
            remembered,
            events: events.lease.clone(),
            envelopes: envelopes.lease.clone(),
        }));
        settler.0.remembered.opened(clock::instant());
        Ok((Self { events, envelopes, settler: settler.clone(), _consumes: consumes }, settler))
    }
}

impl queue::Source for Source {
    async fn take(&mut self, into: &mut Vec<Taken>, max: usize) -> Result<(), QueueError> {
        let before = into.len();
        let inner = &*self.settler.0;
        poll_fn(|cx| {
            while into.len() - before < max {
                match self.envelopes.poll(cx) {
                    Poll::Ready(Ok(d)) => into.push(inner.taken_envelope(d)),
                    Poll::Ready(Err(e)) => return Poll::Ready(Err(e)),
                    Poll::Pending => match self.events.poll(cx) {
                        Poll::Ready(Ok(d)) => into.push(inner.taken_event(d)),
                        Poll::Ready(Err(e)) => return Poll::Ready(Err(e)),
                        Poll::Pending if into.len() == before => return Poll::Pending,
                        Poll::Pending => break,
                    },
                }
            }
            Poll::Ready(Ok(()))
        })
        .await
    }

    async fn close(self) {
        let inner = &*self.settler.0;
        if let Err(why) = inner.ack_stragglers().await {
            tracing::debug!(queue = self.events.queue, error = %why, "what was finished out of order comes again");
        }
        let closed = [self.envelopes.close().await, self.events.close().await];
        let tracks = inner.tracks();
        for (track, closed) in [&tracks.envelopes, &tracks.events].into_iter().zip(closed) {
            if !closed {
                inner.remembered.add(track, clock::instant());
            }
        }
    }
}

#[derive(Clone)]
pub struct Settler(Arc<Inner>);

struct Inner {
    queue: AmqpQueue,
    subscriber: String,
    /// The bytes that an event of it can have.
    most: usize,
    topology: Topology,
    publisher: Publisher,
    /// Held over an ack, so that acks reach the broker in rising order.
    acks: Mutex<()>,
    tracks: std::sync::Mutex<Tracks>,
    remembered: Arc<Remembered>,
    events: Arc<Lease>,
    envelopes: Arc<Lease>,
}

struct Tracks {
    events: Track,
    envelopes: Track,
}

impl Tracks {
    fn of(&mut self, from: Kind) -> &mut Track {
        match from {
            Kind::Event => &mut self.events,
            Kind::Batch => &mut self.envelopes,
        }
    }
}

impl std::fmt::Debug for Settler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Settler").field("subscriber", &self.0.subscriber).finish_non_exhaustive()
    }
}

impl queue::Settler for Settler {
    async fn settle(&self, receipts: Vec<Receipt>, settlement: Settlement) -> Result<(), SettleError> {
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
    fn channel(&self, from: Kind) -> &Channel {
        match from {
            Kind::Event => &self.events.channel,
            Kind::Batch => &self.envelopes.channel,
        }
    }

    fn are_alive(&self, receipts: &[Receipt]) -> bool {
        receipts.iter().all(|r| self.channel(r.from).status().connected())
    }

    fn tracks(&self) -> MutexGuard<'_, Tracks> {
        self.tracks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn taken_event(&self, d: Delivery) -> Taken {
        let mark = Mark::event(d.properties.message_id().as_ref().map(ShortString::as_str), &d.data);
        let known = self.track(Kind::Event, d.delivery_tag, Some(mark), d.redelivered);
        if known {
            return Taken::Known { events: 1, receipt: Receipt { from: Kind::Event, tag: d.delivery_tag } };
        }
        message::taken_event(d, self.most)
    }

    fn taken_envelope(&self, d: Delivery) -> Taken {
        let (tag, redelivered) = (d.delivery_tag, d.redelivered);
        let taken = message::taken_envelope(d);
        let mark = match &taken {
            Taken::Envelope(envelope, _) => Some(Mark::envelope(&envelope.batch_id, envelope.attempts)),
            _ => None,
        };
        let known = self.track(Kind::Batch, tag, mark, redelivered);
        match taken {
            Taken::Envelope(e, receipt) if known => Taken::Known { events: e.events, receipt },
            other => other,
        }
    }

    /// Keeps track of a delivery, whatever it is. Returns whether it was settled before and has come again.
    fn track(&self, from: Kind, tag: u64, mark: Option<Mark>, redelivered: bool) -> bool {
        let known = mark.filter(|_| redelivered).and_then(|mark| self.remembered.knows(mark, clock::instant()));
        self.tracks().of(from).taken(tag, mark, known);
        known.is_some()
    }

    fn messages(&self, settlement: Settlement) -> Vec<Message> {
        match settlement {
            Settlement::Delivered => Vec::new(),
            Settlement::Retry { envelopes, delay } => {
                envelopes.iter().map(|e| retry_message(&self.topology, &self.subscriber, e, delay)).collect()
            }
            Settlement::Dead(letters) => {
                let dead = self.topology.dead(&self.subscriber);
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
        let place =
            messages.first().map(|m| if m.exchange.is_empty() { m.routing_key.clone() } else { m.exchange.clone() }).unwrap_or_default();
        let unconfirmed = |e: QueueError| SettleError::Unconfirmed(e.to_string());
        let mut left = messages;
        for put_back in [true, false] {
            let fates = self.publisher.publish(left.clone()).await.map_err(unconfirmed)?;
            if fates.contains(&Fate::Refused) {
                return Err(SettleError::Unconfirmed(format!(
                    "the broker refuses messages for `{place}`: it is full by a policy, or unusable (hooktrail repair {})",
                    self.subscriber
                )));
            }
            // What came back is in no queue, so that it can be published again without becoming two.
            let mut fates = fates.into_iter();
            left.retain(|_| fates.next() != Some(Fate::Stored));
            if left.is_empty() {
                return Ok(());
            }
            if put_back {
                self.queue.put_back(&self.subscriber).await.map_err(|e| {
                    SettleError::Unconfirmed(format!("a queue behind `{place}` does not exist any more and cannot be declared: {e}"))
                })?;
            }
        }
        Err(SettleError::Unconfirmed(format!("what is written to `{place}` finds no queue, although all of them are there")))
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
        // To a channel that is gone no ack is written.
        if !self.are_alive(&receipts) {
            return Err(SettleError::Gone);
        }
        let now = clock::instant();
        for r in receipts.iter().filter(|r| r.from == Kind::Batch) {
            self.tracks().envelopes.acks(r.tag, now);
            ack(&self.envelopes.channel, r.tag, false).await.map_err(|_| SettleError::Gone)?;
        }
        let prefix = self.tracks().events.acks_prefix(now);
        if let Some(tag) = prefix {
            ack(&self.events.channel, tag, true).await.map_err(|_| SettleError::Gone)?;
        }
        Ok(())
    }

    /// Acks what is finished behind something that is not, one by one: given back it would come again,
    /// and a dead letter would be written each time that a circuit is probed.
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

/// The message that brings an envelope back after `delay`; at once if that is zero.
pub(super) fn retry_message(topology: &Topology, subscriber: &str, envelope: &queue::Envelope, delay: Duration) -> Message {
    let (body, properties) = message::envelope(envelope);
    if delay.is_zero() {
        return Message::to_queue(topology.retry(subscriber), body, properties);
    }
    let seconds = ladder::seconds(delay);
    let properties = message::with_due(properties, clock::now() + Duration::from_secs(seconds.into()));
    Message {
        exchange: topology.level(ladder::entry_level(seconds)),
        routing_key: ladder::routing_key(seconds, subscriber),
        body,
        properties,
    }
}

/// Reads what a consumer holds already, without waiting; for consumers of this module's siblings.
pub(super) fn ready(consumer: &mut Consumer) -> Option<lapin::Result<Delivery>> {
    futures_util::StreamExt::next(consumer).now_or_never().flatten()
}

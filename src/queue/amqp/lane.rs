//! A subscriber's two queues as the lane sees them: a source and its settler.

use std::{
    collections::VecDeque,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use futures_util::{FutureExt as _, Stream as _, future::poll_fn};
use lapin::{
    Channel, Consumer,
    options::{BasicAckOptions, BasicConsumeOptions, BasicQosOptions},
    types::FieldTable,
};
use tokio::sync::Mutex;

use super::{
    Consumes,
    connection::{BrokerError, INTERNAL_ERROR, Lease, answer},
    ladder,
    message::{self, Message},
    publisher::{Fate, Publisher},
    topology::Topology,
};
use crate::queue::{self, Kind, QueueError, Receipt, SettleError, Settlement, Taken, Window};

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
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<lapin::message::Delivery, QueueError>> {
        Pin::new(&mut self.consumer).poll_next(cx).map(|next| match next {
            Some(Ok(delivery)) => Ok(delivery),
            Some(Err(e)) => Err(QueueError::new(format!("the consumer of queue `{}` ended: {}", self.queue, BrokerError::from(e)))),
            None => Err(QueueError::new(format!("the broker cancelled the consumer of queue `{}`: it was deleted or moved", self.queue))),
        })
    }

    /// Closing gives everything back at once and in its order. Cancelling the consumer first would
    /// not: what the broker has on its way then goes back before what was delivered earlier (measured).
    async fn close(&self) {
        if let Err(why) = answer(self.lease.channel.close(200, "given back".into())).await {
            tracing::debug!(queue = self.queue, error = %why, "the channel was gone before it was closed");
        }
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
        lease.channel.basic_consume(queue.into(), "".into(), BasicConsumeOptions::default(), FieldTable::default()).await?;
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
        subscriber: &str,
        window: Window,
        consumes: Consumes,
    ) -> Result<(Self, Settler), Unusable> {
        let envelopes = Feed::open(for_envelopes, topology.retry(subscriber), window.envelopes).await?;
        let events = Feed::open(for_events, topology.main(subscriber), window.events).await?;
        let settler = Settler(Arc::new(Inner {
            subscriber: subscriber.to_owned(),
            topology: topology.clone(),
            publisher,
            finished: Mutex::new(Prefix::default()),
            events: events.lease.clone(),
            envelopes: envelopes.lease.clone(),
        }));
        Ok((Self { events, envelopes, settler: settler.clone(), _consumes: consumes }, settler))
    }
}

impl queue::Source for Source {
    async fn take(&mut self, into: &mut Vec<Taken>, max: usize) -> Result<(), QueueError> {
        let before = into.len();
        poll_fn(|cx| {
            while into.len() - before < max {
                match self.envelopes.poll(cx) {
                    Poll::Ready(Ok(d)) => into.push(message::taken_envelope(d)),
                    Poll::Ready(Err(e)) => return Poll::Ready(Err(e)),
                    Poll::Pending => match self.events.poll(cx) {
                        Poll::Ready(Ok(d)) => into.push(Taken::Event(message::taken_event(d))),
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
        if let Err(why) = self.settler.0.ack_stragglers().await {
            tracing::debug!(queue = self.events.queue, error = %why, "what was finished out of order comes again");
        }
        self.envelopes.close().await;
        self.events.close().await;
    }
}

#[derive(Clone)]
pub struct Settler(Arc<Inner>);

struct Inner {
    subscriber: String,
    topology: Topology,
    publisher: Publisher,
    /// Held over an ack, so that acks reach the broker in rising order.
    finished: Mutex<Prefix>,
    events: Arc<Lease>,
    envelopes: Arc<Lease>,
}

impl std::fmt::Debug for Settler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Settler").field("subscriber", &self.0.subscriber).finish_non_exhaustive()
    }
}

impl queue::Settler for Settler {
    async fn settle(&self, receipts: Vec<Receipt>, settlement: Settlement) -> Result<(), SettleError> {
        let inner = &*self.0;
        let all_alive = receipts.iter().all(|r| inner.lease(r.from).channel.status().connected());
        if !all_alive {
            return Err(SettleError::Gone);
        }
        let messages = inner.messages(settlement);
        if !messages.is_empty() {
            inner.store(messages).await?;
        }
        inner.ack(receipts).await.map_err(|_| SettleError::Gone)
    }
}

impl Inner {
    fn lease(&self, from: Kind) -> &Lease {
        match from {
            Kind::Event => &self.events,
            Kind::Batch => &self.envelopes,
        }
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
        let fates = self.publisher.publish(messages).await.map_err(|e| SettleError::Unconfirmed(e.to_string()))?;
        match fates.into_iter().find(|f| *f != Fate::Stored) {
            None => Ok(()),
            Some(Fate::Unroutable) => Err(SettleError::Unconfirmed(format!("`{place}` does not exist any more; it is declared anew"))),
            Some(_) => Err(SettleError::Unconfirmed(format!(
                "the broker refuses messages for `{place}`: it is full by a policy, or unusable (hooktrail repair {})",
                self.subscriber
            ))),
        }
    }

    async fn ack(&self, mut receipts: Vec<Receipt>) -> Result<(), BrokerError> {
        receipts.sort_unstable();
        let mut finished = self.finished.lock().await;
        let before = finished.acked;
        for r in &receipts {
            match r.from {
                Kind::Event => finished.finish(r.tag),
                Kind::Batch => ack(&self.envelopes.channel, r.tag, false).await?,
            }
        }
        if finished.acked > before {
            ack(&self.events.channel, finished.acked, true).await?;
        }
        Ok(())
    }

    /// Acks what is finished behind something that is not, one by one: given back it would come again,
    /// and a dead letter would be written each time that a circuit is probed.
    async fn ack_stragglers(&self) -> Result<(), BrokerError> {
        let finished = self.finished.lock().await;
        for tag in finished.stragglers() {
            ack(&self.events.channel, tag, false).await?;
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
    Message {
        exchange: topology.level(ladder::entry_level(seconds)),
        routing_key: ladder::routing_key(seconds, subscriber),
        body,
        properties,
    }
}

/// Which delivery tags of a channel are finished: tags count up from 1, and one ack with `multiple`
/// settles the longest prefix of finished ones.
#[derive(Debug, Default)]
struct Prefix {
    acked: u64,
    /// Of the tags after `acked`.
    finished: VecDeque<bool>,
}

impl Prefix {
    fn finish(&mut self, tag: u64) {
        let Some(n) = tag.checked_sub(self.acked + 1).and_then(|n| usize::try_from(n).ok()) else { return };
        if self.finished.len() <= n {
            self.finished.resize(n + 1, false);
        }
        self.finished[n] = true;
        while self.finished.front() == Some(&true) {
            self.finished.pop_front();
            self.acked += 1;
        }
    }

    /// The finished ones after the first that is not.
    fn stragglers(&self) -> impl Iterator<Item = u64> {
        (self.acked + 1..).zip(&self.finished).filter(|(_, done)| **done).map(|(tag, _)| tag)
    }
}

/// Reads what a consumer holds already, without waiting; for consumers of this module's siblings.
pub(super) fn ready(consumer: &mut Consumer) -> Option<lapin::Result<lapin::message::Delivery>> {
    futures_util::StreamExt::next(consumer).now_or_never().flatten()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn acks_cover_exactly_the_longest_finished_prefix(order in Just((1_u64..=40).collect::<Vec<_>>()).prop_shuffle()) {
            let mut prefix = Prefix::default();
            let mut done = std::collections::BTreeSet::new();
            for tag in order {
                prefix.finish(tag);
                done.insert(tag);
                let expected = (1..).take_while(|t| done.contains(t)).last().unwrap_or(0);
                prop_assert_eq!(prefix.acked, expected);
                let behind: Vec<u64> = done.iter().copied().filter(|t| *t > expected).collect();
                prop_assert_eq!(prefix.stragglers().collect::<Vec<_>>(), behind);
            }
            prop_assert!(prefix.finished.is_empty());
        }
    }
}

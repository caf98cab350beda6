//! A walk: a read of all messages of a queue in their order, however many there are.
//!
//! A queue shows only its head, so the messages that were passed stay unacked at the broker until
//! the end of the walk; this process keeps a few messages, and one bit of each of the others.
//! `basic.get` is no alternative: for a quorum queue each is a consumer of its own, and 74,000 of
//! them took ten minutes (measured). Consumers of a few messages each, one after the other, take
//! seconds.

use std::{collections::VecDeque, time::Duration};

use futures_util::StreamExt as _;
use lapin::{
    Channel, Consumer,
    message::Delivery,
    options::{
        BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicGetOptions,
        BasicNackOptions, BasicQosOptions, QueueDeclareOptions,
    },
    types::FieldTable,
};
use tokio::time::timeout;

use super::{
    broker_error::{BrokerError, answer},
    pool::{Lease, Quarantine},
    topology::walk_of,
};
use crate::queue::QueueError;

/// Messages that one consumer takes: at first, and at most while they are small; never more than
/// the size of the last ones makes of [`WINDOW_BYTES`].
const FIRST_WINDOW: u16 = 32;
const MAX_WINDOW: u16 = 128;
const WINDOW_BYTES: usize = 8 * 1024 * 1024;

/// Messages of one consumer that are requeued in one answer. RabbitMQ 3.10 collects them in an
/// Erlang map, which is in order only while it is that small.
const BACK: usize = 32;

/// Answers that may be on their way to the queue. Beyond 32 a channel delays them, and passes them
/// on by consumer in any order (measured).
const UNDER_WAY: usize = 16;

/// The first answers of a channel, which go one by one: more acks may still be on their way there
/// than it passes on at once. When the first answer is through these are passed on, when the second
/// is through they have arrived.
const ALONE: u32 = 2;

/// Acks that a channel passes on to a quorum queue before the queue has answered.
const SENT_ON: usize = 32;

/// Timeout until the queue shows what was requeued.
const BACK_TIME: Duration = Duration::from_secs(5);

/// Unacked messages of one channel: to ack one, a channel goes through all before it (measured:
/// 14,000 acks among 100,000 took 100 s).
const CHANNEL: u32 = 2048;

/// Channels of one connection; for larger queues each has more messages.
const MAX_CHANNELS: u32 = 64;

/// Time without a message after which the queue is asked for its depth: another consumer may have
/// what was counted.
const SILENCE: Duration = Duration::from_secs(1);

#[derive(Debug)]
pub(super) struct Walk {
    connection: Quarantine,
    /// Each with the number of messages that arrived over the ones before. Together they count up
    /// as delivery tags do.
    channels: Vec<(Lease, u64)>,
    each: u64,
    queue: String,
    /// Messages still in the queue.
    left: u32,
    ready: VecDeque<Delivery>,
    window: u16,
    /// The number of the last message of each consumer.
    ends: Vec<u64>,
    /// By message, from 1: whether the broker waits for an answer.
    held: Vec<bool>,
    /// The queue that shows the walk to others was declared; see [`walk_of`].
    marked: bool,
}

impl Walk {
    /// A walk through a number of messages. The connection is for this walk alone: a broken queue
    /// ends it.
    pub(super) fn new(connection: Quarantine, queue: String, messages: u32) -> Self {
        Self {
            connection,
            channels: Vec::new(),
            each: CHANNEL.max(messages.div_ceil(MAX_CHANNELS)).into(),
            queue,
            left: messages,
            ready: VecDeque::new(),
            window: FIRST_WINDOW,
            ends: Vec::new(),
            held: Vec::new(),
            marked: false,
        }
    }

    /// The number of messages still to be passed.
    pub(super) fn left(&self) -> u32 {
        self.left.saturating_add(u32::try_from(self.ready.len()).unwrap_or(u32::MAX))
    }

    /// The next message. Its delivery tag is valid in this walk.
    ///
    /// # Errors
    /// The queue was lost; the messages that were not acked are still in it.
    pub(super) async fn next(&mut self) -> Result<Option<Delivery>, QueueError> {
        if self.ready.is_empty() && self.left > 0 {
            self.fill().await?;
        }
        Ok(self.ready.pop_front())
    }

    /// Removes a message from the queue.
    pub(super) async fn ack(&mut self, tag: u64) -> Result<(), QueueError> {
        self.set(tag, false);
        let Some((channel, tag)) = self.place(tag) else { return Ok(()) };
        answer(channel.basic_ack(tag, BasicAckOptions::default()))
            .await
            .map_err(|why| self.error(&why))
    }

    /// The channel of a message, and its delivery tag there.
    fn place(&self, tag: u64) -> Option<(&Channel, u64)> {
        let n = self.channels.partition_point(|(_, before)| *before < tag).checked_sub(1)?;
        self.channels.get(n).map(|(lease, before)| (&lease.channel, tag - before))
    }

    /// The channel for the next consumer.
    async fn channel(&mut self) -> Result<Channel, QueueError> {
        let came = self.held.len() as u64;
        match self.channels.last() {
            Some((lease, before)) if came - before < self.each => Ok(lease.channel.clone()),
            _ => {
                let lease = self.connection.lease().await?;
                let channel = lease.channel.clone();
                self.channels.push((lease, came));
                Ok(channel)
            }
        }
    }

    /// Requeues the messages in their order, and returns when they can be read again.
    ///
    /// Walks to the end first: a quorum queue puts requeued messages behind all those requeued
    /// before, so that a part of the messages would change places with the rest. Then requeues one
    /// consumer's messages after the other's: closing alone would shuffle the consumers (both
    /// measured).
    pub(super) async fn close(mut self) -> Result<(), QueueError> {
        while self.left > 0 {
            self.fill().await?;
            self.ready.clear();
        }
        if self.channels.is_empty() {
            return Ok(()); // no message was taken
        }
        self.acks_arrive().await?;
        let mut expected = self.depth().await?;
        let (mut after, mut under_way, mut wait) = (0, 0, true);
        // The channel of the last answers, and their number.
        let (mut over, mut answers) = (None, 0);
        for end in &self.ends {
            let held: Vec<u64> = (after + 1..=*end).filter(|tag| self.is_held(*tag)).collect();
            after = *end;
            for part in held.chunks(BACK) {
                // The broker closes the channel over a tag that was answered, so the last
                // unanswered one.
                let Some((channel, last)) = part.last().and_then(|last| self.place(*last)) else {
                    continue;
                };
                if over != Some(channel.id()) {
                    // Two channels overtake each other.
                    if under_way > 0 && wait {
                        wait = self.has_back(expected).await?;
                    }
                    (over, answers, under_way) = (Some(channel.id()), 0, 0);
                }
                let back = BasicNackOptions { multiple: true, requeue: true };
                answer(channel.basic_nack(last, back)).await.map_err(|why| self.error(&why))?;
                expected = expected.saturating_add(u32::try_from(part.len()).unwrap_or(u32::MAX));
                (answers, under_way) = (answers + 1, under_way + 1);
                if (answers <= ALONE || under_way == UNDER_WAY) && wait {
                    // If another consumer takes them meanwhile there is no order to keep.
                    wait = self.has_back(expected).await?;
                    under_way = 0;
                }
            }
        }
        if wait {
            self.has_back(expected).await?;
        }
        for (lease, _) in &self.channels {
            answer(lease.channel.close(200, "read".into()))
                .await
                .map_err(|why| self.error(&why))?;
        }
        Ok(())
    }

    /// Waits until the queue has every ack. A channel passes on [`SENT_ON`] at a time and drops the
    /// others when it is closed: their messages would be redelivered. Acks are not answered; but a
    /// `get` is answered by the queue itself, behind what the channel had passed on by then.
    async fn acks_arrive(&self) -> Result<(), QueueError> {
        let ends =
            self.channels.iter().skip(1).map(|(_, before)| *before).chain([self.held.len() as u64]);
        for ((lease, before), end) in self.channels.iter().zip(ends) {
            let acked = (before + 1..=end).filter(|tag| !self.is_held(*tag)).count();
            let rounds = if acked == 0 { 0 } else { acked / SENT_ON + 2 };
            for _ in 0..rounds {
                let got =
                    lease.channel.basic_get(self.queue.as_str().into(), BasicGetOptions::default());
                if let Some(new) = answer(got).await.map_err(|why| self.error(&why))? {
                    // The walk is at its end, so this one is new.
                    let back = BasicNackOptions { requeue: true, ..BasicNackOptions::default() };
                    answer(lease.channel.basic_nack(new.delivery.delivery_tag, back))
                        .await
                        .map_err(|why| self.error(&why))?;
                }
            }
        }
        Ok(())
    }

    /// Waits until the queue shows this number of messages; false if it does not in time.
    async fn has_back(&self, expected: u32) -> Result<bool, QueueError> {
        let shows = async {
            while self.depth().await? < expected {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
            Ok(())
        };
        timeout(BACK_TIME, shows).await.map_or(Ok(false), |shown| shown.map(|()| true))
    }

    async fn depth(&self) -> Result<u32, QueueError> {
        let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
        let Some((lease, _)) = self.channels.last() else { return Ok(0) };
        let asked =
            lease.channel.queue_declare(self.queue.as_str().into(), passive, FieldTable::default());
        Ok(answer(asked).await.map_err(|why| self.error(&why))?.message_count())
    }

    /// Takes the next few with a consumer of its own.
    async fn fill(&mut self) -> Result<(), QueueError> {
        if !std::mem::replace(&mut self.marked, true) {
            self.mark().await?;
        }
        let wanted = self.window.min(u16::try_from(self.left).unwrap_or(u16::MAX));
        // If this process is killed the broker requeues in the order of these names, as long as
        // they are few.
        let name = format!("walk-{:08}", self.ends.len());
        let channel = self.channel().await?;
        let fail = |why: BrokerError| Self::failed(&self.queue, &why);
        let consume = async {
            channel.basic_qos(wanted, BasicQosOptions::default()).await?;
            channel
                .basic_consume(
                    self.queue.as_str().into(),
                    name.as_str().into(),
                    BasicConsumeOptions::default(),
                    FieldTable::default(),
                )
                .await
        };
        let mut consumer = answer(consume).await.map_err(fail)?;
        let mut came = Vec::with_capacity(wanted.into());
        while came.len() < usize::from(wanted)
            && let Ok(next) = timeout(SILENCE, consumer.next()).await
        {
            let gone = || {
                QueueError::new(format!(
                    "the broker cancelled the consumer of queue `{}`: it was deleted or moved",
                    self.queue
                ))
            };
            came.push(next.ok_or_else(gone)?.map_err(|e| fail(e.into()))?);
        }
        answer(channel.basic_cancel(name.as_str().into(), BasicCancelOptions::default()))
            .await
            .map_err(fail)?;
        rest(&mut consumer, &mut came).await.map_err(|e| fail(e.into()))?;
        let found = u32::try_from(came.len()).unwrap_or(u32::MAX);
        self.left = if found < u32::from(wanted) {
            // The queue may only have been slow.
            let got =
                answer(channel.basic_get(self.queue.as_str().into(), BasicGetOptions::default()))
                    .await
                    .map_err(fail)?;
            self.take(came);
            let more = got.is_some();
            self.take(got.map(|got| got.delivery));
            if more { self.left.saturating_sub(found + 1) } else { 0 }
        } else {
            self.take(came);
            self.left.saturating_sub(found)
        };
        Ok(())
    }

    /// Declares the queue that shows the walk, until the connection ends. If another walk has
    /// declared it, or the user may not, there is none.
    async fn mark(&self) -> Result<(), QueueError> {
        let lease = self.connection.lease().await?;
        let exclusive = QueueDeclareOptions { exclusive: true, ..QueueDeclareOptions::default() };
        let declared = lease.channel.queue_declare(
            walk_of(&self.queue).as_str().into(),
            exclusive,
            FieldTable::default(),
        );
        if let Err(why) = answer(declared).await {
            tracing::debug!(queue = self.queue, error = %why, "the walk is not marked");
        }
        Ok(())
    }

    /// Adds what one consumer received.
    fn take(&mut self, came: impl IntoIterator<Item = Delivery>) {
        let before = self.channels.last().map_or(0, |(_, before)| *before);
        let (mut last, mut largest) = (None, 1);
        for mut delivery in came {
            delivery.delivery_tag += before;
            self.set(delivery.delivery_tag, true);
            (last, largest) = (Some(delivery.delivery_tag), largest.max(delivery.data.len()));
            self.ready.push_back(delivery);
        }
        if let Some(last) = last {
            self.ends.push(last);
            self.window = u16::try_from(WINDOW_BYTES / largest)
                .unwrap_or(MAX_WINDOW)
                .clamp(1, (2 * self.window).min(MAX_WINDOW));
        }
    }

    fn set(&mut self, tag: u64, held: bool) {
        let at = usize::try_from(tag).unwrap_or(0).saturating_sub(1);
        if self.held.len() <= at {
            self.held.resize(at + 1, false);
        }
        self.held[at] = held;
    }

    fn is_held(&self, tag: u64) -> bool {
        usize::try_from(tag - 1).ok().and_then(|at| self.held.get(at)).is_some_and(|held| *held)
    }

    fn error(&self, why: &BrokerError) -> QueueError {
        Self::failed(&self.queue, why)
    }

    fn failed(queue: &str, why: &BrokerError) -> QueueError {
        QueueError::new(format!("queue `{queue}`: {why}"))
    }
}

/// Reads what the broker had sent before the cancel; then the stream ends.
async fn rest(consumer: &mut Consumer, into: &mut Vec<Delivery>) -> lapin::Result<()> {
    while let Some(delivery) = consumer.next().await {
        into.push(delivery?);
    }
    Ok(())
}

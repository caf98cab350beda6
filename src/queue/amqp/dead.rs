//! Looks at a dead queue, replays from it, purges it. One message at a time is held here, so that a
//! hundred thousand of them need no memory.

use lapin::options::{BasicAckOptions, BasicNackOptions};

use super::{
    AmqpQueue,
    connection::{BrokerError, Lease, answer},
    lane::retry_message,
    message::{self, Message},
    publisher::Fate,
    relay::get,
    topology::Broker,
};
use crate::queue::{self, DeadLetter, Held, Kind, QueueError};

/// A walk through a dead queue, oldest first. What is neither replayed nor purged keeps its order.
#[derive(Debug)]
pub struct DeadLetters {
    queue: AmqpQueue,
    subscriber: String,
    name: String,
    lease: Lease,
    left: u32,
}

impl DeadLetters {
    /// # Errors
    /// There is no such queue, or the broker cannot be reached.
    pub(super) async fn open(queue: &AmqpQueue, subscriber: &str) -> Result<Self, QueueError> {
        let name = queue.topology().dead(subscriber);
        let depth = Broker::new(&queue.0.declaring).depth(&name).await?;
        let depth = depth.ok_or_else(|| {
            QueueError::new(format!("queue `{name}` does not exist: the daemon has never run with a subscriber `{subscriber}`"))
        })?;
        let lease = queue.0.consuming.lease().await?;
        Ok(Self { queue: queue.clone(), subscriber: subscriber.to_owned(), name, lease, left: depth.messages })
    }

    async fn ack(&self, tag: u64) -> Result<(), QueueError> {
        answer(self.lease.channel.basic_ack(tag, BasicAckOptions::default())).await.map_err(|why| self.error(&why))
    }

    /// A batch comes back under its id with attempts and elapsed time begun anew; an event goes through the main queue.
    fn revived(&self, letter: &DeadLetter) -> Message {
        match letter.kind {
            Kind::Event => {
                let (body, properties) = message::event_again(letter);
                Message::to_queue(self.queue.topology().main(&self.subscriber), body, properties)
            }
            Kind::Batch => retry_message(self.queue.topology(), &self.subscriber, &letter.to_envelope(), std::time::Duration::ZERO),
        }
    }

    fn error(&self, why: &BrokerError) -> QueueError {
        QueueError::new(format!("queue `{}`: {why}", self.name))
    }
}

impl queue::DeadLetters for DeadLetters {
    fn left(&self) -> u32 {
        self.left
    }

    async fn next(&mut self) -> Result<Option<Held>, QueueError> {
        if self.left == 0 {
            return Ok(None);
        }
        self.left -= 1;
        let delivery = get(&self.lease.channel, &self.name).await.map_err(|why| self.error(&why))?;
        Ok(delivery.map(|d| Held { letter: message::read_dead_letter(&d), tag: d.delivery_tag }))
    }

    async fn replay(&self, letters: Vec<Held>) -> Result<(), QueueError> {
        let messages = letters.iter().map(|h| self.revived(&h.letter)).collect();
        let fates = self.queue.publisher().publish(messages).await?;
        let mut refused = None;
        for (held, fate) in letters.iter().zip(fates) {
            match fate {
                Fate::Stored => self.ack(held.tag).await?,
                Fate::Unroutable | Fate::Refused => refused = Some(held),
            }
        }
        match refused {
            None => Ok(()),
            Some(h) => Err(QueueError::new(format!(
                "the broker did not take `{}` back into the queue of `{}`; it is still a dead letter",
                h.letter.id.as_deref().unwrap_or("an event"),
                self.subscriber
            ))),
        }
    }

    async fn purge(&self, held: &Held) -> Result<(), QueueError> {
        self.ack(held.tag).await
    }

    /// Gives back what was looked at, in its order.
    ///
    /// Walks to the end first: a quorum queue puts what it is given back behind all that it was given
    /// back before, so a part of the letters would change places with the rest. And gives back in one
    /// answer: closing alone would shuffle them, since each `get` is a consumer of its own (both measured).
    async fn close(mut self) -> Result<(), QueueError> {
        while queue::DeadLetters::next(&mut self).await?.is_some() {}
        // Tag 0 stands for all that this channel holds.
        let all = BasicNackOptions { multiple: true, requeue: true };
        answer(self.lease.channel.basic_nack(0, all)).await.map_err(|why| self.error(&why))?;
        answer(self.lease.channel.close(200, "looked at".into())).await.map_err(|why| self.error(&why))
    }
}

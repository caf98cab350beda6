//! Walks through dead letters and orphans, replays them, purges them.

use std::sync::Arc;

use super::{
    consumer::retry_message,
    ladder,
    message::{self, Message},
    publisher::PublishResult,
    shared::Shared,
    waiting,
    walk::Walk,
};
use crate::{
    delivery::MessageKind,
    failpoint::{Step, reached},
    queue::{self, Held, QueueError},
};

/// A walk through a dead queue or the orphans, oldest first. Messages that are neither replayed nor
/// purged keep their order.
#[derive(Debug)]
pub struct DeadLetters {
    shared: Arc<Shared>,
    of: Of,
    walk: Walk,
}

#[derive(Debug)]
enum Of {
    Subscriber(String),
    Orphans,
}

impl DeadLetters {
    /// # Errors
    /// There is no such queue, or the broker cannot be reached.
    pub(super) async fn of_subscriber(
        shared: &Arc<Shared>,
        subscriber: &str,
    ) -> Result<Self, QueueError> {
        let absent = format!("the daemon has never run with a subscriber `{subscriber}`");
        Self::open(
            shared,
            Of::Subscriber(subscriber.to_owned()),
            shared.topology.dead(subscriber),
            &absent,
        )
        .await
    }

    /// # Errors
    /// There is no such queue, or the broker cannot be reached.
    pub(super) async fn of_orphans(shared: &Arc<Shared>) -> Result<Self, QueueError> {
        Self::open(
            shared,
            Of::Orphans,
            shared.topology.orphans(),
            "the daemon has never run with this [queue] prefix",
        )
        .await
    }

    async fn open(
        shared: &Arc<Shared>,
        of: Of,
        name: String,
        absent: &str,
    ) -> Result<Self, QueueError> {
        let messages = waiting::count(shared, &name).await?;
        let messages = messages
            .ok_or_else(|| QueueError::new(format!("queue `{name}` does not exist: {absent}")))?;
        let walk = Walk::new(shared.consuming.quarantine().await?, name, messages);
        Ok(Self { shared: shared.clone(), of, walk })
    }

    /// The message that replays a dead letter. A batch returns under its id, with attempts and
    /// elapsed time reset; an event goes through the main queue. `None` if it has no known
    /// subscriber, or is an orphan but no batch: no subscriber's pattern was compared with it.
    fn revived(&self, held: &Held) -> Option<Message> {
        let (topology, subscriber) = (&self.shared.topology, held.subscriber.as_deref()?);
        match (held.letter.kind, &self.of) {
            (MessageKind::Batch, _) => Some(retry_message(
                topology,
                subscriber,
                &held.letter.to_batch(),
                std::time::Duration::ZERO,
            )),
            (MessageKind::Event, Of::Subscriber(_)) => {
                let (body, properties) = message::event_again(&held.letter);
                Some(Message::to_queue(topology.main(subscriber), body, properties))
            }
            (MessageKind::Event, Of::Orphans) => None,
        }
    }
}

impl queue::DeadLetters for DeadLetters {
    fn left(&self) -> u32 {
        self.walk.left()
    }

    async fn next(&mut self) -> Result<Option<Held>, QueueError> {
        let Some(delivery) = self.walk.next().await? else { return Ok(None) };
        let tag = delivery.delivery_tag;
        Ok(Some(match &self.of {
            Of::Subscriber(name) => Held {
                subscriber: Some(name.clone()),
                tag,
                letter: message::read_dead_letter(delivery),
            },
            Of::Orphans => {
                let subscriber =
                    ladder::subscriber_of(delivery.routing_key.as_str()).map(str::to_owned);
                Held {
                    tag,
                    letter: message::read_orphan(delivery, subscriber.as_deref()),
                    subscriber,
                }
            }
        }))
    }

    async fn replay(&mut self, letters: Vec<Held>) -> Result<Vec<Held>, QueueError> {
        let (mut messages, mut sent, mut left) = (Vec::new(), Vec::new(), Vec::new());
        for held in letters {
            match self.revived(&held) {
                Some(message) => {
                    messages.push(message);
                    sent.push(held);
                }
                None => left.push(held),
            }
        }
        let publisher = self.shared.publisher();
        publisher.ready().await?;
        let results = publisher.publish(messages).await?;
        reached(Step::Moved);
        let mut refused = None;
        for (held, result) in sent.into_iter().zip(results) {
            match (result, &self.of) {
                (PublishResult::Stored, _) => self.walk.ack(held.tag).await?,
                (PublishResult::Unroutable, Of::Orphans) => left.push(held),
                (PublishResult::Unroutable | PublishResult::Refused, _) => refused = Some(held),
            }
        }
        match refused {
            None => Ok(left),
            Some(h) => Err(QueueError::new(format!(
                "the broker did not take `{}` back into the queue of `{}`; it stays where it is",
                h.letter.id.as_deref().unwrap_or("an event"),
                h.subscriber.as_deref().unwrap_or("an unknown subscriber")
            ))),
        }
    }

    async fn purge(&mut self, letters: Vec<Held>) -> Result<(), QueueError> {
        for held in letters {
            self.walk.ack(held.tag).await?;
        }
        Ok(())
    }

    async fn close(self) -> Result<(), QueueError> {
        self.walk.close().await
    }
}

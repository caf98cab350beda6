//! Two chores beside the lanes: the relay from a source queue, and the sweep of orphans.

use std::{collections::HashSet, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::StreamExt as _;
use lapin::{
    Channel, Consumer,
    message::Delivery,
    options::{BasicAckOptions, BasicConsumeOptions, BasicGetOptions, BasicNackOptions, BasicQosOptions},
    types::FieldTable,
};

use super::{
    connection::{Pool, answer, describe, pauses},
    ladder,
    lane::ready,
    message::{self, Message},
    publisher::{Fate, Publisher},
    topology::Topology,
};
use crate::{
    clock,
    config::Subscriber,
    event::event_type,
    queue::{DeadLetter, Kind, QueueError, Reason},
};

const PREFETCH: u16 = 500;
const GROUP: usize = 250;

/// Takes events from the source queue and republishes them by their type, until it fails.
pub(super) async fn relay(
    topology: &Topology,
    pool: &Pool,
    publisher: &Publisher,
    queue: &str,
    subscribers: &[Arc<Subscriber>],
) -> Result<(), QueueError> {
    let lease = pool.lease().await?;
    let fail = |why: String| QueueError::new(format!("source queue `{queue}` cannot be consumed: {why}"));
    let consume = async {
        lease.channel.basic_qos(PREFETCH, BasicQosOptions::default()).await?;
        lease.channel.basic_consume(queue.into(), "".into(), BasicConsumeOptions::default(), FieldTable::default()).await
    };
    let mut consumer: Consumer = answer(consume).await.map_err(fail)?;
    tracing::info!(queue, "relaying events");
    loop {
        let first =
            consumer.next().await.ok_or_else(|| QueueError::new(format!("the broker cancelled the consumer of source queue `{queue}`")))?;
        let mut last = 0;
        let mut messages = Vec::new();
        let mut next = Some(first);
        while let Some(delivery) = next {
            let delivery = delivery.map_err(|e| fail(describe(&e)))?;
            last = delivery.delivery_tag;
            messages.push(relayed(topology, delivery));
            next = if messages.len() < GROUP { ready(&mut consumer) } else { None };
        }
        let unmatched = publish_all(publisher, messages, subscribers).await?;
        if unmatched > 0 {
            tracing::info!(queue, events = unmatched, "events that no subscriber's pattern matches");
        }
        answer(lease.channel.basic_ack(last, BasicAckOptions { multiple: true })).await.map_err(fail)?;
    }
}

/// Where a message of the source queue goes: on by its type, or to the orphans with the reason.
fn relayed(topology: &Topology, delivery: Delivery) -> Message {
    let routed = event_type(&delivery.data).map(|t| t.into_owned());
    match routed {
        Ok(routing_key) => Message {
            exchange: topology.events(),
            routing_key,
            properties: message::relayed(&delivery.properties),
            body: Bytes::from(delivery.data),
        },
        Err(why) => {
            let owned = |s: &Option<lapin::types::ShortString>| s.as_ref().map(|s| s.as_str().to_owned());
            let letter = DeadLetter {
                kind: Kind::Event,
                reason: Reason::InvalidEvent,
                content_type: owned(delivery.properties.content_type()),
                id: owned(delivery.properties.message_id()),
                body: Bytes::from(delivery.data),
                events: 1,
                attempts: 0,
                status: None,
                error: why.to_string(),
                first_attempt_at: None,
                died_at: Some(clock::now()),
            };
            tracing::warn!(error = letter.error, "an invalid event in the source queue goes to `{}`", topology.orphans());
            let (body, properties) = message::dead_letter(&letter);
            Message::to_queue(topology.orphans(), body, properties)
        }
    }
}

/// Publishes until each message is stored or nobody wants it; returns how many nobody wants.
///
/// # Errors
/// Among others: one that a subscriber wants reached no queue, so a queue or its binding is gone.
async fn publish_all(publisher: &Publisher, mut messages: Vec<Message>, subscribers: &[Arc<Subscriber>]) -> Result<usize, QueueError> {
    let mut unmatched = 0;
    let mut pauses = pauses();
    loop {
        let fates = publisher.publish(messages.clone()).await?;
        let unroutable = messages.iter().zip(&fates).filter(|(_, fate)| **fate == Fate::Unroutable).map(|(m, _)| m);
        for message in unroutable {
            let wanting = subscribers.iter().find(|s| s.events.iter().any(|p| p.matches(&message.routing_key)));
            if let Some(s) = wanting {
                return Err(QueueError::new(format!("`{}` reached no queue although `{}` wants it", message.routing_key, s.name)));
            }
            unmatched += 1;
        }
        let mut fates = fates.into_iter();
        messages.retain(|_| fates.next() == Some(Fate::Refused));
        let Some(refused) = messages.first() else { return Ok(unmatched) };
        tracing::warn!(
            events = messages.len(),
            routing_key = refused.routing_key,
            "a queue refuses relayed events, and the relay waits for it: it is full by a policy, or unusable (hooktrail check --connect names it)"
        );
        tokio::time::sleep(pauses.grow()).await;
    }
}

/// Moves orphans of configured subscribers back into their retry queues; the others stay.
/// Returns how many were moved.
pub(super) async fn sweep(
    topology: &Topology,
    pool: &Pool,
    publisher: &Publisher,
    configured: &HashSet<String>,
) -> Result<usize, QueueError> {
    let lease = pool.lease().await?;
    let orphans = topology.orphans();
    let fail = |why: String| QueueError::new(format!("queue `{orphans}` cannot be read: {why}"));
    let mut moved = 0;
    // What is looked at and not moved stays unacknowledged, so that the next look sees the next one;
    // it is given back in one answer at the end, which keeps its order.
    while let Some(delivery) = get(&lease.channel, &orphans).await.map_err(fail)? {
        let subscriber = ladder::subscriber_of(delivery.routing_key.as_str()).filter(|s| configured.contains(*s));
        let Some(subscriber) = subscriber.map(str::to_owned) else { continue };
        let tag = delivery.delivery_tag;
        let (body, properties) = message::untouched(delivery);
        let stored = publisher.publish(vec![Message::to_queue(topology.retry(&subscriber), body, properties)]).await?;
        if stored != [Fate::Stored] {
            return Err(QueueError::new(format!("queue `{}` did not take an orphan", topology.retry(&subscriber))));
        }
        answer(lease.channel.basic_ack(tag, BasicAckOptions::default())).await.map_err(fail)?;
        moved += 1;
    }
    answer(lease.channel.basic_nack(0, BasicNackOptions { multiple: true, requeue: true })).await.map_err(fail)?;
    answer(lease.channel.close(200, "swept".into())).await.map_err(fail)?;
    Ok(moved)
}

pub(super) async fn get(channel: &Channel, queue: &str) -> Result<Option<Delivery>, String> {
    answer(channel.basic_get(queue.into(), BasicGetOptions::default())).await.map(|got| got.map(|m| m.delivery))
}

/// Between two sweeps.
pub(super) const SWEEP_INTERVAL: Duration = Duration::from_secs(60);

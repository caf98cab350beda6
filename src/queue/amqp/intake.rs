//! Publishes new events.

use super::{
    message::{self, Message},
    publisher::PublishResult,
    restore::rebind,
    shared::Shared,
};
use crate::{
    config::Intake,
    queue::{NewEvent, Published, QueueError},
};

pub(super) async fn publish(
    shared: &Shared,
    events: Vec<NewEvent>,
) -> Result<Vec<Published>, QueueError> {
    let message = |NewEvent { event_type, message_id, body, traceparent, tenant: _ }| {
        let (body, properties) =
            message::event(body, message_id.as_deref(), traceparent.as_deref());
        match shared.topology.intake() {
            Intake::Exchange(exchange) => {
                Message { exchange: exchange.clone(), routing_key: event_type, body, properties }
            }
            Intake::SourceQueue(queue) => Message::to_queue(queue.clone(), body, properties),
        }
    };
    let messages: Vec<Message> = events.into_iter().map(message).collect();
    let publisher = shared.publisher();
    publisher.ready().await?;
    let published = publisher.publish(messages.clone()).await;
    if published.is_err() {
        // The exchange may be gone, which costs the channel.
        shared.unbound.notify_one();
    }
    if !matches!(&published, Ok(results) if !results.contains(&PublishResult::Refused)) {
        // Perhaps the queue of history cannot take them.
        shared.history.suspect();
    }
    let mut results = published?;
    republish_lost(shared, &messages, &mut results).await?;
    // What the relay finds in the source queue it compares itself.
    let is_event = |m: &Message| !m.exchange.is_empty();
    let stored =
        |(m, result): &(&Message, &PublishResult)| is_event(m) && **result == PublishResult::Stored;
    let types = messages.iter().zip(&results).filter(stored).map(|(m, _)| m.routing_key.as_str());
    let matching = shared.matching(types).await;
    // History takes what no subscriber wants. What is in a queue has found one, unless it is known
    // that it has not.
    let is_wanted = |m: &Message| {
        !is_event(m) || matching.as_ref().is_none_or(|all| all.matches(&m.routing_key))
    };
    let published = |(result, message): (PublishResult, &Message)| match result {
        PublishResult::Stored if is_wanted(message) => Published::Stored,
        PublishResult::Stored | PublishResult::Unroutable => Published::Unmatched,
        PublishResult::Refused => Published::Refused,
    };
    Ok(results.into_iter().zip(&messages).map(published).collect())
}

/// Publishes events again that no queue has taken, once the missing bindings are restored.
async fn republish_lost(
    shared: &Shared,
    messages: &[Message],
    results: &mut [PublishResult],
) -> Result<(), QueueError> {
    let is_event = |m: &Message| m.exchange == shared.topology.events();
    let lost: Vec<usize> = (0..results.len())
        .filter(|n| {
            results[*n] == PublishResult::Unroutable && messages.get(*n).is_some_and(is_event)
        })
        .collect();
    let types = lost.iter().map(|n| messages[*n].routing_key.clone()).collect();
    if lost.is_empty() || !rebind(shared, &types).await? {
        return Ok(());
    }
    let again =
        shared.publisher().publish(lost.iter().map(|n| messages[*n].clone()).collect()).await?;
    lost.into_iter().zip(again).for_each(|(n, result)| results[n] = result);
    Ok(())
}

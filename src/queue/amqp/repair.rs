//! Deletes and redeclares broken queues.

use futures_util::future::try_join_all;

use super::{broker_error::NOT_FOUND, shared::Shared, unusable::usable};
use crate::{config::Subscriber, queue::QueueError};

/// The result of `repair` for a queue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Repaired {
    Sound(String),
    /// It was missing.
    Declared(String),
    Redeclared {
        queue: String,
        why: String,
    },
}

/// Deletes and redeclares the broken queues of a subscriber and the broken shared ones, and
/// declares those that are missing. Does not touch sound queues; nor, without `force`, a queue
/// whose messages may come back.
///
/// # Errors
/// The broker cannot be reached or refuses; or a queue fails for another reason, and nothing was
/// changed.
pub(super) async fn repair(
    shared: &Shared,
    subscriber: &Subscriber,
    force: bool,
) -> Result<Vec<Repaired>, QueueError> {
    let mut broker = shared.broker();
    let own = shared.topology.subscriber_queues(&subscriber.name);
    let own_names = own.clone().map(|(queue, _)| queue);
    // A daemon declares the queue of history, and binds it once it is old enough.
    let history = shared.topology.history();
    let has_history = broker.depth(&history).await?.is_some();
    let history = has_history.then(|| (history, shared.topology.history_arguments()));
    let queues: Vec<_> =
        own.into_iter().chain(shared.topology.shared_queues()).chain(history).collect();
    let states = try_join_all(queues.iter().map(|(queue, _)| usable(shared, queue))).await?;
    let mut broken = Vec::new();
    for ((queue, arguments), state) in queues.iter().zip(states) {
        let Err(unusable) = state else { continue };
        let exists = unusable.why.code != Some(NOT_FOUND);
        if exists && !unusable.is_broken() {
            let e = unusable.into_error(&subscriber.name);
            return Err(QueueError::new(format!(
                "{e}; that is not for `repair` to change, and nothing was changed"
            )));
        }
        broken.push((queue, arguments, exists, unusable.why.to_string()));
    }
    // The broker cannot say what is in a broken queue. But if the shared queues do not answer
    // either, or it counts messages, a node is missing rather than the queue lost.
    let shared_is_silent = broken
        .iter()
        .any(|(queue, _, exists, _)| *exists && own_names.iter().all(|own| own != *queue));
    for (queue, _, exists, _) in &broken {
        let messages =
            if *exists { broker.depth(queue).await?.map_or(0, |d| d.messages) } else { 0 };
        if !force && *exists && (shared_is_silent || messages > 0) {
            return Err(QueueError::new(format!(
                "queue `{queue}` does not answer, and what is in it may come back: is a node of the cluster missing (rabbitmqctl cluster_status)? \
                 If it is redeclared its events are lost; to do so nevertheless: --yes. Nothing was changed"
            )));
        }
    }
    let mut report: Vec<_> = queues
        .iter()
        .filter(|(q, _)| broken.iter().all(|b| b.0 != q))
        .map(|(q, _)| Repaired::Sound(q.clone()))
        .collect();
    for (queue, arguments, exists, why) in broken {
        if exists {
            broker.delete_queue(queue).await?;
        }
        broker.ensure_queue(queue, arguments.clone()).await?;
        let queue = queue.clone();
        report.push(if exists {
            Repaired::Redeclared { queue, why }
        } else {
            Repaired::Declared(queue)
        });
    }
    // Their bindings.
    shared.topology.ensure_shared(&mut broker).await?;
    shared.topology.ensure_subscriber(&mut broker, subscriber).await?;
    Ok(report)
}

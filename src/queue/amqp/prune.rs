//! Deletes the queues of removed subscribers, or everything under the prefix.

use std::{collections::BTreeSet, sync::Arc};

use super::{
    depths::{depth, shared_depths},
    doctor,
    requests::Broker,
    shared::Shared,
    state_stream,
};
use crate::{
    config::{Intake, Subscriber},
    delivery::{Depths, SubscriberName},
    queue::QueueError,
    wording::counted,
};

pub(super) async fn prune(
    shared: &Shared,
    subscriber: &SubscriberName,
    with_events: bool,
) -> Result<(), QueueError> {
    let mut broker = shared.broker();
    let topology = &shared.topology;
    let queues = topology.subscriber_queues(subscriber).map(|(queue, _)| queue);
    may_be_pruned(&mut broker, subscriber, &queues, with_events).await?;
    // Retries that are due from now on become orphans instead of being deleted with their queue;
    // earlier ones are counted.
    topology.unbind_retry(&mut broker, subscriber).await?;
    if let Err(e) = may_be_pruned(&mut broker, subscriber, &queues, with_events).await {
        // If this fails, the next daemon that serves it binds it.
        topology.bind_retry(&mut broker, subscriber).await.ok();
        return Err(e);
    }
    for queue in &queues {
        broker.delete_queue(queue).await?;
    }
    state_stream::forget(&shared.topology, shared.publisher(), subscriber).await?;
    shared.removed.send_if_modified(|all| all.remove(subscriber));
    Ok(())
}

/// Checks that these queues are unused, and empty unless their messages may be lost.
async fn may_be_pruned(
    broker: &mut Broker<'_>,
    subscriber: &str,
    queues: &[String],
    with_events: bool,
) -> Result<(), QueueError> {
    for queue in queues {
        let Some(depth) = broker.depth(queue).await? else { continue };
        if depth.consumers > 0 {
            return Err(QueueError::new(format!(
                "queue `{queue}` still has a consumer; take `{subscriber}` out of every daemon's configuration first"
            )));
        }
        // Messages that a walk has taken are not counted.
        if broker.is_walked(queue).await? {
            return Err(QueueError::new(format!(
                "a `hooktrail dead` command reads queue `{queue}`; wait for its end"
            )));
        }
        if depth.messages > 0 && !with_events {
            return Err(QueueError::new(format!(
                "queue `{queue}` holds {} by now; nothing was deleted",
                counted(depth.messages, "message(s)")
            )));
        }
    }
    Ok(())
}

/// Deletes everything that is declared under this prefix for these subscribers. The exchange that
/// producers publish to goes too `with_exchange`; where events come from a source queue that is
/// hooktrail's own.
///
/// # Errors
/// The broker cannot be reached or refuses.
pub(super) async fn remove<S: AsRef<str>>(
    shared: &Shared,
    subscribers: impl IntoIterator<Item = S>,
    with_exchange: bool,
) -> Result<(), QueueError> {
    let topology = &shared.topology;
    let mut broker = shared.broker();
    let own = subscribers.into_iter().flat_map(|name| topology.subscriber_queues(name.as_ref()));
    for (queue, _) in own.chain(topology.shared_queues()) {
        broker.delete_queue(&queue).await?;
    }
    broker.delete_queue(&topology.history()).await?;
    broker.delete_queue(&topology.state()).await?;
    broker.delete_queue(&topology.snapshot()).await?;
    let is_own = with_exchange || matches!(topology.intake(), Intake::SourceQueue(_));
    for exchange in
        topology.exchanges().into_iter().filter(|name| is_own || *name != topology.events())
    {
        broker.delete_exchange(&exchange).await?;
    }
    broker.delete_exchange(&topology.witness()).await
}

/// The depths of all queues under this prefix: of every subscriber that the record, this
/// configuration or the management API knows.
///
/// # Errors
/// The broker cannot be reached; or a daemon or a command works with the prefix, which the error
/// shows by a queue or a subscriber.
pub(super) async fn everything(
    shared: &Shared,
    configured: &[Arc<Subscriber>],
) -> Result<Depths, QueueError> {
    let topology = &shared.topology;
    let mut names: BTreeSet<SubscriberName> = configured.iter().map(|s| s.name.clone()).collect();
    names.extend(doctor::names_below(topology).await);
    let asked = state_stream::who_works(shared).await?;
    names.extend(asked.known);
    if let Some(name) = asked.works {
        return Err(QueueError::new(format!(
            "a daemon works with prefix `{}`: it answers for `{name}`. Stop every daemon that has this prefix first",
            topology.prefix()
        )));
    }
    let mut broker = shared.broker();
    let mut depths = Depths::default();
    for name in names {
        let queues = topology.subscriber_queues(&name).map(|(queue, _)| queue);
        may_be_pruned(&mut broker, &name, &queues, true).await?;
        if let Some(depth) = depth(shared, &mut broker, &name).await? {
            depths.subscribers.insert(name, depth);
        }
    }
    shared_depths(shared, &mut broker, &mut depths).await?;
    Ok(depths)
}

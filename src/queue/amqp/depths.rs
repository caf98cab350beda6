//! Numbers of messages in queues.

use std::{collections::BTreeSet, sync::Arc};

use super::{ladder, requests::Broker, shared::Shared, state_stream};
use crate::{
    config::Subscriber,
    delivery::{Depth, Depths, SubscriberName},
    queue::QueueError,
};

pub(super) async fn depths(
    shared: &Shared,
    subscribers: &[Arc<Subscriber>],
) -> Result<Depths, QueueError> {
    let mut broker = shared.broker();
    let mut depths = Depths::default();
    for s in subscribers {
        if let Some(depth) = depth(shared, &mut broker, &s.name).await? {
            depths.subscribers.insert(s.name.clone(), depth);
        }
    }
    let removed = removed(shared).await?;
    for name in removed.into_iter().filter(|name| !depths.subscribers.contains_key(name)) {
        if let Some(depth) = depth(shared, &mut broker, &name).await? {
            depths.removed.insert(name, depth);
        }
    }
    shared_depths(shared, &mut broker, &mut depths).await?;
    Ok(depths)
}

/// Subscribers that were removed and not pruned. A daemon follows the record; a command reads it.
async fn removed(shared: &Shared) -> Result<BTreeSet<SubscriberName>, QueueError> {
    if shared.follows() {
        Ok(shared.removed.borrow().clone())
    } else {
        state_stream::removed(shared).await
    }
}

pub(super) async fn depth(
    shared: &Shared,
    broker: &mut Broker<'_>,
    subscriber: &str,
) -> Result<Option<Depth>, QueueError> {
    let topology = &shared.topology;
    let (events, retries, dead) = (
        broker.messages(&topology.main(subscriber)).await?,
        broker.messages(&topology.retry(subscriber)).await?,
        broker.messages(&topology.dead(subscriber)).await?,
    );
    let of = |n: Option<u64>| n.unwrap_or(0);
    let there = events.is_some() || retries.is_some() || dead.is_some();
    Ok(there.then(|| Depth {
        events: of(events),
        retries: of(retries),
        delayed: 0,
        dead: of(dead),
    }))
}

pub(super) async fn shared_depths(
    shared: &Shared,
    broker: &mut Broker<'_>,
    depths: &mut Depths,
) -> Result<(), QueueError> {
    let mut delayed = 0;
    for level in 0..ladder::LEVELS {
        delayed += broker.messages(&shared.topology.level(level)).await?.unwrap_or(0);
    }
    depths.delayed = Some(delayed);
    depths.orphans = broker.messages(&shared.topology.orphans()).await?.unwrap_or(0);
    depths.history = broker.messages(&shared.topology.history()).await?;
    Ok(())
}

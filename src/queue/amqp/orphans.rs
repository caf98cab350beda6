//! The sweep of orphans: those of configured subscribers return into their retry queues.

use std::{
    collections::{BTreeMap, HashSet},
    sync::Arc,
    time::Duration,
};

use tokio::sync::watch;

use super::{
    ladder,
    message::{self, Message},
    pool::Pool,
    publisher::{PublishResult, Publisher},
    requests::Broker,
    shared::Shared,
    topology::Topology,
    walk::Walk,
};
use crate::{
    config::{Subscriber, Subscribers},
    delivery::SubscriberName,
    failpoint::{Step, reached},
    queue::QueueError,
};

/// Moves orphans of configured subscribers back into their retry queues; the others stay.
struct Sweep<'a> {
    topology: &'a Topology,
    consuming: &'a Pool,
    declaring: &'a Pool,
    publisher: &'a Publisher,
    configured: HashSet<SubscriberName>,
    /// The number of orphans when none of them belonged to a configured subscriber, and the number
    /// of sweeps that relied on it.
    foreign: Option<(u32, u32)>,
}

/// Time between two sweeps.
const SWEEP_INTERVAL: Duration = Duration::from_secs(60);

/// Sweeps that may rely on the number alone; the next one reads every orphan again.
const MAX_SKIPPED: u32 = 60;

impl Sweep<'_> {
    /// Replaces the configured subscribers.
    fn configure(&mut self, subscribers: &[Arc<Subscriber>]) {
        let configured: HashSet<SubscriberName> =
            subscribers.iter().map(|s| s.name.clone()).collect();
        if configured != self.configured {
            self.configured = configured;
            self.foreign = None;
        }
    }

    /// Returns the number of batches that were moved.
    async fn run(&mut self) -> Result<usize, QueueError> {
        let orphans = self.topology.orphans();
        let Some(depth) = Broker::new(self.declaring).depth(&orphans).await? else { return Ok(0) };
        match &mut self.foreign {
            _ if depth.messages == 0 => return Ok(0),
            Some((number, skipped)) if *number == depth.messages && *skipped < MAX_SKIPPED => {
                *skipped += 1;
                return Ok(0);
            }
            _ => self.foreign = None,
        }
        // A connection of its own: if the queue of orphans is broken, no lane is affected.
        let connection = self.consuming.quarantine().await?;
        let mut walk = Walk::new(connection, orphans, depth.messages);
        let mut moved = 0;
        // A retry queue that does not take one now takes no other, and keeps no other queue from
        // getting its own.
        let mut failed = BTreeMap::new();
        while let Some(delivery) = walk.next().await? {
            let subscriber = ladder::subscriber_of(delivery.routing_key.as_str())
                .filter(|s| self.configured.contains(*s));
            let Some(subscriber) =
                subscriber.filter(|s| !failed.contains_key(*s)).map(str::to_owned)
            else {
                continue;
            };
            let tag = delivery.delivery_tag;
            let (body, properties) = message::untouched(delivery);
            let queue = self.topology.retry(&subscriber);
            let why = match self
                .publisher
                .publish(vec![Message::to_queue(queue.clone(), body, properties)])
                .await
            {
                Ok(results) if results == [PublishResult::Stored] => None,
                Ok(_) => Some(format!("queue `{queue}` did not take an orphan")),
                // No other would be taken either.
                Err(e) if !self.publisher.is_writable() => return Err(e),
                Err(e) => Some(e.to_string()),
            };
            if let Some(why) = why {
                failed.insert(subscriber, why);
                continue;
            }
            reached(Step::Moved);
            walk.ack(tag).await?;
            moved += 1;
        }
        walk.close().await?;
        if !failed.is_empty() {
            return Err(QueueError::new(failed.into_values().collect::<Vec<_>>().join("; ")));
        }
        if moved == 0 {
            self.foreign = Some((depth.messages, 0));
        }
        Ok(moved)
    }
}

/// Sweeps orphans periodically.
pub(super) async fn sweep(shared: &Shared, mut subscribers: watch::Receiver<Subscribers>) {
    let mut sweep = Sweep {
        topology: &shared.topology,
        consuming: &shared.consuming,
        declaring: &shared.declaring,
        publisher: shared.publisher(),
        configured: HashSet::new(),
        foreign: None,
    };
    let mut sweeping = shared.outage("the sweep of orphans");
    loop {
        sweep.configure(&subscribers.borrow_and_update());
        match sweep.run().await {
            Ok(moved) => {
                sweeping.recovered();
                if moved > 0 {
                    tracing::info!(batches = moved, "moved orphans back into their retry queues");
                }
                tokio::select! {
                    () = tokio::time::sleep(SWEEP_INTERVAL) => {}
                    Ok(()) = subscribers.changed() => {}
                }
            }
            Err(e) => sweeping.failed(&e).await,
        }
    }
}

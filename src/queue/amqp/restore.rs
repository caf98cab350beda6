//! Restores what was deleted under the daemon: the ladder, the orphans, a subscriber's retry and
//! dead queue, and bindings that an event has missed.

use std::{collections::BTreeSet, sync::PoisonError, time::Duration};

use tokio::time::timeout;

use super::{
    declarations::log_redeclared,
    ladder,
    shared::Shared,
    state_stream,
    unusable::{try_consume, usable},
};
use crate::{
    clock,
    delivery::SubscriberName,
    event::Pattern,
    queue::QueueError,
    telemetry::{outage::ReportedOutage, troubles::Harms},
};

/// Time between two checks when nothing seems to be missing.
pub(super) const INTERVAL: Duration = Duration::from_secs(60);

/// Time until the first check of the ladder: the lanes have their connections by then.
const FIRST_REST: Duration = Duration::from_secs(10);

/// Timeout of restoring what a settlement found missing.
const RESTORE_TIMEOUT: Duration = Duration::from_secs(30);

/// Checks the ladder and the orphans, and restores them, indefinitely.
pub(super) async fn check_own(shared: &Shared) {
    let mut keeping = ReportedOutage::new("the delay ladder", Harms::Lanes, &shared.troubles);
    let mut damaged = shared.damaged.subscribe();
    let (mut tried_at, mut rest) = (None, FIRST_REST);
    loop {
        tokio::select! {
            () = tokio::time::sleep(rest) => {}
            _ = damaged.wait_for(|damaged| *damaged) => {}
        }
        rest = INTERVAL;
        loop {
            let mut kept = restore_own(shared, None).await;
            if kept.is_ok() {
                shared.damaged.send_replace(false);
                // Before the trial: the broker may be restarted during it.
                let made = Some(shared.dialer.connects());
                // Without a new connection the broker was not restarted, and has lost nothing
                // since.
                if tried_at != made {
                    let tried = try_ladder(shared).await;
                    tried_at = made.filter(|_| matches!(tried, Ok(true)));
                    kept = tried.map(drop);
                }
            }
            match kept {
                Ok(()) => break,
                Err(e) => keeping.failed(&e).await,
            }
        }
        keeping.recovered();
    }
}

/// Consumes each level that seems to be empty, for a moment. A broken level seems to be empty too,
/// and batches that other levels pass on to it wait forever: only its consumers and publishers get
/// errors. Returns whether all were tried.
async fn try_ladder(shared: &Shared) -> Result<bool, QueueError> {
    // Limits of connections and channels leave room for those that the daemon needs, and perhaps
    // for no others.
    let untried =
        |e: QueueError| tracing::debug!(error = %e, "the delay ladder could not be tried");
    let quarantine = match shared.consuming.quarantine().await {
        Ok(quarantine) => quarantine,
        Err(e) => {
            untried(e);
            return Ok(false);
        }
    };
    let mut broker = shared.broker();
    let (mut suspect, mut is_whole) = (None, true);
    for level in 0..ladder::LEVELS {
        let name = shared.topology.level(level);
        let is_idle = broker
            .depth(&name)
            .await?
            .is_some_and(|depth| depth.messages == 0 && depth.consumers == 0);
        if !is_idle {
            continue;
        }
        let lease = match quarantine.lease().await {
            Ok(lease) => lease,
            Err(e) => {
                untried(e);
                is_whole = false;
                break;
            }
        };
        if try_consume(&lease, &name).await.is_err_and(|e| e.is_broken()) {
            suspect = Some(name);
            break;
        }
    }
    quarantine.close().await;
    let Some(name) = suspect else { return Ok(is_whole) };
    usable(shared, &name).await?.map_err(|unusable| unusable.into_error("SUBSCRIBER"))?;
    // The levels behind it were not tried.
    Ok(false)
}

/// Restores what a settlement is written to: the queues that all subscribers share, and the
/// subscriber's own retry and dead queue.
///
/// # Errors
/// It cannot be restored. From then on the queue is not [`writable`](crate::queue::Queue::writable)
/// until it is.
pub(super) async fn restore_for(shared: &Shared, subscriber: &str) -> Result<(), QueueError> {
    let late = || {
        QueueError::new(format!(
            "what is missing could not be declared within {} s",
            RESTORE_TIMEOUT.as_secs()
        ))
    };
    let restored = timeout(RESTORE_TIMEOUT, restore_own(shared, Some(subscriber)))
        .await
        .unwrap_or_else(|_| Err(late()));
    if restored.is_err() {
        shared.damaged.send_replace(true);
    }
    restored
}

async fn restore_own(shared: &Shared, subscriber: Option<&str>) -> Result<(), QueueError> {
    // One after the other: what one of many lanes has declared, the others find.
    let _one = shared.restoring.lock().await;
    let mut broker = shared.broker();
    let topology = &shared.topology;
    let mut restored = topology.ensure_own(&mut broker).await;
    if let (Ok(()), Some(subscriber)) = (&restored, subscriber) {
        restored = topology.ensure_retry_and_dead(&mut broker, subscriber).await;
    }
    log_redeclared(&mut broker);
    restored
}

/// Rebinds the recorded patterns that match events of these types, which reached no queue. Returns
/// whether there were any.
///
/// # Errors
/// Binding has failed, or the record cannot be read.
pub(super) async fn rebind(shared: &Shared, types: &BTreeSet<String>) -> Result<bool, QueueError> {
    let matches =
        |pattern: &str| Pattern::try_new(pattern).is_ok_and(|p| types.iter().any(|t| p.matches(t)));
    let mut bound = shared.bound().clone();
    // A command knows only its configuration.
    if !shared.follows() {
        if !bound.values().flatten().any(|p| matches(p)) {
            return Ok(false);
        }
        bound = state_stream::bound(shared).await?.0;
    }
    let wanted: Vec<(&SubscriberName, &String)> = bound
        .iter()
        .flat_map(|(name, all)| all.iter().filter(|p| matches(p)).map(move |p| (name, p)))
        .collect();
    let mut broker = shared.broker();
    for (name, pattern) in &wanted {
        broker.bind(&shared.topology.main(name), &shared.topology.events(), pattern).await?;
    }
    if let Some((subscriber, pattern)) = wanted.first() {
        let sound = *shared.sound.lock().unwrap_or_else(PoisonError::into_inner);
        let since = sound.map(clock::rfc3339_seconds);
        tracing::error!(
            subscriber = subscriber.as_str(),
            pattern,
            since,
            "an event reached no queue although a pattern matches it: bindings were missing and are restored; what was published \
             meanwhile may be lost"
        );
    }
    // Others may be missing too.
    shared.unbound.notify_one();
    Ok(!wanted.is_empty())
}

//! Puts back what belongs to hooktrail alone and somebody has deleted: the ladder, the orphans, a
//! subscriber's ways back, bindings that an event has missed.

use std::{collections::BTreeSet, sync::PoisonError, time::Duration};

use tokio::time::timeout;

use super::{
    declarations::log_put_back,
    ladder,
    requests::Broker,
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

/// Between two checks when nothing seems to be missing.
pub(super) const INTERVAL: Duration = Duration::from_secs(60);

/// Before the ladder is checked for the first time: the lanes have their connections by then.
const FIRST_REST: Duration = Duration::from_secs(10);

/// For putting back what a settlement found missing.
const MENDING: Duration = Duration::from_secs(30);

/// Declares the witness. Who may not bind it goes without.
pub(super) async fn witness(shared: &Shared, broker: &mut Broker<'_>) {
    if let Err(e) = shared.topology.ensure_witness(broker).await {
        tracing::debug!(error = %e, "whether the exchange is deleted and declared again cannot be noticed");
    }
}

/// Looks at a start whether there is a witness, before anything is bound and recorded, and
/// declares it.
pub(super) async fn first_witness(shared: &Shared, broker: &mut Broker<'_>) {
    if shared.witnessed.get().is_none()
        && let Ok(there) = shared.topology.has_witness(broker).await
    {
        shared.witnessed.set(there).ok();
        witness(shared, broker).await;
    }
}

/// Keeps the ladder and the orphans in place.
pub(super) async fn keep_own(shared: &Shared) {
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
            let mut kept = mend(shared, None).await;
            if kept.is_ok() {
                shared.damaged.send_replace(false);
                // A broker that nobody has connected to again was not restarted, and has lost
                // nothing since.
                if tried_at != Some(shared.dialer.connects()) {
                    kept = try_ladder(shared).await;
                    tried_at = Some(shared.dialer.connects()).filter(|_| kept.is_ok());
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

/// Consumes each level that seems to be empty, for a moment. One that the broker has lost the
/// use of seems to be, and what other levels hand on to it waits for good: only its consumers
/// and publishers are told.
async fn try_ladder(shared: &Shared) -> Result<(), QueueError> {
    // Limits of connections and channels leave room for those that the daemon needs, and
    // perhaps for no others.
    let untried =
        |e: QueueError| tracing::debug!(error = %e, "the delay ladder could not be tried");
    let quarantine = match shared.consuming.quarantine().await {
        Ok(quarantine) => quarantine,
        Err(e) => {
            untried(e);
            return Ok(());
        }
    };
    let mut broker = shared.broker();
    let mut suspect = None;
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
                break;
            }
        };
        if try_consume(&lease, &name).await.is_err_and(|e| e.is_broken()) {
            suspect = Some(name);
            break;
        }
    }
    quarantine.close().await;
    let Some(name) = suspect else { return Ok(()) };
    usable(shared, &name).await?.map_err(|unusable| unusable.into_error("SUBSCRIBER"))
}

/// What a settlement is written to was not there: puts back what a subscriber shares with all
/// others, and its own ways back.
///
/// # Errors
/// It cannot be put back; from then on nothing is [`writable`](crate::queue::Queue::writable)
/// before it can.
pub(super) async fn put_back(shared: &Shared, subscriber: &str) -> Result<(), QueueError> {
    let late = || {
        QueueError::new(format!(
            "what is missing could not be declared within {} s",
            MENDING.as_secs()
        ))
    };
    let mended =
        timeout(MENDING, mend(shared, Some(subscriber))).await.unwrap_or_else(|_| Err(late()));
    if mended.is_err() {
        shared.damaged.send_replace(true);
    }
    mended
}

async fn mend(shared: &Shared, subscriber: Option<&str>) -> Result<(), QueueError> {
    // One after the other: what one of many lanes declares, the others find.
    let _one = shared.mending.lock().await;
    let mut broker = shared.broker();
    let topology = &shared.topology;
    let mut mended = topology.ensure_own(&mut broker).await;
    if let (Ok(()), Some(subscriber)) = (&mended, subscriber) {
        mended = topology.ensure_ways_back(&mut broker, subscriber).await;
    }
    log_put_back(&mut broker);
    mended
}

/// Binds again, as the record says, what events of these types should have reached and did not;
/// returns whether there was such a thing.
///
/// # Errors
/// It cannot be bound, or the record cannot be read.
pub(super) async fn bind_again(
    shared: &Shared,
    types: &BTreeSet<String>,
) -> Result<bool, QueueError> {
    let matches =
        |pattern: &str| Pattern::try_new(pattern).is_ok_and(|p| types.iter().any(|t| p.matches(t)));
    let mut bound = shared.bound().clone();
    // What a command knows is what it is configured with.
    if !shared.follows() {
        if !bound.values().flatten().any(|p| matches(p)) {
            return Ok(false);
        }
        bound = state_stream::bound(shared).await?;
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
            "an event reached no queue although a pattern matches it: bindings were missing and are put back; what was published \
             meanwhile may be lost"
        );
    }
    // For what else may be missing.
    shared.unbound.notify_one();
    Ok(!wanted.is_empty())
}

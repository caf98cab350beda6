//! Events on their way from the queue into the store.

use std::{
    pin::Pin,
    time::{Duration, SystemTime},
};

use tokio::{sync::watch, time::sleep};

use crate::{
    clock,
    config::Subscribers,
    policy::retry::Backoff,
    queue::{HistorySource, HistoryStart, Queue, QueueError},
    store::{Gap, MAX_APPEND, NewRow, Store, StoreError},
    telemetry::outage::{News, Outage},
};

/// The shortest and the longest time between two tries.
const FIRST_BACKOFF: Duration = Duration::from_millis(200);
const MAX_BACKOFF: Duration = Duration::from_secs(5);

/// The time between two looks for what is older than the retention or too much.
const TRIM_INTERVAL: Duration = Duration::from_secs(5);

/// Takes events from the queue into the store, until `stopped` completes. An event is removed from
/// the queue only when it is durable in the store; with the store away it waits in the queue.
pub(super) async fn record<Q: Queue, S: Store>(
    queue: &Q,
    store: &S,
    stopped: impl Future<Output = ()>,
) {
    let mut stopped = std::pin::pin!(stopped);
    let (mut outages, mut gaps) = ((Outage::default(), Outage::default()), Vec::new());
    let mut backoff = Backoff::new(FIRST_BACKOFF, MAX_BACKOFF);
    loop {
        let opening = async {
            let last = store.reach().await?.last;
            let start = HistoryStart { store: store.id().await?, last };
            queue.history(start).await.map_err(Ended::from)
        };
        let opened = tokio::select! {
            opened = opening => opened,
            () = &mut stopped => return,
        };
        let ended = match opened {
            Ok(source) => {
                let noted = (&mut outages, &mut gaps);
                match session(source, store, noted, &mut backoff, stopped.as_mut()).await {
                    Some(ended) => ended,
                    None => return,
                }
            }
            Err(ended) => ended,
        };
        log(&ended, &mut outages);
        tokio::select! {
            () = sleep(backoff.grow()) => {}
            () = &mut stopped => return,
        }
    }
}

fn log(ended: &Ended, outages: &mut (Outage, Outage)) {
    let first = |outage: &mut Outage, why: &str| outage.failed(why) != News::Known;
    match ended {
        Ended::Queue(e) if first(&mut outages.0, &e.to_string()) => {
            tracing::warn!(error = %e, "history gets no events from the queue; trying again");
        }
        Ended::Queue(e) => tracing::debug!(error = %e, "history still gets no events"),
        // The store has logged why it is away.
        Ended::Store(e) if !e.is_away() && first(&mut outages.1, &e.to_string()) => tracing::warn!(
            error = %e,
            "the store takes no events; they wait in the queue, and deliveries go on"
        ),
        Ended::Store(e) => tracing::debug!(error = %e, "the store takes no events"),
    }
}

/// Why a session ended.
enum Ended {
    Queue(QueueError),
    Store(StoreError),
}

impl From<QueueError> for Ended {
    fn from(e: QueueError) -> Self {
        Self::Queue(e)
    }
}

impl From<StoreError> for Ended {
    fn from(e: StoreError) -> Self {
        Self::Store(e)
    }
}

/// Runs until the source's end, or the store's; `None` if it was stopped.
async fn session<S: Store>(
    mut source: impl HistorySource,
    store: &S,
    (outages, gaps): (&mut (Outage, Outage), &mut Vec<Gap>),
    backoff: &mut Backoff,
    mut stopped: Pin<&mut impl Future<Output = ()>>,
) -> Option<Ended> {
    let mut taken = Vec::with_capacity(MAX_APPEND);
    let ended = loop {
        let took = tokio::select! {
            took = source.take(&mut taken, MAX_APPEND) => took,
            () = &mut stopped => break None,
        };
        // To its end, also when the daemon ends: what is stored and not removed from the queue would
        // be stored again.
        let stored = match took {
            Ok(()) => keep(&mut source, store, gaps, std::mem::take(&mut taken)).await,
            Err(e) => Err(e.into()),
        };
        match stored {
            Ok(()) => {
                backoff.reset();
                if outages.0.end() | outages.1.end() {
                    tracing::info!("history takes events again");
                }
            }
            Err(ended) => break Some(ended),
        }
    };
    // What is not stored goes back to the queue, which bears unsettled events for minutes only.
    source.close().await;
    ended
}

/// Stores one group.
async fn keep<S: Store>(
    source: &mut impl HistorySource,
    store: &S,
    gaps: &mut Vec<Gap>,
    taken: Vec<NewRow>,
) -> Result<(), Ended> {
    for gap in source.gaps() {
        tracing::warn!(
            from = clock::rfc3339_seconds(gap.from),
            until = clock::rfc3339_seconds(gap.until),
            why = gap.why,
            "history lacks events"
        );
        gaps.push(gap);
    }
    // The queue names a gap once, so it is kept until the store has it.
    while let Some(gap) = gaps.last() {
        store.add_gap(gap.clone()).await?;
        gaps.pop();
    }
    store.append(taken).await?;
    source.stored().await?;
    Ok(())
}

/// Removes what is older than the retention, or more than fits, until it is dropped.
pub(super) async fn trim<S: Store>(store: &S) {
    let mut outage = Outage::default();
    loop {
        match store.trim(clock::now()).await {
            // The next part at once: each is small, and others come in between.
            Ok(true) => continue,
            Ok(false) => drop(outage.end()),
            // Away: that is logged by whoever found it.
            Err(e) if e.is_away() => {}
            Err(e) => {
                if outage.failed(&e.to_string()) == News::First {
                    tracing::warn!(error = %e, "old events and deliveries cannot be removed; trying again");
                }
            }
        }
        sleep(TRIM_INTERVAL).await;
    }
}

/// Records the patterns of each configuration from its time on, until it is dropped.
pub(super) async fn record_patterns<S: Store>(
    store: &S,
    mut subscribers: watch::Receiver<Subscribers>,
) {
    loop {
        let (current, since): (Subscribers, SystemTime) =
            (subscribers.borrow_and_update().clone(), clock::now());
        let mut backoff = Backoff::new(FIRST_BACKOFF, MAX_BACKOFF);
        let patterns = || current.iter().map(|s| (s.name.clone(), s.events.clone())).collect();
        let record = async {
            while let Err(e) = store.subscribed(patterns(), since).await {
                tracing::debug!(error = %e, "the patterns of subscribers are not recorded yet");
                sleep(backoff.grow()).await;
            }
        };
        let mut changed = subscribers.clone();
        tokio::select! {
            () = record => {}
            // A later configuration replaces one that could not be recorded.
            changed = changed.changed() => if changed.is_err() { return } else { continue },
        }
        if subscribers.changed().await.is_err() {
            return;
        }
    }
}

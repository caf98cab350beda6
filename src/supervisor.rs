//! Wires lanes to a queue, restarts those that panic, drains them at the end.

use std::{collections::BTreeSet, future::Future, sync::Arc, time::Duration};

use tokio::{
    sync::watch,
    task::{JoinError, JoinSet},
};

use crate::{
    config::Subscriber,
    lane::Lane,
    queue::{Queue, QueueError},
    retry::Pauses,
    webhook::{TlsRoots, Webhook},
};

/// How a run ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Ended {
    /// Everything in flight was settled.
    Drained,
    /// These subscribers still had requests in flight at the deadline; they are delivered again.
    Deadline(BTreeSet<String>),
}

/// Runs a lane for each subscriber until `shutdown` completes, then drains them for at most `shutdown_timeout`.
///
/// # Errors
/// The queue is of no use and will not change by itself, or https cannot be spoken.
pub async fn run<Q: Queue>(
    queue: Q,
    subscribers: &[Arc<Subscriber>],
    shutdown: impl Future<Output = ()>,
    shutdown_timeout: Duration,
) -> Result<Ended, QueueError> {
    let tls = TlsRoots::of_system().map_err(QueueError::needs_operator)?;
    let mut lanes = Vec::new();
    for s in subscribers {
        let webhook = Webhook::try_new(s, &tls).map_err(|e| QueueError::needs_operator(format!("subscriber `{}`: {e}", s.name)))?;
        lanes.push((s.clone(), webhook));
    }
    let mut shutdown = std::pin::pin!(shutdown);
    tokio::select! {
        ready = queue.prepare(subscribers) => ready?,
        () = &mut shutdown => return Ok(Ended::Drained),
    }
    let (drain, draining) = watch::channel(false);
    let mut keepers = JoinSet::new();
    for (subscriber, webhook) in lanes {
        keepers.spawn(keep(subscriber, webhook, queue.clone(), draining.clone()));
    }
    tracing::info!(subscribers = subscribers.len(), "running");
    let mut chores = JoinSet::new();
    let doing = (queue.clone(), subscribers.to_vec());
    chores.spawn(async move { doing.0.chores(&doing.1).await });

    loop {
        tokio::select! {
            () = &mut shutdown => break,
            Some(ended) = chores.join_next() => {
                if let Err(e) = ended {
                    tracing::error!(error = %e, "a chore beside the lanes panicked and is not done any more until a restart");
                }
            }
        }
    }
    tracing::info!(timeout_s = shutdown_timeout.as_secs_f64(), "stopping: nothing new is taken, requests in flight finish");
    chores.shutdown().await;
    drain.send_replace(true);
    let mut busy: BTreeSet<String> = subscribers.iter().map(|s| s.name.clone()).collect();
    let all = async {
        while let Some(ended) = keepers.join_next().await {
            busy.remove(&ended.unwrap_or_else(resume));
        }
    };
    let in_time = tokio::time::timeout(shutdown_timeout, all).await.is_ok();
    if !in_time {
        keepers.shutdown().await;
    }
    queue.close().await;
    if in_time {
        tracing::info!("stopped");
        return Ok(Ended::Drained);
    }
    tracing::warn!(subscribers = ?busy, "stopped at the deadline with requests in flight; their events are delivered again");
    Ok(Ended::Deadline(busy))
}

/// A keeper holds no code that panics; if it does, so does the process.
fn resume(e: JoinError) -> String {
    std::panic::resume_unwind(e.into_panic())
}

/// Runs a lane, and runs it again after a panic. Returns the subscriber's name.
async fn keep<Q: Queue>(subscriber: Arc<Subscriber>, webhook: Webhook, queue: Q, mut drain: watch::Receiver<bool>) -> String {
    let mut pauses = Pauses::new(Duration::from_secs(1), Duration::from_secs(60));
    loop {
        let lane = Lane::new(subscriber.clone(), queue.clone(), webhook.clone());
        // A set of one: when the keeper is stopped at the deadline, so is the lane.
        let mut task = JoinSet::new();
        task.spawn(lane.run(drain.clone()));
        match task.join_next().await {
            Some(Err(e)) => {
                let pause = pauses.grow();
                tracing::error!(subscriber = subscriber.name, error = %e, again_in_s = pause.as_secs_f64(), "the lane panicked; what it held comes again");
                tokio::select! {
                    () = tokio::time::sleep(pause) => {}
                    _ = drain.wait_for(|d| *d) => return subscriber.name.clone(),
                }
            }
            Some(Ok(())) | None => return subscriber.name.clone(),
        }
    }
}

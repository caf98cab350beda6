//! The look that a daemon takes at its queue, once after its start. What is bad goes into the log;
//! delivery neither waits for it nor notices. The same look, and one at the endpoints, is `check
//! --connect`.

use std::{sync::Arc, time::Duration};

use tokio::sync::watch;

use crate::{
    config::Subscriber,
    queue::Queue,
    supervisor::fleet::Phase,
    telemetry::finding::{Finding, Severity},
};

/// Then the look is given up: a broker that cannot be asked is told of elsewhere.
const PATIENCE: Duration = Duration::from_secs(180);

/// Looks in the background, when the queue has been made ready, and not when the daemon is told to
/// stop before.
pub fn look_once<Q: Queue>(
    queue: Q,
    subscribers: &[Arc<Subscriber>],
    mut phases: watch::Receiver<Phase>,
) {
    let subscribers = subscribers.to_vec();
    tokio::spawn(async move {
        if !phases.wait_for(|p| *p != Phase::Starting).await.is_ok_and(|p| *p == Phase::Running) {
            return;
        }
        let ended = async { phases.wait_for(|p| *p == Phase::Draining).await.map(drop) };
        tokio::select! {
            _ = ended => {} // or there is nobody left to end it
            looked = tokio::time::timeout(PATIENCE, queue.inspect(&subscribers)) => match looked {
                Ok(Ok(findings)) => findings.iter().for_each(log),
                Ok(Err(e)) => tracing::debug!(error = %e, "the queue could not be looked at"),
                Err(_) => tracing::debug!("the queue could not be looked at in time"),
            },
        }
    });
}

fn log(f: &Finding) {
    let (risk, remedy) =
        (f.risk.as_deref().unwrap_or_default(), f.remedy.as_deref().unwrap_or_default());
    let (severity, about, found) = (f.severity.name(), f.names(), f.found.as_str());
    if f.severity >= Severity::Warning {
        tracing::warn!(
            severity,
            about,
            found,
            risk,
            remedy,
            "a look at the queue found what can go wrong; `check --connect` looks again"
        );
    } else {
        tracing::debug!(severity, about, found, risk, remedy, "a look at the queue");
    }
}

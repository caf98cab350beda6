//! The inspection of the queue by a daemon, once after its start. Warnings go into the log; delivery
//! does not wait for it. `check --connect` makes the same inspection, and one of the endpoints.

use std::{sync::Arc, time::Duration};

use tokio::sync::watch;

use crate::{
    config::Subscriber,
    queue::Queue,
    supervisor::fleet::Phase,
    telemetry::finding::{Finding, Severity},
};

/// The longest that the inspection may take. A broker that does not answer is reported elsewhere.
const INSPECTION_TIMEOUT: Duration = Duration::from_secs(180);

/// Inspects the queue in the background, once it is prepared; not if the daemon stops before.
pub fn inspect_once<Q: Queue>(
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
            _ = ended => {} // or the run is gone
            inspected = tokio::time::timeout(INSPECTION_TIMEOUT, queue.inspect(&subscribers)) => match inspected {
                Ok(Ok(findings)) => findings.iter().for_each(log),
                Ok(Err(e)) => tracing::debug!(error = %e, "the queue could not be inspected"),
                Err(_) => tracing::debug!("the queue could not be inspected in time"),
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
            "an inspection of the queue found a risk; `hooktrail check --connect` inspects it again"
        );
    } else {
        tracing::debug!(severity, about, found, risk, remedy, "an inspection of the queue");
    }
}

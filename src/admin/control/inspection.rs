//! What can go wrong, as `check --connect` finds it.

use std::time::Duration;

use tokio::time::timeout;

use super::{Control, queue_fails};
use crate::{
    admin::answer::Refusal,
    clock,
    endpoint::inspect,
    queue::Queue,
    store::Store,
    telemetry::finding::{Finding, summarized},
};

/// The longest time for which a page waits for the queue. A browser would wait no longer.
const PATIENCE: Duration = Duration::from_secs(30);

impl<Q: Queue, S: Store> Control<Q, S> {
    /// Inspects queue and endpoints, without sending a request. The worst findings are last.
    pub(in crate::admin) async fn inspect(&self) -> Result<Vec<Finding>, Refusal> {
        let busy =
            |_| Refusal::unavailable("another inspection is in progress; try again".to_owned());
        let _one = self.inspecting.try_lock().map_err(busy)?;
        let config = self.reloader.config();
        let queue = timeout(PATIENCE, self.queue.inspect(&config.subscribers));
        let (queue, endpoints) = tokio::join!(queue, inspect::inspect(&config.subscribers));
        let late = |_| {
            let why = "the queue did not answer all questions in time; `hooktrail check --connect` waits longer";
            Refusal::unavailable(why.to_owned())
        };
        let mut findings = queue.map_err(late)?.map_err(|e| queue_fails(&e))?;
        findings.extend(endpoints);
        Ok(summarized(findings))
    }

    /// The time since the daemon started.
    pub(in crate::admin) fn uptime(&self) -> Duration {
        clock::instant().saturating_duration_since(self.started)
    }
}

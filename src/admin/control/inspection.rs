//! What can go wrong, as `check --connect` finds it.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use tokio::time::timeout;

use super::Control;
use crate::{
    admin::answer::Refusal,
    clock,
    config::Subscriber,
    endpoint::inspect,
    queue::Queue,
    store::Store,
    telemetry::{
        finding::{Finding, summarized},
        status::LastHour,
    },
    wording::rounded,
};

/// The longest time for which a page waits for the queue and for the endpoints. A browser would wait
/// no longer.
const PATIENCE: Duration = Duration::from_secs(30);

/// The least time between two inspections: each connects to every endpoint.
pub(in crate::admin) const INSPECT_EVERY: Duration = Duration::from_secs(30);

/// The result of an inspection.
#[derive(Debug)]
pub(in crate::admin) struct Inspected {
    pub(in crate::admin) at: SystemTime,
    /// The worst are last.
    pub(in crate::admin) findings: Vec<Finding>,
    ended: Instant,
}

/// The inspections of a daemon: one at a time, and the result of the last one.
#[derive(Debug, Default)]
pub(super) struct Inspections {
    running: tokio::sync::Mutex<()>,
    last: Mutex<Option<Arc<Inspected>>>,
}

impl<Q: Queue, S: Store> Control<Q, S> {
    /// The result of the last inspection, if there was one since the daemon started.
    pub(in crate::admin) fn inspected(&self) -> Option<Arc<Inspected>> {
        self.inspections.last.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Inspects queue and endpoints, without a request to those, unless that was done within
    /// [`INSPECT_EVERY`]. What is late is a finding, and hides no other.
    pub(in crate::admin) async fn inspect(&self) -> Result<(), Refusal> {
        self.inspect_within(PATIENCE).await
    }

    async fn inspect_within(&self, patience: Duration) -> Result<(), Refusal> {
        let busy =
            |_| Refusal::unavailable("another inspection is in progress; try again".to_owned());
        let _one = self.inspections.running.try_lock().map_err(busy)?;
        let since = |last: Arc<Inspected>| clock::instant().saturating_duration_since(last.ended);
        if self.inspected().is_some_and(|last| since(last) < INSPECT_EVERY) {
            return Ok(());
        }
        let config = self.reloader.config();
        let (mut findings, endpoints) = tokio::join!(
            self.inspect_queue(&config.subscribers, patience),
            inspect::inspect(&config.subscribers, patience)
        );
        findings.extend(endpoints);
        let (at, ended) = (clock::now(), clock::instant());
        let inspected = Inspected { at, findings: summarized(findings), ended };
        *self.inspections.last.lock().unwrap_or_else(PoisonError::into_inner) =
            Some(Arc::new(inspected));
        Ok(())
    }

    async fn inspect_queue(
        &self,
        subscribers: &[Arc<Subscriber>],
        patience: Duration,
    ) -> Vec<Finding> {
        match timeout(patience, self.queue.inspect(subscribers)).await {
            Ok(Ok(findings)) => findings,
            Ok(Err(e)) => vec![e.to_finding()],
            Err(_) => {
                let found = format!("did not answer all questions within {}", rounded(patience));
                let late = Finding::warning("queue", found)
                    .risking("what is wrong with it is not known")
                    .with_remedy("`hooktrail check --connect` waits longer");
                vec![late]
            }
        }
    }

    /// All subscribers as they are configured now.
    pub(in crate::admin) fn configured(&self) -> crate::config::Subscribers {
        self.reloader.config().subscribers.clone()
    }

    /// What a subscriber's lane has done in the last hour.
    pub(in crate::admin) fn last_hour(&self, name: &str) -> LastHour {
        self.board.last_hour(name, clock::instant()).unwrap_or_default()
    }

    /// The time since the daemon started.
    pub(in crate::admin) fn uptime(&self) -> Duration {
        clock::instant().saturating_duration_since(self.started)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        admin::history_health::Health,
        queue::fake::Fake,
        store::fake::FakeStore,
        supervisor::{fleet::Phase, reload::Reloader},
        telemetry::{log, metrics::Metrics, status::Board},
    };

    #[tokio::test]
    async fn a_queue_that_is_late_hides_no_endpoint_and_endpoints_are_not_connected_to_at_each_request()
     {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("hooktrail.toml");
        let text = "[queue]\nurl = \"embedded\"\n".to_owned()
            + &crate::config::testing::table(
                "a",
                "url = \"https://127.0.0.1:9/\"\nhttp = { allow_private_addresses = true }\n",
            );
        std::fs::write(&path, text).expect("writes");
        let config = crate::config::load(&path).unwrap_or_else(|e| panic!("{e}"));
        let (queue, board) = (Fake::default(), Board::new(Metrics::new(clock::now())));
        let (removals, level) = (queue.removals().clone(), log::Level::default());
        let (reloader, _changes) = Reloader::new(
            config,
            crate::store::KeptSubscribers::default(),
            board.clone(),
            removals,
            level,
        );
        let phase = tokio::sync::watch::Sender::new(Phase::Running).subscribe();
        let store = FakeStore::default();
        let history = Health::new(&store, board.clone());
        let control = Control::new(queue.clone(), store, reloader, board, phase, history);
        assert!(control.inspected().is_none());
        queue.be_silent(true);
        control.inspect_within(Duration::from_secs(1)).await.expect("it ends");
        let first = control.inspected().expect("a result");
        let names: Vec<String> = first.findings.iter().map(Finding::names).collect();
        assert_eq!(names, ["queue", "endpoint of `a`"], "{first:?}");
        assert!(first.findings[0].found.contains("within 1s"), "{first:?}");
        // At once after it, nobody is asked again.
        control.inspect().await.expect("it ends");
        let again = control.inspected().expect("a result");
        assert!(Arc::ptr_eq(&first, &again));
        // Two at a time are one too many.
        control.inspections.last.lock().expect("not poisoned").take();
        let (one, other) =
            tokio::join!(control.inspect_within(Duration::from_secs(1)), control.inspect());
        assert!(one.is_ok() && other.is_err());
    }
}

//! What a lane knows of its subscriber, whatever session it is in: how it is configured, whether it
//! is paused, its circuit and the health of its endpoint.

use std::{
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use tokio::sync::watch;

use super::{
    trouble::Trouble,
    waits::{changed, pause_of, wait_for},
};
use crate::{
    clock,
    config::{Subscriber, changes::Differences, keys::Affects},
    delivery::{Pause, Standing, Standings},
    endpoint::webhook::Webhook,
    policy::{
        answer::Health,
        circuit_breaker::{self, CircuitBreaker, Permit},
    },
    queue::{Queue, Window},
    telemetry::status::{Circuit, LaneStatus},
};

/// After so long it is told that the lane waits for the record of pauses.
const STATE_IS_LATE: Duration = Duration::from_secs(10);

/// A subscriber as it is configured, and its endpoint.
#[derive(Debug, Clone)]
pub struct Served {
    pub subscriber: Arc<Subscriber>,
    pub webhook: Webhook,
}

/// What a lane knows over all its sessions.
#[derive(Debug)]
pub(super) struct State<Q> {
    pub(super) configured: watch::Receiver<Served>,
    /// What was configured when the lane last looked.
    pub(super) subscriber: Arc<Subscriber>,
    pub(super) webhook: Webhook,
    pub(super) queue: Q,
    pub(super) breaker: CircuitBreaker,
    pub(super) health: Health,
    /// Counts what requests are made of: an answer to one of before says nothing of those that are
    /// made now.
    pub(super) generation: u64,
    pub(super) standings: watch::Receiver<Option<Standings>>,
    /// The pause that was last logged.
    pub(super) pause: Option<Pause>,
    /// When the subscriber was last resumed, as far as the lane has acted on it.
    pub(super) resumed: Option<SystemTime>,
    /// An operator wants it tried now. A wish from before the circuit opened, or before a probe
    /// began, counts as seen.
    pub(super) tries: watch::Receiver<u64>,
    pub(super) trouble: Trouble,
    pub(super) status: LaneStatus,
}

impl<Q: Queue> State<Q> {
    pub(super) fn new(configured: watch::Receiver<Served>, queue: Q, status: LaneStatus) -> Self {
        let Served { subscriber, webhook } = configured.borrow().clone();
        let breaker = CircuitBreaker::new(subscriber.circuit_breaker.clone());
        let trouble = Trouble::new(subscriber.name.clone(), status.clone());
        let (standings, tries) = (queue.standings(), status.tries());
        Self {
            configured,
            subscriber,
            webhook,
            queue,
            breaker,
            health: Health::default(),
            generation: 0,
            standings,
            pause: None,
            resumed: None,
            tries,
            trouble,
            status,
        }
    }

    /// Takes over what is configured now. Returns whether a session has to be opened anew for it.
    pub(super) fn adopt(&mut self) -> bool {
        let Served { subscriber, webhook } = self.configured.borrow_and_update().clone();
        let old = std::mem::replace(&mut self.subscriber, subscriber);
        self.webhook = webhook;
        let new = &self.subscriber;
        let differences = Differences::between(&old, new);
        if differences.affect(Affects::Requests) {
            // A receiver that refuses them now may mean the new secret, and no event.
            self.generation += 1;
            self.health = Health::default();
        }
        if old.url != new.url {
            // What was known of the endpoint is of another one.
            self.breaker = CircuitBreaker::new(new.circuit_breaker.clone());
        } else if old.circuit_breaker != new.circuit_breaker {
            self.breaker.set_policy(new.circuit_breaker.clone(), clock::instant());
        }
        self.tell_circuit();
        differences.affect(Affects::Session)
    }

    /// Waits until it is known that the subscriber is not paused.
    pub(super) async fn allowed(&mut self) {
        loop {
            self.adopt();
            let name = self.subscriber.name.clone();
            if self.subscriber.paused {
                let why = "`paused = true` in the configuration".to_owned();
                let since = self
                    .pause
                    .as_ref()
                    .filter(|p| p.why == why)
                    .map_or_else(clock::now, |p| p.since);
                self.is_paused(Pause { why, since, by: "configuration".to_owned() });
                changed(&mut self.configured).await;
                continue;
            }
            let known = wait_for(&mut self.standings, |all| all.is_some());
            if tokio::time::timeout(STATE_IS_LATE, known).await.is_err() {
                tracing::warn!(
                    subscriber = name.as_str(),
                    "nothing is sent before the queue has told whether the subscriber is paused"
                );
            }
            let found = wait_for(&mut self.standings, |all| all.is_some()).await;
            let Some(pause) = found.as_ref().and_then(|all| pause_of(all, &name)).cloned() else {
                break;
            };
            self.is_paused(pause.clone());
            tokio::select! {
                // Resumed, or for another reason than before.
                _ = wait_for(&mut self.standings, |all| all.as_ref().is_some_and(|all| pause_of(all, &name) != Some(&pause))) => {}
                () = changed(&mut self.configured) => {}
            }
        }
        self.status.paused(None);
        let resumed = self.resumed_at();
        let is_new = std::mem::replace(&mut self.resumed, resumed) != resumed;
        if let Some(pause) = self.pause.take() {
            // What is recorded only an operator takes back.
            let by = if pause.by == "configuration" { "configuration" } else { "operator" };
            tracing::info!(
                subscriber = self.subscriber.name.as_str(),
                by,
                paused_by = pause.by,
                "resumed"
            );
            // What was known of the endpoint is of another time.
            self.breaker = CircuitBreaker::new(self.subscriber.circuit_breaker.clone());
            self.health = Health::default();
        } else if is_new && self.breaker.permit(clock::instant()) != Permit::Flow {
            tracing::info!(
                subscriber = self.subscriber.name.as_str(),
                "resumed: one batch is tried now"
            );
            self.breaker.try_now();
        }
    }

    pub(super) fn is_paused(&mut self, pause: Pause) {
        self.status.paused(Some(pause.clone()));
        // Read back from its record it is a little older: times are kept there less exactly.
        let is_logged = self
            .pause
            .as_ref()
            .is_some_and(|last| (&last.why, &last.by) == (&pause.why, &pause.by));
        if !is_logged {
            let (name, why, by) = (&self.subscriber.name, &pause.why, &pause.by);
            let until = if by == "configuration" {
                "that is taken out of it".to_owned()
            } else {
                format!("`hooktrail resume {name}`")
            };
            tracing::warn!(
                subscriber = name.as_str(),
                why,
                by,
                "paused: its events wait in the queue until {until}"
            );
            self.pause = Some(pause);
        }
    }

    pub(super) fn tell_circuit(&self) {
        let (now, time) = (clock::instant(), clock::now());
        let at = |until: Instant| time + until.saturating_duration_since(now);
        let circuit = match self.breaker.state() {
            circuit_breaker::State::Closed { .. } => Circuit::Closed,
            circuit_breaker::State::Open { until, .. } => Circuit::Open { until: at(until) },
            circuit_breaker::State::HalfOpen { .. } | circuit_breaker::State::Tried { .. } => {
                Circuit::HalfOpen
            }
        };
        self.status.circuit(circuit, time);
        self.status.held(self.breaker.held_until().map(at));
    }

    /// Batches first attempted before then begin anew.
    pub(super) fn resumed_at(&self) -> Option<SystemTime> {
        match self.standings.borrow().as_ref()?.get(&self.subscriber.name)? {
            Standing::Resumed { at } => Some(*at),
            Standing::Paused(_) => None,
        }
    }

    /// How much to take.
    ///
    /// The same for a probe: a queue puts what it is given back behind all that it was given back
    /// before, so a probe that took less would change the order of the backlog.
    pub(super) fn window(&self) -> Window {
        Window::of(&self.subscriber)
    }
}

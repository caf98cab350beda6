//! The state of a lane that outlasts its sessions: its configuration, whether it is paused, its
//! circuit and the health of its endpoint.

use std::{
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use tokio::sync::watch;

use super::signals::{changed, pause_of, wait_for};
use crate::{
    clock,
    config::{Subscriber, changes::Differences, keys::Affects},
    delivery::{Outcome, Pause, PauseState, PauseStates},
    endpoint::webhook::Webhook,
    policy::{
        answer::Health,
        circuit_breaker::{self, CircuitBreaker, Permit},
        rate::Bucket,
        turn::Slots,
        verdict::{self, Attempt, Verdict},
    },
    queue::{Queue, Window},
    telemetry::{
        lane_event::{Circuit, LaneEvent},
        outage::Outage,
        status::LaneReporter,
    },
};

/// The time for which a lane waits for the pause states before it says so.
const PAUSE_STATE_LATE: Duration = Duration::from_secs(10);

/// Events in a row that `match` keeps away before that is worth a warning.
const MISSES: u64 = 1000;

/// Why a subscriber is paused that has `paused = true`.
const CONFIGURED_PAUSE: &str = "`paused = true` in the configuration";

/// The `by` of that pause.
const BY_CONFIGURATION: &str = "configuration";

/// A subscriber as it is configured, and its endpoint.
#[derive(Debug, Clone)]
pub struct LaneConfig {
    pub subscriber: Arc<Subscriber>,
    pub webhook: Webhook,
}

/// The state of a lane over all its sessions.
#[derive(Debug)]
pub(super) struct State<Q> {
    pub(super) configured: watch::Receiver<LaneConfig>,
    /// `subscriber` and `webhook` are the configuration in use.
    pub(super) subscriber: Arc<Subscriber>,
    pub(super) webhook: Webhook,
    pub(super) queue: Q,
    pub(super) breaker: CircuitBreaker,
    pub(super) health: Health,
    /// Incremented when a setting of requests changes. Answers to attempts of an older generation
    /// say nothing of the health of the endpoint.
    pub(super) generation: u64,
    pub(super) pause_states: watch::Receiver<Option<PauseStates>>,
    /// The pause that was last reported.
    pause: Option<Pause>,
    /// When the subscriber was last resumed, as far as the lane has acted on it.
    pub(super) resumed: Option<SystemTime>,
    /// Retries that an operator requests. A request from before the circuit opened, or before a
    /// probe began, counts as seen.
    pub(super) retry_requests: watch::Receiver<u64>,
    /// Events in a row that `match` kept away.
    misses: u64,
    /// What `http.rate` allows.
    pub(super) bucket: Option<Bucket>,
    /// Whether it was reported that the receiver takes no compressed request.
    plain: bool,
    /// The time in which the queue fails. A queue that can be opened may still fail: some open each
    /// time and fail at the first use.
    outage: Outage,
    reporter: LaneReporter,
}

impl<Q: Queue> State<Q> {
    pub(super) fn new(
        configured: watch::Receiver<LaneConfig>,
        queue: Q,
        reporter: LaneReporter,
    ) -> Self {
        let LaneConfig { subscriber, webhook } = configured.borrow().clone();
        let breaker = CircuitBreaker::new(subscriber.circuit_breaker.clone());
        let bucket = subscriber.http.rate.map(|rate| Bucket::new(rate, clock::instant()));
        let pause_states = queue.pause_states();
        let retry_requests = reporter.retry_requests();
        Self {
            configured,
            subscriber,
            webhook,
            queue,
            breaker,
            health: Health::default(),
            generation: 0,
            pause_states,
            pause: None,
            resumed: None,
            retry_requests,
            misses: 0,
            bucket,
            // What a lane before this one has reported ends with its first configuration.
            plain: true,
            outage: Outage::default(),
            reporter,
        }
    }

    pub(super) fn report(&self, event: &LaneEvent<'_>) {
        self.reporter.report(event);
    }

    /// For a task of the lane.
    pub(super) fn reporter(&self) -> LaneReporter {
        self.reporter.clone()
    }

    /// Puts the latest configuration into use. Returns whether it needs a new session.
    pub(super) fn adopt(&mut self) -> bool {
        let LaneConfig { subscriber, webhook } = self.configured.borrow_and_update().clone();
        let old = std::mem::replace(&mut self.subscriber, subscriber);
        self.webhook = webhook;
        let new = &self.subscriber;
        let differences = Differences::between(&old, new);
        if differences.affect(Affects::Requests) {
            // A refusal now may be about the new secret, not the event.
            self.generation += 1;
            self.health = Health::default();
        }
        if old.url != new.url {
            // What was known is of another endpoint.
            self.breaker = CircuitBreaker::new(new.circuit_breaker.clone());
        } else if old.circuit_breaker != new.circuit_breaker {
            self.breaker.set_policy(new.circuit_breaker.clone(), clock::instant());
        }
        if old.conditions != new.conditions {
            self.misses = 0;
        }
        if self.bucket.as_ref().map(Bucket::rate) != new.http.rate {
            self.bucket = new.http.rate.map(|rate| Bucket::new(rate, clock::instant()));
        }
        let needs_session = differences.affect(Affects::Session);
        self.report_circuit();
        self.report_compression();
        needs_session
    }

    /// Waits until it is known that the subscriber is not paused.
    pub(super) async fn unpaused(&mut self) {
        loop {
            self.adopt();
            if self.subscriber.paused {
                self.pause_by_configuration();
                changed(&mut self.configured).await;
                continue;
            }
            let Some(pause) = self.recorded_pause().await else { break };
            self.paused(pause.clone());
            let name = self.subscriber.name.clone();
            let is_other = |all: &Option<PauseStates>| {
                all.as_ref().is_some_and(|all| pause_of(all, &name) != Some(&pause))
            };
            tokio::select! {
                _ = wait_for(&mut self.pause_states, is_other) => {}
                () = changed(&mut self.configured) => {}
            }
        }
        self.resume();
    }

    fn pause_by_configuration(&mut self) {
        let before = self.pause.as_ref().filter(|p| p.why == CONFIGURED_PAUSE);
        let since = before.map_or_else(clock::now, |p| p.since);
        let (why, by) = (CONFIGURED_PAUSE.to_owned(), BY_CONFIGURATION.to_owned());
        self.paused(Pause { why, since, by });
    }

    /// The pause that is recorded, once the record is known.
    async fn recorded_pause(&mut self) -> Option<Pause> {
        let known = wait_for(&mut self.pause_states, |all| all.is_some());
        if tokio::time::timeout(PAUSE_STATE_LATE, known).await.is_err() {
            self.report(&LaneEvent::PauseStateLate);
        }
        let all = wait_for(&mut self.pause_states, |all| all.is_some()).await;
        all.as_ref().and_then(|all| pause_of(all, &self.subscriber.name)).cloned()
    }

    fn resume(&mut self) {
        let resumed = self.resumed_at();
        let is_new = std::mem::replace(&mut self.resumed, resumed) != resumed;
        if let Some(pause) = self.pause.take() {
            // A recorded pause is ended by operators only.
            let by = if pause.by == BY_CONFIGURATION { BY_CONFIGURATION } else { "operator" };
            self.report(&LaneEvent::Resumed { by, paused_by: &pause.by });
            // What was known of the endpoint is out of date.
            self.breaker = CircuitBreaker::new(self.subscriber.circuit_breaker.clone());
            self.health = Health::default();
        } else if is_new && self.breaker.permit(clock::instant()) != Permit::Flow {
            self.report(&LaneEvent::ResumedUnpaused);
            self.breaker.try_now();
        }
    }

    pub(super) fn paused(&mut self, pause: Pause) {
        // Read back from its record a pause has a slightly older time: the record keeps fewer
        // digits.
        let known =
            self.pause.as_ref().is_some_and(|last| last.why == pause.why && last.by == pause.by);
        self.report(&LaneEvent::Paused { pause: &pause, known });
        if !known {
            self.pause = Some(pause);
        }
    }

    pub(super) fn queue_failed(&mut self, why: &str) {
        let news = self.outage.failed(why);
        self.report(&LaneEvent::QueueFailed { why, news });
    }

    pub(super) fn queue_fails(&self) -> bool {
        self.outage.is_open()
    }

    pub(super) fn queue_works(&mut self) {
        if self.outage.end() {
            self.report(&LaneEvent::QueueRestored);
        }
    }

    pub(super) fn report_circuit(&self) {
        let (now, time) = (clock::instant(), clock::now());
        let at = |until: Instant| time + until.saturating_duration_since(now);
        let circuit = match self.breaker.state() {
            circuit_breaker::State::Closed { .. } => Circuit::Closed,
            circuit_breaker::State::Open { until, .. } => Circuit::Open { until: at(until) },
            circuit_breaker::State::HalfOpen { .. } | circuit_breaker::State::Tried { .. } => {
                Circuit::HalfOpen
            }
        };
        let hold_until = self.breaker.held_until().map(at);
        self.report(&LaneEvent::CircuitIs { circuit, hold_until });
    }

    /// `match` let events through, and kept others away.
    pub(super) fn matched(&mut self, hits: u64, misses: u64) {
        if hits > 0 {
            self.misses = 0;
        }
        let before = self.misses;
        self.misses += misses;
        if before < MISSES && self.misses >= MISSES {
            self.report(&LaneEvent::NothingMatches { events: self.misses });
        }
    }

    /// Reports whether the receiver takes no compressed request, when that has changed.
    pub(super) fn report_compression(&mut self) {
        let refused = self.webhook.refuses_compression();
        if std::mem::replace(&mut self.plain, refused) != refused {
            self.report(&LaneEvent::Compression { refused });
        }
    }

    /// The number of requests that may be in flight; `None` if the circuit allows none.
    pub(super) fn slots(&mut self) -> Option<Slots> {
        match self.breaker.permit(clock::instant()) {
            Permit::Flow => {
                let all = self.subscriber.http.concurrency;
                Some(Slots::Flow(self.breaker.ramp().map_or(all, |ramp| ramp.requests(all))))
            }
            Permit::Probe => Some(Slots::Probe),
            Permit::Wait(_) => None,
        }
    }

    /// Whether batches and requests are as configured: the circuit is closed, and no ramp lasts.
    pub(super) fn is_unrestrained(&mut self) -> bool {
        self.breaker.ramp().is_none() && self.breaker.permit(clock::instant()) == Permit::Flow
    }

    /// The most events and bytes of a first attempt. While the ramp lasts they are fewer than
    /// configured.
    pub(super) fn batch_limits(&self) -> (usize, usize) {
        let batch = &self.subscriber.batch;
        let (events, bytes) =
            self.breaker.ramp().map_or((batch.max_events, batch.max_bytes), |ramp| {
                (ramp.batch(batch.max_events), ramp.batch(batch.max_bytes))
            });
        let by_rate = self.subscriber.http.rate.map_or(events, |rate| rate.max_events());
        (events.min(by_rate), bytes)
    }

    /// The verdict on an attempt. `in_order`: nothing may overtake its batch. `current`: requests are
    /// still made as this one was.
    pub(super) fn decide(
        &self,
        attempt: &Attempt,
        outcome: &Outcome,
        in_order: bool,
        current: bool,
        now: SystemTime,
    ) -> Verdict {
        let decide = if in_order { verdict::decide_in_order } else { verdict::decide };
        let (health, retry) = (&self.health, &self.subscriber.retry);
        let verdict = decide(attempt, outcome, current, health, retry, now, clock::random());
        if self.subscriber.in_order && !in_order { verdict.beside() } else { verdict }
    }

    /// The last resume. Batches first attempted before it start over.
    pub(super) fn resumed_at(&self) -> Option<SystemTime> {
        match self.pause_states.borrow().as_ref()?.get(&self.subscriber.name)? {
            PauseState::Resumed { at } => Some(*at),
            PauseState::Paused(_) => None,
        }
    }

    /// Whether a pause of the subscriber is recorded.
    pub(super) fn pause_is_recorded(&self) -> bool {
        let all = self.pause_states.borrow();
        all.as_ref().is_some_and(|all| pause_of(all, &self.subscriber.name).is_some())
    }

    /// The window of a session; a probe has the same. A queue puts a requeued message behind those
    /// requeued before it, so a smaller window would change the order of the backlog.
    pub(super) fn window(&self) -> Window {
        Window::of(&self.subscriber)
    }
}

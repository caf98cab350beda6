//! The metrics of one subscriber.

use std::{
    collections::BTreeMap,
    time::{Duration, SystemTime},
};

use prometheus_client::metrics::{counter::Counter, histogram::Histogram};

use super::{Float, Metrics, unix};
use crate::{
    delivery::{DispositionKind, FailureKind, Reason},
    policy::circuit_breaker::CircuitState,
};

/// The handles of one subscriber.
#[derive(Debug, Clone)]
pub struct SubscriberMetrics {
    received: Counter,
    delivered: Counter,
    recognised: Counter,
    attempts: BTreeMap<DispositionKind, Counter>,
    failures: BTreeMap<FailureKind, Counter>,
    unsent: Counter,
    dead_letters: BTreeMap<Reason, Counter>,
    attempt_duration: Histogram,
    batch_events: Histogram,
    batch_bytes: Histogram,
    lag: Histogram,
    delivery_duration: Histogram,
    in_flight: Float,
    circuit: BTreeMap<CircuitState, Float>,
    circuit_opened: Float,
    paused: Float,
    up: Float,
    panics: Counter,
    retries_waiting: Float,
    next_retry: Float,
    oldest: Float,
    queues: [Float; 3],
}

impl SubscriberMetrics {
    pub(super) fn new(metrics: &Metrics, name: &str) -> Self {
        let of = [("subscriber", name)];
        let outcome = |o: DispositionKind| {
            (o, metrics.counter("attempts", &[("subscriber", name), ("outcome", o.name())]))
        };
        let failure = |f: FailureKind| {
            (f, metrics.counter("attempt_failures", &[("subscriber", name), ("failure", f.name())]))
        };
        let reason = |r: Reason| {
            (r, metrics.counter("dead_letters", &[("subscriber", name), ("reason", r.name())]))
        };
        let state = |s: CircuitState| {
            (s, metrics.gauge("circuit_state", &[("subscriber", name), ("state", s.name())]))
        };
        let queue = |q| metrics.gauge("queue_messages", &[("subscriber", name), ("queue", q)]);
        Self {
            received: metrics.counter("events_received", &of),
            delivered: metrics.counter("events_delivered", &of),
            recognised: metrics.counter("events_recognised", &of),
            attempts: DispositionKind::ALL.map(outcome).into(),
            failures: FailureKind::ALL.map(failure).into(),
            unsent: metrics.counter("unsent_requests", &of),
            dead_letters: Reason::OWN.map(reason).into(),
            attempt_duration: metrics.histogram("attempt_duration_seconds", &of),
            batch_events: metrics.histogram("batch_events", &of),
            batch_bytes: metrics.histogram("batch_bytes", &of),
            lag: metrics.histogram("delivery_lag_seconds", &of),
            delivery_duration: metrics.histogram("delivery_duration_seconds", &of),
            in_flight: metrics.gauge("requests_in_flight", &of),
            circuit: CircuitState::ALL.map(state).into(),
            circuit_opened: metrics.gauge("circuit_opened_timestamp_seconds", &of),
            paused: metrics.gauge("paused", &of),
            up: metrics.gauge("lane_up", &of),
            panics: metrics.counter("lane_panics", &of),
            retries_waiting: metrics.gauge("retries_waiting", &of),
            next_retry: metrics.gauge("next_retry_timestamp_seconds", &of),
            oldest: metrics.gauge("oldest_event_timestamp_seconds", &of),
            queues: [queue("main"), queue("retry"), queue("dead")],
        }
    }

    pub fn received(&self, events: u64) {
        self.received.inc_by(events);
    }

    pub fn recognised(&self, events: u64) {
        self.recognised.inc_by(events);
    }

    pub fn attempt_begins(&self, events: u32, bytes: usize) {
        self.in_flight.inc();
        self.batch_events.observe(f64::from(events));
        self.batch_bytes.observe(bytes as f64);
    }

    pub fn attempt_ends(
        &self,
        disposition: DispositionKind,
        failure: Option<FailureKind>,
        took: Duration,
    ) {
        self.in_flight.dec();
        self.attempt_duration.observe(took.as_secs_f64());
        self.attempts[&disposition].inc();
        if let Some(failure) = failure {
            self.failures[&failure].inc();
        }
    }

    /// An attempt that had begun, and of which nothing was sent.
    pub fn attempt_was_none(&self) {
        self.in_flight.dec();
        self.unsent.inc();
    }

    /// An attempt that nobody will hear the outcome of: its lane is gone.
    pub fn attempts_are_gone(&self) {
        self.in_flight.set(0.0);
    }

    /// A batch was accepted, so long after its first event's timestamp and its arrival.
    pub fn delivered(&self, events: u32, lag: Option<Duration>, since_arrival: Option<Duration>) {
        self.delivered.inc_by(u64::from(events));
        if let Some(lag) = lag {
            self.lag.observe(lag.as_secs_f64());
        }
        if let Some(took) = since_arrival {
            self.delivery_duration.observe(took.as_secs_f64());
        }
    }

    /// `reason` is one of [`Reason::OWN`]: what the broker gives up is not counted.
    pub fn dead(&self, reason: Reason, letters: u64) {
        if let Some(counter) = self.dead_letters.get(&reason) {
            counter.inc_by(letters);
        }
    }

    /// `since`: when a circuit that is not closed was opened.
    pub fn circuit(&self, state: CircuitState, since: Option<SystemTime>) {
        for (of, gauge) in &self.circuit {
            gauge.set(f64::from(*of == state));
        }
        self.circuit_opened.set(since.map_or(0.0, unix));
    }

    pub fn paused(&self, paused: bool) {
        self.paused.set(f64::from(paused));
    }

    pub fn up(&self, up: bool) {
        self.up.set(f64::from(up));
    }

    pub fn panicked(&self) {
        self.panics.inc();
    }

    pub fn retries(&self, waiting: usize, next: Option<SystemTime>) {
        self.retries_waiting.set(waiting as f64);
        self.next_retry.set(next.map_or(0.0, unix));
    }

    pub fn oldest(&self, arrived: Option<SystemTime>) {
        self.oldest.set(arrived.map_or(0.0, unix));
    }

    /// Messages in the main, the retry and the dead queue.
    pub fn queues(&self, messages: [u64; 3]) {
        for (gauge, messages) in self.queues.iter().zip(messages) {
            gauge.set(messages as f64);
        }
    }
}

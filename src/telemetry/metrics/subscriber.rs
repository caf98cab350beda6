//! The metrics of one subscriber.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::SystemTime,
};

use prometheus_client::metrics::{counter::Counter, histogram::Histogram};

use super::families::{Families, Float, unix};
use crate::{
    delivery::{DispositionKind, FailureKind, Reason},
    policy::circuit_breaker::CircuitState,
    telemetry::lane_event::{AttemptEnded, LaneEvent, Settled},
};

/// The name under which subscribers without series of their own are counted: no subscriber's name has
/// this character.
pub(super) const ALL_TOGETHER: &str = "*";

/// What counts one subscriber: into series of its own, or into those of all.
#[derive(Debug)]
pub struct SubscriberMetrics {
    series: Arc<Series>,
    in_flight: Share,
    circuit: BTreeMap<CircuitState, Share>,
    paused: Share,
    plain: Share,
    up: Share,
    retries_waiting: Share,
    queues: [Share; 3],
}

/// The series that have a subscriber's name.
#[derive(Debug)]
pub(super) struct Series {
    received: Counter,
    delivered: Counter,
    recognised: Counter,
    filtered: Counter,
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
    paused: Float,
    plain: Float,
    up: Float,
    panics: Counter,
    rate_waits: Counter,
    retries_waiting: Float,
    queues: [Float; 3],
    /// Points in time, of which there is no sum.
    times: Option<Times>,
}

#[derive(Debug)]
struct Times {
    circuit_opened: Float,
    next_retry: Float,
    oldest: Float,
}

/// What one subscriber adds to a gauge, until it ends.
#[derive(Debug)]
struct Share {
    gauge: Float,
    /// The bits of a float.
    added: AtomicU64,
}

impl Share {
    fn of(gauge: &Float) -> Self {
        Self { gauge: gauge.clone(), added: AtomicU64::new(0.0_f64.to_bits()) }
    }

    fn set(&self, value: f64) {
        let before = f64::from_bits(self.added.swap(value.to_bits(), Ordering::Relaxed));
        if value != before {
            self.gauge.inc_by(value - before);
        }
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.set(0.0);
    }
}

impl Series {
    pub(super) fn new(of_all: &Families, name: &str) -> Self {
        let of = [("subscriber", name)];
        let outcome = |o: DispositionKind| {
            (o, of_all.counter("attempts", &[("subscriber", name), ("outcome", o.name())]))
        };
        let failure = |f: FailureKind| {
            (f, of_all.counter("attempt_failures", &[("subscriber", name), ("failure", f.name())]))
        };
        let reason = |r: Reason| {
            (r, of_all.counter("dead_letters", &[("subscriber", name), ("reason", r.name())]))
        };
        let state = |s: CircuitState| {
            (s, of_all.gauge("circuit_state", &[("subscriber", name), ("state", s.name())]))
        };
        let queue = |q| of_all.gauge("queue_messages", &[("subscriber", name), ("queue", q)]);
        let times = || Times {
            circuit_opened: of_all.gauge("circuit_opened_timestamp_seconds", &of),
            next_retry: of_all.gauge("next_retry_timestamp_seconds", &of),
            oldest: of_all.gauge("oldest_event_timestamp_seconds", &of),
        };
        Self {
            received: of_all.counter("events_received", &of),
            delivered: of_all.counter("events_delivered", &of),
            recognised: of_all.counter("events_recognised", &of),
            filtered: of_all.counter("events_filtered", &of),
            attempts: DispositionKind::ALL.map(outcome).into(),
            failures: FailureKind::ALL.map(failure).into(),
            unsent: of_all.counter("unsent_requests", &of),
            dead_letters: Reason::OWN.map(reason).into(),
            attempt_duration: of_all.histogram("attempt_duration_seconds", &of),
            batch_events: of_all.histogram("batch_events", &of),
            batch_bytes: of_all.histogram("batch_bytes", &of),
            lag: of_all.histogram("delivery_lag_seconds", &of),
            delivery_duration: of_all.histogram("delivery_duration_seconds", &of),
            in_flight: of_all.gauge("requests_in_flight", &of),
            circuit: CircuitState::ALL.map(state).into(),
            paused: of_all.gauge("paused", &of),
            plain: of_all.gauge("compression_refused", &of),
            up: of_all.gauge("lane_up", &of),
            panics: of_all.counter("lane_panics", &of),
            rate_waits: of_all.counter("rate_waits", &of),
            retries_waiting: of_all.gauge("retries_waiting", &of),
            queues: [queue("main"), queue("retry"), queue("dead")],
            times: (name != ALL_TOGETHER).then(times),
        }
    }
}

impl SubscriberMetrics {
    pub(super) fn new(series: Arc<Series>) -> Self {
        let circuit = series.circuit.iter().map(|(state, gauge)| (*state, Share::of(gauge)));
        Self {
            in_flight: Share::of(&series.in_flight),
            circuit: circuit.collect(),
            paused: Share::of(&series.paused),
            plain: Share::of(&series.plain),
            up: Share::of(&series.up),
            retries_waiting: Share::of(&series.retries_waiting),
            queues: series.queues.each_ref().map(Share::of),
            series,
        }
    }

    /// Counts an event; gauges follow the lane's status.
    pub(in crate::telemetry) fn count(&self, event: &LaneEvent<'_>) {
        match event {
            LaneEvent::Taken { events } => {
                self.series.received.inc_by(*events);
            }
            LaneEvent::AttemptStarted { batch, .. } => {
                self.series.batch_events.observe(f64::from(batch.events));
                self.series.batch_bytes.observe(batch.body.len() as f64);
            }
            LaneEvent::AttemptEnded(ended) => self.attempt_ended(ended),
            LaneEvent::Unsent { .. } => {
                self.series.unsent.inc();
            }
            LaneEvent::Delivered { events, lag, since_arrival } => {
                self.series.delivered.inc_by(u64::from(*events));
                if let Some(lag) = lag {
                    self.series.lag.observe(lag.as_secs_f64());
                }
                if let Some(took) = since_arrival {
                    self.series.delivery_duration.observe(took.as_secs_f64());
                }
            }
            LaneEvent::Settled(settled) => self.settled(settled),
            LaneEvent::Panicked { .. } => {
                self.series.panics.inc();
            }
            LaneEvent::RateWaits => {
                self.series.rate_waits.inc();
            }
            LaneEvent::Recognised { .. }
            | LaneEvent::Undeliverable { .. }
            | LaneEvent::NotSettled(_)
            | LaneEvent::Unsettled { .. }
            | LaneEvent::SessionEnded
            | LaneEvent::CircuitIs { .. }
            | LaneEvent::CircuitChanged(_)
            | LaneEvent::Compression { .. }
            | LaneEvent::NothingMatches { .. }
            | LaneEvent::RetryRequested
            | LaneEvent::PauseStateLate
            | LaneEvent::Paused { .. }
            | LaneEvent::Resumed { .. }
            | LaneEvent::ResumedUnpaused
            | LaneEvent::QueueFailed { .. }
            | LaneEvent::QueueRestored => {}
        }
    }

    fn attempt_ended(&self, ended: &AttemptEnded<'_>) {
        self.series.attempt_duration.observe(ended.took.as_secs_f64());
        if let Some(disposition) = ended.disposition.kind() {
            self.series.attempts[&disposition].inc();
        }
        if let Some(failure) = ended.outcome.failure() {
            self.series.failures[&failure.kind()].inc();
        }
    }

    fn settled(&self, settled: &Settled) {
        match settled {
            Settled::Recognised { events } => {
                self.series.recognised.inc_by(*events);
            }
            Settled::Filtered { events } => {
                self.series.filtered.inc_by(*events);
            }
            // What RabbitMQ gives up is not among the reasons, and not counted.
            Settled::DeadLetters(died) => {
                for counter in died.iter().filter_map(|d| self.series.dead_letters.get(&d.reason)) {
                    counter.inc();
                }
            }
            Settled::Delivered | Settled::Retries { .. } | Settled::Paused(_) => {}
        }
    }

    pub(in crate::telemetry) fn set_in_flight(&self, requests: usize) {
        self.in_flight.set(requests as f64);
    }

    /// `opened_at`: when a circuit that is not closed was opened.
    pub(in crate::telemetry) fn set_circuit(
        &self,
        state: CircuitState,
        opened_at: Option<SystemTime>,
    ) {
        for (of, share) in &self.circuit {
            share.set(f64::from(*of == state));
        }
        if let Some(times) = &self.series.times {
            times.circuit_opened.set(opened_at.map_or(0.0, unix));
        }
    }

    pub(in crate::telemetry) fn set_paused(&self, paused: bool) {
        self.paused.set(f64::from(paused));
    }

    pub(in crate::telemetry) fn set_compression_refused(&self, refused: bool) {
        self.plain.set(f64::from(refused));
    }

    pub(in crate::telemetry) fn set_up(&self, up: bool) {
        self.up.set(f64::from(up));
    }

    pub(in crate::telemetry) fn set_retries(&self, waiting: usize, next: Option<SystemTime>) {
        self.retries_waiting.set(waiting as f64);
        if let Some(times) = &self.series.times {
            times.next_retry.set(next.map_or(0.0, unix));
        }
    }

    pub(in crate::telemetry) fn set_oldest(&self, arrived_at: Option<SystemTime>) {
        if let Some(times) = &self.series.times {
            times.oldest.set(arrived_at.map_or(0.0, unix));
        }
    }

    /// Messages in the main, the retry and the dead queue.
    pub(in crate::telemetry) fn set_queues(&self, messages: [u64; 3]) {
        for (share, messages) in self.queues.iter().zip(messages) {
            share.set(messages as f64);
        }
    }
}

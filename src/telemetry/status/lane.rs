//! The status of one lane, made of its events.

use std::{
    collections::{BTreeMap, VecDeque},
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use tokio::sync::watch;

use super::{
    hour::{LastHour, Minutes},
    scheduled::Scheduled,
    view::{LastError, State, View},
};
use crate::{
    clock,
    delivery::{Failure, FailureKind, Pause, SubscriberName},
    policy::circuit_breaker::CircuitState,
    telemetry::{
        lane_event::{AttemptEnded, Circuit, LaneEvent, Settled},
        metrics::SubscriberMetrics,
    },
};

/// The time over which the rate of delivered events is measured.
const RATE_SPAN: Duration = Duration::from_secs(60);

/// Attempts that success rate and percentiles are made of, at most.
const MAX_ATTEMPTS: usize = 500;

/// The age from which an attempt does not count for them any more.
const MAX_ATTEMPT_AGE: Duration = Duration::from_secs(15 * 60);

/// A request that has had no answer for this time is reported, if none was accepted since it began.
const LONG_WAIT: Duration = Duration::from_secs(5);

/// Gets each event of each lane with the subscriber's name, in the lane's own task.
#[derive(Clone)]
pub struct Observer {
    observe: Arc<Observe>,
    wants_digests: bool,
}

type Observe = dyn Fn(&SubscriberName, &LaneEvent<'_>) + Send + Sync;

impl Observer {
    pub fn new(observe: impl Fn(&SubscriberName, &LaneEvent<'_>) + Send + Sync + 'static) -> Self {
        Self { observe: Arc::new(observe), wants_digests: false }
    }

    /// Has the lanes compute the SHA-256 of each body.
    #[must_use]
    pub fn with_digests(self) -> Self {
        Self { wants_digests: true, ..self }
    }
}

impl fmt::Debug for Observer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Observer").finish_non_exhaustive()
    }
}

/// One moment on both clocks: durations are measured on the monotonic one, and points in time are
/// shown as the wall clock had them.
#[derive(Debug, Clone, Copy)]
pub(super) struct Moment {
    pub(super) instant: Instant,
    pub(super) time: SystemTime,
}

/// Takes the events of one lane. Clones are the same.
#[derive(Debug, Clone)]
pub struct LaneReporter(Arc<Lane>);

#[derive(Debug)]
struct Lane {
    subscriber: SubscriberName,
    metrics: SubscriberMetrics,
    status: Mutex<LaneStatus>,
    observers: Arc<[Observer]>,
    /// The number of retries that operators have requested.
    retry_requests: watch::Sender<u64>,
}

impl LaneReporter {
    pub(super) fn new(
        subscriber: SubscriberName,
        metrics: SubscriberMetrics,
        observers: Arc<[Observer]>,
    ) -> Self {
        metrics.set_circuit(CircuitState::Closed, None);
        metrics.set_up(true);
        Self(Arc::new(Lane {
            subscriber,
            metrics,
            status: Mutex::default(),
            observers,
            retry_requests: watch::Sender::new(0),
        }))
    }

    /// Logs the event, counts it, and changes the status by it.
    pub fn report(&self, event: &LaneEvent<'_>) {
        self.report_at(event, Moment { instant: clock::instant(), time: clock::now() });
    }

    pub(super) fn report_at(&self, event: &LaneEvent<'_>, now: Moment) {
        event.log(&self.0.subscriber);
        self.0.metrics.count(event);
        self.status().apply(event, &self.0.metrics, now);
        for observer in &*self.0.observers {
            (observer.observe)(&self.0.subscriber, event);
        }
    }

    /// Whether an observer wants the SHA-256 of each body.
    pub fn wants_digests(&self) -> bool {
        self.0.observers.iter().any(|observer| observer.wants_digests)
    }

    /// Changes when an operator requests a retry.
    pub fn retry_requests(&self) -> watch::Receiver<u64> {
        self.0.retry_requests.subscribe()
    }

    pub(super) fn request_retry(&self) {
        self.0.retry_requests.send_modify(|n| *n += 1);
    }

    pub(super) fn metrics(&self) -> &SubscriberMetrics {
        &self.0.metrics
    }

    pub(super) fn in_flight(&self) -> usize {
        self.status().in_flight.len()
    }

    pub(super) fn forget_missed(&self, now: SystemTime) {
        self.status().forget_missed(&self.0.metrics, now);
    }

    /// `queue_works`: the queue reports no trouble about this subscriber.
    pub(super) fn expose(&self, queue_works: bool) {
        let status = self.status();
        let up = status.queue_error.is_none() && (status.pause.is_some() || queue_works);
        self.0.metrics.set_up(up);
    }

    pub(super) fn last_hour(&self, now: Instant) -> LastHour {
        self.status().minutes.last_hour(now)
    }

    pub(super) fn view(&self, now: Moment) -> View {
        self.forget_missed(now.time);
        self.status().view(now)
    }

    fn status(&self) -> MutexGuard<'_, LaneStatus> {
        self.0.status.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Debug, Default)]
struct LaneStatus {
    pause: Option<Pause>,
    circuit: Circuit,
    circuit_opened_at: Option<SystemTime>,
    hold_until: Option<SystemTime>,
    compression_refused: bool,
    /// Why the lane cannot use its queue.
    queue_error: Option<String>,
    unsettled: u64,
    /// When the oldest of the unsettled events had arrived; kept after they are back in the queue,
    /// where they still wait.
    oldest_unsettled: Option<SystemTime>,
    scheduled: Scheduled,
    /// When each request without an answer began, by the number of its attempt.
    in_flight: BTreeMap<u64, Instant>,
    /// The latest attempts, the latest last.
    attempts: VecDeque<Attempt>,
    /// Events delivered in each of the last seconds, the latest last.
    delivered: VecDeque<(Instant, u64)>,
    delivered_in_all: u64,
    minutes: Minutes,
    last_delivered_at: Option<SystemTime>,
    last_error: Option<LastError>,
    /// The latest attempt failed.
    failing: bool,
}

#[derive(Debug, Clone, Copy)]
struct Attempt {
    at: Instant,
    took: Duration,
    ok: bool,
}

impl LaneStatus {
    /// Changes the status, and the gauges that show it.
    fn apply(&mut self, event: &LaneEvent<'_>, metrics: &SubscriberMetrics, now: Moment) {
        match event {
            LaneEvent::AttemptStarted { number, batch, .. } => {
                self.in_flight.insert(*number, now.instant);
                metrics.set_in_flight(self.in_flight.len());
                self.scheduled.remove(&batch.id);
                self.show_retries(metrics);
            }
            LaneEvent::AttemptEnded(ended) => {
                self.in_flight.remove(&ended.number);
                metrics.set_in_flight(self.in_flight.len());
                self.attempt_ended(ended, now);
            }
            LaneEvent::Unsent { number, why, .. } => {
                self.in_flight.remove(number);
                metrics.set_in_flight(self.in_flight.len());
                self.last_error = Some(LastError {
                    at: now.time,
                    failure: FailureKind::Internal,
                    status: None,
                    cause: Some((*why).to_owned()),
                });
            }
            LaneEvent::Delivered { events, .. } => self.delivered(u64::from(*events), now),
            LaneEvent::Settled(Settled::Retries { batches, delay, arrived_at, .. }) => {
                self.scheduled.forget_missed(now.time);
                for batch in batches {
                    self.scheduled.insert(&batch.id, now.time + *delay, *arrived_at);
                }
                self.show_retries(metrics);
            }
            LaneEvent::Unsettled { events, oldest_arrived_at } => {
                self.unsettled = *events;
                self.oldest_unsettled = *oldest_arrived_at;
                metrics.set_oldest(self.oldest());
            }
            LaneEvent::SessionEnded => self.unsettled = 0,
            LaneEvent::CircuitIs { circuit, hold_until } => {
                self.hold_until = *hold_until;
                self.set_circuit(*circuit, metrics, now.time);
            }
            LaneEvent::Compression { refused } => {
                metrics.set_compression_refused(*refused);
                self.compression_refused = *refused;
            }
            LaneEvent::Paused { pause, .. } => {
                metrics.set_paused(true);
                self.pause = Some((*pause).clone());
            }
            LaneEvent::Resumed { .. } => self.resumed(metrics),
            LaneEvent::QueueFailed { why, .. } => {
                metrics.set_up(false);
                self.queue_error = Some((*why).to_owned());
            }
            LaneEvent::QueueRestored => self.queue_restored(metrics),
            LaneEvent::Panicked { .. } => {
                // The lane that follows reports a pause and an outage as new ones.
                self.resumed(metrics);
                self.queue_restored(metrics);
                self.in_flight.clear();
                metrics.set_in_flight(0);
                self.unsettled = 0;
                self.oldest_unsettled = None;
            }
            LaneEvent::Taken { .. }
            | LaneEvent::Recognised { .. }
            | LaneEvent::Undeliverable { .. }
            | LaneEvent::Settled(_)
            | LaneEvent::NotSettled(_)
            | LaneEvent::CircuitChanged(_)
            | LaneEvent::RateWaits
            | LaneEvent::NothingMatches { .. }
            | LaneEvent::RetryRequested
            | LaneEvent::PauseStateLate
            | LaneEvent::ResumedUnpaused => {}
        }
    }

    fn attempt_ended(&mut self, ended: &AttemptEnded<'_>, now: Moment) {
        let failure = ended.outcome.failure();
        self.failing = failure.is_some();
        if self.attempts.len() == MAX_ATTEMPTS {
            self.attempts.pop_front();
        }
        self.attempts.push_back(Attempt {
            at: now.instant,
            took: ended.took,
            ok: failure.is_none(),
        });
        if let Some(failure) = failure {
            self.minutes.failed(u64::from(ended.batch.events), now.instant);
            self.last_error = Some(LastError {
                at: now.time,
                failure: failure.kind(),
                status: failure.status(),
                cause: Failure::cause(failure).map(str::to_owned),
            });
        }
    }

    fn delivered(&mut self, events: u64, now: Moment) {
        let age = |at: Instant| now.instant.saturating_duration_since(at);
        self.delivered_in_all += events;
        self.minutes.delivered(events, now.instant);
        self.last_delivered_at = Some(now.time);
        match self.delivered.back_mut() {
            Some((second, count)) if age(*second) < Duration::from_secs(1) => *count += events,
            _ => self.delivered.push_back((now.instant, events)),
        }
        while self.delivered.front().is_some_and(|(at, _)| age(*at) > RATE_SPAN) {
            self.delivered.pop_front();
        }
    }

    fn set_circuit(&mut self, circuit: Circuit, metrics: &SubscriberMetrics, time: SystemTime) {
        if circuit == self.circuit {
            return;
        }
        self.circuit = circuit;
        self.circuit_opened_at =
            if circuit == Circuit::Closed { None } else { self.circuit_opened_at.or(Some(time)) };
        metrics.set_circuit(circuit.state(), self.circuit_opened_at);
    }

    fn resumed(&mut self, metrics: &SubscriberMetrics) {
        metrics.set_paused(false);
        self.pause = None;
    }

    fn queue_restored(&mut self, metrics: &SubscriberMetrics) {
        metrics.set_up(true);
        self.queue_error = None;
    }

    fn show_retries(&self, metrics: &SubscriberMetrics) {
        metrics.set_retries(self.scheduled.len(), self.scheduled.next_due());
        metrics.set_oldest(self.oldest());
    }

    fn forget_missed(&mut self, metrics: &SubscriberMetrics, now: SystemTime) {
        let before = self.scheduled.len();
        self.scheduled.forget_missed(now);
        if self.scheduled.len() != before {
            self.show_retries(metrics);
        }
    }

    fn oldest(&self) -> Option<SystemTime> {
        self.scheduled.oldest_arrival().into_iter().chain(self.oldest_unsettled).min()
    }

    /// For how long the oldest request has had no answer, if that is long and nothing was accepted
    /// meanwhile.
    fn waits(&self, now: Instant) -> Option<Duration> {
        let begun = *self.in_flight.values().next()?;
        let accepted = self.attempts.iter().rev().find(|a| a.ok).is_some_and(|a| a.at >= begun);
        let waits = now.saturating_duration_since(begun);
        (waits >= LONG_WAIT && !accepted).then_some(waits)
    }

    fn state(&self, now: Moment) -> State {
        if let Some(pause) = &self.pause {
            return State::Paused(pause.clone());
        }
        if let Some(why) = &self.queue_error {
            return State::QueueFails(why.clone());
        }
        if let Circuit::Open { until } = self.circuit {
            return State::CircuitOpen { until };
        }
        if let Some(until) = self.hold_until.filter(|until| *until > now.time) {
            return State::Held { until };
        }
        if self.failing {
            return State::Retrying;
        }
        self.waits(now.instant).map_or(State::Ok, |waits| State::Waiting {
            since: now.time.checked_sub(waits).unwrap_or(now.time),
        })
    }

    fn view(&self, now: Moment) -> View {
        let age = |at: Instant| now.instant.saturating_duration_since(at);
        let attempts: Vec<&Attempt> =
            self.attempts.iter().filter(|a| age(a.at) <= MAX_ATTEMPT_AGE).collect();
        let mut durations: Vec<Duration> = attempts.iter().map(|a| a.took).collect();
        durations.sort_unstable();
        let ok = attempts.iter().filter(|a| a.ok).count() as u64;
        let recent = self.delivered.iter().filter(|(at, _)| age(*at) <= RATE_SPAN);
        let events: u64 = recent.map(|(_, n)| n).sum();
        View {
            state: self.state(now),
            circuit: self.circuit,
            unsettled: self.unsettled,
            retries_scheduled: self.scheduled.not_due(now.time),
            next_retry_at: self.scheduled.next_due(),
            delivered: self.delivered_in_all,
            delivered_per_s_milli: events * 1000 / RATE_SPAN.as_secs(),
            success_milli: (!attempts.is_empty()).then(|| ok * 1000 / attempts.len() as u64),
            p50: percentile(&durations, 50),
            p99: percentile(&durations, 99),
            oldest_event_at: self.oldest(),
            last_delivered_at: self.last_delivered_at,
            compression_refused: self.compression_refused,
            last_error: self.last_error.clone(),
        }
    }
}

/// The smallest value that `percent` of a hundred values do not exceed.
fn percentile(sorted: &[Duration], percent: usize) -> Option<Duration> {
    sorted.get((sorted.len() * percent).div_ceil(100).saturating_sub(1)).copied()
}

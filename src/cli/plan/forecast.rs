//! The forecast for a subscriber's batches, computed by the policies of the daemon.

use std::time::{Duration, SystemTime};

use crate::{
    clock,
    config::{Backend, Config, Intake, Subscriber},
    policy::{
        circuit_breaker::{Begun, BreakerPolicy, Change, CircuitBreaker},
        retry::{Next, RetryOptions, RetryPolicy},
    },
    queue::{
        CONSUMER_TIMEOUT, FEWEST, MOST_BYTES, Window,
        amqp::{self, Footprint, Hold},
    },
};

/// The number of attempts after which a growing interval is not computed further.
pub(super) const MAX_RAMP: u32 = 2000;

/// Rows at the begin and at the end of a timeline that is shown without its middle.
const HEAD: u32 = 12;
const TAIL: u32 = 3;

/// The time of all first attempts in a plan.
const FIRST: SystemTime = SystemTime::UNIX_EPOCH;

/// The attempts of a subscriber's batch, and the most that they cost.
pub(super) struct Plan<'c> {
    pub(super) subscriber: &'c Subscriber,
    /// Retries wait in RabbitMQ's delay ladder.
    pub(super) ladder: bool,
    /// The attempts with a jitter in the middle, at its shortest, at its longest.
    pub(super) courses: [Course<'c>; 3],
    pub(super) bounds: Bounds,
}

impl<'c> Plan<'c> {
    pub(super) fn new(subscriber: &'c Subscriber, ladder: bool) -> Self {
        let hold = if ladder { amqp::hold } else { |delay| Hold { delay, hops: 0 } };
        let courses = [0.5, 0.0, 1.0].map(|random| Course::new(&subscriber.retry, hold, random));
        Self { subscriber, ladder, courses, bounds: Bounds::new(subscriber) }
    }
}

/// The attempts of a batch that fails each time and at once, with the same draw for each jitter.
pub(super) struct Course<'c> {
    policy: &'c RetryPolicy,
    hold: fn(Duration) -> Hold,
    random: f64,
    /// The first attempts, until the interval grows no more; then the last interval repeats.
    ramp: Vec<Attempt>,
    pub(super) last: Last,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Attempt {
    pub(super) number: u32,
    /// The delay after the previous attempt.
    pub(super) after: Duration,
    pub(super) hops: u32,
    pub(super) since_first: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Last {
    Number(u32),
    Never,
    /// The interval still grows at [`MAX_RAMP`].
    Beyond,
}

impl<'c> Course<'c> {
    fn new(policy: &'c RetryPolicy, hold: fn(Duration) -> Hold, random: f64) -> Self {
        let first =
            Attempt { number: 1, after: Duration::ZERO, hops: 0, since_first: Duration::ZERO };
        let mut course = Self { policy, hold, random, ramp: vec![first], last: Last::Beyond };
        for number in 1..MAX_RAMP {
            let Some(next) = course.following(number) else {
                course.last = Last::Number(number);
                break;
            };
            course.ramp.push(next);
            if policy.interval(number) == policy.interval(number + 1) {
                course.last = course.last_of_the_steady();
                break;
            }
        }
        course
    }

    /// The attempt with this number, if the schedule reaches it.
    pub(super) fn attempt(&self, number: u32) -> Attempt {
        let known = number.min(u32::try_from(self.ramp.len()).unwrap_or(u32::MAX));
        let attempt = self.ramp[known as usize - 1];
        let more = attempt.after.saturating_mul(number - known);
        Attempt { number, since_first: attempt.since_first.saturating_add(more), ..attempt }
    }

    /// The attempt after this one has failed.
    fn following(&self, number: u32) -> Option<Attempt> {
        let at = self.attempt(number).since_first;
        match self.policy.next(number, FIRST, FIRST + at, None, self.random) {
            Next::Exhausted => None,
            Next::After(delay) => {
                let Hold { delay, hops } = (self.hold)(delay);
                Some(Attempt { number: number + 1, after: delay, hops, since_first: at + delay })
            }
        }
    }

    /// The last attempt, once the interval stays the same: found by bisection, since after one that
    /// is not made there is none.
    fn last_of_the_steady(&self) -> Last {
        let (mut made, mut not_made) =
            (u32::try_from(self.ramp.len()).unwrap_or(u32::MAX), u32::MAX);
        if self.following(not_made - 1).is_some() {
            return Last::Never;
        }
        while not_made - made > 1 {
            let middle = made + (not_made - made) / 2;
            if self.following(middle - 1).is_some() {
                made = middle;
            } else {
                not_made = middle;
            }
        }
        Last::Number(made)
    }

    /// The last attempt, if it is known.
    pub(super) fn end(&self) -> Option<Attempt> {
        match self.last {
            Last::Number(number) => Some(self.attempt(number)),
            Last::Never | Last::Beyond => None,
        }
    }

    /// The shortest and the longest interval before an attempt, by its jitter.
    pub(super) fn spread(&self, number: u32) -> (Duration, Duration) {
        // Without limits, which end a schedule and shorten no interval.
        let unlimited = RetryOptions {
            max_attempts: 0,
            max_elapsed_time: Duration::ZERO,
            ..self.policy.options()
        };
        let unlimited = RetryPolicy::try_new(unlimited).unwrap_or_else(|_| self.policy.clone());
        let held = |random| match unlimited.next(number - 1, FIRST, FIRST, None, random) {
            Next::After(delay) => (self.hold)(delay).delay,
            Next::Exhausted => Duration::ZERO,
        };
        (held(0.0), held(1.0))
    }

    /// The numbers of the attempts that get a row, at most `whole` of them if there is an end.
    pub(super) fn rows(&self, whole: u32) -> Vec<u32> {
        let ramp = u32::try_from(self.ramp.len()).unwrap_or(u32::MAX);
        match self.last {
            Last::Number(n) if n <= whole => (1..=n).collect(),
            Last::Number(n) => (1..=ramp.clamp(TAIL, HEAD.max(whole - whole / 2)))
                .chain(n - TAIL + 1..=n)
                .collect(),
            Last::Never | Last::Beyond => {
                (1..=ramp.saturating_add(1).clamp(TAIL, whole.max(HEAD))).collect()
            }
        }
    }
}

/// The most memory, requests and time that a subscriber takes.
pub(super) struct Bounds {
    pub(super) window: Window,
    /// The most requests open at once.
    pub(super) requests: usize,
    /// Bytes held with small events, whose batches are full: those batches, and the failed ones that
    /// wait.
    pub(super) usual: u64,
    /// Bytes held when each event is as large as a request body may be.
    pub(super) worst: u64,
    /// The longest time that a message stays unacked, with full batches.
    pub(super) hold: Duration,
    /// The fewest events in a batch with which, and with each attempt at its limit, no message
    /// stays unacked for longer than RabbitMQ allows.
    pub(super) fewest: usize,
}

impl Bounds {
    fn new(subscriber: &Subscriber) -> Self {
        let window = Window::of(subscriber);
        let (events, envelopes) = (u64::from(window.events), u64::from(window.envelopes));
        let batches = events.div_ceil(subscriber.batch.max_events as u64);
        let body = subscriber.batch.max_bytes as u64;
        Self {
            window,
            requests: subscriber.http.concurrency,
            usual: (batches + envelopes) * body,
            worst: (events * body).min(MOST_BYTES.max(u64::from(FEWEST) * body)) + envelopes * body,
            hold: window.longest_hold(subscriber, subscriber.batch.max_events),
            fewest: window.fewest_events(subscriber, CONSUMER_TIMEOUT),
        }
    }
}

/// The durations for which a circuit stays open: the first time, after one failed probe, after
/// another, until they repeat.
pub(super) fn open_times(policy: &BreakerPolicy) -> Vec<Duration> {
    if policy.failures == 0 {
        return Vec::new();
    }
    let mut breaker = CircuitBreaker::new(BreakerPolicy { failures: 1, ..policy.clone() });
    let (mut now, mut times) = (clock::instant(), Vec::new());
    let first_attempt = Begun { probe: true, first: true };
    while let Some(Change::Opened { open_for, .. } | Change::StillOpen { open_for }) =
        breaker.on_failure(first_attempt, true, now)
    {
        if times.last() == Some(&open_for) {
            break;
        }
        times.push(open_for);
        now += open_for;
        breaker.permit(now);
    }
    times
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Limit {
    Attempts,
    Elapsed,
}

/// The limit that makes an attempt the last one.
pub(super) fn limit(retry: &RetryOptions, last: u32) -> Limit {
    if retry.max_attempts == last { Limit::Attempts } else { Limit::Elapsed }
}

/// The queues and connections that the configuration needs of a RabbitMQ.
pub(super) fn footprint(config: &Config) -> Option<Footprint> {
    match &config.queue.backend {
        Backend::Amqp(amqp) => Some(amqp::footprint(
            config.subscribers.len(),
            matches!(amqp.intake, Intake::SourceQueue(_)),
            amqp.keeps_history,
        )),
        Backend::Embedded => {
            config.queue.intake.as_ref().map(|intake| amqp::intake_footprint(&intake.amqp.intake))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secs(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    fn exact(delay: Duration) -> Hold {
        Hold { delay, hops: 0 }
    }

    #[test]
    fn a_timeline_is_that_of_the_policy_asked_step_by_step() {
        for options in [
            RetryOptions::default(),
            RetryOptions { max_attempts: 0, initial_interval: secs(60), ..RetryOptions::default() },
            RetryOptions { max_attempts: 1, ..RetryOptions::default() },
            RetryOptions {
                max_attempts: 300,
                max_elapsed_time: Duration::ZERO,
                multiplier: 1.0,
                ..RetryOptions::default()
            },
            RetryOptions {
                max_attempts: 0,
                multiplier: 1.0,
                max_elapsed_time: secs(3600),
                ..RetryOptions::default()
            },
            RetryOptions { max_attempts: 40, multiplier: 1.1, ..RetryOptions::default() },
        ] {
            let policy = RetryPolicy::try_new(options).expect("valid");
            for random in [0.0, 0.5, 1.0] {
                let course = Course::new(&policy, exact, random);
                let (mut at, mut number) = (FIRST, 1);
                while let Next::After(delay) = policy.next(number, FIRST, at, None, random) {
                    (at, number) = (at + delay, number + 1);
                    let attempt = course.attempt(number);
                    assert_eq!(
                        (attempt.number, attempt.after, FIRST + attempt.since_first),
                        (number, delay, at),
                        "{policy:?}"
                    );
                }
                assert_eq!(course.last, Last::Number(number), "{policy:?}");
            }
        }
    }
}

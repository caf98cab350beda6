//! The retry schedule of failed batches, and the backoff of everything else that is retried.

use std::time::{Duration, SystemTime};

use backoff::{ExponentialBackoff, backoff::Backoff as _};

/// The longest delay that the queue can hold, and the most of a `Retry-After` that is honoured.
pub const MAX_DELAY: Duration = Duration::from_secs(72 * 3600);

/// The retry schedule, from `[retry]`. The words are those of the `backoff` crate.
#[derive(Debug, Clone, PartialEq)]
pub struct RetryPolicy {
    initial_interval: Duration,
    multiplier: f64,
    randomization_factor: f64,
    max_interval: Duration,
    max_attempts: u32,
    max_elapsed_time: Duration,
    on_exhausted: Exhausted,
}

/// What follows when a batch has no attempt left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exhausted {
    DeadLetter,
    /// The batch is kept and the subscriber gets nothing more until it is resumed.
    Pause,
}

impl Exhausted {
    /// The value in the configuration.
    pub const fn name(self) -> &'static str {
        match self {
            Self::DeadLetter => "dead_letter",
            Self::Pause => "pause",
        }
    }
}

/// What follows a failed attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// A retry, not before this time has passed.
    After(Duration),
    /// A limit is reached: no further attempt.
    Exhausted,
}

/// The values of `[retry]`, unchecked.
#[derive(Debug, Clone)]
pub struct RetryOptions {
    pub initial_interval: Duration,
    pub multiplier: f64,
    /// From 0 to 1: the share by which an interval is spread to both sides.
    pub randomization_factor: f64,
    pub max_interval: Duration,
    /// Attempts of a batch, the first included; 0: no limit.
    pub max_attempts: u32,
    /// The time from the first attempt; zero: no limit.
    pub max_elapsed_time: Duration,
    pub on_exhausted: Exhausted,
}

impl Default for RetryOptions {
    fn default() -> Self {
        Self {
            initial_interval: Duration::from_secs(5),
            multiplier: 3.0,
            randomization_factor: 0.2,
            max_interval: Duration::from_secs(6 * 3600),
            max_attempts: 16,
            max_elapsed_time: MAX_DELAY,
            on_exhausted: Exhausted::DeadLetter,
        }
    }
}

impl RetryPolicy {
    /// # Errors
    /// Each key that is out of its range, with its range.
    pub fn try_new(o: RetryOptions) -> Result<Self, Vec<(&'static str, &'static str)>> {
        let checks = [
            (
                !o.initial_interval.is_zero(),
                "initial_interval",
                "must be longer than 0; a retry at once would hammer the receiver",
            ),
            ((1.0..=1000.0).contains(&o.multiplier), "multiplier", "must be from 1 to 1000"),
            (
                (0.0..=1.0).contains(&o.randomization_factor),
                "randomization_factor",
                "must be from 0 to 1",
            ),
            (
                o.max_interval <= MAX_DELAY,
                "max_interval",
                "must be at most 72h, the longest delay that the queue can hold",
            ),
            (
                o.initial_interval <= o.max_interval,
                "max_interval",
                "must not be shorter than initial_interval",
            ),
        ];
        let wrong: Vec<_> =
            checks.into_iter().filter(|(ok, ..)| !ok).map(|(_, key, why)| (key, why)).collect();
        if !wrong.is_empty() {
            return Err(wrong);
        }
        Ok(Self {
            initial_interval: o.initial_interval,
            multiplier: o.multiplier,
            randomization_factor: o.randomization_factor,
            max_interval: o.max_interval,
            max_attempts: o.max_attempts,
            max_elapsed_time: o.max_elapsed_time,
            on_exhausted: o.on_exhausted,
        })
    }

    pub fn options(&self) -> RetryOptions {
        RetryOptions {
            initial_interval: self.initial_interval,
            multiplier: self.multiplier,
            randomization_factor: self.randomization_factor,
            max_interval: self.max_interval,
            max_attempts: self.max_attempts,
            max_elapsed_time: self.max_elapsed_time,
            on_exhausted: self.on_exhausted,
        }
    }

    pub fn on_exhausted(&self) -> Exhausted {
        self.on_exhausted
    }

    /// The same, and no batch is given up.
    #[must_use]
    pub fn pausing(self) -> Self {
        Self { on_exhausted: Exhausted::Pause, ..self }
    }

    /// The interval after failed attempt `attempt` (from 1), before jitter.
    pub fn interval(&self, attempt: u32) -> Duration {
        // In one step whatever the number of attempts, which comes from a message.
        let growth = self.multiplier.powf(f64::from(attempt.max(1) - 1));
        let grown =
            (self.initial_interval.as_secs_f64() * growth).min(self.max_interval.as_secs_f64());
        let current = Duration::from_secs_f64(grown);
        // The crate's own jitter draws from a global generator and may exceed `max_interval`. This
        // policy takes its randomness as an argument instead.
        let mut backoff = ExponentialBackoff {
            current_interval: current,
            initial_interval: self.initial_interval,
            multiplier: self.multiplier,
            randomization_factor: 0.0,
            max_interval: self.max_interval,
            max_elapsed_time: None, // its default of 15 minutes would end the schedule
            ..ExponentialBackoff::default()
        };
        let interval = backoff.next_backoff().unwrap_or(self.max_interval);
        // The crate adds up to a nanosecond at random even without jitter; rounding makes the
        // interval the same each time.
        let micros = u64::try_from((interval.as_nanos() + 500) / 1000).unwrap_or(u64::MAX).max(1);
        Duration::from_micros(micros).min(self.max_interval)
    }

    /// What follows failed attempt `attempt` (from 1) of a batch first tried at `first_attempt_at`.
    ///
    /// `retry_after` is the receiver's wish: it makes the delay longer, never shorter, and never ends
    /// the schedule, so the next attempt may be earlier than the receiver wished.
    /// `random` is drawn from `0.0..1.0`.
    pub fn next(
        &self,
        attempt: u32,
        first_attempt_at: SystemTime,
        now: SystemTime,
        retry_after: Option<Duration>,
        random: f64,
    ) -> Next {
        if self.max_attempts != 0 && attempt >= self.max_attempts {
            return Next::Exhausted;
        }
        let spread = 1.0 + self.randomization_factor * (2.0 * random - 1.0);
        let own = self.interval(attempt).mul_f64(spread.max(0.0)).min(self.max_interval);
        match self.time_left(first_attempt_at, now) {
            Some(left) if own > left => Next::Exhausted,
            _ => Next::After(own.max(self.granted(first_attempt_at, now, retry_after))),
        }
    }

    /// The part of a receiver's wish that is granted: at most [`MAX_DELAY`] and the rest of
    /// `max_elapsed_time`.
    pub fn granted(
        &self,
        first_attempt_at: SystemTime,
        now: SystemTime,
        retry_after: Option<Duration>,
    ) -> Duration {
        let left = self.time_left(first_attempt_at, now).unwrap_or(MAX_DELAY);
        retry_after.unwrap_or_default().min(left).min(MAX_DELAY)
    }

    /// The rest of `max_elapsed_time`; `None` without a limit.
    fn time_left(&self, first_attempt_at: SystemTime, now: SystemTime) -> Option<Duration> {
        let elapsed = now.duration_since(first_attempt_at).unwrap_or_default();
        (!self.max_elapsed_time.is_zero()).then(|| self.max_elapsed_time.saturating_sub(elapsed))
    }
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self::try_new(RetryOptions::default()).expect("the defaults are valid")
    }
}

/// Growing intervals between tries that are made indefinitely: to reach a broker, to restart a lane.
#[derive(Debug)]
pub struct Backoff(ExponentialBackoff);

impl Backoff {
    pub fn new(first: Duration, longest: Duration) -> Self {
        let mut policy = ExponentialBackoff {
            initial_interval: first,
            multiplier: 2.0,
            randomization_factor: 0.2,
            max_interval: longest,
            max_elapsed_time: None,
            ..ExponentialBackoff::default()
        };
        policy.reset();
        Self(policy)
    }

    /// The next interval.
    pub fn grow(&mut self) -> Duration {
        self.0.next_backoff().unwrap_or(self.0.max_interval)
    }

    /// Starts over, after a success.
    pub fn reset(&mut self) {
        self.0.reset();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const T0: SystemTime = SystemTime::UNIX_EPOCH;

    fn secs(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    fn policy(change: impl FnOnce(&mut RetryOptions)) -> RetryPolicy {
        let mut o = RetryOptions::default();
        change(&mut o);
        RetryPolicy::try_new(o).expect("valid")
    }

    #[test]
    fn the_default_schedule_ends_about_47_hours_after_the_first_attempt() {
        let p = RetryPolicy::default();
        let (mut at, mut delays) = (T0, Vec::new());
        for attempt in 1.. {
            match p.next(attempt, T0, at, None, 0.5) {
                Next::After(d) => {
                    at += d;
                    delays.push(d.as_secs());
                }
                Next::Exhausted => break,
            }
        }
        assert_eq!(delays[..9], [5, 15, 45, 135, 405, 1215, 3645, 10_935, 21_600]);
        assert_eq!(delays.len(), 15, "16 attempts, the first one included");
        let hours = at.duration_since(T0).expect("later").as_secs_f64() / 3600.0;
        assert!((46.0..48.0).contains(&hours), "{hours}");
    }

    #[test]
    fn a_retry_due_past_the_elapsed_limit_is_not_scheduled() {
        let p = policy(|o| {
            o.max_elapsed_time = secs(100);
            o.initial_interval = secs(60);
            o.multiplier = 1.0;
            o.randomization_factor = 0.0;
        });
        assert_eq!(p.next(1, T0, T0 + secs(40), None, 0.5), Next::After(secs(60)));
        assert_eq!(p.next(2, T0, T0 + secs(41), None, 0.5), Next::Exhausted);
    }

    #[test]
    fn a_wish_to_wait_never_shortens_the_schedule() {
        let p = RetryPolicy::default();
        let hours = |n: u64| secs(n * 3600);
        for wish in [72, 73, 1_000_000] {
            assert_eq!(
                p.next(1, T0, T0 + secs(1), Some(hours(wish)), 0.5),
                Next::After(hours(72) - secs(1)),
                "{wish} h"
            );
        }
        assert_eq!(p.next(2, T0, T0 + hours(71), Some(hours(72)), 0.5), Next::After(hours(1)));
        assert_eq!(p.next(2, T0, T0 + hours(72), Some(hours(72)), 0.5), Next::Exhausted);
        let short = policy(|o| o.max_elapsed_time = secs(10));
        assert_eq!(
            short.next(1, T0, T0 + secs(4), Some(secs(100)), 0.5),
            Next::After(secs(6)),
            "earlier than asked"
        );
        assert_eq!(short.granted(T0, T0 + secs(4), Some(secs(3))), secs(3));
    }

    #[test]
    fn the_interval_of_any_attempt_is_known_at_once() {
        let p = policy(|o| {
            o.max_attempts = 0;
            o.multiplier = 1.000_000_01;
        });
        let begun = crate::clock::instant();
        let grown: Vec<Duration> =
            [1, 1000, 100_000_000, 2_000_000_000, u32::MAX].map(|n| p.interval(n)).into();
        assert!(begun.elapsed() < secs(1), "a loop over the attempts takes minutes");
        assert!(
            grown.is_sorted() && grown[0] == secs(5) && grown[4] == p.max_interval,
            "{grown:?}"
        );
        assert_eq!(
            policy(|o| o.multiplier = 1000.0).interval(u32::MAX),
            p.max_interval,
            "beyond every number"
        );
        assert_eq!(p.interval(0), secs(5));
    }

    #[test]
    fn an_interval_is_the_same_whenever_it_is_asked_for() {
        let p = policy(|o| o.initial_interval = secs(7));
        for attempt in 1..8 {
            assert!(
                (0..50).all(|_| p.interval(attempt) == secs(7 * 3_u64.pow(attempt - 1))),
                "{attempt}"
            );
        }
    }

    #[test]
    fn zero_means_no_limit() {
        let p = policy(|o| {
            o.max_attempts = 0;
            o.max_elapsed_time = Duration::ZERO;
        });
        assert_eq!(p.next(u32::MAX, T0, T0 + secs(1 << 40), None, 0.5), Next::After(secs(21_600)));
        let constant = policy(|o| {
            o.max_attempts = 0;
            o.multiplier = 1.0;
        });
        assert_eq!(constant.interval(u32::MAX), secs(5));
    }

    #[test]
    fn retry_after_delays_but_never_hastens_and_is_bounded() {
        let p = policy(|o| o.max_elapsed_time = Duration::ZERO);
        assert_eq!(p.next(1, T0, T0, Some(secs(1)), 0.5), Next::After(secs(5)));
        assert_eq!(p.next(1, T0, T0, Some(secs(90)), 0.5), Next::After(secs(90)));
        assert_eq!(p.next(1, T0, T0, Some(secs(1 << 30)), 0.5), Next::After(MAX_DELAY));
    }

    #[test]
    fn a_clock_that_was_set_back_does_not_end_the_schedule() {
        assert_eq!(
            RetryPolicy::default().next(1, T0 + secs(1 << 20), T0, None, 0.5),
            Next::After(secs(5))
        );
    }

    #[test]
    fn values_out_of_range_are_refused_by_name() {
        for (change, key) in [
            (
                (|o| o.initial_interval = Duration::ZERO) as fn(&mut RetryOptions),
                "initial_interval",
            ),
            (|o| o.multiplier = 0.5, "multiplier"),
            (|o| o.multiplier = f64::NAN, "multiplier"),
            (|o| o.randomization_factor = 1.5, "randomization_factor"),
            (|o| o.max_interval = secs(1), "max_interval"),
            (|o| o.max_interval = secs(73 * 3600), "max_interval"),
        ] {
            let mut o = RetryOptions::default();
            change(&mut o);
            let wrong = RetryPolicy::try_new(o).expect_err("out of range");
            assert!(wrong.len() == 1 && wrong[0].0 == key, "{wrong:?}");
        }
    }

    #[test]
    fn waits_grow_without_end_and_begin_anew() {
        let mut backoff = Backoff::new(secs(1), secs(10));
        for _ in 0..2 {
            let grown: Vec<f64> = (0..20).map(|_| backoff.grow().as_secs_f64()).collect();
            for (n, wait) in grown.iter().enumerate() {
                let plain = f64::from(1 << n.min(10)).min(10.0);
                assert!((plain * 0.79..=plain * 1.21).contains(wait), "{grown:?}");
            }
            backoff.reset();
        }
    }

    proptest! {
        #[test]
        fn jitter_stays_in_its_share_and_below_the_longest_interval(attempt in 1_u32..40, random in 0.0..1.0_f64) {
            let p = policy(|o| { o.max_attempts = 0; o.max_elapsed_time = Duration::ZERO; });
            let plain = p.interval(attempt).as_secs_f64();
            let Next::After(d) = p.next(attempt, T0, T0, None, random) else { panic!("no limit") };
            prop_assert!(d.as_secs_f64() >= plain * 0.8 - 1e-6);
            prop_assert!(d.as_secs_f64() <= (plain * 1.2 + 1e-6).min(21_600.0));
        }
    }
}

//! Decides what follows from the outcome of an attempt. The session carries it out.

use std::time::{Duration, SystemTime};

use crate::{
    delivery::{Disposition, Failure, Outcome, PauseCause, Reason},
    policy::{
        answer::Health,
        retry::{Exhausted, Next, RetryPolicy},
    },
};

/// Bytes of a body above which it may be too large for a receiver that ends the connection while the
/// body is being sent. RFC 9110, section 15.5.14, allows a receiver to end the connection instead of
/// reading on, and the reset can overtake its answer.
const LARGE_BODY: usize = 256 * 1024;

/// An attempt that has ended, with everything that the verdict depends on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attempt {
    /// From 1.
    pub number: u32,
    pub first_attempt_at: SystemTime,
    pub events: u32,
    pub body_bytes: usize,
    pub origin: Origin,
}

/// The origin of an attempt's batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// A first attempt.
    First,
    /// The batch failed before, as a whole or as a part of a larger one.
    Again {
        /// A part of a batch that was split.
        part: bool,
        /// When the attempt before this one failed, if that is known.
        failed_at: Option<SystemTime>,
        /// The attempt before this one was reset.
        was_reset: bool,
    },
}

/// The disposition of a batch, with what the attempt says of the endpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    pub disposition: Disposition,
    pub evidence: Evidence,
    /// The hold that the receiver asked for.
    pub hold: Option<Duration>,
    /// The `Retry-After` that was asked for, when only a shorter one is granted.
    pub shortened_from: Option<Duration>,
}

impl Verdict {
    /// The verdict on what goes beside a strict order: that pauses for its own batches alone.
    #[must_use]
    pub fn beside(self) -> Self {
        match self.disposition {
            Disposition::Paused(PauseCause::Exhausted) => {
                Self { disposition: Disposition::DeadLetter(Reason::Exhausted), ..self }
            }
            _ => self,
        }
    }
}

/// The evidence of an attempt about its endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Evidence {
    Accepted,
    /// `counts`: the endpoint fails, as far as can be known, and not this batch alone.
    Failed {
        counts: bool,
    },
    /// It says nothing about whether the endpoint works.
    None,
}

/// Decides what follows. `current`: the configuration of requests has not changed since this
/// attempt began. Otherwise its failure does not count. `health` is the endpoint's before this
/// attempt; `random` is drawn from `0.0..1.0`.
pub fn decide(
    attempt: &Attempt,
    outcome: &Outcome,
    current: bool,
    health: &Health,
    retry: &RetryPolicy,
    now: SystemTime,
    random: f64,
) -> Verdict {
    let case = Case { attempt, health, retry, now, random };
    match outcome {
        Outcome::Delivered { .. } => {
            plain(Disposition::Delivered, if current { Evidence::Accepted } else { Evidence::None })
        }
        Outcome::Unsent { .. } => plain(Disposition::GivenBack, Evidence::None),
        _ if !current => case.of_another_endpoint(),
        Outcome::Gone { .. } => plain(Disposition::Paused(PauseCause::Gone), Evidence::None),
        Outcome::Retry { failure, retry_after } => case.failed(failure, *retry_after),
        Outcome::TooLarge { retry_after, .. } if attempt.events > 1 => case.split(*retry_after),
        Outcome::TooLarge { retry_after, .. } if health.believes_too_large() => {
            dead(Reason::TooLarge, *retry_after)
        }
        Outcome::Refused { retry_after, .. } if health.believes_refusal() && attempt.events > 1 => {
            case.split(*retry_after)
        }
        Outcome::Refused { retry_after, .. } if health.believes_refusal() => {
            dead(Reason::Refused, *retry_after)
        }
        Outcome::TooLarge { failure, retry_after } | Outcome::Refused { failure, retry_after } => {
            let verdict = case.failed(failure, *retry_after);
            let evidence =
                if case.is_part() { Evidence::Failed { counts: false } } else { verdict.evidence };
            Verdict { evidence, ..verdict }
        }
    }
}

/// As [`decide`], where nothing may overtake the batch. A refusal is believed whatever the endpoint
/// did before: nothing else is sent that it could accept, and what is refused is not given up.
pub fn decide_in_order(
    attempt: &Attempt,
    outcome: &Outcome,
    current: bool,
    health: &Health,
    retry: &RetryPolicy,
    now: SystemTime,
    random: f64,
) -> Verdict {
    let verdict = decide(attempt, outcome, current, &health.believed(), retry, now, random);
    match verdict.disposition {
        Disposition::DeadLetter(Reason::Refused) => {
            Verdict { disposition: Disposition::Paused(PauseCause::Refused), ..verdict }
        }
        _ => verdict,
    }
}

/// Updates the endpoint's health by its answer.
pub fn learn(health: &mut Health, attempt: &Attempt, outcome: &Outcome, now: SystemTime) {
    match outcome {
        Outcome::Delivered { .. } => health.on_accepted(now),
        Outcome::Retry { failure, .. } if !is_of_endpoint(failure) => {}
        Outcome::Retry { .. } => health.on_failed(),
        Outcome::Refused { .. } => health.on_refused(),
        Outcome::TooLarge { .. } if attempt.events == 1 => health.on_too_large(),
        Outcome::TooLarge { .. } | Outcome::Gone { .. } | Outcome::Unsent { .. } => {}
    }
}

/// Whether a failure says anything of the endpoint: without a token it was not asked.
const fn is_of_endpoint(failure: &Failure) -> bool {
    !matches!(failure, Failure::Auth(_))
}

fn plain(disposition: Disposition, evidence: Evidence) -> Verdict {
    Verdict { disposition, evidence, hold: None, shortened_from: None }
}

fn dead(reason: Reason, hold: Option<Duration>) -> Verdict {
    Verdict { hold, ..plain(Disposition::DeadLetter(reason), Evidence::None) }
}

/// The facts for all decisions about one attempt.
struct Case<'a> {
    attempt: &'a Attempt,
    health: &'a Health,
    retry: &'a RetryPolicy,
    now: SystemTime,
    random: f64,
}

impl Case<'_> {
    fn is_part(&self) -> bool {
        matches!(self.attempt.origin, Origin::Again { part: true, .. })
    }

    /// Whether a failure counts against the endpoint. If the endpoint accepted something since the
    /// batch last failed, the batch fails for a reason of its own.
    fn counts(&self) -> bool {
        match self.attempt.origin {
            Origin::First => true,
            Origin::Again { failed_at, .. } => !self.health.accepted_since(failed_at),
        }
    }

    fn next(&self, retry_after: Option<Duration>) -> Next {
        self.retry.next(
            self.attempt.number,
            self.attempt.first_attempt_at,
            self.now,
            retry_after,
            self.random,
        )
    }

    fn failed(&self, failure: &Failure, retry_after: Option<Duration>) -> Verdict {
        let granted = self.retry.granted(self.attempt.first_attempt_at, self.now, retry_after);
        let disposition = match self.next(retry_after) {
            Next::After(delay) if self.is_cut_off(failure) => Disposition::Split { delay },
            Next::After(delay) => Disposition::Retry { delay },
            Next::Exhausted => match self.retry.on_exhausted() {
                Exhausted::DeadLetter => Disposition::DeadLetter(Reason::Exhausted),
                Exhausted::Pause => Disposition::Paused(PauseCause::Exhausted),
            },
        };
        let shortened_from =
            retry_after.filter(|wish| *wish > disposition.delay().unwrap_or(granted));
        Verdict {
            disposition,
            evidence: Evidence::Failed { counts: self.counts() && is_of_endpoint(failure) },
            hold: retry_after,
            shortened_from,
        }
    }

    /// Whether the receiver ended the connection twice in a row while a large body was being sent.
    fn is_cut_off(&self, failure: &Failure) -> bool {
        let was_reset = matches!(self.attempt.origin, Origin::Again { was_reset: true, .. });
        let large = self.attempt.events > 1 && self.attempt.body_bytes > LARGE_BODY;
        large
            && self.attempt.number > 1
            && was_reset
            && matches!(failure, Failure::Reset { while_sending: true, .. })
    }

    fn split(&self, retry_after: Option<Duration>) -> Verdict {
        let delay = self.retry.granted(self.attempt.first_attempt_at, self.now, retry_after);
        let shortened_from = retry_after.filter(|wish| *wish > delay);
        Verdict {
            disposition: Disposition::Split { delay },
            evidence: Evidence::None,
            hold: retry_after,
            shortened_from,
        }
    }

    /// An ordinary retry. If the old endpoint had the last attempt, the current one gets an attempt
    /// all the same.
    fn of_another_endpoint(&self) -> Verdict {
        let delay = match self.next(None) {
            Next::After(delay) => delay,
            Next::Exhausted => self.retry.interval(self.attempt.number),
        };
        plain(Disposition::Retry { delay }, Evidence::None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::{
        circuit_breaker::{Begun, BreakerPolicy, CircuitBreaker, Permit},
        retry::RetryOptions,
        turn::{Slots, Turn, Turns, Waiting},
    };
    use proptest::prelude::*;
    use std::time::Instant;

    const T0: SystemTime = SystemTime::UNIX_EPOCH;

    fn secs(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    fn first(events: u32) -> Attempt {
        Attempt { number: 1, first_attempt_at: T0, events, body_bytes: 400, origin: Origin::First }
    }

    fn again(part: bool, failed_at: SystemTime) -> Attempt {
        Attempt {
            number: 2,
            origin: Origin::Again { part, failed_at: Some(failed_at), was_reset: false },
            ..first(1)
        }
    }

    fn status(status: u16) -> Outcome {
        status_after(status, None)
    }

    fn status_after(status: u16, retry_after: Option<Duration>) -> Outcome {
        let failure = Failure::Status { status, excerpt: String::new() };
        match status {
            200 => Outcome::Delivered { status },
            410 => Outcome::Gone { failure },
            413 => Outcome::TooLarge { failure, retry_after },
            400 | 422 => Outcome::Refused { failure, retry_after },
            _ => Outcome::Retry { failure, retry_after },
        }
    }

    fn reset(while_sending: bool) -> Outcome {
        Outcome::Retry {
            failure: Failure::Reset { why: "reset".to_owned(), while_sending },
            retry_after: None,
        }
    }

    fn healthy_since(at: SystemTime) -> Health {
        let mut health = Health::default();
        health.on_accepted(at);
        health
    }

    /// Of an endpoint whose requests are made as this one was, a second after the first attempt.
    fn decided(attempt: &Attempt, outcome: &Outcome, health: &Health) -> Verdict {
        decide(attempt, outcome, true, health, &RetryPolicy::default(), T0 + secs(1), 0.5)
    }

    const COUNTS: Evidence = Evidence::Failed { counts: true };
    const DOES_NOT_COUNT: Evidence = Evidence::Failed { counts: false };

    #[test]
    fn what_follows_each_answer() {
        let (unknown, healthy) = (Health::default(), healthy_since(T0));
        let five = Disposition::Retry { delay: secs(5) };
        let halves = Disposition::Split { delay: Duration::ZERO };
        for (attempt, answer, health, disposition, evidence) in [
            (first(9), 200, &unknown, Disposition::Delivered, Evidence::Accepted),
            (first(9), 500, &healthy, five, COUNTS),
            (first(9), 400, &unknown, five, COUNTS),
            (first(9), 422, &healthy, halves, Evidence::None),
            (first(1), 422, &healthy, Disposition::DeadLetter(Reason::Refused), Evidence::None),
            (first(9), 413, &unknown, halves, Evidence::None),
            (first(1), 413, &unknown, Disposition::DeadLetter(Reason::TooLarge), Evidence::None),
            (first(9), 410, &unknown, Disposition::Paused(PauseCause::Gone), Evidence::None),
        ] {
            let verdict = decided(&attempt, &status(answer), health);
            assert_eq!(
                (verdict.disposition, verdict.evidence),
                (disposition, evidence),
                "{answer} to {attempt:?}"
            );
        }
        let unsent =
            decided(&first(9), &Outcome::Unsent { why: "no descriptor".to_owned() }, &healthy);
        assert_eq!((unsent.disposition, unsent.evidence), (Disposition::GivenBack, Evidence::None));
    }

    #[test]
    fn a_batch_that_failed_before_counts_only_if_nothing_was_accepted_meanwhile() {
        let outcome = status(500);
        for (health, expected) in [
            (Health::default(), COUNTS), // unknown after a start
            (healthy_since(T0), COUNTS),
            (healthy_since(T0 + secs(2)), DOES_NOT_COUNT),
        ] {
            for part in [false, true] {
                assert_eq!(
                    decided(&again(part, T0 + secs(1)), &outcome, &health).evidence,
                    expected,
                    "{health:?}"
                );
            }
            assert_eq!(
                decided(&first(1), &outcome, &health).evidence,
                COUNTS,
                "a first attempt always does"
            );
        }
    }

    #[test]
    fn where_nothing_may_overtake_a_batch_a_refusal_is_believed_at_once_and_pauses() {
        let decided = |attempt: &Attempt, status: u16| {
            let outcome = super::tests::status(status);
            decide_in_order(
                attempt,
                &outcome,
                true,
                &Health::default(),
                &RetryPolicy::default(),
                T0,
                0.5,
            )
        };
        let split = Disposition::Split { delay: Duration::ZERO };
        assert_eq!(decided(&first(9), 422).disposition, split);
        assert_eq!(decided(&first(1), 422).disposition, Disposition::Paused(PauseCause::Refused));
        let too_large = decided(&first(1), 413).disposition;
        assert_eq!(too_large, Disposition::DeadLetter(Reason::TooLarge));
        let failed = decided(&again(false, T0), 503);
        assert_eq!((failed.disposition.delay().is_some(), failed.evidence), (true, COUNTS));
        let beside = |disposition| plain(disposition, Evidence::None).beside().disposition;
        let exhausted = beside(Disposition::Paused(PauseCause::Exhausted));
        assert_eq!(exhausted, Disposition::DeadLetter(Reason::Exhausted));
        let gone = Disposition::Paused(PauseCause::Gone);
        assert_eq!(beside(gone), gone);
    }

    #[test]
    fn an_attempt_without_a_token_is_retried_and_says_nothing_of_the_endpoint() {
        let outcome = Outcome::Retry {
            failure: Failure::Auth("it answered 503".to_owned()),
            retry_after: None,
        };
        let mut health = healthy_since(T0);
        let verdict = decided(&first(9), &outcome, &health);
        assert_eq!(
            (verdict.disposition, verdict.evidence),
            (Disposition::Retry { delay: secs(5) }, DOES_NOT_COUNT)
        );
        learn(&mut health, &first(9), &outcome, T0);
        assert!(health.believes_refusal());
    }

    #[test]
    fn of_a_part_a_success_counts_and_what_was_split_before_does_not() {
        let mut refused = healthy_since(T0);
        (0..Health::MAX_REFUSALS).for_each(|_| refused.on_refused());
        (0..Health::MAX_REFUSALS).for_each(|_| refused.on_too_large());
        let part = again(true, T0);
        assert_eq!(decided(&part, &status(200), &refused).evidence, Evidence::Accepted);
        for answer in [400, 413, 422] {
            let verdict = decided(&part, &status(answer), &refused);
            assert_eq!(
                (verdict.disposition, verdict.evidence),
                (Disposition::Retry { delay: secs(15) }, DOES_NOT_COUNT),
                "{answer}"
            );
            let whole = decided(&first(1), &status(answer), &refused);
            assert_eq!(
                (whole.disposition, whole.evidence),
                (Disposition::Retry { delay: secs(5) }, COUNTS),
                "the brake: {answer}"
            );
        }
    }

    #[test]
    fn a_failure_of_what_is_not_configured_any_more_is_an_ordinary_retry_that_says_nothing() {
        let day = Some(secs(86_400));
        let outcomes = [
            status(500),
            status_after(503, day),
            status_after(413, day),
            status_after(422, day),
            status(410),
            reset(true),
        ];
        let pausing = RetryPolicy::try_new(RetryOptions {
            on_exhausted: Exhausted::Pause,
            ..RetryOptions::default()
        })
        .expect("valid");
        for outcome in outcomes {
            for (number, delay) in [(1, 5), (16, 21_600)] {
                let attempt = Attempt { number, ..first(9) };
                let verdict = decide(
                    &attempt,
                    &outcome,
                    false,
                    &healthy_since(T0),
                    &pausing,
                    T0 + secs(1),
                    0.5,
                );
                assert_eq!(
                    verdict,
                    plain(Disposition::Retry { delay: secs(delay) }, Evidence::None),
                    "{outcome:?}"
                );
            }
        }
        let delivered =
            decide(&first(1), &status(200), false, &Health::default(), &pausing, T0, 0.5);
        assert_eq!(
            (delivered.disposition, delivered.evidence),
            (Disposition::Delivered, Evidence::None)
        );
    }

    #[test]
    fn a_wish_to_wait_holds_the_subscriber_and_is_said_to_be_shortened_where_the_schedule_ends_before()
     {
        let week = Some(secs(7 * 86_400));
        let verdict = decided(&first(1), &status_after(503, week), &Health::default());
        assert_eq!(verdict.disposition, Disposition::Retry { delay: secs(72 * 3600 - 1) });
        assert_eq!((verdict.hold, verdict.shortened_from), (week, week));
        let minute = Some(secs(60));
        let verdict = decided(&first(1), &status_after(503, minute), &Health::default());
        assert_eq!(
            (verdict.disposition, verdict.hold, verdict.shortened_from),
            (Disposition::Retry { delay: secs(60) }, minute, None)
        );
        let last = Attempt { number: 16, ..first(1) };
        let verdict = decided(&last, &status_after(503, week), &Health::default());
        assert_eq!(
            (verdict.disposition, verdict.shortened_from),
            (Disposition::DeadLetter(Reason::Exhausted), week)
        );
        let verdict = decided(&last, &status_after(503, minute), &Health::default());
        assert_eq!(verdict.shortened_from, None, "the number of attempts ended it, not the time");
        let verdict = decided(&first(9), &status_after(413, week), &Health::default());
        assert_eq!(
            (verdict.disposition.delay(), verdict.shortened_from),
            (Some(secs(72 * 3600 - 1)), week)
        );
    }

    #[test]
    fn a_large_batch_that_is_cut_off_twice_while_it_is_sent_is_halved() {
        let cut = |number, events, body_bytes, was_reset| Attempt {
            number,
            events,
            body_bytes,
            origin: Origin::Again { part: false, failed_at: Some(T0), was_reset },
            ..first(1)
        };
        let large = LARGE_BODY + 1;
        for (attempt, while_sending, splits) in [
            (cut(2, 9, large, true), true, true),
            (cut(2, 9, large, true), false, false),
            (cut(2, 9, large, false), true, false),
            (cut(2, 9, LARGE_BODY, true), true, false),
            (cut(2, 1, large, true), true, false), // a single event stays an ordinary retry
            (cut(1, 9, large, true), true, false), // what was reset before was its parent
        ] {
            let verdict = decided(&attempt, &reset(while_sending), &Health::default());
            assert_eq!(
                matches!(verdict.disposition, Disposition::Split { .. }),
                splits,
                "{attempt:?}"
            );
            assert!(
                verdict.disposition.delay().is_some_and(|d| d >= secs(5)),
                "not at once: {verdict:?}"
            );
            assert_eq!(verdict.evidence, COUNTS);
        }
    }

    /// One subscriber with one slot, whose endpoint accepts good batches and answers 500 to bad
    /// ones, in time that is counted.
    struct World {
        start: Instant,
        now: Duration,
        breaker: CircuitBreaker,
        health: Health,
        turns: Turns,
        retry: RetryPolicy,
        /// Batches that always fail: attempts made, when the last one failed, when the next is due.
        bad: Vec<(u32, Duration, Duration)>,
        /// When good events arrived that wait.
        good: Vec<Duration>,
        endpoint_is_well: bool,
        probes: Vec<Duration>,
        opened: Vec<Duration>,
        longest_wait: Duration,
        slot_time: [Duration; 2],
    }

    const OPEN_FOR: Duration = Duration::from_secs(30);

    impl World {
        fn new() -> Self {
            let policy = BreakerPolicy { failures: 5, open_for: OPEN_FOR, max_open_for: secs(600) };
            Self {
                start: crate::clock::instant(),
                now: Duration::ZERO,
                breaker: CircuitBreaker::new(policy),
                health: Health::default(),
                turns: Turns::default(),
                retry: RetryPolicy::default(),
                bad: Vec::new(),
                good: Vec::new(),
                endpoint_is_well: true,
                probes: Vec::new(),
                opened: Vec::new(),
                longest_wait: Duration::ZERO,
                slot_time: [Duration::ZERO; 2],
            }
        }

        fn instant(&self) -> Instant {
            self.start + self.now
        }

        /// Lets time pass until something may begin, at most until `until`.
        fn idle(&mut self, until: Duration) {
            self.now = (self.now + Duration::from_millis(100)).min(until);
        }

        /// Works on what there is until `until`; an attempt with a good batch takes `good`, one
        /// with a bad batch `bad`.
        fn run(&mut self, until: Duration, good: Duration, bad: Duration) {
            while self.now < until {
                let slots = match self.breaker.permit(self.instant()) {
                    Permit::Flow => Slots::Flow(1),
                    Permit::Probe => Slots::Probe,
                    Permit::Wait(at) => {
                        // The session has ended; the next one begins with other turns.
                        self.turns = Turns::default();
                        self.now = at.saturating_duration_since(self.start).min(until);
                        continue;
                    }
                };
                let now = self.instant();
                let due = self.bad.iter().position(|(_, _, due)| *due <= self.now);
                let first_due = self.good.first().filter(|at| **at <= self.now).map(|_| now);
                let Some(turn) =
                    self.turns.choose(slots, Waiting { first_due, retries: due.is_some() }, now)
                else {
                    self.idle(until);
                    continue;
                };
                if slots == Slots::Probe {
                    self.probes.push(self.now);
                }
                self.turns.begun(turn, now);
                let took = if turn == Turn::First { good } else { bad };
                let begun_at = self.now;
                self.now += took;
                self.slot_time[turn as usize] += took;
                self.turns.ended(turn, self.instant());
                self.attempt(
                    Begun { probe: slots == Slots::Probe, first: turn == Turn::First },
                    due,
                    begun_at,
                );
            }
        }

        fn attempt(&mut self, begun: Begun, due: Option<usize>, begun_at: Duration) {
            let time = T0 + self.now;
            let (attempt, outcome) = match due.filter(|_| !begun.first) {
                None => (first(1), if self.endpoint_is_well { status(200) } else { status(500) }),
                Some(n) => {
                    let (number, failed_at, _) = self.bad[n];
                    (Attempt { number: number + 1, ..again(false, T0 + failed_at) }, status(500))
                }
            };
            let verdict = decide(&attempt, &outcome, true, &self.health, &self.retry, time, 0.5);
            learn(&mut self.health, &attempt, &outcome, time);
            let now = self.instant();
            let change = match verdict.evidence {
                Evidence::Accepted => self.breaker.on_success(begun, 1),
                Evidence::Failed { counts } => self.breaker.on_failure(begun, counts, now),
                Evidence::None => None,
            };
            if change.is_some() && !matches!(outcome, Outcome::Delivered { .. }) {
                self.opened.push(self.now);
            }
            match due.filter(|_| !begun.first) {
                None if self.endpoint_is_well => {
                    let arrived = self.good.remove(0);
                    self.longest_wait = self.longest_wait.max(begun_at.saturating_sub(arrived));
                }
                None => {}
                Some(n) => {
                    // They never end here, whatever the schedule says: with any number of them.
                    let delay = verdict.disposition.delay().unwrap_or(secs(60));
                    self.bad[n] = (attempt.number, self.now, self.now + delay);
                }
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn however_many_batches_always_fail_no_first_attempt_waits_longer_than_the_circuit_is_open(
            bad in 1_usize..80,
            quiet_s in 0_u64..4000,
            good in proptest::collection::vec(0_u64..20_000, 1..60),
            took_ms in 1_u64..200,
        ) {
            let mut world = World::new();
            let took = Duration::from_millis(took_ms);
            world.bad = (0..bad).map(|n| (1, Duration::ZERO, secs(5) + Duration::from_millis(37 * n as u64))).collect();
            world.run(secs(quiet_s), took, took);
            let mut at = world.now;
            for gap in good {
                at += Duration::from_millis(gap);
                world.good.push(at);
            }
            while !world.good.is_empty() {
                prop_assert!(world.now < at + secs(3600), "{} events are never sent", world.good.len());
                let until = world.now + secs(10);
                world.run(until, took, took);
            }
            // A probe may just have begun with a retry, and first attempts go one after the other.
            let slack = secs(1) + took * 4 + Duration::from_millis(200);
            prop_assert!(world.longest_wait <= OPEN_FOR + slack, "{:?}", world.longest_wait);
        }

        #[test]
        fn an_open_circuit_is_probed_once_in_each_interval_whatever_waits(bad in 5_usize..200) {
            let mut world = World::new();
            let took = Duration::from_millis(20);
            world.bad = (0..bad).map(|_| (1, Duration::ZERO, secs(5))).collect();
            world.run(secs(3000), took, took);
            prop_assert!(world.probes.len() > 10 && world.opened.len() > world.probes.len(), "{:?}", world.probes);
            for two in world.probes.windows(2) {
                prop_assert!(two[1] - two[0] >= OPEN_FOR, "{two:?}");
            }
        }
    }

    #[test]
    fn an_endpoint_that_accepts_nothing_sees_the_waits_double_as_soon_as_there_are_new_events() {
        let mut world = World::new();
        let took = Duration::from_millis(20);
        world.endpoint_is_well = false;
        world.bad = (0..36).map(|_| (1, Duration::ZERO, secs(5))).collect();
        world.run(secs(600), took, took);
        let quiet = world.probes.len();
        assert!(quiet >= 15, "only retries: each half minute, {quiet}");
        world.good = vec![world.now; 1000];
        world.run(secs(10_000), took, took);
        let gaps: Vec<u64> =
            world.probes[quiet..].windows(2).map(|two| (two[1] - two[0]).as_secs()).collect();
        assert_eq!(gaps[..5], [60, 120, 240, 480, 600], "{gaps:?}");
        assert!(gaps[5..].iter().all(|gap| *gap == 600), "{gaps:?}");
    }

    #[test]
    fn first_attempts_keep_half_of_the_slot_time_while_retries_hang() {
        let mut world = World::new();
        world.bad = (0..500).map(|_| (1, Duration::ZERO, secs(5))).collect();
        world.good = vec![Duration::ZERO; 100_000];
        world.run(secs(7200), Duration::from_millis(50), secs(30));
        let [firsts, retries] = world.slot_time;
        assert!(firsts + secs(30) >= retries && retries > secs(600), "{firsts:?} {retries:?}");
    }
}

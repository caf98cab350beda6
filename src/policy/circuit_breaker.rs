//! Stops sending to a subscriber that keeps failing.
//!
//! Closed: attempts flow. Open: nothing is sent, the backlog stays in the queue. Half-open: one
//! probe decides which of the two comes next. In any state, a hold that a receiver asked for with
//! `Retry-After` stops attempts; an operator can end it, and then one probe decides as well.
//!
//! When it closes, a backlog waits, and the receiver may have just started: a ramp leads from one
//! small batch at a time to all that is configured.

use std::time::{Duration, Instant};

/// The settings of `[circuit_breaker]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BreakerPolicy {
    /// Consecutive failed attempts that open the circuit; 0: it never opens.
    pub failures: u32,
    /// The time that it stays open at first; doubled after each failed probe that was a first
    /// attempt.
    pub open_for: Duration,
    /// The longest that it stays open between two probes.
    pub max_open_for: Duration,
}

/// The state of the circuit, whatever hold a receiver asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    Closed {
        failures: u32,
    },
    Open {
        until: Instant,
        open_for: Duration,
    },
    HalfOpen {
        open_for: Duration,
    },
    /// Closed, but an operator ended a hold. Shown as half-open: one probe decides whether attempts
    /// flow, or the hold counts again.
    Tried {
        failures: u32,
        held_until: Instant,
    },
}

/// A state as logs, metrics and the API name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum CircuitState {
    Closed,
    Open,
    HalfOpen,
}

impl CircuitState {
    pub const ALL: [Self; 3] = [Self::Closed, Self::Open, Self::HalfOpen];

    pub const fn name(self) -> &'static str {
        match self {
            Self::Closed => "closed",
            Self::Open => "open",
            Self::HalfOpen => "half_open",
        }
    }
}

/// What a lane may send now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Permit {
    /// As many requests as configured.
    Flow,
    /// One batch, and nothing else before its outcome.
    Probe,
    /// Nothing before then.
    Wait(Instant),
}

/// The kind of an attempt when it began.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Begun {
    /// Allowed by [`Permit::Probe`]. Only a probe decides what follows half-open: an attempt from
    /// before the circuit opened says nothing of the endpoint now.
    pub probe: bool,
    /// A first attempt. A batch that has failed before may fail for a reason of its own.
    pub first: bool,
}

/// A change of state worth a log line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    Opened { failures: u32, open_for: Duration },
    StillOpen { open_for: Duration },
    Closed,
}

/// The divisor of the largest batch at the begin of a ramp: an eighth of what is configured. Three
/// successes lead to all of it, as they do with eight requests at once, so that events in flight
/// grow fourfold each time and not more. A batch of the default 500 events begins at 63, which costs
/// a receiver that is still slow little to refuse.
const SMALLEST: usize = 8;

/// The share of the configured limits that counts after the circuit was open: the requests in flight
/// and the size of a batch double with each success.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ramp {
    doublings: u32,
}

impl Ramp {
    const BEGIN: Self = Self { doublings: 0 };

    /// The limit of requests in flight, of the configured `all`.
    pub fn requests(self, all: usize) -> usize {
        self.part(1, all)
    }

    /// The limit of a batch in events or bytes, of the configured `whole`.
    pub fn batch(self, whole: usize) -> usize {
        self.part(whole.div_ceil(SMALLEST), whole)
    }

    fn part(self, first: usize, whole: usize) -> usize {
        2_usize.checked_pow(self.doublings).map_or(whole, |n| first.saturating_mul(n)).min(whole)
    }

    /// The ramp after a success; `None` once all configured requests may be in flight and batches
    /// are whole.
    fn next(self, requests: usize) -> Option<Self> {
        let next = Self { doublings: self.doublings + 1 };
        (next.requests(requests) < requests || next.requests(SMALLEST) < SMALLEST).then_some(next)
    }
}

#[derive(Debug)]
pub struct CircuitBreaker {
    policy: BreakerPolicy,
    state: State,
    /// Set when the circuit opens, and until enough succeeded after it closed.
    ramp: Option<Ramp>,
    /// The end of the hold; independent of failures.
    hold_until: Option<Instant>,
}

impl CircuitBreaker {
    pub fn new(policy: BreakerPolicy) -> Self {
        Self { policy, state: State::Closed { failures: 0 }, ramp: None, hold_until: None }
    }

    /// Goes on under another policy: a circuit that it would not have opened closes, and one that it
    /// would open for a shorter time is shortened.
    pub fn set_policy(&mut self, policy: BreakerPolicy, now: Instant) {
        let longest = now + policy.max_open_for;
        if policy.failures == 0 {
            self.ramp = None;
        }
        self.hold_until = self.hold_until.map(|until| until.min(longest));
        self.state = match self.state {
            State::Closed { .. } | State::Open { .. } | State::HalfOpen { .. }
                if policy.failures == 0 =>
            {
                State::Closed { failures: 0 }
            }
            State::Open { until, open_for } => State::Open {
                until: until.min(longest),
                open_for: open_for.min(policy.max_open_for),
            },
            State::Tried { failures, held_until } => {
                State::Tried { failures, held_until: held_until.min(longest) }
            }
            state => state,
        };
        self.policy = policy;
    }

    pub fn state(&self) -> State {
        self.state
    }

    /// The ramp; `None`: everything that is configured may be used.
    pub fn ramp(&self) -> Option<Ramp> {
        self.ramp
    }

    /// The end of the hold, as far as it counts.
    pub fn held_until(&self) -> Option<Instant> {
        self.hold_until
    }

    /// What may be sent at `now`. An open circuit becomes half-open when its time ends.
    pub fn permit(&mut self, now: Instant) -> Permit {
        if let Some(until) = self.hold_until {
            if now < until {
                return Permit::Wait(until);
            }
            self.hold_until = None;
        }
        match self.state {
            State::Closed { .. } => Permit::Flow,
            State::Open { until, .. } if now < until => Permit::Wait(until),
            State::Open { open_for, .. } => {
                self.state = State::HalfOpen { open_for };
                Permit::Probe
            }
            State::HalfOpen { .. } | State::Tried { .. } => Permit::Probe,
        }
    }

    /// Holds the endpoint for `wait`, at most `max_open_for`, because the receiver asked for it.
    pub fn hold(&mut self, now: Instant, wait: Duration) {
        let until = now + wait.min(self.policy.max_open_for);
        self.hold_until = Some(self.hold_until.map_or(until, |u| u.max(until)));
    }

    /// Allows one batch at once, although the circuit is open or the endpoint held, because an
    /// operator requests it. Only an accepted batch changes more: if it fails, a hold counts again,
    /// and the circuit opens again as after any failed probe: for twice the time if the probe was a
    /// first attempt.
    pub fn try_now(&mut self) {
        let held_until = self.hold_until.take();
        self.state = match (self.state, held_until) {
            (State::Open { open_for, .. }, _) => State::HalfOpen { open_for },
            (State::Closed { failures }, Some(held_until)) => State::Tried { failures, held_until },
            (state @ (State::Closed { .. } | State::HalfOpen { .. } | State::Tried { .. }), _) => {
                state
            }
        };
    }

    /// `requests`: the configured number of requests in flight.
    pub fn on_success(&mut self, begun: Begun, requests: usize) -> Option<Change> {
        match self.state {
            State::Closed { .. } => {
                self.state = State::Closed { failures: 0 };
                self.ramp = self.ramp.and_then(|ramp| ramp.next(requests));
                None
            }
            State::HalfOpen { .. } if begun.probe => {
                self.state = State::Closed { failures: 0 };
                Some(Change::Closed)
            }
            State::Tried { .. } if begun.probe => {
                self.state = State::Closed { failures: 0 };
                None
            }
            State::Open { .. } | State::HalfOpen { .. } | State::Tried { .. } => None,
        }
    }

    /// An attempt failed. If it does not `count`, it says more of its batch than of the endpoint. A
    /// failed probe opens the circuit again all the same, so that there is one probe in each
    /// interval, and for twice the time only if it was a first attempt that counts.
    pub fn on_failure(&mut self, begun: Begun, counts: bool, now: Instant) -> Option<Change> {
        if let State::Tried { failures, held_until } = self.state {
            if !begun.probe {
                return None;
            }
            self.hold_until = self.hold_until.max(Some(held_until));
            self.state = State::Closed { failures };
        }
        if self.policy.failures == 0 {
            return None;
        }
        let failed = self.failed(begun, counts, now);
        if failed.is_some() || (counts && self.ramp.is_some()) {
            self.ramp = Some(Ramp::BEGIN);
        }
        failed
    }

    fn failed(&mut self, begun: Begun, counts: bool, now: Instant) -> Option<Change> {
        match self.state {
            State::Closed { .. } if !counts => None,
            State::Closed { failures } if failures + 1 < self.policy.failures => {
                self.state = State::Closed { failures: failures + 1 };
                None
            }
            State::Closed { failures } => {
                let open_for = self.policy.open_for;
                self.state = State::Open { until: now + open_for, open_for };
                Some(Change::Opened { failures: failures + 1, open_for })
            }
            State::HalfOpen { open_for } if begun.probe => {
                let open_for = if begun.first && counts {
                    (open_for * 2).min(self.policy.max_open_for)
                } else {
                    open_for
                };
                self.state = State::Open { until: now + open_for, open_for };
                Some(Change::StillOpen { open_for })
            }
            // Attempts that were in flight when it opened say nothing new.
            State::Open { .. } | State::HalfOpen { .. } | State::Tried { .. } => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn secs(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    const FLOW: Begun = Begun { probe: false, first: true };
    const PROBE: Begun = Begun { probe: true, first: true };
    const RETRIED_PROBE: Begun = Begun { probe: true, first: false };

    fn breaker(failures: u32) -> CircuitBreaker {
        CircuitBreaker::new(BreakerPolicy { failures, open_for: secs(30), max_open_for: secs(100) })
    }

    #[test]
    fn consecutive_failures_open_it_and_a_success_between_them_does_not() {
        let t = crate::clock::instant();
        let mut b = breaker(3);
        b.on_failure(FLOW, true, t);
        b.on_failure(FLOW, true, t);
        assert_eq!(b.on_success(FLOW, 1), None, "it was closed all along");
        b.on_failure(FLOW, true, t);
        b.on_failure(FLOW, true, t);
        assert_eq!(b.permit(t), Permit::Flow);
        assert_eq!(
            b.on_failure(FLOW, true, t),
            Some(Change::Opened { failures: 3, open_for: secs(30) })
        );
        assert_eq!(b.permit(t), Permit::Wait(t + secs(30)));
    }

    #[test]
    fn failing_probes_double_the_wait_up_to_its_limit_and_a_good_one_closes_it() {
        let mut t = crate::clock::instant();
        let mut b = breaker(1);
        b.on_failure(FLOW, true, t);
        for wait in [30, 60, 100, 100] {
            assert_eq!(b.permit(t), Permit::Wait(t + secs(wait)));
            assert_eq!(
                b.on_failure(FLOW, true, t),
                None,
                "an attempt from before it opened changes nothing"
            );
            t += secs(wait);
            assert_eq!(b.permit(t), Permit::Probe);
            assert_eq!(b.permit(t), Permit::Probe, "until its outcome is known");
            assert_eq!(
                b.on_failure(FLOW, true, t),
                None,
                "an attempt from before it opened is no probe"
            );
            assert_eq!(b.on_success(FLOW, 1), None, "nor does its success close the circuit");
            assert!(matches!(b.on_failure(PROBE, true, t), Some(Change::StillOpen { .. })));
        }
        t += secs(100);
        assert_eq!(b.permit(t), Permit::Probe);
        assert_eq!(b.on_success(PROBE, 1), Some(Change::Closed));
        assert_eq!(b.permit(t), Permit::Flow);
        assert_eq!(
            b.on_failure(FLOW, true, t),
            Some(Change::Opened { failures: 1, open_for: secs(30) }),
            "the wait starts over"
        );
    }

    #[test]
    fn a_probe_with_a_batch_that_failed_before_opens_the_circuit_again_for_no_longer() {
        let mut t = crate::clock::instant();
        let mut b = breaker(1);
        b.on_failure(FLOW, true, t);
        for counts in [true, false, true] {
            t += secs(30);
            assert_eq!(b.permit(t), Permit::Probe);
            assert_eq!(
                b.on_failure(RETRIED_PROBE, counts, t),
                Some(Change::StillOpen { open_for: secs(30) })
            );
            assert_eq!(b.permit(t), Permit::Wait(t + secs(30)), "one probe in each interval");
        }
        t += secs(30);
        assert_eq!(b.permit(t), Permit::Probe);
        assert_eq!(b.on_failure(PROBE, true, t), Some(Change::StillOpen { open_for: secs(60) }));
    }

    #[test]
    fn what_does_not_count_neither_opens_a_closed_circuit_nor_slows_down_its_ramp() {
        let t = crate::clock::instant();
        let mut b = breaker(2);
        (0..100).for_each(|_| assert_eq!(b.on_failure(FLOW, false, t), None));
        assert_eq!(b.permit(t), Permit::Flow);
        let mut b = closed_again(2, t);
        b.on_success(FLOW, 4);
        let before = allowed(&b, 4, 500);
        b.on_failure(FLOW, false, t);
        assert_eq!(allowed(&b, 4, 500), before);
    }

    #[test]
    fn an_operator_ends_a_hold_and_has_an_open_circuit_probed_at_once() {
        let t = crate::clock::instant();
        let mut b = breaker(1);
        b.on_failure(FLOW, true, t);
        b.hold(t, secs(90));
        b.try_now();
        assert_eq!(b.permit(t), Permit::Probe);
        assert_eq!(b.on_failure(PROBE, true, t), Some(Change::StillOpen { open_for: secs(60) }));
    }

    #[test]
    fn an_operator_who_has_an_open_circuit_probed_again_and_again_does_not_shorten_its_waits() {
        let t = crate::clock::instant();
        let mut b = breaker(1);
        b.on_failure(FLOW, true, t);
        for open_for in [60, 100, 100] {
            b.try_now();
            b.try_now();
            assert_eq!(b.permit(t), Permit::Probe);
            assert_eq!(
                b.on_failure(PROBE, true, t),
                Some(Change::StillOpen { open_for: secs(open_for) })
            );
            assert_eq!(b.permit(t), Permit::Wait(t + secs(open_for)));
        }
        b.try_now();
        assert_eq!(b.permit(t), Permit::Probe);
        assert_eq!(b.on_success(PROBE, 1), Some(Change::Closed));
        assert_eq!(
            b.on_failure(FLOW, true, t),
            Some(Change::Opened { failures: 1, open_for: secs(30) })
        );
    }

    #[test]
    fn after_an_operator_ended_a_hold_one_batch_is_tried_and_the_rest_follows_when_that_is_accepted()
     {
        let t = crate::clock::instant();
        for failures in [0, 2] {
            let mut b = breaker(failures);
            b.hold(t, secs(90));
            b.try_now();
            for _ in 0..16 {
                assert_eq!(b.permit(t + secs(1)), Permit::Probe);
            }
            assert_eq!(
                b.on_failure(FLOW, true, t + secs(1)),
                None,
                "an attempt from before is no probe"
            );
            assert_eq!(b.on_success(FLOW, 16), None);
            assert_eq!(b.permit(t + secs(1)), Permit::Probe);
            assert_eq!(b.on_success(PROBE, 16), None);
            assert_eq!((b.permit(t + secs(1)), b.ramp()), (Permit::Flow, None));
            b.try_now();
            assert_eq!(b.permit(t + secs(1)), Permit::Flow, "nothing keeps it from that");
        }
    }

    #[test]
    fn a_hold_that_an_operator_ended_counts_again_when_the_batch_that_is_tried_fails() {
        let t = crate::clock::instant();
        for (failures, probe, counts) in
            [(0, PROBE, true), (3, PROBE, true), (3, RETRIED_PROBE, false)]
        {
            let mut b = breaker(failures);
            b.hold(t, secs(90));
            for n in 1..=2 {
                b.try_now();
                assert_eq!(b.permit(t + secs(n)), Permit::Probe);
                assert_eq!(b.on_failure(probe, counts, t + secs(n)), None);
                assert_eq!(
                    b.permit(t + secs(n)),
                    Permit::Wait(t + secs(90)),
                    "no longer and no shorter"
                );
            }
            // The receiver may ask for more at each try.
            b.try_now();
            assert_eq!(b.permit(t + secs(10)), Permit::Probe);
            b.on_failure(probe, false, t + secs(10));
            b.hold(t + secs(10), secs(95));
            assert_eq!(b.permit(t + secs(10)), Permit::Wait(t + secs(105)));
            assert_eq!(b.permit(t + secs(105)), Permit::Flow);
        }
        // Failures are counted on, and open the circuit as they do without a try.
        let mut b = breaker(2);
        b.on_failure(FLOW, true, t);
        b.hold(t, secs(10));
        b.try_now();
        assert_eq!(
            b.on_failure(PROBE, true, t),
            Some(Change::Opened { failures: 2, open_for: secs(30) })
        );
        assert_eq!(b.permit(t + secs(10)), Permit::Wait(t + secs(30)));
    }

    #[test]
    fn another_policy_leaves_a_try_after_a_hold_a_try() {
        let t = crate::clock::instant();
        let mut b = breaker(2);
        b.hold(t, secs(90));
        b.try_now();
        b.set_policy(BreakerPolicy { failures: 0, open_for: secs(5), max_open_for: secs(20) }, t);
        assert_eq!(b.permit(t), Permit::Probe);
        b.on_failure(PROBE, true, t);
        assert_eq!(b.permit(t), Permit::Wait(t + secs(20)));
    }

    #[test]
    fn with_zero_failures_it_never_opens() {
        let t = crate::clock::instant();
        let mut b = breaker(0);
        for _ in 0..1000 {
            assert_eq!(b.on_failure(FLOW, true, t), None);
        }
        assert_eq!(b.permit(t), Permit::Flow);
    }

    #[test]
    fn another_policy_holds_for_a_circuit_that_is_open_already() {
        let t = crate::clock::instant();
        let policy =
            |failures, max| BreakerPolicy { failures, open_for: secs(30), max_open_for: secs(max) };
        let mut b = breaker(1);
        b.on_failure(FLOW, true, t);
        b.hold(t, secs(90));
        b.set_policy(policy(1, 10), t);
        assert_eq!(b.permit(t), Permit::Wait(t + secs(10)));
        assert_eq!(b.permit(t + secs(10)), Permit::Probe);
        b.set_policy(policy(0, 10), t + secs(10));
        assert_eq!(b.permit(t + secs(10)), Permit::Flow);
        b.set_policy(policy(2, 10), t);
        b.on_failure(FLOW, true, t);
        b.set_policy(policy(3, 10), t);
        b.on_failure(FLOW, true, t);
        assert_eq!(b.permit(t), Permit::Flow, "failures are counted on");
        b.on_failure(FLOW, true, t);
        assert_eq!(b.permit(t), Permit::Wait(t + secs(30)));
    }

    #[test]
    fn retry_after_holds_the_lane_for_at_most_max_open_for() {
        let t = crate::clock::instant();
        let mut b = breaker(0);
        b.hold(t, secs(20));
        b.hold(t, secs(5));
        assert_eq!(
            b.permit(t),
            Permit::Wait(t + secs(20)),
            "a shorter wish does not shorten a longer one"
        );
        assert_eq!(b.permit(t + secs(20)), Permit::Flow);
        b.hold(t, secs(1 << 20));
        assert_eq!(b.permit(t), Permit::Wait(t + secs(100)));
    }

    /// A circuit that was open and has just closed.
    fn closed_again(failures: u32, t: Instant) -> CircuitBreaker {
        let mut b = breaker(failures);
        while b.on_failure(FLOW, true, t).is_none() {}
        assert_eq!(b.permit(t + secs(30)), Permit::Probe);
        assert_eq!(b.on_success(PROBE, 4), Some(Change::Closed));
        b
    }

    fn allowed(b: &CircuitBreaker, requests: usize, events: usize) -> (usize, usize) {
        b.ramp().map_or((requests, events), |ramp| (ramp.requests(requests), ramp.batch(events)))
    }

    #[test]
    fn after_it_was_open_what_may_be_sent_doubles_with_each_success_and_a_failure_begins_it_again()
    {
        let t = crate::clock::instant();
        let mut b = closed_again(2, t);
        for expected in [(1, 63), (2, 126), (4, 252), (4, 500)] {
            assert_eq!(allowed(&b, 4, 500), expected);
            b.on_success(FLOW, 4);
        }
        assert_eq!(b.ramp(), None);
        b.on_failure(FLOW, true, t);
        assert_eq!(b.ramp(), None, "one failure in the flow slows nothing down");

        let mut b = closed_again(2, t);
        b.on_success(FLOW, 4);
        b.on_success(FLOW, 4);
        assert_eq!(b.on_failure(FLOW, true, t), None);
        assert_eq!((b.permit(t), allowed(&b, 4, 500)), (Permit::Flow, (1, 63)));
        b.set_policy(BreakerPolicy { failures: 0, ..b.policy.clone() }, t);
        assert_eq!(b.ramp(), None, "without a breaker there is nothing to come back from");
    }

    #[test]
    fn a_circuit_that_never_opened_has_no_ramp_and_an_open_one_is_at_its_beginning() {
        let t = crate::clock::instant();
        let mut b = breaker(3);
        b.on_failure(FLOW, true, t);
        b.on_failure(FLOW, true, t);
        b.on_success(FLOW, 4);
        assert_eq!(b.ramp(), None);
        let mut b = breaker(1);
        b.on_failure(FLOW, true, t);
        assert_eq!(allowed(&b, 4, 500), (1, 63));
        assert_eq!(b.permit(t + secs(30)), Permit::Probe);
        assert_eq!(allowed(&b, 4, 500), (1, 63), "the probe too is a small batch");
    }

    proptest! {
        #[test]
        fn a_ramp_begins_with_one_request_stays_below_what_is_configured_and_reaches_it_by_doubling(
            requests in 1_usize..2000,
            whole in 1_usize..20_000_000,
            again in prop::option::of(0_u32..20),
        ) {
            let t = crate::clock::instant();
            let mut b = closed_again(1000, t);
            if let Some(successes) = again {
                (0..successes).for_each(|_| { b.on_success(FLOW, requests); });
                b.on_failure(FLOW, true, t);
                if b.ramp().is_none() {
                    return Ok(());
                }
            }
            let mut last = allowed(&b, requests, whole);
            prop_assert_eq!(last, (1, whole.div_ceil(8)));
            let mut successes = 0;
            while b.ramp().is_some() {
                prop_assert_eq!(b.on_success(FLOW, requests), None);
                successes += 1;
                let next = allowed(&b, requests, whole);
                prop_assert_eq!(next.0, (2 * last.0).min(requests));
                prop_assert!(last.1 <= next.1 && next.1 <= (2 * last.1).min(whole), "{:?} after {:?}", next, last);
                last = next;
            }
            prop_assert_eq!(last, (requests, whole));
            prop_assert_eq!(successes, requests.next_power_of_two().ilog2().max(3));
        }
    }
}

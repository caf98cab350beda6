//! Stops sending to a subscriber that keeps failing.
//!
//! Closed: attempts flow. Open: nothing is sent, the backlog stays in the queue. Half-open: one
//! probe of one batch decides which of the two comes next.

use std::time::{Duration, Instant};

/// From `[circuit_breaker]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BreakerPolicy {
    /// Consecutive failed attempts that open the circuit; 0: never.
    pub failures: u32,
    /// How long it stays open the first time; doubled after each failed probe.
    pub open_for: Duration,
    /// The longest that it stays open between two probes.
    pub max_open_for: Duration,
}

/// What the circuit is, however long a receiver asked to be left alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    Closed { failures: u32 },
    Open { until: Instant, open_for: Duration },
    HalfOpen { open_for: Duration },
}

/// What the lane may do now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Permit {
    /// Send as configured.
    Flow,
    /// Send one batch and wait for its outcome.
    Probe,
    /// Send nothing until then.
    Wait(Instant),
}

/// A change of state worth a log line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    Opened { failures: u32, open_for: Duration },
    StillOpen { open_for: Duration },
    Closed,
}

#[derive(Debug)]
pub struct CircuitBreaker {
    policy: BreakerPolicy,
    state: State,
    /// Asked for by the receiver with `Retry-After`; independent of failures.
    hold_until: Option<Instant>,
}

impl CircuitBreaker {
    pub fn new(policy: BreakerPolicy) -> Self {
        Self { policy, state: State::Closed { failures: 0 }, hold_until: None }
    }

    /// Goes on under another policy: a circuit that would not have opened closes, one that would be open for less is.
    pub fn set_policy(&mut self, policy: BreakerPolicy, now: Instant) {
        let longest = now + policy.max_open_for;
        self.hold_until = self.hold_until.map(|until| until.min(longest));
        self.state = match self.state {
            _ if policy.failures == 0 => State::Closed { failures: 0 },
            State::Open { until, open_for } => State::Open { until: until.min(longest), open_for: open_for.min(policy.max_open_for) },
            state => state,
        };
        self.policy = policy;
    }

    pub fn state(&self) -> State {
        self.state
    }

    /// Until when the receiver asked to be left alone, as far as that counts.
    pub fn held_until(&self) -> Option<Instant> {
        self.hold_until
    }

    /// What may be sent at `now`. An open circuit whose time is over becomes half-open.
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
            State::HalfOpen { .. } => Permit::Probe,
        }
    }

    /// Sends nothing before `now + wait`, at most `max_open_for`, because the receiver asked for it.
    pub fn hold(&mut self, now: Instant, wait: Duration) {
        let until = now + wait.min(self.policy.max_open_for);
        self.hold_until = Some(self.hold_until.map_or(until, |u| u.max(until)));
    }

    pub fn on_success(&mut self) -> Option<Change> {
        let before = std::mem::replace(&mut self.state, State::Closed { failures: 0 });
        (!matches!(before, State::Closed { .. })).then_some(Change::Closed)
    }

    pub fn on_failure(&mut self, now: Instant) -> Option<Change> {
        if self.policy.failures == 0 {
            return None;
        }
        match self.state {
            State::Closed { failures } if failures + 1 < self.policy.failures => {
                self.state = State::Closed { failures: failures + 1 };
                None
            }
            State::Closed { failures } => {
                let open_for = self.policy.open_for;
                self.state = State::Open { until: now + open_for, open_for };
                Some(Change::Opened { failures: failures + 1, open_for })
            }
            // Attempts that were in flight when it opened say nothing new.
            State::Open { .. } => None,
            State::HalfOpen { open_for } => {
                let open_for = (open_for * 2).min(self.policy.max_open_for);
                self.state = State::Open { until: now + open_for, open_for };
                Some(Change::StillOpen { open_for })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secs(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    fn breaker(failures: u32) -> CircuitBreaker {
        CircuitBreaker::new(BreakerPolicy { failures, open_for: secs(30), max_open_for: secs(100) })
    }

    #[test]
    fn consecutive_failures_open_it_and_a_success_between_them_does_not() {
        let t = crate::clock::instant();
        let mut b = breaker(3);
        b.on_failure(t);
        b.on_failure(t);
        assert_eq!(b.on_success(), None, "it was closed all along");
        b.on_failure(t);
        b.on_failure(t);
        assert_eq!(b.permit(t), Permit::Flow);
        assert_eq!(b.on_failure(t), Some(Change::Opened { failures: 3, open_for: secs(30) }));
        assert_eq!(b.permit(t), Permit::Wait(t + secs(30)));
    }

    #[test]
    fn failing_probes_double_the_wait_up_to_its_limit_and_a_good_one_closes_it() {
        let mut t = crate::clock::instant();
        let mut b = breaker(1);
        b.on_failure(t);
        for wait in [30, 60, 100, 100] {
            assert_eq!(b.permit(t), Permit::Wait(t + secs(wait)));
            assert_eq!(b.on_failure(t), None, "an attempt from before it opened changes nothing");
            t += secs(wait);
            assert_eq!(b.permit(t), Permit::Probe);
            assert_eq!(b.permit(t), Permit::Probe, "until its outcome is known");
            assert!(matches!(b.on_failure(t), Some(Change::StillOpen { .. })));
        }
        t += secs(100);
        assert_eq!(b.permit(t), Permit::Probe);
        assert_eq!(b.on_success(), Some(Change::Closed));
        assert_eq!(b.permit(t), Permit::Flow);
        assert_eq!(b.on_failure(t), Some(Change::Opened { failures: 1, open_for: secs(30) }), "the wait begins anew");
    }

    #[test]
    fn with_zero_failures_it_never_opens() {
        let t = crate::clock::instant();
        let mut b = breaker(0);
        for _ in 0..1000 {
            assert_eq!(b.on_failure(t), None);
        }
        assert_eq!(b.permit(t), Permit::Flow);
    }

    #[test]
    fn another_policy_holds_for_a_circuit_that_is_open_already() {
        let t = crate::clock::instant();
        let policy = |failures, max| BreakerPolicy { failures, open_for: secs(30), max_open_for: secs(max) };
        let mut b = breaker(1);
        b.on_failure(t);
        b.hold(t, secs(90));
        b.set_policy(policy(1, 10), t);
        assert_eq!(b.permit(t), Permit::Wait(t + secs(10)));
        assert_eq!(b.permit(t + secs(10)), Permit::Probe);
        b.set_policy(policy(0, 10), t + secs(10));
        assert_eq!(b.permit(t + secs(10)), Permit::Flow);
        b.set_policy(policy(2, 10), t);
        b.on_failure(t);
        b.set_policy(policy(3, 10), t);
        b.on_failure(t);
        assert_eq!(b.permit(t), Permit::Flow, "failures are counted on");
        b.on_failure(t);
        assert_eq!(b.permit(t), Permit::Wait(t + secs(30)));
    }

    #[test]
    fn retry_after_holds_the_lane_for_at_most_max_open_for() {
        let t = crate::clock::instant();
        let mut b = breaker(0);
        b.hold(t, secs(20));
        b.hold(t, secs(5));
        assert_eq!(b.permit(t), Permit::Wait(t + secs(20)), "a shorter wish does not shorten a longer one");
        assert_eq!(b.permit(t + secs(20)), Permit::Flow);
        b.hold(t, secs(1 << 20));
        assert_eq!(b.permit(t), Permit::Wait(t + secs(100)));
    }
}

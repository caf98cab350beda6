//! The meaning of a receiver's answer for the batch.

use std::time::SystemTime;

/// The statuses that mean that the batch was accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Success {
    Any2xx,
    Only200,
}

impl Success {
    pub fn includes(self, status: u16) -> bool {
        match self {
            Self::Any2xx => (200..300).contains(&status),
            Self::Only200 => status == 200,
        }
    }

    pub const fn name(self) -> &'static str {
        match self {
            Self::Any2xx => "2xx",
            Self::Only200 => "200",
        }
    }
}

/// The meaning of a status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    Accepted,
    /// The same batch has to be sent again later.
    Later,
    /// 410: the endpoint is gone (RFC 9110, section 15.5.11).
    Gone,
    /// 413: the batch has to be smaller (RFC 9110, section 15.5.14).
    TooLarge,
    /// 400 or 422: the receiver refuses this batch, or refuses everything.
    Refused,
}

impl Answer {
    pub fn of(status: u16, success: Success) -> Self {
        match status {
            _ if success.includes(status) => Self::Accepted,
            410 => Self::Gone,
            413 => Self::TooLarge,
            400 | 422 => Self::Refused,
            _ => Self::Later,
        }
    }
}

/// The health of an endpoint, which decides whether its refusals are believed.
///
/// An endpoint is healthy if it accepted something since it last failed in another way than by a
/// refusal. After a start it is not known to be.
#[derive(Debug, Default)]
pub struct Health {
    healthy: bool,
    /// Refusals since the endpoint last accepted something.
    refusals: u32,
    /// Single events that were too large for it since it last accepted something.
    too_large: u32,
    accepted_at: Option<SystemTime>,
}

impl Health {
    /// The number of refusals in a row after which an endpoint is taken to refuse everything. Fewer
    /// would stop at a batch with as many bad events in different places, more would give up more
    /// good events. The same holds for single events that are too large.
    pub const MAX_REFUSALS: u32 = 64;

    pub fn on_accepted(&mut self, at: SystemTime) {
        *self = Self { healthy: true, accepted_at: Some(at), ..Self::default() };
    }

    /// An attempt failed in any way but a refusal.
    pub fn on_failed(&mut self) {
        self.healthy = false;
    }

    pub fn on_refused(&mut self) {
        self.refusals = self.refusals.saturating_add(1);
    }

    /// A single event was too large for it.
    pub fn on_too_large(&mut self) {
        self.too_large = self.too_large.saturating_add(1);
    }

    /// The same endpoint, with its refusals believed.
    #[must_use]
    pub const fn believed(&self) -> Self {
        Self { healthy: true, refusals: 0, ..*self }
    }

    /// Whether the next refusal is about the batch, and not about everything.
    pub fn believes_refusal(&self) -> bool {
        self.healthy && self.refusals < Self::MAX_REFUSALS
    }

    /// Whether the next single event that is called too large is given up.
    pub fn believes_too_large(&self) -> bool {
        self.too_large < Self::MAX_REFUSALS
    }

    /// Whether it accepted something after `at`; false if that is not known.
    pub fn accepted_since(&self, at: Option<SystemTime>) -> bool {
        self.accepted_at.zip(at).is_some_and(|(accepted, at)| accepted > at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_status_has_its_meaning() {
        for (status, any, only) in [
            (200, Answer::Accepted, Answer::Accepted),
            (202, Answer::Accepted, Answer::Later),
            (204, Answer::Accepted, Answer::Later),
            (301, Answer::Later, Answer::Later),
            (400, Answer::Refused, Answer::Refused),
            (401, Answer::Later, Answer::Later),
            (404, Answer::Later, Answer::Later),
            (410, Answer::Gone, Answer::Gone),
            (413, Answer::TooLarge, Answer::TooLarge),
            (422, Answer::Refused, Answer::Refused),
            (429, Answer::Later, Answer::Later),
            (500, Answer::Later, Answer::Later),
            (999, Answer::Later, Answer::Later),
        ] {
            assert_eq!(
                (Answer::of(status, Success::Any2xx), Answer::of(status, Success::Only200)),
                (any, only),
                "{status}"
            );
        }
    }

    const T0: SystemTime = SystemTime::UNIX_EPOCH;

    #[test]
    fn a_refusal_is_believed_of_an_endpoint_that_accepted_something_since_it_last_failed() {
        let mut h = Health::default();
        assert!(!h.believes_refusal(), "nothing is known after a start");
        h.on_accepted(T0);
        h.on_refused();
        assert!(h.believes_refusal());
        h.on_failed();
        assert!(!h.believes_refusal());
        h.on_accepted(T0);
        assert!(h.believes_refusal());
    }

    #[test]
    fn an_endpoint_that_refuses_everything_or_calls_everything_too_large_is_not_believed_for_long()
    {
        let mut h = Health::default();
        h.on_accepted(T0);
        for _ in 0..Health::MAX_REFUSALS {
            assert!(h.believes_refusal() && h.believes_too_large());
            h.on_refused();
            h.on_too_large();
        }
        assert!(!h.believes_refusal() && !h.believes_too_large());
        h.on_accepted(T0);
        assert!(h.believes_refusal() && h.believes_too_large(), "it accepted something");
    }

    #[test]
    fn what_was_accepted_since_a_failure_is_known_after_the_first_acceptance_only() {
        let later = T0 + std::time::Duration::from_secs(1);
        let mut h = Health::default();
        assert!(!h.accepted_since(Some(T0)) && !h.accepted_since(None));
        h.on_accepted(later);
        assert!(
            h.accepted_since(Some(T0)) && !h.accepted_since(Some(later)) && !h.accepted_since(None)
        );
    }
}

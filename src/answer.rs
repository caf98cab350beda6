//! What a receiver's answer means for the batch.

/// Which statuses mean that the batch was accepted.
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

/// What a status asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    Accepted,
    /// The same batch again later.
    Later,
    /// 410: the endpoint is gone and wants nothing more (RFC 9110, section 15.5.11).
    Gone,
    /// 413: less at once (RFC 9110, section 15.5.14).
    TooLarge,
    /// 400 or 422: the receiver cannot take what is in the batch, or says so of everything.
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

/// Whether a refusal is about the batch or about everything: only a healthy endpoint's word is taken for it.
///
/// Healthy is one that has accepted something since it last failed in another way; after a start nobody knows.
#[derive(Debug, Default)]
pub struct Health {
    healthy: bool,
    /// Since it last accepted something.
    refusals: u32,
}

impl Health {
    /// An endpoint that was healthy and now refuses everything is found out by this many refusals in a
    /// row: fewer would stop at a batch with as many bad events in places apart, more would condemn more
    /// events that are good.
    pub const MAX_REFUSALS: u32 = 64;

    pub fn on_accepted(&mut self) {
        *self = Self { healthy: true, refusals: 0 };
    }

    /// An attempt failed in any way but a refusal.
    pub fn on_failed(&mut self) {
        self.healthy = false;
    }

    /// Returns whether the refusal is to be believed.
    pub fn on_refused(&mut self) -> bool {
        self.refusals = self.refusals.saturating_add(1);
        self.healthy && self.refusals <= Self::MAX_REFUSALS
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
            assert_eq!((Answer::of(status, Success::Any2xx), Answer::of(status, Success::Only200)), (any, only), "{status}");
        }
    }

    #[test]
    fn a_refusal_is_believed_of_who_accepted_something_since_it_last_failed() {
        let mut h = Health::default();
        assert!(!h.on_refused(), "nothing is known after a start");
        h.on_accepted();
        assert!(h.on_refused() && h.on_refused());
        h.on_failed();
        assert!(!h.on_refused());
        h.on_accepted();
        assert!(h.on_refused());
    }

    #[test]
    fn who_refuses_everything_is_not_believed_for_long() {
        let mut h = Health::default();
        h.on_accepted();
        let believed = (0..1000).filter(|_| h.on_refused()).count();
        assert_eq!(believed, Health::MAX_REFUSALS as usize);
        h.on_accepted();
        assert!(h.on_refused(), "until it accepts something");
    }
}

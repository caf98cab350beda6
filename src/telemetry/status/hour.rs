//! The last hour of a lane, by the minute.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

const MINUTES: usize = 60;
const MINUTE: Duration = Duration::from_secs(60);

/// Events by the minute, the oldest minute first; a part of them before the daemon started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LastHour {
    pub delivered: [u64; MINUTES],
    /// The events of failed attempts, as often as they failed.
    pub failed: [u64; MINUTES],
}

impl Default for LastHour {
    fn default() -> Self {
        Self { delivered: [0; MINUTES], failed: [0; MINUTES] }
    }
}

/// What a lane has done in each minute in which it did something.
#[derive(Debug, Default)]
pub(super) struct Minutes(VecDeque<Minute>);

#[derive(Debug)]
struct Minute {
    from: Instant,
    delivered: u64,
    failed: u64,
}

impl Minutes {
    pub(super) fn delivered(&mut self, events: u64, now: Instant) {
        self.now(now).delivered += events;
    }

    pub(super) fn failed(&mut self, events: u64, now: Instant) {
        self.now(now).failed += events;
    }

    fn now(&mut self, now: Instant) -> &mut Minute {
        let is_over = |m: &Minute| now.saturating_duration_since(m.from) >= MINUTE;
        if self.0.back().is_none_or(is_over) {
            if self.0.len() == MINUTES {
                self.0.pop_front();
            }
            self.0.push_back(Minute { from: now, delivered: 0, failed: 0 });
        }
        self.0.back_mut().expect("it was added")
    }

    pub(super) fn last_hour(&self, now: Instant) -> LastHour {
        let mut hour = LastHour::default();
        for minute in &self.0 {
            let ago = now.saturating_duration_since(minute.from).as_secs() / MINUTE.as_secs();
            let at = usize::try_from(ago).ok().and_then(|ago| (MINUTES - 1).checked_sub(ago));
            if let Some(at) = at {
                hour.delivered[at] += minute.delivered;
                hour.failed[at] += minute.failed;
            }
        }
        hour
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock;

    #[test]
    fn an_hour_has_its_last_sixty_minutes_and_no_more() {
        let start = clock::instant();
        let after = |seconds: u64| start + Duration::from_secs(seconds);
        let mut minutes = Minutes::default();
        for second in 0..7200 {
            minutes.delivered(1, after(second));
            if second % 60 == 0 {
                minutes.failed(2, after(second));
            }
        }
        let hour = minutes.last_hour(after(7199));
        assert_eq!((hour.delivered, hour.failed), ([60; MINUTES], [2; MINUTES]));
        assert_eq!(minutes.0.len(), MINUTES);
        let later = minutes.last_hour(after(7199 + 59 * 60));
        assert_eq!(later.delivered.iter().sum::<u64>(), 60);
        assert_eq!((later.delivered[0], later.failed[0]), (60, 2));
        assert_eq!(minutes.last_hour(after(7200 + 3600)), LastHour::default());
    }
}

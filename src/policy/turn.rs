//! Who gets a free request slot of a subscriber: a first attempt, or the next retry.
//!
//! Retries that always fail must not keep first attempts away: a batch that hangs until its timeout
//! occupies a slot for that time, and a batch that the receiver can never accept says nothing of
//! the others.

use std::time::{Duration, Instant};

/// The longest that a probe waits for its preferred kind of batch before it takes the other.
pub const PROBE_WAIT: Duration = Duration::from_secs(1);

/// The kind of an attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turn {
    /// Events of the main queue, never attempted before.
    First,
    /// A batch that failed before, a part of one, or one that an operator replayed.
    Retry,
}

/// The requests that may be in flight now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Slots {
    Flow(usize),
    /// One, to learn whether the endpoint works.
    Probe,
}

/// The batches that wait for an attempt.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Waiting {
    /// When the front batch of new events is due; `None` without new events.
    pub first_due: Option<Instant>,
    pub retries: bool,
}

impl Waiting {
    fn first_is_ready(self, now: Instant) -> bool {
        self.first_due.is_some_and(|due| due <= now)
    }
}

/// Shares the slots of one session between first attempts and retries.
///
/// With a closed circuit, first attempts get at least half of the slot time as long as any waits.
/// Retries owe what they take beyond that, and none starts before the debt is paid. A probe is a
/// first attempt where there is one within [`PROBE_WAIT`]: a batch that has failed before may fail
/// for a reason of its own.
#[derive(Debug, Default)]
pub struct Turns {
    firsts: u32,
    retries: u32,
    /// The slot time that retries took more than first attempts, since a first attempt began to wait.
    owed: Duration,
    counted_to: Option<Instant>,
    probe: Option<Probe>,
}

#[derive(Debug, Clone, Copy)]
struct Probe {
    since: Instant,
    prefers: Turn,
}

impl Turns {
    /// The attempt to start now, if any; call [`begun`](Self::begun) once it is started.
    pub fn choose(&mut self, slots: Slots, waiting: Waiting, now: Instant) -> Option<Turn> {
        self.count(now);
        let running = (self.firsts + self.retries) as usize;
        match slots {
            Slots::Flow(slots) => {
                self.probe = None;
                if running >= slots { None } else { self.in_flow(slots, waiting, now) }
            }
            Slots::Probe => {
                let probe = *self.probe.get_or_insert(Probe { since: now, prefers: Turn::First });
                if running > 0 { None } else { probe.choose(waiting, now) }
            }
        }
    }

    fn in_flow(&mut self, slots: usize, waiting: Waiting, now: Instant) -> Option<Turn> {
        if !waiting.first_is_ready(now) {
            self.owed = Duration::ZERO;
            return waiting.retries.then_some(Turn::Retry);
        }
        // Half of the slots at once, or the only one.
        let has_room = (self.retries as usize + 1) * 2 <= slots.max(2);
        if waiting.retries && self.owed.is_zero() && has_room {
            Some(Turn::Retry)
        } else {
            Some(Turn::First)
        }
    }

    /// The next time at which an attempt may start by time alone; `None`: not before something
    /// happens.
    pub fn wakes_at(&self, slots: Slots, waiting: Waiting, now: Instant) -> Option<Instant> {
        let running = (self.firsts + self.retries) as usize;
        match (slots, self.probe) {
            (Slots::Flow(slots), _) => waiting.first_due.filter(|_| running < slots),
            (Slots::Probe, Some(probe)) if running == 0 => probe.wakes_at(waiting, now),
            (Slots::Probe, _) => None,
        }
    }

    pub fn begun(&mut self, turn: Turn, now: Instant) {
        self.count(now);
        *self.running(turn) += 1;
    }

    pub fn ended(&mut self, turn: Turn, now: Instant) {
        self.count(now);
        let running = self.running(turn);
        *running = running.saturating_sub(1);
    }

    /// A probe found the endpoint alive, and its batch too large or wrong in a part. A part is a
    /// better next probe than another whole batch, which would be split as well.
    pub fn probe_was_split(&mut self, now: Instant) {
        self.probe = Some(Probe { since: now, prefers: Turn::Retry });
    }

    fn running(&mut self, turn: Turn) -> &mut u32 {
        match turn {
            Turn::First => &mut self.firsts,
            Turn::Retry => &mut self.retries,
        }
    }

    fn count(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(*self.counted_to.get_or_insert(now));
        self.counted_to = Some(now);
        self.owed = self
            .owed
            .saturating_add(passed.saturating_mul(self.retries))
            .saturating_sub(passed.saturating_mul(self.firsts));
    }
}

impl Probe {
    fn choose(self, waiting: Waiting, now: Instant) -> Option<Turn> {
        let patient = now < self.since + PROBE_WAIT;
        let first = waiting.first_is_ready(now).then_some(Turn::First);
        let retry = waiting.retries.then_some(Turn::Retry);
        match self.prefers {
            // Events that wait for others are a first attempt soon.
            Turn::First if patient || waiting.first_due.is_some() => first,
            Turn::First => retry,
            Turn::Retry if patient => retry,
            Turn::Retry => retry.or(first),
        }
    }

    fn wakes_at(self, waiting: Waiting, now: Instant) -> Option<Instant> {
        let gives_up_at = Some(self.since + PROBE_WAIT).filter(|at| now < *at);
        match self.prefers {
            Turn::First => waiting.first_due.or(gives_up_at.filter(|_| waiting.retries)),
            Turn::Retry => gives_up_at.or(waiting.first_due),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    fn waiting(first: bool, retries: bool, now: Instant) -> Waiting {
        Waiting { first_due: first.then_some(now), retries }
    }

    #[test]
    fn a_retry_begins_only_after_first_attempts_have_had_the_time_that_the_last_one_took() {
        let (mut t, mut turns) = (crate::clock::instant(), Turns::default());
        let both = |t| waiting(true, true, t);
        assert_eq!(turns.choose(Slots::Flow(1), both(t), t), Some(Turn::Retry), "nothing is owed");
        turns.begun(Turn::Retry, t);
        assert_eq!(turns.choose(Slots::Flow(1), both(t), t), None, "no slot is free");
        t += ms(30_000);
        turns.ended(Turn::Retry, t);
        for _ in 0..30 {
            assert_eq!(turns.choose(Slots::Flow(1), both(t), t), Some(Turn::First));
            turns.begun(Turn::First, t);
            t += ms(1000);
            turns.ended(Turn::First, t);
        }
        assert_eq!(turns.choose(Slots::Flow(1), both(t), t), Some(Turn::Retry));
        turns.begun(Turn::Retry, t);
        t += ms(30_000);
        turns.ended(Turn::Retry, t);
        assert_eq!(
            turns.choose(Slots::Flow(1), waiting(false, true, t), t),
            Some(Turn::Retry),
            "no first attempt waits"
        );
        assert_eq!(
            turns.choose(Slots::Flow(1), both(t), t),
            Some(Turn::Retry),
            "and what was owed to those before is forgotten"
        );
    }

    #[test]
    fn a_probe_waits_a_moment_for_new_events_and_then_takes_a_retry() {
        let (t, mut turns) = (crate::clock::instant(), Turns::default());
        let retries = waiting(false, true, t);
        assert_eq!(turns.choose(Slots::Probe, retries, t), None);
        assert_eq!(turns.wakes_at(Slots::Probe, retries, t), Some(t + PROBE_WAIT));
        let gathering = Waiting { first_due: Some(t + ms(5000)), retries: true };
        assert_eq!(
            turns.choose(Slots::Probe, gathering, t + ms(2000)),
            None,
            "they are a batch soon"
        );
        assert_eq!(turns.wakes_at(Slots::Probe, gathering, t + ms(2000)), Some(t + ms(5000)));
        assert_eq!(turns.choose(Slots::Probe, gathering, t + ms(5000)), Some(Turn::First));
        assert_eq!(turns.choose(Slots::Probe, retries, t + PROBE_WAIT), Some(Turn::Retry));
        turns.begun(Turn::Retry, t + PROBE_WAIT);
        assert_eq!(
            turns.choose(Slots::Probe, waiting(true, true, t), t + PROBE_WAIT),
            None,
            "one at a time"
        );
        assert_eq!(turns.wakes_at(Slots::Probe, gathering, t + PROBE_WAIT), None);
    }

    #[test]
    fn after_a_probe_that_was_split_its_parts_come_first() {
        let (t, mut turns) = (crate::clock::instant(), Turns::default());
        turns.probe_was_split(t);
        let fresh = waiting(true, false, t);
        assert_eq!(turns.choose(Slots::Probe, fresh, t), None, "its parts are on their way");
        assert_eq!(
            turns.wakes_at(Slots::Probe, fresh, t),
            Some(t + PROBE_WAIT),
            "and not the time that has come"
        );
        assert_eq!(turns.choose(Slots::Probe, waiting(true, true, t), t), Some(Turn::Retry));
        assert_eq!(
            turns.choose(Slots::Probe, fresh, t + PROBE_WAIT),
            Some(Turn::First),
            "another daemon has them"
        );
    }

    proptest! {
        /// With any number of retries waiting, and however long they take.
        #[test]
        fn first_attempts_that_wait_have_half_of_the_slot_time(
            slots in 1_usize..9,
            took in proptest::collection::vec((1_u64..30_000, 1_u64..30_000), 50..400),
        ) {
            let (start, mut turns) = (crate::clock::instant(), Turns::default());
            let (mut t, mut busy, mut shares) = (start, Vec::<(Instant, Turn)>::new(), [0_u64; 2]);
            for (first, retry) in took {
                while let Some(turn) = turns.choose(Slots::Flow(slots), waiting(true, true, t), t) {
                    turns.begun(turn, t);
                    let took = if turn == Turn::First { first } else { retry };
                    shares[turn as usize] += took;
                    busy.push((t + ms(took), turn));
                }
                prop_assert_eq!(busy.len(), slots, "no slot is left free");
                let next = (0..busy.len()).min_by_key(|n| busy[*n].0).expect("one is busy");
                let (at, turn) = busy.swap_remove(next);
                t = at;
                turns.ended(turn, t);
            }
            // Those that are under way at the end have not been made good yet.
            let slack = 30_000 * slots as u64;
            prop_assert!(shares[0] + slack >= shares[1], "{:?}", shares);
            prop_assert!(shares[1] > 0, "retries are not starved either");
        }
    }
}

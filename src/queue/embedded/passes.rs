//! Which part of the log is read next for the lanes that are behind the ring.
//!
//! A pass begins where the lane is that is furthest behind and has room, and takes along each lane
//! that it comes to: the log is read once for all that are at one place, however many they are.
//! Groups of lanes that are far apart take turns.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use super::segments::Segments;

/// Events between two lanes that are in one group at most.
const APART: i64 = 1_000_000;

/// Time after which the next group has its turn.
const TURN: Duration = Duration::from_secs(1);

/// A part of the log that is read for some lanes.
#[derive(Debug)]
pub(super) struct Pass {
    pub(super) after: i64,
    pub(super) segments: Arc<Segments>,
    /// By the subscribers' indexes in `segments`: whether it is read for its lane.
    pub(super) lanes: Vec<bool>,
}

impl Pass {
    pub(super) fn is_for(&self, owners: &[u32]) -> bool {
        owners.iter().any(|owner| self.lanes.get(*owner as usize).is_some_and(|is| *is))
    }
}

#[derive(Debug, Default)]
pub(super) struct Passes {
    /// Where the group began that has its turn.
    begun: i64,
    /// The end of the turn.
    until: Option<Instant>,
    /// The last choice.
    last: i64,
}

impl Passes {
    /// The number after which to read, of those after which lanes wait.
    pub(super) fn choose(&mut self, mut places: Vec<i64>, now: Instant) -> Option<i64> {
        places.sort_unstable();
        let oldest = *places.first()?;
        if self.until.is_some_and(|until| now < until)
            && let Some(next) = places.iter().find(|place| **place >= self.begun)
        {
            self.last = *next;
            return Some(*next);
        }
        let is_other = |pair: &&[i64]| pair[1] - pair[0] > APART && pair[1] - self.last > APART;
        let other = self.until.and_then(|_| places.windows(2).find(is_other)).map(|pair| pair[1]);
        (self.begun, self.until) = (other.unwrap_or(oldest), Some(now + TURN));
        self.last = self.begun;
        Some(self.begun)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock;

    #[test]
    fn who_is_furthest_behind_is_served_first_and_groups_that_are_far_apart_take_turns() {
        let start = clock::instant();
        let at = |millis| start + Duration::from_millis(millis);
        let mut passes = Passes::default();
        assert_eq!(passes.choose(Vec::new(), at(0)), None);
        // Two groups: of 500 and 900, and of 3,000,000.
        assert_eq!(passes.choose(vec![3_000_000, 900, 500], at(0)), Some(500));
        assert_eq!(passes.choose(vec![3_000_000, 900, 1500], at(400)), Some(900));
        assert_eq!(passes.choose(vec![3_000_000, 1900, 1500], at(999)), Some(1500));
        // The first group has moved, and its turn is over.
        assert_eq!(passes.choose(vec![3_000_000, 2500, 2500], at(1000)), Some(3_000_000));
        assert_eq!(passes.choose(vec![3_001_000, 2500], at(1500)), Some(3_001_000));
        // Nobody of the group has room: no turn is waited for.
        assert_eq!(passes.choose(vec![2500], at(1600)), Some(2500));
        assert_eq!(passes.choose(vec![3_001_000, 3500], at(1700)), Some(3500));
        // Who alone is left has each turn.
        for n in 0..5 {
            assert_eq!(
                passes.choose(vec![4500 + n], at(3000 + 1000 * n.unsigned_abs())),
                Some(4500 + n)
            );
        }
    }

    #[test]
    fn a_lane_that_comes_back_further_behind_is_served_in_its_turn() {
        let start = clock::instant();
        let mut passes = Passes::default();
        assert_eq!(passes.choose(vec![700_000], start), Some(700_000));
        // It began where the turn did; another one is before that.
        assert_eq!(passes.choose(vec![701_000, 100], start), Some(701_000));
        assert_eq!(passes.choose(vec![702_000, 100], start + TURN), Some(100));
    }
}

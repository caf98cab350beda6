//! The retries that a lane has scheduled and not taken again, with the earliest of their times.

use std::{
    collections::{BTreeMap, HashMap},
    hash::{DefaultHasher, Hash as _, Hasher as _},
    time::{Duration, SystemTime},
};

use crate::delivery::BatchId;

/// Retries of a subscriber that are remembered; further ones are not counted.
const MAX_SCHEDULED: usize = 10_000;

/// The time after which a due retry that was not taken counts as taken by another daemon.
const MISSED: Duration = Duration::from_secs(15 * 60);

/// Retries that were not taken again.
#[derive(Debug, Default)]
pub(super) struct Scheduled {
    /// When each is due, and when its first event had arrived; by a hash of the batch's id.
    batches: HashMap<u64, (SystemTime, SystemTime)>,
    dues: Times,
    arrivals: Times,
}

impl Scheduled {
    fn key(id: &BatchId) -> u64 {
        let mut hasher = DefaultHasher::new();
        id.as_str().hash(&mut hasher);
        hasher.finish()
    }

    pub(super) fn insert(&mut self, id: &BatchId, due: SystemTime, arrived: SystemTime) {
        if self.batches.len() >= MAX_SCHEDULED {
            return;
        }
        let key = Self::key(id);
        self.remove_key(key);
        self.batches.insert(key, (due, arrived));
        self.dues.add(due);
        self.arrivals.add(arrived);
    }

    pub(super) fn remove(&mut self, id: &BatchId) {
        self.remove_key(Self::key(id));
    }

    fn remove_key(&mut self, key: u64) {
        if let Some((due, arrived)) = self.batches.remove(&key) {
            self.dues.remove(due);
            self.arrivals.remove(arrived);
        }
    }

    /// Forgets the retries that another daemon took.
    pub(super) fn forget_missed(&mut self, now: SystemTime) {
        let is_missed = |due: SystemTime| due + MISSED <= now;
        if !self.dues.first().is_some_and(is_missed) {
            return;
        }
        let missed: Vec<u64> = self
            .batches
            .iter()
            .filter(|(_, (due, _))| is_missed(*due))
            .map(|(key, _)| *key)
            .collect();
        for key in missed {
            self.remove_key(key);
        }
    }

    pub(super) fn len(&self) -> usize {
        self.batches.len()
    }

    pub(super) fn not_due(&self, now: SystemTime) -> usize {
        self.batches.values().filter(|(due, _)| *due > now).count()
    }

    pub(super) fn next_due(&self) -> Option<SystemTime> {
        self.dues.first()
    }

    /// When the oldest event of a retry had arrived.
    pub(super) fn oldest_arrival(&self) -> Option<SystemTime> {
        self.arrivals.first()
    }
}

/// A multiset of points in time, with its first at hand.
#[derive(Debug, Default)]
struct Times(BTreeMap<SystemTime, u32>);

impl Times {
    fn add(&mut self, at: SystemTime) {
        *self.0.entry(at).or_default() += 1;
    }

    fn remove(&mut self, at: SystemTime) {
        if let Some(n) = self.0.get_mut(&at) {
            *n -= 1;
            if *n == 0 {
                self.0.remove(&at);
            }
        }
    }

    fn first(&self) -> Option<SystemTime> {
        self.0.keys().next().copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock;

    #[test]
    fn a_retry_counts_until_it_is_taken_again_or_missed() {
        let now = clock::now();
        let secs = Duration::from_secs;
        let (a, b) = (BatchId::from("msg_a"), BatchId::from("msg_b"));
        let mut scheduled = Scheduled::default();
        scheduled.insert(&a, now + secs(60), now - secs(30));
        scheduled.insert(&a, now + secs(60), now - secs(30));
        scheduled.insert(&b, now + secs(30), now - secs(20));
        assert_eq!(
            (scheduled.len(), scheduled.not_due(now), scheduled.not_due(now + secs(30))),
            (2, 2, 1)
        );
        assert_eq!(scheduled.next_due(), Some(now + secs(30)));
        assert_eq!(scheduled.oldest_arrival(), Some(now - secs(30)));
        scheduled.remove(&a);
        assert_eq!((scheduled.len(), scheduled.oldest_arrival()), (1, Some(now - secs(20))));
        scheduled.forget_missed(now + secs(30) + MISSED - secs(1));
        assert_eq!(scheduled.len(), 1, "it may still be taken");
        scheduled.forget_missed(now + secs(30) + MISSED);
        assert_eq!((scheduled.len(), scheduled.next_due()), (0, None));
    }

    #[test]
    fn beyond_a_limit_retries_are_not_counted() {
        let mut scheduled = Scheduled::default();
        for n in 0..=MAX_SCHEDULED {
            scheduled.insert(&BatchId::from(n.to_string()), clock::now(), clock::now());
        }
        assert_eq!(scheduled.len(), MAX_SCHEDULED);
    }
}

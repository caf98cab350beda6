//! The events of one POST: as many as wait, up to a number, a size and a time.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use crate::event::payload::Format;

/// The limits of a batch, from `[batch]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BatchPolicy {
    /// The most events in a batch, at least 1.
    pub max_events: usize,
    /// The most bytes of a request body.
    pub max_bytes: usize,
    /// The longest that an event waits for others.
    pub max_wait: Duration,
}

impl BatchPolicy {
    /// The largest `max_events`: a consumer's prefetch is a 16-bit number and must allow a batch.
    pub const MAX_EVENTS: i64 = 65_535;
    /// The smallest `max_bytes`: less holds no event at all.
    pub const MIN_BYTES: u64 = 64;
    /// The largest `max_bytes`: RabbitMQ 4 takes messages of at most 16 MiB, and a failed batch
    /// becomes one.
    pub const MAX_BYTES: u64 = 12 * 1024 * 1024;
}

/// Collects items in order of arrival and cuts them into batches.
#[derive(Debug)]
pub struct Batcher<T> {
    policy: BatchPolicy,
    /// The most events and bytes of a batch now, within the policy.
    limits: (usize, usize),
    format: Format,
    waiting: VecDeque<(T, usize, Instant)>,
    /// The number of `waiting` items in the front batch, and their bytes.
    front: (usize, usize),
    /// Whether the next item would not fit into the front batch.
    front_is_full: bool,
    /// No item can arrive before a batch is cut.
    alone: bool,
}

impl<T> Batcher<T> {
    pub fn new(policy: BatchPolicy, format: Format) -> Self {
        let limits = (policy.max_events, policy.max_bytes);
        Self {
            policy,
            limits,
            format,
            waiting: VecDeque::new(),
            front: (0, 0),
            front_is_full: false,
            alone: false,
        }
    }

    /// Limits batches to these events and bytes, where the policy allows more. A larger event that
    /// [`fits`](Self::fits) is a batch of its own.
    pub fn limit(&mut self, max_events: usize, max_bytes: usize) {
        let limits =
            (max_events.clamp(1, self.policy.max_events), max_bytes.min(self.policy.max_bytes));
        if limits != self.limits {
            self.limits = limits;
            self.find_front();
        }
    }

    /// Says whether more items can arrive before a batch is cut; if not, none waits for others.
    pub fn expects_more(&mut self, expects: bool) {
        self.alone = !expects;
    }

    /// Whether an event of this many bytes fits into a request body at all.
    pub fn fits(&self, bytes: usize) -> bool {
        self.format.body_len(1, bytes) <= self.policy.max_bytes
    }

    /// Adds an item that [`fits`](Self::fits).
    pub fn push(&mut self, item: T, bytes: usize, now: Instant) {
        self.waiting.push_back((item, bytes, now));
        self.extend_front(bytes);
    }

    /// The number of items that wait.
    pub fn len(&self) -> usize {
        self.waiting.len()
    }

    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// The number of items of the front batch.
    pub const fn front_len(&self) -> usize {
        self.front.0
    }

    /// Whether the next item would not fit into the front batch.
    pub const fn front_is_full(&self) -> bool {
        self.front_is_full
    }

    /// The oldest item that waits.
    pub fn front(&self) -> Option<&T> {
        self.waiting.front().map(|(item, ..)| item)
    }

    /// When the front batch is due even if it stays small; `None` if nothing waits.
    pub fn due(&self) -> Option<Instant> {
        let wait = if self.alone { Duration::ZERO } else { self.policy.max_wait };
        self.waiting.front().map(|(_, _, arrived)| *arrived + wait)
    }

    /// Whether a batch may be cut: it is full, or its oldest event has waited long enough.
    pub fn ready(&self, now: Instant) -> bool {
        self.front_is_full || self.due().is_some_and(|due| due <= now)
    }

    /// The front batch and the sum of its events' bytes, whether it is ready or not.
    pub fn cut(&mut self) -> (Vec<T>, usize) {
        let (events, bytes) = self.front;
        let batch = self.waiting.drain(..events).map(|(item, _, _)| item).collect();
        if self.waiting.is_empty() {
            // With thousands of subscribers the room of the largest batches would be most of the
            // memory.
            self.waiting = VecDeque::new();
        }
        self.find_front();
        (batch, bytes)
    }

    fn find_front(&mut self) {
        self.front = (0, 0);
        self.front_is_full = false;
        for n in 0..self.waiting.len() {
            if self.front_is_full {
                break;
            }
            self.extend_front(self.waiting[n].1);
        }
    }

    fn extend_front(&mut self, bytes: usize) {
        if self.front_is_full {
            return;
        }
        let (events, sum) = (self.front.0 + 1, self.front.1 + bytes);
        let fits = self.format.body_len(events, sum) <= self.limits.1;
        // The first item always belongs to the front: nothing may be stuck.
        if fits || self.front.0 == 0 {
            self.front = (events, sum);
        }
        self.front_is_full = !fits || events >= self.limits.0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn batcher(max_events: usize, max_bytes: usize, wait_ms: u64) -> Batcher<usize> {
        Batcher::new(
            BatchPolicy { max_events, max_bytes, max_wait: Duration::from_millis(wait_ms) },
            Format::Json,
        )
    }

    #[test]
    fn a_batch_waits_for_no_company_that_cannot_come() {
        let (mut b, t0) = (batcher(3, 1000, 100), crate::clock::instant());
        b.push(1, 1, t0);
        assert!(!b.ready(t0));
        b.expects_more(false);
        assert!(b.ready(t0) && b.due() == Some(t0));
        b.expects_more(true);
        assert!(!b.ready(t0));
    }

    #[test]
    fn a_batch_is_ready_when_it_is_full_or_its_oldest_event_waited_long_enough() {
        let t = crate::clock::instant();
        let mut b = batcher(3, 1000, 50);
        assert_eq!((b.ready(t), b.due()), (false, None));
        b.push(0, 10, t);
        b.push(1, 10, t + Duration::from_millis(40));
        assert!(!b.ready(t + Duration::from_millis(49)));
        assert!(b.ready(t + Duration::from_millis(50)), "the oldest event has waited max_wait");
        b.push(2, 10, t + Duration::from_millis(41));
        assert!(b.ready(t + Duration::from_millis(41)), "three events are a full batch");
        assert_eq!(b.cut(), (vec![0, 1, 2], 30));
        assert_eq!(b.due(), None, "nothing waits");
    }

    #[test]
    fn an_event_that_would_pass_max_bytes_closes_the_batch_before_it() {
        let t = crate::clock::instant();
        let mut b = batcher(100, 33, 60_000); // 13 bytes of frame, so 20 for events and commas
        b.push(0, 10, t);
        assert!(!b.ready(t));
        b.push(1, 10, t); // 10 + 10 + a comma = 21
        assert!(b.ready(t));
        assert_eq!(b.cut(), (vec![0], 10));
        assert!(!b.ready(t));
        assert!(b.fits(20) && !b.fits(21));
    }

    #[test]
    fn a_limit_within_the_policy_holds_for_what_waits_already_and_can_be_lifted() {
        let t = crate::clock::instant();
        let mut b = batcher(4, 1000, 60_000);
        (0..3).for_each(|n| b.push(n, 10, t));
        assert!(!b.ready(t));
        b.limit(1, 1000);
        assert!(b.ready(t));
        assert_eq!(b.cut(), (vec![0], 10));
        b.limit(9, 34); // 13 bytes of frame, so two of 10 and a comma
        assert!(!b.ready(t));
        b.push(3, 10, t);
        assert_eq!(b.cut(), (vec![1, 2], 20));
        b.push(4, 500, t);
        assert!(b.fits(500) && b.ready(t));
        assert_eq!(
            (b.cut(), b.cut()),
            ((vec![3], 10), (vec![4], 500)),
            "what fits by the policy goes alone"
        );
        b.limit(9, 9999);
        (5..8).for_each(|n| b.push(n, 10, t));
        assert!(!b.ready(t));
        b.push(8, 10, t);
        assert_eq!(b.cut().0, [5, 6, 7, 8], "never more than the policy");
    }

    proptest! {
        #[test]
        fn batches_keep_the_order_and_the_limits(
            sizes in proptest::collection::vec(1_usize..40, 1..60),
            max_events in 1_usize..7,
            limits in proptest::collection::vec((0_usize..9, 0_usize..90), 60),
        ) {
            let t = crate::clock::instant();
            let mut b = batcher(max_events, 60, 0);
            let mut seen = Vec::new();
            for (n, size) in sizes.iter().enumerate() {
                b.push(n, *size, t);
                if n % 3 == 2 { b.limit(limits[n].0, limits[n].1); }
                if n % 5 == 4 { seen.push(b.cut()); }
            }
            while b.due().is_some() { seen.push(b.cut()); }
            for (batch, bytes) in &seen {
                prop_assert!(batch.len() <= max_events && !batch.is_empty());
                prop_assert_eq!(*bytes, batch.iter().map(|n| sizes[*n]).sum::<usize>());
                prop_assert!(Format::Json.body_len(batch.len(), *bytes) <= 60);
            }
            let order: Vec<usize> = seen.into_iter().flat_map(|(batch, _)| batch).collect();
            prop_assert_eq!(order, (0..sizes.len()).collect::<Vec<_>>());
        }
    }
}

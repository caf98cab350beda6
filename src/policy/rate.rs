//! The most requests, or events, that a subscriber is sent in a second.

use std::{
    fmt,
    time::{Duration, Instant},
};

/// The key `http.rate`: one bucket of each daemon, which fills at this rate up to what fits into a
/// second.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    pub of: RateOf,
    /// At least 1.
    pub amount: u32,
    pub per: Per,
}

/// What is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RateOf {
    Requests,
    Events,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Per {
    Second,
    Minute,
}

/// The largest amount.
pub const MAX_AMOUNT: u32 = 1_000_000;

/// The longest time that the events in a window wait for their rate: less than half of the 15
/// minutes after which RabbitMQ takes back what is not acked, since their attempts take time too.
const LONGEST_WAIT: Duration = Duration::from_secs(300);

impl Rate {
    /// Reads an amount and its time, such as `50/s` or `30/m`.
    pub fn parse(text: &str, of: RateOf) -> Option<Self> {
        let (amount, per) = text.split_once('/')?;
        let per = match per {
            "s" => Per::Second,
            "m" => Per::Minute,
            _ => return None,
        };
        let is_digits = !amount.is_empty() && amount.bytes().all(|b| b.is_ascii_digit());
        let amount = amount.parse().ok().filter(|n| is_digits && (1..=MAX_AMOUNT).contains(n))?;
        Some(Self { of, amount, per })
    }

    /// How many fit into this time.
    fn within(self, time: Duration) -> f64 {
        let seconds = match self.per {
            Per::Second => 1.0,
            Per::Minute => 60.0,
        };
        f64::from(self.amount) * time.as_secs_f64() / seconds
    }

    /// The time that this many take.
    pub fn time_of(self, amount: u64) -> Duration {
        let seconds = amount as f64 / self.within(Duration::from_secs(1));
        Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)
    }

    /// What can be sent at once after a pause: a second's worth, and at least one.
    fn burst(self) -> f64 {
        self.within(Duration::from_secs(1)).max(1.0)
    }

    /// The most events of a batch: one that is larger would wait for several seconds, and then be
    /// more than a second's worth.
    pub fn max_events(self) -> usize {
        match self.of {
            RateOf::Requests => usize::MAX,
            RateOf::Events => self.burst() as usize,
        }
    }

    /// The most events that may be taken from the queue, in batches of `max_events`: none waits for
    /// its turn so long that the broker would take it back.
    pub fn window(self, max_events: usize) -> usize {
        let fit = self.within(LONGEST_WAIT).max(1.0) as usize;
        match self.of {
            RateOf::Requests => fit.saturating_mul(max_events),
            RateOf::Events => fit,
        }
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let per = match self.per {
            Per::Second => "s",
            Per::Minute => "m",
        };
        write!(f, "{}/{per}", self.amount)
    }
}

/// What may be sent now.
#[derive(Debug)]
pub struct Bucket {
    rate: Rate,
    level: f64,
    filled_at: Instant,
}

impl Bucket {
    /// A full one.
    pub fn new(rate: Rate, now: Instant) -> Self {
        Self { rate, level: rate.burst(), filled_at: now }
    }

    pub const fn rate(&self) -> Rate {
        self.rate
    }

    /// When a request with this many events may begin, if not now.
    pub fn wait(&mut self, events: u64, now: Instant) -> Option<Instant> {
        self.fill(now);
        let needed = self.price(events);
        if self.level >= needed {
            return None;
        }
        let missing = needed - self.level;
        let seconds = missing / self.rate.within(Duration::from_secs(1));
        // Rounded up: at that time it is there.
        let wait = Duration::try_from_secs_f64(seconds).unwrap_or(LONGEST_WAIT);
        Some(now + wait + Duration::from_micros(1))
    }

    /// A request with this many events begins. One that was made before the rate was set may be larger
    /// than the bucket: it empties it, and owes nothing, or others would wait for too long.
    pub fn pay(&mut self, events: u64, now: Instant) {
        self.fill(now);
        self.level -= self.price(events);
    }

    fn price(&self, events: u64) -> f64 {
        match self.rate.of {
            RateOf::Requests => 1.0,
            RateOf::Events => (events as f64).min(self.rate.burst()),
        }
    }

    fn fill(&mut self, now: Instant) {
        let since = now.saturating_duration_since(self.filled_at);
        self.level = (self.level + self.rate.within(since)).min(self.rate.burst());
        self.filled_at = now;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_rate_is_an_amount_and_its_time() {
        for text in ["50/s", "1/m", "1000000/s"] {
            assert_eq!(Rate::parse(text, RateOf::Requests).expect("a rate").to_string(), text);
        }
        for text in
            ["", "50", "0/s", "1000001/s", "+5/s", "-1/s", "5 /s", "5/h", "5/s/s", "/s", "1.5/s"]
        {
            assert_eq!(Rate::parse(text, RateOf::Events), None, "{text}");
        }
    }

    #[test]
    fn a_second_is_sent_at_once_and_then_one_after_the_other() {
        let now = crate::clock::instant();
        let at = |millis| now + Duration::from_millis(millis);
        let mut bucket = Bucket::new(Rate::parse("10/s", RateOf::Requests).expect("a rate"), now);
        for _ in 0..10 {
            assert_eq!(bucket.wait(500, now), None);
            bucket.pay(500, now);
        }
        let next = bucket.wait(500, now).expect("it is empty");
        assert!(next >= at(100) && next < at(101));
        assert_eq!(bucket.wait(500, next), None);
        // A long pause is worth a second.
        for _ in 0..10 {
            assert_eq!(bucket.wait(1, at(60_000)), None);
            bucket.pay(1, at(60_000));
        }
        assert!(bucket.wait(1, at(60_000)).is_some());
    }

    #[test]
    fn what_is_larger_than_the_bucket_waits_until_it_is_full_and_empties_it() {
        let now = crate::clock::instant();
        let rate = Rate::parse("60/m", RateOf::Events).expect("a rate");
        assert_eq!((rate.max_events(), rate.window(500)), (1, 300));
        let mut bucket = Bucket::new(rate, now);
        assert_eq!(bucket.wait(5, now), None);
        bucket.pay(5, now);
        let next = bucket.wait(5, now).expect("it is empty") - now;
        assert!(next >= Duration::from_secs(1) && next < Duration::from_secs(2), "{next:?}");
        let slow = Rate::parse("1/m", RateOf::Requests).expect("a rate");
        assert_eq!((slow.max_events(), slow.window(500)), (usize::MAX, 5 * 500));
        assert_eq!(slow.time_of(5), Duration::from_secs(300));
    }

    proptest! {
        #[test]
        fn no_second_has_more_than_two_seconds_worth(
            amount in 1_u32..500, of_events in any::<bool>(), sizes in proptest::collection::vec(1_u64..40, 1..200)
        ) {
            let of = if of_events { RateOf::Events } else { RateOf::Requests };
            let rate = Rate { of, amount, per: Per::Second };
            let start = crate::clock::instant();
            let (mut bucket, mut now, mut sent) = (Bucket::new(rate, start), start, Vec::new());
            for size in sizes {
                let size = size.min(rate.max_events() as u64);
                if let Some(at) = bucket.wait(size, now) {
                    now = at;
                    prop_assert_eq!(bucket.wait(size, now), None, "it is there at that time");
                }
                bucket.pay(size, now);
                sent.push((now, if of_events { size } else { 1 }));
            }
            for (from, _) in &sent {
                let within = sent.iter().filter(|(at, _)| at >= from && *at < *from + Duration::from_secs(1));
                let sum: u64 = within.map(|(_, n)| n).sum();
                prop_assert!(sum <= 2 * u64::from(amount) + 1, "{} in a second of {}", sum, amount);
            }
        }
    }
}

//! The delay ladder: any delay up to 72 h, made of 19 queues with fixed times to live.
//!
//! Level n delays by 2^n seconds. A message's delay stands in its routing key, one word a bit, the
//! highest first, the subscriber last: at each level a topic exchange routes it through the level's
//! queue (bit 1) or past it (bit 0) to the next lower exchange. So a change of retry options
//! changes no topology, and no message waits behind another one with a longer delay.
//!
//! `hooktrail retry` takes a level's messages and requeues them: they keep their place and their
//! time (measured; `waiting.rs`).

use std::time::Duration;

pub(super) const LEVELS: u32 = 19;

/// The most levels that a message waits in; each costs the broker a confirmed republish.
const MAX_HOPS: u32 = 4;

/// The delay in the ladder, in whole seconds: at least `delay`, at most 1 s and 12.5 % more.
pub(super) fn seconds(delay: Duration) -> u32 {
    let whole = delay.as_secs() + u64::from(delay.subsec_nanos() > 0);
    let mut n = u32::try_from(whole).unwrap_or(u32::MAX).clamp(1, (1 << LEVELS) - 1);
    while n.count_ones() > MAX_HOPS {
        // Adding the lowest bit carries it upwards: the next number with fewer bits at the end.
        n += n & n.wrapping_neg();
    }
    n
}

/// The cost of a delay in the ladder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hold {
    /// From the confirmed publish until the message is in the retry queue, by the levels' times to
    /// live alone.
    pub delay: Duration,
    /// Levels that it waits in; each is a republish by the broker.
    pub hops: u32,
}

/// The path of a retry that is not due before `delay`.
pub fn hold(delay: Duration) -> Hold {
    if delay.is_zero() {
        return Hold { delay, hops: 0 };
    }
    let seconds = seconds(delay);
    Hold { delay: Duration::from_secs(seconds.into()), hops: seconds.count_ones() }
}

/// The highest level that the message passes, where it enters the ladder.
pub(super) fn entry_level(seconds: u32) -> u32 {
    seconds.ilog2()
}

/// The routing key of a delayed message.
pub(super) fn routing_key(seconds: u32, subscriber: &str) -> String {
    let bits = (0..LEVELS).rev().map(|level| if seconds >> level & 1 == 1 { "1." } else { "0." });
    bits.chain([subscriber]).collect()
}

/// The binding key at `level` for messages that wait there (`1`) or pass it (`0`).
pub(super) fn binding_key(level: u32, bit: char) -> String {
    format!("{}{bit}.#", "*.".repeat((LEVELS - 1 - level) as usize))
}

/// The subscriber that a routing key of the ladder names.
pub(super) fn subscriber_of(routing_key: &str) -> Option<&str> {
    let (bits, subscriber) = routing_key.rsplit_once('.')?;
    let is_ladder =
        bits.len() as u32 == 2 * LEVELS - 1 && bits.split('.').all(|b| b == "0" || b == "1");
    (is_ladder && !subscriber.is_empty()).then_some(subscriber)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::Pattern;
    use proptest::prelude::*;

    #[test]
    fn common_delays_are_exact() {
        for s in [1, 2, 3, 5, 15, 45, 60, 300, 600, 3600] {
            assert!(
                seconds(Duration::from_secs(s.into())) == s,
                "{s} became {}",
                seconds(Duration::from_secs(s.into()))
            );
        }
        assert_eq!(seconds(Duration::ZERO), 1);
        assert_eq!(seconds(Duration::from_millis(1001)), 2);
    }

    #[test]
    fn a_hold_waits_in_the_levels_of_its_bits() {
        for (ms, seconds, hops) in [
            (0, 0, 0),
            (1, 1, 1),
            (5000, 5, 2),
            (15_000, 15, 4),
            (31_000, 32, 1),
            (405_000, 408, 4),
        ] {
            let expected = Hold { delay: Duration::from_secs(seconds), hops };
            assert_eq!(hold(Duration::from_millis(ms)), expected, "{ms} ms");
        }
    }

    #[test]
    fn the_routing_key_leads_through_the_levels_of_its_bits() {
        let key = routing_key(0b101, "siem");
        assert_eq!(key, "0.".repeat(16) + "1.0.1.siem");
        assert_eq!(entry_level(0b101), 2);
        for level in 0..LEVELS {
            let bit = if level == 0 || level == 2 { ('1', '0') } else { ('0', '1') };
            assert!(
                Pattern::try_new(&binding_key(level, bit.0)).expect("a pattern").matches(&key),
                "level {level}"
            );
            assert!(
                !Pattern::try_new(&binding_key(level, bit.1)).expect("a pattern").matches(&key),
                "level {level}"
            );
        }
        assert_eq!(subscriber_of(&key), Some("siem"));
        for other in ["siem", "0.1.siem", "", "a.".repeat(19).as_str()] {
            assert_eq!(subscriber_of(other), None);
        }
    }

    proptest! {
        #[test]
        fn never_early_and_late_by_at_most_a_second_and_an_eighth(ms in 0_u64..=72 * 3_600_000) {
            let n = seconds(Duration::from_millis(ms));
            let (n, asked) = (f64::from(n), ms as f64 / 1000.0);
            prop_assert!(n >= asked);
            prop_assert!(n <= (asked + 1.0) * 1.125, "{} for {}", n, asked);
            prop_assert!((n as u32).count_ones() <= MAX_HOPS && (n as u32) < 1 << LEVELS);
        }
    }
}

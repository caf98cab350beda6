//! Time and random numbers. No other file reads a clock or draws a number: functions get both as
//! arguments.
#![allow(
    clippy::disallowed_methods,
    reason = "policies take `now` as an argument, and this is where it comes from"
)]

use std::time::{Duration, Instant, SystemTime};

/// The monotonic time, for intervals on this machine.
pub fn instant() -> Instant {
    Instant::now()
}

/// The time of day, for points in time that other machines see.
pub fn now() -> SystemTime {
    SystemTime::now()
}

/// Seconds since 1970-01-01T00:00:00Z; 0 before it.
pub fn unix_seconds(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// The last Unix millisecond that RFC 3339 can write: the end of the year 9999.
const LAST_MILLISECOND: Duration = Duration::from_millis(253_402_300_799_999);

/// The most that another machine's clock is believed to be ahead.
const AHEAD: Duration = Duration::from_secs(24 * 3600);

/// A point in time as RFC 3339, to the millisecond. A time before 1970 or after the year 9999 is
/// written as the nearest valid one: the library panics at those, and anyone may have sent the
/// time.
pub fn rfc3339(at: SystemTime) -> String {
    humantime::format_rfc3339_millis(writable(at)).to_string()
}

/// A point in time as RFC 3339, to the second; see [`rfc3339`].
pub fn rfc3339_seconds(at: SystemTime) -> String {
    humantime::format_rfc3339_seconds(writable(at)).to_string()
}

fn writable(at: SystemTime) -> SystemTime {
    at.clamp(SystemTime::UNIX_EPOCH, SystemTime::UNIX_EPOCH + LAST_MILLISECOND)
}

/// The point in time of another machine's timestamp, in Unix seconds. `None` for a timestamp that
/// cannot be meant: 0, which clients write that set no time; more than a day ahead of `now`, such
/// as one in milliseconds; beyond what a clock can hold.
pub fn sane(unix_seconds: u64, now: SystemTime) -> Option<SystemTime> {
    SystemTime::UNIX_EPOCH
        .checked_add(Duration::from_secs(unix_seconds))
        .filter(|at| is_sane(*at, now))
}

/// Filters a time as [`sane`] does.
pub fn is_sane(at: SystemTime, now: SystemTime) -> bool {
    at > SystemTime::UNIX_EPOCH && at <= now + AHEAD
}

/// A random number from `0.0..1.0`.
pub fn random() -> f64 {
    rand::random()
}

/// Bytes that nobody can guess: of a key, or of a nonce.
pub fn secret_bytes<const N: usize>() -> [u8; N] {
    rand::random()
}

/// A new id for an event without one: `evt_` and 32 hexadecimal digits.
pub fn event_id() -> String {
    format!("evt_{:032x}", rand::random::<u128>())
}

/// A new id for a store: `store_` and 32 hexadecimal digits.
pub fn store_id() -> String {
    format!("store_{:032x}", rand::random::<u128>())
}

/// A new id for a replay: `rpl_` and 32 hexadecimal digits.
pub fn replay_id() -> String {
    format!("rpl_{:032x}", rand::random::<u128>())
}

/// A new key for a request that may be sent again.
pub fn request_key() -> String {
    format!("req_{:032x}", rand::random::<u128>())
}

/// A new id for a session: 32 hexadecimal digits.
pub fn session_id() -> String {
    format!("{:032x}", rand::random::<u128>())
}

/// A new id with 128 random bits: `msg_` and 32 hexadecimal digits. It has no dot, which Standard
/// Webhooks uses as a separator.
pub fn batch_id() -> String {
    format!("msg_{:032x}", rand::random::<u128>())
}

/// A new trace with its first span, as the header `traceparent` has it (W3C Trace Context, level 1).
/// Sampled: whether it is kept is for those who collect it.
pub fn traceparent() -> String {
    // Zero is no id.
    let (trace, span) = (rand::random::<u128>().max(1), rand::random::<u64>().max(1));
    format!("00-{trace:032x}-{span:016x}-01")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_time_has_a_text() {
        let after = |seconds| {
            SystemTime::UNIX_EPOCH
                .checked_add(Duration::from_secs(seconds))
                .expect("there is such a time")
        };
        let before = SystemTime::UNIX_EPOCH - Duration::from_secs(1);
        for (at, text) in [
            (after(1_735_830_138), "2025-01-02T15:02:18.000Z"),
            (before, "1970-01-01T00:00:00.000Z"),
            (after(253_402_300_799), "9999-12-31T23:59:59.000Z"),
            (after(253_402_300_800), "9999-12-31T23:59:59.999Z"),
            (after(1_735_830_138_000), "9999-12-31T23:59:59.999Z"),
            (after(i64::MAX as u64), "9999-12-31T23:59:59.999Z"),
        ] {
            assert_eq!(rfc3339(at), text);
            assert_eq!(rfc3339_seconds(at), format!("{}Z", &text[..19]));
        }
    }

    #[test]
    fn a_time_that_cannot_be_meant_is_none() {
        let seconds = 1_735_830_138;
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        for meant in [1, seconds, seconds + 24 * 3600] {
            assert_eq!(sane(meant, now), Some(SystemTime::UNIX_EPOCH + Duration::from_secs(meant)));
        }
        for not_meant in [0, seconds + 24 * 3600 + 1, seconds * 1000, i64::MAX as u64, u64::MAX] {
            assert_eq!(sane(not_meant, now), None, "{not_meant}");
        }
    }
}

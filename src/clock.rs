//! The one place that asks what time it is and draws random numbers; everything else is told.
#![allow(
    clippy::disallowed_methods,
    reason = "policies take `now` as an argument, and this is where it comes from"
)]

use std::time::{Duration, Instant, SystemTime};

/// For intervals on this machine.
pub fn instant() -> Instant {
    Instant::now()
}

/// For points in time that other machines see.
pub fn now() -> SystemTime {
    SystemTime::now()
}

/// Seconds since 1970-01-01T00:00:00Z.
pub fn unix_seconds(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// The last millisecond that RFC 3339 has a text for: the end of the year 9999.
const LAST_MILLISECOND: Duration = Duration::from_millis(253_402_300_799_999);

/// No other clock is ahead by more.
const AHEAD: Duration = Duration::from_secs(24 * 3600);

/// A point in time as RFC 3339 writes it, to the millisecond. What is before 1970 or beyond the
/// year 9999 is written as the nearest time that can be: the library panics at those, and a time
/// can come from anybody.
pub fn rfc3339(at: SystemTime) -> String {
    humantime::format_rfc3339_millis(writable(at)).to_string()
}

/// As [`rfc3339`], to the second.
pub fn rfc3339_seconds(at: SystemTime) -> String {
    humantime::format_rfc3339_seconds(writable(at)).to_string()
}

fn writable(at: SystemTime) -> SystemTime {
    at.clamp(SystemTime::UNIX_EPOCH, SystemTime::UNIX_EPOCH + LAST_MILLISECOND)
}

/// A point in time that somebody else has written down, in Unix seconds. One that cannot be meant
/// is none: 0, as clients write it that set no time; one that is more than a day ahead of `now`,
/// such as one in milliseconds; one beyond every clock.
pub fn sane(unix_seconds: u64, now: SystemTime) -> Option<SystemTime> {
    SystemTime::UNIX_EPOCH
        .checked_add(Duration::from_secs(unix_seconds))
        .filter(|at| is_sane(*at, now))
}

/// As [`sane`] judges.
pub fn is_sane(at: SystemTime, now: SystemTime) -> bool {
    at > SystemTime::UNIX_EPOCH && at <= now + AHEAD
}

/// From `0.0..1.0`.
pub fn random() -> f64 {
    rand::random()
}

/// A new identifier of an event, for one that its producer gave none: `evt_` and 32 hexadecimal
/// digits.
pub fn event_id() -> String {
    format!("evt_{:032x}", rand::random::<u128>())
}

/// A new identifier with 128 random bits: `msg_` and 32 hexadecimal digits. It has no dot, which
/// Standard Webhooks uses as a separator.
pub fn batch_id() -> String {
    format!("msg_{:032x}", rand::random::<u128>())
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

//! The one place that asks what time it is and draws random numbers; everything else is told.
#![allow(clippy::disallowed_methods, reason = "policies take `now` as an argument, and this is where it comes from")]

use std::time::{Instant, SystemTime};

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

/// From `0.0..1.0`.
pub fn random() -> f64 {
    rand::random()
}

/// A new identifier of an event, for one that its producer gave none: `evt_` and 32 hexadecimal digits.
pub fn event_id() -> String {
    format!("evt_{:032x}", rand::random::<u128>())
}

/// A new identifier with 128 random bits: `msg_` and 32 hexadecimal digits. It has no dot, which
/// Standard Webhooks uses as a separator.
pub fn batch_id() -> String {
    format!("msg_{:032x}", rand::random::<u128>())
}

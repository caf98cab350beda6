//! Points in time as people write them.

use std::time::{Duration, SystemTime};

use jiff::{
    Timestamp, ZonedDateTime,
    civil::{Date, DateTime},
    tz::TimeZone,
};

use crate::{clock, wording::visible};

/// The zone of times: UTC, or that of this machine.
#[derive(Debug, Clone)]
pub struct Zone(TimeZone);

impl Zone {
    pub fn new(local: bool) -> Self {
        Self(if local { TimeZone::system() } else { TimeZone::UTC })
    }

    /// A point in time as RFC 3339 to the second, with its zone.
    pub fn show(&self, at: SystemTime) -> String {
        let Ok(at) = Timestamp::try_from(at) else { return clock::rfc3339_seconds(at) };
        let at = at.to_zoned_datetime(self.0.clone());
        if self.0 == TimeZone::UTC {
            at.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
        } else {
            at.strftime("%Y-%m-%dT%H:%M:%S%:z").to_string()
        }
    }

    /// Reads a time that a person wrote. Without a zone it is in this one.
    ///
    /// # Errors
    /// What it must be.
    pub fn read(&self, text: &str, now: SystemTime) -> Result<SystemTime, String> {
        let text = text.trim();
        let found = match text {
            "now" => Some(now),
            "today" => self.day(now, 0),
            "yesterday" => self.day(now, 1),
            _ => match text.strip_suffix(" UTC") {
                Some(text) => Self::new(false).civil(text),
                None => ago(text, now).or_else(|| absolute(text)).or_else(|| self.civil(text)),
            },
        };
        found.ok_or_else(|| {
            format!(
                "`{}` is not a time; write one such as 2026-01-31T12:00:00Z, 2026-01-31T12:00:00+02:00, \"2026-01-31 12:00\", \
                 2026-01-31, today, yesterday, or 2h for two hours ago",
                visible(text)
            )
        })
    }

    /// The begin of a day, so many days ago.
    fn day(&self, now: SystemTime, ago: i64) -> Option<SystemTime> {
        let now = Timestamp::try_from(now).ok()?.to_zoned_datetime(self.0.clone());
        let day = now.date().checked_sub(jiff::Span::new().days(ago)).ok()?;
        zoned(day.to_zoned_datetime(self.0.clone()))
    }

    /// A date, or a date and a time of day.
    fn civil(&self, text: &str) -> Option<SystemTime> {
        if let Ok(date) = Date::strptime("%Y-%m-%d", text) {
            return zoned(date.to_zoned_datetime(self.0.clone()));
        }
        let formats =
            ["%Y-%m-%d %H:%M", "%Y-%m-%dT%H:%M", "%Y-%m-%d %H:%M:%S", "%Y-%m-%dT%H:%M:%S"];
        let found = formats.iter().find_map(|format| DateTime::strptime(format, text).ok())?;
        zoned(found.to_zoned_datetime(self.0.clone()))
    }
}

fn zoned(at: Result<ZonedDateTime, jiff::Error>) -> Option<SystemTime> {
    at.ok().and_then(|at| at.timestamp().try_into().ok())
}

/// A time with its zone.
fn absolute(text: &str) -> Option<SystemTime> {
    let has_zone = text.ends_with(['Z', 'z']) || text.rfind(['+', '-']).is_some_and(|at| at > 10);
    let at: Timestamp = text.parse().ok().filter(|_| has_zone)?;
    at.try_into().ok()
}

/// A duration before now: `2h`, `-2h`, `2h ago`.
fn ago(text: &str, now: SystemTime) -> Option<SystemTime> {
    let text = text.strip_suffix(" ago").unwrap_or(text);
    let text = text.strip_prefix('-').unwrap_or(text);
    let duration: Duration = humantime::parse_duration(text).ok()?;
    now.checked_sub(duration).filter(|at| *at >= SystemTime::UNIX_EPOCH)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 2025-01-02T15:02:18Z.
    fn now() -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(1_735_830_138)
    }

    #[test]
    fn a_time_is_read_with_its_zone_as_a_date_or_as_a_time_ago() {
        let utc = Zone(TimeZone::UTC);
        let berlin = Zone(TimeZone::fixed(jiff::tz::offset(1)));
        for (text, expected) in [
            ("2025-01-02T15:02:18Z", "2025-01-02T15:02:18Z"),
            ("2025-01-02T15:02:18.5Z", "2025-01-02T15:02:18Z"),
            ("2025-01-02T15:02:18+02:00", "2025-01-02T13:02:18Z"),
            ("2025-01-02 15:02", "2025-01-02T15:02:00Z"),
            ("2025-01-02 15:02:07 UTC", "2025-01-02T15:02:07Z"),
            ("2025-01-02T15:02:03", "2025-01-02T15:02:03Z"),
            ("2025-01-02", "2025-01-02T00:00:00Z"),
            ("today", "2025-01-02T00:00:00Z"),
            ("yesterday", "2025-01-01T00:00:00Z"),
            ("now", "2025-01-02T15:02:18Z"),
            ("2h", "2025-01-02T13:02:18Z"),
            ("-2h", "2025-01-02T13:02:18Z"),
            ("1d 2h ago", "2025-01-01T13:02:18Z"),
        ] {
            let at = utc.read(text, now()).unwrap_or_else(|e| panic!("{e}"));
            assert_eq!(utc.show(at), expected, "{text}");
        }
        let at = berlin.read("2025-01-02 00:30", now()).expect("a time");
        assert_eq!(utc.show(at), "2025-01-01T23:30:00Z");
        assert_eq!(berlin.show(at), "2025-01-02T00:30:00+01:00");
        assert_eq!(berlin.read("2025-01-01 23:30 UTC", now()), Ok(at));
        for text in [
            "",
            "last tuesday",
            "12:00",
            "2025-13-01",
            "2025-02-30",
            "2025-01-02 25:00",
            "1735830138",
            "2025-01-02T15:02:18 Europe/Berlin",
            "2025-01-02T15:02:18Z UTC",
            "2h UTC",
            "999999999999y",
        ] {
            let why = utc.read(text, now()).expect_err(text);
            assert!(why.contains("is not a time; write one such as"), "{why}");
        }
    }
}

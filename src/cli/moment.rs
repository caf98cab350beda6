//! Points in time on the command line, and how they are shown.

use std::time::{Duration, SystemTime};

use jiff::{
    Timestamp, ZonedDateTime,
    civil::{Date, DateTime},
    tz::TimeZone,
};

use super::failed::Failed;

/// The zone of times: UTC, or that of this machine.
#[derive(Debug, Clone)]
pub(super) struct Zone(TimeZone);

impl Zone {
    pub(super) fn new(local: bool) -> Self {
        Self(if local { TimeZone::system() } else { TimeZone::UTC })
    }

    /// A point in time as RFC 3339 to the second, with its zone.
    pub(super) fn show(&self, at: SystemTime) -> String {
        let Ok(at) = Timestamp::try_from(at) else { return crate::clock::rfc3339_seconds(at) };
        let at = at.to_zoned_datetime(self.0.clone());
        if self.0 == TimeZone::UTC {
            at.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
        } else {
            at.strftime("%Y-%m-%dT%H:%M:%S%:z").to_string()
        }
    }

    /// Reads a time of the command line. A time without a zone is in this one.
    fn read(&self, text: &str, now: SystemTime) -> Result<SystemTime, String> {
        let text = text.trim();
        let found = match text {
            "now" => Some(now),
            "today" => self.day(now, 0),
            "yesterday" => self.day(now, 1),
            _ => ago(text, now).or_else(|| absolute(text)).or_else(|| self.civil(text)),
        };
        found.ok_or_else(|| {
            format!(
                "`{}` is not a time; write one such as 2026-01-31T12:00:00Z, 2026-01-31T12:00:00+02:00, \"2026-01-31 12:00\", \
                 2026-01-31, today, yesterday, or 2h for two hours ago",
                super::text::visible(text)
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

/// The times of a command that selects by time.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct Span {
    /// From this time on: 2026-01-31T12:00:00Z, "2026-01-31 12:00", yesterday, or 2h for two hours
    /// ago
    #[arg(long, value_name = "TIME", allow_hyphen_values = true)]
    pub(super) since: Option<String>,
    /// Before this time
    #[arg(long, value_name = "TIME", allow_hyphen_values = true)]
    pub(super) until: Option<String>,
    /// Show and read times in this machine's zone instead of UTC
    #[arg(long)]
    pub(super) local: bool,
}

/// A [`Span`] that was read.
#[derive(Debug, Clone)]
pub(super) struct Times {
    pub(super) since: Option<SystemTime>,
    pub(super) until: Option<SystemTime>,
    pub(super) zone: Zone,
}

impl Span {
    pub(super) fn read(&self, now: SystemTime) -> Result<Times, Failed> {
        let zone = Zone::new(self.local);
        let read = |flag: &str, text: &Option<String>| {
            let at = text.as_ref().map(|text| zone.read(text, now)).transpose();
            at.map_err(|why| Failed::Usage(format!("--{flag}: {why}")))
        };
        let (since, until) = (read("since", &self.since)?, read("until", &self.until)?);
        if let Some(since) = since.filter(|since| *since > now) {
            return Err(Failed::Usage(format!("--since: {} is yet to come", zone.show(since))));
        }
        if let (Some(since), Some(until)) = (since, until)
            && until <= since
        {
            return Err(Failed::Usage(format!(
                "--until: {} is not after --since, {}",
                zone.show(until),
                zone.show(since)
            )));
        }
        Ok(Times { since, until, zone })
    }
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
        for text in [
            "",
            "last tuesday",
            "12:00",
            "2025-13-01",
            "2025-02-30",
            "2025-01-02 25:00",
            "1735830138",
            "2025-01-02T15:02:18 Europe/Berlin",
            "999999999999y",
        ] {
            let why = utc.read(text, now()).expect_err(text);
            assert!(why.contains("is not a time; write one such as"), "{why}");
        }
    }

    #[test]
    fn a_span_that_selects_nothing_is_refused() {
        let span = |since: &str, until: &str| Span {
            since: (!since.is_empty()).then(|| since.to_owned()),
            until: (!until.is_empty()).then(|| until.to_owned()),
            local: false,
        };
        let why = |since, until| span(since, until).read(now()).expect_err("refused").to_string();
        assert!(why("2025-01-03", "").contains("--since: 2025-01-03T00:00:00Z is yet to come"));
        assert!(why("2h", "3h").contains("is not after --since"));
        assert!(why("2h", "2h").contains("--until"));
        assert!(why("", "tomorrow").contains("--until: `tomorrow` is not a time"));
        let times = span("2h", "2026-01-01").read(now()).expect("an end may be yet to come");
        assert!(times.since < times.until);
    }
}

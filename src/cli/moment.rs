//! Points in time on the command line.

use std::time::SystemTime;

use super::failed::Failed;
pub(super) use crate::zone::Zone;

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
    use std::time::Duration;

    use super::*;

    /// 2025-01-02T15:02:18Z.
    fn now() -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(1_735_830_138)
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

//! The choice of dead letters on the command line.

use std::time::{Duration, SystemTime};

use clap::builder::{PossibleValuesParser, TypedValueParser};

use crate::{
    cli::{complete, failed::Failed, text::visible},
    clock,
    delivery::{Reason, SubscriberName},
    event::Pattern,
    letters::{self, Choice, Name, Selection, Statuses},
};

/// Whose the orphans are, where a subscriber's name is expected.
const LOG: &str = "@log";

/// The dead letters that a command works on: all of a subscriber's, or those with these names that
/// pass the filters.
#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Which {
    /// The subscriber's name; one that is not configured any more is fine. `@log` means --orphans,
    /// with which it may be left out, as for `list`
    #[arg(add = complete::subscribers())]
    subscriber: Option<String>,
    /// Only these: an id, or `@2` for the second of `list`
    #[arg(value_name = "LETTER")]
    letters: Vec<Name>,
    #[command(flatten)]
    filters: Filters,
    /// Orphans, the dead letters of no subscriber: invalid events that came through a source queue
    /// or [queue] intake, and batches that RabbitMQ could not route back to their subscriber
    #[arg(long)]
    orphans: bool,
}

/// Filters; a dead letter must pass all of them.
#[derive(Debug, Default, clap::Args)]
struct Filters {
    /// Only those with this reason
    #[arg(long, value_parser = reasons())]
    reason: Option<Reason>,
    /// Only those whose last answer had this status, such as 503, or one of its class, such as 5xx
    #[arg(long)]
    status: Option<Statuses>,
    /// Only those with an event whose type matches this AMQP topic pattern, such as `user.*`
    #[arg(long = "type", value_name = "PATTERN", value_parser = Pattern::try_new)]
    event_type: Option<Pattern>,
    /// Only those that died then or later: an age, such as 2h, a day (UTC), such as 2026-01-31, or
    /// an RFC 3339 time
    #[arg(long, value_name = "TIME", value_parser = parse_since)]
    since: Option<SystemTime>,
    /// Only those that died then or earlier; a day counts to its end
    #[arg(long, value_name = "TIME", value_parser = parse_until)]
    until: Option<SystemTime>,
}

/// Parses a reason; its names appear in help and completions.
fn reasons() -> impl TypedValueParser<Value = Reason> {
    PossibleValuesParser::new(Reason::ALL.map(Reason::name))
        .try_map(|name| Reason::from_name(&name).ok_or("not a reason"))
}

fn parse_since(text: &str) -> Result<SystemTime, String> {
    time_before(text, clock::now())
}

fn parse_until(text: &str) -> Result<SystemTime, String> {
    let end_of_day = |day| day + Duration::from_millis(24 * 3600 * 1000 - 1);
    day(text).map_or_else(|| time_before(text, clock::now()), |day| Ok(end_of_day(day)))
}

/// The beginning of a day, such as 2026-01-31, in UTC.
fn day(text: &str) -> Option<SystemTime> {
    humantime::parse_rfc3339(&format!("{text}T00:00:00Z")).ok().filter(|_| text.len() == 10)
}

/// Parses a point in time, or an age before `now`; nothing died before 1970.
fn time_before(text: &str, now: SystemTime) -> Result<SystemTime, String> {
    const EXPECTED: &str = "write an age, such as 2h or 3days, a day, such as 2026-01-31, or a time, such as 2026-01-31T08:00:00Z";
    if let Some(day) = day(text) {
        return Ok(day);
    }
    if let Ok(ago) = humantime::parse_duration(text) {
        return Ok(now
            .checked_sub(ago)
            .unwrap_or(SystemTime::UNIX_EPOCH)
            .max(SystemTime::UNIX_EPOCH));
    }
    // RFC 3339 with an offset is a local time: UTC is earlier by the offset.
    let digits = |at: usize| text.get(at..at + 2).and_then(|n| n.parse::<u64>().ok());
    let offset = text.len().checked_sub(6).filter(|at| text.is_char_boundary(*at) && *at > 10);
    let sign = offset
        .and_then(|at| Some((at, *text.as_bytes().get(at)?)))
        .filter(|(_, sign)| matches!(sign, b'+' | b'-'));
    let Some((at, sign)) = sign else {
        return humantime::parse_rfc3339(text).map_err(|_| EXPECTED.to_owned());
    };
    let local =
        humantime::parse_rfc3339(&format!("{}Z", &text[..at])).map_err(|_| EXPECTED.to_owned())?;
    let (hours, minutes) =
        digits(at + 1).zip(digits(at + 4)).filter(|(h, m)| *h < 24 && *m < 60).ok_or(EXPECTED)?;
    let by = Duration::from_secs(hours * 3600 + minutes * 60);
    let utc = if sign == b'+' { local.checked_sub(by) } else { local.checked_add(by) };
    utc.map(|utc| utc.max(SystemTime::UNIX_EPOCH)).ok_or_else(|| EXPECTED.to_owned())
}

impl From<Filters> for letters::Filters {
    fn from(given: Filters) -> Self {
        let Filters { reason, status, event_type, since, until } = given;
        Self { reason, status, event_type, since, until }
    }
}

impl Which {
    /// One dead letter, for a command without filters. With `--orphans` the first word may be the
    /// letter.
    pub(super) fn one(
        first: String,
        second: Option<Name>,
        orphans: bool,
    ) -> Result<Selection, Failed> {
        let (subscriber, letters) = match second {
            Some(letter) => (Some(first), vec![letter]),
            None => (None, vec![first.parse().unwrap_or(Name::Id(first))]),
        };
        Self { subscriber, letters, filters: Filters::default(), orphans }.checked()
    }

    /// With `--orphans` the first word is a letter unless it can be a subscriber's name.
    pub(super) fn checked(self) -> Result<Selection, Failed> {
        let Self { mut subscriber, letters: mut names, filters, mut orphans } = self;
        match subscriber.take() {
            Some(log) if log == LOG => orphans = true,
            Some(name) if SubscriberName::try_new(&name).is_ok() => subscriber = Some(name),
            Some(letter) if orphans => names.insert(0, letter.parse().unwrap_or(Name::Id(letter))),
            Some(name) => {
                let name = visible(&name);
                return Err(Failed::Usage(format!(
                    "`{name}` is not a subscriber's name: 1 to 64 of a-z, 0-9 and `-`"
                )));
            }
            None => {}
        }
        Ok(Selection { subscriber, orphans, names, filters: filters.into(), as_of: None })
    }

    /// Checks that one subscriber, or orphans, are chosen.
    pub(super) fn of_one(self) -> Result<Selection, Failed> {
        if self.subscriber.is_none() && !self.orphans {
            let why = "name a subscriber, `hooktrail dead list` shows which have dead letters; or `@log`, for those of no subscriber";
            return Err(Failed::Usage(why.to_owned()));
        }
        self.checked()
    }
}

/// The arguments that follow `hooktrail dead list`.
pub(super) fn arguments(selection: &Selection) -> String {
    let orphans = selection.orphans.then_some("--orphans");
    let subscriber = selection.subscriber.as_deref();
    subscriber.into_iter().chain(orphans).collect::<Vec<_>>().join(" ")
}

/// Ends a walk: an error if a name was not found.
pub(super) fn all_found(choice: &Choice<'_>) -> Result<(), Failed> {
    let (missing, selection) = (choice.missing(), choice.selection);
    if missing.is_empty() {
        return Ok(());
    }
    let what = if selection.orphans { "orphan" } else { "dead letter" };
    let with = selection.filters.describe();
    let missing = missing.into_iter().map(|name| match name {
        Name::Number(n) => format!("no {what}{with} is @{n}"),
        Name::Id(id) => format!("no {what}{with} has the id `{}`", visible(id)),
        Name::Key(key) => format!("no {what}{with} has the key `{key}`"),
    });
    let missing: Vec<String> = missing.collect();
    let (missing, of) = (missing.join(", "), arguments(selection));
    let hint = "shows ids and numbers; a number is written @2";
    Err(Failed::Runtime(format!("{missing}; `hooktrail dead list {of}` {hint}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> SystemTime {
        humantime::parse_rfc3339(text).expect("a time")
    }

    #[test]
    fn a_time_is_a_point_or_so_long_ago() {
        let now = at("2026-03-01T12:00:00Z");
        for (text, expected) in [
            ("2h", "2026-03-01T10:00:00Z"),
            ("1day 30m", "2026-02-28T11:30:00Z"),
            ("0s", "2026-03-01T12:00:00Z"),
            ("2026-02-28T23:59:59Z", "2026-02-28T23:59:59Z"),
            ("2026-02-28T23:59:59.5Z", "2026-02-28T23:59:59.5Z"),
            ("2026-03-01T01:30:00+02:00", "2026-02-28T23:30:00Z"),
            ("2026-02-28T18:30:00-05:30", "2026-03-01T00:00:00Z"),
            ("1970-01-01T01:00:00+02:00", "1970-01-01T00:00:00Z"),
            ("9999years", "1970-01-01T00:00:00Z"),
            ("2026-02-28", "2026-02-28T00:00:00Z"),
        ] {
            assert_eq!(time_before(text, now), Ok(at(expected)), "{text}");
        }
        for text in [
            "",
            "yesterday",
            "2026-02-30T00:00:00Z",
            "2026-02-30",
            "2026-2-8",
            "26-02-28",
            "2026-02-28T23:59:59",
            "2026-02-28T23:59:59+25:00",
            "+02:00",
            "é2:00€",
        ] {
            assert!(time_before(text, now).is_err_and(|e| e.contains("such as 2h")), "{text}");
        }
    }

    #[test]
    fn a_day_is_from_its_begin_to_its_end() {
        let day = (parse_since("2026-02-28"), parse_until("2026-02-28"));
        assert_eq!(day, (Ok(at("2026-02-28T00:00:00Z")), Ok(at("2026-02-28T23:59:59.999Z"))));
        assert_eq!(parse_until("2026-02-28T08:00:00Z"), Ok(at("2026-02-28T08:00:00Z")));
    }
}

//! The choice of dead letters in a walk: by name, number and filter.

use std::{
    convert::Infallible,
    fmt,
    str::FromStr,
    time::{Duration, SystemTime},
};

use clap::builder::{PossibleValuesParser, TypedValueParser};

use crate::{
    cli::{complete, failed::Failed, text::visible},
    clock,
    delivery::{DeadLetter, MessageKind, Reason, SubscriberName},
    event::{Pattern, event_type},
    queue::Held,
    wording,
};

/// The dead letters that a command works on: all of a subscriber's, or those with these names that
/// pass the filters.
#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Which {
    /// The subscriber's name; one that is not configured any more is fine. With --orphans, and for
    /// `list`, it may be left out
    #[arg(add = complete::subscribers())]
    subscriber: Option<String>,
    /// Only these: an id, or `@2` for the second of `list`
    #[arg(value_name = "LETTER")]
    letters: Vec<Name>,
    #[command(flatten)]
    filters: Filters,
    /// Orphans instead of dead letters: messages that could not be routed back to their subscriber,
    /// and invalid events of a source queue (RabbitMQ only)
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

/// One status, or a class of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Statuses {
    One(u16),
    /// The first digit.
    Class(u16),
}

impl Statuses {
    fn include(self, status: u16) -> bool {
        match self {
            Self::One(one) => status == one,
            Self::Class(class) => status / 100 == class,
        }
    }
}

impl FromStr for Statuses {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let class = text.strip_suffix("xx").or_else(|| text.strip_suffix("XX"));
        let found = match class {
            Some(class) => {
                class.parse().ok().filter(|class| (1..10).contains(class)).map(Self::Class)
            }
            None => text.parse().ok().filter(|status| (100..1000).contains(status)).map(Self::One),
        };
        found.ok_or("write a status, such as 503, or a class of them, such as 5xx")
    }
}

impl fmt::Display for Statuses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::One(status) => write!(f, "{status}"),
            Self::Class(class) => write!(f, "{class}xx"),
        }
    }
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

impl Filters {
    fn let_through(&self, letter: &DeadLetter) -> bool {
        let died = |fits: &dyn Fn(SystemTime) -> bool| letter.died_at.is_some_and(fits);
        self.reason.is_none_or(|r| r == letter.reason)
            && self.status.is_none_or(|s| letter.status.is_some_and(|status| s.include(status)))
            && self.since.is_none_or(|since| died(&|at| at >= since))
            && self.until.is_none_or(|until| died(&|at| at <= until))
            && self.event_type.as_ref().is_none_or(|pattern| has_event(letter, pattern))
    }

    /// The filters in words, for a message that nothing was found.
    fn describe(&self) -> String {
        let time = |at: &SystemTime| clock::rfc3339_seconds(*at);
        let all = [
            self.reason.map(|r| format!("with reason {}", r.name())),
            self.status.map(|s| format!("with status {s}")),
            self.event_type
                .as_ref()
                .map(|p| format!("with an event of type `{}`", visible(p.as_str()))),
            self.since.as_ref().map(|at| format!("since {}", time(at))),
            self.until.as_ref().map(|at| format!("until {}", time(at))),
        ];
        all.into_iter().flatten().map(|text| format!(" {text}")).collect()
    }

    fn are_none(&self) -> bool {
        self.describe().is_empty()
    }
}

/// Whether the pattern matches the type of an event in the dead letter.
fn has_event(letter: &DeadLetter, pattern: &Pattern) -> bool {
    let matches = |event: &[u8]| event_type(event).is_ok_and(|t| pattern.matches(&t));
    match letter.kind {
        MessageKind::Event => matches(&letter.body),
        MessageKind::Batch => {
            let events = letter.format().and_then(|format| format.events(&letter.body));
            events.is_some_and(|events| events.into_iter().any(matches))
        }
    }
}

/// The name of a dead letter on the command line. An id may be any text, digits too, so a number
/// begins with `@`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::cli) enum Name {
    Number(usize),
    Id(String),
}

impl FromStr for Name {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        let number = text.strip_prefix('@').and_then(|n| n.parse().ok());
        Ok(number.map_or_else(|| Self::Id(text.to_owned()), Self::Number))
    }
}

impl Name {
    fn is(&self, number: usize, letter: &DeadLetter) -> bool {
        match self {
            Self::Number(n) => *n == number,
            Self::Id(id) => letter.id.as_ref() == Some(id),
        }
    }
}

impl Which {
    /// One dead letter, for a command without filters. With `--orphans` the first word may be the
    /// letter.
    pub(super) fn one(first: String, second: Option<Name>, orphans: bool) -> Result<Self, Failed> {
        let (subscriber, letters) = match second {
            Some(letter) => (Some(first), vec![letter]),
            None => (None, vec![first.parse().unwrap_or(Name::Id(first))]),
        };
        Self { subscriber, letters, filters: Filters::default(), orphans }.checked()
    }

    /// With `--orphans` the first word is a letter unless it can be a subscriber's name.
    pub(super) fn checked(mut self) -> Result<Self, Failed> {
        match self.subscriber.take() {
            Some(name) if SubscriberName::try_new(&name).is_ok() => self.subscriber = Some(name),
            Some(letter) if self.orphans => {
                self.letters.insert(0, letter.parse().unwrap_or(Name::Id(letter)))
            }
            Some(name) => {
                let name = visible(&name);
                return Err(Failed::Usage(format!(
                    "`{name}` is not a subscriber's name: 1 to 64 of a-z, 0-9 and `-`"
                )));
            }
            None => {}
        }
        Ok(self)
    }

    /// Checks that one subscriber, or orphans, are chosen.
    pub(super) fn of_one(self) -> Result<Self, Failed> {
        if self.subscriber.is_none() && !self.orphans {
            let why = "name a subscriber, `hooktrail dead list` shows which have dead letters; or use --orphans, for those of no subscriber";
            return Err(Failed::Usage(why.to_owned()));
        }
        self.checked()
    }

    pub(super) fn subscriber(&self) -> Option<&str> {
        self.subscriber.as_deref()
    }

    pub(super) fn orphans(&self) -> bool {
        self.orphans
    }

    pub(super) fn has_names(&self) -> bool {
        !self.letters.is_empty()
    }

    /// Whether all letters of the walk are chosen.
    pub(super) fn all(&self) -> bool {
        self.letters.is_empty()
            && self.filters.are_none()
            && !(self.orphans && self.subscriber.is_some())
    }

    /// The noun for `n` of them: ``dead letters of `a` ``.
    pub(super) fn what(&self, n: usize) -> String {
        let what = if self.orphans { "orphan(s)" } else { "dead letter(s)" };
        let what = wording::agreed(&n, what);
        self.subscriber.as_ref().map_or_else(|| what.clone(), |name| format!("{what} of `{name}`"))
    }

    /// The arguments that follow `hooktrail dead list`.
    pub(super) fn arguments(&self) -> String {
        let orphans = self.orphans.then_some("--orphans");
        self.subscriber.as_deref().into_iter().chain(orphans).collect::<Vec<_>>().join(" ")
    }

    fn not_found(&self, names: &[&Name]) -> Failed {
        let (what, with) =
            (if self.orphans { "orphan" } else { "dead letter" }, self.filters.describe());
        let missing = names.iter().map(|name| match name {
            Name::Number(n) => format!("no {what}{with} is @{n}"),
            Name::Id(id) => format!("no {what}{with} has the id `{}`", visible(id)),
        });
        let missing: Vec<String> = missing.collect();
        let hint = "shows ids and numbers; a number is written @2";
        Failed::Runtime(format!(
            "{}; `hooktrail dead list {}` {hint}",
            missing.join(", "),
            self.arguments()
        ))
    }
}

/// Picks the chosen letters out of a walk, and knows which names were not found.
pub(super) struct Choice<'w> {
    pub(super) which: &'w Which,
    met: Vec<bool>,
    /// The number of letters seen, which is the number of the last one.
    pub(super) number: usize,
}

impl<'w> Choice<'w> {
    pub(super) fn new(which: &'w Which) -> Self {
        Self { which, met: vec![false; which.letters.len()], number: 0 }
    }

    /// Whether the next letter of the walk is chosen.
    pub(super) fn includes(&mut self, held: &Held) -> bool {
        self.number += 1;
        let which = self.which;
        if which.orphans && which.subscriber.is_some() && which.subscriber != held.subscriber {
            return false;
        }
        if !which.filters.let_through(&held.letter) {
            return false;
        }
        let mut named = which.letters.is_empty();
        for (name, met) in which.letters.iter().zip(&mut self.met) {
            if name.is(self.number, &held.letter) {
                named = true;
                *met = true;
            }
        }
        named
    }

    /// Ends the walk: an error if a name was not found.
    pub(super) fn complete(&self) -> Result<(), Failed> {
        let names = self
            .which
            .letters
            .iter()
            .zip(&self.met)
            .filter(|(_, met)| !**met)
            .map(|(name, _)| name);
        let missing: Vec<&Name> = names.collect();
        if missing.is_empty() { Ok(()) } else { Err(self.which.not_found(&missing)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;

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

    #[test]
    fn a_status_is_one_or_a_class() {
        let statuses = |text: &str| text.parse::<Statuses>();
        for (text, of, not) in [
            ("503", &[503][..], &[500, 504][..]),
            ("5xx", &[500, 503, 599], &[499, 600]),
            ("4XX", &[400, 499], &[500]),
        ] {
            let found = statuses(text).expect("sound");
            assert!(
                of.iter().all(|s| found.include(*s)) && !not.iter().any(|s| found.include(*s)),
                "{text}"
            );
            assert_eq!(found.to_string(), text.to_lowercase());
        }
        for text in ["", "xx", "0xx", "10xx", "99", "1000", "5x", "50x", "-5xx", "5xxx"] {
            assert!(statuses(text).is_err_and(|e| e.contains("5xx")), "{text}");
        }
    }

    fn letter(kind: MessageKind, content_type: &str, body: &'static str) -> DeadLetter {
        DeadLetter {
            kind,
            reason: Reason::Exhausted,
            body: Bytes::from_static(body.as_bytes()),
            content_type: Some(content_type.to_owned()),
            content_encoding: None,
            id: None,
            events: 1,
            attempts: 1,
            status: Some(503),
            error: String::new(),
            first_attempt_at: None,
            died_at: Some(at("2026-03-01T12:00:00Z")),
            attempt_log: crate::delivery::AttemptLog::default(),
            prints: None,
        }
    }

    #[test]
    fn filters_are_met_together() {
        let batch = letter(
            MessageKind::Batch,
            "application/json",
            r#"{"events":[{"event":"a.b"},{"event":"user.deleted"}]}"#,
        );
        let lines = letter(
            MessageKind::Batch,
            "application/jsonl",
            "{\"event\":\"a.b\"}\n{\"event\":\"user.deleted\"}\n",
        );
        let event = letter(MessageKind::Event, "application/json", r#"{"event":"user.deleted"}"#);
        let bad = letter(MessageKind::Event, "application/json", "user.deleted");
        let of_type = |p: &str| Filters {
            event_type: Some(Pattern::try_new(p).expect("a pattern")),
            ..Filters::default()
        };
        for (pattern, expected) in
            [("user.*", true), ("a.b", true), ("#", true), ("user", false), ("*", false)]
        {
            assert_eq!(of_type(pattern).let_through(&batch), expected, "{pattern}");
            assert_eq!(of_type(pattern).let_through(&lines), expected, "{pattern}");
        }
        assert!(
            of_type("user.*").let_through(&event)
                && !of_type("a.*").let_through(&event)
                && !of_type("#").let_through(&bad)
        );
        let died = at("2026-03-01T12:00:00Z");
        let all = || Filters {
            reason: Some(Reason::Exhausted),
            status: Some(Statuses::One(503)),
            since: Some(died),
            until: Some(died),
            ..of_type("user.*")
        };
        assert!(all().let_through(&batch));
        for (one, wrong) in [
            ("reason", Filters { reason: Some(Reason::Refused), ..all() }),
            ("status", Filters { status: Some(Statuses::One(500)), ..all() }),
            ("since", Filters { since: Some(died + Duration::from_millis(1)), ..all() }),
            ("until", Filters { until: Some(died - Duration::from_millis(1)), ..all() }),
            ("type", Filters { event_type: of_type("x").event_type, ..all() }),
        ] {
            assert!(!wrong.let_through(&batch), "{one}");
        }
        let undated = DeadLetter { died_at: None, status: None, ..batch };
        assert!(
            !Filters { until: Some(died), ..Filters::default() }.let_through(&undated),
            "it is not known when it died"
        );
        assert!(Filters::default().let_through(&undated));
        assert_eq!(
            all().describe(),
            " with reason exhausted with status 503 with an event of type `user.*` since 2026-03-01T12:00:00Z until 2026-03-01T12:00:00Z"
        );
    }
}

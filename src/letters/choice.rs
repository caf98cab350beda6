//! The choice of dead letters in a walk: by name, number and filter.

use std::{
    convert::Infallible,
    fmt,
    str::FromStr,
    time::{Duration, SystemTime},
};

use super::key::Key;
use crate::{
    clock,
    delivery::{DeadLetter, MessageKind, Reason},
    event::{Pattern, entry::event_in, event_type},
    queue::Held,
    wording::{self, visible},
};

/// The dead letters of a subscriber, or the orphans, that are worked on: all of them, or those with
/// these names that pass the filters.
#[derive(Debug, Default)]
pub struct Selection {
    /// `None`: orphans of any.
    pub subscriber: Option<String>,
    pub orphans: bool,
    /// Empty: any.
    pub names: Vec<Name>,
    pub filters: Filters,
    /// Only what had died by then, to the millisecond, as at a count before. One whose time is not
    /// known is meant too.
    pub as_of: Option<SystemTime>,
}

/// Filters; a dead letter must pass all of them.
#[derive(Debug, Default)]
pub struct Filters {
    pub reason: Option<Reason>,
    /// The status of the last answer.
    pub status: Option<Statuses>,
    /// An event has a type that matches it.
    pub event_type: Option<Pattern>,
    /// It died then or later.
    pub since: Option<SystemTime>,
    /// It died then or earlier.
    pub until: Option<SystemTime>,
}

/// One status, or a class of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Statuses {
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
    pub fn describe(&self) -> String {
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

    pub fn are_none(&self) -> bool {
        self.describe().is_empty()
    }
}

/// Whether the pattern matches the type of an event in the dead letter.
fn has_event(letter: &DeadLetter, pattern: &Pattern) -> bool {
    let matches = |event: &[u8]| event_type(event).is_ok_and(|t| pattern.matches(&t));
    match letter.kind {
        MessageKind::Event => matches(&letter.body),
        MessageKind::Batch => {
            let Some(format) = letter.format() else { return false };
            let entries = format.entries(&letter.body).unwrap_or_default();
            entries.into_iter().filter_map(|one| event_in(format, one)).any(matches)
        }
    }
}

/// The name of a dead letter. An id may be any text, digits too, so a number
/// begins with `@`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Name {
    Number(usize),
    Id(String),
    /// Not on the command line.
    Key(Key),
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
            Self::Key(key) => Key::of(letter) == *key,
        }
    }
}

impl Selection {
    /// Whether all letters of the walk are chosen.
    pub fn is_all(&self) -> bool {
        self.names.is_empty()
            && self.filters.are_none()
            && self.as_of.is_none()
            && !(self.orphans && self.subscriber.is_some())
    }

    /// The noun for `n` of them: ``dead letters of `a` ``.
    pub fn noun(&self, n: usize) -> String {
        let what = if self.orphans { "orphan(s)" } else { "dead letter(s)" };
        let what = wording::agreed(&n, what);
        self.subscriber.as_ref().map_or_else(|| what.clone(), |name| format!("{what} of `{name}`"))
    }

    fn had_died(&self, letter: &DeadLetter) -> bool {
        let within = |as_of: SystemTime| as_of + Duration::from_millis(1);
        let late = self.as_of.zip(letter.died_at).is_some_and(|(as_of, at)| at >= within(as_of));
        !late
    }
}

/// Picks the chosen letters out of a walk, and knows which names were not found.
#[derive(Debug)]
pub struct Choice<'s> {
    pub selection: &'s Selection,
    met: Vec<bool>,
    /// The number of letters seen, which is the number of the last one.
    pub number: usize,
    /// When the latest of the chosen ones died, as far as it is known.
    pub latest: Option<SystemTime>,
}

impl<'s> Choice<'s> {
    pub fn new(selection: &'s Selection) -> Self {
        Self { selection, met: vec![false; selection.names.len()], number: 0, latest: None }
    }

    /// Whether the next letter of the walk is chosen.
    pub fn includes(&mut self, held: &Held) -> bool {
        self.number += 1;
        let Selection { subscriber, orphans, names, filters, .. } = self.selection;
        if *orphans && subscriber.is_some() && *subscriber != held.subscriber {
            return false;
        }
        if !filters.let_through(&held.letter) || !self.selection.had_died(&held.letter) {
            return false;
        }
        let mut named = names.is_empty();
        for (name, met) in names.iter().zip(&mut self.met) {
            if name.is(self.number, &held.letter) {
                named = true;
                *met = true;
            }
        }
        if named {
            self.latest = self.latest.max(held.letter.died_at);
        }
        named
    }

    /// The names that no letter had.
    pub fn missing(&self) -> Vec<&'s Name> {
        let names = self.selection.names.iter().zip(&self.met);
        names.filter(|(_, met)| !**met).map(|(name, _)| name).collect()
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

//! What a list is of.

use std::time::{Duration, SystemTime};

use super::{
    row::EventRow,
    words::{self, Wanted},
};
use crate::event::{Pattern, Tenant, details::Party};

/// Selects events. All that is set has to hold.
#[derive(Debug, Clone, Default)]
pub struct EventFilter {
    pub event_type: Option<Pattern>,
    /// The actor's id or name, exact.
    pub actor: Option<String>,
    /// The resource's id or name, exact.
    pub resource: Option<String>,
    /// Of this tenant.
    pub tenant: Option<Tenant>,
    /// The message id, or `sha256-…`, exact.
    pub id: Option<String>,
    /// Words that all occur, the last one as the begin of a word. A text without a letter or a digit
    /// selects nothing: refuse it, see [`is_searchable`](super::words::is_searchable).
    pub text: Option<String>,
    /// From this time on.
    pub since: Option<SystemTime>,
    /// Before this time.
    pub until: Option<SystemTime>,
    pub by: By,
}

impl EventFilter {
    /// Whether it selects every event.
    pub fn is_all(&self) -> bool {
        let Self { event_type, actor, resource, tenant, id, text, since, until, by: _ } = self;
        let texts = [actor, resource, id, text];
        event_type.is_none()
            && tenant.is_none()
            && texts.into_iter().all(Option::is_none)
            && since.is_none()
            && until.is_none()
    }

    /// Whether it selects by nothing but the type and the [time](By::At) of history.
    pub fn is_of_type_and_time(&self) -> bool {
        let Self { event_type: _, actor, resource, tenant, id, text, since: _, until: _, by } =
            self;
        let texts = [actor, resource, id, text];
        texts.into_iter().all(Option::is_none) && tenant.is_none() && *by == By::At
    }

    /// Whether it selects an event. An implementation may find events by an index, but no others
    /// than these.
    pub fn selects(&self, row: &EventRow) -> bool {
        let party = |wanted: &Option<String>, party: &Party| match wanted {
            None => true,
            wanted => party.id == *wanted || party.name == *wanted,
        };
        self.event_type.as_ref().is_none_or(|pattern| pattern.matches(&row.event_type))
            && self.tenant.as_ref().is_none_or(|tenant| row.tenant.as_ref() == Some(tenant))
            && self.id.as_ref().is_none_or(|id| row.has_id(id))
            && party(&self.actor, &row.details.actor)
            && party(&self.resource, &row.details.resource)
            && self.selects_time(row)
            && self.text.as_ref().is_none_or(|text| has_words(text, row))
    }

    fn selects_time(&self, row: &EventRow) -> bool {
        if self.since.is_none() && self.until.is_none() {
            return true;
        }
        let at = match self.by {
            By::At => Some(row.at),
            By::EventTime => row.details.timestamp.as_deref().and_then(event_time),
        };
        at.is_some_and(|at| self.is_within(at))
    }

    /// Whether a time is from `since` on and before `until`.
    pub fn is_within(&self, at: SystemTime) -> bool {
        self.since.is_none_or(|since| at >= since) && self.until.is_none_or(|until| at < until)
    }
}

fn has_words(text: &str, row: &EventRow) -> bool {
    Wanted::of(text).is_some_and(|wanted| {
        wanted.is_in(|each| match &row.body {
            Some(body) => words::of_body(body, each),
            None => words::of_details(&row.details, each),
        })
    })
}

/// The time that an event's field `timestamp` means: Unix seconds, which may have a fraction, or
/// RFC 3339. `None` of everything else, such as milliseconds or a time after the year 9999.
pub fn event_time(text: &str) -> Option<SystemTime> {
    const LAST_SECOND: f64 = 253_402_300_799.0;
    let text = text.trim();
    if let Ok(seconds) = text.parse::<f64>() {
        let seconds = Some(seconds).filter(|s| (0.0..=LAST_SECOND).contains(s))?;
        return Some(SystemTime::UNIX_EPOCH + Duration::from_secs_f64(seconds));
    }
    let (local, ahead) = match text.strip_suffix(['Z', 'z']) {
        Some(local) => (local, 0),
        None => {
            let (local, offset) = text.split_at_checked(text.len().checked_sub(6)?)?;
            let (hours, minutes) = offset.get(1..)?.split_once(':')?;
            let number = |t: &str| {
                let is_number = t.len() == 2 && t.bytes().all(|b| b.is_ascii_digit());
                t.parse::<i64>().ok().filter(|_| is_number)
            };
            let ahead = number(hours)? * 3600 + number(minutes)? * 60;
            (local, if offset.starts_with('-') { -ahead } else { ahead })
        }
    };
    let at = humantime::parse_rfc3339(&format!("{}Z", local.replace('t', "T"))).ok()?;
    let shift = Duration::from_secs(i64::unsigned_abs(ahead));
    if ahead > 0 { at.checked_sub(shift) } else { at.checked_add(shift) }
}

/// The time that `since` and `until` mean.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum By {
    /// The time that history has for it: see `EventRow::at`.
    #[default]
    At,
    /// The event's own field `timestamp`. An event without a readable one is not selected.
    EventTime,
}

/// Selects deliveries. All that is set has to hold.
#[derive(Debug, Clone, Default)]
pub struct DeliveryFilter {
    pub subscriber: Option<String>,
    /// The name of a state.
    pub state: Option<String>,
    /// Begun from this time on.
    pub since: Option<SystemTime>,
    /// Begun before this time.
    pub until: Option<SystemTime>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::rfc3339;

    #[test]
    fn an_event_s_time_is_seconds_or_rfc_3339() {
        for (text, expected) in [
            ("1733739084", "2024-12-09T10:11:24.000Z"),
            ("1733739084.5", "2024-12-09T10:11:24.500Z"),
            ("1.733739084e9", "2024-12-09T10:11:24.000Z"),
            ("2024-12-09T10:11:24Z", "2024-12-09T10:11:24.000Z"),
            ("2024-12-09t12:11:24.25+02:00", "2024-12-09T10:11:24.250Z"),
            ("2024-12-09T04:41:24-05:30", "2024-12-09T10:11:24.000Z"),
            ("0", "1970-01-01T00:00:00.000Z"),
        ] {
            assert_eq!(event_time(text).map(rfc3339).as_deref(), Some(expected), "{text}");
        }
        for none in [
            "1733739084000",
            "1000000000000000000",
            "1e400",
            "NaN",
            "-1",
            "",
            "soon",
            "2024-12-09",
            "2024-12-09T10:11:24",
            "2024-12-09T10:11:24+2:00",
            "2024-12-09T10:11:24é02:00",
            "+02:00",
        ] {
            assert_eq!(event_time(none), None, "{none}");
        }
    }
}

//! The state of a subscriber, and times, in words.

use std::time::Duration;

use super::{Lane, LastError, State, Subscriber, Time};
use crate::{
    clock,
    wording::{counted, grouped, rounded, visible},
};

/// The state with what explains it.
pub fn state(s: &Subscriber) -> String {
    let (name, reason) = (name(s), reason(s));
    let Some(reason) = reason else { return name };
    match &s.state {
        State::Retrying => format!("{name} ({reason})"),
        State::CircuitOpen | State::Ok => format!("{name}, {reason}"),
        State::QueueFails => format!("its {name}: {reason}"),
        State::Inactive => format!("{name}: {reason}"),
        _ => format!("{name} {reason}"),
    }
}

/// How many subscribers are in each state: "3 circuit open, 97 ok".
pub fn states(counted: &[(&State, usize)]) -> String {
    let one = |(state, count): &(&State, usize)| {
        format!("{} {}", grouped(*count as u64), visible(state.name()).replace('_', " "))
    };
    counted.iter().map(one).collect::<Vec<_>>().join(", ")
}

/// The state's name.
pub fn name(s: &Subscriber) -> String {
    match &s.state {
        // The batch was given up, or another daemon has it.
        State::Retrying if s.lane.as_ref().is_some_and(Lane::is_idle) => {
            "last attempt failed".to_owned()
        }
        State::CircuitOpen if s.lane.is_some() => "circuit open".to_owned(),
        State::QueueFails if s.lane.is_some() => "queue fails".to_owned(),
        state => visible(state.name()),
    }
}

/// What explains the state: it follows the name.
pub fn reason(s: &Subscriber) -> Option<String> {
    if let Some(why) = &s.why {
        return Some(visible(why));
    }
    let lane = s.lane.as_ref()?;
    let last_error = lane.last_error.as_ref().map(failure);
    match &s.state {
        State::Waiting => {
            let since = lane.waiting_since.map(since);
            Some(format!("for an answer, {}", since.as_deref().unwrap_or("-")))
        }
        State::Retrying => last_error,
        State::CircuitOpen => {
            let probe = lane.circuit.until.map(until).unwrap_or_default();
            let last_error = last_error.map_or_else(String::new, |error| format!(" ({error})"));
            Some(format!("probe {probe}{last_error}"))
        }
        State::Held => {
            Some(format!("by Retry-After{}", lane.held_until.map(still).unwrap_or_default()))
        }
        State::Paused => {
            let pause = lane.paused.as_ref()?;
            Some(format!("by {}: {}", visible(&pause.by), visible(&pause.why)))
        }
        State::QueueFails => {
            let error = lane.queue_error.as_deref().map(visible);
            Some(error.unwrap_or_else(|| "-".to_owned()))
        }
        // The latest attempt succeeded, or the daemon has made none yet.
        State::Ok => lane
            .in_retry
            .filter(|n| *n > 0)
            .map(|n| counted(n, "batch(es) (waits|wait) for an attempt")),
        State::Starting | State::Inactive | State::Other(_) => None,
    }
}

/// The failure with its status and its cause.
pub fn failure(e: &LastError) -> String {
    let status = e.status.map(|n| format!(" {n}")).unwrap_or_default();
    let cause = e.cause.as_ref().map(|c| format!(": {}", visible(c))).unwrap_or_default();
    format!("{}{status}{cause}", visible(&e.failure))
}

/// A duration that is given in seconds.
pub fn seconds(seconds: f64) -> String {
    rounded(Duration::try_from_secs_f64(seconds).unwrap_or_default())
}

/// The time in which an answer came, in seconds to the millisecond.
pub fn took(seconds: f64) -> String {
    if seconds < 0.001 { "less than 1ms".to_owned() } else { self::seconds(seconds) }
}

/// The time since then.
pub fn since(at: Time) -> String {
    rounded(at.ago(clock::now()))
}

/// The time until then, in words.
pub fn until(at: Time) -> String {
    let left = at.left(clock::now());
    if left.is_zero() { "now".to_owned() } else { format!("in {}", rounded(left)) }
}

/// The duration until then, in words.
pub fn still(until: Time) -> String {
    let left = until.left(clock::now());
    if left.is_zero() { String::new() } else { format!(" for another {}", rounded(left)) }
}

/// A subscriber as JSON describes it, the figures of its lane filled in.
#[cfg(test)]
pub(crate) fn subscriber(mut value: serde_json::Value) -> Subscriber {
    if value["state"] != "starting" && value.get("in_hand").is_none() {
        value["in_hand"] = 0.into();
    }
    serde_json::from_value(value).expect("a subscriber")
}

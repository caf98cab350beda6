//! The state of a subscriber, and times, in words.

use std::time::Duration;

use super::{LastError, State, Subscriber, Time};
use crate::{
    clock,
    wording::{rounded, visible},
};

/// The state with what explains it.
pub fn state(s: &Subscriber) -> String {
    let Some(lane) = &s.lane else { return visible(s.state.name()) };
    let last_error = || {
        let error = lane.last_error.as_ref();
        error.map_or_else(String::new, |error| format!(" ({})", failure(error)))
    };
    match &s.state {
        State::Waiting => {
            let since = lane.waiting_since.map(since);
            format!("waiting for an answer, {}", since.as_deref().unwrap_or("-"))
        }
        // The batch was given up, or another daemon has it.
        State::Retrying if lane.in_retry == Some(0) && lane.in_hand == 0 => {
            format!("last attempt failed{}", last_error())
        }
        State::Retrying => format!("retrying{}", last_error()),
        State::CircuitOpen => {
            let probe = lane.circuit.until.map(until).unwrap_or_default();
            format!("circuit open, probe {probe}{}", last_error())
        }
        State::Held => {
            format!("held by Retry-After{}", lane.held_until.map(still).unwrap_or_default())
        }
        State::Paused => match &lane.paused {
            Some(pause) => format!("paused by {}: {}", visible(&pause.by), visible(&pause.why)),
            None => "paused".to_owned(),
        },
        State::QueueFails => {
            let error = lane.queue_error.as_deref().map(visible);
            format!("its queue fails: {}", error.as_deref().unwrap_or("-"))
        }
        State::Ok | State::Starting | State::Other(_) => visible(s.state.name()),
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

//! `status NAME`: one subscriber in detail, with what to do.

use std::fmt::Write as _;

use crate::{
    admin::view::{
        Lane, LastError, Paused, State, Subscriber, Time,
        words::{self, failure, seconds, state, still, until},
    },
    cli::{terminal::hanging, text::visible},
    delivery::FailureKind,
    policy::circuit_breaker::CircuitState,
    wording::counted,
};

/// The column in which values begin.
const COLUMN: usize = 13;

/// All that the daemon reports of a subscriber.
pub(super) fn story(s: &Subscriber, width: usize) -> String {
    let name = visible(&s.subscriber);
    let mut out = format!("{}\n", hanging(&format!("{name}: {}", state(s)), width, 4));
    let Some(lane) = &s.lane else { return out };
    let mut line = |what: &str, story: String| {
        if !story.is_empty() {
            // Writing to a string cannot fail.
            writeln!(
                out,
                "{}",
                hanging(&format!("  {what:<width$}{story}", width = COLUMN - 2), width, COLUMN)
            )
            .ok();
        }
    };
    line("since", since(&s.state, lane));
    line("last error", lane.last_error.as_ref().map(last_error).unwrap_or_default());
    line("circuit", circuit(lane));
    line("waiting", waiting(lane));
    let oldest = lane.oldest_event_at.map(|at| format!("an event that arrived {}", ago(at)));
    line("oldest", oldest.unwrap_or_default());
    line("delivered", delivered(lane));
    let plain =
        "its receiver refused a compressed request: requests are plain until the next reload";
    line("gzip", if lane.compression_refused { plain.to_owned() } else { String::new() });
    let dead = lane.dead.filter(|n| *n > 0);
    let dead =
        dead.map(|n| format!("{}: hooktrail dead list {name}", counted(n, "dead letter(s)")));
    line("dead", dead.unwrap_or_default());
    line("what to do", to_do(&s.state, lane, &name));
    out
}

fn since(state: &State, lane: &Lane) -> String {
    if let Some(Paused { why, since, by }) = &lane.paused {
        return format!("{}, by {}: {}", ago(*since), visible(by), visible(why));
    }
    match (state, lane.last_delivered_at) {
        (State::Ok | State::Starting, _) => String::new(),
        (_, Some(at)) => format!("it accepted the last batch {}", ago(at)),
        (_, None) => "it has accepted nothing since this daemon started".to_owned(),
    }
}

fn last_error(e: &LastError) -> String {
    format!("{}, {}", failure(e), ago(e.at))
}

fn circuit(lane: &Lane) -> String {
    match (lane.circuit.state(), lane.circuit.until, lane.held_until) {
        (_, _, Some(held)) => {
            format!("the receiver asked for a hold by Retry-After{}", still(held))
        }
        (Some(CircuitState::Open), Some(at), _) => {
            format!("open: nothing is sent; one batch is tried {}", until(at))
        }
        (Some(CircuitState::HalfOpen), ..) => "half open: one batch is being tried".to_owned(),
        (Some(CircuitState::Closed), ..) => "closed: batches are sent as they come".to_owned(),
        (Some(CircuitState::Open) | None, ..) => String::new(),
    }
}

fn waiting(lane: &Lane) -> String {
    let backlog = lane.backlog.map(|n| counted(n, "event(s)"));
    let next = lane.next_retry_at.map(|at| format!(", the next one {}", until(at)));
    format!(
        "{} in the queue, {} in hand, {}{}",
        backlog.as_deref().unwrap_or("an unknown number of events"),
        counted(lane.in_hand, "event(s)"),
        counted(lane.in_retry.unwrap_or_default(), "batch(es) to retry"),
        next.unwrap_or_default()
    )
}

fn delivered(lane: &Lane) -> String {
    let mut text = format!(
        "{} since this daemon started, {:.1}/s in the last minute",
        counted(lane.delivered, "event(s)"),
        lane.delivered_per_s
    );
    if let Some(at) = lane.last_delivered_at {
        text += &format!(", the last ones {}", ago(at));
    }
    if let Some(share) = lane.success_rate {
        // What took no whole millisecond came within one.
        let took = |s: Option<f64>| s.map_or_else(|| "-".to_owned(), |s| seconds(s.max(0.001)));
        text += &format!(
            "; of the latest attempts {:.1} % were accepted, half of them within {}, 99 % within {}",
            share * 100.0,
            took(lane.p50_s),
            took(lane.p99_s)
        );
    }
    text
}

fn ago(at: Time) -> String {
    format!("{} ago ({at})", words::since(at))
}

/// The operator's next step, if there is one.
fn to_do(state: &State, lane: &Lane, name: &str) -> String {
    match state {
        State::Paused => match lane.paused.as_ref() {
            Some(pause) if pause.is_fixed() => {
                "take `paused = true` out of the configuration".to_owned()
            }
            Some(pause) if pause.by == "receiver" => format!(
                "it answered 410 Gone: ask its owner. When it is to get events again: hooktrail resume {name}"
            ),
            _ => format!("when the reason is gone: hooktrail resume {name}"),
        },
        State::QueueFails => "hooktrail check --connect finds the cause".to_owned(),
        State::Retrying | State::CircuitOpen | State::Held => {
            let remedy = lane.last_error.as_ref().map_or(OWNERS_LOG, remedy);
            format!(
                "{remedy}; hooktrail test {name} makes an attempt now, hooktrail plan {name} says when a batch is given up"
            )
        }
        State::Starting | State::Ok | State::Waiting | State::Inactive | State::Other(_)
            if lane.dead.is_some_and(|n| n > 0) =>
        {
            format!(
                "inspect the dead letters; when their cause is gone: hooktrail dead replay {name}"
            )
        }
        State::Starting | State::Ok | State::Waiting | State::Inactive | State::Other(_) => {
            String::new()
        }
    }
}

/// The remedy where the failure itself says too little.
const OWNERS_LOG: &str = "its owner's log says more";

/// The remedy for a failure.
fn remedy(e: &LastError) -> &'static str {
    use FailureKind::{
        AddressBlocked, Auth, BadAnswer, Connect, Dns, Internal, Reset, Status, Timeout, Tls,
    };
    match (e.failure(), e.status) {
        (Some(Dns), _) => "the host of its url is not known: correct the url, or the name server",
        (Some(AddressBlocked), _) => {
            "its address is not public: allow it with http.allow_addresses, if that is meant"
        }
        (Some(Connect), _) => "nothing listens there, or a firewall is in the way",
        (Some(Tls), _) => {
            "its certificate is not trusted, has expired or is another name's: hooktrail check --connect says more"
        }
        (Some(Auth), _) => {
            "there is no token for its requests: compare auth.oauth2 with what its owner gave, and see that the token's server is up; hooktrail check --connect fetches one"
        }
        (Some(Timeout), _) => {
            "it takes longer than http.timeout: make that longer, or batches smaller"
        }
        (Some(Status), Some(401 | 403)) => {
            "it does not accept the sender: compare secrets, auth and headers with its own"
        }
        (Some(Status), Some(404 | 405)) => {
            "its url leads to nothing that takes a POST: correct the path"
        }
        (Some(Status), Some(413)) => "its requests are too large for it: batch.max_bytes smaller",
        (Some(Status), Some(429)) => {
            "it gets more than it takes: http.concurrency smaller, or batches larger"
        }
        (Some(Status), Some(300..=399)) => {
            "it has moved, and no redirect is followed: correct the url"
        }
        (Some(Status), Some(400 | 422)) => "it refuses what it is sent: ask its owner which events",
        (Some(Status), Some(500..)) => "the fault is on its side: its owner's log says more",
        (Some(Status | Reset | BadAnswer | Internal) | None, _) => OWNERS_LOG,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn words(s: Value, width: usize) -> String {
        let text = story(&words::subscriber(s), width);
        assert!(text.lines().all(|l| l.chars().count() <= width.max(30)), "{text}");
        assert!(!text.contains('\u{1b}'), "{text}");
        text.split_whitespace().collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn the_story_has_the_cause_what_waits_and_what_to_do() {
        let open = json!({
            "subscriber": "siem", "state": "circuit_open", "circuit": { "state": "open", "until": "2020-01-01T00:00:00.000Z" },
            "backlog": 120, "in_hand": 1, "in_retry": 4, "next_retry_at": "2020-01-01T00:00:00.000Z", "dead": 1, "delivered": 7,
            "delivered_per_s": 0.0, "success_rate": 0.25, "p50_s": 0.012, "p99_s": 30.0, "oldest_event_at": "2020-01-01T00:00:00.000Z",
            "last_delivered_at": "2020-01-01T00:00:00.000Z",
            "last_error": { "at": "2020-01-01T00:00:00.000Z", "failure": "connect", "status": null, "cause": "refused \u{1b}[2J" },
        });
        for width in [60, 80, 140] {
            let text = words(open.clone(), width);
            for part in [
                "siem: circuit open, probe now",
                "it accepted the last batch",
                "connect: refused \\u{1b}[2J,",
                "one batch is tried now",
                "120 events in the queue, 1 event in hand, 4 batches to retry, the next one now",
                "1 dead letter: hooktrail dead list siem",
                "nothing listens there",
                "hooktrail test siem",
                "half of them within 12ms",
            ] {
                assert!(text.contains(part), "{part:?} is not in:\n{text}");
            }
        }
        let mut quick = open;
        quick["p50_s"] = json!(0.0);
        let text = words(quick, 80);
        assert!(text.contains("half of them within 1ms, 99 % within 30s"), "{text}");
    }

    #[test]
    fn each_kind_of_pause_and_failure_has_its_remedy() {
        let paused = |by: &str| {
            let pause = json!({ "by": by, "why": "w", "since": "2020-01-01T00:00:00.000Z" });
            words(json!({ "subscriber": "a", "state": "paused", "paused": pause }), 80)
        };
        assert!(paused("operator").contains("hooktrail resume a"));
        assert!(
            paused("receiver").contains("410") && paused("configuration").contains("paused = true")
        );
        let failed = |failure: &str, status: Option<u16>| {
            let error = json!({ "failure": failure, "status": status, "cause": null, "at": "2020-01-01T00:00:00Z" });
            words(json!({ "subscriber": "a", "state": "retrying", "last_error": error }), 80)
        };
        for (failure, status, part) in [
            ("dns", None, "name server"),
            ("address_blocked", None, "http.allow_addresses"),
            ("tls", None, "certificate"),
            ("timeout", None, "http.timeout"),
            ("status", Some(401), "secrets"),
            ("status", Some(404), "path"),
            ("status", Some(308), "redirect"),
            ("status", Some(503), "its side"),
            ("reset", None, "log"),
        ] {
            assert!(
                failed(failure, status).contains(part),
                "{failure} {status:?}: {}",
                failed(failure, status)
            );
        }
        assert_eq!(
            story(
                &Subscriber {
                    tenant: None,
                    subscriber: "a".to_owned(),
                    state: State::Ok,
                    origin: None,
                    why: None,
                    lane: None
                },
                80
            ),
            "a: ok\n"
        );
    }
}

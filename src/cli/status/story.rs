//! `status NAME`: the story behind one line of the table, and what to do about it.

use std::{fmt::Write as _, time::Duration};

use serde_json::Value;

use super::{count, span, state, still, text, until};
use crate::{
    cli::{terminal::hanging, text::visible},
    clock,
};

/// Where the right column begins.
const COLUMN: usize = 13;

/// Everything that is known of a subscriber, as the daemon answers it.
pub(super) fn story(s: &Value, width: usize) -> String {
    let name = text(&s["subscriber"]);
    let mut out = format!("{}\n", hanging(&format!("{name}: {}", state(s)), width, 4));
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
    line("since", since(s));
    line("last error", last_error(&s["last_error"]));
    line("circuit", circuit(s));
    line("waiting", waiting(s));
    line(
        "oldest",
        s["oldest_event_at"]
            .as_str()
            .map_or_else(String::new, |at| format!("an event that came {}", ago(at))),
    );
    line("delivered", delivered(s));
    let dead = s["dead"].as_u64().filter(|n| *n > 0);
    line(
        "dead",
        dead.map_or_else(String::new, |_| {
            format!("{}: hooktrail dead list {name}", count(&s["dead"], "dead letter(s)"))
        }),
    );
    line("what to do", to_do(s, &name));
    out
}

fn since(s: &Value) -> String {
    if let Some(at) = s["paused"]["since"].as_str() {
        return format!(
            "{}, by {}: {}",
            ago(at),
            text(&s["paused"]["by"]),
            text(&s["paused"]["why"])
        );
    }
    match (s["state"].as_str(), s["last_delivered_at"].as_str()) {
        (Some("ok" | "starting"), _) => String::new(),
        (_, Some(at)) => format!("it accepted the last batch {}", ago(at)),
        (_, None) => "it has accepted nothing since this daemon started".to_owned(),
    }
}

fn last_error(e: &Value) -> String {
    if !e.is_object() {
        return String::new();
    }
    let status = e["status"].as_u64().map(|n| format!(" {n}")).unwrap_or_default();
    let cause = e["cause"].as_str().map(|c| format!(": {}", visible(c))).unwrap_or_default();
    let at = e["at"].as_str().map(|at| format!(", {}", ago(at))).unwrap_or_default();
    format!("{}{status}{cause}{at}", text(&e["failure"]))
}

fn circuit(s: &Value) -> String {
    match (s["circuit"]["state"].as_str(), s["circuit"]["until"].as_str(), s["held_until"].as_str())
    {
        (_, _, Some(held)) => {
            format!("the receiver asked by Retry-After to be left alone{}", still(held))
        }
        (Some("open"), Some(at), _) => {
            format!("open: nothing is sent; one batch is tried {}", until(at))
        }
        (Some("half_open"), ..) => "half open: one batch is being tried".to_owned(),
        (Some("closed"), ..) => "closed: batches are sent as they come".to_owned(),
        _ => String::new(),
    }
}

fn waiting(s: &Value) -> String {
    if s["backlog"].is_null() && s["in_hand"].is_null() {
        return String::new();
    }
    let backlog = if s["backlog"].is_null() {
        "an unknown number of events".to_owned()
    } else {
        count(&s["backlog"], "event(s)")
    };
    let next = s["next_retry_at"]
        .as_str()
        .map(|at| format!(", the next one {}", until(at)))
        .unwrap_or_default();
    format!(
        "{backlog} in the queue, {} in hand, {}{next}",
        count(&s["in_hand"], "event(s)"),
        count(&s["in_retry"], "batch(es) to retry")
    )
}

fn delivered(s: &Value) -> String {
    let Some(rate) = s["delivered_per_s"].as_f64() else { return String::new() };
    let mut told = format!(
        "{} since this daemon started, {rate:.1}/s in the last minute",
        count(&s["delivered"], "event(s)")
    );
    if let Some(at) = s["last_delivered_at"].as_str() {
        told += &format!(", the last ones {}", ago(at));
    }
    if let Some(share) = s["success_rate"].as_f64() {
        let seconds = |key: &str| {
            s[key]
                .as_f64()
                .map_or_else(|| "-".to_owned(), |n| span(Duration::from_secs_f64(n.max(0.0))))
        };
        told += &format!(
            "; of the latest attempts {:.1} % were accepted, half of them within {}",
            share * 100.0,
            seconds("p50_s")
        );
        told += &format!(", 99 % within {}", seconds("p99_s"));
    }
    told
}

fn ago(at: &str) -> String {
    match humantime::parse_rfc3339(at) {
        Ok(then) => format!(
            "{} ago ({})",
            span(clock::now().duration_since(then).unwrap_or_default()),
            visible(at)
        ),
        Err(_) => visible(at),
    }
}

/// What an operator can do, if anything.
fn to_do(s: &Value, name: &str) -> String {
    match s["state"].as_str().unwrap_or_default() {
        "paused" => match s["paused"]["by"].as_str().unwrap_or_default() {
            "configuration" => "take `paused = true` out of the configuration".to_owned(),
            "receiver" => format!(
                "it answered 410 Gone: ask its owner. When it is to get events again: hooktrail resume {name}"
            ),
            _ => format!("when the reason is gone: hooktrail resume {name}"),
        },
        "queue_fails" => {
            "hooktrail check --connect says what is in the way of the queue".to_owned()
        }
        "retrying" | "circuit_open" | "held" => {
            let next = format!(
                "hooktrail test {name} makes an attempt now, hooktrail plan {name} says when a batch is given up"
            );
            format!("{}; {next}", remedy(&s["last_error"]))
        }
        _ if s["dead"].as_u64().is_some_and(|n| n > 0) => {
            format!(
                "look at the dead letters; when their cause is gone: hooktrail dead replay {name}"
            )
        }
        _ => String::new(),
    }
}

/// By what the last attempt came to.
fn remedy(e: &Value) -> &'static str {
    match (e["failure"].as_str().unwrap_or_default(), e["status"].as_u64()) {
        ("dns", _) => "the host of its url is not known: correct the url, or the name server",
        ("address_blocked", _) => {
            "its address is not public: allow it with http.allow_addresses, if that is meant"
        }
        ("connect", _) => "nobody listens there, or a firewall is in the way",
        ("tls", _) => {
            "its certificate is not trusted, has expired or is another name's: hooktrail check --connect says more"
        }
        ("timeout", _) => "it takes longer than http.timeout: make that longer, or batches smaller",
        ("status", Some(401 | 403)) => {
            "it does not accept who sends: compare secrets, auth and headers with its own"
        }
        ("status", Some(404 | 405)) => {
            "its url leads to nothing that takes a POST: correct the path"
        }
        ("status", Some(413)) => "its requests are too large for it: batch.max_bytes smaller",
        ("status", Some(429)) => {
            "it gets more than it takes: http.concurrency smaller, or batches larger"
        }
        ("status", Some(300..=399)) => "it has moved, and no redirect is followed: correct the url",
        ("status", Some(400 | 422)) => "it refuses what it is sent: ask its owner which events",
        ("status", Some(500..)) => "the fault is on its side: its owner's log says more",
        _ => "its owner's log says more",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn words(s: &Value, width: usize) -> String {
        let told = story(s, width);
        assert!(told.lines().all(|l| l.chars().count() <= width.max(30)), "{told}");
        assert!(!told.contains('\u{1b}'), "{told}");
        told.split_whitespace().collect::<Vec<_>>().join(" ")
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
            let told = words(&open, width);
            for part in [
                "siem: circuit open, probe now",
                "it accepted the last batch",
                "connect: refused \\u{1b}[2J,",
                "one batch is tried now",
                "120 events in the queue, 1 event in hand, 4 batches to retry, the next one now",
                "1 dead letter: hooktrail dead list siem",
                "nobody listens there",
                "hooktrail test siem",
                "half of them within 12ms",
            ] {
                assert!(told.contains(part), "{part:?} is not in:\n{told}");
            }
        }
    }

    #[test]
    fn each_kind_of_pause_and_failure_has_its_remedy() {
        let paused = |by: &str| {
            let pause = json!({ "by": by, "why": "w", "since": "2020-01-01T00:00:00.000Z" });
            words(&json!({ "subscriber": "a", "state": "paused", "paused": pause }), 80)
        };
        assert!(paused("operator").contains("hooktrail resume a"));
        assert!(
            paused("receiver").contains("410") && paused("configuration").contains("paused = true")
        );
        let failed = |failure: &str, status: Option<u16>| {
            let error = json!({ "failure": failure, "status": status, "cause": null, "at": "x" });
            words(&json!({ "subscriber": "a", "state": "retrying", "last_error": error }), 80)
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
        assert_eq!(words(&json!({ "subscriber": "a", "state": "ok" }), 80), "a: ok");
    }
}

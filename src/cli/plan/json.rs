//! A plan for programs.

use std::time::Duration;

use serde_json::{Value, json};

use super::forecast::{Limit, Plan, footprint, limit, open_times};
use crate::{cli::daemon::ReloadPreview, config::Config};

/// The most attempts in JSON.
const MAX_ROWS: u32 = 1000;

pub(super) fn as_json(config: &Config, plans: &[Plan<'_>], preview: &ReloadPreview) -> Value {
    let daemon = match preview {
        ReloadPreview::Unknown { why } => json!({ "reload": null, "why": why }),
        ReloadPreview::Refused { address, error } => {
            json!({ "address": address.to_string(), "reload": { "error": error } })
        }
        ReloadPreview::Changes { address, answer } => {
            json!({ "address": address.to_string(), "reload": answer.raw })
        }
    };
    json!({
        "config": config.path.display().to_string(),
        "subscribers": plans.iter().map(subscriber_as_json).collect::<Vec<_>>(),
        "requests_open": plans.iter().map(|p| p.bounds.requests).sum::<usize>(),
        "memory_bytes": {
            "full_batches": plans.iter().map(|p| p.bounds.usual).sum::<u64>(),
            "largest_events": plans.iter().map(|p| p.bounds.worst).sum::<u64>(),
        },
        "rabbitmq": footprint(config).map(|f| json!({
            "queues": f.queues,
            "file_descriptors": f.descriptors,
            "connections": f.connections,
        })),
        "daemon": daemon,
    })
}

fn subscriber_as_json(plan: &Plan<'_>) -> Value {
    let Plan { subscriber: s, ladder, courses: [middle, shortest, longest], bounds } = plan;
    let retry = s.retry.options();
    let attempt = |number: u32| {
        let a = middle.attempt(number);
        let (least, most) =
            if number == 1 { (Duration::ZERO, Duration::ZERO) } else { middle.spread(number) };
        let mut row = json!({
            "attempt": number,
            "after_s": a.after.as_secs_f64(),
            "after_min_s": least.as_secs_f64(),
            "after_max_s": most.as_secs_f64(),
            "since_first_s": a.since_first.as_secs_f64(),
        });
        if *ladder {
            row["hops"] = a.hops.into();
        }
        row
    };
    let ends =
        [shortest.end(), longest.end()].map(|end| end.map(|end| end.since_first.as_secs_f64()));
    let end = middle.end().map(|end| {
        let because = match limit(&retry, end.number) {
            Limit::Attempts => "max_attempts",
            Limit::Elapsed => "max_elapsed_time",
        };
        let at = end.since_first.as_secs_f64();
        json!({
            "attempts": end.number,
            "because": because,
            "then": retry.on_exhausted.name(),
            "since_first_s": at,
            "since_first_min_s": ends.iter().flatten().copied().fold(at, f64::min),
            "since_first_max_s": ends.iter().flatten().copied().fold(at, f64::max),
        })
    });
    json!({
        "name": s.name,
        "paused": s.paused,
        "attempts": middle.rows(MAX_ROWS).into_iter().map(attempt).collect::<Vec<_>>(),
        "end": end,
        "circuit_open_s": open_times(&s.circuit_breaker).iter().map(Duration::as_secs_f64).collect::<Vec<_>>(),
        "requests_open": bounds.requests,
        "taken": { "events": bounds.window.events, "failed_batches": bounds.window.envelopes },
        "memory_bytes": { "full_batches": bounds.usual, "largest_events": bounds.worst },
        "longest_hold_s": bounds.hold.as_secs_f64(),
    })
}

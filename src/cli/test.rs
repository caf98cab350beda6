//! `test`: one event to one subscriber, at once, and what the daemon would make of the answer.

use std::{fmt::Write as _, time::Duration};

use serde_json::json;

use super::{Failed, find, visible};
use crate::{
    clock,
    config::{Config, Subscriber},
    event,
    retry::{Exhausted, MAX_DELAY, Next},
    tls::SystemRoots,
    webhook::{Failure, Outcome, Rehearsal, Request, Webhook},
};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The subscriber's name
    subscriber: String,
    /// One JSON object instead of text
    #[arg(long)]
    json: bool,
}

pub(super) async fn run(config: &Config, args: &Args) -> Result<(), Failed> {
    let subscriber = find(config, &args.subscriber)?;
    let webhook = Webhook::try_new(subscriber, &SystemRoots::load().map_err(Failed::Runtime)?).map_err(Failed::Runtime)?;
    let body = body(subscriber);
    let request = Request { batch_id: clock::batch_id(), attempt: 1, format: subscriber.format, body: body.clone().into(), replay: false };
    let started = clock::instant();
    let rehearsal = webhook.rehearse(request).await;
    let took = clock::instant() - started;
    let (word, verdict) = verdict(subscriber, &rehearsal.outcome);
    if args.json {
        println!("{}", as_json(subscriber, &body, &rehearsal, took, word, &verdict));
    } else {
        print!("{}", as_text(subscriber, &body, &rehearsal, took, &verdict));
    }
    match rehearsal.outcome {
        Outcome::Delivered { .. } => Ok(()),
        _ => Err(Failed::Runtime(format!("`{}` did not accept the event", subscriber.name))),
    }
}

/// A batch of one event, as the daemon would make it.
fn body(subscriber: &Subscriber) -> Vec<u8> {
    let event = json!({
        "event": "hooktrail.test",
        "description": "sent a test event",
        "actor": { "name": "hooktrail" },
        "timestamp": clock::unix_seconds(clock::now()),
    });
    let plain = event.to_string().into_bytes();
    let with_id = if subscriber.event_ids { event::with_id(&plain, &clock::event_id()) } else { None };
    let event = with_id.unwrap_or(plain);
    subscriber.format.splice([event.as_slice()].into_iter(), event.len())
}

fn failure(outcome: &Outcome) -> Option<&Failure> {
    match outcome {
        Outcome::Delivered { .. } => None,
        Outcome::Retry { failure, .. }
        | Outcome::Gone { failure }
        | Outcome::TooLarge { failure, .. }
        | Outcome::Refused { failure, .. } => Some(failure),
    }
}

/// What the daemon would make of it, in one word and for people.
fn verdict(subscriber: &Subscriber, outcome: &Outcome) -> (&'static str, String) {
    match outcome {
        Outcome::Delivered { .. } => ("delivered", "delivered: the batch would be done".to_owned()),
        Outcome::Retry { retry_after, .. } => {
            let (word, text) = after_failure(subscriber, *retry_after);
            (word, format!("{text}{}", held(subscriber, *retry_after)))
        }
        Outcome::Gone { .. } => {
            let text = "paused: the batch would be kept, and nothing sent until `hooktrail resume`, since 410 asks to be left alone";
            ("paused", text.to_owned())
        }
        Outcome::TooLarge { .. } => (
            "too_large",
            "dead letter, reason `too_large`: even one event is too much for it; a batch of several would be sent in halves".to_owned(),
        ),
        Outcome::Refused { retry_after, .. } => {
            let (_, text) = after_failure(subscriber, *retry_after);
            let text = format!(
                "{text}; but if the endpoint had accepted something since it last failed in another way: dead letter, reason `refused`, \
                 and of a batch of several only those that it refuses"
            );
            ("refused", text)
        }
    }
}

fn after_failure(subscriber: &Subscriber, retry_after: Option<Duration>) -> (&'static str, String) {
    let retry = &subscriber.retry;
    let now = clock::now();
    match (retry.next(1, now, now, retry_after, 0.5), retry.on_exhausted()) {
        (Next::After(delay), _) => {
            let most = match retry.options().max_attempts {
                0 => "as often as it takes".to_owned(),
                most => format!("at most {most} attempts in all"),
            };
            ("retry", format!("retry: the same batch again after about {}, {most}", humantime::format_duration(delay)))
        }
        (Next::Exhausted, Exhausted::DeadLetter) => {
            ("dead_letter", "dead letter, reason `exhausted`: [retry] allows no other attempt".to_owned())
        }
        (Next::Exhausted, Exhausted::Pause) => {
            ("paused", "paused: [retry] allows no other attempt, and on_exhausted is \"pause\"".to_owned())
        }
    }
}

fn held(subscriber: &Subscriber, retry_after: Option<Duration>) -> String {
    let Some(wait) = retry_after else { return String::new() };
    let hold = wait.min(MAX_DELAY).min(subscriber.circuit_breaker.max_open_for);
    format!("; Retry-After: nothing else would be sent to it for {}", humantime::format_duration(hold))
}

fn as_text(subscriber: &Subscriber, body: &[u8], rehearsal: &Rehearsal, took: Duration, verdict: &str) -> String {
    let mut out = String::new();
    let mut line = |text: String| writeln!(out, "{text}").unwrap_or_default();
    line(format!("POST {}  (the rest of the URL is not shown)", subscriber.url));
    for (name, value) in &rehearsal.headers {
        line(format!("{name}: {}", value.as_deref().map_or_else(|| "[redacted]".to_owned(), visible)));
    }
    line(format!("\n{}\n", visible(String::from_utf8_lossy(body).trim_end())));
    match (&rehearsal.answer, failure(&rehearsal.outcome)) {
        (Some((status, text)), _) if text.is_empty() => line(format!("answer:  {status}")),
        (Some((status, text)), _) => line(format!("answer:  {status}  {}", visible(text))),
        (None, failure) => line(format!("failure: {}", visible(&failure.map(ToString::to_string).unwrap_or_default()))),
    }
    line(format!("time:    {} ms", took.as_millis()));
    line(format!("outcome: {verdict}"));
    out
}

fn as_json(subscriber: &Subscriber, body: &[u8], rehearsal: &Rehearsal, took: Duration, word: &str, verdict: &str) -> serde_json::Value {
    let headers: serde_json::Map<_, _> =
        rehearsal.headers.iter().map(|(n, v)| (n.clone(), v.as_deref().unwrap_or("[redacted]").into())).collect();
    let failure = failure(&rehearsal.outcome);
    json!({
        "subscriber": subscriber.name,
        "url": subscriber.url.to_string(),
        "headers": headers,
        "body": String::from_utf8_lossy(body),
        "status": rehearsal.answer.as_ref().map(|(status, _)| status),
        "answer": rehearsal.answer.as_ref().map(|(_, text)| text),
        "failure": failure.map(Failure::name),
        "error": failure.and_then(Failure::cause),
        "duration_ms": took.as_millis() as u64,
        "outcome": word,
        "verdict": verdict,
    })
}

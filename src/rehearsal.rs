//! One signed test event to a subscriber, at once, and what the daemon would make of the answer.

use std::time::Duration;

use serde_json::json;

use crate::{
    clock,
    config::Subscriber,
    event,
    retry::{Exhausted, MAX_DELAY, Next},
    tls::SystemRoots,
    webhook::{Failure, Outcome, Rehearsal, Request, Webhook},
    wording::counted,
};

/// What came of it.
#[derive(Debug)]
pub struct Report {
    subscriber: String,
    /// Its origin.
    pub url: String,
    pub body: Vec<u8>,
    pub rehearsal: Rehearsal,
    pub took: Duration,
    /// What the daemon would make of it, in one word and for people.
    pub outcome: &'static str,
    pub verdict: String,
}

/// Sends an event `hooktrail.test` as the daemon would send a batch of it, without queue and without daemon.
///
/// # Errors
/// It cannot even be tried.
pub async fn rehearse(subscriber: &Subscriber) -> Result<Report, String> {
    let webhook = Webhook::try_new(subscriber, &SystemRoots::load()?)?;
    let body = body(subscriber);
    let request = Request { batch_id: clock::batch_id(), attempt: 1, format: subscriber.format, body: body.clone().into(), replay: false };
    let started = clock::instant();
    let rehearsal = webhook.rehearse(request).await;
    let took = clock::instant() - started;
    let (outcome, verdict) = verdict(subscriber, &rehearsal.outcome);
    Ok(Report { subscriber: subscriber.name.clone(), url: subscriber.url.to_string(), body, rehearsal, took, outcome, verdict })
}

impl Report {
    pub fn is_delivered(&self) -> bool {
        matches!(self.rehearsal.outcome, Outcome::Delivered { .. })
    }

    pub fn failure(&self) -> Option<&Failure> {
        match &self.rehearsal.outcome {
            Outcome::Delivered { .. } => None,
            Outcome::Retry { failure, .. }
            | Outcome::Gone { failure }
            | Outcome::TooLarge { failure, .. }
            | Outcome::Refused { failure, .. } => Some(failure),
        }
    }

    /// Without what is secret.
    pub fn as_json(&self) -> serde_json::Value {
        let headers: serde_json::Map<_, _> =
            self.rehearsal.headers.iter().map(|(n, v)| (n.clone(), v.as_deref().unwrap_or("[redacted]").into())).collect();
        let (answer, failure) = (self.rehearsal.answer.as_ref(), self.failure());
        json!({
            "subscriber": self.subscriber,
            "url": self.url,
            "headers": headers,
            "body": String::from_utf8_lossy(&self.body),
            "status": answer.map(|(status, _)| status),
            "answer": answer.map(|(_, text)| text),
            "failure": failure.map(Failure::name),
            "error": failure.and_then(Failure::cause),
            "duration_ms": self.took.as_millis() as u64,
            "outcome": self.outcome,
            "verdict": self.verdict,
        })
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
                most => format!("at most {} in all", counted(most, "attempt(s)")),
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

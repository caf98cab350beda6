//! One signed test event to a subscriber, and the verdict of a daemon on the answer.

use std::{fmt::Write as _, time::Duration};

use serde_json::json;

use crate::{
    clock,
    config::Subscriber,
    crypto::tls::SystemRoots,
    delivery::{
        BatchId, Disposition, DispositionKind, Failure, Outcome, PauseCause, Reason, SubscriberName,
    },
    endpoint::webhook::{Request, TestAttempt, Webhook, example_headers},
    event::{
        self,
        entry::{self, Entry},
    },
    policy::{
        answer::Health,
        verdict::{Attempt, Origin, decide, decide_in_order},
    },
    wording::counted,
};

/// The result of a test event.
#[derive(Debug)]
pub struct Report {
    pub subscriber: SubscriberName,
    /// The origin and path, without anything that may be a token.
    pub url: String,
    pub body: Vec<u8>,
    pub attempt: TestAttempt,
    pub took: Duration,
    /// The verdict of a daemon: in one word, and for people.
    pub outcome: &'static str,
    pub verdict: String,
}

/// Sends an event `hooktrail.test` as a daemon would send a batch with it, without queue and daemon.
///
/// # Errors
/// It cannot be tried.
pub async fn send(subscriber: &Subscriber) -> Result<Report, String> {
    let webhook = Webhook::try_new(subscriber, &SystemRoots::load()?)?;
    let (request, body) = request(subscriber);
    let started = clock::instant();
    let attempt = webhook.test(request).await;
    let took = clock::instant() - started;
    let (outcome, verdict) = verdict(subscriber, &attempt, body.len());
    Ok(Report {
        subscriber: subscriber.name.clone(),
        url: subscriber.url.with_path(),
        body,
        attempt,
        took,
        outcome,
        verdict,
    })
}

/// The request of a test event.
#[derive(Debug)]
pub struct Example {
    /// In their order; the value of a secret one is `None`.
    pub headers: Vec<(String, Option<String>)>,
    pub body: Vec<u8>,
}

/// The request that [`send`] would make now, which is not sent.
///
/// # Errors
/// A header cannot be sent.
pub fn example(subscriber: &Subscriber) -> Result<Example, String> {
    let (request, body) = request(subscriber);
    Ok(Example { headers: example_headers(subscriber, &request)?, body })
}

fn request(subscriber: &Subscriber) -> (Request, Vec<u8>) {
    let batch_id = BatchId::random();
    let body = body(subscriber, &batch_id);
    let request = Request {
        batch_id,
        attempt: 1,
        format: subscriber.format,
        body: body.clone().into(),
        traceparent: None,
        replay: false,
    };
    (request, body)
}

impl Report {
    pub fn is_delivered(&self) -> bool {
        matches!(self.attempt.outcome, Outcome::Delivered { .. })
    }

    pub fn failure(&self) -> Option<&Failure> {
        self.attempt.outcome.failure()
    }
}

/// The body of a batch with one event.
fn body(subscriber: &Subscriber, batch_id: &BatchId) -> Vec<u8> {
    let event = json!({
        "event": "hooktrail.test",
        "description": "sent a test event",
        "actor": { "name": "hooktrail" },
        "timestamp": clock::unix_seconds(clock::now()),
    });
    let plain = event.to_string();
    // It has all fields that can be meant, and is sent even if none is left.
    let redacted = subscriber.redaction.apply(&plain).ok().flatten();
    let plain = redacted.unwrap_or(plain).into_bytes();
    let id = clock::event_id();
    let with_id = if subscriber.event_ids { event::with_id(&plain, &id) } else { None };
    let event = with_id.map_or(plain, |with_id| with_id.body);
    let Subscriber { format, metadata, .. } = subscriber;
    // It has a type, so it has an entry in each format.
    let entry = entry::of(*format, metadata, &event, Some(&id)).ok().flatten();
    let bytes = entry.as_ref().map_or(event.len(), Entry::max_len);
    let events = [(event.as_slice(), entry.as_ref())].into_iter();
    entry::body(*format, (batch_id.as_str(), 0), events, bytes)
}

/// The verdict of a daemon on a first attempt with one event: in one word, and for people.
fn verdict(
    subscriber: &Subscriber,
    TestAttempt { outcome, refused_coding, .. }: &TestAttempt,
    body_bytes: usize,
) -> (&'static str, String) {
    let now = clock::now();
    let attempt =
        Attempt { number: 1, first_attempt_at: now, events: 1, body_bytes, origin: Origin::First };
    let decide = if subscriber.in_order { decide_in_order } else { decide };
    let decided = decide(&attempt, outcome, true, &Health::default(), &subscriber.retry, now, 0.5);
    let word = match outcome {
        // Their verdict depends on the endpoint's other answers, so the answer is named.
        Outcome::TooLarge { .. } => "too_large",
        Outcome::Refused { .. } => "refused",
        _ => decided.disposition.kind().map_or("given_back", DispositionKind::name),
    };
    let mut text = disposition_text(subscriber, decided.disposition);
    match outcome {
        Outcome::TooLarge { .. } => text.push_str("; a batch of several events would be sent in halves"),
        Outcome::Refused { .. } if subscriber.in_order => text.push_str("; of several events only those before the first that it refuses would be done"),
        Outcome::Refused { .. } => text.push_str(
            "; but if the endpoint had accepted something since it last failed in another way: dead letter, reason `refused`, \
             and of a batch of several only those that it refuses",
        ),
        Outcome::Unsent { why } => {
            write!(text, ": {why}").unwrap_or_default();
        }
        Outcome::Delivered { .. } | Outcome::Retry { .. } | Outcome::Gone { .. } => {}
    }
    if *refused_coding {
        text.push_str(
            "; it was sent compressed before, and answered 415: set http.compression = \"none\"",
        );
    }
    let for_humans = |d: Duration| humantime::format_duration(d).to_string();
    if let Some(wish) = decided.shortened_from {
        write!(
            text,
            "; Retry-After asked for {}, which is past retry.max_elapsed_time",
            for_humans(wish)
        )
        .unwrap_or_default();
    }
    if let Some(wait) = decided.hold {
        let hold = wait.min(subscriber.circuit_breaker.max_open_for);
        write!(text, "; Retry-After: nothing else would be sent to it for {}", for_humans(hold))
            .unwrap_or_default();
    }
    (word, text)
}

fn disposition_text(subscriber: &Subscriber, disposition: Disposition) -> String {
    match disposition {
        Disposition::Delivered => "delivered: the batch would be done".to_owned(),
        Disposition::Retry { delay } | Disposition::Split { delay } => {
            let most = match subscriber.retry.options().max_attempts {
                0 => "as often as it takes".to_owned(),
                most => format!("at most {} in all", counted(most, "attempt(s)")),
            };
            format!("retry: the same batch again after about {}, {most}", humantime::format_duration(delay))
        }
        Disposition::DeadLetter(Reason::TooLarge) => "dead letter, reason `too_large`: even one event is too much for it".to_owned(),
        Disposition::DeadLetter(reason) => format!("dead letter, reason `{}`: [retry] allows no other attempt", reason.name()),
        Disposition::Paused(PauseCause::Gone) => {
            "paused: the batch would be kept, and nothing sent until `hooktrail resume`, since 410 asks to be left alone".to_owned()
        }
        Disposition::Paused(PauseCause::Refused) => "paused: the event would be kept, since order is \"strict\"".to_owned(),
        Disposition::Paused(PauseCause::Exhausted) => "paused: [retry] allows no other attempt, and on_exhausted is \"pause\"".to_owned(),
        Disposition::GivenBack => "not sent, and no attempt: the queue would get the batch back as it was".to_owned(),
    }
}

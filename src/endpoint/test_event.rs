//! One signed test event to a subscriber, at once, and what the daemon would make of the answer.

use std::{fmt::Write as _, time::Duration};

use serde_json::json;

use crate::{
    clock,
    config::Subscriber,
    crypto::tls::SystemRoots,
    delivery::{
        BatchId, Disposition, DispositionKind, Failure, Outcome, PauseCause, Reason, SubscriberName,
    },
    endpoint::webhook::{Rehearsal, Request, Webhook},
    event,
    policy::{
        answer::Health,
        verdict::{Attempt, Origin, decide},
    },
    wording::counted,
};

/// What came of it.
#[derive(Debug)]
pub struct Report {
    pub subscriber: SubscriberName,
    /// Its origin and path, without what looks like a token.
    pub url: String,
    pub body: Vec<u8>,
    pub rehearsal: Rehearsal,
    pub took: Duration,
    /// What the daemon would make of it, in one word and for people.
    pub outcome: &'static str,
    pub verdict: String,
}

/// Sends an event `hooktrail.test` as the daemon would send a batch of it, without queue and
/// without daemon.
///
/// # Errors
/// It cannot even be tried.
pub async fn rehearse(subscriber: &Subscriber) -> Result<Report, String> {
    let webhook = Webhook::try_new(subscriber, &SystemRoots::load()?)?;
    let body = body(subscriber);
    let request = Request {
        batch_id: BatchId::random(),
        attempt: 1,
        format: subscriber.format,
        body: body.clone().into(),
        replay: false,
    };
    let started = clock::instant();
    let rehearsal = webhook.rehearse(request).await;
    let took = clock::instant() - started;
    let (outcome, verdict) = verdict(subscriber, &rehearsal.outcome, body.len());
    Ok(Report {
        subscriber: subscriber.name.clone(),
        url: subscriber.url.with_path(),
        body,
        rehearsal,
        took,
        outcome,
        verdict,
    })
}

impl Report {
    pub fn is_delivered(&self) -> bool {
        matches!(self.rehearsal.outcome, Outcome::Delivered { .. })
    }

    pub fn failure(&self) -> Option<&Failure> {
        self.rehearsal.outcome.failure()
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
    let with_id =
        if subscriber.event_ids { event::with_id(&plain, &clock::event_id()) } else { None };
    let event = with_id.unwrap_or(plain);
    subscriber.format.splice([event.as_slice()].into_iter(), event.len())
}

/// What the daemon would make of it, in one word and for people: what it decides of a first attempt
/// with one event.
fn verdict(
    subscriber: &Subscriber,
    outcome: &Outcome,
    body_bytes: usize,
) -> (&'static str, String) {
    let now = clock::now();
    let attempt =
        Attempt { number: 1, first_attempt_at: now, events: 1, body_bytes, origin: Origin::First };
    let decided = decide(&attempt, outcome, true, &Health::default(), &subscriber.retry, now, 0.5);
    let word = match outcome {
        // They depend on what else the endpoint answers, so the answer has the word.
        Outcome::TooLarge { .. } => "too_large",
        Outcome::Refused { .. } => "refused",
        _ => decided.disposition.kind().map_or("given_back", DispositionKind::name),
    };
    let mut text = disposition_text(subscriber, decided.disposition);
    match outcome {
        Outcome::TooLarge { .. } => text.push_str("; a batch of several events would be sent in halves"),
        Outcome::Refused { .. } => text.push_str(
            "; but if the endpoint had accepted something since it last failed in another way: dead letter, reason `refused`, \
             and of a batch of several only those that it refuses",
        ),
        Outcome::Unsent { why } => {
            write!(text, ": {why}").unwrap_or_default();
        }
        Outcome::Delivered { .. } | Outcome::Retry { .. } | Outcome::Gone { .. } => {}
    }
    let for_humans = |d: Duration| humantime::format_duration(d).to_string();
    if let Some(wish) = decided.shortened {
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
        Disposition::Paused(PauseCause::Exhausted) => "paused: [retry] allows no other attempt, and on_exhausted is \"pause\"".to_owned(),
        Disposition::GivenBack => "not sent, and no attempt: the queue would get the batch back as it was".to_owned(),
    }
}

//! The batches of a session that are in flight.

use std::{
    collections::BTreeSet,
    sync::Arc,
    time::{Duration, SystemTime},
};

use sha2::{Digest as _, Sha256};

use crate::{
    clock,
    config::Subscriber,
    delivery::{
        AttemptLog, AttemptResult, Batch, BatchId, FailedAttempt, Failure, FailureKind, Outcome,
        Print, Trace, is_traceparent,
    },
    event::entry::{self, Entry, Metadata},
    policy::{
        circuit_breaker::Begun,
        turn::Turn,
        verdict::{Attempt, Origin},
    },
    queue::{Event, Receipt, SettleError},
};

/// The traces of events that the log shows of one batch.
const LINKS: usize = 16;

/// An event that may go into a batch.
#[derive(Debug)]
pub(super) struct Admitted {
    pub(super) event: Event,
    /// What stands for it in a request body, if that is not the event itself.
    pub(super) entry: Option<Entry>,
    /// The most bytes of that.
    pub(super) bytes: usize,
    /// The field `timestamp`.
    pub(super) happened_at: Option<SystemTime>,
    pub(super) arrived_at: SystemTime,
}

/// A batch in flight, with what its attempt needs.
#[derive(Debug)]
pub(super) struct InFlight {
    /// `attempts` includes this one. The log gets it only if it fails.
    pub(super) batch: Batch,
    pub(super) receipts: Vec<Receipt>,
    /// The field `timestamp` of the first event.
    pub(super) happened_at: Option<SystemTime>,
    /// When the first event arrived, as far as the queue knows.
    pub(super) arrived_at: SystemTime,
    pub(super) turn: Turn,
}

impl InFlight {
    /// The attempt that has ended, before its result is in the attempt log.
    pub(super) fn as_attempt(&self, now: SystemTime) -> Attempt {
        let batch = &self.batch;
        let last = batch.attempt_log.last();
        let was_reset = last.is_some_and(|a| match &a.result {
            AttemptResult::Failure(name) => name == FailureKind::Reset.name(),
            AttemptResult::Status(_) => false,
        });
        let origin = match self.turn {
            Turn::First => Origin::First,
            Turn::Retry => {
                Origin::Again { part: batch.id.is_half(), failed_at: last.map(|a| a.at), was_reset }
            }
        };
        Attempt {
            number: batch.attempts,
            first_attempt_at: batch.first_attempt_at.unwrap_or(now),
            events: batch.events,
            body_bytes: batch.body.len(),
            origin,
        }
    }

    /// The SHA-256 of the body.
    pub(super) fn digest(&self) -> [u8; 32] {
        Sha256::digest(&self.batch.body).into()
    }

    pub(super) fn add_failure(&mut self, failure: &Failure, at: SystemTime) {
        self.batch.attempt_log.add(FailedAttempt {
            number: self.batch.attempts,
            at,
            result: failure.into(),
        });
    }
}

/// The result of a task of the session.
#[derive(Debug)]
pub(super) enum Done {
    Attempted {
        number: u64,
        in_flight: Box<InFlight>,
        outcome: Outcome,
        took: Duration,
    },
    /// `stored`: messages were written, and not only acks.
    Settled {
        stored: bool,
        result: Result<(), SettleError>,
    },
}

/// An attempt whose outcome is not known.
#[derive(Debug)]
pub(super) struct Started {
    pub(super) events: u64,
    /// When the first event arrived.
    pub(super) arrived_at: SystemTime,
    pub(super) generation: u64,
    pub(super) begun: Begun,
}

/// The batch of a first attempt; from here on its bytes and its id do not change.
pub(super) fn first_attempt(
    subscriber: &Subscriber,
    events: Vec<Admitted>,
    bytes: usize,
) -> InFlight {
    let format = subscriber.format;
    let now = clock::now();
    let (happened_at, arrived_at) =
        events.first().map_or((None, now), |e| (e.happened_at, e.arrived_at));
    let traces = events.iter().map(|e| e.event.traceparent.as_deref());
    let trace = Trace::of(traces.map(|text| text.filter(|text| is_traceparent(text))));
    let prints: Arc<[Print]> = events.iter().map(|e| e.event.checked.print).collect();
    let id = id_of(subscriber, &events, &prints);
    if let Trace::New(new) = &trace {
        log_links(subscriber, &id, new, &events);
    }
    let entries = events.iter().map(|e| (&e.event.body[..], e.entry.as_ref()));
    let batch = Batch {
        body: entry::body(format, (id.as_str(), 0), entries, bytes).into(),
        id,
        format,
        events: u32::try_from(events.len()).unwrap_or(u32::MAX),
        attempts: 1,
        first_attempt_at: Some(now),
        traceparent: trace.into_text(),
        attempt_log: AttemptLog::default(),
        prints: Some(prints),
        replay: false,
    };
    let receipts = events.iter().map(|e| e.event.receipt).collect();
    InFlight { batch, receipts, happened_at, arrived_at, turn: Turn::First }
}

/// Links the trace of a batch with those of its events.
fn log_links(subscriber: &Subscriber, id: &BatchId, traceparent: &str, events: &[Admitted]) {
    let all: BTreeSet<&str> =
        events.iter().filter_map(|e| e.event.traceparent.as_deref()).collect();
    let links: Vec<&str> = all.iter().copied().take(LINKS).collect();
    tracing::debug!(
        subscriber = subscriber.name.as_str(),
        batch_id = id.as_str(),
        traceparent,
        traces = all.len(),
        links = links.join(" "),
        "a batch with events of several traces has a new one"
    );
}

fn id_of(subscriber: &Subscriber, events: &[Admitted], prints: &[Print]) -> BatchId {
    let numbers: Option<Vec<u64>> = events.iter().map(|e| e.event.number).collect();
    let Some(numbers) = numbers else { return BatchId::random() };
    let times = events.iter().map(|e| e.event.published_at);
    let all = numbers.into_iter().zip(times).zip(prints);
    let ids = if subscriber.event_ids { "with ids" } else { "" };
    let mut form = format!("{} {ids}", subscriber.format.label());
    if !subscriber.redaction.is_none() {
        form.push_str(&format!("\0redact {}", subscriber.redaction.label()));
    }
    let Metadata { source, sourcetype, index } = &subscriber.metadata;
    for (name, text) in [("source", source), ("sourcetype", sourcetype), ("index", index)] {
        if let Some(text) = text {
            form.push_str(&format!("\0{name}={text}"));
        }
    }
    BatchId::of_events(
        &subscriber.name,
        &form,
        all.map(|((number, at), print)| (number, at, *print)),
    )
}

/// The time of a field `timestamp`; `None` if it is beyond every clock.
pub(super) fn happened_at(timestamp: Option<u64>) -> Option<SystemTime> {
    SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(timestamp?))
}

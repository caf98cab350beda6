//! Which events of history go into a replay's batches. No I/O: the same rows make the same batches.

use std::time::{Duration, Instant};

use bytes::Bytes;
use sha2::{Digest as _, Sha256};

use crate::{
    config::Subscriber,
    delivery::{AttemptLog, Batch, BatchId, Print},
    event::{
        condition::{Condition, Conditions},
        entry::{self, Entry},
        head,
        redaction::Redaction,
        with_id,
    },
    store::{EventNumber, EventRow, Replay, ReplayOrder, ReplayProgress},
};

/// Reads rows in their order, and cuts what they hold into batches.
#[derive(Debug)]
pub(super) struct Filling {
    id: String,
    order: ReplayOrder,
    values: Values,
    /// Up to the last row that was added.
    progress: ReplayProgress,
    events: Vec<Chosen>,
    /// The most bytes of their entries.
    bytes: usize,
}

/// An event for the next batch.
#[derive(Debug)]
struct Chosen {
    number: EventNumber,
    body: Bytes,
    entry: Option<Entry>,
    print: Print,
}

/// A batch, and how far the replay has come once it is in the subscriber's queue.
#[derive(Debug)]
pub(super) struct Filled {
    pub(super) batch: Batch,
    pub(super) progress: ReplayProgress,
}

impl Filling {
    pub(super) fn new(replay: &Replay, values: Values) -> Self {
        Self {
            id: replay.id.clone(),
            order: replay.order.clone(),
            values,
            progress: replay.progress.clone(),
            events: Vec::new(),
            bytes: 0,
        }
    }

    /// What the batches are made by.
    pub(super) fn values(&self) -> &Values {
        &self.values
    }

    /// The progress up to the last row that was added.
    pub(super) fn progress(&self) -> &ReplayProgress {
        &self.progress
    }

    /// Adds the next row. Returns a batch that is full.
    pub(super) fn add(&mut self, row: &EventRow) -> Option<Filled> {
        let is_chosen = is_chosen(&self.order, row, &self.values);
        let chosen = is_chosen.then(|| sendable(&self.order, row, &self.values));
        let mut filled = None;
        if let Some(Some((.., bytes))) = &chosen
            && !self.fits(*bytes)
        {
            // Before this row is counted: a replay that goes on there reads it again.
            filled = self.cut();
        }
        self.progress.position = row.number;
        self.progress.read += 1;
        self.progress.matched += u64::from(chosen.is_some());
        match chosen {
            None => {}
            Some(None) => self.progress.unusable += 1,
            Some(Some((body, entry, bytes))) => {
                self.bytes += bytes;
                let print = Print::from_sha256(&row.sha256);
                self.events.push(Chosen { number: row.number, body, entry, print });
            }
        }
        let is_full = self.events.len() >= self.order.max_events;
        if is_full { self.cut() } else { filled }
    }

    /// The last batch, when there are no more rows.
    pub(super) fn end(&mut self) -> Option<Filled> {
        self.cut()
    }

    /// Whether an event fits into the batch. One that is too large for any is not chosen.
    fn fits(&self, bytes: usize) -> bool {
        let ReplayOrder { format, max_bytes, .. } = &self.order;
        let len = format.body_len(self.events.len() + 1, self.bytes + bytes);
        self.events.is_empty() || len <= *max_bytes
    }

    fn cut(&mut self) -> Option<Filled> {
        let events = std::mem::take(&mut self.events);
        let bytes = std::mem::take(&mut self.bytes);
        let first = events.first()?.number;
        let format = self.order.format;
        let id = batch_id(&self.id, first, &self.values);
        let entries = events.iter().map(|e| (&e.body[..], e.entry.as_ref()));
        self.progress.enqueued += events.len() as u64;
        self.progress.batches += 1;
        let batch = Batch {
            body: entry::body(format, (id.as_str(), 0), entries, bytes).into(),
            id,
            format,
            events: u32::try_from(events.len()).unwrap_or(u32::MAX),
            attempts: 0,
            first_attempt_at: None,
            traceparent: None,
            attempt_log: AttemptLog::default(),
            prints: Some(events.iter().map(|e| e.print).collect()),
            replay: true,
        };
        Some(Filled { batch, progress: self.progress.clone() })
    }
}

/// What a subscriber says of values, as it is configured today: what it is not to see now, no replay
/// may show it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(in crate::history) struct Values {
    pub(in crate::history) conditions: Conditions,
    pub(in crate::history) redaction: Redaction,
}

impl Values {
    pub(in crate::history) fn of(subscriber: &Subscriber) -> Self {
        let Subscriber { conditions, redaction, .. } = subscriber;
        Self { conditions: conditions.clone(), redaction: redaction.clone() }
    }

    /// What tells them from others, without a secret; empty if they say nothing.
    fn label(&self) -> String {
        let mut label = String::new();
        for Condition { place, values } in self.conditions.all() {
            label.push_str(&format!("\0{place}={}", values.join("\0")));
        }
        if !self.redaction.is_none() {
            label.push_str(&format!("\0redact {}", self.redaction.label()));
        }
        label
    }
}

/// Whether an event is one of the replay's.
pub(super) fn is_chosen(order: &ReplayOrder, row: &EventRow, values: &Values) -> bool {
    row.at >= order.since
        && order.until.is_none_or(|until| row.at < until)
        && (order.tenant.is_none() || order.tenant == row.tenant)
        && order.patterns.iter().any(|pattern| pattern.matches(&row.event_type))
        && order.events.as_ref().is_none_or(|pattern| pattern.matches(&row.event_type))
        && row.body.as_ref().is_none_or(|body| values.conditions.hold(body))
}

/// The bytes of an event as a lane sends them, its entry, and the most bytes of that; `None` if it
/// would give the event up.
fn sendable(
    order: &ReplayOrder,
    row: &EventRow,
    values: &Values,
) -> Option<(Bytes, Option<Entry>, usize)> {
    let ReplayOrder { format, metadata, .. } = order;
    let fits = |bytes: usize| format.body_len(1, bytes) <= order.max_bytes;
    let body = row.body.as_ref().filter(|body| head(body).is_ok())?;
    let id = row.message_id.as_deref();
    let body = as_sent(body, id.filter(|_| order.event_ids), &values.redaction)?;
    let entry = entry::of(*format, metadata, &body, id).ok()?;
    let bytes = entry.as_ref().map_or(body.len(), Entry::max_len);
    fits(bytes).then_some((body, entry, bytes))
}

/// An event without what is redacted, and with its id as its field `event_id`, if it has none; `None`
/// of one that cannot be redacted.
pub(in crate::history) fn as_sent(
    body: &Bytes,
    id: Option<&str>,
    redaction: &Redaction,
) -> Option<Bytes> {
    let redacted = match redaction.is_none() {
        true => None,
        false => redaction.apply(std::str::from_utf8(body).ok()?).ok()?,
    };
    let body = redacted.map_or_else(|| body.clone(), Bytes::from);
    let with_id = id.and_then(|id| with_id(&body, id));
    Some(with_id.map_or(body, |with_id| with_id.body.into()))
}

/// Always the same for a replay and the first row of a batch, as long as its events are chosen and
/// redacted in the same way.
fn batch_id(replay: &str, first: EventNumber, values: &Values) -> BatchId {
    let digest = Sha256::digest(format!("{replay}:{first}{}", values.label()));
    let digits: String = digest.iter().take(16).map(|byte| format!("{byte:02x}")).collect();
    BatchId::from(format!("msg_{digits}"))
}

/// Keeps to a number of events in a second.
#[derive(Debug)]
pub(super) struct Pace {
    rate: Option<u32>,
    free_at: Option<Instant>,
}

impl Pace {
    pub(super) const fn new(rate: Option<u32>) -> Self {
        Self { rate, free_at: None }
    }

    /// The time until the next batch may be enqueued.
    pub(super) fn wait(&self, now: Instant) -> Duration {
        self.free_at.map_or(Duration::ZERO, |at| at.saturating_duration_since(now))
    }

    /// Events were enqueued.
    pub(super) fn spend(&mut self, events: u32, now: Instant) {
        if let Some(rate) = self.rate.filter(|rate| *rate > 0) {
            self.free_at = Some(now + Duration::from_secs(events.into()) / rate);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use proptest::prelude::*;

    use super::*;
    use crate::{
        event::{Pattern, details::Details, entry::Metadata, payload::Format},
        store::{BatchEnds, ReplayState},
    };

    const AT: SystemTime = SystemTime::UNIX_EPOCH;

    fn order() -> ReplayOrder {
        ReplayOrder {
            by: String::new(),
            since: AT,
            until: None,
            patterns: vec![Pattern::try_new("user.*").expect("a pattern")],
            tenant: None,
            events: None,
            after: EventNumber(0),
            rate: None,
            format: Format::Json,
            metadata: Metadata::default(),
            max_events: 3,
            max_bytes: 1000,
            event_ids: false,
            bound_at: None,
        }
    }

    fn replay(order: ReplayOrder) -> Replay {
        let progress = ReplayProgress {
            position: EventNumber(0),
            upto: EventNumber(100),
            rows: 100,
            read: 0,
            matched: 0,
            enqueued: 0,
            batches: 0,
            unusable: 0,
            missing: 0,
            ends: BatchEnds::default(),
            unfinished: Vec::new(),
        };
        Replay {
            row: 1,
            id: "rpl_1".to_owned(),
            subscriber: "a".into(),
            order,
            progress,
            state: ReplayState::Running,
            created_at: AT,
            changed_at: AT,
        }
    }

    fn row(number: i64, body: &str) -> EventRow {
        let event_type = crate::event::event_type(body.as_bytes());
        EventRow {
            tenant: None,
            number: EventNumber(number),
            at: AT,
            event_type: event_type.map_or_else(|_| "user.broken".to_owned(), Into::into),
            message_id: Some(format!("id-{number}")),
            bytes: body.len() as u64,
            sha256: Sha256::digest(body).into(),
            details: Details::default(),
            body: Some(body.to_owned().into()),
        }
    }

    /// All batches of these rows from a progress on.
    fn batches(replay: &Replay, rows: &[EventRow]) -> Vec<Filled> {
        let mut filling = Filling::new(replay, Values::default());
        let rows = rows.iter().filter(|row| row.number > replay.progress.position);
        let mut all: Vec<Filled> = rows.filter_map(|row| filling.add(row)).collect();
        all.extend(filling.end());
        all
    }

    #[test]
    fn only_chosen_events_that_can_be_sent_are_in_batches_with_their_published_bytes() {
        let mut rows = vec![
            row(1, "{ \"event\":\n\"user.a\" }"),
            row(2, r#"{"event":"other.a"}"#),
            row(3, "no JSON"),
            row(4, r#"{"event":"user.b"}"#),
            row(5, &format!(r#"{{"event":"user.c","x":"{}"}}"#, "x".repeat(1000))),
            row(6, r#"{"event":"user.d"}"#),
            row(7, r#"{"event":"user.e"}"#),
            row(8, r#"{"event":"user.f"}"#),
            row(9, r#"{"event":"user.g"}"#),
        ];
        rows[6].body = None;
        rows[7].at = AT + Duration::from_secs(5);
        let order =
            ReplayOrder { max_events: 2, until: Some(AT + Duration::from_secs(5)), ..order() };
        let found = batches(&replay(order.clone()), &rows);
        let bodies: Vec<&[u8]> = found.iter().map(|f| &f.batch.body[..]).collect();
        assert_eq!(
            bodies,
            [
                &b"{\"events\":[{ \"event\":\n\"user.a\" },{\"event\":\"user.b\"}]}"[..],
                b"{\"events\":[{\"event\":\"user.d\"},{\"event\":\"user.g\"}]}"
            ]
        );
        assert!(found.iter().all(|f| f.batch.replay && f.batch.attempts == 0));
        let print = |n: usize| Print::from_sha256(&rows[n].sha256);
        assert_eq!(found[1].batch.prints, Some([print(5), print(8)].into()));
        let last = &found[1].progress;
        assert_eq!((last.position, last.read, last.matched), (EventNumber(9), 9, 7));
        assert_eq!((last.enqueued, last.batches, last.unusable), (4, 2, 3));
        let narrow = ReplayOrder { events: Pattern::try_new("*.d").ok(), ..order };
        assert_eq!(batches(&replay(narrow), &rows)[0].batch.events, 1);
    }

    #[test]
    fn events_get_their_ids_where_that_is_configured() {
        let order = ReplayOrder { event_ids: true, ..order() };
        let found = batches(&replay(order), &[row(1, r#"{"event":"user.a"}"#)]);
        assert_eq!(
            &found[0].batch.body[..],
            br#"{"events":[{"event":"user.a","event_id":"id-1"}]}"#
        );
        let print = Print::of(br#"{"event":"user.a"}"#);
        assert_eq!(found[0].batch.prints, Some([print].into()));
    }

    #[test]
    fn a_pace_is_kept_on_average() {
        let now = crate::clock::instant();
        let mut pace = Pace::new(Some(50));
        assert_eq!(pace.wait(now), Duration::ZERO);
        pace.spend(100, now);
        assert_eq!(pace.wait(now), Duration::from_secs(2));
        assert_eq!(pace.wait(now + Duration::from_secs(2)), Duration::ZERO);
        let mut free = Pace::new(None);
        free.spend(1_000_000, now);
        assert_eq!(free.wait(now), Duration::ZERO);
    }

    proptest! {
        /// Killed after any batch, with or without its progress recorded.
        #[test]
        fn wherever_a_replay_goes_on_the_batches_are_the_same(
            sizes in proptest::collection::vec((0..200_usize, any::<bool>()), 0..40),
            max_events in 1..6_usize,
            max_bytes in 64..600_usize,
        ) {
            let rows: Vec<EventRow> = sizes.iter().zip(1..).map(|((size, is_chosen), n)| {
                let event = if *is_chosen { "user.a" } else { "other.a" };
                row(n, &format!(r#"{{"event":"{event}","n":{n},"x":"{}"}}"#, "x".repeat(*size)))
            }).collect();
            let order = ReplayOrder { max_events, max_bytes, ..order() };
            let whole = replay(order);
            let expected = batches(&whole, &rows);
            let events: u64 = expected.iter().map(|f| u64::from(f.batch.events)).sum();
            if let Some(last) = expected.last() {
                prop_assert_eq!(events + last.progress.unusable, last.progress.matched);
            }
            for (n, filled) in expected.iter().enumerate() {
                prop_assert!(filled.batch.body.len() <= max_bytes);
                prop_assert!(filled.batch.events as usize <= max_events);
                let later = Replay { progress: filled.progress.clone(), ..whole.clone() };
                let rest: Vec<_> = batches(&later, &rows).into_iter().map(|f| (f.batch, f.progress)).collect();
                let same: Vec<_> = expected[n + 1..].iter().map(|f| (f.batch.clone(), f.progress.clone())).collect();
                prop_assert_eq!(rest, same);
            }
        }
    }
}

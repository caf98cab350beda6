//! What each taken message is: an event for a batch, a retry, a dead letter, or a redelivery.

use std::time::SystemTime;

use super::in_flight::{Admitted, happened_at};
use crate::{
    config::Subscriber,
    delivery::{Batch, DeadLetter, MessageKind, Reason},
    event::{
        WithId,
        entry::{self, Entry},
        redaction::Redaction,
        with_id,
    },
    policy::batching::Batcher,
    queue::{Event, Receipt, Taken},
};

/// Messages that were taken together, by what follows.
#[derive(Debug, Default)]
pub(super) struct Sorted {
    pub(super) events: Vec<Admitted>,
    pub(super) retries: Vec<(Batch, Receipt)>,
    /// Messages that can never be delivered.
    pub(super) dead: Vec<(Receipt, DeadLetter)>,
    /// Redeliveries of what was settled before.
    pub(super) recognised: Vec<Receipt>,
    pub(super) recognised_events: u64,
    /// Events that the subscriber does not want.
    pub(super) filtered: Vec<Receipt>,
    /// Messages of the main queue.
    pub(super) received: u64,
}

impl Sorted {
    pub(super) fn new(
        taken: impl Iterator<Item = Taken>,
        subscriber: &Subscriber,
        batcher: &Batcher<Admitted>,
        now: SystemTime,
    ) -> Self {
        let mut sorted = Self::default();
        for item in taken {
            sorted.add(item, subscriber, batcher, now);
        }
        sorted
    }

    fn add(
        &mut self,
        item: Taken,
        subscriber: &Subscriber,
        batcher: &Batcher<Admitted>,
        now: SystemTime,
    ) {
        match item {
            Taken::Batch(batch, receipt) => self.retries.push((batch, receipt)),
            Taken::Unusable(letter, receipt) => {
                self.received += u64::from(receipt.from == MessageKind::Event);
                self.dead.push((receipt, letter));
            }
            Taken::AlreadySettled { events, receipt } => {
                self.received += u64::from(receipt.from == MessageKind::Event);
                self.recognised_events += u64::from(events);
                self.recognised.push(receipt);
            }
            Taken::Event(event) => {
                self.received += 1;
                self.add_event(event, subscriber, batcher, now);
            }
        }
    }

    /// An event that cannot go into a batch becomes a dead letter with the bytes that were
    /// published.
    fn add_event(
        &mut self,
        mut event: Event,
        subscriber: &Subscriber,
        batcher: &Batcher<Admitted>,
        now: SystemTime,
    ) {
        let published = event.body.clone();
        match prepare(&mut event, subscriber, batcher) {
            Ok(None) => self.filtered.push(event.receipt),
            Ok(Some(Prepared { timestamp, entry, bytes })) => {
                let arrived_at = event.published_at.unwrap_or(now);
                let happened_at = happened_at(timestamp);
                self.events.push(Admitted { event, entry, bytes, happened_at, arrived_at });
            }
            Err((reason, error)) => {
                let Event { content_type, message_id, receipt, .. } = event;
                let letter =
                    DeadLetter::of_event(published, content_type, message_id, reason, error, now);
                self.dead.push((receipt, letter));
            }
        }
    }
}

struct Prepared {
    /// The field `timestamp`.
    timestamp: Option<u64>,
    entry: Option<Entry>,
    /// The most bytes of its entry.
    bytes: usize,
}

/// Redacts the event, and puts its id into its body, where that is configured. `None`: the subscriber
/// does not want it.
fn prepare(
    event: &mut Event,
    subscriber: &Subscriber,
    batcher: &Batcher<Admitted>,
) -> Result<Option<Prepared>, (Reason, String)> {
    let too_large = || {
        format!(
            "its request body would have more than batch.max_bytes = {} bytes",
            subscriber.batch.max_bytes
        )
    };
    let timestamp = event.checked.timestamp.as_ref();
    let timestamp = *timestamp.map_err(|e| (Reason::InvalidEvent, e.to_string()))?;
    if !subscriber.conditions.hold(&event.body) {
        return Ok(None);
    }
    if let Some(redacted) = redacted(&subscriber.redaction, &event.body)? {
        event.body = redacted.into();
    }
    let Subscriber { format, metadata, .. } = subscriber;
    let holds_event = entry::holds_event(*format);
    if holds_event && !batcher.fits(event.body.len()) {
        return Err((Reason::TooLarge, too_large()));
    }
    let id = event.message_id.as_deref().filter(|_| subscriber.event_ids);
    if let Some(WithId { body, .. }) = id.and_then(|id| with_id(&event.body, id)) {
        if holds_event && !batcher.fits(body.len()) {
            return Err((Reason::TooLarge, format!("with its event_id {}", too_large())));
        }
        event.body = body.into();
    }
    let entry = entry::of(*format, metadata, &event.body, event.message_id.as_deref());
    let entry = entry.map_err(|why| (Reason::InvalidEvent, why.to_owned()))?;
    let bytes = entry.as_ref().map_or(event.body.len(), Entry::max_len);
    if !batcher.fits(bytes) {
        return Err((Reason::TooLarge, format!("in the format {} {}", format.name(), too_large())));
    }
    Ok(Some(Prepared { timestamp, entry, bytes }))
}

/// The event without the values that are not to be seen; `None` if it has none of them. One in which
/// they cannot be looked for is not sent.
fn redacted(redaction: &Redaction, event: &[u8]) -> Result<Option<String>, (Reason, String)> {
    if redaction.is_none() {
        return Ok(None);
    }
    let unreadable = |why: String| {
        (Reason::InvalidEvent, format!("the event cannot be redacted, so it is not sent: {why}"))
    };
    let text = std::str::from_utf8(event).map_err(|e| unreadable(e.to_string()))?;
    redaction.apply(text).map_err(|e| unreadable(e.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        config::testing::subscriber, delivery::Print, lane::in_flight::first_attempt,
        queue::Checked,
    };
    use bytes::Bytes;
    use std::time::Duration;

    const NOW: SystemTime = SystemTime::UNIX_EPOCH;

    fn event(body: &str) -> Event {
        Event {
            body: Bytes::copy_from_slice(body.as_bytes()),
            message_id: Some("id-1".to_owned()),
            content_type: None,
            published_at: None,
            traceparent: None,
            checked: Checked::of(body.as_bytes()),
            number: None,
            receipt: receipt(MessageKind::Event),
        }
    }

    fn receipt(from: MessageKind) -> Receipt {
        Receipt { from, tag: 1 }
    }

    fn sorted(subscriber: &Subscriber, taken: Vec<Taken>) -> Sorted {
        let batcher = Batcher::new(subscriber.batch.clone(), subscriber.format);
        Sorted::new(taken.into_iter(), subscriber, &batcher, NOW)
    }

    #[test]
    fn an_event_goes_into_a_batch_or_becomes_a_dead_letter_as_it_was_published() {
        let plain = subscriber("a", "batch.max_bytes = \"64B\"");
        let with_ids = subscriber("a", "batch.max_bytes = \"64B\"\nevent_ids = true");
        let short = r#"{"event":"a","timestamp":7}"#;
        let long = format!(r#"{{"event":"{}"}}"#, "a".repeat(64));
        let tight = format!(r#"{{"event":"{}"}}"#, "a".repeat(30));
        for (subscriber, body, body_or_reason) in [
            (&plain, short, Ok(short.to_owned())),
            (&plain, &long, Err(Reason::TooLarge)),
            (&plain, "no JSON", Err(Reason::InvalidEvent)),
            (&plain, &tight, Ok(tight.clone())),
            (&with_ids, &tight, Err(Reason::TooLarge)),
            (&with_ids, r#"{"event":"a"}"#, Ok(r#"{"event":"a","event_id":"id-1"}"#.to_owned())),
        ] {
            let sorted = sorted(subscriber, vec![Taken::Event(event(body))]);
            assert_eq!(sorted.received, 1, "{body}");
            match body_or_reason {
                Ok(expected) => {
                    let admitted = &sorted.events[0];
                    assert_eq!(admitted.event.body, expected.as_bytes(), "{body}");
                    assert_eq!(admitted.arrived_at, NOW, "the queue does not know it");
                }
                Err(reason) => {
                    let (_, letter) = &sorted.dead[0];
                    assert_eq!((letter.reason, &letter.body[..]), (reason, body.as_bytes()));
                }
            }
        }
        // What is not wanted is not too large, and what is redacted may fit.
        let picky = subscriber("a", "batch.max_bytes = \"64B\"\nmatch = { \"/n\" = [7] }");
        let unwanted = self::sorted(&picky, vec![Taken::Event(event(&long))]);
        assert_eq!((unwanted.filtered.len(), unwanted.dead.len()), (1, 0));
        let secret = format!(r#"{{"event":"a","s":"{}"}}"#, "a".repeat(64));
        let hiding = subscriber("a", "batch.max_bytes = \"64B\"\nredact = [\"/s\"]");
        let short_now = self::sorted(&hiding, vec![Taken::Event(event(&secret))]);
        assert_eq!(short_now.events[0].event.body, r#"{"event":"a","s":"[FILTERED]"}"#.as_bytes());
        // A dead letter has what was published.
        let text = "batch.max_bytes = \"64B\"\nredact = [\"/s\"]\nevent_ids = true";
        let dead = format!(r#"{{"event":"a","s":1,"t":"{}"}}"#, "a".repeat(30));
        let hiding = self::sorted(&subscriber("a", text), vec![Taken::Event(event(&dead))]);
        assert_eq!(
            (hiding.dead[0].1.reason, &hiding.dead[0].1.body[..]),
            (Reason::TooLarge, dead.as_bytes())
        );
        // A line is short whatever its event is, and a CloudEvent has a type.
        let slack = subscriber("a", "batch.max_bytes = \"64B\"\nformat = \"slack\"");
        let large = format!(r#"{{"event":"a","changes":"{}"}}"#, "a".repeat(64));
        assert_eq!(self::sorted(&slack, vec![Taken::Event(event(&large))]).events.len(), 1);
        let cloud = subscriber("a", "format = \"cloudevents_batch\"\nsource = \"/a\"");
        let nameless = self::sorted(&cloud, vec![Taken::Event(event(r#"{"event":""}"#))]);
        assert_eq!(nameless.dead[0].1.reason, Reason::InvalidEvent);
        let sorted = sorted(&plain, vec![Taken::Event(event(short))]);
        assert_eq!(sorted.events[0].happened_at, Some(NOW + Duration::from_secs(7)));
    }

    #[test]
    fn a_print_is_that_of_the_published_bytes_whatever_is_sent() {
        let body = "{ \"event\":\n\"a\", \"s\":1 }\n";
        for settings in [
            "",
            "event_ids = true",
            "format = \"jsonl\"\nevent_ids = true",
            "redact = [\"/s\"]\nevent_ids = true",
            "format = \"splunk_hec\"",
        ] {
            let subscriber = subscriber("a", settings);
            let sorted = sorted(&subscriber, vec![Taken::Event(event(body))]);
            let batch = first_attempt(&subscriber, sorted.events, 100).batch;
            assert_eq!(batch.prints, Some([Print::of(body.as_bytes())].into()));
        }
        let sorted = sorted(&subscriber("a", ""), vec![Taken::Event(event("no JSON"))]);
        let (_, letter) = &sorted.dead[0];
        assert!(letter.error.starts_with("the event is not JSON"), "{}", letter.error);
        assert_eq!(letter.prints, Some([Print::of(b"no JSON")].into()));
    }

    #[test]
    fn a_redelivery_counts_its_events_and_only_events_count_as_received() {
        let known = |from, events| Taken::AlreadySettled { events, receipt: receipt(from) };
        let taken = vec![known(MessageKind::Event, 1), known(MessageKind::Batch, 5)];
        let sorted = sorted(&subscriber("a", ""), taken);
        assert_eq!((sorted.recognised.len(), sorted.recognised_events, sorted.received), (2, 6, 1));
    }
}

//! What each taken message is: an event for a batch, a retry, a dead letter, or a redelivery.

use std::time::SystemTime;

use super::in_flight::{Admitted, happened_at};
use crate::{
    config::Subscriber,
    delivery::{Batch, DeadLetter, MessageKind, Reason},
    event::{head, with_id},
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
        match prepare(&mut event, subscriber, batcher) {
            Ok(timestamp) => {
                let arrived_at = event.published_at.unwrap_or(now);
                let happened_at = happened_at(timestamp);
                self.events.push(Admitted { event, happened_at, arrived_at });
            }
            Err((reason, error)) => {
                let Event { body, content_type, message_id, receipt, .. } = event;
                let letter =
                    DeadLetter::of_event(body.into(), content_type, message_id, reason, error, now);
                self.dead.push((receipt, letter));
            }
        }
    }
}

/// Puts the event's id into its body where that is configured. Returns its timestamp.
fn prepare(
    event: &mut Event,
    subscriber: &Subscriber,
    batcher: &Batcher<Admitted>,
) -> Result<Option<u64>, (Reason, String)> {
    let too_large = || {
        format!(
            "its request body would have more than batch.max_bytes = {} bytes",
            subscriber.batch.max_bytes
        )
    };
    if !batcher.fits(event.body.len()) {
        return Err((Reason::TooLarge, too_large()));
    }
    let timestamp = head(&event.body).map_err(|e| (Reason::InvalidEvent, e.to_string()))?.timestamp;
    let id = event.message_id.as_deref().filter(|_| subscriber.event_ids);
    if let Some(body) = id.and_then(|id| with_id(&event.body, id)) {
        if !batcher.fits(body.len()) {
            return Err((Reason::TooLarge, format!("with its event_id {}", too_large())));
        }
        event.body = body;
    }
    Ok(timestamp)
}

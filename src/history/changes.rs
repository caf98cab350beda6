//! The changes of deliveries that an event of a lane means.

use std::time::SystemTime;

use crate::{
    delivery::{Batch, BatchId, Disposition},
    store::{AttemptEnd, Change, Contents, DeliveryChange},
    telemetry::lane_event::{AttemptEnded, Died, LaneEvent, Settled},
};

/// Calls `change` for each change that a lane's event means.
pub(super) fn each_change(
    event: &LaneEvent<'_>,
    by: &str,
    now: SystemTime,
    mut change: impl FnMut(BatchId, Change),
) {
    match event {
        LaneEvent::AttemptStarted { batch, sha256, .. } => {
            let (attempt, contents) = (batch.attempts, contents(batch, *sha256));
            change(batch.id.clone(), Change::Started { attempt, contents, by: by.to_owned() });
        }
        LaneEvent::AttemptEnded(AttemptEnded { batch, outcome, disposition, took, .. }) => {
            if let Some(end) = AttemptEnd::of(outcome) {
                let attempt = batch.attempts;
                change(batch.id.clone(), Change::Ended { attempt, took: *took, end });
            }
            // The receiver has it, whatever becomes of the ack.
            if *disposition == Disposition::Delivered {
                change(batch.id.clone(), Change::Delivered);
            }
        }
        LaneEvent::Unsent { batch_id, .. } => change((*batch_id).clone(), Change::Interrupted),
        LaneEvent::Settled(settled) => each_settled(settled, now, change),
        LaneEvent::NotSettled(settled) => {
            for id in unsettled(settled) {
                change(id, Change::Interrupted);
            }
        }
        _ => {}
    }
}

fn each_settled(settled: &Settled, now: SystemTime, mut change: impl FnMut(BatchId, Change)) {
    match settled {
        Settled::Retries { batches, split, delay, .. } => {
            let due = now + *delay;
            if let Some(whole) = split {
                change(whole.clone(), Change::Split);
            }
            for batch in batches {
                let id = batch.id.clone();
                change(
                    id,
                    match split {
                        Some(_) => Change::Half { due, contents: contents(batch, None) },
                        None => Change::Retrying { due },
                    },
                );
            }
        }
        Settled::DeadLetters(died) => {
            for died in died {
                let Died { reason, batch_id, format, events, bytes, prints } = died.clone();
                let id = batch_id.unwrap_or_else(BatchId::random);
                let contents = Contents {
                    format,
                    events,
                    bytes: bytes as u64,
                    sha256: None,
                    prints,
                    replay: false,
                    parent: id.parent(),
                };
                change(id, Change::Dead { reason, contents: Some(contents) });
            }
        }
        Settled::Paused(id) => change(id.clone(), Change::Paused),
        Settled::Delivered | Settled::Recognised { .. } | Settled::Filtered { .. } => {}
    }
}

/// The attempted batches of a settlement, except those that the receiver has accepted.
fn unsettled(settled: &Settled) -> Vec<BatchId> {
    match settled {
        Settled::Retries { batches, split, .. } => split.as_ref().map_or_else(
            || batches.iter().map(|b| b.id.clone()).collect(),
            |whole| vec![whole.clone()],
        ),
        Settled::DeadLetters(died) => died.iter().filter_map(|d| d.batch_id.clone()).collect(),
        Settled::Paused(id) => vec![id.clone()],
        Settled::Delivered | Settled::Recognised { .. } | Settled::Filtered { .. } => Vec::new(),
    }
}

fn contents(batch: &Batch, sha256: Option<[u8; 32]>) -> Contents {
    Contents {
        format: Some(batch.format),
        events: batch.events,
        bytes: batch.body.len() as u64,
        sha256,
        prints: batch.prints.clone(),
        replay: batch.replay,
        parent: batch.id.parent(),
    }
}

/// About the bytes that a change takes.
pub(super) fn weight(change: &DeliveryChange) -> usize {
    let more = match &change.change {
        Change::Started { contents, .. }
        | Change::Half { contents, .. }
        | Change::Dead { contents: Some(contents), .. } => {
            contents.prints.as_ref().map_or(0, |prints| size_of_val(&**prints))
        }
        Change::Ended { end, .. } => end.excerpt.len(),
        _ => 0,
    };
    size_of::<DeliveryChange>() + change.id.as_str().len() + more
}

#[cfg(test)]
pub(super) mod tests {
    use std::time::Duration;

    use super::*;
    use crate::{
        delivery::{AttemptLog, Failure, FailureKind, Outcome, PauseCause, Print, Reason},
        event::payload::Format,
    };

    const NOW: SystemTime = SystemTime::UNIX_EPOCH;
    const SECOND: Duration = Duration::from_secs(1);

    pub(in crate::history) fn batch(id: &str) -> Batch {
        Batch {
            id: id.into(),
            body: "{}".into(),
            format: Format::Json,
            events: 2,
            attempts: 1,
            first_attempt_at: None,
            traceparent: None,
            attempt_log: AttemptLog::default(),
            prints: Some([Print::of(b"a"), Print::of(b"b")].into()),
            replay: true,
        }
    }

    pub(in crate::history) fn started(batch: &Batch) -> LaneEvent<'_> {
        LaneEvent::AttemptStarted { number: 1, batch, sha256: Some([7; 32]) }
    }

    pub(in crate::history) fn ended<'a>(
        batch: &'a Batch,
        outcome: &'a Outcome,
        disposition: Disposition,
    ) -> LaneEvent<'a> {
        let (number, shortened_from, took) = (1, None, SECOND);
        LaneEvent::AttemptEnded(AttemptEnded {
            number,
            batch,
            outcome,
            disposition,
            shortened_from,
            took,
        })
    }

    #[test]
    fn each_event_of_a_lane_is_recorded_as_the_changes_that_it_means() {
        let (whole, half) = (batch("msg_1"), batch("msg_1_0"));
        let contents = |sha256, parent: Option<&str>| Contents {
            format: Some(Format::Json),
            events: 2,
            bytes: 2,
            sha256,
            prints: whole.prints.clone(),
            replay: true,
            parent: parent.map(BatchId::from),
        };
        let begun = |parent| Change::Started {
            attempt: 1,
            contents: contents(Some([7; 32]), parent),
            by: "here".to_owned(),
        };
        let end = |status, failure, excerpt: &str| Change::Ended {
            attempt: 1,
            took: SECOND,
            end: AttemptEnd { status, failure, excerpt: excerpt.to_owned() },
        };
        let accepted = Outcome::Delivered { status: 204 };
        let failure = Failure::Status { status: 503, excerpt: "busy".to_owned() };
        let refused = Outcome::Retry { failure, retry_after: None };
        let retries = |batches: &[&Batch], split: Option<&str>| Settled::Retries {
            batches: batches.iter().map(|b| (*b).clone()).collect(),
            split: split.map(BatchId::from),
            delay: SECOND,
            arrived_at: NOW,
        };
        let due = NOW + SECOND;
        let died = Died {
            reason: Reason::Refused,
            batch_id: Some(half.id.clone()),
            format: Some(Format::Json),
            events: 2,
            bytes: 2,
            prints: whole.prints.clone(),
        };
        let dead = || Settled::DeadLetters(vec![died.clone()]);
        let given_up = Contents { replay: false, ..contents(None, Some("msg_1")) };
        let retry = Disposition::Retry { delay: SECOND };
        for (event, expected) in [
            (started(&whole), vec![("msg_1", begun(None))]),
            (started(&half), vec![("msg_1_0", begun(Some("msg_1")))]),
            (
                ended(&whole, &accepted, Disposition::Delivered),
                vec![("msg_1", end(Some(204), None, "")), ("msg_1", Change::Delivered)],
            ),
            (
                ended(&whole, &refused, retry),
                vec![("msg_1", end(Some(503), Some(FailureKind::Status), "busy"))],
            ),
            (
                ended(&whole, &refused, Disposition::Paused(PauseCause::Exhausted)),
                vec![("msg_1", end(Some(503), Some(FailureKind::Status), "busy"))],
            ),
            (
                LaneEvent::Unsent { number: 1, batch_id: &whole.id, why: "no port" },
                vec![("msg_1", Change::Interrupted)],
            ),
            (
                LaneEvent::Settled(retries(&[&whole], None)),
                vec![("msg_1", Change::Retrying { due })],
            ),
            (
                LaneEvent::Settled(retries(&[&half], Some("msg_1"))),
                vec![
                    ("msg_1", Change::Split),
                    ("msg_1_0", Change::Half { due, contents: contents(None, Some("msg_1")) }),
                ],
            ),
            (
                LaneEvent::Settled(dead()),
                vec![(
                    "msg_1_0",
                    Change::Dead { reason: Reason::Refused, contents: Some(given_up) },
                )],
            ),
            (
                LaneEvent::Settled(Settled::Paused(whole.id.clone())),
                vec![("msg_1", Change::Paused)],
            ),
            (LaneEvent::Settled(Settled::Delivered), vec![]),
            (LaneEvent::NotSettled(retries(&[&whole], None)), vec![("msg_1", Change::Interrupted)]),
            (
                LaneEvent::NotSettled(retries(&[&half], Some("msg_1"))),
                vec![("msg_1", Change::Interrupted)],
            ),
            (LaneEvent::NotSettled(dead()), vec![("msg_1_0", Change::Interrupted)]),
            (
                LaneEvent::NotSettled(Settled::Paused(whole.id.clone())),
                vec![("msg_1", Change::Interrupted)],
            ),
            (LaneEvent::NotSettled(Settled::Delivered), vec![]),
            (LaneEvent::QueueRestored, vec![]),
        ] {
            let mut changes = Vec::new();
            each_change(&event, "here", NOW, |id, change| changes.push((id, change)));
            let expected: Vec<_> =
                expected.into_iter().map(|(id, change)| (BatchId::from(id), change)).collect();
            assert_eq!(changes, expected, "{event:?}");
        }
    }

    #[test]
    fn an_event_that_died_without_an_attempt_is_a_delivery_of_its_own() {
        let died = Died {
            reason: Reason::TooLarge,
            batch_id: None,
            format: None,
            events: 1,
            bytes: 9,
            prints: None,
        };
        let mut ids = Vec::new();
        let event = LaneEvent::Settled(Settled::DeadLetters(vec![died.clone(), died.clone()]));
        each_change(&event, "here", NOW, |id, change| {
            assert!(matches!(change, Change::Dead { contents: Some(_), .. }), "{change:?}");
            ids.push(id);
        });
        assert!(ids.len() == 2 && ids[0] != ids[1], "{ids:?}");
        let event = LaneEvent::NotSettled(Settled::DeadLetters(vec![died]));
        each_change(&event, "here", NOW, |id, _| panic!("{id} was never attempted"));
    }
}

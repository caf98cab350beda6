//! An operator's side of the demo: failures and retries, the circuit, dead letters.

use super::stage::{Stage, Tone};
use crate::{
    cli::text::visible,
    delivery::{Disposition, Failure, Reason},
    policy::circuit_breaker::Change,
    telemetry::{
        lane_event::{AttemptEnded, LaneEvent, meaning},
        outage::News,
    },
    wording::counted,
};

/// Shows a lane's event, if a spectator should see it.
pub(super) fn narrate(stage: &Stage, subscriber: &str, event: &LaneEvent<'_>) {
    if let Some((tone, text)) = line(event) {
        stage.report(subscriber, tone, &visible(&text));
    }
}

fn line(event: &LaneEvent<'_>) -> Option<(Tone, String)> {
    match event {
        LaneEvent::AttemptEnded(ended) => attempt(ended),
        LaneEvent::Undeliverable { reason, error, .. } => {
            Some((Tone::Bad, format!("a dead letter ({}): {error}", reason.name())))
        }
        LaneEvent::CircuitChanged(change) => Some(match change {
            Change::Closed => (Tone::Good, meaning(*change).to_owned()),
            Change::Opened { open_for, .. } | Change::StillOpen { open_for } => {
                let text = format!("{} ({:.1} s)", meaning(*change), open_for.as_secs_f64());
                (Tone::Waiting, text)
            }
        }),
        LaneEvent::QueueFailed { why, news: News::First | News::OtherReason } => {
            Some((Tone::Waiting, format!("the queue fails: {why}")))
        }
        LaneEvent::QueueRestored => Some((Tone::Good, "the queue works again".to_owned())),
        LaneEvent::Unsent { why, .. } => {
            Some((Tone::Waiting, format!("a request cannot be sent: {why}")))
        }
        LaneEvent::Panicked { error, .. } => {
            Some((Tone::Bad, format!("the lane panicked: {error}")))
        }
        _ => None,
    }
}

/// The line of a failed attempt; the receiver shows the others.
fn attempt(ended: &AttemptEnded<'_>) -> Option<(Tone, String)> {
    let failure = ended.outcome.failure()?;
    let failed = failure
        .status()
        .map_or_else(|| Failure::name(failure).to_owned(), |status| format!("answered {status}"));
    let events = counted(ended.batch.events, "event(s)");
    let number = ended.batch.attempts;
    let (tone, text) = match ended.disposition {
        Disposition::Retry { delay } => (
            Tone::Waiting,
            format!(
                "attempt {number} of a batch of {events}, again in {:.1} s",
                delay.as_secs_f64()
            ),
        ),
        Disposition::Split { .. } => {
            (Tone::Waiting, format!("a batch of {events} is halved, each half is sent by itself"))
        }
        Disposition::DeadLetter(reason @ Reason::Exhausted) => {
            let name = reason.name();
            let text = format!(
                "attempt {number} was the last; a batch of {events} is a dead letter ({name})"
            );
            (Tone::Bad, text)
        }
        Disposition::DeadLetter(reason) => {
            (Tone::Bad, format!("a batch of {events} is a dead letter ({})", reason.name()))
        }
        Disposition::Delivered | Disposition::Paused(_) | Disposition::GivenBack => return None,
    };
    Some((tone, format!("{failed}: {text}")))
}

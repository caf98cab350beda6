//! An operator's side of the demo, read from the daemon's log.

use serde_json::{Map, Value};
use tokio::sync::mpsc;
use tracing::field::{Field, Visit};
use tracing_subscriber::{
    Layer,
    filter::Targets,
    layer::{Context, SubscriberExt as _},
    util::SubscriberInitExt as _,
};

use super::stage::{Stage, Tone};
use crate::{cli::text::visible, wording::counted};

/// The daemon's log, each line as its fields.
pub(super) fn tap() -> mpsc::UnboundedReceiver<Map<String, Value>> {
    struct Tap(mpsc::UnboundedSender<Map<String, Value>>);
    struct Fields(Map<String, Value>);
    impl Visit for Fields {
        fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
            self.0.insert(field.name().to_owned(), format!("{value:?}").into());
        }
        fn record_str(&mut self, field: &Field, value: &str) {
            self.0.insert(field.name().to_owned(), value.into());
        }
        fn record_u64(&mut self, field: &Field, value: u64) {
            self.0.insert(field.name().to_owned(), value.into());
        }
        fn record_f64(&mut self, field: &Field, value: f64) {
            self.0.insert(field.name().to_owned(), value.into());
        }
    }
    impl<S: tracing::Subscriber> Layer<S> for Tap {
        fn on_event(&self, event: &tracing::Event<'_>, _: Context<'_, S>) {
            let mut fields = Fields(Map::new());
            event.record(&mut fields);
            self.0.send(fields.0).ok(); // nobody listens at the very end
        }
    }
    let (notices, inbox) = mpsc::unbounded_channel();
    let targets = Targets::new().with_target("hooktrail", tracing::Level::INFO);
    tracing_subscriber::registry().with(targets).with(Tap(notices)).try_init().ok();
    inbox
}

/// Tells an operator's side of it: what failed and when it is tried again, the circuit, dead
/// letters.
pub(super) fn narrate(stage: &Stage, notice: &Map<String, Value>) {
    let text = |name: &str| notice.get(name).and_then(Value::as_str).unwrap_or_default();
    let number = |name: &str| notice.get(name).map(ToString::to_string).unwrap_or_default();
    let events =
        || counted(notice.get("events").and_then(Value::as_u64).unwrap_or_default(), "event(s)");
    let who = text("subscriber");
    let failure = match (notice.get("status"), text("failure")) {
        (Some(status), _) => format!("answered {status}"),
        (None, failure) => failure.to_owned(),
    };
    let message = text("message");
    match (message, text("outcome")) {
        ("attempt", "retry") => {
            let again = notice.get("next_attempt_in_s").and_then(Value::as_f64).unwrap_or_default();
            let what = format!(
                "{failure}: attempt {} of a batch of {}, again in {again:.1} s",
                number("attempt"),
                events()
            );
            stage.tell(who, Tone::Waiting, &what);
        }
        ("attempt", "split") => {
            stage.tell(
                who,
                Tone::Waiting,
                &format!(
                    "{failure}: a batch of {} is halved, each half is sent by itself",
                    events()
                ),
            );
        }
        ("attempt", "dead_letter") => {
            // Only of one that ran out of attempts it says something that this was the last.
            let last = if text("reason") == "exhausted" {
                format!("attempt {} was the last; ", number("attempt"))
            } else {
                String::new()
            };
            let what = format!(
                "{failure}: {last}a batch of {} is a dead letter ({})",
                events(),
                text("reason")
            );
            stage.tell(who, Tone::Bad, &what);
        }
        ("attempt", _) => {} // the receiver tells
        ("dead-lettered without an attempt", _) => {
            stage.tell(
                who,
                Tone::Bad,
                &visible(&format!("a dead letter ({}): {}", text("reason"), text("error"))),
            );
        }
        _ if message.starts_with("circuit closed") => stage.tell(who, Tone::Good, message),
        _ if message.starts_with("circuit") => stage.tell(
            who,
            Tone::Waiting,
            &format!(
                "{message} ({:.1} s)",
                notice.get("open_for_s").and_then(Value::as_f64).unwrap_or_default()
            ),
        ),
        _ if who.is_empty() => {}
        _ => stage.tell(who, Tone::Waiting, &visible(&format!("{message} {}", text("error")))),
    }
}

//! `where`: which subscribers have an event.

use serde::Serialize;

use super::{
    daemon::Asked,
    failed::Failed,
    history::{all, lines, reach, write},
    moment::Zone,
    remembered::Remembered,
    terminal,
    text::{as_json, visible},
};
use crate::{
    admin::view::{EventWhere, Reach, Whereabouts},
    config::Config,
    page::MAX_LIMIT,
    store::EventFilter,
    wording::counted,
};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The number of an event in history, its message id, or `sha256-` and the digest of its bytes
    #[arg(value_parser = clap::builder::NonEmptyStringValueParser::new())]
    id: String,
    /// The answer as one JSON object
    #[arg(long)]
    json: bool,
    /// Show times in this machine's zone instead of UTC
    #[arg(long)]
    local: bool,
}

/// The answer of `where --json`.
#[derive(Debug, Serialize)]
struct Answer<'e> {
    id: &'e str,
    /// Whether each subscriber that was to get an event has it.
    delivered: bool,
    events: &'e [EventWhere],
    /// How far history reaches.
    history: Option<&'e Reach>,
}

pub(super) async fn run(config: &Config, asked: &Asked, args: &Args) -> Result<(), Failed> {
    let remembered = Remembered::open(config, asked).await?;
    let filter = EventFilter { id: Some(args.id.clone()), ..EventFilter::default() };
    let found = all(&remembered, &filter, MAX_LIMIT).await?;
    let mut numbers: Vec<i64> = found.events.iter().map(|event| event.number).collect();
    // An id may be digits alone, as a number is.
    let is_number = args.id.bytes().all(|b| b.is_ascii_digit());
    numbers.extend(args.id.parse::<i64>().ok().filter(|n| is_number && !numbers.contains(n)));
    let mut events = Vec::with_capacity(numbers.len());
    for number in numbers {
        events.extend(remembered.event(number).await?);
    }
    let delivered = !events.is_empty() && events.iter().all(has_arrived);
    let history = events.last().map_or(&found.history, |event| &event.history);
    let zone = Zone::new(args.local);
    if args.json {
        let answer = Answer { id: &args.id, delivered, events: &events, history: Some(history) };
        write(&(as_json(&answer) + "\n"))?;
    } else {
        let width =
            terminal::width().filter(|_| std::io::IsTerminal::is_terminal(&std::io::stdout()));
        write(&text(&args.id, &events, history, &zone, width))?;
    }
    if delivered { Ok(()) } else { Err(Failed::Logged(1)) }
}

/// Whether each subscriber that was to get the event has it.
fn has_arrived(event: &EventWhere) -> bool {
    event.went.iter().all(Whereabouts::is_settled)
}

fn text(
    id: &str,
    events: &[EventWhere],
    history: &Reach,
    zone: &Zone,
    width: Option<usize>,
) -> String {
    let mut out = String::new();
    for event in events {
        let e = &event.event;
        let id =
            if e.message_id.is_some() { format!(", {}", visible(&e.id)) } else { String::new() };
        out.push_str(&format!(
            "event {}{id}: {} of {}\n",
            e.number,
            visible(&e.event),
            zone.show(e.at.0)
        ));
        out.push_str(&subscribers(event, zone, width));
        out.push('\n');
    }
    if events.is_empty() {
        out.push_str(&format!("history has no event `{}`\n", visible(id)));
    }
    out + reach(history, "events", zone).trim_start()
}

const COLUMNS: [&str; 6] = ["SUBSCRIBER", "STATE", "WHEN", "ATTEMPT", "ANSWER", "BATCH OR REASON"];

fn subscribers(event: &EventWhere, zone: &Zone, width: Option<usize>) -> String {
    // Of those whose patterns match, each is shown: also one whose `match` does not.
    let is_not = |w: &&Whereabouts| w.state == "not_matched" && w.why.is_none();
    let not_matched = event.went.iter().filter(is_not).count();
    let rows: Vec<[String; 6]> =
        event.went.iter().filter(|w| !is_not(w)).map(|w| row(w, zone)).collect();
    if rows.is_empty() {
        return match not_matched {
            0 => "no subscriber is known\n".to_owned(),
            n => format!(
                "no subscriber was to get it: it matches no pattern of {}\n",
                counted(n, "subscriber(s)")
            ),
        };
    }
    let mut out = lines(&COLUMNS, &rows, width);
    if not_matched > 0 {
        out.push_str(&format!(
            "its type matches no pattern of {}\n",
            counted(not_matched, "other subscriber(s)")
        ));
    }
    out
}

fn row(w: &Whereabouts, zone: &Zone) -> [String; 6] {
    let when = match (w.delivered_at, w.next_attempt_at) {
        (Some(at), _) => zone.show(at.0),
        (None, Some(due)) => format!("due {}", zone.show(due.0)),
        (None, None) => String::new(),
    };
    let answer = match (w.status, &w.failure) {
        (Some(status), _) => status.to_string(),
        (None, Some(failure)) => visible(failure),
        (None, None) => String::new(),
    };
    let paused = w.subscriber_paused.as_ref();
    let paused = paused.map(|p| format!("the subscriber is paused: {}", visible(&p.why)));
    let reason = w.reason.as_deref().map(visible);
    let rest = [w.why.as_deref().map(visible), paused, reason, w.batch.as_deref().map(visible)];
    [
        visible(&w.subscriber),
        visible(&w.state).replace('_', " "),
        when,
        w.attempt.map(|n| n.to_string()).unwrap_or_default(),
        answer,
        rest.into_iter().flatten().collect::<Vec<_>>().join(", "),
    ]
}

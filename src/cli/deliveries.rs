//! `deliveries`: the batches that were sent, and what became of each.

use std::io::IsTerminal as _;

use super::{
    complete,
    daemon::Asked,
    failed::Failed,
    history::{lines, more, reach, write},
    moment::{Span, Zone},
    remembered::Remembered,
    terminal,
    text::{as_json, rounded, rounded_size, visible},
};
use crate::{
    admin::view::{Delivery, DeliveryList},
    clock,
    config::Config,
    page::MAX_LIMIT,
    store::{DeliveryFilter, DeliveryState},
    wording::counted,
};

#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(super) struct Args {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    list: List,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Show a delivery with all its attempts
    Show {
        /// The batch's id, which receivers get as `webhook-id`
        id: String,
        /// The delivery as one JSON object
        #[arg(long)]
        json: bool,
        /// Show times in this machine's zone instead of UTC
        #[arg(long)]
        local: bool,
    },
}

#[derive(Debug, clap::Args)]
struct List {
    /// Only those to this subscriber
    #[arg(add = complete::subscribers())]
    subscriber: Option<String>,
    /// Only those in this state
    #[arg(long, value_parser = states())]
    state: Option<String>,
    #[command(flatten)]
    span: Span,
    /// The most deliveries
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    limit: u32,
    /// The deliveries and how far history reaches, as one JSON object
    #[arg(long)]
    json: bool,
}

fn states() -> clap::builder::PossibleValuesParser {
    clap::builder::PossibleValuesParser::new(
        DeliveryState::NAMES.into_iter().chain([DeliveryState::UNKNOWN]),
    )
}

pub(super) async fn run(config: &Config, asked: &Asked, args: &Args) -> Result<(), Failed> {
    let remembered = Remembered::open(config, asked).await?;
    match &args.command {
        Some(Command::Show { id, json, local }) => {
            let found = remembered.delivery(id).await?.ok_or_else(|| {
                Failed::Runtime(format!("history has no delivery `{}`", visible(id)))
            })?;
            let text =
                if *json { as_json(&found) + "\n" } else { story(&found, &Zone::new(*local)) };
            write(&text)
        }
        None => list(&remembered, &args.list).await,
    }
}

async fn list(remembered: &Remembered<'_>, args: &List) -> Result<(), Failed> {
    let times = args.span.read(clock::now())?;
    let filter = DeliveryFilter {
        subscriber: args.subscriber.clone(),
        state: args.state.clone(),
        since: times.since,
        until: times.until,
    };
    let limit = args.limit as usize;
    let progress = terminal::progress("searching");
    let mut found = remembered.deliveries(&filter, limit.min(MAX_LIMIT), None).await?;
    while found.deliveries.len() < limit
        && let Some(next) = found.next.take()
    {
        if let Some(back_to) = found.searched_back_to {
            progress.set_message(format!("searched back to {back_to}"));
        }
        let left = (limit - found.deliveries.len()).min(MAX_LIMIT);
        let mut more = remembered.deliveries(&filter, left, Some(&next)).await?;
        more.deliveries.splice(0..0, found.deliveries);
        found = more;
    }
    progress.finish_and_clear();
    let width = terminal::width().filter(|_| std::io::stdout().is_terminal());
    let text = if args.json { as_json(&found) + "\n" } else { table(&found, &times.zone, width) };
    write(&text)
}

const COLUMNS: [&str; 7] =
    ["BATCH", "BEGUN", "SUBSCRIBER", "STATE", "EVENTS", "ATTEMPTS", "LAST ANSWER"];

fn table(found: &DeliveryList, zone: &Zone, width: Option<usize>) -> String {
    let row = |d: &Delivery| {
        [
            visible(&d.id),
            zone.show(d.begun_at.0),
            visible(&d.subscriber),
            state(d, zone),
            d.events.to_string(),
            d.attempts.last().map_or(0, |a| a.number).to_string(),
            answer(d),
        ]
    };
    let rows: Vec<[String; 7]> = found.deliveries.iter().map(row).collect();
    let mut out =
        if rows.is_empty() { "no delivery\n".to_owned() } else { lines(&COLUMNS, &rows, width) };
    out.push_str(&more(found.searched_back_to, found.next.is_some(), zone));
    out + &reach(&found.history, "deliveries", zone)
}

fn state(d: &Delivery, zone: &Zone) -> String {
    let state = visible(&d.state).replace('_', " ");
    match (&d.reason, d.next_attempt_at) {
        (Some(reason), _) => format!("{state}, {}", visible(reason)),
        (None, Some(due)) => format!("{state}, due {}", zone.show(due.0)),
        (None, None) => state,
    }
}

/// The last answer, or why there was none.
fn answer(d: &Delivery) -> String {
    let answered = d.attempts.iter().rev().find(|a| a.duration_ms.is_some());
    answered.map_or_else(String::new, |a| match (a.status, &a.failure) {
        (Some(status), _) => status.to_string(),
        (None, Some(failure)) => visible(failure),
        (None, None) => String::new(),
    })
}

/// One delivery with all its attempts.
fn story(d: &Delivery, zone: &Zone) -> String {
    let mut out =
        format!("delivery {} to {}: {}\n", visible(&d.id), visible(&d.subscriber), state(d, zone));
    if let Some(why) = &d.why {
        out.push_str(&format!("{}\n", visible(why)));
    }
    let format = d.format.as_deref().map_or(String::new(), |f| format!(", {}", visible(f)));
    out.push_str(&format!(
        "{}, {}{format}\n",
        counted(d.events, "event(s)"),
        rounded_size(d.bytes)
    ));
    if let Some(sha256) = &d.sha256 {
        out.push_str(&format!("sha-256 {}\n", visible(sha256)));
    }
    if let Some(parent) = &d.parent {
        out.push_str(&format!("half of {}\n", visible(parent)));
    }
    if d.replay {
        out.push_str("sent again by an operator\n");
    }
    for a in &d.attempts {
        let took = a.duration_ms.map(|ms| rounded(std::time::Duration::from_millis(ms)));
        let result = match (a.status, &a.failure, took) {
            (_, _, None) => "no answer yet".to_owned(),
            (Some(status), _, Some(took)) => format!("{status} after {took}"),
            (None, Some(failure), Some(took)) => format!("{} after {took}", visible(failure)),
            (None, None, Some(took)) => format!("ended after {took}"),
        };
        out.push_str(&format!(
            "\nattempt {} at {} by {}: {result}\n",
            a.number,
            zone.show(a.at.0),
            visible(&a.by)
        ));
        if let Some(excerpt) = &a.excerpt {
            excerpt.lines().for_each(|line| out.push_str(&format!("  {}\n", visible(line))));
        }
    }
    out
}

//! `replay` and `resend`: events that hooktrail remembers go to a subscriber again.

use std::{io::IsTerminal as _, time::Duration};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::{
    complete,
    daemon::{Asked, Daemon, segment},
    failed::Failed,
    history::{lines, reach, write},
    moment::{Span, Zone},
    terminal,
    text::{as_json, rounded_size, visible},
};
use crate::{
    admin::view::{ChangeRequest, Replay, ReplayList, ReplayPreview, ReplayRequest, Resent, Time},
    clock,
    event::Pattern,
    wording::counted,
};

/// The time between two polls of a replay with `--wait`.
const POLL: Duration = Duration::from_millis(500);

#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub(super) struct Args {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    start: Start,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// List replays, the latest first
    List {
        /// The most replays
        #[arg(long, value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=500))]
        limit: u32,
        /// The replays as one JSON object
        #[arg(long)]
        json: bool,
        /// Show times in this machine's zone instead of UTC
        #[arg(long)]
        local: bool,
    },
    /// Go on with a replay that was cancelled or has failed, where it ended
    Continue {
        /// The replay's id
        id: String,
        /// The replay as one JSON object
        #[arg(long)]
        json: bool,
    },
    /// End a replay; batches that are in the subscriber's queue are still delivered
    Cancel {
        /// The replay's id
        id: String,
        /// The replay as one JSON object
        #[arg(long)]
        json: bool,
    },
}

#[derive(Debug, clap::Args)]
struct Start {
    /// The subscriber's name
    #[arg(required = true, add = complete::subscribers())]
    subscriber: Option<String>,
    #[command(flatten)]
    span: Span,
    /// Of the subscriber's events those whose type matches this pattern
    #[arg(long, value_name = "PATTERN", value_parser = Pattern::try_new)]
    events: Option<Pattern>,
    /// Events in a second, at most
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    rate: Option<u32>,
    /// Only print the number of events
    #[arg(long)]
    dry_run: bool,
    /// Do not ask
    #[arg(long)]
    yes: bool,
    /// Wait until all batches are in the subscriber's queue
    #[arg(long)]
    wait: bool,
    /// The replay as one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
pub(super) struct ResendArgs {
    /// The batch's id, which receivers get as `webhook-id`
    id: String,
    /// The batch as one JSON object
    #[arg(long)]
    json: bool,
}

pub(super) async fn run(asked: &Asked, args: &Args) -> Result<(), Failed> {
    let daemon = Daemon::of(asked)?;
    match &args.command {
        None => start(&daemon, &args.start).await,
        Some(Command::List { limit, json, local }) => {
            let list = daemon.get::<ReplayList>(&format!("replays?limit={limit}")).await?.read;
            let text = if *json { as_json(&list) + "\n" } else { table(&list, &Zone::new(*local)) };
            write(&text)
        }
        Some(Command::Continue { id, json }) => change(&daemon, id, "continue", *json).await,
        Some(Command::Cancel { id, json }) => change(&daemon, id, "cancel", *json).await,
    }
}

async fn start(daemon: &Daemon<'_>, args: &Start) -> Result<(), Failed> {
    let times = args.span.read(clock::now())?;
    let name = args.subscriber.as_deref().unwrap_or_default();
    let Some(since) = times.since else {
        let why = "--since is required: the time from which on events are sent again";
        return Err(Failed::Usage(why.to_owned()));
    };
    if !args.dry_run && !args.yes && !std::io::stdin().is_terminal() {
        let why =
            "replay cannot ask here; use --yes to send the events, or --dry-run to count them";
        return Err(Failed::Usage(why.to_owned()));
    }
    let wanted = ReplayRequest {
        since: Some(Time(since)),
        until: times.until.map(Time),
        events: args.events.as_ref().map(|pattern| pattern.as_str().to_owned()),
        rate: args.rate,
        dry_run: true,
    };
    let path = format!("subscribers/{}/replay", segment(name));
    let progress = terminal::progress("counting");
    let preview = daemon.post::<ReplayPreview>(&path, &wanted).await?;
    progress.finish_and_clear();
    let at_least = if preview.complete { "" } else { "at least " };
    let count = format!("{at_least}{}", counted(preview.events, "event(s)"));
    if args.dry_run {
        let said = format!("{count} would be sent to `{}` again\n", visible(name));
        return write(&if args.json {
            as_json(&preview) + "\n"
        } else {
            said + &reach(&preview.history, "events", &times.zone)
        });
    }
    if !args.yes {
        eprint!("{}", reach(&preview.history, "events", &times.zone));
        let question = format!("{count} will be sent to `{}` again. Go on?", visible(name));
        if !terminal::ask(&question)? {
            return Err(Failed::Usage("nothing was sent".to_owned()));
        }
    }
    let wanted = ReplayRequest { dry_run: false, ..wanted };
    let made = daemon.post_once::<Replay>(&path, &wanted, "hooktrail replay list").await?;
    if !args.json {
        write(&format!(
            "{count} go to `{}` again, in new batches with `x-hooktrail-replay: true`: replay {}\n",
            visible(name),
            visible(&made.id)
        ))?;
    }
    if !args.wait {
        return if args.json { write(&(as_json(&made) + "\n")) } else { Ok(()) };
    }
    let ended = wait(daemon, &made, preview.events).await?;
    write(&if args.json { as_json(&ended) + "\n" } else { story(&ended) })?;
    if ended.state == "done" { Ok(()) } else { Err(Failed::Logged(1)) }
}

/// Waits until a replay has ended.
async fn wait(daemon: &Daemon<'_>, made: &Replay, events: u64) -> Result<Replay, Failed> {
    let bar = ProgressBar::new(events);
    bar.set_draw_target(ProgressDrawTarget::stderr());
    if let Ok(style) = ProgressStyle::with_template("{bar:40} {pos} of {len} events {msg}") {
        bar.set_style(style);
    }
    loop {
        let found = daemon.get::<Replay>(&format!("replays/{}", segment(&made.id))).await?.read;
        bar.set_length(events.max(found.enqueued));
        bar.set_position(found.enqueued);
        if found.state != "running" {
            bar.finish_and_clear();
            return Ok(found);
        }
        tokio::time::sleep(POLL).await;
    }
}

async fn change(daemon: &Daemon<'_>, id: &str, what: &str, json: bool) -> Result<(), Failed> {
    let path = format!("replays/{}/{what}", segment(id));
    let replay = daemon.post::<Replay>(&path, &ChangeRequest::default()).await?;
    write(&if json { as_json(&replay) + "\n" } else { story(&replay) })
}

fn story(replay: &Replay) -> String {
    let mut out = format!(
        "replay {} to `{}`: {}, {} in {} put into its queue\n",
        visible(&replay.id),
        visible(&replay.subscriber),
        visible(&replay.state),
        counted(replay.enqueued, "event(s)"),
        counted(replay.batches, "batch(es)")
    );
    if let Some(why) = &replay.why {
        out.push_str(&format!("why: {}\n", visible(why)));
    }
    if replay.batches > 0 {
        out.push_str(&format!("of the batches: {}\n", replay.outcome));
    }
    if replay.missing > 0 {
        let missing = counted(replay.missing, "event(s) of all subscribers (was|were)");
        out.push_str(&format!("{missing} removed from history before the replay came to them\n"));
    }
    if replay.unusable > 0 {
        let unusable = counted(replay.unusable, "event(s) cannot be sent: (it is|they are)");
        out.push_str(&format!("{unusable} invalid, too large, or without bytes in history\n"));
    }
    out
}

fn table(list: &ReplayList, zone: &Zone) -> String {
    let columns =
        ["REPLAY", "CREATED", "SUBSCRIBER", "STATE", "SINCE", "EVENTS", "BATCHES", "MISSING", "BY"];
    let row = |r: &Replay| {
        [
            visible(&r.id),
            zone.show(r.created_at.0),
            visible(&r.subscriber),
            visible(&r.state),
            r.since.map_or_else(String::new, |since| zone.show(since.0)),
            format!("{} of {}", r.enqueued, r.matched),
            if r.batches > 0 { r.outcome.to_string() } else { "none".to_owned() },
            r.missing.to_string(),
            visible(&r.by),
        ]
    };
    let rows: Vec<_> = list.replays.iter().map(row).collect();
    if rows.is_empty() {
        return "no replay\n".to_owned();
    }
    let mut out = lines(&columns, &rows, None);
    for (r, why) in list.replays.iter().filter_map(|r| r.why.as_ref().map(|why| (r, why))) {
        out.push_str(&format!("\n{} is {}: {}\n", visible(&r.id), visible(&r.state), visible(why)));
    }
    if list.next.is_some() {
        out.push_str("\nthere are more: raise --limit\n");
    }
    out
}

pub(super) async fn resend(asked: &Asked, args: &ResendArgs) -> Result<(), Failed> {
    let daemon = Daemon::of(asked)?;
    let path = format!("deliveries/{}/resend", segment(&args.id));
    let resent = daemon.post::<Resent>(&path, &ChangeRequest::default()).await?;
    write(&if args.json {
        as_json(&resent) + "\n"
    } else {
        format!(
            "{} with {}, {}, goes to `{}` again: the same id and bytes, with `x-hooktrail-replay: true`.\n\
             A receiver that remembers ids ignores it.\n",
            visible(&resent.id),
            counted(resent.events, "event(s)"),
            rounded_size(resent.bytes),
            visible(&resent.subscriber)
        )
    })
}

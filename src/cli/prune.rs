//! `prune`: deletes what is left of subscribers that are not configured any more.

use std::io::IsTerminal as _;

use serde_json::json;

use super::{Failed, reach};
use crate::{
    config::{self, Backend, Config},
    queue::{Depth, Queue, embedded::EmbeddedQueue},
    wording::{agreed, counted},
};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Only these; without any name all that are not configured any more
    #[arg(value_name = "SUBSCRIBER")]
    subscribers: Vec<String>,
    /// Also those that still hold events, retries or dead letters: they are lost
    #[arg(long)]
    with_events: bool,
    /// Say what would be deleted, and do nothing
    #[arg(long)]
    dry_run: bool,
    /// Do not ask
    #[arg(long)]
    yes: bool,
    /// The result as a JSON object
    #[arg(long)]
    json: bool,
}

pub(super) async fn run(config: &Config, args: &Args) -> Result<(), Failed> {
    for name in &args.subscribers {
        if !config::is_subscriber_name(name) {
            return Err(Failed::Usage(format!("`{name}` is not a subscriber's name: 1 to 64 of a-z, 0-9 and `-`")));
        }
        if config.subscribers.iter().any(|s| s.name == *name) {
            return Err(Failed::Usage(format!(
                "`{name}` is configured in {}; take it out first, so that no daemon works for it",
                config.path.display()
            )));
        }
    }
    match &config.queue.backend {
        Backend::Amqp(amqp) => prune(reach(amqp).await?, config, args).await,
        Backend::Embedded => prune(EmbeddedQueue::existing(&config.queue.embedded)?, config, args).await,
    }
}

async fn prune(queue: impl Queue, config: &Config, args: &Args) -> Result<(), Failed> {
    let removed = queue.depths(&config.subscribers).await?.removed;
    let unknown: Vec<&String> = args.subscribers.iter().filter(|name| !removed.contains_key(*name)).collect();
    if let Some(name) = unknown.first() {
        return Err(Failed::Runtime(format!(
            "there is nothing of a removed subscriber `{name}`; if it was taken out of the configuration only just now, a running daemon \
             has to let go of it first: its log says so within seconds"
        )));
    }
    let chosen = removed.iter().filter(|(name, _)| args.subscribers.is_empty() || args.subscribers.contains(name));
    let (empty, full): (Vec<_>, Vec<_>) = chosen.partition(|(_, depth)| depth.is_empty());
    let delete: Vec<_> = if args.with_events { empty.iter().chain(&full).collect() } else { empty.iter().collect() };
    if !args.json {
        for (name, depth) in &delete {
            println!("{name}: {}", told(**depth));
        }
        for (name, depth) in full.iter().filter(|_| !args.with_events) {
            println!("{name}: kept, it holds {}", told(**depth));
        }
    }
    let ask = !args.dry_run && !args.yes && !delete.is_empty();
    if ask && !confirm(delete.len())? {
        return Err(Failed::Usage("nothing was deleted".to_owned()));
    }
    let mut pruned = Vec::new();
    for (name, _) in delete.iter().filter(|_| !args.dry_run) {
        queue.prune(name, args.with_events).await?;
        pruned.push(name.as_str());
    }
    queue.close().await;
    let kept: Vec<&str> = if args.with_events { Vec::new() } else { full.iter().map(|(name, _)| name.as_str()).collect() };
    if args.json {
        let chosen: Vec<&str> = delete.iter().map(|(name, _)| name.as_str()).collect();
        println!("{}", json!({ "command": "prune", "dry_run": args.dry_run, "chosen": chosen, "pruned": pruned, "kept": kept }));
    } else if args.dry_run {
        println!("would delete the queues of {}", counted(delete.len(), "removed subscriber(s)"));
    } else {
        println!("deleted the queues of {}", counted(pruned.len(), "removed subscriber(s)"));
    }
    if !kept.is_empty() {
        return Err(Failed::Runtime(format!(
            "{} kept, with events: {}; configure again to deliver, look with `hooktrail dead list NAME`, or say --with-events to lose them",
            counted(kept.len(), "subscriber(s) (was|were)"),
            kept.join(", ")
        )));
    }
    Ok(())
}

fn told(depth: Depth) -> String {
    let Depth { events, retries, dead } = depth;
    let (events, retries) = (counted(events, "event(s)"), counted(retries, "batch(es) to retry"));
    format!("{events}, {retries}, {}", counted(dead, "dead letter(s)"))
}

fn confirm(number: usize) -> Result<bool, Failed> {
    if !std::io::stdin().is_terminal() {
        return Err(Failed::Usage(
            "prune deletes for good and cannot ask here; say --yes if that is meant, or look first with --dry-run".to_owned(),
        ));
    }
    eprint!("Delete the queues of {} for good? [y/N] ", agreed(&number, &format!("(this subscriber|these {number} subscribers)")));
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer)?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}

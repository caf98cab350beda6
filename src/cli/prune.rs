//! `prune`: deletes the queues of removed subscribers, or everything.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::json;

use super::{
    arguments::Destructive, failed::Failed, open::reach, terminal::confirm, text::visible,
};
use crate::{
    config::{AmqpConfig, Backend, Config, Intake},
    delivery::{Depth, Depths, SubscriberName},
    queue::{Queue, amqp::AmqpQueue, embedded::EmbeddedQueue},
    store::sqlite::delete_store,
    wording::{agreed, counted},
};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Only these; without names, all that are not configured any more
    #[arg(value_name = "SUBSCRIBER")]
    subscribers: Vec<String>,
    /// Delete everything that hooktrail has made for this configuration, configured subscribers
    /// included. No daemon may run. The exchange that producers publish to stays
    #[arg(long, conflicts_with_all = ["subscribers", "with_events"])]
    all: bool,
    /// Also delete those that still hold events, retries or dead letters, which are lost
    #[arg(long)]
    with_events: bool,
    #[command(flatten)]
    how: Destructive,
}

pub(super) async fn run(config: &Config, args: &Args) -> Result<(), Failed> {
    if args.all {
        return match &config.queue.backend {
            Backend::Amqp(amqp) => all_of_broker(&reach(amqp).await?, config, args).await,
            Backend::Embedded => all_of_file(config, args).await,
        };
    }
    for name in &args.subscribers {
        if SubscriberName::try_new(name).is_err() {
            return Err(Failed::Usage(format!(
                "`{name}` is not a subscriber's name: 1 to 64 of a-z, 0-9 and `-`"
            )));
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
        Backend::Embedded => {
            prune(EmbeddedQueue::existing(&config.queue.embedded)?, config, args).await
        }
    }
}

/// Deletes everything under a prefix in RabbitMQ.
async fn all_of_broker(queue: &AmqpQueue, config: &Config, args: &Args) -> Result<(), Failed> {
    let Backend::Amqp(AmqpConfig { prefix, intake, .. }) = &config.queue.backend else {
        return Ok(());
    };
    let depths = queue.everything(&config.subscribers).await?;
    let what = format!("everything that hooktrail has declared under prefix `{prefix}`");
    if say_what_goes(&depths, &what, args)? {
        queue.remove(depths.subscribers.keys(), false).await?;
    }
    queue.close().await;
    if let (Intake::Exchange(exchange), false) = (intake, args.how.json) {
        println!("exchange `{}` stays: producers publish to it", visible(exchange));
    }
    Ok(())
}

/// Deletes an embedded queue.
async fn all_of_file(config: &Config, args: &Args) -> Result<(), Failed> {
    let embedded = &config.queue.embedded;
    let dir = visible(&embedded.data_dir.display().to_string());
    if !EmbeddedQueue::exists(embedded)? {
        return Err(Failed::Runtime(format!(
            "there is no embedded queue in {dir}; nothing was deleted"
        )));
    }
    // Opened as by a daemon, so that no daemon can run.
    let queue = EmbeddedQueue::for_daemon(embedded)?;
    let depths = queue.everything().await?;
    let what = format!("the embedded queue in {dir}, its history, and the store");
    if say_what_goes(&depths, &what, args)? {
        queue.delete()?;
        // History without the queue's log has no events.
        delete_store(&embedded.data_dir)?;
    }
    if let (Some(intake), false) = (&config.queue.intake, args.how.json)
        && let AmqpConfig { prefix, intake: Intake::Exchange(_), .. } = &intake.amqp
    {
        println!(
            "queue `{prefix}.intake` stays in RabbitMQ, and what is published comes into it: rabbitmqctl delete_queue {prefix}.intake"
        );
    }
    Ok(())
}

/// Shows what would be lost, and asks. Returns whether to delete it.
fn say_what_goes(depths: &Depths, what: &str, args: &Args) -> Result<bool, Failed> {
    let delete = !args.how.dry_run;
    if !args.how.json {
        for (name, depth) in &depths.subscribers {
            println!("{name}: {}", contents(*depth));
        }
        for (number, of) in [
            (depths.delayed.unwrap_or(0), "batch(es) that wait(s) for (its|their) next attempt"),
            (depths.orphans, "orphan(s)"),
        ] {
            if number > 0 {
                println!("{}", counted(number, of));
            }
        }
    }
    if delete && !args.how.yes {
        confirm("prune", &format!("Delete {what}, with all of this, for good?"))?;
    }
    if args.how.json {
        let subscriber = |(name, d): (&SubscriberName, &Depth)| json!({ "subscriber": name, "events": d.events, "retries": d.batches(), "dead": d.dead });
        let subscribers: Vec<_> = depths.subscribers.iter().map(subscriber).collect();
        let (delayed, orphans) = (depths.delayed, depths.orphans);
        println!(
            "{}",
            json!({ "command": "prune", "all": true, "dry_run": args.how.dry_run, "subscribers": subscribers, "delayed_retries": delayed, "orphans": orphans })
        );
    } else {
        println!("{} {what}", if delete { "deleting" } else { "would delete" });
    }
    Ok(delete)
}

async fn prune(queue: impl Queue, config: &Config, args: &Args) -> Result<(), Failed> {
    let removed = queue.depths(&config.subscribers).await?.removed;
    let mut bound = queue.bound().await?;
    bound.retain(|name| config.subscribers.iter().all(|s| s.name != *name));
    check_names(&args.subscribers, &bound, &removed)?;
    let is_meant = |name: &SubscriberName| {
        if args.subscribers.is_empty() {
            !bound.contains(name)
        } else {
            args.subscribers.iter().any(|wanted| *name == *wanted)
        }
    };
    let chosen = removed.iter().filter(|(name, _)| is_meant(name));
    let (empty, full): (Vec<_>, Vec<_>) = chosen.partition(|(_, depth)| depth.is_empty());
    let delete: Vec<_> =
        if args.with_events { empty.iter().chain(&full).collect() } else { empty.iter().collect() };
    if !args.how.json {
        for (name, depth) in &delete {
            println!("{name}: {}", contents(**depth));
        }
        for (name, depth) in full.iter().filter(|_| !args.with_events) {
            println!("{name}: kept, it holds {}", contents(**depth));
        }
    }
    let ask = !args.how.dry_run && !args.how.yes && !delete.is_empty();
    if ask {
        let number = delete.len();
        let whom = agreed(&number, &format!("(this subscriber|these {number} subscribers)"));
        confirm("prune", &format!("Delete the queues of {whom} for good?"))?;
    }
    let mut pruned = Vec::new();
    for (name, _) in delete.iter().filter(|_| !args.how.dry_run) {
        queue.prune(name, args.with_events).await?;
        pruned.push(name.as_str());
    }
    queue.close().await;
    let kept: Vec<&str> = if args.with_events {
        Vec::new()
    } else {
        full.iter().map(|(name, _)| name.as_str()).collect()
    };
    if args.how.json {
        let chosen: Vec<&str> = delete.iter().map(|(name, _)| name.as_str()).collect();
        println!(
            "{}",
            json!({ "command": "prune", "dry_run": args.how.dry_run, "chosen": chosen, "pruned": pruned, "kept": kept })
        );
    } else if args.how.dry_run {
        println!("would delete the queues of {}", counted(delete.len(), "removed subscriber(s)"));
    } else {
        println!("deleted the queues of {}", counted(pruned.len(), "removed subscriber(s)"));
    }
    if !bound.is_empty() && args.subscribers.is_empty() {
        return Err(Failed::Runtime(still_bound(
            &bound.into_iter().collect::<Vec<_>>().join("`, `"),
        )));
    }
    if !kept.is_empty() {
        return Err(Failed::Runtime(format!(
            "{} kept, with events: {}; configure again to deliver, inspect with `hooktrail dead list NAME`, or use --with-events to lose them",
            counted(kept.len(), "subscriber(s) (was|were)"),
            kept.join(", ")
        )));
    }
    Ok(())
}

/// An error if one of these subscribers cannot be pruned.
fn check_names(
    names: &[String],
    bound: &BTreeSet<SubscriberName>,
    removed: &BTreeMap<SubscriberName, Depth>,
) -> Result<(), Failed> {
    if let Some(name) = names.iter().find(|name| bound.contains(name.as_str())) {
        return Err(Failed::Runtime(still_bound(name)));
    }
    if let Some(name) = names.iter().find(|name| !removed.contains_key(name.as_str())) {
        return Err(Failed::Runtime(format!(
            "there is nothing of a removed subscriber `{name}`; nothing was deleted"
        )));
    }
    Ok(())
}

/// The error for a removed subscriber whose queue is still bound.
fn still_bound(names: &str) -> String {
    format!(
        "`{names}`: not configured here, and still gets events: a daemon must unbind it first. Reload or start one with this configuration; \
         within seconds its log says `was unbound`, and then prune deletes what is left"
    )
}

fn contents(depth: Depth) -> String {
    let (events, batches) =
        (counted(depth.events, "event(s)"), counted(depth.batches(), "batch(es) to retry"));
    format!("{events}, {batches}, {}", counted(depth.dead, "dead letter(s)"))
}

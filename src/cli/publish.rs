//! `publish`: hands events to the broker and returns when all are confirmed.

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader},
    path::PathBuf,
};

use bytes::Bytes;

use super::{Failed, reach, visible};
use crate::{
    clock,
    config::Config,
    event::event_type,
    queue::{
        Queue as _,
        amqp::{AmqpQueue, MAX_GROUP, Published},
    },
};

/// The bytes of a group; its confirms are awaited together.
const MAX_GROUP_BYTES: usize = 8 * 1024 * 1024;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Files with one JSON event a line; `-` is standard input
    #[arg(default_value = "-", value_name = "FILE")]
    files: Vec<PathBuf>,
}

#[derive(Default)]
struct Tally {
    stored: usize,
    refused: usize,
    bad_lines: usize,
    /// By type: events that no pattern of the configuration matches.
    unmatched: BTreeMap<String, usize>,
    /// By type: events that a pattern matches but no queue took.
    unbound: BTreeMap<String, usize>,
}

type Group = Vec<(String, Bytes, Option<String>)>;

pub(super) async fn run(config: &Config, args: Args) -> Result<(), Failed> {
    let queue = reach(config).await?;
    queue.ensure(&config.subscribers).await?;
    let mut tally = Tally::default();
    let mut group = Group::new();
    for file in &args.files {
        read(config, &queue, file, &mut group, &mut tally).await?;
    }
    flush(config, &queue, &mut group, &mut tally).await?;
    queue.close().await;
    report(&tally)
}

async fn read(config: &Config, queue: &AmqpQueue, file: &PathBuf, group: &mut Group, tally: &mut Tally) -> Result<(), Failed> {
    let name = file.display();
    let mut input: Box<dyn BufRead + Send> = if file.as_os_str() == "-" {
        Box::new(BufReader::new(std::io::stdin()))
    } else {
        Box::new(BufReader::new(std::fs::File::open(file).map_err(|e| Failed::Runtime(format!("{name}: {e}")))?))
    };
    let (mut number, mut bytes) = (0, 0);
    let mut line = Vec::new();
    loop {
        line.clear();
        if input.read_until(b'\n', &mut line).map_err(|e| Failed::Runtime(format!("{name}: {e}")))? == 0 {
            return Ok(());
        }
        number += 1;
        while line.last().is_some_and(|b| matches!(b, b'\n' | b'\r')) {
            line.pop();
        }
        if line.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        match event_type(&line) {
            Err(why) => {
                eprintln!("{name}:{number}: not published: {why}");
                tally.bad_lines += 1;
            }
            Ok(event_type) => {
                bytes += line.len();
                group.push((event_type.into_owned(), Bytes::copy_from_slice(&line), Some(event_id())));
            }
        }
        if group.len() >= MAX_GROUP || bytes >= MAX_GROUP_BYTES {
            flush(config, queue, group, tally).await?;
            bytes = 0;
        }
    }
}

fn event_id() -> String {
    clock::batch_id().replacen("msg_", "evt_", 1)
}

async fn flush(config: &Config, queue: &AmqpQueue, group: &mut Group, tally: &mut Tally) -> Result<(), Failed> {
    if group.is_empty() {
        return Ok(());
    }
    let types: Vec<String> = group.iter().map(|(t, _, _)| t.clone()).collect();
    let count = group.len();
    let fates = queue.publish_events(std::mem::take(group)).await.map_err(|e| {
        Failed::Runtime(format!(
            "{e}; {} events before were confirmed, it is not known whether the {count} after them were taken: publishing those again may repeat them",
            tally.stored
        ))
    })?;
    for (event_type, fate) in types.into_iter().zip(fates) {
        let matched = config.subscribers.iter().any(|s| s.events.iter().any(|p| p.matches(&event_type)));
        match fate {
            Published::Refused => tally.refused += 1,
            Published::Unmatched if matched => *tally.unbound.entry(event_type).or_default() += 1,
            Published::Stored if matched => tally.stored += 1,
            Published::Stored | Published::Unmatched => {
                tally.stored += 1;
                *tally.unmatched.entry(event_type).or_default() += 1;
            }
        }
    }
    Ok(())
}

fn report(tally: &Tally) -> Result<(), Failed> {
    for (event_type, n) in &tally.unmatched {
        eprintln!("warning: no subscriber's patterns match `{}` ({n} events)", visible(event_type));
    }
    for (event_type, n) in &tally.unbound {
        eprintln!(
            "warning: `{}` ({n} events) reached no queue although a pattern matches it; start `hooktrail run`, which binds the queues",
            visible(event_type)
        );
    }
    println!("published {} events, all confirmed", tally.stored);
    let unbound: usize = tally.unbound.values().sum();
    let mut failed = Vec::new();
    if tally.bad_lines > 0 {
        failed.push(format!("not published, because they are not events: {} lines", tally.bad_lines));
    }
    if tally.refused > 0 {
        failed.push(format!(
            "the broker refused {} events: a queue is full by a policy, or unusable (hooktrail check --connect)",
            tally.refused
        ));
    }
    if unbound > 0 {
        failed.push(format!("{unbound} events reached no queue"));
    }
    if failed.is_empty() { Ok(()) } else { Err(Failed::Runtime(failed.join("; "))) }
}

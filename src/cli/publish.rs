//! `publish`: hands events to the broker and returns when all are confirmed.

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Read as _},
    path::{Path, PathBuf},
};

use bytes::Bytes;

use super::{Failed, reach, visible};
use crate::{
    batch::BatchPolicy,
    clock,
    config::{Backend, Config},
    event::{InvalidEvent, event_type},
    queue::{MAX_GROUP, NewEvent, Published, Queue, embedded::EmbeddedQueue},
    wording::counted,
};

/// The longest line in bytes: no request body holds a larger event, so nobody could ever get it.
const MAX_LINE: u64 = BatchPolicy::MAX_BYTES;

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

type Group = Vec<NewEvent>;

pub(super) async fn run(config: &Config, args: Args) -> Result<(), Failed> {
    let unusable: Vec<String> =
        args.files.iter().filter_map(|file| unusable(file).err().map(|e| format!("{}: {e}", file.display()))).collect();
    if !unusable.is_empty() {
        return Err(Failed::Usage(format!("{}; nothing was published: name files with one JSON event a line", unusable.join("; "))));
    }
    match &config.queue.backend {
        Backend::Amqp(amqp) => publish(reach(amqp).await?, config, &args.files).await,
        Backend::Embedded => publish(EmbeddedQueue::for_publishing(&config.queue.embedded)?, config, &args.files).await,
    }
}

async fn publish(queue: impl Queue, config: &Config, files: &[PathBuf]) -> Result<(), Failed> {
    queue.ensure(&config.subscribers).await?;
    let mut tally = Tally::default();
    let mut group = Group::new();
    for file in files {
        read(config, &queue, file, &mut group, &mut tally).await?;
    }
    flush(config, &queue, &mut group, &mut tally).await?;
    queue.close().await;
    report(&tally)
}

/// An error for what can be seen not to be readable before anything is published.
fn unusable(file: &Path) -> std::io::Result<()> {
    if file.as_os_str() == "-" {
        return Ok(());
    }
    let found = std::fs::metadata(file)?;
    if found.is_dir() {
        return Err(std::io::ErrorKind::IsADirectory.into());
    }
    // A pipe is opened once: whoever writes into it would see it end.
    if found.is_file() { std::fs::File::open(file).map(drop) } else { Ok(()) }
}

async fn read(config: &Config, queue: &impl Queue, file: &Path, group: &mut Group, tally: &mut Tally) -> Result<(), Failed> {
    let name = visible(&file.display().to_string());
    let mut input: Box<dyn BufRead + Send> = if file.as_os_str() == "-" {
        Box::new(BufReader::new(std::io::stdin()))
    } else {
        Box::new(BufReader::new(std::fs::File::open(file).map_err(|e| Failed::Runtime(format!("{name}: {e}")))?))
    };
    let (mut number, mut bytes) = (0, 0);
    let mut line = Vec::new();
    loop {
        match read_line(&mut input, &mut line) {
            Ok(0) => return Ok(()),
            Ok(_) => number += 1,
            Err(e) => {
                flush(config, queue, group, tally).await?;
                let stored = tally.stored;
                return Err(Failed::Runtime(format!(
                    "{name}: {e} after line {number}; before it {} published and confirmed",
                    counted(stored, "event(s) (is|are)")
                )));
            }
        }
        while line.last().is_some_and(|b| matches!(b, b'\n' | b'\r')) {
            line.pop();
        }
        if line.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        if line.len() as u64 > MAX_LINE {
            eprintln!("{name}:{number}: not published: the event has more than {MAX_LINE} bytes, the most of a request body; split it up");
            tally.bad_lines += 1;
            continue;
        }
        match event_type(&line) {
            Err(why) => {
                let remedy = match why {
                    InvalidEvent::ByteOrderMark => "; save the file without one",
                    InvalidEvent::NotUtf8 { .. } => "; save the file as UTF-8",
                    _ => "",
                };
                eprintln!("{name}:{number}: not published: {why}{remedy}");
                tally.bad_lines += 1;
            }
            Ok(event_type) => {
                bytes += line.len();
                let event_type = event_type.into_owned();
                group.push(NewEvent {
                    event_type,
                    message_id: Some(clock::event_id()),
                    body: Bytes::copy_from_slice(&line),
                    traceparent: None,
                });
            }
        }
        if group.len() >= MAX_GROUP || bytes >= MAX_GROUP_BYTES {
            flush(config, queue, group, tally).await?;
            bytes = 0;
        }
    }
}

/// The next line, of a longer one only its beginning: a file without line breaks may be larger than the memory.
fn read_line(input: &mut (impl BufRead + ?Sized), line: &mut Vec<u8>) -> std::io::Result<usize> {
    line.clear();
    // One byte more than fits, and the two of its end.
    let most = MAX_LINE + 3;
    let read = input.take(most).read_until(b'\n', line)?;
    if read as u64 == most && !line.ends_with(b"\n") {
        input.skip_until(b'\n')?;
    }
    Ok(read)
}

async fn flush(config: &Config, queue: &impl Queue, group: &mut Group, tally: &mut Tally) -> Result<(), Failed> {
    if group.is_empty() {
        return Ok(());
    }
    let types: Vec<String> = group.iter().map(|e| e.event_type.clone()).collect();
    let count = group.len();
    let fates = queue.publish(std::mem::take(group)).await.map_err(|e| {
        Failed::Runtime(format!(
            "{e}; {} confirmed before, it is not known of the next {count} whether the broker took them: publishing those again may repeat them",
            counted(tally.stored, "event(s) (was|were)")
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
        eprintln!("warning: no subscriber's patterns match `{}` ({})", visible(event_type), counted(*n, "event(s)"));
    }
    for (event_type, n) in &tally.unbound {
        eprintln!(
            "warning: `{}` ({}) reached no queue although a pattern matches it; start `hooktrail run`, which binds the queues",
            visible(event_type),
            counted(*n, "event(s)")
        );
    }
    println!("published {}, all confirmed", counted(tally.stored, "event(s)"));
    let unbound: usize = tally.unbound.values().sum();
    let mut failed = Vec::new();
    if tally.bad_lines > 0 {
        failed.push(format!("{} not published; above is why, line by line", counted(tally.bad_lines, "line(s) (was|were)")));
    }
    if tally.refused > 0 {
        failed.push(format!(
            "the broker refused {}: a queue is full by a policy, or unusable (hooktrail check --connect)",
            counted(tally.refused, "event(s)")
        ));
    }
    if unbound > 0 {
        failed.push(format!("{} reached no queue", counted(unbound, "event(s)")));
    }
    if failed.is_empty() { Ok(()) } else { Err(Failed::Runtime(failed.join("; "))) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_read_to_its_end_but_kept_only_as_far_as_it_can_be_used() {
        let most = MAX_LINE as usize;
        for len in [0, 1, most - 1, most, most + 1, most + 2, most + 3, most + 4, 2 * most] {
            for end in ["\n", "\r\n", ""] {
                let text = [&vec![b'x'; len], end.as_bytes()].concat();
                let mut input = BufReader::new(&text[..]);
                let mut line = Vec::new();
                assert_eq!(read_line(&mut input, &mut line).expect("reads") == 0, text.is_empty());
                let kept = line.iter().filter(|b| **b == b'x').count();
                assert!(kept == len || kept > most && len > most && kept <= most + 3, "{kept} of {len}");
                assert_eq!(read_line(&mut input, &mut line).expect("reads"), 0, "nothing is left of {len} and {end:?}");
            }
        }
    }
}

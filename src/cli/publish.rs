//! `publish`: hands events to the broker and returns when all are confirmed.
//!
//! A thread reads, so that signals are handled while no input arrives. It hands over the events
//! that it has read before it waits for more: few at a time from a slow input, a thousand from a
//! file.

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Read as _},
    path::{Path, PathBuf},
};

use bytes::Bytes;
use serde_json::value::RawValue;
use tokio::sync::mpsc;

use super::{failed::Failed, open::reach, text::visible};
use crate::{
    admin::MAX_EVENTS,
    clock,
    config::{Backend, Config, audience},
    event::{InvalidEvent, Tenant, TenantPlace, audience::Audience, event_type},
    policy::batching::BatchPolicy,
    queue::{Arrival, MAX_GROUP, NewEvent, Queue, embedded::EmbeddedQueue},
    supervisor::signal::{self, Stops},
    wording::counted,
};

/// The longest line in bytes: no request body holds a larger event.
const MAX_LINE: u64 = BatchPolicy::MAX_BYTES;

/// The most bytes of a group, whose confirms are awaited together.
const MAX_GROUP_BYTES: usize = 8 * 1024 * 1024;

/// Bytes read at once, about the events of one group.
const BUFFER: usize = 1024 * 1024;

/// The most bad lines that are shown of a file.
const SHOWN: usize = 20;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Files with one JSON event a line, or an array of events, or {"events":[…]}; `-` is standard
    /// input
    #[arg(default_value = "-", value_name = "FILE")]
    files: Vec<PathBuf>,
    /// The tenant of the events, where [queue] tenant is a header
    #[arg(long, value_name = "TENANT")]
    tenant: Option<Tenant>,
}

#[derive(Default)]
struct Tally {
    stored: usize,
    refused: usize,
    bad_lines: usize,
    /// Events that no pattern of the configuration matches, by type.
    unmatched: BTreeMap<String, usize>,
    /// Events that a pattern matches and no queue took, by type.
    unbound: BTreeMap<String, usize>,
}

/// Events read since the previous group.
#[derive(Debug, Default)]
struct Group {
    events: Vec<NewEvent>,
    bytes: usize,
    bad_lines: usize,
    /// The last line of the group, as `FILE:LINE`.
    upto: String,
}

pub(super) async fn run(config: &Config, args: Args) -> Result<(), Failed> {
    let unusable: Vec<String> = args
        .files
        .iter()
        .filter_map(|file| unusable(file).err().map(|e| format!("{}: {e}", file.display())))
        .collect();
    if !unusable.is_empty() {
        return Err(Failed::Usage(format!(
            "{}; nothing was published: name files with one JSON event a line",
            unusable.join("; ")
        )));
    }
    if args.tenant.is_some() {
        let why = match &config.queue.embedded.tenant {
            Some(TenantPlace::Header(_)) => None,
            Some(TenantPlace::Pointer(pointer)) => {
                Some(format!("[queue] tenant is each event's own `{}`", visible(pointer.as_str())))
            }
            None => Some("[queue] tenant is not set, so that events have none".to_owned()),
        };
        if let Some(why) = why {
            return Err(Failed::Usage(format!("{why}; nothing was published: leave --tenant out")));
        }
    }
    match &config.queue.backend {
        Backend::Amqp(amqp) => publish(reach(amqp).await?, config, args).await,
        Backend::Embedded => {
            publish(EmbeddedQueue::for_publishing(&config.queue.embedded)?, config, args).await
        }
    }
}

async fn publish(queue: impl Queue, config: &Config, args: Args) -> Result<(), Failed> {
    let stops = signal::stop()?;
    let mut tally = Tally::default();
    tokio::select! {
        ready = queue.ensure(&config.subscribers) => ready?,
        () = stops.times(1) => return Err(Failed::Runtime("interrupted: nothing was published".to_owned())),
    }
    let wanted = audience(&config.subscribers);
    let (groups, read) = mpsc::channel(1);
    let place = config.queue.embedded.tenant.clone();
    let Args { files, tenant } = args;
    // The thread may wait for input indefinitely; it ends with the process.
    std::thread::Builder::new()
        .name("hooktrail-input".to_owned())
        .spawn(move || Input { place, tenant, ..Input::new(groups) }.files(&files))?;
    let published = tokio::select! {
        published = take(&queue, &wanted, read, &stops, &mut tally) => Some(published),
        () = stops.times(2) => None,
    };
    match published {
        Some(Ok(None)) => {
            queue.close().await;
            report(&tally)
        }
        Some(Ok(Some(upto))) => {
            let upto = if upto.is_empty() {
                "before anything was read".to_owned()
            } else {
                format!("after {upto}; continue after it")
            };
            let why = format!("interrupted {upto}");
            Err(Failed::Runtime(match report(&tally) {
                Err(Failed::Runtime(more)) => format!("{why}; {more}"),
                _ => why,
            }))
        }
        Some(Err(failed)) => Err(failed),
        None => Err(Failed::Runtime(format!(
            "interrupted twice: {} published and confirmed, whether later ones were taken is not known",
            counted(tally.stored, "event(s) (was|were)")
        ))),
    }
}

/// Publishes groups until the input ends. If interrupted, publishes those already handed over and
/// returns their last line.
async fn take(
    queue: &impl Queue,
    wanted: &Audience,
    mut read: mpsc::Receiver<Result<Group, String>>,
    stops: &Stops,
    tally: &mut Tally,
) -> Result<Option<String>, Failed> {
    let (mut upto, mut interrupted) = (String::new(), false);
    loop {
        let group = tokio::select! {
            biased;
            () = stops.times(1), if !interrupted => {
                interrupted = true;
                read.close(); // what was handed over still comes
                continue;
            }
            group = read.recv() => group,
        };
        let group = match group {
            None => break,
            Some(Ok(group)) => group,
            Some(Err(why)) => {
                let before = counted(tally.stored, "event(s) (was|were)");
                return Err(Failed::Runtime(format!(
                    "{why}; {before} published and confirmed before"
                )));
            }
        };
        tally.bad_lines += group.bad_lines;
        let mut left = group.events.into_iter();
        loop {
            let some: Vec<NewEvent> = left.by_ref().take(MAX_GROUP).collect();
            if some.is_empty() {
                break;
            }
            flush(wanted, queue, some, tally).await?;
        }
        if !group.upto.is_empty() {
            upto = group.upto;
        }
    }
    Ok(interrupted.then_some(upto))
}

/// An error if a file cannot be read, found before anything is published.
fn unusable(file: &Path) -> std::io::Result<()> {
    if file.as_os_str() == "-" {
        return Ok(());
    }
    let found = std::fs::metadata(file)?;
    if found.is_dir() {
        return Err(std::io::ErrorKind::IsADirectory.into());
    }
    // A pipe is opened only once: its writer would see it end.
    if found.is_file() { std::fs::File::open(file).map(drop) } else { Ok(()) }
}

/// Reads files, and reports each line that is not an event.
struct Input {
    groups: mpsc::Sender<Result<Group, String>>,
    group: Group,
    /// Where the tenant of an event is.
    place: Option<TenantPlace>,
    /// That of all events.
    tenant: Option<Tenant>,
}

impl Input {
    fn new(groups: mpsc::Sender<Result<Group, String>>) -> Self {
        Self { groups, group: Group::default(), place: None, tenant: None }
    }

    /// Reads all files, until the receiver of the groups is dropped.
    fn files(mut self, files: &[PathBuf]) {
        for file in files {
            match self.file(file) {
                Ok(true) => {}
                Ok(false) => return,
                Err(why) => {
                    if self.hand_over() {
                        self.groups.blocking_send(Err(why)).ok(); // the receiver was dropped
                    }
                    return;
                }
            }
        }
        self.hand_over();
    }

    /// False if the receiver of the groups was dropped.
    fn file(&mut self, file: &Path) -> Result<bool, String> {
        let is_stdin = file.as_os_str() == "-";
        let name = if is_stdin { "stdin".to_owned() } else { visible(&file.display().to_string()) };
        let mut input: BufReader<Box<dyn std::io::Read>> = if is_stdin {
            BufReader::with_capacity(BUFFER, Box::new(std::io::stdin()))
        } else {
            BufReader::with_capacity(
                BUFFER,
                Box::new(std::fs::File::open(file).map_err(|e| format!("{name}: {e}"))?),
            )
        };
        let (mut number, mut bad, mut hinted) = (0_u64, 0, false);
        let mut line = Vec::new();
        loop {
            match read_line(&mut input, &mut line) {
                Ok(0) => return Ok(true),
                Ok(_) => number += 1,
                Err(e) => return Err(format!("{name}: {e} after line {number}")),
            }
            while line.last().is_some_and(|b| matches!(b, b'\n' | b'\r')) {
                line.pop();
            }
            self.group.upto = format!("{name}:{number}");
            for Unpublished { why, goes_on } in self.line(&line) {
                bad += 1;
                match bad {
                    ..=SHOWN => eprintln!("{name}:{number}: not published: {why}"),
                    n if n == SHOWN + 1 => {
                        eprintln!("{name}: more such lines follow, which are counted and not shown")
                    }
                    _ => {}
                }
                if goes_on && !std::mem::replace(&mut hinted, true) {
                    eprintln!(
                        "{name}: one event a line: `jq -c .` makes that of JSON over several lines"
                    );
                }
            }
            let full = self.group.events.len() >= MAX_GROUP || self.group.bytes >= MAX_GROUP_BYTES;
            // The next line may take long to arrive.
            let waits = !input.buffer().contains(&b'\n');
            if (full || waits) && !self.hand_over() {
                return Ok(false);
            }
        }
    }

    /// Adds the events of a line to the group; returns the parts that are not events.
    fn line(&mut self, line: &[u8]) -> Vec<Unpublished> {
        if line.iter().all(u8::is_ascii_whitespace) {
            return Vec::new();
        }
        let unpublished = if line.len() as u64 > MAX_LINE {
            let why = format!(
                "the event has more than {MAX_LINE} bytes, the most of a request body; split it up"
            );
            vec![Unpublished { why, goes_on: false }]
        } else {
            let all = Bytes::copy_from_slice(line);
            match event_type(line) {
                Ok(event_type) => {
                    self.add(event_type.into_owned(), all.clone());
                    Vec::new()
                }
                Err(why) => match several(line) {
                    None => vec![Unpublished::from(&why)],
                    Some(many) if many.len() > MAX_EVENTS => {
                        let why = format!(
                            "{} events are more than the {MAX_EVENTS} of one line; `jq -c '.[]'` makes a line of each",
                            many.len()
                        );
                        vec![Unpublished { why, goes_on: false }]
                    }
                    Some(many) => {
                        let mut bad = Vec::new();
                        for (n, event) in many.into_iter().map(|e| e.get().as_bytes()).enumerate() {
                            match event_type(event) {
                                Ok(event_type) => {
                                    self.add(event_type.into_owned(), all.slice(place(line, event)))
                                }
                                Err(why) => bad.push(Unpublished {
                                    why: format!(
                                        "number {} of its events: {}",
                                        n + 1,
                                        Unpublished::from(&why).why
                                    ),
                                    goes_on: false,
                                }),
                            }
                        }
                        bad
                    }
                },
            }
        };
        self.group.bad_lines += usize::from(!unpublished.is_empty());
        unpublished
    }

    fn add(&mut self, event_type: String, body: Bytes) {
        self.group.bytes += body.len();
        let place = self.place.as_ref();
        let tenant = place.and_then(|place| place.tenant(self.tenant.as_ref(), &body));
        self.group.events.push(NewEvent {
            event_type,
            message_id: Some(clock::event_id()),
            body,
            traceparent: None,
            tenant,
        });
    }

    /// Hands over the group, as soon as there is room for it.
    fn hand_over(&mut self) -> bool {
        self.groups.blocking_send(Ok(std::mem::take(&mut self.group))).is_ok()
    }
}

/// A part of a line that is not published.
struct Unpublished {
    why: String,
    /// Whether JSON begins here and goes on in the next line.
    goes_on: bool,
}

impl From<&InvalidEvent> for Unpublished {
    fn from(why: &InvalidEvent) -> Self {
        let text = match why {
            InvalidEvent::ByteOrderMark => format!("{why}; save the file without one"),
            InvalidEvent::NotUtf8 { .. } => format!("{why}; save the file as UTF-8"),
            // The line was parsed alone, so its number is always 1.
            InvalidEvent::NotJson(found) => match found.rsplit_once(" at line 1 column ") {
                Some((what, column)) => format!("not JSON at column {column}: {what}"),
                None => why.to_string(),
            },
            _ => why.to_string(),
        };
        Self {
            why: text,
            goes_on: matches!(why, InvalidEvent::NotJson(found) if found.starts_with("EOF ")),
        }
    }
}

/// The events of an array, or of `{"events":[…]}`, each with its exact bytes.
fn several(line: &[u8]) -> Option<Vec<&RawValue>> {
    #[derive(serde::Deserialize)]
    struct Payload<'l> {
        #[serde(borrow)]
        events: Vec<&'l RawValue>,
    }
    let text = std::str::from_utf8(line).ok()?;
    match text.trim_start().starts_with('[') {
        true => serde_json::from_str(text).ok(),
        // Two fields `events` are ambiguous.
        false => serde_json::from_str::<Payload<'_>>(text).ok().map(|p| p.events),
    }
}

/// The place of a part in its line.
fn place(line: &[u8], part: &[u8]) -> std::ops::Range<usize> {
    let begin = part.as_ptr() as usize - line.as_ptr() as usize;
    begin..begin + part.len()
}

/// Reads the next line, and of one that is too long only the beginning: a file without line breaks
/// may be larger than the memory.
fn read_line(input: &mut (impl BufRead + ?Sized), line: &mut Vec<u8>) -> std::io::Result<usize> {
    line.clear();
    // One byte more than is allowed, and two for the line's end.
    let most = MAX_LINE + 3;
    let read = input.take(most).read_until(b'\n', line)?;
    if read as u64 == most && !line.ends_with(b"\n") {
        input.skip_until(b'\n')?;
    }
    Ok(read)
}

async fn flush(
    wanted: &Audience,
    queue: &impl Queue,
    group: Vec<NewEvent>,
    tally: &mut Tally,
) -> Result<(), Failed> {
    let matches =
        |e: &NewEvent| wanted.matches(e.tenant.as_ref().map(Tenant::as_str), &e.event_type);
    let types: Vec<(String, bool)> =
        group.iter().map(|e| (e.event_type.clone(), matches(e))).collect();
    let count = group.len();
    let published = queue.publish(group).await.map_err(|e| {
        Failed::Runtime(format!(
            "{e}; {} confirmed before, whether the broker took the next {count} is not known: publishing those again may repeat them",
            counted(tally.stored, "event(s) (was|were)")
        ))
    })?;
    for ((event_type, is_wanted), published) in types.into_iter().zip(published) {
        match published.arrival(is_wanted) {
            Arrival::Refused => tally.refused += 1,
            Arrival::Unbound => *tally.unbound.entry(event_type).or_default() += 1,
            Arrival::Stored => tally.stored += 1,
            Arrival::Unmatched => {
                tally.stored += 1;
                *tally.unmatched.entry(event_type).or_default() += 1;
            }
        }
    }
    Ok(())
}

fn report(tally: &Tally) -> Result<(), Failed> {
    for (event_type, n) in &tally.unmatched {
        eprintln!(
            "warning: no subscriber's patterns match `{}` ({})",
            visible(event_type),
            counted(*n, "event(s)")
        );
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
        failed.push(format!(
            "{} not published; see above for each line",
            counted(tally.bad_lines, "line(s) (was|were)")
        ));
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

    /// The events of a line, and the reports on the rest.
    fn taken(line: &str) -> (Vec<(String, String)>, Vec<String>) {
        let mut input = Input::new(mpsc::channel(1).0);
        let unpublished = input.line(line.as_bytes());
        let text = |body: &Bytes| String::from_utf8_lossy(body).into_owned();
        let events =
            input.group.events.iter().map(|e| (e.event_type.clone(), text(&e.body))).collect();
        (
            events,
            unpublished.into_iter().map(|u| if u.goes_on { u.why + " …" } else { u.why }).collect(),
        )
    }

    #[test]
    fn a_line_is_one_event_or_an_array_of_them_or_a_request_body_each_byte_for_byte() {
        let (a, b) = (r#"{"event":"a","n":18446744073709551616}"#, r#"{ "event":"b", "x":1.0 }"#);
        let both = || vec![("a".to_owned(), a.to_owned()), ("b".to_owned(), b.to_owned())];
        assert_eq!(taken(a), (both()[..1].to_vec(), Vec::new()));
        for line in [
            format!("[{a}, {b}]"),
            format!(" {{\"events\" : [{a},{b} ]}}"),
            format!("{{\"x\":1,\"events\":[{a},{b}]}}"),
        ] {
            assert_eq!(taken(&line), (both(), Vec::new()), "{line}");
        }
        // An object with a type is an event, whatever else it has.
        assert_eq!(taken(r#"{"events":[],"event":"c"}"#).0.len(), 1);
        let (events, bad) = taken(&format!("[{a},1,{b}]"));
        assert_eq!(events, both());
        assert!(bad.len() == 1 && bad[0].contains("number 2"), "{bad:?}");
        assert_eq!(taken(&format!("[{}1]", "1,".repeat(MAX_EVENTS))).1.len(), 1, "said once");
    }

    #[test]
    fn what_is_no_event_is_told_with_its_column_and_what_goes_on_with_a_hint() {
        for (line, why) in [
            ("nonsense", "not JSON at column 2"),
            (r#"{"event":"a",}"#, "not JSON at column 14"),
            (r#"{"event":"a"} x"#, "not JSON at column 15"),
            ("{", "…"),
            ("[", "…"),
            (r#"  {"event":"a","#, "…"),
            ("1", "not an object"),
            (r#"{"x":1}"#, "no field `event`"),
            (r#"{"events":[{"event":"a"}],"events":[]}"#, "no field `event`"),
            (r#"{"events":1}"#, "no field `event`"),
        ] {
            let (events, bad) = taken(line);
            assert!(events.is_empty() && bad.len() == 1 && bad[0].contains(why), "{line}: {bad:?}");
            assert!(!bad[0].contains("line 1"), "there is one number of a line: {bad:?}");
        }
    }

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
                assert!(
                    kept == len || kept > most && len > most && kept <= most + 3,
                    "{kept} of {len}"
                );
                assert_eq!(
                    read_line(&mut input, &mut line).expect("reads"),
                    0,
                    "nothing is left of {len} and {end:?}"
                );
            }
        }
    }
}

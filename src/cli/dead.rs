//! `dead`: dead letters, one at a time, so that a hundred thousand of them need no memory.

use std::{
    convert::Infallible,
    io::{IsTerminal as _, Write as _},
    str::FromStr,
};

use clap::Subcommand;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::{json, value::RawValue};

use super::{Failed, reach, visible};
use crate::{
    config::{self, Backend, Config},
    queue::{DeadLetter, DeadLetters, Held, Kind, Queue, QueueError, Reason, embedded::EmbeddedQueue},
};

/// Letters that are replayed together, one confirm for all: whichever is reached first.
const GROUP_LETTERS: usize = 50;
const GROUP_BYTES: usize = 4 * 1024 * 1024;

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// One line a dead letter, oldest first, each with its number, such as @2
    List {
        #[command(flatten)]
        which: Which,
        /// One JSON object a line
        #[arg(long)]
        json: bool,
    },
    /// Everything about one dead letter, its body included
    Show {
        /// The subscriber's name
        subscriber: String,
        /// Its id, or `@2` for the second of `list`
        letter: Name,
        /// As a JSON object
        #[arg(long)]
        json: bool,
    },
    /// Send dead letters again: a batch with the same bytes under the same id, attempts begun anew
    Replay {
        #[command(flatten)]
        which: Which,
        /// Say what would be replayed, and do nothing
        #[arg(long)]
        dry_run: bool,
        /// The result as a JSON object
        #[arg(long)]
        json: bool,
    },
    /// Delete dead letters for good
    Purge {
        #[command(flatten)]
        which: Which,
        /// Say what would be deleted, and do nothing
        #[arg(long)]
        dry_run: bool,
        /// Do not ask
        #[arg(long)]
        yes: bool,
        /// The result as a JSON object
        #[arg(long)]
        json: bool,
    },
}

impl Command {
    fn subscriber(&self) -> &str {
        match self {
            Self::Show { subscriber, .. } => subscriber,
            Self::List { which, .. } | Self::Replay { which, .. } | Self::Purge { which, .. } => &which.subscriber,
        }
    }
}

/// Which dead letters are meant: all of a subscriber's, unless ids or a reason narrow it down.
#[derive(Debug, clap::Args)]
pub(super) struct Which {
    /// The subscriber's name; one that is not configured any more is fine
    subscriber: String,
    /// Only these: an id, or `@2` for the second of `list`
    #[arg(value_name = "LETTER")]
    letters: Vec<Name>,
    /// Only those with this reason
    #[arg(long, value_parser = parse_reason)]
    reason: Option<Reason>,
}

fn parse_reason(name: &str) -> Result<Reason, String> {
    Reason::from_name(name).ok_or_else(|| format!("the reasons are {}", Reason::ALL.map(Reason::name).join(", ")))
}

/// How a dead letter is named: an id may be any text, digits too, so a number has a sign of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Name {
    Number(usize),
    Id(String),
}

impl FromStr for Name {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        let number = text.strip_prefix('@').and_then(|n| n.parse().ok());
        Ok(number.map_or_else(|| Self::Id(text.to_owned()), Self::Number))
    }
}

impl Name {
    fn is(&self, number: usize, letter: &DeadLetter) -> bool {
        match self {
            Self::Number(n) => *n == number,
            Self::Id(id) => letter.id.as_ref() == Some(id),
        }
    }
}

/// Picks what is meant out of a walk, and knows which names it has not met.
struct Choice<'w> {
    which: &'w Which,
    met: Vec<bool>,
    /// Letters seen, so the number of the last one.
    number: usize,
}

impl<'w> Choice<'w> {
    fn new(which: &'w Which) -> Self {
        Self { which, met: vec![false; which.letters.len()], number: 0 }
    }

    /// Whether the next letter of the walk is meant.
    fn includes(&mut self, letter: &DeadLetter) -> bool {
        self.number += 1;
        if self.which.reason.is_some_and(|r| r != letter.reason) {
            return false;
        }
        let mut named = self.which.letters.is_empty();
        for (name, met) in self.which.letters.iter().zip(&mut self.met) {
            if name.is(self.number, letter) {
                named = true;
                *met = true;
            }
        }
        named
    }

    /// After the walk: an error if a name was not met.
    fn complete(&self) -> Result<(), Failed> {
        let names = self.which.letters.iter().zip(&self.met).filter(|(_, met)| !**met).map(|(name, _)| name);
        let missing: Vec<&Name> = names.collect();
        if missing.is_empty() { Ok(()) } else { Err(not_found(&self.which.subscriber, &missing, self.which.reason)) }
    }
}

fn not_found(subscriber: &str, names: &[&Name], reason: Option<Reason>) -> Failed {
    let with = reason.map(|r| format!(" with reason {}", r.name())).unwrap_or_default();
    let told = names.iter().map(|name| match name {
        Name::Number(n) => format!("no dead letter{with} is @{n}"),
        Name::Id(id) => format!("no dead letter{with} has the id `{}`", visible(id)),
    });
    let told: Vec<String> = told.collect();
    let hint = "shows ids and numbers; a number is written @2";
    Failed::Runtime(format!("{}; `hooktrail dead list {subscriber}` {hint}", told.join(", ")))
}

pub(super) async fn run(config: &Config, command: Command) -> Result<(), Failed> {
    let subscriber = command.subscriber();
    if !config::is_subscriber_name(subscriber) {
        return Err(Failed::Usage(format!("`{subscriber}` is not a subscriber's name: 1 to 64 of a-z, 0-9 and `-`")));
    }
    match &config.queue.backend {
        Backend::Amqp(amqp) => walk(reach(amqp).await?, command).await,
        Backend::Embedded => walk(EmbeddedQueue::existing(&config.queue.embedded)?, command).await,
    }
}

async fn walk(queue: impl Queue, command: Command) -> Result<(), Failed> {
    let letters = queue.dead_letters(command.subscriber()).await?;
    match command {
        Command::List { which, json } => list(letters, &which, json).await,
        Command::Show { subscriber, letter, json } => show(letters, &subscriber, &letter, json).await,
        Command::Replay { which, dry_run, json } => replay(letters, &which, dry_run, json).await,
        Command::Purge { which, dry_run, yes, json } => purge(letters, &which, dry_run, yes, json).await,
    }?;
    queue.close().await;
    Ok(())
}

fn time(at: Option<std::time::SystemTime>) -> String {
    at.map_or_else(|| "-".to_owned(), |t| humantime::format_rfc3339_seconds(t).to_string())
}

fn as_json(number: usize, l: &DeadLetter) -> serde_json::Value {
    let rfc3339 = |t: Option<std::time::SystemTime>| t.map(|t| humantime::format_rfc3339_millis(t).to_string());
    json!({
        "number": number,
        "id": l.id,
        "kind": l.kind.name(),
        "reason": l.reason.name(),
        "status": l.status,
        "error": l.error,
        "events": l.events,
        "attempts": l.attempts,
        "first_attempt_at": rfc3339(l.first_attempt_at),
        "died_at": rfc3339(l.died_at),
        "content_type": l.content_type,
        "bytes": l.body.len(),
    })
}

/// Prints a line; false when nobody reads any more, as with `| head`.
fn print(line: &str) -> bool {
    writeln!(std::io::stdout(), "{line}").is_ok()
}

async fn list(mut letters: impl DeadLetters, which: &Which, json: bool) -> Result<(), Failed> {
    let mut choice = Choice::new(which);
    let mut shown = 0;
    while let Some(Held { letter: l, .. }) = letters.next().await? {
        if !choice.includes(&l) {
            continue;
        }
        let number = choice.number;
        if shown == 0
            && !json
            && !print(&format!(
                "{:>6}  {:<20}  {:<14}  {:>6}  {:>8}  {:<36}  ERROR",
                "NUMBER", "DIED AT", "REASON", "EVENTS", "ATTEMPTS", "ID"
            ))
        {
            return Ok(letters.close().await?);
        }
        shown += 1;
        let line = if json {
            as_json(number, &l).to_string()
        } else {
            let error: String = visible(&l.error).chars().take(80).collect();
            let id = l.id.as_deref().map_or_else(|| "-".to_owned(), visible);
            let number = format!("@{number}");
            format!("{number:>6}  {:<20}  {:<14}  {:>6}  {:>8}  {id:<36}  {error}", time(l.died_at), l.reason.name(), l.events, l.attempts)
        };
        if !print(&line) {
            return Ok(letters.close().await?);
        }
    }
    letters.close().await?;
    choice.complete()?;
    if shown == 0 && !json {
        print("no dead letters");
    }
    Ok(())
}

async fn show(mut letters: impl DeadLetters, subscriber: &str, wanted: &Name, json: bool) -> Result<(), Failed> {
    let mut number = 0;
    while let Some(Held { letter: l, .. }) = letters.next().await? {
        number += 1;
        if !wanted.is(number, &l) {
            continue;
        }
        letters.close().await?;
        if json {
            let mut value = as_json(number, &l);
            value["body"] = json!(String::from_utf8_lossy(&l.body));
            print(&value.to_string());
            return Ok(());
        }
        for (name, value) in [
            ("number", format!("@{number}")),
            ("id", l.id.as_deref().map_or_else(|| "-".to_owned(), visible)),
            ("kind", l.kind.name().to_owned()),
            ("reason", l.reason.name().to_owned()),
            ("status", l.status.map_or_else(|| "-".to_owned(), |s| s.to_string())),
            ("error", visible(&l.error)),
            ("events", l.events.to_string()),
            ("attempts", l.attempts.to_string()),
            ("first attempt at", time(l.first_attempt_at)),
            ("died at", time(l.died_at)),
            ("content type", l.content_type.as_deref().map_or_else(|| "-".to_owned(), visible)),
            ("bytes", l.body.len().to_string()),
        ] {
            print(&format!("{name:<17} {value}"));
        }
        print("");
        print(&readable(&l.body));
        return Ok(());
    }
    letters.close().await?;
    Err(not_found(subscriber, &[wanted], None))
}

/// A body for reading: each token as it is stored, the events of a batch on a line each, and nothing
/// that drives the terminal.
fn readable(body: &[u8]) -> String {
    let by_line = std::str::from_utf8(body).ok().and_then(event_a_line);
    let mut out = String::new();
    for chunk in by_line.as_deref().map_or(body, str::as_bytes).utf8_chunks() {
        for (n, line) in chunk.valid().split('\n').enumerate() {
            out.extend((n > 0).then_some('\n'));
            out.push_str(&visible(line));
        }
        out.extend(chunk.invalid().iter().map(|b| format!("\\x{b:02x}")));
    }
    out
}

/// `{"events":[…]}` with a line break before each event and nothing else changed: what would be parsed
/// and printed again loses the spelling of numbers and all but the last of two fields.
fn event_a_line(body: &str) -> Option<String> {
    #[derive(serde::Deserialize)]
    struct Payload<'b> {
        #[serde(borrow)]
        events: Vec<&'b RawValue>,
    }
    let mut out = String::with_capacity(body.len());
    let mut from = 0;
    for event in serde_json::from_str::<Payload<'_>>(body).ok()?.events {
        // The events are slices of the body.
        let at = event.get().as_ptr() as usize - body.as_ptr() as usize;
        out.push_str(&body[from..at]);
        out.push('\n');
        from = at;
    }
    Some(out + &body[from..])
}

/// Shown when stderr is a terminal.
fn progress(total: u32) -> ProgressBar {
    let target = if std::io::stderr().is_terminal() { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
    let style = ProgressStyle::with_template("{bar:40} {pos}/{len} dead letters, {per_sec}, {eta} left");
    ProgressBar::with_draw_target(Some(total.into()), target).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

/// Collects what is replayed together, so that large letters are held one at a time and small ones are quick.
struct Group<T> {
    items: Vec<T>,
    bytes: usize,
}

impl<T> Group<T> {
    fn new() -> Self {
        Self { items: Vec::new(), bytes: 0 }
    }

    /// Adds an item; returns those that go first, if the item does not belong with them.
    fn push(&mut self, item: T, bytes: usize) -> Option<Vec<T>> {
        let full = self.items.len() == GROUP_LETTERS || self.bytes + bytes > GROUP_BYTES;
        let before = if full { std::mem::replace(self, Self::new()).items } else { Vec::new() };
        self.items.push(item);
        self.bytes += bytes;
        (!before.is_empty()).then_some(before)
    }
}

/// Whether a letter may be sent at all. What came into the retry queue without being an envelope was
/// never put together by hooktrail: as a batch it would be a request that no receiver understands.
fn can_be_replayed(letter: &DeadLetter) -> bool {
    (letter.kind, letter.reason) != (Kind::Batch, Reason::InvalidEvent)
}

async fn replay(mut letters: impl DeadLetters, which: &Which, dry_run: bool, json: bool) -> Result<(), Failed> {
    let bar = progress(letters.left());
    let (mut choice, mut replayed, mut skipped, mut group) = (Choice::new(which), 0, 0, Group::new());
    let walk = async {
        while let Some(held) = letters.next().await? {
            bar.inc(1);
            if !choice.includes(&held.letter) {
                continue;
            }
            if !can_be_replayed(&held.letter) {
                skipped += 1;
                let number = choice.number;
                let left = if dry_run { number } else { number - replayed };
                let moved = if left == number { String::new() } else { format!(" (@{left} from now on)") };
                bar.suspend(|| {
                eprintln!(
                    "@{number}{moved} is not replayed, it never was a batch of hooktrail's: {error}; look at it with `hooktrail dead show {name} @{left}`, then delete it with `hooktrail dead purge {name} @{left}`",
                    error = visible(&held.letter.error),
                    name = which.subscriber,
                );
            });
                continue;
            }
            replayed += 1;
            if dry_run {
                continue;
            }
            let bytes = held.letter.body.len();
            if let Some(full) = group.push(held, bytes) {
                letters.replay(full).await?;
            }
        }
        if group.items.is_empty() { Ok(()) } else { letters.replay(group.items).await }
    };
    let walked = walk.await;
    bar.finish_and_clear();
    close(letters, walked).await?;
    finished("replay", replayed, skipped, &choice, dry_run, json)?;
    if skipped > 0 && !which.letters.is_empty() {
        return Err(Failed::Runtime(format!("{skipped} of the letters named cannot be replayed; above is what to do")));
    }
    Ok(())
}

async fn purge(mut letters: impl DeadLetters, which: &Which, dry_run: bool, yes: bool, json: bool) -> Result<(), Failed> {
    if !dry_run && !yes && !confirm(&letters, which)? {
        return Err(Failed::Usage("nothing was deleted".to_owned()));
    }
    let bar = progress(letters.left());
    let (mut choice, mut purged) = (Choice::new(which), 0);
    let walk = async {
        while let Some(held) = letters.next().await? {
            bar.inc(1);
            if choice.includes(&held.letter) {
                purged += 1;
                if !dry_run {
                    letters.purge(&held).await?;
                }
            }
        }
        Ok(())
    };
    let walked = walk.await;
    bar.finish_and_clear();
    close(letters, walked).await?;
    finished("purge", purged, 0, &choice, dry_run, json)
}

/// Gives the letters back, also after a walk that failed half-way: without that they would change places.
async fn close(letters: impl DeadLetters, walked: Result<(), QueueError>) -> Result<(), Failed> {
    let closed = letters.close().await;
    walked?;
    Ok(closed?)
}

fn confirm(letters: &impl DeadLetters, which: &Which) -> Result<bool, Failed> {
    if !std::io::stdin().is_terminal() {
        return Err(Failed::Usage(
            "purge deletes for good and cannot ask here; say --yes if that is meant, or look first with --dry-run".to_owned(),
        ));
    }
    let some = if which.letters.is_empty() && which.reason.is_none() { "all" } else { "the chosen ones of" };
    eprint!("Delete {some} {} dead letters of `{}` for good? [y/N] ", letters.left(), which.subscriber);
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer)?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}

fn finished(what: &str, done: usize, skipped: usize, choice: &Choice<'_>, dry_run: bool, json: bool) -> Result<(), Failed> {
    let (which, of) = (choice.which, choice.number);
    if json {
        let result = json!({
            "command": what, "subscriber": which.subscriber, "dry_run": dry_run, "chosen": done, "skipped": skipped, "of": of,
        });
        print(&result.to_string());
    } else {
        let verb = match (what, dry_run) {
            ("replay", false) => "replayed",
            ("replay", true) => "would replay",
            (_, false) => "purged",
            (_, true) => "would purge",
        };
        let rest = if skipped > 0 { format!(", skipped {skipped}") } else { String::new() };
        print(&format!("{verb} {done} of {of} dead letters of `{}`{rest}", which.subscriber));
    }
    choice.complete()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_is_as_large_as_its_letters_or_bytes_allow_and_a_letter_is_never_too_large() {
        let groups = |sizes: &[usize]| {
            let mut group = Group::new();
            let mut all: Vec<Vec<usize>> = sizes.iter().filter_map(|bytes| group.push(*bytes, *bytes)).collect();
            all.push(group.items);
            all.iter().map(Vec::len).collect::<Vec<_>>()
        };
        let mib = 1024 * 1024;
        assert_eq!(groups(&[1000; 120]), [50, 50, 20]);
        assert_eq!(groups(&[mib; 9]), [4, 4, 1]);
        assert_eq!(groups(&[12 * mib; 3]), [1, 1, 1]);
        assert_eq!(groups(&[1, 12 * mib, 1, 1]), [1, 1, 2]);
    }

    #[test]
    fn a_body_is_shown_with_its_own_tokens() {
        let batch = r#"{"events":[{"n":18446744073709551616,"a":1.0,"a":2},{"s":"\u001b\/[{,"} , {"x":[1,{"y":-0.0}]}]}"#;
        let shown = readable(batch.as_bytes());
        assert_eq!(shown.replace('\n', ""), batch);
        let starts: Vec<&str> = shown.lines().map(|l| &l[..5]).collect();
        assert_eq!(starts, [r#"{"eve"#, r#"{"n":"#, r#"{"s":"#, r#"{"x":"#]);
        for other in
            ["{\"event\":\"a\",\n\"n\":1e400}", "{\"event\":1}\n{\"event\":2}\n", "{\"events\":[", "{\"events\":[],\"events\":[1]}", ""]
        {
            assert_eq!(readable(other.as_bytes()), other);
        }
        assert_eq!(readable(b"a\x1b[2J\r\nb\xff\xfe \xc2\x9b c\0"), "a\\u{1b}[2J\\u{d}\nb\\xff\\xfe \\u{9b} c\\u{0}");
    }
}

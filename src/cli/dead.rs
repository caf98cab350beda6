//! `dead`: dead letters, one at a time, so that a hundred thousand of them need no memory.

use std::io::{IsTerminal as _, Write as _};

use clap::Subcommand;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::json;

use super::{Failed, reach};
use crate::{
    config::{self, Config},
    queue::{
        DeadLetter, Queue as _, Reason,
        amqp::{DeadLetters, Held},
    },
};

/// Letters that are replayed together, one confirm for all.
const REPLAY_GROUP: usize = 50;

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// One line a dead letter, oldest first
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
        /// Its id, or its number in `list`
        letter: String,
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

/// Which dead letters are meant: all of a subscriber's, unless ids or a reason narrow it down.
#[derive(Debug, clap::Args)]
pub(super) struct Which {
    /// The subscriber's name; one that is not configured any more is fine
    subscriber: String,
    /// Only these, by id or by number in `list`
    #[arg(value_name = "LETTER")]
    letters: Vec<String>,
    /// Only those with this reason
    #[arg(long, value_parser = parse_reason)]
    reason: Option<Reason>,
}

fn parse_reason(name: &str) -> Result<Reason, String> {
    Reason::from_name(name).ok_or_else(|| format!("the reasons are {}", Reason::ALL.map(Reason::name).join(", ")))
}

impl Which {
    fn includes(&self, number: usize, letter: &DeadLetter) -> bool {
        let named = |l: &String| letter.id.as_ref() == Some(l) || l.parse() == Ok(number);
        (self.letters.is_empty() || self.letters.iter().any(named)) && self.reason.is_none_or(|r| r == letter.reason)
    }
}

pub(super) async fn run(config: &Config, command: Command) -> Result<(), Failed> {
    let subscriber = match &command {
        Command::Show { subscriber, .. } => subscriber,
        Command::List { which, .. } | Command::Replay { which, .. } | Command::Purge { which, .. } => &which.subscriber,
    };
    if !config::is_subscriber_name(subscriber) {
        return Err(Failed::Usage(format!("`{subscriber}` is not a subscriber's name: 1 to 64 of a-z, 0-9 and `-`")));
    }
    let queue = reach(config).await?;
    let letters = queue.dead_letters(subscriber).await?;
    match command {
        Command::List { which, json } => list(letters, &which, json).await,
        Command::Show { letter, json, .. } => show(letters, &letter, json).await,
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

async fn list(mut letters: DeadLetters, which: &Which, json: bool) -> Result<(), Failed> {
    let mut number = 0;
    let mut shown = 0;
    while let Some(Held { letter: l, .. }) = letters.next().await? {
        number += 1;
        if !which.includes(number, &l) {
            continue;
        }
        if shown == 0
            && !json
            && !print(&format!(
                "{:>6}  {:<20}  {:<14}  {:>6}  {:>8}  {:<36}  ERROR",
                "NUMBER", "DIED AT", "REASON", "EVENTS", "ATTEMPTS", "ID"
            ))
        {
            break;
        }
        shown += 1;
        let line = if json {
            as_json(number, &l).to_string()
        } else {
            let error: String = l.error.chars().map(|c| if c.is_control() { ' ' } else { c }).take(80).collect();
            let id = l.id.as_deref().unwrap_or("-");
            format!("{number:>6}  {:<20}  {:<14}  {:>6}  {:>8}  {id:<36}  {error}", time(l.died_at), l.reason.name(), l.events, l.attempts)
        };
        if !print(&line) {
            break;
        }
    }
    letters.close().await?;
    if shown == 0 && !json {
        print("no dead letters");
    }
    Ok(())
}

async fn show(mut letters: DeadLetters, wanted: &str, json: bool) -> Result<(), Failed> {
    let mut number = 0;
    while let Some(Held { letter: l, .. }) = letters.next().await? {
        number += 1;
        if l.id.as_deref() != Some(wanted) && wanted.parse() != Ok(number) {
            continue;
        }
        letters.close().await?;
        let text = String::from_utf8_lossy(&l.body);
        if json {
            let mut value = as_json(number, &l);
            value["body"] = json!(text);
            print(&value.to_string());
            return Ok(());
        }
        for (name, value) in [
            ("number", number.to_string()),
            ("id", l.id.clone().unwrap_or_else(|| "-".to_owned())),
            ("kind", l.kind.name().to_owned()),
            ("reason", l.reason.name().to_owned()),
            ("status", l.status.map_or_else(|| "-".to_owned(), |s| s.to_string())),
            ("error", l.error.clone()),
            ("events", l.events.to_string()),
            ("attempts", l.attempts.to_string()),
            ("first attempt at", time(l.first_attempt_at)),
            ("died at", time(l.died_at)),
            ("content type", l.content_type.clone().unwrap_or_else(|| "-".to_owned())),
            ("bytes", l.body.len().to_string()),
        ] {
            print(&format!("{name:<17} {value}"));
        }
        print("");
        // Pretty for reading; the stored bytes are those that were sent.
        let pretty = serde_json::from_slice::<serde_json::Value>(&l.body).ok().and_then(|v| serde_json::to_string_pretty(&v).ok());
        print(&pretty.unwrap_or_else(|| text.into_owned()));
        return Ok(());
    }
    letters.close().await?;
    Err(Failed::Runtime(format!("no dead letter `{wanted}`; `hooktrail dead list` shows those there are")))
}

/// Shown when stderr is a terminal.
fn progress(total: u32) -> ProgressBar {
    let target = if std::io::stderr().is_terminal() { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
    let style = ProgressStyle::with_template("{bar:40} {pos}/{len} dead letters, {per_sec}, {eta} left");
    ProgressBar::with_draw_target(Some(total.into()), target).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

async fn replay(mut letters: DeadLetters, which: &Which, dry_run: bool, json: bool) -> Result<(), Failed> {
    let bar = progress(letters.left());
    let (mut number, mut replayed, mut group) = (0, 0, Vec::new());
    while let Some(held) = letters.next().await? {
        number += 1;
        bar.inc(1);
        if !which.includes(number, &held.letter) {
            continue;
        }
        replayed += 1;
        if dry_run {
            continue;
        }
        group.push(held);
        if group.len() == REPLAY_GROUP {
            letters.replay(std::mem::take(&mut group)).await?;
        }
    }
    if !group.is_empty() {
        letters.replay(group).await?;
    }
    bar.finish_and_clear();
    letters.close().await?;
    finished("replay", replayed, number, dry_run, json, which)
}

async fn purge(mut letters: DeadLetters, which: &Which, dry_run: bool, yes: bool, json: bool) -> Result<(), Failed> {
    if !dry_run && !yes && !confirm(&letters, which)? {
        return Err(Failed::Usage("nothing was deleted".to_owned()));
    }
    let bar = progress(letters.left());
    let (mut number, mut purged) = (0, 0);
    while let Some(held) = letters.next().await? {
        number += 1;
        bar.inc(1);
        if which.includes(number, &held.letter) {
            purged += 1;
            if !dry_run {
                letters.purge(&held).await?;
            }
        }
    }
    bar.finish_and_clear();
    letters.close().await?;
    finished("purge", purged, number, dry_run, json, which)
}

fn confirm(letters: &DeadLetters, which: &Which) -> Result<bool, Failed> {
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

fn finished(what: &str, done: usize, of: usize, dry_run: bool, json: bool, which: &Which) -> Result<(), Failed> {
    if json {
        print(&json!({ "command": what, "subscriber": which.subscriber, "dry_run": dry_run, "chosen": done, "of": of }).to_string());
    } else {
        let verb = match (what, dry_run) {
            ("replay", false) => "replayed",
            ("replay", true) => "would replay",
            (_, false) => "purged",
            (_, true) => "would purge",
        };
        print(&format!("{verb} {done} of {of} dead letters of `{}`", which.subscriber));
    }
    if done < which.letters.len() {
        return Err(Failed::Runtime(format!("{} of the letters named were not found", which.letters.len() - done)));
    }
    Ok(())
}

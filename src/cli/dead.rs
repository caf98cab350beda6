//! `dead`: dead letters and orphans, one at a time, so that a hundred thousand of them need no
//! memory.

pub(super) mod choice;
mod summary;

use std::{
    io::IsTerminal as _,
    time::{Duration, Instant},
};

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use clap::Subcommand;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::{json, value::RawValue};

use self::choice::{Choice, Name, Which};
use super::{
    complete,
    failed::Failed,
    open::reach,
    text::{print, time, visible},
};
use crate::{
    clock,
    config::{Backend, Config},
    delivery::{AttemptLog, AttemptResult, FailedAttempt, MessageKind, Reason},
    queue::{DeadLetters, Held, Queue as _, QueueError, embedded::EmbeddedQueue},
    supervisor::signal::{self, Stops},
    wording::counted,
};

/// Letters that are replayed together, one confirm for all: whichever is reached first.
const GROUP_LETTERS: usize = 50;
const GROUP_BYTES: usize = 4 * 1024 * 1024;

/// So many groups of a replay with a rate go in a second at most, as long as a group has room.
const GROUPS_A_SECOND: f64 = 20.0;

/// After so long a slow replay gives back what it has passed by and begins anew: a broker closes
/// the channel of who holds a message for half an hour.
const ROUND: Duration = Duration::from_secs(600);

/// So many letters that cannot be replayed are told one by one.
const TOLD: usize = 100;

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// One line a dead letter, oldest first, each with its number, such as @2; without a name how
    /// many each subscriber has, and why
    List {
        #[command(flatten)]
        which: Which,
        /// One JSON object a line
        #[arg(long)]
        json: bool,
    },
    /// Everything about one dead letter: the story of its attempts, and its body
    Show {
        /// The subscriber's name; with --orphans it may be left out
        #[arg(add = complete::subscribers())]
        subscriber: String,
        /// Its id, or `@2` for the second of `list`
        #[arg(required_unless_present = "orphans")]
        letter: Option<Name>,
        /// One of what could not be routed back to its subscriber (RabbitMQ only)
        #[arg(long)]
        orphans: bool,
        /// As a JSON object
        #[arg(long)]
        json: bool,
    },
    /// Print dead letters as JSON Lines, bodies included: `body` as text, or `body_base64` where it
    /// is not UTF-8
    Export {
        #[command(flatten)]
        which: Which,
        /// As the other commands have it; an export is JSON Lines without it too
        #[arg(long)]
        json: bool,
    },
    /// Send dead letters again: a batch with the same bytes under the same id, attempts begun anew
    ///
    /// Interrupted it finishes what it is at, and leaves the rest as it was; run it again for that.
    /// After a crash in the middle at most 50 letters come twice, under the same ids.
    Replay {
        #[command(flatten)]
        which: Which,
        /// At most so many letters a second, each one request; less than 1 is fine
        #[arg(long, value_name = "N", value_parser = parse_rate)]
        rate: Option<f64>,
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

fn parse_rate(text: &str) -> Result<f64, String> {
    let rate = text.parse().ok().filter(|rate| (0.001..=100_000.0).contains(rate));
    rate.ok_or_else(|| "a number of letters a second, from 0.001 to 100000".to_owned())
}

/// What is to be done with the letters that are meant.
enum Task {
    List { json: bool },
    Show { json: bool },
    Export,
    Replay { rate: Option<f64>, dry_run: bool, json: bool },
    Purge { dry_run: bool, yes: bool, json: bool },
}

impl Command {
    fn split(self) -> Result<(Which, Task), Failed> {
        Ok(match self {
            Self::List { which, json } => (which.checked()?, Task::List { json }),
            Self::Show { subscriber, letter, orphans, json } => {
                (Which::one(subscriber, letter, orphans)?, Task::Show { json })
            }
            Self::Export { which, json: _ } => (which.of_one()?, Task::Export),
            Self::Replay { which, rate, dry_run, json } => {
                (which.of_one()?, Task::Replay { rate, dry_run, json })
            }
            Self::Purge { which, dry_run, yes, json } => {
                (which.of_one()?, Task::Purge { dry_run, yes, json })
            }
        })
    }
}

pub(super) async fn run(config: &Config, command: Command) -> Result<(), Failed> {
    let (which, task) = command.split()?;
    if let (Task::List { json }, None, false) = (&task, which.subscriber(), which.orphans()) {
        return match &config.queue.backend {
            Backend::Amqp(amqp) => summary::list(reach(amqp).await?, config, &which, *json).await,
            Backend::Embedded => {
                summary::list(
                    EmbeddedQueue::existing(&config.queue.embedded)?,
                    config,
                    &which,
                    *json,
                )
                .await
            }
        };
    }
    match (&config.queue.backend, which.subscriber()) {
        (Backend::Amqp(amqp), Some(subscriber)) if !which.orphans() => {
            let queue = reach(amqp).await?;
            walk(async || queue.dead_letters(subscriber).await, &which, task).await?;
            queue.close().await;
        }
        (Backend::Amqp(amqp), _) => {
            let queue = reach(amqp).await?;
            walk(async || queue.orphans().await, &which, task).await?;
            queue.close().await;
        }
        (Backend::Embedded, Some(subscriber)) if !which.orphans() => {
            let queue = EmbeddedQueue::existing(&config.queue.embedded)?;
            walk(async || queue.dead_letters(subscriber).await, &which, task).await?;
        }
        (Backend::Embedded, _) => return no_orphans(&which),
    }
    Ok(())
}

fn no_orphans(which: &Which) -> Result<(), Failed> {
    let why = "there are no orphans: only a RabbitMQ has them, and [queue] url is \"embedded\", where nothing is routed back";
    if which.has_names() {
        return Err(Failed::Runtime(why.to_owned()));
    }
    eprintln!("{why}");
    Ok(())
}

async fn walk<D: DeadLetters>(
    open: impl AsyncFn() -> Result<D, QueueError>,
    which: &Which,
    task: Task,
) -> Result<(), Failed> {
    let mut letters = open().await?;
    let stops = signal::stop()?;
    let mut most = usize::MAX;
    if let Task::Purge { dry_run: false, yes: false, .. } = task {
        can_ask()?;
        most = letters.left() as usize;
        if !which.all() {
            most = each(letters, &mut Choice::new(which), &stops, |_, _| true)
                .await?
                .unwrap_or_default();
            letters = open().await?;
        }
        // Of nothing there is nothing to ask; the walk says what was not found.
        if most > 0 && !confirm(most, which)? {
            close(letters, Ok(())).await?;
            return Err(Failed::Usage("nothing was deleted".to_owned()));
        }
    }
    let walked = async {
        match task {
            Task::List { json } => list(letters, which, json, &stops).await,
            Task::Show { json } => show(letters, which, json, &stops).await,
            Task::Export => export(letters, which, &stops).await,
            Task::Replay { rate, dry_run, json } => {
                Replay::new(which, rate, dry_run, &stops).run(letters, open, json).await
            }
            Task::Purge { dry_run, json, .. } => {
                purge(letters, which, (dry_run, most), json, &stops).await
            }
        }
    };
    tokio::select! {
        walked = walked => walked,
        () = stops.times(2) => Err(Failed::Runtime("interrupted twice: nothing is lost, but the order may have changed".to_owned())),
    }
}

/// After a walk, which heeds a wish to stop between two letters, so that it can give back in order
/// what it has passed by: an error if it ended early.
fn to_its_end(stops: &Stops) -> Result<(), Failed> {
    if stops.is_asked() { Err(Failed::Runtime("interrupted".to_owned())) } else { Ok(()) }
}

/// With the story and the body.
fn all_as_json(number: usize, held: &Held) -> serde_json::Value {
    let mut value = held.as_json(number);
    value["story"] = story_as_json(&held.letter.story);
    match std::str::from_utf8(&held.letter.body) {
        Ok(text) => value["body"] = text.into(),
        Err(_) => value["body_base64"] = BASE64.encode(&held.letter.body).into(),
    }
    value
}

/// The failed attempts; where some are left out there is one element that says how many.
fn story_as_json(story: &AttemptLog) -> serde_json::Value {
    let one = |a: &FailedAttempt| match &a.result {
        AttemptResult::Status(status) => {
            json!({ "attempt": a.number, "at": clock::rfc3339(a.at), "status": status })
        }
        AttemptResult::Failure(name) => {
            json!({ "attempt": a.number, "at": clock::rfc3339(a.at), "failure": name })
        }
    };
    let (first, left_out, last) = story.parts();
    let gap = (left_out > 0).then(|| json!({ "left_out": left_out }));
    first.iter().map(one).chain(gap).chain(last.iter().map(one)).collect()
}

/// Gives the letters back, also after a walk that failed half-way: without that they would change
/// places.
async fn close<T>(letters: impl DeadLetters, walked: Result<T, QueueError>) -> Result<T, Failed> {
    let closed = letters.close().await;
    let walked = walked?;
    closed?;
    Ok(walked)
}

/// Shows each letter that is meant by a function that returns false when nobody reads any more; how
/// many were shown, or `None` of a walk that ended early.
async fn each<D: DeadLetters>(
    mut letters: D,
    choice: &mut Choice<'_>,
    stops: &Stops,
    mut show: impl FnMut(usize, &Held) -> bool,
) -> Result<Option<usize>, Failed> {
    let mut shown = 0;
    let walked = async {
        while !stops.is_asked()
            && let Some(held) = letters.next().await?
        {
            if choice.includes(&held) {
                if !show(choice.number, &held) {
                    return Ok(None);
                }
                shown += 1;
            }
        }
        Ok(Some(shown))
    };
    let walked = walked.await;
    let shown = close(letters, walked).await?;
    to_its_end(stops)?;
    Ok(shown)
}

async fn list(
    letters: impl DeadLetters,
    which: &Which,
    json: bool,
    stops: &Stops,
) -> Result<(), Failed> {
    let mut choice = Choice::new(which);
    let mut head = !json;
    // Whose an orphan is, is a column; of dead letters it was said.
    let whose = |text: &str| if which.orphans() { format!("{text:<16}  ") } else { String::new() };
    let row = |number: usize, held: &Held| {
        if json {
            return print(&held.as_json(number).to_string());
        }
        if std::mem::take(&mut head)
            && !print(&format!(
                "{:>6}  {:<20}  {:<14}  {:>6}  {:>8}  {}{:<36}  ERROR",
                "NUMBER",
                "DIED AT",
                "REASON",
                "EVENTS",
                "ATTEMPTS",
                whose("SUBSCRIBER"),
                "ID"
            ))
        {
            return false;
        }
        let l = &held.letter;
        let error: String = visible(&l.error).chars().take(80).collect();
        let id = l.id.as_deref().map_or_else(|| "-".to_owned(), visible);
        let number = format!("@{number}");
        let (died, whose) = (
            time(l.died_at, "-"),
            whose(&held.subscriber.as_deref().map_or_else(|| "-".to_owned(), visible)),
        );
        print(&format!(
            "{number:>6}  {died:<20}  {:<14}  {:>6}  {:>8}  {whose}{id:<36}  {error}",
            l.reason.name(),
            l.events,
            l.attempts
        ))
    };
    let Some(shown) = each(letters, &mut choice, stops, row).await? else { return Ok(()) };
    choice.complete()?;
    if shown == 0 && !json {
        print(if which.orphans() { "no orphans" } else { "no dead letters" });
    }
    Ok(())
}

async fn export(letters: impl DeadLetters, which: &Which, stops: &Stops) -> Result<(), Failed> {
    let mut choice = Choice::new(which);
    let line = |number, held: &Held| print(&all_as_json(number, held).to_string());
    match each(letters, &mut choice, stops, line).await? {
        None => Ok(()),
        Some(_) => choice.complete(),
    }
}

async fn show(
    letters: impl DeadLetters,
    which: &Which,
    json: bool,
    stops: &Stops,
) -> Result<(), Failed> {
    let mut choice = Choice::new(which);
    let mut found = None;
    // Of several with one id it is the first.
    let keep = |number, held: &Held| {
        found = Some(if json {
            let mut value = all_as_json(number, held);
            if value.get("body").is_none() {
                value["body"] = String::from_utf8_lossy(&held.letter.body).into();
            }
            value.to_string()
        } else {
            for_reading(number, held)
        });
        false
    };
    each(letters, &mut choice, stops, keep).await?;
    match found {
        Some(text) => {
            print(&text);
            Ok(())
        }
        None => choice.complete(),
    }
}

fn for_reading(number: usize, held: &Held) -> String {
    let l = &held.letter;
    let mut lines: Vec<String> = Vec::new();
    let whose = held.subscriber.as_deref().map_or_else(|| "-".to_owned(), visible);
    for (name, value) in [
        ("number", format!("@{number}")),
        ("subscriber", whose),
        ("id", l.id.as_deref().map_or_else(|| "-".to_owned(), visible)),
        ("kind", l.kind.name().to_owned()),
        ("reason", l.reason.name().to_owned()),
        ("status", l.status.map_or_else(|| "-".to_owned(), |s| s.to_string())),
        ("error", visible(&l.error)),
        ("events", l.events.to_string()),
        ("attempts", l.attempts.to_string()),
        ("first attempt at", time(l.first_attempt_at, "-")),
        ("died at", time(l.died_at, "-")),
        ("content type", l.content_type.as_deref().map_or_else(|| "-".to_owned(), visible)),
        ("bytes", l.body.len().to_string()),
    ] {
        lines.push(format!("{name:<17} {value}"));
    }
    lines.extend(
        l.content_encoding
            .iter()
            .map(|encoding| format!("{:<17} {}", "content encoding", visible(encoding))),
    );
    let (first, left_out, last) = l.story.parts();
    if !first.is_empty() {
        lines.extend([String::new(), "the failed attempts:".to_owned()]);
    }
    let one =
        |a: &FailedAttempt| format!("{:>6}  {}  {}", a.number, clock::rfc3339(a.at), a.result);
    lines.extend(first.iter().map(one));
    lines
        .extend((left_out > 0).then(|| {
            format!("     …  {} left out here", counted(left_out, "attempt(s) (is|are)"))
        }));
    lines.extend(last.iter().map(one));
    lines.extend([String::new(), readable(&l.body)]);
    lines.join("\n")
}

/// A body for reading: each token as it is stored, the events of a batch on a line each, and
/// nothing that drives the terminal.
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

/// `{"events":[…]}` with a line break before each event and nothing else changed: what would be
/// parsed and printed again loses the spelling of numbers and all but the last of two fields.
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
    let target = if std::io::stderr().is_terminal() {
        ProgressDrawTarget::stderr()
    } else {
        ProgressDrawTarget::hidden()
    };
    let style = ProgressStyle::with_template("{bar:40} {pos}/{len} letters, {per_sec}, {eta} left");
    ProgressBar::with_draw_target(Some(total.into()), target)
        .with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

/// Collects what goes together, so that large letters are held one at a time and small ones are
/// quick.
struct Group<T> {
    items: Vec<T>,
    bytes: usize,
    most: usize,
}

impl<T> Group<T> {
    fn new(most: usize) -> Self {
        Self { items: Vec::new(), bytes: 0, most }
    }

    /// Adds an item; returns those that go first, if the item does not belong with them.
    fn push(&mut self, item: T, bytes: usize) -> Option<Vec<T>> {
        let full = self.items.len() == self.most || self.bytes + bytes > GROUP_BYTES;
        let before = if full { self.take() } else { Vec::new() };
        self.items.push(item);
        self.bytes += bytes;
        (!before.is_empty()).then_some(before)
    }

    fn take(&mut self) -> Vec<T> {
        self.bytes = 0;
        std::mem::take(&mut self.items)
    }
}

/// Why a letter cannot be sent at all, if that is so. What came into the retry queue without being
/// an envelope was never put together by hooktrail: as a batch it would be a request that no
/// receiver understands.
fn cannot_be_replayed(held: &Held, orphans: bool) -> Option<&'static str> {
    match (held.letter.kind, held.letter.reason) {
        (MessageKind::Batch, Reason::InvalidEvent) => Some("it never was a batch of hooktrail's"),
        (MessageKind::Event, _) if orphans => Some("it is no batch, so no subscriber waits for it"),
        _ if held.subscriber.is_none() => Some("nothing says whose it is"),
        _ => None,
    }
}

/// When the next letters may go.
struct Pace {
    rate: f64,
    next: Instant,
}

impl Pace {
    fn sent(&mut self, letters: usize) {
        self.next =
            self.next.max(clock::instant()) + Duration::from_secs_f64(letters as f64 / self.rate);
    }
}

struct Replay<'r> {
    choice: Choice<'r>,
    stops: &'r Stops,
    dry_run: bool,
    pace: Option<Pace>,
    /// How long a round may take.
    round: Duration,
    group: Group<Held>,
    bar: ProgressBar,
    /// Those of the letters seen that were meant and can go.
    chosen: usize,
    replayed: usize,
    /// Those that were meant and stay.
    skipped: usize,
}

impl<'r> Replay<'r> {
    fn new(which: &'r Which, rate: Option<f64>, dry_run: bool, stops: &'r Stops) -> Self {
        // What goes together is no burst: one letter, or as many as are due within a twentieth of a
        // second.
        let most = rate.map_or(GROUP_LETTERS, |rate| {
            ((rate / GROUPS_A_SECOND) as usize).clamp(1, GROUP_LETTERS)
        });
        let pace = rate.filter(|_| !dry_run).map(|rate| Pace { rate, next: clock::instant() });
        let (choice, group) = (Choice::new(which), Group::new(most));
        Self {
            choice,
            stops,
            dry_run,
            pace,
            round: ROUND,
            group,
            bar: ProgressBar::hidden(),
            chosen: 0,
            replayed: 0,
            skipped: 0,
        }
    }

    async fn run<D: DeadLetters>(
        mut self,
        first: D,
        open: impl AsyncFn() -> Result<D, QueueError>,
        json: bool,
    ) -> Result<(), Failed> {
        let total = first.left();
        self.bar = progress(total);
        let mut letters = first;
        loop {
            let walked = self.round(&mut letters, total as usize).await;
            let again = close(letters, walked).await.map_err(|e| self.failed(e))?;
            if !again {
                break;
            }
            letters = open().await?;
        }
        self.bar.finish_and_clear();
        let of = if self.stops.is_asked() { total as usize } else { self.choice.number };
        let done = if self.dry_run { self.chosen } else { self.replayed };
        finished("replay", done, self.skipped, of, &self.choice, self.dry_run, json);
        if self.stops.is_asked() {
            return Err(Failed::Runtime("interrupted: the others are where they were, in their order; run it again for them".to_owned()));
        }
        self.choice.complete()?;
        if self.skipped > 0 && self.choice.which.has_names() {
            return Err(Failed::Runtime(format!(
                "{} cannot be replayed; above is what to do",
                counted(self.skipped, "letter(s)")
            )));
        }
        Ok(())
    }

    fn failed(&self, why: Failed) -> Failed {
        self.bar.finish_and_clear();
        match why {
            Failed::Runtime(why) if self.replayed > 0 => {
                Failed::Runtime(format!("{why}; {} were replayed before", self.replayed))
            }
            other => other,
        }
    }

    /// Goes on where the last round ended; true if there is to be another one.
    async fn round(
        &mut self,
        letters: &mut impl DeadLetters,
        total: usize,
    ) -> Result<bool, QueueError> {
        let end = self.pace.as_ref().map(|_| clock::instant() + self.round);
        // What the rounds before have passed by comes first again.
        for _ in 0..self.choice.number - self.replayed {
            letters.next().await?;
        }
        let before = self.choice.number;
        while self.choice.number < total && !self.stops.is_asked() {
            // Each round looks at one letter at least.
            if self.choice.number > before && end.is_some_and(|end| clock::instant() >= end) {
                let rest = self.group.take();
                self.send(letters, rest).await?;
                return Ok(true);
            }
            let Some(held) = letters.next().await? else { break };
            self.bar.inc(1);
            if !self.choice.includes(&held) {
                continue;
            }
            if let Some(why) = cannot_be_replayed(&held, self.choice.which.orphans()) {
                self.skipped += 1;
                self.tell(&held, why);
                continue;
            }
            self.chosen += 1;
            if self.dry_run {
                continue;
            }
            let bytes = held.letter.body.len();
            if let Some(full) = self.group.push(held, bytes) {
                self.send(letters, full).await?;
            }
        }
        let rest = self.group.take();
        self.send(letters, rest).await?;
        Ok(false)
    }

    /// Sends a group when its time has come, unless it is to stop before.
    async fn send(
        &mut self,
        letters: &mut impl DeadLetters,
        group: Vec<Held>,
    ) -> Result<(), QueueError> {
        if group.is_empty() {
            return Ok(());
        }
        if let Some(pace) = &self.pace {
            tokio::select! {
                () = tokio::time::sleep_until(pace.next.into()) => {}
                () = self.stops.times(1) => {}
            }
        }
        if self.stops.is_asked() {
            return Ok(());
        }
        let count = group.len();
        if let Some(pace) = &mut self.pace {
            pace.sent(count);
        }
        let left = letters.replay(group).await?;
        self.replayed += count - left.len();
        for held in left {
            self.skipped += 1;
            self.tell(&held, "its subscriber has no retry queue any more: when it is configured again its daemon takes it back");
        }
        Ok(())
    }

    /// Says of a letter that it stays, and by which number.
    fn tell(&self, held: &Held, why: &str) {
        if self.skipped > TOLD {
            if self.skipped == TOLD + 1 {
                self.bar.suspend(|| {
                    eprintln!("more such letters follow, which are counted and not told")
                });
            }
            return;
        }
        let (number, which) = (self.choice.number, self.choice.which);
        let arguments = which.arguments();
        let error = visible(&held.letter.error);
        if which.orphans() {
            let name = held.letter.id.as_deref().map_or_else(|| format!("@{number}"), visible);
            self.bar.suspend(|| {
                eprintln!("`{name}` is not replayed: {why} ({error}); look at it with `hooktrail dead show {arguments} {name}`, delete it with `hooktrail dead purge {arguments} {name}`");
            });
            return;
        }
        let left = if self.dry_run { number } else { number - self.chosen };
        let moved = if left == number { String::new() } else { format!(" (@{left} from now on)") };
        self.bar.suspend(|| {
            eprintln!(
                "@{number}{moved} is not replayed, {why}: {error}; look at it with `hooktrail dead show {arguments} @{left}`, then delete it with `hooktrail dead purge {arguments} @{left}`"
            );
        });
    }
}

/// At most `most` of them: what died since they were counted was not asked about.
async fn purge(
    mut letters: impl DeadLetters,
    which: &Which,
    (dry_run, most): (bool, usize),
    json: bool,
    stops: &Stops,
) -> Result<(), Failed> {
    let total = letters.left() as usize;
    let bar = progress(letters.left());
    let (mut choice, mut purged, mut group) = (Choice::new(which), 0, Group::new(GROUP_LETTERS));
    let walk = async {
        while !stops.is_asked()
            && purged + group.items.len() < most
            && let Some(held) = letters.next().await?
        {
            bar.inc(1);
            if !choice.includes(&held) {
                continue;
            }
            if dry_run {
                purged += 1;
                continue;
            }
            let bytes = held.letter.body.len();
            if let Some(full) = group.push(held, bytes) {
                purged += full.len();
                letters.purge(full).await?;
            }
        }
        let rest = group.take();
        purged += rest.len();
        if rest.is_empty() { Ok(()) } else { letters.purge(rest).await }
    };
    let walked = walk.await;
    bar.finish_and_clear();
    close(letters, walked).await?;
    let of = if stops.is_asked() || most < usize::MAX { total } else { choice.number };
    finished("purge", purged, 0, of, &choice, dry_run, json);
    to_its_end(stops)?;
    choice.complete()
}

fn can_ask() -> Result<(), Failed> {
    if std::io::stdin().is_terminal() {
        return Ok(());
    }
    Err(Failed::Usage("purge deletes for good and cannot ask here; say --yes if that is meant, or look first with --dry-run".to_owned()))
}

fn confirm(chosen: usize, which: &Which) -> Result<bool, Failed> {
    let all = if which.all() { "all " } else { "" };
    eprint!("Delete {all}{chosen} {} for good? [y/N] ", which.what(chosen));
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer)?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}

fn finished(
    what: &str,
    done: usize,
    skipped: usize,
    of: usize,
    choice: &Choice<'_>,
    dry_run: bool,
    json: bool,
) {
    let which = choice.which;
    if json {
        let result = json!({
            "command": what, "subscriber": which.subscriber(), "orphans": which.orphans(), "dry_run": dry_run,
            "chosen": done, "skipped": skipped, "of": of,
        });
        print(&result.to_string());
        return;
    }
    let verb = match (what, dry_run) {
        // What comes of it the receiver says later.
        ("replay", false) => "queued",
        ("replay", true) => "would queue",
        (_, false) => "purged",
        (_, true) => "would purge",
    };
    let rest = if skipped > 0 { format!(", skipped {skipped}") } else { String::new() };
    print(&format!("{verb} {done} of {of} {}{rest}", which.what(of)));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{cli::Cli, delivery::DeadLetter};
    use clap::Parser as _;
    use std::{
        collections::VecDeque,
        sync::{
            Arc, Mutex,
            atomic::{AtomicU16, Ordering},
        },
    };

    /// Dead letters in memory: those of a walk are what there was when it began.
    struct Fake {
        queue: Arc<Mutex<Vec<DeadLetter>>>,
        sent: Arc<Mutex<Vec<String>>>,
        walk: VecDeque<DeadLetter>,
    }

    impl DeadLetters for Fake {
        fn left(&self) -> u32 {
            self.walk.len() as u32
        }

        async fn next(&mut self) -> Result<Option<Held>, QueueError> {
            Ok(self.walk.pop_front().map(|letter| Held::new(letter, Some("a".to_owned()))))
        }

        async fn replay(&mut self, letters: Vec<Held>) -> Result<Vec<Held>, QueueError> {
            for id in letters.into_iter().filter_map(|held| held.letter.id) {
                self.queue.lock().expect("not poisoned").retain(|l| l.id.as_ref() != Some(&id));
                self.sent.lock().expect("not poisoned").push(id);
            }
            Ok(Vec::new())
        }

        async fn purge(&mut self, _: Vec<Held>) -> Result<(), QueueError> {
            unreachable!("nothing is purged here")
        }

        async fn close(self) -> Result<(), QueueError> {
            Ok(())
        }
    }

    #[tokio::test]
    async fn a_slow_replay_begins_anew_again_and_again_and_goes_on_where_it_was() {
        let queue = Arc::new(Mutex::new((1..=20).map(letter).collect::<Vec<_>>()));
        let sent = Arc::new(Mutex::new(Vec::new()));
        let opened = AtomicU16::new(0);
        let open = async || {
            // More of them die meanwhile; they are not of this walk.
            let n = opened.fetch_add(1, Ordering::Relaxed);
            queue.lock().expect("not poisoned").extend((n > 0).then(|| letter(99 + 2 * n)));
            let walk = queue.lock().expect("not poisoned").clone().into();
            Ok(Fake { queue: queue.clone(), sent: sent.clone(), walk })
        };
        let stops = Stops::never();
        let command = Cli::parse_from([
            "hooktrail",
            "dead",
            "replay",
            "a",
            "@1",
            "@3",
            "@4",
            "@11",
            "@19",
            "--status",
            "501",
        ]);
        let crate::cli::Command::Dead(command) = command.command else { unreachable!("parsed") };
        let (which, _) = command.split().expect("sound");
        let mut replay = Replay::new(&which, Some(100_000.0), false, &stops);
        replay.round = Duration::ZERO;
        // One that is named is let through by no filter.
        let done = replay.run(open().await.expect("opens"), open, true).await;
        assert!(
            matches!(done, Err(Failed::Runtime(why)) if why.contains("no dead letter with status 501 is @4;"))
        );
        assert_eq!(*sent.lock().expect("not poisoned"), ["msg_1", "msg_3", "msg_11", "msg_19"]);
        assert_eq!(opened.load(Ordering::Relaxed), 20, "a round for each letter");
        assert_eq!(queue.lock().expect("not poisoned").len(), 20 - 4 + 19);
    }

    #[tokio::test]
    async fn a_replay_with_a_rate_is_spread_over_the_second() {
        for (rate, most) in [(0.5, 1), (5.0, 1), (39.0, 1), (100.0, 5), (100_000.0, GROUP_LETTERS)]
        {
            assert_eq!(
                Replay::new(&all_of_a(), Some(rate), false, &Stops::never()).group.most,
                most,
                "{rate}"
            );
        }
        let queue = Arc::new(Mutex::new((1..=6).map(letter).collect::<Vec<_>>()));
        let fake = Fake {
            queue: queue.clone(),
            sent: Arc::default(),
            walk: queue.lock().expect("not poisoned").clone().into(),
        };
        let (which, stops) = (all_of_a(), Stops::never());
        let begin = clock::instant();
        let open = async || Err(QueueError::new("it is opened once"));
        Replay::new(&which, Some(20.0), false, &stops)
            .run(fake, open, true)
            .await
            .expect("replays");
        // The first at once, each of the others a twentieth of a second after the one before.
        let took = clock::instant() - begin;
        assert!(took >= Duration::from_millis(5 * 50), "{took:?}");
    }

    fn all_of_a() -> Which {
        let crate::cli::Command::Dead(command) =
            Cli::parse_from(["hooktrail", "dead", "replay", "a"]).command
        else {
            unreachable!("parsed")
        };
        command.split().expect("sound").0
    }

    fn letter(n: u16) -> DeadLetter {
        DeadLetter {
            content_encoding: None,
            kind: MessageKind::Batch,
            reason: Reason::Exhausted,
            body: bytes::Bytes::new(),
            content_type: None,
            id: Some(format!("msg_{n}")),
            events: 1,
            attempts: 1,
            status: Some(500 + n % 2),
            error: String::new(),
            first_attempt_at: None,
            died_at: None,
            story: AttemptLog::default(),
        }
    }

    #[test]
    fn a_group_is_as_large_as_its_letters_or_bytes_allow_and_a_letter_is_never_too_large() {
        let groups = |sizes: &[usize]| {
            let mut group = Group::new(GROUP_LETTERS);
            let mut all: Vec<Vec<usize>> =
                sizes.iter().filter_map(|bytes| group.push(*bytes, *bytes)).collect();
            all.push(group.take());
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
        for other in [
            "{\"event\":\"a\",\n\"n\":1e400}",
            "{\"event\":1}\n{\"event\":2}\n",
            "{\"events\":[",
            "{\"events\":[],\"events\":[1]}",
            "",
        ] {
            assert_eq!(readable(other.as_bytes()), other);
        }
        assert_eq!(
            readable(b"a\x1b[2J\r\nb\xff\xfe \xc2\x9b c\0"),
            "a\\u{1b}[2J\\u{d}\nb\\xff\\xfe \\u{9b} c\\u{0}"
        );
    }
}

//! `dead`: dead letters and orphans, read one at a time, so that a hundred thousand of them need no
//! memory.

pub(super) mod choice;
mod list;
mod purge;
mod replay;
mod report;
mod show;
mod summary;
mod walk;

use clap::Subcommand;

use self::{
    choice::Which,
    list::list,
    purge::{confirm_purge, purge},
    replay::replay,
    show::{export, show},
    walk::{each, until_second_interrupt},
};
use super::{arguments::Destructive, complete, failed::Failed, open::reach, terminal::can_ask};
use crate::{
    config::{Backend, Config},
    letters::{Choice, Name, Selection, close},
    queue::{DeadLetters, Queue as _, QueueError, embedded::EmbeddedQueue},
    supervisor::signal,
};

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// List dead letters, oldest first, each with its number, such as @2; without a name, count
    /// those of each subscriber by reason
    List {
        #[command(flatten)]
        which: Which,
        /// One JSON object a line
        #[arg(long)]
        json: bool,
    },
    /// Show one dead letter with its failed attempts and its body
    Show {
        /// The subscriber's name, or `@log` for an orphan; with --orphans it may be left out
        #[arg(add = complete::subscribers())]
        subscriber: String,
        /// Its id, or `@2` for the second of `list`
        #[arg(required_unless_present = "orphans")]
        letter: Option<Name>,
        /// The letter is an orphan: no event, or a batch that could not be routed back to its
        /// subscriber
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
        /// Accepted as by the other commands; an export is always JSON Lines
        #[arg(long)]
        json: bool,
    },
    /// Send dead letters again: a batch keeps its bytes and its id, and its attempts count from 1
    ///
    /// When interrupted it finishes the letters at hand and leaves the rest in place; run it again
    /// for those. After a crash at most 50 letters are sent twice, under the same ids.
    Replay {
        #[command(flatten)]
        which: Which,
        /// The most letters a second, each one request; less than 1 is allowed
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
        #[command(flatten)]
        how: Destructive,
    },
}

fn parse_rate(text: &str) -> Result<f64, String> {
    let rate = text.parse().ok().filter(|rate| (0.001..=100_000.0).contains(rate));
    rate.ok_or_else(|| "a number of letters a second, from 0.001 to 100000".to_owned())
}

/// The work on the chosen dead letters.
enum Task {
    List { json: bool },
    Show { json: bool },
    Export,
    Replay(replay::Options),
    Purge(Destructive),
}

impl Command {
    fn split(self) -> Result<(Selection, Task), Failed> {
        Ok(match self {
            Self::List { which, json } => (which.checked()?, Task::List { json }),
            Self::Show { subscriber, letter, orphans, json } => {
                (Which::one(subscriber, letter, orphans)?, Task::Show { json })
            }
            Self::Export { which, json: _ } => (which.of_one()?, Task::Export),
            Self::Replay { which, rate, dry_run, json } => {
                (which.of_one()?, Task::Replay(replay::Options { rate, dry_run, json }))
            }
            Self::Purge { which, how } => (which.of_one()?, Task::Purge(how)),
        })
    }
}

pub(super) async fn run(config: &Config, command: Command) -> Result<(), Failed> {
    let (selection, task) = command.split()?;
    if let (Task::List { json }, None, false) =
        (&task, selection.subscriber.as_deref(), selection.orphans)
    {
        return match &config.queue.backend {
            Backend::Amqp(amqp) => {
                summary::list(reach(amqp).await?, config, &selection, *json).await
            }
            Backend::Embedded => {
                summary::list(
                    EmbeddedQueue::existing(&config.queue.embedded)?,
                    config,
                    &selection,
                    *json,
                )
                .await
            }
        };
    }
    match (&config.queue.backend, selection.subscriber.as_deref()) {
        (Backend::Amqp(amqp), Some(subscriber)) if !selection.orphans => {
            let queue = reach(amqp).await?;
            walk(async || queue.dead_letters(subscriber).await, &selection, task).await?;
            queue.close().await;
        }
        (Backend::Amqp(amqp), _) => {
            let queue = reach(amqp).await?;
            walk(async || queue.orphans().await, &selection, task).await?;
            queue.close().await;
        }
        (Backend::Embedded, Some(subscriber)) if !selection.orphans => {
            let queue = EmbeddedQueue::existing(&config.queue.embedded)?;
            walk(async || queue.dead_letters(subscriber).await, &selection, task).await?;
        }
        (Backend::Embedded, _) => {
            let queue = EmbeddedQueue::existing(&config.queue.embedded)?;
            walk(async || queue.orphans().await, &selection, task).await?;
        }
    }
    Ok(())
}

async fn walk<D: DeadLetters>(
    open: impl AsyncFn() -> Result<D, QueueError>,
    selection: &Selection,
    task: Task,
) -> Result<(), Failed> {
    let mut letters = open().await?;
    let stops = signal::stop()?;
    let mut most = usize::MAX;
    if let Task::Purge(Destructive { dry_run: false, yes: false, .. }) = task {
        can_ask("purge")?;
        most = letters.left() as usize;
        if !selection.is_all() {
            most = each(letters, &mut Choice::new(selection), &stops, |_, _| true)
                .await?
                .unwrap_or_default();
            letters = open().await?;
        }
        // Without any there is nothing to confirm; the walk reports names that were not found.
        if most > 0
            && let Err(kept) = confirm_purge(most, selection)
        {
            close(letters, Ok(())).await?;
            return Err(kept);
        }
    }
    let walked = async {
        match task {
            Task::List { json } => list(letters, selection, json, &stops).await,
            Task::Show { json } => show(letters, selection, json, &stops).await,
            Task::Export => export(letters, selection, &stops).await,
            Task::Replay(options) => replay(letters, open, selection, options, &stops).await,
            Task::Purge(how) => purge(letters, selection, how, most, &stops).await,
        }
    };
    until_second_interrupt(&stops, walked).await
}

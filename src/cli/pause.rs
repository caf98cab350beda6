//! `pause` and `resume`: one subscriber, several, or all.

use super::{
    complete,
    daemon::{Asked, Daemon},
    failed::Failed,
    text::visible,
};
use crate::{
    admin::view::{ChangeRequest, Overview, PauseChange, Paused, State, Subscriber},
    wording::counted,
};

/// The subscribers to pause or resume.
#[derive(Debug, clap::Args)]
pub(super) struct Whom {
    /// The subscribers' names
    #[arg(value_name = "SUBSCRIBER", required_unless_present = "all", add = complete::subscribers())]
    pub(super) subscribers: Vec<String>,
    /// All subscribers that the daemon has
    #[arg(long, conflicts_with = "subscribers")]
    all: bool,
}

pub(super) async fn pause(asked: &Asked, whom: &Whom, why: Option<String>) -> Result<(), Failed> {
    let daemon = Daemon::of(asked)?;
    let wanted = ChangeRequest { why };
    let names = if whom.all { of_all(&daemon, |_| true).await? } else { whom.subscribers.clone() };
    let mut failures = Failures::of(&names);
    for name in &names {
        match daemon.post::<PauseChange>(&format!("subscribers/{name}/pause"), &wanted).await {
            Ok(answer) => say_paused(name, &answer, wanted.why.as_deref()),
            Err(e) => failures.add(name, e)?,
        }
    }
    match (names.as_slice(), failures.count) {
        ([], _) => println!("the daemon has no subscriber"),
        ([name], _) => println!("Its events wait in the queue until `hooktrail resume {name}`."),
        (_, failed) if failed < names.len() => {
            println!("Their events wait in the queue until `hooktrail resume NAME…`.")
        }
        _ => {}
    }
    failures.end("paused")
}

/// Prints the pause; `wanted` is the reason on the command line.
fn say_paused(name: &str, answer: &PauseChange, wanted: Option<&str>) {
    let already = if answer.changed { "is paused" } else { "was paused already" };
    let Some(Paused { why, since, by }) = &answer.paused else { return };
    println!("`{name}` {already}, since {since}, by {}: {}", visible(by), visible(why));
    if wanted.is_some_and(|wanted| wanted != why) {
        println!(
            "Your reason was not recorded: an operator did not pause it, and the reason above stays."
        );
    }
}

pub(super) async fn resume(asked: &Asked, whom: &Whom) -> Result<(), Failed> {
    let daemon = Daemon::of(asked)?;
    let is_paused = |s: &Subscriber| s.state == State::Paused;
    let fixed = |s: &Subscriber| is_paused(s) && s.paused().is_some_and(Paused::is_fixed);
    let names = if whom.all {
        of_all(&daemon, |s| is_paused(s) && !fixed(s)).await?
    } else {
        whom.subscribers.clone()
    };
    let mut failures = Failures::of(&names);
    for name in &names {
        let path = format!("subscribers/{name}/resume");
        match daemon.post::<PauseChange>(&path, &ChangeRequest::default()).await {
            Ok(answer) if answer.changed => {
                println!(
                    "`{name}` is resumed; attempts and elapsed time of its batches start again from zero."
                );
            }
            Ok(_) => println!("`{name}` was not paused."),
            Err(e) => failures.add(name, e)?,
        }
    }
    if whom.all {
        for name in of_all(&daemon, fixed).await? {
            println!("`{name}` stays paused, by `paused = true` in the configuration.");
        }
    }
    if names.is_empty() {
        println!("no subscriber was resumed");
    }
    failures.end("resumed")
}

/// The names of the running daemon's subscribers that `is_meant` selects.
async fn of_all(
    daemon: &Daemon<'_>,
    is_meant: impl Fn(&Subscriber) -> bool,
) -> Result<Vec<String>, Failed> {
    let found = daemon.get::<Overview>("subscribers").await?.read;
    Ok(found.subscribers.into_iter().filter(is_meant).map(|s| s.subscriber).collect())
}

/// Counts failures: of several subscribers, one that cannot be changed does not keep the others
/// from it.
struct Failures {
    of: usize,
    count: usize,
}

impl Failures {
    fn of(names: &[String]) -> Self {
        Self { of: names.len(), count: 0 }
    }

    fn add(&mut self, name: &str, why: Failed) -> Result<(), Failed> {
        match why {
            Failed::Runtime(why) if self.of > 1 => {
                eprintln!("`{name}`: {why}");
                self.count += 1;
                Ok(())
            }
            why => Err(why),
        }
    }

    fn end(self, what: &str) -> Result<(), Failed> {
        if self.count == 0 {
            return Ok(());
        }
        Err(Failed::Runtime(format!(
            "{} not {what}; see above",
            counted(self.count, "subscriber(s) (was|were)")
        )))
    }
}

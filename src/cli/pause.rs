//! `pause` and `resume`: one subscriber, several, or all.

use serde_json::{Value, json};

use super::{
    complete,
    daemon::{Asked, Daemon},
    failed::Failed,
    text::visible,
};
use crate::wording::counted;

/// Whom it is about.
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
    let wish = why.as_ref().map_or_else(|| json!({}), |why| json!({ "why": why }));
    let names = if whom.all { of_all(&daemon, |_| true).await? } else { whom.subscribers.clone() };
    let mut failures = Failures::of(&names);
    for name in &names {
        match daemon.post(&format!("subscribers/{name}/pause"), &wish).await {
            Ok(answer) => {
                let text = |key: &str| visible(answer[key].as_str().unwrap_or_default());
                let already =
                    if answer["changed"] == true { "is paused" } else { "was paused already" };
                println!(
                    "`{name}` {already}, since {}, by {}: {}",
                    text("since"),
                    text("by"),
                    text("why")
                );
                if why.as_ref().is_some_and(|why| answer["why"] != why.as_str()) {
                    println!(
                        "Your reason was not recorded: an operator did not pause it, and the reason above stays."
                    );
                }
            }
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

pub(super) async fn resume(asked: &Asked, whom: &Whom) -> Result<(), Failed> {
    let daemon = Daemon::of(asked)?;
    let is_paused = |s: &Value| s["state"] == "paused";
    let fixed = |s: &Value| is_paused(s) && s["paused"]["by"] == "configuration";
    let names = if whom.all {
        of_all(&daemon, |s| is_paused(s) && !fixed(s)).await?
    } else {
        whom.subscribers.clone()
    };
    let mut failures = Failures::of(&names);
    for name in &names {
        match daemon.post(&format!("subscribers/{name}/resume"), &json!({})).await {
            Ok(answer) if answer["changed"] == true => {
                println!(
                    "`{name}` is resumed; attempts and elapsed time of the batches that it has begin anew."
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

/// The names of the running daemon's subscribers of a kind.
async fn of_all(
    daemon: &Daemon<'_>,
    is_meant: impl Fn(&Value) -> bool,
) -> Result<Vec<String>, Failed> {
    let found = daemon.get("subscribers").await?;
    let all = found["subscribers"].as_array().into_iter().flatten();
    Ok(all
        .filter(|s| is_meant(s))
        .filter_map(|s| Some(s["subscriber"].as_str()?.to_owned()))
        .collect())
}

/// Of several subscribers one that cannot be changed does not keep the others from it.
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
            "{} not {what}; above is why",
            counted(self.count, "subscriber(s) (was|were)")
        )))
    }
}

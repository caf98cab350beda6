//! `retry`: lists the batches that wait for a retry, and makes retries due now.

use std::{
    collections::BTreeSet,
    time::{Duration, SystemTime},
};

use clap::Subcommand;
use serde_json::json;

use super::{
    complete,
    daemon::{Asked, Daemon},
    failed::Failed,
    open::reach,
    text::{as_json, print, rounded, time, visible},
};
use crate::{
    admin::view::{Paused, Retried, RetryNow, State, WaitingBatch},
    clock,
    config::{self, Backend, Config},
    delivery::{BatchId, SubscriberName},
    letters::Name,
    queue::{Hastened, Queue, Waiting, WaitingList, embedded::EmbeddedQueue},
    supervisor::signal,
    wording::counted,
};

/// The most unknown ids that an error names.
const NAMED: usize = 10;

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// List the batches that wait for a retry, the first due first, each with its number, such as
    /// @2
    ///
    /// On RabbitMQ this reads each queue in which retries wait, for at most 10 s; meanwhile none of
    /// its batches becomes due.
    List {
        /// The subscriber's name; one that is not configured any more is fine
        #[arg(add = complete::subscribers())]
        subscriber: String,
        /// One JSON object a line
        #[arg(long)]
        json: bool,
    },
    /// Make retries due now: of all batches that wait, or of some. Bytes, ids and attempts stay as
    /// they are
    ///
    /// Works with or without a daemon: a running one sends them at once, and without one they are
    /// sent when one runs. If the subscriber's circuit is open, or its receiver asked for a hold by
    /// `Retry-After`, one batch is tried as soon as no request is in flight. When that is accepted
    /// the rest follows; if it fails, the wait goes on. A paused subscriber gets nothing before
    /// `hooktrail resume`, or before `paused = true` is removed from the configuration. After a
    /// crash some batches may be sent twice, under the same ids; run it again for the rest.
    Now {
        /// The subscriber's name; one that is not configured any more is fine
        #[arg(add = complete::subscribers())]
        subscriber: String,
        /// Only these: an id, or `@2` for the second of `retry list`
        #[arg(value_name = "BATCH")]
        batches: Vec<Name>,
        /// Say what would be due now, and do nothing
        #[arg(long)]
        dry_run: bool,
        /// The result as a JSON object
        #[arg(long)]
        json: bool,
    },
}

impl Command {
    fn subscriber(&self) -> &str {
        let (Self::List { subscriber, .. } | Self::Now { subscriber, .. }) = self;
        subscriber
    }
}

pub(super) async fn run(config: &Config, command: Command) -> Result<(), Failed> {
    let name = command.subscriber();
    if SubscriberName::try_new(name).is_err() {
        return Err(Failed::Usage(format!(
            "`{}` is not a subscriber's name: 1 to 64 of a-z, 0-9 and `-`",
            visible(name)
        )));
    }
    match &config.queue.backend {
        Backend::Amqp(amqp) => {
            let queue = reach(amqp).await?;
            let done = to_its_end(on(&queue, config, command)).await;
            queue.close().await;
            done
        }
        Backend::Embedded => {
            on(&EmbeddedQueue::existing(&config.queue.embedded)?, config, command).await
        }
    }
}

/// Does the work to its end, or until a second Ctrl-C or SIGTERM: a walk that stops half-way can
/// change the order of a queue.
async fn to_its_end(work: impl Future<Output = Result<(), Failed>>) -> Result<(), Failed> {
    let stops = signal::stop()?;
    let interrupted = async {
        stops.times(1).await;
        eprintln!(
            "interrupted: the work goes on to its end, so that no batch loses its place; interrupt again to stop at once"
        );
        stops.times(2).await;
    };
    tokio::select! {
        done = work => done,
        () = interrupted => Err(Failed::Runtime("interrupted twice: nothing is lost, but batches may have changed places".to_owned())),
    }
}

async fn on(queue: &impl Queue, config: &Config, command: Command) -> Result<(), Failed> {
    match command {
        Command::List { subscriber, json } => {
            list(&subscriber, &queue.waiting(&subscriber).await?, json)
        }
        Command::Now { subscriber, batches, dry_run, json } => {
            Now { subscriber, dry_run, json }.run(queue, config, &batches).await
        }
    }
}

/// The time until then.
fn until(due: Option<SystemTime>, now: SystemTime) -> String {
    let Some(due) = due else { return "unknown".to_owned() };
    let left = due.duration_since(now).unwrap_or_default();
    if left.is_zero() {
        return "now".to_owned();
    }
    // Rounded up, so that it is due by then.
    rounded(Duration::from_secs(left.as_secs() + u64::from(left.subsec_nanos() > 0)))
}

fn unseen(n: u64, subscriber: &str) -> Result<(), Failed> {
    if n == 0 {
        return Ok(());
    }
    Err(Failed::Runtime(format!(
        "{} of all subscribers could not be read in the time for which a queue of retries may be held, and some of `{subscriber}` may be \
         among them",
        counted(n, "message(s)")
    )))
}

fn list(subscriber: &str, found: &WaitingList, json: bool) -> Result<(), Failed> {
    let now = clock::now();
    if json {
        let _read = found
            .batches
            .iter()
            .enumerate()
            .all(|(n, waiting)| print(&as_json(&WaitingBatch::new(n + 1, waiting))));
        return unseen(found.unseen, subscriber);
    }
    if found.batches.is_empty() {
        print("nothing waits for another attempt");
        return unseen(found.unseen, subscriber);
    }
    let head = format!(
        "{:>6}  {:<20}  {:<12}  {:>6}  {:>8}  {:<16}  ID",
        "NUMBER", "DUE AT", "IN", "EVENTS", "ATTEMPTS", "LAST ANSWER"
    );
    let row = |(n, w): (usize, &Waiting)| {
        let last = w
            .last
            .as_ref()
            .map_or_else(|| "-".to_owned(), |last| visible(&last.result.to_string()));
        let (number, at, left) = (format!("@{}", n + 1), time(w.due, "unknown"), until(w.due, now));
        let id = visible(w.batch_id.as_str());
        print(&format!(
            "{number:>6}  {at:<20}  {left:<12}  {:>6}  {:>8}  {last:<16}  {id}",
            w.events, w.attempts
        ))
    };
    let _read = print(&head) && found.batches.iter().enumerate().all(row);
    unseen(found.unseen, subscriber)
}

struct Now {
    subscriber: String,
    dry_run: bool,
    json: bool,
}

impl Now {
    async fn run(self, queue: &impl Queue, config: &Config, names: &[Name]) -> Result<(), Failed> {
        let by_number = names.iter().any(|name| matches!(name, Name::Number(_)));
        let list = if by_number || self.dry_run {
            Some(queue.waiting(&self.subscriber).await?)
        } else {
            None
        };
        let (ids, mut missing) = resolve(names, list.as_ref());
        let ids = (!names.is_empty()).then_some(ids);
        let mut hastened = match (&list, &ids) {
            (Some(list), _) if self.dry_run => expected(list, ids.as_ref()),
            // No number was found.
            (_, Some(ids)) if ids.is_empty() => Hastened::default(),
            _ => queue.hasten(&self.subscriber, ids).await?,
        };
        missing.append(&mut hastened.missing);
        let tried = if self.dry_run || hastened.moved + hastened.due == 0 {
            None
        } else {
            Some(self.tried(config).await)
        };
        self.report(config, &hastened, &missing, tried.as_ref());
        if !missing.is_empty() {
            return Err(self.not_found(&missing));
        }
        unseen(hastened.unseen, &self.subscriber)
    }

    /// Asks the daemon to try the subscriber now, also with an open circuit or a hold; the error
    /// says why that is not known.
    async fn tried(&self, config: &Config) -> Result<Retried, String> {
        let asked = Asked { admin: config.admin.clone(), config: config.path.clone() };
        // The batches are due already.
        let wanted = RetryNow { ids: None, try_only: true };
        let answer = async {
            Daemon::of(&asked)?
                .post(&format!("subscribers/{}/retry", self.subscriber), &wanted)
                .await
        };
        answer.await.map_err(|e| match e {
            Failed::Usage(why) | Failed::Runtime(why) => why,
            other => other.to_string(),
        })
    }

    fn report(
        &self,
        config: &Config,
        done: &Hastened,
        missing: &[String],
        tried: Option<&Result<Retried, String>>,
    ) {
        let name = &self.subscriber;
        let answer = tried.and_then(|tried| tried.as_ref().ok());
        if self.json {
            let result = json!({
                "command": "now", "subscriber": name, "dry_run": self.dry_run, "moved": done.moved, "already_due": done.due,
                "not_found": missing, "unseen": done.unseen, "state": answer.map(|a| &a.state),
                "paused": answer.map(|a| &a.paused), "tried_now": answer.map(|a| a.tried_now),
            });
            print(&result.to_string());
            return;
        }
        let (would, were) = if self.dry_run { ("would be", "are") } else { ("made", "were") };
        let already =
            if done.due > 0 { format!("; {} {were} due already", done.due) } else { String::new() };
        let what = counted(done.moved, "batch(es)");
        print(&match self.dry_run {
            true => format!("{what} of `{name}` {would} due now{already}"),
            false => format!("{would} {what} of `{name}` due now{already}"),
        });
        match tried {
            None => {}
            Some(Err(why)) => {
                let more = if config.subscribers.iter().any(|s| s.name == *name && s.paused) {
                    format!("and before `paused = true` is taken out of {}", file_of(config, name))
                } else {
                    format!("and whether `{name}` is paused or its circuit open is not known")
                };
                eprintln!(
                    "nothing is sent before a daemon runs that serves `{name}`, {more}: {why}"
                );
            }
            Some(Ok(answer)) if answer.paused.as_ref().is_some_and(Paused::is_fixed) => {
                let file = file_of(config, name);
                print(&format!(
                    "`{name}` is paused in the configuration: nothing is sent before `paused = true` is taken out of {file}"
                ));
            }
            Some(Ok(answer)) if answer.state == State::Paused => {
                print(&format!(
                    "`{name}` is paused: nothing is sent before `hooktrail resume {name}`"
                ));
            }
            Some(Ok(answer)) if answer.tried_now => {
                let why = if answer.state == State::Held {
                    "its receiver had asked for a hold by Retry-After"
                } else {
                    "its circuit was open"
                };
                print(&format!(
                    "{why}: one batch is tried, and the rest follows when that is accepted (hooktrail status {name})"
                ));
            }
            Some(Ok(_)) => {}
        }
    }

    fn not_found(&self, missing: &[String]) -> Failed {
        let named: Vec<String> =
            missing.iter().take(NAMED).map(|id| format!("`{}`", visible(id))).collect();
        let more = if missing.len() > NAMED {
            format!(" and {} more", missing.len() - NAMED)
        } else {
            String::new()
        };
        Failed::Runtime(format!(
            "no batch of `{0}` that waits for another attempt is {1}{more}; `hooktrail retry list {0}` shows ids and numbers; a number is \
             written @2",
            self.subscriber,
            named.join(", ")
        ))
    }
}

/// The file that has the subscriber's table.
fn file_of(config: &Config, subscriber: &str) -> String {
    config::file_of(&config.path, subscriber)
        .unwrap_or_else(|| config.path.clone())
        .display()
        .to_string()
}

/// The chosen ids, and the numbers that were not found.
fn resolve(names: &[Name], list: Option<&WaitingList>) -> (BTreeSet<BatchId>, Vec<String>) {
    let (mut ids, mut missing) = (BTreeSet::new(), Vec::new());
    for name in names {
        match name {
            Name::Id(id) => drop(ids.insert(id.as_str().into())),
            Name::Number(n) => match list.and_then(|list| list.batches.get(n.checked_sub(1)?)) {
                Some(waiting) => drop(ids.insert(waiting.batch_id.clone())),
                None => missing.push(format!("@{n}")),
            },
            // Of dead letters alone.
            Name::Key(key) => missing.push(key.to_string()),
        }
    }
    (ids, missing)
}

/// The result of a dry run.
fn expected(list: &WaitingList, ids: Option<&BTreeSet<BatchId>>) -> Hastened {
    let now = clock::now();
    let meant: Vec<&Waiting> =
        list.batches.iter().filter(|w| ids.is_none_or(|ids| ids.contains(&w.batch_id))).collect();
    let due = meant.iter().filter(|w| w.is_due(now)).count() as u64;
    let is_missing = |id: &&BatchId| meant.iter().all(|w| w.batch_id != **id);
    let missing = ids.into_iter().flatten().filter(is_missing).map(BatchId::to_string).collect();
    Hastened { moved: meant.len() as u64 - due, due, missing, unseen: list.unseen }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn waiting(id: &str, due: Option<SystemTime>) -> Waiting {
        Waiting {
            batch_id: id.into(),
            events: 1,
            attempts: 2,
            last: None,
            first_attempt_at: None,
            due,
            bytes: 7,
        }
    }

    #[test]
    fn names_are_ids_and_numbers_of_the_list_and_what_is_not_there_is_said() {
        let now = clock::now();
        let later = Some(now + Duration::from_secs(3600));
        let list = WaitingList {
            batches: vec![waiting("a", Some(now)), waiting("b", later), waiting("c", None)],
            unseen: 0,
        };
        let names = |texts: &[&str]| {
            texts.iter().map(|t| t.parse::<Name>().expect("a name")).collect::<Vec<_>>()
        };
        let (ids, missing) = resolve(&names(&["@2", "c", "@0", "@4", "b", "x"]), Some(&list));
        assert_eq!(ids, ["b", "c", "x"].map(BatchId::from).into());
        assert_eq!(missing, ["@0", "@4"]);
        let some = expected(&list, Some(&ids));
        assert_eq!((some.moved, some.due, some.missing), (2, 0, vec!["x".to_owned()]));
        let all = expected(&list, None);
        assert_eq!((all.moved, all.due, all.missing), (2, 1, Vec::new()));
    }

    #[test]
    fn how_long_it_is_until_then_is_short() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
        for (ms, text) in
            [(0, "now"), (1, "1s"), (61_000, "1m 1s"), (21_599_001, "6h"), (90_061_000, "25h 1m")]
        {
            assert_eq!(until(Some(now + Duration::from_millis(ms)), now), text);
        }
        assert_eq!(until(Some(now - Duration::from_secs(5)), now), "now");
        assert_eq!(until(None, now), "unknown");
    }
}

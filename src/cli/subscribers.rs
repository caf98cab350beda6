//! `subscribers`: those that are made over the API, listed, shown, made, changed, removed, and
//! written as a file. The daemon does it.

mod keys;
mod print;

use clap::Subcommand;
use serde_json::json;

use self::{keys::Keys, print::version};
use super::{
    arguments::Destructive,
    complete,
    daemon::{Asked, Change, Daemon, Done, segment},
    failed::Failed,
    history::write,
    terminal,
    text::{as_json, visible},
};
use crate::{
    admin::view::{
        Origin, Overview, Subscriber, SubscriberChange, SubscriberDetails, SubscriberRemoval,
    },
    config::managed::{Document, as_file},
    delivery::SubscriberName,
    event::Tenant,
    wording::counted,
};

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// List all subscribers: how they are, and the file that has them, or who has changed them over
    /// the API
    List {
        /// Those of this tenant
        #[arg(long, value_name = "TENANT")]
        tenant: Option<Tenant>,
        /// The subscribers as one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Show one with its version and all its settings, without secrets
    Show {
        /// The subscriber's name
        #[arg(add = complete::subscribers(), value_parser = name)]
        subscriber: SubscriberName,
        /// The subscriber as one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Make one
    ///
    /// Without a secret the daemon makes one, which is printed once. Exit code 1 if it is made and
    /// gets no events yet, which the daemon goes on trying.
    Add {
        /// The new subscriber's name: 1 to 64 of a-z, 0-9 and `-`, with a letter or digit first and last
        #[arg(value_parser = SubscriberName::configured)]
        subscriber: SubscriberName,
        #[command(flatten)]
        keys: Keys,
        /// It gets nothing before `hooktrail resume`; its events wait
        #[arg(long)]
        paused: bool,
        /// The result as a JSON object
        #[arg(long)]
        json: bool,
    },
    /// Change the given keys of one; the others stay, and so do secrets
    ///
    /// Exit code 1 if somebody else has changed it meanwhile: then nothing is changed.
    Set {
        /// The subscriber's name
        #[arg(add = complete::subscribers(), value_parser = name)]
        subscriber: SubscriberName,
        #[command(flatten)]
        keys: Keys,
        /// A key that gets its default again, such as `batch.max_events`; give it once for each
        #[arg(long, value_name = "KEY")]
        unset: Vec<String>,
        /// Only if it has this version, which `subscribers show` prints
        #[arg(long, value_name = "VERSION")]
        if_version: Option<u64>,
        /// The result as a JSON object
        #[arg(long)]
        json: bool,
    },
    /// Remove one
    ///
    /// Exit code 1 if somebody else has changed it meanwhile, and nothing is removed; or if its
    /// queues are not deleted yet, which the daemon goes on trying.
    Remove {
        /// The subscriber's name
        #[arg(add = complete::subscribers(), value_parser = name)]
        subscriber: SubscriberName,
        /// What becomes of its events, retries and dead letters
        #[arg(long)]
        backlog: Backlog,
        /// Only if it has this version, which `subscribers show` prints
        #[arg(long, value_name = "VERSION")]
        if_version: Option<u64>,
        #[command(flatten)]
        how: Destructive,
    },
    /// Print some as TOML for a file, or all that were made over the API; secrets become `${…}`
    ///
    /// The one of a file wins over the one of the API: add this to the configuration, set the
    /// variables, reload, and then remove it here with --backlog keep.
    Export {
        /// The subscribers' names
        #[arg(value_name = "SUBSCRIBER", add = complete::subscribers(), value_parser = name)]
        subscribers: Vec<SubscriberName>,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Backlog {
    /// They stay; `hooktrail prune` deletes them later
    Keep,
    /// They are deleted
    Drop,
}

/// Reads a name of the command line.
fn name(text: &str) -> Result<SubscriberName, String> {
    SubscriberName::try_new(text).map_err(|why| why.to_string())
}

pub(super) async fn run(asked: &Asked, command: Command) -> Result<(), Failed> {
    let daemon = Daemon::of(asked)?;
    match command {
        Command::List { tenant, json } => {
            let mut all = daemon.get::<Overview>("subscribers").await?.read.subscribers;
            all.retain(|s| {
                tenant.is_none() || s.tenant.as_deref() == tenant.as_ref().map(Tenant::as_str)
            });
            write(&if json { listed(&all) } else { print::table(&all) })
        }
        Command::Show { subscriber, json } => {
            let found = daemon.get::<SubscriberDetails>(&path(&subscriber)).await?;
            write(&if json { as_json(&found.raw) + "\n" } else { print::details(&found.read) })
        }
        Command::Add { subscriber, keys, paused, json } => {
            add(&daemon, &subscriber, &keys, paused, json).await
        }
        Command::Set { subscriber, keys, unset, if_version, json } => {
            set(&daemon, &subscriber, &keys.read(&unset)?, if_version, json).await
        }
        Command::Remove { subscriber, backlog, if_version, how } => {
            remove(&daemon, &subscriber, backlog, if_version, how).await
        }
        Command::Export { subscribers } => export(&daemon, subscribers).await,
    }
}

fn path(subscriber: &SubscriberName) -> String {
    format!("subscribers/{}", segment(subscriber.as_str()))
}

/// The command that shows what a request has done whose answer is lost.
fn see(subscriber: &SubscriberName) -> String {
    format!("hooktrail subscribers show {subscriber}")
}

fn listed(all: &[Subscriber]) -> String {
    let one = |s: &Subscriber| {
        let mut one = json!({ "subscriber": s.subscriber, "state": s.state });
        for (key, value) in
            [("origin", json!(s.origin)), ("tenant", json!(s.tenant)), ("why", json!(s.why))]
        {
            if !value.is_null() {
                one[key] = value;
            }
        }
        one
    };
    as_json(&json!({ "subscribers": all.iter().map(one).collect::<Vec<_>>() })) + "\n"
}

async fn add(
    daemon: &Daemon<'_>,
    subscriber: &SubscriberName,
    keys: &Keys,
    paused: bool,
    json: bool,
) -> Result<(), Failed> {
    let mut keys = keys.read(&[])?;
    if keys.get("name").is_some_and(|name| name != subscriber.as_str()) {
        let why = format!("--from has another name than `{subscriber}`; leave it out there");
        return Err(Failed::Usage(why));
    }
    keys.set("name", json!(subscriber.as_str()));
    if paused {
        keys.set("start_paused", json!(true));
    }
    let made = daemon.make::<SubscriberChange>("subscribers", &keys, &see(subscriber)).await?;
    ended(&made, "made", json)
}

async fn set(
    daemon: &Daemon<'_>,
    subscriber: &SubscriberName,
    patch: &Document,
    if_version: Option<u64>,
    json: bool,
) -> Result<(), Failed> {
    if patch.keys().is_empty() {
        let why = "nothing is to be changed; give a key, such as --events 'user.*'";
        return Err(Failed::Usage(why.to_owned()));
    }
    let version = expected(daemon, subscriber, if_version).await?;
    let change = Change::Patch { patch, version: &version };
    let changed = daemon.change(&path(subscriber), change, &see(subscriber)).await?;
    match changed {
        Done::Done(changed) => ended(&changed, "changed", json),
        Done::OtherVersion => Err(overtaken(daemon, subscriber, &version).await),
    }
}

/// Prints a change; an error if it is not in use yet.
fn ended(change: &SubscriberChange, what: &str, json: bool) -> Result<(), Failed> {
    print::change(change, what, json)?;
    if change.bound {
        return Ok(());
    }
    let why = change.why.as_ref().map(|why| format!(" ({})", visible(why))).unwrap_or_default();
    Err(Failed::Runtime(format!(
        "`{}` is {what}, and its queue does not get all its events yet{why}: the daemon tries that until it does, see its log",
        visible(&change.subscriber)
    )))
}

async fn remove(
    daemon: &Daemon<'_>,
    subscriber: &SubscriberName,
    backlog: Backlog,
    if_version: Option<u64>,
    how: Destructive,
) -> Result<(), Failed> {
    let is_dropped = backlog == Backlog::Drop;
    if is_dropped && !how.yes && !how.dry_run {
        terminal::can_ask("remove")?;
    }
    let found = daemon.get::<SubscriberDetails>(&path(subscriber)).await?.read;
    let version = if_version.map_or_else(|| version_of(&found), quoted);
    let holds = holds(&found.status);
    let fate = if is_dropped { "deleted" } else { "kept" };
    if how.dry_run {
        if let Some(Origin::File { file, line }) = &found.status.origin
            && found.shadows.is_none()
        {
            let place = format!("{}:{line}", visible(file));
            return Err(Failed::Runtime(format!("`{subscriber}` is of {place}; remove it there")));
        }
        if version != version_of(&found) {
            return Err(overtaken(daemon, subscriber, &version).await);
        }
        let would = json!({ "subscriber": subscriber.as_str(), "backlog": fate, "holds": holds });
        return write(&if how.json {
            as_json(&would) + "\n"
        } else {
            format!("would remove `{subscriber}`; {holds} would be {fate}\n")
        });
    }
    if is_dropped && !how.yes {
        let question = format!("`{subscriber}` is removed, and {holds} are deleted. Go on?");
        terminal::confirm("remove", &question)?;
    }
    let keep = if is_dropped { "drop" } else { "keep" };
    let at = format!("{}?backlog={keep}", path(subscriber));
    let change = Change::Remove { version: &version };
    let removed = daemon.change::<SubscriberRemoval>(&at, change, &see(subscriber)).await?;
    let removed = match removed {
        Done::Done(removed) => removed,
        Done::OtherVersion => return Err(overtaken(daemon, subscriber, &version).await),
    };
    write(&if how.json {
        as_json(&removed) + "\n"
    } else {
        match removed.backlog.as_str() {
            "kept" => format!(
                "`{subscriber}` is removed; its events, retries and dead letters are kept until `hooktrail prune`\n"
            ),
            "dropped" => {
                format!("`{subscriber}` is removed, with its events, retries and dead letters\n")
            }
            _ => format!("`{subscriber}` is removed\n"),
        }
    })?;
    if removed.backlog == "dropping" {
        return Err(Failed::Runtime(format!(
            "the queues of `{subscriber}` are still in use; the daemon deletes them as soon as they are not, also after a restart: see \
             `hooktrail prune --dry-run`"
        )));
    }
    Ok(())
}

/// What is in its queues, in words.
fn holds(status: &Subscriber) -> String {
    let known = status.lane.as_ref().and_then(|lane| Some((lane, lane.backlog?, lane.dead?)));
    known.map_or_else(
        || "its events, retries and dead letters".to_owned(),
        |(lane, events, dead)| {
            format!(
                "{}, {} and {}",
                counted(events, "event(s)"),
                counted(lane.in_retry.unwrap_or_default(), "batch(es) to retry"),
                counted(dead, "dead letter(s)")
            )
        },
    )
}

fn quoted(version: u64) -> String {
    format!("\"{version}\"")
}

/// The version that the daemon is to find; `*` for one that has none, which the daemon refuses with
/// its reason.
fn version_of(found: &SubscriberDetails) -> String {
    let of_api = found.shadows.as_ref().or(found.status.origin.as_ref()).and_then(version);
    of_api.map_or_else(|| "*".to_owned(), |version| format!("\"{version}\""))
}

async fn expected(
    daemon: &Daemon<'_>,
    subscriber: &SubscriberName,
    if_version: Option<u64>,
) -> Result<String, Failed> {
    match if_version {
        Some(version) => Ok(quoted(version)),
        None => {
            let found = daemon.get::<SubscriberDetails>(&path(subscriber)).await?;
            Ok(version_of(&found.read))
        }
    }
}

/// Says who has changed a subscriber meanwhile.
async fn overtaken(daemon: &Daemon<'_>, subscriber: &SubscriberName, expected: &str) -> Failed {
    let found = daemon.get_if_there::<SubscriberDetails>(&path(subscriber)).await;
    let now = match found {
        Err(why) => return why,
        Ok(None) => "it is removed".to_owned(),
        Ok(Some(found)) => {
            let origin = found.read.shadows.or(found.read.status.origin);
            let by = origin.as_ref().map(print::place).unwrap_or_default();
            let is = origin.as_ref().and_then(version).map(visible).unwrap_or_default();
            format!("it is version {is} by now ({by})")
        }
    };
    Failed::Runtime(format!(
        "nothing was done: `{subscriber}` has not the version {}, {now}. Look at it, and decide again: {}",
        expected.trim_matches('"'),
        see(subscriber)
    ))
}

async fn export(daemon: &Daemon<'_>, names: Vec<SubscriberName>) -> Result<(), Failed> {
    let names: Vec<String> = if names.is_empty() {
        let all = daemon.get::<Overview>("subscribers").await?.read.subscribers;
        let is_of_api = |s: &Subscriber| s.origin.as_ref().is_some_and(|o| version(o).is_some());
        all.into_iter().filter(is_of_api).map(|s| s.subscriber).collect()
    } else {
        names.iter().map(ToString::to_string).collect()
    };
    let mut text = String::new();
    for name in names {
        let path = format!("subscribers/{}", segment(&name));
        let found = daemon.get::<SubscriberDetails>(&path).await?.read;
        let why = match (&found.status.origin, found.document) {
            (_, Some(document)) => {
                let read: Result<Document, _> = serde_json::from_value(document);
                let document = read.map_err(|_| unreadable(&name, "it is no JSON object"))?;
                if !text.is_empty() {
                    text.push('\n');
                }
                text.push_str(&as_file(&name, &document));
                continue;
            }
            (Some(origin @ Origin::File { .. }), None) => {
                format!("it is in a file already, {}", print::place(origin))
            }
            (_, None) => {
                found.status.why.unwrap_or_else(|| "the daemon does not show it".to_owned())
            }
        };
        return Err(unreadable(&name, &why));
    }
    if text.is_empty() {
        eprintln!("no subscriber was made over the API");
    }
    write(&text)
}

fn unreadable(name: &str, why: &str) -> Failed {
    Failed::Runtime(format!("`{}` cannot be exported: {}", visible(name), visible(why)))
}

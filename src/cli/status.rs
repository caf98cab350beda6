//! `status`: all subscribers in a table, or one of them in detail.

mod story;
mod table;

use std::{
    io::{IsTerminal as _, Write as _},
    time::Duration,
};

use self::{
    story::story,
    table::{preface, table},
};
use super::{
    complete,
    daemon::{Answer, Asked, Daemon},
    failed::Failed,
    terminal,
    text::{there_are, visible},
};
use crate::{admin::view::Overview, delivery::SubscriberName};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Only this subscriber, with its last error, what waits, and what to do
    #[arg(add = complete::subscribers())]
    subscriber: Option<String>,
    /// Each subscriber, where otherwise the worst of more than 100 are shown
    #[arg(long)]
    all: bool,
    /// The daemon's answer, as one JSON object
    #[arg(long)]
    json: bool,
    /// Repeat at this interval
    #[arg(long, value_name = "EVERY", num_args = 0..=1, default_missing_value = "2s", value_parser = watch)]
    watch: Option<Watch>,
}

/// The value of `--watch`.
#[derive(Debug, Clone)]
enum Watch {
    Every(Duration),
    /// A subscriber's name instead of an interval, which is then [`EVERY`].
    Of(String),
}

fn watch(text: &str) -> Result<Watch, String> {
    match super::arguments::duration(text) {
        Ok(every) => Ok(Watch::Every(every)),
        Err(_) if SubscriberName::try_new(text).is_ok() && !text.as_bytes()[0].is_ascii_digit() => {
            Ok(Watch::Of(text.to_owned()))
        }
        Err(why) => Err(why.to_owned()),
    }
}

/// The interval of `--watch` without a value.
const EVERY: Duration = Duration::from_secs(2);

pub(super) async fn run(asked: &Asked, args: &Args) -> Result<(), Failed> {
    let (every, named) = match &args.watch {
        None => (None, None),
        Some(Watch::Every(every)) => (Some(*every), None),
        Some(Watch::Of(name)) => (Some(EVERY), Some(name)),
    };
    let name = match (&args.subscriber, named) {
        (Some(_), Some(_)) => {
            return Err(Failed::Usage("name one subscriber, or none for all".to_owned()));
        }
        (one, other) => one.as_ref().or(other),
    };
    let daemon = Daemon::of(asked)?;
    loop {
        let answer = daemon.get::<Overview>("subscribers").await;
        let shown = match &answer {
            Ok(found) => shown(found, name, args)?,
            // While watching, wait for the daemon to return.
            Err(Failed::Runtime(why)) if every.is_some() => format!("{why}\n"),
            Err(_) => return answer.map(drop),
        };
        if every.is_some() && !args.json && std::io::stdout().is_terminal() {
            // Clears the screen and starts at its top.
            print!("\u{1b}[H\u{1b}[2J");
        }
        let shown =
            std::io::stdout().write_all(shown.as_bytes()).and_then(|()| std::io::stdout().flush());
        if shown.is_err() {
            return Ok(()); // the reader has left, as with `| head`
        }
        let Some(every) = every else { return Ok(()) };
        tokio::time::sleep(every.max(Duration::from_millis(100))).await;
    }
}

fn shown(found: &Answer<Overview>, name: Option<&String>, args: &Args) -> Result<String, Failed> {
    let Answer { read, raw } = found;
    let Some(name) = name else {
        return Ok(if args.json {
            format!("{raw}\n")
        } else {
            table(read, terminal::width(), args.all)
        });
    };
    let Some(n) = read.subscribers.iter().position(|s| s.subscriber == *name) else {
        let names: Vec<String> = read.subscribers.iter().map(|s| visible(&s.subscriber)).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        return Err(Failed::Usage(format!(
            "the daemon has no subscriber `{}`; {}",
            visible(name),
            there_are(name, &names)
        )));
    };
    Ok(if args.json {
        format!("{}\n", raw["subscribers"][n])
    } else {
        let width = terminal::width().unwrap_or(terminal::USUAL);
        preface(read) + &story(&read.subscribers[n], width)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn watch_takes_a_time_or_leaves_a_name() {
        assert!(matches!(watch("2"), Ok(Watch::Every(every)) if every == Duration::from_secs(2)));
        assert!(matches!(watch("siem"), Ok(Watch::Of(name)) if name == "siem"));
        assert!(watch("2 parsecs").is_err() && watch("2x").is_err());
    }

    #[test]
    fn an_unknown_subscriber_is_reported_with_those_that_are_known() {
        let raw = json!({ "phase": "running", "queue": { "up": true }, "subscribers": [{ "subscriber": "a", "state": "ok" }] });
        let found = Answer { read: serde_json::from_value(raw.clone()).expect("an overview"), raw };
        let args = |json| Args { subscriber: None, all: false, json, watch: None };
        let a = shown(&found, Some(&"a".to_owned()), &args(false));
        assert_eq!(a.expect("it is there"), "a: ok\n");
        let why = shown(&found, Some(&"b".to_owned()), &args(true)).expect_err("it is not there");
        assert!(
            matches!(why, Failed::Usage(why) if why.contains("`b`") && why.contains("there are: a"))
        );
    }
}

//! `status`: how each subscriber is, in one table.

use std::{
    fmt::Write as _,
    io::{IsTerminal as _, Write as _},
    time::Duration,
};

use serde_json::Value;

use super::{
    Failed,
    daemon::{Asked, Daemon},
    visible,
};
use crate::{clock, wording::counted};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// What the daemon answers, as one JSON object
    #[arg(long)]
    json: bool,
    /// Ask again and again, every so often
    #[arg(long, value_name = "EVERY", num_args = 0..=1, default_missing_value = "2s", value_parser = humantime::parse_duration)]
    watch: Option<Duration>,
}

pub(super) async fn run(asked: &Asked, args: &Args) -> Result<(), Failed> {
    let daemon = Daemon::of(asked)?;
    loop {
        let answer = daemon.get("subscribers").await;
        let shown = match (&answer, args.json) {
            (Ok(found), true) => format!("{found}\n"),
            (Ok(found), false) => table(found),
            // Who watches waits for the daemon to come back.
            (Err(Failed::Runtime(why)), _) if args.watch.is_some() => format!("{why}\n"),
            (Err(_), _) => return answer.map(drop),
        };
        if args.watch.is_some() && !args.json && std::io::stdout().is_terminal() {
            // From the top, and what was there before goes.
            print!("\u{1b}[H\u{1b}[2J");
        }
        let shown = std::io::stdout().write_all(shown.as_bytes()).and_then(|()| std::io::stdout().flush());
        if shown.is_err() {
            return Ok(()); // nobody reads any more, as with `| head`
        }
        let Some(every) = args.watch else { return Ok(()) };
        tokio::time::sleep(every.max(Duration::from_millis(100))).await;
    }
}

fn table(found: &Value) -> String {
    let mut out = String::new();
    // Writing to a string cannot fail.
    let mut line = |text: &str| writeln!(out, "{}", text.trim_end()).unwrap_or_default();
    if let Some(problem) = found["config"]["problem"].as_str() {
        line(&format!("The configuration was not reloaded; the one before it is in use:\n{}\n", lines(problem)));
    }
    if found["phase"] != "running" {
        line(&format!("The daemon is {}.\n", text(&found["phase"])));
    }
    let why = found["queue"]["error"].as_str().map(|why| format!(": {}", visible(why))).unwrap_or_default();
    if found["queue"]["up"] == false {
        line(&format!(
            "The queue cannot be used{why}\nNothing is taken in or given up meanwhile; it goes on by itself when the queue can be used again.\n"
        ));
    } else if !why.is_empty() {
        line(&format!("The queue is not as it should be{why}\n"));
    }
    let mut rows = vec![COLUMNS.map(str::to_owned)];
    let subscribers = found["subscribers"].as_array().map(Vec::as_slice).unwrap_or_default();
    rows.extend(subscribers.iter().map(row));
    // A long reason would push the figures off the screen; it is told below.
    let mut long = Vec::new();
    for row in &mut rows {
        if row[1].chars().count() > STATE_WIDTH {
            long.push(format!("\n`{}`: {}", row[0], row[1]));
            row[1] = row[1].chars().take(STATE_WIDTH - 1).chain(['…']).collect();
        }
    }
    let widths: [usize; COLUMNS.len()] = std::array::from_fn(|n| rows.iter().map(|r| r[n].chars().count()).max().unwrap_or(0));
    for row in &rows {
        let cell = |(n, (text, width)): (usize, (&String, &usize))| {
            if NUMBERS.contains(&COLUMNS[n]) { format!("{text:>width$}") } else { format!("{text:<width$}") }
        };
        line(&row.iter().zip(&widths).enumerate().map(cell).collect::<Vec<_>>().join("  "));
    }
    long.iter().for_each(|text| line(text));
    if subscribers.is_empty() {
        line("no subscriber is configured");
    }
    // A look at many queues, or at a broker that is away, takes its time.
    let age = found["queue"]["looked_at"].as_str().and_then(|at| clock::now().duration_since(humantime::parse_rfc3339(at).ok()?).ok());
    if let Some(age) = age.filter(|age| *age >= OLD) {
        line(&format!("\nBACKLOG and DEAD are of {} ago: the queues have not been looked at since.", span(age)));
    }
    for r in found["removed"].as_array().into_iter().flatten() {
        let name = text(&r["subscriber"]);
        line(&format!(
            "\n`{name}` is not configured any more; there are left {}, {}, {} (hooktrail prune {name})",
            count(&r["events"], "event(s)"),
            count(&r["retries"], "batch(es) to retry"),
            count(&r["dead"], "dead letter(s)")
        ));
    }
    if let Some(orphans) = found["queue"]["orphans"].as_u64().filter(|n| *n > 0) {
        line(&format!(
            "\n{}: retries whose queue was gone, or no events in the source queue (hooktrail dead list --orphans)",
            counted(orphans, "orphan(s)")
        ));
    }
    out
}

const COLUMNS: [&str; 12] =
    ["SUBSCRIBER", "STATE", "BACKLOG", "IN HAND", "IN RETRY", "NEXT DUE", "DEAD", "DELIVERED/S", "SUCCESS", "P50", "P99", "OLDEST"];

/// More of a state is not in the table.
const STATE_WIDTH: usize = 50;

/// From this age on what is told of the queues is told with its age.
const OLD: Duration = Duration::from_secs(3);

const NUMBERS: [&str; 9] = ["BACKLOG", "IN HAND", "IN RETRY", "DEAD", "DELIVERED/S", "SUCCESS", "P50", "P99", "OLDEST"];

fn row(s: &Value) -> [String; COLUMNS.len()] {
    let number = |key: &str| s[key].as_u64().map_or_else(|| "-".to_owned(), |n| n.to_string());
    let seconds = |key: &str| s[key].as_f64().map_or_else(|| "-".to_owned(), |n| span(Duration::try_from_secs_f64(n).unwrap_or_default()));
    let share = |n: f64| format!("{:.1}%", n * 100.0);
    [
        text(&s["subscriber"]),
        state(s),
        number("backlog"),
        number("in_hand"),
        number("in_retry"),
        s["next_retry_at"].as_str().map_or_else(|| "-".to_owned(), until),
        number("dead"),
        s["delivered_per_s"].as_f64().map_or_else(|| "-".to_owned(), |n| format!("{n:.1}")),
        s["success_rate"].as_f64().map_or_else(|| "-".to_owned(), share),
        seconds("p50_s"),
        seconds("p99_s"),
        seconds("oldest_event_age_s"),
    ]
}

/// The state with what explains it.
fn state(s: &Value) -> String {
    let last_error = || {
        let e = &s["last_error"];
        let status = e["status"].as_u64().map(|n| format!(" {n}")).unwrap_or_default();
        let cause = e["cause"].as_str().map(|c| format!(": {}", visible(c))).unwrap_or_default();
        if e.is_object() { format!(" ({}{status}{cause})", text(&e["failure"])) } else { String::new() }
    };
    match s["state"].as_str().unwrap_or_default() {
        "ok" => "ok".to_owned(),
        // Its batch was given up, or another daemon has it.
        "retrying" if s["in_retry"] == 0 && s["in_hand"] == 0 => format!("last attempt failed{}", last_error()),
        "retrying" => format!("retrying{}", last_error()),
        "circuit_open" => format!("circuit open, probe {}{}", s["circuit"]["until"].as_str().map_or_else(String::new, until), last_error()),
        "held" => format!("held by Retry-After{}", s["held_until"].as_str().map_or_else(String::new, still)),
        "paused" => format!("paused by {}: {}", text(&s["paused"]["by"]), text(&s["paused"]["why"])),
        "queue_fails" => format!("its queue fails: {}", text(&s["queue_error"])),
        other => visible(other),
    }
}

fn count(value: &Value, what: &str) -> String {
    counted(value.as_u64().unwrap_or_default(), what)
}

fn text(value: &Value) -> String {
    visible(value.as_str().unwrap_or("-"))
}

fn lines(text: &str) -> String {
    text.lines().map(visible).collect::<Vec<_>>().join("\n")
}

/// How long from now, of a time in RFC 3339.
fn until(at: &str) -> String {
    match humantime::parse_rfc3339(at) {
        Ok(at) => at.duration_since(clock::now()).map_or_else(|_| "now".to_owned(), |d| format!("in {}", span(d))),
        Err(_) => visible(at),
    }
}

/// For how long from now, of a time in RFC 3339.
fn still(until: &str) -> String {
    let left = humantime::parse_rfc3339(until).ok().map(|at| at.duration_since(clock::now()).unwrap_or_default());
    left.filter(|left| !left.is_zero()).map_or_else(String::new, |left| format!(" for another {}", span(left)))
}

/// Two figures are enough for a look.
fn span(d: Duration) -> String {
    if d < Duration::from_secs(1) {
        return format!("{}ms", d.as_millis());
    }
    let text = humantime::format_duration(Duration::from_secs(d.as_secs())).to_string();
    text.split(' ').take(2).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_table_says_what_is_wrong_and_drives_no_terminal() {
        let found = json!({
            "phase": "draining",
            "config": { "problem": "h.toml:3:1: x: is wrong\nanother \u{1b}[2J" },
            "queue": { "up": false, "error": null, "orphans": 2, "looked_at": "2020-01-01T00:00:00Z" },
            "subscribers": [
                { "subscriber": "a", "state": "ok", "backlog": 3, "in_hand": 1, "in_retry": 0, "next_retry_at": null, "dead": 0,
                  "delivered_per_s": 12.34, "success_rate": 0.995, "p50_s": 0.012, "p99_s": 61.0, "oldest_event_age_s": 3700.5 },
                { "subscriber": "b", "state": "paused", "paused": { "why": "410 \u{1b}[31m", "by": "receiver" } },
                { "subscriber": "c", "state": "retrying", "last_error": { "failure": "status", "status": 503, "cause": null } },
                { "subscriber": "d", "state": "circuit_open", "circuit": { "until": "2020-01-01T00:00:00Z" },
                  "last_error": { "failure": "connect", "status": null, "cause": "refused" } },
                { "subscriber": "e", "state": "starting" },
                { "subscriber": "g", "state": "paused", "paused": { "why": "they are migrating to another region this week", "by": "operator" } },
                { "subscriber": "f", "state": "retrying", "in_hand": 0, "in_retry": 0, "last_error": { "failure": "timeout" } },
            ],
            "removed": [{ "subscriber": "gone", "events": 5, "retries": 0, "dead": 1 }],
        });
        let shown = table(&found);
        for part in [
            "h.toml:3:1: x: is wrong\nanother \\u{1b}[2J",
            "The daemon is draining.",
            "The queue cannot be used",
            "a           ok",
            "12.3    99.5%  12ms  1m 1s",
            "1h 1m",
            "paused by receiver: 410 \\u{1b}[31m",
            "retrying (status 503)",
            "circuit open, probe now (connect: refused)",
            "e           starting",
            "last attempt failed (timeout)",
            "g           paused by operator: they are migrating to another… ",
            "\n`g`: paused by operator: they are migrating to another region this week\n",
            "BACKLOG and DEAD are of ",
            "`gone` is not configured any more; there are left 5 events",
            "2 orphans",
        ] {
            assert!(shown.contains(part), "{part:?} is not in:\n{shown}");
        }
        assert!(!shown.contains('\u{1b}'));
        assert!(table(&json!({ "phase": "running", "queue": { "up": true } })).contains("no subscriber is configured"));
    }
}

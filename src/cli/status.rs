//! `status`: how each subscriber is, in one table, or one of them with its story.

mod story;

use std::{
    collections::BTreeSet,
    fmt::Write as _,
    io::{IsTerminal as _, Write as _},
    time::Duration,
};

use serde_json::Value;

use self::story::story;
use super::{
    complete,
    daemon::{Asked, Daemon},
    failed::Failed,
    terminal::{self, wrapped},
    text::{there_are, visible},
};
use crate::{clock, delivery::SubscriberName, wording::counted};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Only this subscriber: since when it is so, and why, what waits, the last error, and what to
    /// do
    #[arg(add = complete::subscribers())]
    subscriber: Option<String>,
    /// What the daemon answers, as one JSON object
    #[arg(long)]
    json: bool,
    /// Ask again and again, every so often
    #[arg(long, value_name = "EVERY", num_args = 0..=1, default_missing_value = "2s", value_parser = watch)]
    watch: Option<Watch>,
}

/// What stands behind `--watch`.
#[derive(Debug, Clone)]
enum Watch {
    Every(Duration),
    /// No time: it is the subscriber's name, and the time is the usual one.
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

/// How often `--watch` alone asks.
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
        let answer = daemon.get("subscribers").await;
        let shown = match &answer {
            Ok(found) => shown(found, name, args.json)?,
            // Who watches waits for the daemon to come back.
            Err(Failed::Runtime(why)) if every.is_some() => format!("{why}\n"),
            Err(_) => return answer.map(drop),
        };
        if every.is_some() && !args.json && std::io::stdout().is_terminal() {
            // From the top, and what was there before goes.
            print!("\u{1b}[H\u{1b}[2J");
        }
        let shown =
            std::io::stdout().write_all(shown.as_bytes()).and_then(|()| std::io::stdout().flush());
        if shown.is_err() {
            return Ok(()); // nobody reads any more, as with `| head`
        }
        let Some(every) = every else { return Ok(()) };
        tokio::time::sleep(every.max(Duration::from_millis(100))).await;
    }
}

fn shown(found: &Value, name: Option<&String>, json: bool) -> Result<String, Failed> {
    let Some(name) = name else {
        return Ok(if json { format!("{found}\n") } else { table(found, terminal::width()) });
    };
    let all = found["subscribers"].as_array().map(Vec::as_slice).unwrap_or_default();
    let Some(one) = all.iter().find(|s| s["subscriber"] == name.as_str()) else {
        let names: Vec<String> = all.iter().map(|s| text(&s["subscriber"])).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        return Err(Failed::Usage(format!(
            "the daemon has no subscriber `{}`; {}",
            visible(name),
            there_are(name, &names)
        )));
    };
    Ok(if json {
        format!("{one}\n")
    } else {
        preface(found) + &story(one, terminal::width().unwrap_or(terminal::USUAL))
    })
}

/// What is wrong with the daemon itself.
fn preface(found: &Value) -> String {
    let mut out = String::new();
    // Writing to a string cannot fail.
    let mut line = |text: &str| writeln!(out, "{}", text.trim_end()).unwrap_or_default();
    if let Some(problem) = found["config"]["problem"].as_str() {
        line(&format!(
            "The configuration was not reloaded; the one before it is in use:\n{}\n",
            lines(problem)
        ));
    }
    if let Some(why) = found["config"]["held"]["why"].as_str() {
        line(&format!("Removals wait for an operator: {}\n", visible(why)));
    }
    if found["phase"] != "running" {
        line(&format!("The daemon is {}.\n", text(&found["phase"])));
    }
    let why = found["queue"]["error"]
        .as_str()
        .map(|why| format!(": {}", visible(why)))
        .unwrap_or_default();
    if found["queue"]["up"] == false {
        line(&format!(
            "The queue cannot be used{why}\nNothing is taken in or given up meanwhile; it goes on by itself when the queue can be used again.\n"
        ));
    } else if !why.is_empty() {
        line(&format!("The queue is not as it should be{why}\n"));
    }
    out
}

fn table(found: &Value, width: Option<usize>) -> String {
    let mut out = preface(found);
    // Writing to a string cannot fail.
    let mut line = |text: &str| writeln!(out, "{}", text.trim_end()).unwrap_or_default();
    let subscribers = found["subscribers"].as_array().map(Vec::as_slice).unwrap_or_default();
    let rows: Vec<Row> =
        std::iter::once(COLUMNS.map(str::to_owned)).chain(subscribers.iter().map(row)).collect();
    let fit = Fit::of(&rows, width);
    // A long reason would push the figures off the screen; it is told below.
    let mut long = Vec::new();
    for row in &rows {
        if row[1].chars().count() > fit.widths[1] {
            long.push(format!("\n`{}`: {}", row[0], row[1]));
        }
        fit.lines(row).iter().for_each(|l| line(l));
    }
    long.iter()
        .for_each(|text| line(&width.map_or_else(|| text.clone(), |width| wrapped(text, width))));
    let mut not_shown = fit.left_out.clone();
    not_shown.extend(fit.cuts_names.then_some("whole names, which `hooktrail status --json` has"));
    if !not_shown.is_empty() {
        let left_out = format!(
            "\n(not shown, for the width: {}; `hooktrail status NAME` shows all of one)",
            not_shown.join(", ")
        );
        line(&wrapped(&left_out, width.unwrap_or(terminal::USUAL)));
    }
    if subscribers.is_empty() {
        line("no subscriber is configured");
    }
    // A look at many queues, or at a broker that is away, takes its time.
    let age = found["queue"]["looked_at"]
        .as_str()
        .and_then(|at| clock::now().duration_since(humantime::parse_rfc3339(at).ok()?).ok());
    if let Some(age) = age.filter(|age| *age >= OLD) {
        line(&format!(
            "\nBACKLOG and DEAD are of {} ago: the queues have not been looked at since.",
            span(age)
        ));
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

const COLUMNS: [&str; 12] = [
    "SUBSCRIBER",
    "STATE",
    "BACKLOG",
    "IN HAND",
    "IN RETRY",
    "NEXT DUE",
    "DEAD",
    "DELIVERED/S",
    "SUCCESS",
    "P50",
    "P99",
    "OLDEST",
];

type Row = [String; COLUMNS.len()];

/// More of a state is not in the table.
const STATE_WIDTH: usize = 50;

/// So much of a state is, before figures are left out.
const STATE_LEAST: usize = 20;

/// So much of a name is, before figures are left out.
const NAME_LEAST: usize = 24;

/// Which columns are left out of a table that is too wide, the first ones first.
const LEFT_OUT: [&str; 7] =
    ["P99", "P50", "SUCCESS", "IN HAND", "DELIVERED/S", "NEXT DUE", "OLDEST"];

/// A table in the width that there is.
struct Fit {
    /// Of each column; 0 of one that is left out.
    widths: [usize; COLUMNS.len()],
    left_out: Vec<&'static str>,
    /// A name that is too long is cut, where that leaves it another than all others.
    cuts_names: bool,
}

impl Fit {
    fn of(rows: &[Row], width: Option<usize>) -> Self {
        let longest = |n: usize| rows.iter().map(|r| r[n].chars().count()).max().unwrap_or(0);
        let mut fit =
            Self { widths: std::array::from_fn(longest), left_out: Vec::new(), cuts_names: false };
        let (name, state) = (fit.widths[0], fit.widths[1].min(STATE_WIDTH));
        fit.widths[1] = state;
        let Some(width) = width else { return fit };
        fit.widths[1] = state.min(STATE_LEAST);
        if fit.total() > width {
            fit.widths[0] = name.min(NAME_LEAST);
        }
        for column in LEFT_OUT {
            if fit.total() <= width {
                break;
            }
            let n = COLUMNS.iter().position(|c| *c == column).unwrap_or_default();
            fit.widths[n] = 0;
            fit.left_out.push(column);
        }
        fit.widths[0] -=
            fit.total().saturating_sub(width).min(fit.widths[0].saturating_sub("SUBSCRIBER".len()));
        for (column, most) in [(0, name), (1, state)] {
            fit.widths[column] = (fit.widths[column] + width.saturating_sub(fit.total())).min(most);
        }
        let cut: BTreeSet<String> = rows.iter().map(|r| shortened(&r[0], fit.widths[0])).collect();
        fit.cuts_names = fit.widths[0] < name && cut.len() == rows.len();
        fit
    }

    fn total(&self) -> usize {
        self.widths.iter().filter(|w| **w > 0).map(|w| w + 2).sum::<usize>().saturating_sub(2)
    }

    fn lines(&self, row: &Row) -> Vec<String> {
        let mut lines = Vec::new();
        let mut cells = Vec::new();
        for (n, (text, width)) in
            row.iter().zip(self.widths).enumerate().filter(|(_, (_, width))| *width > 0)
        {
            let is_long = text.chars().count() > width;
            cells.push(match n {
                0 if is_long && self.cuts_names => shortened(text, width),
                // Cut it would be another's.
                0 if is_long => {
                    lines.push(text.clone());
                    " ".repeat(width)
                }
                1 if is_long => text.chars().take(width - 1).chain(['…']).collect(),
                _ if NUMBERS.contains(&COLUMNS[n]) => format!("{text:>width$}"),
                _ => format!("{text:<width$}"),
            });
        }
        lines.push(cells.join("  "));
        lines
    }
}

/// A text in so many columns, at least 3; what is left out is of its middle: names differ at their
/// ends.
fn shortened(text: &str, width: usize) -> String {
    let count = text.chars().count();
    if count <= width {
        return text.to_owned();
    }
    let (head, tail) = (width / 2, width - width / 2 - 1);
    text.chars().take(head).chain(['…']).chain(text.chars().skip(count - tail)).collect()
}

/// From this age on what is told of the queues is told with its age.
const OLD: Duration = Duration::from_secs(3);

const NUMBERS: [&str; 9] =
    ["BACKLOG", "IN HAND", "IN RETRY", "DEAD", "DELIVERED/S", "SUCCESS", "P50", "P99", "OLDEST"];

fn row(s: &Value) -> Row {
    let number = |key: &str| s[key].as_u64().map_or_else(|| "-".to_owned(), |n| n.to_string());
    let seconds = |key: &str| {
        s[key].as_f64().map_or_else(
            || "-".to_owned(),
            |n| span(Duration::try_from_secs_f64(n).unwrap_or_default()),
        )
    };
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
        if e.is_object() {
            format!(" ({}{status}{cause})", text(&e["failure"]))
        } else {
            String::new()
        }
    };
    match s["state"].as_str().unwrap_or_default() {
        "ok" => "ok".to_owned(),
        "waiting" => format!(
            "waiting for an answer, {}",
            s["waiting_since"].as_str().map_or_else(|| "-".to_owned(), since)
        ),
        // Its batch was given up, or another daemon has it.
        "retrying" if s["in_retry"] == 0 && s["in_hand"] == 0 => {
            format!("last attempt failed{}", last_error())
        }
        "retrying" => format!("retrying{}", last_error()),
        "circuit_open" => format!(
            "circuit open, probe {}{}",
            s["circuit"]["until"].as_str().map_or_else(String::new, until),
            last_error()
        ),
        "held" => format!(
            "held by Retry-After{}",
            s["held_until"].as_str().map_or_else(String::new, still)
        ),
        "paused" => {
            format!("paused by {}: {}", text(&s["paused"]["by"]), text(&s["paused"]["why"]))
        }
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

/// How long ago, of a time in RFC 3339.
fn since(at: &str) -> String {
    let ago = humantime::parse_rfc3339(at).ok().and_then(|at| clock::now().duration_since(at).ok());
    ago.map_or_else(|| visible(at), span)
}

/// How long from now, of a time in RFC 3339.
fn until(at: &str) -> String {
    match humantime::parse_rfc3339(at) {
        Ok(at) => at
            .duration_since(clock::now())
            .map_or_else(|_| "now".to_owned(), |d| format!("in {}", span(d))),
        Err(_) => visible(at),
    }
}

/// For how long from now, of a time in RFC 3339.
fn still(until: &str) -> String {
    let left = humantime::parse_rfc3339(until)
        .ok()
        .map(|at| at.duration_since(clock::now()).unwrap_or_default());
    left.filter(|left| !left.is_zero())
        .map_or_else(String::new, |left| format!(" for another {}", span(left)))
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
            "config": { "problem": "h.toml:3:1: x: is wrong\nanother \u{1b}[2J", "held": { "subscribers": ["x"], "why": "2 of 2 (x)" } },
            "queue": { "up": false, "error": null, "orphans": 2, "looked_at": "2020-01-01T00:00:00Z" },
            "subscribers": [
                { "subscriber": "a", "state": "ok", "backlog": 3, "in_hand": 1, "in_retry": 0, "next_retry_at": null, "dead": 0,
                  "delivered_per_s": 12.34, "success_rate": 0.995, "p50_s": 0.012, "p99_s": 61.0, "oldest_event_age_s": 3700.5 },
                { "subscriber": "b", "state": "paused", "paused": { "why": "410 \u{1b}[31m", "by": "receiver" } },
                { "subscriber": "c", "state": "retrying", "last_error": { "failure": "status", "status": 503, "cause": null } },
                { "subscriber": "d", "state": "circuit_open", "circuit": { "until": "2020-01-01T00:00:00Z" },
                  "last_error": { "failure": "connect", "status": null, "cause": "refused" } },
                { "subscriber": "e", "state": "starting" },
                { "subscriber": "h", "state": "waiting", "waiting_since": clock::rfc3339(clock::now() - Duration::from_secs(18)) },
                { "subscriber": "g", "state": "paused", "paused": { "why": "they are migrating to another region this week", "by": "operator" } },
                { "subscriber": "f", "state": "retrying", "in_hand": 0, "in_retry": 0, "last_error": { "failure": "timeout" } },
            ],
            "removed": [{ "subscriber": "gone", "events": 5, "retries": 0, "dead": 1 }],
        });
        let shown = table(&found, None);
        for part in [
            "h.toml:3:1: x: is wrong\nanother \\u{1b}[2J",
            "wait for an operator: 2 of 2 (x)",
            "The daemon is draining.",
            "The queue cannot be used",
            "a           ok",
            "12.3    99.5%  12ms  1m 1s",
            "1h 1m",
            "paused by receiver: 410 \\u{1b}[31m",
            "waiting for an answer, ",
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
        assert!(
            table(&json!({ "phase": "running", "queue": { "up": true } }), None)
                .contains("no subscriber is configured")
        );
    }

    #[test]
    fn the_table_fits_the_terminal_and_a_long_name_is_cut_in_its_middle() {
        let long = "a-subscriber-with-a-name-that-is-as-long-as-a-name-may-be-64-xxx";
        let one = |name: &str, state: &str| {
            json!({ "subscriber": name, "state": state, "backlog": 123_456, "in_hand": 500, "in_retry": 12, "dead": 1234,
                "next_retry_at": "2020-01-01T00:00:00Z", "delivered_per_s": 1234.5, "success_rate": 0.995, "p50_s": 0.012, "p99_s": 61.0,
                "oldest_event_age_s": 3700.5, "last_error": { "failure": "connect", "status": null, "cause": "Connection refused (os error 111)" } })
        };
        let found = json!({ "phase": "running", "queue": { "up": true },
            "subscribers": [one("siem", "ok"), one(long, "retrying"), one("crm", "retrying")] });
        for width in [60, 80, 100, 120, 140, 200] {
            let shown = table(&found, Some(width));
            for line in shown.lines() {
                assert!(
                    line.chars().count() <= width || line.contains("`a-sub"),
                    "{width}:\n{shown}"
                );
            }
            for part in
                ["-64-xxx", "123456", "1234", "siem", "crm", "Connection refused (os error 111)"]
            {
                assert!(
                    shown.split_whitespace().collect::<Vec<_>>().join(" ").contains(part),
                    "{width}: {part} is not in\n{shown}"
                );
            }
            assert!(shown.contains("P99"), "{width}: in the head, or named below:\n{shown}");
        }
        let narrow = table(&found, Some(80));
        assert!(
            narrow.contains("a-subscriber…") && narrow.contains("(not shown, for the width: P99,"),
            "{narrow}"
        );
        assert!(
            narrow.contains("OLDEST")
                && narrow.contains("whole names, which `hooktrail status --json` has"),
            "{narrow}"
        );
        for wide in [table(&found, Some(200)), table(&found, None)] {
            assert!(!wide.contains("not shown") && wide.contains(&format!("\n{long}  ")), "{wide}");
        }
        // Two that differ in the middle alone would be the same.
        let [one, other] = ["1", "2"].map(|n| format!("{}{n}{}", "a".repeat(30), "b".repeat(30)));
        let found = json!({ "phase": "running", "queue": { "up": true },
            "subscribers": [{ "subscriber": one, "state": "ok" }, { "subscriber": other, "state": "ok" }] });
        let shown = table(&found, Some(80));
        assert!(
            shown.contains(&format!("\n{one}\n"))
                && shown.contains(&format!("\n{other}\n"))
                && !shown.contains('…'),
            "{shown}"
        );
    }

    #[test]
    fn watch_takes_a_time_or_leaves_a_name() {
        assert!(matches!(watch("2"), Ok(Watch::Every(every)) if every == Duration::from_secs(2)));
        assert!(matches!(watch("siem"), Ok(Watch::Of(name)) if name == "siem"));
        assert!(watch("2 parsecs").is_err() && watch("2x").is_err());
    }

    #[test]
    fn one_that_is_not_there_is_told_with_those_that_are() {
        let found = json!({ "phase": "running", "queue": { "up": true }, "subscribers": [{ "subscriber": "a", "state": "ok" }] });
        assert_eq!(shown(&found, Some(&"a".to_owned()), false).expect("it is there"), "a: ok\n");
        let why = shown(&found, Some(&"b".to_owned()), true).expect_err("it is not there");
        assert!(
            matches!(why, Failed::Usage(why) if why.contains("`b`") && why.contains("there are: a"))
        );
    }
}

//! `status`: the table of all subscribers.

use std::{collections::BTreeSet, fmt::Write as _, time::Duration};

use crate::{
    admin::view::{
        HistoryHealth, Lane, Overview, Subscriber, Time,
        summary::Summary,
        words::{seconds, state, states as states_of, until},
    },
    cli::{
        terminal::{self, wrapped},
        text::{rounded, visible},
    },
    clock,
    supervisor::fleet::Phase,
    wording::{agreed, counted, grouped},
};

/// The problems of the daemon itself.
pub(super) fn preface(found: &Overview) -> String {
    let mut out = String::new();
    // Writing to a string cannot fail.
    let mut line = |text: &str| writeln!(out, "{}", text.trim_end()).unwrap_or_default();
    if let Some(problem) = &found.config.problem {
        let problem = problem.lines().map(visible).collect::<Vec<_>>().join("\n");
        line(&format!(
            "The configuration was not reloaded; the one before it is in use:\n{problem}\n"
        ));
    }
    if let Some(held) = &found.config.held {
        line(&format!("Removals wait for an operator: {}\n", visible(&held.why)));
    }
    if found.phase != Phase::Running.name() {
        line(&format!("The daemon is {}.\n", visible(&found.phase)));
    }
    let why =
        found.queue.error.as_ref().map(|why| format!(": {}", visible(why))).unwrap_or_default();
    if !found.queue.up {
        line(&format!(
            "The queue cannot be used{why}\nNothing is taken in or given up meanwhile; it goes on by itself when the queue can be used again.\n"
        ));
    } else if !why.is_empty() {
        line(&format!("The queue has a problem{why}\n"));
    }
    let Some(history) = &found.history else { return out };
    let state = match history.state.as_str() {
        "stopped" => "History has stopped, and can only be read",
        "away" => "History is away",
        "incomplete" => "History lacks what is published now",
        _ => "",
    };
    if let Some(why) = history.why.as_ref().filter(|_| !state.is_empty()) {
        line(&format!("{state}: {}\nDeliveries go on.\n", visible(why)));
    }
    if let Some(warning) = &history.warning {
        line(&format!("The store is not sound: {}\n", visible(warning)));
    }
    out
}

/// How far history reaches, or that there is none.
fn history(of: &HistoryHealth) -> String {
    let why = |why: &Option<String>| {
        why.as_ref().map_or_else(String::new, |why| format!(" ({})", visible(why)))
    };
    let from = |at: Option<Time>, what: &str| {
        at.map(|at| format!("{what} from {} on", clock::rfc3339_seconds(at.0)))
    };
    let (events, deliveries) =
        (from(of.events_from, "events"), from(of.deliveries_from, "deliveries"));
    let reaches: Vec<String> = events.into_iter().chain(deliveries).collect();
    match of.state.as_str() {
        "off" => format!("history is off{}", why(&of.why)),
        "opening" => "history is being opened".to_owned(),
        // It is above all the rest.
        "away" => String::new(),
        _ if reaches.is_empty() => format!("history has nothing yet{}", why(&of.begins_there)),
        _ => format!("history has {}{}", reaches.join(", "), why(&of.begins_there)),
    }
}

/// All subscribers, or the worst of many; `all`: all in any case.
pub(super) fn table(found: &Overview, width: Option<usize>, all: bool) -> String {
    let mut out = preface(found);
    let summary = if all { None } else { Summary::of(&found.subscribers) };
    // Writing to a string cannot fail.
    let mut line = |text: &str| writeln!(out, "{}", text.trim_end()).unwrap_or_default();
    let shown = match &summary {
        None => found.subscribers.iter().collect(),
        Some(summary) => summary.worst.clone(),
    };
    let rows: Vec<Row> =
        std::iter::once(COLUMNS.map(str::to_owned)).chain(shown.iter().map(|s| row(s))).collect();
    if let Some(Summary { states, events, retries, dead, delivered_per_s, worst }) = &summary {
        let waiting = format!(
            "{} {} or are in hand, {} {}, {} {}, {delivered_per_s:.1}/s delivered",
            grouped(*events),
            agreed(events, "event(s) wait"),
            grouped(*retries),
            agreed(retries, "batch(es) to retry"),
            grouped(*dead),
            agreed(dead, "dead letter(s)"),
        );
        let all = grouped(found.subscribers.len() as u64);
        for text in [
            format!("{all} subscribers: {}", states_of(states)),
            waiting,
            String::new(),
            format!(
                "The {} in the worst state (--all shows each, --json has all of it):",
                worst.len()
            ),
            String::new(),
        ] {
            line(&width.map_or_else(|| text.clone(), |width| wrapped(&text, width)));
        }
    }
    let fit = Fit::of(&rows, width);
    // A long reason would push the figures off the screen; it is printed below.
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
    if found.subscribers.is_empty() {
        line("no subscriber is configured");
    }
    let remembered = found.history.as_ref().map(history).filter(|text| !text.is_empty());
    if let Some(text) = remembered {
        line(&wrapped(&format!("\n{text}"), width.unwrap_or(usize::MAX)));
    }
    // An inspection of many queues, or of a broker that is away, takes time.
    let age = found.queue.looked_at.map(|at| at.ago(clock::now()));
    if let Some(age) = age.filter(|age| *age >= OLD) {
        line(&format!(
            "\nBACKLOG and DEAD are from {} ago: the queues have not been inspected since.",
            rounded(age)
        ));
    }
    for r in &found.removed {
        let name = visible(&r.subscriber);
        line(&format!(
            "\n`{name}` is not configured any more; there are left {}, {}, {} (hooktrail prune {name})",
            counted(r.events, "event(s)"),
            counted(r.retries, "batch(es) to retry"),
            counted(r.dead, "dead letter(s)")
        ));
    }
    if let Some(orphans) = found.queue.orphans.filter(|n| *n > 0) {
        line(&format!(
            "\n{}: what came and is no event, or retries whose queue was gone (hooktrail dead list @log)",
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

/// The most columns of a state in the table.
const STATE_WIDTH: usize = 50;

/// The fewest columns of a state, before figures are left out.
const STATE_LEAST: usize = 20;

/// The fewest columns of a name, before figures are left out.
const NAME_LEAST: usize = 24;

/// The columns that are left out of a table that is too wide, in this order.
const LEFT_OUT: [&str; 7] =
    ["P99", "P50", "SUCCESS", "IN HAND", "DELIVERED/S", "NEXT DUE", "OLDEST"];

/// The layout of the table in the available width.
struct Fit {
    /// The width of each column; 0 if it is left out.
    widths: [usize; COLUMNS.len()],
    left_out: Vec<&'static str>,
    /// Whether long names are cut, which needs that all differ afterwards.
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
                // Cut, it would equal another name.
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

/// Shortens a text to `width` columns, at least 3, in its middle: names differ at their ends.
fn shortened(text: &str, width: usize) -> String {
    let count = text.chars().count();
    if count <= width {
        return text.to_owned();
    }
    let (head, tail) = (width / 2, width - width / 2 - 1);
    text.chars().take(head).chain(['…']).chain(text.chars().skip(count - tail)).collect()
}

/// The age from which figures of the queues are shown with their age.
const OLD: Duration = Duration::from_secs(3);

const NUMBERS: [&str; 9] =
    ["BACKLOG", "IN HAND", "IN RETRY", "DEAD", "DELIVERED/S", "SUCCESS", "P50", "P99", "OLDEST"];

fn row(s: &Subscriber) -> Row {
    let lane = s.lane.as_ref();
    let none = || "-".to_owned();
    let number = |n: Option<u64>| n.map_or_else(none, |n| n.to_string());
    let age = lane.and_then(|l| l.oldest_event_age_s).map_or_else(none, seconds);
    // It is known to the millisecond.
    let short = |s: f64| if s < 0.001 { "<1ms".to_owned() } else { seconds(s) };
    let took = |of: fn(&Lane) -> Option<f64>| lane.and_then(of).map_or_else(none, short);
    let share = |n: f64| format!("{:.1}%", n * 100.0);
    [
        visible(&s.subscriber),
        state(s),
        number(lane.and_then(|l| l.backlog)),
        number(lane.map(|l| l.in_hand)),
        number(lane.and_then(|l| l.in_retry)),
        lane.and_then(|l| l.next_retry_at).map_or_else(none, until),
        number(lane.and_then(|l| l.dead)),
        lane.map_or_else(none, |l| format!("{:.1}", l.delivered_per_s)),
        lane.and_then(|l| l.success_rate).map_or_else(none, share),
        took(|l| l.p50_s),
        took(|l| l.p99_s),
        age,
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admin::view::words::subscriber;
    use serde_json::{Value, json};

    /// An overview from JSON, the figures of lanes filled in.
    fn overview(mut value: Value) -> Overview {
        let Value::Object(all) = &mut value else { unreachable!("an object") };
        let subscribers = all.remove("subscribers");
        let mut found: Overview = serde_json::from_value(value).expect("an overview");
        found.subscribers = subscribers
            .iter()
            .flat_map(|s| s.as_array().into_iter().flatten())
            .cloned()
            .map(subscriber)
            .collect();
        found
    }

    #[test]
    fn the_table_says_what_is_wrong_and_drives_no_terminal() {
        let found = overview(json!({
            "phase": "draining",
            "config": { "file": "h.toml", "problem": "h.toml:3:1: x: is wrong\nanother \u{1b}[2J", "held": { "subscribers": ["x"], "why": "2 of 2 (x)" } },
            "queue": { "up": false, "error": null, "orphans": 2, "looked_at": "2020-01-01T00:00:00Z" },
            "subscribers": [
                { "subscriber": "a", "state": "ok", "backlog": 3, "in_hand": 1, "in_retry": 0, "next_retry_at": null, "dead": 0,
                  "delivered_per_s": 12.34, "success_rate": 0.995, "p50_s": 0.012, "p99_s": 61.0, "oldest_event_age_s": 3700.5 },
                { "subscriber": "q", "state": "ok", "delivered_per_s": 1.0, "success_rate": 1.0, "p50_s": 0.0, "p99_s": 0.001 },
                { "subscriber": "b", "state": "paused", "paused": { "why": "410 \u{1b}[31m", "by": "receiver", "since": "2020-01-01T00:00:00Z" } },
                { "subscriber": "c", "state": "retrying", "last_error": { "at": "2020-01-01T00:00:00Z", "failure": "status", "status": 503, "cause": null } },
                { "subscriber": "d", "state": "circuit_open", "circuit": { "state": "open", "until": "2020-01-01T00:00:00Z" },
                  "last_error": { "at": "2020-01-01T00:00:00Z", "failure": "connect", "status": null, "cause": "refused" } },
                { "subscriber": "e", "state": "starting" },
                { "subscriber": "h", "state": "waiting", "waiting_since": clock::rfc3339(clock::now() - Duration::from_secs(18)) },
                { "subscriber": "g", "state": "paused", "paused": { "why": "they are migrating to another region this week", "by": "operator", "since": "2020-01-01T00:00:00Z" } },
                { "subscriber": "f", "state": "retrying", "in_hand": 0, "in_retry": 0, "last_error": { "at": "2020-01-01T00:00:00Z", "failure": "timeout" } },
            ],
            "removed": [{ "subscriber": "gone", "events": 5, "retries": 0, "dead": 1 }],
        }));
        let shown = table(&found, None, false);
        for part in [
            "h.toml:3:1: x: is wrong\nanother \\u{1b}[2J",
            "wait for an operator: 2 of 2 (x)",
            "The daemon is draining.",
            "The queue cannot be used",
            "a           ok",
            "12.3    99.5%  12ms  1m 1s",
            "1.0   100.0%  <1ms    1ms",
            "1h 2m",
            "paused by receiver: 410 \\u{1b}[31m",
            "waiting for an answer, ",
            "retrying (status 503)",
            "circuit open, probe now (connect: refused)",
            "e           starting",
            "last attempt failed (timeout)",
            "g           paused by operator: they are migrating to another… ",
            "\n`g`: paused by operator: they are migrating to another region this week\n",
            "BACKLOG and DEAD are from ",
            "`gone` is not configured any more; there are left 5 events",
            "2 orphans",
        ] {
            assert!(shown.contains(part), "{part:?} is not in:\n{shown}");
        }
        assert!(!shown.contains('\u{1b}'));
        assert!(
            table(&overview(json!({ "phase": "running", "queue": { "up": true } })), None, false)
                .contains("no subscriber is configured")
        );
    }

    #[test]
    fn the_table_fits_the_terminal_and_a_long_name_is_cut_in_its_middle() {
        let long = "a-subscriber-with-a-name-that-is-as-long-as-a-name-may-be-64-xxx";
        let one = |name: &str, state: &str| {
            json!({ "subscriber": name, "state": state, "backlog": 123_456, "in_hand": 500, "in_retry": 12, "dead": 1234,
                "next_retry_at": "2020-01-01T00:00:00Z", "delivered_per_s": 1234.5, "success_rate": 0.995, "p50_s": 0.012, "p99_s": 61.0,
                "oldest_event_age_s": 3700.5, "last_error": { "at": "2020-01-01T00:00:00Z", "failure": "connect", "status": null, "cause": "Connection refused (os error 111)" } })
        };
        let found = overview(json!({ "phase": "running", "queue": { "up": true },
            "subscribers": [one("siem", "ok"), one(long, "retrying"), one("crm", "retrying")] }));
        for width in [60, 80, 100, 120, 140, 200] {
            let shown = table(&found, Some(width), false);
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
        let narrow = table(&found, Some(80), false);
        assert!(
            narrow.contains("a-subscriber…") && narrow.contains("(not shown, for the width: P99,"),
            "{narrow}"
        );
        assert!(
            narrow.contains("OLDEST")
                && narrow.contains("whole names, which `hooktrail status --json` has"),
            "{narrow}"
        );
        for wide in [table(&found, Some(200), false), table(&found, None, false)] {
            assert!(!wide.contains("not shown") && wide.contains(&format!("\n{long}  ")), "{wide}");
        }
        // Two names that differ only in the middle are not cut.
        let [one, other] = ["1", "2"].map(|n| format!("{}{n}{}", "a".repeat(30), "b".repeat(30)));
        let found = overview(json!({ "phase": "running", "queue": { "up": true },
            "subscribers": [{ "subscriber": one, "state": "ok" }, { "subscriber": other, "state": "ok" }] }));
        let shown = table(&found, Some(80), false);
        assert!(
            shown.contains(&format!("\n{one}\n"))
                && shown.contains(&format!("\n{other}\n"))
                && !shown.contains('…'),
            "{shown}"
        );
    }

    #[test]
    fn of_many_subscribers_the_worst_are_shown_below_the_sums_of_all() {
        let one = |n: usize| {
            let state = if n == 77 { "circuit_open" } else { "ok" };
            json!({ "subscriber": format!("s{n}"), "state": state, "backlog": 10, "in_retry": 1, "dead": 0, "delivered_per_s": 2.0 })
        };
        let all: Vec<Value> = (0..1200).map(one).collect();
        let found =
            overview(json!({ "phase": "running", "queue": { "up": true }, "subscribers": all }));
        let shown = table(&found, None, false);
        for part in [
            "1,200 subscribers: 1 circuit open, 1,199 ok\n",
            "12,000 events wait or are in hand, 1,200 batches to retry, 0 dead letters, 2400.0/s delivered\n",
            "The 20 in the worst state (--all shows each, --json has all of it):\n\nSUBSCRIBER",
            "\ns77 ",
        ] {
            assert!(shown.contains(part), "{part}: {shown}");
        }
        let narrow = table(&found, Some(60), false);
        let (first, _) = narrow.split_once("\n\n").expect("a paragraph");
        assert_eq!(
            first,
            "1,200 subscribers: 1 circuit open, 1,199 ok\n12,000 events wait or are in hand, 1,200 batches to retry, 0\n  dead letters, 2400.0/s delivered"
        );
        let rows = |shown: &str| shown.lines().filter(|l| l.starts_with('s')).count();
        assert_eq!((rows(&shown), rows(&table(&found, None, true))), (20, 1200));
    }
}

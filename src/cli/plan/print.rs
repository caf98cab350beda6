//! A plan for people.

use super::forecast::{
    Attempt, Bounds, Course, Last, Limit, MAX_RAMP, Plan, footprint, limit, open_times,
};
use crate::{
    cli::{
        daemon::{ReloadPreview, listed},
        terminal::wrapped,
        text::{grouped, rounded, rounded_size, visible},
    },
    config::{Auth, Config},
    policy::{circuit_breaker::BreakerPolicy, rate::RateOf, retry::Exhausted},
    queue::{CONSUMER_TIMEOUT, amqp::Footprint},
    wording::{agreed, counted},
};

/// Rows of a timeline that is shown whole; a longer one is shown without its middle.
const WHOLE: u32 = 20;

pub(super) fn as_text(
    config: &Config,
    plans: &[Plan<'_>],
    preview: &ReloadPreview,
    width: usize,
) -> String {
    let mut out = String::new();
    let mut line = |text: String| {
        out.push_str(&wrapped(&text, width));
        out.push('\n');
    };
    if plans.is_empty() {
        line(format!("{}: no [[subscriber]]; nothing would be delivered", config.path.display()));
    }
    for plan in plans {
        subscriber_as_text(plan, &mut line);
        line(String::new());
    }
    if plans.len() > 1 {
        let sum = |of: fn(&Bounds) -> u64| rounded_size(plans.iter().map(|p| of(&p.bounds)).sum());
        let requests: usize = plans.iter().map(|p| p.bounds.requests).sum();
        line(format!(
            "all {} subscribers together: {requests} requests open at once; memory for events: {} with full batches, {} at worst",
            plans.len(),
            sum(|b| b.usual),
            sum(|b| b.worst)
        ));
        line(String::new());
    }
    if let Some(footprint) = footprint(config).filter(|footprint| footprint.queues > 0) {
        line(in_the_broker(footprint, config.subscribers.len()));
        line(String::new());
    }
    preview_as_text(preview, &mut line);
    out
}

fn in_the_broker(
    Footprint { queues, shared, descriptors, connections }: Footprint,
    subscribers: usize,
) -> String {
    if queues == shared {
        // They come through it into the embedded queue.
        return format!(
            "in RabbitMQ: {}, whatever the number of subscribers, which takes about {} file descriptors of each node; and {} of each daemon",
            counted(queues, "queue(s)"),
            grouped(descriptors as u64),
            counted(connections, "connection(s)")
        );
    }
    format!(
        "in RabbitMQ: {} (3 for each of {}, {} for all), which take about {} file descriptors of each node; and {} of each daemon",
        counted(queues, "queue(s)"),
        counted(subscribers, "subscriber(s)"),
        grouped(shared as u64),
        grouped(descriptors as u64),
        counted(connections, "connection(s)")
    )
}

fn subscriber_as_text(plan: &Plan<'_>, line: &mut dyn FnMut(String)) {
    let Plan { subscriber: s, ladder, courses: [middle, ..], bounds } = plan;
    line(format!("{}: a batch that fails each time", s.name));
    if s.paused {
        line("  (paused = true: nothing is attempted before that is taken out)".to_owned());
    }
    line(format!("  {:>7}  {:<28}  {:>15}", "attempt", "after", "since the first"));
    let mut before = 0;
    for number in middle.rows(WHOLE) {
        if number != before + 1 {
            line(format!("  {:>7}", "…"));
        }
        before = number;
        let a = middle.attempt(number);
        let after = if number == 1 { String::new() } else { interval(middle, &a) };
        // Lines of a table are not wrapped.
        line(format!("  {:>7}  {after:<28}  {:>15}", grouped(number), rounded(a.since_first)));
    }
    if *ladder {
        line(
            "  (in the queues of RabbitMQ a retry waits up to 1 s and 12.5 % longer than [retry] says; that is in these times)".to_owned(),
        );
    }
    line(format!("  {}", ending(plan)));
    if let Some(end) = middle.end().filter(|end| end.number > 1) {
        let longest = s.longest_attempt();
        line(format!(
            "  each attempt itself can take up to {} more (http.timeout, after a wait for a place on a connection{}), all of them together {}",
            rounded(longest),
            if matches!(s.auth, Some(Auth::OAuth2(_))) {
                ", twice with a token of auth.oauth2"
            } else {
                ""
            },
            rounded(longest.saturating_mul(end.number))
        ));
    }
    line(format!("  {}", circuit(&s.circuit_breaker)));
    line(format!("  requests open at once: {} (http.concurrency)", bounds.requests));
    if s.in_order {
        line(
            "  order: strict; a batch that fails holds all that follows it until it is accepted"
                .to_owned(),
        );
    }
    if let Some(rate) = s.http.rate {
        let (what, at_once) = match rate.of {
            RateOf::Requests => ("requests", "after a pause a second's worth at once"),
            RateOf::Events => ("events", "and no batch has more than a second's worth"),
        };
        line(format!(
            "  rate: at most {rate} {what} (http.rate), {at_once}. Each daemon counts alone: two of them send twice as much"
        ));
    }
    let larger = if *ladder {
        "; RabbitMQ counts messages: when much larger ones come suddenly, it is more until they are known"
    } else {
        ""
    };
    line(format!(
        "  memory: {} with full batches. It takes up to {} {} and {} {} at once: {} if each is as large as a body may be \
         (batch.max_bytes = {}). Of events it takes no more than 64 MiB, or 16 if those are larger{larger}",
        rounded_size(bounds.usual),
        grouped(bounds.window.events),
        agreed(&bounds.window.events, "event(s)"),
        grouped(bounds.window.envelopes),
        agreed(&bounds.window.envelopes, "failed batch(es)"),
        rounded_size(bounds.worst),
        rounded_size(s.batch.max_bytes as u64),
    ));
    if *ladder {
        line(format!("  {}", hold(bounds)));
    }
}

/// The longest time that a message can stay unacked in RabbitMQ, and what follows if that is too
/// long.
fn hold(bounds: &Bounds) -> String {
    let (longest, allowed) = (rounded(bounds.hold), rounded(CONSUMER_TIMEOUT));
    let held = format!(
        "hold: with full batches a message waits at most {longest} for its ack, when each attempt takes as long as it may. \
         RabbitMQ's consumer_timeout is {allowed}, unless it was changed"
    );
    match bounds.fewest {
        0 | 1 => held,
        fewest => format!(
            "{held}. With fewer than {} events in each batch, and attempts that slow, it can wait for longer: then RabbitMQ closes the \
             channel, and delivers what it held again",
            grouped(fewest as u64)
        ),
    }
}

/// The delay before an attempt, with the range of its jitter.
fn interval(course: &Course<'_>, attempt: &Attempt) -> String {
    let (shortest, longest) = course.spread(attempt.number);
    if shortest == longest {
        rounded(attempt.after)
    } else {
        format!("{} ({} to {})", rounded(attempt.after), rounded(shortest), rounded(longest))
    }
}

/// The end of the attempts: what follows, when, and by which limit.
fn ending(plan: &Plan<'_>) -> String {
    let retry = plan.subscriber.retry.options();
    let what = match retry.on_exhausted {
        Exhausted::DeadLetter => "then it becomes a dead letter (reason `exhausted`)".to_owned(),
        Exhausted::Pause => {
            format!(
                "then the batch is kept and the subscriber paused, until `hooktrail resume {}`",
                plan.subscriber.name
            )
        }
    };
    let [middle, shortest, longest] = &plan.courses;
    match (middle.last, middle.end()) {
        (Last::Number(number), Some(end)) => {
            let why = match limit(&retry, number) {
                Limit::Attempts => format!("retry.max_attempts = {} is reached", grouped(retry.max_attempts)),
                Limit::Elapsed => {
                    format!("another would come later than retry.max_elapsed_time = {}", rounded(retry.max_elapsed_time))
                }
            };
            let range = match (shortest.end(), longest.end()) {
                (Some(a), Some(b)) if a != b => {
                    let (first, last) = (a.since_first.min(b.since_first), a.since_first.max(b.since_first));
                    let numbers = if a.number == b.number {
                        String::new()
                    } else {
                        format!(", with {} to {} attempts", grouped(a.number.min(b.number)), grouped(a.number.max(b.number)))
                    };
                    format!(" ({} to {} by the jitter{numbers})", rounded(first), rounded(last))
                }
                _ => String::new(),
            };
            format!("{what}, {} after the first attempt{range}: {why}", rounded(end.since_first))
        }
        (Last::Beyond, _) => format!("… and so on; where the interval grows so slowly, only {} attempts are computed", grouped(MAX_RAMP)),
        _ => "and so on indefinitely: neither retry.max_attempts nor retry.max_elapsed_time is set, so no batch is given up".to_owned(),
    }
}

fn circuit(policy: &BreakerPolicy) -> String {
    let times = open_times(policy);
    let (Some(first), Some(last)) = (times.first(), times.last()) else {
        return "circuit: never opens (circuit_breaker.failures = 0)".to_owned();
    };
    let longer = if first == last {
        "If that fails too, it stays open as long again".to_owned()
    } else {
        format!("If that fails too, it stays open for twice as long, up to {}", rounded(*last))
    };
    format!(
        "circuit: opens after {} {} in a row. Then nothing is sent for {}, and after that one batch is tried. {longer}. Meanwhile \
         batches that are due wait, on top of the times above; none is given up while it waits",
        grouped(policy.failures),
        agreed(&policy.failures, "failed attempt(s)"),
        rounded(*first)
    )
}

fn preview_as_text(preview: &ReloadPreview, line: &mut dyn FnMut(String)) {
    match preview {
        ReloadPreview::Unknown { why } => {
            line(format!("the effect of a reload is not known: {why}"))
        }
        ReloadPreview::Refused { address, error } => {
            line(format!("the daemon at {address} would refuse a reload of its configuration:"));
            error.lines().for_each(|l| line(format!("  {}", visible(l))));
        }
        ReloadPreview::Changes { address, answer } => {
            let (changes, restart) =
                (&answer.read.changes.changes, &answer.read.changes.needs_restart);
            if changes.is_empty() && restart.is_empty() {
                return line(format!("a reload of the daemon at {address} would change nothing"));
            }
            line(format!("a reload of the daemon at {address} would change:"));
            for change in changes {
                let keys = listed(&change.keys);
                let keys = if keys.is_empty() { keys } else { format!(": {keys}") };
                let (name, what) = (visible(&change.subscriber), visible(&change.change));
                line(format!("  {name}: {what}{keys}"));
            }
            if !restart.is_empty() {
                line(format!("  only a restart changes: {}", listed(restart)));
            }
            if answer.read.waits_for_operator {
                line(
                    "  (it removes all subscribers, or more than half of them: the changed file alone does not do that, `hooktrail reload` or \
                     SIGHUP does)"
                        .to_owned(),
                );
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        cli::daemon::Answer,
        config::{Backend, testing},
        queue::amqp,
    };
    use serde_json::json;

    fn loaded(more: &str, subscriber: &str) -> Config {
        testing::config(&format!("{more}\n{}", testing::table("a", subscriber)))
    }

    const AMQP: &str = "[queue]\nurl = \"amqp://127.0.0.1\"";
    const EMBEDDED: &str = "[queue]\nurl = \"embedded\"";

    /// The text with one space between two words.
    fn text(config: &Config) -> String {
        plain(config).split_whitespace().collect::<Vec<_>>().join(" ")
    }

    fn plain(config: &Config) -> String {
        let ladder = matches!(config.queue.backend, Backend::Amqp(_));
        let plans: Vec<Plan<'_>> =
            config.subscribers.iter().map(|s| Plan::new(s, ladder)).collect();
        as_text(
            config,
            &plans,
            &ReloadPreview::Unknown { why: "no daemon was asked".to_owned() },
            80,
        )
    }

    #[test]
    fn the_default_timeline_ends_about_47_hours_after_the_first_attempt() {
        let config = loaded(AMQP, "");
        let plan = Plan::new(&config.subscribers[0], true);
        let end = plan.courses[0].end().expect("it ends");
        assert_eq!(end.number, 16);
        let hours = end.since_first.as_secs_f64() / 3600.0;
        assert!((46.5..47.5).contains(&hours), "{hours}");
        let shown = plain(&config);
        assert!(shown.lines().all(|l| l.chars().count() <= 80), "{shown}");
        let text = text(&config);
        for part in [
            " 2 5s (4s to 6s) 5s 3 15s ",
            " 16 6h 1m (4h 48m to 6h 1m) 46h 38m (in the queues of RabbitMQ ",
            "then it becomes a dead letter (reason `exhausted`), 46h 38m after the first attempt (37h 16m to 47h 36m by the jitter): retry.max_attempts = 16 is reached",
            "opens after 5 failed attempts in a row. Then nothing is sent for 30s, and after that one batch is tried. If that fails too, it stays open for twice as long, up to 10m.",
            "memory: 5.0 MiB with full batches. It takes up to 2,000 events and 1 failed batch at once: 65.0 MiB if each",
            "with full batches a message waits at most 4m 9s",
            "With fewer than 69 events in each batch",
            "consumer_timeout is 30m",
            "is not known: no daemon was asked",
        ] {
            assert!(text.contains(part), "`{part}` is not in\n{text}");
        }
        assert!(!text.contains('…'), "16 attempts are shown whole:\n{text}");
    }

    #[test]
    fn what_it_needs_of_the_broker_is_shown() {
        let one = text(&loaded(AMQP, ""));
        assert!(
            one.contains("in RabbitMQ: 25 queues (3 for each of 1 subscriber, 22 for all), which take about 75 file descriptors"),
            "{one}"
        );
        assert!(one.contains("5 connections of each daemon"), "{one}");
        let footprint = amqp::footprint(300, true, true);
        assert_eq!(
            (footprint.queues, footprint.descriptors, footprint.connections),
            (922, 2766, 12)
        );
        assert!(!text(&loaded(EMBEDDED, "")).contains("RabbitMQ: "));
        let through = format!("{EMBEDDED}\nintake = \"amqp://127.0.0.1\"");
        let before = text(&loaded(&through, ""));
        assert!(
            before.contains("in RabbitMQ: 1 queue, whatever the number of subscribers, which takes about 3 file descriptors of each node; and 1 connection of each daemon"),
            "{before}"
        );
        let of_another = format!("{through}\nsource_queue = \"q\"");
        assert!(!text(&loaded(&of_another, "")).contains("RabbitMQ: "));
    }

    #[test]
    fn with_the_embedded_queue_there_is_no_ladder_and_no_rounding() {
        let config = loaded(
            EMBEDDED,
            "retry = { initial_interval = \"405s\", multiplier = 1, randomization_factor = 0 }",
        );
        let embedded = text(&config);
        assert!(!embedded.contains("RabbitMQ") && embedded.contains("2 6m 45s "), "{embedded}");
        let amqp = text(&loaded(
            AMQP,
            "retry = { initial_interval = \"405s\", multiplier = 1, randomization_factor = 0 }",
        ));
        assert!(
            !amqp.contains("hops") && amqp.contains("2 6m 48s ") && amqp.contains("12.5 %"),
            "{amqp}"
        );
    }

    #[test]
    fn an_endless_timeline_or_with_very_many_attempts_is_shown_without_its_middle() {
        let endless =
            plain(&loaded(EMBEDDED, "retry = { max_attempts = 0, max_elapsed_time = \"0s\" }"));
        assert!(
            endless.contains("and so on indefinitely") && endless.lines().count() < 40,
            "{endless}"
        );
        let config = loaded(
            EMBEDDED,
            "retry = { max_attempts = 1000000, max_elapsed_time = \"0s\", randomization_factor = 0 }",
        );
        let long = text(&config);
        let years = Plan::new(&config.subscribers[0], false).courses[0]
            .end()
            .expect("an end")
            .since_first
            .as_secs()
            / (365 * 86_400);
        assert_eq!(years, 684);
        assert!(long.contains(" … 999,998 6h 24999"), "{long}");
        assert!(plain(&config).lines().count() < 40, "{long}");
        let slow = text(&loaded(
            EMBEDDED,
            "retry = { max_attempts = 0, max_elapsed_time = \"0s\", multiplier = 1.00001 }",
        ));
        assert!(slow.contains("only 2,000 attempts are computed"), "{slow}");
    }

    #[test]
    fn the_limit_that_is_reached_first_is_named() {
        let elapsed = text(&loaded(
            EMBEDDED,
            "retry = { max_attempts = 0, max_elapsed_time = \"1h\", multiplier = 1, initial_interval = \"10m\" }",
        ));
        assert!(
            elapsed.contains("1h after the first attempt (56m to 1h by the jitter, with 6 to 8 attempts): another would come later than retry.max_elapsed_time = 1h"),
            "{elapsed}"
        );
        let pause = text(&loaded(EMBEDDED, "preset = \"mailtrap\""));
        assert!(
            pause.contains(
                "the subscriber paused, until `hooktrail resume a`, 3h 20m after the first attempt: retry.max_attempts = 41 is reached"
            ),
            "{pause}"
        );
        assert!(pause.contains("circuit: never opens"), "{pause}");
    }

    #[test]
    fn what_a_reload_would_change_is_shown_key_by_key() {
        let answer = json!({
            "changes": [
                { "subscriber": "a", "change": "changed", "keys": ["retry.max_interval", "secrets"] },
                { "subscriber": "b\u{1b}[2J", "change": "added", "keys": [] },
            ],
            "needs_restart": ["queue.url"],
        });
        let address = ([127, 0, 0, 1], 8787).into();
        let answered = |raw: serde_json::Value| Answer {
            read: serde_json::from_value(raw.clone()).expect("an answer"),
            raw,
        };
        let shown = |preview| {
            let mut out = String::new();
            preview_as_text(&preview, &mut |l| out += &(l + "\n"));
            out
        };
        let text = shown(ReloadPreview::Changes { address, answer: answered(answer) });
        assert_eq!(
            text,
            "a reload of the daemon at 127.0.0.1:8787 would change:\n  a: changed: retry.max_interval, secrets\n  b\\u{1b}[2J: added\n  only a restart changes: queue.url\n"
        );
        let many = json!({ "changes": [{ "subscriber": "a", "change": "removed", "keys": [] }], "waits_for_operator": true });
        let text = shown(ReloadPreview::Changes { address, answer: answered(many) });
        assert!(text.contains("  a: removed\n  (it removes all subscribers, or more than half of them: the changed file alone"), "{text}");
        let nothing = shown(ReloadPreview::Changes {
            address,
            answer: answered(json!({ "changes": [], "needs_restart": [] })),
        });
        assert_eq!(nothing, "a reload of the daemon at 127.0.0.1:8787 would change nothing\n");
    }
}

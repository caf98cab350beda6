//! `plan`: what a configuration would do. Computed by the policies that the daemon works by, not
//! tried.

use std::time::{Duration, SystemTime};

use bytesize::ByteSize;
use serde_json::{Value, json};

use super::{
    complete,
    daemon::{self, Foreseen},
    failed::Failed,
    open::find,
    terminal::{self, wrapped},
    text::visible,
};
use crate::{
    clock,
    config::{Backend, Config, Intake, Subscriber},
    policy::{
        circuit_breaker::{Begun, BreakerPolicy, Change, CircuitBreaker},
        retry::{Exhausted, Next, RetryOptions, RetryPolicy},
    },
    queue::{
        FEWEST, MOST_BYTES, Window,
        amqp::{self, CONSUMER_TIMEOUT, Footprint, Hold},
    },
    wording::{agreed, counted},
};

/// An interval that still grows after so many attempts is not followed further.
const MAX_RAMP: u32 = 2000;

/// A longer timeline is shown without its middle.
const WHOLE: u32 = 20;
const HEAD: u32 = 12;
const TAIL: u32 = 3;

/// No more rows than this go into JSON.
const MAX_ROWS: u32 = 1000;

/// When all first attempts are made; a plan knows no other time.
const FIRST: SystemTime = SystemTime::UNIX_EPOCH;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Only this subscriber; left out: all
    #[arg(add = complete::subscribers())]
    subscriber: Option<String>,
    /// As one JSON object
    #[arg(long)]
    json: bool,
}

pub(super) async fn run(config: &Config, args: &Args) -> Result<(), Failed> {
    let subscribers: Vec<&Subscriber> = match &args.subscriber {
        Some(name) => vec![find(config, name)?],
        None => config.subscribers.iter().map(AsRef::as_ref).collect(),
    };
    let ladder = matches!(config.queue.backend, Backend::Amqp(_));
    let plans: Vec<Plan<'_>> = subscribers.into_iter().map(|s| Plan::new(s, ladder)).collect();
    let foreseen = daemon::foresee_reload(config).await?;
    if args.json {
        println!("{:#}", as_json(config, &plans, &foreseen));
    } else {
        print!(
            "{}",
            as_text(config, &plans, &foreseen, terminal::width().unwrap_or(terminal::USUAL))
        );
    }
    match foreseen {
        Foreseen::Refused { .. } => Err(Failed::Runtime(
            "the daemon would refuse a reload; it goes on with what it has until the file is right"
                .to_owned(),
        )),
        Foreseen::Unknown { .. } | Foreseen::Changes { .. } => Ok(()),
    }
}

/// What becomes of a subscriber's batches, and what they can cost.
struct Plan<'c> {
    subscriber: &'c Subscriber,
    /// Retries wait in RabbitMQ's delay ladder.
    ladder: bool,
    /// Its jitter in the middle, at its shortest, at its longest.
    courses: [Course<'c>; 3],
    bounds: Bounds,
}

impl<'c> Plan<'c> {
    fn new(subscriber: &'c Subscriber, ladder: bool) -> Self {
        let hold = if ladder { amqp::hold } else { |delay| Hold { delay, hops: 0 } };
        let courses = [0.5, 0.0, 1.0].map(|random| Course::new(&subscriber.retry, hold, random));
        Self { subscriber, ladder, courses, bounds: Bounds::new(subscriber) }
    }
}

/// The attempts of a batch that fails each time and at once, with the same draw for each jitter.
struct Course<'c> {
    policy: &'c RetryPolicy,
    hold: fn(Duration) -> Hold,
    random: f64,
    /// The first attempt and on, until the interval grows no more; then the last one repeats
    /// itself.
    ramp: Vec<Attempt>,
    last: Last,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Attempt {
    number: u32,
    /// Since the attempt before it.
    after: Duration,
    hops: u32,
    since_first: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Last {
    Number(u32),
    Never,
    /// Its interval still grows where the computing ends.
    Beyond,
}

impl<'c> Course<'c> {
    fn new(policy: &'c RetryPolicy, hold: fn(Duration) -> Hold, random: f64) -> Self {
        let first =
            Attempt { number: 1, after: Duration::ZERO, hops: 0, since_first: Duration::ZERO };
        let mut course = Self { policy, hold, random, ramp: vec![first], last: Last::Beyond };
        for number in 1..MAX_RAMP {
            let Some(next) = course.following(number) else {
                course.last = Last::Number(number);
                break;
            };
            course.ramp.push(next);
            if policy.interval(number) == policy.interval(number + 1) {
                course.last = course.last_of_the_steady();
                break;
            }
        }
        course
    }

    /// An attempt, if those before it leave one to be made.
    fn attempt(&self, number: u32) -> Attempt {
        let known = number.min(u32::try_from(self.ramp.len()).unwrap_or(u32::MAX));
        let attempt = self.ramp[known as usize - 1];
        let more = attempt.after.saturating_mul(number - known);
        Attempt { number, since_first: attempt.since_first.saturating_add(more), ..attempt }
    }

    /// What follows the failure of an attempt.
    fn following(&self, number: u32) -> Option<Attempt> {
        let at = self.attempt(number).since_first;
        match self.policy.next(number, FIRST, FIRST + at, None, self.random) {
            Next::Exhausted => None,
            Next::After(delay) => {
                let Hold { delay, hops } = (self.hold)(delay);
                Some(Attempt { number: number + 1, after: delay, hops, since_first: at + delay })
            }
        }
    }

    /// Once the interval is always the same, an attempt that is not made is followed by none.
    fn last_of_the_steady(&self) -> Last {
        let (mut made, mut not_made) =
            (u32::try_from(self.ramp.len()).unwrap_or(u32::MAX), u32::MAX);
        if self.following(not_made - 1).is_some() {
            return Last::Never;
        }
        while not_made - made > 1 {
            let middle = made + (not_made - made) / 2;
            if self.following(middle - 1).is_some() {
                made = middle;
            } else {
                not_made = middle;
            }
        }
        Last::Number(made)
    }

    /// The last attempt there is, if it is known.
    fn end(&self) -> Option<Attempt> {
        match self.last {
            Last::Number(number) => Some(self.attempt(number)),
            Last::Never | Last::Beyond => None,
        }
    }

    /// The shortest and the longest that jitter makes of the interval before an attempt.
    fn spread(&self, number: u32) -> (Duration, Duration) {
        // Without its limits: they end a schedule, they shorten no interval of it.
        let unlimited = RetryOptions {
            max_attempts: 0,
            max_elapsed_time: Duration::ZERO,
            ..self.policy.options()
        };
        let unlimited = RetryPolicy::try_new(unlimited).unwrap_or_else(|_| self.policy.clone());
        let held = |random| match unlimited.next(number - 1, FIRST, FIRST, None, random) {
            Next::After(delay) => (self.hold)(delay).delay,
            Next::Exhausted => Duration::ZERO,
        };
        (held(0.0), held(1.0))
    }

    /// The numbers of the attempts worth a row, at most `whole` of them if there is an end.
    fn rows(&self, whole: u32) -> Vec<u32> {
        let ramp = u32::try_from(self.ramp.len()).unwrap_or(u32::MAX);
        match self.last {
            Last::Number(n) if n <= whole => (1..=n).collect(),
            Last::Number(n) => (1..=ramp.clamp(TAIL, HEAD.max(whole - whole / 2)))
                .chain(n - TAIL + 1..=n)
                .collect(),
            Last::Never | Last::Beyond => {
                (1..=ramp.saturating_add(1).clamp(TAIL, whole.max(HEAD))).collect()
            }
        }
    }
}

/// What a subscriber can cost the daemon.
struct Bounds {
    window: Window,
    /// Requests open at once.
    requests: usize,
    /// Bytes held while events are so small that batches are full: of each slot the batch that is
    /// under way and the one that fills, and the failed batches that wait.
    usual: u64,
    /// Bytes held when each event is as large as a request body may be.
    worst: u64,
    /// The longest that a message is held without an answer to the queue, with full batches.
    hold: Duration,
    /// With fewer events in a batch than this, and each attempt at its limit, a message could be
    /// held for longer than RabbitMQ allows.
    fewest: usize,
}

impl Bounds {
    fn new(subscriber: &Subscriber) -> Self {
        let window = Window::of(subscriber);
        let (events, envelopes) = (u64::from(window.events), u64::from(window.envelopes));
        let (slots, body) = (subscriber.http.concurrency as u64, subscriber.batch.max_bytes as u64);
        Self {
            window,
            requests: subscriber.http.concurrency,
            usual: (2 * slots).min(events) * body + envelopes * body,
            worst: (events * body).min(MOST_BYTES.max(u64::from(FEWEST) * body)) + envelopes * body,
            hold: window.longest_hold(subscriber, subscriber.batch.max_events),
            fewest: window.fewest_events(subscriber, CONSUMER_TIMEOUT),
        }
    }
}

/// How long a circuit stays open: the first time, after a failed probe, after another, until it is
/// always as long.
fn open_times(policy: &BreakerPolicy) -> Vec<Duration> {
    if policy.failures == 0 {
        return Vec::new();
    }
    let mut breaker = CircuitBreaker::new(BreakerPolicy { failures: 1, ..policy.clone() });
    let (mut now, mut times) = (clock::instant(), Vec::new());
    let first_attempt = Begun { probe: true, first: true };
    while let Some(Change::Opened { open_for, .. } | Change::StillOpen { open_for }) =
        breaker.on_failure(first_attempt, true, now)
    {
        if times.last() == Some(&open_for) {
            break;
        }
        times.push(open_for);
        now += open_for;
        breaker.permit(now);
    }
    times
}

fn as_text(config: &Config, plans: &[Plan<'_>], foreseen: &Foreseen, width: usize) -> String {
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
        let sum = |of: fn(&Bounds) -> u64| size(plans.iter().map(|p| of(&p.bounds)).sum());
        let requests: usize = plans.iter().map(|p| p.bounds.requests).sum();
        line(format!(
            "all {} subscribers together: {requests} requests open at once; memory for events: {} with full batches, {} at worst",
            plans.len(),
            sum(|b| b.usual),
            sum(|b| b.worst)
        ));
        line(String::new());
    }
    if let Some(footprint) = footprint(config) {
        line(in_the_broker(footprint, config.subscribers.len()));
        line(String::new());
    }
    foreseen_as_text(foreseen, &mut line);
    out
}

/// What the whole configuration needs of a RabbitMQ.
fn footprint(config: &Config) -> Option<Footprint> {
    match &config.queue.backend {
        Backend::Amqp(amqp) => Some(amqp::footprint(
            config.subscribers.len(),
            matches!(amqp.intake, Intake::SourceQueue(_)),
        )),
        Backend::Embedded => None,
    }
}

fn in_the_broker(
    Footprint { queues, shared, descriptors, connections }: Footprint,
    subscribers: usize,
) -> String {
    format!(
        "in RabbitMQ: {} (3 for each of {}, {} for all), which take about {} file descriptors of each node; and {} of each daemon",
        counted(queues, "queue(s)"),
        counted(subscribers, "subscriber(s)"),
        grouped_u64(shared as u64),
        grouped_u64(descriptors as u64),
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
        // A table is not broken between its words.
        line(format!("  {:>7}  {after:<28}  {:>15}", grouped(number), span(a.since_first)));
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
            "  each attempt itself can take up to {} more (http.timeout, after a wait for a place on a connection), all of them together {}",
            span(longest),
            span(longest.saturating_mul(end.number))
        ));
    }
    line(format!("  {}", circuit(&s.circuit_breaker)));
    line(format!("  requests open at once: {} (http.concurrency)", bounds.requests));
    let larger = if *ladder {
        "; RabbitMQ counts messages: when much larger ones come suddenly, it is more until they are known"
    } else {
        ""
    };
    line(format!(
        "  memory: {} with full batches. It takes up to {} {} and {} {} at once: {} if each is as large as a body may be \
         (batch.max_bytes = {}). Of events it takes no more than 64 MiB, or 16 if those are larger{larger}",
        size(bounds.usual),
        grouped(bounds.window.events.into()),
        agreed(&bounds.window.events, "event(s)"),
        grouped(bounds.window.envelopes.into()),
        agreed(&bounds.window.envelopes, "failed batch(es)"),
        size(bounds.worst),
        size(s.batch.max_bytes as u64),
    ));
    if *ladder {
        line(format!("  {}", hold(bounds)));
    }
}

/// How long RabbitMQ can have to wait for the answer about a message, and what follows if that is
/// too long.
fn hold(bounds: &Bounds) -> String {
    let (longest, allowed) = (span(bounds.hold), span(CONSUMER_TIMEOUT));
    let held = format!(
        "hold: with full batches a message waits at most {longest} for its ack, when each attempt takes as long as it may. \
         RabbitMQ's consumer_timeout is {allowed}, unless it was changed"
    );
    match bounds.fewest {
        0 | 1 => held,
        fewest => format!(
            "{held}. With fewer than {} events in each batch, and attempts that slow, it can wait for longer: then RabbitMQ closes the \
             channel, and what it held comes again",
            grouped_u64(fewest as u64)
        ),
    }
}

/// The time before an attempt, with the range of its jitter.
fn interval(course: &Course<'_>, attempt: &Attempt) -> String {
    let (shortest, longest) = course.spread(attempt.number);
    if shortest == longest {
        span(attempt.after)
    } else {
        format!("{} ({} to {})", span(attempt.after), span(shortest), span(longest))
    }
}

/// What follows the last attempt, when, and by which limit.
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
                    format!("another would come later than retry.max_elapsed_time = {}", span(retry.max_elapsed_time))
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
                    format!(" ({} to {} by the jitter{numbers})", span(first), span(last))
                }
                _ => String::new(),
            };
            format!("{what}, {} after the first attempt{range}: {why}", span(end.since_first))
        }
        (Last::Beyond, _) => format!("… and so on; where the interval grows so slowly, only {} attempts are computed", grouped(MAX_RAMP)),
        _ => "and so on without end: neither retry.max_attempts nor retry.max_elapsed_time is set, so no batch is given up".to_owned(),
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Limit {
    Attempts,
    Elapsed,
}

/// Which limit makes an attempt the last one.
fn limit(retry: &RetryOptions, last: u32) -> Limit {
    if retry.max_attempts == last { Limit::Attempts } else { Limit::Elapsed }
}

fn circuit(policy: &BreakerPolicy) -> String {
    let times = open_times(policy);
    let (Some(first), Some(last)) = (times.first(), times.last()) else {
        return "circuit: never opens (circuit_breaker.failures = 0)".to_owned();
    };
    let longer = if first == last {
        "If that fails too, it stays open as long again".to_owned()
    } else {
        format!("If that fails too, it stays open for twice as long, up to {}", span(*last))
    };
    format!(
        "circuit: opens after {} {} in a row. Then nothing is sent for {}, and after that one batch is tried. {longer}. Meanwhile \
         batches that are due wait, on top of the times above; none is given up while it waits",
        grouped(policy.failures),
        agreed(&policy.failures, "failed attempt(s)"),
        span(*first)
    )
}

fn foreseen_as_text(foreseen: &Foreseen, line: &mut dyn FnMut(String)) {
    match foreseen {
        Foreseen::Unknown { why } => {
            line(format!("what a reload would change is not known: {why}"))
        }
        Foreseen::Refused { address, error } => {
            line(format!("the daemon at {address} would refuse a reload of its configuration:"));
            error.lines().for_each(|l| line(format!("  {}", visible(l))));
        }
        Foreseen::Changes { address, answer } => {
            let texts = |v: &Value| -> Vec<String> {
                v.as_array().into_iter().flatten().filter_map(Value::as_str).map(visible).collect()
            };
            let changes = answer["changes"].as_array().map(Vec::as_slice).unwrap_or_default();
            let restart = texts(&answer["needs_restart"]);
            if changes.is_empty() && restart.is_empty() {
                return line(format!("a reload of the daemon at {address} would change nothing"));
            }
            line(format!("a reload of the daemon at {address} would change:"));
            for change in changes {
                let text = |key: &str| visible(change[key].as_str().unwrap_or("?"));
                let keys = texts(&change["keys"]);
                let keys =
                    if keys.is_empty() { String::new() } else { format!(": {}", keys.join(", ")) };
                line(format!("  {}: {}{keys}", text("subscriber"), text("change")));
            }
            if !restart.is_empty() {
                line(format!("  only a restart changes: {}", restart.join(", ")));
            }
            if answer["waits_for_operator"] == true {
                line(
                    "  (it removes all subscribers, or more than half of them: the changed file alone does not do that, `hooktrail reload` or \
                     SIGHUP does)"
                        .to_owned(),
                );
            }
        }
    }
}

fn as_json(config: &Config, plans: &[Plan<'_>], foreseen: &Foreseen) -> Value {
    let daemon = match foreseen {
        Foreseen::Unknown { why } => json!({ "reload": null, "why": why }),
        Foreseen::Refused { address, error } => {
            json!({ "address": address.to_string(), "reload": { "error": error } })
        }
        Foreseen::Changes { address, answer } => {
            json!({ "address": address.to_string(), "reload": answer })
        }
    };
    json!({
        "config": config.path.display().to_string(),
        "subscribers": plans.iter().map(subscriber_as_json).collect::<Vec<_>>(),
        "requests_open": plans.iter().map(|p| p.bounds.requests).sum::<usize>(),
        "memory_bytes": {
            "full_batches": plans.iter().map(|p| p.bounds.usual).sum::<u64>(),
            "largest_events": plans.iter().map(|p| p.bounds.worst).sum::<u64>(),
        },
        "rabbitmq": footprint(config).map(|f| json!({
            "queues": f.queues,
            "file_descriptors": f.descriptors,
            "connections": f.connections,
        })),
        "daemon": daemon,
    })
}

fn subscriber_as_json(plan: &Plan<'_>) -> Value {
    let Plan { subscriber: s, ladder, courses: [middle, shortest, longest], bounds } = plan;
    let retry = s.retry.options();
    let attempt = |number: u32| {
        let a = middle.attempt(number);
        let (least, most) =
            if number == 1 { (Duration::ZERO, Duration::ZERO) } else { middle.spread(number) };
        let mut row = json!({
            "attempt": number,
            "after_s": a.after.as_secs_f64(),
            "after_min_s": least.as_secs_f64(),
            "after_max_s": most.as_secs_f64(),
            "since_first_s": a.since_first.as_secs_f64(),
        });
        if *ladder {
            row["hops"] = a.hops.into();
        }
        row
    };
    let ends =
        [shortest.end(), longest.end()].map(|end| end.map(|end| end.since_first.as_secs_f64()));
    let end = middle.end().map(|end| {
        let because = match limit(&retry, end.number) {
            Limit::Attempts => "max_attempts",
            Limit::Elapsed => "max_elapsed_time",
        };
        let at = end.since_first.as_secs_f64();
        json!({
            "attempts": end.number,
            "because": because,
            "then": retry.on_exhausted.name(),
            "since_first_s": at,
            "since_first_min_s": ends.iter().flatten().copied().fold(at, f64::min),
            "since_first_max_s": ends.iter().flatten().copied().fold(at, f64::max),
        })
    });
    json!({
        "name": s.name,
        "paused": s.paused,
        "attempts": middle.rows(MAX_ROWS).into_iter().map(attempt).collect::<Vec<_>>(),
        "end": end,
        "circuit_open_s": open_times(&s.circuit_breaker).iter().map(Duration::as_secs_f64).collect::<Vec<_>>(),
        "requests_open": bounds.requests,
        "taken": { "events": bounds.window.events, "failed_batches": bounds.window.envelopes },
        "memory_bytes": { "full_batches": bounds.usual, "largest_events": bounds.worst },
        "longest_hold_s": bounds.hold.as_secs_f64(),
    })
}

fn size(bytes: u64) -> String {
    ByteSize::b(bytes).display().iec().to_string()
}

fn grouped(n: u32) -> String {
    grouped_u64(n.into())
}

/// With commas between thousands.
fn grouped_u64(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::with_capacity(digits.len() + digits.len() / 3);
    for (at, c) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            out.push(',');
        }
        out.push(c);
    }
    out
}

/// A duration as its two largest units, rounded: `46h 34m`, `2m 15s`, `1.5s`.
fn span(d: Duration) -> String {
    if d.is_zero() {
        return "0s".to_owned();
    }
    if d < Duration::from_millis(9950) {
        let tenths = (d.as_millis() + 50) / 100;
        return match (tenths, tenths % 10) {
            (0, _) => format!("{}ms", d.as_millis().max(1)),
            (_, 0) => format!("{}s", tenths / 10),
            (_, rest) => format!("{}.{rest}s", tenths / 10),
        };
    }
    // (seconds of a unit, its letter): the largest that the time holds, and the next one below it.
    const UNITS: [(u64, char); 4] = [(86_400, 'd'), (3600, 'h'), (60, 'm'), (1, 's')];
    let round = |unit: u64| (d.as_secs_f64() / unit as f64).round() as u64 * unit;
    // Days only where hours are hard to read; the retry schedules are spoken of in hours.
    let from = if round(3600) >= 100 * 3600 { 0 } else { 1 };
    for (n, (unit, letter)) in UNITS.iter().enumerate().skip(from) {
        let Some((below, small)) = UNITS.get(n + 1) else { break };
        let rounded = round(*below);
        if rounded >= *unit {
            let rest = rounded % unit / below;
            return if rest == 0 {
                format!("{}{letter}", rounded / unit)
            } else {
                format!("{}{letter} {rest}{small}", rounded / unit)
            };
        }
    }
    format!("{}s", round(1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config;

    fn secs(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    fn loaded(more: &str, subscriber: &str) -> Config {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("h.toml");
        let text = format!(
            "{more}\n[[subscriber]]\nname = \"a\"\nurl = \"https://example.com\"\nsignatures = []\n{subscriber}\n"
        );
        std::fs::write(&path, text).expect("writes");
        config::load(&path).unwrap_or_else(|e| panic!("{e}"))
    }

    const AMQP: &str = "[queue]\nurl = \"amqp://127.0.0.1\"";
    const EMBEDDED: &str = "[queue]\nurl = \"embedded\"";

    /// One space between two words.
    fn text(config: &Config) -> String {
        plain(config).split_whitespace().collect::<Vec<_>>().join(" ")
    }

    fn plain(config: &Config) -> String {
        let ladder = matches!(config.queue.backend, Backend::Amqp(_));
        let plans: Vec<Plan<'_>> =
            config.subscribers.iter().map(|s| Plan::new(s, ladder)).collect();
        as_text(config, &plans, &Foreseen::Unknown { why: "nobody was asked".to_owned() }, 80)
    }

    fn exact(delay: Duration) -> Hold {
        Hold { delay, hops: 0 }
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
            "memory: 3.0 MiB with full batches. It takes up to 1,000 events and 1 failed batch at once: 65.0 MiB if each",
            "with full batches a message waits at most 2m 5s",
            "With fewer than 35 events in each batch",
            "consumer_timeout is 30m",
            "is not known: nobody was asked",
        ] {
            assert!(text.contains(part), "`{part}` is not in\n{text}");
        }
        assert!(!text.contains('…'), "16 attempts are shown whole:\n{text}");
    }

    #[test]
    fn what_it_needs_of_the_broker_is_told() {
        let one = text(&loaded(AMQP, ""));
        assert!(
            one.contains("in RabbitMQ: 24 queues (3 for each of 1 subscriber, 21 for all), which take about 72 file descriptors"),
            "{one}"
        );
        assert!(one.contains("3 connections of each daemon"), "{one}");
        let footprint = amqp::footprint(300, true);
        assert_eq!(
            (footprint.queues, footprint.descriptors, footprint.connections),
            (921, 2763, 10)
        );
        assert!(!text(&loaded(EMBEDDED, "")).contains("RabbitMQ: "));
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
    fn a_timeline_is_that_of_the_policy_asked_step_by_step() {
        for options in [
            RetryOptions::default(),
            RetryOptions { max_attempts: 0, initial_interval: secs(60), ..RetryOptions::default() },
            RetryOptions { max_attempts: 1, ..RetryOptions::default() },
            RetryOptions {
                max_attempts: 300,
                max_elapsed_time: Duration::ZERO,
                multiplier: 1.0,
                ..RetryOptions::default()
            },
            RetryOptions {
                max_attempts: 0,
                multiplier: 1.0,
                max_elapsed_time: secs(3600),
                ..RetryOptions::default()
            },
            RetryOptions { max_attempts: 40, multiplier: 1.1, ..RetryOptions::default() },
        ] {
            let policy = RetryPolicy::try_new(options).expect("valid");
            for random in [0.0, 0.5, 1.0] {
                let course = Course::new(&policy, exact, random);
                let (mut at, mut number) = (FIRST, 1);
                while let Next::After(delay) = policy.next(number, FIRST, at, None, random) {
                    (at, number) = (at + delay, number + 1);
                    let attempt = course.attempt(number);
                    assert_eq!(
                        (attempt.number, attempt.after, FIRST + attempt.since_first),
                        (number, delay, at),
                        "{policy:?}"
                    );
                }
                assert_eq!(course.last, Last::Number(number), "{policy:?}");
            }
        }
    }

    #[test]
    fn a_timeline_without_end_or_with_very_many_attempts_is_shown_without_its_middle() {
        let endless =
            plain(&loaded(EMBEDDED, "retry = { max_attempts = 0, max_elapsed_time = \"0s\" }"));
        assert!(
            endless.contains("and so on without end") && endless.lines().count() < 40,
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
    fn what_a_reload_would_change_is_told_key_by_key() {
        let answer = json!({
            "changes": [
                { "subscriber": "a", "change": "changed", "keys": ["retry.max_interval", "secrets"] },
                { "subscriber": "b\u{1b}[2J", "change": "added", "keys": [] },
            ],
            "needs_restart": ["queue.url"],
        });
        let address = ([127, 0, 0, 1], 8787).into();
        let told = |foreseen| {
            let mut out = String::new();
            foreseen_as_text(&foreseen, &mut |l| out += &(l + "\n"));
            out
        };
        let text = told(Foreseen::Changes { address, answer });
        assert_eq!(
            text,
            "a reload of the daemon at 127.0.0.1:8787 would change:\n  a: changed: retry.max_interval, secrets\n  b\\u{1b}[2J: added\n  only a restart changes: queue.url\n"
        );
        let many = json!({ "changes": [{ "subscriber": "a", "change": "removed", "keys": [] }], "waits_for_operator": true });
        let text = told(Foreseen::Changes { address, answer: many });
        assert!(text.contains("  a: removed\n  (it removes all subscribers, or more than half of them: the changed file alone"), "{text}");
        let nothing = told(Foreseen::Changes {
            address,
            answer: json!({ "changes": [], "needs_restart": [] }),
        });
        assert_eq!(nothing, "a reload of the daemon at 127.0.0.1:8787 would change nothing\n");
    }

    #[test]
    fn durations_are_told_by_their_two_largest_units() {
        for (ms, told) in [
            (0, "0s"),
            (3, "3ms"),
            (1500, "1.5s"),
            (9999, "10s"),
            (59_600, "1m"),
            (135_000, "2m 15s"),
            (3_599_900, "1h"),
            (21_600_000, "6h"),
            (168_000_000, "46h 40m"),
            (900_000_000, "10d 10h"),
        ] {
            assert_eq!(span(Duration::from_millis(ms)), told);
        }
        assert_eq!(
            (grouped(1), grouped(1000), grouped(51_841)),
            ("1".to_owned(), "1,000".to_owned(), "51,841".to_owned())
        );
    }
}

//! Every metric: its name, its labels, what it means, and the handles that count.
//!
//! [`ALL`] is the one list. The exposition, docs/metrics.md, the shipped alerts and the dashboard
//! are held to it by tests. Units are base units (seconds, bytes); no label holds a URL or a
//! secret.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::AtomicU64},
    time::{Duration, SystemTime},
};

use prometheus_client::{
    encoding::text,
    metrics::{
        counter::Counter,
        family::{Family, MetricConstructor},
        gauge::Gauge,
        histogram::Histogram,
    },
    registry::Registry,
};

use crate::{
    delivery::{DispositionKind, FailureKind, Reason, SubscriberName},
    policy::circuit_breaker::CircuitState,
};

/// Before each name.
pub const PREFIX: &str = "hooktrail_";

/// What kind of metric it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Only rises, from 0 at each start; exposed as `NAME_total`.
    Counter,
    Gauge,
    /// Exposed as `NAME_bucket`, `NAME_sum` and `NAME_count`.
    Histogram,
}

impl Kind {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram => "histogram",
        }
    }
}

/// A metric's definition.
#[derive(Debug, Clone, Copy)]
pub struct Definition {
    /// Without [`PREFIX`], and of a counter without `_total`.
    pub name: &'static str,
    pub kind: Kind,
    pub labels: &'static [&'static str],
    pub help: &'static str,
}

impl Definition {
    /// As it stands in the exposition; of a histogram without the suffixes.
    pub fn exposed(&self) -> String {
        let total = if self.kind == Kind::Counter { "_total" } else { "" };
        format!("{PREFIX}{}{total}", self.name)
    }
}

const fn counter(
    name: &'static str,
    labels: &'static [&'static str],
    help: &'static str,
) -> Definition {
    Definition { name, kind: Kind::Counter, labels, help }
}

const fn gauge(
    name: &'static str,
    labels: &'static [&'static str],
    help: &'static str,
) -> Definition {
    Definition { name, kind: Kind::Gauge, labels, help }
}

const fn histogram(
    name: &'static str,
    labels: &'static [&'static str],
    help: &'static str,
) -> Definition {
    Definition { name, kind: Kind::Histogram, labels, help }
}

const SUBSCRIBER: &[&str] = &["subscriber"];

/// All there are, in the order of the documentation.
pub const ALL: &[Definition] = &[
    counter(
        "events_received",
        SUBSCRIBER,
        "Events taken from the subscriber's queue; one that is given back and taken again counts again",
    ),
    counter("events_delivered", SUBSCRIBER, "Events that the receiver has accepted"),
    counter(
        "events_recognised",
        SUBSCRIBER,
        "Events that came again after a lost connection to the broker and were acked without a request: the receiver had accepted them, and only the ack was lost",
    ),
    counter(
        "attempts",
        &["subscriber", "outcome"],
        "Attempts by what they came to: delivered, retry, split, dead_letter, paused",
    ),
    counter(
        "attempt_failures",
        &["subscriber", "failure"],
        "Failed attempts by why: status (any answer that is no success), dns, address_blocked, connect, tls, timeout, reset, bad_answer, internal",
    ),
    counter(
        "unsent_requests",
        SUBSCRIBER,
        "Requests of which nothing could be sent, for a lack of this machine's own (file descriptors, ports) or because over HTTP/2 no stream got free; they are no attempts",
    ),
    histogram(
        "attempt_duration_seconds",
        SUBSCRIBER,
        "From the beginning of an attempt to its outcome",
    ),
    histogram("batch_events", SUBSCRIBER, "Events in the batch of an attempt"),
    histogram("batch_bytes", SUBSCRIBER, "Bytes of the request body of an attempt"),
    histogram(
        "delivery_lag_seconds",
        SUBSCRIBER,
        "From the field `timestamp` of a batch's first event to the answer that accepted the batch",
    ),
    histogram(
        "delivery_duration_seconds",
        SUBSCRIBER,
        "From the arrival of a batch's first event (its publication where the queue tells that, else when the daemon took it) to the answer that accepted the batch",
    ),
    counter(
        "dead_letters",
        &["subscriber", "reason"],
        "Dead letters written by this daemon: exhausted, refused, invalid_event, too_large",
    ),
    gauge("requests_in_flight", SUBSCRIBER, "Requests to the receiver that are under way"),
    gauge(
        "circuit_state",
        &["subscriber", "state"],
        "1 for the state that the circuit breaker is in, else 0: closed, open, half_open",
    ),
    gauge(
        "circuit_opened_timestamp_seconds",
        SUBSCRIBER,
        "Since when the circuit has not been closed, in Unix seconds; 0 while it is",
    ),
    gauge("paused", SUBSCRIBER, "1 while the subscriber is paused, else 0"),
    gauge(
        "lane_up",
        SUBSCRIBER,
        "1 while the lane has its queue, or does without it because it is paused or waits; 0 while the queue fails, its bindings or the ways of its retries are missing",
    ),
    counter("lane_panics", SUBSCRIBER, "Panics of the lane; it is restarted each time"),
    gauge(
        "retries_waiting",
        SUBSCRIBER,
        "Batches that wait for their next attempt, as far as this daemon knows",
    ),
    gauge(
        "next_retry_timestamp_seconds",
        SUBSCRIBER,
        "When the next of those is due, in Unix seconds; 0 without any",
    ),
    gauge(
        "oldest_event_timestamp_seconds",
        SUBSCRIBER,
        "When the oldest event that this daemon holds undelivered arrived, in Unix seconds; 0 without any",
    ),
    gauge(
        "queue_messages",
        &["subscriber", "queue"],
        "Messages in the subscriber's queues, without those that a lane has taken: main, retry (due), dead",
    ),
    gauge(
        "delayed_retries",
        &[],
        "Batches of all subscribers whose time to be tried again has not come",
    ),
    gauge(
        "orphans",
        &[],
        "Messages in the queue of orphans: retries without their subscriber's queue, and what is no event in a source queue",
    ),
    gauge(
        "removed_subscriber_messages",
        SUBSCRIBER,
        "What still waits in the queues of a subscriber that is not configured any more, until `hooktrail prune`",
    ),
    gauge(
        "queue_up",
        &[],
        "1 while the queue takes what is published and gives what waits, else 0",
    ),
    gauge(
        "broker_connections",
        &["role"],
        "Open connections to the broker: consuming, publishing, relaying, declaring",
    ),
    counter(
        "broker_connects",
        &["role", "result"],
        "Connections to the broker that were tried: ok, failed",
    ),
    counter(
        "events_accepted",
        &["matched"],
        "Events taken over HTTP that are durable, by whether a subscriber's pattern matches them: true, false",
    ),
    counter(
        "events_relayed",
        &["result"],
        "Events of the source queue: routed, unmatched (no pattern matches them), invalid",
    ),
    counter("config_reloads", &["result"], "Reloads of the configuration: success, failure"),
    gauge(
        "config_last_reload_successful",
        &[],
        "1 if the configuration was right when it was last read, else 0: then the one before it is in use",
    ),
    gauge(
        "config_last_reload_success_timestamp_seconds",
        &[],
        "When the configuration in use was read, in Unix seconds",
    ),
    gauge("subscribers", &[], "Subscribers that are configured"),
    gauge(
        "held_removals",
        &[],
        "Subscribers that the configuration does not have any more and that are served or bound all the same: so many are not removed by a changed file or a start, but by a reload that an operator asks for",
    ),
    counter(
        "log_lines_dropped",
        &[],
        "Lines of the log that nobody has read in time; one that says how many is logged when somebody reads again",
    ),
    gauge("process_start_time_seconds", &[], "When the process started, in Unix seconds"),
    counter("process_cpu_seconds", &[], "Time of CPUs that the process has used, user and system"),
    gauge("process_resident_memory_bytes", &[], "Memory that the process holds"),
    gauge("process_open_fds", &[], "File descriptors that the process has open"),
    gauge("process_threads", &[], "Threads of the process"),
    gauge("build_info", &["version"], "Always 1; the version is its label"),
];

/// The page docs/metrics.md.
pub fn reference() -> String {
    let mut page = String::from(
        "# Metrics\n\n`GET /metrics` of `[admin] listen` answers in the text format of Prometheus (OpenMetrics 1.0). No token is needed; no label holds a URL\n\
         or a secret. Counters begin at 0 at each start. Time is in seconds, points in time are Unix seconds. This page is made from the list in\n\
         `src/telemetry/metrics.rs`, and a test holds it to that.\n\n| metric | type | labels | |\n|---|---|---|---|\n",
    );
    for d in ALL {
        let labels: Vec<String> = d.labels.iter().map(|l| format!("`{l}`")).collect();
        // Writing to a string cannot fail.
        writeln!(
            page,
            "| `{}` | {} | {} | {} |",
            d.exposed(),
            d.kind.name(),
            labels.join(", "),
            d.help
        )
        .ok();
    }
    page
}

type Labels = Vec<(&'static str, String)>;
type Float = Gauge<f64, AtomicU64>;

/// The format of an exposition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exposition {
    /// The text format of Prometheus, 0.0.4, for whoever asks for nothing else.
    Text,
    /// OpenMetrics 1.0.
    OpenMetrics,
}

impl Exposition {
    /// What a header `accept` asks for (RFC 9110, 12.5.1): OpenMetrics if it is named, and plain
    /// text is not preferred.
    pub fn accepted(accept: &str) -> Self {
        let quality = |range: &str| {
            let mut parts = range.split(';').map(str::trim);
            let name = parts.next().unwrap_or_default().to_ascii_lowercase();
            let q = parts
                .find_map(|p| p.strip_prefix("q="))
                .map_or(1.0, |q| q.parse::<f32>().unwrap_or(0.0));
            (name, q)
        };
        let ranges: Vec<(String, f32)> = accept.split(',').map(quality).collect();
        let best =
            |name: &str| ranges.iter().filter(|(n, _)| n == name).map(|(_, q)| *q).reduce(f32::max);
        let text =
            best("text/plain").or_else(|| best("text/*")).or_else(|| best("*/*")).unwrap_or(0.0);
        match best("application/openmetrics-text") {
            Some(q) if q > 0.0 && q >= text => Self::OpenMetrics,
            _ => Self::Text,
        }
    }

    pub const fn content_type(self) -> &'static str {
        match self {
            Self::Text => "text/plain; version=0.0.4; charset=utf-8",
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        }
    }
}

/// The lines of an exposition in a lasting order: those of a metric by their labels, the buckets of
/// a histogram as they are.
fn sorted(text: &str) -> String {
    let labels = |line: &str| {
        let all = line
            .split_once('{')
            .and_then(|(_, rest)| rest.rsplit_once('}'))
            .map_or("", |(labels, _)| labels);
        // A bucket's bound is its first label, and a number.
        let others = all.strip_prefix("le=\"").and_then(|rest| rest.split_once('"'));
        others.map_or(all, |(_, others)| others.trim_start_matches(',')).to_owned()
    };
    let (mut out, mut series) = (String::with_capacity(text.len()), Vec::new());
    let flush = |series: &mut Vec<&str>, out: &mut String| {
        series.sort_by_cached_key(|line| labels(line));
        series.drain(..).for_each(|line| out.extend([line, "\n"]));
    };
    for line in text.lines() {
        if line.starts_with('#') {
            flush(&mut series, &mut out);
            out.extend([line, "\n"]);
        } else {
            series.push(line);
        }
    }
    flush(&mut series, &mut out);
    out
}

/// OpenMetrics as the older format has it: a counter's name has its suffix in the comments too, and
/// nothing marks the end.
fn as_plain_text(open_metrics: &str) -> String {
    let mut out = String::with_capacity(open_metrics.len());
    for line in open_metrics.lines().filter(|line| *line != "# EOF") {
        let about = line.strip_prefix("# HELP ").or_else(|| line.strip_prefix("# TYPE "));
        let name = about.and_then(|rest| rest.split(' ').next()).unwrap_or_default();
        let definition =
            name.strip_prefix(PREFIX).and_then(|name| ALL.iter().find(|d| d.name == name));
        match definition {
            Some(d) if d.kind == Kind::Counter => {
                out.extend([&line.replacen(name, &d.exposed(), 1), "\n"])
            }
            _ => out.extend([line, "\n"]),
        }
    }
    out
}

/// The upper bounds of a histogram's buckets.
#[derive(Debug, Clone, Copy)]
struct Buckets(&'static [f64]);

impl MetricConstructor<Histogram> for Buckets {
    fn new_metric(&self) -> Histogram {
        Histogram::new(self.0.iter().copied())
    }
}

const SECONDS: Buckets =
    Buckets(&[0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0]);
/// A retry can be days late.
const LONG_SECONDS: Buckets = Buckets(&[
    0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0, 7200.0, 43_200.0, 259_200.0,
]);
const EVENTS: Buckets = Buckets(&[1.0, 2.0, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1000.0]);
const BYTES: Buckets = Buckets(&[
    256.0,
    1024.0,
    4096.0,
    16_384.0,
    65_536.0,
    262_144.0,
    1_048_576.0,
    4_194_304.0,
    12_582_912.0,
]);

impl Buckets {
    fn of(name: &str) -> Self {
        match name {
            "batch_events" => EVENTS,
            "batch_bytes" => BYTES,
            "attempt_duration_seconds" => SECONDS,
            _ => LONG_SECONDS,
        }
    }
}

/// Everything that is counted. Clones are the same.
#[derive(Debug, Clone)]
pub struct Metrics(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    registry: Registry,
    counters: BTreeMap<&'static str, Family<Labels, Counter>>,
    gauges: BTreeMap<&'static str, Family<Labels, Float>>,
    histograms: BTreeMap<&'static str, Family<Labels, Histogram, Buckets>>,
    cpu: Counter<f64, AtomicU64>,
    /// The series of each subscriber, so that they can end with it.
    series: Mutex<BTreeMap<String, Vec<(&'static str, Labels)>>>,
}

const CPU: &str = "process_cpu_seconds";

impl Metrics {
    /// `started` is when the process did.
    pub fn new(started: SystemTime) -> Self {
        let mut registry = Registry::with_prefix(PREFIX.trim_end_matches('_'));
        let (mut counters, mut gauges, mut histograms) =
            (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        let cpu = Counter::default();
        for d in ALL {
            match d.kind {
                Kind::Counter if d.name == CPU => registry.register(d.name, d.help, cpu.clone()),
                Kind::Counter => {
                    let family = Family::default();
                    registry.register(d.name, d.help, family.clone());
                    counters.insert(d.name, family);
                }
                Kind::Gauge => {
                    let family = Family::default();
                    registry.register(d.name, d.help, family.clone());
                    gauges.insert(d.name, family);
                }
                Kind::Histogram => {
                    let family = Family::new_with_constructor(Buckets::of(d.name));
                    registry.register(d.name, d.help, family.clone());
                    histograms.insert(d.name, family);
                }
            }
        }
        let metrics = Self(Arc::new(Inner {
            registry,
            counters,
            gauges,
            histograms,
            cpu,
            series: Mutex::default(),
        }));
        metrics.gauge("build_info", &[("version", env!("CARGO_PKG_VERSION"))]).set(1.0);
        metrics.gauge("process_start_time_seconds", &[]).set(unix(started));
        metrics
    }

    pub fn expose_as(&self, format: Exposition) -> String {
        let text = sorted(&self.expose());
        if format == Exposition::OpenMetrics { text } else { as_plain_text(&text) }
    }

    /// In the text format of OpenMetrics, in any order.
    pub fn expose(&self) -> String {
        self.look_at_the_process();
        let mut text = String::new();
        // Writing to a string cannot fail.
        text::encode(&mut text, &self.0.registry).ok();
        text
    }

    /// The handles of a subscriber. Its series begin, at 0.
    pub fn subscriber(&self, name: &str) -> SubscriberMetrics {
        let of = [("subscriber", name)];
        let outcome = |o: DispositionKind| {
            (o, self.counter("attempts", &[("subscriber", name), ("outcome", o.name())]))
        };
        let failure = |f: FailureKind| {
            (f, self.counter("attempt_failures", &[("subscriber", name), ("failure", f.name())]))
        };
        let reason = |r: Reason| {
            (r, self.counter("dead_letters", &[("subscriber", name), ("reason", r.name())]))
        };
        let state = |s: CircuitState| {
            (s, self.gauge("circuit_state", &[("subscriber", name), ("state", s.name())]))
        };
        let queue = |q| self.gauge("queue_messages", &[("subscriber", name), ("queue", q)]);
        SubscriberMetrics {
            received: self.counter("events_received", &of),
            delivered: self.counter("events_delivered", &of),
            recognised: self.counter("events_recognised", &of),
            attempts: DispositionKind::ALL.map(outcome).into(),
            failures: FailureKind::ALL.map(failure).into(),
            unsent: self.counter("unsent_requests", &of),
            dead_letters: Reason::OWN.map(reason).into(),
            attempt_duration: self.histogram("attempt_duration_seconds", &of),
            batch_events: self.histogram("batch_events", &of),
            batch_bytes: self.histogram("batch_bytes", &of),
            lag: self.histogram("delivery_lag_seconds", &of),
            delivery_duration: self.histogram("delivery_duration_seconds", &of),
            in_flight: self.gauge("requests_in_flight", &of),
            circuit: CircuitState::ALL.map(state).into(),
            circuit_opened: self.gauge("circuit_opened_timestamp_seconds", &of),
            paused: self.gauge("paused", &of),
            up: self.gauge("lane_up", &of),
            panics: self.counter("lane_panics", &of),
            retries_waiting: self.gauge("retries_waiting", &of),
            next_retry: self.gauge("next_retry_timestamp_seconds", &of),
            oldest: self.gauge("oldest_event_timestamp_seconds", &of),
            queues: [queue("main"), queue("retry"), queue("dead")],
        }
    }

    /// Ends the series of a subscriber.
    pub fn forget(&self, subscriber: &str) {
        for (name, labels) in self.series().remove(subscriber).unwrap_or_default() {
            let Inner { counters, gauges, histograms, .. } = &*self.0;
            // In the one map that has it.
            counters.get(name).map(|f| f.remove(&labels));
            gauges.get(name).map(|f| f.remove(&labels));
            histograms.get(name).map(|f| f.remove(&labels));
        }
    }

    /// What still waits for subscribers that are not configured any more; those that are not named
    /// are no more.
    pub fn set_removed(&self, removed: &BTreeMap<SubscriberName, u64>) {
        let family = &self.0.gauges["removed_subscriber_messages"];
        family.clear();
        for (name, messages) in removed {
            family.get_or_create(&vec![("subscriber", name.to_string())]).set(*messages as f64);
        }
    }

    pub fn set_delayed_retries(&self, batches: u64) {
        self.gauge("delayed_retries", &[]).set(batches as f64);
    }

    pub fn set_orphans(&self, messages: u64) {
        self.gauge("orphans", &[]).set(messages as f64);
    }

    pub fn set_held_removals(&self, subscribers: usize) {
        self.gauge("held_removals", &[]).set(subscribers as f64);
    }

    /// Counts lines of the log that were dropped.
    pub fn dropped_lines(&self) -> impl Fn(u64) + Send + Sync + use<> {
        let dropped = self.counter("log_lines_dropped", &[]);
        move |lines| {
            dropped.inc_by(lines);
        }
    }

    pub fn set_queue_up(&self, up: bool) {
        self.gauge("queue_up", &[]).set(f64::from(up));
    }

    /// A connection of this role is open until the guard is dropped.
    pub fn connection(&self, role: &'static str) -> OpenConnection {
        let open = self.gauge("broker_connections", &[("role", role)]);
        open.inc();
        OpenConnection(open)
    }

    pub fn connected(&self, role: &'static str, ok: bool) {
        self.counter(
            "broker_connects",
            &[("role", role), ("result", if ok { "ok" } else { "failed" })],
        )
        .inc();
    }

    /// Events taken over HTTP, of which some match nobody's patterns.
    pub fn accepted(&self, matched: u64, unmatched: u64) {
        self.counter("events_accepted", &[("matched", "true")]).inc_by(matched);
        self.counter("events_accepted", &[("matched", "false")]).inc_by(unmatched);
    }

    pub fn relayed(&self, result: &'static str, events: u64) {
        self.counter("events_relayed", &[("result", result)]).inc_by(events);
    }

    /// The configuration was read: at the start, or again.
    pub fn configured(&self, subscribers: usize, now: SystemTime) {
        self.gauge("subscribers", &[]).set(subscribers as f64);
        self.gauge("config_last_reload_successful", &[]).set(1.0);
        self.gauge("config_last_reload_success_timestamp_seconds", &[]).set(unix(now));
    }

    /// It was read again, and whether it was right.
    pub fn reloaded(&self, ok: bool) {
        self.counter("config_reloads", &[("result", if ok { "success" } else { "failure" })]).inc();
        self.gauge("config_last_reload_successful", &[]).set(f64::from(ok));
    }

    fn series(&self) -> MutexGuard<'_, BTreeMap<String, Vec<(&'static str, Labels)>>> {
        self.0.series.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn labels(&self, name: &'static str, labels: &[(&'static str, &str)]) -> Labels {
        debug_assert!(
            ALL.iter().any(|d| d.name == name && d.labels.iter().eq(labels.iter().map(|(l, _)| l))),
            "{name} is not defined with {labels:?}"
        );
        let set: Labels =
            labels.iter().map(|(label, value)| (*label, (*value).to_owned())).collect();
        if let [("subscriber", subscriber), ..] = labels {
            let mut series = self.series();
            let own = series.entry((*subscriber).to_owned()).or_default();
            if !own.iter().any(|(n, s)| *n == name && *s == set) {
                own.push((name, set.clone()));
            }
        }
        set
    }

    fn counter(&self, name: &'static str, labels: &[(&'static str, &str)]) -> Counter {
        self.0.counters[name].get_or_create_owned(&self.labels(name, labels))
    }

    fn gauge(&self, name: &'static str, labels: &[(&'static str, &str)]) -> Float {
        self.0.gauges[name].get_or_create_owned(&self.labels(name, labels))
    }

    fn histogram(&self, name: &'static str, labels: &[(&'static str, &str)]) -> Histogram {
        self.0.histograms[name].get_or_create_owned(&self.labels(name, labels))
    }

    /// As far as the system tells: Linux does, in /proc.
    fn look_at_the_process(&self) {
        let read =
            |file: &str| std::fs::read_to_string(format!("/proc/self/{file}")).unwrap_or_default();
        if let Some(seconds) = cpu_seconds(&read("stat")) {
            self.0.cpu.inc_by((seconds - self.0.cpu.get()).max(0.0));
        }
        let status = read("status");
        let field = |name: &str| {
            status
                .lines()
                .find_map(|l| l.strip_prefix(name)?.split_whitespace().next()?.parse::<f64>().ok())
        };
        if let Some(kib) = field("VmRSS:") {
            self.gauge("process_resident_memory_bytes", &[]).set(kib * 1024.0);
        }
        if let Some(threads) = field("Threads:") {
            self.gauge("process_threads", &[]).set(threads);
        }
        if let Ok(fds) = std::fs::read_dir("/proc/self/fd") {
            // One of them is that of the folder.
            self.gauge("process_open_fds", &[]).set(fds.count().saturating_sub(1) as f64);
        }
    }
}

/// User and system time from the text of /proc/self/stat, whose second field may hold anything in
/// its brackets.
fn cpu_seconds(stat: &str) -> Option<f64> {
    // Linux counts these in hundredths for every program, whatever the kernel's own clock is.
    const TICKS_PER_SECOND: f64 = 100.0;
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    let mut ticks = || fields.next()?.parse::<f64>().ok();
    Some((ticks()? + ticks()?) / TICKS_PER_SECOND)
}

/// Unix seconds.
fn unix(time: SystemTime) -> f64 {
    time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

/// Counts a connection as open.
#[derive(Debug)]
pub struct OpenConnection(Float);

impl Drop for OpenConnection {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// The handles of one subscriber.
#[derive(Debug, Clone)]
pub struct SubscriberMetrics {
    received: Counter,
    delivered: Counter,
    recognised: Counter,
    attempts: BTreeMap<DispositionKind, Counter>,
    failures: BTreeMap<FailureKind, Counter>,
    unsent: Counter,
    dead_letters: BTreeMap<Reason, Counter>,
    attempt_duration: Histogram,
    batch_events: Histogram,
    batch_bytes: Histogram,
    lag: Histogram,
    delivery_duration: Histogram,
    in_flight: Float,
    circuit: BTreeMap<CircuitState, Float>,
    circuit_opened: Float,
    paused: Float,
    up: Float,
    panics: Counter,
    retries_waiting: Float,
    next_retry: Float,
    oldest: Float,
    queues: [Float; 3],
}

impl SubscriberMetrics {
    pub fn received(&self, events: u64) {
        self.received.inc_by(events);
    }

    pub fn recognised(&self, events: u64) {
        self.recognised.inc_by(events);
    }

    pub fn attempt_begins(&self, events: u32, bytes: usize) {
        self.in_flight.inc();
        self.batch_events.observe(f64::from(events));
        self.batch_bytes.observe(bytes as f64);
    }

    pub fn attempt_ends(
        &self,
        disposition: DispositionKind,
        failure: Option<FailureKind>,
        took: Duration,
    ) {
        self.in_flight.dec();
        self.attempt_duration.observe(took.as_secs_f64());
        self.attempts[&disposition].inc();
        if let Some(failure) = failure {
            self.failures[&failure].inc();
        }
    }

    /// An attempt that had begun, and of which nothing was sent.
    pub fn attempt_was_none(&self) {
        self.in_flight.dec();
        self.unsent.inc();
    }

    /// An attempt that nobody will hear the outcome of: its lane is gone.
    pub fn attempts_are_gone(&self) {
        self.in_flight.set(0.0);
    }

    /// A batch was accepted, so long after its first event's timestamp and its arrival.
    pub fn delivered(&self, events: u32, lag: Option<Duration>, since_arrival: Option<Duration>) {
        self.delivered.inc_by(u64::from(events));
        if let Some(lag) = lag {
            self.lag.observe(lag.as_secs_f64());
        }
        if let Some(took) = since_arrival {
            self.delivery_duration.observe(took.as_secs_f64());
        }
    }

    /// `reason` is one of [`Reason::OWN`]: what the broker gives up is not counted.
    pub fn dead(&self, reason: Reason, letters: u64) {
        if let Some(counter) = self.dead_letters.get(&reason) {
            counter.inc_by(letters);
        }
    }

    /// `since`: when a circuit that is not closed was opened.
    pub fn circuit(&self, state: CircuitState, since: Option<SystemTime>) {
        for (of, gauge) in &self.circuit {
            gauge.set(f64::from(*of == state));
        }
        self.circuit_opened.set(since.map_or(0.0, unix));
    }

    pub fn paused(&self, paused: bool) {
        self.paused.set(f64::from(paused));
    }

    pub fn up(&self, up: bool) {
        self.up.set(f64::from(up));
    }

    pub fn panicked(&self) {
        self.panics.inc();
    }

    pub fn retries(&self, waiting: usize, next: Option<SystemTime>) {
        self.retries_waiting.set(waiting as f64);
        self.next_retry.set(next.map_or(0.0, unix));
    }

    pub fn oldest(&self, arrived: Option<SystemTime>) {
        self.oldest.set(arrived.map_or(0.0, unix));
    }

    /// Messages in the main, the retry and the dead queue.
    pub fn queues(&self, messages: [u64; 3]) {
        for (gauge, messages) in self.queues.iter().zip(messages) {
            gauge.set(messages as f64);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn metrics() -> Metrics {
        Metrics::new(SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000))
    }

    /// The names in an exposition, by the lines that tell their types.
    fn exposed(text: &str) -> BTreeSet<String> {
        text.lines()
            .filter_map(|l| l.strip_prefix("# TYPE ")?.split(' ').next().map(str::to_owned))
            .collect()
    }

    #[test]
    fn every_metric_is_exposed_once_it_is_used_and_no_other() {
        let m = metrics();
        m.subscriber("a");
        m.set_removed(&[("gone".into(), 3)].into());
        m.set_delayed_retries(1);
        m.set_orphans(2);
        m.set_queue_up(true);
        let open = m.connection("publishing");
        assert!(m.expose().contains("hooktrail_broker_connections{role=\"publishing\"} 1"));
        drop(open);
        m.connected("publishing", true);
        m.accepted(1, 2);
        m.relayed("routed", 1);
        m.set_held_removals(1);
        m.dropped_lines()(1);
        m.configured(1, SystemTime::UNIX_EPOCH);
        m.reloaded(false);
        let text = m.expose();
        assert!(text.contains("hooktrail_broker_connections{role=\"publishing\"} 0"));
        assert_eq!(exposed(&text), ALL.iter().map(|d| format!("{PREFIX}{}", d.name)).collect());
        for d in ALL {
            assert!(
                text.contains(&format!("\n{}", d.exposed())) || text.starts_with(&d.exposed()),
                "{}",
                d.exposed()
            );
            assert!(text.contains(&format!("# HELP {PREFIX}{} {}", d.name, d.help)), "{}", d.name);
        }
        assert!(
            text.contains("hooktrail_removed_subscriber_messages{subscriber=\"gone\"} 3"),
            "{text}"
        );
        assert!(text.ends_with("# EOF\n"));
    }

    #[test]
    fn the_format_is_what_is_asked_for() {
        for (accept, format) in [
            ("", Exposition::Text),
            ("*/*", Exposition::Text),
            ("text/plain", Exposition::Text),
            ("application/openmetrics-text", Exposition::OpenMetrics),
            // As Prometheus asks.
            (
                "application/openmetrics-text;version=1.0.0;q=0.5,application/openmetrics-text;version=0.0.1;q=0.4,\
                 text/plain;version=0.0.4;q=0.3,*/*;q=0.2",
                Exposition::OpenMetrics,
            ),
            (
                "text/plain;version=0.0.4;q=0.6, Application/OpenMetrics-text; version=1.0.0; q=0.5",
                Exposition::Text,
            ),
            ("application/openmetrics-text;q=0, */*", Exposition::Text),
        ] {
            assert_eq!(Exposition::accepted(accept), format, "{accept}");
        }
    }

    #[test]
    fn plain_text_names_counters_as_their_samples_and_both_formats_are_in_a_lasting_order() {
        let m = metrics();
        for name in ["c", "a", "b,le", "d"] {
            let subscriber = m.subscriber(name);
            subscriber.received(3);
            subscriber.attempt_begins(7, 9);
        }
        let text = m.expose_as(Exposition::Text);
        for part in [
            "# TYPE hooktrail_events_received_total counter\n",
            "# HELP hooktrail_events_received_total Events taken",
            "\nhooktrail_events_received_total{subscriber=\"a\"} 3\nhooktrail_events_received_total{subscriber=\"b,le\"} 3\n\
             hooktrail_events_received_total{subscriber=\"c\"} 3\n",
            "# TYPE hooktrail_batch_events histogram\n",
            "# TYPE hooktrail_paused gauge\n",
        ] {
            assert!(text.contains(part), "{part} is not in {text}");
        }
        assert!(!text.contains("# EOF"));
        assert!(m.expose_as(Exposition::OpenMetrics).ends_with("# EOF\n"));
        let buckets: Vec<&str> =
            text.lines().filter_map(|l| l.strip_prefix("hooktrail_batch_events_bucket{")).collect();
        let order: Vec<(String, f64)> = buckets
            .iter()
            .map(|line| {
                let (bound, subscriber) = line
                    .strip_prefix("le=\"")
                    .and_then(|rest| rest.split_once('"'))
                    .expect("a bound");
                (
                    subscriber.split('}').next().expect("labels").to_owned(),
                    bound.replace("+Inf", "inf").parse().expect("a number"),
                )
            })
            .collect();
        assert_eq!(order.len(), 4 * 11);
        assert!(order.is_sorted(), "{order:?}");
        let names = |text: &str| {
            text.lines()
                .map(|l| l.split(' ').next().unwrap_or_default().to_owned())
                .collect::<Vec<_>>()
        };
        assert_eq!(names(&m.expose_as(Exposition::Text)), names(&text));
    }

    #[test]
    fn the_series_of_a_subscriber_end_with_it() {
        let m = metrics();
        let a = m.subscriber("a");
        m.subscriber("b");
        a.dead(Reason::Exhausted, 2);
        assert!(
            m.expose()
                .contains("hooktrail_dead_letters_total{subscriber=\"a\",reason=\"exhausted\"} 2")
        );
        m.forget("a");
        let text = m.expose();
        assert!(!text.contains("subscriber=\"a\"") && text.contains("subscriber=\"b\""), "{text}");
        m.subscriber("a");
        assert!(
            m.expose()
                .contains("hooktrail_dead_letters_total{subscriber=\"a\",reason=\"exhausted\"} 0")
        );
    }

    #[test]
    fn the_process_is_looked_at() {
        let text = metrics().expose();
        let value = |name: &str| {
            let line = text
                .lines()
                .find_map(|l| l.strip_prefix(name))
                .unwrap_or_else(|| panic!("{name}: {text}"));
            line.trim().parse::<f64>().expect("a number")
        };
        assert!(value("hooktrail_process_resident_memory_bytes ") > 1e6);
        assert!(value("hooktrail_process_open_fds ") >= 3.0);
        assert_eq!(value("hooktrail_process_start_time_seconds "), 1_700_000_000.0);
        assert_eq!(cpu_seconds("1 (a) b) R 0 0 0 0 0 0 0 0 0 0 150 50 0 0"), Some(2.0));
    }

    #[test]
    fn the_page_of_the_documentation_is_made_of_this_list() {
        let page = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/metrics.md"))
            .expect("the page");
        assert_eq!(
            page,
            reference(),
            "write what `metrics::reference` returns into docs/metrics.md"
        );
    }

    #[test]
    fn names_are_in_base_units_and_labels_hold_nothing_secret() {
        for d in ALL {
            let lower = d.name.bytes().all(|b| b.is_ascii_lowercase() || b == b'_');
            assert!(
                lower
                    && !d.name.ends_with("_total")
                    && !d.name.contains("_ms")
                    && !d.help.ends_with('.'),
                "{}",
                d.name
            );
            assert!(d.labels.iter().all(|l| !["url", "secret", "error"].contains(l)), "{}", d.name);
        }
    }
}

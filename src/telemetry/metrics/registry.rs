//! The registry of all metrics, with the handles of those that belong to no subscriber.

use std::{
    collections::BTreeMap,
    sync::{Arc, OnceLock, atomic::AtomicU64},
    time::SystemTime,
};

use prometheus_client::{encoding::text, metrics::counter::Counter, registry::Registry};

use super::{
    definitions::{ALL, PREFIX},
    exposition::{Exposition, as_plain_text, sorted},
    families::{Families, Float, unix},
    process::Usage,
    subscriber::{ALL_TOGETHER, Series, SubscriberMetrics},
};
use crate::delivery::SubscriberName;

/// All metrics of a process. Clones are the same.
#[derive(Debug, Clone)]
pub struct Metrics(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    registry: Registry,
    families: Families,
    cpu: Counter<f64, AtomicU64>,
    /// Those that count all subscribers together, where none has its own.
    sums: OnceLock<Arc<Series>>,
}

const CPU: &str = "process_cpu_seconds";

impl Metrics {
    /// `started` is when the process did.
    pub fn new(started: SystemTime) -> Self {
        let mut registry = Registry::with_prefix(PREFIX.trim_end_matches('_'));
        let families = Families::registered(&mut registry, CPU);
        let cpu = Counter::default();
        let help = ALL.iter().find(|d| d.name == CPU).map_or("", |d| d.help);
        registry.register(CPU, help, cpu.clone());
        let sums = OnceLock::new();
        let metrics = Self(Arc::new(Inner { registry, families, cpu, sums }));
        metrics.gauge("build_info", &[("version", env!("CARGO_PKG_VERSION"))]).set(1.0);
        metrics.gauge("process_start_time_seconds", &[]).set(unix(started));
        metrics
    }

    pub fn expose_as(&self, format: Exposition) -> String {
        let text = sorted(&self.expose());
        if format == Exposition::OpenMetrics { text } else { as_plain_text(&text) }
    }

    /// All metrics in the text format of OpenMetrics, in any order.
    pub fn expose(&self) -> String {
        self.report_process();
        let mut text = String::new();
        // Writing to a string cannot fail.
        text::encode(&mut text, &self.0.registry).ok();
        text
    }

    /// From now on a subscriber has no series of its own: all are counted together.
    pub fn sum_subscribers(&self) {
        let of_all = || Arc::new(Series::new(&self.0.families, ALL_TOGETHER));
        self.0.sums.get_or_init(of_all);
    }

    /// What counts a subscriber. Its series begin, at 0.
    pub fn subscriber(&self, name: &str) -> SubscriberMetrics {
        let own = || Arc::new(Series::new(&self.0.families, name));
        SubscriberMetrics::new(self.0.sums.get().cloned().unwrap_or_else(own))
    }

    /// Ends the series of a subscriber.
    pub fn forget(&self, subscriber: &str) {
        self.0.families.forget(subscriber);
    }

    /// The messages of subscribers that are not configured any more; the series of all others end.
    pub fn set_removed(&self, removed: &BTreeMap<SubscriberName, u64>) {
        let (name, label, families) =
            ("removed_subscriber_messages", "subscriber", &self.0.families);
        if self.0.sums.get().is_some() {
            let all = removed.values().sum::<u64>() as f64;
            families.set_all(name, label, [(ALL_TOGETHER, all)]);
        } else {
            let each = removed.iter().map(|(name, messages)| (name.as_str(), *messages as f64));
            families.set_all(name, label, each);
        }
    }

    pub fn set_delayed_retries(&self, batches: u64) {
        self.gauge("delayed_retries", &[]).set(batches as f64);
    }

    pub fn set_history_bound(&self, is_bound: bool) {
        self.gauge("history_bound", &[]).set(f64::from(u8::from(is_bound)));
    }

    pub fn set_history_up(&self, up: bool) {
        self.gauge("history_up", &[]).set(f64::from(u8::from(up)));
    }

    /// The times of the first and the last event in history, and the bytes of it.
    pub fn set_history_extent(
        &self,
        first: Option<SystemTime>,
        last: Option<SystemTime>,
        bytes: u64,
    ) {
        let time = |at: Option<SystemTime>| at.map_or(0.0, unix);
        self.gauge("history_first_event_timestamp_seconds", &[]).set(time(first));
        self.gauge("history_last_event_timestamp_seconds", &[]).set(time(last));
        self.gauge("history_size_bytes", &[]).set(bytes as f64);
    }

    pub fn set_history_queue(&self, messages: u64) {
        self.gauge("history_queue_messages", &[]).set(messages as f64);
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

    /// Counts what history lacks: `deliveries`.
    pub fn dropped_history(&self, what: &'static str) -> impl Fn(u64) + Send + Sync + use<> {
        let dropped = self.counter("history_dropped", &[("what", what)]);
        move |number| {
            dropped.inc_by(number);
        }
    }

    pub fn set_queue_up(&self, up: bool) {
        self.gauge("queue_up", &[]).set(f64::from(up));
    }

    /// Counts a connection of this role as open until the guard is dropped.
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

    /// Counts events taken over HTTP, by whether a subscriber's pattern matches them.
    pub fn accepted(&self, matched: u64, unmatched: u64) {
        self.counter("events_accepted", &[("matched", "true")]).inc_by(matched);
        self.counter("events_accepted", &[("matched", "false")]).inc_by(unmatched);
    }

    pub fn relayed(&self, result: &'static str, events: u64) {
        self.counter("events_relayed", &[("result", result)]).inc_by(events);
    }

    /// Counts events that came through a broker into the embedded queue.
    pub fn taken_in(&self, result: &'static str, events: u64) {
        self.counter("intake_events", &[("result", result)]).inc_by(events);
    }

    pub fn set_intake_up(&self, up: bool) {
        self.gauge("intake_up", &[]).set(f64::from(up));
    }

    pub fn set_intake_waiting(&self, messages: u64) {
        self.gauge("intake_queue_messages", &[]).set(messages as f64);
    }

    /// What the lanes of the embedded queue have in hand, how many stand in line for more, and how many
    /// are behind what is in memory.
    pub fn set_lanes(&self, in_hand: usize, in_line: usize, behind: usize) {
        self.gauge("in_hand_bytes", &[]).set(in_hand as f64);
        self.gauge("lanes_in_line", &[]).set(in_line as f64);
        self.gauge("lanes_behind", &[]).set(behind as f64);
    }

    /// Counts reads for lanes that are behind, and the events that they have found.
    pub fn passed(&self, reads: u64, events: u64) {
        self.counter("pass_reads", &[]).inc_by(reads);
        self.counter("pass_events", &[]).inc_by(events);
    }

    /// The configuration was read, at the start or by a reload.
    pub fn configured(&self, subscribers: usize, now: SystemTime) {
        self.gauge("subscribers", &[]).set(subscribers as f64);
        self.gauge("config_last_reload_successful", &[]).set(1.0);
        self.gauge("config_last_reload_success_timestamp_seconds", &[]).set(unix(now));
    }

    /// Counts a reload; `ok`: its configuration was right.
    pub fn reloaded(&self, ok: bool) {
        self.counter("config_reloads", &[("result", if ok { "success" } else { "failure" })]).inc();
        self.gauge("config_last_reload_successful", &[]).set(f64::from(ok));
    }

    fn counter(&self, name: &'static str, labels: &[(&'static str, &str)]) -> Counter {
        self.0.families.counter(name, labels)
    }

    fn gauge(&self, name: &'static str, labels: &[(&'static str, &str)]) -> Float {
        self.0.families.gauge(name, labels)
    }

    fn report_process(&self) {
        let Usage { cpu_seconds, resident_bytes, threads, open_fds } = Usage::now();
        if let Some(seconds) = cpu_seconds {
            self.0.cpu.inc_by((seconds - self.0.cpu.get()).max(0.0));
        }
        for (name, value) in [
            ("process_resident_memory_bytes", resident_bytes),
            ("process_threads", threads),
            ("process_open_fds", open_fds),
        ] {
            if let Some(value) = value {
                self.gauge(name, &[]).set(value);
            }
        }
    }
}

/// Counts a connection as open.
#[derive(Debug)]
pub struct OpenConnection(Float);

impl Drop for OpenConnection {
    fn drop(&mut self) {
        self.0.dec();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        delivery::{AttemptLog, Batch, BatchId, Reason},
        event::payload::Format,
        policy::circuit_breaker::CircuitState,
        telemetry::lane_event::{Died, LaneEvent, Settled},
    };
    use std::{collections::BTreeSet, time::Duration};

    fn metrics() -> Metrics {
        Metrics::new(SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000))
    }

    /// The names in an exposition, from the lines with their types.
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
        m.set_history_bound(true);
        m.set_history_queue(3);
        m.set_history_up(true);
        m.set_history_extent(None, None, 1);
        m.set_queue_up(true);
        let open = m.connection("publishing");
        assert!(m.expose().contains("hooktrail_broker_connections{role=\"publishing\"} 1"));
        drop(open);
        m.connected("publishing", true);
        m.accepted(1, 2);
        m.relayed("routed", 1);
        m.taken_in("stored", 1);
        m.set_intake_waiting(1);
        m.set_intake_up(true);
        m.set_lanes(1, 2, 3);
        m.passed(1, 2);
        m.set_held_removals(1);
        m.dropped_lines()(1);
        m.dropped_history("deliveries")(1);
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
    fn plain_text_names_counters_as_their_samples_and_both_formats_are_in_a_lasting_order() {
        let m = metrics();
        for name in ["c", "a", "b,le", "d"] {
            let subscriber = m.subscriber(name);
            subscriber.count(&LaneEvent::Taken { events: 3 });
            let batch = Batch {
                id: BatchId::from("msg_1"),
                body: "{}".into(),
                format: Format::Json,
                events: 7,
                attempts: 1,
                first_attempt_at: None,
                traceparent: None,
                attempt_log: AttemptLog::default(),
                prints: None,
                replay: false,
            };
            let started = LaneEvent::AttemptStarted { number: 1, batch: &batch, sha256: None };
            subscriber.count(&started);
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
        let died = Died {
            reason: Reason::Exhausted,
            batch_id: None,
            format: None,
            events: 1,
            bytes: 2,
            prints: None,
        };
        a.count(&LaneEvent::Settled(Settled::DeadLetters(vec![died; 2])));
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
    fn subscribers_without_series_of_their_own_are_counted_together_and_take_back_what_they_added()
    {
        let m = metrics();
        m.sum_subscribers();
        let (a, b) = (m.subscriber("a"), m.subscriber("b"));
        for (one, queues) in [(&a, [3, 1, 0]), (&b, [4, 0, 2])] {
            one.count(&LaneEvent::Taken { events: 5 });
            one.set_up(true);
            one.set_circuit(CircuitState::Closed, None);
            one.set_retries(2, Some(SystemTime::UNIX_EPOCH));
            one.set_oldest(Some(SystemTime::UNIX_EPOCH));
            one.set_queues([9; 3]);
            one.set_queues(queues);
        }
        a.set_circuit(CircuitState::Open, Some(SystemTime::UNIX_EPOCH));
        let value = |series: &str| {
            let text = m.expose();
            let start = format!("hooktrail_{series}}} ");
            let line = text.lines().find_map(|line| line.strip_prefix(&start));
            line.map(|value| value.parse::<f64>().expect("a number"))
        };
        let together = [
            ("lane_up{subscriber=\"*\"", 2.0, 1.0),
            ("circuit_state{subscriber=\"*\",state=\"open\"", 1.0, 1.0),
            ("circuit_state{subscriber=\"*\",state=\"closed\"", 1.0, 0.0),
            ("retries_waiting{subscriber=\"*\"", 4.0, 2.0),
            ("queue_messages{subscriber=\"*\",queue=\"main\"", 7.0, 3.0),
            ("queue_messages{subscriber=\"*\",queue=\"dead\"", 2.0, 0.0),
            ("events_received_total{subscriber=\"*\"", 10.0, 10.0),
        ];
        for (series, of_both, _) in together {
            assert_eq!(value(series), Some(of_both), "{series}");
        }
        drop(b);
        m.forget("b");
        for (series, _, of_a) in together {
            assert_eq!(value(series), Some(of_a), "{series}");
        }
        m.set_removed(&[("gone".into(), 3), ("too".into(), 4)].into());
        assert_eq!(value("removed_subscriber_messages{subscriber=\"*\""), Some(7.0));
        let text = m.expose();
        assert!(!text.contains("timestamp_seconds{") && !text.contains("=\"a\""), "{text}");
    }

    #[test]
    fn the_process_is_exposed_with_its_usage() {
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
    }
}

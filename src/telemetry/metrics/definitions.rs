//! The one list of metrics: the exposition, docs/metrics.md, the shipped alerts and the dashboard
//! are held to it by tests. Units are base units (seconds, bytes); no label holds a URL or a
//! secret.

use std::fmt::Write as _;

/// The prefix of each name.
pub const PREFIX: &str = "hooktrail_";

/// The kind of a metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Only grows, from 0 at each start; exposed as `NAME_total`.
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
    /// The name without [`PREFIX`] and without the `_total` of a counter.
    pub name: &'static str,
    pub kind: Kind,
    pub labels: &'static [&'static str],
    pub help: &'static str,
}

impl Definition {
    /// The name in the exposition; for a histogram without the suffixes.
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

/// All metrics, in the order of the documentation.
pub const ALL: &[Definition] = &[
    counter(
        "events_received",
        SUBSCRIBER,
        "Events taken from the subscriber's queue; one that is requeued and taken again counts again",
    ),
    counter("events_delivered", SUBSCRIBER, "Events that the receiver has accepted"),
    counter(
        "events_recognised",
        SUBSCRIBER,
        "Events that were redelivered after a lost connection to the broker and acked without a request: they were settled before (delivered, stored for a retry, or dead letters), and only the ack was lost",
    ),
    counter(
        "attempts",
        &["subscriber", "outcome"],
        "Attempts by their outcome: delivered, retry, split, dead_letter, paused",
    ),
    counter(
        "attempt_failures",
        &["subscriber", "failure"],
        "Failed attempts by their failure: status (any answer that is no success), dns, address_blocked, connect, tls, timeout, reset, bad_answer, auth (there is no token), internal",
    ),
    counter(
        "unsent_requests",
        SUBSCRIBER,
        "Requests of which nothing could be sent, because this machine lacks file descriptors or ports, or because over HTTP/2 no stream got free; they are no attempts",
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
        "From the arrival of a batch's first event (its publication where the queue knows that, else when the daemon took it) to the answer that accepted the batch",
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
        "compression_refused",
        SUBSCRIBER,
        "1 while requests are sent plain although http.compression is set, because the receiver answered 415 to a compressed one; else 0",
    ),
    gauge(
        "lane_up",
        SUBSCRIBER,
        "1 while the lane has its queue, or does without it because it is paused or waits; 0 while the queue fails, its bindings or the ways of its retries are missing",
    ),
    counter(
        "events_filtered",
        SUBSCRIBER,
        "Events that match its patterns and not its key `match`: they are acked without an attempt",
    ),
    counter(
        "rate_waits",
        SUBSCRIBER,
        "Attempts that waited because of http.rate; where it grows as fast as attempts do, the rate is the limit",
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
        "Batches of all subscribers that are not due for their retry yet",
    ),
    gauge(
        "orphans",
        &[],
        "Orphans, the dead letters of no subscriber: retries without their subscriber's queue, and what is no event in a source queue or in the queue of `[queue] intake`",
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
        "history_up",
        &[],
        "1 while events and deliveries go into history, else 0: the status says why; absent where none is kept",
    ),
    gauge(
        "history_first_event_timestamp_seconds",
        &[],
        "The time of the oldest event in history, in Unix seconds; 0 without any",
    ),
    gauge(
        "history_last_event_timestamp_seconds",
        &[],
        "The time of the last event in history, in Unix seconds; 0 without any",
    ),
    gauge("history_size_bytes", &[], "Bytes of the file of history"),
    gauge(
        "history_bound",
        &[],
        "On RabbitMQ 1 while the queue of history gets every event; 0 while it is off, young or unusable, and history has a gap",
    ),
    gauge(
        "history_queue_messages",
        &[],
        "Events in RabbitMQ that wait for history, without those that a daemon has taken",
    ),
    gauge(
        "broker_connections",
        &["role"],
        "Open connections to the broker: consuming, publishing, relaying, declaring; of the embedded queue: intake",
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
    counter(
        "intake_events",
        &["result"],
        "Events that came through the RabbitMQ of `[queue] intake` into the embedded queue: stored, unmatched (no pattern matches them), known (redelivered, and stored before), invalid (dead letters: `hooktrail dead list @log`)",
    ),
    gauge(
        "intake_up",
        &[],
        "1 while events are taken from the RabbitMQ of `[queue] intake`, or another daemon takes them, else 0",
    ),
    gauge(
        "intake_queue_messages",
        &[],
        "Events that wait in the RabbitMQ of `[queue] intake`, without those that a daemon has taken; each 10 s",
    ),
    gauge(
        "in_hand_bytes",
        &[],
        "Bytes of the events and batches that the subscribers of the embedded queue have in hand, as they count for the memory of all: above 64 MiB they take in turn; each second",
    ),
    gauge(
        "lanes_in_line",
        &[],
        "Subscribers of the embedded queue that wait for their turn to take more; each second",
    ),
    gauge(
        "lanes_behind",
        &[],
        "Subscribers for which older events are read from the embedded queue, which are not in memory any more; without those of a tenant, which read by themselves; each second",
    ),
    counter(
        "pass_reads",
        &[],
        "Reads of the embedded queue for subscribers that are behind: each serves all that come by there",
    ),
    counter("pass_events", &[], "Events that these reads have found for them"),
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
        "Subscribers that the configuration does not have any more and that are served or bound all the same: this number is not removed by a changed file or a start, but by a reload that an operator requests",
    ),
    counter(
        "log_lines_dropped",
        &[],
        "Lines of the log that were dropped because they were not read in time; their number is logged when the log is read again",
    ),
    counter(
        "history_dropped",
        &["what"],
        "What history lacks because the store did not take it in time: deliveries (changes of them)",
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
         `src/telemetry/metrics/definitions.rs`, and a test holds it to that.\n\n\
         Each subscriber has about a hundred series, which the daemon keeps and Prometheus stores. Where more than 1,000 subscribers are configured\n\
         when the daemon starts, or as `[metrics] per_subscriber` says, all are counted together: `subscriber` is `*`, which is nobody's name;\n\
         counters and histograms count all, and a gauge is the sum of all, so `hooktrail_paused` is how many are paused. A point in time\n\
         has no sum: those of subscribers are absent. Who it is that fails, waits or is paused, the status and the console say then.\n\n| metric | type | labels | |\n|---|---|---|---|\n",
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

#[cfg(test)]
mod tests {
    use super::*;

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

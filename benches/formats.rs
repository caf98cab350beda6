//! What each format costs, and compression, redaction and a match: the CPU time of the daemon for an
//! event that is delivered from the embedded queue, beside that of `json`.
//!
//! `cargo bench --bench formats`. HOOKTRAIL_BENCH_EVENTS (100000) and HOOKTRAIL_BENCH_ROUNDS (3)
//! change its size. All take turns; medians are printed.

#![allow(
    clippy::disallowed_methods,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a benchmark reads the clock and prints"
)]

mod shared;
#[path = "../tests/it/support/mod.rs"]
mod support;

use std::sync::Arc;

use shared::{BATCH, Counter, EVENT, median, number, process_figures, receive};
use support::{
    api::Api,
    daemon::{Setup, subscriber},
    eventually,
};

const GROUPS: &str = "[http]\nallow_http = true\nallow_private_addresses = true\n[batch]\nmax_events = 100\n[log]\nlevel = \"info\"\n[history]\nretention = \"0s\"\n";

/// What is compared; the first is what the others are held against.
const VARIANTS: [(&str, &str); 11] = [
    ("json", ""),
    ("jsonl", "format = \"jsonl\""),
    ("json_array", "format = \"json_array\""),
    ("splunk_hec", "format = \"splunk_hec\"\nsource = \"audit\"\nindex = \"main\""),
    ("cloudevents_batch", "format = \"cloudevents_batch\"\nsource = \"/audit\""),
    ("slack", "format = \"slack\""),
    ("gzip", "http.compression = \"gzip\""),
    ("redact of two", "redact = [\"/actor/name\", \"/changes/*/from\"]"),
    (
        "redact of two, hmac",
        "redact = [\"/actor/name\", \"/changes/*/from\"]\nredact_with = { hmac = \"a key\" }",
    ),
    ("match of two", "match = { \"/actor/type\" = [\"user\"], \"/timestamp\" = [1733739084] }"),
    ("single", "format = \"single\""),
];

fn main() {
    support::run(compare());
}

async fn compare() {
    let events = number("HOOKTRAIL_BENCH_EVENTS", 100_000);
    let rounds = number("HOOKTRAIL_BENCH_ROUNDS", 3);
    println!(
        "{events} events of {} bytes, batches of {BATCH}, {rounds} rounds; daemon and receiver on this machine",
        EVENT.len()
    );
    let mut all = vec![Vec::new(); VARIANTS.len()];
    for _ in 0..rounds {
        for ((_, lines), figures) in VARIANTS.iter().zip(&mut all) {
            figures.push(cpu_of(lines, events).await * 1e6 / events as f64);
        }
    }
    let json = median(all[0].iter().copied());
    println!("\n{:<22}{:>16}{:>12}{:>12}", "", "CPU µs/event", "more", "ratio");
    for ((name, _), figures) in VARIANTS.iter().zip(all) {
        let figure = median(figures);
        println!("{name:<22}{figure:>16.2}{:>12.2}{:>12.2}", figure - json, figure / json);
    }
}

/// The CPU seconds of a daemon that delivers a backlog to one subscriber.
async fn cpu_of(lines: &str, events: u64) -> f64 {
    let url = receive(Arc::new(Counter::default())).await;
    let api = Api::new();
    let text = format!(
        "[queue]\nurl = \"embedded\"\n{GROUPS}{}{}",
        api.section(),
        subscriber("bench", &url, lines)
    );
    let setup = Setup::with_text(&text);
    let backlog =
        setup.write("events", [EVENT, "\n"].concat().repeat(usize::try_from(events).expect("few")));
    setup.ok(&["publish", backlog.to_str().expect("a path")]);
    let daemon = setup.start().await;
    let series = "hooktrail_events_delivered_total{subscriber=\"bench\"}";
    eventually("all events are delivered", async || {
        api.metric(series).await == Some(events as f64)
    })
    .await;
    let (cpu_seconds, _) = process_figures(daemon.pid());
    daemon.stop().await;
    cpu_seconds
}

//! The cost of many subscribers on the embedded queue: each event for all of them, each for one of
//! them, and no event at all.
//!
//! `cargo bench --bench subscribers`. HOOKTRAIL_BENCH_SUBSCRIBERS (`100 1000 10000`) and
//! HOOKTRAIL_BENCH_DELIVERIES (1000000, a tenth of it where each event is for one) change its size.
//! The daemon and the receiver need a file descriptor for each subscriber.

#![allow(
    clippy::disallowed_methods,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a benchmark reads the clock and prints"
)]

#[allow(dead_code, reason = "shared by benchmarks that need different parts of it")]
mod shared;
#[path = "../tests/it/support/mod.rs"]
mod support;

use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use hooktrail::queue::{MAX_GROUP, NewEvent, Queue};
use shared::{BATCH, Counter, EVENT, number, process_figures, receive};
use support::{
    api::Api,
    daemon::{Setup, subscriber},
    eventually,
    queue::Embedded,
};
use tokio::net::TcpStream;

/// Settings of all subscribers here.
const GROUPS: &str = "[http]\nallow_http = true\nallow_private_addresses = true\n[batch]\nmax_events = 100\nmax_wait = \"1s\"\n[log]\nlevel = \"warn\"\n";

/// The time over which an idle daemon is watched.
const IDLE: Duration = Duration::from_secs(20);

/// The type of the events that every subscriber gets.
const FOR_ALL: &str = "all.updated";

fn main() {
    support::run(compare());
}

async fn compare() {
    let deliveries = number("HOOKTRAIL_BENCH_DELIVERIES", 1_000_000);
    let sizes = std::env::var("HOOKTRAIL_BENCH_SUBSCRIBERS");
    let sizes = sizes.unwrap_or_else(|_| "100 1000 10000".to_owned());
    println!(
        "events of {} bytes, batches of at most {BATCH}; daemon, producer and receiver on this machine\n",
        EVENT.len()
    );
    println!(
        "{:>11}{:>10}{:>9}{:>24}{:>28}{:>11}",
        "subscribers",
        "ready",
        "idle CPU",
        "for all: rate, CPU each",
        "for one each: rate, CPU each",
        "peak"
    );
    for size in sizes.split_whitespace() {
        let size: u64 = size.parse().expect("a number of subscribers");
        let line = measure(size, deliveries.div_ceil(size), deliveries / 10).await;
        println!("{size:>11}{line}");
    }
}

/// The figures of a daemon with so many subscribers: `for_all` events that each of them gets, then
/// `for_one` events of which each is for one of them.
async fn measure(size: u64, for_all: u64, for_one: u64) -> String {
    let counter = Arc::new(Counter::default());
    let url = receive(counter.clone()).await;
    let all: String = (0..size)
        .map(|n| {
            let patterns = format!("events = [\"all.#\", \"acct-{n}.#\"]");
            subscriber(&format!("bench-{n}"), &url, &patterns)
        })
        .collect();
    let queue = Embedded::new();
    let api = Api::new();
    let setup = Setup::new(&queue, &format!("{}{GROUPS}{all}", api.section()));
    let begun = Instant::now();
    let daemon = setup.spawn();
    eventually("it is ready", async || {
        let listens = TcpStream::connect(("127.0.0.1", api.port)).await.is_ok();
        listens && api.get("/readyz").await.status == 200
    })
    .await;
    let ready = begun.elapsed();
    let producer = queue.open();
    let cpu = || process_figures(daemon.pid()).0;
    // What follows the start is not idle.
    tokio::time::sleep(Duration::from_secs(3)).await;
    let before = cpu();
    tokio::time::sleep(IDLE).await;
    let idle = (cpu() - before) / IDLE.as_secs_f64();
    let mut line = format!("{:>8.1} s{:>7.2} %", ready.as_secs_f64(), idle * 100.0);
    let accounts = (0..for_one).map(|n| format!("acct-{}.updated", n * 7919 % size));
    let shared = (0..for_all).map(|_| FOR_ALL.to_owned());
    let rounds: [(u64, Box<dyn Iterator<Item = String>>, usize); 2] =
        [(for_all * size, Box::new(shared), 24), (for_one, Box::new(accounts), 28)];
    for (deliveries, types, width) in rounds {
        let (before, begun) = (cpu(), Instant::now());
        let expected = counter.events.load(Ordering::Relaxed) + deliveries;
        publish(&producer, types).await;
        eventually("all is delivered", async || counter.events.load(Ordering::Relaxed) >= expected)
            .await;
        let rate = deliveries as f64 / begun.elapsed().as_secs_f64();
        let each = (cpu() - before) * 1e6 / deliveries as f64;
        line += &format!("{:>width$}", format!("{rate:.0}/s, {each:.2} µs"));
    }
    let (_, peak) = process_figures(daemon.pid());
    assert!(daemon.stop().await.success());
    format!("{line}{:>7.0} MiB", peak)
}

async fn publish(queue: &impl Queue, types: impl Iterator<Item = String>) {
    let event = |event_type| NewEvent {
        event_type,
        message_id: None,
        body: EVENT.into(),
        traceparent: None,
        tenant: None,
    };
    let mut events = types.map(event).peekable();
    while events.peek().is_some() {
        queue.publish(events.by_ref().take(MAX_GROUP).collect()).await.expect("publishes");
    }
}

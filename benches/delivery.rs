//! The cost of delivery, against the floor: a bare consumer of the same broker that drains the same
//! number of the same events with multiple acks, and does nothing with them.
//!
//! `cargo bench --bench delivery` starts a broker of its own unless HOOKTRAIL_TEST_AMQP_URL names
//! one. HOOKTRAIL_BENCH_EVENTS (200000), HOOKTRAIL_BENCH_ROUNDS (3) and HOOKTRAIL_BENCH_BACKLOG
//! (500000, for the peak memory) change its size. Floor and hooktrail take turns; medians are
//! printed.

#![allow(
    clippy::disallowed_methods,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a benchmark reads the clock and prints"
)]

mod shared;
#[path = "../tests/it/support/mod.rs"]
mod support;

use std::{
    process::{Command, Stdio},
    sync::{Arc, atomic::Ordering},
    time::Instant,
};

use futures_util::StreamExt as _;
use lapin::{
    options::{
        BasicAckOptions, BasicConsumeOptions, BasicQosOptions, QueueDeclareOptions,
        QueueDeleteOptions,
    },
    types::{AMQPValue, FieldTable},
};
use shared::{BATCH, Counter, EVENT, median, number, process_figures, receive};
use support::{
    broker::{Broker, connect},
    daemon::Setup,
    eventually,
};

/// The figures of one run.
#[derive(Clone, Copy)]
struct Figures {
    seconds: f64,
    cpu_seconds: f64,
    peak_mib: f64,
}

fn main() {
    match std::env::var("HOOKTRAIL_BENCH_FLOOR") {
        Ok(arguments) => support::run(floor_process(arguments)),
        Err(_) => support::run(compare()),
    }
}

async fn compare() {
    let events = number("HOOKTRAIL_BENCH_EVENTS", 200_000);
    let rounds = number("HOOKTRAIL_BENCH_ROUNDS", 3);
    let backlog = number("HOOKTRAIL_BENCH_BACKLOG", 500_000);
    let broker = if std::env::var("HOOKTRAIL_TEST_AMQP_URL").is_ok() {
        Broker::shared()
    } else {
        Broker::private().await
    };
    println!(
        "{events} events of {} bytes, batches of {BATCH}, {rounds} rounds; broker, worker and receiver on this machine",
        EVENT.len()
    );
    let mut floors = Vec::new();
    let mut ours = Vec::new();
    for _ in 0..rounds {
        floors.push(floor(&broker, events).await);
        ours.push(hooktrail(&broker, events).await);
    }
    let peak = hooktrail(&broker, backlog).await.peak_mib;
    let median = |of: &dyn Fn(&Figures) -> f64, all: &[Figures]| median(all.iter().map(of));
    let rate = |f: &Figures| events as f64 / f.seconds;
    let cpu = |f: &Figures| f.cpu_seconds * 1e6 / events as f64;
    println!("\n{:<12}{:>12}{:>16}{:>12}", "", "events/s", "CPU µs/event", "peak MiB");
    for (name, all) in [("floor", &floors), ("hooktrail", &ours)] {
        println!(
            "{name:<12}{:>12.0}{:>16.2}{:>12.1}",
            median(&rate, all),
            median(&cpu, all),
            median(&|f| f.peak_mib, all)
        );
    }
    println!(
        "{:<12}{:>12.2}{:>16.2}",
        "ratio",
        median(&rate, &ours) / median(&rate, &floors),
        median(&cpu, &ours) / median(&cpu, &floors)
    );
    println!("\npeak memory of hooktrail with a backlog of {backlog} events: {peak:.1} MiB");
}

/// The floor, in a process of its own, so that its CPU time and memory can be measured.
async fn floor(broker: &Broker, events: u64) -> Figures {
    let queue = format!("{}.floor", broker.prefix);
    let (connection, channel) = broker.channel().await;
    let durable = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
    let mut arguments = FieldTable::default();
    arguments.insert("x-queue-type".into(), AMQPValue::LongString("quorum".into()));
    channel.queue_declare(queue.as_str().into(), durable, arguments).await.expect("declares");
    broker.publish_to("", &queue, (0..events).map(|_| EVENT)).await;
    let child = Command::new(std::env::current_exe().expect("this program"))
        .env("HOOKTRAIL_BENCH_FLOOR", format!("{events} {queue} {}", broker.url))
        .stdout(Stdio::piped())
        .spawn()
        .expect("starts");
    let output = tokio::task::spawn_blocking(|| child.wait_with_output())
        .await
        .expect("joins")
        .expect("ends");
    channel
        .queue_delete(queue.as_str().into(), QueueDeleteOptions::default())
        .await
        .expect("deletes");
    connection.close(200, "done".into()).await.expect("closes");
    let text = String::from_utf8(output.stdout).expect("figures");
    let values: Vec<f64> = text.split_whitespace().map(|v| v.parse().expect("a figure")).collect();
    Figures { seconds: values[0], cpu_seconds: values[1], peak_mib: values[2] }
}

async fn floor_process(arguments: String) {
    let mut parts = arguments.splitn(3, ' ');
    let mut next = || parts.next().expect("three arguments");
    let (events, queue, url): (u64, String, String) =
        (next().parse().expect("a number"), next().to_owned(), next().to_owned());
    let connection = connect(&url).await;
    let channel = connection.create_channel().await.expect("a channel");
    channel.basic_qos(2000, BasicQosOptions::default()).await.expect("qos");
    let start = Instant::now();
    let mut consumer = channel
        .basic_consume(
            queue.as_str().into(),
            "".into(),
            BasicConsumeOptions::default(),
            FieldTable::default(),
        )
        .await
        .expect("consumes");
    let mut seen = 0;
    while seen < events {
        let delivery = consumer.next().await.expect("a delivery").expect("a delivery");
        seen += 1;
        if seen % 200 == 0 || seen == events {
            channel
                .basic_ack(delivery.delivery_tag, BasicAckOptions { multiple: true })
                .await
                .expect("acks");
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    let (cpu, peak) = process_figures(std::process::id());
    println!("{seconds} {cpu} {peak}");
    connection.close(200, "done".into()).await.expect("closes");
}

async fn hooktrail(broker: &Broker, events: u64) -> Figures {
    let counter = Arc::new(Counter::default());
    let url = receive(counter.clone()).await;
    let text = format!(
        "[http]\nallow_http = true\nallow_private_addresses = true\nconcurrency = 8\n[batch]\nmax_events = {BATCH}\nmax_wait = \"1s\"\n[log]\nlevel = \"info\"\n{}",
        support::daemon::subscriber("bench", &url, "")
    );
    let setup = Setup::new(broker, &text);
    // Declares the queues, so that the backlog is there before the daemon is.
    let nothing = setup.write("nothing", "");
    setup.ok(&["publish", nothing.to_str().expect("a path")]);
    broker.publish("activity_log.user.updated", (0..events).map(|_| EVENT)).await;
    let daemon = setup.spawn();
    eventually("all events delivered", async || counter.events.load(Ordering::Relaxed) >= events)
        .await;
    let (cpu_seconds, peak_mib) = process_figures(daemon.pid());
    let (first, last) = counter.times.lock().expect("not poisoned").expect("requests");
    daemon.stop().await;
    broker.wait_depth("sub.bench", 0).await;
    Figures { seconds: (last - first).as_secs_f64(), cpu_seconds, peak_mib }
}

//! The cost of delivery from RabbitMQ, next to two that are careless: a bare consumer, which acks 100 messages at
//! once and does nothing with them, and a script of Node's, which batches, signs and sends, and does no more
//! (benches/peers/deliver.mjs).
//!
//! `cargo bench --bench delivery` starts a broker of its own unless HOOKTRAIL_TEST_AMQP_URL names one, and needs what
//! scripts/verifiers installs. All take turns on the same events; medians are printed. A sender is measured from its first
//! request to the last, the bare consumer from its `basic.consume` to its last ack. These change the bench's size:
//!
//! - HOOKTRAIL_BENCH_EVENTS (300000), HOOKTRAIL_BENCH_ROUNDS (5)
//! - HOOKTRAIL_BENCH_SHAPES (`8x100,1x100,8x500,1x500`): requests at once, and events in each
//! - HOOKTRAIL_BENCH_BACKLOG (500000): events that wait when the peak of memory is measured; 0 leaves that out
//! - HOOKTRAIL_BENCH_PEER (`target/verifiers`): the folder of Node's libraries; empty leaves the script out

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
    collections::BTreeMap,
    path::PathBuf,
    process::{Child, Command, Stdio},
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
    daemon::{SECRET, Setup},
    eventually,
};

/// Messages for which the bare consumer writes one ack.
const ACK: u64 = BATCH as u64;

/// The figures of one run.
#[derive(Clone, Copy)]
struct Figures {
    seconds: f64,
    cpu_seconds: f64,
    peak_mib: f64,
}

/// How hooktrail and the script send.
#[derive(Clone, Copy)]
struct Shape {
    concurrency: u64,
    batch: u64,
}

fn main() {
    match std::env::var("HOOKTRAIL_BENCH_FLOOR") {
        Ok(arguments) => {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.expect("a runtime").block_on(floor_process(arguments));
        }
        Err(_) => support::run(compare()),
    }
}

fn shapes() -> Vec<Shape> {
    let text = std::env::var("HOOKTRAIL_BENCH_SHAPES");
    let text = text.unwrap_or_else(|_| "8x100,1x100,8x500,1x500".to_owned());
    let shape = |text: &str| {
        let (concurrency, batch) = text.split_once('x').expect("CONCURRENCYxBATCH");
        let number = |text: &str| text.parse().expect("a number");
        Shape { concurrency: number(concurrency), batch: number(batch) }
    };
    text.split(',').map(shape).collect()
}

/// The folder that `scripts/verifiers` installs into; `None` if the script is to be left out.
fn libraries() -> Option<PathBuf> {
    let folder = match std::env::var_os("HOOKTRAIL_BENCH_PEER") {
        Some(folder) if folder.is_empty() => return None,
        Some(folder) => std::path::absolute(folder).expect("a path"),
        None => {
            let program = PathBuf::from(env!("CARGO_BIN_EXE_hooktrail"));
            program.ancestors().nth(2).expect("the target folder").join("verifiers")
        }
    };
    let there = folder.join("node_modules/amqplib").exists();
    assert!(there, "{} has no amqplib: run scripts/verifiers", folder.display());
    Some(folder)
}

async fn compare() {
    let events = number("HOOKTRAIL_BENCH_EVENTS", 300_000);
    let rounds = number("HOOKTRAIL_BENCH_ROUNDS", 5);
    let backlog = number("HOOKTRAIL_BENCH_BACKLOG", 500_000);
    let libraries = libraries();
    let broker = if std::env::var("HOOKTRAIL_TEST_AMQP_URL").is_ok() {
        Broker::shared()
    } else {
        Broker::private().await
    };
    println!(
        "{events} events of {} bytes, {rounds} rounds; broker, worker and receiver on this machine\n",
        EVENT.len()
    );
    let mut all: BTreeMap<(usize, &str), Vec<Figures>> = BTreeMap::new();
    let shapes = shapes();
    for _ in 0..rounds {
        for (n, shape) in shapes.iter().enumerate() {
            all.entry((n, "bare consumer")).or_default().push(floor(&broker, events).await);
            if let Some(libraries) = &libraries {
                let figures = script(&broker, events, *shape, libraries).await;
                all.entry((n, "Node script")).or_default().push(figures);
            }
            let figures = hooktrail(&broker, events, *shape).await;
            all.entry((n, "hooktrail")).or_default().push(figures);
        }
    }
    let rate = |f: &Figures| events as f64 / f.seconds;
    let cpu = |f: &Figures| f.cpu_seconds * 1e6 / events as f64;
    let of = |n, who, figure: &dyn Fn(&Figures) -> f64| {
        all.get(&(n, who)).map(|all: &Vec<Figures>| median(all.iter().map(figure)))
    };
    for (n, Shape { concurrency, batch }) in shapes.iter().enumerate() {
        println!("{concurrency} requests at once, batches of {batch}");
        println!("{:<16}{:>12}{:>16}{:>12}", "", "events/s", "CPU µs/event", "peak MiB");
        for who in ["bare consumer", "Node script", "hooktrail"] {
            let figures = [&rate as &dyn Fn(&Figures) -> f64, &cpu, &|f| f.peak_mib];
            let [Some(rate), Some(cpu), Some(peak)] = figures.map(|f| of(n, who, f)) else {
                continue;
            };
            println!("{who:<16}{rate:>12.0}{cpu:>16.2}{peak:>12.1}");
        }
        // Of each round, since the machine's speed changes between them.
        for (who, name) in [("bare consumer", "of the bare"), ("Node script", "of the script")] {
            let (Some(theirs), Some(ours)) = (all.get(&(n, who)), all.get(&(n, "hooktrail")))
            else {
                continue;
            };
            let ratio = |figure: &dyn Fn(&Figures) -> f64| {
                median(ours.iter().zip(theirs).map(|(ours, theirs)| figure(ours) / figure(theirs)))
            };
            println!("{name:<16}{:>12.2}{:>16.2}", ratio(&rate), ratio(&cpu));
        }
        println!();
    }
    if backlog > 0 {
        let peak = hooktrail(&broker, backlog, Shape { concurrency: 8, batch: ACK }).await.peak_mib;
        println!("peak memory of hooktrail with {backlog} events waiting: {peak:.1} MiB");
    }
}

/// A queue with so many events in it.
async fn fill(broker: &Broker, events: u64) -> String {
    let queue = format!("{}.bench", broker.prefix);
    let (connection, channel) = broker.channel().await;
    let durable = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
    let mut arguments = FieldTable::default();
    arguments.insert("x-queue-type".into(), AMQPValue::LongString("quorum".into()));
    channel.queue_declare(queue.as_str().into(), durable, arguments).await.expect("declares");
    connection.close(200, "done".into()).await.expect("closes");
    broker.publish_to("", &queue, (0..events).map(|_| EVENT)).await;
    queue
}

async fn remove(broker: &Broker, queue: &str) {
    let (connection, channel) = broker.channel().await;
    channel.queue_delete(queue.into(), QueueDeleteOptions::default()).await.expect("deletes");
    connection.close(200, "done".into()).await.expect("closes");
}

/// The bare consumer, in a process of its own, so that its CPU time and memory can be measured.
async fn floor(broker: &Broker, events: u64) -> Figures {
    let queue = fill(broker, events).await;
    let child = Command::new(std::env::current_exe().expect("this program"))
        .env("HOOKTRAIL_BENCH_FLOOR", format!("{events} {queue} {}", broker.url))
        .stdout(Stdio::piped())
        .spawn()
        .expect("starts");
    let output = tokio::task::spawn_blocking(|| child.wait_with_output())
        .await
        .expect("joins")
        .expect("ends");
    remove(broker, &queue).await;
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
    let (before, _) = process_figures(std::process::id());
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
        if seen % ACK == 0 || seen == events {
            channel
                .basic_ack(delivery.delivery_tag, BasicAckOptions { multiple: true })
                .await
                .expect("acks");
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    let (cpu, peak) = process_figures(std::process::id());
    println!("{seconds} {} {peak}", cpu - before);
    connection.close(200, "done".into()).await.expect("closes");
}

/// The figures of a process that sends, from the first request to the last.
async fn sends(pid: u32, counter: &Counter, events: u64) -> Figures {
    let seen = || counter.events.load(Ordering::Relaxed);
    eventually("the first request", async || seen() > 0).await;
    let (before, _) = process_figures(pid);
    eventually("all events delivered", async || seen() >= events).await;
    let (after, peak_mib) = process_figures(pid);
    let (first, last) = counter.times.lock().expect("not poisoned").expect("requests");
    Figures { seconds: (last - first).as_secs_f64(), cpu_seconds: after - before, peak_mib }
}

/// Ended with the bench, also when that panics.
struct Script(Child);

impl Drop for Script {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

async fn script(broker: &Broker, events: u64, shape: Shape, libraries: &PathBuf) -> Figures {
    let counter = Arc::new(Counter::default());
    let url = receive(counter.clone()).await;
    let queue = fill(broker, events).await;
    let child = Command::new("node")
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/benches/peers/deliver.mjs"))
        .args([&broker.url, &queue, &url, SECRET])
        .args([shape.batch.to_string(), shape.concurrency.to_string()])
        .env("VERIFIERS", libraries)
        .stdin(Stdio::null())
        .spawn()
        .expect("node starts");
    let child = Script(child);
    let figures = sends(child.0.id(), &counter, events).await;
    drop(child);
    remove(broker, &queue).await;
    figures
}

async fn hooktrail(broker: &Broker, events: u64, shape: Shape) -> Figures {
    let counter = Arc::new(Counter::default());
    let url = receive(counter.clone()).await;
    let Shape { concurrency, batch } = shape;
    let text = format!(
        "[http]\nallow_http = true\nallow_private_addresses = true\nconcurrency = {concurrency}\n[batch]\nmax_events = {batch}\nmax_wait = \"1s\"\n[log]\nlevel = \"info\"\n{}",
        support::daemon::subscriber("bench", &url, "")
    );
    let setup = Setup::new(broker, &text);
    // Declares the queues, so that the backlog is there before the daemon is.
    let nothing = setup.write("nothing", "");
    setup.ok(&["publish", nothing.to_str().expect("a path")]);
    broker.publish("activity_log.user.updated", (0..events).map(|_| EVENT)).await;
    let daemon = setup.spawn();
    let figures = sends(daemon.pid(), &counter, events).await;
    daemon.stop().await;
    broker.wait_depth("sub.bench", 0).await;
    figures
}

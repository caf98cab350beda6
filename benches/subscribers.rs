//! The cost of many subscribers on the embedded queue, alone and behind a RabbitMQ (`intake`): each
//! event for all of them, each for one of them, and no event at all.
//!
//! `cargo bench --bench subscribers`. HOOKTRAIL_BENCH_SUBSCRIBERS (`100 1000 10000`),
//! HOOKTRAIL_BENCH_DELIVERIES (1000000, a tenth of it where each event is for one) and
//! HOOKTRAIL_BENCH_QUEUES (`embedded intake`) change its size. `intake` starts a private node, whose
//! CPU has the publishing of the events in it.
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
    collections::VecDeque,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use hooktrail::queue::{MAX_GROUP, NewEvent, Queue};
use lapin::{
    BasicProperties, Confirmation,
    options::{BasicPublishOptions, ConfirmSelectOptions},
};
use shared::{BATCH, Counter, EVENT, number, process_figures, receive};
use support::{
    api::Api,
    broker::Broker,
    daemon::{Setup, subscriber},
    eventually,
    queue::{Embedded, Section},
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
        "{:>9}{:>12}{:>9}{:>10}{:>38}{:>38}{:>11}",
        "",
        "subscribers",
        "ready",
        "idle CPU",
        "for all: rate, CPU each (+ broker)",
        "for one each: rate, CPU each (+ broker)",
        "peak"
    );
    let queues = std::env::var("HOOKTRAIL_BENCH_QUEUES");
    for queue in queues.unwrap_or_else(|_| "embedded intake".to_owned()).split_whitespace() {
        for size in sizes.split_whitespace() {
            let size: u64 = size.parse().expect("a number of subscribers");
            let broker = match queue {
                "embedded" => None,
                "intake" => Some(Broker::private().await),
                other => panic!("HOOKTRAIL_BENCH_QUEUES has `{other}`"),
            };
            let through = Through { queue: Embedded::new(), broker };
            let line = measure(&through, size, deliveries.div_ceil(size), deliveries / 10).await;
            println!("{queue:>9}{size:>12}{line}");
        }
    }
}

/// An embedded queue, and the broker before it.
struct Through {
    queue: Embedded,
    broker: Option<Broker>,
}

impl Section for Through {
    fn section(&self, subscribers: &[&str]) -> String {
        let intake = self.broker.as_ref().map(|Broker { url, prefix, exchange, .. }| {
            format!("intake = \"{url}\"\nprefix = \"{prefix}\"\nexchange = \"{exchange}\"\n")
        });
        self.queue.section(subscribers) + &intake.unwrap_or_default()
    }
}

impl Through {
    async fn publish(&self, types: impl Iterator<Item = String>) {
        match &self.broker {
            None => publish(&self.queue.open(), types).await,
            Some(broker) => publish_over_amqp(broker, types).await,
        }
    }

    /// The CPU seconds of the broker.
    fn broker_cpu(&self) -> f64 {
        self.broker.as_ref().and_then(Broker::pid).map_or(0.0, |pid| process_figures(pid).0)
    }
}

/// The figures of a daemon with so many subscribers: `for_all` events that each of them gets, then
/// `for_one` events of which each is for one of them.
async fn measure(through: &Through, size: u64, for_all: u64, for_one: u64) -> String {
    let counter = Arc::new(Counter::default());
    let url = receive(counter.clone()).await;
    let all: String = (0..size)
        .map(|n| {
            let patterns = format!("events = [\"all.#\", \"acct-{n}.#\"]");
            subscriber(&format!("bench-{n}"), &url, &patterns)
        })
        .collect();
    let api = Api::new();
    let setup = Setup::new(through, &format!("{}{GROUPS}{all}", api.section()));
    let begun = Instant::now();
    let daemon = setup.spawn();
    eventually("it is ready", async || {
        let listens = TcpStream::connect(("127.0.0.1", api.port)).await.is_ok();
        listens && api.get("/readyz").await.status == 200
    })
    .await;
    let ready = begun.elapsed();
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
        [(for_all * size, Box::new(shared), 38), (for_one, Box::new(accounts), 38)];
    for (deliveries, types, width) in rounds {
        let (before, broker, begun) = (cpu(), through.broker_cpu(), Instant::now());
        let expected = counter.events.load(Ordering::Relaxed) + deliveries;
        through.publish(types).await;
        eventually("all is delivered", async || counter.events.load(Ordering::Relaxed) >= expected)
            .await;
        let rate = deliveries as f64 / begun.elapsed().as_secs_f64();
        let each = (cpu() - before) * 1e6 / deliveries as f64;
        let of_broker = (through.broker_cpu() - broker) * 1e6 / deliveries as f64;
        let of_broker = through.broker.as_ref().map(|_| format!(" + {of_broker:.2}"));
        let of_broker = of_broker.unwrap_or_default();
        line += &format!("{:>width$}", format!("{rate:.0}/s, {each:.2}{of_broker} µs"));
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

/// Publishes as a producer does, with up to so many confirms outstanding.
async fn publish_over_amqp(broker: &Broker, types: impl Iterator<Item = String>) {
    const OUTSTANDING: usize = 2000;
    let (connection, channel) = broker.channel().await;
    channel.confirm_select(ConfirmSelectOptions::default()).await.expect("confirms");
    let mut confirms = VecDeque::new();
    for event_type in types {
        let properties = BasicProperties::default().with_delivery_mode(2);
        let options = BasicPublishOptions::default();
        let (exchange, key) = (broker.exchange.as_str().into(), event_type.as_str().into());
        let sent = channel.basic_publish(exchange, key, options, EVENT.as_bytes(), properties);
        confirms.push_back(sent.await.expect("publishes"));
        if confirms.len() == OUTSTANDING {
            let first = confirms.pop_front().expect("is not empty");
            assert_eq!(first.await.expect("an answer"), Confirmation::Ack(None));
        }
    }
    for confirm in confirms {
        assert_eq!(confirm.await.expect("an answer"), Confirmation::Ack(None));
    }
    connection.close(200, "done".into()).await.expect("closes");
}

//! What history costs those who wait for deliveries: the same work with history and without it, in
//! turns.
//!
//! `cargo bench --bench history_price` starts a broker of its own unless HOOKTRAIL_TEST_AMQP_URL
//! names one. HOOKTRAIL_BENCH_EVENTS (300000), HOOKTRAIL_BENCH_ROUNDS (5) and
//! HOOKTRAIL_BENCH_SECONDS (10, of 1,000 events each, for the latency) change its size. Medians are
//! printed; a ratio is the median of those of the rounds.

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
    sync::{
        Arc, OnceLock,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use futures_util::{StreamExt as _, stream::FuturesUnordered};
use lapin::{
    BasicProperties,
    options::{BasicPublishOptions, ConfirmSelectOptions},
};
use shared::{BATCH, Counter, EVENT, median, number, process_figures, receive};
use support::{
    api::{Answered, Api},
    broker::Broker,
    daemon::{Setup, subscriber},
    eventually,
    queue::Queue,
    receiver::{Receiver, event, status},
};

const SETTINGS: &str = "[http]\nallow_http = true\nallow_private_addresses = true\nconcurrency = 8\n[log]\nlevel = \"info\"\n";

/// What reads history over the API.
const TOKEN: &str = "the-token-of-this-benchmark";

fn main() {
    support::run(measure());
}

async fn measure() {
    let events = number("HOOKTRAIL_BENCH_EVENTS", 300_000);
    let rounds = number("HOOKTRAIL_BENCH_ROUNDS", 5);
    let seconds = number("HOOKTRAIL_BENCH_SECONDS", 10);
    println!(
        "{events} events of {} bytes, batches of {BATCH}, {rounds} rounds; all on this machine",
        EVENT.len()
    );
    let broker = if std::env::var("HOOKTRAIL_TEST_AMQP_URL").is_ok() {
        Broker::shared()
    } else {
        Broker::private().await
    };
    for name in ["embedded", "RabbitMQ"] {
        let queue = || match name {
            "embedded" => Queue::embedded(),
            _ => Queue::Amqp(broker.sibling()),
        };
        let (mut with, mut without) = (Vec::new(), Vec::new());
        for _ in 0..rounds {
            without.push(backlog(&queue(), events, false).await);
            with.push(backlog(&queue(), events, true).await);
        }
        println!("\n{name}: a backlog is delivered to one subscriber");
        println!(
            "{:<18}{:>12}{:>22}{:>22}{:>20}",
            "", "events/s", "daemon, µs/event", "broker, µs/event", "not in history"
        );
        let each = |seconds: f64| seconds * 1e6 / events as f64;
        for (name, all) in [("without history", &without), ("with history", &with)] {
            println!(
                "{name:<18}{:>12.0}{:>22.1}{:>22.1}{:>20.0}",
                median(all.iter().map(|f| events as f64 / f.seconds)),
                median(all.iter().map(|f| each(f.daemon))),
                median(all.iter().map(|f| each(f.broker))),
                median(all.iter().map(|f| f.behind as f64)),
            );
        }
        let ratios =
            with.iter().zip(&without).map(|(with, without)| without.seconds / with.seconds);
        println!("delivery with history, of that without it: {:.2}", median(ratios));
        for history in [false, true] {
            let mut latencies = Vec::new();
            for _ in 0..rounds {
                latencies.push(latency(&queue(), seconds, history).await);
            }
            println!(
                "1,000 events/s, {}: half arrive within {:.1} ms, 99 of 100 within {:.1} ms",
                if history { "with history" } else { "without history" },
                median(latencies.iter().map(|l| l.0)),
                median(latencies.iter().map(|l| l.1)),
            );
        }
    }
}

/// Of the delivery of one backlog.
struct Figures {
    seconds: f64,
    /// CPU seconds of the daemon until the last event had arrived.
    daemon: f64,
    /// CPU seconds of the broker since before the events were published, so with its copy into the
    /// queue of history; 0 where it is not a process of ours.
    broker: f64,
    /// Events that were not in history yet when the last one had arrived.
    behind: u64,
}

async fn backlog(queue: &Queue, events: u64, kept: bool) -> Figures {
    let counter = Arc::new(Counter::default());
    let url = receive(counter.clone()).await;
    let (setup, api) = daemon(queue, kept, &url, "max_events = 100\nmax_wait = \"1s\"\n");
    let daemon = setup.start().await;
    let mut delivered = 0;
    if kept {
        eventually("history has begun", async || {
            queue.publish("activity_log.user.updated", [EVENT]).await;
            delivered += 1;
            last(&api).await.is_some()
        })
        .await;
    }
    eventually("those are delivered", async || counter.events.load(Ordering::Relaxed) >= delivered)
        .await;
    let begun = if kept { settled(&api).await } else { 0 };
    daemon.stop().await;
    let pid = match queue {
        Queue::Amqp(broker) => broker.pid(),
        Queue::Embedded(_) => None,
    };
    let of_broker = || pid.map_or(0.0, |pid| process_figures(pid).0);
    let broker_before = of_broker();
    // While no daemon runs, so that history and delivery begin together.
    queue.publish("activity_log.user.updated", (0..events).map(|_| EVENT)).await;
    *counter.times.lock().expect("not poisoned") = None;
    let daemon = setup.spawn();
    eventually("all events delivered", async || {
        counter.events.load(Ordering::Relaxed) >= events + delivered
    })
    .await;
    let after = process_figures(daemon.pid()).0;
    let stored = if kept { last(&api).await.expect("events") - begun } else { events };
    let (first, last) = counter.times.lock().expect("not poisoned").expect("requests");
    let broker = of_broker() - broker_before;
    daemon.stop().await;
    Figures {
        seconds: (last - first).as_secs_f64(),
        daemon: after,
        broker,
        behind: events - stored.min(events),
    }
}

/// The number of the latest event in history.
async fn last(api: &Api) -> Option<u64> {
    let token = format!("Bearer {TOKEN}");
    let answer = api.send("GET", "/api/v1/events?limit=1", &[("authorization", &token)], "").await;
    answer.json()["events"][0]["number"].as_u64()
}

/// The same, once no more come.
async fn settled(api: &Api) -> u64 {
    let mut before = None;
    loop {
        tokio::time::sleep(Duration::from_secs(1)).await;
        let now = last(api).await;
        if now == before {
            return now.expect("events");
        }
        before = now;
    }
}

/// A daemon that is not running yet.
fn daemon(queue: &Queue, kept: bool, url: &str, batch: &str) -> (Setup, Api) {
    // So much that nothing is removed meanwhile.
    let history = if kept { "max_bytes = \"2GiB\"" } else { "retention = \"0s\"" };
    let api = Api::new();
    let setup = Setup::new(
        queue,
        &format!(
            "{}token = \"{TOKEN}\"\n{SETTINGS}[history]\n{history}\n[batch]\n{batch}{}",
            api.section(),
            subscriber("bench", url, "")
        ),
    );
    (setup, api)
}

/// Within how many milliseconds half of the events, and 99 of 100, arrive: 1,000 are published each
/// second.
async fn latency(queue: &Queue, seconds: u64, kept: bool) -> (f64, f64) {
    let count = usize::try_from(seconds * 1000).expect("few");
    let arrived: Arc<Vec<OnceLock<Instant>>> =
        Arc::new((0..count).map(|_| OnceLock::new()).collect());
    let missing = Arc::new(AtomicUsize::new(count));
    let receiver = Receiver::start({
        let (arrived, missing) = (arrived.clone(), missing.clone());
        move |request, _| {
            let now = Instant::now();
            for number in request.numbers() {
                let first = arrived.get(usize::try_from(number).expect("few"));
                if first.is_some_and(|first| first.set(now).is_ok()) {
                    missing.fetch_sub(1, Ordering::Relaxed);
                }
            }
            status(200)
        }
    })
    .await;
    let (setup, api) = daemon(queue, kept, &receiver.url, "max_wait = \"0s\"\n");
    let daemon = setup.start().await;
    // A number that is not counted: when it is in history, history has begun.
    let uncounted = event(u64::MAX);
    if kept {
        eventually("history has begun", async || {
            queue.publish("activity_log.user.updated", [&uncounted]).await;
            last(&api).await.is_some()
        })
        .await;
    }
    let sent = publish(queue, &api, count).await;
    let all = eventually("all events arrived", async || missing.load(Ordering::Relaxed) == 0);
    if tokio::time::timeout(Duration::from_secs(60), all).await.is_err() {
        let missing: Vec<usize> = (0..count).filter(|n| arrived[*n].get().is_none()).collect();
        panic!("these were confirmed and have not arrived: {missing:?}\n{}", daemon.log());
    }
    daemon.stop().await;
    let mut waits: Vec<f64> = sent
        .iter()
        .zip(arrived.iter())
        .map(|(sent, arrived)| (*arrived.get().expect("arrived") - *sent).as_secs_f64() * 1e3)
        .collect();
    waits.sort_by(f64::total_cmp);
    (waits[count / 2], waits[count * 99 / 100])
}

/// One each millisecond, whatever becomes of those before; when each was handed over.
async fn publish(queue: &Queue, api: &Api, count: usize) -> Vec<Instant> {
    let mut ticks = tokio::time::interval(Duration::from_millis(1));
    let mut sent = Vec::with_capacity(count);
    match queue {
        Queue::Amqp(broker) => {
            let (connection, channel) = broker.channel().await;
            let confirmed = ConfirmSelectOptions::default();
            channel.confirm_select(confirmed).await.expect("selects");
            let mut confirms = Vec::with_capacity(count);
            for n in 0..count {
                ticks.tick().await;
                sent.push(Instant::now());
                let published = channel
                    .basic_publish(
                        broker.exchange.as_str().into(),
                        "activity_log.user.updated".into(),
                        BasicPublishOptions::default(),
                        event(n as u64).as_bytes(),
                        BasicProperties::default().with_delivery_mode(2),
                    )
                    .await
                    .expect("publishes");
                confirms.push(published);
            }
            for confirm in confirms {
                let confirmation = confirm.await.expect("confirms");
                assert!(confirmation.is_ack(), "{confirmation:?}");
            }
            connection.close(200, "done".into()).await.expect("closes");
        }
        Queue::Embedded(_) => {
            let token = format!("Bearer {TOKEN}");
            let headers = [("authorization", token.as_str()), ("content-type", "application/json")];
            let bodies: Vec<String> = (0..count).map(|n| event(n as u64)).collect();
            let mut requests = FuturesUnordered::new();
            for body in &bodies {
                loop {
                    tokio::select! {
                        biased;
                        _ = ticks.tick() => break,
                        Some(answer) = requests.next() => {
                            let answer: Answered = answer;
                            assert_eq!(answer.status, 202, "{answer:?}");
                        }
                    }
                }
                sent.push(Instant::now());
                requests.push(api.send("POST", "/api/v1/events", &headers, body));
            }
            while let Some(answer) = requests.next().await {
                assert_eq!(answer.status, 202, "{answer:?}");
            }
        }
    }
    sent
}

//! What the console's pages cost with much behind them: 1,000 subscribers of the embedded queue,
//! 10,000 dead letters, and a history of many events.
//!
//! `cargo bench --bench console -- 1000000`: the argument is the number of events in history
//! (1,000,000). HOOKTRAIL_BENCH_DIR names a directory for the files; HOOKTRAIL_BENCH_QUERIES (200)
//! is the number of times that each page is asked for. The times are those of a client on this
//! machine, so a little more than the server's own.

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
#[path = "shared/varied.rs"]
mod varied;

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use hooktrail::queue::{NewEvent, Queue as _};
use reqwest::{Client, redirect::Policy};
use shared::{number, process_figures};
use support::{
    api::Api,
    daemon::{Setup, subscriber},
    eventually,
    queue::Embedded,
    receiver::{Receiver, status},
};
use varied::{ACTORS, Random};

const SUBSCRIBERS: u64 = 1_000;
const LETTERS: u64 = 10_000;
const BROWSERS: u64 = 20;

/// Events that are published at once.
const GROUP: u64 = 1_000;

/// For how long the cost of browsers is looked at.
const WATCHED: Duration = Duration::from_secs(30);

const TOKEN: &str = "the-token-of-this-benchmark";

fn main() {
    let events = std::env::args()
        .filter_map(|a| a.replace('_', "").parse().ok())
        .next()
        .unwrap_or(1_000_000);
    support::run(measure(events));
}

async fn measure(events: u64) {
    let base =
        std::env::var_os("HOOKTRAIL_BENCH_DIR").map_or_else(std::env::temp_dir, PathBuf::from);
    let queue = Embedded::within(&base);
    fill(&queue, events).await;

    let refusing = Receiver::start(|_, _| status(500)).await;
    let accepting = Receiver::accepting().await;
    let many: String = (0..SUBSCRIBERS - 1)
        .map(|n| subscriber(&format!("s-{n}"), &accepting.url, &format!("events = [\"n{n}\"]")))
        .collect();
    let once = "events = [\"refused\"]\nretry = { max_attempts = 1 }\nbatch = { max_events = 1 }\ncircuit_breaker = { failures = 0 }\nhttp = { concurrency = 8 }";
    let all = many + &subscriber("refusing", &refusing.url, once);
    let (setup, api) = setup(&queue, &all);
    let daemon = setup.start().await;
    // So that each has something to show.
    let rows = (0..SUBSCRIBERS - 1).map(|n| new_event(&format!("n{n}"), n));
    publish(&queue, rows).await;
    publish(&queue, (0..LETTERS).map(|n| new_event("refused", n))).await;
    eventually("all are delivered or dead", async || {
        accepting.count() as u64 >= SUBSCRIBERS - 1 && refusing.count() as u64 >= LETTERS
    })
    .await;
    caught_up(&api, events + SUBSCRIBERS - 1 + LETTERS).await;

    let browser = Browser::signed_in(&api).await;
    println!("\n{:<50}{:>9}{:>9}{:>9}{:>9}", "pages, in ms", "p50", "p95", "max", "KiB");
    let letters = browser.get("/console/dead-letters/refusing").await;
    let links = letters.split("href=\"/console/dead-letters/refusing/").skip(1);
    let keys = links.filter_map(|link| link.get(..32)).filter(|key| !key.contains('"'));
    // The walk to the last one of the list is the longest.
    let letter = keys.last().expect("a letter").to_owned();
    let deliveries = browser.get("/console/deliveries").await;
    let delivery = after(&deliveries, "href=\"/console/deliveries/").to_owned();
    let mut random = Random(7);
    let count = number("HOOKTRAIL_BENCH_QUERIES", 200);
    let mut worst: f64 = 0.0;
    for (name, path) in [
        ("Overview", Box::new(|_: &mut Random| "/console/".to_owned()) as Path),
        ("Webhooks", Box::new(|_| "/console/webhooks".to_owned())),
        ("a webhook", Box::new(|r| format!("/console/webhooks/s-{}", r.below(SUBSCRIBERS - 1)))),
        (
            "a webhook with 10,000 dead letters",
            Box::new(|_| "/console/webhooks/refusing".to_owned()),
        ),
        ("Audit Log", Box::new(|_| "/console/events".to_owned())),
        ("Audit Log, an actor", Box::new(|r| format!("/console/events?actor={}", r.below(ACTORS)))),
        ("Audit Log, nobody", Box::new(|r| format!("/console/events?actor=nobody-{}", r.next()))),
        ("Audit Log, a type", Box::new(|r| format!("/console/events?type=*.{}.%23", r.word()))),
        ("Audit Log, a word", Box::new(|r| format!("/console/events?text={}", r.word()))),
        (
            "Audit Log, two words",
            Box::new(|r| format!("/console/events?text={}+{}", r.word(), r.word())),
        ),
        ("an event", Box::new(move |r| format!("/console/events/{}", 1 + r.below(events)))),
        ("Deliveries", Box::new(|_| "/console/deliveries".to_owned())),
        (
            "Deliveries, of one",
            Box::new(|r| format!("/console/deliveries?subscriber=s-{}", r.below(SUBSCRIBERS - 1))),
        ),
        ("Deliveries, dead", Box::new(|_| "/console/deliveries?state=dead".to_owned())),
        ("a delivery", Box::new(move |_| format!("/console/deliveries/{delivery}"))),
        ("Dead letters", Box::new(|_| "/console/dead-letters".to_owned())),
        ("Dead letters, of one", Box::new(|_| "/console/dead-letters/refusing".to_owned())),
        ("a dead letter", Box::new(move |_| format!("/console/dead-letters/refusing/{letter}"))),
        (
            "a replay of 10,000 dead letters, to be confirmed",
            Box::new(|_| "/console/dead-letters/refusing/replay".to_owned()),
        ),
        ("Replays", Box::new(|_| "/console/replays".to_owned())),
        ("Health", Box::new(|_| "/console/health".to_owned())),
    ] {
        let (mut times, mut bytes) = (Vec::new(), 0);
        for _ in 0..count {
            let path = path(&mut random);
            let start = Instant::now();
            bytes = browser.get(&path).await.len();
            times.push(start.elapsed().as_secs_f64() * 1e3);
        }
        times.sort_by(f64::total_cmp);
        let at = |part: f64| times[((times.len() - 1) as f64 * part) as usize];
        worst = worst.max(at(0.95));
        println!("{name:<50}{:>9.1}{:>9.1}{:>9.1}{:>9}", at(0.5), at(0.95), at(1.0), bytes >> 10);
    }
    println!("the slowest p95: {worst:.1} ms");

    let cpu = || process_figures(daemon.pid()).0;
    let before = cpu();
    tokio::time::sleep(WATCHED).await;
    let idle = cpu() - before;
    for page in ["/console/", "/console/webhooks", "/console/replays"] {
        let before = cpu();
        let browsers: Vec<_> = (0..BROWSERS).map(|n| browser.clone().poll(n, page)).collect();
        futures_util::future::join_all(browsers).await;
        let used = cpu() - before;
        println!(
            "{BROWSERS} browsers on {page}: {:.1} % of a core more than the {:.1} % without them",
            (used - idle) * 100.0 / WATCHED.as_secs_f64(),
            idle * 100.0 / WATCHED.as_secs_f64()
        );
    }
    println!("peak memory of the daemon: {:.0} MiB", process_figures(daemon.pid()).1);
    daemon.stop().await;
}

type Path = Box<dyn Fn(&mut Random) -> String>;

/// Up to the next quotation mark.
fn after<'a>(text: &'a str, start: &str) -> &'a str {
    let rest = text
        .split(start)
        .nth(1)
        .unwrap_or_else(|| panic!("no {start} in a page of {} bytes", text.len()));
    rest.split('"').next().expect("one")
}

/// Brings so many events into history before there are many subscribers to be looked at for each.
async fn fill(queue: &Embedded, events: u64) {
    let accepting = Receiver::accepting().await;
    let (setup, api) = setup(queue, &subscriber("quiet", &accepting.url, "events = [\"none\"]"));
    let daemon = setup.start().await;
    let start = Instant::now();
    for first in (0..events).step_by(100 * GROUP as usize) {
        let last = events.min(first + 100 * GROUP);
        let rows = (first..last).map(|n| {
            let varied::Varied { event_type, message_id, body } = varied::event(n);
            let message_id = Some(message_id);
            NewEvent { event_type, message_id, body: body.into(), traceparent: None, tenant: None }
        });
        publish(queue, rows).await;
    }
    caught_up(&api, events).await;
    println!("{events} events are in history after {:.0} s", start.elapsed().as_secs_f64());
    daemon.stop().await;
}

async fn publish(queue: &Embedded, rows: impl Iterator<Item = NewEvent>) {
    let queue = queue.open();
    let mut rows = rows.peekable();
    while rows.peek().is_some() {
        let group = rows.by_ref().take(GROUP as usize).collect();
        queue.publish(group).await.expect("publishes");
    }
}

fn new_event(event_type: &str, n: u64) -> NewEvent {
    let body = varied::event(n).body;
    NewEvent {
        event_type: event_type.to_owned(),
        message_id: None,
        body: body.into(),
        traceparent: None,
        tenant: None,
    }
}

fn setup(queue: &Embedded, subscribers: &str) -> (Setup, Api) {
    let api = Api::new();
    let text = format!(
        "{}token = \"{TOKEN}\"\n[http]\nallow_http = true\nallow_private_addresses = true\n[batch]\nmax_wait = \"0s\"\n[history]\nmax_bytes = \"32GiB\"\n[log]\nlevel = \"info\"\n{subscribers}",
        api.section()
    );
    (Setup::new(queue, &text), api)
}

/// Waits until so many events are in history.
async fn caught_up(api: &Api, events: u64) {
    let token = format!("Bearer {TOKEN}");
    let (mut before, mut since) = (None, Instant::now());
    loop {
        let answer =
            api.send("GET", "/api/v1/events?limit=1", &[("authorization", &token)], "").await;
        let last = answer.json()["events"][0]["number"].as_u64();
        if last >= Some(events) {
            return;
        }
        if last != before {
            (before, since) = (last, Instant::now());
        }
        assert!(since.elapsed() < Duration::from_secs(60), "history stands still at {last:?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[derive(Clone)]
struct Browser {
    client: Client,
    port: u16,
    cookie: String,
}

impl Browser {
    async fn signed_in(api: &Api) -> Self {
        let client = Client::builder().no_proxy().redirect(Policy::none()).build();
        let client = client.expect("a client");
        let answer = client
            .post(format!("http://127.0.0.1:{}/console/sign-in", api.port))
            .header("content-type", "application/x-www-form-urlencoded")
            .body(format!("token={TOKEN}&to=/console/"))
            .send()
            .await
            .expect("an answer");
        let cookie = answer.headers()["set-cookie"].to_str().expect("text");
        let cookie = cookie.split(';').next().expect("one").to_owned();
        Self { client, port: api.port, cookie }
    }

    async fn get(&self, path: &str) -> String {
        let answer = self
            .client
            .get(format!("http://127.0.0.1:{}{path}", self.port))
            .header("cookie", &self.cookie)
            .send()
            .await
            .expect("an answer");
        let status = answer.status();
        let text = answer.text().await.expect("a body");
        assert!(status.is_success(), "{path}: {status}: {text}");
        text
    }

    /// Asks for a page as often as an open one does.
    async fn poll(self, n: u64, page: &str) {
        let every = Duration::from_secs(5);
        let first = Instant::now() + every * u32::try_from(n).expect("few") / BROWSERS as u32;
        let mut ticks = tokio::time::interval_at(first.into(), every);
        for _ in 0..WATCHED.as_secs() / every.as_secs() {
            ticks.tick().await;
            self.get(page).await;
        }
    }
}

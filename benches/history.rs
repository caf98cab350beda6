//! The cost of history, at steady state: it is full, and the oldest events are removed while new ones
//! are added.
//!
//! `cargo bench --bench history -- 1000000`: the argument is the number of events that are kept
//! (1,000,000). HOOKTRAIL_BENCH_DIR names a directory for the files; HOOKTRAIL_BENCH_QUERIES (300)
//! is the number of queries of each kind. Half of them run while events are added.

#![allow(
    clippy::disallowed_methods,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a benchmark reads the clock and prints"
)]

#[path = "shared/varied.rs"]
mod varied;

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use hooktrail::{
    config::HistoryConfig,
    delivery::{BatchId, Print, SubscriberName},
    event::{Pattern, payload::Format},
    store::{
        AttemptEnd, Change, Contents, DeliveryChange, EventFilter, EventNumber, HistoryState,
        NewRow, Store,
        sqlite::{SqliteConfig, SqliteStore},
    },
};
use varied::{ACTORS, Random, Varied};

/// Bytes of the file that an event takes: with it the size of the file is chosen.
const BYTES_AN_EVENT: u64 = 540;

/// Events that are added at once.
const GROUP: u64 = 1000;

/// The time that a search may take.
const SEARCH: Duration = Duration::from_millis(200);

/// An event with a message id, as history takes it.
fn event(n: u64) -> NewRow {
    let Varied { event_type, message_id, body } = varied::event(n);
    NewRow {
        number: None,
        at: SystemTime::now(),
        event_type,
        message_id: Some(message_id),
        body: body.into(),
        redelivered: false,
        tenant: None,
    }
}

fn main() {
    let kept = std::env::args()
        .filter_map(|a| a.replace('_', "").parse().ok())
        .next()
        .unwrap_or(1_000_000);
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    runtime.expect("a runtime").block_on(measure(kept));
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().map_or(default, |v| v.parse().expect("a number"))
}

async fn measure(kept: u64) {
    let base =
        std::env::var_os("HOOKTRAIL_BENCH_DIR").map_or_else(std::env::temp_dir, PathBuf::from);
    let dir = tempfile::tempdir_in(base).expect("a directory");
    let history = HistoryConfig {
        retention: Duration::from_secs(7 * 86_400),
        max_bytes: kept * BYTES_AN_EVENT,
        bodies: true,
    };
    let config = SqliteConfig {
        data_dir: dir.path().to_owned(),
        history,
        log: None,
        keys: Vec::new(),
        without_history: None,
    };
    let store = SqliteStore::start(config);
    let mut state = store.state();
    state.wait_for(|s| s.history == HistoryState::Open).await.expect("opens");
    let sample: u64 = (0..1000).map(|n| event(n).body.len() as u64).sum();
    println!("{kept} events of {} bytes, groups of {GROUP}", sample / 1000);

    fill(&store, 0, kept + kept / 20).await;
    let (from, more) = (kept + kept / 20, (kept / 4).max(400_000));
    let made = making(more);
    let (writer, all, start) = (writer_cpu(), process_cpu(), Instant::now());
    fill(&store, from, more).await;
    let seconds = start.elapsed().as_secs_f64();
    let micros = |cpu: f64| cpu * 1e6 / more as f64;
    println!("\nevents, while the oldest are removed");
    println!("{:>12.0} events/s", more as f64 / seconds);
    println!("{:>12.1} µs of CPU each in the writing thread", micros(writer_cpu() - writer));
    println!(
        "{:>12.1} µs in all of this process, without making them",
        micros(process_cpu() - all - made)
    );
    let reach = store.reach().await.expect("reads");
    println!(
        "{:>12.0} bytes of the file each, {} events in {} MiB",
        reach.bytes as f64 / reach.events as f64,
        reach.events,
        reach.bytes >> 20
    );

    deliveries(&store).await;
    let last = reach.last.expect("events").0.0;
    println!("\n{:<34}{:>9}{:>9}{:>9}{:>11}", "queries, in ms", "p50", "p99", "max", "continued");
    queries(&store, last, reach.events, "alone").await;
    let stopping = Arc::new(AtomicBool::new(false));
    let load = tokio::spawn(load(store.clone(), from + more, stopping.clone()));
    queries(&store, last, reach.events, "under load").await;
    stopping.store(true, Ordering::Relaxed);
    println!("\nthe load: {:.0} events/s", load.await.expect("joins"));
    store.close(true).await;
}

/// CPU seconds of making events, to be subtracted.
fn making(events: u64) -> f64 {
    let before = process_cpu();
    let bytes: usize = (0..events).map(|n| std::hint::black_box(event(n)).body.len()).sum();
    std::hint::black_box(bytes);
    process_cpu() - before
}

async fn fill(store: &SqliteStore, from: u64, events: u64) {
    let next = Arc::new(AtomicU64::new(from));
    // Two at once: one is made while the other is written.
    let tasks = [(); 2].map(|()| {
        let (store, next) = (store.clone(), next.clone());
        tokio::spawn(async move {
            loop {
                let first = next.fetch_add(GROUP, Ordering::Relaxed);
                if first >= from + events {
                    return;
                }
                let group = (first..first + GROUP).map(event).collect();
                store.append(group).await.expect("appends");
                if (first / GROUP).is_multiple_of(20) {
                    while store.trim(SystemTime::now()).await.expect("trims") {}
                }
            }
        })
    });
    for task in tasks {
        task.await.expect("joins");
    }
}

/// Adds events until it is stopped; the number a second.
async fn load(store: SqliteStore, from: u64, stopping: Arc<AtomicBool>) -> f64 {
    let (start, mut events) = (Instant::now(), 0);
    while !stopping.load(Ordering::Relaxed) {
        fill(&store, from + events, 4 * GROUP).await;
        events += 4 * GROUP;
        // About 5,000 a second.
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    events as f64 / start.elapsed().as_secs_f64()
}

/// Batches of 100 events, each with one attempt.
async fn deliveries(store: &SqliteStore) {
    const DELIVERIES: u64 = 20_000;
    let subscriber = SubscriberName::try_new("bench").expect("a name");
    let prints: Arc<[Print]> = (0..100_u8).map(|n| Print::of(&[n])).collect();
    let (writer, start) = (writer_cpu(), Instant::now());
    for first in (0..DELIVERIES).step_by(50) {
        let ids: Vec<BatchId> = (first..first + 50).map(|_| BatchId::random()).collect();
        let change = |id: &BatchId, change: Change| DeliveryChange {
            id: id.clone(),
            subscriber: subscriber.clone(),
            at: SystemTime::now(),
            change,
        };
        let contents = Contents {
            format: Some(Format::Json),
            events: 100,
            bytes: 40_000,
            sha256: Some([7; 32]),
            prints: Some(prints.clone()),
            replay: false,
            parent: None,
        };
        let by = "host:1234".to_owned();
        let started = Change::Started { attempt: 1, contents, by };
        // The begin and the end of an attempt are seldom recorded together.
        store
            .record(ids.iter().map(|id| change(id, started.clone())).collect())
            .await
            .expect("records");
        let end = AttemptEnd { status: Some(200), failure: None, excerpt: String::new() };
        let ended = Change::Ended { attempt: 1, took: Duration::from_millis(12), end };
        let both = |id| [change(id, ended.clone()), change(id, Change::Delivered)];
        store.record(ids.iter().flat_map(both).collect()).await.expect("records");
    }
    println!("\ndeliveries of 100 events, one attempt each");
    println!("{:>12.0} deliveries/s", DELIVERIES as f64 / start.elapsed().as_secs_f64());
    println!(
        "{:>12.1} µs of CPU each in the writing thread",
        (writer_cpu() - writer) * 1e6 / DELIVERIES as f64
    );
}

async fn queries(store: &SqliteStore, last: i64, events: u64, when: &str) {
    let count = number("HOOKTRAIL_BENCH_QUERIES", 300) / 2;
    let all = EventFilter::default;
    let mut random = Random(7);
    let some_row = |random: &mut Random| last - random.below(events * 9 / 10) as i64;
    for kind in [
        "a page of 50",
        "an actor",
        "an actor that is missing",
        "a rare word",
        "a common prefix",
        "two common words",
        "a type",
        "a day without events",
    ] {
        let mut times = Vec::new();
        let mut continued = 0;
        for _ in 0..count {
            let (mut filter, mut before) = (all(), None);
            match kind {
                "a page of 50" => before = Some(EventNumber(some_row(&mut random))),
                "an actor" => filter.actor = Some(random.below(ACTORS).to_string()),
                "an actor that is missing" => {
                    filter.actor = Some(format!("nobody {}", random.next()))
                }
                "a rare word" => {
                    // The resource of an event that is there: a number among a million.
                    let number = EventNumber(some_row(&mut random));
                    let row = store.event(number).await.expect("reads").expect("is there");
                    filter.text = Some(row.details.resource.name.expect("a name"));
                }
                "a common prefix" => filter.text = Some(random.word()[..2].to_owned()),
                "two common words" => {
                    filter.text = Some(format!("{} {}", random.word(), random.word()))
                }
                "a type" => {
                    let pattern = format!("*.{}.#", random.word());
                    filter.event_type = Some(Pattern::try_new(&pattern).expect("a pattern"));
                }
                _ => filter.until = Some(SystemTime::now() - Duration::from_secs(86_400)),
            }
            let start = Instant::now();
            let page = store.events(&filter, before, 50, SEARCH).await.expect("reads");
            times.push(start.elapsed().as_secs_f64() * 1e3);
            continued += u64::from(page.searched_back_to.is_some());
        }
        times.sort_by(f64::total_cmp);
        let at = |part: f64| times[((times.len() - 1) as f64 * part) as usize];
        println!(
            "{:<34}{:>9.2}{:>9.2}{:>9.2}{continued:>11}",
            format!("{kind}, {when}"),
            at(0.5),
            at(0.99),
            at(1.0)
        );
    }
}

/// CPU seconds of the thread that writes.
fn writer_cpu() -> f64 {
    cpu(|name| name == "history-writer")
}

fn process_cpu() -> f64 {
    cpu(|_| true)
}

/// CPU seconds of this process's threads with these names.
fn cpu(is_chosen: impl Fn(&str) -> bool) -> f64 {
    let threads = std::fs::read_dir("/proc/self/task").expect("threads").flatten();
    let of = |thread: std::fs::DirEntry| {
        let name = std::fs::read_to_string(thread.path().join("comm")).ok()?;
        let text = std::fs::read_to_string(thread.path().join("schedstat")).ok()?;
        let nanos: f64 = text.split(' ').next()?.parse().ok()?;
        is_chosen(name.trim()).then_some(nanos / 1e9)
    };
    threads.filter_map(of).sum()
}

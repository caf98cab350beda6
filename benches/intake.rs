//! The cost of the embedded queue and its intake, against SQLite's floor: one connection in this
//! process that makes the same number of commits of the same rows, with the same settings.
//!
//! `cargo bench --bench intake`. HOOKTRAIL_BENCH_EVENTS (300000) and HOOKTRAIL_BENCH_ROUNDS (3)
//! change its size. Floor and intake take turns; medians are printed, and the range of what was
//! measured.

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
    path::{Path, PathBuf},
    sync::{Arc, atomic::Ordering},
    time::Instant,
};

use rusqlite::{Connection, params};
use shared::{BATCH, Counter, EVENT, median, number, process_figures, receive};
use support::{
    daemon::{Setup, subscriber},
    eventually, free_port,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

const CLIENTS: u64 = 4;

/// Settings of all subscribers here.
const GROUPS: &str = "[http]\nallow_http = true\nallow_private_addresses = true\n[batch]\nmax_events = 100\n[log]\nlevel = \"info\"\n";

fn main() {
    support::run(compare());
}

/// The figures of an intake of events.
struct Intake {
    seconds: f64,
    cpu_seconds: f64,
    peak_mib: f64,
    commits: u64,
    bytes: u64,
}

async fn compare() {
    let per_client =
        number("HOOKTRAIL_BENCH_EVENTS", 300_000) / CLIENTS / BATCH as u64 * BATCH as u64;
    let (events, rounds) = (per_client * CLIENTS, number("HOOKTRAIL_BENCH_ROUNDS", 3));
    println!(
        "{events} events of {} bytes, {rounds} rounds; clients, daemon and receivers on this machine",
        EVENT.len()
    );
    println!(
        "intake: {CLIENTS} clients, {BATCH} events a request, one request at a time each, connections kept"
    );
    let (mut taken, mut floors) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        let intake = intake(per_client, events).await;
        floors.push(floor(events, intake.commits));
        taken.push(intake);
    }
    let rate = |seconds: f64| events as f64 / seconds;
    println!("\n{:<34}{:>12}{:>26}", "durable", "events/s", "range");
    line("intake over HTTP", taken.iter().map(|t| rate(t.seconds)));
    line("floor: SQLite, as many commits", floors.iter().map(|f| rate(f.0)));
    let ratios: Vec<f64> = taken.iter().zip(&floors).map(|(t, f)| f.0 / t.seconds).collect();
    println!(
        "ratio {:.2}; events a commit {:.0}",
        median(ratios),
        median(taken.iter().map(|t| events as f64 / t.commits as f64))
    );
    println!(
        "CPU of the daemon {:.1} µs/event, peak {:.0} MiB",
        median(taken.iter().map(|t| t.cpu_seconds * 1e6 / events as f64)),
        median(taken.iter().map(|t| t.peak_mib))
    );
    let mib_per_million = |bytes: u64| bytes as f64 * 1e6 / events as f64 / f64::from(1 << 20);
    println!(
        "database {:.0} MiB per million events; floor {:.0} MiB",
        median(taken.iter().map(|t| mib_per_million(t.bytes))),
        median(floors.iter().map(|f| mib_per_million(f.1)))
    );
    println!(
        "\n{:<34}{:>12}{:>26}{:>14}",
        "delivery from a backlog", "deliveries/s", "range", "CPU µs each"
    );
    for subscribers in [1, 10] {
        // As many deliveries for the one as for the ten, so that both take about as long.
        let (mut rates, mut cpu) = (Vec::new(), Vec::new());
        for _ in 0..rounds {
            let (seconds, cpu_seconds) = deliver(events / subscribers, subscribers).await;
            rates.push(rate(seconds));
            cpu.push(cpu_seconds * 1e6 / events as f64);
        }
        print!("{}", text(&format!("to {subscribers}, each event to each"), rates.into_iter()));
        println!("{:>14.1}", median(cpu));
    }
}

fn text(name: &str, values: impl Iterator<Item = f64> + Clone) -> String {
    let (least, most) =
        (values.clone().fold(f64::MAX, f64::min), values.clone().fold(0.0, f64::max));
    format!("{name:<34}{:>12.0}{:>26}", median(values), format!("{least:.0} – {most:.0}"))
}

fn line(name: &str, values: impl Iterator<Item = f64> + Clone) {
    println!("{}", text(name, values));
}

/// Takes in events for a subscriber whose circuit opens at once, so that nothing else goes on.
async fn intake(per_client: u64, events: u64) -> Intake {
    let addr = format!("127.0.0.1:{}", free_port());
    let unreachable = format!("http://127.0.0.1:{}/", free_port());
    let breaker = "circuit_breaker = { failures = 1, open_for = \"1h\", max_open_for = \"1h\" }";
    let setup = embedded(&format!(
        "[admin]\nlisten = \"{addr}\"\n{GROUPS}{}",
        subscriber("bench", &unreachable, breaker)
    ));
    let daemon = setup.start().await;
    // One event to open the circuit.
    let mut first = TcpStream::connect(&addr).await.expect("connects");
    post(&mut first, &request(1), &mut Vec::new()).await;
    daemon.wait_log("circuit").await;
    let database = database(&setup);
    let (cpu, commits) = (process_figures(daemon.pid()).0, commits(&database));
    let start = Instant::now();
    let clients: Vec<_> = (0..CLIENTS)
        .map(|_| {
            let addr = addr.clone();
            tokio::spawn(async move {
                let (request, mut answer) = (request(BATCH), Vec::new());
                let mut stream = TcpStream::connect(&addr).await.expect("connects");
                stream.set_nodelay(true).expect("a socket");
                for _ in 0..per_client / BATCH as u64 {
                    post(&mut stream, &request, &mut answer).await;
                }
            })
        })
        .collect();
    for client in clients {
        client.await.expect("every answer is 202");
    }
    let seconds = start.elapsed().as_secs_f64();
    let commits = u64::from(self::commits(&database) - commits);
    let (after, peak_mib) = process_figures(daemon.pid());
    daemon.stop().await;
    let stored: u32 =
        open(&database).query_row("SELECT count(*) FROM event", [], |r| r.get(0)).expect("counts");
    assert!(u64::from(stored) >= events, "{stored} of {events} events are in the database");
    Intake { seconds, cpu_seconds: after - cpu, peak_mib, commits, bytes: size(&database) }
}

fn embedded(rest: &str) -> Setup {
    Setup::with_text(&format!("[queue]\nurl = \"embedded\"\n{rest}"))
}

fn database(setup: &Setup) -> PathBuf {
    setup.config().with_file_name("data").join("hooktrail.db")
}

/// The transactions since the write-ahead log was begun, as its index counts them.
fn commits(database: &Path) -> u32 {
    let index =
        std::fs::read(database.with_extension("db-shm")).expect("the index of the write-ahead log");
    u32::from_ne_bytes(index[8..12].try_into().expect("four bytes"))
}

fn open(path: &Path) -> Connection {
    let db = Connection::open(path).expect("opens");
    db.pragma_update(None, "journal_mode", "WAL").expect("WAL");
    db.pragma_update(None, "synchronous", "FULL").expect("FULL");
    db
}

/// With the write-ahead log put back.
fn size(path: &Path) -> u64 {
    open(path).query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(())).expect("a checkpoint");
    std::fs::metadata(path).expect("a file").len()
}

/// Seconds, and bytes in the end.
fn floor(events: u64, commits: u64) -> (f64, u64) {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("floor.db");
    let db = open(&path);
    db.execute_batch(
        "CREATE TABLE event (seq INTEGER PRIMARY KEY AUTOINCREMENT, type TEXT NOT NULL, message_id TEXT, at INTEGER NOT NULL, only_for TEXT, \
         body BLOB NOT NULL)",
    )
    .expect("creates");
    let start = Instant::now();
    for n in 0..commits {
        db.execute_batch("BEGIN IMMEDIATE").expect("begins");
        {
            let mut insert = db
                .prepare_cached(
                    "INSERT INTO event (type, message_id, at, body) VALUES (?1, ?2, ?3, ?4)",
                )
                .expect("prepares");
            for row in events * n / commits..events * (n + 1) / commits {
                let id = format!("evt_{row:032x}");
                insert
                    .execute(params![
                        "activity_log.user.updated",
                        id,
                        1_733_739_084_000_i64,
                        EVENT.as_bytes()
                    ])
                    .expect("inserts");
            }
        }
        db.execute_batch("COMMIT").expect("commits");
    }
    let seconds = start.elapsed().as_secs_f64();
    drop(db);
    (seconds, size(&path))
}

fn request(events: usize) -> Vec<u8> {
    let body = format!("{{\"events\":[{}]}}", [EVENT].repeat(events).join(","));
    let head = format!(
        "POST /api/v1/events HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    (head + &body).into_bytes()
}

async fn post(stream: &mut TcpStream, request: &[u8], answer: &mut Vec<u8>) {
    stream.write_all(request).await.expect("sends");
    answer.clear();
    // The body of the answer is one line.
    while !(answer.ends_with(b"}\n") && answer.windows(4).any(|w| w == b"\r\n\r\n")) {
        assert!(stream.read_buf(answer).await.expect("reads") > 0, "the connection was closed");
    }
    assert!(answer.starts_with(b"HTTP/1.1 202 "), "{}", String::from_utf8_lossy(answer));
}

/// Seconds and CPU seconds of the delivery of so many events to each of so many subscribers.
async fn deliver(events: u64, subscribers: u64) -> (f64, f64) {
    let counter = Arc::new(Counter::default());
    let url = receive(counter.clone()).await;
    let all: String =
        (0..subscribers).map(|n| subscriber(&format!("bench-{n}"), &url, "")).collect();
    let setup = embedded(&format!("{GROUPS}{all}"));
    let backlog =
        setup.write("events", [EVENT, "\n"].concat().repeat(usize::try_from(events).expect("few")));
    setup.ok(&["publish", backlog.to_str().expect("a path")]);
    let daemon = setup.spawn();
    eventually("all events delivered", async || {
        counter.events.load(Ordering::Relaxed) >= events * subscribers
    })
    .await;
    let (cpu_seconds, _) = process_figures(daemon.pid());
    let (first, last) = counter.times.lock().expect("not poisoned").expect("requests");
    daemon.stop().await;
    ((last - first).as_secs_f64(), cpu_seconds)
}

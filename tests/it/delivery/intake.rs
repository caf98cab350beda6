//! Events over HTTP, into both kinds of queue.

use std::{
    collections::HashSet,
    io::Write as _,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use crate::support::{
    daemon::{Daemon, QUICK, Setup, subscriber},
    eventually, free_port,
    queue::{Queue, on_both_queues},
    receiver::{Receiver, event, status},
    run,
};

on_both_queues!(
    events_of_every_format_are_delivered_byte_for_byte,
    what_is_refused_leaves_no_trace,
    with_a_token_no_request_without_it_publishes,
    while_it_drains_the_daemon_takes_nothing_new_and_answers_everybody,
);

const EVENTS: &str = "/api/v1/events";
const JSON: &str = "application/json";
const LINES: &str = "application/jsonl";

fn embedded(rest: &str) -> Setup {
    Setup::with_text(&format!("[queue]\nurl = \"embedded\"\n{rest}"))
}

/// A subscriber of `activity_log.#`, with more lines.
async fn subscribed(queue: &Queue, more: &str) -> (Setup, Receiver) {
    let receiver = Receiver::accepting().await;
    let rest =
        format!("{QUICK}{more}{}", subscriber("a", &receiver.url, "events = [\"activity_log.#\"]"));
    (Setup::new(queue, &rest), receiver)
}

/// The address that a daemon listens on, from its log.
async fn address(daemon: &Daemon) -> String {
    let reported = || {
        let log = daemon.log();
        let rest = log.split("admin listening addr=").nth(1)?;
        rest.contains('\n').then(|| rest.split_whitespace().next().expect("an address").to_owned())
    };
    eventually("the daemon logs its address", async || reported().is_some()).await;
    reported().expect("just seen")
}

struct Answer {
    status: u16,
    retry_after: bool,
    body: serde_json::Value,
}

async fn answer(request: reqwest::RequestBuilder) -> Answer {
    let response = request.send().await.expect("an answer");
    let status = response.status().as_u16();
    let retry_after = response.headers().contains_key("retry-after");
    let text = response.text().await.expect("a body");
    Answer {
        status,
        retry_after,
        body: serde_json::from_str(&text).unwrap_or(serde_json::Value::String(text)),
    }
}

fn request(
    addr: &str,
    content_type: &str,
    body: impl Into<reqwest::Body>,
) -> reqwest::RequestBuilder {
    reqwest::Client::new()
        .post(format!("http://{addr}{EVENTS}"))
        .header("content-type", content_type)
        .body(body)
}

async fn post(addr: &str, content_type: &str, body: impl Into<reqwest::Body>) -> Answer {
    answer(request(addr, content_type, body)).await
}

async fn get(addr: &str, path: &str) -> Answer {
    answer(reqwest::Client::new().get(format!("http://{addr}{path}"))).await
}

#[track_caller]
fn assert_taken(answer: &Answer, accepted: u64, unmatched: u64) {
    assert_eq!(
        (answer.status, &answer.body),
        (202, &serde_json::json!({ "accepted": accepted, "unmatched": unmatched }))
    );
}

#[track_caller]
fn assert_refused(answer: &Answer, status: u16, part: &str) {
    assert!(
        answer.status == status && answer.body["detail"].as_str().is_some_and(|e| e.contains(part)),
        "{}: {}",
        answer.status,
        answer.body
    );
}

pub(crate) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    encoder.write_all(bytes).expect("writes");
    encoder.finish().expect("ends")
}

fn list(numbers: std::ops::Range<u64>) -> String {
    format!("{{\"events\":[{}]}}", numbers.map(event).collect::<Vec<_>>().join(","))
}

async fn events_of_every_format_are_delivered_byte_for_byte(queue: Queue) {
    let (setup, receiver) = subscribed(&queue, "").await;
    let daemon = setup.start().await;
    let addr = address(&daemon).await;
    assert_eq!(
        (get(&addr, "/healthz").await.status, get(&addr, "/readyz").await.status),
        (200, 200)
    );
    assert_taken(&post(&addr, JSON, event(0)).await, 1, 0);
    assert_taken(&post(&addr, "Application/JSON; charset=utf-8", list(1..2501)).await, 2500, 0);
    let lines: String = (2501..2600).map(|n| event(n) + "\r\n\n").collect();
    assert_taken(&post(&addr, LINES, lines).await, 99, 0);
    let compressed = request(
        &addr,
        "application/x-ndjson",
        gzip((event(2600) + "\n" + &event(2601)).as_bytes()),
    );
    assert_taken(&answer(compressed.header("content-encoding", "gzip")).await, 2, 0);
    let odd = r#"{ "event":"activity_log.odd","z":18446744073709551616,"a":1.50e300,"s":"\u00e9\/","n":2602 }"#;
    assert_taken(
        &post(&addr, JSON, format!("{{\"events\":[ {odd} ,{{\"event\":\"nobody's\"}}]}}")).await,
        2,
        1,
    );
    receiver.wait_all(2603).await;
    let mut accepted = receiver.accepted();
    accepted.sort_unstable();
    assert!(accepted.iter().copied().eq(0..2603), "each once, and the unmatched one not at all");
    assert!(
        receiver.requests().iter().any(|r| r.body.windows(odd.len()).any(|w| w == odd.as_bytes()))
    );
    assert!(daemon.stop().await.success());
}

async fn what_is_refused_leaves_no_trace(queue: Queue) {
    let (setup, receiver) = subscribed(&queue, "").await;
    let daemon = setup.start().await;
    let addr = address(&daemon).await;
    let (good, typeless) = (event(7), "{\"n\":8}");
    let reported = post(&addr, JSON, format!("{{\"events\":[{good},{typeless},7]}}")).await;
    assert_refused(
        &reported,
        400,
        "2 of 3 events are not valid; nothing of this request was taken",
    );
    assert_eq!(reported.body["invalid"], 2);
    assert_eq!(
        (&reported.body["events"][0]["index"], &reported.body["events"][1]["index"]),
        (&1.into(), &2.into())
    );
    assert!(
        reported.body["events"][0]["reason"].as_str().expect("text").contains("no field `event`"),
        "{}",
        reported.body
    );
    let reported = post(&addr, LINES, format!("{good}\n\n{typeless}\n")).await;
    assert_eq!(
        (
            reported.status,
            &reported.body["events"][0]["index"],
            &reported.body["events"][0]["line"]
        ),
        (400, &1.into(), &3.into())
    );
    assert_refused(&post(&addr, JSON, "[]").await, 400, "not a JSON object");
    assert_refused(&post(&addr, LINES, "").await, 400, "no event");
    assert_refused(&post(&addr, "text/plain", good.clone()).await, 415, "content-type");
    assert_refused(
        &answer(request(&addr, JSON, good.clone()).header("content-encoding", "br")).await,
        415,
        "content-encoding",
    );
    assert_refused(
        &answer(request(&addr, JSON, good.clone()).header("content-encoding", "gzip")).await,
        400,
        "not gzip",
    );
    // Too large by what it says, by what comes, and by what it becomes.
    let large =
        format!("{{\"event\":\"activity_log.x\",\"n\":9,\"pad\":\"{}\"}}", "x".repeat(12 << 20));
    assert_refused(&post(&addr, JSON, large.clone()).await, 413, "12582912 bytes");
    let mut raw = TcpStream::connect(&addr).await.expect("connects");
    let head_of_chunks = format!(
        "POST {EVENTS} HTTP/1.1\r\nhost: localhost\r\ncontent-type: {JSON}\r\ntransfer-encoding: chunked\r\n\r\n"
    );
    raw.write_all(head_of_chunks.as_bytes()).await.expect("sends");
    for chunk in large.as_bytes().chunks(1 << 20) {
        raw.write_all(format!("{:x}\r\n", chunk.len()).as_bytes()).await.expect("sends");
        raw.write_all(chunk).await.expect("sends");
        raw.write_all(b"\r\n").await.expect("sends");
    }
    raw.write_all(b"0\r\n\r\n").await.expect("sends");
    assert!(head(&mut raw).await.starts_with("HTTP/1.1 413 "));
    assert_refused(
        &answer(request(&addr, JSON, gzip(large.as_bytes())).header("content-encoding", "gzip"))
            .await,
        413,
        "inflated",
    );
    assert_refused(&get(&addr, "/api/v2").await, 404, "/api/v1/events");
    // History is asked there, which needs a token.
    assert_eq!(get(&addr, EVENTS).await.status, 403);

    assert_taken(&post(&addr, JSON, event(0)).await, 1, 0);
    receiver.wait_all(1).await;
    assert!(daemon.stop().await.success());
    assert_eq!(receiver.accepted(), [0]);
}

/// The head of an answer.
async fn head(stream: &mut TcpStream) -> String {
    let mut text = Vec::new();
    while !text.windows(4).any(|w| w == b"\r\n\r\n") {
        assert!(
            stream.read_buf(&mut text).await.expect("reads") > 0,
            "no answer but {:?}",
            String::from_utf8_lossy(&text)
        );
    }
    String::from_utf8_lossy(&text).into_owned()
}

/// Sends the head of a request that announces a body of this many bytes, and no body.
async fn begin(addr: &str, length: usize) -> TcpStream {
    let mut stream = TcpStream::connect(addr).await.expect("connects");
    let head = format!(
        "POST {EVENTS} HTTP/1.1\r\nhost: localhost\r\ncontent-type: {JSON}\r\ncontent-length: {length}\r\nexpect: 100-continue\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).await.expect("sends");
    stream
}

async fn with_a_token_no_request_without_it_publishes(queue: Queue) {
    let (setup, receiver) =
        subscribed(&queue, "[admin]\nlisten = \"127.0.0.1:0\"\ntoken = \"hunter2\"\n").await;
    let daemon = setup.start().await;
    let addr = address(&daemon).await;
    assert_eq!(
        (get(&addr, "/healthz").await.status, get(&addr, "/readyz").await.status),
        (200, 200)
    );
    for token in [
        None,
        Some("Bearer hunter3"),
        Some("Bearer hunter22"),
        Some("Bearer "),
        Some("hunter2"),
        Some("Basic hunter2"),
    ] {
        let mut request = request(&addr, JSON, list(1..2000));
        if let Some(token) = token {
            request = request.header("authorization", token);
        }
        let response = request.send().await.expect("an answer");
        assert_eq!(
            (response.status().as_u16(), response.headers()["www-authenticate"].to_str().ok()),
            (401, Some("Bearer")),
            "{token:?}"
        );
    }
    assert_eq!(
        get(&addr, "/api/v1/nothing").await.status,
        401,
        "the answer says nothing about what exists"
    );
    assert_taken(
        &answer(request(&addr, JSON, event(0)).header("authorization", "bearer hunter2")).await,
        1,
        0,
    );
    receiver.wait_all(1).await;
    assert!(!daemon.log().contains("hunter") && !setup.ok(&["check"]).contains("hunter"));
    assert!(daemon.stop().await.success());
    assert_eq!(receiver.accepted(), [0]);
}

#[test]
fn a_port_that_is_taken_is_an_error_before_anything_is_started() {
    run(async {
        let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let addr = taken.local_addr().expect("an address");
        let output = embedded(&format!("[admin]\nlisten = \"{addr}\"\n")).run(&["run"]);
        let reported = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{reported}");
        assert!(
            reported.contains(&format!("cannot listen on {addr}"))
                && reported.contains("[admin] listen"),
            "{reported}"
        );
    });
}

#[test]
fn a_daemon_without_its_broker_is_alive_and_not_ready() {
    run(async {
        let setup =
            Setup::with_text(&format!("[queue]\nurl = \"amqp://127.0.0.1:{}\"\n", free_port()));
        let daemon = setup.spawn();
        let addr = address(&daemon).await;
        assert_eq!(
            (get(&addr, "/healthz").await.status, get(&addr, "/readyz").await.status),
            (200, 503)
        );
        let reported = post(&addr, JSON, event(0)).await;
        assert_refused(&reported, 503, "hooktrail is starting; nothing of this request was taken");
        assert!(reported.retry_after);
        assert!(daemon.stop().await.success());
    });
}

async fn while_it_drains_the_daemon_takes_nothing_new_and_answers_everybody(queue: Queue) {
    let (setup, receiver) = subscribed(&queue, "").await;
    receiver.now(|_, _| status(200).after(Duration::from_secs(3)));
    let mut daemon = setup.start().await;
    let addr = address(&daemon).await;
    assert_taken(&post(&addr, JSON, event(0)).await, 1, 0);
    receiver.wait_requests(1).await;
    let mut half = begin(&addr, 100).await;
    assert!(head(&mut half).await.starts_with("HTTP/1.1 100 "), "it is about to read the body");
    half.write_all(b"{").await.expect("sends");
    daemon.terminate();
    eventually("it drains", async || get(&addr, "/readyz").await.status == 503).await;
    assert!(head(&mut half).await.starts_with("HTTP/1.1 503 "));
    assert_refused(&post(&addr, JSON, event(1)).await, 503, "stopping");
    assert_eq!(get(&addr, "/healthz").await.status, 200);
    assert!(daemon.wait().await.success());
    assert_eq!(receiver.accepted(), [0]);
}

#[test]
fn bodies_without_room_are_asked_to_come_later_and_small_ones_pass() {
    run(async {
        let setup = embedded("");
        let daemon = setup.start().await;
        let addr = address(&daemon).await;
        let mut held = Vec::new();
        for _ in 0..5 {
            let mut stream = begin(&addr, 12 << 20).await;
            assert!(head(&mut stream).await.starts_with("HTTP/1.1 100 "));
            held.push(stream);
        }
        let reported = head(&mut begin(&addr, 12 << 20).await).await;
        assert!(
            reported.starts_with("HTTP/1.1 429 ") && reported.contains("retry-after: 1\r\n"),
            "{reported}"
        );
        assert_taken(&post(&addr, JSON, list(0..1000)).await, 1000, 1000);
        drop(held);
        eventually("the room is given back", async || {
            head(&mut begin(&addr, 12 << 20).await).await.starts_with("HTTP/1.1 100 ")
        })
        .await;
    });
}

#[test]
fn what_was_answered_202_arrives_although_the_daemon_is_killed_again_and_again() {
    run(async {
        let seen: Arc<Mutex<HashSet<u64>>> = Arc::default();
        let record = seen.clone();
        let receiver = Receiver::start(move |request, _| {
            record.lock().expect("not poisoned").extend(request.numbers());
            status(200)
        })
        .await;
        let addr = format!("127.0.0.1:{}", free_port());
        let setup = embedded(&format!(
            "{QUICK}[admin]\nlisten = \"{addr}\"\n{}",
            subscriber("a", &receiver.url, "")
        ));
        let (next, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let taken: Arc<Mutex<HashSet<u64>>> = Arc::default();
        let clients: Vec<_> = (0..4)
            .map(|_| {
                let (next, stop, taken) = (next.clone(), stop.clone(), taken.clone());
                let request = reqwest::Client::new()
                    .post(format!("http://{addr}{EVENTS}"))
                    .header("content-type", JSON);
                tokio::spawn(async move {
                    while !stop.load(Ordering::Relaxed) {
                        let first = next.fetch_add(100, Ordering::Relaxed);
                        let request = request
                            .try_clone()
                            .expect("has no body yet")
                            .body(list(first..first + 100));
                        match request.send().await {
                            Ok(answer) if answer.status() == 202 => {
                                taken.lock().expect("not poisoned").extend(first..first + 100)
                            }
                            // Killed, or not there yet.
                            _ => tokio::time::sleep(Duration::from_millis(10)).await,
                        }
                    }
                })
            })
            .collect();
        let so_far = || taken.lock().expect("not poisoned").len();
        for _ in 0..20 {
            let before = so_far();
            let daemon = setup.start().await;
            eventually("events are taken", async || so_far() > before).await;
            // The moment is what is tried out.
            tokio::time::sleep(Duration::from_millis(rand::random_range(0..300))).await;
            daemon.kill();
        }
        stop.store(true, Ordering::Relaxed);
        for client in clients {
            client.await.expect("does not panic");
        }
        let daemon = setup.start().await;
        let missing = || {
            taken
                .lock()
                .expect("not poisoned")
                .difference(&seen.lock().expect("not poisoned"))
                .count()
        };
        eventually("all that was taken arrives", async || missing() == 0).await;
        println!("{} events were taken, {} sent", so_far(), next.load(Ordering::Relaxed));
        assert!(daemon.stop().await.success());
    });
}

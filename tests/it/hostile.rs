//! Receivers that answer in ways no receiver should. Each has a good subscriber beside it that must not notice.

use std::time::{Duration, Instant};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};

use crate::support::{
    broker::Broker,
    daemon::{Daemon, QUICK, Setup, subscriber},
    eventually,
    receiver::{Receiver, event, status},
    run,
};

/// Serves each connection with `behave`, after the request's head has come.
async fn raw<F: Future<Output = std::io::Result<()>> + Send + 'static>(behave: fn(TcpStream) -> F) -> String {
    let socket = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let url = format!("http://{}/", socket.local_addr().expect("an address"));
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = socket.accept().await {
            tokio::spawn(async move {
                let mut head = [0; 1024];
                // A client that has gone away ends the behaviour, as it does with a real server.
                if stream.read(&mut head).await.is_ok_and(|n| n > 0) {
                    behave(stream).await.ok();
                }
            });
        }
    });
    url
}

async fn a_gibibyte(mut stream: TcpStream, status: &str) -> std::io::Result<()> {
    stream.write_all(format!("HTTP/1.1 {status} x\r\ncontent-length: 1073741824\r\n\r\n").as_bytes()).await?;
    let block = vec![b'x'; 1 << 20];
    for _ in 0..1024 {
        stream.write_all(&block).await?;
    }
    Ok(())
}

async fn drip(mut stream: TcpStream, begin: &str, byte: &[u8]) -> std::io::Result<()> {
    stream.write_all(begin.as_bytes()).await?;
    loop {
        stream.write_all(byte).await?;
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// The most memory that the daemon ever had, in MiB.
fn peak_mib(daemon: &Daemon) -> f64 {
    let text = std::fs::read_to_string(format!("/proc/{}/status", daemon.pid())).expect("the daemon runs");
    let line = text.lines().find_map(|l| l.strip_prefix("VmHWM:")).expect("VmHWM");
    line.trim().trim_end_matches(" kB").parse::<f64>().expect("a number") / 1024.0
}

/// Runs a hostile receiver beside a good one and returns the log line of its first attempt.
async fn beside_a_good_one(url: &str) -> String {
    let broker = Broker::shared();
    let good = Receiver::accepting().await;
    let text = QUICK.to_owned()
        + &subscriber("bad", url, "http = { timeout = \"2s\" }\nretry = { initial_interval = \"1h\" }")
        + &subscriber("good", &good.url, "");
    let setup = Setup::new(&broker, &text);
    let daemon = setup.start().await;
    broker.publish("a.b", (0..50).map(event)).await;
    let start = Instant::now();
    good.wait_all(50).await;
    assert!(start.elapsed() < Duration::from_secs(2), "the good one waited {:?}", start.elapsed());
    let attempt = |log: &str| log.lines().find(|l| l.contains("attempt subscriber=\"bad\"")).map(str::to_owned);
    eventually("the attempt ends", async || attempt(&daemon.log()).is_some()).await;
    assert!(start.elapsed() < Duration::from_secs(10), "the attempt took {:?}", start.elapsed());
    let line = attempt(&daemon.log()).expect("just seen");
    assert!(peak_mib(&daemon) < 100.0, "{} MiB", peak_mib(&daemon));
    // Nothing is lost: accepted, or an envelope waits on the ladder (for an hour and more, at its first level).
    if line.contains("outcome=\"retry\"") {
        eventually("the envelope is on the ladder", async || broker.depth("delay.11").await == Some(1)).await;
    }
    broker.wait_depth("sub.bad", 0).await;
    line
}

#[track_caller]
fn assert_retry(line: &str, failure: &str) {
    assert!(line.contains("outcome=\"retry\"") && line.contains(&format!("failure=\"{failure}\"")), "not `{failure}`: {line}");
}

#[test]
fn an_answer_of_a_gibibyte_is_cut_off_and_its_status_counts() {
    run(async {
        let line = beside_a_good_one(&raw(|s| a_gibibyte(s, "200")).await).await;
        assert!(line.contains("outcome=\"delivered\""), "{line}");
        let line = beside_a_good_one(&raw(|s| a_gibibyte(s, "500")).await).await;
        assert_retry(&line, "status");
        assert!(line.len() < 2048, "of the answer's text only the beginning is kept: {} bytes", line.len());
    });
}

#[test]
fn an_answer_that_never_ends_ends_with_the_timeout() {
    run(async {
        assert_retry(
            &beside_a_good_one(&raw(|s| drip(s, "HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n", b"x")).await).await,
            "timeout",
        );
    });
}

#[test]
fn headers_without_end_end_with_the_timeout_or_their_number() {
    run(async {
        let line = beside_a_good_one(&raw(|s| drip(s, "HTTP/1.1 200 OK\r\n", b"x-header: and another one\r\n")).await).await;
        assert_retry(&line, "timeout");
        let flood = |mut s: TcpStream| async move {
            s.write_all(b"HTTP/1.1 200 OK\r\n").await?;
            loop {
                s.write_all("x-header: and another one\r\n".repeat(1000).as_bytes()).await?;
            }
        };
        assert_retry(&beside_a_good_one(&raw(flood).await).await, "bad_answer");
    });
}

#[test]
fn an_answer_without_a_status_line_is_a_bad_answer() {
    run(async {
        let nonsense = |mut s: TcpStream| async move { s.write_all(b"SSH-2.0-OpenSSH_9.6\r\n\r\n").await };
        assert_retry(&beside_a_good_one(&raw(nonsense).await).await, "bad_answer");
    });
}

#[test]
fn a_receiver_that_never_answers_is_a_timeout_and_one_that_hangs_up_a_reset() {
    run(async {
        let silent = |s: TcpStream| async move {
            std::future::pending::<()>().await;
            drop(s);
            Ok(())
        };
        assert_retry(&beside_a_good_one(&raw(silent).await).await, "timeout");
        let hangs_up = |s: TcpStream| async move {
            drop(s);
            Ok(())
        };
        assert_retry(&beside_a_good_one(&raw(hangs_up).await).await, "reset");
        let breaks_off = |mut s: TcpStream| async move { s.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhalf").await };
        assert_retry(&beside_a_good_one(&raw(breaks_off).await).await, "reset");
    });
}

#[test]
fn a_receiver_that_is_not_there_is_a_connect_failure_and_an_unknown_name_one_of_dns() {
    run(async {
        let port = crate::support::free_port();
        assert_retry(&beside_a_good_one(&format!("http://127.0.0.1:{port}/")).await, "connect");
        assert_retry(&beside_a_good_one("http://no-such-host.invalid/").await, "dns");
    });
}

#[test]
fn a_redirect_is_not_followed() {
    run(async {
        let elsewhere = Receiver::accepting().await;
        let target = elsewhere.url.clone();
        let redirects = Receiver::start(move |_, _| status(302).header("location", target.as_str())).await;
        let line = beside_a_good_one(&redirects.url).await;
        assert_retry(&line, "status");
        assert!(line.contains("status=302"), "{line}");
        assert_eq!(elsewhere.count(), 0);
    });
}

#[test]
fn a_name_that_resolves_to_an_address_that_is_not_public_is_never_connected_to() {
    run(async {
        let broker = Broker::shared();
        let receiver = Receiver::accepting().await;
        let url = receiver.url.replace("127.0.0.1", "localhost");
        let setup = Setup::new(&broker, &(QUICK.to_owned() + &subscriber("a", &url, "http = { allow_private_addresses = false }")));
        let daemon = setup.start().await;
        broker.publish("a.b", [event(0)]).await;
        daemon.wait_log("failure=\"address_blocked\"").await;
        assert_eq!(receiver.count(), 0);
        assert!(!daemon.log().contains("token"), "no path of the URL in the log");
        let allowed = Setup::new(
            &broker,
            &(QUICK.to_owned()
                + &subscriber("a", &url, "http = { allow_private_addresses = false, allow_addresses = [\"127.0.0.0/8\", \"::1\"] }")),
        );
        drop(daemon);
        let _daemon = allowed.start().await;
        receiver.wait_all(1).await;
    });
}

#[test]
fn userinfo_of_a_url_is_sent_as_basic_auth_and_shown_nowhere() {
    run(async {
        let broker = Broker::shared();
        let receiver = Receiver::start(|_, n| status(if n == 0 { 500 } else { 200 })).await;
        let url = receiver.url.replace("http://", "http://someone:hunter2@");
        let setup = Setup::new(&broker, &(QUICK.to_owned() + &subscriber("a", &url, "")));
        assert!(!setup.ok(&["check"]).contains("hunter2"));
        let daemon = setup.start().await;
        broker.publish("a.b", [event(0)]).await;
        let request = receiver.wait_requests(2).await.remove(0);
        assert_eq!(request.header("authorization"), "Basic c29tZW9uZTpodW50ZXIy");
        assert!(!daemon.log().contains("hunter2") && !daemon.log().contains("someone"), "{}", daemon.log());
    });
}

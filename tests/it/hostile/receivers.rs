//! Receivers with bad answers. Each runs alongside a good subscriber that must
//! not notice.

use std::time::{Duration, Instant};

use crate::support::{
    daemon::{QUICK, Setup, subscriber},
    eventually,
    queue::{Queue, on_both_queues},
    raw::{Raw, deaf, drip, flood, once},
    receiver::{Receiver, event, status},
};

on_both_queues!(
    an_answer_of_a_gibibyte_is_cut_off_and_its_status_counts,
    an_answer_that_never_ends_counts_by_its_status,
    endless_headers_end_with_the_timeout_or_their_number,
    an_answer_without_a_status_line_is_a_bad_answer,
    a_receiver_that_never_answers_is_a_timeout_and_one_that_hangs_up_a_reset,
    a_receiver_that_is_not_there_is_a_connect_failure_and_an_unknown_name_one_of_dns,
    a_redirect_is_not_followed,
    a_name_that_resolves_to_an_address_that_is_not_public_is_never_connected_to,
    userinfo_of_a_url_is_sent_as_basic_auth_and_shown_nowhere,
);

/// Runs a hostile receiver alongside a good one; returns the log line of its first attempt.
async fn alongside_a_good_one(kind: &Queue, url: &str) -> String {
    let queue = kind.another();
    let good = Receiver::accepting().await;
    let text = QUICK.to_owned()
        + &subscriber(
            "bad",
            url,
            "http = { timeout = \"2s\" }\nretry = { initial_interval = \"1h\" }",
        )
        + &subscriber("good", &good.url, "");
    let setup = Setup::new(&queue, &text);
    let daemon = setup.start().await;
    queue.publish("a.b", (0..50).map(event)).await;
    let start = Instant::now();
    good.wait_all(50).await;
    assert!(start.elapsed() < Duration::from_secs(2), "the good one waited {:?}", start.elapsed());
    let attempt = |log: &str| {
        log.lines().find(|l| l.contains("attempt subscriber=\"bad\"")).map(str::to_owned)
    };
    eventually("the attempt ends", async || attempt(&daemon.log()).is_some()).await;
    assert!(start.elapsed() < Duration::from_secs(10), "the attempt took {:?}", start.elapsed());
    let line = attempt(&daemon.log()).expect("just seen");
    assert!(daemon.peak_mib() < 100.0, "{} MiB", daemon.peak_mib());
    // On a busy machine the events come in more than one batch.
    let attempts = |log: &str| -> Vec<String> {
        log.lines()
            .filter(|l| l.contains("attempt subscriber=\"bad\""))
            .map(str::to_owned)
            .collect()
    };
    let events = |attempt: &String| {
        let count = attempt.split_once(" events=").expect("a count").1;
        count.split(' ').next().and_then(|n| n.parse::<u32>().ok()).expect("a number")
    };
    eventually("each event is attempted", async || {
        attempts(&daemon.log()).iter().map(events).sum::<u32>() == 50
    })
    .await;
    // Nothing is lost: accepted, or an envelope waits on the ladder (for an hour and more, at its
    // first level).
    let retries = |a: &&String| a.contains("outcome=\"retry\"");
    let retries = attempts(&daemon.log()).iter().filter(retries).count();
    if retries > 0 {
        queue.wait_retries("bad", 11, u32::try_from(retries).expect("few")).await;
    }
    queue.wait_backlog("bad", 0).await;
    line
}

#[track_caller]
fn assert_retry(line: &str, failure: &str) {
    assert!(
        line.contains("outcome=\"retry\"") && line.contains(&format!("failure=\"{failure}\"")),
        "not `{failure}`: {line}"
    );
}

async fn an_answer_of_a_gibibyte_is_cut_off_and_its_status_counts(queue: Queue) {
    let block = || vec![b'x'; 1 << 20];
    let accepts =
        Raw::start(flood(b"HTTP/1.1 200 x\r\ncontent-length: 1073741824\r\n\r\n", block())).await;
    let line = alongside_a_good_one(&queue, &accepts.url()).await;
    assert!(line.contains("outcome=\"delivered\""), "{line}");
    let refuses =
        Raw::start(flood(b"HTTP/1.1 500 x\r\ncontent-length: 1073741824\r\n\r\n", block())).await;
    let line = alongside_a_good_one(&queue, &refuses.url()).await;
    assert_retry(&line, "status");
    assert!(
        line.len() < 512 && !line.contains("xx"),
        "the answer's text is not logged: {} bytes",
        line.len()
    );
}

async fn an_answer_that_never_ends_counts_by_its_status(queue: Queue) {
    let raw = Raw::start(drip(b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n", b"x")).await;
    let line = alongside_a_good_one(&queue, &raw.url()).await;
    assert!(line.contains("outcome=\"delivered\""), "{line}");
    let raw = Raw::start(drip(b"HTTP/1.1 500 x\r\ncontent-length: 100000\r\n\r\n", b"x")).await;
    assert_retry(&alongside_a_good_one(&queue, &raw.url()).await, "status");
}

async fn endless_headers_end_with_the_timeout_or_their_number(queue: Queue) {
    let header = b"x-header: and another one\r\n";
    let slow = Raw::start(drip(b"HTTP/1.1 200 OK\r\n", header)).await;
    assert_retry(&alongside_a_good_one(&queue, &slow.url()).await, "timeout");
    let fast = Raw::start(flood(b"HTTP/1.1 200 OK\r\n", header.repeat(1000))).await;
    assert_retry(&alongside_a_good_one(&queue, &fast.url()).await, "bad_answer");
}

async fn an_answer_without_a_status_line_is_a_bad_answer(queue: Queue) {
    let raw = Raw::start(once(b"SSH-2.0-OpenSSH_9.6\r\n\r\n")).await;
    assert_retry(&alongside_a_good_one(&queue, &raw.url()).await, "bad_answer");
}

async fn a_receiver_that_never_answers_is_a_timeout_and_one_that_hangs_up_a_reset(queue: Queue) {
    let silent = Raw::start(deaf).await;
    assert_retry(&alongside_a_good_one(&queue, &silent.url()).await, "timeout");
    let hangs_up = Raw::start(once(b"")).await;
    assert_retry(&alongside_a_good_one(&queue, &hangs_up.url()).await, "reset");
    let breaks_off = Raw::start(once(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhalf")).await;
    let line = alongside_a_good_one(&queue, &breaks_off.url()).await;
    assert!(line.contains("outcome=\"delivered\""), "its status was read: {line}");
}

async fn a_receiver_that_is_not_there_is_a_connect_failure_and_an_unknown_name_one_of_dns(
    queue: Queue,
) {
    let port = crate::support::free_port();
    assert_retry(
        &alongside_a_good_one(&queue, &format!("http://127.0.0.1:{port}/")).await,
        "connect",
    );
    assert_retry(&alongside_a_good_one(&queue, "http://no-such-host.invalid/").await, "dns");
}

async fn a_redirect_is_not_followed(queue: Queue) {
    let elsewhere = Receiver::accepting().await;
    let target = elsewhere.url.clone();
    let redirects =
        Receiver::start(move |_, _| status(302).header("location", target.as_str())).await;
    let line = alongside_a_good_one(&queue, &redirects.url).await;
    assert_retry(&line, "status");
    assert!(line.contains("status=302"), "{line}");
    assert_eq!(elsewhere.count(), 0);
}

async fn a_name_that_resolves_to_an_address_that_is_not_public_is_never_connected_to(queue: Queue) {
    let receiver = Receiver::accepting().await;
    let url = receiver.url.replace("127.0.0.1", "localhost");
    let setup = Setup::new(
        &queue,
        &(QUICK.to_owned() + &subscriber("a", &url, "http = { allow_private_addresses = false }")),
    );
    let daemon = setup.start().await;
    queue.publish("a.b", [event(0)]).await;
    daemon.wait_log("failure=\"address_blocked\"").await;
    assert_eq!(receiver.count(), 0);
    assert!(!daemon.log().contains("hook/token"), "no path of the URL in the log");
    let allowed = Setup::new(
        &queue,
        &(QUICK.to_owned()
            + &subscriber(
                "a",
                &url,
                "http = { allow_private_addresses = false, allow_addresses = [\"127.0.0.0/8\", \"::1\"] }",
            )),
    );
    drop(daemon);
    let _daemon = allowed.start().await;
    receiver.wait_all(1).await;
}

async fn userinfo_of_a_url_is_sent_as_basic_auth_and_shown_nowhere(queue: Queue) {
    let receiver = Receiver::start(|_, n| status(if n == 0 { 500 } else { 200 })).await;
    let url = receiver.url.replace("http://", "http://someone:hunter2@");
    let setup = Setup::new(&queue, &(QUICK.to_owned() + &subscriber("a", &url, "")));
    assert!(!setup.ok(&["check"]).contains("hunter2"));
    let daemon = setup.start().await;
    queue.publish("a.b", [event(0)]).await;
    let request = receiver.wait_requests(2).await.remove(0);
    assert_eq!(request.header("authorization"), "Basic c29tZW9uZTpodW50ZXIy");
    assert!(
        !daemon.log().contains("hunter2") && !daemon.log().contains("someone"),
        "{}",
        daemon.log()
    );
}

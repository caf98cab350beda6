//! Bearer tokens that the daemon fetches (RFC 6749, section 4.4).

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use serde_json::Value;
use tokio::sync::watch;

use crate::support::{
    daemon::{Daemon, QUICK, SLOW, Setup, subscriber},
    eventually,
    queue::{Queue, on_both_queues},
    receiver::{Answer, Receiver, Request, event, status},
};

on_both_queues!(
    one_token_serves_all_requests,
    a_token_that_is_refused_is_replaced_within_the_attempt_and_once_a_minute,
    without_a_token_nothing_is_sent_and_the_circuit_stays_closed,
    a_server_of_tokens_that_is_down_is_not_asked_for_each_batch,
    a_token_that_expires_at_once_serves_one_attempt,
);

const TYPE: &str = "activity_log.user.updated";

/// It is in the header and the body in another form.
const SECRET: &str = "hunter2:&%";

fn tokens(url: &str) -> String {
    format!(
        "auth = {{ oauth2 = {{ token_url = \"{url}\", client_id = \"my client\", client_secret = \"{SECRET}\", scope = \"a b\", audience = \"x\" }} }}"
    )
}

/// The first, second, third token, valid for an hour.
fn token(n: usize) -> Answer {
    status(200).body(match n {
        0 => r#"{"access_token":"token-1","token_type":"bearer","expires_in":3600}"#,
        1 => r#"{"access_token":"token-2","token_type":"Bearer","expires_in":"3600"}"#,
        _ => r#"{"access_token":"token-3","expires_in":3600}"#,
    })
}

fn authorization(requests: &[Request]) -> Vec<&str> {
    requests.iter().map(|r| r.header("authorization")).collect()
}

fn form(request: &Request) -> Vec<(String, String)> {
    url::form_urlencoded::parse(&request.body).into_owned().collect()
}

fn assert_silent(setup: &Setup, daemon: &Daemon) {
    for text in [daemon.log(), setup.ok(&["check"]), setup.ok(&["plan", "a"])] {
        assert!(!text.contains("hunter2") && !text.contains("token-"), "{text}");
    }
}

async fn one_token_serves_all_requests(queue: Queue) {
    let server = Receiver::start(|_, n| token(n)).await;
    let receiver = Receiver::accepting().await;
    let own = tokens(&server.url) + "\nhttp = { concurrency = 8 }\nbatch = { max_events = 1 }";
    let setup = Setup::new(&queue, &(QUICK.to_owned() + &subscriber("a", &receiver.url, &own)));
    let daemon = setup.start().await;
    queue.publish(TYPE, (0..30).map(event)).await;
    receiver.wait_all(30).await;
    let requests = receiver.requests();
    assert_eq!(authorization(&requests), vec!["Bearer token-1"; 30]);
    assert!(requests.iter().all(Request::verified));
    let [asked] = &server.requests()[..] else { panic!("asked {} times", server.count()) };
    // RFC 6749, section 2.3.1: each is encoded as in a form before.
    assert_eq!(asked.header("authorization"), "Basic bXkrY2xpZW50Omh1bnRlcjIlM0ElMjYlMjU=");
    assert_eq!(asked.header("content-type"), "application/x-www-form-urlencoded");
    assert_eq!(asked.header("accept"), "application/json");
    let expected = [("grant_type", "client_credentials"), ("scope", "a b"), ("audience", "x")];
    assert_eq!(form(asked), expected.map(|(k, v)| (k.to_owned(), v.to_owned())));
    assert_silent(&setup, &daemon);
}

async fn a_token_that_is_refused_is_replaced_within_the_attempt_and_once_a_minute(queue: Queue) {
    let server = Receiver::start(|_, n| token(n)).await;
    let receiver = Receiver::start(|r, _| match r.header("authorization") {
        "Bearer token-2" => status(200),
        _ => status(401),
    })
    .await;
    let setup = Setup::new(
        &queue,
        &(SLOW.to_owned() + &subscriber("a", &receiver.url, &tokens(&server.url))),
    );
    let daemon = setup.start().await;
    queue.publish(TYPE, [event(0)]).await;
    receiver.wait_all(1).await;
    let requests = receiver.take_requests();
    assert_eq!(authorization(&requests), ["Bearer token-1", "Bearer token-2"]);
    assert!(requests.iter().all(|r| r.attempt() == 1 && r.id() == requests[0].id()));
    // The new one is refused as well: that is a failure, and no reason to ask again.
    receiver.now(|_, _| status(401));
    queue.publish(TYPE, [event(1)]).await;
    eventually("the failure is reported", async || {
        daemon.log().contains("outcome=\"retry\" status=401 failure=\"status\"")
    })
    .await;
    assert_eq!(authorization(&receiver.requests()), ["Bearer token-2"]);
    assert_eq!(server.count(), 2);
    assert_silent(&setup, &daemon);
}

async fn without_a_token_nothing_is_sent_and_the_circuit_stays_closed(queue: Queue) {
    let inner = Receiver::accepting().await;
    let never = Arc::new(watch::Sender::new(false));
    let (inner_url, gate) = (inner.url.clone(), never.clone());
    let answer = move |n: usize| match n {
        0 => status(503),
        1 => status(302).header("location", &inner_url),
        2 => status(200).when(&gate),
        3 => status(200).body("{\"access_token\":"),
        4 => status(200).body(r#"{"access_token":"token-1","token_type":"mac"}"#),
        5 => status(200).body("{\"access_token\":\"token-1\\r\\nx: y\"}"),
        6 => status(400).body(r#"{"error":"invalid_scope","error_description":"token-1"}"#),
        7 => status(403).body(r#"{"error":"token-1"}"#),
        _ => status(200).body(Box::leak(" ".repeat(100_000).into_boxed_str())),
    };
    let causes = [
        "it answered 503",
        "it answered 302",
        "none within 1s, which is http.timeout",
        "its answer is none of RFC 6749, section 5.1",
        "its tokens are of another type than Bearer",
        "its token is none that a header can carry",
        "it answered 400, invalid_scope",
        "it answered 403",
        "its answer has more than 64 KiB",
    ];
    let (mut servers, mut text) = (Vec::new(), SLOW.replace("failures = 0", "failures = 1"));
    let receiver = Receiver::accepting().await;
    for n in 0..causes.len() {
        let answer = answer.clone();
        let server = Receiver::start(move |_, _| answer(n)).await;
        let timeout = if n == 2 { "1s" } else { "30s" };
        let own = tokens(&server.url) + &format!("\nhttp = {{ timeout = \"{timeout}\" }}");
        text += &subscriber(&format!("s{n}"), &receiver.url, &own);
        servers.push(server);
    }
    let setup = Setup::new(&queue, &text);
    let daemon = setup.start().await;
    queue.publish(TYPE, [event(0)]).await;
    for (n, cause) in causes.iter().enumerate() {
        let name = format!("s{n}");
        let line = format!("attempt subscriber=\"{name}\"");
        eventually(&format!("{cause}: {line}"), async || {
            let log = daemon.log();
            let found = log.lines().find(|l| l.contains(&line));
            found.is_some_and(|l| l.contains("failure=\"auth\"") && l.contains(cause))
        })
        .await;
    }
    assert_eq!((receiver.count(), inner.count()), (0, 0), "nothing was sent");
    assert!(!daemon.log().contains("circuit"), "{}", daemon.log());
    assert!(!daemon.log().contains("token-1"), "{}", daemon.log());
    let names: Vec<String> = (0..causes.len()).map(|n| format!("s{n}")).collect();
    for (name, server) in names.iter().zip(&servers) {
        server.now(|_, _| token(0));
        eventually("it waits for its retry", async || {
            setup.ok(&["retry", "list", name]).contains("auth")
        })
        .await;
        setup.ok(&["retry", "now", name]);
    }
    let requests = receiver.wait_requests(names.len()).await;
    assert!(requests.iter().all(|r| r.attempt() == 2), "the one without a token counts");
    assert_eq!(authorization(&requests), vec!["Bearer token-1"; names.len()]);
    never.send_replace(true);
}

async fn a_server_of_tokens_that_is_down_is_not_asked_for_each_batch(queue: Queue) {
    let server = Receiver::start(|_, _| status(503)).await;
    let receiver = Receiver::start(|r, _| match r.header("authorization") {
        "Bearer token-2" => status(200),
        _ => status(401),
    })
    .await;
    let text = SLOW.replace("failures = 0", "failures = 1");
    let own = tokens(&server.url) + "\nhttp = { concurrency = 8 }";
    let setup = Setup::new(&queue, &(text + &subscriber("a", &receiver.url, &own)));
    let daemon = setup.start().await;
    queue.publish(TYPE, (0..24).map(event)).await;
    eventually("all attempts fail", async || {
        daemon.log().matches("failure=\"auth\"").count() == 24
    })
    .await;
    // Eight wait for one request together: at once, after 1 s, after 2 s.
    assert!(server.count() <= 6, "{} requests", server.count());
    // A token that the receiver refuses is not used again, although there is no other.
    let before = server.count();
    let given = AtomicBool::new(false);
    server.now(move |_, _| match given.swap(true, Ordering::SeqCst) {
        false => token(0),
        true => status(503),
    });
    setup.ok(&["retry", "now", "a"]);
    server.wait_requests(before + 2).await;
    server.now(|_, _| token(1));
    eventually("all are accepted", async || {
        setup.ok(&["retry", "now", "a"]);
        receiver.accepted().len() == 24
    })
    .await;
    let refused = receiver.requests().iter().filter(|r| r.status == 401).count();
    assert!(refused <= 8, "those that were under way: {refused}");
    assert_silent(&setup, &daemon);
}

async fn a_token_that_expires_at_once_serves_one_attempt(queue: Queue) {
    // This server wants to see the client in the body.
    let server = Receiver::start(|r, _| {
        let named = form(r).iter().any(|(k, v)| k == "client_secret" && v == SECRET);
        match named && r.header("authorization").is_empty() {
            true => status(200).body(r#"{"access_token":"token-1","expires_in":0}"#),
            false => status(401).body(r#"{"error":"invalid_client"}"#),
        }
    })
    .await;
    let receiver = Receiver::accepting().await;
    let setup = Setup::new(
        &queue,
        &(SLOW.to_owned() + &subscriber("a", &receiver.url, &tokens(&server.url))),
    );
    let daemon = setup.start().await;
    for n in 0..3 {
        queue.publish(TYPE, [event(n)]).await;
        receiver.wait_all(n + 1).await;
    }
    assert_eq!(server.count(), 1 + 3, "which way is taken is remembered");
    assert_silent(&setup, &daemon);
}

#[test]
fn check_and_test_fetch_a_token() {
    crate::support::run(async {
        let queue = Queue::embedded();
        let server = Receiver::start(|_, n| token(n)).await;
        let receiver = Receiver::accepting().await;
        let setup = Setup::new(
            &queue,
            &(SLOW.to_owned() + &subscriber("a", &receiver.url, &tokens(&server.url))),
        );
        let checked = setup.ok(&["check", "--connect"]);
        assert!(checked.contains("gives a token for 1h"), "{checked}");
        let tested: Value =
            serde_json::from_str(&setup.ok(&["test", "a", "--json"])).expect("JSON");
        assert_eq!(tested["headers"]["authorization"], "[redacted]", "{tested}");
        assert_eq!(authorization(&receiver.requests()), ["Bearer token-2"]);
        server.now(|_, _| status(401).body(r#"{"error":"invalid_client"}"#));
        for command in [&["check", "--connect"][..], &["test", "a"]] {
            let output = setup.run(command);
            let text =
                String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
            assert!(
                !output.status.success() && text.contains("it answered 401, invalid_client"),
                "{text}"
            );
        }
        assert_eq!(receiver.count(), 1);
    });
}

//! Subscribers that are made, changed and removed over the API.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use crate::support::{
    api::{Answered, Api},
    broker::Broker,
    daemon::{QUICK, Setup, subscriber},
    eventually,
    queue::{Queue, on_both_queues},
    receiver::{Receiver, event, status},
    tests_that_need,
};

on_both_queues!(
    a_subscriber_made_over_the_api_gets_events_outlives_the_daemon_and_is_changed_and_removed,
    files_win_and_a_reload_removes_no_subscriber_of_the_api,
    a_removal_that_a_kill_interrupts_goes_on_and_its_name_is_free_when_its_queues_are_deleted,
);

tests_that_need!(broker: daemons_with_one_prefix_unbind_no_subscriber_of_the_api_of_another_store);

const TOKEN: &str = "Bearer quite-secret";

/// A daemon that manages subscribers, whose requests may go to this machine.
fn managing(api: &Api, more: &str) -> String {
    api.section()
        + "token = \"quite-secret\"\nmanage = true\n"
        + "[admin.api_subscribers]\nallow_http = true\nallow_addresses = [\"127.0.0.0/8\"]\n"
        + QUICK
        + more
}

/// Sends a request with the token; `version` as its `if-match`.
async fn send(api: &Api, method: &str, path: &str, version: &str, body: &Value) -> Answered {
    let mut headers = vec![("authorization", TOKEN), ("content-type", "application/json")];
    if !version.is_empty() {
        headers.push(("if-match", version));
    }
    let body = if body.is_null() { String::new() } else { body.to_string() };
    let path = format!("/api/v1/subscribers{path}");
    let mut answered = None;
    // After a start the store is opened while the daemon delivers already.
    eventually("the store is open", async || {
        let answer = api.send(method, &path, &headers, &body).await;
        let is_open = answer.status != 503;
        answered = Some(answer);
        is_open
    })
    .await;
    answered.expect("an answer")
}

/// Waits until the last of these events is accepted. Until then these have come, and no other.
async fn accepted(receiver: &Receiver, expected: &[u64]) {
    let all = || receiver.accepted().into_iter().collect::<BTreeSet<_>>();
    eventually("the last event", async || all().last() == expected.last()).await;
    assert!(all().into_iter().eq(expected.iter().copied()), "{:?}", receiver.accepted());
}

#[track_caller]
fn refused(answer: &Answered, status: u16, kind: &str, field: &str) {
    let problem = answer.json();
    assert!(
        answer.status == status
            && problem["type"].as_str().is_some_and(|uri| uri.ends_with(kind))
            && problem["field"].as_str().unwrap_or_default() == field,
        "{status} {kind} {field}: {answer:?}"
    );
}

async fn a_subscriber_made_over_the_api_gets_events_outlives_the_daemon_and_is_changed_and_removed(
    queue: Queue,
) {
    let (receiver, api) = (Receiver::accepting().await, Api::new());
    let setup = Setup::new(&queue, &managing(&api, ""));
    let daemon = setup.start().await;
    let made = json!({
        "name": "siem", "url": receiver.url, "events": ["user.*"], "headers": { "X-Key": "hunter2" },
    });
    let answer = send(&api, "POST", "", "", &made).await;
    assert_eq!(answer.status, 201, "{answer:?}");
    let change = answer.json();
    let version = answer.header("etag").to_owned();
    assert!(
        answer.header("location") == "/api/v1/subscribers/siem"
            && change["secret"].as_str().is_some_and(|secret| secret.starts_with("whsec_"))
            && change["active_since"].is_string()
            && version == format!("\"{}\"", change["version"].as_str().expect("a version")),
        "{answer:?}"
    );
    queue.publish("user.created", [event(0)]).await;
    queue.publish("order.paid", [event(1)]).await;
    accepted(&receiver, &[0]).await;
    // A killed daemon's successor goes on with it; what was not settled comes again.
    daemon.kill();
    let daemon = setup.start().await;
    queue.publish("user.created", [event(2)]).await;
    accepted(&receiver, &[0, 2]).await;
    let shown = send(&api, "GET", "/siem", "", &Value::Null).await;
    assert!(shown.header("etag") == version && !shown.text.contains("hunter2"), "{shown:?}");
    assert!(!shown.text.contains("whsec_"), "{shown:?}");
    let one = shown.json();
    assert_eq!(one["origin"]["from"], "api");
    assert_eq!(one["origin"]["created"]["by"], "token");
    // What was read can be written back, and means the same.
    let answer = send(&api, "PUT", "/siem", &version, &one["document"]).await;
    assert_eq!(answer.status, 200, "{answer:?}");
    let answer = send(&api, "PATCH", "/siem", &version, &json!({ "events": ["order.*"] })).await;
    refused(&answer, 412, "/version", "");
    let version = send(&api, "GET", "/siem", "", &Value::Null).await.header("etag").to_owned();
    let answer = send(&api, "PATCH", "/siem", &version, &json!({ "events": ["order.*"] })).await;
    assert_eq!(answer.status, 200, "{answer:?}");
    queue.publish("order.paid", [event(3)]).await;
    accepted(&receiver, &[0, 2, 3]).await;
    // Commands name it as they name one of a file.
    assert!(setup.ok(&["test", "siem"]).contains("answer:  200"));
    setup.ok(&["pause", "siem"]);
    setup.ok(&["resume", "siem"]);
    for command in ["test", "pause", "resume"] {
        assert!(!setup.run(&[command, "nobody"]).status.success(), "{command}");
        assert_eq!(setup.run(&[command, "../siem"]).status.code(), Some(2), "{command}");
    }
    let rotated = send(&api, "POST", "/siem/rotate-secret", "", &json!({})).await;
    assert!(rotated.status == 200 && rotated.json()["overlap_until"].is_string(), "{rotated:?}");
    // Without an overlap the one before ends at once, and the overlap that was promised goes on.
    let rotated = send(&api, "POST", "/siem/rotate-secret", "", &json!({ "overlap": "0s" })).await;
    assert!(rotated.status == 200 && rotated.json()["overlap_until"].is_null(), "{rotated:?}");
    let before = receiver.requests().len();
    setup.ok(&["test", "siem"]);
    let signed = receiver
        .wait_requests(before + 1)
        .await
        .last()
        .expect("one")
        .header("webhook-signature")
        .to_owned();
    assert_eq!(signed.split(' ').count(), 2, "{signed}");
    refused(
        &send(&api, "DELETE", "/siem?backlog=drop", "", &Value::Null).await,
        428,
        "/version",
        "",
    );
    refused(&send(&api, "DELETE", "/siem", "*", &Value::Null).await, 400, "/field", "backlog");
    let removed = send(&api, "DELETE", "/siem?backlog=drop", "*", &Value::Null).await;
    assert_eq!(
        (removed.status, &removed.json()["backlog"]),
        (200, &json!("dropped")),
        "{removed:?}"
    );
    refused(&send(&api, "GET", "/siem", "", &Value::Null).await, 404, "/subscriber", "");
    let operations = api.send("GET", "/api/v1/operations", &[("authorization", TOKEN)], "").await;
    assert!(
        operations.text.contains("delete_subscriber") && !operations.text.contains("hunter2"),
        "{operations:?}"
    );
    drop(daemon);
}

async fn files_win_and_a_reload_removes_no_subscriber_of_the_api(queue: Queue) {
    let (receiver, other, api) =
        (Receiver::accepting().await, Receiver::accepting().await, Api::new());
    let of_file = subscriber("siem", &other.url, "");
    let setup = Setup::new(&queue, &managing(&api, ""));
    let without = std::fs::read_to_string(setup.config()).expect("text");
    let of_b = subscriber("b", &other.url, "events = [\"b\"]");
    setup.write("hooktrail.toml", without.clone() + &of_b);
    let _daemon = setup.start().await;
    for name in ["siem", "crm"] {
        let made = json!({ "name": name, "url": receiver.url, "events": ["a"] });
        assert_eq!(send(&api, "POST", "", "", &made).await.status, 201);
        refused(&send(&api, "POST", "", "", &made).await, 409, "/exists", "");
    }
    let b = send(&api, "POST", "", "", &json!({ "name": "b", "url": receiver.url })).await;
    refused(&b, 409, "/exists", "");
    let reload = async |text: &str| {
        let new = setup.write("new.toml", format!("{without}\n{text}"));
        std::fs::rename(new, setup.config()).expect("renames");
        let headers = [("authorization", TOKEN), ("content-type", "application/json")];
        let answer = api.send("POST", "/api/v1/reload", &headers, "{}").await;
        assert_eq!(answer.status, 200, "{answer:?}");
        answer.json()["changes"].clone()
    };
    // The file's takes over, and nobody is unbound when it goes again.
    reload(&of_file).await;
    let shown = send(&api, "GET", "/siem", "", &Value::Null).await.json();
    assert!(shown["origin"]["from"] == "file" && shown["shadows"]["from"] == "api", "{shown}");
    let change = send(&api, "PATCH", "/siem", "*", &json!({ "events": ["b"] })).await;
    refused(&change, 409, "/exists", "");
    queue.publish("a", [event(0)]).await;
    other.wait_requests(1).await;
    receiver.wait_requests(1).await;
    reload("").await;
    queue.publish("a", [event(1)]).await;
    receiver.wait_requests(3).await;
    assert_eq!(other.accepted(), [0]);
    let mut got = receiver.accepted();
    got.sort_unstable();
    assert_eq!(got, [0, 1, 1]);
}

/// Waits until `check --connect` says with this severity whose subscribers made over the API count:
/// the broker counts the records every few seconds. Returns what it found, and the remedy.
async fn whose(setup: &Setup, severity: &str) -> [String; 2] {
    let mut said = Default::default();
    eventually(&format!("it is {severity}"), async || {
        let [found_severity, rest @ ..] = inspected(setup);
        said = rest;
        found_severity == severity
    })
    .await;
    said
}

fn inspected(setup: &Setup) -> [String; 3] {
    let output = setup.run(&["check", "--connect", "--json"]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let findings = text.lines().map(|line| serde_json::from_str::<Value>(line).expect("JSON"));
    let about = json!(["subscribers made over the API"]);
    let found = findings.into_iter().find(|finding| finding["about"] == about);
    let found = found.unwrap_or_default();
    ["severity", "found", "remedy"].map(|key| found[key].as_str().unwrap_or_default().to_owned())
}

/// Neither has history, or the other one makes no subscribers: that no daemon has claimed history says
/// nothing of them.
fn daemons_with_one_prefix_unbind_no_subscriber_of_the_api_of_another_store() {
    crate::support::run(async {
        const NO_HISTORY: &str = "[history]\nretention = \"0s\"\n";
        for other_manages in [true, false] {
            let (receiver, api) = (Receiver::accepting().await, Api::new());
            let broker = Broker::shared();
            for name in ["siem", "two"] {
                broker.knows(name);
            }
            // So that the other one misses not all of them.
            let files = subscriber("a", &receiver.url, "events = [\"nothing\"]");
            let setup = Setup::new(&broker, &managing(&api, &(NO_HISTORY.to_owned() + &files)));
            let daemon = setup.start().await;
            let made = json!({ "name": "siem", "url": receiver.url, "events": ["user.*"] });
            let answer = send(&api, "POST", "", "", &made).await;
            assert_eq!(answer.status, 201, "{answer:?}");
            broker.publish("user.created", [event(0)]).await;
            accepted(&receiver, &[0]).await;
            assert!(daemon.stop().await.success());

            let its_api = Api::new();
            let text = match other_manages {
                true => managing(&its_api, &(NO_HISTORY.to_owned() + &files)),
                false => format!("{QUICK}{files}"),
            };
            let other_setup = Setup::new(&broker, &text);
            let other = other_setup.start().await;
            eventually("it has decided", async || {
                let log = other.log();
                log.contains("subscribers made over the API for it") || log.contains("was unbound")
            })
            .await;
            broker.publish("user.created", [event(1)]).await;
            if other_manages {
                let made = json!({ "name": "siem", "url": receiver.url });
                let headers = [("authorization", TOKEN), ("content-type", "application/json")];
                let path = "/api/v1/subscribers";
                let answer = its_api.send("POST", path, &headers, &made.to_string()).await;
                assert!(
                    answer.status == 503 && answer.text.contains("another store"),
                    "{answer:?}"
                );
            }
            assert!(other.stop().await.success());
            let severity = if other_manages { "harmful" } else { "note" };
            let [found, remedy] = whose(&other_setup, severity).await;
            assert!(found.contains("those of another store count on prefix `"), "{found}");
            assert!(remedy.contains("hooktrail store adopt"), "{remedy}");
            let [found, _] = whose(&setup, "ok").await;
            assert_eq!(found, "those of this store count on the prefix");
            let _daemon = setup.start().await;
            broker.publish("user.created", [event(2)]).await;
            accepted(&receiver, &[0, 1, 2]).await;

            if other_manages {
                let adopted = other_setup.ok(&["store", "adopt"]);
                assert!(adopted.contains("are not copied"), "{adopted}");
                let again = other_setup.ok(&["store", "adopt"]);
                assert!(again.contains("count already"), "{again}");
                whose(&other_setup, "ok").await;
                whose(&setup, "harmful").await;
                let _other = other_setup.start().await;
                let made = json!({ "name": "two", "url": receiver.url, "events": ["nothing"] });
                let answer = send(&its_api, "POST", "", "", &made).await;
                assert_eq!(answer.status, 201, "{answer:?}");
                let headers = [("authorization", TOKEN), ("if-match", "\"1\"")];
                let path = "/api/v1/subscribers/nobody?backlog=keep";
                eventually("the first one changes none any more", async || {
                    api.send("DELETE", path, &headers, "").await.status == 503
                })
                .await;
            }
        }
    });
}

#[test]
fn what_is_in_flight_to_a_removed_subscriber_goes_to_no_other_of_its_name_and_is_dropped_with_it() {
    crate::support::run(async {
        let (queue, api) = (Queue::embedded(), Api::new());
        let gate = tokio::sync::watch::Sender::new(false);
        let held = gate.clone();
        // It fails each request, once it may.
        let slow = Receiver::start(move |_, _| status(500).when(&held)).await;
        let other = Receiver::accepting().await;
        let setup = Setup::new(&queue, &managing(&api, ""));
        let _daemon = setup.start().await;
        for backlog in ["keep", "drop"] {
            let made = json!({ "name": "siem", "url": slow.url });
            let answer = send(&api, "POST", "", "", &made).await;
            assert_eq!(answer.status, 201, "{backlog}: {answer:?}");
            let before = slow.requests().len();
            queue.publish("user.created", [event(0)]).await;
            slow.wait_requests(before + 1).await;
            let delete = format!("/siem?backlog={backlog}");
            let version = answer.header("etag").to_owned();
            if backlog == "keep" {
                let answer = send(&api, "DELETE", &delete, &version, &Value::Null).await;
                assert_eq!(answer.status, 200, "{answer:?}");
                // Its request in flight would fail, and come to whoever has its name.
                let again = json!({ "name": "siem", "url": other.url });
                let answer = send(&api, "POST", "", "", &again).await;
                refused(&answer, 409, "/backlog", "");
                assert!(answer.text.contains("in flight"), "{answer:?}");
                gate.send_replace(true);
                eventually("it has failed, and waits", async || {
                    let answer = send(&api, "POST", "", "", &again).await;
                    answer.status == 409 && answer.text.contains("1 batch to retry")
                })
                .await;
                gate.send_replace(false);
                let pruned = setup.run(&["prune", "siem", "--with-events", "--yes"]);
                assert!(pruned.status.success(), "{pruned:?}");
            } else {
                let dropping = send(&api, "DELETE", &delete, &version, &Value::Null);
                let opened = async {
                    eventually("it is removed", async || {
                        send(&api, "GET", "/siem", "", &Value::Null).await.status == 404
                    })
                    .await;
                    gate.send_replace(true);
                };
                let (answer, ()) = tokio::join!(dropping, opened);
                assert_eq!(answer.json()["backlog"], "dropped", "{answer:?}");
                let again = json!({ "name": "siem", "url": other.url });
                let answer = send(&api, "POST", "", "", &again).await;
                assert_eq!(answer.status, 201, "{answer:?}");
                queue.publish("user.created", [event(7)]).await;
                other.wait_requests(1).await;
                assert_eq!(other.accepted(), [7]);
            }
        }
    });
}

async fn a_removal_that_a_kill_interrupts_goes_on_and_its_name_is_free_when_its_queues_are_deleted(
    queue: Queue,
) {
    let api = Api::new();
    // It answers nothing: its request in flight keeps the queues from being deleted.
    let gate = tokio::sync::watch::Sender::new(false);
    let slow = Receiver::start(move |_, _| status(200).when(&gate)).await;
    let other = Receiver::accepting().await;
    let setup = Setup::new(&queue, &managing(&api, ""));
    let daemon = setup.start().await;
    let made = json!({ "name": "siem", "url": slow.url });
    let answer = send(&api, "POST", "", "", &made).await;
    assert_eq!(answer.status, 201, "{answer:?}");
    queue.publish("user.created", [event(0)]).await;
    slow.wait_requests(1).await;
    let again = json!({ "name": "siem", "url": other.url });
    let version = answer.header("etag").to_owned();
    let dropping = send(&api, "DELETE", "/siem?backlog=drop", &version, &Value::Null);
    let removed = eventually("it is removed", async || {
        send(&api, "GET", "/siem", "", &Value::Null).await.status == 404
    });
    tokio::select! {
        answer = dropping => panic!("a request is in flight: {answer:?}"),
        () = removed => {}
    }
    refused(&send(&api, "POST", "", "", &again).await, 409, "/backlog", "");
    daemon.kill();
    let _daemon = setup.start().await;
    eventually("its queues are deleted", async || {
        let answer = send(&api, "POST", "", "", &again).await;
        assert!([201, 409].contains(&answer.status), "{answer:?}");
        answer.status == 201
    })
    .await;
    queue.publish("user.created", [event(7)]).await;
    accepted(&other, &[7]).await;
    assert_eq!(slow.requests().len(), 1, "the removed one gets nothing more");
}

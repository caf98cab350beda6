//! What is configured anew while the daemon runs.

use std::{collections::BTreeSet, time::Duration};

use serde_json::json;

use crate::support::{
    api::Api,
    broker::kill,
    daemon::{Daemon, QUICK, SECRET, Setup, subscriber},
    eventually,
    queue::{Queue, Section, on_both_queues},
    receiver::{Receiver, event, status},
};

on_both_queues!(
    retries_change_in_mid_flow_and_a_subscriber_that_did_not_is_not_touched,
    a_subscriber_comes_and_goes_and_its_backlog_stays_until_it_is_pruned,
    changed_patterns_hold_for_what_is_published_from_then_on,
    a_wrong_file_changes_nothing_and_is_told_until_it_is_mended,
    secrets_batches_and_pauses_change_without_a_restart,
);

const TYPE: &str = "activity_log.user.updated";

/// Writes a configuration in the place of that before, as editors do, and waits until it is in use.
async fn rewrite(setup: &Setup, daemon: &Daemon, text: &str) {
    let before = daemon.log().matches("reloaded").count();
    replace(setup, text);
    eventually("reloaded", async || daemon.log().matches("reloaded").count() > before).await;
}

fn replace(setup: &Setup, text: &str) {
    let new = setup.write("new.toml", text);
    std::fs::rename(new, setup.config()).expect("renames");
}

async fn retries_change_in_mid_flow_and_a_subscriber_that_did_not_is_not_touched(queue: Queue) {
    const EVENTS: u64 = 8000;
    let steady = Receiver::accepting().await;
    let failing = Receiver::start(|_, n| status(if n % 3 == 0 { 503 } else { 200 })).await;
    let api = Api::new();
    let text = |retry: &str| {
        let groups = QUICK.replace("initial_interval = \"1s\"", retry);
        queue.section(&["steady", "failing"])
            + &groups
            + &api.section()
            + &subscriber("steady", &steady.url, "retry = { initial_interval = \"1s\", max_attempts = 9 }")
            + &subscriber("failing", &failing.url, "batch = { max_events = 50 }")
    };
    let setup = Setup::with_text(&text("initial_interval = \"1s\""));
    let daemon = setup.start().await;
    // About 2,000 events a second for four seconds, and a change in each of them.
    for second in 0..4 {
        let start = std::time::Instant::now();
        let publish = queue.publish(TYPE, (second * EVENTS / 4..(second + 1) * EVENTS / 4).map(event));
        let change = async {
            let attempts = 100 + second;
            rewrite(&setup, &daemon, &text(&format!("initial_interval = \"2s\"\nmax_attempts = {attempts}"))).await;
        };
        tokio::join!(publish, change);
        tokio::time::sleep(Duration::from_secs(1).saturating_sub(start.elapsed())).await;
    }
    steady.wait_all(EVENTS).await;
    failing.wait_all(EVENTS).await;
    queue.wait_empty("steady").await;
    queue.wait_empty("failing").await;
    let (changes, log) = (daemon.log().matches("reloaded").count(), daemon.log());
    println!(
        "{changes} changes in {} requests; connections: {} to the one that was not changed, {} to the one that was",
        steady.count() + failing.count(),
        steady.connections(),
        failing.connections()
    );
    assert_eq!(steady.connections(), 1, "its pool was not touched");
    assert_eq!(failing.connections(), 1, "[retry] is none of what connections are made of");
    assert!(!log.contains("subscriber=\"steady\" change"), "{log}");
    assert!(log.contains("keys=\"retry.initial_interval, retry.max_attempts\""), "{log}");
    let once: BTreeSet<u64> = failing.accepted().into_iter().collect();
    assert_eq!(once.len() as u64, EVENTS);
    assert_eq!(failing.accepted().len() as u64, EVENTS, "nothing came twice");
    // What fails from now on waits as long as is configured now.
    failing.now(|r, _| status(if r.attempt() == 1 { 503 } else { 200 }));
    let before = failing.count();
    queue.publish(TYPE, [event(EVENTS)]).await;
    let requests = failing.wait_requests(before + 2).await;
    let waited = requests[before + 1].at.duration_since(requests[before].at).expect("later");
    assert!(waited >= Duration::from_secs(2), "{waited:?}");
}

async fn a_subscriber_comes_and_goes_and_its_backlog_stays_until_it_is_pruned(queue: Queue) {
    let (stays, slow) = (Receiver::accepting().await, Receiver::start(|_, _| status(200).after(Duration::from_secs(6))).await);
    let api = Api::new();
    let base = queue.section(&["stays", "comes"]) + QUICK + &api.section() + &subscriber("stays", &stays.url, "");
    let with = format!("{base}{}", subscriber("comes", &slow.url, "batch = { max_events = 1 }"));
    let setup = Setup::with_text(&base);
    let daemon = setup.start().await;
    rewrite(&setup, &daemon, &with).await;
    queue.publish(TYPE, (0..4).map(event)).await;
    slow.wait_requests(1).await;
    rewrite(&setup, &daemon, &base).await;
    daemon.wait_log("its backlog stays").await;
    // Its request in flight finishes, and nothing new is begun.
    queue.wait_backlog("comes", 3).await;
    assert_eq!(slow.count(), 1);
    eventually("it is named", async || {
        let found = api.get("/api/v1/subscribers").await.json();
        found["removed"][0] == json!({ "subscriber": "comes", "events": 3, "retries": 0, "dead": 0 })
    })
    .await;
    assert_eq!(api.metric("hooktrail_removed_subscriber_messages{subscriber=\"comes\"}").await, Some(3.0));
    assert_eq!(api.metric("hooktrail_events_delivered_total{subscriber=\"comes\"}").await, None, "its series have ended");
    let shown = setup.ok(&["status"]);
    assert!(shown.contains("`comes` is not configured any more; there are left 3 events"), "{shown}");
    // It gets nothing any more.
    queue.publish(TYPE, (4..6).map(event)).await;
    stays.wait_all(6).await;
    assert_eq!(queue.backlog("comes").await, 3);

    let refused = setup.run(&["prune", "stays", "--yes"]);
    assert_eq!(refused.status.code(), Some(2), "one that is configured");
    let kept = setup.run(&["prune", "--yes"]);
    let told = String::from_utf8_lossy(&kept.stderr).into_owned();
    assert!(kept.status.code() == Some(1) && told.contains("1 hold events and were kept: comes"), "{told}");
    assert_eq!(queue.backlog("comes").await, 3);
    assert!(setup.ok(&["prune", "--with-events", "--dry-run"]).contains("comes: 3 events"));
    assert!(setup.ok(&["prune", "comes", "--with-events", "--yes"]).contains("deleted the queues of 1 removed"));
    assert!(setup.ok(&["prune", "--yes"]).contains("deleted the queues of 0 removed"));
    // Once more under the same name, from nothing.
    let fresh = Receiver::accepting().await;
    rewrite(&setup, &daemon, &format!("{base}{}", subscriber("comes", &fresh.url, ""))).await;
    queue.publish(TYPE, (6..8).map(event)).await;
    eventually("the new ones alone", async || fresh.accepted() == [6, 7]).await;
}

async fn changed_patterns_hold_for_what_is_published_from_then_on(queue: Queue) {
    let receiver = Receiver::accepting().await;
    let api = Api::new();
    let base = queue.section(&["a"]) + QUICK + &api.section();
    let text = |events: &str| format!("{base}{}", subscriber("a", &receiver.url, &format!("events = {events}")));
    let setup = Setup::with_text(&text("[\"one.*\", \"both.*\"]"));
    let daemon = setup.start().await;
    queue.publish("one.x", [event(0)]).await;
    queue.publish("both.x", [event(1)]).await;
    receiver.wait_all(2).await;
    rewrite(&setup, &daemon, &text("[\"two.*\", \"both.*\"]")).await;
    queue.publish("two.x", [event(2)]).await;
    queue.publish("both.x", [event(3)]).await;
    receiver.wait_all(4).await;
    let gone = "patterns have changed";
    eventually("unbound", async || daemon.log().contains("unbound a pattern") || daemon.log().contains(gone)).await;
    queue.publish("one.x", [event(99)]).await;
    queue.publish("both.x", [event(4)]).await;
    receiver.wait_all(5).await;
    assert!(!receiver.accepted().contains(&99));
}

async fn a_wrong_file_changes_nothing_and_is_told_until_it_is_mended(queue: Queue) {
    let receiver = Receiver::accepting().await;
    let api = Api::new();
    let right = queue.section(&["a"]) + QUICK + &api.section() + &subscriber("a", &receiver.url, "");
    let setup = Setup::with_text(&right);
    let daemon = setup.start().await;
    for (wrong, part) in [
        (right.replace("max_wait = \"100ms\"", "max_wait = \"soon\""), "batch.max_wait"),
        (right.replace("[queue]", "[queue]\nprefix = \"another\""), "needs a restart"),
    ] {
        if wrong.matches("prefix").count() == 2 || (part == "needs a restart" && !wrong.contains("amqp")) {
            continue; // on a broker the section names its prefix already, and the embedded queue has none
        }
        replace(&setup, &wrong);
        daemon.wait_log("the configuration was not reloaded").await;
        let ready = api.get("/readyz").await;
        assert!(ready.status == 200 && ready.text.contains(part), "{ready:?}");
        assert_eq!(api.metric("hooktrail_config_last_reload_successful").await, Some(0.0));
        assert!(api.get("/api/v1/subscribers").await.json()["config"]["problem"].as_str().expect("told").contains(part));
        let answer = api.post("/api/v1/reload", "{}").await;
        assert!(answer.status == 422 && answer.json()["error"].as_str().expect("told").contains(part), "{answer:?}");
        assert_eq!(api.get("/api/v1/reload").await.status, 422);
    }
    queue.publish(TYPE, (0..3).map(event)).await;
    receiver.wait_all(3).await;
    replace(&setup, &right.replace("max_wait = \"100ms\"", "max_wait = \"200ms\""));
    eventually("it is mended", async || api.get("/readyz").await.text == "ready\n").await;
    assert_eq!(api.metric("hooktrail_config_last_reload_successful").await, Some(1.0));
    assert!(api.metric("hooktrail_config_reloads_total{result=\"failure\"}").await >= Some(1.0));
    let preview = api.get("/api/v1/reload").await.json();
    assert_eq!(preview, json!({ "changes": [], "needs_restart": [] }));
    // Asked by a signal, what means the same changes nothing.
    kill("-HUP", daemon.pid());
    daemon.wait_log("because=\"SIGHUP\"").await;
    assert!(daemon.log().contains("it means the same"));
}

async fn secrets_batches_and_pauses_change_without_a_restart(queue: Queue) {
    let receiver = Receiver::accepting().await;
    let api = Api::new();
    let base = queue.section(&["a"]) + QUICK + &api.section();
    let text = |more: &str| format!("{base}{}", subscriber("a", &receiver.url, more).replace(SECRET, "file:secret"));
    let setup = Setup::with_text(&text(""));
    setup.write("secret", "whsec_AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA\n");
    let daemon = setup.start().await;
    queue.publish(TYPE, [event(0)]).await;
    assert!(!receiver.wait_requests(1).await[0].verified(), "signed with another secret");
    setup.write("secret", SECRET);
    daemon.wait_log("keys=\"secrets\"").await;
    queue.publish(TYPE, [event(1)]).await;
    assert!(receiver.wait_requests(2).await[1].verified());

    rewrite(&setup, &daemon, &text("paused = true")).await;
    api.wait("a", "paused", |s| s["state"] == "paused" && s["paused"]["by"] == "configuration").await;
    queue.publish(TYPE, (2..8).map(event)).await;
    queue.wait_backlog("a", 6).await;
    assert_eq!(receiver.count(), 2);
    rewrite(&setup, &daemon, &text("batch = { max_events = 2 }")).await;
    receiver.wait_all(8).await;
    let sizes: Vec<usize> = receiver.requests()[2..].iter().map(|r| r.numbers().len()).collect();
    assert_eq!(sizes, [2, 2, 2]);
    let answer = api.post("/api/v1/reload", "{}").await;
    assert_eq!((answer.status, answer.json()), (200, json!({ "changes": [], "needs_restart": [] })));
}

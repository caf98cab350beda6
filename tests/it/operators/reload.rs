//! Reloads: changes of the configuration while the daemon runs.

use std::{collections::BTreeSet, time::Duration};

use lapin::{
    options::{QueueDeclareOptions, QueueDeleteOptions},
    types::FieldTable,
};
use serde_json::json;
use tokio::sync::watch;

use crate::support::{
    api::Api,
    broker::{Broker, kill},
    daemon::{Daemon, QUICK, SECRET, Setup, subscriber},
    eventually,
    queue::{Queue, Section, on_both_queues},
    receiver::{Receiver, event, status},
    run,
    tap::{QUEUE_UNBIND, Tap},
    tests_that_need,
};

on_both_queues!(
    retries_change_in_mid_flow_and_a_subscriber_that_did_not_is_not_touched,
    a_subscriber_comes_and_goes_and_its_backlog_stays_until_it_is_pruned,
    changed_patterns_hold_for_what_is_published_from_then_on,
    a_wrong_file_changes_nothing_and_is_reported_until_it_is_fixed,
    secrets_batches_and_pauses_change_without_a_restart,
    refusals_after_a_change_of_secrets_cost_no_event,
    redact_holds_for_the_batch_that_was_made_ahead_and_not_for_those_that_were_sent,
    who_was_removed_and_comes_back_gets_what_waited_and_what_comes_then,
    prune_says_that_a_daemon_has_to_let_go_first,
    prune_all_takes_everything_away_when_no_daemon_runs_and_shows_what_is_lost,
);

tests_that_need!(
    broker:
    what_is_relayed_after_a_reload_misses_no_subscriber_that_came_with_it,
    a_prune_that_refuses_gives_retries_their_way_back,
    a_queue_is_not_pruned_while_a_command_reads_its_dead_letters,
);

const TYPE: &str = "activity_log.user.updated";

/// Writes a configuration in the place of that before, as editors do, and waits until it is in use.
async fn rewrite(setup: &Setup, daemon: &Daemon, text: &str) {
    let before = daemon.log().matches(RELOADED).count();
    replace(setup, text);
    eventually("reloaded", async || daemon.log().matches(RELOADED).count() > before).await;
}

/// The log lines of each reload that changed something.
const RELOADED: &str = " reloaded because=";

fn replace(setup: &Setup, text: &str) {
    let new = setup.write("new.toml", text);
    std::fs::rename(new, setup.config()).expect("renames");
}

async fn retries_change_in_mid_flow_and_a_subscriber_that_did_not_is_not_touched(queue: Queue) {
    const A_TICK: u64 = 200;
    const TICKS: u64 = 50;
    const EVENTS: u64 = A_TICK * TICKS;
    const SLOW: Duration = Duration::from_millis(400);
    let steady = Receiver::start(|_, _| status(200).after(SLOW)).await;
    let failing = Receiver::start(|_, n| status(if n % 3 == 0 { 503 } else { 200 })).await;
    let api = Api::new();
    let text = |retry: &str| {
        let groups = QUICK.replace("initial_interval = \"1s\"", retry);
        queue.section(&["steady", "failing"])
            + &groups
            + &api.section()
            + &subscriber(
                "steady",
                &steady.url,
                "retry = { initial_interval = \"1s\", max_attempts = 9 }\nbatch = { max_events = 2000 }",
            )
            + &subscriber("failing", &failing.url, "batch = { max_events = 50 }")
    };
    let setup = Setup::with_text(&text("initial_interval = \"1s\""));
    let daemon = setup.start().await;
    // 2,000 events a second for five seconds, and four changes meanwhile.
    let publish = async {
        let begun = tokio::time::Instant::now();
        for tick in 0..TICKS {
            queue.publish(TYPE, (tick * A_TICK..(tick + 1) * A_TICK).map(event)).await;
            tokio::time::sleep_until(begun + Duration::from_millis(100) * (tick as u32 + 1)).await;
        }
        begun.elapsed()
    };
    let change = async {
        let mut at = Vec::new();
        for attempts in 100..104 {
            steady.wait_requests(steady.count() + 1).await;
            replace(
                &setup,
                &text(&format!("initial_interval = \"2s\"\nmax_attempts = {attempts}")),
            );
            kill("-HUP", daemon.pid());
            eventually("reloaded", async || daemon.log().matches(RELOADED).count() > at.len())
                .await;
            at.push(std::time::SystemTime::now());
        }
        at
    };
    let (took, changed_at) = tokio::join!(publish, change);
    steady.wait_all(EVENTS).await;
    failing.wait_all(EVENTS).await;
    queue.wait_empty("steady").await;
    queue.wait_empty("failing").await;
    let log = daemon.log();
    let under_way = |at: &std::time::SystemTime| {
        steady.requests().iter().any(|r| r.at <= *at && *at <= r.at + SLOW)
    };
    let over_a_request = changed_at.iter().filter(|at| under_way(at)).count();
    println!(
        "{} changes in {EVENTS} events, {:.0} a second, {over_a_request} of them while a request to `steady` was open; connections: {} to the one \
         that was not changed, {} to the one that was",
        changed_at.len(),
        EVENTS as f64 / took.as_secs_f64(),
        steady.connections(),
        failing.connections()
    );
    assert!(over_a_request > 0, "no change came while a request was under way");
    assert_eq!(steady.connections(), 1, "its pool was not touched");
    assert_eq!(failing.connections(), 1, "[retry] is none of what connections are made of");
    let reloads: Vec<&str> = log.lines().filter(|l| l.contains(RELOADED)).collect();
    assert!(!reloads.iter().any(|l| l.contains("steady") || !l.contains("INFO")), "{reloads:#?}");
    assert!(
        log.contains("changed=\"failing (retry.initial_interval, retry.max_attempts)\""),
        "{log}"
    );
    for receiver in [&steady, &failing] {
        let once: BTreeSet<u64> = receiver.accepted().into_iter().collect();
        assert_eq!(
            (once.len() as u64, receiver.accepted().len() as u64),
            (EVENTS, EVENTS),
            "each came, and none twice"
        );
    }
    // Batches that fail from now on wait as long as is configured now.
    failing.now(|r, _| status(if r.attempt() == 1 { 503 } else { 200 }));
    let before = failing.count();
    queue.publish(TYPE, [event(EVENTS)]).await;
    let requests = failing.wait_requests(before + 2).await;
    let waited = requests[before + 1].at.duration_since(requests[before].at).expect("later");
    assert!(waited >= Duration::from_secs(2), "{waited:?}");
}

async fn a_subscriber_comes_and_goes_and_its_backlog_stays_until_it_is_pruned(queue: Queue) {
    let (stays, slow) = (
        Receiver::accepting().await,
        Receiver::start(|_, _| status(200).after(Duration::from_secs(6))).await,
    );
    let api = Api::new();
    let base = queue.section(&["stays", "comes"])
        + QUICK
        + &api.section()
        + &subscriber("stays", &stays.url, "");
    let with = format!("{base}{}", subscriber("comes", &slow.url, "batch = { max_events = 1 }"));
    let setup = Setup::with_text(&base);
    let daemon = setup.start().await;
    rewrite(&setup, &daemon, &with).await;
    queue.publish(TYPE, (0..4).map(event)).await;
    slow.wait_requests(1).await;
    setup.ok(&["pause", "comes"]);
    // While its request is under way.
    replace(&setup, &base);
    assert_eq!(api.post("/api/v1/reload", "{}").await.status, 200);
    daemon.wait_log("removed: its requests in flight finish").await;
    // Its request in flight finishes, and nothing new is begun.
    queue.wait_backlog("comes", 3).await;
    assert_eq!(slow.count(), 1);
    eventually("it is named", async || {
        let found = api.get("/api/v1/subscribers").await.json();
        found["removed"][0]
            == json!({ "subscriber": "comes", "events": 3, "retries": 0, "dead": 0 })
    })
    .await;
    assert_eq!(
        api.metric("hooktrail_removed_subscriber_messages{subscriber=\"comes\"}").await,
        Some(3.0)
    );
    assert_eq!(
        api.metric("hooktrail_events_delivered_total{subscriber=\"comes\"}").await,
        None,
        "its series have ended"
    );
    let shown = setup.ok(&["status"]);
    assert!(
        shown.contains("`comes` is not configured any more; there are left 3 events"),
        "{shown}"
    );
    // It gets nothing any more.
    queue.publish(TYPE, (4..6).map(event)).await;
    stays.wait_all(6).await;
    assert_eq!(queue.backlog("comes").await, 3);

    let refused = setup.run(&["prune", "stays", "--yes"]);
    assert_eq!(refused.status.code(), Some(2), "one that is configured");
    let kept = setup.run(&["prune", "--yes"]);
    let reported = String::from_utf8_lossy(&kept.stderr).into_owned();
    assert!(
        kept.status.code() == Some(1)
            && reported.contains("1 subscriber was kept, with events: comes"),
        "{reported}"
    );
    assert_eq!(queue.backlog("comes").await, 3);
    assert!(setup.ok(&["prune", "--with-events", "--dry-run"]).contains("comes: 3 events"));
    assert!(
        setup
            .ok(&["prune", "comes", "--with-events", "--yes"])
            .contains("deleted the queues of 1 removed")
    );
    assert!(setup.ok(&["prune", "--yes"]).contains("deleted the queues of 0 removed"));
    // Once more under the same name, from nothing: not paused either.
    let fresh = Receiver::accepting().await;
    rewrite(&setup, &daemon, &format!("{base}{}", subscriber("comes", &fresh.url, ""))).await;
    queue.publish(TYPE, (6..8).map(event)).await;
    eventually("the new ones alone", async || fresh.accepted() == [6, 7]).await;
}

async fn changed_patterns_hold_for_what_is_published_from_then_on(queue: Queue) {
    let receiver = Receiver::accepting().await;
    let api = Api::new();
    let base = queue.section(&["a"]) + QUICK + &api.section();
    let text = |events: &str| {
        format!("{base}{}", subscriber("a", &receiver.url, &format!("events = {events}")))
    };
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
    eventually("unbound", async || {
        daemon.log().contains("unbound a pattern") || daemon.log().contains(gone)
    })
    .await;
    queue.publish("one.x", [event(99)]).await;
    queue.publish("both.x", [event(4)]).await;
    receiver.wait_all(5).await;
    assert!(!receiver.accepted().contains(&99));
}

async fn a_wrong_file_changes_nothing_and_is_reported_until_it_is_fixed(queue: Queue) {
    let receiver = Receiver::accepting().await;
    let api = Api::new();
    let right =
        queue.section(&["a"]) + QUICK + &api.section() + &subscriber("a", &receiver.url, "");
    let setup = Setup::with_text(&right);
    let daemon = setup.start().await;
    let another_queue = match &queue {
        Queue::Amqp(_) => right.replace("prefix = \"", "prefix = \"another-"),
        Queue::Embedded(_) => right.replace("data_dir = \"", "data_dir = \"another-"),
    };
    for (wrong, part) in [
        (right.replace("max_wait = \"100ms\"", "max_wait = \"soon\""), "batch.max_wait"),
        (another_queue, "needs a restart"),
    ] {
        assert_ne!(wrong, right);
        let before = daemon.log().matches("the configuration was not reloaded").count();
        replace(&setup, &wrong);
        eventually("it is reported", async || {
            daemon.log().matches("the configuration was not reloaded").count() > before
        })
        .await;
        let ready = api.get("/readyz").await;
        assert!(ready.status == 200 && ready.text.contains(part), "{ready:?}");
        assert_eq!(api.metric("hooktrail_config_last_reload_successful").await, Some(0.0));
        assert!(
            api.get("/api/v1/subscribers").await.json()["config"]["problem"]
                .as_str()
                .expect("reported")
                .contains(part)
        );
        let answer = api.post("/api/v1/reload", "{}").await;
        assert!(
            answer.status == 422
                && answer.json()["detail"].as_str().expect("reported").contains(part),
            "{answer:?}"
        );
        assert_eq!(api.get("/api/v1/reload").await.status, 422);
    }
    queue.publish(TYPE, (0..3).map(event)).await;
    receiver.wait_all(3).await;
    replace(&setup, &right.replace("max_wait = \"100ms\"", "max_wait = \"200ms\""));
    eventually("it is fixed", async || api.get("/readyz").await.text == "ready\n").await;
    assert_eq!(api.metric("hooktrail_config_last_reload_successful").await, Some(1.0));
    assert!(api.metric("hooktrail_config_reloads_total{result=\"failure\"}").await >= Some(1.0));
    let preview = api.get("/api/v1/reload").await.json();
    assert_eq!(
        preview,
        json!({ "changes": [], "settings": [], "needs_restart": [], "waits_for_operator": false })
    );
    // Asked by a signal, what means the same changes nothing.
    kill("-HUP", daemon.pid());
    daemon.wait_log("because=\"SIGHUP\"").await;
    assert!(daemon.log().contains("it means the same"));
}

async fn secrets_batches_and_pauses_change_without_a_restart(queue: Queue) {
    let receiver = Receiver::accepting().await;
    let api = Api::new();
    let base = queue.section(&["a"]) + QUICK + &api.section();
    let text = |more: &str| {
        format!("{base}{}", subscriber("a", &receiver.url, more).replace(SECRET, "file:secret"))
    };
    let setup = Setup::with_text(&text(""));
    setup.write("secret", "whsec_AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA\n");
    let daemon = setup.start().await;
    queue.publish(TYPE, [event(0)]).await;
    assert!(!receiver.wait_requests(1).await[0].verified(), "signed with another secret");
    setup.write("secret", SECRET);
    daemon.wait_log("changed=\"a (secrets)\"").await;
    queue.publish(TYPE, [event(1)]).await;
    assert!(receiver.wait_requests(2).await[1].verified());

    rewrite(&setup, &daemon, &text("paused = true")).await;
    api.wait("a", "paused", |s| s["state"] == "paused" && s["paused"]["by"] == "configuration")
        .await;
    queue.publish(TYPE, (2..8).map(event)).await;
    queue.wait_backlog("a", 6).await;
    assert_eq!(receiver.count(), 2);
    rewrite(&setup, &daemon, &text("batch = { max_events = 2 }")).await;
    receiver.wait_all(8).await;
    let sizes: Vec<usize> = receiver.requests()[2..].iter().map(|r| r.numbers().len()).collect();
    assert_eq!(sizes, [2, 2, 2]);
    let answer = api.post("/api/v1/reload", "{}").await;
    assert_eq!(
        (answer.status, answer.json()),
        (200, json!({ "changes": [], "settings": [], "needs_restart": [], "not_bound": [] }))
    );
}

async fn redact_holds_for_the_batch_that_was_made_ahead_and_not_for_those_that_were_sent(
    queue: Queue,
) {
    let gate = watch::Sender::new(false);
    let held = gate.clone();
    let receiver = Receiver::start(move |_, n| match n {
        0 => status(503),
        1 => status(200).when(&held),
        _ => status(200),
    })
    .await;
    let base =
        queue.section(&["a"]) + &QUICK.replace("\"100ms\"", "\"2m\"").replace("\"1s\"", "\"1h\"");
    let text = |more: &str| {
        let lines = format!("batch = {{ max_events = 2 }}\n{more}");
        base.clone() + &subscriber("a", &receiver.url, &lines)
    };
    let setup = Setup::with_text(&text(""));
    let daemon = setup.start().await;
    queue.publish(TYPE, (0..6).map(event)).await;
    receiver.wait_requests(2).await;
    rewrite(&setup, &daemon, &text("redact = [\"/actor/name\"]")).await;
    // The one that failed, which waits for an hour.
    daemon.wait_log("subscriber=\"a\" batches=1").await;
    gate.send_replace(true);
    let requests = receiver.wait_requests(3).await;
    let shows = |n: usize| requests[n].events().iter().all(|e| e["actor"]["name"] == "Jane Doe");
    let numbers: Vec<Vec<u64>> = requests.iter().map(|r| r.numbers()).collect();
    assert_eq!(numbers, [[0, 1], [2, 3], [4, 5]]);
    assert_eq!([shows(0), shows(1), shows(2)], [true, true, false]);
}

async fn refusals_after_a_change_of_secrets_cost_no_event(queue: Queue) {
    let receiver = Receiver::start(|r, _| status(if r.verified() { 200 } else { 400 })).await;
    let api = Api::new();
    let right =
        queue.section(&["a"]) + QUICK + &api.section() + &subscriber("a", &receiver.url, "");
    let setup = Setup::with_text(&right);
    let daemon = setup.start().await;
    queue.publish(TYPE, [event(0)]).await;
    receiver.wait_all(1).await;
    // It has just accepted something, and refuses from now on: because of the secret, not because
    // of an event.
    rewrite(&setup, &daemon, &right.replace(SECRET, "whsec_AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"))
        .await;
    queue.publish(TYPE, (1..20).map(event)).await;
    daemon.wait_log("outcome=\"retry\" status=400").await;
    assert_eq!(queue.dead("a").await, 0);
    rewrite(&setup, &daemon, &right).await;
    receiver.wait_all(20).await;
    assert_eq!(queue.dead("a").await, 0);
    assert!(!daemon.log().contains("outcome=\"split\""), "{}", daemon.log());
}

async fn who_was_removed_and_comes_back_gets_what_waited_and_what_comes_then(queue: Queue) {
    let (stays, comes) = (Receiver::accepting().await, Receiver::accepting().await);
    let api = Api::new();
    let base = queue.section(&["stays", "comes"])
        + QUICK
        + &api.section()
        + &subscriber("stays", &stays.url, "");
    let paused = base.clone() + &subscriber("comes", &comes.url, "paused = true");
    let setup = Setup::with_text(&paused);
    let _daemon = setup.start().await;
    queue.publish(TYPE, (0..3).map(event)).await;
    queue.wait_backlog("comes", 3).await;
    let reload = async |text: &str, change: &str| {
        replace(&setup, text);
        let answer = api.post("/api/v1/reload", "{}").await.json();
        assert_eq!(
            answer["changes"],
            json!([{ "subscriber": "comes", "change": change, "keys": [] }])
        );
    };
    for round in 0..3 {
        reload(&base, "removed").await;
        // Unbinding goes on after the answer; it must not undo what the next reload binds.
        if round == 2 {
            eventually("it gets no more", async || {
                let before = queue.backlog("comes").await;
                queue.publish(TYPE, [event(99)]).await;
                queue.backlog("comes").await == before
            })
            .await;
        }
        reload(&paused, "added").await;
        let before = queue.backlog("comes").await;
        queue.publish(TYPE, [event(3 + round)]).await;
        queue.wait_backlog("comes", before + 1).await;
    }
    reload_to(&setup, &api, &(base + &subscriber("comes", &comes.url, ""))).await;
    eventually("all that was for it", async || {
        let accepted: BTreeSet<u64> = comes.accepted().into_iter().filter(|n| *n != 99).collect();
        accepted.into_iter().eq(0..6)
    })
    .await;
}

/// Makes the daemon read this; the names of those whose queue is not bound yet.
async fn reload_to(setup: &Setup, api: &Api, text: &str) -> serde_json::Value {
    replace(setup, text);
    let answer = api.post("/api/v1/reload", "{}").await;
    assert_eq!(answer.status, 200, "{answer:?}");
    answer.json()["not_bound"].clone()
}

/// A queue that cannot be used does not hold up a reload, so the relay has to wait for it.
fn what_is_relayed_after_a_reload_misses_no_subscriber_that_came_with_it() {
    run(async {
        let broker = Broker::shared();
        let (one, two) = (Receiver::accepting().await, Receiver::accepting().await);
        let api = Api::new();
        let (connection, channel) = broker.channel().await;
        let queue = async |name: &str| {
            let name = format!("{}.{name}", broker.prefix);
            let durable = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
            channel
                .queue_declare(name.as_str().into(), durable, FieldTable::default())
                .await
                .expect("declares");
            name
        };
        let source = queue("source").await;
        broker.knows("one");
        broker.knows("two");
        let base = format!(
            "[queue]\nurl = \"{}\"\nsource_queue = \"{source}\"\nprefix = \"{}\"\n{QUICK}",
            broker.url, broker.prefix
        ) + &api.section()
            + &subscriber("one", &one.url, "");
        let setup = Setup::with_text(&base);
        let daemon = setup.start().await;
        broker.publish_to("", &source, (0..3).map(event)).await;
        one.wait_all(3).await;
        // A queue that hooktrail refuses, until it is deleted.
        let unusable = queue("sub.two").await;
        let both = base + &subscriber("two", &two.url, "");
        assert_eq!(reload_to(&setup, &api, &both).await, json!(["two"]));
        daemon.wait_log("not bound yet, which is retried indefinitely").await;
        broker.publish_to("", &source, (3..6).map(event)).await;
        daemon.wait_log(&format!("the relay from queue `{source}` fails")).await;
        channel
            .queue_delete(unusable.as_str().into(), QueueDeleteOptions::default())
            .await
            .expect("deletes");
        one.wait_all(6).await;
        eventually("the other one too", async || {
            two.accepted().into_iter().collect::<BTreeSet<_>>() == [3, 4, 5].into()
        })
        .await;
        assert_eq!(reload_to(&setup, &api, &(both + "paused = true\n")).await, json!([]));
        assert!(daemon.stop().await.success());
        channel
            .queue_delete(source.as_str().into(), QueueDeleteOptions::default())
            .await
            .expect("deletes");
        connection.close(200, "done".into()).await.expect("closes");
    });
}

fn a_prune_that_refuses_gives_retries_their_way_back() {
    run(async {
        let broker = Broker::shared();
        let receiver = Receiver::accepting().await;
        let api = Api::new();
        let base = broker.section(&["stays", "gone"])
            + QUICK
            + &api.section()
            + &subscriber("stays", &receiver.url, "");
        let setup = Setup::with_text(&(base.clone() + &subscriber("gone", &receiver.url, "")));
        let daemon = setup.start().await;
        // A mark, and who is bound.
        eventually("both are recorded", async || broker.depth("state").await >= Some(3)).await;
        reload_to(&setup, &api, &base).await;
        daemon.wait_log("was unbound; its backlog stays").await;
        eventually("that is recorded", async || broker.depth("state").await >= Some(4)).await;
        assert!(daemon.stop().await.success());
        let tap = Tap::before(QUEUE_UNBIND, &broker.url).await;
        let through = Setup::with_text(&base.replace(&broker.url, tap.url()));
        let pruning = tokio::task::spawn_blocking(move || through.run(&["prune", "gone", "--yes"]));
        // It has seen that nothing is there, and is about to take the way away.
        tap.reached().await;
        broker.publish_to("", &format!("{}.sub.gone", broker.prefix), [event(0)]).await;
        broker.wait_depth("sub.gone", 1).await;
        tap.go_on();
        let refused = pruning.await.expect("runs");
        let reported = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(
            refused.status.code() == Some(1)
                && reported.contains("holds 1 message by now; nothing was deleted"),
            "{reported}"
        );
        // Batches that come down the ladder now.
        broker.publish_to(&format!("{}.delay", broker.prefix), "0.1.gone", ["{}"]).await;
        let came = async |queue| broker.depth(queue).await == Some(1);
        eventually("it has come", async || came("sub.gone.retry").await || came("orphans").await)
            .await;
        assert!(came("sub.gone.retry").await, "it is an orphan");
        assert_eq!(broker.depth("sub.gone").await, Some(1));
    });
}

/// Messages that a walk has passed are not counted by the broker, and would go with the queue.
fn a_queue_is_not_pruned_while_a_command_reads_its_dead_letters() {
    run(async {
        let broker = Broker::shared();
        let receiver = Receiver::accepting().await;
        let api = Api::new();
        let base = broker.section(&["stays", "gone"])
            + QUICK
            + &api.section()
            + &subscriber("stays", &receiver.url, "");
        let setup = Setup::with_text(&(base.clone() + &subscriber("gone", &receiver.url, "")));
        let daemon = setup.start().await;
        broker.publish(TYPE, (0..600).map(|_| "no event, and so a dead letter")).await;
        broker.wait_depth("sub.gone.dead", 600).await;
        rewrite(&setup, &daemon, &base).await;
        daemon.wait_log("was unbound; its backlog stays").await;
        // Its output has no reader, so it stops in the middle.
        let mut looking = std::process::Command::new(env!("CARGO_BIN_EXE_hooktrail"))
            .args(["dead", "export", "gone", "--config"])
            .arg(setup.config())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .expect("hooktrail runs");
        eventually("it holds some", async || broker.depth("sub.gone.dead").await < Some(600)).await;
        let refused = setup.run(&["prune", "gone", "--with-events", "--yes"]);
        let reported = String::from_utf8_lossy(&refused.stderr).into_owned();
        // Whichever is seen first: the walk's consumer, or its mark.
        let seen = reported.contains("reads queue") || reported.contains("still has a consumer");
        assert!(refused.status.code() == Some(1) && seen, "{reported}");
        let printed = std::io::read_to_string(looking.stdout.take().expect("piped")).expect("text");
        assert!(looking.wait().expect("ends").success() && printed.lines().count() == 600);
        broker.wait_depth("sub.gone.dead", 600).await;
        setup.ok(&["prune", "gone", "--with-events", "--yes"]);
        assert_eq!(broker.depth("sub.gone.dead").await, None);
        let nothing = setup.run(&["prune", "gone", "--yes"]);
        let reported = String::from_utf8_lossy(&nothing.stderr).into_owned();
        assert!(
            nothing.status.code() == Some(1)
                && reported.contains("there is nothing of a removed subscriber `gone`"),
            "{reported}"
        );
    });
}

async fn prune_says_that_a_daemon_has_to_let_go_first(queue: Queue) {
    let receiver = Receiver::accepting().await;
    let api = Api::new();
    let base = queue.section(&["stays", "gone"])
        + QUICK
        + &api.section()
        + &subscriber("stays", &receiver.url, "");
    let setup =
        Setup::with_text(&(base.clone() + &subscriber("gone", &receiver.url, "paused = true")));
    let daemon = setup.start().await;
    queue.publish(TYPE, [event(0)]).await;
    receiver.wait_requests(1).await;
    assert!(daemon.stop().await.success());
    // The name is unknown.
    setup.write("hooktrail.toml", &base);
    for arguments in [&["prune", "--yes"][..], &["prune", "gone", "--yes"]] {
        let refused = setup.run(arguments);
        let reported = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(
            refused.status.code() == Some(1)
                && reported.contains("`gone`")
                && reported.contains("must unbind it first"),
            "{reported}"
        );
    }
    let daemon = setup.start().await;
    eventually("it has let go", async || {
        setup.run(&["prune", "--with-events", "--dry-run"]).status.success()
    })
    .await;
    assert!(
        setup
            .ok(&["prune", "gone", "--with-events", "--yes"])
            .contains("deleted the queues of 1 removed subscriber")
    );
    assert!(daemon.stop().await.success());
}

async fn prune_all_takes_everything_away_when_no_daemon_runs_and_shows_what_is_lost(queue: Queue) {
    let receiver = Receiver::start(|_, _| status(500)).await;
    let api = Api::new();
    let more = "paused = true";
    let text = queue.section(&["a", "b"])
        + QUICK
        + &api.section()
        + &subscriber("a", &receiver.url, more)
        + &subscriber("b", &receiver.url, more);
    let setup = Setup::with_text(&text);
    let daemon = setup.start().await;
    if let Queue::Amqp(broker) = &queue {
        eventually("both are recorded", async || broker.depth("state").await >= Some(3)).await;
    }
    queue.publish(TYPE, (0..3).map(event)).await;
    // There is no consumer: a paused subscriber's daemon counts all the same.
    let refused = setup.run(&["prune", "--all", "--yes"]);
    let reported = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(refused.status.code() == Some(1) && reported.contains("daemon works"), "{reported}");
    assert!(daemon.stop().await.success());
    assert_eq!(setup.run(&["prune", "--all"]).status.code(), Some(2), "it cannot ask here");
    let shown = setup.ok(&["prune", "--all", "--dry-run"]);
    assert!(
        shown.contains("a: 3 events")
            && shown.contains("b: 3 events")
            && shown.contains("would delete"),
        "{shown}"
    );
    assert_eq!(queue.backlog("a").await, 3);
    setup.ok(&["prune", "--all", "--yes"]);
    match &queue {
        Queue::Amqp(broker) => {
            let names = [
                "sub.a",
                "sub.a.retry",
                "sub.a.dead",
                "sub.b",
                "delay.00",
                "delay.18",
                "orphans",
                "state",
            ];
            for name in names {
                assert_eq!(broker.depth(name).await, None, "{name}");
            }
            // Its owner's.
            broker.publish(TYPE, [event(0)]).await;
        }
        Queue::Embedded(embedded) => {
            let left: Vec<_> =
                std::fs::read_dir(embedded.data_dir()).expect("the directory").collect();
            assert!(left.is_empty(), "{left:?}");
        }
    }
}

//! The operator's view of a running daemon: status, metrics, the API.

use std::{
    collections::BTreeSet,
    io::{BufRead as _, BufReader},
    process::{Command, Stdio},
    time::Duration,
};

use hooktrail::crypto::{
    handshake::{self, Side},
    secret::Secret,
};
use serde_json::json;

use super::documented::ask_to_manage;
use crate::receivers::verifiers::{output, repository, verifiers};
use crate::support::{
    api::Api,
    broker::Broker,
    daemon::{QUICK, Setup, subscriber},
    eventually, free_port,
    queue::{Queue, on_both_queues},
    receiver::{Receiver, Request, event, status},
    run,
    snapshot::assert_reported,
    tests_that_need,
};

on_both_queues!(
    status_says_how_each_subscriber_is_and_why,
    metrics_count_what_happens,
    what_a_lane_has_in_hand_is_not_in_the_queue_too,
    the_api_answers_what_it_is_asked_and_nothing_to_web_pages,
);

tests_that_need!(
    broker:
    while_the_broker_is_away_metrics_and_status_say_so,
    what_the_broker_forbids_a_command_is_reported_with_its_reason_and_nothing_is_moved,
);

tests_that_need!(tools: the_api_is_as_its_document_describes_it);

const TYPE: &str = "activity_log.user.updated";

async fn status_says_how_each_subscriber_is_and_why(queue: Queue) {
    let good = Receiver::accepting().await;
    let bad = Receiver::start(|_, _| status(503)).await;
    let held = Receiver::start(|_, _| status(429).header("retry-after", "60")).await;
    let dying = Receiver::start(|_, _| status(500)).await;
    let api = Api::new();
    // Where history begins depends on the queue: that has a test of its own.
    let text = QUICK.to_owned()
        + "[store]\nurl = \"none\"\n"
        + &api.section()
        + &subscriber("good", &good.url, "")
        + &subscriber(
            "open",
            &bad.url,
            "circuit_breaker = { failures = 1, open_for = \"10m\" }\nretry = { initial_interval = \"1h\" }",
        )
        + &subscriber("held", &held.url, "")
        + &subscriber("dying", &dying.url, "retry = { max_attempts = 1 }")
        + &subscriber("paused", &good.url, "paused = true");
    let setup = Setup::new(&queue, &text);
    let daemon = setup.start().await;
    queue.publish(TYPE, (0..5).map(event)).await;
    api.wait("good", "ok", |s| {
        s["state"] == "ok" && s["delivered"] == 5 && s["success_rate"] == 1.0
    })
    .await;
    api.wait("open", "open", |s| s["state"] == "circuit_open" && s["circuit"]["until"].is_string())
        .await;
    api.wait("open", "one in retry", |s| s["in_retry"] == 1 && s["next_retry_at"].is_string())
        .await;
    api.wait("held", "held", |s| s["state"] == "held" && s["held_until"].is_string()).await;
    api.wait("dying", "a dead letter", |s| s["dead"] == 1 && s["state"] == "retrying").await;
    api.wait("paused", "paused, with its backlog", |s| s["state"] == "paused" && s["backlog"] == 5)
        .await;
    let open = api.subscriber("open").await;
    assert_eq!(
        (&open["last_error"]["failure"], &open["last_error"]["status"]),
        (&json!("status"), &json!(503)),
        "{open}"
    );
    assert!(open["oldest_event_age_s"].as_f64().is_some_and(|age| age < 60.0), "{open}");
    assert!(open["p50_s"].is_number() && open["success_rate"] == 0.0, "{open}");
    api.wait("held", "one in retry", |s| s["in_retry"] == 1).await;
    for name in ["good", "open", "held", "dying", "paused"] {
        api.wait(name, "nothing in hand", |s| s["in_hand"] == 0).await;
    }
    assert_reported("status", &setup.ok(&["status"]));
    assert_reported("status_of_one", &setup.ok(&["status", "open"]));
    let json: serde_json::Value =
        serde_json::from_str(&setup.ok(&["status", "--json"])).expect("JSON");
    assert_eq!(
        (&json["phase"], json["subscribers"].as_array().map(Vec::len)),
        (&json!("running"), Some(5))
    );
    // The latest events are in it, although the daemon polls the queues every 10 s.
    let looked_at =
        async || api.get("/api/v1/subscribers").await.json()["queue"]["looked_at"].clone();
    let before = looked_at().await;
    eventually("a poll", async || looked_at().await != before).await;
    queue.publish(TYPE, (5..8).map(event)).await;
    let reported = api.wait("paused", "what came since", |s| s["backlog"] == 8);
    // Before the next poll.
    tokio::time::timeout(Duration::from_secs(8), reported).await.expect("it is reported soon");
    assert!(daemon.stop().await.success());
    let alone = setup.run(&["status"]);
    assert!(
        alone.status.code() == Some(1)
            && String::from_utf8_lossy(&alone.stderr).contains("no daemon answers at")
    );
}

async fn what_a_lane_has_in_hand_is_not_in_the_queue_too(queue: Queue) {
    let hanging = || status(200).after(Duration::from_secs(600));
    let first = Receiver::start(move |_, _| hanging()).await;
    let again = Receiver::start(|_, _| status(500)).await;
    let api = Api::new();
    let more = "http = { concurrency = 1, timeout = \"2m\" }\nbatch = { max_events = 1 }";
    let text = QUICK.to_owned()
        + &api.section()
        + &subscriber("first", &first.url, more)
        + &subscriber("again", &again.url, more);
    let setup = Setup::new(&queue, &text);
    let _daemon = setup.start().await;
    queue.publish(TYPE, (0..10).map(event)).await;
    let is = async |series: &str, value: f64| {
        eventually(&format!("{series} is {value}"), async || {
            api.metric(series).await == Some(value)
        })
        .await;
    };
    // A request, and the three batches that its window has room for.
    api.wait("first", "four in hand, six in the queue", |s| {
        s["in_hand"] == 4 && s["backlog"] == 6 && s["in_retry"] == 0
    })
    .await;
    is("hooktrail_queue_messages{subscriber=\"first\",queue=\"main\"}", 6.0).await;

    eventually("all have failed once", async || {
        again.requests().iter().map(Request::id).collect::<BTreeSet<_>>().len() == 10
    })
    .await;
    again.now(move |_, _| hanging());
    api.wait("again", "one in hand, nine to be tried again", |s| {
        s["in_hand"] == 1 && s["in_retry"] == 9 && s["backlog"] == 0
    })
    .await;
    is("hooktrail_queue_messages{subscriber=\"again\",queue=\"main\"}", 0.0).await;
    is("hooktrail_queue_messages{subscriber=\"again\",queue=\"retry\"}", 9.0).await;
    is("hooktrail_delayed_retries", 0.0).await;
    let shown = setup.ok(&["status"]);
    for (name, numbers) in [("first", ["6", "4", "0"]), ("again", ["0", "1", "9"])] {
        let line = shown
            .lines()
            .find(|l| l.starts_with(name))
            .unwrap_or_else(|| panic!("no {name} in:\n{shown}"));
        let columns: Vec<&str> = line.split_whitespace().collect();
        assert!(
            columns.windows(3).any(|found| found == numbers),
            "{numbers:?} is not in:\n{shown}"
        );
    }
}

async fn metrics_count_what_happens(queue: Queue) {
    let good = Receiver::accepting().await;
    let bad = Receiver::start(|_, n| status(if n == 0 { 503 } else { 400 })).await;
    let api = Api::new();
    let text = QUICK.to_owned()
        + &api.section()
        + &subscriber("good", &good.url, "")
        + &subscriber(
            "bad",
            &bad.url,
            "retry = { max_attempts = 2 }\ncircuit_breaker = { failures = 2 }",
        );
    let setup = Setup::new(&queue, &text);
    let _daemon = setup.start().await;
    queue.publish(TYPE, (0..7).map(event)).await;
    queue.publish(TYPE, ["no event"]).await;
    let answer = api.post("/api/v1/events", &event(7)).await;
    assert_eq!(answer.status, 202);
    good.wait_all(8).await;
    let is = async |series: &str, value: f64| {
        eventually(&format!("{series} is {value}"), async || {
            api.metric(series).await == Some(value)
        })
        .await;
    };
    is("hooktrail_events_delivered_total{subscriber=\"good\"}", 8.0).await;
    is("hooktrail_events_received_total{subscriber=\"good\"}", 9.0).await;
    is("hooktrail_dead_letters_total{subscriber=\"good\",reason=\"invalid_event\"}", 1.0).await;
    is("hooktrail_dead_letters_total{subscriber=\"bad\",reason=\"invalid_event\"}", 1.0).await;
    eventually("the bad one's batches are dead letters", async || {
        let all = api
            .metric("hooktrail_dead_letters_total{subscriber=\"bad\",reason=\"exhausted\"}")
            .await;
        all.is_some_and(|n| n >= 1.0)
    })
    .await;
    is("hooktrail_attempts_total{subscriber=\"bad\",outcome=\"delivered\"}", 0.0).await;
    is("hooktrail_circuit_state{subscriber=\"bad\",state=\"open\"}", 1.0).await;
    is("hooktrail_circuit_state{subscriber=\"good\",state=\"closed\"}", 1.0).await;
    is("hooktrail_events_accepted_total{matched=\"true\"}", 1.0).await;
    is("hooktrail_requests_in_flight{subscriber=\"good\"}", 0.0).await;
    is("hooktrail_queue_up", 1.0).await;
    is("hooktrail_subscribers", 2.0).await;
    is("hooktrail_queue_messages{subscriber=\"good\",queue=\"dead\"}", 1.0).await;
    // The events' own timestamps are of 2024, so each is beyond the last bucket.
    assert!(
        api.metric("hooktrail_delivery_lag_seconds_bucket{le=\"259200.0\",subscriber=\"good\"}")
            .await
            .is_none_or(|n| n == 0.0)
    );
    let exposed = api.get("/metrics").await;
    assert!(exposed.content_type.starts_with("text/plain; version=0.0.4"), "{exposed:?}");
    assert!(!exposed.text.contains("/hook/token"), "no URL");
}

#[test]
fn subscribers_are_counted_together_where_that_is_configured() {
    run(async {
        let (receiver, api, queue) = (Receiver::accepting().await, Api::new(), Queue::embedded());
        let text = QUICK.to_owned() + &api.section() + "[metrics]\nper_subscriber = false\n";
        let of = |name: &str| subscriber(name, &receiver.url, "");
        let setup = Setup::new(&queue, &(text.clone() + &of("a") + &of("b")));
        let daemon = setup.start().await;
        daemon.wait_log("the metrics of all subscribers are counted together").await;
        queue.publish(TYPE, (0..3).map(event)).await;
        let is = async |series: &str, value: f64| {
            eventually(&format!("{series} is {value}"), async || {
                api.metric(series).await == Some(value)
            })
            .await;
        };
        is("hooktrail_events_delivered_total{subscriber=\"*\"}", 6.0).await;
        is("hooktrail_lane_up{subscriber=\"*\"}", 2.0).await;
        let both = std::fs::read_to_string(setup.config()).expect("reads");
        setup.write("hooktrail.toml", both.replace(&of("b"), ""));
        is("hooktrail_lane_up{subscriber=\"*\"}", 1.0).await;
        is("hooktrail_events_delivered_total{subscriber=\"*\"}", 6.0).await;
        let exposed = api.get("/metrics").await.text;
        assert!(!exposed.contains("\"a\"") && !exposed.contains("\"b\""), "{exposed}");
    });
}

async fn the_api_answers_what_it_is_asked_and_nothing_to_web_pages(queue: Queue) {
    let receiver = Receiver::start(|_, _| status(410).body("gone")).await;
    let api = Api::new();
    let text = QUICK.to_owned()
        + &api.section()
        + &subscriber("a", &receiver.url, "retry = { max_attempts = 1 }");
    let setup = Setup::new(&queue, &text);
    let _daemon = setup.start().await;
    let tested = api.post("/api/v1/subscribers/a/test", "{}").await;
    assert_eq!((tested.status, &tested.json()["outcome"]), (200, &json!("paused")), "{tested:?}");
    assert_eq!(receiver.count(), 1);
    receiver.now(|_, _| status(500).body("out of order"));
    queue.publish(TYPE, [event(0)]).await;
    eventually("a dead letter", async || {
        api.get("/api/v1/subscribers/a/dead").await.json()["dead"] == 1
    })
    .await;
    let dead = api.get("/api/v1/subscribers/a/dead?limit=5").await.json();
    assert_eq!(
        (&dead["letters"][0]["reason"], &dead["letters"][0]["status"]),
        (&json!("exhausted"), &json!(500)),
        "{dead}"
    );

    // Nothing is changed by a GET, or from a page of another origin.
    for path in [
        "/api/v1/subscribers/a/pause",
        "/api/v1/subscribers/a/resume",
        "/api/v1/subscribers/a/test",
        "/api/v1/events",
    ] {
        // A GET of events is another request, which needs a token.
        let refused = if path == "/api/v1/events" { 403 } else { 405 };
        assert_eq!(api.get(path).await.status, refused, "{path}");
        let json = ("content-type", "application/json");
        for headers in [
            &[json, ("origin", "http://evil.example")][..],
            &[json, ("sec-fetch-site", "cross-site")],
            &[json, ("host", "rebound.example")],
        ] {
            let answer = api.send("POST", path, headers, &event(1)).await;
            assert_eq!(answer.status, 403, "{path} {headers:?}");
        }
        let answer = api.send("POST", path, &[("content-type", "text/plain")], &event(1)).await;
        assert_eq!(answer.status, 415, "{path}: what a browser sends without asking");
    }
    assert_eq!(api.get("/api/v1/subscribers/nobody").await.status, 404);
    assert_eq!(api.get("/api/v2").await.status, 404);
    assert_eq!(api.subscriber("a").await["state"], "retrying");
}

#[test]
fn a_daemon_whose_configuration_was_given_a_mistake_is_still_asked_and_told() {
    run(async {
        let api = Api::new();
        let text = format!(
            "[queue]\nurl = \"embedded\"\n{QUICK}{}{}",
            api.section(),
            subscriber("a", "http://127.0.0.1:9/", "")
        );
        let setup = Setup::with_text(&text);
        let daemon = setup.start().await;
        for mistake in ["[batch_]\n", "[retry\n"] {
            std::fs::write(setup.config(), text.clone() + mistake).expect("writes");
            let paused = setup.run(&["pause", "a"]);
            assert!(paused.status.success(), "{paused:?}");
            assert!(
                String::from_utf8_lossy(&paused.stderr).contains("the configuration has mistakes"),
                "{paused:?}"
            );
            eventually("the mistake is reported", async || {
                setup.ok(&["status"]).contains("The configuration was not reloaded")
            })
            .await;
            setup.ok(&["resume", "a"]);
        }
        assert_eq!(setup.run(&["pause", "../a"]).status.code(), Some(2));
        // The daemon's address must be known.
        let without = text.replace(&api.section(), "");
        std::fs::write(setup.config(), without + "[retry\n").expect("writes");
        assert_eq!(setup.run(&["status"]).status.code(), Some(2));
        assert!(daemon.stop().await.success());
    });
}

#[test]
fn a_pause_says_whose_reason_counts_and_a_resume_by_whom_it_was() {
    run(async {
        let gone = Receiver::start(|_, _| status(410)).await;
        let queue = Queue::embedded();
        let api = Api::new();
        let text = QUICK.to_owned()
            + &api.section()
            + &subscriber("a", "http://127.0.0.1:9/", "")
            + &subscriber("gone", &gone.url, "");
        let setup = Setup::new(&queue, &text);
        let daemon = setup.start().await;
        assert!(setup.ok(&["pause", "a", "--why", "first"]).contains("first"));
        let again = setup.ok(&["pause", "a", "--why", "second"]);
        assert!(
            again.contains("was paused already")
                && again.contains("second")
                && !again.contains("first"),
            "{again}"
        );
        // Without a reason the one before stays.
        assert!(setup.ok(&["pause", "a"]).contains("second"));
        api.wait("a", "paused for the second reason", |s| s["paused"]["why"] == "second").await;
        let resumed = api.post("/api/v1/subscribers/a/resume", "{}").await.json();
        assert_eq!(
            (&resumed["state"], &resumed["changed"]),
            (&json!("ok"), &json!(true)),
            "as the status has it: {resumed}"
        );
        eventually("the log says who resumed it", async || {
            daemon.log().lines().any(|l| l.contains("resumed") && l.contains("by=\"operator\""))
        })
        .await;

        queue.publish(TYPE, [event(0)]).await;
        api.wait("gone", "paused by its receiver", |s| s["state"] == "paused").await;
        let kept = setup.ok(&["pause", "gone", "--why", "mine"]);
        assert!(
            kept.contains("by receiver") && kept.contains("410") && kept.contains("not recorded"),
            "{kept}"
        );
        assert!(!setup.ok(&["pause", "gone"]).contains("not recorded"));
        assert!(daemon.stop().await.success());
    });
}

#[test]
fn a_daemon_that_is_stopped_while_it_starts_says_so() {
    run(async {
        let setup =
            Setup::with_text(&format!("[queue]\nurl = \"amqp://127.0.0.1:{}\"\n", free_port()));
        let mut daemon = setup.spawn();
        daemon.wait_log("admin listening").await;
        daemon.terminate();
        assert!(daemon.wait().await.success());
        let log = daemon.log();
        let at = |word: &str| log.find(word).unwrap_or_else(|| panic!("{word} is not in {log}"));
        assert!(at("stopping") < at("stopped"), "{log}");
    });
}

#[test]
fn several_or_all_subscribers_are_paused_and_resumed_by_one_command() {
    run(async {
        let queue = Queue::embedded();
        let api = Api::new();
        let of = |name: &str, more: &str| subscriber(name, "http://127.0.0.1:9/", more);
        let text = QUICK.to_owned()
            + &api.section()
            + &of("a", "")
            + &of("b", "")
            + &of("c", "")
            + &of("fixed", "paused = true");
        let setup = Setup::new(&queue, &text);
        let _daemon = setup.start().await;
        let paused = async || {
            let found = api.get("/api/v1/subscribers").await.json();
            let of = found["subscribers"]
                .as_array()
                .expect("a list")
                .iter()
                .filter(|s| s["state"] == "paused");
            of.map(|s| s["subscriber"].as_str().expect("a name").to_owned())
                .collect::<Vec<_>>()
                .join(" ")
        };
        let become_paused = async |names: &str| {
            eventually(&format!("paused: {names}"), async || paused().await == names).await
        };
        become_paused("fixed").await;
        let reported = setup.ok(&["pause", "a", "c", "--why", "migration"]);
        assert!(
            reported.contains("`a` is paused")
                && reported.contains("`c` is paused")
                && reported.contains("migration"),
            "{reported}"
        );
        become_paused("a c fixed").await;
        // One that is not there is noticed before anything is changed.
        let unknown = setup.run(&["resume", "a", "nobody"]);
        assert!(unknown.status.code() == Some(2) && paused().await == "a c fixed", "{unknown:?}");
        let reported = setup.ok(&["pause", "--all"]);
        assert!(
            reported.contains("`b` is paused") && reported.contains("`a` was paused already"),
            "{reported}"
        );
        become_paused("a b c fixed").await;
        // A subscriber paused by the configuration is not resumed by a command; the others are.
        let resumed = setup.run(&["resume", "b", "fixed"]);
        let why = String::from_utf8_lossy(&resumed.stderr).into_owned();
        assert!(
            resumed.status.code() == Some(1)
                && why.contains("`fixed`: ")
                && why.contains("1 subscriber was not resumed"),
            "{why}"
        );
        become_paused("a c fixed").await;
        let reported = setup.run(&["resume", "--all"]);
        assert!(
            reported.status.success()
                && String::from_utf8_lossy(&reported.stdout).contains("`fixed` stays paused"),
            "{reported:?}"
        );
        become_paused("fixed").await;
        for wrong in [&["pause"][..], &["resume"], &["pause", "a", "--all"]] {
            assert_eq!(setup.run(wrong).status.code(), Some(2), "{wrong:?}");
        }
    });
}

#[test]
fn the_producers_trace_is_in_the_log_of_each_attempt_and_goes_on_to_the_receiver() {
    run(async {
        let queue = Queue::embedded();
        let receiver = Receiver::start(|_, n| status(if n == 0 { 503 } else { 200 })).await;
        let api = Api::new();
        let setup = Setup::new(
            &queue,
            &(QUICK.to_owned()
                + "[log]\nlevel = \"debug\"\n"
                + &api.section()
                + &subscriber("a", &receiver.url, "batch = { max_events = 2, max_wait = \"2s\" }")),
        );
        let daemon = setup.start().await;
        let trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        let headers = [("content-type", "application/json"), ("traceparent", trace)];
        assert_eq!(api.send("POST", "/api/v1/events", &headers, &event(0)).await.status, 202);
        receiver.wait_requests(2).await;
        daemon.wait_log("outcome=\"delivered\"").await;
        let attempts: Vec<String> =
            daemon.log().lines().filter(|l| l.contains("outcome=")).map(str::to_owned).collect();
        assert_eq!(attempts.len(), 2);
        assert!(
            attempts.iter().all(|l| l.contains(&format!("traceparent=\"{trace}\""))),
            "{attempts:?}"
        );
        let sent = |n: usize| receiver.requests()[n].header("traceparent").to_owned();
        assert_eq!((sent(0), sent(1)), (trace.to_owned(), trace.to_owned()));

        // Events of two traces have a new one, which the log links with theirs.
        let other = trace.replace("0af7", "1bf7");
        for (n, trace) in [(1, trace), (2, &other)] {
            let headers = [("content-type", "application/json"), ("traceparent", trace)];
            assert_eq!(api.send("POST", "/api/v1/events", &headers, &event(n)).await.status, 202);
        }
        receiver.wait_requests(3).await;
        let new = sent(2);
        assert!(new.len() == trace.len() && new != trace && new != other, "{new}");
        daemon.wait_log(&format!("links=\"{trace} {other}\"")).await;
        // Without one there is none.
        for n in 3..5 {
            assert_eq!(api.post("/api/v1/events", &event(n)).await.status, 202);
        }
        receiver.wait_requests(4).await;
        assert!(!receiver.requests()[3].headers.contains_key("traceparent"));
    });
}

fn while_the_broker_is_away_metrics_and_status_say_so() {
    run(async {
        let broker = Broker::private().await;
        let receiver = Receiver::accepting().await;
        let api = Api::new();
        // A lane without work notices nothing by itself.
        let text =
            QUICK.to_owned() + &api.section() + &subscriber("a", &receiver.url, "paused = true");
        let setup = Setup::new(&broker, &text);
        let _daemon = setup.start().await;
        let is = async |value: f64| {
            eventually(&format!("queue_up is {value}"), async || {
                api.metric("hooktrail_queue_up").await == Some(value)
            })
            .await;
        };
        is(1.0).await;
        broker.node().kill().await;
        is(0.0).await;
        assert_eq!(api.get("/api/v1/subscribers").await.json()["queue"]["up"], false);
        assert!(setup.ok(&["status"]).contains("The queue cannot be used"));
        assert_eq!(api.get("/readyz").await.status, 503);
        broker.node().start().await;
        is(1.0).await;
    });
}

fn what_the_broker_forbids_a_command_is_reported_with_its_reason_and_nothing_is_moved() {
    run(async {
        let broker = Broker::private().await;
        let receiver = Receiver::start(|_, _| status(500)).await;
        let api = Api::new();
        let text = QUICK.to_owned()
            + &api.section()
            + &subscriber("a", &receiver.url, "retry = { max_attempts = 1 }");
        let setup = Setup::new(&broker, &text);
        let _daemon = setup.start().await;
        broker.publish(TYPE, [event(1)]).await;
        broker.wait_depth("sub.a.dead", 1).await;
        let events = setup.write("events", event(2));
        broker.node().ctl(&["set_permissions", "guest", ".*", "^$", ".*"]);
        let events = events.to_str().expect("a path");
        // To a channel that is open the broker goes on allowing what it did.
        broker.node().ctl(&["close_all_connections", "a test"]);
        let says_why = |command: &[&str]| {
            let ended = setup.run(command);
            ended.status.code() == Some(1)
                && String::from_utf8_lossy(&ended.stderr).contains("ACCESS_REFUSED")
        };
        for command in [&["dead", "replay", "a"][..], &["publish", events], &["prune", "--yes"]] {
            assert!(says_why(command), "{command:?}");
        }
        eventually("a pause is refused", async || says_why(&["pause", "a"])).await;
        broker.node().ctl(&["set_permissions", "guest", ".*", ".*", ".*"]);
        // The daemon tries again before it says no.
        setup.ok(&["pause", "a"]);
        setup.ok(&["resume", "a"]);
        assert_eq!(broker.depth("sub.a.dead").await, Some(1));
        receiver.now(|_, _| status(200));
        setup.ok(&["dead", "replay", "a"]);
        receiver.wait_all(1).await;
    });
}

#[test]
fn status_watches() {
    run(async {
        let queue = Queue::embedded();
        let receiver = Receiver::accepting().await;
        let api = Api::new();
        let setup = Setup::new(
            &queue,
            &(QUICK.to_owned() + &api.section() + &subscriber("a", &receiver.url, "")),
        );
        let _daemon = setup.start().await;
        let mut watching = Command::new(env!("CARGO_BIN_EXE_hooktrail"))
            .args(["status", "--json", "--watch", "100ms", "--config"])
            .arg(setup.config())
            .stdout(Stdio::piped())
            .spawn()
            .expect("hooktrail runs");
        let lines = BufReader::new(watching.stdout.take().expect("piped")).lines();
        for line in lines.take(3) {
            let line = line.expect("a line");
            assert!(line.contains("\"phase\":\"running\""), "{line}");
        }
        // Without a reader it ends by itself.
        eventually("it ends", async || watching.try_wait().expect("waits").is_some()).await;
    });
}

const JSON: (&str, &str) = ("content-type", "application/json");

/// Requests of history and replays, with each answer that the document has: of a daemon without a
/// token, of one with two subscribers, the second without a receiver, and of one whose history has no
/// bodies.
async fn ask_for_history(open: &Api, with_token: &Api, fields: &Api) {
    let token = ("authorization", "Bearer t");
    let get = async |path: &str| with_token.send("GET", path, &[token], "").await;
    let post =
        async |path: &str, body: &str| with_token.send("POST", path, &[token, JSON], body).await;
    assert_eq!(post("/api/v1/events", r#"{"event":"x.y"}"#).await.status, 202);
    let mut ids = [String::new(), String::new()];
    for (id, state) in ids.iter_mut().zip(["delivered", "retrying"]) {
        eventually(&format!("a delivery is {state}"), async || {
            let found = get(&format!("/api/v1/deliveries?state={state}")).await.json();
            let first = found["deliveries"][0]["id"].as_str();
            first.inspect(|first| (*first).clone_into(id)).is_some()
        })
        .await;
    }
    let mut number = None;
    eventually("the event is in history", async || {
        number = get("/api/v1/events").await.json()["events"][0]["number"].as_i64();
        number.is_some()
    })
    .await;
    let [delivered, retrying] = ids;
    post("/api/v1/subscribers/a/pause", "{}").await;
    let since = r#"{"since":"2000-01-01T00:00:00Z"}"#;
    let dry = r#"{"since":"2000-01-01T00:00:00Z","dry_run":true}"#;
    let replay = "/api/v1/subscribers/a/replay";
    assert_eq!(post(replay, dry).await.status, 200);
    let keyed = async |body: &str| {
        let key = ("idempotency-key", "\"a-key\"");
        with_token.send("POST", replay, &[token, JSON, key], body).await
    };
    let begun = keyed(since).await;
    assert_eq!(begun.status, 202, "{begun:?}");
    let id = begun.json()["id"].as_str().expect("an id").to_owned();
    assert_eq!(keyed(since).await.json()["id"], id.as_str());
    assert_eq!(keyed(r#"{"since":"2001-01-01T00:00:00Z"}"#).await.status, 422);
    for (change, status) in [("cancel", 200), ("cancel", 409), ("continue", 200), ("continue", 409)]
    {
        let answer = post(&format!("/api/v1/replays/{id}/{change}"), "{}").await;
        assert_eq!(answer.status, status, "{change}: {answer:?}");
    }
    for (id, status) in [(&delivered, 202), (&retrying, 409)] {
        let answer = post(&format!("/api/v1/deliveries/{id}/resend"), "{}").await;
        assert_eq!(answer.status, status, "{answer:?}");
    }
    let number = number.expect("a number");
    let gets = [
        (format!("/api/v1/events/{number}"), 200),
        ("/api/v1/events/999999".to_owned(), 404),
        ("/api/v1/events/x".to_owned(), 400),
        ("/api/v1/events?limit=0".to_owned(), 400),
        ("/api/v1/events/export?format=csv".to_owned(), 200),
        ("/api/v1/events/export?format=jsonl".to_owned(), 200),
        ("/api/v1/events/export".to_owned(), 400),
        (format!("/api/v1/deliveries/{delivered}"), 200),
        ("/api/v1/deliveries/none".to_owned(), 404),
        ("/api/v1/deliveries/%FF".to_owned(), 400),
        ("/api/v1/deliveries?limit=0".to_owned(), 400),
        (format!("/api/v1/replays/{id}"), 200),
        ("/api/v1/replays/none".to_owned(), 404),
        ("/api/v1/replays/%FF".to_owned(), 400),
        ("/api/v1/replays".to_owned(), 200),
        ("/api/v1/replays?limit=0".to_owned(), 400),
        ("/api/v1/operations".to_owned(), 200),
        ("/api/v1/operations?limit=0".to_owned(), 400),
    ];
    for (path, status) in &gets {
        let answer = get(path).await;
        assert_eq!(answer.status, *status, "{path}: {answer:?}");
        assert_eq!(with_token.get(path).await.status, 401, "{path}");
        assert_eq!(open.get(path).await.status, 403, "{path}");
    }
    for path in ["/api/v1/events", "/api/v1/deliveries"] {
        assert_eq!(with_token.get(path).await.status, 401);
        assert_eq!(open.get(path).await.status, 403);
    }
    let posts = [
        replay.to_owned(),
        format!("/api/v1/replays/{id}/continue"),
        format!("/api/v1/replays/{id}/cancel"),
        format!("/api/v1/deliveries/{delivered}/resend"),
    ];
    for path in &posts {
        let unknown =
            path.replace("/a/", "/nobody/").replace(&id, "none").replace(&delivered, "none");
        let plain = ("content-type", "text/plain");
        for (answer, status) in [
            (post(path, "[").await, 400),
            (post(path, &"x".repeat(2 << 20)).await, 413),
            (post(&unknown, since_or_nothing(path, since)).await, 404),
            (with_token.send("POST", path, &[token, plain], "{}").await, 415),
            (with_token.post(path, "{}").await, 401),
            (open.post(path, "{}").await, 403),
        ] {
            assert_eq!(answer.status, status, "{path}: {answer:?}");
        }
    }
    let without_bodies = fields.send("POST", replay, &[token, JSON], since).await;
    assert_eq!(without_bodies.status, 409, "{without_bodies:?}");
}

/// The body of a valid request.
fn since_or_nothing<'b>(path: &str, since: &'b str) -> &'b str {
    if path.ends_with("/replay") { since } else { "{}" }
}

fn the_api_is_as_its_document_describes_it() {
    run(async {
        let queue = Queue::embedded();
        let receiver = Receiver::start(|_, n| status(if n % 2 == 0 { 500 } else { 200 })).await;
        let api = Api::new();
        let text = QUICK.to_owned()
            + &api.section()
            + &subscriber("a", &receiver.url, "retry = { max_attempts = 1 }")
            + &subscriber("b", &receiver.url, "paused = true")
            + &subscriber("open", "http://127.0.0.1:9/", "circuit_breaker = { failures = 1 }");
        let setup = Setup::new(&queue, &text);
        let _daemon = setup.start().await;
        queue.publish(TYPE, [event(0)]).await;
        eventually("a dead letter", async || {
            api.get("/api/v1/subscribers/a/dead").await.json()["dead"] == 1
        })
        .await;
        api.wait("open", "open", |s| s["state"] == "circuit_open").await;
        for path in [
            "/healthz",
            "/readyz",
            "/metrics",
            "/api/v1/subscribers",
            "/api/v1/reload",
            "/api/v1/daemon",
            "/api/v1/subscribers/nobody",
            "/api/v1/subscribers/nobody/dead",
            "/api/v1/subscribers/nobody/retry",
            "/api/v1/subscribers/open/retry",
            "/api/v1/subscribers/a/retry?limit=many",
            "/api/v1/subscribers?limit=1",
            "/api/v1/subscribers?state=odd",
            "/api/v1/subscribers/a?limit=1",
            "/api/v1/reload?limit=1",
        ] {
            api.get(path).await;
        }
        let json = ("content-type", "application/json");
        let posts = [
            "events",
            "subscribers/a/pause",
            "subscribers/a/resume",
            "subscribers/a/retry",
            "subscribers/a/test",
            "reload",
        ]
        .map(|p| format!("/api/v1/{p}"));
        for path in &posts {
            api.send("POST", path, &[json, ("origin", "http://evil.example")], "{}").await;
            api.send("POST", path, &[("content-type", "text/plain")], "{}").await;
            api.post(path, "[").await;
            api.post(path, &"x".repeat(2 << 20)).await;
            api.post(path, if path.ends_with("events") { r#"{"event":"x.y"}"# } else { "{}" })
                .await;
            api.post(&path.replace("/a/", "/nobody/"), "{}").await;
            api.send("DELETE", path, &[json], "").await;
        }
        for path in [
            "/api/v1/subscribers",
            "/api/v1/subscribers/a",
            "/api/v1/subscribers/a/dead",
            "/api/v1/subscribers/a/retry",
            "/api/v1/reload",
            "/api/v1/daemon",
        ] {
            api.send("GET", path, &[("sec-fetch-site", "cross-site")], "").await;
        }
        api.post("/api/v1/events", r#"{"events":[{"event":"x"},{"x":1}]}"#).await;
        api.post("/api/v1/events", &format!("{{\"events\":[{}1]}}", "1,".repeat(60_000))).await;
        api.post("/api/v1/subscribers/b/resume", "{}").await;
        api.get("/api/v1/subscribers/a/dead?limit=many").await;
        setup.write("hooktrail.toml", "nonsense");
        api.get("/api/v1/reload").await;
        api.post("/api/v1/reload", "{}").await;
        api.get("/api/v1/subscribers").await;
        api.get("/readyz").await;

        let (with_token, fields) = (Api::new(), Api::new());
        let accepting = Receiver::accepting().await;
        let guarded = Setup::new(
            &Queue::embedded(),
            &(QUICK.to_owned()
                + &with_token.section()
                + "token = \"t\"\n"
                + &subscriber("a", &accepting.url, "")
                + &subscriber(
                    "b",
                    "http://127.0.0.1:9/",
                    "retry = { initial_interval = \"1h\", max_interval = \"1h\" }",
                )),
        );
        let _guarded = guarded.start().await;
        let of_fields = Setup::new(
            &Queue::embedded(),
            &("[history]\nbodies = false\n".to_owned()
                + QUICK
                + &fields.section()
                + "token = \"t\"\n"
                + &subscriber("a", &accepting.url, "")),
        );
        let _of_fields = of_fields.start().await;
        ask_for_history(&api, &with_token, &fields).await;
        let managing = Api::new();
        ask_to_manage(&managing).await;
        for path in [
            "/api/v1/subscribers",
            "/api/v1/subscribers/a",
            "/api/v1/subscribers/a/dead",
            "/api/v1/subscribers/a/retry",
            "/api/v1/reload",
            "/api/v1/daemon",
        ] {
            assert_eq!(with_token.get(path).await.status, 401);
            let answer = with_token
                .send(
                    "GET",
                    path,
                    &[("authorization", "Bearer t"), ("host", "any.name.example")],
                    "",
                )
                .await;
            assert_eq!(answer.status, 200);
        }
        let challenge = handshake::challenge();
        let proof = handshake::proof(&Secret::new("t"), Side::Command, &challenge, with_token.port);
        let headers =
            [(handshake::CHALLENGE, challenge.as_str()), (handshake::PROOF, proof.as_str())];
        let shown = with_token.send("GET", "/api/v1/daemon", &headers, "").await.json();
        let given = shown["proof"].as_str().expect("a proof");
        assert!(
            handshake::is_proven(
                &Secret::new("t"),
                Side::Daemon,
                &challenge,
                with_token.port,
                given
            ),
            "{shown}"
        );
        // It opens nothing else.
        assert_eq!(with_token.send("GET", "/api/v1/subscribers", &headers, "").await.status, 401);
        for path in &posts {
            assert_eq!(with_token.post(path, "{}").await.status, 401);
        }
        assert_eq!(with_token.get("/healthz").await.status, 200);

        let mut exchanges = api.exchanges.lock().expect("not poisoned").clone();
        exchanges.append(&mut with_token.exchanges.lock().expect("not poisoned"));
        exchanges.append(&mut fields.exchanges.lock().expect("not poisoned"));
        exchanges.append(&mut managing.exchanges.lock().expect("not poisoned"));
        let file = setup.write("exchanges.json", serde_json::Value::from(exchanges).to_string());
        let script = repository().join("tests/verifiers/admin.py");
        let reported = output(
            Command::new(verifiers().join("python/bin/python"))
                .arg(script)
                .arg(repository().join("docs"))
                .arg(&file),
        );
        let reported: Vec<serde_json::Value> =
            reported.lines().map(|l| serde_json::from_str(l).expect("a JSON line")).collect();
        let (missed, exchanges) = reported.split_last().expect("a last line");
        for exchange in exchanges {
            assert_eq!(exchange["valid"], true, "{exchange}");
        }
        let missed: Vec<&str> = missed["missed"]
            .as_array()
            .expect("a list")
            .iter()
            .filter_map(|m| m.as_str())
            .collect();
        // Answers that only an overloaded, starting or failing daemon gives.
        let rest: Vec<&&str> = missed
            .iter()
            .filter(|m| !["408", "429", "500", "503"].iter().any(|s| m.ends_with(s)))
            // A change that is stored, and not in use: the queue is away, or was lost on the way.
            .filter(|m| {
                let stored = ["subscribers 202", "{name} 202", "rotate-secret 202"];
                !stored.iter().any(|s| m.ends_with(s))
            })
            .collect();
        assert!(rest.is_empty(), "no exchange was about {rest:?}");
    });
}

#[test]
fn a_stop_says_what_it_waits_for_and_a_second_signal_ends_it_at_once() {
    run(async {
        let queue = Queue::embedded();
        // It takes the request and never answers.
        let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let url = format!("http://{}/", silent.local_addr().expect("an address"));
        let text = "shutdown_timeout = \"4m\"\n".to_owned();
        let section = crate::support::queue::Section::section(&queue, &["slow", "idle"]);
        let more = "[batch]\nmax_wait = \"0s\"\n[http]\nallow_http = true\nallow_private_addresses = true\ntimeout = \"4m\"\n";
        let all = text
            + &section
            + more
            + &subscriber("slow", &url, "")
            + &subscriber("idle", "http://127.0.0.1:9/", "events = [\"none\"]");
        let setup = Setup::with_text(&all);
        let mut daemon = setup.start().await;
        queue.publish(TYPE, [event(0)]).await;
        let (_held, _) = tokio::time::timeout(Duration::from_secs(60), silent.accept())
            .await
            .expect("a request")
            .expect("a connection");
        daemon.terminate();
        daemon.wait_log("stopping").await;
        let log = daemon.log();
        let line = log.lines().find(|l| l.contains("stopping")).expect("just seen");
        for part in ["requests=1", "slow", "deadline=", "timeout_s=240", "second signal"] {
            assert!(line.contains(part), "{part} is not in {line}");
        }
        assert!(!line.contains("idle") && daemon.is_running(), "{line}");
        let begun = std::time::Instant::now();
        daemon.terminate();
        assert!(daemon.wait().await.success());
        assert!(begun.elapsed() < Duration::from_secs(120), "it did not wait for the deadline");
        let log = daemon.log();
        assert!(log.contains("stopped at once") && log.contains("slow"), "{log}");
        // Nothing is lost by it.
        assert_eq!(queue.backlog("slow").await, 1);
    });
}

/// The store must not hold up a stop: neither with work that does not end, nor as it is closed.
#[test]
fn a_store_that_hangs_holds_up_a_stop_no_longer_than_its_limit_and_a_second_signal_ends_it_at_once()
{
    for (limit, signals, said) in
        [("4s", 1, "was not closed in time"), ("4m", 2, "before a second signal ended the daemon")]
    {
        run(async {
            let (queue, api) = (Queue::embedded(), Api::new());
            let receiver = Receiver::accepting().await;
            let section = crate::support::queue::Section::section(&queue, &["a"]);
            let setup = Setup::with_text(
                &(format!("shutdown_timeout = \"{limit}\"\n")
                    + &section
                    + QUICK
                    + &subscriber("a", &receiver.url, "")
                    + &super::history::admin(&api)),
            );
            let mut daemon = super::history::remembering(&queue, &setup).await;
            let Queue::Embedded(embedded) = &queue else { panic!("another queue") };
            // Another process that writes, and does not come to an end.
            let file = embedded.file().with_file_name("history.db");
            let other = rusqlite::Connection::open(file).expect("opens");
            other.execute_batch("BEGIN IMMEDIATE").expect("locks");
            queue.publish(TYPE, [event(0)]).await;
            receiver.wait_requests(1).await;
            daemon.terminate();
            daemon.wait_log("stopping").await;
            for _ in 1..signals {
                daemon.terminate();
            }
            let begun = std::time::Instant::now();
            assert!(daemon.wait().await.success());
            assert!(begun.elapsed() < Duration::from_secs(8), "{:?}", begun.elapsed());
            assert!(daemon.log().contains(said), "{}", daemon.log());
        });
    }
}

//! Batches that wait for their next attempt, as an operator sees and moves them, on both queues.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use lapin::{BasicProperties, types::AMQPValue};
use serde_json::{Value, json};
use tokio::sync::watch;

use crate::support::{
    api::Api,
    broker::{Broker, headers, text},
    daemon::{SLOW, Setup, subscriber},
    eventually,
    queue::{Queue, on_both_queues},
    receiver::{Receiver, Request, event, status},
    run, tests_that_need,
};

on_both_queues!(
    what_waits_is_listed_with_its_attempts_its_last_answer_and_its_time,
    a_batch_that_is_to_be_sent_now_is_the_same_request_and_its_attempts_go_on,
    only_what_is_named_is_sent_now_and_the_others_keep_order_and_time,
    what_is_not_found_is_said_and_a_wrong_name_is_a_matter_of_usage,
    a_command_that_is_killed_loses_nothing,
    the_api_lists_what_waits_and_sends_it_now,
    what_is_wanted_now_is_tried_although_the_circuit_is_open_or_the_receiver_asked_to_be_left_alone,
    what_is_wanted_while_requests_are_under_way_is_tried_when_they_have_ended,
    after_a_wait_that_the_receiver_asked_for_one_batch_is_tried_and_the_rest_when_that_is_accepted,
    where_nothing_is_named_or_found_nothing_is_tried,
    what_is_wanted_now_of_a_paused_subscriber_is_said_to_wait,
);

tests_that_need!(
    broker:
    with_two_daemons_each_batch_is_sent_once,
    a_batch_of_an_earlier_version_does_not_show_when_it_is_due_and_is_sent_now_all_the_same,
    what_is_moved_while_the_disk_is_slow_is_out_of_the_ladder,
    what_waits_in_a_queue_that_is_busy_is_listed,
    what_one_command_has_not_given_back_yet_is_seen_by_the_next,
    what_is_inspected_over_and_over_comes_due_in_its_order_and_at_its_time,
);

const TYPE: &str = "activity_log.user.updated";

fn waiting(setup: &Setup, subscriber: &str) -> Vec<Value> {
    let listed = setup.ok(&["retry", "list", subscriber, "--json"]);
    listed.lines().map(|l| serde_json::from_str(l).expect("a JSON line")).collect()
}

async fn wait_waiting(setup: &Setup, subscriber: &str, expected: usize) -> Vec<Value> {
    let mut found = Vec::new();
    eventually(&format!("{expected} batches of {subscriber} wait"), async || {
        found = waiting(setup, subscriber);
        found.len() == expected
    })
    .await;
    found
}

fn texts(batches: &[Value], key: &str) -> Vec<String> {
    batches
        .iter()
        .map(|b| b[key].as_str().unwrap_or_else(|| panic!("{b} has no {key}")).to_owned())
        .collect()
}

fn ids(batches: &[Value]) -> Vec<String> {
    texts(batches, "id")
}

/// Id and time of each, in order.
fn times(batches: &[Value]) -> Vec<(String, String)> {
    ids(batches).into_iter().zip(texts(batches, "due_at")).collect()
}

fn err(output: &std::process::Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Two subscribers whose receiver fails, a daemon, and this many batches of each that wait for an
/// hour.
async fn failing(
    queue: &Queue,
    more: &str,
    batches: u64,
) -> (Setup, crate::support::daemon::Daemon, [Receiver; 2]) {
    let [a, b] =
        [Receiver::start(|_, _| status(503)).await, Receiver::start(|_, _| status(503)).await];
    let setup = Setup::new(
        queue,
        &(SLOW.to_owned() + more + &subscriber("a", &a.url, "") + &subscriber("b", &b.url, "")),
    );
    let daemon = setup.start().await;
    queue.publish(TYPE, (0..batches).map(event)).await;
    let count = usize::try_from(batches).expect("few");
    for name in ["a", "b"] {
        wait_waiting(&setup, name, count).await;
    }
    (setup, daemon, [a, b])
}

/// By id: what an attempt was made with.
fn by_id(requests: &[Request]) -> BTreeMap<String, Vec<(u32, Vec<u8>)>> {
    let mut found: BTreeMap<String, Vec<(u32, Vec<u8>)>> = BTreeMap::new();
    for r in requests {
        found.entry(r.id().to_owned()).or_default().push((r.attempt(), r.body.to_vec()));
    }
    found
}

async fn what_waits_is_listed_with_its_attempts_its_last_answer_and_its_time(queue: Queue) {
    let begun = SystemTime::now();
    let (setup, daemon, [a, _b]) = failing(&queue, "", 3).await;
    let listed = waiting(&setup, "a");
    let sent: BTreeSet<String> = a.requests().iter().map(|r| r.id().to_owned()).collect();
    assert_eq!(
        ids(&listed).into_iter().collect::<BTreeSet<_>>(),
        sent,
        "those of `a`, and no others"
    );
    for (n, batch) in (1..).zip(&listed) {
        let reported = json!([
            batch["number"],
            batch["events"],
            batch["attempts"],
            batch["status"],
            batch["failure"]
        ]);
        assert_eq!(reported, json!([n, 1, 1, 503, null]));
        let due =
            humantime::parse_rfc3339(batch["due_at"].as_str().expect("a time")).expect("RFC 3339");
        let (hour, late) =
            (Duration::from_secs(3600), SystemTime::now() + Duration::from_secs(4060));
        assert!(
            due >= begun + hour && due <= late,
            "never early, and late by 1 s and an eighth at most: {batch}"
        );
        assert!(
            batch["last_attempt_at"].is_string()
                && batch["first_attempt_at"].is_string()
                && batch["bytes"].as_u64() > Some(300)
        );
    }
    assert!(texts(&listed, "due_at").is_sorted(), "the first due first");
    let shown = setup.ok(&["retry", "list", "a"]);
    assert_eq!(shown.lines().count(), 4, "{shown}");
    let first = shown.lines().nth(1).expect("a line");
    for part in ["@1 ", " 503 ", &ids(&listed)[0]] {
        assert!(first.contains(part), "{part} is not in {first}");
    }
    // Without a daemon it is the same, and listing changes nothing.
    assert!(daemon.stop().await.success());
    assert_eq!(waiting(&setup, "a"), listed);
    assert_eq!(waiting(&setup, "a"), listed);
}

async fn a_batch_that_is_to_be_sent_now_is_the_same_request_and_its_attempts_go_on(queue: Queue) {
    let (setup, _daemon, [a, b]) = failing(&queue, "", 5).await;
    let (before, others) = (by_id(&a.requests()), times(&waiting(&setup, "b")));
    let all = ["retry", "now", "a"];
    let foreseen: Value =
        serde_json::from_str(&setup.ok(&[&all[..], &["--dry-run", "--json"]].concat()))
            .expect("JSON");
    assert_eq!((&foreseen["moved"], &foreseen["dry_run"]), (&json!(5), &json!(true)));
    assert_eq!(a.count(), 5, "nothing was done");
    // Batches that fail again wait for their own time, and are not resent at once.
    a.now(|r, _| status(if r.numbers() == [2] { 502 } else { 200 }));
    let asked = Instant::now();
    let said = setup.ok(&all);
    assert!(said.contains("5 batches of `a` due now"), "{said}");
    let sent = a.wait_requests(10).await;
    assert!(asked.elapsed() < Duration::from_secs(600), "long before their hour");
    let left = wait_waiting(&setup, "a", 1).await;
    assert_eq!(json!([left[0]["attempts"], left[0]["status"]]), json!([2, 502]));
    for (id, attempts) in by_id(&sent) {
        let [first, second] = &attempts[..] else {
            panic!("{id} was sent {} times", attempts.len())
        };
        assert_eq!((first, second.0), (&before[&id][0], 2));
        assert_eq!(first.1, second.1, "the same bytes under the same id");
    }
    assert_eq!(a.count(), 10);
    assert_eq!(times(&waiting(&setup, "b")), others, "no other subscriber's has changed");
    assert_eq!(b.count(), 5);
}

async fn only_what_is_named_is_sent_now_and_the_others_keep_order_and_time(queue: Queue) {
    let (setup, daemon, [a, _b]) = failing(&queue, "", 6).await;
    let (mut own, others) = (times(&waiting(&setup, "a")), times(&waiting(&setup, "b")));
    a.now(|_, _| status(200));
    let by_id = own[4].0.clone();
    let said: Value =
        serde_json::from_str(&setup.ok(&["retry", "now", "a", "@2", &by_id, "--json"]))
            .expect("JSON");
    assert_eq!(json!([said["moved"], said["already_due"], said["not_found"]]), json!([2, 0, []]));
    a.wait_requests(8).await;
    let expected: BTreeSet<String> = [own.remove(4).0, own.remove(1).0].into();
    let accepted = |r: &Request| (r.status == 200).then(|| r.id().to_owned());
    assert_eq!(a.requests().iter().filter_map(accepted).collect::<BTreeSet<_>>(), expected);
    wait_waiting(&setup, "a", 4).await;
    assert!(daemon.stop().await.success());
    assert_eq!(times(&waiting(&setup, "a")), own);
    // Without a daemon they wait to be taken, and one that is due already is said to be.
    let said = setup.ok(&["retry", "now", "a", "@4"]);
    assert!(said.contains("1 batch of `a` due now"), "{said}");
    let now = waiting(&setup, "a");
    assert_eq!(now[0]["id"], own[3].0, "it is the first");
    let due =
        humantime::parse_rfc3339(now[0]["due_at"].as_str().expect("a time")).expect("RFC 3339");
    assert!(due <= SystemTime::now());
    let again: Value =
        serde_json::from_str(&setup.ok(&["retry", "now", "a", &own[3].0, "--json"])).expect("JSON");
    assert_eq!(json!([again["moved"], again["already_due"]]), json!([0, 1]));
    assert_eq!(times(&waiting(&setup, "a"))[1..], own[..3]);
    assert_eq!(times(&waiting(&setup, "b")), others);
    let _daemon = setup.start().await;
    a.wait_requests(9).await;
}

async fn what_is_not_found_is_said_and_a_wrong_name_is_a_matter_of_usage(queue: Queue) {
    let (setup, _daemon, [a, _b]) = failing(&queue, "", 2).await;
    a.now(|_, _| status(200));
    let own = times(&waiting(&setup, "a"));
    for dry_run in [true, false] {
        let flags = if dry_run { &["--json", "--dry-run"][..] } else { &["--json"] };
        let output = setup.run(&[&["retry", "now", "a", "msg_nobody", "@1", "@9"], flags].concat());
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        let reported: Value = serde_json::from_slice(&output.stdout).expect("JSON");
        assert_eq!(
            json!([reported["moved"], reported["not_found"]]),
            json!([1, ["@9", "msg_nobody"]])
        );
        for part in ["msg_nobody", "@9", "hooktrail retry list a"] {
            assert!(err(&output).contains(part), "{part} is not in {}", err(&output));
        }
    }
    a.wait_requests(3).await;
    assert_eq!(times(&wait_waiting(&setup, "a", 1).await)[0], own[1], "what was found was sent");
    let of_another = setup.run(&["retry", "now", "b", &own[1].0]);
    assert_eq!(
        of_another.status.code(),
        Some(1),
        "it belongs to no other subscriber: {of_another:?}"
    );
    for command in [&["retry", "list", "nobody"][..], &["retry", "now", "nobody"]] {
        let output = setup.run(command);
        assert!(output.status.code() == Some(1) && err(&output).contains("`nobody`"), "{output:?}");
    }
    for command in [
        &["retry", "list", "No_Name"][..],
        &["retry", "now", "a/b"],
        &["retry", "now"],
        &["retry", "list", "a", "@1"],
    ] {
        assert_eq!(setup.run(command).status.code(), Some(2), "{command:?}");
    }
}

/// The steps between two durable facts at which a command can be ended.
fn steps(queue: &Queue) -> &'static [&'static str] {
    match queue {
        Queue::Amqp(_) => &["Published:0", "Moved:0"],
        Queue::Embedded(_) => &["Committing:0", "Committed:0"],
    }
}

async fn a_command_that_is_killed_loses_nothing(queue: Queue) {
    let (setup, daemon, [a, b]) = failing(&queue, "", 8).await;
    let (own, others) = (times(&waiting(&setup, "a")), times(&waiting(&setup, "b")));
    assert!(daemon.stop().await.success());
    for step in steps(&queue) {
        let killed = setup.run_as(
            &format!("HOOKTRAIL_DIE_AT={step} exec \"$0\" \"$@\""),
            &["retry", "now", "a", "@1", "@3", "@8"],
        );
        assert_eq!(killed.status.code(), None, "{step}: it was to be killed: {killed:?}");
        // The broker needs a moment to notice, and to have back what was held.
        let mut left = BTreeSet::new();
        eventually("all are there", async || {
            left = ids(&waiting(&setup, "a")).into_iter().collect();
            left.len() == own.len()
        })
        .await;
        assert_eq!(left, own.iter().map(|(id, _)| id.clone()).collect(), "{step}");
        assert_eq!(
            times(&waiting(&setup, "b")),
            others,
            "{step}: in their order and at their time"
        );
    }
    a.now(|_, _| status(200));
    b.now(|_, _| status(200));
    for name in ["a", "b"] {
        setup.ok(&["retry", "now", name]);
        setup.ok(&["retry", "now", name]);
    }
    let _daemon = setup.start().await;
    for receiver in [&a, &b] {
        receiver.wait_all(8).await;
        // One that was killed between publishing and taking out has sent some twice, under one id
        // and with the same bytes.
        for (id, attempts) in by_id(&receiver.requests()) {
            assert!(
                attempts.iter().all(|(_, body)| *body == attempts[0].1),
                "{id} is always the same"
            );
        }
    }
    for name in ["a", "b"] {
        wait_waiting(&setup, name, 0).await;
    }
}

async fn the_api_lists_what_waits_and_sends_it_now(queue: Queue) {
    let api = Api::new();
    let (setup, _daemon, [a, _b]) = failing(&queue, &api.section(), 4).await;
    let path = "/api/v1/subscribers/a/retry";
    let listed = api.get(path).await.json();
    assert_eq!(
        json!([listed["subscriber"], listed["waiting"], listed["unseen"]]),
        json!(["a", 4, 0])
    );
    assert_eq!(listed["batches"].as_array().expect("batches")[..], waiting(&setup, "a")[..]);
    assert_eq!(
        api.get(&format!("{path}?limit=1")).await.json()["batches"].as_array().map(Vec::len),
        Some(1)
    );
    a.now(|_, _| status(200));
    let second = listed["batches"][1]["id"].as_str().expect("an id");
    let moved = api.post(path, &json!({ "ids": [second, "msg_nobody"] }).to_string()).await.json();
    assert_eq!(
        moved,
        json!({
            "subscriber": "a", "moved": 1, "already_due": 0, "not_found": ["msg_nobody"], "unseen": 0, "state": "retrying",
            "paused": null, "tried_now": false
        })
    );
    assert_eq!(a.wait_requests(5).await[4].id(), second);
    let none = api.post(path, r#"{"ids":[]}"#).await.json();
    assert_eq!(none["moved"], 0, "none are named, so none are meant");
    for (body, status) in [
        ("[", 400),
        (r#"{"ids":"x"}"#, 400),
        (r#"{"why":"x"}"#, 400),
        (r#"{"ids":[],"try_only":true}"#, 400),
    ] {
        assert_eq!(api.post(path, body).await.status, status, "{body}");
    }
    assert_eq!(api.send("POST", path, &[("content-type", "text/plain")], "{}").await.status, 415);
    assert_eq!(api.post("/api/v1/subscribers/nobody/retry", "{}").await.status, 404);
    let all = api.post(path, "{}").await.json();
    assert_eq!(all["moved"], 3);
    a.wait_requests(8).await;
    eventually("nothing waits", async || api.get(path).await.json()["waiting"] == 0).await;
}

async fn what_is_wanted_now_is_tried_although_the_circuit_is_open_or_the_receiver_asked_to_be_left_alone(
    queue: Queue,
) {
    let api = Api::new();
    let open =
        SLOW.replace("failures = 0", "failures = 1\nopen_for = \"1h\"\nmax_open_for = \"1h\"");
    let [a, b] = [
        Receiver::start(|_, _| status(503)).await,
        Receiver::start(|_, _| status(429).header("retry-after", "3000")).await,
    ];
    let own = "circuit_breaker = { failures = 0, max_open_for = \"1h\" }";
    let setup = Setup::new(
        &queue,
        &(open + &api.section() + &subscriber("a", &a.url, "") + &subscriber("b", &b.url, own)),
    );
    let _daemon = setup.start().await;
    queue.publish(TYPE, [event(0)]).await;
    api.wait("a", "its circuit is open", |s| s["state"] == "circuit_open").await;
    api.wait("b", "it is held", |s| s["state"] == "held").await;
    let id = ids(&wait_waiting(&setup, "a", 1).await).remove(0);
    wait_waiting(&setup, "b", 1).await;
    // It is not there yet after all: one batch is tried, and the circuit stays open.
    let said = setup.ok(&["retry", "now", "a"]);
    assert!(
        said.contains("1 batch of `a` due now\nits circuit was open: one batch is tried"),
        "{said}"
    );
    a.wait_requests(2).await;
    api.wait("a", "its circuit is open again", |s| {
        s["state"] == "circuit_open" && s["in_hand"] == 0
    })
    .await;
    wait_waiting(&setup, "a", 1).await;
    [&a, &b].into_iter().for_each(|r| r.now(|_, _| status(200)));
    let said: Value =
        serde_json::from_str(&setup.ok(&["retry", "now", "a", &id, "--json"])).expect("JSON");
    assert_eq!(
        json!([said["moved"], said["state"], said["tried_now"]]),
        json!([1, "circuit_open", true])
    );
    let sent = a.wait_requests(3).await;
    assert_eq!(
        sent.iter().map(|r| (r.id(), r.attempt())).collect::<Vec<_>>(),
        [(&id[..], 1), (&id[..], 2), (&id[..], 3)]
    );
    api.wait("a", "its circuit is closed", |s| s["state"] == "ok").await;
    let moved = api.post("/api/v1/subscribers/b/retry", "{}").await.json();
    assert_eq!(
        json!([moved["moved"], moved["state"], moved["tried_now"]]),
        json!([1, "held", true])
    );
    b.wait_requests(2).await;
    api.wait("b", "it is held no more", |s| s["state"] == "ok").await;
}

/// Its circuit opens with the first failure, and stays open for an hour.
fn one_failure(more: &str) -> String {
    SLOW.replace("failures = 0", "failures = 1\nopen_for = \"1h\"\nmax_open_for = \"1h\"")
        .replace("[http]", &format!("[http]\n{more}"))
}

async fn what_is_wanted_while_requests_are_under_way_is_tried_when_they_have_ended(queue: Queue) {
    let api = Api::new();
    let [all_there, others, probe] = [(); 3].map(|()| Arc::new(watch::Sender::new(false)));
    let gates = [all_there.clone(), others.clone(), probe.clone()];
    let a = Receiver::start(move |_, n| {
        status(503).when(
            &gates[match n {
                0 => 0,
                1..=3 => 1,
                _ => 2,
            }],
        )
    })
    .await;
    let setup = Setup::new(
        &queue,
        &(one_failure("concurrency = 4") + &api.section() + &subscriber("a", &a.url, "")),
    );
    let _daemon = setup.start().await;
    queue.publish(TYPE, (0..4).map(event)).await;
    a.wait_requests(4).await;
    // One of four opens the circuit; then there is a wish, and then the others fail.
    all_there.send_replace(true);
    api.wait("a", "its circuit is open", |s| s["state"] == "circuit_open").await;
    let id = ids(&wait_waiting(&setup, "a", 1).await).remove(0);
    let path = "/api/v1/subscribers/a/retry";
    let wanted = api.post(path, &json!({ "ids": [id] }).to_string()).await.json();
    assert_eq!(json!([wanted["moved"], wanted["tried_now"]]), json!([1, true]));
    assert_eq!(a.count(), 4, "requests are under way");
    others.send_replace(true);
    assert_eq!(a.wait_requests(5).await[4].id(), id);
    // The probe has no answer yet when another one is requested.
    let mut failed = Vec::new();
    eventually("the three others wait", async || {
        failed = ids(&waiting(&setup, "a"));
        failed.retain(|other| *other != id); // the embedded queue lists also what is under way
        failed.len() == 3
    })
    .await;
    let second = failed.remove(0);
    api.wait("a", "it is probed", |s| s["circuit"]["state"] == "half_open").await;
    let wanted = api.post(path, &json!({ "ids": [second] }).to_string()).await.json();
    assert_eq!(json!([wanted["moved"], wanted["tried_now"]]), json!([1, true]));
    assert_eq!(a.count(), 5, "one probe at a time");
    a.now(|_, _| status(200));
    probe.send_replace(true);
    assert_eq!(a.wait_requests(6).await[5].id(), second);
    api.wait("a", "its circuit is closed", |s| s["circuit"]["state"] == "closed").await;
    setup.ok(&["retry", "now", "a"]);
    a.wait_all(4).await;
}

async fn after_a_wait_that_the_receiver_asked_for_one_batch_is_tried_and_the_rest_when_that_is_accepted(
    queue: Queue,
) {
    let api = Api::new();
    let a = Receiver::start(|_, _| status(429).header("retry-after", "3000")).await;
    let more =
        "http = { concurrency = 16 }\ncircuit_breaker = { failures = 0, max_open_for = \"1h\" }";
    let setup =
        Setup::new(&queue, &(SLOW.to_owned() + &api.section() + &subscriber("a", &a.url, more)));
    let _daemon = setup.start().await;
    queue.publish(TYPE, [event(0)]).await;
    api.wait("a", "it is held", |s| s["state"] == "held" && s["in_hand"] == 0).await;
    wait_waiting(&setup, "a", 1).await;
    queue.publish(TYPE, (1..17).map(event)).await;
    // It is not there yet after all: one of 17 is tried, and the wait goes on.
    a.now(|_, _| status(503));
    for tries in 1..=3 {
        let wanted = api.post("/api/v1/subscribers/a/retry", "{}").await.json();
        assert_eq!(
            json!([wanted["state"], wanted["tried_now"]]),
            json!(["held", true]),
            "{wanted}"
        );
        a.wait_requests(1 + tries).await;
        api.wait("a", "it is held again", |s| s["state"] == "held" && s["in_hand"] == 0).await;
        assert_eq!(a.count(), 1 + tries, "one batch");
    }
    a.now(|_, _| status(200));
    let said = setup.ok(&["retry", "now", "a"]);
    assert!(
        said.contains("its receiver had asked for a hold by Retry-After: one batch is tried"),
        "{said}"
    );
    api.wait("a", "it is held no more", |s| s["state"] == "ok").await;
    setup.ok(&["retry", "now", "a"]);
    a.wait_all(17).await;
}

async fn where_nothing_is_named_or_found_nothing_is_tried(queue: Queue) {
    let api = Api::new();
    let a = Receiver::start(|_, _| status(503)).await;
    let setup =
        Setup::new(&queue, &(one_failure("") + &api.section() + &subscriber("a", &a.url, "")));
    let _daemon = setup.start().await;
    queue.publish(TYPE, [event(0)]).await;
    api.wait("a", "its circuit is open", |s| s["state"] == "circuit_open" && s["in_hand"] == 0)
        .await;
    wait_waiting(&setup, "a", 1).await;
    let path = "/api/v1/subscribers/a/retry";
    for no_batch in
        [r#"{"ids":["msg_nobody"]}"#, r#"{"ids":[]}"#, r#"{"ids":["msg_nobody"],"try_only":false}"#]
    {
        let answered = api.post(path, no_batch).await.json();
        assert_eq!(
            json!([answered["moved"], answered["already_due"], answered["tried_now"]]),
            json!([0, 0, false]),
            "{no_batch}"
        );
    }
    let unknown = setup.run(&["retry", "now", "a", "msg_unknown"]);
    assert_eq!(unknown.status.code(), Some(1), "{unknown:?}");
    // The batches found are tried; so are those that another program has made due.
    for n in [2, 3] {
        assert_eq!(api.post(path, "{}").await.json()["tried_now"], true);
        a.wait_requests(n).await;
        api.wait("a", "its circuit is open again", |s| {
            s["state"] == "circuit_open" && s["in_hand"] == 0
        })
        .await;
        wait_waiting(&setup, "a", 1).await;
        assert_eq!(a.count(), n, "one for each wish with something due, and none for the others");
    }
    queue.publish(TYPE, [event(1)]).await;
    let answered = api.post(path, r#"{"try_only":true}"#).await.json();
    assert_eq!(
        json!([answered["moved"], answered["already_due"], answered["tried_now"]]),
        json!([0, 0, true])
    );
    a.wait_requests(4).await;
}

async fn what_is_wanted_now_of_a_paused_subscriber_is_said_to_wait(queue: Queue) {
    let api = Api::new();
    let (setup, daemon, [a, _b]) = failing(&queue, &api.section(), 1).await;
    setup.ok(&["pause", "a"]);
    api.wait("a", "it is paused", |s| s["state"] == "paused").await;
    let said = setup.ok(&["retry", "now", "a"]);
    assert!(said.contains("`a` is paused: nothing is sent before `hooktrail resume a`"), "{said}");
    let answered = api.post("/api/v1/subscribers/a/retry", "{}").await.json();
    assert_eq!(json!([answered["state"], answered["tried_now"]]), json!(["paused", false]));
    assert_eq!(a.count(), 1);
    // A pause of the configuration no command ends: the key and its file are named.
    let text = std::fs::read_to_string(setup.config()).expect("reads");
    let included = "[[subscriber]]\nname = \"b\"";
    let (first, second) = text.split_once(included).expect("there is `b`");
    let (b, rest) = second
        .split_once("\n[")
        .map_or((second, String::new()), |(b, rest)| (b, format!("\n[{rest}")));
    let file = setup.write("b.toml", format!("{included}\npaused = true{b}"));
    setup.write("hooktrail.toml", format!("include = [\"b.toml\"]\n{first}{rest}"));
    api.wait("b", "the configuration pauses it", |s| s["paused"]["by"] == "configuration").await;
    let fixed = format!(
        "`b` is paused in the configuration: nothing is sent before `paused = true` is taken out of {}",
        file.display()
    );
    let said = setup.ok(&["retry", "now", "b"]);
    assert!(said.contains(&fixed) && !said.contains("resume"), "{said}");
    // Without a daemon only the configuration is known.
    assert!(daemon.stop().await.success());
    let said = setup.run(&["retry", "now", "a"]);
    let unknown = "nothing is sent before a daemon runs that serves `a`, and whether `a` is paused or its circuit open is not known: no daemon";
    assert!(said.status.success() && err(&said).contains(unknown), "{said:?}");
    let said = err(&setup.run(&["retry", "now", "b"]));
    let wait = format!(
        "before a daemon runs that serves `b`, and before `paused = true` is taken out of {}: no daemon",
        file.display()
    );
    assert!(said.contains(&wait), "{said}");
}

fn with_two_daemons_each_batch_is_sent_once() {
    run(async {
        let queue = Queue::amqp();
        let (setup, _first, [a, _b]) = failing(&queue, "", 40).await;
        let _second = setup.start().await;
        a.now(|_, _| status(200));
        setup.ok(&["retry", "now", "a"]);
        a.wait_all(40).await;
        wait_waiting(&setup, "a", 0).await;
        for (id, attempts) in by_id(&a.requests()) {
            assert_eq!(attempts.iter().map(|(n, _)| *n).collect::<Vec<_>>(), [1, 2], "{id}");
        }
    });
}

/// A batch as an earlier version sent it up the ladder, if it has no time.
fn envelope(id: &str, attempts: i64) -> BasicProperties {
    let table = headers(&[
        ("batch-id", text(id)),
        ("attempts", AMQPValue::LongLongInt(attempts)),
        ("events", AMQPValue::LongLongInt(1)),
    ]);
    BasicProperties::default()
        .with_content_type("application/json".into())
        .with_message_id(id.into())
        .with_headers(table)
}

/// The way of a message that waits in one level alone.
fn way(level: usize, subscriber: &str) -> String {
    let bits: String = (0..19).rev().map(|n| if n == level { "1." } else { "0." }).collect();
    bits + subscriber
}

/// Two subscribers whose queues are there, and no daemon.
async fn alone(broker: &Broker) -> Setup {
    let both = subscriber("a", "http://127.0.0.1:9/", "paused = true")
        + &subscriber("b", "http://127.0.0.1:9/", "paused = true");
    let setup = Setup::new(broker, &(SLOW.to_owned() + &both));
    assert!(setup.start().await.stop().await.success());
    setup
}

fn a_batch_of_an_earlier_version_does_not_show_when_it_is_due_and_is_sent_now_all_the_same() {
    run(async {
        let broker = Broker::shared();
        let setup = alone(&broker).await;
        let level = format!("{}.delay.12", broker.prefix);
        for (id, name) in [("msg_1", "a"), ("msg_2", "b"), ("msg_3", "a")] {
            broker.put(&level, &way(12, name), br#"{"events":[{"n":1}]}"#, envelope(id, 3)).await;
        }
        broker.put(&level, &way(12, "a"), b"no envelope", BasicProperties::default()).await;
        broker.wait_depth("delay.12", 4).await;
        let listed = waiting(&setup, "a");
        let reported: Vec<Value> = listed
            .iter()
            .map(|b| json!([b["id"], b["attempts"], b["status"], b["due_at"]]))
            .collect();
        assert_eq!(json!(reported), json!([["msg_1", 3, null, null], ["msg_3", 3, null, null]]));
        assert!(setup.ok(&["retry", "list", "a"]).contains("unknown"));
        let said = setup.ok(&["retry", "now", "a", "@2"]);
        assert!(said.contains("1 batch of `a` due now"), "{said}");
        let moved = broker.take("sub.a.retry").await.expect("it is there");
        assert_eq!(
            (&moved.data[..], moved.properties.message_id().as_ref().map(|id| id.as_str())),
            (&br#"{"events":[{"n":1}]}"#[..], Some("msg_3"))
        );
        assert_eq!(broker.depth("delay.12").await, Some(3), "the others wait");
        assert_eq!(ids(&waiting(&setup, "b")), ["msg_2"]);
    });
}

/// Acks that a channel has not sent on to the queue are lost when it is closed: the batch would be
/// sent twice, the second time in an hour.
fn what_is_moved_while_the_disk_is_slow_is_out_of_the_ladder() {
    run(async {
        let broker = Broker::private().await;
        let setup = alone(&broker).await;
        let level = format!("{}.delay.12", broker.prefix);
        for (n, name) in (0..60).map(|n| (n, "a")).chain([(60, "b")]) {
            broker.put(&level, &way(12, name), b"{}", envelope(&format!("msg_{n}"), 1)).await;
        }
        broker.wait_depth("delay.12", 61).await;
        slow_disk(&broker);
        let moved: Value =
            serde_json::from_str(&setup.ok(&["retry", "now", "a", "--json"])).expect("JSON");
        quick_disk(&broker);
        assert_eq!(moved["moved"], 60);
        broker.wait_depth("sub.a.retry", 60).await;
        let mut left = None;
        eventually("what was held is given back", async || {
            left = broker.depth("delay.12").await;
            left > Some(0)
        })
        .await;
        assert_eq!(left, Some(1), "the one of b alone");
    });
}

/// Each write takes 300 ms; a queue is counted without one.
fn slow_disk(broker: &Broker) {
    let slow = "register(slow, spawn(fun F() -> sys:suspend(ra_log_wal), timer:sleep(300), sys:resume(ra_log_wal), F() end)).";
    broker.node().ctl(&["eval", slow]);
}

fn quick_disk(broker: &Broker) {
    broker.node().ctl(&["eval", "exit(whereis(slow), kill), sys:resume(ra_log_wal)."]);
}

/// The broker answers the end of a channel before it requeues the messages.
fn what_one_command_has_not_given_back_yet_is_seen_by_the_next() {
    run(async {
        let broker = Broker::private().await;
        let setup = alone(&broker).await;
        let level = format!("{}.delay.12", broker.prefix);
        let put = async |n: u32| {
            let id = format!("msg_{n}");
            broker.put(&level, &way(12, "a"), b"{}", envelope(&id, 1)).await;
            id
        };
        let listed = || ids(&waiting(&setup, "a")).into_iter().collect::<BTreeSet<_>>();
        let mut expected = BTreeSet::new();
        for n in 0..40 {
            expected.insert(put(n).await);
        }
        broker.wait_depth("delay.12", 40).await;
        slow_disk(&broker);
        for _ in 0..2 {
            assert_eq!(listed(), expected);
        }
        expected.insert(put(40).await);
        assert_eq!(listed(), expected);
        quick_disk(&broker);
    });
}

/// RabbitMQ counts a queue as empty that does not answer in time.
fn what_waits_in_a_queue_that_is_busy_is_listed() {
    run(async {
        let broker = Broker::private().await;
        let setup = alone(&broker).await;
        let level = format!("{}.delay.12", broker.prefix);
        broker.put(&level, &way(12, "a"), b"{}", envelope("msg_1", 1)).await;
        broker.wait_depth("delay.12", 1).await;
        let busy =
            "ok = sys:suspend(Queue), spawn(fun() -> timer:sleep(3000), sys:resume(Queue) end).";
        broker.node().ctl(&["eval", &format!("Queue = whereis('%2F_{level}'), {busy}")]);
        assert_eq!(ids(&waiting(&setup, "a")), ["msg_1"]);
    });
}

fn what_is_inspected_over_and_over_comes_due_in_its_order_and_at_its_time() {
    run(async {
        let broker = Broker::shared();
        let setup = alone(&broker).await;
        let level = format!("{}.delay.04", broker.prefix);
        let begun = Instant::now();
        for n in 0..60 {
            let name = if n % 3 == 0 { "a" } else { "b" };
            let body = n.to_string();
            broker
                .put(&level, &way(4, name), body.as_bytes(), envelope(&format!("msg_{n}"), 1))
                .await;
        }
        let published = Instant::now();
        let sixteen = Duration::from_secs(16);
        // Repeated while there is time.
        let mut polls = 0;
        while polls < 3 || published.elapsed() < Duration::from_secs(8) {
            setup.ok(&["retry", "list", "b"]);
            polls += 1;
        }
        let moved: Value =
            serde_json::from_str(&setup.ok(&["retry", "now", "a", "--json"])).expect("JSON");
        let in_time = begun.elapsed() < sixteen;
        if in_time {
            assert_eq!(moved["moved"], 20);
        }
        let mut first = None;
        eventually("all of b are due", async || {
            let due = broker.depth("sub.b.retry").await;
            if due > Some(0) {
                first.get_or_insert_with(|| begun.elapsed());
            }
            due == Some(40)
        })
        .await;
        assert!(first.is_some_and(|first| first >= sixteen), "none came early: {first:?}");
        let expected: Vec<Vec<u8>> =
            (0..60).filter(|n| n % 3 != 0).map(|n| n.to_string().into_bytes()).collect();
        assert_eq!(broker.take_all("sub.b.retry").await, expected);
        println!(
            "the first after {first:?}, the last after {:?}, {polls} polls, moved in time: {in_time}",
            begun.elapsed()
        );
    });
}

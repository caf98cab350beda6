//! Dead letters as an operator handles them: few or a hundred thousand, on both queues; and
//! orphans.

use std::{
    collections::BTreeSet,
    fmt::Write as _,
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use hooktrail::queue::embedded::EmbeddedQueue;
use lapin::{
    BasicProperties, Confirmation,
    options::{BasicPublishOptions, ConfirmSelectOptions},
    types::{AMQPValue, FieldTable},
};
use serde_json::{Value, json};

use crate::support::{
    broker::{Broker, headers, kill, text},
    daemon::{QUICK, Setup, subscriber},
    eventually,
    queue::{Queue, on_both_queues},
    receiver::{Receiver, event, status},
    run,
    snapshot::assert_printed,
    tests_that_need, try_peak_mib,
};

on_both_queues!(
    filters_are_met_together_and_numbers_are_those_of_the_whole_list,
    show_has_the_result_of_each_attempt_over_a_replay_too,
    export_has_everything_and_ends_quietly_without_a_reader,
    a_replayed_batch_is_marked_in_each_request_until_it_arrives,
    what_is_inspected_or_purged_in_part_keeps_its_order,
    a_purge_asks_with_the_number_of_what_it_would_delete_and_deletes_nothing_without_a_yes,
    an_interrupted_replay_gives_the_rest_back_in_order_and_can_be_run_again,
    a_replay_that_is_killed_loses_nothing_and_repeats_at_most_a_group,
    very_many_are_handled_in_little_memory_and_time,
    without_a_name_the_list_says_how_many_each_has_and_why,
);

tests_that_need!(broker: orphans_are_handled_as_dead_letters_are_and_only_those_with_a_queue_are_replayed);

/// A dead letter to be put into a queue.
struct Letter {
    id: String,
    status: u16,
    body: String,
}

fn letters(n: u64) -> impl Iterator<Item = Letter> {
    let one = |n| Letter {
        id: id(n),
        status: status_of(&id(n)),
        body: format!("{{\"events\":[{}]}}", event(n)),
    };
    (0..n).map(one)
}

fn id(n: u64) -> String {
    format!("msg_{n:032}")
}

/// Each has one of seven.
fn status_of(id: &str) -> u16 {
    let n: u64 = id.trim_start_matches("msg_").parse().expect("a number");
    500 + (n % 7) as u16
}

const DIED_AT: &str = "2026-01-31T08:00:00.000Z";

/// Puts batches that were given up into the queue of `a`, as the daemon does; it has run before.
async fn put(queue: &Queue, letters: impl Iterator<Item = Letter>) {
    match queue {
        Queue::Amqp(broker) => {
            let name = format!("{}.sub.a.dead", broker.prefix);
            let (connection, channel) = broker.channel().await;
            channel.confirm_select(ConfirmSelectOptions::default()).await.expect("confirms");
            let mut confirms = Vec::new();
            for l in letters {
                let number = |n: u16| AMQPValue::LongLongInt(n.into());
                let table = headers(&[
                    ("kind", text("batch")),
                    ("reason", text("exhausted")),
                    ("batch-id", text(&l.id)),
                    ("attempts", number(3)),
                    ("status", number(l.status)),
                    ("error", text("status")),
                    ("events", number(1)),
                    ("died-at", text(DIED_AT)),
                ]);
                let properties = BasicProperties::default()
                    .with_delivery_mode(2)
                    .with_content_type("application/json".into());
                let properties =
                    properties.with_message_id(l.id.as_str().into()).with_headers(table);
                let sent = channel.basic_publish(
                    "".into(),
                    name.as_str().into(),
                    BasicPublishOptions::default(),
                    l.body.as_bytes(),
                    properties,
                );
                confirms.push(sent.await.expect("publishes"));
            }
            for c in confirms {
                assert_eq!(c.await.expect("confirmed"), Confirmation::Ack(None));
            }
            connection.close(200, "done".into()).await.expect("closes");
        }
        Queue::Embedded(embedded) => {
            drop::<EmbeddedQueue>(embedded.open());
            let mut db = rusqlite::Connection::open(embedded.file()).expect("opens");
            let change = db.transaction().expect("begins");
            {
                let mut insert = change
                    .prepare(
                        "INSERT INTO dead (subscriber, kind, reason, letter_id, content_type, events, attempts, status, error, died_at, body) \
                         VALUES ('a', 'batch', 'exhausted', ?1, 'application/json', 1, 3, ?2, 'status', 1769846400000, ?3)",
                    )
                    .expect("prepares");
                for l in letters {
                    insert
                        .execute(rusqlite::params![l.id, l.status, l.body.as_bytes()])
                        .expect("inserts");
                }
            }
            change.commit().expect("commits");
        }
    }
}

/// A subscriber `a` whose queues are there, and that gets nothing, so that what is replayed stays
/// where it can be seen.
async fn asleep(queue: &Queue) -> Setup {
    let setup = Setup::new(
        queue,
        &(QUICK.to_owned() + &subscriber("a", "http://127.0.0.1:9/", "paused = true")),
    );
    assert!(setup.start().await.stop().await.success());
    setup
}

fn lines(text: &str) -> Vec<Value> {
    text.lines().map(|l| serde_json::from_str(l).expect("a JSON line")).collect()
}

fn ids(letters: &[Value]) -> Vec<String> {
    letters.iter().map(|l| l["id"].as_str().expect("an id").to_owned()).collect()
}

/// Takes away the batches that are to be sent again; their ids, in order.
async fn take_retries(queue: &Queue) -> Vec<String> {
    match queue {
        Queue::Amqp(broker) => {
            let (connection, channel) = broker.channel().await;
            let name = format!("{}.sub.a.retry", broker.prefix);
            let mut found = Vec::new();
            let take = lapin::options::BasicGetOptions { no_ack: true };
            while let Some(m) = channel.basic_get(name.as_str().into(), take).await.expect("gets") {
                assert!(
                    m.properties
                        .headers()
                        .as_ref()
                        .is_some_and(|h| h.contains_key("x-hooktrail-replay")),
                    "it is marked"
                );
                found.push(m.properties.message_id().as_ref().expect("an id").as_str().to_owned());
            }
            connection.close(200, "done".into()).await.expect("closes");
            found
        }
        Queue::Embedded(embedded) => {
            let db = rusqlite::Connection::open(embedded.file()).expect("opens");
            let mut query = db
                .prepare("SELECT batch_id FROM retry WHERE replay ORDER BY due, id")
                .expect("prepares");
            let found = query
                .query_map([], |r| r.get(0))
                .expect("reads")
                .collect::<Result<_, _>>()
                .expect("ids");
            db.execute("DELETE FROM retry", []).expect("deletes");
            found
        }
    }
}

async fn filters_are_met_together_and_numbers_are_those_of_the_whole_list(queue: Queue) {
    let receiver = Receiver::start(|r, _| {
        status(if r.events()[0]["event"] == "user.deleted" { 503 } else { 500 })
    })
    .await;
    let more = "batch = { max_events = 1 }\nretry = { max_attempts = 1 }";
    let setup = Setup::new(&queue, &(QUICK.to_owned() + &subscriber("a", &receiver.url, more)));
    let _daemon = setup.start().await;
    for (n, (event_type, body)) in (1..).zip([
        ("user.created", r#"{"event":"user.created"}"#),
        ("user.deleted", r#"{"event":"user.deleted"}"#),
        ("user.deleted", "not json"),
        ("billing.paid", r#"{"event":"billing.paid"}"#),
    ]) {
        queue.publish(event_type, [body]).await;
        queue.wait_dead("a", n).await;
    }
    let all = setup.dead("a");
    let second = all[1]["died_at"].as_str().expect("a time");
    for (filters, expected) in [
        (&[][..], &[1, 2, 3, 4][..]),
        (&["--reason", "invalid_event"], &[3]),
        (&["--status", "503"], &[2]),
        (&["--status", "5xx"], &[1, 2, 4]),
        (&["--type", "user.*"], &[1, 2]),
        (&["--type", "#", "--status", "500"], &[1, 4]),
        (&["--type", "user.*", "--reason", "invalid_event"], &[]),
        (&["--since", second], &[2, 3, 4]),
        (&["--until", second], &[1, 2]),
        (&["--since", second, "--until", second], &[2]),
        (&["--since", "1h", "--status", "503"], &[2]),
        (&["--until", "1h"], &[]),
        (&["@2", "--status", "503", "--type", "user.#"], &[2]),
    ] {
        let found = setup.ok(&[&["dead", "list", "a", "--json"], filters].concat());
        let numbers: Vec<Value> = lines(&found).into_iter().map(|l| l["number"].clone()).collect();
        assert_eq!(json!(numbers), json!(expected), "{filters:?}");
        let count = format!("would queue {} of 4", expected.len());
        assert!(
            setup.ok(&[&["dead", "replay", "a", "--dry-run"], filters].concat()).contains(&count),
            "{filters:?}"
        );
        let exported = lines(&setup.ok(&[&["dead", "export", "a"], filters].concat()));
        assert_eq!(exported.len(), expected.len(), "{filters:?}");
    }
    let missing = setup.run(&["dead", "list", "a", "@1", "--status", "503"]);
    assert_eq!(missing.status.code(), Some(1));
    assert!(
        String::from_utf8_lossy(&missing.stderr).contains("no dead letter with status 503 is @1;"),
        "{missing:?}"
    );
    for bad in
        [["--status", "99"], ["--type", ""], ["--since", "yesterday"], ["--reason", "boredom"]]
    {
        assert_eq!(
            setup.run(&[&["dead", "list", "a"][..], &bad].concat()).status.code(),
            Some(2),
            "{bad:?}"
        );
    }
    assert!(
        setup
            .ok(&["dead", "purge", "a", "--type", "user.*", "--yes"])
            .contains("purged 2 of 4 dead letters of `a`")
    );
    assert_eq!(
        setup.dead("a").iter().map(|l| l["reason"].clone()).collect::<Vec<_>>(),
        ["invalid_event", "exhausted"]
    );
}

async fn without_a_name_the_list_says_how_many_each_has_and_why(queue: Queue) {
    let receiver = Receiver::start(|r, _| {
        status(if r.events()[0]["event"] == "user.deleted" { 503 } else { 200 })
    })
    .await;
    let more = "batch = { max_events = 1 }\nretry = { max_attempts = 1 }";
    let of = |name: &str, events: &str| {
        subscriber(name, &receiver.url, &format!("{more}\nevents = [\"{events}\"]"))
    };
    let setup = Setup::new(
        &queue,
        &(QUICK.to_owned()
            + &of("a", "user.*")
            + &of("b", "user.deleted")
            + &of("good", "user.created")),
    );
    let daemon = setup.start().await;
    assert_eq!(setup.ok(&["dead", "list"]).trim_end(), "no dead letters");
    for (n, body) in
        (1..).zip([r#"{"event":"user.deleted"}"#, "not json", r#"{"event":"user.deleted"}"#])
    {
        queue.publish("user.deleted", [body]).await;
        queue.wait_dead("a", n).await;
        queue.wait_dead("b", n).await;
    }
    let summary = |more: &[&str]| lines(&setup.ok(&[&["dead", "list", "--json"], more].concat()));
    let all = summary(&[]);
    let of: Vec<Value> = all
        .iter()
        .map(|l| json!([l["subscriber"], l["dead"], l["reasons"], l["configured"]]))
        .collect();
    let reasons = json!({ "exhausted": 2, "invalid_event": 1 });
    assert_eq!(json!(of), json!([["a", 3, reasons, true], ["b", 3, reasons, true]]));
    let oldest = setup.dead("a")[0]["died_at"].clone();
    assert_eq!(all[0]["oldest_died_at"], oldest);
    for (filters, expected) in [
        (&["--status", "5xx"][..], json!([2, 2])),
        (&["--status", "4xx"], json!([])),
        (&["--reason", "invalid_event"], json!([1, 1])),
        (
            &["--since", oldest.as_str().expect("a time").split_once('T').expect("a date").0],
            json!([3, 3]),
        ),
    ] {
        let found: Vec<Value> = summary(filters).iter().map(|l| l["dead"].clone()).collect();
        assert_eq!(json!(found), expected, "{filters:?}");
    }
    assert_printed("dead_list_of_all", &setup.ok(&["dead", "list"]));
    assert_printed("dead_list", &setup.ok(&["dead", "list", "a"]));
    assert_printed("dead_show_of_an_event", &setup.ok(&["dead", "show", "a", "@2"]));
    for command in ["export", "replay", "purge"] {
        assert_eq!(
            setup.run(&["dead", command]).status.code(),
            Some(2),
            "{command}: whose is to be said"
        );
    }
    assert_eq!(setup.dead("a").len(), 3, "the letters that were read are still there");
    assert!(daemon.stop().await.success());
}

async fn show_has_the_result_of_each_attempt_over_a_replay_too(queue: Queue) {
    let receiver = Receiver::start(|_, n| status([500, 503, 429][n % 3])).await;
    let setup = Setup::new(
        &queue,
        &(QUICK.to_owned() + &subscriber("a", &receiver.url, "retry = { max_attempts = 3 }")),
    );
    let _daemon = setup.start().await;
    queue.publish("a.b", [event(0)]).await;
    queue.wait_dead("a", 1).await;
    let story = || {
        let shown: Value =
            serde_json::from_str(&setup.ok(&["dead", "show", "a", "@1", "--json"])).expect("JSON");
        shown["story"].as_array().expect("a story").clone()
    };
    let reported: Vec<Value> = story().iter().map(|a| json!([a["attempt"], a["status"]])).collect();
    assert_eq!(json!(reported), json!([[1, 500], [2, 503], [3, 429]]));
    let sent = receiver.requests();
    for (attempt, request) in story().iter().zip(&sent) {
        let at =
            humantime::parse_rfc3339(attempt["at"].as_str().expect("a time")).expect("RFC 3339");
        assert!(
            at + Duration::from_millis(1) >= request.at
                && at < request.at + Duration::from_secs(30),
            "{attempt} is not when it was over"
        );
    }
    assert_printed("dead_show", &setup.ok(&["dead", "show", "a", "@1"]));

    // The next ones fail without an answer.
    drop(receiver);
    setup.ok(&["dead", "replay", "a"]);
    queue.wait_dead("a", 1).await;
    let reported: Vec<Value> =
        story().iter().map(|a| json!([a["attempt"], a["status"], a["failure"]])).collect();
    let none = Value::Null;
    let expected = json!([
        [1, 500, none],
        [2, 503, none],
        [3, 429, none],
        [1, none, "connect"],
        [2, none, "connect"],
        [3, none, "connect"]
    ]);
    assert_eq!(json!(reported), expected);
}

async fn export_has_everything_and_ends_quietly_without_a_reader(queue: Queue) {
    let setup = asleep(&queue).await;
    put(&queue, letters(300)).await;
    queue.wait_dead("a", 300).await;
    let exported = lines(&setup.ok(&["dead", "export", "a"]));
    assert_eq!(ids(&exported), (0..300).map(id).collect::<Vec<_>>());
    for (n, (l, put)) in exported.iter().zip(letters(300)).enumerate() {
        assert_eq!(
            (&l["number"], &l["subscriber"], &l["kind"]),
            (&json!(n + 1), &json!("a"), &json!("batch"))
        );
        assert_eq!((&l["body"], &l["status"]), (&json!(put.body), &json!(put.status)));
        assert_eq!(
            (&l["died_at"], &l["content_type"]),
            (&json!(DIED_AT), &json!("application/json"))
        );
        assert!(
            l.get("body_base64").is_none() && l["story"].as_array().is_some_and(Vec::is_empty),
            "{l}"
        );
    }
    for shell in ["\"$0\" \"$@\" | head -n 2", "\"$0\" \"$@\" | true"] {
        for command in ["export", "list"] {
            let output = setup.run_as(shell, &["dead", command, "a"]);
            assert!(
                output.status.success() && output.stderr.is_empty(),
                "{command} {shell}: {output:?}"
            );
        }
    }
    assert_eq!(ids(&setup.dead("a")), ids(&exported), "nothing has changed its place");

    // Bytes that are not UTF-8 are not replaced.
    let bad = b"\xff\xfe";
    match &queue {
        Queue::Amqp(broker) => {
            broker
                .put(
                    "",
                    &format!("{}.sub.a.dead", broker.prefix),
                    bad,
                    BasicProperties::default().with_message_id("bad".into()),
                )
                .await;
        }
        Queue::Embedded(embedded) => {
            let db = rusqlite::Connection::open(embedded.file()).expect("opens");
            let insert = "INSERT INTO dead (subscriber, kind, reason, letter_id, events, attempts, error, body) VALUES ('a', 'event', 'invalid_event', 'bad', 1, 0, '', ?1)";
            db.execute(insert, [&bad[..]]).expect("inserts");
        }
    }
    let found = &lines(&setup.ok(&["dead", "export", "a", "bad"]))[0];
    assert_eq!((found.get("body"), &found["body_base64"]), (None, &json!("//4=")));
}

async fn a_replayed_batch_is_marked_in_each_request_until_it_arrives(queue: Queue) {
    let receiver = Receiver::start(|_, n| status(if n == 2 { 200 } else { 500 })).await;
    let setup = Setup::new(
        &queue,
        &(QUICK.to_owned() + &subscriber("a", &receiver.url, "retry = { max_attempts = 2 }")),
    );
    let daemon = setup.start().await;
    queue.publish("a.b", [event(0)]).await;
    queue.wait_dead("a", 1).await;
    assert!(
        receiver.requests().iter().all(|r| r.header("x-hooktrail-replay").is_empty()),
        "it is no replay yet"
    );
    receiver.now(|_, n| status(if n == 2 { 500 } else { 200 }));
    assert!(
        setup
            .ok(&["dead", "replay", "a", "--rate", "5"])
            .contains("queued 1 of 1 dead letter of `a`")
    );
    let requests = receiver.wait_requests(4).await;
    for (n, r) in requests[2..].iter().enumerate() {
        assert_eq!((r.header("x-hooktrail-replay"), r.attempt() as usize), ("true", n + 1));
        assert_eq!(
            (r.id(), &r.body),
            (requests[0].id(), &requests[0].body),
            "the same bytes under the same id"
        );
        assert!(r.verified());
    }
    queue.wait_empty("a").await;
    assert!(daemon.stop().await.success());
}

async fn what_is_inspected_or_purged_in_part_keeps_its_order(queue: Queue) {
    let setup = asleep(&queue).await;
    let mut expected: Vec<String> = (0..500).map(id).collect();
    put(&queue, letters(500)).await;
    queue.wait_dead("a", 500).await;
    setup.ok(&["dead", "show", "a", "@7"]);
    setup.ok(&["dead", "list", "a", "--status", "503"]);
    assert_eq!(ids(&setup.dead("a")), expected);
    for gone in [503, 506] {
        assert!(
            setup
                .ok(&["dead", "purge", "a", "--status", &gone.to_string(), "--yes"])
                .contains("purged 71 of")
        );
        expected.retain(|letter| status_of(letter) != gone);
        assert_eq!(ids(&setup.dead("a")), expected);
    }
    assert!(setup.ok(&["dead", "replay", "a", "--status", "500"]).contains("queued 72 of"));
    let (sent, left) =
        expected.iter().cloned().partition::<Vec<_>, _>(|letter| status_of(letter) == 500);
    assert_eq!(ids(&setup.dead("a")), left);
    assert_eq!(take_retries(&queue).await, sent);
    // Letters that came meanwhile are behind the others.
    put(&queue, letters(3)).await;
    queue.wait_dead("a", left.len() as u32 + 3).await;
    assert_eq!(ids(&setup.dead("a")), [left, (0..3).map(id).collect()].concat());
}

async fn a_purge_asks_with_the_number_of_what_it_would_delete_and_deletes_nothing_without_a_yes(
    queue: Queue,
) {
    let setup = asleep(&queue).await;
    put(&queue, letters(16)).await;
    queue.wait_dead("a", 16).await;
    for (filter, answer, question, left) in [
        ("--status 501", "n", "Delete 3 dead letters of `a` for good?", 16),
        ("--status 501", "y", "Delete 3 dead letters of `a` for good?", 13),
        ("@1", "yes", "Delete 1 dead letter of `a` for good?", 12),
        ("--status 599", "y", "purged 0 of 12", 12),
        ("", "", "Delete all 12 dead letters of `a` for good?", 12),
        ("", "y", "Delete all 12 dead letters of `a` for good?", 0),
    ] {
        // `script` is a terminal: without one it does not ask.
        let shell = format!(
            "export P=\"$0\" C=\"$2\"; echo {answer} | script -qec 'exec \"$P\" --config \"$C\" dead purge a {filter}' /dev/null"
        );
        let Output { status, stdout, .. } = setup.run_as(&shell, &[]);
        let out = String::from_utf8_lossy(&stdout).into_owned();
        assert!(out.contains(question), "{filter}, {answer}: {out}");
        assert_eq!(
            out.contains("Delete"),
            question.contains("Delete"),
            "{filter}, {answer}: {out}"
        );
        if question.contains("Delete") {
            let refused = !answer.starts_with('y');
            assert_eq!(
                (status.success(), out.contains("nothing was deleted")),
                (!refused, refused),
                "{filter}, {answer}: {out}"
            );
        }
        assert_eq!(setup.dead("a").len(), left, "{filter}, {answer}: {out}");
    }
}

fn start(setup: &Setup, arguments: &[&str]) -> Child {
    let mut c = Command::new(env!("CARGO_BIN_EXE_hooktrail"));
    c.arg("--config").arg(setup.config()).args(arguments).env_remove("HOOKTRAIL_CONFIG");
    c.stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("hooktrail starts")
}

/// Waits until something of what a command does can be seen.
async fn wait_replayed(queue: &Queue, n: u32) {
    eventually(&format!("{n} are replayed"), async || match queue {
        Queue::Amqp(broker) => broker.depth("sub.a.retry").await.is_some_and(|depth| depth >= n),
        Queue::Embedded(embedded) => embedded.retries("a").await >= n,
    })
    .await;
}

async fn an_interrupted_replay_gives_the_rest_back_in_order_and_can_be_run_again(queue: Queue) {
    let setup = asleep(&queue).await;
    put(&queue, letters(400)).await;
    queue.wait_dead("a", 400).await;
    for (signal, chosen) in [("-INT", 501), ("-TERM", 502)] {
        let before = ids(&setup.dead("a"));
        // Most of them are passed by, and have to come back in their order too.
        let replay = start(
            &setup,
            &[
                "dead",
                "replay",
                "a",
                "--rate",
                "5",
                "--status",
                &chosen.to_string(),
                "--until",
                DIED_AT,
            ],
        );
        wait_replayed(&queue, 5).await;
        kill(signal, replay.id());
        let Output { status, stdout, stderr } = replay.wait_with_output().expect("ends");
        let (out, err) = (
            String::from_utf8_lossy(&stdout).into_owned(),
            String::from_utf8_lossy(&stderr).into_owned(),
        );
        assert!(
            status.code() == Some(1) && err.contains("interrupted: the others are where they were"),
            "{out}{err}"
        );
        let sent = take_retries(&queue).await;
        assert!(
            out.starts_with(&format!(
                "queued {} of {} dead letters of `a`",
                sent.len(),
                before.len()
            )),
            "{out}"
        );
        assert!((5..57).contains(&sent.len()), "{}", sent.len());
        let meant: Vec<&String> =
            before.iter().filter(|id| status_of(id) == chosen).take(sent.len()).collect();
        assert_eq!(sent.iter().collect::<Vec<_>>(), meant);
        let left: Vec<String> = before.iter().filter(|id| !sent.contains(id)).cloned().collect();
        assert_eq!(ids(&setup.dead("a")), left);
    }
    let before = ids(&setup.dead("a"));
    setup.ok(&["dead", "replay", "a"]);
    assert_eq!(take_retries(&queue).await, before);
    queue.wait_dead("a", 0).await;
}

async fn a_replay_that_is_killed_loses_nothing_and_repeats_at_most_a_group(queue: Queue) {
    let setup = asleep(&queue).await;
    put(&queue, letters(3000)).await;
    queue.wait_dead("a", 3000).await;
    let mut sent = Vec::new();
    for _ in 0..3 {
        let mut replay = start(&setup, &["dead", "replay", "a", "--rate", "1000"]);
        wait_replayed(&queue, 100).await;
        replay.kill().expect("kills");
        replay.wait().expect("ends");
        // The broker needs a moment to notice, and to have back what was held.
        let mut now = take_retries(&queue).await;
        sent.append(&mut now);
        let unique: BTreeSet<&String> = sent.iter().collect();
        let least = 3000 - unique.len() as u32;
        eventually("the rest is back", async || queue.dead("a").await >= least).await;
    }
    setup.ok(&["dead", "replay", "a"]);
    sent.append(&mut take_retries(&queue).await);
    let unique: BTreeSet<String> = sent.iter().cloned().collect();
    assert_eq!(unique, (0..3000).map(id).collect(), "each was sent");
    assert!(sent.len() <= 3000 + 3 * 50, "{} of 3000 were sent", sent.len());
}

/// Runs a command to its end: what it printed, how long it took, and the most memory that it had,
/// in MiB.
fn measured(setup: &Setup, arguments: &[&str]) -> (Output, Duration, f64) {
    let begun = Instant::now();
    let child = start(setup, arguments);
    let pid = child.id();
    let watch = std::thread::spawn(move || {
        let mut peak = 0.0;
        // It only rises, so what was seen last is what it came to, but for the last few
        // milliseconds.
        while let Some(now) = try_peak_mib(pid) {
            peak = now;
            std::thread::sleep(Duration::from_millis(5));
        }
        peak
    });
    let output = child.wait_with_output().expect("ends");
    (output, begun.elapsed(), watch.join().expect("watches"))
}

/// The number in the everyday run; `HOOKTRAIL_TEST_DEAD_LETTERS=100000` makes it the promised one.
const MANY: u64 = 20_000;

async fn very_many_are_handled_in_little_memory_and_time(queue: Queue) {
    let many: u64 =
        std::env::var("HOOKTRAIL_TEST_DEAD_LETTERS").map_or(MANY, |n| n.parse().expect("a number"));
    let with_status =
        |status: u16| (0..many).filter(|n| status_of(&id(*n)) == status).count() as u64;
    let (purged, replayed) = (with_status(503), with_status(504));
    let setup = asleep(&queue).await;
    put(&queue, letters(many)).await;
    queue.wait_dead("a", many as u32).await;
    let mut figures = String::new();
    let mut inspection = |arguments: &[&str], expected: &dyn Fn(&str) -> bool| {
        let (output, took, peak) = measured(&setup, arguments);
        let out = String::from_utf8_lossy(&output.stdout);
        assert!(
            output.status.success() && expected(&out),
            "{arguments:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        writeln!(figures, "{}: {:.1} s, {peak:.0} MiB", arguments.join(" "), took.as_secs_f64())
            .expect("writes");
        assert!(peak < 80.0, "{figures}");
        assert!(took < Duration::from_secs(90), "{figures}");
    };
    inspection(&["dead", "list", "a"], &|out| out.lines().count() as u64 == many + 1);
    inspection(&["dead", "replay", "a", "--dry-run"], &|out| {
        out.starts_with(&format!("would queue {many} of {many}"))
    });
    inspection(&["dead", "export", "a"], &|out| {
        out.lines().count() as u64 == many
            && out.lines().zip(0..).all(|(l, n)| l.contains(&format!("\"id\":\"{}\"", id(n))))
    });
    inspection(&["dead", "purge", "a", "--status", "503", "--yes"], &|out| {
        out.starts_with(&format!("purged {purged} of {many}"))
    });
    inspection(&["dead", "replay", "a", "--status", "504"], &|out| {
        out.starts_with(&format!("queued {replayed} of {}", many - purged))
    });
    queue.wait_dead("a", (many - purged - replayed) as u32).await;
    println!(
        "{many} dead letters in {}:\n{figures}",
        if matches!(queue, Queue::Amqp(_)) { "RabbitMQ" } else { "the embedded queue" }
    );
}

fn orphans_are_handled_as_dead_letters_are_and_only_those_with_a_queue_are_replayed() {
    run(async {
        let broker = Broker::shared();
        let queue = Queue::Amqp(broker);
        let setup = asleep(&queue).await;
        let Queue::Amqp(broker) = &queue else { unreachable!("made above") };
        let first = format!("{}.delay.00", broker.prefix);
        let to = |name: &str| format!("{}1.{name}", "0.".repeat(18));
        let batch = |id: &str| {
            let table = headers(&[("batch-id", text(id)), ("attempts", AMQPValue::LongLongInt(2))]);
            BasicProperties::default()
                .with_content_type("application/json".into())
                .with_message_id(id.into())
                .with_headers(table)
        };
        let body = br#"{"events":[{"event":"x","n":7}]}"#;
        let orphans = format!("{}.orphans", broker.prefix);
        for (n, (id, name)) in (1..).zip([("msg_1", "gone"), ("msg_2", "b"), ("msg_3", "gone")]) {
            broker.put(&first, &to(name), body, batch(id)).await;
            broker.wait_depth("orphans", n).await;
        }
        let invalid = headers(&[
            ("kind", text("event")),
            ("reason", text("invalid_event")),
            ("error", text("the event is empty")),
        ]);
        broker.put("", &orphans, b"bad", BasicProperties::default().with_headers(invalid)).await;
        broker.wait_depth("orphans", 4).await;
        // `b` is configured again, and no daemon has swept yet.
        let retry = format!("{}.sub.b.retry", broker.prefix);
        broker.knows("b");
        let (connection, channel) = broker.channel().await;
        let durable = lapin::options::QueueDeclareOptions { durable: true, ..Default::default() };
        let mut quorum = FieldTable::default();
        quorum.insert("x-queue-type".into(), text("quorum"));
        channel.queue_declare(retry.as_str().into(), durable, quorum).await.expect("declares");
        connection.close(200, "done".into()).await.expect("closes");

        let list = |more: &[&str]| {
            lines(&setup.ok(&[&["dead", "list", "--orphans", "--json"], more].concat()))
        };
        let reported: Vec<Value> = list(&[])
            .iter()
            .map(|l| json!([l["number"], l["subscriber"], l["kind"], l["reason"]]))
            .collect();
        let expected = json!([
            [1, "gone", "batch", "expired"],
            [2, "b", "batch", "expired"],
            [3, "gone", "batch", "expired"],
            [4, null, "event", "invalid_event"]
        ]);
        assert_eq!(json!(reported), expected);
        assert_eq!(ids(&list(&["gone"])), ["msg_1", "msg_3"]);
        assert_eq!(ids(&list(&["@2"])), ["msg_2"]);
        assert_eq!(ids(&list(&["gone", "msg_3"])), ["msg_3"]);
        assert!(
            setup
                .ok(&["dead", "list", "--orphans"])
                .lines()
                .nth(1)
                .expect("a line")
                .contains(" gone ")
        );
        let shown = setup.ok(&["dead", "show", "--orphans", "msg_1"]);
        assert!(
            shown.contains("subscriber        gone\n")
                && shown.contains("the retry queue of `gone` did not exist"),
            "{shown}"
        );
        assert!(setup.ok(&["dead", "show", "gone", "@3", "--orphans"]).contains("msg_3"));
        assert_eq!(
            lines(&setup.ok(&["dead", "export", "--orphans", "b"]))[0]["body"],
            String::from_utf8_lossy(body).into_owned()
        );

        let output = setup.run(&["dead", "replay", "--orphans"]);
        let (out, err) =
            (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(
            out.contains("queued 1 of 4 orphans, skipped 3") && output.status.success(),
            "{out}{err}"
        );
        for part in [
            "`msg_1` is not replayed: its subscriber has no retry queue",
            "`msg_3` is not",
            "`@4` is not replayed: it is no batch",
        ] {
            assert!(err.contains(part), "{part} is not in {err}");
        }
        let moved = broker.take("sub.b.retry").await.expect("it went back");
        assert_eq!(
            (&moved.data[..], moved.properties.message_id().as_ref().map(|id| id.as_str())),
            (&body[..], Some("msg_2"))
        );
        assert_eq!(list(&[]).len(), 3, "the others stay, in their order");
        assert!(
            setup
                .ok(&["dead", "purge", "gone", "--orphans", "--yes"])
                .contains("purged 2 of 3 orphans of `gone`")
        );
        assert_eq!(list(&[]).len(), 1);
    });
}

#[test]
fn the_embedded_queue_without_orphans_says_so() {
    run(async {
        let queue = Queue::embedded();
        let setup = asleep(&queue).await;
        for (command, of) in
            [("list", "--orphans"), ("list", "@log"), ("export", "@log"), ("replay", "@log")]
        {
            let output = setup.run(&["dead", command, of]);
            assert!(output.status.success(), "{command}: {output:?}");
        }
        assert_eq!(setup.ok(&["dead", "list", "@log"]), "no orphans\n");
        assert_eq!(
            setup.run(&["dead", "show", "@log", "@1"]).status.code(),
            Some(1),
            "what was named is not there"
        );
    });
}

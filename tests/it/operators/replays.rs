//! What hooktrail remembers is sent again: replays of a time, and single batches.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use serde_json::{Value, json};

use super::history::{admin, asked, remembering, wait_for_events};
use crate::support::{
    api::Api,
    daemon::{QUICK, Setup, subscriber},
    eventually,
    impostor::{Impostor, introduction},
    queue::{Queue, on_both_queues},
    receiver::{Receiver, Request, event, status},
    run,
};

on_both_queues!(
    a_replay_sends_the_events_of_its_time_again_also_over_a_kill,
    a_resent_batch_has_the_same_id_and_the_same_bytes,
    a_cancelled_replay_goes_on_where_it_was_and_operations_are_listed,
);

const TYPE: &str = "activity_log.user.updated";

/// Small batches, one after the other.
const SMALL: &str = "batch.max_events = 3\nhttp.concurrency = 1";

fn is_replay(request: &Request) -> bool {
    request.header("x-hooktrail-replay") == "true"
}

/// The numbers of the events in these requests, by the id of the batch.
fn by_id(requests: &[Request]) -> BTreeMap<String, Vec<u64>> {
    let mut all = BTreeMap::new();
    for request in requests.iter().filter(|r| is_replay(r)) {
        let numbers = request.numbers();
        let before = all.insert(request.id().to_owned(), numbers.clone());
        assert!(before.is_none_or(|before| before == numbers), "one id, one body");
    }
    all
}

fn now() -> String {
    humantime::format_rfc3339_millis(std::time::SystemTime::now()).to_string()
}

async fn wait_for_state(setup: &Setup, id: &str, state: &str) -> Value {
    let mut found = Value::Null;
    eventually(&format!("replay {id} is {state}"), async || {
        let list = asked(setup, &["replay", "list", "--json"]);
        let all = list["replays"].as_array().cloned().unwrap_or_default();
        found = all.into_iter().find(|r| r["id"] == id).unwrap_or_default();
        found["state"] == state
    })
    .await;
    found
}

async fn a_replay_sends_the_events_of_its_time_again_also_over_a_kill(queue: Queue) {
    let api = Api::new();
    let receiver = Receiver::accepting().await;
    let setup = Setup::new(
        &queue,
        &(QUICK.to_owned() + &subscriber("a", &receiver.url, SMALL) + &admin(&api)),
    );
    let daemon = remembering(&queue, &setup).await;
    for n in 0..6 {
        queue.publish_as(&format!("old-{n}"), TYPE, event(n).as_bytes()).await;
    }
    wait_for_events(&setup, 6).await;
    let since = now();
    for n in 6..66 {
        queue.publish_as(&format!("new-{n}"), TYPE, event(n).as_bytes()).await;
    }
    receiver.wait_all(66).await;
    wait_for_events(&setup, 66).await;
    let dry = asked(&setup, &["replay", "a", "--since", &since, "--dry-run", "--json"]);
    assert_eq!((&dry["events"], &dry["complete"]), (&60.into(), &true.into()), "{dry}");
    assert!(receiver.take_requests().iter().all(|r| !is_replay(r)));

    receiver.now(|_, _| status(200).after(Duration::from_millis(100)));
    let made = asked(&setup, &["replay", "a", "--since", &since, "--yes", "--json"]);
    let id = made["id"].as_str().expect("an id").to_owned();
    receiver.wait_requests(5).await;
    daemon.kill();
    let _daemon = setup.start().await;
    let done = wait_for_state(&setup, &id, "done").await;
    assert_eq!((&done["enqueued"], &done["missing"]), (&60.into(), &0.into()), "{done}");
    let expected: Vec<u64> = (6..66).collect();
    eventually("all have come again", async || {
        let sent: BTreeSet<u64> = by_id(&receiver.requests()).into_values().flatten().collect();
        sent.len() == expected.len()
    })
    .await;
    let batches = by_id(&receiver.requests());
    let mut sent: Vec<u64> = batches.values().flatten().copied().collect();
    sent.sort_unstable();
    assert_eq!(sent, expected, "each in one batch, and nothing else");
    assert_eq!(batches.len(), 20);
}

async fn a_resent_batch_has_the_same_id_and_the_same_bytes(queue: Queue) {
    let api = Api::new();
    let receiver = Receiver::accepting().await;
    let lines = "format = \"jsonl\"\nevent_ids = true";
    let setup = Setup::new(
        &queue,
        &(QUICK.to_owned() + &subscriber("a", &receiver.url, lines) + &admin(&api)),
    );
    let _daemon = remembering(&queue, &setup).await;
    for n in 0..4 {
        let body = event(n).replace("{\"event\"", "{ \n\"event\"");
        queue.publish_as(&format!("id-{n}"), TYPE, body.as_bytes()).await;
    }
    receiver.wait_all(4).await;
    wait_for_events(&setup, 4).await;
    let first = receiver.take_requests().remove(0);
    eventually("the delivery is known", async || {
        let found = asked(&setup, &["deliveries", "a", "--json", "--state", "delivered"]);
        let all = found["deliveries"].as_array().cloned().unwrap_or_default();
        all.iter().any(|d| d["id"] == first.id())
    })
    .await;
    let said = setup.ok(&["resend", first.id()]);
    assert!(said.contains("A receiver that remembers ids ignores it."), "{said}");
    let again = receiver.wait_requests(1).await.remove(0);
    assert_eq!((again.id(), &again.body), (first.id(), &first.body));
    assert!(!is_replay(&first) && is_replay(&again));
    let output = setup.run(&["resend", "msg_unknown"]);
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.code() == Some(1) && text.contains("no delivery"), "{text}");
}

async fn a_cancelled_replay_goes_on_where_it_was_and_operations_are_listed(queue: Queue) {
    let api = Api::new();
    let receiver = Receiver::accepting().await;
    let setup = Setup::new(
        &queue,
        &(QUICK.to_owned() + &subscriber("a", &receiver.url, SMALL) + &admin(&api)),
    );
    let _daemon = remembering(&queue, &setup).await;
    for n in 0..60 {
        queue.publish_as(&format!("id-{n}"), TYPE, event(n).as_bytes()).await;
    }
    receiver.wait_all(60).await;
    wait_for_events(&setup, 60).await;
    receiver.take_requests();
    setup.ok(&["pause", "a"]);
    let made = asked(&setup, &["replay", "a", "--since", "1h", "--rate", "600", "--yes", "--json"]);
    let id = made["id"].as_str().expect("an id").to_owned();
    setup.ok(&["replay", "cancel", &id]);
    let output = setup.run(&["replay", "cancel", &id]);
    assert_eq!(output.status.code(), Some(1), "it is cancelled");
    setup.ok(&["resume", "a"]);
    assert_eq!(wait_for_state(&setup, &id, "cancelled").await["enqueued"], 0);
    let said = setup.ok(&["replay", "continue", &id]);
    assert!(said.contains("running"), "{said}");
    let done = wait_for_state(&setup, &id, "done").await;
    assert_eq!(done["enqueued"], 60);
    eventually("all have come again", async || {
        by_id(&receiver.requests()).into_values().flatten().count() == 60
    })
    .await;
    eventually("history has what became of its batches", async || {
        let done = wait_for_state(&setup, &id, "done").await;
        done["outcome"]["delivered"] == done["batches"]
    })
    .await;
    let list = setup.ok(&["replay", "list"]);
    assert!(list.contains(&format!("{} delivered", done["batches"])), "{list}");

    let token = format!("Bearer {}", super::history::TOKEN);
    let get = async |path: &str| api.send("GET", path, &[("authorization", &token)], "").await;
    let mut whats = Vec::new();
    eventually("the operations are recorded", async || {
        let found = get("/api/v1/operations").await.json();
        let all = found["operations"].as_array().cloned().unwrap_or_default();
        assert!(all.iter().all(|o| o["by"] == "token"), "{found}");
        whats = all.iter().map(|o| o["what"].as_str().unwrap_or_default().to_owned()).collect();
        whats.len() == 5
    })
    .await;
    whats.sort_unstable();
    assert_eq!(whats, ["cancel_replay", "continue_replay", "pause", "replay", "resume"]);
    assert_eq!(api.get("/api/v1/operations").await.status, 401);
    for (arguments, part) in [
        (&["replay", "a"][..], "--since is required"),
        (&["replay", "a", "--since", "1h"], "use --yes"),
        (&["replay", "a", "--since", "1h", "--rate", "0"], "--rate"),
    ] {
        let output = setup.run(arguments);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(2) && text.contains(part), "{arguments:?}: {text}");
    }
}

#[test]
fn a_request_that_is_sent_again_makes_no_second_replay_and_no_more_than_ten_run() {
    run(async {
        let api = Api::new();
        let receiver = Receiver::accepting().await;
        let setup = Setup::with_text(
            &("[queue]\nurl = \"embedded\"\ndata_dir = \"data\"\n".to_owned()
                + QUICK
                + &subscriber("a", &receiver.url, "")
                + &subscriber("b", &receiver.url, "")
                + &admin(&api)),
        );
        let daemon = setup.start().await;
        let token = format!("Bearer {}", super::history::TOKEN);
        let json = ("content-type", "application/json");
        eventually("the store is open", async || setup.run(&["replay", "list"]).status.success())
            .await;
        setup.ok(&["pause", "a"]);
        setup.ok(&["pause", "b"]);
        let ask = async |name: &str, key: &str, body: &str| {
            let headers = [("authorization", token.as_str()), json, ("idempotency-key", key)];
            api.send("POST", &format!("/api/v1/subscribers/{name}/replay"), &headers, body).await
        };
        let since = r#"{"since":"2026-01-01T00:00:00Z","rate":5}"#;
        let first = ask("a", "\"key-1\"", since).await;
        assert_eq!((first.status, first.header("idempotent-replayed")), (202, ""), "{first:?}");
        let again = r#"{ "rate": 5, "since": "2026-01-01T00:00:00.000Z" }"#;
        for key in ["\"key-1\"", "key-1"] {
            let again = ask("a", key, again).await;
            assert_eq!((again.status, again.header("idempotent-replayed")), (202, "true"));
            assert_eq!(again.text, first.text, "the first one's answer");
        }
        for (name, body) in [("a", r#"{"since":"2026-01-01T00:00:00Z"}"#), ("b", since)] {
            let other = ask(name, "key-1", body).await;
            assert_eq!(other.status, 422, "{other:?}");
            assert_eq!(other.json()["type"], "/problems/idempotency-key");
        }
        let future = ask("a", "key-0", r#"{"since":"2999-01-01T00:00:00Z"}"#).await;
        assert_eq!((future.status, &future.json()["field"]), (400, &"since".into()), "{future:?}");
        let zoned = r#"{"since":"2026-01-31T12:00:00+02:00","dry_run":true}"#;
        assert_eq!(ask("a", "key-0", zoned).await.status, 200);
        let long = "x".repeat(256);
        for key in ["", "\"", "\"\"", "a\"b", "\"a", "back\\slash", &long] {
            let wrong = ask("a", key, since).await;
            assert_eq!((wrong.status, &wrong.json()["field"]), (400, &"Idempotency-Key".into()));
        }
        let all = asked(&setup, &["replay", "list", "--json"]);
        assert_eq!(all["replays"].as_array().map(Vec::len), Some(1), "{all}");
        let id = first.json()["id"].as_str().expect("an id").to_owned();

        for n in 2..=10 {
            assert_eq!(ask("b", &format!("key-{n}"), since).await.status, 202, "{n}");
        }
        let refused = ask("b", "key-11", since).await;
        let why = refused.json()["detail"].as_str().unwrap_or_default().to_owned();
        assert_eq!(refused.status, 409, "{refused:?}");
        let remedy = "one with `hooktrail replay cancel ID`";
        assert!(why.contains(&format!("{id} to `a`")) && why.ends_with(remedy), "{why}");
        assert_eq!(why.matches("rpl_").count(), 10, "{why}");
        let output = setup.run(&["replay", "b", "--since", "1h", "--yes"]);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(1) && text.contains(remedy), "{text}");
        assert_eq!(ask("a", "key-1", since).await.text, first.text, "it is no eleventh");
        setup.ok(&["replay", "cancel", &id]);
        assert_eq!(ask("b", "key-11", since).await.status, 202, "a refused one kept no key");
        let output = setup.run(&["replay", "continue", &id]);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(1) && text.contains(remedy), "{text}");

        daemon.stop().await;
        let file = setup.config().with_file_name("data").join("store.db");
        let file = rusqlite::Connection::open(file).expect("opens");
        let sql = "UPDATE replay SET ordered = '{}' WHERE subscriber = 'b' AND state = 'running'";
        assert_eq!(file.execute(sql, []).expect("writes"), 10);
        drop(file);
        let daemon = setup.start().await;
        let mut list = Value::Null;
        eventually("the list of replays", async || {
            let output = setup.run(&["replay", "list", "--json"]);
            list = serde_json::from_slice(&output.stdout).unwrap_or_default();
            output.status.success()
        })
        .await;
        let one = &list["replays"][0];
        assert_eq!((&one["state"], &one["since"]), (&"unreadable".into(), &Value::Null), "{one}");
        let unreadable = one["id"].as_str().expect("an id");
        let remedy = format!("`hooktrail replay cancel {unreadable}` ends it");
        assert!(setup.ok(&["replay", "list"]).contains(&remedy));
        eventually("the log says it", async || daemon.log().contains(&remedy)).await;
        let output = setup.run(&["replay", "continue", unreadable]);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(1) && text.contains("is unreadable"), "{text}");
        setup.ok(&["replay", "cancel", unreadable]);
        assert_eq!(wait_for_state(&setup, unreadable, "cancelled").await["enqueued"], 0);
        setup.ok(&["replay", "continue", &id]);
        setup.ok(&["resume", "a"]);
        wait_for_state(&setup, &id, "done").await;
    });
}

#[test]
fn a_lost_answer_is_asked_for_again_with_the_same_key() {
    run(async {
        let files = tempfile::tempdir().expect("a directory");
        let path = files.path().join("hooktrail.toml");
        let preview = json!({
            "subscriber": "a", "events": 1, "complete": true,
            "history": { "events_from": null, "deliveries_from": null, "why": "", "last_event_at": null, "gaps": [] }
        });
        let at = "2026-01-01T00:00:00Z";
        let made = json!({
            "id": "rpl_1", "subscriber": "a", "state": "running", "why": null, "by": "token", "created_at": at, "changed_at": at,
            "since": at, "until": null, "events": null, "rate": null, "rows": 0, "read": 0, "matched": 0, "enqueued": 0,
            "unusable": 0, "batches": 0,
            "outcome": { "delivered": 0, "dead": 0, "split": 0, "retrying": 0, "waiting": 0, "unknown": 0 }, "missing": 0, "start_from": false
        });
        for lost in [1, 3] {
            let (config, preview, made) = (path.clone(), preview.clone(), made.clone());
            let mut left = lost;
            let daemon = Impostor::start(move |head, port| {
                if head.starts_with("GET /api/v1/daemon ") {
                    (200, introduction(head, port, &config, super::history::TOKEN))
                } else if !head.contains("idempotency-key: ") {
                    (200, preview.clone())
                } else if left > 0 {
                    left -= 1;
                    (0, Value::Null)
                } else {
                    (202, made.clone())
                }
            });
            let text = format!(
                "[queue]\nurl = \"embedded\"\n[admin]\nlisten = \"{}\"\ntoken = \"{}\"\n{}",
                daemon.address(),
                super::history::TOKEN,
                subscriber("a", "https://example.com/", "")
            );
            std::fs::write(&path, text).expect("writes");
            let output = std::process::Command::new(env!("CARGO_BIN_EXE_hooktrail"))
                .args(["replay", "a", "--since", "1h", "--yes", "--config"])
                .arg(&path)
                .output()
                .expect("runs");
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            let is_known = lost < 3;
            assert_eq!(output.status.success(), is_known, "{said}");
            assert!(is_known || said.contains("see `hooktrail replay list`"), "{said}");
            let heads = daemon.asked();
            let keys: Vec<&str> = heads
                .iter()
                .filter_map(|head| head.lines().find(|l| l.starts_with("idempotency-key: ")))
                .collect();
            assert!(
                keys.len() == lost.min(2) + 1 && keys.iter().all(|k| *k == keys[0]),
                "{keys:?}"
            );
        }
    });
}

//! What hooktrail remembers, as an operator asks for it: on both queues, over the daemon and without
//! one.

use serde_json::{Value, json};

use crate::support::{
    api::Api,
    daemon::{Daemon, QUICK, SLOW, Setup, subscriber},
    eventually,
    queue::{Queue, on_both_queues},
    receiver::{Receiver, event, status},
    run,
};

on_both_queues!(
    an_event_is_found_and_said_where_it_went,
    whatever_an_event_is_made_of_it_is_kept_and_found_by_what_it_has,
);

const TYPE: &str = "activity_log.user.updated";

pub(super) const TOKEN: &str = "the-token-of-the-tests";

pub(crate) fn admin(api: &Api) -> String {
    format!("{}token = \"{TOKEN}\"\n", api.section())
}

/// A daemon whose history gets each event that is published from now on.
pub(crate) async fn remembering(queue: &Queue, setup: &Setup) -> Daemon {
    let daemon = setup.start().await;
    if matches!(queue, Queue::Amqp(_)) {
        eventually("history gets events", async || {
            daemon.log().contains("every event goes into history")
        })
        .await;
    }
    eventually("the store is open", async || {
        setup.run(&["history", "--limit", "1"]).status.success()
    })
    .await;
    daemon
}

pub(super) fn asked(setup: &Setup, arguments: &[&str]) -> Value {
    let text = setup.ok(arguments);
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{arguments:?}: {e}: {text}"))
}

/// The answer of `where`, and whether its exit code was 0.
fn whereabouts(setup: &Setup, id: &str) -> (Value, bool) {
    let output = setup.run(&["where", id, "--json"]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let answer = serde_json::from_str(&text).unwrap_or_else(|e| {
        panic!("where {id}: {e}: {text}{}", String::from_utf8_lossy(&output.stderr))
    });
    assert!(matches!(output.status.code(), Some(0 | 1)), "{output:?}");
    (answer, output.status.success())
}

/// The state of each subscriber for an event that is there once.
fn states(answer: &Value) -> Vec<(String, String)> {
    let went = answer["events"][0]["where"].as_array().into_iter().flatten();
    let text = |w: &Value, key: &str| w[key].as_str().unwrap_or_default().to_owned();
    went.map(|w| (text(w, "subscriber"), text(w, "state"))).collect()
}

pub(super) async fn wait_for_events(setup: &Setup, number: usize) -> Vec<Value> {
    let mut events = Vec::new();
    eventually(&format!("{number} events are in history"), async || {
        let found = asked(setup, &["history", "--json", "--limit", "500"]);
        events = found["events"].as_array().expect("events").clone();
        events.len() >= number
    })
    .await;
    assert_eq!(events.len(), number);
    events
}

async fn wait_for_states(setup: &Setup, id: &str, expected: &[(&str, &str)]) -> Value {
    let mut last = Value::Null;
    eventually(&format!("{id} is {expected:?}"), async || {
        last = whereabouts(setup, id).0;
        let found = states(&last);
        let found: Vec<(&str, &str)> = found.iter().map(|(a, b)| (&**a, &**b)).collect();
        found == expected
    })
    .await;
    last
}

async fn an_event_is_found_and_said_where_it_went(queue: Queue) {
    let api = Api::new();
    let good = Receiver::accepting().await;
    let bad = Receiver::start(|_, _| status(503).body("out of order")).await;
    let setup = Setup::new(
        &queue,
        &(SLOW.to_owned()
            + &subscriber("bad", &bad.url, "")
            + &subscriber("good", &good.url, "")
            + &subscriber("off", &good.url, "")
            + &subscriber("picky", &good.url, "events = [\"report.*\"]")
            + &admin(&api)),
    );
    let daemon = remembering(&queue, &setup).await;
    setup.ok(&["pause", "off", "--why", "a test"]);
    for n in 0..3 {
        queue.publish_as(&format!("evt/{n} ä"), TYPE, event(n).as_bytes()).await;
    }
    let events = wait_for_events(&setup, 3).await;
    let numbers: Vec<i64> =
        events.iter().map(|e| e["number"].as_i64().expect("a number")).collect();
    assert!(numbers.is_sorted_by(|a, b| a > b), "newest first: {numbers:?}");
    assert_eq!(events[0]["message_id"], "evt/2 ä");
    assert_eq!(events[0]["actor"], json!({ "id": "783", "type": "user", "name": "Jane Doe" }));
    // On RabbitMQ it is not known whether an event still waits.
    let waits = if matches!(queue, Queue::Embedded(_)) { "waiting" } else { "unknown" };
    let expected =
        [("bad", "retrying"), ("good", "delivered"), ("off", waits), ("picky", "not_matched")];
    let answer = wait_for_states(&setup, "evt/1 ä", &expected).await;
    assert_eq!(answer["delivered"], false);
    if matches!(queue, Queue::Amqp(_)) {
        let among =
            "3 events wait in the queue, and it may be among them; the subscriber is paused";
        eventually("its queue is counted", async || {
            let (answer, _) = whereabouts(&setup, "evt/1 ä");
            let why = answer["events"][0]["where"][2]["why"].as_str().map(str::to_owned);
            why.is_some_and(|why| why.ends_with(among))
        })
        .await;
    }
    let went = &answer["events"][0]["where"];
    let sent = good.requests().into_iter().find(|r| r.events()[0]["n"] == 1).expect("sent");
    assert_eq!(went[1]["batch"], sent.id(), "the receiver's own record says the same");
    assert_eq!((&went[1]["status"], &went[1]["attempt"]), (&json!(200), &json!(1)));
    assert_eq!((&went[0]["status"], &went[0]["failure"]), (&json!(503), &json!("status")));
    assert_eq!(went[3]["patterns"], json!(["report.*"]));
    let (by_number, arrived) = whereabouts(&setup, &numbers[1].to_string());
    assert_eq!((by_number["events"][0]["id"].as_str(), arrived), (Some("evt/1 ä"), false));
    let text = String::from_utf8(setup.run(&["where", "evt/1 ä"]).stdout).expect("text");
    assert!(text.contains("retrying") && text.contains("matches no pattern of 1 other"), "{text}");

    for (arguments, expected) in [
        (&["good"][..], 3),
        (&["good", "--state", "retrying"], 0),
        (&["--state", "delivered"], 3),
        (&["good", "--since", "1h"], 3),
        (&["good", "--until", "1h"], 0),
        (&["good", "--limit", "2"], 2),
        (&["bad", "--state", "retrying"], 3),
    ] {
        // The other two events may be on their way still.
        eventually(&format!("{arguments:?}: {expected}"), async || {
            let found = asked(&setup, &[&["deliveries", "--json"], arguments].concat());
            found["deliveries"].as_array().map(Vec::len) == Some(expected)
        })
        .await;
    }
    let found = asked(&setup, &["deliveries", "bad", "--state", "retrying", "--json"]);
    let id = found["deliveries"][0]["id"].as_str().expect("an id").to_owned();
    let shown = asked(&setup, &["deliveries", "show", &id, "--json"]);
    assert_eq!(shown["attempts"][0]["excerpt"], "out of order");
    assert_eq!(shown["events"], 1);

    bad.now(|_, _| status(200));
    setup.ok(&["retry", "now", "bad"]);
    setup.ok(&["resume", "off"]);
    let all = [("bad", "delivered"), ("good", "delivered"), ("off", "delivered"), expected[3]];
    wait_for_states(&setup, "evt/1 ä", &all).await;
    assert!(whereabouts(&setup, "evt/1 ä").1, "exit code 0: each that was to get it has it");

    for (arguments, expected) in [
        (&["--type", "activity_log.#"][..], 3),
        (&["--type", "report.*"], 0),
        (&["--actor", "783"], 3),
        (&["--actor", "Jane Doe"], 3),
        (&["--actor", "jane doe"], 0),
        (&["--resource", "2"], 1),
        (&["--text", "JOHN doe 1th"], 1),
        (&["--text", "profi"], 3),
        (&["--text", "\"profile\" OR x"], 0),
        (&["--id", "evt/0 ä"], 1),
        (&["--since", "1h"], 3),
        (&["--until", "1h"], 0),
        (&["--by", "event-time", "--since", "2024-12-09", "--until", "2024-12-10"], 3),
        (&["--limit", "2"], 2),
    ] {
        let found = asked(&setup, &[&["history", "--json"], arguments].concat());
        let events = found["events"].as_array().expect("events");
        assert_eq!(events.len(), expected, "{arguments:?}: {found}");
    }
    let csv = setup.ok(&["history", "--csv", "--limit", "1"]);
    assert!(
        csv.lines().count() == 2 && csv.contains(",evt/2 ä,1733739084,783,user,Jane Doe,"),
        "{csv}"
    );

    let refused = api.get("/api/v1/events").await;
    assert_eq!(refused.status, 401);
    let token = format!("Bearer {TOKEN}");
    let one = api.send("GET", "/api/v1/events?limit=1", &[("authorization", &token)], "").await;
    let next = one.json()["next"].as_str().expect("there are more").to_owned();
    let path = format!("/api/v1/events?limit=2&cursor={next}");
    let rest = api.send("GET", &path, &[("authorization", &token)], "").await.json();
    assert_eq!(rest["events"].as_array().map(Vec::len), Some(2));
    assert_eq!(rest["next"], Value::Null);

    daemon.stop().await;
    let events = wait_for_events(&setup, 3).await;
    assert_eq!(events[0]["message_id"], "evt/2 ä", "without a daemon the files are read");
    assert!(whereabouts(&setup, "evt/1 ä").1);
    let (none, arrived) = whereabouts(&setup, "no such event");
    assert_eq!((none["events"].as_array().map(Vec::len), arrived), (Some(0), false));
}

async fn whatever_an_event_is_made_of_it_is_kept_and_found_by_what_it_has(queue: Queue) {
    let receiver = Receiver::accepting().await;
    let api = Api::new();
    let setup = Setup::new(
        &queue,
        &(QUICK.to_owned() + &subscriber("a", &receiver.url, "") + &admin(&api)),
    );
    let _daemon = remembering(&queue, &setup).await;
    let bodies = [
        r#"{"event":"t","actor":"root","timestamp":1.5}"#,
        r#"{"event":"t","timestamp":"2024-12-09T12:00:00Z","resource":{"id":7}}"#,
        r#"{"event":"t","timestamp":1000000000000000000,"actor":{"id":{"a":1}}}"#,
        r#"{"event":"t","twin":true}"#,
        r#"{"event":"t","twin":true}"#,
        r#"{"event":"t"}"#,
        r#"{"event":"t","description":"=1+1 😀 <script>"}"#,
        "no JSON at all",
        r#"{"event":"t","actor":{"id":"o'brien\" OR 1=1 --","name":"a_b%*"}}"#,
    ];
    for (n, body) in bodies.iter().enumerate() {
        // Two different events share an id.
        let id = if n < 2 { "shared".to_owned() } else { format!("id-{n}") };
        queue.publish_as(&id, "t", body.as_bytes()).await;
    }
    wait_for_events(&setup, bodies.len()).await;
    for (arguments, expected) in [
        (&["--actor", "root"][..], 1),
        (&["--resource", "7"], 1),
        (&["--actor", r#"{"a":1}"#], 1),
        (&["--text", "twin true"], 0),
        (&["--id", "shared"], 2),
        (&["--id", "id-3"], 1),
        (&["--text", "script"], 1),
        (&["--actor", "o'brien\" OR 1=1 --"], 1),
        (&["--actor", "a_b%*"], 1),
        (&["--actor", "a_b%"], 0),
        (&["--text", "NEAR(a b) AND brien*"], 0),
        (&["--text", "brien"], 1),
        (&["--by", "event-time", "--since", "2024-12-09", "--until", "2024-12-10"], 1),
        (&["--by", "event-time", "--since", "1970-01-01", "--until", "1970-01-02"], 1),
    ] {
        let found = asked(&setup, &[&["history", "--json"], arguments].concat());
        let events = found["events"].as_array().expect("events");
        assert_eq!(events.len(), expected, "{arguments:?}: {found}");
    }
    let (shared, _) = whereabouts(&setup, "shared");
    assert_eq!(shared["events"].as_array().map(Vec::len), Some(2));
    // An event that can never be delivered is dead, and `where` says why.
    wait_for_states(&setup, "id-7", &[("a", "dead")]).await;
    let (dead, arrived) = whereabouts(&setup, "id-7");
    assert_eq!(dead["events"][0]["where"][0]["reason"], "invalid_event");
    assert_eq!(dead["events"][0]["body"], "no JSON at all");
    assert!(!arrived);
    let csv = setup.ok(&["history", "--csv", "--text", "script"]);
    assert!(csv.contains("\"'=1+1 😀 <script>\""), "no spreadsheet runs it: {csv}");
}

#[test]
fn a_question_that_cannot_be_meant_is_a_matter_of_usage() {
    run(async {
        let api = Api::new();
        let setup = Setup::with_text(&format!(
            "[queue]\nurl = \"embedded\"\ndata_dir = \"data\"\n{}",
            admin(&api)
        ));
        let daemon = setup.start().await;
        let long = "x".repeat(10 * 1024);
        for (arguments, part) in [
            (&["history", "--since", "last tuesday"][..], "is not a time"),
            (&["history", "--since", "2999-01-01"], "is yet to come"),
            (&["history", "--since", "1h", "--until", "2h"], "is not after --since"),
            (&["history", "--text", "!!! 😀"], "no word to search for"),
            (&["history", "--limit", "0"], "0 is not in 1..=100000"),
            (&["history", "--type", ""], "--type"),
            (&["history", "--json", "--csv"], "cannot be used with"),
            (&["deliveries", "--state", "lost"], "in_flight"),
            (&["history", "--actor", ""], "--actor"),
            (&["where", ""], "ID"),
        ] {
            let output = setup.run(arguments);
            let text = String::from_utf8_lossy(&output.stderr).into_owned();
            assert_eq!(output.status.code(), Some(2), "{arguments:?}: {text}");
            assert!(text.contains(part), "{arguments:?}: {text}");
        }
        let found = asked(&setup, &["history", "--json", "--text", &long]);
        assert_eq!(found["events"], json!([]));
        let output = setup.run(&["deliveries", "show", "msg/../x?y"]);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(1) && text.contains("has no delivery"), "{text}");
        for (arguments, part) in [
            (&["resend", "a/../../reload"][..], "has no delivery"),
            (&["replay", "cancel", "a/b"], "there is no replay"),
            (
                &["replay", "x/../../reload", "--since", "1h", "--dry-run"],
                "no subscriber of that name",
            ),
        ] {
            let output = setup.run(arguments);
            let text = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(
                output.status.code() == Some(1) && text.contains(part),
                "{arguments:?}: {text}"
            );
        }
        let token = format!("Bearer {TOKEN}");
        let zoned = "/api/v1/events?since=2026-01-31T12:00:00%2B02:00";
        assert_eq!(api.send("GET", zoned, &[("authorization", &token)], "").await.status, 200);
        for (query, field) in [
            ("limit=0", "limit"),
            ("limit=501", "limit"),
            ("cursor=garbage", "cursor"),
            ("since=yesterday", "since"),
            ("text=%21%21", "text"),
            ("actor=", "actor"),
            ("by=luck", "by"),
            ("color=red", "color"),
        ] {
            let path = format!("/api/v1/events?{query}");
            let answer = api.send("GET", &path, &[("authorization", &token)], "").await;
            assert_eq!(answer.status, 400, "{query}: {answer:?}");
            assert_eq!(answer.content_type, "application/problem+json");
            assert_eq!(answer.json()["field"], field, "{query}");
        }
        for path in ["/api/v1/events/x", "/api/v1/events/-1", "/api/v1/events/1e3"] {
            let answer = api.send("GET", path, &[("authorization", &token)], "").await;
            assert_eq!((answer.status, &answer.json()["field"]), (400, &json!("number")), "{path}");
        }
        let answer = api.send("GET", "/api/v1/events/7", &[("authorization", &token)], "").await;
        assert_eq!(answer.status, 404);
        daemon.stop().await;
    });
}

#[test]
fn with_history_off_nothing_is_remembered_and_that_is_said() {
    run(async {
        let api = Api::new();
        for (off, said) in [
            ("[store]\nurl = \"none\"\n", "nothing is remembered"),
            ("[history]\nretention = \"0s\"\n", "no history is kept"),
        ] {
            let setup = Setup::with_text(&format!(
                "[queue]\nurl = \"embedded\"\ndata_dir = \"data\"\n{off}{}",
                admin(&api)
            ));
            let daemon = setup.start().await;
            let output = setup.run(&["history"]);
            let text = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(
                output.status.code() == Some(1) && text.contains("503") && text.contains(said),
                "{text}"
            );
            daemon.stop().await;
            let output = setup.run(&["history"]);
            let text = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(
                output.status.code() == Some(2) && text.contains("nothing is remembered"),
                "{text}"
            );
            let data = setup.config().with_file_name("data");
            assert!(!data.join("history.db").exists());
        }
    });
}

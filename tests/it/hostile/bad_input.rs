//! Bad input at its worst: what `input` and `hostile` leave out. There each kind of bad input has
//! its own test; here they come in numbers, at the limits, and disguised as something sound.

use std::time::{Duration, Instant};

use lapin::{
    BasicProperties,
    options::{QueueDeclareOptions, QueueDeleteOptions},
    types::{AMQPValue, FieldTable},
};
use serde_json::Value;

use crate::support::{
    api::Api,
    broker::{Broker, headers, text},
    daemon::{Daemon, QUICK, SECRET, Setup, subscriber},
    eventually,
    queue::{Queue, Section as _, on_both_queues},
    raw::{Raw, always, deaf, flood, plain},
    receiver::{Receiver, event, status},
    run, tests_that_need,
};

on_both_queues!(
    bad_events_in_numbers_leave_the_good_ones_their_order_and_the_daemon_its_size,
    a_dozen_hostile_receivers_at_once_hurt_neither_the_good_one_nor_the_daemon,
    an_answer_without_a_request_is_not_taken_for_that_of_the_next_request,
    the_text_of_an_answer_is_in_the_dead_letter_on_one_line_and_not_in_the_log,
    a_name_of_this_machine_is_blocked_before_any_connection_and_its_batch_waits,
    userinfo_of_a_url_is_sent_decoded_and_no_failure_shows_it,
);

tests_that_need!(
    broker:
    every_dead_letter_can_be_listed_and_shown_whatever_its_bytes,
    an_event_may_carry_any_properties_and_they_change_nothing,
    large_messages_are_taken_a_few_at_a_time,
    large_messages_of_a_source_queue_are_relayed_a_few_at_a_time,
    a_batch_that_counts_more_events_than_its_body_holds_is_given_up_as_a_single_event_is,
    an_envelope_at_its_limits_is_sent_and_one_beyond_them_is_a_dead_letter_that_names_the_header,
    orphans_stay_until_their_subscriber_is_back_and_junk_among_them_hurts_no_subscriber,
);

/// Far above what a debug build needs, far below what the inputs here would take if they were kept.
const MOST_MIB: f64 = 150.0;

fn assert_bounded(daemon: &Daemon) {
    let peak = daemon.peak_mib();
    assert!(peak < MOST_MIB, "the daemon had {peak:.0} MiB");
}

// ---- Configuration

#[test]
fn a_name_or_url_that_cannot_be_is_a_config_error_at_its_place_and_never_shows_its_password() {
    let long = "x".repeat(65);
    let name = |value: &str| {
        (
            format!("name = \"{value}\"\nurl = \"https://example.com/\""),
            4,
            "subscriber[0].name",
            "a-z, 0-9",
        )
    };
    let url = |value: &str, part: &'static str| {
        (format!("name = \"a\"\nurl = \"{value}\""), 5, "subscriber[a].url", part)
    };
    let cases = [
        name("a.b"),
        name("a b"),
        name(" a"),
        name("A"),
        name(""),
        name("\u{e9}"),
        name("a#"),
        name(&long),
        url("https://127.0.0.1/", "loopback"),
        // The same address in the spellings that a URL allows.
        url("https://2130706433/", "loopback"),
        url("https://0x7f.1/", "loopback"),
        url("https://[::1]/", "loopback"),
        url("https://[::ffff:127.0.0.1]/", "loopback"),
        url("https://10.1.2.3/", "private"),
        url("https://someone:hunter2@192.168.1.1/hunter2", "private"),
        url("https://169.254.169.254/latest/meta-data", "link-local"),
        url("https://[64:ff9b::a00:1]/", "private"),
        url("http://example.com/", "allow_http"),
        url("http://someone:hunter2@example.com/hunter2", "allow_http"),
        url("ftp://someone:hunter2@example.com/hunter2", "http"),
        url("example.com/hook", "URL"),
        url("", "URL"),
    ];
    for (lines, line, key, part) in cases {
        let setup = Setup::with_text(&format!(
            "[queue]\nurl = \"amqp://127.0.0.1:1\"\n[[subscriber]]\n{lines}\nsecrets = [\"{SECRET}\"]\n"
        ));
        for command in ["check", "run"] {
            let output = setup.run(&[command]);
            let reported = String::from_utf8_lossy(&output.stderr).into_owned();
            assert_eq!(output.status.code(), Some(2), "{command} with {lines}: {reported}");
            let column = if key.ends_with("name") { 8 } else { 7 };
            let place = format!("hooktrail.toml:{line}:{column}: {key}: ");
            let problem = reported
                .lines()
                .find(|l| l.contains(&place))
                .unwrap_or_else(|| panic!("no {place} in {reported}"));
            assert!(problem.contains(part), "no `{part}` in {problem}");
            assert!(reported.contains("1 problem in"), "{reported}");
            for secret in ["hunter2", "someone", SECRET] {
                assert!(!reported.contains(secret), "{reported}");
            }
        }
    }
}

// ---- Events

async fn bad_events_in_numbers_leave_the_good_ones_their_order_and_the_daemon_its_size(
    queue: Queue,
) {
    let receiver = Receiver::accepting().await;
    let setup = Setup::new(&queue, &(QUICK.to_owned() + &subscriber("a", &receiver.url, "")));
    let daemon = setup.start().await;
    let bad = |n: u64| -> Vec<u8> {
        match n % 5 {
            0 => format!("{{\"no\":\"type\",\"n\":{n}}}").into_bytes(),
            1 => format!("\u{feff}{}", event(n)).into_bytes(),
            2 => [event(n).as_bytes(), b"\xff"].concat(),
            3 => format!("{{\"event\":\"a\",\"n\":{n},\"x\":{}", "[".repeat(20_000)).into_bytes(),
            _ => event(n).replacen(":783", ":NaN", 1).into_bytes(),
        }
    };
    let all = (0..2000).flat_map(|n| [bad(n), event(n).into_bytes()]);
    queue.publish("a.b", all).await;
    receiver.wait_all(2000).await;
    queue.wait_dead("a", 2000).await;
    queue.wait_backlog("a", 0).await;
    assert_eq!(receiver.accepted(), (0..2000).collect::<Vec<_>>(), "each good one once, in order");
    assert_bounded(&daemon);
    assert!(daemon.stop().await.success());
    // Groups of dead letters are stored side by side, so only their number and bytes are fixed, not
    // their order.
    assert!(setup.dead("a").iter().all(|l| l["reason"] == "invalid_event"));
    let mut expected: Vec<Vec<u8>> = (0..2000).map(bad).collect();
    let mut found = queue.take_dead("a").await;
    expected.sort_unstable();
    found.sort_unstable();
    assert!(
        found == expected,
        "the dead letters are not the exact bytes that were published, each once"
    );
}

fn every_dead_letter_can_be_listed_and_shown_whatever_its_bytes() {
    run(async {
        let broker = Broker::shared();
        let receiver = Receiver::accepting().await;
        let setup = Setup::new(&broker, &(QUICK.to_owned() + &subscriber("a", &receiver.url, "")));
        let daemon = setup.start().await;
        let huge = format!(r#"{{"event":"a","pad":"{}"}}"#, "x".repeat(10 << 20)).into_bytes();
        let mut bad: Vec<(Vec<u8>, &str)> = vec![
            (b"{\"event\":\"\xff\xfe\"}".to_vec(), "invalid_event"),
            (b"".to_vec(), "invalid_event"),
            (b"\0\0\0".to_vec(), "invalid_event"),
            (b"\x1b[2J\r\n\x07".to_vec(), "invalid_event"),
            ("\u{feff}{\"event\":\"a\"}".as_bytes().to_vec(), "invalid_event"),
            (
                format!(r#"{{"event":"a","x":{}{}}}"#, "[".repeat(99_999), "]".repeat(99_999))
                    .into_bytes(),
                "invalid_event",
            ),
            (huge.clone(), "too_large"),
            (huge.clone(), "too_large"),
            (huge, "too_large"),
            (b"{\"event\":18446744073709551615,\"m\":1e400}".to_vec(), "invalid_event"),
        ];
        broker
            .publish("a.b", bad.iter().map(|(body, _)| body.clone()).chain([event(0).into_bytes()]))
            .await;
        // The producer chooses these.
        let (id, content_type) = ("\u{1b}]0;id\u{7}", "text/\u{9b}2J");
        bad.push((
            b"{\"event\":[],\"a\":1.0,\"a\":18446744073709551616,\"s\":\"\xc2\x9b2J\x7f\"}"
                .to_vec(),
            "invalid_event",
        ));
        let properties = BasicProperties::default()
            .with_message_id(id.into())
            .with_content_type(content_type.into());
        broker.put(&broker.exchange, "a.b", &bad[10].0, properties).await;
        receiver.wait_all(1).await;
        broker.wait_depth("sub.a.dead", 11).await;
        assert_bounded(&daemon);
        let letters = setup.dead("a");
        assert_eq!(letters.len(), bad.len());
        let mut found: Vec<(String, String)> = Vec::new();
        for (n, letter) in (1..).zip(&letters) {
            let number = format!("@{n}");
            let shown: Value =
                serde_json::from_str(&setup.ok(&["dead", "show", "a", &number, "--json"]))
                    .expect("JSON");
            for key in ["number", "reason", "error", "kind", "bytes"] {
                assert_eq!(
                    shown[key], letter[key],
                    "`show` and `list` mean the same letter by {n}"
                );
            }
            assert_eq!(shown["kind"], "event");
            let word = |key: &str| shown[key].as_str().expect("text").to_owned();
            let text = setup.ok(&["dead", "show", "a", &number]);
            assert!(text.contains(&word("reason")));
            assert!(
                !text.contains(|c: char| c.is_control() && c != '\n'),
                "a letter drives the terminal: {text:?}"
            );
            found.push((word("body"), word("reason")));
        }
        let mut expected: Vec<(String, String)> = bad
            .iter()
            .map(|(body, reason)| {
                (String::from_utf8_lossy(body).into_owned(), (*reason).to_owned())
            })
            .collect();
        found.sort_unstable();
        expected.sort_unstable();
        assert!(found == expected, "not the bodies that were published");
        let listed = setup.ok(&["dead", "list", "a"]);
        assert_eq!(
            listed.lines().count(),
            1 + bad.len(),
            "one line a letter: an error has no line break"
        );
        assert!(
            !listed.contains(|c: char| c.is_control() && c != '\n')
                && listed.contains(r"\u{1b}]0;id\u{7}"),
            "{listed:?}"
        );
        let shown = setup.ok(&["dead", "show", "a", id]);
        for part in [
            "\nid                \\u{1b}]0;id\\u{7}\n",
            "\ncontent type      text/\\u{9b}2J\n",
            "\n{\"event\":[],\"a\":1.0,\"a\":18446744073709551616,\"s\":\"\\u{9b}2J\\u{7f}\"}\n",
        ] {
            assert!(shown.contains(part), "{part} is not in {shown}");
        }
        assert_eq!(
            letters.iter().filter(|l| l["id"] == id && l["content_type"] == content_type).count(),
            1,
            "JSON is as it is"
        );
        assert_eq!(setup.dead("a"), letters, "looking changes nothing");
    });
}

fn an_event_may_carry_any_properties_and_they_change_nothing() {
    run(async {
        let broker = Broker::shared();
        let receiver = Receiver::accepting().await;
        let setup = Setup::new(&broker, &(QUICK.to_owned() + &subscriber("a", &receiver.url, "")));
        let _daemon = setup.start().await;
        let plain = BasicProperties::default;
        // Headers with which an envelope or a dead letter would be taken for what it is not.
        let disguised = headers(&[
            ("kind", text("batch")),
            ("batch-id", text("msg_disguised")),
            ("attempts", AMQPValue::LongLongInt(15)),
            ("reason", AMQPValue::Boolean(true)),
        ]);
        let mut death = FieldTable::default();
        death.insert("x-death".into(), text("not an array"));
        let long = "i".repeat(255);
        let properties = [
            plain(),
            plain().with_content_type("text/plain".into()).with_content_encoding("gzip".into()),
            plain()
                .with_message_id(long.as_str().into())
                .with_priority(255)
                .with_timestamp(u64::MAX),
            plain().with_headers(disguised),
            plain().with_headers(death),
            plain()
                .with_type("x".into())
                .with_reply_to("nobody".into())
                .with_correlation_id("x".into()),
        ];
        for (n, p) in (0..).zip(&properties) {
            broker.put(&broker.exchange, "a.b", event(n).as_bytes(), p.clone()).await;
        }
        receiver.wait_all(6).await;
        let (urgent, others): (Vec<u64>, Vec<u64>) =
            receiver.accepted().into_iter().partition(|n| *n == 2);
        assert_eq!(others, [0, 1, 3, 4, 5]);
        assert_eq!(
            urgent.len(),
            1,
            "from RabbitMQ 4 on its priority lets it overtake those that are waiting"
        );
        assert!(receiver.requests().iter().all(|r| r.attempt() == 1 && r.id() != "msg_disguised"));
        // The dead letter of a bad event is an event's, with its id and type.
        for p in &properties {
            broker.put(&broker.exchange, "a.b", b"bad", p.clone()).await;
        }
        broker.wait_depth("sub.a.dead", 6).await;
        let mut found: Vec<(Option<String>, String)> = Vec::new();
        for letter in setup.dead("a") {
            assert_eq!(
                (&letter["kind"], &letter["reason"], &letter["attempts"]),
                (&"event".into(), &"invalid_event".into(), &0.into())
            );
            found.push((
                letter["id"].as_str().map(str::to_owned),
                letter["content_type"].as_str().expect("a type").to_owned(),
            ));
        }
        let expected = properties.iter().map(|p| {
            let content_type = p.content_type().as_ref().map_or("application/json", |t| t.as_str());
            (p.message_id().as_ref().map(|id| id.as_str().to_owned()), content_type.to_owned())
        });
        let mut expected: Vec<_> = expected.collect();
        found.sort_unstable();
        expected.sort_unstable();
        assert_eq!(found, expected);
    });
}

fn large_messages_are_taken_a_few_at_a_time() {
    const MESSAGES: u32 = 60;
    run(async {
        let broker = Broker::shared();
        let receiver = Receiver::accepting().await;
        let setup = Setup::new(
            &broker,
            &(QUICK.to_owned()
                + &subscriber("a", &receiver.url, "batch = { max_bytes = \"64KiB\" }")),
        );
        let nothing = setup.write("nothing", "");
        setup.ok(&["publish", nothing.to_str().expect("a path")]);
        let large = format!("{{\"event\":\"a.b\",\"x\":\"{}\"}}", "x".repeat(4 << 20));
        broker.publish("a.b", (0..MESSAGES).map(|_| large.as_bytes())).await;
        let daemon = setup.start().await;
        broker.wait_depth("sub.a.dead", MESSAGES).await;
        let peak = daemon.peak_mib();
        eprintln!("peak memory with {MESSAGES} messages of 4 MiB: {peak:.0} MiB");
        assert!(
            peak < 190.0,
            "{peak} MiB for messages of {} MiB in all, 16 of which are 64 MiB",
            4 * MESSAGES
        );
        assert!(daemon.stop().await.success());
        broker.take_all("sub.a.dead").await;
    });
}

fn large_messages_of_a_source_queue_are_relayed_a_few_at_a_time() {
    const MESSAGES: u32 = 60;
    run(async {
        let broker = Broker::shared();
        let (connection, channel) = broker.channel().await;
        let durable = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
        let source = format!("{}.source", broker.prefix);
        channel
            .queue_declare(source.as_str().into(), durable, FieldTable::default())
            .await
            .expect("declares");
        let large = format!("{{\"event\":\"a.b\",\"x\":\"{}\"}}", "x".repeat(4 << 20));
        broker.publish_to("", &source, (0..MESSAGES).map(|_| large.as_bytes())).await;
        let section = broker.section(&["a"]).replace(
            &format!("exchange = \"{}\"", broker.exchange),
            &format!("source_queue = \"{source}\""),
        );
        let setup = Setup::with_text(
            &(section + QUICK + &subscriber("a", "http://127.0.0.1:9/", "paused = true")),
        );
        let daemon = setup.start().await;
        eventually("all are relayed", async || {
            // In this order: what is acked in between is relayed, and counted there.
            let ready = broker.depth("source").await.expect("the source");
            let relayed = broker.depth("sub.a").await.expect("the subscriber's queue");
            assert!(
                ready + relayed >= MESSAGES - 16,
                "{} were taken at once",
                MESSAGES - ready - relayed
            );
            relayed == MESSAGES
        })
        .await;
        broker.wait_depth("source", 0).await;
        // With small ones after them, none is left behind when more are taken at once.
        broker.publish_to("", &source, (0..3000).map(event)).await;
        broker.wait_depth("sub.a", MESSAGES + 3000).await;
        assert!(daemon.stop().await.success());
        broker.wait_depth("source", 0).await;
        channel
            .queue_delete(source.as_str().into(), QueueDeleteOptions::default())
            .await
            .expect("deletes");
        connection.close(200, "done".into()).await.expect("closes");
    });
}

// ---- Envelopes

fn a_batch_that_counts_more_events_than_its_body_holds_is_given_up_as_a_single_event_is() {
    run(async {
        let (broker, api) = (Broker::shared(), Api::new());
        let receiver = Receiver::start(|r, _| match r.id() {
            "msg_large" => status(413),
            "msg_refused" => status(422),
            _ => status(200),
        })
        .await;
        let setup = Setup::new(
            &broker,
            &(QUICK.to_owned() + &api.section() + &subscriber("a", &receiver.url, "")),
        );
        let daemon = setup.start().await;
        broker.publish("a.b", [event(0)]).await;
        receiver.wait_all(1).await;
        let retry = format!("{}.sub.a.retry", broker.prefix);
        // The second is not as hooktrail writes it, so its events cannot be found.
        for (id, body) in [
            ("msg_large", r#"{"events":[{"event":"x","n":1}]}"#),
            ("msg_refused", r#"{ "events":[{"event":"x","n":2},{"event":"x","n":3}]}"#),
        ] {
            let table = headers(&[
                ("batch-id", text(id)),
                ("attempts", AMQPValue::LongLongInt(1)),
                ("events", AMQPValue::LongLongInt(3)),
            ]);
            let json = BasicProperties::default().with_content_type("application/json".into());
            broker.put("", &retry, body.as_bytes(), json.with_headers(table)).await;
        }
        broker.wait_depth("sub.a.dead", 2).await;
        let attempts = async |outcome: &str| {
            api.metric(&format!(
                "hooktrail_attempts_total{{subscriber=\"a\",outcome=\"{outcome}\"}}"
            ))
            .await
        };
        eventually("both are counted as dead letters", async || {
            attempts("dead_letter").await == Some(2.0)
        })
        .await;
        assert_eq!(attempts("split").await, Some(0.0));
        let (letters, log) = (setup.dead("a"), daemon.log());
        for (id, reason, status) in
            [("msg_large", "too_large", 413), ("msg_refused", "refused", 422)]
        {
            let letter = letters
                .iter()
                .find(|l| l["id"] == id)
                .unwrap_or_else(|| panic!("no {id} in {letters:?}"));
            assert_eq!(
                (&letter["reason"], &letter["status"], &letter["attempts"]),
                (&reason.into(), &status.into(), &2.into()),
                "{letter}"
            );
            assert_eq!(
                receiver.requests().iter().filter(|r| r.id() == id).count(),
                1,
                "it was sent again"
            );
            let said = format!("outcome=\"dead_letter\" reason=\"{reason}\" status={status}");
            assert!(log.lines().any(|l| l.contains(id) && l.contains(&said)), "{log}");
        }
        assert!(!log.contains("outcome=\"split\""), "{log}");
    });
}

fn an_envelope_at_its_limits_is_sent_and_one_beyond_them_is_a_dead_letter_that_names_the_header() {
    run(async {
        let broker = Broker::shared();
        let receiver = Receiver::start(|_, _| status(500)).await;
        let setup = Setup::new(
            &broker,
            &(QUICK.to_owned()
                + &subscriber("a", &receiver.url, "retry = { initial_interval = \"1h\" }")),
        );
        let daemon = setup.start().await;
        let retry = format!("{}.sub.a.retry", broker.prefix);
        let number = AMQPValue::LongLongInt;
        let with = |id: &str, more: &[(&str, AMQPValue)]| {
            let mut pairs = vec![("batch-id", text(id)), ("attempts", number(1))];
            pairs.retain(|(name, _)| !more.iter().any(|(m, _)| m == name));
            pairs.extend_from_slice(more);
            headers(&pairs)
        };
        let json = || BasicProperties::default().with_content_type("application/json".into());
        let beyond = [
            (with("msg\r\nx-injected: 1", &[]), "x-hooktrail-batch-id"),
            (with(&"m".repeat(256), &[]), "x-hooktrail-batch-id"),
            (with("", &[]), "x-hooktrail-batch-id"),
            (
                with("m", &[("batch-id", AMQPValue::LongString(b"\xff\xfe".to_vec().into()))]),
                "x-hooktrail-batch-id",
            ),
            (
                with("m", &[("batch-id", AMQPValue::FieldTable(FieldTable::default()))]),
                "x-hooktrail-batch-id",
            ),
            (with("m", &[("attempts", AMQPValue::Void)]), "x-hooktrail-attempts"),
            (with("m", &[("attempts", number(1 << 32))]), "x-hooktrail-attempts"),
            (with("m", &[("attempts", AMQPValue::Float(1.0))]), "x-hooktrail-attempts"),
            (with("m", &[("events", text("three"))]), "x-hooktrail-events"),
            (with("m", &[("events", number(-1))]), "x-hooktrail-events"),
            (
                with("m", &[("first-attempt-at", AMQPValue::Timestamp(5))]),
                "x-hooktrail-first-attempt-at",
            ),
            (
                with("m", &[("first-attempt-at", text("9999999-01-01T00:00:00Z"))]),
                "x-hooktrail-first-attempt-at",
            ),
        ];
        let body = br#"{"events":[{"event":"x","n":1}]}"#;
        for (table, _) in &beyond {
            broker.put("", &retry, body, json().with_headers(table.clone())).await;
        }
        broker.put("", &retry, body, BasicProperties::default().with_headers(with("m", &[]))).await;
        broker.wait_depth("sub.a.dead", beyond.len() as u32 + 1).await;
        assert_eq!(receiver.count(), 0, "none of them was sent");
        let mut names: Vec<&str> =
            beyond.iter().map(|(_, name)| *name).chain(["content type"]).collect();
        for letter in setup.dead("a") {
            assert_eq!(
                (&letter["kind"], &letter["reason"]),
                (&"batch".into(), &"invalid_event".into()),
                "{letter}"
            );
            assert_eq!(letter["bytes"], body.len());
            let error = letter["error"].as_str().expect("text");
            let named = names
                .iter()
                .position(|name| error.contains(name))
                .unwrap_or_else(|| panic!("none of {names:?} in {letter}"));
            names.swap_remove(named);
        }
        assert!(names.is_empty(), "no letter names {names:?}");

        // At the limits each is sent once; what follows is the schedule's to say.
        for (id, more) in [
            ("msg_most", ("attempts", AMQPValue::LongUInt(u32::MAX))),
            ("msg_old", ("first-attempt-at", text("1970-01-01T00:00:00Z"))),
            ("msg_future", ("first-attempt-at", text("9999-12-31T23:59:59Z"))),
        ] {
            broker.put("", &retry, body, json().with_headers(with(id, &[more]))).await;
        }
        let mut sent: Vec<String> =
            receiver.wait_requests(3).await.iter().map(|r| r.id().to_owned()).collect();
        sent.sort_unstable();
        assert_eq!(sent, ["msg_future", "msg_most", "msg_old"]);
        broker.wait_depth("sub.a.dead", beyond.len() as u32 + 3).await;
        let exhausted = setup.dead("a").into_iter().filter(|l| l["reason"] == "exhausted");
        let mut exhausted: Vec<String> =
            exhausted.map(|l| l["id"].as_str().expect("an id").to_owned()).collect();
        exhausted.sort_unstable();
        assert_eq!(exhausted, ["msg_most", "msg_old"]);
        eventually("the third waits on the ladder", async || {
            broker.depth("delay.11").await == Some(1)
        })
        .await;

        // A message that was no envelope is never sent, whatever is requested; an envelope is.
        broker.put("", &retry, b"junk", json()).await;
        let junk = beyond.len() + 2;
        broker.wait_depth("sub.a.dead", junk as u32 + 2).await;
        let last = format!("@{}", junk + 2);
        let replay = |arguments: &[&str]| {
            let output = setup.run(&[&["dead", "replay", "a"], arguments].concat());
            let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
            (output.status.code(), text(&output.stdout), text(&output.stderr))
        };
        let (code, out, reported) = replay(&["--reason", "invalid_event", "--json"]);
        let result: Value = serde_json::from_str(&out).expect("JSON");
        assert_eq!(
            (code, &result["chosen"], &result["skipped"], &result["of"]),
            (Some(0), &0.into(), &junk.into(), &(junk + 2).into())
        );
        assert_eq!(
            reported.lines().filter(|l| l.contains("never was a batch")).count(),
            junk,
            "{reported}"
        );
        assert!(reported.contains(&format!("`hooktrail dead show a {last}`")), "{reported}");
        for (more, begin) in [(&[][..], "queued 0 of"), (&["--dry-run"], "would queue 0 of")] {
            let (code, out, reported) = replay(&[&[last.as_str()], more].concat());
            assert!(
                code == Some(1) && out.starts_with(begin) && out.ends_with(", skipped 1\n"),
                "{out}"
            );
            assert!(reported.contains("1 letter cannot be replayed"), "{reported}");
        }
        receiver.now(|_, _| status(200));
        let (code, out, reported) = replay(&[]);
        assert!(
            code == Some(0)
                && out.contains(&format!(
                    "queued 2 of {} dead letters of `a`, skipped {junk}",
                    junk + 2
                )),
            "{out}"
        );
        assert!(
            reported.contains(&format!("{last} (@{junk} from now on) is not replayed")),
            "{reported}"
        );
        let mut again: Vec<String> =
            receiver.wait_requests(5).await[3..].iter().map(|r| r.id().to_owned()).collect();
        again.sort_unstable();
        assert_eq!(again, ["msg_most", "msg_old"]);
        broker.wait_depth("sub.a.dead", junk as u32).await;
        assert!(
            setup.ok(&["dead", "show", "a", &format!("@{junk}")]).ends_with("\njunk\n"),
            "the number that was printed"
        );
        assert!(daemon.stop().await.success());
        assert_eq!(receiver.count(), 5);
    });
}

fn orphans_stay_until_their_subscriber_is_back_and_junk_among_them_hurts_no_subscriber() {
    run(async {
        let broker = Broker::shared();
        let receiver = Receiver::accepting().await;
        let one = QUICK.to_owned() + &subscriber("one", &receiver.url, "");
        let setup = Setup::new(&broker, &one);
        let daemon = setup.start().await;
        let first = format!("{}.delay.00", broker.prefix);
        let to = |name: &str| format!("{}1.{name}", "0.".repeat(18));
        let sound = |id: &str| {
            let table = headers(&[("batch-id", text(id)), ("attempts", AMQPValue::LongLongInt(2))]);
            BasicProperties::default()
                .with_content_type("application/json".into())
                .with_headers(table)
        };
        let body = br#"{"events":[{"event":"x","n":7}]}"#;
        broker.put(&first, &to("gone"), body, sound("msg_1")).await;
        broker.put(&first, &to("gone"), b"junk", BasicProperties::default()).await;
        broker.put(&first, &to("never-there"), body, sound("msg_2")).await;
        broker
            .put("", &format!("{}.orphans", broker.prefix), b"by hand", BasicProperties::default())
            .await;
        broker.wait_depth("orphans", 4).await;
        // A new daemon sweeps at its start; it takes none of them.
        assert!(daemon.stop().await.success());
        let daemon = setup.start().await;
        eventually("swept and given back", async || {
            setup.ok(&["check", "--connect"]).contains("orphans: 4 messages")
        })
        .await;
        broker.publish("a.b", [event(0)]).await;
        receiver.wait_all(1).await;
        assert!(daemon.stop().await.success());
        broker.wait_depth("orphans", 4).await;

        let both = Setup::new(
            &broker,
            &(one + &subscriber("gone", &receiver.url, "events = [\"nothing\"]")),
        );
        let daemon = both.start().await;
        let request = receiver.wait_requests(2).await[1].clone();
        assert_eq!((request.id(), request.attempt(), &request.body[..]), ("msg_1", 3, &body[..]));
        broker.wait_depth("sub.gone.dead", 1).await;
        let letter = &both.dead("gone")[0];
        assert_eq!(
            (&letter["kind"], &letter["reason"], &letter["bytes"]),
            (&"batch".into(), &"invalid_event".into(), &4.into())
        );
        broker.wait_depth("orphans", 2).await;
        assert!(daemon.stop().await.success());
        broker.wait_depth("orphans", 2).await;
        assert_eq!(receiver.count(), 2, "the others went nowhere");
    });
}

// ---- Receivers

async fn a_dozen_hostile_receivers_at_once_hurt_neither_the_good_one_nor_the_daemon(queue: Queue) {
    let good = Receiver::accepting().await;
    // Chunks of 64 KiB, endless: more than a gibibyte if it were read.
    let chunks = [&b"10000\r\n"[..], &[b'x'; 0x1_0000], b"\r\n"].concat();
    let cases = [
        // (name, receiver, outcome, a part of its attempt's line)
        (
            "ok-endless",
            Raw::start(flood(
                b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n",
                chunks.clone(),
            ))
            .await,
            "delivered",
            "status=200",
        ),
        (
            "endless",
            Raw::start(flood(b"HTTP/1.1 500 x\r\ntransfer-encoding: chunked\r\n\r\n", chunks))
                .await,
            "retry",
            "failure=\"status\"",
        ),
        (
            "continues",
            Raw::start(flood(b"", b"HTTP/1.1 100 Continue\r\n\r\n".repeat(1000))).await,
            "retry",
            "failure=\"timeout\"",
        ),
        (
            "line",
            Raw::start(flood(b"HTTP/1.1 200 ", vec![b'x'; 1 << 16])).await,
            "retry",
            "failure=\"bad_answer\"",
        ),
        (
            "header",
            Raw::start(flood(b"HTTP/1.1 200 OK\r\nx: ", vec![b'x'; 1 << 16])).await,
            "retry",
            "failure=\"bad_answer\"",
        ),
        (
            "lengths",
            Raw::start(always(
                b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nxx",
            ))
            .await,
            "retry",
            "failure=\"bad_answer\"",
        ),
        (
            "negative",
            Raw::start(always(b"HTTP/1.1 200 OK\r\ncontent-length: -1\r\n\r\n")).await,
            "retry",
            "failure=\"bad_answer\"",
        ),
        (
            "chunk",
            Raw::start(always(
                b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nnonsense\r\n",
            ))
            .await,
            "delivered",
            "status=200",
        ),
        (
            "chunk-size",
            Raw::start(always(
                b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nfffffffffffffffff\r\n",
            ))
            .await,
            "delivered",
            "status=200",
        ),
        (
            "version",
            Raw::start(always(b"HTTP/7.0 200 OK\r\ncontent-length: 0\r\n\r\n")).await,
            "retry",
            "failure=\"bad_answer\"",
        ),
        (
            "zero",
            Raw::start(always(b"HTTP/1.1 000 x\r\ncontent-length: 0\r\n\r\n")).await,
            "retry",
            "failure=\"bad_answer\"",
        ),
        (
            "nines",
            Raw::start(always(b"HTTP/1.1 999 x\r\ncontent-length: 0\r\n\r\n")).await,
            "retry",
            "status=999",
        ),
        (
            "upgrade",
            Raw::start(always(b"HTTP/1.1 101 x\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n"))
                .await,
            "retry",
            "status=101",
        ),
        ("zeros", Raw::start(always(&[0; 4096])).await, "retry", "failure=\"bad_answer\""),
        ("tls", Raw::start(plain).await, "retry", "failure=\"tls\""),
        ("deaf", Raw::start(deaf).await, "retry", "failure=\"timeout\""),
    ];
    let mut text = QUICK.to_owned() + &subscriber("good", &good.url, "");
    for (name, raw, ..) in &cases {
        let scheme = if *name == "tls" { "https" } else { "http" };
        let more = "batch = { max_bytes = \"12MiB\" }\nhttp = { timeout = \"3s\" }\nretry = { initial_interval = \"1h\" }";
        text += &subscriber(name, &format!("{scheme}://{}/", raw.address), more);
    }
    let setup = Setup::new(&queue, &text);
    let daemon = setup.start().await;
    // Large enough that the kernel's buffers do not swallow an unread request.
    let large = format!(r#"{{"event":"a.b","n":0,"pad":"{}"}}"#, "x".repeat(1 << 19));
    let start = Instant::now();
    queue.publish("a.b", [large.clone()]).await;
    good.wait_all(1).await;
    assert!(start.elapsed() < Duration::from_secs(3), "the good one waited {:?}", start.elapsed());
    let attempt = |name: &str| {
        let subscriber = format!("attempt subscriber=\"{name}\"");
        daemon.log().lines().find(|l| l.contains(&subscriber)).map(str::to_owned)
    };
    for (name, _, outcome, part) in &cases {
        eventually(&format!("{name} is attempted"), async || attempt(name).is_some()).await;
        let line = attempt(name).expect("just seen");
        assert!(
            line.contains(&format!("outcome=\"{outcome}\"")) && line.contains(part),
            "{name}: not {outcome} with {part}: {line}"
        );
        assert!(line.len() < 2048, "{name}: {} bytes of log", line.len());
    }
    assert!(start.elapsed() < Duration::from_secs(15), "the attempts took {:?}", start.elapsed());
    // Meanwhile and afterwards the good one is served at once.
    let start = Instant::now();
    queue.publish("a.b", [event(1)]).await;
    good.wait_all(2).await;
    assert!(start.elapsed() < Duration::from_secs(3), "the good one waited {:?}", start.elapsed());
    assert_bounded(&daemon);
    // Nothing is lost: of each batch that failed, the first one's envelope waits on the ladder (for
    // an hour and more).
    let failed = cases.iter().filter(|(_, _, outcome, _)| *outcome == "retry").count() as u32;
    match &queue {
        Queue::Amqp(broker) => {
            eventually("the envelopes are on the ladder", async || {
                broker.depth("delay.11").await >= Some(failed)
            })
            .await
        }
        Queue::Embedded(embedded) => {
            for (name, ..) in cases.iter().filter(|(_, _, outcome, _)| *outcome == "retry") {
                embedded
                    .wait("a batch to try again", async || embedded.retries(name).await >= 1)
                    .await;
            }
        }
    }
}

async fn an_answer_without_a_request_is_not_taken_for_that_of_the_next_request(queue: Queue) {
    // Each answer brings a second one with it: taken for the answer to the next attempt, it would
    // lose the batch.
    let two =
        b"HTTP/1.1 500 x\r\ncontent-length: 0\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n";
    let raw = Raw::start(always(two)).await;
    let setup = Setup::new(
        &queue,
        &(QUICK.to_owned() + &subscriber("a", &raw.url(), "retry = { max_attempts = 3 }")),
    );
    let daemon = setup.start().await;
    queue.publish("a.b", [event(0)]).await;
    queue.wait_dead("a", 1).await;
    assert!(!daemon.log().contains("outcome=\"delivered\""), "{}", daemon.log());
    assert_eq!(
        (&setup.dead("a")[0]["attempts"], &setup.dead("a")[0]["status"]),
        (&3.into(), &500.into())
    );
}

async fn the_text_of_an_answer_is_in_the_dead_letter_on_one_line_and_not_in_the_log(queue: Queue) {
    // Many a receiver sends back what it was sent.
    let answer = "\r\n2026-01-01T00:00:00Z ERROR no such user Jane Doe\n\u{1b}[31m\0\u{85}forged";
    let receiver = Receiver::start(move |_, _| status(500).body(answer)).await;
    let setup = Setup::new(
        &queue,
        &(QUICK.to_owned() + &subscriber("a", &receiver.url, "retry = { max_attempts = 1 }")),
    );
    let daemon = setup.start().await;
    queue.publish("a.b", [event(0)]).await;
    queue.wait_dead("a", 1).await;
    let log = daemon.log();
    let line = log
        .lines()
        .find(|l| l.contains("attempt subscriber=\"a\""))
        .expect("one line for the attempt");
    assert!(line.contains("outcome=\"dead_letter\" reason=\"exhausted\" status=500 failure=\"status\" duration_ms="), "{line}");
    assert!(
        !log.contains("Jane Doe")
            && !log.contains("forged")
            && !log.contains(['\u{1b}', '\0', '\u{85}']),
        "{log}"
    );
    let error = setup.dead("a")[0]["error"].as_str().expect("text").to_owned();
    assert!(
        error.starts_with("status 500: ") && error.contains("Jane Doe") && error.contains("forged"),
        "{error}"
    );
    assert!(!error.contains(char::is_control), "{error}");
}

async fn a_name_of_this_machine_is_blocked_before_any_connection_and_its_batch_waits(queue: Queue) {
    let good = Receiver::accepting().await;
    let raw = Raw::start(always(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")).await;
    let url = raw.url().replace("127.0.0.1", "localhost");
    let more = "http = { allow_private_addresses = false }\nretry = { initial_interval = \"1h\" }";
    let setup = Setup::new(
        &queue,
        &(QUICK.to_owned() + &subscriber("a", &url, more) + &subscriber("good", &good.url, "")),
    );
    let daemon = setup.start().await;
    queue.publish("a.b", [event(0)]).await;
    good.wait_all(1).await;
    daemon.wait_log("outcome=\"retry\" failure=\"address_blocked\"").await;
    queue.wait_retries("a", 11, 1).await;
    queue.wait_backlog("a", 0).await;
    assert_eq!(raw.connections(), 0, "not even a connection");
}

async fn userinfo_of_a_url_is_sent_decoded_and_no_failure_shows_it(queue: Queue) {
    let accepting = Receiver::accepting().await;
    let nonsense = Raw::start(always(b"nonsense\r\n\r\n")).await;
    let userinfo = "some%40one:hunter%3A2%20x";
    let refused = crate::support::free_port();
    let hosts = [
        ("sent", accepting.url.trim_start_matches("http://").to_owned()),
        ("nonsense", format!("{}/token", nonsense.address)),
        ("refused", format!("127.0.0.1:{refused}/token")),
        ("unknown", "no-such-host.invalid/token".to_owned()),
        ("blocked", format!("localhost:{refused}/token")),
    ];
    let mut text = format!("[log]\nlevel = \"trace\"\n{QUICK}");
    for (name, host) in &hosts {
        let more = format!(
            "retry = {{ max_attempts = 1 }}\nhttp = {{ allow_private_addresses = {} }}",
            *name != "blocked"
        );
        text += &subscriber(name, &format!("http://{userinfo}@{host}"), &more);
    }
    let setup = Setup::new(&queue, &text);
    let daemon = setup.start().await;
    queue.publish("a.b", [event(0)]).await;
    let request = accepting.wait_requests(1).await.remove(0);
    // The base64 of `some@one:hunter:2 x`.
    assert_eq!(request.header("authorization"), "Basic c29tZUBvbmU6aHVudGVyOjIgeA==");
    let mut shown = setup.ok(&["check"]);
    // Endpoints that cannot be reached are among its findings.
    let inspected = setup.run(&["check", "--connect"]);
    assert_eq!(inspected.status.code(), Some(1));
    shown += &String::from_utf8_lossy(&[inspected.stdout, inspected.stderr].concat());
    for (name, _) in &hosts[1..] {
        queue.wait_dead(name, 1).await;
        shown += &setup.ok(&["dead", "list", name, "--json"]);
        shown += &setup.ok(&["dead", "show", name, "@1"]);
    }
    shown += &daemon.log();
    for secret in ["some@one", "some%40one", "hunter", "c29tZUBvbmU6", "hook/token"] {
        assert!(!shown.contains(secret), "`{secret}` is in {shown}");
    }
    assert!(daemon.stop().await.success());
}

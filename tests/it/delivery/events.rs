//! The path of an event, without faults of the broker or the daemon.

use std::{
    collections::HashSet,
    time::{Duration, Instant, SystemTime},
};

use serde_json::json;

use crate::operators::history::{admin, remembering};
use crate::support::{
    api::Api,
    broker::{Broker, kill},
    daemon::{QUICK, SECRET, Setup, subscriber},
    eventually,
    queue::{Queue, on_both_queues},
    receiver::{Receiver, Request, event, status},
    run, tests_that_need,
};

on_both_queues!(
    every_event_arrives_once_in_order_signed_and_byte_for_byte,
    batches_keep_to_their_number_size_and_time,
    formats_keep_their_bytes_and_ids_through_retries_halves_dead_letters_and_replays,
    compressed_requests_are_signed_before_and_are_plain_for_who_refuses_them_until_a_reload,
    no_second_has_more_requests_or_events_than_the_rate_allows_retries_among_them,
    each_subscriber_gets_the_events_that_its_patterns_match,
    values_decide_who_gets_an_event_and_what_is_redacted_is_shown_to_nobody_who_is_not_to_see_it,
    a_failed_batch_comes_again_with_the_same_bytes_and_id_and_never_early,
    retries_go_before_the_backlog,
    retry_after_holds_the_batch_and_the_lane,
    an_exhausted_batch_is_a_dead_letter_with_its_story_and_can_be_replayed,
    purge_deletes_only_what_is_chosen_and_only_when_told,
    an_argument_is_an_id_and_only_with_its_sign_a_number,
    a_hanging_subscriber_does_not_slow_another,
    while_the_circuit_is_open_the_backlog_stays_in_the_queue,
    after_an_outage_requests_at_once_and_events_in_a_batch_grow_with_each_success,
    an_event_that_is_too_large_is_one_dead_letter_however_often_the_lane_starts_over,
    all_signature_schemes_stand_side_by_side,
);

tests_that_need!(
    broker:
    a_dead_letter_on_the_broker_is_the_body_with_the_promised_headers,
    several_daemons_share_the_work,
    what_is_requeued_while_the_prefetch_grows_keeps_its_order,
    events_of_a_source_queue_are_relayed_by_their_type,
);

const TYPE: &str = "activity_log.user.updated";

fn numbers(range: std::ops::Range<u64>) -> Vec<u64> {
    range.collect()
}

async fn every_event_arrives_once_in_order_signed_and_byte_for_byte(queue: Queue) {
    let json = Receiver::accepting().await;
    let lines = Receiver::accepting().await;
    let array = Receiver::accepting().await;
    let setup = Setup::new(
        &queue,
        &(QUICK.to_owned()
            + &subscriber("json", &json.url, "")
            + &subscriber("lines", &lines.url, "format = \"jsonl\"")
            + &subscriber("array", &array.url, "format = \"json_array\"")),
    );
    let daemon = setup.start().await;
    queue.publish(TYPE, (0..3000).map(event)).await;
    json.wait_all(3000).await;
    lines.wait_all(3000).await;
    array.wait_all(3000).await;
    for receiver in [&json, &lines, &array] {
        assert_eq!(receiver.accepted(), numbers(0..3000), "each once, in order");
        for request in receiver.requests() {
            assert!(request.verified(), "{request:?}");
            assert_eq!(request.attempt(), 1);
            assert!(request.header("user-agent").starts_with("hooktrail/"));
            assert!(request.id().starts_with("msg_") && !request.id().contains('.'));
            let events: Vec<String> = request.numbers().into_iter().map(event).collect();
            let expected = match request.header("content-type") {
                "application/json" if receiver.url == array.url => {
                    format!("[{}]", events.join(","))
                }
                "application/json" => format!("{{\"events\":[{}]}}", events.join(",")),
                "application/jsonl" => events.join("\n") + "\n",
                other => panic!("content type {other}"),
            };
            assert_eq!(request.body, expected.as_bytes());
        }
        let ids: HashSet<String> = receiver.requests().iter().map(|r| r.id().to_owned()).collect();
        assert_eq!(ids.len(), receiver.count(), "each batch has an id of its own");
    }
    assert!(daemon.stop().await.success());
    assert_eq!(queue.backlog("json").await, 0, "all were acked");
}

async fn formats_keep_their_bytes_and_ids_through_retries_halves_dead_letters_and_replays(
    queue: Queue,
) {
    // It fails once, and refuses what holds event 2. That is looked for in halves if it has accepted
    // something since it failed.
    let picky = async || {
        Receiver::start(|request, n| match n {
            0 => status(200),
            1 => status(503),
            _ if request.numbers().contains(&2) => status(400),
            _ => status(200),
        })
        .await
    };
    const HEC: &str = "source = \"hooktrail\"\nindex = \"main\"";
    let mut all = Vec::new();
    let mut text = QUICK.to_owned();
    for (format, more) in [
        ("json_array", ""),
        ("single", ""),
        ("splunk_hec", HEC),
        ("cloudevents_batch", "source = \"/audit\""),
    ] {
        let receiver = picky().await;
        let more = format!("format = \"{format}\"\nbatch = {{ max_wait = \"500ms\" }}\n{more}");
        text += &subscriber(&format.replace('_', "-"), &receiver.url, &more);
        all.push((format, receiver));
    }
    let setup = Setup::new(&queue, &text);
    let _daemon = setup.start().await;
    queue.publish(TYPE, [event(9)]).await;
    for (_, receiver) in &all {
        receiver.wait_requests(1).await;
    }
    queue.publish(TYPE, (0..6).map(event)).await;
    for (_, receiver) in &all {
        receiver.wait_requests(2).await;
    }
    queue.publish(TYPE, [event(8)]).await;
    for (format, receiver) in &all {
        let name = format.replace('_', "-");
        queue.wait_dead(&name, 1).await;
        eventually("the others are accepted", async || receiver.accepted().len() == 7).await;
        let requests = receiver.requests();
        let again = requests.iter().skip(2).find(|r| r.id() == requests[1].id()).expect("a retry");
        assert_eq!((&again.body, again.attempt()), (&requests[1].body, 2), "{format}");
        let dead = setup.dead(&name);
        let label = match *format {
            "cloudevents_batch" => "application/cloudevents-batch+json".to_owned(),
            _ => format!("application/json; format={format}"),
        };
        assert_eq!((&dead[0]["events"], &dead[0]["content_type"]), (&json!(1), &json!(label)));
        // What the dead letter holds is found by the event's type.
        let of_type = setup.ok(&["dead", "list", &name, "--type", "activity_log.#", "--json"]);
        assert!(of_type.contains(dead[0]["id"].as_str().expect("an id")), "{of_type}");
        // It is accepted now, with the same bytes.
        receiver.now(|_, _| status(200));
        setup.ok(&["dead", "replay", &name]);
        eventually("the replayed one is accepted", async || receiver.accepted().contains(&2)).await;
        let last = receiver.requests().pop().expect("a request");
        let (whole, content_type) = match *format {
            "single" => (event(2), "application/json"),
            "json_array" => (format!("[{}]", event(2)), "application/json"),
            "splunk_hec" => (
                format!(
                    "{{\"time\":1733739084,\"source\":\"hooktrail\",\"index\":\"main\",\"event\":{}}}",
                    event(2)
                ),
                "application/json",
            ),
            _ => {
                // The id is that of the first batch, and the event's place there.
                let first = requests[1].id();
                let place = requests[1].numbers().iter().position(|n| *n == 2).map_or(0, |n| n + 1);
                let head = r#""specversion":"1.0","id""#;
                let more = r#""source":"/audit","type":"activity_log.user.updated","time":"2024-12-09T10:11:24Z""#;
                let event = event(2);
                (
                    format!("[{{{head}:\"{first}.{place}\",{more},\"data\":{event}}}]"),
                    "application/cloudevents-batch+json",
                )
            }
        };
        assert_eq!(String::from_utf8_lossy(&last.body), whole);
        assert_eq!(last.header("content-type"), content_type);
        let is_one = |r: &Request| r.events().len() == 1;
        assert_eq!(receiver.requests().iter().all(is_one), *format == "single");
    }
}

async fn compressed_requests_are_signed_before_and_are_plain_for_who_refuses_them_until_a_reload(
    queue: Queue,
) {
    const GZIP: &str = "http = { compression = \"gzip\" }\nbatch = { max_events = 100 }";
    let takes = Receiver::start(|_, n| status(if n == 0 { 503 } else { 200 })).await;
    let refuse = |request: &Request, _: usize| {
        status(if request.headers.contains_key("content-encoding") { 415 } else { 200 })
    };
    let refuses = Receiver::start(refuse).await;
    // It answers 415 to everything: that is not about the compression.
    let neither = Receiver::start(|_, n| status(if n < 2 { 415 } else { 200 })).await;
    let text = QUICK.to_owned()
        + &Api::new().section()
        + &subscriber("takes", &takes.url, GZIP)
        + &subscriber("refuses", &refuses.url, GZIP)
        + &subscriber("neither", &neither.url, GZIP);
    let setup = Setup::new(&queue, &text);
    let daemon = setup.start().await;
    let is_gzip = |request: &Request| {
        request.headers.get("content-encoding").is_some_and(|coding| coding == "gzip")
    };
    queue.publish(TYPE, (0..300).map(event)).await;
    for receiver in [&takes, &refuses, &neither] {
        receiver.wait_all(300).await;
    }
    let requests = takes.requests();
    assert!(requests.iter().all(|r| is_gzip(r) && r.verified()), "signed before, inflated first");
    let again = requests[1..].iter().find(|r| r.id() == requests[0].id()).expect("a retry");
    assert_eq!((&again.body, again.attempt()), (&requests[0].body, 2));
    let length = |r: &Request| r.header("content-length").parse::<usize>().expect("a number");
    assert!(length(&requests[0]) * 4 < requests[0].body.len(), "events repeat themselves");

    // One attempt: the second request has the same id, number and bytes.
    let requests = refuses.requests();
    assert!(is_gzip(&requests[0]) && requests[1..].iter().all(|r| !is_gzip(r) && r.verified()));
    assert_eq!(requests[0].id(), requests[1].id());
    assert_eq!((requests[1].attempt(), &requests[1].body), (1, &requests[0].body));
    let requests = neither.requests();
    assert_eq!((is_gzip(&requests[0]), is_gzip(&requests[1])), (true, false));
    assert_eq!((requests[1].status, requests[1].attempt()), (415, 1));
    let again = requests[2..].iter().find(|r| r.id() == requests[0].id()).expect("a retry");
    assert_eq!((again.attempt(), is_gzip(again)), (2, true));
    let refused = |name: &str| {
        let text = setup.ok(&["status", name]);
        text.contains("its receiver refused a compressed request")
    };
    eventually("the status says so", async || refused("refuses")).await;
    assert!(!refused("takes") && !refused("neither"));
    assert_eq!(
        daemon.log().matches("its receiver answered 415 to a compressed request").count(),
        1
    );

    // After a reload it is tried again.
    refuses.now(|_, _| status(200));
    let before = refuses.count();
    kill("-HUP", daemon.pid());
    daemon.wait_log("because=\"SIGHUP\"").await;
    eventually("the status forgets it", async || !refused("refuses")).await;
    queue.publish(TYPE, (300..301).map(event)).await;
    refuses.wait_all(301).await;
    assert!(is_gzip(&refuses.requests()[before]));

    assert!(setup.ok(&["test", "refuses"]).contains("content-encoding: gzip"));
    refuses.now(refuse);
    let tested = setup.ok(&["test", "refuses"]);
    assert!(tested.contains("it was sent compressed before, and answered 415"), "{tested}");
    assert!(!tested.contains("content-encoding"), "{tested}");
}

async fn no_second_has_more_requests_or_events_than_the_rate_allows_retries_among_them(
    queue: Queue,
) {
    // Every second request fails, so that there are as many retries.
    let often = async || Receiver::start(|_, n| status(if n % 2 == 0 { 503 } else { 200 })).await;
    let (requests, events, free) = (often().await, Receiver::accepting().await, often().await);
    let one_each = "batch = { max_events = 1 }";
    let api = Api::new();
    let text = |rate: &str| {
        QUICK.to_owned()
            + &api.section()
            + &subscriber(
                "requests",
                &requests.url,
                &format!("{one_each}\nhttp = {{ concurrency = 8{rate} }}"),
            )
            + &subscriber("events", &events.url, "http.rate = { events = \"20/s\" }")
            + &subscriber("free", &free.url, &format!("{one_each}\nhttp = {{ concurrency = 8 }}"))
    };
    let setup = Setup::new(&queue, &text(", rate = \"10/s\""));
    let _daemon = setup.start().await;
    let began = Instant::now();
    queue.publish(TYPE, (0..60).map(event)).await;
    for receiver in [&free, &requests, &events] {
        receiver.wait_all(60).await;
    }
    // A second's worth at once, and then one after the other: of 60 events in 20 a second, two more.
    let took = began.elapsed();
    assert!(took >= Duration::from_secs(2), "{took:?}");
    let most = |receiver: &Receiver, count: fn(&Request) -> usize| {
        let all = receiver.requests();
        let within = |from: &Request| -> usize {
            let until = from.at + Duration::from_secs(1);
            all.iter().filter(|r| r.at >= from.at && r.at < until).map(count).sum()
        };
        all.iter().map(within).max().unwrap_or_default()
    };
    let (of_requests, of_events) = (most(&requests, |_| 1), most(&events, |r| r.numbers().len()));
    // What comes a little late makes the second after it fuller.
    assert!(of_requests <= 2 * 10 + 2 && of_events <= 2 * 20 + 2, "{of_requests} {of_events}");
    assert!(most(&free, |_| 1) > 22, "without a rate there is no such limit");
    assert!(events.requests().iter().all(|r| r.numbers().len() <= 20), "at most a second's worth");
    let waits = api.metric("hooktrail_rate_waits_total{subscriber=\"requests\"}").await;
    assert!(waits.is_some_and(|n| n >= 20.0), "{waits:?}");
}

async fn values_decide_who_gets_an_event_and_what_is_redacted_is_shown_to_nobody_who_is_not_to_see_it(
    queue: Queue,
) {
    let event = |n: u64, kind: &str| {
        json!({ "event": TYPE, "n": n, "actor": { "type": kind, "email": format!("e{n}@example.com") }, "account": 42 })
            .to_string()
    };
    let all = Receiver::accepting().await;
    let some = Receiver::start(|_, n| status(if n == 0 { 503 } else { 200 })).await;
    let refusing = Receiver::start(|_, n| status(if n == 0 { 200 } else { 400 })).await;
    let other = Receiver::accepting().await;
    const USERS: &str = "match = { \"/actor/type\" = [\"user\", \"bot\"], \"/account\" = [42] }\nredact = [\"/actor/email\"]";
    let api = Api::new();
    let text = QUICK.to_owned()
        + &admin(&api)
        + &subscriber("all", &all.url, "")
        + &subscriber("some", &some.url, USERS)
        + &subscriber(
            "refusing",
            &refusing.url,
            &format!(
                "{USERS}\nredact_with = {{ hmac = \"a key\" }}\nevent_ids = true\nbatch = {{ max_events = 1 }}"
            ),
        )
        + &subscriber("other", &other.url, "match = { \"/account\" = [\"43\"] }");
    let setup = Setup::new(&queue, &text);
    let daemon = remembering(&queue, &setup).await;
    let kinds = ["user", "admin", "bot", "user", "system"];
    queue.publish(TYPE, (0..5).zip(kinds).map(|(n, kind)| event(n, kind))).await;
    all.wait_all(5).await;
    assert!(
        all.requests().iter().all(|r| String::from_utf8_lossy(&r.body).contains("@example.com"))
    );
    eventually("three are wanted", async || some.accepted().len() == 3).await;
    assert_eq!(some.accepted(), [0, 2, 3]);
    let requests = some.requests();
    let again = requests[1..].iter().find(|r| r.id() == requests[0].id()).expect("a retry");
    assert_eq!((&again.body, again.attempt()), (&requests[0].body, 2));
    for request in &requests {
        let text = String::from_utf8_lossy(&request.body);
        assert!(request.verified() && !text.contains("@example.com"), "{text}");
        assert!(request.events().iter().all(|e| e["actor"]["email"] == "[FILTERED]"));
    }
    // The dead letters of batches have what was sent.
    queue.wait_dead("refusing", 2).await;
    let tokens: std::collections::HashSet<String> = refusing
        .requests()
        .iter()
        .flat_map(Request::events)
        .map(|e| e["actor"]["email"].as_str().expect("a token").to_owned())
        .collect();
    assert!(tokens.len() == 3 && tokens.iter().all(|token| token.len() == 32), "{tokens:?}");
    let shown = setup.ok(&["dead", "show", "refusing", "@1"]);
    assert!(!shown.contains("@example.com") && shown.contains("\"email\":\""), "{shown}");
    eventually("all are settled", async || queue.backlog("other").await == 0).await;
    assert_eq!(other.count(), 0);
    let filtered = async |name: &str| {
        let series = format!("hooktrail_events_filtered_total{{subscriber=\"{name}\"}}");
        api.metric(&series).await
    };
    assert_eq!((filtered("some").await, filtered("other").await), (Some(2.0), Some(5.0)));
    // `where` knows why, and a replay shows no more than the daemon did.
    let history = || -> Vec<serde_json::Value> {
        let text = setup.ok(&["history", "--json"]);
        let all: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        all["events"].as_array().expect("events").clone()
    };
    eventually("all are in history", async || history().len() == 5).await;
    let admin = history().into_iter().find(|e| e["actor"]["type"] == "admin").expect("is there");
    let number = admin["number"].to_string();
    let went = setup.ok(&["where", &number]);
    assert!(went.contains("its key `match`, as it is today, does not match the event"), "{went}");
    let before = some.count();
    setup.ok(&["replay", "some", "--since", "1h", "--yes"]);
    eventually("it is sent again", async || some.accepted().len() == 6).await;
    let requests = some.requests();
    assert!(
        requests[before..]
            .iter()
            .all(|r| !String::from_utf8_lossy(&r.body).contains("@example.com"))
    );
    assert!(!daemon.log().contains("a key"));
    assert!(!setup.ok(&["check"]).contains("a key"));
}

async fn batches_keep_to_their_number_size_and_time(queue: Queue) {
    let few = Receiver::accepting().await;
    let small = Receiver::accepting().await;
    let patient = Receiver::accepting().await;
    let text = QUICK.to_owned()
        + &subscriber("few", &few.url, "batch = { max_events = 7 }")
        + &subscriber("small", &small.url, "batch = { max_bytes = \"2KiB\" }")
        + &subscriber("patient", &patient.url, "batch = { max_wait = \"3s\", max_events = 50 }");
    let setup = Setup::new(&queue, &text);
    let _daemon = setup.start().await;
    let start = Instant::now();
    queue.publish(TYPE, (0..60).map(event)).await;
    few.wait_all(60).await;
    small.wait_all(60).await;
    assert!(few.requests().iter().all(|r| r.events().len() <= 7));
    assert!(few.requests().iter().any(|r| r.events().len() == 7), "batches are filled");
    assert!(small.requests().iter().all(|r| r.body.len() <= 2048));
    assert!(
        small.requests().iter().any(|r| r.events().len() > 1),
        "and not smaller than they must be"
    );
    patient.wait_all(50).await;
    assert!(start.elapsed() < Duration::from_secs(3), "a full batch does not wait");
    patient.wait_all(60).await;
    assert!(start.elapsed() >= Duration::from_secs(3), "the rest waits for company");
    assert_eq!(patient.count(), 2);
}

async fn each_subscriber_gets_the_events_that_its_patterns_match(queue: Queue) {
    let users = Receiver::accepting().await;
    let all = Receiver::accepting().await;
    let text = QUICK.to_owned()
        + &subscriber("users", &users.url, "events = [\"activity_log.user.*\"]")
        + &subscriber("all", &all.url, "");
    let setup = Setup::new(&queue, &text);
    let _daemon = setup.start().await;
    queue.publish("activity_log.user.updated", [event(1)]).await;
    queue.publish("activity_log.billing.paid", [event(2)]).await;
    queue.publish("activity_log.user.role.changed", [event(3)]).await;
    eventually("three events at `all`", async || all.accepted().len() == 3).await;
    eventually("one event at `users`", async || users.accepted() == [1]).await;
    queue.wait_backlog("users", 0).await; // nothing else is kept for it
}

async fn a_failed_batch_comes_again_with_the_same_bytes_and_id_and_never_early(queue: Queue) {
    let receiver = Receiver::start(|_, n| status(if n < 2 { 503 } else { 200 })).await;
    let setup = Setup::new(
        &queue,
        &(QUICK.to_owned()
            + &subscriber("a", &receiver.url, "retry = { initial_interval = \"2s\" }")),
    );
    let daemon = setup.start().await;
    queue.publish(TYPE, (0..5).map(event)).await;
    let requests = receiver.wait_requests(3).await;
    for (n, request) in requests.iter().enumerate() {
        assert_eq!((request.id(), &request.body), (requests[0].id(), &requests[0].body));
        assert_eq!(request.attempt() as usize, n + 1);
        assert!(request.verified(), "the timestamp is the attempt's");
    }
    for pair in requests.windows(2) {
        let gap = pair[1].at.duration_since(pair[0].at).expect("in order");
        assert!(gap >= Duration::from_secs(2), "came after {gap:?}, before it was due");
    }
    queue.wait_empty("a").await;
    assert!(
        daemon.log().contains("outcome=\"retry\"")
            && daemon.log().contains("outcome=\"delivered\"")
    );
    assert_eq!(receiver.accepted(), numbers(0..5));
}

async fn retries_go_before_the_backlog(queue: Queue) {
    // The first batch fails once; then each request takes a while, so that a backlog stands when
    // its retry is due.
    let receiver = Receiver::start(|_, n| {
        if n == 0 { status(500) } else { status(200).after(Duration::from_millis(100)) }
    })
    .await;
    let setup = Setup::new(
        &queue,
        &(QUICK.to_owned() + &subscriber("a", &receiver.url, "batch = { max_events = 10 }")),
    );
    let _daemon = setup.start().await;
    queue.publish(TYPE, (0..400).map(event)).await;
    receiver.wait_all(400).await;
    let order: Vec<u32> = receiver.requests().iter().map(|r| r.attempt()).collect();
    let retry = order.iter().position(|a| *a == 2).expect("a second attempt");
    assert!(retry < 25, "the retry came as request {retry} of {}", order.len());
}

async fn retry_after_holds_the_batch_and_the_lane(queue: Queue) {
    let date = || httpdate::fmt_http_date(SystemTime::now() + Duration::from_secs(4));
    let seconds =
        Receiver::start(
            |_, n| if n == 0 { status(429).header("retry-after", "3") } else { status(200) },
        )
        .await;
    let dated = Receiver::start(move |_, n| {
        if n == 0 { status(503).header("retry-after", date()) } else { status(200) }
    })
    .await;
    let text = QUICK.to_owned()
        + &subscriber("seconds", &seconds.url, "")
        + &subscriber("dated", &dated.url, "");
    let setup = Setup::new(&queue, &text);
    let _daemon = setup.start().await;
    queue.publish(TYPE, [event(0)]).await;
    seconds.wait_requests(1).await;
    dated.wait_requests(1).await;
    queue.publish(TYPE, [event(1)]).await;
    for (receiver, least) in [(&seconds, 3000), (&dated, 3000)] {
        receiver.wait_all(2).await;
        let requests = receiver.requests();
        let gap = requests[1].at.duration_since(requests[0].at).expect("in order");
        assert!(gap >= Duration::from_millis(least), "another request after {gap:?}");
    }
}

async fn an_exhausted_batch_is_a_dead_letter_with_its_story_and_can_be_replayed(queue: Queue) {
    let receiver = Receiver::start(|_, _| status(500).body("the database is\ndown")).await;
    let setup = Setup::new(
        &queue,
        &(QUICK.to_owned() + &subscriber("a", &receiver.url, "retry = { max_attempts = 2 }")),
    );
    let _daemon = setup.start().await;
    queue.publish(TYPE, (0..3).map(event)).await;
    queue.wait_dead("a", 1).await;
    let first = receiver.requests()[0].clone();
    assert_eq!(receiver.count(), 2);

    let listed: serde_json::Value =
        serde_json::from_str(&setup.ok(&["dead", "list", "a", "--json"])).expect("one JSON line");
    for (key, expected) in [
        ("id", serde_json::json!(first.id())),
        ("kind", "batch".into()),
        ("reason", "exhausted".into()),
        ("status", 500.into()),
        ("attempts", 2.into()),
        ("events", 3.into()),
        ("error", "status 500: the database is down".into()),
    ] {
        assert_eq!(listed[key], expected, "{key} in {listed}");
    }
    let shown: serde_json::Value =
        serde_json::from_str(&setup.ok(&["dead", "show", "a", first.id(), "--json"]))
            .expect("JSON");
    assert_eq!(
        shown["body"].as_str().map(str::as_bytes),
        Some(&first.body[..]),
        "the exact request body"
    );
    assert!(setup.ok(&["dead", "list", "a"]).contains("exhausted"));
    assert_eq!(
        setup.ok(&["dead", "export", "a", "--json"]),
        setup.ok(&["dead", "export", "a"]),
        "both are JSON Lines"
    );
    assert!(setup.ok(&["dead", "replay", "a", "--dry-run"]).contains("would queue 1 of 1"));
    assert_eq!(queue.dead("a").await, 1, "looking takes nothing away");

    receiver.now(|_, _| status(200));
    assert!(setup.ok(&["dead", "replay", "a"]).contains("queued 1 of 1"));
    let again = receiver.wait_requests(3).await[2].clone();
    assert_eq!(
        (again.id(), &again.body, again.attempt()),
        (first.id(), &first.body, 1),
        "the same request, attempts counted from 1"
    );
    queue.wait_dead("a", 0).await;
}

fn a_dead_letter_on_the_broker_is_the_body_with_the_promised_headers() {
    run(async {
        let broker = Broker::shared();
        let receiver = Receiver::start(|_, _| status(500)).await;
        let setup = Setup::new(
            &broker,
            &(QUICK.to_owned()
                + &subscriber(
                    "a",
                    &receiver.url,
                    "format = \"jsonl\"\nretry = { max_attempts = 1 }",
                )),
        );
        let daemon = setup.start().await;
        broker.publish(TYPE, [event(1)]).await;
        broker.wait_depth("sub.a.dead", 1).await;
        let letter = broker.take("sub.a.dead").await.expect("a dead letter");
        assert_eq!(letter.data, receiver.requests()[0].body);
        assert_eq!(
            letter.properties.content_type().as_ref().map(|t| t.as_str()),
            Some("application/jsonl")
        );
        let headers = letter.properties.headers().clone().expect("headers");
        // The broker adds one of its own to a message that was read before.
        let names: Vec<&str> = headers
            .inner()
            .keys()
            .map(|k| k.as_str())
            .filter(|k| *k != "x-delivery-count")
            .collect();
        let expected = [
            "attempts",
            "batch-id",
            "died-at",
            "error",
            "event-prints",
            "events",
            "first-attempt-at",
            "kind",
            "reason",
            "status",
            "story",
        ];
        assert_eq!(names, expected.map(|n| format!("x-hooktrail-{n}")));
        assert!(daemon.log().contains("outcome=\"dead_letter\""));
    });
}

async fn purge_deletes_only_what_is_chosen_and_only_when_told(queue: Queue) {
    let receiver = Receiver::start(|_, _| status(500)).await;
    let setup = Setup::new(
        &queue,
        &(QUICK.to_owned()
            + &subscriber(
                "a",
                &receiver.url,
                "batch = { max_events = 1 }\nretry = { max_attempts = 1 }",
            )),
    );
    let _daemon = setup.start().await;
    queue.publish(TYPE, [event(0), "not json".to_owned(), event(1)]).await;
    queue.wait_dead("a", 3).await;
    let order = setup.ok(&["dead", "list", "a"]);
    setup.ok(&["dead", "show", "a", "@1"]);
    assert_eq!(setup.ok(&["dead", "list", "a"]), order, "looking changes no order");
    let refused = setup.run(&["dead", "purge", "a"]);
    assert_eq!(refused.status.code(), Some(2), "no terminal to ask at");
    assert!(String::from_utf8_lossy(&refused.stderr).contains("--yes"));
    assert!(
        setup
            .ok(&["dead", "purge", "a", "--reason", "invalid_event", "--yes"])
            .contains("purged 1 of 3")
    );
    queue.wait_dead("a", 2).await;
    assert!(setup.ok(&["dead", "purge", "a", "@1", "--yes"]).contains("purged 1 of 2"));
    assert!(setup.ok(&["dead", "purge", "a", "--yes", "--json"]).contains("\"chosen\":1"));
    queue.wait_dead("a", 0).await;
    assert!(setup.ok(&["dead", "list", "a"]).contains("no dead letters"));
}

async fn an_argument_is_an_id_and_only_with_its_sign_a_number(queue: Queue) {
    let setup =
        Setup::new(&queue, &(QUICK.to_owned() + &subscriber("a", "http://127.0.0.1:9/", "")));
    let _daemon = setup.start().await;
    // Producers choose the ids of events: here each reads like the number of another.
    for (n, id) in (1..).zip(["3", "1", "2", "@4"]) {
        queue.publish_as(id, TYPE, b"bad").await;
        queue.wait_dead("a", n).await;
    }
    let ids = || -> Vec<String> {
        setup.dead("a").iter().map(|l| l["id"].as_str().expect("an id").to_owned()).collect()
    };
    let listed = setup.ok(&["dead", "list", "a"]);
    for (line, start) in listed.lines().skip(1).zip(["@1 ", "@2 ", "@3 ", "@4 "]) {
        assert!(line.trim_start().starts_with(start), "{listed}");
    }
    assert!(setup.ok(&["dead", "show", "a", "2"]).starts_with("number            @3\n"));
    assert!(setup.ok(&["dead", "show", "a", "@2"]).contains("\nid                1\n"));
    assert!(
        setup.ok(&["dead", "replay", "a", "1", "@1", "--dry-run"]).contains("would queue 2 of 4")
    );
    assert!(setup.ok(&["dead", "purge", "a", "2", "--yes"]).contains("purged 1 of 4"));
    assert_eq!(ids(), ["3", "1", "@4"]);
    assert!(setup.ok(&["dead", "purge", "a", "@2", "--yes"]).contains("purged 1 of 3"));
    assert_eq!(ids(), ["3", "@4"]);
    for (arguments, part) in [
        (&["show", "a", "2"][..], "no dead letter has the id `2`;"),
        (&["list", "a", "@3"], "no dead letter is @3;"),
        (
            &["purge", "a", "@4", "1", "--yes"],
            "no dead letter is @4, no dead letter has the id `1`;",
        ),
        (
            &["replay", "a", "3", "--reason", "exhausted"],
            "no dead letter with reason exhausted has the id `3`;",
        ),
    ] {
        let output = setup.run(&[&["dead"], arguments].concat());
        assert_eq!(output.status.code(), Some(1), "{arguments:?}");
        let reported = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(
            reported.contains(part) && reported.contains("a number is written @2"),
            "{arguments:?}: {reported}"
        );
    }
    assert_eq!(ids(), ["3", "@4"], "nothing else was touched");
}

async fn a_hanging_subscriber_does_not_slow_another(queue: Queue) {
    let hanging = Receiver::start(|_, _| status(200).after(Duration::from_secs(3600))).await;
    let good = Receiver::accepting().await;
    let text = QUICK.to_owned()
        + &subscriber("hanging", &hanging.url, "http = { concurrency = 4 }")
        + &subscriber("good", &good.url, "");
    let setup = Setup::new(&queue, &text);
    let mut daemon = setup.start().await;
    queue.publish(TYPE, (0..200).map(event)).await;
    hanging.wait_requests(1).await;
    good.wait_all(200).await;
    let start = Instant::now();
    queue.publish(TYPE, (200..400).map(event)).await;
    good.wait_all(400).await;
    assert!(
        start.elapsed() < Duration::from_secs(5),
        "took {:?} next to a receiver that never answers",
        start.elapsed()
    );
    assert_eq!(good.accepted(), numbers(0..400));
    daemon.terminate();
    assert!(daemon.is_running(), "the hanging request gets its time");
    drop(hanging);
    assert!(daemon.wait().await.success());
}

async fn while_the_circuit_is_open_the_backlog_stays_in_the_queue(queue: Queue) {
    let receiver = Receiver::start(|_, _| status(500)).await;
    let more = "batch = { max_events = 10 }\ncircuit_breaker = { failures = 3, open_for = \"2s\", max_open_for = \"60s\" }\nretry = { initial_interval = \"60s\" }";
    let setup = Setup::new(&queue, &(QUICK.to_owned() + &subscriber("a", &receiver.url, more)));
    let daemon = setup.start().await;
    queue.publish(TYPE, (0..500).map(event)).await;
    daemon.wait_log("circuit open:").await;
    // The open lane's unsettled events are back, in their order: all but the three failed batches.
    queue.wait_backlog("a", 470).await;
    assert_eq!(receiver.count(), 3);
    daemon.wait_log("circuit open again").await;
    queue.wait_backlog("a", 468).await;
    assert_eq!(receiver.count(), 4, "one probe of one small batch");
    receiver.now(|_, _| status(200));
    daemon.wait_log("circuit closed").await;
    eventually("the backlog is delivered", async || receiver.accepted().len() == 468).await;
    assert_eq!(receiver.accepted(), numbers(32..500));
}

async fn after_an_outage_requests_at_once_and_events_in_a_batch_grow_with_each_success(
    queue: Queue,
) {
    const TAKES: Duration = Duration::from_millis(150);
    let receiver = Receiver::start(|_, _| status(503)).await;
    let more = "batch = { max_events = 80 }\nhttp = { concurrency = 4 }\ncircuit_breaker = { failures = 1, open_for = \"2s\" }\nretry = { initial_interval = \"1h\" }";
    let setup = Setup::new(&queue, &(QUICK.to_owned() + &subscriber("a", &receiver.url, more)));
    let daemon = setup.start().await;
    queue.publish(TYPE, (0..3000).map(event)).await;
    daemon.wait_log("circuit open").await;
    receiver.now(|_, _| status(200).after(TAKES));
    eventually("most of the backlog is delivered", async || receiver.accepted().len() > 2000).await;
    let up: Vec<_> = receiver.requests().into_iter().filter(|r| r.status == 200).collect();
    let (mut at_once, mut largest) = (0, 0);
    for request in &up {
        // Attempts that began before, and answers from before.
        let begun = up.iter().filter(|r| r.at <= request.at).count();
        let answered = up.iter().filter(|r| r.at + TAKES <= request.at).count();
        // The probe closes the circuit, the successes after it double both.
        let ramp = 1 << answered.saturating_sub(1).min(8);
        assert!(
            begun - answered <= ramp.min(4),
            "{} at once after {answered} successes",
            begun - answered
        );
        assert!(
            request.numbers().len() <= (10 * ramp).min(80),
            "{} events after {answered} successes",
            request.numbers().len()
        );
        at_once = at_once.max(begun - answered);
        largest = largest.max(request.numbers().len());
    }
    assert_eq!((at_once, largest), (4, 80), "then all that is configured");
}

async fn an_event_that_is_too_large_is_one_dead_letter_however_often_the_lane_starts_over(
    queue: Queue,
) {
    let receiver = Receiver::start(|_, _| status(500)).await;
    let more = "batch = { max_events = 5, max_bytes = \"3KiB\" }\ncircuit_breaker = { failures = 1, open_for = \"1s\", max_open_for = \"1s\" }\nretry = { initial_interval = \"60s\" }";
    let setup = Setup::new(&queue, &(QUICK.to_owned() + &subscriber("a", &receiver.url, more)));
    let daemon = setup.start().await;
    let large = format!(r#"{{"event":"a","n":99,"pad":"{}"}}"#, "x".repeat(4096));
    queue.publish(TYPE, (0..20).map(event).chain([large]).chain((20..30).map(event))).await;
    eventually("the circuit opens a third time", async || {
        daemon.log().matches("circuit open again").count() >= 2
    })
    .await;
    receiver.now(|_, _| status(200));
    eventually("the rest is delivered", async || receiver.accepted().contains(&29)).await;
    queue.wait_backlog("a", 0).await;
    assert_eq!(queue.dead("a").await, 1);
    assert_eq!(setup.dead("a")[0]["reason"], "too_large");
    let failed = receiver
        .requests()
        .iter()
        .filter(|r| r.status == 500)
        .map(|r| r.numbers().len() as u64)
        .sum();
    assert_eq!(receiver.accepted(), numbers(failed..30), "the others in order, each once");
}

async fn all_signature_schemes_stand_side_by_side(queue: Queue) {
    let receiver = Receiver::accepting().await;
    let more = r#"signatures = ["standard-webhooks", "mailtrap", { header = "X-Hub-Signature-256", prefix = "sha256=", encoding = "hex" }]"#;
    let setup = Setup::new(&queue, &(QUICK.to_owned() + &subscriber("a", &receiver.url, more)));
    let _daemon = setup.start().await;
    queue.publish(TYPE, [event(1)]).await;
    let request = receiver.wait_requests(1).await.remove(0);
    assert!(request.verified());
    // The result of an independent implementation for the same body and key.
    let openssl = std::process::Command::new("openssl")
        .args(["dgst", "-sha256", "-hmac", SECRET])
        .arg(setup.write("body", &request.body))
        .output()
        .expect("openssl runs");
    let text = String::from_utf8(openssl.stdout).expect("text");
    let mac = text.trim().rsplit(' ').next().expect("a digest");
    assert_eq!(mac.len(), 64, "{text}");
    assert_eq!(request.header("mailtrap-signature"), mac);
    assert_eq!(request.header("x-hub-signature-256"), format!("sha256={mac}"));
}

fn what_is_requeued_while_the_prefetch_grows_keeps_its_order() {
    run(async {
        let queue = Queue::amqp();
        let receiver = Receiver::start(|_, _| status(500)).await;
        let more = "batch = { max_events = 5 }\ncircuit_breaker = { failures = 1, open_for = \"1s\", max_open_for = \"1s\" }\nretry = { initial_interval = \"60s\" }";
        let setup = Setup::new(&queue, &(QUICK.to_owned() + &subscriber("a", &receiver.url, more)));
        let daemon = setup.start().await;
        // Its first consumer takes 16, and the next one 20 besides.
        queue.publish(TYPE, (0..60).map(event)).await;
        eventually("the circuit opens a fourth time", async || {
            daemon.log().matches("circuit open again").count() >= 3
        })
        .await;
        receiver.now(|_, _| status(200));
        eventually("the rest is delivered", async || receiver.accepted().contains(&59)).await;
        queue.wait_backlog("a", 0).await;
        let requests = receiver.requests();
        let first: Vec<u64> =
            requests.iter().filter(|r| r.attempt() == 1).flat_map(|r| r.numbers()).collect();
        assert_eq!(first, numbers(0..60), "first attempts, in order, each once");
    });
}

fn several_daemons_share_the_work() {
    run(async {
        let broker = Broker::shared();
        let receiver = Receiver::start(|_, _| status(200).after(Duration::from_millis(20))).await;
        let setup = Setup::new(
            &broker,
            &(QUICK.to_owned() + &subscriber("a", &receiver.url, "batch = { max_events = 10 }")),
        );
        let (one, two) = (setup.start().await, setup.start().await);
        broker.publish(TYPE, (0..1000).map(event)).await;
        receiver.wait_all(1000).await;
        let mut accepted = receiver.accepted();
        accepted.sort_unstable();
        assert_eq!(accepted, numbers(0..1000), "each event once");
        for daemon in [one, two] {
            assert!(
                daemon.log().matches("outcome=\"delivered\"").count() > 10,
                "both took a share"
            );
            assert!(daemon.stop().await.success());
        }
    });
}

fn events_of_a_source_queue_are_relayed_by_their_type() {
    run(async {
        let broker = Broker::shared();
        let receiver = Receiver::accepting().await;
        let (connection, channel) = broker.channel().await;
        let source = format!("{}.source", broker.prefix);
        let options = lapin::options::QueueDeclareOptions { durable: true, ..Default::default() };
        channel
            .queue_declare(source.as_str().into(), options, Default::default())
            .await
            .expect("declares");
        let text = format!(
            "[queue]\nurl = \"{}\"\nsource_queue = \"{source}\"\nprefix = \"{}\"\n",
            broker.url, broker.prefix
        );
        broker.knows("a");
        let setup = Setup::with_text(
            &(text + QUICK + &subscriber("a", &receiver.url, "events = [\"activity_log.user.*\"]")),
        );
        let mut events: Vec<String> = (0..50).map(event).collect();
        events.push("not an event".to_owned());
        events.push(r#"{"event":"nobody.wants.this"}"#.to_owned());
        events.extend((50..100).map(event));
        broker.publish_to("", &source, events).await;
        let daemon = setup.start().await;
        receiver.wait_all(100).await;
        assert_eq!(receiver.accepted(), numbers(0..100), "in order, each once");
        broker.wait_depth("orphans", 1).await;
        let invalid = broker.take("orphans").await.expect("the invalid one");
        assert_eq!(invalid.data, b"not an event");
        broker.wait_depth("source", 0).await;
        daemon.wait_log("events that no subscriber's pattern matches").await;
        // An event for a subscriber is not acked while the subscriber's queue is missing.
        channel
            .queue_delete(format!("{}.sub.a", broker.prefix).as_str().into(), Default::default())
            .await
            .expect("deletes");
        broker.publish_to("", &source, (100..200).map(event)).await;
        receiver.wait_all(200).await;
        assert!(daemon.stop().await.success());
        channel.queue_delete(source.as_str().into(), Default::default()).await.expect("deletes");
        connection.close(200, "done".into()).await.expect("closes");
    });
}

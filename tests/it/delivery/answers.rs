//! The effect of each answer of a receiver, and pausing.

use std::{
    collections::{BTreeSet, HashSet},
    time::{Duration, SystemTime},
};

use serde_json::json;
use tokio::sync::watch;

use crate::support::{
    api::Api,
    broker::{Broker, kill},
    daemon::{QUICK, Setup, subscriber},
    eventually, free_port,
    queue::{Queue, Section as _, on_both_queues},
    receiver::{Answer, Receiver, Request, event, status},
    run, tests_that_need,
};

on_both_queues!(
    one_refused_event_of_500_is_found_in_few_requests_and_the_rest_arrives,
    several_refused_events_are_found_in_json_lines_too,
    who_refuses_everything_from_the_start_gets_the_whole_batch_again,
    who_begins_to_refuse_everything_costs_no_event,
    a_batch_that_is_too_large_is_halved_down_to_one_event,
    a_410_pauses_the_subscriber_over_restarts_until_it_is_resumed,
    an_exhausted_batch_can_pause_the_subscriber_instead,
    an_operator_pauses_and_resumes,
    a_retry_after_that_is_a_date_holds_the_lane_for_at_most_max_open_for,
    an_event_gets_the_producers_id_when_it_has_none,
    batches_that_always_fail_do_not_keep_new_events_away,
    a_wish_to_wait_that_ends_after_the_schedule_costs_no_attempt,
    a_late_failure_of_the_url_before_says_nothing_of_the_one_that_is_configured,
    a_pause_and_a_resume_are_heard_while_the_circuit_is_open_and_while_a_retry_after_holds,
    attempts_from_before_the_circuit_opened_are_no_probes,
    a_dead_letter_has_its_reason_in_the_log,
);

tests_that_need!(broker: a_pause_holds_on_every_daemon_of_the_broker);

const TYPE: &str = "activity_log.user.updated";

/// A port of its own, so that `pause` and `resume` find the daemon.
fn admin() -> String {
    format!("\n[admin]\nlisten = \"127.0.0.1:{}\"\n", free_port())
}

/// Refuses what holds one of these.
fn refusing(bad: &'static [u64]) -> impl Fn(&Request, usize) -> Answer + Send + Sync + 'static {
    |request, _| {
        let refused = request.numbers().into_iter().find(|n| bad.contains(n));
        refused.map_or(status(200), |_| status(422).body("field `actor` is\nmissing \u{1b}[31m"))
    }
}

/// The accepted numbers, and that none came twice.
fn accepted_once(receiver: &Receiver) -> BTreeSet<u64> {
    let accepted = receiver.accepted();
    let set: BTreeSet<u64> = accepted.iter().copied().collect();
    assert_eq!(set.len(), accepted.len(), "some came twice");
    set
}

async fn one_refused_event_of_500_is_found_in_few_requests_and_the_rest_arrives(queue: Queue) {
    let receiver = Receiver::start(refusing(&[333])).await;
    let more = "batch = { max_wait = \"2s\" }\ncircuit_breaker = { failures = 1 }";
    let setup = Setup::new(&queue, &(QUICK.to_owned() + &subscriber("a", &receiver.url, more)));
    let daemon = setup.start().await;
    queue.publish(TYPE, [event(1000)]).await;
    receiver.wait_requests(1).await;
    queue.publish(TYPE, (0..500).map(event)).await;
    eventually("one dead letter", async || queue.dead("a").await == 1).await;
    eventually("the rest accepted", async || receiver.accepted().len() == 500).await;
    queue.wait_backlog("a", 0).await;
    assert_eq!(accepted_once(&receiver), (0..500).filter(|n| *n != 333).chain([1000]).collect());

    let requests = receiver.requests().split_off(1);
    let most = 2.0 * 500_f64.log2() + 2.0;
    assert!(requests.len() as f64 <= most, "{} requests, more than {most}", requests.len());
    let whole = &requests[0];
    assert_eq!(whole.events().len(), 500, "one batch");
    let ids: HashSet<&str> = requests.iter().map(Request::id).collect();
    assert_eq!(ids.len(), requests.len(), "each part has an id of its own");
    for part in &requests[1..] {
        let path = part
            .id()
            .strip_prefix(whole.id())
            .and_then(|rest| rest.strip_prefix('_'))
            .expect("derived from its parent's");
        assert!(path.bytes().all(|b| b == b'0' || b == b'1') && !part.id().contains('.'), "{path}");
        assert!(part.verified() && part.attempt() == 1, "{part:?}");
        let events: Vec<String> = part.numbers().into_iter().map(event).collect();
        assert_eq!(part.body, format!("{{\"events\":[{}]}}", events.join(",")), "byte for byte");
    }

    let dead = setup.dead("a").remove(0);
    assert_eq!(
        (&dead["reason"], &dead["status"], &dead["events"]),
        (&json!("refused"), &json!(422), &json!(1)),
        "{dead}"
    );
    let error = dead["error"].as_str().expect("a text");
    assert!(
        error.contains("422")
            && error.contains("field `actor` is missing")
            && !error.contains('\u{1b}'),
        "{error}"
    );
    let log = daemon.log();
    assert!(!log.contains("circuit open"), "the parts' answers count for nothing: {log}");
    assert!(!log.contains("actor"), "what the receiver wrote is not in the log");
    assert_eq!(log.matches("outcome=\"split\"").count(), 9, "{log}");

    receiver.now(|_, _| status(200));
    setup.ok(&["dead", "replay", "a"]);
    receiver.wait_requests(requests.len() + 2).await;
    assert!(accepted_once(&receiver).contains(&333));
}

async fn several_refused_events_are_found_in_json_lines_too(queue: Queue) {
    let receiver = Receiver::start(refusing(&[0, 1, 57, 99])).await;
    let more = "format = \"jsonl\"\nbatch = { max_wait = \"2s\", max_events = 100 }";
    let setup = Setup::new(&queue, &(QUICK.to_owned() + &subscriber("a", &receiver.url, more)));
    let _daemon = setup.start().await;
    queue.publish(TYPE, (1000..1100).map(event)).await;
    receiver.wait_requests(1).await;
    queue.publish(TYPE, (0..100).map(event)).await;
    eventually("four dead letters", async || queue.dead("a").await == 4).await;
    eventually("the rest accepted", async || receiver.accepted().len() == 196).await;
    let expected = (0..100).filter(|n| ![0, 1, 57, 99].contains(n)).chain(1000..1100);
    assert_eq!(accepted_once(&receiver), expected.collect());
    assert!(setup.dead("a").iter().all(|d| d["reason"] == "refused" && d["events"] == 1));
}

async fn who_refuses_everything_from_the_start_gets_the_whole_batch_again(queue: Queue) {
    let receiver = Receiver::start(|_, n| status(if n < 3 { 400 } else { 200 })).await;
    let setup = Setup::new(&queue, &(QUICK.to_owned() + &subscriber("a", &receiver.url, "")));
    let _daemon = setup.start().await;
    queue.publish(TYPE, (0..20).map(event)).await;
    receiver.wait_all(20).await;
    queue.wait_backlog("a", 0).await;
    assert_eq!(accepted_once(&receiver).len(), 20);
    let requests = receiver.requests();
    for request in &requests {
        let first = requests.iter().find(|r| r.id() == request.id()).expect("itself");
        assert_eq!(request.body, first.body);
        assert!(!request.id()[4..].contains('_'), "not taken apart");
    }
    assert_eq!(queue.dead("a").await, 0);
}

async fn who_begins_to_refuse_everything_costs_no_event(queue: Queue) {
    let receiver = Receiver::start(|_, n| status(if n == 0 { 200 } else { 400 })).await;
    let more = "batch = { max_wait = \"2s\", max_events = 300 }";
    let setup = Setup::new(&queue, &(QUICK.to_owned() + &subscriber("a", &receiver.url, more)));
    let daemon = setup.start().await;
    queue.publish(TYPE, [event(1000)]).await;
    receiver.wait_requests(1).await;
    queue.publish(TYPE, (0..300).map(event)).await;
    daemon.wait_log("outcome=\"retry\"").await;
    assert_eq!(queue.dead("a").await, 0, "nothing was accepted, so it may not be the events");
    receiver.now(|_, _| status(200));
    eventually("all accepted", async || receiver.accepted().len() == 301).await;
    assert_eq!(accepted_once(&receiver).len(), 301);
    assert_eq!(queue.dead("a").await, 0);
}

async fn a_batch_that_is_too_large_is_halved_down_to_one_event(queue: Queue) {
    let receiver = Receiver::start(|r, _| {
        status(if r.events().len() > 10 || r.numbers().contains(&7) { 413 } else { 200 })
    })
    .await;
    let more = "batch = { max_wait = \"2s\", max_events = 80 }\ncircuit_breaker = { failures = 1 }";
    let setup = Setup::new(&queue, &(QUICK.to_owned() + &subscriber("a", &receiver.url, more)));
    let daemon = setup.start().await;
    queue.publish(TYPE, (0..80).map(event)).await;
    eventually("one dead letter", async || queue.dead("a").await == 1).await;
    eventually("the rest accepted", async || receiver.accepted().len() == 79).await;
    assert_eq!(accepted_once(&receiver).len(), 79);
    let dead = setup.dead("a").remove(0);
    assert_eq!(
        (&dead["reason"], &dead["status"], &dead["events"]),
        (&json!("too_large"), &json!(413), &json!(1)),
        "{dead}"
    );
    assert!(!daemon.log().contains("circuit open"));
}

async fn a_410_pauses_the_subscriber_over_restarts_until_it_is_resumed(queue: Queue) {
    let gone = Receiver::start(|_, n| status(if n == 0 { 503 } else { 410 })).await;
    let good = Receiver::accepting().await;
    let text = QUICK.to_owned()
        + &admin()
        + &subscriber("gone", &gone.url, "")
        + &subscriber("good", &good.url, "");
    let setup = Setup::new(&queue, &text);
    let daemon = setup.start().await;
    queue.publish(TYPE, (0..5).map(event)).await;
    daemon.wait_log("paused: its events wait").await;
    let first = gone.requests();
    assert_eq!(first.len(), 2);
    queue.publish(TYPE, (5..10).map(event)).await;
    good.wait_all(10).await;
    queue.wait_backlog("gone", 5).await;
    queue.wait_retries_ready("gone", 1).await;
    assert_eq!(queue.dead("gone").await, 0);
    assert!(daemon.stop().await.success());

    let daemon = setup.start().await;
    daemon.wait_log("paused: its events wait").await;
    queue.publish(TYPE, (10..12).map(event)).await;
    good.wait_all(12).await;
    assert_eq!(gone.count(), 2, "nothing was sent");

    gone.now(|_, _| status(200));
    let said = setup.ok(&["resume", "gone"]);
    assert!(said.contains("`gone` is resumed"), "{said}");
    gone.wait_all(12).await;
    let again = &gone.requests()[2];
    assert_eq!((again.id(), &again.body), (first[0].id(), &first[0].body), "the same batch");
    assert_eq!(again.attempt(), 1, "its attempts count from 1");
    assert_eq!(accepted_once(&gone).len(), 12);
    assert!(setup.ok(&["resume", "gone"]).contains("was not paused"));
}

async fn an_exhausted_batch_can_pause_the_subscriber_instead(queue: Queue) {
    let receiver = Receiver::start(|_, _| status(500)).await;
    let more = "retry = { max_attempts = 3, on_exhausted = \"pause\", initial_interval = \"1s\" }";
    let setup =
        Setup::new(&queue, &(QUICK.to_owned() + &admin() + &subscriber("a", &receiver.url, more)));
    let daemon = setup.start().await;
    queue.publish(TYPE, [event(0)]).await;
    daemon.wait_log("paused: its events wait").await;
    assert_eq!(receiver.requests().iter().map(Request::attempt).collect::<Vec<_>>(), [1, 2, 3]);
    assert!(
        daemon.log().contains(
            "attempt 3 of a batch failed and was the last that [retry] allows: status 500"
        ),
        "{}",
        daemon.log()
    );
    let said = setup.ok(&["resume", "a"]);
    assert!(said.contains("is resumed"), "{said}");
    let requests = receiver.wait_requests(6).await;
    assert_eq!(
        requests[3..].iter().map(Request::attempt).collect::<Vec<_>>(),
        [1, 2, 3],
        "attempts count from 1"
    );
    assert_eq!(requests.iter().map(Request::id).collect::<HashSet<_>>().len(), 1);
    eventually("paused again", async || {
        daemon.log().matches("paused: its events wait").count() == 2
    })
    .await;
    assert_eq!(queue.dead("a").await, 0);
}

async fn an_operator_pauses_and_resumes(queue: Queue) {
    let receiver = Receiver::accepting().await;
    let text = QUICK.to_owned()
        + &admin()
        + &subscriber("a", &receiver.url, "")
        + &subscriber("b", &receiver.url, "paused = true");
    let setup = Setup::new(&queue, &text);
    let alone = setup.run(&["pause", "a"]);
    let reported = String::from_utf8_lossy(&alone.stderr).into_owned();
    assert!(
        alone.status.code() == Some(1) && reported.contains("no daemon answers at 127.0.0.1:"),
        "{reported}"
    );
    let daemon = setup.start().await;
    let said = setup.ok(&["pause", "a", "--why", "maintenance \u{1b}[2J of theirs"]);
    assert!(said.contains("by operator: maintenance \\u{1b}[2J of theirs"), "{said}");
    daemon.wait_log("by=\"operator\"").await;
    let again = setup.ok(&["pause", "a", "--why", "another reason"]);
    assert!(again.contains("was paused already") && again.contains("another reason"), "{again}");
    queue.publish(TYPE, (0..5).map(event)).await;
    queue.wait_backlog("a", 5).await;
    queue.wait_backlog("b", 5).await;
    assert_eq!(receiver.count(), 0);
    setup.ok(&["resume", "a"]);
    receiver.wait_all(5).await;
    queue.wait_backlog("a", 0).await;
    queue.wait_backlog("b", 5).await;
    for (arguments, code, part) in [
        (&["resume", "b"][..], 1, "paused by the configuration"),
        (&["pause", "nobody"], 2, "no subscriber `nobody`"),
        (&["resume"], 2, "SUBSCRIBER"),
    ] {
        let output = setup.run(arguments);
        let reported = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(
            output.status.code() == Some(code) && reported.contains(part),
            "{arguments:?}: {reported}"
        );
    }
}

async fn a_retry_after_that_is_a_date_holds_the_lane_for_at_most_max_open_for(queue: Queue) {
    let receiver = Receiver::start(|_, n| match n {
        0 => status(503).header(
            "retry-after",
            httpdate::fmt_http_date(SystemTime::now() + Duration::from_secs(5)),
        ),
        _ => status(200),
    })
    .await;
    let more = "circuit_breaker = { open_for = \"1s\", max_open_for = \"2s\" }";
    let setup = Setup::new(&queue, &(QUICK.to_owned() + &subscriber("a", &receiver.url, more)));
    let _daemon = setup.start().await;
    queue.publish(TYPE, [event(0)]).await;
    receiver.wait_requests(1).await;
    queue.publish(TYPE, [event(1)]).await;
    let requests = receiver.wait_requests(3).await;
    let after =
        |n: usize| requests[n].at.duration_since(requests[0].at).expect("later").as_secs_f64();
    assert_eq!((requests[1].numbers(), requests[2].numbers()), (vec![1], vec![0]));
    assert!((2.0..4.0).contains(&after(1)), "the lane was held for max_open_for: {}", after(1));
    // A date has whole seconds.
    assert!(after(2) >= 4.0, "the batch was held as long as was asked for: {}", after(2));
}

async fn an_event_gets_the_producers_id_when_it_has_none(queue: Queue) {
    let with = Receiver::accepting().await;
    let without = Receiver::accepting().await;
    let text = QUICK.to_owned()
        + &subscriber("with", &with.url, "event_ids = true")
        + &subscriber("without", &without.url, "");
    let setup = Setup::new(&queue, &text);
    let _daemon = setup.start().await;
    let plain = "{ \"event\":\"a.b\",\"n\":1,\"big\":18446744073709551616 }";
    let own = r#"{"event":"a.b","n":2,"event_id":"mine"}"#;
    queue.publish_as("id-1", "a.b", plain.as_bytes()).await;
    queue.publish_as("id-2", "a.b", own.as_bytes()).await;
    eventually("both", async || with.accepted().len() == 2 && without.accepted().len() == 2).await;
    let bodies = |r: &Receiver| {
        r.requests()
            .iter()
            .map(|r| String::from_utf8_lossy(&r.body).into_owned())
            .collect::<String>()
    };
    assert!(
        bodies(&with).contains(
            "{ \"event\":\"a.b\",\"n\":1,\"big\":18446744073709551616 ,\"event_id\":\"id-1\"}"
        ),
        "{}",
        bodies(&with)
    );
    assert!(
        bodies(&with).contains(own)
            && bodies(&without).contains(plain)
            && bodies(&without).contains(own)
    );
    assert!(with.requests().iter().all(Request::verified));
}

async fn batches_that_always_fail_do_not_keep_new_events_away(queue: Queue) {
    const BAD: u64 = 36;
    let is_bad = |n: &u64| n.is_multiple_of(2) && *n < 2 * BAD;
    let receiver = Receiver::start(move |request, _| {
        status(if request.numbers().iter().any(is_bad) { 500 } else { 200 })
    })
    .await;
    let more = "batch = { max_events = 1, max_wait = \"0s\" }\n\
                circuit_breaker = { failures = 3, open_for = \"1s\", max_open_for = \"10m\" }";
    let setup = Setup::new(&queue, &(QUICK.to_owned() + &subscriber("a", &receiver.url, more)));
    let daemon = setup.start().await;
    queue.publish(TYPE, (0..2 * BAD).map(event)).await;
    eventually("each was tried", async || {
        receiver.requests().iter().filter(|r| r.attempt() == 1).count() as u64 == 2 * BAD
    })
    .await;
    // One of the bad ones is always due, and nothing new comes: each probe from here on is one.
    let probes = || {
        let log = daemon.log();
        let open_for = |line: &str| line.split("open_for_s=").nth(1).map(|s| s.trim().to_owned());
        log.lines()
            .filter(|l| l.contains("circuit open again"))
            .filter_map(open_for)
            .collect::<Vec<_>>()
    };
    let before = probes().len() + 1;
    eventually("four more probes", async || probes().len() >= before + 4).await;
    let open_for: BTreeSet<String> = probes().split_off(before).into_iter().collect();
    assert_eq!(open_for.len(), 1, "they say more of themselves than of the endpoint: {open_for:?}");
    let published = SystemTime::now();
    queue.publish(TYPE, (2 * BAD..2 * BAD + 60).map(event)).await;
    eventually("all new ones accepted", async || receiver.accepted().len() as u64 == BAD + 60)
        .await;
    let took = published.elapsed().expect("later");
    assert!(
        took < Duration::from_secs(60),
        "new events waited for {took:?} behind batches that always fail"
    );
    assert!(daemon.log().contains("circuit closed"), "{}", daemon.log());
}

async fn a_wish_to_wait_that_ends_after_the_schedule_costs_no_attempt(queue: Queue) {
    let receiver = Receiver::start(|_, n| {
        if n == 0 { status(503).header("retry-after", "345600") } else { status(200) }
    })
    .await;
    let more = "retry = { max_elapsed_time = \"4s\" }\ncircuit_breaker = { open_for = \"1s\", max_open_for = \"1s\" }";
    let setup = Setup::new(&queue, &(QUICK.to_owned() + &subscriber("a", &receiver.url, more)));
    let daemon = setup.start().await;
    queue.publish(TYPE, [event(0)]).await;
    let requests = receiver.wait_requests(2).await;
    assert_eq!((requests[1].id(), requests[1].attempt()), (requests[0].id(), 2));
    assert_eq!(queue.dead("a").await, 0);
    let log = daemon.log();
    assert!(
        log.contains("outcome=\"retry\"") && log.contains("retry_after_shortened_from_s="),
        "{log}"
    );

    receiver.now(|_, _| status(503).header("retry-after", "345600"));
    let tried = setup.run(&["test", "a", "--json"]);
    let tried: serde_json::Value = serde_json::from_slice(&tried.stdout).expect("a JSON object");
    assert_eq!(tried["outcome"], "retry", "as the daemon does: {tried}");
    queue.publish(TYPE, [event(1)]).await;
    queue.wait_dead("a", 1).await;
    let dead = setup.dead("a").remove(0);
    assert_eq!((&dead["reason"], &dead["attempts"]), (&json!("exhausted"), &json!(2)), "{dead}");
    assert!(
        dead["error"].as_str().is_some_and(|e| e.contains("503") && e.contains("Retry-After")),
        "{dead}"
    );
}

async fn a_late_failure_of_the_url_before_says_nothing_of_the_one_that_is_configured(queue: Queue) {
    for (late, name) in [
        (status(410), "gone"),
        (status(503).header("retry-after", "600"), "held"),
        (status(413), "dead"),
    ] {
        let old = Receiver::start(move |_, _| late.clone().after(Duration::from_secs(2))).await;
        let new = Receiver::accepting().await;
        let (queue, api) = (queue.another(), Api::new());
        let text =
            |url: &str| queue.section(&["a"]) + QUICK + &api.section() + &subscriber("a", url, "");
        let setup = Setup::with_text(&text(&old.url));
        let daemon = setup.start().await;
        queue.publish(TYPE, [event(0)]).await;
        old.wait_requests(1).await;
        setup.write("hooktrail.toml", text(&new.url));
        kill("-HUP", daemon.pid());
        daemon.wait_log("a (url)").await;
        new.wait_all(1).await;
        let again = &new.requests()[0];
        assert_eq!(
            (again.id(), again.attempt()),
            (old.requests()[0].id(), 2),
            "{name}: an ordinary retry"
        );
        queue.publish(TYPE, [event(1)]).await;
        new.wait_all(2).await;
        queue.wait_empty("a").await;
        assert_eq!(api.subscriber("a").await["state"], "ok", "{name}");
        assert_eq!(old.count(), 1, "{name}");
    }
}

async fn a_pause_and_a_resume_are_heard_while_the_circuit_is_open_and_while_a_retry_after_holds(
    queue: Queue,
) {
    let failing = Receiver::start(|_, _| status(500)).await;
    let holding = Receiver::start(|_, n| {
        if n == 0 { status(503).header("retry-after", "600") } else { status(200) }
    })
    .await;
    let api = Api::new();
    let open = "circuit_breaker = { failures = 1, open_for = \"10m\" }";
    let text = QUICK.to_owned()
        + &api.section()
        + &subscriber("open", &failing.url, open)
        + &subscriber("held", &holding.url, "");
    let setup = Setup::new(&queue, &text);
    let _daemon = setup.start().await;
    queue.publish(TYPE, [event(0)]).await;
    for (name, state, receiver) in [("open", "circuit_open", &failing), ("held", "held", &holding)]
    {
        api.wait(name, state, |s| s["state"] == state).await;
        setup.ok(&["pause", name]);
        api.wait(name, "paused", |s| s["state"] == "paused").await;
        let series = format!("hooktrail_paused{{subscriber=\"{name}\"}}");
        assert_eq!(api.metric(&series).await, Some(1.0), "{series}");
        let before = receiver.count();
        queue.publish(TYPE, [event(1)]).await;
        setup.ok(&["resume", name]);
        receiver.wait_requests(before + 1).await;
    }
    // Without a pause before it: the circuit is open again.
    api.wait("open", "circuit_open", |s| s["state"] == "circuit_open").await;
    failing.now(|_, _| status(200));
    let before = failing.count();
    let said = setup.ok(&["resume", "open"]);
    assert!(said.contains("`open` is resumed"), "{said}");
    failing.wait_requests(before + 1).await;
    failing.wait_all(2).await;
    eventually("the held one too", async || holding.accepted().contains(&1)).await;
    api.wait("open", "ok", |s| s["circuit"]["state"] == "closed").await;
}

async fn attempts_from_before_the_circuit_opened_are_no_probes(queue: Queue) {
    // The first four are answered when all are under way, the others when the circuit is open.
    let (first, others) = (watch::Sender::new(false), watch::Sender::new(false));
    let gates = [first.clone(), others.clone()];
    let receiver = Receiver::start(move |_, n| status(500).when(&gates[usize::from(n >= 4)])).await;
    let api = Api::new();
    let more = "batch = { max_events = 1, max_wait = \"0s\" }\nhttp = { concurrency = 12 }\nretry = { initial_interval = \"1h\", max_interval = \"1h\" }\n\
                circuit_breaker = { failures = 4, open_for = \"1s\", max_open_for = \"10m\" }";
    let setup = Setup::new(
        &queue,
        &(QUICK.to_owned() + &api.section() + &subscriber("a", &receiver.url, more)),
    );
    let daemon = setup.start().await;
    queue.publish(TYPE, (0..12).map(event)).await;
    receiver.wait_requests(12).await;
    first.send_replace(true);
    daemon.wait_log("circuit open:").await;
    api.wait("a", "half_open", |s| s["circuit"]["state"] == "half_open").await;
    others.send_replace(true);
    eventually("all answered", async || daemon.log().matches("outcome=\"retry\"").count() >= 12)
        .await;
    assert!(receiver.count() == 12, "no probe was sent: nothing is due");
    assert!(!daemon.log().contains("circuit open again"), "and none failed: {}", daemon.log());
}

async fn a_dead_letter_has_its_reason_in_the_log(queue: Queue) {
    let receiver =
        Receiver::start(|r, _| status(if r.numbers()[0] == 0 { 500 } else { 413 })).await;
    let more = "retry = { max_attempts = 1 }\nbatch = { max_events = 1 }";
    let setup = Setup::new(&queue, &(QUICK.to_owned() + &subscriber("a", &receiver.url, more)));
    let daemon = setup.start().await;
    queue.publish(TYPE, (0..2).map(event)).await;
    queue.wait_dead("a", 2).await;
    for reason in ["exhausted", "too_large"] {
        let line = format!("outcome=\"dead_letter\" reason=\"{reason}\"");
        assert!(daemon.log().contains(&line), "{line}: {}", daemon.log());
    }
}

fn a_pause_holds_on_every_daemon_of_the_broker() {
    run(async {
        let broker = Broker::shared();
        let receiver = Receiver::accepting().await;
        let text = |admin: &str| QUICK.to_owned() + admin + &subscriber("a", &receiver.url, "");
        let one = Setup::new(&broker, &text(&admin()));
        let two = Setup::new(&broker, &text(&admin()));
        let (first, second) = (one.start().await, two.start().await);
        one.ok(&["pause", "a"]);
        first.wait_log("paused: its events wait").await;
        second.wait_log("paused: its events wait").await;
        broker.publish(TYPE, (0..5).map(event)).await;
        eventually("the events wait", async || broker.depth("sub.a").await == Some(5)).await;
        assert_eq!(receiver.count(), 0);
        two.ok(&["resume", "a"]);
        receiver.wait_all(5).await;
        first.wait_log("resumed").await;
        second.wait_log("resumed").await;
    });
}

//! Crashes, restarts and cut connections: nothing is lost.

use std::{
    collections::{HashMap, HashSet},
    time::Duration,
};

use lapin::{options::QueueDeclareOptions, types::FieldTable};

use crate::support::{
    broker::{Broker, SETTLING},
    daemon::{Daemon, QUICK, Setup, subscriber},
    eventually,
    queue::{Queue, on_both_queues},
    receiver::{Receiver, event, status},
    run,
};

on_both_queues!(
    a_batch_is_the_same_after_a_crash_and_when_another_daemon_takes_over,
    sigterm_in_mid_flow_loses_nothing_and_exits_0,
    at_the_shutdown_deadline_the_daemon_ends_names_who_is_busy_and_loses_nothing,
    kill_9_at_twenty_random_moments_during_100_000_events_loses_none,
);

const TYPE: &str = "activity_log.user.updated";

/// How many events were accepted more than once.
fn repeated(receiver: &Receiver) -> usize {
    let accepted = receiver.accepted();
    accepted.len() - accepted.iter().collect::<HashSet<_>>().len()
}

async fn a_batch_is_the_same_after_a_crash_and_when_another_daemon_takes_over(queue: Queue) {
    let receiver = Receiver::start(|_, _| status(503)).await;
    let setup = Setup::new(&queue, &(QUICK.to_owned() + &subscriber("a", &receiver.url, "")));
    let first = setup.start().await;
    queue.publish(TYPE, (0..5).map(event)).await;
    receiver.wait_requests(1).await;
    // The envelope is confirmed and its events are acked: from here on the batch keeps its identity.
    queue.wait_backlog("a", 0).await;
    queue.wait_retries("a", 0, 1).await;
    first.kill();
    let mut daemon = setup.start().await;
    let requests = receiver.wait_requests(3).await;
    queue.take_over(&setup, &mut daemon);
    receiver.now(|_, _| status(200));
    receiver.wait_all(5).await;
    let last = receiver.requests();
    for request in requests.iter().chain(&last) {
        assert_eq!((request.id(), &request.body), (requests[0].id(), &requests[0].body));
    }
    let attempts: Vec<u32> = last.iter().map(|r| r.attempt()).collect();
    assert!(attempts.windows(2).all(|p| p[1] == p[0] + 1 || p[1] == p[0]), "{attempts:?}");
    drop(daemon);
}

async fn sigterm_in_mid_flow_loses_nothing_and_exits_0(queue: Queue) {
    let receiver = Receiver::start(|_, _| status(200).after(Duration::from_millis(30))).await;
    let setup = Setup::new(
        &queue,
        &(QUICK.to_owned() + &subscriber("a", &receiver.url, "batch = { max_events = 20 }\nhttp = { concurrency = 4 }")),
    );
    let daemon = setup.start().await;
    queue.publish(TYPE, (0..5000).map(event)).await;
    receiver.wait_requests(10).await;
    assert!(daemon.stop().await.success());
    let seen = receiver.accepted().len() as u64;
    assert!(seen < 5000, "it was still in mid-flow");
    assert_eq!(repeated(&receiver), 0);
    queue.wait_backlog("a", u32::try_from(5000 - seen).expect("small")).await;
    let _next = setup.start().await;
    receiver.wait_all(5000).await;
    assert_eq!(repeated(&receiver), 0, "what was in flight was settled before the end");
}

async fn at_the_shutdown_deadline_the_daemon_ends_names_who_is_busy_and_loses_nothing(queue: Queue) {
    let receiver = Receiver::start(|_, _| status(200).after(Duration::from_secs(3600))).await;
    let setup = Setup::new(&queue, &(QUICK.to_owned() + &subscriber("slow", &receiver.url, "")));
    let text = std::fs::read_to_string(setup.config()).expect("the configuration");
    setup.write("hooktrail.toml", format!("shutdown_timeout = \"1s\"\n{text}"));
    let mut daemon = setup.start().await;
    queue.publish(TYPE, (0..3).map(event)).await;
    receiver.wait_requests(1).await;
    daemon.terminate();
    assert!(daemon.wait().await.success());
    assert!(daemon.log().contains("stopped at the deadline") && daemon.log().contains("{\"slow\"}"), "{}", daemon.log());
    queue.wait_backlog("slow", 3).await;
}

async fn kill_9_at_twenty_random_moments_during_100_000_events_loses_none(queue: Queue) {
    const EVENTS: u64 = 100_000;
    // One request in ten fails, so that kills also fall between envelopes and acks.
    let receiver = Receiver::start(|_, n| status(if n % 10 == 9 { 503 } else { 200 }).after(Duration::from_millis(5))).await;
    let setup = Setup::new(
        &queue,
        &(QUICK.to_owned() + &subscriber("a", &receiver.url, "batch = { max_events = 100 }\nhttp = { concurrency = 4 }")),
    );
    let mut daemon = setup.start().await;
    let publishing = queue.publish(TYPE, (0..EVENTS).map(event));
    let killing = async {
        for _ in 0..20 {
            let before = receiver.count();
            let moment = 5 + rand::random_range(0..60);
            eventually("the flow goes on", async || receiver.count() >= before + moment).await;
            queue.take_over(&setup, &mut daemon);
        }
    };
    tokio::join!(publishing, killing);
    receiver.wait_all(EVENTS).await;
    println!("20 kills, {EVENTS} events, 0 lost, {} arrived twice", repeated(&receiver));
    // A batch that came again under one id has the same bytes.
    let mut bodies = HashMap::new();
    for request in receiver.requests() {
        assert_eq!(bodies.entry(request.id().to_owned()).or_insert_with(|| request.body.clone()), &request.body);
    }
    queue.wait_empty("a").await;
}

async fn flow(broker: &Broker, receiver: &Receiver, from: u64, to: u64) {
    broker.publish(TYPE, (from..to).map(event)).await;
    let wanted = to;
    eventually(&format!("events up to {wanted} are on their way"), async || receiver.accepted().len() as u64 > from + (wanted - from) / 4)
        .await;
}

#[test]
fn a_broker_that_is_killed_and_restarted_in_mid_flow_loses_nothing() {
    run(async {
        let broker = Broker::private().await;
        let receiver = Receiver::start(|_, n| status(if n % 7 == 6 { 500 } else { 200 }).after(Duration::from_millis(20))).await;
        let setup = Setup::new(&broker, &(QUICK.to_owned() + &subscriber("a", &receiver.url, "batch = { max_events = 50 }")));
        let daemon = setup.start().await;
        tokio::time::sleep(SETTLING).await; // a queue younger than this may not survive, whatever anybody does
        flow(&broker, &receiver, 0, 5000).await;
        broker.node().restart_after_kill().await;
        receiver.wait_all(5000).await;
        flow(&broker, &receiver, 5000, 6000).await;
        broker.node().ctl(&["close_all_connections", "a test"]);
        receiver.wait_all(6000).await;
        println!("{} of 6000 arrived twice", repeated(&receiver));
        let log = daemon.log();
        assert!(log.contains("lost; trying again without end") && log.contains("recovered"), "{log}");
        let complaints = log.lines().filter(|l| l.contains("lost; trying again")).count();
        assert!(complaints <= 6, "logged {complaints} times, once per change of state is enough:\n{log}");
        assert!(daemon.stop().await.success());
        assert_eq!(broker.depth("sub.a").await, Some(0));
    });
}

#[test]
fn a_daemon_waits_for_a_broker_that_is_not_there_and_still_obeys_sigterm() {
    run(async {
        let broker = Broker::private().await;
        let receiver = Receiver::accepting().await;
        let setup = Setup::new(&broker, &(QUICK.to_owned() + &subscriber("a", &receiver.url, "")));
        broker.node().kill().await;
        let waiting = setup.spawn();
        waiting.wait_log("lost; trying again without end").await;
        assert!(waiting.stop().await.success());
        let daemon = setup.spawn();
        daemon.wait_log("lost; trying again without end").await;
        let publish = setup.run(&["publish", "/dev/null"]);
        assert_eq!(publish.status.code(), Some(1), "a command does not wait");
        let told = String::from_utf8_lossy(&publish.stderr).into_owned();
        assert!(told.contains("cannot connect to the broker at amqp://127.0.0.1") && !told.contains("guest"), "{told}");
        broker.node().start().await;
        daemon.wait_log("running").await;
        broker.publish(TYPE, [event(0)]).await;
        receiver.wait_all(1).await;
    });
}

#[test]
fn while_the_broker_blocks_publishing_nothing_is_lost_and_good_subscribers_go_on() {
    run(async {
        let broker = Broker::private().await;
        let good = Receiver::accepting().await;
        let bad = Receiver::start(|_, _| status(500)).await;
        let text = QUICK.to_owned() + &subscriber("good", &good.url, "batch = { max_events = 10 }") + &subscriber("bad", &bad.url, "");
        let setup = Setup::new(&broker, &text);
        let daemon = setup.start().await;
        // A backlog for both while the daemon is away, because producers are blocked too.
        assert!(daemon.stop().await.success());
        broker.publish(TYPE, (0..200).map(event)).await;
        broker.node().ctl(&["set_vm_memory_high_watermark", "0.00001"]);
        let daemon = setup.spawn();
        good.wait_all(200).await;
        bad.wait_requests(1).await;
        daemon.wait_log("the broker blocks publishing").await;
        let tried = bad.count();
        assert!(tried <= 2, "{tried} attempts whose failure could not be written down");
        bad.now(|_, _| status(200));
        broker.node().ctl(&["set_vm_memory_high_watermark", "0.6"]);
        daemon.wait_log("the broker unblocked publishing").await;
        bad.wait_all(200).await;
        drop::<Daemon>(daemon);
    });
}

#[test]
fn a_queue_that_the_broker_has_lost_the_use_of_is_named_and_harms_no_other_until_it_is_repaired() {
    run(async {
        let broker = Broker::private().await;
        let one = Receiver::accepting().await;
        let two = Receiver::accepting().await;
        let first = Setup::new(&broker, &(QUICK.to_owned() + &subscriber("one", &one.url, "")));
        assert!(first.start().await.stop().await.success());
        tokio::time::sleep(SETTLING).await; // so that the queues of `one` survive
        let both = Setup::new(
            &broker,
            &(QUICK.to_owned() + &subscriber("one", &one.url, "") + &subscriber("two", &two.url, "events = [\"other.*\"]")),
        );
        let nothing = both.write("nothing", "");
        both.ok(&["publish", nothing.to_str().expect("a path")]);
        broker.node().restart_after_kill().await;

        let daemon = both.spawn();
        broker.publish(TYPE, (0..100).map(event)).await;
        one.wait_all(100).await;
        let report = both.ok(&["repair", "two"]);
        if report.contains("all ") {
            // This time the broker has kept it; there is nothing to see.
            println!("the queue survived: {report}");
            return;
        }
        assert!(report.contains("sub.two") && report.contains("deleted and declared anew"), "{report}");
        assert!(daemon.log().contains("subscriber=\"two\"") && daemon.log().contains("sub.two"), "it was named:\n{}", daemon.log());
        broker.publish("other.thing", (0..10).map(event)).await;
        two.wait_all(10).await;
        assert!(both.ok(&["repair", "two"]).contains("are sound; nothing was changed"));
    });
}

#[test]
fn a_queue_that_refuses_relayed_events_gets_them_later_and_the_others_no_more_than_one_copy() {
    run(async {
        let broker = Broker::private().await;
        let good = Receiver::accepting().await;
        let full = Receiver::start(|_, _| status(200).after(Duration::from_secs(3600))).await; // holds its lane up
        let queue = format!("[queue]\nurl = \"{}\"\nsource_queue = \"source\"\nprefix = \"{}\"\n", broker.url, broker.prefix);
        let text = queue
            + "[log]\nlevel = \"debug\"\n"
            + QUICK
            + &subscriber("good", &good.url, "")
            + &subscriber("full", &full.url, "batch = { max_events = 1 }\nhttp = { timeout = \"1s\" }");
        let setup = Setup::with_text(&text);
        let (connection, channel) = broker.channel().await;
        let durable = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
        channel.queue_declare("source".into(), durable, FieldTable::default()).await.expect("declares");
        broker.node().ctl(&["set_policy", "limit", r"\.sub\.full$", r#"{"max-length":3}"#, "--apply-to", "queues"]);
        let daemon = setup.start().await;
        // The limit is a soft one: the broker refuses some time after it was passed.
        let refused = || daemon.log().contains("sub.full` refuses events, and the relay waits for it");
        let mut sent = 0;
        while !refused() && sent < 1000 {
            broker.publish_to("", "source", (sent..sent + 10).map(event)).await;
            sent += 10;
            eventually("relayed or refused", async || refused() || good.accepted().len() as u64 >= sent).await;
        }
        eventually("it is tried again", async || daemon.log().matches("room for relayed events still fails").count() >= 3).await;
        good.wait_all(sent).await;
        full.now(|_, _| status(200));
        full.wait_all(sent).await;
        // Of the group in which one was refused each event came once more; not of the others.
        let copies = repeated(&good);
        assert!(copies <= 10, "{copies} of {sent} arrived again");
        broker.wait_depth("sub.full", 0).await;
        connection.close(200, "done".into()).await.expect("closes");
    });
}

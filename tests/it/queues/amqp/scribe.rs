//! Events that come through a broker into the embedded queue.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use lapin::{
    BasicProperties,
    options::{BasicConsumeOptions, QueueDeclareOptions, QueueDeleteOptions},
    types::{AMQPValue, FieldTable},
};
use rusqlite::Connection;

use crate::{
    delivery::intake::gzip,
    support::{
        api::Api,
        broker::{Broker, SETTLING, text},
        daemon::{Daemon, QUICK, Setup, subscriber},
        eventually,
        queue::{Embedded, Section},
        receiver::{Receiver, event, status},
        run,
    },
};

const TYPE: &str = "activity_log.user.updated";

/// An embedded queue with a broker before it.
struct Through<'b> {
    broker: &'b Broker,
    queue: Embedded,
    /// More lines of `[queue]`.
    more: String,
}

impl<'b> Through<'b> {
    fn new(broker: &'b Broker) -> Self {
        let more = format!("exchange = \"{}\"\n", broker.exchange);
        Self { broker, queue: Embedded::new(), more }
    }

    fn with(broker: &'b Broker, more: &str) -> Self {
        Self { more: more.to_owned(), ..Self::new(broker) }
    }

    fn rows(&self) -> BTreeMap<Option<String>, u32> {
        let db = Connection::open(self.queue.file()).expect("opens");
        let mut query =
            db.prepare("SELECT message_id, count(*) FROM event GROUP BY 1").expect("a query");
        let rows = query.query_map([], |r| Ok((r.get(0)?, r.get(1)?))).expect("reads");
        rows.collect::<rusqlite::Result<_>>().expect("rows")
    }
}

impl Section for Through<'_> {
    fn section(&self, subscribers: &[&str]) -> String {
        let Broker { url, prefix, .. } = self.broker;
        format!(
            "{}intake = \"{url}\"\nprefix = \"{prefix}\"\n{}",
            self.queue.section(subscribers),
            self.more
        )
    }
}

fn one(queue: &impl Section, url: &str, more: &str) -> Setup {
    Setup::new(queue, &(QUICK.to_owned() + more + &subscriber("a", url, "")))
}

async fn declare(broker: &Broker, queue: &str, arguments: &[(&str, AMQPValue)]) {
    let (connection, channel) = broker.channel().await;
    let mut table = FieldTable::default();
    for (name, value) in arguments {
        table.insert((*name).into(), value.clone());
    }
    let durable = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
    channel.queue_declare(queue.into(), durable, table).await.expect("declares");
    connection.close(200, "done".into()).await.expect("closes");
}

async fn delete(broker: &Broker, queue: &str) {
    let (connection, channel) = broker.channel().await;
    channel.queue_delete(queue.into(), QueueDeleteOptions::default()).await.expect("deletes");
    connection.close(200, "done".into()).await.expect("closes");
}

fn named(range: std::ops::Range<u64>) -> impl Iterator<Item = (Option<String>, String)> {
    range.map(|n| (Some(format!("id-{n}")), event(n)))
}

/// What the status says is wrong with the queue.
async fn queue_error(api: &Api) -> String {
    let answer = api.get("/api/v1/subscribers").await.json();
    answer["queue"]["error"].as_str().unwrap_or_default().to_owned()
}

/// Waits until the scribe consumes.
async fn wait_consuming(api: &Api) {
    eventually("a connection to the broker", async || {
        api.metric("hooktrail_broker_connections{role=\"intake\"}").await == Some(1.0)
    })
    .await;
    eventually("the depth of the queue is known", async || {
        api.metric("hooktrail_intake_queue_messages").await.is_some()
    })
    .await;
}

#[test]
fn events_go_through_one_queue_into_the_log_by_their_routing_key_alongside_those_over_http() {
    run(async {
        let (broker, api) = (Broker::shared(), Api::new());
        let (all, some) = (Receiver::accepting().await, Receiver::accepting().await);
        let through = Through::new(&broker);
        let setup = Setup::new(
            &through,
            &(QUICK.to_owned()
                + &api.section()
                + &subscriber("all", &all.url, "")
                + &subscriber("some", &some.url, "events = [\"x.#\"]")),
        );
        let daemon = setup.start().await;
        wait_consuming(&api).await;
        broker.publish_named(&broker.exchange, TYPE, named(0..3000)).await;
        // The broker routes by the key, whatever the body says.
        broker.publish("x.y", [event(3000)]).await;
        let properties = BasicProperties::default().with_content_encoding("gzip".into());
        broker.put(&broker.exchange, TYPE, &gzip(event(3001).as_bytes()), properties).await;
        assert_eq!(api.post("/api/v1/events", &event(3002)).await.status, 202);
        let file = setup.write("events", event(3003));
        setup.ok(&["publish", file.to_str().expect("a path")]);
        all.wait_all(3004).await;
        some.wait_requests(1).await;
        assert_eq!(some.accepted(), [3000]);
        assert_eq!(all.accepted().len(), 3004, "none came twice");
        assert_eq!(broker.depth("intake").await, Some(0));
        for queue in ["sub.all", "state", "delay.00", "orphans", "history"] {
            assert_eq!(broker.depth(queue).await, None, "{queue}");
        }
        let inspected = setup.ok(&["check", "--connect"]);
        for part in ["has the arguments that hooktrail gives it", "is for one daemon at a time"] {
            assert!(inspected.contains(part), "{part} is not in {inspected}");
        }
        let taken = api.metric("hooktrail_intake_events_total{result=\"stored\"}").await;
        assert_eq!(taken, Some(3002.0));
        assert!(daemon.stop().await.success());
        // What is published now waits in the broker.
        broker.publish(TYPE, [event(3004)]).await;
        broker.wait_depth("intake", 1).await;
        let _daemon = setup.start().await;
        all.wait_all(3005).await;
        // It is not forgotten when RabbitMQ becomes the queue.
        let after = Setup::new(&broker, &(QUICK.to_owned() + &subscriber("all", &all.url, "")));
        let inspected = after.run(&["check", "--connect"]);
        let warned = String::from_utf8_lossy(&inspected.stderr).into_owned();
        assert!(warned.contains("is of a configuration with [queue] intake"), "{warned}");
    });
}

#[test]
fn the_headers_and_ids_of_events_are_those_of_their_producers() {
    run(async {
        let (broker, api) = (Broker::shared(), Api::new());
        let receiver = Receiver::accepting().await;
        let through = Through::new(&broker);
        let setup = Setup::new(
            &through,
            &(QUICK.to_owned()
                + &api.section()
                + &subscriber("a", &receiver.url, "event_ids = true\nbatch = { max_events = 1 }")),
        );
        let daemon = setup.start().await;
        wait_consuming(&api).await;
        let traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        let mut headers = FieldTable::default();
        headers.insert("traceparent".into(), text(traceparent));
        let properties =
            BasicProperties::default().with_message_id("an-id".into()).with_headers(headers);
        broker.put(&broker.exchange, TYPE, event(1).as_bytes(), properties).await;
        receiver.wait_requests(1).await;
        daemon.wait_log(&format!("traceparent=\"{traceparent}\"")).await;
        let [request] = &receiver.take_requests()[..] else { panic!("one request") };
        assert_eq!(request.events()[0]["event_id"], "an-id");
        assert!(daemon.stop().await.success());
    });
}

#[test]
fn what_is_no_event_is_one_dead_letter_that_is_none_of_its_subscribers() {
    run(async {
        let (broker, api) = (Broker::shared(), Api::new());
        let receiver = Receiver::accepting().await;
        let through = Through::new(&broker);
        let both = subscriber("a", &receiver.url, "") + &subscriber("b", &receiver.url, "");
        let setup = Setup::new(&through, &(QUICK.to_owned() + &api.section() + &both));
        let daemon = setup.start().await;
        wait_consuming(&api).await;
        broker.publish(TYPE, ["{\"event\":", "[]"]).await;
        let of = |encoding: &str| BasicProperties::default().with_content_encoding(encoding.into());
        broker.put(&broker.exchange, TYPE, b"damaged", of("gzip")).await;
        broker.publish(TYPE, [event(0)]).await;
        receiver.wait_requests(2).await;
        daemon.wait_log("what is no event is a dead letter").await;
        let invalid = "hooktrail_intake_events_total{result=\"invalid\"}";
        assert_eq!(api.metric(invalid).await, Some(3.0));
        eventually("status shows them", async || {
            setup.ok(&["status"]).contains("3 orphans: what came and is no event")
        })
        .await;
        assert_eq!(api.metric("hooktrail_orphans").await, Some(3.0));
        let letters = setup.dead("@log");
        let of =
            |key: &str| letters.iter().map(|l| l[key].as_str().unwrap_or("")).collect::<Vec<_>>();
        assert_eq!(of("reason"), ["invalid_event"; 3], "{letters:?}");
        assert!(of("error")[2].contains("gzip"), "{letters:?}");
        let exported = setup.ok(&["dead", "export", "@log"]);
        for (line, body) in exported.lines().zip(["{\"event\":", "[]", "damaged"]) {
            let letter: serde_json::Value = serde_json::from_str(line).expect("JSON");
            assert_eq!(letter["body"], body);
        }
        assert!(setup.ok(&["dead", "show", "@log", "@2"]).contains("[]"));
        let replay = setup.ok(&["dead", "replay", "@log"]);
        assert!(replay.contains("queued 0 of 3 orphans, skipped 3"), "{replay}");
        for name in ["a", "b"] {
            assert_eq!(through.queue.dead(name).await, 0);
        }
        assert!(setup.ok(&["dead", "purge", "@log", "--yes"]).contains("purged 3 of 3 orphans"));
        assert_eq!(setup.ok(&["dead", "list", "--orphans"]), "no orphans\n");
        assert!(daemon.stop().await.success());
    });
}

#[test]
fn an_intake_queue_with_other_arguments_is_named_and_what_is_in_the_log_is_delivered() {
    run(async {
        let (broker, api) = (Broker::shared(), Api::new());
        let receiver = Receiver::accepting().await;
        let through = Through::new(&broker);
        let queue = format!("{}.intake", broker.prefix);
        declare(&broker, &queue, &[("x-queue-type", text("quorum"))]).await;
        broker.publish_to("", &queue, (0..3).map(event)).await;
        let setup = one(&through, &receiver.url, &api.section());
        let daemon = setup.start().await;
        let needle = format!("queue `{queue}` exists with");
        daemon.wait_log(&needle).await;
        assert_eq!(api.post("/api/v1/events", &event(3)).await.status, 202);
        receiver.wait_requests(1).await;
        assert_eq!(receiver.accepted(), [3]);
        let status: serde_json::Value =
            serde_json::from_str(&setup.ok(&["status", "--json"])).expect("JSON");
        let error = status["queue"]["error"].as_str().expect("an error");
        assert!(error.contains(&needle) && error.contains("where hooktrail needs"), "{error}");
        let check = setup.run(&["check", "--connect"]);
        assert_eq!(check.status.code(), Some(1));
        let reported = String::from_utf8_lossy(&check.stderr).into_owned();
        assert!(reported.contains(&format!("queue `{queue}`")), "{reported}");
        assert_eq!(broker.take_all("intake").await.len(), 3, "nothing was taken");
        // Its owner has made room: it goes on without a restart.
        delete(&broker, &queue).await;
        wait_consuming(&api).await;
        broker.publish(TYPE, [event(4)]).await;
        eventually("it arrives", async || receiver.accepted() == [3, 4]).await;
        assert!(daemon.stop().await.success());
    });
}

#[test]
fn while_the_broker_is_away_deliveries_and_http_go_on_and_what_was_confirmed_arrives() {
    run(async {
        let (broker, api) = (Broker::private().await, Api::new());
        let receiver = Receiver::accepting().await;
        let through = Through::new(&broker);
        let setup = one(&through, &receiver.url, &api.section());
        let daemon = setup.start().await;
        wait_consuming(&api).await;
        tokio::time::sleep(SETTLING).await;
        broker.publish_named(&broker.exchange, TYPE, named(0..500)).await;
        broker.node().kill().await;
        assert_eq!(api.post("/api/v1/events", &event(500)).await.status, 202);
        eventually("it arrives", async || receiver.accepted().contains(&500)).await;
        eventually("the status says so", async || {
            queue_error(&api).await.contains("cannot connect to the broker")
        })
        .await;
        assert_eq!(api.get("/readyz").await.status, 200);
        broker.node().restart_after_kill().await;
        broker.publish_named(&broker.exchange, TYPE, named(501..1000)).await;
        receiver.wait_all(1000).await;
        daemon.wait_log("works again").await;
        let again: BTreeMap<_, _> = through.rows().into_iter().filter(|(_, n)| *n > 1).collect();
        assert!(again.is_empty(), "{again:?}");
        assert!(daemon.stop().await.success());
        // At a start it is waited for, and what is in the log is delivered.
        broker.node().kill().await;
        let daemon = setup.start().await;
        assert_eq!(api.post("/api/v1/events", &event(1000)).await.status, 202);
        receiver.wait_all(1001).await;
        assert!(daemon.stop().await.success());
    });
}

/// Kills a daemon at a step, and starts another.
async fn killed_at(step: &str, setup: &Setup) -> Daemon {
    let mut daemon = setup.spawn_as(&format!("HOOKTRAIL_DIE_AT={step} exec \"$0\" \"$@\""));
    eventually("it is killed", async || !daemon.is_running()).await;
    drop(daemon);
    setup.start().await
}

#[test]
fn what_a_killed_daemon_had_stored_and_not_acked_is_stored_once_if_it_has_an_id() {
    run(async {
        let (broker, api) = (Broker::shared(), Api::new());
        let receiver = Receiver::accepting().await;
        let through = Through::new(&broker);
        let setup = one(&through, &receiver.url, &api.section());
        let daemon = setup.start().await;
        wait_consuming(&api).await;
        broker.publish(TYPE, [event(0)]).await;
        receiver.wait_all(1).await;
        assert!(daemon.stop().await.success());
        broker.wait_depth("intake", 0).await;
        let mut without = through.rows()[&None];
        let mut n = 0;
        for (step, copies) in [("Taken", 1), ("Scribed", 2), ("Acked", 1)] {
            // The one without an id first: it is taken in any case, and the others soon after it.
            broker.publish(TYPE, [event(n + 8)]).await;
            broker.publish_named(&broker.exchange, TYPE, named(n..n + 8)).await;
            let daemon = killed_at(step, &setup).await;
            without += copies;
            // What came again may be stored when all has arrived from the log already.
            eventually("what came again is stored", async || {
                through.rows().get(&None) >= Some(&without)
            })
            .await;
            receiver.wait_all(n + 9).await;
            assert!(daemon.stop().await.success());
            broker.wait_depth("intake", 0).await;
            n += 9;
            let mut rows = through.rows();
            assert_eq!(rows.remove(&None), Some(without), "{step}");
            assert!(rows.values().all(|n| *n == 1), "{step}: {rows:?}");
        }
    });
}

#[test]
fn nothing_is_acked_while_the_log_refuses_it() {
    run(async {
        let (broker, api) = (Broker::shared(), Api::new());
        let receiver = Receiver::accepting().await;
        let through = Through::new(&broker);
        let setup = one(&through, &receiver.url, &api.section());
        let daemon = setup.start().await;
        wait_consuming(&api).await;
        let db = Connection::open(through.queue.file()).expect("opens");
        db.busy_timeout(Duration::from_secs(10)).expect("waits");
        let refuse = "CREATE TRIGGER refuse BEFORE INSERT ON event BEGIN SELECT RAISE(ABORT, 'no room'); END";
        db.execute_batch(refuse).expect("a trigger");
        broker.publish_named(&broker.exchange, TYPE, named(0..10)).await;
        daemon.wait_log("no room").await;
        let error = queue_error(&api).await;
        assert!(error.contains("no room"), "{error}");
        eventually("the metric says so", async || {
            api.metric("hooktrail_intake_up").await == Some(0.0)
        })
        .await;
        daemon.kill();
        broker.wait_depth("intake", 10).await;
        let daemon = setup.start().await;
        daemon.wait_log("no room").await;
        db.execute_batch("DROP TRIGGER refuse").expect("no trigger");
        receiver.wait_all(10).await;
        assert_eq!(receiver.accepted().len(), 10);
        eventually("the metric says so", async || {
            api.metric("hooktrail_intake_up").await == Some(1.0)
        })
        .await;
        assert!(daemon.stop().await.success());
        broker.wait_depth("intake", 0).await;
    });
}

#[test]
fn of_two_daemons_with_one_prefix_the_second_waits_and_takes_over() {
    run(async {
        let broker = Broker::shared();
        let (first, second) = (Receiver::accepting().await, Receiver::accepting().await);
        let (api, other) = (Api::new(), Api::new());
        let (one_queue, other_queue) = (Through::new(&broker), Through::new(&broker));
        let daemon = one(&one_queue, &first.url, &api.section()).start().await;
        wait_consuming(&api).await;
        let standby = one(&other_queue, &second.url, &other.section()).start().await;
        wait_consuming(&other).await;
        // Beyond the prefetches with which a new log begins.
        for n in 0..10 {
            broker.publish(TYPE, (n * 1000..(n + 1) * 1000).map(event)).await;
        }
        first.wait_all(10_000).await;
        assert_eq!(second.count(), 0);
        let killed = Instant::now();
        daemon.kill();
        broker.publish(TYPE, [event(0)]).await;
        second.wait_requests(1).await;
        assert!(killed.elapsed() < Duration::from_secs(20), "{:?}", killed.elapsed());
        assert!(standby.stop().await.success());
    });
}

#[test]
fn bindings_that_are_not_configured_any_more_are_removed_and_missing_ones_are_restored() {
    run(async {
        let (broker, api) = (Broker::shared(), Api::new());
        let receiver = Receiver::accepting().await;
        let mut through = Through::new(&broker);
        let setup = one(&through, &receiver.url, &api.section());
        let daemon = setup.start().await;
        wait_consuming(&api).await;
        assert!(daemon.stop().await.success());
        let (exchange, queue) = (broker.exchange.clone(), format!("{}.intake", broker.prefix));
        through.more += "bind = [\"x.*\", \"y.#\"]\n";
        let setup = one(&through, &receiver.url, &api.section());
        let daemon = setup.start().await;
        wait_consuming(&api).await;
        // The daemon that has the queue unbinds; that is known by what it gets.
        let mut n = 0;
        eventually("what is not configured any more is unbound", async || {
            n += 2;
            broker.publish("z", [event(n - 1)]).await;
            broker.publish("x.a", [event(n)]).await;
            eventually("what is bound arrives", async || receiver.accepted().contains(&n)).await;
            !receiver.accepted().contains(&(n - 1))
        })
        .await;
        let before = receiver.accepted().len();
        let (connection, channel) = broker.channel().await;
        for pattern in ["x.*", "y.#"] {
            let (queue, exchange) = (queue.as_str().into(), exchange.as_str().into());
            channel
                .queue_unbind(queue, exchange, pattern.into(), FieldTable::default())
                .await
                .expect("unbinds");
        }
        eventually("it is bound again", async || {
            n += 1;
            broker.publish("y.a", [event(n)]).await;
            receiver.accepted().len() > before
        })
        .await;
        connection.close(200, "done".into()).await.expect("closes");
        assert!(daemon.stop().await.success());
    });
}

#[test]
fn a_source_queue_is_taken_from_exclusively_by_the_types_in_the_bodies() {
    run(async {
        let (broker, api) = (Broker::shared(), Api::new());
        let receiver = Receiver::accepting().await;
        let source = format!("{}.source", broker.prefix);
        // One that refuses a second consumer; a quorum queue does not.
        declare(&broker, &source, &[]).await;
        let through = Through::with(&broker, &format!("source_queue = \"{source}\"\n"));
        let setup = Setup::new(
            &through,
            &(QUICK.to_owned()
                + &api.section()
                + &subscriber("a", &receiver.url, "events = [\"activity_log.#\"]")
                + &subscriber("b", &receiver.url, "events = [\"*.source\"]")),
        );
        let daemon = setup.start().await;
        wait_consuming(&api).await;
        broker.publish_to("", &source, (0..2000).map(event)).await;
        receiver.wait_all(2000).await;
        // It has no type: nobody's pattern is compared with it.
        broker.publish_to("", &source, ["no event"]).await;
        eventually("a dead letter", async || setup.ok(&["dead", "list"]).contains("1 orphan:"))
            .await;
        assert_eq!(setup.dead("@log")[0]["reason"], "invalid_event");
        assert_eq!(through.queue.dead("b").await, 0);
        let (connection, channel) = broker.channel().await;
        let (options, table) = (BasicConsumeOptions::default(), FieldTable::default());
        let refused =
            channel.basic_consume(source.as_str().into(), "".into(), options, table).await;
        assert!(refused.expect_err("is refused").to_string().contains("exclusive"));
        connection.close(200, "done".into()).await.expect("closes");
        // Another daemon says that it waits, and goes on when the first has ended.
        let (other, second) = (Api::new(), Receiver::accepting().await);
        let standby = Through::with(&broker, &through.more);
        let standby_setup = one(&standby, &second.url, &other.section());
        let waiting = standby_setup.start().await;
        eventually("it says why it waits", async || {
            queue_error(&other).await.contains("takes from it no more")
        })
        .await;
        assert!(daemon.stop().await.success());
        broker.publish_to("", &source, [event(0)]).await;
        second.wait_requests(1).await;
        assert!(waiting.stop().await.success());
        delete(&broker, &source).await;
    });
}

#[test]
fn queues_of_subscribers_with_the_same_prefix_are_refused_until_they_are_pruned() {
    run(async {
        let (broker, api) = (Broker::shared(), Api::new());
        let receiver = Receiver::start(|_, _| status(503)).await;
        let before = Setup::new(&broker, &(QUICK.to_owned() + &subscriber("a", &receiver.url, "")));
        let daemon = before.start().await;
        broker.publish(TYPE, [event(0)]).await;
        receiver.wait_requests(1).await;
        assert!(daemon.stop().await.success());
        let through = Through::new(&broker);
        let setup = one(&through, &receiver.url, &api.section());
        let refused = setup.run(&["run"]);
        let reported = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert_eq!(refused.status.code(), Some(2), "{reported}");
        for part in [&*broker.prefix, "queues of subscribers", "hooktrail prune --all"] {
            assert!(reported.contains(part), "{part} is not in {reported}");
        }
        assert_eq!(broker.depth("intake").await, None, "nothing was declared");
        receiver.now(|_, _| status(200));
        let daemon = before.start().await;
        receiver.wait_all(1).await;
        assert!(daemon.stop().await.success());
        before.ok(&["prune", "--all", "--yes"]);
        let daemon = setup.start().await;
        wait_consuming(&api).await;
        broker.publish(TYPE, [event(1)]).await;
        receiver.wait_all(2).await;
        assert!(daemon.stop().await.success());
    });
}

#[test]
fn large_events_are_taken_a_few_at_a_time() {
    const EVENTS: u32 = 60;
    run(async {
        let (broker, api) = (Broker::shared(), Api::new());
        let through = Through::new(&broker);
        let setup = one(&through, "http://127.0.0.1:9/", &api.section());
        let daemon = setup.start().await;
        wait_consuming(&api).await;
        assert!(daemon.stop().await.success());
        let large = format!("{{\"event\":\"a.b\",\"x\":\"{}\"}}", "x".repeat(4 << 20));
        broker.publish("a.b", (0..EVENTS).map(|_| large.as_bytes())).await;
        let daemon = setup.start().await;
        eventually("all are stored", async || {
            // In this order: what is stored in between is counted there.
            let ready = broker.depth("intake").await.expect("the queue");
            let stored = through.rows().values().sum::<u32>();
            assert!(ready + stored >= EVENTS - 16, "{} at once", EVENTS - ready - stored);
            stored == EVENTS
        })
        .await;
        broker.wait_depth("intake", 0).await;
        // With small ones after them, none is left behind when more are taken at once.
        broker.publish_named(&broker.exchange, TYPE, named(0..5000)).await;
        eventually("all are stored", async || {
            through.rows().values().sum::<u32>() == EVENTS + 5000
        })
        .await;
        assert!(through.rows().iter().all(|(id, n)| id.is_none() || *n == 1));
        assert!(daemon.stop().await.success());
    });
}

#[test]
fn the_tenant_of_a_message_is_a_header_of_text() {
    run(async {
        let broker = Broker::shared();
        let queue = Through::with(
            &broker,
            &format!("exchange = \"{}\"\ntenant = {{ header = \"Tenant\" }}\n", broker.exchange),
        );
        let (of_a, of_all) = (Receiver::accepting().await, Receiver::accepting().await);
        let similar = Receiver::accepting().await;
        let tables = subscriber("a", &of_a.url, "tenant = \"42\"")
            + &subscriber("b", &similar.url, "tenant = \"?42\"")
            + &subscriber("c", &similar.url, "tenant = \"\u{fffd}42\"")
            + &subscriber("all", &of_all.url, "");
        let api = Api::new();
        let setup = Setup::new(&queue, &(QUICK.to_owned() + &api.section() + &tables));
        let _daemon = setup.start().await;
        wait_consuming(&api).await;
        let headers = [
            Some(("Tenant", text("42"))),
            Some(("Tenant", text("42 "))),
            Some(("tenant", text("42"))),
            Some(("Tenant", AMQPValue::LongLongInt(42))),
            Some(("Tenant", AMQPValue::LongString(b"\xff42"[..].into()))),
            Some(("Tenant", text(""))),
            Some(("Tenant", text(&"x".repeat(100_000)))),
            None,
            Some(("Tenant", text("42"))),
        ];
        for (n, header) in (0..).zip(&headers) {
            let mut table = FieldTable::default();
            if let Some((name, value)) = header {
                table.insert((*name).into(), value.clone());
            }
            let properties = BasicProperties::default().with_headers(table);
            broker.put(&broker.exchange, TYPE, event(n).as_bytes(), properties).await;
        }
        let last = headers.len() as u64;
        let all: Vec<u64> = (0..last).collect();
        eventually("all of them", async || of_all.accepted().len() >= all.len()).await;
        assert_eq!(of_all.accepted(), all);
        assert_eq!(similar.accepted(), [0; 0]);
        eventually("those of its tenant", async || of_a.accepted().len() >= 2).await;
        assert_eq!(of_a.accepted(), [0, last - 1]);
    });
}

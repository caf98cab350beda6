//! Objects that are deleted, or permissions that are taken, under a running daemon: it puts back
//! what it can, and reports what it cannot.

use std::time::Duration;

use futures_util::StreamExt as _;
use lapin::{
    ExchangeKind,
    options::{ExchangeDeclareOptions, QueueDeclareOptions},
    types::{AMQPValue, FieldTable, ShortString},
};
use serde_json::Value;

use crate::support::{
    PATIENCE,
    api::Api,
    broker::Broker,
    daemon::{QUICK, Setup, subscriber},
    eventually,
    queue::Section as _,
    receiver::{Receiver, event, status},
    run,
};

fn named(broker: &Broker, rest: &str) -> ShortString {
    format!("{}.{rest}", broker.prefix).as_str().into()
}

async fn delete_queue(broker: &Broker, rest: &str) {
    let (connection, channel) = broker.channel().await;
    channel.queue_delete(named(broker, rest), Default::default()).await.expect("deletes");
    connection.close(200, "done".into()).await.expect("closes");
}

pub(super) async fn delete_exchange(broker: &Broker) {
    let (connection, channel) = broker.channel().await;
    channel
        .exchange_delete(broker.exchange.as_str().into(), Default::default())
        .await
        .expect("deletes");
    connection.close(200, "done".into()).await.expect("closes");
}

pub(super) async fn declare_exchange(broker: &Broker) {
    let (connection, channel) = broker.channel().await;
    let durable = ExchangeDeclareOptions { durable: true, ..ExchangeDeclareOptions::default() };
    channel
        .exchange_declare(
            broker.exchange.as_str().into(),
            ExchangeKind::Topic,
            durable,
            FieldTable::default(),
        )
        .await
        .expect("declares");
    connection.close(200, "done".into()).await.expect("closes");
}

pub(super) async fn exchange_is_there(broker: &Broker, name: &str) -> bool {
    let (connection, channel) = broker.channel().await;
    let passive = ExchangeDeclareOptions { passive: true, ..ExchangeDeclareOptions::default() };
    let found = channel
        .exchange_declare(name.into(), ExchangeKind::Topic, passive, FieldTable::default())
        .await;
    connection.close(200, "done".into()).await.ok();
    found.is_ok()
}

/// Reads the record of bindings and pauses until one is the `last`.
async fn records(broker: &Broker, last: impl Fn(&Value) -> bool) -> Vec<Value> {
    let (connection, channel) = broker.channel().await;
    channel.basic_qos(100, Default::default()).await.expect("a prefetch");
    let mut first = FieldTable::default();
    first.insert("x-stream-offset".into(), AMQPValue::LongString("first".into()));
    let mut consumer = channel
        .basic_consume(named(broker, "state"), "".into(), Default::default(), first)
        .await
        .expect("consumes");
    let mut found: Vec<Value> = Vec::new();
    while !found.last().is_some_and(&last) {
        let delivery = tokio::time::timeout(PATIENCE, consumer.next())
            .await
            .expect("a record")
            .expect("a record")
            .expect("a record");
        channel.basic_ack(delivery.delivery_tag, Default::default()).await.expect("acks");
        found.push(serde_json::from_slice(&delivery.data).expect("JSON"));
    }
    connection.close(200, "done".into()).await.expect("closes");
    found
}

fn of_type(event_type: &str, n: u64) -> String {
    format!(r#"{{"event":"{event_type}","n":{n}}}"#)
}

#[test]
fn an_exchange_that_is_deleted_and_declared_again_is_bound_again_and_an_event_that_shows_it_is_not_lost()
 {
    run(async {
        let broker = Broker::shared();
        let (a, b) = (Receiver::accepting().await, Receiver::accepting().await);
        let api = Api::new();
        let text = QUICK.to_owned()
            + &api.section()
            + &subscriber("a", &a.url, "events = [\"x.*\"]")
            + &subscriber("b", &b.url, "events = [\"y.*\"]");
        let setup = Setup::new(&broker, &text);
        let daemon = setup.start().await;
        eventually("both are recorded, and bound by the record", async || {
            broker.depth("state").await >= Some(3)
        })
        .await;
        // The first check has been made.
        eventually("its lane works", async || api.subscriber("a").await["state"] == "ok").await;
        delete_exchange(&broker).await;
        declare_exchange(&broker).await;
        // No subscriber is bound. Events over HTTP show it, and are published again.
        eventually("it is taken", async || {
            api.post("/api/v1/events", &of_type("x.1", 0)).await.status == 202
        })
        .await;
        a.wait_requests(1).await;
        // Everything else that was bound there is bound again.
        daemon.wait_log("the exchange was deleted, and its bindings with it").await;
        broker.publish("y.1", [of_type("y.1", 1)]).await;
        b.wait_requests(1).await;
        let log = daemon.log();
        let line = log.lines().find(|l| l.contains("the exchange was deleted")).expect("just seen");
        assert!(
            line.contains("ERROR") && line.contains("since=") && line.contains(&broker.exchange),
            "{line}"
        );
    });
}

#[test]
fn a_command_that_publishes_binds_again_what_the_record_says_and_what_was_removed_stays_removed() {
    run(async {
        let broker = Broker::shared();
        let receiver = Receiver::accepting().await;
        let (a, b) = (
            subscriber("a", &receiver.url, "events = [\"x.*\"]"),
            subscriber("b", &receiver.url, "events = [\"y.*\"]\npaused = true"),
        );
        let both = Setup::new(&broker, &(QUICK.to_owned() + &a + &b));
        let daemon = both.start().await;
        eventually("both are recorded", async || broker.depth("state").await >= Some(3)).await;
        assert!(daemon.stop().await.success());
        let one = Setup::new(&broker, &(QUICK.to_owned() + &a));
        let daemon = one.start().await;
        daemon.wait_log("was unbound; its backlog stays").await;
        assert!(daemon.stop().await.success());
        delete_exchange(&broker).await;
        declare_exchange(&broker).await;
        // This configuration is not the one that the daemons have.
        let events =
            both.write("events", format!("{}\n{}\n", of_type("x.1", 0), of_type("y.1", 1)));
        let published = both.run(&["publish", events.to_str().expect("a path")]);
        let reported = String::from_utf8_lossy(&published.stderr).into_owned();
        assert!(
            published.status.code() == Some(1)
                && reported.contains("y.1")
                && !reported.contains("x.1"),
            "{reported}"
        );
        assert_eq!((broker.depth("sub.a").await, broker.depth("sub.b").await), (Some(1), Some(0)));
    });
}

#[test]
fn an_exchange_that_is_gone_is_reported_and_declared_only_after_its_owner_had_time_to() {
    run(async {
        let broker = Broker::shared();
        let receiver = Receiver::accepting().await;
        let api = Api::new();
        let setup = Setup::new(
            &broker,
            &(QUICK.to_owned() + &api.section() + &subscriber("a", &receiver.url, "")),
        );
        let daemon = setup.start().await;
        eventually("it is recorded", async || broker.depth("state").await >= Some(2)).await;
        delete_exchange(&broker).await;
        let begun = std::time::Instant::now();
        // Publishing to what does not exist costs the connection, and shows it.
        let refused = api.post("/api/v1/events", &of_type("x.1", 0)).await;
        assert_eq!(refused.status, 503, "{refused:?}");
        let names_it = |text: &Value| {
            text.as_str()
                .is_some_and(|t| t.contains(&broker.exchange) && t.contains("does not exist"))
        };
        api.wait("a", "is not well", |s| {
            s["state"] == "queue_fails" && names_it(&s["queue_error"])
        })
        .await;
        let all = api.get("/api/v1/subscribers").await.json();
        assert!(names_it(&all["queue"]["error"]), "{all}");
        assert_eq!(api.metric("hooktrail_lane_up{subscriber=\"a\"}").await, Some(0.0));
        eventually("it is declared", async || exchange_is_there(&broker, &broker.exchange).await)
            .await;
        assert!(begun.elapsed() >= Duration::from_secs(10), "{:?}", begun.elapsed());
        api.wait("a", "is well again", |s| s["state"] == "ok" && s["queue_error"].is_null()).await;
        broker.publish("x.1", [of_type("x.1", 1)]).await;
        receiver.wait_requests(1).await;
        assert!(daemon.log().contains("was missing and is redeclared"), "{}", daemon.log());
    });
}

#[test]
fn what_a_new_connection_finds_missing_of_the_ladder_is_put_back_and_said() {
    run(async {
        let broker = Broker::shared();
        let receiver = Receiver::accepting().await;
        let api = Api::new();
        let setup = Setup::new(
            &broker,
            &(QUICK.to_owned() + &api.section() + &subscriber("a", &receiver.url, "")),
        );
        let daemon = setup.start().await;
        broker.publish("a.b", [event(0)]).await;
        receiver.wait_all(1).await;
        assert!(
            !daemon.log().contains("was missing"),
            "what is declared for the first time was not lost: {}",
            daemon.log()
        );
        delete_queue(&broker, "delay.05").await;
        // Publishing to what does not exist costs the connection that publishes.
        delete_exchange(&broker).await;
        assert_eq!(api.post("/api/v1/events", &of_type("x.1", 0)).await.status, 503);
        daemon.wait_log("broker connection (publishing) works again").await;
        let log = daemon.log();
        let said = |l: &str| {
            l.contains("was missing and is redeclared")
                && l.contains(&format!("{}.delay.05", broker.prefix))
        };
        assert!(log.lines().any(said), "{log}");
        assert!(broker.depth("delay.05").await.is_some());
    });
}

#[test]
fn a_level_of_the_ladder_that_was_deleted_is_put_back_before_a_batch_is_written_down_and_costs_no_request()
 {
    run(async {
        let broker = Broker::shared();
        let receiver =
            Receiver::start(|request, _| status(if request.attempt() < 3 { 500 } else { 200 }))
                .await;
        let setup = Setup::new(&broker, &(QUICK.to_owned() + &subscriber("a", &receiver.url, "")));
        let daemon = setup.start().await;
        // Each connection that publishes begins by declaring the ladder: this one has.
        broker.publish("a.b", [event(0)]).await;
        eventually("it arrives", async || receiver.accepted() == [0]).await;
        receiver.take_requests();
        delete_queue(&broker, "delay.00").await;
        broker.publish("a.b", [event(1)]).await;
        eventually("it arrives too", async || receiver.accepted() == [1]).await;
        let requests = receiver.requests();
        let attempts: Vec<u32> = requests.iter().map(|r| r.attempt()).collect();
        assert_eq!(attempts, [1, 2, 3], "one batch, each attempt once");
        assert!(requests.iter().all(|r| r.id() == requests[0].id()));
        let log = daemon.log();
        let line = log
            .lines()
            .find(|l| l.contains("was missing and is redeclared"))
            .unwrap_or_else(|| panic!("{log}"));
        assert!(line.contains("delay.00") && line.contains("ERROR"), "{line}");
        assert!(!log.contains("the lane lost its queue"), "{log}");
    });
}

#[test]
fn a_queue_of_dead_letters_that_was_deleted_is_put_back_before_a_letter_is_written() {
    run(async {
        let broker = Broker::shared();
        let receiver = Receiver::start(|_, _| status(500)).await;
        let setup = Setup::new(
            &broker,
            &(QUICK.to_owned() + &subscriber("a", &receiver.url, "retry = { max_attempts = 1 }")),
        );
        let _daemon = setup.start().await;
        delete_queue(&broker, "sub.a.dead").await;
        broker.publish("a.b", [event(0)]).await;
        broker.wait_depth("sub.a.dead", 1).await;
        assert_eq!(receiver.count(), 1);
    });
}

#[test]
fn while_a_level_cannot_be_put_back_no_batch_is_attempted_again_and_everybody_is_told() {
    run(async {
        let broker = Broker::private().await;
        let receiver = Receiver::start(|_, _| status(500)).await;
        let api = Api::new();
        let setup = Setup::new(
            &broker,
            &(QUICK.to_owned() + &api.section() + &subscriber("a", &receiver.url, "")),
        );
        let daemon = setup.start().await;
        eventually("all is declared", async || broker.depth("state").await >= Some(2)).await;
        // In this order: between the two the daemon would redeclare the level.
        broker.node().ctl(&["set_vhost_limits", r#"{"max-queues":1}"#]);
        delete_queue(&broker, "delay.00").await;
        broker.publish("a.b", [event(0)]).await;
        let says_why = |text: &Value| text.as_str().is_some_and(|t| t.contains("queue limit"));
        api.wait("a", "is not well", |s| {
            s["state"] == "queue_fails" && says_why(&s["queue_error"])
        })
        .await;
        eventually("it was tried again", async || {
            let all = api.get("/api/v1/subscribers").await.json();
            says_why(&all["queue"]["error"])
        })
        .await;
        let checked = setup.run(&["check", "--connect"]);
        let reported = String::from_utf8_lossy(&checked.stderr).into_owned();
        assert!(
            checked.status.code() == Some(1)
                && reported.contains("delay.00")
                && reported.contains("is missing"),
            "{reported}"
        );
        assert_eq!(
            receiver.count(),
            1,
            "no second request for a batch that cannot be written down"
        );
        broker.node().ctl(&["clear_vhost_limits"]);
        eventually("it goes on", async || receiver.requests().iter().any(|r| r.attempt() == 2))
            .await;
        assert_eq!(
            receiver.requests().iter().filter(|r| r.attempt() == 1).count(),
            2,
            "{}",
            daemon.log()
        );
    });
}

#[test]
fn what_may_not_be_unbound_any_more_holds_up_no_other_and_writes_no_marks() {
    run(async {
        let broker = Broker::private().await;
        let receiver = Receiver::accepting().await;
        let api = Api::new();
        let rest = |names: &[&str]| {
            QUICK.to_owned()
                + &names.iter().map(|n| subscriber(n, &receiver.url, "")).collect::<String>()
        };
        let before = Setup::new(&broker, &rest(&["a", "b", "gone"]));
        let daemon = before.start().await;
        eventually("all are recorded", async || broker.depth("state").await >= Some(4)).await;
        assert!(daemon.stop().await.success());
        // The user may do with the new exchange what it needs, and nothing with the old one.
        let new = format!("{}-new", broker.exchange);
        let own = format!("^({}\\..*|{new}|amq\\.default)$", broker.prefix.replace('.', "\\."));
        broker.node().ctl(&["add_user", "tight", "secret"]);
        broker.node().ctl(&["set_permissions", "tight", &own, &own, &own]);
        let url = broker.url.replace("guest:guest", "tight:secret");
        let section = format!(
            "[queue]\nurl = \"{url}\"\nexchange = \"{new}\"\nprefix = \"{}\"\n{}",
            broker.prefix,
            api.section()
        );
        let after = Setup::with_text(&(section.clone() + &rest(&["a", "b", "new"])));
        let daemon = after.start().await;
        daemon.wait_log("its bindings cannot be put right").await;
        let reported = |name: &str| {
            let name = format!("subscriber=\"{name}\"");
            daemon
                .log()
                .lines()
                .filter(|l| l.contains("its bindings cannot be put right") && l.contains(&name))
                .count()
        };
        eventually("each is reported", async || {
            ["a", "b", "gone"].iter().all(|n| reported(n) >= 1)
        })
        .await;
        // The others go on: one that is removed now is unbound, a pause is heard, and the new
        // exchange delivers.
        std::fs::write(after.config(), section + &rest(&["a", "b"])).expect("writes");
        assert_eq!(api.post("/api/v1/reload", "{}").await.status, 200);
        daemon.wait_log("was unbound; its backlog stays").await;
        broker.publish_to(&new, "a.b", [event(0)]).await;
        receiver.wait_requests(2).await;
        assert_eq!(api.post("/api/v1/subscribers/a/pause", "{}").await.status, 200);
        let records = records(&broker, |r| r["paused"] == true).await;
        let marks = records.iter().filter(|r| !r["mark"].is_null()).count();
        assert_eq!(marks, 2, "of two daemons, and none for each try: {records:#?}");
        assert!(
            ["a", "b", "gone"].iter().all(|n| reported(n) <= 2),
            "once for each reason:\n{}",
            daemon.log()
        );
    });
}

#[test]
fn a_stream_is_no_source_queue() {
    run(async {
        let broker = Broker::shared();
        let (connection, channel) = broker.channel().await;
        let durable = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
        let mut stream = FieldTable::default();
        stream.insert("x-queue-type".into(), AMQPValue::LongString("stream".into()));
        channel.queue_declare(named(&broker, "log"), durable, stream).await.expect("declares");
        let section = broker.section(&["a"]).replace(
            &format!("exchange = \"{}\"", broker.exchange),
            &format!("source_queue = \"{}.log\"", broker.prefix),
        );
        let setup =
            Setup::with_text(&(section + QUICK + &subscriber("a", "http://127.0.0.1:9/", "")));
        for arguments in [&["run"][..], &["check", "--connect"]] {
            let output = setup.run(arguments);
            let reported = String::from_utf8_lossy(&output.stderr).into_owned();
            assert_eq!(output.status.code(), Some(1), "{reported}");
            assert!(
                reported.contains(&format!("{}.log` is a stream", broker.prefix))
                    && reported.contains("quorum queue"),
                "{reported}"
            );
        }
        channel.queue_delete(named(&broker, "log"), Default::default()).await.expect("deletes");
        connection.close(200, "done".into()).await.expect("closes");
    });
}

#[test]
fn a_connection_with_few_channels_is_no_reason_to_call_the_delay_ladder_broken() {
    run(async {
        let mut broker = Broker::private().await;
        broker.url += "?channel_max=8";
        let receiver = Receiver::accepting().await;
        let setup = Setup::new(
            &broker,
            &(QUICK.to_owned()
                + "[log]\nlevel = \"debug\"\n"
                + &subscriber("a", &receiver.url, "")),
        );
        let daemon = setup.start().await;
        daemon.wait_log("the delay ladder could not be tried").await;
        broker.publish("a.b", [event(0)]).await;
        receiver.wait_all(1).await;
        assert!(!daemon.log().contains("the delay ladder fails"), "{}", daemon.log());
    });
}

/// A user who may only read the source queue learns its type only when a message comes from it.
#[test]
fn a_stream_is_no_source_queue_for_a_user_who_may_only_read_it_either() {
    run(async {
        let broker = Broker::private().await;
        let receiver = Receiver::accepting().await;
        let api = Api::new();
        let (connection, channel) = broker.channel().await;
        let durable = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
        let mut stream = FieldTable::default();
        stream.insert("x-queue-type".into(), AMQPValue::LongString("stream".into()));
        channel.queue_declare("log".into(), durable, stream).await.expect("declares");
        connection.close(200, "done".into()).await.expect("closes");
        let own = format!("{}\\..*|amq\\.default", broker.prefix);
        broker.node().ctl(&["add_user", "reader", "secret"]);
        broker.node().ctl(&[
            "set_permissions",
            "reader",
            &format!("^({own})$"),
            &format!("^({own})$"),
            &format!("^({own}|log)$"),
        ]);
        let url = broker.url.replace("guest:guest", "reader:secret");
        let section = format!(
            "[queue]\nurl = \"{url}\"\nsource_queue = \"log\"\nprefix = \"{}\"\n{}",
            broker.prefix,
            api.section()
        );
        let setup = Setup::with_text(&(section + QUICK + &subscriber("a", &receiver.url, "")));
        let daemon = setup.start().await;
        let says_why = |all: &Value| {
            all["queue"]["error"].as_str().is_some_and(|t| t.contains("`log` is a stream"))
        };
        eventually("it is reported when the first one arrives", async || {
            broker.put("", "log", event(0).as_bytes(), Default::default()).await;
            says_why(&api.get("/api/v1/subscribers").await.json())
        })
        .await;
        assert_eq!(receiver.count(), 0, "{}", daemon.log());
    });
}

#[test]
fn a_connection_that_the_broker_does_not_allow_shows_in_readiness_metric_and_status_in_the_brokers_words()
 {
    run(async {
        let broker = Broker::private().await;
        let receiver = Receiver::accepting().await;
        let api = Api::new();
        broker.node().ctl(&["set_vhost_limits", r#"{"max-connections":2}"#]);
        let setup = Setup::new(
            &broker,
            &(QUICK.to_owned() + &api.section() + &subscriber("a", &receiver.url, "")),
        );
        let daemon = setup.start().await;
        let says_why = |text: &Value| {
            text.as_str().is_some_and(|t| {
                t.contains("connection limit (2) is reached") && t.contains("list_vhost_limits")
            })
        };
        api.wait("a", "is not well", |s| {
            s["state"] == "queue_fails" && says_why(&s["queue_error"])
        })
        .await;
        let all = api.get("/api/v1/subscribers").await.json();
        assert!(all["queue"]["up"] == false && says_why(&all["queue"]["error"]), "{all}");
        let ready = api.get("/readyz").await;
        assert_eq!(ready.status, 503, "{ready:?}");
        assert_eq!(api.metric("hooktrail_queue_up").await, Some(0.0));
        assert_eq!(api.metric("hooktrail_lane_up{subscriber=\"a\"}").await, Some(0.0));
        let shown = setup.ok(&["status"]);
        assert!(shown.contains("connection limit (2) is reached"), "{shown}");
        assert!(
            !daemon.log().contains("list_permissions"),
            "it is not a matter of permissions: {}",
            daemon.log()
        );
        broker.node().ctl(&["clear_vhost_limits"]);
        api.wait("a", "is well again", |s| s["state"] == "ok").await;
        eventually("it is ready", async || api.get("/readyz").await.status == 200).await;
        broker.publish("a.b", [event(0)]).await;
        receiver.wait_all(1).await;
    });
}

#[test]
fn the_cause_stands_in_the_status_when_the_broker_refuses_the_password_or_is_away() {
    run(async {
        let broker = Broker::private().await;
        let receiver = Receiver::accepting().await;
        let api = Api::new();
        let setup = Setup::new(
            &broker,
            &(QUICK.to_owned() + &api.section() + &subscriber("a", &receiver.url, "")),
        );
        let daemon = setup.start().await;
        api.wait("a", "is well", |s| s["state"] == "ok").await;
        broker.node().ctl(&["change_password", "guest", "another"]);
        broker.node().ctl(&["close_all_connections", "a test"]);
        let error = async || {
            api.get("/api/v1/subscribers").await.json()["queue"]["error"]
                .as_str()
                .unwrap_or_default()
                .to_owned()
        };
        eventually("it is reported", async || {
            error().await.contains("refused user name or password")
        })
        .await;
        api.wait("a", "reports it too", |s| {
            s["queue_error"].as_str().is_some_and(|t| t.contains("refused user name or password"))
        })
        .await;
        broker.node().ctl(&["change_password", "guest", "guest"]);
        api.wait("a", "is well again", |s| s["state"] == "ok" && s["queue_error"].is_null()).await;
        broker.node().kill().await;
        eventually("it is reported", async || error().await.contains("Connection refused")).await;
        let shown = setup.ok(&["status"]);
        assert!(
            shown.contains("Connection refused") && shown.contains("cannot connect to the broker"),
            "{shown}"
        );
        drop(daemon);
    });
}

#[test]
fn a_record_that_is_deleted_is_written_again_and_blamed_on_no_other_daemon() {
    run(async {
        let broker = Broker::shared();
        let receiver = Receiver::accepting().await;
        let api = Api::new();
        let text = QUICK.to_owned()
            + &api.section()
            + &subscriber("a", &receiver.url, "")
            + &subscriber("b", &receiver.url, "");
        let setup = Setup::new(&broker, &text);
        let daemon = setup.start().await;
        eventually("both are recorded", async || broker.depth("state").await >= Some(3)).await;
        setup.ok(&["pause", "b", "--why", "a test"]);
        delete_queue(&broker, "state").await;
        daemon.wait_log("it was deleted; bindings and pauses are written again").await;
        // A mark, who is bound, who is paused.
        eventually("it is written again", async || broker.depth("state").await >= Some(4)).await;
        assert!(!daemon.log().contains("another daemon"), "{}", daemon.log());
        assert_eq!(api.subscriber("b").await["state"], "paused");
        assert!(daemon.stop().await.success());
        let next = setup.start().await;
        api.wait("b", "is paused over a restart", |s| {
            s["state"] == "paused" && s["paused"]["why"] == "a test"
        })
        .await;
        broker.publish("a.b", [event(0)]).await;
        receiver.wait_requests(1).await;
        assert_eq!(broker.depth("sub.b").await, Some(1));
        drop(next);
    });
}

#[test]
fn a_long_record_is_read_from_its_newest_snapshot_if_that_fits() {
    run(async {
        let (broker, receiver, api) = (Broker::shared(), Receiver::accepting().await, Api::new());
        let text = format!(
            "{QUICK}[log]\nlevel = \"debug\"\n{}{}",
            api.section(),
            subscriber("a", &receiver.url, "")
        );
        let setup = Setup::new(&broker, &text);
        let marks = || (0..12_000).map(|n| format!("{{\"mark\":\"msg_{n}\"}}"));
        let fill = async || {
            broker.publish_to("", &format!("{}.state", broker.prefix), marks()).await;
            eventually("the broker counts them", async || {
                broker.depth("state").await >= Some(12_000)
            })
            .await;
        };
        // The number of records that a daemon has read at its start, and that it has skipped.
        let start = async || {
            let daemon = setup.start().await;
            daemon.wait_log("the record was read to its end").await;
            let log = daemon.log();
            let line = log
                .lines()
                .find(|l| l.contains("the record was read to its end"))
                .expect("the line")
                .to_owned();
            let number = |key: &str| -> u64 {
                let (_, rest) =
                    line.split_once(&format!("{key}=")).unwrap_or_else(|| panic!("{line}"));
                rest.split(' ')
                    .next()
                    .expect("a number")
                    .trim()
                    .parse()
                    .unwrap_or_else(|e| panic!("{e}: {line}"))
            };
            (daemon, number("records"), number("passed"))
        };
        let pauses = async |paused: bool| {
            api.wait("a", "as it was", |s| (s["state"] == "paused") == paused).await;
        };

        let (daemon, ..) = start().await;
        assert_eq!(
            api.post("/api/v1/subscribers/a/pause", r#"{"why":"a test"}"#).await.status,
            200
        );
        pauses(true).await;
        assert!(daemon.stop().await.success());
        fill().await;

        let (daemon, records, passed) = start().await;
        assert!(
            records > 12_000 && passed == 0,
            "{records} and {passed}: there is no snapshot yet"
        );
        eventually("there is one", async || broker.depth("state.snapshot").await == Some(1)).await;
        pauses(true).await;
        assert!(daemon.stop().await.success());

        let (daemon, records, passed) = start().await;
        assert!(records < 100 && passed > 12_000, "{records} and {passed}");
        pauses(true).await;
        assert_eq!(api.post("/api/v1/subscribers/a/resume", "").await.status, 200);
        broker.publish("activity_log.user.updated", [event(0)]).await;
        receiver.wait_all(1).await;
        assert!(daemon.stop().await.success());

        // Records behind the snapshot count.
        let (daemon, records, passed) = start().await;
        assert!(records < 100 && passed > 12_000, "{records} and {passed}");
        pauses(false).await;
        assert!(daemon.stop().await.success());

        // Another record of the same name, in which something else is where the snapshot's mark
        // was.
        delete_queue(&broker, "state").await;
        let (daemon, ..) = start().await;
        assert!(daemon.stop().await.success());
        fill().await;
        let (daemon, records, passed) = start().await;
        assert!(records > 12_000 && passed == 0, "{records} and {passed}");
        pauses(false).await;
        broker.publish("activity_log.user.updated", [event(1)]).await;
        receiver.wait_all(2).await;
        assert!(daemon.stop().await.success());
    });
}

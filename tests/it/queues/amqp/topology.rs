//! The objects in the broker: declared, found, in conflict.

use lapin::{
    BasicProperties, Confirmation, ExchangeKind,
    options::{
        BasicPublishOptions, ConfirmSelectOptions, ExchangeDeclareOptions, ExchangeDeleteOptions,
        QueueDeclareOptions,
    },
    types::{AMQPValue, FieldTable},
};

use crate::support::{
    api::Api,
    broker::Broker,
    daemon::{QUICK, Setup, subscriber},
    eventually,
    receiver::{Receiver, event, status},
    run,
};

async fn declare(broker: &Broker, queue: &str, arguments: &[(&str, AMQPValue)]) {
    let (connection, channel) = broker.channel().await;
    let mut table = FieldTable::default();
    for (name, value) in arguments {
        table.insert((*name).into(), value.clone());
    }
    let durable = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
    channel
        .queue_declare(format!("{}.{queue}", broker.prefix).as_str().into(), durable, table)
        .await
        .expect("declares");
    connection.close(200, "done".into()).await.expect("closes");
}

#[test]
fn a_queue_with_harmful_arguments_is_named_with_both_values_and_harms_no_other_subscriber() {
    run(async {
        let broker = Broker::shared();
        let (one, two) = (Receiver::accepting().await, Receiver::accepting().await);
        declare(&broker, "sub.two", &[]).await;
        let setup = Setup::new(
            &broker,
            &(QUICK.to_owned()
                + &subscriber("one", &one.url, "")
                + &subscriber("two", &two.url, "")),
        );
        let daemon = setup.start().await;
        let needle = format!("queue `{}.sub.two` exists with", broker.prefix);
        daemon.wait_log(&needle).await;
        let log = daemon.log();
        let line = log.lines().find(|l| l.contains(&needle)).expect("just seen");
        assert!(
            line.contains("where hooktrail needs") && line.contains("delete it when it is empty"),
            "{line}"
        );
        broker.publish("a.b", (0..10).map(event)).await;
        one.wait_all(10).await;
        let check = setup.run(&["check", "--connect"]);
        assert_eq!(check.status.code(), Some(1));
        let needle = format!("harmful: queue `{}.sub.two`: exists with", broker.prefix);
        assert!(String::from_utf8_lossy(&check.stderr).contains(&needle));
    });
}

#[test]
fn an_exchange_that_cannot_route_by_patterns_is_an_error_that_suggests_a_source_queue() {
    run(async {
        let broker = Broker::shared();
        let (connection, channel) = broker.channel().await;
        let durable = ExchangeDeclareOptions { durable: true, ..ExchangeDeclareOptions::default() };
        channel
            .exchange_declare(
                broker.exchange.as_str().into(),
                ExchangeKind::Fanout,
                durable,
                FieldTable::default(),
            )
            .await
            .expect("declares");
        connection.close(200, "done".into()).await.expect("closes");
        let setup =
            Setup::new(&broker, &(QUICK.to_owned() + &subscriber("a", "http://127.0.0.1:9/", "")));
        let output = setup.run(&["run"]);
        assert_eq!(output.status.code(), Some(1));
        let reported = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(
            reported
                .contains(&format!("exchange `{}` is of type fanout, not topic", broker.exchange))
                && reported.contains("source_queue"),
            "{reported}"
        );
    });
}

#[test]
fn an_exchange_with_an_alternate_exchange_of_its_own_is_fine() {
    run(async {
        let broker = Broker::shared();
        let receiver = Receiver::accepting().await;
        let (connection, channel) = broker.channel().await;
        let durable = ExchangeDeclareOptions { durable: true, ..ExchangeDeclareOptions::default() };
        let mut arguments = FieldTable::default();
        arguments.insert("alternate-exchange".into(), AMQPValue::LongString("amq.fanout".into()));
        channel
            .exchange_declare(
                broker.exchange.as_str().into(),
                ExchangeKind::Topic,
                durable,
                arguments,
            )
            .await
            .expect("declares");
        connection.close(200, "done".into()).await.expect("closes");
        let setup = Setup::new(&broker, &(QUICK.to_owned() + &subscriber("a", &receiver.url, "")));
        let _daemon = setup.start().await;
        broker.publish("a.b", [event(0)]).await;
        receiver.wait_all(1).await;
    });
}

#[test]
fn a_missing_source_queue_is_an_error() {
    run(async {
        let broker = Broker::shared();
        let text = format!(
            "[queue]\nurl = \"{}\"\nsource_queue = \"{}.nope\"\nprefix = \"{}\"\n",
            broker.url, broker.prefix, broker.prefix
        );
        let setup = Setup::with_text(&(text + QUICK + &subscriber("a", "http://127.0.0.1:9/", "")));
        let output = setup.run(&["run"]);
        assert_eq!(output.status.code(), Some(1));
        assert!(
            String::from_utf8_lossy(&output.stderr).contains(".nope` does not exist"),
            "{output:?}"
        );
    });
}

#[test]
fn a_pattern_or_a_subscriber_that_is_not_configured_any_more_is_unbound_and_its_backlog_stays() {
    run(async {
        let broker = Broker::shared();
        let receiver = Receiver::accepting().await;
        let with = |patterns: &str, b: &str| {
            Setup::new(
                &broker,
                &(QUICK.to_owned()
                    + &subscriber("a", &receiver.url, &format!("events = [{patterns}]"))
                    + b),
            )
        };
        let both = with(
            "\"x.*\", \"y.*\"",
            &subscriber(
                "b",
                "http://127.0.0.1:9/",
                "circuit_breaker = { failures = 1, open_for = \"1h\", max_open_for = \"1h\" }",
            ),
        );
        let first = both.start().await;
        broker.publish("y.1", [event(0)]).await;
        receiver.wait_all(1).await;
        first.wait_log("circuit open").await;
        broker.publish("y.2", [event(1)]).await;
        broker.wait_depth("sub.b", 1).await;
        assert!(first.stop().await.success());

        let fewer = with("\"x.*\"", "");
        let second = fewer.start().await;
        second.wait_log("pattern=\"y.*\"").await;
        second.wait_log("subscriber=\"b\"").await;
        broker.publish("y.3", [event(2)]).await;
        broker.publish("x.4", [event(3)]).await;
        eventually("only the configured pattern is delivered", async || {
            receiver.accepted() == [0, 1, 3]
        })
        .await;
        assert_eq!(broker.depth("sub.a").await, Some(0));
        assert_eq!(
            broker.depth("sub.b").await,
            Some(1),
            "the backlog stays, and nothing was added"
        );
        assert!(second.stop().await.success());

        let third = both.start().await;
        broker.publish("y.5", [event(4)]).await;
        eventually("bound again", async || receiver.accepted() == [0, 1, 3, 4]).await;
        drop(third);
    });
}

#[test]
fn a_queue_that_is_deleted_under_the_daemon_is_redeclared() {
    run(async {
        let broker = Broker::shared();
        let receiver = Receiver::accepting().await;
        let setup = Setup::new(&broker, &(QUICK.to_owned() + &subscriber("a", &receiver.url, "")));
        let daemon = setup.start().await;
        broker.publish("a.b", [event(0)]).await;
        receiver.wait_all(1).await;
        let (connection, channel) = broker.channel().await;
        channel
            .queue_delete(format!("{}.sub.a", broker.prefix).as_str().into(), Default::default())
            .await
            .expect("deletes");
        connection.close(200, "done".into()).await.expect("closes");
        daemon.wait_log("the lane lost its queue").await;
        daemon.wait_log("the lane has its queue again").await;
        broker.publish("a.b", [event(1)]).await;
        receiver.wait_all(2).await;
    });
}

#[test]
fn a_queue_that_another_consumer_holds_is_not_for_repair_to_change() {
    run(async {
        let broker = Broker::shared();
        let setup =
            Setup::new(&broker, &(QUICK.to_owned() + &subscriber("a", "http://127.0.0.1:9/", "")));
        let (connection, channel) = broker.channel().await;
        let queue = format!("{}.sub.a", broker.prefix);
        let exclusive = QueueDeclareOptions { exclusive: true, ..QueueDeclareOptions::default() };
        channel
            .queue_declare(queue.as_str().into(), exclusive, FieldTable::default())
            .await
            .expect("declares");
        channel
            .basic_publish(
                "".into(),
                queue.as_str().into(),
                BasicPublishOptions::default(),
                b"{}",
                BasicProperties::default(),
            )
            .await
            .expect("publishes");
        for arguments in [&["repair", "a"][..], &["repair", "a", "--yes"]] {
            let output = setup.run(arguments);
            let reported = String::from_utf8_lossy(&output.stderr).into_owned();
            assert_eq!(output.status.code(), Some(1), "{reported}");
            assert!(
                reported.contains(&queue)
                    && reported.contains("RESOURCE_LOCKED")
                    && reported.contains("nothing was changed"),
                "{reported}"
            );
        }
        let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
        let found = channel
            .queue_declare(queue.as_str().into(), passive, FieldTable::default())
            .await
            .expect("is there");
        assert_eq!(found.message_count(), 1);
        connection.close(200, "done".into()).await.expect("closes"); // its exclusive queue goes with it
        assert!(setup.ok(&["repair", "a"]).contains("sub.a: declared"));
        assert!(setup.ok(&["repair", "a"]).contains("are sound; nothing was changed"));
    });
}

#[test]
fn daemons_with_different_configurations_take_no_events_from_each_other() {
    run(async {
        let broker = Broker::shared();
        let (one, two) = (Receiver::accepting().await, Receiver::accepting().await);
        let text = |subscribers: &[String]| QUICK.to_owned() + &subscribers.concat();
        let (a, b) = (subscriber("one", &one.url, ""), subscriber("two", &two.url, ""));
        let both = Setup::new(&broker, &text(&[a.clone(), b.clone()]));
        let first = both.start().await;
        broker.publish("a.b", (0..5).map(event)).await;
        two.wait_all(5).await;
        // A daemon that does not have `two` may not unbind it while another works for it.
        let only = Setup::new(&broker, &text(std::slice::from_ref(&a)));
        let second = only.start().await;
        second.wait_log("another daemon delivers its events").await;
        broker.publish("a.b", (5..10).map(event)).await;
        two.wait_all(10).await;
        // When no daemon claims it, it is unbound; a daemon that has it again binds it.
        assert!(first.stop().await.success());
        assert!(second.stop().await.success());
        let second = only.start().await;
        second.wait_log("was unbound; its backlog stays").await;
        let first = both.start().await;
        broker.publish("a.b", (10..15).map(event)).await;
        two.wait_all(15).await;
        // One that has other patterns for it: both sides' patterns hold, and it is said.
        let other =
            Setup::new(&broker, &text(&[a, subscriber("two", &two.url, "events = [\"x.*\"]")]));
        let third = other.start().await;
        first.wait_log("has another configuration of this subscriber").await;
        eventually("both patterns are bound", async || {
            broker.publish("a.b", [event(15)]).await;
            two.accepted().contains(&15)
        })
        .await;
        broker.publish("x.y", [event(16)]).await;
        two.wait_all(17).await;
        // Once all have the same configuration, what only the other one wanted is gone, although it
        // was put back.
        first.kill();
        third.kill();
        let last = other.start().await;
        last.wait_log("unbound a pattern that is not configured any more subscriber=\"two\"").await;
        drop((second, last));
    });
}

/// A paused subscriber's queue has no consumer, as if no daemon served it.
#[test]
fn what_another_daemon_has_paused_stays_bound_and_gets_every_event() {
    run(async {
        let broker = Broker::shared();
        let receiver = Receiver::accepting().await;
        let (here, there) = (Api::new(), Api::new());
        let one = QUICK.to_owned() + &subscriber("one", &receiver.url, "");
        let zz = subscriber("zz", &receiver.url, "");
        let has_it = Setup::new(
            &broker,
            &(here.section() + &one + &subscriber("two", &receiver.url, "paused = true")),
        );
        let first = has_it.start().await;
        // A mark and what is bound.
        eventually("it is recorded", async || broker.depth("state").await >= Some(3)).await;
        // Its lane works, so others see that they are not alone.
        broker.publish("a.b", [event(1000)]).await;
        receiver.wait_requests(1).await;
        // One subscriber's fault that only an operator can fix does not keep daemons from asking,
        // and no other subscriber from being unbound.
        declare(&broker, "sub.refused", &[]).await;
        let has_not = Setup::new(
            &broker,
            &(there.section() + &one + &subscriber("refused", &receiver.url, "") + &zz),
        );
        let second = has_not.start().await;
        let logged = |what: &str, name: &str| {
            let name = format!("subscriber=\"{name}\"");
            second.log().lines().filter(|l| l.contains(what) && l.contains(&name)).count()
        };
        let mut published = 0;
        eventually("it asks, and is answered", async || {
            broker.publish("a.b", [event(published)]).await;
            published += 1;
            logged("another daemon has it: it stays bound", "two") == 1
        })
        .await;
        let text = std::fs::read_to_string(has_not.config()).expect("text").replace(&zz, "");
        assert!(text.contains(&(there.section() + &one)) && !text.contains("zz"), "{text}");
        has_not.write("hooktrail.toml", text);
        assert_eq!(there.post("/api/v1/reload", "{}").await.status, 200);
        // They are inspected by their names.
        eventually("one that no daemon has is removed", async || {
            logged("was unbound; its backlog stays", "zz") == 1
        })
        .await;
        broker.publish("a.b", [event(published)]).await;
        assert_eq!(
            broker.depth("sub.two").await,
            Some(u32::try_from(published).expect("few") + 2),
            "all are there"
        );
        assert_eq!(logged("was unbound", "two"), 0);
        assert!(!first.log().contains("was unbound"), "{}", first.log());
    });
}

#[test]
fn after_a_change_of_the_exchange_the_old_one_brings_nothing_any_more() {
    run(async {
        let broker = Broker::shared();
        let receiver = Receiver::accepting().await;
        let text = QUICK.to_owned() + &subscriber("a", &receiver.url, "");
        let before = Setup::new(&broker, &text);
        let daemon = before.start().await;
        eventually("its bindings are recorded", async || {
            broker.depth("state").await.is_some_and(|n| n >= 2)
        })
        .await;
        assert!(daemon.stop().await.success());
        let new = format!("{}-new", broker.exchange);
        let changed = format!(
            "[queue]\nurl = \"{}\"\nexchange = \"{new}\"\nprefix = \"{}\"\n{text}",
            broker.url, broker.prefix
        );
        let changed = Setup::with_text(&changed);
        let daemon = changed.start().await;
        daemon.wait_log("unbound a pattern that is not configured any more").await;
        broker.publish_to(&new, "a.b", [event(0)]).await;
        receiver.wait_all(1).await;
        let (connection, channel) = broker.channel().await;
        channel.confirm_select(ConfirmSelectOptions::default()).await.expect("confirms");
        let mandatory = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
        let unroutable = async || {
            let sent = channel.basic_publish(
                broker.exchange.as_str().into(),
                "a.b".into(),
                mandatory,
                b"{}",
                BasicProperties::default(),
            );
            let confirmed = sent.await.expect("publishes").await.expect("confirmed");
            matches!(confirmed, Confirmation::Ack(Some(_)))
        };
        eventually("the old exchange has no queue any more", unroutable).await;
        channel
            .exchange_delete(new.as_str().into(), ExchangeDeleteOptions::default())
            .await
            .expect("deletes");
        connection.close(200, "done".into()).await.expect("closes");
    });
}

#[test]
fn what_is_finished_behind_a_batch_that_waits_is_finished_for_good() {
    run(async {
        let broker = Broker::shared();
        let receiver = Receiver::start(|_, _| status(500)).await;
        let breaker = "circuit_breaker = { failures = 1, open_for = \"300ms\", max_open_for = \"300ms\" }\nbatch = { max_events = 5, max_bytes = \"1KiB\" }";
        let setup =
            Setup::new(&broker, &(QUICK.to_owned() + &subscriber("a", &receiver.url, breaker)));
        let daemon = setup.start().await;
        broker.publish("a.b", [event(0)]).await;
        daemon.wait_log("circuit open").await;
        // While the circuit is probed with one batch, the others wait, and no subscriber wants the
        // events behind them.
        let large = format!(r#"{{"event":"a.b","pad":"{}"}}"#, "x".repeat(2000));
        broker.publish("a.b", (1..9).map(event).chain([large])).await; // as many as are taken at once
        receiver.wait_requests(6).await;
        broker.wait_depth("sub.a.dead", 1).await;
        receiver.now(|_, _| status(200));
        receiver.wait_all(9).await;
        broker.wait_depth("sub.a", 0).await;
        assert_eq!(broker.depth("sub.a.dead").await, Some(1), "written once, not at each probe");
    });
}

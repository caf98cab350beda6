//! History's connection under a limit of connections: it gives way to deliveries and intake.

use std::time::{Duration, Instant};

use lapin::{
    options::{BasicPublishOptions, QueueBindOptions, QueueDeclareOptions},
    types::{AMQPValue, FieldTable},
};
use serde_json::Value;

use crate::support::{
    api::Api,
    broker::Broker,
    daemon::{QUICK, Setup, subscriber},
    eventually,
    receiver::{Receiver, event, status},
    run,
};

fn ctl(broker: &Broker, arguments: &[&str]) -> String {
    tokio::task::block_in_place(|| broker.node().ctl(arguments))
}

/// The processes of the daemon's connections with this role.
fn connections(broker: &Broker, role: &str) -> Vec<String> {
    let arguments =
        ["list_connections", "--quiet", "--no-table-headers", "pid", "client_properties"];
    let (all, name) = (ctl(broker, &arguments), format!(" {role}\""));
    let all = all.lines().filter_map(|line| line.split_once('\t'));
    all.filter(|(_, about)| about.contains(&name)).map(|(pid, _)| pid.to_owned()).collect()
}

/// The process of the connection on which history takes its events.
fn connection_of_history(broker: &Broker) -> String {
    let queue = format!("{}.history", broker.prefix);
    let first = |arguments: [&str; 5], of: &str| {
        let all = ctl(broker, &arguments);
        let found = all.lines().filter_map(|line| line.split_once('\t'));
        let mut found = found.filter(|(name, _)| *name == of).map(|(_, pid)| pid.to_owned());
        found.next().unwrap_or_else(|| panic!("{of} in {all}"))
    };
    let consumers =
        ["list_consumers", "--quiet", "--no-table-headers", "queue_name", "channel_pid"];
    let channel = first(consumers, &queue);
    first(["list_channels", "--quiet", "--no-table-headers", "pid", "connection"], &channel)
}

fn allow(broker: &Broker, connections: usize) {
    let limits = format!(r#"{{"max-connections":{connections}}}"#);
    ctl(broker, &["set_vhost_limits", &limits]);
}

const TOKEN: &str = "the-token-of-the-tests";

async fn health(api: &Api) -> Value {
    let token = format!("Bearer {TOKEN}");
    let headers = [("authorization", token.as_str())];
    api.send("GET", "/api/v1/subscribers", &headers, "").await.json()["history"].clone()
}

/// Waits until history takes events.
async fn wait_taking(broker: &Broker, api: &Api) {
    let queue = format!("{}.history", broker.prefix);
    let arguments = ["list_consumers", "--quiet", "--no-table-headers", "queue_name"];
    eventually("history takes events", async || {
        ctl(broker, &arguments).lines().any(|name| name == queue)
    })
    .await;
    eventually("history is kept", async || health(api).await["state"] == "kept").await;
}

/// Waits until the status says that history has no connection, and what to do.
async fn wait_waiting(api: &Api) {
    eventually("history waits for a connection", async || {
        let health = health(api).await;
        let why = health["why"].as_str().unwrap_or_default();
        health["state"] == "incomplete"
            && why.contains("history waits for a connection: ")
            && why.contains("connection limit (4) is reached")
            && why.contains("rabbitmqctl list_vhost_limits")
    })
    .await;
}

#[test]
fn under_a_limit_of_connections_history_gives_its_own_to_deliveries_and_waits_for_another() {
    run(async {
        let broker = Broker::private().await;
        let receiver = Receiver::accepting().await;
        // Each event needs a retry, and so a connection to publish it.
        receiver.now(|request, _| status(if request.attempt() == 1 { 503 } else { 200 }));
        let api = Api::new();
        let setup = Setup::new(
            &broker,
            &format!(
                "{QUICK}{}token = \"{TOKEN}\"\n{}",
                api.section(),
                subscriber("a", &receiver.url, "")
            ),
        );
        // The daemon's to publish, to declare and to consume, and the producer's.
        let needed = 4;
        let (_producer, channel) = broker.channel().await;
        allow(&broker, needed + 1);
        let daemon = setup.start().await;
        for (n, role) in (0..).zip(["publishing", "consuming"]) {
            allow(&broker, needed + 1);
            wait_taking(&broker, &api).await;
            allow(&broker, needed);
            // Its own end would leave room for another, so that it need not give it up.
            let history = connection_of_history(&broker);
            let mut closed = connections(&broker, role);
            closed.retain(|pid| *pid != history);
            assert!(!closed.is_empty(), "{role}");
            for pid in closed {
                ctl(&broker, &["close_connection", &pid, "a test"]);
            }
            let options = BasicPublishOptions::default();
            let (exchange, body) = (broker.exchange.as_str().into(), event(n));
            let published = channel.basic_publish(
                exchange,
                "a.b".into(),
                options,
                body.as_bytes(),
                Default::default(),
            );
            published.await.expect("publishes");
            receiver.wait_all(n + 1).await;
            wait_waiting(&api).await;
        }
        assert!(daemon.log().contains("history waits for a connection"), "{}", daemon.log());
        let shown = setup.run(&["status"]);
        let shown = String::from_utf8_lossy(&shown.stdout);
        assert!(shown.contains("history waits for a connection"), "{shown}");
        allow(&broker, needed + 1);
        wait_taking(&broker, &api).await;
        eventually("history has what came meanwhile", async || {
            let shown = setup.run(&["history", "--json"]);
            let shown: Value = serde_json::from_slice(&shown.stdout).unwrap_or_default();
            shown["events"].as_array().is_some_and(|events| events.len() == 2)
        })
        .await;
    });
}

/// A queue of the exchange that is full: each event is refused, which may be history's queue's doing.
async fn refusing(broker: &Broker, channel: &lapin::Channel) {
    let mut arguments = FieldTable::default();
    arguments.insert("x-max-length".into(), AMQPValue::LongInt(1));
    arguments.insert("x-overflow".into(), AMQPValue::LongString("reject-publish".into()));
    let queue: lapin::types::ShortString = format!("{}.full", broker.prefix).into();
    let options = QueueDeclareOptions { exclusive: true, ..QueueDeclareOptions::default() };
    channel.queue_declare(queue.clone(), options, arguments).await.expect("declares");
    let body = event(0);
    let options = BasicPublishOptions::default();
    let filling = channel.basic_publish(
        "".into(),
        queue.clone(),
        options,
        body.as_bytes(),
        Default::default(),
    );
    filling.await.expect("publishes");
    let exchange = broker.exchange.as_str().into();
    let (options, none) = (QueueBindOptions::default(), FieldTable::default());
    channel.queue_bind(queue, exchange, "#".into(), options, none).await.expect("binds");
}

/// Has the daemon suspect the queue of history until its log says this. Nothing is wrong with that
/// queue, and history is kept all the while.
async fn suspected(broker: &Broker, api: &Api, log: impl Fn() -> String, says: &str) {
    let token = format!("Bearer {TOKEN}");
    let headers = [("authorization", token.as_str()), ("content-type", "application/json")];
    let mut published: Option<Instant> = None;
    eventually(says, async || {
        // A trial follows within seconds, unless the queue has given an event since.
        if published.is_none_or(|at| at.elapsed() > Duration::from_secs(10)) {
            let refused = api.send("POST", "/api/v1/events", &headers, &event(1)).await;
            assert_eq!(refused.status, 503, "{refused:?}");
            published = Some(Instant::now());
        }
        let log = log();
        assert!(!log.contains("the queue of history fails"), "{log}");
        assert_eq!(health(api).await["state"], "kept", "{log}");
        log.contains(says)
    })
    .await;
    assert!(!connection_of_history(broker).is_empty());
}

#[test]
fn a_suspected_queue_that_a_limit_keeps_from_being_tried_is_no_outage_while_history_takes_from_it()
{
    run(async {
        let broker = Broker::private().await;
        let receiver = Receiver::accepting().await;
        let api = Api::new();
        let setup = Setup::new(
            &broker,
            &format!(
                "{QUICK}{}token = \"{TOKEN}\"\n[log]\nlevel = \"debug\"\n{}",
                api.section(),
                subscriber("a", &receiver.url, "")
            ),
        );
        // The daemon's four, of which one is history's, and the producer's.
        let all = 5;
        let (_producer, channel) = broker.channel().await;
        allow(&broker, all);
        let daemon = setup.start().await;
        wait_taking(&broker, &api).await;
        refusing(&broker, &channel).await;
        // There is no room for another connection: it is tried on history's own.
        let own = "the queue of history can be used queue=\"";
        assert!(daemon.log().contains(own), "{}", daemon.log());
        let history = connection_of_history(&broker);
        suspected(&broker, &api, || daemon.log(), "is_shared=true").await;
        assert_eq!(connection_of_history(&broker), history);
        // There is, for what tries the delay ladder too, and the broker opens no channel on it.
        allow(&broker, all + 2);
        ctl(&broker, &["set_user_limits", "guest", r#"{"max-channels":0}"#]);
        let says = "the queue of history cannot be tried, and is consumed";
        suspected(&broker, &api, || daemon.log(), says).await;
        ctl(&broker, &["clear_user_limits", "guest", "all"]);
    });
}

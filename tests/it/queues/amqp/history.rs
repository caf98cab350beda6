//! The queue of history: it gets every event, one store has it, and it never stops a producer.

use std::{
    collections::BTreeSet,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use hooktrail::{
    clock,
    config::{Backend, Config, load},
    queue::{
        Begin, HistorySource as _, HistoryStart, NewEvent, Published, Queue as _, QueueError,
        Window,
        amqp::{AmqpQueue, History},
    },
    store::{EventNumber, NewRow},
    telemetry::metrics::Metrics,
};
use lapin::{
    BasicProperties,
    options::{BasicPublishOptions, ConfirmSelectOptions, QueueBindOptions, QueueDeclareOptions},
    types::{AMQPValue, FieldTable},
};
use tokio::{sync::watch, task::JoinHandle};

use crate::support::{
    PATIENCE,
    broker::{Broker, SETTLING},
    daemon::{QUICK, Setup, subscriber},
    eventually, run,
};

/// The queue of a daemon, with its background tasks.
pub(super) struct Running {
    queue: AmqpQueue,
    stop: watch::Sender<bool>,
    tasks: Option<JoinHandle<()>>,
    metrics: Metrics,
    /// Its folder.
    _setup: Setup,
}

/// `[history]` and one subscriber, which wants `wanted.#`.
fn configured(broker: &Broker, more: &str) -> (Setup, Config) {
    let receiver = "http://127.0.0.1:9/";
    let setup = Setup::new(
        broker,
        &(QUICK.to_owned() + more + &subscriber("a", receiver, "events = [\"wanted.#\"]")),
    );
    let config = load(&setup.config()).unwrap_or_else(|e| panic!("{e}"));
    (setup, config)
}

pub(super) async fn started(broker: &Broker, more: &str) -> Running {
    let (setup, config) = configured(broker, more);
    let Backend::Amqp(amqp) = config.queue.backend else { panic!("another queue") };
    let metrics = Metrics::new(clock::now());
    let queue = AmqpQueue::new(amqp, metrics.clone());
    queue.prepare(&config.subscribers).await.unwrap_or_else(|e| panic!("{e}"));
    let (stop, stopping) = watch::channel(false);
    let subscribers = watch::Sender::new(Arc::clone(&config.subscribers)).subscribe();
    let tasks = tokio::spawn({
        let queue = queue.clone();
        async move { Box::pin(queue.background(subscribers, stopping)).await }
    });
    Running { queue, stop, tasks: Some(tasks), metrics, _setup: setup }
}

impl Running {
    pub(super) async fn history(&self, store: &str) -> Result<History, QueueError> {
        self.history_after(store, None).await
    }

    pub(super) async fn history_after(
        &self,
        store: &str,
        last: Option<Duration>,
    ) -> Result<History, QueueError> {
        let last = last.map(|ago| (EventNumber(1), clock::now() - ago));
        let known_until = last.map(|(_, at)| at);
        self.history_of(HistoryStart { store: Some(store.to_owned()), last, known_until }).await
    }

    pub(super) async fn history_of(&self, start: HistoryStart) -> Result<History, QueueError> {
        tokio::time::timeout(PATIENCE, self.queue.history(start)).await.expect("an answer")
    }

    pub(super) async fn publish(&self, event_type: &str, body: &str) -> Published {
        let event = NewEvent {
            event_type: event_type.to_owned(),
            message_id: Some(clock::event_id()),
            body: Bytes::copy_from_slice(body.as_bytes()),
            traceparent: None,
            tenant: None,
        };
        self.queue.publish(vec![event]).await.unwrap_or_else(|e| panic!("{e}"))[0]
    }

    pub(super) async fn close(mut self) {
        self.stop.send_replace(true);
        if let Some(tasks) = self.tasks.take() {
            tasks.await.expect("ends");
        }
        self.queue.close().await;
    }
}

/// Takes until there are this many events, and stores them.
pub(super) async fn take(history: &mut History, count: usize) -> Vec<NewRow> {
    let mut rows = Vec::new();
    while rows.len() < count {
        let taking = history.take(&mut rows, 1000);
        tokio::time::timeout(PATIENCE, taking)
            .await
            .unwrap_or_else(|_| panic!("events"))
            .unwrap_or_else(|e| panic!("{e}"));
        history.stored().await.unwrap_or_else(|e| panic!("{e}"));
    }
    rows
}

pub(super) fn body(n: usize) -> String {
    format!(r#"{{"event":"x.y","n":{n}}}"#)
}

#[test]
fn every_event_comes_into_history_in_its_order_and_is_gone_from_the_queue_when_it_is_stored() {
    run(async {
        let broker = Broker::shared();
        let daemon = started(&broker, "").await;
        let mut history = daemon.history("store-1").await.unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(history.gaps(), [], "history begins here");
        let bodies: Vec<String> = (0..3000).map(body).collect();
        broker.publish("nobody.wants", &bodies).await;
        let at = clock::unix_seconds(clock::now()) - 60;
        let properties =
            BasicProperties::default().with_message_id("id-1".into()).with_timestamp(at);
        broker.put(&broker.exchange, "wanted.one", b"not JSON", properties).await;
        let rows = take(&mut history, 3001).await;
        assert_eq!(rows.len(), 3001);
        for (row, body) in rows.iter().zip(&bodies) {
            assert_eq!((row.event_type.as_str(), &row.body[..]), ("nobody.wants", body.as_bytes()));
            assert!(row.number.is_none() && !row.redelivered && row.message_id.is_none());
        }
        let last = rows.last().expect("an event");
        assert_eq!(
            (last.event_type.as_str(), last.message_id.as_deref(), clock::unix_seconds(last.at)),
            ("wanted.one", Some("id-1"), at)
        );
        history.close().await;
        broker.wait_depth("history", 0).await;
        // A channel that closes requeues what was not acked, perhaps a moment later.
        let mut history = daemon.history("store-1").await.unwrap_or_else(|e| panic!("{e}"));
        broker.publish("nobody.wants", [body(9999)]).await;
        let next = take(&mut history, 1).await;
        let found: Vec<&[u8]> = next.iter().map(|row| &row.body[..]).collect();
        assert_eq!(found, [body(9999).as_bytes()], "nothing comes again");
        history.close().await;
        daemon.close().await;
    });
}

#[test]
fn events_that_were_taken_and_not_stored_are_given_again_as_redelivered() {
    run(async {
        let broker = Broker::shared();
        let daemon = started(&broker, "").await;
        let mut history = daemon.history("store-1").await.unwrap_or_else(|e| panic!("{e}"));
        broker.publish("a.b", [body(0)]).await;
        take(&mut history, 1).await;
        broker.publish("a.b", [body(1), body(2)]).await;
        let mut rows = Vec::new();
        while rows.len() < 2 {
            history.take(&mut rows, 1).await.unwrap_or_else(|e| panic!("{e}"));
        }
        history.close().await;
        let mut history = daemon.history("store-1").await.unwrap_or_else(|e| panic!("{e}"));
        let again = take(&mut history, 2).await;
        assert!(again.iter().all(|row| row.redelivered));
        // What a channel gives back as it closes comes in any order.
        let bodies = |rows: &[NewRow]| rows.iter().map(|r| r.body.clone()).collect::<BTreeSet<_>>();
        assert_eq!(bodies(&again), bodies(&rows));
        history.close().await;
        daemon.close().await;
    });
}

#[test]
fn it_is_bound_when_it_is_old_enough_and_what_no_subscriber_wants_is_unmatched_all_the_same() {
    run(async {
        let broker = Broker::shared();
        let daemon = started(&broker, "").await;
        assert_eq!(broker.depth("history").await, None, "no daemon has asked for history");
        assert_eq!(daemon.publish("other", &body(0)).await, Published::Unmatched);
        let opening = daemon.history("store-1");
        let declared = async {
            eventually("it is declared", async || broker.depth("history").await.is_some()).await;
            let declared = Instant::now();
            assert!(!daemon.metrics.expose().contains("hooktrail_history_bound 1"));
            declared
        };
        let (history, declared) = tokio::join!(async { (opening.await, Instant::now()) }, declared);
        let (history, opened) = history;
        let mut history = history.unwrap_or_else(|e| panic!("{e}"));
        // It was declared a little before that was seen.
        assert!(opened - declared >= Duration::from_millis(1800), "{:?}", opened - declared);
        assert!(daemon.metrics.expose().contains("hooktrail_history_bound 1"));
        assert_eq!(daemon.publish("other", &body(1)).await, Published::Unmatched);
        assert_eq!(daemon.publish("wanted.one", &body(2)).await, Published::Stored);
        assert_eq!(take(&mut history, 2).await.len(), 2);
        assert_eq!(broker.depth("sub.a").await, Some(1));
        history.close().await;
        daemon.close().await;
    });
}

/// What ends the connection, such as a consumer that is too late for the broker, ends no lane's.
#[test]
fn history_takes_events_on_a_connection_of_its_own() {
    run(async {
        let broker = Broker::shared();
        let daemon = started(&broker, "").await;
        let connections = || {
            let text = daemon.metrics.expose();
            let sample = "hooktrail_broker_connections{role=\"consuming\"} ";
            let value = text.lines().find_map(|line| line.strip_prefix(sample)).expect("exposed");
            value.parse::<f64>().expect("a number")
        };
        let config = configured(&broker, "").1;
        let window = Window::of(&config.subscribers[0]);
        let lane = daemon.queue.open(&config.subscribers[0], window).await;
        let _lane = lane.unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(connections(), 1.0);
        let history = daemon.history("store-1").await.unwrap_or_else(|e| panic!("{e}"));
        // One on which its queue was tried may take a moment to end.
        eventually("history has its own", async || connections() == 2.0).await;
        history.close().await;
        eventually("it ends with history", async || connections() == 1.0).await;
        daemon.close().await;
    });
}

#[test]
fn one_store_has_history_until_another_adopts_it() {
    run(async {
        let broker = Broker::shared();
        let (first, second) = (started(&broker, "").await, started(&broker, "").await);
        let mut history = first.history("store-1").await.unwrap_or_else(|e| panic!("{e}"));
        let refused = second.history("store-2").await.expect_err("another store has it");
        assert!(
            refused.is_of_another_store() && refused.to_string().contains("store adopt"),
            "{refused}"
        );
        assert_eq!(
            second.queue.history_store().await.as_ref().map(Option::as_deref),
            Ok(Some("store-1"))
        );
        second.queue.adopt_history("store-2").await.unwrap_or_else(|e| panic!("{e}"));
        let mut rows = Vec::new();
        let ended = tokio::time::timeout(PATIENCE, history.take(&mut rows, 10)).await;
        let ended = ended.expect("an answer").expect_err("it is the other's now");
        assert!(ended.is_for_operator() && rows.is_empty(), "{ended}");
        history.close().await;
        // Its daemon reads that a little later.
        let mut opened = None;
        eventually("it has history", async || {
            opened = second.history("store-2").await.ok();
            opened.is_some()
        })
        .await;
        let mut history = opened.expect("just seen");
        broker.publish("a.b", [body(0)]).await;
        assert_eq!(take(&mut history, 1).await.len(), 1);
        assert!(first.history("store-1").await.is_err());
        history.close().await;
        first.close().await;
        second.close().await;
    });
}

#[test]
fn without_history_its_queue_is_deleted_unless_another_daemon_reads_it() {
    run(async {
        let broker = Broker::shared();
        let on = started(&broker, "").await;
        let history = on.history("store-1").await.unwrap_or_else(|e| panic!("{e}"));
        let off = started(&broker, "[history]\nretention = \"0s\"\n").await;
        assert!(off.history("store-2").await.is_err_and(|e| e.is_for_operator()));
        broker.publish("a.b", [body(0)]).await;
        assert!(broker.depth("history").await.is_some(), "another daemon has history");
        history.close().await;
        on.close().await;
        off.close().await;
        let off = started(&broker, "[store]\nurl = \"none\"\n").await;
        eventually("it is deleted", async || broker.depth("history").await.is_none()).await;
        assert_eq!(off.publish("other", &body(1)).await, Published::Unmatched);
        off.close().await;
    });
}

/// Deletes the queue of history, as an operator may.
async fn delete_queue(broker: &Broker) {
    let (connection, channel) = broker.channel().await;
    let name = format!("{}.history", broker.prefix);
    channel.queue_delete(name.as_str().into(), Default::default()).await.expect("deletes");
    connection.close(200, "done".into()).await.expect("closes");
}

#[test]
fn a_queue_that_is_deleted_is_declared_again_and_history_has_a_gap() {
    run(async {
        let broker = Broker::shared();
        let daemon = started(&broker, "").await;
        let mut history = daemon.history("store-1").await.unwrap_or_else(|e| panic!("{e}"));
        broker.publish("a.b", [body(0)]).await;
        let before = take(&mut history, 1).await;
        delete_queue(&broker).await;
        let mut rows = Vec::new();
        let ended = tokio::time::timeout(PATIENCE, history.take(&mut rows, 10)).await;
        assert!(ended.expect("an answer").is_err());
        drop(history);
        eventually("it is declared again", async || broker.depth("history").await.is_some()).await;
        let mut history = daemon.history("store-1").await.unwrap_or_else(|e| panic!("{e}"));
        // It is bound a little later. An event may come before that is known, and the gap with it.
        let (mut rows, mut gaps) = (Vec::new(), Vec::new());
        while rows.is_empty() || gaps.is_empty() {
            broker.publish("a.b", [body(1)]).await;
            let taking = history.take(&mut rows, 10);
            if let Ok(taken) = tokio::time::timeout(Duration::from_millis(200), taking).await {
                taken.unwrap_or_else(|e| panic!("{e}"));
            }
            gaps.extend(history.gaps());
        }
        let [gap] = &gaps[..] else { panic!("{gaps:?}") };
        assert!(gap.what == "events" && gap.why.contains("deleted"), "{gap:?}");
        // As the record has it: in milliseconds.
        assert_eq!(clock::rfc3339(gap.from), clock::rfc3339(before[0].at));
        assert!(gap.until > gap.from, "{gap:?}");
        history.close().await;
        daemon.close().await;
    });
}

/// The consumer's end comes while it is looked whether a larger prefetch can be asked for.
#[test]
fn a_queue_that_is_deleted_before_what_was_taken_is_stored_gives_an_error_and_no_silence() {
    run(async {
        let broker = Broker::shared();
        let daemon = started(&broker, "").await;
        let mut history = daemon.history("store-1").await.unwrap_or_else(|e| panic!("{e}"));
        // So many that a larger prefetch is wanted, and fewer than the first one allows.
        broker.publish("a.b", (0..8).map(body)).await;
        let mut rows = Vec::new();
        while rows.len() < 8 {
            let taking = tokio::time::timeout(PATIENCE, history.take(&mut rows, 1000));
            taking.await.expect("events").unwrap_or_else(|e| panic!("{e}"));
        }
        delete_queue(&broker).await;
        history.stored().await.unwrap_or_else(|e| panic!("{e}"));
        let ended = tokio::time::timeout(PATIENCE, history.take(&mut rows, 10)).await;
        let ended = ended.expect("an answer").expect_err("nothing takes from the queue");
        assert!(ended.to_string().contains("cancelled the consumer"), "{ended}");
        history.close().await;
        daemon.close().await;
    });
}

/// The queues that have a binding to the exchange of the events.
fn bindings(broker: &Broker) -> BTreeSet<String> {
    let columns = ["source_name", "destination_name"];
    let arguments = [&["list_bindings", "--quiet", "--no-table-headers"][..], &columns].concat();
    let all = tokio::task::block_in_place(|| broker.node().ctl(&arguments));
    let bound = all.lines().filter_map(|line| line.split_once('\t'));
    bound.filter(|(from, _)| *from == broker.exchange).map(|(_, to)| to.to_owned()).collect()
}

/// Whether the broker confirms an event of another program's.
async fn is_taken(broker: &Broker) -> bool {
    is_taken_within(broker, Duration::from_secs(3)).await
}

async fn is_taken_within(broker: &Broker, time: Duration) -> bool {
    let (connection, channel) = broker.channel().await;
    channel.confirm_select(ConfirmSelectOptions::default()).await.expect("confirms");
    let sent = channel
        .basic_publish(
            broker.exchange.as_str().into(),
            "a.b".into(),
            BasicPublishOptions::default(),
            body(7).as_bytes(),
            BasicProperties::default().with_delivery_mode(2),
        )
        .await
        .expect("publishes");
    let confirmed = tokio::time::timeout(time, sent).await;
    // Not waited for: RabbitMQ answers it only when a dead queue does not hold the channel any more.
    tokio::spawn(async move { connection.close(200, "done".into()).await.ok() });
    matches!(confirmed, Ok(Ok(lapin::Confirmation::Ack(None))))
}

#[test]
fn a_node_that_is_killed_while_the_queue_is_young_stops_no_producer() {
    run(async {
        let broker = Broker::private().await;
        let daemon = started(&broker, "").await;
        // The subscribers' queues outlive it.
        tokio::time::sleep(SETTLING).await;
        // Before the queue is young: this takes seconds.
        let bound = bindings(&broker);
        assert!(bound.contains(&format!("{}.sub.a", broker.prefix)), "{bound:?}");
        let opening = tokio::spawn({
            let queue = daemon.queue.clone();
            let start =
                HistoryStart { store: Some("store-1".to_owned()), last: None, known_until: None };
            async move { queue.history(start).await }
        });
        eventually("it is declared", async || broker.depth("history").await.is_some()).await;
        broker.node().restart_after_kill().await;
        assert!(is_taken(&broker).await, "the producers go on at once");
        assert!(bindings(&broker).is_superset(&bound), "no subscriber's queue lost its binding");
        broker.publish("wanted.one", [body(0)]).await;
        broker.wait_depth("sub.a", 1).await;
        let history = tokio::time::timeout(PATIENCE, opening).await.expect("an answer");
        let mut history = history.expect("ends").unwrap_or_else(|e| panic!("{e}"));
        broker.publish("a.b", [body(1)]).await;
        take(&mut history, 1).await;
        history.close().await;
        daemon.close().await;
    });
}

/// Declares the queue of history and binds it, as another program may.
async fn declare_and_bind(broker: &Broker) {
    let (_connection, channel) = broker.channel().await;
    let mut arguments = FieldTable::default();
    for (key, value) in [
        ("x-queue-type", AMQPValue::LongString("quorum".into())),
        ("x-delivery-limit", AMQPValue::LongLongInt(1_000_000_000)),
        ("x-single-active-consumer", AMQPValue::Boolean(true)),
        ("x-max-length-bytes", AMQPValue::LongLongInt(1 << 30)),
        ("x-overflow", AMQPValue::LongString("drop-head".into())),
    ] {
        arguments.insert(key.into(), value);
    }
    let name = format!("{}.history", broker.prefix);
    let durable = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
    channel.queue_declare(name.as_str().into(), durable, arguments).await.expect("declares");
    let (exchange, options) = (broker.exchange.as_str().into(), QueueBindOptions::default());
    let bound = channel.queue_bind(name.into(), exchange, "#".into(), options, Default::default());
    bound.await.expect("binds");
}

/// Leaves a queue of history that is bound and dead: every publish is refused. A node that is killed
/// a moment after the queue was declared leaves it so, unless it was quick enough to write it down:
/// then once more.
async fn kill_the_queue(broker: &Broker) {
    let begun = Instant::now();
    loop {
        declare_and_bind(broker).await;
        broker.node().restart_after_kill().await;
        if !is_taken_within(broker, Duration::from_secs(10)).await {
            return;
        }
        assert!(begun.elapsed() < PATIENCE, "the queue outlives each kill");
        delete_queue(broker).await;
    }
}

#[test]
fn a_bound_queue_that_cannot_be_used_is_unbound_and_declared_anew() {
    run(async {
        let broker = Broker::private().await;
        let daemon = started(&broker, "").await;
        tokio::time::sleep(SETTLING).await;
        daemon.close().await;
        // This takes seconds, so that it is done before the queue is young.
        let bound = bindings(&broker);
        let name = format!("{}.history", broker.prefix);
        kill_the_queue(&broker).await;
        let begun = Instant::now();
        let daemon = started(&broker, "").await;
        let opening = tokio::spawn({
            let queue = daemon.queue.clone();
            let start =
                HistoryStart { store: Some("store-1".to_owned()), last: None, known_until: None };
            async move { queue.history(start).await }
        });
        eventually("producers go on", async || is_taken(&broker).await).await;
        // It is tried for 5 s, and deleted at the earliest 30 s later.
        assert!(begun.elapsed() < Duration::from_secs(25), "{:?}", begun.elapsed());
        let lost: Vec<String> = bound.difference(&bindings(&broker)).cloned().collect();
        assert!(lost.iter().all(|queue| *queue == name), "of subscribers: {lost:?}");
        let history = tokio::time::timeout(PATIENCE, opening).await.expect("an answer");
        let mut history = history.expect("ends").unwrap_or_else(|e| panic!("{e}"));
        broker.publish("a.b", [body(1)]).await;
        take(&mut history, 1).await;
        history.close().await;
        daemon.close().await;
    });
}

#[test]
fn a_mark_that_is_redelivered_does_not_show_that_what_was_before_it_is_stored() {
    run(async {
        let broker = Broker::shared();
        let daemon = started(&broker, "").await;
        let mut history = daemon.history("store-1").await.unwrap_or_else(|e| panic!("{e}"));
        let name = configured(&broker, "").1.subscribers[0].name.clone();
        let begin = async || daemon.queue.begin(&name).await.unwrap_or_else(|e| panic!("{e}"));
        let mut rows = Vec::new();
        // It is sent a moment after the subscriber was bound.
        let taken = async {
            while let Ok(Begin::Waits) = daemon.queue.begin(&name).await {
                let taking = history.take(&mut rows, 10);
                match tokio::time::timeout(Duration::from_millis(100), taking).await {
                    Ok(taken) => return taken,
                    Err(_) => continue,
                }
            }
            panic!("passed before a mark was stored");
        };
        let taken = tokio::time::timeout(PATIENCE, taken).await.expect("a mark");
        taken.unwrap_or_else(|e| panic!("{e}"));
        // It goes back.
        history.close().await;
        let mut history = daemon.history("store-1").await.unwrap_or_else(|e| panic!("{e}"));
        for shown in [Begin::Waits, Begin::Passed] {
            let taking = history.take(&mut rows, 10);
            let taken = tokio::time::timeout(PATIENCE, taking).await.expect("a mark");
            taken.unwrap_or_else(|e| panic!("{e}"));
            history.stored().await.unwrap_or_else(|e| panic!("{e}"));
            // The first time another mark is sent.
            assert_eq!(begin().await, shown);
        }
        assert!(rows.is_empty(), "no mark is an event: {rows:?}");
        history.close().await;
        daemon.close().await;
    });
}

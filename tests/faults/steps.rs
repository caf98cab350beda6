//! The daemon is killed at each step between one durable fact and the next.

use std::{sync::Arc, time::Duration};

use hooktrail::{
    failpoint::{self, Step},
    store::Gap,
};
use lapin::{ExchangeKind, options::ExchangeDeclareOptions};
use rand::{SeedableRng as _, rngs::StdRng};

use crate::{
    environment::Environment,
    impatient_broker, prepare, prepare_intake,
    remembered::{NUMBERS, reach},
    round::Round,
    support::{
        broker::Broker,
        daemon::{QUICK, Setup, subscriber},
        eventually,
        queue::{Embedded, Queue},
        receiver::{Receiver, event, status},
        run, tests_that_need,
    },
    world::{Place, Shape, TYPE, World},
};

tests_that_need!(
    broker:
    a_daemon_that_is_killed_when_it_has_declared_the_witness_has_recorded_what_history_lacks,
    a_daemon_that_is_killed_at_any_step_on_a_broker_loses_nothing,
    a_daemon_that_is_killed_at_any_step_of_its_scribe_loses_nothing,
    a_daemon_that_is_killed_at_any_step_of_its_store_on_a_broker_loses_nothing_and_history_says_what_it_lacks,
    a_replay_that_is_killed_when_the_broker_has_confirmed_it_loses_nothing_and_sends_the_same_ids_again,
);

/// At these a daemon on a broker can be killed, without a source queue.
const ON_A_BROKER: [Step; 7] = [
    Step::Attempting,
    Step::Answered,
    Step::Published,
    Step::Confirmed,
    Step::Acked,
    Step::Recorded,
    Step::Stored,
];

pub(crate) const EMBEDDED: [Step; 5] =
    [Step::Attempting, Step::Answered, Step::Committing, Step::Committed, Step::Stored];

/// At these a scribe can be killed.
pub(crate) const SCRIBE: [Step; 3] = [Step::Taken, Step::Scribed, Step::Acked];

/// At these a daemon with a store can be killed, on either queue.
pub(crate) const OF_THE_STORE: [Step; 6] = [
    Step::HistoryCommitting,
    Step::HistoryCommitted,
    Step::Remembered,
    Step::Released,
    Step::StoreCommitting,
    Step::StoreCommitted,
];

const SHAPE: Shape = Shape { concurrency: 3, max_events: 10, daemons: 1, rate: 300 };

async fn dies_at(what: &str, place: Place, step: Step, after: u32) {
    let mut rng = StdRng::seed_from_u64(7);
    let kinds = place.kinds();
    let mut world = World::new(place, SHAPE, &kinds, &mut rng).await;
    // Those that share a store have numbers of their own.
    let number = Step::ALL.iter().position(|s| *s == step).unwrap_or_default() as u64;
    let outcome = Round::new(&mut world, rng).dies_at(step, after, number * NUMBERS).await;
    let verdicts: Vec<String> = outcome.verdicts.iter().map(ToString::to_string).collect();
    println!(
        "{what}: killed at {step:?} after {after}: {} events; {verdicts:#?}",
        outcome.ledger.confirmed.len()
    );
    if !outcome.is_good() {
        let evidence = world
            .keep_evidence(&format!("step-{what}-{step:?}"), &outcome.story)
            .display()
            .to_string();
        panic!(
            "{step:?} after {after}: {verdicts:#?}\nleft: {:?}\n{:#?}\nevidence in {evidence}",
            outcome.left, outcome.complaints
        );
    }
}

/// The number of times that the step is passed before the daemon dies there; a step that comes
/// once cannot be passed.
fn passed(step: Step) -> u32 {
    match step {
        Step::Recorded | Step::Stored | Step::Relayed => 0,
        Step::StoreCommitting | Step::StoreCommitted => 0,
        _ => rand::random_range(0..6),
    }
}

/// Rounds on this broker that share their stores.
fn on(broker: &Arc<Broker>, source_queue: bool) -> impl Fn() -> Place {
    let broker = broker.clone();
    let stores = Arc::new(tempfile::tempdir().expect("a directory"));
    move || Place::Broker {
        broker: broker.clone(),
        source_queue,
        others: Arc::default(),
        stores: stores.clone(),
    }
}

fn a_daemon_that_is_killed_at_any_step_on_a_broker_loses_nothing() {
    run(async {
        let broker = impatient_broker().await;
        for after in [3, 30, 50] {
            let fresh = Arc::new(broker.sibling());
            dies_at("rabbitmq", on(&fresh, false)(), Step::Declared, after).await;
        }
        let place = on(&broker, false);
        // An event is for those whose queues are bound when it is published.
        prepare(place(), &mut StdRng::seed_from_u64(0)).await;
        for step in ON_A_BROKER {
            dies_at("rabbitmq", place(), step, passed(step)).await;
        }
        let second = Arc::new(broker.sibling());
        let place = on(&second, true);
        prepare(place(), &mut StdRng::seed_from_u64(0)).await;
        dies_at("rabbitmq", place(), Step::Relayed, passed(Step::Relayed)).await;
    });
}

fn a_daemon_that_is_killed_at_any_step_of_its_scribe_loses_nothing() {
    run(async {
        let broker = impatient_broker().await;
        prepare_intake(&broker).await;
        for step in SCRIBE {
            let place = Place::Intake { broker: broker.clone(), queue: Embedded::new() };
            dies_at("intake", place, step, passed(step)).await;
        }
    });
}

#[test]
fn a_daemon_that_is_killed_at_any_step_on_the_embedded_queue_loses_nothing() {
    run(async {
        for step in EMBEDDED {
            dies_at("embedded", Place::Embedded(Embedded::new()), step, passed(step)).await;
        }
    });
}

fn a_daemon_that_is_killed_at_any_step_of_its_store_on_a_broker_loses_nothing_and_history_says_what_it_lacks()
 {
    run(async {
        let broker = impatient_broker().await;
        let place = on(&broker, false);
        prepare(place(), &mut StdRng::seed_from_u64(0)).await;
        for step in OF_THE_STORE {
            dies_at("rabbitmq", place(), step, passed(step)).await;
        }
    });
}

#[test]
fn a_daemon_that_is_killed_at_any_step_of_its_store_on_the_embedded_queue_loses_nothing_and_history_says_what_it_lacks()
 {
    run(async {
        for step in OF_THE_STORE {
            dies_at("embedded", Place::Embedded(Embedded::new()), step, passed(step)).await;
        }
    });
}

fn a_replay_that_is_killed_when_the_broker_has_confirmed_it_loses_nothing_and_sends_the_same_ids_again()
 {
    run(async {
        let broker = Broker::shared();
        let receiver = Receiver::start(|_, _| status(503)).await;
        let groups = QUICK.to_owned()
            + &subscriber(
                "a",
                &receiver.url,
                "retry = { max_attempts = 1 }\nbatch = { max_events = 1 }",
            );
        let setup = Setup::new(&broker, &groups);
        let daemon = setup.start().await;
        broker.publish(TYPE, (0..5).map(event)).await;
        broker.wait_depth("sub.a.dead", 5).await;
        receiver.now(|_, _| status(200));
        let variable = failpoint::VARIABLE;
        let replay = ["dead", "replay", "a"];
        let ended = setup.run_as(&format!("{variable}=Moved exec \"$0\" \"$@\""), &replay);
        assert_eq!(ended.status.code(), None, "it was killed: {ended:?}");
        receiver.wait_all(5).await;
        // All are back, since no ack was sent.
        broker.wait_depth("sub.a.dead", 5).await;
        setup.ok(&replay);
        eventually("each came twice", async || receiver.accepted().len() == 10).await;
        let ids: std::collections::BTreeSet<String> =
            receiver.requests().iter().map(|r| r.id().to_owned()).collect();
        assert_eq!(ids.len(), 5, "under the ids that they had");
        broker.wait_depth("sub.a.dead", 0).await;
        drop(daemon);
    });
}

fn a_daemon_that_is_killed_when_it_has_declared_the_witness_has_recorded_what_history_lacks() {
    run(async {
        let (broker, data) = (Broker::shared(), tempfile::tempdir().expect("a directory"));
        let receiver = Receiver::accepting().await;
        let queue = format!(
            "[queue]\nurl = \"{}\"\nexchange = \"{}\"\nprefix = \"{}\"\ndata_dir = \"{}\"\n",
            broker.url,
            broker.exchange,
            broker.prefix,
            data.path().display()
        );
        let setup = Setup::with_text(&(queue + QUICK + &subscriber("a", &receiver.url, "")));
        let reached = async || reach(data.path(), false).await.unwrap_or_else(|e| panic!("{e}"));
        let daemon = setup.start().await;
        daemon.wait_log("every event goes into history").await;
        broker.publish(TYPE, [event(0)]).await;
        eventually("it is in history", async || reached().await.events == 1).await;
        assert!(daemon.stop().await.success());
        assert_eq!(reached().await.gaps, []);

        let (connection, channel) = broker.channel().await;
        let exchange = broker.exchange.as_str();
        channel.exchange_delete(exchange.into(), Default::default()).await.expect("deletes");
        let durable = ExchangeDeclareOptions { durable: true, ..Default::default() };
        let declared = channel.exchange_declare(
            exchange.into(),
            ExchangeKind::Topic,
            durable,
            Default::default(),
        );
        declared.await.expect("declares");
        connection.close(200, "done".into()).await.expect("closes");
        let dies = format!("{}=Witnessed exec \"$0\" \"$@\"", failpoint::VARIABLE);
        let ended = setup.spawn_as(&dies).wait().await;
        assert_eq!(ended.code(), None, "it was killed: {ended:?}");

        let daemon = setup.start().await;
        let mut gaps = Vec::new();
        eventually("history has the gap", async || {
            gaps = reached().await.gaps;
            gaps.iter().any(|gap| gap.what == "events")
        })
        .await;
        let is_of_the_witness = |gap: &Gap| gap.what == "events" && gap.why.contains("not bound");
        assert!(gaps.iter().any(is_of_the_witness), "{gaps:?}");
        assert!(daemon.stop().await.success());
    });
}

/// The embedded queue keeps points in time, which mean nothing any more when the clock is set.
#[test]
fn a_retry_that_was_scheduled_by_a_clock_that_was_ahead_waits_no_longer_when_that_is_set_back() {
    run(async {
        for restart in [false, true] {
            let (queue, environment) = (Embedded::new(), Environment::new());
            let receiver = Receiver::start(|_, _| status(503)).await;
            let setup =
                Setup::new(&queue, &(QUICK.to_owned() + &subscriber("a", &receiver.url, "")));
            let line = format!("{} exec \"$0\" \"$@\"", environment.variables());
            environment.clock_is_ahead(86_400);
            let mut daemon = setup.spawn_as(&line);
            daemon.wait_log("running").await;
            let queue = Queue::Embedded(queue);
            queue.publish(TYPE, (0..5).map(event)).await;
            receiver.wait_requests(1).await;
            queue.wait_retries("a", 0, 1).await;
            receiver.now(|_, _| status(200));
            if restart {
                daemon.end();
                environment.clock_is_ahead(0);
                daemon = setup.spawn_as(&line);
            } else {
                environment.clock_is_ahead(0);
            }
            let begun = std::time::Instant::now();
            receiver.wait_all(5).await;
            assert!(begun.elapsed() < Duration::from_secs(60), "after {:?}", begun.elapsed());
            drop(daemon);
        }
    });
}

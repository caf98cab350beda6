//! Rounds of faults from a seed, and the question at the end of each: was anything lost?
//!
//! `scripts/faults --help` says how to run many of them.
#![allow(
    clippy::disallowed_methods,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "tests read the real clock, and print what they measured"
)]

mod away;
mod environment;
mod fault;
mod front;
mod inflict;
mod memory;
mod oracle;
mod power;
mod proxy;
mod remembered;
mod round;
mod soak;
mod steps;
mod subscribers;
#[path = "../it/support/mod.rs"]
mod support;
mod world;

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use lapin::{options::QueueDeclareOptions, types::FieldTable};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};

use fault::Fault;
use power::Disk;
use remembered::NUMBERS;
use round::Round;
use support::{
    broker::{Broker, Node, SETTLING},
    queue::Embedded,
    run, tests_that_need,
};
use world::{Place, Shape, World};

tests_that_need!(
    broker:
    mixed_faults_on_rabbitmq_lose_nothing,
    mixed_faults_with_a_source_queue_lose_nothing,
    mixed_faults_on_a_cluster_lose_nothing,
    mixed_faults_with_an_intake_lose_nothing,
);

/// A number from the environment.
fn setting(name: &str, default: u64) -> u64 {
    match std::env::var(name) {
        Ok(text) => text.parse().unwrap_or_else(|e| panic!("{name}={text}: {e}")),
        Err(_) => default,
    }
}

fn shape(rng: &mut StdRng) -> Shape {
    Shape {
        concurrency: rng.random_range(1..6),
        max_events: rng.random_range(5..60),
        daemons: if rng.random_bool(0.3) { 2 } else { 1 },
        rate: *subscribers::pick(&[100, 300, 600], rng),
    }
}

/// One change is tried by the same faults as the one before; `scripts/faults` draws others.
const SEED: u64 = 2;

/// Rounds, one after the other, each from a seed of its own.
async fn rounds(what: &str, count: u64, place: impl AsyncFnMut(&mut StdRng) -> Place) {
    rounds_on(None, what, count, place).await;
}

/// Rounds on a disk that can lose its power.
async fn rounds_on(
    disk: Option<Arc<Disk>>,
    what: &str,
    count: u64,
    mut place: impl AsyncFnMut(&mut StdRng) -> Place,
) {
    let first_seed = setting("HOOKTRAIL_FAULTS_SEED", SEED);
    let length = Duration::from_secs(setting("HOOKTRAIL_FAULTS_SECONDS", 8));
    let (mut published, mut same_id, mut explained, mut dead, mut all_lost, mut failed) =
        (0, 0, 0, 0, 0, Vec::new());
    let mut all_faults: BTreeMap<String, usize> = BTreeMap::new();
    let mut subscribers = 0;
    for number in 0..count {
        let seed = first_seed + number;
        let begun = Instant::now();
        let mut rng = StdRng::seed_from_u64(seed);
        let place = place(&mut rng).await;
        let mut shape = shape(&mut rng);
        if place.embedded().is_some() {
            shape.daemons = 1;
        }
        let kinds = place.kinds();
        subscribers = kinds.len();
        let mut world = World::new(place, shape, &kinds, &mut rng).await;
        // In one of four there is nothing that can be why something comes again.
        let calm = seed.is_multiple_of(4) && disk.is_none();
        let wanted = std::env::var("HOOKTRAIL_FAULTS_WITH").ok();
        let dealt = match &disk {
            Some(_) => Fault::dealt_with_power(),
            None => Fault::dealt(&world.place, calm, seed, wanted.as_deref()),
        };
        world.disk = disk.clone();
        let outcome = Round::new(&mut world, rng)
            .calm(calm)
            .begins_with(dealt)
            .run(number * NUMBERS, length)
            .await;
        let sum =
            |of: fn(&oracle::Verdict) -> usize| outcome.verdicts.iter().map(of).sum::<usize>();
        let lost = sum(|v| v.lost.len());
        println!(
            "{what}, seed {seed}{}: {} faults {:?}; {} events confirmed, {} unknown; per subscriber: {} dead, {} again under one id, {} under another with a fault, LOST {lost}; all arrived {:.1} s after the last fault; {:.1} s in all",
            if calm { ", calm" } else { "" },
            outcome.faults.values().sum::<usize>(),
            outcome.faults,
            outcome.ledger.confirmed.len(),
            outcome.ledger.unknown.len(),
            sum(|v| v.dead),
            sum(|v| v.same_id),
            sum(|v| v.explained),
            outcome.drained_in.as_secs_f64(),
            begun.elapsed().as_secs_f64(),
        );
        published += outcome.ledger.confirmed.len();
        all_lost += lost;
        same_id += sum(|v| v.same_id);
        explained += sum(|v| v.explained);
        dead += sum(|v| v.dead);
        for (fault, n) in &outcome.faults {
            *all_faults.entry(fault.clone()).or_default() += n;
        }
        if !outcome.is_good() {
            let evidence = world.keep_evidence(&format!("faults-{what}-{seed}"), &outcome.story);
            let verdicts: Vec<String> =
                outcome.verdicts.iter().filter(|v| !v.is_good()).map(ToString::to_string).collect();
            let why = format!(
                "{what}, seed {seed} (HOOKTRAIL_FAULTS_SEED={seed}): {verdicts:#?}\nleft: {:?}\n{:#?}\nevidence in {}",
                outcome.left,
                outcome.complaints,
                evidence.display()
            );
            println!("FAILED: {why}");
            failed.push(why);
            if failed.len() as u64 >= setting("HOOKTRAIL_FAULTS_STOP_AFTER", 1) {
                break;
            }
        }
    }
    println!(
        "{what}: {count} rounds, {} faults {all_faults:?}; {published} events × {subscribers} subscribers, {dead} dead, {all_lost} lost, {same_id} came again under one id, {explained} under another",
        all_faults.values().sum::<usize>(),
    );
    assert!(failed.is_empty(), "{} rounds failed:\n{}", failed.len(), failed.join("\n"));
}

fn count() -> u64 {
    setting("HOOKTRAIL_FAULTS_ROUNDS", 1)
}

/// Little patience with consumers.
fn impatient() -> String {
    format!(
        "{{consumer_timeout, {}}}, {{channel_tick_interval, 1000}}",
        round::IMPATIENT.as_millis()
    )
}

async fn impatient_broker() -> Arc<Broker> {
    Arc::new(Broker::private_with(&impatient()).await)
}

async fn on_a_broker(what: &str, broker: Arc<Broker>, others: Arc<Vec<Node>>, source_queue: bool) {
    let stores = Arc::new(tempfile::tempdir().expect("a directory"));
    let place = || Place::Broker {
        broker: broker.clone(),
        source_queue,
        others: others.clone(),
        stores: stores.clone(),
    };
    prepare(place(), &mut StdRng::seed_from_u64(0)).await;
    rounds(what, count(), async |_| place()).await;
    let left = broker.node().ctl(&["list_connections", "client_properties"]);
    assert!(!left.contains("hooktrail"), "{left}");
}

/// An event of no round.
const FIRST: u64 = 999 * NUMBERS;

/// Declares what there is to declare, and waits: queues that are younger may not survive a kill -9
/// of the broker, whatever anybody does. And history begins: of what was before its first event it
/// says nothing.
async fn prepare(place: Place, rng: &mut StdRng) {
    if let Place::Broker { broker, source_queue: true, .. } = &place {
        let (connection, channel) = broker.channel().await;
        let durable = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
        let mut arguments = FieldTable::default();
        arguments.insert("x-queue-type".into(), support::broker::text("quorum"));
        channel.queue_declare("source".into(), durable, arguments).await.expect("declares");
        connection.close(200, "done".into()).await.expect("closes");
    }
    let kinds = place.kinds();
    let mut world = World::new(
        place,
        Shape { concurrency: 1, max_events: 1, daemons: 1, rate: 0 },
        &kinds,
        rng,
    )
    .await;
    world.spawn(0, None);
    world.wait_running(0).await;
    world.wait_remembering(0).await;
    tokio::time::sleep(SETTLING).await;
    if let Place::Broker { broker, source_queue, .. } = &world.place {
        let (exchange, key) =
            if *source_queue { ("", "source") } else { (&*broker.exchange, world::TYPE) };
        broker.publish_to(exchange, key, [support::receiver::event(FIRST)]).await;
    }
    for subscriber in &world.subscribers {
        subscriber.receiver.wait_requests(1).await;
    }
    support::eventually("history begins", async || {
        remembered::reach(&world.data_dir(0), false).await.is_ok_and(|reach| reach.events > 0)
    })
    .await;
    world.stop(0).await;
}

fn mixed_faults_on_rabbitmq_lose_nothing() {
    run(async { on_a_broker("rabbitmq", impatient_broker().await, Arc::default(), false).await });
}

fn mixed_faults_with_a_source_queue_lose_nothing() {
    run(async {
        on_a_broker("source-queue", impatient_broker().await, Arc::default(), true).await
    });
}

fn mixed_faults_on_a_cluster_lose_nothing() {
    run(async {
        let mut nodes = Node::cluster(3, &impatient()).await;
        let first = Arc::new(Broker::on(nodes.remove(0)));
        on_a_broker("cluster", first, Arc::new(nodes), false).await;
    });
}

/// Declares the intake queue of a broker before the embedded queue, and waits: younger it may not
/// survive a kill -9 of the broker.
pub(crate) async fn prepare_intake(broker: &Arc<Broker>) {
    let place = Place::Intake { broker: broker.clone(), queue: Embedded::new() };
    let shape = Shape { concurrency: 1, max_events: 1, daemons: 1, rate: 0 };
    let kinds = place.kinds();
    let mut world = World::new(place, shape, &kinds, &mut StdRng::seed_from_u64(0)).await;
    world.spawn(0, None);
    world.wait_running(0).await;
    support::eventually("the intake queue is declared", async || {
        broker.depth("intake").await.is_some()
    })
    .await;
    tokio::time::sleep(SETTLING).await;
    world.stop(0).await;
}

fn mixed_faults_with_an_intake_lose_nothing() {
    run(async {
        let broker = impatient_broker().await;
        prepare_intake(&broker).await;
        let place =
            async |_: &mut StdRng| Place::Intake { broker: broker.clone(), queue: Embedded::new() };
        rounds("intake", setting("HOOKTRAIL_FAULTS_ROUNDS", 2), place).await;
        let left = broker.node().ctl(&["list_connections", "client_properties"]);
        assert!(!left.contains("hooktrail"), "{left}");
    });
}

#[test]
fn mixed_faults_on_the_embedded_queue_lose_nothing() {
    run(rounds("embedded", count(), async |_| Place::Embedded(Embedded::new())));
}

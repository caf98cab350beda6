//! A long run at a steady rate with a fault a minute: nothing is lost, and nothing grows.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use rand::{SeedableRng as _, rngs::StdRng};

use crate::{
    SEED,
    fault::Fault,
    impatient_broker,
    oracle::{Tally, Verdict, numbers_in},
    prepare,
    round::{Outcome, PATIENCE, Round},
    setting,
    subscribers::Kind,
    support::{run, tests_that_need},
    world::{Place, Shape, World},
};

tests_that_need!(broker: at_a_steady_rate_with_faults_nothing_is_lost_and_nothing_grows);

/// The resources that one daemon holds and has used.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sample {
    pub(crate) second: u64,
    pub(crate) memory_mib: f64,
    pub(crate) descriptors: usize,
    pub(crate) threads: usize,
    pub(crate) cpu_s: f64,
    /// Events that the receivers have accepted, all together.
    pub(crate) accepted: u64,
}

impl Sample {
    pub(crate) fn of(pid: u32, second: u64, accepted: u64) -> Self {
        let read = |file: &str| {
            std::fs::read_to_string(format!("/proc/{pid}/{file}")).expect("the daemon runs")
        };
        let count = |folder: &str| {
            std::fs::read_dir(format!("/proc/{pid}/{folder}")).expect("the daemon runs").count()
        };
        let status = read("status");
        let rss = status.lines().find_map(|l| l.strip_prefix("VmRSS:")).expect("a line");
        let kib: f64 = rss.trim().trim_end_matches(" kB").parse().expect("a number");
        // The fields after the name, which is in parentheses: user and system time are the 12th and
        // 13th, in hundredths.
        let stat = read("stat");
        let fields: Vec<&str> =
            stat.rsplit_once(')').expect("a name").1.split_whitespace().collect();
        let ticks: f64 = fields[11].parse::<f64>().expect("a number")
            + fields[12].parse::<f64>().expect("a number");
        Self {
            second,
            memory_mib: kib / 1024.0,
            descriptors: count("fd"),
            threads: count("task"),
            cpu_s: ticks / 100.0,
            accepted,
        }
    }
}

/// Faults that a daemon must live through.
const FAULTS: [Fault; 12] = [
    Fault::Cut,
    Fault::Mood,
    Fault::Weather,
    Fault::ReceiverCut,
    Fault::CloseAllConnections,
    Fault::Alarm,
    Fault::HalfClose,
    Fault::ReceiverWeather,
    Fault::Reload,
    Fault::QueueFull,
    Fault::QueueDeleted,
    Fault::KillBroker,
];

impl Round<'_> {
    /// One of these faults after the other, while what was seen is counted and forgotten, and the
    /// daemon is measured.
    async fn soak(
        mut self,
        length: Duration,
        between: Duration,
        faults: &[Fault],
    ) -> (Outcome, Vec<Sample>) {
        self.world.spawn(0, None);
        self.world.wait_running(0).await;
        let producer = self.world.producer(0);
        let mut tallies: Vec<Tally> =
            self.world.subscribers.iter().map(|_| Tally::default()).collect();
        let (mut samples, mut inflicted) = (Vec::new(), BTreeMap::new());
        let (begun, mut turn, mut next) = (Instant::now(), 0, Instant::now() + between);
        let sampling = (length / 400).max(Duration::from_secs(1));
        while begun.elapsed() < length {
            self.look_after().await;
            if Instant::now() >= next {
                next += between;
                let fault = faults[turn % faults.len()];
                turn += 1;
                if self.inflict(fault, &producer).await {
                    *inflicted.entry(format!("{fault:?}")).or_default() += 1;
                }
            }
            self.tally(&mut tallies);
            let accepted = tallies.iter().map(|t| t.accepted).sum();
            let pid = self.world.daemons[0].as_ref().expect("a daemon").pid();
            samples.push(Sample::of(pid, begun.elapsed().as_secs(), accepted));
            tokio::time::sleep(sampling).await;
        }
        for one in std::mem::take(&mut self.lasting) {
            self.heal(one).await;
        }
        let ledger = producer.finish().await;
        let mut complaints = Vec::new();
        let patience = Instant::now();
        let mut dead = vec![BTreeSet::new(); self.world.subscribers.len()];
        let verdicts = loop {
            self.tally(&mut tallies);
            let left = self.world.left().await;
            if left.is_empty() {
                for (n, subscriber) in self.world.subscribers.iter().enumerate() {
                    dead[n].extend(
                        self.world
                            .take_dead(subscriber.kind)
                            .await
                            .iter()
                            .flat_map(|b| numbers_in(b)),
                    );
                }
            }
            let verdicts: Vec<Verdict> = self
                .world
                .subscribers
                .iter()
                .zip(tallies.iter().zip(&dead))
                .map(|(s, (tally, dead))| tally.verdict(s.kind.name(), &ledger, dead))
                .collect();
            if left.is_empty() && verdicts.iter().all(|v| v.lost.is_empty()) {
                break verdicts;
            }
            if patience.elapsed() > PATIENCE {
                complaints.push(format!("not empty after {PATIENCE:?}: {left:?}"));
                break verdicts;
            }
            tokio::time::sleep(Duration::from_millis(500)).await;
        };
        let drained_in = patience.elapsed();
        complaints.extend(self.history_is_taken().await);
        self.world.stop(0).await;
        let left = self.world.left().await;
        (
            Outcome {
                verdicts,
                story: self.story,
                ledger,
                drained_in,
                faults: inflicted,
                left,
                complaints,
            },
            samples,
        )
    }

    fn tally(&self, tallies: &mut [Tally]) {
        for (subscriber, tally) in self.world.subscribers.iter().zip(tallies) {
            for request in subscriber.receiver.take_requests().iter().filter(|r| r.status < 300) {
                tally.take(request);
            }
        }
    }
}

/// The largest of a part of the samples.
fn largest(samples: &[Sample], of: impl Fn(&Sample) -> f64) -> f64 {
    samples.iter().map(of).fold(0.0, f64::max)
}

fn at_a_steady_rate_with_faults_nothing_is_lost_and_nothing_grows() {
    run(async {
        let length = Duration::from_secs(setting("HOOKTRAIL_SOAK_SECONDS", 20));
        let between = Duration::from_secs(setting("HOOKTRAIL_SOAK_FAULT_EVERY", 4));
        let rate = setting("HOOKTRAIL_SOAK_RATE", 300);
        let seed = setting("HOOKTRAIL_FAULTS_SEED", SEED);
        let mut rng = StdRng::seed_from_u64(seed);
        let broker = impatient_broker().await;
        let stores = Arc::new(tempfile::tempdir().expect("a directory"));
        let place = || Place::Broker {
            broker: broker.clone(),
            source_queue: false,
            others: Arc::default(),
            stores: stores.clone(),
        };
        prepare(place(), &mut rng).await;
        let shape = Shape { concurrency: 4, max_events: 100, daemons: 1, rate };
        let mut world = World::new(
            place(),
            shape,
            &[Kind::Steady, Kind::Busy, Kind::Lines, Kind::Doomed],
            &mut rng,
        )
        .await;
        println!(
            "soak, seed {seed}: {rate} events a second for {length:?}, a fault every {between:?}"
        );
        let begun = (Instant::now(), SystemTime::now());
        let (outcome, samples) = Round::new(&mut world, rng).soak(length, between, &FAULTS).await;
        let table = samples.iter().fold(
            "second,memory_mib,descriptors,threads,cpu_s,accepted\n".to_owned(),
            |mut text, s| {
                writeln!(
                    text,
                    "{},{:.1},{},{},{:.2},{}",
                    s.second, s.memory_mib, s.descriptors, s.threads, s.cpu_s, s.accepted
                )
                .expect("a string");
                text
            },
        );
        let file = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("soak.csv");
        std::fs::write(&file, table).expect("writes");
        let lost: usize = outcome.verdicts.iter().map(|v| v.lost.len()).sum();
        let last = samples.last().expect("samples");
        println!(
            "soak, seed {seed}: {} faults {:?} in {:.0} s; {} events confirmed, {} unknown, {} accepted, LOST {lost}; {:.1} µs of CPU for each accepted; samples in {}",
            outcome.faults.values().sum::<usize>(),
            outcome.faults,
            begun.0.elapsed().as_secs_f64(),
            outcome.ledger.confirmed.len(),
            outcome.ledger.unknown.len(),
            last.accepted,
            last.cpu_s * 1e6 / last.accepted as f64,
            file.display()
        );
        if !outcome.is_good() {
            let verdicts: Vec<String> = outcome.verdicts.iter().map(ToString::to_string).collect();
            let evidence = world.keep_evidence(&format!("soak-{seed}"), &outcome.story);
            panic!(
                "{verdicts:#?}\nleft: {:?}\n{:#?}\nevidence in {}",
                outcome.left,
                outcome.complaints,
                evidence.display()
            );
        }
        // The second quarter has seen some faults already; the last is not to hold more than it
        // did, but for what comes and goes.
        let quarter = samples.len() / 4;
        let (early, late) = (&samples[quarter..2 * quarter], &samples[3 * quarter..]);
        for (what, of, slack) in [
            ("MiB", (|s: &Sample| s.memory_mib) as fn(&Sample) -> f64, 12.0),
            ("descriptors", |s| s.descriptors as f64, 12.0),
            ("threads", |s| s.threads as f64, 6.0),
        ] {
            let (before, after) = (largest(early, of), largest(late, of));
            println!(
                "soak: at most {before:.1} {what} in the second quarter, {after:.1} in the last"
            );
            assert!(
                after <= before * 1.2 + slack,
                "{what} grow: {before:.1} in the second quarter, {after:.1} in the last"
            );
        }
    });
}

//! One round: faults from a seed while events flow, then peace, then the verdict.

mod deeds;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    time::{Duration, Instant, SystemTime},
};

use hooktrail::{
    clock,
    failpoint::{self, Step},
};
use lapin::options::{BasicPublishOptions, QueueBindOptions, QueueDeclareOptions, QueueDeleteOptions};
use lapin::types::FieldTable;
use lapin::{BasicProperties, Channel};
use rand::{RngExt as _, rngs::StdRng};

use crate::{
    environment::{EIO, ENOSPC},
    oracle::{Disturbance, Ledger, Seen, Tally, Verdict, accepted, excuse_what_was_relayed_twice, judge, numbers_in},
    relay::{Way, Weather},
    soak::Sample,
    subscribers::{Kind, Subscriber, pick},
    support::broker::{Broker, SETTLING, kill},
    world::{Place, Producer, World},
};

/// What can be done to a round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    KillDaemon,
    StopDaemon,
    DieAtStep,
    TakeOver,
    Mood,
    ReceiverCut,
    ReceiverWeather,
    Reload,
    Clock,
    /// A command of an operator, while whatever else goes on.
    Command,
    /// A subscriber is taken out of the configuration, and comes back.
    Removed,
    /// The folder that the subscribers are included from is away for some seconds.
    FolderGone,
    /// The file that they are in ends between two of them, for a moment.
    FileCut,
    /// Nobody reads the daemons' logs.
    LogUnread,
    // The broker and the way to it.
    Cut,
    HalfClose,
    Weather,
    CloseAllConnections,
    KillBroker,
    Alarm,
    NoPermission,
    QueueFull,
    QueueDeleted,
    /// The broker gives up on what was taken and given back three times.
    DeliveryLimit,
    /// Retries of a subscriber come back while its queue is not bound for them.
    Orphans,
    /// Another program puts something into a retry queue.
    Foreign,
    /// A producer deletes its exchange and declares it again, without the bindings.
    ExchangeRedeclared,
    QueueUnbound,
    /// A queue of the ladder is deleted, with the retries in it.
    LevelDeleted,
    // The embedded queue.
    DiskFails,
    Locked,
}

impl Fault {
    const COMMON: [Self; 15] = [
        Self::KillDaemon,
        Self::StopDaemon,
        Self::DieAtStep,
        Self::DieAtStep,
        Self::Mood,
        Self::Mood,
        Self::ReceiverCut,
        Self::ReceiverWeather,
        Self::Reload,
        Self::Command,
        Self::Command,
        Self::Removed,
        Self::FolderGone,
        Self::FileCut,
        Self::LogUnread,
    ];
    /// After none of these may anything come again that a subscriber has answered for.
    const CALM: [Self; 13] = [
        Self::StopDaemon,
        Self::StopDaemon,
        Self::Mood,
        Self::Mood,
        Self::ReceiverCut,
        Self::ReceiverWeather,
        Self::Reload,
        Self::Reload,
        Self::Command,
        Self::Removed,
        Self::FolderGone,
        Self::FileCut,
        Self::LogUnread,
    ];
    const BROKER: [Self; 20] = [
        Self::TakeOver,
        Self::Clock,
        Self::Cut,
        Self::Cut,
        Self::HalfClose,
        Self::Weather,
        Self::Weather,
        Self::CloseAllConnections,
        Self::Alarm,
        Self::NoPermission,
        Self::QueueFull,
        Self::QueueFull,
        Self::QueueDeleted,
        Self::DeliveryLimit,
        Self::Orphans,
        Self::Foreign,
        Self::Foreign,
        Self::ExchangeRedeclared,
        Self::QueueUnbound,
        Self::LevelDeleted,
    ];
    /// What others do to queue and configuration. A round begins with two of these, so that a few rounds have had them all.
    const DEALT: [Self; 6] =
        [Self::ExchangeRedeclared, Self::LevelDeleted, Self::FolderGone, Self::LogUnread, Self::QueueUnbound, Self::FileCut];
    const DEALT_EMBEDDED: [Self; 3] = [Self::FolderGone, Self::LogUnread, Self::FileCut];
    const EMBEDDED: [Self; 5] = [Self::Clock, Self::DiskFails, Self::DiskFails, Self::Locked, Self::TakeOver];

    /// What the round of a seed begins with; `wanted` are the names of others that it is to begin with instead.
    pub(crate) fn dealt(place: &Place, calm: bool, seed: u64, wanted: Option<&str>) -> Vec<Self> {
        if let Some(wanted) = wanted {
            let all = || Self::COMMON.into_iter().chain(Self::BROKER).chain(Self::EMBEDDED);
            let named = |name: &str| all().find(|f| format!("{f:?}") == name).unwrap_or_else(|| panic!("no fault `{name}`"));
            return wanted.split(',').map(named).collect();
        }
        let (all, first): (&[Self], u64) = match place {
            Place::Embedded(_) => (&Self::DEALT_EMBEDDED, 0),
            Place::Broker { .. } if calm => (&Self::DEALT_EMBEDDED, 0),
            Place::Broker { others, .. } if !others.is_empty() => (&Self::DEALT, 4),
            Place::Broker { source_queue: true, .. } => (&Self::DEALT, 2),
            Place::Broker { .. } => (&Self::DEALT, 0),
        };
        let at = |n: u64| all[usize::try_from((2 * seed + first + n) % all.len() as u64).expect("small")];
        vec![at(0), at(1)]
    }

    fn draw(place: &Place, rng: &mut StdRng) -> Self {
        let own: &[Self] = if matches!(place, Place::Embedded(_)) { &Self::EMBEDDED } else { &Self::BROKER };
        // It takes the longest by far.
        let often = match place.nodes().len() {
            0 => 0.0,
            1 => 0.04,
            _ => 0.3,
        };
        if rng.random_bool(often) {
            return Self::KillBroker;
        }
        if rng.random_bool(0.5) { *pick(&Self::COMMON, rng) } else { *pick(own, rng) }
    }
}

/// What ends a fault that lasts.
#[derive(Debug, Clone, PartialEq)]
enum Heal {
    Mood(usize),
    ReceiverWeather(usize),
    Weather,
    Clock,
    Alarm,
    Permission,
    QueueFull,
    DeliveryLimit,
    Orphans(Kind),
    Disk,
    Folder,
    Log,
}

struct Lasting {
    until: Instant,
    heal: Heal,
    what: String,
    /// The subscriber that it is done to, unless it is done to all.
    whom: Option<Kind>,
    from: SystemTime,
    /// Whether it can be why something is delivered again.
    disturbs: bool,
}

pub(crate) struct Round<'w> {
    world: &'w mut World,
    rng: StdRng,
    lasting: Vec<Lasting>,
    /// When the last fault was begun: it may act before it is done.
    began: SystemTime,
    disturbances: Vec<Disturbance>,
    story: String,
    begun: Instant,
    multiplier: f64,
    /// Nothing is done that can be why something is delivered again.
    calm: bool,
    /// A subscriber that comes and goes.
    guest: bool,
    /// What it begins with.
    dealt: Vec<Fault>,
    /// Nothing was published before all were bound for the first time.
    began_bound: bool,
    /// When a queue was deleted in which retries were.
    retries_deleted: Vec<SystemTime>,
    /// When a daemon has declared a queue last, as far as a fault had it do so.
    declared: Option<Instant>,
    complaints: Vec<String>,
}

/// How it went.
pub(crate) struct Outcome {
    pub(crate) verdicts: Vec<Verdict>,
    pub(crate) story: String,
    pub(crate) ledger: Ledger,
    pub(crate) drained_in: Duration,
    pub(crate) faults: BTreeMap<String, usize>,
    pub(crate) left: Vec<(String, u32)>,
    pub(crate) complaints: Vec<String>,
}

impl Outcome {
    pub(crate) fn is_good(&self) -> bool {
        self.verdicts.iter().all(Verdict::is_good) && self.left.is_empty() && self.complaints.is_empty()
    }
}

/// Queues that can be full, and who then has something for them. Not those to which the broker itself hands over: what such a
/// queue has refused, RabbitMQ 3.10 tries again only when a policy changes or the node starts (measured). `check --connect` warns
/// of a limit there.
const FULL: [(&str, &[Kind]); 2] = [(r"\.dead$", &[Kind::Doomed, Kind::Picky]), (r"\.sub\.busy$", &[Kind::Busy])];

/// After a fault is over, so long until whoever it was done to has noticed.
const NOTICED: Duration = Duration::from_secs(1);

/// The broker and the daemon notice a peer that is silent after two heartbeats of 10 s.
const SILENCE_NOTICED: Duration = Duration::from_secs(30);

/// Of the broker with consumers: so little that some lose theirs, and so much that none does.
pub(crate) const IMPATIENT: Duration = Duration::from_secs(5);
const PATIENT: Duration = Duration::from_secs(600);

/// What a round begins with is done within this, or left.
const DEALT_WITHIN: Duration = Duration::from_secs(20);

/// Everything must have arrived so long after the last fault.
const PATIENCE: Duration = Duration::from_secs(150);

impl<'w> Round<'w> {
    pub(crate) fn new(world: &'w mut World, rng: StdRng) -> Self {
        let (lasting, disturbances, story, begun) = (Vec::new(), Vec::new(), String::new(), Instant::now());
        Self {
            world,
            rng,
            lasting,
            began: SystemTime::now(),
            disturbances,
            story,
            begun,
            multiplier: 1.5,
            calm: false,
            guest: false,
            dealt: Vec::new(),
            began_bound: false,
            retries_deleted: Vec::new(),
            declared: None,
            complaints: Vec::new(),
        }
    }

    pub(crate) fn calm(self, calm: bool) -> Self {
        Self { calm, ..self }
    }

    pub(crate) fn begins_with(self, faults: Vec<Fault>) -> Self {
        Self { dealt: faults, ..self }
    }

    /// Faults for as long as `length`, then peace.
    pub(crate) async fn run(mut self, first_event: u64, length: Duration) -> Outcome {
        if self.calm {
            self.broker_has_patience(PATIENT);
        }
        for n in 0..self.world.daemons.len() {
            self.world.spawn(n, None);
        }
        for n in 0..self.world.daemons.len() {
            self.world.wait_running(n).await;
        }
        // Some are in a bad mood from the beginning, so that whatever happens meets retries under way.
        for _ in 0..self.rng.random_range(1..5) {
            self.bad_mood();
        }
        self.began_bound = true;
        let producer = self.world.producer(first_event);
        let mut faults = BTreeMap::new();
        for fault in std::mem::take(&mut self.dealt) {
            // Some cannot be done while the one before lasts.
            let patience = Instant::now();
            while patience.elapsed() < DEALT_WITHIN {
                if self.inflict(fault, &producer).await {
                    *faults.entry(format!("{fault:?}")).or_default() += 1;
                    break;
                }
                tokio::time::sleep(Duration::from_millis(300)).await;
                self.look_after().await;
            }
        }
        let begun = Instant::now();
        while begun.elapsed() < length {
            self.look_after().await;
            let fault = if self.calm { *pick(&Fault::CALM, &mut self.rng) } else { Fault::draw(&self.world.place, &mut self.rng) };
            if self.inflict(fault, &producer).await {
                *faults.entry(format!("{fault:?}")).or_default() += 1;
            }
            let pause = self.rng.random_range(0..1200);
            tokio::time::sleep(Duration::from_millis(pause)).await;
        }
        self.peace().await;
        let ledger = producer.finish().await;
        let (dead, drained_in, complaint) = self.drain(&ledger).await;
        if self.calm {
            self.broker_has_patience(IMPATIENT);
        }
        self.end(ledger, dead, drained_in, complaint, faults).await
    }

    /// How long the broker lets a consumer hold what it was given.
    fn broker_has_patience(&self, patience: Duration) {
        let set = format!("application:set_env(rabbit, consumer_timeout, {}).", patience.as_millis());
        // A cluster of several has the patience that is usual.
        if let [node] = self.world.place.nodes()[..] {
            tokio::task::block_in_place(|| node.ctl(&["eval", &set]));
        }
    }

    /// The daemon ends itself at a step, and another goes on. That it never came to that step is a complaint too.
    pub(crate) async fn dies_at(mut self, step: Step, after: u32) -> Outcome {
        for subscriber in &self.world.subscribers {
            subscriber.bad_mood(&mut self.rng);
        }
        self.tell(&format!("the daemon dies at {step:?} after {after}"));
        self.world.spawn(0, Some((step, after)));
        // A topology that was never there takes no events.
        let producer = if step == Step::Declared { None } else { Some(self.world.producer(0)) };
        let begun = Instant::now();
        while !self.world.has_ended(0) && begun.elapsed() < Duration::from_secs(30) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let died = self.world.has_ended(0);
        self.disturbed("it died", SystemTime::now(), NOTICED);
        for subscriber in &self.world.subscribers {
            subscriber.good_mood();
        }
        self.peace().await;
        let producer = producer.unwrap_or_else(|| self.world.producer(0));
        tokio::time::sleep(Duration::from_millis(300)).await; // some more come while all goes well
        let ledger = producer.finish().await;
        let (dead, drained_in, complaint) = self.drain(&ledger).await;
        let mut outcome = self.end(ledger, dead, drained_in, complaint, BTreeMap::new()).await;
        if !died {
            outcome.complaints.push(format!("it never came to {step:?} after {after}"));
        }
        outcome
    }

    /// One of these faults after the other, while what was seen is counted and forgotten, and the daemon is measured.
    pub(crate) async fn soak(mut self, length: Duration, between: Duration, faults: &[Fault]) -> (Outcome, Vec<Sample>) {
        self.world.spawn(0, None);
        self.world.wait_running(0).await;
        let producer = self.world.producer(0);
        let mut tallies: Vec<Tally> = self.world.subscribers.iter().map(|_| Tally::default()).collect();
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
                    dead[n].extend(self.world.take_dead(subscriber.kind).await.iter().flat_map(|b| numbers_in(b)));
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
        self.world.stop(0).await;
        let left = self.world.left().await;
        (Outcome { verdicts, story: self.story, ledger, drained_in, faults: inflicted, left, complaints }, samples)
    }

    fn tally(&self, tallies: &mut [Tally]) {
        for (subscriber, tally) in self.world.subscribers.iter().zip(tallies) {
            for request in subscriber.receiver.take_requests().iter().filter(|r| r.status < 300) {
                tally.take(request);
            }
        }
    }

    fn tell(&mut self, what: &str) {
        let now = clock::rfc3339(SystemTime::now());
        writeln!(self.story, "{now} {:7.3} {what}", self.begun.elapsed().as_secs_f64()).expect("a string");
    }

    fn disturbed(&mut self, what: &str, from: SystemTime, noticed: Duration) {
        self.disturbances.push(Disturbance { what: what.to_owned(), whom: None, from, to: SystemTime::now() + noticed });
    }

    /// Ends what has lasted long enough, and puts daemons that ended themselves back.
    async fn look_after(&mut self) {
        let now = Instant::now();
        let (over, lasting) = std::mem::take(&mut self.lasting).into_iter().partition(|l: &Lasting| l.until <= now);
        self.lasting = lasting;
        for one in over {
            self.heal(one).await;
        }
        for n in 0..self.world.daemons.len() {
            if self.world.has_ended(n) {
                if self.calm {
                    self.complaints.push("a daemon ended by itself".to_owned());
                }
                self.disturbed("a daemon was not there", SystemTime::now() - Duration::from_secs(3), Duration::ZERO);
                self.tell(&format!("daemon {n} had ended and is started again"));
                self.world.spawn(n, None);
            }
        }
    }

    fn lasts(&mut self, heal: Heal, what: String, disturbs: bool, at_most_ms: u64) {
        let until = Instant::now() + Duration::from_millis(self.rng.random_range(200..at_most_ms));
        self.tell(&what);
        let whom = match heal {
            Heal::Mood(n) | Heal::ReceiverWeather(n) => Some(self.world.subscribers[n].kind),
            _ => None,
        };
        self.lasting.push(Lasting { until, heal, what, whom, from: self.began, disturbs });
    }

    fn has(&self, heal: &Heal) -> bool {
        self.lasting.iter().any(|l| std::mem::discriminant(&l.heal) == std::mem::discriminant(heal))
    }

    async fn heal(&mut self, one: Lasting) {
        let mut noticed = NOTICED;
        match one.heal {
            Heal::Mood(n) => self.world.subscribers[n].good_mood(),
            Heal::ReceiverWeather(n) => self.world.subscribers[n].network.weather(Weather::Fine),
            Heal::Weather => {
                if let Some(network) = &self.world.network {
                    network.weather(Weather::Fine);
                }
                noticed = SILENCE_NOTICED;
            }
            Heal::Clock => self.world.environment.clock_is_ahead(0),
            Heal::Alarm => {
                self.ctl(&["eval", "application:set_env(rabbit, x, 1), vm_memory_monitor:set_vm_memory_high_watermark(0.6), rabbit_disk_monitor:set_disk_free_limit(50000000)."]).await;
            }
            Heal::Permission => {
                self.ctl(&["set_permissions", "guest", ".*", ".*", ".*"]).await;
            }
            Heal::QueueFull => {
                self.ctl(&["clear_policy", "full"]).await;
            }
            Heal::DeliveryLimit => {
                self.ctl(&["clear_policy", "impatient"]).await;
            }
            Heal::Orphans(kind) => self.retries_come_back(kind, true).await,
            Heal::Disk => self.world.environment.disk_works(),
            Heal::Folder => self.world.folder_is_away(false),
            Heal::Log => self.world.nobody_reads_the_logs(false),
        }
        if one.disturbs {
            self.disturbed(&one.what, one.from, noticed);
            if let Some(last) = self.disturbances.last_mut() {
                last.whom = one.whom.map(Kind::name);
            }
        }
        self.tell(&format!("over: {}", one.what));
    }

    async fn ctl(&self, arguments: &[&str]) -> String {
        let Some(node) = self.world.place.node() else { return String::new() };
        tokio::task::block_in_place(|| node.ctl(arguments))
    }

    /// Whether it was done.
    async fn inflict(&mut self, fault: Fault, producer: &Producer) -> bool {
        let daemon = self.rng.random_range(0..self.world.daemons.len());
        let now = SystemTime::now();
        self.began = now;
        match fault {
            Fault::KillDaemon => {
                self.tell(&format!("kill -9 of daemon {daemon}"));
                self.world.kill(daemon);
                self.disturbed("kill -9", now, NOTICED);
                if self.rng.random_bool(0.3) {
                    let pause = self.rng.random_range(0..1000);
                    tokio::time::sleep(Duration::from_millis(pause)).await;
                }
                self.world.spawn(daemon, None);
            }
            Fault::StopDaemon => {
                self.tell(&format!("SIGTERM to daemon {daemon}"));
                // While something else goes on it cannot always settle all: then it is as a fault.
                let quiet = self.lasting.iter().all(|l| !l.disturbs);
                self.world.stop(daemon).await;
                if !quiet {
                    self.disturbed("SIGTERM", now, NOTICED);
                }
                self.world.spawn(daemon, None);
                if self.calm {
                    // Before it listens for signals, one that is to reload would end it.
                    self.world.wait_running(daemon).await;
                }
            }
            Fault::DieAtStep => {
                let steps: &[Step] = if self.world.network.is_none() { &crate::steps::EMBEDDED } else { &Step::ALL };
                let (step, after) = (*pick(steps, &mut self.rng), self.rng.random_range(0..30));
                self.tell(&format!("daemon {daemon} is killed and its successor dies at {step:?} after {after}"));
                self.world.kill(daemon);
                self.disturbed("kill -9", now, NOTICED);
                self.world.spawn(daemon, Some((step, after)));
            }
            Fault::TakeOver => {
                self.tell(&format!("daemon {daemon} is killed while another takes over"));
                self.world.take_over(daemon).await;
                self.disturbed("kill -9", now, Duration::from_secs(3));
            }
            Fault::Mood => self.bad_mood(),
            Fault::ReceiverCut => {
                let subscriber = pick(&self.world.subscribers, &mut self.rng);
                if subscriber.kind.is_always_heard() {
                    return false;
                }
                subscriber.network.cut();
                let what = format!("connections to {:?} are cut", subscriber.kind);
                self.tell(&what);
            }
            Fault::ReceiverWeather => {
                let n = self.rng.random_range(0..self.world.subscribers.len());
                if self.world.subscribers[n].kind.is_always_heard() || self.lasting.iter().any(|l| l.heal == Heal::ReceiverWeather(n)) {
                    return false;
                }
                let weather = self.weather();
                self.world.subscribers[n].network.weather(weather);
                let what = format!("the network to {:?}: {weather:?}", self.world.subscribers[n].kind);
                // Attempts that hang, as a mood that does.
                let disturbs = self.world.network.is_some() && !self.calm;
                self.lasts(Heal::ReceiverWeather(n), what, disturbs, 4000);
            }
            Fault::Reload => {
                // An operator who asks for it gets what is there then.
                if self.has(&Heal::Folder) {
                    return false;
                }
                self.multiplier = if self.multiplier == 1.5 { 2.0 } else { 1.5 };
                self.guest = self.rng.random_bool(0.5);
                let guest =
                    "\n[[subscriber]]\nname = \"guest\"\nurl = \"http://127.0.0.1:1/\"\nsignatures = []\nretry = { max_attempts = 1 }\n";
                self.world.configure(self.multiplier, if self.guest { guest } else { "" });
                for daemon in self.world.daemons.iter().flatten() {
                    kill("-HUP", daemon.pid());
                }
                self.declared = Some(Instant::now());
                self.tell("reload");
            }
            Fault::Clock => {
                if self.has(&Heal::Clock) {
                    return false;
                }
                let seconds = *pick(&[-86_400, -3600, -30, 30, 3600, 86_400], &mut self.rng);
                self.world.environment.clock_is_ahead(seconds);
                self.lasts(Heal::Clock, format!("the clock is {seconds} s ahead"), false, 5000);
            }
            Fault::Cut => {
                self.world.network.as_ref().expect("a broker").cut();
                self.tell("connections to the broker are cut");
                self.disturbed("cut", now, NOTICED);
            }
            Fault::HalfClose => {
                let way = *pick(&[Way::Forth, Way::Back], &mut self.rng);
                self.world.network.as_ref().expect("a broker").half_close(way);
                self.tell(&format!("connections to the broker are half closed: {way:?}"));
                self.disturbed("half close", now, SILENCE_NOTICED);
            }
            Fault::Weather => {
                if self.has(&Heal::Weather) {
                    return false;
                }
                let weather = self.weather();
                self.world.network.as_ref().expect("a broker").weather(weather);
                let longest = if weather == Weather::Stalled && self.rng.random_bool(0.2) { 25_000 } else { 5000 };
                self.lasts(Heal::Weather, format!("the network to the broker: {weather:?}"), true, longest);
            }
            Fault::CloseAllConnections => {
                self.tell("close_all_connections");
                self.ctl(&["close_all_connections", "a test"]).await;
                self.disturbed("close_all_connections", now, NOTICED);
            }
            Fault::KillBroker => {
                let which = self.rng.random_range(0..self.world.place.nodes().len());
                if let Some(declared) = self.declared {
                    // What it loses else is for `hooktrail repair`.
                    tokio::time::sleep(SETTLING.saturating_sub(declared.elapsed())).await;
                }
                self.tell(&format!("kill -9 of node {which} of the broker"));
                let without = self.rng.random_range(0..4000);
                let nodes = self.world.place.nodes();
                nodes[which].kill().await;
                if nodes.len() > 1 {
                    // The others go on without it for a while.
                    tokio::time::sleep(Duration::from_millis(without)).await;
                }
                nodes[which].start().await;
                self.disturbed("broker", now, Duration::from_secs(12));
                self.tell("the broker is back");
            }
            Fault::Alarm => {
                if self.has(&Heal::Alarm) {
                    return false;
                }
                let (what, call) = *pick(
                    &[
                        ("memory", "vm_memory_monitor:set_vm_memory_high_watermark(0.00001)."),
                        ("disk", "rabbit_disk_monitor:set_disk_free_limit(1000000000000000)."),
                    ],
                    &mut self.rng,
                );
                self.ctl(&["eval", call]).await;
                self.lasts(Heal::Alarm, format!("{what} alarm"), true, 5000);
            }
            Fault::NoPermission => {
                if self.has(&Heal::Permission) || self.has(&Heal::Orphans(Kind::Busy)) {
                    return false;
                }
                self.bad_moods(&[Kind::Busy, Kind::Doomed]);
                let nothing = "^$";
                let [configure, write, read] =
                    *pick(&[[nothing, nothing, ".*"], [".*", nothing, ".*"], [nothing; 3], [".*", ".*", nothing]], &mut self.rng);
                self.ctl(&["set_permissions", "guest", configure, write, read]).await;
                self.lasts(Heal::Permission, format!("permissions {configure} {write} {read}"), true, 4000);
            }
            Fault::QueueFull => {
                if self.has(&Heal::QueueFull) || self.has(&Heal::DeliveryLimit) {
                    return false;
                }
                let (queue, kinds) = *pick(&FULL, &mut self.rng);
                self.bad_moods(kinds);
                self.ctl(&["set_policy", "full", queue, r#"{"max-length":1}"#, "--apply-to", "queues"]).await;
                self.lasts(Heal::QueueFull, format!("queues {queue} are full"), true, 4000);
            }
            Fault::DeliveryLimit => {
                if self.has(&Heal::DeliveryLimit) || self.has(&Heal::QueueFull) {
                    return false;
                }
                let queues = r"\.sub\.[a-z]*(\.retry)?$";
                self.ctl(&["set_policy", "impatient", queues, r#"{"delivery-limit":3}"#, "--apply-to", "queues"]).await;
                self.lasts(Heal::DeliveryLimit, "the broker gives up after 3 deliveries".to_owned(), true, 8000);
            }
            Fault::Foreign => {
                // It would wait, or be refused.
                if self.has(&Heal::Alarm) || self.has(&Heal::Permission) {
                    return false;
                }
                let kind = *pick(&Kind::ALL, &mut self.rng);
                self.put_into_retries(kind).await;
                self.tell(&format!("foreign messages among the retries of {kind:?}"));
            }
            Fault::Orphans => {
                // Who binds it again needs the permission to.
                if self.has(&Heal::Orphans(Kind::Busy)) || self.has(&Heal::Permission) {
                    return false;
                }
                let kind = *pick(&[Kind::Busy, Kind::Lines, Kind::Doomed, Kind::Leaving], &mut self.rng);
                self.bad_moods(&[kind]);
                self.retries_come_back(kind, false).await;
                self.lasts(Heal::Orphans(kind), format!("retries of {kind:?} do not come back"), false, 4000);
            }
            Fault::Command => {
                if self.has(&Heal::Folder) {
                    return false;
                }
                self.command(daemon);
            }
            Fault::FolderGone => return self.take_the_folder_away().await,
            Fault::FileCut => return self.cut_the_file().await,
            Fault::LogUnread => return self.leave_the_logs_unread(daemon).await,
            Fault::ExchangeRedeclared => return self.redeclare_exchange().await,
            Fault::QueueUnbound => return self.unbind_queue().await,
            Fault::LevelDeleted => return self.delete_level().await,
            Fault::Removed => return self.remove_for_a_while().await,
            Fault::QueueDeleted => return self.delete_empty_queue(producer).await,
            Fault::DiskFails => {
                if self.has(&Heal::Disk) {
                    return false;
                }
                let (error, one_in) = (*pick(&[EIO, ENOSPC], &mut self.rng), *pick(&[0, 1, 7, 40], &mut self.rng));
                self.bad_moods(&[Kind::Busy, Kind::Lines, Kind::Doomed]);
                self.world.environment.disk_fails(error, one_in);
                self.lasts(Heal::Disk, format!("the disk fails with {error}, {one_in} writes between"), true, 4000);
            }
            Fault::Locked => {
                let Place::Embedded(embedded) = &self.world.place else { return false };
                let file = embedded.file();
                let holds = Duration::from_millis(self.rng.random_range(100..3000));
                self.tell(&format!("another process locks the database for {holds:?}"));
                let lock = tokio::task::spawn_blocking(move || {
                    let db = rusqlite::Connection::open(file).ok()?;
                    db.busy_timeout(Duration::from_secs(5)).ok()?;
                    db.execute_batch("BEGIN IMMEDIATE").ok()?;
                    Some(db)
                });
                tokio::spawn(async move {
                    let locked = lock.await;
                    tokio::time::sleep(holds).await; // the fault itself
                    drop(locked); // rolls back
                });
                self.disturbances.push(Disturbance { what: "locked".to_owned(), whom: None, from: now, to: now + holds + NOTICED });
            }
        }
        true
    }

    /// What keeps the queue from writing something down is done while there is something to write down.
    fn bad_moods(&mut self, kinds: &[Kind]) {
        for n in 0..self.world.subscribers.len() {
            if kinds.contains(&self.world.subscribers[n].kind) {
                self.bad_mood_of(n);
            }
        }
    }

    fn bad_mood(&mut self) {
        let n = self.rng.random_range(0..self.world.subscribers.len());
        self.bad_mood_of(n);
    }

    fn bad_mood_of(&mut self, n: usize) {
        let mood = self.world.subscribers[n].bad_mood(&mut self.rng);
        let what = format!("{:?}: {mood:?}", self.world.subscribers[n].kind);
        // The broker takes the consumer of a subscriber that holds up what it has for too long.
        let disturbs = mood.hangs() && self.world.network.is_some() && !self.calm;
        self.lasts(Heal::Mood(n), what, disturbs, 10_000);
    }

    fn weather(&mut self) -> Weather {
        let way = *pick(&[Way::Forth, Way::Back], &mut self.rng);
        *pick(
            &[Weather::Stalled, Weather::OneWay(way), Weather::Loses(way), Weather::Slow(20_000), Weather::Slow(300_000), Weather::Refuses],
            &mut self.rng,
        )
    }

    /// Whatever it meets, a command ends in time and says what it could not do.
    fn command(&mut self, daemon: usize) {
        let now = SystemTime::now();
        let name = pick(&Kind::ALL, &mut self.rng).name();
        let commands: [&[&str]; 10] = [
            &["dead", "replay", "doomed"],
            &["dead", "replay", "doomed"],
            &["dead", "list", &name],
            &["dead", "export", &name],
            &["repair", &name],
            &["pause", "steady"],
            &["resume", &name],
            &["check", "--connect"],
            &["status", "--json"],
            &["prune", "--yes"],
        ];
        let mut command = *pick(&commands, &mut self.rng);
        if command[0] == "repair" && (self.world.network.is_none() || self.calm) {
            command = &["check"]; // there is nothing to repair in the embedded queue
        }
        let dies = if command.contains(&"replay") && !self.calm && self.rng.random_bool(0.3) {
            format!("{}=Moved ", failpoint::VARIABLE)
        } else {
            String::new()
        };
        self.tell(&format!("{dies}hooktrail {command:?}"));
        let ended = tokio::task::block_in_place(|| self.world.command(daemon, &dies, command));
        self.tell(&format!("it ended with {:?}: {}", ended.status, String::from_utf8_lossy(&ended.stderr).trim()));
        let expected = matches!(ended.status.code(), Some(0 | 1)) || (!dies.is_empty() && ended.status.code().is_none());
        if !expected {
            self.complaints.push(format!("{command:?} ended with {ended:?}"));
        }
        if command[0] == "repair" {
            self.disturbed("repair", now, NOTICED);
        }
    }

    /// Binds the queue of a subscriber's retries to the end of the ladder, or unbinds it: then they become orphans.
    async fn retries_come_back(&self, kind: Kind, bound: bool) {
        let Place::Broker { broker, .. } = &self.world.place else { return };
        let (name, prefix) = (kind.name(), &broker.prefix);
        let (queue, exchange, key) = (format!("{prefix}.sub.{name}.retry"), format!("{prefix}.delay"), format!("#.{name}"));
        let (connection, channel) = broker.channel().await;
        let (queue, exchange, key) = (queue.as_str().into(), exchange.as_str().into(), key.as_str().into());
        if bound {
            channel.queue_bind(queue, exchange, key, QueueBindOptions::default(), FieldTable::default()).await.expect("binds");
        } else {
            channel.queue_unbind(queue, exchange, key, FieldTable::default()).await.expect("unbinds");
        }
        connection.close(200, "done".into()).await.ok();
    }

    /// What no daemon of hooktrail's has written, and what is nobody's event.
    async fn put_into_retries(&self, kind: Kind) {
        let Place::Broker { broker, .. } = &self.world.place else { return };
        let queue = format!("{}.sub.{}.retry", broker.prefix, kind.name());
        let (connection, channel) = broker.channel().await;
        for _ in 0..3 {
            let (options, properties) = (BasicPublishOptions::default(), BasicProperties::default());
            channel.basic_publish("".into(), queue.as_str().into(), options, b"{\"events\":[]}", properties).await.expect("publishes");
        }
        connection.close(200, "done".into()).await.ok();
    }

    /// Its events and retries wait for it. Nobody publishes meanwhile: it would not be for it.
    async fn remove_for_a_while(&mut self) -> bool {
        let is_quiet = self.lasting.iter().all(|l| !l.disturbs) && self.world.daemons.len() == 1;
        if !is_quiet
            || self.has(&Heal::Folder)
            || self.world.has_ended(0)
            || !self.world.daemons[0].as_ref().is_some_and(|d| d.log().contains("running"))
        {
            return false;
        }
        let gate = self.world.publishing.clone();
        let held = gate.write().await;
        // What is still to be relayed is for those who are configured then.
        if !self.all_is_relayed().await {
            return false;
        }
        let kind = *pick(&Kind::ALL, &mut self.rng);
        for without in [Some(kind), None] {
            self.world.configure_without(self.multiplier, without);
            // Answered when it is done.
            let url = format!("http://127.0.0.1:{}/api/v1/reload", self.world.port(0));
            let client = reqwest::Client::builder().no_proxy().timeout(Duration::from_secs(30)).build().expect("a client");
            let answer = client.post(url).header("content-type", "application/json").send().await;
            if answer.as_ref().is_ok_and(|a| a.status() == 200) {
                // as it should
            } else if self.world.has_ended(0) {
                // It was to die at a step. Whoever is not bound gets nothing, so the next one has to be there first.
                self.disturbed("it died", SystemTime::now() - Duration::from_secs(3), NOTICED);
                self.world.spawn(0, None);
                self.world.wait_running(0).await;
            } else {
                self.complaints.push(format!("a reload was answered {answer:?}"));
            }
            self.tell(&format!("reloaded without {without:?}"));
            tokio::time::sleep(Duration::from_millis(self.rng.random_range(0..2500))).await;
        }
        if let Place::Broker { broker, source_queue, .. } = &self.world.place {
            let (connection, channel) = broker.channel().await;
            bind(&channel, broker, *source_queue, kind).await;
            connection.close(200, "done".into()).await.ok();
        }
        drop(held);
        true
    }

    /// Deletes a queue in which nothing is. Nobody publishes until it is there again.
    async fn delete_empty_queue(&mut self, producer: &Producer) -> bool {
        // It is needed for this that a daemon can put it back.
        let Place::Broker { broker, source_queue, .. } = &self.world.place else { return false };
        if self.lasting.iter().any(|l| l.disturbs) || self.world.daemons.iter_mut().any(|d| d.as_mut().is_none_or(|d| !d.is_running())) {
            return false;
        }
        let (broker, source_queue) = (broker.clone(), *source_queue);
        let gate = self.world.publishing.clone();
        let held = gate.write().await;
        let Some(steady) = self.world.subscribers.iter().find(|s| s.kind == Kind::Steady) else { return false };
        let wanted = producer.ledger().confirmed;
        let patience = Instant::now();
        while !wanted.is_subset(&accepted(&steady.receiver.requests())) {
            if patience.elapsed() > Duration::from_secs(5) {
                return false;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let from = SystemTime::now();
        let which = *pick(&["sub.steady", "sub.steady.retry"], &mut self.rng);
        let queue = format!("{}.{which}", broker.prefix);
        let (connection, channel) = broker.channel().await;
        let deleted = channel.queue_delete(queue.as_str().into(), QueueDeleteOptions::default()).await.expect("deletes");
        connection.close(200, "done".into()).await.ok();
        self.tell(&format!("{queue} is deleted; it held {deleted}"));
        let is_back = async || {
            let (connection, channel) = broker.channel().await;
            let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
            let found = channel.queue_declare(queue.as_str().into(), passive, FieldTable::default()).await.is_ok();
            if found && which == "sub.steady" {
                bind(&channel, &broker, source_queue, Kind::Steady).await;
            }
            connection.close(200, "done".into()).await.ok();
            found
        };
        crate::support::eventually("the queue is declared again", is_back).await;
        drop(held);
        self.declared = Some(Instant::now());
        self.tell(&format!("{queue} is back"));
        self.disturbed("queue deleted", from, NOTICED);
        true
    }

    async fn peace(&mut self) {
        for one in std::mem::take(&mut self.lasting) {
            self.heal(one).await;
        }
        self.bindings_come_back().await;
        self.world.configure(1.5, "");
        if self.calm {
            // Those that run go on: a new one would deliver what they have forgotten.
            for daemon in self.world.daemons.iter().flatten() {
                kill("-HUP", daemon.pid());
            }
        }
        let anew = if self.calm { 0 } else { self.world.daemons.len() };
        for n in 0..anew {
            // One that is to die at a step still has that before it.
            if !self.world.has_ended(n) {
                self.world.kill(n);
            }
            self.disturbed("the last kill -9", SystemTime::now() - Duration::from_secs(3), NOTICED);
            self.world.spawn(n, None);
        }
        for n in 0..self.world.daemons.len() {
            self.world.wait_running(n).await;
        }
        self.tell("peace");
    }

    /// Waits until each confirmed event was accepted or is a dead letter, or until nothing moves any more.
    async fn drain(&mut self, ledger: &Ledger) -> (Vec<BTreeSet<u64>>, Duration, Option<String>) {
        let mut dead = vec![BTreeSet::new(); self.world.subscribers.len()];
        self.poison_starves_nobody(ledger, &mut dead).await;
        let begun = Instant::now();
        let (mut empty_since, mut clean_since) = (None, None::<Instant>);
        loop {
            let left = self.world.left().await;
            let mut missing = 0;
            for (n, subscriber) in self.world.subscribers.iter().enumerate() {
                let bodies = if left.is_empty() { self.world.take_dead(subscriber.kind).await } else { Vec::new() };
                dead[n].extend(bodies.iter().flat_map(|b| numbers_in(b)));
                let seen = self.seen(n, BTreeSet::new());
                let (got, deleted) = (accepted(&seen.requests), seen.deleted());
                missing += ledger.is_for(&seen.name).filter(|e| !got.contains(e) && !dead[n].contains(e) && !deleted.contains(e)).count();
            }
            // What is just handed from one queue to another is counted nowhere: a copy of what has arrived long ago may be.
            let settled = left.is_empty() && missing == 0;
            if settled && clean_since.get_or_insert_with(Instant::now).elapsed() > Duration::from_millis(1500) {
                return (dead, begun.elapsed(), None);
            }
            if !settled {
                clean_since = None;
            }
            // What is lost does not come however long one waits; what a consumer that is gone held does.
            let since = if left.is_empty() { *empty_since.get_or_insert_with(Instant::now) } else { Instant::now() };
            if !left.is_empty() {
                empty_since = None;
            }
            if since.elapsed() > Duration::from_secs(45) {
                return (dead, begun.elapsed(), Some(format!("the queues are empty and {missing} events are missing")));
            }
            if begun.elapsed() > PATIENCE {
                return (dead, begun.elapsed(), Some(format!("not empty after {PATIENCE:?}: {left:?}, {missing} events are missing")));
            }
            self.resume_who_is_paused().await;
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    /// What there is of a subscriber.
    fn seen(&self, n: usize, dead: BTreeSet<u64>) -> Seen {
        let Subscriber { kind, receiver, .. } = &self.world.subscribers[n];
        let (name, requests, retries_deleted) = (kind.name(), receiver.requests(), self.retries_deleted.clone());
        Seen { name, requests, dead, is_always_heard: kind.is_always_heard(), retries_deleted }
    }

    async fn resume_who_is_paused(&mut self) {
        let client = reqwest::Client::builder().no_proxy().timeout(Duration::from_secs(10)).build().expect("a client");
        let base = format!("http://127.0.0.1:{}/api/v1/subscribers", self.world.port(0));
        let Ok(answer) = client.get(&base).send().await else { return };
        let Ok(text) = answer.text().await else { return };
        let found: serde_json::Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"));
        for one in found["subscribers"].as_array().into_iter().flatten() {
            if one["state"] == "paused" {
                let name = one["subscriber"].as_str().expect("a name");
                let resumed = client.post(format!("{base}/{name}/resume")).header("content-type", "application/json").send().await;
                self.tell(&format!("{name} was paused; resumed: {:?}", resumed.map(|r| r.status().as_u16()).ok()));
            }
        }
    }

    async fn end(
        mut self,
        ledger: Ledger,
        dead: Vec<BTreeSet<u64>>,
        drained_in: Duration,
        complaint: Option<String>,
        faults: BTreeMap<String, usize>,
    ) -> Outcome {
        let mut complaints: Vec<String> = std::mem::take(&mut self.complaints);
        complaints.extend(complaint);
        for daemon in self.world.daemons.iter().flatten() {
            let count = |what: &str| std::fs::read_dir(format!("/proc/{}/{what}", daemon.pid())).map_or(0, Iterator::count);
            let (fds, threads, mib) = (count("fd"), count("task"), crate::support::peak_mib(daemon.pid()));
            if fds > 80 || threads > 40 || mib > 250.0 {
                complaints.push(format!("a daemon has {fds} descriptors, {threads} threads and had {mib:.0} MiB"));
            }
        }
        for n in 0..self.world.daemons.len() {
            self.world.stop(n).await;
        }
        if self.world.network.as_ref().is_some_and(|network| network.connections() > 0) {
            let closed = async || self.world.network.as_ref().is_none_or(|network| network.connections() == 0);
            crate::support::eventually("the connections of the daemons are closed", closed).await;
        }
        complaints.append(&mut self.world.complaints);
        let left = self.world.left().await;
        // A lane that panics is restarted, and nothing is lost; but it should not.
        let log = self.world.log_of_all();
        if let Some(line) = log.lines().find(|l| l.contains("panicked")) {
            complaints.push(format!("a panic: {line}"));
        }
        let mut verdicts = Vec::new();
        for (n, dead) in dead.into_iter().enumerate() {
            verdicts.push(judge(&ledger, &self.seen(n, dead), &self.disturbances));
        }
        if let Some(first) = ledger.unmatched.first().filter(|_| self.began_bound) {
            let count = ledger.unmatched.len();
            complaints.push(format!("{count} events from {first} on reached nobody, though nobody had taken a binding away"));
        }
        if matches!(self.world.place, Place::Broker { source_queue: true, .. }) {
            excuse_what_was_relayed_twice(&mut verdicts);
        }
        for d in &self.disturbances {
            let at = clock::rfc3339;
            writeln!(self.story, "disturbance {} to {}: {}", at(d.from), at(d.to), d.what).expect("a string");
        }
        Outcome { verdicts, story: self.story, ledger, drained_in, faults, left, complaints }
    }
}

/// Binds a subscriber's queue as its daemon does, so that it does not matter which of the two comes first.
async fn bind(channel: &Channel, broker: &Broker, source_queue: bool, kind: Kind) {
    let exchange = if source_queue { format!("{}.events", broker.prefix) } else { broker.exchange.clone() };
    let queue = format!("{}.sub.{}", broker.prefix, kind.name());
    let (queue, exchange) = (queue.as_str().into(), exchange.as_str().into());
    channel.queue_bind(queue, exchange, "#".into(), QueueBindOptions::default(), FieldTable::default()).await.expect("binds");
}

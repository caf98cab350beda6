//! One round: faults from a seed while events flow, then peace, then the verdict.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    path::PathBuf,
    time::{Duration, Instant, SystemTime},
};

use hooktrail::{clock, failpoint::Step, store::StoreError};
use rand::{RngExt as _, rngs::StdRng};

use crate::{
    fault::{Fault, Heal, Lasting},
    oracle::{
        Disturbance, Ledger, Seen, Verdict, accepted, excuse_what_was_relayed_twice, impatience,
        judge, numbers_in,
    },
    proxy::Weather,
    remembered::{Known, Remembered, Repeats},
    subscribers::{Kind, Subscriber, pick},
    support::{broker::kill, eventually, peak_mib, receiver::Request},
    world::{Place, World},
};

pub(crate) struct Round<'w> {
    pub(crate) world: &'w mut World,
    pub(crate) rng: StdRng,
    pub(crate) lasting: Vec<Lasting>,
    /// When the last fault was begun: it may act before it is done.
    pub(crate) began: SystemTime,
    pub(crate) disturbances: Vec<Disturbance>,
    pub(crate) story: String,
    pub(crate) begun: Instant,
    pub(crate) multiplier: f64,
    /// Nothing is done that can be why something is delivered again.
    pub(crate) calm: bool,
    /// A subscriber that comes and goes.
    pub(crate) guest: bool,
    /// The faults at its begin.
    pub(crate) dealt: Vec<Fault>,
    /// Nothing was published before all were bound for the first time.
    pub(crate) began_bound: bool,
    /// When a queue was deleted in which retries were.
    pub(crate) retries_deleted: Vec<SystemTime>,
    /// When a daemon has declared a queue last, as far as a fault had it do so.
    pub(crate) declared: Option<Instant>,
    pub(crate) complaints: Vec<String>,
    /// The file of a store that is away.
    pub(crate) away: Option<PathBuf>,
    /// History was damaged: what is still damaged of it is noticed when it is read.
    pub(crate) history_damaged: bool,
    /// How wrong the daemons' clock was at most.
    pub(crate) blur: Duration,
    /// The number of the first event.
    first_event: u64,
}

/// The result.
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
        self.verdicts.iter().all(Verdict::is_good)
            && self.left.is_empty()
            && self.complaints.is_empty()
    }
}

/// The time after the end of a fault until its victim has noticed that.
pub(crate) const NOTICED: Duration = Duration::from_secs(1);

/// The broker and the daemon notice a peer that is silent after two heartbeats of 10 s.
pub(crate) const SILENCE_NOTICED: Duration = Duration::from_secs(30);

/// The broker's consumer timeout: short enough that some consumers lose their channel, and long
/// enough that none does.
pub(crate) const IMPATIENT: Duration = Duration::from_secs(5);
const PATIENT: Duration = Duration::from_secs(600);

/// Events that were never tried wait so long at most when nothing is wrong but that some batches
/// fail. The circuit stays open for 2 s at most.
const STARVED: Duration = Duration::from_secs(120);

/// The time within which the faults at the begin are inflicted, or left out.
const DEALT_WITHIN: Duration = Duration::from_secs(20);

/// The difference between the clock of history and the test's, when it is not set.
const BLUR: Duration = Duration::from_secs(1);

/// History has taken all events so long after the last of them was delivered. A lock on it may last
/// for 14 s, and what was unbound is bound again within a minute.
const CAUGHT_UP: Duration = Duration::from_secs(90);

/// Events of a round of which it is asked where they went.
const ASKED: usize = 4;

/// Everything must have arrived so long after the last fault.
pub(crate) const PATIENCE: Duration = Duration::from_secs(150);

impl<'w> Round<'w> {
    pub(crate) fn new(world: &'w mut World, rng: StdRng) -> Self {
        let (lasting, disturbances, story, begun) =
            (Vec::new(), Vec::new(), String::new(), Instant::now());
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
            away: None,
            history_damaged: false,
            blur: BLUR,
            first_event: 0,
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
        // Some are in a bad mood from the beginning, so that whatever happens meets retries under
        // way.
        for _ in 0..self.rng.random_range(1..5) {
            self.bad_mood();
        }
        // Without it there is no order to be lost.
        self.bad_moods(&[Kind::Ordered]);
        self.began_bound = true;
        self.first_event = first_event;
        self.world.wait_remembering(0).await;
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
            let fault = if self.calm {
                *pick(&Fault::CALM, &mut self.rng)
            } else if self.world.disk.is_some() {
                Fault::draw_with_power(&mut self.rng)
            } else {
                Fault::draw(&self.world.place, &mut self.rng)
            };
            if self.inflict(fault, &producer).await {
                *faults.entry(format!("{fault:?}")).or_default() += 1;
            }
            let pause = self.rng.random_range(0..1200);
            tokio::time::sleep(Duration::from_millis(pause)).await;
            // With its receiver as it is: what paused it may come again.
            self.resume_who_is_paused(Some(Kind::Ordered)).await;
        }
        self.peace().await;
        let ledger = producer.finish().await;
        let (dead, drained_in, complaint) = self.drain(&ledger).await;
        if self.calm {
            self.broker_has_patience(IMPATIENT);
        }
        self.end(ledger, dead, drained_in, complaint, faults).await
    }

    /// The broker's consumer timeout: the longest that a delivery stays unacked.
    fn broker_has_patience(&self, patience: Duration) {
        let set =
            format!("application:set_env(rabbit, consumer_timeout, {}).", patience.as_millis());
        // A cluster of several has the patience that is usual.
        if let [node] = self.world.place.nodes()[..] {
            tokio::task::block_in_place(|| node.ctl(&["eval", &set]));
        }
    }

    /// The daemon ends itself at a step, and another goes on. That it never came to that step is a
    /// complaint too.
    pub(crate) async fn dies_at(mut self, step: Step, after: u32, first_event: u64) -> Outcome {
        self.first_event = first_event;
        for subscriber in &self.world.subscribers {
            subscriber.bad_mood(&mut self.rng);
        }
        self.log(&format!("the daemon dies at {step:?} after {after}"));
        self.world.spawn(0, Some((step, after)));
        // A topology that was never there takes no events.
        let producer =
            if step == Step::Declared { None } else { Some(self.world.producer(first_event)) };
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
        let producer = match producer {
            Some(producer) => producer,
            None => {
                self.world.wait_remembering(0).await;
                self.world.producer(first_event)
            }
        };
        tokio::time::sleep(Duration::from_millis(300)).await; // some more come while all goes well
        let ledger = producer.finish().await;
        let (dead, drained_in, complaint) = self.drain(&ledger).await;
        let mut outcome = self.end(ledger, dead, drained_in, complaint, BTreeMap::new()).await;
        if !died {
            outcome.complaints.push(format!("it never came to {step:?} after {after}"));
        }
        outcome
    }

    pub(crate) fn log(&mut self, what: &str) {
        let now = clock::rfc3339(SystemTime::now());
        writeln!(self.story, "{now} {:7.3} {what}", self.begun.elapsed().as_secs_f64())
            .expect("a string");
    }

    pub(crate) fn disturbed(&mut self, what: &str, from: SystemTime, noticed: Duration) {
        self.disturbances.push(Disturbance {
            what: what.to_owned(),
            whom: None,
            from,
            to: SystemTime::now() + noticed,
        });
    }

    /// Ends what has lasted long enough, and puts daemons that ended themselves back.
    pub(crate) async fn look_after(&mut self) {
        let now = Instant::now();
        let (over, lasting) =
            std::mem::take(&mut self.lasting).into_iter().partition(|l: &Lasting| l.until <= now);
        self.lasting = lasting;
        for one in over {
            self.heal(one).await;
        }
        for n in 0..self.world.daemons.len() {
            if self.world.has_ended(n) {
                if self.calm {
                    self.complaints.push("a daemon ended by itself".to_owned());
                }
                self.disturbed(
                    "a daemon was not there",
                    SystemTime::now() - Duration::from_secs(3),
                    Duration::ZERO,
                );
                self.log(&format!("daemon {n} had ended and is started again"));
                self.world.spawn(n, None);
            }
        }
    }

    pub(crate) fn lasts(&mut self, heal: Heal, what: String, disturbs: bool, at_most_ms: u64) {
        let until = Instant::now() + Duration::from_millis(self.rng.random_range(200..at_most_ms));
        self.log(&what);
        let whom = match heal {
            Heal::Mood(n) | Heal::ReceiverWeather(n) => Some(self.world.subscribers[n].kind),
            _ => None,
        };
        self.lasting.push(Lasting { until, heal, what, whom, from: self.began, disturbs });
    }

    pub(crate) fn has(&self, heal: &Heal) -> bool {
        self.lasting.iter().any(|l| std::mem::discriminant(&l.heal) == std::mem::discriminant(heal))
    }

    pub(crate) async fn heal(&mut self, one: Lasting) {
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
            Heal::Log => self.world.leave_logs_unread(false),
            Heal::StoreDisk => self.world.environment.store_works(),
            Heal::StoreAway => {
                if let Some(path) = self.away.take() {
                    self.world.store_is_away(&path, false);
                }
            }
        }
        if one.disturbs {
            self.disturbed(&one.what, one.from, noticed);
            if let Some(last) = self.disturbances.last_mut() {
                last.whom = one.whom.map(Kind::name);
            }
        }
        self.log(&format!("over: {}", one.what));
    }

    pub(crate) async fn ctl(&self, arguments: &[&str]) -> String {
        let Some(node) = self.world.place.node() else { return String::new() };
        tokio::task::block_in_place(|| node.ctl(arguments))
    }

    async fn peace(&mut self) {
        for one in std::mem::take(&mut self.lasting) {
            self.heal(one).await;
        }
        self.bindings_come_back().await;
        self.world.configure(1.5, "");
        if self.calm {
            // Running daemons go on: a new one would deliver events that they have forgotten.
            for daemon in self.world.daemons.iter().flatten() {
                kill("-HUP", daemon.pid());
            }
        }
        let restarted = if self.calm { 0 } else { self.world.daemons.len() };
        for n in 0..restarted {
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
        self.log("peace");
    }

    /// Waits until each confirmed event was accepted or is a dead letter, or until nothing moves
    /// any more.
    async fn drain(&mut self, ledger: &Ledger) -> (Vec<BTreeSet<u64>>, Duration, Option<String>) {
        let mut dead = vec![BTreeSet::new(); self.world.subscribers.len()];
        self.poison_starves_nobody(ledger, &mut dead).await;
        let begun = Instant::now();
        let (mut empty_since, mut clean_since) = (None, None::<Instant>);
        loop {
            let left = self.world.left().await;
            let mut missing = 0;
            for (n, subscriber) in self.world.subscribers.iter().enumerate() {
                let bodies = if left.is_empty() {
                    self.world.take_dead(subscriber.kind).await
                } else {
                    Vec::new()
                };
                dead[n].extend(bodies.iter().flat_map(|b| numbers_in(b)));
                let seen = self.seen(n, BTreeSet::new());
                let (got, deleted) = (accepted(&seen.requests), seen.deleted());
                missing += ledger
                    .is_for(&seen.name)
                    .filter(|e| !got.contains(e) && !dead[n].contains(e) && !deleted.contains(e))
                    .count();
            }
            // A message on its way from one queue to another is counted in neither; it can be a
            // copy of an event that arrived long ago.
            let settled = left.is_empty() && missing == 0;
            if settled
                && clean_since.get_or_insert_with(Instant::now).elapsed()
                    > Duration::from_millis(1500)
            {
                return (dead, begun.elapsed(), None);
            }
            if !settled {
                clean_since = None;
            }
            // A lost event does not come however long one waits; one that a lost consumer had not
            // acked does.
            let since = if left.is_empty() {
                *empty_since.get_or_insert_with(Instant::now)
            } else {
                Instant::now()
            };
            if !left.is_empty() {
                empty_since = None;
            }
            if since.elapsed() > Duration::from_secs(45) {
                return (
                    dead,
                    begun.elapsed(),
                    Some(format!("the queues are empty and {missing} events are missing")),
                );
            }
            if begun.elapsed() > PATIENCE {
                return (
                    dead,
                    begun.elapsed(),
                    Some(format!(
                        "not empty after {PATIENCE:?}: {left:?}, {missing} events are missing"
                    )),
                );
            }
            self.resume_who_is_paused(None).await;
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    /// The evidence of a subscriber.
    fn seen(&self, n: usize, dead: BTreeSet<u64>) -> Seen {
        let Subscriber { kind, receiver, .. } = &self.world.subscribers[n];
        let (name, requests, retries_deleted) =
            (kind.name(), receiver.requests(), self.retries_deleted.clone());
        let (is_always_heard, in_order) = (kind.is_always_heard(), *kind == Kind::Ordered);
        Seen { name, requests, dead, is_always_heard, in_order, retries_deleted }
    }

    /// Resumes who is paused, or of those one alone.
    pub(crate) async fn resume_who_is_paused(&mut self, one_alone: Option<Kind>) {
        if one_alone.is_some_and(|kind| !self.world.place.kinds().contains(&kind)) {
            return;
        }
        let client = reqwest::Client::builder()
            .no_proxy()
            // In the middle of a round nothing waits for a daemon that is held up.
            .timeout(Duration::from_secs(if one_alone.is_some() { 1 } else { 10 }))
            .build()
            .expect("a client");
        let base = format!("http://127.0.0.1:{}/api/v1/subscribers", self.world.port(0));
        let Ok(answer) = client.get(&base).send().await else { return };
        // A daemon may end at any time.
        let Ok(text) = answer.text().await else { return };
        let Ok(found) = serde_json::from_str::<serde_json::Value>(&text) else { return };
        for one in found["subscribers"].as_array().into_iter().flatten() {
            if one["state"] == "paused" {
                let name = one["subscriber"].as_str().expect("a name");
                if one_alone.is_some_and(|kind| kind.name() != name) {
                    continue;
                }
                let resumed = client
                    .post(format!("{base}/{name}/resume"))
                    .header("content-type", "application/json")
                    .send()
                    .await;
                self.log(&format!(
                    "{name} was paused; resumed: {:?}",
                    resumed.map(|r| r.status().as_u16()).ok()
                ));
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
            let count = |what: &str| {
                std::fs::read_dir(format!("/proc/{}/{what}", daemon.pid()))
                    .map_or(0, Iterator::count)
            };
            let (fds, threads, mib) = (count("fd"), count("task"), peak_mib(daemon.pid()));
            if fds > 80 || threads > 40 || mib > 250.0 {
                complaints.push(format!(
                    "a daemon has {fds} descriptors, {threads} threads and had {mib:.0} MiB"
                ));
            }
        }
        complaints.extend(self.history_catches_up(&ledger).await);
        for n in 0..self.world.daemons.len() {
            self.world.stop(n).await;
        }
        if self.world.network.as_ref().is_some_and(|network| network.connections() > 0) {
            let closed = async || {
                self.world.network.as_ref().is_none_or(|network| network.connections() == 0)
            };
            eventually("the connections of the daemons are closed", closed).await;
        }
        complaints.append(&mut self.world.complaints);
        let left = self.world.left().await;
        // A lane that panics is restarted, and nothing is lost; but it should not.
        let log = self.world.log_of_all();
        if let Some(line) = log.lines().find(|l| l.contains("panicked")) {
            complaints.push(format!("a panic: {line}"));
        }
        if !self.calm {
            self.disturbances.extend(impatience(&log, IMPATIENT));
        }
        let seen: Vec<Seen> =
            dead.into_iter().enumerate().map(|(n, dead)| self.seen(n, dead)).collect();
        let mut verdicts: Vec<Verdict> =
            seen.iter().map(|seen| judge(&ledger, seen, &self.disturbances)).collect();
        complaints.extend(self.judge_history(&ledger, &seen).await);
        if let Some(first) = ledger.unmatched.first().filter(|_| self.began_bound) {
            let count = ledger.unmatched.len();
            complaints.push(format!("{count} events from {first} on reached no subscriber, though no binding had been taken away"));
        }
        if matches!(
            self.world.place,
            Place::Broker { source_queue: true, .. } | Place::Intake { .. }
        ) {
            excuse_what_was_relayed_twice(&mut verdicts);
        }
        for d in &self.disturbances {
            let at = clock::rfc3339;
            writeln!(self.story, "disturbance {} to {}: {}", at(d.from), at(d.to), d.what)
                .expect("a string");
        }
        Outcome { verdicts, story: self.story, ledger, drained_in, faults, left, complaints }
    }

    /// What the store of a daemon has of this round.
    async fn remembered(&self, daemon: usize, seen: &[Seen]) -> Result<Remembered, StoreError> {
        let is_log = self.world.place.embedded().is_some();
        let accepted = seen.iter().flat_map(|s| &s.requests).filter(|r| r.status < 300);
        let ids: BTreeSet<&str> = accepted.map(Request::id).collect();
        let data_dir = self.world.data_dir(daemon);
        Remembered::read(&data_dir, is_log, self.first_event, ids.into_iter()).await
    }

    /// Waits until each confirmed event is in history, or history says that it lacks it.
    async fn history_catches_up(&mut self, ledger: &Ledger) -> Option<String> {
        let begun = Instant::now();
        loop {
            self.look_after().await;
            let lacks = match self.remembered(0, &[]).await {
                Ok(found) => match found.missing(ledger, self.blur)[..] {
                    [] => {
                        let took = begun.elapsed().as_secs_f64();
                        self.log(&format!("history has all after {took:.1} s"));
                        return None;
                    }
                    [first, ..] => format!("event {first} and others are missing"),
                },
                Err(e) => e.to_string(),
            };
            if begun.elapsed() > CAUGHT_UP {
                if self.history_damaged && lacks.contains("damaged") {
                    self.log(&format!("history is damaged, and is not read: {lacks}"));
                    return None;
                }
                let columns = ["name", "messages_ready", "messages_unacknowledged", "consumers"];
                let queues = self.ctl(&[&["list_queues", "--quiet"][..], &columns].concat()).await;
                let queue = queues.lines().find(|l| l.contains(".history\t")).unwrap_or_default();
                return Some(format!(
                    "history has not caught up in {CAUGHT_UP:?}: {lacks}; its queue (ready, unacked, consumers): {queue}"
                ));
            }
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
    }

    /// Waits until nothing is in the queue of history, nor with whoever takes from it: what that one
    /// has not stored is in the queue again when it ends.
    pub(crate) async fn history_is_taken(&self) -> Option<String> {
        let begun = Instant::now();
        loop {
            let queues = self.ctl(&["list_queues", "--quiet", "name", "messages"]).await;
            let found = queues.lines().find_map(|line| line.split_once(".history\t"));
            let (_, count) = found.unwrap_or_else(|| panic!("no queue of history in: {queues}"));
            if count.trim() == "0" {
                return None;
            }
            if begun.elapsed() > CAUGHT_UP {
                return Some(format!("history has {count} events to take after {CAUGHT_UP:?}"));
            }
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
    }

    /// What is wrong in history, when all daemons have ended.
    async fn judge_history(&mut self, ledger: &Ledger, seen: &[Seen]) -> Vec<String> {
        let mut stores = Vec::new();
        for daemon in 0..self.world.daemons.len() {
            match self.remembered(daemon, seen).await {
                Ok(store) => stores.push(store),
                Err(e) if self.history_damaged && e.to_string().contains("damaged") => {
                    return Vec::new();
                }
                Err(e) => return vec![format!("the store of daemon {daemon} cannot be read: {e}")],
            }
        }
        let repeats = match &self.world.place {
            Place::Embedded(_) => Repeats::No,
            Place::Broker { .. } | Place::Intake { .. } if self.disturbances.is_empty() => {
                Repeats::No
            }
            Place::Broker { source_queue: true, .. } => Repeats::All,
            Place::Broker { .. } | Place::Intake { .. } => Repeats::WithoutId,
        };
        let disturbances = std::mem::take(&mut self.disturbances);
        let known = Known { ledger, seen, disturbances: &disturbances, repeats, blur: self.blur };
        let mut wrong = known.judge(&stores);
        let there: Vec<u64> = stores[0].rows.keys().copied().collect();
        for _ in 0..ASKED.min(there.len()) {
            let n = *pick(&there, &mut self.rng);
            let id = stores[0].id_of(n).unwrap_or_default().to_owned();
            let output = tokio::task::block_in_place(|| {
                self.world.command(0, "", &["where", &id, "--json"])
            });
            match serde_json::from_slice(&output.stdout) {
                Ok(answer) => {
                    let is_alone = stores.len() == 1;
                    wrong.extend(known.judge_where(n, &answer, &stores[0], is_alone));
                }
                Err(e) => wrong.push(format!("where {id}: {e}: {output:?}")),
            }
        }
        self.disturbances = disturbances;
        wrong
    }

    /// Batches that always fail do not keep others from being tried: waits until each event was,
    /// and ends the poison then.
    async fn poison_starves_nobody(&mut self, ledger: &Ledger, dead: &mut [BTreeSet<u64>]) {
        let Some(n) = self.world.subscribers.iter().position(|s| s.kind == Kind::Poisoned) else {
            return;
        };
        let name = Kind::Poisoned.name();
        let (begun, mut tried, mut looked_at) = (Instant::now(), BTreeSet::new(), 0);
        let requests_before = self.world.subscribers[n].receiver.count();
        loop {
            let new = self.world.subscribers[n].receiver.requests().split_off(looked_at);
            looked_at += new.len();
            tried.extend(new.iter().flat_map(Request::numbers));
            dead[n].extend(
                self.world.take_dead(Kind::Poisoned).await.iter().flat_map(|b| numbers_in(b)),
            );
            let waiting =
                ledger.is_for(&name).filter(|e| !tried.contains(e) && !dead[n].contains(e)).count();
            if waiting == 0 {
                break;
            }
            if begun.elapsed() > STARVED {
                let requests = looked_at - requests_before;
                let why = format!(
                    "{name} is starved: {waiting} events were never tried, in {STARVED:?} with {requests} requests for others"
                );
                self.complaints.push(why);
                break;
            }
            self.resume_who_is_paused(None).await;
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
        self.log(&format!(
            "all but poison is accepted by {name} after {:.1} s",
            begun.elapsed().as_secs_f64()
        ));
        self.world.subscribers[n].is_cured();
    }
}

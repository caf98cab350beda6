//! What others do to queue, configuration and log while a round goes on: producers, operators, deployments. An event that was
//! returned to its producer is no confirmed event, and who is not bound is not owed what is published then; all else is.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant, SystemTime},
};

use lapin::{
    ExchangeKind,
    options::{ExchangeDeclareOptions, ExchangeDeleteOptions, QueueDeclareOptions, QueueDeleteOptions},
    types::FieldTable,
};
use rand::RngExt as _;

use super::{Heal, Lasting, NOTICED, Round};
use crate::{
    oracle::{LEVEL_DELETED, Ledger, numbers_in},
    subscribers::{Kind, pick},
    world::Place,
};

/// What somebody took away is there again after so long: the daemon looks each minute where nothing shows it sooner.
const BACK: Duration = Duration::from_secs(150);

/// Files that are gone are looked at again for 10 s, each second, before the daemon reads what is left.
const LOOKED_AT_AGAIN: Duration = Duration::from_secs(14);

/// Events that were never tried wait so long at most when nothing is wrong but that some batches fail. The circuit stays open for
/// 2 s at most.
const STARVED: Duration = Duration::from_secs(120);

/// A pipe that takes no more has at least so much in it, of its 64 KiB. What has less and stands still is one whose daemon has nothing
/// to say just now.
const FULL_PIPE: u64 = 48 << 10;

/// A daemon goes on without a reader of its log: so many requests more are far more than were under way.
const GOES_ON: usize = 100;
const STANDS: Duration = Duration::from_secs(60);

impl Round<'_> {
    /// Whether queue and daemons are as they should be, whatever the receivers do.
    fn is_quiet(&mut self) -> bool {
        let harmless = |l: &Lasting| matches!(l.heal, Heal::Mood(_) | Heal::ReceiverWeather(_) | Heal::Clock | Heal::Log);
        self.lasting.iter().all(harmless) && self.world.all_run()
    }

    pub(super) async fn take_the_folder_away(&mut self) -> bool {
        if self.has(&Heal::Folder) || !self.world.all_run() {
            return false;
        }
        self.world.folder_is_away(true);
        let (what, from) = ("the folder with the subscribers is away".to_owned(), SystemTime::now());
        self.tell(&what);
        let until = Instant::now() + Duration::from_millis(self.rng.random_range(2500..8000));
        self.lasting.push(Lasting { until, heal: Heal::Folder, what, whom: None, from, disturbs: false });
        if self.rng.random_bool(0.4) {
            // What is gone is looked at again for some time before it counts: that is over, and nobody is removed all the same.
            tokio::time::sleep(LOOKED_AT_AGAIN).await; // the fault itself
        }
        true
    }

    /// As something does that copies it slowly.
    pub(super) async fn cut_the_file(&mut self) -> bool {
        // Who asks for a reload gets what is there then: nobody does now.
        if self.has(&Heal::Folder) || !self.world.all_run() || !self.reloads_are_done().await {
            return false;
        }
        let keeps = self.rng.random_range(1..self.world.subscribers.len());
        self.tell(&format!("the file with the subscribers ends behind {keeps} of them"));
        self.world.file_is_cut(Some(keeps));
        let moment = self.rng.random_range(1500..4500);
        tokio::time::sleep(Duration::from_millis(moment)).await; // the fault itself
        self.world.file_is_cut(None);
        self.tell("the file is whole");
        true
    }

    /// Waits for what was asked for by a signal: the daemon takes one after the other.
    async fn reloads_are_done(&self) -> bool {
        let client = reqwest::Client::builder().no_proxy().timeout(Duration::from_secs(30)).build().expect("a client");
        for n in 0..self.world.daemons.len() {
            let url = format!("http://127.0.0.1:{}/api/v1/reload", self.world.port(n));
            for _ in 0..2 {
                let answer = client.post(&url).header("content-type", "application/json").send().await;
                if !answer.is_ok_and(|a| a.status() == 200) {
                    return false;
                }
            }
        }
        true
    }

    /// Deliveries, intake and the end of a daemon do not wait for who reads its log.
    pub(super) async fn leave_the_logs_unread(&mut self, daemon: usize) -> bool {
        if self.has(&Heal::Log) || !self.is_quiet() {
            return false;
        }
        self.tell("nobody reads the logs");
        self.world.nobody_reads_the_logs(true);
        let (from, begun) = (SystemTime::now(), Instant::now());
        let unread = || self.world.daemons.iter().flatten().map(crate::support::daemon::Daemon::unread).collect::<Vec<_>>();
        let mut before = Vec::new();
        while before != unread() || before.iter().any(|bytes| *bytes < FULL_PIPE) {
            if begun.elapsed() > Duration::from_secs(30) {
                self.world.nobody_reads_the_logs(false);
                return false;
            }
            before = unread();
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
        let requests = || self.world.subscribers.iter().map(|s| s.receiver.count()).sum::<usize>();
        let (count, begun) = (requests(), Instant::now());
        while requests() < count + GOES_ON && begun.elapsed() < STANDS {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let went_on = requests() - count;
        let client = reqwest::Client::builder().no_proxy().timeout(STANDS).build().expect("a client");
        let health = client.get(format!("http://127.0.0.1:{}/healthz", self.world.port(daemon))).send().await;
        self.tell(&format!("the logs are full; {went_on} requests more; health: {:?}", health.as_ref().map(|h| h.status()).ok()));
        // One that was to die at a step may have.
        if self.world.all_run() && (went_on < GOES_ON || health.is_err()) {
            self.complaints.push(format!("with nobody to read the log there were {went_on} requests in {STANDS:?}; health: {health:?}"));
        }
        let until = Instant::now() + Duration::from_millis(self.rng.random_range(0..6000));
        let what = "nobody reads the logs".to_owned();
        self.lasting.push(Lasting { until, heal: Heal::Log, what, whom: None, from, disturbs: false });
        if self.rng.random_bool(0.5) {
            self.tell(&format!("SIGTERM to daemon {daemon}, whose log nobody reads"));
            let quiet = self.lasting.iter().all(|l| !l.disturbs);
            self.world.stop(daemon).await;
            if !quiet {
                self.disturbed("SIGTERM", from, NOTICED);
            }
            self.world.spawn(daemon, None);
            self.world.wait_running(daemon).await;
        }
        true
    }

    /// Whether nothing is left in the source queue, if there is one. Nobody publishes meanwhile.
    pub(super) async fn all_is_relayed(&self) -> bool {
        for _ in 0..6 {
            let queues = self.ctl(&["list_queues", "--quiet", "--no-table-headers", "name", "messages"]).await;
            if !queues.lines().any(|l| l.strip_prefix("source\t").is_some_and(|n| n != "0")) {
                return true;
            }
        }
        false
    }

    /// The exchange that the subscribers' queues are bound to.
    fn exchange(&self) -> Option<String> {
        match &self.world.place {
            Place::Broker { broker, source_queue: true, .. } => Some(format!("{}.events", broker.prefix)),
            Place::Broker { broker, .. } => Some(broker.exchange.clone()),
            Place::Embedded(_) => None,
        }
    }

    /// From now on what is published passes these by.
    fn passes_by(&self, kinds: &[Kind]) {
        self.world.passed_by.lock().expect("not poisoned").extend(kinds.iter().map(|k| k.name()));
    }

    pub(super) async fn redeclare_exchange(&mut self) -> bool {
        let (Place::Broker { broker, .. }, Some(exchange)) = (&self.world.place, self.exchange()) else { return false };
        let broker = broker.clone();
        if !self.is_quiet() {
            return false;
        }
        let gate = self.world.publishing.clone();
        let held = gate.write().await;
        if !self.all_is_relayed().await {
            return false;
        }
        self.passes_by(&Kind::ALL);
        let (connection, channel) = broker.channel().await;
        let deleted = channel.exchange_delete(exchange.as_str().into(), ExchangeDeleteOptions::default()).await;
        deleted.expect("deletes");
        self.tell(&format!("exchange {exchange} is deleted"));
        drop(held);
        let pause = if self.rng.random_bool(0.5) { 0 } else { self.rng.random_range(0..3000) };
        tokio::time::sleep(Duration::from_millis(pause)).await; // a deployment
        let durable = ExchangeDeclareOptions { durable: true, ..ExchangeDeclareOptions::default() };
        let declared = channel.exchange_declare(exchange.as_str().into(), ExchangeKind::Topic, durable, FieldTable::default()).await;
        declared.expect("declares");
        connection.close(200, "done".into()).await.ok();
        self.tell(&format!("exchange {exchange} is declared again after {pause} ms"));
        self.bindings_come_back().await;
        true
    }

    pub(super) async fn unbind_queue(&mut self) -> bool {
        let (Place::Broker { broker, .. }, Some(exchange)) = (&self.world.place, self.exchange()) else { return false };
        let broker = broker.clone();
        if !self.is_quiet() {
            return false;
        }
        let gate = self.world.publishing.clone();
        let held = gate.write().await;
        if !self.all_is_relayed().await {
            return false;
        }
        let kind = *pick(&Kind::ALL, &mut self.rng);
        self.passes_by(&[kind]);
        let queue = format!("{}.sub.{}", broker.prefix, kind.name());
        let (connection, channel) = broker.channel().await;
        let (q, e) = (queue.as_str().into(), exchange.as_str().into());
        channel.queue_unbind(q, e, "#".into(), FieldTable::default()).await.expect("unbinds");
        connection.close(200, "done".into()).await.ok();
        self.tell(&format!("{queue} is unbound"));
        drop(held);
        if self.rng.random_bool(0.4) {
            // Before anybody else can put it back: a daemon that starts, or reads its configuration again.
            self.bindings_come_back().await;
        }
        true
    }

    /// Waits until all are bound whose binding was taken away: what is published from then on is for them.
    pub(super) async fn bindings_come_back(&mut self) {
        let missing: BTreeSet<String> = self.world.passed_by.lock().expect("not poisoned").clone();
        let Some(exchange) = self.exchange().filter(|_| !missing.is_empty()) else { return };
        let begun = Instant::now();
        loop {
            let bound = self.ctl(&["list_bindings", "--quiet", "--no-table-headers", "source_name", "destination_name"]).await;
            let is_bound = |name: &String| {
                bound.lines().any(|l| l.split_once('\t').is_some_and(|(s, d)| s == exchange && d.ends_with(&format!(".sub.{name}"))))
            };
            let gone: Vec<&String> = missing.iter().filter(|name| !is_bound(name)).collect();
            if gone.is_empty() {
                break;
            }
            if begun.elapsed() > BACK {
                self.complaints.push(format!("not bound again within {BACK:?}: {gone:?}"));
                return;
            }
            self.look_after().await;
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        self.tell(&format!("bound again after {:.1} s: {missing:?}", begun.elapsed().as_secs_f64()));
        let gate = self.world.publishing.clone();
        let held = gate.write().await;
        self.all_is_relayed().await;
        self.world.passed_by.lock().expect("not poisoned").clear();
        drop(held);
    }

    /// Deletes a queue of the ladder, with what is in it.
    pub(super) async fn delete_level(&mut self) -> bool {
        let Place::Broker { broker, .. } = &self.world.place else { return false };
        let broker = broker.clone();
        if !self.is_quiet() {
            return false;
        }
        self.bad_moods(&[Kind::Busy, Kind::Lines, Kind::Doomed]);
        let from = SystemTime::now();
        let level = *pick(&["delay.00", "delay.01"], &mut self.rng);
        let queue = format!("{}.{level}", broker.prefix);
        let (connection, channel) = broker.channel().await;
        let deleted = channel.queue_delete(queue.as_str().into(), QueueDeleteOptions::default()).await.expect("deletes");
        connection.close(200, "done".into()).await.ok();
        self.retries_deleted.push(SystemTime::now());
        self.tell(&format!("{queue} is deleted; it held {deleted}"));
        let begun = Instant::now();
        loop {
            let (connection, channel) = broker.channel().await;
            let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
            let is_back = channel.queue_declare(queue.as_str().into(), passive, FieldTable::default()).await.is_ok();
            connection.close(200, "done".into()).await.ok();
            if is_back {
                break;
            }
            if begun.elapsed() > BACK {
                self.complaints.push(format!("{queue} was not declared again within {BACK:?}"));
                break;
            }
            self.look_after().await;
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        self.declared = Some(Instant::now());
        self.tell(&format!("{queue} is back after {:.1} s", begun.elapsed().as_secs_f64()));
        self.disturbed(LEVEL_DELETED, from, NOTICED);
        true
    }

    /// Batches that always fail do not keep others from being tried: waits until each event was, and ends the poison then.
    pub(super) async fn poison_starves_nobody(&mut self, ledger: &Ledger, dead: &mut [BTreeSet<u64>]) {
        let Some(n) = self.world.subscribers.iter().position(|s| s.kind == Kind::Poisoned) else { return };
        let name = Kind::Poisoned.name();
        let (begun, mut tried, mut looked_at) = (Instant::now(), BTreeSet::new(), 0);
        let requests_before = self.world.subscribers[n].receiver.count();
        loop {
            let new = self.world.subscribers[n].receiver.requests().split_off(looked_at);
            looked_at += new.len();
            tried.extend(new.iter().flat_map(crate::support::receiver::Request::numbers));
            dead[n].extend(self.world.take_dead(Kind::Poisoned).await.iter().flat_map(|b| numbers_in(b)));
            let waiting = ledger.is_for(&name).filter(|e| !tried.contains(e) && !dead[n].contains(e)).count();
            if waiting == 0 {
                break;
            }
            if begun.elapsed() > STARVED {
                let requests = looked_at - requests_before;
                let why =
                    format!("{name} is starved: {waiting} events were never tried, in {STARVED:?} with {requests} requests for others");
                self.complaints.push(why);
                break;
            }
            self.resume_who_is_paused().await;
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
        self.tell(&format!("all but poison is accepted by {name} after {:.1} s", begun.elapsed().as_secs_f64()));
        self.world.subscribers[n].is_cured();
    }
}

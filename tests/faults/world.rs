//! Daemons, receivers, a queue and a producer, for one round.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Output,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use bytes::Bytes;
use hooktrail::{
    event::Tenant,
    failpoint,
    queue::{MAX_GROUP, NewEvent, Published, Queue as _},
};
use lapin::{
    BasicProperties, Channel, Confirmation, Connection, ConnectionProperties,
    options::{BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions},
    types::FieldTable,
};
use rand::{RngExt as _, rngs::StdRng};
use tempfile::TempDir;
use tokio::{sync::RwLock, task::JoinHandle, time::timeout};

use crate::{
    environment::Environment,
    oracle::Ledger,
    power::Disk,
    proxy::Proxy,
    subscribers::{Kind, Subscriber, TABLE, TENANT, event, tenant_of},
    support::{
        broker::{Broker, Node},
        daemon::{Daemon, Setup},
        eventually, free_port,
        queue::Embedded,
    },
};

pub(crate) const TYPE: &str = "activity_log.user.updated";

/// Where the events of a round wait.
pub(crate) enum Place {
    /// A private node, or a cluster with others, that many rounds share, one after the other.
    Broker {
        broker: Arc<Broker>,
        source_queue: bool,
        others: Arc<Vec<Node>>,
        /// The folders of the daemons' stores, which outlive a round: the first one has history.
        stores: Arc<TempDir>,
    },
    Embedded(Embedded),
    /// The embedded queue of one daemon, and a private node that events come through.
    Intake {
        broker: Arc<Broker>,
        queue: Embedded,
    },
}

impl Place {
    /// The embedded queue, if events wait there.
    pub(crate) fn embedded(&self) -> Option<&Embedded> {
        match self {
            Self::Broker { .. } => None,
            Self::Embedded(queue) | Self::Intake { queue, .. } => Some(queue),
        }
    }

    pub(crate) fn node(&self) -> Option<&Node> {
        self.nodes().first().copied()
    }

    /// The subscribers of a round.
    pub(crate) fn kinds(&self) -> Vec<Kind> {
        Kind::ALL.into_iter().chain(self.embedded().map(|_| Kind::Ordered)).collect()
    }

    pub(crate) fn nodes(&self) -> Vec<&Node> {
        match self {
            Self::Broker { broker, others, .. } => {
                std::iter::once(broker.node()).chain(others.iter()).collect()
            }
            Self::Intake { broker, .. } => vec![broker.node()],
            Self::Embedded(_) => Vec::new(),
        }
    }
}

/// Settings that differ from round to round, and do not change within one.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shape {
    pub(crate) concurrency: usize,
    pub(crate) max_events: usize,
    pub(crate) daemons: usize,
    /// Events a second.
    pub(crate) rate: u64,
}

pub(crate) struct World {
    pub(crate) place: Place,
    /// The disk that broker and daemon are on, if it can lose its power.
    pub(crate) disk: Option<Arc<Disk>>,
    pub(crate) network: Option<Proxy>,
    pub(crate) subscribers: Vec<Subscriber>,
    pub(crate) environment: Environment,
    pub(crate) shape: Shape,
    pub(crate) daemons: Vec<Option<Daemon>>,
    ports: Vec<u16>,
    setup: Setup,
    /// Held while publishing; a fault that takes away an empty queue must not take an event
    /// with it.
    pub(crate) publishing: Arc<RwLock<()>>,
    /// Subscribers whose binding was taken away: what is published now may pass them by.
    pub(crate) passed_by: Arc<Mutex<BTreeSet<String>>>,
    /// Wrong acts of daemons.
    pub(crate) complaints: Vec<String>,
    /// Logs of daemons that have ended.
    logs: Vec<String>,
}

impl World {
    pub(crate) async fn new(place: Place, shape: Shape, kinds: &[Kind], rng: &mut StdRng) -> Self {
        let mut subscribers = Vec::new();
        for kind in kinds {
            subscribers.push(Subscriber::start(*kind, rng.random()).await);
        }
        let nodes: Vec<SocketAddr> = place
            .nodes()
            .iter()
            .map(|node| SocketAddr::from(([127, 0, 0, 1], node.port())))
            .collect();
        let network = if nodes.is_empty() { None } else { Some(Proxy::to(nodes).await) };
        let ports = (0..shape.daemons).map(|_| free_port()).collect();
        let daemons = (0..shape.daemons).map(|_| None).collect();
        let setup = Setup::with_text("[admin]\n");
        let environment = Environment::new();
        std::fs::create_dir(folder_of(&setup).join(INCLUDED)).expect("a folder");
        let (publishing, passed_by, complaints, logs) =
            (Arc::default(), Arc::default(), Vec::new(), Vec::new());
        let world = Self {
            place,
            disk: None,
            network,
            subscribers,
            environment,
            shape,
            daemons,
            ports,
            setup,
            publishing,
            passed_by,
            complaints,
            logs,
        };
        world.configure(1.5, "");
        world
    }

    /// Runs a command alongside daemon `n`, to its end.
    pub(crate) fn command(&self, n: usize, variables: &str, arguments: &[&str]) -> Output {
        let line = format!("{} {variables}exec timeout -k 5 120 \"$0\" \"$@\"", self.own(n));
        self.setup.run_as(&line, arguments)
    }

    /// The variables of a daemon's own configuration.
    fn own(&self, n: usize) -> String {
        format!("PORT={} DATA={}", self.ports[n], self.data_dir(n).display())
    }

    /// The folder of a daemon's store.
    pub(crate) fn data_dir(&self, n: usize) -> PathBuf {
        match &self.place {
            Place::Broker { stores, .. } => stores.path().join(n.to_string()),
            Place::Embedded(queue) | Place::Intake { queue, .. } => queue.data_dir(),
        }
    }

    /// Writes the configuration, in the place of that before.
    pub(crate) fn configure(&self, multiplier: f64, more: &str) {
        self.write_configuration(multiplier, None, more);
    }

    pub(crate) fn configure_without(&self, multiplier: f64, kind: Option<Kind>) {
        self.write_configuration(multiplier, kind, "");
    }

    fn write_configuration(&self, multiplier: f64, without: Option<Kind>, more: &str) {
        let queue = match (&self.place, &self.network) {
            (Place::Embedded(_), _) => format!("url = \"embedded\"\ntenant = {TENANT}\n"),
            (Place::Broker { broker, source_queue, .. }, Some(network)) => {
                let intake = if *source_queue {
                    "source_queue = \"source\"".to_owned()
                } else {
                    format!("exchange = \"{}\"", broker.exchange)
                };
                format!(
                    "url = \"amqp://guest:guest@127.0.0.1:{}/%2f\"\nprefix = \"{}\"\n{intake}\n",
                    network.port, broker.prefix
                )
            }
            (Place::Intake { broker, .. }, Some(network)) => format!(
                "url = \"embedded\"\nintake = \"amqp://guest:guest@127.0.0.1:{}/%2f\"\nprefix = \"{}\"\nexchange = \"{}\"\ntenant = {TENANT}\n",
                network.port, broker.prefix, broker.exchange
            ),
            (Place::Broker { .. } | Place::Intake { .. }, None) => {
                unreachable!("a broker has a network")
            }
        };
        self.write_included(&self.tables(without));
        // A reload changes the batches too: events gathered for one must not be forgotten.
        let max_wait = if multiplier > 1.7 { 150 } else { 50 };
        let text = format!(
            "include = [\"{INCLUDED}/*.toml\"]
[queue]
{queue}
data_dir = \"${{DATA}}\"
[admin]
listen = \"127.0.0.1:${{PORT}}\"
[log]
level = \"debug\"
[batch]
max_wait = \"{max_wait}ms\"
max_events = 100
[http]
timeout = \"2s\"
connect_timeout = \"1s\"
allow_http = true
allow_private_addresses = true
[retry]
initial_interval = \"1s\"
multiplier = {multiplier:.2}
randomization_factor = 0.3
max_interval = \"3s\"
max_attempts = 0
max_elapsed_time = \"0s\"
[circuit_breaker]
failures = 8
open_for = \"1s\"
max_open_for = \"2s\"
{more}"
        );
        let new = self.setup.write("new.toml", text);
        std::fs::rename(new, self.setup.config()).expect("renames");
    }

    /// The tables of the subscribers.
    fn tables(&self, without: Option<Kind>) -> String {
        let subscribers = self.subscribers.iter().filter(|s| Some(s.kind) != without);
        let (concurrency, max_events) = (self.shape.concurrency, self.shape.max_events);
        let tenants = self.place.embedded().is_some();
        subscribers.map(|s| s.table(concurrency, max_events, tenants)).collect()
    }

    /// The folder that the configuration includes files of.
    fn included(&self) -> PathBuf {
        folder_of(&self.setup).join(INCLUDED)
    }

    /// Puts a file in the place of that before.
    fn write_included(&self, text: &str) {
        let new = self.setup.write("new.toml", text);
        std::fs::rename(new, self.included().join("all.toml")).expect("renames");
    }

    /// Takes the folder away that the subscribers are in, or puts it back.
    pub(crate) fn folder_is_away(&self, away: bool) {
        let (at, elsewhere) = (self.included(), folder_of(&self.setup).join("elsewhere"));
        let (from, to) = if away { (at, elsewhere) } else { (elsewhere, at) };
        std::fs::rename(from, to).expect("renames");
    }

    /// The file that the subscribers are in ends before one of the tables, as one that is being
    /// copied; `None`: it is whole.
    pub(crate) fn file_is_cut(&self, before: Option<usize>) {
        let all = self.tables(None);
        let end =
            before.and_then(|n| all.match_indices(TABLE).nth(n)).map_or(all.len(), |(at, _)| at);
        std::fs::write(self.included().join("all.toml"), &all[..end]).expect("writes");
    }

    /// Starts daemon `n`, which ends itself at `step`, if there is one.
    pub(crate) fn spawn(&mut self, n: usize, dies_at: Option<(failpoint::Step, u32)>) {
        let dies = dies_at
            .map(|(step, after)| format!("{}={step:?}:{after} ", failpoint::VARIABLE))
            .unwrap_or_default();
        let line =
            format!("{dies}{} {} exec \"$0\" \"$@\"", self.own(n), self.environment.variables());
        let before = self.daemons[n].replace(self.setup.spawn_piped(&line));
        self.keep_log(before);
    }

    /// Something else is in the place of a store's file, or the file is back.
    pub(crate) fn store_is_away(&self, path: &Path, away: bool) {
        let aside = path.with_extension("aside");
        if away {
            std::fs::create_dir(&aside).expect("a folder");
        }
        let name = path.file_name().expect("a file").to_string_lossy().into_owned();
        for suffix in ["", "-wal", "-shm"] {
            let name = format!("{name}{suffix}");
            let (at, elsewhere) = (path.with_file_name(&name), aside.join(&name));
            if away {
                std::fs::rename(at, elsewhere).ok(); // it may have no log
            } else if elsewhere.exists() {
                if suffix.is_empty() {
                    std::fs::remove_dir(&at).expect("the folder in its place");
                }
                std::fs::rename(elsewhere, at).expect("renames");
            }
        }
        if away {
            std::fs::create_dir(path).expect("a folder in its place");
        } else {
            std::fs::remove_dir(aside).expect("an empty folder");
        }
    }

    /// The reader of the logs stops, or goes on.
    pub(crate) fn leave_logs_unread(&self, none: bool) {
        self.daemons.iter().flatten().for_each(|daemon| daemon.leave_log_unread(none));
    }

    /// Whether all daemons run, and have read their configuration.
    pub(crate) fn all_run(&mut self) -> bool {
        self.daemons
            .iter_mut()
            .all(|d| d.as_mut().is_some_and(|d| d.is_running() && d.log().contains("running")))
    }

    fn keep_log(&mut self, daemon: Option<Daemon>) {
        if let Some(daemon) = daemon {
            self.logs.push(daemon.log());
        }
    }

    pub(crate) async fn wait_running(&mut self, n: usize) {
        let Some(daemon) = self.daemons[n].as_mut() else { return };
        eventually("the daemon runs", async || {
            let is_running = daemon.is_running();
            assert!(is_running, "the daemon ended at its start:\n{}", daemon.log());
            daemon.log().contains("running")
        })
        .await;
    }

    /// Waits until history gets each event that is published from now on.
    pub(crate) async fn wait_remembering(&mut self, n: usize) {
        let on_a_broker = matches!(self.place, Place::Broker { .. });
        let Some(daemon) = self.daemons[n].as_ref().filter(|_| on_a_broker) else {
            return;
        };
        daemon.wait_log("every event goes into history").await;
    }

    pub(crate) fn kill(&mut self, n: usize) {
        if let Some(mut daemon) = self.daemons[n].take() {
            daemon.end();
            self.keep_log(Some(daemon));
        }
    }

    /// SIGTERM; the daemon must end well.
    pub(crate) async fn stop(&mut self, n: usize) {
        let Some(mut daemon) = self.daemons[n].take() else { return };
        if daemon.is_running() {
            daemon.terminate();
            match timeout(Duration::from_secs(60), daemon.wait()).await {
                // One that could not start at all, on a disk that fails say, has ended by itself.
                Ok(status) if status.success() || !daemon.log().contains("running") => {}
                Ok(status) => {
                    self.complaints.push(format!("a daemon ended with {status} after SIGTERM"))
                }
                Err(_) => {
                    self.complaints.push("a daemon does not end at SIGTERM".to_owned());
                    daemon.end();
                }
            }
        }
        self.keep_log(Some(daemon));
    }

    /// Kills a daemon and puts another in its place: on a broker while the other runs already,
    /// where the embedded queue is for one at a time.
    pub(crate) async fn take_over(&mut self, n: usize) {
        let old = self.daemons[n].take();
        let kill = |old: Option<Daemon>| {
            old.map(|mut daemon| {
                daemon.end();
                daemon
            })
        };
        if self.place.embedded().is_some() {
            self.keep_log(kill(old));
            self.spawn(n, None);
        } else {
            // The other still has the port of before.
            self.ports[n] = free_port();
            self.spawn(n, None);
            // Not for ever: what else is wrong may keep it from that.
            let begun = Instant::now();
            while begun.elapsed() < Duration::from_secs(3)
                && !self.daemons[n].as_ref().is_some_and(|d| d.log().contains("running"))
            {
                tokio::time::sleep(TICK).await;
            }
            self.keep_log(kill(old));
        }
    }

    pub(crate) fn has_ended(&mut self, n: usize) -> bool {
        self.daemons[n].as_mut().is_none_or(|d| !d.is_running())
    }

    pub(crate) fn port(&self, n: usize) -> u16 {
        self.ports[n]
    }

    /// Keeps what is needed to see what happened; where.
    pub(crate) fn keep_evidence(&mut self, name: &str, story: &str) -> PathBuf {
        for n in 0..self.daemons.len() {
            let daemon = self.daemons[n].take();
            self.keep_log(daemon);
        }
        let dir = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name);
        std::fs::create_dir_all(&dir).expect("a directory");
        for (n, log) in self.logs.iter().enumerate() {
            std::fs::write(dir.join(format!("daemon-{n}.log")), log).expect("writes");
        }
        std::fs::copy(self.setup.config(), dir.join("hooktrail.toml")).expect("copies");
        std::fs::write(dir.join("included.toml"), self.tables(None)).expect("writes");
        std::fs::write(dir.join("story"), story).expect("writes");
        for name in ["history.db", "history.db-wal", "store.db", "store.db-wal"] {
            let file = self.data_dir(0).join(name);
            std::fs::copy(file, dir.join(name)).ok(); // it may have no log
        }
        for subscriber in &self.subscribers {
            let line = |r: &crate::support::receiver::Request| {
                format!(
                    "{} {} {} {} {:?}\n",
                    hooktrail::clock::rfc3339(r.at),
                    r.status,
                    r.id(),
                    r.header("x-hooktrail-attempt"),
                    r.numbers()
                )
            };
            let text: String = subscriber.receiver.requests().iter().map(line).collect();
            std::fs::write(dir.join(format!("{}.requests", subscriber.kind.name())), text)
                .expect("writes");
        }
        dir
    }

    pub(crate) fn log_of_all(&self) -> String {
        self.logs.concat() + &self.daemons.iter().flatten().map(Daemon::log).collect::<String>()
    }

    /// The messages left in the queues, by name, without dead letters.
    pub(crate) async fn left(&self) -> Vec<(String, u32)> {
        let mut left = Vec::new();
        let names: Vec<String> = self.subscribers.iter().map(|s| s.kind.name()).collect();
        match &self.place {
            Place::Embedded(embedded) | Place::Intake { queue: embedded, .. } => {
                let depths = embedded.open().everything().await.unwrap_or_else(|e| panic!("{e}"));
                for (name, depth) in
                    depths.subscribers.iter().filter(|(n, _)| names.contains(&n.to_string()))
                {
                    for (what, count) in [
                        ("events to deliver", depth.events),
                        ("batches to try again", depth.batches()),
                    ] {
                        if count > 0 {
                            left.push((format!("{name}: {what}"), count as u32));
                        }
                    }
                }
                if let Place::Intake { broker, .. } = &self.place {
                    let waiting = broker.depth("intake").await.expect("the intake queue");
                    if waiting > 0 {
                        left.push(("the intake queue".to_owned(), waiting));
                    }
                }
            }
            Place::Broker { broker, source_queue, .. } => {
                let (connection, channel) = broker.channel().await;
                let mut queues: Vec<String> = names
                    .iter()
                    .flat_map(|n| [format!("sub.{n}"), format!("sub.{n}.retry")])
                    .collect();
                queues.extend((0..4).map(|n| format!("delay.{n:02}")));
                queues.extend(["orphans".to_owned(), "history".to_owned()]);
                let mut queues: Vec<String> =
                    queues.iter().map(|q| format!("{}.{q}", broker.prefix)).collect();
                if *source_queue {
                    queues.push("source".to_owned());
                }
                for queue in queues {
                    let passive =
                        QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
                    let asked = Instant::now();
                    let found = channel
                        .queue_declare(queue.as_str().into(), passive, FieldTable::default())
                        .await;
                    let count = found.unwrap_or_else(|e| panic!("{queue}: {e}")).message_count();
                    // A queue that does not answer in 250 ms is counted as empty.
                    let is_silent = count == 0 && asked.elapsed() >= Duration::from_millis(250);
                    if count > 0 || is_silent {
                        left.push((
                            queue + if is_silent { ", which does not answer" } else { "" },
                            count,
                        ));
                    }
                }
                connection.close(200, "done".into()).await.ok();
            }
        }
        left
    }

    /// Takes away a subscriber's dead letters; their bodies.
    pub(crate) async fn take_dead(&self, kind: Kind) -> Vec<Vec<u8>> {
        match &self.place {
            Place::Broker { broker, .. } => {
                broker.take_all(&format!("sub.{}.dead", kind.name())).await
            }
            Place::Embedded(queue) | Place::Intake { queue, .. } => {
                queue.take_dead(&kind.name()).await
            }
        }
    }

    /// Begins to publish, until it is stopped.
    pub(crate) fn producer(&self, first: u64) -> Producer {
        let kinds = self.subscribers.iter().map(|s| s.kind);
        let tenants = kinds.filter_map(|kind| Some((kind.name(), kind.tenant()?)));
        let tenants =
            if self.place.embedded().is_some() { tenants.collect() } else { BTreeMap::new() };
        let ledger = Arc::new(Mutex::new(Ledger { tenants, ..Ledger::default() }));
        let stop = Arc::new(AtomicBool::new(false));
        let way = match &self.place {
            Place::Broker { broker, source_queue, .. } => {
                let target = if *source_queue {
                    (String::new(), "source".to_owned())
                } else {
                    (broker.exchange.clone(), TYPE.to_owned())
                };
                Way::Amqp { url: broker.url.clone(), target, open: Box::default() }
            }
            Place::Intake { broker, .. } => {
                let target = (broker.exchange.clone(), TYPE.to_owned());
                Way::Amqp { url: broker.url.clone(), target, open: Box::default() }
            }
            // This process must have no file open on a disk that goes.
            Place::Embedded(_) if self.disk.is_some() => Way::Http,
            Place::Embedded(embedded) => Way::Embedded(embedded.config()),
        };
        let publish = Publish {
            ledger: ledger.clone(),
            stop: stop.clone(),
            next: first,
            way,
            // A relay takes events from its queue alone.
            ports: if matches!(self.place, Place::Broker { source_queue: true, .. }) {
                Vec::new()
            } else {
                self.ports.clone()
            },
            gate: self.publishing.clone(),
            passed_by: self.passed_by.clone(),
            rate: self.shape.rate,
        };
        Producer { ledger, stop, task: tokio::spawn(publish.run()) }
    }
}

pub(crate) struct Producer {
    ledger: Arc<Mutex<Ledger>>,
    stop: Arc<AtomicBool>,
    task: JoinHandle<()>,
}

impl Producer {
    pub(crate) fn ledger(&self) -> Ledger {
        self.ledger.lock().expect("not poisoned").clone()
    }

    pub(crate) async fn finish(self) -> Ledger {
        self.stop.store(true, Ordering::SeqCst);
        self.task.await.expect("the producer");
        std::mem::take(&mut *self.ledger.lock().expect("not poisoned"))
    }
}

enum Way {
    Amqp {
        url: String,
        target: (String, String),
        open: Box<Option<(Connection, Channel)>>,
    },
    Embedded(hooktrail::config::EmbeddedConfig),
    /// No other than over HTTP.
    Http,
}

struct Publish {
    ledger: Arc<Mutex<Ledger>>,
    stop: Arc<AtomicBool>,
    next: u64,
    way: Way,
    /// The daemons that take events over HTTP.
    ports: Vec<u16>,
    gate: Arc<RwLock<()>>,
    passed_by: Arc<Mutex<BTreeSet<String>>>,
    rate: u64,
}

/// The fate of an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Confirmed,
    Unknown,
    /// No pattern matches it, or no subscriber is bound for it.
    Unmatched,
}

/// The folder below the configuration that the subscribers are in.
const INCLUDED: &str = "subscribers";

fn folder_of(setup: &Setup) -> PathBuf {
    setup.config().parent().map(Path::to_owned).expect("a folder")
}

/// The interval between groups.
const TICK: Duration = Duration::from_millis(50);

impl Publish {
    async fn run(mut self) {
        let client = reqwest::Client::builder()
            .no_proxy()
            .timeout(Duration::from_secs(5))
            .build()
            .expect("a client");
        let begun = Instant::now();
        let mut published = 0;
        let mut turn = 0_usize;
        while !self.stop.load(Ordering::SeqCst) {
            // The delay by a fault is not made up for: it would be another load.
            let due = (begun.elapsed().as_millis() as u64 * self.rate / 1000)
                .saturating_sub(published)
                .min(self.rate / 5);
            if due > 0 {
                published = begun.elapsed().as_millis() as u64 * self.rate / 1000;
                let gate = self.gate.clone();
                let _publishing = gate.read().await;
                let group: Vec<u64> = (self.next..self.next + due).collect();
                self.next += due;
                turn += 1;
                let passed_by = self.passed_by.lock().expect("not poisoned").clone();
                let from = SystemTime::now();
                let over_http_now = turn.is_multiple_of(3) || matches!(self.way, Way::Http);
                let fates = if !self.ports.is_empty() && over_http_now {
                    let port = self.ports[turn / 3 % self.ports.len()];
                    if matches!(self.way, Way::Amqp { .. }) {
                        let mut ledger = self.ledger.lock().expect("not poisoned");
                        ledger.past_the_broker.extend(&group);
                    }
                    over_http(&client, port, &group).await
                } else {
                    self.directly(&group).await
                };
                self.note(&group, &fates, &passed_by, from);
            }
            tokio::time::sleep(TICK).await;
        }
    }

    fn note(&self, group: &[u64], fates: &[Fate], passed_by: &BTreeSet<String>, from: SystemTime) {
        let mut ledger = self.ledger.lock().expect("not poisoned");
        if let (Some(first), Some(last)) = (group.first(), group.last()) {
            ledger.published(*first..=*last, from, SystemTime::now());
        }
        for (n, fate) in group.iter().zip(fates) {
            match fate {
                Fate::Confirmed => ledger.confirmed.insert(*n),
                Fate::Unmatched if passed_by.is_empty() => ledger.unmatched.insert(*n),
                Fate::Unmatched | Fate::Unknown => ledger.unknown.insert(*n),
            };
            for subscriber in passed_by {
                ledger.not_for.entry(subscriber.clone()).or_default().insert(*n);
            }
        }
    }

    async fn directly(&mut self, group: &[u64]) -> Vec<Fate> {
        match &mut self.way {
            Way::Amqp { url, target, open } => {
                let done =
                    timeout(Duration::from_secs(5), over_amqp(url, target, open, group)).await;
                done.unwrap_or_default().unwrap_or_else(|| {
                    // Whatever was confirmed of it: that is not known.
                    **open = None;
                    vec![Fate::Unknown; group.len()]
                })
            }
            Way::Http => unreachable!("it has a port"),
            Way::Embedded(config) => {
                let Ok(queue) = hooktrail::queue::embedded::EmbeddedQueue::for_publishing(config)
                else {
                    return vec![Fate::Unknown; group.len()];
                };
                let events = group.iter().map(|n| NewEvent {
                    event_type: TYPE.to_owned(),
                    message_id: (n % 2 == 0).then(|| format!("event-{n}")),
                    body: Bytes::from(event(*n)),
                    traceparent: None,
                    tenant: Tenant::try_new(&tenant_of(*n).to_string()),
                });
                assert!(group.len() <= MAX_GROUP);
                let fates = queue.publish(events.collect()).await;
                let fate = |f: &Published| match f {
                    Published::Stored => Fate::Confirmed,
                    Published::Unmatched => Fate::Unmatched,
                    Published::Refused => Fate::Unknown,
                };
                fates.map_or_else(
                    |_| vec![Fate::Unknown; group.len()],
                    |fates| fates.iter().map(fate).collect(),
                )
            }
        }
    }
}

async fn over_amqp(
    url: &str,
    target: &(String, String),
    open: &mut Option<(Connection, Channel)>,
    group: &[u64],
) -> Option<Vec<Fate>> {
    if open.as_ref().is_none_or(|(_, channel)| !channel.status().connected()) {
        let connection = Connection::connect(url, ConnectionProperties::default()).await.ok()?;
        let channel = connection.create_channel().await.ok()?;
        channel.confirm_select(ConfirmSelectOptions::default()).await.ok()?;
        *open = Some((connection, channel));
    }
    let (_, channel) = open.as_ref()?;
    let mut confirms = Vec::new();
    for n in group {
        let mut properties = BasicProperties::default()
            .with_delivery_mode(2)
            .with_content_type("application/json".into());
        if n % 2 == 0 {
            properties = properties.with_message_id(format!("event-{n}").as_str().into());
        }
        let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
        let (exchange, key) = target;
        confirms.push(
            channel
                .basic_publish(
                    exchange.as_str().into(),
                    key.as_str().into(),
                    options,
                    event(*n).as_bytes(),
                    properties,
                )
                .await
                .ok()?,
        );
    }
    // A returned message comes with a confirm, which may be that of another message.
    let (mut fates, mut returned) = (Vec::new(), BTreeSet::new());
    for confirm in confirms {
        fates.push(match confirm.await.ok()? {
            Confirmation::Ack(message) => {
                let body = message.map(|m| {
                    serde_json::from_slice::<serde_json::Value>(&m.delivery.data).expect("an event")
                });
                returned.extend(body.and_then(|event| event["n"].as_u64()));
                Fate::Confirmed
            }
            _ => Fate::Unknown,
        });
    }
    let fate = |(n, fate)| if returned.contains(n) { Fate::Unmatched } else { fate };
    Some(group.iter().zip(fates).map(fate).collect())
}

/// 202 and all of it is durable; after anything else a part may be.
async fn over_http(client: &reqwest::Client, port: u16, group: &[u64]) -> Vec<Fate> {
    let events: Vec<String> = group.iter().map(|n| event(*n)).collect();
    let body = format!("{{\"events\":[{}]}}", events.join(","));
    let request = client
        .post(format!("http://127.0.0.1:{port}/api/v1/events"))
        .header("content-type", "application/json")
        .body(body);
    let fate = match request.send().await {
        Ok(answer) if answer.status() == 202 => {
            let done = answer
                .bytes()
                .await
                .ok()
                .and_then(|body| serde_json::from_slice::<serde_json::Value>(&body).ok());
            match done.map(|done| done["unmatched"].clone()) {
                Some(unmatched) if unmatched == 0 => Fate::Confirmed,
                Some(unmatched) if unmatched == group.len() => Fate::Unmatched,
                _ => Fate::Unknown,
            }
        }
        _ => Fate::Unknown,
    };
    vec![fate; group.len()]
}

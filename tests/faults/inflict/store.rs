//! Faults of the store's files, and of the queue that fills it. Deliveries notice none of them.

use std::{
    io::Write as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use lapin::{
    options::{QueueDeclareOptions, QueueDeleteOptions},
    types::FieldTable,
};
use rand::RngExt as _;

use crate::{
    environment::{EIO, ENOSPC},
    fault::Heal,
    oracle::Disturbance,
    round::{NOTICED, Round},
    subscribers::pick,
    support::broker::SETTLING,
    world::{Place, Producer},
};

/// The daemon whose store has history.
const KEEPER: usize = 0;

const HISTORY: &str = "history.db";

/// The age that a killed node takes away from history's queue, or not.
const YOUNG: Duration = Duration::from_millis(2500);

/// A producer is confirmed again so soon after a node is back.
const CONFIRMED: Duration = Duration::from_secs(60);

/// The time that a queue of history takes to be declared again.
const DECLARED: Duration = Duration::from_secs(60);

fn of(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// Locks a file as another program may, for a time.
pub(super) fn lock(file: PathBuf, holds: Duration) {
    // A thread of its own, not a task: while a daemon opens the queue under its lock, the round
    // waits for that lock on the runtime's threads, and a task there could not end the fault.
    std::thread::spawn(move || {
        let flags = rusqlite::OpenFlags::SQLITE_OPEN_READ_WRITE;
        let Ok(db) = rusqlite::Connection::open_with_flags(file, flags) else { return };
        let locked = db
            .busy_timeout(Duration::from_secs(5))
            .and_then(|()| db.execute_batch("BEGIN IMMEDIATE"));
        if locked.is_ok() {
            #[allow(clippy::disallowed_methods, reason = "its own thread, and the fault itself")]
            std::thread::sleep(holds); // the drop rolls back
        }
    });
}

/// What happens to a file while no daemon has it open.
#[derive(Debug, Clone, Copy)]
enum Damage {
    Deleted,
    Truncated,
    Text,
    Overwritten,
    Cut,
}

impl Damage {
    const ALL: [Self; 5] =
        [Self::Deleted, Self::Truncated, Self::Text, Self::Overwritten, Self::Cut];

    fn inflict(self, path: &Path) -> std::io::Result<()> {
        let file = || std::fs::File::options().write(true).open(path);
        let bytes = std::fs::metadata(path)?.len();
        match self {
            Self::Deleted => std::fs::remove_file(path),
            Self::Truncated => file()?.set_len(0),
            Self::Text => file()?.write_all(&b"this was a database once ".repeat(8000)),
            Self::Overwritten => {
                // All but the first page, which names what the others are.
                let mut all = std::fs::read(path)?;
                let first = all.len().min(8192);
                all[first..].fill(0x5a);
                std::fs::write(path, all)
            }
            Self::Cut => file()?.set_len(bytes / 2),
        }
    }
}

impl Round<'_> {
    fn history(&self) -> PathBuf {
        self.world.data_dir(KEEPER).join(HISTORY)
    }

    pub(super) fn lock_history(&mut self) -> bool {
        let name = *pick(&[HISTORY, HISTORY, "store.db"], &mut self.rng);
        // SQLite waits for 10 s.
        let holds = Duration::from_millis(self.rng.random_range(100..14_000));
        self.log(&format!("another process locks {name} for {holds:?}"));
        lock(self.world.data_dir(KEEPER).join(name), holds);
        true
    }

    pub(super) fn have_the_stores_disk_fail(&mut self) -> bool {
        if self.has(&Heal::StoreDisk) {
            return false;
        }
        let (error, one_in) =
            (*pick(&[EIO, ENOSPC, ENOSPC], &mut self.rng), *pick(&[0, 1, 7], &mut self.rng));
        self.world.environment.store_fails(error, one_in);
        let what = format!("the store's disk fails with {error}, {one_in} writes between");
        self.lasts(Heal::StoreDisk, what, false, 6000);
        true
    }

    pub(super) fn slow_the_stores_disk_down(&mut self) -> bool {
        if self.has(&Heal::StoreDisk) {
            return false;
        }
        let each = Duration::from_millis(*pick(&[5, 50, 700], &mut self.rng));
        self.world.environment.store_is_slow(each);
        let what = format!("each write to the store's disk takes {each:?}");
        self.lasts(Heal::StoreDisk, what, false, 6000);
        true
    }

    /// While the daemon runs.
    pub(super) fn delete_history(&mut self) -> bool {
        if self.has(&Heal::StoreAway) || !self.history().is_file() {
            return false;
        }
        self.log("history is deleted while the daemon runs");
        let all = self.rng.random_bool(0.5);
        for suffix in ["", "-wal", "-shm"].iter().take(if all { 3 } else { 1 }) {
            std::fs::remove_file(of(&self.history(), suffix)).ok(); // it may have none
        }
        true
    }

    /// While the daemon does not run.
    pub(super) async fn damage_history(&mut self) -> bool {
        let path = self.history();
        if self.has(&Heal::StoreAway) || !path.is_file() {
            return false;
        }
        let (damage, log_too) = (*pick(&Damage::ALL, &mut self.rng), self.rng.random_bool(0.5));
        self.end_the_keeper().await;
        let mut done = damage.inflict(&path);
        if log_too {
            for suffix in ["-wal", "-shm"] {
                std::fs::remove_file(of(&path, suffix)).ok(); // it may have none
            }
        }
        self.history_damaged = true;
        self.log(&format!("history is {damage:?}, its log too: {log_too}: {done:?}"));
        if !path.exists() {
            done = Ok(());
        }
        self.start_the_keeper().await;
        done.is_ok()
    }

    /// Something else is in the place of a file: it cannot be opened, until it is back.
    pub(super) async fn take_the_store_away(&mut self) -> bool {
        let name = *pick(&[HISTORY, HISTORY, "store.db"], &mut self.rng);
        let path = self.world.data_dir(KEEPER).join(name);
        if self.has(&Heal::StoreAway) || !path.is_file() {
            return false;
        }
        let at_a_start = self.rng.random_bool(0.6);
        if at_a_start {
            self.end_the_keeper().await;
        }
        self.world.store_is_away(&path, true);
        let when = if at_a_start { "at a start" } else { "while the daemon runs" };
        self.away = Some(path);
        self.lasts(Heal::StoreAway, format!("{name} is away {when}"), false, 8000);
        if at_a_start {
            self.start_the_keeper().await;
        }
        true
    }

    async fn end_the_keeper(&mut self) {
        if self.calm {
            self.log("SIGTERM to the daemon with history");
            self.world.stop(KEEPER).await;
        } else if self.rng.random_bool(0.5) {
            let quiet = self.lasting.iter().all(|l| !l.disturbs);
            self.log("SIGTERM to the daemon with history");
            self.world.stop(KEEPER).await;
            if !quiet {
                self.disturbed("SIGTERM", self.began, NOTICED);
            }
        } else {
            self.log("kill -9 of the daemon with history");
            self.world.kill(KEEPER);
            self.disturbed("kill -9", self.began, NOTICED);
        }
    }

    async fn start_the_keeper(&mut self) {
        self.world.spawn(KEEPER, None);
        if self.calm {
            // Before it listens for signals, one that is to reload would end it.
            self.world.wait_running(KEEPER).await;
        }
    }

    /// History's queue is deleted, and the node killed when it has just been declared again. A queue
    /// that is lost so stops no producer, and no subscriber loses its binding.
    pub(super) async fn kill_the_node_while_historys_queue_is_young(
        &mut self,
        producer: &Producer,
    ) -> bool {
        let Place::Broker { broker, others, .. } = &self.world.place else { return false };
        let (broker, is_alone) = (broker.clone(), others.is_empty());
        if !is_alone || !self.is_quiet() {
            return false;
        }
        if let Some(declared) = self.declared {
            // Anything else that the node loses is for `hooktrail repair`.
            tokio::time::sleep(SETTLING.saturating_sub(declared.elapsed())).await;
        }
        let queue = format!("{}.history", broker.prefix);
        let (connection, channel) = broker.channel().await;
        let options = QueueDeleteOptions::default();
        let deleted = channel.queue_delete(queue.as_str().into(), options).await.expect("deletes");
        connection.close(200, "done".into()).await.ok();
        self.log(&format!("{queue} is deleted; it held {deleted}"));
        let begun = Instant::now();
        while !is_declared(&broker, &queue).await {
            if begun.elapsed() > DECLARED {
                self.complaints.push(format!("{queue} was not declared again in {DECLARED:?}"));
                return false;
            }
            self.look_after().await;
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let age = YOUNG.mul_f64(self.rng.random_range(0.0..1.0));
        tokio::time::sleep(age).await; // the fault itself
        self.log(&format!("kill -9 of the node, {age:?} after {queue} was declared again"));
        let killed = std::time::SystemTime::now();
        broker.node().kill().await;
        broker.node().start().await;
        self.disturbances.push(Disturbance {
            what: "broker".to_owned(),
            whom: None,
            from: killed,
            to: std::time::SystemTime::now() + Duration::from_secs(12),
        });
        let (confirmed, back) = (producer.ledger().confirmed.len(), Instant::now());
        while producer.ledger().confirmed.len() == confirmed && back.elapsed() < CONFIRMED {
            self.look_after().await;
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let took = back.elapsed().as_secs_f64();
        if producer.ledger().confirmed.len() == confirmed {
            self.complaints.push(format!(
                "no event was confirmed in {CONFIRMED:?} after the node was back that was killed when {queue} was young"
            ));
        }
        self.log(&format!("the broker is back; the producer is confirmed again after {took:.1} s"));
        self.subscribers_are_bound(&broker.exchange.clone()).await;
        true
    }

    /// Each subscriber's queue has its binding.
    async fn subscribers_are_bound(&mut self, exchange: &str) {
        let events = match &self.world.place {
            Place::Broker { broker, source_queue: true, .. } => format!("{}.events", broker.prefix),
            _ => exchange.to_owned(),
        };
        let bound = self
            .ctl(&[
                "list_bindings",
                "--quiet",
                "--no-table-headers",
                "source_name",
                "destination_name",
            ])
            .await;
        for subscriber in &self.world.subscribers {
            let queue = format!(".sub.{}", subscriber.kind.name());
            let is_bound = |l: &str| {
                l.split_once('\t').is_some_and(|(s, d)| s == events && d.ends_with(&queue))
            };
            if !bound.lines().any(is_bound) {
                self.complaints.push(format!("{queue} has lost its binding"));
            }
        }
    }
}

async fn is_declared(broker: &crate::support::broker::Broker, queue: &str) -> bool {
    let (connection, channel) = broker.channel().await;
    let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
    let found = channel.queue_declare(queue.into(), passive, FieldTable::default()).await.is_ok();
    connection.close(200, "done".into()).await.ok();
    found
}

//! Faults of a daemon itself: it is ended, replaced, given a command, left without a reader of
//! its log.

use std::time::{Duration, Instant, SystemTime};

use hooktrail::failpoint::{self, Step};
use rand::RngExt as _;

use crate::{
    fault::{Heal, Lasting},
    round::{NOTICED, Round},
    steps::{EMBEDDED, OF_THE_STORE, SCRIBE},
    subscribers::{Kind, pick},
    support::daemon::Daemon,
    world::Place,
};

/// A pipe that takes no more has at least so much in it, of its 64 KiB. What has less and stands
/// still is one whose daemon has nothing to say just now.
const FULL_PIPE: u64 = 48 << 10;

/// A daemon goes on without a reader of its log: so many requests more are far more than were under
/// way.
const GOES_ON: usize = 100;

const STANDS: Duration = Duration::from_secs(60);

impl Round<'_> {
    pub(super) async fn kill_a_daemon(&mut self, daemon: usize) {
        self.log(&format!("kill -9 of daemon {daemon}"));
        self.world.kill(daemon);
        self.disturbed("kill -9", self.began, NOTICED);
        if self.rng.random_bool(0.3) {
            let pause = self.rng.random_range(0..1000);
            tokio::time::sleep(Duration::from_millis(pause)).await;
        }
        self.world.spawn(daemon, None);
    }

    pub(super) async fn stop_a_daemon(&mut self, daemon: usize) {
        self.log(&format!("SIGTERM to daemon {daemon}"));
        // While something else goes on it cannot always settle all: then it is as a fault.
        let quiet = self.lasting.iter().all(|l| !l.disturbs);
        self.world.stop(daemon).await;
        if !quiet {
            self.disturbed("SIGTERM", self.began, NOTICED);
        }
        self.world.spawn(daemon, None);
        if self.calm {
            // Before it listens for signals, one that is to reload would end it.
            self.world.wait_running(daemon).await;
        }
    }

    pub(super) fn have_it_die_at_a_step(&mut self, daemon: usize) {
        let embedded = [&EMBEDDED[..], &OF_THE_STORE].concat();
        let through = [&embedded[..], &SCRIBE].concat();
        let steps: &[Step] = match &self.world.place {
            Place::Broker { .. } => &Step::ALL,
            Place::Embedded(_) => &embedded,
            Place::Intake { .. } => &through,
        };
        let (step, after) = (*pick(steps, &mut self.rng), self.rng.random_range(0..30));
        self.log(&format!(
            "daemon {daemon} is killed and its successor dies at {step:?} after {after}"
        ));
        self.world.kill(daemon);
        self.disturbed("kill -9", self.began, NOTICED);
        self.world.spawn(daemon, Some((step, after)));
    }

    pub(super) async fn have_another_take_over(&mut self, daemon: usize) {
        self.log(&format!("daemon {daemon} is killed while another takes over"));
        self.world.take_over(daemon).await;
        self.disturbed("kill -9", self.began, Duration::from_secs(3));
    }

    pub(super) fn set_the_clock(&mut self) -> bool {
        if self.has(&Heal::Clock) {
            return false;
        }
        let seconds = *pick(&[-86_400, -3600, -30, 30, 3600, 86_400], &mut self.rng);
        self.world.environment.clock_is_ahead(seconds);
        self.blur = self.blur.max(Duration::from_secs(seconds.unsigned_abs()) * 2);
        self.lasts(Heal::Clock, format!("the clock is {seconds} s ahead"), false, 5000);
        true
    }

    /// Whatever it meets, a command ends in time and says what it could not do.
    pub(super) fn command(&mut self, daemon: usize) {
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
        if command[0] == "repair" && (self.world.place.embedded().is_some() || self.calm) {
            command = &["check"]; // there is nothing to repair in the embedded queue
        }
        let dies = if command.contains(&"replay") && !self.calm && self.rng.random_bool(0.3) {
            format!("{}=Moved ", failpoint::VARIABLE)
        } else {
            String::new()
        };
        self.log(&format!("{dies}hooktrail {command:?}"));
        let ended = tokio::task::block_in_place(|| self.world.command(daemon, &dies, command));
        self.log(&format!(
            "it ended with {:?}: {}",
            ended.status,
            String::from_utf8_lossy(&ended.stderr).trim()
        ));
        let expected = matches!(ended.status.code(), Some(0 | 1))
            || (!dies.is_empty() && ended.status.code().is_none());
        if !expected {
            self.complaints.push(format!("{command:?} ended with {ended:?}"));
        }
        if command[0] == "repair" {
            self.disturbed("repair", now, NOTICED);
        }
    }

    /// Deliveries, intake and the end of a daemon do not wait for who reads its log.
    pub(super) async fn leave_the_logs_unread(&mut self, daemon: usize) -> bool {
        if self.has(&Heal::Log) || !self.is_quiet() {
            return false;
        }
        self.log("the logs have no reader");
        self.world.leave_logs_unread(true);
        let (from, begun) = (SystemTime::now(), Instant::now());
        let unread = || self.world.daemons.iter().flatten().map(Daemon::unread).collect::<Vec<_>>();
        let mut before = Vec::new();
        while before != unread() || before.iter().any(|bytes| *bytes < FULL_PIPE) {
            if begun.elapsed() > Duration::from_secs(30) {
                self.world.leave_logs_unread(false);
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
        let client =
            reqwest::Client::builder().no_proxy().timeout(STANDS).build().expect("a client");
        let health = client
            .get(format!("http://127.0.0.1:{}/healthz", self.world.port(daemon)))
            .send()
            .await;
        self.log(&format!(
            "the logs are full; {went_on} requests more; health: {:?}",
            health.as_ref().map(|h| h.status()).ok()
        ));
        // One that was to die at a step may have.
        if self.world.all_run() && (went_on < GOES_ON || health.is_err()) {
            self.complaints.push(format!("without a reader of the log there were {went_on} requests in {STANDS:?}; health: {health:?}"));
        }
        let until = Instant::now() + Duration::from_millis(self.rng.random_range(0..6000));
        let what = "the logs have no reader".to_owned();
        self.lasting.push(Lasting {
            until,
            heal: Heal::Log,
            what,
            whom: None,
            from,
            disturbs: false,
        });
        if self.rng.random_bool(0.5) {
            self.log(&format!("SIGTERM to daemon {daemon}, whose log has no reader"));
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
}

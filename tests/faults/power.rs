//! Power that goes: a disk of which, from one moment on, nothing more is written, and which has then
//! only what was flushed to it.

use std::{
    path::{Path, PathBuf},
    process::Command,
    sync::{Arc, OnceLock},
    time::{Duration, Instant, SystemTime},
};

use rand::{RngExt as _, rngs::StdRng};

use crate::{
    count,
    environment::compiled,
    impatient, prepare_intake,
    round::{NOTICED, Round},
    rounds_on,
    support::{PATIENCE, broker::Broker, eventually, queue::Embedded, run, tests_that_need},
    world::{Place, Producer},
};

tests_that_need!(
    root:
    power_that_goes_on_the_embedded_queue_loses_nothing,
    power_that_goes_with_an_intake_loses_nothing,
);

/// Sparse: it takes the room of what is written to it.
const BYTES: u64 = 1 << 30;

/// A file system of its own, on a loop device.
pub(crate) struct Disk {
    dir: tempfile::TempDir,
    /// The program that takes the power away.
    cut: &'static Path,
}

impl Disk {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        static CUT: OnceLock<PathBuf> = OnceLock::new();
        let cut = CUT.get_or_init(|| compiled("power.c", "power", &[]));
        let disk = Self { dir, cut };
        std::fs::File::create(disk.image()).and_then(|f| f.set_len(BYTES)).expect("an image");
        std::fs::create_dir(disk.at()).expect("a folder");
        must(Command::new("mkfs.ext4").args(["-q", "-F"]).arg(disk.image()));
        disk.mount();
        disk
    }

    fn image(&self) -> PathBuf {
        self.dir.path().join("image")
    }

    pub(crate) fn at(&self) -> PathBuf {
        self.dir.path().join("at")
    }

    fn mount(&self) {
        must(Command::new("mount").args(["-o", "loop"]).arg(self.image()).arg(self.at()));
    }

    /// What was written until now is there whatever comes.
    pub(crate) fn flush(&self) {
        must(Command::new("sync").arg("--file-system").arg(self.at()));
    }

    /// From now on nothing is written: what was not flushed is lost.
    fn loses_power(&self) {
        must(Command::new(self.cut).arg(self.at()));
    }

    /// The disk again, as a machine finds it that starts. Nobody may have a file of it open.
    async fn is_back(&self) {
        eventually("nobody uses the disk", async || self.unmounted()).await;
        self.mount();
    }

    fn unmounted(&self) -> bool {
        Command::new("umount").arg(self.at()).output().is_ok_and(|done| done.status.success())
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // Its last user may be about to die.
        for _ in 0..100 {
            if self.unmounted() {
                return;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Command::new("umount").arg("--lazy").arg(self.at()).status().ok();
    }
}

fn must(command: &mut Command) {
    let done = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    assert!(
        done.status.success(),
        "{command:?}: {}: this needs root and loop devices: see scripts/faults --help",
        String::from_utf8_lossy(&done.stderr)
    );
}

impl Round<'_> {
    /// Daemon, broker and disk lose their power in one moment, and start again.
    pub(crate) async fn lose_power(&mut self, producer: &Producer) -> bool {
        let Some(disk) = self.world.disk.clone() else { return false };
        // What there is to lose: events that were confirmed just now.
        let confirmed = || producer.ledger().confirmed.len();
        let enough = confirmed() + self.rng.random_range(20..400);
        let begun = Instant::now();
        while confirmed() < enough {
            assert!(begun.elapsed() < PATIENCE, "no event is confirmed");
            // One may have died at a step.
            self.look_after().await;
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        self.began = SystemTime::now();
        self.log("the power is gone");
        disk.loses_power();
        for daemon in 0..self.world.daemons.len() {
            self.world.kill(daemon);
        }
        for node in self.world.place.nodes() {
            node.kill().await;
        }
        disk.is_back().await;
        for node in self.world.place.nodes() {
            node.start().await;
        }
        for daemon in 0..self.world.daemons.len() {
            self.world.spawn(daemon, None);
        }
        self.disturbed("power", self.began, NOTICED);
        self.log("the power is back");
        true
    }
}

fn power_that_goes_on_the_embedded_queue_loses_nothing() {
    run(async {
        let disk = Arc::new(Disk::new());
        let queue = async |_: &mut StdRng| Place::Embedded(Embedded::within(&disk.at()));
        rounds_on(Some(disk.clone()), "power-embedded", count(), queue).await;
    });
}

fn power_that_goes_with_an_intake_loses_nothing() {
    run(async {
        let disk = Arc::new(Disk::new());
        let broker = Arc::new(Broker::private_on(&impatient(), &disk.at().join("broker")).await);
        prepare_intake(&broker).await;
        disk.flush();
        let place = async |_: &mut StdRng| Place::Intake {
            broker: broker.clone(),
            queue: Embedded::within(&disk.at()),
        };
        rounds_on(Some(disk.clone()), "power-intake", count(), place).await;
    });
}

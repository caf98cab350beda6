//! Faults of the embedded queue's files.

use std::time::Duration;

use rand::RngExt as _;

use crate::{
    environment::{EIO, ENOSPC},
    fault::Heal,
    oracle::Disturbance,
    round::{NOTICED, Round},
    subscribers::{Kind, pick},
    world::Place,
};

impl Round<'_> {
    pub(super) fn have_the_disk_fail(&mut self) -> bool {
        if self.has(&Heal::Disk) {
            return false;
        }
        let (error, one_in) =
            (*pick(&[EIO, ENOSPC], &mut self.rng), *pick(&[0, 1, 7, 40], &mut self.rng));
        self.bad_moods(&[Kind::Busy, Kind::Lines, Kind::Doomed]);
        self.world.environment.disk_fails(error, one_in);
        self.lasts(
            Heal::Disk,
            format!("the disk fails with {error}, {one_in} writes between"),
            true,
            4000,
        );
        true
    }

    pub(super) fn lock_the_database(&mut self) -> bool {
        let Place::Embedded(embedded) = &self.world.place else { return false };
        let file = embedded.file();
        let holds = Duration::from_millis(self.rng.random_range(100..3000));
        self.log(&format!("another process locks the database for {holds:?}"));
        // A thread of its own, not a task: while a daemon opens the queue under its lock, the round
        // waits for that lock on the runtime's threads, and a task there could not end the fault.
        std::thread::spawn(move || {
            let Ok(db) = rusqlite::Connection::open(file) else { return };
            let locked = db
                .busy_timeout(Duration::from_secs(5))
                .and_then(|()| db.execute_batch("BEGIN IMMEDIATE"));
            if locked.is_ok() {
                #[allow(
                    clippy::disallowed_methods,
                    reason = "its own thread, and the fault itself"
                )]
                std::thread::sleep(holds); // the drop rolls back
            }
        });
        self.disturbances.push(Disturbance {
            what: "locked".to_owned(),
            whom: None,
            from: self.began,
            to: self.began + holds + NOTICED,
        });
        true
    }
}

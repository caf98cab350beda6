//! Faults of the embedded queue's files.

use std::time::Duration;

use rand::RngExt as _;

use super::store::lock;
use crate::{
    environment::{EIO, ENOSPC},
    fault::Heal,
    oracle::Disturbance,
    round::{NOTICED, Round},
    subscribers::{Kind, pick},
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
        let Some(embedded) = self.world.place.embedded() else { return false };
        let file = embedded.file();
        let holds = Duration::from_millis(self.rng.random_range(100..3000));
        self.log(&format!("another process locks the database for {holds:?}"));
        lock(file, holds);
        self.disturbances.push(Disturbance {
            what: "locked".to_owned(),
            whom: None,
            from: self.began,
            to: self.began + holds + NOTICED,
        });
        true
    }
}

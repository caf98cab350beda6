//! Faults of the configuration: reloads, subscribers that leave it and return, files that are
//! missing or cut.

use std::time::{Duration, Instant, SystemTime};

use rand::RngExt as _;

use super::topology::bind;
use crate::{
    fault::{Heal, Lasting},
    round::{NOTICED, Round},
    subscribers::{Kind, pick},
    support::broker::kill,
    world::Place,
};

/// Missing files are polled for 10 s, each second, before the daemon reads what is
/// left.
const LOOKED_AT_AGAIN: Duration = Duration::from_secs(14);

impl Round<'_> {
    pub(super) fn reload(&mut self) -> bool {
        // An operator who asks for it gets what is there then.
        if self.has(&Heal::Folder) {
            return false;
        }
        self.multiplier = if self.multiplier == 1.5 { 2.0 } else { 1.5 };
        self.guest = self.rng.random_bool(0.5);
        let guest = "\n[[subscriber]]\nname = \"guest\"\nurl = \"http://127.0.0.1:1/\"\nsignatures = []\nretry = { max_attempts = 1 }\n";
        self.world.configure(self.multiplier, if self.guest { guest } else { "" });
        for daemon in self.world.daemons.iter().flatten() {
            kill("-HUP", daemon.pid());
        }
        self.declared = Some(Instant::now());
        self.log("reload");
        true
    }

    /// Its events and retries wait for it. Nothing is published meanwhile: it would not be for this
    /// subscriber.
    pub(super) async fn remove_for_a_while(&mut self) -> bool {
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
        // Events that are not relayed yet are for the subscribers of that time.
        if !self.all_is_relayed().await {
            return false;
        }
        let kind = *pick(&Kind::ALL, &mut self.rng);
        for without in [Some(kind), None] {
            self.world.configure_without(self.multiplier, without);
            // Answered when it is done.
            let url = format!("http://127.0.0.1:{}/api/v1/reload", self.world.port(0));
            let client = reqwest::Client::builder()
                .no_proxy()
                .timeout(Duration::from_secs(30))
                .build()
                .expect("a client");
            let answer = client.post(url).header("content-type", "application/json").send().await;
            if answer.as_ref().is_ok_and(|a| a.status() == 200) {
                // as it should
            } else if self.world.has_ended(0) {
                // It was to die at a step. A subscriber that is not bound gets nothing, so the next
                // one has to be there first.
                self.disturbed("it died", SystemTime::now() - Duration::from_secs(3), NOTICED);
                self.world.spawn(0, None);
                self.world.wait_running(0).await;
            } else {
                self.complaints.push(format!("a reload was answered {answer:?}"));
            }
            self.log(&format!("reloaded without {without:?}"));
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

    pub(super) async fn take_the_folder_away(&mut self) -> bool {
        if self.has(&Heal::Folder) || !self.world.all_run() {
            return false;
        }
        self.world.folder_is_away(true);
        let (what, from) =
            ("the folder with the subscribers is away".to_owned(), SystemTime::now());
        self.log(&what);
        let until = Instant::now() + Duration::from_millis(self.rng.random_range(2500..8000));
        self.lasting.push(Lasting {
            until,
            heal: Heal::Folder,
            what,
            whom: None,
            from,
            disturbs: false,
        });
        if self.rng.random_bool(0.4) {
            // A missing file is polled for some time before it counts as gone: that time has
            // passed, and no subscriber is removed all the same.
            tokio::time::sleep(LOOKED_AT_AGAIN).await; // the fault itself
        }
        true
    }

    /// As something does that copies it slowly.
    pub(super) async fn cut_the_file(&mut self) -> bool {
        // A requested reload reads what is there then: no reload is requested now.
        if self.has(&Heal::Folder) || !self.world.all_run() || !self.reloads_are_done().await {
            return false;
        }
        let keeps = self.rng.random_range(1..self.world.subscribers.len());
        self.log(&format!("the file with the subscribers ends behind {keeps} of them"));
        self.world.file_is_cut(Some(keeps));
        let moment = self.rng.random_range(1500..4500);
        tokio::time::sleep(Duration::from_millis(moment)).await; // the fault itself
        self.world.file_is_cut(None);
        self.log("the file is whole");
        true
    }

    /// Waits for what was asked for by a signal: the daemon takes one after the other.
    async fn reloads_are_done(&self) -> bool {
        let client = reqwest::Client::builder()
            .no_proxy()
            .timeout(Duration::from_secs(30))
            .build()
            .expect("a client");
        for n in 0..self.world.daemons.len() {
            let url = format!("http://127.0.0.1:{}/api/v1/reload", self.world.port(n));
            for _ in 0..2 {
                let answer =
                    client.post(&url).header("content-type", "application/json").send().await;
                if !answer.is_ok_and(|a| a.status() == 200) {
                    return false;
                }
            }
        }
        true
    }
}

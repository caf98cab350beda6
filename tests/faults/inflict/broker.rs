//! Faults of the broker, and of the network between it and the daemons.

use std::time::Duration;

use rand::RngExt as _;

use crate::{
    fault::Heal,
    proxy::{Way, Weather},
    round::{NOTICED, Round, SILENCE_NOTICED},
    subscribers::{Kind, pick},
    support::broker::SETTLING,
};

/// Queues that can be full, and who then has something for them. Not those to which the broker
/// itself hands over: what such a queue has refused, RabbitMQ 3.10 tries again only when a policy
/// changes or the node starts (measured). `check --connect` warns of a limit there.
const FULL: [(&str, &[Kind]); 2] =
    [(r"\.dead$", &[Kind::Doomed, Kind::Picky]), (r"\.sub\.busy$", &[Kind::Busy])];

impl Round<'_> {
    pub(super) fn cut_the_broker_off(&mut self) {
        self.world.network.as_ref().expect("a broker").cut();
        self.log("connections to the broker are cut");
        self.disturbed("cut", self.began, NOTICED);
    }

    pub(super) fn half_close(&mut self) {
        let way = *pick(&[Way::Forth, Way::Back], &mut self.rng);
        self.world.network.as_ref().expect("a broker").half_close(way);
        self.log(&format!("connections to the broker are half closed: {way:?}"));
        self.disturbed("half close", self.began, SILENCE_NOTICED);
    }

    pub(super) fn change_the_weather(&mut self) -> bool {
        if self.has(&Heal::Weather) {
            return false;
        }
        let weather = self.weather();
        self.world.network.as_ref().expect("a broker").weather(weather);
        let longest =
            if weather == Weather::Stalled && self.rng.random_bool(0.2) { 25_000 } else { 5000 };
        self.lasts(Heal::Weather, format!("the network to the broker: {weather:?}"), true, longest);
        true
    }

    pub(super) async fn close_all_connections(&mut self) {
        self.log("close_all_connections");
        self.ctl(&["close_all_connections", "a test"]).await;
        self.disturbed("close_all_connections", self.began, NOTICED);
    }

    pub(super) async fn kill_a_node(&mut self) {
        let which = self.rng.random_range(0..self.world.place.nodes().len());
        if let Some(declared) = self.declared {
            // Anything else that it loses is for `hooktrail repair`.
            tokio::time::sleep(SETTLING.saturating_sub(declared.elapsed())).await;
        }
        self.log(&format!("kill -9 of node {which} of the broker"));
        let without = self.rng.random_range(0..4000);
        let nodes = self.world.place.nodes();
        nodes[which].kill().await;
        if nodes.len() > 1 {
            // The others go on without it for a while.
            tokio::time::sleep(Duration::from_millis(without)).await;
        }
        nodes[which].start().await;
        self.disturbed("broker", self.began, Duration::from_secs(12));
        self.log("the broker is back");
    }

    pub(super) async fn raise_an_alarm(&mut self) -> bool {
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
        true
    }

    pub(super) async fn take_permissions_away(&mut self) -> bool {
        if self.has(&Heal::Permission) || self.has(&Heal::Orphans(Kind::Busy)) {
            return false;
        }
        self.bad_moods(&[Kind::Busy, Kind::Doomed]);
        let nothing = "^$";
        let [configure, write, read] = *pick(
            &[[nothing, nothing, ".*"], [".*", nothing, ".*"], [nothing; 3], [".*", ".*", nothing]],
            &mut self.rng,
        );
        self.ctl(&["set_permissions", "guest", configure, write, read]).await;
        self.lasts(Heal::Permission, format!("permissions {configure} {write} {read}"), true, 4000);
        true
    }

    pub(super) async fn fill_queues(&mut self) -> bool {
        if self.has(&Heal::QueueFull) || self.has(&Heal::DeliveryLimit) {
            return false;
        }
        let (queue, kinds) = *pick(&FULL, &mut self.rng);
        self.bad_moods(kinds);
        self.ctl(&["set_policy", "full", queue, r#"{"max-length":1}"#, "--apply-to", "queues"])
            .await;
        self.lasts(Heal::QueueFull, format!("queues {queue} are full"), true, 4000);
        true
    }

    pub(super) async fn limit_deliveries(&mut self) -> bool {
        if self.has(&Heal::DeliveryLimit) || self.has(&Heal::QueueFull) {
            return false;
        }
        let queues = r"\.sub\.[a-z]*(\.retry)?$";
        self.ctl(&[
            "set_policy",
            "impatient",
            queues,
            r#"{"delivery-limit":3}"#,
            "--apply-to",
            "queues",
        ])
        .await;
        self.lasts(
            Heal::DeliveryLimit,
            "the broker gives up after 3 deliveries".to_owned(),
            true,
            8000,
        );
        true
    }
}

//! Each fault of the catalogue, done to a round.

mod broker;
mod configuration;
mod daemons;
mod disk;
mod receivers;
mod store;
mod topology;

use std::time::SystemTime;

use rand::RngExt as _;

use crate::{
    fault::{Fault, Heal, Lasting},
    round::Round,
    world::Producer,
};

impl Round<'_> {
    /// Whether it was done.
    pub(crate) async fn inflict(&mut self, fault: Fault, producer: &Producer) -> bool {
        let daemon = self.rng.random_range(0..self.world.daemons.len());
        self.began = SystemTime::now();
        match fault {
            Fault::KillDaemon => self.kill_a_daemon(daemon).await,
            Fault::StopDaemon => self.stop_a_daemon(daemon).await,
            Fault::DieAtStep => self.have_it_die_at_a_step(daemon),
            Fault::TakeOver => self.have_another_take_over(daemon).await,
            Fault::Mood => self.bad_mood(),
            Fault::ReceiverCut => return self.cut_a_receiver_off(),
            Fault::ReceiverWeather => return self.change_a_receivers_weather(),
            Fault::Reload => return self.reload(),
            Fault::Clock => return self.set_the_clock(),
            Fault::Cut => self.cut_the_broker_off(),
            Fault::HalfClose => self.half_close(),
            Fault::Weather => return self.change_the_weather(),
            Fault::CloseAllConnections => self.close_all_connections().await,
            Fault::KillBroker => self.kill_a_node().await,
            Fault::Alarm => return self.raise_an_alarm().await,
            Fault::NoPermission => return self.take_permissions_away().await,
            Fault::QueueFull => return self.fill_queues().await,
            Fault::DeliveryLimit => return self.limit_deliveries().await,
            Fault::Foreign => return self.put_foreign_messages_among_retries().await,
            Fault::Orphans => return self.make_orphans().await,
            // An operator gets what is there then.
            Fault::Command if self.has(&Heal::Folder) => return false,
            Fault::Command => self.command(daemon),
            Fault::FolderGone => return self.take_the_folder_away().await,
            Fault::FileCut => return self.cut_the_file().await,
            Fault::LogUnread => return self.leave_the_logs_unread(daemon).await,
            Fault::ExchangeRedeclared => return self.redeclare_exchange().await,
            Fault::QueueUnbound => return self.unbind_queue().await,
            Fault::LevelDeleted => return self.delete_level().await,
            Fault::Removed => return self.remove_for_a_while().await,
            Fault::QueueDeleted => return self.delete_empty_queue(producer).await,
            Fault::DiskFails => return self.have_the_disk_fail(),
            Fault::Locked => return self.lock_the_database(),
            Fault::PowerLoss => return self.lose_power(producer).await,
            Fault::StoreLocked => return self.lock_history(),
            Fault::StoreDiskFails => return self.have_the_stores_disk_fail(),
            Fault::StoreSlow => return self.slow_the_stores_disk_down(),
            Fault::HistoryDeleted => return self.delete_history(),
            Fault::HistoryDamaged => return self.damage_history().await,
            Fault::StoreAway => return self.take_the_store_away().await,
            Fault::HistoryQueueYoung => {
                return self.kill_the_node_while_historys_queue_is_young(producer).await;
            }
        }
        true
    }

    /// Whether queue and daemons are as they should be, whatever the receivers do.
    fn is_quiet(&mut self) -> bool {
        let harmless = |l: &Lasting| {
            matches!(
                l.heal,
                Heal::Mood(_)
                    | Heal::ReceiverWeather(_)
                    | Heal::Clock
                    | Heal::Log
                    | Heal::StoreDisk
                    | Heal::StoreAway
            )
        };
        self.lasting.iter().all(harmless) && self.world.all_run()
    }
}

//! The catalogue: what can be done to a round, and what ends it.

use std::time::{Instant, SystemTime};

use rand::{RngExt as _, rngs::StdRng};

use crate::{
    subscribers::{Kind, pick},
    world::Place,
};

/// A fault that a round can inflict.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    KillDaemon,
    StopDaemon,
    DieAtStep,
    TakeOver,
    Mood,
    ReceiverCut,
    ReceiverWeather,
    Reload,
    Clock,
    /// A command of an operator, while whatever else goes on.
    Command,
    /// A subscriber is taken out of the configuration, and comes back.
    Removed,
    /// The folder that the subscribers are included from is away for some seconds.
    FolderGone,
    /// The file that they are in ends between two of them, for a moment.
    FileCut,
    /// The daemons' logs have no reader.
    LogUnread,
    // The broker and the way to it.
    Cut,
    HalfClose,
    Weather,
    CloseAllConnections,
    KillBroker,
    Alarm,
    NoPermission,
    QueueFull,
    QueueDeleted,
    /// The broker gives up on what was taken and given back three times.
    DeliveryLimit,
    /// Retries of a subscriber come back while its queue is not bound for them.
    Orphans,
    /// Another program puts something into a retry queue.
    Foreign,
    /// A producer deletes its exchange and declares it again, without the bindings.
    ExchangeRedeclared,
    QueueUnbound,
    /// A queue of the ladder is deleted, with the retries in it.
    LevelDeleted,
    // The embedded queue.
    DiskFails,
    Locked,
    /// Daemon, broker and disk lose their power in one moment.
    PowerLoss,
    // What remembers.
    /// Another process locks a file of the store.
    StoreLocked,
    StoreDiskFails,
    StoreSlow,
    /// While the daemon runs.
    HistoryDeleted,
    /// Deleted, emptied, overwritten or cut while the daemon does not run.
    HistoryDamaged,
    /// A file of the store cannot be opened for some seconds.
    StoreAway,
    /// The node is killed when history's queue has just been declared.
    HistoryQueueYoung,
}

impl Fault {
    const COMMON: [Self; 15] = [
        Self::KillDaemon,
        Self::StopDaemon,
        Self::DieAtStep,
        Self::DieAtStep,
        Self::Mood,
        Self::Mood,
        Self::ReceiverCut,
        Self::ReceiverWeather,
        Self::Reload,
        Self::Command,
        Self::Command,
        Self::Removed,
        Self::FolderGone,
        Self::FileCut,
        Self::LogUnread,
    ];
    /// After none of these may anything come again that a subscriber has answered for.
    pub(crate) const CALM: [Self; 19] = [
        Self::StopDaemon,
        Self::StopDaemon,
        Self::Mood,
        Self::Mood,
        Self::ReceiverCut,
        Self::ReceiverWeather,
        Self::Reload,
        Self::Reload,
        Self::Command,
        Self::Removed,
        Self::FolderGone,
        Self::FileCut,
        Self::LogUnread,
        Self::StoreLocked,
        Self::StoreDiskFails,
        Self::StoreSlow,
        Self::HistoryDeleted,
        Self::HistoryDamaged,
        Self::StoreAway,
    ];
    /// Faults of what remembers: a round has one at its begin, and others later.
    const STORE: [Self; 6] = [
        Self::HistoryDamaged,
        Self::StoreAway,
        Self::StoreLocked,
        Self::HistoryDeleted,
        Self::StoreDiskFails,
        Self::StoreSlow,
    ];
    const BROKER: [Self; 20] = [
        Self::TakeOver,
        Self::Clock,
        Self::Cut,
        Self::Cut,
        Self::HalfClose,
        Self::Weather,
        Self::Weather,
        Self::CloseAllConnections,
        Self::Alarm,
        Self::NoPermission,
        Self::QueueFull,
        Self::QueueFull,
        Self::QueueDeleted,
        Self::DeliveryLimit,
        Self::Orphans,
        Self::Foreign,
        Self::Foreign,
        Self::ExchangeRedeclared,
        Self::QueueUnbound,
        Self::LevelDeleted,
    ];
    /// Faults made by others, of queue and configuration. A round begins with two of these, so that
    /// a few rounds have had them all.
    const DEALT: [Self; 6] = [
        Self::ExchangeRedeclared,
        Self::LevelDeleted,
        Self::FolderGone,
        Self::LogUnread,
        Self::QueueUnbound,
        Self::FileCut,
    ];
    const DEALT_EMBEDDED: [Self; 3] = [Self::FolderGone, Self::LogUnread, Self::FileCut];
    const EMBEDDED: [Self; 5] =
        [Self::Clock, Self::DiskFails, Self::DiskFails, Self::Locked, Self::TakeOver];

    const INTAKE: [Self; 12] = [
        Self::Clock,
        Self::DiskFails,
        Self::DiskFails,
        Self::Locked,
        Self::TakeOver,
        Self::Cut,
        Self::Cut,
        Self::HalfClose,
        Self::Weather,
        Self::Weather,
        Self::CloseAllConnections,
        Self::Alarm,
    ];

    /// Of rounds on a disk that can lose its power: what others do to its files outside of a daemon is
    /// not flushed.
    const POWER: [Self; 8] = [
        Self::PowerLoss,
        Self::PowerLoss,
        Self::KillDaemon,
        Self::DieAtStep,
        Self::StopDaemon,
        Self::Mood,
        Self::Reload,
        Self::Command,
    ];

    /// The faults that a round on a disk begins with that can lose its power.
    pub(crate) fn dealt_with_power() -> Vec<Self> {
        vec![Self::PowerLoss]
    }

    pub(crate) fn draw_with_power(rng: &mut StdRng) -> Self {
        *pick(&Self::POWER, rng)
    }

    /// The faults that a round of this seed begins with; `wanted` names others instead.
    pub(crate) fn dealt(place: &Place, calm: bool, seed: u64, wanted: Option<&str>) -> Vec<Self> {
        if let Some(wanted) = wanted {
            let all = || {
                let common = Self::COMMON.into_iter().chain(Self::STORE);
                let more = [Self::KillBroker, Self::HistoryQueueYoung];
                common.chain(Self::BROKER).chain(Self::EMBEDDED).chain(more)
            };
            let named = |name: &str| {
                all()
                    .find(|f| format!("{f:?}") == name)
                    .unwrap_or_else(|| panic!("no fault `{name}`"))
            };
            return wanted.split(',').map(named).collect();
        }
        let (all, first): (&[Self], u64) = match place {
            Place::Embedded(_) | Place::Intake { .. } => (&Self::DEALT_EMBEDDED, 0),
            Place::Broker { .. } if calm => (&Self::DEALT_EMBEDDED, 0),
            Place::Broker { others, .. } if !others.is_empty() => (&Self::DEALT, 4),
            Place::Broker { source_queue: true, .. } => (&Self::DEALT, 2),
            Place::Broker { .. } => (&Self::DEALT, 0),
        };
        let at = |n: u64| {
            all[usize::try_from((2 * seed + first + n) % all.len() as u64).expect("small")]
        };
        let stores = Self::STORE.len() as u64;
        let store = Self::STORE[usize::try_from(seed % stores).expect("small")];
        vec![at(0), at(1), store]
    }

    pub(crate) fn draw(place: &Place, rng: &mut StdRng) -> Self {
        let own: &[Self] = match place {
            Place::Broker { .. } => &Self::BROKER,
            Place::Embedded(_) => &Self::EMBEDDED,
            Place::Intake { .. } => &Self::INTAKE,
        };
        // It takes the longest by far.
        let often = match place.nodes().len() {
            0 => 0.0,
            1 => 0.04,
            _ => 0.3,
        };
        if rng.random_bool(often) {
            let on_a_node = matches!(place, Place::Broker { others, .. } if others.is_empty());
            let young = on_a_node && rng.random_bool(0.4);
            return if young { Self::HistoryQueueYoung } else { Self::KillBroker };
        }
        if rng.random_bool(0.15) {
            return *pick(&Self::STORE, rng);
        }
        if rng.random_bool(0.5) { *pick(&Self::COMMON, rng) } else { *pick(own, rng) }
    }
}

/// The end of a fault that lasts.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Heal {
    Mood(usize),
    ReceiverWeather(usize),
    Weather,
    Clock,
    Alarm,
    Permission,
    QueueFull,
    DeliveryLimit,
    Orphans(Kind),
    Disk,
    Folder,
    Log,
    StoreDisk,
    StoreAway,
}

pub(crate) struct Lasting {
    pub(crate) until: Instant,
    pub(crate) heal: Heal,
    pub(crate) what: String,
    /// The subscriber that it is done to, unless it is done to all.
    pub(crate) whom: Option<Kind>,
    pub(crate) from: SystemTime,
    /// Whether it can be why something is delivered again.
    pub(crate) disturbs: bool,
}

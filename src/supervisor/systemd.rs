//! Tells the service manager how far the daemon is. Outside of systemd it does nothing.
//!
//! The protocol is that of sd_notify(3): datagrams to the socket that `$NOTIFY_SOCKET` names.

use std::{pin::pin, time::Duration};

use sd_notify::NotifyState;
use tokio::{sync::watch, time::MissedTickBehavior};

use crate::supervisor::fleet::Phase;

/// Tells each phase, and that the daemon lives as often as the unit's `WatchdogSec` asks for it. It
/// is a task of the runtime that does the work: when that stands still, the pings end with it.
/// Completes when the last phase is told and none can follow.
pub async fn follow(mut phases: watch::Receiver<Phase>) {
    let mut watchdog = pin!(ping(sd_notify::watchdog_enabled()));
    loop {
        match *phases.borrow_and_update() {
            Phase::Starting => tell(&[NotifyState::Status("waiting for the queue")]),
            Phase::Running => ready(),
            Phase::Draining => stopping(),
        }
        tokio::select! {
            changed = phases.changed() => if changed.is_err() { return },
            () = &mut watchdog => {}
        }
    }
}

/// Started, or done with a reload, whether it changed anything or not.
pub fn ready() {
    tell(&[NotifyState::Ready, NotifyState::Status("delivering")]);
}

/// A reload begins; [`ready`] ends it.
pub fn reloading() {
    match NotifyState::monotonic_usec_now() {
        Ok(now) => tell(&[NotifyState::Reloading, now, NotifyState::Status("reloading")]),
        Err(error) => tracing::debug!(%error, "the service manager is not told of the reload"),
    }
}

/// Nothing new is begun.
pub fn stopping() {
    tell(&[NotifyState::Stopping, NotifyState::Status("stopping: requests in flight finish")]);
}

/// Twice in each period after which the service manager takes the daemon for dead; never where it
/// does not watch.
async fn ping(period: Option<Duration>) {
    let Some(period) = period.filter(|p| !p.is_zero()) else { return std::future::pending().await };
    let mut tick = tokio::time::interval(period / 2);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        tell(&[NotifyState::Watchdog]);
    }
}

fn tell(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::debug!(%error, "the service manager is not told");
    }
}

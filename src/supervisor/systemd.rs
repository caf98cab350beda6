//! Reports the daemon's phase to the service manager. Outside of systemd it does nothing.
//!
//! The protocol is that of sd_notify(3): datagrams to the socket that `$NOTIFY_SOCKET` names.

use std::{pin::pin, time::Duration};

use sd_notify::NotifyState;
use tokio::{sync::watch, time::MissedTickBehavior};

use crate::supervisor::fleet::Phase;

/// Reports each phase, and pings the watchdog as often as the unit's `WatchdogSec` demands. It is a
/// task of the runtime that does the work: when the runtime stands still, the pings end. Completes
/// when the last phase is reported and none can follow.
pub async fn follow(mut phases: watch::Receiver<Phase>) {
    let mut watchdog = pin!(ping(sd_notify::watchdog_enabled()));
    loop {
        match *phases.borrow_and_update() {
            Phase::Starting => notify(&[NotifyState::Status("waiting for the queue")]),
            Phase::Running => ready(),
            Phase::Draining => stopping(),
        }
        tokio::select! {
            changed = phases.changed() => if changed.is_err() { return },
            () = &mut watchdog => {}
        }
    }
}

/// Reports that the start, or a reload, has ended, whether the reload changed anything or not.
pub fn ready() {
    notify(&[NotifyState::Ready, NotifyState::Status("delivering")]);
}

/// Reports that a reload begins; [`ready`] ends it.
pub fn reloading() {
    match NotifyState::monotonic_usec_now() {
        Ok(now) => notify(&[NotifyState::Reloading, now, NotifyState::Status("reloading")]),
        Err(error) => {
            tracing::debug!(%error, "the reload cannot be reported to the service manager")
        }
    }
}

/// Reports that the daemon drains.
pub fn stopping() {
    notify(&[NotifyState::Stopping, NotifyState::Status("stopping: requests in flight finish")]);
}

/// Pings twice in each period after which the service manager takes the daemon for dead; never
/// without a watchdog.
async fn ping(period: Option<Duration>) {
    let Some(period) = period.filter(|p| !p.is_zero()) else { return std::future::pending().await };
    let mut tick = tokio::time::interval(period / 2);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        notify(&[NotifyState::Watchdog]);
    }
}

fn notify(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::debug!(%error, "the phase cannot be reported to the service manager");
    }
}

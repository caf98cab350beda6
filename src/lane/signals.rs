//! The signals that a lane waits for besides its queue and its requests.

use std::time::SystemTime;

use tokio::sync::watch;

use crate::delivery::{Pause, Standing, Standings};

pub(super) fn pause_of<'s>(standings: &'s Standings, subscriber: &str) -> Option<&'s Pause> {
    standings.get(subscriber).and_then(Standing::pause)
}

/// Waits for pause states that are `wanted`, and returns them. Never completes after their writer
/// is gone: the daemon is ending then.
pub(super) async fn wait_for(
    standings: &mut watch::Receiver<Option<Standings>>,
    wanted: impl FnMut(&Option<Standings>) -> bool,
) -> Option<Standings> {
    let found = standings.wait_for(wanted).await.map(|found| found.clone());
    match found {
        Ok(found) => found,
        Err(_) => std::future::pending().await,
    }
}

/// Completes when the value changes. Never completes after its writer is gone.
pub(super) async fn changed<T>(value: &mut watch::Receiver<T>) {
    if value.changed().await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// Completes when the subscriber is paused; returns the pause.
pub(super) async fn paused(
    mut standings: watch::Receiver<Option<Standings>>,
    subscriber: &str,
) -> Pause {
    loop {
        let all = wait_for(&mut standings, |all| {
            all.as_ref().is_some_and(|all| pause_of(all, subscriber).is_some())
        })
        .await;
        if let Some(pause) = all.as_ref().and_then(|all| pause_of(all, subscriber)) {
            return pause.clone();
        }
    }
}

/// Completes when the subscriber is paused, or resumed at another time than `known`.
pub(super) async fn paused_or_resumed(
    mut standings: watch::Receiver<Option<Standings>>,
    subscriber: &str,
    known: Option<SystemTime>,
) {
    let is_news = |all: &Option<Standings>| match all.as_ref().and_then(|all| all.get(subscriber)) {
        Some(Standing::Paused(_)) => true,
        Some(Standing::Resumed { at }) => Some(*at) != known,
        None => false,
    };
    wait_for(&mut standings, is_news).await;
}

/// Completes when the lane is to end, or the fleet is gone.
pub(super) async fn drained(drain: &mut watch::Receiver<bool>) {
    drain.wait_for(|d| *d).await.ok();
}

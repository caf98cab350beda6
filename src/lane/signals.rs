//! The signals that a lane waits for besides its queue and its requests.

use std::time::SystemTime;

use tokio::sync::watch;

use crate::delivery::{Pause, PauseState, PauseStates};

pub(super) fn pause_of<'s>(pause_states: &'s PauseStates, subscriber: &str) -> Option<&'s Pause> {
    pause_states.get(subscriber).and_then(PauseState::pause)
}

/// Waits for pause states that are `wanted`, and returns them. Never completes after their writer
/// is gone: the daemon is ending then.
pub(super) async fn wait_for(
    pause_states: &mut watch::Receiver<Option<PauseStates>>,
    wanted: impl FnMut(&Option<PauseStates>) -> bool,
) -> Option<PauseStates> {
    let found = pause_states.wait_for(wanted).await.map(|found| found.clone());
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
    mut pause_states: watch::Receiver<Option<PauseStates>>,
    subscriber: &str,
) -> Pause {
    loop {
        let all = wait_for(&mut pause_states, |all| {
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
    mut pause_states: watch::Receiver<Option<PauseStates>>,
    subscriber: &str,
    known: Option<SystemTime>,
) {
    let is_news = |all: &Option<PauseStates>| match all.as_ref().and_then(|all| all.get(subscriber))
    {
        Some(PauseState::Paused(_)) => true,
        Some(PauseState::Resumed { at }) => Some(*at) != known,
        None => false,
    };
    wait_for(&mut pause_states, is_news).await;
}

/// Completes when the lane is to end, or the fleet is gone.
pub(super) async fn drained(drain: &mut watch::Receiver<bool>) {
    drain.wait_for(|d| *d).await.ok();
}

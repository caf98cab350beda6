//! What a lane waits for besides its queue and its requests.

use std::{sync::Arc, time::SystemTime};

use tokio::sync::watch;

use crate::{
    config::Subscriber,
    delivery::{Pause, Standing, Standings},
};

pub(super) fn pause_of<'s>(standings: &'s Standings, subscriber: &str) -> Option<&'s Pause> {
    standings.get(subscriber).and_then(Standing::pause)
}

/// What the record says when it says what was waited for. If nobody writes it any more, nobody is
/// left to work for.
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

/// Completes when something else is configured, or wanted. If nobody is left to do that, that is
/// never.
pub(super) async fn changed<T>(what: &mut watch::Receiver<T>) {
    if what.changed().await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// Completes when the subscriber is paused, and says why.
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
pub(super) async fn spoken(
    mut standings: watch::Receiver<Option<Standings>>,
    subscriber: Arc<Subscriber>,
    known: Option<SystemTime>,
) {
    let is_news =
        |all: &Option<Standings>| match all.as_ref().and_then(|all| all.get(&subscriber.name)) {
            Some(Standing::Paused(_)) => true,
            Some(Standing::Resumed { at }) => Some(*at) != known,
            None => false,
        };
    wait_for(&mut standings, is_news).await;
}

/// Completes when the lane is to end. If the sender is gone, nobody is left to work for.
pub(super) async fn drained(drain: &mut watch::Receiver<bool>) {
    drain.wait_for(|d| *d).await.ok();
}

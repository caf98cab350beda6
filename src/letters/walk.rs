//! A walk through dead letters, one at a time, which leaves all of them in their order.

use std::time::SystemTime;

use tokio::sync::watch;

use super::choice::Choice;
use crate::{
    queue::{DeadLetters, Held, QueueError},
    supervisor::{fleet::Phase, signal::Stops},
};

/// Who may end a walk early. It stops between two letters, so that it can requeue in order those that
/// it has passed.
pub trait Stop: Sync {
    fn is_asked(&self) -> bool;

    /// Completes when the walk is to end.
    fn asked(&self) -> impl Future<Output = ()> + Send;
}

/// An operator, by a signal.
impl Stop for Stops {
    fn is_asked(&self) -> bool {
        Self::is_asked(self)
    }

    fn asked(&self) -> impl Future<Output = ()> + Send {
        self.times(1)
    }
}

/// A daemon that drains.
impl Stop for watch::Receiver<Phase> {
    fn is_asked(&self) -> bool {
        *self.borrow() == Phase::Draining
    }

    async fn asked(&self) {
        // An error means that the daemon has ended.
        self.clone().wait_for(|phase| *phase == Phase::Draining).await.ok();
    }
}

/// A letter that was chosen and stays, since it cannot be replayed.
#[derive(Debug)]
pub struct Staying<'h> {
    pub held: &'h Held,
    /// Its number in this walk, and the one that it has afterwards.
    pub number: usize,
    pub left: usize,
    pub why: &'static str,
}

/// Who is told of the steps of a walk.
pub trait Watcher: Send {
    /// A letter was passed, chosen or not.
    fn passed(&mut self) {}

    /// A letter was chosen and stays.
    fn stays(&mut self, _: &Staying<'_>) {}
}

impl Watcher for () {}

/// The result of a walk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Done {
    /// Letters that were replayed or purged; or that would be, where it only counts.
    pub letters: usize,
    /// Letters that were chosen and stay, since they cannot be replayed.
    pub skipped: usize,
    /// Letters that were passed, chosen or not.
    pub passed: usize,
    /// When the latest of the chosen ones died, as far as it is known.
    pub latest: Option<SystemTime>,
}

/// Requeues the letters, also after a walk that failed half-way: otherwise they would change
/// places.
///
/// # Errors
/// The walk had failed, or the queue was lost before it answered.
pub async fn close<T>(
    letters: impl DeadLetters,
    walked: Result<T, QueueError>,
) -> Result<T, QueueError> {
    let closed = letters.close().await;
    let walked = walked?;
    closed?;
    Ok(walked)
}

/// Shows each chosen letter with `show`, which returns false if it wants no more. Returns the number
/// shown, or `None` if it wanted no more before the end.
///
/// # Errors
/// The queue was lost; all letters are still there.
pub async fn each<D: DeadLetters>(
    mut letters: D,
    choice: &mut Choice<'_>,
    stop: &impl Stop,
    mut show: impl FnMut(usize, &Held) -> bool + Send,
) -> Result<Option<usize>, QueueError> {
    let mut shown = 0;
    let walked = async {
        while !stop.is_asked()
            && let Some(held) = letters.next().await?
        {
            if choice.includes(&held) {
                if !show(choice.number, &held) {
                    return Ok(None);
                }
                shown += 1;
            }
        }
        Ok(Some(shown))
    };
    let walked = walked.await;
    close(letters, walked).await
}

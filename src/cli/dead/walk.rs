//! A walk through dead letters, one at a time, which leaves all of them in their order.

use super::choice::Choice;
use crate::{
    cli::failed::Failed,
    queue::{DeadLetters, Held, QueueError},
    supervisor::signal::Stops,
};

/// An error if a walk was interrupted. A walk stops between two letters, so that it can requeue in
/// order those that it has passed by.
pub(super) fn to_its_end(stops: &Stops) -> Result<(), Failed> {
    if stops.is_asked() { Err(Failed::Runtime("interrupted".to_owned())) } else { Ok(()) }
}

/// Requeues the letters, also after a walk that failed half-way: otherwise they would change
/// places.
pub(super) async fn close<T>(
    letters: impl DeadLetters,
    walked: Result<T, QueueError>,
) -> Result<T, Failed> {
    let closed = letters.close().await;
    let walked = walked?;
    closed?;
    Ok(walked)
}

/// Shows each chosen letter with `show`, which returns false if the reader has left. Returns the
/// number shown, or `None` if the reader left early.
pub(super) async fn each<D: DeadLetters>(
    mut letters: D,
    choice: &mut Choice<'_>,
    stops: &Stops,
    mut show: impl FnMut(usize, &Held) -> bool,
) -> Result<Option<usize>, Failed> {
    let mut shown = 0;
    let walked = async {
        while !stops.is_asked()
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
    let shown = close(letters, walked).await?;
    to_its_end(stops)?;
    Ok(shown)
}

/// Does the work to its end, or until the second interrupt.
pub(super) async fn until_second_interrupt<T>(
    stops: &Stops,
    work: impl Future<Output = Result<T, Failed>>,
) -> Result<T, Failed> {
    tokio::select! {
        done = work => done,
        () = stops.times(2) => Err(Failed::Runtime(
            "interrupted twice: nothing is lost, but the order may have changed".to_owned(),
        )),
    }
}

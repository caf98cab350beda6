//! Walks that a signal ends.

use crate::{
    cli::failed::Failed,
    letters::{self, Choice},
    queue::{DeadLetters, Held},
    supervisor::signal::Stops,
};

/// An error if a walk was interrupted. A walk stops between two letters, so that it can requeue in
/// order those that it has passed by.
pub(super) fn to_its_end(stops: &Stops) -> Result<(), Failed> {
    if stops.is_asked() { Err(Failed::Runtime("interrupted".to_owned())) } else { Ok(()) }
}

/// Shows each chosen letter with `show`, which returns false if the reader has left. Returns the
/// number shown, or `None` if the reader left early.
pub(super) async fn each<D: DeadLetters>(
    letters: D,
    choice: &mut Choice<'_>,
    stops: &Stops,
    show: impl FnMut(usize, &Held) -> bool + Send,
) -> Result<Option<usize>, Failed> {
    let shown = letters::each(letters, choice, stops, show).await?;
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

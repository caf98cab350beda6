//! Work that ends although its client leaves.

use std::sync::Arc;

use axum::http::StatusCode;
use tokio::sync::Semaphore;

use super::answer::Refusal;

/// Concurrent requests that are completed even if the client disconnects; further ones are refused.
pub(super) const MOST_TO_THEIR_END: usize = 32;

/// Does the work to its end, even if the client leaves: half of it would be worse.
pub(super) async fn to_its_end<A: Send + 'static>(
    room: &Arc<Semaphore>,
    work: impl Future<Output = Result<A, Refusal>> + Send + 'static,
) -> Result<A, Refusal> {
    let Ok(permit) = room.clone().try_acquire_owned() else {
        return Err(Refusal::busy());
    };
    let work = async move {
        let _permit = permit;
        work.await
    };
    let gave_up = |_| {
        Refusal::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "the work was given up, by a panic or because the daemon ends".to_owned(),
        )
    };
    tokio::spawn(work).await.map_err(gave_up)?
}

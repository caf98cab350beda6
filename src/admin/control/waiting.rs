//! Batches that wait for a retry: listed, and made due now.

use std::sync::Arc;

use super::{Control, queue_fails, report::paused, to_its_end};
use crate::{
    admin::{
        answer::Refusal,
        body::FromBody,
        view::{Retried, RetryNow, State, WaitingBatch, WaitingList},
    },
    clock,
    delivery::BatchId,
    queue::{Hastened, Queue},
    store::Store,
};

impl FromBody for RetryNow {
    /// About 25,000 ids.
    const MAX: usize = 1 << 20;
    const SHAPE: &'static str = "{}, or {\"ids\":[\"…\"]} for some batches, or {\"try_only\":true}";
}

impl<Q: Queue, S: Store> Control<Q, S> {
    /// Lists the waiting batches, the first due first.
    pub(in crate::admin) async fn waiting(
        self: Arc<Self>,
        name: String,
        limit: usize,
    ) -> Result<WaitingList, Refusal> {
        let room = self.to_their_end.clone();
        to_its_end(&room, async move { self.listed(&name, limit).await }).await
    }

    async fn listed(&self, name: &str, limit: usize) -> Result<WaitingList, Refusal> {
        self.subscriber(name)?;
        let _one = self.retrying.try_lock().map_err(|_| busy())?;
        let found = self.queue.waiting(name).await.map_err(|e| queue_fails(&e))?;
        let shown = found.batches.iter().take(limit);
        let batches = shown.enumerate().map(|(n, waiting)| WaitingBatch::new(n + 1, waiting));
        Ok(WaitingList {
            subscriber: name.to_owned(),
            waiting: found.batches.len(),
            unseen: found.unseen,
            batches: batches.collect(),
        })
    }

    /// Makes retries due now. The operator believes that the receiver works again, so one batch is
    /// tried in spite of an open circuit or a hold, but not of a pause. Without a due batch there
    /// is nothing to try.
    pub(in crate::admin) async fn retry_now(
        self: Arc<Self>,
        name: String,
        which: RetryNow,
    ) -> Result<Retried, Refusal> {
        let room = self.to_their_end.clone();
        to_its_end(&room, async move { self.hastened(&name, which).await }).await
    }

    async fn hastened(&self, name: &str, which: RetryNow) -> Result<Retried, Refusal> {
        self.subscriber(name)?;
        let view = self.board.view(name, clock::instant(), clock::now());
        let state = view.as_ref().map_or(State::Starting, |view| State::from(&view.state));
        let paused = view.as_ref().and_then(paused);
        let done = match which.ids {
            Some(_) if which.try_only => {
                return Err(Refusal::field("try_only", "excludes `ids`"));
            }
            Some(ids) if ids.is_empty() => Hastened::default(),
            None if which.try_only => Hastened::default(),
            ids => {
                let _one = self.retrying.try_lock().map_err(|_| busy())?;
                let ids = ids.map(|ids| ids.into_iter().map(BatchId::from).collect());
                self.queue.hasten(name, ids).await.map_err(|e| queue_fails(&e))?
            }
        };
        let tried_now = (which.try_only || done.moved + done.due > 0) && self.waits(name);
        if tried_now {
            self.board.request_retry(name);
        }
        Ok(Retried::new(name, done, (state, paused), tried_now))
    }
}

/// Refuses a second request: on RabbitMQ the first one holds queues for seconds, and requests must
/// not wait in a line.
fn busy() -> Refusal {
    Refusal::unavailable("another request reads the batches that wait; try again".to_owned())
}

//! What waits for its next attempt: listed, and sent now.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::{Asked, Control, queue_fails};
use crate::{
    admin::Refusal,
    queue::{Hastened, Queue},
};

/// Batches in one answer, unless fewer are asked for.
const MAX_LISTED: usize = 100;

/// Which batches: all of them, unless some are named.
#[derive(Debug, Default, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct WhichRetries {
    ids: Option<BTreeSet<String>>,
}

impl Asked for WhichRetries {
    /// About 25,000 ids.
    const MAX: usize = 1 << 20;
    const SHAPE: &'static str = "{}, or {\"ids\":[\"…\"]} for some batches";
}

impl<Q: Queue> Control<Q> {
    /// The first due first.
    pub(super) async fn waiting(&self, name: &str, limit: Option<usize>) -> Result<Value, Refusal> {
        self.subscriber(name)?;
        let _one = self.retrying.try_lock().map_err(|_| busy())?;
        let found = self.queue.waiting(name).await.map_err(|e| queue_fails(&e))?;
        let shown = found.batches.iter().take(limit.unwrap_or(MAX_LISTED).min(MAX_LISTED));
        let shown: Vec<Value> = shown.enumerate().map(|(n, waiting)| waiting.as_json(n + 1)).collect();
        Ok(json!({ "subscriber": name, "waiting": found.batches.len(), "unseen": found.unseen, "batches": shown }))
    }

    /// Who wants it now means that the receiver is there again: what keeps it from being asked ends, but for a pause.
    pub(super) async fn retry_now(&self, name: &str, which: WhichRetries) -> Result<Value, Refusal> {
        self.subscriber(name)?;
        let (state, tried_now) = (self.state(name), self.waits(name));
        let done = match which.ids {
            Some(ids) if ids.is_empty() => Hastened::default(),
            ids => {
                let _one = self.retrying.try_lock().map_err(|_| busy())?;
                self.queue.hasten(name, ids).await.map_err(|e| queue_fails(&e))?
            }
        };
        if tried_now {
            self.board.try_now(name);
        }
        Ok(json!({
            "subscriber": name, "moved": done.moved, "already_due": done.due, "not_found": done.missing, "unseen": done.unseen,
            "state": state, "tried_now": tried_now,
        }))
    }
}

/// On RabbitMQ a look holds queues for seconds, so those who ask meanwhile are not kept waiting in a line.
fn busy() -> Refusal {
    Refusal::unavailable("another request looks at what waits for its next attempt; try again".to_owned())
}

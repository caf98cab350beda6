//! Queues that cannot be consumed, and how that is tried.

use std::time::Duration;

use lapin::{
    options::{BasicConsumeOptions, BasicQosOptions},
    types::FieldTable,
};

use super::{
    broker_error::{BrokerError, INTERNAL_ERROR, answer},
    pool::{Lease, Quarantine},
    shared::Shared,
};
use crate::{policy::retry::Backoff, queue::QueueError};

/// A queue that cannot be consumed.
#[derive(Debug)]
pub(super) struct Unusable {
    pub(super) queue: String,
    pub(super) why: BrokerError,
}

impl Unusable {
    /// Whether the broker cannot use the queue any more. It then closes the whole connection of a
    /// consumer, at once or after a minute without an answer.
    pub(super) fn is_broken(&self) -> bool {
        self.why.silent || self.why.code == Some(INTERNAL_ERROR)
    }

    pub(super) fn into_error(self, subscriber: &str) -> QueueError {
        let remedy = if self.is_broken() {
            format!(
                "; if that stays so, the broker has lost the use of it, and `hooktrail repair {subscriber}` redeclares it"
            )
        } else {
            String::new()
        };
        QueueError::new(format!("queue `{}` cannot be consumed: {}{remedy}", self.queue, self.why))
    }
}

/// Tries whether a queue can be consumed; takes no message.
pub(super) async fn try_consume(lease: &Lease, queue: &str) -> Result<(), Unusable> {
    let consume = async {
        lease.channel.basic_qos(1, BasicQosOptions::default()).await?;
        // Held until the channel is closed: dropped before, it is cancelled, and a channel that
        // closes takes that for an error.
        let _consumer = lease
            .channel
            .basic_consume(
                queue.into(),
                "".into(),
                BasicConsumeOptions::default(),
                FieldTable::default(),
            )
            .await?;
        lease.channel.close(200, "tried".into()).await
    };
    answer(consume).await.map_err(|why| Unusable { queue: queue.to_owned(), why })
}

/// Tries on a connection of its own whether a queue can be consumed. It counts as broken if that
/// fails twice: a queue whose process is being restarted does not.
pub(super) async fn usable(
    shared: &Shared,
    queue: &str,
) -> Result<Result<(), Unusable>, QueueError> {
    let mut waits = Backoff::new(Duration::from_millis(500), Duration::from_secs(1));
    let mut tries = 2;
    loop {
        tries -= 1;
        match try_once(shared.consuming.quarantine().await?, queue).await? {
            Err(e) if e.is_broken() && tries > 0 => tokio::time::sleep(waits.grow()).await,
            tried => return Ok(tried),
        }
    }
}

/// Tries once whether a queue can be consumed, and closes the connection.
pub(super) async fn try_once(
    connection: Quarantine,
    queue: &str,
) -> Result<Result<(), Unusable>, QueueError> {
    let lease = connection.lease().await?;
    let tried = try_consume(&lease, queue).await;
    // A broken queue has ended it, or holds up its end.
    if tried.is_ok() {
        connection.close().await;
    }
    Ok(tried)
}

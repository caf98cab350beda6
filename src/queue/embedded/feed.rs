//! The log's events, as they are handed to history.

use std::time::SystemTime;

use tokio::sync::watch;

use super::{
    EmbeddedQueue,
    history::{HistoryPosition, Log},
};
use crate::{
    queue::{GROUP_BYTES, HistorySource, HistoryStart, QueueError},
    store::{EventLog as _, EventNumber, Gap, NewRow},
};

/// The source of history. Nothing of the log changes by it but how far history has come.
#[derive(Debug)]
pub struct History {
    queue: EmbeddedQueue,
    position: HistoryPosition,
    changes: watch::Receiver<u64>,
    /// `None` while a thread reads it, and after a `take` that was dropped meanwhile.
    log: Option<Log>,
    /// The last event that was taken, and its time.
    taken: EventNumber,
    at: SystemTime,
    gap: Option<Gap>,
}

impl History {
    pub(super) fn open(queue: &EmbeddedQueue, start: &HistoryStart) -> Self {
        let (taken, at) = start.last.unwrap_or((EventNumber(0), SystemTime::UNIX_EPOCH));
        let position = queue.history_position();
        position.set(taken);
        let changes = queue.changes();
        Self { queue: queue.clone(), position, changes, log: None, taken, at, gap: None }
    }

    /// Reads on a thread that may wait for the disk.
    async fn read(&mut self, max: usize) -> Result<Vec<NewRow>, QueueError> {
        let (queue, log, taken) = (self.queue.clone(), self.log.take(), self.taken);
        let read = move || {
            let mut log = match log {
                Some(log) => log,
                None => queue.event_log()?,
            };
            let rows = log.after(taken, max, GROUP_BYTES);
            Ok::<_, QueueError>((rows, log))
        };
        let read = tokio::task::spawn_blocking(read).await;
        let (rows, log) = read.map_err(|e| QueueError::new(e.to_string()))??;
        let rows = rows.map_err(|e| QueueError::new(e.to_string()))?;
        // The log alone does not know when the last event before the gap was.
        self.gap = log.gap().map(|gap| Gap { from: gap.from.max(self.at), ..gap });
        self.log = Some(log);
        Ok(rows)
    }
}

impl HistorySource for History {
    async fn take(&mut self, into: &mut Vec<NewRow>, max: usize) -> Result<(), QueueError> {
        loop {
            // Before the read: a commit meanwhile must wake the wait below.
            self.changes.borrow_and_update();
            let rows = self.read(max).await?;
            if let Some((last, at)) = rows.last().and_then(|row| Some((row.number?, row.at))) {
                (self.taken, self.at) = (last, at);
                into.extend(rows);
                return Ok(());
            }
            if self.changes.changed().await.is_err() {
                return Err(QueueError::new("the embedded queue was closed"));
            }
        }
    }

    async fn stored(&mut self) -> Result<(), QueueError> {
        self.position.set(self.taken);
        Ok(())
    }

    fn gaps(&mut self) -> Vec<Gap> {
        self.gap.take().into_iter().collect()
    }

    async fn close(self) {}
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::queue::{
        Queue as _,
        embedded::tests::{config, publish, subscribers},
    };

    #[tokio::test]
    async fn every_event_is_handed_over_once_and_again_only_from_where_history_is() {
        let dir = tempfile::tempdir().expect("a directory");
        let mut config = config(&dir, Duration::ZERO);
        config.history = Some(crate::config::HistoryConfig {
            retention: Duration::MAX,
            max_bytes: 1 << 30,
            bodies: true,
        });
        let queue = EmbeddedQueue::for_daemon(&config).expect("opens");
        queue.prepare(&subscribers(&[("a", "x")])).await.expect("prepares");
        let (_stop, stopping) = watch::channel(false);
        let background = queue.background(watch::channel(subscribers(&[("a", "x")])).1, stopping);
        let test = async {
            publish(&queue, "x", 3).await;
            publish(&queue, "unmatched", 1).await;
            let start = HistoryStart { store: None, last: None, known_until: None };
            let mut source = queue.history(start).await.expect("opens");
            let mut taken = Vec::new();
            source.take(&mut taken, 2).await.expect("takes");
            source.stored().await.expect("stores");
            source.take(&mut taken, 10).await.expect("takes");
            let types: Vec<&str> = taken.iter().map(|row| row.event_type.as_str()).collect();
            assert_eq!(types, ["x", "x", "x", "unmatched"]);
            // It waits, and is dropped while it does.
            let waits = source.take(&mut taken, 10);
            tokio::select! {
                biased;
                _ = waits => panic!("there is nothing"),
                () = tokio::task::yield_now() => {}
            }
            let (more, ()) = tokio::join!(source.take(&mut taken, 10), async {
                drop(publish(&queue, "x", 1).await)
            });
            more.expect("takes");
            assert_eq!(taken.len(), 5);
            let last = taken[1].number.map(|number| (number, taken[1].at));
            let mut again = queue
                .history(HistoryStart { store: None, last, known_until: None })
                .await
                .expect("opens");
            let mut rows = Vec::new();
            again.take(&mut rows, 10).await.expect("takes");
            assert_eq!(rows, taken[2..], "from where history is");
            assert!(again.gaps().is_empty());
        };
        tokio::select! {
            () = test => {}
            () = background => panic!("it ended"),
        }
    }
}

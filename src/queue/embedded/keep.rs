//! Stores how far the lanes are: of all of them in one transaction, a few times a second.
//!
//! What a lane has delivered is settled in memory first. Who is killed meanwhile delivers that again,
//! as what was in flight, and under the same batch ids; nothing else waits for the write.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use rusqlite::Connection;
use tokio::{
    sync::{Mutex as AsyncMutex, Notify},
    time::{sleep, sleep_until},
};

use super::{
    EmbeddedQueue,
    consumer::{Position, Reached, Shared},
    store::Store,
};
use crate::{
    clock,
    policy::retry::Backoff,
    queue::QueueError,
    telemetry::outage::{News, Outage},
};

/// The shortest time between two writes.
const INTERVAL: Duration = Duration::from_millis(250);

/// Time between two writes for the lanes that had nothing to settle.
const IDLE_INTERVAL: Duration = Duration::from_secs(5);

/// Lanes in one transaction: no other waits long behind them.
const STEP: usize = 500;

#[derive(Debug)]
pub(super) struct Keeper {
    store: Store,
    /// The lanes that have something to store, by their addresses.
    lanes: Mutex<HashMap<usize, Arc<Shared>>>,
    /// Held over a write: two that each hold some lanes would wait for each other.
    storing: AsyncMutex<()>,
    /// Something writes for the lanes, and the last write has not failed.
    is_writing: AtomicBool,
    news: Notify,
}

impl Keeper {
    pub(super) fn new(store: Store) -> Self {
        Self {
            store,
            lanes: Mutex::default(),
            storing: AsyncMutex::default(),
            is_writing: AtomicBool::default(),
            news: Notify::new(),
        }
    }

    fn lanes(&self) -> MutexGuard<'_, HashMap<usize, Arc<Shared>>> {
        self.lanes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Settles in memory, to be stored soon. False, and nothing is settled, while nothing stores it.
    pub(super) fn settle(
        &self,
        lane: &Arc<Shared>,
        settle: impl FnOnce(&mut Position<'_>),
    ) -> bool {
        if !self.is_writing.load(Ordering::Acquire) {
            return false;
        }
        let mut position = lane.position();
        settle(&mut position);
        let is_known = position.is_unstored();
        position.not_stored();
        drop(position);
        if !is_known {
            self.add(lane.clone());
        }
        true
    }

    fn add(&self, lane: Arc<Shared>) {
        self.lanes().insert(Arc::as_ptr(&lane).addr(), lane);
        self.news.notify_one();
    }

    /// Stores how far all lanes are.
    pub(super) async fn store_all(&self) -> Result<(), QueueError> {
        let lanes: Vec<_> = self.lanes().values().cloned().collect();
        for some in lanes.chunks(STEP) {
            self.store(some).await?;
        }
        Ok(())
    }

    /// Stores how far these lanes are.
    pub(super) async fn store(&self, lanes: &[Arc<Shared>]) -> Result<(), QueueError> {
        let _storing = self.storing.lock().await;
        let mut writing = Vec::with_capacity(lanes.len());
        let mut stored: Vec<(&Arc<Shared>, Reached)> = Vec::new();
        for lane in lanes {
            writing.push(lane.writing.lock().await);
            stored.extend(lane.position().store_now().map(|reached| (lane, reached)));
        }
        let rows: Vec<_> = stored
            .iter()
            .map(|(lane, reached)| (lane.subscriber.clone(), reached.clone()))
            .collect();
        let write = move |db: &Connection| {
            rows.iter().try_for_each(|(subscriber, reached)| reached.store(db, subscriber))
        };
        let written = if stored.is_empty() { Ok(()) } else { self.store.write(write).await };
        match written {
            Ok(()) => {
                stored.into_iter().for_each(|(lane, reached)| lane.position().stored(reached));
                let mut known = self.lanes();
                // What was settled meanwhile is for the next write.
                for lane in lanes.iter().filter(|lane| !lane.position().is_unstored()) {
                    known.remove(&Arc::as_ptr(lane).addr());
                }
                if !known.is_empty() {
                    self.news.notify_one();
                }
                Ok(())
            }
            Err(e) => {
                for (lane, _) in stored {
                    let mut position = lane.position();
                    position.not_stored();
                    position.refuse(e.to_string());
                    drop(position);
                    lane.wake();
                    self.add(lane.clone());
                }
                Err(QueueError::unwritable(e.to_string()))
            }
        }
    }
}

/// While it lasts lanes leave it to the keeper to store how far they are.
struct Writing<'k>(&'k Keeper);

impl<'k> Writing<'k> {
    fn begin(keeper: &'k Keeper) -> Self {
        keeper.is_writing.store(true, Ordering::Release);
        Self(keeper)
    }
}

impl Drop for Writing<'_> {
    fn drop(&mut self) {
        self.0.is_writing.store(false, Ordering::Release);
    }
}

impl EmbeddedQueue {
    /// Stores how far the lanes are, until it is dropped.
    pub(super) async fn keep_cursors(&self) {
        let keeper = &self.0.keeper;
        let (mut waits, mut outage) = (Backoff::new(INTERVAL, IDLE_INTERVAL), Outage::default());
        let (mut idle_at, mut idle_kept) = (clock::instant() + IDLE_INTERVAL, None);
        let mut writing = None;
        loop {
            writing.get_or_insert_with(|| Writing::begin(keeper));
            tokio::select! {
                () = keeper.news.notified() => {}
                () = sleep_until(idle_at.into()) => {
                    idle_kept = self.add_idle(idle_kept);
                    idle_at = clock::instant() + IDLE_INTERVAL;
                }
            }
            while let Err(e) = keeper.store_all().await {
                // From now on a lane waits until its own settlement is stored, and stops if it is not.
                writing = None;
                if outage.failed(&e.to_string()) == News::First {
                    tracing::warn!(error = %e, "what was delivered last cannot be recorded, and would be delivered again after a crash; trying again");
                }
                sleep(waits.grow()).await;
            }
            waits.reset();
            if outage.end() {
                tracing::info!("what was delivered is recorded again");
            }
            sleep(INTERVAL).await;
        }
    }

    /// Adds the lanes that had nothing to settle and have read on, so that the log can be trimmed;
    /// none if there has been no progress since all were added. Returns the progress now, if all are.
    pub(super) fn add_idle(&self, kept: Option<(i64, u64)>) -> Option<(i64, u64)> {
        let progress = self.0.head.progress();
        if kept == Some(progress) {
            return kept;
        }
        let (idle, all) = self.0.head.idle();
        for lane in idle {
            lane.position().not_stored();
            self.0.keeper.add(lane);
        }
        all.then_some(progress)
    }

    /// Stores how far earlier sessions of a subscriber were.
    pub(super) async fn keep_of(&self, subscriber: &str) -> Result<(), QueueError> {
        let keeper = &self.0.keeper;
        let lanes: Vec<_> = keeper
            .lanes()
            .values()
            .filter(|lane| lane.subscriber.as_str() == subscriber)
            .cloned()
            .collect();
        keeper.store(&lanes).await
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::queue::{
        Queue as _, SettleError, Settlement, Settler as _, Source as _,
        embedded::{
            backlogs,
            head::tests::{running, take, wait_at_the_end},
            tests::{WINDOW, config, publish, subscribers, until},
        },
    };

    /// The cursors that are stored.
    async fn cursors(queue: &EmbeddedQueue) -> Vec<i64> {
        let read = |db: &Connection| {
            let mut query = db.prepare("SELECT after FROM segment ORDER BY subscriber")?;
            query.query_map([], |r| r.get(0))?.collect()
        };
        queue.store().read(read).await.expect("reads")
    }

    #[tokio::test]
    async fn what_many_lanes_deliver_is_stored_by_a_few_writes() {
        let dir = tempfile::tempdir().expect("a directory");
        let names: Vec<String> = (0..100).map(|n| format!("s{n:02}")).collect();
        let all = subscribers(&names.iter().map(|name| (&**name, "x")).collect::<Vec<_>>());
        let (queue, _stop) = running(&dir, &all);
        queue.prepare(&all).await.expect("prepares");
        let mut lanes = Vec::new();
        for subscriber in &*all {
            lanes.push(queue.open(subscriber, WINDOW).await.expect("opens"));
        }
        publish(&queue, "x", 4).await;
        let mut receipts = Vec::new();
        for (source, settler) in &mut lanes {
            let mut of_it = Vec::new();
            while of_it.len() < 4 {
                of_it.extend(take(source).await);
            }
            receipts.push((settler, of_it));
        }
        let commits = queue.store().commits();
        let before = *commits.borrow();
        for n in [3, 1, 2, 0] {
            for (settler, of_it) in &receipts {
                let delivered = settler.settle(vec![of_it[n]], Settlement::Delivered);
                delivered.await.expect("settles");
            }
        }
        until("all is stored", async || cursors(&queue).await == [4; 100]).await;
        let writes = *commits.borrow() - before;
        assert!(writes < 20, "{writes} for 400 settlements");
        let ahead = "SELECT count(*) FROM ahead";
        let ahead = queue.store().read(|db| db.query_row(ahead, [], |r| r.get::<_, u32>(0)));
        assert_eq!(ahead.await.expect("counts"), 0);
    }

    #[tokio::test]
    async fn what_was_delivered_is_not_taken_again_by_the_next_session_or_counted() {
        let dir = tempfile::tempdir().expect("a directory");
        let a = subscribers(&[("a", "x")]);
        let (queue, _stop) = running(&dir, &a);
        queue.prepare(&a).await.expect("prepares");
        publish(&queue, "x", 60).await;
        let mut left = 60;
        for _ in 0..20 {
            let (mut source, settler) = queue.open(&a[0], WINDOW).await.expect("opens");
            let receipts = take(&mut source).await;
            assert_eq!(receipts.len(), left);
            // Not the first one: what is stored is not only the cursor.
            let delivered = vec![receipts[left - 1], receipts[left / 2], receipts[1]];
            settler.settle(delivered, Settlement::Delivered).await.expect("settles");
            left -= 3;
            if left < 4 {
                break;
            }
            drop((source, settler));
        }
        let name = crate::delivery::SubscriberName::from("a");
        let depths = queue.depths(&a).await.expect("counts");
        assert_eq!(depths.subscribers[&name].events as usize, left);
    }

    #[tokio::test]
    async fn while_nothing_can_be_stored_a_settlement_fails_and_afterwards_all_of_it_is_stored() {
        let dir = tempfile::tempdir().expect("a directory");
        let a = subscribers(&[("a", "x")]);
        let (queue, _stop) = running(&dir, &a);
        queue.prepare(&a).await.expect("prepares");
        let (mut source, settler) = queue.open(&a[0], WINDOW).await.expect("opens");
        publish(&queue, "x", 4).await;
        let mut receipts = Vec::new();
        while receipts.len() < 4 {
            receipts.extend(take(&mut source).await);
        }
        wait_at_the_end(&queue, "a", &mut source).await;
        let refuse = "CREATE TRIGGER refuse BEFORE UPDATE ON segment BEGIN SELECT RAISE(ABORT, 'not now'); END";
        queue.store().write(|db| db.execute_batch(refuse)).await.expect("writes");
        settler
            .settle(vec![receipts[0]], Settlement::Delivered)
            .await
            .expect("is settled in memory");
        until("that was tried", async || !queue.0.keeper.is_writing.load(Ordering::Acquire)).await;
        let second = settler.settle(vec![receipts[1]], Settlement::Delivered).await;
        assert!(matches!(second, Err(SettleError::Unconfirmed(_))), "{second:?}");
        let ended = source.take(&mut Vec::new(), 100).await.expect_err("nothing more is taken");
        assert!(ended.is_unwritable(), "{ended}");
        assert_eq!(cursors(&queue).await, [0]);
        queue.store().write(|db| db.execute_batch("DROP TRIGGER refuse")).await.expect("writes");
        until("the first is stored", async || cursors(&queue).await == [1]).await;
        settler.settle(receipts[1..].to_vec(), Settlement::Delivered).await.expect("settles");
        until("all is stored", async || cursors(&queue).await == [4]).await;
    }

    #[tokio::test]
    async fn a_queue_that_is_closed_has_stored_all() {
        let dir = tempfile::tempdir().expect("a directory");
        let a = subscribers(&[("a", "x")]);
        let (queue, stop) = running(&dir, &a);
        queue.prepare(&a).await.expect("prepares");
        let (mut source, settler) = queue.open(&a[0], WINDOW).await.expect("opens");
        publish(&queue, "x", 3).await;
        let receipts = take(&mut source).await;
        until("it is written periodically", async || {
            queue.0.keeper.is_writing.load(Ordering::Acquire)
        })
        .await;
        settler.settle(receipts[..1].to_vec(), Settlement::Delivered).await.expect("settles");
        settler.settle(receipts[2..].to_vec(), Settlement::Delivered).await.expect("settles");
        stop.send_replace(true);
        queue.close().await;
        let again = EmbeddedQueue::existing(&config(&dir, Duration::ZERO)).expect("opens");
        let left = again.store().read(|db| backlogs(db, &BTreeMap::new())).await.expect("counts");
        assert_eq!(left, [("a".into(), 1)]);
    }
}

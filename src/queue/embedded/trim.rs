//! Deletes events that are older than the retention, and that neither a subscriber nor history
//! needs.

use std::{
    sync::PoisonError,
    time::{Duration, SystemTime},
};

use rusqlite::{Connection, params};

use super::{
    EmbeddedQueue,
    history::{NOBODY, TakenTo, Untaken, first_untaken, next_run},
    millis,
};
use crate::{
    clock,
    queue::QueueError,
    telemetry::outage::{News, Outage},
};

/// Time between two rounds.
const TRIM_INTERVAL: Duration = Duration::from_secs(60);

/// Events deleted in one transaction: few, so that no other waits long behind them.
const TRIM_STEP: u32 = 500;

/// What running replays have still to read of the log.
#[derive(Debug, Default)]
pub(super) struct Replayed {
    /// The last answer to where they are.
    known: Option<Option<i64>>,
    untaken: Untaken,
}

impl EmbeddedQueue {
    pub(super) async fn trim_periodically(&self) {
        let mut outage = Outage::default();
        loop {
            match self.trim().await {
                Ok(()) => drop(outage.end()),
                Err(e) if outage.failed(&e.to_string()) == News::First => {
                    tracing::warn!(error = %e, "delivered events cannot be deleted; trying again")
                }
                Err(_) => {}
            }
            tokio::time::sleep(TRIM_INTERVAL).await;
        }
    }

    pub(super) async fn trim(&self) -> Result<(), QueueError> {
        let now = clock::now();
        let before = |age| millis(now.checked_sub(age).unwrap_or(SystemTime::UNIX_EPOCH));
        let old = before(self.0.retention);
        let history = self.0.history.map(|history| history.retention);
        let old_unmatched = before(history.unwrap_or_default().min(self.0.retention));
        let oldest_kept = old.max(old_unmatched);
        let upto = self.taken_by_history(oldest_kept).await?;
        let upto = upto.min(self.read_by_replays(oldest_kept).await?);
        for (step, old) in [(settled as Step, old), (unmatched as Step, old_unmatched)] {
            while self.store().write(move |db| step(db, upto, old)).await? == TRIM_STEP as usize {}
        }
        Ok(())
    }

    /// The number of the last event that history has taken, or cannot wait for any more.
    async fn taken_by_history(&self, old: i64) -> Result<i64, QueueError> {
        let Some(history) = self.0.history else { return Ok(i64::MAX) };
        let taken = self.0.history_position.get();
        let taken_to = match taken {
            TakenTo::Off => return Ok(i64::MAX),
            TakenTo::Unknown => 0,
            TakenTo::Event(number) => number,
        };
        let mut untaken = self.0.untaken.lock().await;
        let first = self.store().read_long(move |db| first_untaken(db, taken_to)).await?;
        // Nothing is counted in the usual case, where history waits for no old event.
        let Some((position, _)) = first.filter(|(_, at)| *at < old) else {
            untaken.taken(first.map_or(i64::MAX, |(position, _)| position));
            untaken.lose(taken_to, None);
            return Ok(first.map_or(i64::MAX, |(position, _)| position));
        };
        let mut after = untaken.taken(position);
        let next = |after| self.store().read_long(move |db| next_run(db, after, i64::MAX));
        while let Some(run) = next(after).await? {
            untaken.add(run);
            after = run.0;
        }
        let upto = untaken.floor(position, history.max_bytes);
        // As long as it is unknown how far history is, it is not behind. That it may be at the begin
        // of the log deletes nothing that would be kept if it were further.
        if taken != TakenTo::Unknown {
            untaken.lose(taken_to, (upto > position).then_some(upto));
        }
        Ok(upto)
    }

    /// The number of the last event that no running replay has still to read, or that is too much to
    /// be kept for one: beyond the retention at most `max_bytes` are.
    async fn read_by_replays(&self, old: i64) -> Result<i64, QueueError> {
        let floor = self.0.replay_floor.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let (Some(history), Some(floor)) = (self.0.history, floor) else { return Ok(i64::MAX) };
        let mut replayed = self.0.replayed.lock().await;
        match floor.ask().await {
            Ok(floor) => replayed.known = Some(floor.map(|number| number.0)),
            // What was known holds; before, there may be replays from the begin on.
            Err(e) => tracing::debug!(error = %e, "it is not known what replays still read"),
        }
        let Some(floor) = replayed.known.unwrap_or(Some(0)) else {
            replayed.untaken = Untaken::default();
            return Ok(i64::MAX);
        };
        let mut after = replayed.untaken.taken(floor);
        let next = |after| self.store().read_long(move |db| next_run(db, after, old));
        while let Some(run) = next(after).await? {
            replayed.untaken.add(run);
            after = run.0;
        }
        Ok(replayed.untaken.floor(floor, history.max_bytes))
    }
}

type Step = fn(&Connection, i64, i64) -> rusqlite::Result<usize>;

/// Deletes events that all subscribers have settled.
fn settled(db: &Connection, upto: i64, old: i64) -> rusqlite::Result<usize> {
    // An event without a segment is not needed by any subscriber.
    let done: Option<i64> = db.query_row("SELECT min(after) FROM segment", [], |r| r.get(0))?;
    // Reads no more than it may delete: many events may be kept, and writers wait meanwhile.
    let mut delete = db.prepare_cached(
        "DELETE FROM event WHERE seq IN \
         (SELECT seq FROM (SELECT seq, at FROM event WHERE seq <= ?1 ORDER BY seq LIMIT ?3) WHERE at < ?2)",
    )?;
    delete.execute(params![done.unwrap_or(i64::MAX).min(upto), old, TRIM_STEP])
}

/// Deletes events that no subscriber was to get, whatever the others still wait for: a paused
/// subscriber keeps its own backlog, not what history alone has.
fn unmatched(db: &Connection, upto: i64, old: i64) -> rusqlite::Result<usize> {
    let mut delete = db.prepare_cached(
        "DELETE FROM event WHERE seq IN \
         (SELECT seq FROM (SELECT seq, at FROM event INDEXED BY event_unmatched \
          WHERE only_for = '' AND seq <= ?1 ORDER BY seq LIMIT ?3) WHERE at < ?2)",
    )?;
    debug_assert_eq!(NOBODY, "", "the index is of those");
    delete.execute(params![upto, old, TRIM_STEP])
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::{
        config::{EmbeddedConfig, HistoryConfig},
        delivery::SubscriberName,
        queue::{
            NewEvent, Published, Queue as _, ReplayFloor, Settlement, Settler as _,
            embedded::{
                backlogs,
                tests::{WINDOW, config, publish, stored, subscribers, take, until},
            },
        },
        store::{EventLog as _, EventNumber, StoreError},
    };

    /// A queue that keeps settled events no longer than history needs them.
    fn with_history(dir: &tempfile::TempDir, max_bytes: u64) -> EmbeddedQueue {
        let history = HistoryConfig { retention: Duration::ZERO, max_bytes, bodies: true };
        let config = EmbeddedConfig { history: Some(history), ..config(dir, Duration::ZERO) };
        EmbeddedQueue::for_daemon(&config).expect("opens")
    }

    /// Trims until that leaves the number of events: the clock may not have gone on since they came.
    async fn trimmed_to(queue: &EmbeddedQueue, left: u32) {
        until("they are deleted", async || {
            queue.trim().await.expect("trims");
            stored(queue).await <= left
        })
        .await;
        queue.trim().await.expect("trims");
        assert_eq!(stored(queue).await, left);
    }

    async fn settle_all(queue: &EmbeddedQueue, name: &'static str, pattern: &'static str) {
        let subscriber = &subscribers(&[(name, pattern)])[0];
        let (mut source, settler) = queue.open(subscriber, WINDOW).await.expect("opens");
        let receipts = take(&mut source).await;
        settler.settle(receipts, Settlement::Delivered).await.expect("settles");
    }

    #[tokio::test]
    async fn what_history_has_not_taken_is_kept_although_all_subscribers_have_settled_it() {
        let dir = tempfile::tempdir().expect("a directory");
        let queue = with_history(&dir, 1 << 30);
        queue.prepare(&subscribers(&[("a", "x")])).await.expect("prepares");
        publish(&queue, "x", 5).await;
        assert_eq!(publish(&queue, "y", 5).await, [Published::Unmatched; 5]);
        settle_all(&queue, "a", "x").await;
        // The cursor passes what is for nobody when more comes.
        publish(&queue, "x", 1).await;
        settle_all(&queue, "a", "x").await;
        until("all are old", async || {
            let newest = "SELECT max(at) FROM event";
            let newest: i64 = queue
                .store()
                .read(|db| db.query_row(newest, [], |r| r.get(0)))
                .await
                .expect("reads");
            newest < millis(clock::now())
        })
        .await;
        trimmed_to(&queue, 11).await;
        queue.history_position().set(EventNumber(4));
        trimmed_to(&queue, 7).await;
        queue.history_position().set(EventNumber(11));
        trimmed_to(&queue, 0).await;
        publish(&queue, "y", 3).await;
        queue.history_position().turn_off();
        trimmed_to(&queue, 0).await;
    }

    #[tokio::test]
    async fn a_replay_of_a_dead_letter_keeps_nothing_for_history() {
        let dir = tempfile::tempdir().expect("a directory");
        let queue = with_history(&dir, 1 << 30);
        publish(&queue, "y", 1).await;
        let replay = "INSERT INTO event (type, at, only_for, body) VALUES ('y', 1, 'a', x'7b7d')";
        queue.store().write(|db| db.execute(replay, [])).await.expect("writes");
        queue.history_position().set(EventNumber(1));
        trimmed_to(&queue, 0).await;
    }

    /// More than a kilobyte for nobody but history.
    fn large() -> NewEvent {
        NewEvent {
            event_type: "y".to_owned(),
            message_id: None,
            body: vec![b'x'; 1100].into(),
            traceparent: None,
            tenant: None,
        }
    }

    #[tokio::test]
    async fn history_is_not_behind_before_it_has_said_where_it_is() {
        let dir = tempfile::tempdir().expect("a directory");
        // Two runs of 1000 fit.
        let queue = with_history(&dir, 5 << 19);
        let publish = async || {
            queue.publish(vec![large(); 1000]).await.expect("publishes");
        };
        for _ in 0..3 {
            publish().await;
        }
        trimmed_to(&queue, 2000).await;
        let loses = async || queue.0.untaken.lock().await.loses();
        assert!(!loses().await, "it is unknown");
        queue.history_position().set(EventNumber(1500));
        queue.trim().await.expect("trims");
        assert!(!loses().await, "what is left fits");
        publish().await;
        publish().await;
        trimmed_to(&queue, 2000).await;
        assert!(loses().await, "now it is behind, and stays so");
        queue.history_position().set(EventNumber(3001));
        queue.trim().await.expect("trims");
        assert!(!loses().await, "it is past what was deleted");
    }

    #[tokio::test]
    async fn what_a_running_replay_has_still_to_read_is_kept_up_to_a_limit() {
        let dir = tempfile::tempdir().expect("a directory");
        let queue = with_history(&dir, 5 << 19);
        let floor = Arc::new(Mutex::new(Ok(Some(EventNumber(400)))));
        let asked = floor.clone();
        let ask = move || std::future::ready(asked.lock().expect("not poisoned").clone());
        queue.keep_for_replays(ReplayFloor::new(ask));
        let tell = |now| *floor.lock().expect("not poisoned") = now;
        queue.publish(vec![large(); 1000]).await.expect("publishes");
        queue.history_position().set(EventNumber(1000));
        trimmed_to(&queue, 600).await;
        tell(Ok(Some(EventNumber(500))));
        trimmed_to(&queue, 500).await;
        tell(Err(StoreError::away("it is not open")));
        queue.trim().await.expect("trims");
        assert_eq!(stored(&queue).await, 500, "what was known holds");
        for _ in 0..3 {
            queue.publish(vec![large(); 1000]).await.expect("publishes");
        }
        queue.history_position().set(EventNumber(4000));
        // Of runs of 1000 the two latest fit.
        tell(Ok(Some(EventNumber(500))));
        trimmed_to(&queue, 2000).await;
        // A replay of older events is counted from its begin on.
        tell(Ok(Some(EventNumber(0))));
        queue.trim().await.expect("trims");
        assert_eq!(stored(&queue).await, 2000);
        tell(Ok(None));
        trimmed_to(&queue, 0).await;
    }

    #[tokio::test]
    async fn history_that_is_too_far_behind_loses_the_oldest_and_is_told_so() {
        let dir = tempfile::tempdir().expect("a directory");
        // Runs have 1000 events of more than a kilobyte; the last two, of 1000 and of 900, fit.
        let queue = with_history(&dir, 5 << 19);
        for _ in 0..5 {
            queue.publish(vec![large(); 1000]).await.expect("publishes");
        }
        let mut log = queue.event_log().expect("opens");
        let taken = log.after(EventNumber(0), 100, usize::MAX).expect("reads");
        assert_eq!((taken.len(), log.gap()), (100, None));
        queue.history_position().set(EventNumber(100));
        trimmed_to(&queue, 1900).await;
        let rest = log.after(EventNumber(100), 10, usize::MAX).expect("reads");
        assert_eq!(rest[0].number, Some(EventNumber(3101)));
        let gap = log.gap().expect("some are missing");
        assert_eq!((gap.from, gap.until, gap.missing), (taken[99].at, rest[0].at, None));
        queue.history_position().set(EventNumber(3110));
        trimmed_to(&queue, 1890).await;
        assert!(log.after(EventNumber(3110), 10, usize::MAX).expect("reads").len() == 10);
        assert_eq!(log.gap(), None);
    }

    #[tokio::test]
    async fn a_subscriber_that_waits_keeps_its_backlog_and_not_what_nobody_gets() {
        let dir = tempfile::tempdir().expect("a directory");
        let queue = with_history(&dir, 1 << 30);
        queue.prepare(&subscribers(&[("a", "x")])).await.expect("prepares");
        for _ in 0..3 {
            publish(&queue, "x", 1).await;
            publish(&queue, "y", 400).await;
        }
        queue.history_position().set(EventNumber(1203));
        trimmed_to(&queue, 3).await;
        let left =
            queue.store().read(|db| backlogs(db, &Default::default())).await.expect("counts");
        assert_eq!(left, [(SubscriberName::from("a"), 3)]);
        settle_all(&queue, "a", "x").await;
        trimmed_to(&queue, 0).await;
    }
}

//! Batches that wait for their next attempt: listed, and made due now. Only a row's time changes,
//! in one transaction; the lanes of a daemon see that commit as any other.

use std::collections::BTreeSet;

use rusqlite::{Connection, OptionalExtension as _, params};

use super::{
    EmbeddedQueue,
    consumer::{insert_retry, read_attempt_log},
    from_millis, millis,
};
use crate::{
    clock,
    delivery::{Batch, BatchId, SubscriberName},
    queue::{Hastened, QueueError, Waiting, WaitingList},
};

pub(super) async fn list(
    queue: &EmbeddedQueue,
    subscriber: &str,
) -> Result<WaitingList, QueueError> {
    let name = subscriber.to_owned();
    let batches = queue
        .store()
        .read_long(move |db| {
            let batches = db
                .prepare_cached(
                    "SELECT batch_id, events, attempts, first_attempt_at, due, length(body), story FROM retry WHERE subscriber = ?1 \
                     ORDER BY due, id",
                )?
                .query_map([&name], |row| {
                    Ok(Waiting {
                        batch_id: row.get::<_, String>(0)?.into(),
                        events: row.get(1)?,
                        attempts: row.get(2)?,
                        first_attempt_at: row.get::<_, Option<i64>>(3)?.map(from_millis),
                        due: Some(from_millis(row.get(4)?)),
                        bytes: usize::try_from(row.get::<_, i64>(5)?).unwrap_or_default(),
                        last: read_attempt_log(row, 6)?.last().cloned(),
                    })
                })?
                .collect::<rusqlite::Result<Vec<_>>>()?;
            Ok((!batches.is_empty() || is_known(db, &name)?).then_some(batches))
        })
        .await?;
    match batches {
        Some(batches) => Ok(WaitingList { batches, unseen: 0 }),
        None => Err(unknown(subscriber)),
    }
}

pub(super) async fn hasten(
    queue: &EmbeddedQueue,
    subscriber: &str,
    ids: Option<BTreeSet<BatchId>>,
) -> Result<Hastened, QueueError> {
    let name = subscriber.to_owned();
    let now = millis(clock::now());
    let hastened = queue
        .store()
        .write(move |db| {
            let hastened = match ids {
                None => all(db, &name, now)?,
                Some(ids) => these(db, &name, &ids, now)?,
            };
            let found = hastened.moved + hastened.due > 0;
            Ok((found || is_known(db, &name)?).then_some(hastened))
        })
        .await?;
    queue.0.head.retries_changed(subscriber);
    hastened.ok_or_else(|| unknown(subscriber))
}

pub(super) async fn enqueue(
    queue: &EmbeddedQueue,
    subscriber: &SubscriberName,
    batches: Vec<Batch>,
) -> Result<(), QueueError> {
    let name = subscriber.clone();
    let now = millis(clock::now());
    let enqueue = move |db: &Connection| {
        if !is_known(db, name.as_str())? {
            return Ok(false);
        }
        let waits = "SELECT EXISTS (SELECT 1 FROM retry WHERE subscriber = ?1 AND batch_id = ?2)";
        for batch in &batches {
            let waits: bool = db
                .prepare_cached(waits)?
                .query_row(params![name, batch.id.as_str()], |r| r.get(0))?;
            if !waits {
                insert_retry(db, name.as_str(), batch, None, now, now)?;
            }
        }
        Ok(true)
    };
    let is_known = queue.store().write(enqueue).await?;
    // Before this returns: no later event is to be taken before them.
    queue.0.head.retries_changed(subscriber);
    if is_known { Ok(()) } else { Err(unknown(subscriber.as_str())) }
}

/// Scheduled now too, so that they follow a clock that is set back later.
const DUE_NOW: &str =
    "UPDATE retry SET due = ?2, scheduled_at = ?2 WHERE subscriber = ?1 AND due > ?2";

fn all(db: &Connection, subscriber: &str, now: i64) -> rusqlite::Result<Hastened> {
    let count = "SELECT count(*) FROM retry WHERE subscriber = ?1 AND due <= ?2";
    let due: i64 = db.prepare_cached(count)?.query_row(params![subscriber, now], |r| r.get(0))?;
    let moved = db.prepare_cached(DUE_NOW)?.execute(params![subscriber, now])?;
    Ok(Hastened { moved: moved as u64, due: due.unsigned_abs(), ..Hastened::default() })
}

fn these(
    db: &Connection,
    subscriber: &str,
    ids: &BTreeSet<BatchId>,
    now: i64,
) -> rusqlite::Result<Hastened> {
    let mut due = db.prepare_cached(
        "SELECT count(*) FROM retry WHERE subscriber = ?1 AND due <= ?2 AND batch_id = ?3",
    )?;
    let mut move_up = db.prepare_cached(&format!("{DUE_NOW} AND batch_id = ?3"))?;
    let mut hastened = Hastened::default();
    for id in ids {
        let were_due: i64 = due.query_row(params![subscriber, now, id.as_str()], |r| r.get(0))?;
        let moved = move_up.execute(params![subscriber, now, id.as_str()])?;
        if were_due == 0 && moved == 0 {
            hastened.missing.push(id.to_string());
        }
        hastened.due += were_due.unsigned_abs();
        hastened.moved += moved as u64;
    }
    Ok(hastened)
}

/// Whether a daemon has ever run with such a subscriber.
fn is_known(db: &Connection, subscriber: &str) -> rusqlite::Result<bool> {
    let known = "SELECT 1 FROM segment WHERE subscriber = ?1 UNION ALL SELECT 1 FROM retry WHERE subscriber = ?1 \
                 UNION ALL SELECT 1 FROM dead WHERE subscriber = ?1 LIMIT 1";
    Ok(db.prepare_cached(known)?.query_row([subscriber], |_| Ok(())).optional()?.is_some())
}

fn unknown(subscriber: &str) -> QueueError {
    QueueError::new(format!(
        "the embedded queue knows no subscriber `{subscriber}`: the daemon has never run with one"
    ))
}

//! Walks through dead letters, those of a subscriber or those of the log; replays them, purges them.

use std::{collections::VecDeque, sync::Arc};

use bytes::Bytes;
use rusqlite::{Connection, Row, params};

use super::{
    consumer::{insert_retry, read_attempt_log, read_prints},
    from_millis,
    head::Head,
    millis,
    store::Store,
    tenant_of,
};
use crate::{
    clock,
    delivery::{DeadLetter, MessageKind, Reason},
    event::event_type,
    queue::{self, Held, QueueError},
};

/// Letters that are read at once, and bytes of their bodies, approximately. Read one by one, 10,000
/// letters take most of a second.
const AT_ONCE: i64 = 256;
const AT_ONCE_BYTES: usize = 1 << 20;

/// Whose the dead letters of the log are: what came and is no event. No subscriber has this name.
pub(super) const LOG: &str = "@log";

/// A walk through dead letters, oldest first.
#[derive(Debug)]
pub struct DeadLetters {
    store: Store,
    head: Arc<Head>,
    /// Or [`LOG`].
    subscriber: String,
    /// Those that were read and not passed yet. Another walk may remove them meanwhile.
    read: VecDeque<Held>,
    /// The number of the last one that was read.
    after: i64,
    /// The number of the last one of this walk.
    upto: i64,
    left: u32,
}

impl DeadLetters {
    /// Those of the log, which are none's: nothing of them can be replayed.
    pub(super) async fn of_log(store: Store, head: Arc<Head>) -> Result<Self, QueueError> {
        let range = |db: &Connection| range(db, LOG);
        let (left, upto) = store.read(range).await?;
        Ok(Self {
            store,
            head,
            subscriber: LOG.to_owned(),
            read: VecDeque::new(),
            after: 0,
            upto,
            left,
        })
    }

    pub(super) async fn of_subscriber(
        store: Store,
        head: Arc<Head>,
        subscriber: &str,
    ) -> Result<Self, QueueError> {
        let name = subscriber.to_owned();
        let (left, upto, known) = store
            .read(move |db| {
                let (left, upto) = range(db, &name)?;
                let known: bool = db.query_row(
                    "SELECT EXISTS (SELECT 1 FROM segment WHERE subscriber = ?1) OR EXISTS (SELECT 1 FROM retry WHERE subscriber = ?1)",
                    [&name],
                    |r| r.get(0),
                )?;
                Ok((left, upto, known || left > 0))
            })
            .await?;
        if !known {
            return Err(QueueError::new(format!(
                "the embedded queue knows no subscriber `{subscriber}`: the daemon has never run with one"
            )));
        }
        let read = VecDeque::new();
        Ok(Self { store, head, subscriber: subscriber.to_owned(), read, after: 0, upto, left })
    }

    /// Reads the next letters; none at the end of the walk.
    async fn read_more(&mut self) -> Result<(), QueueError> {
        let (subscriber, after, upto) = (self.subscriber.clone(), self.after, self.upto);
        let read = self.store.read(move |db| some(db, &subscriber, after, upto)).await?;
        if let Some(last) = read.back() {
            self.after = last.tag.cast_signed();
        }
        self.read = read;
        Ok(())
    }
}

impl queue::DeadLetters for DeadLetters {
    fn left(&self) -> u32 {
        self.left
    }

    async fn next(&mut self) -> Result<Option<Held>, QueueError> {
        if self.read.is_empty() {
            self.read_more().await?;
        }
        let next = self.read.pop_front();
        if next.is_some() {
            self.left = self.left.saturating_sub(1);
        }
        Ok(next)
    }

    async fn replay(&mut self, letters: Vec<Held>) -> Result<Vec<Held>, QueueError> {
        let subscriber = self.subscriber.clone();
        let now = millis(clock::now());
        let left = self
            .store
            .write(move |db| {
                for held in &letters {
                    // Another command may have been faster.
                    if delete(db, held)? {
                        revive(db, &subscriber, &held.letter, now)?;
                    }
                }
                Ok(Vec::new()) // there is always a place for them
            })
            .await;
        self.head.retries_changed(&self.subscriber);
        left
    }

    async fn purge(&mut self, letters: Vec<Held>) -> Result<(), QueueError> {
        self.store
            .write(move |db| letters.iter().try_for_each(|held| delete(db, held).map(drop)))
            .await
    }

    async fn close(self) -> Result<(), QueueError> {
        Ok(())
    }
}

/// How many letters there are, and the number of the last one.
fn range(db: &Connection, subscriber: &str) -> rusqlite::Result<(u32, i64)> {
    db.query_row(
        "SELECT count(*), coalesce(max(id), 0) FROM dead WHERE subscriber = ?1",
        [subscriber],
        |r| Ok((r.get(0)?, r.get(1)?)),
    )
}

/// The number of dead letters of the log.
pub(super) fn orphans(db: &Connection) -> rusqlite::Result<u64> {
    range(db, LOG).map(|(letters, _)| letters.into())
}

/// The first letters after a number and up to another.
fn some(
    db: &Connection,
    subscriber: &str,
    after: i64,
    upto: i64,
) -> rusqlite::Result<VecDeque<Held>> {
    let mut statement = db.prepare_cached(
        "SELECT id, kind, reason, letter_id, content_type, events, attempts, status, error, first_attempt_at, died_at, body, story, prints \
         FROM dead WHERE subscriber = ?1 AND id > ?2 AND id <= ?3 ORDER BY id LIMIT ?4",
    )?;
    let mut rows = statement.query(params![subscriber, after, upto, AT_ONCE])?;
    let (mut letters, mut bytes) = (VecDeque::new(), 0);
    while bytes < AT_ONCE_BYTES
        && let Some(row) = rows.next()?
    {
        let held = read(row, subscriber)?;
        bytes += held.letter.body.len();
        letters.push_back(held);
    }
    Ok(letters)
}

fn delete(db: &Connection, held: &Held) -> rusqlite::Result<bool> {
    Ok(db.prepare_cached("DELETE FROM dead WHERE id = ?1")?.execute([held.tag.cast_signed()])? > 0)
}

/// Replays a dead letter. A batch returns under its id, with attempts and elapsed time reset; an
/// event goes into the log again, for this subscriber alone.
fn revive(
    db: &Connection,
    subscriber: &str,
    letter: &DeadLetter,
    now: i64,
) -> rusqlite::Result<()> {
    match letter.kind {
        MessageKind::Batch => insert_retry(db, subscriber, &letter.to_batch(), None, now, now),
        MessageKind::Event => {
            let event_type = event_type(&letter.body).map(|t| t.into_owned()).unwrap_or_default();
            // With its tenant: by that a subscriber finds what is for it alone.
            db.prepare_cached("INSERT INTO event (type, message_id, at, only_for, body, tenant) VALUES (?1, ?2, ?3, ?4, ?5, ?6)")?.execute(params![
                event_type,
                letter.id,
                now,
                subscriber,
                &letter.body[..],
                tenant_of(db, subscriber)?
            ])?;
            // A subscriber that is not configured now gets it when it is again.
            let seq = db.last_insert_rowid();
            db.prepare_cached(
                "INSERT INTO segment (subscriber, patterns, after, upto) SELECT ?1, '[]', ?2 - 1, ?2 \
                 WHERE NOT EXISTS (SELECT 1 FROM segment WHERE subscriber = ?1 AND upto IS NULL)",
            )?
            .execute(params![subscriber, seq])?;
            Ok(())
        }
    }
}

fn read(row: &Row<'_>, subscriber: &str) -> rusqlite::Result<Held> {
    let (kind, reason): (String, String) = (row.get(1)?, row.get(2)?);
    let events = row.get(5)?;
    let time = |n| row.get::<_, Option<i64>>(n).map(|t| t.map(from_millis));
    let letter = DeadLetter {
        kind: if kind == MessageKind::Batch.name() {
            MessageKind::Batch
        } else {
            MessageKind::Event
        },
        reason: Reason::from_name(&reason).unwrap_or(Reason::Exhausted),
        id: row.get(3)?,
        content_type: row.get(4)?,
        content_encoding: None, // what comes here has none
        events,
        attempts: row.get(6)?,
        status: row.get(7)?,
        error: row.get(8)?,
        first_attempt_at: time(9)?,
        died_at: time(10)?,
        body: Bytes::from(row.get::<_, Vec<u8>>(11)?),
        attempt_log: read_attempt_log(row, 12)?,
        prints: read_prints(row, 13, events)?,
    };
    Ok(Held {
        letter,
        subscriber: (subscriber != LOG).then(|| subscriber.to_owned()),
        tag: row.get::<_, i64>(0)?.unsigned_abs(),
    })
}

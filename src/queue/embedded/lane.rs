//! A subscriber's part of the database as the lane sees it: a source and its settler.

use std::{
    collections::{BTreeSet, HashSet, VecDeque},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use rusqlite::{Connection, Row, params};
use tokio::sync::{Mutex as AsyncMutex, Notify, watch};

use super::{from_millis, is_for, millis, parse_patterns, store::Store};
use crate::{
    clock,
    event::Pattern,
    payload::Format,
    queue::{self, DeadLetter, Envelope, Event, Kind, QueueError, Receipt, SettleError, Settlement, Taken, Window},
};

/// Rows of the log looked at in one query: a pattern that matches little must not hold up other readers.
const SCAN: u32 = 1000;

const LOOK_AGAIN: Duration = Duration::from_secs(5);

/// So far the cursor may lag behind what was looked at and matched nothing.
const LAG: i64 = 10_000;

/// A part of the log with the patterns that hold there.
#[derive(Debug)]
struct Segment {
    patterns: Arc<[Pattern]>,
    after: i64,
    /// `i64::MAX`: without an end.
    upto: i64,
}

/// What source and settler share.
#[derive(Debug)]
struct Shared {
    store: Store,
    subscriber: String,
    taken: Mutex<InHand>,
    /// Held over a write, so that the cursor only rises.
    writing: AsyncMutex<()>,
    room: Notify,
}

/// What was taken and is not settled.
#[derive(Debug, Default)]
struct InHand {
    /// Of events, in order: whether each is finished.
    events: VecDeque<(i64, bool)>,
    /// What a source before this one finished after something that it did not.
    finished: BTreeSet<i64>,
    /// Up to here the log was looked through.
    looked_at: i64,
    /// What the database has.
    cursor: i64,
    envelopes: HashSet<i64>,
}

impl InHand {
    /// The cursor once these are finished too.
    fn cursor_after(&self, finished: &BTreeSet<i64>) -> i64 {
        let is_open = |(seq, done): &&(i64, bool)| !done && !finished.contains(seq);
        self.events.iter().find(is_open).map_or(self.looked_at, |(seq, _)| seq - 1).max(self.cursor)
    }

    fn finish(&mut self, finished: &BTreeSet<i64>, cursor: i64) {
        for (seq, done) in &mut self.events {
            *done |= finished.contains(seq);
        }
        self.forget_finished();
        self.cursor = self.cursor.max(cursor);
    }

    fn forget_finished(&mut self) {
        while self.events.front().is_some_and(|(_, done)| *done) {
            self.events.pop_front();
        }
    }
}

impl Shared {
    fn taken(&self) -> std::sync::MutexGuard<'_, InHand> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub(super) async fn open(
    store: Store,
    news: watch::Receiver<u64>,
    subscriber: &str,
    window: Window,
) -> Result<(Source, Settler), QueueError> {
    let name = subscriber.to_owned();
    let (segments, finished) = store.read(move |db| Ok((segments(db, &name)?, finished(db, &name)?))).await?;
    let segments = VecDeque::from(segments);
    let cursor = segments.front().map_or(0, |s| s.after);
    let shared = Arc::new(Shared {
        store,
        subscriber: subscriber.to_owned(),
        taken: Mutex::new(InHand { looked_at: cursor, cursor, finished, ..InHand::default() }),
        writing: AsyncMutex::default(),
        room: Notify::new(),
    });
    Ok((Source { shared: shared.clone(), segments, news, window }, Settler(shared)))
}

fn segments(db: &Connection, subscriber: &str) -> rusqlite::Result<Vec<Segment>> {
    db.prepare("SELECT patterns, after, coalesce(upto, 9223372036854775807) FROM segment WHERE subscriber = ?1 ORDER BY after")?
        .query_map([subscriber], |r| {
            Ok(Segment { patterns: parse_patterns(&r.get::<_, String>(0)?).into(), after: r.get(1)?, upto: r.get(2)? })
        })?
        .collect()
}

fn finished(db: &Connection, subscriber: &str) -> rusqlite::Result<BTreeSet<i64>> {
    db.prepare("SELECT seq FROM finished WHERE subscriber = ?1")?.query_map([subscriber], |r| r.get(0))?.collect()
}

#[derive(Debug)]
pub struct Source {
    shared: Arc<Shared>,
    segments: VecDeque<Segment>,
    news: watch::Receiver<u64>,
    window: Window,
}

/// What a look at the database brought.
#[derive(Default)]
struct Found {
    envelopes: Vec<(i64, Result<Envelope, DeadLetter>)>,
    events: Vec<Event>,
    looked_at: i64,
    /// The log may hold more than was looked at.
    more: bool,
    /// When the next retry is due, in Unix milliseconds.
    next_due: Option<i64>,
}

impl queue::Source for Source {
    async fn take(&mut self, into: &mut Vec<Taken>, max: usize) -> Result<(), QueueError> {
        loop {
            // Before looking: what comes meanwhile must wake the wait below.
            self.news.borrow_and_update();
            let shared = self.shared.clone();
            let room = shared.room.notified();
            let found = self.look(max).await?;
            let next_due = found.next_due;
            let more = found.more || !found.events.is_empty(); // those that are finished already are not handed over
            let before = into.len();
            self.hand_over(found, into);
            if into.len() > before {
                return Ok(());
            }
            self.advance().await?;
            if more {
                continue;
            }
            // The clock can be set, and whoever brings the news can fail: look again every few seconds.
            let until_due = next_due.map(|at| from_millis(at).duration_since(clock::now()).unwrap_or_default());
            let due = tokio::time::sleep(until_due.unwrap_or(LOOK_AGAIN).clamp(Duration::from_millis(5), LOOK_AGAIN));
            tokio::select! {
                changed = self.news.changed() => {
                    if changed.is_err() {
                        return Err(QueueError::new("the embedded queue was closed"));
                    }
                }
                () = room => {}
                () = due => {}
            }
        }
    }

    async fn close(self) {}
}

impl Source {
    /// Looks for due retries, and for events as far as there is room for them. Changes nothing, so it
    /// can be dropped while it waits.
    async fn look(&mut self, max: usize) -> Result<Found, QueueError> {
        let (looked_at, events_room, held) = {
            let taken = self.shared.taken();
            let room = usize::from(self.window.events).saturating_sub(taken.events.len());
            (taken.looked_at, room.min(max), taken.envelopes.iter().copied().collect::<Vec<_>>())
        };
        while self.segments.len() > 1 && self.segments.front().is_some_and(|s| looked_at >= s.upto) {
            self.segments.pop_front();
        }
        let segment = self.segments.front().map(|s| (s.patterns.clone(), s.after.max(looked_at), s.upto));
        let last = self.segments.len() <= 1;
        let envelopes_room = usize::from(self.window.envelopes).saturating_sub(held.len());
        let subscriber = self.shared.subscriber.clone();
        let now = millis(clock::now());
        self.shared
            .store
            .read(move |db| {
                let mut found = Found { looked_at, ..Found::default() };
                found.next_due =
                    if envelopes_room > 0 { due(db, &subscriber, now, &held, envelopes_room, &mut found.envelopes)? } else { None };
                if let (Some((patterns, after, upto)), 1..) = (segment, events_room) {
                    let end = scan(db, &subscriber, &patterns, after, upto, events_room, &mut found)?;
                    found.more |= end && !last;
                }
                Ok(found)
            })
            .await
    }

    fn hand_over(&mut self, found: Found, into: &mut Vec<Taken>) {
        let mut taken = self.shared.taken();
        taken.looked_at = taken.looked_at.max(found.looked_at);
        for (id, envelope) in found.envelopes {
            taken.envelopes.insert(id);
            let receipt = Receipt { from: Kind::Batch, tag: id.unsigned_abs() };
            into.push(match envelope {
                Ok(envelope) => Taken::Envelope(envelope, receipt),
                Err(letter) => Taken::NotAnEnvelope(letter, receipt),
            });
        }
        for event in found.events {
            let seq = event.receipt.tag.cast_signed();
            let done = taken.finished.remove(&seq);
            taken.events.push_back((seq, done));
            if !done {
                into.push(Taken::Event(event));
            }
        }
        taken.forget_finished();
    }

    /// Writes down how far the log was looked through when nothing of it was for this subscriber, so
    /// that it can be trimmed.
    async fn advance(&self) -> Result<(), QueueError> {
        let to = {
            let taken = self.shared.taken();
            let cursor = taken.cursor_after(&BTreeSet::new());
            (taken.events.is_empty() && cursor - taken.cursor > LAG).then_some(cursor)
        };
        let Some(cursor) = to else { return Ok(()) };
        let _writing = self.shared.writing.lock().await;
        let subscriber = self.shared.subscriber.clone();
        self.shared.store.write(move |db| set_cursor(db, &subscriber, cursor)).await?;
        let mut taken = self.shared.taken();
        taken.cursor = taken.cursor.max(cursor);
        Ok(())
    }
}

/// Takes due retries, the longest due first; returns when the next one is due.
fn due(
    db: &Connection,
    subscriber: &str,
    now: i64,
    held: &[i64],
    room: usize,
    into: &mut Vec<(i64, Result<Envelope, DeadLetter>)>,
) -> rusqlite::Result<Option<i64>> {
    let mut query = db.prepare_cached(
        "SELECT id, due, batch_id, content_type, events, attempts, first_attempt_at, body FROM retry WHERE subscriber = ?1 ORDER BY due, id",
    )?;
    let mut rows = query.query([subscriber])?;
    while let Some(row) = rows.next()? {
        let id: i64 = row.get(0)?;
        if held.contains(&id) {
            continue;
        }
        let due: i64 = row.get(1)?;
        if due > now || into.len() == room {
            return Ok(Some(due));
        }
        into.push((id, envelope(row)?));
    }
    Ok(None)
}

fn envelope(row: &Row<'_>) -> rusqlite::Result<Result<Envelope, DeadLetter>> {
    let content_type: String = row.get(3)?;
    let format = [Format::Json, Format::JsonLines].into_iter().find(|f| f.content_type() == content_type);
    let first_attempt_at = row.get::<_, Option<i64>>(6)?.map(from_millis);
    let (batch_id, events, attempts, body) = (row.get(2)?, row.get(4)?, row.get(5)?, Bytes::from(row.get::<_, Vec<u8>>(7)?));
    Ok(match format {
        Some(format) => Ok(Envelope { batch_id, body, format, events, attempts, first_attempt_at }),
        None => Err(DeadLetter {
            kind: Kind::Batch,
            reason: queue::Reason::InvalidEvent,
            body,
            error: format!("a retry is not an envelope: its content type `{content_type}` is not that of a batch"),
            content_type: Some(content_type),
            id: Some(batch_id),
            events,
            attempts,
            status: None,
            first_attempt_at,
            died_at: Some(clock::now()),
        }),
    })
}

/// Looks through a segment; true if that brought it to the segment's end.
fn scan(
    db: &Connection,
    subscriber: &str,
    patterns: &[Pattern],
    after: i64,
    upto: i64,
    room: usize,
    found: &mut Found,
) -> rusqlite::Result<bool> {
    let mut query =
        db.prepare_cached("SELECT seq, type, message_id, only_for, body FROM event WHERE seq > ?1 AND seq <= ?2 ORDER BY seq LIMIT ?3")?;
    let mut rows = query.query(params![after, upto, SCAN])?;
    let mut looked_at = 0;
    while let Some(row) = rows.next()? {
        if found.events.len() == room {
            return Ok(false);
        }
        looked_at += 1;
        let seq: i64 = row.get(0)?;
        found.looked_at = seq;
        let event_type = row.get_ref(1)?.as_str()?;
        let only_for = row.get_ref(3)?.as_str_or_null()?;
        if is_for(subscriber, patterns, event_type, only_for) {
            found.events.push(Event {
                body: row.get(4)?,
                message_id: row.get(2)?,
                content_type: None,
                receipt: Receipt { from: Kind::Event, tag: seq.unsigned_abs() },
            });
        }
    }
    found.more = looked_at == SCAN;
    if !found.more && upto != i64::MAX {
        found.looked_at = found.looked_at.max(upto); // the segment has an end, and this is it
    }
    Ok(!found.more)
}

#[derive(Debug, Clone)]
pub struct Settler(Arc<Shared>);

impl queue::Settler for Settler {
    async fn settle(&self, receipts: Vec<Receipt>, settlement: Settlement) -> Result<(), SettleError> {
        let shared = &*self.0;
        let _writing = shared.writing.lock().await;
        let of = |kind| receipts.iter().filter(move |r| r.from == kind).map(|r| r.tag.cast_signed());
        let events: BTreeSet<i64> = of(Kind::Event).collect();
        let envelopes: Vec<i64> = of(Kind::Batch).collect();
        let (cursor, moved) = {
            let taken = shared.taken();
            let cursor = taken.cursor_after(&events);
            (cursor, cursor > taken.cursor)
        };
        let stragglers: Vec<i64> = events.range(cursor + 1..).copied().collect();
        let (subscriber, settled) = (shared.subscriber.clone(), envelopes.clone());
        let now = clock::now();
        let settle = move |db: &Connection| {
            for id in &settled {
                db.prepare_cached("DELETE FROM retry WHERE id = ?1")?.execute([id])?;
            }
            match &settlement {
                Settlement::Delivered => {}
                Settlement::Retry { envelope, delay } => insert_retry(db, &subscriber, envelope, millis(now + *delay))?,
                Settlement::Dead(letters) => letters.iter().try_for_each(|l| insert_dead(db, &subscriber, l))?,
            }
            for seq in &stragglers {
                db.prepare_cached("INSERT OR IGNORE INTO finished (subscriber, seq) VALUES (?1, ?2)")?.execute(params![subscriber, seq])?;
            }
            if moved { set_cursor(db, &subscriber, cursor) } else { Ok(()) }
        };
        shared.store.write(settle).await.map_err(|e| SettleError::Unconfirmed(e.to_string()))?;
        let mut taken = shared.taken();
        taken.finish(&events, cursor);
        for id in &envelopes {
            taken.envelopes.remove(id);
        }
        drop(taken);
        shared.room.notify_one();
        Ok(())
    }
}

fn set_cursor(db: &Connection, subscriber: &str, cursor: i64) -> rusqlite::Result<()> {
    db.prepare_cached("UPDATE segment SET after = ?2 WHERE subscriber = ?1 AND after < ?2")?.execute(params![subscriber, cursor])?;
    db.prepare_cached("DELETE FROM finished WHERE subscriber = ?1 AND seq <= ?2")?.execute(params![subscriber, cursor])?;
    db.prepare_cached("DELETE FROM segment WHERE subscriber = ?1 AND upto <= ?2")?.execute(params![subscriber, cursor])?;
    Ok(())
}

pub(super) fn insert_retry(db: &Connection, subscriber: &str, e: &Envelope, due: i64) -> rusqlite::Result<()> {
    db.prepare_cached(
        "INSERT INTO retry (subscriber, due, batch_id, content_type, events, attempts, first_attempt_at, body) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)",
    )?
    .execute(params![subscriber, due, e.batch_id, e.format.content_type(), e.events, e.attempts, e.first_attempt_at.map(millis), &e.body[..]])?;
    Ok(())
}

fn insert_dead(db: &Connection, subscriber: &str, l: &DeadLetter) -> rusqlite::Result<()> {
    db.prepare_cached(
        "INSERT INTO dead (subscriber, kind, reason, letter_id, content_type, events, attempts, status, error, first_attempt_at, died_at, body) \
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12)",
    )?
    .execute(params![
        subscriber,
        l.kind.name(),
        l.reason.name(),
        l.id,
        l.content_type,
        l.events,
        l.attempts,
        l.status,
        queue::cut_error(&l.error),
        l.first_attempt_at.map(millis),
        l.died_at.map(millis),
        &l.body[..]
    ])?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_cursor_never_passes_what_is_not_finished(order in Just((1_i64..=40).map(|n| n * 3).collect::<Vec<_>>()).prop_shuffle(), sizes in prop::collection::vec(1_usize..6, 40)) {
            let mut hand = InHand { looked_at: 130, ..InHand::default() };
            hand.events = (1..=40).map(|n| (n * 3, false)).collect();
            let mut left: BTreeSet<i64> = order.iter().copied().collect();
            let mut rest = &order[..];
            for size in sizes {
                let (now, later) = rest.split_at(size.min(rest.len()));
                rest = later;
                let finished: BTreeSet<i64> = now.iter().copied().collect();
                left.retain(|seq| !finished.contains(seq));
                let cursor = hand.cursor_after(&finished);
                prop_assert_eq!(cursor, left.first().map_or(130, |seq| seq - 1));
                hand.finish(&finished, cursor);
            }
            prop_assert!(hand.events.is_empty());
        }
    }
}

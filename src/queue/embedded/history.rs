//! The log as the source of history, which does not store the events' bytes a second time.

use std::{
    collections::VecDeque,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    time::SystemTime,
};

use bytes::Bytes;
use rusqlite::{Connection, OptionalExtension as _, Row, params};

use super::{from_millis, newest, store};
use crate::{
    delivery::SubscriberName,
    queue::{Begin, QueueError},
    sqlite::{self, Reader},
    store::{EventLog, EventNumber, Gap, NewRow, StoreError},
};

/// `only_for` of an event that matched no subscriber: history alone has it.
pub(super) const NOBODY: &str = "";

/// Rows whose bytes are counted together.
const CHUNK: u32 = 1000;

/// How far history has taken the log, as its recorder reports it. Clones share it.
///
/// Until then nothing is known, and the log keeps everything back that history could still want.
#[derive(Debug, Clone)]
pub struct HistoryPosition(Arc<AtomicI64>);

/// How far history has taken the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TakenTo {
    /// Its recorder has not reported yet: the store may be away.
    Unknown,
    /// The number of the last event that it has taken.
    Event(i64),
    /// It takes none.
    Off,
}

impl Default for HistoryPosition {
    fn default() -> Self {
        Self(Arc::new(AtomicI64::new(Self::UNKNOWN)))
    }
}

impl HistoryPosition {
    const UNKNOWN: i64 = -1;
    const OFF: i64 = i64::MAX;

    /// Reports the last event that is durable in history, or that it will never take.
    pub fn set(&self, taken: EventNumber) {
        self.0.store(taken.0, Ordering::Relaxed);
    }

    /// Reports that history takes nothing until [`set`](Self::set): the log keeps nothing back.
    pub fn turn_off(&self) {
        self.0.store(Self::OFF, Ordering::Relaxed);
    }

    pub(super) fn get(&self) -> TakenTo {
        match self.0.load(Ordering::Relaxed) {
            Self::UNKNOWN => TakenTo::Unknown,
            Self::OFF => TakenTo::Off,
            taken => TakenTo::Event(taken),
        }
    }
}

/// A part of the log that is kept for history, counted as far as that was needed: what it has not
/// taken, or what replays have still to read.
#[derive(Debug, Default)]
pub(super) struct Untaken {
    /// Bytes of runs of events, each with the number of its last one; the first run begins after
    /// `counted_from`.
    runs: VecDeque<(i64, u64)>,
    counted_from: i64,
    /// The last event that was deleted although history had not taken it, until it is past that.
    lost_upto: Option<i64>,
}

impl Untaken {
    /// Logs when events begin to be deleted untaken, up to `upto`, and when history is past them.
    pub(super) fn lose(&mut self, position: i64, upto: Option<i64>) {
        if upto.is_some() {
            if self.lost_upto.is_none() {
                tracing::warn!(
                    "history is more than `max_bytes` of [history] behind: the embedded queue deletes events that it has not taken"
                );
            }
            self.lost_upto = upto;
        } else if self.lost_upto.is_some_and(|lost| position >= lost) {
            tracing::info!("history has caught up with what the embedded queue deletes");
            self.lost_upto = None;
        }
    }

    /// Forgets what history has taken meanwhile. Returns the number after which is still to be
    /// counted.
    pub(super) fn taken(&mut self, position: i64) -> i64 {
        // Of an earlier begin nothing was counted: a replay of older events was made.
        if position < self.counted_from {
            self.runs.clear();
        }
        while self.runs.front().is_some_and(|(upto, _)| *upto <= position) {
            self.counted_from = self.runs.pop_front().map_or(0, |(upto, _)| upto);
        }
        if self.runs.is_empty() {
            self.counted_from = position;
        }
        self.runs.back().map_or(self.counted_from, |(upto, _)| *upto)
    }

    #[cfg(test)]
    pub(super) const fn loses(&self) -> bool {
        self.lost_upto.is_some()
    }

    pub(super) fn add(&mut self, (upto, bytes): (i64, u64)) {
        self.runs.push_back((upto, bytes));
    }

    /// The number up to which events may be deleted so that the later ones have at most `max_bytes`.
    pub(super) fn floor(&self, position: i64, max_bytes: u64) -> i64 {
        let mut bytes = 0;
        let too_much = self.runs.iter().rev().find(|(_, run)| {
            bytes += run;
            bytes > max_bytes
        });
        too_much.map_or(position, |(upto, _)| *upto)
    }
}

/// The number of the last event before the first one that history has still to take, and when that
/// one was stored. Replays of dead letters are events that history has.
pub(super) fn first_untaken(
    db: &Connection,
    position: i64,
) -> rusqlite::Result<Option<(i64, i64)>> {
    db.prepare_cached(
        "SELECT seq - 1, at FROM event WHERE seq > ?1 AND (only_for IS NULL OR only_for = ?2) ORDER BY seq LIMIT 1",
    )?
    .query_row(params![position, NOBODY], |r| Ok((r.get(0)?, r.get(1)?)))
    .optional()
}

/// Where the log begins for a subscriber, if history, which has taken it up to `taken`, has all
/// before that.
pub(super) fn begin(
    db: &Connection,
    subscriber: &SubscriberName,
    taken: i64,
) -> rusqlite::Result<Begin> {
    let begun: Option<i64> = db
        .prepare_cached(
            "SELECT coalesce(begun, after) FROM segment WHERE subscriber = ?1 AND upto IS NULL",
        )?
        .query_row([subscriber], |r| r.get(0))
        .optional()?;
    let Some(begun) = begun else { return Ok(Begin::Waits) };
    let has_all = first_untaken(db, taken)?.is_none_or(|(before, _)| before >= begun);
    Ok(if has_all { Begin::After(EventNumber(begun)) } else { Begin::Waits })
}

/// The last number of the next run of events, and their bytes; `None` at the end of the log, or if
/// one of them was stored at `before` or later.
pub(super) fn next_run(
    db: &Connection,
    after: i64,
    before: i64,
) -> rusqlite::Result<Option<(i64, u64)>> {
    // Of a body that is not read, only the length; the rest is about what a row takes besides.
    db.prepare_cached(
        "SELECT max(seq), sum(bytes), max(at) FROM \
         (SELECT seq, at, length(body) + length(type) + 64 AS bytes FROM event WHERE seq > ?1 ORDER BY seq LIMIT ?2)",
    )?
    .query_row(params![after, CHUNK], |r| {
        let upto: Option<i64> = r.get(0)?;
        let bytes: Option<i64> = r.get(1)?;
        let is_before = r.get::<_, Option<i64>>(2)?.is_some_and(|at| at < before);
        let run = upto.zip(bytes).filter(|_| is_before);
        Ok(run.map(|(upto, bytes)| (upto, bytes.unsigned_abs())))
    })
}

/// The log, for a thread that reads history. Reads on a connection of its own, also alongside a
/// daemon.
#[derive(Debug)]
pub struct Log {
    reader: Reader,
    /// A range in which there are only replays of dead letters: after the first number, up to the
    /// second.
    replays: (i64, i64),
    /// The last row that was read, and when that was stored.
    last: (i64, i64),
    gap: Option<Gap>,
}

impl Log {
    /// Opens the log of an existing queue, alongside a daemon or without one.
    ///
    /// # Errors
    /// There is none, or it cannot be opened, or no daemon of this version has run with it yet.
    pub fn open(data_dir: &Path) -> Result<Self, QueueError> {
        let reader = store::open_reader(data_dir)?;
        Ok(Self { reader, replays: (0, 0), last: (0, 0), gap: None })
    }
}

/// A row of the log, as far as it was read.
enum Read {
    Event(NewRow),
    Replay,
}

fn read(row: &Row<'_>) -> rusqlite::Result<Read> {
    if row.get_ref(4)?.as_str_or_null()?.is_some_and(|only_for| only_for != NOBODY) {
        return Ok(Read::Replay);
    }
    Ok(Read::Event(NewRow {
        number: Some(EventNumber(row.get(0)?)),
        event_type: row.get(1)?,
        message_id: row.get(2)?,
        at: from_millis(row.get(3)?),
        body: Bytes::from(row.get::<_, Vec<u8>>(5)?),
        redelivered: false,
        tenant: row.get(6)?,
    }))
}

const COLUMNS: &str = "SELECT seq, type, message_id, at, only_for, body, tenant FROM event";

/// Finds runs of numbers that are missing between the events of an answer.
struct Holes {
    /// The last row that was read, and when that was stored: 0 if that is unknown.
    last: (i64, i64),
    /// When the row before the first hole and that after the last one were stored.
    found: Option<(i64, i64)>,
}

impl Holes {
    fn pass(&mut self, seq: i64, at: i64) {
        let (before, stored) = self.last;
        if seq > before + 1 {
            let from = self.found.map_or(stored, |(from, _)| from);
            self.found = Some((from, at));
        }
        self.last = (seq, at);
    }

    fn gap(&self) -> Option<Gap> {
        let (from, until) = self.found?;
        let at = |millis| if millis == 0 { SystemTime::UNIX_EPOCH } else { from_millis(millis) };
        Some(Gap {
            from: at(from),
            until: at(until),
            what: "events",
            why: "the embedded queue deleted events before history had taken them".to_owned(),
            // Replays of dead letters are among the numbers that are missing.
            missing: None,
        })
    }
}

impl EventLog for Log {
    fn get(
        &mut self,
        numbers: &[EventNumber],
        bytes: usize,
    ) -> Result<(Vec<NewRow>, usize), StoreError> {
        let found = self.reader.read(|db| {
            let mut query = db.prepare_cached(&format!("{COLUMNS} WHERE seq = ?1"))?;
            let mut rows = Vec::with_capacity(numbers.len());
            let mut size = 0;
            for (looked_up, number) in numbers.iter().enumerate() {
                if let Some(Read::Event(row)) = query.query_row([number.0], read).optional()? {
                    size += row.body.len();
                    if size > bytes && !rows.is_empty() {
                        return Ok((rows, looked_up));
                    }
                    rows.push(row);
                }
            }
            Ok((rows, numbers.len()))
        });
        found.map_err(|e| unreadable(&e))
    }

    fn after(
        &mut self,
        number: EventNumber,
        limit: usize,
        bytes: usize,
    ) -> Result<Vec<NewRow>, StoreError> {
        let (from, upto) = self.replays;
        let skips = (from..=upto).contains(&number.0);
        let start = if skips { upto } else { number.0 };
        let stored = if self.last.0 == start { self.last.1 } else { 0 };
        let mut holes = Holes { last: (start, stored), found: None };
        let found = self.reader.read(|db| {
            let mut query = db.prepare_cached(&format!("{COLUMNS} WHERE seq > ?1 ORDER BY seq"))?;
            let (mut rows, mut taken) = (Vec::new(), 0);
            let mut found = query.query([start])?;
            while let Some(row) = found.next()? {
                let (seq, at) = (row.get(0)?, row.get(3)?);
                if let Read::Event(event) = read(row)? {
                    let is_full = taken + event.body.len() > bytes && !rows.is_empty();
                    if is_full || rows.len() == limit {
                        break;
                    }
                    taken += event.body.len();
                    rows.push(event);
                }
                holes.pass(seq, at);
            }
            Ok(rows)
        });
        let rows = found.map_err(|e| unreadable(&e))?;
        self.last = holes.last;
        // Of a history that is empty nothing is known to be missing. Without an event the next
        // answer has the same gap.
        self.gap = holes.gap().filter(|_| number.0 > 0 && !rows.is_empty());
        let only_replays = rows.is_empty() && holes.found.is_none();
        let first = if skips { from } else { number.0 };
        self.replays = if only_replays { (first, holes.last.0) } else { (0, 0) };
        Ok(rows)
    }

    fn gap(&self) -> Option<Gap> {
        self.gap.clone()
    }

    fn before(
        &mut self,
        number: EventNumber,
        limit: usize,
        bytes: usize,
    ) -> Result<Vec<NewRow>, StoreError> {
        let found = self.reader.read(|db| {
            let sql = format!(
                "{COLUMNS} WHERE seq < ?1 AND (only_for IS NULL OR only_for = ?2) ORDER BY seq DESC LIMIT ?3"
            );
            let limit = i64::try_from(limit).unwrap_or(i64::MAX);
            let mut query = db.prepare_cached(&sql)?;
            let mut found = query.query(params![number.0, NOBODY, limit])?;
            let (mut rows, mut size) = (Vec::new(), 0);
            while let Some(row) = found.next()? {
                let Read::Event(row) = read(row)? else { continue };
                size += row.body.len();
                if size > bytes && !rows.is_empty() {
                    break;
                }
                rows.push(row);
            }
            Ok(rows)
        });
        found.map_err(|e| unreadable(&e))
    }

    fn count(&mut self, after: EventNumber, upto: EventNumber) -> Result<u64, StoreError> {
        let found = self.reader.read(|db| {
            // Reads no body that has pages of its own.
            db.prepare_cached(
                "SELECT count(*) FROM event WHERE seq > ?1 AND seq <= ?2 AND (only_for IS NULL OR only_for = ?3)",
            )?
            .query_row(params![after.0, upto.0, NOBODY], |r| r.get::<_, i64>(0))
        });
        found.map(i64::unsigned_abs).map_err(|e| unreadable(&e))
    }

    fn end(&mut self) -> Result<EventNumber, StoreError> {
        self.reader.read(newest).map(EventNumber).map_err(|e| unreadable(&e))
    }

    fn bounds(&mut self) -> Result<Option<(EventNumber, EventNumber)>, StoreError> {
        let found = self.reader.read(|db| {
            let mut ends = Vec::with_capacity(2);
            for order in ["ASC", "DESC"] {
                let sql = format!(
                    "SELECT seq FROM event WHERE only_for IS NULL OR only_for = ?1 ORDER BY seq {order} LIMIT 1"
                );
                let end = db.prepare_cached(&sql)?.query_row([NOBODY], |r| r.get(0)).optional()?;
                ends.extend(end.map(EventNumber));
            }
            Ok(ends)
        });
        // Between the two queries the last one may have been deleted.
        Ok(match found.map_err(|e| unreadable(&e))?[..] {
            [first, last] => Some((first, last)),
            _ => None,
        })
    }
}

fn unreadable(e: &sqlite::Error) -> StoreError {
    StoreError::new(e.to_string())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::queue::{
        Queue as _, Settlement, Settler as _,
        embedded::{
            EmbeddedQueue,
            tests::{WINDOW, config, publish, subscribers, take},
        },
    };

    /// A log of events of type `x`, with replays of dead letters at some numbers.
    async fn log(dir: &tempfile::TempDir, events: &[&str]) -> (EmbeddedQueue, Log) {
        let queue =
            EmbeddedQueue::for_daemon(&config(dir, Duration::from_secs(3600))).expect("opens");
        queue.prepare(&subscribers(&[("a", "x")])).await.expect("prepares");
        for only_for in events {
            let only_for = match *only_for {
                "event" => None,
                other => Some(other.to_owned()),
            };
            let insert = "INSERT INTO event (type, message_id, at, only_for, body) VALUES ('x', 'm', 7000, ?1, x'7b7d')";
            queue.store().write(move |db| db.execute(insert, [only_for])).await.expect("writes");
        }
        let log = queue.event_log().expect("opens");
        (queue, log)
    }

    #[tokio::test]
    async fn a_subscriber_begins_behind_its_binding_when_history_has_all_before_that() {
        let dir = tempfile::tempdir().expect("a directory");
        let (queue, _) = log(&dir, &["event", "event", "event", "a"]).await;
        let begin = async |name: &str| queue.begin(&name.into()).await.expect("reads");
        let pair = subscribers(&[("a", "x"), ("b", "x")]);
        queue.prepare(&pair).await.expect("prepares");
        assert_eq!(begin("b").await, Begin::Waits, "nothing is known");
        queue.history_position().set(EventNumber(2));
        assert_eq!(
            (begin("a").await, begin("b").await),
            (Begin::After(EventNumber(0)), Begin::Waits)
        );
        assert_eq!(begin("c").await, Begin::Waits, "it is not bound");
        queue.history_position().set(EventNumber(3));
        assert_eq!(
            begin("b").await,
            Begin::After(EventNumber(4)),
            "what dead letters left is not missing"
        );
        publish(&queue, "x", 1).await;
        let (mut source, settler) = queue.open(&pair[1], WINDOW).await.expect("opens");
        settler.settle(take(&mut source).await, Settlement::Delivered).await.expect("settles");
        publish(&queue, "x", 1).await;
        settler.settle(take(&mut source).await, Settlement::Delivered).await.expect("settles");
        assert_eq!(begin("b").await, Begin::After(EventNumber(4)), "whatever it has settled since");
        queue.prepare(&subscribers(&[("b", "#")])).await.expect("prepares");
        assert_eq!(begin("b").await, Begin::Waits, "its patterns began later");
        queue.history_position().turn_off();
        assert_eq!(begin("b").await, Begin::Waits);
    }

    fn numbers(rows: &[NewRow]) -> Vec<i64> {
        rows.iter().map(|row| row.number.expect("has one").0).collect()
    }

    #[tokio::test]
    async fn replays_of_dead_letters_are_skipped_and_what_matched_nobody_is_not() {
        let dir = tempfile::tempdir().expect("a directory");
        let all = ["event", "a", NOBODY, "event", "a", "a"];
        let (queue, mut log) = log(&dir, &all).await;
        let n = EventNumber;
        let rows = log.after(n(0), 100, usize::MAX).expect("reads");
        assert_eq!(numbers(&rows), [1, 3, 4]);
        let expected = NewRow {
            number: Some(n(1)),
            at: SystemTime::UNIX_EPOCH + Duration::from_secs(7),
            event_type: "x".to_owned(),
            message_id: Some("m".to_owned()),
            body: Bytes::from_static(b"{}"),
            redelivered: false,
            tenant: None,
        };
        assert_eq!(rows[0], expected);
        assert_eq!(numbers(&log.get(&[n(4), n(2), n(1), n(99)], 99).expect("reads").0), [4, 1]);
        assert_eq!(numbers(&log.before(n(4), 100, usize::MAX).expect("reads")), [3, 1]);
        assert_eq!(numbers(&log.before(n(7), 2, usize::MAX).expect("reads")), [4, 3]);
        assert_eq!((log.count(n(0), n(6)), log.count(n(1), n(3))), (Ok(3), Ok(1)));
        assert_eq!(log.bounds(), Ok(Some((n(1), n(4)))));
        for _ in 0..2 {
            assert_eq!(log.after(n(4), 100, usize::MAX), Ok(Vec::new()));
            assert_eq!((log.gap(), log.replays), (None, (4, 6)), "they are read once");
        }
        publish(&queue, "x", 1).await;
        assert_eq!(numbers(&log.after(n(4), 100, usize::MAX).expect("reads")), [7]);
        assert_eq!(log.gap(), None);
        assert_eq!(numbers(&log.after(n(0), 1, usize::MAX).expect("reads")), [1]);
    }

    #[tokio::test]
    async fn an_answer_has_as_many_bytes_as_it_may_or_one_event() {
        let dir = tempfile::tempdir().expect("a directory");
        let (_queue, mut log) = log(&dir, &["event"; 5]).await;
        let n = EventNumber;
        let mut after = |bytes| numbers(&log.after(n(0), 100, bytes).expect("reads"));
        assert_eq!((after(1), after(5)), (vec![1], vec![1, 2]));
        let mut before = |bytes| numbers(&log.before(n(6), 100, bytes).expect("reads"));
        assert_eq!((before(1), before(5)), (vec![5], vec![5, 4]));
        let mut get = |bytes| {
            let (rows, looked_up) = log.get(&[n(9), n(4), n(2), n(1)], bytes).expect("reads");
            (numbers(&rows), looked_up)
        };
        assert_eq!((get(1), get(5), get(6)), ((vec![4], 2), (vec![4, 2], 3), (vec![4, 2, 1], 4)));
    }

    #[tokio::test]
    async fn a_hole_is_a_gap_unless_history_is_empty() {
        let dir = tempfile::tempdir().expect("a directory");
        let (queue, mut log) = log(&dir, &["event"; 9]).await;
        let delete = "DELETE FROM event WHERE seq < 3 OR seq IN (5, 7)";
        queue.store().write(move |db| db.execute(delete, [])).await.expect("writes");
        let mut gap = |after| {
            let rows = log.after(EventNumber(after), 100, usize::MAX).expect("reads");
            (numbers(&rows), log.gap())
        };
        assert_eq!(gap(0), (vec![3, 4, 6, 8, 9], None));
        let (_, found) = gap(1);
        let found = found.expect("some are missing");
        assert_eq!((found.from, found.until), (SystemTime::UNIX_EPOCH, from_millis(7000)));
        assert_eq!(gap(8), (vec![9], None));
        assert_eq!(gap(9), (vec![], None));
    }

    #[test]
    fn the_floor_is_where_what_is_behind_it_fits() {
        let mut untaken = Untaken::default();
        assert_eq!(untaken.taken(10), 10, "counted from the position on");
        for run in [(1010, 100), (2010, 100), (3010, 100)] {
            untaken.add(run);
        }
        for (max, floor) in [(300, 10), (299, 1010), (100, 2010), (99, 3010)] {
            assert_eq!(untaken.floor(10, max), floor, "of {max} bytes");
        }
        assert_eq!(untaken.taken(2010), 3010, "counted once");
        assert_eq!((untaken.floor(2010, 100), untaken.floor(2010, 99)), (2010, 3010));
        assert_eq!(untaken.taken(5000), 5000);
        assert_eq!(untaken.floor(5000, 0), 5000);
        untaken.add((6000, 100));
        assert_eq!(untaken.taken(4000), 4000, "an earlier begin is counted from there");
        untaken.add((5000, 100));
        assert_eq!((untaken.floor(4000, 100), untaken.floor(4000, 99)), (4000, 5000));
    }
}

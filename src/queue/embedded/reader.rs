//! Reads the log for all lanes: its end, which is passed on as it grows, and the parts that lanes
//! behind that wait for.

use std::{sync::Arc, time::Duration};

use rusqlite::{Connection, OptionalExtension as _, params};
use tokio::time::{sleep, sleep_until, timeout};

use super::{
    Addressed, EmbeddedQueue,
    consumer::{QUERY_INTERVAL, SCAN, Stored},
    head::Head,
    newest,
    passes::{Pass, Passes},
    ring::Passed,
    segments::Segments,
};
use crate::{
    clock,
    delivery::SubscriberName,
    policy::retry::Backoff,
    queue::{Checked, QueueError},
    telemetry::outage::{News, Outage},
};

/// Bytes of events after which one query takes no more: they come on top of those in the ring.
const READ_BYTES: usize = 2 << 20;

/// Numbers that are read before the end of the log when a daemon starts: it is where most lanes
/// were, and what is read for them is then in memory.
const BEFORE_THE_END: i64 = 100_000;

/// Time between two looks at the retries of all lanes that have some: another process may have made
/// them due.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// The longest wait for lanes to take what was read for them. Who needs longer asks again.
const PATIENCE: Duration = Duration::from_millis(50);

/// What was read of the log.
#[derive(Debug)]
pub(super) struct Read {
    pub(super) segments: Arc<Segments>,
    pub(super) events: Vec<Passed>,
    pub(super) upto: i64,
    /// The log may have more.
    pub(super) more: bool,
    /// The subscribers that have new retries, and the number of the last retry.
    pub(super) retried: Vec<SubscriberName>,
    pub(super) last_retry: i64,
}

impl Read {
    fn new(segments: Arc<Segments>, after: i64, last_retry: i64) -> Self {
        let (events, retried) = (Vec::new(), Vec::new());
        Self { segments, events, upto: after, more: false, retried, last_retry }
    }
}

/// Lets lanes read by themselves when their reader ends, however it ends.
struct Reading<'h>(&'h Head);

impl Drop for Reading<'_> {
    fn drop(&mut self) {
        self.0.stop();
    }
}

impl EmbeddedQueue {
    /// Reads the log for all lanes.
    pub(super) async fn read_for_all(&self) {
        let mut waits = Backoff::new(Duration::from_millis(200), Duration::from_secs(10));
        let mut outage = Outage::default();
        loop {
            let reading = Reading(&self.0.head);
            let read = tokio::select! {
                read = self.pass_on(&mut waits, &mut outage) => read,
                Err(e) = self.catch_up() => Err(e),
            };
            drop(reading);
            let Err(e) = read else { return };
            // The lanes may find nothing wrong, and yet all is slower.
            if outage.failed(&e.to_string()) == News::First {
                tracing::warn!(error = %e, "the log cannot be read for all subscribers at once, so that each reads it by itself; trying again");
            }
            sleep(waits.grow()).await;
        }
    }

    async fn pass_on(&self, waits: &mut Backoff, outage: &mut Outage) -> Result<(), QueueError> {
        let mut news = self.changes();
        let (mut at, mut last_retry) = self.store().read(begin).await?;
        self.0.head.start(at);
        let (mut looked, mut to_look) = (clock::instant(), false);
        loop {
            // Before the read: a commit meanwhile must wake the wait below.
            news.borrow_and_update();
            let queue = self.clone();
            let read = self.store().read(move |db| read_on(&queue, db, at, last_retry)).await?;
            (at, last_retry) = (read.upto, read.last_retry);
            let more = read.more;
            self.0.head.push(read);
            waits.reset();
            if outage.end() {
                tracing::info!("the log is read for all subscribers at once again");
            }
            if more {
                continue;
            }
            loop {
                tokio::select! {
                    changed = news.changed() => match changed {
                        Ok(()) => break,
                        Err(_) => return Ok(()),
                    },
                    () = sleep_until((looked + LOOK_INTERVAL).into()), if to_look => {
                        self.0.head.look_at_retries();
                        (looked, to_look) = (clock::instant(), false);
                    }
                    // The poll for commits can fail.
                    () = sleep(QUERY_INTERVAL) => break,
                }
            }
            to_look = true;
        }
    }

    /// Reads for the lanes that are behind the ring.
    async fn catch_up(&self) -> Result<(), QueueError> {
        let head = &self.0.head;
        let mut passes = Passes::default();
        loop {
            let Some(pass) = head.next_pass(&mut passes) else {
                head.someone_is_behind().await;
                continue;
            };
            let queue = self.clone();
            let read = self.store().read(move |db| read_part(&queue, db, &pass)).await?;
            head.offer(read);
            timeout(PATIENCE, head.offer_is_taken()).await.ok(); // the others are asked again
            head.withdraw();
        }
    }
}

/// Where a daemon begins to read: the number of an event, and that of the last retry.
fn begin(db: &Connection) -> rusqlite::Result<(i64, i64)> {
    let oldest: Option<i64> = db.query_row("SELECT min(after) FROM segment", [], |r| r.get(0))?;
    let newest = newest(db)?;
    let retry = "SELECT seq FROM sqlite_sequence WHERE name = 'retry'";
    let last_retry = db.query_row(retry, [], |r| r.get(0)).optional()?.unwrap_or(0);
    Ok((oldest.unwrap_or(newest).clamp(newest - BEFORE_THE_END, newest), last_retry))
}

fn read_on(
    queue: &EmbeddedQueue,
    db: &Connection,
    after: i64,
    last_retry: i64,
) -> rusqlite::Result<Read> {
    // One snapshot: patterns can change at any time, and those count that held when the event was
    // stored.
    let db = db.unchecked_transaction()?;
    let mut read = Read::new(queue.segments(&db)?, after, last_retry);
    read_events(&db, &mut read, |_| true)?;
    let mut query = db.prepare_cached("SELECT id, subscriber FROM retry WHERE id > ?1")?;
    let mut rows = query.query([last_retry])?;
    while let Some(row) = rows.next()? {
        read.last_retry = row.get(0)?;
        read.retried.push(row.get(1)?);
    }
    read.retried.sort_unstable();
    read.retried.dedup();
    Ok(read)
}

fn read_part(queue: &EmbeddedQueue, db: &Connection, pass: &Pass) -> rusqlite::Result<Read> {
    let db = db.unchecked_transaction()?;
    let mut read = Read::new(queue.segments(&db)?, pass.after, 0);
    let is_known = Arc::ptr_eq(&read.segments, &pass.segments);
    read_events(&db, &mut read, |owners| !is_known || pass.is_for(owners))?;
    Ok(read)
}

/// Reads the events that are for somebody, and `wanted` by the subscribers that they are for.
fn read_events(
    db: &Connection,
    read: &mut Read,
    wanted: impl Fn(&[u32]) -> bool,
) -> rusqlite::Result<()> {
    let mut query = db.prepare_cached(
        "SELECT seq, type, only_for, message_id, at, traceparent, iif(only_for = '', x'', body), iif(only_for = '', NULL, tenant) FROM event \
         WHERE seq > ?1 ORDER BY seq LIMIT ?2",
    )?;
    let mut rows = query.query(params![read.upto, SCAN])?;
    let (mut count, mut bytes) = (0, 0);
    while let Some(row) = rows.next()? {
        if bytes >= READ_BYTES {
            read.more = true;
            return Ok(());
        }
        count += 1;
        read.upto = row.get(0)?;
        let owners = read
            .segments
            .owners(read.upto, &Addressed::read(row, row.get_ref(7)?.as_str_or_null()?)?);
        // What history alone has was read without its bytes: that may be most of the log.
        if !owners.is_empty() && wanted(&owners) {
            let mut event = Stored::read(row, read.upto)?;
            event.checked = Some(Checked::of(&event.body));
            let passed = Passed { owners, event };
            bytes += passed.bytes();
            read.events.push(passed);
        }
    }
    read.more = count == SCAN;
    if !read.more {
        read.upto = read.upto.max(newest(db)?);
    }
    Ok(())
}

//! The source and the settler of a subscriber's part of the database.
//!
//! A source takes events that were read for all by [`Head`], and reads the log by itself only when no
//! one does that. It queries its retries when it may have some that are due.

use std::{
    collections::{BTreeSet, HashMap, HashSet, VecDeque},
    ops::RangeInclusive,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use bytes::Bytes;
use rusqlite::{Connection, OptionalExtension as _, Row, Rows, params};
use tokio::sync::{Mutex as AsyncMutex, Notify, watch};

use super::{
    EmbeddedQueue, Filter,
    budget::{COST, Share},
    from_millis,
    head::{Head, Offered, Pulled},
    keep::Keeper,
    millis, newest, other_tenant, parse_patterns,
    store::Store,
    tenant_of,
};
use crate::{
    clock,
    config::Subscriber,
    delivery::{
        AttemptLog, Batch, DeadLetter, MessageKind, Print, Prints, SubscriberName, cut_error,
    },
    event::{InvalidEvent, Pattern, Tenant, payload::Format},
    queue::{
        self, Checked, Event, FEWEST, MOST_BYTES, QueueError, Receipt, SettleError, Settlement,
        Taken, Window,
    },
};

/// Rows of the log that one query reads: a pattern that matches little must not hold up other
/// readers.
pub(super) const SCAN: u32 = 1000;

/// The longest time between two queries.
pub(super) const QUERY_INTERVAL: Duration = Duration::from_secs(5);

/// Events that the stored cursor may lag behind the scan while nothing matches.
const MAX_CURSOR_LAG: i64 = 10_000;

/// Time that it may lag.
const MAX_CURSOR_AGE: Duration = Duration::from_secs(5);

/// A difference of the clocks above which the wall clock was set; a smaller one corrects its pace.
const CLOCK_STEP: Duration = Duration::from_secs(1);

/// What an event counts for that is to be read for a lane.
const READ: usize = 1024;

/// Bytes of events after which one query takes no more.
const QUERY_BYTES: usize = 16 << 20;

/// A range of the log with the patterns that hold there.
#[derive(Debug)]
struct Segment {
    patterns: Arc<[Pattern]>,
    after: i64,
    /// `i64::MAX`: the segment is open.
    upto: i64,
}

/// The state that source and settler share.
#[derive(Debug)]
pub(super) struct Shared {
    store: Store,
    keeper: Arc<Keeper>,
    pub(super) subscriber: SubscriberName,
    /// The tenant whose events it gets; `None`: those of all.
    pub(super) tenant: Option<Tenant>,
    taken: Mutex<TakenMessages>,
    /// Held over a write of how far it is, so that the cursor only rises.
    pub(super) writing: AsyncMutex<()>,
    /// What it has in hand, of the memory of all lanes.
    share: Share,
    /// There may be something to take, or room for more.
    wake: Arc<Notify>,
    /// Counts what may be a change of its retries.
    retries_changed: AtomicU64,
    /// A retry has a time that has not come.
    waits_for_a_retry: AtomicBool,
    /// Nothing overtakes a batch that failed.
    in_order: bool,
}

/// An event as it is in the log.
#[derive(Debug, Clone)]
pub(super) struct Stored {
    pub(super) seq: i64,
    pub(super) message_id: Option<String>,
    pub(super) at: i64,
    pub(super) traceparent: Option<String>,
    pub(super) body: Bytes,
    /// Once for all lanes that take it.
    pub(super) checked: Option<Checked>,
}

impl Stored {
    /// Reads a row whose columns from the fourth on are `message_id, at, traceparent, body`.
    pub(super) fn read(row: &Row<'_>, seq: i64) -> rusqlite::Result<Self> {
        Ok(Self {
            seq,
            message_id: row.get(3)?,
            at: row.get(4)?,
            traceparent: row.get(5)?,
            body: Bytes::copy_from_slice(row.get_ref(6)?.as_blob()?),
            checked: None,
        })
    }

    /// The bytes of its texts.
    pub(super) fn bytes(&self) -> usize {
        let texts = [&self.message_id, &self.traceparent].into_iter().flatten();
        let why = match &self.checked {
            Some(Checked { timestamp: Err(InvalidEvent::NotJson(why)), .. }) => why.len(),
            _ => 0,
        };
        self.body.len() + texts.map(String::len).sum::<usize>() + why
    }

    /// An event of which only the number counts.
    #[cfg(test)]
    pub(super) fn numbered(seq: i64) -> Self {
        let (message_id, traceparent) = (None, None);
        Self { seq, message_id, at: 0, traceparent, body: Bytes::new(), checked: None }
    }

    fn to_event(&self) -> Event {
        Event {
            body: self.body.clone(),
            message_id: self.message_id.clone(),
            content_type: None,
            published_at: Some(from_millis(self.at)).filter(|at| clock::is_sane(*at, clock::now())),
            traceparent: self.traceparent.clone(),
            checked: self.checked.clone().unwrap_or_else(|| Checked::of(&self.body)),
            number: Some(self.seq.unsigned_abs()),
            receipt: Receipt { from: MessageKind::Event, tag: self.seq.unsigned_abs() },
        }
    }
}

/// How far a session has read, held fast.
pub(super) struct Position<'l>(MutexGuard<'l, TakenMessages>);

impl Position<'_> {
    pub(super) fn scanned(&self) -> i64 {
        self.0.scanned
    }

    /// Nothing up to this number is for it that it has not taken.
    pub(super) fn scan_to(&mut self, seq: i64) {
        self.0.scanned = self.0.scanned.max(seq);
    }

    /// Of a session that has taken all up to this number: whether its stored cursor is elsewhere.
    /// `None`: it has something unsettled.
    pub(super) fn idle_at(&mut self, upto: i64) -> Option<bool> {
        self.scan_to(upto);
        let taken = &self.0;
        taken.events.is_empty().then_some(taken.scanned > taken.cursor)
    }

    /// What the database does not have of how far it is. Counts as stored from now on, unless
    /// that is [not so](Self::not_stored).
    pub(super) fn store_now(&mut self) -> Option<Reached> {
        self.0.is_unstored = false;
        self.0.reached(&BTreeSet::new())
    }

    pub(super) fn not_stored(&mut self) {
        self.0.is_unstored = true;
    }

    pub(super) fn is_unstored(&self) -> bool {
        self.0.is_unstored
    }

    pub(super) fn stored(&mut self, reached: Reached) {
        self.0.stored(reached);
    }

    /// The session ends: more would only be delivered without a record.
    pub(super) fn refuse(&mut self, why: String) {
        self.0.refused = Some(why);
    }
}

/// The unsettled messages.
#[derive(Debug, Default)]
struct TakenMessages {
    /// The events in their order, and whether each is settled.
    events: VecDeque<(i64, bool)>,
    /// The bytes of each unsettled event, and of all of them.
    open: HashMap<i64, usize>,
    open_bytes: usize,
    /// The scan has read the log up to here.
    scanned: i64,
    /// The cursor that the database has.
    cursor: i64,
    /// Settled beyond the cursor in earlier sessions.
    ahead: Runs,
    /// All that is settled beyond the cursor, as the database has it.
    written: Vec<RangeInclusive<i64>>,
    /// Something is settled that the database does not have.
    is_unstored: bool,
    /// Why that could not be stored.
    refused: Option<String>,
    /// The bytes of each unsettled batch.
    envelopes: HashMap<i64, usize>,
}

/// How far a session is, for the database.
#[derive(Debug, Clone)]
pub(super) struct Reached {
    /// `None`: as it was.
    cursor: Option<i64>,
    ahead: Option<Vec<RangeInclusive<i64>>>,
}

impl Reached {
    pub(super) fn store(&self, db: &Connection, subscriber: &str) -> rusqlite::Result<()> {
        if let Some(runs) = &self.ahead {
            set_ahead(db, subscriber, runs)?;
        }
        self.cursor.map_or(Ok(()), |cursor| set_cursor(db, subscriber, cursor))
    }
}

/// The number and the bytes of unsettled events.
#[derive(Debug, Clone, Copy, Default)]
struct Load {
    events: usize,
    bytes: usize,
}

impl Load {
    /// What they take of the memory of all lanes.
    fn cost(self) -> usize {
        self.bytes + self.events * COST
    }

    /// Whether one more of this size may be taken.
    fn allows(self, bytes: usize) -> bool {
        self.events < FEWEST.into() || (self.bytes + bytes) as u64 <= MOST_BYTES
    }
}

/// Runs of numbers of the log, the first and the last of each.
type Runs = Arc<[RangeInclusive<i64>]>;

impl TakenMessages {
    /// The events that are settled beyond a cursor once these are: they must not be redelivered
    /// when the session ends. A run has no unsettled event of this subscriber.
    fn runs_after(&self, finished: &BTreeSet<i64>, cursor: i64) -> Vec<RangeInclusive<i64>> {
        let mut runs: Vec<_> =
            self.ahead.iter().filter(|run| *run.end() > cursor).cloned().collect();
        let mut run: Option<RangeInclusive<i64>> = None;
        for (seq, done) in self.events.iter().filter(|(seq, _)| *seq > cursor) {
            run = match (run, *done || finished.contains(seq)) {
                (Some(run), true) => Some(*run.start()..=*seq),
                (None, true) => Some(*seq..=*seq),
                (run, false) => {
                    runs.extend(run);
                    None
                }
            };
        }
        runs.extend(run);
        runs
    }

    /// The cursor once these are settled too.
    fn cursor_after(&self, finished: &BTreeSet<i64>) -> i64 {
        let is_open = |(seq, done): &&(i64, bool)| !done && !finished.contains(seq);
        self.events.iter().find(is_open).map_or(self.scanned, |(seq, _)| seq - 1).max(self.cursor)
    }

    fn take(&mut self, event: &Event) {
        let (seq, bytes) = (event.receipt.tag.cast_signed(), event.body.len());
        self.events.push_back((seq, false));
        self.open.insert(seq, bytes);
        self.open_bytes += bytes;
    }

    fn held(&self) -> Load {
        Load { events: self.open.len(), bytes: self.open_bytes }
    }

    /// What the database does not have, once these are settled too.
    fn reached(&self, finished: &BTreeSet<i64>) -> Option<Reached> {
        let cursor = self.cursor_after(finished);
        let runs = self.runs_after(finished, cursor);
        let cursor = Some(cursor).filter(|cursor| *cursor > self.cursor);
        let ahead = Some(runs).filter(|runs| *runs != self.written);
        (cursor.is_some() || ahead.is_some()).then_some(Reached { cursor, ahead })
    }

    fn stored(&mut self, reached: Reached) {
        self.cursor = self.cursor.max(reached.cursor.unwrap_or(self.cursor));
        self.written = reached.ahead.unwrap_or_else(|| std::mem::take(&mut self.written));
    }

    /// Returns what of them was unsettled until now.
    fn finish(&mut self, finished: &BTreeSet<i64>) -> Load {
        for (seq, done) in &mut self.events {
            *done |= finished.contains(seq);
        }
        while self.events.front().is_some_and(|(_, done)| *done) {
            self.events.pop_front();
        }
        let mut load = Load::default();
        for bytes in finished.iter().filter_map(|seq| self.open.remove(seq)) {
            load.events += 1;
            load.bytes += bytes;
        }
        self.open_bytes -= load.bytes;
        load
    }
}

/// The unsettled messages of a lane, by their numbers in the database.
#[derive(Debug, Default)]
pub(super) struct Unsettled {
    pub(super) events: HashSet<i64>,
    pub(super) envelopes: HashSet<i64>,
}

/// A reference to a session, valid as long as that lasts.
#[derive(Debug)]
pub(super) struct LaneRef(Weak<Shared>);

impl LaneRef {
    /// `None` once the session has ended: its unsettled messages are in the queue.
    pub(super) fn held(&self) -> Option<Unsettled> {
        let shared = self.0.upgrade()?;
        let taken = shared.taken();
        let events = taken.open.keys().copied().collect();
        Some(Unsettled { events, envelopes: taken.envelopes.keys().copied().collect() })
    }
}

impl Shared {
    fn taken(&self) -> MutexGuard<'_, TakenMessages> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn position(&self) -> Position<'_> {
        Position(self.taken())
    }

    pub(super) fn wake(&self) {
        self.wake.notify_one();
    }

    pub(super) fn look_at_retries(&self) {
        self.retries_changed.fetch_add(1, Ordering::Release);
        self.wake();
    }

    /// Counts what may be a change of its retries.
    pub(super) fn count_of_retries(&self) -> u64 {
        self.retries_changed.load(Ordering::Acquire)
    }

    pub(super) fn waits_for_a_retry(&self) -> bool {
        self.waits_for_a_retry.load(Ordering::Relaxed)
    }
}

pub(super) async fn open(
    queue: &EmbeddedQueue,
    configured: &Subscriber,
    window: Window,
) -> Result<(Source, Settler), QueueError> {
    let store = queue.store().clone();
    let (head, news) = (queue.0.head.clone(), queue.changes());
    let (subscriber, tenant) = (&configured.name, configured.tenant.clone());
    let name = subscriber.clone();
    queue.keep_of(subscriber).await?;
    // Read on the writing thread, in the order of writes: those that a panicked lane had begun are
    // included.
    let began = (clock::instant(), clock::now());
    let now = millis(began.1);
    let open = move |db: &Connection| {
        reschedule(db, &name, now)?;
        Ok((segments(db, &name)?, ahead(db, &name)?, tenant_of(db, &name)?))
    };
    let (segments, runs, recorded) = store.write(open).await?;
    // What is left of it is another tenant's: none of that may be sent.
    if recorded != tenant {
        return Err(QueueError::needs_operator(other_tenant(
            subscriber,
            recorded.as_ref(),
            tenant.as_ref(),
        )));
    }
    let cursor = segments.first().map_or(0, |s| s.after);
    let wake = Arc::new(Notify::new());
    let shared = Arc::new(Shared {
        store,
        keeper: queue.0.keeper.clone(),
        subscriber: subscriber.clone(),
        tenant,
        taken: Mutex::new(TakenMessages {
            scanned: cursor,
            cursor,
            ahead: runs.clone().into(),
            written: runs,
            ..TakenMessages::default()
        }),
        writing: AsyncMutex::default(),
        share: Share::new(&queue.0.budget, wake.clone()),
        wake,
        retries_changed: AtomicU64::new(1),
        waits_for_a_retry: AtomicBool::new(false),
        in_order: configured.in_order,
    });
    head.join(&shared);
    let source = Source {
        shared: shared.clone(),
        head,
        news,
        window,
        retries: Retries::default(),
        behind_since: None,
        clocks_read: began,
    };
    Ok((source, Settler(shared)))
}

/// Reschedules retries after the clock was set back: otherwise they would wait as much longer as it
/// was ahead.
fn reschedule(db: &Connection, subscriber: &str, now: i64) -> rusqlite::Result<()> {
    db.prepare_cached("UPDATE retry SET due = due - (scheduled_at - ?2), scheduled_at = ?2 WHERE subscriber = ?1 AND scheduled_at > ?2")?
        .execute(params![subscriber, now])?;
    Ok(())
}

/// The events that a subscriber has settled beyond its cursor.
pub(super) fn ahead(
    db: &Connection,
    subscriber: &str,
) -> rusqlite::Result<Vec<RangeInclusive<i64>>> {
    db.prepare_cached("SELECT first, last FROM ahead WHERE subscriber = ?1 ORDER BY first")?
        .query_map([subscriber], |r| Ok(r.get(0)?..=r.get(1)?))?
        .collect()
}

fn segments(db: &Connection, subscriber: &str) -> rusqlite::Result<Vec<Segment>> {
    db.prepare("SELECT patterns, after, coalesce(upto, 9223372036854775807) FROM segment WHERE subscriber = ?1 ORDER BY after")?
        .query_map([subscriber], |r| {
            Ok(Segment { patterns: parse_patterns(&r.get::<_, String>(0)?).into(), after: r.get(1)?, upto: r.get(2)? })
        })?
        .collect()
}

#[derive(Debug)]
pub struct Source {
    shared: Arc<Shared>,
    head: Arc<Head>,
    news: watch::Receiver<u64>,
    window: Window,
    retries: Retries,
    /// When the stored cursor began to lag behind the scan.
    behind_since: Option<Instant>,
    /// The time by both clocks, of which one can be set.
    clocks_read: (Instant, SystemTime),
}

/// The result of a query.
#[derive(Default)]
struct Found {
    envelopes: Vec<(i64, Result<Batch, DeadLetter>)>,
    events: Vec<Event>,
    scanned: i64,
    /// The log may have more than was read.
    more: bool,
    /// What it has found of the retries; `None` if it had no room for one.
    retries: Option<Retries>,
}

/// What is known of the retries that a lane has not taken.
#[derive(Debug, Clone, Copy, Default)]
struct Retries {
    /// The count of changes up to which they are known.
    seen: u64,
    /// When the next one is due, in Unix milliseconds.
    next_due: Option<i64>,
    /// One of them, taken or not, is one that nothing may overtake.
    hold_events: bool,
}

/// What a query is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Query {
    Retries,
    /// Retries, and so many events.
    Both(usize),
}

impl queue::Source for Source {
    async fn take(&mut self, into: &mut Vec<Taken>, max: usize) -> Result<(), QueueError> {
        loop {
            // Before the query: a commit meanwhile must wake the wait below.
            self.news.borrow_and_update();
            let before = into.len();
            if let Some(why) = self.shared.taken().refused.take() {
                return Err(QueueError::unwritable(why));
            }
            self.mind_the_clock().await?;
            if self.may_have_due_retries() {
                let allowed = self.shared.share.may_take();
                let found = self.query(Query::Retries, allowed.unwrap_or(0)).await?;
                self.hand_over(found, into);
                // They come before events: a lane that stands in line for them takes none of either.
                if allowed.is_none() && self.may_have_due_retries() {
                    self.shared.wake.notified().await;
                    continue;
                }
            }
            if self.retries.hold_events {
                if into.len() > before {
                    return Ok(());
                }
                // Who takes nothing stands in nobody's way.
                self.shared.share.took(0);
                // What wakes it may fail: query again every few seconds.
                if tokio::time::timeout(QUERY_INTERVAL, self.woken()).await.is_err() {
                    self.shared.look_at_retries();
                }
                continue;
            }
            let pulled = self.pull(max, into);
            if into.len() > before {
                return Ok(());
            }
            if pulled == Pulled::Retries {
                continue;
            }
            if !matches!(pulled, Pulled::Alone | Pulled::Tenant) {
                self.woken().await;
                continue;
            }
            let Some(allowed) = self.shared.share.may_take() else {
                self.shared.wake.notified().await;
                continue;
            };
            let found = self.query(Query::Both(max), allowed).await?;
            // It goes on with the ring, where it has come to; and waits for room where it has not.
            let has_moved = found.scanned > self.shared.taken().scanned;
            let more = found.more || (pulled == Pulled::Tenant && has_moved);
            self.hand_over(found, into);
            self.shared.share.took(0);
            if into.len() > before {
                return Ok(());
            }
            let advance = self.advance().await;
            if more {
                continue;
            }
            let advance = async {
                match advance {
                    Some(at) => tokio::time::sleep_until(at.into()).await,
                    None => std::future::pending().await,
                }
            };
            // The poll for commits can fail: query again every few seconds.
            let next_due = self.retries.next_due.filter(|_| self.has_room_for_retries());
            let due = tokio::time::sleep(next_due.map_or(QUERY_INTERVAL, until_due));
            tokio::select! {
                changed = self.news.changed() => {
                    if changed.is_err() {
                        return Err(QueueError::new("the embedded queue was closed"));
                    }
                }
                () = self.shared.wake.notified() => {}
                () = due => {}
                () = advance => {}
            }
        }
    }

    fn is_full(&self) -> bool {
        // Another query could be too much; it comes soon enough, since that many bytes are more
        // than the batches in flight.
        !self.shared.taken().held().allows(QUERY_BYTES)
    }

    async fn close(self) {
        // Who opens it next finds it there; and if this fails, what is not stored is kept until then.
        self.shared.keeper.store(std::slice::from_ref(&self.shared)).await.ok();
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        self.head.leave(&self.shared);
    }
}

/// The time to the next query for a retry that is due at this time: the clock can be set, so a query
/// follows every few seconds.
fn until_due(at: i64) -> Duration {
    let until_due = from_millis(at).duration_since(clock::now()).unwrap_or_default();
    until_due.clamp(Duration::from_millis(5), QUERY_INTERVAL)
}

impl Source {
    /// Whether a query would find retries that are due, or that were not known.
    fn may_have_due_retries(&self) -> bool {
        let Retries { seen, next_due, .. } = self.retries;
        let have_changed = self.shared.count_of_retries() != seen;
        (have_changed || next_due.is_some_and(|at| at <= millis(clock::now())))
            && self.has_room_for_retries()
    }

    fn has_room_for_retries(&self) -> bool {
        self.shared.taken().envelopes.len() < usize::from(self.window.envelopes)
    }

    /// Until there may be something to take, or room for more, as those who read for it say.
    async fn woken(&self) {
        let next_due = self.retries.next_due.filter(|_| self.has_room_for_retries());
        let due = async {
            match next_due {
                Some(at) => tokio::time::sleep(until_due(at)).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = self.shared.wake.notified() => {}
            () = due => {}
        }
    }

    /// Takes what the ring has for this subscriber.
    pub(super) fn pull(&self, max: usize, into: &mut Vec<Taken>) -> Pulled {
        let (window, before) = (usize::from(self.window.events), into.len());
        let seen = self.has_room_for_retries().then_some(self.retries.seen);
        let has_room = {
            let taken = self.shared.taken();
            max > 0 && taken.events.len() < window && taken.held().allows(0)
        };
        let share = &self.shared.share;
        let room = || has_room && share.reserve(window.min(max) * READ);
        let (mut allowed, mut cost) = (None, 0);
        let pulled = self.head.pull(&self.shared, seen, room, |position, stored| {
            let taken = &mut *position.0;
            if taken.ahead.iter().any(|run| run.contains(&stored.seq)) {
                return Offered::Known;
            }
            let has_room = into.len() - before < max && taken.events.len() < window;
            if !has_room || !taken.held().allows(stored.body.len()) {
                return Offered::Refused;
            }
            // Asked only for an event: a lane that needs nothing stands in nobody's way.
            if allowed.is_none() {
                allowed = share.may_take();
            }
            let next = cost + stored.body.len() + COST;
            if allowed.is_none_or(|most| cost > 0 && next > most) {
                return Offered::Refused;
            }
            cost = next;
            let event = stored.to_event();
            taken.take(&event);
            into.push(Taken::Event(event));
            Offered::Taken
        });
        // Otherwise it has taken nothing yet, and its turn goes on.
        if pulled == Pulled::Taken {
            share.took(cost);
        }
        pulled
    }

    /// Keeps retries from waiting longer because the clock was set back.
    async fn mind_the_clock(&mut self) -> Result<(), QueueError> {
        let (instant, time) = (clock::instant(), clock::now());
        let (last_instant, last_time) = self.clocks_read;
        if time + CLOCK_STEP < last_time + (instant - last_instant) {
            let subscriber = self.shared.subscriber.clone();
            self.shared.store.write(move |db| reschedule(db, &subscriber, millis(time))).await?;
            self.shared.look_at_retries();
        }
        self.clocks_read = (instant, time);
        Ok(())
    }

    /// Queries due retries, and events as far as there is room for them, until they have so many
    /// bytes; with none it finds out when the next retry is due. Changes nothing, so that it can be
    /// dropped while it waits.
    async fn query(&self, query: Query, most: usize) -> Result<Found, QueueError> {
        // Before the query: a change meanwhile must be looked at again.
        let seen = self.shared.count_of_retries();
        let (scanned, events_room, load, held, ahead) = {
            let taken = self.shared.taken();
            let room = usize::from(self.window.events).saturating_sub(taken.events.len());
            (
                taken.scanned,
                if let Query::Both(max) = query { room.min(max) } else { 0 },
                taken.held(),
                taken.envelopes.keys().copied().collect::<Vec<_>>(),
                taken.ahead.clone(),
            )
        };
        let envelopes_room = usize::from(self.window.envelopes).saturating_sub(held.len());
        let (subscriber, tenant) = (self.shared.subscriber.clone(), self.shared.tenant.clone());
        let now = millis(clock::now());
        let in_order = self.shared.in_order;
        self.shared
            .store
            .read(move |db| {
                // One snapshot: patterns can change at any time, and those count that held when the
                // event was stored.
                let db = db.unchecked_transaction()?;
                let mut found = Found { scanned, ..Found::default() };
                if envelopes_room > 0 {
                    let (room, into) = ((envelopes_room, most), &mut found.envelopes);
                    let due = if in_order { due_in_order } else { due };
                    let retries = due(&db, &subscriber, now, &held, room, into)?;
                    found.retries = Some(Retries { seen, ..retries });
                    if retries.hold_events {
                        return Ok(found);
                    }
                }
                if events_room == 0 {
                    return Ok(found);
                }
                let mut segments =
                    segments(&db, &subscriber)?.into_iter().filter(|s| scanned < s.upto);
                if let Some(Segment { patterns, after, upto }) = segments.next() {
                    let tenant = tenant.as_ref();
                    let filter = Filter { subscriber: &subscriber, tenant, patterns: &patterns };
                    let end = scan(
                        &db,
                        &filter,
                        &ahead,
                        after.max(scanned),
                        upto,
                        (events_room, most, load),
                        &mut found,
                    )?;
                    found.more |= end && segments.next().is_some();
                }
                Ok(found)
            })
            .await
    }

    fn hand_over(&mut self, found: Found, into: &mut Vec<Taken>) {
        if let Some(retries) = found.retries {
            self.retries = retries;
            let waits = retries.next_due.is_some();
            self.shared.waits_for_a_retry.store(waits, Ordering::Relaxed);
        }
        let mut taken = self.shared.taken();
        taken.scanned = taken.scanned.max(found.scanned);
        let mut cost = 0;
        for (id, envelope) in found.envelopes {
            let body = match &envelope {
                Ok(batch) => &batch.body,
                Err(letter) => &letter.body,
            };
            cost += body.len() + COST;
            taken.envelopes.insert(id, body.len());
            let receipt = Receipt { from: MessageKind::Batch, tag: id.unsigned_abs() };
            into.push(match envelope {
                Ok(envelope) => Taken::Batch(envelope, receipt),
                Err(letter) => Taken::Unusable(letter, receipt),
            });
        }
        for event in found.events {
            cost += event.body.len() + COST;
            taken.take(&event);
            into.push(Taken::Event(event));
        }
        drop(taken);
        self.shared.share.takes(cost);
    }

    /// Stores how far the log was scanned when nothing of it was for this subscriber, so that it
    /// can be trimmed. Returns when to call it again, if that is still to be done.
    async fn advance(&mut self) -> Option<Instant> {
        let (cursor, behind) = {
            let taken = self.shared.taken();
            let cursor = taken.cursor_after(&BTreeSet::new());
            // Unsettled events move the cursor when they are settled.
            (cursor, if taken.events.is_empty() { cursor - taken.cursor } else { 0 })
        };
        if behind == 0 {
            self.behind_since = None;
            return None;
        }
        let now = clock::instant();
        let due = *self.behind_since.get_or_insert(now) + MAX_CURSOR_AGE;
        if behind <= MAX_CURSOR_LAG && now < due {
            return Some(due);
        }
        let _writing = self.shared.writing.lock().await;
        let subscriber = self.shared.subscriber.clone();
        let written = self.shared.store.write(move |db| set_cursor(db, &subscriber, cursor)).await;
        // A failure is no reason to end a session: nothing waits for the write.
        self.behind_since = written.is_err().then_some(now);
        if written.is_ok() {
            let mut taken = self.shared.taken();
            taken.cursor = taken.cursor.max(cursor);
        }
        self.behind_since.map(|since| since + MAX_CURSOR_AGE)
    }
}

/// The columns of a batch that waits.
const ENVELOPE: &str = "id, due, batch_id, content_type, events, attempts, first_attempt_at, body, story, replay, traceparent, prints";

/// Takes due retries, the longest due first.
fn due(
    db: &Connection,
    subscriber: &str,
    now: i64,
    held: &[i64],
    (room, most): (usize, usize),
    into: &mut Vec<(i64, Result<Batch, DeadLetter>)>,
) -> rusqlite::Result<Retries> {
    let mut query = db.prepare_cached(&format!(
        "SELECT {ENVELOPE} FROM retry WHERE subscriber = ?1 ORDER BY due, id"
    ))?;
    let rows = query.query([subscriber])?;
    let next_due = due_of(rows, now, held, (room, most), into)?;
    Ok(Retries { next_due, ..Retries::default() })
}

/// Takes of the retries the one whose events come first, when it is due; then those that are due and
/// that an operator sent again. The parts of a batch are in the order of their ids.
fn due_in_order(
    db: &Connection,
    subscriber: &str,
    now: i64,
    held: &[i64],
    (room, most): (usize, usize),
    into: &mut Vec<(i64, Result<Batch, DeadLetter>)>,
) -> rusqlite::Result<Retries> {
    let first: Option<i64> = db
        .prepare_cached(
            "SELECT id FROM retry WHERE subscriber = ?1 AND NOT replay ORDER BY seq, batch_id LIMIT 1",
        )?
        .query_row([subscriber], |row| row.get(0))
        .optional()?;
    let by_id = format!("SELECT {ENVELOPE} FROM retry WHERE id = ?1");
    let mut by_id = db.prepare_cached(&by_id)?;
    let first_due = due_of(by_id.query([first])?, now, held, (room, most), into)?;
    let replays =
        format!("SELECT {ENVELOPE} FROM retry WHERE subscriber = ?1 AND replay ORDER BY due, id");
    let mut replays = db.prepare_cached(&replays)?;
    let replay_due = due_of(replays.query([subscriber])?, now, held, (room, most), into)?;
    let next_due = [first_due, replay_due].into_iter().flatten().min();
    Ok(Retries { next_due, hold_events: first.is_some(), ..Retries::default() })
}

/// Takes those of the rows that are due. Returns when the next one is.
fn due_of(
    mut rows: Rows<'_>,
    now: i64,
    held: &[i64],
    (room, most): (usize, usize),
    into: &mut Vec<(i64, Result<Batch, DeadLetter>)>,
) -> rusqlite::Result<Option<i64>> {
    let mut bytes = 0;
    while let Some(row) = rows.next()? {
        let id: i64 = row.get(0)?;
        if held.contains(&id) {
            continue;
        }
        let due: i64 = row.get(1)?;
        if due > now || into.len() == room || bytes >= most {
            return Ok(Some(due));
        }
        bytes += row.get_ref(7)?.as_blob()?.len() + COST;
        into.push((id, envelope(row)?));
    }
    Ok(None)
}

fn envelope(row: &Row<'_>) -> rusqlite::Result<Result<Batch, DeadLetter>> {
    let content_type: String = row.get(3)?;
    let format = Format::labelled(&content_type);
    let first_attempt_at = row.get::<_, Option<i64>>(6)?.map(from_millis);
    let (id, events, attempts, body) = (
        row.get::<_, String>(2)?,
        row.get(4)?,
        row.get(5)?,
        Bytes::from(row.get::<_, Vec<u8>>(7)?),
    );
    let (attempt_log, replay) = (read_attempt_log(row, 8)?, row.get(9)?);
    let prints = read_prints(row, 11, events)?;
    Ok(match format {
        Some(format) => Ok(Batch {
            id: id.into(),
            body,
            format,
            events,
            attempts,
            first_attempt_at,
            attempt_log,
            prints,
            replay,
            traceparent: row.get(10)?,
        }),
        None => {
            let error = format!(
                "a retry is not an envelope: its content type `{content_type}` is not that of a batch"
            );
            let (content_type, now) = (Some(content_type), clock::now());
            let letter = DeadLetter::not_a_batch(body, content_type, Some(id), error, now);
            Err(DeadLetter { events, attempts, first_attempt_at, attempt_log, ..letter })
        }
    })
}

/// The attempt log that was stored with a batch or a dead letter.
pub(super) fn read_attempt_log(row: &Row<'_>, column: usize) -> rusqlite::Result<AttemptLog> {
    Ok(row.get_ref(column)?.as_str_or_null()?.map(AttemptLog::from_text).unwrap_or_default())
}

/// The prints that were stored with a batch or a dead letter of `events` events.
pub(super) fn read_prints(row: &Row<'_>, column: usize, events: u32) -> rusqlite::Result<Prints> {
    let stored = row.get_ref(column)?.as_blob().ok();
    Ok(stored.and_then(|bytes| Print::read_bytes(bytes, events)))
}

fn attempt_log_text(log: &AttemptLog) -> Option<String> {
    (!log.is_empty()).then(|| log.to_text())
}

/// Scans a segment; true if it has reached the segment's end.
fn scan(
    db: &Connection,
    filter: &Filter<'_>,
    ahead: &[RangeInclusive<i64>],
    after: i64,
    upto: i64,
    (room, most, mut load): (usize, usize, Load),
    found: &mut Found,
) -> rusqlite::Result<bool> {
    // The bytes of what history alone has are not read: they may be most of the log.
    let columns = "seq, type, only_for, message_id, at, traceparent, iif(only_for = '', x'', body)";
    let mut query = db.prepare_cached(&format!("{} LIMIT {SCAN}", filter.select(columns)))?;
    let mut rows = filter.query(&mut query, after, upto)?;
    let mut scanned = 0;
    let mut bytes = 0;
    while let Some(row) = rows.next()? {
        if found.events.len() == room || bytes >= QUERY_BYTES.min(most) {
            return Ok(false);
        }
        scanned += 1;
        let seq: i64 = row.get(0)?;
        let is_settled = || ahead.iter().any(|run| run.contains(&seq));
        let is_wanted = filter.wants(&filter.addressed(row)?) && !is_settled();
        if is_wanted && !load.allows(row.get_ref(6)?.as_blob()?.len()) {
            return Ok(false);
        }
        found.scanned = seq;
        if is_wanted {
            let stored = Stored::read(row, seq)?;
            let size = stored.body.len();
            bytes += size + COST;
            load = Load { events: load.events + 1, bytes: load.bytes + size };
            found.events.push(stored.to_event());
        }
    }
    found.more = scanned == SCAN;
    if !found.more {
        // The end of the segment, or of the log: its last numbers may have no event any more.
        let end = if upto == i64::MAX { newest(db)? } else { upto };
        found.scanned = found.scanned.max(end);
    }
    Ok(!found.more)
}

#[derive(Debug, Clone)]
pub struct Settler(Arc<Shared>);

impl Settler {
    pub(super) fn lane(&self) -> LaneRef {
        LaneRef(Arc::downgrade(&self.0))
    }
}

impl queue::Settler for Settler {
    async fn settle(
        &self,
        receipts: Vec<Receipt>,
        settlement: Settlement,
    ) -> Result<(), SettleError> {
        let shared = &self.0;
        let of =
            |kind| receipts.iter().filter(move |r| r.from == kind).map(|r| r.tag.cast_signed());
        let events: BTreeSet<i64> = of(MessageKind::Event).collect();
        let envelopes: Vec<i64> = of(MessageKind::Batch).collect();
        // Nothing but the cursor says so, and a write for each batch costs more than its request.
        if envelopes.is_empty() && matches!(settlement, Settlement::Delivered) {
            let mut settled = Load::default();
            let is_left_to_keeper = shared.keeper.settle(shared, |position| {
                settled = position.0.finish(&events);
            });
            if is_left_to_keeper {
                shared.share.settled(settled.cost());
                shared.wake();
                return Ok(());
            }
        }
        // A task of its own: who is dropped meanwhile knows nothing of what is stored all the same, and
        // the next write of how far the lane is would undo that.
        tokio::spawn(shared.clone().settle(events, envelopes, settlement))
            .await
            .unwrap_or_else(|e| Err(SettleError::Unconfirmed(e.to_string())))
    }
}

impl Shared {
    /// Stores a settlement, and how far the lane is with it.
    async fn settle(
        self: Arc<Self>,
        events: BTreeSet<i64>,
        envelopes: Vec<i64>,
        settlement: Settlement,
    ) -> Result<(), SettleError> {
        let shared = &*self;
        let _writing = shared.writing.lock().await;
        let reached = shared.taken().reached(&events);
        let (subscriber, stored) = (shared.subscriber.clone(), reached.clone());
        let settled = envelopes.clone();
        let now = clock::now();
        let first = events.first().copied();
        let settle = move |db: &Connection| {
            let mut first = first;
            for id in &settled {
                let seq: Option<i64> = db
                    .prepare_cached("DELETE FROM retry WHERE id = ?1 RETURNING seq")?
                    .query_row([id], |row| row.get(0))
                    .optional()?
                    .flatten();
                first = first.or(seq);
            }
            match &settlement {
                Settlement::Delivered => {}
                Settlement::Retry { batches, delay } => {
                    let due = millis(now + *delay) + 1; // never early
                    batches.iter().try_for_each(|batch| {
                        insert_retry(db, &subscriber, batch, first, millis(now), due)
                    })?;
                }
                Settlement::Dead(letters) => {
                    letters.iter().try_for_each(|l| insert_dead(db, &subscriber, l))?
                }
            }
            stored.map_or(Ok(()), |reached| reached.store(db, &subscriber))
        };
        shared.store.write(settle).await.map_err(|e| SettleError::Unconfirmed(e.to_string()))?;
        let mut taken = shared.taken();
        let mut cost = taken.finish(&events).cost();
        if let Some(reached) = reached {
            taken.stored(reached);
        }
        for body in envelopes.iter().filter_map(|id| taken.envelopes.remove(id)) {
            cost += body + COST;
        }
        drop(taken);
        shared.share.settled(cost);
        if shared.in_order && !envelopes.is_empty() {
            // The next part, or the events that waited for it.
            shared.look_at_retries();
        } else {
            shared.wake();
        }
        Ok(())
    }
}

pub(super) fn set_cursor(db: &Connection, subscriber: &str, cursor: i64) -> rusqlite::Result<()> {
    db.prepare_cached("UPDATE segment SET after = ?2 WHERE subscriber = ?1 AND after < ?2")?
        .execute(params![subscriber, cursor])?;
    db.prepare_cached("DELETE FROM segment WHERE subscriber = ?1 AND upto <= ?2")?
        .execute(params![subscriber, cursor])?;
    Ok(())
}

fn set_ahead(
    db: &Connection,
    subscriber: &str,
    runs: &[RangeInclusive<i64>],
) -> rusqlite::Result<()> {
    db.prepare_cached("DELETE FROM ahead WHERE subscriber = ?1")?.execute([subscriber])?;
    let mut insert =
        db.prepare_cached("INSERT INTO ahead (subscriber, first, last) VALUES (?1, ?2, ?3)")?;
    runs.iter()
        .try_for_each(|run| insert.execute(params![subscriber, run.start(), run.end()]).map(drop))
}

/// `first`: the number of its first event, if that is known.
pub(super) fn insert_retry(
    db: &Connection,
    subscriber: &str,
    e: &Batch,
    first: Option<i64>,
    now: i64,
    due: i64,
) -> rusqlite::Result<()> {
    db.prepare_cached(
        "INSERT INTO retry (subscriber, due, batch_id, content_type, events, attempts, first_attempt_at, body, story, replay, traceparent, \
         scheduled_at, prints, seq) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14)",
    )?
    .execute(params![
        subscriber,
        due,
        e.id.as_str(),
        e.format.label(),
        e.events,
        e.attempts,
        e.first_attempt_at.map(millis),
        &e.body[..],
        attempt_log_text(&e.attempt_log),
        e.replay,
        e.traceparent,
        now,
        Print::to_bytes(&e.prints),
        first
    ])?;
    Ok(())
}

pub(super) fn insert_dead(
    db: &Connection,
    subscriber: &str,
    l: &DeadLetter,
) -> rusqlite::Result<()> {
    db.prepare_cached(
        "INSERT INTO dead (subscriber, kind, reason, letter_id, content_type, events, attempts, status, error, first_attempt_at, died_at, body, story, \
         prints) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14)",
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
        cut_error(&l.error),
        l.first_attempt_at.map(millis),
        l.died_at.map(millis),
        &l.body[..],
        attempt_log_text(&l.attempt_log),
        Print::to_bytes(&l.prints)
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
            let mut hand = TakenMessages { scanned: 130, ..TakenMessages::default() };
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
                let runs = hand.runs_after(&finished, cursor);
                for seq in order.iter().filter(|seq| **seq > cursor) {
                    prop_assert_eq!(runs.iter().any(|run| run.contains(seq)), !left.contains(seq));
                }
                let reached = hand.reached(&finished);
                hand.finish(&finished);
                reached.into_iter().for_each(|reached| hand.stored(reached));
                prop_assert_eq!((hand.cursor, &hand.written), (cursor, &runs));
                prop_assert!(hand.reached(&BTreeSet::new()).is_none());
            }
            prop_assert!(hand.events.is_empty());
        }
    }
}

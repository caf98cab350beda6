//! Stores events. Of those that come through a broker what is known is left out, and what is no event
//! becomes a dead letter of the log. How that broker is bound is stored here too.

use std::{
    collections::{BTreeSet, HashMap},
    fmt,
    sync::Arc,
    time::SystemTime,
};

use futures_util::future::BoxFuture;
use rusqlite::{Connection, params};
use tokio::sync::watch;

use super::{
    EmbeddedQueue, MAX_TRACEPARENT, consumer::insert_dead, dead::LOG, history::NOBODY, millis,
    newest,
};
use crate::{
    clock,
    delivery::{DeadLetter, Reason},
    queue::{MAX_GROUP, NewEvent, Published, QueueError},
    telemetry::{finding::Finding, troubles::Troubles},
};

/// Newest events of the log among which a redelivered one is looked for.
const REMEMBERED: i64 = 100_000;

/// Newest dead letters of the log among which a redelivered message that is no event is looked for.
const NEWEST_LETTERS: i64 = MAX_GROUP as i64;

/// Brings events from elsewhere into the log, alongside what is published to it.
pub trait Inflow: fmt::Debug + Send + Sync {
    /// Runs until `stopping` is true, and leaves then nothing half done.
    fn run(&self, log: EmbeddedQueue, stopping: watch::Receiver<bool>) -> BoxFuture<'_, ()>;

    /// What keeps it from that.
    fn troubles(&self) -> watch::Receiver<Troubles>;

    /// Inspects what can lose events on their way, and changes nothing.
    fn inspect(&self) -> BoxFuture<'_, Vec<Finding>>;
}

/// An event as a broker has delivered it.
#[derive(Debug, Clone)]
pub struct Delivered {
    pub event: NewEvent,
    /// It was delivered before, and perhaps stored.
    pub is_repeated: bool,
    /// Why no subscriber can get it.
    pub invalid: Option<Invalid>,
}

/// Why what was delivered is no event.
#[derive(Debug, Clone)]
pub struct Invalid {
    pub reason: Reason,
    pub error: String,
}

/// What became of a delivered event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Appended {
    Stored,
    /// No subscriber's pattern matches it.
    Unmatched,
    /// It was stored when it was delivered before.
    Known,
    /// It is one dead letter, whoever would have wanted it.
    Invalid,
}

/// A binding of a queue: the exchange, and the pattern.
pub(crate) type Binding = (String, String);

impl EmbeddedQueue {
    /// Sets what brings events from elsewhere. Of no effect if that is set already.
    #[must_use]
    pub fn fed_by(self, inflow: Arc<dyn Inflow>) -> Self {
        self.0.inflow.get_or_init(|| inflow);
        self
    }

    /// Stores events as [`publish`](crate::queue::Queue::publish) does, except invalid ones, which
    /// become dead letters, and those that are known: repeated ones with a message id that a recent
    /// event of the log has, with the same type and bytes.
    ///
    /// # Errors
    /// It is unknown whether they are stored.
    pub(crate) async fn append(&self, events: &[Delivered]) -> Result<Vec<Appended>, QueueError> {
        let known = self.known(events).await?;
        let mut results = vec![Appended::Known; events.len()];
        let (mut valid, mut places, mut invalid) = (Vec::new(), Vec::new(), Vec::new());
        for (n, delivered) in events.iter().enumerate().filter(|(n, _)| !known.contains(n)) {
            let event = delivered.event.clone();
            match &delivered.invalid {
                None => {
                    valid.push(event);
                    places.push(n);
                }
                Some(why) => {
                    results[n] = Appended::Invalid;
                    invalid.push((event, why.clone()));
                }
            }
        }
        if valid.is_empty() && invalid.is_empty() {
            return Ok(results);
        }
        for (n, published) in places.into_iter().zip(self.insert(valid, invalid).await?) {
            results[n] = match published {
                Published::Stored => Appended::Stored,
                Published::Unmatched | Published::Refused => Appended::Unmatched,
            };
        }
        Ok(results)
    }

    /// Stores valid events, and what is none, in one transaction.
    pub(super) async fn insert(
        &self,
        events: Vec<NewEvent>,
        invalid: Vec<(NewEvent, Invalid)>,
    ) -> Result<Vec<Published>, QueueError> {
        let now = clock::now();
        let queue = self.clone();
        let insert = move |db: &Connection| {
            // Lanes go on with a lost file as long as a process has it open; new events would be
            // lost.
            if let Some(lost) = queue.store().place().check_before_storing() {
                return Ok(Err(lost));
            }
            let segments = queue.segments(db)?;
            let for_history = queue.0.history.is_some();
            let mut fates = Vec::with_capacity(events.len());
            for event in &events {
                let matched = segments.match_now(event.tenant.as_ref(), &event.event_type);
                if matched || for_history {
                    insert_event(db, event, now, (!matched).then_some(NOBODY))?;
                }
                fates.push(if matched { Published::Stored } else { Published::Unmatched });
            }
            // History does not get them: a replay from there would be one of what is no event.
            for (event, Invalid { reason, error }) in invalid {
                let NewEvent { body, message_id, .. } = event;
                let letter = DeadLetter::of_event(body, None, message_id, reason, error, now);
                insert_dead(db, LOG, &letter)?;
            }
            Ok(Ok(fates))
        };
        self.store().write(insert).await?.map_err(QueueError::needs_operator)
    }

    /// The known ones among events, by their position.
    async fn known(&self, events: &[Delivered]) -> Result<BTreeSet<usize>, QueueError> {
        let (mut repeated, mut letters) = (HashMap::<_, Vec<_>>::new(), Vec::new());
        for (n, Delivered { event, invalid, .. }) in
            events.iter().enumerate().filter(|(_, e)| e.is_repeated)
        {
            let Some(id) = event.message_id.clone() else { continue };
            match invalid {
                None => repeated.entry(id).or_default().push((n, event.clone())),
                Some(_) => letters.push((n, id, event.body.clone())),
            }
        }
        if repeated.is_empty() && letters.is_empty() {
            return Ok(BTreeSet::new());
        }
        // Not in the transaction that stores the others: nobody else stores them, and producers over
        // HTTP need not wait for the search.
        let find = move |db: &Connection| {
            let mut known = find_known(db, &repeated)?;
            for (n, id, body) in letters {
                if is_letter(db, &id, &body)? {
                    known.insert(n);
                }
            }
            Ok(known)
        };
        self.store().read_long(find).await
    }

    /// The bindings of a queue, as they were recorded last.
    pub(crate) async fn bindings(&self, queue: &str) -> Result<BTreeSet<Binding>, QueueError> {
        let queue = queue.to_owned();
        let all = move |db: &Connection| {
            let mut query =
                db.prepare_cached("SELECT exchange, pattern FROM intake_binding WHERE queue = ?1")?;
            query.query_map([queue], |r| Ok((r.get(0)?, r.get(1)?)))?.collect()
        };
        self.store().read(all).await
    }

    /// Records the bindings of a queue.
    pub(crate) async fn record_bindings(
        &self,
        queue: &str,
        bindings: BTreeSet<Binding>,
    ) -> Result<(), QueueError> {
        let queue = queue.to_owned();
        let record = move |db: &Connection| {
            db.execute("DELETE FROM intake_binding WHERE queue = ?1", [&queue])?;
            let mut insert = db.prepare_cached(
                "INSERT INTO intake_binding (queue, exchange, pattern) VALUES (?1, ?2, ?3)",
            )?;
            for (exchange, pattern) in bindings {
                insert.execute(params![queue, exchange, pattern])?;
            }
            Ok(())
        };
        self.store().write(record).await
    }
}

fn insert_event(
    db: &Connection,
    event: &NewEvent,
    at: SystemTime,
    only_for: Option<&str>,
) -> rusqlite::Result<()> {
    let traceparent = event.traceparent.as_deref().filter(|t| t.len() <= MAX_TRACEPARENT);
    db.prepare_cached("INSERT INTO event (type, message_id, at, body, traceparent, only_for, tenant) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)")?.execute(params![
        event.event_type,
        event.message_id,
        millis(at),
        &event.body[..],
        traceparent,
        only_for,
        event.tenant
    ])?;
    Ok(())
}

/// Whether one of the newest dead letters of the log has this id and these bytes.
fn is_letter(db: &Connection, id: &str, body: &[u8]) -> rusqlite::Result<bool> {
    db.prepare_cached(
        "SELECT EXISTS (SELECT 1 FROM (SELECT letter_id, body FROM dead WHERE subscriber = ?1 ORDER BY id DESC LIMIT ?4) \
         WHERE letter_id = ?2 AND body = ?3)",
    )?
    .query_row(params![LOG, id, body, NEWEST_LETTERS], |r| r.get(0))
}

/// The positions of those of `repeated`, by message id, that are among the newest events.
fn find_known(
    db: &Connection,
    repeated: &HashMap<String, Vec<(usize, NewEvent)>>,
) -> rusqlite::Result<BTreeSet<usize>> {
    let mut known = BTreeSet::new();
    // Replays of dead letters for one subscriber are no copies of what its producer published.
    let mut search = db.prepare_cached(
        "SELECT seq, message_id FROM event WHERE seq > ?1 AND message_id IS NOT NULL AND (only_for IS NULL OR only_for = ?2)",
    )?;
    let mut is_same = db.prepare_cached(
        "SELECT type = ?2 AND body = ?3 AND tenant IS ?4 FROM event WHERE seq = ?1",
    )?;
    let mut rows = search.query(params![newest(db)? - REMEMBERED, NOBODY])?;
    while let Some(row) = rows.next()? {
        let Some(same_id) = repeated.get(row.get_ref(1)?.as_str()?) else { continue };
        for (n, event) in same_id {
            let is_same: bool = is_same.query_row(
                params![row.get::<_, i64>(0)?, event.event_type, &event.body[..], event.tenant],
                |r| r.get(0),
            )?;
            if is_same {
                known.insert(*n);
            }
        }
    }
    Ok(known)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::{
        config::{EmbeddedConfig, HistoryConfig},
        queue::{
            DeadLetters as _, Queue as _,
            embedded::tests::{config, subscribers},
        },
    };

    fn delivered(id: Option<&str>, event_type: &str, body: &str, is_repeated: bool) -> Delivered {
        let event = NewEvent {
            event_type: event_type.to_owned(),
            message_id: id.map(str::to_owned),
            body: body.to_owned().into(),
            traceparent: None,
            tenant: None,
        };
        Delivered { event, is_repeated, invalid: None }
    }

    async fn stored(queue: &EmbeddedQueue) -> i64 {
        let count = |db: &Connection| db.query_row("SELECT count(*) FROM event", [], |r| r.get(0));
        queue.store().read(count).await.expect("reads")
    }

    #[tokio::test]
    async fn only_a_redelivery_with_the_id_type_and_bytes_of_a_recent_event_is_known() {
        let dir = tempfile::tempdir().expect("a directory");
        let queue =
            EmbeddedQueue::for_daemon(&config(&dir, Duration::from_secs(3600))).expect("opens");
        queue.prepare(&subscribers(&[("a", "x.*")])).await.expect("prepares");
        let first = [
            delivered(Some("1"), "x.a", "{}", false),
            delivered(None, "x.a", "{}", false),
            delivered(Some("2"), "y", "{}", false),
        ];
        use Appended::{Known, Stored, Unmatched};
        assert_eq!(queue.append(&first).await.expect("appends"), [Stored, Stored, Unmatched]);
        for (event, expected) in [
            (delivered(Some("1"), "x.a", "{}", true), Known),
            (delivered(Some("1"), "x.a", "{}", false), Stored),
            (delivered(Some("1"), "x.b", "{}", true), Stored),
            (delivered(Some("1"), "x.a", "{ }", true), Stored),
            (delivered(Some("3"), "x.a", "{}", true), Stored),
            (delivered(None, "x.a", "{}", true), Stored),
            // It was not stored, since no subscriber wants it.
            (delivered(Some("2"), "y", "{}", true), Unmatched),
        ] {
            let before = stored(&queue).await;
            let result = queue.append(std::slice::from_ref(&event)).await.expect("appends");
            assert_eq!(result, [expected], "{event:?}");
            let added = stored(&queue).await - before;
            assert_eq!(added, i64::from(expected == Stored), "{event:?}");
        }
        let mixed = [
            delivered(Some("4"), "x.a", "{}", true),
            delivered(Some("3"), "x.a", "{}", true),
            delivered(None, "y", "{}", true),
        ];
        assert_eq!(queue.append(&mixed).await.expect("appends"), [Stored, Known, Unmatched]);
    }

    #[tokio::test]
    async fn an_event_is_remembered_for_100_000_others_and_a_replay_for_one_subscriber_is_none() {
        let dir = tempfile::tempdir().expect("a directory");
        let queue =
            EmbeddedQueue::for_daemon(&config(&dir, Duration::from_secs(3600))).expect("opens");
        queue.prepare(&subscribers(&[("a", "#")])).await.expect("prepares");
        let [one, again] = [false, true].map(|again| delivered(Some("1"), "x", "{}", again));
        queue.append(&[one]).await.expect("appends");
        let replay = "INSERT INTO event (type, message_id, at, body, only_for) SELECT type, '2', at, body, 'a' FROM event";
        queue.store().write(|db| db.execute_batch(replay)).await.expect("writes");
        let of_replay = delivered(Some("2"), "x", "{}", true);
        let result = queue.append(&[of_replay]).await.expect("appends");
        assert_eq!(result, [Appended::Stored]);
        for (newest, expected) in [(100_000, Appended::Known), (100_001, Appended::Stored)] {
            let skip = move |db: &Connection| {
                db.execute("UPDATE sqlite_sequence SET seq = ?1 WHERE name = 'event'", [newest])
            };
            queue.store().write(skip).await.expect("writes");
            let result = queue.append(std::slice::from_ref(&again)).await.expect("appends");
            assert_eq!(result, [expected], "the newest is {newest}");
        }
    }

    #[tokio::test]
    async fn what_is_no_event_is_one_dead_letter_of_the_log_and_reaches_no_subscriber() {
        let dir = tempfile::tempdir().expect("a directory");
        let history = HistoryConfig {
            retention: Duration::from_secs(3600),
            max_bytes: 1 << 30,
            bodies: true,
        };
        let config =
            EmbeddedConfig { history: Some(history), ..config(&dir, Duration::from_secs(3600)) };
        let queue = EmbeddedQueue::for_daemon(&config).expect("opens");
        let all = subscribers(&[("a", "#"), ("b", "#")]);
        queue.prepare(&all).await.expect("prepares");
        let bad = |id: &str, again| Delivered {
            invalid: Some(Invalid { reason: Reason::InvalidEvent, error: format!("why {id}") }),
            ..delivered(Some(id), "x", "no event", again)
        };
        let mixed = [bad("1", false), delivered(Some("2"), "x", "{}", false), bad("3", false)];
        let results = queue.append(&mixed).await.expect("appends");
        assert_eq!(results, [Appended::Invalid, Appended::Stored, Appended::Invalid]);
        for (letter, expected) in [
            (bad("4", true), Appended::Invalid),
            (bad("4", true), Appended::Known),
            (bad("1", true), Appended::Known),
            (bad("2", true), Appended::Invalid),
        ] {
            let id = letter.event.message_id.clone();
            assert_eq!(queue.append(&[letter]).await.expect("appends"), [expected], "{id:?}");
        }
        assert_eq!(stored(&queue).await, 1, "no replay from history has what is no event");
        let depths = queue.depths(&all).await.expect("counts");
        assert_eq!((depths.orphans, depths.removed.len()), (4, 0), "{depths:?}");
        for depth in depths.subscribers.values() {
            assert_eq!((depth.events, depth.dead), (1, 0), "{depths:?}");
        }
        let everything = queue.everything().await.expect("counts");
        assert_eq!((everything.orphans, everything.subscribers.len()), (4, 2), "{everything:?}");
        let mut walk = queue.orphans().await.expect("opens");
        assert_eq!(walk.left(), 4);
        let mut found = Vec::new();
        while let Some(held) = walk.next().await.expect("reads") {
            assert_eq!((&held.subscriber, &held.letter.body[..]), (&None, &b"no event"[..]));
            assert_eq!(held.letter.reason, Reason::InvalidEvent);
            found.push((held.letter.id.clone().expect("an id"), held.letter.error.clone()));
            walk.purge(vec![held]).await.expect("purges");
        }
        let expected = ["1", "3", "4", "2"].map(|id| (id.to_owned(), format!("why {id}")));
        assert_eq!(found, expected);
        assert_eq!(queue.everything().await.expect("counts").orphans, 0);
    }

    #[tokio::test]
    async fn bindings_are_those_that_were_recorded_last_of_that_queue() {
        let dir = tempfile::tempdir().expect("a directory");
        let queue =
            EmbeddedQueue::for_daemon(&config(&dir, Duration::from_secs(3600))).expect("opens");
        let of = |patterns: &[&str]| -> BTreeSet<Binding> {
            patterns.iter().map(|p| ("e".to_owned(), (*p).to_owned())).collect()
        };
        assert_eq!(queue.bindings("q").await.expect("reads"), of(&[]));
        for patterns in [&["a", "b"][..], &["b", "c"]] {
            queue.record_bindings("q", of(patterns)).await.expect("records");
            queue.record_bindings("other", of(&["z"])).await.expect("records");
            assert_eq!(queue.bindings("q").await.expect("reads"), of(patterns));
        }
    }
}

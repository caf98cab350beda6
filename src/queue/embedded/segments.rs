//! The segments of all subscribers, as they are between two changes.

use std::{collections::HashMap, sync::Arc};

use rusqlite::Connection;

use super::{Addressed, history::NOBODY, parse_patterns};
use crate::{
    delivery::SubscriberName,
    event::{Pattern, Tenant, audience::Audience},
};

/// What the subscribers are to get of the log. A subscriber is known by its index, which it has in
/// this object only: another one of the same version may have fewer segments, those that their
/// subscribers are done with, and so other indexes.
#[derive(Debug, Default)]
pub(super) struct Segments {
    /// The number of this state; `None` of what was not read.
    version: Option<i64>,
    names: Vec<SubscriberName>,
    indexes: HashMap<SubscriberName, u32>,
    /// The patterns of the open segments.
    open: Audience,
    /// The number after which the open segment of each subscriber was begun; `None` without one.
    begun: Vec<Option<i64>>,
    closed: Vec<Closed>,
    /// All segments that a later event is in are open.
    changed_upto: i64,
}

/// A segment that has ended.
#[derive(Debug)]
struct Closed {
    owner: u32,
    tenant: Option<Tenant>,
    patterns: Vec<Pattern>,
    after: i64,
    upto: i64,
}

impl Closed {
    fn has(&self, seq: i64) -> bool {
        self.after < seq && seq <= self.upto
    }

    fn wants(&self, event: &Addressed<'_>) -> bool {
        event.is_of(self.tenant.as_ref()) && event.matches(&self.patterns)
    }
}

impl Segments {
    /// Reads the segments if they are not these any more.
    pub(super) fn changed(&self, db: &Connection) -> rusqlite::Result<Option<Self>> {
        let version = db
            .prepare_cached("SELECT segments FROM log_state")?
            .query_row([], |r| r.get::<_, i64>(0))?;
        if self.version == Some(version) {
            return Ok(None);
        }
        let mut query = db.prepare_cached(
            "SELECT subscriber, patterns, after, upto, coalesce(begun, after), tenant FROM segment LEFT JOIN tenancy USING (subscriber) ORDER BY id",
        )?;
        let mut rows = query.query([])?;
        let mut changed = Self { version: Some(version), ..Self::default() };
        let mut patterns: Vec<(u32, Option<Tenant>, Pattern)> = Vec::new();
        while let Some(row) = rows.next()? {
            let owner = changed.add(row.get(0)?);
            let of_it = parse_patterns(row.get_ref(1)?.as_str()?);
            let tenant: Option<Tenant> = row.get(5)?;
            let ends = if let Some(upto) = row.get(3)? {
                let after = row.get(2)?;
                changed.closed.push(Closed { owner, tenant, patterns: of_it, after, upto });
                upto
            } else {
                patterns.extend(of_it.into_iter().map(|p| (owner, tenant.clone(), p)));
                let begun = row.get(4)?;
                changed.begun[owner as usize] = Some(begun);
                begun
            };
            changed.changed_upto = changed.changed_upto.max(ends);
        }
        changed.open =
            Audience::new(patterns.iter().map(|(n, tenant, p)| (*n, tenant.as_ref(), p)));
        Ok(Some(changed))
    }

    fn add(&mut self, name: SubscriberName) -> u32 {
        let next = u32::try_from(self.names.len()).unwrap_or(u32::MAX);
        *self.indexes.entry(name).or_insert_with_key(|name| {
            self.names.push(name.clone());
            self.begun.push(None);
            next
        })
    }

    /// The subscribers, by their indexes.
    pub(super) fn names(&self) -> &[SubscriberName] {
        &self.names
    }

    pub(super) fn index(&self, subscriber: &str) -> Option<u32> {
        self.indexes.get(subscriber).copied()
    }

    /// Whether a subscriber gets an event that is stored now.
    pub(super) fn match_now(&self, tenant: Option<&Tenant>, event_type: &str) -> bool {
        self.open.matches(tenant.map(Tenant::as_str), event_type)
    }

    /// The subscribers that get an event of the log, in the order of their indexes.
    pub(super) fn owners(&self, seq: i64, event: &Addressed<'_>) -> Arc<[u32]> {
        let is_open = |owner: u32| self.begun[owner as usize].is_some_and(|begun| begun < seq);
        let closed = || self.closed.iter().filter(|segment| segment.has(seq));
        match event.only_for {
            Some(NOBODY) => Arc::default(),
            Some(only) => {
                let owner = self.index(only).filter(|owner| {
                    is_open(*owner) || closed().any(|segment| segment.owner == *owner)
                });
                owner.into_iter().collect()
            }
            None => {
                let open = self.open.lookup(event.tenant, event.event_type);
                if seq > self.changed_upto {
                    return open;
                }
                let wanting = closed().filter(|segment| segment.wants(event));
                let mut ended = wanting.map(|segment| segment.owner).peekable();
                if ended.peek().is_none() && open.iter().all(|owner| is_open(*owner)) {
                    return open;
                }
                let mut owners: Vec<u32> =
                    open.iter().copied().filter(|owner| is_open(*owner)).chain(ended).collect();
                owners.sort_unstable();
                owners.dedup();
                owners.into()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;
    use crate::queue::embedded::{
        EmbeddedQueue, Filter,
        consumer::set_cursor,
        newest, tenant_of,
        tests::{config, publish, subscribers},
    };
    use crate::{
        config::Subscriber,
        queue::{NewEvent, Queue as _},
    };

    const NAMES: [&str; 3] = ["a", "b", "c"];
    const PATTERNS: [&str; 4] = ["#", "x", "x.*", "y.#"];
    const TYPES: [&str; 4] = ["x", "x.1", "y", "z"];
    /// Of an event, and of the subscribers in their order.
    const TENANTS: [&str; 3] = ["", "1", "2"];

    fn tenant(n: usize) -> Option<Tenant> {
        Tenant::try_new(TENANTS[n])
    }

    #[derive(Debug, Clone)]
    enum Step {
        /// Configures each subscriber with a pattern, or not at all.
        Prepare(Vec<Option<usize>>),
        /// Stores an event of a type and a tenant.
        Publish(usize, usize),
        /// Stores one for a subscriber alone, as a replay does.
        Replay(usize),
        /// A subscriber is done with so many more numbers.
        Settle(usize, i64),
    }

    fn step() -> impl Strategy<Value = Step> {
        let pattern = prop::option::of(0..PATTERNS.len());
        prop_oneof![
            2 => prop::collection::vec(pattern, NAMES.len()).prop_map(Step::Prepare),
            5 => (0..TYPES.len(), 0..TENANTS.len()).prop_map(|(t, of)| Step::Publish(t, of)),
            1 => (0..NAMES.len()).prop_map(Step::Replay),
            2 => (0..NAMES.len(), 0_i64..6).prop_map(|(name, many)| Step::Settle(name, many)),
        ]
    }

    async fn take_step(queue: &EmbeddedQueue, step: Step) {
        match step {
            Step::Prepare(patterns) => {
                let of_each = NAMES.iter().zip(patterns);
                let mut all: Vec<(&str, &str)> =
                    of_each.filter_map(|(name, n)| Some((*name, PATTERNS[n?]))).collect();
                all.push(("other", "q"));
                let with_tenant = |s: &Arc<Subscriber>| {
                    let n = NAMES.iter().position(|name| s.name == **name);
                    Arc::new(Subscriber { tenant: n.and_then(tenant), ..Subscriber::clone(s) })
                };
                let all: Vec<_> = subscribers(&all).iter().map(with_tenant).collect();
                queue.removals().configure(all.iter().map(|s| s.name.clone()).collect(), true);
                queue.prepare(&all).await.expect("prepares");
            }
            Step::Publish(n, of) => {
                let event = NewEvent {
                    event_type: TYPES[n].to_owned(),
                    message_id: None,
                    body: "{}".into(),
                    traceparent: None,
                    tenant: tenant(of),
                };
                queue.publish(vec![event]).await.expect("publishes");
            }
            Step::Replay(n) => {
                let replay = move |db: &Connection| {
                    db.execute(
                        "INSERT INTO event (type, at, only_for, tenant, body) VALUES ('x', 0, ?1, ?2, x'')",
                        (NAMES[n], tenant_of(db, NAMES[n])?),
                    )?;
                    db.execute(
                        "INSERT INTO segment (subscriber, patterns, after, upto) SELECT ?1, '[]', ?2 - 1, ?2 \
                         WHERE NOT EXISTS (SELECT 1 FROM segment WHERE subscriber = ?1 AND upto IS NULL)",
                        (NAMES[n], db.last_insert_rowid()),
                    )
                };
                queue.store().write(replay).await.expect("writes");
            }
            Step::Settle(n, many) => {
                let settle = move |db: &Connection| match cursor(db, NAMES[n])? {
                    Some(cursor) => set_cursor(db, NAMES[n], newest(db)?.min(cursor + many)),
                    None => Ok(()),
                };
                queue.store().write(settle).await.expect("writes");
            }
        }
    }

    fn cursor(db: &Connection, name: &str) -> rusqlite::Result<Option<i64>> {
        db.query_row("SELECT min(after) FROM segment WHERE subscriber = ?1", [name], |r| r.get(0))
    }

    /// Of each event that a subscriber may have still to get: whether it gets it as a lane reads the
    /// log by itself, and by these segments.
    fn compared(db: &Connection, segments: &Segments) -> rusqlite::Result<Vec<(bool, bool)>> {
        let mut each = Vec::new();
        let mut query = db.prepare("SELECT seq, type, only_for, tenant FROM event")?;
        let mut events = query.query([])?;
        while let Some(event) = events.next()? {
            let seq: i64 = event.get(0)?;
            let addressed = Addressed::read(event, event.get_ref(3)?.as_str_or_null()?)?;
            let owners = segments.owners(seq, &addressed);
            for name in NAMES {
                if cursor(db, name)?.is_none_or(|cursor| seq <= cursor) {
                    continue;
                }
                let mut in_it = db.prepare_cached(
                    "SELECT patterns FROM segment WHERE subscriber = ?1 AND after < ?2 AND coalesce(upto, ?2) >= ?2",
                )?;
                let patterns: Vec<String> =
                    in_it.query_map((name, seq), |r| r.get(0))?.collect::<rusqlite::Result<_>>()?;
                let tenant = tenant_of(db, name)?;
                let by_itself = patterns.iter().any(|text| {
                    let patterns = &parse_patterns(text);
                    let filter = Filter { subscriber: name, tenant: tenant.as_ref(), patterns };
                    filter.wants(&addressed)
                });
                let at_once = segments.index(name).is_some_and(|index| owners.contains(&index));
                each.push((by_itself, at_once));
            }
        }
        Ok(each)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn all_get_at_once_what_each_gets_by_itself(
            steps in prop::collection::vec(step(), 1..40),
        ) {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.expect("a runtime").block_on(async {
                let dir = tempfile::tempdir().expect("a directory");
                let config = config(&dir, Duration::from_secs(3600));
                let queue = EmbeddedQueue::for_daemon(&config).expect("opens");
                take_step(&queue, Step::Prepare(vec![Some(0), Some(1), None])).await;
                for step in steps {
                    take_step(&queue, step.clone()).await;
                    let known = queue.clone();
                    let compare = move |db: &Connection| {
                        // As a daemon has them that runs, and one that has just begun.
                        let new = Segments::default().changed(db)?.expect("is read");
                        Ok([compared(db, &*known.segments(db)?)?, compared(db, &new)?])
                    };
                    for (by_itself, at_once) in
                        queue.store().read(compare).await.expect("reads").concat()
                    {
                        prop_assert_eq!(by_itself, at_once, "{:?}", step);
                    }
                }
                Ok(())
            })?;
        }
    }

    #[tokio::test]
    async fn they_are_not_read_again_when_a_subscriber_is_done_with_one_that_has_ended() {
        let dir = tempfile::tempdir().expect("a directory");
        let queue =
            EmbeddedQueue::for_daemon(&config(&dir, Duration::from_secs(3600))).expect("opens");
        queue.prepare(&subscribers(&[("a", "x"), ("b", "x")])).await.expect("prepares");
        publish(&queue, "x", 2).await;
        queue.prepare(&subscribers(&[("a", "y"), ("b", "x")])).await.expect("prepares");
        let ends = |db: &Connection| {
            let before = Segments::default().changed(db)?.expect("is read");
            assert_eq!(before.closed.len(), 1);
            set_cursor(db, "a", 2)?;
            let ended = before.changed(db)?.is_none();
            let left = Segments::default().changed(db)?.expect("is read").closed.len();
            db.execute("DELETE FROM segment WHERE subscriber = 'b'", [])?;
            Ok((ended, left, before.changed(db)?.is_some()))
        };
        assert_eq!(queue.store().write(ends).await.expect("writes"), (true, 0, true));
    }
}

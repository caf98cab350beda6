//! Counts what the subscribers have still to get.

use std::{
    collections::{BTreeMap, HashMap},
    ops::RangeInclusive,
};

use rusqlite::Connection;

use super::{
    Addressed, Filter,
    consumer::{self, Unsettled},
    dead::LOG,
    each_waiting, millis, newest, parse_patterns, tenant_of,
};
use crate::{
    clock,
    delivery::{Depth, SubscriberName},
    event::{Pattern, Tenant, audience::Audience},
};

/// The depths of all subscribers with messages, without those that lanes have unsettled.
pub(super) fn depths(
    db: &Connection,
    unsettled: &BTreeMap<SubscriberName, Unsettled>,
) -> rusqlite::Result<BTreeMap<SubscriberName, Depth>> {
    let mut depths: BTreeMap<SubscriberName, Depth> = BTreeMap::new();
    for (name, events) in backlogs(db, unsettled)? {
        depths.entry(name).or_default().events = events.into();
    }
    let now = millis(clock::now());
    let mut query = db.prepare("SELECT subscriber, id, due <= ?1 FROM retry")?;
    let mut rows = query.query([now])?;
    while let Some(row) = rows.next()? {
        let (name, id): (SubscriberName, i64) = (row.get(0)?, row.get(1)?);
        let is_held = unsettled.get(&name).is_some_and(|held| held.envelopes.contains(&id));
        let depth = depths.entry(name).or_default();
        match (is_held, row.get(2)?) {
            (true, _) => {}
            (false, true) => depth.retries += 1,
            (false, false) => depth.delayed += 1,
        }
    }
    let mut query =
        db.prepare("SELECT subscriber, count(*) FROM dead WHERE subscriber <> ?1 GROUP BY 1")?;
    let mut rows = query.query([LOG])?;
    while let Some(row) = rows.next()? {
        depths.entry(row.get(0)?).or_default().dead = row.get::<_, i64>(1)?.unsigned_abs();
    }
    Ok(depths)
}

/// A segment that may have undelivered events.
struct Waiting {
    /// The index of its subscriber.
    of: usize,
    tenant: Option<Tenant>,
    patterns: Vec<Pattern>,
    after: i64,
    upto: i64,
    ahead: Vec<RangeInclusive<i64>>,
}

/// Whether a subscriber has no message. Of its events not more than one is looked for.
pub(super) fn is_empty(db: &Connection, subscriber: &str) -> rusqlite::Result<bool> {
    let others = "SELECT EXISTS (SELECT 1 FROM retry WHERE subscriber = ?1) OR EXISTS (SELECT 1 FROM dead WHERE subscriber = ?1)";
    let mut found = db.query_row(others, [subscriber], |r| r.get::<_, bool>(0))?;
    let mut query = db.prepare_cached(
        "SELECT patterns, after, coalesce(upto, 9223372036854775807) FROM segment WHERE subscriber = ?1",
    )?;
    let mut rows = query.query([subscriber])?;
    let tenant = tenant_of(db, subscriber)?;
    while let Some(row) = rows.next()?.filter(|_| !found) {
        let patterns = parse_patterns(row.get_ref(0)?.as_str()?);
        let filter = Filter { subscriber, tenant: tenant.as_ref(), patterns: &patterns };
        each_waiting(db, &filter, row.get(1)?, row.get(2)?, |_| {
            found = true;
            false
        })?;
    }
    Ok(!found)
}

/// The backlog of each subscriber, without the events that its lane has unsettled. The log is read
/// once for all that are about as far behind.
pub(super) fn backlogs(
    db: &Connection,
    unsettled: &BTreeMap<SubscriberName, Unsettled>,
) -> rusqlite::Result<Vec<(SubscriberName, u32)>> {
    let newest = newest(db)?;
    let (mut names, mut waiting) = (Vec::<SubscriberName>::new(), Vec::new());
    let mut query = db.prepare_cached(
        "SELECT subscriber, patterns, after, coalesce(upto, 9223372036854775807), tenant FROM segment LEFT JOIN tenancy USING (subscriber) \
         ORDER BY subscriber, after",
    )?;
    let mut rows = query.query([])?;
    while let Some(row) = rows.next()? {
        let subscriber: SubscriberName = row.get(0)?;
        if names.last() != Some(&subscriber) {
            names.push(subscriber);
        }
        let (of, after, upto) = (names.len() - 1, row.get(2)?, row.get(3)?);
        if after < newest.min(upto) {
            let ahead = consumer::ahead(db, &names[of])?;
            let patterns = parse_patterns(row.get_ref(1)?.as_str()?);
            waiting.push(Waiting { of, tenant: row.get(4)?, patterns, after, upto, ahead });
        }
    }
    let mut counts = vec![0; names.len()];
    let held: Vec<_> = names.iter().map(|name| unsettled.get(name)).collect();
    for segments in by_distance(waiting, newest) {
        each_event(db, &segments, &names, |segment, seq| {
            let is_held = || held[segment.of].is_some_and(|held| held.events.contains(&seq));
            counts[segment.of] += u32::from(segment.waits(seq) && !is_held());
        })?;
    }
    Ok(names.into_iter().zip(counts).collect())
}

impl Waiting {
    fn waits(&self, seq: i64) -> bool {
        let is_settled = || self.ahead.iter().any(|run| run.contains(&seq));
        self.after < seq && seq <= self.upto && !is_settled()
    }
}

/// Groups segments by how far they are behind, so that in none one is ten times as far as another:
/// each event is counted for all of its group, and one subscriber that has waited for long must not
/// have all others compared with what they have had long ago. All groups together read about twice
/// as much of the log as the furthest, at most.
fn by_distance(segments: Vec<Waiting>, newest: i64) -> impl Iterator<Item = Vec<Waiting>> {
    let mut groups: BTreeMap<u32, Vec<Waiting>> = BTreeMap::new();
    for segment in segments {
        let distance = (newest - segment.after).max(1).ilog10();
        groups.entry(distance).or_default().push(segment);
    }
    groups.into_values()
}

/// Calls `found` with each event behind the first of these segments and each segment that it would
/// be in by its type.
fn each_event(
    db: &Connection,
    segments: &[Waiting],
    names: &[SubscriberName],
    mut found: impl FnMut(&Waiting, i64),
) -> rusqlite::Result<()> {
    let patterns = |(n, segment)| -> (u32, &Waiting) { (n, segment) };
    let all = (0..).zip(segments).map(patterns);
    let audience = Audience::new(
        all.flat_map(|(n, s)| s.patterns.iter().map(move |p| (n, s.tenant.as_ref(), p))),
    );
    let mut by_name: HashMap<&str, Vec<&Waiting>> = HashMap::new();
    for segment in segments {
        by_name.entry(names[segment.of].as_str()).or_default().push(segment);
    }
    let first = segments.iter().map(|segment| segment.after).min().unwrap_or(0);
    let last = segments.iter().map(|segment| segment.upto).max().unwrap_or(0);
    // A tenant is stored behind its event's body.
    let tenant = if segments.iter().any(|s| s.tenant.is_some()) { "tenant" } else { "NULL" };
    let mut query = db.prepare_cached(&format!(
        "SELECT seq, type, only_for, {tenant} FROM event WHERE seq > ?1 AND seq <= ?2 ORDER BY seq"
    ))?;
    let mut rows = query.query([first, last])?;
    while let Some(row) = rows.next()? {
        let seq = row.get(0)?;
        let event = Addressed::read(row, row.get_ref(3)?.as_str_or_null()?)?;
        if let Some(only) = event.only_for {
            by_name.get(only).into_iter().flatten().for_each(|segment| found(segment, seq));
        } else {
            let wanting = audience.lookup(event.tenant, event.event_type);
            wanting.iter().for_each(|n| found(&segments[*n as usize], seq));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;
    use crate::queue::{
        Queue as _,
        embedded::{
            EmbeddedQueue, each_waiting,
            tests::{config, publish, subscribers},
        },
    };

    proptest! {
        #[test]
        fn none_is_compared_with_many_times_the_events_that_it_is_behind(
            distances in prop::collection::vec(1_i64..2_000_000, 1..100),
        ) {
            let newest = 3_000_000;
            let segment = |(of, distance): (usize, &i64)| Waiting {
                of,
                tenant: None,
                patterns: Vec::new(),
                after: newest - distance,
                upto: i64::MAX,
                ahead: Vec::new(),
            };
            let all = distances.iter().enumerate().map(segment).collect();
            let (mut read, mut counted) = (0, 0);
            for group in by_distance(all, newest) {
                let furthest = group.iter().map(|s| newest - s.after).max().expect("is not empty");
                read += furthest;
                counted += group.len();
                for segment in group {
                    prop_assert!(furthest < 10 * (newest - segment.after));
                }
            }
            prop_assert_eq!(counted, distances.len());
            let furthest = distances.iter().max().expect("is not empty");
            prop_assert!(10 * read <= 22 * furthest, "{} of {}", read, furthest);
        }
    }

    #[tokio::test]
    async fn all_are_counted_at_once_as_each_by_itself() {
        let dir = tempfile::tempdir().expect("a directory");
        let queue =
            EmbeddedQueue::for_daemon(&config(&dir, Duration::from_secs(3600))).expect("opens");
        queue
            .prepare(&subscribers(&[("a", "x.#"), ("b", "#"), ("c", "y"), ("d", "q")]))
            .await
            .expect("prepares");
        for event_type in ["x.1", "y", "x", "z"] {
            publish(&queue, event_type, 3).await;
        }
        queue
            .prepare(&subscribers(&[("a", "y"), ("b", "#"), ("c", "y"), ("d", "q")]))
            .await
            .expect("prepares");
        publish(&queue, "y", 2).await;
        // One that is done, some that were settled ahead, a replayed one, and one for history alone.
        let change = "UPDATE segment SET after = 14 WHERE subscriber = 'c'; INSERT INTO ahead VALUES ('b', 4, 6), ('b', 9, 9); \
                      INSERT INTO event (type, at, only_for, body) VALUES ('x', 0, 'd', x''), ('y', 0, '', x''), ('y', 0, NULL, x'')";
        queue.store().write(move |db| db.execute_batch(change)).await.expect("writes");
        let unsettled: BTreeMap<SubscriberName, Unsettled> =
            [("b".into(), Unsettled { events: [2, 5].into(), ..Unsettled::default() })].into();
        let counted = move |db: &Connection| {
            let mut each: BTreeMap<SubscriberName, u32> = BTreeMap::new();
            let mut query = db
                .prepare("SELECT subscriber, patterns, after, coalesce(upto, 1000) FROM segment")?;
            let mut rows = query.query([])?;
            while let Some(row) = rows.next()? {
                let (name, text): (SubscriberName, String) = (row.get(0)?, row.get(1)?);
                let count = each.entry(name.clone()).or_default();
                let patterns = parse_patterns(&text);
                let filter = Filter { subscriber: &name, tenant: None, patterns: &patterns };
                each_waiting(db, &filter, row.get(2)?, row.get(3)?, |seq| {
                    let held = unsettled.get(&name).is_some_and(|held| held.events.contains(&seq));
                    *count += u32::from(!held);
                    true
                })?;
            }
            Ok((backlogs(db, &unsettled)?, each))
        };
        let (at_once, each) = queue.store().read(counted).await.expect("counts");
        assert_eq!(at_once, each.into_iter().collect::<Vec<_>>());
        let expected = [("a", 6 + 3), ("b", 14 - 4 - 1 + 1), ("c", 1), ("d", 1)];
        assert_eq!(at_once, expected.map(|(name, n)| (name.into(), n)));
    }

    #[tokio::test]
    async fn who_has_no_message_of_any_kind_is_empty() {
        let dir = tempfile::tempdir().expect("a directory");
        let queue =
            EmbeddedQueue::for_daemon(&config(&dir, Duration::from_secs(3600))).expect("opens");
        let all = subscribers(&[("done", "x"), ("ahead", "x"), ("event", "x"), ("other", "y")]);
        queue.prepare(&all).await.expect("prepares");
        publish(&queue, "x", 3).await;
        let change = "UPDATE segment SET after = 3 WHERE subscriber = 'done'; INSERT INTO ahead VALUES ('ahead', 1, 3), ('event', 1, 2); \
                      INSERT INTO segment (subscriber, patterns, after, upto) VALUES ('closed', '[\"x\"]', 2, 3), ('before', '[\"y\"]', 0, 3); \
                      INSERT INTO dead (subscriber, kind, reason, events, attempts, error, body) VALUES ('dead', 'event', 'exhausted', 1, 1, '', x''); \
                      INSERT INTO retry (subscriber, due, batch_id, content_type, events, attempts, body) \
                      VALUES ('retry', 0, 'msg_1', 'application/json', 1, 1, x'')";
        queue.store().write(move |db| db.execute_batch(change)).await.expect("writes");
        let counted = |db: &Connection| {
            let depths = depths(db, &BTreeMap::new())?;
            let of = |name: &SubscriberName| depths.get(name).is_none_or(|depth| depth.is_empty());
            let names =
                ["done", "ahead", "event", "other", "closed", "before", "dead", "retry", "unknown"];
            let mut each = Vec::new();
            for name in names {
                each.push((name, is_empty(db, name)?, of(&name.into())));
            }
            Ok(each)
        };
        for (name, is_empty, by_depth) in queue.store().read(counted).await.expect("counts") {
            let expected = ["done", "ahead", "other", "before", "unknown"].contains(&name);
            assert_eq!((is_empty, by_depth), (expected, expected), "{name}");
        }
    }
}

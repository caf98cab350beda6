//! Events counted by their hours.

use super::{chunk::Chunk, *};
use crate::event::Pattern;

/// The whole hour before now.
fn this_hour() -> SystemTime {
    let now = millis(now());
    time(now - now.rem_euclid(3_600_000))
}

fn at(n: u32, at: SystemTime) -> NewRow {
    NewRow { at, ..event(n) }
}

async fn counted(
    store: &SqliteStore,
    filter: &EventFilter,
    since: SystemTime,
    hours: usize,
) -> EventCounts {
    store.count_by_hour(filter, since, hours, LONG).await.expect("counts")
}

#[tokio::test]
async fn events_are_counted_by_the_hour_with_and_without_a_filter_also_after_chunks_were_removed() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = start(config(dir.path())).await;
    let (first, all) = (this_hour() - 5 * HOUR, EventFilter::default());
    // In no order of their times, over several chunks and calls.
    let hour = |n: u32| first + HOUR * (n * 7 % 5) + Duration::from_millis(u64::from(n) * 1000);
    for n in 0..10 {
        let events = (n * 5..n * 5 + 5).map(|n| at(n, hour(n))).collect();
        store.append(events).await.expect("appends");
    }
    let whole = |hours: &[u64]| EventCounts { hours: hours.to_vec(), uncounted: None };
    assert_eq!(counted(&store, &all, first, 6).await, whole(&[10, 10, 10, 10, 10, 0]));
    assert_eq!(counted(&store, &all, first + 2 * HOUR, 2).await, whole(&[10, 10]));
    assert_eq!(counted(&store, &all, first - 9 * HOUR, 2).await, whole(&[0, 0]));
    let pattern = Pattern::try_new("type.1").expect("a pattern");
    let of_type = EventFilter { event_type: Some(pattern), ..EventFilter::default() };
    let expected = |is: &dyn Fn(u32) -> bool| {
        let mut hours = vec![0; 6];
        (0..50).filter(|n| is(*n)).for_each(|n| hours[(n * 7 % 5) as usize] += 1);
        whole(&hours)
    };
    assert_eq!(counted(&store, &of_type, first, 6).await, expected(&|n| n % 3 == 1));
    let of_text = EventFilter { text: Some("7th".to_owned()), ..EventFilter::default() };
    assert_eq!(counted(&store, &of_text, first, 6).await, expected(&|n| n == 7));
    let late = EventFilter { since: Some(hour(48)), ..EventFilter::default() };
    let is_late = |n: u32| hour(n) >= hour(48);
    assert_eq!(counted(&store, &late, first, 6).await, expected(&is_late));
    let until = EventFilter { until: Some(hour(48)), ..EventFilter::default() };
    assert_eq!(counted(&store, &until, first, 6).await, expected(&|n| hour(n) < hour(48)));

    // Without time nothing but what was come to is counted, and it says so.
    let none = store.count_by_hour(&of_type, first, 6, Duration::ZERO).await.expect("counts");
    let (from, to) = none.uncounted.expect("not all");
    assert!(from == first && to > first && none.hours.iter().sum::<u64>() <= 1, "{none:?}");

    // A chunk takes its counts along.
    let removed = |db: &Connection| {
        let oldest = Chunk::oldest(db)?.expect("a chunk");
        oldest.remove(db)?;
        db.query_row("SELECT count(*) FROM event_hour WHERE chunk = ?1", [oldest.id], |r| r.get(0))
    };
    let open = store.0.open().expect("open");
    let left: i64 = store.write(&open, move |db, _| Ok(removed(db)?)).await.expect("removes");
    assert_eq!(left, 0);
    assert_eq!(counted(&store, &all, first, 6).await.hours.iter().sum::<u64>(), 43);
}

#[tokio::test]
async fn what_was_added_before_hours_were_counted_or_has_too_many_is_said_not_to_be_counted() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = start(config(dir.path())).await;
    let (first, all) = (this_hour() - 5 * HOUR, EventFilter::default());
    store.append((0..7).map(|n| at(n, first)).collect()).await.expect("appends");
    let open = store.0.open().expect("open");
    let forget = |db: &Connection, _: &open::Open| Ok(db.execute("DELETE FROM event_hour", [])?);
    assert_eq!(store.write(&open, forget).await.expect("deletes"), 1);
    store.append((7..9).map(|n| at(n, first + HOUR)).collect()).await.expect("appends");
    let counts = counted(&store, &all, first, 3).await;
    assert_eq!((counts.hours, counts.uncounted), (vec![0, 2, 0], Some((first, first))));
    let later = counted(&store, &all, first + HOUR, 2).await;
    assert_eq!(later.uncounted, None, "what is not counted is of another time");
}

#[tokio::test]
async fn events_of_a_time_are_counted_by_their_types_as_far_as_that_can_be_done() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = start(config(dir.path())).await;
    let since = this_hour();
    // Over several chunks; every other one is too old.
    for n in 0..10 {
        let when = |n: u32| since + HOUR / 2 - HOUR * (n % 2);
        let events = (n * 5..n * 5 + 5).map(|n| at(n, when(n))).collect();
        store.append(events).await.expect("appends");
    }
    let counts = store.count_by_type(since, LONG).await.expect("counts");
    let of_type = |of: u32| (0..50).filter(|n| n % 2 == 0 && n % 3 == of).count() as u64;
    let expected = (0..3_u32).map(|of| (format!("type.{of}"), of_type(of))).collect();
    assert_eq!(counts, TypeCounts { types: expected, others: 0, counted_back_to: None });

    let none = store.count_by_type(since, Duration::ZERO).await.expect("counts");
    assert!(none.counted_back_to.is_some_and(|at| at >= since), "{none:?}");
    assert!(none.types.values().sum::<u64>() <= 1, "{none:?}");
}

#[test]
fn of_endless_types_no_more_than_a_thousand_are_told_apart() {
    let mut counts = TypeCounts::default();
    for n in 0..3 * TypeCounts::MAX_TYPES {
        counts.add(&format!("type.{n}"));
        counts.add("type.0");
    }
    assert_eq!(counts.types.len(), TypeCounts::MAX_TYPES);
    assert_eq!(counts.types["type.0"], 3 * TypeCounts::MAX_TYPES as u64 + 1);
    assert_eq!(counts.others, 2 * TypeCounts::MAX_TYPES as u64);
}

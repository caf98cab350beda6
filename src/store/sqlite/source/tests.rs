//! Events whose bytes are in the log of the embedded queue.

use super::*;
use crate::event::{Pattern, Tenant};

/// A log of events in memory, and the most bytes of bodies that one of its answers had.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<BTreeMap<i64, NewRow>>>, Arc<AtomicUsize>);

impl Log {
    fn add(&self, numbers: std::ops::Range<u32>) -> Vec<NewRow> {
        let row = |n: u32| NewRow { number: Some(EventNumber(n.into())), ..event(n) };
        let rows: Vec<NewRow> = numbers.map(row).collect();
        let with_key = |row: &NewRow| (row.number.expect("one").0, row.clone());
        lock(&self.0).extend(rows.iter().map(with_key));
        rows
    }

    /// The first of these rows that fit, and notes their bytes.
    fn fitting<'r>(&self, rows: impl Iterator<Item = &'r NewRow>, bytes: usize) -> Vec<NewRow> {
        let (mut found, mut size) = (Vec::new(), 0);
        for row in rows {
            if size + row.body.len() > bytes && !found.is_empty() {
                break;
            }
            size += row.body.len();
            found.push(row.clone());
        }
        self.1.fetch_max(size, Ordering::Relaxed);
        found
    }

    fn config(&self, dir: &Path) -> SqliteConfig {
        let log = self.clone();
        let open: OpenLog = Arc::new(move || Ok(Box::new(log.clone())));
        SqliteConfig { log: Some(open), ..config(dir) }
    }
}

impl EventLog for Log {
    fn get(
        &mut self,
        numbers: &[EventNumber],
        bytes: usize,
    ) -> Result<(Vec<NewRow>, usize), StoreError> {
        let rows = lock(&self.0);
        let found: Vec<&NewRow> = numbers.iter().filter_map(|n| rows.get(&n.0)).collect();
        let fitting = self.fitting(found.iter().copied(), bytes);
        let cut = found.get(fitting.len()).and_then(|next| next.number);
        let looked_up = numbers.iter().position(|n| Some(*n) == cut).unwrap_or(numbers.len());
        Ok((fitting, looked_up))
    }

    fn after(
        &mut self,
        n: EventNumber,
        limit: usize,
        bytes: usize,
    ) -> Result<Vec<NewRow>, StoreError> {
        Ok(self.fitting(lock(&self.0).range(n.0 + 1..).take(limit).map(|(_, row)| row), bytes))
    }

    fn before(
        &mut self,
        n: EventNumber,
        limit: usize,
        bytes: usize,
    ) -> Result<Vec<NewRow>, StoreError> {
        Ok(self.fitting(lock(&self.0).range(..n.0).rev().take(limit).map(|(_, row)| row), bytes))
    }

    fn count(&mut self, after: EventNumber, upto: EventNumber) -> Result<u64, StoreError> {
        Ok(lock(&self.0).range(after.0 + 1..=upto.0).count() as u64)
    }

    fn bounds(&mut self) -> Result<Option<(EventNumber, EventNumber)>, StoreError> {
        let rows = lock(&self.0);
        let (first, last) = (rows.first_key_value(), rows.last_key_value());
        Ok(first.zip(last).map(|((first, _), (last, _))| (EventNumber(*first), EventNumber(*last))))
    }
}

#[tokio::test]
async fn events_of_a_log_are_read_from_there() {
    let dir = tempfile::tempdir().expect("a directory");
    let log = Log::default();
    let store = start(log.config(dir.path())).await;
    let rows = log.add(5..40);
    assert_eq!(store.append(rows.clone()).await.expect("appends").events, 35);
    assert_eq!(store.append(rows).await.expect("appends").repeats, 35, "each number once");
    log.add(40..45);
    assert_eq!(numbers(&store, &EventFilter::default()).await, (5..40).rev().collect::<Vec<_>>());
    assert_eq!(numbers(&store, &by_text("17th")).await, [17]);
    let by_type = EventFilter {
        event_type: Some(Pattern::try_new("type.1").expect("a pattern")),
        ..EventFilter::default()
    };
    assert_eq!(
        numbers(&store, &by_type).await,
        (5..40).rev().filter(|n| n % 3 == 1).collect::<Vec<_>>()
    );
    assert!(store.event(EventNumber(20)).await.expect("reads").is_some());
    // The log removes some.
    lock(&log.0).retain(|n, _| *n >= 20);
    while store.trim(now()).await.expect("trims") {}
    assert_eq!(numbers(&store, &by_text("ann")).await, (20..40).rev().collect::<Vec<_>>());
    let reach = store.reach().await.expect("reads");
    assert!(reach.why.contains("embedded queue"));
    // And all of them, of which history knows that it had them.
    let all = std::mem::take(&mut *lock(&log.0));
    let last = async || store.reach().await.expect("reads").last.expect("is known");
    assert_eq!(last().await, reach.last.expect("is known"));
    while store.trim(now() + 8 * 24 * HOUR).await.expect("trims") {}
    assert_eq!((last().await.0, store.reach().await.expect("reads").events), (EventNumber(39), 0));
    lock(&log.0).extend(all);
    store.close(true).await;
    // Fields alone are shown and searched.
    let history = HistoryConfig { bodies: false, ..HISTORY };
    let store = start(SqliteConfig { history, ..log.config(dir.path()) }).await;
    store.append(log.add(45..50)).await.expect("appends");
    let row = store.event(EventNumber(47)).await.expect("reads").expect("is there");
    assert_eq!((row.body, row.bytes), (None, event(47).body.len() as u64));
    assert_eq!(numbers(&store, &by_text("47th")).await, [47]);
    store.close(true).await;
    // Another log takes its place, and its numbers begin again.
    let log = Log::default();
    let rows = log.add(1..10);
    let store = start(log.config(dir.path())).await;
    assert_eq!(store.reach().await.expect("reads").events, 0);
    assert_eq!(store.append(rows).await.expect("appends").events, 9);
    assert!(store.event(EventNumber(3)).await.expect("reads").is_some());
    let open = Arc::strong_count(&log.0);
    store.leave_the_queue().await;
    assert!(Arc::strong_count(&log.0) < open, "its readers are closed");
    assert!(store.event(EventNumber(3)).await.is_err_and(|e| e.is_away()), "none is opened");
}

#[tokio::test]
async fn the_events_of_a_tenant_are_found_by_its_exact_bytes() {
    let dir = tempfile::tempdir().expect("a directory");
    let log = Log::default();
    let store = start(log.config(dir.path())).await;
    let (long, longer) = ("x".repeat(255), "x".repeat(254) + "y");
    let tenants = ["a", "A", " a", "a_61", "_", "ä", "a\u{308}", "\"", "42", &long, &longer, ""];
    let mut rows = log.add(1..200);
    for (row, tenant) in rows.iter_mut().zip(tenants.iter().cycle()) {
        row.tenant = Tenant::try_new(tenant);
        lock(&log.0).insert(row.number.expect("one").0, row.clone());
    }
    store.append(rows.clone()).await.expect("appends");
    for tenant in tenants.iter().chain(&["b", "aA"]).filter(|tenant| !tenant.is_empty()) {
        let of_tenant = |row: &&NewRow| row.tenant.as_ref().is_some_and(|t| t.as_str() == *tenant);
        let expected: Vec<i64> =
            rows.iter().rev().filter(of_tenant).map(|row| row.number.expect("one").0).collect();
        let filter = EventFilter { tenant: Tenant::try_new(tenant), ..EventFilter::default() };
        assert_eq!(numbers(&store, &filter).await, expected, "{tenant}");
    }
}

#[tokio::test]
async fn large_events_of_a_log_are_read_a_few_at_a_time() {
    let dir = tempfile::tempdir().expect("a directory");
    let log = Log::default();
    let store = start(log.config(dir.path())).await;
    for n in 1..13 {
        let [mut row] = <[_; 1]>::try_from(log.add(n..n + 1)).expect("one");
        row.body = format!(r#"{{"description":"large","x":"{}"}}"#, "x".repeat(1 << 20)).into();
        lock(&log.0).insert(n.into(), row.clone());
        store.append(vec![row]).await.expect("appends");
    }
    log.1.store(0, Ordering::Relaxed);
    let all: Vec<i64> = (1..13).rev().collect();
    assert_eq!(numbers(&store, &EventFilter::default()).await, all);
    assert_eq!(numbers(&store, &by_text("large")).await, all);
    let most = log.1.load(Ordering::Relaxed);
    assert!((1 << 20..=4 << 20).contains(&most), "{most} bytes");
}

#[tokio::test]
async fn what_a_log_had_deleted_before_a_replay_is_not_among_its_rows() {
    let dir = tempfile::tempdir().expect("a directory");
    let log = Log::default();
    let store = start(log.config(dir.path())).await;
    store.append(log.add(1..31)).await.expect("appends");
    // The begin of the oldest chunk, and single events of others.
    lock(&log.0).retain(|n, _| *n > 4 && *n % 9 > 0);
    let extent = store.extent(now() - HOUR, None, None).await.expect("reads").expect("has rows");
    let rows = store.rows(extent.after, extent.upto, MAX_ROWS, usize::MAX).await.expect("reads");
    assert_eq!((extent.rows, rows.len()), (23, 23));
    let extent = store.extent(now() - HOUR, None, Some(EventNumber(10))).await.expect("reads");
    assert_eq!(extent.map(|e| (e.upto, e.rows)), Some((EventNumber(10), 5)));
}

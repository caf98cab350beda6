//! The store's files: what is found, numbered, removed, set aside.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, AtomicUsize},
    },
};

use proptest::prelude::*;

use super::{fault::time, *};
use crate::{
    clock::now,
    config::HistoryConfig,
    delivery::{BatchId, Reason},
    event::payload::Format,
    store::{
        AttemptEnd, Change, Contents, DeliveryState, EventLog, HistoryState, MAX_REPLAYS,
        MAX_RUNNING,
        testing::{all_pages, any_event, any_filter, finds_what_a_scan_finds, new_row},
    },
};

const LONG: Duration = Duration::from_secs(60);
const HOUR: Duration = Duration::from_secs(3600);

const HISTORY: HistoryConfig =
    HistoryConfig { retention: Duration::from_secs(7 * 86_400), max_bytes: 64 << 20, bodies: true };

fn config(dir: &Path) -> SqliteConfig {
    SqliteConfig {
        data_dir: dir.to_owned(),
        history: HISTORY,
        log: None,
        keys: Vec::new(),
        without_history: None,
    }
}

fn roomy(_: &Path) -> Option<(u64, u64)> {
    Some((u64::MAX, u64::MAX))
}

/// A store with chunks of seven events.
async fn start(config: SqliteConfig) -> SqliteStore {
    opened(SqliteStore::start_with(config, 7, roomy)).await
}

async fn opened(store: SqliteStore) -> SqliteStore {
    in_state(&store, |state| matches!(state.history, HistoryState::Open)).await;
    store
}

async fn in_state(store: &SqliteStore, is: impl FnMut(&StoreState) -> bool) -> StoreState {
    let mut state = store.state();
    let waited = tokio::time::timeout(Duration::from_secs(20), state.wait_for(is)).await;
    waited.expect("in time").expect("it lives").clone()
}

fn event(n: u32) -> NewRow {
    NewRow {
        number: None,
        at: time(millis(now())),
        event_type: format!("type.{}", n % 3),
        message_id: Some(format!("id-{n}")),
        body: format!(
            r#"{{"event":"type.{}","actor":{{"id":{n},"name":"Ann"}},"description":"The {n}th <b>","timestamp":{n}}}"#,
            n % 3
        )
        .into(),
        redelivered: false, tenant: None,
    }
}

async fn append(store: &SqliteStore, numbers: std::ops::Range<u32>) -> Appended {
    store.append(numbers.map(event).collect()).await.expect("appends")
}

async fn numbers(store: &SqliteStore, filter: &EventFilter) -> Vec<i64> {
    all_pages(store, filter, 10).await.iter().map(|row| row.number.0).collect()
}

fn by_text(text: &str) -> EventFilter {
    EventFilter { text: Some(text.to_owned()), ..EventFilter::default() }
}

fn change(id: &str, change: Change) -> DeliveryChange {
    let subscriber = SubscriberName::try_new("siem").expect("a name");
    DeliveryChange { id: BatchId::from(id), subscriber, at: now(), change }
}

fn contents() -> Contents {
    Contents {
        format: Some(Format::JsonLines),
        events: 2,
        bytes: 77,
        sha256: Some([7; 32]),
        prints: Some([Print::of(b"a"), Print::of(b"b")].into()),
        replay: false,
        parent: Some(BatchId::from("msg_0")),
    }
}

fn started(id: &str) -> DeliveryChange {
    change(id, Change::Started { attempt: 1, contents: contents(), by: "host:1".to_owned() })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn a_search_finds_what_a_scan_finds(
        events in proptest::collection::vec(any_event(), 1..40),
        filters in proptest::collection::vec(any_filter(), 12),
        limit in 1..6_usize,
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.expect("a runtime").block_on(async {
            let dir = tempfile::tempdir().expect("a directory");
            let store = start(config(dir.path())).await;
            let events: Vec<NewRow> = events.iter().map(new_row).collect();
            finds_what_a_scan_finds(&store, &events, &filters, limit).await;
            store.close(true).await;
        });
    }
}

/// The number of parts of the index of each chunk, the oldest chunk first.
async fn parts(store: &SqliteStore) -> Vec<i64> {
    let count = |db: &Connection| {
        let mut chunks = chunk::Chunk::list(db)?;
        chunks.reverse();
        let parts = chunks.iter().map(|chunk| {
            let sql = format!("SELECT count(DISTINCT segid) FROM {}_idx", chunk.words());
            db.query_row(&sql, [], |row| row.get(0))
        });
        parts.collect::<rusqlite::Result<Vec<i64>>>()
    };
    store.0.open().expect("is open").history.read(count).await.expect("reads")
}

#[tokio::test]
async fn the_index_of_a_full_chunk_becomes_one_part_and_is_left_alone_then() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = start(config(dir.path())).await;
    // Each call adds a part.
    for n in 0..24 {
        append(&store, n..n + 1).await;
    }
    assert_eq!(parts(&store).await, [7, 7, 7, 3]);
    assert!(store.trim(now()).await.expect("trims"), "there is more to do");
    while store.trim(now()).await.expect("trims") {}
    assert_eq!(parts(&store).await, [1, 1, 1, 3], "the latest takes events");
    let all: Vec<i64> = (1..=24).rev().collect();
    assert_eq!(numbers(&store, &by_text("the")).await, all);
    assert_eq!(numbers(&store, &by_text("11th")).await, [12]);
    let open = store.0.open().expect("is open");
    let commits = *open.history.commits().borrow();
    assert!(!store.trim(now()).await.expect("trims"), "there is nothing to do");
    let version = async || {
        let read = |db: &Connection| {
            db.query_row("SELECT sum(length(block)) + max(id) FROM word_1_data", [], |row| {
                row.get::<_, i64>(0)
            })
        };
        open.history.read(read).await.expect("reads")
    };
    let before = version().await;
    append(&store, 24..30).await;
    while store.trim(now()).await.expect("trims") {}
    assert!(*open.history.commits().borrow() > commits);
    assert_eq!(version().await, before, "a part alone is not written again");
    assert_eq!(parts(&store).await[..4], [1; 4]);
    drop(open);
    store.close(true).await;
    // A file of a version that left its chunks as they were.
    let db = Connection::open(dir.path().join(HISTORY_FILE)).expect("opens");
    db.execute("DELETE FROM meta WHERE key IN ('packed', 'packing')", []).expect("deletes");
    drop(db);
    let store = start(config(dir.path())).await;
    while store.trim(now()).await.expect("trims") {}
    assert_eq!(parts(&store).await[..4], [1; 4]);
    assert_eq!(numbers(&store, &by_text("11th")).await, [12]);
}

#[tokio::test]
async fn an_index_is_not_written_again_while_the_disk_is_almost_full() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = start(config(dir.path())).await;
    for n in 0..10 {
        append(&store, n..n + 1).await;
    }
    store.0.state.send_modify(|state| state.history = HistoryState::Stopped("full".to_owned()));
    assert!(!store.trim(now()).await.expect("trims"));
    assert_eq!(parts(&store).await, [7, 3]);
    store.0.state.send_modify(|state| state.history = HistoryState::Open);
    while store.trim(now()).await.expect("trims") {}
    assert_eq!(parts(&store).await, [1, 3]);
}

#[tokio::test]
async fn an_event_comes_back_as_it_was_added() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = start(config(dir.path())).await;
    let appended = append(&store, 0..20).await;
    assert_eq!((appended.events, appended.last), (20, Some(EventNumber(20))));
    let sent = event(11);
    let row = store.event(EventNumber(12)).await.expect("reads").expect("is there");
    assert_eq!((row.number, &row.event_type), (EventNumber(12), &sent.event_type));
    assert_eq!((row.body.as_ref(), row.bytes), (Some(&sent.body), sent.body.len() as u64));
    assert_eq!(row.details.actor.id.as_deref(), Some("11"));
    assert_eq!(
        store.events_with_id("id-11").await.expect("reads").as_slice(),
        std::slice::from_ref(&row)
    );
    let mut digest = "sha256-".to_owned();
    tokens::push_hex(&row.sha256, &mut digest);
    assert_eq!(store.events_with_id(&digest).await.expect("reads"), [row]);
    assert_eq!(store.event(EventNumber(21)).await.expect("reads"), None);
    let range = store.rows(EventNumber(5), EventNumber(16), 500, 1 << 20).await.expect("reads");
    assert_eq!(range.iter().map(|r| r.number.0).collect::<Vec<_>>(), (6..=16).collect::<Vec<_>>());
    let range = store.rows(EventNumber(5), EventNumber(16), 500, 1).await.expect("reads");
    assert_eq!(range.len(), 1, "one however large");
    assert_eq!(numbers(&store, &EventFilter::default()).await, (1..=20).rev().collect::<Vec<_>>());
}

#[tokio::test]
async fn hostile_text_finds_nothing_and_breaks_nothing() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = start(config(dir.path())).await;
    append(&store, 0..9).await;
    let long = "x ".repeat(5 * 1024);
    for text in [
        "\"",
        "\"\"\"",
        "*",
        "a*",
        "NEAR(a b, 2)",
        "words:ann",
        "^ann",
        "ann AND",
        "{words}:x",
        "'; DROP TABLE chunk; --",
        "\0",
        "a\0b",
        "🙂",
        "%",
        "_aann",
        "-ann nothing",
        &long,
        ")(",
    ] {
        for filter in [
            by_text(text),
            EventFilter { actor: Some(text.to_owned()), ..EventFilter::default() },
            EventFilter { resource: Some(text.to_owned()), ..EventFilter::default() },
            EventFilter { id: Some(text.to_owned()), ..EventFilter::default() },
        ] {
            let is_word = matches!(text, "a*" | "^ann") && filter.text.is_some();
            let found = numbers(&store, &filter).await.len();
            assert_eq!(found, if is_word { 9 } else { 0 }, "{filter:?}");
        }
    }
    let hostile = NewRow {
        event_type: "\"; DROP TABLE chunk; --".to_owned(),
        message_id: Some("'\0\u{202e}".to_owned()),
        body: b"\xff\0 not JSON"[..].into(),
        ..event(0)
    };
    store.append(vec![hostile]).await.expect("appends");
    assert_eq!(numbers(&store, &by_text("json not")).await, [10]);
    assert_eq!(store.events_with_id("'\0\u{202e}").await.expect("reads").len(), 1);
}

#[tokio::test]
async fn a_search_whose_time_is_over_says_how_far_it_came_and_goes_on() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = start(config(dir.path())).await;
    append(&store, 0..50).await;
    let filter = by_text("7th");
    let (mut found, mut before, mut pages) = (Vec::new(), None, 0);
    loop {
        let page = store.events(&filter, before, 10, Duration::ZERO).await.expect("searches");
        found.extend(page.rows.iter().map(|row| row.number.0));
        pages += 1;
        let Some(next) = page.next else { break };
        assert!(page.searched_back_to.is_some());
        assert!(before.is_none_or(|before| EventNumber(next) < before), "each goes on");
        before = Some(EventNumber(next));
    }
    assert_eq!((found, pages), (vec![8], 8), "a chunk of seven each");
}

#[tokio::test]
async fn only_a_redelivery_of_the_same_bytes_is_a_repeat() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = start(config(dir.path())).await;
    append(&store, 0..10).await;
    let again = NewRow { redelivered: true, ..event(3) };
    let other = NewRow { body: b"{}"[..].into(), ..again.clone() };
    let nameless = NewRow { message_id: None, ..again.clone() };
    let appended = store
        .append(vec![again.clone(), event(3), other.clone(), nameless, other, event(20)])
        .await
        .expect("appends");
    assert_eq!((appended.events, appended.repeats), (4, 2));
    assert_eq!(store.events_with_id("id-3").await.expect("reads").len(), 3);
}

#[tokio::test]
async fn numbers_never_go_back() {
    let dir = tempfile::tempdir().expect("a directory");
    let last = async |numbers: std::ops::Range<u32>| {
        let store = start(config(dir.path())).await;
        let last = append(&store, numbers).await.last.expect("a number").0;
        (store, last)
    };
    let (store, number) = last(0..10).await;
    store.close(true).await;
    assert_eq!(number, 10);
    let (store, number) = last(10..12).await;
    assert_eq!(number, 12, "closed: they go on");
    store.close(true).await;
    std::fs::remove_file(dir.path().join("history.db")).expect("deletes");
    let (store, number) = last(0..1).await;
    assert_eq!(number, 13, "history was deleted");
    store.crash().await;
    let (store, number) = last(0..1).await;
    assert_eq!(number, open::RESERVED + 13, "it crashed: the last ones may be lost");
    store.close(true).await;
    std::fs::write(dir.path().join("store.db"), vec![7; 8192]).expect("damages");
    let store = start(config(dir.path())).await;
    let state = store.state().borrow().clone();
    assert!(state.warning.is_some_and(|why| why.contains("store.db")), "it says so");
    let number = append(&store, 0..1).await.last.expect("a number").0;
    assert_eq!(number, 2 * open::RESERVED + 13, "without store.db");
}

#[tokio::test]
async fn more_numbers_are_reserved_when_they_are_used_up() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = start(config(dir.path())).await;
    let open = store.0.open().expect("is open");
    open.last.store(3, Ordering::Relaxed);
    assert_eq!(append(&store, 0..10).await.last, Some(EventNumber(10)));
    assert_eq!(open.last.load(Ordering::Relaxed), open::RESERVED + 3);
}

#[tokio::test]
async fn without_bodies_fields_alone_are_kept_and_found() {
    let dir = tempfile::tempdir().expect("a directory");
    let history = HistoryConfig { bodies: false, ..HISTORY };
    let store = start(SqliteConfig { history, ..config(dir.path()) }).await;
    let row = NewRow {
        body: br#"{"event":"a","actor":{"id":"x"},"description":"kept","secret":"hidden"}"#[..]
            .into(),
        ..event(0)
    };
    store.append(vec![row.clone()]).await.expect("appends");
    let kept = store.event(EventNumber(1)).await.expect("reads").expect("is there");
    assert_eq!((kept.body, kept.bytes), (None, row.body.len() as u64));
    assert_eq!(kept.details.description.as_deref(), Some("kept"));
    assert_eq!(numbers(&store, &by_text("kept")).await, [1]);
    assert_eq!(numbers(&store, &by_text("hidden")).await, [0; 0]);
    let again = NewRow { redelivered: true, ..row };
    assert_eq!(store.append(vec![again]).await.expect("appends").repeats, 1);
}

#[tokio::test]
async fn what_is_too_old_or_too_much_is_removed_by_chunks_and_never_shown() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = start(config(dir.path())).await;
    let old = |n| NewRow { at: now() - HISTORY.retention - HOUR, ..event(n) };
    store.append((0..14).map(old).collect()).await.expect("appends");
    append(&store, 14..20).await;
    assert_eq!(numbers(&store, &EventFilter::default()).await, (15..=20).rev().collect::<Vec<_>>());
    assert_eq!(numbers(&store, &by_text("ann")).await.len(), 6);
    assert_eq!(store.event(EventNumber(3)).await.expect("reads"), None);
    let mut trims = 0;
    while store.trim(now()).await.expect("trims") {
        trims += 1;
    }
    assert_eq!(trims, 2);
    let reach = store.reach().await.expect("reads");
    assert_eq!((reach.events, reach.last.map(|(n, _)| n)), (6, Some(EventNumber(20))));
    while store.trim(now() + HISTORY.retention + HOUR).await.expect("trims") {}
    assert_eq!(store.reach().await.expect("reads").events, 0);
    assert_eq!(append(&store, 20..21).await.last, Some(EventNumber(21)), "numbers go on");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_search_does_not_notice_that_chunks_are_removed() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = start(config(dir.path())).await;
    let writer = store.clone();
    let writing = tokio::spawn(async move {
        for n in 0..60 {
            let at = now() - HISTORY.retention + HOUR;
            let rows = (n * 7..n * 7 + 7).map(|n| NewRow { at, ..event(n) }).collect();
            writer.append(rows).await.expect("appends");
            if n > 30 {
                writer.trim(now() + HOUR * 2).await.expect("trims");
            }
        }
    });
    while !writing.is_finished() {
        let found = store.events(&by_text("ann"), None, 500, LONG).await.expect("searches");
        store.events(&EventFilter::default(), None, 500, LONG).await.expect("lists");
        store.reach().await.expect("reads");
        let numbers: Vec<i64> = found.rows.iter().map(|row| row.number.0).collect();
        assert!(numbers.windows(2).all(|pair| pair[1] == pair[0] - 1), "{numbers:?}");
    }
    writing.await.expect("it has written all");
}

#[tokio::test]
async fn a_history_that_is_full_gives_the_oldest_chunks_away() {
    let dir = tempfile::tempdir().expect("a directory");
    let history = HistoryConfig { max_bytes: 16 << 20, ..HISTORY };
    let store = start(SqliteConfig { history, ..config(dir.path()) }).await;
    let large = |n: u32| NewRow { body: vec![b'x'; 100_000].into(), ..event(n) };
    for round in 0..30 {
        let rows = (round * 10..round * 10 + 10).map(large).collect();
        store.append(rows).await.expect("appends");
        while store.trim(now()).await.expect("trims") {}
    }
    let reach = store.reach().await.expect("reads");
    assert!(reach.bytes <= 16 << 20, "{reach:?}");
    assert!((100..160).contains(&reach.events), "{reach:?}");
    assert_eq!(reach.why, "max_bytes of 16MiB");
    assert_eq!(reach.last.map(|(n, _)| n), Some(EventNumber(300)));
}

#[path = "deliveries/tests.rs"]
mod of_deliveries;

#[path = "open/tests.rs"]
mod of_files;

#[path = "replays/tests.rs"]
mod of_replays;

#[path = "source/tests.rs"]
mod of_logs;

#[path = "kept/tests.rs"]
mod subscribers;

#[path = "hours/tests.rs"]
mod hours_of_events;

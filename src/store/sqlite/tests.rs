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
        redelivered: false,
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

#[tokio::test]
async fn a_damaged_history_is_set_aside_and_begun_again() {
    // All of it, or all but the schema.
    for sound in [0, 8192] {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("history.db");
        let store = start(config(dir.path())).await;
        append(&store, 0..5).await;
        store.close(true).await;
        let mut bytes = std::fs::read(&path).expect("reads");
        bytes[sound..].fill(0x5a);
        std::fs::write(&path, bytes).expect("damages");
        let store = start(config(dir.path())).await;
        let reach = store.reach().await.expect("reads");
        assert!(reach.why.contains("damaged, and set aside as `history.db.damaged-"), "{reach:?}");
        assert_eq!((reach.events, reach.gaps.len()), (0, 2), "{sound}");
        assert_eq!(append(&store, 0..1).await.last, Some(EventNumber(6)));
        store.close(true).await;
    }
}

#[tokio::test]
async fn damage_that_a_query_meets_is_set_aside_too() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("history.db");
    let store = opened(SqliteStore::start_with(config(dir.path()), 5000, roomy)).await;
    for n in 0..40 {
        append(&store, n * 20..n * 20 + 20).await;
    }
    store.close(true).await;
    // All but the first pages, which hold the schema and what is read first.
    let mut bytes = std::fs::read(&path).expect("reads");
    bytes[24 * 8192..].fill(0x5a);
    std::fs::write(&path, bytes).expect("damages");
    let store = start(config(dir.path())).await;
    let mut state = store.state();
    state.mark_unchanged();
    let found = store.events(&by_text("ann"), None, 500, LONG).await;
    let error = found.expect_err("it is damaged");
    assert!(error.is_away() && error.to_string().contains("damaged"), "{error}");
    state.changed().await.expect("it is closed");
    opened(store.clone()).await;
    assert!(store.reach().await.expect("reads").why.contains("set aside"));
    append(&store, 0..1).await;
}

#[tokio::test]
async fn a_deleted_history_begins_again() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = start(config(dir.path())).await;
    append(&store, 0..10).await;
    std::fs::remove_file(dir.path().join("history.db")).expect("deletes");
    in_state(&store, |state| state.history == HistoryState::Opening).await;
    opened(store.clone()).await;
    let reach = store.reach().await.expect("reads");
    assert!(reach.why.contains("deleted or moved"), "{reach:?}");
    assert!(append(&store, 0..1).await.last > Some(EventNumber(10)));
}

#[tokio::test]
async fn a_store_that_cannot_be_opened_is_away_until_it_can() {
    let dir = tempfile::tempdir().expect("a directory");
    let first = start(config(dir.path())).await;
    let second = SqliteStore::start_with(config(dir.path()), 7, roomy);
    let error = second.append(vec![event(0)]).await.expect_err("is away");
    assert!(error.is_away());
    let away = |state: &StoreState| matches!(&state.history, HistoryState::Away(why) if why.contains("another daemon"));
    in_state(&second, away).await;
    first.close(true).await;
    assert!(first.append(vec![event(0)]).await.is_err_and(|e| e.is_away()));
    opened(second.clone()).await;
    append(&second, 0..1).await;
    second.close(true).await;
    let later = rusqlite::Connection::open(dir.path().join("history.db")).expect("opens");
    later.pragma_update(None, "user_version", 99).expect("writes");
    drop(later);
    let store = SqliteStore::start_with(config(dir.path()), 7, roomy);
    in_state(
        &store,
        |state| matches!(&state.history, HistoryState::Away(why) if why.contains("later version")),
    )
    .await;
}

async fn gaps(store: &SqliteStore) -> Vec<Gap> {
    store.reach().await.expect("reads").gaps
}

#[tokio::test]
async fn a_process_that_did_not_record_all_leaves_a_gap_and_one_that_did_leaves_none() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = start(config(dir.path())).await;
    let change = started("msg_1");
    let recorded = time(millis(change.at));
    store.record(vec![change]).await.expect("records");
    store.close(true).await;
    let store = start(config(dir.path())).await;
    assert_eq!(gaps(&store).await, []);
    store.crash().await;
    let killed = now();
    let store = start(config(dir.path())).await;
    let [gap] = &gaps(&store).await[..] else { panic!("{:?}", gaps(&store).await) };
    assert_eq!((gap.what, gap.from), ("deliveries", recorded));
    assert!(gap.until >= time(millis(killed)) && gap.why.contains("killed"), "{gap:?}");
    // What is recorded later is no part of the next one.
    store.record(vec![started("msg_2")]).await.expect("records");
    store.close(false).await;
    let store = start(config(dir.path())).await;
    let all = gaps(&store).await;
    assert!(all.last().is_some_and(|gap| gap.until > killed), "{all:?}");
    store.close(true).await;
    let store = start(config(dir.path())).await;
    assert_eq!(gaps(&store).await, all);
}

#[tokio::test]
async fn a_process_that_never_had_history_open_leaves_a_gap_unless_it_ends_well() {
    let dir = tempfile::tempdir().expect("a directory");
    let (path, aside) = (dir.path().join("history.db"), dir.path().join("aside"));
    let store = start(config(dir.path())).await;
    store.record(vec![started("msg_1")]).await.expect("records");
    store.close(true).await;
    for (complete, number) in [(true, 0), (false, 1)] {
        std::fs::rename(&path, &aside).expect("renames");
        std::fs::create_dir(&path).expect("is in its place");
        let store = SqliteStore::start_with(config(dir.path()), 7, roomy);
        in_state(&store, |state| matches!(state.history, HistoryState::Away(_))).await;
        store.close(complete).await;
        std::fs::remove_dir(&path).expect("removes");
        std::fs::rename(&aside, &path).expect("renames");
        let store = start(config(dir.path())).await;
        assert_eq!(gaps(&store).await.len(), number, "{complete}");
        store.close(true).await;
    }
}

#[tokio::test]
async fn a_history_that_is_put_back_lacks_what_was_recorded_meanwhile() {
    let dir = tempfile::tempdir().expect("a directory");
    let (path, aside) = (dir.path().join("history.db"), dir.path().join("aside"));
    let store = start(config(dir.path())).await;
    store.record(vec![started("msg_1")]).await.expect("records");
    store.close(true).await;
    std::fs::copy(&path, &aside).expect("copies");
    let store = start(config(dir.path())).await;
    store.record(vec![started("msg_2")]).await.expect("records");
    std::fs::rename(&aside, &path).expect("renames");
    in_state(&store, |state| state.history == HistoryState::Opening).await;
    opened(store.clone()).await;
    assert!(store.delivery("msg_2").await.expect("reads").is_none());
    let all = gaps(&store).await;
    assert!(matches!(&all[..], [gap] if gap.what == "deliveries"), "{all:?}");
    store.close(true).await;
}

#[tokio::test]
async fn a_history_that_was_deleted_or_emptied_between_two_daemons_has_a_gap() {
    for emptied in [false, true] {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("history.db");
        let store = start(config(dir.path())).await;
        append(&store, 0..10).await;
        assert_eq!(gaps(&store).await, [], "the first of all begins here");
        store.close(true).await;
        match emptied {
            true => std::fs::write(&path, "").expect("writes"),
            false => std::fs::remove_file(&path).expect("removes"),
        }
        let store = start(config(dir.path())).await;
        let reach = store.reach().await.expect("reads");
        assert!(reach.why.contains("deleted or emptied"), "{reach:?}");
        assert_eq!(
            reach.gaps.iter().map(|gap| gap.what).collect::<Vec<_>>(),
            ["events", "deliveries"]
        );
        store.close(true).await;
    }
}

static FREE: AtomicU64 = AtomicU64::new(u64::MAX);

#[tokio::test]
async fn history_stops_while_the_disk_is_almost_full() {
    let dir = tempfile::tempdir().expect("a directory");
    let disk = |_: &Path| Some((FREE.load(Ordering::Relaxed), 1 << 40));
    let store = opened(SqliteStore::start_with(config(dir.path()), 7, disk)).await;
    append(&store, 0..3).await;
    FREE.store((1 << 30) - 1, Ordering::Relaxed);
    let stopped = |state: &StoreState| matches!(&state.history, HistoryState::Stopped(why) if why.contains("1023MiB are free"));
    in_state(&store, stopped).await;
    assert!(store.append(vec![event(3)]).await.is_err_and(|e| e.is_away()));
    assert_eq!(numbers(&store, &EventFilter::default()).await.len(), 3, "it can be read");
    store.trim(now()).await.expect("room is made");
    // The daemon is killed before there is room again.
    store.crash().await;
    let store = SqliteStore::start_with(config(dir.path()), 7, disk);
    in_state(&store, stopped).await;
    // A killed daemon has a gap of its own.
    let is_told = |gaps: &[Gap]| match gaps {
        [killed, full] => {
            killed.why.contains("was killed") && full.why == "the disk was almost full"
        }
        _ => false,
    };
    let gaps = store.reach().await.expect("reads").gaps;
    assert!(is_told(&gaps), "{gaps:?}");
    let waiting = tokio::spawn({
        let store = store.clone();
        async move { store.writable().await }
    });
    assert!(store.append(vec![event(3)]).await.is_err_and(|e| e.is_away()));
    assert!(!waiting.is_finished());
    FREE.store(1 << 30, Ordering::Relaxed);
    opened(store.clone()).await;
    waiting.await.expect("ends").expect("it can be written");
    append(&store, 3..4).await;
    let gaps = store.reach().await.expect("reads").gaps;
    assert!(is_told(&gaps), "{gaps:?}");
    store.close(true).await;
    assert!(store.writable().await.is_err_and(|e| e.is_away()), "it is closed");
}

#[tokio::test]
async fn a_command_reads_without_a_daemon_and_alongside_one() {
    let dir = tempfile::tempdir().expect("a directory");
    assert!(SqliteStore::read_only(config(dir.path())).is_err_and(|e| e.is_away()));
    let store = start(config(dir.path())).await;
    append(&store, 0..10).await;
    let command = SqliteStore::read_only(config(dir.path())).expect("opens");
    assert_eq!(numbers(&command, &by_text("ann")).await.len(), 10);
    append(&store, 10..20).await;
    assert_eq!(numbers(&command, &by_text("ann")).await.len(), 20);
    assert!(command.append(vec![event(0)]).await.is_err());
    command.close(true).await;
    store.close(true).await;
    let command = SqliteStore::read_only(config(dir.path())).expect("opens");
    assert_eq!(command.reach().await.expect("reads").events, 20);
}

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

#[tokio::test]
async fn the_precious_file_is_opened_as_soon_as_it_can_be() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("store.db");
    std::fs::create_dir(&path).expect("something else is there");
    let store = start(config(dir.path())).await;
    append(&store, 0..10).await;
    assert!(store.id().await.is_err() && store.state().borrow().warning.is_some());
    std::fs::remove_dir(&path).expect("it is not there any more");
    let mut states = store.state();
    let is_sound =
        |state: &StoreState| matches!(state.history, HistoryState::Open) && state.warning.is_none();
    states.wait_for(is_sound).await.expect("it is kept");
    assert!(store.id().await.is_ok());
    append(&store, 10..20).await;
    assert_eq!(numbers(&store, &by_text("ann")).await.len(), 20);
    store.close(true).await;
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

#[tokio::test]
async fn a_delivery_is_what_its_changes_made_it() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = start(config(dir.path())).await;
    let end = AttemptEnd {
        status: Some(503),
        failure: Some(crate::delivery::FailureKind::Status),
        excerpt: "busy \"now\"\0".to_owned(),
    };
    let ended = Change::Ended { attempt: 1, took: Duration::from_millis(12), end };
    let due = time(millis(now())) + HOUR;
    let changes = [
        started("msg_1"),
        change("msg_1", ended),
        change("msg_1", Change::Retrying { due }),
        change("msg_2", Change::Dead { reason: Reason::InvalidEvent, contents: Some(contents()) }),
        change("msg_3", Change::Delivered),
        started("msg_4"),
    ];
    let (first, second) = changes.split_at(1);
    store.record(first.to_vec()).await.expect("records");
    store.record(second.to_vec()).await.expect("records");
    let one = store.delivery("msg_1").await.expect("reads").expect("is there");
    let mut expected = Delivery::begin(one.row, &changes[0]).expect("begins");
    expected.apply(&changes[1]);
    expected.apply(&changes[2]);
    let whole = |at: SystemTime| time(millis(at));
    expected.begun_at = whole(expected.begun_at);
    expected.changed_at = whole(expected.changed_at);
    expected.attempts[0].at = whole(expected.attempts[0].at);
    assert_eq!(one, expected);
    assert_eq!(store.delivery("msg_3").await.expect("reads"), None, "its begin is not known");
    let listed = async |state: Option<&str>| {
        let filter = DeliveryFilter { state: state.map(str::to_owned), ..Default::default() };
        let page = store.deliveries(&filter, None, 10, LONG).await.expect("lists");
        page.rows.iter().map(|d| d.id.to_string()).collect::<Vec<_>>()
    };
    assert_eq!(listed(None).await, ["msg_4", "msg_2", "msg_1"]);
    assert_eq!(listed(Some("dead")).await, ["msg_2"]);
    assert_eq!(listed(Some("in_flight")).await, ["msg_4"]);
    assert_eq!(listed(Some("delivered")).await, [""; 0]);
    assert_eq!(listed(Some("no such state")).await, [""; 0]);
    let (since, until) = (now() - HOUR, now() + HOUR);
    let found = store.deliveries_with("siem", Print::of(b"b"), since, until, LONG).await;
    assert_eq!(found.expect("finds").deliveries.len(), 3);
    let found = store.deliveries_with("siem", Print::of(b"c"), since, until, LONG).await;
    assert_eq!(found.expect("finds"), WithEvent::default());
    store.close(true).await;
    let store = start(config(dir.path())).await;
    let state = store.delivery("msg_4").await.expect("reads").map(|d| d.state);
    assert_eq!(state, Some(DeliveryState::Interrupted), "its daemon has ended");
}

#[tokio::test]
async fn deliveries_are_listed_in_pages_and_removed_when_they_are_old() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = start(config(dir.path())).await;
    let old = now() - HISTORY.retention - HOUR;
    let begin = |n: u32| DeliveryChange {
        at: if n < 1500 { old } else { now() },
        ..started(&format!("msg_{n}"))
    };
    let delivered = |n: u32| DeliveryChange {
        change: Change::Delivered,
        // One that is old has changed today.
        at: if n == 7 { now() } else { begin(n).at },
        ..begin(n)
    };
    store
        .record((0..3000).flat_map(|n| [begin(n), delivered(n)]).collect())
        .await
        .expect("records");
    let filter = DeliveryFilter { subscriber: Some("siem".to_owned()), ..Default::default() };
    let first = store.deliveries(&filter, None, 2, LONG).await.expect("lists");
    assert_eq!(first.rows.iter().map(|d| d.row).collect::<Vec<_>>(), [3000, 2999]);
    let second = store.deliveries(&filter, first.next, 500, LONG).await.expect("lists");
    assert_eq!((second.rows.len(), second.rows[0].row), (500, 2998));
    let late = store.deliveries(&filter, Some(1510), 500, LONG).await.expect("lists");
    assert_eq!((late.rows.len(), late.next), (9, None), "older ones are not shown");
    let cut = store.deliveries(&filter, None, 500, Duration::ZERO).await.expect("lists");
    assert!(cut.next == Some(3000) && cut.searched_back_to.is_some());
    let mut trims = 0;
    while store.trim(now()).await.expect("trims") {
        trims += 1;
    }
    assert_eq!(trims, 2, "some at once");
    assert!(store.delivery("msg_7").await.expect("reads").is_some());
    assert!(store.delivery("msg_8").await.expect("reads").is_none());
    // Those after the last mark go with the next one.
    assert!(store.delivery("msg_1022").await.expect("reads").is_none());
}

#[tokio::test]
async fn deliveries_are_listed_by_the_state_that_is_known() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = start(config(dir.path())).await;
    let at = |id: &str, before: Duration, what: Change| DeliveryChange {
        at: now() - before,
        ..change(id, what)
    };
    let begun = |id: &str, before| DeliveryChange { at: now() - before, ..started(id) };
    let due = |before| Change::Retrying { due: now() - before };
    let (long, short) = (HOUR, Duration::from_secs(5));
    let changes = vec![
        begun("msg_overdue", long),
        at("msg_overdue", long, due(long)),
        begun("msg_retrying", short),
        at("msg_retrying", short, due(short)),
        begun("msg_endless", long),
        begun("msg_in_flight", short),
        begun("msg_delivered", long),
        at("msg_delivered", long, Change::Delivered),
    ];
    store.record(changes).await.expect("records");
    let ids = async |state: &str| {
        let filter = DeliveryFilter { state: Some(state.to_owned()), ..Default::default() };
        let found = store.deliveries(&filter, None, 10, LONG).await.expect("lists").rows;
        found.iter().map(|d| d.id.as_str().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(ids("retrying").await, ["msg_retrying"]);
    assert_eq!(ids("in_flight").await, ["msg_in_flight"]);
    assert_eq!(ids("unknown").await, ["msg_endless", "msg_overdue"]);
    assert_eq!(ids("delivered").await, ["msg_delivered"]);
}

#[tokio::test]
async fn patterns_are_kept_with_the_times_in_which_they_held() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = start(config(dir.path())).await;
    let name = |name| SubscriberName::try_new(name).expect("a name");
    let patterns = |all: &[&str]| {
        all.iter().map(|p| Pattern::try_new(p).expect("a pattern")).collect::<Vec<_>>()
    };
    let at = |hours: u32| time(millis(now() - HOUR * (10 - hours)));
    let times = [at(1), at(2), at(3)];
    let all = [
        vec![(name("a"), patterns(&["#"])), (name("b"), patterns(&["x.*", "y"]))],
        vec![(name("a"), patterns(&["#"])), (name("b"), patterns(&["y"]))],
        vec![(name("b"), patterns(&["y"]))],
    ];
    for (wanted, at) in all.into_iter().zip(times) {
        store.subscribed(wanted.clone(), at).await.expect("records");
        store.subscribed(wanted, at + HOUR / 2).await.expect("nothing changes");
    }
    let found = store.subscriptions().await.expect("reads");
    let found: Vec<_> =
        found.iter().map(|s| (&*s.subscriber, s.patterns.len(), s.from, s.until)).collect();
    assert_eq!(
        found,
        [
            ("a", 1, times[0], Some(times[2])),
            ("b", 2, times[0], Some(times[1])),
            ("b", 1, times[1], None)
        ]
    );
}

#[tokio::test]
async fn gaps_that_adjoin_are_one() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = start(config(dir.path())).await;
    let base = time(millis(now() - HOUR));
    let gap = |from: u64, until: u64, why: &str| Gap {
        from: base + Duration::from_secs(from),
        until: base + Duration::from_secs(until),
        what: "deliveries",
        why: why.to_owned(),
        missing: Some(2),
    };
    for gap in [gap(0, 5, "full"), gap(100, 110, "full"), gap(5, 20, "other"), gap(8, 95, "full")] {
        store.add_gap(gap).await.expect("records");
    }
    let gaps = store.reach().await.expect("reads").gaps;
    let expected = [Gap { missing: Some(6), ..gap(0, 110, "full") }, gap(5, 20, "other")];
    assert_eq!(gaps, expected);
    for n in 0..300 {
        store.add_gap(gap(1000 + n, 1000 + n, &n.to_string())).await.expect("records");
    }
    let gaps = store.reach().await.expect("reads").gaps;
    assert_eq!(gaps.len(), 200);
    assert_eq!((gaps[0].from, gaps[0].missing), (base, None), "none is lost");
}

#[tokio::test]
async fn replays_operations_and_known_subscribers_are_in_the_precious_file() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = start(config(dir.path())).await;
    let first = crate::store::replays_for_tests::replay("rpl_1", "a");
    let second = Replay { id: "rpl_2".to_owned(), ..first.clone() };
    assert_eq!(store.add_replay(first.clone(), None).await, Ok(Added::New));
    assert_eq!(store.add_replay(second.clone(), None).await, Ok(Added::New));
    let (change, at) = (ReplayChange::Failed("gone".to_owned()), time(millis(now())));
    let changed = store.change_replay("rpl_1", change.clone(), at).await.expect("writes");
    let Some(Changed::Yes(changed)) = changed else { panic!("{changed:?}") };
    let changed = changed.expect("can be read");
    assert!(changed.changed_at == at);
    assert_eq!(store.change_replay("rpl_3", change, at).await, Ok(None));
    for what in ["pause", "resume", "replay"] {
        let (by, subject) = ("ops".to_owned(), "a".to_owned());
        let new = NewOperation { at, by, what, subject, details: String::new() };
        store.add_operation(new).await.expect("writes");
    }
    store.close(true).await;
    std::fs::remove_file(dir.path().join("history.db")).expect("it may be deleted");
    let store = start(config(dir.path())).await;
    let page = store.replays(None, 1).await.expect("reads");
    let second = Ok(Replay { row: 2, ..second });
    assert_eq!((&page.rows[..], page.next), (&[second.clone()][..], Some(2)));
    let failed = &store.replays(page.next, 9).await.expect("reads").rows[0];
    assert_eq!(*failed, Ok(changed.clone()));
    assert_eq!(store.replay("rpl_1").await, Ok(Some(Ok(changed))));
    assert_eq!(store.running_replays().await, Ok(vec![second]));
    let page = store.operations(None, 2).await.expect("reads");
    let whats: Vec<_> = page.rows.iter().map(|o| o.new.what).collect();
    assert_eq!((whats, page.next), (vec!["replay", "resume"], Some(2)));
    assert_eq!(store.operations(page.next, 2).await.expect("reads").rows.len(), 1);
}

#[tokio::test]
async fn a_replay_that_cannot_be_read_is_listed_with_a_remedy_hides_no_other_and_can_be_cancelled()
{
    let dir = tempfile::tempdir().expect("a directory");
    let store = start(config(dir.path())).await;
    for id in ["rpl_1", "rpl_2", "rpl_3", "rpl_4", "rpl_5"] {
        let new = crate::store::replays_for_tests::replay(id, "a");
        assert_eq!(store.add_replay(new, None).await, Ok(Added::New));
    }
    store.close(true).await;
    let file = Connection::open(dir.path().join("store.db")).expect("opens");
    for sql in [
        "UPDATE replay SET progress = '{}' WHERE id = 'rpl_1'",
        "UPDATE replay SET ordered = 'no JSON', created_at = 'never' WHERE id = 'rpl_2'",
        "UPDATE replay SET subscriber = 'no name!' WHERE id = 'rpl_3'",
        "UPDATE replay SET state = 'resting' WHERE id = 'rpl_4'",
    ] {
        assert_eq!(file.execute(sql, []).expect("writes"), 1);
    }
    drop(file);
    let store = start(config(dir.path())).await;
    let all = store.replays(None, 9).await.expect("reads").rows;
    assert!(matches!(&all[0], Ok(replay) if replay.id == "rpl_5"), "{all:?}");
    for (recorded, part) in all[1..].iter().zip([
        "no state is called `resting`",
        "subscriber: must be 1 to 64",
        "order: expected",
        "progress: missing field",
    ]) {
        let it = recorded.as_ref().expect_err(part);
        let remedy = format!("`hooktrail replay cancel {}` ends it", it.id);
        assert!(it.why.contains(part) && it.why.contains(&remedy), "{it:?}");
    }
    let running = store.running_replays().await.expect("reads");
    assert_eq!(running.iter().filter(|r| r.is_ok()).count(), 1, "the others run: {running:?}");
    let change = async |change| store.change_replay("rpl_1", change, now()).await.expect("writes");
    let progressed =
        ReplayChange::Progressed(crate::store::replays_for_tests::replay("rpl_1", "a").progress);
    for forbidden in [progressed, ReplayChange::Continued] {
        assert!(matches!(change(forbidden).await, Some(Changed::No(_))));
    }
    let cancelled = change(ReplayChange::Cancelled).await;
    let Some(Changed::Yes(it)) = cancelled else { panic!("{cancelled:?}") };
    assert_eq!(it.expect_err("it is unreadable still").state, "cancelled");
    assert!(matches!(change(ReplayChange::Cancelled).await, Some(Changed::No(_))));
    assert_eq!(store.running_replays().await.expect("reads").len(), 3);
}

#[tokio::test]
async fn a_request_with_a_key_makes_one_replay_and_its_key_is_kept_as_long() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = start(config(dir.path())).await;
    let new = |id: &str| crate::store::replays_for_tests::replay(id, "a");
    let key = |by: &str, key: &str, sha256| {
        Some(RequestKey { by: by.to_owned(), key: key.to_owned(), sha256: [sha256; 32] })
    };
    assert_eq!(store.add_replay(new("rpl_1"), key("ops", "k", 1)).await, Ok(Added::New));
    store.close(true).await;
    let store = start(config(dir.path())).await;
    let again = store.add_replay(new("rpl_2"), key("ops", "k", 1)).await;
    let Ok(Added::Before(before)) = again else { panic!("{again:?}") };
    let before = before.expect("can be read");
    assert_eq!((before.id.as_str(), before.row), ("rpl_1", 1));
    let other = store.add_replay(new("rpl_2"), key("ops", "k", 2)).await;
    assert_eq!(other, Ok(Added::OtherRequest));
    assert_eq!(store.replays(None, 9).await.expect("reads").rows.len(), 1);
    for (id, key) in [("rpl_2", key("dev", "k", 2)), ("rpl_3", key("ops", "l", 1))] {
        assert_eq!(store.add_replay(new(id), key).await, Ok(Added::New), "{id}");
    }
    let cancel = async |id| store.change_replay(id, ReplayChange::Cancelled, now()).await;
    assert!(matches!(cancel("rpl_1").await, Ok(Some(Changed::Yes(_)))));
    store.close(true).await;
    let file = Connection::open(dir.path().join("store.db")).expect("opens");
    let sql = format!("UPDATE sqlite_sequence SET seq = {MAX_REPLAYS} WHERE name = 'replay'");
    assert_eq!(file.execute(&sql, []).expect("writes"), 1);
    drop(file);
    let store = start(config(dir.path())).await;
    assert_eq!(store.add_replay(new("rpl_9"), None).await, Ok(Added::New));
    assert_eq!(store.replay("rpl_1").await, Ok(None), "it has ended, and many came later");
    assert!(matches!(store.replay("rpl_2").await, Ok(Some(Ok(_)))), "it runs");
    assert_eq!(store.add_replay(new("rpl_10"), key("ops", "k", 2)).await, Ok(Added::New));
}

#[tokio::test]
async fn so_many_replays_run_and_no_more() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = start(config(dir.path())).await;
    let new = |n: usize| crate::store::replays_for_tests::replay(&format!("rpl_{n}"), "a");
    for n in 0..MAX_RUNNING {
        assert_eq!(store.add_replay(new(n), None).await, Ok(Added::New));
    }
    let refused = store.add_replay(new(99), None).await;
    let Ok(Added::TooMany(running)) = refused else { panic!("{refused:?}") };
    assert_eq!(running.len(), MAX_RUNNING);
    let change = async |id, change| {
        store.change_replay(id, change, now()).await.expect("writes").expect("is there")
    };
    assert!(matches!(change("rpl_3", ReplayChange::Cancelled).await, Changed::Yes(_)));
    assert_eq!(store.add_replay(new(99), None).await, Ok(Added::New));
    let refused = change("rpl_3", ReplayChange::Continued).await;
    assert!(matches!(&refused, Changed::TooMany(all) if all.len() == MAX_RUNNING), "{refused:?}");
    assert!(matches!(change("rpl_5", ReplayChange::Cancelled).await, Changed::Yes(_)));
    assert!(matches!(change("rpl_3", ReplayChange::Continued).await, Changed::Yes(_)));
}

fn newcomer(name: &str, start_from: Option<SystemTime>) -> Newcomer {
    Newcomer { name: name.into(), start_from }
}

fn names(names: &[&str]) -> BTreeSet<SubscriberName> {
    names.iter().copied().map(SubscriberName::from).collect()
}

#[tokio::test]
async fn a_subscriber_is_new_once_and_not_if_it_was_bound_before_it_was_recorded() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = start(config(dir.path())).await;
    let since = time(millis(now() - HOUR));
    let both = vec![newcomer("old", Some(since)), newcomer("new", Some(since))];
    let all = store.introduce(both, Some(names(&["old", "off"])), now()).await.expect("writes");
    let waiting = vec![("new".into(), since)];
    assert_eq!(all, Introduced { waiting: waiting.clone(), not_new: vec!["old".into()] });
    // Off was bound; a later `start_from` of new is not the one that counts.
    let later = vec![newcomer("off", Some(now())), newcomer("new", Some(now()))];
    let again = store.introduce(later, Some(names(&[])), now()).await.expect("writes");
    assert_eq!(again, Introduced { waiting, not_new: Vec::new() });
    store.close(true).await;
    let store = start(config(dir.path())).await;
    let replay = crate::store::replays_for_tests::replay("rpl_1", "new");
    let done = store.begin_newcomers(vec![("new".into(), Some(replay.clone()))]).await;
    assert_eq!(done, Ok(names(&["new"])));
    // An answer was lost.
    let other = Replay { id: "rpl_2".to_owned(), ..replay };
    let done = store.begin_newcomers(vec![("new".into(), Some(other))]).await;
    assert_eq!(done, Ok(names(&["new"])));
    assert_eq!(store.running_replays().await.expect("reads").len(), 1);
    let again = store.introduce(vec![newcomer("new", Some(since))], None, now()).await;
    assert_eq!(again, Ok(Introduced::default()));
    let later = store.introduce(vec![newcomer("b", Some(since))], None, now()).await;
    assert_eq!(later.expect("writes").waiting, [("b".into(), since)]);
}

#[tokio::test]
async fn a_store_without_a_record_knows_nobody_and_takes_none_for_new_where_the_queue_is_silent() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = start(config(dir.path())).await;
    let found = store.introduce(vec![newcomer("a", Some(now()))], None, now()).await;
    assert_eq!(found, Ok(Introduced { waiting: Vec::new(), not_new: vec!["a".into()] }));
}

#[tokio::test]
async fn first_replays_count_among_those_that_run_and_wait_while_these_are_too_many() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = start(config(dir.path())).await;
    let new = |n: usize| crate::store::replays_for_tests::replay(&format!("rpl_{n}"), "a");
    for n in 2..MAX_RUNNING {
        assert_eq!(store.add_replay(new(n), None).await, Ok(Added::New));
    }
    let three = ["a", "b", "c"];
    let all = three.map(|name| newcomer(name, Some(now()))).to_vec();
    store.introduce(all, Some(names(&[])), now()).await.expect("writes");
    let begin = |n: usize| (SubscriberName::from(three[n]), Some(new(100 + n)));
    let done = store.begin_newcomers(vec![begin(0), begin(1), begin(2)]).await;
    assert_eq!(done, Ok(names(&["a", "b"])));
    assert_eq!(store.running_replays().await.expect("reads").len(), MAX_RUNNING);
    assert!(matches!(store.add_replay(new(1), None).await, Ok(Added::TooMany(_))));
    let left = store.introduce(Vec::new(), None, now()).await.expect("writes").waiting;
    assert_eq!(left.len(), 1);
    assert_eq!(store.begin_newcomers(vec![("c".into(), None)]).await, Ok(names(&["c"])));
    assert_eq!(store.introduce(Vec::new(), None, now()).await, Ok(Introduced::default()));
}

#[tokio::test]
async fn the_rows_for_a_new_subscriber_outlive_the_retention_before_its_replay_is_made() {
    let dir = tempfile::tempdir().expect("a directory");
    let history = HistoryConfig { retention: HOUR, ..HISTORY };
    let store = start(SqliteConfig { history, ..config(dir.path()) }).await;
    append(&store, 0..21).await;
    let (since, later) = (now() - HOUR, now() + 2 * HOUR);
    let whole = store.extent(since, None, None).await.expect("reads").expect("has rows");
    for cut in [0, 1, 9, 20] {
        let upto = EventNumber(whole.after.0 + cut);
        let extent = store.extent(since, None, Some(upto)).await.expect("reads");
        let expected = Extent { upto, rows: cut.unsigned_abs(), ..whole };
        assert_eq!(extent, (cut > 0).then_some(expected), "{cut}");
    }
    let new = vec![newcomer("a", Some(since))];
    store.introduce(new, Some(names(&[])), now()).await.expect("writes");
    assert_eq!(store.replay_floor().await, Ok(Some(whole.after)));
    let rows = async || {
        while store.trim(later).await.expect("trims") {}
        store.rows(whole.after, whole.upto, MAX_ROWS, usize::MAX).await.expect("reads").len()
    };
    assert_eq!(rows().await, 21);
    store.begin_newcomers(vec![("a".into(), None)]).await.expect("writes");
    assert_eq!((rows().await, store.replay_floor().await), (0, Ok(None)));
}

#[tokio::test]
async fn the_rows_of_a_running_replay_outlive_the_retention_and_are_known_by_their_time() {
    let dir = tempfile::tempdir().expect("a directory");
    let history = HistoryConfig { retention: HOUR, ..HISTORY };
    let store = start(SqliteConfig { history, ..config(dir.path()) }).await;
    append(&store, 0..21).await;
    let (since, later) = (now() - HOUR, now() + 2 * HOUR);
    let extent = store.extent(since, None, None).await.expect("reads").expect("has rows");
    let last = store.reach().await.expect("reads").last.expect("has rows").0;
    assert_eq!((extent.upto, extent.rows), (last, 21));
    assert_eq!(store.extent(since, Some(since), None).await, Ok(None));
    assert_eq!(store.extent(later, None, None).await, Ok(None));
    let mut replay = crate::store::replays_for_tests::replay("rpl_1", "a");
    // Two of three chunks are still to be read.
    replay.progress.position = EventNumber(extent.after.0 + 8);
    store.add_replay(replay, None).await.expect("writes");
    let rows = async || {
        while store.trim(later).await.expect("trims") {}
        store.rows(extent.after, last, MAX_ROWS, usize::MAX).await.expect("reads").len()
    };
    assert_eq!(rows().await, 14);
    store.change_replay("rpl_1", ReplayChange::Cancelled, now()).await.expect("writes");
    assert_eq!(rows().await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_is_complete_says_so_before_its_files_are_closed() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = start(config(dir.path())).await;
    let (begun, has_begun) = std::sync::mpsc::channel::<()>();
    let (end, ends) = std::sync::mpsc::channel::<()>();
    let open = store.0.open().expect("is open");
    let long = tokio::spawn(async move {
        let query = move |_: &Connection| {
            drop(begun);
            ends.recv().ok();
            Ok(())
        };
        open.history.read_long(query).await.expect("reads");
    });
    tokio::task::spawn_blocking(move || has_begun.recv().ok()).await.expect("begins");
    let closing = tokio::spawn({
        let store = store.clone();
        async move { store.close(true).await }
    });
    let is_complete = async {
        while std::fs::metadata(dir.path().join(LOCK)).expect("a lock").len() > 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(LONG, is_complete).await.expect("in time");
    assert!(!closing.is_finished(), "the query still runs");
    drop(end);
    long.await.expect("ends");
    closing.await.expect("ends");
}

#[path = "kept/tests.rs"]
mod subscribers;

#[path = "hours/tests.rs"]
mod hours_of_events;

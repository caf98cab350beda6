//! The files of a store: damaged, deleted, away, full; and what history lacks then.

use super::*;

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

#[tokio::test]
async fn a_history_that_began_while_the_store_was_away_learns_from_it_that_there_was_one_before() {
    for was_deleted in [false, true] {
        let dir = tempfile::tempdir().expect("a directory");
        let (path, precious) = (dir.path().join("history.db"), dir.path().join("store.db"));
        let away = dir.path().join("away");
        if was_deleted {
            let store = start(config(dir.path())).await;
            append(&store, 0..10).await;
            store.close(true).await;
            std::fs::remove_file(&path).expect("removes");
            std::fs::rename(&precious, &away).expect("renames");
        }
        std::fs::create_dir(&precious).expect("no file can be opened there");
        let store = SqliteStore::start_with(config(dir.path()), 7, roomy);
        in_state(&store, |state| state.history == HistoryState::Open).await;
        assert_eq!(gaps(&store).await, [], "nothing says that there was a history");
        std::fs::remove_dir(&precious).expect("removes");
        if was_deleted {
            std::fs::rename(&away, &precious).expect("renames");
        }
        store.close(true).await;
        let store = start(config(dir.path())).await;
        let found = gaps(&store).await;
        let (events, deliveries) = (|g: &Gap| g.what == "events", |g: &Gap| g.what == "deliveries");
        assert_eq!(found.iter().any(events), was_deleted, "{found:?}");
        assert_eq!(found.iter().any(deliveries), was_deleted, "{found:?}");
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

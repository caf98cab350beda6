//! Replays, operations, and subscribers that are new.

use super::*;

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

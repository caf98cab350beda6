//! Subscribers made over the API, in their files.

use std::{fs, os::unix::fs::PermissionsExt as _, path::PathBuf};

use tokio::sync::watch;

use super::{
    copy::Copy,
    schema::{COPY_FILE, KEY_FILE},
    *,
};
use crate::{
    crypto::{seal::SealKey, secret::Secret},
    store::{
        Deleted, KeptSubscriber, KeptSubscribers, StoredSubscriber,
        testing::{
            open_subscribers, operation, put, subscribers_are_changed_by_who_knows_their_version,
        },
    },
};

const DOCUMENT: &str = "{\"url\":\"https://example.com/hook/TOKEN\"}";

#[tokio::test]
async fn a_subscriber_is_changed_by_who_knows_its_version() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = start(config(dir.path())).await;
    subscribers_are_changed_by_who_knows_their_version(&store).await;
    let before = open_subscribers(&store).await;
    store.close(true).await;
    let store = start(config(dir.path())).await;
    assert_eq!(open_subscribers(&store).await, before, "also in the next process");
}

/// All bytes of the files in a directory.
fn bytes_of(dir: &Path) -> String {
    let files = std::fs::read_dir(dir).expect("a directory").map(|entry| entry.expect("a file"));
    let read = |entry: std::fs::DirEntry| std::fs::read(entry.path()).expect("reads");
    let all: Vec<u8> = files.flat_map(read).collect();
    String::from_utf8_lossy(&all).into_owned()
}

#[tokio::test]
async fn nothing_of_a_subscriber_is_readable_in_the_files() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = start(config(dir.path())).await;
    put(&store, "a", DOCUMENT, None, 1).await;
    store.close(true).await;
    let bytes = bytes_of(dir.path());
    assert!(bytes.contains("add_subscriber"), "the files were read");
    assert!(!bytes.contains("TOKEN"), "it is sealed");
}

fn key(n: u8) -> SealKey {
    SealKey::of([n; 32])
}

fn named(all: Vec<&KeptSubscriber>) -> Vec<&str> {
    all.into_iter().map(|kept| kept.name().as_str()).collect()
}

/// The names that are open and those that are locked.
fn names(kept: &KeptSubscribers) -> (Vec<&str>, Vec<&str>) {
    let (open, locked): (Vec<_>, Vec<_>) =
        kept.all.iter().partition(|kept| matches!(kept, KeptSubscriber::Open(_)));
    (named(open), named(locked))
}

/// The only problem.
fn problem(kept: &KeptSubscribers) -> &str {
    let [problem] = &*kept.problems else { panic!("not one problem: {:?}", kept.problems) };
    problem
}

async fn delete(store: &SqliteStore, subscriber: &StoredSubscriber) {
    let StoredSubscriber { name, version, .. } = subscriber;
    let deletion = operation("delete_subscriber", name, 9);
    assert_eq!(store.delete_subscriber(name, *version, false, deletion).await, Ok(Deleted::Yes));
}

/// The files of a store that is closed, to be put back later.
fn files(dir: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let paths = fs::read_dir(dir).expect("a directory").map(|entry| entry.expect("a file").path());
    paths.map(|path| (path.clone(), fs::read(path).expect("reads"))).collect()
}

fn put_back(files: &[(PathBuf, Vec<u8>)], name: &str) {
    let (path, bytes) = files.iter().find(|(path, _)| path.ends_with(name)).expect("a file");
    fs::write(path, bytes).expect("writes");
}

#[tokio::test]
async fn with_a_wrong_key_subscribers_are_locked_and_not_removed() {
    let dir = tempfile::tempdir().expect("a directory");
    let with = |keys: &[u8]| SqliteConfig {
        keys: keys.iter().map(|n| key(*n)).collect(),
        ..config(dir.path())
    };
    let store = start(with(&[1])).await;
    let a = put(&store, "a", DOCUMENT, None, 1).await;
    let c = put(&store, "c", DOCUMENT, None, 1).await;
    store.close(true).await;
    assert!(!dir.path().join(KEY_FILE).exists(), "a key is configured");

    let store = start(with(&[2])).await;
    let b = put(&store, "b", DOCUMENT, None, 2).await;
    let kept = store.subscribers().await;
    assert_eq!(names(&kept), (vec!["b"], vec!["a", "c"]));
    let KeptSubscriber::Locked { version, why, .. } = &kept.all[0] else { panic!("{kept:?}") };
    assert_eq!(*version, a.version);
    assert!(why.contains(&key(1).id()) && why.contains("[store] keys"), "{why}");
    delete(&store, &c).await;
    store.close(true).await;

    let store = start(with(&[2, 1])).await;
    assert_eq!(open_subscribers(&store).await, [a, b]);
}

#[tokio::test]
async fn a_store_that_was_deleted_or_is_older_removes_nobody_and_brings_nobody_back() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = start(config(dir.path())).await;
    let kept = put(&store, "kept", "{}", None, 1).await;
    let changed = put(&store, "changed", "{\"n\":1}", None, 1).await;
    let gone = put(&store, "gone", "{}", None, 1).await;
    store.close(true).await;
    let backup = files(dir.path());
    let store = start(config(dir.path())).await;
    let changed = put(&store, "changed", "{\"n\":2}", Some(changed.version), 2).await;
    delete(&store, &gone).await;
    let new = put(&store, "new", "{}", None, 3).await;
    let last = [changed, kept, new];
    assert_eq!(open_subscribers(&store).await, last);
    store.close(true).await;

    put_back(&backup, "store.db");
    let store = start(config(dir.path())).await;
    let found = store.subscribers().await;
    assert_eq!(names(&found), (vec!["changed", "kept", "new"], vec![]));
    let said = found.problems.join("\n");
    for part in ["goes on: `changed`", "they go on: `new`", "stay deleted: `gone`"] {
        assert!(said.contains(part), "{part}: {said}");
    }
    assert_eq!(open_subscribers(&store).await, last, "it was put back");
    store.close(true).await;

    fs::remove_file(dir.path().join("store.db")).expect("a file");
    let store = start(config(dir.path())).await;
    let found = store.subscribers().await;
    assert!(problem(&found).contains("they go on: `changed`, `kept`, `new`"), "{found:?}");
    assert!(!found.may_lack);
    assert_eq!(open_subscribers(&store).await, last);
}

#[tokio::test]
async fn a_change_that_the_copy_missed_because_of_a_kill_holds() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = start(config(dir.path())).await;
    let a = put(&store, "a", "{\"n\":1}", None, 1).await;
    let b = put(&store, "b", "{}", None, 1).await;
    store.close(true).await;
    let before = files(dir.path());
    let store = start(config(dir.path())).await;
    let a = put(&store, "a", "{\"n\":2}", Some(a.version), 2).await;
    delete(&store, &b).await;
    store.crash().await;
    put_back(&before, COPY_FILE);
    let store = start(config(dir.path())).await;
    assert_eq!(open_subscribers(&store).await, std::slice::from_ref(&a));
    store.close(true).await;
    // The copy has it too.
    fs::remove_file(dir.path().join("store.db")).expect("a file");
    let store = start(config(dir.path())).await;
    assert_eq!(names(&store.subscribers().await), (vec!["a"], vec![]));
    assert_eq!(open_subscribers(&store).await, [a]);
}

#[tokio::test]
async fn a_store_that_is_away_leaves_the_copy_until_it_is_back() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = start(config(dir.path())).await;
    let a = put(&store, "a", DOCUMENT, None, 1).await;
    store.close(true).await;
    let path = dir.path().join("store.db");
    let sound = fs::read(&path).expect("reads");
    fs::write(&path, "no database ".repeat(99)).expect("writes");

    let store = start(config(dir.path())).await;
    let kept = store.subscribers().await;
    assert_eq!(kept.all, [KeptSubscriber::Open(a.clone())]);
    assert!(problem(&kept).contains("go on as in") && !kept.may_lack, "{kept:?}");
    let change = operation("add_subscriber", "b", 2);
    let refused = store.put_subscriber(&"b".into(), Secret::new("{}"), None, change).await;
    assert!(refused.expect_err("is away").is_away());

    let mut to_read = store.subscribers_to_read();
    to_read.mark_unchanged();
    fs::write(&path, sound).expect("writes");
    let back = tokio::time::timeout(Duration::from_secs(20), to_read.changed()).await;
    back.expect("in time").expect("it lives");
    assert_eq!(open_subscribers(&store).await, [a]);
    store.close(true).await;

    // Without both nothing is known.
    fs::write(&path, "no database ".repeat(99)).expect("writes");
    fs::remove_file(dir.path().join(COPY_FILE)).expect("a file");
    let store = start(config(dir.path())).await;
    let kept = store.subscribers().await;
    assert!(kept.may_lack && kept.all.is_empty(), "{kept:?}");
    assert!(problem(&kept).contains("none is removed"), "{kept:?}");
}

#[tokio::test]
async fn a_damaged_copy_is_written_again_from_the_store_and_the_other_way_round() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = start(config(dir.path())).await;
    let a = put(&store, "a", DOCUMENT, None, 1).await;
    let b = put(&store, "b", DOCUMENT, None, 1).await;
    let copy = dir.path().join(COPY_FILE);
    let sound = fs::read_to_string(&copy).expect("reads");
    // Torn, and then written on.
    fs::write(&copy, &sound[..sound.len() - 9]).expect("writes");
    let both = [a.clone(), b.clone()];
    assert_eq!(open_subscribers(&store).await, both);
    assert_eq!(fs::read_to_string(&copy).expect("reads"), sound, "whole again");
    // A record that is damaged in the store is that of the copy.
    let damage = "UPDATE sealed_subscriber SET sealed = zeroblob(50) WHERE name = 'a'";
    store.precious(move |db| db.execute(damage, [])).await.expect("writes");
    assert_eq!(open_subscribers(&store).await, both);
    // In both, it is locked.
    store.precious(move |db| db.execute(damage, [])).await.expect("writes");
    fs::remove_file(&copy).expect("a file");
    let kept = store.subscribers().await;
    assert_eq!(names(&kept), (vec!["b"], vec!["a"]));
    let KeptSubscriber::Locked { why, .. } = &kept.all[0] else { panic!("{kept:?}") };
    assert!(why.contains("damaged"), "{why}");
    let again = put(&store, "a", DOCUMENT, Some(a.version), 2).await;
    assert_eq!(open_subscribers(&store).await, [again, b]);
}

#[tokio::test]
async fn the_key_is_made_once_for_its_owner_alone_and_never_in_the_place_of_a_lost_one() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join(KEY_FILE);
    let store = start(config(dir.path())).await;
    assert_eq!(open_subscribers(&store).await, []);
    assert!(!path.exists(), "nothing is sealed yet");
    let a = put(&store, "a", DOCUMENT, None, 1).await;
    let mode = |path: &Path| fs::metadata(path).expect("a file").permissions().mode() & 0o777;
    assert_eq!(mode(&path), 0o600);
    assert_eq!(mode(&dir.path().join(COPY_FILE)), 0o600);
    let key = fs::read(&path).expect("reads");

    let refused = async |part: &str| {
        let change = operation("add_subscriber", "b", 2);
        let refused = store.put_subscriber(&"b".into(), Secret::new("{}"), None, change).await;
        let refused = refused.expect_err("refused").to_string();
        assert!(refused.contains(part), "{refused}");
        let kept = store.subscribers().await;
        assert_eq!(names(&kept), (vec![], vec!["a"]), "{part}");
    };
    fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).expect("its owner");
    refused("may be read by others (mode 640)").await;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("its owner");
    assert_eq!(open_subscribers(&store).await, std::slice::from_ref(&a));
    fs::write(&path, "short").expect("writes");
    refused("holds no key").await;
    fs::remove_file(&path).expect("a file");
    refused("is missing, and subscribers are sealed with it").await;
    assert!(!path.exists());
    delete(&store, &a).await;
    put(&store, "b", DOCUMENT, None, 2).await;
    assert_ne!(fs::read(&path).expect("another one"), key);
}

#[tokio::test]
async fn subscribers_are_kept_also_without_history() {
    let dir = tempfile::tempdir().expect("a directory");
    let without =
        SqliteConfig { without_history: Some("a reason".to_owned()), ..config(dir.path()) };
    let store = SqliteStore::start_with(without.clone(), 7, roomy);
    assert_eq!(open_subscribers(&store).await, [], "it waits until the store is open");
    let a = put(&store, "a", DOCUMENT, None, 1).await;
    in_state(&store, |s| s.history == HistoryState::Off("a reason".to_owned())).await;
    assert!(store.append(vec![event(1)]).await.expect_err("off").is_away());
    assert!(!dir.path().join("history.db").exists());
    store.close(true).await;
    // History that cannot be opened is no hindrance either.
    fs::create_dir(dir.path().join("history.db")).expect("a directory");
    let store = SqliteStore::start_with(config(dir.path()), 7, roomy);
    in_state(&store, |s| matches!(s.history, HistoryState::Away(_))).await;
    assert_eq!(open_subscribers(&store).await, std::slice::from_ref(&a));
    put(&store, "a", DOCUMENT, Some(a.version), 2).await;
    store.close(true).await;
    let off = SqliteStore::off(config(dir.path()), "off");
    // What they have is not served, and that nobody says that there are none.
    let kept = off.subscribers().await;
    assert!(kept.may_lack && kept.all.is_empty(), "{kept:?}");
    assert!(
        problem(&kept).contains("`a`") && problem(&kept).starts_with("off, and in"),
        "{kept:?}"
    );
    let empty = tempfile::tempdir().expect("a directory");
    assert_eq!(open_subscribers(&SqliteStore::off(config(empty.path()), "off")).await, []);
}

/// A store whose subscribers are waited for this long.
async fn impatient(dir: &Path, timeout: Duration) -> SqliteStore {
    let mut store = SqliteStore::new(config(dir), 7, roomy);
    Arc::get_mut(&mut store.0).expect("the only one").kept.timeout = timeout;
    store.0.keep();
    in_state(&store, |s| s.history == HistoryState::Open).await;
    store
}

/// Holds the thread that writes the precious file, until it is dropped.
fn hold_writer(store: &SqliteStore) -> std::sync::mpsc::Sender<()> {
    let (release, released) = std::sync::mpsc::channel::<()>();
    let store = store.clone();
    tokio::spawn(async move {
        let hold = move |_: &Connection| {
            released.recv().ok(); // it ends when the sender is dropped
            Ok(())
        };
        store.precious(hold).await.expect("writes");
    });
    release
}

#[tokio::test]
async fn a_change_that_ends_after_its_answer_is_read_again_and_the_copy_has_it() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = impatient(dir.path(), Duration::from_millis(300)).await;
    let a = put(&store, "a", DOCUMENT, None, 1).await;
    let held = hold_writer(&store);
    tokio::task::yield_now().await;
    let deletion = operation("delete_subscriber", "a", 2);
    let late = store.delete_subscriber(&a.name, a.version, false, deletion).await;
    assert!(late.expect_err("it is late").is_unknown());
    // It has not happened yet.
    assert_eq!(store.subscribers().await.all, [KeptSubscriber::Open(a)]);
    let mut to_read = store.subscribers_to_read();
    to_read.mark_unchanged();
    drop(held);
    let again = tokio::time::timeout(Duration::from_secs(20), to_read.changed()).await;
    again.expect("in time").expect("it lives");
    assert_eq!(open_subscribers(&store).await, []);
    store.close(true).await;
    fs::remove_file(dir.path().join("store.db")).expect("a file");
    let store = start(config(dir.path())).await;
    assert_eq!(store.subscribers().await.all, [], "the copy says so too");
}

#[tokio::test]
async fn the_subscribers_are_read_in_time_whatever_hangs() {
    let dir = tempfile::tempdir().expect("a directory");
    let limit = Duration::from_secs(2);
    let store = impatient(dir.path(), limit).await;
    let a = put(&store, "a", DOCUMENT, None, 1).await;
    let forget = "DELETE FROM sealed_subscriber";
    store.precious(move |db| db.execute(forget, [])).await.expect("writes");
    // Part of the time another holds the copy, and then the store does not take what it lacks.
    let held = hold_writer(&store);
    tokio::task::yield_now().await;
    let copy = store.0.kept.copy_for_tests().await;
    let begun = clock::instant();
    let reading = tokio::spawn({
        let store = store.clone();
        async move { store.subscribers().await }
    });
    tokio::time::sleep(limit * 3 / 4).await;
    drop(copy);
    let kept = reading.await.expect("answers");
    assert!(begun.elapsed() < limit * 3 / 2, "{:?}", begun.elapsed());
    assert_eq!(kept.all, [KeptSubscriber::Open(a)]);
    assert!(kept.problems.join("\n").contains("cannot be put back"), "{kept:?}");
    // Nothing could be read.
    let copy = store.0.kept.copy_for_tests().await;
    let kept = store.subscribers().await;
    assert!(kept.may_lack && problem(&kept).contains("none is removed"), "{kept:?}");
    drop((copy, held));
}

#[tokio::test]
async fn a_read_that_is_given_up_leaves_the_copy_behind_for_the_next_one() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = start(config(dir.path())).await;
    put(&store, "a", DOCUMENT, None, 1).await;
    // The read waits until the store takes what it lacks.
    let forget = "DELETE FROM sealed_subscriber";
    store.precious(move |db| db.execute(forget, [])).await.expect("writes");
    let held = hold_writer(&store);
    tokio::task::yield_now().await;
    store.0.kept.fall_behind();
    let given_up = tokio::time::timeout(Duration::from_millis(300), store.subscribers()).await;
    given_up.expect_err("it waits");
    assert!(store.0.kept.is_behind());
    drop(held);
    store.subscribers().await;
    assert!(!store.0.kept.is_behind());
}

#[tokio::test]
async fn a_torn_copy_alone_removes_nobody() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = start(config(dir.path())).await;
    let a = put(&store, "a", DOCUMENT, None, 1).await;
    put(&store, "b", DOCUMENT, None, 1).await;
    store.close(true).await;
    let copy = dir.path().join(COPY_FILE);
    let sound = fs::read(&copy).expect("reads");
    fs::write(&copy, &sound[..sound.len() - 9]).expect("writes");
    fs::write(dir.path().join("store.db"), "no database ".repeat(99)).expect("writes");
    let store = start(config(dir.path())).await;
    let kept = store.subscribers().await;
    assert_eq!((&*kept.all, kept.may_lack), (&[KeptSubscriber::Open(a)][..], true));
    assert!(problem(&kept).contains("those that it lacks are not served"), "{kept:?}");
}

#[tokio::test]
async fn a_damaged_copy_is_set_aside_and_nobody_may_be_removed_until_somebody_has_seen_it() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = start(config(dir.path())).await;
    let a = put(&store, "a", DOCUMENT, None, 1).await;
    put(&store, "b", DOCUMENT, None, 1).await;
    store.close(true).await;
    let copy = dir.path().join(COPY_FILE);
    let damaged =
        fs::read_to_string(&copy).expect("reads").replacen("\"name\":\"b\"", "\"name\":\"x\"", 1);
    fs::write(&copy, &damaged).expect("writes");
    // The store is older than it: what the damaged line has is nowhere else.
    fs::remove_file(dir.path().join("store.db")).expect("a file");
    for _ in 0..2 {
        let store = start(config(dir.path())).await;
        let kept = store.subscribers().await;
        assert_eq!((&*kept.all, kept.may_lack), (&[KeptSubscriber::Open(a.clone())][..], true));
        assert!(kept.problems.last().expect("one").contains("set aside"), "{kept:?}");
        store.close(true).await;
    }
    let aside = files(dir.path()).into_iter().find(|(path, _)| {
        path.file_name().is_some_and(|name| name.to_string_lossy().contains(".damaged-"))
    });
    let (aside, bytes) = aside.expect("it is kept");
    assert_eq!(bytes, damaged.as_bytes());
    fs::remove_file(aside).expect("a file");
    let store = start(config(dir.path())).await;
    assert_eq!(open_subscribers(&store).await, [a]);
}

#[tokio::test]
async fn what_the_background_finds_is_said_to_the_next_reader() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = start(config(dir.path())).await;
    let a = put(&store, "a", DOCUMENT, None, 1).await;
    let mut to_read = store.subscribers_to_read();
    let forget = "DELETE FROM sealed_subscriber WHERE name = 'a'";
    store.precious(move |db| db.execute(forget, [])).await.expect("writes");
    to_read.mark_unchanged();
    store.0.kept.catch_up(store.0.precious().expect("is open")).await;
    assert!(to_read.has_changed().expect("it lives"));
    let kept = store.subscribers().await;
    assert_eq!(kept.all, [KeptSubscriber::Open(a)]);
    assert!(problem(&kept).contains("they go on: `a`"), "{kept:?}");
}

/// Waits until the subscribers are to be read again, and reads them.
async fn read_again(store: &SqliteStore, to_read: &mut watch::Receiver<u64>) -> KeptSubscribers {
    let again = tokio::time::timeout(Duration::from_secs(20), to_read.changed()).await;
    again.expect("in time").expect("it lives");
    store.subscribers().await
}

#[tokio::test]
async fn a_copy_that_could_not_be_read_or_written_and_then_can_be_is_no_problem_any_more() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = start(config(dir.path())).await;
    let a = put(&store, "a", DOCUMENT, None, 1).await;
    let (copy, part) = (dir.path().join(COPY_FILE), dir.path().join(format!("{COPY_FILE}.part")));
    let mut to_read = store.subscribers_to_read();
    // A directory in its place can be neither read nor replaced.
    let sound = fs::read(&copy).expect("reads");
    fs::remove_file(&copy).expect("a file");
    fs::create_dir(&copy).expect("a directory");
    to_read.mark_unchanged();
    let kept = store.subscribers().await;
    assert!(kept.may_lack && problem(&kept).contains("cannot be read"), "{kept:?}");
    fs::remove_dir(&copy).expect("a directory");
    fs::write(&copy, sound).expect("writes");
    let kept = read_again(&store, &mut to_read).await;
    assert_eq!((&*kept.problems, kept.may_lack), (&[][..], false));

    fs::create_dir(&part).expect("a directory");
    fs::remove_file(&copy).expect("a file");
    let kept = store.subscribers().await;
    assert!(problem(&kept).contains("cannot be written"), "{kept:?}");
    to_read.mark_unchanged();
    fs::remove_dir(&part).expect("a directory");
    let kept = read_again(&store, &mut to_read).await;
    assert_eq!((&*kept.all, &*kept.problems), (&[KeptSubscriber::Open(a)][..], &[][..]));
}

#[test]
fn a_directory_that_cannot_be_read_is_not_taken_for_one_without_damaged_copies() {
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("file");
    fs::write(&file, "").expect("writes");
    assert!(Copy::at(file.join(COPY_FILE)).aside().is_err());
    let aside = Copy::at(dir.path().join("missing").join(COPY_FILE)).aside();
    assert!(aside.expect("it is known").is_empty());
}

#[tokio::test]
async fn each_damaged_copy_is_kept_and_protects_until_it_is_deleted() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = start(config(dir.path())).await;
    put(&store, "a", DOCUMENT, None, 1).await;
    let mut to_read = store.subscribers_to_read();
    let aside = || {
        let of = |(path, _): &(PathBuf, _)| path.to_string_lossy().contains(".damaged-");
        files(dir.path()).into_iter().filter(of).map(|(path, _)| path).collect::<Vec<_>>()
    };
    for n in 1..=3 {
        fs::write(dir.path().join(COPY_FILE), "no copy\nnone\n").expect("writes");
        assert!(store.subscribers().await.may_lack);
        assert_eq!(aside().len(), n, "within a second");
    }
    to_read.mark_unchanged();
    for (n, path) in aside().into_iter().enumerate() {
        fs::remove_file(path).expect("a file");
        let kept = read_again(&store, &mut to_read).await;
        assert_eq!(kept.may_lack, n < 2, "{kept:?}");
    }
}

#[tokio::test]
async fn a_secret_that_was_replaced_or_removed_is_in_no_file_any_more() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = start(config(dir.path())).await;
    let mut removed = Vec::new();
    let sealed = async |name: &'static str| {
        let query = "SELECT sealed FROM sealed_subscriber WHERE name = ?1";
        let read =
            move |db: &Connection| db.query_row(query, [name], |row| row.get::<_, Vec<u8>>(0));
        store.read_precious(read).await.expect("a row")
    };
    let document = format!("{{\"description\":\"{}\"}}", "x".repeat(500));
    for n in 0..20 {
        let a = put(&store, "a", &document, None, n).await;
        removed.push(sealed("a").await);
        let b = put(&store, "a", &document, Some(a.version), n).await;
        removed.push(sealed("a").await);
        delete(&store, &b).await;
    }
    store.close(true).await;
    let store = start(config(dir.path())).await;
    assert_eq!(open_subscribers(&store).await, []);
    store.close(true).await;
    let stored = fs::read(dir.path().join("store.db")).expect("reads");
    let copied = fs::read_to_string(dir.path().join(COPY_FILE)).expect("reads");
    for sealed in removed {
        let part = &sealed[100..200];
        assert!(!stored.windows(part.len()).any(|bytes| bytes == part), "it is in the store");
    }
    assert!(!copied.contains("\"sealed\":\""), "{copied}");
}

#[tokio::test]
async fn what_an_interrupted_write_has_left_is_removed() {
    let dir = tempfile::tempdir().expect("a directory");
    let left = [COPY_FILE, KEY_FILE].map(|name| dir.path().join(format!("{name}.part")));
    for path in &left {
        fs::write(path, "half").expect("writes");
    }
    let store = start(config(dir.path())).await;
    assert_eq!(open_subscribers(&store).await, []);
    assert!(left.iter().all(|path| !path.exists()));
}

#[tokio::test]
async fn a_store_that_is_deleted_while_it_is_open_takes_no_change_and_is_opened_again() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = start(config(dir.path())).await;
    let a = put(&store, "a", DOCUMENT, None, 1).await;
    let mut to_read = store.subscribers_to_read();
    to_read.mark_unchanged();
    fs::remove_file(dir.path().join("store.db")).expect("a file");
    let change = operation("change_subscriber", "a", 2);
    let refused =
        store.put_subscriber(&"a".into(), Secret::new("{}"), Some(a.version), change).await;
    assert!(refused.expect_err("it would be lost").is_away());
    let again = tokio::time::timeout(Duration::from_secs(20), to_read.changed()).await;
    again.expect("in time").expect("it lives");
    assert_eq!(store.subscribers().await.all, [KeptSubscriber::Open(a.clone())]);
    assert_eq!(open_subscribers(&store).await, [a]);
}

#[tokio::test]
async fn the_copy_does_not_grow_without_bounds() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = start(config(dir.path())).await;
    let large = format!("{{\"description\":\"{}\"}}", "x".repeat(100_000));
    let mut last = put(&store, "a", &large, None, 1).await;
    for n in 0..20 {
        last = put(&store, "a", &large, Some(last.version), n).await;
    }
    let bytes = fs::metadata(dir.path().join(COPY_FILE)).expect("a file").len();
    assert!(bytes < 2 << 20, "{bytes}");
    store.close(true).await;
    fs::remove_file(dir.path().join("store.db")).expect("a file");
    let store = start(config(dir.path())).await;
    assert_eq!(store.subscribers().await.all, [KeptSubscriber::Open(last)]);
}

#[tokio::test]
async fn all_are_sealed_again_with_the_first_key_while_no_daemon_runs() {
    let dir = tempfile::tempdir().expect("a directory");
    let with = |keys: &[u8]| SqliteConfig {
        keys: keys.iter().map(|n| key(*n)).collect(),
        ..config(dir.path())
    };
    let store = start(with(&[1])).await;
    let a = put(&store, "a", DOCUMENT, None, 1).await;
    let gone = put(&store, "gone", DOCUMENT, None, 1).await;
    delete(&store, &gone).await;
    let busy = seal_again(&with(&[2, 1])).await.expect_err("a daemon has it").to_string();
    assert!(busy.contains("another daemon has the store"), "{busy}");
    store.close(true).await;

    // It fails early, and is no daemon that was killed.
    let path = dir.path().join("store.db");
    let sound = fs::read(&path).expect("reads");
    fs::write(&path, "no database ".repeat(99)).expect("writes");
    seal_again(&with(&[2, 1])).await.expect_err("damaged");
    assert_eq!(fs::read(dir.path().join(LOCK)).expect("a file"), b"");
    fs::write(&path, sound).expect("writes");

    let locked = Resealed { locked: vec!["a".to_owned()], ..Resealed::default() };
    assert_eq!(seal_again(&with(&[2])).await, Ok(locked));
    let done = Resealed { resealed: 1, ..Resealed::default() };
    assert_eq!(seal_again(&with(&[2, 1])).await, Ok(done));
    let copy = fs::read_to_string(dir.path().join(COPY_FILE)).expect("reads");
    assert!(copy.contains(&key(2).id()) && !copy.contains(&key(1).id()), "the copy as well");
    let again = Resealed { were: 1, ..Resealed::default() };
    assert_eq!(seal_again(&with(&[2])).await, Ok(again));
    let store = start(with(&[2])).await;
    assert_eq!(open_subscribers(&store).await, std::slice::from_ref(&a));
    store.close(true).await;
    fs::remove_file(dir.path().join("store.db")).expect("a file");
    let none = seal_again(&with(&[2])).await.expect_err("no store").to_string();
    assert!(none.contains("there is no store"), "{none}");
    let store = start(with(&[2])).await;
    assert_eq!(store.subscribers().await.all, [KeptSubscriber::Open(a)]);
}

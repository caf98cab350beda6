//! Subscribers made over the API, in their files.

use std::{fs, os::unix::fs::PermissionsExt as _, path::PathBuf};

use super::{
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
    assert_eq!(store.delete_subscriber(name, *version, deletion).await, Ok(Deleted::Yes));
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
    assert_eq!(open_subscribers(&off).await, []);
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

//! Subscribers made over the API, in their files.

use super::*;
use crate::store::testing::{
    open_subscribers, put, subscribers_are_changed_by_who_knows_their_version,
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

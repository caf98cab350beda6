//! The daemon's inputs besides its queue: signals of the system, and changes of files.

use std::{
    collections::BTreeMap, io, os::unix::fs::MetadataExt as _, path::PathBuf, time::Duration,
};

use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
};

/// The time between two polls of the files. A change must read the same twice: an editor or a
/// deployment writes more than once.
const POLL_INTERVAL: Duration = Duration::from_secs(1);

/// The time for which a file that shrank or is gone has to stay the same. A slow copy that begins
/// with an empty file can pause between two subscribers; that is valid and would remove the others.
const SHRUNK_SETTLES: Duration = Duration::from_secs(10);

/// The number of SIGTERMs and SIGINTs. Clones are the same.
#[derive(Debug, Clone)]
pub struct Stops(watch::Receiver<u32>);

/// Listens for both signals; neither ends the process by itself any more.
///
/// # Errors
/// The system refuses it.
pub fn stop() -> io::Result<Stops> {
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let (count, stops) = watch::channel(0);
    tokio::spawn(async move {
        loop {
            tokio::select! {
                _ = term.recv() => {}
                _ = int.recv() => {}
            }
            count.send_modify(|n| *n += 1);
        }
    });
    Ok(Stops(stops))
}

impl Stops {
    /// Completes at the `n`-th signal.
    pub fn times(&self, n: u32) -> impl Future<Output = ()> + use<> {
        let mut stops = self.0.clone();
        async move {
            if stops.wait_for(|count| *count >= n).await.is_err() {
                std::future::pending().await // the listening task is gone
            }
        }
    }

    /// Whether there was a signal.
    pub fn is_asked(&self) -> bool {
        *self.0.borrow() > 0
    }

    /// Without any signal, ever.
    #[cfg(test)]
    pub(crate) fn never() -> Self {
        Self(watch::channel(0).1)
    }
}

/// SIGHUPs, each a request of a reload.
#[derive(Debug)]
pub struct Hangups(tokio::signal::unix::Signal);

impl Hangups {
    /// Listens for the signal; it does not end the process any more.
    ///
    /// # Errors
    /// The system refuses it.
    pub fn listen() -> io::Result<Self> {
        Ok(Self(signal(SignalKind::hangup())?))
    }

    pub async fn next(&mut self) {
        if self.0.recv().await.is_none() {
            std::future::pending::<()>().await;
        }
    }
}

/// Polls files and folders by their names, links followed. So it notices an editor that replaces a
/// file, and the swapped link of a Kubernetes volume, on any file system.
#[derive(Debug)]
pub struct Files {
    names: watch::Receiver<Vec<PathBuf>>,
    seen: Snapshot,
    /// How each of `names` was when it last existed. A file that is gone and comes back in parts is
    /// shorter for a while.
    present: Snapshot,
}

/// What distinguishes two contents of a file, as far as the file system knows; `None` is no file.
type Snapshot = BTreeMap<PathBuf, Option<(i64, i64, u64, u64, u64)>>;

/// Whether a file is gone, or shorter than when it last existed.
fn has_shrunk(before: &Snapshot, present: &Snapshot, now: &Snapshot) -> bool {
    now.iter().any(|(path, now)| match now {
        None => matches!(before.get(path), Some(Some(_))),
        Some((_, _, now, ..)) => {
            matches!(present.get(path), Some(Some((_, _, length, ..))) if now < length)
        }
    })
}

fn only_present(snapshot: &Snapshot) -> Snapshot {
    snapshot
        .iter()
        .filter(|(_, found)| found.is_some())
        .map(|(path, found)| (path.clone(), *found))
        .collect()
}

fn poll(names: &[PathBuf]) -> Snapshot {
    let of = |path: &PathBuf| {
        let found = std::fs::metadata(path).ok();
        (path.clone(), found.map(|m| (m.mtime(), m.mtime_nsec(), m.len(), m.ino(), m.dev())))
    };
    names.iter().map(of).collect()
}

impl Files {
    /// Begins with the files as they are now.
    pub fn new(mut names: watch::Receiver<Vec<PathBuf>>) -> Self {
        let seen = poll(&names.borrow_and_update());
        let present = only_present(&seen);
        Self { names, seen, present }
    }

    /// Completes when a file differs from the last completion and has stayed the same for a moment;
    /// for longer if it shrank.
    pub async fn changed(&mut self) {
        let mut change = Change::default();
        loop {
            tokio::time::sleep(POLL_INTERVAL).await;
            let names = self.names.borrow_and_update().clone();
            // A file system can take its time.
            let Ok(now) = tokio::task::spawn_blocking(move || poll(&names)).await else { continue };
            // A file that is polled for the first time has not changed.
            self.seen.retain(|path, _| now.contains_key(path));
            self.present.retain(|path, _| now.contains_key(path));
            if change.last.is_none() {
                for (path, found) in &now {
                    self.seen.entry(path.clone()).or_insert(*found);
                }
            }
            if change.has_ended(&self.seen, &self.present, &now) {
                self.present.extend(only_present(&now));
                self.seen = now;
                return;
            }
        }
    }
}

/// A change that may not have ended.
#[derive(Debug, Default)]
struct Change {
    /// The latest poll that differed from the state before the change.
    last: Option<Snapshot>,
    /// The time for which the polls have been the same.
    same_for: Duration,
    /// A file shrank at any time of the change.
    shrunk: bool,
}

impl Change {
    /// Takes each poll, [`POLL_INTERVAL`] apart: the files before the change, each as it last existed,
    /// and now. Returns whether the change has ended.
    fn has_ended(&mut self, before: &Snapshot, present: &Snapshot, now: &Snapshot) -> bool {
        if now == before {
            *self = Self::default();
            return false;
        }
        self.shrunk |= has_shrunk(before, present, now);
        let same = self.last.as_ref() == Some(now);
        self.same_for = if same { self.same_for + POLL_INTERVAL } else { Duration::ZERO };
        self.last = Some(now.clone());
        self.same_for >= if self.shrunk { SHRUNK_SETTLES } else { POLL_INTERVAL }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        path::Path,
        sync::{
            Arc,
            atomic::{AtomicUsize, Ordering},
        },
    };

    async fn until(what: &str, condition: impl Fn() -> bool) {
        let waiting = async {
            while !condition() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(30), waiting)
            .await
            .unwrap_or_else(|_| panic!("never: {what}"));
    }

    #[test]
    fn a_file_that_shrank_is_a_change_after_it_stayed_the_same_for_a_while() {
        let of = |bytes: Option<u64>| {
            Snapshot::from([(PathBuf::from("x"), bytes.map(|bytes| (0, 0, bytes, 0, 0)))])
        };
        // The number of polls with these lengths after which the change has ended.
        let after = |before: Option<u64>, polls: Vec<Option<u64>>| {
            let mut change = Change::default();
            let present = only_present(&of(before));
            polls
                .into_iter()
                .position(|now| change.has_ended(&of(before), &present, &of(now)))
                .map(|n| n + 1)
        };
        let rests =
            usize::try_from(SHRUNK_SETTLES.as_secs() / POLL_INTERVAL.as_secs()).expect("small");
        let for_ever = |bytes| vec![bytes; 1000];
        assert_eq!(after(Some(10), for_ever(Some(11))), Some(2), "one that has grown");
        assert_eq!(after(None, for_ever(Some(11))), Some(2), "one that has come");
        assert_eq!(after(Some(10), for_ever(Some(9))), Some(rests + 1), "one that is shorter now");
        assert_eq!(after(Some(10), for_ever(None)), Some(rests + 1), "one that is gone");
        assert_eq!(after(Some(10), for_ever(Some(10))), None);
        // A slow copy: nothing, then a part that rests, then the rest of it.
        let pause = rests - 1;
        let copy = [Some(0), Some(3), Some(7)]
            .into_iter()
            .flat_map(|bytes| std::iter::repeat_n(bytes, pause));
        assert_eq!(
            after(Some(10), copy.chain(for_ever(Some(12))).collect()),
            Some(3 * pause + rests + 1)
        );
        let back = std::iter::repeat_n(Some(3), pause).chain([Some(10)]).chain(for_ever(Some(11)));
        assert_eq!(
            after(Some(10), back.collect()),
            Some(pause + 3),
            "what is as it was is no change"
        );
    }

    #[test]
    fn a_file_that_is_gone_for_long_and_comes_back_in_parts_has_shrunk() {
        let of = |bytes: Option<u64>| {
            Snapshot::from([(PathBuf::from("x"), bytes.map(|bytes| (0, 0, bytes, 0, 0)))])
        };
        // Its absence was accepted as a change; its last length is known all the same.
        let (present, mut change) = (of(Some(10)), Change::default());
        let polls = [Some(3); 3].into_iter().chain([Some(10); 1000]);
        let over =
            polls.into_iter().position(|now| change.has_ended(&of(None), &present, &of(now)));
        assert!(over.is_some_and(|n| n > 3), "{over:?}");
        // A file that was removed for good delays no other change.
        let two = |x: Option<u64>, y: u64| {
            let file = |name: &str, bytes: Option<u64>| {
                (PathBuf::from(name), bytes.map(|bytes| (0, 0, bytes, 0, 0)))
            };
            Snapshot::from([file("x", x), file("y", Some(y))])
        };
        let mut change = Change::default();
        let over = [5, 5]
            .into_iter()
            .position(|y| change.has_ended(&two(None, 4), &two(Some(10), 4), &two(None, y)));
        assert_eq!(over, Some(1));
    }

    fn link(to: &Path, at: &Path) {
        let new = at.with_extension("new");
        std::os::unix::fs::symlink(to, &new).expect("links");
        std::fs::rename(&new, at).expect("renames");
    }

    #[tokio::test]
    async fn files_that_are_written_replaced_relinked_added_or_gone_are_noticed_once_each() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = |name: &str| dir.path().join(name);
        for (folder, text) in [("one", "1"), ("two", "1")] {
            std::fs::create_dir(path(folder)).expect("a folder");
            std::fs::write(path(folder).join("x"), text).expect("writes");
        }
        link(&path("one"), &path("data"));
        link(&path("data").join("x"), &path("x"));
        std::fs::create_dir(path("more")).expect("a folder");
        std::fs::write(path("plain"), "1").expect("writes");
        let names =
            watch::Sender::new(vec![path("plain"), path("x"), path("more"), path("missing")]);
        let mut files = Files::new(names.subscribe());
        let count = Arc::new(AtomicUsize::new(0));
        let counter = count.clone();
        let watching = tokio::spawn(async move {
            loop {
                files.changed().await;
                counter.fetch_add(1, Ordering::SeqCst);
            }
        });
        let changes: [(&str, &dyn Fn()); 6] = [
            ("written", &|| std::fs::write(path("plain"), "22").expect("writes")),
            ("replaced", &|| {
                std::fs::write(path("other"), "33").expect("writes");
                std::fs::rename(path("other"), path("plain")).expect("renames");
            }),
            ("the folder behind a link swapped", &|| link(&path("two"), &path("data"))),
            ("a file more in a folder", &|| {
                std::fs::write(path("more").join("a.toml"), "").expect("writes")
            }),
            ("one that was missing", &|| std::fs::write(path("missing"), "").expect("writes")),
            ("gone", &|| std::fs::remove_file(path("plain")).expect("removes")),
        ];
        for (n, (what, change)) in changes.into_iter().enumerate() {
            change();
            until(what, || count.load(Ordering::SeqCst) > n).await;
            assert_eq!(count.load(Ordering::SeqCst), n + 1, "{what}");
        }
        watching.abort();
    }
}

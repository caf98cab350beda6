//! What tells the daemon to do something: signals of the system, and files that change.

use std::{
    collections::BTreeMap, io, os::unix::fs::MetadataExt as _, path::PathBuf, time::Duration,
};

use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
};

/// How often the files are looked at. What changed has to look the same twice: an editor or a
/// deployment writes more than once.
const LOOK: Duration = Duration::from_secs(1);

/// What has shrunk, or is gone, has to look the same for so long: a slow copy that begins with an
/// empty file can rest just between two subscribers, which is valid and takes the others away.
const SHRUNK: Duration = Duration::from_secs(10);

/// How often the process was asked to end, by SIGTERM or SIGINT. Clones are the same.
#[derive(Debug, Clone)]
pub struct Stops(watch::Receiver<u32>);

/// Listens from now on: neither signal ends the process by itself any more.
///
/// # Errors
/// The system does not let it listen.
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
    /// Completes when the process was asked so often.
    pub fn times(&self, n: u32) -> impl Future<Output = ()> + use<> {
        let mut stops = self.0.clone();
        async move {
            if stops.wait_for(|count| *count >= n).await.is_err() {
                std::future::pending().await // nobody asks any more
            }
        }
    }

    /// Whether the process was asked.
    pub fn is_asked(&self) -> bool {
        *self.0.borrow() > 0
    }

    /// Nobody ever asks.
    #[cfg(test)]
    pub(crate) fn never() -> Self {
        Self(watch::channel(0).1)
    }
}

/// Asked to read the configuration again, by SIGHUP.
#[derive(Debug)]
pub struct Hangups(tokio::signal::unix::Signal);

impl Hangups {
    /// From now on the signal does not end the process.
    ///
    /// # Errors
    /// The system does not let it listen.
    pub fn listen() -> io::Result<Self> {
        Ok(Self(signal(SignalKind::hangup())?))
    }

    pub async fn next(&mut self) {
        if self.0.recv().await.is_none() {
            std::future::pending::<()>().await;
        }
    }
}

/// Looks at files and folders by their names, links followed: so it notices an editor that puts a
/// new file in the place of the old one, and the swapped link of a Kubernetes volume, on any file
/// system.
#[derive(Debug)]
pub struct Files {
    names: watch::Receiver<Vec<PathBuf>>,
    seen: Look,
    /// How each of `names` was when it was there last: one that is gone and comes back in parts is
    /// shorter than that for a while.
    present: Look,
}

/// What tells one content of a file from another, as far as the file system does.
type Look = BTreeMap<PathBuf, Option<(i64, i64, u64, u64, u64)>>;

/// Whether a file is gone, or shorter than when it was there last.
fn has_shrunk(before: &Look, present: &Look, now: &Look) -> bool {
    now.iter().any(|(path, now)| match now {
        None => matches!(before.get(path), Some(Some(_))),
        Some((_, _, now, ..)) => {
            matches!(present.get(path), Some(Some((_, _, length, ..))) if now < length)
        }
    })
}

fn only_present(look: &Look) -> Look {
    look.iter()
        .filter(|(_, found)| found.is_some())
        .map(|(path, found)| (path.clone(), *found))
        .collect()
}

fn look(names: &[PathBuf]) -> Look {
    let of = |path: &PathBuf| {
        let found = std::fs::metadata(path).ok();
        (path.clone(), found.map(|m| (m.mtime(), m.mtime_nsec(), m.len(), m.ino(), m.dev())))
    };
    names.iter().map(of).collect()
}

impl Files {
    /// As they are now.
    pub fn new(mut names: watch::Receiver<Vec<PathBuf>>) -> Self {
        let seen = look(&names.borrow_and_update());
        let present = only_present(&seen);
        Self { names, seen, present }
    }

    /// Waits until a file is another than when this was asked last, and has been left alone for a
    /// moment; for longer if it has shrunk.
    pub async fn changed(&mut self) {
        let mut change = Change::default();
        loop {
            tokio::time::sleep(LOOK).await;
            let names = self.names.borrow_and_update().clone();
            // A file system can take its time.
            let Ok(now) = tokio::task::spawn_blocking(move || look(&names)).await else { continue };
            // Of files that are looked at for the first time it is not known how they were.
            self.seen.retain(|path, _| now.contains_key(path));
            self.present.retain(|path, _| now.contains_key(path));
            if change.last.is_none() {
                for (path, found) in &now {
                    self.seen.entry(path.clone()).or_insert(*found);
                }
            }
            if change.is_over(&self.seen, &self.present, &now) {
                self.present.extend(only_present(&now));
                self.seen = now;
                return;
            }
        }
    }
}

/// A change that may still go on.
#[derive(Debug, Default)]
struct Change {
    /// Where something was another than before it.
    last: Option<Look>,
    /// So long it has looked like that.
    alone_for: Duration,
    /// Something was, at any time of it.
    shrunk: bool,
}

impl Change {
    /// Called with each look, [`LOOK`] apart: how the files were, how each was when it was there
    /// last, and how they are.
    fn is_over(&mut self, before: &Look, present: &Look, now: &Look) -> bool {
        if now == before {
            *self = Self::default();
            return false;
        }
        self.shrunk |= has_shrunk(before, present, now);
        let same = self.last.as_ref() == Some(now);
        self.alone_for = if same { self.alone_for + LOOK } else { Duration::ZERO };
        self.last = Some(now.clone());
        self.alone_for >= if self.shrunk { SHRUNK } else { LOOK }
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
    fn a_file_that_has_shrunk_is_a_change_when_it_has_been_left_alone_for_a_while() {
        let of = |bytes: Option<u64>| {
            Look::from([(PathBuf::from("x"), bytes.map(|bytes| (0, 0, bytes, 0, 0)))])
        };
        // After so many looks at these lengths; `None` is no file.
        let after = |before: Option<u64>, looks: Vec<Option<u64>>| {
            let mut change = Change::default();
            let present = only_present(&of(before));
            looks
                .into_iter()
                .position(|now| change.is_over(&of(before), &present, &of(now)))
                .map(|n| n + 1)
        };
        let rests = usize::try_from(SHRUNK.as_secs() / LOOK.as_secs()).expect("small");
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
            Look::from([(PathBuf::from("x"), bytes.map(|bytes| (0, 0, bytes, 0, 0)))])
        };
        // That it is gone was accepted: how it was when it was there is known all the same.
        let (present, mut change) = (of(Some(10)), Change::default());
        let looks = [Some(3); 3].into_iter().chain([Some(10); 1000]);
        let over = looks.into_iter().position(|now| change.is_over(&of(None), &present, &of(now)));
        assert!(over.is_some_and(|n| n > 3), "{over:?}");
        // What was taken out for good holds up no other change.
        let two = |x: Option<u64>, y: u64| {
            let file = |name: &str, bytes: Option<u64>| {
                (PathBuf::from(name), bytes.map(|bytes| (0, 0, bytes, 0, 0)))
            };
            Look::from([file("x", x), file("y", Some(y))])
        };
        let mut change = Change::default();
        let over = [5, 5]
            .into_iter()
            .position(|y| change.is_over(&two(None, 4), &two(Some(10), 4), &two(None, y)));
        assert_eq!(over, Some(1));
    }

    fn link(to: &Path, at: &Path) {
        let new = at.with_extension("new");
        std::os::unix::fs::symlink(to, &new).expect("links");
        std::fs::rename(&new, at).expect("renames");
    }

    #[tokio::test]
    async fn files_that_are_written_replaced_linked_anew_added_or_gone_are_noticed_once_each() {
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

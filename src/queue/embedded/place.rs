//! Checks that the files that a process has open are still those at their paths. A file that was
//! deleted or replaced under its process goes on accepting writes, and all of them are lost when
//! the process ends.

use std::{
    fs::Metadata,
    io::ErrorKind,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use crate::clock;

/// Time after which the files are checked again before events are stored.
const FRESH: Duration = Duration::from_secs(1);

/// The identity of a file on this machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Identity {
    device: u64,
    inode: u64,
}

impl Identity {
    fn of(file: &Metadata) -> Self {
        Self { device: file.dev(), inode: file.ino() }
    }

    /// The identity of the file at a path; `None` if there is none.
    fn at(path: &Path) -> std::io::Result<Option<Self>> {
        match std::fs::metadata(path) {
            Ok(found) => Ok(Some(Self::of(&found))),
            Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
                Ok(None)
            }
            Err(e) => Err(e),
        }
    }
}

/// The files of a queue as they were when they were opened.
#[derive(Debug)]
pub(super) struct Place {
    files: Vec<(PathBuf, Identity)>,
    checked: Mutex<Checked>,
}

#[derive(Debug, Default)]
struct Checked {
    at: Option<Instant>,
    lost: Option<String>,
}

impl Place {
    /// The files that exist now, as they were opened.
    pub(super) fn of(paths: impl IntoIterator<Item = PathBuf>) -> Self {
        let identity =
            |path: PathBuf| Identity::at(&path).ok().flatten().map(|identity| (path, identity));
        Self { files: paths.into_iter().filter_map(identity).collect(), checked: Mutex::default() }
    }

    /// Returns which file is not at its path any more, with consequence and remedy; logs when that
    /// changes. Waits for the disk.
    pub(super) fn check(&self) -> Option<String> {
        let found = self.inspect();
        let mut checked = self.lock();
        checked.at = Some(clock::instant());
        match (&checked.lost, &found) {
            (None, Some(why)) => tracing::error!(
                error = why,
                "the embedded queue's file is lost; new events are refused"
            ),
            (Some(_), None) => tracing::info!(
                "the embedded queue's files are at their places again; new events are taken"
            ),
            _ => {}
        }
        checked.lost.clone_from(&found);
        found
    }

    /// The same as [`check`](Self::check), or its result of a moment ago.
    pub(super) fn check_before_storing(&self) -> Option<String> {
        let known = {
            let checked = self.lock();
            checked
                .at
                .filter(|at| clock::instant().saturating_duration_since(*at) < FRESH)
                .map(|_| checked.lost.clone())
        };
        known.unwrap_or_else(|| self.check())
    }

    /// The result of the last check.
    pub(super) fn is_lost(&self) -> bool {
        self.lock().lost.is_some()
    }

    fn lock(&self) -> MutexGuard<'_, Checked> {
        self.checked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn inspect(&self) -> Option<String> {
        self.files.iter().find_map(|(path, opened)| {
            let state = match Identity::at(path) {
                Ok(Some(now)) if now == *opened => return None,
                Ok(Some(_)) => "another file is at its path",
                Ok(None) => "it was deleted or moved",
                // Unknown; the next write shows it.
                Err(_) => return None,
            };
            let copy = self.where_it_can_be_copied();
            Some(format!(
                "`{}` is not the file that is open: {state}. What is in the queue is gone when this process ends; {copy} \
                 (docs/operations.md, \"The embedded queue's file is lost\")",
                path.display()
            ))
        })
    }

    /// The open files of this process, as the system shows them.
    fn where_it_can_be_copied(&self) -> String {
        let descriptors = std::fs::read_dir("/proc/self/fd").into_iter().flatten().flatten();
        let open: Vec<(Identity, String)> = descriptors
            .filter_map(|fd| {
                Some((
                    Identity::of(&std::fs::metadata(fd.path()).ok()?),
                    fd.file_name().into_string().ok()?,
                ))
            })
            .collect();
        let pid = std::process::id();
        let found: Vec<String> = self
            .files
            .iter()
            .filter_map(|(path, opened)| {
                let (_, fd) = open.iter().find(|(identity, _)| identity == opened)?;
                let name = path.file_name()?.to_string_lossy();
                // Only these hold data.
                (name.ends_with(".db") || name.ends_with("-wal"))
                    .then(|| format!("{name} is /proc/{pid}/fd/{fd}"))
            })
            .collect();
        if found.is_empty() {
            "copy it before".to_owned()
        } else {
            format!("before that it can be copied: {}", found.join(", "))
        }
    }

    /// The text for [`other_than`], in another file: the process, and a line for each file.
    pub(super) fn to_text(&self) -> String {
        let line = |(path, identity): &(PathBuf, Identity)| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            format!("{name} {} {}\n", identity.device, identity.inode)
        };
        format!("pid {}\n{}", std::process::id(), self.files.iter().map(line).collect::<String>())
    }
}

/// The file in a directory that is not, or not any more, the one that a process has recorded as its
/// own, and that process.
pub(super) fn other_than(text: &str, dir: &Path) -> Option<(PathBuf, String)> {
    let mut lines = text.lines();
    let pid = lines.next()?.strip_prefix("pid ")?.to_owned();
    lines.find_map(|line| {
        let mut parts = line.split(' ');
        let path = dir.join(parts.next()?);
        let identity =
            Identity { device: parts.next()?.parse().ok()?, inode: parts.next()?.parse().ok()? };
        let is_there = Identity::at(&path).ok()?;
        (is_there != Some(identity)).then(|| (path, pid.clone()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_was_replaced_or_deleted_is_lost_until_it_is_back() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("x.db");
        std::fs::write(&path, "1").expect("writes");
        let _open = std::fs::File::open(&path).expect("opens");
        let place = Place::of([path.clone(), dir.path().join("never there")]);
        assert_eq!(place.check(), None);
        let away = dir.path().join("away");
        std::fs::rename(&path, &away).expect("moves");
        let why = place.check().expect("it is not there");
        assert!(
            why.contains("deleted or moved")
                && why.contains(&format!("/proc/{}/fd/", std::process::id())),
            "{why}"
        );
        assert!(place.is_lost());
        let text = place.to_text();
        assert!(
            other_than(&text, dir.path())
                .is_some_and(|(file, pid)| file == path && pid == std::process::id().to_string())
        );
        std::fs::write(&path, "2").expect("writes");
        assert!(place.check().is_some_and(|why| why.contains("another file")));
        assert!(other_than(&text, dir.path()).is_some());
        std::fs::rename(&away, &path).expect("moves");
        assert_eq!((place.check(), place.is_lost()), (None, false));
        assert_eq!(other_than(&text, dir.path()), None);
        assert_eq!(other_than("", dir.path()), None, "nothing was recorded");
    }
}

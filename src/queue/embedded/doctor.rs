//! An inspection of the embedded queue's files for what can lose or hold up events. Changes
//! nothing.

use std::{
    collections::BTreeMap,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::Path,
    sync::Arc,
    time::Duration,
};

use bytesize::ByteSize;
use rusqlite::{Connection, ErrorCode, InterruptHandle, OpenFlags};

use super::{EmbeddedQueue, store};
use crate::{
    config::Subscriber,
    delivery::{Depth, Depths, SubscriberName},
    telemetry::finding::{Finding, shell_word, summarized},
    wording::counted,
};

/// Timeout of reading the whole database: a large one is not read to its end.
const CHECK: Duration = Duration::from_secs(5);

/// Errors of the database that are reported.
const MISTAKES: u32 = 3;

/// Free bytes below which a warning is due; it is also due below the size of the database.
const LITTLE: u64 = 1 << 30;

/// Free bytes below which the next burst of events finds no room.
const TOO_LITTLE: u64 = 64 << 20;

pub(super) async fn inspect(
    queue: &EmbeddedQueue,
    subscribers: &[Arc<Subscriber>],
) -> Vec<Finding> {
    let mut findings = Vec::new();
    match queue.everything().await {
        Ok(Depths { subscribers: depths, .. }) => {
            for Kind { name, count, .. } in &KINDS {
                let findings_of_kind = depths.iter().map(|(subscriber, depth)| {
                    Finding::ok(format!("{subscriber}: {name}"), count(depth).to_string())
                });
                findings.extend(findings_of_kind);
            }
            findings.extend(not_configured(&depths, subscribers));
        }
        Err(e) => findings.push(
            Finding::harmful("database", e.to_string())
                .risking("its events cannot be read, so they are not delivered"),
        ),
    }
    let file = queue.store().path().to_owned();
    let dir = file.parent().unwrap_or(Path::new(".")).to_owned();
    findings.push(holder(&dir));
    findings.extend(room(&dir, &file));
    findings.extend(file_system(&dir));
    findings.push(privacy(&dir, &file));
    findings.push(integrity(&file).await);
    summarized(findings)
}

/// A kind of messages of a subscriber.
struct Kind {
    name: &'static str,
    counted: &'static str,
    count: fn(&Depth) -> u64,
}

const KINDS: [Kind; 3] = [
    Kind { name: "events to deliver", counted: "event(s) to deliver", count: |d| d.events },
    Kind {
        name: "batches to try again",
        counted: "batch(es) to try again",
        count: |d| d.batches(),
    },
    Kind { name: "dead letters", counted: "dead letter(s)", count: |d| d.dead },
];

fn not_configured(
    depths: &BTreeMap<SubscriberName, Depth>,
    subscribers: &[Arc<Subscriber>],
) -> Vec<Finding> {
    // An inspection without subscribers is not about them.
    if subscribers.is_empty() {
        return Vec::new();
    }
    let finding = |name: &SubscriberName, what: String| {
        let found = format!("is not configured, and the queue holds {what} for it");
        Finding::warning(format!("subscriber `{name}`"), found)
            .risking("no daemon delivers them, and they take room")
            .with_remedy("configure it again, or delete them: hooktrail prune")
    };
    let mut findings = Vec::new();
    for kind in &KINDS {
        for (name, depth) in depths {
            let count = (kind.count)(depth);
            if count > 0 && subscribers.iter().all(|s| s.name != *name) {
                findings.push(finding(name, counted(count, kind.counted)));
            }
        }
    }
    findings
}

fn unseen(what: &str, why: impl std::fmt::Display, remedy: impl Into<String>) -> Finding {
    Finding::unseen(what, why, remedy)
}

/// The process that has the daemon's lock. Read, not tried: a daemon that starts at this moment
/// would not get the lock.
fn holder(dir: &Path) -> Finding {
    let about = "data_dir";
    let remedy = format!("fuser {}", shell_word(&dir.join(store::LOCK).display().to_string()));
    let Ok(lock) = std::fs::metadata(dir.join(store::LOCK)) else {
        return Finding::ok(about, "no daemon has run with it yet");
    };
    match std::fs::read_to_string("/proc/locks") {
        Ok(locks) => match lock_holder(&locks, lock.ino()) {
            Some(pid) => Finding::ok(about, format!("a daemon works with it: process {pid}")),
            None => Finding::ok(about, "no daemon is seen that works with it"),
        },
        Err(e) => {
            unseen("whether a daemon works with data_dir", format!("/proc/locks: {e}"), remedy)
        }
    }
}

/// Reads the holder from lines such as `1: FLOCK ADVISORY WRITE 4711 08:01:131 0 EOF`. The device
/// is not compared: some file systems show another one there than elsewhere.
fn lock_holder(locks: &str, inode: u64) -> Option<u32> {
    locks.lines().find_map(|line| {
        let fields: Vec<_> = line.split_whitespace().collect();
        let &[_, "FLOCK", _, "WRITE", pid, place, ..] = &fields[..] else { return None };
        (place.rsplit(':').next()?.parse() == Ok(inode)).then(|| pid.parse().ok())?
    })
}

fn room(dir: &Path, file: &Path) -> Option<Finding> {
    let about = "disk";
    let remedy = format!("df -h {}", shell_word(&dir.display().to_string()));
    let free = match rustix::fs::statvfs(dir) {
        Ok(fs) => fs.f_bavail.saturating_mul(fs.f_frsize),
        Err(e) => return Some(unseen("free space", e, remedy)),
    };
    let size = |suffix: &str| {
        let mut name = file.as_os_str().to_owned();
        name.push(suffix);
        std::fs::metadata(name).map_or(0, |m| m.len())
    };
    Some(judge_room(about, free, size("") + size("-wal"), remedy))
}

fn judge_room(about: &str, free: u64, used: u64, remedy: String) -> Finding {
    let show = |n: u64| ByteSize(n).display().iec().to_string();
    let found =
        format!("{} are free where the database is, which takes {}", show(free), show(used));
    let risk = "on a full disk new events are refused, and neither retries nor dead letters can be written; what is stored stays";
    if free < TOO_LITTLE {
        Finding::harmful(about, found).risking(risk).with_remedy(format!("make room: {remedy}"))
    } else if free < LITTLE.max(used) {
        Finding::warning(about, found)
            .risking(risk)
            .with_remedy(format!("make room, or shorten [queue] retention: {remedy}"))
    } else {
        Finding::ok(about, found)
    }
}

/// SQLite's write-ahead log needs memory that is shared on one machine, and locks that hold.
fn file_system(dir: &Path) -> Option<Finding> {
    let about = "file system";
    // From linux/magic.h and the file systems' own sources.
    let kinds: [(u64, &str, bool); 7] = [
        (0x6969, "NFS", true),
        (0x517b, "SMB", true),
        (0xff53_4d42, "CIFS", true),
        (0xfe53_4d42, "SMB", true),
        (0x00c3_6400, "Ceph", false),
        (0x0bd0_0bd0, "Lustre", false),
        (0x6573_5546, "FUSE", false),
    ];
    let kind = match rustix::fs::statfs(dir) {
        // The type's width differs among architectures; the numbers have 32 bits.
        Ok(fs) => u64::try_from(fs.f_type & 0xffff_ffff).unwrap_or_default(),
        Err(e) => {
            return Some(unseen(
                about,
                e,
                format!("df -T {}", shell_word(&dir.display().to_string())),
            ));
        }
    };
    let (_, name, known_bad) = kinds.iter().find(|(magic, ..)| *magic == kind)?;
    let found = format!("data_dir is on {name}");
    let finding =
        if *known_bad { Finding::harmful(about, found) } else { Finding::warning(about, found) };
    Some(
        finding
            .risking("SQLite's write-ahead log and its locks are for one machine's own disk: the database can be damaged")
            .with_remedy("stop hooktrail, move [queue] data_dir to a local disk, or use a RabbitMQ"),
    )
}

fn privacy(dir: &Path, file: &Path) -> Finding {
    let mode = |path: &Path| std::fs::metadata(path).map(|m| m.permissions().mode());
    match (mode(dir), mode(file)) {
        (Ok(d), Ok(f)) if d & 0o001 != 0 && f & 0o004 != 0 => Finding::warning(
            "data_dir",
            format!("everybody on this machine can read `{}`", file.display()),
        )
        .risking("other users can read events and dead letters")
        .with_remedy(format!("chmod 700 {}", shell_word(&dir.display().to_string()))),
        (Ok(_), Ok(_)) => Finding::ok("data_dir", "others cannot read it"),
        (Err(e), _) | (_, Err(e)) => unseen(
            "permissions of data_dir",
            e,
            format!("ls -ld {}", shell_word(&dir.display().to_string())),
        ),
    }
}

/// Ends a check whose caller has given up.
struct Interrupt(InterruptHandle);

impl Drop for Interrupt {
    fn drop(&mut self) {
        self.0.interrupt();
    }
}

/// On a connection of its own, so that no other query waits behind it.
async fn integrity(file: &Path) -> Finding {
    let about = "database";
    let by_hand = format!(
        "when no daemon runs: sqlite3 {} 'PRAGMA quick_check'",
        shell_word(&file.display().to_string())
    );
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let db = match Connection::open_with_flags(file, flags) {
        Ok(db) => db,
        Err(e) => return damaged(about, &e.to_string(), file),
    };
    let interrupt = Interrupt(db.get_interrupt_handle());
    let check = tokio::task::spawn_blocking(move || {
        let mut query = db.prepare(&format!("PRAGMA quick_check({MISTAKES})"))?;
        let rows = query.query_map([], |r| r.get(0))?;
        rows.collect::<rusqlite::Result<Vec<String>>>()
    });
    let checked = tokio::time::timeout(CHECK, check).await;
    drop(interrupt);
    match checked {
        Ok(Ok(Ok(rows))) if rows == ["ok"] => {
            Finding::ok(about, "its pages are sound (quick_check)")
        }
        Ok(Ok(Ok(rows))) => damaged(about, &rows.join("; "), file),
        Ok(Ok(Err(e))) if e.sqlite_error_code() == Some(ErrorCode::DatabaseCorrupt) => {
            damaged(about, &e.to_string(), file)
        }
        Ok(Ok(Err(e))) => unseen("database's integrity", e, by_hand),
        Ok(Err(e)) => unseen("database's integrity", e, by_hand),
        Err(_) => unseen(
            "database's integrity",
            format!("checking all of it takes longer than {} s", CHECK.as_secs()),
            by_hand,
        ),
    }
}

fn damaged(about: &str, why: &str, file: &Path) -> Finding {
    Finding::harmful(about, format!("its pages are damaged: {why}")).risking("events in the damaged part cannot be delivered").with_remedy(
        format!("stop hooktrail, keep a copy of {}, and save what can be read (docs/operations.md, \"Disaster recovery\")", file.display()),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::finding::Severity;

    #[test]
    fn the_holder_of_a_lock_is_found_by_the_files_number() {
        let locks = "1: POSIX  ADVISORY  WRITE 7 fe:01:131 0 EOF\n2: FLOCK  ADVISORY  READ 8 fe:01:131 0 EOF\n\
                     3: FLOCK  ADVISORY  WRITE 4711 fe:01:131 0 EOF\n4: FLOCK  ADVISORY  WRITE 5 fe:01:1310 0 EOF\n";
        assert_eq!(
            (lock_holder(locks, 131), lock_holder(locks, 1310), lock_holder(locks, 31)),
            (Some(4711), Some(5), None)
        );
    }

    #[test]
    fn room_is_judged_by_what_is_free_and_what_the_database_takes() {
        let judge = |free, used| judge_room("disk", free, used, String::new()).severity;
        for (free, used, severity) in [
            (10 << 30, 1 << 20, Severity::Ok),
            (2 << 30, 3 << 30, Severity::Warning),
            (512 << 20, 1 << 20, Severity::Warning),
            (10 << 20, 1 << 20, Severity::Harmful),
        ] {
            assert_eq!(judge(free, used), severity, "{free} bytes free, {used} used");
        }
    }
}

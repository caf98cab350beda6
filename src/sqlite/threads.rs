//! The threads of an open file: one writes, and commits all jobs that have gathered meanwhile
//! together; others read.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    time::Duration,
};

use rusqlite::Connection;
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::timeout,
};

use super::error::{About, Fault, Kind};
use crate::failpoint::{Step, reached};

/// Jobs that wait for a thread; more wait before they are added.
pub(super) const JOBS: usize = 1024;

/// Jobs in one transaction.
const GROUP: usize = 256;

/// Timeout of each thread at the end: a longer query ends with the process.
const END_TIMEOUT: Duration = Duration::from_secs(5);

/// Timeout of other processes at the end, before the write-ahead log is left to them.
const END_BUSY_TIMEOUT: Duration = Duration::from_secs(1);

/// A message to a thread.
pub(super) enum Job<J> {
    Do(J),
    /// Close the connection and end; later jobs are refused.
    End(oneshot::Sender<()>),
}

pub(super) type ReadJob = Box<dyn FnOnce(&Connection) + Send>;
/// A part of a transaction. Returns what to do once it is known whether that was committed.
pub(super) type WriteJob =
    Box<dyn FnOnce(&Connection) -> Box<dyn FnOnce(Result<(), Fault>)> + Send>;

/// Starts a thread that answers queries, one after the other.
pub(super) fn read(name: &str, db: Connection) -> mpsc::Sender<Job<ReadJob>> {
    let (jobs, mut inbox) = mpsc::channel(JOBS);
    thread(name, move || {
        while let Some(job) = inbox.blocking_recv() {
            match job {
                // A panic ends only that query; the dropped reply notifies its caller.
                Job::Do(job) => {
                    let job: ReadJob = job;
                    catch_unwind(AssertUnwindSafe(|| job(&db))).ok();
                }
                Job::End(ended) => {
                    drop((inbox, db));
                    ended.send(()).ok(); // the caller may have given up
                    return;
                }
            }
        }
    });
    jobs
}

/// Ends a thread when it has done all earlier jobs.
pub(super) async fn end<J>(thread: &mpsc::Sender<Job<J>>, label: &str) {
    let (ended, end) = oneshot::channel();
    let ending = async {
        if thread.send(Job::End(ended)).await.is_ok() {
            end.await.ok();
        }
    };
    if timeout(END_TIMEOUT, ending).await.is_err() {
        tracing::debug!(file = label, "a query still ran at the end");
    }
}

fn thread(name: &str, body: impl FnOnce() + Send + 'static) {
    // It ends with its inbox. A process that cannot start a thread cannot work at all.
    std::thread::Builder::new().name(name.to_owned()).spawn(body).expect("a thread for a database");
}

/// The thread that writes.
pub(super) struct Writer {
    pub(super) db: Connection,
    pub(super) about: About,
    /// Counts the commits.
    pub(super) commits: watch::Sender<u64>,
    /// Move the write-ahead log into the database at the end.
    pub(super) empties: bool,
    /// The steps before and after a commit, where a test can end the process.
    pub(super) steps: Option<[Step; 2]>,
    /// Niceness of the thread; 0 leaves that of the process.
    pub(super) nice: i32,
}

impl Writer {
    pub(super) fn start(self, name: &str) -> mpsc::Sender<Job<WriteJob>> {
        let (jobs, inbox) = mpsc::channel(JOBS);
        thread(name, move || self.write(inbox));
        jobs
    }

    /// Commits the jobs that have gathered, until the end.
    fn write(self, mut inbox: mpsc::Receiver<Job<WriteJob>>) {
        step_back(self.nice);
        let mut end = None;
        while end.is_none() {
            match inbox.blocking_recv() {
                Some(Job::Do(first)) => end = self.write_group(first, &mut inbox),
                Some(Job::End(ended)) => end = Some(ended),
                None => return,
            }
        }
        drop(inbox);
        let db = self.db;
        if self.empties {
            // Without it the data is in the log: another process that has it open prevents this.
            let emptied = db
                .busy_timeout(END_BUSY_TIMEOUT)
                .and_then(|()| db.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(())));
            if let Err(e) = emptied {
                tracing::debug!(error = %e, "the write-ahead log stays as it is");
            }
        }
        drop(db);
        end.and_then(|ended| ended.send(()).ok()); // the caller may have given up
    }

    /// Commits a job and those that have arrived meanwhile in one transaction. Returns the sender
    /// to notify if the end was requested.
    fn write_group(
        &self,
        first: WriteJob,
        inbox: &mut mpsc::Receiver<Job<WriteJob>>,
    ) -> Option<oneshot::Sender<()>> {
        let db = &self.db;
        let mut end = None;
        let begun = db.execute_batch("BEGIN IMMEDIATE").map_err(|e| self.about.explain(&e));
        let mut done = Vec::new();
        let mut next = Some(first);
        let mut panicked = false;
        while let Some(job) = next {
            match catch_unwind(AssertUnwindSafe(|| job(db))) {
                Ok(answer) => done.push(answer),
                // It may have stopped anywhere: the group is not committed, and the dropped reply
                // notifies its caller.
                Err(_) => panicked = true,
            }
            // A full disk can end the whole transaction: the following parts must not be committed
            // alone.
            let more = done.len() < GROUP && !panicked && !db.is_autocommit() && end.is_none();
            next = match more.then(|| inbox.try_recv()) {
                Some(Ok(Job::Do(job))) => Some(job),
                Some(Ok(Job::End(ended))) => {
                    end = Some(ended);
                    None
                }
                Some(Err(_)) | None => None,
            };
        }
        let committed = begun.and_then(|()| {
            if panicked || db.is_autocommit() {
                return Err(Fault::new(Kind::Other, "the transaction was rolled back"));
            }
            self.steps.inspect(|[before, _]| reached(*before));
            let committed = db.execute_batch("COMMIT").map_err(|e| self.about.explain_commit(&e));
            self.steps.inspect(|[_, after]| reached(*after));
            committed
        });
        if committed.is_err() && !db.is_autocommit() {
            db.execute_batch("ROLLBACK").ok(); // if that fails too, the next BEGIN says so
        }
        for answer in done {
            answer(committed.clone());
        }
        if committed.is_ok() {
            self.commits.send_modify(|n| *n += 1);
        }
        end
    }
}

/// Lets other threads go first. Linux alone has a niceness for each thread; elsewhere it would be
/// the whole process's.
fn step_back(nice: i32) {
    #[cfg(target_os = "linux")]
    if nice != 0
        && let Err(e) = rustix::process::setpriority_process(None, nice)
    {
        tracing::debug!(error = %e, "the writing thread keeps its priority");
    }
    #[cfg(not(target_os = "linux"))]
    let _ = nice;
}

/// Runs a part so that its failure affects no other.
pub(super) fn savepoint<T>(
    db: &Connection,
    part: impl FnOnce(&Connection) -> rusqlite::Result<T>,
) -> rusqlite::Result<T> {
    if db.is_autocommit() {
        return Err(rusqlite::Error::InvalidQuery); // BEGIN failed; the group gets the reason
    }
    db.execute_batch("SAVEPOINT part")?;
    let done = part(db);
    if done.is_err() && !db.is_autocommit() {
        db.execute_batch("ROLLBACK TO part")?;
    }
    if !db.is_autocommit() {
        db.execute_batch("RELEASE part")?;
    }
    done
}

//! Named steps between one durable fact and the next, at which a test can end the process as a
//! power cut would. A release build has no code for them, and does not read the variable.

/// A step in the way of an event or of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// The broker has answered a request about its queues, exchanges or bindings.
    Declared,
    /// The witness of the exchange of the events is declared, and not bound.
    Witnessed,
    /// A request is about to be sent.
    Attempting,
    /// A request was answered, or failed; nothing of that is durable yet.
    Answered,
    /// A group of messages was sent to the broker, and none of them is confirmed.
    Published,
    /// An envelope or dead letter is confirmed, and the messages that it replaces are not acked.
    Confirmed,
    /// An ack was sent to the broker.
    Acked,
    /// Events of the source queue are confirmed in the subscribers' queues, and not acked.
    Relayed,
    /// Events of the intake queue are taken, and not in the log.
    Taken,
    /// Events of the intake queue are on the disk, and not acked.
    Scribed,
    /// Orphans, dead letters or retries are confirmed in their new queue, and not acked in the old
    /// one.
    Moved,
    /// A record about a subscriber is confirmed, and its caller has not been answered.
    Recorded,
    /// A transaction of the embedded queue is complete but for its commit.
    Committing,
    /// A transaction of the embedded queue is on the disk, and its callers have not been answered.
    Committed,
    /// Events from an HTTP request are durable, and the request is not answered.
    Stored,
    /// A transaction of history is complete but for its commit.
    HistoryCommitting,
    /// A transaction of history is committed, and its callers have not been answered.
    HistoryCommitted,
    /// Events are in history, and the queue still keeps them for it.
    Remembered,
    /// The queue keeps events no longer that history has.
    Released,
    /// A transaction of the store's precious file is complete but for its commit.
    StoreCommitting,
    /// A transaction of the store's precious file is on the disk, and its callers have not been
    /// answered.
    StoreCommitted,
}

impl Step {
    pub const ALL: [Self; 21] = [
        Self::Declared,
        Self::Witnessed,
        Self::Attempting,
        Self::Answered,
        Self::Published,
        Self::Confirmed,
        Self::Acked,
        Self::Relayed,
        Self::Taken,
        Self::Scribed,
        Self::Moved,
        Self::Recorded,
        Self::Committing,
        Self::Committed,
        Self::Stored,
        Self::HistoryCommitting,
        Self::HistoryCommitted,
        Self::Remembered,
        Self::Released,
        Self::StoreCommitting,
        Self::StoreCommitted,
    ];
}

/// The environment variable that names a step, and how often it passes before: `Confirmed:3` ends
/// the process at the fourth time.
pub const VARIABLE: &str = "HOOKTRAIL_DIE_AT";

/// Ends the process if the variable names this step. Does nothing in a release build.
#[inline]
pub fn reached(step: Step) {
    #[cfg(debug_assertions)]
    armed::reached(step);
    #[cfg(not(debug_assertions))]
    let _ = step;
}

#[cfg(debug_assertions)]
mod armed {
    use std::sync::{
        LazyLock,
        atomic::{AtomicU32, Ordering},
    };

    use super::{Step, VARIABLE};

    struct Armed {
        step: Step,
        left: AtomicU32,
    }

    static ARMED: LazyLock<Option<Armed>> = LazyLock::new(|| {
        let value = std::env::var(VARIABLE).ok()?;
        let (name, count) = value.split_once(':').unwrap_or((&value, "0"));
        let step = Step::ALL
            .into_iter()
            .find(|s| format!("{s:?}") == name)
            .unwrap_or_else(|| panic!("{VARIABLE}: no step `{name}`"));
        Some(Armed {
            step,
            left: AtomicU32::new(
                count.parse().unwrap_or_else(|e| panic!("{VARIABLE}: `{count}`: {e}")),
            ),
        })
    });

    pub(super) fn reached(step: Step) {
        let Some(armed) = ARMED.as_ref().filter(|armed| armed.step == step) else { return };
        let passed = armed
            .left
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1))
            .is_ok();
        if !passed {
            // No destructor runs and no connection is closed, as in a crash.
            rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL)
                .expect("a process may end itself");
        }
    }
}

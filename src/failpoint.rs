//! Named steps between one durable fact and the next, at which a test can end the process as a
//! power cut there would. Only a debug build knows them: a release build has no code for it, and
//! does not read the variable.

/// A step of the way of an event, or of what is kept beside it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// The broker has answered a request about its queues, exchanges or bindings.
    Declared,
    /// A request is about to be sent.
    Attempting,
    /// A request was answered, or failed; nothing of that is written down.
    Answered,
    /// A group of messages was handed to the broker, and none of them is confirmed.
    Published,
    /// An envelope or dead letter is confirmed, and what it stands for is not acked.
    Confirmed,
    /// An ack was handed to the broker.
    Acked,
    /// Events of the source queue are confirmed in the subscribers' queues, and not acked.
    Relayed,
    /// Orphans, dead letters or retries are confirmed where they go, and not acked where they were.
    Moved,
    /// A record about a subscriber is confirmed, and whoever asked for it does not know.
    Recorded,
    /// A transaction of the embedded queue is complete but for its commit.
    Committing,
    /// A transaction of the embedded queue is on the disk, and nobody knows.
    Committed,
    /// Events that came over HTTP are durable, and not answered for.
    Stored,
}

impl Step {
    pub const ALL: [Self; 12] = [
        Self::Declared,
        Self::Attempting,
        Self::Answered,
        Self::Published,
        Self::Confirmed,
        Self::Acked,
        Self::Relayed,
        Self::Moved,
        Self::Recorded,
        Self::Committing,
        Self::Committed,
        Self::Stored,
    ];
}

/// The variable that names a step and how often it is passed before: `Confirmed:3` ends the process
/// at the fourth.
pub const VARIABLE: &str = "HOOKTRAIL_DIE_AT";

/// A step is reached. In a release build this is nothing.
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
            // No destructor, no goodbye to anybody, as in a crash.
            rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL)
                .expect("a process may end itself");
        }
    }
}

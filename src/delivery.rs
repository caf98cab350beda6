//! The nouns of delivery, each defined once: batches, outcomes of attempts, dispositions, and dead
//! letters. Logs, metrics, the API and both queues take their names from here.

mod attempt_log;
mod batch;
mod dead_letter;
mod depth;
mod disposition;
mod outcome;
mod pause;
mod print;
mod subscriber_name;
mod trace;

pub use self::{
    attempt_log::{AttemptLog, AttemptResult, FailedAttempt},
    batch::{Batch, BatchId},
    dead_letter::{DeadLetter, MAX_ERROR_LEN, MessageKind, Reason, cut_error},
    depth::{Depth, Depths},
    disposition::{Disposition, DispositionKind, PauseCause},
    outcome::{Failure, FailureKind, Outcome},
    pause::{Pause, PauseState, PauseStates},
    print::{Print, Prints},
    subscriber_name::{NotAName, SubscriberName},
    trace::{Trace, is_traceparent},
};

//! What the tasks of history share: the queue's state, the store that has it, and what was lost.

use std::{
    sync::{
        Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::SystemTime,
};

use tokio::sync::{Notify, watch};

use super::prefetch::Sizes;
use crate::store::Gap;

/// The queue of history, as this daemon knows it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum QueueState {
    /// Not bound by this daemon: it is off, young, or unusable.
    #[default]
    Unbound,
    /// It gets every event.
    Bound,
}

#[derive(Debug, Default)]
pub(super) struct HistoryState {
    /// The store that has history, by the record; `None` until that was read.
    pub(super) recorded: watch::Sender<Option<Option<String>>>,
    /// The id of the store of this process, where it is known.
    pub(super) own: OnceLock<String>,
    /// This daemon's store has history: its queue is to be bound.
    pub(super) wanted: watch::Sender<bool>,
    pub(super) queue: watch::Sender<QueueState>,
    /// Why history lacks events, by the record: until this daemon's store has that gap.
    pub(super) recorded_lack: watch::Sender<Option<String>>,
    /// A gap was reported that is still in the record.
    pub(super) owes_end_of_lack: AtomicBool,
    /// Notified when something shows that the queue may be unusable: a publish was refused, or it
    /// cannot be consumed.
    pub(super) suspected: Notify,
    lost: Mutex<Lost>,
    sizes: Mutex<Sizes>,
}

#[derive(Debug, Default)]
struct Lost {
    /// The time of the latest event that is in the store.
    stored: Option<SystemTime>,
    gaps: Vec<Gap>,
}

/// Gaps that wait to be taken; the latest of more are merged.
const MAX_GAPS: usize = 16;

impl HistoryState {
    pub(super) fn is_bound(&self) -> bool {
        *self.queue.borrow() == QueueState::Bound
    }

    /// The record says that history lacks events, or does not any more.
    pub(super) fn report_lack(&self, why: Option<&str>) {
        self.recorded_lack.send_if_modified(|known| {
            let is_new = known.as_deref() != why;
            if is_new {
                *known = why.map(str::to_owned);
            }
            is_new
        });
    }

    /// The queue may be unusable: it is tried at once.
    pub(super) fn suspect(&self) {
        self.suspected.notify_one();
    }

    /// This daemon's store has history, or has none.
    pub(super) fn want(&self, wants: bool) {
        // Only a change wakes the upkeep, which asks the broker.
        self.wanted.send_if_modified(|wanted| std::mem::replace(wanted, wants) != wants);
    }

    fn lost(&self) -> MutexGuard<'_, Lost> {
        self.lost.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn sizes(&self) -> MutexGuard<'_, Sizes> {
        self.sizes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An event of this time is in the store.
    pub(super) fn stored(&self, at: SystemTime) {
        self.lost().stored = Some(at);
    }

    /// The time of the latest event that is in the store.
    pub(super) fn last_stored(&self) -> Option<SystemTime> {
        self.lost().stored
    }

    /// Events were lost between the latest one in the store, or `since` if that is later, and
    /// `until`. Before the first event of all nothing is lost: history begins there.
    pub(super) fn lacks(&self, since: Option<SystemTime>, until: SystemTime, why: &str) {
        let mut lost = self.lost();
        let Some(from) = since.or(lost.stored) else { return };
        let from = from.min(until);
        let is_full = lost.gaps.len() >= MAX_GAPS;
        match lost.gaps.last_mut() {
            Some(last) if is_full || (last.why == why && last.until >= from) => last.until = until,
            _ => {
                lost.gaps.push(Gap {
                    from,
                    until,
                    what: "events",
                    why: why.to_owned(),
                    missing: None,
                });
            }
        }
    }

    /// Everything that was taken is in the store. Returns whether a gap that is still in the record is
    /// there as well; true once.
    pub(super) fn has_stored_lack(&self) -> bool {
        self.lost().gaps.is_empty() && self.owes_end_of_lack.swap(false, Ordering::Relaxed)
    }

    pub(super) fn take_gaps(&self) -> Vec<Gap> {
        std::mem::take(&mut self.lost().gaps)
    }
}

/// Whether the queue was at its limit at some moment: then it has dropped its oldest events.
///
/// AMQP counts the ready messages, and not their bytes, so that these are summed as they arrive.
#[derive(Debug)]
pub(super) struct Backlog {
    /// The messages that were ready at that moment and have not arrived yet.
    left: u64,
    bytes: u64,
    largest: u64,
    limit: u64,
    /// The time of the latest event in the store at that moment, and of the first that arrived.
    since: Option<SystemTime>,
    first: Option<SystemTime>,
}

impl Backlog {
    pub(super) fn new(ready: u32, limit: u64, since: Option<SystemTime>) -> Self {
        Self { left: ready.into(), bytes: 0, largest: 0, limit, since, first: None }
    }

    /// Whether everything that was ready has arrived.
    pub(super) fn is_read(&self) -> bool {
        self.left == 0
    }

    /// An event has arrived. Returns the time in which events were dropped, once that is known.
    pub(super) fn arrived(
        &mut self,
        bytes: u64,
        at: SystemTime,
    ) -> Option<(Option<SystemTime>, SystemTime)> {
        if self.is_read() {
            return None;
        }
        let first = *self.first.get_or_insert(at);
        self.left -= 1;
        self.bytes += bytes;
        self.largest = self.largest.max(bytes);
        // An event that does not fit any more makes room for itself alone.
        let was_full = self.bytes + self.largest >= self.limit;
        (self.is_read() && was_full).then_some((self.since, first))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    #[test]
    fn a_queue_that_was_full_has_a_gap_up_to_its_first_event_and_one_that_was_not_has_none() {
        for (ready, bytes, full) in [(10, 100, true), (10, 95, true), (9, 90, false), (0, 0, false)]
        {
            let mut backlog = Backlog::new(ready, 1000, Some(at(5)));
            let found: Vec<_> =
                (0..20).filter_map(|n| backlog.arrived(bytes, at(50 + n))).collect();
            let expected: &[_] = if full { &[(Some(at(5)), at(50))] } else { &[] };
            assert_eq!(found, expected, "{ready} of {bytes}");
            assert!(backlog.is_read());
        }
    }

    #[test]
    fn what_was_lost_is_reported_once_and_before_the_first_event_nothing_is_lost() {
        let state = HistoryState::default();
        state.lacks(None, at(9), "gone");
        assert_eq!(state.take_gaps(), []);
        state.stored(at(10));
        state.lacks(None, at(20), "gone");
        state.lacks(Some(at(15)), at(30), "gone");
        state.lacks(Some(at(40)), at(50), "unbound");
        let ranges: Vec<_> =
            state.take_gaps().into_iter().map(|g| (g.from, g.until, g.why)).collect();
        assert_eq!(
            ranges,
            [(at(10), at(30), "gone".to_owned()), (at(40), at(50), "unbound".to_owned())]
        );
        assert_eq!(state.take_gaps(), []);
    }

    #[test]
    fn gaps_that_nobody_takes_stay_few_and_cover_everything() {
        let state = HistoryState::default();
        for n in 0..1000 {
            state.lacks(Some(at(10 * n)), at(10 * n + 5), &n.to_string());
        }
        let gaps = state.take_gaps();
        assert_eq!((gaps.len(), gaps.last().map(|g| g.until)), (MAX_GAPS, Some(at(9995))));
    }
}

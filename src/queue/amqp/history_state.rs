//! What the tasks of history share: the queue's state, the store that has it, and what was lost.

use std::{
    sync::{Mutex, MutexGuard, OnceLock, PoisonError},
    time::{Instant, SystemTime},
};

use lapin::ChannelStatus;
use tokio::sync::{Notify, watch};

use super::{
    pool::{Borrowed, Quarantine},
    prefetch::Sizes,
    record::Lack,
};
use crate::{clock, store::Gap};

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
    /// Events that history lacks, by the record: until this daemon's store has that gap.
    pub(super) recorded_lack: watch::Sender<Option<Lack>>,
    /// Notified when a gap waits to be taken: no event has to arrive for that.
    pub(super) gap_found: Notify,
    /// Notified when something shows that the queue may be unusable: a publish was refused, or it
    /// cannot be consumed.
    pub(super) suspected: Notify,
    /// When it was suspected last.
    suspected_at: Mutex<Option<Instant>>,
    consumer: Mutex<Option<Consuming>>,
    lost: Mutex<Lost>,
    sizes: Mutex<Sizes>,
}

/// How this process takes from the queue.
#[derive(Debug)]
struct Consuming {
    connection: Borrowed,
    channel: ChannelStatus,
    /// The queue has answered, or delivered something, later than that.
    answered: Instant,
}

#[derive(Debug, Default)]
struct Lost {
    /// The time of the latest event that is in the store.
    stored: Option<SystemTime>,
    gaps: Vec<Gap>,
    /// The time of gaps that were reported and are still in the record: begin and end.
    owed: Option<(SystemTime, SystemTime)>,
    /// The last two times at which this daemon has seen the witness, the later first.
    witnessed: [Option<SystemTime>; 2],
}

/// Gaps that wait to be taken; the latest of more are merged.
const MAX_GAPS: usize = 16;

impl HistoryState {
    pub(super) fn is_bound(&self) -> bool {
        *self.queue.borrow() == QueueState::Bound
    }

    /// This process takes from the queue, until the channel or the consumer ends. It began to ask
    /// for that at this time.
    pub(super) fn consumes(&self, connection: Borrowed, channel: ChannelStatus, answered: Instant) {
        *self.consumer() = Some(Consuming { connection, channel, answered });
    }

    /// The queue has delivered something later than that.
    pub(super) fn delivered_after(&self, at: Instant) {
        if let Some(consuming) = &mut *self.consumer() {
            consuming.answered = at;
        }
    }

    /// The broker has ended the consumer, or the queue that it took from.
    pub(super) fn ends_consuming(&self) {
        *self.consumer() = None;
    }

    /// Whether this process takes from the queue, on a channel that the broker has not ended, and
    /// the queue has answered since it was suspected last.
    pub(super) fn is_consumed(&self) -> bool {
        let suspected = *self.suspected_at();
        self.consumer().as_ref().is_some_and(|consuming| {
            consuming.channel.connected() && suspected.is_none_or(|at| consuming.answered > at)
        })
    }

    /// Whether this process takes from the queue, on a channel that the broker has not ended.
    pub(super) fn is_consuming(&self) -> bool {
        self.connection().is_some()
    }

    /// The connection on which it does.
    pub(super) fn connection(&self) -> Option<Quarantine> {
        let consumer = self.consumer();
        let consuming = consumer.as_ref().filter(|consuming| consuming.channel.connected());
        consuming.and_then(|consuming| consuming.connection.get())
    }

    fn consumer(&self) -> MutexGuard<'_, Option<Consuming>> {
        self.consumer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn suspected_at(&self) -> MutexGuard<'_, Option<Instant>> {
        self.suspected_at.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The record says that history lacks events, or does not any more.
    pub(super) fn report_lack(&self, lack: Option<&Lack>) {
        self.recorded_lack.send_if_modified(|known| {
            let is_new = known.as_ref() != lack;
            if is_new {
                *known = lack.cloned();
            }
            is_new
        });
    }

    /// The witness was there at this time: until then the exchange was not deleted.
    pub(super) fn witnessed(&self, at: SystemTime) {
        let mut lost = self.lost();
        lost.witnessed = [Some(at), lost.witnessed[0]];
    }

    /// The last time at which the exchange was known to have its bindings, or else of the latest
    /// event in the store.
    pub(super) fn last_sound(&self) -> Option<SystemTime> {
        let lost = self.lost();
        lost.witnessed[0].or(lost.stored)
    }

    /// The queue may be unusable: it is tried at once.
    pub(super) fn suspect(&self) {
        *self.suspected_at() = Some(clock::instant());
        self.suspected.notify_one();
    }

    /// The queue was found sound by a trial that began at this time.
    pub(super) fn tried(&self, began: Instant) {
        self.suspected_at().take_if(|at| *at < began);
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
        lost.add(from, until, why);
        self.gap_found.notify_one();
    }

    /// The queue is bound now: events were lost as the record says. Its time counts: since it was
    /// written another task may have bound the queue, and later events may be in the store.
    pub(super) fn lacked(&self, lack: &Lack, now: SystemTime) {
        let mut lost = self.lost();
        let until = now.max(lack.at);
        let before = |at: &SystemTime| *at < lack.at;
        // Who recorded it knew no store. The queue may be gone with what it held, so that the time at
        // which it was last known to be bound counts only if a later event is in the store.
        let unknown = || {
            let sound = || lost.witnessed.into_iter().flatten().find(before);
            lost.stored.filter(before).or_else(sound).unwrap_or(lack.at)
        };
        let from = lack.since.unwrap_or_else(unknown).min(lack.at);
        if lost.stored.is_some() {
            lost.add(from, until, &lack.why);
        }
        lost.owes((from, until));
        self.gap_found.notify_one();
    }

    /// Everything that was taken is in the store. Returns the time of the gaps that are there as well
    /// and still in the record: once.
    pub(super) fn stored_lack(&self) -> Option<(SystemTime, SystemTime)> {
        let mut lost = self.lost();
        if lost.gaps.is_empty() { lost.owed.take() } else { None }
    }

    /// The record still has the gaps of this time.
    pub(super) fn owes(&self, time: (SystemTime, SystemTime)) {
        self.lost().owes(time);
    }

    pub(super) fn take_gaps(&self) -> Vec<Gap> {
        std::mem::take(&mut self.lost().gaps)
    }
}

impl Lost {
    fn add(&mut self, from: SystemTime, until: SystemTime, why: &str) {
        let is_full = self.gaps.len() >= MAX_GAPS;
        match self.gaps.last_mut() {
            Some(last) if is_full || (last.why == why && last.until >= from) => {
                last.from = last.from.min(from);
                last.until = last.until.max(until);
            }
            _ => {
                self.gaps.push(Gap {
                    from,
                    until,
                    what: "events",
                    why: why.to_owned(),
                    missing: None,
                });
            }
        }
    }

    fn owes(&mut self, (from, until): (SystemTime, SystemTime)) {
        let (since, end) = self.owed.unwrap_or((from, until));
        self.owed = Some((since.min(from), end.max(until)));
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
    fn the_gap_of_a_record_has_the_time_that_the_record_says_and_its_end_is_owed_once() {
        let state = HistoryState::default();
        let lack =
            |since: Option<u64>| Lack { why: "x".to_owned(), since: since.map(at), at: at(100) };
        state.lacked(&lack(Some(50)), at(110));
        assert_eq!(state.take_gaps(), [], "history begins later");
        assert_eq!(state.stored_lack(), Some((at(50), at(110))), "and the record ends");
        // It was bound by another task, and an event came before the record was read.
        state.stored(at(105));
        let found = |lack: &Lack, now| {
            state.lacked(lack, at(now));
            assert_eq!(state.stored_lack(), None, "the gap is not in the store");
            let gaps = state.take_gaps();
            let [gap] = &gaps[..] else { panic!("{gaps:?}") };
            assert_eq!(state.stored_lack(), Some((gap.from, gap.until)));
            assert_eq!(state.stored_lack(), None);
            (gap.from, gap.until)
        };
        assert_eq!(found(&lack(Some(50)), 110), (at(50), at(110)));
        // Another clock is ahead.
        assert_eq!(found(&lack(Some(50)), 90), (at(50), at(100)));
        // Nobody has seen it begin: not after it was found, although a later event is stored.
        assert_eq!(found(&lack(None), 110), (at(100), at(110)));
        state.witnessed(at(60));
        assert_eq!(found(&lack(None), 110), (at(60), at(110)));
        state.witnessed(at(101)); // after it was restored
        assert_eq!(found(&lack(None), 110), (at(60), at(110)));
        assert_eq!(state.last_sound(), Some(at(101)));

        // What the queue held since the last event of the store may be lost with it.
        let state = HistoryState::default();
        state.stored(at(50));
        state.witnessed(at(60));
        state.lacked(&lack(None), at(110));
        let gaps: Vec<_> = state.take_gaps().into_iter().map(|g| (g.from, g.until)).collect();
        assert_eq!(gaps, [(at(50), at(110))]);
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

//! Redeliveries of messages that were settled, but whose ack may not have reached the broker: they
//! are recognised, and acked without a second attempt.
//!
//! The broker does not say whether an ack arrived before its connection was lost. So of the
//! messages of a lost session:
//!
//! - Those that were settled while **their ack was never written** (it stood behind a slow batch,
//!   or the answer arrived after the channel was gone) are still in the queue. Each such settlement
//!   acks one redelivered message with the same fingerprint. Equal events are counted, so that as
//!   many leave the queue as were settled. That holds without ids too.
//! - Those that were delivered while **their ack was written** may have left the queue. An equal
//!   redelivered event can then be another one, which was never attempted. So an event is
//!   recognised only by its producer's id and its bytes, and an envelope by its batch's id and
//!   number of attempts.
//! - Those that became an envelope or a dead letter while **their ack was written** are not
//!   recognised: a dead letter may be replayed, and a retry may restart when its subscriber is
//!   resumed, with the same bytes as before. The first settlement decides, however often the
//!   message was recognised since.
//!
//! All others are attempted again: a repeat is allowed, a loss never.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use sha2::{Digest as _, Sha256};

/// An ack that was written this long before the connection was found lost has arrived: the
/// heartbeats after it did.
const ARRIVES: Duration = Duration::from_secs(30);

/// The longest outage of a broker over which settlements are remembered.
const OUTAGE: Duration = Duration::from_secs(3600);

/// How long settlements are remembered after the queue was reopened: the broker may notice late
/// that the former connection is gone, and what it requeues then stands behind a window of others.
const LATE: Duration = Duration::from_secs(300);

/// Lost sessions of which the settlements are remembered; of each at most two windows.
const SESSIONS: usize = 3;

/// The digest by which a redelivery is recognised as already settled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Fingerprint {
    digest: u128,
    /// The message has an id.
    named: bool,
}

impl Fingerprint {
    /// The fingerprint of an event, by its producer's id and the SHA-256 of its body. Some clients
    /// send an empty id for none.
    pub(super) fn event(message_id: Option<&str>, body: &[u8; 32]) -> Self {
        Self::new(b"event", message_id.filter(|id| !id.is_empty()), body)
    }

    /// The fingerprint of an envelope, by id and number of attempts. A batch can reach the same
    /// number of attempts again, when it is replayed or its subscriber resumed.
    pub(super) fn envelope(batch_id: &str, attempts: u32) -> Self {
        Self::new(b"batch", Some(batch_id), &attempts.to_be_bytes())
    }

    fn new(kind: &[u8; 5], id: Option<&str>, rest: &[u8]) -> Self {
        let length = id.map_or(u64::MAX, |id| id.len() as u64).to_be_bytes();
        let hash = Sha256::new()
            .chain_update(kind)
            .chain_update(length)
            .chain_update(id.unwrap_or_default())
            .chain_update(rest)
            .finalize();
        let mut digest = [0; 16];
        digest.copy_from_slice(&hash[..16]);
        Self { digest: u128::from_be_bytes(digest), named: id.is_some() }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// If it was settled before: whether it was accepted.
    Taken {
        known: Option<bool>,
    },
    /// Settled by an answer that accepted it, or by a message in another queue.
    Settled {
        accepted: bool,
    },
    Acked {
        accepted: bool,
        at: Instant,
    },
}

/// The states of the deliveries of a channel. Their tags count up from 1.
#[derive(Debug)]
pub(super) struct Track {
    window: usize,
    /// Tags up to this one are forgotten.
    forgotten: u64,
    /// The states of the tags after `forgotten`.
    states: VecDeque<(Option<Fingerprint>, State)>,
    /// One ack with `multiple` was written for all up to this tag.
    acked: u64,
}

impl Track {
    pub(super) fn new(window: u16) -> Self {
        Self { window: window.into(), forgotten: 0, states: VecDeque::new(), acked: 0 }
    }

    /// Adds the next delivery. Since the broker sends it, all before the window were acked, and
    /// need not be remembered.
    pub(super) fn taken(
        &mut self,
        tag: u64,
        fingerprint: Option<Fingerprint>,
        known: Option<bool>,
    ) {
        // A missing delivery would have the next ones settled in one another's place.
        assert_eq!(
            tag,
            self.forgotten + self.states.len() as u64 + 1,
            "each delivery of a channel is tracked, in its order"
        );
        self.states.push_back((fingerprint, State::Taken { known }));
        while self.states.len() > self.window
            && matches!(self.states.front(), Some((_, State::Acked { .. })))
        {
            self.states.pop_front();
            self.forgotten += 1;
        }
    }

    fn at(&mut self, tag: u64) -> Option<&mut State> {
        let n = tag.checked_sub(self.forgotten + 1)?;
        self.states.get_mut(usize::try_from(n).ok()?).map(|(_, state)| state)
    }

    pub(super) fn settled(&mut self, tag: u64, accepted: bool) {
        if let Some(state) = self.at(tag)
            && let State::Taken { known } = *state
        {
            *state = State::Settled { accepted: known.unwrap_or(accepted) };
        }
    }

    /// The number of deliveries after a tag that are unacked, where acks are written for prefixes
    /// alone.
    pub(super) fn unacked_after(&self, tag: u64) -> u64 {
        (self.forgotten + self.states.len() as u64) - self.acked.max(tag)
    }

    /// The tag of the latest delivery.
    pub(super) fn latest(&self) -> u64 {
        self.forgotten + self.states.len() as u64
    }

    /// Its ack is about to be written.
    pub(super) fn acks(&mut self, tag: u64, now: Instant) {
        if let Some(state) = self.at(tag)
            && let State::Settled { accepted } = *state
        {
            *state = State::Acked { accepted, at: now };
        }
    }

    /// The same as [`acks`](Self::acks), for the longest settled prefix. Returns its last tag if it
    /// has grown.
    pub(super) fn acks_prefix(&mut self, now: Instant) -> Option<u64> {
        let before = self.acked;
        while let Some(State::Settled { .. }) = self.at(self.acked + 1) {
            self.acks(self.acked + 1, now);
            self.acked += 1;
        }
        (self.acked > before).then_some(self.acked)
    }

    /// The tags of settled deliveries behind an unsettled one.
    pub(super) fn stragglers(&self) -> Vec<u64> {
        (self.forgotten + 1..)
            .zip(&self.states)
            .filter(|(_, (_, state))| matches!(state, State::Settled { .. }))
            .map(|(tag, _)| tag)
            .collect()
    }

    /// The fingerprints that are recognised, now that the channel is lost.
    fn left(&self, now: Instant) -> impl Iterator<Item = (Fingerprint, bool)> {
        self.states.iter().filter_map(move |(fingerprint, state)| {
            let fingerprint = (*fingerprint)?;
            match *state {
                State::Settled { accepted } => Some((fingerprint, accepted)),
                State::Acked { accepted: true, at }
                    if fingerprint.named && now.saturating_duration_since(at) < ARRIVES =>
                {
                    Some((fingerprint, true))
                }
                State::Taken { .. } | State::Acked { .. } => None,
            }
        })
    }
}

/// The settlements that the lost sessions of a subscriber have left. Equal messages are counted.
#[derive(Debug, Default)]
pub(super) struct LostAcks(Mutex<VecDeque<Left>>);

#[derive(Debug)]
struct Left {
    /// The number of settlements, by whether they were accepted.
    fingerprints: HashMap<(Fingerprint, bool), u32>,
    until: Instant,
}

impl LostAcks {
    /// A channel was lost.
    pub(super) fn add(&self, track: &Track, now: Instant) {
        let mut fingerprints = HashMap::new();
        for fingerprint in track.left(now) {
            *fingerprints.entry(fingerprint).or_default() += 1;
        }
        if !fingerprints.is_empty() {
            let mut all = self.lock();
            all.push_back(Left { fingerprints, until: now + OUTAGE });
            while all.len() > 2 * SESSIONS {
                all.pop_front(); // a session has two channels
            }
        }
    }

    /// The queue was reopened.
    pub(super) fn opened(&self, now: Instant) {
        self.lock().iter_mut().for_each(|left| left.until = left.until.min(now + LATE));
    }

    /// Whether a redelivered message was settled before, and if so, whether it was accepted. Each
    /// settlement serves once.
    pub(super) fn recognise(&self, fingerprint: Fingerprint, now: Instant) -> Option<bool> {
        let mut all = self.lock();
        all.retain(|left| left.until > now && !left.fingerprints.is_empty());
        all.iter_mut().find_map(|left| {
            [false, true].into_iter().find(|accepted| {
                let Some(count) = left.fingerprints.get_mut(&(fingerprint, *accepted)) else {
                    return false;
                };
                *count -= 1;
                if *count == 0 {
                    left.fingerprints.remove(&(fingerprint, *accepted));
                }
                true
            })
        })
    }

    pub(super) fn is_empty(&self, now: Instant) -> bool {
        self.lock().iter().all(|left| left.until <= now)
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<Left>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(id: Option<&str>, body: &[u8]) -> Fingerprint {
        Fingerprint::event(id, &Sha256::digest(body).into())
    }
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    const WINDOW: u16 = 6;
    const TAKEN: State = State::Taken { known: None };

    fn now() -> Instant {
        crate::clock::instant()
    }

    fn fingerprint(n: u8) -> Fingerprint {
        event(Some("an id").filter(|_| n >= 2), &[n])
    }

    proptest! {
        #[test]
        fn acks_cover_exactly_the_longest_settled_prefix(order in Just((1_u64..=40).collect::<Vec<_>>()).prop_shuffle()) {
            let mut track = Track::new(40);
            (1..=40).for_each(|tag| track.taken(tag, None, None));
            let mut done = BTreeSet::new();
            for tag in order {
                let before = track.acked;
                track.settled(tag, true);
                done.insert(tag);
                let expected = (1..).take_while(|t| done.contains(t)).last().unwrap_or(0);
                prop_assert_eq!(track.acks_prefix(now()), (expected > before).then_some(expected));
                let behind: Vec<u64> = done.iter().copied().filter(|t| *t > expected).collect();
                prop_assert_eq!(track.stragglers(), behind);
            }
        }

        /// A broker that loses any acks with any connection, another daemon on the same queue, dead
        /// letters and their replay.
        #[test]
        fn as_many_are_settled_as_leave_the_queue_whichever_acks_are_lost(steps in prop::collection::vec((0_u8..9, any::<u8>()), 0..300)) {
            let t = now();
            let remembered = LostAcks::default();
            // Fingerprints, and whether they are redelivered.
            let mut queue: VecDeque<(u8, bool)> = VecDeque::new();
            let (mut published, mut accepted, mut settled, mut gone, mut dead) = ([0; 4], [0; 4], [0; 4], [0; 4], [0; 4]);
            let mut track = Track::new(WINDOW);
            // By tag - 1: what the broker has received no ack of.
            let mut held: Vec<Option<u8>> = Vec::new();
            let mut open: Vec<u64> = Vec::new();
            let mut written: VecDeque<u64> = VecDeque::new();
            for (step, n) in steps {
                let arrives = |held: &mut [Option<u8>], gone: &mut [u32; 4], ack: u64| {
                    held.iter_mut().take(ack as usize).filter_map(Option::take).for_each(|m| gone[usize::from(m)] += 1);
                };
                match step {
                    0 | 1 => {
                        published[usize::from(n % 4)] += 1;
                        queue.push_back((n % 4, false));
                    }
                    2 | 3 if held.iter().flatten().count() < usize::from(WINDOW) => {
                        let Some((m, again)) = queue.pop_front() else { continue };
                        held.push(Some(m));
                        let tag = held.len() as u64;
                        let known = if again { remembered.recognise(fingerprint(m), t) } else { None };
                        track.taken(tag, Some(fingerprint(m)), known);
                        if known.is_some() {
                            track.settled(tag, true);
                            written.extend(track.acks_prefix(t));
                        } else {
                            open.push(tag);
                        }
                    }
                    4 if !open.is_empty() => {
                        let tag = open.remove(usize::from(n) % open.len());
                        let m = usize::from(held[tag as usize - 1].expect("held"));
                        let accepts = n < 128;
                        settled[m] += 1;
                        if accepts { accepted[m] += 1 } else { dead[m] += 1 }
                        track.settled(tag, accepts);
                        written.extend(track.acks_prefix(t));
                    }
                    5 => written.drain(..).for_each(|ack| arrives(&mut held, &mut gone, ack)),
                    6 => {
                        let Some((m, _)) = queue.pop_front() else { continue };
                        if n % 2 == 0 {
                            queue.push_front((m, true)); // taken and requeued
                        } else {
                            settled[usize::from(m)] += 1;
                            accepted[usize::from(m)] += 1;
                            gone[usize::from(m)] += 1;
                        }
                    }
                    7 => {
                        // Answers that arrive when the channel is gone.
                        for tag in open.drain(..).filter(|tag| (u64::from(n) >> (tag % 8)) & 1 == 1) {
                            let m = usize::from(held[tag as usize - 1].expect("held"));
                            settled[m] += 1;
                            accepted[m] += 1;
                            track.settled(tag, true);
                        }
                        let some = usize::from(n) % (written.len() + 1);
                        written.drain(..).take(some).for_each(|ack| arrives(&mut held, &mut gone, ack));
                        remembered.add(&track, t);
                        remembered.opened(t);
                        held.drain(..).rev().flatten().for_each(|m| queue.push_front((m, true)));
                        track = Track::new(WINDOW);
                    }
                    8 if dead[usize::from(n % 4)] > 0 => {
                        dead[usize::from(n % 4)] -= 1;
                        queue.push_back((n % 4, false));
                    }
                    _ => {}
                }
                for m in 0..4_u8 {
                    let at = usize::from(m);
                    let is_left = dead[at] > 0 || queue.iter().any(|(of, _)| *of == m) || held.iter().flatten().any(|of| *of == m);
                    prop_assert!(is_left || published[at] == 0 || accepted[at] > 0, "{m} is gone, and was not accepted");
                    if !fingerprint(m).named {
                        prop_assert!(settled[at] >= gone[at], "of {} {:?} settled, {:?} gone", m, settled, gone);
                    }
                }
                prop_assert!(track.states.len() <= 2 * usize::from(WINDOW), "{} are remembered", track.states.len());
            }
        }
    }

    impl LostAcks {
        fn has(&self, fingerprint: Fingerprint, now: Instant) -> bool {
            self.recognise(fingerprint, now).is_some()
        }
    }

    /// The settlements of a lost channel, all with the same fingerprint.
    fn lost(fingerprint: Fingerprint, states: &[State]) -> LostAcks {
        let mut track = Track::new(100);
        for (tag, state) in (1..).zip(states) {
            track.taken(tag, Some(fingerprint), None);
            match *state {
                State::Taken { .. } => {}
                State::Settled { accepted } => track.settled(tag, accepted),
                State::Acked { accepted, at } => {
                    track.settled(tag, accepted);
                    track.acks(tag, at);
                }
            }
        }
        let remembered = LostAcks::default();
        remembered.add(&track, now());
        remembered
    }

    #[test]
    fn what_was_settled_and_not_acked_is_known_as_often_as_that_and_no_longer_than_it_may_come() {
        let unnamed = event(None, b"{}");
        let (settled, t) = (State::Settled { accepted: true }, now());
        let all = lost(unnamed, &[settled, TAKEN, State::Settled { accepted: false }, TAKEN]);
        assert!(!all.has(event(Some("1"), b"{}"), t) && !all.has(event(None, b"[]"), t));
        assert!(all.has(unnamed, t) && all.has(unnamed, t) && !all.has(unnamed, t));
        assert!(lost(unnamed, &[settled]).has(unnamed, t + OUTAGE - LATE));
        assert!(!lost(unnamed, &[settled]).has(unnamed, t + 2 * OUTAGE));
        let all = lost(unnamed, &[settled, settled]);
        all.opened(t);
        assert!(
            all.has(unnamed, t + LATE / 2) && !all.has(unnamed, t + LATE) && all.is_empty(t + LATE)
        );
    }

    #[test]
    fn what_was_acked_a_moment_ago_is_known_by_its_id_alone_and_only_if_it_was_accepted() {
        let t = now();
        let acked = |accepted| State::Acked { accepted, at: t };
        let (named, unnamed) = (event(Some("1"), b"{}"), event(None, b"{}"));
        assert!(lost(named, &[acked(true)]).has(named, t));
        assert!(
            !lost(named, &[acked(true)]).has(event(Some("1"), b"[]"), t),
            "the id of another event"
        );
        assert!(
            !lost(unnamed, &[acked(true)]).has(unnamed, t),
            "a twin that was not attempted has the same fingerprint"
        );
        assert!(
            !lost(named, &[acked(false)]).has(named, t),
            "a replayed dead letter has the same fingerprint"
        );
        let long_ago = t.checked_sub(ARRIVES).expect("the machine runs for longer");
        assert!(
            !lost(named, &[State::Acked { accepted: true, at: long_ago }]).has(named, t),
            "its ack has arrived"
        );
        let batch = Fingerprint::envelope("msg_1", 1);
        assert!(
            lost(batch, &[acked(true)]).has(batch, t)
                && !lost(batch, &[acked(true)]).has(Fingerprint::envelope("msg_1", 2), t)
        );
    }

    #[test]
    fn what_was_recognised_is_accepted_only_if_it_was_so_before() {
        let (t, named) = (now(), event(Some("1"), b"{}"));
        for accepted in [true, false] {
            let first = lost(named, &[State::Settled { accepted }]);
            assert_eq!(first.recognise(named, t), Some(accepted));
            let mut track = Track::new(1);
            track.taken(1, Some(named), Some(accepted));
            track.settled(1, true);
            track.acks(1, t);
            let second = LostAcks::default();
            second.add(&track, t);
            // If not: what was written to another queue for it may have come back from there, with
            // the same fingerprint.
            assert_eq!(second.recognise(named, t), Some(true).filter(|_| accepted));
        }
    }

    #[test]
    fn an_empty_id_is_none() {
        assert_eq!(event(Some(""), b"{}"), event(None, b"{}"));
    }

    #[test]
    fn of_many_lost_sessions_the_last_are_remembered() {
        let remembered = LostAcks::default();
        for n in 0..100 {
            let mut track = Track::new(1);
            track.taken(1, Some(fingerprint(n)), None);
            track.settled(1, true);
            remembered.add(&track, now());
        }
        assert_eq!(
            (0..100).filter(|n| remembered.has(fingerprint(*n), now())).collect::<Vec<_>>(),
            (94..100).collect::<Vec<_>>()
        );
    }
}

//! The end of the log. One reader passes it on to all lanes: an event is read once and compared with
//! the patterns once, and wakes the lanes that want it, and no other.
//!
//! The last events are in the ring, where each lane takes its own. Nothing is kept for a lane but
//! the number of the first event that it has not taken: a lane that is full or slow holds up
//! nothing. For lanes that are behind the ring and have room, parts of the log are read again: each
//! part once for all that wait for it.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
};

use tokio::sync::Notify;

use super::{
    consumer::{Position, Shared, Stored},
    passes::{Pass, Passes},
    reader::Read,
    ring::{Passed, Ring},
    segments::Segments,
};
use crate::{clock, delivery::SubscriberName};

/// Bytes of events in the ring, whatever the lanes do.
const MEMORY: usize = 16 << 20;

/// Bytes of events that stay in the ring although all lanes have taken what they want of them.
const KEPT: usize = 4 << 20;

/// The end of the log, for all lanes of a process.
#[derive(Debug, Default)]
pub(super) struct Head {
    state: Mutex<State>,
    /// A lane waits for a part of the log.
    behind: Notify,
    /// The last lane has taken what was offered.
    taken: Notify,
}

#[derive(Debug)]
struct State {
    /// A reader adds to the ring. Without one, lanes read the log by themselves.
    is_read: bool,
    segments: Arc<Segments>,
    /// The most bytes of events in the ring.
    memory: usize,
    /// All events that a subscriber gets, up to `upto`.
    ring: Ring,
    /// The bytes above which the ring is next searched for events that no lane needs.
    search_above: usize,
    upto: i64,
    /// By the subscribers' indexes in `segments`.
    wants: Vec<Wants>,
    /// The open sessions.
    lanes: HashMap<SubscriberName, Weak<Shared>>,
    /// A part of the log that is offered to lanes behind the ring.
    offer: Option<Offer>,
    /// Counts the sessions that have come into `wants`.
    joined: u64,
    /// Counts the parts of the log that were read for lanes behind the ring, and the events in them.
    passes: u64,
    passed: u64,
}

/// What a subscriber has still to take of the ring.
#[derive(Debug, Clone, Default)]
struct Wants {
    place: Place,
    /// The number of the last event that is for it.
    last: i64,
    behind: Behind,
    lane: Option<Weak<Shared>>,
}

/// What a lane that is behind the ring waits for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Behind {
    /// It has not asked.
    #[default]
    No,
    /// What comes after this number.
    Waits(i64),
    /// The same, and that is being read.
    Read(i64),
    /// That is offered to it.
    Offered,
}

/// A part of the log, from after one number up to another.
#[derive(Debug)]
struct Offer {
    events: Vec<Passed>,
    upto: i64,
    /// The lanes that have not looked at it.
    left: usize,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Place {
    /// Where its session has read to.
    #[default]
    OfSession,
    /// It has taken all that is for it.
    End,
    /// It has taken all that is for it before this number.
    Before(i64),
}

/// What a lane does with an event that is for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Offered {
    Taken,
    /// It was settled in an earlier session.
    Known,
    /// There is no room for it.
    Refused,
}

/// What a lane has got of the ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pulled {
    /// All that is for it, or as much as it had room for.
    Taken,
    /// Nothing yet: it is behind the ring, and is woken when that was read.
    Behind,
    /// Nothing: no one reads the log for it.
    Alone,
    /// Nothing: it is behind the ring, and finds by itself what its tenant has there.
    Tenant,
    /// Nothing: it may have new retries, which come before events.
    Retries,
}

impl Head {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[cfg(test)]
    pub(super) fn holds_at_most(&self, bytes: usize) {
        self.state().memory = bytes;
    }

    #[cfg(test)]
    pub(super) fn passes(&self) -> u64 {
        self.state().passes
    }

    #[cfg(test)]
    pub(super) fn begins_after(&self) -> i64 {
        self.state().ring.after()
    }

    /// Adds a session, in the place of the last one of its subscriber.
    pub(super) fn join(&self, lane: &Arc<Shared>) {
        let mut state = self.state();
        let lane_ref = Arc::downgrade(lane);
        if let Some(owner) = state.segments.index(&lane.subscriber) {
            self.give_up(&mut state, owner);
            if let Some(wants) = state.wants.get_mut(owner as usize) {
                wants.place = Place::OfSession;
                wants.lane = Some(lane_ref.clone());
                state.joined += 1;
            }
        }
        state.lanes.insert(lane.subscriber.clone(), lane_ref);
    }

    /// Takes a session out, unless another one is in its place.
    pub(super) fn leave(&self, lane: &Arc<Shared>) {
        let mut state = self.state();
        let is_this = |other: &Weak<Shared>| std::ptr::eq(other.as_ptr(), Arc::as_ptr(lane));
        if state.lanes.get(&lane.subscriber).is_some_and(is_this) {
            state.lanes.remove(&lane.subscriber);
            if let Some(owner) = state.segments.index(&lane.subscriber) {
                self.give_up(&mut state, owner);
                if let Some(wants) = state.wants.get_mut(owner as usize) {
                    wants.lane = None;
                    wants.place = Place::OfSession;
                }
            }
        }
    }

    /// What a lane has not taken of an offer is not for it any more.
    fn give_up(&self, state: &mut State, owner: u32) {
        let Some(wants) = state.wants.get_mut(owner as usize) else { return };
        if std::mem::take(&mut wants.behind) == Behind::Offered
            && let Some(offer) = &mut state.offer
        {
            offer.left = offer.left.saturating_sub(1);
            if offer.left == 0 {
                self.taken.notify_one();
            }
        }
    }

    /// Hands a lane the events that are for it, until `take` refuses one; none if its retries
    /// have changed since it knew them as of the count `seen`. `has_room` is asked before something
    /// is read for it.
    pub(super) fn pull(
        &self,
        lane: &Shared,
        seen: Option<u64>,
        has_room: impl FnOnce() -> bool,
        mut take: impl FnMut(&mut Position<'_>, &Stored) -> Offered,
    ) -> Pulled {
        let mut state = self.state();
        let state = &mut *state;
        // Under the lock under which events come in, after the retries that were stored before them.
        if seen.is_some_and(|seen| seen != lane.count_of_retries()) {
            return Pulled::Retries;
        }
        let owner = state.segments.index(&lane.subscriber).filter(|_| state.is_read);
        let Some(owner) = owner else { return Pulled::Alone };
        // Another session may be in its place: what that has still to take is not its affair.
        let is_this = |wants: &&mut Wants| {
            wants.lane.as_ref().is_some_and(|other| std::ptr::eq(other.as_ptr(), lane))
        };
        let wants = state.wants.get_mut(owner as usize).filter(is_this);
        let Some(wants) = wants else { return Pulled::Alone };
        // Under the same lock, or a place that is the end would be taken for settled.
        let mut position = lane.position();
        let at = match wants.place {
            Place::OfSession => position.scanned(),
            Place::End => position.scanned().max(state.upto),
            Place::Before(seq) => position.scanned().max(seq - 1),
        };
        position.scan_to(at);
        let is_offered = wants.behind == Behind::Offered;
        let mut took = false;
        let mut of_it = |position: &mut Position<'_>, passed: &Passed| {
            passed.owners.binary_search(&owner).ok()?;
            let offered = take(position, &passed.event);
            took |= offered == Offered::Taken;
            (offered == Offered::Refused).then_some(passed.event.seq)
        };
        let mut at = at;
        if is_offered && let Some(offer) = &state.offer {
            let events = offer.events.iter().filter(|passed| passed.event.seq > at);
            let refused = events.into_iter().find_map(|passed| of_it(&mut position, passed));
            at = refused.map_or(offer.upto, |seq| seq - 1).max(at);
            position.scan_to(at);
            wants.place = Place::OfSession;
            self.give_up(state, owner);
            if refused.is_some() {
                return Pulled::Taken;
            }
        }
        let wants = &mut state.wants[owner as usize];
        if at < state.ring.after() {
            if took || !has_room() {
                return Pulled::Taken;
            }
            // An index leads to its events: it need not wait for all that are between them.
            if lane.tenant.is_some() {
                return Pulled::Tenant;
            }
            if !matches!(wants.behind, Behind::Waits(_) | Behind::Read(_)) {
                wants.behind = Behind::Waits(at);
                self.behind.notify_one();
            }
            return Pulled::Behind;
        }
        wants.behind = Behind::No;
        if wants.last > at {
            let refused = state.ring.behind(at).find_map(|passed| of_it(&mut position, passed));
            if let Some(seq) = refused {
                position.scan_to(seq - 1);
                wants.place = Place::Before(seq);
                return Pulled::Taken;
            }
        }
        position.scan_to(state.upto);
        wants.place = Place::End;
        Pulled::Taken
    }

    /// Wakes a lane whose retries may have changed.
    pub(super) fn retries_changed(&self, subscriber: &str) {
        let lane = self.state().lanes.get(subscriber).and_then(Weak::upgrade);
        if let Some(lane) = lane {
            lane.look_at_retries();
        }
    }

    /// Wakes the lanes that wait for the time of a retry.
    pub(super) fn look_at_retries(&self) {
        let lanes: Vec<_> = self.state().lanes.values().filter_map(Weak::upgrade).collect();
        lanes
            .iter()
            .filter(|lane| lane.waits_for_a_retry())
            .for_each(|lane| lane.look_at_retries());
    }

    /// Begins with an empty ring after this number.
    pub(super) fn start(&self, after: i64) {
        let mut state = self.state();
        state.clear(after);
        state.is_read = true;
        // What they know of their retries may be older than what is known here.
        state.lanes.values().filter_map(Weak::upgrade).for_each(|lane| lane.look_at_retries());
    }

    /// From now on the lanes read the log by themselves.
    pub(super) fn stop(&self) {
        let mut state = self.state();
        let upto = state.upto;
        for wants in &mut state.wants {
            let lane = wants.lane.as_ref().and_then(Weak::upgrade);
            if let (Some(lane), Place::End) = (lane, wants.place) {
                lane.position().scan_to(upto);
            }
            (wants.place, wants.behind) = (Place::OfSession, Behind::No);
        }
        state.offer = None;
        state.clear(upto);
        state.is_read = false;
        state.wake_all();
    }

    pub(super) fn push(&self, read: Read) {
        let mut state = self.state();
        if !Arc::ptr_eq(&state.segments, &read.segments) {
            state.change(read.segments);
        }
        // Before the events: a lane takes none before it has looked.
        for name in read.retried {
            if let Some(lane) = state.lanes.get(&name).and_then(Weak::upgrade) {
                lane.look_at_retries();
            }
        }
        for passed in read.events {
            state.add(passed);
        }
        state.upto = state.upto.max(read.upto);
        state.forget();
    }

    /// The lanes that are behind the ring; the parts of the log that were read for such lanes, and the
    /// events in them.
    pub(super) fn behind(&self) -> (usize, u64, u64) {
        let state = self.state();
        let behind = state.wants.iter().filter(|wants| wants.behind != Behind::No).count();
        (behind, state.passes, state.passed)
    }

    /// Until a lane waits for a part of the log.
    pub(super) async fn someone_is_behind(&self) {
        self.behind.notified().await;
    }

    /// What to read next for the lanes that are behind the ring.
    pub(super) fn next_pass(&self, passes: &mut Passes) -> Option<Pass> {
        let mut state = self.state();
        let state = &mut *state;
        let place = |wants: &Wants| match wants.behind {
            Behind::Waits(at) => Some(at),
            _ => None,
        };
        let places = state.wants.iter().filter_map(place).collect();
        let after = passes.choose(places, clock::instant())?;
        state.passes += 1;
        let mut lanes = vec![false; state.wants.len()];
        for (wants, is_read_for) in state.wants.iter_mut().zip(&mut lanes) {
            if let Some(at) = place(wants).filter(|at| *at >= after) {
                wants.behind = Behind::Read(at);
                *is_read_for = true;
            }
        }
        Some(Pass { after, segments: state.segments.clone(), lanes })
    }

    /// Offers a part of the log to the lanes that it was read for. Those for whom nothing is in it
    /// are past it.
    pub(super) fn offer(&self, mut read: Read) {
        let mut state = self.state();
        let state = &mut *state;
        state.passed += read.events.len() as u64;
        // The other reader alone goes on to other segments.
        if !Arc::ptr_eq(&state.segments, &read.segments) {
            let indexes: Vec<_> =
                read.segments.names().iter().map(|name| state.segments.index(name)).collect();
            read.events.iter_mut().for_each(|passed| passed.renumber(&indexes));
        }
        let mut has = vec![false; state.wants.len()];
        for Passed { owners, event } in &read.events {
            for owner in owners.iter().map(|owner| *owner as usize) {
                let wants = state.wants.get(owner);
                let is_for_it =
                    wants.is_some_and(|w| matches!(w.behind, Behind::Read(at) if at < event.seq));
                if is_for_it {
                    has[owner] = true;
                }
            }
        }
        let mut left = 0;
        for (wants, has) in state.wants.iter_mut().zip(has) {
            let Behind::Read(at) = wants.behind else { continue };
            let lane = wants.lane.as_ref().and_then(Weak::upgrade);
            let Some(lane) = lane.filter(|_| at < read.upto || at >= state.ring.after()) else {
                wants.behind = Behind::Waits(at);
                continue;
            };
            if has {
                wants.behind = Behind::Offered;
                left += 1;
                lane.wake();
                continue;
            }
            let at = at.max(read.upto);
            lane.position().scan_to(at);
            wants.place = Place::OfSession;
            if at < state.ring.after() {
                wants.behind = Behind::Waits(at);
            } else {
                wants.behind = Behind::No;
                lane.wake();
            }
        }
        if left > 0 {
            state.offer = Some(Offer { events: read.events, upto: read.upto, left });
        }
    }

    /// Until all lanes have taken what was offered to them.
    pub(super) async fn offer_is_taken(&self) {
        while self.state().offer.as_ref().is_some_and(|offer| offer.left > 0) {
            self.taken.notified().await;
        }
    }

    /// Ends an offer. Who has not taken it asks again.
    pub(super) fn withdraw(&self) {
        self.state().withdraw();
    }

    /// Another number after each event and each session.
    pub(super) fn progress(&self) -> (i64, u64) {
        let state = self.state();
        (state.upto, state.joined)
    }

    /// The lanes that have nothing unsettled, and are further than their stored cursor; and whether
    /// the others are no further than theirs.
    pub(super) fn idle(&self) -> (Vec<Arc<Shared>>, bool) {
        let state = self.state();
        let (mut idle, mut all) = (Vec::new(), true);
        for wants in &state.wants {
            let Some(lane) = wants.lane.as_ref().and_then(Weak::upgrade) else { continue };
            let mut position = lane.position();
            let upto = match wants.place {
                Place::End => state.upto,
                Place::OfSession | Place::Before(_) => {
                    all = false;
                    position.scanned()
                }
            };
            match position.idle_at(upto) {
                Some(true) => {
                    drop(position);
                    idle.push(lane);
                }
                Some(false) => {}
                None => all = false,
            }
        }
        (idle, all)
    }
}

impl Default for State {
    fn default() -> Self {
        Self {
            is_read: false,
            segments: Arc::default(),
            memory: MEMORY,
            ring: Ring::default(),
            search_above: KEPT,
            upto: 0,
            wants: Vec::new(),
            lanes: HashMap::new(),
            offer: None,
            joined: 0,
            passes: 0,
            passed: 0,
        }
    }
}

impl State {
    #[cfg(test)]
    fn wants_of(&mut self, subscriber: &str) -> Option<&mut Wants> {
        let index = self.segments.index(subscriber)?;
        self.wants.get_mut(index as usize)
    }

    fn clear(&mut self, after: i64) {
        self.ring.clear(after);
        (self.search_above, self.upto) = (KEPT, after);
    }

    fn wake_all(&self) {
        self.lanes.values().filter_map(Weak::upgrade).for_each(|lane| lane.wake());
    }

    fn withdraw(&mut self) {
        if self.offer.take().is_none() {
            return;
        }
        for wants in self.wants.iter_mut().filter(|wants| wants.behind == Behind::Offered) {
            wants.behind = Behind::No;
            wants.lane.iter().filter_map(Weak::upgrade).for_each(|lane| lane.wake());
        }
    }

    /// Goes on with other segments. Those who get what is in the ring are the same: a change counts
    /// for later events.
    fn change(&mut self, segments: Arc<Segments>) {
        self.withdraw();
        let old = std::mem::replace(&mut self.segments, segments);
        let mut wants = Vec::with_capacity(self.segments.names().len());
        for name in self.segments.names() {
            let known = old.index(name).and_then(|index| self.wants.get(index as usize)).cloned();
            wants.push(known.unwrap_or_else(|| {
                let lane = self.lanes.get(name).cloned();
                // It has waited for this.
                lane.iter().filter_map(Weak::upgrade).for_each(|lane| lane.wake());
                self.joined += 1;
                Wants { lane, ..Wants::default() }
            }));
        }
        self.wants = wants;
        let indexes: Vec<_> = old.names().iter().map(|name| self.segments.index(name)).collect();
        self.ring.renumber(&indexes);
    }

    fn add(&mut self, passed: Passed) {
        let seq = passed.event.seq;
        for owner in &*passed.owners {
            let Some(wants) = self.wants.get_mut(*owner as usize) else { continue };
            wants.last = seq;
            if wants.place == Place::End {
                wants.place = Place::Before(seq);
                wants.lane.iter().filter_map(Weak::upgrade).for_each(|lane| lane.wake());
            }
        }
        self.upto = seq;
        self.ring.push(passed);
        self.ring.fit(self.memory);
    }

    /// Drops the oldest events that no lane has still to take, if the ring has many.
    fn forget(&mut self) {
        if self.ring.bytes() <= self.search_above {
            return;
        }
        let mut needed = i64::MAX;
        for wants in &self.wants {
            let Some(lane) = wants.lane.as_ref().and_then(Weak::upgrade) else { continue };
            needed = needed.min(match wants.place {
                Place::End => continue,
                Place::Before(seq) => seq,
                Place::OfSession => lane.position().scanned() + 1,
            });
        }
        while self.ring.bytes() > KEPT && self.ring.first().is_some_and(|seq| seq < needed) {
            self.ring.drop_oldest();
        }
        // A search asks each lane, so it is not for each event.
        self.search_above = self.ring.bytes().max(KEPT) + KEPT / 4;
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::{collections::BTreeMap, time::Duration};

    use rusqlite::Connection;
    use tokio::sync::watch;

    use super::*;
    use crate::{
        config::Subscribers,
        delivery::{DeadLetter, Failure, Reason},
        queue::{
            DeadLetters as _, Queue as _, Receipt, Settlement, Settler as _, Source as _, Taken,
            Window,
            embedded::{
                Addressed, EmbeddedQueue, Settler, Source, backlogs,
                consumer::set_cursor,
                ring::EVENT_COST,
                tests::{WINDOW, batch, config, publish, subscribers, until},
            },
        },
    };

    /// A queue with its background tasks, until they are dropped.
    pub(in crate::queue::embedded) fn running(
        dir: &tempfile::TempDir,
        subscribers: &Subscribers,
    ) -> (EmbeddedQueue, watch::Sender<bool>) {
        let queue =
            EmbeddedQueue::for_daemon(&config(dir, Duration::from_secs(3600))).expect("opens");
        let (stop, stopping) = watch::channel(false);
        let (tasks, configured) = (queue.clone(), watch::channel(subscribers.clone()).1);
        tokio::spawn(async move { tasks.background(configured, stopping).await });
        (queue, stop)
    }

    /// Takes within a minute, and returns the numbers of the events.
    pub(in crate::queue::embedded) async fn take(source: &mut Source) -> Vec<Receipt> {
        let mut taken = Vec::new();
        tokio::time::timeout(Duration::from_secs(60), source.take(&mut taken, 100))
            .await
            .expect("something comes")
            .expect("takes");
        let receipt = |t: &Taken| if let Taken::Event(e) = t { e.receipt } else { panic!("{t:?}") };
        taken.iter().map(receipt).collect()
    }

    pub(in crate::queue::embedded) async fn settle(settler: &Settler, receipts: Vec<Receipt>) {
        settler.settle(receipts, Settlement::Delivered).await.expect("settles");
    }

    fn place(queue: &EmbeddedQueue, subscriber: &str) -> Option<Place> {
        let mut state = queue.0.head.state();
        state.wants_of(subscriber).map(|wants| wants.place)
    }

    /// Takes from a source in vain, so that its lane is where the log ends.
    pub(in crate::queue::embedded) async fn wait_at_the_end(
        queue: &EmbeddedQueue,
        subscriber: &str,
        source: &mut Source,
    ) {
        let mut none = Vec::new();
        tokio::select! {
            taken = source.take(&mut none, 100) => panic!("{taken:?}: {none:?}"),
            () = until("it is at the end", async || place(queue, subscriber) == Some(Place::End)) => {}
        }
    }

    /// An event of no tenant, for all.
    fn of_type(event_type: &str) -> Addressed<'_> {
        Addressed { event_type, only_for: None, tenant: None }
    }

    #[tokio::test]
    async fn an_event_is_handed_to_those_who_want_it_and_the_others_stay_at_the_end() {
        let dir = tempfile::tempdir().expect("a directory");
        let both = subscribers(&[("a", "x"), ("b", "y")]);
        let (queue, _stop) = running(&dir, &both);
        queue.prepare(&both).await.expect("prepares");
        let (mut a, a_settles) = queue.open(&both[0], WINDOW).await.expect("opens");
        let (mut b, _) = queue.open(&both[1], WINDOW).await.expect("opens");
        wait_at_the_end(&queue, "a", &mut a).await;
        wait_at_the_end(&queue, "b", &mut b).await;
        publish(&queue, "x", 3).await;
        until("a has something", async || place(&queue, "a") == Some(Place::Before(1))).await;
        assert_eq!(place(&queue, "b"), Some(Place::End));
        settle(&a_settles, take(&mut a).await).await;
        assert_eq!(place(&queue, "a"), Some(Place::End));
        // What is for another is not kept for its sake.
        let kept = "SELECT count(*) FROM segment WHERE after = 3";
        until("b's cursor is stored too", async || {
            let count = queue.store().read(|db| db.query_row(kept, [], |r| r.get::<_, u32>(0)));
            count.await.expect("counts") == 2
        })
        .await;
    }

    #[tokio::test]
    async fn a_lane_that_is_full_falls_behind_the_ring_and_gets_each_event_once_in_order() {
        let dir = tempfile::tempdir().expect("a directory");
        let all = subscribers(&[("all", "#"), ("some", "x.#"), ("few", "y")]);
        let (queue, _stop) = running(&dir, &all);
        queue.0.head.holds_at_most(20 * EVENT_COST);
        queue.prepare(&all).await.expect("prepares");
        let window = Window { events: 7, envelopes: 1 };
        let mut lanes = Vec::new();
        for subscriber in &*all {
            lanes.push(queue.open(subscriber, window).await.expect("opens"));
        }
        let producer = async {
            for n in 0..60 {
                for event_type in ["x.a", "x.b", "z"] {
                    publish(&queue, event_type, 5).await;
                }
                if n == 30 {
                    // From now on it wants other ones.
                    let changed = subscribers(&[("all", "#"), ("some", "z"), ("few", "y")]);
                    queue.prepare(&changed).await.expect("prepares");
                }
            }
            publish(&queue, "y", 1).await;
        };
        let consumer = async |mut lane: (Source, Settler), expected: usize| {
            let mut seen = Vec::new();
            let mut unsettled = Vec::new();
            while seen.len() < expected {
                let receipts = take(&mut lane.0).await;
                seen.extend(receipts.iter().map(|receipt| receipt.tag));
                unsettled.extend(receipts);
                // Of a full window, the newest first.
                if unsettled.len() >= 7 || seen.len() >= expected {
                    settle(&lane.1, unsettled.split_off(unsettled.len() / 2)).await;
                    settle(&lane.1, std::mem::take(&mut unsettled)).await;
                }
            }
            (lane, seen)
        };
        let some = 31 * 10 + 29 * 5;
        let (few, middle, most) = (lanes.pop(), lanes.pop(), lanes.pop());
        let (few, middle, most) = (few.expect("few"), middle.expect("some"), most.expect("all"));
        let ((), (most, all_seen), (_middle, some_seen), (_few, few_seen)) =
            tokio::join!(producer, consumer(most, 901), consumer(middle, some), consumer(few, 1));
        assert_eq!(all_seen, (1..=901).collect::<Vec<u64>>());
        assert_eq!(few_seen, [901]);
        let of_some = |seq: &u64| match (seq - 1) / 15 {
            0..=30 => (seq - 1) % 15 < 10,
            _ => (seq - 1) % 15 >= 10 && *seq < 901,
        };
        assert_eq!(some_seen, (1..=901).filter(of_some).collect::<Vec<u64>>());
        queue.0.keeper.store_all().await.expect("writes");
        let left = queue.store().read(|db| backlogs(db, &BTreeMap::new())).await.expect("counts");
        assert_eq!(left, [("all".into(), 0), ("few".into(), 0), ("some".into(), 0)]);
        drop(most);
        let state = queue.0.head.state();
        assert!(state.ring.bytes() <= state.memory, "{} bytes", state.ring.bytes());
        assert_eq!(state.lanes.len(), 2, "who has left is not kept");
    }

    #[tokio::test]
    async fn what_a_session_has_not_settled_is_taken_by_the_next_and_nothing_twice() {
        let dir = tempfile::tempdir().expect("a directory");
        let a = subscribers(&[("a", "x")]);
        let (queue, _stop) = running(&dir, &a);
        queue.prepare(&a).await.expect("prepares");
        publish(&queue, "x", 9).await;
        let mut left: Vec<u64> = (1..=9).collect();
        for round in 0..4 {
            let (mut source, settler) = queue.open(&a[0], WINDOW).await.expect("opens");
            let receipts = take(&mut source).await;
            assert_eq!(
                receipts.iter().map(|r| r.tag).collect::<Vec<_>>(),
                left,
                "in round {round}"
            );
            wait_at_the_end(&queue, "a", &mut source).await;
            // The last and the middle one, never the first.
            for at in [left.len() - 1, left.len() / 2] {
                left.remove(at);
                settle(&settler, vec![receipts[at]]).await;
            }
        }
    }

    #[tokio::test]
    async fn lanes_go_on_alone_when_no_one_reads_for_them() {
        let dir = tempfile::tempdir().expect("a directory");
        let a = subscribers(&[("a", "x")]);
        let (queue, stop) = running(&dir, &a);
        queue.prepare(&a).await.expect("prepares");
        let (mut source, settler) = queue.open(&a[0], WINDOW).await.expect("opens");
        publish(&queue, "x", 2).await;
        settle(&settler, take(&mut source).await).await;
        wait_at_the_end(&queue, "a", &mut source).await;
        let mut taken = Vec::new();
        let more = async {
            stop.send_replace(true);
            until("no one reads", async || !queue.0.head.state().is_read).await;
            publish(&queue, "x", 1).await;
        };
        let (found, ()) = tokio::join!(source.take(&mut taken, 100), more);
        found.expect("takes");
        assert!(matches!(&taken[..], [Taken::Event(e)] if e.receipt.tag == 3), "{taken:?}");
    }

    #[tokio::test]
    async fn a_retry_that_another_process_makes_due_is_taken_soon() {
        let dir = tempfile::tempdir().expect("a directory");
        let a = subscribers(&[("a", "x")]);
        let (queue, _stop) = running(&dir, &a);
        queue.prepare(&a).await.expect("prepares");
        let (mut source, settler) = queue.open(&a[0], WINDOW).await.expect("opens");
        publish(&queue, "x", 1).await;
        let receipts = take(&mut source).await;
        let batch = batch("msg_1");
        let delay = Duration::from_secs(3600);
        settler
            .settle(receipts, Settlement::Retry { batches: vec![batch.clone()], delay })
            .await
            .expect("settles");
        wait_at_the_end(&queue, "a", &mut source).await;
        let other = EmbeddedQueue::for_publishing(&config(&dir, Duration::ZERO)).expect("opens");
        let mut taken = Vec::new();
        let (found, hastened) = tokio::join!(
            tokio::time::timeout(Duration::from_secs(4), source.take(&mut taken, 100)),
            other.hasten("a", None)
        );
        assert_eq!(hastened.expect("hastens").moved, 1);
        found.expect("before the lane would have looked by itself").expect("takes");
        assert!(matches!(&taken[..], [Taken::Batch(found, _)] if *found == batch), "{taken:?}");
    }

    #[tokio::test]
    async fn a_batch_that_is_enqueued_or_replayed_is_taken_before_events_that_wait() {
        let dir = tempfile::tempdir().expect("a directory");
        let a = subscribers(&[("a", "x")]);
        let (queue, _stop) = running(&dir, &a);
        queue.prepare(&a).await.expect("prepares");
        let (mut source, settler) = queue.open(&a[0], WINDOW).await.expect("opens");
        for (next, replays) in (1..).zip([false, true, false]) {
            let batch = batch("msg_1");
            let mut letters = None;
            if replays {
                let failure = Failure::Timeout;
                let letter = DeadLetter::of_batch(
                    batch.clone(),
                    Reason::Exhausted,
                    &failure,
                    None,
                    clock::now(),
                );
                let dead = Settlement::Dead(vec![letter]);
                settler.settle(Vec::new(), dead).await.expect("settles");
                let mut walk = queue.dead_letters("a").await.expect("opens");
                let held = walk.next().await.expect("reads").expect("one");
                letters = Some((walk, held));
            }
            wait_at_the_end(&queue, "a", &mut source).await;
            publish(&queue, "x", 1).await;
            let waits = Some(Place::Before(next));
            until("the event waits", async || place(&queue, "a") == waits).await;
            match letters {
                Some((mut walk, held)) => drop(walk.replay(vec![held]).await.expect("replays")),
                None => queue.enqueue(&a[0].name, vec![batch]).await.expect("enqueues"),
            }
            let mut taken = Vec::new();
            while taken.len() < 2 {
                source.take(&mut taken, 10).await.expect("takes");
            }
            let [Taken::Batch(_, first), Taken::Event(second)] = &taken[..] else {
                panic!("replays: {replays}: {taken:?}")
            };
            let receipts = vec![*first, second.receipt];
            settle(&settler, receipts).await;
        }
    }

    #[tokio::test]
    async fn no_event_is_taken_while_there_may_be_retries_that_were_not_looked_at() {
        let dir = tempfile::tempdir().expect("a directory");
        let a = subscribers(&[("a", "x")]);
        let (queue, _stop) = running(&dir, &a);
        queue.prepare(&a).await.expect("prepares");
        let (mut source, _settler) = queue.open(&a[0], WINDOW).await.expect("opens");
        wait_at_the_end(&queue, "a", &mut source).await;
        // A retry and an event come with one reading, between its look at retries and at events.
        let segments = queue.0.head.state().segments.clone();
        let owners = segments.owners(1, &of_type("x"));
        let events = vec![Passed { owners, event: Stored::numbered(1) }];
        let (retried, upto) = (vec!["a".into()], 1);
        queue.0.head.push(Read { segments, events, upto, more: false, retried, last_retry: 0 });
        let mut taken = Vec::new();
        assert_eq!(source.pull(10, &mut taken), Pulled::Retries);
        assert!(taken.is_empty(), "{taken:?}");
    }

    #[tokio::test]
    async fn the_cursor_of_a_lane_that_comes_later_is_stored_without_another_event() {
        let dir = tempfile::tempdir().expect("a directory");
        let both = subscribers(&[("a", "x"), ("b", "y")]);
        let queue =
            EmbeddedQueue::for_daemon(&config(&dir, Duration::from_secs(3600))).expect("opens");
        // All but what stores cursors periodically.
        let reader = queue.clone();
        tokio::spawn(async move { tokio::join!(reader.poll_commits(), reader.read_for_all()) });
        queue.prepare(&both).await.expect("prepares");
        publish(&queue, "x", 3).await;
        until("all is read", async || queue.0.head.progress().0 == 3).await;
        let (mut a, settler) = queue.open(&both[0], WINDOW).await.expect("opens");
        settle(&settler, take(&mut a).await).await;
        wait_at_the_end(&queue, "a", &mut a).await;
        let kept = queue.add_idle(None);
        assert_eq!(kept.map(|(upto, _)| upto), Some(3), "all that are there are stored");
        assert_eq!(queue.add_idle(kept), kept);
        let (mut b, _settler) = queue.open(&both[1], WINDOW).await.expect("opens");
        assert_eq!(queue.add_idle(kept), None, "it has not looked yet");
        wait_at_the_end(&queue, "b", &mut b).await;
        assert!(queue.add_idle(None).is_some());
        queue.0.keeper.store_all().await.expect("writes");
        let cursor = "SELECT after FROM segment WHERE subscriber = 'b'";
        let read = queue.store().read(|db| db.query_row(cursor, [], |r| r.get::<_, i64>(0)));
        assert_eq!(read.await.expect("reads"), 3);
    }

    #[tokio::test]
    async fn a_reader_that_fails_says_so_and_begins_earlier_and_each_event_is_taken_once() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let writer = Mutex::new(file.reopen().expect("opens"));
        let _logging = tracing::subscriber::set_default(
            tracing_subscriber::fmt().with_ansi(false).with_writer(writer).finish(),
        );
        let logged = |what: &str| {
            std::fs::read_to_string(file.path()).expect("the log").matches(what).count()
        };
        let fails = "cannot be read for all subscribers at once";
        let again = "read for all subscribers at once again";
        let dir = tempfile::tempdir().expect("a directory");
        // `b` has no session: for its sake the reader begins before what `a` has settled.
        let both = subscribers(&[("a", "x"), ("b", "x")]);
        let (queue, _stop) = running(&dir, &both);
        queue.prepare(&both).await.expect("prepares");
        let (mut source, settler) = queue.open(&both[0], WINDOW).await.expect("opens");
        publish(&queue, "x", 2).await;
        settle(&settler, take(&mut source).await).await;
        wait_at_the_end(&queue, "a", &mut source).await;
        let write = async |sql: &'static str| {
            queue.store().write(move |db| db.execute_batch(sql)).await.expect("writes");
        };
        write("ALTER TABLE log_state RENAME TO hidden").await;
        until("it says so", async || logged(fails) == 1).await;
        assert!(!queue.0.head.state().is_read);
        write("INSERT INTO event (type, at, body) VALUES ('x', 0, x'7b7d')").await;
        let receipts = take(&mut source).await;
        assert_eq!(receipts.iter().map(|r| r.tag).collect::<Vec<_>>(), [3], "by itself");
        settle(&settler, receipts).await;
        write("ALTER TABLE hidden RENAME TO log_state").await;
        until("it reads again", async || logged(again) == 1).await;
        let after = queue.0.head.state().ring.after();
        assert_eq!(after, 0, "of `b`");
        wait_at_the_end(&queue, "a", &mut source).await;
        publish(&queue, "x", 1).await;
        let receipts = take(&mut source).await;
        assert_eq!(receipts.iter().map(|r| r.tag).collect::<Vec<_>>(), [4]);
        assert_eq!(logged(fails), 1);
    }

    #[tokio::test]
    async fn what_lanes_are_behind_with_is_read_once_for_all_of_them() {
        let dir = tempfile::tempdir().expect("a directory");
        let names: Vec<String> = (0..20).map(|n| format!("s{n:02}")).collect();
        let patterns: Vec<String> = (0..20).map(|n| format!("x.{}", n % 4)).collect();
        let of_each: Vec<_> = names.iter().zip(&patterns).map(|(n, p)| (&**n, &**p)).collect();
        let all = subscribers(&of_each);
        let (queue, _stop) = running(&dir, &all);
        queue.0.head.holds_at_most(20 * EVENT_COST);
        queue.prepare(&all).await.expect("prepares");
        for n in 0..40 {
            publish(&queue, &format!("x.{}", n % 4), 100).await;
        }
        until("all is read", async || queue.0.head.progress().0 == 4000).await;
        let window = Window { events: 150, envelopes: 1 };
        let take_all = async |subscriber| {
            let (mut source, settler) = queue.open(subscriber, window).await.expect("opens");
            let mut seen = Vec::new();
            while seen.len() < 1000 {
                let receipts = take(&mut source).await;
                seen.extend(receipts.iter().map(|receipt| receipt.tag));
                settle(&settler, receipts).await;
            }
            (source, seen)
        };
        let lanes: Vec<_> = all.iter().map(|subscriber| Box::pin(take_all(subscriber))).collect();
        let taken = futures_util::future::join_all(lanes).await;
        for (n, (_, seen)) in (0_u64..).zip(taken) {
            let expected: Vec<u64> =
                (1..=4000).filter(|seq| (seq - 1) / 100 % 4 == n % 4).collect();
            assert_eq!(seen, expected, "of subscriber {n}");
        }
        // By itself each would have read 4,000 events for its 1,000.
        let passes = queue.0.head.state().passes;
        assert!((1..100).contains(&passes), "{passes} passes");
    }

    #[tokio::test]
    async fn who_is_full_has_nothing_read_for_it_until_it_has_room() {
        let dir = tempfile::tempdir().expect("a directory");
        let a = subscribers(&[("a", "x")]);
        let (queue, _stop) = running(&dir, &a);
        queue.0.head.holds_at_most(20 * EVENT_COST);
        queue.prepare(&a).await.expect("prepares");
        let window = Window { events: 2, envelopes: 1 };
        let (mut source, settler) = queue.open(&a[0], window).await.expect("opens");
        publish(&queue, "x", 2).await;
        let receipts = take(&mut source).await;
        assert_eq!(receipts.len(), 2);
        let goes_on = async {
            publish(&queue, "x", 100).await;
            until("it is behind", async || queue.0.head.state().ring.after() > 2).await;
            queue.0.head.retries_changed("a");
            publish(&queue, "x", 1).await;
            until("all is read", async || queue.0.head.progress().0 == 103).await;
        };
        let mut none = Vec::new();
        tokio::select! {
            taken = source.take(&mut none, 100) => panic!("{taken:?}: {none:?}"),
            () = goes_on => {}
        }
        assert_eq!(queue.0.head.state().passes, 0);
        settle(&settler, receipts).await;
        let receipts = take(&mut source).await;
        assert_eq!(receipts.iter().map(|r| r.tag).collect::<Vec<_>>(), [3, 4]);
    }

    #[tokio::test]
    async fn who_has_still_to_take_something_takes_it_of_the_ring_when_other_subscribers_change() {
        let dir = tempfile::tempdir().expect("a directory");
        let before = subscribers(&[("gone", "z"), ("a", "x"), ("b", "y")]);
        let (queue, _stop) = running(&dir, &before);
        queue.prepare(&before).await.expect("prepares");
        publish(&queue, "x", 6).await;
        until("all is read", async || queue.0.head.progress().0 == 6).await;
        let window = Window { events: 2, envelopes: 1 };
        let (mut source, settler) = queue.open(&before[1], window).await.expect("opens");
        let receipts = take(&mut source).await;
        assert_eq!(place(&queue, "a"), Some(Place::Before(3)));
        let index = || queue.0.head.state().segments.index("a");
        assert_eq!(index(), Some(1));
        let after = subscribers(&[("a", "x"), ("b", "#"), ("new", "#")]);
        queue.removals().configure(after.iter().map(|s| s.name.clone()).collect(), true);
        queue.prepare(&after).await.expect("prepares");
        publish(&queue, "x", 1).await;
        until("it has another index", async || index() == Some(0)).await;
        until("all is read", async || queue.0.head.progress().0 == 7).await;
        assert_eq!(place(&queue, "a"), Some(Place::Before(3)));
        assert_eq!(queue.0.head.state().ring.after(), 0, "the ring has all");
        settle(&settler, receipts).await;
        let mut seen = Vec::new();
        while seen.len() < 5 {
            let receipts = take(&mut source).await;
            seen.extend(receipts.iter().map(|receipt| receipt.tag));
            settle(&settler, receipts).await;
        }
        assert_eq!(seen, [3, 4, 5, 6, 7]);
        for name in ["b", "new"] {
            let subscriber = after.iter().find(|s| s.name == *name).expect("is configured");
            let (mut source, _settler) = queue.open(subscriber, WINDOW).await.expect("opens");
            let receipts = take(&mut source).await;
            assert_eq!(receipts.iter().map(|r| r.tag).collect::<Vec<_>>(), [7], "{name}");
        }
    }

    #[tokio::test]
    async fn events_go_to_their_subscribers_also_by_segments_of_one_version_that_are_fewer() {
        let dir = tempfile::tempdir().expect("a directory");
        let queue =
            EmbeddedQueue::for_daemon(&config(&dir, Duration::from_secs(3600))).expect("opens");
        let of_a = |pattern| subscribers(&[("a", pattern), ("b", "y")]);
        queue.prepare(&of_a("x")).await.expect("prepares");
        publish(&queue, "x", 1).await;
        let both = of_a("z");
        queue.prepare(&both).await.expect("prepares");
        let read = async || {
            let new = |db: &Connection| Segments::default().changed(db);
            Arc::new(queue.store().read(new).await.expect("reads").expect("are others"))
        };
        let before = read().await;
        queue.0.head.start(0);
        let read_with = |segments: &Arc<Segments>, seqs: &[i64]| {
            let event = |seq: &i64| {
                let event_type = if *seq % 2 == 0 { "y" } else { "z" };
                let owners = segments.owners(*seq, &of_type(event_type));
                Passed { owners, event: Stored::numbered(*seq) }
            };
            let events: Vec<_> = seqs.iter().map(event).collect();
            let (segments, upto) = (segments.clone(), *seqs.last().expect("is not empty"));
            Read { segments, events, upto, more: false, retried: Vec::new(), last_retry: 0 }
        };
        queue.0.head.push(read_with(&before, &[2]));
        let (mut a, _settler) = queue.open(&both[0], WINDOW).await.expect("opens");
        let (mut b, _) = queue.open(&both[1], WINDOW).await.expect("opens");
        // It is done with its closed segment, which was the first one.
        let done = |db: &Connection| set_cursor(db, "a", 1);
        queue.store().write(done).await.expect("writes");
        let fewer = read().await;
        assert!(before.index("a") == Some(0) && fewer.index("a") == Some(1));
        queue.0.head.push(read_with(&fewer, &[3, 4]));
        let taken = async |source: &mut Source| {
            take(source).await.iter().map(|receipt| receipt.tag).collect::<Vec<_>>()
        };
        assert_eq!((taken(&mut a).await, taken(&mut b).await), (vec![3], vec![2, 4]));
    }

    #[tokio::test]
    async fn who_has_settled_all_of_a_part_of_the_log_before_goes_on_behind_it() {
        let dir = tempfile::tempdir().expect("a directory");
        let a = subscribers(&[("a", "x")]);
        let (queue, _stop) = running(&dir, &a);
        queue.0.head.holds_at_most(20 * EVENT_COST);
        queue.prepare(&a).await.expect("prepares");
        for _ in 0..4 {
            publish(&queue, "x", 1000).await;
        }
        until("all is read", async || queue.0.head.progress().0 == 4000).await;
        let ahead = "INSERT INTO ahead VALUES ('a', 2, 3500)";
        queue.store().write(move |db| db.execute_batch(ahead)).await.expect("writes");
        let (mut source, settler) = queue.open(&a[0], WINDOW).await.expect("opens");
        let first = take(&mut source).await;
        assert_eq!(first.iter().map(|r| r.tag).collect::<Vec<_>>(), [1]);
        settle(&settler, first).await;
        let mut seen = Vec::new();
        while seen.len() < 500 {
            seen.extend(take(&mut source).await.iter().map(|receipt| receipt.tag));
        }
        assert_eq!(seen, (3501..=4000).collect::<Vec<u64>>());
        let state = queue.0.head.state();
        assert!(state.is_read && state.passes >= 4, "it was read for all");
    }

    #[tokio::test]
    async fn a_session_takes_nothing_of_the_ring_when_another_is_in_its_place() {
        let dir = tempfile::tempdir().expect("a directory");
        let a = subscribers(&[("a", "x")]);
        let (queue, _stop) = running(&dir, &a);
        queue.prepare(&a).await.expect("prepares");
        let (mut earlier, _) = queue.open(&a[0], WINDOW).await.expect("opens");
        wait_at_the_end(&queue, "a", &mut earlier).await;
        let (mut later, _settler) = queue.open(&a[0], WINDOW).await.expect("opens");
        wait_at_the_end(&queue, "a", &mut later).await;
        publish(&queue, "x", 1).await;
        until("it waits", async || place(&queue, "a") == Some(Place::Before(1))).await;
        let mut taken = Vec::new();
        assert_eq!(earlier.pull(10, &mut taken), Pulled::Alone);
        assert!(taken.is_empty(), "{taken:?}");
        assert_eq!(place(&queue, "a"), Some(Place::Before(1)));
        drop(earlier);
        assert_eq!(take(&mut later).await.len(), 1);
    }

    #[tokio::test]
    async fn a_restart_takes_a_backlog_by_the_patterns_that_held_when_it_was_stored() {
        let dir = tempfile::tempdir().expect("a directory");
        // Another one gets all, so that all are stored.
        let with = |pattern| subscribers(&[("a", pattern), ("all", "#")]);
        let (x, y) = (with("x"), with("y"));
        {
            let config = config(&dir, Duration::from_secs(3600));
            let queue = EmbeddedQueue::for_daemon(&config).expect("opens");
            for all in [&x, &y, &x] {
                queue.prepare(all).await.expect("prepares");
                publish(&queue, "x", 2).await;
                publish(&queue, "y", 3).await;
            }
            queue.close().await;
        }
        let (queue, _stop) = running(&dir, &x);
        queue.prepare(&x).await.expect("prepares");
        until("all is read", async || queue.0.head.progress().0 == 15).await;
        let (mut source, settler) = queue.open(&x[0], WINDOW).await.expect("opens");
        let receipts = take(&mut source).await;
        let expected = [1, 2, 8, 9, 10, 11, 12];
        assert_eq!(receipts.iter().map(|r| r.tag).collect::<Vec<_>>(), expected);
        settle(&settler, receipts).await;
        publish(&queue, "x", 1).await;
        assert_eq!(take(&mut source).await.iter().map(|r| r.tag).collect::<Vec<_>>(), [16]);
    }
}

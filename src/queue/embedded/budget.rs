//! The memory of the messages that lanes have in hand, for all lanes together.
//!
//! A lane takes up to a window of events, and the windows of ten thousand lanes are gigabytes. Some
//! hundred of them keep the machine as busy. So once the budget is used up, lanes stand in line for
//! what others settle, and each takes as much as its window has room for when it is its turn. Who
//! has taken less than a turn allows need not stand in line for the rest while it has some of that in
//! hand, until twice the budget is used: that may be a part of a batch.
//!
//! What a lane has in hand for long, because its receiver hangs or its batch waits for more, would
//! keep the others from taking anything: while somebody stands in line it counts for a second at
//! most.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::{sync::Notify, time::sleep};

/// Bytes of messages in hand above which lanes stand in line.
const MOST: usize = 64 << 20;

/// Bytes that a message takes besides its body.
pub(super) const COST: usize = 512;

/// Bytes that a lane may take at its turn, however few are left: two batches of the default. They
/// count from when it gets its turn.
const TURN: usize = 256 << 10;

/// Time between two looks at the line.
const TICK: Duration = Duration::from_millis(250);

/// Ticks for which what a lane has in hand counts.
const COUNTED: usize = 4;

/// Lanes that get a turn at a tick. Others pass theirs on sooner: this is for turns that nobody
/// takes, since a lane was paused meanwhile, or is gone.
const TURNS: usize = 16;

/// What all lanes may have in hand.
#[derive(Debug)]
pub(super) struct Budget {
    state: Mutex<State>,
    /// Somebody stands in line.
    short: Notify,
}

#[derive(Debug, Default)]
struct State {
    /// Lanes stand in line above this. Without a limit while nobody minds the line.
    most: usize,
    turn: usize,
    /// Counts ticks. They pass only while somebody stands in line.
    tick: u64,
    /// The bytes that were taken in this tick and in the last ones, this tick's at the end.
    counted: VecDeque<usize>,
    /// Their sum.
    used: usize,
    line: VecDeque<Arc<Member>>,
}

/// A lane, as those who give turns know it.
#[derive(Debug)]
struct Member {
    wake: Arc<Notify>,
    is_gone: AtomicBool,
    turn: Mutex<Turn>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Turn {
    #[default]
    None,
    InLine,
    /// It may take, and got that turn at this tick.
    Has(u64),
}

impl Default for Budget {
    fn default() -> Self {
        let budget = Self::of(MOST);
        budget.state().most = usize::MAX;
        budget
    }
}

impl Budget {
    fn of(most: usize) -> Self {
        let turn = (most / 16).clamp(1, TURN);
        let state = State { most, turn, counted: VecDeque::from([0]), ..State::default() };
        Self { state: Mutex::new(state), short: Notify::new() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The bytes that count, and the lanes in line.
    pub(super) fn use_now(&self) -> (usize, usize) {
        let state = self.state();
        (state.used, state.line.len())
    }

    /// Gives turns that nobody takes to the next in line, indefinitely.
    pub(super) async fn mind_the_line(&self) {
        let _minding = Minding::begin(self);
        loop {
            self.short.notified().await;
            while !self.state().line.is_empty() {
                sleep(TICK).await;
                self.tick();
            }
        }
    }

    fn tick(&self) {
        let mut state = self.state();
        state.tick += 1;
        state.counted.push_back(0);
        if state.counted.len() > COUNTED {
            state.used -= state.counted.pop_front().unwrap_or(0);
        }
        for _ in 0..TURNS {
            state.next();
        }
    }
}

/// While it lasts turns that nobody takes are given to others.
struct Minding<'b>(&'b Budget);

impl<'b> Minding<'b> {
    fn begin(budget: &'b Budget) -> Self {
        let mut state = budget.state();
        if state.most == usize::MAX {
            state.most = MOST;
        }
        Self(budget)
    }
}

impl Drop for Minding<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.most = usize::MAX;
        while !state.line.is_empty() {
            state.next();
        }
    }
}

impl State {
    /// Gives a turn to the first in line, if there is room.
    fn next(&mut self) {
        while self.used < self.most
            && let Some(first) = self.line.pop_front()
        {
            if !first.is_gone.load(Ordering::Relaxed) {
                *first.turn() = Turn::Has(self.add(self.turn));
                first.wake.notify_one();
                return;
            }
        }
    }

    /// Has so many bytes count. Returns the tick in which they were taken.
    fn add(&mut self, bytes: usize) -> u64 {
        if let Some(now) = self.counted.back_mut() {
            *now += bytes;
            self.used += bytes;
        }
        self.tick
    }

    /// What was taken in this tick is not in hand any more.
    fn give_back(&mut self, tick: u64, bytes: usize) {
        let last = self.counted.len() - 1;
        let age = usize::try_from(self.tick - tick).unwrap_or(usize::MAX);
        if let Some(place) = last.checked_sub(age) {
            self.counted[place] -= bytes;
            self.used -= bytes;
        }
    }
}

impl Member {
    fn turn(&self) -> MutexGuard<'_, Turn> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What one lane has in hand. The budget has that back when this is dropped.
#[derive(Debug)]
pub(super) struct Share {
    budget: Arc<Budget>,
    member: Arc<Member>,
    held: Mutex<Held>,
}

#[derive(Debug, Default)]
struct Held {
    /// The bytes by the ticks in which they were taken, the oldest first.
    taken: VecDeque<(u64, usize)>,
    /// What it is about to take counts already.
    reserved: Option<(u64, usize)>,
    /// What it has not taken of its last turn.
    rest: usize,
}

impl Held {
    /// The bytes of it that count.
    fn counted(&self, state: &State) -> usize {
        let counts = |tick: &u64| state.tick - tick < state.counted.len() as u64;
        self.taken.iter().filter(|(tick, _)| counts(tick)).map(|(_, bytes)| bytes).sum()
    }

    /// Without anything in hand there is no batch to complete.
    fn forget_rest(&mut self) {
        if self.taken.is_empty() {
            self.rest = 0;
        }
    }

    fn takes(&mut self, state: &mut State, bytes: usize) {
        let tick = state.add(bytes);
        self.rest = self.rest.saturating_sub(bytes);
        match self.taken.back_mut() {
            Some((last, sum)) if *last == tick => *sum += bytes,
            _ if bytes > 0 => self.taken.push_back((tick, bytes)),
            _ => {}
        }
    }
}

impl Share {
    /// The share of a lane, which is woken by `wake`.
    pub(super) fn new(budget: &Arc<Budget>, wake: Arc<Notify>) -> Self {
        let member = Member { wake, is_gone: AtomicBool::default(), turn: Mutex::default() };
        Self { budget: budget.clone(), member: Arc::new(member), held: Mutex::default() }
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The bytes that the lane may take now, until its turn [ends](Self::took). `None`: it stands in
    /// line, and is woken when it is its turn.
    pub(super) fn may_take(&self) -> Option<usize> {
        let mut held = self.held();
        self.ask(&mut self.budget.state(), &mut held)
    }

    /// Has so many bytes count before they are taken: what the lane takes is read for it first.
    /// False: it stands in line.
    pub(super) fn reserve(&self, bytes: usize) -> bool {
        let mut held = self.held();
        let mut state = self.budget.state();
        if held.reserved.is_none() && self.ask(&mut state, &mut held).is_some() {
            held.reserved = Some((state.add(bytes), bytes));
            state.next();
        }
        held.reserved.is_some()
    }

    fn ask(&self, state: &mut State, held: &mut Held) -> Option<usize> {
        let mut turn = self.member.turn();
        let has_turn = match *turn {
            // Who slept through it gets another one: others have had this one since.
            Turn::Has(at) => state.tick - at < COUNTED as u64,
            Turn::None | Turn::InLine => false,
        };
        // What one lane may hold is bounded by its window: it does not wait for itself.
        if state.line.is_empty() && held.counted(state) == state.used {
            return Some(usize::MAX);
        }
        let is_free = state.line.is_empty() && state.used < state.most;
        if held.reserved.is_some() || has_turn || is_free {
            held.rest = state.turn;
            return Some(state.most.saturating_sub(state.used).max(state.turn));
        }
        // It would wait for the rest of its batch, and others for what it has of it.
        if held.rest > 0 && state.used / 2 < state.most {
            return Some(held.rest);
        }
        if *turn != Turn::InLine {
            *turn = Turn::InLine;
            state.line.push_back(self.member.clone());
            self.budget.short.notify_one();
        }
        None
    }

    /// The lane has taken so many bytes, and its turn goes on.
    pub(super) fn takes(&self, bytes: usize) {
        self.held().takes(&mut self.budget.state(), bytes);
    }

    /// The lane has taken so many bytes. Its turn ends, and what it has reserved counts no more.
    pub(super) fn took(&self, bytes: usize) {
        let mut held = self.held();
        let mut state = self.budget.state();
        if let Some((tick, bytes)) = held.reserved.take() {
            state.give_back(tick, bytes);
        }
        held.takes(&mut state, bytes);
        held.forget_rest();
        let mut turn = self.member.turn();
        if let Turn::Has(at) = *turn {
            *turn = Turn::None;
            let bytes = state.turn;
            state.give_back(at, bytes);
        }
        drop(turn);
        state.next();
    }

    /// So many bytes of the lane are settled, those first that it has taken first.
    pub(super) fn settled(&self, mut bytes: usize) {
        let mut held = self.held();
        let mut state = self.budget.state();
        while bytes > 0
            && let Some((tick, sum)) = held.taken.front_mut()
        {
            let part = bytes.min(*sum);
            (bytes, *sum) = (bytes - part, *sum - part);
            state.give_back(*tick, part);
            if *sum == 0 {
                held.taken.pop_front();
            }
        }
        held.forget_rest();
        state.next();
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.member.is_gone.store(true, Ordering::Relaxed);
        self.took(0);
        self.settled(usize::MAX);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{
        clock,
        delivery::DeadLetter,
        queue::{
            Queue as _, Settlement, Settler as _, Source as _, Taken, Window,
            embedded::{
                EmbeddedQueue,
                head::tests::{running, settle, take},
                tests::{WINDOW, batch, config, publish, subscribers, until},
            },
        },
    };

    fn share(budget: &Arc<Budget>) -> Share {
        Share::new(budget, Arc::default())
    }

    fn used(budget: &Budget) -> usize {
        let state = budget.state();
        assert_eq!(state.used, state.counted.iter().sum::<usize>());
        state.used
    }

    /// A budget of 1,000 bytes, which the first of three lanes has taken, and the others wait for.
    fn used_up() -> (Arc<Budget>, [Share; 3]) {
        let budget = Arc::new(Budget::of(1000));
        let all = [share(&budget), share(&budget), share(&budget)];
        let [a, b, c] = &all;
        assert!(a.may_take().is_some_and(|most| most >= 1000));
        a.took(1000);
        assert_eq!((b.may_take(), c.may_take(), b.may_take()), (None, None, None));
        (budget, all)
    }

    fn has_turn(share: &Share) -> bool {
        matches!(*share.member.turn(), Turn::Has(_))
    }

    #[test]
    fn lanes_take_what_others_settle_in_the_order_in_which_they_came() {
        let (budget, [a, b, c]) = used_up();
        a.settled(600);
        assert!(has_turn(&b) && !has_turn(&c));
        let late = share(&budget);
        assert_eq!(late.may_take(), None, "though there is room");
        assert!(b.may_take().is_some());
        b.took(100);
        assert!(has_turn(&c) && !has_turn(&late), "what is left is for the next");
        c.took(0);
        assert!(has_turn(&late), "who needs nothing passes its turn on");
        late.took(0);
        assert_eq!(used(&budget), 500);
    }

    #[test]
    fn what_is_held_for_long_counts_no_more_while_others_wait_and_is_given_back_once() {
        let (budget, [a, b, c]) = used_up();
        for _ in 0..COUNTED - 1 {
            budget.tick();
            assert!(!has_turn(&b));
        }
        budget.tick();
        assert!(has_turn(&b) && has_turn(&c));
        b.took(300);
        c.took(0);
        a.settled(1000);
        assert_eq!(used(&budget), 300);
    }

    #[test]
    fn the_share_of_a_lane_that_ends_is_free_and_its_turn_another_ones() {
        let (budget, [a, b, c]) = used_up();
        drop(b);
        drop(a);
        assert!(has_turn(&c));
        let next = share(&budget);
        c.took(1000);
        assert_eq!(used(&budget), 1000);
        assert_eq!(next.may_take(), None);
        let after = share(&budget);
        assert_eq!(after.may_take(), None);
        let full = budget.state().turn;
        c.settled(full);
        assert!(has_turn(&next) && !has_turn(&after), "one turn is all that there is room for");
        drop(next);
        assert!(has_turn(&after));
    }

    #[test]
    fn what_is_reserved_counts_until_something_is_taken_instead() {
        let (budget, [a, b, c]) = used_up();
        a.settled(1000);
        assert!(b.reserve(1000) && b.reserve(1000), "once");
        c.took(0);
        assert!(c.may_take().is_none());
        assert_eq!(used(&budget), 1000 + budget.state().turn, "and its turn");
        assert!(!c.reserve(1));
        assert!(b.may_take().is_some());
        b.took(200);
        assert!(has_turn(&c));
        c.took(0);
        assert_eq!(used(&budget), 200);
    }

    #[test]
    fn who_has_taken_less_than_a_turn_need_not_wait_for_the_rest_of_it() {
        let (budget, [a, b, c]) = used_up();
        let turn = budget.state().turn;
        a.settled(100);
        assert!(b.may_take().is_some());
        b.took(20);
        c.took(0);
        a.took(100);
        assert_eq!((b.may_take(), c.may_take()), (Some(turn - 20), None));
        b.took(turn - 30);
        assert_eq!(b.may_take(), Some(10));
        a.took(1000);
        assert_eq!(b.may_take(), None, "twice the budget is used");
        a.settled(1000);
        b.settled(turn - 10);
        assert_eq!(b.may_take(), None, "it has nothing any more");
    }

    #[test]
    fn nobody_is_starved_by_those_who_go_on_taking() {
        let budget = Arc::new(Budget::of(1000));
        let mut lanes: Vec<_> = (0..100).map(|_| (share(&budget), 0, 0)).collect();
        for _ in 0..1000 {
            for (lane, in_hand, all) in &mut lanes {
                let room = 60 - *in_hand;
                let bytes = lane.may_take().map_or(0, |most| most.min(room));
                lane.took(bytes);
                (*in_hand, *all) = (*in_hand + bytes, *all + bytes);
            }
            for (lane, in_hand, _) in &mut lanes {
                let batch = 30.min(*in_hand);
                lane.settled(batch);
                *in_hand -= batch;
            }
        }
        let taken = lanes.iter().map(|(.., all)| *all);
        let (least, most) = (taken.clone().min(), taken.max());
        assert!(least > Some(1000) && most < least.map(|least| 2 * least), "{least:?} {most:?}");
    }

    #[test]
    fn a_lane_does_not_wait_for_itself() {
        let budget = Arc::new(Budget::of(1000));
        let (alone, other) = (share(&budget), share(&budget));
        alone.took(5000);
        assert_eq!(alone.may_take(), Some(usize::MAX));
        other.took(1);
        assert_eq!(alone.may_take(), None);
    }

    #[test]
    fn a_turn_that_a_lane_has_slept_through_is_over() {
        let (budget, [a, b, c]) = used_up();
        a.settled(1000);
        assert!(has_turn(&b));
        c.took(1);
        for _ in 0..COUNTED {
            a.took(1000);
            budget.tick();
        }
        assert_eq!(b.may_take(), None);
    }

    #[tokio::test]
    async fn a_lane_waits_for_what_others_have_in_hand_and_not_for_long() {
        let dir = tempfile::tempdir().expect("a directory");
        let both = subscribers(&[("a", "x"), ("b", "x")]);
        let (queue, _stop) = running(&dir, &both);
        queue.prepare(&both).await.expect("prepares");
        let budget = queue.0.budget.clone();
        budget.state().most = 1;
        let (mut a, a_settles) = queue.open(&both[0], WINDOW).await.expect("opens");
        let (mut b, b_settles) = queue.open(&both[1], WINDOW).await.expect("opens");
        publish(&queue, "x", 3).await;
        let held = take(&mut a).await;
        assert_eq!(held.len(), 3);
        let stands_in_line = async || !budget.state().line.is_empty();
        let mut none = Vec::new();
        tokio::select! {
            taken = b.take(&mut none, 100) => panic!("{taken:?}: {none:?}"),
            () = until("it stands in line", stands_in_line) => {}
        }
        settle(&a_settles, held).await;
        let held = take(&mut b).await;
        assert_eq!(held.len(), 3);
        publish(&queue, "x", 1).await;
        // The other one settles nothing.
        assert_eq!(take(&mut a).await.len(), 1);
        settle(&b_settles, held).await;
    }

    #[tokio::test]
    async fn lanes_that_read_the_log_by_themselves_take_in_turn_too() {
        let dir = tempfile::tempdir().expect("a directory");
        let all = subscribers(&["a", "b", "c"].map(|name| (name, "x")));
        // Without its background tasks, so that no turn is given but by those who settle.
        let queue = EmbeddedQueue::for_daemon(&config(&dir, Duration::ZERO)).expect("opens");
        queue.prepare(&all).await.expect("prepares");
        publish(&queue, "x", 3).await;
        let budget = queue.0.budget.clone();
        budget.state().most = 1;
        let mut lanes = Vec::new();
        for subscriber in all.iter() {
            lanes.push(queue.open(subscriber, WINDOW).await.expect("opens"));
        }
        let [(a, a_settles), (b, b_settles), (c, c_settles)] = &mut lanes[..] else { panic!() };
        let held = take(a).await;
        let both_wait = async {
            until("both stand in line", async || budget.state().line.len() == 2).await;
            settle(a_settles, held).await;
        };
        let b_takes = async {
            let receipts = take(b).await;
            settle(b_settles, receipts).await;
        };
        let c_takes = async {
            let receipts = take(c).await;
            settle(c_settles, receipts).await;
        };
        tokio::join!(both_wait, b_takes, c_takes);
        assert_eq!(used(&budget), 0);
    }

    #[tokio::test]
    async fn what_is_settled_is_given_back_whatever_becomes_of_it() {
        let dir = tempfile::tempdir().expect("a directory");
        let one = subscribers(&[("a", "x")]);
        let (queue, _stop) = running(&dir, &one);
        queue.prepare(&one).await.expect("prepares");
        let budget = queue.0.budget.clone();
        let (mut source, settler) = queue.open(&one[0], WINDOW).await.expect("opens");
        publish(&queue, "x", 3).await;
        let mut left = take(&mut source).await;
        assert_eq!(used(&budget), 3 * (COST + br#"{"event":"x"}"#.len()));
        let retried = batch("retried");
        let size = retried.body.len();
        let retry = Settlement::Retry { batches: vec![retried], delay: Duration::ZERO };
        settler.settle(vec![left.remove(0)], retry).await.expect("settles");
        let dead = DeadLetter::not_a_batch("{}".into(), None, None, String::new(), clock::now());
        let dead = Settlement::Dead(vec![dead]);
        settler.settle(vec![left.remove(0)], dead).await.expect("settles");
        settle(&settler, left).await;
        let mut taken = Vec::new();
        source.take(&mut taken, 10).await.expect("takes");
        let [Taken::Batch(_, receipt)] = taken[..] else { panic!("{taken:?}") };
        assert_eq!(used(&budget), COST + size);
        settle(&settler, vec![receipt]).await;
        assert_eq!(used(&budget), 0);
    }

    #[tokio::test]
    async fn nothing_is_read_for_a_lane_that_could_not_take_it() {
        let dir = tempfile::tempdir().expect("a directory");
        let both = subscribers(&[("a", "x"), ("b", "x")]);
        let (queue, _stop) = running(&dir, &both);
        queue.0.head.holds_at_most(20 * COST);
        queue.prepare(&both).await.expect("prepares");
        let budget = queue.0.budget.clone();
        let (mut a, a_settles) = queue.open(&both[0], WINDOW).await.expect("opens");
        publish(&queue, "x", 1).await;
        let held = take(&mut a).await;
        publish(&queue, "x", 200).await;
        until("the ring has not all", async || queue.0.head.begins_after() > 100).await;
        budget.state().most = 1;
        let passes = queue.0.head.passes();
        let (mut b, _b_settles) = queue.open(&both[1], WINDOW).await.expect("opens");
        let mut none = Vec::new();
        tokio::select! {
            taken = b.take(&mut none, 100) => panic!("{taken:?}: {none:?}"),
            () = until("it stands in line", async || !budget.state().line.is_empty()) => {}
        }
        assert_eq!(queue.0.head.passes(), passes);
        settle(&a_settles, held).await;
        assert_eq!(take(&mut b).await.len(), 100);
        assert_eq!(queue.0.head.passes(), passes + 1);
    }

    #[tokio::test]
    async fn lanes_that_are_behind_take_all_in_turn_however_little_memory_there_is() {
        let dir = tempfile::tempdir().expect("a directory");
        let names = ["a", "b", "c", "d"];
        let all = subscribers(&names.map(|name| (name, "x")));
        let (queue, _stop) = running(&dir, &all);
        queue.0.head.holds_at_most(20 * COST);
        queue.0.budget.state().most = 1;
        queue.prepare(&all).await.expect("prepares");
        publish(&queue, "x", 200).await;
        let taking = all.iter().map(async |subscriber| {
            let window = Window { events: 7, envelopes: 1 };
            let (mut source, settler) = queue.open(subscriber, window).await.expect("opens");
            let mut taken = Vec::new();
            while taken.len() < 200 {
                let receipts = take(&mut source).await;
                taken.extend(receipts.iter().map(|receipt| receipt.tag));
                settle(&settler, receipts).await;
            }
            assert!(taken.into_iter().eq(1..=200), "{}", subscriber.name);
            (source, settler)
        });
        let lanes = futures_util::future::join_all(taking).await;
        assert_eq!((lanes.len(), used(&queue.0.budget)), (4, 0));
    }

    proptest! {
        #[test]
        fn nobody_waits_while_there_is_room_and_in_the_end_nothing_is_used(
            steps in prop::collection::vec((0_usize..5, 0_u8..5, 1_usize..900), 1..200),
        ) {
            let budget = Arc::new(Budget::of(1000));
            let mut lanes: Vec<(Share, usize)> = (0..5).map(|_| (share(&budget), 0)).collect();
            for (lane, step, bytes) in steps {
                let (own, in_hand) = &mut lanes[lane];
                match step {
                    0 | 1 => if let Some(most) = own.may_take() {
                        let turn = budget.state().turn;
                        let is_alone = most == usize::MAX;
                        prop_assert!(used(&budget) < 1000 || most <= turn || is_alone);
                        own.took(bytes.min(most));
                        *in_hand += bytes.min(most);
                    },
                    2 => {
                        let part = bytes.min(*in_hand);
                        own.settled(part);
                        *in_hand -= part;
                    }
                    3 => drop(own.reserve(bytes)),
                    _ => budget.tick(),
                }
                let held: usize = lanes.iter().map(|(own, _)| {
                    let held = own.held();
                    held.taken.iter().map(|(_, bytes)| bytes).sum::<usize>()
                }).sum();
                prop_assert_eq!(held, lanes.iter().map(|(_, in_hand)| in_hand).sum::<usize>());
                let someone_waits = !budget.state().line.is_empty();
                let someone_may = lanes.iter().any(|(own, _)| has_turn(own));
                prop_assert!(used(&budget) >= 1000 || someone_may || !someone_waits);
            }
            drop(lanes);
            prop_assert_eq!(used(&budget), 0);
        }
    }
}

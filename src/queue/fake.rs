//! A queue in memory for tests of the rooms above: it does what a test says, panics included.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::{Arc, Mutex},
    time::Duration,
};

use super::{
    Begin, Checked, DeadLetters, Event, Hastened, Held, HistorySource, HistoryStart, NewEvent,
    Published, Queue, QueueError, Receipt, Removals, SettleError, Settlement, Settler, Source,
    Taken, Waiting, WaitingList, Window,
};
use tokio::sync::{Semaphore, watch};

use crate::store::{Gap, NewRow};
use crate::{
    config::{Subscriber, Subscribers},
    delivery::{Batch, BatchId, Depths, MessageKind, PauseState, PauseStates, SubscriberName},
    telemetry::finding::Finding,
};

#[derive(Debug, Clone)]
pub(crate) struct Fake(Arc<Mutex<State>>, Removals);

impl Default for Fake {
    fn default() -> Self {
        let state = State { bound: Some(BTreeSet::new()), ..State::default() };
        state.pause_states.send_replace(Some(PauseStates::default()));
        Self(Arc::new(Mutex::new(state)), Removals::default())
    }
}

#[derive(Debug, Default)]
struct State {
    pause_states: watch::Sender<Option<PauseStates>>,
    next_tag: u64,
    events: BTreeMap<SubscriberName, VecDeque<String>>,
    unsettled: BTreeMap<u64, (SubscriberName, String)>,
    /// Subscribers whose next `take` panics.
    panics: Vec<String>,
    /// The answers of the next settlements; `Ok` when there is none left.
    answers: VecDeque<SettleError>,
    retries: Vec<(Batch, Duration)>,
    opened: usize,
    /// It answers no question.
    is_silent: bool,
    asked: usize,
    pruned: Vec<SubscriberName>,
    /// The batches that were enqueued and that a test has not taken.
    waiting: BTreeMap<SubscriberName, Vec<Batch>>,
    /// All batches that were enqueued.
    enqueued: Vec<Batch>,
    /// The answer to what is enqueued, once set.
    refuses: Option<QueueError>,
    /// The hold of the next record.
    held: Option<Hold>,
    /// Subscribers whose settlements wait.
    settling: BTreeMap<SubscriberName, Hold>,
    history: History,
    begins: BTreeMap<SubscriberName, Begin>,
    /// What was bound before; `None` while that cannot be asked.
    bound: Option<BTreeSet<SubscriberName>>,
    /// The stores that have claimed its subscribers.
    claims: Vec<String>,
}

/// What history gets of it.
#[derive(Debug, Default)]
struct History {
    events: VecDeque<NewRow>,
    /// Each source finds it with its first events.
    gap: Option<Gap>,
    opened: usize,
    /// The events that its sources have given, those given again included.
    given: usize,
    is_elsewhere: bool,
    /// Its source is not opened.
    is_held: bool,
}

/// The source of history: gives events again that were not stored.
#[derive(Debug)]
pub(crate) struct FakeHistory {
    fake: Fake,
    taken: usize,
    gap: Option<Gap>,
}

impl HistorySource for FakeHistory {
    async fn take(&mut self, into: &mut Vec<NewRow>, max: usize) -> Result<(), QueueError> {
        loop {
            let rows: Vec<NewRow> = self.fake.with(|s| {
                let rest = s.history.events.iter().skip(self.taken).take(max);
                rest.cloned().collect()
            });
            if !rows.is_empty() {
                if self.taken == 0 {
                    self.gap = self.fake.with(|s| s.history.gap.clone());
                }
                self.taken += rows.len();
                self.fake.with(|s| s.history.given += rows.len());
                into.extend(rows);
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    async fn stored(&mut self) -> Result<(), QueueError> {
        self.fake.with(|s| drop(s.history.events.drain(..self.taken)));
        self.taken = 0;
        Ok(())
    }

    fn gaps(&mut self) -> Vec<Gap> {
        self.gap.take().into_iter().collect()
    }

    async fn close(self) {}
}

/// What is begun and waits until the test lets it go on.
#[derive(Debug, Clone)]
pub(crate) struct Hold {
    begun: Arc<Semaphore>,
    goes_on: Arc<Semaphore>,
}

impl Default for Hold {
    fn default() -> Self {
        Self { begun: Arc::new(Semaphore::new(0)), goes_on: Arc::new(Semaphore::new(0)) }
    }
}

impl Hold {
    /// Waits until one is begun, each time another one.
    pub(crate) async fn begun(&self) {
        let begun = tokio::time::timeout(Duration::from_secs(30), self.begun.acquire()).await;
        begun.expect("one is begun").expect("is not closed").forget();
    }

    /// Lets one go on.
    pub(crate) fn go_on(&self) {
        self.goes_on.add_permits(1);
    }

    async fn wait(&self) {
        self.begun.add_permits(1);
        self.goes_on.acquire().await.expect("is not closed").forget();
    }
}

impl Fake {
    fn with<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        change(&mut self.0.lock().expect("not poisoned"))
    }

    pub(crate) fn put(&self, subscriber: &str, bodies: &[&str]) {
        self.with(|s| {
            s.events
                .entry(subscriber.into())
                .or_default()
                .extend(bodies.iter().map(|b| (*b).to_owned()))
        });
    }

    pub(crate) fn panic_once(&self, subscriber: &str) {
        self.with(|s| s.panics.push(subscriber.to_owned()));
    }

    pub(crate) fn answer_next(&self, answer: SettleError) {
        self.with(|s| s.answers.push_back(answer));
    }

    /// Holds up the next record.
    pub(crate) fn hold_record(&self) -> Hold {
        let held = Hold::default();
        self.with(|s| s.held = Some(held.clone()));
        held
    }

    /// Holds up the settlements of a subscriber from now on.
    pub(crate) fn hold_settlements(&self, subscriber: &str) -> Hold {
        let held = Hold::default();
        self.with(|s| s.settling.insert(subscriber.into(), held.clone()));
        held
    }

    /// Whether no event waits and none is unsettled.
    pub(crate) fn is_empty(&self) -> bool {
        self.with(|s| s.unsettled.is_empty() && s.events.values().all(VecDeque::is_empty))
    }

    pub(crate) fn retries(&self) -> Vec<(Batch, Duration)> {
        self.with(|s| s.retries.clone())
    }

    /// All batches that were enqueued, in their order.
    pub(crate) fn enqueued(&self) -> Vec<Batch> {
        self.with(|s| s.enqueued.clone())
    }

    /// Takes the enqueued batches of a subscriber, as a lane that delivers them.
    pub(crate) fn take_enqueued(&self, subscriber: &str) -> Vec<Batch> {
        self.with(|s| s.waiting.remove(subscriber).unwrap_or_default())
    }

    /// Fails what is enqueued with this error, or not any more.
    pub(crate) fn refuse(&self, with: Option<QueueError>) {
        self.with(|s| s.refuses = with);
    }

    pub(crate) fn opened(&self) -> usize {
        self.with(|s| s.opened)
    }

    /// Says how far history has the events from before a subscriber was bound.
    pub(crate) fn begins(&self, subscriber: &str, begin: Begin) {
        self.with(|s| s.begins.insert(subscriber.into(), begin));
    }

    /// Says which subscribers were bound before.
    pub(crate) fn was_bound(&self, bound: Option<&[&str]>) {
        let names = bound.map(|names| names.iter().copied().map(SubscriberName::from).collect());
        self.with(|s| s.bound = names);
    }

    /// Adds events for history.
    pub(crate) fn put_history(&self, events: impl IntoIterator<Item = NewRow>) {
        self.with(|s| s.history.events.extend(events));
    }

    /// The events that history has not stored.
    pub(crate) fn history_waits(&self) -> usize {
        self.with(|s| s.history.events.len())
    }

    /// The events that history was given, those given again included.
    pub(crate) fn given_to_history(&self) -> usize {
        self.with(|s| s.history.given)
    }

    /// Lacks events of this time from now on.
    pub(crate) fn lack(&self, gap: Option<Gap>) {
        self.with(|s| s.history.gap = gap);
    }

    /// Gives its history to another store, or to any.
    pub(crate) fn give_history_away(&self, is_elsewhere: bool) {
        self.with(|s| s.history.is_elsewhere = is_elsewhere);
    }

    /// Opens no source of history, or does so again.
    pub(crate) fn hold_history(&self, is_held: bool) {
        self.with(|s| s.history.is_held = is_held);
    }

    /// Takes the ids of the stores that have claimed its subscribers made over the API.
    pub(crate) fn take_claims(&self) -> Vec<String> {
        self.with(|s| std::mem::take(&mut s.claims))
    }

    pub(crate) fn be_silent(&self, is_silent: bool) {
        self.with(|s| s.is_silent = is_silent);
    }

    async fn answers(&self) {
        self.with(|s| s.asked += 1);
        while self.with(|s| s.is_silent) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// The number of questions that it answers, or was to answer.
    pub(crate) fn asked(&self) -> usize {
        self.with(|s| s.asked)
    }

    /// Whose queues were deleted.
    pub(crate) fn pruned(&self) -> Vec<SubscriberName> {
        self.with(|s| s.pruned.clone())
    }

    /// The sources of history that were opened.
    pub(crate) fn opened_history(&self) -> usize {
        self.with(|s| s.history.opened)
    }
}

#[derive(Debug, Clone)]
pub(crate) struct End {
    fake: Fake,
    subscriber: SubscriberName,
}

impl Queue for Fake {
    type Source = End;
    type Settler = End;
    type DeadLetters = End;
    type History = FakeHistory;

    async fn prepare(&self, _: &[Arc<Subscriber>]) -> Result<BTreeSet<SubscriberName>, QueueError> {
        Ok(BTreeSet::new())
    }

    async fn background(&self, _: watch::Receiver<Subscribers>, _: watch::Receiver<bool>) {}

    async fn close(&self) {}

    async fn claim_history(&self, _: &HistoryStart) -> Result<(), QueueError> {
        if self.with(|s| s.history.is_elsewhere) {
            return Err(QueueError::another_store("another store has it"));
        }
        Ok(())
    }

    async fn claim_subscribers(&self, store: &str) -> Result<(), QueueError> {
        self.with(|s| s.claims.push(store.to_owned()));
        Ok(())
    }

    async fn history(&self, _: HistoryStart) -> Result<FakeHistory, QueueError> {
        while self.with(|s| s.history.is_held) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        self.with(|s| {
            s.history.opened += 1;
            Ok(FakeHistory { fake: self.clone(), taken: 0, gap: None })
        })
    }

    async fn begin(&self, subscriber: &SubscriberName) -> Result<Begin, QueueError> {
        Ok(self.with(|s| s.begins.get(subscriber).copied().unwrap_or(Begin::Waits)))
    }

    async fn writable(&self) {}

    async fn ensure(&self, _: &[Arc<Subscriber>]) -> Result<(), QueueError> {
        Ok(())
    }

    async fn publish(&self, _: Vec<NewEvent>) -> Result<Vec<Published>, QueueError> {
        Err(QueueError::new("not part of this fake"))
    }

    fn removals(&self) -> &Removals {
        &self.1
    }

    fn pause_states(&self) -> watch::Receiver<Option<PauseStates>> {
        self.with(|s| s.pause_states.subscribe())
    }

    async fn record(
        &self,
        subscriber: &SubscriberName,
        pause_state: PauseState,
    ) -> Result<(), QueueError> {
        if let Some(held) = self.with(|s| s.held.take()) {
            held.wait().await;
        }
        self.with(|s| {
            s.pause_states.send_modify(|all| {
                Arc::make_mut(all.get_or_insert_default())
                    .insert(subscriber.clone(), pause_state)
                    .map_or((), drop)
            })
        });
        Ok(())
    }

    async fn dead_letters(&self, _: &str) -> Result<End, QueueError> {
        Err(QueueError::new("not part of this fake"))
    }

    async fn waiting(&self, subscriber: &str) -> Result<WaitingList, QueueError> {
        let waiting = self.with(|s| s.waiting.get(subscriber).cloned());
        let batches = waiting.into_iter().flatten();
        let batches = batches.map(|batch| Waiting::new(&batch, None)).collect();
        Ok(WaitingList { batches, unseen: 0 })
    }

    async fn hasten(&self, _: &str, _: Option<BTreeSet<BatchId>>) -> Result<Hastened, QueueError> {
        Err(QueueError::new("not part of this fake"))
    }

    async fn enqueue(
        &self,
        subscriber: &SubscriberName,
        batches: Vec<Batch>,
    ) -> Result<(), QueueError> {
        self.with(|s| {
            if let Some(e) = s.refuses.clone() {
                return Err(e);
            }
            let waiting = s.waiting.entry(subscriber.clone()).or_default();
            for batch in batches {
                if waiting.iter().all(|b| b.id != batch.id) {
                    waiting.push(batch.clone());
                }
                s.enqueued.push(batch);
            }
            Ok(())
        })
    }

    async fn depths(&self, _: &[Arc<Subscriber>]) -> Result<Depths, QueueError> {
        self.answers().await;
        Ok(Depths::default())
    }

    async fn bound(&self) -> Result<BTreeSet<SubscriberName>, QueueError> {
        self.with(|s| s.bound.clone().ok_or_else(|| QueueError::new("away")))
    }

    async fn prune(&self, name: &SubscriberName, _: bool) -> Result<(), QueueError> {
        self.answers().await;
        self.with(|s| s.pruned.push(name.clone()));
        Ok(())
    }

    async fn inspect(&self, _: &[Arc<Subscriber>]) -> Result<Vec<Finding>, QueueError> {
        self.answers().await;
        Ok(Vec::new())
    }

    async fn open(&self, subscriber: &Subscriber, _: Window) -> Result<(End, End), QueueError> {
        self.with(|s| {
            s.opened += 1;
            // Events that the last session had unsettled are redelivered.
            let held: Vec<u64> = s
                .unsettled
                .iter()
                .filter(|(_, (name, _))| *name == subscriber.name)
                .map(|(tag, _)| *tag)
                .collect();
            for tag in held.into_iter().rev() {
                let (name, body) = s.unsettled.remove(&tag).expect("just seen");
                s.events.entry(name).or_default().push_front(body);
            }
        });
        let end = End { fake: self.clone(), subscriber: subscriber.name.clone() };
        Ok((end.clone(), end))
    }
}

impl Source for End {
    async fn take(&mut self, into: &mut Vec<Taken>, _: usize) -> Result<(), QueueError> {
        loop {
            let panics = self.fake.with(|s| {
                s.panics
                    .iter()
                    .position(|p| self.subscriber == *p)
                    .map(|n| s.panics.remove(n))
                    .is_some()
            });
            assert!(!panics, "panics on purpose");
            self.fake.with(|s| {
                while let Some(body) =
                    s.events.get_mut(&self.subscriber).and_then(VecDeque::pop_front)
                {
                    s.next_tag += 1;
                    s.unsettled.insert(s.next_tag, (self.subscriber.clone(), body.clone()));
                    let receipt = Receipt { from: MessageKind::Event, tag: s.next_tag };
                    let (message_id, content_type, published_at, traceparent) =
                        (None, None, None, None);
                    into.push(Taken::Event(Event {
                        checked: Checked::of(body.as_bytes()),
                        body: body.into(),
                        message_id,
                        content_type,
                        published_at,
                        traceparent,
                        number: None,
                        receipt,
                    }));
                }
            });
            if !into.is_empty() {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    async fn close(self) {}
}

impl DeadLetters for End {
    fn left(&self) -> u32 {
        0
    }

    async fn next(&mut self) -> Result<Option<Held>, QueueError> {
        Ok(None)
    }

    async fn replay(&mut self, _: Vec<Held>) -> Result<Vec<Held>, QueueError> {
        Ok(Vec::new())
    }

    async fn purge(&mut self, _: Vec<Held>) -> Result<(), QueueError> {
        Ok(())
    }

    async fn close(self) -> Result<(), QueueError> {
        Ok(())
    }
}

impl Settler for End {
    async fn settle(
        &self,
        receipts: Vec<Receipt>,
        settlement: Settlement,
    ) -> Result<(), SettleError> {
        if let Some(held) = self.fake.with(|s| s.settling.get(&self.subscriber).cloned()) {
            held.wait().await;
        }
        self.fake.with(|s| {
            if let Some(answer) = s.answers.pop_front() {
                return Err(answer);
            }
            if let Settlement::Retry { batches, delay } = settlement {
                s.retries.extend(batches.into_iter().map(|batch| (batch, delay)));
            }
            for r in receipts {
                assert!(s.unsettled.remove(&r.tag).is_some(), "settled twice");
            }
            Ok(())
        })
    }
}

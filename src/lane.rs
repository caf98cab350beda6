//! The worker of one subscriber: take, batch, splice, sign, send, settle.
//!
//! A lane works in sessions. A session opens the queue, and ends when the lane drains, the circuit
//! opens, the queue is lost, or what it was opened with is configured anew; before it ends it waits for its requests
//! in flight and settles what it can. What it has not settled is in the queue and comes again.
//!
//! Everything else that is configured anew is used from the next attempt on, in the same session.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    fmt,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use tokio::{sync::watch, task::JoinSet, time::sleep_until};

use crate::{
    clock,
    config::{
        Subscriber,
        keys::{Affects, Differences},
    },
    delivery::{
        AttemptLog, AttemptResult, Batch, BatchId, DeadLetter, Disposition, FailedAttempt, Failure, FailureKind, MessageKind, Outcome,
        Pause, PauseCause, Reason, Standing, Standings,
    },
    endpoint::webhook::{Request, Webhook},
    event::{head, payload::Format, with_id},
    failpoint::{Step, reached},
    policy::{
        answer::Health,
        batching::Batcher,
        circuit_breaker::{Begun, Change, CircuitBreaker, Permit, State},
        retry::Waits,
        turn::{Slots, Turn, Turns, Waiting},
        verdict::{self, Attempt, Evidence, Origin, Verdict, decide},
    },
    queue::{Event, Queue, QueueError, Receipt, SettleError, Settlement, Settler, Source, Taken, Window},
    telemetry::{
        resources,
        status::{Circuit, Ended, LaneStatus, LastError},
    },
};

/// Messages taken from the source in one go: enough to make a wake-up cheap, few enough to look at
/// finished attempts in between.
const TAKE: usize = 256;

/// After a take that made no batch ready, how long events may gather before the next one. A wake-up for
/// each event costs more than the event; a batch that may wait at all may wait this long.
const GATHER: Duration = Duration::from_millis(1);

/// Between two sessions when the queue fails.
const FIRST_WAIT: Duration = Duration::from_millis(200);
const LONGEST_WAIT: Duration = Duration::from_secs(30);

/// A session that has nothing to do for so long has its queue, although nothing came to prove it by.
const STEADY: Duration = Duration::from_secs(3);

/// After so long it is told that the lane waits for the record of pauses.
const STATE_IS_LATE: Duration = Duration::from_secs(10);

/// A subscriber as it is configured, and its endpoint.
#[derive(Debug, Clone)]
pub struct Served {
    pub subscriber: Arc<Subscriber>,
    pub webhook: Webhook,
}

#[derive(Debug)]
pub struct Lane<Q> {
    configured: watch::Receiver<Served>,
    /// What was configured when the lane last looked.
    subscriber: Arc<Subscriber>,
    webhook: Webhook,
    queue: Q,
    breaker: CircuitBreaker,
    health: Health,
    /// Counts what requests are made of: an answer to one of before says nothing of those that are made now.
    generation: u64,
    standings: watch::Receiver<Option<Standings>>,
    /// The pause that was last logged.
    pause: Option<Pause>,
    /// When the subscriber was last resumed, as far as the lane has acted on it.
    resumed: Option<SystemTime>,
    /// An operator wants it tried now. A wish from before the circuit opened, or before a probe began, counts as seen.
    tries: watch::Receiver<u64>,
    trouble: Trouble,
    status: LaneStatus,
}

/// An event that may go into a batch.
#[derive(Debug)]
struct Admitted {
    event: Event,
    /// Its field `timestamp`.
    happened_at: Option<SystemTime>,
    arrived_at: SystemTime,
}

/// A batch under way, and what its attempt needs beside it.
#[derive(Debug)]
struct InFlight {
    /// This attempt counts among its attempts. Its story has the failed ones before this, and this one when it has failed.
    batch: Batch,
    receipts: Vec<Receipt>,
    /// The field `timestamp` of the first event.
    happened_at: Option<SystemTime>,
    /// When the first event arrived, as far as the queue tells.
    arrived_at: SystemTime,
    turn: Turn,
}

impl InFlight {
    /// The attempt that has just been made, before its result is in the story.
    fn as_attempt(&self, now: SystemTime) -> Attempt {
        let batch = &self.batch;
        let last = batch.story.last();
        let was_reset = last.is_some_and(|a| matches!(&a.result, AttemptResult::Failure(name) if name == FailureKind::Reset.name()));
        let origin = match self.turn {
            Turn::First => Origin::First,
            Turn::Retry => Origin::Again { part: batch.id.is_half(), failed_at: last.map(|a| a.at), was_reset },
        };
        Attempt {
            number: batch.attempts,
            first_attempt_at: batch.first_attempt_at.unwrap_or(now),
            events: batch.events,
            body_bytes: batch.body.len(),
            origin,
        }
    }

    fn has_failed(&mut self, failure: &Failure, at: SystemTime) {
        self.batch.story.add(FailedAttempt { number: self.batch.attempts, at, result: failure.into() });
    }
}

/// What a task of the session has done.
#[derive(Debug)]
enum Done {
    Attempted { number: u64, in_flight: Box<InFlight>, outcome: Outcome, took: Duration },
    Settled(Result<(), SettleError>),
}

/// An attempt whose outcome is not known.
#[derive(Debug)]
struct UnderWay {
    events: u64,
    /// Of the first event.
    arrived_at: SystemTime,
    generation: u64,
    begun: Begun,
}

/// Why a session ends.
#[derive(Debug)]
enum End {
    Drained,
    /// The circuit opened or is held; until when is the breaker's to say.
    Circuit,
    /// Until it is resumed.
    Paused,
    /// What the session was opened with is configured anew.
    Configured,
    Lost(QueueError),
    Unsettled(String),
    /// For a lack of the daemon's own a request could not be sent: why.
    Unsent(String),
}

impl<Q: Queue> Lane<Q> {
    pub fn new(configured: watch::Receiver<Served>, queue: Q, status: LaneStatus) -> Self {
        let Served { subscriber, webhook } = configured.borrow().clone();
        let breaker = CircuitBreaker::new(subscriber.circuit_breaker.clone());
        let trouble = Trouble { subscriber: subscriber.name.clone(), told: BTreeSet::new(), status: status.clone() };
        let (standings, tries) = (queue.standings(), status.tries());
        Self {
            configured,
            subscriber,
            webhook,
            queue,
            breaker,
            health: Health::default(),
            generation: 0,
            standings,
            pause: None,
            resumed: None,
            tries,
            trouble,
            status,
        }
    }

    /// Works until `drain` becomes true and what is in flight is settled.
    pub async fn run(mut self, mut drain: watch::Receiver<bool>) {
        let mut waits = Waits::new(FIRST_WAIT, LONGEST_WAIT);
        loop {
            tokio::select! {
                () = self.allowed() => {}
                () = drained(&mut drain) => return,
            }
            let permit = self.breaker.permit(clock::instant());
            self.tell_circuit();
            if let Permit::Wait(until) = permit {
                let spoken = spoken(self.standings.clone(), self.subscriber.clone(), self.resumed);
                tokio::select! {
                    () = sleep_until(until.into()) => continue,
                    () = changed(&mut self.configured) => continue,
                    () = spoken => continue,
                    () = changed(&mut self.tries) => {
                        tracing::info!(subscriber = self.subscriber.name, "an operator wants a retry now: one batch is tried");
                        self.breaker.try_now();
                        continue;
                    }
                    () = drained(&mut drain) => return,
                }
            }
            let opened = tokio::select! {
                opened = self.queue.open(&self.subscriber, self.window()) => opened,
                () = drained(&mut drain) => return,
            };
            let end = match opened {
                Ok((source, settler)) => {
                    let mut session = Session::new(&mut self, settler);
                    let end = session.run(source, &mut drain).await;
                    if session.settled {
                        waits.reset();
                    }
                    self.status.gave_back();
                    end
                }
                Err(e) => End::Lost(e),
            };
            let unsettled = matches!(end, End::Unsettled(_));
            match end {
                End::Drained => return self.trouble.is_over(),
                End::Circuit | End::Paused | End::Configured => {
                    self.trouble.is_over();
                    continue;
                }
                End::Lost(e) => self.trouble.is(&e),
                End::Unsettled(why) => self.trouble.is(&why),
                End::Unsent(why) => resources::report(&self.subscriber.name, &why, clock::instant()),
            }
            let recover = async {
                tokio::time::sleep(waits.grow()).await;
                if unsettled {
                    // Attempts whose failure cannot be written down would only be made again.
                    self.queue.writable().await;
                }
            };
            tokio::select! {
                () = recover => {}
                () = drained(&mut drain) => return,
            }
        }
    }

    /// Takes over what is configured now. Returns whether a session has to be opened anew for it.
    fn adopt(&mut self) -> bool {
        let Served { subscriber, webhook } = self.configured.borrow_and_update().clone();
        let old = std::mem::replace(&mut self.subscriber, subscriber);
        self.webhook = webhook;
        let new = &self.subscriber;
        let differences = Differences::between(&old, new);
        if differences.affect(Affects::Requests) {
            // A receiver that refuses them now may mean the new secret, and no event.
            self.generation += 1;
            self.health = Health::default();
        }
        if old.url != new.url {
            // What was known of the endpoint is of another one.
            self.breaker = CircuitBreaker::new(new.circuit_breaker.clone());
        } else if old.circuit_breaker != new.circuit_breaker {
            self.breaker.set_policy(new.circuit_breaker.clone(), clock::instant());
        }
        self.tell_circuit();
        differences.affect(Affects::Session)
    }

    /// Waits until it is known that the subscriber is not paused.
    async fn allowed(&mut self) {
        loop {
            self.adopt();
            let name = self.subscriber.name.clone();
            if self.subscriber.paused {
                let why = "`paused = true` in the configuration".to_owned();
                let since = self.pause.as_ref().filter(|p| p.why == why).map_or_else(clock::now, |p| p.since);
                self.is_paused(Pause { why, since, by: "configuration".to_owned() });
                changed(&mut self.configured).await;
                continue;
            }
            let known = wait_for(&mut self.standings, |all| all.is_some());
            if tokio::time::timeout(STATE_IS_LATE, known).await.is_err() {
                tracing::warn!(subscriber = name, "nothing is sent before the queue has told whether the subscriber is paused");
            }
            let found = wait_for(&mut self.standings, |all| all.is_some()).await;
            let Some(pause) = found.as_ref().and_then(|all| pause_of(all, &name)).cloned() else { break };
            self.is_paused(pause.clone());
            tokio::select! {
                // Resumed, or for another reason than before.
                _ = wait_for(&mut self.standings, |all| all.as_ref().is_some_and(|all| pause_of(all, &name) != Some(&pause))) => {}
                () = changed(&mut self.configured) => {}
            }
        }
        self.status.paused(None);
        let resumed = self.resumed_at();
        let is_new = std::mem::replace(&mut self.resumed, resumed) != resumed;
        if let Some(pause) = self.pause.take() {
            // What is recorded only an operator takes back.
            let by = if pause.by == "configuration" { "configuration" } else { "operator" };
            tracing::info!(subscriber = self.subscriber.name, by, paused_by = pause.by, "resumed");
            // What was known of the endpoint is of another time.
            self.breaker = CircuitBreaker::new(self.subscriber.circuit_breaker.clone());
            self.health = Health::default();
        } else if is_new && self.breaker.permit(clock::instant()) != Permit::Flow {
            tracing::info!(subscriber = self.subscriber.name, "resumed: one batch is tried now");
            self.breaker.try_now();
        }
    }

    fn is_paused(&mut self, pause: Pause) {
        self.status.paused(Some(pause.clone()));
        // Read back from its record it is a little older: times are kept there less exactly.
        let is_logged = self.pause.as_ref().is_some_and(|last| (&last.why, &last.by) == (&pause.why, &pause.by));
        if !is_logged {
            let (name, why, by) = (&self.subscriber.name, &pause.why, &pause.by);
            let until = if by == "configuration" { "that is taken out of it".to_owned() } else { format!("`hooktrail resume {name}`") };
            tracing::warn!(subscriber = name, why, by, "paused: its events wait in the queue until {until}");
            self.pause = Some(pause);
        }
    }

    fn tell_circuit(&self) {
        let (now, time) = (clock::instant(), clock::now());
        let at = |until: Instant| time + until.saturating_duration_since(now);
        let circuit = match self.breaker.state() {
            State::Closed { .. } => Circuit::Closed,
            State::Open { until, .. } => Circuit::Open { until: at(until) },
            State::HalfOpen { .. } | State::Tried { .. } => Circuit::HalfOpen,
        };
        self.status.circuit(circuit, time);
        self.status.held(self.breaker.held_until().map(at));
    }

    /// Batches first attempted before then begin anew.
    fn resumed_at(&self) -> Option<SystemTime> {
        match self.standings.borrow().as_ref()?.get(&self.subscriber.name)? {
            Standing::Resumed { at } => Some(*at),
            Standing::Paused(_) => None,
        }
    }

    /// How much to take.
    ///
    /// The same for a probe: a queue puts what it is given back behind all that it was given back
    /// before, so a probe that took less would change the order of the backlog.
    fn window(&self) -> Window {
        Window::of(&self.subscriber)
    }
}

fn pause_of<'s>(standings: &'s Standings, subscriber: &str) -> Option<&'s Pause> {
    standings.get(subscriber).and_then(Standing::pause)
}

/// What the record says when it says what was waited for. If nobody writes it any more, nobody is left to work for.
async fn wait_for(standings: &mut watch::Receiver<Option<Standings>>, wanted: impl FnMut(&Option<Standings>) -> bool) -> Option<Standings> {
    let found = standings.wait_for(wanted).await.map(|found| found.clone());
    match found {
        Ok(found) => found,
        Err(_) => std::future::pending().await,
    }
}

/// Completes when something else is configured, or wanted. If nobody is left to do that, that is never.
async fn changed<T>(what: &mut watch::Receiver<T>) {
    if what.changed().await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// Completes when the subscriber is paused, and says why.
async fn paused(mut standings: watch::Receiver<Option<Standings>>, subscriber: &str) -> Pause {
    loop {
        let all = wait_for(&mut standings, |all| all.as_ref().is_some_and(|all| pause_of(all, subscriber).is_some())).await;
        if let Some(pause) = all.as_ref().and_then(|all| pause_of(all, subscriber)) {
            return pause.clone();
        }
    }
}

/// Completes when the subscriber is paused, or resumed at another time than `known`.
async fn spoken(mut standings: watch::Receiver<Option<Standings>>, subscriber: Arc<Subscriber>, known: Option<SystemTime>) {
    let is_news = |all: &Option<Standings>| match all.as_ref().and_then(|all| all.get(&subscriber.name)) {
        Some(Standing::Paused(_)) => true,
        Some(Standing::Resumed { at }) => Some(*at) != known,
        None => false,
    };
    wait_for(&mut standings, is_news).await;
}

/// Completes when the lane is to end. If the sender is gone, nobody is left to work for.
async fn drained(drain: &mut watch::Receiver<bool>) {
    drain.wait_for(|d| *d).await.ok();
}

/// Logs when the queue fails, when it fails for another reason, and when it works again, not each try. That it can be
/// opened does not mean that it works: some queues open each time and fail at the first use.
#[derive(Debug)]
struct Trouble {
    subscriber: String,
    /// The reasons that were told since it works no more.
    told: BTreeSet<String>,
    status: LaneStatus,
}

/// More reasons than these are not told.
const REASONS: usize = 5;

impl Trouble {
    fn is(&mut self, why: &dyn fmt::Display) {
        let why = why.to_string();
        self.status.trouble(Some(why.clone()));
        let again = self.is_now();
        if self.told.len() >= REASONS || !self.told.insert(why.clone()) {
            tracing::debug!(subscriber = self.subscriber, error = %why, "the lane's queue still fails");
        } else if again {
            // A broker that comes back may have lost the queue: that asks for something else than the first reason did.
            tracing::warn!(subscriber = self.subscriber, error = %why, "the lane's queue still fails");
        } else {
            tracing::warn!(subscriber = self.subscriber, error = %why, "the lane lost its queue; it opens it again");
        }
    }

    fn is_now(&self) -> bool {
        !self.told.is_empty()
    }

    fn is_over(&mut self) {
        if !std::mem::take(&mut self.told).is_empty() {
            self.status.trouble(None);
            tracing::info!(subscriber = self.subscriber, "the lane has its queue again");
        }
    }
}

struct Session<'l, Q: Queue> {
    lane: &'l mut Lane<Q>,
    settler: Q::Settler,
    batcher: Batcher<Admitted>,
    /// Batches to be retried.
    retries: VecDeque<(Batch, Receipt)>,
    tasks: JoinSet<Done>,
    attempts: u64,
    /// By number.
    attempting: BTreeMap<u64, UnderWay>,
    turns: Turns,
    settling: usize,
    /// Set once; from then on nothing is taken or begun.
    end: Option<End>,
    /// Something was settled, so the queue works.
    settled: bool,
}

impl<'l, Q: Queue> Session<'l, Q> {
    fn new(lane: &'l mut Lane<Q>, settler: Q::Settler) -> Self {
        let batcher = Batcher::new(lane.subscriber.batch.clone(), lane.subscriber.format);
        Self {
            lane,
            settler,
            batcher,
            retries: VecDeque::new(),
            tasks: JoinSet::new(),
            attempts: 0,
            attempting: BTreeMap::new(),
            turns: Turns::default(),
            settling: 0,
            end: None,
            settled: false,
        }
    }

    async fn run(&mut self, mut source: Q::Source, drain: &mut watch::Receiver<bool>) -> End {
        let mut taken = Vec::with_capacity(TAKE);
        let gathers = self.lane.subscriber.batch.max_wait > GATHER;
        let mut gathering = None;
        let opened = clock::instant();
        let subscriber = self.lane.subscriber.clone();
        let mut paused = std::pin::pin!(paused(self.lane.standings.clone(), &subscriber.name));
        let mut is_paused = false;
        loop {
            self.begin();
            self.tell_what_is_held();
            if self.end.is_some() && self.tasks.is_empty() {
                break;
            }
            let open = self.end.is_none();
            let take = open && gathering.is_none();
            let due = self.wakes_at();
            let idle = self.tasks.is_empty() && self.retries.is_empty() && self.batcher.due().is_none();
            tokio::select! {
                biased;
                () = drained(drain), if open => self.end = Some(End::Drained),
                pause = &mut paused, if !is_paused => {
                    is_paused = true;
                    // It holds from now on, also while requests in flight finish.
                    self.lane.is_paused(pause);
                    self.end.get_or_insert(End::Paused);
                }
                () = changed(&mut self.lane.configured), if open => {
                    if self.lane.adopt() {
                        self.end = Some(End::Configured);
                    }
                }
                Some(done) = self.tasks.join_next(), if !self.tasks.is_empty() => match done {
                    Ok(done) => self.done(done),
                    // A panic of a task is one of the lane: the supervisor counts it and restarts.
                    Err(e) => std::panic::resume_unwind(e.into_panic()),
                },
                () = sleep_until(gathering.unwrap_or_else(clock::instant).into()), if gathering.is_some() => gathering = None,
                result = source.take(&mut taken, TAKE), if take => {
                    self.sort(taken.drain(..));
                    self.batcher.expects_company(!source.is_full());
                    let now = clock::instant();
                    gathering = (gathers && self.retries.is_empty() && !self.batcher.ready(now)).then_some(now + GATHER);
                    if let Err(e) = result {
                        self.end = Some(End::Lost(e));
                    }
                }
                () = sleep_until(due.unwrap_or_else(clock::instant).into()), if due.is_some() => {}
                () = sleep_until((opened + STEADY).into()), if self.lane.trouble.is_now() && open && idle => self.lane.trouble.is_over(),
            }
        }
        source.close().await;
        self.end.take().unwrap_or(End::Drained)
    }

    /// How many requests may be in flight; `None` if nothing may be begun. While a settlement is not confirmed nothing is: it may be
    /// the queue that fails, and then attempts would be made that have to be made again.
    fn slots(&mut self) -> Option<Slots> {
        if self.end.is_some() || self.settling > 0 {
            return None;
        }
        match self.lane.breaker.permit(clock::instant()) {
            Permit::Flow => {
                let all = self.lane.subscriber.http.concurrency;
                Some(Slots::Flow(self.lane.breaker.ramp().map_or(all, |ramp| ramp.requests(all))))
            }
            Permit::Probe => Some(Slots::Probe),
            Permit::Wait(_) => None,
        }
    }

    fn waiting(&self, now: Instant) -> Waiting {
        let first_due = if self.batcher.ready(now) { Some(now) } else { self.batcher.due() };
        Waiting { first_due, retries: !self.retries.is_empty() }
    }

    /// When something may be begun although nothing happens.
    fn wakes_at(&mut self) -> Option<Instant> {
        let (slots, now) = (self.slots()?, clock::instant());
        self.turns.wakes_at(slots, self.waiting(now), now)
    }

    /// Starts as many attempts as there are slots and batches to send.
    fn begin(&mut self) {
        self.limit_batches();
        while let Some(slots) = self.slots() {
            let now = clock::instant();
            match self.turns.choose(slots, self.waiting(now), now) {
                Some(Turn::Retry) => self.begin_retry(slots),
                Some(Turn::First) => self.begin_first(slots),
                None => return,
            }
        }
    }

    fn begin_retry(&mut self, slots: Slots) {
        let Some((mut batch, receipt)) = self.retries.pop_front() else { return };
        if self.lane.resumed_at().zip(batch.first_attempt_at).is_some_and(|(resumed, first)| first < resumed) {
            (batch.attempts, batch.first_attempt_at) = (0, None);
        }
        batch.attempts = batch.attempts.saturating_add(1);
        let arrived_at = *batch.first_attempt_at.get_or_insert_with(clock::now);
        let happened_at = batch.format.first_event(&batch.body).and_then(|event| happened_at(head(event).ok()?.timestamp));
        let events = batch.events.into();
        let in_flight = InFlight { batch, receipts: vec![receipt], happened_at, arrived_at, turn: Turn::Retry };
        self.attempt(events, arrived_at, Turn::Retry, slots, async move { in_flight });
    }

    fn begin_first(&mut self, slots: Slots) {
        let (events, bytes) = self.batcher.cut();
        let format = self.lane.subscriber.format;
        let arrived_at = events.first().map_or_else(clock::now, |e| e.arrived_at);
        self.attempt(events.len() as u64, arrived_at, Turn::First, slots, async move { first_attempt(format, events, bytes) });
    }

    /// Until a circuit that was open has been closed for long enough, first attempts are of small batches. Retries stay as they are.
    fn limit_batches(&mut self) {
        let batch = &self.lane.subscriber.batch;
        let whole = (batch.max_events, batch.max_bytes);
        let (events, bytes) = self.lane.breaker.ramp().map_or(whole, |ramp| (ramp.batch(whole.0), ramp.batch(whole.1)));
        self.batcher.limit(events, bytes);
    }

    fn attempt(
        &mut self,
        events: u64,
        arrived_at: SystemTime,
        turn: Turn,
        slots: Slots,
        in_flight: impl Future<Output = InFlight> + Send + 'static,
    ) {
        let (webhook, status) = (self.lane.webhook.clone(), self.lane.status.clone());
        self.attempts += 1;
        let number = self.attempts;
        let begun = Begun { probe: slots == Slots::Probe, first: turn == Turn::First };
        if begun.probe {
            self.lane.tries.mark_unchanged(); // This is what was wanted. A later wish is for another one.
        }
        self.attempting.insert(number, UnderWay { events, arrived_at, generation: self.lane.generation, begun });
        self.turns.begun(turn, clock::instant());
        self.tasks.spawn(async move {
            let in_flight = in_flight.await;
            let batch = &in_flight.batch;
            let started = clock::instant();
            let _counted = status.begins(batch.id.as_str(), batch.events, batch.body.len(), started);
            let Batch { attempts: attempt, format, replay, .. } = *batch;
            let request = Request { batch_id: batch.id.clone(), attempt, format, body: batch.body.clone(), replay };
            reached(Step::Attempting);
            let outcome = webhook.send(request).await;
            reached(Step::Answered);
            Done::Attempted { number, in_flight: Box::new(in_flight), outcome, took: clock::instant() - started }
        });
    }

    /// `settled` tells the status of it once it is durable.
    fn settle(&mut self, receipts: Vec<Receipt>, settlement: Settlement, settled: impl FnOnce(&LaneStatus) + Send + 'static) {
        let (settler, status) = (self.settler.clone(), self.lane.status.clone());
        self.settling += 1;
        self.tasks.spawn(async move {
            let result = settler.settle(receipts, settlement).await;
            if result.is_ok() {
                settled(&status);
            }
            Done::Settled(result)
        });
    }

    fn tell_what_is_held(&self) {
        let front = self.batcher.front().map(|e| e.arrived_at);
        let retries = self.retries.iter().filter_map(|(batch, _)| batch.first_attempt_at);
        let oldest = self.attempting.values().map(|a| a.arrived_at).chain(front).chain(retries).min();
        let attempted: u64 = self.attempting.values().map(|a| a.events).sum();
        let retries: u64 = self.retries.iter().map(|(batch, _)| u64::from(batch.events)).sum();
        self.lane.status.holds(attempted + retries + self.batcher.len() as u64, oldest);
    }

    /// Puts what was taken where it belongs; what can never be delivered becomes a dead letter at once.
    fn sort(&mut self, taken: impl Iterator<Item = Taken>) {
        let (now, time) = (clock::instant(), clock::now());
        let (mut dead, mut known) = (Vec::new(), Vec::new());
        let (mut received, mut recognised) = (0, 0);
        for item in taken {
            match item {
                Taken::Batch(batch, receipt) => self.retries.push_back((batch, receipt)),
                Taken::Unusable(letter, receipt) => {
                    received += u64::from(receipt.from == MessageKind::Event);
                    dead.push((receipt, letter));
                }
                Taken::Known { events, receipt } => {
                    recognised += u64::from(events);
                    received += u64::from(receipt.from == MessageKind::Event);
                    known.push(receipt);
                }
                Taken::Event(mut event) => {
                    received += 1;
                    match self.admit(&mut event) {
                        Ok(timestamp) => {
                            let bytes = event.body.len();
                            let arrived_at = event.published_at.unwrap_or(time);
                            self.batcher.push(Admitted { event, happened_at: happened_at(timestamp), arrived_at }, bytes, now);
                        }
                        Err((reason, error)) => {
                            let Event { body, content_type, message_id, receipt, .. } = event;
                            dead.push((receipt, DeadLetter::of_event(body.into(), content_type, message_id, reason, error, time)));
                        }
                    }
                }
            }
        }
        if received > 0 {
            self.lane.status.received(received);
        }
        if !known.is_empty() {
            tracing::debug!(
                subscriber = self.lane.subscriber.name,
                events = recognised,
                "came again and were known: acked without an attempt"
            );
            self.settle(known, Settlement::Delivered, move |status| status.recognised(recognised));
        }
        if let Some((_, first)) = dead.first() {
            tracing::warn!(
                subscriber = self.lane.subscriber.name,
                letters = dead.len(),
                reason = first.reason.name(),
                error = first.error,
                "dead-lettered without an attempt"
            );
            let reasons: Vec<Reason> = dead.iter().map(|(_, letter)| letter.reason).collect();
            let (receipts, letters) = dead.into_iter().unzip();
            self.settle(receipts, Settlement::Dead(letters), move |status| {
                reasons.iter().for_each(|reason| status.dead(*reason, 1));
            });
        }
    }

    /// Makes of an event what goes into a batch, and returns its timestamp. One that cannot go stays as it was published.
    fn admit(&self, event: &mut Event) -> Result<Option<u64>, (Reason, String)> {
        let subscriber = &self.lane.subscriber;
        let too_large = || format!("its request body would have more than batch.max_bytes = {} bytes", subscriber.batch.max_bytes);
        if !self.batcher.fits(event.body.len()) {
            return Err((Reason::TooLarge, too_large()));
        }
        let timestamp = head(&event.body).map_err(|e| (Reason::InvalidEvent, e.to_string()))?.timestamp;
        let id = event.message_id.as_deref().filter(|_| subscriber.event_ids);
        if let Some(body) = id.and_then(|id| with_id(&event.body, id)) {
            if !self.batcher.fits(body.len()) {
                return Err((Reason::TooLarge, format!("with its event_id {}", too_large())));
            }
            event.body = body;
        }
        Ok(timestamp)
    }

    fn done(&mut self, done: Done) {
        match done {
            Done::Settled(result) => {
                self.settling -= 1;
                match result {
                    Ok(()) => {
                        self.settled = true;
                        self.lane.trouble.is_over();
                    }
                    // Its messages come again from the next session; the source itself says why it is gone.
                    Err(SettleError::Gone) => {}
                    // Whatever else ends the session: after this the next one begins later.
                    Err(SettleError::Unconfirmed(why)) => match self.end {
                        None | Some(End::Circuit | End::Paused | End::Configured) => self.end = Some(End::Unsettled(why)),
                        Some(End::Drained | End::Lost(_) | End::Unsettled(_) | End::Unsent(_)) => {}
                    },
                }
            }
            Done::Attempted { number, in_flight, outcome, took } => {
                self.turns.ended(in_flight.turn, clock::instant());
                if let Some(under_way) = self.attempting.remove(&number) {
                    self.attempted(*in_flight, outcome, took, &under_way);
                }
                self.lane.tell_circuit();
            }
        }
    }

    /// Decides what follows, logs it, and does it.
    fn attempted(&mut self, mut in_flight: InFlight, outcome: Outcome, took: Duration, under_way: &UnderWay) {
        // Requests are still made as this one was.
        let current = under_way.generation == self.lane.generation;
        let now = clock::now();
        let mut attempt = in_flight.as_attempt(now);
        if let Some(failure) = outcome.failure() {
            in_flight.has_failed(failure, now);
        }
        let decided =
            |attempt: &Attempt| decide(attempt, &outcome, current, &self.lane.health, &self.lane.subscriber.retry, now, clock::random());
        let mut verdict = decided(&attempt);
        let mut halves = None;
        if matches!(verdict.disposition, Disposition::Split { .. }) {
            halves = in_flight.batch.halves();
            if halves.is_none() {
                // Its header counts more events than its body holds. Sent again at once, it would be answered in the same way.
                attempt.events = 1;
                verdict = decided(&attempt);
            }
        }
        if current {
            verdict::learn(&mut self.lane.health, &attempt, &outcome, now);
        }
        if let Outcome::Unsent { why } = outcome {
            self.lane.status.not_sent(&why, now);
            self.end.get_or_insert(End::Unsent(why));
            return;
        }
        self.log(&in_flight.batch, took, &outcome, &verdict);
        let flowed = self.lane.breaker.permit(clock::instant()) == Permit::Flow;
        self.count(under_way.begun, &verdict);
        if let Some(wait) = verdict.hold {
            self.lane.breaker.hold(clock::instant(), wait);
        }
        self.follow(in_flight, halves, &outcome, &verdict);
        if let Permit::Wait(_) = self.lane.breaker.permit(clock::instant()) {
            if flowed {
                self.lane.tries.mark_unchanged();
            }
            self.end.get_or_insert(End::Circuit);
        }
    }

    /// Reports to the breaker what the attempt says of the endpoint.
    fn count(&mut self, begun: Begun, verdict: &Verdict) {
        let now = clock::instant();
        let change = match verdict.evidence {
            Evidence::Accepted => self.lane.breaker.on_success(begun, self.lane.subscriber.http.concurrency),
            Evidence::Failed { counts } => self.lane.breaker.on_failure(begun, counts, now),
            Evidence::None => None,
        };
        if let Some(change) = change {
            self.log_change(change);
        }
        if begun.probe && matches!(verdict.disposition, Disposition::Split { .. }) {
            self.turns.probe_was_split(now);
        }
    }

    /// Does with the batch what was decided.
    fn follow(&mut self, in_flight: InFlight, halves: Option<Vec<Batch>>, outcome: &Outcome, verdict: &Verdict) {
        match (verdict.disposition, outcome.failure()) {
            (Disposition::Delivered, _) => self.delivered(in_flight),
            (Disposition::Retry { delay } | Disposition::Split { delay }, _) => self.again(in_flight, halves, delay),
            (Disposition::DeadLetter(reason), Some(failure)) => {
                let letter = DeadLetter::of_batch(in_flight.batch, reason, failure, verdict.shortened, clock::now());
                self.settle(in_flight.receipts, Settlement::Dead(vec![letter]), move |status| status.dead(reason, 1));
            }
            (Disposition::Paused(PauseCause::Gone), _) => self.pause(in_flight, "the receiver answered 410 Gone".to_owned(), "receiver"),
            (Disposition::Paused(PauseCause::Exhausted), Some(failure)) => {
                let status = failure.status().map(|s| format!(" {s}")).unwrap_or_default();
                let why = format!(
                    "attempt {} of a batch failed and was the last that [retry] allows: {}{status}",
                    in_flight.batch.attempts,
                    failure.name()
                );
                self.pause(in_flight, why, "retry.on_exhausted");
            }
            // Only what failed is given up; what was not sent has ended the session.
            (Disposition::DeadLetter(_) | Disposition::Paused(PauseCause::Exhausted), None) | (Disposition::GivenBack, _) => {}
        }
    }

    fn delivered(&mut self, in_flight: InFlight) {
        let (now, time) = (clock::instant(), clock::now());
        let since = |at: SystemTime| time.duration_since(at).ok();
        let (lag, since_arrival) = (in_flight.happened_at.and_then(since), since(in_flight.arrived_at));
        self.lane.status.delivered(in_flight.batch.events, lag, since_arrival, now, time);
        self.settle(in_flight.receipts, Settlement::Delivered, |_| {});
    }

    /// Schedules the batch again after `delay`, or its halves.
    fn again(&mut self, in_flight: InFlight, halves: Option<Vec<Batch>>, delay: Duration) {
        let InFlight { batch, receipts, arrived_at, .. } = in_flight;
        let batches = halves.unwrap_or_else(|| vec![batch]);
        let ids: Vec<BatchId> = batches.iter().map(|batch| batch.id.clone()).collect();
        self.settle(receipts, Settlement::Retry { batches, delay }, move |status| {
            let now = clock::now();
            ids.iter().for_each(|id| status.scheduled(id.as_str(), now + delay, arrived_at, now));
        });
    }

    /// Keeps the batch and sends nothing more until the subscriber is resumed. The pause is recorded
    /// first: a batch alone would be attempted again at once.
    fn pause(&mut self, in_flight: InFlight, why: String, by: &str) {
        self.end.get_or_insert(End::Paused);
        let (queue, settler, name) = (self.lane.queue.clone(), self.settler.clone(), self.lane.subscriber.name.clone());
        let known = self.lane.standings.borrow().as_ref().is_some_and(|all| pause_of(all, &name).is_some());
        let pause = Standing::Paused(Pause { why, since: clock::now(), by: by.to_owned() });
        let kept = Settlement::Retry { batches: vec![in_flight.batch], delay: Duration::ZERO };
        self.settling += 1;
        self.tasks.spawn(async move {
            if !known && let Err(e) = queue.record(&name, pause).await {
                return Done::Settled(Err(SettleError::Unconfirmed(e.to_string())));
            }
            Done::Settled(settler.settle(in_flight.receipts, kept).await)
        });
    }

    /// The one log event of an attempt, and what the status has of it: no body, no secret, no URL, and nothing that the receiver wrote,
    /// which may be what it was sent; that is in the dead letter alone.
    fn log(&self, batch: &Batch, took: Duration, outcome: &Outcome, verdict: &Verdict) {
        let failure = outcome.failure();
        let status = match outcome {
            Outcome::Delivered { status } => Some(*status),
            _ => failure.and_then(Failure::status),
        };
        let Some(disposition) = verdict.disposition.kind() else { return };
        let last_error =
            |f: &Failure| LastError { at: clock::now(), failure: f.kind(), status: f.status(), cause: f.cause().map(str::to_owned) };
        let ended = Ended { disposition, failure: failure.map(last_error), took };
        self.lane.status.ended(ended, clock::instant());
        let seconds = |d: Duration| d.as_millis() as f64 / 1000.0;
        macro_rules! attempt {
            ($level:ident) => {
                tracing::$level!(
                    subscriber = self.lane.subscriber.name,
                    batch_id = batch.id.as_str(),
                    attempt = batch.attempts,
                    events = batch.events,
                    bytes = batch.body.len(),
                    outcome = disposition.name(),
                    reason = verdict.disposition.reason().map(Reason::name),
                    status,
                    failure = failure.map(Failure::name),
                    error = failure.and_then(Failure::cause),
                    duration_ms = took.as_millis() as u64,
                    next_attempt_in_s = verdict.disposition.delay().map(seconds),
                    retry_after_shortened_from_s = verdict.shortened.map(seconds),
                    traceparent = batch.traceparent,
                    "attempt"
                )
            };
        }
        if failure.is_some() { attempt!(warn) } else { attempt!(info) }
    }

    fn log_change(&self, change: Change) {
        let subscriber = &self.lane.subscriber.name;
        match change {
            Change::Opened { failures, open_for } => tracing::warn!(
                subscriber,
                failures,
                open_for_s = open_for.as_secs_f64(),
                "circuit open: nothing is sent, the backlog stays in the queue; then one batch is tried"
            ),
            Change::StillOpen { open_for } => {
                tracing::warn!(subscriber, open_for_s = open_for.as_secs_f64(), "circuit open again: the probe failed")
            }
            Change::Closed => tracing::info!(subscriber, "circuit closed: the subscriber accepts batches again"),
        }
    }
}

/// The batch of a first attempt; from here on its bytes and its id do not change.
fn first_attempt(format: Format, mut events: Vec<Admitted>, bytes: usize) -> InFlight {
    let now = clock::now();
    let first = events.first_mut();
    let (happened_at, arrived_at, traceparent) =
        first.map_or_else(|| (None, now, None), |e| (e.happened_at, e.arrived_at, e.event.traceparent.take()));
    let batch = Batch {
        id: BatchId::random(),
        body: format.splice(events.iter().map(|e| e.event.body.as_slice()), bytes).into(),
        format,
        events: u32::try_from(events.len()).unwrap_or(u32::MAX),
        attempts: 1,
        first_attempt_at: Some(now),
        traceparent,
        story: AttemptLog::default(),
        replay: false,
    };
    let receipts = events.iter().map(|e| e.event.receipt).collect();
    InFlight { batch, receipts, happened_at, arrived_at, turn: Turn::First }
}

/// A time far beyond every clock is none.
fn happened_at(timestamp: Option<u64>) -> Option<SystemTime> {
    SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(timestamp?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::{metrics::Metrics, status::Board};
    use std::sync::Mutex;

    #[test]
    fn each_reason_why_a_queue_fails_is_told_once_until_it_works_again() {
        let log = Arc::new(Mutex::new(Vec::new()));
        let writer = {
            let log = log.clone();
            move || -> Box<dyn std::io::Write> { Box::new(Shared(log.clone())) }
        };
        let subscriber = tracing_subscriber::fmt().with_max_level(tracing::Level::INFO).with_ansi(false).with_writer(writer).finish();
        tracing::subscriber::with_default(subscriber, || {
            let status = Board::new(Metrics::new(SystemTime::UNIX_EPOCH)).lane("a");
            let mut trouble = Trouble { subscriber: "a".to_owned(), told: BTreeSet::new(), status };
            for why in ["reset", "refused", "refused", "reset", "broken", "broken"] {
                trouble.is(&why);
            }
            trouble.is_over();
            trouble.is(&"reset");
        });
        let log = String::from_utf8(log.lock().expect("no panic").clone()).expect("text");
        let told: Vec<&str> = log.lines().filter_map(|l| l.split("error=").nth(1)).collect();
        assert_eq!(told, ["reset", "refused", "broken", "reset"], "{log}");
        assert_eq!((log.matches("lost its queue").count(), log.matches("has its queue again").count()), (2, 1), "{log}");
    }

    struct Shared(Arc<Mutex<Vec<u8>>>);

    impl std::io::Write for Shared {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().expect("no panic").extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
}

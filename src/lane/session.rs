//! A session: from the opening of the queue until it is closed.

use std::{
    collections::{BTreeMap, VecDeque},
    time::{Duration, Instant, SystemTime},
};

use tokio::{
    sync::watch,
    task::{JoinHandle, JoinSet},
    time::sleep_until,
};

use super::{
    in_flight::{Admitted, Done, InFlight, Started, first_attempt, happened_at},
    signals::{changed, drained, paused},
    sorting::Sorted,
    state::State,
};
use crate::{
    clock,
    delivery::{Batch, DeadLetter, Disposition, Failure, Outcome, Pause, PauseCause, PauseState},
    endpoint::webhook::Request,
    event::{entry::event_in, head},
    failpoint::{Step, reached},
    policy::{
        batching::Batcher,
        circuit_breaker::{Begun, Permit},
        turn::{Slots, Turn, Turns, Waiting},
        verdict::{self, Evidence, Verdict},
    },
    queue::{Queue, QueueError, Receipt, SettleError, Settlement, Settler, Source, Taken},
    telemetry::{
        lane_event::{AttemptEnded, Died, LaneEvent, Settled},
        status::LaneReporter,
    },
};

/// Messages taken from the source at once: enough to make a wake-up cheap, few enough to handle
/// finished attempts in between.
const TAKE: usize = 256;

/// The time that a take waits for more events. Batches with a `max_wait` can afford it; a wake-up
/// per event costs more.
const GATHER: Duration = Duration::from_millis(1);

/// The time after which a session without work counts as proof that the queue works.
const STEADY: Duration = Duration::from_secs(3);

/// Why a session ends.
#[derive(Debug)]
pub(super) enum End {
    Drained,
    /// The circuit opened, or the endpoint is held; the breaker knows until when.
    Circuit,
    Paused,
    /// A setting changed that the session was opened with.
    Configured,
    /// A batch waits for its retry, and nothing may overtake it: the queue keeps what follows until
    /// that is done.
    Overtaking,
    Lost(QueueError),
    /// A settlement was not confirmed: why.
    Unsettled(String),
    /// A request could not be sent, because this machine lacks file descriptors or ports, or over
    /// HTTP/2 no stream got free.
    Unsent,
}

/// The next full batch, made while the requests that may be in flight are: then it is sent as soon as
/// one of them ends. Nothing waits for it: when the session ends, its events are unsettled as others
/// are.
struct Ahead {
    events: u64,
    arrived_at: SystemTime,
    made: JoinHandle<InFlight>,
}

pub(super) struct Session<'l, Q: Queue> {
    lane: &'l mut State<Q>,
    settler: Q::Settler,
    batcher: Batcher<Admitted>,
    ahead: Option<Ahead>,
    /// Batches to be retried.
    retries: VecDeque<(Batch, Receipt)>,
    tasks: JoinSet<Done>,
    /// The number of attempts that were started.
    attempts: u64,
    /// The attempts without an outcome, by number.
    attempting: BTreeMap<u64, Started>,
    turns: Turns,
    /// The number of settlements that write a message, and are not durable yet.
    storing: usize,
    /// The number of settlements that only ack, and have not.
    acking: usize,
    /// Set once; nothing is taken or started afterwards.
    end: Option<End>,
    /// Something was settled, so the queue works.
    pub(super) settled: bool,
    /// Until when `http.rate` holds the attempt that would be next.
    held_by_rate: Option<Instant>,
    /// It was reported that the next attempt waits for that.
    waits_for_rate: bool,
}

impl<'l, Q: Queue> Session<'l, Q> {
    pub(super) fn new(lane: &'l mut State<Q>, settler: Q::Settler) -> Self {
        let batcher = Batcher::new(lane.subscriber.batch.clone(), lane.subscriber.format);
        Self {
            lane,
            settler,
            batcher,
            ahead: None,
            retries: VecDeque::new(),
            tasks: JoinSet::new(),
            attempts: 0,
            attempting: BTreeMap::new(),
            turns: Turns::default(),
            storing: 0,
            acking: 0,
            end: None,
            settled: false,
            held_by_rate: None,
            waits_for_rate: false,
        }
    }

    pub(super) async fn run(
        &mut self,
        mut source: Q::Source,
        drain: &mut watch::Receiver<bool>,
    ) -> End {
        let mut taken = Vec::new();
        let gathers = self.lane.subscriber.batch.max_wait > GATHER;
        let mut gathering = None;
        let opened = clock::instant();
        let subscriber = self.lane.subscriber.clone();
        let mut paused = std::pin::pin!(paused(self.lane.pause_states.clone(), &subscriber.name));
        let mut is_paused = false;
        loop {
            self.begin();
            self.report_unsettled();
            if self.end.is_some() && self.tasks.is_empty() {
                break;
            }
            let open = self.end.is_none();
            let take = open && gathering.is_none();
            let due = self.wakes_at();
            let idle = self.tasks.is_empty()
                && self.retries.is_empty()
                && self.ahead.is_none()
                && self.batcher.due().is_none();
            tokio::select! {
                biased;
                () = drained(drain), if open => self.end = Some(End::Drained),
                pause = &mut paused, if !is_paused => {
                    is_paused = true;
                    // It holds from now on, also while requests in flight finish.
                    self.lane.paused(pause);
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
                    // Its room is not kept: with thousands of lanes it is more than what they hold.
                    self.took(std::mem::take(&mut taken).into_iter());
                    self.batcher.expects_more(!source.is_full());
                    let now = clock::instant();
                    let gather =
                        gathers && self.retries.is_empty() && !self.batcher.ready(now);
                    gathering = gather.then_some(now + GATHER);
                    if let Err(e) = result {
                        self.end = Some(End::Lost(e));
                    }
                }
                () = sleep_until(due.unwrap_or_else(clock::instant).into()), if due.is_some() => {}
                () = sleep_until((opened + STEADY).into()),
                    if self.lane.queue_fails() && open && idle => self.lane.queue_works(),
            }
        }
        source.close().await;
        self.end.take().unwrap_or(End::Drained)
    }

    /// The number of requests that may be in flight; `None` if none may be started. `None` while a
    /// settlement is unconfirmed: if it fails, those attempts would be repeated. Acks seldom fail:
    /// none is started while more of them are unconfirmed than requests may be in flight. In strict
    /// order none is while one is.
    fn slots(&mut self) -> Option<Slots> {
        let subscriber = &self.lane.subscriber;
        let most = if subscriber.in_order { 0 } else { subscriber.http.concurrency };
        let waits = self.end.is_some() || self.storing > 0 || self.acking > most;
        if waits { None } else { self.lane.slots() }
    }

    fn waiting(&self, now: Instant) -> Waiting {
        let is_ready = self.ahead.is_some() || self.batcher.ready(now);
        let first_due = if is_ready { Some(now) } else { self.batcher.due() };
        Waiting { first_due, retries: !self.retries.is_empty() }
    }

    /// The next time at which an attempt may start by time alone.
    fn wakes_at(&mut self) -> Option<Instant> {
        let (slots, now) = (self.slots()?, clock::instant());
        // What is held is due already.
        self.held_by_rate.or_else(|| self.turns.wakes_at(slots, self.waiting(now), now))
    }

    /// Starts as many attempts as there are slots and batches to send.
    fn begin(&mut self) {
        let (max_events, max_bytes) = self.lane.batch_limits();
        self.batcher.limit(max_events, max_bytes);
        self.held_by_rate = None;
        while let Some(slots) = self.slots() {
            let now = clock::instant();
            let Some(turn) = self.turns.choose(slots, self.waiting(now), now) else { break };
            if !self.pay(turn, now) {
                break;
            }
            match turn {
                Turn::Retry => self.begin_retry(slots),
                Turn::First => self.begin_first(slots),
            }
        }
        self.make_ahead();
    }

    /// Whether `http.rate` allows the next attempt now. Each attempt pays, whatever it is.
    fn pay(&mut self, turn: Turn, now: Instant) -> bool {
        let Some(bucket) = &mut self.lane.bucket else { return true };
        let events = match turn {
            Turn::Retry => self.retries.front().map_or(0, |(batch, _)| u64::from(batch.events)),
            Turn::First => {
                self.ahead.as_ref().map_or(self.batcher.front_len() as u64, |ahead| ahead.events)
            }
        };
        self.held_by_rate = bucket.wait(events, now);
        if self.held_by_rate.is_some() {
            if !std::mem::replace(&mut self.waits_for_rate, true) {
                self.lane.report(&LaneEvent::RateWaits);
            }
            return false;
        }
        bucket.pay(events, now);
        self.waits_for_rate = false;
        true
    }

    fn begin_retry(&mut self, slots: Slots) {
        let Some((mut batch, receipt)) = self.retries.pop_front() else { return };
        let resumed = self.lane.resumed_at().zip(batch.first_attempt_at);
        if resumed.is_some_and(|(resumed, first)| first < resumed) {
            (batch.attempts, batch.first_attempt_at) = (0, None);
        }
        batch.attempts = batch.attempts.saturating_add(1);
        let arrived_at = *batch.first_attempt_at.get_or_insert_with(clock::now);
        let first = batch.format.first_entry(&batch.body);
        let first = first.and_then(|first| event_in(batch.format, first));
        let happened_at = first.and_then(|event| happened_at(head(event).ok()?.timestamp));
        let events = batch.events.into();
        let in_flight =
            InFlight { batch, receipts: vec![receipt], happened_at, arrived_at, turn: Turn::Retry };
        self.attempt(events, arrived_at, Turn::Retry, slots, async move { in_flight });
    }

    fn make_ahead(&mut self) {
        let may_begin = self.end.is_none() && self.ahead.is_none() && self.lane.is_unrestrained();
        if !may_begin || !self.batcher.front_is_full() {
            return;
        }
        let (events, bytes) = self.batcher.cut();
        let subscriber = self.lane.subscriber.clone();
        self.ahead = Some(Ahead {
            events: events.len() as u64,
            arrived_at: events.first().map_or_else(clock::now, |e| e.arrived_at),
            made: tokio::spawn(async move { first_attempt(&subscriber, events, bytes) }),
        });
    }

    fn begin_first(&mut self, slots: Slots) {
        if let Some(Ahead { events, arrived_at, made }) = self.ahead.take() {
            self.attempt(events, arrived_at, Turn::First, slots, async move {
                match made.await {
                    Ok(mut in_flight) => {
                        in_flight.batch.first_attempt_at = Some(clock::now());
                        in_flight
                    }
                    Err(e) => std::panic::resume_unwind(e.into_panic()),
                }
            });
            return;
        }
        let (events, bytes) = self.batcher.cut();
        let subscriber = self.lane.subscriber.clone();
        let arrived_at = events.first().map_or_else(clock::now, |e| e.arrived_at);
        self.attempt(events.len() as u64, arrived_at, Turn::First, slots, async move {
            first_attempt(&subscriber, events, bytes)
        });
    }

    fn attempt(
        &mut self,
        events: u64,
        arrived_at: SystemTime,
        turn: Turn,
        slots: Slots,
        in_flight: impl Future<Output = InFlight> + Send + 'static,
    ) {
        let (webhook, reporter) = (self.lane.webhook.clone(), self.lane.reporter());
        self.attempts += 1;
        let number = self.attempts;
        let begun = Begun { probe: slots == Slots::Probe, first: turn == Turn::First };
        if begun.probe {
            self.lane.retry_requests.mark_unchanged(); // this is the requested retry
        }
        self.attempting.insert(
            number,
            Started { events, arrived_at, generation: self.lane.generation, begun },
        );
        self.turns.begun(turn, clock::instant());
        self.tasks.spawn(async move {
            let in_flight = in_flight.await;
            let batch = &in_flight.batch;
            let is_first = batch.attempts == 1;
            let sha256 = (is_first && reporter.wants_digests()).then(|| in_flight.digest());
            let started = clock::instant();
            reporter.report(&LaneEvent::AttemptStarted { number, batch, sha256 });
            let Batch { attempts: attempt, format, replay, .. } = *batch;
            let request = Request {
                batch_id: batch.id.clone(),
                attempt,
                format,
                body: batch.body.clone(),
                traceparent: batch.traceparent.clone(),
                replay,
            };
            reached(Step::Attempting);
            let outcome = webhook.send(request).await;
            reached(Step::Answered);
            Done::Attempted {
                number,
                in_flight: Box::new(in_flight),
                outcome,
                took: clock::instant() - started,
            }
        });
    }

    /// Settles in a task, which reports what was `settled` once it is durable, or has failed.
    fn settle(&mut self, receipts: Vec<Receipt>, settlement: Settlement, settled: Settled) {
        let (settler, reporter) = (self.settler.clone(), self.lane.reporter());
        let stored = !matches!(settlement, Settlement::Delivered);
        *self.pending(stored) += 1;
        self.tasks.spawn(async move {
            let result = settler.settle(receipts, settlement).await;
            Done::Settled { stored, result: reported(&reporter, result, settled) }
        });
    }

    const fn pending(&mut self, stored: bool) -> &mut usize {
        if stored { &mut self.storing } else { &mut self.acking }
    }

    fn report_unsettled(&self) {
        let front = self.batcher.front().map(|e| e.arrived_at);
        let retries = self.retries.iter().filter_map(|(batch, _)| batch.first_attempt_at);
        let attempting = self.attempting.values().map(|a| a.arrived_at);
        let ahead = self.ahead.as_ref();
        let arrived_ahead = ahead.map(|ahead| ahead.arrived_at);
        let oldest_arrived_at = attempting.chain(front).chain(retries).chain(arrived_ahead).min();
        let attempted: u64 = self.attempting.values().map(|a| a.events).sum();
        let retries: u64 = self.retries.iter().map(|(batch, _)| u64::from(batch.events)).sum();
        let ahead = ahead.map_or(0, |ahead| ahead.events);
        let events = attempted + retries + ahead + self.batcher.len() as u64;
        self.lane.report(&LaneEvent::Unsettled { events, oldest_arrived_at });
    }

    /// Puts each message where it belongs. A message that can never be delivered becomes a dead
    /// letter at once.
    fn took(&mut self, taken: impl Iterator<Item = Taken>) {
        let Sorted { events, retries, dead, recognised, recognised_events, filtered, received } =
            Sorted::new(taken, &self.lane.subscriber, &self.batcher, clock::now());
        let now = clock::instant();
        let taken = events.len() as u64;
        for event in events {
            let bytes = event.bytes;
            self.batcher.push(event, bytes, now);
        }
        self.retries.extend(retries);
        if received > 0 {
            self.lane.report(&LaneEvent::Taken { events: received });
        }
        if !recognised.is_empty() {
            let events = recognised_events;
            self.lane.report(&LaneEvent::Recognised { events });
            self.settle(recognised, Settlement::Delivered, Settled::Recognised { events });
        }
        self.lane.matched(taken, filtered.len() as u64);
        if !filtered.is_empty() {
            let events = filtered.len() as u64;
            self.settle(filtered, Settlement::Delivered, Settled::Filtered { events });
        }
        if let Some((_, first)) = dead.first() {
            self.lane.report(&LaneEvent::Undeliverable {
                letters: dead.len(),
                reason: first.reason,
                error: &first.error,
            });
            let died = dead.iter().map(|(_, letter)| Died::of(letter)).collect();
            let (receipts, letters) = dead.into_iter().unzip();
            self.settle(receipts, Settlement::Dead(letters), Settled::DeadLetters(died));
        }
    }

    fn done(&mut self, done: Done) {
        match done {
            Done::Settled { stored, result } => {
                *self.pending(stored) -= 1;
                match result {
                    Ok(()) => {
                        self.settled = true;
                        self.lane.queue_works();
                    }
                    // Its messages are delivered again by the next session; the source itself
                    // reports why it is gone.
                    Err(SettleError::Gone) => {}
                    Err(SettleError::Unconfirmed(why)) => self.unconfirmed(why),
                }
            }
            Done::Attempted { number, in_flight, outcome, took } => {
                self.turns.ended(in_flight.turn, clock::instant());
                if let Some(started) = self.attempting.remove(&number) {
                    self.attempted(number, *in_flight, outcome, took, &started);
                }
                self.lane.report_compression();
                self.lane.report_circuit();
            }
        }
    }

    /// An unconfirmed settlement replaces a gentler end, so that the next session waits for the
    /// queue.
    fn unconfirmed(&mut self, why: String) {
        match self.end {
            None | Some(End::Circuit | End::Paused | End::Configured | End::Overtaking) => {
                self.end = Some(End::Unsettled(why));
            }
            Some(End::Drained | End::Lost(_) | End::Unsettled(_) | End::Unsent) => {}
        }
    }

    /// Decides what follows, reports it, and does it.
    fn attempted(
        &mut self,
        number: u64,
        mut in_flight: InFlight,
        outcome: Outcome,
        took: Duration,
        started: &Started,
    ) {
        // Requests are still made as this one was.
        let current = started.generation == self.lane.generation;
        let now = clock::now();
        let mut attempt = in_flight.as_attempt(now);
        if let Some(failure) = outcome.failure() {
            in_flight.add_failure(failure, now);
        }
        // What an operator sent again goes beside the others.
        let in_order = self.lane.subscriber.in_order && !in_flight.batch.replay;
        let mut verdict = self.lane.decide(&attempt, &outcome, in_order, current, now);
        let mut halves = None;
        if matches!(verdict.disposition, Disposition::Split { .. }) {
            halves = in_flight.batch.halves();
            if halves.is_none() {
                // Its header counts more events than its body holds. Sent again at once, it would
                // be answered in the same way.
                attempt.events = 1;
                verdict = self.lane.decide(&attempt, &outcome, in_order, current, now);
            }
        }
        if current {
            verdict::learn(&mut self.lane.health, &attempt, &outcome, now);
        }
        if let Outcome::Unsent { why } = outcome {
            let batch_id = &in_flight.batch.id;
            self.lane.report(&LaneEvent::Unsent { number, batch_id, why: &why });
            self.end.get_or_insert(End::Unsent);
            return;
        }
        self.lane.report(&LaneEvent::AttemptEnded(AttemptEnded {
            number,
            batch: &in_flight.batch,
            outcome: &outcome,
            disposition: verdict.disposition,
            shortened_from: verdict.shortened_from,
            took,
        }));
        let flowed = self.lane.breaker.permit(clock::instant()) == Permit::Flow;
        self.count(started.begun, &verdict);
        if let Some(wait) = verdict.hold {
            self.lane.breaker.hold(clock::instant(), wait);
        }
        self.follow(in_flight, halves, &outcome, &verdict);
        if let Permit::Wait(_) = self.lane.breaker.permit(clock::instant()) {
            if flowed {
                self.lane.retry_requests.mark_unchanged();
            }
            self.end.get_or_insert(End::Circuit);
        }
    }

    /// Passes the attempt's evidence to the breaker.
    fn count(&mut self, begun: Begun, verdict: &Verdict) {
        let now = clock::instant();
        let change = match verdict.evidence {
            Evidence::Accepted => {
                self.lane.breaker.on_success(begun, self.lane.subscriber.http.concurrency)
            }
            Evidence::Failed { counts } => self.lane.breaker.on_failure(begun, counts, now),
            Evidence::None => None,
        };
        if let Some(change) = change {
            self.lane.report(&LaneEvent::CircuitChanged(change));
        }
        if begun.probe && matches!(verdict.disposition, Disposition::Split { .. }) {
            self.turns.probe_was_split(now);
        }
    }

    /// Does with the batch what was decided.
    fn follow(
        &mut self,
        in_flight: InFlight,
        halves: Option<Vec<Batch>>,
        outcome: &Outcome,
        verdict: &Verdict,
    ) {
        match verdict.disposition {
            Disposition::Delivered => self.delivered(in_flight),
            Disposition::Retry { delay } | Disposition::Split { delay } => {
                self.again(in_flight, halves, delay);
            }
            Disposition::Paused(PauseCause::Gone) => {
                self.pause(in_flight, "the receiver answered 410 Gone".to_owned(), "receiver");
            }
            Disposition::DeadLetter(reason) => {
                // Only a failed batch is given up.
                let Some(failure) = outcome.failure() else { return };
                let (shortened_from, now) = (verdict.shortened_from, clock::now());
                let InFlight { batch, receipts, .. } = in_flight;
                let letter = DeadLetter::of_batch(batch, reason, failure, shortened_from, now);
                let settled = Settled::DeadLetters(vec![Died::of(&letter)]);
                self.settle(receipts, Settlement::Dead(vec![letter]), settled);
            }
            Disposition::Paused(PauseCause::Exhausted) => {
                let Some(failure) = outcome.failure() else { return };
                let status = failure.status().map(|s| format!(" {s}")).unwrap_or_default();
                let why = format!(
                    "attempt {} of a batch failed and was the last that [retry] allows: {}{status}",
                    in_flight.batch.attempts,
                    failure.name()
                );
                self.pause(in_flight, why, "retry.on_exhausted");
            }
            Disposition::Paused(PauseCause::Refused) => {
                let status = outcome.failure().and_then(Failure::status);
                let status = status.map(|s| format!(" with {s}")).unwrap_or_default();
                let why =
                    format!("the receiver refuses an event{status}, and none may overtake it");
                self.pause(in_flight, why, "order");
            }
            // An unsent request has already ended the session.
            Disposition::GivenBack => {}
        }
    }

    fn delivered(&mut self, in_flight: InFlight) {
        let InFlight { batch, receipts, happened_at, arrived_at, .. } = in_flight;
        let now = clock::now();
        let since = |at: SystemTime| now.duration_since(at).ok();
        self.lane.report(&LaneEvent::Delivered {
            events: batch.events,
            lag: happened_at.and_then(since),
            since_arrival: since(arrived_at),
        });
        self.settle(receipts, Settlement::Delivered, Settled::Delivered);
    }

    /// Schedules the batch, or its halves, for a retry after `delay`.
    fn again(&mut self, in_flight: InFlight, halves: Option<Vec<Batch>>, delay: Duration) {
        let InFlight { batch, receipts, arrived_at, .. } = in_flight;
        let split = halves.as_ref().map(|_| batch.id.clone());
        let is_replay = batch.replay;
        let batches = halves.unwrap_or_else(|| vec![batch]);
        let settled = Settled::Retries { batches: batches.clone(), split, delay, arrived_at };
        self.settle(receipts, Settlement::Retry { batches, delay }, settled);
        if self.lane.subscriber.in_order && !is_replay {
            self.end.get_or_insert(End::Overtaking);
        }
    }

    /// Keeps the batch and sends nothing more until the subscriber is resumed. The pause is
    /// recorded first: a batch alone would be attempted again at once.
    fn pause(&mut self, in_flight: InFlight, why: String, by: &str) {
        self.end.get_or_insert(End::Paused);
        let is_recorded = self.lane.pause_is_recorded();
        let name = self.lane.subscriber.name.clone();
        let (queue, settler) = (self.lane.queue.clone(), self.settler.clone());
        let pause = PauseState::Paused(Pause { why, since: clock::now(), by: by.to_owned() });
        let settled = Settled::Paused(in_flight.batch.id.clone());
        let kept = Settlement::Retry { batches: vec![in_flight.batch], delay: Duration::ZERO };
        let reporter = self.lane.reporter();
        self.storing += 1;
        self.tasks.spawn(async move {
            let recorded = if is_recorded { Ok(()) } else { queue.record(&name, pause).await };
            let result = match recorded {
                Ok(()) => settler.settle(in_flight.receipts, kept).await,
                Err(e) => Err(SettleError::Unconfirmed(e.to_string())),
            };
            Done::Settled { stored: true, result: reported(&reporter, result, settled) }
        });
    }
}

/// Reports the result of a settlement.
fn reported(
    reporter: &LaneReporter,
    result: Result<(), SettleError>,
    settled: Settled,
) -> Result<(), SettleError> {
    reporter.report(&match result {
        Ok(()) => LaneEvent::Settled(settled),
        Err(_) => LaneEvent::NotSettled(settled),
    });
    result
}

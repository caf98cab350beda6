//! A session: from the opening of the queue until it is closed.

use std::{
    collections::{BTreeMap, VecDeque},
    time::{Duration, Instant, SystemTime},
};

use tokio::{sync::watch, task::JoinSet, time::sleep_until};

use super::{
    in_flight::{Admitted, Done, InFlight, UnderWay, first_attempt, happened_at},
    state::State,
    waits::{changed, drained, pause_of, paused},
};
use crate::{
    clock,
    delivery::{
        Batch, BatchId, DeadLetter, Disposition, Failure, MessageKind, Outcome, Pause, PauseCause,
        Reason, Standing,
    },
    endpoint::webhook::Request,
    event::{head, with_id},
    failpoint::{Step, reached},
    policy::{
        batching::Batcher,
        circuit_breaker::{Begun, Change, Permit},
        turn::{Slots, Turn, Turns, Waiting},
        verdict::{self, Attempt, Evidence, Verdict, decide},
    },
    queue::{Event, Queue, QueueError, Receipt, SettleError, Settlement, Settler, Source, Taken},
    telemetry::status::{Ended, LaneStatus, LastError},
};

/// Messages taken from the source in one go: enough to make a wake-up cheap, few enough to look at
/// finished attempts in between.
const TAKE: usize = 256;

/// After a take that made no batch ready, how long events may gather before the next one. A wake-up
/// for each event costs more than the event; a batch that may wait at all may wait this long.
const GATHER: Duration = Duration::from_millis(1);

/// A session that has nothing to do for so long has its queue, although nothing came to prove it
/// by.
const STEADY: Duration = Duration::from_secs(3);

/// Why a session ends.
#[derive(Debug)]
pub(super) enum End {
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

pub(super) struct Session<'l, Q: Queue> {
    lane: &'l mut State<Q>,
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
    pub(super) settled: bool,
}

impl<'l, Q: Queue> Session<'l, Q> {
    pub(super) fn new(lane: &'l mut State<Q>, settler: Q::Settler) -> Self {
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

    pub(super) async fn run(
        &mut self,
        mut source: Q::Source,
        drain: &mut watch::Receiver<bool>,
    ) -> End {
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
            let idle =
                self.tasks.is_empty() && self.retries.is_empty() && self.batcher.due().is_none();
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

    /// How many requests may be in flight; `None` if nothing may be begun. While a settlement is
    /// not confirmed nothing is: it may be the queue that fails, and then attempts would be made
    /// that have to be made again.
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
        if self
            .lane
            .resumed_at()
            .zip(batch.first_attempt_at)
            .is_some_and(|(resumed, first)| first < resumed)
        {
            (batch.attempts, batch.first_attempt_at) = (0, None);
        }
        batch.attempts = batch.attempts.saturating_add(1);
        let arrived_at = *batch.first_attempt_at.get_or_insert_with(clock::now);
        let happened_at = batch
            .format
            .first_event(&batch.body)
            .and_then(|event| happened_at(head(event).ok()?.timestamp));
        let events = batch.events.into();
        let in_flight =
            InFlight { batch, receipts: vec![receipt], happened_at, arrived_at, turn: Turn::Retry };
        self.attempt(events, arrived_at, Turn::Retry, slots, async move { in_flight });
    }

    fn begin_first(&mut self, slots: Slots) {
        let (events, bytes) = self.batcher.cut();
        let format = self.lane.subscriber.format;
        let arrived_at = events.first().map_or_else(clock::now, |e| e.arrived_at);
        self.attempt(events.len() as u64, arrived_at, Turn::First, slots, async move {
            first_attempt(format, events, bytes)
        });
    }

    /// Until a circuit that was open has been closed for long enough, first attempts are of small
    /// batches. Retries stay as they are.
    fn limit_batches(&mut self) {
        let batch = &self.lane.subscriber.batch;
        let whole = (batch.max_events, batch.max_bytes);
        let (events, bytes) = self
            .lane
            .breaker
            .ramp()
            .map_or(whole, |ramp| (ramp.batch(whole.0), ramp.batch(whole.1)));
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
        self.attempting.insert(
            number,
            UnderWay { events, arrived_at, generation: self.lane.generation, begun },
        );
        self.turns.begun(turn, clock::instant());
        self.tasks.spawn(async move {
            let in_flight = in_flight.await;
            let batch = &in_flight.batch;
            let started = clock::instant();
            let _counted =
                status.begins(batch.id.as_str(), batch.events, batch.body.len(), started);
            let Batch { attempts: attempt, format, replay, .. } = *batch;
            let request = Request {
                batch_id: batch.id.clone(),
                attempt,
                format,
                body: batch.body.clone(),
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

    /// `settled` tells the status of it once it is durable.
    fn settle(
        &mut self,
        receipts: Vec<Receipt>,
        settlement: Settlement,
        settled: impl FnOnce(&LaneStatus) + Send + 'static,
    ) {
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
        let oldest =
            self.attempting.values().map(|a| a.arrived_at).chain(front).chain(retries).min();
        let attempted: u64 = self.attempting.values().map(|a| a.events).sum();
        let retries: u64 = self.retries.iter().map(|(batch, _)| u64::from(batch.events)).sum();
        self.lane.status.holds(attempted + retries + self.batcher.len() as u64, oldest);
    }

    /// Puts what was taken where it belongs; what can never be delivered becomes a dead letter at
    /// once.
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
                            self.batcher.push(
                                Admitted { event, happened_at: happened_at(timestamp), arrived_at },
                                bytes,
                                now,
                            );
                        }
                        Err((reason, error)) => {
                            let Event { body, content_type, message_id, receipt, .. } = event;
                            dead.push((
                                receipt,
                                DeadLetter::of_event(
                                    body.into(),
                                    content_type,
                                    message_id,
                                    reason,
                                    error,
                                    time,
                                ),
                            ));
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
                subscriber = self.lane.subscriber.name.as_str(),
                events = recognised,
                "came again and were known: acked without an attempt"
            );
            self.settle(known, Settlement::Delivered, move |status| status.recognised(recognised));
        }
        if let Some((_, first)) = dead.first() {
            tracing::warn!(
                subscriber = self.lane.subscriber.name.as_str(),
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

    /// Makes of an event what goes into a batch, and returns its timestamp. One that cannot go
    /// stays as it was published.
    fn admit(&self, event: &mut Event) -> Result<Option<u64>, (Reason, String)> {
        let subscriber = &self.lane.subscriber;
        let too_large = || {
            format!(
                "its request body would have more than batch.max_bytes = {} bytes",
                subscriber.batch.max_bytes
            )
        };
        if !self.batcher.fits(event.body.len()) {
            return Err((Reason::TooLarge, too_large()));
        }
        let timestamp =
            head(&event.body).map_err(|e| (Reason::InvalidEvent, e.to_string()))?.timestamp;
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
                    // Its messages come again from the next session; the source itself says why it
                    // is gone.
                    Err(SettleError::Gone) => {}
                    // Whatever else ends the session: after this the next one begins later.
                    Err(SettleError::Unconfirmed(why)) => match self.end {
                        None | Some(End::Circuit | End::Paused | End::Configured) => {
                            self.end = Some(End::Unsettled(why))
                        }
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
    fn attempted(
        &mut self,
        mut in_flight: InFlight,
        outcome: Outcome,
        took: Duration,
        under_way: &UnderWay,
    ) {
        // Requests are still made as this one was.
        let current = under_way.generation == self.lane.generation;
        let now = clock::now();
        let mut attempt = in_flight.as_attempt(now);
        if let Some(failure) = outcome.failure() {
            in_flight.has_failed(failure, now);
        }
        let decided = |attempt: &Attempt| {
            decide(
                attempt,
                &outcome,
                current,
                &self.lane.health,
                &self.lane.subscriber.retry,
                now,
                clock::random(),
            )
        };
        let mut verdict = decided(&attempt);
        let mut halves = None;
        if matches!(verdict.disposition, Disposition::Split { .. }) {
            halves = in_flight.batch.halves();
            if halves.is_none() {
                // Its header counts more events than its body holds. Sent again at once, it would
                // be answered in the same way.
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
            Evidence::Accepted => {
                self.lane.breaker.on_success(begun, self.lane.subscriber.http.concurrency)
            }
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
    fn follow(
        &mut self,
        in_flight: InFlight,
        halves: Option<Vec<Batch>>,
        outcome: &Outcome,
        verdict: &Verdict,
    ) {
        match (verdict.disposition, outcome.failure()) {
            (Disposition::Delivered, _) => self.delivered(in_flight),
            (Disposition::Retry { delay } | Disposition::Split { delay }, _) => {
                self.again(in_flight, halves, delay)
            }
            (Disposition::DeadLetter(reason), Some(failure)) => {
                let letter = DeadLetter::of_batch(
                    in_flight.batch,
                    reason,
                    failure,
                    verdict.shortened,
                    clock::now(),
                );
                self.settle(in_flight.receipts, Settlement::Dead(vec![letter]), move |status| {
                    status.dead(reason, 1)
                });
            }
            (Disposition::Paused(PauseCause::Gone), _) => {
                self.pause(in_flight, "the receiver answered 410 Gone".to_owned(), "receiver")
            }
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
            (Disposition::DeadLetter(_) | Disposition::Paused(PauseCause::Exhausted), None)
            | (Disposition::GivenBack, _) => {}
        }
    }

    fn delivered(&mut self, in_flight: InFlight) {
        let (now, time) = (clock::instant(), clock::now());
        let since = |at: SystemTime| time.duration_since(at).ok();
        let (lag, since_arrival) =
            (in_flight.happened_at.and_then(since), since(in_flight.arrived_at));
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

    /// Keeps the batch and sends nothing more until the subscriber is resumed. The pause is
    /// recorded first: a batch alone would be attempted again at once.
    fn pause(&mut self, in_flight: InFlight, why: String, by: &str) {
        self.end.get_or_insert(End::Paused);
        let (queue, settler, name) =
            (self.lane.queue.clone(), self.settler.clone(), self.lane.subscriber.name.clone());
        let known =
            self.lane.standings.borrow().as_ref().is_some_and(|all| pause_of(all, &name).is_some());
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

    /// The one log event of an attempt, and what the status has of it: no body, no secret, no URL,
    /// and nothing that the receiver wrote, which may be what it was sent; that is in the dead
    /// letter alone.
    fn log(&self, batch: &Batch, took: Duration, outcome: &Outcome, verdict: &Verdict) {
        let failure = outcome.failure();
        let status = match outcome {
            Outcome::Delivered { status } => Some(*status),
            _ => failure.and_then(Failure::status),
        };
        let Some(disposition) = verdict.disposition.kind() else { return };
        let last_error = |f: &Failure| LastError {
            at: clock::now(),
            failure: f.kind(),
            status: f.status(),
            cause: f.cause().map(str::to_owned),
        };
        let ended = Ended { disposition, failure: failure.map(last_error), took };
        self.lane.status.ended(ended, clock::instant());
        let seconds = |d: Duration| d.as_millis() as f64 / 1000.0;
        macro_rules! attempt {
            ($level:ident) => {
                tracing::$level!(
                    subscriber = self.lane.subscriber.name.as_str(),
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
        let subscriber = self.lane.subscriber.name.as_str();
        match change {
            Change::Opened { failures, open_for } => tracing::warn!(
                subscriber,
                failures,
                open_for_s = open_for.as_secs_f64(),
                "circuit open: nothing is sent, the backlog stays in the queue; then one batch is tried"
            ),
            Change::StillOpen { open_for } => {
                tracing::warn!(
                    subscriber,
                    open_for_s = open_for.as_secs_f64(),
                    "circuit open again: the probe failed"
                )
            }
            Change::Closed => {
                tracing::info!(subscriber, "circuit closed: the subscriber accepts batches again")
            }
        }
    }
}

//! The worker of one subscriber: take, batch, splice, sign, send, settle.
//!
//! A lane works in sessions. A session opens the queue, and ends when the lane drains, the circuit
//! opens, or the queue is lost; before it ends it waits for its requests in flight and
//! settles what it can. What it has not settled is in the queue and comes again.

use std::{
    collections::VecDeque,
    fmt,
    sync::Arc,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use tokio::{sync::watch, task::JoinSet, time::sleep_until};

use crate::{
    batch::Batcher,
    circuit_breaker::{Change, CircuitBreaker, Permit},
    clock,
    config::Subscriber,
    event::event_type,
    payload::Format,
    queue::{
        DeadLetter, Envelope, Event, Kind, Queue, QueueError, Reason, Receipt, SettleError, Settlement, Settler, Source, Taken, Window,
    },
    retry::{Next, Pauses},
    webhook::{Failure, Outcome, Request, Webhook},
};

/// Messages taken from the source in one go: enough to make a wake-up cheap, few enough to look at
/// finished attempts in between.
const TAKE: usize = 256;

/// After a take that made no batch ready, how long events may gather before the next one. A wake-up for
/// each event costs more than the event; a batch that may wait at all may wait this long.
const GATHER: Duration = Duration::from_millis(1);

/// Between two sessions when the queue fails.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// A session that has nothing to do for so long has its queue, although nothing came to prove it by.
const STEADY: Duration = Duration::from_secs(3);

#[derive(Debug)]
pub struct Lane<Q> {
    subscriber: Arc<Subscriber>,
    queue: Q,
    webhook: Webhook,
    breaker: CircuitBreaker,
    trouble: Trouble,
}

/// A batch on its way: everything that the next attempt or the dead letter needs.
#[derive(Debug)]
struct Parcel {
    batch_id: String,
    body: Bytes,
    format: Format,
    events: u32,
    attempt: u32,
    first_attempt_at: SystemTime,
    receipts: Vec<Receipt>,
}

/// What a task of the session has done.
#[derive(Debug)]
enum Done {
    Attempted { parcel: Parcel, outcome: Outcome, took: Duration },
    Settled(Result<(), SettleError>),
}

/// Why a session ends.
#[derive(Debug)]
enum End {
    Drained,
    /// The circuit opened or is held; until when is the breaker's to say.
    Circuit,
    Lost(QueueError),
    Unsettled(String),
}

impl<Q: Queue> Lane<Q> {
    pub fn new(subscriber: Arc<Subscriber>, queue: Q, webhook: Webhook) -> Self {
        let breaker = CircuitBreaker::new(subscriber.circuit_breaker.clone());
        let trouble = Trouble { subscriber: subscriber.name.clone(), now: false };
        Self { subscriber, queue, webhook, breaker, trouble }
    }

    /// Works until `drain` becomes true and what is in flight is settled.
    pub async fn run(mut self, mut drain: watch::Receiver<bool>) {
        let mut pauses = Pauses::new(FIRST_PAUSE, LONGEST_PAUSE);
        loop {
            if let Permit::Wait(until) = self.breaker.permit(clock::instant()) {
                tokio::select! {
                    () = sleep_until(until.into()) => continue,
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
                        pauses.reset();
                    }
                    end
                }
                Err(e) => End::Lost(e),
            };
            let unsettled = matches!(end, End::Unsettled(_));
            match end {
                End::Drained => return self.trouble.is_over(),
                End::Circuit => {
                    self.trouble.is_over();
                    continue;
                }
                End::Lost(e) => self.trouble.is(&e),
                End::Unsettled(why) => self.trouble.is(&why),
            }
            let recover = async {
                tokio::time::sleep(pauses.grow()).await;
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

    /// How much to take: for each request in flight its batch and one that fills meanwhile.
    ///
    /// The same for a probe: a queue puts what it is given back behind all that it was given back
    /// before, so a probe that took less would change the order of the backlog.
    fn window(&self) -> Window {
        let slots = self.subscriber.http.concurrency;
        let clamp = |n: usize| u16::try_from(n).unwrap_or(u16::MAX);
        Window { events: clamp(2 * slots * self.subscriber.batch.max_events), envelopes: clamp(slots) }
    }
}

/// Completes when the lane is to end. If the sender is gone, nobody is left to work for.
async fn drained(drain: &mut watch::Receiver<bool>) {
    drain.wait_for(|d| *d).await.ok();
}

/// Logs when the queue fails and when it works again, not each try. That it can be opened does not
/// mean that it works: some queues open each time and fail at the first use.
#[derive(Debug)]
struct Trouble {
    subscriber: String,
    now: bool,
}

impl Trouble {
    fn is(&mut self, why: &dyn fmt::Display) {
        if std::mem::replace(&mut self.now, true) {
            tracing::debug!(subscriber = self.subscriber, error = %why, "the lane's queue still fails");
        } else {
            tracing::warn!(subscriber = self.subscriber, error = %why, "the lane lost its queue; it opens it again");
        }
    }

    fn is_over(&mut self) {
        if std::mem::take(&mut self.now) {
            tracing::warn!(subscriber = self.subscriber, "the lane has its queue again");
        }
    }
}

struct Session<'l, Q: Queue> {
    lane: &'l mut Lane<Q>,
    settler: Q::Settler,
    batcher: Batcher<Event>,
    envelopes: VecDeque<(Envelope, Receipt)>,
    tasks: JoinSet<Done>,
    attempting: usize,
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
            envelopes: VecDeque::new(),
            tasks: JoinSet::new(),
            attempting: 0,
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
        loop {
            self.begin();
            if self.end.is_some() && self.tasks.is_empty() {
                break;
            }
            let open = self.end.is_none();
            let take = open && gathering.is_none();
            let due = if self.may_begin() { self.batcher.due() } else { None };
            let idle = self.tasks.is_empty() && self.envelopes.is_empty() && self.batcher.due().is_none();
            tokio::select! {
                biased;
                () = drained(drain), if open => self.end = Some(End::Drained),
                Some(done) = self.tasks.join_next(), if !self.tasks.is_empty() => match done {
                    Ok(done) => self.done(done),
                    // A panic of a task is one of the lane: the supervisor counts it and restarts.
                    Err(e) => std::panic::resume_unwind(e.into_panic()),
                },
                () = sleep_until(gathering.unwrap_or_else(clock::instant).into()), if gathering.is_some() => gathering = None,
                result = source.take(&mut taken, TAKE), if take => {
                    self.sort(taken.drain(..));
                    let now = clock::instant();
                    gathering = (gathers && self.envelopes.is_empty() && !self.batcher.ready(now)).then_some(now + GATHER);
                    if let Err(e) = result {
                        self.end = Some(End::Lost(e));
                    }
                }
                () = sleep_until(due.unwrap_or_else(clock::instant).into()), if due.is_some() => {}
                () = sleep_until((opened + STEADY).into()), if self.lane.trouble.now && open && idle => self.lane.trouble.is_over(),
            }
        }
        source.close().await;
        self.end.take().unwrap_or(End::Drained)
    }

    /// While a settlement is not confirmed nothing new is begun: it may be the queue that fails, and
    /// then attempts would be made that have to be made again.
    fn may_begin(&mut self) -> bool {
        let slots = match self.lane.breaker.permit(clock::instant()) {
            Permit::Flow => self.lane.subscriber.http.concurrency,
            Permit::Probe => 1,
            Permit::Wait(_) => 0,
        };
        self.end.is_none() && self.settling == 0 && self.attempting < slots
    }

    /// Starts as many attempts as there are slots and full batches, retries first.
    fn begin(&mut self) {
        while self.may_begin() {
            if let Some((envelope, receipt)) = self.envelopes.pop_front() {
                let parcel = Parcel {
                    batch_id: envelope.batch_id,
                    body: envelope.body,
                    format: envelope.format,
                    events: envelope.events,
                    attempt: envelope.attempts.saturating_add(1),
                    first_attempt_at: envelope.first_attempt_at.unwrap_or_else(clock::now),
                    receipts: vec![receipt],
                };
                self.attempt(async move { parcel });
            } else if self.batcher.ready(clock::instant()) {
                let (events, bytes) = self.batcher.cut();
                let format = self.lane.subscriber.format;
                self.attempt(async move { first_parcel(format, &events, bytes) });
            } else {
                return;
            }
        }
    }

    fn attempt(&mut self, parcel: impl Future<Output = Parcel> + Send + 'static) {
        let webhook = self.lane.webhook.clone();
        self.attempting += 1;
        self.tasks.spawn(async move {
            let parcel = parcel.await;
            let started = clock::instant();
            let request =
                Request { batch_id: parcel.batch_id.clone(), attempt: parcel.attempt, format: parcel.format, body: parcel.body.clone() };
            let outcome = webhook.send(request).await;
            Done::Attempted { parcel, outcome, took: clock::instant() - started }
        });
    }

    fn settle(&mut self, receipts: Vec<Receipt>, settlement: Settlement) {
        let settler = self.settler.clone();
        self.settling += 1;
        self.tasks.spawn(async move { Done::Settled(settler.settle(receipts, settlement).await) });
    }

    /// Puts what was taken where it belongs; what can never be delivered becomes a dead letter at once.
    fn sort(&mut self, taken: impl Iterator<Item = Taken>) {
        let now = clock::instant();
        let mut dead = Vec::new();
        for item in taken {
            match item {
                Taken::Envelope(envelope, receipt) => self.envelopes.push_back((envelope, receipt)),
                Taken::NotAnEnvelope(letter, receipt) => dead.push((receipt, letter)),
                Taken::Event(event) => match self.refusal(&event.body) {
                    None => {
                        let bytes = event.body.len();
                        self.batcher.push(event, bytes, now);
                    }
                    Some((reason, error)) => dead.push((event.receipt, dead_event(event, reason, error))),
                },
            }
        }
        if let Some((_, first)) = dead.first() {
            tracing::warn!(
                subscriber = self.lane.subscriber.name,
                letters = dead.len(),
                reason = first.reason.name(),
                error = first.error,
                "dead-lettered without an attempt"
            );
            let (receipts, letters) = dead.into_iter().unzip();
            self.settle(receipts, Settlement::Dead(letters));
        }
    }

    fn refusal(&self, body: &[u8]) -> Option<(Reason, String)> {
        if !self.batcher.fits(body.len()) {
            let limit = self.lane.subscriber.batch.max_bytes;
            return Some((Reason::TooLarge, format!("its request body would have more than batch.max_bytes = {limit} bytes")));
        }
        event_type(body).err().map(|e| (Reason::InvalidEvent, e.to_string()))
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
                    Err(SettleError::Unconfirmed(why)) => {
                        self.end.get_or_insert(End::Unsettled(why));
                    }
                }
            }
            Done::Attempted { parcel, outcome, took } => {
                self.attempting -= 1;
                self.attempted(parcel, outcome, took);
            }
        }
    }

    fn attempted(&mut self, parcel: Parcel, outcome: Outcome, took: Duration) {
        let now = clock::instant();
        let change = match &outcome {
            Outcome::Delivered { .. } => self.lane.breaker.on_success(),
            Outcome::Retry { retry_after, .. } => {
                let change = self.lane.breaker.on_failure(now);
                if let Some(wait) = retry_after {
                    self.lane.breaker.hold(now, *wait);
                }
                change
            }
        };
        match outcome {
            Outcome::Delivered { status } => {
                self.log(&parcel, took, "delivered", Some(status), None, None);
                self.settle(parcel.receipts, Settlement::Delivered);
            }
            Outcome::Retry { failure, retry_after } => self.failed(parcel, &failure, retry_after, took),
        }
        if let Some(change) = change {
            self.log_change(change);
        }
        if let Permit::Wait(_) = self.lane.breaker.permit(now) {
            self.end.get_or_insert(End::Circuit);
        }
    }

    fn failed(&mut self, parcel: Parcel, failure: &Failure, retry_after: Option<Duration>, took: Duration) {
        let now = clock::now();
        let next = self.lane.subscriber.retry.next(parcel.attempt, parcel.first_attempt_at, now, retry_after, clock::random());
        match next {
            Next::After(delay) => {
                self.log(&parcel, took, "retry", failure.status(), Some(failure), Some(delay));
                let envelope = Envelope {
                    batch_id: parcel.batch_id,
                    body: parcel.body,
                    format: parcel.format,
                    events: parcel.events,
                    attempts: parcel.attempt,
                    first_attempt_at: Some(parcel.first_attempt_at),
                };
                self.settle(parcel.receipts, Settlement::Retry { envelope, delay });
            }
            Next::Exhausted => {
                self.log(&parcel, took, "dead_letter", failure.status(), Some(failure), None);
                let letter = DeadLetter {
                    kind: Kind::Batch,
                    reason: Reason::Exhausted,
                    body: parcel.body,
                    content_type: Some(parcel.format.content_type().to_owned()),
                    id: Some(parcel.batch_id),
                    events: parcel.events,
                    attempts: parcel.attempt,
                    status: failure.status(),
                    error: failure.to_string(),
                    first_attempt_at: Some(parcel.first_attempt_at),
                    died_at: Some(now),
                };
                self.settle(parcel.receipts, Settlement::Dead(vec![letter]));
            }
        }
    }

    /// The one log event of an attempt: no body, no secret, no URL, and nothing that the receiver wrote,
    /// which may be what it was sent; that is in the dead letter alone.
    fn log(&self, parcel: &Parcel, took: Duration, outcome: &str, status: Option<u16>, failure: Option<&Failure>, next: Option<Duration>) {
        macro_rules! attempt {
            ($level:ident) => {
                tracing::$level!(
                    subscriber = self.lane.subscriber.name,
                    batch_id = parcel.batch_id,
                    attempt = parcel.attempt,
                    events = parcel.events,
                    bytes = parcel.body.len(),
                    outcome,
                    status,
                    failure = failure.map(Failure::name),
                    error = failure.and_then(Failure::cause),
                    duration_ms = took.as_millis() as u64,
                    next_attempt_in_s = next.map(|d| d.as_millis() as f64 / 1000.0),
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
            Change::Closed => tracing::warn!(subscriber, "circuit closed: the subscriber accepts batches again"),
        }
    }
}

/// The batch of a first attempt; from here on its bytes and its id do not change.
fn first_parcel(format: Format, events: &[Event], bytes: usize) -> Parcel {
    Parcel {
        batch_id: clock::batch_id(),
        body: format.splice(events.iter().map(|e| e.body.as_slice()), bytes).into(),
        format,
        events: u32::try_from(events.len()).unwrap_or(u32::MAX),
        attempt: 1,
        first_attempt_at: clock::now(),
        receipts: events.iter().map(|e| e.receipt).collect(),
    }
}

fn dead_event(event: Event, reason: Reason, error: String) -> DeadLetter {
    DeadLetter {
        kind: Kind::Event,
        reason,
        body: event.body.into(),
        content_type: Some(event.content_type.unwrap_or_else(|| "application/json".to_owned())),
        id: event.message_id,
        events: 1,
        attempts: 0,
        status: None,
        error,
        first_attempt_at: None,
        died_at: Some(clock::now()),
    }
}

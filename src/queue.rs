//! What delivery needs of a queue, in hooktrail's words.
//!
//! One implementation for each kind of queue; nothing outside of it knows the queue's protocol.

pub mod amqp;
pub mod embedded;
mod waiting;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    future::Future,
    sync::Arc,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use tokio::sync::watch;

pub use self::waiting::{Hastened, Waiting, WaitingList};
use crate::{
    clock,
    config::{Subscriber, Subscribers, changes::is_drastic},
    finding::Finding,
    payload::Format,
};

/// The queue as the daemon uses it.
pub trait Queue: Clone + Send + Sync + 'static {
    type Source: Source;
    type Settler: Settler;
    type DeadLetters: DeadLetters;

    /// Makes ready what the subscribers need, at the start and each time that others are configured; what they need no
    /// more stays until [`chores`](Self::chores) sees to it. Waits for the queue without end. What only one subscriber
    /// needs is a concern of [`open`](Self::open): returns the names of those who do not have it yet.
    ///
    /// # Errors
    /// What there is cannot be used and will not change by itself.
    fn prepare(&self, subscribers: &[Arc<Subscriber>]) -> impl Future<Output = Result<BTreeSet<String>, QueueError>> + Send;

    /// What is to be done beside the lanes, such as taking away what only earlier configurations
    /// needed. Ends soon after `stopping` became true, with nothing half done that would be done twice.
    fn chores(&self, subscribers: watch::Receiver<Subscribers>, stopping: watch::Receiver<bool>) -> impl Future<Output = ()> + Send;

    /// Says goodbye, when the lanes have ended.
    fn close(&self) -> impl Future<Output = ()> + Send;

    /// Begins to take from a subscriber's queue. What was taken before and not settled comes again.
    fn open(
        &self,
        subscriber: &Subscriber,
        window: Window,
    ) -> impl Future<Output = Result<(Self::Source, Self::Settler), QueueError>> + Send;

    /// Waits until retries and dead letters can be written again.
    fn writable(&self) -> impl Future<Output = ()> + Send;

    /// Makes ready what is missing for events to wait for a daemon that has not run yet. Changes nothing
    /// that is there.
    ///
    /// # Errors
    /// The queue refuses, and why.
    fn ensure(&self, subscribers: &[Arc<Subscriber>]) -> impl Future<Output = Result<(), QueueError>> + Send;

    /// Stores events for all whose patterns match them, and returns when that is durable: what became of
    /// each, in order. At most [`MAX_GROUP`] at once.
    ///
    /// # Errors
    /// It is not known whether they are stored.
    fn publish(&self, events: Vec<NewEvent>) -> impl Future<Output = Result<Vec<Published>, QueueError>> + Send;

    /// Whether events could be stored now, as far as is known without asking.
    fn is_reachable(&self) -> bool {
        true
    }

    /// What keeps the queue from its work, as far as it was noticed. One that notices nothing has none.
    fn troubles(&self) -> watch::Receiver<Troubles> {
        watch::Sender::default().subscribe()
    }

    /// Whether events come faster than they are stored, so that new ones should come later.
    fn is_behind(&self) -> bool {
        false
    }

    /// Who may be unbound because the configuration does not have it any more.
    fn removals(&self) -> &Removals;

    /// Who is paused and who was resumed, as every daemon on the same queues records it; `None` until that is known.
    fn standings(&self) -> watch::Receiver<Option<Standings>>;

    /// Records that a subscriber is paused or resumed, and returns when that is durable and in [`standings`](Self::standings).
    ///
    /// # Errors
    /// It is not known whether it was recorded.
    fn record(&self, subscriber: &str, standing: Standing) -> impl Future<Output = Result<(), QueueError>> + Send;

    /// # Errors
    /// Nothing is known of such a subscriber, or the queue cannot be reached.
    fn dead_letters(&self, subscriber: &str) -> impl Future<Output = Result<Self::DeadLetters, QueueError>> + Send;

    /// What waits for its next attempt, what is due and not taken yet among it.
    ///
    /// # Errors
    /// Nothing is known of such a subscriber, or the queue cannot be reached; nothing has changed.
    fn waiting(&self, subscriber: &str) -> impl Future<Output = Result<WaitingList, QueueError>> + Send;

    /// Makes the next attempt due now, of all that waits or of the batches with these ids. Bytes, ids and attempts stay as they are;
    /// what waits for other subscribers keeps its order and its time.
    ///
    /// # Errors
    /// Nothing is known of such a subscriber, or the queue was lost. What was not moved by then still waits as it did; how
    /// many were, the error says.
    fn hasten(&self, subscriber: &str, ids: Option<BTreeSet<String>>) -> impl Future<Output = Result<Hastened, QueueError>> + Send;

    /// How much there is in the queues of these subscribers, and what is left of others.
    ///
    /// # Errors
    /// The queue cannot be asked.
    fn depths(&self, subscribers: &[Arc<Subscriber>]) -> impl Future<Output = Result<Depths, QueueError>> + Send;

    /// Who gets events, as the queue has it recorded: for commands, which do not know whether a daemon runs and with which configuration.
    ///
    /// # Errors
    /// The queue cannot be asked.
    fn bound(&self) -> impl Future<Output = Result<BTreeSet<String>, QueueError>> + Send;

    /// Deletes what there is of a subscriber that is not configured any more.
    ///
    /// # Errors
    /// Somebody still works with it; or it holds something, unless `with_events` says that this is to be lost; or the queue
    /// cannot be asked.
    fn prune(&self, subscriber: &str, with_events: bool) -> impl Future<Output = Result<(), QueueError>> + Send;

    /// What there is for this configuration and what can go wrong with it, without changing anything; what could not
    /// be looked at is said. In bounded time, but for the time that a broker takes which answers slowly.
    ///
    /// # Errors
    /// The queue cannot be asked at all.
    fn inspect(&self, subscribers: &[Arc<Subscriber>]) -> impl Future<Output = Result<Vec<Finding>, QueueError>> + Send;
}

/// What keeps a queue from its work, by what it is about, each with its cause. It ends by itself or needs an operator; whoever
/// asks how the daemon is has to see it either way.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Troubles(BTreeMap<String, (Harms, String)>);

/// What a trouble keeps from being done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Harms {
    /// Something beside delivery, such as taking events in.
    Queue,
    /// Every lane.
    Lanes,
    Subscriber(String),
}

impl Troubles {
    /// Returns whether that is new.
    pub fn begins(&mut self, about: &str, harms: Harms, why: String) -> bool {
        self.0.insert(about.to_owned(), (harms, why.clone())).is_none_or(|(_, before)| before != why)
    }

    /// Returns whether there was one.
    pub fn ends(&mut self, about: &str) -> bool {
        self.0.remove(about).is_some()
    }

    /// Forgets those that are about something else.
    pub fn retain(&mut self, wanted: impl Fn(&str) -> bool) -> bool {
        let before = self.0.len();
        self.0.retain(|about, _| wanted(about));
        self.0.len() != before
    }

    pub fn has(&self, about: &str) -> bool {
        self.0.contains_key(about)
    }

    /// Why the queue as a whole does not work as it should; what harms delivery comes first.
    pub fn of_queue(&self) -> Option<String> {
        let of = |wanted: Harms| self.0.values().filter(move |(harms, _)| *harms == wanted).map(|(_, why)| why.as_str());
        let mut all: Vec<&str> = Vec::new();
        for why in of(Harms::Lanes).chain(of(Harms::Queue)) {
            // Several connections fail for the same reason.
            if !all.contains(&why) {
                all.push(why);
            }
        }
        (!all.is_empty()).then(|| all.join("; "))
    }

    /// Why a subscriber does not get what it should.
    pub fn of_subscriber(&self, name: &str) -> Option<&str> {
        let find = |concerns: &dyn Fn(&Harms) -> bool| self.0.values().find(|(harms, _)| concerns(harms)).map(|(_, why)| why.as_str());
        find(&|harms| *harms == Harms::Lanes).or_else(|| find(&|harms| matches!(harms, Harms::Subscriber(s) if s == name)))
    }
}

/// Says which subscribers a queue may unbind. Clones are the same.
///
/// Events that are published while a subscriber is not bound are lost to it, and a start whose files were away looks like one whose
/// subscribers were removed. So where a start would unbind all that are bound, or most of many, none is unbound before an operator has
/// asked for it. What the running daemon is given later is judged by the reload.
#[derive(Debug, Clone, Default)]
pub struct Removals(Arc<watch::Sender<Judged>>);

#[derive(Debug, Clone, Default, PartialEq, Eq)]
enum Judged {
    /// It is not known yet who is bound.
    #[default]
    Not,
    /// All may be unbound but these.
    Kept(BTreeSet<String>),
    Held(HeldRemovals),
}

/// Of all that were `bound` when the daemon started, `missing` are not configured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeldRemovals {
    pub bound: BTreeSet<String>,
    pub missing: BTreeSet<String>,
}

impl Removals {
    /// For the queue, when it knows who is bound by what came before, and each time that others are configured.
    pub(crate) fn judge(&self, bound: &BTreeSet<String>, wanted: &BTreeSet<String>) {
        self.0.send_if_modified(|judged| {
            let new = match judged {
                Judged::Kept(_) => return false,
                Judged::Not if !is_drastic(bound, wanted) => Judged::Kept(wanted.clone()),
                Judged::Not => Judged::Held(HeldRemovals { bound: bound.clone(), missing: bound - wanted }),
                // Files may come back one by one: until all are there, it is as it was.
                Judged::Held(held) if held.bound.is_subset(wanted) => Judged::Kept(wanted.clone()),
                Judged::Held(held) => Judged::Held(HeldRemovals { missing: &held.bound - wanted, ..held.clone() }),
            };
            let changed = *judged != new;
            if let (Judged::Not, Judged::Held(held)) = (&*judged, &new) {
                tracing::error!(subscribers = ?held.missing, "not unbound: {held}");
            }
            *judged = new;
            changed
        });
    }

    /// Whether a subscriber that is not configured may be unbound.
    pub(crate) fn may_unbind(&self, subscriber: &str) -> bool {
        matches!(&*self.0.borrow(), Judged::Kept(kept) if !kept.contains(subscriber))
    }

    /// Whether subscribers that are not configured may be bound and get events: so it is until it is known who is bound, and while
    /// removals wait for an operator.
    pub fn others_may_be_bound(&self) -> bool {
        !matches!(&*self.0.borrow(), Judged::Kept(_))
    }

    /// Changes when somebody may be unbound who was not before.
    pub(crate) fn changes(&self) -> watch::Receiver<impl Sized + use<>> {
        self.0.subscribe()
    }

    /// These are configured from now on. What was held at the start stays so unless an operator has asked for this.
    pub fn configure(&self, names: BTreeSet<String>, by_operator: bool) -> Before {
        let mut before = Judged::Not;
        self.0.send_modify(|judged| {
            before.clone_from(judged);
            if by_operator || matches!(judged, Judged::Kept(_)) {
                *judged = Judged::Kept(names);
            }
        });
        Before(before)
    }

    /// Those of [`configure`](Self::configure) are not in use after all.
    pub fn restore(&self, before: Before) {
        self.0.send_replace(before.0);
    }

    /// Who is not unbound before an operator has asked for it.
    pub fn held(&self) -> Option<HeldRemovals> {
        match &*self.0.borrow() {
            Judged::Held(held) => Some(held.clone()),
            Judged::Not | Judged::Kept(_) => None,
        }
    }
}

/// What [`Removals::configure`] has changed.
#[derive(Debug)]
pub struct Before(Judged);

impl fmt::Display for HeldRemovals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} of the {} subscribers that are bound are not configured ({}). A start alone does not unbind so many: they go on getting events \
             until `hooktrail reload`, SIGHUP or POST /api/v1/reload says that it is meant",
            self.missing.len(),
            self.bound.len(),
            some_of(&self.missing)
        )
    }
}

/// The first few names of many, and how many there are beside them.
pub fn some_of(names: &BTreeSet<String>) -> String {
    const SHOWN: usize = 5;
    let shown = names.iter().take(SHOWN).map(String::as_str).collect::<Vec<_>>().join(", ");
    match names.len().saturating_sub(SHOWN) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

/// Of each subscriber that was ever paused, what was recorded last.
pub type Standings = Arc<BTreeMap<String, Standing>>;

/// Whether a subscriber gets what waits for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Standing {
    Paused(Pause),
    /// Attempts and elapsed time of batches from before then begin anew.
    Resumed {
        at: SystemTime,
    },
}

impl Standing {
    pub fn pause(&self) -> Option<&Pause> {
        match self {
            Self::Paused(pause) => Some(pause),
            Self::Resumed { .. } => None,
        }
    }
}

/// Why a subscriber gets nothing until it is resumed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pause {
    /// For an operator to read.
    pub why: String,
    pub since: SystemTime,
    /// `receiver`, `retry.on_exhausted` or `operator`.
    pub by: String,
}

/// An event on its way into the queue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewEvent {
    pub event_type: String,
    pub message_id: Option<String>,
    pub body: Bytes,
    /// The producer's, as W3C Trace Context has it.
    pub traceparent: Option<Arc<str>>,
}

/// How much a subscriber has in its queues, without what lanes have taken.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Depth {
    /// Events to deliver.
    pub events: u64,
    /// Batches whose time to be tried again has come.
    pub retries: u64,
    /// Batches whose time has not come. 0 on RabbitMQ, where they are counted for all subscribers together.
    pub delayed: u64,
    pub dead: u64,
}

impl Depth {
    pub fn is_empty(self) -> bool {
        self == Self::default()
    }

    /// Batches to be tried again, as far as they are counted for the subscriber alone.
    pub const fn batches(self) -> u64 {
        self.retries + self.delayed
    }
}

/// How much there is in the queues.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Depths {
    /// By subscriber; those without queues are not there.
    pub subscribers: BTreeMap<String, Depth>,
    /// Of subscribers that are not configured any more and were not pruned.
    pub removed: BTreeMap<String, Depth>,
    /// Batches of all subscribers whose time to be tried again has not come; `None` where they are counted for
    /// [each](Depth::delayed).
    pub delayed: Option<u64>,
    /// What could not be routed back.
    pub orphans: u64,
}

/// W3C Trace Context has 55 characters; what is far longer is something else.
pub const MAX_TRACEPARENT: usize = 256;

/// How many events are best published in one call: they become durable together.
pub const MAX_GROUP: usize = 1000;

/// What became of published events.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Published {
    Stored,
    /// No pattern matches its type, so nobody gets it.
    Unmatched,
    Refused,
}

/// A walk through dead letters, oldest first. What is neither replayed nor purged keeps its order.
///
/// Takes no memory for what it has passed by, however many there are.
pub trait DeadLetters: Send {
    /// How many there are still to come. Those that die during the walk are not part of it.
    fn left(&self) -> u32;

    /// # Errors
    /// The queue was lost; nothing has gone but what was replayed or purged.
    fn next(&mut self) -> impl Future<Output = Result<Option<Held>, QueueError>> + Send;

    /// Sends letters on their way again: durable first, and only then no dead letters any more. Returns
    /// those whose subscriber has no queue any more: they stay where they are.
    ///
    /// # Errors
    /// Those that are not on their way are still dead letters.
    fn replay(&mut self, letters: Vec<Held>) -> impl Future<Output = Result<Vec<Held>, QueueError>> + Send;

    /// Deletes letters for good.
    ///
    /// # Errors
    /// The queue was lost; those that are not deleted are still there.
    fn purge(&mut self, letters: Vec<Held>) -> impl Future<Output = Result<(), QueueError>> + Send;

    /// Gives back what was looked at, in its order.
    ///
    /// # Errors
    /// The queue was lost before it answered; the letters are still there.
    fn close(self) -> impl Future<Output = Result<(), QueueError>> + Send;
}

/// A dead letter of a walk.
#[derive(Debug)]
pub struct Held {
    pub letter: DeadLetter,
    /// Whose it is; of an orphan that is not always known.
    pub subscriber: Option<String>,
    pub(crate) tag: u64,
}

impl Held {
    /// For programs, without its body and its story; `number` is its place in the walk, from 1.
    pub fn as_json(&self, number: usize) -> serde_json::Value {
        let l = &self.letter;
        serde_json::json!({
            "number": number,
            "subscriber": self.subscriber,
            "id": l.id,
            "kind": l.kind.name(),
            "reason": l.reason.name(),
            "status": l.status,
            "error": l.error,
            "events": l.events,
            "attempts": l.attempts,
            "first_attempt_at": l.first_attempt_at.map(clock::rfc3339),
            "died_at": l.died_at.map(clock::rfc3339),
            "content_type": l.content_type,
            "content_encoding": l.content_encoding,
            "bytes": l.body.len(),
        })
    }
}

#[cfg(test)]
impl Held {
    /// For a queue that needs no tag.
    pub(crate) fn new(letter: DeadLetter, subscriber: Option<String>) -> Self {
        Self { letter, subscriber, tag: 0 }
    }
}

/// The bytes of events that a lane takes from a broker and has not settled, unless [`FEWEST`] of them are more.
pub const MOST_BYTES: u64 = 64 << 20;

/// So many events are taken whatever their size: the first of a queue, whose sizes nobody knows, and the largest.
pub const FEWEST: u16 = 16;

/// How much may be taken and not yet settled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    pub events: u16,
    pub envelopes: u16,
}

impl Window {
    /// Of a subscriber: for each request in flight its batch and one that fills meanwhile.
    pub fn of(subscriber: &Subscriber) -> Self {
        let slots = subscriber.http.concurrency;
        let clamp = |n: usize| u16::try_from(n).unwrap_or(u16::MAX);
        Self { events: clamp(2 * slots * subscriber.batch.max_events), envelopes: clamp(slots) }
    }

    /// The longest that a message of this window is held before it is settled, if each batch has so many
    /// events and each attempt takes [all the time it may](Subscriber::longest_attempt): its wait for company, the attempts before its
    /// own, and that. Retries that are due come on top.
    pub fn longest_hold(self, subscriber: &Subscriber, events_in_a_batch: usize) -> Duration {
        let at_once = subscriber.http.concurrency * events_in_a_batch.max(1);
        let attempts = usize::from(self.events).div_ceil(at_once).max(1);
        subscriber.batch.max_wait + subscriber.longest_attempt().saturating_mul(u32::try_from(attempts).unwrap_or(u32::MAX))
    }

    /// With fewer events in each batch than this a message of this window could be held for longer than `limit`; with as many as a
    /// batch may have that is not looked at.
    pub fn fewest_events(self, subscriber: &Subscriber, limit: Duration) -> usize {
        // The more events in a batch, the fewer attempts, so that the hold only falls.
        let (mut few, mut enough) = (0, subscriber.batch.max_events);
        while enough - few > 1 {
            let middle = few + (enough - few) / 2;
            if self.longest_hold(subscriber, middle) > limit { few = middle } else { enough = middle }
        }
        enough
    }
}

/// The taking end of a subscriber's queue.
pub trait Source: Send {
    /// Waits for at least one message and appends those that are there, at most about `max`,
    /// envelopes before events. Can be dropped while it waits without losing any.
    ///
    /// # Errors
    /// The queue is gone: whatever was taken from this source comes again from the next.
    fn take(&mut self, into: &mut Vec<Taken>, max: usize) -> impl Future<Output = Result<(), QueueError>> + Send;

    /// Nothing more is taken before something is settled, although the window would allow it: what is held is large.
    fn is_full(&self) -> bool {
        false
    }

    /// Gives back what was not settled, to the places it had.
    fn close(self) -> impl Future<Output = ()> + Send;
}

/// The settling end. Clones settle for the same source.
pub trait Settler: Clone + Send + Sync + 'static {
    /// Makes the settlement durable, then takes the messages out of the queue.
    ///
    /// # Errors
    /// The messages are still in the queue and come again.
    fn settle(&self, receipts: Vec<Receipt>, settlement: Settlement) -> impl Future<Output = Result<(), SettleError>> + Send;
}

/// Stands for a message that was taken, at the source it was taken from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Receipt {
    pub(crate) from: Kind,
    pub(crate) tag: u64,
}

/// What a message holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    Event,
    Batch,
}

impl Kind {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Event => "event",
            Self::Batch => "batch",
        }
    }
}

/// A message as it was taken.
#[derive(Debug)]
pub enum Taken {
    Event(Event),
    Envelope(Envelope, Receipt),
    /// A message that is no envelope where one should be, or no event that can be read, as the dead letter that it becomes.
    Unusable(DeadLetter, Receipt),
    /// What comes again although it was settled: only its ack was lost. To be acked, and not attempted.
    Known {
        events: u32,
        receipt: Receipt,
    },
}

/// An event as it was published; whether it is a valid one is for the lane to say.
#[derive(Debug)]
pub struct Event {
    pub body: Vec<u8>,
    /// The producer's, if there is one.
    pub message_id: Option<String>,
    pub content_type: Option<String>,
    /// When it was published, where the queue tells that.
    pub published_at: Option<SystemTime>,
    /// The producer's, as W3C Trace Context has it.
    pub traceparent: Option<String>,
    pub receipt: Receipt,
}

/// A batch that failed at least once: everything that makes the next attempt the same request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Envelope {
    pub batch_id: String,
    /// The exact request body.
    pub body: Bytes,
    pub format: Format,
    pub events: u32,
    /// Attempts made; 0 after a replay.
    pub attempts: u32,
    /// Of the first attempt; `None` before it.
    pub first_attempt_at: Option<SystemTime>,
    /// Of the first event's producer, as W3C Trace Context has it.
    pub traceparent: Option<String>,
    pub story: Story,
    /// An operator has sent it again: it was a dead letter once.
    pub replay: bool,
}

/// The failed attempts of a batch, the first and the last of them: enough to see how it went, and bounded.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Story {
    attempts: Vec<FailedAttempt>,
    left_out: u32,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FailedAttempt {
    /// As the request told it: begins anew with a replay or a resume, and for the parts of a split batch.
    pub number: u32,
    /// When it was over.
    pub at: SystemTime,
    pub came_to: CameTo,
}

/// What a failed attempt came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CameTo {
    Status(u16),
    /// The stable name of a failure without an answer, such as `timeout`.
    Failure(String),
}

impl fmt::Display for CameTo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Status(status) => write!(f, "{status}"),
            Self::Failure(name) => f.write_str(name),
        }
    }
}

impl Story {
    /// So many from the beginning are kept, and so many from the end.
    pub const FIRST: usize = 5;
    pub const LAST: usize = 45;

    /// A failure's name may have as many bytes.
    const MAX_NAME: usize = 32;

    pub fn add(&mut self, attempt: FailedAttempt) {
        if self.attempts.len() == Self::FIRST + Self::LAST {
            self.attempts.remove(Self::FIRST);
            self.left_out = self.left_out.saturating_add(1);
        }
        self.attempts.push(attempt);
    }

    /// The first and the last attempts, and how many are left out between them.
    pub fn parts(&self) -> (&[FailedAttempt], u32, &[FailedAttempt]) {
        let (first, last) = self.attempts.split_at(self.attempts.len().min(Self::FIRST));
        (first, self.left_out, last)
    }

    pub fn is_empty(&self) -> bool {
        self.attempts.is_empty()
    }

    /// The last attempt that failed.
    pub fn last(&self) -> Option<&FailedAttempt> {
        self.attempts.last()
    }

    /// As both queues keep it, at most 3 KiB: `1@1735830138123=503,2@1735830143127=timeout`, times in Unix
    /// milliseconds, and `+7` where seven are left out.
    pub(crate) fn to_text(&self) -> String {
        let (first, left_out, last) = self.parts();
        let one = |a: &FailedAttempt| {
            let at = a.at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_millis();
            format!("{}@{at}={}", a.number, a.came_to)
        };
        let gap = (left_out > 0).then(|| format!("+{left_out}"));
        first.iter().map(one).chain(gap).chain(last.iter().map(one)).collect::<Vec<_>>().join(",")
    }

    /// What cannot be read is no part of it: a story is for looking at, and must not keep its batch from being sent.
    pub(crate) fn from_text(text: &str) -> Self {
        let mut story = Self::default();
        for part in text.split(',') {
            if let Some(left_out) = part.strip_prefix('+').and_then(|n| n.parse::<u32>().ok()) {
                story.left_out = story.left_out.saturating_add(left_out);
            } else if let Some(attempt) = Self::attempt(part) {
                story.add(attempt);
            }
        }
        // Nothing is left out between no attempts.
        if story.is_empty() { Self::default() } else { story }
    }

    fn attempt(text: &str) -> Option<FailedAttempt> {
        let (number, rest) = text.split_once('@')?;
        let (at, came_to) = rest.split_once('=')?;
        // As far as RFC 3339 goes: a later time could not be shown.
        let at = at.parse().ok().filter(|ms| *ms < 253_402_300_800_000)?;
        let is_name =
            !came_to.is_empty() && came_to.len() <= Self::MAX_NAME && came_to.bytes().all(|b| b.is_ascii_lowercase() || b == b'_');
        let came_to = match came_to.parse() {
            Ok(status) => CameTo::Status(status),
            Err(_) => CameTo::Failure(is_name.then(|| came_to.to_owned())?),
        };
        Some(FailedAttempt { number: number.parse().ok()?, at: SystemTime::UNIX_EPOCH + Duration::from_millis(at), came_to })
    }
}

/// Why something was given up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    Exhausted,
    /// The receiver does not accept it, and accepts others.
    Refused,
    InvalidEvent,
    TooLarge,
    /// The broker's own doing: more deliveries than a policy allows.
    DeliveryLimit,
    /// The broker's own doing: a policy's time to live.
    Expired,
}

impl Reason {
    pub const ALL: [Self; 6] = [Self::Exhausted, Self::Refused, Self::InvalidEvent, Self::TooLarge, Self::DeliveryLimit, Self::Expired];

    pub const fn name(self) -> &'static str {
        match self {
            Self::Exhausted => "exhausted",
            Self::Refused => "refused",
            Self::InvalidEvent => "invalid_event",
            Self::TooLarge => "too_large",
            Self::DeliveryLimit => "delivery_limit",
            Self::Expired => "expired",
        }
    }

    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|r| r.name() == name)
    }
}

/// What could not be delivered, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeadLetter {
    pub kind: Kind,
    pub reason: Reason,
    /// The exact request body of a batch, or the event as it was published.
    pub body: Bytes,
    pub content_type: Option<String>,
    /// Of an event that is still as its producer encoded it, in the producer's words.
    pub content_encoding: Option<String>,
    /// The batch's id, or the producer's message id of an event.
    pub id: Option<String>,
    pub events: u32,
    pub attempts: u32,
    /// The last answer's.
    pub status: Option<u16>,
    /// For an operator to read; cut to [`MAX_ERROR_LEN`].
    pub error: String,
    pub first_attempt_at: Option<SystemTime>,
    pub died_at: Option<SystemTime>,
    pub story: Story,
}

impl DeadLetter {
    /// How the events stand in the body of a batch, if its content type says so.
    pub fn format(&self) -> Option<Format> {
        [Format::Json, Format::JsonLines].into_iter().find(|f| self.content_type.as_deref() == Some(f.content_type()))
    }

    /// A batch as it comes back: under its id, with attempts and elapsed time begun anew, and marked.
    pub(crate) fn to_envelope(&self) -> Envelope {
        Envelope {
            batch_id: self.id.clone().unwrap_or_else(clock::batch_id),
            body: self.body.clone(),
            format: self.format().unwrap_or(Format::Json),
            events: self.events,
            attempts: 0,
            first_attempt_at: None,
            traceparent: None,
            story: self.story.clone(),
            replay: true,
        }
    }
}

/// The longest error that a dead letter carries, in bytes.
pub const MAX_ERROR_LEN: usize = 1024;

/// Cuts a text to [`MAX_ERROR_LEN`] at a character's border.
pub fn cut_error(text: &str) -> &str {
    &text[..text.floor_char_boundary(MAX_ERROR_LEN)]
}

/// What became of messages.
#[derive(Debug)]
pub enum Settlement {
    Delivered,
    /// Comes again as envelopes, in their order, not before `delay` from now.
    Retry {
        envelopes: Vec<Envelope>,
        delay: Duration,
    },
    Dead(Vec<DeadLetter>),
}

/// Why a settlement did not happen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SettleError {
    /// The source is gone and its messages with it: forget them, they come again.
    Gone,
    /// The queue did not confirm; nothing may be written for these messages until they come again.
    Unconfirmed(String),
}

impl fmt::Display for SettleError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Gone => f.write_str("the connection to the queue is gone"),
            Self::Unconfirmed(why) => f.write_str(why),
        }
    }
}

impl std::error::Error for SettleError {}

/// Something is wrong with the queue. Names the queue, says what was found and what to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QueueError {
    text: String,
    needs_operator: bool,
    remedy: Option<String>,
}

impl QueueError {
    /// What may pass by itself.
    pub fn new(text: impl Into<String>) -> Self {
        Self { text: text.into(), needs_operator: false, remedy: None }
    }

    /// What stays until somebody changes the queue or the configuration.
    pub fn needs_operator(text: impl Into<String>) -> Self {
        Self { text: text.into(), needs_operator: true, remedy: None }
    }

    /// With what puts it right, a command where there is one.
    #[must_use]
    pub fn remedied(self, remedy: impl Into<String>) -> Self {
        Self { remedy: Some(remedy.into()), ..self }
    }

    /// What is wrong, without the remedy.
    pub fn what(&self) -> &str {
        &self.text
    }

    pub fn remedy(&self) -> Option<&str> {
        self.remedy.as_deref()
    }

    pub fn is_for_operator(&self) -> bool {
        self.needs_operator
    }
}

impl fmt::Display for QueueError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)?;
        self.remedy.as_ref().map_or(Ok(()), |remedy| write!(f, "; {remedy}"))
    }
}

impl std::error::Error for QueueError {}

#[cfg(test)]
pub(crate) mod fake;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_cut_at_a_character() {
        let text = "é".repeat(600);
        assert_eq!(cut_error(&text).len(), 1024);
        assert_eq!(cut_error(&text[..1000]).len(), 1000);
        assert_eq!(cut_error(&format!("x{text}")).len(), 1023);
    }

    fn attempt(number: u32, came_to: CameTo) -> FailedAttempt {
        FailedAttempt { number, at: SystemTime::UNIX_EPOCH + Duration::from_millis(u64::from(number) + 1_735_830_138_000), came_to }
    }

    #[test]
    fn a_story_keeps_the_first_and_the_last_attempts_however_many_there_are() {
        let mut story = Story::default();
        for n in 1..=50 {
            story.add(attempt(n, CameTo::Status(503)));
        }
        assert_eq!((story.parts().1, story.parts().2.len()), (0, 45));
        for n in 51..=u32::from(u16::MAX) {
            story.add(attempt(n, CameTo::Failure("address_blocked".to_owned())));
        }
        let (first, left_out, last) = story.parts();
        let numbers = |attempts: &[FailedAttempt]| attempts.iter().map(|a| a.number).collect::<Vec<_>>();
        assert_eq!(numbers(first), [1, 2, 3, 4, 5]);
        assert_eq!(left_out, 65_535 - 50);
        assert_eq!(numbers(last), (65_491..=65_535).collect::<Vec<_>>());
        assert!(story.to_text().len() < 3 * 1024, "{} bytes", story.to_text().len());
        assert_eq!(Story::from_text(&story.to_text()), story);
    }

    #[test]
    fn of_a_story_that_somebody_else_wrote_only_what_can_be_read_is_taken() {
        let text =
            "1@1735830138001=503,,2@x=503,3@1735830138003=timeout,4@5=\u{1b}[2J,5@5,+x,6@5=A,7@253402300800000=500,+4294967295,+9,-1@5=503";
        let story = Story::from_text(text);
        let expected = [attempt(1, CameTo::Status(503)), attempt(3, CameTo::Failure("timeout".to_owned()))];
        assert_eq!(story.parts(), (&expected[..], u32::MAX, &[][..]));
        assert_eq!(Story::from_text(""), Story::default());
        assert_eq!(Story::from_text("+7,x"), Story::default());
        let many: String = (1..100_000).map(|n| format!("{n}@1=500,")).collect();
        assert_eq!(Story::from_text(&many).attempts.len(), Story::FIRST + Story::LAST);
    }

    fn names(text: &str) -> BTreeSet<String> {
        text.split_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn a_start_that_would_unbind_most_unbinds_nobody_until_an_operator_asks_or_they_are_back() {
        let held = || {
            let removals = Removals::default();
            assert!(!removals.may_unbind("a"), "it is not known who is bound");
            removals.judge(&names("a b c d e"), &names("e x y z"));
            assert_eq!(removals.held().expect("held").missing, names("a b c d"));
            removals
        };
        let operator = held();
        assert!(!operator.may_unbind("a"));
        operator.configure(names("e"), true);
        assert!(operator.may_unbind("a") && !operator.may_unbind("e") && operator.held().is_none());
        let back = held();
        back.configure(names("a b c e"), false);
        // Those that came with this start are bound by now, and say nothing of what was there before.
        back.judge(&names("a b c d e x y z"), &names("x y z e"));
        assert!(back.held().is_some());
        // One by one.
        back.judge(&names("a b c d e x y z"), &names("a b c e"));
        assert!(!back.may_unbind("d") && back.held().expect("held").missing == names("d"));
        back.judge(&names("a b c d e x y z"), &names("a b c d e"));
        assert!(back.held().is_none() && back.may_unbind("x") && !back.may_unbind("a"));
    }

    #[test]
    fn what_a_running_daemon_removes_may_be_unbound_unless_that_was_given_up() {
        let removals = Removals::default();
        removals.judge(&names("a b"), &names("a b"));
        let before = removals.configure(names("a"), false);
        assert!(removals.may_unbind("b"));
        removals.restore(before);
        assert!(!removals.may_unbind("b"));
    }

    #[test]
    fn a_reason_has_one_name() {
        for r in Reason::ALL {
            assert_eq!(Reason::from_name(r.name()), Some(r));
        }
    }
}

//! Batches that wait for their next attempt: listed, and made due now.
//!
//! The retries of all subscribers wait in the ladder's levels, and a queue shows only its head. So
//! a pass takes every message of a level, and requeues those that it does not move. Measured on
//! RabbitMQ 3.10.8 and 4.0.5, in quorum queues with a time to live:
//!
//! - A requeued message keeps its time: unacked for 5 s and requeued, each of ten messages went on
//!   within 0.1 s of its time. One whose time passes meanwhile goes on when it is requeued, and is
//!   late by that.
//! - Requeued messages stand before those never taken, and after those requeued earlier. So a pass
//!   may end after a message that is delivered for the first time; otherwise it goes on to the end.
//!   A message out of its place would wait for all before it, and a level can delay some for days.
//!   A command that is killed half-way through a level that was passed before leaves it so.
//! - When a channel ends, in any way, the broker requeues its messages consumer by consumer, and
//!   each one's in order. The consumers are in the order of their names as long as there are at
//!   most 32 of them: after a kill -9, 2,000 messages of 16 consumers were requeued in their order,
//!   those of 63 were not.
//! - The end of a channel is answered before its messages are requeued: while each write took
//!   300 ms, a queue was counted as empty for that time. What was begun before the begin of a
//!   consumer has happened when that is answered.
//! - Acks are not answered. A channel passes on 33 of them, and more when the queue has them on the
//!   disk. Those that it has not passed on when it is closed are lost, and their messages are
//!   redelivered. A depth is answered at once, whatever is on its way to the disk; the begin and
//!   the end of a consumer are answered only when all that was passed on before has arrived.
//!
//! A batch that is made due is published to the retry queue, confirmed, before it is removed from
//! the level: an interruption in between leaves a second copy, under the same id.

use std::{
    collections::{BTreeSet, HashMap, HashSet, VecDeque},
    time::{Duration, Instant},
};

use futures_util::StreamExt as _;
use lapin::{
    Consumer,
    message::Delivery,
    options::{
        BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicQosOptions,
        QueueDeclareOptions,
    },
    types::FieldTable,
};
use tokio::time::{timeout, timeout_at};

use super::{
    broker_error::{BrokerError, RESOURCE_LOCKED, answer},
    consumer::retry_message,
    ladder,
    message::{self, Message},
    pool::{Lease, Quarantine},
    publisher::PublishResult,
    shared::Shared,
    topology::walk_of,
};
use crate::{
    clock,
    delivery::{Batch, BatchId, SubscriberName},
    failpoint::{Step, reached},
    queue::{Hastened, QueueError, Waiting, WaitingList},
};

/// The longest time of one pass: no retry in the queue goes on meanwhile. It takes longer only
/// where more was requeued earlier than can be taken in that time, since a part of it would lose
/// its place: about 70,000 messages.
const PASS: Duration = Duration::from_secs(10);

/// The time for taking messages within [`PASS`]; the rest is for requeueing the others.
const TAKE: Duration = Duration::from_secs(7);

/// The time for moving messages within [`PASS`]: those behind are only passed, which is far
/// quicker.
const MOVE: Duration = Duration::from_secs(5);

/// The part of [`PASS`] that is left for requeueing after the slowest publish.
const GIVING_BACK: Duration = Duration::from_secs(1);

/// Time from a pass that was cut short to the next one: due retries go on.
const BREATH: Duration = Duration::from_secs(1);

/// Messages of the first consumer, whose size decides how many the next one may take.
const FIRST_WINDOW: u16 = 32;
const WINDOW_BYTES: usize = 32 * 1024 * 1024;

/// Consumers among which the messages are divided. With more than 32 the broker requeues in no
/// order; the others are for late messages, and for [`ACKED`].
const CONSUMERS: u32 = 28;

/// Time without a message after which the queue is asked for its depth: retries may have gone on.
const SILENCE: Duration = Duration::from_millis(300);

/// Messages and bytes that are moved together, with one confirm for all: the limit that is reached
/// first.
const GROUP: usize = 200;
const GROUP_BYTES: usize = 4 * 1024 * 1024;

/// Consumers that begin and end before all acks have arrived for sure. With the first one those
/// have arrived that the channel had passed on, and the channel is notified; so it passes on the
/// others before the second one begins.
const ACKED: u32 = 2;

/// RabbitMQ counts a queue that does not answer within 250 ms as empty. So an empty queue is
/// believed only if the answer took less, or at most [`UNEVEN`] longer than the same request about
/// a missing queue.
const NO_ANSWER: Duration = Duration::from_millis(250);
const UNEVEN: Duration = Duration::from_millis(100);

/// Time for which a queue that does not answer is asked again.
const BUSY: Duration = Duration::from_secs(10);

/// Timeout of waiting for another command's passes.
const TURN: Duration = Duration::from_secs(60);

pub(super) async fn list(shared: &Shared, subscriber: &str) -> Result<WaitingList, QueueError> {
    known(shared, subscriber).await?;
    let passes = Passes::begin(shared).await?;
    let mut list = WaitingList::default();
    let mut seen = HashSet::new();
    // From the top, so that a batch that goes on to a lower level meanwhile is met there, and a due
    // one in the retry queue.
    for level in (0..ladder::LEVELS).rev() {
        list.unseen += passes
            .each(shared.topology.level(level), |delivery| {
                let own = ladder::subscriber_of(delivery.routing_key.as_str()) == Some(subscriber);
                let found = own.then(|| message::waiting(delivery)).flatten();
                // A batch that is met again has gone on meanwhile.
                list.batches
                    .extend(found.filter(|w| seen.insert((w.batch_id.clone(), w.attempts))));
            })
            .await?;
    }
    let (due, unseen) = passes.due(shared.topology.retry(subscriber)).await?;
    list.unseen += unseen;
    list.batches.extend(due.into_iter().filter(|w| seen.insert((w.batch_id.clone(), w.attempts))));
    list.batches.sort_by_key(|w| (w.due.is_none(), w.due));
    Ok(list)
}

pub(super) async fn hasten(
    shared: &Shared,
    subscriber: &str,
    ids: Option<BTreeSet<BatchId>>,
) -> Result<Hastened, QueueError> {
    let due = known(shared, subscriber).await?;
    shared.publisher().ready().await?;
    let passes = Passes::begin(shared).await?;
    let mut moving =
        Moving { shared, subscriber, ids: ids.as_ref(), moved: HashMap::new(), unseen: 0 };
    for level in (0..ladder::LEVELS).rev() {
        if let Err(e) = moving.out_of(&passes, level).await {
            let before = match moving.moved.len() {
                0 => "nothing was moved".to_owned(),
                n => format!("{n} were moved before"),
            };
            return Err(QueueError::new(format!(
                "{e}; {before}, the others wait as they did; run it again for them"
            )));
        }
    }
    let mut hastened = Hastened {
        moved: moving.moved.len() as u64,
        due: due.into(),
        missing: Vec::new(),
        unseen: moving.unseen,
    };
    if let Some(ids) = &ids {
        let mut missing: BTreeSet<&BatchId> =
            ids.iter().filter(|id| !moving.moved.contains_key(*id)).collect();
        let found = if missing.is_empty() {
            Vec::new()
        } else {
            passes.due(shared.topology.retry(subscriber)).await?.0
        };
        hastened.due = found.iter().filter(|w| missing.remove(&w.batch_id)).count() as u64;
        hastened.missing = missing.into_iter().map(BatchId::to_string).collect();
    }
    Ok(hastened)
}

/// Adds batches to the retry queue, due now. The broker does not see whether one waits already.
pub(super) async fn enqueue(
    shared: &Shared,
    subscriber: &SubscriberName,
    batches: &[Batch],
) -> Result<(), QueueError> {
    let message =
        |batch| retry_message(&shared.topology, subscriber.as_str(), batch, Duration::ZERO);
    let publisher = shared.publisher();
    publisher.ready().await?;
    let results = publisher.publish(batches.iter().map(message).collect()).await?;
    if results.iter().all(|result| *result == PublishResult::Stored) {
        return Ok(());
    }
    let name = shared.topology.retry(subscriber.as_str());
    Err(QueueError::new(match results.contains(&PublishResult::Unroutable) {
        true => format!(
            "queue `{name}` does not exist: the daemon has never run with a subscriber `{subscriber}`"
        ),
        false => format!("queue `{name}` did not take a batch"),
    }))
}

/// The number of batches that are due and not taken.
async fn known(shared: &Shared, subscriber: &str) -> Result<u32, QueueError> {
    let name = shared.topology.retry(subscriber);
    let due = count(shared, &name).await?;
    due.ok_or_else(|| QueueError::new(format!("queue `{name}` does not exist: the daemon has never run with a subscriber `{subscriber}`")))
}

/// The number of ready messages of a queue; `None` if there is no such queue.
pub(super) async fn count(shared: &Shared, name: &str) -> Result<Option<u32>, QueueError> {
    let began = clock::instant();
    loop {
        let asked = clock::instant();
        let messages = shared.broker().depth(name).await?.map(|d| d.messages);
        let answered = clock::instant();
        let took = answered.saturating_duration_since(asked);
        if messages != Some(0) || took < NO_ANSWER {
            return Ok(messages);
        }
        shared.broker().depth(&shared.topology.unused_name()).await?;
        if took < clock::instant().saturating_duration_since(answered) + UNEVEN {
            return Ok(messages);
        }
        if answered.saturating_duration_since(began) > BUSY {
            return Err(QueueError::new(format!(
                "queue `{name}` does not say how many messages it has: the broker is too busy; try again later"
            )));
        }
    }
}

/// Moves batches of a subscriber out of the ladder.
struct Moving<'m> {
    shared: &'m Shared,
    subscriber: &'m str,
    ids: Option<&'m BTreeSet<BatchId>>,
    /// By id: attempts and bytes of the batches that were moved.
    moved: HashMap<BatchId, (u32, usize)>,
    unseen: u64,
}

/// The decision about a message.
enum Wanted {
    Move(Waiting),
    /// It was moved already: its ack was lost, or there were two copies.
    Drop,
    Leave,
}

impl Moving<'_> {
    /// Passes through a level until no wanted batch is left in it, or no more can be reached.
    async fn out_of(&mut self, passes: &Passes<'_>, level: u32) -> Result<(), QueueError> {
        loop {
            let Some(mut pass) = passes.at(self.shared.topology.level(level)).await? else {
                return Ok(());
            };
            let taken = self.take(&mut pass).await;
            let left = u64::from(pass.left);
            let closed = pass.close().await;
            let (taken, passed) = taken?;
            closed?;
            if taken == 0 {
                self.unseen += left + passed;
                return Ok(());
            }
            if left + passed > 0 {
                tokio::time::sleep(BREATH).await;
            }
        }
    }

    /// The number of messages removed from the level, and of the wanted ones that were passed
    /// without being moved.
    async fn take(&mut self, pass: &mut Pass) -> Result<(usize, u64), QueueError> {
        let (mut group, mut bytes, mut taken, mut passed) = (Vec::new(), 0, 0, 0);
        while let Some(delivery) = pass.next().await? {
            let wanted = self.wanted(&delivery);
            // Some are moved in each pass, so that the next one begins further on.
            if pass.held() > MOVE && !group.is_empty() {
                taken += self.send(pass, std::mem::take(&mut group)).await?;
            }
            let limit = if taken > 0 { MOVE } else { TAKE };
            if pass.held() > limit && !matches!(wanted, Wanted::Leave) {
                passed += 1;
                continue;
            }
            match wanted {
                Wanted::Leave => continue,
                Wanted::Drop => {
                    pass.ack(delivery.delivery_tag).await?;
                    taken += 1;
                }
                Wanted::Move(waiting) => {
                    bytes += waiting.bytes;
                    group.push((waiting, delivery));
                    if group.len() == GROUP || bytes >= GROUP_BYTES {
                        taken += self.send(pass, std::mem::take(&mut group)).await?;
                        bytes = 0;
                    }
                }
            }
        }
        Ok((taken + self.send(pass, group).await?, passed))
    }

    fn wanted(&self, delivery: &Delivery) -> Wanted {
        if ladder::subscriber_of(delivery.routing_key.as_str()) != Some(self.subscriber) {
            return Wanted::Leave;
        }
        // A message that is no envelope becomes a dead letter when it is due.
        let Some(waiting) = message::waiting(delivery) else { return Wanted::Leave };
        match self.moved.get(&waiting.batch_id) {
            Some(moved) if *moved == (waiting.attempts, waiting.bytes) => Wanted::Drop,
            // It has failed again since: its new time counts.
            Some(_) => Wanted::Leave,
            None if self.ids.is_none_or(|ids| ids.contains(&waiting.batch_id)) => {
                Wanted::Move(waiting)
            }
            None => Wanted::Leave,
        }
    }

    async fn send(
        &mut self,
        pass: &mut Pass,
        group: Vec<(Waiting, Delivery)>,
    ) -> Result<usize, QueueError> {
        if group.is_empty() {
            return Ok(0);
        }
        let retry = self.shared.topology.retry(self.subscriber);
        let (mut marks, mut messages) = (Vec::new(), Vec::new());
        for (waiting, delivery) in group {
            marks.push((delivery.delivery_tag, waiting));
            let (body, properties) = message::due_now(delivery);
            messages.push(Message::to_queue(retry.clone(), body, properties));
        }
        // A publish that is given up here was perhaps stored: then the batch is attempted twice.
        let late = pass.began + PASS - GIVING_BACK;
        let Ok(results) = timeout_at(late.into(), self.shared.publisher().publish(messages)).await
        else {
            return Err(QueueError::new(
                "the broker did not confirm in the time that a pass through a queue of retries may take",
            ));
        };
        let results = results?;
        reached(Step::Moved);
        let mut sent = 0;
        for ((tag, waiting), result) in marks.into_iter().zip(results) {
            if result != PublishResult::Stored {
                let why = if result == PublishResult::Unroutable {
                    "does not exist any more"
                } else {
                    "takes no more"
                };
                return Err(QueueError::new(format!("queue `{retry}` {why}")));
            }
            pass.ack(tag).await?;
            self.moved.insert(waiting.batch_id, (waiting.attempts, waiting.bytes));
            sent += 1;
        }
        Ok(sent)
    }
}

/// Passes through queues, one after the other, on a connection of its own: a broken queue ends it.
struct Passes<'q> {
    shared: &'q Shared,
    connection: Quarantine,
    /// Keeps other commands from passing at the same time: two would take one another's messages.
    _turn: Option<Lease>,
}

impl<'q> Passes<'q> {
    async fn begin(shared: &'q Shared) -> Result<Self, QueueError> {
        let connection = shared.consuming.quarantine().await?;
        let name = walk_of(&shared.topology.due());
        let exclusive = QueueDeclareOptions { exclusive: true, ..QueueDeclareOptions::default() };
        let turn = async {
            loop {
                let lease = connection.lease().await?;
                match answer(lease.channel.queue_declare(
                    name.as_str().into(),
                    exclusive,
                    FieldTable::default(),
                ))
                .await
                {
                    Ok(_) => return Ok(Some(lease)),
                    Err(why) if why.code == Some(RESOURCE_LOCKED) => {
                        tokio::time::sleep(Duration::from_millis(250)).await
                    }
                    // The user may not declare it.
                    Err(why) => {
                        tracing::debug!(error = %why, "other commands are not kept from reading the retries at the same time");
                        return Ok(None);
                    }
                }
            }
        };
        let turn: Result<_, QueueError> = timeout(TURN, turn).await.map_err(|_| {
            QueueError::new(format!(
                "another command has been reading the retries for {} s; try again later",
                TURN.as_secs()
            ))
        })?;
        let turn = turn?;
        Ok(Self { shared, connection, _turn: turn })
    }

    /// A pass through a queue; `None` if the queue is empty.
    async fn at(&self, name: String) -> Result<Option<Pass>, QueueError> {
        let Some(messages) = count(self.shared, &name).await? else { return Ok(None) };
        let mut pass = Pass::new(self.connection.lease().await?, name);
        if pass.begin(messages).await? {
            return Ok(Some(pass));
        }
        pass.close().await?;
        Ok(None)
    }

    /// Shows each message of a queue; returns the number of those that could not be reached.
    async fn each(&self, name: String, mut show: impl FnMut(&Delivery)) -> Result<u64, QueueError> {
        let Some(mut pass) = self.at(name).await? else { return Ok(0) };
        let passed_all = async {
            while let Some(delivery) = pass.next().await? {
                show(&delivery);
            }
            Ok(u64::from(pass.left))
        };
        let passed_all = passed_all.await;
        pass.close().await?;
        passed_all
    }

    /// The batches that are due and not taken, and the number of messages that could not be
    /// reached.
    async fn due(&self, retry: String) -> Result<(Vec<Waiting>, u64), QueueError> {
        let mut found = Vec::new();
        let unseen = self.each(retry, |delivery| found.extend(message::waiting(delivery))).await?;
        let now = clock::now();
        for waiting in &mut found {
            waiting.due = Some(waiting.due.map_or(now, |due| due.min(now)));
        }
        Ok((found, unseen))
    }
}

/// A pass through the messages of one queue, from its head.
struct Pass {
    lease: Lease,
    queue: String,
    began: Instant,
    /// Messages not taken yet, of those that were there at the begin.
    left: u32,
    ready: VecDeque<Delivery>,
    consumers: u32,
    window: u16,
    /// Messages of one consumer, so that there are few consumers.
    share: u16,
    /// The message taken last had been requeued before, so that there may be more of these behind
    /// it.
    amid_returned: bool,
    acked: bool,
}

impl Pass {
    fn new(lease: Lease, queue: String) -> Self {
        Self {
            lease,
            queue,
            began: clock::instant(),
            left: 0,
            ready: VecDeque::new(),
            consumers: 0,
            window: FIRST_WINDOW,
            share: FIRST_WINDOW,
            amid_returned: false,
            acked: false,
        }
    }

    /// Takes the first messages; whether there are any.
    ///
    /// What an earlier pass held is perhaps not requeued yet, and then not counted either. It is
    /// there when the first consumer has begun, and is counted again behind it.
    async fn begin(&mut self, counted: u32) -> Result<bool, QueueError> {
        let wanted = u16::try_from(counted).unwrap_or(u16::MAX).min(FIRST_WINDOW);
        let came = self.take(FIRST_WINDOW, wanted).await?;
        self.left = self.depth().await?;
        let messages = self.left + u32::from(came);
        self.share =
            u16::try_from(messages.div_ceil(CONSUMERS)).unwrap_or(u16::MAX).max(FIRST_WINDOW);
        self.size_window();
        Ok(messages > 0)
    }

    fn held(&self) -> Duration {
        clock::instant().saturating_duration_since(self.began)
    }

    /// The next message; `None` at the end, or when the time has passed.
    async fn next(&mut self) -> Result<Option<Delivery>, QueueError> {
        while self.ready.is_empty() && self.left > 0 {
            if self.held() >= TAKE && !self.amid_returned {
                break;
            }
            self.fill().await?;
        }
        Ok(self.ready.pop_front())
    }

    /// Begins a consumer that takes at most this number of messages; returns its name too.
    async fn consume(&mut self, most: u16) -> Result<(String, Consumer), QueueError> {
        let channel = &self.lease.channel;
        let name = format!("pass-{:08}", self.consumers);
        self.consumers += 1;
        let consume = async {
            channel.basic_qos(most, BasicQosOptions::default()).await?;
            channel
                .basic_consume(
                    self.queue.as_str().into(),
                    name.as_str().into(),
                    BasicConsumeOptions::default(),
                    FieldTable::default(),
                )
                .await
        };
        let consumer = answer(consume).await.map_err(|why| self.error(&why))?;
        Ok((name, consumer))
    }

    async fn cancel(&self, name: &str) -> Result<(), QueueError> {
        let cancelled =
            answer(self.lease.channel.basic_cancel(name.into(), BasicCancelOptions::default()))
                .await;
        cancelled.map_err(|why| self.error(&why))
    }

    /// Takes the next few.
    async fn fill(&mut self) -> Result<(), QueueError> {
        let wanted = self.window.min(u16::try_from(self.left).unwrap_or(u16::MAX));
        let came = self.take(wanted, wanted).await?;
        self.left = self.left.saturating_sub(came.into());
        if came < wanted {
            // Some have gone on since they were counted; those that are there now may be newer, or
            // slow.
            self.left = self.left.min(self.depth().await?);
        }
        self.size_window();
        Ok(())
    }

    /// Takes at most `most` messages with a consumer of its own, and waits for `expected` of them
    /// as long as there is no silence; returns how many came.
    async fn take(&mut self, most: u16, expected: u16) -> Result<u16, QueueError> {
        let (name, mut consumer) = self.consume(most).await?;
        let mut came = 0;
        while came < expected
            && let Ok(next) = timeout(SILENCE, consumer.next()).await
        {
            self.took(next)?;
            came += 1;
        }
        self.cancel(&name).await?;
        // Messages that the broker had sent before the cancel; then the stream ends.
        while let Some(next) = consumer.next().await {
            self.took(Some(next))?;
            came += 1;
        }
        Ok(came)
    }

    fn size_window(&mut self) {
        let largest = self.ready.iter().map(|d| d.data.len()).max().unwrap_or(1).max(1);
        self.window =
            u16::try_from(WINDOW_BYTES / largest).unwrap_or(u16::MAX).clamp(1, self.share);
    }

    fn took(&mut self, next: Option<lapin::Result<Delivery>>) -> Result<(), QueueError> {
        let gone = || {
            QueueError::new(format!(
                "the broker cancelled the consumer of queue `{}`: it was deleted or moved",
                self.queue
            ))
        };
        let delivery = next.ok_or_else(gone)?.map_err(|e| self.error(&BrokerError::from(e)))?;
        self.amid_returned = delivery.redelivered;
        self.ready.push_back(delivery);
        Ok(())
    }

    async fn ack(&mut self, tag: u64) -> Result<(), QueueError> {
        self.acked = true;
        answer(self.lease.channel.basic_ack(tag, BasicAckOptions::default()))
            .await
            .map_err(|why| self.error(&why))
    }

    async fn depth(&self) -> Result<u32, QueueError> {
        let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
        let asked = self.lease.channel.queue_declare(
            self.queue.as_str().into(),
            passive,
            FieldTable::default(),
        );
        Ok(answer(asked).await.map_err(|why| self.error(&why))?.message_count())
    }

    /// Requeues the messages that were not acked.
    async fn close(mut self) -> Result<(), QueueError> {
        if self.acked {
            self.acks_arrive().await?;
        }
        answer(self.lease.channel.close(200, "passed".into())).await.map_err(|why| self.error(&why))
    }

    /// Waits until the queue has every ack on its disk.
    ///
    /// A message that arrives meanwhile is requeued with the others, behind them: if it had been
    /// requeued before, they all had been, and [`next`](Self::next) has taken them all.
    async fn acks_arrive(&mut self) -> Result<(), QueueError> {
        for _ in 0..ACKED {
            let (name, mut consumer) = self.consume(1).await?;
            self.cancel(&name).await?;
            while let Some(came) = consumer.next().await {
                came.map_err(|e| self.error(&BrokerError::from(e)))?;
            }
        }
        Ok(())
    }

    fn error(&self, why: &BrokerError) -> QueueError {
        QueueError::new(format!("queue `{}`: {why}", self.queue))
    }
}

//! What waits for its next attempt: looked at, and made due now.
//!
//! The retries of all subscribers wait in the ladder's levels, and a queue shows its head alone. So
//! a look takes every message of a level, and gives back what it does not move. Measured on
//! RabbitMQ 3.10.8 and 4.0.5, in quorum queues with a time to live:
//!
//! - What is given back keeps its time: held for 5 s and given back, each of ten messages went on
//!   within 0.1 s of when it would have. One whose time passes while it is held goes on when it is
//!   given back, and is late by that.
//! - What is given back comes before what was never taken, and after what was given back earlier.
//!   So a look may end after a message that comes for the first time; else it goes on to the end. A
//!   message out of its place would wait for all before it, and a level can hold some back for
//!   days. Who is killed half-way through a level that was looked at before leaves it so.
//! - When a channel ends, however that happens, the broker gives back what it held consumer by
//!   consumer and each one's in order. The consumers are in the order of their names as long as
//!   there are at most 32 of them: 2,000 messages held by 16 of them came back as they were after a
//!   kill -9, held by 63 they did not.
//! - Acks are not answered. A channel sends on 33 of them, and more when the queue has them on the
//!   disk; what it has not sent on when it is closed is lost, and the message is in the queue
//!   again. A count is answered at once, whatever is on its way to the disk; the beginning and the
//!   end of a consumer are answered only when what was sent on before is there.
//!
//! What is asked for goes into the retry queue, confirmed, before it is taken out of the level:
//! whatever ends this in between leaves a copy too many, under the same id.

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
    ladder,
    message::{self, Message},
    pool::{Lease, Quarantine},
    publisher::Fate,
    shared::Shared,
    topology::walk_of,
};
use crate::{
    clock,
    delivery::BatchId,
    failpoint::{Step, reached},
    queue::{Hastened, QueueError, Waiting, WaitingList},
};

/// A queue of retries is held no longer than this at a time: nothing in it comes due meanwhile.
/// Only where more was given back earlier than can be taken in that time it takes longer, since a
/// part of that would lose its place: about 70,000 messages.
const HOLD: Duration = Duration::from_secs(10);

/// Of that for taking messages; the rest is for giving the others back.
const LOOK: Duration = Duration::from_secs(7);

/// And for moving them: what is behind is only passed by then, which is far quicker.
const MOVE: Duration = Duration::from_secs(5);

/// A publish begins only if so much of [`HOLD`] is left after it at the worst.
const GIVING_BACK: Duration = Duration::from_secs(1);

/// After a look that was cut short, until the next one: what has come due goes on.
const BREATH: Duration = Duration::from_secs(1);

/// Messages of the first consumer, whose size tells how many the next may take.
const FIRST_WINDOW: u16 = 32;
const WINDOW_BYTES: usize = 32 * 1024 * 1024;

/// With more than 32 the broker gives back in no order; some are kept for what comes in later than
/// it should, and for [`ACKED`].
const CONSUMERS: u32 = 28;

/// When nothing has come for so long the queue is asked whether there is anything: some may have
/// come due.
const SILENCE: Duration = Duration::from_millis(300);

/// Messages that are moved together, one confirm for all: whichever is reached first.
const GROUP: usize = 200;
const GROUP_BYTES: usize = 4 * 1024 * 1024;

/// Consumers that begin and end before acks are sure to have arrived. With the first those are
/// there that the channel had sent on, and the channel hears of it; so it sends on the others
/// before the second begins.
const ACKED: u32 = 2;

/// A queue that does not answer in 250 ms is counted as empty. So none is believed only of an
/// answer that came sooner, or that took at most so much longer than the same question about a
/// queue that is not there.
const NO_ANSWER: Duration = Duration::from_millis(250);
const UNEVEN: Duration = Duration::from_millis(100);

/// How long a queue is asked again that does not answer.
const BUSY: Duration = Duration::from_secs(10);

/// How long another command's look is waited for.
const TURN: Duration = Duration::from_secs(60);

pub(super) async fn list(shared: &Shared, subscriber: &str) -> Result<WaitingList, QueueError> {
    known(shared, subscriber).await?;
    let looks = Looks::begin(shared).await?;
    let mut list = WaitingList::default();
    let mut seen = HashSet::new();
    // From the top, so that what goes on to a lower level meanwhile is met there, and what comes
    // due last of all.
    for level in (0..ladder::LEVELS).rev() {
        list.unseen += looks
            .each(shared.topology.level(level), |delivery| {
                let own = ladder::subscriber_of(delivery.routing_key.as_str()) == Some(subscriber);
                let found = own.then(|| message::waiting(delivery)).flatten();
                // One that is met again has gone on meanwhile.
                list.batches
                    .extend(found.filter(|w| seen.insert((w.batch_id.clone(), w.attempts))));
            })
            .await?;
    }
    let (due, unseen) = looks.due(shared.topology.retry(subscriber)).await?;
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
    let looks = Looks::begin(shared).await?;
    let mut moving =
        Moving { shared, subscriber, ids: ids.as_ref(), moved: HashMap::new(), unseen: 0 };
    for level in (0..ladder::LEVELS).rev() {
        if let Err(e) = moving.out_of(&looks, level).await {
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
            looks.due(shared.topology.retry(subscriber)).await?.0
        };
        hastened.due = found.iter().filter(|w| missing.remove(&w.batch_id)).count() as u64;
        hastened.missing = missing.into_iter().map(BatchId::to_string).collect();
    }
    Ok(hastened)
}

/// How many are due and not taken.
async fn known(shared: &Shared, subscriber: &str) -> Result<u32, QueueError> {
    let name = shared.topology.retry(subscriber);
    let due = count(shared, &name).await?;
    due.ok_or_else(|| QueueError::new(format!("queue `{name}` does not exist: the daemon has never run with a subscriber `{subscriber}`")))
}

/// How many are in a queue and not taken; `None` if there is no such queue.
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
        shared.broker().depth(&shared.topology.nobodys()).await?;
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

/// What is moved out of the ladder.
struct Moving<'m> {
    shared: &'m Shared,
    subscriber: &'m str,
    ids: Option<&'m BTreeSet<BatchId>>,
    /// By id: attempts and size of what was moved.
    moved: HashMap<BatchId, (u32, usize)>,
    unseen: u64,
}

/// What is to be done with a message.
enum Wanted {
    Move(Waiting),
    /// It was moved already: its ack was lost, or there were two.
    Drop,
    Leave,
}

impl Moving<'_> {
    /// Looks through a level until nothing asked for is left in it, or no more can be reached.
    async fn out_of(&mut self, looks: &Looks<'_>, level: u32) -> Result<(), QueueError> {
        loop {
            let Some(mut look) = looks.at(self.shared.topology.level(level)).await? else {
                return Ok(());
            };
            let taken = self.take(&mut look).await;
            let left = u64::from(look.left);
            let closed = look.close().await;
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

    /// How many messages were taken out of the level, and how many that are asked for were passed
    /// by in the end.
    async fn take(&mut self, look: &mut Look) -> Result<(usize, u64), QueueError> {
        let (mut group, mut bytes, mut taken, mut passed) = (Vec::new(), 0, 0, 0);
        while let Some(delivery) = look.next().await? {
            let wanted = self.wanted(&delivery);
            // Some are moved at each look, so that the next one is at its beginning further on.
            if look.held() > MOVE && !group.is_empty() {
                taken += self.send(look, std::mem::take(&mut group)).await?;
            }
            let limit = if taken > 0 { MOVE } else { LOOK };
            if look.held() > limit && !matches!(wanted, Wanted::Leave) {
                passed += 1;
                continue;
            }
            match wanted {
                Wanted::Leave => continue,
                Wanted::Drop => {
                    look.ack(delivery.delivery_tag).await?;
                    taken += 1;
                }
                Wanted::Move(waiting) => {
                    bytes += waiting.bytes;
                    group.push((waiting, delivery));
                    if group.len() == GROUP || bytes >= GROUP_BYTES {
                        taken += self.send(look, std::mem::take(&mut group)).await?;
                        bytes = 0;
                    }
                }
            }
        }
        Ok((taken + self.send(look, group).await?, passed))
    }

    fn wanted(&self, delivery: &Delivery) -> Wanted {
        if ladder::subscriber_of(delivery.routing_key.as_str()) != Some(self.subscriber) {
            return Wanted::Leave;
        }
        // What is no envelope becomes a dead letter when its time comes.
        let Some(waiting) = message::waiting(delivery) else { return Wanted::Leave };
        match self.moved.get(&waiting.batch_id) {
            Some(moved) if *moved == (waiting.attempts, waiting.bytes) => Wanted::Drop,
            // It has failed again since: its new time holds.
            Some(_) => Wanted::Leave,
            None if self.ids.is_none_or(|ids| ids.contains(&waiting.batch_id)) => {
                Wanted::Move(waiting)
            }
            None => Wanted::Leave,
        }
    }

    async fn send(
        &mut self,
        look: &mut Look,
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
        // What is given up here was perhaps stored: then it comes twice.
        let late = look.began + HOLD - GIVING_BACK;
        let Ok(fates) = timeout_at(late.into(), self.shared.publisher().publish(messages)).await
        else {
            return Err(QueueError::new(
                "the broker did not confirm in the time for which a queue of retries may be held",
            ));
        };
        let fates = fates?;
        reached(Step::Moved);
        let mut sent = 0;
        for ((tag, waiting), fate) in marks.into_iter().zip(fates) {
            if fate != Fate::Stored {
                let why = if fate == Fate::Unroutable {
                    "does not exist any more"
                } else {
                    "takes no more"
                };
                return Err(QueueError::new(format!("queue `{retry}` {why}")));
            }
            look.ack(tag).await?;
            self.moved.insert(waiting.batch_id, (waiting.attempts, waiting.bytes));
            sent += 1;
        }
        Ok(sent)
    }
}

/// Looks at queues, one after the other, on a connection of its own: a queue that the broker has
/// lost the use of takes it down.
struct Looks<'q> {
    shared: &'q Shared,
    connection: Quarantine,
    /// Keeps others from looking at the same time: two would take one another's messages.
    _turn: Option<Lease>,
}

impl<'q> Looks<'q> {
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
                    // The user may not.
                    Err(why) => {
                        tracing::debug!(error = %why, "others are not kept from looking at the same time");
                        return Ok(None);
                    }
                }
            }
        };
        let turn: Result<_, QueueError> = timeout(TURN, turn).await.map_err(|_| {
            QueueError::new(format!(
                "another command looks through the retries, and has for {} s; try again later",
                TURN.as_secs()
            ))
        })?;
        let turn = turn?;
        Ok(Self { shared, connection, _turn: turn })
    }

    /// `None` if there is nothing to see.
    async fn at(&self, name: String) -> Result<Option<Look>, QueueError> {
        match count(self.shared, &name).await?.unwrap_or(0) {
            0 => Ok(None),
            messages => Ok(Some(Look::new(self.connection.lease().await?, name, messages))),
        }
    }

    /// Shows each message of a queue; how many could not be reached.
    async fn each(&self, name: String, mut show: impl FnMut(&Delivery)) -> Result<u64, QueueError> {
        let Some(mut look) = self.at(name).await? else { return Ok(0) };
        let looked = async {
            while let Some(delivery) = look.next().await? {
                show(&delivery);
            }
            Ok(u64::from(look.left))
        };
        let looked = looked.await;
        look.close().await?;
        looked
    }

    /// What is due and not taken; and how many could not be reached.
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

/// A look at the messages of one queue from its head on.
struct Look {
    lease: Lease,
    queue: String,
    began: Instant,
    /// Not taken yet, of those that were there at the beginning.
    left: u32,
    ready: VecDeque<Delivery>,
    consumers: u32,
    window: u16,
    /// Messages that one consumer takes so that there are few.
    share: u16,
    /// The last one that was taken had been given back before, so there may be more such behind it.
    amid_returned: bool,
    acked: bool,
}

impl Look {
    fn new(lease: Lease, queue: String, messages: u32) -> Self {
        let share =
            u16::try_from(messages.div_ceil(CONSUMERS)).unwrap_or(u16::MAX).max(FIRST_WINDOW);
        Self {
            lease,
            queue,
            began: clock::instant(),
            left: messages,
            ready: VecDeque::new(),
            consumers: 0,
            window: FIRST_WINDOW,
            share,
            amid_returned: false,
            acked: false,
        }
    }

    fn held(&self) -> Duration {
        clock::instant().saturating_duration_since(self.began)
    }

    /// The next message; `None` at the end, or when the time is over.
    async fn next(&mut self) -> Result<Option<Delivery>, QueueError> {
        while self.ready.is_empty() && self.left > 0 {
            if self.held() >= LOOK && !self.amid_returned {
                break;
            }
            self.fill().await?;
        }
        Ok(self.ready.pop_front())
    }

    /// Begins a consumer that takes no more than so many; its name too.
    async fn consume(&mut self, most: u16) -> Result<(String, Consumer), QueueError> {
        let channel = &self.lease.channel;
        let name = format!("look-{:08}", self.consumers);
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

    /// Takes the next few with a consumer that takes no more than these.
    async fn fill(&mut self) -> Result<(), QueueError> {
        let wanted = self.window.min(u16::try_from(self.left).unwrap_or(u16::MAX));
        let (name, mut consumer) = self.consume(wanted).await?;
        let mut came = 0;
        while came < wanted
            && let Ok(next) = timeout(SILENCE, consumer.next()).await
        {
            self.took(next)?;
            came += 1;
        }
        self.cancel(&name).await?;
        // What the broker had sent before it heard of the cancelling; then the stream ends.
        while let Some(next) = consumer.next().await {
            self.took(Some(next))?;
            came += 1;
        }
        self.left = self.left.saturating_sub(came.into());
        if came < wanted {
            // Some have come due since they were counted; what is there now may be newer, or slow.
            self.left = self.left.min(self.depth().await?);
        }
        let largest = self.ready.iter().map(|d| d.data.len()).max().unwrap_or(1).max(1);
        self.window =
            u16::try_from(WINDOW_BYTES / largest).unwrap_or(u16::MAX).clamp(1, self.share);
        Ok(())
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

    /// Gives back what was not acked.
    async fn close(mut self) -> Result<(), QueueError> {
        if self.acked {
            self.acks_arrive().await?;
        }
        answer(self.lease.channel.close(200, "looked at".into()))
            .await
            .map_err(|why| self.error(&why))
    }

    /// Waits until the queue has every ack on its disk.
    ///
    /// A message that comes meanwhile is given back with the others, behind them: if this one had
    /// been given back before, they all had been, and [`next`](Self::next) has taken them all.
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

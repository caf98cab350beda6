//! The source of history: takes every event from the queue of history.

use std::{
    collections::VecDeque,
    future::poll_fn,
    pin::Pin,
    sync::Arc,
    task::Poll,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use futures_util::{Stream as _, StreamExt as _};
use lapin::{
    Consumer,
    message::Delivery,
    options::{BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicQosOptions},
    types::{FieldTable, ShortString},
};
use tokio::{
    sync::watch,
    time::{Instant, timeout},
};

use super::{
    broker_error::{BrokerError, answer},
    history_mark,
    history_state::{Backlog, QueueState},
    message,
    pool::{Lease, Quarantine},
    prefetch::{is_other, size},
    record::{Record, now},
    shared::Shared,
    state_stream,
    topology::MAX_HISTORY,
};
use crate::{
    clock,
    event::event_type,
    policy::batching::BatchPolicy,
    queue::{GROUP_BYTES, HistorySource, HistoryStart, QueueError},
    store::{Gap, NewRow},
    telemetry::troubles::Harms,
};

/// The most events that may be unacked; their sizes may allow fewer.
const PREFETCH: u16 = 5000;

/// Time between two checks whether the queue has come to its limit.
const RECOUNT: Duration = Duration::from_secs(60);

/// Timeout of consuming the queue: one that is broken does not answer at all.
const CONSUMED: Duration = Duration::from_secs(5);

/// Time without a message after which the queue has no more to give.
const EXHAUSTED: Duration = Duration::from_millis(100);

pub struct History {
    shared: Arc<Shared>,
    /// Its own: a consumer that is too late for the broker, or a broken queue, can end the whole
    /// connection, and lanes would lose theirs with it. Given up where others lack one.
    connection: Quarantine,
    lease: Lease,
    consumer: Consumer,
    /// The broker has ended the consumer: it gives nothing any more, and does not say so again.
    is_cancelled: bool,
    /// When it had delivered everything that it had.
    waits_since: Option<std::time::Instant>,
    queue: String,
    prefetch: u16,
    /// The last tag that an earlier consumer has delivered: those do not count for the prefetch.
    begun_after: u64,
    /// Delivered, and to be taken before what comes next.
    before: VecDeque<Delivery>,
    /// The latest tags that were delivered, taken, and acked.
    delivered: u64,
    taken: u64,
    acked: u64,
    /// The tag of the last mark that was taken, and when that was sent.
    mark: Option<(u64, std::time::Instant)>,
    /// The time of the latest event that was taken.
    at: Option<SystemTime>,
    backlog: Backlog,
    counted: Instant,
    store: String,
    recorded: watch::Receiver<Option<Option<String>>>,
}

impl std::fmt::Debug for History {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("History").field("queue", &self.queue).finish_non_exhaustive()
    }
}

/// The trouble of a daemon whose store has no history.
const ABOUT: &str = "the store of history";

/// Claims history for a store; returns its id.
///
/// # Errors
/// Another store has it; or it is off, or cannot be recorded.
pub(super) async fn claim(shared: &Shared, start: &HistoryStart) -> Result<String, QueueError> {
    if !shared.topology.keeps_history() {
        return Err(QueueError::needs_operator("history is off in the configuration"));
    }
    let store = start.store.clone().ok_or_else(|| {
        QueueError::new("the id of the store is not known, and one store alone gets events")
    })?;
    shared.history.own.get_or_init(|| store.clone());
    if let Err(e) = claim_for(shared, &store).await {
        shared.history.want(false);
        shared.troubles.send_if_modified(|all| all.begins(ABOUT, Harms::History, e.to_string()));
        return Err(e);
    }
    shared.troubles.send_if_modified(|all| all.ends(ABOUT));
    Ok(store)
}

/// Waits until the record was read, and returns whether this store has history. Records it if no
/// store has.
async fn claim_for(shared: &Shared, store: &str) -> Result<(), QueueError> {
    let mut recorded = shared.history.recorded.subscribe();
    loop {
        let found = recorded.wait_for(Option::is_some).await;
        // An error means that everything ends.
        let found = found.map_err(|_| closed())?.clone().flatten();
        match found {
            Some(found) if found == store => return Ok(()),
            Some(_) => return Err(another_store(shared)),
            None => {
                let record = Record::Store { store: store.to_owned(), adopted: false, at: now() };
                state_stream::write(&shared.topology, shared.publisher(), &record).await?;
                recorded.wait_for(|found| found.as_ref().is_some_and(Option::is_some)).await.ok();
            }
        }
    }
}

/// Whether the record says that another store has history.
fn is_of_another(recorded: &Option<Option<String>>, store: &str) -> bool {
    matches!(recorded, Some(Some(found)) if found != store)
}

fn closed() -> QueueError {
    QueueError::new("the queue is closed")
}

/// The error of a daemon whose store has no history.
fn another_store(shared: &Shared) -> QueueError {
    QueueError::another_store(format!(
        "another store has the history of [queue] prefix `{}`: this daemon delivers, and keeps none",
        shared.topology.prefix()
    ))
    .remedied("give each daemon a prefix of its own, or move history to this store: hooktrail store adopt")
}

impl History {
    pub(super) async fn open(
        shared: &Arc<Shared>,
        start: HistoryStart,
    ) -> Result<Self, QueueError> {
        let store = claim(shared, &start).await?;
        if let Some(at) = start.known_until {
            shared.history.stored(at);
        }
        shared.history.want(true);
        let (mut state, mut recorded) =
            (shared.history.queue.subscribe(), shared.history.recorded.subscribe());
        tokio::select! {
            bound = state.wait_for(|state| *state == QueueState::Bound) => drop(bound.map_err(|_| closed())?),
            Ok(_) = recorded.wait_for(|found| is_of_another(found, &store)) => {
                shared.history.want(false);
                return Err(another_store(shared));
            }
        }
        Self::consume(shared, store).await.inspect_err(|_| shared.history.suspect())
    }

    async fn consume(shared: &Arc<Shared>, store: String) -> Result<Self, QueueError> {
        let queue = shared.topology.history();
        let mut broker = shared.broker();
        let ready = broker.depth(&queue).await?.map_or(0, |depth| depth.messages);
        let since = shared.history.last_stored();
        let connection = shared.consuming.for_history().await?;
        let lease = connection.lease().await?;
        let prefetch = shared.history.sizes().allow(PREFETCH);
        let asked = clock::instant();
        let consumer = match timeout(CONSUMED, begin(&lease, &queue, prefetch)).await {
            Ok(begun) => begun.map_err(|why| failed(&queue, &why))?,
            Err(_) => {
                return Err(QueueError::new(format!(
                    "queue `{queue}` cannot be consumed: no answer"
                )));
            }
        };
        shared.history.consumes(connection.borrowed(), lease.channel.status().clone(), asked);
        tracing::debug!(queue, prefetch, ready, "history consumes its queue");
        Ok(Self {
            shared: shared.clone(),
            connection,
            lease,
            consumer,
            is_cancelled: false,
            waits_since: None,
            prefetch,
            begun_after: 0,
            before: VecDeque::new(),
            delivered: 0,
            taken: 0,
            acked: 0,
            mark: None,
            at: None,
            backlog: Backlog::new(ready, MAX_HISTORY, since),
            counted: Instant::from_std(clock::instant()),
            store,
            recorded: shared.history.recorded.subscribe(),
            queue,
        })
    }

    /// Adds a delivery to the events that were taken; returns the bytes of its body.
    fn add(&mut self, delivery: Delivery, into: &mut Vec<NewRow>) -> usize {
        self.taken = delivery.delivery_tag;
        let published = delivery.data.len();
        if let Some(id) = history_mark::id_of(&delivery) {
            let sent_at = self.shared.marks.taken(id, delivery.redelivered);
            self.mark = sent_at.map(|at| (self.taken, at)).or(self.mark);
            self.arrived(published, clock::now());
            return 0;
        }
        let size = size(published, &delivery.properties);
        let row = row(delivery, clock::now());
        self.shared.history.sizes().saw(size.max(row.body.len()));
        self.arrived(published, row.at);
        self.at = Some(row.at);
        let bytes = row.body.len();
        into.push(row);
        bytes
    }

    /// A message of the queue has arrived, whose body has so many bytes.
    fn arrived(&mut self, published: usize, at: SystemTime) {
        let history = &self.shared.history;
        if let Some((since, until)) = self.backlog.arrived(published as u64, at) {
            history.lacks(
                since,
                until,
                "its queue in RabbitMQ had reached its limit of 1 GiB, and dropped the oldest events",
            );
        }
    }

    /// The next delivery, if there is one.
    fn poll(&mut self, cx: &mut std::task::Context<'_>) -> Poll<Result<Delivery, QueueError>> {
        if let Some(delivery) = self.before.pop_front() {
            return Poll::Ready(Ok(delivery));
        }
        if self.is_cancelled {
            return Poll::Ready(Err(cancelled(&self.queue)));
        }
        let next = Pin::new(&mut self.consumer).poll_next(cx);
        if next.is_pending() {
            self.waits_since = Some(clock::instant());
        }
        next.map(|next| match next {
            Some(Ok(delivery)) => {
                self.delivered = delivery.delivery_tag;
                if let Some(at) = self.waits_since.take() {
                    self.shared.history.delivered_after(at);
                }
                Ok(delivery)
            }
            Some(Err(e)) => Err(failed(&self.queue, &e.into())),
            None => {
                self.cancelled_by_broker();
                Err(cancelled(&self.queue))
            }
        })
    }

    fn cancelled_by_broker(&mut self) {
        self.is_cancelled = true;
        self.shared.history.ends_consuming();
    }

    /// Waits a little until the consumer has as many messages unacked as it may. Only then may it be
    /// cancelled: a message on its way would be requeued behind later ones.
    async fn exhaust(&mut self) -> Result<bool, BrokerError> {
        while self.delivered - self.acked.max(self.begun_after) < u64::from(self.prefetch) {
            match timeout(EXHAUSTED, self.consumer.next()).await {
                Ok(Some(delivery)) => self.deliver_later(delivery?),
                // The next take says so: what is stored is to be acked before.
                Ok(None) => {
                    self.cancelled_by_broker();
                    return Ok(false);
                }
                Err(_) => return Ok(false),
            }
        }
        Ok(true)
    }

    fn deliver_later(&mut self, delivery: Delivery) {
        self.delivered = delivery.delivery_tag;
        self.before.push_back(delivery);
    }

    async fn cancel(&mut self) -> Result<(), BrokerError> {
        let tag = self.consumer.tag();
        answer(self.lease.channel.basic_cancel(tag, BasicCancelOptions::default())).await?;
        answer(async {
            while let Some(delivery) = self.consumer.next().await {
                self.deliver_later(delivery?);
            }
            Ok(())
        })
        .await
    }

    /// Acks what was taken, and replaces the consumer if the sizes of the events allow a much larger
    /// or smaller prefetch.
    async fn ack(&mut self) -> Result<(), BrokerError> {
        let next = self.shared.history.sizes().allow(PREFETCH);
        let replaces =
            !self.is_cancelled && is_other(self.prefetch, next, PREFETCH) && self.exhaust().await?;
        if replaces {
            let (prefetch, delivered, acked) = (self.prefetch, self.delivered, self.acked);
            tracing::debug!(prefetch, next, delivered, acked, "history replaces its consumer");
            self.cancel().await?;
        }
        let multiple = BasicAckOptions { multiple: true };
        answer(self.lease.channel.basic_ack(self.taken, multiple)).await?;
        self.acked = self.taken;
        if replaces {
            self.consumer = begin(&self.lease, &self.queue, next).await?;
            (self.prefetch, self.begun_after) = (next, self.delivered);
            tracing::debug!(prefetch = next, "history has replaced its consumer");
        }
        Ok(())
    }

    /// Counts what is ready, to notice when the queue comes to its limit while it is read.
    async fn recount(&mut self) -> Result<(), QueueError> {
        let ready = self.shared.broker().messages(&self.queue).await?;
        let ready = u32::try_from(ready.unwrap_or(0)).unwrap_or(u32::MAX);
        self.backlog = Backlog::new(ready, MAX_HISTORY, self.shared.history.last_stored());
        self.counted = Instant::from_std(clock::instant());
        Ok(())
    }
}

async fn begin(lease: &Lease, queue: &str, prefetch: u16) -> Result<Consumer, BrokerError> {
    answer(async {
        lease.channel.basic_qos(prefetch, BasicQosOptions::default()).await?;
        let options = BasicConsumeOptions::default();
        lease.channel.basic_consume(queue.into(), "".into(), options, FieldTable::default()).await
    })
    .await
}

fn cancelled(queue: &str) -> QueueError {
    QueueError::new(format!(
        "the broker cancelled the consumer of queue `{queue}`: it was deleted or moved"
    ))
}

fn failed(queue: &str, why: &BrokerError) -> QueueError {
    QueueError::new(format!("queue `{queue}` cannot be consumed: {why}"))
}

impl HistorySource for History {
    async fn take(&mut self, into: &mut Vec<NewRow>, max: usize) -> Result<(), QueueError> {
        let (shared, mut recorded, store) =
            (self.shared.clone(), self.recorded.clone(), self.store.clone());
        let moved = recorded.wait_for(|found| is_of_another(found, &store));
        let (before, taken) = (into.len(), self.taken);
        let mut bytes = 0;
        let taking = poll_fn(|cx| {
            while into.len() - before < max && bytes < GROUP_BYTES {
                match self.poll(cx) {
                    Poll::Ready(Ok(delivery)) => bytes += self.add(delivery, into),
                    Poll::Ready(Err(e)) => return Poll::Ready(Err(e)),
                    Poll::Pending if self.taken == taken => return Poll::Pending,
                    Poll::Pending => break,
                }
            }
            Poll::Ready(Ok(()))
        });
        tokio::select! {
            biased;
            Ok(_) = moved => {}
            given_up = shared.dialer.shortage() => {
                shared.history.suspect();
                return Err(given_up);
            }
            taken = taking => return taken.inspect_err(|_| shared.history.suspect()),
            // To be stored at once: a process that is killed knows it no more.
            () = shared.history.gap_found.notified() => return Ok(()),
        }
        self.shared.history.want(false);
        Err(another_store(&self.shared))
    }

    async fn stored(&mut self) -> Result<(), QueueError> {
        if self.taken > self.acked {
            self.ack().await.map_err(|why| failed(&self.queue, &why))?;
        }
        let history = &self.shared.history;
        if let Some(at) = self.at {
            history.stored(at);
        }
        // While the broker blocks publishing, each group would wait for it.
        if self.shared.publisher().is_writable()
            && let Some(time) = history.stored_lack()
            && !state_stream::end_lack(&self.shared, time).await
        {
            history.owes(time);
        }
        if let Some((_, sent_at)) = self.mark.take_if(|(tag, _)| *tag <= self.acked) {
            self.shared.marks.passed(sent_at);
        }
        if self.backlog.is_read() && clock::instant() >= self.counted.into_std() + RECOUNT {
            self.recount().await?;
        }
        Ok(())
    }

    fn gaps(&mut self) -> Vec<Gap> {
        self.shared.history.take_gaps()
    }

    async fn close(self) {
        let closed = answer(self.lease.channel.close(200, "requeued".into())).await;
        if let Err(why) = closed {
            tracing::debug!(queue = self.queue, error = %why, "the channel was gone before it was closed");
        }
        self.connection.close().await;
    }
}

/// An event as history has it.
fn row(delivery: Delivery, now: SystemTime) -> NewRow {
    let properties = &delivery.properties;
    let plain = message::decoded(properties, &delivery.data, BatchPolicy::MAX_BYTES as usize)
        .ok()
        .flatten();
    let at = properties.timestamp().and_then(|t| clock::sane(t, now)).unwrap_or(now);
    let message_id = properties.message_id().as_ref().map(ShortString::as_str).map(str::to_owned);
    let routing_key = delivery.routing_key.as_str().to_owned();
    let body = Bytes::from(plain.unwrap_or(delivery.data));
    let event_type = if routing_key.is_empty() {
        event_type(&body).map(|t| t.into_owned()).unwrap_or_default()
    } else {
        routing_key
    };
    NewRow {
        number: None,
        at,
        event_type,
        message_id,
        body,
        redelivered: delivery.redelivered,
        tenant: None,
    }
}

//! What earlier configurations bound and who is paused, remembered in a stream next to the queues,
//! which every daemon follows.
//!
//! The broker does not tell which patterns a queue is bound with. Without this record a pattern
//! that was taken out of the configuration would go on filling the queue, and so would the patterns
//! of a subscriber that was removed.

use std::{
    collections::{BTreeMap, BTreeSet},
    convert::Infallible,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures_util::StreamExt as _;
use lapin::{BasicProperties, Consumer, message::Delivery, options::BasicAckOptions};
use tokio::{
    sync::watch,
    time::{sleep, sleep_until, timeout},
};

use super::{
    AmqpQueue,
    connection::{BrokerError, Lease, Pool, RPC_TIMEOUT, answer},
    message::Message,
    publisher::{Fate, Publisher},
    record::{About, Bindings, Bound, Patterns, Record, Recorded, now},
    snapshot::{self, Opened},
    topology::{Broker, Topology},
    upkeep::Upkeep,
};
use crate::{
    clock,
    config::{Subscriber, Subscribers},
    delivery::{Standing, SubscriberName},
    failpoint::{Step, reached},
    queue::QueueError,
    telemetry::outage::ReportedOutage,
};

/// How often it is looked whether another daemon still works for a subscriber that this one does
/// not have.
const RECHECK: Duration = Duration::from_secs(60);
const RECHECK_SOON: Duration = Duration::from_secs(2);

/// Who is asked whether it works for a subscriber has answered by then; a look comes each
/// [`RECHECK_SOON`].
const ANSWERED: Duration = Duration::from_millis(1500);

/// How long another daemon is believed to have a subscriber after it said so.
const BELIEVED: Duration = Duration::from_secs(3600);

/// Records are acked in groups: an ack for each makes a long record five times as slow to read.
const ACK_EVERY: u64 = 200;

/// The longest that a record stays unacked when no other comes. The broker closes the channel of a
/// consumer that keeps one for its consumer timeout, which is 30 minutes by default.
const ACK_WITHIN: Duration = Duration::from_secs(1);

/// After so long without a record all that the stream held has come.
const QUIET: Duration = Duration::from_secs(5);

/// Why a subscriber that is configured here is not in the record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Unrecorded {
    /// Another daemon, or `prune`, has taken it out.
    Removed,
    /// Nobody has: the record itself was lost, or a part of it.
    Lost,
}

/// Records that a subscriber is paused or resumed; returns when that is confirmed.
pub(super) async fn record(
    topology: &Topology,
    publisher: &Publisher,
    subscriber: &SubscriberName,
    standing: &Standing,
) -> Result<(), QueueError> {
    write(topology, publisher, &Record::of(subscriber, standing)).await
}

/// Records that a removed subscriber's queues are no more.
pub(super) async fn forget(
    topology: &Topology,
    publisher: &Publisher,
    subscriber: &SubscriberName,
) -> Result<(), QueueError> {
    let pruned =
        Record::Removed { subscriber: subscriber.clone(), removed: true, pruned: true, at: now() };
    write(topology, publisher, &pruned).await
}

/// Reads the stream for who was removed and not pruned; for commands, which do not follow it.
pub(super) async fn removed(queue: &AmqpQueue) -> Result<BTreeSet<SubscriberName>, QueueError> {
    Ok(read(queue).await?.removed)
}

/// Reads the stream for who is bound; for commands, which do not follow it.
pub(super) async fn all_bound(queue: &AmqpQueue) -> Result<BTreeSet<SubscriberName>, QueueError> {
    Ok(read(queue).await?.bindings.into_keys().collect())
}

/// What daemons that follow the record say of themselves.
#[derive(Debug, Default)]
pub(super) struct Asked {
    /// All subscribers that the record tells of.
    pub(super) known: BTreeSet<SubscriberName>,
    /// One for which a daemon works now.
    pub(super) works: Option<SubscriberName>,
}

/// Asks every daemon whether it works for one of those that are bound, and waits a little for an
/// answer.
pub(super) async fn who_works(queue: &AmqpQueue) -> Result<Asked, QueueError> {
    let topology = queue.topology();
    if Broker::new(&queue.0.declaring).depth(&topology.state()).await?.is_none() {
        return Ok(Asked::default());
    }
    let mut opened = snapshot::open(&queue.0.declaring, topology).await?;
    read_to_end(queue, &mut opened).await?;
    let Opened { lease, mut records, recorded, .. } = opened;
    for name in recorded.bindings.keys() {
        write(topology, queue.publisher(), &Record::Asked { asked: name.clone() }).await?;
    }
    let answered = async {
        while let Ok(delivery) = next_record(topology, &lease, &mut records).await {
            if let Ok(Record::Bound { subscriber, .. }) = serde_json::from_slice(&delivery.data) {
                return Some(subscriber);
            }
        }
        None
    };
    let works = timeout(2 * ANSWERED, answered).await.ok().flatten();
    let mut known: BTreeSet<SubscriberName> = recorded.bindings.into_keys().collect();
    known.extend(recorded.removed);
    known.extend(recorded.standings.keys().cloned());
    Ok(Asked { known, works })
}

/// Reads the stream for what is bound to the exchange of the events; for commands, which do not
/// follow it.
pub(super) async fn bound(queue: &AmqpQueue) -> Result<Patterns, QueueError> {
    Ok(read(queue).await?.bound_to(&queue.topology().events()))
}

async fn read(queue: &AmqpQueue) -> Result<Recorded, QueueError> {
    let topology = queue.topology();
    if Broker::new(&queue.0.declaring).depth(&topology.state()).await?.is_none() {
        return Ok(Recorded::default());
    }
    let mut opened = snapshot::open(&queue.0.declaring, topology).await?;
    read_to_end(queue, &mut opened).await?;
    Ok(opened.recorded)
}

async fn next_record(
    topology: &Topology,
    lease: &Lease,
    records: &mut Consumer,
) -> Result<Delivery, QueueError> {
    let delivery = match timeout(RPC_TIMEOUT, records.next()).await.ok().flatten() {
        Some(Ok(delivery)) => delivery,
        Some(Err(e)) => return Err(error(topology, &BrokerError::from(e))),
        None => return Err(error(topology, "the broker sent no more records before the last one")),
    };
    ack(lease, delivery.delivery_tag, false).await.map_err(|why| error(topology, &why))?;
    Ok(delivery)
}

/// Acks a record and those before it, if that is due, and returns whether it was.
async fn ack(lease: &Lease, tag: u64, at_once: bool) -> Result<bool, BrokerError> {
    let due = at_once || tag.is_multiple_of(ACK_EVERY);
    if due {
        answer(lease.channel.basic_ack(tag, BasicAckOptions { multiple: true })).await?;
    }
    Ok(due)
}

async fn read_to_end(queue: &AmqpQueue, opened: &mut Opened) -> Result<(), QueueError> {
    let topology = queue.topology();
    let mark = clock::batch_id();
    write(topology, queue.publisher(), &Record::Mark { mark: mark.clone() }).await?;
    loop {
        let delivery = next_record(topology, &opened.lease, &mut opened.records).await?;
        match serde_json::from_slice::<Record>(&delivery.data) {
            Ok(Record::Mark { mark: found }) if found == mark => return Ok(()),
            Ok(record) => drop(opened.recorded.apply(record, &topology.events())),
            // One of a later version, which says something else.
            Err(_) => {}
        }
    }
}

fn error(topology: &Topology, why: &(impl std::fmt::Display + ?Sized)) -> QueueError {
    QueueError::new(format!("stream `{}`: {why}", topology.state()))
}

async fn write(
    topology: &Topology,
    publisher: &Publisher,
    record: &Record,
) -> Result<(), QueueError> {
    let body = serde_json::to_vec(record).map_err(|e| error(topology, &e))?;
    let properties = BasicProperties::default()
        .with_delivery_mode(2)
        .with_content_type("application/json".into());
    let message = Message::to_queue(topology.state(), Bytes::from(body), properties);
    publisher.ready().await?;
    match publisher.publish(vec![message]).await?[..] {
        [Fate::Stored] => {
            reached(Step::Recorded);
            Ok(())
        }
        _ => Err(error(topology, "the broker did not take a record")),
    }
}

/// All subscribers whose bindings are recorded, or were since the newest snapshot, for an
/// inspection that writes nothing: it reads the record up to `records`, or until no more come.
pub(super) async fn ever_bound(
    topology: &Topology,
    pool: &Pool,
    records: u32,
) -> Result<BTreeSet<SubscriberName>, QueueError> {
    let Opened { lease, records: mut consumer, recorded, passed } =
        snapshot::open(pool, topology).await?;
    let mut found: BTreeSet<SubscriberName> =
        recorded.bindings.into_keys().chain(recorded.removed).collect();
    for _ in passed..u64::from(records) {
        let Ok(Some(next)) = timeout(QUIET, consumer.next()).await else { break };
        let delivery = next.map_err(|e| error(topology, &BrokerError::from(e)))?;
        ack(&lease, delivery.delivery_tag, false).await.map_err(|why| error(topology, &why))?;
        if let Ok(Record::Bound { subscriber, .. }) = serde_json::from_slice(&delivery.data) {
            found.insert(subscriber);
        }
    }
    Ok(found)
}

/// Keeps the bindings as the configuration says, now that the new ones are in place.
pub(super) struct Reconciler<'a> {
    queue: &'a AmqpQueue,
    topology: &'a Topology,
    configured: watch::Receiver<Subscribers>,
    /// What was configured when it was last looked.
    subscribers: Subscribers,
    wanted: Bindings,
    /// Subscribers about whom it was logged already that daemons do not agree.
    differing: BTreeSet<SubscriberName>,
    /// Subscribers that this daemon has unbound, and those of them that another then bound again.
    removed: BTreeSet<SubscriberName>,
    wanted_elsewhere: BTreeMap<SubscriberName, Instant>,
    /// Records of bindings that this daemon has written and not read yet.
    echoes: BTreeMap<SubscriberName, u32>,
    /// How often it was seen that another daemon works for a subscriber that is not configured
    /// here.
    looks: BTreeMap<SubscriberName, u32>,
    /// When the others were asked whether they work for a subscriber that nobody consumes.
    asked: BTreeMap<SubscriberName, Instant>,
    /// What was logged already of what cannot be bound or unbound.
    refused: BTreeSet<String>,
    /// Subscribers that are bound to the exchange that is configured now, and in the record to an
    /// earlier one, which cannot be unbound.
    between: BTreeSet<SubscriberName>,
    /// Subscribers that are not configured any more and cannot be unbound.
    stuck: BTreeSet<SubscriberName>,
    /// Of what is configured now.
    reconciled: bool,
    /// The record has been read to its end at least once.
    has_read: bool,
    upkeep: Upkeep<'a>,
}

impl<'a> Reconciler<'a> {
    pub(super) fn new(queue: &'a AmqpQueue, configured: watch::Receiver<Subscribers>) -> Self {
        let mut new = Self {
            queue,
            topology: queue.topology(),
            configured,
            subscribers: Subscribers::default(),
            wanted: Bindings::new(),
            differing: BTreeSet::new(),
            removed: BTreeSet::new(),
            wanted_elsewhere: BTreeMap::new(),
            echoes: BTreeMap::new(),
            looks: BTreeMap::new(),
            asked: BTreeMap::new(),
            refused: BTreeSet::new(),
            between: BTreeSet::new(),
            stuck: BTreeSet::new(),
            reconciled: false,
            has_read: false,
            upkeep: Upkeep::new(queue),
        };
        new.adopt();
        new
    }

    /// Takes over what is configured now.
    fn adopt(&mut self) {
        self.subscribers = self.configured.borrow_and_update().clone();
        let events = self.topology.events();
        let bound = |s: &Subscriber| Bound {
            exchange: events.clone(),
            patterns: s.events.iter().map(|p| p.as_str().to_owned()).collect(),
        };
        self.wanted = self.subscribers.iter().map(|s| (s.name.clone(), bound(s))).collect();
        self.differing.clear();
        self.removed.retain(|name| !self.wanted.contains_key(name));
        self.wanted_elsewhere.retain(|name, _| !self.wanted.contains_key(name));
        self.looks.clear();
        self.asked.clear();
        self.refused.clear();
        self.between.clear();
        self.stuck.clear();
        self.reconciled = false;
    }

    /// Reads the stream from its first record, takes away what only earlier configurations had, and
    /// then follows what other daemons write, until it fails.
    pub(super) async fn follow(
        &mut self,
        following: &mut ReportedOutage,
    ) -> Result<Infallible, QueueError> {
        let mut broker = Broker::new(&self.queue.0.declaring);
        self.topology.ensure_state(&mut broker).await?;
        self.echoes.clear();
        // Answers may have been missed.
        self.asked.clear();
        // What this daemon has recorded and not read yet has to come as a record of its own.
        let opened = if self.queue.recorded().is_empty() {
            snapshot::open(&self.queue.0.declaring, self.topology).await?
        } else {
            snapshot::open_whole(&self.queue.0.declaring, self.topology).await?
        };
        let Opened { lease, mut records, mut recorded, passed } = opened;
        let mut read = 0;
        let mark = clock::batch_id();
        let (topology, publisher, last) =
            (self.topology, self.queue.publisher(), Record::Mark { mark: mark.clone() });
        let mut marking = std::pin::pin!(write(topology, publisher, &last));
        let mut marked = false;
        let mut removals = self.queue.0.removals.changes();
        let mut up_to_date = false;
        let mut latest = clock::instant();
        let mut unacked = None;
        // What commands write, one after the other, must not put it off.
        let mut looked = latest;
        loop {
            if up_to_date {
                let bound = self.to_be_bound(&recorded);
                *self.queue.bound() = bound;
            }
            let next_look = looked + self.until_next_look();
            let next = tokio::select! {
                wrote = &mut marking, if !marked => {
                    marked = true;
                    if let Err(e) = wrote {
                        let quiet = clock::instant() - latest > QUIET;
                        if quiet && lease.channel.status().connected() {
                            self.without_mark(&recorded);
                        }
                        return Err(e);
                    }
                    continue;
                }
                next = records.next() => next.ok_or_else(|| self.error("its consumer was cancelled"))?,
                Ok(()) = self.configured.changed(), if up_to_date => {
                    self.adopt();
                    self.reconcile(&mut broker, &mut recorded).await?;
                    looked = clock::instant();
                    continue;
                }
                () = self.upkeep.due(), if up_to_date => {
                    self.keep_bound(&mut broker, &recorded).await;
                    continue;
                }
                () = async { tokio::select! { () = sleep_until(next_look.into()) => {}, Ok(()) = removals.changed() => {} } }, if up_to_date => {
                    looked = clock::instant();
                    if self.reconciled {
                        self.unbind_removed(&mut broker, &mut recorded).await?;
                    } else {
                        self.reconcile(&mut broker, &mut recorded).await?;
                    }
                    continue;
                }
                () = sleep_until((latest + ACK_WITHIN).into()), if unacked.is_some() => {
                    if let Some(tag) = unacked.take() {
                        ack(&lease, tag, true).await.map_err(|why| self.error(&why))?;
                    }
                    continue;
                }
                () = sleep(RPC_TIMEOUT), if marked && !up_to_date => {
                    return Err(self.error("the broker sent no more records before the last one"));
                }
            };
            let delivery = next.map_err(|e| self.error(&BrokerError::from(e)))?;
            latest = clock::instant();
            read += 1;
            let acked = ack(&lease, delivery.delivery_tag, up_to_date)
                .await
                .map_err(|why| self.error(&why))?;
            unacked = (!acked).then_some(delivery.delivery_tag);
            match serde_json::from_slice::<Record>(&delivery.data) {
                Ok(Record::Mark { mark: found }) if found == mark => {
                    up_to_date = true;
                    tracing::debug!(
                        stream = self.topology.state(),
                        records = read,
                        passed,
                        "the record was read to its end"
                    );
                    if let Some(offset) =
                        snapshot::offset_of(&delivery).filter(|_| read > snapshot::WORTHWHILE)
                    {
                        self.save(&recorded, &mark, offset).await;
                    }
                    self.write_lost(&mut recorded).await?;
                    self.tell_removed(&recorded);
                    self.stand_all(&recorded);
                    // Asked while this daemon did not listen.
                    for name in std::mem::take(&mut recorded.asked) {
                        self.answer(&mut recorded.bindings, &name).await?;
                    }
                    self.reconcile(&mut broker, &mut recorded).await?;
                    looked = clock::instant();
                    following.recovered();
                }
                Ok(record) => match recorded.apply(record, &self.topology.events()) {
                    About::Bindings(name) if up_to_date => {
                        self.tell_removed(&recorded);
                        self.has_come(&mut broker, &mut recorded, &name).await?;
                    }
                    About::Pruned(name) if up_to_date => {
                        self.tell_removed(&recorded);
                        self.queue.0.standings.send_modify(|all| {
                            drop(all.as_mut().map(|all| Arc::make_mut(all).remove(&name)))
                        });
                        self.compare(&mut broker, &mut recorded, &name, Unrecorded::Removed)
                            .await?;
                    }
                    About::Standing(name) => {
                        self.has_read(&name, &recorded);
                        if up_to_date {
                            self.stands(&name, &recorded);
                        }
                    }
                    About::Asked(name) if up_to_date => {
                        self.answer(&mut recorded.bindings, &name).await?
                    }
                    About::Bindings(_) | About::Pruned(_) | About::Asked(_) | About::Nothing => {}
                },
                Err(e) => {
                    tracing::warn!(stream = self.topology.state(), error = %e, "a record is not understood and left alone")
                }
            }
        }
    }

    /// Writes a snapshot of a record that took long to read. Nothing depends on it.
    async fn save(&self, recorded: &Recorded, mark: &str, offset: u64) {
        let saved = snapshot::save(
            &self.queue.0.declaring,
            self.queue.publisher(),
            self.topology,
            recorded,
            mark,
            offset,
        );
        let error = match timeout(RPC_TIMEOUT, saved).await {
            Ok(Ok(())) => return,
            Ok(Err(e)) => e.to_string(),
            Err(_) => "it was not confirmed in time".to_owned(),
        };
        tracing::warn!(
            stream = self.topology.snapshot(),
            error,
            "no snapshot of the record could be written; the next start reads all of it again"
        );
    }

    /// The record has been read to its end. What this daemon has recorded since then is still to
    /// come, and counts already.
    fn stand_all(&self, recorded: &Recorded) {
        let mut all = recorded.standings.clone();
        for (name, standing) in self.queue.recorded().iter() {
            Arc::make_mut(&mut all).insert(name.clone(), standing.clone());
        }
        self.queue.0.standings.send_replace(Some(all));
    }

    /// A standing was read. If this daemon has written it, it need not be remembered any more.
    fn has_read(&self, name: &SubscriberName, recorded: &Recorded) {
        let mut own = self.queue.recorded();
        // As they are written, which has milliseconds.
        let text = |standing: &Standing| serde_json::to_string(&Record::of(name, standing)).ok();
        if own.get(name).is_some_and(|own| text(own) == recorded.standings.get(name).and_then(text))
        {
            own.remove(name);
        }
    }

    /// Tells of one subscriber alone: of another this daemon may have recorded something that is
    /// still to come.
    fn stands(&self, name: &SubscriberName, recorded: &Recorded) {
        if let Some(standing) = recorded.standings.get(name).cloned() {
            self.queue.0.standings.send_modify(|all| {
                drop(Arc::make_mut(all.get_or_insert_default()).insert(name.clone(), standing))
            });
        }
    }

    /// A broker that blocks publishing takes no mark, and still sends what it has: after a silence
    /// that is all. Otherwise nothing would be delivered by a daemon that starts meanwhile.
    fn without_mark(&self, recorded: &Recorded) {
        self.queue.0.standings.send_if_modified(|known| {
            let first = known.is_none();
            if first {
                tracing::warn!(
                    stream = self.topology.state(),
                    "the broker takes no messages now; who is paused is taken from the records that have come"
                );
                *known = Some(recorded.standings.clone());
            }
            first
        });
    }

    /// Sees to it that what the record says of those who are configured here is bound: what another
    /// daemon has removed stays removed, and what somebody else has taken away comes back.
    async fn keep_bound(&mut self, broker: &mut Broker<'_>, recorded: &Recorded) {
        let (subscribers, patterns) = (self.subscribers.clone(), self.to_be_bound(recorded));
        self.upkeep.check(broker, &subscribers, &patterns).await;
    }

    fn to_be_bound(&self, recorded: &Recorded) -> Patterns {
        let mut patterns = recorded.bound_to(&self.topology.events());
        patterns.retain(|name, _| self.wanted.contains_key(name));
        for (name, wanted) in &self.wanted {
            let bound = patterns.entry(name.clone()).or_default();
            if self.between.contains(name) {
                bound.clone_from(&wanted.patterns);
            } else {
                // What another configuration wants besides is the other daemon's to keep.
                bound.retain(|pattern| wanted.patterns.contains(pattern));
            }
        }
        patterns.retain(|_, bound| !bound.is_empty());
        patterns
    }

    /// When the stream was deleted and declared again, this daemon is the one that knows what stood
    /// there. Who is bound is written when that is reconciled.
    async fn write_lost(&mut self, recorded: &mut Recorded) -> Result<(), QueueError> {
        let began = std::mem::replace(&mut self.has_read, true);
        if !began && !recorded.bindings.is_empty() {
            self.upkeep.began_with_record();
        }
        let known = self.queue.0.standings.borrow().clone().unwrap_or_default();
        if !began || !recorded.bindings.is_empty() || self.wanted.is_empty() {
            return Ok(());
        }
        tracing::warn!(
            stream = self.topology.state(),
            "the record is empty, so somebody has deleted it; what is bound and who is paused is written again"
        );
        for (name, standing) in
            known.iter().filter(|(name, _)| !recorded.standings.contains_key(*name))
        {
            self.write(&Record::of(name, standing)).await?;
        }
        let mut all = known;
        for (name, standing) in recorded.standings.iter() {
            Arc::make_mut(&mut all).insert(name.clone(), standing.clone());
        }
        recorded.standings = all;
        Ok(())
    }

    /// A record of a subscriber's bindings was just read.
    async fn has_come(
        &mut self,
        broker: &mut Broker<'_>,
        recorded: &mut Recorded,
        name: &SubscriberName,
    ) -> Result<(), QueueError> {
        if !self.is_echo(name, recorded) {
            self.is_elsewhere(name, recorded);
        }
        self.compare(broker, recorded, name, Unrecorded::Removed).await
    }

    /// Whether a record of bindings that was just read is one that this daemon has written.
    fn is_echo(&mut self, name: &str, recorded: &Recorded) -> bool {
        let written = recorded.bindings.contains_key(name);
        written
            && self
                .echoes
                .get_mut(name)
                .is_some_and(|n| std::mem::replace(n, n.saturating_sub(1)) > 0)
    }

    fn tell_removed(&self, recorded: &Recorded) {
        self.queue.0.removed.send_if_modified(|known| {
            let new = *known != recorded.removed;
            if new {
                known.clone_from(&recorded.removed);
            }
            new
        });
    }

    /// Once for each configuration: from then on what another daemon says is no earlier one.
    async fn reconcile(
        &mut self,
        broker: &mut Broker<'_>,
        all: &mut Recorded,
    ) -> Result<(), QueueError> {
        self.queue
            .0
            .removals
            .judge(&all.bindings.keys().cloned().collect(), &self.wanted.keys().cloned().collect());
        let subscribers = self.subscribers.clone();
        if self.reconciled {
            for s in subscribers.iter() {
                let unrecorded = if all.removed.contains(&s.name) {
                    Unrecorded::Removed
                } else {
                    Unrecorded::Lost
                };
                self.compare(broker, all, &s.name, unrecorded).await?;
            }
            return self.unbind_removed(broker, all).await;
        }
        let recorded = &mut all.bindings;
        let mut all_done = true;
        for s in subscribers.iter() {
            let Some(wanted) = self.wanted.get(&s.name).cloned() else { continue };
            let old = recorded.get(&s.name).cloned();
            if old.as_ref() == Some(&wanted) {
                continue;
            }
            // Another daemon may have unbound what this one had bound when it began.
            if !self.ensure(broker, s).await {
                all_done = false;
                continue;
            }
            // What stays bound stays in the record, so that it is tried again.
            let left = self.unbind_old(broker, &s.name, old.as_ref(), &wanted).await;
            match old {
                Some(old) if !left.is_empty() && old.exchange != wanted.exchange => {
                    all_done = false;
                    self.between.insert(s.name.clone());
                }
                _ => {
                    all_done &= left.is_empty();
                    let bound = Bound { patterns: &wanted.patterns | &left, ..wanted };
                    if recorded.get(&s.name) != Some(&bound) {
                        self.record(recorded, &s.name, bound).await?;
                    }
                    self.between.remove(&s.name);
                }
            }
        }
        self.unbind_removed(broker, all).await?;
        self.reconciled = all_done;
        Ok(())
    }

    /// Unbinds what was bound and is not wanted any more; returns the patterns for which that
    /// fails.
    async fn unbind_old(
        &mut self,
        broker: &mut Broker<'_>,
        name: &SubscriberName,
        old: Option<&Bound>,
        wanted: &Bound,
    ) -> BTreeSet<String> {
        let mut left = BTreeSet::new();
        let Some(Bound { exchange, patterns }) = old else { return left };
        for pattern in patterns {
            if *exchange == wanted.exchange && wanted.patterns.contains(pattern) {
                continue;
            }
            if self.unbind(broker, name, exchange, pattern).await {
                tracing::warn!(
                    subscriber = name.as_str(),
                    exchange,
                    pattern,
                    "unbound a pattern that is not configured any more"
                );
            } else {
                left.insert(pattern.clone());
            }
        }
        if *exchange != wanted.exchange
            && let Err(e) = self.topology.release_witness(broker, exchange).await
        {
            tracing::debug!(exchange, error = %e, "the witness stays bound to an exchange that is not configured any more");
        }
        left
    }

    /// Declares and binds. What goes wrong with one subscriber keeps this from no other: it is
    /// tried again each minute.
    async fn ensure(&mut self, broker: &mut Broker<'_>, s: &Subscriber) -> bool {
        let done = self.topology.ensure_subscriber(broker, s).await;
        self.told(&s.name, done)
    }

    /// Whether that went well. If not, it is logged once for each reason.
    fn told(&mut self, subscriber: &str, done: Result<(), QueueError>) -> bool {
        if let Err(e) = &done
            && self.refused.insert(format!("{subscriber}: {e}"))
        {
            tracing::error!(subscriber, error = %e, "its bindings cannot be put right; it is tried again each minute");
        }
        done.is_ok()
    }

    /// Unbinds a pattern, unless it is just being bound: a reload that wants it again may have been
    /// answered before this has heard of it.
    async fn unbind(
        &mut self,
        broker: &mut Broker<'_>,
        name: &str,
        exchange: &str,
        pattern: &str,
    ) -> bool {
        // Held until it is unbound, so that what is bound later stays.
        let prepared = self.queue.0.prepared.lock().await;
        if exchange == self.topology.events()
            && prepared.get(name).is_some_and(|patterns| patterns.contains(pattern))
        {
            return true;
        }
        let unbound = broker.unbind(&self.topology.main(name), exchange, pattern).await;
        drop(prepared);
        self.told(name, unbound)
    }

    /// Unbinds subscribers that are not configured here, unless another daemon works for them or
    /// wants them back.
    async fn unbind_removed(
        &mut self,
        broker: &mut Broker<'_>,
        all: &mut Recorded,
    ) -> Result<(), QueueError> {
        let recorded = &mut all.bindings;
        self.asked.retain(|name, _| recorded.contains_key(name));
        // Who has answered may be gone by now, and is asked again.
        let moment = clock::instant();
        self.wanted_elsewhere.retain(|_, since| moment - *since < BELIEVED);
        let may_unbind = |name: &SubscriberName| self.queue.0.removals.may_unbind(name);
        let removed = |name: &SubscriberName| {
            !self.wanted.contains_key(name)
                && !self.wanted_elsewhere.contains_key(name)
                && may_unbind(name)
        };
        let removed: Vec<SubscriberName> =
            recorded.keys().filter(|name| removed(name)).cloned().collect();
        let alone = removed.is_empty() || self.is_alone(broker).await;
        for name in removed {
            let queue = self.topology.main(&name);
            // This daemon's own lane may still finish its requests.
            let own = self.queue.consumers_of(&name);
            let depth = match broker.depth(&queue).await {
                Ok(depth) => depth,
                Err(e) => {
                    self.told(&name, Err(e));
                    continue;
                }
            };
            if depth.is_some_and(|d| d.consumers > own) {
                self.asked.remove(&name);
                let looks = self.looks.entry(name.clone()).or_default();
                *looks += 1;
                // The first may have seen this daemon's own consumer a moment too long.
                if *looks == 2 {
                    tracing::warn!(
                        subscriber = name.as_str(),
                        "not configured here, but another daemon delivers its events: it stays bound until nobody does"
                    );
                }
                continue;
            }
            // Who works for it consumes nothing while the receiver is down, or the subscriber
            // paused.
            if !alone {
                let now = clock::instant();
                let Some(asked) = self.asked.get(&name) else {
                    self.asked.insert(name.clone(), now);
                    self.write(&Record::Asked { asked: name }).await?;
                    continue;
                };
                if now - *asked < ANSWERED {
                    continue;
                }
            }
            let mut unbound = true;
            if let Some(bound) = recorded.get(&name) {
                for pattern in &bound.patterns {
                    unbound &= self.unbind(broker, &name, &bound.exchange, pattern).await;
                }
            }
            if !unbound {
                // It stays in the record, and is tried again, without asking the others again.
                self.stuck.insert(name);
                continue;
            }
            self.asked.remove(&name);
            self.stuck.remove(&name);
            tracing::warn!(
                subscriber = name.as_str(),
                queue,
                "a subscriber that is not configured any more was unbound; its backlog stays"
            );
            self.write(&Record::Removed {
                subscriber: name.clone(),
                removed: true,
                pruned: false,
                at: now(),
            })
            .await?;
            recorded.remove(&name);
            all.removed.insert(name.clone());
            self.looks.remove(&name);
            self.differing.remove(&name);
            self.removed.insert(name);
        }
        Ok(())
    }

    /// Whether it looks as if there were no other daemon: of those who read a stream the broker
    /// tells nothing, but they consume the queues that this one consumes. If it consumes none, as
    /// when all receivers are down, that says nothing.
    async fn is_alone(&self, broker: &mut Broker<'_>) -> bool {
        if !self.queue.consumers_are_counted() {
            return false;
        }
        let mut consumes = false;
        for s in self.subscribers.iter() {
            let own = self.queue.consumers_of(&s.name);
            consumes |= own > 0;
            match broker.depth(&self.topology.main(&s.name)).await {
                Ok(depth) if depth.is_none_or(|d| d.consumers <= own) => {}
                // Or it does not answer, which says nothing.
                Ok(_) | Err(_) => return false,
            }
        }
        consumes
    }

    fn until_next_look(&self) -> Duration {
        let soon = self.asked.keys().any(|name| !self.stuck.contains(name))
            || self.looks.values().any(|n| *n < 2);
        if soon { RECHECK_SOON } else { RECHECK }
    }

    /// Another daemon asks who works for a subscriber.
    async fn answer(
        &mut self,
        recorded: &mut Bindings,
        name: &SubscriberName,
    ) -> Result<(), QueueError> {
        let Some(wanted) = self.wanted.get(name) else { return Ok(()) };
        let bound = recorded.get(name).unwrap_or(wanted).clone();
        self.record(recorded, name, bound).await
    }

    /// Another daemon has written of a subscriber. Who writes that is alive, also if it consumes
    /// nothing just now.
    fn is_elsewhere(&mut self, name: &SubscriberName, recorded: &Recorded) {
        if self.wanted.contains_key(name) || !recorded.bindings.contains_key(name) {
            return;
        }
        let asked = self.asked.remove(name).is_some();
        if self.wanted_elsewhere.insert(name.clone(), clock::instant()).is_none() && asked {
            tracing::warn!(
                subscriber = name.as_str(),
                "not configured here, but another daemon has it: it stays bound"
            );
        }
    }

    /// Another daemon has changed a subscriber. If this one has it too and says otherwise, its own
    /// bindings are put back, since without them it loses events, and recorded beside the other's:
    /// what is bound is always in the record, or nobody would ever unbind it. Whose patterns are in
    /// the record writes nothing, so that two daemons do not answer each other without end.
    async fn compare(
        &mut self,
        broker: &mut Broker<'_>,
        recorded: &mut Recorded,
        name: &SubscriberName,
        unrecorded: Unrecorded,
    ) -> Result<(), QueueError> {
        let recorded = &mut recorded.bindings;
        let Some(s) = self.subscribers.iter().find(|s| s.name == *name).cloned() else {
            return Ok(());
        };
        let Some(wanted) = self.wanted.get(name).cloned() else { return Ok(()) };
        let found = recorded.get(name);
        if found == Some(&wanted) {
            self.differing.remove(name);
            return Ok(());
        }
        if found.is_none() && unrecorded == Unrecorded::Lost {
            tracing::warn!(
                subscriber = name.as_str(),
                stream = self.topology.state(),
                "it is not in the record any more, and is written again"
            );
        } else if self.differing.insert(name.clone()) {
            tracing::error!(
                subscriber = name.as_str(),
                "another daemon with the same [queue] prefix has another configuration of this subscriber, or none; \
                 its queue is bound with what both say: give all daemons the same configuration and restart them"
            );
        }
        let found = found.cloned();
        if !self.ensure(broker, &s).await {
            return Ok(());
        }
        match found {
            Some(found) if found.exchange == wanted.exchange => {
                if wanted.patterns.is_subset(&found.patterns) {
                    return Ok(());
                }
                let both = Bound { patterns: &wanted.patterns | &found.patterns, ..wanted };
                self.record(recorded, name, both).await
            }
            // Two exchanges do not fit into one record; who is restarted last is right.
            Some(_) => Ok(()),
            None => self.record(recorded, name, wanted).await,
        }
    }

    async fn record(
        &mut self,
        recorded: &mut Bindings,
        name: &SubscriberName,
        bound: Bound,
    ) -> Result<(), QueueError> {
        let Bound { exchange, patterns } = bound.clone();
        *self.echoes.entry(name.clone()).or_default() += 1;
        self.write(&Record::Bound {
            subscriber: name.clone(),
            exchange: Some(exchange),
            patterns,
            at: now(),
        })
        .await?;
        recorded.insert(name.clone(), bound);
        Ok(())
    }

    async fn write(&self, record: &Record) -> Result<(), QueueError> {
        write(self.topology, self.queue.publisher(), record).await
    }

    fn error(&self, why: &(impl std::fmt::Display + ?Sized)) -> QueueError {
        error(self.topology, why)
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;
    use crate::delivery::Pause;

    fn without_a_broker() -> (AmqpQueue, watch::Receiver<Subscribers>) {
        let text = "[queue]\nurl = \"amqp://nobody.invalid\"\n[[subscriber]]\nname = \"a\"\nurl = \"https://example.com/\"\nsignatures = []\n";
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(file.path(), text).expect("writes");
        let config = crate::config::load(file.path()).unwrap_or_else(|e| panic!("{e}"));
        let crate::config::Backend::Amqp(amqp) = config.queue.backend else {
            panic!("another queue")
        };
        let queue = AmqpQueue::new(amqp, crate::telemetry::metrics::Metrics::new(clock::now()));
        (queue, watch::Sender::new(config.subscribers).subscribe())
    }

    #[tokio::test]
    async fn what_this_daemon_has_recorded_counts_until_it_has_read_it() {
        let (queue, configured) = without_a_broker();
        let reconciler = Reconciler::new(&queue, configured);
        let at = SystemTime::UNIX_EPOCH + Duration::from_nanos(1_700_000_000_123_456_789);
        let (paused, resumed) = (
            Pause { why: "410".to_owned(), since: at, by: "receiver".to_owned() },
            Standing::Resumed { at },
        );
        let mut recorded = Recorded::default();
        let mut read = |standing: &Standing| {
            let line = serde_json::to_string(&Record::of(&"a".into(), standing)).expect("prints");
            recorded.apply(serde_json::from_str(&line).expect("a record"), "x");
            reconciler.has_read(&"a".into(), &recorded);
            reconciler.stand_all(&recorded);
            queue
                .0
                .standings
                .borrow()
                .clone()
                .expect("known")
                .get("a")
                .cloned()
                .expect("a standing")
        };
        read(&resumed);
        // It is confirmed, and stands behind the mark.
        queue.recorded().insert("a".into(), Standing::Paused(paused.clone()));
        assert_eq!(read(&resumed), Standing::Paused(paused.clone()));
        assert!(matches!(read(&Standing::Paused(paused)), Standing::Paused(_)));
        assert!(
            matches!(read(&resumed), Standing::Resumed { .. }),
            "another daemon's, written later"
        );
    }

    #[tokio::test]
    async fn what_another_daemon_binds_is_wanted_elsewhere_and_the_echo_of_this_ones_own_record_is_not()
     {
        let (queue, configured) = without_a_broker();
        let mut reconciler = Reconciler::new(&queue, configured);
        let mut broker = Broker::new(&queue.0.declaring);
        let mut recorded = Recorded::default();
        // `gone` was recorded by this daemon and taken out of its configuration before that was
        // read.
        reconciler.echoes.insert("gone".into(), 1);
        for (by, elsewhere) in [("this one", false), ("another", true)] {
            let line = r##"{"subscriber":"gone","patterns":["#"],"at":"2026-01-01T00:00:00Z"}"##;
            recorded.apply(serde_json::from_str(line).expect("a record"), "x");
            reconciler
                .has_come(&mut broker, &mut recorded, &"gone".into())
                .await
                .expect("asks nobody");
            assert_eq!(
                reconciler.wanted_elsewhere.contains_key("gone"),
                elsewhere,
                "bound by {by}"
            );
        }
    }
}

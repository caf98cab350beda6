//! Reads the state stream once, as commands do (a daemon follows it: `follow`), and writes records.

use std::{
    collections::BTreeSet,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use futures_util::StreamExt as _;
use lapin::{BasicProperties, Consumer, message::Delivery, options::BasicAckOptions};
use tokio::time::timeout;

use super::{
    broker_error::{BrokerError, RPC_TIMEOUT, answer},
    message::Message,
    pool::{Lease, Pool},
    publisher::{PublishResult, Publisher},
    record::{Lack, OWNER_REPLY_TIMEOUT, Patterns, Record, Recorded, now},
    requests::Broker,
    shared::Shared,
    snapshot::{self, Opened},
    topology::Topology,
};
use crate::{
    clock,
    delivery::{PauseState, SubscriberName},
    failpoint::{Step, reached},
    queue::QueueError,
};

/// Records that are acked together: an ack for each makes a long stream five times as slow to read.
pub(super) const ACK_EVERY: u64 = 200;

/// The stream counts as read to its end after this long without a record.
pub(super) const STREAM_IDLE: Duration = Duration::from_secs(5);

/// Writes that a subscriber is paused or resumed; returns when that is confirmed.
pub(super) async fn record(
    topology: &Topology,
    publisher: &Publisher,
    subscriber: &SubscriberName,
    pause_state: &PauseState,
) -> Result<(), QueueError> {
    write(topology, publisher, &Record::of(subscriber, pause_state)).await
}

/// Writes that a removed subscriber's queues were deleted.
pub(super) async fn forget(
    topology: &Topology,
    publisher: &Publisher,
    subscriber: &SubscriberName,
) -> Result<(), QueueError> {
    let pruned =
        Record::Removed { subscriber: subscriber.clone(), removed: true, pruned: true, at: now() };
    write(topology, publisher, &pruned).await
}

/// Reads which subscribers were removed and not pruned; for commands, which do not follow the
/// stream.
pub(super) async fn removed(shared: &Shared) -> Result<BTreeSet<SubscriberName>, QueueError> {
    Ok(read(shared).await?.removed)
}

/// Reads which subscribers are bound; for commands, which do not follow the stream.
pub(super) async fn all_bound(shared: &Shared) -> Result<BTreeSet<SubscriberName>, QueueError> {
    Ok(read(shared).await?.bindings.into_keys().collect())
}

/// The answer of the running daemons.
#[derive(Debug, Default)]
pub(super) struct Asked {
    /// All subscribers in the record.
    pub(super) known: BTreeSet<SubscriberName>,
    /// A subscriber that a running daemon serves.
    pub(super) works: Option<SubscriberName>,
}

/// Asks every daemon whether it serves one of the bound subscribers, and waits a little for an
/// answer.
pub(super) async fn who_works(shared: &Shared) -> Result<Asked, QueueError> {
    let topology = &shared.topology;
    if Broker::new(&shared.declaring).depth(&topology.state()).await?.is_none() {
        return Ok(Asked::default());
    }
    let mut opened = snapshot::open(&shared.declaring, topology).await?;
    read_to_end(shared, &mut opened).await?;
    let Opened { lease, mut records, recorded, .. } = opened;
    for name in recorded.bindings.keys() {
        write(topology, shared.publisher(), &Record::Asked { asked: name.clone() }).await?;
    }
    let answered = async {
        while let Ok(delivery) = next_record(topology, &lease, &mut records).await {
            if let Ok(Record::Bound { subscriber, .. }) = serde_json::from_slice(&delivery.data) {
                return Some(subscriber);
            }
        }
        None
    };
    let works = timeout(2 * OWNER_REPLY_TIMEOUT, answered).await.ok().flatten();
    let mut known: BTreeSet<SubscriberName> = recorded.bindings.into_keys().collect();
    known.extend(recorded.removed);
    known.extend(recorded.pause_states.keys().cloned());
    Ok(Asked { known, works })
}

/// Reads what is bound to the exchange of the events, and which subscribers were removed; for
/// commands, which do not follow the stream.
pub(super) async fn bound(
    shared: &Shared,
) -> Result<(Patterns, BTreeSet<SubscriberName>), QueueError> {
    let recorded = read(shared).await?;
    Ok((recorded.bound_to(&shared.topology.events()), recorded.removed))
}

/// Reads which store has history; for commands, which do not follow the stream.
pub(super) async fn store(shared: &Shared) -> Result<Option<String>, QueueError> {
    Ok(read(shared).await?.store)
}

/// Writes that a store has history from now on, whichever had it before.
pub(super) async fn adopt(shared: &Shared, store: &str) -> Result<(), QueueError> {
    let adopted = Record::Store { store: store.to_owned(), adopted: true, at: now() };
    write(&shared.topology, shared.publisher(), &adopted).await
}

/// Reads which store has subscribers made over the API; for commands, which do not follow the
/// stream.
pub(super) async fn manager(shared: &Shared) -> Result<Option<String>, QueueError> {
    Ok(read(shared).await?.manager)
}

/// Writes that the subscribers made over the API are a store's from now on, whichever had them
/// before.
pub(super) async fn adopt_subscribers(shared: &Shared, store: &str) -> Result<(), QueueError> {
    let adopted = Record::Manages { manages: store.to_owned(), adopted: true, at: now() };
    write(&shared.topology, shared.publisher(), &adopted).await
}

/// Records that a store has subscribers made over the API, and waits until that was read.
///
/// # Errors
/// Another store has some; or it cannot be recorded.
pub(super) async fn claim_subscribers(shared: &Shared, store: &str) -> Result<(), QueueError> {
    let mut manager = shared.manager.subscribe();
    loop {
        let found = manager.wait_for(Option::is_some).await;
        // An error means that everything ends.
        let found = found.map_err(|_| error(&shared.topology, "it is closed"))?.clone().flatten();
        match found {
            Some(found) if found == store => return Ok(()),
            Some(_) => {
                let prefix = shared.topology.prefix();
                let why = format!(
                    "another store has the subscribers made over the API for [queue] prefix `{prefix}`"
                );
                let remedy = "give each daemon a prefix of its own, or have this store count: hooktrail store adopt";
                return Err(QueueError::another_store(why).remedied(remedy));
            }
            None => {
                let claim =
                    Record::Manages { manages: store.to_owned(), adopted: false, at: now() };
                write(&shared.topology, shared.publisher(), &claim).await?;
                manager.wait_for(|found| found.as_ref().is_some_and(Option::is_some)).await.ok();
            }
        }
    }
}

/// Records that history lacks events, for the daemon that has it now or later. Returns whether it was
/// recorded; a failure is logged.
pub(super) async fn record_lack(shared: &Shared, lack: Lack) -> bool {
    write_lack(shared, lack.into()).await
}

/// Records that the store of history has the gaps of this time. Returns whether it was recorded; a
/// failure is logged.
pub(super) async fn end_lack(shared: &Shared, (from, until): (SystemTime, SystemTime)) -> bool {
    let ended = Record::Unbound { history_lacks: String::new(), since: Some(from), at: until };
    write_lack(shared, ended).await
}

async fn write_lack(shared: &Shared, record: Record) -> bool {
    let late = || error(&shared.topology, "the broker takes no records");
    let write = write(&shared.topology, shared.publisher(), &record);
    let recorded = timeout(STREAM_IDLE, write).await.unwrap_or_else(|_| Err(late()));
    if let Err(e) = &recorded {
        tracing::debug!(error = %e, "it is not recorded what history lacks");
    }
    recorded.is_ok()
}

async fn read(shared: &Shared) -> Result<Recorded, QueueError> {
    let topology = &shared.topology;
    if Broker::new(&shared.declaring).depth(&topology.state()).await?.is_none() {
        return Ok(Recorded::default());
    }
    let mut opened = snapshot::open(&shared.declaring, topology).await?;
    read_to_end(shared, &mut opened).await?;
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
pub(super) async fn ack(lease: &Lease, tag: u64, at_once: bool) -> Result<bool, BrokerError> {
    let due = at_once || tag.is_multiple_of(ACK_EVERY);
    if due {
        answer(lease.channel.basic_ack(tag, BasicAckOptions { multiple: true })).await?;
    }
    Ok(due)
}

async fn read_to_end(shared: &Shared, opened: &mut Opened) -> Result<(), QueueError> {
    let topology = &shared.topology;
    let mark = clock::batch_id();
    write(topology, shared.publisher(), &Record::Mark { mark: mark.clone() }).await?;
    loop {
        let delivery = next_record(topology, &opened.lease, &mut opened.records).await?;
        match serde_json::from_slice::<Record>(&delivery.data) {
            Ok(Record::Mark { mark: found }) if found == mark => return Ok(()),
            Ok(record) => drop(opened.recorded.apply(record, &topology.events())),
            // A record of a later version.
            Err(_) => {}
        }
    }
}

pub(super) fn error(topology: &Topology, why: &(impl std::fmt::Display + ?Sized)) -> QueueError {
    QueueError::new(format!("stream `{}`: {why}", topology.state()))
}

pub(super) async fn write(
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
        [PublishResult::Stored] => {
            reached(Step::Recorded);
            Ok(())
        }
        _ => Err(error(topology, "the broker did not take a record")),
    }
}

/// The state of the record, and all subscribers whose bindings are recorded, or were since the
/// newest snapshot; for an inspection, which writes nothing. It reads up to `records` records, or
/// until no more arrive.
pub(super) async fn inspected(
    topology: &Topology,
    pool: &Pool,
    records: u32,
) -> Result<(Recorded, BTreeSet<SubscriberName>), QueueError> {
    let Opened { lease, records: mut consumer, mut recorded, passed } =
        snapshot::open(pool, topology).await?;
    let mut found: BTreeSet<SubscriberName> =
        recorded.bindings.keys().chain(&recorded.removed).cloned().collect();
    for _ in passed..u64::from(records) {
        let Ok(Some(next)) = timeout(STREAM_IDLE, consumer.next()).await else { break };
        let delivery = next.map_err(|e| error(topology, &BrokerError::from(e)))?;
        ack(&lease, delivery.delivery_tag, false).await.map_err(|why| error(topology, &why))?;
        let Ok(record) = serde_json::from_slice::<Record>(&delivery.data) else { continue };
        if let Record::Bound { subscriber, .. } = &record {
            found.insert(subscriber.clone());
        }
        recorded.apply(record, &topology.events());
    }
    Ok((recorded, found))
}

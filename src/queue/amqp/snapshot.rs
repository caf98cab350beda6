//! What the record of bindings and pauses says up to one of its marks, so that a start does not
//! read all of a long record.
//!
//! A daemon that has read many records writes what they say together into a stream of its own. The
//! next one takes the newest of these and reads the record from the mark on that it names. A
//! snapshot is used only if that mark is where it says: it does not fit a record that was deleted
//! and declared again. Without one that fits, the record is read from its beginning, as by versions
//! that know no snapshots. So nothing depends on a snapshot: whatever becomes of it, a start only
//! takes longer.

use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt as _;
use lapin::{
    BasicProperties, Consumer,
    message::Delivery,
    options::{BasicAckOptions, BasicConsumeOptions, BasicQosOptions},
    types::{AMQPValue, FieldTable},
};
use serde::{Deserialize, Serialize};
use tokio::time::timeout;

use super::{
    broker_error::{BrokerError, answer},
    message::Message,
    pool::{Lease, Pool},
    publisher::{Fate, Publisher},
    record::{Record, Recorded},
    requests::Broker,
    topology::Topology,
};
use crate::queue::QueueError;

/// Records on their way at once.
const PREFETCH: u16 = 1000;

/// A record with fewer is read from its beginning, and after reading more a daemon writes a
/// snapshot.
pub(super) const WORTHWHILE: u64 = 10_000;

/// How long the broker may take to send what a stream already holds.
const PATIENCE: Duration = Duration::from_secs(2);

#[derive(Debug, Serialize, Deserialize)]
struct Snapshot {
    /// Where in the record the mark is.
    offset: u64,
    mark: String,
    /// What the record says up to there.
    records: Vec<Record>,
}

/// The record, open for reading.
pub(super) struct Opened {
    pub(super) lease: Lease,
    pub(super) records: Consumer,
    /// What the records before the first that comes say.
    pub(super) recorded: Recorded,
    /// How many these are.
    pub(super) passed: u64,
}

/// Opens the record at the newest snapshot that fits, or at its beginning.
pub(super) async fn open(pool: &Pool, topology: &Topology) -> Result<Opened, QueueError> {
    match at_snapshot(pool, topology).await {
        Ok(Some(opened)) => return Ok(opened),
        Ok(None) => {}
        Err(e) => {
            tracing::debug!(stream = topology.snapshot(), error = %e, "no snapshot can be used; the record is read from its beginning")
        }
    }
    open_whole(pool, topology).await
}

/// Opens the record at its beginning.
pub(super) async fn open_whole(pool: &Pool, topology: &Topology) -> Result<Opened, QueueError> {
    let (lease, records) =
        consume(pool, &topology.state(), AMQPValue::LongString("first".into())).await?;
    Ok(Opened { lease, records, recorded: Recorded::default(), passed: 0 })
}

async fn at_snapshot(pool: &Pool, topology: &Topology) -> Result<Option<Opened>, QueueError> {
    let mut broker = Broker::new(pool);
    let is_long = broker
        .depth(&topology.state())
        .await?
        .is_some_and(|record| u64::from(record.messages) >= WORTHWHILE);
    if !is_long || broker.depth(&topology.snapshot()).await?.is_none() {
        return Ok(None);
    }
    // The last that were written together: any of them will do.
    let (_lease, mut snapshots) =
        consume(pool, &topology.snapshot(), AMQPValue::LongString("last".into())).await?;
    let Some(newest) = next(&topology.snapshot(), &mut snapshots).await? else { return Ok(None) };
    let Snapshot { offset, mark, records } =
        serde_json::from_slice(&newest.data).map_err(|e| error(&topology.snapshot(), &e))?;
    let Ok(at) = i64::try_from(offset) else { return Ok(None) };
    let (lease, mut following) =
        consume(pool, &topology.state(), AMQPValue::LongLongInt(at)).await?;
    let Some(first) = next(&topology.state(), &mut following).await? else { return Ok(None) };
    let fits = offset_of(&first) == Some(offset)
        && matches!(serde_json::from_slice(&first.data), Ok(Record::Mark { mark: found }) if found == mark);
    if !fits {
        return Ok(None);
    }
    let acked =
        answer(lease.channel.basic_ack(first.delivery_tag, BasicAckOptions::default())).await;
    acked.map_err(|why| error(&topology.state(), &why))?;
    let mut recorded = Recorded::default();
    records.into_iter().for_each(|record| drop(recorded.apply(record, &topology.events())));
    Ok(Some(Opened { lease, records: following, recorded, passed: offset + 1 }))
}

/// Writes down what the record says up to this mark.
pub(super) async fn save(
    pool: &Pool,
    publisher: &Publisher,
    topology: &Topology,
    recorded: &Recorded,
    mark: &str,
    offset: u64,
) -> Result<(), QueueError> {
    let stream = topology.snapshot();
    topology.ensure_snapshot(&mut Broker::new(pool)).await?;
    let snapshot = Snapshot { offset, mark: mark.to_owned(), records: recorded.records() };
    let body = serde_json::to_vec(&snapshot).map_err(|e| error(&stream, &e))?;
    let properties = BasicProperties::default()
        .with_delivery_mode(2)
        .with_content_type("application/json".into());
    publisher.ready().await?;
    match publisher
        .publish(vec![Message::to_queue(stream.clone(), Bytes::from(body), properties)])
        .await?[..]
    {
        [Fate::Stored] => Ok(()),
        _ => Err(error(&stream, "the broker did not take a snapshot")),
    }
}

/// Where in its stream a message is.
pub(super) fn offset_of(delivery: &Delivery) -> Option<u64> {
    match delivery.properties.headers().as_ref()?.inner().get("x-stream-offset")? {
        AMQPValue::LongLongInt(offset) => u64::try_from(*offset).ok(),
        _ => None,
    }
}

async fn consume(
    pool: &Pool,
    stream: &str,
    offset: AMQPValue,
) -> Result<(Lease, Consumer), QueueError> {
    let lease = pool.lease().await?;
    let open = async {
        lease.channel.basic_qos(PREFETCH, BasicQosOptions::default()).await?;
        let mut arguments = FieldTable::default();
        arguments.insert("x-stream-offset".into(), offset);
        lease
            .channel
            .basic_consume(stream.into(), "".into(), BasicConsumeOptions::default(), arguments)
            .await
    };
    let consumer = answer(open).await.map_err(|why| error(stream, &why))?;
    Ok((lease, consumer))
}

async fn next(stream: &str, messages: &mut Consumer) -> Result<Option<Delivery>, QueueError> {
    let Ok(next) = timeout(PATIENCE, messages.next()).await else { return Ok(None) };
    next.transpose().map_err(|e| error(stream, &BrokerError::from(e)))
}

fn error(stream: &str, why: &(impl std::fmt::Display + ?Sized)) -> QueueError {
    QueueError::new(format!("stream `{stream}`: {why}"))
}

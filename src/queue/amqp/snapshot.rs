//! Snapshots of the state stream, so that a start does not read all of a long one.
//!
//! A daemon that has read many records writes the state that they fold into, up to one of their
//! marks, into a stream of its own. The next one takes the newest snapshot and reads the state
//! stream from that mark on. A snapshot is used only if the mark is where it says: it does not fit
//! a state stream that was deleted and redeclared. Nor is one used of a version that knew fewer
//! kinds of records, and left out what it did not know. Without a fitting one the state stream is
//! read from its beginning, as by versions without snapshots. So nothing depends on a snapshot:
//! without it a start only takes longer.

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
    publisher::{PublishResult, Publisher},
    record::{Record, Recorded},
    requests::Broker,
    topology::Topology,
};
use crate::queue::QueueError;

/// Prefetch of records.
const PREFETCH: u16 = 1000;

/// Records of a state stream above which snapshots are used and written.
pub(super) const WORTHWHILE: u64 = 10_000;

/// Timeout of a message that a stream already holds.
const PATIENCE: Duration = Duration::from_secs(2);

#[derive(Debug, Serialize, Deserialize)]
struct Snapshot {
    /// The kinds that its version knew; missing before `{"manages":…}`.
    #[serde(default)]
    kinds: u32,
    /// The offset of the mark in the state stream.
    offset: u64,
    mark: String,
    /// The records that fold into the state up to there.
    records: Vec<Record>,
}

impl Snapshot {
    /// `None` for one of a version that knew fewer kinds of records.
    fn whole(data: &[u8]) -> serde_json::Result<Option<Self>> {
        let snapshot: Self = serde_json::from_slice(data)?;
        Ok(Some(snapshot).filter(|snapshot| snapshot.kinds >= Record::KINDS))
    }
}

/// The state stream, open for reading.
pub(super) struct Opened {
    pub(super) lease: Lease,
    pub(super) records: Consumer,
    /// The folded state of the records before the first one that arrives.
    pub(super) recorded: Recorded,
    /// The number of these records.
    pub(super) passed: u64,
}

/// Opens the state stream at the newest fitting snapshot, or at its beginning.
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

/// Opens the state stream at its beginning.
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
    // The last chunk of snapshots: any of them fits.
    let (_lease, mut snapshots) =
        consume(pool, &topology.snapshot(), AMQPValue::LongString("last".into())).await?;
    let Some(newest) = next(&topology.snapshot(), &mut snapshots).await? else { return Ok(None) };
    let parsed = Snapshot::whole(&newest.data).map_err(|e| error(&topology.snapshot(), &e))?;
    let Some(Snapshot { offset, mark, records, .. }) = parsed else { return Ok(None) };
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

/// Writes a snapshot of the state up to this mark.
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
    let (mark, records) = (mark.to_owned(), recorded.records());
    let snapshot = Snapshot { kinds: Record::KINDS, offset, mark, records };
    let body = serde_json::to_vec(&snapshot).map_err(|e| error(&stream, &e))?;
    let properties = BasicProperties::default()
        .with_delivery_mode(2)
        .with_content_type("application/json".into());
    publisher.ready().await?;
    match publisher
        .publish(vec![Message::to_queue(stream.clone(), Bytes::from(body), properties)])
        .await?[..]
    {
        [PublishResult::Stored] => Ok(()),
        _ => Err(error(&stream, "the broker did not take a snapshot")),
    }
}

/// The offset of a message in its stream.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_of_a_version_that_knew_fewer_records_is_not_used() {
        for (kinds, is_used) in [
            (String::new(), false),
            (format!(r#""kinds":{},"#, Record::KINDS - 1), false),
            (format!(r#""kinds":{},"#, Record::KINDS), true),
            (format!(r#""kinds":{},"later":1,"#, Record::KINDS + 1), true),
        ] {
            let text = format!(r#"{{{kinds}"offset":7,"mark":"m","records":[]}}"#);
            let found = Snapshot::whole(text.as_bytes()).expect("it is a snapshot");
            assert_eq!(found.is_some(), is_used, "{text}");
        }
        // Of a later version, with a record that this one does not know.
        let text = format!(
            r#"{{"kinds":{},"offset":7,"mark":"m","records":[{{"later":"kind"}}]}}"#,
            Record::KINDS + 1
        );
        assert!(Snapshot::whole(text.as_bytes()).is_err());
    }
}

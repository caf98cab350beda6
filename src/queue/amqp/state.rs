//! What earlier configurations bound, remembered in a stream next to the queues.
//!
//! The broker does not tell which patterns a queue is bound with. Without this record a pattern that
//! was taken out of the configuration would go on filling the queue, and so would the patterns of a
//! subscriber that was removed.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use bytes::Bytes;
use futures_util::StreamExt as _;
use lapin::{
    BasicProperties, Connection,
    options::{BasicAckOptions, BasicConsumeOptions, BasicQosOptions},
    types::{AMQPValue, FieldTable},
};
use serde::{Deserialize, Serialize};

use super::{
    connection::answer,
    message::Message,
    publisher::{Fate, Publisher},
    topology::{Broker, Topology},
};
use crate::{clock, config::Subscriber, queue::QueueError};

/// A record of the stream; of a subscriber's the last one counts. Fields that a later version adds are kept apart.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
enum Record {
    Bound {
        subscriber: String,
        patterns: BTreeSet<String>,
        at: String,
    },
    Removed {
        subscriber: String,
        removed: bool,
        at: String,
    },
    /// Written before reading, to know where the end is.
    Mark {
        mark: String,
    },
}

/// The patterns that each subscriber's queue is bound with.
type Bindings = BTreeMap<String, BTreeSet<String>>;

fn apply(bindings: &mut Bindings, record: Record) {
    match record {
        Record::Bound { subscriber, patterns, .. } => drop(bindings.insert(subscriber, patterns)),
        Record::Removed { subscriber, .. } => drop(bindings.remove(&subscriber)),
        Record::Mark { .. } => {}
    }
}

/// Brings the bindings to what the configuration says, now that the new ones are in place: takes away
/// what only earlier configurations had, and records the change.
pub(super) async fn reconcile(
    topology: &Topology,
    connection: &Connection,
    publisher: &Publisher,
    subscribers: &[Arc<Subscriber>],
) -> Result<(), QueueError> {
    topology.ensure_state(connection).await?;
    let before = read(topology, connection, publisher).await?;
    let at = humantime::format_rfc3339_seconds(clock::now()).to_string();
    let broker = Broker(connection);
    let exchange = topology.events();
    for s in subscribers {
        let patterns: BTreeSet<String> = s.events.iter().map(|p| p.as_str().to_owned()).collect();
        let old = before.get(&s.name);
        for stale in old.into_iter().flatten().filter(|p| !patterns.contains(*p)) {
            broker.unbind(&topology.main(&s.name), &exchange, stale).await?;
            tracing::warn!(subscriber = s.name, pattern = stale, "unbound a pattern that is not configured any more");
        }
        if old != Some(&patterns) {
            write(topology, publisher, &Record::Bound { subscriber: s.name.clone(), patterns, at: at.clone() }).await?;
        }
    }
    let configured = |name: &String| subscribers.iter().any(|s| s.name == *name);
    for (name, patterns) in before.iter().filter(|(name, _)| !configured(name)) {
        for pattern in patterns {
            broker.unbind(&topology.main(name), &exchange, pattern).await?;
        }
        tracing::warn!(
            subscriber = name,
            queue = topology.main(name),
            "a subscriber that is not configured any more was unbound; its backlog stays"
        );
        write(topology, publisher, &Record::Removed { subscriber: name.clone(), removed: true, at: at.clone() }).await?;
    }
    Ok(())
}

async fn write(topology: &Topology, publisher: &Publisher, record: &Record) -> Result<(), QueueError> {
    let body =
        serde_json::to_vec(record).map_err(|e| QueueError::new(format!("a record for `{}` cannot be written: {e}", topology.state())))?;
    let properties = BasicProperties::default().with_delivery_mode(2).with_content_type("application/json".into());
    let message = Message::to_queue(topology.state(), Bytes::from(body), properties);
    match publisher.publish(vec![message]).await?[..] {
        [Fate::Stored] => Ok(()),
        _ => Err(QueueError::new(format!("the broker did not take a record for stream `{}`", topology.state()))),
    }
}

/// Reads the stream from its first record up to a mark written just before.
async fn read(topology: &Topology, connection: &Connection, publisher: &Publisher) -> Result<Bindings, QueueError> {
    let stream = topology.state();
    let fail = |why: String| QueueError::new(format!("stream `{stream}` cannot be read: {why}"));
    let mark = clock::batch_id();
    write(topology, publisher, &Record::Mark { mark: mark.clone() }).await?;
    let reading = async {
        let channel = connection.create_channel().await?;
        channel.basic_qos(100, BasicQosOptions::default()).await?;
        let mut arguments = FieldTable::default();
        arguments.insert("x-stream-offset".into(), AMQPValue::LongString("first".into()));
        let mut consumer = channel.basic_consume(stream.as_str().into(), "".into(), BasicConsumeOptions::default(), arguments).await?;
        let mut bindings = Bindings::new();
        while let Some(delivery) = consumer.next().await {
            let delivery = delivery?;
            channel.basic_ack(delivery.delivery_tag, BasicAckOptions::default()).await?;
            match serde_json::from_slice::<Record>(&delivery.data) {
                Ok(Record::Mark { mark: found }) if found == mark => {
                    channel.close(200, "read".into()).await?;
                    return Ok(Some(bindings));
                }
                Ok(record) => apply(&mut bindings, record),
                Err(e) => tracing::warn!(stream, error = %e, "a record is not understood and left alone"),
            }
        }
        Ok(None)
    };
    match answer(reading).await {
        Ok(Some(bindings)) => Ok(bindings),
        Ok(None) => Err(fail("its consumer was cancelled".to_owned())),
        Err(why) => Err(fail(why)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_record_of_a_subscriber_counts() {
        let mut bindings = Bindings::new();
        for line in [
            r##"{"subscriber":"a","patterns":["x.*"],"at":"2026-01-01T00:00:00Z"}"##,
            r##"{"subscriber":"b","patterns":["#"],"at":"2026-01-01T00:00:00Z"}"##,
            r#"{"mark":"msg_1"}"#,
            r##"{"subscriber":"a","patterns":["y.#","z"],"at":"2026-01-02T00:00:00Z","new":"field"}"##,
            r#"{"subscriber":"b","removed":true,"at":"2026-01-02T00:00:00Z"}"#,
        ] {
            apply(&mut bindings, serde_json::from_str(line).expect("a record"));
        }
        assert_eq!(bindings, Bindings::from([("a".to_owned(), ["y.#", "z"].map(str::to_owned).into())]));
    }
}

//! What earlier configurations bound, remembered in a stream next to the queues, which every daemon follows.
//!
//! The broker does not tell which patterns a queue is bound with. Without this record a pattern that
//! was taken out of the configuration would go on filling the queue, and so would the patterns of a
//! subscriber that was removed.

use std::{
    collections::{BTreeMap, BTreeSet},
    convert::Infallible,
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use futures_util::StreamExt as _;
use lapin::{
    BasicProperties, Consumer,
    options::{BasicAckOptions, BasicConsumeOptions, BasicQosOptions},
    types::{AMQPValue, FieldTable},
};
use serde::{Deserialize, Serialize};
use tokio::time::timeout;

use super::{
    connection::{BrokerError, Effort, Lease, Pool, RPC_TIMEOUT, answer},
    message::Message,
    publisher::{Fate, Publisher},
    topology::{Broker, Topology},
};
use crate::{clock, config::Subscriber, queue::QueueError};

/// How often it is looked whether another daemon still works for a subscriber that this one does not have.
const RECHECK: Duration = Duration::from_secs(60);

/// A record of the stream; of a subscriber's the last one counts. Fields that a later version adds are kept apart.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
enum Record {
    Bound {
        subscriber: String,
        /// Missing in records of version 0.1.0 before the exchange was recorded: it is today's.
        #[serde(default)]
        exchange: Option<String>,
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

/// What a subscriber's queue is bound with.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Bound {
    exchange: String,
    patterns: BTreeSet<String>,
}

type Bindings = BTreeMap<String, Bound>;

/// Takes a record in; the subscriber that it is about.
fn apply(bindings: &mut Bindings, record: Record, exchange: &str) -> Option<String> {
    match record {
        Record::Bound { subscriber, exchange: bound_to, patterns, .. } => {
            let exchange = bound_to.unwrap_or_else(|| exchange.to_owned());
            bindings.insert(subscriber.clone(), Bound { exchange, patterns });
            Some(subscriber)
        }
        Record::Removed { subscriber, .. } => {
            bindings.remove(&subscriber);
            Some(subscriber)
        }
        Record::Mark { .. } => None,
    }
}

/// Keeps the bindings as the configuration says, now that the new ones are in place.
pub(super) struct Reconciler<'a> {
    topology: &'a Topology,
    pool: &'a Pool,
    publisher: &'a Publisher,
    subscribers: &'a [Arc<Subscriber>],
    wanted: Bindings,
    /// Subscribers about whom an operator was told already that daemons do not agree.
    told: BTreeSet<String>,
    /// Subscribers that this daemon has unbound, and those of them that another then bound again.
    removed: BTreeSet<String>,
    wanted_elsewhere: BTreeSet<String>,
    reconciled: bool,
}

impl<'a> Reconciler<'a> {
    pub(super) fn new(topology: &'a Topology, pool: &'a Pool, publisher: &'a Publisher, subscribers: &'a [Arc<Subscriber>]) -> Self {
        let bound =
            |s: &Subscriber| Bound { exchange: topology.events(), patterns: s.events.iter().map(|p| p.as_str().to_owned()).collect() };
        let wanted = subscribers.iter().map(|s| (s.name.clone(), bound(s))).collect();
        Self {
            topology,
            pool,
            publisher,
            subscribers,
            wanted,
            told: BTreeSet::new(),
            removed: BTreeSet::new(),
            wanted_elsewhere: BTreeSet::new(),
            reconciled: false,
        }
    }

    /// Reads the stream from its first record, takes away what only earlier configurations had, and
    /// then follows what other daemons write, until it fails.
    pub(super) async fn follow(&mut self, following: &mut Effort) -> Result<Infallible, QueueError> {
        let mut broker = Broker::new(self.pool);
        self.topology.ensure_state(&mut broker).await?;
        let mark = clock::batch_id();
        self.write(&Record::Mark { mark: mark.clone() }).await?;
        let (lease, mut records) = self.open().await?;
        let mut recorded = Bindings::new();
        let mut up_to_date = false;
        loop {
            let next = match timeout(if up_to_date { RECHECK } else { RPC_TIMEOUT }, records.next()).await {
                Ok(next) => next.ok_or_else(|| self.error("its consumer was cancelled"))?,
                Err(_) if up_to_date => {
                    self.unbind_removed(&mut broker, &mut recorded).await?;
                    continue;
                }
                Err(_) => return Err(self.error("the broker sent no more records before the last one")),
            };
            let delivery = next.map_err(|e| self.error(&BrokerError::from(e)))?;
            let acked = lease.channel.basic_ack(delivery.delivery_tag, BasicAckOptions::default());
            answer(acked).await.map_err(|why| self.error(&why))?;
            match serde_json::from_slice::<Record>(&delivery.data) {
                Ok(Record::Mark { mark: found }) if found == mark => {
                    up_to_date = true;
                    self.reconcile(&mut broker, &mut recorded).await?;
                    following.goes_well();
                }
                Ok(record) => {
                    let about = apply(&mut recorded, record, &self.topology.events());
                    if let Some(name) = about.filter(|_| up_to_date) {
                        self.compare(&mut broker, &mut recorded, &name).await?;
                    }
                }
                Err(e) => tracing::warn!(stream = self.topology.state(), error = %e, "a record is not understood and left alone"),
            }
        }
    }

    async fn open(&self) -> Result<(Lease, Consumer), QueueError> {
        let lease = self.pool.lease().await?;
        let open = async {
            lease.channel.basic_qos(100, BasicQosOptions::default()).await?;
            let mut arguments = FieldTable::default();
            arguments.insert("x-stream-offset".into(), AMQPValue::LongString("first".into()));
            lease.channel.basic_consume(self.topology.state().as_str().into(), "".into(), BasicConsumeOptions::default(), arguments).await
        };
        let consumer = answer(open).await.map_err(|why| self.error(&why))?;
        Ok((lease, consumer))
    }

    /// Once in the life of the process: from then on what another daemon says is no earlier configuration.
    async fn reconcile(&mut self, broker: &mut Broker<'_>, recorded: &mut Bindings) -> Result<(), QueueError> {
        if self.reconciled {
            for s in self.subscribers {
                self.compare(broker, recorded, &s.name).await?;
            }
            return self.unbind_removed(broker, recorded).await;
        }
        for s in self.subscribers {
            let Some(wanted) = self.wanted.get(&s.name) else { continue };
            let old = recorded.get(&s.name);
            if old == Some(wanted) {
                continue;
            }
            // Another daemon may have unbound what this one had bound when it began.
            self.topology.ensure_subscriber(broker, s).await?;
            if let Some(Bound { exchange, patterns }) = old {
                for pattern in patterns {
                    if *exchange == wanted.exchange && wanted.patterns.contains(pattern) {
                        continue;
                    }
                    broker.unbind(&self.topology.main(&s.name), exchange, pattern).await?;
                    tracing::warn!(subscriber = s.name, exchange, pattern, "unbound a pattern that is not configured any more");
                }
            }
            let wanted = wanted.clone();
            self.record(recorded, &s.name, wanted).await?;
        }
        self.unbind_removed(broker, recorded).await?;
        self.reconciled = true;
        Ok(())
    }

    /// Unbinds subscribers that are not configured here, unless another daemon works for them or wants them back.
    async fn unbind_removed(&mut self, broker: &mut Broker<'_>, recorded: &mut Bindings) -> Result<(), QueueError> {
        let removed = |name: &String| !self.wanted.contains_key(name) && !self.wanted_elsewhere.contains(name);
        let removed: Vec<String> = recorded.keys().filter(|name| removed(name)).cloned().collect();
        for name in removed {
            let queue = self.topology.main(&name);
            if broker.depth(&queue).await?.is_some_and(|d| d.consumers > 0) {
                if self.told.insert(name.clone()) {
                    tracing::warn!(
                        subscriber = name,
                        "not configured here, but another daemon delivers its events: it stays bound until nobody does"
                    );
                }
                continue;
            }
            if let Some(bound) = recorded.get(&name) {
                for pattern in &bound.patterns {
                    broker.unbind(&queue, &bound.exchange, pattern).await?;
                }
            }
            tracing::warn!(subscriber = name, queue, "a subscriber that is not configured any more was unbound; its backlog stays");
            self.write(&Record::Removed { subscriber: name.clone(), removed: true, at: now() }).await?;
            recorded.remove(&name);
            self.told.remove(&name);
            self.removed.insert(name);
        }
        Ok(())
    }

    /// Another daemon has changed a subscriber. If this one has it too and says otherwise, its own
    /// bindings are put back, since without them it loses events, and recorded beside the other's: what is
    /// bound is always in the record, or nobody would ever unbind it. Whose patterns are in the record
    /// writes nothing, so that two daemons do not answer each other without end.
    async fn compare(&mut self, broker: &mut Broker<'_>, recorded: &mut Bindings, name: &str) -> Result<(), QueueError> {
        let Some(s) = self.subscribers.iter().find(|s| s.name == name) else {
            if self.removed.contains(name) && recorded.contains_key(name) {
                self.wanted_elsewhere.insert(name.to_owned());
            }
            return Ok(());
        };
        let Some(wanted) = self.wanted.get(name).cloned() else { return Ok(()) };
        let found = recorded.get(name);
        if found == Some(&wanted) {
            self.told.remove(name);
            return Ok(());
        }
        if self.told.insert(name.to_owned()) {
            tracing::error!(
                subscriber = name,
                "another daemon with the same [queue] prefix has another configuration of this subscriber, or none; \
                 its queue is bound with what both say: give all daemons the same configuration and restart them"
            );
        }
        self.topology.ensure_subscriber(broker, s).await?;
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

    async fn record(&self, recorded: &mut Bindings, name: &str, bound: Bound) -> Result<(), QueueError> {
        let Bound { exchange, patterns } = bound.clone();
        self.write(&Record::Bound { subscriber: name.to_owned(), exchange: Some(exchange), patterns, at: now() }).await?;
        recorded.insert(name.to_owned(), bound);
        Ok(())
    }

    async fn write(&self, record: &Record) -> Result<(), QueueError> {
        let body = serde_json::to_vec(record).map_err(|e| self.error(&e))?;
        let properties = BasicProperties::default().with_delivery_mode(2).with_content_type("application/json".into());
        let message = Message::to_queue(self.topology.state(), Bytes::from(body), properties);
        match self.publisher.publish(vec![message]).await?[..] {
            [Fate::Stored] => Ok(()),
            _ => Err(self.error(&"the broker did not take a record")),
        }
    }

    fn error(&self, why: &(impl std::fmt::Display + ?Sized)) -> QueueError {
        QueueError::new(format!("stream `{}`: {why}", self.topology.state()))
    }
}

fn now() -> String {
    humantime::format_rfc3339_seconds(clock::now()).to_string()
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
            r##"{"subscriber":"c","exchange":"old","patterns":["#"],"at":"2026-01-01T00:00:00Z"}"##,
            r#"{"mark":"msg_1"}"#,
            r##"{"subscriber":"a","patterns":["y.#","z"],"at":"2026-01-02T00:00:00Z","new":"field"}"##,
            r#"{"subscriber":"b","removed":true,"at":"2026-01-02T00:00:00Z"}"#,
        ] {
            apply(&mut bindings, serde_json::from_str(line).expect("a record"), "today's");
        }
        let bound = |exchange: &str, patterns: &[&str]| Bound {
            exchange: exchange.to_owned(),
            patterns: patterns.iter().map(|p| (*p).to_owned()).collect(),
        };
        let expected = [("a".to_owned(), bound("today's", &["y.#", "z"])), ("c".to_owned(), bound("old", &["#"]))];
        assert_eq!(bindings, Bindings::from(expected));
    }
}

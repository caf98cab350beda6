//! What earlier configurations bound and who is paused, remembered in a stream next to the queues, which
//! every daemon follows.
//!
//! The broker does not tell which patterns a queue is bound with. Without this record a pattern that
//! was taken out of the configuration would go on filling the queue, and so would the patterns of a
//! subscriber that was removed.

use std::{
    collections::{BTreeMap, BTreeSet},
    convert::Infallible,
    sync::Arc,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use futures_util::StreamExt as _;
use lapin::{
    BasicProperties, Consumer,
    options::{BasicAckOptions, BasicConsumeOptions, BasicQosOptions},
    types::{AMQPValue, FieldTable},
};
use serde::{Deserialize, Serialize};
use tokio::{sync::watch, time::sleep};

use super::{
    connection::{BrokerError, Effort, Lease, Pool, RPC_TIMEOUT, answer},
    message::Message,
    publisher::{Fate, Publisher},
    topology::{Broker, Topology},
};
use crate::{
    clock,
    config::Subscriber,
    queue::{Pause, QueueError, Standing, Standings},
};

/// How often it is looked whether another daemon still works for a subscriber that this one does not have.
const RECHECK: Duration = Duration::from_secs(60);

/// After so long without a record all that the stream held has come.
const QUIET: Duration = Duration::from_secs(5);

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
    Standing {
        subscriber: String,
        paused: bool,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        why: Option<String>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        by: Option<String>,
        /// Since when.
        #[serde(with = "rfc3339")]
        at: SystemTime,
    },
    /// Written when reading begins, to know where the end is.
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

impl Record {
    fn of(subscriber: &str, standing: &Standing) -> Self {
        let subscriber = subscriber.to_owned();
        match standing.clone() {
            Standing::Paused(Pause { why, since, by }) => {
                Self::Standing { subscriber, paused: true, why: Some(why), by: Some(by), at: since }
            }
            Standing::Resumed { at } => Self::Standing { subscriber, paused: false, why: None, by: None, at },
        }
    }
}

/// All that the stream says.
#[derive(Debug, Default)]
struct Recorded {
    bindings: Bindings,
    standings: Standings,
}

/// What a record was about.
#[derive(Debug, PartialEq, Eq)]
enum About {
    Bindings(String),
    Standing(String),
    Nothing,
}

impl Recorded {
    fn apply(&mut self, record: Record, exchange: &str) -> About {
        match record {
            Record::Bound { subscriber, exchange: bound_to, patterns, .. } => {
                let exchange = bound_to.unwrap_or_else(|| exchange.to_owned());
                self.bindings.insert(subscriber.clone(), Bound { exchange, patterns });
                About::Bindings(subscriber)
            }
            Record::Removed { subscriber, .. } => {
                self.bindings.remove(&subscriber);
                About::Bindings(subscriber)
            }
            Record::Standing { subscriber, paused, why, by, at } => {
                let pause = || Pause { why: why.unwrap_or_default(), since: at, by: by.unwrap_or_default() };
                let standing = if paused { Standing::Paused(pause()) } else { Standing::Resumed { at } };
                Arc::make_mut(&mut self.standings).insert(subscriber.clone(), standing);
                About::Standing(subscriber)
            }
            Record::Mark { .. } => About::Nothing,
        }
    }
}

mod rfc3339 {
    use std::time::SystemTime;

    use serde::{Deserialize as _, Deserializer, Serializer, de::Error as _};

    pub(super) fn serialize<S: Serializer>(at: &SystemTime, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(&humantime::format_rfc3339_millis(*at))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<SystemTime, D::Error> {
        humantime::parse_rfc3339(&String::deserialize(d)?).map_err(D::Error::custom)
    }
}

/// Records that a subscriber is paused or resumed; returns when that is confirmed.
pub(super) async fn record(topology: &Topology, publisher: &Publisher, subscriber: &str, standing: &Standing) -> Result<(), QueueError> {
    write(topology, publisher, &Record::of(subscriber, standing)).await
}

async fn write(topology: &Topology, publisher: &Publisher, record: &Record) -> Result<(), QueueError> {
    let stream = topology.state();
    let error = |why: &dyn std::fmt::Display| QueueError::new(format!("stream `{stream}`: {why}"));
    let body = serde_json::to_vec(record).map_err(|e| error(&e))?;
    let properties = BasicProperties::default().with_delivery_mode(2).with_content_type("application/json".into());
    let message = Message::to_queue(stream.clone(), Bytes::from(body), properties);
    match publisher.publish(vec![message]).await?[..] {
        [Fate::Stored] => Ok(()),
        _ => Err(error(&"the broker did not take a record")),
    }
}

/// The record from its beginning.
async fn open(topology: &Topology, pool: &Pool) -> Result<(Lease, Consumer), QueueError> {
    let lease = pool.lease().await?;
    let open = async {
        lease.channel.basic_qos(100, BasicQosOptions::default()).await?;
        let mut arguments = FieldTable::default();
        arguments.insert("x-stream-offset".into(), AMQPValue::LongString("first".into()));
        lease.channel.basic_consume(topology.state().as_str().into(), "".into(), BasicConsumeOptions::default(), arguments).await
    };
    let consumer = answer(open).await.map_err(|why| error(topology, &why))?;
    Ok((lease, consumer))
}

fn error(topology: &Topology, why: &(impl std::fmt::Display + ?Sized)) -> QueueError {
    QueueError::new(format!("stream `{}`: {why}", topology.state()))
}

/// All subscribers whose bindings were ever recorded, for a look that writes nothing: it reads `records`, or until no more come.
pub(super) async fn ever_bound(topology: &Topology, pool: &Pool, records: u32) -> Result<BTreeSet<String>, QueueError> {
    let (lease, mut consumer) = open(topology, pool).await?;
    let mut found = BTreeSet::new();
    for _ in 0..records {
        let Ok(Some(next)) = tokio::time::timeout(QUIET, consumer.next()).await else { break };
        let delivery = next.map_err(|e| error(topology, &BrokerError::from(e)))?;
        let acked = lease.channel.basic_ack(delivery.delivery_tag, BasicAckOptions::default());
        answer(acked).await.map_err(|why| error(topology, &why))?;
        if let Ok(Record::Bound { subscriber, .. }) = serde_json::from_slice(&delivery.data) {
            found.insert(subscriber);
        }
    }
    Ok(found)
}

/// Keeps the bindings as the configuration says, now that the new ones are in place.
pub(super) struct Reconciler<'a> {
    topology: &'a Topology,
    pool: &'a Pool,
    publisher: &'a Publisher,
    standings: &'a watch::Sender<Option<Standings>>,
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
    pub(super) fn new(
        topology: &'a Topology,
        pool: &'a Pool,
        publisher: &'a Publisher,
        standings: &'a watch::Sender<Option<Standings>>,
        subscribers: &'a [Arc<Subscriber>],
    ) -> Self {
        let bound =
            |s: &Subscriber| Bound { exchange: topology.events(), patterns: s.events.iter().map(|p| p.as_str().to_owned()).collect() };
        let wanted = subscribers.iter().map(|s| (s.name.clone(), bound(s))).collect();
        Self {
            topology,
            pool,
            publisher,
            standings,
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
        let (lease, mut records) = self.open().await?;
        let mark = clock::batch_id();
        let (topology, publisher, last) = (self.topology, self.publisher, Record::Mark { mark: mark.clone() });
        let mut marking = std::pin::pin!(write(topology, publisher, &last));
        let mut marked = false;
        let mut recorded = Recorded::default();
        let mut up_to_date = false;
        let mut latest = clock::instant();
        loop {
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
                () = sleep(RECHECK), if up_to_date => {
                    self.unbind_removed(&mut broker, &mut recorded.bindings).await?;
                    continue;
                }
                () = sleep(RPC_TIMEOUT), if marked && !up_to_date => {
                    return Err(self.error("the broker sent no more records before the last one"));
                }
            };
            let delivery = next.map_err(|e| self.error(&BrokerError::from(e)))?;
            latest = clock::instant();
            let acked = lease.channel.basic_ack(delivery.delivery_tag, BasicAckOptions::default());
            answer(acked).await.map_err(|why| self.error(&why))?;
            match serde_json::from_slice::<Record>(&delivery.data) {
                Ok(Record::Mark { mark: found }) if found == mark => {
                    up_to_date = true;
                    self.standings.send_replace(Some(recorded.standings.clone()));
                    self.reconcile(&mut broker, &mut recorded.bindings).await?;
                    following.goes_well();
                }
                Ok(record) => match recorded.apply(record, &self.topology.events()) {
                    About::Bindings(name) if up_to_date => self.compare(&mut broker, &mut recorded.bindings, &name).await?,
                    About::Standing(name) if up_to_date => self.stands(&name, &recorded),
                    About::Bindings(_) | About::Standing(_) | About::Nothing => {}
                },
                Err(e) => tracing::warn!(stream = self.topology.state(), error = %e, "a record is not understood and left alone"),
            }
        }
    }

    /// Tells of one subscriber alone: of another this daemon may have recorded something that is still to come.
    fn stands(&self, name: &str, recorded: &Recorded) {
        if let Some(standing) = recorded.standings.get(name).cloned() {
            self.standings.send_modify(|all| drop(Arc::make_mut(all.get_or_insert_default()).insert(name.to_owned(), standing)));
        }
    }

    /// A broker that blocks publishing takes no mark, and still sends what it has: after a silence that is
    /// all. Otherwise nothing would be delivered by a daemon that starts meanwhile.
    fn without_mark(&self, recorded: &Recorded) {
        self.standings.send_if_modified(|known| {
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

    async fn open(&self) -> Result<(Lease, Consumer), QueueError> {
        open(self.topology, self.pool).await
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
        write(self.topology, self.publisher, record).await
    }

    fn error(&self, why: &(impl std::fmt::Display + ?Sized)) -> QueueError {
        error(self.topology, why)
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
        let mut recorded = Recorded::default();
        for line in [
            r##"{"subscriber":"a","patterns":["x.*"],"at":"2026-01-01T00:00:00Z"}"##,
            r##"{"subscriber":"b","patterns":["#"],"at":"2026-01-01T00:00:00Z"}"##,
            r##"{"subscriber":"c","exchange":"old","patterns":["#"],"at":"2026-01-01T00:00:00Z"}"##,
            r#"{"mark":"msg_1"}"#,
            r##"{"subscriber":"a","patterns":["y.#","z"],"at":"2026-01-02T00:00:00Z","new":"field"}"##,
            r#"{"subscriber":"b","removed":true,"at":"2026-01-02T00:00:00Z"}"#,
        ] {
            let about = recorded.apply(serde_json::from_str(line).expect("a record"), "today's");
            assert_eq!(about == About::Nothing, line.contains("mark"));
        }
        let bound = |exchange: &str, patterns: &[&str]| Bound {
            exchange: exchange.to_owned(),
            patterns: patterns.iter().map(|p| (*p).to_owned()).collect(),
        };
        let expected = [("a".to_owned(), bound("today's", &["y.#", "z"])), ("c".to_owned(), bound("old", &["#"]))];
        assert_eq!(recorded.bindings, Bindings::from(expected));
    }

    #[test]
    fn a_pause_is_recorded_beside_the_bindings_and_read_as_it_was() {
        let since = SystemTime::UNIX_EPOCH + Duration::from_millis(1_700_000_000_123);
        let paused = Standing::Paused(Pause { why: "410".to_owned(), since, by: "receiver".to_owned() });
        let resumed = Standing::Resumed { at: since };
        let mut recorded = Recorded::default();
        recorded
            .apply(serde_json::from_str(r##"{"subscriber":"a","patterns":["#"],"at":"2026-01-01T00:00:00Z"}"##).expect("a record"), "x");
        for (name, standing) in [("a", &paused), ("b", &paused), ("b", &resumed)] {
            let line = serde_json::to_string(&Record::of(name, standing)).expect("prints");
            assert_eq!(recorded.apply(serde_json::from_str(&line).expect("a record"), "x"), About::Standing(name.to_owned()), "{line}");
        }
        assert_eq!(*recorded.standings, [("a".to_owned(), paused), ("b".to_owned(), resumed)].into());
        assert_eq!(recorded.bindings.len(), 1);
    }
}

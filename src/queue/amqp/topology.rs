//! Names of queues and exchanges, and the arguments of queues.

use lapin::types::{AMQPValue, FieldTable};

use super::{ladder, pool::CHANNELS_PER_CONNECTION};
use crate::{
    clock,
    config::{AmqpConfig, Intake},
    crypto::secret::SecretUrl,
};

/// More deliveries of a message than ever happen. Off (`-1`) means the opposite on RabbitMQ 3.10,
/// where the first requeue drops the message; and 4.x has a default limit of 20.
pub(super) const DELIVERY_LIMIT: i64 = 1_000_000_000;

/// Bytes of events that wait in the queue of history, at most; the oldest give way.
pub(super) const MAX_HISTORY: u64 = 1 << 30;

/// The names and arguments that follow from the configuration.
#[derive(Debug, Clone)]
pub(super) struct Topology {
    config: AmqpConfig,
}

/// The resources that a configuration needs of the broker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Footprint {
    pub queues: usize,
    /// The queues among them that all subscribers share.
    pub shared: usize,
    /// File descriptors of each node that has a replica of each queue, approximately.
    pub descriptors: usize,
    /// Connections of each daemon.
    pub connections: usize,
}

/// File descriptors of a node that a quorum queue takes (measured on 3.10: about 300 queues exhaust
/// 927).
pub(super) const DESCRIPTORS_PER_QUEUE: usize = 3;

/// The resources for a number of subscribers. `relays`: their events come from a source queue.
/// `history`: events are kept.
pub fn footprint(subscribers: usize, relays: bool, history: bool) -> Footprint {
    // The ladder, the orphans, the record.
    let shared = ladder::LEVELS as usize + 2 + usize::from(history);
    let queues = 3 * subscribers + shared;
    let channels = 2 * subscribers + usize::from(relays);
    let consuming = channels.div_ceil(CHANNELS_PER_CONNECTION);
    // One to publish, one to declare; one for history, and for moments one on which its queue is
    // tried.
    let connections = 2 + usize::from(relays) + 2 * usize::from(history) + consuming;
    Footprint { queues, shared, descriptors: DESCRIPTORS_PER_QUEUE * queues, connections }
}

/// The resources of a broker before the embedded queue. With a source queue nothing is declared.
pub fn intake_footprint(intake: &Intake) -> Footprint {
    let queues = usize::from(matches!(intake, Intake::Exchange(_)));
    let descriptors = DESCRIPTORS_PER_QUEUE * queues;
    Footprint { queues, shared: queues, descriptors, connections: 1 }
}

/// The role of a queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum QueueRole<'n> {
    Main(&'n str),
    Retry(&'n str),
    Dead(&'n str),
    Level(u32),
    Orphans,
    State,
    History,
    Intake,
}

impl Topology {
    pub(super) fn new(config: AmqpConfig) -> Self {
        Self { config }
    }

    pub(super) fn url(&self) -> &SecretUrl {
        &self.config.url
    }

    pub(super) fn management_url(&self) -> Option<&SecretUrl> {
        self.config.management_url.as_deref()
    }

    pub(super) fn prefix(&self) -> &str {
        &self.config.prefix
    }

    pub(super) fn intake(&self) -> &Intake {
        &self.config.intake
    }

    /// Whether events are kept in history.
    pub(super) fn keeps_history(&self) -> bool {
        self.config.keeps_history
    }

    /// Whether this process has a store, of whichever id.
    pub(super) fn has_store(&self) -> bool {
        self.config.has_store
    }

    /// Whether subscribers are made over the API.
    pub(super) fn manages(&self) -> bool {
        self.config.manages
    }

    fn named(&self, rest: &str) -> String {
        format!("{}.{rest}", self.config.prefix)
    }

    pub(super) fn main(&self, subscriber: &str) -> String {
        self.named(&format!("sub.{subscriber}"))
    }

    pub(super) fn retry(&self, subscriber: &str) -> String {
        self.named(&format!("sub.{subscriber}.retry"))
    }

    pub(super) fn dead(&self, subscriber: &str) -> String {
        self.named(&format!("sub.{subscriber}.dead"))
    }

    /// The queue and the exchange of a level of the ladder.
    pub(super) fn level(&self, level: u32) -> String {
        self.named(&format!("delay.{level:02}"))
    }

    /// The exchange at the end of the ladder.
    pub(super) fn due(&self) -> String {
        self.named("delay")
    }

    /// The queue and the exchange of messages that could not be routed back.
    pub(super) fn orphans(&self) -> String {
        self.named("orphans")
    }

    pub(super) fn state(&self) -> String {
        self.named("state")
    }

    /// The queue of all events, for history.
    pub(super) fn history(&self) -> String {
        self.named("history")
    }

    /// The queue of the events that go into the embedded queue.
    pub(super) fn intake_queue(&self) -> String {
        self.named("intake")
    }

    pub(super) fn snapshot(&self) -> String {
        self.named("state.snapshot")
    }

    /// The name of a queue that does not exist and never will.
    pub(super) fn unused_name(&self) -> String {
        self.named(&format!("nobodys-{}", clock::batch_id()))
    }

    /// The exchange that subscribers' queues are bound to.
    pub(super) fn events(&self) -> String {
        match &self.config.intake {
            Intake::Exchange(name) => name.clone(),
            Intake::SourceQueue(_) => self.named("events"),
        }
    }

    /// The exchange that is the [witness](Self::ensure_witness).
    pub(super) fn witness(&self) -> String {
        self.named("witness")
    }

    pub(super) fn level_arguments(&self, level: u32) -> FieldTable {
        let below = if level == 0 { self.due() } else { self.level(level - 1) };
        let ttl = i64::from(1_u32 << level) * 1000;
        let [a, b, c] = at_least_once(&below);
        quorum(&[("x-message-ttl", AMQPValue::LongLongInt(ttl)), a, b, c])
    }

    /// The arguments of a subscriber's main and retry queue: messages that the broker drops because
    /// of its owner's policy go into the dead queue, at least once.
    fn working_arguments(&self, subscriber: &str) -> FieldTable {
        let [a, b, c] = at_least_once("");
        quorum(&[("x-dead-letter-routing-key", text(&self.dead(subscriber))), a, b, c])
    }

    /// Every queue of a subscriber with its arguments, in the order of their declaration.
    pub(super) fn subscriber_queues(&self, name: &str) -> [(String, FieldTable); 3] {
        let working = || self.working_arguments(name);
        [
            (self.dead(name), keeping_arguments()),
            (self.retry(name), working()),
            (self.main(name), working()),
        ]
    }

    /// The queues that all subscribers share.
    pub(super) fn shared_queues(&self) -> Vec<(String, FieldTable)> {
        let levels = (0..ladder::LEVELS).map(|l| (self.level(l), self.level_arguments(l)));
        std::iter::once((self.orphans(), keeping_arguments())).chain(levels).collect()
    }

    /// The arguments of the queue of history: one daemon at a time takes from it, and when nobody
    /// does it drops its oldest events, so that it never refuses one.
    pub(super) fn history_arguments(&self) -> FieldTable {
        let bytes = i64::try_from(MAX_HISTORY).unwrap_or(i64::MAX);
        quorum(&[
            ("x-single-active-consumer", AMQPValue::Boolean(true)),
            ("x-max-length-bytes", AMQPValue::LongLongInt(bytes)),
            ("x-overflow", text("drop-head")),
        ])
    }

    /// The arguments of the [intake queue](Self::intake_queue): one daemon at a time takes from it, and
    /// it loses no event, but refuses new ones where a policy of its owner limits it.
    pub(super) fn intake_arguments(&self) -> FieldTable {
        quorum(&[
            ("x-single-active-consumer", AMQPValue::Boolean(true)),
            ("x-overflow", text("reject-publish")),
        ])
    }

    /// The role that a queue's name says.
    pub(super) fn role<'n>(&self, queue: &'n str) -> Option<QueueRole<'n>> {
        let rest = queue.strip_prefix(&self.config.prefix)?.strip_prefix('.')?;
        match rest.split('.').collect::<Vec<_>>()[..] {
            ["sub", name] => Some(QueueRole::Main(name)),
            ["sub", name, "retry"] => Some(QueueRole::Retry(name)),
            ["sub", name, "dead"] => Some(QueueRole::Dead(name)),
            ["delay", level] => level.parse().ok().map(QueueRole::Level),
            ["orphans"] => Some(QueueRole::Orphans),
            ["state"] => Some(QueueRole::State),
            ["history"] => Some(QueueRole::History),
            ["intake"] => Some(QueueRole::Intake),
            _ => None,
        }
    }

    /// Every exchange, including the one that producers publish to.
    pub(super) fn exchanges(&self) -> Vec<String> {
        (0..ladder::LEVELS)
            .map(|l| self.level(l))
            .chain([self.due(), self.orphans(), self.events()])
            .collect()
    }
}

/// The exclusive queue that exists as long as a walk through `queue`. The messages that the walk
/// has passed are unacked and not counted, so that the queue seems empty to all others.
pub(super) fn walk_of(queue: &str) -> String {
    format!("{queue}.walk")
}

/// Arguments for dead-lettering at least once. Without `reject-publish` the broker silently falls
/// back to at most once.
pub(super) fn at_least_once(exchange: &str) -> [(&'static str, AMQPValue); 3] {
    [
        ("x-dead-letter-exchange", text(exchange)),
        ("x-dead-letter-strategy", text("at-least-once")),
        ("x-overflow", text("reject-publish")),
    ]
}

pub(super) fn text(value: &str) -> AMQPValue {
    AMQPValue::LongString(value.into())
}

pub(super) fn table(pairs: &[(&str, AMQPValue)]) -> FieldTable {
    let mut t = FieldTable::default();
    for (k, v) in pairs {
        t.insert((*k).into(), v.clone());
    }
    t
}

pub(super) fn quorum(more: &[(&str, AMQPValue)]) -> FieldTable {
    let mut t = table(more);
    t.insert("x-queue-type".into(), text("quorum"));
    t.insert("x-delivery-limit".into(), AMQPValue::LongLongInt(DELIVERY_LIMIT));
    t
}

/// The arguments of a queue that keeps its messages: where a policy of the broker's owner limits
/// its length it refuses new ones, while by default it would drop the oldest.
pub(super) fn keeping_arguments() -> FieldTable {
    quorum(&[("x-overflow", text("reject-publish"))])
}

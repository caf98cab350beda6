//! A queue of either kind, so that one test can hold both to the same promises.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use bytes::Bytes;
use hooktrail::{
    config::{EmbeddedConfig, HistoryConfig},
    delivery::Depth,
    queue::{DeadLetters as _, MAX_GROUP, NewEvent, Queue as _, embedded::EmbeddedQueue},
};
use lapin::BasicProperties;

use super::{
    broker::Broker,
    daemon::{Daemon, Setup},
    eventually,
};

/// Makes of each `async fn name(queue: Queue)` two tests: `amqp::name` and `embedded::name`.
macro_rules! on_both_queues {
    ($($name:ident),+ $(,)?) => {
        mod amqp {
            $(#[test]
            fn $name() {
                crate::support::run(async { super::$name(crate::support::queue::Queue::amqp()).await });
            })+
        }
        mod embedded {
            $(#[test]
            fn $name() {
                crate::support::run(async { super::$name(crate::support::queue::Queue::embedded()).await });
            })+
        }
    };
}

pub(crate) use on_both_queues;

/// The parts of a configuration that are about a queue.
pub(crate) trait Section {
    /// `[queue]`, for the subscribers that will use it.
    fn section(&self, subscribers: &[&str]) -> String;
}

pub(crate) enum Queue {
    Amqp(Broker),
    Embedded(Embedded),
}

/// An embedded queue in a directory of its own.
pub(crate) struct Embedded {
    dir: tempfile::TempDir,
}

impl Section for Broker {
    fn section(&self, subscribers: &[&str]) -> String {
        subscribers.iter().for_each(|s| self.knows(s));
        format!(
            "[queue]\nurl = \"{}\"\nexchange = \"{}\"\nprefix = \"{}\"\n",
            self.url, self.exchange, self.prefix
        )
    }
}

impl Section for Embedded {
    fn section(&self, _: &[&str]) -> String {
        format!("[queue]\nurl = \"embedded\"\ndata_dir = \"{}\"\n", self.data_dir().display())
    }
}

impl Section for Queue {
    fn section(&self, subscribers: &[&str]) -> String {
        match self {
            Self::Amqp(broker) => broker.section(subscribers),
            Self::Embedded(embedded) => embedded.section(subscribers),
        }
    }
}

impl Embedded {
    pub(crate) fn new() -> Self {
        Self { dir: tempfile::tempdir().expect("a directory") }
    }

    /// In a directory of its own within another one.
    pub(crate) fn within(base: &Path) -> Self {
        Self { dir: tempfile::tempdir_in(base).expect("a directory") }
    }

    /// It is made when it is needed.
    pub(crate) fn data_dir(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    pub(crate) fn file(&self) -> PathBuf {
        self.data_dir().join("hooktrail.db")
    }

    /// A process of its own, alongside the daemon.
    pub(crate) fn open(&self) -> EmbeddedQueue {
        EmbeddedQueue::for_publishing(&self.config()).unwrap_or_else(|e| panic!("{e}"))
    }

    pub(crate) fn config(&self) -> EmbeddedConfig {
        EmbeddedConfig {
            tenant: None,
            tenants_required: false,
            data_dir: self.data_dir(),
            retention: Duration::from_secs(3600),
            history: Some(HistoryConfig {
                retention: Duration::from_secs(3600),
                max_bytes: 2 << 30,
                bodies: true,
            }),
        }
    }

    /// Takes away a subscriber's dead letters; their bodies.
    pub(crate) async fn take_dead(&self, subscriber: &str) -> Vec<Vec<u8>> {
        let mut letters =
            self.open().dead_letters(subscriber).await.unwrap_or_else(|e| panic!("{e}"));
        let mut bodies = Vec::new();
        while let Some(held) = letters.next().await.expect("a letter") {
            bodies.push(held.letter.body.to_vec());
            letters.purge(vec![held]).await.expect("purges");
        }
        bodies
    }

    /// Stores events as they are, invalid ones too.
    pub(crate) async fn publish(
        &self,
        event_type: &str,
        message_id: Option<&str>,
        bodies: impl IntoIterator<Item = Bytes>,
    ) {
        let queue = self.open();
        let event = |body| NewEvent {
            event_type: event_type.to_owned(),
            message_id: message_id.map(str::to_owned),
            body,
            traceparent: None,
            tenant: None,
        };
        let mut bodies = bodies.into_iter().map(event).peekable();
        while bodies.peek().is_some() {
            queue
                .publish(bodies.by_ref().take(MAX_GROUP).collect())
                .await
                .unwrap_or_else(|e| panic!("{e}"));
        }
    }

    async fn depth(&self, subscriber: &str) -> Depth {
        let depths = self.open().everything().await.unwrap_or_else(|e| panic!("{e}"));
        depths.subscribers.get(subscriber).copied().unwrap_or_default()
    }

    pub(crate) async fn wait(&self, what: &str, condition: impl AsyncFnMut() -> bool) {
        eventually(&format!("{what} in {}", self.file().display()), condition).await;
    }

    pub(crate) async fn backlog(&self, subscriber: &str) -> u32 {
        self.depth(subscriber).await.events as u32
    }

    pub(crate) async fn retries(&self, subscriber: &str) -> u32 {
        self.depth(subscriber).await.batches() as u32
    }

    pub(crate) async fn dead(&self, subscriber: &str) -> u32 {
        self.depth(subscriber).await.dead as u32
    }
}

impl Queue {
    pub(crate) fn amqp() -> Self {
        Self::Amqp(Broker::shared())
    }

    pub(crate) fn embedded() -> Self {
        Self::Embedded(Embedded::new())
    }

    /// Another one of the same kind, empty.
    pub(crate) fn another(&self) -> Self {
        match self {
            Self::Amqp(_) => Self::amqp(),
            Self::Embedded(_) => Self::embedded(),
        }
    }

    /// Publishes as a producer does, and returns when all are confirmed. A daemon has run with the
    /// subscribers before.
    pub(crate) async fn publish<B: AsRef<[u8]>>(
        &self,
        event_type: &str,
        bodies: impl IntoIterator<Item = B>,
    ) {
        match self {
            Self::Amqp(broker) => broker.publish(event_type, bodies).await,
            Self::Embedded(embedded) => {
                let bodies = bodies.into_iter().map(|b| Bytes::copy_from_slice(b.as_ref()));
                embedded.publish(event_type, None, bodies).await;
            }
        }
    }

    /// Publishes one event under a message id of the producer's choice.
    pub(crate) async fn publish_as(&self, id: &str, event_type: &str, body: &[u8]) {
        match self {
            Self::Amqp(broker) => {
                broker
                    .put(
                        &broker.exchange,
                        event_type,
                        body,
                        BasicProperties::default().with_message_id(id.into()),
                    )
                    .await;
            }
            Self::Embedded(embedded) => {
                embedded.publish(event_type, Some(id), [Bytes::copy_from_slice(body)]).await
            }
        }
    }

    /// Events that a subscriber has still to get.
    pub(crate) async fn backlog(&self, subscriber: &str) -> u32 {
        match self {
            Self::Amqp(broker) => {
                broker.depth(&format!("sub.{subscriber}")).await.expect("the subscriber's queue")
            }
            Self::Embedded(embedded) => embedded.backlog(subscriber).await,
        }
    }

    pub(crate) async fn wait_backlog(&self, subscriber: &str, expected: u32) {
        let what = format!("{expected} events for {subscriber} in the queue");
        eventually(&what, async || self.backlog(subscriber).await == expected).await;
    }

    pub(crate) async fn dead(&self, subscriber: &str) -> u32 {
        match self {
            Self::Amqp(broker) => broker
                .depth(&format!("sub.{subscriber}.dead"))
                .await
                .expect("the subscriber's dead letters"),
            Self::Embedded(embedded) => embedded.dead(subscriber).await,
        }
    }

    pub(crate) async fn wait_dead(&self, subscriber: &str, expected: u32) {
        eventually(&format!("{expected} dead letters of {subscriber}"), async || {
            self.dead(subscriber).await == expected
        })
        .await;
    }

    /// Waits until this many batches of a subscriber are delayed; on a broker, at this level of the
    /// ladder.
    pub(crate) async fn wait_retries(&self, subscriber: &str, level: u8, expected: u32) {
        eventually(
            &format!("{expected} batches of {subscriber} wait for their time"),
            async || match self {
                Self::Amqp(broker) => {
                    broker.depth(&format!("delay.{level:02}")).await == Some(expected)
                }
                Self::Embedded(embedded) => embedded.retries(subscriber).await == expected,
            },
        )
        .await;
    }

    /// Waits until this many batches of a subscriber are due.
    pub(crate) async fn wait_retries_ready(&self, subscriber: &str, expected: u32) {
        match self {
            Self::Amqp(broker) => {
                broker.wait_depth(&format!("sub.{subscriber}.retry"), expected).await
            }
            Self::Embedded(_) => self.wait_retries(subscriber, 0, expected).await,
        }
    }

    /// Waits until nothing is in the queue that a subscriber might still get, dead letters
    /// included.
    pub(crate) async fn wait_empty(&self, subscriber: &str) {
        self.wait_backlog(subscriber, 0).await;
        self.wait_dead(subscriber, 0).await;
        match self {
            Self::Amqp(broker) => {
                for queue in [format!("sub.{subscriber}.retry"), "orphans".to_owned()] {
                    broker.wait_depth(&queue, 0).await;
                }
            }
            Self::Embedded(_) => self.wait_retries(subscriber, 0, 0).await,
        }
    }

    /// Takes away a subscriber's dead letters; their bodies.
    pub(crate) async fn take_dead(&self, subscriber: &str) -> Vec<Vec<u8>> {
        match self {
            Self::Amqp(broker) => broker.take_all(&format!("sub.{subscriber}.dead")).await,
            Self::Embedded(embedded) => embedded.take_dead(subscriber).await,
        }
    }

    /// Kills a daemon and puts another in its place: on a broker without a pause, where the
    /// embedded queue is for one at a time.
    pub(crate) fn take_over(&self, setup: &Setup, old: &mut Daemon) {
        match self {
            Self::Amqp(_) => {
                let next = setup.spawn();
                std::mem::replace(old, next).kill();
            }
            Self::Embedded(_) => {
                old.end();
                *old = setup.spawn();
            }
        }
    }
}

//! Connections to the broker: made without end, shared by a bounded number of channels.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use lapin::{Channel, Connection, ConnectionProperties, ErrorKind, uri::AMQPUri};
use tokio::{sync::Mutex, time::timeout};

use super::wire;
use crate::{queue::QueueError, retry::Pauses, secret::SecretUrl};

/// For the TCP connection, TLS and the AMQP handshake together; lapin has no limit of its own here.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// For one request to the broker that it should answer at once.
pub(super) const RPC_TIMEOUT: Duration = Duration::from_secs(20);

/// Seconds. The server's default of 60 notices a dead peer after two minutes.
const HEARTBEAT: u16 = 10;

/// A connection's frame loop looks at every channel for each frame: more of them slow all down.
const CHANNELS_PER_CONNECTION: usize = 100;

/// One attempt to connect.
pub(super) async fn connect(url: &SecretUrl, role: &str) -> Result<Connection, QueueError> {
    let fail = |why: String| QueueError::new(format!("cannot connect to the broker at {url}: {why}"));
    let mut uri: AMQPUri = url.expose().as_str().parse().map_err(|_| fail("[queue] url is not a valid AMQP URL".to_owned()))?;
    uri.query.heartbeat = Some(HEARTBEAT);
    let vhost = uri.vhost.clone();
    let name = format!("hooktrail {} {role}", env!("CARGO_PKG_VERSION"));
    let properties = ConnectionProperties::default().with_connection_name(name.as_str().into());
    match timeout(CONNECT_TIMEOUT, wire::connect(uri, properties)).await {
        Err(_) => Err(fail(format!("no answer within {} s", CONNECT_TIMEOUT.as_secs()))),
        Ok(Ok(connection)) => Ok(connection),
        Ok(Err(e)) => Err(fail(explain(&e, &vhost))),
    }
}

/// What an error of the broker means and what to do, where that is known.
fn explain(e: &lapin::Error, vhost: &str) -> String {
    let text = e.to_string();
    if text.contains("ACCESS_REFUSED") {
        return "the broker refused user name or password; check [queue] url and `rabbitmqctl list_users`".to_owned();
    }
    if text.contains("NOT_ALLOWED") || text.contains("vhost") {
        let hint = if vhost.is_empty() { "; the default vhost is written %2f, as in amqp://host:5672/%2f" } else { "" };
        return format!("the broker does not let this user into vhost `{vhost}`{hint}");
    }
    describe(e)
}

/// An error in the broker's words, without the URL.
pub(super) fn describe(e: &lapin::Error) -> String {
    match e.kind() {
        ErrorKind::ProtocolError(e) => format!("{} ({})", e.get_message(), e.get_id()),
        ErrorKind::IOError(e) => e.to_string(),
        ErrorKind::MissingHeartbeatError => "the broker sent no heartbeat".to_owned(),
        _ => e.to_string(),
    }
}

/// Waits for the broker's answer to a request, for at most [`RPC_TIMEOUT`]: a queue without a leader
/// answers nobody, and lapin waits without end.
///
/// # Errors
/// What the broker said, or that it said nothing.
pub(super) async fn answer<T>(request: impl Future<Output = lapin::Result<T>>) -> Result<T, String> {
    match timeout(RPC_TIMEOUT, request).await {
        Ok(answer) => answer.map_err(|e| describe(&e)),
        Err(_) => Err(format!("the broker did not answer within {} s", RPC_TIMEOUT.as_secs())),
    }
}

/// Between attempts to reach the broker.
pub(super) fn pauses() -> Pauses {
    Pauses::new(Duration::from_millis(200), Duration::from_secs(10))
}

/// Logs a condition when it changes, not each time it is met.
#[derive(Debug)]
pub(super) struct Condition {
    what: String,
    bad: AtomicBool,
}

impl Condition {
    pub(super) fn new(what: impl Into<String>) -> Self {
        Self { what: what.into(), bad: AtomicBool::new(false) }
    }

    pub(super) fn is_bad(&self, why: &dyn std::fmt::Display) {
        if self.bad.swap(true, Ordering::Relaxed) {
            tracing::debug!(error = %why, "{} still failing", self.what);
        } else {
            tracing::warn!(error = %why, "{} lost; trying again without end", self.what);
        }
    }

    pub(super) fn is_good(&self) {
        if self.bad.swap(false, Ordering::Relaxed) {
            tracing::warn!("{} recovered", self.what);
        }
    }
}

/// Connects, trying again without end.
pub(super) async fn connect_persistently(url: &SecretUrl, role: &str, condition: &Condition) -> Connection {
    let mut pauses = pauses();
    loop {
        match connect(url, role).await {
            Ok(connection) => {
                condition.is_good();
                return connection;
            }
            Err(e) => condition.is_bad(&e),
        }
        tokio::time::sleep(pauses.grow()).await;
    }
}

/// A channel and what it keeps alive.
#[derive(Debug)]
pub(super) struct Lease {
    pub(super) channel: Channel,
    slot: Arc<Slot>,
}

impl Lease {
    /// The connection that the channel is on.
    pub(super) fn connection(&self) -> &Connection {
        &self.slot.connection
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.slot.channels.fetch_sub(1, Ordering::Relaxed);
    }
}

#[derive(Debug)]
struct Slot {
    connection: Connection,
    channels: AtomicUsize,
}

impl Slot {
    async fn lease(self: &Arc<Self>) -> Result<Lease, QueueError> {
        self.channels.fetch_add(1, Ordering::Relaxed);
        match answer(self.connection.create_channel()).await {
            Ok(channel) => Ok(Lease { channel, slot: self.clone() }),
            Err(why) => {
                self.channels.fetch_sub(1, Ordering::Relaxed);
                Err(QueueError::new(format!("the broker opens no channel: {why}")))
            }
        }
    }
}

/// The consuming connections: channels are leased from them, up to a number for each.
#[derive(Debug)]
pub(super) struct Pool {
    url: SecretUrl,
    role: &'static str,
    slots: Mutex<Vec<Arc<Slot>>>,
    condition: Condition,
}

impl Pool {
    pub(super) fn new(url: SecretUrl, role: &'static str) -> Self {
        Self { url, role, slots: Mutex::default(), condition: Condition::new(format!("broker connection ({role})")) }
    }

    /// A channel on a shared connection. Waits for the broker without end.
    pub(super) async fn lease(&self) -> Result<Lease, QueueError> {
        // The lock is held while connecting: whoever comes meanwhile needs that connection too.
        let mut slots = self.slots.lock().await;
        slots.retain(|s| s.connection.status().connected());
        let free = slots.iter().find(|s| s.channels.load(Ordering::Relaxed) < CHANNELS_PER_CONNECTION).cloned();
        let slot = match free {
            Some(slot) => slot,
            None => {
                let connection = connect_persistently(&self.url, self.role, &self.condition).await;
                let slot = Arc::new(Slot { connection, channels: AtomicUsize::new(0) });
                slots.push(slot.clone());
                slot
            }
        };
        drop(slots);
        slot.lease().await
    }

    /// A channel on a connection of its own, for a queue that may take its connection down with it.
    /// Leases of the same quarantine share it.
    pub(super) async fn quarantine(&self) -> Result<Quarantine, QueueError> {
        let connection = connect(&self.url, self.role).await?;
        Ok(Quarantine(Arc::new(Slot { connection, channels: AtomicUsize::new(0) })))
    }

    pub(super) async fn close(&self) {
        for slot in self.slots.lock().await.drain(..) {
            close(&slot.connection).await;
        }
    }
}

/// A connection that is not shared with other subscribers.
#[derive(Debug)]
pub(super) struct Quarantine(Arc<Slot>);

impl Quarantine {
    pub(super) async fn lease(&self) -> Result<Lease, QueueError> {
        self.0.lease().await
    }
}

/// Says goodbye, so that the broker logs no broken connection; it is gone either way.
pub(super) async fn close(connection: &Connection) {
    if let Ok(Err(e)) = timeout(Duration::from_secs(2), connection.close(200, "bye".into())).await {
        tracing::debug!(error = %describe(&e), "the connection was gone before it was closed");
    }
}

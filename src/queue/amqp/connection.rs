//! Connections to the broker: made without end, shared by a bounded number of channels.

use std::{
    fmt,
    sync::{
        Arc, Weak,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures_util::future::join_all;
use lapin::{Channel, Connection, ConnectionProperties, ErrorKind, uri::AMQPUri};
use tokio::{sync::Mutex, time::timeout};
use url::Host;

use super::wire::{self, Greeting};
use crate::{
    metrics::{Metrics, OpenConnection},
    queue::QueueError,
    retry::Waits,
    secret::SecretUrl,
};

/// For the TCP connection, TLS and the AMQP handshake together; lapin has no limit of its own here.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// For one request to the broker that it should answer at once.
pub(super) const RPC_TIMEOUT: Duration = Duration::from_secs(20);

/// Seconds. The server's default of 60 notices a dead peer after two minutes.
const HEARTBEAT: u16 = 10;

/// A connection's frame loop looks at every channel for each frame: more of them slow all down.
const CHANNELS_PER_CONNECTION: usize = 100;

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    Consuming,
    Publishing,
    /// Retries and dead letters have a publishing connection without the relay's stream before them.
    Relaying,
    /// For requests that the broker may refuse, so that a refusal disturbs no delivery.
    Declaring,
}

impl Role {
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Consuming => "consuming",
            Self::Publishing => "publishing",
            Self::Relaying => "relaying",
            Self::Declaring => "declaring",
        }
    }

    /// The longest frame, in bytes: RabbitMQ's own default where messages come and go. lapin has buffers
    /// of 64 times that.
    const fn frame_max(self) -> u32 {
        match self {
            Self::Declaring => 8 * 1024,
            Self::Consuming | Self::Publishing | Self::Relaying => 128 * 1024,
        }
    }
}

/// Connects to the one broker there is, and counts.
#[derive(Debug, Clone)]
pub(super) struct Dialer {
    pub(super) url: SecretUrl,
    pub(super) metrics: Metrics,
}

impl Dialer {
    /// One attempt. The connection counts as open as long as the second value lives.
    pub(super) async fn connect(&self, role: Role) -> Result<(Connection, OpenConnection), QueueError> {
        let connected = connect(&self.url, role).await;
        self.metrics.connected(role.name(), connected.is_ok());
        Ok((connected?, self.metrics.connection(role.name())))
    }
}

async fn connect(url: &SecretUrl, role: Role) -> Result<Connection, QueueError> {
    greeted(url, role).await.map(|(connection, _)| connection)
}

/// As [`connect`], with what the broker says of itself.
pub(super) async fn greeted(url: &SecretUrl, role: Role) -> Result<(Connection, Greeting), QueueError> {
    let fail = |why: String| QueueError::new(format!("cannot connect to the broker at {url}: {why}"));
    let mut uri = parsed(url).ok_or_else(|| fail("[queue] url is not a valid AMQP URL".to_owned()))?;
    uri.query.heartbeat = Some(HEARTBEAT);
    uri.query.frame_max = Some(uri.query.frame_max.filter(|max| *max > 0).unwrap_or(u32::MAX).min(role.frame_max()));
    let vhost = uri.vhost.clone();
    let name = format!("hooktrail {} {}", env!("CARGO_PKG_VERSION"), role.name());
    let properties = ConnectionProperties::default().with_connection_name(name.as_str().into());
    match timeout(CONNECT_TIMEOUT, wire::connect(uri, properties)).await {
        Err(_) => Err(fail(format!("no answer within {} s", CONNECT_TIMEOUT.as_secs()))),
        Ok(Ok(greeted)) => Ok(greeted),
        Ok(Err(e)) => Err(fail(explain(&e, &vhost))),
    }
}

fn parsed(url: &SecretUrl) -> Option<AMQPUri> {
    let mut uri: AMQPUri = url.expose().as_str().parse().ok()?;
    // lapin leaves out such a host, and connects, password and all, to `localhost` instead.
    if let Some(Host::Ipv6(ip)) = url.expose().host() {
        uri.authority.host = ip.to_string();
    }
    Some(uri)
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
    if text.contains("InvalidContentType") {
        return "what answers there speaks no TLS; amqps:// is mostly for port 5671, amqp:// for 5672".to_owned();
    }
    BrokerError::from(e).text
}

/// What the broker said to a request, or that it said nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct BrokerError {
    /// AMQP's reply code.
    pub(super) code: Option<u16>,
    /// It did not answer in time.
    pub(super) silent: bool,
    text: String,
}

/// The reply code with which the broker closes a connection over a queue that it has lost the use of.
pub(super) const INTERNAL_ERROR: u16 = 541;
pub(super) const NOT_FOUND: u16 = 404;

impl From<&lapin::Error> for BrokerError {
    /// In the broker's words, without the URL.
    fn from(e: &lapin::Error) -> Self {
        match e.kind() {
            ErrorKind::ProtocolError(e) => {
                Self { code: Some(e.get_id()), silent: false, text: format!("{} ({})", e.get_message(), e.get_id()) }
            }
            ErrorKind::IOError(e) => Self { code: None, silent: false, text: e.to_string() },
            ErrorKind::MissingHeartbeatError => Self { code: None, silent: false, text: "the broker sent no heartbeat".to_owned() },
            _ => Self { code: None, silent: false, text: e.to_string() },
        }
    }
}

impl From<lapin::Error> for BrokerError {
    fn from(e: lapin::Error) -> Self {
        Self::from(&e)
    }
}

impl fmt::Display for BrokerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// Waits for the broker's answer to a request, for at most [`RPC_TIMEOUT`]: a queue without a leader
/// answers nobody, and lapin waits without end.
///
/// # Errors
/// What the broker said, or that it said nothing.
pub(super) async fn answer<T>(request: impl Future<Output = lapin::Result<T>>) -> Result<T, BrokerError> {
    match timeout(RPC_TIMEOUT, request).await {
        Ok(answer) => answer.map_err(BrokerError::from),
        Err(_) => {
            Err(BrokerError { code: None, silent: true, text: format!("the broker did not answer within {} s", RPC_TIMEOUT.as_secs()) })
        }
    }
}

/// Something that is tried without end: waits between the tries, and logs when it begins to fail and
/// when it goes well again, not each try.
#[derive(Debug)]
pub(super) struct Effort {
    what: String,
    failing: bool,
    waits: Waits,
}

impl Effort {
    pub(super) fn new(what: impl Into<String>) -> Self {
        Self { what: what.into(), failing: false, waits: Waits::new(Duration::from_millis(200), Duration::from_secs(10)) }
    }

    /// Waits until it may be tried again.
    pub(super) async fn failed(&mut self, why: &QueueError) {
        if std::mem::replace(&mut self.failing, true) {
            tracing::debug!(error = %why, "{} still fails", self.what);
        } else {
            tracing::warn!(error = %why, "{} lost; trying again without end", self.what);
        }
        tokio::time::sleep(self.waits.grow()).await;
    }

    pub(super) fn goes_well(&mut self) {
        self.waits.reset();
        if std::mem::take(&mut self.failing) {
            tracing::info!("{} recovered", self.what);
        }
    }
}

/// A channel, and its share in the connection that it is on.
#[derive(Debug)]
pub(super) struct Lease {
    pub(super) channel: Channel,
    _seat: Seat,
}

/// A connection that is shared by channels. It ends with the last of them, unless it is the newest.
#[derive(Debug)]
struct Slot {
    connection: Connection,
    open: AtomicUsize,
    /// In all. A channel's number is not used twice: an error that the broker closed a channel with
    /// stays with its number in lapin, and would answer the requests of the next that gets it.
    opened: AtomicUsize,
    numbers: usize,
    _counted: OpenConnection,
}

impl Slot {
    fn new((connection, counted): (Connection, OpenConnection)) -> Arc<Self> {
        let numbers = match connection.configuration().channel_max() {
            0 => usize::from(u16::MAX),
            max => max.into(),
        };
        Arc::new(Self { connection, open: AtomicUsize::new(0), opened: AtomicUsize::new(0), numbers, _counted: counted })
    }

    /// A place for one more channel, if there is one. Called by one task at a time.
    fn seat(self: &Arc<Self>) -> Option<Seat> {
        let free = self.open.load(Ordering::Relaxed) < CHANNELS_PER_CONNECTION && self.opened.load(Ordering::Relaxed) < self.numbers;
        free.then(|| {
            self.open.fetch_add(1, Ordering::Relaxed);
            self.opened.fetch_add(1, Ordering::Relaxed);
            Seat(self.clone())
        })
    }
}

#[derive(Debug)]
struct Seat(Arc<Slot>);

impl Seat {
    async fn open(self) -> Result<Lease, QueueError> {
        match answer(self.0.connection.create_channel()).await {
            Ok(channel) => Ok(Lease { channel, _seat: self }),
            Err(why) => Err(QueueError::new(format!("the broker opens no channel: {why}"))),
        }
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Connections for one purpose, made when they are needed: channels are leased from them.
#[derive(Debug)]
pub(super) struct Pool {
    dialer: Dialer,
    role: Role,
    state: Mutex<PoolState>,
}

#[derive(Debug)]
struct PoolState {
    slots: Vec<Weak<Slot>>,
    /// Stays when no channel is on it: somebody will soon want one again.
    newest: Option<Arc<Slot>>,
    connecting: Effort,
}

impl Pool {
    pub(super) fn new(dialer: Dialer, role: Role) -> Self {
        let connecting = Effort::new(format!("broker connection ({})", role.name()));
        Self { dialer, role, state: Mutex::new(PoolState { slots: Vec::new(), newest: None, connecting }) }
    }

    /// A channel on a shared connection. Waits for the broker without end.
    pub(super) async fn lease(&self) -> Result<Lease, QueueError> {
        self.seat().await.open().await
    }

    async fn seat(&self) -> Seat {
        // The lock is held while connecting: whoever comes meanwhile needs that connection too.
        let mut state = self.state.lock().await;
        state.slots.retain(|s| s.upgrade().is_some_and(|s| s.connection.status().connected()));
        let free = state.slots.iter().filter_map(Weak::upgrade).find_map(|s| s.seat());
        if let Some(seat) = free {
            return seat;
        }
        loop {
            let connected = self.quarantine().await.and_then(|q| q.seat().map(|seat| (q, seat)));
            match connected {
                Ok((Quarantine(slot), seat)) => {
                    state.connecting.goes_well();
                    state.slots.push(Arc::downgrade(&slot));
                    state.newest = Some(slot);
                    return seat;
                }
                Err(e) => state.connecting.failed(&e).await,
            }
        }
    }

    /// A connection that is not shared with others, for a queue that may take it down.
    pub(super) async fn quarantine(&self) -> Result<Quarantine, QueueError> {
        Ok(Quarantine(Slot::new(self.dialer.connect(self.role).await?)))
    }

    /// Says goodbye on those connections that are still in use.
    pub(super) async fn close(&self) {
        // Whoever holds the lock is connecting, and has nothing to say goodbye to.
        let Ok(mut state) = self.state.try_lock() else { return };
        let slots: Vec<_> = state.slots.drain(..).filter_map(|s| s.upgrade()).collect();
        join_all(slots.iter().map(|s| close(&s.connection))).await;
    }
}

/// A connection for one subscriber alone.
#[derive(Debug)]
pub(super) struct Quarantine(Arc<Slot>);

impl Quarantine {
    pub(super) async fn lease(&self) -> Result<Lease, QueueError> {
        self.seat()?.open().await
    }

    fn seat(&self) -> Result<Seat, QueueError> {
        self.0.seat().ok_or_else(|| QueueError::new("the broker allows no channel on a new connection; raise its channel_max"))
    }
}

/// Says goodbye, so that the broker logs no broken connection; it is gone either way.
pub(super) async fn close(connection: &Connection) {
    if let Ok(Err(e)) = timeout(Duration::from_secs(2), connection.close(200, "bye".into())).await {
        tracing::debug!(error = %BrokerError::from(e), "the connection was gone before it was closed");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read as _, Write as _};

    #[test]
    fn the_host_is_the_one_that_is_written() {
        for (written, meant) in [("[2001:db8::7]", "2001:db8::7"), ("192.0.2.7", "192.0.2.7"), ("broker.example", "broker.example")] {
            let url = SecretUrl::new(format!("amqps://u:p@{written}:5671/v").parse().expect("a URL"));
            assert_eq!(parsed(&url).expect("a URL").authority.host, meant);
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_connection_to_a_peer_that_says_nothing_leaves_nothing_behind() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        for scheme in ["amqp", "amqps"] {
            let port = listener.local_addr().expect("an address").port();
            let url = SecretUrl::new(format!("{scheme}://u:p@127.0.0.1:{port}/v").parse().expect("a URL"));
            let connecting = tokio::spawn(async move { connect(&url, Role::Consuming).await });
            let (mut peer, _) = listener.accept().expect("connects");
            peer.set_read_timeout(Some(Duration::from_secs(30))).expect("a limit");
            let mut first = [0; 1];
            peer.read_exact(&mut first).expect("it begins");
            connecting.abort(); // as the timeout does
            // The socket is closed, and with it the thread that read from it has ended.
            peer.read_to_end(&mut Vec::new()).expect("closed, not open for ever");
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_port_that_speaks_no_tls_is_told() {
        rustls::crypto::ring::default_provider().install_default().ok();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("an address").port();
        let url = SecretUrl::new(format!("amqps://u:p@127.0.0.1:{port}/v").parse().expect("a URL"));
        let connecting = tokio::spawn(async move { connect(&url, Role::Consuming).await });
        let (mut peer, _) = listener.accept().expect("connects");
        peer.read_exact(&mut [0; 1]).expect("it begins");
        peer.write_all(b"AMQP\x00\x00\x09\x01").expect("answers as a broker does to what is no AMQP");
        let refused = connecting.await.expect("no panic").expect_err("no TLS").to_string();
        assert!(refused.contains("speaks no TLS"), "{refused}");
    }
}

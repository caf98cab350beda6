//! Connects to the broker, and explains why that fails.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use lapin::{Connection, ConnectionProperties, ErrorKind, uri::AMQPUri};
use tokio::{sync::watch, time::timeout};
use url::Host;

use super::{
    broker_error::BrokerError,
    wire::{self, Greeting, Wire},
};
use crate::{
    crypto::secret::SecretUrl,
    queue::QueueError,
    telemetry::{
        finding::shell_word,
        metrics::{Metrics, OpenConnection},
        outage::ReportedOutage,
        troubles::{Harms, Troubles},
    },
};

/// Timeout of the TCP connection, TLS and the AMQP handshake together; lapin has no limit of its
/// own here.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Seconds between heartbeats. The server's default of 60 notices a dead peer after two minutes.
const HEARTBEAT: u16 = 10;

/// The use of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    Consuming,
    Publishing,
    /// Publishing of relayed events, so that retries and dead letters do not wait behind them.
    Relaying,
    /// Requests that the broker may refuse, so that a refusal disturbs no delivery.
    Declaring,
    /// All that the scribe does.
    Intake,
}

impl Role {
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Consuming => "consuming",
            Self::Publishing => "publishing",
            Self::Relaying => "relaying",
            Self::Declaring => "declaring",
            Self::Intake => "intake",
        }
    }

    /// The outage while there is no such connection.
    pub(super) fn outage(self, troubles: &watch::Sender<Troubles>) -> ReportedOutage {
        let harms = match self {
            // Without these no lane takes anything: it declares its queues, and consumes them.
            Self::Consuming | Self::Declaring => Harms::Lanes,
            Self::Publishing | Self::Relaying | Self::Intake => Harms::Queue,
        };
        ReportedOutage::new(self.connection(), harms, troubles)
    }

    /// The outage while a lane lacks one that no other lane uses.
    pub(super) fn own_outage(self, troubles: &watch::Sender<Troubles>) -> ReportedOutage {
        let what = format!("broker connection ({}, of a suspect queue)", self.name());
        ReportedOutage::new(what, Harms::Lanes, troubles)
    }

    /// Name of the connection in logs and among the [`Troubles`].
    pub(super) fn connection(self) -> String {
        format!("broker connection ({})", self.name())
    }

    /// The longest frame, in bytes: RabbitMQ's own default where messages come and go. lapin has
    /// buffers of 64 times that.
    const fn frame_max(self) -> u32 {
        match self {
            Self::Declaring => 8 * 1024,
            Self::Consuming | Self::Publishing | Self::Relaying | Self::Intake => 128 * 1024,
        }
    }

    /// The key of the configuration with the URL of the broker.
    const fn key(self) -> &'static str {
        match self {
            Self::Intake => "[queue] intake",
            Self::Consuming | Self::Publishing | Self::Relaying | Self::Declaring => "[queue] url",
        }
    }
}

/// A connection that was made.
#[derive(Debug)]
pub(super) struct Connected {
    pub(super) connection: Connection,
    pub(super) wire: Wire,
    /// It counts as open as long as this lives.
    pub(super) counted: OpenConnection,
}

/// Connects to the broker, and counts connections. Clones count together.
#[derive(Debug, Clone)]
pub(super) struct Dialer {
    url: SecretUrl,
    pub(super) metrics: Metrics,
    connects: Arc<AtomicUsize>,
    shortage: watch::Sender<Shortage>,
}

/// The claims whose connects have failed.
#[derive(Debug, Default)]
struct Shortage {
    claims: usize,
    /// Why the last one has failed.
    why: String,
}

impl Shortage {
    /// Why history has no connection now.
    fn error(&self) -> QueueError {
        QueueError::new(format!(
            "history has no connection while deliveries and intake lack one: {}",
            self.why
        ))
    }
}

impl Dialer {
    pub(super) fn new(url: SecretUrl, metrics: Metrics) -> Self {
        Self { url, metrics, connects: Arc::default(), shortage: watch::Sender::default() }
    }

    /// Connections of [lasting](Self::claim) claims made since the start. More of them than before can
    /// mean that the broker was restarted. One that is made to try a queue says nothing: of two tasks
    /// that try when this grows, each would have the other try again, for ever.
    pub(super) fn connects(&self) -> usize {
        self.connects.load(Ordering::Relaxed)
    }

    /// Connects once.
    pub(super) async fn connect(&self, role: Role) -> Result<Connected, QueueError> {
        let connected = connect(&self.url, role).await;
        self.metrics.connected(role.name(), connected.is_ok());
        let (connection, wire) = connected?;
        let counted = self.metrics.connection(role.name());
        Ok(Connected { connection, wire, counted })
    }

    /// Connects once, for history, which gives way to each [`Claim`]: the broker may limit the
    /// number of connections.
    pub(super) async fn connect_for_history(&self, role: Role) -> Result<Connected, QueueError> {
        let shortage = Some(self.shortage.borrow()).filter(|s| s.claims > 0).map(|s| s.error());
        if let Some(e) = shortage {
            return Err(e);
        }
        let connected = self.connect(role).await;
        connected.map_err(|e| QueueError::new(format!("history waits for a connection: {e}")))
    }

    /// Waits until history has to give up its connection; returns why.
    pub(super) async fn shortage(&self) -> QueueError {
        let mut shortage = self.shortage.subscribe();
        let short = shortage.wait_for(|shortage| shortage.claims > 0).await.map(|s| s.error());
        match short {
            Ok(e) => e,
            // The sender is this dialer's own.
            Err(_) => std::future::pending().await,
        }
    }

    /// A claim to connections that last as long as the broker does.
    pub(super) fn claim(&self, role: Role) -> Claim {
        Claim { dialer: self.clone(), role, lasts: true, is_short: false }
    }

    /// A claim to connections that a queue may end.
    pub(super) fn claim_apart(&self, role: Role) -> Claim {
        Claim { dialer: self.clone(), role, lasts: false, is_short: false }
    }
}

/// A task's claim to a connection that deliveries or intake need. From a connect that fails to the
/// next one that does not, history has no connection.
#[derive(Debug)]
pub(super) struct Claim {
    dialer: Dialer,
    role: Role,
    /// Its connections end with the broker, not with a queue.
    lasts: bool,
    is_short: bool,
}

impl Claim {
    pub(super) async fn connect(&mut self) -> Result<Connected, QueueError> {
        let connected = self.dialer.connect(self.role).await;
        match &connected {
            Ok(_) => {
                self.dialer.connects.fetch_add(usize::from(self.lasts), Ordering::Relaxed);
                self.end();
            }
            Err(e) => {
                let begins = !std::mem::replace(&mut self.is_short, true);
                self.dialer.shortage.send_modify(|shortage| {
                    shortage.claims += usize::from(begins);
                    shortage.why = e.to_string();
                });
            }
        }
        connected
    }

    /// The connection is not needed any more, or made.
    pub(super) fn end(&mut self) {
        if std::mem::take(&mut self.is_short) {
            self.dialer.shortage.send_modify(|shortage| shortage.claims -= 1);
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.end();
    }
}

/// Connects, and returns the broker's greeting too.
pub(super) async fn greeted(
    url: &SecretUrl,
    role: Role,
) -> Result<(Connection, Greeting), QueueError> {
    connect(url, role).await.map(|(connection, wire)| (connection, wire.greeting))
}

async fn connect(url: &SecretUrl, role: Role) -> Result<(Connection, Wire), QueueError> {
    let fail = |why: Why| {
        QueueError::new(format!("cannot connect to the broker at {url}: {}", why.why))
            .remedied(why.remedy)
    };
    let invalid = || {
        Why::new(
            format!("{} is not a valid AMQP URL", role.key()),
            "write it as amqp://USER:PASSWORD@HOST:5672/VHOST",
        )
    };
    let mut uri = parsed(url).ok_or_else(|| fail(invalid()))?;
    uri.query.heartbeat = Some(HEARTBEAT);
    uri.query.frame_max =
        Some(uri.query.frame_max.filter(|max| *max > 0).unwrap_or(u32::MAX).min(role.frame_max()));
    let whom = Whom {
        host: uri.authority.host.clone(),
        vhost: uri.vhost.clone(),
        user: uri.authority.userinfo.username.clone(),
        key: role.key(),
    };
    let name = format!("hooktrail {} {}", env!("CARGO_PKG_VERSION"), role.name());
    let properties = ConnectionProperties::default().with_connection_name(name.as_str().into());
    match timeout(CONNECT_TIMEOUT, wire::connect(uri, properties)).await {
        Err(_) => Err(fail(Why::new(
            format!("no answer within {} s", CONNECT_TIMEOUT.as_secs()),
            "check that host and port are those of the broker and that no firewall drops them; a broker out of file descriptors, or under an \
             alarm, does not answer either: rabbitmq-diagnostics status",
        ))),
        Ok(Ok(connected)) => Ok(connected),
        Ok(Err(e)) => Err(fail(explain(&e, &whom))),
    }
}

fn parsed(url: &SecretUrl) -> Option<AMQPUri> {
    let mut uri: AMQPUri = url.expose().as_str().parse().ok()?;
    // lapin drops an IPv6 host, and connects to `localhost` instead, password included.
    if let Some(Host::Ipv6(ip)) = url.expose().host() {
        uri.authority.host = ip.to_string();
    }
    Some(uri)
}

/// The peer of a connection, without secrets.
struct Whom {
    host: String,
    vhost: String,
    user: String,
    /// The key with the URL.
    key: &'static str,
}

/// Why there is no connection, and the remedy.
#[derive(Debug)]
struct Why {
    why: String,
    remedy: String,
}

impl Why {
    fn new(why: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { why: why.into(), remedy: remedy.into() }
    }
}

/// Explains a failed connection. The broker's own words are kept: one code stands for several
/// causes.
fn explain(e: &lapin::Error, whom: &Whom) -> Why {
    let text = BrokerError::from(e).text;
    let Whom { host, vhost, user, key } = whom;
    let (v, u) = (shell_word(vhost), shell_word(user));
    if text.contains("ACCESS_REFUSED") {
        let why = format!("the broker refused user name or password: {text}");
        return Why::new(
            why,
            format!("check {key}; rabbitmqctl authenticate_user {u}; rabbitmqctl list_users"),
        );
    }
    if text.contains("NOT_ALLOWED") {
        return not_allowed(&text, whom);
    }
    let has = |parts: &[&str]| parts.iter().any(|part| text.contains(part));
    if has(&["InvalidContentType"]) {
        return Why::new(
            "what answers there speaks no TLS",
            "amqps:// is mostly for port 5671, amqp:// for 5672",
        );
    }
    if matches!(e.kind(), ErrorKind::ParsingError(_)) || has(&["ParserErrors"]) {
        let why = "what answers there speaks no AMQP";
        return Why::new(
            why,
            "amqp:// is mostly for port 5672, amqps:// for 5671; 15672 is the management plugin's, for [queue] management_url",
        );
    }
    if has(&["invalid peer certificate", "certificate"]) {
        return Why::new(
            format!("its certificate is not accepted: {text}"),
            format!(
                "the certificate has to be for the name `{host}` and signed by an authority of this system, or of the file that SSL_CERT_FILE names"
            ),
        );
    }
    if has(&["lookup address", "resolve"]) {
        return Why::new(
            text,
            format!("check the name `{host}` in {key}: getent hosts {}", shell_word(host)),
        );
    }
    if has(&["Connection refused"]) {
        return Why::new(
            text,
            "check that the broker runs, and listens on that host and port: rabbitmqctl status",
        );
    }
    let remedy = if vhost.is_empty() {
        "the default vhost is written %2f, as in amqp://host:5672/%2f".to_owned()
    } else {
        format!("see the broker's log; rabbitmqctl status; rabbitmqctl list_permissions -p {v}")
    };
    Why::new(text, remedy)
}

/// The broker knows the user and refuses the connection, for one of several reasons.
fn not_allowed(text: &str, Whom { vhost, user, key, .. }: &Whom) -> Why {
    let (v, u) = (shell_word(vhost), shell_word(user));
    if vhost.is_empty() {
        return Why::new(text, "the default vhost is written %2f, as in amqp://host:5672/%2f");
    }
    if text.contains("limit") {
        return Why::new(
            format!("the broker allows no more connections: {text}"),
            format!(
                "raise the limit, or end other connections: rabbitmqctl list_vhost_limits -p {v}; rabbitmqctl list_user_limits --user {u}"
            ),
        );
    }
    if text.contains("not found") {
        let remedy = format!(
            "rabbitmqctl add_vhost {v}, or correct the path of {key}; rabbitmqctl list_vhosts"
        );
        return Why::new(format!("there is no vhost `{vhost}`: {text}"), remedy);
    }
    if text.contains("is down") {
        return Why::new(text, format!("rabbitmqctl restart_vhost -p {v}"));
    }
    let why = format!("the broker does not let this user into vhost `{vhost}`: {text}");
    Why::new(
        why,
        format!(
            "rabbitmqctl list_permissions -p {v}; docs/operations.md has the command that gives them (The broker's user)"
        ),
    )
}

/// Closes a connection, so that the broker logs no broken one. It is gone either way.
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
        for (written, meant) in [
            ("[2001:db8::7]", "2001:db8::7"),
            ("192.0.2.7", "192.0.2.7"),
            ("broker.example", "broker.example"),
        ] {
            let url =
                SecretUrl::new(format!("amqps://u:p@{written}:5671/v").parse().expect("a URL"));
            assert_eq!(parsed(&url).expect("a URL").authority.host, meant);
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn history_gives_way_from_a_claims_failed_connect_until_no_claim_lacks_a_connection() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let addr = listener.local_addr().expect("an address");
        drop(listener);
        let url = SecretUrl::new(format!("amqp://u:p@{addr}/v").parse().expect("a URL"));
        let dialer = Dialer::new(url, Metrics::new(crate::clock::now()));
        let tried = async || {
            let tried = dialer.connect_for_history(Role::Consuming).await;
            tried.expect_err("nobody listens").to_string()
        };
        assert!(tried().await.starts_with("history waits for a connection: cannot connect"));
        let (mut one, mut other) = (dialer.claim(Role::Publishing), dialer.claim(Role::Consuming));
        assert!(timeout(Duration::ZERO, dialer.shortage()).await.is_err(), "nothing has failed");
        one.connect().await.expect_err("nobody listens");
        one.connect().await.expect_err("nobody listens");
        other.connect().await.expect_err("nobody listens");
        one.end();
        let given_up = dialer.shortage().await.to_string();
        assert!(given_up.contains("deliveries and intake lack one: cannot connect"), "{given_up}");
        assert_eq!(tried().await, given_up);
        drop(other);
        assert!(timeout(Duration::ZERO, dialer.shortage()).await.is_err(), "no claim is left");
        assert!(tried().await.starts_with("history waits"));
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_connection_to_a_peer_that_says_nothing_leaves_nothing_behind() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        for scheme in ["amqp", "amqps"] {
            let port = listener.local_addr().expect("an address").port();
            let url = SecretUrl::new(
                format!("{scheme}://u:p@127.0.0.1:{port}/v").parse().expect("a URL"),
            );
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
        peer.write_all(b"AMQP\x00\x00\x09\x01")
            .expect("answers as a broker does to what is no AMQP");
        let refused = connecting.await.expect("no panic").expect_err("no TLS").to_string();
        assert!(refused.contains("speaks no TLS"), "{refused}");
    }
}

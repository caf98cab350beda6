//! A RabbitMQ: the one that the environment names, or a private node that a test may kill.

use std::{
    fs::Permissions,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use lapin::{
    BasicProperties, Channel, Confirmation, Connection, ConnectionProperties,
    options::{
        BasicGetOptions, BasicPublishOptions, ConfirmSelectOptions, ExchangeDeleteOptions,
        QueueDeclareOptions, QueueDeleteOptions,
    },
    types::{AMQPValue, FieldTable},
};
use tokio::sync::Mutex;

use super::{assert_not_quick, eventually, free_port, unique};

/// A broker and a name of its own in it.
pub(crate) struct Broker {
    pub(crate) url: String,
    pub(crate) prefix: String,
    pub(crate) exchange: String,
    subscribers: std::sync::Mutex<Vec<String>>,
    node: Option<Arc<Node>>,
}

/// The node with a management plugin that tests share as long as one of them needs it.
static MANAGED: Mutex<Weak<Node>> = Mutex::const_new(Weak::new());

impl Broker {
    /// The broker that all tests share; each has its own prefix and exchange there.
    pub(crate) fn shared() -> Self {
        assert_not_quick("broker");
        let url = std::env::var("HOOKTRAIL_TEST_AMQP_URL").unwrap_or_else(|_| {
            panic!("no broker to test with: run `scripts/test`, which finds or installs one, or set HOOKTRAIL_TEST_AMQP_URL")
        });
        Self::at(url, None)
    }

    /// A node of this test's own, on free ports.
    pub(crate) async fn private() -> Self {
        Self::private_with("").await
    }

    /// Like [`private`](Self::private), with settings of RabbitMQ's own, as Erlang terms.
    pub(crate) async fn private_with(settings: &str) -> Self {
        let node = Node::new(false);
        node.set(settings);
        node.start().await;
        Self::on(node)
    }

    /// Like [`private_with`](Self::private_with), with what the node stores in a folder that is made,
    /// on another disk for example.
    pub(crate) async fn private_on(settings: &str, folder: &Path) -> Self {
        let node = Node::new(false);
        node.set(settings);
        std::fs::create_dir(folder).expect("a folder");
        std::os::unix::fs::symlink(folder, node.home.path().join("data")).expect("a link");
        node.start().await;
        Self::on(node)
    }

    /// Like [`private`](Self::private), with the management plugin.
    pub(crate) async fn private_and_managed() -> Self {
        let node = Node::new(true);
        node.start().await;
        Self::on(node)
    }

    /// A name of its own on a node with the management plugin that other tests use too.
    pub(crate) async fn managed() -> Self {
        let mut shared = MANAGED.lock().await;
        let node = match shared.upgrade() {
            Some(node) => node,
            None => {
                let node = Arc::new(Node::new(true));
                node.start().await;
                *shared = Arc::downgrade(&node);
                node
            }
        };
        Self::at(node.url(), Some(node))
    }

    /// A name of its own on a node, which [`node`](Self::node) returns.
    pub(crate) fn on(node: Node) -> Self {
        Self::at(node.url(), Some(Arc::new(node)))
    }

    /// Another name of its own on the same private node.
    pub(crate) fn sibling(&self) -> Self {
        Self::at(self.url.clone(), self.node.clone())
    }

    fn at(url: String, node: Option<Arc<Node>>) -> Self {
        let name = format!("t-{}", unique());
        Self {
            url,
            prefix: name.clone(),
            exchange: name,
            subscribers: std::sync::Mutex::default(),
            node,
        }
    }

    /// The process of a private node.
    pub(crate) fn pid(&self) -> Option<u32> {
        self.node.as_ref()?.pid()
    }

    pub(crate) fn node(&self) -> &Node {
        self.node.as_deref().expect("a private node")
    }

    pub(crate) async fn connect(&self) -> Connection {
        connect(&self.url).await
    }

    pub(crate) async fn channel(&self) -> (Connection, Channel) {
        let connection = self.connect().await;
        let channel = connection.create_channel().await.expect("a channel");
        (connection, channel)
    }

    /// Publishes to the exchange as a producer does, and waits for the confirms.
    pub(crate) async fn publish<B: AsRef<[u8]>>(
        &self,
        event_type: &str,
        bodies: impl IntoIterator<Item = B>,
    ) {
        self.publish_to(&self.exchange, event_type, bodies).await;
    }

    pub(crate) async fn publish_to<B: AsRef<[u8]>>(
        &self,
        exchange: &str,
        routing_key: &str,
        bodies: impl IntoIterator<Item = B>,
    ) {
        self.publish_named(exchange, routing_key, bodies.into_iter().map(|body| (None, body)))
            .await;
    }

    /// Each with the id that it has.
    pub(crate) async fn publish_named<B: AsRef<[u8]>>(
        &self,
        exchange: &str,
        routing_key: &str,
        events: impl IntoIterator<Item = (Option<String>, B)>,
    ) {
        let (connection, channel) = self.channel().await;
        channel.confirm_select(ConfirmSelectOptions::default()).await.expect("confirms");
        let mut confirms = Vec::new();
        for (id, body) in events {
            let mut properties = BasicProperties::default()
                .with_delivery_mode(2)
                .with_content_type("application/json".into());
            if let Some(id) = id {
                properties = properties.with_message_id(id.into());
            }
            let sent = channel.basic_publish(
                exchange.into(),
                routing_key.into(),
                BasicPublishOptions::default(),
                body.as_ref(),
                properties,
            );
            confirms.push(sent.await.expect("publishes"));
            if confirms.len() == 2000 {
                for c in confirms.drain(..) {
                    assert_eq!(c.await.expect("confirmed"), Confirmation::Ack(None));
                }
            }
        }
        for c in confirms {
            assert_eq!(c.await.expect("confirmed"), Confirmation::Ack(None));
        }
        connection.close(200, "done".into()).await.expect("closes");
    }

    /// Publishes one message with properties of its own choice; a queue must take it.
    pub(crate) async fn put(
        &self,
        exchange: &str,
        routing_key: &str,
        body: &[u8],
        properties: BasicProperties,
    ) {
        let (connection, channel) = self.channel().await;
        channel.confirm_select(ConfirmSelectOptions::default()).await.expect("confirms");
        let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
        let sent = channel
            .basic_publish(
                exchange.into(),
                routing_key.into(),
                options,
                body,
                properties.with_delivery_mode(2),
            )
            .await;
        assert_eq!(sent.expect("publishes").await.expect("confirmed"), Confirmation::Ack(None));
        connection.close(200, "done".into()).await.expect("closes");
    }

    /// Messages ready in a queue of hooktrail's; `None` if it does not exist.
    pub(crate) async fn depth(&self, rest: &str) -> Option<u32> {
        let (connection, channel) = self.channel().await;
        let queue = format!("{}.{rest}", self.prefix);
        let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
        let found = loop {
            let asked = Instant::now();
            let found = channel
                .queue_declare(queue.as_str().into(), passive, FieldTable::default())
                .await
                .ok()
                .map(|q| q.message_count());
            // A queue that does not answer in 250 ms is counted as empty.
            if found != Some(0) || asked.elapsed() < Duration::from_millis(250) {
                break found;
            }
        };
        connection.close(200, "done".into()).await.ok();
        found
    }

    /// Waits until a queue of hooktrail's has this many messages.
    pub(crate) async fn wait_depth(&self, rest: &str, expected: u32) {
        eventually(&format!("{expected} messages in {rest}"), async || {
            self.depth(rest).await == Some(expected)
        })
        .await;
    }

    /// Empties a queue of hooktrail's; the bodies of its messages.
    pub(crate) async fn take_all(&self, rest: &str) -> Vec<Vec<u8>> {
        let (connection, channel) = self.channel().await;
        let queue = format!("{}.{rest}", self.prefix);
        let mut bodies = Vec::new();
        while let Some(m) = channel
            .basic_get(queue.as_str().into(), BasicGetOptions { no_ack: true })
            .await
            .expect("gets")
        {
            bodies.push(m.delivery.data);
        }
        connection.close(200, "done".into()).await.expect("closes");
        bodies
    }

    /// Takes one message out of a queue of hooktrail's.
    pub(crate) async fn take(&self, rest: &str) -> Option<lapin::message::Delivery> {
        let (connection, channel) = self.channel().await;
        let queue = format!("{}.{rest}", self.prefix);
        let got = channel
            .basic_get(queue.as_str().into(), BasicGetOptions { no_ack: true })
            .await
            .expect("gets");
        connection.close(200, "done".into()).await.expect("closes");
        got.map(|m| m.delivery)
    }

    /// The names to clean up after.
    pub(crate) fn knows(&self, subscriber: &str) {
        self.subscribers.lock().expect("not poisoned").push(subscriber.to_owned());
    }
}

/// Headers of a message by their names without the common beginning.
pub(crate) fn headers(pairs: &[(&str, AMQPValue)]) -> FieldTable {
    let mut table = FieldTable::default();
    for (name, value) in pairs {
        table.insert(format!("x-hooktrail-{name}").as_str().into(), value.clone());
    }
    table
}

pub(crate) fn text(value: &str) -> AMQPValue {
    AMQPValue::LongString(value.into())
}

pub(crate) async fn connect(url: &str) -> Connection {
    let connecting = Connection::connect(url, ConnectionProperties::default());
    let connected = tokio::time::timeout(super::PATIENCE, connecting)
        .await
        .unwrap_or_else(|_| panic!("the broker at {url} does not answer"));
    connected.unwrap_or_else(|e| panic!("the broker at {url} is not there: {e}"))
}

impl Drop for Broker {
    /// Leaves nothing behind in a broker that others use too.
    fn drop(&mut self) {
        if self.node.is_some() {
            return;
        }
        let (url, prefix, exchange) =
            (self.url.clone(), self.prefix.clone(), self.exchange.clone());
        let subscribers = std::mem::take(&mut *self.subscribers.lock().expect("not poisoned"));
        let clean = async move {
            let connection = connect(&url).await;
            let channel = connection.create_channel().await.expect("a channel");
            let own = subscribers.iter().flat_map(|s| {
                [format!("sub.{s}"), format!("sub.{s}.retry"), format!("sub.{s}.dead")]
            });
            let levels: Vec<String> = (0..19).map(|n| format!("delay.{n:02}")).collect();
            for queue in own
                .chain(levels.iter().cloned())
                .chain(["orphans", "state", "history", "intake"].map(str::to_owned))
            {
                channel
                    .queue_delete(
                        format!("{prefix}.{queue}").as_str().into(),
                        QueueDeleteOptions::default(),
                    )
                    .await
                    .expect("deletes");
            }
            for name in levels.iter().map(String::as_str).chain(["delay", "orphans", "events"]) {
                channel
                    .exchange_delete(
                        format!("{prefix}.{name}").as_str().into(),
                        ExchangeDeleteOptions::default(),
                    )
                    .await
                    .expect("deletes");
            }
            channel
                .exchange_delete(exchange.as_str().into(), ExchangeDeleteOptions::default())
                .await
                .expect("deletes");
            connection.close(200, "done".into()).await.expect("closes");
        };
        let done = std::thread::spawn(move || super::run(clean)).join();
        if done.is_err() && !std::thread::panicking() {
            panic!("the test's queues could not be deleted");
        }
    }
}

/// A RabbitMQ node of a test's own: ports, data and cookie are its own, epmd is at most its
/// cluster's.
pub(crate) struct Node {
    home: tempfile::TempDir,
    port: u16,
    dist_port: u16,
    epmd: Arc<Epmd>,
    management_port: Option<u16>,
    name: String,
    /// Whether its commands find it running, since it was started last.
    is_up: AtomicBool,
}

/// epmd, by which nodes find each other; it serves one cluster and ends with its last node.
struct Epmd {
    port: u16,
}

impl Node {
    fn new(managed: bool) -> Self {
        Self::member(
            managed,
            &format!("t{}@localhost", unique()),
            &unique(),
            Arc::new(Epmd { port: free_port() }),
            None,
        )
    }

    /// `first` is the node of the cluster that this one joins when it boots for the first time.
    fn member(
        managed: bool,
        name: &str,
        cookie: &str,
        epmd: Arc<Epmd>,
        first: Option<&str>,
    ) -> Self {
        assert_not_quick("broker");
        let home = tempfile::tempdir().expect("a directory");
        let write =
            |name: &str, text: &str| std::fs::write(home.path().join(name), text).expect("writes");
        let management_port = managed.then(free_port);
        let mut conf = "disk_free_limit.absolute = 50MB\nvm_memory_high_watermark.absolute = 2GB\nloopback_users = none\n".to_owned();
        if let Some(port) = management_port {
            conf += &format!("management.tcp.ip = 127.0.0.1\nmanagement.tcp.port = {port}\n");
        }
        if let Some(first) = first {
            conf += &format!(
                "cluster_formation.peer_discovery_backend = classic_config\ncluster_formation.classic_config.nodes.1 = {first}\n"
            );
        }
        write("plugins", if managed { "[rabbitmq_management].\n" } else { "[].\n" });
        write("rabbitmq.conf", &conf);
        write("env.conf", "");
        write(".erlang.cookie", cookie);
        // Erlang refuses a cookie that others may read.
        std::fs::set_permissions(home.path().join(".erlang.cookie"), Permissions::from_mode(0o400))
            .expect("permissions");
        let node = Self {
            port: free_port(),
            dist_port: free_port(),
            epmd,
            name: name.to_owned(),
            management_port,
            home,
            is_up: AtomicBool::new(false),
        };
        node.set("");
        node
    }

    /// Starts nodes in one cluster. Each can be killed and started again by itself; after a loss
    /// of all of them start them at once, since a node may wait for the one that was the last to
    /// die.
    pub(crate) async fn cluster(size: usize, settings: &str) -> Vec<Self> {
        Self::members(size, settings, false).await
    }

    /// Like [`cluster`](Self::cluster); the first has the management plugin.
    pub(crate) async fn managed_cluster(size: usize) -> Vec<Self> {
        Self::members(size, "", true).await
    }

    async fn members(size: usize, settings: &str, managed: bool) -> Vec<Self> {
        let (cookie, epmd) = (unique(), Arc::new(Epmd { port: free_port() }));
        let names: Vec<String> = (0..size).map(|_| format!("t{}@localhost", unique())).collect();
        let first = names.first().map(String::as_str);
        let member = |(n, name): (usize, &String)| {
            Self::member(managed && n == 0, name, &cookie, Arc::clone(&epmd), first)
        };
        let nodes: Vec<Self> = names.iter().enumerate().map(member).collect();
        for node in &nodes {
            node.set(settings);
            node.start().await;
        }
        // A node that cannot join says nothing and works alone.
        for node in &nodes {
            node.ctl(&["await_online_nodes", &size.to_string(), "--timeout", "60"]);
        }
        nodes
    }

    /// Settings of RabbitMQ's own, as Erlang terms; from the next start on.
    fn set(&self, settings: &str) {
        // A node that dies takes with it the confirm of a message that was on its way from one
        // queue to another, and RabbitMQ sends it again only after this time: by default 3 minutes,
        // as long as a test waits for anything.
        let soon = "{dead_letter_worker_publisher_confirm_timeout, 4000}";
        let all = if settings.is_empty() { soon.to_owned() } else { format!("{soon}, {settings}") };
        std::fs::write(
            self.home.path().join("advanced.config"),
            format!("[{{rabbit, [{all}]}}].\n"),
        )
        .expect("writes");
    }

    pub(crate) fn url(&self) -> String {
        format!("amqp://guest:guest@127.0.0.1:{}/%2f", self.port)
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// The URL of the management plugin.
    pub(crate) fn management_url(&self) -> String {
        format!(
            "http://127.0.0.1:{}",
            self.management_port.expect("a node with the management plugin")
        )
    }

    fn command(&self, program: &str) -> Command {
        let at = |name: &str| self.home.path().join(name);
        let mut c = installed(self.home.path(), &sbin().join(program));
        c.env("HOME", self.home.path())
            .env("RABBITMQ_NODENAME", &self.name)
            .env("RABBITMQ_NODE_PORT", self.port.to_string())
            .env("RABBITMQ_NODE_IP_ADDRESS", "127.0.0.1")
            .env("RABBITMQ_DIST_PORT", self.dist_port.to_string())
            .env("ERL_EPMD_PORT", self.epmd.port.to_string())
            .env("ERL_EPMD_ADDRESS", "127.0.0.1")
            .env("RABBITMQ_MNESIA_BASE", at("data"))
            .env("RABBITMQ_LOG_BASE", at("log"))
            .env("ERL_CRASH_DUMP", at("erl_crash.dump"))
            .env("RABBITMQ_PID_FILE", at("pid"))
            .env("RABBITMQ_ENABLED_PLUGINS_FILE", at("plugins"))
            .env("RABBITMQ_CONFIG_FILE", at("rabbitmq.conf"))
            .env("RABBITMQ_ADVANCED_CONFIG_FILE", at("advanced.config"))
            .env("RABBITMQ_CONF_ENV_FILE", at("env.conf"))
            .env("RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS", "+sbwt none +sbwtdcpu none +sbwtdio none")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        c
    }

    /// The first number of its version.
    pub(crate) fn generation(&self) -> u32 {
        let version = self.ctl(&["version"]);
        version
            .split('.')
            .next()
            .and_then(|n| n.trim().parse().ok())
            .unwrap_or_else(|| panic!("no version: {version}"))
    }

    /// Boots the node and waits until it speaks AMQP.
    pub(crate) async fn start(&self) {
        std::fs::remove_file(self.home.path().join("pid")).ok();
        self.is_up.store(false, Ordering::Relaxed);
        let started = self
            .command("rabbitmq-server")
            .arg("-detached")
            .status()
            .expect("rabbitmq-server starts");
        assert!(started.success(), "rabbitmq-server -detached: {started}");
        let url = self.url();
        eventually("the private broker answers", async || {
            // A node that is still booting can accept a connection and say nothing; lapin would
            // wait indefinitely.
            let connecting = Connection::connect(&url, ConnectionProperties::default());
            let connected = tokio::time::timeout(Duration::from_secs(3), connecting).await;
            matches!(connected, Ok(Ok(_))) && self.pid().is_some()
        })
        .await;
    }

    fn pid(&self) -> Option<u32> {
        std::fs::read_to_string(self.home.path().join("pid")).ok()?.trim().parse().ok()
    }

    /// Ends it as a power cut would.
    pub(crate) async fn kill(&self) {
        let pid = self.pid().expect("a pid file");
        kill("-9", pid);
        eventually("the broker is dead", async || !Path::new(&format!("/proc/{pid}")).exists())
            .await;
    }

    pub(crate) async fn restart_after_kill(&self) {
        self.kill().await;
        self.start().await;
    }

    pub(crate) fn ctl(&self, arguments: &[&str]) -> String {
        // A node takes connections a moment before its commands find it running.
        if !self.is_up.swap(true, Ordering::Relaxed) {
            self.ctl(&["await_startup"]);
        }
        let output = self
            .command("rabbitmqctl")
            .args(arguments)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .output()
            .expect("rabbitmqctl runs");
        assert!(
            output.status.success(),
            "rabbitmqctl {arguments:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8_lossy(&output.stdout).into_owned()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(pid) = self.pid() {
            kill("-9", pid);
        }
    }
}

impl Drop for Epmd {
    /// It obeys only after it has noticed that its nodes are gone.
    fn drop(&mut self) {
        let port = self.port.to_string();
        for _ in 0..100 {
            let mut epmd = installed(&std::env::temp_dir(), Path::new("epmd"));
            let reported =
                epmd.env("ERL_EPMD_PORT", &port).args(["-port", &port, "-kill"]).output();
            match reported {
                Ok(reported)
                    if String::from_utf8_lossy(&reported.stdout).contains("living nodes") =>
                {
                    std::thread::sleep(Duration::from_millis(20))
                }
                _ => break,
            }
        }
    }
}

pub(crate) fn kill(signal: &str, pid: u32) {
    Command::new("kill")
        .args([signal, &pid.to_string()])
        .stderr(Stdio::null())
        .status()
        .expect("kill runs");
}

/// The folder that has another RabbitMQ than this system's, and all that it needs; see
/// `scripts/broker --help`.
fn root() -> Option<PathBuf> {
    std::env::var_os("HOOKTRAIL_TEST_RABBITMQ_ROOT").filter(|r| !r.is_empty()).map(PathBuf::from)
}

/// A program that was installed with RabbitMQ; it sees the folder `needs` whatever its root is.
fn installed(needs: &Path, program: &Path) -> Command {
    let Some(root) = root() else {
        return Command::new(program);
    };
    let mut c = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/broker"));
    c.arg("in").args([root.as_path(), needs, program]);
    c
}

/// The folder of RabbitMQ's own programs, below the root that they run in.
fn sbin() -> PathBuf {
    let root = root().unwrap_or_else(|| PathBuf::from("/"));
    let base = root.join("usr/lib/rabbitmq/lib");
    let found = std::fs::read_dir(&base)
        .into_iter()
        .flatten()
        .flatten()
        .map(|e| e.path().join("sbin"))
        .find(|p| p.join("rabbitmq-server").exists());
    let found = found.unwrap_or_else(|| {
        panic!(
            "rabbitmq-server is not installed below {}: run `scripts/test`, which installs it",
            base.display()
        )
    });
    Path::new("/").join(found.strip_prefix(&root).expect("below"))
}

/// A queue that was declared less than this ago may not survive a kill -9 of its broker.
pub(crate) const SETTLING: Duration = Duration::from_millis(2500);

//! The configuration file: raw TOML in, checked policies out, all mistakes at once.

pub mod changes;
mod include;
pub mod keys;
mod reader;

use std::{
    collections::HashMap,
    fmt,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use http::{HeaderName, HeaderValue};
use url::Url;

use keys::Key;
pub use reader::Problem;
pub(crate) use reader::nearness;
use reader::{Layer, Layers, Reader, Section, Source, Value};

use crate::{
    crypto::{
        secret::{Secret, SecretUrl},
        signature::{Encoding, Scheme, Signer, standard_key},
        tls::{self, BadIdentity, Identity, TlsPolicy},
    },
    delivery::SubscriberName,
    event::{Pattern, payload::Format},
    policy::{
        address::AddressPolicy,
        answer::Success,
        batching::BatchPolicy,
        circuit_breaker::BreakerPolicy,
        retry::{Exhausted, MAX_DELAY, RetryOptions, RetryPolicy},
    },
    wording::{counted, span},
};

/// The commented default configuration, every key in it.
pub const DEFAULT: &str = include_str!("../config/hooktrail.toml");

/// Where the configuration is looked for when neither `--config` nor `$HOOKTRAIL_CONFIG` names a
/// file.
pub const DEFAULT_PATH: &str = "config/hooktrail.toml";

/// `preset = "mailtrap"`: what the hosted service does, between a subscriber's own keys and the
/// top-level groups.
const MAILTRAP: &str = r#"
signatures = ["mailtrap"]
batch = { max_events = 500, max_wait = "30s" }
http = { success = "200", timeout = "30s" }
circuit_breaker = { failures = 0 }
[retry]
max_attempts = 41
initial_interval = "5m"
multiplier = 1
randomization_factor = 0
max_interval = "5m"
max_elapsed_time = "0s"
on_exhausted = "pause"
"#;

/// The longest `[http] timeout`: a slot works through at most two prefetched batches, one after the
/// other, and the broker closes the channel of a consumer that holds a message for 30 minutes.
const MAX_TIMEOUT: Duration = Duration::from_secs(5 * 60);
const MAX_WAIT: Duration = Duration::from_secs(2 * 60);
const MAX_CONCURRENCY: i64 = 100;
const MAX_ATTEMPTS: i64 = 1_000_000;
const MAX_FAILURES: i64 = 1_000_000;
const MAX_SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(3600);
const MAX_OPEN_FOR: Duration = Duration::from_secs(24 * 3600);

/// Headers of a request that only hooktrail sets.
const RESERVED_HEADERS: &[&str] = &[
    "content-type",
    "content-length",
    "content-encoding",
    "transfer-encoding",
    "host",
    "connection",
    "keep-alive",
    "proxy-authorization",
    "proxy-connection",
    "user-agent",
    "te",
    "trailer",
    "upgrade",
    "expect",
    "webhook-id",
    "webhook-timestamp",
    "webhook-signature",
    "mailtrap-signature",
    "x-hooktrail-attempt",
    "x-hooktrail-replay",
];

/// Those that are configured, in the order of the file.
pub type Subscribers = Arc<[Arc<Subscriber>]>;

/// A checked configuration.
#[derive(Debug, Clone)]
pub struct Config {
    pub path: PathBuf,
    /// All that was read for it: the file, its includes and the folders they are looked for in,
    /// secrets, certificates.
    pub files: Vec<PathBuf>,
    /// Those of the folders in which a pattern of `include` has found a file.
    pub folders: Vec<PathBuf>,
    /// For requests in flight when the daemon is told to stop.
    pub shutdown_timeout: Duration,
    pub queue: QueueConfig,
    pub admin: AdminConfig,
    pub log: LogConfig,
    /// In the order of the file.
    pub subscribers: Subscribers,
}

/// From `[queue]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QueueConfig {
    pub backend: Backend,
    /// Whatever the backend: events may be left there from before a change.
    pub embedded: EmbeddedConfig,
}

/// Which queue `[queue] url` names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Backend {
    Embedded,
    Amqp(AmqpConfig),
}

/// Of `[queue]` what the embedded queue needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EmbeddedConfig {
    pub data_dir: PathBuf,
    /// Of events that every subscriber is done with.
    pub retention: Duration,
}

/// Of `[queue]` what RabbitMQ needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AmqpConfig {
    pub url: SecretUrl,
    pub intake: Intake,
    pub prefix: String,
    /// Of the management plugin's HTTP API, for a look at what AMQP does not show.
    pub management_url: Option<Box<SecretUrl>>,
}

/// Where events come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Intake {
    /// Producers publish to this topic exchange.
    Exchange(String),
    /// An existing queue that a relay takes events from.
    SourceQueue(String),
}

/// From `[admin]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdminConfig {
    pub listen: SocketAddr,
    /// Of whoever uses `/api`; never `None` where others than this machine's can connect.
    pub token: Option<Secret>,
}

/// From `[log]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogConfig {
    pub json: bool,
    pub level: tracing::Level,
}

/// From `[http]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HttpPolicy {
    /// From when a request is on a connection until its answer's status; see
    /// [`Subscriber::longest_attempt`].
    pub timeout: Duration,
    pub connect_timeout: Duration,
    /// Requests in flight to the subscriber.
    pub concurrency: usize,
    pub success: Success,
    pub allow_http: bool,
    pub addresses: AddressPolicy,
    /// Then it decides about the addresses of names.
    pub proxy: Option<SecretUrl>,
}

impl Subscriber {
    /// The longest that an attempt takes. Over HTTP/2, where the receiver allows fewer requests at
    /// once, one may wait for a place on the connection as long as those before it take; its own
    /// time begins then. Over HTTP/1.1 it waits only for a connection.
    pub fn longest_attempt(&self) -> Duration {
        let HttpPolicy { timeout, connect_timeout, proxy, .. } = &self.http;
        // HTTP/2 is agreed on within TLS.
        let over_http_1 = self.url.expose().scheme() == "http" && proxy.is_none();
        let wait = if over_http_1 { *connect_timeout.min(timeout) } else { *timeout };
        wait + *timeout + HttpPolicy::MARGIN
    }
}

impl HttpPolicy {
    /// What an attempt may take beyond its times: that its own limits come first, and that the text
    /// of an answer is read.
    pub const MARGIN: Duration = Duration::from_secs(2);
}

/// How a request says whom it is from, from `auth`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Auth {
    /// RFC 7617.
    Basic { username: String, password: Secret },
    /// RFC 6750.
    Bearer(Secret),
}

impl Auth {
    /// The value of the header `authorization`.
    pub fn header(&self) -> Secret {
        match self {
            Self::Basic { username, password } => Secret::new(format!(
                "Basic {}",
                BASE64.encode(format!("{username}:{}", password.expose()))
            )),
            Self::Bearer(token) => Secret::new(format!("Bearer {}", token.expose())),
        }
    }
}

/// One `[[subscriber]]` with its groups' defaults filled in.
#[derive(Debug, Clone)]
pub struct Subscriber {
    pub name: SubscriberName,
    pub url: SecretUrl,
    pub events: Vec<Pattern>,
    pub format: Format,
    pub secrets: Vec<Secret>,
    pub signer: Signer,
    /// What the configuration adds to each request; the values may be secrets.
    pub headers: Vec<(HeaderName, Secret)>,
    pub auth: Option<Auth>,
    pub tls: TlsPolicy,
    pub batch: BatchPolicy,
    pub http: HttpPolicy,
    pub retry: RetryPolicy,
    pub circuit_breaker: BreakerPolicy,
    /// Events that have no field `event_id` get one: the producer's message id.
    pub event_ids: bool,
    /// Whatever the queue's record says.
    pub paused: bool,
}

/// Everything that is wrong with a configuration.
#[derive(Debug)]
pub struct ConfigError {
    pub problems: Vec<Problem>,
    /// As far as they were read; see [`Config::files`].
    pub files: Vec<PathBuf>,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for p in &self.problems {
            writeln!(f, "{p}")?;
        }
        write!(
            f,
            "{} in the configuration; nothing was started",
            counted(self.problems.len(), "problem(s)")
        )
    }
}

impl std::error::Error for ConfigError {}

/// Reads and checks the configuration at `path`, its includes, and the secret files they name.
///
/// # Errors
/// All that is wrong, each with file, line, column, key and what would be right.
pub fn load(path: &Path) -> Result<Config, ConfigError> {
    load_with(path, &|name| std::env::var(name).ok())
}

/// As [`load`], for a daemon that runs: its subscribers came from these
/// [`folders`](Config::folders).
///
/// # Errors
/// As [`load`]; and one of the folders is not there, which at a first start would be nothing to
/// complain of.
pub fn load_again(path: &Path, folders: &[PathBuf]) -> Result<Config, ConfigError> {
    let env = |name: &str| std::env::var(name).ok();
    checked(&read(path)?, Reader::after(&env, folders))
}

/// As [`load`], with the environment given.
///
/// # Errors
/// As [`load`].
pub fn load_with(path: &Path, env: &dyn Fn(&str) -> Option<String>) -> Result<Config, ConfigError> {
    checked(&read(path)?, Reader::new(env))
}

fn read(path: &Path) -> Result<Source, ConfigError> {
    let text = std::fs::read_to_string(path).map_err(|e| {
        let message = format!("cannot be read: {e}; {}", way_out(e.kind()));
        let problem = Problem { file: path.to_owned(), place: None, key: String::new(), message };
        ConfigError { problems: vec![problem], files: vec![path.to_owned()] }
    })?;
    Ok(Source { path: path.to_owned(), text })
}

/// A configuration `text` whose only other files are `files`: what it names cannot be on the disk.
///
/// # Errors
/// As [`load`].
#[cfg(any(test, fuzzing))]
pub(crate) fn from_text(
    text: &str,
    env: &dyn Fn(&str) -> Option<String>,
    files: &[(&str, &str)],
) -> Result<Config, ConfigError> {
    checked(
        &Source { path: PathBuf::from("hooktrail.toml"), text: text.to_owned() },
        Reader::without_disk(env, files),
    )
}

fn checked(source: &Source, reader: Reader<'_>) -> Result<Config, ConfigError> {
    reader.depends_on(&source.path);
    let config = Loader { reader: &reader }.config(source);
    let folders = reader.used();
    let (problems, files) = reader.finish();
    match config {
        Some(config) if problems.is_empty() => Ok(Config { files, folders, ..config }),
        _ => Err(ConfigError { problems, files }),
    }
}

/// What `[admin]` says, in a configuration that has mistakes elsewhere: the daemon that runs, with
/// the one before, is reached there all the same.
pub fn admin_of(path: &Path) -> Option<AdminConfig> {
    let env = |name: &str| std::env::var(name).ok();
    let reader = Reader::new(&env);
    let source = Source { path: path.to_owned(), text: std::fs::read_to_string(path).ok()? };
    let document = reader.parse(&source);
    let whole = reader.is_clean();
    let root = reader.root(&source, &document, keys::ROOT);
    // Where a part cannot be read, what is not found may stand there.
    if !whole && root.get("admin").is_none() {
        return None;
    }
    Loader { reader: &reader }.admin(&root)
}

/// What `[log]` says, in a configuration that has mistakes elsewhere; the defaults where that is
/// wrong too.
pub fn log_of(path: &Path) -> LogConfig {
    let default = LogConfig { json: false, level: tracing::Level::INFO };
    let env = |name: &str| std::env::var(name).ok();
    let reader = Reader::new(&env);
    let Ok(source) = read(path) else { return default };
    let document = reader.parse(&source);
    Loader { reader: &reader }.log(&reader.root(&source, &document, keys::ROOT)).unwrap_or(default)
}

/// The subscribers' names, as far as they can be read: a secret that is not there, as every other
/// mistake, does not matter.
pub fn names_of(path: &Path) -> Vec<SubscriberName> {
    let env = |name: &str| std::env::var(name).ok();
    let reader = Reader::new(&env);
    let names =
        read(path).map(|source| Loader { reader: &reader }.all_names(&source)).unwrap_or_default();
    names.into_iter().map(|(name, _)| name).collect()
}

/// The file that has the table of a subscriber: that at `path`, or one that it includes.
pub fn file_of(path: &Path, subscriber: &str) -> Option<PathBuf> {
    let env = |name: &str| std::env::var(name).ok();
    let reader = Reader::new(&env);
    let names = Loader { reader: &reader }.all_names(&read(path).ok()?);
    names.into_iter().find(|(name, _)| *name == subscriber).map(|(_, file)| file)
}

/// Whether a text is a variable as shells write it.
fn is_variable(text: &str) -> bool {
    let name = text.strip_prefix('$').unwrap_or_default();
    !name.is_empty()
        && name.bytes().all(|b| b.is_ascii_uppercase() || b.is_ascii_digit() || b == b'_')
}

/// What to do about a configuration that cannot be read.
fn way_out(why: std::io::ErrorKind) -> &'static str {
    match why {
        std::io::ErrorKind::PermissionDenied => {
            "run this as a user who may, such as the service's (sudo -u hooktrail …)"
        }
        _ => {
            "name a configuration with --config FILE or $HOOKTRAIL_CONFIG, or write one with `hooktrail init`"
        }
    }
}

/// Turns sections into policies. A method returns `None` only after it has reported why.
struct Loader<'r, 'e> {
    reader: &'r Reader<'e>,
}

/// The top-level groups that apply to every subscriber.
struct Defaults<'d> {
    batch: Option<Section<'d>>,
    http: Option<Section<'d>>,
    retry: Option<Section<'d>>,
    circuit_breaker: Option<Section<'d>>,
    /// The one preset there is.
    mailtrap: Section<'d>,
}

impl Loader<'_, '_> {
    fn config(&self, source: &Source) -> Option<Config> {
        let r = self.reader;
        let document = r.parse(source);
        let root = r.root(source, &document, keys::ROOT);
        let shutdown_timeout =
            self.duration(root.get("shutdown_timeout"), 35, Some(MAX_SHUTDOWN_TIMEOUT));
        let queue = self.queue(&root);
        let admin = self.admin(&root);
        let log = self.log(&root);
        let group = |key, keys| root.get(key).and_then(|v| r.section(&v, keys));
        let preset =
            Source { path: PathBuf::from("preset \"mailtrap\""), text: MAILTRAP.to_owned() };
        let preset_document = r.parse(&preset);
        let defaults = Defaults {
            mailtrap: r.root(&preset, &preset_document, keys::SUBSCRIBER),
            batch: group("batch", keys::BATCH),
            http: group("http", keys::HTTP),
            retry: group("retry", keys::RETRY),
            circuit_breaker: group("circuit_breaker", keys::BREAKER),
        };
        // A mistake in a default is one even if no subscriber uses it.
        self.batch(&Layers { own: None, preset: None, base: defaults.batch.clone() });
        self.http(&Layers { own: None, preset: None, base: defaults.http.clone() });
        self.retry(&Layers { own: None, preset: None, base: defaults.retry.clone() });
        self.breaker(&Layers { own: None, preset: None, base: defaults.circuit_breaker.clone() });

        let mut names = HashMap::new();
        let mut subscribers = self.subscribers(&root, &defaults, &mut names);
        for file in self.included(&root) {
            let text = match r.read_to_string(&file) {
                Ok(text) => text,
                Err(e) => {
                    r.report_file(
                        &file,
                        format!(
                            "cannot be read: {e}; it is named by `include` in {}",
                            source.path.display()
                        ),
                    );
                    continue;
                }
            };
            let included = Source { path: file, text };
            let document = r.parse(&included);
            let root = r.root(&included, &document, keys::INCLUDED);
            subscribers.extend(self.subscribers(&root, &defaults, &mut names));
        }
        Some(Config {
            path: source.path.clone(),
            files: Vec::new(),
            folders: Vec::new(),
            shutdown_timeout: shutdown_timeout?,
            queue: queue?,
            admin: admin?,
            log: log?,
            subscribers: subscribers.into(),
        })
    }

    /// Each with the file that has its table.
    fn all_names(&self, source: &Source) -> Vec<(SubscriberName, PathBuf)> {
        let r = self.reader;
        let document = r.parse(source);
        let root = r.root(source, &document, keys::ROOT);
        let (mut found, mut known) = (Vec::new(), HashMap::new());
        let mut names_in = |root: &Section<'_>| {
            let tables =
                root.get("subscriber").and_then(|value| r.array(&value)).unwrap_or_default();
            let sections =
                tables.iter().filter_map(|table| r.section(&r.named(table), keys::SUBSCRIBER));
            let names = sections.filter_map(|section| self.name(&section, &mut known));
            found.extend(names.map(|name| (name, root.source.path.clone())));
        };
        names_in(&root);
        for path in self.included(&root) {
            if let Ok(text) = r.read_to_string(&path) {
                let included = Source { path, text };
                let document = r.parse(&included);
                names_in(&r.root(&included, &document, keys::INCLUDED));
            }
        }
        found
    }

    /// The files that `include` names, each once, in order.
    fn included(&self, root: &Section<'_>) -> Vec<PathBuf> {
        let r = self.reader;
        let Some(value) = root.get("include") else { return Vec::new() };
        let mut files = Vec::new();
        for item in r.array(&value).unwrap_or_default() {
            let Some(pattern) = r.string(&item) else { continue };
            if include::is_wild(&pattern) {
                files.extend(self.matching(&item, &pattern, root.source.folder()));
            } else {
                // That it is not there is a mistake, reported when it is read. A file that comes or
                // goes is a change of its folder.
                let path = root.source.relative(&pattern);
                path.parent().into_iter().for_each(|folder| r.depends_on(folder));
                files.push(path);
            }
        }
        let mut seen = std::collections::HashSet::new();
        files.retain(|f| seen.insert(f.clone()));
        files
    }

    /// What a pattern of `include` matches. That it matches nothing is fine, unless a folder is
    /// away that the configuration in use came from: all of its subscribers would be removed.
    fn matching(&self, item: &Value<'_>, pattern: &str, base: &Path) -> Vec<PathBuf> {
        let r = self.reader;
        if !r.has_disk() {
            return Vec::new();
        }
        let found = match include::find(base, pattern) {
            Ok(found) => found,
            Err(e) => {
                r.report(item, format!("is not a glob pattern: {e}"));
                return Vec::new();
            }
        };
        found.folders.iter().for_each(|folder| r.depends_on(folder));
        let remedy = "put it right, or take the pattern out of `include`";
        for (path, why) in &found.errors {
            r.report(item, format!("cannot look into {}: {why}; {remedy}", path.display()));
        }
        if found.prefix_is_absent && r.is_in_use(&found.prefix) {
            r.report(
                item,
                format!(
                    "the folder {} is not there, and subscribers in use come from it; {remedy}",
                    found.prefix.display()
                ),
            );
        }
        if !found.files.is_empty() {
            r.uses(&found.prefix);
        }
        found.files
    }

    fn queue(&self, root: &Section<'_>) -> Option<QueueConfig> {
        let r = self.reader;
        let missing = "is required: \"embedded\", or the URL of a RabbitMQ, such as \"amqp://user:password@127.0.0.1:5672/%2f\"";
        let Some(section) = root.get("queue") else {
            r.report_missing(root, "queue.url", missing);
            return None;
        };
        let section = r.section(&section, keys::QUEUE)?;
        let url = match section.get("url") {
            None => {
                r.report_missing(&section, "url", missing);
                None
            }
            Some(v) => r.string(&v).and_then(|text| match text.parse::<Url>() {
                Ok(url) if matches!(url.scheme(), "amqp" | "amqps") && url.host_str().is_some_and(|h| !h.is_empty()) => {
                    Some(Some(SecretUrl::new(url)))
                }
                _ if text == "embedded" => Some(None),
                // The text is not quoted: it may hold a password.
                _ if text.is_empty() => {
                    r.report(&v, "is empty; give \"embedded\", or the URL of a RabbitMQ, amqp://… or amqps://…");
                    None
                }
                // So near to the word that it can hold no password.
                _ if nearness(&text, "embedded").is_some() => {
                    r.report(&v, "is neither \"embedded\" nor an amqp:// or amqps:// URL with a host; did you mean \"embedded\"?");
                    None
                }
                _ => {
                    r.report(&v, "is neither \"embedded\" nor an amqp:// or amqps:// URL with a host");
                    None
                }
            }),
        };
        let exchange = section.get("exchange");
        let source_queue = section.get("source_queue");
        let name = |v: &Value<'_>| {
            let name = r.string(v)?;
            if name.is_empty() || name.len() > 255 {
                r.report(v, "must have 1 to 255 bytes");
                return None;
            }
            Some(name)
        };
        let intake = match (exchange, source_queue) {
            (Some(_), Some(v)) => {
                r.report(&v, "cannot stand beside `exchange`; remove one of the two");
                None
            }
            (None, Some(v)) => name(&v).map(Intake::SourceQueue),
            (Some(v), None) => name(&v).map(Intake::Exchange),
            (None, None) => Some(Intake::Exchange("audit".to_owned())),
        };
        let prefix = match section.get("prefix") {
            None => Some("hooktrail".to_owned()),
            Some(v) => r.string(&v).and_then(|p| {
                let ok = (1..=64).contains(&p.len())
                    && p.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
                if !ok {
                    r.report(&v, "must be 1 to 64 letters, digits, `-`, `_` or `.`");
                }
                ok.then_some(p)
            }),
        };
        let data_dir = match section.get("data_dir") {
            None => Some(root.source.relative("data")),
            Some(v) => r.string(&v).and_then(|dir| {
                if dir.is_empty() {
                    r.report(&v, "is empty; name a directory for the embedded queue");
                }
                (!dir.is_empty()).then(|| section.source.relative(&dir))
            }),
        };
        let retention = match section.get("retention") {
            None => Some(Duration::from_secs(7 * 24 * 3600)),
            Some(v) => r.duration(&v, None),
        };
        let embedded = EmbeddedConfig { data_dir: data_dir?, retention: retention? };
        let management_url = match section.get("management_url") {
            None => Some(None),
            Some(v) => self.management_url(&v).map(|url| Some(Box::new(url))),
        };
        let (intake, prefix, management_url) = (intake?, prefix?, management_url?);
        let backend = url?.map_or(Backend::Embedded, |url| {
            Backend::Amqp(AmqpConfig { url, intake, prefix, management_url })
        });
        Some(QueueConfig { backend, embedded })
    }

    fn management_url(&self, value: &Value<'_>) -> Option<SecretUrl> {
        let url = self.reader.string(value)?.parse::<Url>().ok();
        let found = url.filter(|url| {
            let has_host = url.host_str().is_some_and(|h| !h.is_empty());
            matches!(url.scheme(), "http" | "https")
                && has_host
                && url.query().is_none()
                && url.fragment().is_none()
        });
        if found.is_none() {
            // The text is not quoted: it may hold a password.
            self.reader.report(value, "is not the URL of a RabbitMQ's management plugin; write one such as \"http://127.0.0.1:15672\"");
        }
        found.map(SecretUrl::new)
    }

    fn admin(&self, root: &Section<'_>) -> Option<AdminConfig> {
        let r = self.reader;
        let section = match root.get("admin") {
            Some(v) => Some(r.section(&v, keys::ADMIN)?),
            None => None,
        };
        let get = |key| section.as_ref().and_then(|s| s.get(key));
        let listen = match get("listen") {
            None => Some(SocketAddr::from((Ipv4Addr::LOCALHOST, 8787))),
            Some(v) => r.string(&v).and_then(|text| {
                let found = text.parse().ok();
                if found.is_none() {
                    r.report(&v, format!("`{text}` is not an address; write an IP address and a port such as \"127.0.0.1:8787\" or \"[::1]:8787\"; port 0 takes a free one"));
                }
                found
            }),
        };
        let token = match get("token") {
            None => Some(None),
            Some(v) => r.string(&v).and_then(|text| {
                // It is not quoted: it is a secret, also when it is a bad one.
                let ok = !text.is_empty() && text.bytes().all(|b| b.is_ascii_graphic());
                if !ok {
                    r.report(&v, "must be one or more visible ASCII characters without spaces, which is what a header can carry; leave the key out for no token");
                }
                ok.then(|| Some(Secret::new(text)))
            }),
        };
        let (listen, token) = (listen?, token?);
        if let (None, Some(v)) =
            (&token, get("listen").filter(|_| !listen.ip().to_canonical().is_loopback()))
        {
            r.report(&v, format!("{listen} is not a loopback address, so others could publish events; set `token`, such as \"${{HOOKTRAIL_ADMIN_TOKEN}}\", or listen on \"127.0.0.1:8787\""));
            return None;
        }
        Some(AdminConfig { listen, token })
    }

    fn log(&self, root: &Section<'_>) -> Option<LogConfig> {
        let r = self.reader;
        let section = match root.get("log") {
            Some(v) => Some(r.section(&v, keys::LOG)?),
            None => None,
        };
        let get = |key| section.as_ref().and_then(|s| s.get(key));
        let json = self.one_of(get("format"), &[("text", false), ("json", true)]);
        let level = self.one_of(
            get("level"),
            &[
                ("info", tracing::Level::INFO),
                ("error", tracing::Level::ERROR),
                ("warn", tracing::Level::WARN),
                ("debug", tracing::Level::DEBUG),
                ("trace", tracing::Level::TRACE),
            ],
        );
        Some(LogConfig { json: json?, level: level? })
    }

    /// One of a few words; the first is the default.
    fn one_of<T: Copy>(&self, value: Option<Value<'_>>, words: &[(&str, T)]) -> Option<T> {
        let Some(value) = value else { return Some(words[0].1) };
        let text = self.reader.string(&value)?;
        let found = words.iter().find(|(word, _)| *word == text).map(|(_, v)| *v);
        if found.is_none() {
            let all: Vec<String> = words.iter().map(|(w, _)| format!("\"{w}\"")).collect();
            self.reader.report(&value, format!("must be {}", all.join(" or ")));
        }
        found
    }

    fn duration(
        &self,
        value: Option<Value<'_>>,
        default_seconds: u64,
        max: Option<Duration>,
    ) -> Option<Duration> {
        match value {
            None => Some(Duration::from_secs(default_seconds)),
            Some(v) => self.reader.duration(&v, max),
        }
    }

    /// As [`duration`](Self::duration), and longer than zero.
    fn positive_duration(
        &self,
        value: Option<Value<'_>>,
        default_seconds: u64,
        max: Duration,
    ) -> Option<Duration> {
        let found = self.duration(value.clone(), default_seconds, Some(max))?;
        if found.is_zero() {
            self.reader.report(value.as_ref()?, "must be longer than 0");
            return None;
        }
        Some(found)
    }

    fn integer(
        &self,
        value: Option<Value<'_>>,
        default: i64,
        range: std::ops::RangeInclusive<i64>,
    ) -> Option<i64> {
        match value {
            None => Some(default),
            Some(v) => self.reader.integer(&v, range),
        }
    }

    fn bool(&self, value: Option<Value<'_>>) -> Option<bool> {
        value.map_or(Some(false), |v| self.reader.bool(&v))
    }

    fn batch(&self, group: &Layers<'_>) -> Option<BatchPolicy> {
        let max_events = self.integer(group.get("max_events"), 500, 1..=BatchPolicy::MAX_EVENTS);
        let max_bytes = match group.get("max_bytes") {
            None => Some(1024 * 1024),
            Some(v) => self.reader.size(&v, BatchPolicy::MIN_BYTES..=BatchPolicy::MAX_BYTES),
        };
        let max_wait = self.duration(group.get("max_wait"), 1, Some(MAX_WAIT));
        Some(BatchPolicy {
            max_events: usize::try_from(max_events?).ok()?,
            max_bytes: usize::try_from(max_bytes?).ok()?,
            max_wait: max_wait?,
        })
    }

    fn http(&self, group: &Layers<'_>) -> Option<HttpPolicy> {
        let timeout = self.positive_duration(group.get("timeout"), 30, MAX_TIMEOUT);
        let connect_timeout = self.positive_duration(group.get("connect_timeout"), 5, MAX_TIMEOUT);
        let concurrency = self.integer(group.get("concurrency"), 1, 1..=MAX_CONCURRENCY);
        let success = self
            .one_of(group.get("success"), &[("2xx", Success::Any2xx), ("200", Success::Only200)]);
        let allow_http = self.bool(group.get("allow_http"));
        let addresses = self.addresses(group);
        let proxy = self.proxy(group);
        Some(HttpPolicy {
            timeout: timeout?,
            connect_timeout: connect_timeout?,
            concurrency: usize::try_from(concurrency?).ok()?,
            success: success?,
            allow_http: allow_http?,
            addresses: addresses?,
            proxy: proxy?,
        })
    }

    /// An empty one takes back that of the top level.
    fn proxy(&self, http: &Layers<'_>) -> Option<Option<SecretUrl>> {
        let Some(value) = http.get("proxy") else { return Some(None) };
        let text = self.reader.string(&value)?;
        if text.is_empty() {
            return Some(None);
        }
        // The URL is not quoted: it may hold a password.
        let url = text
            .parse::<Url>()
            .ok()
            .filter(|url| matches!(url.scheme(), "http" | "https") && url.host().is_some());
        if url.is_none() {
            self.reader.report(&value, "is not the URL of a proxy; write one such as \"http://proxy.internal:3128\", or \"\" for none");
        }
        url.map(|url| Some(SecretUrl::new(url)))
    }

    fn addresses(&self, http: &Layers<'_>) -> Option<AddressPolicy> {
        let allow_private = self.bool(http.get("allow_private_addresses"));
        let network = |item: &Value<'_>| {
            let text = self.reader.string(item)?;
            let net = text
                .parse()
                .ok()
                .or_else(|| text.parse::<std::net::IpAddr>().ok().map(ipnet::IpNet::from));
            if net.is_none() {
                self.reader.report(item, format!("`{text}` is not a network; write one such as \"10.1.0.0/16\" or \"fd00::/8\""));
            }
            net
        };
        let items = match http.get("allow_addresses") {
            None => Vec::new(),
            Some(v) => self.reader.array(&v)?,
        };
        let allow: Vec<_> = items.iter().filter_map(network).collect();
        let all = allow.len() == items.len();
        Some(AddressPolicy { allow_private: allow_private?, allow: all.then_some(allow)? })
    }

    fn retry(&self, group: &Layers<'_>) -> Option<RetryPolicy> {
        let d = RetryOptions::default();
        let float = |key, default| group.get(key).map_or(Some(default), |v| self.reader.float(&v));
        let initial_interval = self.duration(
            group.get("initial_interval"),
            d.initial_interval.as_secs(),
            Some(MAX_DELAY),
        );
        let max_interval =
            self.duration(group.get("max_interval"), d.max_interval.as_secs(), Some(MAX_DELAY));
        let multiplier = float("multiplier", d.multiplier);
        let randomization_factor = float("randomization_factor", d.randomization_factor);
        let max_attempts =
            self.integer(group.get("max_attempts"), i64::from(d.max_attempts), 0..=MAX_ATTEMPTS);
        let max_elapsed_time =
            self.duration(group.get("max_elapsed_time"), d.max_elapsed_time.as_secs(), None);
        let on_exhausted = self.one_of(
            group.get("on_exhausted"),
            &[("dead_letter", Exhausted::DeadLetter), ("pause", Exhausted::Pause)],
        );
        // What could not be read is reported already; for it stands a value that agrees with every
        // other.
        let options = RetryOptions {
            initial_interval: initial_interval.unwrap_or(Duration::from_nanos(1)),
            multiplier: multiplier.unwrap_or(d.multiplier),
            randomization_factor: randomization_factor.unwrap_or(d.randomization_factor),
            max_interval: max_interval.unwrap_or(MAX_DELAY),
            max_attempts: max_attempts
                .and_then(|n| u32::try_from(n).ok())
                .unwrap_or(d.max_attempts),
            max_elapsed_time: max_elapsed_time.unwrap_or(d.max_elapsed_time),
            on_exhausted: on_exhausted.unwrap_or(d.on_exhausted),
        };
        let ends = [
            ("initial_interval", options.initial_interval),
            ("max_interval", options.max_interval),
        ];
        let checked = RetryPolicy::try_new(options);
        for (key, why) in checked.as_ref().err().into_iter().flatten() {
            match group.get(key).filter(|_| *key != "max_interval") {
                Some(value) => self.reader.report(&value, *why),
                // It is not longer than 72 h, as was seen above: it is shorter than the other.
                None => self.report_pair(group, ends),
            }
        }
        let intervals =
            initial_interval.and(max_interval).and(multiplier).and(randomization_factor);
        intervals.and(max_attempts).and(max_elapsed_time).and(on_exhausted).and(checked.ok())
    }

    fn breaker(&self, group: &Layers<'_>) -> Option<BreakerPolicy> {
        let failures = self.integer(group.get("failures"), 5, 0..=MAX_FAILURES);
        let open_for = self.positive_duration(group.get("open_for"), 30, MAX_OPEN_FOR);
        let max_open_for = self.positive_duration(group.get("max_open_for"), 600, MAX_OPEN_FOR);
        if open_for.zip(max_open_for).is_some_and(|(first, longest)| first > longest) {
            let [first, longest] = [open_for, max_open_for].map(Option::unwrap_or_default);
            self.report_pair(group, [("open_for", first), ("max_open_for", longest)]);
            return None;
        }
        Some(BreakerPolicy {
            failures: u32::try_from(failures?).ok()?,
            open_for: open_for?,
            max_open_for: max_open_for?,
        })
    }

    /// Reports that the first of two times is longer than the second: at the one that stands nearer
    /// to the subscriber, whose other keys may come from elsewhere, with the other and where that
    /// is from.
    fn report_pair(&self, group: &Layers<'_>, [shorter, longer]: [(&str, Duration); 2]) {
        let is_own = group.layer(shorter.0) < group.layer(longer.0);
        let (at, (other, time)) = if is_own { (shorter.0, longer) } else { (longer.0, shorter) };
        let Some(value) = group.get(at) else { unreachable!("the defaults agree with each other") };
        let from = match (group.layer(other), group.get(other)) {
            (Layer::Preset, _) => "by the preset".to_owned(),
            (Layer::Own | Layer::Base, Some(other)) => format!("at {}", other.place()),
            (Layer::Default, _) | (_, None) => "by default".to_owned(),
        };
        let what = if is_own { "longer" } else { "shorter" };
        let why = format!(
            "must not be {what} than {other}, which is {} {from}; change this one, or set {other} here too",
            span(time)
        );
        self.reader.report(&value, why);
    }

    fn subscribers<'d>(
        &self,
        root: &Section<'d>,
        defaults: &Defaults<'d>,
        names: &mut HashMap<SubscriberName, String>,
    ) -> Vec<Arc<Subscriber>> {
        let Some(value) = root.get("subscriber") else { return Vec::new() };
        let tables = self.reader.array(&value).unwrap_or_default();
        tables
            .iter()
            .filter_map(|table| self.subscriber(table, defaults, names).map(Arc::new))
            .collect()
    }

    fn subscriber<'d>(
        &self,
        table: &Value<'d>,
        defaults: &Defaults<'d>,
        names: &mut HashMap<SubscriberName, String>,
    ) -> Option<Subscriber> {
        let r = self.reader;
        let section = r.section(&r.named(table), keys::SUBSCRIBER)?;
        let name = self.name(&section, names);
        let preset = section
            .get("preset")
            .and_then(|v| self.one_of(Some(v), &[("mailtrap", &defaults.mailtrap)]));
        let group = |key, keys, base: &Option<Section<'d>>| {
            let of = |s: &Section<'d>| s.get(key).and_then(|v| r.section(&v, keys));
            Layers { own: of(&section), preset: preset.and_then(of), base: base.clone() }
        };
        let batch = self.batch(&group("batch", keys::BATCH, &defaults.batch));
        let http_group = group("http", keys::HTTP, &defaults.http);
        let http = self.http(&http_group);
        let retry = self.retry(&group("retry", keys::RETRY, &defaults.retry));
        let circuit_breaker =
            self.breaker(&group("circuit_breaker", keys::BREAKER, &defaults.circuit_breaker));
        let url = self.url(&section, &http_group);
        let events = match section.get("events") {
            None => Some(vec![Pattern::all()]),
            Some(v) => self.patterns(&v),
        };
        let format = self
            .one_of(section.get("format"), &[("json", Format::Json), ("jsonl", Format::JsonLines)]);
        let headers = section.get("headers").map_or(Some(Vec::new()), |v| self.headers(&v));
        let auth = section.get("auth").map_or(Some(None), |v| self.auth(&v).map(Some));
        let tls = section.get("tls").map_or(Some(TlsPolicy::default()), |v| self.tls(&v));
        let event_ids = self.bool(section.get("event_ids"));
        let paused = self.bool(section.get("paused"));
        let signatures =
            section.get("signatures").or_else(|| preset.and_then(|p| p.get("signatures")));
        let signing = self.signing(&section, signatures);
        self.agree_on_headers(
            &section,
            url.as_ref(),
            headers.as_deref(),
            signing.as_ref().map(|(_, signer)| signer.schemes()),
        );
        let (secrets, signer) = signing?;
        Some(Subscriber {
            name: name?,
            url: url?,
            events: events?,
            format: format?,
            secrets,
            signer,
            headers: headers?,
            auth: auth?,
            tls: tls?,
            batch: batch?,
            http: http?,
            retry: retry?,
            circuit_breaker: circuit_breaker?,
            event_ids: event_ids?,
            paused: paused?,
        })
    }

    fn headers(&self, value: &Value<'_>) -> Option<Vec<(HeaderName, Secret)>> {
        let r = self.reader;
        let entries = r.entries(value)?;
        let mut headers: Vec<(HeaderName, Secret)> = Vec::new();
        for (name, value) in &entries {
            let Some(text) = r.string(value) else { continue };
            let wrong = match HeaderName::from_bytes(name.as_bytes()) {
                Err(_) => "is not a valid header name; write one such as \"X-Tenant\"",
                Ok(name) if RESERVED_HEADERS.contains(&name.as_str()) => {
                    "is a header that hooktrail sets itself; remove it"
                }
                Ok(name) if headers.iter().any(|(n, _)| *n == name) => {
                    "is there twice; case makes no difference in a header's name"
                }
                Ok(_) if HeaderValue::from_str(&text).is_err() || !text.is_ascii() => {
                    "has a value that a header cannot carry; use visible ASCII characters and spaces"
                }
                Ok(name) => {
                    headers.push((name, Secret::new(text)));
                    continue;
                }
            };
            r.report(value, wrong);
        }
        (headers.len() == entries.len()).then_some(headers)
    }

    fn auth(&self, value: &Value<'_>) -> Option<Auth> {
        let r = self.reader;
        let section = r.section(value, keys::AUTH)?;
        match (section.get("basic"), section.get("bearer")) {
            (Some(basic), None) => {
                let basic = r.section(&basic, keys::BASIC)?;
                let required = |key| {
                    let found = basic.get(key);
                    if found.is_none() {
                        r.report_missing(
                            &basic,
                            key,
                            "is required beside the other of `username` and `password`",
                        );
                    }
                    found
                };
                let (username, password) = (required("username"), required("password"));
                let username = username.and_then(|v| {
                    let text = r.string(&v)?;
                    let ok = !text.contains(':') && !text.contains(char::is_control);
                    if !ok {
                        r.report(&v, "must have no `:` and no control characters (RFC 7617)");
                    }
                    ok.then_some(text)
                });
                let password = password.and_then(|v| self.secret(&v));
                Some(Auth::Basic { username: username?, password: password? })
            }
            (None, Some(bearer)) => {
                let token = self.secret(&bearer)?;
                let ok = token.expose().bytes().all(|b| b.is_ascii_graphic());
                if !ok {
                    r.report(&bearer, "must be visible ASCII characters without spaces, which is what a header can carry");
                }
                ok.then_some(Auth::Bearer(token))
            }
            (Some(_), Some(_)) | (None, None) => {
                r.report(value, "must be either { basic = { username = \"…\", password = \"…\" } } or { bearer = \"…\" }");
                None
            }
        }
    }

    fn tls(&self, value: &Value<'_>) -> Option<TlsPolicy> {
        let r = self.reader;
        let section = r.section(value, keys::TLS)?;
        let read = |v: &Value<'_>| {
            let path = v.source.relative(&r.string(v)?);
            r.read(&path)
                .map_err(|e| r.report(v, format!("{} cannot be read: {e}", path.display())))
                .ok()
        };
        let roots = match section.get("ca_file") {
            None => Some(None),
            Some(v) => read(&v)
                .and_then(|pem| tls::roots(&pem).map(Some).map_err(|why| r.report(&v, why)).ok()),
        };
        let identity = match (section.get("client_cert_file"), section.get("client_key_file")) {
            (None, None) => Some(None),
            (Some(v), None) | (None, Some(v)) => {
                r.report(
                    &v,
                    "needs the other of `client_cert_file` and `client_key_file` beside it",
                );
                None
            }
            (Some(cert), Some(key)) => read(&cert).zip(read(&key)).and_then(|(chain, secret)| {
                match Identity::try_new(&chain, &secret) {
                    Ok(identity) => Some(Some(identity)),
                    Err(BadIdentity::Certificate(why)) => {
                        r.report(&cert, why);
                        None
                    }
                    Err(BadIdentity::Key(why)) => {
                        r.report(&key, why);
                        None
                    }
                }
            }),
        };
        let file = |key: &'static str| {
            Some((key, section.get(key).and_then(|v| Some(v.source.relative(&r.string(&v)?)))?))
        };
        let files = keys::TLS.iter().map(Key::name).filter_map(file).collect();
        Some(TlsPolicy { roots: roots?, identity: identity?, files })
    }

    /// Of two headers of one name the later would silently take the place of the first.
    fn agree_on_headers(
        &self,
        section: &Section<'_>,
        url: Option<&SecretUrl>,
        headers: Option<&[(HeaderName, Secret)]>,
        schemes: Option<&[Scheme]>,
    ) {
        let r = self.reader;
        let in_url = url.is_some_and(|url| {
            !url.expose().username().is_empty() || url.expose().password().is_some()
        });
        let own = headers
            .is_some_and(|all| all.iter().any(|(name, _)| *name == http::header::AUTHORIZATION));
        match (section.get("auth"), section.get("headers")) {
            (Some(auth), _) if in_url => r.report(
                &auth,
                "cannot stand beside a user or password in `url`; remove one of the two",
            ),
            (Some(auth), _) if own => r.report(
                &auth,
                "cannot stand beside `Authorization` in `headers`; remove one of the two",
            ),
            (None, Some(headers)) if own && in_url => {
                r.report(&headers, "cannot have `Authorization` beside a user or password in `url`; remove one of the two");
            }
            _ => {}
        }
        let signed = |name: &HeaderName| {
            schemes.is_some_and(|all| {
                all.iter().any(|s| s.header().eq_ignore_ascii_case(name.as_str()))
            })
        };
        if let (Some((name, _)), Some(value)) = (
            headers.and_then(|all| all.iter().find(|(name, _)| signed(name))),
            section.get("headers"),
        ) {
            r.report(
                &value,
                format!(
                    "`{name}` is the header of a signature; choose another name for one of the two"
                ),
            );
        }
    }

    fn name(
        &self,
        section: &Section<'_>,
        names: &mut HashMap<SubscriberName, String>,
    ) -> Option<SubscriberName> {
        let r = self.reader;
        let Some(value) = section.get("name") else {
            r.report_missing(
                section,
                "name",
                "is required: 1 to 64 of a-z, 0-9 and `-`; it names the subscriber's queues",
            );
            return None;
        };
        let name = SubscriberName::try_new(&r.string(&value)?)
            .map_err(|why| r.report(&value, format!("{why}; it names the subscriber's queues")))
            .ok()?;
        let here = format!("{}: {}", section.source.path.display(), value.key);
        if let Some(first) = names.insert(name.clone(), here) {
            r.report(&value, format!("`{name}` is already the name of {first}; names are unique"));
            return None;
        }
        Some(name)
    }

    /// Of the `http` group only what the URL depends on is asked, so that no other mistake there
    /// hides one here.
    fn url(&self, section: &Section<'_>, http: &Layers<'_>) -> Option<SecretUrl> {
        let r = self.reader;
        let Some(value) = section.get("url") else {
            r.report_missing(
                section,
                "url",
                "is required: where the batches go, such as \"https://siem.example.com/hooks\"",
            );
            return None;
        };
        // No message quotes the URL: its userinfo, path and query may be secrets.
        let url = match r.string(&value)?.parse::<Url>() {
            Ok(url) => url,
            Err(url::ParseError::RelativeUrlWithoutBase) => {
                r.report(&value, "is not a URL: it has no scheme; write https:// before the host");
                return None;
            }
            Err(e) => {
                r.report(&value, format!("is not a URL: {e}"));
                return None;
            }
        };
        let scheme_ok = match url.scheme() {
            "https" => true,
            // Where `allow_http` itself is wrong, nothing more can be said.
            "http" => self.bool(http.get("allow_http")).is_none_or(|allowed| {
                if !allowed {
                    r.report(&value, "plain http sends events unencrypted; use https, or set `http.allow_http = true` for this subscriber");
                }
                allowed
            }),
            other => {
                r.report(&value, format!("scheme `{other}` is not supported; use https"));
                false
            }
        };
        let blocked = self.addresses(http).and_then(|a| a.check_literal(&url).err());
        if let Some(what) = blocked {
            let remedy = "if it is meant, name it in `http.allow_addresses`, or set `http.allow_private_addresses = true`";
            r.report(&value, format!("its address is not a public one ({what}); {remedy}"));
        }
        (scheme_ok && blocked.is_none()).then(|| SecretUrl::new(url))
    }

    fn patterns(&self, value: &Value<'_>) -> Option<Vec<Pattern>> {
        let items = self.reader.array(value)?;
        if items.is_empty() {
            self.reader.report(value, "is empty, so no event would match; leave `events` out for all events, or name some");
            return None;
        }
        let pattern = |item: &Value<'_>| {
            let text = self.reader.string(item)?;
            Pattern::try_new(&text).map_err(|why| self.reader.report(item, why)).ok()
        };
        let patterns: Vec<Pattern> = items.iter().filter_map(pattern).collect();
        (patterns.len() == items.len()).then_some(patterns)
    }

    fn signing<'d>(
        &self,
        section: &Section<'d>,
        signatures: Option<Value<'d>>,
    ) -> Option<(Vec<Secret>, Signer)> {
        let r = self.reader;
        let schemes = match signatures {
            None => Some(vec![Scheme::StandardWebhooks]),
            Some(v) => self.schemes(&v),
        };
        let value = section.get("secrets");
        let items = match &value {
            None => Vec::new(),
            Some(v) if Reader::is_string(v) => {
                r.report(v, "must be an array, also of one: secrets = [\"${SECRET}\"]");
                return None;
            }
            Some(v) => r.array(v)?,
        };
        if items.is_empty() && schemes.as_ref().is_none_or(|s| !s.is_empty()) {
            let why = "is required for signing: one or two secrets, the current one first (make one with `hooktrail secret`); or sign nothing with `signatures = []`";
            match &value {
                Some(v) => r.report(v, format!("is empty; {why}")),
                None => r.report_missing(section, "secrets", why),
            }
            return None;
        }
        let standard = schemes.as_ref().is_some_and(|s| s.contains(&Scheme::StandardWebhooks));
        let sound = |item: &Value<'_>| {
            let secret = self.secret(item)?;
            if let (true, Err(why)) = (standard, standard_key(&secret)) {
                let remedy = "standard-webhooks needs `whsec_` and the base64 of 24 to 64 bytes: make one with `hooktrail secret`";
                r.report(item, format!("{why}; {remedy}"));
                return None;
            }
            Some(secret)
        };
        let secrets: Vec<Secret> = items.iter().filter_map(sound).collect();
        if secrets.len() < items.len() {
            return None;
        }
        let signer = Signer::try_new(schemes?, &secrets).ok()?;
        Some((secrets, signer))
    }

    fn secret(&self, item: &Value<'_>) -> Option<Secret> {
        let text = self.reader.string(item)?;
        let secret = match text.strip_prefix("file:") {
            // The name of a variable, and no secret: a shell would put in what it holds.
            None if is_variable(&text) => {
                let name = text.trim_start_matches('$');
                self.reader.report(item, format!("is the text `{text}`; the environment's variable is written \"${{{name}}}\""));
                return None;
            }
            None => text,
            Some(file) => {
                let path = item.source.relative(file);
                match self.reader.read_to_string(&path) {
                    Ok(content) => content
                        .strip_suffix('\n')
                        .map(|c| c.strip_suffix('\r').unwrap_or(c))
                        .unwrap_or(&content)
                        .to_owned(),
                    Err(e) => {
                        self.reader.report(
                            item,
                            format!("secret file {} cannot be read: {e}", path.display()),
                        );
                        return None;
                    }
                }
            }
        };
        if secret.is_empty() {
            self.reader.report(item, "the secret is empty; make one with `hooktrail secret`");
            return None;
        }
        Some(Secret::new(secret))
    }

    fn schemes(&self, value: &Value<'_>) -> Option<Vec<Scheme>> {
        let items = self.reader.array(value)?;
        let mut schemes: Vec<(Scheme, String)> = Vec::new();
        let mut all = true;
        for item in &items {
            let Some((scheme, place)) = self.scheme(item) else {
                all = false;
                continue;
            };
            // The later of two headers of one name would silently take the place of the first.
            if let Some((_, first)) =
                schemes.iter().find(|(s, _)| s.header().eq_ignore_ascii_case(scheme.header()))
            {
                self.reader
                    .report(&place, format!("its header is already that of {first}; remove one of the two, or choose another header"));
                all = false;
                continue;
            }
            schemes.push((scheme, item.key.clone()));
        }
        all.then(|| schemes.into_iter().map(|(scheme, _)| scheme).collect())
    }

    /// A scheme and the place of its header.
    fn scheme<'d>(&self, item: &Value<'d>) -> Option<(Scheme, Value<'d>)> {
        let r = self.reader;
        if Reader::is_string(item) {
            let n = match r.string(item)?.as_str() {
                "standard-webhooks" => 0,
                "mailtrap" => 1,
                _ => {
                    let forms = "must be \"standard-webhooks\" or \"mailtrap\", or a header of your own such as \
                                 { header = \"X-Signature\", prefix = \"sha256=\", encoding = \"hex\" }";
                    r.report(item, forms);
                    return None;
                }
            };
            return Some((
                if n == 0 { Scheme::StandardWebhooks } else { Scheme::Mailtrap },
                item.clone(),
            ));
        }
        let table = r.section(item, keys::SIGNATURE)?;
        let header = table.get("header");
        if header.is_none() {
            r.report_missing(
                &table,
                "header",
                "is required: the name of the header that carries the signature",
            );
        }
        let name = header.as_ref().and_then(|v| {
            let name = r.string(v)?;
            let wrong = match http::HeaderName::from_bytes(name.as_bytes()) {
                Err(_) => "is not a valid header name; write one such as \"X-Signature\"",
                Ok(parsed)
                    if parsed == http::header::AUTHORIZATION
                        || RESERVED_HEADERS.contains(&parsed.as_str()) =>
                {
                    "is a header that hooktrail sets itself; choose another"
                }
                Ok(_) => return Some(name),
            };
            r.report(v, wrong);
            None
        });
        let prefix = table.get("prefix").map_or(Some(String::new()), |v| {
            let prefix = r.string(&v)?;
            let ok = http::HeaderValue::from_str(&prefix).is_ok();
            if !ok {
                r.report(&v, "has characters that a header cannot carry; use visible ASCII, such as \"sha256=\"");
            }
            ok.then_some(prefix)
        });
        let encoding = self
            .one_of(table.get("encoding"), &[("hex", Encoding::Hex), ("base64", Encoding::Base64)]);
        Some((Scheme::Custom { header: name?, prefix: prefix?, encoding: encoding? }, header?))
    }
}

#[cfg(test)]
mod tests;

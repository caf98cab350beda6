//! The HTTP API of RabbitMQ's management plugin: what the broker knows and AMQP does not show.
//! Reads only.

use std::{error::Error as _, fmt, time::Duration};

use lapin::uri::AMQPUri;
use reqwest::{Client, StatusCode, Url, redirect, retry};
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::{Map, Value};

use crate::crypto::{
    secret::{Secret, SecretUrl},
    tls::{SystemRoots, TlsPolicy},
};

/// Timeout of one whole answer.
const TIMEOUT: Duration = Duration::from_secs(15);

/// Tries for a list: it answers 500 when a queue on it is deleted meanwhile (seen on 3.10). And the
/// time between two tries.
const TRIES: u32 = 4;
const AGAIN: Duration = Duration::from_millis(500);

/// Bytes of an answer that are read: far more than a page of queues.
const MAX_ANSWER: usize = 32 << 20;

/// Queues of one request; the most that the API allows.
const PAGE: usize = 500;

const MAX_PAGES: usize = 200;

/// Why something could not be inspected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Unseen {
    /// No management plugin answers at the URL.
    Unreachable(String),
    /// It refuses this request of this user.
    Refused(String),
}

impl fmt::Display for Unseen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Self::Unreachable(why) | Self::Refused(why)) = self;
        f.write_str(why)
    }
}

/// A queue as the API lists it. Figures and policies come with the statistics, some seconds after
/// the queue.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct Row {
    pub(super) name: String,
    #[serde(default)]
    pub(super) messages: u64,
    #[serde(default)]
    messages_ready: u64,
    #[serde(default)]
    messages_unacknowledged: u64,
    #[serde(default)]
    pub(super) policy: Option<String>,
    #[serde(default)]
    pub(super) operator_policy: Option<String>,
    /// The definitions of both policies; `None` while there are no statistics.
    #[serde(default, rename = "effective_policy_definition")]
    pub(super) definition: Option<Definition>,
    #[serde(default)]
    pub(super) arguments: Definition,
    /// The nodes with a replica of a quorum queue, and those of them that run.
    #[serde(default)]
    pub(super) members: Vec<String>,
    #[serde(default)]
    pub(super) online: Vec<String>,
}

impl Row {
    /// The number of messages that have left the queue for another one, which has not taken them
    /// yet.
    pub(super) fn handed_over(&self) -> u64 {
        self.messages.saturating_sub(self.messages_ready + self.messages_unacknowledged)
    }
}

/// Keys and values. In some versions an empty definition is a list.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(from = "Value")]
pub(super) struct Definition(pub(super) Map<String, Value>);

impl From<Value> for Definition {
    fn from(value: Value) -> Self {
        match value {
            Value::Object(map) => Self(map),
            _ => Self::default(),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(super) struct Binding {
    pub(super) source: String,
    pub(super) routing_key: String,
}

/// A binding as its source lists it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(super) struct Destination {
    pub(super) destination: String,
    pub(super) routing_key: String,
}

/// A node of the cluster, with its file descriptors if it reports them.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(super) struct Node {
    pub(super) name: String,
    #[serde(default)]
    running: bool,
    #[serde(default)]
    uptime: u64,
    #[serde(default)]
    pub(super) fd_total: u64,
    #[serde(default)]
    pub(super) fd_used: u64,
}

impl Node {
    #[cfg(test)]
    pub(super) fn new(name: &str, fd_total: u64, fd_used: u64) -> Self {
        Self { name: name.to_owned(), running: true, uptime: 1, fd_total, fd_used }
    }

    /// Whether its figures have arrived, some seconds after its start. A node that is down has
    /// none.
    pub(super) fn is_complete(&self) -> bool {
        !self.running || self.uptime > 0
    }
}

/// A resource that a node has too little of.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(super) struct Alarm {
    pub(super) node: String,
    /// `memory`, `disk` or `file_descriptor_limit`.
    pub(super) resource: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(super) struct Flag {
    pub(super) name: String,
    pub(super) state: String,
}

/// The API of one broker, for one vhost.
#[derive(Debug)]
pub(super) struct Management {
    client: Client,
    base: Url,
    /// User and password, unless the URL has its own.
    user: Option<(String, Secret)>,
    vhost: String,
}

impl Management {
    /// User, password and vhost are those of the AMQP URL unless this one has its own user.
    pub(super) fn try_new(url: &SecretUrl, amqp: &AMQPUri) -> Result<Self, Unseen> {
        let unusable = |why: String| Unseen::Unreachable(why);
        let base = url.expose().clone();
        let mut client = Client::builder()
            .no_proxy()
            .redirect(redirect::Policy::none())
            .retry(retry::never())
            .timeout(TIMEOUT)
            .connect_timeout(TIMEOUT / 3);
        if base.scheme() == "https" {
            let tls =
                SystemRoots::load().and_then(|roots| TlsPolicy::default().client_config(&roots));
            client = client.tls_backend_preconfigured(tls.map_err(unusable)?);
        }
        let client = client.build().map_err(|e| unusable(e.without_url().to_string()))?;
        let userinfo = &amqp.authority.userinfo;
        let user = base
            .username()
            .is_empty()
            .then(|| (userinfo.username.clone(), Secret::new(userinfo.password.clone())));
        Ok(Self { client, base, user, vhost: amqp.vhost.clone() })
    }

    /// All queues below a prefix.
    pub(super) async fn queues(&self, prefix: &str) -> Result<Vec<Row>, Unseen> {
        #[derive(Deserialize)]
        struct Page {
            items: Vec<Row>,
            page_count: usize,
        }
        let name = format!(r"^{}\.", prefix.replace('.', r"\."));
        let columns = "name,messages,messages_ready,messages_unacknowledged,policy,operator_policy,effective_policy_definition,\
            arguments,members,online";
        let mut rows = Vec::new();
        for page in 1..=MAX_PAGES {
            let (number, size) = (page.to_string(), PAGE.to_string());
            let query = [
                ("page", &*number),
                ("page_size", &*size),
                ("name", &*name),
                ("use_regex", "true"),
                ("columns", columns),
            ];
            let Page { items, page_count } = self.get(&["queues", &self.vhost], &query).await?;
            rows.extend(items);
            if page >= page_count {
                break;
            }
        }
        Ok(rows)
    }

    /// The bindings of a queue, without that of the default exchange.
    pub(super) async fn bindings(&self, queue: &str) -> Result<Vec<Binding>, Unseen> {
        let mut found: Vec<Binding> = self
            .get(&["queues", &self.vhost, queue, "bindings"], &[("columns", "source,routing_key")])
            .await?;
        found.retain(|b| !b.source.is_empty());
        Ok(found)
    }

    /// The bindings of an exchange.
    pub(super) async fn bindings_of(&self, exchange: &str) -> Result<Vec<Destination>, Unseen> {
        let path = ["exchanges", &self.vhost, exchange, "bindings", "source"];
        self.get(&path, &[("columns", "destination,routing_key")]).await
    }

    pub(super) async fn alarms(&self) -> Result<Vec<Alarm>, Unseen> {
        #[derive(Deserialize)]
        struct Health {
            #[serde(default)]
            alarms: Vec<Alarm>,
        }
        let health: Health = self.get(&["health", "checks", "alarms"], &[]).await?;
        Ok(health.alarms)
    }

    /// The feature flags. Only an administrator may read them.
    pub(super) async fn feature_flags(&self) -> Result<Vec<Flag>, Unseen> {
        self.get(&["feature-flags"], &[]).await
    }

    /// All nodes of the cluster. Only a user that may monitor it may read them.
    pub(super) async fn nodes(&self) -> Result<Vec<Node>, Unseen> {
        self.get(&["nodes"], &[("columns", "name,running,uptime,fd_total,fd_used")]).await
    }

    /// The most queues that the vhost may have, and its number of queues, if there is a limit.
    pub(super) async fn queue_limit(&self) -> Result<Option<(u64, u64)>, Unseen> {
        #[derive(Deserialize)]
        struct Limits {
            value: Definition,
        }
        #[derive(Deserialize)]
        struct All {
            total_count: u64,
        }
        let limits: Vec<Limits> = self.get(&["vhost-limits", &self.vhost], &[]).await?;
        // A negative limit is none.
        let Some(max) = limits.iter().find_map(|l| l.value.0.get("max-queues")?.as_u64()) else {
            return Ok(None);
        };
        let All { total_count } = self
            .get(
                &["queues", &self.vhost],
                &[("page", "1"), ("page_size", "1"), ("columns", "name")],
            )
            .await?;
        Ok(Some((max, total_count)))
    }

    async fn ask(&self, url: Url) -> Result<(StatusCode, Vec<u8>), Unseen> {
        let mut request = self.client.get(url);
        if let Some((user, password)) = &self.user {
            request = request.basic_auth(user, Some(password.expose()));
        }
        let unreachable = |e: reqwest::Error| Unseen::Unreachable(cause(&e.without_url()));
        let mut response = request.send().await.map_err(unreachable)?;
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(unreachable)? {
            body.extend_from_slice(&chunk);
            if body.len() > MAX_ANSWER {
                return Err(Unseen::Refused(format!(
                    "its answer is longer than {} MiB",
                    MAX_ANSWER >> 20
                )));
            }
        }
        Ok((response.status(), body))
    }

    async fn get<T: DeserializeOwned>(
        &self,
        path: &[&str],
        query: &[(&str, &str)],
    ) -> Result<T, Unseen> {
        let mut url = self.base.clone();
        match url.path_segments_mut() {
            Ok(mut segments) => drop(segments.pop_if_empty().push("api").extend(path)),
            Err(()) => {
                return Err(Unseen::Unreachable(
                    "[queue] management_url cannot have a path".to_owned(),
                ));
            }
        }
        if !query.is_empty() {
            url.query_pairs_mut().extend_pairs(query);
        }
        let mut tries = TRIES;
        let (status, body) = loop {
            let (status, body) = self.ask(url.clone()).await?;
            tries -= 1;
            if status != StatusCode::INTERNAL_SERVER_ERROR || tries == 0 {
                break (status, body);
            }
            tokio::time::sleep(AGAIN).await;
        };
        // A failed health check has its reason in the body.
        if status.is_success() || status == StatusCode::SERVICE_UNAVAILABLE {
            return serde_json::from_slice(&body).map_err(|_| {
                Unseen::Unreachable(format!(
                    "the answer ({status}) is not one of RabbitMQ's management plugin"
                ))
            });
        }
        let reason = serde_json::from_slice::<Value>(&body)
            .ok()
            .and_then(|v| Some(v.get("reason")?.as_str()?.to_owned()));
        match reason {
            Some(reason) => Err(Unseen::Refused(format!("it answered {status}: {reason}"))),
            None => Err(Unseen::Unreachable(format!(
                "the answer ({status}) is not one of RabbitMQ's management plugin"
            ))),
        }
    }
}

/// The innermost cause, which is the clearest.
fn cause(e: &reqwest::Error) -> String {
    let mut cause = e.source();
    let mut text = e.to_string();
    while let Some(c) = cause {
        text = c.to_string();
        cause = c.source();
    }
    text
}

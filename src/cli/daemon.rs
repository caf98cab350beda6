//! What is asked of the running daemon, over its admin listener; `pause` and `resume`.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use serde_json::{Value, json};

use super::{Failed, visible};
use crate::config::{AdminConfig, Config};

/// Longer than the daemon waits for a broker's confirm.
const TIMEOUT: Duration = Duration::from_secs(45);

pub(super) async fn pause(config: &AdminConfig, name: &str, why: Option<String>) -> Result<(), Failed> {
    let wish = why.map_or_else(|| json!({}), |why| json!({ "why": why }));
    let answer = Daemon::of(config)?.post(&format!("subscribers/{name}/pause"), &wish).await?;
    let text = |key: &str| visible(answer[key].as_str().unwrap_or_default());
    let already = if answer["changed"] == true { "is paused" } else { "was paused already" };
    println!("`{name}` {already}, since {}, by {}: {}", text("since"), text("by"), text("why"));
    println!("Its events wait in the queue until `hooktrail resume {name}`.");
    Ok(())
}

pub(super) async fn resume(config: &AdminConfig, name: &str) -> Result<(), Failed> {
    let answer = Daemon::of(config)?.post(&format!("subscribers/{name}/resume"), &json!({})).await?;
    if answer["changed"] == true {
        println!("`{name}` is resumed; attempts and elapsed time of the batches that it has begin anew.");
    } else {
        println!("`{name}` was not paused.");
    }
    Ok(())
}

/// The running daemon of a configuration, as far as one answers.
#[derive(Debug)]
pub(super) struct Daemon<'c> {
    config: &'c AdminConfig,
    address: SocketAddr,
    client: reqwest::Client,
}

impl<'c> Daemon<'c> {
    pub(super) fn of(config: &'c AdminConfig) -> Result<Self, Failed> {
        let address = reachable(config.listen)?;
        let client = reqwest::Client::builder().no_proxy().timeout(TIMEOUT).build().map_err(|e| no_daemon(address, &e))?;
        Ok(Self { config, address, client })
    }

    /// What there is at a path below `/api/v1/`.
    pub(super) async fn get(&self, path: &str) -> Result<Value, Failed> {
        self.ask(self.client.get(self.url(path))).await
    }

    pub(super) async fn post(&self, path: &str, wish: &Value) -> Result<Value, Failed> {
        self.ask(self.client.post(self.url(path)).header("content-type", "application/json").body(wish.to_string())).await
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}/api/v1/{path}", self.address)
    }

    async fn ask(&self, request: reqwest::RequestBuilder) -> Result<Value, Failed> {
        let (status, body) = self.send(request).await.map_err(|e| no_daemon(self.address, &e))?;
        if status.is_success() {
            return Ok(body);
        }
        let why = body["error"].as_str().map_or_else(|| "it is no hooktrail, perhaps".to_owned(), visible);
        Err(Failed::Runtime(format!("the daemon at {} answered {status}: {why}", self.address)))
    }

    /// What it answers, whatever that is; else what is in the way.
    async fn send(&self, mut request: reqwest::RequestBuilder) -> Result<(reqwest::StatusCode, Value), String> {
        if let Some(token) = &self.config.token {
            request = request.bearer_auth(token.expose());
        }
        let answer = request.send().await.map_err(|e| {
            // "error sending request" says nothing; what is behind it does.
            let e = e.without_url();
            let mut why: &dyn std::error::Error = &e;
            while let Some(cause) = why.source() {
                why = cause;
            }
            why.to_string()
        })?;
        let status = answer.status();
        Ok((status, answer.bytes().await.ok().and_then(|b| serde_json::from_slice(&b).ok()).unwrap_or_default()))
    }
}

fn no_daemon(address: SocketAddr, why: &dyn std::fmt::Display) -> Failed {
    Failed::Runtime(format!("no daemon answers at {address} ([admin] listen), and only a running one can tell or do this: {why}"))
}

/// Where a listener on this machine is reached.
fn reachable(listen: SocketAddr) -> Result<SocketAddr, Failed> {
    if listen.port() == 0 {
        let why = "[admin] listen has port 0, so the daemon's port is known to its log alone; give it a port of its own";
        return Err(Failed::Usage(why.to_owned()));
    }
    let ip = match listen.ip() {
        IpAddr::V4(Ipv4Addr::UNSPECIFIED) => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(Ipv6Addr::UNSPECIFIED) => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    Ok(SocketAddr::new(ip, listen.port()))
}

/// Nothing is waited for but the reading of some files.
const PLAN_TIMEOUT: Duration = Duration::from_secs(10);

/// What a reload of the running daemon would do.
pub(super) enum Foreseen {
    /// The daemon's answer: `changes`, each with `subscriber`, `change` and `keys`; and `needs_restart`.
    Changes { address: SocketAddr, answer: Value },
    /// The daemon says what is wrong with its configuration.
    Refused { address: SocketAddr, error: String },
    /// No daemon tells.
    Unknown { why: String },
}

/// Asks the daemon what a reload would change; it changes nothing.
pub(super) async fn foresee_reload(config: &Config) -> Result<Foreseen, Failed> {
    let daemon = match Daemon::of(&config.admin) {
        Ok(daemon) => daemon,
        Err(Failed::Usage(why)) => return Ok(Foreseen::Unknown { why }),
        Err(other) => return Err(other),
    };
    let address = daemon.address;
    let (status, answer) = match daemon.send(daemon.client.get(daemon.url("reload")).timeout(PLAN_TIMEOUT)).await {
        Ok(answered) => answered,
        Err(why) => return Ok(Foreseen::Unknown { why: format!("no daemon answers at {address} ([admin] listen): {why}") }),
    };
    let error = answer["error"].as_str().map(str::to_owned);
    Ok(match (status.as_u16(), error) {
        (200, None) if answer["changes"].is_array() => Foreseen::Changes { address, answer },
        (422, Some(error)) => Foreseen::Refused { address, error },
        (status, error) => {
            let error = error.map_or_else(|| "it is no hooktrail, or one of another version, perhaps".to_owned(), |e| visible(&e));
            Foreseen::Unknown { why: format!("what listens at {address} answered {status}: {error}") }
        }
    })
}

//! `pause` and `resume`: what is asked of the running daemon, over its admin listener.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use super::{Failed, find, visible};
use crate::config::{AdminConfig, Config};

/// Longer than the daemon waits for a broker's confirm.
const TIMEOUT: Duration = Duration::from_secs(45);

pub(super) async fn pause(config: &Config, name: &str, why: Option<String>) -> Result<(), Failed> {
    let wish = why.map_or_else(|| serde_json::json!({}), |why| serde_json::json!({ "why": why }));
    let answer = ask(config, name, "pause", &wish).await?;
    let text = |key: &str| visible(answer[key].as_str().unwrap_or_default());
    let already = if answer["changed"] == true { "is paused" } else { "was paused already" };
    println!("`{name}` {already}, since {}, by {}: {}", text("since"), text("by"), text("why"));
    println!("Its events wait in the queue until `hooktrail resume {name}`.");
    Ok(())
}

pub(super) async fn resume(config: &Config, name: &str) -> Result<(), Failed> {
    let answer = ask(config, name, "resume", &serde_json::json!({})).await?;
    if answer["changed"] == true {
        println!("`{name}` is resumed; attempts and elapsed time of the batches that it has begin anew.");
    } else {
        println!("`{name}` was not paused.");
    }
    Ok(())
}

async fn ask(config: &Config, name: &str, what: &str, wish: &serde_json::Value) -> Result<serde_json::Value, Failed> {
    find(config, name)?;
    let AdminConfig { listen, token, .. } = &config.admin;
    let address = reachable(*listen)?;
    let no_daemon = |why: &dyn std::fmt::Display| {
        Failed::Runtime(format!("no daemon answers at {address} ([admin] listen), and only a running one can {what} a subscriber: {why}"))
    };
    let client = reqwest::Client::builder().no_proxy().timeout(TIMEOUT).build().map_err(|e| no_daemon(&e))?;
    let mut request = client.post(format!("http://{address}/api/v1/subscribers/{name}/{what}"));
    if let Some(token) = token {
        request = request.bearer_auth(token.expose());
    }
    let request = request.header("content-type", "application/json").body(wish.to_string());
    let answer = request.send().await.map_err(|e| no_daemon(&e.without_url()))?;
    let status = answer.status();
    let body: serde_json::Value = answer.bytes().await.ok().and_then(|b| serde_json::from_slice(&b).ok()).unwrap_or_default();
    if status.is_success() {
        return Ok(body);
    }
    let why = body["error"].as_str().map_or_else(|| "it is no hooktrail, perhaps".to_owned(), visible);
    Err(Failed::Runtime(format!("the daemon at {address} answered {status}: {why}")))
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
    Changes { address: SocketAddr, answer: serde_json::Value },
    /// The daemon says what is wrong with its configuration.
    Refused { address: SocketAddr, error: String },
    /// No daemon tells.
    Unknown { why: String },
}

/// Asks the daemon what a reload would change; it changes nothing.
pub(super) async fn foresee_reload(config: &Config) -> Result<Foreseen, Failed> {
    let AdminConfig { listen, token, .. } = &config.admin;
    let address = match reachable(*listen) {
        Ok(address) => address,
        Err(Failed::Usage(why)) => return Ok(Foreseen::Unknown { why }),
        Err(other) => return Err(other),
    };
    let no_daemon = |e: reqwest::Error| {
        let e = e.without_url();
        // "error sending request" says nothing; the first cause does.
        let mut why: &dyn std::error::Error = &e;
        while let Some(cause) = why.source() {
            why = cause;
        }
        Foreseen::Unknown { why: format!("no daemon answers at {address} ([admin] listen): {why}") }
    };
    let client = match reqwest::Client::builder().no_proxy().timeout(PLAN_TIMEOUT).build() {
        Ok(client) => client,
        Err(e) => return Ok(no_daemon(e)),
    };
    let mut request = client.get(format!("http://{address}/api/v1/reload"));
    if let Some(token) = token {
        request = request.bearer_auth(token.expose());
    }
    let answer = match request.send().await {
        Ok(answer) => answer,
        Err(e) => return Ok(no_daemon(e)),
    };
    let status = answer.status().as_u16();
    let answer: serde_json::Value = answer.bytes().await.ok().and_then(|b| serde_json::from_slice(&b).ok()).unwrap_or_default();
    let error = answer["error"].as_str().map(str::to_owned);
    Ok(match (status, error) {
        (200, None) if answer["changes"].is_array() => Foreseen::Changes { address, answer },
        (422, Some(error)) => Foreseen::Refused { address, error },
        (_, error) => {
            let error = error.map_or_else(|| "it is no hooktrail, or one of another version, perhaps".to_owned(), |e| visible(&e));
            Foreseen::Unknown { why: format!("what listens at {address} answered {status}: {error}") }
        }
    })
}

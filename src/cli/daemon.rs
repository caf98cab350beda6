//! Requests to the running daemon, over its admin listener.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

use serde::{Deserialize as _, Serialize, de::DeserializeOwned};
use serde_json::Value;
use url::form_urlencoded;

use super::{failed::Failed, open::find, text::visible};
use crate::{
    admin::view::{self, ChangeRequest, Introduction, Problem, Reloaded},
    clock,
    config::{self, AdminConfig, Config, managed::Document},
    crypto::handshake::{self, Side},
};

/// The timeout of an introduction, which a daemon answers at once.
const INTRODUCTION_TIMEOUT: Duration = Duration::from_secs(10);

/// The timeout of a request: longer than the daemon waits for a broker's confirm.
const TIMEOUT: Duration = Duration::from_secs(45);

/// How often a request with a key is sent, and the time between two of them.
const TRIES: u32 = 3;
const AGAIN: Duration = Duration::from_millis(500);

/// The daemon that a command asks, as its configuration describes it, and the file of that.
#[derive(Debug)]
pub(super) struct Asked {
    pub(super) admin: AdminConfig,
    pub(super) config: PathBuf,
}

/// Reads where the daemon listens, also from a configuration with mistakes: a running daemon goes
/// on with the one before, and must stay reachable.
pub(super) fn asked(path: &Path, subscribers: &[String]) -> Result<Asked, Failed> {
    let of = |admin| Asked { admin, config: path.to_owned() };
    let problems = match config::load(path) {
        Ok(config) => {
            // The daemon has more than the file, and says which it does not have.
            let may_be_managed = |name: &str| config.admin.manage && is_name(name);
            let mut of_file = subscribers.iter().filter(|name| !may_be_managed(name));
            of_file.try_for_each(|name| find(&config, name).map(drop))?;
            return Ok(of(config.admin));
        }
        Err(problems) => problems,
    };
    match config::admin_of(path).filter(|_| subscribers.iter().all(|name| is_name(name))) {
        Some(admin) => {
            eprintln!(
                "warning: the configuration has mistakes, see `hooktrail check`; a daemon that runs goes on with the one before"
            );
            Ok(of(admin))
        }
        None => Err(Failed::Config(problems)),
    }
}

/// Whether it has the characters of a name; the daemon checks the rest.
pub(super) fn is_name(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
}

pub(super) async fn reload(asked: &Asked) -> Result<(), Failed> {
    let answer = Daemon::of(asked)?.post("reload", &ChangeRequest::default()).await?;
    print!("{}", reloaded(&answer));
    Ok(())
}

/// The changes of a reload, a line for each.
fn reloaded(answer: &Reloaded) -> String {
    let changes = &answer.changes;
    let mut lines = Vec::new();
    for change in &changes.changes {
        let keys = listed(&change.keys);
        let keys = if keys.is_empty() { keys } else { format!(": {keys}") };
        lines.push(format!("{} `{}`{keys}", visible(&change.change), visible(&change.subscriber)));
    }
    if !changes.settings.is_empty() {
        lines.push(format!("changed {}", listed(&changes.settings)));
    }
    if lines.is_empty() {
        lines.push("Nothing has changed.".to_owned());
    }
    if !changes.needs_restart.is_empty() {
        lines.push(format!("Used after a restart: {}", listed(&changes.needs_restart)));
    }
    if !answer.not_bound.is_empty() {
        lines.push(format!(
            "Not bound yet, and retried until it succeeds; the log says why: {}",
            listed(&answer.not_bound)
        ));
    }
    lines.iter().map(|line| format!("{line}\n")).collect()
}

/// Texts of the daemon, safe to show.
pub(super) fn listed<'t>(texts: impl IntoIterator<Item = &'t String>) -> String {
    texts.into_iter().map(|text| visible(text)).collect::<Vec<_>>().join(", ")
}

/// An answer as it is read, and as it arrived: a newer daemon may say more.
#[derive(Debug)]
pub(super) struct Answer<A> {
    pub(super) read: A,
    pub(super) raw: Value,
}

/// A change of a subscriber; `version` is the `If-Match` of one that there is.
#[derive(Debug)]
pub(super) enum Change<'c> {
    Patch { patch: &'c Document, version: &'c str },
    Remove { version: &'c str },
}

/// The end of a change.
#[derive(Debug)]
pub(super) enum Done<A> {
    Done(A),
    /// Nothing was done: the subscriber has another version by now, or is gone.
    OtherVersion,
}

/// The running daemon of a configuration.
#[derive(Debug)]
pub(super) struct Daemon<'c> {
    asked: &'c Asked,
    address: SocketAddr,
    client: reqwest::Client,
}

/// Whether the daemon of a configuration runs.
#[derive(Debug)]
pub(super) enum Found<'c> {
    Daemon(Daemon<'c>),
    /// Nothing answers, for this reason.
    Absent(String),
}

/// The reason not to ask the program that listens there.
enum Stranger {
    /// Nothing answers.
    Absent(String),
    /// It is another program, or the daemon of another configuration.
    Other(String),
}

impl<'c> Daemon<'c> {
    pub(super) fn of(asked: &'c Asked) -> Result<Self, Failed> {
        let address = reachable(asked.admin.listen)?;
        let client = reqwest::Client::builder()
            .no_proxy()
            .timeout(TIMEOUT)
            .build()
            .map_err(|e| no_daemon(address, &e))?;
        Ok(Self { asked, address, client })
    }

    /// Gets a path below `/api/v1/`.
    pub(super) async fn get<A: DeserializeOwned>(&self, path: &str) -> Result<Answer<A>, Failed> {
        let raw = self.ask(self.client.get(self.url(path))).await?;
        Ok(Answer { read: self.read(&raw)?, raw })
    }

    /// Gets a path below `/api/v1/`; `None` if the daemon says that there is no such thing.
    pub(super) async fn get_if_there<A: DeserializeOwned>(
        &self,
        path: &str,
    ) -> Result<Option<Answer<A>>, Failed> {
        let (status, body) = self.answered(self.client.get(self.url(path))).await?;
        if status == reqwest::StatusCode::NOT_FOUND && error(&body).is_some() {
            return Ok(None);
        }
        let raw = self.successful(status, body)?;
        Ok(Some(Answer { read: self.read(&raw)?, raw }))
    }

    /// The daemon, if one listens there. An error if another program does.
    pub(super) async fn find(self) -> Result<Found<'c>, Failed> {
        match self.meet().await {
            Ok(()) => Ok(Found::Daemon(self)),
            Err(Stranger::Absent(why)) => Ok(Found::Absent(why)),
            Err(Stranger::Other(why)) => Err(Failed::Runtime(why)),
        }
    }

    pub(super) async fn post<A: DeserializeOwned>(
        &self,
        path: &str,
        wanted: &impl Serialize,
    ) -> Result<A, Failed> {
        let wanted = serde_json::to_string(wanted).map_err(|e| Failed::Runtime(e.to_string()))?;
        let request = self.client.post(self.url(path)).header("content-type", "application/json");
        self.read(&self.ask(request.body(wanted)).await?)
    }

    /// Posts with a key by which the daemon knows the request again, so that it is sent again if its
    /// answer is lost. `see`: the command that shows what it has made.
    pub(super) async fn post_once<A: DeserializeOwned>(
        &self,
        path: &str,
        wanted: &impl Serialize,
        see: &str,
    ) -> Result<A, Failed> {
        let wanted = serde_json::to_string(wanted).map_err(|e| Failed::Runtime(e.to_string()))?;
        let key = clock::request_key();
        let mut tries = 0;
        loop {
            let request = self
                .client
                .post(self.url(path))
                .header("content-type", "application/json")
                .header("idempotency-key", format!("\"{key}\""))
                .body(wanted.clone());
            let lost = match self.meet().await {
                Ok(()) => match self.authorized(request).await {
                    Ok((status, body)) => return self.read(&self.successful(status, body)?),
                    Err(why) => why,
                },
                Err(Stranger::Absent(why)) if tries > 0 => why,
                Err(stranger) => return Err(self.not_met(stranger)),
            };
            tries += 1;
            if tries == TRIES {
                return Err(self.lost(&lost, see));
            }
            tokio::time::sleep(AGAIN).await;
        }
    }

    /// Makes a subscriber. `see`: the command that shows whether that was done.
    pub(super) async fn make<A: DeserializeOwned>(
        &self,
        path: &str,
        keys: &Document,
        see: &str,
    ) -> Result<A, Failed> {
        let request = self.client.post(self.url(path));
        let (status, body) = self.once(with_keys(request, keys), see).await?;
        self.read(&self.successful(status, body)?)
    }

    /// Changes or removes a subscriber. `see`: the command that shows whether that was done.
    pub(super) async fn change<A: DeserializeOwned>(
        &self,
        path: &str,
        change: Change<'_>,
        see: &str,
    ) -> Result<Done<A>, Failed> {
        let url = self.url(path);
        let (request, version) = match change {
            Change::Patch { patch, version } => (with_keys(self.client.patch(url), patch), version),
            Change::Remove { version } => (self.client.delete(url), version),
        };
        let (status, body) = self.once(request.header("if-match", version), see).await?;
        if status == reqwest::StatusCode::PRECONDITION_FAILED && error(&body).is_some() {
            return Ok(Done::OtherVersion);
        }
        Ok(Done::Done(self.read(&self.successful(status, body)?)?))
    }

    /// Sends a request that must not be repeated, and returns any answer.
    async fn once(
        &self,
        request: reqwest::RequestBuilder,
        see: &str,
    ) -> Result<(reqwest::StatusCode, Value), Failed> {
        self.meet().await.map_err(|stranger| self.not_met(stranger))?;
        self.authorized(request).await.map_err(|why| self.lost(&why, see))
    }

    /// The error for a request without an answer.
    fn lost(&self, why: &str, see: &str) -> Failed {
        Failed::Runtime(format!(
            "the answer of the daemon at {} is lost ({why}), so that it is not known whether the request was done: see `{see}`",
            self.address
        ))
    }

    fn not_met(&self, stranger: Stranger) -> Failed {
        match stranger {
            Stranger::Absent(why) => no_daemon(self.address, &why),
            Stranger::Other(why) => Failed::Runtime(why),
        }
    }

    fn read<A: DeserializeOwned>(&self, answer: &Value) -> Result<A, Failed> {
        A::deserialize(answer).map_err(|e| {
            Failed::Runtime(format!(
                "the daemon at {} gave an answer that this version of hooktrail does not understand: {e}",
                self.address
            ))
        })
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}/api/v1/{path}", self.address)
    }

    async fn ask(&self, request: reqwest::RequestBuilder) -> Result<Value, Failed> {
        let (status, body) = self.answered(request).await?;
        self.successful(status, body)
    }

    /// Sends a request to the daemon of this configuration, and returns any answer.
    async fn answered(
        &self,
        request: reqwest::RequestBuilder,
    ) -> Result<(reqwest::StatusCode, Value), Failed> {
        self.meet().await.map_err(|stranger| self.not_met(stranger))?;
        self.authorized(request).await.map_err(|e| no_daemon(self.address, &e))
    }

    fn successful(&self, status: reqwest::StatusCode, body: Value) -> Result<Value, Failed> {
        if status.is_success() {
            return Ok(body);
        }
        let why =
            error(&body).map_or_else(|| "it is no hooktrail, perhaps".to_owned(), |e| visible(&e));
        Err(Failed::Runtime(format!("the daemon at {} answered {status}: {why}", self.address)))
    }

    /// Makes sure that the daemon of this configuration listens there. Before that nothing is asked
    /// of it, and the token is not sent.
    async fn meet(&self) -> Result<(), Stranger> {
        let address = self.address;
        let other = |why: &str| {
            Err(Stranger::Other(format!("the program at {address} ([admin] listen) {why}")))
        };
        let challenge = handshake::challenge();
        let (status, answer) = self.introduced(&challenge).await.map_err(Stranger::Absent)?;
        if status == reqwest::StatusCode::UNAUTHORIZED {
            return other(match self.asked.admin.command_token() {
                Some(_) => {
                    "has another token than [admin] token of this configuration; a daemon uses a changed token after a restart. \
                     The token was not sent"
                }
                None if self.asked.admin.tokens.is_empty() => {
                    "asks for a token; set [admin] token to that of its daemon"
                }
                None => {
                    "asks for a token that commands may use: set [admin] token, or one of [[admin.tokens]] with the role `admin`"
                }
            });
        }
        let Some(it) = answer.filter(|_| status.is_success()) else {
            return other(
                "is no hooktrail, or one of another version: nothing was asked of it. Find out which program it is with `ss -ltnp`, or give \
                 this configuration another [admin] listen",
            );
        };
        if let Some(token) = self.asked.admin.command_token()
            && !it.proof.is_some_and(|proof| {
                handshake::is_proven(token, Side::Daemon, &challenge, address.port(), &proof)
            })
        {
            return other(
                "does not know [admin] token of this configuration, which was not sent to it. If it is your daemon: it was started before \
                 the token was set, restart it. Otherwise find out which program it is with `ss -ltnp`",
            );
        }
        if is_same_file(&self.asked.config, Path::new(&it.config)) {
            return Ok(());
        }
        other(&format!(
            "is the daemon of another configuration, {} (process {}): nothing was asked of it. Name that one with --config, or give this one, \
             {}, an [admin] listen of its own, and start its daemon",
            visible(&it.config),
            it.pid,
            self.asked.config.display()
        ))
    }

    /// Asks the listener which daemon it is, without sending the token.
    async fn introduced(
        &self,
        challenge: &str,
    ) -> Result<(reqwest::StatusCode, Option<Introduction>), String> {
        let mut request = self.client.get(self.url("daemon")).timeout(INTRODUCTION_TIMEOUT);
        if let Some(token) = self.asked.admin.command_token() {
            let proof = handshake::proof(token, Side::Command, challenge, self.address.port());
            request =
                request.header(handshake::CHALLENGE, challenge).header(handshake::PROOF, proof);
        }
        let (status, answer) = send(request).await?;
        Ok((status, serde_json::from_value(answer).ok()))
    }

    /// Sends a request with the token, only after [`meet`](Self::meet), and returns any answer; an
    /// error if there is none.
    async fn authorized(
        &self,
        mut request: reqwest::RequestBuilder,
    ) -> Result<(reqwest::StatusCode, Value), String> {
        if let Some(token) = self.asked.admin.command_token() {
            request = request.bearer_auth(token.expose());
        }
        send(request).await
    }
}

fn with_keys(request: reqwest::RequestBuilder, keys: &Document) -> reqwest::RequestBuilder {
    request.header("content-type", "application/json").body(keys.text().expose().to_owned())
}

async fn send(request: reqwest::RequestBuilder) -> Result<(reqwest::StatusCode, Value), String> {
    let answer = request.send().await.map_err(|e| {
        // "error sending request" says nothing; its innermost cause does.
        let e = e.without_url();
        let mut why: &dyn std::error::Error = &e;
        while let Some(cause) = why.source() {
            why = cause;
        }
        why.to_string()
    })?;
    let status = answer.status();
    Ok((
        status,
        answer.bytes().await.ok().and_then(|b| serde_json::from_slice(&b).ok()).unwrap_or_default(),
    ))
}

/// A text of an operator's as one part of a path: it selects no other request.
pub(super) fn segment(text: &str) -> String {
    let encoded: String = form_urlencoded::byte_serialize(text.as_bytes()).collect();
    // In a path a plus sign is no space, and dots alone lead elsewhere.
    match encoded.as_str() {
        "." | ".." => format!("{encoded}%20"),
        _ => encoded.replace('+', "%20"),
    }
}

/// The reason of a refusal.
fn error(answer: &Value) -> Option<String> {
    Problem::deserialize(answer).ok().map(|problem| problem.detail)
}

/// Whether two paths name the same configuration: as they are written, or by where their links
/// lead.
fn is_same_file(ours: &Path, theirs: &Path) -> bool {
    let written = std::path::absolute(ours)
        .is_ok_and(|ours| ours.display().to_string() == theirs.display().to_string());
    written
        || std::fs::canonicalize(ours)
            .is_ok_and(|ours| std::fs::canonicalize(theirs).is_ok_and(|theirs| ours == theirs))
}

/// The error for an address that a daemon cannot listen on: which program has it, and the remedy.
pub(super) async fn cannot_listen(config: &Config, why: &std::io::Error) -> Failed {
    let listen = config.admin.listen;
    let who = if why.kind() == std::io::ErrorKind::AddrInUse {
        format!(", {}", holder(config).await)
    } else {
        String::new()
    };
    let next = SocketAddr::new(listen.ip(), listen.port().checked_add(1).unwrap_or(8787));
    Failed::Runtime(format!(
        "cannot listen on {listen} ([admin] listen): {why}{who}; end it, or give this configuration an address of its own, such as \
         [admin] listen = \"{next}\""
    ))
}

/// The program that listens at the address of a configuration.
async fn holder(config: &Config) -> String {
    let asked = Asked { admin: config.admin.clone(), config: config.path.clone() };
    let program =
        || format!("by a program that `ss -ltnp 'sport = :{}'` shows", config.admin.listen.port());
    let Ok(daemon) = Daemon::of(&asked) else { return program() };
    match daemon.introduced(&handshake::challenge()).await {
        Ok((_, Some(it))) if is_same_file(&config.path, Path::new(&it.config)) => {
            format!("by a daemon that runs with this configuration already (process {})", it.pid)
        }
        Ok((_, Some(it))) => format!(
            "by the daemon of another configuration, {} (process {})",
            visible(&it.config),
            it.pid
        ),
        Ok((reqwest::StatusCode::UNAUTHORIZED, None)) => {
            format!("perhaps by a daemon with another [admin] token, {}", program())
        }
        Ok(_) | Err(_) => program(),
    }
}

fn no_daemon(address: SocketAddr, why: &dyn std::fmt::Display) -> Failed {
    Failed::Runtime(format!(
        "no daemon answers at {address} ([admin] listen), and this needs a running one: {why}"
    ))
}

/// The address by which a listener is reached on this machine.
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

/// The timeout of a preview of a reload: the daemon only reads some files.
const PLAN_TIMEOUT: Duration = Duration::from_secs(10);

/// The effect that a reload of the running daemon would have.
pub(super) enum ReloadPreview {
    Changes {
        address: SocketAddr,
        answer: Answer<view::ReloadPreview>,
    },
    /// The daemon's configuration has mistakes.
    Refused {
        address: SocketAddr,
        error: String,
    },
    /// No daemon answers.
    Unknown {
        why: String,
    },
}

/// Asks the daemon what a reload would change; it changes nothing.
pub(super) async fn preview_reload(config: &Config) -> Result<ReloadPreview, Failed> {
    let asked = Asked { admin: config.admin.clone(), config: config.path.clone() };
    let daemon = match Daemon::of(&asked) {
        Ok(daemon) => daemon,
        Err(Failed::Usage(why)) => return Ok(ReloadPreview::Unknown { why }),
        Err(other) => return Err(other),
    };
    let address = daemon.address;
    let absent = |why: String| ReloadPreview::Unknown {
        why: format!("no daemon answers at {address} ([admin] listen): {why}"),
    };
    match daemon.meet().await {
        Ok(()) => {}
        Err(Stranger::Absent(why)) => return Ok(absent(why)),
        Err(Stranger::Other(why)) => return Ok(ReloadPreview::Unknown { why }),
    }
    let (status, answer) = match daemon
        .authorized(daemon.client.get(daemon.url("reload")).timeout(PLAN_TIMEOUT))
        .await
    {
        Ok(answered) => answered,
        Err(why) => return Ok(absent(why)),
    };
    let (error, read) = (error(&answer), view::ReloadPreview::deserialize(&answer));
    Ok(match (status.as_u16(), error, read) {
        (200, None, Ok(read)) => {
            ReloadPreview::Changes { address, answer: Answer { read, raw: answer } }
        }
        (422, Some(error), _) => ReloadPreview::Refused { address, error },
        (status, error, _) => {
            let error = error.map_or_else(
                || "it is no hooktrail, or one of another version, perhaps".to_owned(),
                |e| visible(&e),
            );
            ReloadPreview::Unknown {
                why: format!("the program at {address} answered {status}: {error}"),
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_of_a_path_leads_nowhere_else() {
        for text in ["a/../b", "../x", "..", ".", "a?b=c#d", "a b+c", "%2e%2e", "ä😀"] {
            let url =
                reqwest::Url::parse(&format!("http://a/v1/{}/end", segment(text))).expect("a URL");
            let parts: Vec<&str> = url.path().split('/').collect();
            assert!(parts.len() == 4 && (parts[1], parts[3]) == ("v1", "end"), "{text}: {url}");
        }
        assert_eq!(segment("msg_1-x.y"), "msg_1-x.y");
    }
}

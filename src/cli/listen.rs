//! `listen`: a receiver for trying things out.

use std::{
    collections::HashSet,
    path::Path,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use axum::{
    Router,
    body::Bytes,
    extract::{DefaultBodyLimit, State},
    http::{HeaderMap, StatusCode},
};
use serde_json::value::RawValue;
use tokio::net::TcpListener;

use super::{Failed, visible};
use crate::{
    clock,
    secret::Secret,
    signature::{self, Unverified},
    wording::counted,
};

/// Larger than any request that hooktrail sends.
const MAX_BODY: usize = 16 * 1024 * 1024;

/// Ids remembered, to tell a repeat.
const MAX_IDS: usize = 100_000;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Where to listen; port 0 takes a free one
    #[arg(long, default_value = "127.0.0.1:9000", value_parser = parse_addr, value_name = "HOST:PORT")]
    addr: String,
    /// The secret to verify with, or `file:PATH` to keep it out of the process list; twice for a rotation.
    /// Without one nothing is verified. An unverified request is answered 401
    #[arg(long, env = "HOOKTRAIL_LISTEN_SECRET", hide_env_values = true, value_name = "SECRET")]
    secret: Vec<String>,
    /// The status of each answer
    #[arg(long, default_value_t = 200, value_name = "CODE", value_parser = clap::value_parser!(u16).range(200..=599))]
    status: u16,
    /// Answer 503 to the first N requests
    #[arg(long, default_value_t = 0, value_name = "N")]
    fail_first: u64,
    /// Answer 503 to this share of the requests, from 0 to 1
    #[arg(long, default_value_t = 0.0, value_parser = parse_share, value_name = "P")]
    fail_rate: f64,
    /// Wait so long before each answer
    #[arg(long, default_value = "0s", value_parser = humantime::parse_duration, value_name = "DURATION")]
    delay: Duration,
    /// One JSON object a request instead of text
    #[arg(long)]
    json: bool,
}

fn parse_addr(text: &str) -> Result<String, &'static str> {
    let port = text.rsplit_once(':').filter(|(host, _)| !host.is_empty()).and_then(|(_, port)| port.parse::<u16>().ok());
    port.map(|_| text.to_owned()).ok_or("write a host and a port from 0 to 65535, such as 127.0.0.1:9000 or [::1]:9000")
}

fn parse_share(text: &str) -> Result<f64, &'static str> {
    text.parse().ok().filter(|share| (0.0..=1.0).contains(share)).ok_or("write a share from 0 to 1, such as 0.2")
}

struct Listener {
    args: Args,
    secrets: Vec<Secret>,
    requests: AtomicU64,
    seen: Mutex<HashSet<String>>,
}

pub(super) async fn run(args: Args) -> Result<(), Failed> {
    let secrets = args.secret.iter().map(|s| read_secret(s)).collect::<Result<Vec<_>, _>>()?;
    let socket = TcpListener::bind(&args.addr).await.map_err(|e| {
        Failed::Runtime(format!("cannot listen on {}: {e}; choose another with --addr HOST:PORT, port 0 takes a free one", args.addr))
    })?;
    eprintln!("listening on http://{}/{}", socket.local_addr()?, if secrets.is_empty() { ", verifying nothing (no --secret)" } else { "" });
    let listener = Arc::new(Listener { args, secrets, requests: AtomicU64::new(0), seen: Mutex::default() });
    let app = Router::new().fallback(receive).layer(DefaultBodyLimit::max(MAX_BODY)).with_state(listener);
    let stop = async {
        let mut term = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()).ok();
        let terminated = async {
            match &mut term {
                Some(t) => drop(t.recv().await),
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = terminated => {}
            _ = tokio::signal::ctrl_c() => {}
        }
    };
    // Not gracefully: the daemon keeps connections open, and a receiver for trying out stops at once.
    tokio::select! {
        served = axum::serve(socket, app) => served.map_err(Failed::from),
        () = stop => Ok(()),
    }
}

fn read_secret(given: &str) -> Result<Secret, Failed> {
    let Some(path) = given.strip_prefix("file:") else { return Ok(Secret::new(given)) };
    let text = std::fs::read_to_string(Path::new(path)).map_err(|e| Failed::Usage(format!("--secret file {path} cannot be read: {e}")))?;
    Ok(Secret::new(text.strip_suffix('\n').unwrap_or(&text)))
}

async fn receive(State(listener): State<Arc<Listener>>, headers: HeaderMap, body: Bytes) -> StatusCode {
    let nth = listener.requests.fetch_add(1, Ordering::Relaxed);
    let verified = listener.verify(&headers, &body);
    tokio::time::sleep(listener.args.delay).await;
    let status = if nth < listener.args.fail_first || clock::random() < listener.args.fail_rate {
        503
    } else if matches!(verified, Some(Err(_))) {
        401
    } else {
        listener.args.status
    };
    listener.show(&headers, &body, verified, status);
    StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
}

fn header<'h>(headers: &'h HeaderMap, name: &str) -> Option<&'h str> {
    headers.get(name).and_then(|v| v.to_str().ok())
}

impl Listener {
    /// `None` without a secret. With several any one of them will do.
    fn verify(&self, headers: &HeaderMap, body: &[u8]) -> Option<Result<&'static str, Unverified>> {
        let now = clock::unix_seconds(clock::now());
        let mut results = self.secrets.iter().map(|s| signature::verify(s, |name| header(headers, name), body, now));
        let first = results.next()?;
        Some(results.fold(first, |best, next| if best.is_ok() { best } else { next.or(best) }))
    }

    fn show(&self, headers: &HeaderMap, body: &[u8], verified: Option<Result<&'static str, Unverified>>, status: u16) {
        let id = header(headers, "webhook-id");
        let attempt = header(headers, "x-hooktrail-attempt");
        let repeat = id.is_some_and(|id| !self.remember(id));
        let events = events_of(body, header(headers, "content-type").unwrap_or_default());
        let at = clock::rfc3339(clock::now());
        if self.args.json {
            let line = Line {
                at: &at,
                batch_id: id,
                attempt: attempt.and_then(|a| a.parse().ok()),
                repeat,
                verified: verified.map(|v| v.is_ok()),
                unverified_because: verified.and_then(|v| v.err().map(|e| e.to_string())),
                status,
                bytes: body.len(),
                error: events.as_ref().err(),
                events: events.as_ref().ok(),
            };
            let line = serde_json::to_string(&line).unwrap_or_else(|e| format!("{{\"error\":\"{e}\"}}"));
            println!("{line}");
            return;
        }
        let verified = match verified {
            None => "not verified (no secret)".to_owned(),
            Some(Ok(scheme)) => format!("verified ({scheme})"),
            Some(Err(why)) => format!("NOT VERIFIED: {why}"),
        };
        let count = events.as_ref().map_or(0, Vec::len);
        let repeat = if repeat { ", seen before" } else { "" };
        println!(
            "{at}  {}  attempt {}{repeat}: {}, {}, {verified}, answered {status}",
            id.unwrap_or("(no webhook-id)"),
            attempt.unwrap_or("?"),
            counted(count, "event(s)"),
            counted(body.len(), "byte(s)")
        );
        match events {
            Ok(events) => events.iter().for_each(|e| println!("    {}", one_line(e.get()))),
            Err(why) => println!("    not readable: {}", visible(&why)),
        }
    }

    /// Whether the id is new.
    fn remember(&self, id: &str) -> bool {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        if seen.len() >= MAX_IDS {
            seen.clear();
        }
        seen.insert(id.to_owned())
    }
}

/// A request as `--json` prints it; the events with the bytes they came with.
#[derive(serde::Serialize)]
struct Line<'a> {
    at: &'a str,
    batch_id: Option<&'a str>,
    attempt: Option<u64>,
    /// The id was seen before.
    repeat: bool,
    /// Absent without a secret.
    verified: Option<bool>,
    unverified_because: Option<String>,
    status: u16,
    bytes: usize,
    error: Option<&'a String>,
    events: Option<&'a Vec<Box<RawValue>>>,
}

/// The events of a body with their bytes as they came.
fn events_of(body: &[u8], content_type: &str) -> Result<Vec<Box<RawValue>>, String> {
    #[derive(serde::Deserialize)]
    struct Payload {
        events: Vec<Box<RawValue>>,
    }
    if content_type == "application/jsonl" {
        let lines = serde_json::Deserializer::from_slice(body).into_iter();
        return lines.collect::<Result<_, _>>().map_err(|e| e.to_string());
    }
    serde_json::from_slice::<Payload>(body).map(|p| p.events).map_err(|e| e.to_string())
}

/// What a person wants to know of an audit event; anything else as it is.
fn one_line(event: &str) -> String {
    #[derive(serde::Deserialize)]
    struct Named {
        name: String,
    }
    #[derive(serde::Deserialize)]
    struct Audit {
        event: String,
        description: String,
        actor: Named,
        resource: Option<Named>,
    }
    match serde_json::from_str::<Audit>(event) {
        Ok(a) => {
            let resource = a.resource.map(|r| format!(" ({})", r.name)).unwrap_or_default();
            visible(&format!("{:<40} {} {}{resource}", a.event, a.actor.name, a.description))
        }
        // A line break here stands between tokens.
        Err(_) => visible(&event.replace(['\n', '\r'], " ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_shown_for_people_or_as_they_are() {
        let audit = r#"{"event":"activity_log.user.login","description":"logged in with SSO","actor":{"id":1,"type":"user","name":"John Doe"},"timestamp":1}"#;
        assert_eq!(one_line(audit), format!("{:<40} John Doe logged in with SSO", "activity_log.user.login"));
        assert_eq!(one_line("{\"event\":\n18446744073709551616}"), "{\"event\": 18446744073709551616}");
        // Escaped or raw, nobody's event drives the terminal.
        let hostile = audit.replace("John Doe", r"\u001b[2JJohn\nDoe");
        assert_eq!(one_line(&hostile), format!(r"{:<40} \u{{1b}}[2JJohn\u{{a}}Doe logged in with SSO", "activity_log.user.login"));
        assert_eq!(one_line("{\"event\":\"\u{9b}2J\u{7f}\"}"), r#"{"event":"\u{9b}2J\u{7f}"}"#);
    }

    #[test]
    fn both_formats_are_read() {
        let json = events_of(br#"{"events":[{"event":"a"},{"event":"b"}]}"#, "application/json").expect("json");
        let lines = events_of(b"{\"event\":\"a\"}\n{\"event\":\"b\"}\n", "application/jsonl").expect("lines");
        assert_eq!(json.iter().map(|e| e.get()).collect::<Vec<_>>(), lines.iter().map(|e| e.get()).collect::<Vec<_>>());
        assert!(events_of(b"nonsense", "application/json").is_err());
    }
}

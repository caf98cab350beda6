//! `listen`: a receiver for trying things out.

mod emulator;

use std::{
    collections::{BTreeMap, HashSet},
    fmt,
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
    http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header},
};
use serde_json::value::RawValue;
use tokio::net::TcpListener;

use self::emulator::{Given, Verdict};
use super::{failed::Failed, text::visible};
use crate::{
    clock,
    config::model::{Model, Refusal},
    crypto::{
        secret::Secret,
        signature::{self, Unverified},
    },
    delivery::BatchId,
    event::{Pattern, event_type, inflate::gunzip},
    wording::counted,
};

/// The longest body in bytes, longer than any request of hooktrail.
const MAX_BODY: usize = 16 * 1024 * 1024;

/// The number of ids that are remembered, to recognise a repeat.
const MAX_IDS: usize = 100_000;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The address to listen on; port 0 takes a free one
    #[arg(long, default_value = "127.0.0.1:9000", value_parser = parse_addr, value_name = "HOST:PORT")]
    addr: String,
    /// The secret to verify with, or `file:PATH` to keep it out of the process list; twice for a
    /// rotation. A public key, whpk_…, verifies `v1a`. Without one nothing is verified. An unverified request is answered 401
    #[arg(long, env = "HOOKTRAIL_LISTEN_SECRET", hide_env_values = true, value_name = "SECRET")]
    secret: Vec<String>,
    /// Be this receiver: refuse what it would refuse, and answer as it does. With --secret the keys,
    /// tokens and signatures of requests must be right
    #[arg(long = "as", value_name = "RECEIVER", value_parser = parse_model)]
    model: Option<&'static Model>,
    /// The status of each answer; a receiver of --as has its own
    #[arg(long, default_value_t = 200, value_name = "CODE", value_parser = clap::value_parser!(u16).range(200..=599))]
    status: u16,
    /// Answer 503 to the first N requests
    #[arg(long, default_value_t = 0, value_name = "N")]
    fail_first: u64,
    /// Answer 503 to this share of the requests, from 0 to 1
    #[arg(long, default_value_t = 0.0, value_parser = parse_share, value_name = "P")]
    fail_rate: f64,
    /// Refuse, with 422, each request with an event whose type matches this AMQP topic pattern,
    /// such as `user.*`; may be given more than once. If other events are accepted, the daemon
    /// halves a refused batch until the refused events are alone
    #[arg(long, value_name = "PATTERN", value_parser = Pattern::try_new)]
    refuse: Vec<Pattern>,
    /// The wait before each answer
    #[arg(long, default_value = "0s", value_parser = super::arguments::duration, value_name = "DURATION")]
    delay: Duration,
    /// The `Retry-After` of each answer that is not a success
    #[arg(long, value_parser = super::arguments::duration, value_name = "DURATION")]
    retry_after: Option<Duration>,
    /// A header of each answer, such as `x-request-id=7`; may be given more than once
    #[arg(long, value_name = "NAME=VALUE", value_parser = parse_header)]
    header: Vec<(HeaderName, HeaderValue)>,
    /// One JSON object a request instead of text
    #[arg(long)]
    json: bool,
    /// Print only the number of requests, at the end
    #[arg(long, short)]
    quiet: bool,
}

fn parse_addr(text: &str) -> Result<String, &'static str> {
    let port = text
        .rsplit_once(':')
        .filter(|(host, _)| !host.is_empty())
        .and_then(|(_, port)| port.parse::<u16>().ok());
    port.map(|_| text.to_owned())
        .ok_or("write a host and a port from 0 to 65535, such as 127.0.0.1:9000 or [::1]:9000")
}

fn parse_model(name: &str) -> Result<&'static Model, String> {
    Model::named(name).ok_or_else(|| format!("write one of {}", Model::NAMES.join(", ")))
}

fn parse_share(text: &str) -> Result<f64, &'static str> {
    text.parse()
        .ok()
        .filter(|share| (0.0..=1.0).contains(share))
        .ok_or("write a share from 0 to 1, such as 0.2")
}

fn parse_header(text: &str) -> Result<(HeaderName, HeaderValue), &'static str> {
    const EXPECTED: &str = "write a name and a value, such as x-request-id=7";
    let (name, value) = text.split_once('=').ok_or(EXPECTED)?;
    let (name, value) = (name.trim().parse::<HeaderName>(), HeaderValue::from_str(value.trim()));
    let (name, value) = name.ok().zip(value.ok()).ok_or(EXPECTED)?;
    if [header::CONTENT_LENGTH, header::TRANSFER_ENCODING, header::CONNECTION].contains(&name) {
        return Err("this header says how the answer itself is sent; choose another");
    }
    Ok((name, value))
}

struct Listener {
    args: Args,
    secrets: Vec<Secret>,
    requests: AtomicU64,
    seen: Mutex<HashSet<String>>,
    totals: Mutex<Totals>,
}

/// The counts that `--quiet` prints at the end.
#[derive(Debug, Default, serde::Serialize)]
struct Totals {
    requests: u64,
    /// Requests whose id was seen before.
    repeats: u64,
    events: u64,
    /// The number of answers by status.
    statuses: BTreeMap<u16, u64>,
}

impl fmt::Display for Totals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let statuses: Vec<String> = self
            .statuses
            .iter()
            .map(|(status, n)| format!("{status} {}", counted(*n, "time(s)")))
            .collect();
        write!(
            f,
            "{} with {}",
            counted(self.requests, "request(s)"),
            counted(self.events, "event(s)")
        )?;
        if self.repeats > 0 {
            write!(f, ", {} an id seen before", counted(self.repeats, "of them (has|have)"))?;
        }
        if statuses.is_empty() { Ok(()) } else { write!(f, "; answered {}", statuses.join(", ")) }
    }
}

pub(super) async fn run(args: Args) -> Result<(), Failed> {
    let is_signed =
        |model: &Model| model.signature.is_some_and(|(name, _)| name == "webhook-signature");
    let any_text = args.model.is_some_and(|model| !is_signed(model));
    let secrets =
        args.secret.iter().map(|s| read_secret(s, any_text)).collect::<Result<Vec<_>, _>>()?;
    let socket = TcpListener::bind(&args.addr).await.map_err(|e| {
        Failed::Runtime(format!("cannot listen on {}: {e}; choose another with --addr HOST:PORT, port 0 takes a free one", args.addr))
    })?;
    eprintln!(
        "listening on http://{}/{}",
        socket.local_addr()?,
        match (&args.model, secrets.is_empty()) {
            (Some(model), no_keys) => format!(
                ", as {} ({}, read on {}){}",
                model.title,
                model.documentation,
                model.read,
                if no_keys { "; any key is right (no --secret)" } else { "" }
            ),
            (None, true) => ", verifying nothing (no --secret)".to_owned(),
            (None, false) => String::new(),
        }
    );
    let listener = Arc::new(Listener {
        args,
        secrets,
        requests: AtomicU64::new(0),
        seen: Mutex::default(),
        totals: Mutex::default(),
    });
    let app = Router::new()
        .fallback(receive)
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .with_state(listener.clone());
    let stop = async {
        let mut term =
            tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()).ok();
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
    // Not a graceful stop, which would wait for the connections that the daemon keeps open.
    tokio::select! {
        served = axum::serve(socket, app) => served.map_err(Failed::from),
        () = stop => {
            listener.sum_up();
            Ok(())
        }
    }
}

/// `any_text`: a key of a receiver of `--as`, which is no signing secret.
fn read_secret(given: &str, any_text: bool) -> Result<Secret, Failed> {
    let (secret, whence) = match given.strip_prefix("file:") {
        None => (given.to_owned(), "--secret".to_owned()),
        Some(path) => {
            let text = std::fs::read_to_string(Path::new(path));
            let text = text
                .map_err(|e| Failed::Usage(format!("--secret file {path} cannot be read: {e}")))?;
            // Trimmed as the daemon does.
            let text =
                text.strip_suffix('\n').map(|t| t.strip_suffix('\r').unwrap_or(t)).unwrap_or(&text);
            (text.to_owned(), format!("--secret file {path}"))
        }
    };
    let bad = |why: &str| {
        Err(Failed::Usage(format!(
            "{whence} {why}; `hooktrail secret` makes one, without --secret nothing is verified"
        )))
    };
    if secret.trim().is_empty() {
        return bad("(or $HOOKTRAIL_LISTEN_SECRET) is empty");
    }
    let secret = Secret::new(secret);
    match signature::standard_key(&secret) {
        _ if any_text || secret.expose().starts_with("whpk_") => Ok(secret),
        Err(why) if secret.expose().starts_with("whsec_") => bad(why),
        // The signature `mailtrap` takes any text.
        Err(_) => {
            eprintln!(
                "{whence} does not begin with `whsec_`: it verifies `mailtrap-signature`, and nothing signed as Standard Webhooks"
            );
            Ok(secret)
        }
        Ok(_) => Ok(secret),
    }
}

async fn receive(
    State(listener): State<Arc<Listener>>,
    headers: HeaderMap,
    body: Bytes,
) -> (StatusCode, HeaderMap, &'static str) {
    let nth = listener.requests.fetch_add(1, Ordering::Relaxed);
    let args = &listener.args;
    // Requests are signed before they are compressed. What does not inflate is shown as not readable.
    let is_gzip = text(&headers, "content-encoding") == Some("gzip");
    let inflated = if is_gzip { gunzip(&body, MAX_BODY).ok() } else { None };
    let verdict = args.model.map(|model| {
        let given = Given { headers: &headers, raw: &body, body: inflated.as_deref() };
        emulator::judge(model, &given, &listener.secrets, clock::now())
    });
    let body = inflated.map_or(body, Bytes::from);
    let verified = match verdict {
        Some(_) => None,
        None => listener.verify(&headers, &body),
    };
    let events = events_of(&body, text(&headers, "content-type").unwrap_or_default());
    let refused = args.refused(events.as_deref().unwrap_or_default());
    tokio::time::sleep(args.delay).await;
    let (status, answer) = if nth < args.fail_first || clock::random() < args.fail_rate {
        (503, "")
    } else if matches!(verified, Some(Err(_))) {
        (401, "")
    } else if !refused.is_empty() {
        (422, "")
    } else if let Some(verdict) = verdict.filter(|_| args.status == 200) {
        (verdict.status, verdict.body)
    } else {
        (args.status, "")
    };
    let as_model = args.model.zip(verdict);
    listener.show(&headers, body.len(), &Seen { verified, as_model, events, refused, status });
    let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    (status, args.answer_headers(status), answer)
}

/// A request and its answer.
struct Seen {
    /// `None` without a secret.
    verified: Option<Result<&'static str, Unverified>>,
    /// What a receiver of `--as` makes of it.
    as_model: Option<(&'static Model, Verdict)>,
    events: Result<Vec<Box<RawValue>>, String>,
    /// The types of the refused events, by their places.
    refused: BTreeMap<usize, String>,
    status: u16,
}

impl Args {
    fn refused(&self, events: &[Box<RawValue>]) -> BTreeMap<usize, String> {
        let types = events
            .iter()
            .enumerate()
            .filter_map(|(n, event)| Some((n, event_type(event.get().as_bytes()).ok()?)));
        let is_refused = |name: &str| self.refuse.iter().any(|pattern| pattern.matches(name));
        types.filter(|(_, name)| is_refused(name)).map(|(n, name)| (n, name.into_owned())).collect()
    }

    fn answer_headers(&self, status: StatusCode) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in &self.header {
            headers.append(name, value.clone());
        }
        if let Some(wait) = self.retry_after.filter(|_| !status.is_success()) {
            // The header has whole seconds.
            let seconds = wait.as_secs() + u64::from(wait.subsec_nanos() > 0);
            headers.insert(header::RETRY_AFTER, seconds.into());
        }
        headers
    }
}

fn text<'h>(headers: &'h HeaderMap, name: &str) -> Option<&'h str> {
    headers.get(name).and_then(|v| v.to_str().ok())
}

impl Listener {
    /// Verifies a request with any of the secrets; `None` without a secret.
    fn verify(&self, headers: &HeaderMap, body: &[u8]) -> Option<Result<&'static str, Unverified>> {
        let now = clock::unix_seconds(clock::now());
        let mut results = self
            .secrets
            .iter()
            .map(|s| signature::verify(s, |name| text(headers, name), body, now));
        let first = results.next()?;
        Some(results.fold(first, |best, next| if best.is_ok() { best } else { next.or(best) }))
    }

    fn show(&self, headers: &HeaderMap, bytes: usize, seen: &Seen) {
        let Seen { verified, as_model, events, refused, status } = seen;
        let id = text(headers, "webhook-id");
        let attempt = text(headers, "x-hooktrail-attempt");
        let repeat = id.is_some_and(|id| !self.remember(id));
        let count = events.as_ref().map_or(0, Vec::len);
        self.count(count, repeat, *status);
        if self.args.quiet {
            return;
        }
        let at = clock::rfc3339(clock::now());
        if self.args.json {
            let line = Line {
                at: &at,
                batch_id: id,
                attempt: attempt.and_then(|a| a.parse().ok()),
                repeat,
                verified: verified.map(|v| v.is_ok()),
                refused_because: as_model
                    .and_then(|(_, verdict)| verdict.refusal)
                    .map(Refusal::name),
                dropped: as_model.map_or(0, |(_, verdict)| verdict.dropped),
                unverified_because: verified.and_then(|v| v.err().map(|e| e.to_string())),
                status: *status,
                refused: refused.values().collect(),
                bytes,
                error: events.as_ref().err(),
                events: events.as_ref().ok(),
            };
            let line =
                serde_json::to_string(&line).unwrap_or_else(|e| format!("{{\"error\":\"{e}\"}}"));
            println!("{line}");
            return;
        }
        let verified = match (verified, as_model) {
            (_, Some((model, verdict))) => verdict.words(model),
            (None, None) => "not verified (no secret)".to_owned(),
            (Some(Ok(scheme)), None) => format!("verified ({scheme})"),
            (Some(Err(why)), None) => format!("NOT VERIFIED: {why}"),
        };
        let part = if id.is_some_and(|id| BatchId::from(id).is_half()) {
            ", a part of a batch that was halved"
        } else {
            ""
        };
        let repeat = if repeat { ", seen before" } else { "" };
        println!(
            "{at}  {}  attempt {}{part}{repeat}: {}, {}, {verified}, answered {status}",
            id.map_or_else(|| "(no webhook-id)".to_owned(), visible),
            attempt.map_or_else(|| "?".to_owned(), visible),
            counted(count, "event(s)"),
            counted(bytes, "byte(s)")
        );
        match events {
            Ok(events) => {
                for (n, event) in events.iter().enumerate() {
                    let mark = if refused.contains_key(&n) { "refused" } else { "" };
                    let indent = if refused.is_empty() {
                        "    ".to_owned()
                    } else {
                        format!("    {mark:<8}")
                    };
                    println!("{indent}{}", one_line(event.get()));
                }
            }
            Err(why) => println!("    not readable: {}", visible(why)),
        }
    }

    fn count(&self, events: usize, repeat: bool, status: u16) {
        let mut totals = self.totals.lock().unwrap_or_else(PoisonError::into_inner);
        totals.requests += 1;
        totals.events += events as u64;
        totals.repeats += u64::from(repeat);
        *totals.statuses.entry(status).or_default() += 1;
    }

    /// Prints the counts, if requests were not printed.
    fn sum_up(&self) {
        if !self.args.quiet {
            return;
        }
        let totals = self.totals.lock().unwrap_or_else(PoisonError::into_inner);
        if self.args.json {
            println!("{}", serde_json::json!(*totals));
        } else {
            println!("{totals}");
        }
    }

    /// Remembers an id; false if it was seen before.
    fn remember(&self, id: &str) -> bool {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        if seen.len() >= MAX_IDS {
            seen.clear();
        }
        seen.insert(id.to_owned())
    }
}

/// A request as `--json` prints it, with the exact bytes of its events.
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
    /// Why a receiver of `--as` does not take it.
    #[serde(skip_serializing_if = "Option::is_none")]
    refused_because: Option<&'static str>,
    /// Events that a receiver of `--as` drops although it has accepted them: they are too old.
    #[serde(skip_serializing_if = "is_zero")]
    dropped: usize,
    status: u16,
    /// The types of the events that were refused.
    refused: Vec<&'a String>,
    bytes: usize,
    error: Option<&'a String>,
    events: Option<&'a Vec<Box<RawValue>>>,
}

const fn is_zero(n: &usize) -> bool {
    *n == 0
}

/// The events of a body in any format, each with its exact bytes; of `slack` the lines.
fn events_of(body: &[u8], content_type: &str) -> Result<Vec<Box<RawValue>>, String> {
    let why = |e: serde_json::Error| e.to_string();
    if body.trim_ascii_start().starts_with(b"[") {
        let all: Vec<Box<RawValue>> = serde_json::from_slice(body).map_err(why)?;
        return Ok(all.into_iter().map(unwrapped).collect());
    }
    let values = serde_json::Deserializer::from_slice(body).into_iter::<Box<RawValue>>();
    let values = values.collect::<Result<Vec<_>, _>>().map_err(why)?;
    match &values[..] {
        [] if content_type != "application/jsonl" => Err("the body is empty".to_owned()),
        [one] if content_type != "application/jsonl" => events_in(one),
        _ => Ok(values.into_iter().map(unwrapped).collect()),
    }
}

/// The events of a body that is one object.
fn events_in(body: &RawValue) -> Result<Vec<Box<RawValue>>, String> {
    #[derive(serde::Deserialize)]
    struct Payload {
        event: Option<Box<RawValue>>,
        events: Option<Vec<Box<RawValue>>>,
        text: Option<String>,
    }
    match serde_json::from_str::<Payload>(body.get()).map_err(|e| e.to_string())? {
        Payload { event: Some(_), .. } => Ok(vec![unwrapped(body.to_owned())]),
        Payload { events: Some(events), .. } => Ok(events),
        Payload { text: Some(text), .. } => text
            .split('\n')
            .map(serde_json::value::to_raw_value)
            .collect::<Result<_, _>>()
            .map_err(|e| e.to_string()),
        Payload { .. } => Err("missing field `events`".to_owned()),
    }
}

/// The event in an object of `splunk_hec` or `cloudevents_batch`; anything else as it is.
fn unwrapped(value: Box<RawValue>) -> Box<RawValue> {
    #[derive(serde::Deserialize)]
    struct CloudEvent {
        #[serde(rename = "specversion")]
        _version: String,
        data: Box<RawValue>,
    }
    #[derive(serde::Deserialize)]
    struct HecEvent {
        event: Box<RawValue>,
    }
    if let Ok(CloudEvent { data, .. }) = serde_json::from_str(value.get()) {
        return data;
    }
    match serde_json::from_str::<HecEvent>(value.get()) {
        Ok(HecEvent { event }) if event.get().starts_with('{') => event,
        _ => value,
    }
}

/// An audit event for people; anything else unchanged.
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
        // A line break stands between tokens here.
        Err(_) => visible(&event.replace(['\n', '\r'], " ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser as _;

    #[test]
    fn events_are_shown_for_people_or_as_they_are() {
        let audit = r#"{"event":"activity_log.user.login","description":"logged in with SSO","actor":{"id":1,"type":"user","name":"John Doe"},"timestamp":1}"#;
        assert_eq!(
            one_line(audit),
            format!("{:<40} John Doe logged in with SSO", "activity_log.user.login")
        );
        assert_eq!(
            one_line("{\"event\":\n18446744073709551616}"),
            "{\"event\": 18446744073709551616}"
        );
        // No event drives the terminal, escaped or raw.
        let hostile = audit.replace("John Doe", r"\u001b[2JJohn\nDoe");
        assert_eq!(
            one_line(&hostile),
            format!(
                r"{:<40} \u{{1b}}[2JJohn\u{{a}}Doe logged in with SSO",
                "activity_log.user.login"
            )
        );
        assert_eq!(one_line("{\"event\":\"\u{9b}2J\u{7f}\"}"), r#"{"event":"\u{9b}2J\u{7f}"}"#);
    }

    #[test]
    fn a_secret_is_read_as_the_daemon_reads_it_and_an_unusable_one_refused() {
        let good = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
        let file = tempfile::NamedTempFile::new().expect("a file");
        let named = format!("file:{}", file.path().display());
        for end in ["", "\n", "\r\n"] {
            std::fs::write(file.path(), format!("{good}{end}")).expect("writes");
            assert_eq!(
                read_secret(&named, false).unwrap_or_else(|e| panic!("{e:?}")).expose(),
                good
            );
        }
        assert_eq!(
            read_secret("any text", false).unwrap_or_else(|e| panic!("{e:?}")).expose(),
            "any text",
            "of `mailtrap`"
        );
        std::fs::write(file.path(), "\n").expect("writes");
        for bad in ["", " ", "whsec_", "whsec_c2hvcnQ=", "whsec_not base64", &named] {
            let Err(Failed::Usage(why)) = read_secret(bad, false) else { panic!("{bad} is taken") };
            assert!(
                why.contains("--secret") && (bad.len() < 7 || !why.contains(bad) || bad == named),
                "{why}"
            );
        }
    }

    #[test]
    fn what_is_refused_is_told_event_by_event_and_what_is_added_to_an_answer_is_sound() {
        let args = |more: &[&str]| {
            let words = ["hooktrail", "listen"].iter().chain(more).copied();
            let crate::cli::Command::Listen(args) =
                crate::cli::Cli::try_parse_from(words).map_err(|e| e.to_string())?.command
            else {
                unreachable!("parsed")
            };
            Ok::<_, String>(args)
        };
        let refusing = args(&[
            "--refuse",
            "user.*",
            "--refuse",
            "billing.#",
            "--retry-after",
            "1500ms",
            "--header",
            "X-A=1=2",
        ])
        .expect("sound");
        let events = events_of(br#"{"events":[{"event":"a.b"},{"event":"user.deleted"},{"event":"billing.paid.late"},{"n":1}]}"#, "");
        let refused = refusing.refused(&events.expect("events"));
        assert_eq!(
            refused.into_iter().collect::<Vec<_>>(),
            [(1, "user.deleted".to_owned()), (2, "billing.paid.late".to_owned())]
        );
        let (bad, good) = (
            refusing.answer_headers(StatusCode::TOO_MANY_REQUESTS),
            refusing.answer_headers(StatusCode::OK),
        );
        assert_eq!(
            (&bad["retry-after"], &bad["x-a"], good.get("retry-after")),
            (&HeaderValue::from(2), &HeaderValue::from_static("1=2"), None)
        );
        for header in ["x", "=1", "a b=1", "x=\u{1}", "content-length=3", "Connection=close"] {
            assert!(args(&["--header", header]).is_err_and(|e| e.contains("--header")), "{header}");
        }
        let mut totals = Totals { requests: 3, events: 1, repeats: 1, ..Totals::default() };
        totals.statuses.extend([(200, 2), (422, 1)]);
        assert_eq!(
            totals.to_string(),
            "3 requests with 1 event, 1 of them has an id seen before; answered 200 2 times, 422 1 time"
        );
        assert_eq!(Totals::default().to_string(), "0 requests with 0 events");
    }

    #[test]
    fn both_formats_are_read() {
        let json = events_of(br#"{"events":[{"event":"a"},{"event":"b"}]}"#, "application/json")
            .expect("json");
        let lines = events_of(b"{\"event\":\"a\"}\n{\"event\":\"b\"}\n", "application/jsonl")
            .expect("lines");
        assert_eq!(
            json.iter().map(|e| e.get()).collect::<Vec<_>>(),
            lines.iter().map(|e| e.get()).collect::<Vec<_>>()
        );
        for (body, n) in [
            (&b"[{\"event\":\"a\"},{\"event\":\"b\",\"events\":[]}]"[..], 2),
            (b" {\"event\":\"a\",\"events\":[1,2,3]}", 1),
            (b"{\"event\":\"a\"}\n{\"event\":\"b\"}\n", 2),
            (br#"{"text":"a\nb"}"#, 2),
        ] {
            assert_eq!(events_of(body, "application/json").expect("events").len(), n);
        }
        let data = br#"[{"specversion":"1.0","data":{"event":"a"}}]"#;
        for body in [&br#"{"time":1,"event":{"event":"a"}}"#[..], data] {
            let events = events_of(body, "application/json").expect("events");
            assert_eq!(events[0].get(), r#"{"event":"a"}"#);
        }
        for no in [&b"nonsense"[..], b"", b"{}", b"{\"events\":1}", b"1", b"[1"] {
            assert!(events_of(no, "application/json").is_err());
        }
    }
}

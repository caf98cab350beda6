//! `demo`: the whole thing on this machine with no set-up. A real daemon, a real queue, two real
//! receivers, one of which has a bad day; and at the end every event is accounted for.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    io::{IsTerminal as _, Write as _},
    os::unix::fs::DirBuilderExt as _,
    path::Path,
    sync::{Arc, Mutex, OnceLock, PoisonError},
    time::{Duration, Instant},
};

use axum::{
    Router,
    body::Bytes,
    extract::State,
    http::{HeaderMap, StatusCode},
};
use bytesize::ByteSize;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Map, Value, json};
use tokio::{
    net::TcpListener,
    sync::{mpsc, oneshot, watch},
};
use tracing::field::{Field, Visit};
use tracing_subscriber::{
    Layer,
    filter::Targets,
    layer::{Context, SubscriberExt as _},
    util::SubscriberInitExt as _,
};

use super::{failed::Failed, open::reach, text::visible};
use crate::{
    clock,
    config::{self, Backend, Config},
    crypto::{secret::Secret, signature},
    queue::{DeadLetters as _, NewEvent, Queue, embedded::EmbeddedQueue},
    supervisor::fleet::{self, Controls, Phase},
    telemetry::{metrics::Metrics, status::Board},
    wording::counted,
};

/// For what is under way when no more events come; with the default of `--for` all ends within 30
/// s.
const DRAINING: Duration = Duration::from_secs(13);

/// The receiver with the bad day is down from the fourth to the ninth second of each of these.
const DAY: Duration = Duration::from_secs(40);

/// Of this type it refuses every event.
const REFUSED: &str = "activity_log.export.requested";

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// How long events come, such as 10m
    #[arg(long = "for", value_name = "DURATION", value_parser = super::arguments::duration, default_value = "15s")]
    publish_for: Duration,
    /// Through a RabbitMQ instead of the embedded queue; what the demo declares there it deletes at
    /// its end. Others on this machine can see the command line: a URL with a password of worth
    /// belongs into the variable
    #[arg(long, value_name = "URL", env = "HOOKTRAIL_DEMO_AMQP_URL", hide_env_values = true)]
    amqp: Option<String>,
}

pub(super) async fn run(args: Args) -> Result<(), Failed> {
    let stage = Stage::new();
    let notices = tap();
    let secret = super::secret::new_secret();
    let siem = Receiver::start("siem", &secret, stage.clone(), |_, _| 200).await?;
    let crm = Receiver::start("crm", &secret, stage.clone(), |elapsed, body| {
        let second = elapsed.as_secs_f64() % DAY.as_secs_f64();
        match () {
            () if (4.0..9.0).contains(&second) => 503,
            () if body.windows(REFUSED.len()).any(|w| w == REFUSED.as_bytes()) => 422,
            () => 200,
        }
    })
    .await?;
    let home = Home::new()?;
    let config = home.config(args.amqp.as_deref(), &secret, &[&siem, &crm])?;
    stage.say(&format!(
        "Two receivers on this machine, `siem` and `crm`; {}. Audit events come for {}.",
        match &config.queue.backend {
            Backend::Embedded => format!("the embedded queue in {}", home.0.display()),
            Backend::Amqp(amqp) => format!("a RabbitMQ at {}", amqp.url),
        },
        humantime::format_duration(args.publish_for)
    ));
    let play =
        Play { stage, config: &config, receivers: [&siem, &crm], publish_for: args.publish_for };
    match &config.queue.backend {
        Backend::Embedded => {
            Box::pin(play.run(EmbeddedQueue::for_daemon(&config.queue.embedded)?, notices)).await
        }
        Backend::Amqp(amqp) => {
            let queue = reach(amqp).await?;
            let played = Box::pin(play.run(queue.clone(), notices)).await;
            queue.remove(config.subscribers.iter().map(|s| &s.name), true).await?;
            played
        }
    }
}

/// A directory that goes with the demo.
struct Home(std::path::PathBuf);

impl Home {
    fn new() -> Result<Self, Failed> {
        let path =
            std::env::temp_dir().join(format!("hooktrail-demo-{:08x}", rand::random::<u32>()));
        // The URL of a RabbitMQ is written there, its password included.
        std::fs::DirBuilder::new().mode(0o700).create(&path).map_err(|e| {
            Failed::Runtime(format!("{} cannot be made: {e}; set TMPDIR", path.display()))
        })?;
        Ok(Self(path))
    }

    /// A configuration like any other, with short times.
    fn config(
        &self,
        amqp: Option<&str>,
        secret: &str,
        receivers: &[&Receiver],
    ) -> Result<Config, Failed> {
        let name = self.0.file_name().unwrap_or_default().to_string_lossy();
        // What JSON escapes, TOML does too, in the same way.
        let url = json!(amqp.unwrap_or("embedded")).to_string().replace("${", "$${");
        let mut text = format!(
            "[queue]\nurl = {url}\nexchange = \"{name}\"\nprefix = \"{name}\"\n\
             [batch]\nmax_events = 50\nmax_bytes = \"32KiB\"\nmax_wait = \"400ms\"\n\
             [http]\nallow_http = true\nallow_private_addresses = true\ntimeout = \"5s\"\n\
             [retry]\ninitial_interval = \"500ms\"\nmultiplier = 1.5\nmax_interval = \"2s\"\nmax_attempts = 6\n\
             [circuit_breaker]\nfailures = 3\nopen_for = \"1500ms\"\nmax_open_for = \"3s\"\n"
        );
        for r in receivers {
            // Writing to a string cannot fail.
            write!(
                text,
                "[[subscriber]]\nname = \"{}\"\nurl = \"{}\"\nsecrets = [\"{secret}\"]\nevents = [\"activity_log.#\"]\n",
                r.name, r.url
            )
            .ok();
        }
        let path = self.0.join("hooktrail.toml");
        std::fs::write(&path, text)?;
        config::load(&path).map_err(|e| match amqp {
            Some(_) => Failed::Usage("--amqp is not the URL of a RabbitMQ, such as amqp://guest:guest@127.0.0.1:5672/%2f".to_owned()),
            None => Failed::Config(e),
        })
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        std::fs::remove_dir_all(Path::new(&self.0)).ok(); // it is in the directory for what may be deleted
    }
}

/// What is shown: lines, and on a terminal a last line that changes.
#[derive(Clone)]
struct Stage {
    /// When the first event was published.
    begin: Arc<OnceLock<Instant>>,
    bar: Option<ProgressBar>,
    colours: bool,
}

#[derive(Clone, Copy)]
enum Tone {
    Good,
    Waiting,
    Bad,
}

impl Stage {
    fn new() -> Self {
        let terminal = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
        let bar = terminal.then(|| {
            let bar = ProgressBar::new_spinner();
            bar.set_draw_target(indicatif::ProgressDrawTarget::stdout());
            bar.set_style(
                ProgressStyle::with_template("{spinner} {msg}")
                    .unwrap_or_else(|_| ProgressStyle::default_spinner()),
            );
            bar.enable_steady_tick(Duration::from_millis(120));
            bar
        });
        Self { begin: Arc::default(), bar, colours: terminal }
    }

    /// Since the first event: a broker that takes its time must not take the receiver's outage with
    /// it.
    fn elapsed(&self) -> Duration {
        self.begin.get().map_or(Duration::ZERO, |begin| clock::instant() - *begin)
    }

    fn say(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.println(line),
            // Nobody may read any more, as with `| head`.
            None => drop(writeln!(std::io::stdout(), "{line}")),
        }
    }

    fn tell(&self, who: &str, tone: Tone, what: &str) {
        let (on, off) = match (self.colours, tone) {
            (false, _) => ("", ""),
            (true, Tone::Good) => ("\u{1b}[32m", "\u{1b}[0m"),
            (true, Tone::Waiting) => ("\u{1b}[33m", "\u{1b}[0m"),
            (true, Tone::Bad) => ("\u{1b}[31m", "\u{1b}[0m"),
        };
        self.say(&format!("{:>5.1}s  {who:<6} {on}{what}{off}", self.elapsed().as_secs_f64()));
    }

    fn status(&self, text: String) {
        if let Some(bar) = &self.bar {
            bar.set_message(text);
        }
    }

    fn end(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// One end of a webhook, as its owner would write it: verifies, then stores.
struct Receiver {
    name: &'static str,
    url: String,
    accepted: Arc<Mutex<BTreeMap<String, usize>>>,
    server: tokio::task::JoinHandle<()>,
}

struct Endpoint {
    name: &'static str,
    secret: Secret,
    stage: Stage,
    answer: fn(Duration, &[u8]) -> u16,
    accepted: Arc<Mutex<BTreeMap<String, usize>>>,
}

impl Receiver {
    async fn start(
        name: &'static str,
        secret: &str,
        stage: Stage,
        answer: fn(Duration, &[u8]) -> u16,
    ) -> Result<Self, Failed> {
        let socket = TcpListener::bind("127.0.0.1:0").await?;
        let url = format!("http://{}/hooks/audit", socket.local_addr()?);
        let accepted = Arc::new(Mutex::default());
        let endpoint = Endpoint {
            name,
            secret: Secret::new(secret),
            stage,
            answer,
            accepted: accepted.clone(),
        };
        let app = Router::new().fallback(receive).with_state(Arc::new(endpoint));
        let server = tokio::spawn(async move { drop(axum::serve(socket, app).await) });
        Ok(Self { name, url, accepted, server })
    }

    /// How often each event was accepted.
    fn accepted(&self) -> BTreeMap<String, usize> {
        self.accepted.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.server.abort();
    }
}

async fn receive(State(e): State<Arc<Endpoint>>, headers: HeaderMap, body: Bytes) -> StatusCode {
    let header = |name: &str| headers.get(name).and_then(|v| v.to_str().ok());
    let status =
        match signature::verify(&e.secret, header, &body, clock::unix_seconds(clock::now())) {
            Ok(_) => (e.answer)(e.stage.elapsed(), &body),
            Err(_) => 401,
        };
    if status == 200 {
        let ids = event_ids(&body);
        let attempt = header("x-hooktrail-attempt").unwrap_or("?");
        let attempt = if attempt == "1" { String::new() } else { format!(", attempt {attempt}") };
        let what = format!(
            "accepted {}, {}, signature verified{attempt}",
            counted(ids.len(), "event(s)"),
            ByteSize(body.len() as u64)
        );
        e.stage.tell(e.name, Tone::Good, &what);
        let mut accepted = e.accepted.lock().unwrap_or_else(PoisonError::into_inner);
        for id in ids {
            *accepted.entry(id).or_default() += 1;
        }
    }
    StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
}

/// The ids that the demo gave the events of a batch, or a single event.
fn event_ids(body: &[u8]) -> Vec<String> {
    let id = |event: &Value| event["demo_id"].as_str().map(str::to_owned);
    match serde_json::from_slice::<Value>(body) {
        Ok(value) => match value["events"].as_array() {
            Some(events) => events.iter().filter_map(id).collect(),
            None => id(&value).into_iter().collect(),
        },
        Err(_) => Vec::new(),
    }
}

/// The daemon's log, each line as its fields.
fn tap() -> mpsc::UnboundedReceiver<Map<String, Value>> {
    struct Tap(mpsc::UnboundedSender<Map<String, Value>>);
    struct Fields(Map<String, Value>);
    impl Visit for Fields {
        fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
            self.0.insert(field.name().to_owned(), format!("{value:?}").into());
        }
        fn record_str(&mut self, field: &Field, value: &str) {
            self.0.insert(field.name().to_owned(), value.into());
        }
        fn record_u64(&mut self, field: &Field, value: u64) {
            self.0.insert(field.name().to_owned(), value.into());
        }
        fn record_f64(&mut self, field: &Field, value: f64) {
            self.0.insert(field.name().to_owned(), value.into());
        }
    }
    impl<S: tracing::Subscriber> Layer<S> for Tap {
        fn on_event(&self, event: &tracing::Event<'_>, _: Context<'_, S>) {
            let mut fields = Fields(Map::new());
            event.record(&mut fields);
            self.0.send(fields.0).ok(); // nobody listens at the very end
        }
    }
    let (notices, inbox) = mpsc::unbounded_channel();
    let targets = Targets::new().with_target("hooktrail", tracing::Level::INFO);
    tracing_subscriber::registry().with(targets).with(Tap(notices)).try_init().ok();
    inbox
}

/// Tells an operator's side of it: what failed and when it is tried again, the circuit, dead
/// letters.
fn narrate(stage: &Stage, notice: &Map<String, Value>) {
    let text = |name: &str| notice.get(name).and_then(Value::as_str).unwrap_or_default();
    let number = |name: &str| notice.get(name).map(ToString::to_string).unwrap_or_default();
    let events =
        || counted(notice.get("events").and_then(Value::as_u64).unwrap_or_default(), "event(s)");
    let who = text("subscriber");
    let failure = match (notice.get("status"), text("failure")) {
        (Some(status), _) => format!("answered {status}"),
        (None, failure) => failure.to_owned(),
    };
    let message = text("message");
    match (message, text("outcome")) {
        ("attempt", "retry") => {
            let again = notice.get("next_attempt_in_s").and_then(Value::as_f64).unwrap_or_default();
            let what = format!(
                "{failure}: attempt {} of a batch of {}, again in {again:.1} s",
                number("attempt"),
                events()
            );
            stage.tell(who, Tone::Waiting, &what);
        }
        ("attempt", "split") => {
            stage.tell(
                who,
                Tone::Waiting,
                &format!(
                    "{failure}: a batch of {} is halved, each half is sent by itself",
                    events()
                ),
            );
        }
        ("attempt", "dead_letter") => {
            // Only of one that ran out of attempts it says something that this was the last.
            let last = if text("reason") == "exhausted" {
                format!("attempt {} was the last; ", number("attempt"))
            } else {
                String::new()
            };
            let what = format!(
                "{failure}: {last}a batch of {} is a dead letter ({})",
                events(),
                text("reason")
            );
            stage.tell(who, Tone::Bad, &what);
        }
        ("attempt", _) => {} // the receiver tells
        ("dead-lettered without an attempt", _) => {
            stage.tell(
                who,
                Tone::Bad,
                &visible(&format!("a dead letter ({}): {}", text("reason"), text("error"))),
            );
        }
        _ if message.starts_with("circuit closed") => stage.tell(who, Tone::Good, message),
        _ if message.starts_with("circuit") => stage.tell(
            who,
            Tone::Waiting,
            &format!(
                "{message} ({:.1} s)",
                notice.get("open_for_s").and_then(Value::as_f64).unwrap_or_default()
            ),
        ),
        _ if who.is_empty() => {}
        _ => stage.tell(who, Tone::Waiting, &visible(&format!("{message} {}", text("error")))),
    }
}

struct Play<'p> {
    stage: Stage,
    config: &'p Config,
    receivers: [&'p Receiver; 2],
    publish_for: Duration,
}

impl Play<'_> {
    async fn run<Q: Queue>(
        &self,
        queue: Q,
        mut notices: mpsc::UnboundedReceiver<Map<String, Value>>,
    ) -> Result<(), Failed> {
        queue.ensure(&self.config.subscribers).await?;
        let (stop, stopped) = oneshot::channel::<()>();
        let shutdown = async move { drop(stopped.await) };
        let phase = watch::Sender::new(Phase::Starting);
        let nothing = std::future::ready(());
        let controls = Controls {
            phase: &phase,
            changes: mpsc::channel(1).1, // nobody changes anything
            board: Board::new(Metrics::new(clock::now())),
            shutdown_timeout: watch::Sender::new(Duration::from_secs(5)).subscribe(),
            hurry: Box::pin(std::future::pending()),
        };
        let daemon =
            fleet::run(queue.clone(), self.config.subscribers.clone(), shutdown, controls, nothing);
        let show = async {
            let published = self.publish(&queue).await?;
            self.drain(&queue, &published).await?;
            // Before the daemon ends, which closes the queue.
            let mut dead = Vec::new();
            for r in self.receivers {
                dead.push(dead_ids(&queue, r.name).await?);
            }
            stop.send(()).ok(); // the daemon may have ended in an error, which is told below
            Ok::<_, Failed>((published, dead))
        };
        let narrator = async {
            while let Some(notice) = notices.recv().await {
                narrate(&self.stage, &notice);
            }
        };
        let both = async { tokio::join!(daemon, show) };
        let (ended, shown) = tokio::select! {
            done = both => done,
            () = narrator => return Err(Failed::Runtime("the log ended before the demo".to_owned())),
        };
        self.stage.end();
        ended?;
        let (published, dead) = shown?;
        self.account(&published, &dead)
    }

    /// Publishes for a while, or until somebody presses Ctrl-C; the ids of all events.
    async fn publish(&self, queue: &impl Queue) -> Result<BTreeSet<String>, Failed> {
        self.stage.begin.get_or_init(clock::instant);
        let mut published = BTreeSet::new();
        let mut tick = tokio::time::interval(Duration::from_millis(200));
        let mut interrupted = std::pin::pin!(tokio::signal::ctrl_c());
        let (mut told_at, mut since_told) = (Duration::ZERO, 0);
        let mut odd = ODD.iter().cycle();
        let mut next_odd = Duration::from_secs(2);
        while self.stage.elapsed() < self.publish_for {
            tokio::select! {
                _ = tick.tick() => {}
                _ = &mut interrupted => break,
            }
            let mut events: Vec<NewEvent> =
                (0..rand::random_range(1..=8)).map(|n| audit_event(published.len() + n)).collect();
            if self.stage.elapsed() >= next_odd {
                next_odd += Duration::from_millis(3500);
                let make = odd.next().copied().unwrap_or(refused_event);
                events.push(make(published.len() + events.len()));
            }
            since_told += events.len();
            published.extend(events.iter().filter_map(|e| e.message_id.clone()));
            queue.publish(events).await?;
            if self.stage.elapsed() >= told_at + Duration::from_secs(1) {
                told_at = self.stage.elapsed();
                self.stage.say(&format!(
                    "{:>5.1}s  {} published",
                    told_at.as_secs_f64(),
                    counted(since_told, "event(s)")
                ));
                since_told = 0;
            }
            self.stage.status(self.counts(published.len()));
        }
        self.stage.say(&format!(
            "{:>5.1}s  no more events; what is under way is delivered",
            self.stage.elapsed().as_secs_f64()
        ));
        Ok(published)
    }

    fn counts(&self, published: usize) -> String {
        let [a, b] = self.receivers.map(|r| format!("{} {}", r.name, r.accepted().len()));
        format!("published {published}, accepted: {a}, {b}")
    }

    /// Waits until every event is accepted or dead, or the time is over.
    async fn drain(&self, queue: &impl Queue, published: &BTreeSet<String>) -> Result<(), Failed> {
        let deadline = clock::instant() + DRAINING;
        while clock::instant() < deadline {
            let mut left = 0;
            for r in self.receivers {
                left += self.missing(r, &dead_ids(queue, r.name).await?, published).len();
            }
            if left == 0 {
                return Ok(());
            }
            self.stage.status(format!(
                "{}; {} under way",
                self.counts(published.len()),
                counted(left, "deliver(y|ies)")
            ));
            tokio::time::sleep(Duration::from_millis(250)).await;
        }
        Ok(())
    }

    fn missing(
        &self,
        r: &Receiver,
        dead: &BTreeSet<String>,
        published: &BTreeSet<String>,
    ) -> Vec<String> {
        let accepted = r.accepted();
        published
            .iter()
            .filter(|id| !accepted.contains_key(*id) && !dead.contains(*id))
            .cloned()
            .collect()
    }

    /// `dead`: the events in each receiver's dead letters.
    fn account(
        &self,
        published: &BTreeSet<String>,
        dead: &[BTreeSet<String>],
    ) -> Result<(), Failed> {
        self.stage.say(&format!(
            "\n{} published to each subscriber:",
            counted(published.len(), "event(s)")
        ));
        let mut missing = 0;
        for (r, dead) in self.receivers.into_iter().zip(dead) {
            let accepted = r.accepted();
            let repeated = accepted.values().filter(|n| **n > 1).count();
            let lost = self.missing(r, dead, published);
            missing += lost.len();
            self.stage.say(&format!(
                "  {:<6} {} delivered + {} in dead letters = {}{}",
                r.name,
                accepted.len(),
                dead.len(),
                accepted.len() + dead.len(),
                if repeated > 0 {
                    format!(" ({repeated} delivered more than once)")
                } else {
                    String::new()
                }
            ));
            for id in lost.iter().take(5) {
                self.stage.say(&format!("         NOT ACCOUNTED FOR: {id}"));
            }
        }
        if missing > 0 {
            return Err(Failed::Runtime(format!(
                "{} not accounted for",
                counted(missing, "deliver(y is|ies are)")
            )));
        }
        self.stage.say(
            "Every event is accounted for.\n\nTry next:\n  \
             hooktrail listen --addr 127.0.0.1:9000     a receiver to write your own against\n  \
             hooktrail --config my.toml init            a configuration to begin with, each key explained\n  \
             hooktrail demo --for 10m                   the same with time to watch; --amqp URL takes a RabbitMQ",
        );
        Ok(())
    }
}

/// The events of a subscriber's dead letters.
async fn dead_ids(queue: &impl Queue, subscriber: &str) -> Result<BTreeSet<String>, Failed> {
    let mut letters = queue.dead_letters(subscriber).await?;
    let mut ids = BTreeSet::new();
    while let Some(held) = letters.next().await? {
        ids.extend(event_ids(&held.letter.body));
    }
    letters.close().await?;
    Ok(ids)
}

/// What comes beside the everyday: refused by `crm`, larger than a request may be, not an event at
/// all.
const ODD: [fn(usize) -> NewEvent; 3] = [refused_event, large_event, invalid_event];

fn new_event(event_type: &str, id: usize, body: &Value) -> NewEvent {
    NewEvent {
        event_type: event_type.to_owned(),
        message_id: Some(demo_id(id)),
        body: body.to_string().into(),
        traceparent: None,
    }
}

fn demo_id(id: usize) -> String {
    format!("evt_demo_{id:06}")
}

fn refused_event(id: usize) -> NewEvent {
    let body = json!({ "event": REFUSED, "description": "requested an export", "actor": PEOPLE[0].actor(), "timestamp": now(), "demo_id": demo_id(id) });
    new_event(REFUSED, id, &body)
}

fn large_event(id: usize) -> NewEvent {
    let event_type = "activity_log.sandbox.imported";
    let body = json!({ "event": event_type, "description": "x".repeat(40_000), "actor": PEOPLE[1].actor(), "timestamp": now(), "demo_id": demo_id(id) });
    new_event(event_type, id, &body)
}

fn invalid_event(id: usize) -> NewEvent {
    new_event(
        "activity_log.user.updated",
        id,
        &json!({ "kind": "an event without its field `event`", "demo_id": demo_id(id) }),
    )
}

struct Person(u32, &'static str);

const PEOPLE: [Person; 6] = [
    Person(783, "Jane Doe"),
    Person(1, "John Doe"),
    Person(57, "Amara Okafor"),
    Person(912, "Łukasz Wójcik"),
    Person(344, "Mei Tanaka"),
    Person(28, "Sofía Reyes"),
];

impl Person {
    fn actor(&self) -> Value {
        json!({ "id": self.0, "type": "user", "name": self.1 })
    }
}

/// Type, description, type and name of the resource, the field that changed.
type Happening =
    (&'static str, &'static str, Option<(&'static str, &'static str)>, Option<&'static str>);

const HAPPENINGS: [Happening; 12] = [
    (
        "activity_log.user.updated",
        "updated the user profile",
        Some(("user", "Jane Doe")),
        Some("name"),
    ),
    ("activity_log.user.login", "logged in with SSO", None, None),
    ("activity_log.user.login", "attempted to log in with GitHub", None, None),
    (
        "activity_log.user.invited",
        "invited a user",
        Some(("user", "new.colleague@example.com")),
        None,
    ),
    ("activity_log.domain.created", "added a domain", Some(("domain", "mail.example.com")), None),
    (
        "activity_log.field.created",
        "created a contact field",
        Some(("field", "plan")),
        Some("plan"),
    ),
    ("activity_log.sandbox.deleted", "deleted a sandbox", Some(("sandbox", "staging")), None),
    (
        "activity_log.webhook.removed",
        "removed a webhook",
        Some(("webhook", "https://old.example.com")),
        None,
    ),
    (
        "activity_log.api_token.created",
        "created an API token",
        Some(("api_token", "ci")),
        Some("permissions"),
    ),
    (
        "activity_log.billing.plan_changed",
        "changed the plan",
        Some(("account", "Example Ltd")),
        Some("plan"),
    ),
    ("activity_log.user.role_changed", "changed a role", Some(("user", "John Doe")), Some("role")),
    ("activity_log.user.two_factor_enabled", "turned two-factor authentication on", None, None),
];

fn now() -> u64 {
    clock::unix_seconds(clock::now())
}

fn audit_event(id: usize) -> NewEvent {
    let (event_type, description, resource, change) =
        HAPPENINGS[rand::random_range(0..HAPPENINGS.len())];
    let person = &PEOPLE[rand::random_range(0..PEOPLE.len())];
    let actor =
        if rand::random_ratio(1, 12) { json!({ "name": "Mailtrap" }) } else { person.actor() };
    let mut body = json!({ "event": event_type, "description": description, "actor": actor });
    if let Some((kind, name)) = resource {
        body["resource"] =
            json!({ "id": rand::random_range(1..10_000), "type": kind, "name": name });
    }
    if let Some(field) = change {
        body["changes"] = json!({ field: { "from": "[FILTERED]", "to": "[FILTERED]" } });
    }
    body["timestamp"] = now().into();
    body["demo_id"] = demo_id(id).into();
    new_event(event_type, id, &body)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt as _;

    #[test]
    fn nobody_else_reads_the_url_that_the_demo_writes_down() {
        let home = Home::new().expect("makes a directory");
        assert_eq!(std::fs::metadata(&home.0).expect("is there").mode() & 0o777, 0o700);
        let path = home.0.clone();
        drop(home);
        assert!(!path.exists());
    }
}

//! What hooktrail remembers of a run, held against what was published and what the receivers have
//! recorded themselves: with a subscriber that fails, one that is paused and one with a pattern,
//! over a `kill -9` and a takeover.
//!
//! `scripts/faults memory` runs it with 100,000 events.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    fmt::Write as _,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use bytes::Bytes;
use hooktrail::queue::{MAX_GROUP, NewEvent, Queue as _};
use lapin::{
    BasicProperties, Confirmation,
    options::{BasicPublishOptions, ConfirmSelectOptions},
};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use crate::{
    SEED, setting,
    support::{
        PATIENCE,
        api::Api,
        daemon::{Daemon, Setup, subscriber},
        eventually,
        queue::Queue,
        receiver::{Receiver, Request, event, status},
        run, tests_that_need,
    },
};

tests_that_need!(broker: what_is_remembered_on_rabbitmq_is_what_receivers_have_recorded);

fn what_is_remembered_on_rabbitmq_is_what_receivers_have_recorded() {
    run(async { Box::pin(remembers(Queue::amqp(), "rabbitmq")).await });
}

#[test]
fn what_is_remembered_on_the_embedded_queue_is_what_receivers_have_recorded() {
    run(async { Box::pin(remembers(Queue::embedded(), "embedded")).await });
}

/// The types of events, one after the other; `picky` wants all but the first.
const TYPES: [&str; 3] = ["activity_log.user.updated", "order.paid", "order.created"];

/// A delivery's record is written a moment after it: those of this time before a kill can be
/// missing.
const UNRECORDED: Duration = Duration::from_secs(10);

/// Events for which `where` is asked.
const SAMPLE: usize = 200;

/// Each of so many of them is asked of the command too, not of the API alone.
const BY_COMMAND: usize = 10;

/// Events of a batch for `bad`.
const BAD_BATCH: u64 = 20;

/// Batches of the replay that are answered before it is interrupted.
const BEFORE_INTERRUPTION: usize = 3;

const TOKEN: &str = "the-token-of-the-tests";

fn event_type(n: u64) -> &'static str {
    TYPES[(n % 3) as usize]
}

fn is_for_picky(n: u64) -> bool {
    !n.is_multiple_of(3)
}

fn id_of(n: u64) -> String {
    format!("evt-{n}")
}

fn body_of(n: u64) -> String {
    event(n).replacen(TYPES[0], event_type(n), 1)
}

/// What the failing receiver answers: it refuses some events, so that their batches are split until
/// they are alone, and fails for some other batches. Always the same for a batch.
fn answer_of(request: &Request) -> u16 {
    match Sha256::digest(request.id())[0] % 8 {
        _ if request.numbers().iter().any(|n| n % 100 == 7) => 422,
        0 => 503,
        _ => 200,
    }
}

/// The id of the first half of a batch that was split, which may be a half itself.
fn first_half(id: &str) -> String {
    let is_half = id.matches('_').count() > 1;
    format!("{id}{}", if is_half { "0" } else { "_0" })
}

fn is_accepted(request: &Request) -> bool {
    request.status < 300
}

fn is_replay(request: &Request) -> bool {
    request.header("x-hooktrail-replay") == "true"
}

fn configuration(picky: &str, bad: &str, off: &str, batch: u64, api: &Api) -> String {
    let group = |events: u64| format!("batch.max_events = {events}\n");
    let picky_keys =
        format!("events = [\"order.*\"]\nevent_ids = true\nhttp.concurrency = 2\n{}", group(batch));
    let bad_keys = format!("http.concurrency = 4\n{}", group(BAD_BATCH));
    "
[batch]
max_wait = \"100ms\"
[http]
allow_http = true
allow_private_addresses = true
[retry]
initial_interval = \"1h\"
max_interval = \"1h\"
multiplier = 1.0
randomization_factor = 0.0
[circuit_breaker]
failures = 0
"
    .to_owned()
        + &subscriber("bad", bad, &bad_keys)
        + &subscriber("off", off, &group(100))
        + &subscriber("picky", picky, &picky_keys)
        + &format!("{}token = \"{TOKEN}\"\n", api.section())
}

/// Publishes events as a producer does, and returns when all are confirmed.
async fn publish(queue: &Queue, events: impl Iterator<Item = u64>) {
    let events: Vec<u64> = events.collect();
    for group in events.chunks(MAX_GROUP / 10) {
        match queue {
            Queue::Embedded(embedded) => {
                let event = |n: &u64| NewEvent {
                    event_type: event_type(*n).to_owned(),
                    message_id: Some(id_of(*n)),
                    body: Bytes::from(body_of(*n)),
                    traceparent: None,
                    tenant: None,
                };
                let published = embedded.open().publish(group.iter().map(event).collect()).await;
                published.unwrap_or_else(|e| panic!("{e}"));
            }
            Queue::Amqp(broker) => {
                let (connection, channel) = broker.channel().await;
                channel.confirm_select(ConfirmSelectOptions::default()).await.expect("confirms");
                let mut confirms = Vec::new();
                for n in group {
                    let properties = BasicProperties::default()
                        .with_delivery_mode(2)
                        .with_message_id(id_of(*n).into())
                        .with_timestamp(seconds(SystemTime::now()));
                    let body = body_of(*n);
                    let sent = channel.basic_publish(
                        broker.exchange.as_str().into(),
                        event_type(*n).into(),
                        BasicPublishOptions::default(),
                        body.as_bytes(),
                        properties,
                    );
                    confirms.push(sent.await.expect("publishes"));
                }
                for confirm in confirms {
                    assert_eq!(confirm.await.expect("confirmed"), Confirmation::Ack(None));
                }
                connection.close(200, "done".into()).await.expect("closes");
            }
        }
    }
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH).expect("after 1970").as_secs()
}

/// The begin of the next second, when it has begun: RabbitMQ's timestamps are whole seconds.
async fn next_second() -> SystemTime {
    let next = SystemTime::UNIX_EPOCH + Duration::from_secs(seconds(SystemTime::now()) + 1);
    while let Ok(left) = next.duration_since(SystemTime::now()) {
        tokio::time::sleep(left.max(Duration::from_millis(1))).await;
    }
    next
}

/// A receiver and its own record of all requests.
struct Recorder {
    receiver: Receiver,
    requests: Vec<Request>,
    /// By the event's number; the places in `requests`.
    of_event: HashMap<u64, Vec<usize>>,
    batches: HashSet<String>,
}

impl Recorder {
    fn new(receiver: Receiver) -> Self {
        Self { receiver, requests: Vec::new(), of_event: HashMap::new(), batches: HashSet::new() }
    }

    fn update(&mut self) {
        for request in self.receiver.take_requests() {
            for n in request.numbers() {
                self.of_event.entry(n).or_default().push(self.requests.len());
            }
            self.batches.insert(request.id().to_owned());
            self.requests.push(request);
        }
    }

    fn with(&self, n: u64) -> Vec<&Request> {
        let places = self.of_event.get(&n).into_iter().flatten();
        places.map(|place| &self.requests[*place]).collect()
    }

    fn by_batch(&self) -> BTreeMap<&str, Vec<&Request>> {
        let mut all: BTreeMap<_, Vec<_>> = BTreeMap::new();
        for request in &self.requests {
            all.entry(request.id()).or_default().push(request);
        }
        all
    }

    /// Waits until it was sent each of these events.
    async fn wait_for(&mut self, what: &str, events: impl Iterator<Item = u64> + Clone) {
        let what = format!("{what} was sent all");
        eventually(&what, async || {
            self.update();
            events.clone().all(|n| self.of_event.contains_key(&n))
        })
        .await;
    }
}

/// A kill of the daemon, and when the next one worked.
#[derive(Debug, Clone, Copy)]
struct Kill {
    at: SystemTime,
    next_runs_at: SystemTime,
    /// All that was delivered of the events before this one was found in history before the kill.
    recorded_before: u64,
}

/// The batches that wait and the dead letters, as the queue has them.
#[derive(Default)]
struct InQueue {
    retrying: BTreeSet<String>,
    dead: BTreeSet<String>,
}

struct World {
    /// Before the folder that its log is in.
    daemon: Daemon,
    queue: Arc<Queue>,
    setup: Setup,
    api: Api,
    picky: Recorder,
    bad: Recorder,
    off: Recorder,
    off_is_paused: bool,
    /// Events of a batch for `picky`.
    batch: u64,
    kill: Option<Kill>,
    in_queue: InQueue,
    /// By the number of the event: its number in history.
    rows: HashMap<u64, i64>,
}

/// How an answer of history is.
#[derive(Debug, PartialEq, Eq)]
enum Judged {
    Right,
    /// Nothing is known: its record was lost with the daemon.
    LostWithTheDaemon,
    Wrong(String),
}

impl World {
    async fn get(&self, path: &str) -> Value {
        let token = format!("Bearer {TOKEN}");
        let answer = self.api.send("GET", path, &[("authorization", &token)], "").await;
        assert_eq!(answer.status, 200, "{path}: {answer:?}");
        self.api.exchanges.lock().expect("not poisoned").clear();
        answer.json()
    }

    /// All of a list.
    async fn list(&self, path: &str, key: &str) -> Vec<Value> {
        let (mut all, mut next) = (Vec::new(), String::new());
        loop {
            let mut page = self.get(&format!("{path}limit=500{next}")).await;
            all.append(page[key].as_array_mut().expect("a list"));
            match page["next"].as_str() {
                Some(cursor) => next = format!("&cursor={cursor}"),
                None => return all,
            }
        }
    }

    /// Holds the list of events against what was published: each is in it, once.
    async fn events_are(&mut self, published: u64) {
        let mut found = Vec::new();
        eventually(&format!("{published} events are in history"), async || {
            found = self.list("/api/v1/events?", "events").await;
            found.len() as u64 >= published
        })
        .await;
        let rows: Vec<i64> =
            found.iter().map(|e| e["number"].as_i64().expect("a number")).collect();
        assert!(rows.is_sorted_by(|a, b| a > b), "newest first");
        self.rows.clear();
        for (event, row) in found.iter().zip(rows) {
            let id = event["message_id"].as_str().expect("an id");
            let n: u64 = id.strip_prefix("evt-").and_then(|n| n.parse().ok()).expect("a number");
            assert!(n < published, "{id} was never published");
            let expected = json!([event_type(n), body_of(n).len(), n.to_string()]);
            assert_eq!(json!([event["event"], event["bytes"], event["resource"]["id"]]), expected);
            assert!(self.rows.insert(n, row).is_none(), "{id} is in history twice");
        }
        assert_eq!(self.rows.len() as u64, published, "all are in history");
        let gaps = self.get("/api/v1/events?limit=1").await["history"]["gaps"].clone();
        let gaps = gaps.as_array().expect("gaps").iter().filter(|g| g["what"] == "events");
        assert_eq!(gaps.count(), 0, "history lacks no events");
    }

    fn read_queue(&mut self) {
        let ids = |command: &str| {
            let text = self.setup.ok(&[command, "list", "bad", "--json"]);
            let id = |line: &str| {
                let line: Value =
                    serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"));
                line["id"].as_str().unwrap_or_else(|| panic!("{line}")).to_owned()
            };
            text.lines().map(id).collect()
        };
        self.in_queue = InQueue { retrying: ids("retry"), dead: ids("dead") };
    }

    /// Waits until what failed is a retry, a dead letter or split: that follows the answer a moment
    /// later.
    async fn what_failed_is_settled(&mut self) {
        let begun = Instant::now();
        loop {
            self.update();
            self.read_queue();
            // A daemon that was killed leaves batches that nobody has any more.
            let is_open = |r: &&Vec<&Request>| {
                self.state_of(r) == "in_flight" && !r.iter().any(|r| self.may_be_unrecorded(r))
            };
            let by_batch = self.bad.by_batch();
            let Some(open) = by_batch.values().find(is_open) else { return };
            let asked = (open[0].id(), open[0].status, open[0].at, open[0].numbers());
            assert!(begun.elapsed() < PATIENCE, "nowhere: {asked:?}, kill: {:?}", self.kill);
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    fn recorder(&self, subscriber: &str) -> &Recorder {
        match subscriber {
            "picky" => &self.picky,
            "bad" => &self.bad,
            "off" => &self.off,
            other => panic!("a subscriber `{other}`"),
        }
    }

    /// Whether the record of a request may have been lost with a daemon that was killed.
    fn may_be_unrecorded(&self, request: &Request) -> bool {
        self.kill.is_some_and(|kill| {
            let near = kill.at.checked_sub(UNRECORDED).is_some_and(|from| request.at >= from)
                && request.at <= kill.next_runs_at;
            near && request.numbers().iter().any(|n| *n >= kill.recorded_before)
        })
    }

    /// The state of a batch by the queue and the receiver, and the status of its last answer.
    fn state_of(&self, requests: &[&Request]) -> &'static str {
        let id = requests[0].id();
        match requests {
            _ if requests.iter().any(|r| is_accepted(r)) => "delivered",
            _ if self.in_queue.retrying.contains(id) => "retrying",
            _ if self.in_queue.dead.contains(id) => "dead",
            _ if self.bad.batches.contains(&first_half(id)) => "split",
            _ => "in_flight",
        }
    }

    /// Whether a state is another true one. A daemon that is killed between a copy of a batch and its
    /// ack leaves the batch twice, under one id. The copies go ways of their own: seen was one that
    /// waits for its retry, while the other was split and its halves were sent. A state is accepted
    /// only if a copy is found where that state has it.
    fn is_of_the_other_copy(&self, id: &str, state: &Value) -> bool {
        let copies = [
            ("retrying", self.in_queue.retrying.contains(id)),
            ("dead", self.in_queue.dead.contains(id)),
            ("split", self.bad.batches.contains(&first_half(id))),
        ];
        let is_twice = copies.iter().filter(|(_, is_there)| *is_there).count() > 1;
        self.kill.is_some()
            && is_twice
            && copies.iter().any(|(copy, is_there)| *is_there && state == copy)
    }

    /// Holds one answer of `where` for a subscriber against the receiver's record.
    fn judge(&self, n: u64, went: &Value) -> Judged {
        let subscriber = went["subscriber"].as_str().unwrap_or_default();
        let state = went["state"].as_str().unwrap_or_default();
        let wrong = |expected: &str| Judged::Wrong(format!("{}: {expected}: {went}", id_of(n)));
        let requests = self.recorder(subscriber).with(n);
        let no_batches = went["batches"].as_array().is_some_and(Vec::is_empty);
        if subscriber == "picky" && !is_for_picky(n) {
            let is_right = state == "not_matched" && no_batches && requests.is_empty();
            return if is_right { Judged::Right } else { wrong("it is not for this one") };
        }
        if subscriber == "off" && self.off_is_paused {
            let waits = match &*self.queue {
                Queue::Embedded(_) => state == "waiting" && went["subscriber_paused"].is_object(),
                // RabbitMQ does not say whether an event still waits.
                Queue::Amqp(_) => {
                    let why = went["why"].as_str().unwrap_or_default();
                    state == "unknown" && why.ends_with("the subscriber is paused")
                }
            };
            let is_right = waits && no_batches && requests.is_empty();
            return if is_right { Judged::Right } else { wrong("it waits for `resume`") };
        }
        let accepted: Vec<&Request> = requests.iter().copied().filter(|r| is_accepted(r)).collect();
        let decisive = if accepted.is_empty() { &requests } else { &accepted };
        let is_right = decisive.iter().any(|request| {
            let all: Vec<&Request> =
                requests.iter().copied().filter(|r| r.id() == request.id()).collect();
            (state == self.state_of(&all)
                || self.is_of_the_other_copy(request.id(), &went["state"]))
                && went["batch"] == request.id()
                && went["status"] == request.status
                && went["attempt"] == request.attempt()
        });
        if is_right {
            return Judged::Right;
        }
        let is_excused = !decisive.is_empty()
            && decisive.iter().all(|request| self.may_be_unrecorded(request))
            && (state == "unknown" || requests.iter().any(|r| went["batch"] == r.id()));
        if is_excused {
            return Judged::LostWithTheDaemon;
        }
        let recorded: Vec<(&str, u16)> = requests.iter().map(|r| (r.id(), r.status)).collect();
        wrong(&format!("the receiver has {recorded:?}"))
    }

    /// Asks where an event went. The number of answers that are unknown, or what is wrong.
    async fn ask(&self, n: u64, by_command: bool) -> Result<usize, String> {
        let row = self.rows[&n];
        let found = self.get(&format!("/api/v1/events/{row}")).await;
        let same = json!([found["message_id"], found["body"]]) == json!([id_of(n), body_of(n)]);
        if !same {
            return Err(format!("{}: the bytes are not those that were published", id_of(n)));
        }
        let all = found["where"].as_array().expect("a list");
        let names: Vec<&str> = all.iter().filter_map(|w| w["subscriber"].as_str()).collect();
        assert_eq!(names, ["bad", "off", "picky"]);
        let mut unknown = 0;
        for went in all {
            match self.judge(n, went) {
                Judged::Right => {}
                Judged::LostWithTheDaemon => unknown += 1,
                Judged::Wrong(why) => return Err(why),
            }
        }
        if by_command {
            let output = self.setup.run(&["where", &id_of(n), "--json"]);
            let text = String::from_utf8_lossy(&output.stdout);
            let said: Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"));
            let is_settled =
                all.iter().all(|w| w["state"] == "delivered" || w["state"] == "not_matched");
            if said["events"][0]["where"] != found["where"] || output.status.success() != is_settled
            {
                return Err(format!("the command says {:?}, {said}", output.status));
            }
        }
        Ok(unknown)
    }

    /// Waits until `where` is right for all of these; the number of answers that are unknown.
    async fn where_is_right(&mut self, sample: &[u64]) -> usize {
        let (begun, mut unknown) = (Instant::now(), 0);
        let mut left: Vec<(usize, u64)> = sample.iter().copied().enumerate().collect();
        loop {
            self.update();
            let mut wrong = Vec::new();
            for (place, n) in std::mem::take(&mut left) {
                match self.ask(n, place.is_multiple_of(BY_COMMAND)).await {
                    Ok(lost) => unknown += lost,
                    Err(why) => {
                        wrong.push(why);
                        left.push((place, n));
                    }
                }
            }
            if left.is_empty() {
                return unknown;
            }
            let first = &wrong[..wrong.len().min(5)];
            assert!(begun.elapsed() < PATIENCE, "`where` is wrong for {}: {first:#?}", wrong.len());
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    fn update(&mut self) {
        for recorder in [&mut self.picky, &mut self.bad, &mut self.off] {
            recorder.update();
        }
    }

    /// Holds the list of a subscriber's deliveries against all requests that its receiver has
    /// recorded: batches, attempts, answers, bytes. The number of batches whose record was lost.
    async fn deliveries_are_right(&mut self, subscriber: &str) -> usize {
        let begun = Instant::now();
        loop {
            self.update();
            // A batch that was a retry may have been tried again, and be a dead letter by now.
            self.read_queue();
            let path = format!("/api/v1/deliveries?subscriber={subscriber}&");
            let listed = self.list(&path, "deliveries").await;
            let mut by_id: HashMap<&str, &Value> =
                listed.iter().map(|d| (d["id"].as_str().expect("an id"), d)).collect();
            assert_eq!(by_id.len(), listed.len(), "each once");
            let (mut wrong, mut lost) = (Vec::new(), 0);
            for (id, requests) in self.recorder(subscriber).by_batch() {
                let found = by_id.remove(id);
                let mut expected = self.expected(&requests);
                if let Some(found) = found.filter(|d| self.is_of_the_other_copy(id, &d["state"])) {
                    expected["state"] = found["state"].clone();
                }
                if found.map(as_recorded) == Some(expected.clone()) {
                    continue;
                }
                if requests.iter().any(|r| self.may_be_unrecorded(r)) {
                    lost += 1;
                } else {
                    wrong.push(format!(
                        "{id}: {:?}, the receiver has {expected}",
                        found.map(as_recorded)
                    ));
                }
            }
            // An attempt that never reached the receiver.
            wrong.extend(
                by_id
                    .into_values()
                    .filter(|d| d["state"] != "interrupted")
                    .map(|d| format!("no receiver has {d}")),
            );
            if wrong.is_empty() {
                return lost;
            }
            let first = &wrong[..wrong.len().min(5)];
            assert!(
                begun.elapsed() < PATIENCE,
                "deliveries of {subscriber}: {} are wrong: {first:#?}",
                wrong.len()
            );
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    /// What a delivery of history must be, by the requests of its batch.
    fn expected(&self, requests: &[&Request]) -> Value {
        let body = &requests[0].body;
        let digest: String = Sha256::digest(body).iter().fold(String::new(), |mut text, byte| {
            write!(text, "{byte:02x}").expect("a string");
            text
        });
        let statuses: Vec<u16> = requests.iter().map(|r| r.status).collect();
        json!({
            "state": self.state_of(requests),
            "events": requests[0].numbers().len(),
            "bytes": body.len(),
            "sha256": digest,
            "replay": is_replay(requests[0]),
            "statuses": statuses,
        })
    }

    /// Kills the daemon, and has another take over with the same folder of data.
    async fn take_over(&mut self, recorded_before: u64) -> Kill {
        self.daemon.end();
        let at = SystemTime::now();
        self.daemon = self.setup.start().await;
        Kill { at, next_runs_at: SystemTime::now(), recorded_before }
    }

    async fn wait_replay(&self, id: &str, state: &str) -> Value {
        let mut found = Value::Null;
        eventually(&format!("the replay is {state}"), async || {
            found = self.get(&format!("/api/v1/replays/{id}")).await;
            found["state"] == state
        })
        .await;
        found
    }
}

/// A delivery of the API as [`World::expected`] has it.
fn as_recorded(found: &Value) -> Value {
    let attempts = found["attempts"].as_array().expect("attempts");
    let statuses: Vec<&Value> = attempts.iter().map(|a| &a["status"]).collect();
    let mut kept = json!({ "statuses": statuses });
    for key in ["state", "events", "bytes", "sha256", "replay"] {
        kept[key] = found[key].clone();
    }
    kept
}

fn sample(rng: &mut StdRng, from: u64, upto: u64) -> Vec<u64> {
    (0..SAMPLE).map(|_| rng.random_range(from..upto)).collect()
}

async fn remembers(queue: Queue, what: &str) {
    let events = setting("HOOKTRAIL_MEMORY_EVENTS", 2000);
    let seed = setting("HOOKTRAIL_FAULTS_SEED", SEED);
    let (begun, mut rng) = (Instant::now(), StdRng::seed_from_u64(seed));
    // Before the hour that is replayed, in it, and after it.
    let (first, second) = (events * 2 / 5, events * 3 / 5);
    let soon = Duration::from_millis(5);
    let picky = Receiver::start(move |_, _| status(200).after(soon)).await;
    let bad = Receiver::start(move |r, _| status(answer_of(r)).after(soon)).await;
    let off = Receiver::accepting().await;
    let api = Api::new();
    let batch = (events / 125).clamp(5, 500);
    let text = configuration(&picky.url, &bad.url, &off.url, batch, &api);
    let setup = Setup::new(&queue, &text);
    let daemon = setup.start().await;
    if matches!(queue, Queue::Amqp(_)) {
        daemon.wait_log("every event goes into history").await;
    }
    setup.ok(&["pause", "off", "--why", "a test"]);
    let mut world = World {
        daemon,
        queue: Arc::new(queue),
        setup,
        api,
        picky: Recorder::new(picky),
        bad: Recorder::new(bad),
        off: Recorder::new(off),
        off_is_paused: true,
        batch,
        kill: None,
        in_queue: InQueue::default(),
        rows: HashMap::new(),
    };

    publish(&world.queue, 0..first).await;
    world.picky.wait_for("picky", (0..first).filter(|n| is_for_picky(*n))).await;
    world.bad.wait_for("bad", 0..first).await;
    world.events_are(first).await;
    world.what_failed_is_settled().await;
    for subscriber in ["bad", "picky"] {
        assert_eq!(world.deliveries_are_right(subscriber).await, 0, "no daemon was killed");
    }
    let before = sample(&mut rng, 0, first);
    assert_eq!(world.where_is_right(&before).await, 0, "no daemon was killed");

    let since = next_second().await;
    let until = Arc::new(std::sync::Mutex::new(None));
    let done = Arc::new(AtomicBool::new(false));
    let publishing = tokio::spawn({
        let (queue, until, done) = (world.queue.clone(), until.clone(), done.clone());
        async move {
            publish(&queue, first..second).await;
            *until.lock().expect("no panic") = Some(next_second().await);
            publish(&queue, second..events).await;
            done.store(true, Ordering::Relaxed);
        }
    });
    // Counted, not read, so that it is killed in the middle.
    let half = (second - first) / 2 / BAD_BATCH;
    eventually("`bad` gets new events", async || world.bad.receiver.count() as u64 >= half).await;
    world.kill = Some(world.take_over(first).await);
    let killed_while_publishing = !done.load(Ordering::Relaxed);
    publishing.await.expect("publishes");
    let until = until.lock().expect("no panic").expect("it has published");
    world.picky.wait_for("picky", (0..events).filter(|n| is_for_picky(*n))).await;
    world.bad.wait_for("bad", 0..events).await;
    world.events_are(events).await;
    world.what_failed_is_settled().await;
    let mut lost_deliveries = 0;
    for subscriber in ["bad", "picky"] {
        lost_deliveries += world.deliveries_are_right(subscriber).await;
    }
    let deliveries = world.bad.by_batch().len() + world.picky.by_batch().len();
    let sampled = sample(&mut rng, 0, events);
    let unknown = world.where_is_right(&sampled).await;
    assert_eq!(world.where_is_right(&before).await, 0, "what was recorded before stays so");
    assert!(unknown < SAMPLE / 2, "{unknown} of {} answers are unknown", 3 * SAMPLE);

    assert_eq!(world.off.requests.len(), 0, "it is paused");
    world.setup.ok(&["resume", "off"]);
    world.off_is_paused = false;
    world.off.wait_for("off", 0..events).await;
    assert_eq!(world.deliveries_are_right("off").await, 0);
    assert_eq!(world.where_is_right(&sampled).await, unknown);

    let replayed = an_hour_comes_again(&mut world, (since, until), first..second).await;
    assert_eq!(world.where_is_right(&before).await, 0, "a replay changes no answer");
    println!(
        "memory, {what}, seed {seed}: {events} events, all in history{}; {deliveries} deliveries are as the receivers have them but for {lost_deliveries} of the time of the kill; `where` is right for {} answers, {unknown} of them unknown because of the kill; {replayed} events came again in a replay that was killed, cancelled and continued; {:.1} s in all",
        if killed_while_publishing { ", killed while they were published" } else { "" },
        3 * (SAMPLE + SAMPLE),
        begun.elapsed().as_secs_f64()
    );
}

/// Replays a time to `picky`; the daemon is killed in it, then it is cancelled and continued. The
/// number of events that came again.
async fn an_hour_comes_again(
    world: &mut World,
    (since, until): (SystemTime, SystemTime),
    numbers: std::ops::Range<u64>,
) -> usize {
    let expected: BTreeSet<u64> = numbers.filter(|n| is_for_picky(*n)).collect();
    let text = |time| humantime::format_rfc3339_millis(time).to_string();
    let (since, until) = (text(since), text(until));
    let hour = ["replay", "picky", "--since", &since, "--until", &until, "--json"];
    let dry = world.setup.ok(&[&hour[..], &["--dry-run"]].concat());
    let dry: Value = serde_json::from_str(&dry).expect("JSON");
    assert_eq!(json!([dry["events"], dry["complete"]]), json!([expected.len(), true]), "{dry}");

    world.update();
    let others = (world.bad.requests.len(), world.off.requests.len());
    let before = world.picky.requests.len();
    // The first are answered; the next ones when the test says so.
    let gate = tokio::sync::watch::Sender::new(false);
    world.picky.receiver.now({
        let answered = std::sync::Mutex::new(HashSet::new());
        let gate = gate.clone();
        move |request, _| {
            let mut answered = answered.lock().expect("no panic");
            let is_first = answered.len() < BEFORE_INTERRUPTION;
            if is_first {
                answered.insert(request.id().to_owned());
            }
            if answered.contains(request.id()) { status(200) } else { status(200).when(&gate) }
        }
    });
    let made = world.setup.ok(&[&hour[..], &["--yes"]].concat());
    let made: Value = serde_json::from_str(&made).expect("JSON");
    let id = made["id"].as_str().expect("an id").to_owned();
    let again = |world: &mut World| {
        world.update();
        world.picky.requests[before..].to_vec()
    };
    eventually("it waits for an answer", async || again(world).len() > BEFORE_INTERRUPTION).await;
    let waiting = again(world).len();
    world.take_over(0).await;
    eventually("what had no answer comes again", async || again(world).len() > waiting).await;
    world.setup.ok(&["replay", "cancel", &id]);
    let cancelled = world.wait_replay(&id, "cancelled").await;
    let enqueued = cancelled["enqueued"].as_u64().expect("a number");
    assert!(enqueued < expected.len() as u64, "there is more to send: {cancelled}");
    gate.send_replace(true);
    let come = |requests: &[Request]| -> BTreeSet<u64> {
        requests.iter().flat_map(Request::numbers).collect()
    };
    eventually("what was in the queue arrived", async || {
        come(&again(world)).len() as u64 >= enqueued
    })
    .await;
    // The cancellation can come between a batch in the queue and the record of it.
    let came = come(&again(world)).len() as u64;
    assert!(came <= enqueued + world.batch, "{came} of {enqueued}, and at most a batch more");
    world.setup.ok(&["replay", "continue", &id]);
    let done = world.wait_replay(&id, "done").await;
    let said = json!([done["enqueued"], done["missing"], done["unusable"]]);
    assert_eq!(said, json!([expected.len(), 0, 0]), "{done}");
    eventually("all came again", async || come(&again(world)).len() >= expected.len()).await;

    let (mut batches, requests) = (BTreeMap::new(), again(world));
    for request in &requests {
        assert!(is_replay(request) && is_accepted(request));
        let former = batches.insert(request.id().to_owned(), request);
        assert!(former.is_none_or(|former| former.body == request.body), "one id, one body");
        for event in request.events() {
            let n = event["n"].as_u64().expect("a number");
            assert_eq!(event["event_id"], id_of(n), "an event keeps its id");
        }
    }
    let mut sent: Vec<u64> = batches.values().flat_map(|r| r.numbers()).collect();
    sent.sort_unstable();
    assert!(
        sent.iter().copied().eq(expected),
        "exactly the events of that time, each in one batch"
    );
    world.update();
    let now = (world.bad.requests.len(), world.off.requests.len());
    assert_eq!(now, others, "no other subscriber gets any");
    sent.len()
}

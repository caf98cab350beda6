//! Wires lanes to a queue, gives them what is configured anew, restarts those that panic, drains
//! them at the end.
//!
//! The start is a change from nothing: both go through [`Fleet::reconcile`].

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    future::Future,
    sync::Arc,
    time::Duration,
};

use futures_util::future::BoxFuture;
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::{JoinError, JoinSet},
    time::timeout,
};

use crate::{
    clock,
    config::{Subscriber, Subscribers, changes::Differences, keys::Affects},
    crypto::tls::SystemRoots,
    delivery::SubscriberName,
    endpoint::webhook::Webhook,
    lane::{Lane, LaneConfig},
    policy::retry::Backoff,
    queue::{Queue, QueueError},
    telemetry::{
        lane_event::LaneEvent,
        status::{Board, LaneReporter},
    },
};

/// How long a change waits for the queue. Lanes and chores do what is left to do when it is there
/// again.
const PREPARE_TIMEOUT: Duration = Duration::from_secs(60);

/// How long at most the end of a daemon waits for what is done beside its lanes.
const CHORES_GOODBYE: Duration = Duration::from_secs(5);

/// And the queue's goodbye, when somebody is in a hurry.
const HURRIED_GOODBYE: Duration = Duration::from_secs(1);

/// How often the queues are looked at.
const LOOK_INTERVAL: Duration = Duration::from_secs(10);

/// For one look.
const LOOK_TIMEOUT: Duration = Duration::from_secs(30);

/// A look that takes long is not repeated at once: at most this part of the time is spent looking.
const LOOK_SHARE: u32 = 20;

/// And the longest rest: it may have waited for a broker that was away, which says nothing of the
/// next look.
const LOOK_REST: Duration = Duration::from_secs(60);

/// How far a run is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// The queue is being made ready.
    Starting,
    Running,
    /// Nothing new is begun.
    Draining,
}

impl Phase {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Draining => "draining",
        }
    }
}

/// How a run ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Ended {
    /// Everything in flight was settled.
    Drained,
    /// These subscribers still had requests in flight at the deadline, or when somebody was in a
    /// hurry; they are delivered again.
    Deadline(BTreeSet<SubscriberName>),
}

/// Other subscribers than before, and whom to tell when they are served.
#[derive(Debug)]
pub struct Change {
    pub subscribers: Subscribers,
    /// Who of them is not bound yet; an error means that nothing was changed.
    pub done: oneshot::Sender<Result<BTreeSet<SubscriberName>, QueueError>>,
}

/// What a run is given from outside.
pub struct Controls<'a> {
    pub phase: &'a watch::Sender<Phase>,
    pub changes: mpsc::Receiver<Change>,
    pub board: Board,
    /// For requests in flight at the end; what it says then counts.
    pub shutdown_timeout: watch::Receiver<Duration>,
    /// Ends the drain at once, whatever is in flight.
    pub hurry: BoxFuture<'a, ()>,
}

impl fmt::Debug for Controls<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Controls").field("phase", &*self.phase.borrow()).finish_non_exhaustive()
    }
}

/// Runs a lane for each subscriber until `shutdown` completes, then drains them for at most
/// `shutdown_timeout`.
///
/// `beside` is whatever else uses the queue, told by `phase` what to do: the queue stays open until
/// it completes.
///
/// # Errors
/// The queue is of no use and will not change by itself, or https cannot be spoken.
pub async fn run<Q: Queue>(
    queue: Q,
    subscribers: Subscribers,
    shutdown: impl Future<Output = ()>,
    controls: Controls<'_>,
    beside: impl Future<Output = ()>,
) -> Result<Ended, QueueError> {
    let Controls { phase, mut changes, board, shutdown_timeout, mut hurry } = controls;
    let mut fleet = Fleet::new(queue.clone(), board.clone())?;
    let mut shutdown = std::pin::pin!(shutdown);
    let plan = fleet.plan(&subscribers)?;
    // Told before it is known to be up: a daemon that never gets its queue is one to alert of.
    board.metrics().set_queue_up(false);
    board.follow(queue.troubles());
    tokio::select! {
        // Who is not ready is in the log, and its lane tells of it.
        ready = queue.prepare(&subscribers) => drop(ready?),
        () = &mut shutdown => {
            tracing::info!("stopping: the queue was not ready yet, and nothing was begun");
            phase.send_replace(Phase::Draining);
            tracing::info!("stopped");
            return Ok(Ended::Drained);
        }
    }
    fleet.reconcile(subscribers, plan);
    phase.send_replace(Phase::Running);
    tracing::info!(subscribers = fleet.lanes.len(), "running");
    let mut chores = JoinSet::new();
    let (doing, subscribers) = (queue.clone(), fleet.subscribers.subscribe());
    let (stop, stopping) = watch::channel(false);
    chores.spawn(async move { doing.chores(subscribers, stopping).await });
    let (looking, subscribers) = (queue.clone(), fleet.subscribers.subscribe());
    let seen = board.clone();
    let look =
        chores.spawn(async move { look_again_and_again(&looking, subscribers, &seen).await });

    loop {
        tokio::select! {
            () = &mut shutdown => break,
            Some(ended) = chores.join_next() => {
                if let Err(e) = ended {
                    tracing::error!(error = %e, "a chore beside the lanes panicked and is not done any more until a restart");
                }
            }
            Some(ended) = fleet.keepers.join_next() => fleet.ended(ended.unwrap_or_else(resume)),
            Some(Change { subscribers, done }) = changes.recv() => {
                let changed = tokio::select! {
                    changed = fleet.change(subscribers) => changed,
                    () = &mut shutdown => break,
                };
                // Who asked may be gone; the change stays.
                drop(done.send(changed));
            }
        }
    }
    let shutdown_timeout = *shutdown_timeout.borrow();
    say_what_is_waited_for(&board.in_flight(), shutdown_timeout);
    phase.send_replace(Phase::Draining);
    stop.send_replace(true);
    look.abort();
    let chores_end = async { while chores.join_next().await.is_some() {} };
    let mut busy = fleet.drain();
    let lanes = async {
        while let Some(ended) = fleet.keepers.join_next().await {
            busy.remove(&ended.unwrap_or_else(resume));
        }
    };
    let drained = async {
        tokio::join!(
            async {
                timeout(shutdown_timeout, async { tokio::join!(lanes, beside) }).await.is_ok()
            },
            timeout(shutdown_timeout.min(CHORES_GOODBYE), chores_end)
        )
    };
    let (in_time, hurried) = tokio::select! {
        biased;
        (in_time, _) = drained => (in_time, false),
        () = &mut hurry => (false, true),
    };
    chores.shutdown().await;
    if !in_time {
        fleet.keepers.shutdown().await;
    }
    if hurried {
        // A broker that is away does not hold it up.
        timeout(HURRIED_GOODBYE, queue.close()).await.ok();
        tracing::warn!(subscribers = ?busy, "stopped at once, by a second signal, with requests in flight; their events are delivered again, producers without an answer must send again");
        return Ok(Ended::Deadline(busy));
    }
    queue.close().await;
    if in_time {
        tracing::info!("stopped");
        return Ok(Ended::Drained);
    }
    tracing::warn!(subscribers = ?busy, "stopped at the deadline with requests in flight; their events are delivered again, producers without an answer must send again");
    Ok(Ended::Deadline(busy))
}

/// For whoever watches it end: what it is that takes the time, how long at most, and how to have it
/// shorter.
fn say_what_is_waited_for(in_flight: &BTreeMap<SubscriberName, usize>, shutdown_timeout: Duration) {
    let requests: usize = in_flight.values().sum();
    let deadline = clock::now().checked_add(shutdown_timeout).map(clock::rfc3339_seconds);
    tracing::info!(
        timeout_s = shutdown_timeout.as_secs_f64(),
        deadline,
        requests,
        subscribers = ?in_flight,
        "stopping: nothing new is taken, requests in flight finish; a second signal ends it at once"
    );
}

/// A keeper holds no code that panics; if it does, so does the process.
fn resume(e: JoinError) -> SubscriberName {
    std::panic::resume_unwind(e.into_panic())
}

/// The lanes that run.
struct Fleet<Q> {
    queue: Q,
    tls: SystemRoots,
    board: Board,
    subscribers: watch::Sender<Subscribers>,
    lanes: BTreeMap<SubscriberName, Running>,
    keepers: JoinSet<SubscriberName>,
}

/// A lane and what it is told.
struct Running {
    configured: watch::Sender<LaneConfig>,
    drain: watch::Sender<bool>,
    /// It drains because its subscriber was removed, and was configured again before that was done.
    again: Option<LaneConfig>,
}

/// What is made ready before anything is changed: the endpoints of subscribers that are new or
/// changed.
type Endpoints = BTreeMap<SubscriberName, LaneConfig>;

impl<Q: Queue> Fleet<Q> {
    fn new(queue: Q, board: Board) -> Result<Self, QueueError> {
        let tls = SystemRoots::load().map_err(QueueError::needs_operator)?;
        Ok(Self {
            queue,
            tls,
            board,
            subscribers: watch::Sender::new(Subscribers::default()),
            lanes: BTreeMap::new(),
            keepers: JoinSet::new(),
        })
    }

    /// What these subscribers need that those before did not.
    fn plan(&self, subscribers: &[Arc<Subscriber>]) -> Result<Endpoints, QueueError> {
        let mut endpoints = Endpoints::new();
        for s in subscribers {
            let old = self
                .lanes
                .get(&s.name)
                .filter(|lane| !*lane.drain.borrow())
                .map(|lane| lane.configured.borrow().clone());
            let webhook = match old {
                Some(old) if Differences::between(&old.subscriber, s).is_empty() => continue,
                Some(old) => old.webhook.renewed(&old.subscriber, s, &self.tls),
                None => Webhook::try_new(s, &self.tls),
            };
            let webhook = webhook
                .map_err(|e| QueueError::needs_operator(format!("subscriber `{}`: {e}", s.name)))?;
            endpoints.insert(s.name.clone(), LaneConfig { subscriber: s.clone(), webhook });
        }
        Ok(endpoints)
    }

    /// Returns who is not bound yet, as far as that is known.
    async fn change(
        &mut self,
        subscribers: Subscribers,
    ) -> Result<BTreeSet<SubscriberName>, QueueError> {
        let plan = self.plan(&subscribers)?;
        // What is bound anew is bound before anything is unbound, which is a chore.
        let not_bound = match timeout(PREPARE_TIMEOUT, self.queue.prepare(&subscribers)).await {
            Ok(ready) => ready?,
            Err(_) => {
                tracing::warn!(
                    "the queue does not get ready; what is configured anew is bound when it does"
                );
                self.to_be_bound(&subscribers)
            }
        };
        self.reconcile(subscribers, plan);
        Ok(not_bound)
    }

    /// Those who are new, or want other events than before.
    fn to_be_bound(&self, subscribers: &[Arc<Subscriber>]) -> BTreeSet<SubscriberName> {
        let before = self.subscribers.borrow();
        let is_same = |old: &Subscriber, s: &Subscriber| {
            !Differences::between(old, s).affect(Affects::Bindings)
        };
        let is_bound =
            |s: &Subscriber| before.iter().any(|old| old.name == s.name && is_same(old, s));
        subscribers.iter().filter(|s| !is_bound(s)).map(|s| s.name.clone()).collect()
    }

    /// Makes the lanes those of `subscribers`. A lane without a part in `endpoints` is not touched.
    fn reconcile(&mut self, subscribers: Subscribers, endpoints: Endpoints) {
        let names: BTreeSet<&str> = subscribers.iter().map(|s| s.name.as_str()).collect();
        for (name, lane) in &mut self.lanes {
            if !names.contains(name.as_str()) {
                lane.again = None;
                if !lane.drain.send_replace(true) {
                    tracing::warn!(
                        subscriber = name.as_str(),
                        "removed: its requests in flight finish, its backlog stays until `hooktrail prune`"
                    );
                }
            }
        }
        for (name, served) in endpoints {
            match self.lanes.get_mut(&name) {
                Some(lane) if *lane.drain.borrow() => lane.again = Some(served),
                Some(lane) => drop(lane.configured.send_replace(served)),
                None => self.start(name, served),
            }
        }
        self.subscribers.send_replace(subscribers);
    }

    fn start(&mut self, name: SubscriberName, served: LaneConfig) {
        let (configured, drain) = (watch::Sender::new(served), watch::Sender::new(false));
        self.keepers.spawn(keep(
            name.clone(),
            configured.subscribe(),
            self.queue.clone(),
            self.board.lane(&name),
            drain.subscribe(),
        ));
        self.lanes.insert(name, Running { configured, drain, again: None });
    }

    /// A lane has drained.
    fn ended(&mut self, name: SubscriberName) {
        match self.lanes.remove(&name).and_then(|lane| lane.again) {
            Some(served) => self.start(name, served),
            None => self.board.forget(&name),
        }
    }

    /// Tells all lanes to come to an end; returns whose they are.
    fn drain(&self) -> BTreeSet<SubscriberName> {
        for lane in self.lanes.values() {
            lane.drain.send_replace(true);
        }
        self.lanes.keys().cloned().collect()
    }
}

/// Runs a lane, and runs it again after a panic. Returns the subscriber's name.
async fn keep<Q: Queue>(
    name: SubscriberName,
    configured: watch::Receiver<LaneConfig>,
    queue: Q,
    reporter: LaneReporter,
    mut drain: watch::Receiver<bool>,
) -> SubscriberName {
    let mut waits = Backoff::new(Duration::from_secs(1), Duration::from_secs(60));
    loop {
        let lane = Lane::new(configured.clone(), queue.clone(), reporter.clone());
        // A set of one: when the keeper is stopped at the deadline, so is the lane.
        let mut task = JoinSet::new();
        task.spawn(lane.run(drain.clone()));
        match task.join_next().await {
            Some(Err(e)) => {
                let wait = waits.grow();
                reporter.report(&LaneEvent::Panicked { error: &e.to_string(), restart_in: wait });
                tokio::select! {
                    () = tokio::time::sleep(wait) => {}
                    _ = drain.wait_for(|d| *d) => return name,
                }
            }
            Some(Ok(())) | None => return name,
        }
    }
}

/// Looks at the queues now and then, and puts what it sees on the board.
async fn look_again_and_again(
    queue: &impl Queue,
    mut subscribers: watch::Receiver<Subscribers>,
    board: &Board,
) {
    loop {
        let begun = clock::instant();
        let current = subscribers.borrow_and_update().clone();
        // A broker that is away is waited for without end.
        let found = timeout(LOOK_TIMEOUT, queue.depths(&current)).await;
        let late = || format!("the queue did not answer within {} s", LOOK_TIMEOUT.as_secs());
        let found = found.map_err(|_| late()).and_then(|found| found.map_err(|e| e.to_string()));
        // Without an answer it cost nothing but time.
        let rest = if found.is_ok() {
            ((clock::instant() - begun) * LOOK_SHARE).min(LOOK_REST)
        } else {
            LOOK_INTERVAL
        };
        board.metrics().set_queue_up(queue.is_reachable());
        board.polled(clock::now(), found);
        tokio::select! {
            () = tokio::time::sleep(rest.max(LOOK_INTERVAL)) => {}
            () = async { tokio::time::sleep(rest).await; board.poll_wanted().await } => {}
            Ok(()) = subscribers.changed() => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        config::{self, Config},
        queue::{SettleError, fake::Fake},
        telemetry::metrics::Metrics,
    };
    use axum::{Router, http::StatusCode, routing::post};
    use std::sync::atomic::{AtomicUsize, Ordering};
    use tokio::sync::oneshot;

    /// A receiver that answers the n-th request with `status(n)`, and how many came.
    async fn receiver(status: fn(usize) -> u16) -> (String, Arc<AtomicUsize>) {
        rustls::crypto::ring::default_provider().install_default().ok();
        let count = Arc::new(AtomicUsize::new(0));
        let counter = count.clone();
        let answer = move || {
            let n = counter.fetch_add(1, Ordering::SeqCst);
            async move { StatusCode::from_u16(status(n)).expect("a status") }
        };
        let socket = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let url = format!("http://{}/", socket.local_addr().expect("an address"));
        tokio::spawn(async move {
            axum::serve(socket, Router::new().route("/", post(answer))).await.expect("serves")
        });
        (url, count)
    }

    fn config(names: &[&str], url: &str) -> Config {
        let dir = tempfile::tempdir().expect("a directory");
        let subscriber = |n: &&str| {
            format!(
                "[[subscriber]]\nname = \"{n}\"\nurl = \"{url}\"\nsignatures = []\nbatch.max_wait = \"0s\"\nhttp = {{ allow_http = true, allow_private_addresses = true }}\n"
            )
        };
        let text = format!(
            "[queue]\nurl = \"amqp://unused\"\n{}",
            names.iter().map(subscriber).collect::<String>()
        );
        let path = dir.path().join("h.toml");
        std::fs::write(&path, text).expect("writes");
        config::load(&path).unwrap_or_else(|e| panic!("{e}"))
    }

    async fn until(what: &str, condition: impl Fn() -> bool) {
        let waiting = async {
            while !condition() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(30), waiting)
            .await
            .unwrap_or_else(|_| panic!("never: {what}"));
    }

    async fn while_running<F: Future<Output = ()>>(queue: Fake, config: Config, test: F) {
        let (stop, stopped) = oneshot::channel::<()>();
        let running = tokio::spawn(async move {
            let shutdown = async { drop(stopped.await) };
            let (phase, changes) = (watch::Sender::new(Phase::Starting), mpsc::channel(1).1);
            let board = Board::new(Metrics::new(clock::now()));
            let shutdown_timeout = watch::Sender::new(Duration::from_secs(10)).subscribe();
            let controls = Controls {
                phase: &phase,
                changes,
                board,
                shutdown_timeout,
                hurry: Box::pin(std::future::pending()),
            };
            run(queue, config.subscribers, shutdown, controls, std::future::ready(())).await
        });
        test.await;
        drop(stop);
        assert_eq!(running.await.expect("does not panic").expect("runs"), Ended::Drained);
    }

    #[tokio::test]
    async fn a_lane_that_panics_is_restarted_and_the_others_notice_nothing() {
        let (url, requests) = receiver(|_| 200).await;
        let queue = Fake::default();
        queue.panic_once("bad");
        queue.put("bad", &[r#"{"event":"a"}"#]);
        while_running(queue.clone(), config(&["bad", "good"], &url), async {
            queue.put("good", &[r#"{"event":"a"}"#]);
            until("the good lane delivers", || requests.load(Ordering::SeqCst) >= 1).await;
            until("the other one comes back and delivers too", || queue.is_empty()).await;
            assert_eq!(requests.load(Ordering::SeqCst), 2);
            assert_eq!(queue.opened(), 3, "two lanes, one of them opened again");
        })
        .await;
    }

    #[tokio::test]
    async fn a_failure_that_is_not_written_down_is_attempted_again_and_written_once() {
        let (url, requests) = receiver(|n| if n < 2 { 500 } else { 200 }).await;
        let queue = Fake::default();
        queue.answer_next(SettleError::Unconfirmed("no confirm".to_owned()));
        while_running(queue.clone(), config(&["a"], &url), async {
            queue.put("a", &[r#"{"event":"a"}"#]);
            until("the second failure is written down", || queue.retries().len() == 1).await;
            assert_eq!(requests.load(Ordering::SeqCst), 2);
            assert_eq!(queue.opened(), 2, "the queue was opened again before the event came again");
            assert!(queue.is_empty());
            let (envelope, delay) = queue.retries().remove(0);
            assert_eq!(
                (envelope.attempts, &envelope.body[..]),
                (1, &br#"{"events":[{"event":"a"}]}"#[..])
            );
            assert!(delay >= Duration::from_secs(4), "{delay:?}");
        })
        .await;
    }

    #[tokio::test]
    async fn a_queue_that_opens_and_fails_again_and_again_is_told_once_when_it_fails_and_once_when_it_works()
     {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let writer = std::sync::Mutex::new(file.reopen().expect("opens"));
        let _logging = tracing::subscriber::set_default(
            tracing_subscriber::fmt().with_ansi(false).with_writer(writer).finish(),
        );
        let told = |what: &str| {
            std::fs::read_to_string(file.path()).expect("the log").matches(what).count()
        };
        let (lost, again) = ("the lane lost its queue", "the lane has its queue again");
        let (url, requests) = receiver(|_| 200).await;
        let queue = Fake::default();
        while_running(queue.clone(), config(&["a"], &url), async {
            for round in 1..3 {
                let opened = queue.opened();
                for _ in 0..3 {
                    queue.answer_next(SettleError::Unconfirmed("no confirm".to_owned()));
                }
                queue.put("a", &[r#"{"event":"a"}"#]);
                until("it is delivered", || queue.is_empty() && told(again) == round).await;
                assert_eq!(
                    (told(lost), queue.opened() - opened),
                    (round, if round == 1 { 4 } else { 3 })
                );
            }
            assert_eq!(requests.load(Ordering::SeqCst), 8);
        })
        .await;
        assert_eq!((told(lost), told(again)), (2, 2));
    }

    #[tokio::test]
    async fn a_batch_whose_source_is_gone_is_forgotten() {
        let (url, requests) = receiver(|_| 500).await;
        let queue = Fake::default();
        queue.answer_next(SettleError::Gone);
        while_running(queue.clone(), config(&["a"], &url), async {
            queue.put("a", &[r#"{"event":"a"}"#]);
            until("it was attempted", || requests.load(Ordering::SeqCst) == 1).await;
            queue.put("a", &[r#"{"event":"b"}"#]);
            until("the lane goes on", || requests.load(Ordering::SeqCst) == 2).await;
            until("the other one is written down", || queue.retries().len() == 1).await;
            assert_eq!(
                &queue.retries()[0].0.body[..],
                br#"{"events":[{"event":"b"}]}"#,
                "of the first there is no envelope"
            );
            assert!(!queue.is_empty(), "it is still in the queue");
        })
        .await;
    }
}

//! Runs the lanes: starts them, gives them each new configuration, restarts those that panic, and
//! drains them at the end.
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
    task::{AbortHandle, JoinError, JoinSet},
    time::timeout,
};

use crate::{
    clock,
    config::{Subscriber, Subscribers, changes::Differences, keys::Affects},
    crypto::tls::SystemRoots,
    delivery::SubscriberName,
    endpoint::webhook::Webhook,
    history::newcomers::Newcomers,
    lane::{Lane, LaneConfig},
    policy::retry::Backoff,
    queue::{Queue, QueueError},
    telemetry::{
        lane_event::LaneEvent,
        status::{Board, LaneReporter},
    },
};

/// The longest that a change waits for the queue. Lanes and background tasks do the rest once the
/// queue is there again.
const PREPARE_TIMEOUT: Duration = Duration::from_secs(60);

/// The longest that the end of a daemon waits for its background tasks.
const BACKGROUND_TIMEOUT: Duration = Duration::from_secs(5);

/// The longest that the queue may take to close after a second signal.
const HURRIED_CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// The time between two polls of the queues' depths.
const POLL_INTERVAL: Duration = Duration::from_secs(10);

/// The longest that one poll may take.
const POLL_TIMEOUT: Duration = Duration::from_secs(30);

/// A poll that took long is followed by a pause of this many times its duration.
const POLL_PAUSE_FACTOR: u32 = 20;

/// The longest of these pauses: a poll that was slow because the broker was away says nothing of
/// the next one.
const MAX_POLL_PAUSE: Duration = Duration::from_secs(60);

/// The phase of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// The queue is being prepared.
    Starting,
    Running,
    /// Nothing new is started.
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

/// The end of a run.
#[derive(Debug, PartialEq, Eq)]
pub enum Ended {
    /// Everything in flight was settled.
    Drained,
    /// These subscribers still had requests in flight at the deadline, or at a second signal; their
    /// events are delivered again.
    Deadline(BTreeSet<SubscriberName>),
}

/// A change of the subscribers.
#[derive(Debug)]
pub struct Change {
    pub subscribers: Subscribers,
    /// Gets the names of those that are not bound yet; an error means that nothing was changed.
    pub done: oneshot::Sender<Result<BTreeSet<SubscriberName>, QueueError>>,
}

/// The connections of a run to the rest of the daemon.
pub struct Controls<'a> {
    pub phase: &'a watch::Sender<Phase>,
    pub changes: mpsc::Receiver<Change>,
    pub board: Board,
    /// The longest that a drain waits for requests in flight; its value at the begin of the drain
    /// counts.
    pub shutdown_timeout: watch::Receiver<Duration>,
    /// Says which subscribers are about to be bound.
    pub newcomers: Newcomers,
    /// Completes when the drain is to end at once, whatever is in flight.
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
/// `alongside` is everything else that uses the queue, and follows `phase`: the queue stays open
/// until it completes.
///
/// # Errors
/// The queue is unusable until an operator acts, or TLS cannot be set up.
pub async fn run<Q: Queue>(
    queue: Q,
    subscribers: Subscribers,
    shutdown: impl Future<Output = ()>,
    controls: Controls<'_>,
    alongside: impl Future<Output = ()>,
) -> Result<Ended, QueueError> {
    let Controls { phase, mut changes, board, shutdown_timeout, newcomers, hurry } = controls;
    let mut fleet = Fleet::new(queue.clone(), board.clone(), newcomers)?;
    let mut shutdown = std::pin::pin!(shutdown);
    let plan = fleet.plan(&subscribers)?;
    // Reported before it is known to be up: there has to be an alert of a daemon that never gets
    // its queue.
    board.metrics().set_queue_up(false);
    board.follow(queue.troubles());
    tokio::select! {
        // A subscriber that is not ready is in the log, and its lane reports it.
        ready = fleet.prepare(&subscribers) => drop(ready?),
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
    let mut background = Background::start(&fleet);
    tokio::select! {
        () = &mut shutdown => {}
        () = fleet.serve(&mut changes, &mut background) => {}
    }
    let shutdown_timeout = *shutdown_timeout.borrow();
    log_drain(&board.in_flight(), shutdown_timeout);
    phase.send_replace(Phase::Draining);
    Ok(fleet.shut_down(background, alongside, hurry, shutdown_timeout).await)
}

/// Logs what a drain waits for, for how long at most, and how to have it shorter.
fn log_drain(in_flight: &BTreeMap<SubscriberName, usize>, shutdown_timeout: Duration) {
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

/// The tasks of a run besides its lanes: those of the queue, and the poll of its depths.
struct Background {
    tasks: JoinSet<()>,
    stop: watch::Sender<bool>,
    poll: AbortHandle,
}

impl Background {
    fn start<Q: Queue>(fleet: &Fleet<Q>) -> Self {
        let mut tasks = JoinSet::new();
        let (stop, stopping) = watch::channel(false);
        let (queue, subscribers) = (fleet.queue.clone(), fleet.subscribers.subscribe());
        tasks.spawn(async move { queue.background(subscribers, stopping).await });
        let (queue, subscribers) = (fleet.queue.clone(), fleet.subscribers.subscribe());
        let board = fleet.board.clone();
        let poll = tasks.spawn(async move { poll_depths(&queue, subscribers, &board).await });
        Self { tasks, stop, poll }
    }

    /// Completes when a task ended; pending while there is none.
    async fn ended(&mut self) {
        match self.tasks.join_next().await {
            Some(Ok(())) => {}
            Some(Err(e)) => tracing::error!(
                error = %e,
                "a background task panicked; it stays off until the daemon is restarted"
            ),
            None => std::future::pending().await,
        }
    }

    fn stop(&self) {
        self.stop.send_replace(true);
        self.poll.abort();
    }

    async fn all_ended(&mut self) {
        while self.tasks.join_next().await.is_some() {}
    }
}

/// Passes on a panic of a supervising task, which has no code of its own that panics.
fn resume(e: JoinError) -> SubscriberName {
    std::panic::resume_unwind(e.into_panic())
}

/// The running lanes.
struct Fleet<Q> {
    queue: Q,
    tls: SystemRoots,
    board: Board,
    newcomers: Newcomers,
    subscribers: watch::Sender<Subscribers>,
    lanes: BTreeMap<SubscriberName, Running>,
    /// Each ends with its lane, and returns the subscriber's name.
    supervisors: JoinSet<SubscriberName>,
}

/// The controls of a lane.
struct Running {
    configured: watch::Sender<LaneConfig>,
    drain: watch::Sender<bool>,
    /// The lane drains because its subscriber was removed, and the subscriber was configured again
    /// meanwhile.
    again: Option<LaneConfig>,
}

/// The lanes that are new or have changed, made ready before anything is changed.
type Plan = BTreeMap<SubscriberName, LaneConfig>;

impl<Q: Queue> Fleet<Q> {
    fn new(queue: Q, board: Board, newcomers: Newcomers) -> Result<Self, QueueError> {
        let tls = SystemRoots::load().map_err(QueueError::needs_operator)?;
        Ok(Self {
            queue,
            tls,
            board,
            newcomers,
            subscribers: watch::Sender::new(Subscribers::default()),
            lanes: BTreeMap::new(),
            supervisors: JoinSet::new(),
        })
    }

    /// Prepares the queue, after the new subscribers are recorded. Waits for it indefinitely.
    async fn prepare(
        &self,
        subscribers: &Subscribers,
    ) -> Result<BTreeSet<SubscriberName>, QueueError> {
        self.newcomers.announce(subscribers).await;
        self.queue.prepare(subscribers).await
    }

    /// What these subscribers need that the current ones do not have.
    fn plan(&self, subscribers: &[Arc<Subscriber>]) -> Result<Plan, QueueError> {
        let mut plan = Plan::new();
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
            plan.insert(s.name.clone(), LaneConfig { subscriber: s.clone(), webhook });
        }
        Ok(plan)
    }

    /// Runs the lanes, and applies each change of the subscribers.
    async fn serve(&mut self, changes: &mut mpsc::Receiver<Change>, background: &mut Background) {
        loop {
            tokio::select! {
                () = background.ended() => {}
                Some(ended) = self.supervisors.join_next() => {
                    self.ended(ended.unwrap_or_else(resume));
                }
                Some(Change { subscribers, done }) = changes.recv() => {
                    let changed = self.change(subscribers).await;
                    // The caller may be gone; the change stays.
                    drop(done.send(changed));
                }
            }
        }
    }

    /// Returns the subscribers that are not bound yet, as far as that is known.
    async fn change(
        &mut self,
        subscribers: Subscribers,
    ) -> Result<BTreeSet<SubscriberName>, QueueError> {
        let plan = self.plan(&subscribers)?;
        // This binds the new patterns. A background task unbinds the old ones later.
        let not_bound = match timeout(PREPARE_TIMEOUT, self.prepare(&subscribers)).await {
            Ok(ready) => ready?,
            Err(_) => {
                tracing::warn!("the queue is not ready; new patterns are bound when it is");
                self.to_be_bound(&subscribers)
            }
        };
        self.reconcile(subscribers, plan);
        Ok(not_bound)
    }

    /// The subscribers that are new, or have other patterns than before.
    fn to_be_bound(&self, subscribers: &[Arc<Subscriber>]) -> BTreeSet<SubscriberName> {
        let before = self.subscribers.borrow();
        let is_same = |old: &Subscriber, s: &Subscriber| {
            !Differences::between(old, s).affect(Affects::Bindings)
        };
        let known: BTreeMap<&SubscriberName, &Subscriber> =
            before.iter().map(|old| (&old.name, &**old)).collect();
        let is_bound = |s: &Subscriber| known.get(&s.name).is_some_and(|old| is_same(old, s));
        subscribers.iter().filter(|s| !is_bound(s)).map(|s| s.name.clone()).collect()
    }

    /// Makes the lanes those of `subscribers`. A lane that is not in `plan` is not touched.
    fn reconcile(&mut self, subscribers: Subscribers, plan: Plan) {
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
        for (name, lane) in &self.lanes {
            if !plan.contains_key(name) && lane.configured.borrow().webhook.refuses_compression() {
                // The lane looks at it, and reports that.
                lane.configured.send_modify(|config| config.webhook.compress_again());
            }
        }
        for (name, config) in plan {
            match self.lanes.get_mut(&name) {
                Some(lane) if *lane.drain.borrow() => lane.again = Some(config),
                Some(lane) => drop(lane.configured.send_replace(config)),
                None => self.start(name, config),
            }
        }
        self.subscribers.send_replace(subscribers);
    }

    fn start(&mut self, name: SubscriberName, config: LaneConfig) {
        let (configured, drain) = (watch::Sender::new(config), watch::Sender::new(false));
        self.supervisors.spawn(supervise(
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
            Some(config) => self.start(name, config),
            None => self.board.forget(&name),
        }
    }

    /// Drains the lanes, ends the background tasks, and closes the queue.
    async fn shut_down(
        mut self,
        mut background: Background,
        alongside: impl Future<Output = ()>,
        mut hurry: BoxFuture<'_, ()>,
        limit: Duration,
    ) -> Ended {
        background.stop();
        let mut busy = self.drain();
        let lanes = async {
            while let Some(ended) = self.supervisors.join_next().await {
                busy.remove(&ended.unwrap_or_else(resume));
            }
        };
        let work = async { timeout(limit, async { tokio::join!(lanes, alongside) }).await.is_ok() };
        let background_limit = limit.min(BACKGROUND_TIMEOUT);
        let drained =
            async { tokio::join!(work, timeout(background_limit, background.all_ended())) };
        let (in_time, hurried) = tokio::select! {
            biased;
            (in_time, _) = drained => (in_time, false),
            () = &mut hurry => (false, true),
        };
        background.tasks.shutdown().await;
        if !in_time {
            self.supervisors.shutdown().await;
        }
        if hurried {
            // A broker that is away does not delay it.
            timeout(HURRIED_CLOSE_TIMEOUT, self.queue.close()).await.ok();
            tracing::warn!(subscribers = ?busy, "stopped at once, by a second signal, with requests in flight; their events are delivered again, producers without an answer must send again");
            return Ended::Deadline(busy);
        }
        self.queue.close().await;
        if in_time {
            tracing::info!("stopped");
            return Ended::Drained;
        }
        tracing::warn!(subscribers = ?busy, "stopped at the deadline with requests in flight; their events are delivered again, producers without an answer must send again");
        Ended::Deadline(busy)
    }

    /// Has all lanes drain; returns their subscribers.
    fn drain(&self) -> BTreeSet<SubscriberName> {
        for lane in self.lanes.values() {
            lane.drain.send_replace(true);
        }
        self.lanes.keys().cloned().collect()
    }
}

/// Runs a lane, and restarts it after a panic. Returns the subscriber's name.
async fn supervise<Q: Queue>(
    name: SubscriberName,
    configured: watch::Receiver<LaneConfig>,
    queue: Q,
    reporter: LaneReporter,
    mut drain: watch::Receiver<bool>,
) -> SubscriberName {
    let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(60));
    loop {
        let lane = Lane::new(configured.clone(), queue.clone(), reporter.clone());
        // A set of one: it ends the lane when this task is ended at the deadline.
        let mut task = JoinSet::new();
        task.spawn(lane.run(drain.clone()));
        let Some(Err(e)) = task.join_next().await else { return name };
        let restart_in = backoff.grow();
        reporter.report(&LaneEvent::Panicked { error: &e.to_string(), restart_in });
        tokio::select! {
            () = tokio::time::sleep(restart_in) => {}
            _ = drain.wait_for(|d| *d) => return name,
        }
    }
}

/// Polls the queues' depths and puts them on the board.
async fn poll_depths(
    queue: &impl Queue,
    mut subscribers: watch::Receiver<Subscribers>,
    board: &Board,
) {
    loop {
        let begun = clock::instant();
        let current = subscribers.borrow_and_update().clone();
        // A broker that is away is awaited indefinitely.
        let polled = timeout(POLL_TIMEOUT, queue.depths(&current)).await;
        let late = || format!("the queue did not answer within {} s", POLL_TIMEOUT.as_secs());
        let depths =
            polled.map_err(|_| late()).and_then(|polled| polled.map_err(|e| e.to_string()));
        // Without an answer it cost nothing but time.
        let pause = if depths.is_ok() {
            ((clock::instant() - begun) * POLL_PAUSE_FACTOR).min(MAX_POLL_PAUSE)
        } else {
            POLL_INTERVAL
        };
        board.metrics().set_queue_up(queue.is_reachable());
        board.polled(clock::now(), depths);
        tokio::select! {
            () = tokio::time::sleep(pause.max(POLL_INTERVAL)) => {}
            () = async { tokio::time::sleep(pause).await; board.poll_wanted().await } => {}
            Ok(()) = subscribers.changed() => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        config::{Config, testing},
        delivery::Print,
        history::{Keeps, deliveries::recording},
        queue::{SettleError, fake::Fake},
        store::{Delivery, fake::FakeStore},
        telemetry::metrics::Metrics,
    };
    use axum::{Router, http::StatusCode, routing::post};
    use sha2::{Digest as _, Sha256};
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

    fn table(name: &str, url: &str) -> String {
        let lines = format!(
            "url = \"{url}\"\nbatch.max_wait = \"0s\"\nhttp.allow_http = true\nhttp.allow_private_addresses = true"
        );
        testing::table(name, &lines)
    }

    fn config(names: &[&str], url: &str) -> Config {
        testing::embedded(&names.iter().map(|name| table(name, url)).collect::<String>())
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
        while_observed(Board::new(Metrics::new(clock::now())), queue, config, test).await;
    }

    async fn while_observed<F: Future<Output = ()>>(
        board: Board,
        queue: Fake,
        config: Config,
        test: F,
    ) {
        let (stop, stopped) = oneshot::channel::<()>();
        let running = tokio::spawn(async move {
            let shutdown = async { drop(stopped.await) };
            let (phase, changes) = (watch::Sender::new(Phase::Starting), mpsc::channel(1).1);
            let shutdown_timeout = watch::Sender::new(Duration::from_secs(10)).subscribe();
            let controls = Controls {
                phase: &phase,
                changes,
                board,
                shutdown_timeout,
                newcomers: Newcomers::default(),
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
    async fn no_request_begins_while_more_acks_are_pending_than_requests_may_be() {
        let events = [r#"{"event":"a"}"#; 6];
        let cases = [
            (200, "http.concurrency = 1", 2),
            (200, "http.concurrency = 2", 4),
            (200, "order = \"strict\"", 1),
            // What becomes of a failed batch is known before the next request.
            (503, "circuit_breaker.failures = 0", 1),
        ];
        for (status, line, allowed) in cases {
            let answer: fn(usize) -> u16 = if status == 200 { |_| 200 } else { |_| 503 };
            let ((url, requests), (others, other_requests)) =
                (receiver(answer).await, receiver(|_| 200).await);
            let held = format!("{}batch.max_events = 1\n{line}\n", table("held", &url));
            let other = format!("{}batch.max_events = 1\n", table("other", &others));
            let queue = Fake::default();
            queue.put("held", &events);
            let settlements = queue.hold_settlements("held");
            let config = testing::embedded(&(held + &other));
            while_running(queue.clone(), config, async {
                for _ in 0..allowed {
                    settlements.begun().await;
                }
                // A request too many would have come before these.
                queue.put("other", &events);
                let others_came = || other_requests.load(Ordering::SeqCst) == events.len();
                until("the other lane delivers", others_came).await;
                assert_eq!(requests.load(Ordering::SeqCst), allowed, "{status} {line}");
                for _ in 0..events.len() {
                    settlements.go_on();
                }
                until("all are settled", || queue.is_empty()).await;
            })
            .await;
            assert_eq!(requests.load(Ordering::SeqCst), events.len(), "{status} {line}");
        }
    }

    #[tokio::test]
    async fn what_was_made_ahead_when_the_circuit_opened_is_taken_again_and_sent_once() {
        let (url, requests) = receiver(|n| if n == 0 { 503 } else { 200 }).await;
        let queue = Fake::default();
        let events = [r#"{"event":"a"}"#; 6];
        queue.put("a", &events);
        let lines =
            "batch.max_events = 2\ncircuit_breaker = { failures = 1, open_for = \"100ms\" }\n";
        let config = testing::embedded(&(table("a", &url) + lines));
        while_running(queue.clone(), config, async {
            until("all are settled", || queue.is_empty()).await;
            assert_eq!(queue.retries().len(), 1);
            assert_eq!(queue.opened(), 2, "a session before the circuit opened, and one after it");
        })
        .await;
        // After an outage batches grow from one event.
        assert_eq!(
            requests.load(Ordering::SeqCst),
            1 + 3,
            "one that failed, then 1, 2 and 1 events"
        );
    }

    #[tokio::test]
    async fn a_queue_that_opens_and_fails_repeatedly_is_logged_once_when_it_fails_and_once_when_it_works()
     {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let writer = std::sync::Mutex::new(file.reopen().expect("opens"));
        let _logging = tracing::subscriber::set_default(
            tracing_subscriber::fmt().with_ansi(false).with_writer(writer).finish(),
        );
        let logged = |what: &str| {
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
                until("it is delivered", || queue.is_empty() && logged(again) == round).await;
                assert_eq!(
                    (logged(lost), queue.opened() - opened),
                    (round, if round == 1 { 4 } else { 3 })
                );
            }
            assert_eq!(requests.load(Ordering::SeqCst), 8);
        })
        .await;
        assert_eq!((logged(lost), logged(again)), (2, 2));
    }

    /// The deliveries of a subscriber that are in the store, in their order.
    fn deliveries(store: &FakeStore, subscriber: &str) -> Vec<Delivery> {
        let memory = store.memory();
        memory.deliveries.iter().filter(|d| d.subscriber == *subscriber).cloned().collect()
    }

    fn states(deliveries: &[Delivery]) -> Vec<&'static str> {
        deliveries.iter().map(|d| d.state.name()).collect()
    }

    #[tokio::test]
    async fn whatever_becomes_of_a_batch_is_recorded_as_its_delivery() {
        type Status = fn(usize) -> u16;
        let answers: [(&str, Status); 4] =
            [("accepts", |_| 200), ("fails", |_| 503), ("halves", |_| 413), ("gone", |_| 410)];
        let (queue, mut tables) = (Fake::default(), String::new());
        let (a, b) = (r#"{"event":"a"}"#, r#"{"event":"b"}"#);
        for (name, status) in answers {
            tables += &table(name, &receiver(status).await.0);
            queue.put(name, &[a, b]);
        }
        queue.put("accepts", &["no JSON"]);
        let metrics = Metrics::new(clock::now());
        let (observer, recorder) = recording("here", &metrics);
        let board = Board::observed(metrics, [observer]);
        while_observed(board, queue.clone(), testing::embedded(&tables), async {
            let is_settled = || queue.is_empty() && queue.retries().len() == 4;
            until("all are settled", is_settled).await;
        })
        .await;
        let store = FakeStore::default();
        recorder
            .run(store.clone(), watch::Sender::new(Keeps::Here).subscribe(), std::future::ready(()))
            .await;
        let prints = |events: &[&str]| events.iter().map(|e| Print::of(e.as_bytes())).collect();
        let mut accepted = deliveries(&store, "accepts");
        accepted.sort_by_key(|d| d.state.name());
        assert_eq!(states(&accepted), ["dead", "delivered"]);
        assert_eq!(accepted[0].contents.prints, Some(prints(&["no JSON"])));
        let contents = &accepted[1].contents;
        let body = format!(r#"{{"events":[{a},{b}]}}"#);
        assert_eq!(contents.sha256, Some(Sha256::digest(&body).into()));
        assert_eq!((contents.events, contents.bytes), (2, body.len() as u64));
        assert_eq!(contents.prints, Some(prints(&[a, b])));
        let attempt = &accepted[1].attempts[0];
        let status = attempt.end.as_ref().and_then(|(_, end)| end.status);
        assert_eq!((attempt.number, attempt.by.as_str(), status), (1, "here", Some(200)));
        assert_eq!(states(&deliveries(&store, "fails")), ["retrying"]);
        assert_eq!(states(&deliveries(&store, "gone")), ["paused"]);
        let halved = deliveries(&store, "halves");
        assert_eq!(states(&halved), ["split", "retrying", "retrying"]);
        for (half, event) in halved[1..].iter().zip([a, b]) {
            assert_eq!(half.contents.parent.as_ref(), Some(&halved[0].id));
            assert_eq!(half.contents.prints, Some(prints(&[event])));
        }
    }

    #[tokio::test]
    async fn a_delivery_whose_failure_cannot_be_written_down_is_recorded_as_interrupted() {
        let (url, _) = receiver(|n| if n == 0 { 500 } else { 200 }).await;
        let queue = Fake::default();
        queue.answer_next(SettleError::Unconfirmed("no confirm".to_owned()));
        queue.put("a", &[r#"{"event":"a"}"#]);
        let metrics = Metrics::new(clock::now());
        let (observer, recorder) = recording("here", &metrics);
        let board = Board::observed(metrics, [observer]);
        while_observed(board, queue.clone(), config(&["a"], &url), async {
            until("it is delivered in another batch", || queue.is_empty()).await;
        })
        .await;
        let store = FakeStore::default();
        recorder
            .run(store.clone(), watch::Sender::new(Keeps::Here).subscribe(), std::future::ready(()))
            .await;
        assert_eq!(states(&deliveries(&store, "a")), ["interrupted", "delivered"]);
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

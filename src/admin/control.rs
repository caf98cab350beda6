//! The requests of operators: report subscribers, pause and resume them, send a test event, list
//! retries, reload the configuration.

pub(super) mod inspection;
mod report;
mod waiting;

use std::{
    collections::BTreeSet,
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    Extension, Router,
    body::Body,
    extract,
    http::{HeaderMap, StatusCode},
    response::Response,
    routing::{get, post},
};
use serde::Serialize;
use tokio::{
    sync::{Mutex, Semaphore, watch},
    time::{sleep_until, timeout},
};

use self::inspection::Inspections;
pub(super) use self::report::Which;
pub(super) use super::ending::{MOST_TO_THEIR_END, to_its_end};
use super::{
    answer::{Refusal, answer, discard, json_answer},
    body::{self, FromBody},
    guard::Caller,
    history_health::Health,
    operations::DryRun,
    query::{FromQuery, Name, Parameters, Query},
    versions::etag,
    view::{self, ChangeRequest, PauseChange, Paused, ProblemKind, ReloadPreview, State, Tested},
};
use crate::{
    clock,
    config::{Subscriber, changes::Changes},
    delivery::{self, Pause, SubscriberName},
    endpoint::test_event,
    queue::{Queue, QueueError},
    store::Store,
    supervisor::{
        fleet::Phase,
        reload::{Because, Reloader, Unchanged},
    },
    telemetry::{
        lane_event,
        status::{self, Board},
    },
};

/// The longest body, in bytes.
const MAX_REQUEST: usize = 4096;

/// The longest reason of a pause, in bytes. Each daemon keeps it, and the queue's record of pauses.
const MAX_WHY: usize = MAX_REQUEST;

/// The timeout for the queue's list of pauses, which is not known at once after a start.
const WAIT_FOR_PAUSE_STATES: Duration = Duration::from_secs(10);

/// The time between two test events.
const TEST_EVERY: Duration = Duration::from_secs(1);

/// The author of a pause by a request.
pub(super) const OPERATOR: &str = "operator";

/// The most dead letters, or waiting batches, in one answer.
pub(super) const MAX_LISTED: usize = 100;

/// What operators ask of a daemon.
pub(super) struct Control<Q, S> {
    pub(super) queue: Q,
    pub(super) store: S,
    history: Health,
    pub(super) reloader: Reloader,
    board: Board,
    phase: watch::Receiver<Phase>,
    pub(super) to_their_end: Arc<Semaphore>,
    /// When the last test event was sent. One at a time, and one in [`TEST_EVERY`].
    testing: Mutex<Option<Instant>>,
    inspections: Inspections,
    started: Instant,
    /// One read of the waiting batches at a time.
    retrying: Mutex<()>,
    /// The subscribers that are being made over the API.
    pub(super) making: Names,
    /// The removed subscribers whose queues a task is to delete.
    pub(super) dropping: Names,
    pub(super) waits: Waits,
}

/// The longest times for which a change of subscribers waits for the queue.
#[derive(Debug, Clone, Copy)]
pub(super) struct Waits {
    /// A new subscriber, before anything is stored.
    pub(super) add: Duration,
    /// Any change, while all others wait for it.
    pub(super) held: Duration,
    /// A removal, until its queues can be deleted; it goes on without the client.
    pub(super) dropping: Duration,
}

impl Default for Waits {
    fn default() -> Self {
        let [add, held, dropping] = [30, 10, 20].map(Duration::from_secs);
        Self { add, held, dropping }
    }
}

/// Subscribers with which something is done now.
pub(super) type Names = std::sync::Mutex<BTreeSet<SubscriberName>>;

impl FromBody for ChangeRequest {
    const MAX: usize = MAX_REQUEST;
    const SHAPE: &'static str = "{}, or for a pause {\"why\":\"…\"}";
}

/// The query of a list that has one page, its first rows.
struct Selection {
    limit: usize,
}

impl FromQuery for Selection {
    fn from_query(given: &mut Parameters) -> Self {
        // A limit of 0 asks for the numbers alone.
        Self { limit: given.number("limit", 0..=MAX_LISTED).unwrap_or(MAX_LISTED) }
    }
}

/// The state of a request's handler.
type This<Q, S> = extract::State<Arc<Control<Q, S>>>;

pub(super) fn routes<Q: Queue, S: Store>(control: Arc<Control<Q, S>>) -> Router {
    Router::new()
        .route("/v1/subscribers", get(report_all))
        .route("/v1/subscribers/{name}", get(report_one))
        .route("/v1/subscribers/{name}/pause", post(pause))
        .route("/v1/subscribers/{name}/resume", post(resume))
        .route("/v1/subscribers/{name}/test", post(send_test))
        .route("/v1/subscribers/{name}/retry", get(list_waiting).post(retry_now))
        .route("/v1/reload", get(preview).post(reload))
        .with_state(control)
}

async fn report_all<Q: Queue, S: Store>(
    extract::State(control): This<Q, S>,
    Query(which): Query<Which>,
) -> Response {
    json_answer(StatusCode::OK, &control.selected(&which).await)
}

async fn report_one<Q: Queue, S: Store>(
    extract::State(control): This<Q, S>,
    Extension(caller): Extension<Caller>,
    Name(name): Name,
    Query(()): Query<()>,
) -> Response {
    let found = control.details(&name, &caller).await;
    let origin =
        found.as_ref().ok().and_then(|one| one.shadows.as_ref().or(one.status.origin.as_ref()));
    let etag = match origin {
        Some(view::Origin::Api { version, .. }) => etag(version),
        Some(view::Origin::File { .. }) | None => None,
    };
    let mut response = answer(found);
    response.headers_mut().extend(etag);
    response
}

async fn pause<Q: Queue, S: Store>(
    state: This<Q, S>,
    name: Name,
    headers: HeaderMap,
    body: Body,
) -> Response {
    change(state, name, headers, body, true).await
}

async fn resume<Q: Queue, S: Store>(
    state: This<Q, S>,
    name: Name,
    headers: HeaderMap,
    body: Body,
) -> Response {
    change(state, name, headers, body, false).await
}

async fn change<Q: Queue, S: Store>(
    extract::State(control): This<Q, S>,
    Name(name): Name,
    headers: HeaderMap,
    body: Body,
    pause: bool,
) -> Response {
    let changing = control.clone();
    control
        .requested(&headers, body, async |wanted| changing.change(name, wanted, pause).await)
        .await
}

async fn send_test<Q: Queue, S: Store>(
    extract::State(control): This<Q, S>,
    Name(name): Name,
    headers: HeaderMap,
    body: Body,
) -> Response {
    control.requested(&headers, body, async |_: ChangeRequest| control.test(&name).await).await
}

async fn list_waiting<Q: Queue, S: Store>(
    extract::State(control): This<Q, S>,
    Name(name): Name,
    Query(selection): Query<Selection>,
) -> Response {
    answer(control.waiting(name, selection.limit).await)
}

async fn retry_now<Q: Queue, S: Store>(
    extract::State(control): This<Q, S>,
    Name(name): Name,
    headers: HeaderMap,
    body: Body,
) -> Response {
    let moving = control.clone();
    let mut is_dry = false;
    let retried = control.requested(&headers, body, async |which: view::RetryNow| {
        is_dry = which.try_only;
        moving.retry_now(name, which).await
    });
    let mut response = retried.await;
    if is_dry {
        response.extensions_mut().insert(DryRun);
    }
    response
}

async fn preview<Q: Queue, S: Store>(
    extract::State(control): This<Q, S>,
    Query(()): Query<()>,
) -> Response {
    answer(control.reloader.preview().await.map(reload_preview).map_err(unchanged))
}

async fn reload<Q: Queue, S: Store>(
    extract::State(control): This<Q, S>,
    headers: HeaderMap,
    body: Body,
) -> Response {
    let (reloader, store) = (control.reloader.clone(), control.store.clone());
    let reload = async move {
        reloader.read_store(&store).await;
        let reloaded = reloader.reload(Because::Operator("the API")).await;
        reloaded.map(view::Reloaded::from).map_err(unchanged)
    };
    control
        .requested(&headers, body, async |_: ChangeRequest| {
            to_its_end(&control.to_their_end, reload).await
        })
        .await
}

fn reload_preview((changes, waits_for_operator): (Changes, bool)) -> ReloadPreview {
    ReloadPreview { changes: changes.into(), waits_for_operator }
}

fn unchanged(why: Unchanged) -> Refusal {
    match why {
        Unchanged::Wrong(_) | Unchanged::Held(_) => {
            let (status, kind) = (StatusCode::UNPROCESSABLE_ENTITY, ProblemKind::Configuration);
            Refusal::of_kind(status, kind, why.to_string())
        }
        Unchanged::Stopping => Refusal::unavailable(why.to_string()),
    }
}

pub(super) fn queue_fails(e: &QueueError) -> Refusal {
    Refusal::unavailable(e.to_string())
}

impl<Q: Queue, S: Store> Control<Q, S> {
    pub(super) fn new(
        queue: Q,
        store: S,
        reloader: Reloader,
        board: Board,
        phase: watch::Receiver<Phase>,
        history: Health,
    ) -> Self {
        Self {
            queue,
            store,
            history,
            reloader,
            board,
            phase,
            testing: Mutex::default(),
            inspections: Inspections::default(),
            started: clock::instant(),
            retrying: Mutex::default(),
            making: Names::default(),
            dropping: Names::default(),
            waits: Waits::default(),
            to_their_end: Arc::new(Semaphore::new(MOST_TO_THEIR_END)),
        }
    }

    /// Reads the body of a request that can change something, and answers with the result of
    /// `does`.
    async fn requested<W: FromBody, A: Serialize>(
        &self,
        headers: &HeaderMap,
        mut body: Body,
        does: impl AsyncFnOnce(W) -> Result<A, Refusal>,
    ) -> Response {
        let done = match body::json(headers, &mut body).await {
            Ok(wanted) => does(wanted).await,
            Err(refusal) => Err(refusal),
        };
        if done.is_err() {
            discard(headers, body).await;
        }
        answer(done)
    }

    /// The subscriber as it is configured now.
    pub(super) fn subscriber(&self, name: &str) -> Result<Arc<Subscriber>, Refusal> {
        let config = self.reloader.config();
        let found = config.subscribers.iter().find(|s| s.name == name).cloned();
        found.ok_or_else(|| {
            let managed = self.reloader.managed();
            if let Some(Err(why)) = managed.get(name).map(|entry| &entry.checked) {
                return Refusal::new(StatusCode::CONFLICT, format!("it does not run: {why}"));
            }
            let (status, kind) = (StatusCode::NOT_FOUND, ProblemKind::Subscriber);
            Refusal::of_kind(status, kind, "no subscriber of that name is configured")
        })
    }

    /// Whether the fleet takes changes.
    pub(super) fn is_running(&self) -> bool {
        *self.phase.borrow() == Phase::Running
    }

    /// Completes when the daemon drains.
    pub(super) fn drains(&self) -> impl Future<Output = ()> + Send + use<Q, S> {
        let mut phase = self.phase.clone();
        // An error means that the fleet has ended.
        async move { drop(phase.wait_for(|phase| *phase == Phase::Draining).await) }
    }

    /// Whether a lane of this name is there: also one of a removed subscriber, while its requests in
    /// flight end.
    pub(super) fn has_lane(&self, name: &str) -> bool {
        self.board.view(name, clock::instant(), clock::now()).is_some()
    }

    /// Whether subscribers can be made here, over the API and in the console.
    pub(super) fn manages(&self) -> bool {
        self.reloader.config().admin.manage
    }

    /// Whether events have tenants.
    pub(super) fn has_tenants(&self) -> bool {
        self.reloader.config().queue.embedded.tenant.is_some()
    }

    /// The file of the configuration.
    pub(super) fn file(&self) -> std::path::PathBuf {
        self.reloader.config().path.clone()
    }

    /// The names of the configured subscribers.
    pub(super) fn names(&self) -> Vec<String> {
        self.reloader.config().subscribers.iter().map(|s| s.name.to_string()).collect()
    }

    pub(super) async fn test(&self, name: &str) -> Result<Tested, Refusal> {
        self.send_test_event(&*self.subscriber(name)?).await
    }

    /// Sends a test event, at most one a second.
    pub(super) async fn send_test_event(&self, subscriber: &Subscriber) -> Result<Tested, Refusal> {
        {
            // Its turn alone: a receiver that hangs holds nobody else up.
            let mut last = self.testing.lock().await;
            if let Some(last) = *last {
                sleep_until((last + TEST_EVERY).into()).await;
            }
            *last = Some(clock::instant());
        }
        let report = test_event::send(subscriber).await;
        report
            .map(|report| Tested::from(&report))
            .map_err(|why| Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, why))
    }

    /// The state that the status shows.
    fn state(&self, name: &str) -> State {
        let view = self.board.view(name, clock::instant(), clock::now());
        view.map_or(State::Starting, |view| State::from(&view.state))
    }

    /// The state after a resume: the lane may not have noticed it yet, and then starts without
    /// failures.
    fn resumed_state(&self, name: &str) -> State {
        match self.state(name) {
            State::Paused => State::Ok,
            state => state,
        }
    }

    /// Pauses a subscriber, or resumes it.
    pub(super) async fn change(
        self: Arc<Self>,
        name: String,
        wanted: ChangeRequest,
        pause: bool,
    ) -> Result<PauseChange, Refusal> {
        let room = self.to_their_end.clone();
        to_its_end(&room, async move { self.changed(&name, wanted, pause).await }).await
    }

    async fn changed(
        &self,
        name: &str,
        wanted: ChangeRequest,
        pause: bool,
    ) -> Result<PauseChange, Refusal> {
        let subscriber = self.subscriber(name)?;
        if wanted.why.as_ref().is_some_and(|why| why.len() > MAX_WHY) {
            return Err(Refusal::field("why", format!("must have at most {MAX_WHY} bytes")));
        }
        if subscriber.paused && !pause {
            let why =
                format!("`{name}` is paused by the configuration; take `paused = true` out of it");
            return Err(Refusal::new(StatusCode::CONFLICT, why));
        }
        let mut pause_states = self.queue.pause_states();
        let known = timeout(WAIT_FOR_PAUSE_STATES, pause_states.wait_for(Option::is_some)).await;
        let Some(known) = known.ok().and_then(Result::ok).and_then(|known| known.clone()) else {
            return Err(Refusal::unavailable(
                "it is not known yet which subscribers are paused; try again".to_owned(),
            ));
        };
        let before = known.get(name).and_then(delivery::PauseState::pause).cloned();
        let changed = before.is_some() != pause || (!pause && self.waits(name));
        let now = clock::now();
        let after = match (pause, before.clone()) {
            // An operator's reason can be replaced; a receiver's stays.
            (true, Some(before)) if before.by == OPERATOR => {
                Some(Pause { why: wanted.why.unwrap_or(before.why), ..before })
            }
            (true, Some(before)) => Some(before),
            (true, None) => {
                let why = wanted.why.unwrap_or_else(|| "an operator asked for it".to_owned());
                Some(Pause { why, since: now, by: OPERATOR.to_owned() })
            }
            (false, _) => None,
        };
        if changed || after != before {
            let resumed = delivery::PauseState::Resumed { at: now };
            let pause_state = after.clone().map_or(resumed, delivery::PauseState::Paused);
            self.queue
                .record(&subscriber.name, pause_state)
                .await
                .map_err(|e| Refusal::unavailable(format!("it could not be recorded: {e}")))?;
        }
        Ok(PauseChange {
            subscriber: name.to_owned(),
            state: if after.is_some() { State::Paused } else { self.resumed_state(name) },
            changed,
            paused: after.map(Paused::from),
        })
    }

    /// Whether its circuit is open, or its receiver asked for a hold, and it is not paused: a
    /// resume then tries it now.
    fn waits(&self, name: &str) -> bool {
        let view = self.board.view(name, clock::instant(), clock::now());
        view.is_some_and(|view| match view.state {
            status::State::Paused(_) => false,
            status::State::Held { .. } => true,
            _ => view.circuit != lane_event::Circuit::Closed,
        })
    }
}

#[cfg(test)]
mod tests;

//! Replays of history, and resends of single batches. Each request needs a token.

use std::{sync::Arc, time::Duration};

use axum::{
    Extension, Router,
    body::Body,
    extract,
    http::{HeaderMap, HeaderName, HeaderValue, StatusCode},
    middleware,
    response::{IntoResponse as _, Response},
    routing::{get, post},
};

use sha2::{Digest as _, Sha256};

use super::{
    answer::{Refusal, answer, discard, json_answer},
    body::{self, FromBody},
    guard::{Caller, with_token},
    operations::{Details, DryRun},
    query::{FromQuery, Name, Parameters, Query},
    view::{
        ChangeRequest, FieldError, ProblemKind, Replay, ReplayList, ReplayPreview, ReplayRequest,
        Resent,
    },
};
use crate::{
    clock,
    config::Subscriber,
    event::Pattern,
    history::{
        replay::{self, Outcome, Replays},
        resend::{self, NotResent},
    },
    page::List,
    queue::Queue,
    store::{
        self, Added, Changed, MAX_RUNNING, Recorded, ReplayChange, RequestKey, Store, StoreError,
    },
    supervisor::reload::Reloader,
    wording::counted,
};

/// The longest time for which the events of a replay are counted.
const COUNT_TIME: Duration = Duration::from_secs(5);

/// The largest rate, in events in a second.
const MAX_RATE: u32 = 100_000;

/// The header by which a client may send a request again: draft-ietf-httpapi-idempotency-key-header.
const KEY: HeaderName = HeaderName::from_static("idempotency-key");

/// The most characters of a key.
pub(super) const MAX_KEY: usize = 255;

/// Marks the answer of the first request with a key, when it is given again.
pub(super) const REPLAYED: (HeaderName, HeaderValue) =
    (HeaderName::from_static("idempotent-replayed"), HeaderValue::from_static("true"));

/// Replays and resends, as operators ask for them.
pub(super) struct Again<Q, S> {
    queue: Q,
    store: S,
    reloader: Reloader,
    replays: Replays,
}

type This<Q, S> = extract::State<Arc<Again<Q, S>>>;

pub(super) fn routes<Q: Queue, S: Store>(again: Arc<Again<Q, S>>) -> Router {
    Router::new()
        .route("/v1/subscribers/{name}/replay", post(replay_to::<Q, S>))
        .route("/v1/replays", get(list::<Q, S>))
        .route("/v1/replays/{id}", get(show::<Q, S>))
        .route("/v1/replays/{id}/continue", post(go_on::<Q, S>))
        .route("/v1/replays/{id}/cancel", post(cancel::<Q, S>))
        .route("/v1/deliveries/{id}/resend", post(resend::<Q, S>))
        .route_layer(middleware::from_fn(with_token))
        .with_state(again)
}

impl FromBody for ReplayRequest {
    const MAX: usize = 4096;
    const SHAPE: &'static str = "{\"since\":\"2026-01-31T12:00:00Z\"}, with `until`, `events`, `rate` and `dry_run` as you need them";
}

/// A part of the list.
pub(super) struct Part {
    pub(super) limit: usize,
    pub(super) before: Option<i64>,
}

impl FromQuery for Part {
    fn from_query(given: &mut Parameters) -> Self {
        let before = given.cursor(List::Replays).map(|cursor| cursor.row);
        Self { limit: given.limit(), before }
    }
}

async fn list<Q: Queue, S: Store>(
    extract::State(this): This<Q, S>,
    Query(Part { limit, before }): Query<Part>,
) -> Response {
    answer(this.list(before, limit).await)
}

async fn show<Q: Queue, S: Store>(
    extract::State(this): This<Q, S>,
    Name(id): Name,
    Query(()): Query<()>,
) -> Response {
    answer(this.one(&id).await)
}

async fn replay_to<Q: Queue, S: Store>(
    extract::State(this): This<Q, S>,
    Extension(caller): Extension<Caller>,
    Name(name): Name,
    headers: HeaderMap,
    mut body: Body,
) -> Response {
    let work = async {
        let wanted: ReplayRequest = body::json(&headers, &mut body).await?;
        let key = given_key(&headers)?.map(|key| key_of(key, &name, &wanted, &caller));
        if wanted.dry_run {
            let preview = this.preview(&name, wanted, &caller).await?;
            let mut counted = json_answer(StatusCode::OK, &preview);
            counted.extensions_mut().insert(DryRun);
            return Ok(counted);
        }
        let new = match this.begin(&name, wanted, &caller, key).await? {
            Begun::Now(new) => new,
            Begun::Before(made) => return made_before(*made),
        };
        let mut made = json_answer(StatusCode::ACCEPTED, &Replay::new(&new));
        made.extensions_mut().insert(Details(details(&new)));
        Ok(made)
    };
    done(work.await, &headers, body).await
}

async fn go_on<Q: Queue, S: Store>(
    state: This<Q, S>,
    name: Name,
    headers: HeaderMap,
    body: Body,
) -> Response {
    change(state, name, headers, body, ReplayChange::Continued).await
}

async fn cancel<Q: Queue, S: Store>(
    state: This<Q, S>,
    name: Name,
    headers: HeaderMap,
    body: Body,
) -> Response {
    change(state, name, headers, body, ReplayChange::Cancelled).await
}

async fn change<Q: Queue, S: Store>(
    extract::State(this): This<Q, S>,
    Name(id): Name,
    headers: HeaderMap,
    mut body: Body,
    change: ReplayChange,
) -> Response {
    let work = async {
        let _: ChangeRequest = body::json(&headers, &mut body).await?;
        Ok(json_answer(StatusCode::OK, &this.change(&id, change).await?))
    };
    done(work.await, &headers, body).await
}

/// The answer to a request that was sent again: that of the first one.
fn made_before(made: Recorded) -> Result<Response, Refusal> {
    let made = made.map_err(|unreadable| {
        let why = format!("this request has made {}: {}", unreadable.id, unreadable.why);
        Refusal::new(StatusCode::CONFLICT, why)
    })?;
    let mut again = json_answer(StatusCode::ACCEPTED, &Replay::new(&made.as_made()));
    again.headers_mut().extend([REPLAYED]);
    again.extensions_mut().insert(DryRun);
    Ok(again)
}

/// The key of a request, if it has one.
pub(super) fn given_key(headers: &HeaderMap) -> Result<Option<String>, Refusal> {
    let wrong = |why: &str| Err(Refusal::field("Idempotency-Key", why));
    let mut given = headers.get_all(KEY).iter();
    let Some(value) = given.next() else { return Ok(None) };
    if given.next().is_some() {
        return wrong("is there more than once");
    }
    // A string of RFC 9651 in quotes, as the draft has it, or its characters alone.
    let text = value.to_str().unwrap_or_default();
    let key = text.strip_prefix('"').map_or(Some(text), |rest| rest.strip_suffix('"'));
    let key = key.filter(|key| (1..=MAX_KEY).contains(&key.len()) && !key.contains(['"', '\\']));
    let Some(key) = key else {
        return wrong(&format!(
            "must have 1 to {MAX_KEY} visible ASCII characters without quotes and backslashes, such as a UUID"
        ));
    };
    Ok(Some(key.to_owned()))
}

/// The key that a caller gave to its request.
pub(super) fn key_of(
    key: String,
    subscriber: &str,
    wanted: &ReplayRequest,
    caller: &Caller,
) -> RequestKey {
    // Whatever the order of its fields: the same request.
    let requested = serde_json::to_vec(wanted).unwrap_or_default();
    let sha256 = Sha256::new().chain_update(subscriber).chain_update("\n").chain_update(requested);
    let by = caller.token.as_deref().unwrap_or_default().to_owned();
    RequestKey { by, key, sha256: sha256.finalize().into() }
}

/// Refuses a request whose key another one had.
pub(super) fn other_request() -> Refusal {
    let why = "another request was sent with this `Idempotency-Key` before; a request of its own needs a key of its own";
    Refusal::of_kind(StatusCode::UNPROCESSABLE_ENTITY, ProblemKind::Key, why)
}

fn too_many(running: &[Recorded]) -> Refusal {
    let named = running.iter().map(|recorded| {
        let Replay { id, subscriber, .. } = Replay::recorded(recorded);
        format!("{id} to `{subscriber}`")
    });
    let named: Vec<_> = named.take(MAX_RUNNING).collect();
    let why = format!(
        "{} run already, and no more than {MAX_RUNNING} at a time: {}; wait until one is done, or end one with \
         `hooktrail replay cancel ID`",
        counted(running.len(), "replay(s)"),
        named.join(", ")
    );
    Refusal::new(StatusCode::CONFLICT, why)
}

async fn resend<Q: Queue, S: Store>(
    extract::State(this): This<Q, S>,
    Name(id): Name,
    headers: HeaderMap,
    mut body: Body,
) -> Response {
    let work = async {
        let _: ChangeRequest = body::json(&headers, &mut body).await?;
        let resent = this.resend(&id).await?;
        let mut made = json_answer(StatusCode::ACCEPTED, &resent);
        made.extensions_mut().insert(Details(resent.details()));
        Ok(made)
    };
    done(work.await, &headers, body).await
}

async fn done(result: Result<Response, Refusal>, headers: &HeaderMap, body: Body) -> Response {
    match result {
        Ok(response) => response,
        Err(refusal) => {
            discard(headers, body).await;
            refusal.into_response()
        }
    }
}

fn away(e: StoreError) -> Refusal {
    Refusal::unavailable(e.to_string())
}

fn missing(why: &str) -> Refusal {
    Refusal::new(StatusCode::NOT_FOUND, why.to_owned())
}

fn not_resent(why: NotResent, subscriber: &str) -> Refusal {
    let why = match why {
        NotResent::Store(e) => return away(e),
        NotResent::StillUnderWay(why) => {
            format!(
                "it is not sent again: {why}; `hooktrail retry now {subscriber}` makes retries due"
            )
        }
        NotResent::NotTheSame(why) => format!(
            "it cannot be sent again with the same bytes: {why}; \
             `hooktrail replay {subscriber}` sends the events of a time in new batches"
        ),
    };
    Refusal::new(StatusCode::CONFLICT, why)
}

/// A replay that was asked for.
pub(super) enum Begun {
    Now(Box<store::Replay>),
    /// The same request has made it before.
    Before(Box<Recorded>),
}

/// What the record of an operation says of a replay.
pub(super) fn details(new: &store::Replay) -> String {
    format!("{} since {}", new.id, clock::rfc3339_seconds(new.order.since))
}

impl<Q, S> Again<Q, S> {
    pub(super) fn new(queue: Q, store: S, reloader: Reloader, replays: Replays) -> Self {
        Self { queue, store, reloader, replays }
    }
}

impl<Q: Queue, S: Store> Again<Q, S> {
    pub(super) async fn list(
        &self,
        before: Option<i64>,
        limit: usize,
    ) -> Result<ReplayList, Refusal> {
        let page = self.store.replays(before, limit).await.map_err(away)?;
        Ok(ReplayList::new(self.with_outcomes(&page.rows).await, page.next))
    }

    /// Replays, and what became of their batches: of those in a queue as far as history can be read.
    async fn with_outcomes(&self, recorded: &[Recorded]) -> Vec<Replay> {
        let asks = |replay: &store::Replay| !replay.progress.unfinished.is_empty();
        let from = match recorded.iter().flatten().any(asks) {
            true => self.store.reach().await.ok().and_then(|reach| reach.deliveries_from),
            false => None,
        };
        let mut all = Vec::with_capacity(recorded.len());
        for recorded in recorded {
            let mut found = Replay::recorded(recorded);
            if let Ok(replay) = recorded {
                let outcome = replay::outcome(&self.store, replay, from, clock::now()).await;
                found.outcome = outcome.unwrap_or_else(|_| Outcome::recorded(replay)).into();
            }
            all.push(found);
        }
        all
    }

    async fn with_outcome(&self, recorded: Recorded) -> Replay {
        let shown = Replay::recorded(&recorded);
        self.with_outcomes(&[recorded]).await.pop().unwrap_or(shown)
    }

    pub(super) async fn one(&self, id: &str) -> Result<Replay, Refusal> {
        let found = self.store.replay(id).await.map_err(away)?;
        let found = found.ok_or_else(|| missing("there is no replay with this id"))?;
        Ok(self.with_outcome(found).await)
    }

    /// Begins a replay.
    pub(super) async fn begin(
        &self,
        name: &str,
        wanted: ReplayRequest,
        caller: &Caller,
        key: Option<RequestKey>,
    ) -> Result<Begun, Refusal> {
        let new = self.order(name, wanted, caller).await?;
        match self.store.add_replay(new.clone(), key).await.map_err(away)? {
            Added::New => {}
            Added::Before(made) => return Ok(Begun::Before(made)),
            Added::OtherRequest => return Err(other_request()),
            Added::TooMany(running) => return Err(too_many(&running)),
        }
        self.replays.changed();
        Ok(Begun::Now(Box::new(new)))
    }

    pub(super) async fn change(&self, id: &str, change: ReplayChange) -> Result<Replay, Refusal> {
        let changed = self.store.change_replay(id, change, clock::now()).await.map_err(away)?;
        let changed = changed.ok_or_else(|| missing("there is no replay with this id"))?;
        let replay = match changed {
            Changed::Yes(replay) => replay,
            Changed::No(replay) => {
                let Replay { state, why, .. } = Replay::recorded(&replay);
                let why = why.map_or_else(String::new, |why| format!(": {why}"));
                let why = format!("the replay is {state}{why}");
                return Err(Refusal::new(StatusCode::CONFLICT, why));
            }
            Changed::TooMany(running) => return Err(too_many(&running)),
        };
        self.replays.changed();
        Ok(self.with_outcome(*replay).await)
    }

    /// Sends a batch again, with its id and its bytes.
    pub(super) async fn resend(&self, id: &str) -> Result<Resent, Refusal> {
        let delivery = self.store.delivery(id).await.map_err(away)?;
        let delivery = delivery.ok_or_else(|| missing("history has no delivery with this id"))?;
        let subscriber = self.subscriber(&delivery.subscriber)?;
        let batch = resend::rebuild(&self.store, &delivery, &subscriber).await;
        let batch = batch.map_err(|why| not_resent(why, &delivery.subscriber))?;
        let resent = Resent {
            id: batch.id.to_string(),
            subscriber: delivery.subscriber.to_string(),
            events: batch.events,
            bytes: batch.body.len() as u64,
        };
        let enqueued = self.queue.enqueue(&delivery.subscriber, vec![batch]).await;
        enqueued.map_err(|e| Refusal::unavailable(e.to_string()))?;
        Ok(resent)
    }

    fn subscriber(&self, name: &str) -> Result<Arc<Subscriber>, Refusal> {
        let config = self.reloader.config();
        let found = config.subscribers.iter().find(|s| s.name == name).cloned();
        found.ok_or_else(|| {
            let (status, kind) = (StatusCode::NOT_FOUND, ProblemKind::Subscriber);
            Refusal::of_kind(status, kind, "no subscriber of that name is configured")
        })
    }

    /// The replay that a request asks for.
    async fn order(
        &self,
        name: &str,
        wanted: ReplayRequest,
        caller: &Caller,
    ) -> Result<store::Replay, Refusal> {
        let subscriber = self.subscriber(name)?;
        let checked = checked(&wanted)?;
        if !self.reloader.config().history.bodies {
            let why =
                "history keeps fields alone, not the bytes of events: [history] bodies is false";
            return Err(Refusal::new(StatusCode::CONFLICT, why.to_owned()));
        }
        let by = caller.token.as_deref().unwrap_or_default();
        replay::new(&self.store, &subscriber, checked, by, clock::now()).await.map_err(away)
    }

    /// Counts the events that a replay would send.
    pub(super) async fn preview(
        &self,
        name: &str,
        wanted: ReplayRequest,
        caller: &Caller,
    ) -> Result<ReplayPreview, Refusal> {
        let new = self.order(name, wanted, caller).await?;
        let subscriber = self.subscriber(name)?;
        let deadline = clock::instant() + COUNT_TIME;
        let counting = replay::count(&self.store, &new, &subscriber, deadline);
        let (events, complete) = counting.await.map_err(away)?;
        let history = self.store.reach().await.map_err(away)?.into();
        Ok(ReplayPreview { subscriber: new.subscriber.to_string(), events, complete, history })
    }
}

fn checked(wanted: &ReplayRequest) -> Result<replay::Wanted, Refusal> {
    let mut errors = Vec::new();
    let mut wrong = |field: &str, detail: &str| {
        errors.push(FieldError { field: field.to_owned(), detail: detail.to_owned() });
    };
    let since = wanted.since.map(|time| time.0);
    if since.is_none() {
        wrong("since", "is required: a time of RFC 3339, such as 2026-01-31T12:00:00Z");
    }
    let until = wanted.until.map(|time| time.0);
    if since.is_some_and(|since| since > clock::now()) {
        wrong("since", "is yet to come");
    }
    if since.zip(until).is_some_and(|(since, until)| until <= since) {
        wrong("until", "must be after `since`");
    }
    if wanted.rate.is_some_and(|rate| !(1..=MAX_RATE).contains(&rate)) {
        wrong("rate", &format!("must be from 1 to {MAX_RATE} events in a second"));
    }
    let events = match wanted.events.as_deref().map(Pattern::try_new).transpose() {
        Ok(events) => events,
        Err(why) => {
            wrong("events", &why);
            None
        }
    };
    match since {
        Some(since) if errors.is_empty() => {
            Ok(replay::Wanted { since, until, events, rate: wanted.rate })
        }
        _ => Err(Refusal::fields(errors)),
    }
}

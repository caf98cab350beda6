//! Dead letters: listed, shown, replayed and purged. What changes them needs a token.

use std::{
    collections::VecDeque,
    fmt::Display,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use axum::{
    Extension, Router,
    body::Body,
    extract::{self, FromRequestParts},
    http::{HeaderMap, StatusCode, request::Parts},
    middleware,
    response::{IntoResponse as _, Response},
    routing::{get, post},
};
use sha2::{Digest as _, Sha256};
use tokio::sync::{Semaphore, watch};

use super::{
    answer::{Refusal, answer, discard, json_answer},
    body::{self, FromBody},
    control::{MAX_LISTED, MOST_TO_THEIR_END, queue_fails, to_its_end},
    guard::{Caller, with_token},
    history,
    operations::{Details, DryRun, Partly},
    query::{FromQuery, Name, Parameters, Query},
    replays::{REPLAYED, given_key, other_request},
    view::{
        DeadLetter, DeadLetters, FieldError, LettersDone, LettersRequest, ProblemKind, Time,
        WholeLetter,
    },
};
use crate::{
    clock,
    delivery::Reason,
    event::Pattern,
    letters::{self, Choice, Done, Filters, Key, Purge, Replay, Selection, Stop, each},
    queue::{DeadLetters as _, Held, Queue},
    store::RequestKey,
    supervisor::{fleet::Phase, reload::Reloader},
    wording::counted,
};

/// The most letters of one request.
pub(super) const MAX_LETTERS: usize = 10_000;

/// The longest time for which letters are searched or counted.
const SEARCH_TIME: Duration = Duration::from_secs(5);

/// The answers that are given again when a request is sent again with its key.
const MAX_MADE: usize = 256;

/// What is done to dead letters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Act {
    Replay,
    Purge,
}

impl Act {
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Replay => "replay",
            Self::Purge => "purge",
        }
    }

    /// Its name in the record of operations.
    pub(super) const fn operation(self) -> &'static str {
        match self {
            Self::Replay => "replay_dead",
            Self::Purge => "purge_dead",
        }
    }

    /// `3 letters were replayed`.
    pub(super) fn says(self, letters: usize) -> String {
        let done = match self {
            Self::Replay => "replayed",
            Self::Purge => "purged",
        };
        format!("{} {done}", counted(letters, "letter(s) (was|were)"))
    }
}

/// The dead letters of all subscribers.
pub(super) struct Letters<Q> {
    queue: Q,
    reloader: Reloader,
    phase: watch::Receiver<Phase>,
    /// One walk at a time: it holds all letters for a moment.
    walking: tokio::sync::Mutex<()>,
    room: Arc<Semaphore>,
    /// The latest requests with a key, and what they did.
    made: Mutex<VecDeque<(RequestKey, LettersDone)>>,
}

type This<Q> = extract::State<Arc<Letters<Q>>>;

pub(super) fn routes<Q: Queue>(letters: Arc<Letters<Q>>) -> Router {
    let changing = Router::new()
        .route("/v1/subscribers/{name}/dead/replay", post(replay::<Q>))
        .route("/v1/subscribers/{name}/dead/purge", post(purge::<Q>))
        .route_layer(middleware::from_fn(with_token));
    Router::new()
        .route("/v1/subscribers/{name}/dead", get(list::<Q>))
        .route("/v1/subscribers/{name}/dead/{key}", get(show::<Q>))
        .merge(changing)
        .with_state(letters)
}

impl FromBody for LettersRequest {
    const MAX: usize = 64 * 1024;
    const SHAPE: &'static str = "{\"reason\":\"exhausted\"}, with `ids`, `keys`, `status`, `type`, `since`, `until`, `as_of`, `most` and `dry_run` as you need them";
}

/// A choice in a query. Texts are read by [`selection`].
impl FromQuery for LettersRequest {
    fn from_query(given: &mut Parameters) -> Self {
        let time = |text: &str| history::time(text).map(Time);
        let text = |text: &str| Ok::<_, String>(text.to_owned());
        Self {
            ids: None,
            keys: None,
            reason: given.take("reason", text),
            status: given.take("status", text),
            event_type: given.take("type", text),
            since: given.take("since", time),
            until: given.take("until", time),
            as_of: None,
            most: None,
            dry_run: true,
        }
    }
}

/// A choice that a form has made, and what was counted of it.
pub(super) struct Chosen(pub(super) LettersRequest);

impl FromQuery for Chosen {
    fn from_query(given: &mut Parameters) -> Self {
        let key = given.take("key", |text| Ok::<_, String>(text.to_owned()));
        Self(LettersRequest {
            keys: key.map(|key| vec![key]),
            as_of: given.take("as_of", |text| history::time(text).map(Time)),
            most: given.number("most", 1..=MAX_LETTERS),
            ..LettersRequest::from_query(given)
        })
    }
}

/// The query of a list.
pub(super) struct Listed {
    pub(super) wanted: LettersRequest,
    pub(super) limit: usize,
}

impl FromQuery for Listed {
    fn from_query(given: &mut Parameters) -> Self {
        // A limit of 0 asks for the number alone.
        let limit = given.number("limit", 0..=MAX_LISTED).unwrap_or(MAX_LISTED);
        Self { wanted: LettersRequest::from_query(given), limit }
    }
}

/// The subscriber and the key of a letter in a path.
pub(super) struct Place {
    pub(super) name: String,
    pub(super) key: String,
}

impl<S: Send + Sync> FromRequestParts<S> for Place {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Refusal> {
        let path = extract::Path::<(String, String)>::from_request_parts(parts, state).await;
        let place = path.map(|extract::Path((name, key))| Self { name, key });
        place.map_err(|_| Refusal::field("key", "must be UTF-8"))
    }
}

async fn list<Q: Queue>(
    extract::State(letters): This<Q>,
    Name(name): Name,
    Extension(caller): Extension<Caller>,
    Query(listed): Query<Listed>,
) -> Response {
    answer(letters.list(name, listed, &caller).await)
}

async fn show<Q: Queue>(
    extract::State(letters): This<Q>,
    Place { name, key }: Place,
    Extension(caller): Extension<Caller>,
    Query(()): Query<()>,
) -> Response {
    answer(letters.one(name, key, &caller).await)
}

async fn replay<Q: Queue>(
    letters: This<Q>,
    name: Name,
    caller: Extension<Caller>,
    headers: HeaderMap,
    body: Body,
) -> Response {
    asked(letters, name, caller, headers, body, Act::Replay).await
}

async fn purge<Q: Queue>(
    letters: This<Q>,
    name: Name,
    caller: Extension<Caller>,
    headers: HeaderMap,
    body: Body,
) -> Response {
    asked(letters, name, caller, headers, body, Act::Purge).await
}

async fn asked<Q: Queue>(
    extract::State(letters): This<Q>,
    Name(name): Name,
    Extension(caller): Extension<Caller>,
    headers: HeaderMap,
    mut body: Body,
    act: Act,
) -> Response {
    let work = async {
        let wanted: LettersRequest = body::json(&headers, &mut body).await?;
        let given = given_key(&headers)?;
        let key = given.map(|key| key_of(key, act, &name, &wanted, &caller));
        letters.act(act, name, wanted, key).await
    };
    let acted = match work.await {
        Ok(acted) => acted,
        Err(refusal) => {
            discard(&headers, body).await;
            return refusal.into_response();
        }
    };
    let details = Details(acted.details.clone());
    match acted.failed {
        Some(refusal) => {
            let mut response = refusal.into_response();
            response.extensions_mut().insert(Partly);
            response.extensions_mut().insert(details);
            response
        }
        None => {
            let mut response = json_answer(StatusCode::OK, &acted.done);
            if acted.is_again {
                response.headers_mut().extend([REPLAYED]);
            }
            if !acted.changed() {
                response.extensions_mut().insert(DryRun);
            }
            response.extensions_mut().insert(details);
            response
        }
    }
}

/// The key that a caller gave to its request.
pub(super) fn key_of(
    key: String,
    act: Act,
    subscriber: &str,
    wanted: &LettersRequest,
    caller: &Caller,
) -> RequestKey {
    // Whatever the order of its fields: the same request.
    let requested = serde_json::to_vec(wanted).unwrap_or_default();
    let sha256 = [act.name().as_bytes(), b"\n", subscriber.as_bytes(), b"\n", &requested]
        .into_iter()
        .fold(Sha256::new(), Sha256::chain_update);
    let by = caller.token.as_deref().unwrap_or_default().to_owned();
    RequestKey { by, key, sha256: sha256.finalize().into() }
}

/// The letters that a request means. The refusal names each field at fault.
fn selection(subscriber: &str, wanted: &LettersRequest) -> Result<Selection, Refusal> {
    fn read<T, E: Display>(
        wrong: &mut Vec<FieldError>,
        field: &str,
        given: Option<&str>,
        read: impl FnOnce(&str) -> Result<T, E>,
    ) -> Option<T> {
        let detail =
            |e: E| wrong.push(FieldError { field: field.to_owned(), detail: e.to_string() });
        given.and_then(|given| read(given).map_err(detail).ok())
    }
    let mut wrong = Vec::new();
    let reason = |text: &str| {
        let names = Reason::ALL.map(Reason::name).join("`, `");
        Reason::from_name(text).ok_or_else(|| format!("must be one of `{names}`"))
    };
    let status = |text: &str| {
        text.parse().map_err(|_| "must be a status, such as 503, or a class of them, such as 5xx")
    };
    let filters = Filters {
        reason: read(&mut wrong, "reason", wanted.reason.as_deref(), reason),
        status: read(&mut wrong, "status", wanted.status.as_deref(), status),
        event_type: read(&mut wrong, "type", wanted.event_type.as_deref(), Pattern::try_new),
        since: wanted.since.map(|at| at.0),
        until: wanted.until.map(|at| at.0),
    };
    let keys = wanted.keys.iter().flatten();
    let keys = keys.filter_map(|key| read(&mut wrong, "keys", Some(key), str::parse::<Key>));
    let keys = keys.map(letters::Name::Key).collect::<Vec<_>>();
    let ids = wanted.ids.iter().flatten().cloned().map(letters::Name::Id);
    let names = ids.chain(keys).collect::<Vec<_>>();
    if names.is_empty() && (wanted.ids.is_some() || wanted.keys.is_some()) {
        // Without a name all would be meant.
        let field = if wanted.ids.is_some() { "ids" } else { "keys" };
        let detail = "is empty; leave it out to choose all".to_owned();
        wrong.push(FieldError { field: field.to_owned(), detail });
    }
    if wanted.most.is_some_and(|most| !(1..=MAX_LETTERS).contains(&most)) {
        let detail = format!("must be a whole number from 1 to {MAX_LETTERS}");
        wrong.push(FieldError { field: "most".to_owned(), detail });
    }
    wrong.truncate(20);
    if !wrong.is_empty() {
        return Err(Refusal::fields(wrong));
    }
    let (subscriber, as_of) = (Some(subscriber.to_owned()), wanted.as_of.map(|at| at.0));
    Ok(Selection { subscriber, orphans: false, names, filters, as_of })
}

/// The names that no letter had.
fn missing(choice: &Choice<'_>) -> Vec<String> {
    let named = choice.missing().into_iter().map(|name| match name {
        letters::Name::Number(n) => format!("@{n}"),
        letters::Name::Id(id) => id.clone(),
        letters::Name::Key(key) => key.to_string(),
    });
    named.collect()
}

/// The end of a walk: the daemon drains, or the time is over.
struct Until {
    phase: watch::Receiver<Phase>,
    end: Option<Instant>,
}

impl Stop for Until {
    fn is_asked(&self) -> bool {
        self.phase.is_asked() || self.end.is_some_and(|end| clock::instant() >= end)
    }

    fn asked(&self) -> impl Future<Output = ()> + Send {
        self.phase.asked()
    }
}

/// What a request has done.
#[derive(Debug)]
pub(super) struct Acted {
    pub(super) done: LettersDone,
    /// The same request has done it before.
    pub(super) is_again: bool,
    /// Why it ended before it was done.
    pub(super) failed: Option<Refusal>,
    /// What the record of operations says of it.
    pub(super) details: String,
}

impl Acted {
    /// Whether this request has changed something.
    pub(super) fn changed(&self) -> bool {
        !self.is_again && !self.done.dry_run && self.done.letters > 0
    }
}

impl<Q: Queue> Letters<Q> {
    pub(super) fn new(queue: Q, reloader: Reloader, phase: watch::Receiver<Phase>) -> Self {
        let room = Arc::new(Semaphore::new(MOST_TO_THEIR_END));
        let (walking, made) = (tokio::sync::Mutex::default(), Mutex::default());
        Self { queue, reloader, phase, walking, room, made }
    }

    fn has(&self, name: &str) -> Result<(), Refusal> {
        if self.reloader.config().subscribers.iter().any(|s| s.name == name) {
            return Ok(());
        }
        let (status, kind) = (StatusCode::NOT_FOUND, ProblemKind::Subscriber);
        Err(Refusal::of_kind(status, kind, "no subscriber of that name is configured"))
    }

    fn until(&self, end: Option<Duration>) -> Until {
        Until { phase: self.phase.clone(), end: end.map(|after| clock::instant() + after) }
    }

    /// The oldest dead letters of a subscriber that fit, at most `limit`.
    pub(super) async fn list(
        self: &Arc<Self>,
        name: String,
        Listed { wanted, limit }: Listed,
        caller: &Caller,
    ) -> Result<DeadLetters, Refusal> {
        self.has(&name)?;
        let selection = selection(&name, &wanted)?;
        let this = self.clone();
        let work = async move {
            let (dead, complete, letters) =
                this.read(&name, &selection, limit, DeadLetter::new).await?;
            Ok(DeadLetters { subscriber: name, dead, complete, letters })
        };
        let mut found = to_its_end(&self.room, work).await?;
        if !caller.sees_endpoints() {
            found.letters = found.letters.into_iter().map(DeadLetter::without_answer).collect();
        }
        Ok(found)
    }

    /// The letter with a key.
    pub(super) async fn one(
        self: &Arc<Self>,
        name: String,
        key: String,
        caller: &Caller,
    ) -> Result<WholeLetter, Refusal> {
        self.has(&name)?;
        let key = key.parse().map_err(|why| Refusal::field("key", why))?;
        let names = vec![letters::Name::Key(key)];
        let selection = Selection { names, ..Selection::default() };
        let this = self.clone();
        let work = async move {
            let (_, complete, mut letters) =
                this.read(&name, &selection, 1, WholeLetter::new).await?;
            letters.pop().ok_or_else(|| not_there(complete))
        };
        let mut found: WholeLetter = to_its_end(&self.room, work).await?;
        if !caller.sees_endpoints() {
            found.letter = found.letter.without_answer();
        }
        Ok(found)
    }

    /// The number of all, whether all were looked at, and the oldest that were chosen. The walk is
    /// closed afterwards, which keeps their order.
    async fn read<L: Send>(
        &self,
        name: &str,
        selection: &Selection,
        limit: usize,
        show: fn(usize, &Held) -> L,
    ) -> Result<(u32, bool, Vec<L>), Refusal> {
        let _one = self.walking.lock().await;
        let letters = self.queue.dead_letters(name).await.map_err(|e| queue_fails(&e))?;
        let (dead, until) = (letters.left(), self.until(Some(SEARCH_TIME)));
        let (mut choice, mut found) = (Choice::new(selection), Vec::new());
        let walked = if limit == 0 {
            letters.close().await
        } else {
            let show = |number, held: &Held| {
                found.push(show(number, held));
                found.len() < limit
            };
            each(letters, &mut choice, &until, show).await.map(drop)
        };
        walked.map_err(|e| queue_fails(&e))?;
        Ok((dead, choice.number >= dead as usize, found))
    }

    /// Replays or purges the letters that a request means, or counts them.
    pub(super) async fn act(
        self: &Arc<Self>,
        act: Act,
        name: String,
        wanted: LettersRequest,
        key: Option<RequestKey>,
    ) -> Result<Acted, Refusal> {
        self.has(&name)?;
        let selection = selection(&name, &wanted)?;
        let this = self.clone();
        let work = async move { this.acted(act, &name, &selection, &wanted, key).await };
        to_its_end(&self.room, work).await
    }

    async fn acted(
        &self,
        act: Act,
        name: &str,
        selection: &Selection,
        wanted: &LettersRequest,
        key: Option<RequestKey>,
    ) -> Result<Acted, Refusal> {
        let (dry_run, most) = (wanted.dry_run, wanted.most.unwrap_or(MAX_LETTERS));
        let key = key.filter(|_| !dry_run);
        let _one = self.walking.lock().await;
        if let Some(done) = self.made_before(key.as_ref())? {
            let details = String::new();
            return Ok(Acted { done, is_again: true, failed: None, details });
        }
        let letters = self.queue.dead_letters(name).await.map_err(|e| queue_fails(&e))?;
        let dead = letters.left() as usize;
        let until = self.until(dry_run.then_some(SEARCH_TIME));
        let (walked, so_far, missing) = match act {
            Act::Replay => {
                let replay = Replay::new(selection, &until, ());
                let mut replay = replay.dry_run(dry_run).at_most(most);
                let walked = replay.once(letters).await;
                (walked, replay.replayed(), missing(replay.choice()))
            }
            Act::Purge => {
                let purge = Purge::new(selection, &until, ());
                let mut purge = purge.dry_run(dry_run).at_most(most);
                let walked = purge.run(letters).await;
                (walked, purge.purged(), missing(purge.choice()))
            }
        };
        let (done, failed) = match walked {
            Ok(done) => (done, None),
            Err(e) if so_far == 0 || dry_run => return Err(queue_fails(&e)),
            Err(e) => {
                let why = format!("{e}; {} before; send it again for the others", act.says(so_far));
                let done = Done { letters: so_far, skipped: 0, passed: 0, latest: None };
                (done, Some(Refusal::unavailable(why)))
            }
        };
        let details = counted(done.letters, "letter(s)") + &selection.filters.describe();
        let done = LettersDone::new((name, dead), done, dry_run, missing);
        if let (Some(key), None) = (key, &failed) {
            self.remember(key, done.clone());
        }
        Ok(Acted { done, is_again: false, failed, details })
    }

    /// What a request with this key has done.
    fn made_before(&self, key: Option<&RequestKey>) -> Result<Option<LettersDone>, Refusal> {
        let Some(key) = key else { return Ok(None) };
        let made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        let is_its = |made: &RequestKey| made.by == key.by && made.key == key.key;
        match made.iter().find(|(made, _)| is_its(made)) {
            Some((made, _)) if made.sha256 != key.sha256 => Err(other_request()),
            Some((_, done)) => Ok(Some(done.clone())),
            None => Ok(None),
        }
    }

    fn remember(&self, key: RequestKey, done: LettersDone) {
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        if made.len() == MAX_MADE {
            made.pop_front();
        }
        made.push_back((key, done));
    }
}

/// The answer to a key that no letter has, or none of those that were looked at.
fn not_there(complete: bool) -> Refusal {
    if complete {
        let why =
            "there is no dead letter with this key: it was replayed or purged, or never there";
        return Refusal::new(StatusCode::NOT_FOUND, why.to_owned());
    }
    let why = format!(
        "the letter is not among those that were read within {} s; `hooktrail dead show` waits longer",
        SEARCH_TIME.as_secs()
    );
    Refusal::unavailable(why)
}

//! What history answers: events, one event with where it went, deliveries.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use axum::{
    Extension, Router,
    extract::{self, FromRequestParts, Path},
    http::{StatusCode, request::Parts},
    middleware,
    response::Response,
    routing::get,
};

use super::{
    answer::{Refusal, answer},
    guard::{Caller, with_token},
    query::{FromQuery, Parameters, Query},
    view::{Delivery, DeliveryList, Event, EventList, EventWhere, Reach},
};
use crate::{
    clock,
    delivery::PauseStates,
    event::Pattern,
    history::{
        resend,
        whereabouts::{self, LanesOf, Wanted},
    },
    page::List,
    queue::Queue,
    store::{
        self, By, DeliveryFilter, DeliveryState, EventCounts, EventFilter, EventNumber, EventRow,
        Store, StoreError, TypeCounts,
    },
    supervisor::reload::Reloader,
};

/// The time that a list is searched for, before it answers how far it has come.
const SEARCH_TIME: Duration = Duration::from_millis(200);

/// The time that the events of a delivery are searched for: its page waits for them.
const EVENTS_TIME: Duration = Duration::from_millis(50);

/// The longest value of a filter, in bytes.
const MAX_VALUE: usize = 10 * 1024;

/// What history answers, and what is asked for that.
pub(super) struct History<Q, S> {
    queue: Q,
    store: S,
    reloader: Reloader,
}

type This<Q, S> = extract::State<Arc<History<Q, S>>>;

/// The routes of history. Each needs a token.
pub(super) fn routes<Q: Queue, S: Store>(history: Arc<History<Q, S>>) -> Router {
    Router::new()
        .route("/v1/events", get(list_events::<Q, S>))
        .route("/v1/events/{number}", get(show_event::<Q, S>))
        .route("/v1/deliveries", get(list_deliveries::<Q, S>))
        .route("/v1/deliveries/{id}", get(show_delivery::<Q, S>))
        .route_layer(middleware::from_fn(with_token))
        .with_state(history)
}

/// The query of a list of events.
pub(super) struct Events {
    filter: EventFilter,
    limit: usize,
    before: Option<EventNumber>,
}

impl FromQuery for Events {
    fn from_query(given: &mut Parameters) -> Self {
        let filter = event_filter(given);
        let before = given.cursor(List::Events).map(|cursor| EventNumber(cursor.row));
        Self { filter, limit: given.limit(), before }
    }
}

/// Takes the parameters that select events.
pub(super) fn event_filter(given: &mut Parameters) -> EventFilter {
    let by = given.take("by", |text| match text {
        "at" => Ok(By::At),
        "event-time" => Ok(By::EventTime),
        _ => Err("must be `at` or `event-time`"),
    });
    EventFilter {
        event_type: given.take("type", Pattern::try_new),
        actor: given.take("actor", value),
        resource: given.take("resource", value),
        tenant: given.take("tenant", str::parse),
        id: given.take("id", value),
        text: given.take("text", text),
        since: given.take("since", time),
        until: given.take("until", time),
        by: by.unwrap_or_default(),
    }
}

/// The time for which the events of a day are counted where a filter selects them.
const COUNT_TIME: Duration = Duration::from_millis(60);

const HOUR: u64 = 3600;

/// Hours of a [`Day`].
const HOURS: u64 = 24;

/// Events by the hours of 24 hours.
pub(super) struct Day {
    /// When the first hour begins.
    pub(super) from: SystemTime,
    pub(super) counts: EventCounts,
    /// The time that the list is narrowed to.
    pub(super) since: Option<SystemTime>,
    pub(super) until: Option<SystemTime>,
    /// Whether it ends with the hour that is now.
    pub(super) is_latest: bool,
}

/// Events of the last 24 hours by their types.
pub(super) struct DayTypes {
    pub(super) from: SystemTime,
    pub(super) counts: TypeCounts,
    pub(super) reach: Reach,
}

impl Day {
    pub(super) fn hour(&self, n: u32) -> SystemTime {
        self.from + Duration::from_secs(HOUR) * n
    }

    pub(super) fn until(&self) -> SystemTime {
        self.from + Duration::from_secs(HOURS * HOUR)
    }

    /// The 24 hours that a list is shown with: those until now, if its time begins or ends in them,
    /// otherwise its day (UTC).
    fn of(filter: &EventFilter, now: SystemTime) -> (SystemTime, bool) {
        let seconds = clock::unix_seconds(now);
        let latest = seconds - seconds % HOUR + HOUR - HOURS * HOUR;
        let last = |until: SystemTime| until.checked_sub(Duration::from_millis(1));
        let [since, until] =
            [filter.since, filter.until.and_then(last)].map(|at| at.map(clock::unix_seconds));
        let is_latest = since.is_none() && until.is_none()
            || [since, until].into_iter().flatten().any(|at| (latest..=seconds).contains(&at))
            || since.is_some_and(|since| since < latest) && until.is_none();
        let from = match since.or(until) {
            Some(at) if !is_latest => at - at % (HOURS * HOUR),
            _ => latest,
        };
        (SystemTime::UNIX_EPOCH + Duration::from_secs(from), is_latest)
    }
}

/// The query of a list of deliveries.
pub(super) struct Deliveries {
    filter: DeliveryFilter,
    limit: usize,
    before: Option<i64>,
}

impl Deliveries {
    /// The latest of a subscriber.
    pub(super) fn latest(subscriber: &str, limit: usize) -> Self {
        let subscriber = Some(subscriber.to_owned());
        let filter = DeliveryFilter { subscriber, state: None, since: None, until: None };
        Self { filter, limit, before: None }
    }
}

impl FromQuery for Deliveries {
    fn from_query(given: &mut Parameters) -> Self {
        let filter = DeliveryFilter {
            subscriber: given.take("subscriber", value),
            state: given.take("state", |text| {
                let known = DeliveryState::NAMES.contains(&text) || text == DeliveryState::UNKNOWN;
                let names = DeliveryState::NAMES.join("`, `");
                let wrong = || format!("must be one of `{names}`, `{}`", DeliveryState::UNKNOWN);
                if known { Ok(text.to_owned()) } else { Err(wrong()) }
            }),
            since: given.take("since", time),
            until: given.take("until", time),
        };
        let before = given.cursor(List::Deliveries).map(|cursor| cursor.row);
        Self { filter, limit: given.limit(), before }
    }
}

fn value(text: &str) -> Result<String, String> {
    match text.len() {
        0 => Err("is empty; leave it out to select everything".to_owned()),
        1..=MAX_VALUE => Ok(text.to_owned()),
        _ => Err(format!("has more than {MAX_VALUE} bytes")),
    }
}

/// Words to search for.
fn text(text: &str) -> Result<String, String> {
    let text = value(text)?;
    if text.chars().any(char::is_alphanumeric) {
        return Ok(text);
    }
    Err("has no word: words are letters and digits".to_owned())
}

pub(super) fn time(text: &str) -> Result<SystemTime, &'static str> {
    text.parse::<jiff::Timestamp>().and_then(SystemTime::try_from).map_err(|_| {
        "must be a time of RFC 3339 with its zone, such as 2026-01-31T12:00:00Z; in a query a plus sign is written %2B"
    })
}

/// The number of an event in a path.
pub(super) struct Number(pub(super) EventNumber);

impl<S: Send + Sync> FromRequestParts<S> for Number {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Refusal> {
        let path = Path::<String>::from_request_parts(parts, state).await;
        let number = path.ok().and_then(|Path(text)| {
            text.parse().ok().filter(|_| text.bytes().all(|b| b.is_ascii_digit()))
        });
        let wrong = "must be the number of an event; `GET /api/v1/events?id=` finds a message id";
        number.map(|n| Self(EventNumber(n))).ok_or_else(|| Refusal::field("number", wrong))
    }
}

/// The id of a batch in a path.
pub(super) struct Id(pub(super) String);

impl<S: Send + Sync> FromRequestParts<S> for Id {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Refusal> {
        let path = Path::<String>::from_request_parts(parts, state).await;
        path.map(|Path(id)| Self(id)).map_err(|_| Refusal::field("id", "must be UTF-8"))
    }
}

/// A delivery as far as its caller may see it.
fn shown(delivery: &store::Delivery, caller: &Caller) -> Delivery {
    let shown = Delivery::new(delivery, clock::now());
    if caller.sees_endpoints() { shown } else { shown.without_excerpts() }
}

async fn list_events<Q: Queue, S: Store>(
    extract::State(history): This<Q, S>,
    Query(wanted): Query<Events>,
) -> Response {
    answer(history.events(wanted).await)
}

async fn show_event<Q: Queue, S: Store>(
    extract::State(history): This<Q, S>,
    Number(number): Number,
    Query(()): Query<()>,
) -> Response {
    answer(history.event(number).await)
}

async fn list_deliveries<Q: Queue, S: Store>(
    extract::State(history): This<Q, S>,
    Extension(caller): Extension<Caller>,
    Query(wanted): Query<Deliveries>,
) -> Response {
    answer(history.deliveries(wanted, &caller).await)
}

async fn show_delivery<Q: Queue, S: Store>(
    extract::State(history): This<Q, S>,
    Extension(caller): Extension<Caller>,
    Id(id): Id,
    Query(()): Query<()>,
) -> Response {
    answer(history.delivery(&id, &caller).await)
}

impl<Q, S> History<Q, S> {
    pub(super) fn new(queue: Q, store: S, reloader: Reloader) -> Self {
        Self { queue, store, reloader }
    }
}

impl<Q: Queue, S: Store> History<Q, S> {
    pub(super) async fn events(
        &self,
        Events { filter, limit, before }: Events,
    ) -> Result<EventList, Refusal> {
        let page = self.store.events(&filter, before, limit, SEARCH_TIME).await.map_err(away)?;
        Ok(EventList::new(page, self.store.reach().await.map_err(away)?))
    }

    /// The events of the list's day by the hour; `None` if they cannot be counted, or the list is not
    /// by the [time](By::At) of history.
    pub(super) async fn day(&self, Events { filter, .. }: &Events) -> Option<Day> {
        if filter.by != By::At {
            return None;
        }
        let (from, is_latest) = Day::of(filter, clock::now());
        let whole = EventFilter { since: None, until: None, ..filter.clone() };
        let counting = self.store.count_by_hour(&whole, from, HOURS as usize, COUNT_TIME);
        let counts = counting.await.ok()?;
        let (since, until) = (filter.since, filter.until);
        Some(Day { from, counts, since, until, is_latest })
    }

    /// The events of the last 24 hours by their types, as far as they can be counted in a moment.
    pub(super) async fn day_types(&self) -> Result<DayTypes, Refusal> {
        let from = clock::now() - Duration::from_secs(HOURS * HOUR);
        let counts = self.store.count_by_type(from, COUNT_TIME).await.map_err(away)?;
        let reach = self.store.reach().await.map_err(away)?;
        Ok(DayTypes { from, counts, reach: reach.into() })
    }

    pub(super) async fn deliveries(
        &self,
        Deliveries { filter, limit, before }: Deliveries,
        caller: &Caller,
    ) -> Result<DeliveryList, Refusal> {
        let page =
            self.store.deliveries(&filter, before, limit, SEARCH_TIME).await.map_err(away)?;
        let mut list =
            DeliveryList::new(page, self.store.reach().await.map_err(away)?, clock::now());
        if !caller.sees_endpoints() {
            list.deliveries = list.deliveries.into_iter().map(Delivery::without_excerpts).collect();
        }
        Ok(list)
    }

    pub(super) async fn delivery(&self, id: &str, caller: &Caller) -> Result<Delivery, Refusal> {
        Ok(shown(&self.stored_delivery(id).await?, caller))
    }

    /// A delivery, and its events in their order, as many as a page shows; `None` of one that was not
    /// found in the time of a page.
    pub(super) async fn delivery_with_events(
        &self,
        id: &str,
        most: usize,
        caller: &Caller,
    ) -> Result<(Delivery, Vec<Option<Event>>), Refusal> {
        let found = self.stored_delivery(id).await?;
        let rows = resend::events_of(&self.store, &found, most, EVENTS_TIME).await;
        let events = rows.map_err(away)?.iter().map(|row| row.as_ref().map(Event::new)).collect();
        Ok((shown(&found, caller), events))
    }

    async fn stored_delivery(&self, id: &str) -> Result<store::Delivery, Refusal> {
        let found = self.store.delivery(id).await.map_err(away)?;
        found.ok_or_else(|| missing("history has no delivery with this id".to_owned()))
    }

    pub(super) async fn event(&self, number: EventNumber) -> Result<EventWhere, Refusal> {
        let found = self.store.event(number).await.map_err(away)?;
        let event =
            found.ok_or_else(|| missing(format!("history has no event with number {number}")))?;
        let went = self.went(&event).await.map_err(away)?;
        let reach = self.store.reach().await.map_err(away)?;
        Ok(EventWhere::new(&event, &went, reach))
    }

    async fn went(&self, event: &EventRow) -> Result<Vec<whereabouts::Whereabouts>, StoreError> {
        let subscribers = self.reloader.subscribers().borrow().clone();
        let configured = subscribers.iter().map(|s| (s.name.clone(), Wanted::by(s))).collect();
        let pauses: PauseStates = self.queue.pause_states().borrow().clone().unwrap_or_default();
        let lanes = LanesOf { queue: Some(self.queue.clone()), pauses };
        whereabouts::of_event(&self.store, event, &configured, &lanes, clock::now()).await
    }
}

/// The refusal of a request while the store cannot be read.
pub(super) fn away(e: StoreError) -> Refusal {
    Refusal::unavailable(e.to_string())
}

fn missing(why: String) -> Refusal {
    Refusal::new(StatusCode::NOT_FOUND, why)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_day_of_a_list_is_the_last_24_hours_or_the_day_that_it_is_narrowed_to() {
        let at = |text: &str| time(text).expect("a time");
        let now = at("2026-01-31T12:34:56Z");
        let latest = ("2026-01-30T13:00:00Z", true);
        for (since, until, (from, is_latest)) in [
            (None, None, latest),
            (Some("2026-01-31T03:00:00Z"), Some("2026-01-31T04:00:00Z"), latest),
            (Some("2026-01-30T13:00:00Z"), Some("2026-01-30T14:00:00Z"), latest),
            (None, Some("2026-01-30T14:00:00Z"), latest),
            (Some("2026-01-01T00:00:00Z"), None, latest),
            (
                Some("2026-01-29T05:00:00Z"),
                Some("2026-01-29T06:00:00Z"),
                ("2026-01-29T00:00:00Z", false),
            ),
            (None, Some("2026-01-29T00:00:00Z"), ("2026-01-28T00:00:00Z", false)),
            (Some("2027-01-01T12:00:00Z"), None, ("2027-01-01T00:00:00Z", false)),
            (
                Some("1969-01-01T12:00:00Z"),
                Some("1970-01-01T12:00:00Z"),
                ("1970-01-01T00:00:00Z", false),
            ),
        ] {
            let filter = EventFilter {
                since: since.map(at),
                until: until.map(at),
                ..EventFilter::default()
            };
            assert_eq!(Day::of(&filter, now), (at(from), is_latest), "{since:?} {until:?}");
        }
    }
}

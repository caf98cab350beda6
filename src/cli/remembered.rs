//! What history answers to a command: over the running daemon, or from the files of the store.

use std::time::{Duration, SystemTime};

use serde::de::DeserializeOwned;
use url::form_urlencoded;

use super::{
    daemon::{Asked, Daemon, Found, segment},
    failed::Failed,
    open::store_of,
    text::visible,
};
use crate::{
    admin::view::{Delivery, DeliveryList, EventList, EventWhere},
    clock,
    config::{Backend, Config, StoreConfig},
    delivery::PauseStates,
    history::whereabouts::{self, LanesOf, Wanted},
    page::{Cursor, List},
    queue::embedded::EmbeddedQueue,
    store::{
        By, DeliveryFilter, EventFilter, EventNumber, Store as _, StoreError, sqlite::SqliteStore,
    },
};

/// The time that one read of the store takes, about.
const READ_TIME: Duration = Duration::from_secs(1);

/// Where the answers come from.
#[derive(Debug)]
pub(super) enum Remembered<'c> {
    Daemon(Daemon<'c>),
    /// No daemon answers; with the embedded queue, if that is configured and exists.
    Files {
        store: SqliteStore,
        queue: Option<EmbeddedQueue>,
        config: &'c Config,
    },
}

/// The parameters of a list, as the API takes them.
pub(super) type Parameters = Vec<(&'static str, String)>;

impl<'c> Remembered<'c> {
    /// Asks the daemon, and without one opens the store.
    pub(super) async fn open(config: &'c Config, asked: &'c Asked) -> Result<Self, Failed> {
        let absent = match Daemon::of(asked)?.find().await? {
            Found::Daemon(daemon) => return Ok(Self::Daemon(daemon)),
            Found::Absent(why) => why,
        };
        if !config.keeps_history() {
            let key = match config.store {
                StoreConfig::None => "[store] url is \"none\"",
                StoreConfig::Sqlite => "[history] retention is \"0s\"",
            };
            return Err(Failed::Usage(format!("nothing is remembered: {key}")));
        }
        let queue = match config.queue.backend {
            Backend::Embedded if EmbeddedQueue::exists(&config.queue.embedded)? => {
                Some(EmbeddedQueue::existing(&config.queue.embedded)?)
            }
            Backend::Embedded | Backend::Amqp(_) => None,
        };
        let store = SqliteStore::read_only(store_of(config)).map_err(|e| {
            Failed::Runtime(format!(
                "no daemon answers ({absent}), and the store cannot be read: {}",
                visible(&e.to_string())
            ))
        })?;
        Ok(Self::Files { store, queue, config })
    }

    /// One part of the events that are selected, from a cursor on.
    pub(super) async fn events(
        &self,
        filter: &EventFilter,
        limit: usize,
        cursor: Option<&str>,
    ) -> Result<EventList, Failed> {
        match self {
            Self::Daemon(daemon) => get(daemon, "events", event_query(filter, limit, cursor)).await,
            Self::Files { store, .. } => {
                let before = row(cursor, List::Events)?.map(EventNumber);
                let page = store.events(filter, before, limit, READ_TIME).await.map_err(away)?;
                Ok(EventList::new(page, store.reach().await.map_err(away)?))
            }
        }
    }

    /// An event and where it went; `None` if history has no such number.
    pub(super) async fn event(&self, number: i64) -> Result<Option<EventWhere>, Failed> {
        match self {
            Self::Daemon(daemon) => {
                let found = daemon.get_if_there(&format!("events/{number}")).await?;
                Ok(found.map(|answer| answer.read))
            }
            Self::Files { store, queue, config } => {
                let found = store.event(EventNumber(number)).await.map_err(away)?;
                let Some(event) = found else { return Ok(None) };
                let all = config.subscribers.iter();
                let configured = all.map(|s| (s.name.clone(), Wanted::by(s))).collect();
                let pauses = match queue {
                    Some(queue) => queue.recorded_pauses().await.unwrap_or_default(),
                    None => PauseStates::default(),
                };
                let lanes = LanesOf { queue: queue.clone(), pauses };
                let went = whereabouts::of_event(store, &event, &configured, &lanes, clock::now());
                let went = went.await.map_err(away)?;
                let reach = store.reach().await.map_err(away)?;
                Ok(Some(EventWhere::new(&event, &went, reach)))
            }
        }
    }

    /// One part of the deliveries that are selected, from a cursor on.
    pub(super) async fn deliveries(
        &self,
        filter: &DeliveryFilter,
        limit: usize,
        cursor: Option<&str>,
    ) -> Result<DeliveryList, Failed> {
        match self {
            Self::Daemon(daemon) => {
                let query = delivery_query(filter, limit, cursor);
                get(daemon, "deliveries", query).await
            }
            Self::Files { store, .. } => {
                let before = row(cursor, List::Deliveries)?;
                let page =
                    store.deliveries(filter, before, limit, READ_TIME).await.map_err(away)?;
                Ok(DeliveryList::new(page, store.reach().await.map_err(away)?, clock::now()))
            }
        }
    }

    /// The delivery of a batch; `None` if history has none.
    pub(super) async fn delivery(&self, id: &str) -> Result<Option<Delivery>, Failed> {
        match self {
            Self::Daemon(daemon) => {
                let path = format!("deliveries/{}", segment(id));
                Ok(daemon.get_if_there(&path).await?.map(|answer| answer.read))
            }
            Self::Files { store, .. } => {
                let found = store.delivery(id).await.map_err(away)?;
                Ok(found.as_ref().map(|found| Delivery::new(found, clock::now())))
            }
        }
    }
}

async fn get<A: DeserializeOwned>(
    daemon: &Daemon<'_>,
    list: &str,
    query: Parameters,
) -> Result<A, Failed> {
    let query = form_urlencoded::Serializer::new(String::new()).extend_pairs(query).finish();
    Ok(daemon.get::<A>(&format!("{list}?{query}")).await?.read)
}

fn row(cursor: Option<&str>, list: List) -> Result<Option<i64>, Failed> {
    let read = cursor.map(|text| Cursor::parse(text, list)).transpose();
    let read = read.map_err(|why| Failed::Usage(format!("the cursor {why}")))?;
    Ok(read.map(|cursor| cursor.row))
}

fn away(e: StoreError) -> Failed {
    Failed::Runtime(visible(&e.to_string()))
}

fn event_query(filter: &EventFilter, limit: usize, cursor: Option<&str>) -> Parameters {
    let EventFilter { event_type, actor, resource, tenant, id, text, since, until, by } = filter;
    let mut query = page_query(limit, cursor, *since, *until);
    let texts = [("actor", actor), ("resource", resource), ("id", id), ("text", text)];
    query.extend(event_type.iter().map(|pattern| ("type", pattern.as_str().to_owned())));
    query.extend(tenant.iter().map(|tenant| ("tenant", tenant.to_string())));
    query.extend(texts.into_iter().filter_map(|(key, text)| Some((key, text.clone()?))));
    if *by == By::EventTime {
        query.push(("by", "event-time".to_owned()));
    }
    query
}

fn delivery_query(filter: &DeliveryFilter, limit: usize, cursor: Option<&str>) -> Parameters {
    let DeliveryFilter { subscriber, state, since, until } = filter;
    let mut query = page_query(limit, cursor, *since, *until);
    let texts = [("subscriber", subscriber), ("state", state)];
    query.extend(texts.into_iter().filter_map(|(key, text)| Some((key, text.clone()?))));
    query
}

fn page_query(
    limit: usize,
    cursor: Option<&str>,
    since: Option<SystemTime>,
    until: Option<SystemTime>,
) -> Parameters {
    let mut query = vec![("limit", limit.to_string())];
    query.extend(cursor.map(|text| ("cursor", text.to_owned())));
    let times = [("since", since), ("until", until)];
    query.extend(times.into_iter().filter_map(|(key, at)| Some((key, clock::rfc3339(at?)))));
    query
}

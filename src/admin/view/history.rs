//! Events and deliveries as the API answers with them.

use std::time::SystemTime;

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use serde::{Deserialize, Serialize};

use super::{Paused, Time};
use crate::{
    csv,
    delivery::FailureKind,
    event::{Tenant, details},
    history::whereabouts::{self, Fate, Last},
    page::{Cursor, List},
    store::{self, DeliveryState, Page},
};

/// Why an event of a subscriber's patterns is not for it.
const BY_VALUES: &str = "its key `match`, as it is today, does not match the event";

/// A part of a list of events, newest first.
#[derive(Debug, Serialize, Deserialize)]
pub struct EventList {
    pub events: Vec<Event>,
    /// The cursor of the next part; absent at the end of the list.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
    /// The search has come this far back in its time; `next` goes on from there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub searched_back_to: Option<Time>,
    pub history: Reach,
}

impl EventList {
    pub fn new(page: Page<store::EventRow>, reach: store::Reach) -> Self {
        Self {
            next: next(List::Events, page.next),
            searched_back_to: page.searched_back_to.map(Time),
            events: page.rows.iter().map(Event::new).collect(),
            history: reach.into(),
        }
    }
}

fn next(list: List, row: Option<i64>) -> Option<String> {
    row.map(|row| Cursor { list, row }.to_string())
}

/// An event without its bytes.
#[derive(Debug, Serialize, Deserialize)]
pub struct Event {
    pub number: i64,
    pub at: Time,
    pub event: String,
    /// The message id; an event without one has `sha256-` and the digest of its bytes.
    pub id: String,
    pub message_id: Option<String>,
    /// The event's own field, as its text.
    pub timestamp: Option<String>,
    pub actor: Party,
    pub resource: Party,
    pub description: Option<String>,
    pub bytes: u64,
    /// Absent of an event without one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tenant: Option<String>,
}

impl Event {
    pub fn new(row: &store::EventRow) -> Self {
        let details::Details { timestamp, actor, resource, description } = row.details.clone();
        Self {
            number: row.number.0,
            at: Time(row.at),
            event: row.event_type.clone(),
            id: row.id(),
            message_id: row.message_id.clone(),
            timestamp,
            actor: actor.into(),
            resource: resource.into(),
            description,
            bytes: row.bytes,
            tenant: row.tenant.as_ref().map(Tenant::to_string),
        }
    }

    /// The columns of an event as comma-separated values.
    pub const COLUMNS: [&str; 14] = [
        "number",
        "at",
        "event",
        "id",
        "timestamp",
        "actor_id",
        "actor_type",
        "actor_name",
        "resource_id",
        "resource_type",
        "resource_name",
        "description",
        "bytes",
        "tenant",
    ];

    /// The event as a line of comma-separated values.
    pub fn to_csv(&self) -> String {
        let Self { actor, resource, .. } = self;
        let (number, at, bytes) =
            (self.number.to_string(), self.at.to_string(), self.bytes.to_string());
        let text = |text: &'_ Option<String>| text.clone().unwrap_or_default();
        let cells: [String; Self::COLUMNS.len()] = [
            number,
            at,
            self.event.clone(),
            self.id.clone(),
            text(&self.timestamp),
            text(&actor.id),
            text(&actor.kind),
            text(&actor.name),
            text(&resource.id),
            text(&resource.kind),
            text(&resource.name),
            text(&self.description),
            bytes,
            text(&self.tenant),
        ];
        csv::line(cells)
    }
}

/// An actor or a resource. A field that is no text stands here as its JSON.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Party {
    pub id: Option<String>,
    #[serde(rename = "type")]
    pub kind: Option<String>,
    pub name: Option<String>,
}

impl From<details::Party> for Party {
    fn from(details::Party { id, kind, name }: details::Party) -> Self {
        Self { id, kind, name }
    }
}

/// How far history reaches.
#[derive(Debug, Serialize, Deserialize)]
pub struct Reach {
    /// The oldest event; `None` if there is none.
    pub events_from: Option<Time>,
    pub deliveries_from: Option<Time>,
    /// Why it begins there.
    pub why: String,
    /// The time of the last event that is in history.
    pub last_event_at: Option<Time>,
    /// The times that lack something, the oldest first.
    pub gaps: Vec<Gap>,
}

/// A time of which history may lack events or deliveries.
#[derive(Debug, Serialize, Deserialize)]
pub struct Gap {
    pub from: Time,
    pub until: Time,
    /// `events` or `deliveries`.
    pub what: String,
    pub why: String,
    /// The number that is missing, where it is known.
    pub missing: Option<u64>,
}

impl From<store::Reach> for Reach {
    fn from(reach: store::Reach) -> Self {
        let gap = |gap: store::Gap| Gap {
            from: Time(gap.from),
            until: Time(gap.until),
            what: gap.what.to_owned(),
            why: gap.why,
            missing: gap.missing,
        };
        Self {
            events_from: reach.events_from.map(Time),
            deliveries_from: reach.deliveries_from.map(Time),
            why: reach.why,
            last_event_at: reach.last.filter(|_| reach.events > 0).map(|(_, at)| Time(at)),
            gaps: reach.gaps.into_iter().map(gap).collect(),
        }
    }
}

/// An event with its bytes.
#[derive(Debug, Serialize)]
pub struct EventWithBytes {
    #[serde(flatten)]
    pub event: Event,
    /// The published bytes, if they are UTF-8.
    pub body: Option<String>,
    /// The published bytes in base64, if they are not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub body_base64: Option<String>,
}

impl EventWithBytes {
    pub fn new(row: &store::EventRow) -> Self {
        let text = row.body.as_ref().map(|body| std::str::from_utf8(body));
        let (body, body_base64) = match text {
            Some(Ok(text)) => (Some(text.to_owned()), None),
            Some(Err(_)) => (None, row.body.as_ref().map(|body| BASE64.encode(body))),
            None => (None, None),
        };
        Self { event: Event::new(row), body, body_base64 }
    }
}

/// One event, its bytes, and where it went.
#[derive(Debug, Serialize, Deserialize)]
pub struct EventWhere {
    #[serde(flatten)]
    pub event: Event,
    /// The published bytes, if they are UTF-8.
    pub body: Option<String>,
    /// The published bytes in base64, if they are not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub body_base64: Option<String>,
    /// By subscriber.
    #[serde(rename = "where")]
    pub went: Vec<Whereabouts>,
    pub history: Reach,
}

impl EventWhere {
    pub fn new(
        row: &store::EventRow,
        went: &[whereabouts::Whereabouts],
        reach: store::Reach,
    ) -> Self {
        let EventWithBytes { event, body, body_base64 } = EventWithBytes::new(row);
        Self {
            event,
            body,
            body_base64,
            went: went.iter().map(Whereabouts::new).collect(),
            history: reach.into(),
        }
    }
}

/// Where an event went for one subscriber.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Whereabouts {
    pub subscriber: String,
    /// Whether the subscriber is configured today.
    pub configured: bool,
    /// `delivered`, `in_flight`, `retrying`, `paused`, `dead`, `waiting`, `not_matched`, `unknown`.
    pub state: String,
    /// When it was delivered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub delivered_at: Option<Time>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_attempt_at: Option<Time>,
    /// The id of the batch, which the receiver got as `webhook-id`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub batch: Option<String>,
    /// The number of the last attempt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attempt: Option<u32>,
    /// The status of the last answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<u16>,
    /// Why the last attempt failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<String>,
    /// Why it is a dead letter.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The pause of the subscriber whose queue it waits in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subscriber_paused: Option<Paused>,
    /// The patterns that the subscriber had then; empty if it was not configured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub patterns: Option<Vec<String>>,
    /// The tenant whose events alone the subscriber gets, if the event is not of that one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tenant: Option<String>,
    /// Why nothing is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
    /// The ids of all batches that had the event, the decisive one first.
    pub batches: Vec<String>,
}

impl Whereabouts {
    fn new(of: &whereabouts::Whereabouts) -> Self {
        let mut view = Self {
            subscriber: of.subscriber.to_string(),
            configured: of.configured,
            state: of.fate.name().to_owned(),
            delivered_at: None,
            next_attempt_at: None,
            batch: None,
            attempt: None,
            status: None,
            failure: None,
            reason: None,
            subscriber_paused: None,
            patterns: None,
            tenant: None,
            why: None,
            batches: of.deliveries.iter().map(ToString::to_string).collect(),
        };
        match &of.fate {
            Fate::Delivered { at, last } => {
                view.delivered_at = Some(Time(*at));
                view.last(last);
            }
            Fate::InFlight { last } | Fate::Paused { last } => view.last(last),
            Fate::Retrying { due, last } => {
                view.next_attempt_at = Some(Time(*due));
                view.last(last);
            }
            Fate::Dead { reason, last } => {
                view.reason = Some(reason.name().to_owned());
                view.last(last);
            }
            Fate::Waiting { paused } => view.subscriber_paused = paused.clone().map(Paused::from),
            Fate::NotMatched { patterns, by_values, tenant } => {
                view.why = by_values.then(|| BY_VALUES.to_owned());
                view.tenant = tenant.as_ref().map(Tenant::to_string);
                view.patterns = Some(patterns.iter().map(|p| p.as_str().to_owned()).collect());
            }
            Fate::Unknown { why } => view.why = Some(why.clone()),
        }
        view
    }

    fn last(&mut self, last: &Last) {
        self.batch = Some(last.batch.to_string());
        self.attempt = (last.attempt > 0).then_some(last.attempt);
        self.status = last.status;
        self.failure = last.failure.map(|failure| failure.name().to_owned());
    }

    /// Whether the subscriber has the event, or was not to get it.
    pub fn is_settled(&self) -> bool {
        matches!(self.state.as_str(), "delivered" | "not_matched")
    }
}

/// A part of a list of deliveries, the latest begun first.
#[derive(Debug, Serialize, Deserialize)]
pub struct DeliveryList {
    pub deliveries: Vec<Delivery>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub searched_back_to: Option<Time>,
    pub history: Reach,
}

impl DeliveryList {
    pub fn new(page: Page<store::Delivery>, reach: store::Reach, now: SystemTime) -> Self {
        Self {
            next: next(List::Deliveries, page.next),
            searched_back_to: page.searched_back_to.map(Time),
            deliveries: page.rows.iter().map(|of| Delivery::new(of, now)).collect(),
            history: reach.into(),
        }
    }
}

/// A batch and what became of it.
#[derive(Debug, Serialize, Deserialize)]
pub struct Delivery {
    pub id: String,
    pub subscriber: String,
    /// As in the configuration: `json` for example; `None` of a single event that never became a batch.
    pub format: Option<String>,
    /// `in_flight`, `retrying`, `delivered`, `dead`, `paused`, `split`, `interrupted`, `unknown`.
    pub state: String,
    /// Why the state is unknown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
    pub delivered_at: Option<Time>,
    pub next_attempt_at: Option<Time>,
    /// Why it is a dead letter.
    pub reason: Option<String>,
    /// The batch that this is a half of.
    pub parent: Option<String>,
    pub events: u32,
    /// Bytes of the body.
    pub bytes: u64,
    /// The SHA-256 of the body in hexadecimal digits.
    pub sha256: Option<String>,
    /// An operator sent it again.
    pub replay: bool,
    pub begun_at: Time,
    pub changed_at: Time,
    /// Oldest first; of more than 100 the first and the latest.
    pub attempts: Vec<Attempt>,
}

/// An attempt.
#[derive(Debug, Serialize, Deserialize)]
pub struct Attempt {
    pub number: u32,
    pub at: Time,
    /// `None` while there is no answer.
    pub duration_ms: Option<u64>,
    pub status: Option<u16>,
    pub failure: Option<String>,
    /// The begin of the answer, or the cause, of a failed attempt.
    pub excerpt: Option<String>,
    /// The daemon that made it.
    pub by: String,
}

impl Delivery {
    pub fn new(of: &store::Delivery, now: SystemTime) -> Self {
        let contents = &of.contents;
        let hex = |digest: [u8; 32]| digest.iter().map(|b| format!("{b:02x}")).collect::<String>();
        let time = |at: &SystemTime| Some(Time(*at));
        let (delivered_at, next_attempt_at, reason) = match &of.state {
            DeliveryState::Delivered { at } => (time(at), None, None),
            DeliveryState::Retrying { due } => (None, time(due), None),
            DeliveryState::Dead { reason } => (None, None, Some(reason.name().to_owned())),
            _ => (None, None, None),
        };
        Self {
            id: of.id.to_string(),
            subscriber: of.subscriber.to_string(),
            format: contents.format.map(|format| format.name().to_owned()),
            state: of.known_state(now).to_owned(),
            why: of.doubt(now),
            delivered_at,
            next_attempt_at,
            reason,
            parent: contents.parent.as_ref().map(ToString::to_string),
            events: contents.events,
            bytes: contents.bytes,
            sha256: contents.sha256.map(hex),
            replay: contents.replay,
            begun_at: Time(of.begun_at),
            changed_at: Time(of.changed_at),
            attempts: of.attempts.iter().map(Attempt::new).collect(),
        }
    }
}

impl Delivery {
    /// Without what receivers have answered, which may be what they were sent: a URL's path.
    pub(in crate::admin) fn without_excerpts(mut self) -> Self {
        self.attempts.iter_mut().for_each(|attempt| attempt.excerpt = None);
        self
    }
}

impl Attempt {
    fn new(of: &store::DeliveryAttempt) -> Self {
        let end = of.end.as_ref();
        let excerpt = end.map(|(_, end)| end.excerpt.clone()).filter(|text| !text.is_empty());
        Self {
            number: of.number,
            at: Time(of.at),
            duration_ms: end.map(|(took, _)| took.as_millis() as u64),
            status: end.and_then(|(_, end)| end.status),
            failure: end.and_then(|(_, end)| end.failure).map(FailureKind::name).map(str::to_owned),
            excerpt,
            by: of.by.clone(),
        }
    }
}

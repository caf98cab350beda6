//! The demo's events: everyday ones, and odd ones that become dead letters.

use serde_json::{Value, json};

use crate::{clock, queue::NewEvent};

/// The type of events that `crm` refuses.
pub(super) const REFUSED: &str = "activity_log.export.requested";

/// Events that become dead letters: refused by `crm`, larger than a request may be, invalid.
pub(super) const ODD: [fn(usize) -> NewEvent; 3] = [refused_event, large_event, invalid_event];

fn new_event(event_type: &str, id: usize, body: &Value) -> NewEvent {
    NewEvent {
        event_type: event_type.to_owned(),
        message_id: Some(demo_id(id)),
        body: body.to_string().into(),
        traceparent: None,
        tenant: None,
    }
}

fn demo_id(id: usize) -> String {
    format!("evt_demo_{id:06}")
}

pub(super) fn refused_event(id: usize) -> NewEvent {
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

pub(super) fn audit_event(id: usize) -> NewEvent {
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

/// The ids that the demo gave the events of a batch, or a single event.
pub(super) fn event_ids(body: &[u8]) -> Vec<String> {
    let id = |event: &Value| event["demo_id"].as_str().map(str::to_owned);
    match serde_json::from_slice::<Value>(body) {
        Ok(value) => match value["events"].as_array() {
            Some(events) => events.iter().filter_map(id).collect(),
            None => id(&value).into_iter().collect(),
        },
        Err(_) => Vec::new(),
    }
}

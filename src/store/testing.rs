//! What every implementation of the store must hold, checked over its trait.

use std::{
    collections::BTreeSet,
    time::{Duration, SystemTime},
};

use proptest::{prelude::*, sample::select};
use serde_json::Value;

use super::{
    By, Deleted, EventFilter, EventNumber, EventRow, KeptSubscriber, KeptSubscribers, NewOperation,
    NewRow, Put, Stamp, Store, StoredSubscriber,
};
use crate::{crypto::secret::Secret, delivery::SubscriberName, event::Pattern};

/// The time of a search that is not to be cut.
const LONG: Duration = Duration::from_secs(60);

/// The earliest field `timestamp` of a random event.
const FIELD: u64 = 1_700_000_000;

const TYPES: [&str; 6] = ["a.b", "a.c", "A.b", "user.updated", "user", "x_y.z"];
const VALUES: [&str; 10] =
    ["7", "u-1", "Jane Doe", "jane doe", "\"x\" OR \"y\"", "é_é", "", "%", "_aseven", "NULL"];
const TEXTS: [&str; 12] = [
    "Updated the profile",
    "ÜBER die Straße",
    "a\u{0}b; DROP TABLE chunk--",
    "word:word NEAR(the, 2) *",
    "x AND NOT y",
    "東京 2026",
    "up",
    "7",
    "the the",
    "🙂 only",
    "e1f3-4a5b_c",
    "ΟΔΟΣ",
];

/// A random event, for the given time.
pub(crate) fn any_event() -> impl Strategy<Value = (Value, Option<String>, u64)> {
    (
        select(&TYPES[..]),
        proptest::option::of(select(&VALUES[..])),
        proptest::option::of(select(&VALUES[..])),
        select(&TEXTS[..]),
        proptest::option::of(0..4_u8),
        0..100_000_u64,
    )
        .prop_map(|(event_type, id, name, text, message, age)| {
            let event = serde_json::json!({
                "event": event_type,
                "actor": {"id": id, "name": name},
                "resource": {"id": name, "type": "thing", "name": id},
                "description": text,
                "changes": {"title": {"from": 7, "to": [text, true, -1.5]}},
                "timestamp": FIELD + age,
            });
            (event, message.map(|m| format!("id-{m}")), age)
        })
}

pub(crate) fn any_filter() -> impl Strategy<Value = EventFilter> {
    let pattern = select(vec!["#", "a.*", "*.b", "user.#", "a.b", "A.b", "none", "*.*"]);
    let value = || proptest::option::weighted(0.3, select(&VALUES[..]));
    let text = select(vec![
        "the",
        "upd",
        "profile updated",
        "7",
        "über",
        "STRASSE",
        "die straße",
        "drop",
        "OR y",
        "東",
        "οδος",
        "e1f3",
        "c",
        "x y",
        "near 2",
    ]);
    let since = proptest::option::weighted(0.3, 0..100_000_u64);
    (
        proptest::option::weighted(0.4, pattern),
        value(),
        value(),
        proptest::option::weighted(0.3, select(vec!["id-0", "id-1", "id-9"])),
        proptest::option::weighted(0.4, text),
        since.clone(),
        since,
        select(vec![By::At, By::At, By::EventTime]),
    )
        .prop_map(|(pattern, actor, resource, id, text, since, until, by)| {
            let at = |age| {
                SystemTime::UNIX_EPOCH
                    + match by {
                        By::At => base() + Duration::from_millis(age),
                        By::EventTime => Duration::from_secs(FIELD + age),
                    }
            };
            EventFilter {
                tenant: None,
                event_type: pattern.map(|p| Pattern::try_new(p).expect("a pattern")),
                actor: actor.map(str::to_owned),
                resource: resource.map(str::to_owned),
                id: id.map(str::to_owned),
                text: text.map(str::to_owned),
                since: since.map(at),
                until: until.map(at),
                by,
            }
        })
}

/// The time of random events: an hour ago, to the second.
pub(crate) fn base() -> Duration {
    static BASE: std::sync::OnceLock<Duration> = std::sync::OnceLock::new();
    *BASE
        .get_or_init(|| Duration::from_secs(crate::clock::unix_seconds(crate::clock::now()) - 3600))
}

pub(crate) fn new_row((event, message_id, age): &(Value, Option<String>, u64)) -> NewRow {
    NewRow {
        number: None,
        at: SystemTime::UNIX_EPOCH + base() + Duration::from_millis(*age),
        event_type: event["event"].as_str().expect("a type").to_owned(),
        message_id: message_id.clone(),
        body: event.to_string().into(),
        redelivered: false,
        tenant: None,
    }
}

/// Whether a filter selects an event, in other words than the program's.
fn selects(filter: &EventFilter, row: &NewRow) -> bool {
    let event: Value = serde_json::from_slice(&row.body).expect("JSON");
    let is_party = |party: &Value, wanted: &Option<String>| {
        wanted.as_ref().is_none_or(|w| party["id"] == **w || party["name"] == **w)
    };
    let at = match filter.by {
        By::At => row.at,
        By::EventTime => {
            let seconds = event["timestamp"].as_u64().expect("a number");
            SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
        }
    };
    filter.event_type.as_ref().is_none_or(|p| p.matches(&row.event_type))
        && is_party(&event["actor"], &filter.actor)
        && is_party(&event["resource"], &filter.resource)
        && (filter.id.is_none() || row.message_id == filter.id)
        && filter.since.is_none_or(|since| at >= since)
        && filter.until.is_none_or(|until| at < until)
        && filter.text.as_ref().is_none_or(|text| {
            let mut words = Vec::new();
            collect(&event, &mut words);
            let wanted = split(text);
            let (last, whole) = wanted.split_last().expect("a word");
            whole.iter().all(|w| words.contains(w)) && words.iter().any(|w| w.starts_with(last))
        })
}

fn split(text: &str) -> Vec<String> {
    let lower = text.to_lowercase().replace('ς', "σ");
    let words = lower.split(|c: char| !c.is_alphanumeric());
    words.filter(|w| !w.is_empty()).map(str::to_owned).collect()
}

fn collect(value: &Value, words: &mut Vec<String>) {
    match value {
        Value::String(text) => words.extend(split(text)),
        Value::Number(n) => words.extend(split(&n.to_string())),
        Value::Array(all) => all.iter().for_each(|v| collect(v, words)),
        Value::Object(all) => all.values().for_each(|v| collect(v, words)),
        Value::Null | Value::Bool(_) => {}
    }
}

/// A list of all pages together.
pub(crate) async fn all_pages(
    store: &impl Store,
    filter: &EventFilter,
    limit: usize,
) -> Vec<EventRow> {
    let (mut rows, mut before) = (Vec::new(), None);
    loop {
        let page = store.events(filter, before, limit, LONG).await.expect("lists");
        assert!(page.rows.len() <= limit && page.searched_back_to.is_none());
        rows.extend(page.rows);
        match page.next {
            Some(next) => before = Some(EventNumber(next)),
            None => return rows,
        }
    }
}

/// Adds events to an empty store and compares each filter's list with a scan of all of them; before
/// and after all that is done to what is stored.
pub(crate) async fn finds_what_a_scan_finds(
    store: &impl Store,
    events: &[NewRow],
    filters: &[EventFilter],
    limit: usize,
) {
    for (n, group) in events.chunks(5).enumerate() {
        let appended = store.append(group.to_vec()).await.expect("appends");
        assert_eq!((appended.events, appended.repeats), (group.len(), 0));
        if n % 2 == 1 {
            // In between, and not to its end.
            store.trim(crate::clock::now()).await.expect("trims");
        }
    }
    for is_trimmed in [false, true] {
        while is_trimmed && store.trim(crate::clock::now()).await.expect("trims") {}
        for filter in filters {
            let found = all_pages(store, filter, limit).await;
            let found: Vec<_> = found.iter().map(|row| row.body.clone().expect("a body")).collect();
            let expected = events.iter().rev().filter(|row| selects(filter, row));
            let expected: Vec<_> = expected.map(|row| row.body.clone()).collect();
            assert_eq!(found, expected, "{filter:?}");
        }
    }
}

/// An operation on a subscriber, at a second.
pub(crate) fn operation(what: &'static str, name: &str, second: u64) -> NewOperation {
    NewOperation {
        at: SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000 + second),
        by: format!("ops-{second}"),
        what,
        subject: name.to_owned(),
        details: "https://example.com".to_owned(),
    }
}

/// Puts a subscriber that must be stored.
pub(crate) async fn put(
    store: &impl Store,
    name: &str,
    document: &str,
    expected: Option<u64>,
    second: u64,
) -> StoredSubscriber {
    let new = operation("add_subscriber", name, second);
    match store.put_subscriber(&name.into(), Secret::new(document), expected, new).await {
        Ok(Put::Stored(stored)) => stored,
        other => panic!("{name} was not stored: {other:?}"),
    }
}

/// The subscribers of a store with which all is well.
pub(crate) async fn open_subscribers(store: &impl Store) -> Vec<StoredSubscriber> {
    let KeptSubscribers { all, may_lack, problems } = store.subscribers().await;
    assert!(!may_lack && problems.is_empty(), "{problems:?}");
    let open = all.into_iter().map(|kept| match kept {
        KeptSubscriber::Open(stored) => stored,
        KeptSubscriber::Locked { name, why, .. } => panic!("{name} is locked: {why}"),
    });
    open.collect()
}

/// A subscriber is changed only by who knows its version, and no version is used twice.
pub(crate) async fn subscribers_are_changed_by_who_knows_their_version(store: &impl Store) {
    let b = put(store, "b", "{\"n\":1}", None, 1).await;
    let a = put(store, "a", "{\"n\":2}", None, 2).await;
    let at = |second| operation("", "", second).at;
    let stamp = |second: u64| Stamp { at: at(second), by: format!("ops-{second}") };
    assert_eq!((&b.created, &b.changed), (&stamp(1), &stamp(1)));
    assert_eq!(open_subscribers(store).await, [a.clone(), b.clone()], "in the order of names");

    let name: SubscriberName = "b".into();
    let wrong = [None, Some(b.version + 1), Some(0)];
    for expected in wrong {
        let change = operation("change_subscriber", "b", 3);
        let put = store.put_subscriber(&name, Secret::new("{}"), expected, change).await;
        assert_eq!(put, Ok(Put::Differs(Some(b.version))), "{expected:?}");
    }
    let change = operation("delete_subscriber", "b", 3);
    let deleted = store.delete_subscriber(&name, b.version + 1, false, change.clone()).await;
    assert_eq!(deleted, Ok(Deleted::Differs(Some(b.version))));
    let none = store.delete_subscriber(&"c".into(), 1, false, change.clone()).await;
    assert_eq!(none, Ok(Deleted::Differs(None)));
    let none = store.put_subscriber(&"c".into(), Secret::new("{}"), Some(1), change).await;
    assert_eq!(none, Ok(Put::Differs(None)));
    assert_eq!(open_subscribers(store).await, [a.clone(), b.clone()], "nothing has changed");

    // In the same second as the change before.
    let changed = put(store, "b", "{\"n\":3}", Some(b.version), 1).await;
    assert!(changed.version > b.version);
    assert_eq!((&changed.created, &changed.changed), (&stamp(1), &stamp(1)));
    let again = put(store, "b", "{\"n\":4}", Some(changed.version), 5).await;
    assert_eq!((&again.created, &again.changed), (&stamp(1), &stamp(5)));
    let change = operation("delete_subscriber", "b", 1);
    let (wrong, none) = (again.version + 1, BTreeSet::new());
    let refused = store.delete_subscriber(&name, wrong, true, change.clone()).await;
    assert_eq!(refused, Ok(Deleted::Differs(Some(again.version))));
    assert_eq!(store.dropping().await, Ok(none.clone()));
    let deleted = store.delete_subscriber(&name, again.version, true, change.clone()).await;
    assert_eq!(deleted, Ok(Deleted::Yes));
    assert_eq!(open_subscribers(store).await, std::slice::from_ref(&a));
    // Its queues are to be deleted until they are; so are those of one that the store has lost.
    assert_eq!(store.dropping().await, Ok([name.clone()].into()));
    store.dropped(&name).await.expect("records");
    assert_eq!(store.dropping().await, Ok(none.clone()));
    for (drops, expected) in [(true, [name.clone()].into()), (false, none)] {
        let lost = store.delete_subscriber(&name, again.version, drops, change.clone()).await;
        assert_eq!(lost, Ok(Deleted::Differs(None)));
        assert_eq!(store.dropping().await, Ok(expected), "{drops}");
    }
    let anew = put(store, "b", "{\"n\":5}", None, 1).await;
    assert!(anew.version > again.version + 1, "the deletion has a version too");
    assert_eq!(anew.created, stamp(1), "it is another one");
    assert_eq!(open_subscribers(store).await, [a, anew]);

    // What was not done is not recorded.
    let operations = store.operations(None, 100).await.expect("lists").rows;
    let whats: Vec<_> = operations.iter().rev().map(|o| (o.new.what, &*o.new.by)).collect();
    let put = |second| ("add_subscriber", second);
    let deleted = ("delete_subscriber", "ops-1");
    assert_eq!(
        whats,
        [put("ops-1"), put("ops-2"), put("ops-1"), put("ops-5"), deleted, put("ops-1")]
    );
}

//! A resend: the body of a delivery is made again from the rows of history, and compared.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use bytes::Bytes;
use sha2::{Digest as _, Sha256};

use super::replay::as_sent;
use crate::{
    clock,
    delivery::{AttemptLog, Batch, Print},
    store::{
        Delivery, DeliveryState, EventFilter, EventNumber, EventRow, MAX_ROWS, Store, StoreError,
    },
};

/// The longest time of the search for a delivery's events. There is no index of prints.
const SEARCH_TIME: Duration = Duration::from_secs(5);

/// The time of one part of the search.
const PART_TIME: Duration = Duration::from_millis(500);

/// History may see an event for the first time this long after the event was sent.
const LATE: Duration = Duration::from_secs(60);

/// Why a delivery is not sent again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NotResent {
    Store(StoreError),
    /// It still waits for an attempt, or its halves do.
    StillUnderWay(&'static str),
    /// Its bytes cannot be made again, for this reason.
    NotTheSame(String),
}

impl From<StoreError> for NotResent {
    fn from(e: StoreError) -> Self {
        Self::Store(e)
    }
}

/// The batch of a delivery, with the same id and the same bytes. `event_ids`: whether the
/// subscriber's events get their ids today.
///
/// # Errors
/// It is not finished; or what history has makes other bytes; or the store cannot be read.
pub async fn rebuild<S: Store>(
    store: &S,
    delivery: &Delivery,
    event_ids: bool,
) -> Result<Batch, NotResent> {
    match delivery.state {
        DeliveryState::InFlight | DeliveryState::Retrying { .. } | DeliveryState::Paused => {
            return Err(NotResent::StillUnderWay("it waits for an attempt, or for its answer"));
        }
        DeliveryState::Split => return Err(NotResent::StillUnderWay("it was split into halves")),
        DeliveryState::Delivered { .. }
        | DeliveryState::Dead { .. }
        | DeliveryState::Interrupted => {}
    }
    let not_the_same = |why: &str| NotResent::NotTheSame(why.to_owned());
    let contents = &delivery.contents;
    let prints = contents.prints.as_ref().ok_or_else(|| {
        not_the_same("history does not know its events: they are too many for their prints")
    })?;
    let (format, sha256) = contents
        .format
        .zip(contents.sha256)
        .ok_or_else(|| not_the_same("history does not know its bytes: it had no attempt"))?;
    let rows = find(store, delivery, prints, clock::instant() + SEARCH_TIME).await?;
    // What was configured when it was sent is not known; the digest decides.
    for event_ids in [event_ids, !event_ids] {
        let bodies: Vec<Bytes> =
            prints.iter().filter_map(|p| sent(rows.get(p)?, event_ids)).collect();
        if bodies.len() < prints.len() {
            break;
        }
        let bytes = bodies.iter().map(Bytes::len).sum();
        let body = format.splice(bodies.iter().map(|body| &body[..]), bytes);
        if <[u8; 32]>::from(Sha256::digest(&body)) == sha256 {
            return Ok(Batch {
                id: delivery.id.clone(),
                body: body.into(),
                format,
                events: contents.events,
                attempts: 0,
                first_attempt_at: None,
                traceparent: None,
                attempt_log: AttemptLog::default(),
                prints: contents.prints.clone(),
                replay: true,
            });
        }
    }
    let found = prints.iter().filter(|print| rows.contains_key(print)).count();
    Err(NotResent::NotTheSame(match prints.len() - found {
        0 if rows.values().any(|row| row.body.is_none()) => {
            "history keeps fields alone, not the bytes of events".to_owned()
        }
        0 => "its events make other bytes than those that were sent".to_owned(),
        missing => format!(
            "history has {found} of its {} events: {missing} were removed, or not found in {} s",
            prints.len(),
            SEARCH_TIME.as_secs()
        ),
    }))
}

fn sent(row: &EventRow, event_ids: bool) -> Option<Bytes> {
    let id = row.message_id.as_deref().filter(|_| event_ids);
    Some(as_sent(row.body.as_ref()?, id))
}

/// The rows with these prints, back from the begin of the delivery.
async fn find<S: Store>(
    store: &S,
    delivery: &Delivery,
    prints: &[Print],
    deadline: Instant,
) -> Result<HashMap<Print, EventRow>, StoreError> {
    let wanted: std::collections::HashSet<&Print> = prints.iter().collect();
    let filter =
        EventFilter { until: delivery.begun_at.checked_add(LATE), ..EventFilter::default() };
    let (mut found, mut before) = (HashMap::new(), None);
    while found.len() < wanted.len() && clock::instant() < deadline {
        let page = store.events(&filter, before, MAX_ROWS, PART_TIME).await?;
        for row in page.rows {
            let print = Print::from_sha256(&row.sha256);
            if wanted.contains(&print) {
                found.entry(print).or_insert(row);
            }
        }
        let Some(next) = page.next else { break };
        before = Some(EventNumber(next));
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;
    use crate::{
        event::payload::Format,
        store::{Change, Contents, DeliveryChange, NewRow, fake::FakeStore},
    };

    const EVENTS: [&str; 3] =
        [r#"{"event":"user.a","n":1}"#, "{ \"event\":\n\"user.b\" }", r#"{"event":"user.c"}"#];

    fn new(body: &str, n: usize) -> NewRow {
        NewRow {
            number: None,
            at: SystemTime::UNIX_EPOCH,
            event_type: "user.a".to_owned(),
            message_id: Some(format!("id-{n}")),
            body: body.to_owned().into(),
            redelivered: false,
        }
    }

    /// A delivery of three events, and the body that was sent.
    async fn sent(store: &FakeStore, format: Format, event_ids: bool) -> (Delivery, Vec<u8>) {
        let rows: Vec<NewRow> = EVENTS.iter().zip(1..).map(|(body, n)| new(body, n)).collect();
        let bodies: Vec<Bytes> = rows
            .iter()
            .map(|row| as_sent(&row.body, row.message_id.as_deref().filter(|_| event_ids)))
            .collect();
        store.append(rows).await.expect("appends");
        let body = format.splice(bodies.iter().map(|b| &b[..]), 0);
        let contents = Contents {
            format: Some(format),
            events: 3,
            bytes: body.len() as u64,
            sha256: Some(Sha256::digest(&body).into()),
            prints: Some(EVENTS.iter().map(|e| Print::of(e.as_bytes())).collect()),
            replay: false,
            parent: None,
        };
        let change = |change| DeliveryChange {
            id: "msg_1".into(),
            subscriber: "a".into(),
            at: SystemTime::UNIX_EPOCH,
            change,
        };
        let started = Change::Started { attempt: 1, contents, by: "me".to_owned() };
        store.record(vec![change(started), change(Change::Delivered)]).await.expect("records");
        let delivery = store.delivery("msg_1").await.expect("reads").expect("is there");
        (delivery, body)
    }

    #[tokio::test]
    async fn a_rebuilt_batch_has_the_id_and_the_bytes_that_were_sent() {
        for (format, event_ids) in [(Format::Json, false), (Format::JsonLines, true)] {
            let store = FakeStore::default();
            let (delivery, body) = sent(&store, format, event_ids).await;
            store.append(vec![new("{}", 9); 2000]).await.expect("appends");
            for today in [true, false] {
                let batch = rebuild(&store, &delivery, today).await.expect("rebuilds");
                assert_eq!((batch.id.as_str(), &batch.body[..]), ("msg_1", &body[..]));
                assert!(batch.replay && batch.attempts == 0 && batch.events == 3);
            }
        }
    }

    #[tokio::test]
    async fn what_is_missing_or_other_bytes_are_said() {
        let store = FakeStore::default();
        let (delivery, _) = sent(&store, Format::Json, false).await;
        let why = async |delivery: &Delivery| match rebuild(&store, delivery, false).await {
            Err(NotResent::NotTheSame(why)) => why,
            other => panic!("{other:?}"),
        };
        let mut changed = delivery.clone();
        changed.contents.sha256 = Some([0; 32]);
        assert!(why(&changed).await.contains("other bytes"));
        changed.contents.prints = None;
        assert!(why(&changed).await.contains("does not know its events"));
        store.memory().events[0].body = None;
        assert!(why(&delivery).await.contains("fields alone"));
        store.memory().events.remove(1);
        assert!(why(&delivery).await.contains("has 2 of its 3 events: 1 were removed"));
        let waits = Delivery { state: DeliveryState::Paused, ..delivery };
        let waits = rebuild(&store, &waits, false).await;
        assert!(matches!(waits, Err(NotResent::StillUnderWay(_))), "{waits:?}");
    }
}

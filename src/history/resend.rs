//! A resend: the body of a delivery is made again from the rows of history, and compared.

use std::{
    collections::{HashMap, HashSet},
    time::{Duration, Instant},
};

use bytes::Bytes;
use sha2::{Digest as _, Sha256};

use super::replay::as_sent;
use crate::{
    clock,
    config::Subscriber,
    delivery::{AttemptLog, Batch, BatchId, Print, Reason},
    event::{
        Tenant,
        entry::{self, Entry, Metadata},
        payload::Format,
        redaction::Redaction,
    },
    store::{
        Delivery, DeliveryState, EventFilter, EventNumber, EventRow, Gap, MAX_ROWS, Store,
        StoreError,
    },
};

/// The longest time of the search for a delivery's events. There is no index of prints.
const SEARCH_TIME: Duration = Duration::from_secs(5);

/// The time of one part of the search.
const PART_TIME: Duration = Duration::from_millis(500);

/// History may see an event for the first time this long after the event was sent.
const LATE: Duration = Duration::from_secs(60);

/// The most rows that are kept of a search, and the most bytes of bodies that are hashed in it.
const MAX_CANDIDATES: usize = 10_000;
const MAX_HASHED: usize = 64 << 20;

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

/// The batch of a delivery, with the same id and the same bytes, for its subscriber as that is today:
/// of events of another tenant nothing is sent to it, whatever it had once.
///
/// # Errors
/// It is not finished; or what history has makes other bytes; or the store cannot be read.
pub async fn rebuild<S: Store>(
    store: &S,
    delivery: &Delivery,
    subscriber: &Subscriber,
) -> Result<Batch, NotResent> {
    match delivery.state {
        // It may have ended; a receiver that remembers ids takes it once in any case.
        DeliveryState::InFlight | DeliveryState::Retrying { .. }
            if delivery.doubt(clock::now()).is_some() => {}
        DeliveryState::InFlight | DeliveryState::Retrying { .. } | DeliveryState::Paused => {
            return Err(NotResent::StillUnderWay("it waits for an attempt, or for its answer"));
        }
        DeliveryState::Split => return Err(NotResent::StillUnderWay("it was split into halves")),
        DeliveryState::Delivered { .. }
        | DeliveryState::Dead { .. }
        | DeliveryState::Interrupted => {}
    }
    let contents = &delivery.contents;
    let Some(prints) = contents.prints.as_ref() else {
        let why = "history does not know its events: they are too many for their prints";
        return Err(NotResent::NotTheSame(why.to_owned()));
    };
    let Some((format, sha256)) = contents.format.zip(contents.sha256) else {
        return Err(NotResent::NotTheSame(unseen(store, delivery).await?));
    };
    let mut hunt = Hunt::new(delivery, prints, format, sha256, subscriber);
    let body = hunt.search(store, delivery, clock::instant() + SEARCH_TIME).await?;
    Ok(Batch {
        id: delivery.id.clone(),
        body: body.ok_or_else(|| NotResent::NotTheSame(hunt.why_not()))?.into(),
        format,
        events: contents.events,
        attempts: 0,
        first_attempt_at: None,
        traceparent: None,
        attempt_log: AttemptLog::default(),
        prints: contents.prints.clone(),
        replay: true,
    })
}

/// The events of a delivery's batch in their order, at most `most`; `None` of one that was removed, or
/// not found within `time`. Equal events have one print, and are not told apart: the latest of them
/// stand for those of the batch. No event at all if history does not know the prints.
///
/// # Errors
/// The store cannot be read.
pub async fn events_of<S: Store>(
    store: &S,
    delivery: &Delivery,
    most: usize,
    time: Duration,
) -> Result<Vec<Option<EventRow>>, StoreError> {
    let deadline = clock::instant() + time;
    let prints = delivery.contents.prints.as_deref().unwrap_or_default();
    let prints = &prints[..prints.len().min(most)];
    // Those of the batch that are not found yet, the last of equal ones last.
    let mut lacking: HashMap<&Print, Vec<usize>> = HashMap::new();
    for (n, print) in prints.iter().enumerate() {
        lacking.entry(print).or_default().push(n);
    }
    let mut found = vec![None; prints.len()];
    let mut left = prints.len();
    let until = delivery.begun_at.checked_add(LATE);
    let filter = EventFilter { until, ..EventFilter::default() };
    let mut before = None;
    while left > 0 {
        let rest = deadline.saturating_duration_since(clock::instant());
        let page = store.events(&filter, before, MAX_ROWS, rest).await?;
        for row in page.rows {
            let print = Print::from_sha256(&row.sha256);
            if let Some(n) = lacking.get_mut(&print).and_then(Vec::pop) {
                found[n] = Some(row);
                left -= 1;
            }
        }
        match page.next {
            Some(next) if clock::instant() < deadline => before = Some(EventNumber(next)),
            _ => break,
        }
    }
    Ok(found)
}

/// Why history does not know the bytes of a delivery.
async fn unseen<S: Store>(store: &S, delivery: &Delivery) -> Result<String, StoreError> {
    if delivery.contents.format.is_none() {
        return Ok("it never became a batch: one event was given up alone".to_owned());
    }
    let time = clock::rfc3339_seconds;
    let had_attempts = matches!(
        delivery.state,
        DeliveryState::Delivered { .. }
            | DeliveryState::Dead { reason: Reason::Exhausted | Reason::Refused }
    );
    let either = if had_attempts { "they" } else { "it had none, or they" };
    let reach = store.reach().await?;
    let is_before = |gap: &&Gap| gap.what == "deliveries" && gap.from <= delivery.begun_at;
    let lacks = match (reach.gaps.iter().rfind(is_before), reach.deliveries_from) {
        (Some(gap), _) => {
            format!("lacks deliveries from {} to {} ({})", time(gap.from), time(gap.until), gap.why)
        }
        (None, Some(from)) => format!("has deliveries from {} on ({})", time(from), reach.why),
        (None, None) => format!("has no deliveries yet ({})", reach.why),
    };
    Ok(format!(
        "history has none of its attempts, so that its bytes are not known. Either {either} were made before: history {lacks}; \
         or by another daemon, whose store has them"
    ))
}

/// The search for the events of a delivery. There is no index of prints.
struct Hunt<'p> {
    prints: &'p [Print],
    format: Format,
    metadata: &'p Metadata,
    /// The id of the batch in which the events were sent first, and for a part of it how many may
    /// have been before it there.
    whole: BatchId,
    before: Vec<usize>,
    sha256: [u8; 32],
    event_ids: bool,
    redaction: &'p Redaction,
    /// Of this tenant's events alone.
    tenant: Option<Tenant>,
    /// The rows with these prints, the latest first.
    rows: Vec<EventRow>,
    /// The latest row of each print.
    found: HashMap<Print, usize>,
    /// The first of the rows at which no run was tried.
    untried: usize,
    /// Bytes that may still be hashed.
    budget: usize,
}

impl<'p> Hunt<'p> {
    fn new(
        delivery: &Delivery,
        prints: &'p [Print],
        format: Format,
        sha256: [u8; 32],
        subscriber: &'p Subscriber,
    ) -> Self {
        let parents = std::iter::successors(Some(delivery.id.clone()), BatchId::parent);
        Self {
            prints,
            format,
            metadata: &subscriber.metadata,
            whole: parents.last().unwrap_or_else(|| delivery.id.clone()),
            before: if entry::has_identity(format) {
                delivery.id.places(prints.len())
            } else {
                vec![0]
            },
            sha256,
            event_ids: subscriber.event_ids,
            redaction: &subscriber.redaction,
            tenant: subscriber.tenant.clone(),
            rows: Vec::new(),
            found: HashMap::new(),
            untried: 0,
            budget: MAX_HASHED,
        }
    }

    /// Goes back from the begin of the delivery until the body is found, or cannot be.
    async fn search<S: Store>(
        &mut self,
        store: &S,
        delivery: &Delivery,
        deadline: Instant,
    ) -> Result<Option<Vec<u8>>, StoreError> {
        let wanted: HashSet<&Print> = self.prints.iter().collect();
        let until = delivery.begun_at.checked_add(LATE);
        let filter = EventFilter { until, tenant: self.tenant.clone(), ..EventFilter::default() };
        let mut before = None;
        loop {
            let was_complete = self.found.len() == wanted.len();
            let page = store.events(&filter, before, MAX_ROWS, PART_TIME).await?;
            for row in page.rows {
                let print = Print::from_sha256(&row.sha256);
                if wanted.contains(&print) {
                    self.found.entry(print).or_insert(self.rows.len());
                    self.rows.push(row);
                }
            }
            if self.found.len() == wanted.len() {
                let latest = if was_complete { None } else { self.of_latest() };
                if let Some(body) = latest.or_else(|| self.of_runs()) {
                    return Ok(Some(body));
                }
                if !self.depends_on_ids() {
                    return Ok(None);
                }
            }
            let is_enough = self.budget == 0 || self.rows.len() > MAX_CANDIDATES;
            let Some(next) = page.next.filter(|_| !is_enough && clock::instant() < deadline) else {
                return Ok(None);
            };
            before = Some(EventNumber(next));
        }
    }

    /// The body, made of the latest row of each print, with and without ids: what was configured
    /// when it was sent is not known, and the digest decides.
    fn of_latest(&mut self) -> Option<Vec<u8>> {
        let latest = |print: &Print| self.rows.get(*self.found.get(print)?);
        let rows: Vec<EventRow> = self.prints.iter().filter_map(latest).cloned().collect();
        [self.event_ids, !self.event_ids]
            .into_iter()
            .find_map(|event_ids| self.body(rows.iter(), event_ids))
    }

    /// The body, made of rows in a run. Equal events have different ids, which are in the body: a
    /// batch is a run of the events that its subscriber gets.
    fn of_runs(&mut self) -> Option<Vec<u8>> {
        let length = self.prints.len();
        while self.untried + length <= self.rows.len() {
            let run = &self.rows[self.untried..self.untried + length];
            self.untried += 1;
            let is_run = run
                .iter()
                .rev()
                .zip(self.prints)
                .all(|(row, p)| Print::from_sha256(&row.sha256) == *p);
            if !is_run {
                continue;
            }
            // Only of entries that have ids besides the field are there more than those with it.
            let alone = entry::has_identity(self.format).then_some(false);
            for event_ids in std::iter::once(true).chain(alone) {
                let bytes: usize =
                    run.iter().filter_map(|row| row.body.as_ref()).map(Bytes::len).sum();
                self.budget = self.budget.saturating_sub(bytes * self.before.len());
                if let Some(body) = self.body(run.iter().rev(), event_ids) {
                    return Some(body);
                }
                if self.budget == 0 {
                    return None;
                }
            }
        }
        None
    }

    /// The body that was sent; `None` if bytes are missing, or others were sent.
    fn body<'r>(
        &self,
        rows: impl Iterator<Item = &'r EventRow>,
        event_ids: bool,
    ) -> Option<Vec<u8>> {
        let part = |row: &'r EventRow| {
            let body = sent(row, event_ids, self.redaction)?;
            let id = row.message_id.as_deref();
            let entry = entry::of(self.format, self.metadata, &body, id).ok()?;
            Some((body, entry))
        };
        let parts = rows.map(part).collect::<Option<Vec<(Bytes, Option<Entry>)>>>()?;
        let length = |(body, entry): &(Bytes, Option<Entry>)| {
            entry.as_ref().map_or(body.len(), Entry::max_len)
        };
        let bytes = parts.iter().map(length).sum();
        let events = parts.iter().map(|(body, entry)| (&body[..], entry.as_ref()));
        let of_part = |before: &usize| {
            entry::body(self.format, (self.whole.as_str(), *before), events.clone(), bytes)
        };
        let is_it = |body: &Vec<u8>| <[u8; 32]>::from(Sha256::digest(body)) == self.sha256;
        self.before.iter().map(of_part).find(is_it)
    }

    /// Whether other rows with the same prints can make another body.
    fn depends_on_ids(&self) -> bool {
        self.found.values().any(|row| {
            let row = &self.rows[*row];
            let as_sent = |event_ids| sent(row, event_ids, self.redaction);
            let has_id = entry::has_identity(self.format) || as_sent(true) != as_sent(false);
            row.body.is_some() && has_id
        })
    }

    /// Why there is no body.
    fn why_not(&self) -> String {
        let found = self.prints.iter().filter(|print| self.found.contains_key(print)).count();
        match self.prints.len() - found {
            0 if self.rows.iter().any(|row| row.body.is_none()) => {
                "history keeps fields alone, not the bytes of events".to_owned()
            }
            0 => "its events make other bytes than those that were sent".to_owned(),
            missing => format!(
                "history has {found} of its {} events: {missing} were removed, or not found in {} s{}",
                self.prints.len(),
                SEARCH_TIME.as_secs(),
                if self.tenant.is_some() { ", or are not of the subscriber's tenant" } else { "" }
            ),
        }
    }
}

fn sent(row: &EventRow, event_ids: bool, redaction: &Redaction) -> Option<Bytes> {
    let id = row.message_id.as_deref().filter(|_| event_ids);
    as_sent(row.body.as_ref()?, id, redaction)
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;
    use crate::{
        config::testing,
        store::{Change, Contents, DeliveryChange, NewRow, fake::FakeStore},
    };

    fn today(event_ids: bool) -> Subscriber {
        Subscriber { event_ids, ..testing::subscriber("a", "") }
    }

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
            tenant: None,
        }
    }

    /// A delivery of three events, and the body that was sent.
    async fn sent(store: &FakeStore, format: Format, event_ids: bool) -> (Delivery, Vec<u8>) {
        let rows: Vec<NewRow> = EVENTS.iter().zip(1..).map(|(body, n)| new(body, n)).collect();
        let bodies: Vec<Bytes> = rows
            .iter()
            .map(|row| {
                let id = row.message_id.as_deref().filter(|_| event_ids);
                as_sent(&row.body, id, &Redaction::default()).expect("an event")
            })
            .collect();
        store.append(rows).await.expect("appends");
        let body = format.splice(bodies.iter().map(|b| &b[..]), 0);
        let prints = EVENTS.iter().map(|e| Print::of(e.as_bytes())).collect();
        (delivery(store, format, &body, prints).await, body)
    }

    /// A delivery of a body with these events.
    async fn delivery(
        store: &FakeStore,
        format: Format,
        body: &[u8],
        prints: Vec<Print>,
    ) -> Delivery {
        let contents = Contents {
            format: Some(format),
            events: u32::try_from(prints.len()).expect("a few"),
            bytes: body.len() as u64,
            sha256: Some(Sha256::digest(body).into()),
            prints: Some(prints.into()),
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
        store.delivery("msg_1").await.expect("reads").expect("is there")
    }

    #[tokio::test]
    async fn a_part_whose_entries_have_their_places_is_rebuilt_wherever_it_was_in_the_whole() {
        let format = Format::CloudEventsBatch;
        let metadata = Metadata { source: Some("/a".to_owned()), ..Metadata::default() };
        let subscriber = Subscriber { metadata: metadata.clone(), ..today(false) };
        for with_ids in [true, false] {
            let bodies: Vec<String> =
                (0..7).map(|n| format!(r#"{{"event":"a","n":{n}}}"#)).collect();
            let rows: Vec<NewRow> = bodies.iter().zip(0..).map(|(body, n)| new(body, n)).collect();
            let without = |row: &NewRow| NewRow { message_id: None, ..row.clone() };
            let rows = if with_ids { rows } else { rows.iter().map(without).collect() };
            let entry_of = |row: &NewRow| {
                entry::of(format, &metadata, &row.body, row.message_id.as_deref()).expect("has one")
            };
            let entries: Vec<Option<Entry>> = rows.iter().map(entry_of).collect();
            let both = rows.iter().zip(&entries).map(|(row, e)| (&row.body[..], e.as_ref()));
            let whole = Batch {
                id: BatchId::from("msg_0123"),
                body: entry::body(format, ("msg_0123", 0), both, 0).into(),
                format,
                events: 7,
                attempts: 1,
                first_attempt_at: None,
                traceparent: None,
                attempt_log: AttemptLog::default(),
                prints: Some(bodies.iter().map(|body| Print::of(body.as_bytes())).collect()),
                replay: false,
            };
            let mut parts = vec![whole];
            while let Some(part) = parts.pop() {
                let store = FakeStore::default();
                store.append(rows.clone()).await.expect("appends");
                let prints = part.prints.as_ref().expect("prints").to_vec();
                let known = delivery(&store, format, &part.body, prints).await;
                let known = Delivery { id: part.id.clone(), ..known };
                let again = rebuild(&store, &known, &subscriber).await.expect("rebuilds");
                assert_eq!((again.id, again.body), (part.id.clone(), part.body.clone()));
                parts.extend(part.halves().into_iter().flatten());
            }
        }
    }

    #[tokio::test]
    async fn a_rebuilt_batch_has_the_id_and_the_bytes_that_were_sent() {
        for (format, event_ids) in
            [(Format::Json, false), (Format::JsonLines, true), (Format::JsonArray, false)]
        {
            let store = FakeStore::default();
            let (delivery, body) = sent(&store, format, event_ids).await;
            store.append(vec![new("{}", 9); 2000]).await.expect("appends");
            for today in [true, false] {
                let batch =
                    rebuild(&store, &delivery, &self::today(today)).await.expect("rebuilds");
                assert_eq!((batch.id.as_str(), &batch.body[..]), ("msg_1", &body[..]));
                assert!(batch.replay && batch.attempts == 0 && batch.events == 3);
            }
        }
    }

    #[tokio::test]
    async fn a_batch_of_another_tenants_events_is_not_rebuilt_though_its_own_have_the_same_bytes() {
        let store = FakeStore::default();
        let tenant = |name: &str| Tenant::try_new(name);
        let body = r#"{"event":"user.a"}"#;
        let of = |name: &str, n| NewRow { tenant: tenant(name), ..new(body, n) };
        store.append(vec![of("A", 1)]).await.expect("appends");
        let sent = Format::Json.splice([body.as_bytes()].into_iter(), 0);
        let prints = vec![Print::of(body.as_bytes())];
        let delivery = delivery(&store, Format::Json, &sent, prints).await;
        let with = |name: &str| Subscriber { tenant: tenant(name), ..today(false) };
        for (name, is_its) in [("A", true), ("B", false), ("", true)] {
            let rebuilt = rebuild(&store, &delivery, &with(name)).await;
            assert_eq!(rebuilt.is_ok(), is_its, "{name}: {rebuilt:?}");
        }
        store.append(vec![of("B", 2)]).await.expect("appends");
        let rebuilt = rebuild(&store, &delivery, &with("B")).await.expect("of its own event");
        assert_eq!(rebuilt.body, sent);
    }

    #[tokio::test]
    async fn the_events_of_a_batch_are_found_in_its_order_and_those_that_history_lacks_are_not() {
        let store = FakeStore::default();
        let (delivery, _) = sent(&store, Format::Json, false).await;
        store.append(vec![new("{}", 9); 2000]).await.expect("appends");
        let found = async |delivery: &Delivery, most| {
            let rows = events_of(&store, delivery, most, Duration::from_secs(5)).await;
            let numbers = rows.expect("reads").into_iter().map(|row| row.map(|row| row.number.0));
            numbers.collect::<Vec<_>>()
        };
        assert_eq!(found(&delivery, 50).await, [Some(1), Some(2), Some(3)]);
        assert_eq!(found(&delivery, 2).await, [Some(1), Some(2)]);
        let (first, prints) = (EVENTS[0], delivery.contents.prints.clone().expect("known"));
        store.append(vec![new(first, 1)]).await.expect("appends");
        let twice = Some([prints[0], prints[0]].into());
        let twins = Delivery {
            contents: Contents { prints: twice, ..delivery.contents.clone() },
            ..delivery.clone()
        };
        assert_eq!(found(&twins, 50).await, [Some(1), Some(2004)], "each once");
        store.memory().events.remove(1);
        assert_eq!(found(&delivery, 50).await[1..], [None, Some(3)]);
        let mut unknown = delivery;
        unknown.contents.prints = None;
        assert_eq!(found(&unknown, 50).await, []);
    }

    #[tokio::test]
    async fn equal_events_with_ids_of_their_own_are_told_apart_by_the_bytes_that_were_sent() {
        let twin = r#"{"event":"user.twin"}"#;
        let other = r#"{"event":"user.a"}"#;
        // Rows 1 to 8; the batch had rows 3 to 5.
        let bodies = [twin, other, twin, twin, other, twin, twin, other];
        for of in [2..5, 2..3, 3..4, 6..7, 0..2] {
            let store = FakeStore::default();
            let rows: Vec<NewRow> = bodies.iter().zip(1..).map(|(b, n)| new(b, n)).collect();
            let sent: Vec<Bytes> = rows[of.clone()]
                .iter()
                .filter_map(|row| {
                    as_sent(&row.body, row.message_id.as_deref(), &Redaction::default())
                })
                .collect();
            let prints: Vec<Print> =
                bodies[of.clone()].iter().map(|b| Print::of(b.as_bytes())).collect();
            store.append(rows).await.expect("appends");
            let body = Format::Json.splice(sent.iter().map(|b| &b[..]), 0);
            let delivery = delivery(&store, Format::Json, &body, prints).await;
            let batch = rebuild(&store, &delivery, &today(true)).await;
            let batch = batch.unwrap_or_else(|e| panic!("{of:?}: {e:?}"));
            assert_eq!(batch.body, body, "{of:?}");
        }
    }

    #[tokio::test]
    async fn attempts_that_history_has_not_seen_are_not_said_to_be_none() {
        let store = FakeStore::default();
        let contents = |format| Contents {
            format,
            events: 1,
            bytes: 7,
            sha256: None,
            prints: Some([Print::of(b"{}")].into()),
            replay: false,
            parent: None,
        };
        let why = async |reason, format| {
            let change = Change::Dead { reason, contents: Some(contents(format)) };
            let id = crate::delivery::BatchId::random();
            let at = SystemTime::UNIX_EPOCH + Duration::from_secs(100);
            let change = DeliveryChange { id: id.clone(), subscriber: "a".into(), at, change };
            store.record(vec![change]).await.expect("records");
            let delivery = store.delivery(id.as_str()).await.expect("reads").expect("is there");
            match rebuild(&store, &delivery, &today(false)).await {
                Err(NotResent::NotTheSame(why)) => why,
                other => panic!("{other:?}"),
            }
        };
        let json = Some(Format::Json);
        let older = why(Reason::Exhausted, json).await;
        assert!(
            older.contains("Either they were made before: history has deliveries from 1970-01-01T00:01:40Z on (the retention)")
                && older.contains("or by another daemon"),
            "{older}"
        );
        assert!(why(Reason::TooLarge, json).await.contains("Either it had none, or they"));
        assert!(why(Reason::InvalidEvent, None).await.contains("never became a batch"));
        let gap = |what, from| Gap {
            from: SystemTime::UNIX_EPOCH + Duration::from_secs(from),
            until: SystemTime::UNIX_EPOCH + Duration::from_secs(200),
            what,
            why: "a test".to_owned(),
            missing: None,
        };
        for gap in [gap("events", 10), gap("deliveries", 101)] {
            store.add_gap(gap).await.expect("records");
            assert_eq!(why(Reason::Exhausted, json).await, older);
        }
        store.add_gap(gap("deliveries", 50)).await.expect("records");
        let lacks =
            "history lacks deliveries from 1970-01-01T00:00:50Z to 1970-01-01T00:03:20Z (a test)";
        assert!(why(Reason::Exhausted, json).await.contains(lacks));
    }

    #[tokio::test]
    async fn what_is_missing_or_other_bytes_are_said() {
        let store = FakeStore::default();
        let (delivery, _) = sent(&store, Format::Json, false).await;
        let why = async |delivery: &Delivery| match rebuild(&store, delivery, &today(false)).await {
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
        let due = |at: std::time::SystemTime| DeliveryState::Retrying { due: at };
        let waits = Delivery { state: due(clock::now()), ..delivery.clone() };
        let waits = rebuild(&store, &waits, &today(false)).await;
        assert!(matches!(waits, Err(NotResent::StillUnderWay(_))), "{waits:?}");
        let overdue = Delivery { state: due(delivery.changed_at), ..delivery.clone() };
        let overdue = rebuild(&store, &overdue, &today(false)).await;
        assert!(matches!(overdue, Err(NotResent::NotTheSame(_))), "it may be resent: {overdue:?}");
        let waits = Delivery { state: DeliveryState::Paused, ..delivery };
        let waits = rebuild(&store, &waits, &today(false)).await;
        assert!(matches!(waits, Err(NotResent::StillUnderWay(_))), "{waits:?}");
    }
}

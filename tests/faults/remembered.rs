//! What history must say when a round is over, held against what the producer and the receivers
//! know: each confirmed event once, each accepted delivery as accepted, or a gap that says so.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime},
};

use hooktrail::{
    clock,
    config::HistoryConfig,
    queue::embedded::Log,
    store::{
        Delivery, DeliveryState, EventFilter, EventLog, EventNumber, Gap, MAX_ROWS, Reach,
        Store as _, StoreError,
        sqlite::{OpenLog, SqliteConfig, SqliteStore},
    },
};
use serde_json::Value;

use crate::{
    oracle::{Disturbance, Ledger, Seen, UNACKED, accepted},
    subscribers::event,
};

/// The time that one page may take to be read.
const PAGE_TIME: Duration = Duration::from_secs(20);

/// The numbers of the events of one round, at most.
pub(crate) const NUMBERS: u64 = 1_000_000;

/// Around the request for a delivery, the time in which its attempt can have begun and its end can
/// have been recorded.
const ATTEMPT: Duration = Duration::from_secs(6);

/// The store of one daemon, as far as it is about a round.
#[derive(Debug, Default)]
pub(crate) struct Remembered {
    /// The rows of each event.
    pub(crate) rows: BTreeMap<u64, u32>,
    /// The ids of the events, as `where` takes them.
    ids: HashMap<u64, String>,
    /// Events of which a row has other bytes than were published.
    changed: Vec<u64>,
    /// The batches that receivers have accepted, as far as they are known.
    deliveries: HashMap<String, Delivery>,
    gaps: Vec<Gap>,
}

impl Remembered {
    /// Reads what a store has of the events from `first` on, and of these batches. An event of which
    /// history has no bytes counts by its id.
    pub(crate) async fn read(
        data_dir: &Path,
        is_log: bool,
        first: u64,
        batches: impl Iterator<Item = &str>,
    ) -> Result<Self, StoreError> {
        let store = SqliteStore::read_only(config(data_dir, is_log))?;
        let reach = store.reach().await?;
        let mut this = Self { gaps: reach.gaps, ..Self::default() };
        // A daemon that died before it had opened its first store has left no gap: what it did is from
        // before history began, and that is what every answer says then.
        let begun = reach.why.strip_prefix("history began on ");
        if let Some(begun) = begun.and_then(|at| humantime::parse_rfc3339(at).ok()) {
            this.gaps.push(Gap {
                from: SystemTime::UNIX_EPOCH,
                until: begun + Duration::from_secs(1), // told in whole seconds
                what: "deliveries",
                why: reach.why,
                missing: None,
            });
        }
        // A daemon whose store has no history keeps no deliveries either, until that ends: the gap is
        // extended now and then.
        for gap in this.gaps.iter_mut().filter(|gap| gap.why.contains("another store had")) {
            gap.until = SystemTime::now();
        }
        this.read_events(&store, first).await?;
        for id in batches {
            if let Some(delivery) = store.delivery(id).await? {
                this.deliveries.insert(id.to_owned(), delivery);
            }
        }
        store.close(true).await;
        Ok(this)
    }

    async fn read_events(&mut self, store: &SqliteStore, first: u64) -> Result<(), StoreError> {
        let mut before = None;
        loop {
            let all = EventFilter::default();
            let page = store.events(&all, before, MAX_ROWS, PAGE_TIME).await?;
            let mut is_older = true;
            for row in &page.rows {
                let body = row.body.as_deref().unwrap_or_default();
                let Some(n) = number(body) else { continue };
                // Rounds that share a store have numbers of their own, the later ones larger ones.
                if !(first..first + NUMBERS).contains(&n) {
                    continue;
                }
                is_older = false;
                *self.rows.entry(n).or_default() += 1;
                self.ids.insert(n, row.id());
                if body != event(n).as_bytes() {
                    self.changed.push(n);
                }
            }
            let is_read = is_older && !page.rows.is_empty();
            match page.next.filter(|_| !is_read) {
                Some(next) => before = Some(EventNumber(next)),
                None => return Ok(()),
            }
        }
    }

    /// The confirmed events that are neither here nor in a gap.
    pub(crate) fn missing(&self, ledger: &Ledger, blur: Duration) -> Vec<u64> {
        let untold = |n: &u64| {
            let (from, until) = ledger.when(*n);
            !self.rows.contains_key(n) && !is_told(&self.gaps, "events", from, until, blur)
        };
        ledger.confirmed.iter().copied().filter(untold).collect()
    }

    /// The id of an event, for `where`.
    pub(crate) fn id_of(&self, n: u64) -> Option<&str> {
        self.ids.get(&n).map(String::as_str)
    }

    fn accepts(&self, id: &str) -> bool {
        self.deliveries.get(id).is_some_and(|d| {
            let heard = |end: &Option<(Duration, hooktrail::store::AttemptEnd)>| {
                end.as_ref().is_some_and(|(_, end)| end.failure.is_none())
            };
            matches!(d.state, DeliveryState::Delivered { .. })
                || d.attempts.iter().any(|a| heard(&a.end))
        })
    }
}

/// How the store of a daemon is opened; `is_log`: the events are in the log of its embedded queue.
fn config(data_dir: &Path, is_log: bool) -> SqliteConfig {
    let queue = data_dir.to_owned();
    let open = move || -> Result<Box<dyn EventLog>, StoreError> {
        let log = Log::open(&queue).map_err(|e| StoreError::new(e.to_string()))?;
        Ok(Box::new(log))
    };
    let history = HistoryConfig {
        retention: Duration::from_secs(7 * 86_400),
        max_bytes: 2 << 30,
        bodies: true,
    };
    let log = is_log.then(|| Arc::new(open) as OpenLog);
    SqliteConfig {
        data_dir: data_dir.to_owned(),
        history,
        log,
        keys: Vec::new(),
        without_history: None,
    }
}

/// How far the history in a folder reaches, and what it lacks.
pub(crate) async fn reach(data_dir: &Path, is_log: bool) -> Result<Reach, StoreError> {
    let store = SqliteStore::read_only(config(data_dir, is_log))?;
    let reach = store.reach().await;
    store.close(true).await;
    reach
}

fn number(body: &[u8]) -> Option<u64> {
    serde_json::from_slice::<Value>(body).ok()?["n"].as_u64()
}

fn is_told(gaps: &[Gap], what: &str, from: SystemTime, until: SystemTime, blur: Duration) -> bool {
    gaps.iter().any(|g| g.what == what && g.from <= until + blur && g.until + blur >= from)
}

/// The events that may have several rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Repeats {
    No,
    /// Those without a message id: their redelivery cannot be recognised.
    WithoutId,
    /// All: a relay may have published them twice.
    All,
}

/// What is known without history.
pub(crate) struct Known<'a> {
    pub(crate) ledger: &'a Ledger,
    pub(crate) seen: &'a [Seen],
    pub(crate) disturbances: &'a [Disturbance],
    pub(crate) repeats: Repeats,
    /// How wrong the clock was by which history has its times.
    pub(crate) blur: Duration,
}

impl Known<'_> {
    /// What is wrong in the stores of the daemons, of which the first has the events.
    pub(crate) fn judge(&self, stores: &[Remembered]) -> Vec<String> {
        let mut wrong = self.judge_events(&stores[0]);
        for seen in self.seen {
            wrong.extend(self.judge_deliveries(seen, stores));
        }
        wrong
    }

    fn judge_events(&self, store: &Remembered) -> Vec<String> {
        let mut wrong = Vec::new();
        let mut complain = |what: &str, events: Vec<u64>| {
            if let Some(first) = events.first() {
                let (number, at) = (events.len(), clock::rfc3339(self.ledger.when(*first).1));
                wrong.push(format!(
                    "history: {number} events {what}: {:?}; the first was confirmed at {at}; gaps: {:?}",
                    &events[..number.min(10)], store.gaps
                ));
            }
        };
        complain(
            "are confirmed, and neither there nor in a gap",
            store.missing(self.ledger, self.blur),
        );
        let may_repeat = |n: u64| match self.repeats {
            Repeats::No => false,
            Repeats::WithoutId => n % 2 == 1,
            Repeats::All => true,
        };
        let several = store.rows.iter().filter(|(n, rows)| **rows > 1 && !may_repeat(**n));
        complain("are there several times", several.map(|(n, _)| *n).collect());
        let ledger = self.ledger;
        let published = |n: &u64| {
            [&ledger.confirmed, &ledger.unknown, &ledger.unmatched]
                .iter()
                .any(|all| all.contains(n))
        };
        let strangers = store.rows.keys().copied().filter(|n| !published(n)).collect();
        complain("were never published", strangers);
        complain("have other bytes", store.changed.clone());
        wrong
    }

    fn judge_deliveries(&self, seen: &Seen, stores: &[Remembered]) -> Vec<String> {
        let (mut unknown, mut unheard) = (Vec::new(), Vec::new());
        for request in seen.requests.iter().filter(|r| r.status < 300) {
            let (id, at) = (request.id(), request.at);
            let is_in_gap = || {
                let (from, until) = (at - ATTEMPT, at + ATTEMPT);
                stores.iter().any(|s| is_told(&s.gaps, "deliveries", from, until, self.blur))
            };
            let about = || format!("{id} at {}", clock::rfc3339(at));
            if stores.iter().any(|s| s.accepts(id)) || is_in_gap() {
                continue;
            }
            let row = stores.iter().find_map(|s| s.deliveries.get(id));
            // An answer can have been lost on its way, unless it was heard for certain.
            let disturbs = |d: &Disturbance| {
                d.whom.as_ref().is_none_or(|whom| *whom == seen.name)
                    && d.from <= at + UNACKED
                    && d.to + UNACKED >= at
            };
            match row {
                None => unknown.push(about()),
                Some(row) if seen.is_always_heard && !self.disturbances.iter().any(disturbs) => {
                    unheard.push(format!("{}: {:?}", about(), row.state));
                }
                Some(_) => {}
            }
        }
        let mut wrong = Vec::new();
        for (what, which) in [("history does not know", unknown), ("not as accepted", unheard)] {
            if !which.is_empty() {
                let (name, number) = (&seen.name, which.len());
                let gaps: Vec<&Gap> = stores.iter().flat_map(|s| &s.gaps).collect();
                wrong.push(format!(
                    "deliveries: {number} that {name} accepted, {what}: {:?}; gaps: {gaps:?}",
                    &which[..number.min(5)]
                ));
            }
        }
        wrong
    }

    /// What is wrong in an answer of `where` for an event that is in history. `is_alone`: no other
    /// daemon has delivered.
    pub(crate) fn judge_where(
        &self,
        n: u64,
        answer: &Value,
        store: &Remembered,
        is_alone: bool,
    ) -> Vec<String> {
        let mut wrong = Vec::new();
        let events = answer["events"].as_array().map(Vec::as_slice).unwrap_or_default();
        if events.is_empty() {
            wrong.push(format!("where: event {n} is in history, and is not found: {answer}"));
        }
        for went in events.iter().flat_map(|e| e["where"].as_array().into_iter().flatten()) {
            let (name, state) = (went["subscriber"].as_str(), went["state"].as_str());
            let Some(seen) = self.seen.iter().find(|s| Some(&*s.name) == name) else { continue };
            let has_it = accepted(&seen.requests).contains(&n);
            let knows_it = || {
                let with = |r: &&crate::support::receiver::Request| {
                    r.status < 300 && r.numbers().contains(&n)
                };
                seen.requests.iter().filter(with).any(|r| store.accepts(r.id()))
            };
            let is_right = match state {
                Some("delivered") => has_it,
                Some("not_matched") => !has_it,
                Some("dead") => seen.dead.contains(&n) && !(has_it && seen.is_always_heard),
                Some("unknown") => !knows_it(),
                // Nothing is under way any more; another daemon's deliveries are not known here.
                Some("retrying" | "in_flight" | "waiting" | "paused") => !is_alone && !knows_it(),
                _ => false,
            };
            if !is_right {
                let is_dead = seen.dead.contains(&n);
                wrong.push(format!(
                    "where: event {n} of {}: accepted: {has_it}, dead: {is_dead}, and it says {went}; gaps: {:?}",
                    seen.name, store.gaps
                ));
            }
        }
        let names: BTreeSet<&str> = events
            .iter()
            .flat_map(|e| e["where"].as_array().into_iter().flatten())
            .filter_map(|w| w["subscriber"].as_str())
            .collect();
        let left_out = self.seen.iter().filter(|s| !events.is_empty() && !names.contains(&*s.name));
        wrong.extend(left_out.map(|s| format!("where: event {n}: nothing of {}", s.name)));
        wrong
    }
}

#[cfg(test)]
mod tests {
    use hooktrail::{
        delivery::{BatchId, SubscriberName},
        store::{AttemptEnd, Change, Contents, DeliveryChange},
    };
    use serde_json::json;

    use super::*;
    use crate::support::receiver::Request;

    fn at(second: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000 + second)
    }

    fn request(second: u64, id: &str, n: u64) -> Request {
        let mut headers = axum::http::HeaderMap::new();
        headers.insert("webhook-id", id.parse().expect("a header"));
        let body = format!("{{\"events\":[{{\"n\":{n}}}]}}").into();
        Request { headers, body, at: at(second), status: 200, peer: ([127, 0, 0, 1], 1).into() }
    }

    fn gap(what: &'static str, from: u64, until: u64) -> Gap {
        Gap { from: at(from), until: at(until), what, why: String::new(), missing: None }
    }

    /// A delivery with these changes after its begin.
    fn delivery(id: &str, changes: &[Change]) -> (String, Delivery) {
        let contents = Contents {
            format: None,
            events: 1,
            bytes: 2,
            sha256: None,
            prints: None,
            replay: false,
            parent: None,
        };
        let of = |change: &Change| DeliveryChange {
            id: BatchId::from(id),
            subscriber: SubscriberName::try_new("a").expect("a name"),
            at: at(10),
            change: change.clone(),
        };
        let started = Change::Started { attempt: 1, contents, by: String::new() };
        let mut delivery = Delivery::begin(1, &of(&started)).expect("begins");
        changes.iter().for_each(|change| delivery.apply(&of(change)));
        (id.to_owned(), delivery)
    }

    fn ledger(confirmed: &[u64]) -> Ledger {
        let mut ledger =
            Ledger { confirmed: confirmed.iter().copied().collect(), ..Ledger::default() };
        ledger.published(1..=9, at(10), at(11));
        ledger
    }

    #[test]
    fn an_event_is_there_once_or_in_a_gap_of_its_time() {
        let ledger = ledger(&[1, 2, 3]);
        let judge = |repeats, rows: &[(u64, u32)], gaps: &[Gap]| {
            let blur = Duration::from_secs(1);
            let known = Known { ledger: &ledger, seen: &[], disturbances: &[], repeats, blur };
            let store = Remembered {
                rows: rows.iter().copied().collect(),
                gaps: gaps.to_vec(),
                ..Remembered::default()
            };
            known.judge(&[store]).len()
        };
        let all = [(1, 1), (2, 1), (3, 1)];
        assert_eq!(judge(Repeats::No, &all, &[]), 0);
        assert_eq!(judge(Repeats::No, &all[..2], &[]), 1);
        assert_eq!(judge(Repeats::No, &all[..2], &[gap("events", 9, 10)]), 0);
        assert_eq!(judge(Repeats::No, &all[..2], &[gap("events", 1, 8)]), 1);
        assert_eq!(judge(Repeats::No, &all[..2], &[gap("deliveries", 9, 10)]), 1);
        assert_eq!(judge(Repeats::No, &[(1, 1), (2, 1), (3, 1), (4, 1)], &[]), 1, "a stranger");
        for (twice, by) in [(3, [1, 0, 0]), (2, [1, 1, 0])] {
            let rows = all.map(|(n, _)| (n, if n == twice { 2 } else { 1 }));
            let judged =
                [Repeats::No, Repeats::WithoutId, Repeats::All].map(|r| judge(r, &rows, &[]));
            assert_eq!(judged, by, "{twice}");
        }
    }

    #[test]
    fn a_delivery_is_known_as_accepted_or_in_a_gap_of_its_time_or_its_answer_was_lost() {
        let ledger = ledger(&[1]);
        let judge =
            |heard, deliveries: &[(String, Delivery)], gaps: &[Gap], faults: &[Disturbance]| {
                let seen = Seen {
                    name: "a".to_owned(),
                    requests: vec![request(10, "msg_1", 1)],
                    is_always_heard: heard,
                    ..Seen::default()
                };
                let (repeats, blur) = (Repeats::No, Duration::from_secs(1));
                let known =
                    Known { ledger: &ledger, seen: &[seen], disturbances: faults, repeats, blur };
                let store = Remembered {
                    rows: [(1, 1)].into(),
                    deliveries: deliveries.iter().cloned().collect(),
                    gaps: gaps.to_vec(),
                    ..Remembered::default()
                };
                known
                    .judge(&[Remembered { rows: [(1, 1)].into(), ..Remembered::default() }, store])
                    .len()
            };
        let end = AttemptEnd { status: Some(200), failure: None, excerpt: String::new() };
        let ended = Change::Ended { attempt: 1, took: Duration::ZERO, end };
        for good in [delivery("msg_1", &[Change::Delivered]), delivery("msg_1", &[ended])] {
            assert_eq!(judge(true, &[good], &[], &[]), 0);
        }
        assert_eq!(judge(false, &[], &[], &[]), 1);
        assert_eq!(judge(false, &[], &[gap("deliveries", 12, 13)], &[]), 0);
        assert_eq!(judge(false, &[], &[gap("events", 12, 13), gap("deliveries", 20, 30)], &[]), 1);
        let lost = [delivery("msg_1", &[Change::Interrupted])];
        assert_eq!(judge(true, &lost, &[], &[]), 1);
        assert_eq!(judge(false, &lost, &[], &[]), 0);
        let kill = Disturbance { what: String::new(), whom: None, from: at(11), to: at(12) };
        assert_eq!(judge(true, &lost, &[], std::slice::from_ref(&kill)), 0);
        assert_eq!(judge(false, &[], &[], &[kill]), 1, "no fault makes history forget it silently");
    }

    #[test]
    fn where_says_delivered_of_what_the_receiver_has_and_of_nothing_else() {
        let ledger = ledger(&[1, 2, 3]);
        let seen = Seen {
            name: "a".to_owned(),
            requests: vec![request(10, "msg_1", 1), request(10, "msg_2", 2)],
            dead: BTreeSet::from([3]),
            ..Seen::default()
        };
        let (repeats, blur) = (Repeats::No, Duration::from_secs(1));
        let seen = [seen];
        let known = Known { ledger: &ledger, seen: &seen, disturbances: &[], repeats, blur };
        let store = Remembered {
            deliveries: [delivery("msg_1", &[Change::Delivered])].into(),
            ..Remembered::default()
        };
        let says = |n: u64, state: &str| {
            let answer =
                json!({ "events": [{ "where": [{ "subscriber": "a", "state": state }] }] });
            known.judge_where(n, &answer, &store, true).is_empty()
        };
        for (state, right) in [
            ("delivered", [true, true, false]),
            ("unknown", [false, true, true]),
            ("not_matched", [false, false, true]),
            ("dead", [false, false, true]),
            ("retrying", [false, false, false]),
        ] {
            assert_eq!([1, 2, 3].map(|n| says(n, state)), right, "{state}");
        }
        for nothing in [json!({ "events": [] }), json!({ "events": [{ "where": [] }] })] {
            assert!(!known.judge_where(1, &nothing, &store, true).is_empty(), "{nothing}");
        }
    }
}

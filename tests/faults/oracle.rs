//! The truth that must hold at the end: published = accepted ∪ dead letters, and each repeat has a
//! fault that explains it.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt,
    ops::RangeInclusive,
    time::{Duration, SystemTime},
};

use crate::{round::NOTICED, subscribers::tenant_of, support::receiver::Request};

/// The events of a producer, as it knows them.
#[derive(Debug, Default, Clone)]
pub(crate) struct Ledger {
    /// Confirmed: in every subscriber's queue.
    pub(crate) confirmed: BTreeSet<u64>,
    /// Handed over and not confirmed: nothing is known of them.
    pub(crate) unknown: BTreeSet<u64>,
    /// Returned or answered as unmatched, although no binding had
    /// been taken away.
    pub(crate) unmatched: BTreeSet<u64>,
    /// By subscriber: what was published while its binding was taken away, and may have passed it
    /// by.
    pub(crate) not_for: BTreeMap<String, BTreeSet<u64>>,
    /// By subscriber: the tenant whose events alone it gets.
    pub(crate) tenants: BTreeMap<String, u64>,
    /// The groups in which events were published: the first and the last, from when until when.
    pub(crate) groups: Vec<(RangeInclusive<u64>, SystemTime, SystemTime)>,
    /// What went past the broker that the others come through: one way may be faster.
    pub(crate) past_the_broker: BTreeSet<u64>,
}

impl Ledger {
    /// These events were published together.
    pub(crate) fn published(
        &mut self,
        group: RangeInclusive<u64>,
        from: SystemTime,
        to: SystemTime,
    ) {
        self.groups.push((group, from, to));
    }

    /// From when until when an event was being published.
    pub(crate) fn when(&self, n: u64) -> (SystemTime, SystemTime) {
        let group = self.groups.partition_point(|(group, ..)| *group.end() < n);
        self.groups
            .get(group)
            .map_or((SystemTime::UNIX_EPOCH, SystemTime::UNIX_EPOCH), |(_, from, to)| (*from, *to))
    }

    /// The events that a subscriber must have got.
    pub(crate) fn is_for(&self, subscriber: &str) -> impl Iterator<Item = u64> {
        let passed_by = self.not_for.get(subscriber);
        let tenant = self.tenants.get(subscriber);
        self.confirmed
            .iter()
            .copied()
            .filter(move |n| tenant.is_none_or(|tenant| *tenant == tenant_of(*n)))
            .filter(move |n| passed_by.is_none_or(|those| !those.contains(n)))
    }

    /// Whether an event is of another tenant than that of a subscriber.
    fn is_of_another(&self, subscriber: &str, n: u64) -> bool {
        self.tenants.get(subscriber).is_some_and(|tenant| *tenant != tenant_of(n))
    }
}

/// A time in which a fault was inflicted, and on whom.
#[derive(Debug, Clone)]
pub(crate) struct Disturbance {
    pub(crate) what: String,
    /// The subscriber that it was done to, unless it was done to all.
    pub(crate) whom: Option<String>,
    pub(crate) from: SystemTime,
    /// When it was over and what it did had been noticed.
    pub(crate) to: SystemTime,
}

/// The longest time before a fault in which an event can be accepted and not yet acked: behind a
/// request that takes all of its time.
pub(crate) const UNACKED: Duration = Duration::from_secs(6);

/// The times in which a broker took the consumers of a subscriber because they held a delivery for
/// longer than `patience`, by the logs of daemons.
pub(crate) fn impatience(log: &str, patience: Duration) -> Vec<Disturbance> {
    let of = |line: &str| {
        let at = humantime::parse_rfc3339(line.split_whitespace().next()?).ok()?;
        let (_, name) = line.split_once("subscriber=\"")?;
        let (name, _) = name.split_once('"')?;
        Some(Disturbance {
            what: "the broker's patience ended".to_owned(),
            whom: Some(name.to_owned()),
            from: at - patience,
            to: at + NOTICED,
        })
    };
    let lines = log.lines().filter(|line| line.contains("delivery acknowledgement on channel"));
    lines.filter_map(of).collect()
}

/// The evidence of one subscriber.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    pub(crate) name: String,
    pub(crate) requests: Vec<Request>,
    /// Events in its dead letters.
    pub(crate) dead: BTreeSet<u64>,
    /// Whether it answers each request with a success, and is heard.
    pub(crate) is_always_heard: bool,
    /// Whether no event may arrive before an older one has.
    pub(crate) in_order: bool,
    /// When a queue was deleted in which its retries wait, with all that was in it.
    pub(crate) retries_deleted: Vec<SystemTime>,
}

/// The longest that a batch waits for its time in a round, and what it takes to get there.
const LONGEST_RETRY: Duration = Duration::from_secs(8);

/// An event may come under so many ids that are new while retries cannot be written down. Without
/// end is more.
const NEW_IDS: usize = 3;

/// The name of a disturbance that keeps retries from being written.
pub(crate) const LEVEL_DELETED: &str = "a level of the ladder is deleted";

impl Seen {
    /// The events that can have been lost with a queue of the ladder that was deleted: they had
    /// failed shortly before, and were not accepted before either.
    pub(crate) fn deleted(&self) -> BTreeSet<u64> {
        let mut lost = BTreeSet::new();
        for deleted in &self.retries_deleted {
            let (mut failed, mut accepted) = (BTreeSet::new(), BTreeSet::new());
            for request in self.requests.iter().filter(|r| r.at <= *deleted) {
                if request.status < 300 {
                    accepted.extend(request.numbers());
                } else if request.at + LONGEST_RETRY >= *deleted {
                    failed.extend(request.numbers());
                }
            }
            lost.extend(failed.difference(&accepted));
        }
        lost
    }
}

/// The complaints, and the repeats that have an explanation.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Verdict {
    pub(crate) subscriber: String,
    pub(crate) accepted: usize,
    pub(crate) dead: usize,
    /// Confirmed, and nowhere.
    pub(crate) lost: Vec<u64>,
    /// Never published.
    pub(crate) strangers: Vec<u64>,
    /// Accepted again under the same id: a receiver that remembers ids sees it once.
    pub(crate) same_id: usize,
    /// Accepted again under another id, or dead as well, and a fault explains it.
    pub(crate) explained: usize,
    /// … and none does.
    pub(crate) unexplained: Vec<(u64, String)>,
    /// The events that came again because of what was done to all.
    repeated: BTreeSet<u64>,
    /// One id with two bodies.
    pub(crate) changed: Vec<String>,
    /// Deleted by the test, with the queue that they were in.
    pub(crate) deleted: usize,
    /// An attempt failed, or what was accepted came again, although nothing went wrong; or
    /// something was repeated indefinitely.
    pub(crate) needless: Vec<String>,
    /// An event was accepted for the first time after a younger one.
    pub(crate) overtaken: Vec<String>,
}

impl Verdict {
    pub(crate) fn is_good(&self) -> bool {
        self.lost.is_empty()
            && self.strangers.is_empty()
            && self.unexplained.is_empty()
            && self.changed.is_empty()
            && self.needless.is_empty()
            && self.overtaken.is_empty()
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let some = |list: &[u64]| format!("{} {:?}", list.len(), &list[..list.len().min(20)]);
        let first = |list: &[&String]| format!("{} {:#?}", list.len(), &list[..list.len().min(5)]);
        write!(f, "{}: {} accepted, {} dead, ", self.subscriber, self.accepted, self.dead)?;
        write!(
            f,
            "{} again under one id, {} under another with a fault, lost {}",
            self.same_id,
            self.explained,
            some(&self.lost)
        )?;
        if !self.is_good() {
            let unexplained: Vec<&String> = self.unexplained.iter().map(|(_, why)| why).collect();
            let (strangers, unexplained) = (some(&self.strangers), first(&unexplained));
            let changed = first(&self.changed.iter().collect::<Vec<_>>());
            let needless = first(&self.needless.iter().collect::<Vec<_>>());
            let overtaken = first(&self.overtaken.iter().collect::<Vec<_>>());
            write!(
                f,
                ", strangers {strangers}, repeats without a fault {unexplained}, bodies changed {changed}, needless {needless}, overtaken {overtaken}"
            )?;
        }
        Ok(())
    }
}

/// The numbers of a dead letter's events.
pub(crate) fn numbers_in(body: &[u8]) -> Vec<u64> {
    let values = serde_json::Deserializer::from_slice(body).into_iter::<serde_json::Value>();
    let mut numbers = Vec::new();
    for value in values {
        let value = value.unwrap_or_else(|e| {
            panic!("a dead letter of no JSON: {e}: {}", String::from_utf8_lossy(body))
        });
        let events = value["events"].as_array().cloned().unwrap_or_else(|| vec![value]);
        numbers.extend(events.iter().map(|e| e["n"].as_u64().expect("a number")));
    }
    numbers
}

pub(crate) fn accepted(requests: &[Request]) -> BTreeSet<u64> {
    requests.iter().filter(|r| r.status < 300).flat_map(Request::numbers).collect()
}

pub(crate) fn judge(ledger: &Ledger, seen: &Seen, disturbances: &[Disturbance]) -> Verdict {
    let mut verdict =
        Verdict { subscriber: seen.name.clone(), dead: seen.dead.len(), ..Verdict::default() };
    let mut bodies = HashMap::new();
    for request in &seen.requests {
        if *bodies.entry(request.id()).or_insert(&request.body) != &request.body {
            verdict.changed.push(request.id().to_owned());
        }
    }
    // All requests that an event was in, whether they were accepted, and whether it was in one of
    // them twice.
    let mut by_event: BTreeMap<u64, Vec<(&str, SystemTime, bool, bool)>> = BTreeMap::new();
    for request in &seen.requests {
        let mut copies: BTreeMap<u64, usize> = BTreeMap::new();
        for n in request.numbers() {
            *copies.entry(n).or_default() += 1;
        }
        for (n, copies) in copies {
            by_event.entry(n).or_default().push((
                request.id(),
                request.at,
                request.status < 300,
                copies > 1,
            ));
        }
    }
    let accepted: BTreeSet<u64> = accepted(&seen.requests);
    verdict.accepted = accepted.len();
    let known = |n: &u64| accepted.contains(n) || seen.dead.contains(n);
    let may_be_deleted = seen.deleted();
    let (deleted, lost): (Vec<u64>, Vec<u64>) =
        ledger.is_for(&seen.name).filter(|n| !known(n)).partition(|n| may_be_deleted.contains(n));
    (verdict.lost, verdict.deleted) = (lost, deleted.len());
    if seen.is_always_heard {
        verdict.needless = failed_attempts(&seen.requests);
    }
    if seen.in_order {
        verdict.overtaken = overtaken(ledger, &seen.requests);
    }
    let published = |n: &u64| {
        [&ledger.confirmed, &ledger.unknown, &ledger.unmatched].iter().any(|some| some.contains(n))
    };
    let is_stranger = |n: &u64| !published(n) || ledger.is_of_another(&seen.name, *n);
    verdict.strangers = by_event.keys().chain(&seen.dead).copied().filter(is_stranger).collect();
    for (n, requests) in &by_event {
        // An ack or a confirm for it can have been outstanding when something was done, whatever
        // came of the request.
        let faults = |before: SystemTime| {
            let concerns = |d: &&Disturbance| d.whom.as_ref().is_none_or(|whom| *whom == seen.name);
            let touches = move |d: &Disturbance, at: SystemTime| {
                d.from <= at + UNACKED && d.to + UNACKED >= at && d.from <= before
            };
            let touched = move |d: &&Disturbance| {
                requests.iter().any(|(_, at, ..)| *at <= before && touches(d, *at))
            };
            disturbances.iter().filter(concerns).filter(touched)
        };
        let mut explain = |before: SystemTime| {
            if faults(before).any(|d| d.whom.is_none()) {
                verdict.repeated.insert(*n);
            }
            faults(before).next().is_some()
        };
        // Whatever was answered: a batch that is tried again keeps its id, and so do the halves of
        // one that is split.
        let mut tried: BTreeSet<&str> = BTreeSet::new();
        let mut ids: BTreeSet<&str> = BTreeSet::new();
        for (id, at, accepted, twice) in requests {
            let is_known = |before: &&str| is_of(id, before);
            let is_new = !tried.iter().any(is_known);
            if is_new && (!tried.is_empty() || *twice) {
                if explain(*at) {
                    verdict.explained += usize::from(*accepted && !ids.is_empty());
                } else {
                    let at = hooktrail::clock::rfc3339(*at);
                    let twice = if *twice { ", twice" } else { "" };
                    let why = format!(
                        "event {n}, sent as {tried:?}, accepted as {ids:?}, came again as {id} at {at}{twice}"
                    );
                    verdict.unexplained.push((*n, why));
                }
            } else if *accepted && !ids.is_empty() {
                verdict.same_id += 1;
                if seen.is_always_heard && !explain(*at) {
                    verdict.needless.push(format!("event {n} was accepted as {ids:?}, and came again as {id} although that was heard"));
                }
            }
            tried.insert(id);
            if *accepted {
                ids.insert(id);
            }
        }
        for d in disturbances.iter().filter(|d| d.what == LEVEL_DELETED) {
            let mut before: Vec<&str> = Vec::new();
            let mut new = 0;
            for (id, at, ..) in requests {
                let is_new = !before.iter().any(|b| is_of(id, b));
                new += usize::from(is_new && !before.is_empty() && d.from <= *at && *at <= d.to);
                before.push(id);
            }
            if new > NEW_IDS {
                verdict
                    .needless
                    .push(format!("event {n} came under {new} new ids while {}", d.what));
            }
        }
        // Tried again after it was accepted: the answer was lost, and whatever came of it later is
        // right.
        let was_unheard = || {
            let accepted = requests.iter().position(|(.., accepted, _)| *accepted);
            accepted.is_some_and(|first| {
                requests[first + 1..].iter().any(|(id, ..)| is_of(id, requests[first].0))
            })
        };
        if !ids.is_empty() && seen.dead.contains(n) {
            if explain(SystemTime::now()) || was_unheard() {
                verdict.explained += 1;
            } else {
                verdict
                    .unexplained
                    .push((*n, format!("event {n}, accepted as {ids:?}, is dead too")));
            }
        }
    }
    verdict
}

/// The events that were accepted for the first time after a younger one, an operator's replays
/// aside. Of what was not confirmed it is not known when the queue took it.
fn overtaken(ledger: &Ledger, requests: &[Request]) -> Vec<String> {
    let (mut seen, mut newest) = (BTreeSet::new(), [None; 2]);
    let mut found = Vec::new();
    let is_first = |r: &&Request| r.status < 300 && r.header("x-hooktrail-replay").is_empty();
    for request in requests.iter().filter(is_first) {
        for n in request.numbers() {
            if !ledger.confirmed.contains(&n) || !seen.insert(n) {
                continue;
            }
            let newest = &mut newest[usize::from(ledger.past_the_broker.contains(&n))];
            if let Some(newest) = newest.filter(|newest| n < *newest) {
                let at = hooktrail::clock::rfc3339(request.at);
                found.push(format!("event {n} came after {newest}, in {} at {at}", request.id()));
            }
            *newest = (*newest).max(Some(n));
        }
    }
    found
}

/// Requests that say that an attempt before them had failed.
fn failed_attempts(requests: &[Request]) -> Vec<String> {
    let again = |r: &&Request| {
        r.header("x-hooktrail-attempt").parse::<u32>().is_ok_and(|attempt| attempt > 1)
    };
    let line = |r: &Request| {
        let (at, attempt) =
            (humantime::format_rfc3339_millis(r.at), r.header("x-hooktrail-attempt"));
        format!(
            "{} came as attempt {attempt} at {at}, and none of those before can have failed",
            r.id()
        )
    };
    requests.iter().filter(again).map(line).collect()
}

/// Events that a relay had published and not acked when a fault came are published again, and every
/// subscriber gets them twice: one that keeps up at once, one with a backlog long after the fault.
/// So a repeat at one subscriber that a fault of all explains also explains the repeat at others.
pub(crate) fn excuse_what_was_relayed_twice(verdicts: &mut [Verdict]) {
    let repeated: BTreeSet<u64> = verdicts.iter().flat_map(|v| &v.repeated).copied().collect();
    for verdict in verdicts {
        let before = verdict.unexplained.len();
        verdict.unexplained.retain(|(n, _)| !repeated.contains(n));
        verdict.explained += before - verdict.unexplained.len();
    }
}

/// Whether a batch of this id is that one, or a part of it.
fn is_of(id: &str, whole: &str) -> bool {
    id.strip_prefix(whole).is_some_and(|part| {
        part.is_empty() || part.trim_start_matches('_').bytes().all(|b| matches!(b, b'0' | b'1'))
    })
}

/// The batches that a receiver has accepted, without bodies: for runs too long to keep those.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    /// By event, how often.
    times: Vec<u8>,
    /// The latest batches.
    ids: HashMap<String, u64>,
    pub(crate) accepted: u64,
    same_id: usize,
}

impl Tally {
    pub(crate) fn take(&mut self, request: &Request) {
        let numbers = request.numbers();
        self.accepted += numbers.len() as u64;
        if self.ids.insert(request.id().to_owned(), self.accepted).is_some() {
            self.same_id += numbers.len();
        }
        if self.ids.len() > 100_000 {
            let recent = self.accepted - 1_000_000.min(self.accepted);
            self.ids.retain(|_, at| *at > recent);
        }
        for n in numbers {
            let n = usize::try_from(n).expect("small");
            if self.times.len() <= n {
                self.times.resize(n + 1, 0);
            }
            self.times[n] = self.times[n].saturating_add(1);
        }
    }

    pub(crate) fn verdict(
        &self,
        subscriber: String,
        ledger: &Ledger,
        dead: &BTreeSet<u64>,
    ) -> Verdict {
        let times =
            |n: u64| usize::try_from(n).ok().and_then(|n| self.times.get(n)).copied().unwrap_or(0);
        let again: usize = self.times.iter().map(|t| usize::from(t.saturating_sub(1))).sum();
        Verdict {
            subscriber,
            accepted: self.times.iter().filter(|t| **t > 0).count(),
            dead: dead.len(),
            lost: ledger
                .confirmed
                .iter()
                .copied()
                .filter(|n| times(*n) == 0 && !dead.contains(n))
                .collect(),
            same_id: self.same_id,
            explained: again.saturating_sub(self.same_id),
            ..Verdict::default()
        }
    }
}

#[test]
fn what_a_broker_took_back_by_its_timeout_is_known_by_the_log() {
    let log = "2026-11-29T12:52:57.299Z  WARN the lane lost its queue; it opens it again subscriber=\"busy\" error=the consumer \
        of queue `t.sub.busy` ended: PRECONDITION_FAILED - delivery acknowledgement on channel 3 timed out\n\
        2026-11-29T12:53:03.523Z  INFO the lane has its queue again subscriber=\"busy\"\n";
    let all = impatience(log, Duration::from_secs(5));
    assert_eq!(all.len(), 1, "{all:?}");
    let at = humantime::parse_rfc3339("2026-11-29T12:52:57.299Z").expect("a time");
    assert_eq!(all[0].whom.as_deref(), Some("busy"));
    assert_eq!((all[0].from, all[0].to), (at - Duration::from_secs(5), at + NOTICED));
}

#[test]
fn the_oracle_sees_what_is_lost_or_comes_again_without_a_fault() {
    let begun = SystemTime::now() - Duration::from_secs(1000);
    let request = |second: u64, id: &str, numbers: &[u64]| {
        let events: Vec<String> = numbers.iter().map(|n| format!("{{\"n\":{n}}}")).collect();
        let mut headers = axum::http::HeaderMap::new();
        headers.insert("webhook-id", id.parse().expect("a header"));
        let (body, at) = (
            format!("{{\"events\":[{}]}}", events.join(",")).into(),
            begun + Duration::from_secs(second),
        );
        Request { headers, body, at, status: 200, peer: ([127, 0, 0, 1], 1).into() }
    };
    let ledger = Ledger { confirmed: BTreeSet::from([1, 2, 3]), ..Ledger::default() };
    let kill = |from: u64, to: u64| {
        let at = |second| begun + Duration::from_secs(second);
        Disturbance { what: "kill".to_owned(), whom: None, from: at(from), to: at(to) }
    };
    let saw = |requests: &[Request], disturbances: &[Disturbance]| {
        let seen = Seen {
            name: "busy".to_owned(),
            requests: requests.to_vec(),
            dead: BTreeSet::from([3]),
            ..Seen::default()
        };
        judge(&ledger, &seen, disturbances)
    };
    assert!(saw(&[request(10, "a", &[1, 2])], &[]).is_good());
    assert_eq!(saw(&[request(10, "a", &[1])], &[]).lost, [2]);
    assert_eq!(saw(&[request(10, "a", &[1, 2, 4])], &[]).strangers, [4]);
    assert_eq!(saw(&[request(10, "a", &[1, 2]), request(11, "a", &[1])], &[]).changed, ["a"]);
    // 2 is of another tenant than 1 is, and 4 is of that of 1.
    let tenants = BTreeMap::from([("busy".to_owned(), tenant_of(1))]);
    let of_one = Ledger { confirmed: BTreeSet::from([1, 2, 4]), tenants, ..Ledger::default() };
    let of_a_tenant = |numbers: &[u64]| {
        let requests = vec![request(10, "a", numbers)];
        let seen = Seen { name: "busy".to_owned(), requests, ..Seen::default() };
        judge(&of_one, &seen, &[])
    };
    assert!(of_a_tenant(&[1, 4]).is_good());
    assert_eq!(of_a_tenant(&[1]).lost, [4]);
    assert_eq!(of_a_tenant(&[1, 2, 4]).strangers, [2]);
    // Halves of a batch, or all of it, under its id or what is made of it.
    assert!(
        saw(&[request(10, "a", &[1, 2]), request(11, "a_0", &[1]), request(12, "a", &[1, 2])], &[])
            .is_good()
    );

    let again = [request(10, "a", &[1, 2]), request(30, "b", &[2])];
    assert!(!saw(&again, &[]).is_good());
    assert!(!saw(&again, &[kill(20, 22)]).is_good(), "its ack had arrived long before");
    assert!(!saw(&again, &[kill(31, 32)]).is_good(), "it comes before the fault");
    assert!(saw(&again, &[kill(12, 13)]).is_good());
    let twice_in_one = [request(10, "a", &[1, 2, 2])];
    assert!(!saw(&twice_in_one, &[]).is_good());
    assert!(saw(&twice_in_one, &[kill(9, 10)]).is_good());
    assert!(!saw(&[request(10, "a", &[1, 2, 3])], &[]).is_good(), "accepted, and dead too");

    // Relayed twice: who is behind gets both long after the fault.
    let behind = || saw(&[request(90, "c", &[1, 2]), request(91, "d", &[2])], &[kill(12, 13)]);
    for (others, good) in [
        (saw(&again, &[kill(12, 13)]), true),
        (saw(&[request(10, "a", &[1, 2])], &[kill(12, 13)]), false),
    ] {
        let mut verdicts = [others, behind()];
        excuse_what_was_relayed_twice(&mut verdicts);
        assert_eq!(verdicts[1].is_good(), good, "{verdicts:?}");
    }
}

#[test]
fn the_oracle_sees_what_is_overtaken() {
    let request = |id: &str, status: u16, replay: bool, numbers: &[u64]| {
        let events: Vec<String> = numbers.iter().map(|n| format!("{{\"n\":{n}}}")).collect();
        let mut headers = axum::http::HeaderMap::new();
        headers.insert("webhook-id", id.parse().expect("a header"));
        if replay {
            headers.insert("x-hooktrail-replay", axum::http::HeaderValue::from_static("true"));
        }
        let body = format!("{{\"events\":[{}]}}", events.join(",")).into();
        let at = SystemTime::now();
        Request { headers, body, at, status, peer: ([127, 0, 0, 1], 1).into() }
    };
    let ledger = Ledger { confirmed: (0..10).collect(), ..Ledger::default() };
    let saw = |requests: &[Request], in_order: bool| {
        let (name, requests) = ("ordered".to_owned(), requests.to_vec());
        let dead = (0..10).collect();
        let seen = Seen { name, requests, dead, in_order, ..Seen::default() };
        judge(&ledger, &seen, &[]).overtaken.len()
    };
    let fine = [
        request("a", 200, false, &[0, 1]),
        request("b", 500, false, &[2, 3]),
        request("r", 200, true, &[9]),
        request("b", 200, false, &[2, 3]),
        request("u", 200, false, &[11]),
        request("a", 200, false, &[0, 1]),
        request("c", 200, false, &[4, 5]),
    ];
    assert_eq!(saw(&fine, true), 0);
    let passed = request("c", 200, false, &[4, 5]);
    let overtaken = [&fine[..2], &[passed], &fine[3..4]].concat();
    assert_eq!((saw(&overtaken, true), saw(&overtaken, false)), (2, 0));
    assert_eq!(saw(&[request("a", 200, false, &[1, 0])], true), 1, "within a request");
}

#[test]
fn the_oracle_sees_failed_attempts_of_receivers_that_always_answer_and_losses_next_to_a_deleted_queue()
 {
    let begun = SystemTime::now() - Duration::from_secs(1000);
    let at = |second| begun + Duration::from_secs(second);
    let request = |second: u64, id: &str, status: u16, attempt: u32, numbers: &[u64]| {
        let events: Vec<String> = numbers.iter().map(|n| format!("{{\"n\":{n}}}")).collect();
        let mut headers = axum::http::HeaderMap::new();
        headers.insert("webhook-id", id.parse().expect("a header"));
        headers.insert("x-hooktrail-attempt", attempt.into());
        let body = format!("{{\"events\":[{}]}}", events.join(",")).into();
        Request { headers, body, at: at(second), status, peer: ([127, 0, 0, 1], 1).into() }
    };
    let passed_by = BTreeMap::from([("busy".to_owned(), BTreeSet::from([3]))]);
    let ledger =
        Ledger { confirmed: BTreeSet::from([1, 2, 3]), not_for: passed_by, ..Ledger::default() };
    let saw =
        |requests: &[Request], is_always_heard, deleted: &[u64], disturbances: &[Disturbance]| {
            let retries_deleted = deleted.iter().map(|s| at(*s)).collect();
            let seen = Seen {
                name: "busy".to_owned(),
                requests: requests.to_vec(),
                is_always_heard,
                retries_deleted,
                ..Seen::default()
            };
            judge(&ledger, &seen, disturbances)
        };
    // Accepted twice under one id: its answer was lost, which of one that is heard can be only with
    // a fault.
    let twice = [request(10, "a", 200, 1, &[1, 2]), request(11, "a", 200, 1, &[1, 2])];
    assert!(saw(&twice, false, &[], &[]).is_good(), "the third passed it by");
    assert!(!saw(&twice, true, &[], &[]).is_good());
    let kill = Disturbance { what: "kill".to_owned(), whom: None, from: at(10), to: at(11) };
    assert!(saw(&twice, true, &[], std::slice::from_ref(&kill)).is_good());
    let failed = [request(10, "a", 200, 2, &[1, 2])];
    assert!(saw(&failed, false, &[], &[]).is_good());
    assert!(!saw(&failed, true, &[], &[kill]).is_good(), "no fault makes an attempt of it fail");

    // Lost with the queue that it waited in; not what had been accepted, had failed long before, or
    // was never attempted.
    let waited = [request(10, "a", 500, 1, &[1]), request(10, "b", 200, 1, &[2])];
    assert_eq!(saw(&waited, false, &[], &[]).lost, [1]);
    let verdict = saw(&waited, false, &[12], &[]);
    assert!(verdict.is_good() && verdict.deleted == 1, "{verdict}");
    for deleted in [9, 30] {
        assert_eq!(saw(&waited, false, &[deleted], &[]).lost, [1]);
    }
    assert_eq!(saw(&waited[1..], false, &[12], &[]).lost, [1]);

    // A fault explains repeats, but not indefinitely many.
    let deleted =
        Disturbance { what: LEVEL_DELETED.to_owned(), whom: None, from: at(10), to: at(40) };
    let ids = ["a", "b", "c", "d", "e", "f"];
    let again: Vec<Request> =
        ids.iter().zip(11..).map(|(id, second)| request(second, id, 500, 1, &[1])).collect();
    let rest = request(50, "z", 200, 1, &[2]);
    let saw = |times: usize| {
        saw(
            &[&again[..times], &[request(50, ids[times - 1], 200, 2, &[1]), rest.clone()]].concat(),
            false,
            &[],
            std::slice::from_ref(&deleted),
        )
    };
    assert!(saw(3).is_good(), "{}", saw(3));
    assert!(!saw(6).is_good());
}

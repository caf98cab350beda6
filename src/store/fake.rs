//! A store in memory, for tests of what uses one. Reads everything for each answer.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use sha2::{Digest as _, Sha256};
use tokio::sync::watch;

use super::{
    Added, Appended, Changed, Deleted, Delivery, DeliveryChange, DeliveryFilter, EventCounts,
    EventFilter, EventNumber, EventRow, Extent, Gap, Introduced, KeptSubscriber, KeptSubscribers,
    MAX_RUNNING, NewOperation, NewRow, Newcomer, Operation, Page, Put, Reach, Recorded, Replay,
    ReplayChange, ReplayState, RequestKey, Stamp, Store, StoreError, StoreState, StoredSubscriber,
    Subscription, TypeCounts, WithEvent, subscriber::next_version,
};
use crate::{
    crypto::secret::Secret,
    delivery::{Print, SubscriberName},
    event::{audience::Interest, details::Details},
};

/// Clones share it.
#[derive(Debug, Clone, Default)]
pub(crate) struct FakeStore(Arc<Mutex<Memory>>);

#[derive(Debug, Default)]
pub(crate) struct Memory {
    pub(crate) state: StoreState,
    /// Every call fails with it, once set.
    pub(crate) away: Option<StoreError>,
    /// What is recorded fails with it, once set; a try of a write succeeds.
    pub(crate) refuses: Option<StoreError>,
    /// A call that introduces subscribers never returns.
    pub(crate) hangs: bool,
    /// How often it was tried whether it can be written.
    pub(crate) tried: usize,
    /// The number of changes of deliveries that were recorded.
    pub(crate) changes: usize,
    /// The number of calls that recorded them.
    pub(crate) records: usize,
    /// The number of calls that searched deliveries for an event.
    pub(crate) searches: usize,
    /// The most subscribers that such a call answers for.
    pub(crate) answers_for: Option<usize>,
    pub(crate) events: Vec<EventRow>,
    pub(crate) deliveries: Vec<Delivery>,
    pub(crate) subscriptions: Vec<Subscription>,
    pub(crate) gaps: Vec<Gap>,
    pub(crate) replays: Vec<Recorded>,
    /// With the ids of the replays that were made.
    pub(crate) keys: Vec<(RequestKey, String)>,
    /// From when on those get events whose first replay is not made.
    pub(crate) introduced: BTreeMap<SubscriberName, Option<SystemTime>>,
    pub(crate) operations: Vec<Operation>,
    /// Those made over the API, as they are read also while the store is away.
    pub(crate) kept: KeptSubscribers,
    /// The versions of those that were deleted.
    pub(crate) deleted: Vec<(SubscriberName, u64)>,
    /// Those whose queues are still to be deleted.
    pub(crate) dropping: BTreeSet<SubscriberName>,
    pub(crate) to_read: watch::Sender<u64>,
}

impl FakeStore {
    pub(crate) fn memory(&self) -> MutexGuard<'_, Memory> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// To write.
    fn recording(&self) -> Result<MutexGuard<'_, Memory>, StoreError> {
        let memory = self.open()?;
        match memory.refuses.clone() {
            Some(refuses) => Err(refuses),
            None => Ok(memory),
        }
    }

    fn open(&self) -> Result<MutexGuard<'_, Memory>, StoreError> {
        let memory = self.memory();
        match memory.away.clone() {
            Some(away) => Err(away),
            None => Ok(memory),
        }
    }
}

impl Memory {
    /// The place of a subscriber, and the version after its last one; the inner error is its version.
    fn next_of(
        &self,
        name: &SubscriberName,
        expected: Option<u64>,
        now: SystemTime,
    ) -> Result<(Result<usize, usize>, u64), Option<u64>> {
        let at = self.kept.all.binary_search_by(|kept| kept.name().cmp(name));
        let version = at.ok().map(|at| self.kept.all[at].version());
        if version != expected {
            return Err(version);
        }
        let deleted = self.deleted.iter().filter(|(of, _)| of == name).map(|(_, version)| *version);
        Ok((at, next_version(version.into_iter().chain(deleted).max(), now)))
    }

    fn add_operation(&mut self, new: NewOperation) {
        let row = self.operations.len() as i64 + 1;
        self.operations.push(Operation { row, new });
    }

    fn running(&self) -> Vec<Recorded> {
        let runs = |r: &&Recorded| match r {
            Ok(replay) => replay.state == ReplayState::Running,
            Err(unreadable) => unreadable.state == "running",
        };
        self.replays.iter().filter(runs).cloned().collect()
    }
}

fn id_of(recorded: &Recorded) -> &str {
    match recorded {
        Ok(replay) => &replay.id,
        Err(unreadable) => &unreadable.id,
    }
}

const fn row_of(recorded: &Recorded) -> i64 {
    match recorded {
        Ok(replay) => replay.row,
        Err(unreadable) => unreadable.row,
    }
}

fn row(number: EventNumber, new: NewRow) -> EventRow {
    EventRow {
        number,
        at: new.at,
        event_type: new.event_type,
        message_id: new.message_id,
        bytes: new.body.len() as u64,
        sha256: Sha256::digest(&new.body).into(),
        details: Details::of(&new.body),
        body: Some(new.body),
        tenant: new.tenant,
    }
}

/// Selects by everything but text.
fn selects(filter: &EventFilter, event: &EventRow) -> bool {
    let is_party = |party: &crate::event::details::Party, wanted: &Option<String>| {
        wanted.is_none() || party.id == *wanted || party.name == *wanted
    };
    filter.event_type.as_ref().is_none_or(|p| p.matches(&event.event_type))
        && is_party(&event.details.actor, &filter.actor)
        && is_party(&event.details.resource, &filter.resource)
        && filter.tenant.as_ref().is_none_or(|t| event.tenant.as_ref() == Some(t))
        && filter.id.as_ref().is_none_or(|id| event.id() == *id)
        && filter.since.is_none_or(|since| event.at >= since)
        && filter.until.is_none_or(|until| event.at < until)
}

fn page<T: Clone>(mut found: Vec<T>, number: impl Fn(&T) -> i64, limit: usize) -> Page<T> {
    let more = found.len() > limit;
    found.truncate(limit);
    let next = if more { found.last().map(number) } else { None };
    Page { rows: found, next, searched_back_to: None }
}

impl Store for FakeStore {
    async fn writable(&self) -> Result<(), StoreError> {
        loop {
            let away = {
                let mut memory = self.memory();
                memory.tried += 1;
                memory.away.clone()
            };
            match away {
                // What is not away can be tried.
                Some(e) if !e.is_away() => return Err(e),
                Some(_) => tokio::time::sleep(Duration::from_millis(5)).await,
                None => return Ok(()),
            }
        }
    }

    async fn append(&self, events: Vec<NewRow>) -> Result<Appended, StoreError> {
        let mut memory = self.recording()?;
        let mut appended = Appended::default();
        for new in events {
            let next = memory.events.last().map_or(1, |last| last.number.0 + 1);
            let number = new.number.unwrap_or(EventNumber(next));
            let redelivered = new.redelivered;
            let event = row(number, new);
            let is_repeat = |e: &&EventRow| {
                e.message_id.is_some() && e.message_id == event.message_id && e.body == event.body
            };
            if redelivered && memory.events.iter().find(is_repeat).is_some() {
                appended.repeats += 1;
                continue;
            }
            memory.events.push(event);
            appended.events += 1;
        }
        appended.last = memory.events.last().map(|e| e.number);
        Ok(appended)
    }

    async fn events(
        &self,
        filter: &EventFilter,
        before: Option<EventNumber>,
        limit: usize,
        _time: Duration,
    ) -> Result<Page<EventRow>, StoreError> {
        let memory = self.open()?;
        let rows = memory.events.iter().rev();
        let rows = rows.filter(|e| before.is_none_or(|b| e.number < b) && selects(filter, e));
        Ok(page(rows.cloned().collect(), |e| e.number.0, limit))
    }

    async fn count_by_hour(
        &self,
        filter: &EventFilter,
        since: SystemTime,
        hours: usize,
        _: Duration,
    ) -> Result<EventCounts, StoreError> {
        let mut counts = EventCounts { hours: vec![0; hours], uncounted: None };
        for event in self.open()?.events.iter().filter(|event| selects(filter, event)) {
            let after = event.at.duration_since(since).ok();
            let hour = after.and_then(|after| usize::try_from(after.as_secs() / 3600).ok());
            if let Some(count) = hour.and_then(|hour| counts.hours.get_mut(hour)) {
                *count += 1;
            }
        }
        Ok(counts)
    }

    async fn count_by_type(
        &self,
        since: SystemTime,
        _: Duration,
    ) -> Result<TypeCounts, StoreError> {
        let mut counts = TypeCounts::default();
        let memory = self.open()?;
        memory.events.iter().filter(|e| e.at >= since).for_each(|e| counts.add(&e.event_type));
        Ok(counts)
    }

    async fn event(&self, number: EventNumber) -> Result<Option<EventRow>, StoreError> {
        Ok(self.open()?.events.iter().find(|e| e.number == number).cloned())
    }

    async fn events_with_id(&self, id: &str) -> Result<Vec<EventRow>, StoreError> {
        let memory = self.open()?;
        Ok(memory.events.iter().rev().filter(|e| e.id() == id).cloned().collect())
    }

    async fn rows(
        &self,
        after: EventNumber,
        upto: EventNumber,
        limit: usize,
        _bytes: usize,
    ) -> Result<Vec<EventRow>, StoreError> {
        let memory = self.open()?;
        let rows = memory.events.iter().filter(|e| e.number > after && e.number <= upto);
        Ok(rows.take(limit).cloned().collect())
    }

    async fn record(&self, changes: Vec<DeliveryChange>) -> Result<(), StoreError> {
        let mut memory = self.recording()?;
        memory.changes += changes.len();
        memory.records += 1;
        for change in changes {
            match memory.deliveries.iter_mut().find(|d| d.id == change.id) {
                Some(delivery) => delivery.apply(&change),
                None => {
                    let row = memory.deliveries.last().map_or(1, |last| last.row + 1);
                    memory.deliveries.extend(Delivery::begin(row, &change));
                }
            }
        }
        Ok(())
    }

    async fn deliveries(
        &self,
        filter: &DeliveryFilter,
        before: Option<i64>,
        limit: usize,
        _time: Duration,
    ) -> Result<Page<Delivery>, StoreError> {
        let memory = self.open()?;
        let rows = memory.deliveries.iter().rev().filter(|d| {
            before.is_none_or(|b| d.row < b)
                && filter.subscriber.as_ref().is_none_or(|s| d.subscriber.as_str() == s)
                && filter.state.as_ref().is_none_or(|s| d.known_state(crate::clock::now()) == s)
                && filter.since.is_none_or(|since| d.begun_at >= since)
                && filter.until.is_none_or(|until| d.begun_at < until)
        });
        Ok(page(rows.cloned().collect(), |d| d.row, limit))
    }

    async fn delivery(&self, id: &str) -> Result<Option<Delivery>, StoreError> {
        Ok(self.open()?.deliveries.iter().find(|d| d.id.as_str() == id).cloned())
    }

    async fn deliveries_with(
        &self,
        subscribers: &[SubscriberName],
        print: Print,
        since: SystemTime,
        until: SystemTime,
        _time: Duration,
    ) -> Result<Vec<WithEvent>, StoreError> {
        let mut memory = self.open()?;
        memory.searches += 1;
        let most = memory.answers_for.unwrap_or(subscribers.len());
        let of = |subscriber: &SubscriberName| {
            let mut found = WithEvent::default();
            for d in &memory.deliveries {
                if d.subscriber != *subscriber || d.begun_at < since || d.begun_at >= until {
                    continue;
                }
                match &d.contents.prints {
                    Some(prints) if prints.contains(&print) => found.deliveries.push(d.clone()),
                    Some(_) => {}
                    None => found.without_prints += 1,
                }
            }
            found
        };
        Ok(subscribers.iter().take(most).map(of).collect())
    }

    async fn subscribed(
        &self,
        all: Vec<(SubscriberName, Interest)>,
        now: SystemTime,
    ) -> Result<(), StoreError> {
        let mut memory = self.open()?;
        let is_current = |s: &Subscription| {
            all.iter().any(|(name, interest)| *name == s.subscriber && *interest == s.interest)
        };
        for open in memory.subscriptions.iter_mut().filter(|s| s.until.is_none()) {
            if !is_current(open) {
                open.until = Some(now);
            }
        }
        for (subscriber, interest) in all {
            let is_open = |s: &Subscription| s.until.is_none() && s.subscriber == subscriber;
            if !memory.subscriptions.iter().any(is_open) {
                memory.subscriptions.push(Subscription {
                    subscriber,
                    interest,
                    from: now,
                    until: None,
                });
            }
        }
        Ok(())
    }

    async fn subscriptions(&self) -> Result<Vec<Subscription>, StoreError> {
        Ok(self.open()?.subscriptions.clone())
    }

    async fn add_gap(&self, gap: Gap) -> Result<(), StoreError> {
        self.recording()?.gaps.push(gap);
        Ok(())
    }

    async fn reach(&self) -> Result<Reach, StoreError> {
        let memory = self.open()?;
        Ok(Reach {
            events_from: memory.events.first().map(|e| e.at),
            deliveries_from: memory.deliveries.first().map(|d| d.begun_at),
            why: "the retention".to_owned(),
            last: memory.events.last().map(|e| (e.number, e.at)),
            gaps: memory.gaps.clone(),
            bytes: 0,
            events: memory.events.len() as u64,
            deliveries: memory.deliveries.len() as u64,
        })
    }

    async fn extent(
        &self,
        since: SystemTime,
        until: Option<SystemTime>,
        upto: Option<EventNumber>,
    ) -> Result<Option<Extent>, StoreError> {
        let memory = self.open()?;
        let is_in = |e: &&EventRow| {
            let is_meant = e.at >= since && until.is_none_or(|until| e.at < until);
            is_meant && upto.is_none_or(|upto| e.number <= upto)
        };
        let numbers = || memory.events.iter().filter(is_in).map(|e| e.number.0);
        let Some((first, last)) = numbers().min().zip(numbers().max()) else { return Ok(None) };
        let between = memory.events.iter().filter(|e| (first..=last).contains(&e.number.0));
        Ok(Some(Extent {
            after: EventNumber(first - 1),
            upto: EventNumber(last),
            rows: between.count() as u64,
        }))
    }

    async fn add_replay(
        &self,
        replay: Replay,
        key: Option<RequestKey>,
    ) -> Result<Added, StoreError> {
        let mut memory = self.open()?;
        if let Some(key) = key {
            let is_it = |known: &RequestKey| known.by == key.by && known.key == key.key;
            if let Some((known, id)) = memory.keys.iter().find(|(known, _)| is_it(known)) {
                let made = memory.replays.iter().find(|r| id_of(r) == id).cloned();
                let made = made.filter(|_| known.sha256 == key.sha256);
                return Ok(made.map_or(Added::OtherRequest, |made| Added::Before(Box::new(made))));
            }
            memory.keys.push((key, replay.id.clone()));
        }
        let running = memory.running();
        if running.len() >= MAX_RUNNING {
            return Ok(Added::TooMany(running));
        }
        let row = memory.replays.len() as i64 + 1;
        memory.replays.push(Ok(Replay { row, ..replay }));
        Ok(Added::New)
    }

    async fn change_replay(
        &self,
        id: &str,
        change: ReplayChange,
        now: SystemTime,
    ) -> Result<Option<Changed>, StoreError> {
        let mut memory = self.open()?;
        let running = memory.running();
        let Some(found) = memory.replays.iter_mut().find(|r| id_of(r) == id) else {
            return Ok(None);
        };
        let goes_on = change == ReplayChange::Continued;
        let mut changed = found.clone();
        let is_changed = match &mut changed {
            Ok(replay) => replay.apply(change, now),
            Err(it) if change == ReplayChange::Cancelled && it.state == "running" => {
                it.state = "cancelled".to_owned();
                true
            }
            Err(_) => false,
        };
        Ok(Some(match is_changed {
            false => Changed::No(Box::new(changed)),
            true if goes_on && running.len() >= MAX_RUNNING => Changed::TooMany(running),
            true => {
                *found = changed.clone();
                Changed::Yes(Box::new(changed))
            }
        }))
    }

    async fn replays(
        &self,
        before: Option<i64>,
        limit: usize,
    ) -> Result<Page<Recorded>, StoreError> {
        let memory = self.open()?;
        let rows = memory.replays.iter().rev().filter(|r| before.is_none_or(|b| row_of(r) < b));
        Ok(page(rows.cloned().collect(), row_of, limit))
    }

    async fn replay(&self, id: &str) -> Result<Option<Recorded>, StoreError> {
        Ok(self.open()?.replays.iter().find(|r| id_of(r) == id).cloned())
    }

    async fn running_replays(&self) -> Result<Vec<Recorded>, StoreError> {
        Ok(self.open()?.running())
    }

    async fn replay_floor(&self) -> Result<Option<EventNumber>, StoreError> {
        let running = self.open()?.running();
        Ok(running.iter().flatten().map(|replay| replay.progress.position).min())
    }

    async fn introduce(
        &self,
        newcomers: Vec<Newcomer>,
        bound: Option<BTreeSet<SubscriberName>>,
        _now: SystemTime,
    ) -> Result<Introduced, StoreError> {
        if self.memory().hangs {
            std::future::pending::<()>().await;
        }
        let mut memory = self.recording()?;
        let is_used = !memory.introduced.is_empty();
        let mut not_new = Vec::new();
        for Newcomer { name, start_from } in newcomers {
            if memory.introduced.contains_key(&name) {
                continue;
            }
            let is_new = bound.as_ref().map_or(is_used, |bound| !bound.contains(&name));
            if start_from.is_some() && !is_new {
                not_new.push(name.clone());
            }
            memory.introduced.insert(name, start_from.filter(|_| is_new));
        }
        for name in bound.into_iter().flatten() {
            memory.introduced.entry(name).or_default();
        }
        let waiting =
            memory.introduced.iter().filter_map(|(name, at)| Some((name.clone(), (*at)?)));
        Ok(Introduced { waiting: waiting.collect(), not_new })
    }

    async fn begin_newcomers(
        &self,
        replays: Vec<(SubscriberName, Option<Replay>)>,
    ) -> Result<BTreeSet<SubscriberName>, StoreError> {
        let mut memory = self.recording()?;
        let mut begun = BTreeSet::new();
        for (name, replay) in replays {
            if replay.is_some() && memory.running().len() >= MAX_RUNNING {
                continue;
            }
            let waited = memory.introduced.get_mut(&name).and_then(Option::take).is_some();
            let row = memory.replays.len() as i64 + 1;
            let replay = replay.filter(|_| waited);
            memory.replays.extend(replay.map(|replay| Ok(Replay { row, ..replay })));
            begun.insert(name);
        }
        Ok(begun)
    }

    async fn subscribers(&self) -> KeptSubscribers {
        let memory = self.memory();
        let away = memory.away.iter().map(ToString::to_string);
        let mut kept = memory.kept.clone();
        kept.problems.extend(away);
        kept
    }

    fn subscribers_to_read(&self) -> watch::Receiver<u64> {
        self.memory().to_read.subscribe()
    }

    async fn put_subscriber(
        &self,
        name: &SubscriberName,
        document: Secret,
        expected: Option<u64>,
        operation: NewOperation,
    ) -> Result<Put, StoreError> {
        let mut memory = self.recording()?;
        let (at, version) = match memory.next_of(name, expected, operation.at) {
            Ok(next) => next,
            Err(version) => return Ok(Put::Differs(version)),
        };
        let changed = Stamp { at: operation.at, by: operation.by.clone() };
        let created = match at.map(|at| &memory.kept.all[at]) {
            Ok(KeptSubscriber::Open(before)) => before.created.clone(),
            Ok(KeptSubscriber::Locked { .. }) | Err(_) => changed.clone(),
        };
        let stored = StoredSubscriber { name: name.clone(), version, document, created, changed };
        let kept = KeptSubscriber::Open(stored.clone());
        match at {
            Ok(at) => memory.kept.all[at] = kept,
            Err(at) => memory.kept.all.insert(at, kept),
        }
        memory.add_operation(operation);
        Ok(Put::Stored(stored))
    }

    async fn delete_subscriber(
        &self,
        name: &SubscriberName,
        expected: u64,
        drops: bool,
        operation: NewOperation,
    ) -> Result<Deleted, StoreError> {
        let mut memory = self.recording()?;
        let next = memory.next_of(name, Some(expected), operation.at);
        match (&next, drops) {
            (Err(Some(_)), _) => {}
            (_, true) => memory.dropping.extend([name.clone()]),
            (_, false) => memory.dropping.retain(|known| known != name),
        }
        match next {
            Ok((at, version)) => {
                at.map(|at| memory.kept.all.remove(at)).ok(); // it is there: it has a version
                memory.deleted.push((name.clone(), version));
                memory.add_operation(operation);
                Ok(Deleted::Yes)
            }
            Err(version) => Ok(Deleted::Differs(version)),
        }
    }

    async fn dropping(&self) -> Result<BTreeSet<SubscriberName>, StoreError> {
        Ok(self.open()?.dropping.clone())
    }

    async fn dropped(&self, name: &SubscriberName) -> Result<(), StoreError> {
        self.recording()?.dropping.remove(name);
        Ok(())
    }

    async fn add_operation(&self, operation: NewOperation) -> Result<(), StoreError> {
        self.open()?.add_operation(operation);
        Ok(())
    }

    async fn operations(
        &self,
        before: Option<i64>,
        limit: usize,
    ) -> Result<Page<Operation>, StoreError> {
        let memory = self.open()?;
        let rows = memory.operations.iter().rev().filter(|o| before.is_none_or(|b| o.row < b));
        Ok(page(rows.cloned().collect(), |o| o.row, limit))
    }

    async fn trim(&self, _now: SystemTime) -> Result<bool, StoreError> {
        self.open().map(|_| false)
    }

    async fn id(&self) -> Result<String, StoreError> {
        self.open().map(|_| "fake".to_owned())
    }

    async fn leave_the_queue(&self) {}

    fn condition(&self) -> StoreState {
        self.memory().state.clone()
    }

    async fn close(&self, _: bool) {}
}

#[tokio::test]
async fn subscribers_are_changed_by_who_knows_their_version() {
    super::testing::subscribers_are_changed_by_who_knows_their_version(&FakeStore::default()).await;
}

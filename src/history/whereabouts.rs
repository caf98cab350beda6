//! Where an event went: the answer to "did event X reach Y?".
//!
//! It comes from the store's deliveries, whose batches have a print of each event, and from the
//! queue's own place. It says *unknown*, with the reason, wherever these do not decide.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant, SystemTime},
};

use tokio::time::timeout;

use crate::{
    clock,
    config::Subscriber,
    delivery::{BatchId, FailureKind, Pause, PauseStates, Print, Reason, SubscriberName},
    event::{Pattern, Tenant, audience::Interest, condition::Conditions},
    queue::{Progress, Queue},
    store::{
        Delivery, DeliveryAttempt, DeliveryState, EventNumber, EventRow, Gap, Reach, Store,
        StoreError, Subscription, WithEvent,
    },
    wording::counted,
};

/// The time that one subscriber's deliveries are read for.
const READ_TIME: Duration = Duration::from_millis(200);

/// The time that the deliveries of all subscribers are read for that were not to get the event.
const NOT_MATCHED_TIME: Duration = Duration::from_secs(1);

/// The longest time for which a queue is asked for some subscribers.
const ASK_TIME: Duration = Duration::from_secs(1);

/// The subscribers that a queue is asked for at once, so that a slow one answers for some of many.
const ASKED_FOR: usize = 256;

/// An event's time has whole seconds, if its producer set it, and another machine's clock. A change
/// of patterns or a delivery that is this close to it may be before it or after it.
const BLUR: Duration = Duration::from_secs(5);

/// The most that a producer's clock is believed to be ahead, as for every timestamp.
const AHEAD: Duration = Duration::from_secs(24 * 3600);

/// Answers for the lanes.
pub trait Lanes: Sync {
    fn pause(&self, subscriber: &SubscriberName) -> Option<Pause>;

    /// What the queue knows of an event that these subscribers were to get, in their order.
    fn progress(
        &self,
        subscribers: &[SubscriberName],
        event: EventNumber,
    ) -> impl Future<Output = Vec<Progress>> + Send;

    /// Whether the subscriber's queue has a batch; `None` if that is not known.
    fn has_batch(
        &self,
        subscriber: &SubscriberName,
        id: &BatchId,
    ) -> impl Future<Output = Option<bool>> + Send;
}

/// The lanes of a queue, by what that knows.
#[derive(Debug)]
pub struct LanesOf<Q> {
    /// `None` if it cannot be asked.
    pub queue: Option<Q>,
    pub pauses: PauseStates,
}

impl<Q: Queue> Lanes for LanesOf<Q> {
    fn pause(&self, subscriber: &SubscriberName) -> Option<Pause> {
        self.pauses.get(subscriber).and_then(|state| state.pause().cloned())
    }

    async fn progress(&self, subscribers: &[SubscriberName], event: EventNumber) -> Vec<Progress> {
        let mut found = Vec::with_capacity(subscribers.len());
        if let Some(queue) = &self.queue {
            for some in subscribers.chunks(ASKED_FOR) {
                let asked = timeout(ASK_TIME, queue.progress(some, event)).await;
                let Ok(Ok(some)) = asked else { break };
                found.extend(some);
            }
        }
        found.resize(subscribers.len(), Progress::Unknown);
        found
    }

    async fn has_batch(&self, subscriber: &SubscriberName, id: &BatchId) -> Option<bool> {
        let asked = timeout(ASK_TIME, self.queue.as_ref()?.has_batch(subscriber, id)).await;
        asked.ok().and_then(Result::ok).flatten()
    }
}

/// What a configured subscriber is to get.
#[derive(Debug, Clone)]
pub struct Wanted {
    pub interest: Interest,
    pub conditions: Conditions,
}

impl Wanted {
    pub fn by(subscriber: &Subscriber) -> Self {
        Self { interest: subscriber.interest(), conditions: subscriber.conditions.clone() }
    }
}

/// Where an event went for one subscriber.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Whereabouts {
    pub subscriber: SubscriberName,
    /// Whether the subscriber is configured today.
    pub configured: bool,
    pub fate: Fate,
    /// The deliveries whose batches have the event, the decisive one first.
    pub deliveries: Vec<BatchId>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fate {
    Delivered {
        at: SystemTime,
        last: Last,
    },
    /// A request is under way, and has no answer yet.
    InFlight {
        last: Last,
    },
    Retrying {
        due: SystemTime,
        last: Last,
    },
    /// It waits for its subscriber to be resumed.
    Paused {
        last: Last,
    },
    Dead {
        reason: Reason,
        last: Last,
    },
    /// It is in the queue. `paused`: its subscriber is.
    Waiting {
        paused: Option<Pause>,
    },
    /// The subscriber had these patterns then; none if it was not configured.
    NotMatched {
        patterns: Vec<Pattern>,
        /// Its patterns match, and its key `match`, as it is today, does not.
        by_values: bool,
        /// It gets the events of this tenant, and the event is of another one, or of none.
        tenant: Option<Tenant>,
    },
    Unknown {
        why: String,
    },
}

/// The batch of a fate and its last attempt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Last {
    pub batch: BatchId,
    /// The number of the last attempt; 0 of a dead letter without one.
    pub attempt: u32,
    pub status: Option<u16>,
    pub failure: Option<FailureKind>,
}

impl Last {
    fn of(delivery: &Delivery) -> Self {
        let answered = |a: &&DeliveryAttempt| a.end.is_some();
        let end = delivery.attempts.iter().rev().find(answered).and_then(|a| a.end.as_ref());
        Self {
            batch: delivery.id.clone(),
            attempt: delivery.attempts.last().map_or(0, |a| a.number),
            status: end.and_then(|(_, end)| end.status),
            failure: end.and_then(|(_, end)| end.failure),
        }
    }
}

impl Fate {
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Delivered { .. } => "delivered",
            Self::InFlight { .. } => "in_flight",
            Self::Retrying { .. } => "retrying",
            Self::Paused { .. } => "paused",
            Self::Dead { .. } => "dead",
            Self::Waiting { .. } => "waiting",
            Self::NotMatched { .. } => "not_matched",
            Self::Unknown { .. } => "unknown",
        }
    }

    /// Whether the subscriber has the event, or was not to get it.
    pub const fn is_settled(&self) -> bool {
        matches!(self, Self::Delivered { .. } | Self::NotMatched { .. })
    }
}

/// Where an event went, for each subscriber that history or the configuration knows. `lanes` are
/// asked for subscribers that want the event and have no record of it.
///
/// # Errors
/// The store cannot be read.
pub async fn of_event<S: Store>(
    store: &S,
    event: &EventRow,
    configured: &BTreeMap<SubscriberName, Wanted>,
    lanes: &impl Lanes,
    now: SystemTime,
) -> Result<Vec<Whereabouts>, StoreError> {
    let (reach, mut spans) = (store.reach().await?, by_subscriber(store.subscriptions().await?));
    for name in configured.keys() {
        spans.entry(name.clone()).or_default();
    }
    let wishes: Vec<(SubscriberName, Wish)> = spans
        .into_iter()
        .map(|(subscriber, spans)| {
            let today = configured.get(&subscriber).map(|wanted| &wanted.interest);
            let wish = wish(event, &spans, today);
            (subscriber, wish)
        })
        .collect();
    let mut recorded = recorded(store, event, &wishes, &reach.gaps).await?;
    let (mut found, mut open) = (Vec::with_capacity(wishes.len()), Vec::new());
    for (subscriber, wish) in wishes {
        let wanted = configured.get(&subscriber);
        let configured = wanted.is_some();
        let with_event = recorded.remove(&subscriber).unwrap_or_default();
        let (mut fate, deliveries) = decided(&with_event, &reach.gaps);
        if let Some(known) = &fate {
            let decisive = deliveries.first();
            let decisive = with_event.deliveries.iter().find(|d| Some(&d.id) == decisive);
            if let Some(delivery) = decisive
                && let Some(why) =
                    doubt(known, &Known { delivery, configured, gaps: &reach.gaps, now }, lanes)
                        .await
            {
                fate = Some(Fate::Unknown { why });
            }
        }
        if let Wish::Not(wants) = &wish {
            let patterns = wants.as_ref().map(|w| w.patterns.clone()).unwrap_or_default();
            let tenant = wants.as_ref().and_then(|wants| wants.tenant.clone());
            let tenant = tenant.filter(|tenant| event.tenant.as_ref() != Some(tenant));
            let by_values = false;
            fate = Some(fate.unwrap_or(Fate::NotMatched { patterns, by_values, tenant }));
        }
        if let (None, Wish::Matched, Some(wanted)) = (&fate, &wish, wanted)
            && event.body.as_ref().is_some_and(|body| !wanted.conditions.hold(body))
        {
            let patterns = wanted.interest.patterns.clone();
            fate = Some(Fate::NotMatched { patterns, by_values: true, tenant: None });
        }
        if fate.is_none() && configured {
            let is_matched = matches!(wish, Wish::Matched);
            open.push((found.len(), is_matched, subscriber.clone()));
        }
        let fate = fate.unwrap_or_else(|| match wish {
            Wish::Unclear(why) => Fate::Unknown { why },
            _ => Fate::Unknown { why: why_unknown(event, &with_event, &reach, now) },
        });
        found.push(Whereabouts { subscriber, configured, fate, deliveries });
    }
    let names: Vec<SubscriberName> = open.iter().map(|(_, _, name)| name.clone()).collect();
    let progress = lanes.progress(&names, event.number).await;
    for ((n, is_matched, name), progress) in open.into_iter().zip(progress) {
        let paused = lanes.pause(&name);
        match &mut found[n].fate {
            fate if progress == Progress::Waits => *fate = Fate::Waiting { paused },
            Fate::Unknown { why } if is_matched => {
                why.push_str(&in_queue(progress, paused.is_some()));
            }
            _ => {}
        }
    }
    Ok(found)
}

fn by_subscriber(spans: Vec<Subscription>) -> BTreeMap<SubscriberName, Vec<Subscription>> {
    let mut all = BTreeMap::<_, Vec<_>>::new();
    for span in spans {
        all.entry(span.subscriber.clone()).or_default().push(span);
    }
    all
}

/// Whether a subscriber was to get an event.
enum Wish {
    Matched,
    /// What it was to get then; `None` if it was not configured.
    Not(Option<Interest>),
    /// That is not known: why.
    Unclear(String),
}

/// Decides by the patterns that held at the event's time.
fn wish(event: &EventRow, spans: &[Subscription], today: Option<&Interest>) -> Wish {
    let is_for = |wants: &Interest| wants.includes(&event.event_type, event.tenant.as_ref());
    let held = |s: &&Subscription, at: SystemTime, blur: Duration| {
        s.from <= at + blur && s.until.is_none_or(|until| until + blur > at)
    };
    let near: Vec<&Subscription> = spans.iter().filter(|s| held(s, event.at, BLUR)).collect();
    let Some(first) = spans.iter().map(|s| s.from).min() else {
        // Configured today, and history has not recorded it: it is off, or was away since.
        return match today {
            Some(wants) if is_for(wants) => Wish::Matched,
            _ => Wish::Unclear("its patterns of that time are not recorded".to_owned()),
        };
    };
    if near.is_empty() {
        return if event.at < first {
            let since = clock::rfc3339_seconds(first);
            Wish::Unclear(format!("history knows it from {since} on, and the event is older"))
        } else {
            Wish::Not(None)
        };
    }
    let matched = near.iter().filter(|s| is_for(&s.interest)).count();
    let then = near.iter().find(|s| held(s, event.at, Duration::ZERO));
    match (matched, then) {
        (0, then) => Wish::Not(then.map(|s| s.interest.clone())),
        (n, Some(_)) if n == near.len() => Wish::Matched,
        _ => Wish::Unclear(
            "its patterns changed within seconds of the event, and one of them does not match"
                .to_owned(),
        ),
    }
}

/// The deliveries of each subscriber whose batches have the event, as far as they can be read.
async fn recorded<S: Store>(
    store: &S,
    event: &EventRow,
    wishes: &[(SubscriberName, Wish)],
    gaps: &[Gap],
) -> Result<BTreeMap<SubscriberName, WithEvent>, StoreError> {
    let is_not = |wish: &Wish| matches!(wish, Wish::Not(_));
    let named = |not: bool| {
        let these = wishes.iter().filter(move |(_, wish)| is_not(wish) == not);
        these.map(|(name, _)| name.clone()).collect::<Vec<_>>()
    };
    let mut all = deliveries(store, &named(false), event, gaps, None).await?;
    // A replay may have sent it all the same, by other patterns. Those that were not to get it may be
    // many, so that they share a time.
    let end = clock::instant() + NOT_MATCHED_TIME;
    all.extend(deliveries(store, &named(true), event, gaps, Some(end)).await?);
    Ok(all)
}

/// Reads the deliveries from the event's time on. Without one whose end is certain, also those before
/// it: for a producer whose clock is ahead, and for a daemon that was killed while its clock was, and
/// whose successor sent the event with the clock set back.
async fn deliveries<S: Store>(
    store: &S,
    subscribers: &[SubscriberName],
    event: &EventRow,
    gaps: &[Gap],
    end: Option<Instant>,
) -> Result<BTreeMap<SubscriberName, WithEvent>, StoreError> {
    let before = |time: Duration| event.at.checked_sub(time).unwrap_or(SystemTime::UNIX_EPOCH);
    let far = event.at + Duration::from_secs(100 * 365 * 24 * 3600);
    let print = Print::from_sha256(&event.sha256);
    let mut found = begun_within(store, subscribers, print, (before(BLUR), far), end).await?;
    let is_certain =
        |d: &Delivery| accepted(d).is_some() || lacks_since(gaps, d.changed_at).is_none();
    let uncertain = found.iter().filter(|(_, found)| !found.deliveries.iter().any(is_certain));
    let uncertain: Vec<SubscriberName> = uncertain.map(|(name, _)| name.clone()).collect();
    let times = (before(AHEAD + BLUR), before(BLUR));
    for (name, earlier) in begun_within(store, &uncertain, print, times, end).await? {
        // What the later ones lack decides why nothing is known.
        let later = found.entry(name).or_default();
        later.deliveries.splice(..0, earlier.deliveries);
    }
    Ok(found)
}

/// Reads those that were begun from one time on and before another, of as many subscribers as can be
/// asked for by `end`. A call of the store answers for many of them; each has [`READ_TIME`].
async fn begun_within<S: Store>(
    store: &S,
    subscribers: &[SubscriberName],
    print: Print,
    (since, until): (SystemTime, SystemTime),
    end: Option<Instant>,
) -> Result<BTreeMap<SubscriberName, WithEvent>, StoreError> {
    let (mut found, mut left) = (BTreeMap::new(), subscribers);
    while !left.is_empty() && end.is_none_or(|end| clock::instant() < end) {
        let read = store.deliveries_with(left, print, since, until, READ_TIME).await?;
        let (asked, rest) = left.split_at(read.len().min(left.len()));
        found.extend(asked.iter().cloned().zip(read));
        left = rest;
    }
    Ok(found)
}

/// When the receiver accepted a delivery, and by which attempt. A batch that was sent again keeps
/// that, whatever became of it later.
fn accepted(d: &Delivery) -> Option<(SystemTime, Last)> {
    let by = d.attempts.iter().find_map(|a| {
        let (took, end) = a.end.as_ref().filter(|(_, end)| end.failure.is_none())?;
        let batch = d.id.clone();
        let last = Last { batch, attempt: a.number, status: end.status, failure: None };
        Some((a.at + *took, last))
    });
    match d.state {
        DeliveryState::Delivered { at } => Some(by.unwrap_or_else(|| (at, Last::of(d)))),
        _ => by,
    }
}

/// The fate by the recorded deliveries, the decisive one first; `None` if they do not decide: a
/// later delivery may not have been read, or a change is missing.
fn decided(with_event: &WithEvent, gaps: &[Gap]) -> (Option<Fate>, Vec<BatchId>) {
    let rank = |d: &Delivery| match d.state {
        _ if accepted(d).is_some() => 0,
        DeliveryState::Delivered { .. } => 0,
        DeliveryState::InFlight => 1,
        DeliveryState::Retrying { .. } => 2,
        DeliveryState::Paused => 3,
        DeliveryState::Dead { .. } => 4,
        DeliveryState::Split | DeliveryState::Interrupted => 5,
    };
    let mut all: Vec<&Delivery> = with_event.deliveries.iter().collect();
    // Of the same rank the latest, but the first that delivered it.
    all.sort_by_key(|d| (rank(d), if rank(d) == 0 { d.row } else { -d.row }));
    let is_cut = with_event.searched_until.is_some();
    let may_have_ended = |d: &Delivery| lacks_since(gaps, d.changed_at).is_some();
    let fate = all.first().and_then(|d| {
        if let Some((at, last)) = accepted(d) {
            return Some(Fate::Delivered { at, last });
        }
        let last = Last::of(d);
        match d.state {
            DeliveryState::InFlight if may_have_ended(d) => None,
            _ if is_cut => None,
            DeliveryState::InFlight => Some(Fate::InFlight { last }),
            DeliveryState::Retrying { due } => Some(Fate::Retrying { due, last }),
            DeliveryState::Paused => Some(Fate::Paused { last }),
            DeliveryState::Dead { reason } => Some(Fate::Dead { reason, last }),
            DeliveryState::Delivered { .. } | DeliveryState::Split | DeliveryState::Interrupted => {
                None
            }
        }
    });
    (fate, all.into_iter().map(|d| d.id.clone()).collect())
}

/// The last gap of deliveries that reaches beyond a time.
fn lacks_since(gaps: &[Gap], since: SystemTime) -> Option<&Gap> {
    gaps.iter().rfind(|gap| gap.what == "deliveries" && gap.until >= since)
}

/// A recorded delivery, and what else is known.
struct Known<'a> {
    delivery: &'a Delivery,
    configured: bool,
    gaps: &'a [Gap],
    now: SystemTime,
}

/// Why a recorded fate may not hold any more. The queue knows better where it can be asked.
async fn doubt(fate: &Fate, known: &Known<'_>, lanes: &impl Lanes) -> Option<String> {
    let Known { delivery, configured, gaps, now } = *known;
    match fate {
        Fate::InFlight { .. } | Fate::Retrying { .. } => {
            let overdue = delivery.doubt(now);
            let lacks = |since| lacks_since(gaps, since).map(lacks_deliveries);
            let why = overdue.clone().or_else(|| lacks(delivery.changed_at))?;
            match lanes.has_batch(&delivery.subscriber, &delivery.id).await {
                Some(true) => None,
                Some(false) => Some(format!(
                    "the queue does not have it any more, and its end is not recorded: {why}"
                )),
                // A batch that was not due in the gap has changed there only if an operator had it
                // tried; then a later attempt says so, or it is overdue.
                None => match fate {
                    Fate::Retrying { due, .. } => {
                        lacks((*due).max(delivery.changed_at)).or(overdue)
                    }
                    _ => Some(why),
                },
            }
        }
        // Another daemon may have resumed and delivered it.
        Fate::Paused { .. } if configured => {
            let why = "it waited for its subscriber to be resumed, which is not known to be paused any more";
            lanes.pause(&delivery.subscriber).is_none().then(|| why.to_owned())
        }
        _ => None,
    }
}

fn lacks_deliveries(gap: &Gap) -> String {
    let (from, until) = (clock::rfc3339_seconds(gap.from), clock::rfc3339_seconds(gap.until));
    format!("history lacks deliveries from {from} to {until}: {}", gap.why)
}

/// Why nothing is known of an event that the subscriber was to get.
fn why_unknown(event: &EventRow, found: &WithEvent, reach: &Reach, now: SystemTime) -> String {
    let time = clock::rfc3339_seconds;
    let is_of_deliveries = |gap: &&Gap| gap.what == "deliveries";
    let overlaps = |gap: &&Gap| gap.until + BLUR >= event.at && gap.from <= now;
    if let Some(gap) = reach.gaps.iter().filter(is_of_deliveries).find(overlaps) {
        return lacks_deliveries(gap);
    }
    match reach.deliveries_from {
        None => return "history has no deliveries yet".to_owned(),
        Some(from) if from > event.at + BLUR => {
            return format!(
                "history has deliveries from {} on, and the event is older: {}",
                time(from),
                reach.why
            );
        }
        Some(_) => {}
    }
    if let Some(until) = found.searched_until {
        return format!("its deliveries were searched up to {}", time(until));
    }
    match found.without_prints {
        0 => {}
        1 => {
            return "1 delivery of that time does not record which events it had".to_owned();
        }
        n => return format!("{n} deliveries of that time do not record which events they had"),
    }
    "no delivery of it is recorded, and the queue does not say whether it still has it".to_owned()
}

/// What the subscriber's queue says of an event that may be in it.
fn in_queue(progress: Progress, is_paused: bool) -> String {
    let mut text = match progress {
        Progress::Among(0) => "; nothing waits in the queue".to_owned(),
        Progress::Among(n) => format!(
            "; {} in the queue, and it may be among them",
            counted(n, "event(s) (waits|wait)")
        ),
        Progress::Waits | Progress::Passed | Progress::Unknown => String::new(),
    };
    if is_paused {
        text.push_str("; the subscriber is paused");
    }
    text
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::event::{Pointer, condition::Condition};
    use crate::{
        delivery::Outcome,
        store::{AttemptEnd, Change, Contents, DeliveryChange, NewRow, fake::FakeStore},
    };

    const EVENT: &[u8] = br#"{"event":"user.login"}"#;
    const BEGIN: SystemTime = SystemTime::UNIX_EPOCH;

    fn at(seconds: u64) -> SystemTime {
        BEGIN + Duration::from_secs(seconds)
    }

    fn wanted(interest: Interest) -> Wanted {
        Wanted { interest, conditions: Conditions::default() }
    }

    fn patterns(text: &str) -> Vec<Pattern> {
        text.split(' ').map(|p| Pattern::try_new(p).expect("a pattern")).collect()
    }

    fn interest(text: &str) -> Interest {
        Interest { patterns: patterns(text), tenant: None }
    }

    /// A store with the event at 1,000 s, and subscriber `a`, which has wanted everything from 10 s
    /// on.
    struct Fixture {
        store: FakeStore,
        configured: BTreeMap<SubscriberName, Wanted>,
        paused: Option<Pause>,
        progress: Progress,
        has_batch: Option<bool>,
        now: SystemTime,
    }

    impl Lanes for Fixture {
        fn pause(&self, _: &SubscriberName) -> Option<Pause> {
            self.paused.clone()
        }

        async fn progress(&self, all: &[SubscriberName], _: EventNumber) -> Vec<Progress> {
            vec![self.progress; all.len()]
        }

        async fn has_batch(&self, _: &SubscriberName, _: &BatchId) -> Option<bool> {
            self.has_batch
        }
    }

    impl Fixture {
        async fn new() -> Self {
            let store = FakeStore::default();
            let event = NewRow {
                number: None,
                at: at(1000),
                event_type: "user.login".to_owned(),
                message_id: None,
                body: EVENT.into(),
                redelivered: false,
                tenant: None,
            };
            store.append(vec![event]).await.expect("appends");
            let configured = BTreeMap::from([("a".into(), wanted(interest("#")))]);
            let (paused, progress, has_batch, now) = (None, Progress::Unknown, None, at(1500));
            let fixture = Self { store, configured, paused, progress, has_batch, now };
            fixture.subscribed("#", 10).await;
            fixture
        }

        async fn subscribed(&self, text: &str, seconds: u64) {
            let all = vec![("a".into(), interest(text))];
            self.store.subscribed(all, at(seconds)).await.expect("records");
        }

        async fn record(&self, id: &str, seconds: u64, changes: Vec<Change>) {
            let changes = changes.into_iter().enumerate().map(|(n, change)| DeliveryChange {
                id: id.into(),
                subscriber: "a".into(),
                at: at(seconds + n as u64),
                change,
            });
            self.store.record(changes.collect()).await.expect("records");
        }

        async fn fate(&self) -> Fate {
            let event = self.store.memory().events[0].clone();
            let found = of_event(&self.store, &event, &self.configured, self, self.now).await;
            found.expect("answers").remove(0).fate
        }

        async fn unknown(&self) -> String {
            match self.fate().await {
                Fate::Unknown { why } => why,
                other => panic!("{other:?}"),
            }
        }
    }

    fn started(attempt: u32) -> Change {
        started_with(attempt, Some(Arc::from([Print::of(b"{}"), Print::of(EVENT)])))
    }

    fn started_with(attempt: u32, prints: crate::delivery::Prints) -> Change {
        let contents = Contents {
            format: Some(crate::event::payload::Format::Json),
            events: 2,
            bytes: 10,
            sha256: None,
            prints,
            replay: false,
            parent: None,
        };
        Change::Started { attempt, contents, by: "here".to_owned() }
    }

    fn ended(attempt: u32, status: u16) -> Change {
        let outcome = if status < 300 {
            Outcome::Delivered { status }
        } else {
            let failure = crate::delivery::Failure::Status { status, excerpt: "no".to_owned() };
            Outcome::Retry { failure, retry_after: None }
        };
        let end = AttemptEnd::of(&outcome).expect("an end");
        Change::Ended { attempt, took: Duration::from_secs(1), end }
    }

    fn last(batch: &str, attempt: u32, status: u16) -> Last {
        let failure = (status >= 300).then_some(FailureKind::Status);
        Last { batch: batch.into(), attempt, status: Some(status), failure }
    }

    #[tokio::test]
    async fn the_fate_is_what_the_deliveries_say_and_a_delivered_one_decides() {
        let f = Fixture::new().await;
        f.record("m1", 1001, vec![started(1)]).await;
        let none = Last { batch: "m1".into(), attempt: 1, status: None, failure: None };
        assert_eq!(f.fate().await, Fate::InFlight { last: none });
        f.record("m1", 1003, vec![ended(1, 503), Change::Retrying { due: at(2000) }]).await;
        assert_eq!(f.fate().await, Fate::Retrying { due: at(2000), last: last("m1", 1, 503) });
        let dead = || Change::Dead { reason: Reason::Exhausted, contents: None };
        f.record("m1", 2000, vec![started(2), ended(2, 500), dead()]).await;
        let reason = Reason::Exhausted;
        assert_eq!(f.fate().await, Fate::Dead { reason, last: last("m1", 2, 500) });
        f.record("m2", 3000, vec![started(1), ended(1, 200), Change::Delivered]).await;
        f.record("m3", 4000, vec![started(1), ended(1, 200), Change::Delivered]).await;
        assert_eq!(f.fate().await, Fate::Delivered { at: at(3001), last: last("m2", 1, 200) });
        assert!(f.fate().await.is_settled());
    }

    #[tokio::test]
    async fn many_subscribers_are_asked_for_together_and_each_has_its_own_answer() {
        let mut f = Fixture::new().await;
        let name = |n: u64| SubscriberName::from(&*format!("s-{n:03}"));
        let of = |n: u64| interest(if n.is_multiple_of(3) { "report.#" } else { "#" });
        f.configured = (0..300).map(|n| (name(n), wanted(of(n)))).collect();
        let all = (0..300).map(|n| (name(n), of(n))).collect();
        f.store.subscribed(all, at(20)).await.expect("records");
        // Of five one has it, one had it before the event's time, and one retries it.
        for n in 0..300 {
            let (seconds, status) = match n % 5 {
                0 => (1001, 200),
                1 => (400, 200),
                2 => (1001, 503),
                _ => continue,
            };
            let end = if status == 200 { Change::Delivered } else { Change::Paused };
            let changes = [started(1), ended(1, status), end].map(|change| DeliveryChange {
                id: (&*format!("m{n}")).into(),
                subscriber: name(n),
                at: at(seconds),
                change,
            });
            f.store.record(changes.to_vec()).await.expect("records");
        }
        let event = f.store.memory().events[0].clone();
        let found = async || {
            f.store.memory().searches = 0;
            let found = of_event(&f.store, &event, &f.configured, &f, f.now).await;
            (found.expect("answers"), f.store.memory().searches)
        };
        let (together, searches) = found().await;
        assert_eq!(searches, 4, "those that were to get it and the others, after and before it");
        // Subscriber `a` is not configured any more, and comes first.
        for (n, one) in (0..300).zip(&together[1..]) {
            let why = "it waited for its subscriber to be resumed, which is not known to be paused any more";
            let fate = match (n % 5, n % 3) {
                (0, _) => Fate::Delivered { at: at(1002), last: last(&format!("m{n}"), 1, 200) },
                (1, _) => Fate::Delivered { at: at(401), last: last(&format!("m{n}"), 1, 200) },
                (2, _) => Fate::Unknown { why: why.to_owned() },
                (_, 0) => Fate::NotMatched {
                    patterns: patterns("report.#"),
                    by_values: false,
                    tenant: None,
                },
                _ => continue,
            };
            assert_eq!((&one.subscriber, &one.fate), (&name(n), &fate), "{n}");
        }
        for answers_for in [1, 7] {
            f.store.memory().answers_for = Some(answers_for);
            assert_eq!(found().await.0, together, "{answers_for} at once");
        }
    }

    #[tokio::test]
    async fn what_was_accepted_stays_so_when_it_is_sent_again_and_refused() {
        let f = Fixture::new().await;
        f.record("m1", 1001, vec![started(1), ended(1, 200), Change::Delivered]).await;
        f.record("m1", 2000, vec![started(1), ended(1, 500), Change::Retrying { due: at(9000) }])
            .await;
        // The attempt began at 1001 s and took a second.
        assert_eq!(f.fate().await, Fate::Delivered { at: at(1002), last: last("m1", 1, 200) });
    }

    #[tokio::test]
    async fn what_is_under_way_is_unknown_if_a_later_change_may_be_missing() {
        let mut f = Fixture::new().await;
        f.record("m1", 1001, vec![started(1)]).await;
        f.store.memory().gaps.push(Gap {
            from: at(1100),
            until: at(1200),
            what: "deliveries",
            why: "the store was away".to_owned(),
            missing: None,
        });
        assert!(f.unknown().await.contains("the store was away"));
        // In the gap the batch was not due.
        f.record("m1", 1001, vec![ended(1, 503), Change::Retrying { due: at(1201) }]).await;
        assert_eq!(f.fate().await, Fate::Retrying { due: at(1201), last: last("m1", 1, 503) });
        // Unless an operator had it tried; the queue knows.
        f.has_batch = Some(false);
        let why = f.unknown().await;
        assert!(why.contains("does not have it") && why.contains("the store was away"), "{why}");
        f.record("m1", 1001, vec![Change::Retrying { due: at(1150) }]).await;
        f.has_batch = Some(true);
        assert_eq!(f.fate().await, Fate::Retrying { due: at(1150), last: last("m1", 1, 503) });
        f.has_batch = None;
        assert!(f.unknown().await.contains("the store was away"));
    }

    #[tokio::test]
    async fn what_was_sent_again_with_the_clock_set_back_is_found_before_the_event() {
        let f = Fixture::new().await;
        f.record("killed", 1001, vec![started(1)]).await;
        f.store.memory().gaps.push(Gap {
            from: at(900),
            until: at(1001),
            what: "deliveries",
            why: "the daemon was killed".to_owned(),
            missing: None,
        });
        f.record("again", 971, vec![started(1), ended(1, 200), Change::Delivered]).await;
        assert_eq!(f.fate().await, Fate::Delivered { at: at(972), last: last("again", 1, 200) });
    }

    #[tokio::test]
    async fn a_replay_by_other_patterns_is_seen_although_the_event_was_not_wanted_then() {
        let f = Fixture::new().await;
        f.subscribed("report.#", 500).await;
        f.subscribed("#", 2000).await;
        assert_eq!(
            f.fate().await,
            Fate::NotMatched { patterns: patterns("report.#"), by_values: false, tenant: None }
        );
        f.record("m1", 3000, vec![started(1), ended(1, 500), Change::Retrying { due: at(9000) }])
            .await;
        assert_eq!(f.fate().await, Fate::Retrying { due: at(9000), last: last("m1", 1, 500) });
    }

    #[tokio::test]
    async fn a_retry_that_is_long_overdue_is_unknown_unless_the_queue_has_it() {
        let mut f = Fixture::new().await;
        f.record("m1", 1001, vec![started(1), ended(1, 503), Change::Retrying { due: at(1083) }])
            .await;
        // Five minutes, and an eighth of 80 s.
        f.now = at(1083 + 300 + 10);
        let retrying = Fate::Retrying { due: at(1083), last: last("m1", 1, 503) };
        assert_eq!(f.fate().await, retrying);
        f.now = at(1083 + 300 + 11);
        let why = f.unknown().await;
        assert!(why.contains("1970-01-01T00:18:03Z") && why.contains("another daemon"), "{why}");
        f.has_batch = Some(true);
        assert_eq!(f.fate().await, retrying);
        f.has_batch = Some(false);
        assert!(f.unknown().await.contains("its end is not recorded"));
    }

    #[tokio::test]
    async fn an_attempt_that_never_ended_is_unknown_in_the_end() {
        let mut f = Fixture::new().await;
        f.record("m1", 1001, vec![started(1)]).await;
        f.now = at(1001 + 900);
        assert_eq!(f.fate().await.name(), "in_flight");
        f.now = at(1001 + 901);
        assert!(f.unknown().await.contains("has no end in history"));
    }

    #[tokio::test]
    async fn a_batch_waits_for_a_resumption_only_while_its_subscriber_is_paused() {
        let mut f = Fixture::new().await;
        f.record("m1", 1001, vec![started(1), ended(1, 503), Change::Paused]).await;
        assert!(f.unknown().await.contains("resumed"));
        let pause = Pause { why: "w".to_owned(), since: at(1), by: "operator".to_owned() };
        f.paused = Some(pause);
        assert_eq!(f.fate().await, Fate::Paused { last: last("m1", 1, 503) });
    }

    #[tokio::test]
    async fn a_split_batch_is_as_its_halves_are_and_an_interrupted_one_decides_nothing() {
        let mut f = Fixture::new().await;
        f.record("m1", 1001, vec![started(1), ended(1, 413), Change::Split]).await;
        assert!(f.unknown().await.contains("no delivery of it"));
        f.record("m1_0", 1010, vec![started(1), ended(1, 200), Change::Delivered]).await;
        assert_eq!(f.fate().await.name(), "delivered");
        f.store.memory().deliveries.truncate(1);
        f.store.memory().deliveries[0].state = DeliveryState::Interrupted;
        f.progress = Progress::Waits;
        assert_eq!(f.fate().await, Fate::Waiting { paused: None });
    }

    #[tokio::test]
    async fn a_producers_clock_that_is_ahead_hides_no_delivery() {
        let f = Fixture::new().await;
        f.record("m1", 400, vec![started(1), ended(1, 200), Change::Delivered]).await;
        assert_eq!(f.fate().await.name(), "delivered");
    }

    #[tokio::test]
    async fn an_event_whose_values_are_not_wanted_is_not_unknown_unless_it_was_sent() {
        let mut f = Fixture::new().await;
        let place = Pointer::try_new("/event").expect("a pointer");
        let condition = Condition { place, values: vec!["another".to_owned()] };
        let a = f.configured.get_mut("a").expect("is configured");
        a.conditions = Conditions::new(vec![condition]);
        let by_values = Fate::NotMatched { patterns: patterns("#"), by_values: true, tenant: None };
        assert_eq!(f.fate().await, by_values);
        f.configured.get_mut("a").expect("is configured").conditions = Conditions::default();
        assert!(matches!(f.fate().await, Fate::Unknown { .. }));
    }

    #[tokio::test]
    async fn patterns_of_the_events_time_decide_whether_it_was_wanted() {
        let f = Fixture::new().await;
        f.subscribed("report.#", 500).await;
        let not =
            Fate::NotMatched { patterns: patterns("report.#"), by_values: false, tenant: None };
        assert_eq!(f.fate().await, not);
        assert!(not.is_settled());
        f.subscribed("#", 1003).await;
        assert!(f.unknown().await.contains("changed within seconds"));
        f.store.memory().subscriptions.clear();
        f.subscribed("#", 2000).await;
        let why = f.unknown().await;
        assert_eq!(why, "history knows it from 1970-01-01T00:33:20Z on, and the event is older");
        f.store.memory().subscriptions[0].from = at(1);
        f.store.memory().subscriptions[0].until = Some(at(900));
        assert_eq!(
            f.fate().await,
            Fate::NotMatched { patterns: Vec::new(), by_values: false, tenant: None },
            "it was removed"
        );
    }

    #[tokio::test]
    async fn it_waits_only_if_the_queue_says_so() {
        let mut f = Fixture::new().await;
        for (progress, waits) in
            [(Progress::Waits, true), (Progress::Passed, false), (Progress::Unknown, false)]
        {
            f.progress = progress;
            assert_eq!(matches!(f.fate().await, Fate::Waiting { .. }), waits, "{progress:?}");
        }
        let pause = Pause { why: "w".to_owned(), since: at(1), by: "operator".to_owned() };
        (f.paused, f.progress) = (Some(pause.clone()), Progress::Waits);
        assert_eq!(f.fate().await, Fate::Waiting { paused: Some(pause) });
        f.configured.clear();
        assert_eq!(f.fate().await.name(), "unknown", "a removed subscriber has no lane");
    }

    #[tokio::test]
    async fn an_event_that_may_wait_is_unknown_with_the_number_of_those_that_wait() {
        let mut f = Fixture::new().await;
        f.record("m1", 1500, vec![started_with(1, Some(Arc::from([])))]).await;
        f.store.memory().deliveries[0].begun_at = at(900);
        for (waiting, part) in [
            (
                0,
                "recorded, and the queue does not say whether it still has it; nothing waits in the queue",
            ),
            (1, "; 1 event waits in the queue, and it may be among them"),
            (7, "; 7 events wait in the queue, and it may be among them"),
        ] {
            f.progress = Progress::Among(waiting);
            let why = f.unknown().await;
            assert!(why.ends_with(part), "{why}");
        }
        f.paused = Some(Pause { why: "w".to_owned(), since: at(1), by: "operator".to_owned() });
        assert!(f.unknown().await.ends_with("; the subscriber is paused"));
        f.record("m2", 1001, vec![started(1), ended(1, 200), Change::Delivered]).await;
        assert_eq!(f.fate().await.name(), "delivered");
    }

    #[tokio::test]
    async fn a_delivery_by_a_clock_that_was_a_day_behind_is_found() {
        let f = Fixture::new().await;
        f.store.memory().events[0].at = at(3 * 24 * 3600);
        f.record("m1", 2 * 24 * 3600 - 4, vec![started(1), ended(1, 200), Change::Delivered]).await;
        assert_eq!(f.fate().await.name(), "delivered");
        f.store.memory().deliveries[0].begun_at = at(2 * 24 * 3600 - 6);
        assert_eq!(f.fate().await.name(), "unknown", "further back none is looked for");
    }

    #[tokio::test]
    async fn unknown_says_what_history_lacks() {
        let f = Fixture::new().await;
        assert!(f.unknown().await.contains("no deliveries yet"));
        f.record("m0", 1500, vec![started_with(1, Some(Arc::from([])))]).await;
        let why = f.unknown().await;
        assert!(why.contains("1970-01-01T00:25:00Z on") && why.contains("the retention"), "{why}");
        f.store.memory().deliveries[0].begun_at = at(900);
        f.record("m1", 1500, vec![started_with(1, None)]).await;
        let why = f.unknown().await;
        assert!(why.contains("1 delivery of that time does not record"), "{why}");
        let gap = |from, until| Gap {
            from: at(from),
            until: at(until),
            what: "deliveries",
            why: "the store was away".to_owned(),
            missing: None,
        };
        f.store.memory().gaps.push(gap(100, 200));
        assert!(!f.unknown().await.contains("was away"), "the gap was before the event");
        f.store.memory().gaps.push(gap(1100, 1200));
        let why = f.unknown().await;
        assert!(why.contains("from 1970-01-01T00:18:20Z to 1970-01-01T00:20:00Z"), "{why}");
    }
}

//! Follows the state stream: reads what all daemons write, and carries out what [`Ownership`]
//! decides.

use std::{
    collections::BTreeSet,
    convert::Infallible,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use futures_util::StreamExt as _;
use lapin::{Consumer, message::Delivery};
use tokio::{
    sync::watch,
    time::{sleep, sleep_until, timeout},
};

use super::{
    broker_error::{BrokerError, RPC_TIMEOUT},
    declarations::EVERYTHING,
    ownership::{Action, Event, Notice, Ownership},
    pool::Lease,
    record::{About, Bindings, Bound, Patterns, Record, now},
    requests::Broker,
    shared::Shared,
    snapshot::{self, Opened},
    state_stream::{self, STREAM_IDLE, ack},
    topology::Topology,
    upkeep::Upkeep,
};
use crate::{
    clock,
    config::Subscribers,
    delivery::{PauseState, SubscriberName},
    queue::QueueError,
    telemetry::outage::ReportedOutage,
};

/// The longest that a record stays unacked when no other comes. The broker closes the channel of a
/// consumer that keeps one for its consumer timeout, which is 30 minutes by default.
const ACK_WITHIN: Duration = Duration::from_secs(1);

/// Follows the state stream: passes on pauses, and unbinds patterns that only earlier
/// configurations had. Alongside the lanes, because it has to publish, and a broker that blocks
/// publishing can still be consumed.
pub(super) async fn follow(shared: &Shared, subscribers: watch::Receiver<Subscribers>) {
    shared.follows.store(true, Ordering::Relaxed);
    let mut follower = Follower::new(shared, subscribers);
    let mut following = shared.outage("following the record of bindings and pauses");
    loop {
        let Err(e) = follower.follow(&mut following).await;
        following.failed(&e).await;
    }
}

/// Reads the state stream of a daemon, and keeps its subscribers bound.
struct Follower<'a> {
    shared: &'a Shared,
    configured: watch::Receiver<Subscribers>,
    /// The subscribers that `ownership` knows of.
    subscribers: Subscribers,
    ownership: Ownership,
    /// Reasons why something cannot be bound or unbound that were logged.
    logged: BTreeSet<String>,
    upkeep: Upkeep<'a>,
    /// The recorded patterns that were reported last.
    matched: Option<Patterns>,
}

/// The state stream from one opening to the next.
struct Reading {
    lease: Lease,
    /// Id of the mark that this daemon writes at the begin.
    mark: String,
    /// It was written.
    is_marked: bool,
    /// It was read, and so was all that the stream held.
    is_up_to_date: bool,
    /// Records read, and records that the snapshot stood for.
    read: u64,
    passed: u64,
    /// When the latest record arrived.
    latest: Instant,
    /// Tag of the latest record, until it is acked.
    unacked: Option<u64>,
    /// When the bindings were last checked.
    checked: Instant,
}

/// An event that following waits for.
enum Next {
    /// The mark was written, or not.
    Mark(Result<(), QueueError>),
    Record(Option<Box<lapin::Result<Delivery>>>),
    Configured,
    Upkeep,
    Check,
    Ack,
    Silence,
}

impl<'a> Follower<'a> {
    fn new(shared: &'a Shared, mut configured: watch::Receiver<Subscribers>) -> Self {
        let subscribers = configured.borrow_and_update().clone();
        let ownership = Ownership::new(
            shared.topology.events(),
            wanted(&shared.topology, &subscribers),
            shared.removals.clone(),
        );
        Self {
            shared,
            configured,
            subscribers,
            ownership,
            logged: BTreeSet::new(),
            upkeep: Upkeep::new(shared),
            matched: None,
        }
    }

    fn topology(&self) -> &'a Topology {
        &self.shared.topology
    }

    /// Reads the stream to its end, removes what only earlier configurations had, and then follows
    /// what other daemons write, until it fails.
    async fn follow(&mut self, following: &mut ReportedOutage) -> Result<Infallible, QueueError> {
        let mut broker = self.shared.broker();
        let (mut reading, mut records) = self.open(&mut broker).await?;
        let (topology, publisher) = (self.topology(), self.shared.publisher());
        let mark = Record::Mark { mark: reading.mark.clone() };
        let mut marking = std::pin::pin!(state_stream::write(topology, publisher, &mark));
        let mut removals = self.shared.removals.changes();
        loop {
            if reading.is_up_to_date {
                self.report_bindings();
            }
            let up_to_date = reading.is_up_to_date;
            // Records that commands write, one after the other, must not put a check off.
            let next_check = reading.checked + self.ownership.next_check();
            let check_due = async {
                tokio::select! {
                    () = sleep_until(next_check.into()) => {}
                    Ok(()) = removals.changed() => {}
                }
            };
            let next = tokio::select! {
                wrote = &mut marking, if !reading.is_marked => Next::Mark(wrote),
                next = records.next() => Next::Record(next.map(Box::new)),
                Ok(()) = self.configured.changed(), if up_to_date => Next::Configured,
                () = self.upkeep.due(), if up_to_date => Next::Upkeep,
                () = check_due, if up_to_date => Next::Check,
                () = sleep_until((reading.latest + ACK_WITHIN).into()), if reading.unacked.is_some() => Next::Ack,
                () = sleep(RPC_TIMEOUT), if reading.is_marked && !up_to_date => Next::Silence,
            };
            match next {
                Next::Mark(wrote) => {
                    reading.is_marked = true;
                    if wrote.is_err() {
                        self.without_mark(&reading);
                    }
                    wrote?;
                }
                Next::Record(next) => {
                    let next = next.ok_or_else(|| self.error("its consumer was cancelled"))?;
                    let delivery = next.map_err(|e| self.error(&BrokerError::from(e)))?;
                    self.read(&mut broker, &mut reading, delivery).await?;
                    if reading.is_up_to_date && !up_to_date {
                        following.recovered();
                    }
                }
                Next::Configured => {
                    self.configure(&mut broker).await?;
                    reading.checked = clock::instant();
                }
                Next::Upkeep => {
                    let patterns = self.ownership.to_be_bound();
                    self.upkeep.check(&mut broker, &self.subscribers, &patterns).await;
                }
                Next::Check => {
                    reading.checked = clock::instant();
                    self.on(&mut broker, Event::CheckDue).await?;
                }
                Next::Ack => {
                    if let Some(tag) = reading.unacked.take() {
                        ack(&reading.lease, tag, true).await.map_err(|why| self.error(&why))?;
                    }
                }
                Next::Silence => {
                    return Err(self.error("the broker sent no more records before the last one"));
                }
            }
        }
    }

    async fn open(&mut self, broker: &mut Broker<'_>) -> Result<(Reading, Consumer), QueueError> {
        let (topology, pool) = (self.topology(), &self.shared.declaring);
        topology.ensure_state(broker).await?;
        // What this daemon has recorded and not read yet has to come as a record of its own.
        let opened = if self.shared.recorded().is_empty() {
            snapshot::open(pool, topology).await?
        } else {
            snapshot::open_whole(pool, topology).await?
        };
        let Opened { lease, records, recorded, passed } = opened;
        self.ownership.reopened(recorded);
        let now = clock::instant();
        let reading = Reading {
            lease,
            mark: clock::batch_id(),
            is_marked: false,
            is_up_to_date: false,
            read: 0,
            passed,
            latest: now,
            unacked: None,
            checked: now,
        };
        Ok((reading, records))
    }

    async fn configure(&mut self, broker: &mut Broker<'_>) -> Result<(), QueueError> {
        self.subscribers = self.configured.borrow_and_update().clone();
        self.logged.clear();
        let wanted = wanted(self.topology(), &self.subscribers);
        self.on(broker, Event::Configured(wanted)).await
    }

    async fn read(
        &mut self,
        broker: &mut Broker<'_>,
        reading: &mut Reading,
        delivery: Delivery,
    ) -> Result<(), QueueError> {
        reading.latest = clock::instant();
        reading.read += 1;
        let tag = delivery.delivery_tag;
        let acked = ack(&reading.lease, tag, reading.is_up_to_date).await;
        let acked = acked.map_err(|why| self.error(&why))?;
        reading.unacked = (!acked).then_some(tag);
        let record = match serde_json::from_slice::<Record>(&delivery.data) {
            Ok(Record::Mark { mark }) if mark == reading.mark => {
                return self.read_to_end(broker, reading, &delivery).await;
            }
            Ok(record) => record,
            Err(e) => {
                tracing::warn!(stream = self.topology().state(), error = %e, "a record is not understood and left alone");
                return Ok(());
            }
        };
        let about = self.ownership.apply(record);
        if let About::PauseState(name) = &about {
            self.forget_own(name);
        }
        if !reading.is_up_to_date {
            return Ok(());
        }
        match &about {
            About::Bindings(_) => self.report_removed(),
            About::Pruned(name) => {
                self.report_removed();
                self.shared.pause_states.send_modify(|all| {
                    drop(all.as_mut().map(|all| Arc::make_mut(all).remove(name)))
                });
            }
            About::PauseState(name) => self.report_pause(name),
            About::Asked(_) | About::Nothing => {}
        }
        self.on(broker, Event::Read(about)).await
    }

    /// The stream was read up to this daemon's own mark.
    async fn read_to_end(
        &mut self,
        broker: &mut Broker<'_>,
        reading: &mut Reading,
        mark: &Delivery,
    ) -> Result<(), QueueError> {
        reading.is_up_to_date = true;
        let (records, passed) = (reading.read, reading.passed);
        let stream = self.topology().state();
        tracing::debug!(stream, records, passed, "the record was read to its end");
        if let Some(offset) = snapshot::offset_of(mark).filter(|_| records > snapshot::WORTHWHILE) {
            self.save(&reading.mark, offset).await;
        }
        let known = self.shared.pause_states.borrow().clone().unwrap_or_default();
        self.on(broker, Event::ReadToEnd { known }).await?;
        reading.checked = clock::instant();
        Ok(())
    }

    /// Writes a snapshot of a record that took long to read. Nothing depends on it.
    async fn save(&self, mark: &str, offset: u64) {
        let saved = snapshot::save(
            &self.shared.declaring,
            self.shared.publisher(),
            self.topology(),
            self.ownership.recorded(),
            mark,
            offset,
        );
        let error = match timeout(RPC_TIMEOUT, saved).await {
            Ok(Ok(())) => return,
            Ok(Err(e)) => e.to_string(),
            Err(_) => "it was not confirmed in time".to_owned(),
        };
        tracing::warn!(
            stream = self.topology().snapshot(),
            error,
            "no snapshot of the record could be written; the next start reads all of it again"
        );
    }

    /// A broker that blocks publishing takes no mark. When it has sent nothing for [`STREAM_IDLE`],
    /// everything has been read. Otherwise a daemon that starts meanwhile would deliver nothing.
    fn without_mark(&self, reading: &Reading) {
        let is_quiet = clock::instant() - reading.latest > STREAM_IDLE;
        if !is_quiet || !reading.lease.channel.status().connected() {
            return;
        }
        self.shared.pause_states.send_if_modified(|known| {
            let is_first = known.is_none();
            if is_first {
                tracing::warn!(
                    stream = self.topology().state(),
                    "the broker takes no messages now; who is paused is taken from the records that have arrived"
                );
                *known = Some(self.ownership.recorded().pause_states.clone());
            }
            is_first
        });
    }

    /// Reports all pauses. A pause that this daemon has recorded and not read yet counts already.
    fn report_pauses(&self) {
        let mut all = self.ownership.recorded().pause_states.clone();
        for (name, pause_state) in self.shared.recorded().iter() {
            Arc::make_mut(&mut all).insert(name.clone(), pause_state.clone());
        }
        self.shared.pause_states.send_replace(Some(all));
    }

    /// Reports one pause alone: of another subscriber this daemon may have recorded something that
    /// it has not read yet.
    fn report_pause(&self, name: &SubscriberName) {
        if let Some(pause_state) = self.ownership.recorded().pause_states.get(name).cloned() {
            self.shared.pause_states.send_modify(|all| {
                drop(Arc::make_mut(all.get_or_insert_default()).insert(name.clone(), pause_state))
            });
        }
    }

    /// A pause was read. If this daemon has written it, it need not be remembered any more.
    fn forget_own(&self, name: &SubscriberName) {
        let mut own = self.shared.recorded();
        // As they are written, which has milliseconds.
        let text =
            |pause_state: &PauseState| serde_json::to_string(&Record::of(name, pause_state)).ok();
        let read = self.ownership.recorded().pause_states.get(name);
        if own.get(name).is_some_and(|own| text(own) == read.and_then(text)) {
            own.remove(name);
        }
    }

    /// Reports what has to be bound, the patterns that events are compared with, and the stores that
    /// have history, and subscribers made over the API.
    fn report_bindings(&mut self) {
        *self.shared.bound() = self.ownership.to_be_bound();
        let recorded = self.ownership.recorded();
        let patterns = recorded.bound_to(&self.topology().events());
        if self.matched.as_ref() != Some(&patterns) {
            self.shared.matches_by(|matching| matching.with_recorded(&patterns));
        }
        // Before the store: its queue is bound once that is known.
        self.shared.history.report_lack(recorded.history_lacks.as_ref());
        let stores = [
            (&self.shared.manager, &recorded.manager),
            (&self.shared.history.recorded, &recorded.store),
        ];
        for (known, store) in stores {
            known.send_if_modified(|known| {
                let is_new = known.as_ref() != Some(store);
                if is_new {
                    *known = Some(store.clone());
                }
                is_new
            });
        }
        self.matched = Some(patterns);
    }

    fn report_removed(&self) {
        let removed = &self.ownership.recorded().removed;
        self.shared.removed.send_if_modified(|known| {
            let is_new = known != removed;
            if is_new {
                known.clone_from(removed);
            }
            is_new
        });
    }

    /// Lets `ownership` decide, and carries that out.
    async fn on(&mut self, broker: &mut Broker<'_>, event: Event) -> Result<(), QueueError> {
        let mut left = vec![Action::Then(event)];
        while let Some(action) = left.pop() {
            if let Some(event) = self.carry_out(broker, action).await? {
                let actions = self.ownership.on(event, clock::instant());
                left.extend(actions.into_iter().rev());
            }
        }
        Ok(())
    }

    /// Returns the result of an action that has one.
    async fn carry_out(
        &mut self,
        broker: &mut Broker<'_>,
        action: Action,
    ) -> Result<Option<Event>, QueueError> {
        match action {
            Action::Then(event) => return Ok(Some(event)),
            Action::Bind { subscriber, purpose } => {
                let succeeded = self.bind(broker, &subscriber).await;
                return Ok(Some(Event::Bound { subscriber, purpose, succeeded }));
            }
            Action::Unbind { subscriber, former } => {
                let left = self.unbind(broker, &subscriber, &former).await;
                return Ok(Some(Event::Unbound { subscriber, former, left }));
            }
            Action::CheckAlone => return Ok(Some(Event::Alone(self.is_alone(broker).await))),
            Action::CheckConsumers(subscriber) => {
                let elsewhere = self.is_consumed_elsewhere(broker, &subscriber).await;
                return Ok(Some(Event::Consumed { subscriber, elsewhere }));
            }
            Action::ReleaseWitness(exchange) => {
                if let Err(e) = self.topology().release_witness(broker, &exchange).await {
                    tracing::debug!(exchange, error = %e, "the witness stays bound to an exchange that is not configured any more");
                }
                // Its events are not delivered any more, so history does not get them either.
                let history = self.topology().history();
                if let Err(e) = broker.unbind(&history, &exchange, EVERYTHING).await {
                    tracing::debug!(exchange, error = %e, "history stays bound to an exchange that is not configured any more");
                }
            }
            Action::Claim { subscriber, bound: Bound { exchange, patterns } } => {
                let exchange = Some(exchange);
                self.write(&Record::Bound { subscriber, exchange, patterns, at: now() }).await?;
            }
            Action::Release(subscriber) => {
                let (removed, pruned) = (true, false);
                self.write(&Record::Removed { subscriber, removed, pruned, at: now() }).await?;
            }
            Action::Ask(asked) => self.write(&Record::Asked { asked }).await?,
            Action::RecordPause { subscriber, pause_state } => {
                self.write(&Record::of(&subscriber, &pause_state)).await?;
            }
            Action::ReportState => {
                self.report_removed();
                self.report_pauses();
            }
            Action::CheckWitness { is_expected } => {
                let has_store = self.ownership.recorded().store.is_some();
                self.upkeep.first_witness(broker, is_expected, has_store).await;
            }
            Action::Log(notice) => self.log(&notice),
        }
        Ok(None)
    }

    /// Declares and binds; returns whether that has succeeded. A failure with one subscriber keeps
    /// this from no other.
    async fn bind(&mut self, broker: &mut Broker<'_>, name: &SubscriberName) -> bool {
        let Some(s) = self.subscribers.iter().find(|s| s.name == *name).cloned() else {
            return false;
        };
        let bound = self.shared.ensure_subscriber(broker, &s).await;
        self.log_failure(name, bound)
    }

    /// Returns the patterns that are still bound.
    async fn unbind(
        &mut self,
        broker: &mut Broker<'_>,
        name: &SubscriberName,
        Bound { exchange, patterns }: &Bound,
    ) -> BTreeSet<String> {
        let mut left = BTreeSet::new();
        for pattern in patterns {
            if !self.unbind_one(broker, name, exchange, pattern).await {
                left.insert(pattern.clone());
            }
        }
        left
    }

    /// Unbinds a pattern. A pattern in `prepared` stays: a reload has bound it, and this task has
    /// not seen that reload yet.
    async fn unbind_one(
        &mut self,
        broker: &mut Broker<'_>,
        name: &SubscriberName,
        exchange: &str,
        pattern: &str,
    ) -> bool {
        // Held until it is unbound, so that what is bound later stays.
        let shared = self.shared;
        let prepared = shared.prepared.lock().await;
        if exchange == self.topology().events()
            && prepared.get(name).is_some_and(|patterns| patterns.contains(pattern))
        {
            return true;
        }
        let unbound = broker.unbind(&self.topology().main(name), exchange, pattern).await;
        drop(prepared);
        self.log_failure(name, unbound)
    }

    /// Whether another daemon consumes the queue of a subscriber; `None` if the broker does not
    /// say.
    async fn is_consumed_elsewhere(
        &mut self,
        broker: &mut Broker<'_>,
        name: &SubscriberName,
    ) -> Option<bool> {
        // This daemon's own lane may still finish its requests.
        let own = self.shared.consumers_of(name);
        match broker.depth(&self.topology().main(name)).await {
            Ok(depth) => Some(depth.is_some_and(|d| d.consumers > own)),
            Err(e) => {
                self.log_failure(name, Err(e));
                None
            }
        }
    }

    /// Whether no other daemon seems to run. The broker does not say who reads a stream, but
    /// another daemon consumes the queues that this one consumes. If this one consumes none, as
    /// when all receivers are down, that says nothing.
    async fn is_alone(&self, broker: &mut Broker<'_>) -> bool {
        if !self.shared.consumers_are_counted() {
            return false;
        }
        let mut consumes = false;
        for s in self.subscribers.iter() {
            let own = self.shared.consumers_of(&s.name);
            consumes |= own > 0;
            match broker.depth(&self.topology().main(&s.name)).await {
                Ok(depth) if depth.is_none_or(|d| d.consumers <= own) => {}
                // Or it does not answer, which says nothing.
                Ok(_) | Err(_) => return false,
            }
        }
        consumes
    }

    /// Logs a failure, once for each reason. Returns whether there was none.
    fn log_failure(&mut self, subscriber: &SubscriberName, done: Result<(), QueueError>) -> bool {
        if let Err(e) = &done
            && self.logged.insert(format!("{subscriber}: {e}"))
        {
            tracing::error!(subscriber = subscriber.as_str(), error = %e, "its bindings cannot be put right; it is tried again each minute");
        }
        done.is_ok()
    }

    async fn write(&self, record: &Record) -> Result<(), QueueError> {
        state_stream::write(self.topology(), self.shared.publisher(), record).await
    }

    fn error(&self, why: &(impl std::fmt::Display + ?Sized)) -> QueueError {
        state_stream::error(self.topology(), why)
    }

    fn log(&self, notice: &Notice) {
        let stream = || self.topology().state();
        match notice {
            Notice::RecordLost => tracing::warn!(
                stream = stream(),
                "the record is empty, so it was deleted; bindings and pauses are written again"
            ),
            Notice::ClaimLost(subscriber) => tracing::warn!(
                subscriber = subscriber.as_str(),
                stream = stream(),
                "it is not in the record any more, and is written again"
            ),
            Notice::Differs(subscriber) => tracing::error!(
                subscriber = subscriber.as_str(),
                "another daemon with the same [queue] prefix has another configuration of this subscriber, or none; \
                 its queue is bound with what both say: give all daemons the same configuration and restart them"
            ),
            Notice::ConsumedElsewhere(subscriber) => tracing::warn!(
                subscriber = subscriber.as_str(),
                "not configured here, but another daemon delivers its events: it stays bound as long as it does"
            ),
            Notice::ClaimedElsewhere(subscriber) => tracing::warn!(
                subscriber = subscriber.as_str(),
                "not configured here, but another daemon has it: it stays bound"
            ),
            Notice::Unbound(subscriber) => tracing::warn!(
                subscriber = subscriber.as_str(),
                queue = self.topology().main(subscriber),
                "a subscriber that is not configured any more was unbound; its backlog stays"
            ),
            Notice::PatternUnbound { subscriber, exchange, pattern } => tracing::warn!(
                subscriber = subscriber.as_str(),
                exchange,
                pattern,
                "unbound a pattern that is not configured any more"
            ),
        }
    }
}

/// The bindings of a configuration.
fn wanted(topology: &Topology, subscribers: &Subscribers) -> Bindings {
    let exchange = topology.events();
    let bound = |patterns| Bound { exchange: exchange.clone(), patterns };
    let patterns = subscribers
        .iter()
        .map(|s| (s.name.clone(), bound(s.events.iter().map(|p| p.as_str().to_owned()).collect())));
    patterns.collect()
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;
    use crate::{config::testing, delivery::Pause, telemetry::metrics::Metrics};

    fn without_a_broker() -> (Shared, watch::Receiver<Subscribers>) {
        let config = testing::config(
            &("[queue]\nurl = \"amqp://nobody.invalid\"\n".to_owned() + &testing::table("a", "")),
        );
        let crate::config::Backend::Amqp(amqp) = config.queue.backend else {
            panic!("another queue")
        };
        let shared = Shared::new(amqp, Metrics::new(clock::now()));
        (shared, watch::Sender::new(config.subscribers).subscribe())
    }

    #[tokio::test]
    async fn what_this_daemon_has_recorded_counts_until_it_has_read_it() {
        let (shared, configured) = without_a_broker();
        let mut follower = Follower::new(&shared, configured);
        let at = SystemTime::UNIX_EPOCH + Duration::from_nanos(1_700_000_000_123_456_789);
        let (paused, resumed) = (
            Pause { why: "410".to_owned(), since: at, by: "receiver".to_owned() },
            PauseState::Resumed { at },
        );
        let mut read = |pause_state: &PauseState| {
            let line =
                serde_json::to_string(&Record::of(&"a".into(), pause_state)).expect("prints");
            follower.ownership.apply(serde_json::from_str(&line).expect("a record"));
            follower.forget_own(&"a".into());
            follower.report_pauses();
            shared
                .pause_states
                .borrow()
                .clone()
                .expect("known")
                .get("a")
                .cloned()
                .expect("a standing")
        };
        read(&resumed);
        // It is confirmed, and stands behind the mark.
        shared.recorded().insert("a".into(), PauseState::Paused(paused.clone()));
        assert_eq!(read(&resumed), PauseState::Paused(paused.clone()));
        assert!(matches!(read(&PauseState::Paused(paused)), PauseState::Paused(_)));
        assert!(
            matches!(read(&resumed), PauseState::Resumed { .. }),
            "another daemon's, written later"
        );
    }
}

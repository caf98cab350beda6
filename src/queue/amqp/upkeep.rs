//! What somebody deletes under the daemon is put back: bindings, the ladder, queues. Checked each
//! minute, and at once when a message finds no queue.
//!
//! AMQP tells nobody whether a binding exists, and binding what is bound changes nothing. So
//! bindings are simply made again, and what was missing is known only where something shows it: a
//! queue or an exchange that is not there, the witness ([`Topology::ensure_witness`]), a message
//! that came back, or the management API.

use std::{
    collections::BTreeSet,
    sync::{Arc, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use tokio::time::timeout;

use super::{
    AmqpQueue, ladder, lane,
    management::Management,
    record::Patterns,
    state,
    topology::{Broker, Topology},
};
use crate::{
    clock,
    config::Subscriber,
    delivery::SubscriberName,
    event::Pattern,
    queue::QueueError,
    telemetry::{outage::ReportedOutage, troubles::Harms},
};

/// Between two checks when nothing seems to be missing.
const INTERVAL: Duration = Duration::from_secs(60);

/// Before the ladder is checked for the first time: the lanes have their connections by then.
const FIRST_REST: Duration = Duration::from_secs(10);

/// Between two checks whatever happens.
const SOONEST: Duration = Duration::from_secs(5);

/// How long an exchange has to be absent before it is declared: a producer that deletes it, to
/// declare it with other arguments, would be refused if another one were there.
const SECOND_LOOK: Duration = Duration::from_secs(10);

/// For putting back what a settlement found missing.
const MENDING: Duration = Duration::from_secs(30);

/// When the next check is due, and what an absent exchange asks for.
#[derive(Debug)]
struct Schedule {
    last: Instant,
    absent_since: Option<Instant>,
    /// Somebody has seen that something is missing; or the last check could not put it right.
    soon: bool,
}

impl Schedule {
    /// What is bound at the start counts as the first check.
    fn new(now: Instant) -> Self {
        Self { last: now, absent_since: None, soon: false }
    }

    fn due(&self) -> Instant {
        let next = self.last + if self.soon { SOONEST } else { INTERVAL };
        let second_look =
            self.absent_since.map(|since| since + SECOND_LOOK).filter(|at| *at > self.last);
        second_look.map_or(next, |at| at.min(next))
    }

    fn checked(&mut self, now: Instant, well: bool) {
        (self.last, self.soon) = (now, !well);
    }

    /// The exchange is absent. Returns whether it is to be declared now.
    fn absent(&mut self, now: Instant) -> bool {
        now.saturating_duration_since(*self.absent_since.get_or_insert(now)) >= SECOND_LOOK
    }

    fn present(&mut self) {
        self.absent_since = None;
    }
}

/// Keeps subscribers' queues and bindings in place.
pub(super) struct Upkeep<'a> {
    queue: &'a AmqpQueue,
    topology: &'a Topology,
    schedule: Schedule,
    api: Option<Management>,
    told: BTreeSet<String>,
}

/// What a check found missing.
#[derive(Debug, Default)]
struct Missing {
    /// The exchange was deleted, with all its bindings.
    exchange: bool,
    declared: Vec<String>,
    /// As the management API shows them.
    bindings: Vec<String>,
}

impl<'a> Upkeep<'a> {
    pub(super) fn new(queue: &'a AmqpQueue) -> Self {
        let topology = queue.topology();
        let uri = topology.url().expose().as_str().parse().ok();
        let api = topology
            .management_url()
            .zip(uri)
            .and_then(|(url, uri)| Management::try_new(url, &uri).ok());
        Self {
            queue,
            topology,
            schedule: Schedule::new(clock::instant()),
            api,
            told: BTreeSet::new(),
        }
    }

    /// A record that was there before tells that there were bindings, and so a witness.
    pub(super) fn began_with_record(&self) {
        if self.queue.0.witnessed.get() == Some(&false) {
            Missing { exchange: true, ..Missing::default() }.tell(self.topology, None);
        }
    }

    /// Waits until the next check is due.
    pub(super) async fn due(&mut self) {
        loop {
            let due = self.schedule.due();
            tokio::select! {
                () = tokio::time::sleep_until(due.into()) => return,
                () = self.queue.0.unbound.notified() => self.schedule.soon = true,
            }
        }
    }

    /// Sees to it that the exchange is there, and that each of these subscribers has its queues,
    /// and `patterns` of the record bound to it. What goes wrong with one keeps this from no other.
    pub(super) async fn check(
        &mut self,
        broker: &mut Broker<'_>,
        subscribers: &[Arc<Subscriber>],
        patterns: &Patterns,
    ) {
        broker.take_declared();
        let mut missing = Missing::default();
        let exchange = self.exchange(broker, &mut missing).await;
        let well = match exchange {
            Ok(true) => self.subscribers(broker, subscribers, patterns, &mut missing).await,
            Ok(false) => true,
            Err(e) => {
                self.fails("the exchange of the events", Harms::Lanes, &e);
                false
            }
        };
        missing.declared = broker.take_declared();
        let mut sound = self.queue.0.sound.lock().unwrap_or_else(PoisonError::into_inner);
        missing.tell(self.topology, *sound);
        if well && self.schedule.absent_since.is_none() {
            *sound = Some(clock::now());
        }
        self.schedule.checked(clock::instant(), well);
    }

    /// Whether the exchange is there, by now.
    async fn exchange(
        &mut self,
        broker: &mut Broker<'_>,
        missing: &mut Missing,
    ) -> Result<bool, QueueError> {
        let topology = self.topology;
        if !topology.has_events(broker).await? {
            if !self.schedule.absent(clock::instant()) {
                let why = format!(
                    "exchange `{}` does not exist any more, so that producers cannot publish; unless its owner declares it, that is done here in {} s",
                    topology.events(),
                    SECOND_LOOK.as_secs()
                );
                self.fails("the exchange of the events", Harms::Lanes, &QueueError::new(why));
                return Ok(false);
            }
            topology.ensure_events(broker).await?;
        }
        self.schedule.present();
        if !topology.has_witness(broker).await? {
            missing.exchange = true;
            self.queue.witness(broker).await;
        }
        self.ends("the exchange of the events");
        Ok(true)
    }

    /// Returns whether all is in place.
    async fn subscribers(
        &mut self,
        broker: &mut Broker<'_>,
        subscribers: &[Arc<Subscriber>],
        patterns: &Patterns,
        missing: &mut Missing,
    ) -> bool {
        let events = self.topology.events();
        let known = match &self.api {
            Some(api) => api.bindings_of(&events).await.ok(),
            None => None,
        };
        let mut well = true;
        for s in subscribers {
            let Some(patterns) = patterns.get(&s.name) else { continue };
            if let Some(known) = &known {
                let main = self.topology.main(&s.name);
                let unbound = patterns.iter().filter(|p| {
                    !known.iter().any(|b| b.destination == main && b.routing_key == **p)
                });
                missing.bindings.extend(unbound.map(|p| format!("{main} <- {p}")));
            }
            let about = format!("subscriber `{}`", s.name);
            match self.topology.put_back_subscriber(broker, &s.name, patterns).await {
                Ok(()) => self.ends(&about),
                Err(e) => {
                    well &= e.is_for_operator();
                    self.fails(&about, Harms::Subscriber(s.name.clone()), &e);
                }
            }
        }
        well
    }

    fn fails(&mut self, about: &str, harms: Harms, e: &QueueError) {
        self.queue.0.troubles.send_if_modified(|all| all.begins(about, harms, e.to_string()));
        if self.told.insert(format!("{about}: {e}")) {
            tracing::error!(error = %e, "{about}: not as it should be; checked again");
        }
    }

    fn ends(&mut self, about: &str) {
        self.told.retain(|told| !told.starts_with(about));
        if self.queue.0.troubles.send_if_modified(|all| all.ends(about)) {
            tracing::info!("{about}: as it should be again");
        }
    }
}

impl Drop for Upkeep<'_> {
    /// What nobody checks any more is not known.
    fn drop(&mut self) {
        self.queue.0.troubles.send_if_modified(|all| all.retain(|about| !is_of_upkeep(about)));
    }
}

fn is_of_upkeep(about: &str) -> bool {
    about == "the exchange of the events" || about.starts_with("subscriber `")
}

impl Missing {
    fn tell(&self, topology: &Topology, sound: Option<SystemTime>) {
        let since =
            sound.map_or_else(|| "a time when no daemon ran".to_owned(), clock::rfc3339_seconds);
        if self.exchange {
            tracing::error!(
                exchange = topology.events(),
                since,
                "the exchange was deleted, and its bindings with it, and declared again: they are put back; what was published meanwhile may be lost"
            );
        } else if !self.bindings.is_empty() {
            let bindings = self.bindings.join(", ");
            tracing::error!(
                bindings,
                since,
                "bindings were missing and are put back: what was published for them meanwhile is lost"
            );
        }
        for name in &self.declared {
            tracing::error!(
                name,
                since,
                "was missing and is declared again: what was in it, and what was published for it meanwhile, is lost"
            );
        }
    }
}

/// Of what all lanes share, and of a lane's ways back.
pub(super) fn log_put_back(broker: &mut Broker<'_>) {
    for name in broker.take_declared() {
        tracing::error!(
            name,
            "was missing and is declared again: batches or dead letters that were in it are lost"
        );
    }
}

impl AmqpQueue {
    /// Declares the witness. Who may not bind it goes without.
    async fn witness(&self, broker: &mut Broker<'_>) {
        if let Err(e) = self.topology().ensure_witness(broker).await {
            tracing::debug!(error = %e, "whether the exchange is deleted and declared again cannot be noticed");
        }
    }

    /// Looks at a start whether there is a witness, before anything is bound and recorded, and
    /// declares it.
    pub(super) async fn first_witness(&self, broker: &mut Broker<'_>) {
        if self.0.witnessed.get().is_none()
            && let Ok(there) = self.topology().has_witness(broker).await
        {
            self.0.witnessed.set(there).ok();
            self.witness(broker).await;
        }
    }

    /// Keeps the ladder and the orphans in place.
    pub(super) async fn keep_own(&self) {
        let mut keeping = ReportedOutage::new("the delay ladder", Harms::Lanes, &self.0.troubles);
        let mut damaged = self.0.damaged.subscribe();
        let (mut tried_at, mut rest) = (None, FIRST_REST);
        loop {
            tokio::select! {
                () = tokio::time::sleep(rest) => {}
                _ = damaged.wait_for(|damaged| *damaged) => {}
            }
            rest = INTERVAL;
            loop {
                let mut kept = self.mend(None).await;
                if kept.is_ok() {
                    self.0.damaged.send_replace(false);
                    // A broker that nobody has connected to again was not restarted, and has lost
                    // nothing since.
                    if tried_at != Some(self.0.dialer.connects()) {
                        kept = self.try_ladder().await;
                        tried_at = Some(self.0.dialer.connects()).filter(|_| kept.is_ok());
                    }
                }
                match kept {
                    Ok(()) => break,
                    Err(e) => keeping.failed(&e).await,
                }
            }
            keeping.recovered();
        }
    }

    /// Consumes each level that seems to be empty, for a moment. One that the broker has lost the
    /// use of seems to be, and what other levels hand on to it waits for good: only its consumers
    /// and publishers are told.
    async fn try_ladder(&self) -> Result<(), QueueError> {
        // Limits of connections and channels leave room for those that the daemon needs, and
        // perhaps for no others.
        let untried =
            |e: QueueError| tracing::debug!(error = %e, "the delay ladder could not be tried");
        let quarantine = match self.0.consuming.quarantine().await {
            Ok(quarantine) => quarantine,
            Err(e) => {
                untried(e);
                return Ok(());
            }
        };
        let mut broker = self.broker();
        let mut suspect = None;
        for level in 0..ladder::LEVELS {
            let name = self.topology().level(level);
            let is_idle = broker
                .depth(&name)
                .await?
                .is_some_and(|depth| depth.messages == 0 && depth.consumers == 0);
            if !is_idle {
                continue;
            }
            let lease = match quarantine.lease().await {
                Ok(lease) => lease,
                Err(e) => {
                    untried(e);
                    break;
                }
            };
            if lane::try_consume(&lease, &name).await.is_err_and(|e| e.is_broken()) {
                suspect = Some(name);
                break;
            }
        }
        quarantine.close().await;
        let Some(name) = suspect else { return Ok(()) };
        self.usable(&name).await?.map_err(|unusable| unusable.into_error("SUBSCRIBER"))
    }

    /// What a settlement is written to was not there: puts back what a subscriber shares with all
    /// others, and its own ways back.
    ///
    /// # Errors
    /// It cannot be put back; from then on nothing is [`writable`](crate::queue::Queue::writable)
    /// before it can.
    pub(super) async fn put_back(&self, subscriber: &str) -> Result<(), QueueError> {
        let late = || {
            QueueError::new(format!(
                "what is missing could not be declared within {} s",
                MENDING.as_secs()
            ))
        };
        let mended =
            timeout(MENDING, self.mend(Some(subscriber))).await.unwrap_or_else(|_| Err(late()));
        if mended.is_err() {
            self.0.damaged.send_replace(true);
        }
        mended
    }

    async fn mend(&self, subscriber: Option<&str>) -> Result<(), QueueError> {
        // One after the other: what one of many lanes declares, the others find.
        let _one = self.0.mending.lock().await;
        let mut broker = self.broker();
        let topology = self.topology();
        let mut mended = topology.ensure_own(&mut broker).await;
        if let (Ok(()), Some(subscriber)) = (&mended, subscriber) {
            mended = topology.ensure_ways_back(&mut broker, subscriber).await;
        }
        log_put_back(&mut broker);
        mended
    }

    /// Binds again, as the record says, what events of these types should have reached and did not;
    /// returns whether there was such a thing.
    ///
    /// # Errors
    /// It cannot be bound, or the record cannot be read.
    pub(super) async fn bind_again(&self, types: &BTreeSet<String>) -> Result<bool, QueueError> {
        let matches = |pattern: &str| {
            Pattern::try_new(pattern).is_ok_and(|p| types.iter().any(|t| p.matches(t)))
        };
        let mut bound = self.bound().clone();
        // What a command knows is what it is configured with.
        if !self.follows() {
            if !bound.values().flatten().any(|p| matches(p)) {
                return Ok(false);
            }
            bound = state::bound(self).await?;
        }
        let wanted: Vec<(&SubscriberName, &String)> = bound
            .iter()
            .flat_map(|(name, all)| all.iter().filter(|p| matches(p)).map(move |p| (name, p)))
            .collect();
        let mut broker = self.broker();
        for (name, pattern) in &wanted {
            broker.bind(&self.topology().main(name), &self.topology().events(), pattern).await?;
        }
        if let Some((subscriber, pattern)) = wanted.first() {
            let sound = *self.0.sound.lock().unwrap_or_else(PoisonError::into_inner);
            let since = sound.map(clock::rfc3339_seconds);
            tracing::error!(
                subscriber = subscriber.as_str(),
                pattern,
                since,
                "an event reached no queue although a pattern matches it: bindings were missing and are put back; what was published \
                 meanwhile may be lost"
            );
        }
        // For what else may be missing.
        self.0.unbound.notify_one();
        Ok(!wanted.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_check_comes_each_minute_and_sooner_when_something_is_missing() {
        let now = clock::instant();
        let mut schedule = Schedule::new(now);
        assert_eq!(schedule.due(), now + INTERVAL);
        schedule.soon = true; // a message came back
        assert_eq!(schedule.due(), now + SOONEST);
        schedule.checked(now + SOONEST, false);
        assert_eq!(schedule.due(), now + 2 * SOONEST, "it could not be put right");
        schedule.checked(now + 2 * SOONEST, true);
        assert_eq!(schedule.due(), now + 2 * SOONEST + INTERVAL);
    }

    #[test]
    fn an_absent_exchange_is_declared_at_the_second_look_and_not_if_somebody_declared_it_meanwhile()
    {
        let now = clock::instant();
        let mut schedule = Schedule::new(now);
        assert!(!schedule.absent(now));
        schedule.checked(now, true);
        assert_eq!(schedule.due(), now + SECOND_LOOK);
        assert!(!schedule.absent(now + SOONEST), "somebody asked for a check in between");
        assert!(schedule.absent(now + SECOND_LOOK));
        schedule.present();
        schedule.checked(now + SECOND_LOOK, true);
        assert_eq!(schedule.due(), now + SECOND_LOOK + INTERVAL);
        assert!(!schedule.absent(now + 2 * INTERVAL), "another time, another first look");
    }
}

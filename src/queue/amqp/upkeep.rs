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

use super::{
    management::Management,
    record::Patterns,
    requests::Broker,
    restore::{INTERVAL, witness},
    shared::Shared,
    topology::Topology,
};
use crate::{clock, config::Subscriber, queue::QueueError, telemetry::troubles::Harms};

/// Between two checks whatever happens.
const SOONEST: Duration = Duration::from_secs(5);

/// How long an exchange has to be absent before it is declared: a producer that deletes it, to
/// declare it with other arguments, would be refused if another one were there.
const SECOND_LOOK: Duration = Duration::from_secs(10);

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
    shared: &'a Shared,
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
    pub(super) fn new(shared: &'a Shared) -> Self {
        let topology = &shared.topology;
        let uri = topology.url().expose().as_str().parse().ok();
        let api = topology
            .management_url()
            .zip(uri)
            .and_then(|(url, uri)| Management::try_new(url, &uri).ok());
        Self {
            shared,
            topology,
            schedule: Schedule::new(clock::instant()),
            api,
            told: BTreeSet::new(),
        }
    }

    /// A record that was there before tells that there were bindings, and so a witness.
    pub(super) fn began_with_record(&self) {
        if self.shared.witnessed.get() == Some(&false) {
            Missing { exchange: true, ..Missing::default() }.tell(self.topology, None);
        }
    }

    /// Waits until the next check is due.
    pub(super) async fn due(&mut self) {
        loop {
            let due = self.schedule.due();
            tokio::select! {
                () = tokio::time::sleep_until(due.into()) => return,
                () = self.shared.unbound.notified() => self.schedule.soon = true,
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
        let mut sound = self.shared.sound.lock().unwrap_or_else(PoisonError::into_inner);
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
            witness(self.shared, broker).await;
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
        self.shared.troubles.send_if_modified(|all| all.begins(about, harms, e.to_string()));
        if self.told.insert(format!("{about}: {e}")) {
            tracing::error!(error = %e, "{about}: not as it should be; checked again");
        }
    }

    fn ends(&mut self, about: &str) {
        self.told.retain(|told| !told.starts_with(about));
        if self.shared.troubles.send_if_modified(|all| all.ends(about)) {
            tracing::info!("{about}: as it should be again");
        }
    }
}

impl Drop for Upkeep<'_> {
    /// What nobody checks any more is not known.
    fn drop(&mut self) {
        self.shared.troubles.send_if_modified(|all| all.retain(|about| !is_of_upkeep(about)));
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

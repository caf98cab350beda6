//! Restores bindings and queues of subscribers that were deleted under the daemon. They are checked
//! each minute, and at once when a message finds no queue.
//!
//! AMQP does not show whether a binding exists, and binding again changes nothing. So all bindings
//! are declared again, and what was missing is known only where something shows it: a missing queue
//! or exchange, the witness ([`Topology::ensure_witness`]), a returned message, or the management
//! API.

use std::{
    collections::BTreeSet,
    sync::{Arc, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use super::{
    declarations::EVERYTHING,
    management::Management,
    record::{Lack, Patterns},
    requests::Broker,
    restore::INTERVAL,
    shared::Shared,
    state_stream,
    topology::Topology,
};
use crate::{clock, config::Subscriber, queue::QueueError, telemetry::troubles::Harms};

/// Shortest time between two checks.
const SOONEST: Duration = Duration::from_secs(5);

/// Time that an exchange has to be missing before it is declared: a producer that deletes it, to
/// redeclare it with other arguments, would be refused if another one existed.
const SECOND_CHECK: Duration = Duration::from_secs(10);

/// Why history lacks events after its binding was deleted.
const UNBOUND: &str = "its queue in RabbitMQ was not bound";

/// The time of the next check, and of declaring a missing exchange.
#[derive(Debug)]
struct Schedule {
    last: Instant,
    absent_since: Option<Instant>,
    /// Something was found missing, or the last check could not restore it.
    soon: bool,
}

impl Schedule {
    /// A schedule, for which the start counts as the first check.
    fn new(now: Instant) -> Self {
        Self { last: now, absent_since: None, soon: false }
    }

    fn due(&self) -> Instant {
        let next = self.last + if self.soon { SOONEST } else { INTERVAL };
        let second_check =
            self.absent_since.map(|since| since + SECOND_CHECK).filter(|at| *at > self.last);
        second_check.map_or(next, |at| at.min(next))
    }

    fn checked(&mut self, now: Instant, is_well: bool) {
        (self.last, self.soon) = (now, !is_well);
    }

    /// The exchange is missing. Returns whether to declare it now.
    fn absent(&mut self, now: Instant) -> bool {
        now.saturating_duration_since(*self.absent_since.get_or_insert(now)) >= SECOND_CHECK
    }

    fn present(&mut self) {
        self.absent_since = None;
    }
}

/// Checks subscribers' queues and bindings, and restores them.
pub(super) struct Upkeep<'a> {
    shared: &'a Shared,
    topology: &'a Topology,
    schedule: Schedule,
    /// The broker did not say at the start whether there is a witness; whether it is expected.
    owed: Option<bool>,
    /// The witness is bound, or the user may not bind it.
    is_witness_bound: bool,
    api: Option<Management>,
    logged: BTreeSet<String>,
}

/// The result of a check.
#[derive(Debug, Default)]
struct Missing {
    /// The exchange was deleted, with all its bindings.
    exchange: bool,
    declared: Vec<String>,
    /// Bindings, by the management API.
    bindings: Vec<String>,
    /// It could not be recorded that the exchange was deleted.
    is_unrecorded: bool,
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
            owed: None,
            is_witness_bound: false,
            api,
            logged: BTreeSet::new(),
        }
    }

    /// Checks at the start whether there is a witness, and declares it. `is_expected`: the record is
    /// older than this daemon, so there were bindings, and a witness.
    ///
    /// Another daemon that starts at the same time may have declared it by now: it has recorded first
    /// what history lacks.
    pub(super) async fn first_witness(
        &mut self,
        broker: &mut Broker<'_>,
        is_expected: bool,
        has_store: bool,
    ) {
        let began = clock::now();
        match self.topology.has_witness(broker).await {
            Ok(true) => {
                self.shared.history.witnessed(began);
                // A daemon that was killed may not have bound it. It is not declared: it may have been
                // deleted by now, and nobody would notice that.
                self.bind_witness(broker).await;
                self.schedule.soon = !self.is_witness_bound;
                return;
            }
            Ok(false) if is_expected => {
                Missing { exchange: true, ..Missing::default() }.log(self.topology, None);
                // It is not known until when the exchange had its bindings.
                if !self.report_to_history(has_store, None).await {
                    self.schedule.soon = true;
                    return;
                }
            }
            Ok(false) => {}
            Err(e) => {
                tracing::debug!(error = %e, "it is not known yet whether the exchange was deleted");
                (self.owed, self.schedule.soon) = (Some(is_expected), true);
                return;
            }
        }
        self.witness(broker).await;
        self.schedule.soon = !self.is_witness_bound;
    }

    /// Declares the witness and binds it, if the user may.
    async fn witness(&mut self, broker: &mut Broker<'_>) {
        let bound = self.topology.ensure_witness(broker).await;
        self.note_bound(bound);
    }

    /// Binds the witness, which is there, if the user may.
    async fn bind_witness(&mut self, broker: &mut Broker<'_>) {
        let bound = self.topology.bind_witness(broker).await;
        self.note_bound(bound);
    }

    fn note_bound(&mut self, bound: Result<(), QueueError>) {
        // A user that may not bind it is not refused at each check.
        self.is_witness_bound = bound.as_ref().err().is_none_or(QueueError::is_for_operator);
        if let Err(e) = bound {
            tracing::debug!(error = %e, "a deletion of the exchange cannot be noticed");
        }
    }

    /// The queue of history is not bound: the daemon that has it binds it and records a gap. Nobody
    /// else can notice that any more when the witness is back, or the queue is bound. So it is
    /// recorded before that, also if this daemon has history: it may be killed at any moment.
    /// Returns false if that could not be recorded.
    async fn report_to_history(&self, has_store: bool, since: Option<SystemTime>) -> bool {
        let lack = || Lack { why: UNBOUND.to_owned(), since, at: clock::now() };
        !has_store || state_stream::record_lack(self.shared, lack()).await
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

    /// Checks that the exchange exists, and that each of these subscribers has its queues, with the
    /// `patterns` of the record bound to it. Restores what is missing. A failure with one
    /// subscriber keeps this from no other.
    pub(super) async fn check(
        &mut self,
        broker: &mut Broker<'_>,
        subscribers: &[Arc<Subscriber>],
        patterns: &Patterns,
    ) {
        broker.take_declared();
        let mut missing = Missing::default();
        let exchange = self.exchange(broker, &mut missing).await;
        let is_well = match exchange {
            Ok(true) => {
                let is_well = self.subscribers(broker, subscribers, patterns, &mut missing).await
                    & self.history(broker, &mut missing).await
                    & self.is_witness_bound;
                // Without its bindings it takes no event to anybody.
                self.ends("the exchange of the events");
                is_well
            }
            Ok(false) => true,
            Err(e) => {
                self.fails("the exchange of the events", Harms::Lanes, &e);
                false
            }
        };
        missing.declared = broker.take_declared();
        let mut sound = self.shared.sound.lock().unwrap_or_else(PoisonError::into_inner);
        missing.log(self.topology, *sound);
        if is_well && self.schedule.absent_since.is_none() {
            *sound = Some(clock::now());
        }
        self.schedule.checked(clock::instant(), is_well);
    }

    /// Whether the exchange exists, or was declared now.
    async fn exchange(
        &mut self,
        broker: &mut Broker<'_>,
        missing: &mut Missing,
    ) -> Result<bool, QueueError> {
        let (topology, began) = (self.topology, clock::now());
        if !topology.has_events(broker).await? {
            if !self.schedule.absent(clock::instant()) {
                let why = format!(
                    "exchange `{}` does not exist any more, so that producers cannot publish; unless its owner declares it, hooktrail does in {} s",
                    topology.events(),
                    SECOND_CHECK.as_secs()
                );
                self.fails("the exchange of the events", Harms::Lanes, &QueueError::new(why));
                return Ok(false);
            }
            // If it was not bound it is there still.
            broker.delete_exchange(&topology.witness()).await.ok();
            topology.ensure_events(broker).await?;
        }
        self.schedule.present();
        let has_witness = topology.has_witness(broker).await?;
        let owed = self.owed.take();
        // Another daemon may declare it, and end before it has bound it.
        self.is_witness_bound &= has_witness;
        if has_witness && self.is_witness_bound {
            self.shared.history.witnessed(began);
        } else if has_witness {
            self.bind_witness(broker).await;
        } else if owed == Some(false) {
            // There was none before this daemon.
            self.witness(broker).await;
        } else {
            missing.exchange = true;
            let has_store = matches!(&*self.shared.history.recorded.borrow(), Some(Some(_)));
            let since = self.shared.history.last_sound();
            missing.is_unrecorded = !self.report_to_history(has_store, since).await;
            if !missing.is_unrecorded {
                self.witness(broker).await;
            }
        }
        Ok(true)
    }

    /// Returns whether everything exists now.
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
        let mut is_well = true;
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
            match self.topology.restore_subscriber(broker, &s.name, patterns).await {
                Ok(()) => self.ends(&about),
                Err(e) => {
                    is_well &= e.is_for_operator();
                    self.fails(&about, Harms::Subscriber(s.name.clone()), &e);
                }
            }
        }
        is_well
    }

    /// Binds the queue of history, if it can be used; after the subscribers': as long as it is not
    /// bound, an event that finds none of them shows that. Returns whether it is bound.
    async fn history(&mut self, broker: &mut Broker<'_>, missing: &mut Missing) -> bool {
        let history = &self.shared.history;
        if !history.is_bound() {
            return true;
        }
        let queue = self.topology.history();
        let was_unbound = match &self.api {
            Some(api) => api.bindings_of(&self.topology.events()).await.is_ok_and(|known| {
                !known.iter().any(|b| b.destination == queue && b.routing_key == EVERYTHING)
            }),
            None => false,
        };
        let since = history.last_stored();
        if was_unbound {
            missing.bindings.push(format!("{queue} <- {EVERYTHING}"));
            if !missing.exchange {
                missing.is_unrecorded = !self.report_to_history(true, since).await;
            }
        }
        match self.topology.bind_history(broker).await {
            Ok(()) => {
                if missing.is_unrecorded {
                    history.lacks(since, clock::now(), UNBOUND);
                }
                true
            }
            // Its own task logs why.
            Err(_) => {
                history.suspect();
                false
            }
        }
    }

    fn fails(&mut self, about: &str, harms: Harms, e: &QueueError) {
        self.shared.troubles.send_if_modified(|all| all.begins(about, harms, e.to_string()));
        if self.logged.insert(format!("{about}: {e}")) {
            tracing::error!(error = %e, "{about}: not as it should be; checked again");
        }
    }

    fn ends(&mut self, about: &str) {
        self.logged.retain(|logged| !logged.starts_with(about));
        if self.shared.troubles.send_if_modified(|all| all.ends(about)) {
            tracing::info!("{about}: as it should be again");
        }
    }
}

impl Drop for Upkeep<'_> {
    /// Forgets the failures: what is not checked any more is unknown.
    fn drop(&mut self) {
        self.shared.troubles.send_if_modified(|all| all.retain(|about| !is_of_upkeep(about)));
    }
}

fn is_of_upkeep(about: &str) -> bool {
    about == "the exchange of the events" || about.starts_with("subscriber `")
}

impl Missing {
    fn log(&self, topology: &Topology, sound: Option<SystemTime>) {
        let since =
            sound.map_or_else(|| "a time when no daemon ran".to_owned(), clock::rfc3339_seconds);
        if self.exchange {
            tracing::error!(
                exchange = topology.events(),
                since,
                "the exchange was deleted, and its bindings with it, and redeclared: they are restored; what was published meanwhile may be lost"
            );
        } else if !self.bindings.is_empty() {
            let bindings = self.bindings.join(", ");
            tracing::error!(
                bindings,
                since,
                "bindings were missing and are restored: what was published for them meanwhile is lost"
            );
        }
        for name in &self.declared {
            tracing::error!(
                name,
                since,
                "was missing and is redeclared: what was in it, and what was published for it meanwhile, is lost"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_check_is_due_each_minute_and_sooner_when_something_is_missing() {
        let now = clock::instant();
        let mut schedule = Schedule::new(now);
        assert_eq!(schedule.due(), now + INTERVAL);
        schedule.soon = true; // a message was returned
        assert_eq!(schedule.due(), now + SOONEST);
        schedule.checked(now + SOONEST, false);
        assert_eq!(schedule.due(), now + 2 * SOONEST, "it could not be restored");
        schedule.checked(now + 2 * SOONEST, true);
        assert_eq!(schedule.due(), now + 2 * SOONEST + INTERVAL);
    }

    #[test]
    fn a_missing_exchange_is_declared_at_the_second_check_and_not_if_its_owner_declared_it_meanwhile()
     {
        let now = clock::instant();
        let mut schedule = Schedule::new(now);
        assert!(!schedule.absent(now));
        schedule.checked(now, true);
        assert_eq!(schedule.due(), now + SECOND_CHECK);
        assert!(!schedule.absent(now + SOONEST), "a check in between");
        assert!(schedule.absent(now + SECOND_CHECK));
        schedule.present();
        schedule.checked(now + SECOND_CHECK, true);
        assert_eq!(schedule.due(), now + SECOND_CHECK + INTERVAL);
        assert!(!schedule.absent(now + 2 * INTERVAL), "missing once more: another first check");
    }
}

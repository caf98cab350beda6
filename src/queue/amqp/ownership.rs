//! The decisions of several daemons about the bindings of subscribers: pure, without a broker.
//!
//! A binding does not say who made it, and AMQP does not show which patterns a queue is bound with.
//! So all daemons of one `[queue] prefix` write what they bind into the state stream, and each
//! reads what the others write. All read the same records in the same order, and of a subscriber
//! the last one counts. A daemon *serves* the subscribers of its own configuration.
//!
//! | record | writer | reader that serves it | other reader |
//! |---|---|---|---|
//! | `Bound`, the claim | a daemon that serves the subscriber, after it has bound; and as the answer to `Asked` | compares, and claims its own patterns too if they are missing | unbinds nothing for [`OWNER_CLAIM_TTL`] |
//! | `Removed` | a daemon that does not serve the subscriber, after it has unbound it; `prune`, after it has deleted the queues | binds and claims it | forgets its bindings |
//! | `Asked` | a daemon that would unbind a subscriber which no other daemon seems to consume | writes `Bound` at once, within [`OWNER_REPLY_TIMEOUT`] | stays silent |
//! | `PauseState` | the daemon that pauses or resumes the subscriber | passes it on to its lane; nothing here depends on it | the same |
//! | `Mark` | each daemon when it begins to read | its writer: the records before it are the past | ignores it |
//!
//! ```text
//! daemon A, restarted without `x`     state stream     daemon B: serves `x`, but consumes nothing,
//!                                                      since `x` is paused or its receiver is down
//!  reads up to its own mark ◄───────── Bound x, Mark
//!  no daemon consumes `x` ───────────► Asked x ───────► serves `x`
//!  another daemon claims `x`: ◄─────── Bound x ◄─────── answers
//!  it stays bound for an hour
//!
//!  the claim has expired ────────────► Asked x          (B was stopped)
//!  no answer within 1.5 s: unbinds
//!  all patterns of `x` ──────────────► Removed x
//! ```
//!
//! A daemon that serves `x` and reads another configuration of it unbinds nothing: it claims the
//! patterns of both, so that each bound pattern stands in the record, and some daemon unbinds it
//! one day. Where its patterns stand in the record already it writes nothing; otherwise two daemons
//! would answer each other forever.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, Instant},
};

use super::record::{About, Bindings, Bound, OWNER_REPLY_TIMEOUT, Patterns, Record, Recorded};
use crate::{
    delivery::{PauseState, PauseStates, SubscriberName},
    queue::Removals,
};

/// Time between two checks whether another daemon still serves a subscriber that this one does not.
const RECHECK: Duration = Duration::from_secs(60);

/// The same time while an answer is awaited, or after a first check that saw a foreign consumer.
const RECHECK_SOON: Duration = Duration::from_secs(2);

/// How long another daemon's claim to a subscriber stays valid.
const OWNER_CLAIM_TTL: Duration = Duration::from_secs(3600);

/// Something that a daemon reads, or the result of an [`Action`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Event {
    /// These subscribers are configured, instead of those before.
    Configured(Bindings),
    /// The stream was read up to this daemon's own mark. `known`: what this daemon knew of pauses.
    ReadToEnd { known: PauseStates },
    /// A record was read behind the mark, and [applied](Ownership::apply).
    Read(About),
    /// The time of [`next_check`](Ownership::next_check) has passed, or removals were permitted.
    CheckDue,
    /// Result of [`Action::Bind`].
    Bound { subscriber: SubscriberName, purpose: Purpose, succeeded: bool },
    /// Result of [`Action::Unbind`]; `left` are those of the patterns that are still bound.
    Unbound { subscriber: SubscriberName, former: Bound, left: BTreeSet<String> },
    /// Result of [`Action::CheckAlone`].
    Alone(bool),
    /// Result of [`Action::CheckConsumers`]: whether another daemon consumes the queue, if the
    /// broker says so.
    Consumed { subscriber: SubscriberName, elsewhere: Option<bool> },
    /// [`Action::Then`]: what is configured is to be bound now.
    Reconcile,
    /// [`Action::Then`]: each subscriber of this daemon was rebound, as far as that succeeded.
    Rebound,
    /// [`Action::Then`]: so was each subscriber that is not configured any more.
    Reconciled,
}

/// Why a subscriber is bound.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    /// The configuration has changed since it was recorded.
    Rebind,
    /// The record has changed, but not the configuration.
    Reclaim,
}

/// A step of a daemon. Actions are carried out in their order, and those that follow from the
/// result of one before the next one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Action {
    /// Declare the queues of a subscriber and bind the patterns of its configuration.
    Bind {
        subscriber: SubscriberName,
        purpose: Purpose,
    },
    /// Unbind these patterns.
    Unbind {
        subscriber: SubscriberName,
        former: Bound,
    },
    /// Unbind the witness from an exchange that is not configured any more.
    ReleaseWitness(String),
    /// Compare the number of consumers of each queue of this daemon with its own.
    CheckAlone,
    /// Compare the number of consumers of a subscriber's queue with this daemon's own.
    CheckConsumers(SubscriberName),
    /// Write a `Bound` record.
    Claim {
        subscriber: SubscriberName,
        bound: Bound,
    },
    /// Write a `Removed` record.
    Release(SubscriberName),
    /// Write an `Asked` record.
    Ask(SubscriberName),
    /// Write a `PauseState` record.
    RecordPause {
        subscriber: SubscriberName,
        pause_state: PauseState,
    },
    /// Pass on to the lanes who is paused, and who was removed.
    ReportState,
    /// Declare the witness if it is missing. `is_expected`: the record was there before this daemon,
    /// so a witness was, too.
    CheckWitness {
        is_expected: bool,
    },
    Log(Notice),
    /// Handle this event.
    Then(Event),
}

/// A decision that the log shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Notice {
    /// The stream is empty, although this daemon had read it.
    RecordLost,
    /// A subscriber of this daemon is not recorded, and no daemon has removed it.
    ClaimLost(SubscriberName),
    /// Another daemon has another configuration of this subscriber, or none.
    Differs(SubscriberName),
    /// Another daemon consumes the queue of a subscriber that this one does not serve.
    ConsumedElsewhere(SubscriberName),
    /// Another daemon has answered for such a subscriber.
    ClaimedElsewhere(SubscriberName),
    /// Such a subscriber was unbound.
    Unbound(SubscriberName),
    /// A pattern of a subscriber of this daemon was unbound.
    PatternUnbound { subscriber: SubscriberName, exchange: String, pattern: String },
}

/// The knowledge of a daemon about one subscriber, besides the record.
#[derive(Debug, Default, PartialEq, Eq)]
struct Share {
    /// The bindings of its configuration, if this daemon serves the subscriber.
    wanted: Option<Bound>,
    /// Claims that this daemon has written and not read yet.
    echoes: u32,
    /// The configurations differ, which was logged.
    differs: bool,
    /// Bound to the exchange that is configured now, and in the record to an earlier one that
    /// cannot be unbound.
    is_between: bool,
    /// When another daemon last claimed it.
    claimed_elsewhere: Option<Instant>,
    /// Checks that saw another daemon consume it.
    consumed_elsewhere: u32,
    /// When the other daemons were asked whether they serve it.
    asked: Option<Instant>,
    /// It cannot be unbound.
    is_stuck: bool,
}

/// The state stream as one daemon sees it, and what that daemon wants.
#[derive(Debug)]
pub(super) struct Ownership {
    /// The exchange of the events.
    exchange: String,
    removals: Removals,
    recorded: Recorded,
    shares: BTreeMap<SubscriberName, Share>,
    /// The configuration was compared with the record, and bound. From then on another daemon's
    /// record is no earlier configuration.
    is_reconciled: bool,
    /// Every step of the current reconciling has succeeded.
    all_succeeded: bool,
    /// No other daemon seemed to run at the latest check.
    is_alone: bool,
    /// The record was read to its end at least once.
    has_read: bool,
}

impl Ownership {
    pub(super) fn new(exchange: String, wanted: Bindings, removals: Removals) -> Self {
        let mut new = Self {
            exchange,
            removals,
            recorded: Recorded::default(),
            shares: BTreeMap::new(),
            is_reconciled: false,
            all_succeeded: true,
            is_alone: false,
            has_read: false,
        };
        new.configure(wanted);
        new
    }

    /// The stream was opened again, at this state of the record. Answers may have been missed.
    pub(super) fn reopened(&mut self, recorded: Recorded) {
        self.recorded = recorded;
        for share in self.shares.values_mut() {
            (share.echoes, share.asked) = (0, None);
        }
    }

    /// Adds a record that was read.
    pub(super) fn apply(&mut self, record: Record) -> About {
        self.recorded.apply(record, &self.exchange)
    }

    pub(super) fn recorded(&self) -> &Recorded {
        &self.recorded
    }

    /// The time from a check to the next one.
    pub(super) fn next_check(&self) -> Duration {
        let soon = |s: &Share| (s.asked.is_some() && !s.is_stuck) || s.consumed_elsewhere == 1;
        if self.shares.values().any(soon) { RECHECK_SOON } else { RECHECK }
    }

    /// The patterns that have to be bound for this daemon, as far as they are recorded: what
    /// another daemon has removed stays removed.
    pub(super) fn to_be_bound(&self) -> Patterns {
        let recorded = self.recorded.bound_to(&self.exchange);
        let bound = |(name, wanted): (&SubscriberName, &Bound)| {
            let patterns = if self.shares[name].is_between {
                wanted.patterns.clone()
            } else {
                // What another configuration wants besides is the other daemon's to keep.
                recorded.get(name).map(|found| found & &wanted.patterns).unwrap_or_default()
            };
            (!patterns.is_empty()).then(|| (name.clone(), patterns))
        };
        self.served().filter_map(bound).collect()
    }

    pub(super) fn on(&mut self, event: Event, now: Instant) -> Vec<Action> {
        match event {
            Event::Configured(wanted) => {
                self.configure(wanted);
                self.reconcile()
            }
            Event::ReadToEnd { known } => self.read_to_end(known),
            Event::Read(About::Bindings(name)) => self.on_binding(&name, now),
            Event::Read(About::Pruned(name)) => self.compare(&name, Unrecorded::Removed),
            Event::Read(About::Asked(name)) => self.answer(&name).into_iter().collect(),
            Event::Read(About::PauseState(_) | About::Nothing) => Vec::new(),
            Event::CheckDue if self.is_reconciled => self.check_removed(now),
            Event::CheckDue | Event::Reconcile => self.reconcile(),
            Event::Bound { subscriber, purpose, succeeded } => match (purpose, succeeded) {
                (Purpose::Rebind, true) => self.unbind_former(&subscriber),
                (Purpose::Rebind, false) => {
                    self.all_succeeded = false;
                    Vec::new()
                }
                (Purpose::Reclaim, true) => self.reclaim(&subscriber).into_iter().collect(),
                (Purpose::Reclaim, false) => Vec::new(),
            },
            Event::Unbound { subscriber, former, left } => match self.wanted(&subscriber) {
                Some(_) => self.former_unbound(&subscriber, &former, &left),
                None => self.removed(subscriber, left.is_empty()),
            },
            Event::Alone(is_alone) => {
                self.is_alone = is_alone;
                self.removable().into_iter().map(Action::CheckConsumers).collect()
            }
            Event::Consumed { subscriber, elsewhere } => match elsewhere {
                Some(true) => self.is_consumed(subscriber),
                Some(false) => self.is_idle(subscriber, now),
                None => Vec::new(),
            },
            Event::Rebound => {
                let mut actions = self.check_removed(now);
                actions.push(Action::Then(Event::Reconciled));
                actions
            }
            Event::Reconciled => {
                self.is_reconciled = self.all_succeeded;
                Vec::new()
            }
        }
    }

    /// Subscribers that this daemon serves.
    fn served(&self) -> impl Iterator<Item = (&SubscriberName, &Bound)> {
        self.shares.iter().filter_map(|(name, s)| s.wanted.as_ref().map(|wanted| (name, wanted)))
    }

    fn wanted(&self, name: &SubscriberName) -> Option<&Bound> {
        self.shares.get(name)?.wanted.as_ref()
    }

    fn share(&mut self, name: &SubscriberName) -> &mut Share {
        self.shares.entry(name.clone()).or_default()
    }

    fn configure(&mut self, wanted: Bindings) {
        for share in self.shares.values_mut() {
            let Share { echoes, claimed_elsewhere, .. } = *share;
            *share = Share { echoes, claimed_elsewhere, ..Share::default() };
        }
        for (name, wanted) in wanted {
            let share = self.share(&name);
            (share.wanted, share.claimed_elsewhere) = (Some(wanted), None);
        }
        self.shares.retain(|_, share| *share != Share::default());
        self.is_reconciled = false;
    }

    /// Where the stream was deleted and redeclared, this daemon is the one that knows its content.
    /// The claims are written when they are reconciled.
    fn read_to_end(&mut self, known: PauseStates) -> Vec<Action> {
        let mut actions = Vec::new();
        let had_read = std::mem::replace(&mut self.has_read, true);
        let is_empty = self.recorded.bindings.is_empty();
        if !had_read {
            // Before a claim is written, of a subscriber or of history: a daemon that reads one
            // expects a witness.
            let is_expected = !is_empty || self.recorded.store.is_some();
            actions.push(Action::CheckWitness { is_expected });
        }
        if had_read && is_empty && self.served().next().is_some() {
            actions.push(Action::Log(Notice::RecordLost));
            for (name, pause_state) in known.iter() {
                if !self.recorded.pause_states.contains_key(name) {
                    Arc::make_mut(&mut self.recorded.pause_states)
                        .insert(name.clone(), pause_state.clone());
                    let (subscriber, pause_state) = (name.clone(), pause_state.clone());
                    actions.push(Action::RecordPause { subscriber, pause_state });
                }
            }
        }
        actions.push(Action::ReportState);
        // These were asked while this daemon did not read.
        let asked = std::mem::take(&mut self.recorded.asked);
        actions.extend(asked.iter().filter_map(|name| self.answer(name)));
        actions.push(Action::Then(Event::Reconcile));
        actions
    }

    /// Another daemon asks who serves a subscriber.
    fn answer(&mut self, name: &SubscriberName) -> Option<Action> {
        let wanted = self.wanted(name)?;
        let bound = self.recorded.bindings.get(name).unwrap_or(wanted).clone();
        Some(self.claim(name, bound))
    }

    fn claim(&mut self, name: &SubscriberName, bound: Bound) -> Action {
        self.share(name).echoes += 1;
        self.recorded.bindings.insert(name.clone(), bound.clone());
        Action::Claim { subscriber: name.clone(), bound }
    }

    /// A record of a subscriber's bindings was read.
    fn on_binding(&mut self, name: &SubscriberName, now: Instant) -> Vec<Action> {
        let mut actions = Vec::new();
        if self.recorded.bindings.contains_key(name) {
            let share = self.share(name);
            if share.echoes > 0 {
                share.echoes -= 1;
            } else if share.wanted.is_none() {
                // The daemon that writes this runs, also if it consumes nothing now.
                let was_asked = share.asked.take().is_some();
                if share.claimed_elsewhere.replace(now).is_none() && was_asked {
                    actions.push(Action::Log(Notice::ClaimedElsewhere(name.clone())));
                }
            }
        }
        actions.extend(self.compare(name, Unrecorded::Removed));
        actions
    }

    /// Compares the record of a subscriber with this daemon's configuration.
    fn compare(&mut self, name: &SubscriberName, unrecorded: Unrecorded) -> Vec<Action> {
        let found = self.recorded.bindings.get(name);
        let Some(share) = self.shares.get_mut(name).filter(|s| s.wanted.is_some()) else {
            return Vec::new();
        };
        if found == share.wanted.as_ref() {
            share.differs = false;
            return Vec::new();
        }
        let mut actions = Vec::new();
        if found.is_none() && unrecorded == Unrecorded::Lost {
            actions.push(Action::Log(Notice::ClaimLost(name.clone())));
        } else if !std::mem::replace(&mut share.differs, true) {
            actions.push(Action::Log(Notice::Differs(name.clone())));
        }
        actions.push(Action::Bind { subscriber: name.clone(), purpose: Purpose::Reclaim });
        actions
    }

    /// The patterns of this daemon are bound again: they belong into the record, with those of the
    /// other daemon.
    fn reclaim(&mut self, name: &SubscriberName) -> Option<Action> {
        let wanted = self.wanted(name)?.clone();
        let bound = match self.recorded.bindings.get(name) {
            None => wanted,
            // Two exchanges do not fit into one record; the daemon that is restarted last wins.
            Some(found) if found.exchange != wanted.exchange => return None,
            Some(found) if wanted.patterns.is_subset(&found.patterns) => return None,
            Some(found) => Bound { patterns: &wanted.patterns | &found.patterns, ..wanted },
        };
        Some(self.claim(name, bound))
    }

    fn reconcile(&mut self) -> Vec<Action> {
        self.removals.judge(
            &self.recorded.bindings.keys().cloned().collect(),
            &self.served().map(|(name, _)| name.clone()).collect(),
        );
        if self.is_reconciled {
            let served: Vec<SubscriberName> = self.served().map(|(name, _)| name.clone()).collect();
            let mut actions = Vec::new();
            for name in served {
                let unrecorded = if self.recorded.removed.contains(&name) {
                    Unrecorded::Removed
                } else {
                    Unrecorded::Lost
                };
                actions.extend(self.compare(&name, unrecorded));
            }
            actions.push(Action::Then(Event::CheckDue));
            return actions;
        }
        self.all_succeeded = true;
        let differs = |(name, wanted): &(&SubscriberName, &Bound)| {
            self.recorded.bindings.get(*name) != Some(wanted)
        };
        let bind = |(name, _): (&SubscriberName, &Bound)| Action::Bind {
            // Another daemon may have unbound what this one had bound when it began.
            subscriber: name.clone(),
            purpose: Purpose::Rebind,
        };
        let rebind = self.served().filter(differs).map(bind);
        rebind.chain([Action::Then(Event::Rebound)]).collect()
    }

    /// The configuration of a subscriber is bound; its former patterns are not needed any more.
    fn unbind_former(&mut self, name: &SubscriberName) -> Vec<Action> {
        let Some(wanted) = self.wanted(name) else { return Vec::new() };
        let former = self.recorded.bindings.get(name).map(|former| {
            if former.exchange == wanted.exchange {
                Bound { patterns: &former.patterns - &wanted.patterns, ..former.clone() }
            } else {
                former.clone()
            }
        });
        let exchange = wanted.exchange.clone();
        match former.filter(|f| f.exchange != exchange || !f.patterns.is_empty()) {
            Some(former) => vec![Action::Unbind { subscriber: name.clone(), former }],
            None => self.rebound(name, &BTreeSet::new()).into_iter().collect(),
        }
    }

    fn former_unbound(
        &mut self,
        name: &SubscriberName,
        former: &Bound,
        left: &BTreeSet<String>,
    ) -> Vec<Action> {
        let notice = |pattern: &String| {
            Action::Log(Notice::PatternUnbound {
                subscriber: name.clone(),
                exchange: former.exchange.clone(),
                pattern: pattern.clone(),
            })
        };
        let mut actions: Vec<Action> = former.patterns.difference(left).map(notice).collect();
        if former.exchange != self.exchange {
            actions.push(Action::ReleaseWitness(former.exchange.clone()));
        }
        actions.extend(self.rebound(name, left));
        actions
    }

    /// A subscriber is bound as it is configured. Patterns that are still bound stay in the record,
    /// so that they are unbound later.
    fn rebound(&mut self, name: &SubscriberName, left: &BTreeSet<String>) -> Option<Action> {
        let wanted = self.wanted(name)?.clone();
        self.all_succeeded &= left.is_empty();
        let recorded = self.recorded.bindings.get(name);
        let moved = recorded.is_some_and(|former| former.exchange != wanted.exchange);
        let is_between = moved && !left.is_empty();
        let bound = Bound { patterns: &wanted.patterns | left, ..wanted };
        let is_recorded = recorded == Some(&bound);
        self.share(name).is_between = is_between;
        (!is_between && !is_recorded).then(|| self.claim(name, bound))
    }

    /// Recorded subscribers that this daemon does not serve and, as far as it knows, no other does.
    fn removable(&self) -> Vec<SubscriberName> {
        let is_free = |name: &&SubscriberName| {
            self.shares
                .get(*name)
                .is_none_or(|s| s.wanted.is_none() && s.claimed_elsewhere.is_none())
                && self.removals.may_unbind(name)
        };
        self.recorded.bindings.keys().filter(is_free).cloned().collect()
    }

    fn check_removed(&mut self, now: Instant) -> Vec<Action> {
        for (name, share) in &mut self.shares {
            if !self.recorded.bindings.contains_key(name) {
                share.asked = None;
            }
            // A daemon that has answered may have ended by now, and is asked again.
            share.claimed_elsewhere =
                share.claimed_elsewhere.filter(|since| now - *since < OWNER_CLAIM_TTL);
        }
        if self.removable().is_empty() { Vec::new() } else { vec![Action::CheckAlone] }
    }

    fn is_consumed(&mut self, name: SubscriberName) -> Vec<Action> {
        let share = self.share(&name);
        share.asked = None;
        share.consumed_elsewhere += 1;
        // The first check may have seen this daemon's own consumer a moment too long.
        if share.consumed_elsewhere == 2 {
            return vec![Action::Log(Notice::ConsumedElsewhere(name))];
        }
        Vec::new()
    }

    /// No other daemon consumes a subscriber. One that serves it consumes nothing while the
    /// receiver is down, or the subscriber paused: so it is asked.
    fn is_idle(&mut self, name: SubscriberName, now: Instant) -> Vec<Action> {
        if !self.is_alone {
            let asked = &mut self.share(&name).asked;
            match *asked {
                None => {
                    *asked = Some(now);
                    return vec![Action::Ask(name)];
                }
                Some(asked) if now - asked < OWNER_REPLY_TIMEOUT => return Vec::new(),
                Some(_) => {}
            }
        }
        let Some(former) = self.recorded.bindings.get(&name).cloned() else { return Vec::new() };
        vec![Action::Unbind { subscriber: name, former }]
    }

    /// All patterns of a subscriber were unbound. If not, it stays in the record, and that is tried
    /// again, without asking the others again.
    fn removed(&mut self, name: SubscriberName, unbound: bool) -> Vec<Action> {
        let share = self.share(&name);
        share.is_stuck = !unbound;
        if !unbound {
            return Vec::new();
        }
        (share.asked, share.consumed_elsewhere) = (None, 0);
        self.recorded.bindings.remove(&name);
        self.recorded.removed.insert(name.clone());
        vec![Action::Log(Notice::Unbound(name.clone())), Action::Release(name)]
    }
}

/// Why a subscriber that this daemon serves is not in the record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Unrecorded {
    /// Another daemon, or `prune`, has taken it out.
    Removed,
    /// The record was lost, or a part of it.
    Lost,
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;
    use crate::clock;

    /// A broker for one daemon: what it answers, and what the daemon did.
    struct World {
        daemon: Ownership,
        now: Instant,
        refuses_unbinding: bool,
        is_alone: bool,
        is_consumed: bool,
        done: Vec<String>,
    }

    fn bound(exchange: &str, patterns: &str) -> Bound {
        let patterns = patterns.split_whitespace().map(str::to_owned).collect();
        Bound { exchange: exchange.to_owned(), patterns }
    }

    fn bindings(subscribers: &[(&str, &str)]) -> Bindings {
        subscribers.iter().map(|(name, patterns)| ((*name).into(), bound("x", patterns))).collect()
    }

    fn claimed(name: &str, exchange: &str, patterns: &str) -> Record {
        let Bound { exchange, patterns } = bound(exchange, patterns);
        Record::Bound {
            subscriber: name.into(),
            exchange: Some(exchange),
            patterns,
            at: String::new(),
        }
    }

    fn removed(name: &str) -> Record {
        let (subscriber, at) = (name.into(), String::new());
        Record::Removed { subscriber, removed: true, pruned: false, at }
    }

    fn asked(name: &str) -> Record {
        Record::Asked { asked: name.into() }
    }

    impl World {
        /// A daemon that serves these subscribers, at the end of this record.
        fn new(subscribers: &[(&str, &str)], recorded: &[Record]) -> Self {
            let wanted = bindings(subscribers);
            let removals = Removals::default();
            drop(removals.configure(wanted.keys().cloned().collect(), true));
            let daemon = Ownership::new("x".to_owned(), wanted, removals);
            let now = clock::instant();
            let mut new = Self {
                daemon,
                now,
                refuses_unbinding: false,
                is_alone: false,
                is_consumed: false,
                done: Vec::new(),
            };
            new.reopen(recorded, PauseStates::default());
            new
        }

        fn reopen(&mut self, records: &[Record], known: PauseStates) {
            self.daemon.reopened(Recorded::default());
            for record in records {
                self.daemon.apply(record.clone());
            }
            self.on(Event::ReadToEnd { known });
        }

        fn read(&mut self, record: Record) -> Vec<String> {
            let about = self.daemon.apply(record);
            self.on(Event::Read(about));
            self.done()
        }

        fn configure(&mut self, subscribers: &[(&str, &str)]) -> Vec<String> {
            let wanted = bindings(subscribers);
            drop(self.daemon.removals.configure(wanted.keys().cloned().collect(), true));
            self.on(Event::Configured(wanted));
            self.done()
        }

        fn check(&mut self, later: Duration) -> Vec<String> {
            self.now += later;
            self.on(Event::CheckDue);
            self.done()
        }

        fn on(&mut self, event: Event) {
            let mut left = vec![Action::Then(event)];
            while let Some(action) = left.pop() {
                if let Some(event) = self.carry_out(action) {
                    left.extend(self.daemon.on(event, self.now).into_iter().rev());
                }
            }
        }

        fn carry_out(&mut self, action: Action) -> Option<Event> {
            let text = |b: &Bound| {
                let patterns: Vec<&str> = b.patterns.iter().map(String::as_str).collect();
                format!("{}:{}", b.exchange, patterns.join(","))
            };
            let (done, event) = match action {
                Action::Then(event) => return Some(event),
                Action::ReportState | Action::CheckWitness { .. } => return None,
                Action::CheckAlone => return Some(Event::Alone(self.is_alone)),
                Action::CheckConsumers(subscriber) => {
                    return Some(Event::Consumed { subscriber, elsewhere: Some(self.is_consumed) });
                }
                Action::Log(notice) => (format!("log {notice:?}"), None),
                Action::Bind { subscriber, purpose } => {
                    let done = format!("bind {subscriber}");
                    (done, Some(Event::Bound { subscriber, purpose, succeeded: true }))
                }
                Action::Unbind { subscriber, former } => {
                    let done = format!("unbind {subscriber} {}", text(&former));
                    let left = if self.refuses_unbinding {
                        former.patterns.clone()
                    } else {
                        BTreeSet::new()
                    };
                    (done, Some(Event::Unbound { subscriber, former, left }))
                }
                Action::ReleaseWitness(exchange) => (format!("release witness {exchange}"), None),
                Action::Claim { subscriber, bound } => {
                    (format!("claim {subscriber} {}", text(&bound)), None)
                }
                Action::Release(name) => (format!("release {name}"), None),
                Action::Ask(name) => (format!("ask {name}"), None),
                Action::RecordPause { subscriber, pause_state } => {
                    let is_paused = matches!(pause_state, PauseState::Paused(_));
                    (format!("pause {subscriber} {is_paused}"), None)
                }
            };
            self.done.push(done);
            event
        }

        fn done(&mut self) -> Vec<String> {
            std::mem::take(&mut self.done)
        }
    }

    const SOON: Duration = RECHECK_SOON;

    #[test]
    fn a_witness_is_expected_where_a_subscriber_or_history_was_claimed_before() {
        let history = Record::Store { store: "s".to_owned(), adopted: false, at: String::new() };
        for (recorded, expected) in
            [(None, false), (Some(claimed("a", "x", "#")), true), (Some(history), true)]
        {
            let removals = Removals::default();
            let mut daemon = Ownership::new("x".to_owned(), bindings(&[("a", "#")]), removals);
            recorded.iter().for_each(|record| drop(daemon.apply(record.clone())));
            let known = PauseStates::default();
            let actions = daemon.on(Event::ReadToEnd { known }, clock::instant());
            let found = actions.iter().find_map(|action| match action {
                Action::CheckWitness { is_expected } => Some(*is_expected),
                _ => None,
            });
            assert_eq!(found, Some(expected), "{recorded:?}");
        }
    }

    #[test]
    fn a_subscriber_that_is_not_configured_is_unbound_only_if_no_other_daemon_claims_it() {
        let gone =
            || World::new(&[("a", "#")], &[claimed("a", "x", "#"), claimed("gone", "x", "p q")]);
        type Case<'c> = (&'c str, fn(&mut World), &'c [&'c str]);
        let cases: [Case<'_>; 5] = [
            ("no answer", |_| {}, &["unbind gone x:p,q", "log Unbound(\"gone\")", "release gone"]),
            (
                "the other daemon answers",
                |w| {
                    let logged = w.read(claimed("gone", "x", "p q"));
                    assert_eq!(logged, ["log ClaimedElsewhere(\"gone\")"]);
                },
                &[],
            ),
            ("another daemon consumes it", |w| w.is_consumed = true, &[]),
            ("another daemon has removed it", |w| drop(w.read(removed("gone"))), &[]),
            (
                "it is configured again",
                |w| {
                    assert_eq!(w.configure(&[("a", "#"), ("gone", "p q")]), [""; 0]);
                },
                &[],
            ),
        ];
        for (case, meanwhile, expected) in cases {
            let mut world = gone();
            assert_eq!(world.done(), ["ask gone"], "{case}");
            assert_eq!(world.daemon.next_check(), RECHECK_SOON, "{case}");
            meanwhile(&mut world);
            assert_eq!(world.check(SOON), expected, "{case}");
        }
    }

    #[test]
    fn the_others_are_asked_before_unbinding_and_have_time_to_answer() {
        let mut world = World::new(&[], &[claimed("gone", "x", "#")]);
        assert_eq!(world.done(), ["ask gone"]);
        assert_eq!(world.check(OWNER_REPLY_TIMEOUT / 2), [""; 0], "the time is not over");
        assert_eq!(
            world.check(OWNER_REPLY_TIMEOUT / 2),
            ["unbind gone x:#", "log Unbound(\"gone\")", "release gone"]
        );
        assert_eq!(world.check(RECHECK), [""; 0]);
        // A daemon that sees no other consumer of the queues that it consumes asks no other daemon.
        let mut world = World::new(&[("a", "#")], &[claimed("a", "x", "#")]);
        world.is_alone = true;
        drop(world.read(claimed("gone", "x", "#")));
        world.check(OWNER_CLAIM_TTL);
        assert!(world.daemon.recorded().bindings.keys().eq(["a"]));
    }

    #[test]
    fn a_claim_of_another_daemon_expires_and_it_is_asked_again() {
        let mut world = World::new(&[], &[claimed("gone", "x", "#")]);
        world.done();
        world.read(claimed("gone", "x", "#"));
        assert_eq!(world.check(OWNER_CLAIM_TTL / 2), [""; 0]);
        world.read(claimed("gone", "x", "#"));
        assert_eq!(world.check(OWNER_CLAIM_TTL * 3 / 4), [""; 0], "it was claimed again");
        assert_eq!(world.check(OWNER_CLAIM_TTL / 4), ["ask gone"]);
    }

    #[test]
    fn a_subscriber_that_another_daemon_consumes_stays_bound_which_is_logged_at_the_second_check() {
        let mut world = World::new(&[], &[claimed("gone", "x", "#")]);
        world.done();
        world.is_consumed = true;
        assert_eq!(world.check(SOON), [""; 0]);
        assert_eq!(world.daemon.next_check(), RECHECK_SOON);
        assert_eq!(world.check(SOON), ["log ConsumedElsewhere(\"gone\")"]);
        assert_eq!(world.daemon.next_check(), RECHECK);
        assert_eq!(world.check(RECHECK), [""; 0]);
        world.is_consumed = false;
        assert_eq!(world.check(RECHECK), ["ask gone"], "its daemon has ended, or paused it");
    }

    #[test]
    fn the_echo_of_a_daemons_own_claim_is_no_claim_of_another() {
        let mut world = World::new(&[("gone", "#")], &[]);
        assert_eq!(world.done(), ["bind gone", "claim gone x:#"]);
        // Taken out of the configuration before the daemon reads its own record.
        assert_eq!(world.configure(&[]), ["ask gone"]);
        world.read(claimed("gone", "x", "#"));
        assert_eq!(world.daemon.next_check(), RECHECK_SOON, "it still waits for an answer");
        world.read(claimed("gone", "x", "#"));
        assert_eq!(world.daemon.next_check(), RECHECK, "another daemon's");
        // A connection that is lost may lose echoes too.
        let mut world = World::new(&[("gone", "#")], &[]);
        world.reopen(&[claimed("gone", "x", "#")], PauseStates::default());
        world.configure(&[]);
        world.read(claimed("gone", "x", "#"));
        assert_eq!(world.daemon.next_check(), RECHECK);
    }

    #[test]
    fn daemons_with_different_configurations_claim_the_patterns_of_both() {
        let differs = "log Differs(\"a\")";
        for (recorded, expected) in [
            (claimed("a", "x", "p q"), &[][..]),
            (claimed("a", "x", "p q r"), &[differs, "bind a"]),
            (claimed("a", "x", "p r"), &[differs, "bind a", "claim a x:p,q,r"]),
            (claimed("a", "other", "p q"), &[differs, "bind a"]),
            (removed("a"), &[differs, "bind a", "claim a x:p,q"]),
        ] {
            let mut world = World::new(&[("a", "p q")], &[claimed("a", "x", "p q")]);
            assert_eq!(world.done(), [""; 0]);
            assert_eq!(world.read(recorded.clone()), expected, "{recorded:?}");
            let again = world.read(recorded.clone());
            assert!(!again.contains(&differs.to_owned()), "logged once: {recorded:?}");
            world.read(claimed("a", "x", "p q"));
            let later = world.read(claimed("a", "x", "p r"));
            assert_eq!(later.first().map(String::as_str), Some(differs), "they agreed meanwhile");
        }
    }

    #[test]
    fn a_changed_configuration_unbinds_its_former_patterns_and_those_that_stay_bound_stay_recorded()
    {
        let mut world = World::new(&[("a", "p q")], &[claimed("a", "x", "p q")]);
        let unbound = |pattern: &str| {
            format!(
                "log PatternUnbound {{ subscriber: \"a\", exchange: \"x\", pattern: \"{pattern}\" }}"
            )
        };
        assert_eq!(
            world.configure(&[("a", "q r")]),
            ["bind a", "unbind a x:p", &unbound("p"), "claim a x:q,r"]
        );
        world.refuses_unbinding = true;
        let tried = ["bind a", "unbind a x:r", "claim a x:q,r"];
        assert_eq!(world.configure(&[("a", "q")]), tried[..2], "the record says it already");
        assert_eq!(world.check(RECHECK), tried[..2]);
        assert_eq!(world.daemon.to_be_bound()["a"], bound("x", "q").patterns);
        world.refuses_unbinding = false;
        assert_eq!(world.check(RECHECK), ["bind a", "unbind a x:r", &unbound("r"), "claim a x:q"]);
        assert_eq!(world.check(RECHECK), [""; 0]);
    }

    #[test]
    fn after_a_change_of_the_exchange_the_former_one_is_unbound_before_the_record_names_the_new_one()
     {
        let recorded = [claimed("a", "former", "p")];
        let unbound =
            "log PatternUnbound { subscriber: \"a\", exchange: \"former\", pattern: \"p\" }";
        let done =
            ["bind a", "unbind a former:p", unbound, "release witness former", "claim a x:p"];
        let mut world = World::new(&[("a", "p")], &recorded);
        assert_eq!(world.done(), done);
        let mut world = World::new(&[], &[]);
        world.refuses_unbinding = true;
        world.reopen(&recorded, PauseStates::default());
        world.done();
        let tried = ["bind a", "unbind a former:p", "release witness former"];
        assert_eq!(world.configure(&[("a", "p")]), tried);
        assert_eq!(world.daemon.to_be_bound()["a"], bound("x", "p").patterns, "bound to both");
        world.refuses_unbinding = false;
        assert_eq!(world.check(RECHECK), done);
    }

    #[test]
    fn a_subscriber_that_was_removed_and_is_configured_again_is_bound_and_claimed() {
        let mut world = World::new(&[], &[claimed("a", "x", "#"), removed("a")]);
        assert_eq!(world.done(), [""; 0]);
        assert_eq!(world.configure(&[("a", "p")]), ["bind a", "claim a x:p"]);
        assert!(world.daemon.recorded().bindings.contains_key("a"));
        // What another daemon has removed stays unbound until it is bound again.
        world.daemon.apply(removed("a"));
        assert!(world.daemon.to_be_bound().is_empty());
    }

    #[test]
    fn a_record_that_was_lost_is_written_again_with_its_pauses() {
        let mut world = World::new(&[("a", "#"), ("b", "#")], &[]);
        assert_eq!(world.done().len(), 4, "an empty record is no lost one at the start");
        let at = SystemTime::UNIX_EPOCH;
        let known: PauseStates =
            Arc::new([("b".into(), PauseState::Resumed { at })].into_iter().collect());
        world.reopen(&[], known.clone());
        assert_eq!(
            world.done(),
            [
                "log RecordLost",
                "pause b false",
                "log ClaimLost(\"a\")",
                "bind a",
                "claim a x:#",
                "log ClaimLost(\"b\")",
                "bind b",
                "claim b x:#",
            ]
        );
        assert_eq!(world.daemon.recorded().pause_states, known);
        // A part of it.
        world.reopen(&[claimed("a", "x", "#")], known.clone());
        assert_eq!(world.done(), ["log ClaimLost(\"b\")", "bind b", "claim b x:#"]);
        world.reopen(&[claimed("a", "x", "#"), removed("b")], known);
        assert_eq!(world.done(), ["log Differs(\"b\")", "bind b", "claim b x:#"], "not lost");
    }

    #[test]
    fn a_daemon_answers_for_a_subscriber_that_it_has_paused_and_for_no_other() {
        // A daemon that consumes nothing says that it serves the subscriber.
        let mut world = World::new(&[("a", "p")], &[claimed("a", "x", "p")]);
        assert_eq!(world.read(asked("a")), ["claim a x:p"]);
        assert_eq!(world.read(asked("b")), [""; 0]);
        // Also if it was asked while it did not read.
        world.reopen(&[claimed("a", "x", "p"), asked("a"), asked("b")], PauseStates::default());
        assert_eq!(world.done(), ["claim a x:p"]);
        // The answer has the patterns of both daemons.
        world.read(claimed("a", "x", "p q"));
        assert_eq!(world.read(asked("a")), ["claim a x:p,q"]);
    }

    #[test]
    fn a_subscriber_that_cannot_be_unbound_stays_in_the_record_and_is_not_asked_for_again() {
        let mut world = World::new(&[], &[claimed("gone", "x", "#")]);
        assert_eq!(world.done(), ["ask gone"]);
        world.refuses_unbinding = true;
        assert_eq!(world.check(SOON), ["unbind gone x:#"]);
        assert_eq!(world.daemon.next_check(), RECHECK);
        assert_eq!(world.check(RECHECK), ["unbind gone x:#"]);
        world.refuses_unbinding = false;
        assert_eq!(
            world.check(RECHECK),
            ["unbind gone x:#", "log Unbound(\"gone\")", "release gone"]
        );
    }

    #[test]
    fn daemons_that_read_one_another_come_to_rest_whatever_they_want() {
        for configurations in [["p", "p"], ["p", "q"], ["p q", "q r"], ["p", ""]] {
            let subscribers = |n: usize| {
                let patterns = configurations[n];
                if patterns.is_empty() { Vec::new() } else { vec![("a", patterns)] }
            };
            let mut daemons = [0, 1].map(|n| World::new(&subscribers(n), &[]));
            let mut stream: Vec<Record> = Vec::new();
            let mut at = [0, 0];
            for _ in 0..20 {
                for (n, daemon) in daemons.iter_mut().enumerate() {
                    let mut done = daemon.done();
                    while let Some(record) = stream.get(at[n]).cloned() {
                        at[n] += 1;
                        done.extend(daemon.read(record));
                    }
                    done.extend(daemon.check(RECHECK));
                    for line in &done {
                        let words: Vec<&str> = line.split(' ').collect();
                        match words[..] {
                            ["claim", name, bound] => {
                                let patterns = bound.trim_start_matches("x:").replace(',', " ");
                                stream.push(claimed(name, "x", &patterns));
                            }
                            ["ask", name] => stream.push(asked(name)),
                            ["release", name] => stream.push(removed(name)),
                            _ => {}
                        }
                    }
                }
            }
            assert!(stream.len() < 12, "{configurations:?}: {stream:?}");
            assert!(daemons[0].daemon.recorded().bindings.contains_key("a"), "{configurations:?}");
        }
    }
}

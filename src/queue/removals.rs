//! Which subscribers a queue may unbind.

use std::{
    collections::BTreeSet,
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use tokio::sync::watch;

use crate::{config::changes::is_drastic, delivery::SubscriberName};

/// Decides which subscribers a queue may unbind. Clones share the decision.
///
/// Events that are published while a subscriber is unbound are lost to it, and a start whose files
/// are missing cannot be distinguished from one whose subscribers were removed. So where a start
/// would unbind all bound subscribers, or most of many, none is unbound before an operator asks for
/// it. Later changes are judged by the reload.
#[derive(Debug, Clone, Default)]
pub struct Removals {
    judged: Arc<watch::Sender<Judged>>,
    /// Other subscribers are configured, and not in use yet.
    changing: Arc<AtomicBool>,
    protected: Arc<Mutex<Protected>>,
}

/// Whether another store may have subscribers of this queue.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Sharing {
    #[default]
    Alone,
    /// That is not known: which store counts on the queue, or which is this daemon's.
    Unknown,
    /// Another store's subscribers count on the queue.
    Elsewhere,
}

/// Subscribers that were made over the API: they go on getting events although they cannot be read,
/// or do not run.
#[derive(Debug, Clone, Default)]
struct Protected {
    names: BTreeSet<SubscriberName>,
    /// There may be others that cannot be read.
    all: bool,
    /// There may be others that another store has.
    sharing: Sharing,
    /// Those that were deleted, which is the word of an operator.
    released: BTreeSet<SubscriberName>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
enum Judged {
    /// It is unknown yet which subscribers are bound.
    #[default]
    Not,
    /// All may be unbound except these.
    Kept(BTreeSet<SubscriberName>),
    Held(HeldRemovals),
}

/// The subscribers that were `bound` when the daemon started, and those of them that are `missing`
/// in the configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeldRemovals {
    pub bound: BTreeSet<SubscriberName>,
    pub missing: BTreeSet<SubscriberName>,
}

impl Removals {
    /// Judges a start. The queue calls it when it knows which subscribers are bound, and each time
    /// that others are configured.
    pub(crate) fn judge(
        &self,
        bound: &BTreeSet<SubscriberName>,
        wanted: &BTreeSet<SubscriberName>,
    ) {
        let Protected { names, released, .. } = self.protected().clone();
        let (bound, wanted) = (&(bound - &released), &(wanted | &names));
        self.judged.send_if_modified(|judged| {
            let new = match judged {
                Judged::Kept(_) => return false,
                Judged::Not if !is_drastic(bound, wanted) => Judged::Kept(wanted.clone()),
                Judged::Not => {
                    Judged::Held(HeldRemovals { bound: bound.clone(), missing: bound - wanted })
                }
                // Files may come back one by one: until all are there, nothing changes.
                Judged::Held(held) if held.bound.is_subset(wanted) => Judged::Kept(wanted.clone()),
                Judged::Held(held) => {
                    Judged::Held(HeldRemovals { missing: &held.bound - wanted, ..held.clone() })
                }
            };
            let changed = *judged != new;
            if let (Judged::Not, Judged::Held(held)) = (&*judged, &new) {
                tracing::error!(subscribers = ?held.missing, "not unbound: {held}");
            }
            *judged = new;
            changed
        });
    }

    /// Whether a subscriber that is not configured may be unbound.
    pub(crate) fn may_unbind(&self, subscriber: &str) -> bool {
        let is_released = {
            let Protected { names, all, sharing, released } = &*self.protected();
            if *all || *sharing != Sharing::Alone || names.contains(subscriber) {
                return false;
            }
            released.contains(subscriber)
        };
        match &*self.judged.borrow() {
            Judged::Not => false,
            Judged::Kept(kept) => !kept.contains(subscriber),
            Judged::Held(_) => is_released,
        }
    }

    /// Has these subscribers go on getting events, or, with `all`, whoever gets them now: until this
    /// is said again.
    pub fn protect(&self, names: BTreeSet<SubscriberName>, all: bool) {
        let mut protected = self.protected();
        protected.released.retain(|name| !names.contains(name));
        (protected.names, protected.all) = (names, all);
    }

    /// Lets one subscriber be unbound that was deleted over the API, also while other removals wait
    /// for an operator.
    pub fn release(&self, name: &SubscriberName) {
        {
            let mut protected = self.protected();
            protected.names.remove(name);
            protected.released.insert(name.clone());
        }
        self.judged.send_modify(|judged| {
            if let Judged::Held(held) = judged {
                held.bound.remove(name);
                held.missing.remove(name);
            }
        });
    }

    /// Unbinds nobody while another store may have subscribers of this queue: this one knows nothing of
    /// them.
    pub fn share(&self, sharing: Sharing) {
        let before = std::mem::replace(&mut self.protected().sharing, sharing);
        if before != Sharing::Alone && sharing == Sharing::Alone {
            self.judged.send_modify(|_| {});
        }
    }

    pub fn sharing(&self) -> Sharing {
        self.protected().sharing
    }

    fn protected(&self) -> MutexGuard<'_, Protected> {
        self.protected.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether subscribers that are not configured may be bound and get events: until it is known
    /// which are bound, while removals wait for an operator, and while a change is applied.
    pub fn others_may_be_bound(&self) -> bool {
        self.changing.load(Ordering::SeqCst) || !matches!(&*self.judged.borrow(), Judged::Kept(_))
    }

    /// Changes when a subscriber may be unbound that was not before.
    pub(crate) fn changes(&self) -> watch::Receiver<impl Sized + use<>> {
        self.judged.subscribe()
    }

    /// Configures these subscribers; they are in use when the result is dropped. Removals that were
    /// held at the start stay held, unless an operator has asked for this.
    pub fn configure(&self, names: BTreeSet<SubscriberName>, by_operator: bool) -> Changing {
        self.changing.store(true, Ordering::SeqCst);
        self.protected().released.retain(|name| !names.contains(name));
        let mut before = Judged::Not;
        self.judged.send_modify(|judged| {
            before.clone_from(judged);
            if by_operator || matches!(judged, Judged::Kept(_)) {
                *judged = Judged::Kept(names);
            }
        });
        Changing { removals: self.clone(), before }
    }

    /// The subscribers that are not unbound before an operator asks for it.
    pub fn held(&self) -> Option<HeldRemovals> {
        match &*self.judged.borrow() {
            Judged::Held(held) => Some(held.clone()),
            Judged::Not | Judged::Kept(_) => None,
        }
    }
}

/// A change of [`Removals::configure`], which lasts until this is dropped.
#[derive(Debug)]
pub struct Changing {
    removals: Removals,
    before: Judged,
}

impl Changing {
    /// Undoes the change.
    pub fn undo(mut self) {
        self.removals.judged.send_replace(std::mem::take(&mut self.before));
    }
}

impl Drop for Changing {
    fn drop(&mut self) {
        self.removals.changing.store(false, Ordering::SeqCst);
    }
}

impl fmt::Display for HeldRemovals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} of the {} subscribers that are bound are not configured ({}). A start alone does not unbind so many: they go on getting events \
             until `hooktrail reload`, SIGHUP or POST /api/v1/reload says that it is meant",
            self.missing.len(),
            self.bound.len(),
            some_of(&self.missing)
        )
    }
}

/// The first few names, and the number of the others.
pub fn some_of(names: &BTreeSet<SubscriberName>) -> String {
    const SHOWN: usize = 5;
    let shown = names.iter().take(SHOWN).map(SubscriberName::as_str).collect::<Vec<_>>().join(", ");
    match names.len().saturating_sub(SHOWN) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(text: &str) -> BTreeSet<SubscriberName> {
        text.split_whitespace().map(SubscriberName::from).collect()
    }

    #[test]
    fn a_start_that_would_unbind_most_unbinds_nobody_until_an_operator_asks_or_they_are_back() {
        let held = || {
            let removals = Removals::default();
            assert!(!removals.may_unbind("a"), "it is not known who is bound");
            removals.judge(&names("a b c d e"), &names("e x y z"));
            assert_eq!(removals.held().expect("held").missing, names("a b c d"));
            removals
        };
        let operator = held();
        assert!(!operator.may_unbind("a"));
        operator.configure(names("e"), true);
        assert!(operator.may_unbind("a") && !operator.may_unbind("e") && operator.held().is_none());
        let back = held();
        back.configure(names("a b c e"), false);
        // Those that came with this start are bound by now, and say nothing of what was there
        // before.
        back.judge(&names("a b c d e x y z"), &names("x y z e"));
        assert!(back.held().is_some());
        // One by one.
        back.judge(&names("a b c d e x y z"), &names("a b c e"));
        assert!(!back.may_unbind("d") && back.held().expect("held").missing == names("d"));
        back.judge(&names("a b c d e x y z"), &names("a b c d e"));
        assert!(back.held().is_none() && back.may_unbind("x") && !back.may_unbind("a"));
    }

    #[test]
    fn a_deletion_unbinds_that_one_subscriber_while_other_removals_wait() {
        let removals = Removals::default();
        removals.protect(names("api other"), false);
        removals.judge(&names("a b c d api"), &names("x y"));
        assert_eq!(removals.held().expect("held").missing, names("a b c d"));
        removals.release(&"api".into());
        removals.protect(names("other"), false);
        drop(removals.configure(names("x y"), false));
        removals.judge(&names("a b c d api x y"), &names("x y"));
        assert!(removals.may_unbind("api") && !removals.may_unbind("a"));
        assert_eq!(removals.held().expect("held").missing, names("a b c d"));
        // Made again.
        removals.protect(names("api other"), false);
        assert!(!removals.may_unbind("api"));
        removals.protect(names("other"), false);
        assert!(!removals.may_unbind("api"), "no deletion: what lacks it is no operator");
    }

    #[test]
    fn nobody_is_unbound_while_another_store_may_have_subscribers() {
        let removals = Removals::default();
        removals.judge(&names("a b"), &names("a b"));
        drop(removals.configure(names("a"), true));
        for sharing in [Sharing::Unknown, Sharing::Elsewhere] {
            removals.share(sharing);
            assert!(!removals.may_unbind("b"), "{sharing:?}");
        }
        let mut changes = removals.changes();
        changes.mark_unchanged();
        removals.share(Sharing::Alone);
        assert!(removals.may_unbind("b") && changes.has_changed().expect("open"));
        removals.protect(BTreeSet::new(), true);
        assert!(!removals.may_unbind("b"), "some cannot be read");
    }

    #[test]
    fn what_a_running_daemon_removes_may_be_unbound_unless_that_was_given_up() {
        let removals = Removals::default();
        removals.judge(&names("a b"), &names("a b"));
        let before = removals.configure(names("a"), false);
        assert!(removals.may_unbind("b"));
        assert!(removals.others_may_be_bound(), "until the others are in use");
        before.undo();
        assert!(!removals.may_unbind("b") && !removals.others_may_be_bound());
    }
}

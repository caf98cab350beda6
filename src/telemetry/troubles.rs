//! The troubles of a queue: what keeps it from its work.

use std::collections::BTreeMap;

use crate::delivery::SubscriberName;

/// The troubles of a queue by their subject, each with its cause. A trouble ends by itself or needs
/// an operator; the status shows it either way.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Troubles(BTreeMap<String, (Harms, String)>);

/// What a trouble harms.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Harms {
    /// Work other than delivery, such as the intake of events.
    Queue,
    /// Every lane.
    Lanes,
    /// What is remembered of events: no delivery, and no intake.
    History,
    Subscriber(SubscriberName),
}

impl Troubles {
    /// Returns whether the trouble is new, or has a new cause.
    pub fn begins(&mut self, about: &str, harms: Harms, why: String) -> bool {
        self.0
            .insert(about.to_owned(), (harms, why.clone()))
            .is_none_or(|(_, before)| before != why)
    }

    /// Returns whether there was such a trouble.
    pub fn ends(&mut self, about: &str) -> bool {
        self.0.remove(about).is_some()
    }

    /// Forgets the troubles about anything else. Returns whether there were any.
    pub fn retain(&mut self, wanted: impl Fn(&str) -> bool) -> bool {
        let before = self.0.len();
        self.0.retain(|about, _| wanted(about));
        self.0.len() != before
    }

    pub fn has(&self, about: &str) -> bool {
        self.0.contains_key(about)
    }

    /// Why the queue as a whole does not work; what harms delivery comes first.
    pub fn of_queue(&self) -> Option<String> {
        let of = |wanted: Harms| {
            self.0.values().filter(move |(harms, _)| *harms == wanted).map(|(_, why)| why.as_str())
        };
        let mut all: Vec<&str> = Vec::new();
        for why in of(Harms::Lanes).chain(of(Harms::Queue)) {
            // Several connections fail for the same reason.
            if !all.contains(&why) {
                all.push(why);
            }
        }
        (!all.is_empty()).then(|| all.join("; "))
    }

    /// Why events are not remembered.
    pub fn of_history(&self) -> Option<&str> {
        let mut all = self.0.values().filter(|(harms, _)| *harms == Harms::History);
        all.next().map(|(_, why)| why.as_str())
    }

    /// Why a subscriber does not get its events.
    pub fn of_subscriber(&self, name: &str) -> Option<&str> {
        let find = |concerns: &dyn Fn(&Harms) -> bool| {
            self.0.values().find(|(harms, _)| concerns(harms)).map(|(_, why)| why.as_str())
        };
        find(&|harms| *harms == Harms::Lanes)
            .or_else(|| find(&|harms| matches!(harms, Harms::Subscriber(s) if *s == name)))
    }
}

//! What keeps a queue from its work.

use std::collections::BTreeMap;

use crate::delivery::SubscriberName;

/// What keeps a queue from its work, by what it is about, each with its cause. It ends by itself or
/// needs an operator; whoever asks how the daemon is has to see it either way.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Troubles(BTreeMap<String, (Harms, String)>);

/// What a trouble keeps from being done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Harms {
    /// Something beside delivery, such as taking events in.
    Queue,
    /// Every lane.
    Lanes,
    Subscriber(SubscriberName),
}

impl Troubles {
    /// Returns whether that is new.
    pub fn begins(&mut self, about: &str, harms: Harms, why: String) -> bool {
        self.0
            .insert(about.to_owned(), (harms, why.clone()))
            .is_none_or(|(_, before)| before != why)
    }

    /// Returns whether there was one.
    pub fn ends(&mut self, about: &str) -> bool {
        self.0.remove(about).is_some()
    }

    /// Forgets those that are about something else.
    pub fn retain(&mut self, wanted: impl Fn(&str) -> bool) -> bool {
        let before = self.0.len();
        self.0.retain(|about, _| wanted(about));
        self.0.len() != before
    }

    pub fn has(&self, about: &str) -> bool {
        self.0.contains_key(about)
    }

    /// Why the queue as a whole does not work as it should; what harms delivery comes first.
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

    /// Why a subscriber does not get what it should.
    pub fn of_subscriber(&self, name: &str) -> Option<&str> {
        let find = |concerns: &dyn Fn(&Harms) -> bool| {
            self.0.values().find(|(harms, _)| concerns(harms)).map(|(_, why)| why.as_str())
        };
        find(&|harms| *harms == Harms::Lanes)
            .or_else(|| find(&|harms| matches!(harms, Harms::Subscriber(s) if *s == name)))
    }
}

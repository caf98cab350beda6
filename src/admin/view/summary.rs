//! Many subscribers at a glance: their sums, and those that an operator has to see first.

use std::cmp::{Ordering, Reverse};

use super::{Lane, State, Subscriber};

/// So many subscribers are all shown; of more, the worst.
const ALL: usize = 100;

const WORST: usize = 20;

/// More subscribers than anybody reads through.
#[derive(Debug)]
pub struct Summary<'a> {
    /// How many are in each state, the worst first.
    pub states: Vec<(&'a State, usize)>,
    /// Events that wait in queues or are in hand.
    pub events: u64,
    pub retries: u64,
    pub dead: u64,
    pub delivered_per_s: f64,
    /// Those in the worst state, the worst first.
    pub worst: Vec<&'a Subscriber>,
}

impl<'a> Summary<'a> {
    /// `None` where they are few enough to be all shown.
    pub fn of(subscribers: &'a [Subscriber]) -> Option<Self> {
        if subscribers.len() <= ALL {
            return None;
        }
        let mut states: Vec<(&State, usize)> = Vec::new();
        for s in subscribers {
            match states.iter_mut().find(|(state, _)| **state == s.state) {
                Some((_, count)) => *count += 1,
                None => states.push((&s.state, 1)),
            }
        }
        states.sort_by_key(|(state, _)| Reverse(severity(state)));
        let mut worst: Vec<&Subscriber> = subscribers.iter().collect();
        // Where both are as bad the order of the list stays.
        worst.sort_by(|a, b| badness(b).cmp(&badness(a)).then_with(|| older(a, b)));
        worst.truncate(WORST);
        let lanes = || subscribers.iter().filter_map(|s| s.lane.as_ref());
        let sum = |of: fn(&Lane) -> Option<u64>| lanes().filter_map(of).sum();
        Some(Self {
            states,
            events: sum(|l| Some(l.backlog.unwrap_or(0) + l.in_hand)),
            retries: sum(|l| l.in_retry),
            dead: sum(|l| l.dead),
            delivered_per_s: lanes().map(|l| l.delivered_per_s).sum(),
            worst,
        })
    }
}

/// How urgent a state is.
fn severity(state: &State) -> u8 {
    match state {
        State::Ok => 0,
        State::Starting => 1,
        State::Other(_) => 2,
        State::Inactive => 3,
        State::Paused => 4,
        State::Waiting => 5,
        State::Held => 6,
        State::Retrying => 7,
        State::CircuitOpen => 8,
        State::QueueFails => 9,
    }
}

/// The state, then what was given up. Dead letters wait for an operator as a pause does.
fn badness(s: &Subscriber) -> (u8, u64) {
    let dead = s.lane.as_ref().and_then(|l| l.dead).unwrap_or(0);
    let state = match &s.state {
        // Its last batch was given up, and nothing waits.
        State::Retrying if s.lane.as_ref().is_some_and(Lane::is_idle) => severity(&State::Starting),
        state => severity(state),
    };
    (if dead > 0 { state.max(severity(&State::Paused)) } else { state }, dead)
}

/// First whose oldest event waits longest, then who has more of them.
fn older(a: &Subscriber, b: &Subscriber) -> Ordering {
    let age = |s: &Subscriber| s.lane.as_ref().and_then(|l| l.oldest_event_age_s).unwrap_or(0.0);
    let backlog = |s: &Subscriber| s.lane.as_ref().and_then(|l| l.backlog);
    age(b).total_cmp(&age(a)).then_with(|| backlog(b).cmp(&backlog(a)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admin::view::words::subscriber;
    use serde_json::json;

    #[test]
    fn of_many_those_in_the_worst_state_are_first_and_all_are_counted() {
        let of = |name: &str, state: &str, dead: u64, age: f64, backlog: u64| {
            subscriber(json!({
                "subscriber": name, "state": state, "dead": dead, "oldest_event_age_s": age, "backlog": backlog,
                "in_hand": 1, "in_retry": 2, "delivered_per_s": 0.5,
            }))
        };
        let mut all: Vec<Subscriber> =
            (0..95).map(|n| of(&format!("ok-{n}"), "ok", 0, 0.0, 0)).collect();
        assert!(Summary::of(&all).is_none());
        all.extend([
            of("paused", "paused", 0, 0.0, 9),
            of("lately", "circuit_open", 0, 10.0, 0),
            of("long", "circuit_open", 0, 20.0, 0),
            of("dead", "circuit_open", 1, 5.0, 0),
            of("letters", "ok", 3, 0.0, 0),
            of("queue", "queue_fails", 0, 0.0, 0),
        ]);
        let failed = json!({ "subscriber": "failed", "state": "retrying", "in_retry": 0 });
        all.push(subscriber(failed));
        let found = Summary::of(&all).expect("they are many");
        let names: Vec<&str> = found.worst.iter().map(|s| s.subscriber.as_str()).collect();
        let first =
            ["queue", "dead", "long", "lately", "letters", "paused", "failed", "ok-0", "ok-1"];
        assert_eq!((names.len(), &names[..9]), (20, &first[..]));
        let states: Vec<(&str, usize)> = found.states.iter().map(|(s, n)| (s.name(), *n)).collect();
        assert_eq!(
            states,
            [("queue_fails", 1), ("circuit_open", 3), ("retrying", 1), ("paused", 1), ("ok", 96)]
        );
        assert_eq!((found.events, found.retries, found.dead), (101 + 9, 202, 4));
        assert_eq!(found.delivered_per_s, 50.5);
    }
}

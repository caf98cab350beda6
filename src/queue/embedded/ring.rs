//! The last events of the log in memory, each with the subscribers that get it. Its bytes are
//! bounded: those of the events, and of the lists of subscribers, of which each is there once.

use std::{
    collections::{HashMap, VecDeque, hash_map::Entry},
    sync::Arc,
};

use super::consumer::Stored;

/// Bytes that an event takes besides its texts.
pub(super) const EVENT_COST: usize = 256;

/// Bytes that a list of subscribers takes besides their indexes.
const LIST_COST: usize = 64;

/// An event, and the subscribers that get it.
#[derive(Debug)]
pub(super) struct Passed {
    /// Their indexes, in order.
    pub(super) owners: Arc<[u32]>,
    pub(super) event: Stored,
}

impl Passed {
    /// What it takes if no other event has its list.
    pub(super) fn bytes(&self) -> usize {
        event_bytes(&self.event) + list_bytes(&self.owners)
    }

    /// Gives the subscribers other indexes, by their old ones.
    pub(super) fn renumber(&mut self, indexes: &[Option<u32>]) {
        self.owners = renumbered(&self.owners, indexes);
    }
}

fn renumbered(owners: &[u32], indexes: &[Option<u32>]) -> Arc<[u32]> {
    let new = |owner: &u32| indexes.get(*owner as usize).copied().flatten();
    let mut others: Vec<u32> = owners.iter().filter_map(new).collect();
    others.sort_unstable();
    others.into()
}

fn event_bytes(event: &Stored) -> usize {
    event.bytes() + EVENT_COST
}

fn list_bytes(owners: &[u32]) -> usize {
    size_of_val(owners) + LIST_COST
}

#[derive(Debug, Default)]
pub(super) struct Ring {
    events: VecDeque<Passed>,
    /// Each list of owners, and how many of the events have it. With many subscribers a list may
    /// have more bytes than its event, and most events have one of few.
    lists: HashMap<Arc<[u32]>, usize>,
    bytes: usize,
    after: i64,
}

impl Ring {
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// All events after this number are in it, up to the last one.
    pub(super) fn after(&self) -> i64 {
        self.after
    }

    /// The number of the first event.
    pub(super) fn first(&self) -> Option<i64> {
        self.events.front().map(|passed| passed.event.seq)
    }

    /// The events after a number.
    pub(super) fn behind(&self, seq: i64) -> impl Iterator<Item = &Passed> {
        let first = self.events.partition_point(|passed| passed.event.seq <= seq);
        self.events.range(first..)
    }

    /// Begins again, after this number.
    pub(super) fn clear(&mut self, after: i64) {
        *self = Self { after, ..Self::default() };
    }

    pub(super) fn push(&mut self, passed: Passed) {
        self.bytes += event_bytes(&passed.event);
        let owners = self.list(passed.owners, 1);
        self.events.push_back(Passed { owners, event: passed.event });
    }

    /// The list for so many more events.
    fn list(&mut self, owners: Arc<[u32]>, events: usize) -> Arc<[u32]> {
        match self.lists.entry(owners) {
            Entry::Occupied(mut known) => {
                *known.get_mut() += events;
                known.key().clone()
            }
            Entry::Vacant(new) => {
                self.bytes += list_bytes(new.key());
                let owners = new.key().clone();
                new.insert(events);
                owners
            }
        }
    }

    /// Gives the subscribers other indexes, by their old ones. Who has none any more gets nothing.
    pub(super) fn renumber(&mut self, indexes: &[Option<u32>]) {
        let mut renumbered: HashMap<*const u32, Arc<[u32]>> = HashMap::new();
        for (owners, events) in std::mem::take(&mut self.lists) {
            self.bytes -= list_bytes(&owners);
            renumbered
                .insert(owners.as_ptr(), self.list(self::renumbered(&owners, indexes), events));
        }
        for passed in &mut self.events {
            if let Some(owners) = renumbered.get(&passed.owners.as_ptr()) {
                passed.owners = owners.clone();
            }
        }
    }

    pub(super) fn drop_oldest(&mut self) {
        let Some(Passed { owners, event }) = self.events.pop_front() else { return };
        self.after = event.seq;
        self.bytes -= event_bytes(&event);
        if let Some(events) = self.lists.get_mut(&owners) {
            *events -= 1;
            if *events == 0 {
                self.lists.remove(&owners);
                self.bytes -= list_bytes(&owners);
            }
        }
    }

    /// Drops the oldest events until the others have at most so many bytes.
    pub(super) fn fit(&mut self, most: usize) {
        while self.bytes > most && !self.events.is_empty() {
            self.drop_oldest();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    /// The bytes that are really there: each list as often as there are allocations of it.
    fn held(ring: &Ring) -> usize {
        let events = ring.events.iter().map(|passed| passed.event.body.len() + EVENT_COST);
        let lists: BTreeMap<*const u32, usize> =
            ring.events.iter().map(|p| (p.owners.as_ptr(), size_of_val(&*p.owners))).collect();
        events.sum::<usize>() + lists.values().map(|bytes| bytes + LIST_COST).sum::<usize>()
    }

    proptest! {
        #[test]
        fn its_bytes_are_those_of_its_events_and_of_each_list_once(
            passed in prop::collection::vec((0_usize..300, 0_u32..2000, 0_usize..3), 1..200),
            most in 1_usize..50_000,
        ) {
            let mut ring = Ring::default();
            for ((body, owners, dropped), seq) in passed.into_iter().zip(1..) {
                // No two events bring the same list, as after a restart.
                let owners: Vec<u32> = (0..owners / 500 * 500 + 1).collect();
                let event = Stored { body: vec![b'x'; body].into(), ..Stored::numbered(seq) };
                ring.push(Passed { owners: owners.into(), event });
                (0..dropped).for_each(|_| ring.drop_oldest());
                prop_assert_eq!(ring.bytes(), held(&ring));
                ring.fit(most);
                prop_assert!(held(&ring) <= most);
                prop_assert_eq!(ring.bytes(), held(&ring));
            }
            ring.fit(0);
            prop_assert_eq!((ring.bytes(), ring.lists.len()), (0, 0));
        }
    }

    proptest! {
        #[test]
        fn with_other_indexes_each_event_has_the_same_subscribers_that_are_left(
            passed in prop::collection::vec(prop::collection::btree_set(0_u32..8, 0..5), 1..50),
            left in prop::collection::vec(any::<bool>(), 8),
            order in Just((0_u32..8).collect::<Vec<_>>()).prop_shuffle(),
        ) {
            let mut ring = Ring::default();
            for (owners, seq) in passed.iter().zip(1..) {
                let owners = owners.iter().copied().collect();
                ring.push(Passed { owners, event: Stored::numbered(seq) });
            }
            let index = |old: usize| left[old].then_some(order[old]);
            let indexes: Vec<Option<u32>> = (0..8).map(index).collect();
            ring.renumber(&indexes);
            prop_assert_eq!(ring.bytes(), held(&ring));
            for (found, before) in ring.behind(0).zip(&passed) {
                let mut expected: Vec<u32> =
                    before.iter().filter_map(|old| indexes[*old as usize]).collect();
                expected.sort_unstable();
                prop_assert_eq!(&found.owners[..], expected);
            }
            ring.fit(0);
            prop_assert_eq!((ring.bytes(), ring.lists.len()), (0, 0));
        }
    }

    #[test]
    fn an_event_counts_with_all_its_texts() {
        let plain = Passed { owners: [1, 2].into(), event: Stored::numbered(1) };
        let mut event = Stored::numbered(1);
        (event.message_id, event.traceparent) = (Some("x".repeat(30)), Some("y".repeat(4)));
        event.body = format!("{{{}", "x".repeat(499)).into();
        event.checked = Some(crate::queue::Checked::of(&event.body));
        let why = event.checked.as_ref().expect("checked").timestamp.as_ref().expect_err("no JSON");
        let why = why.to_string().len() - "the event is not JSON: ".len();
        assert!(why > 0, "it says what is wrong");
        let long = Passed { owners: [1, 2].into(), event };
        assert_eq!(long.bytes(), plain.bytes() + 30 + 4 + 500 + why);
    }
}

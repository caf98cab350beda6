//! The records of the state stream, and the state that they fold into.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, SystemTime},
};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::{
    clock,
    delivery::{Pause, PauseState, PauseStates, SubscriberName},
};

/// A daemon that serves a subscriber answers an [`Asked`](Record::Asked) record within this time.
pub(super) const OWNER_REPLY_TIMEOUT: Duration = Duration::from_millis(1500);

/// A record of the stream. The last one of a subscriber counts. Fields that a later version adds
/// are ignored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub(super) enum Record {
    Bound {
        subscriber: SubscriberName,
        /// Missing in the first records of version 0.1.0: it is the exchange of today's
        /// configuration.
        #[serde(default)]
        exchange: Option<String>,
        patterns: BTreeSet<String>,
        at: String,
    },
    Removed {
        subscriber: SubscriberName,
        removed: bool,
        /// Its queues were deleted.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        pruned: bool,
        at: String,
    },
    PauseState {
        subscriber: SubscriberName,
        paused: bool,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        why: Option<String>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        by: Option<String>,
        /// Begin of the pause, or of its end.
        #[serde(with = "rfc3339")]
        at: SystemTime,
    },
    /// A daemon is about to unbind a subscriber: a daemon that serves it answers with its claim.
    Asked { asked: SubscriberName },
    /// Written by a daemon that begins to read, to recognise the end.
    Mark { mark: String },
    /// The queue of history misses events: why; empty once the store has a gap of that time. Not an
    /// option: any record would have that.
    Unbound {
        history_lacks: String,
        /// The begin of that time; missing in earlier records, and where the writer does not know it.
        #[serde(
            default,
            serialize_with = "write_known",
            deserialize_with = "read_known",
            skip_serializing_if = "Option::is_none"
        )]
        since: Option<SystemTime>,
        #[serde(with = "rfc3339")]
        at: SystemTime,
    },
    /// A store has the history of this prefix: the first that is recorded, unless one is `adopted`.
    Store {
        store: String,
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        adopted: bool,
        at: String,
    },
    /// A store has subscribers that were made over the API: the first that is recorded, unless one is
    /// `adopted`. A store that adopts history has them too.
    Manages {
        manages: String,
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        adopted: bool,
        at: String,
    },
}

/// Events that history lacks, as a daemon has found: which store has their gap is another matter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Lack {
    pub(super) why: String,
    /// Before this time none were lost; `None`: that is not known.
    pub(super) since: Option<SystemTime>,
    /// When it was found. It lasts until the queue is bound.
    pub(super) at: SystemTime,
}

impl Lack {
    /// Both as one, with the cause of the later.
    pub(super) fn joined(self, later: Self) -> Self {
        let since = self.since.zip(later.since).map(|(a, b)| a.min(b));
        Self { why: later.why, since, at: self.at.max(later.at) }
    }

    /// The record that a store has a gap of this time. Without a begin it is of a version that ends
    /// every lack.
    fn is_covered(&self, since: Option<SystemTime>, until: SystemTime) -> bool {
        since.is_none_or(|from| until >= self.at && self.since.is_none_or(|since| from <= since))
    }
}

impl From<Lack> for Record {
    fn from(Lack { why, since, at }: Lack) -> Self {
        Self::Unbound { history_lacks: why, since, at }
    }
}

/// The bindings of a subscriber's queue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Bound {
    pub(super) exchange: String,
    pub(super) patterns: BTreeSet<String>,
}

/// The patterns of the record, by subscriber.
pub(super) type Patterns = BTreeMap<SubscriberName, BTreeSet<String>>;

pub(super) type Bindings = BTreeMap<SubscriberName, Bound>;

impl Record {
    /// The number of kinds that a state can fold into, which is every kind except marks. A version
    /// that knows fewer leaves the others out of its snapshots.
    pub(super) const KINDS: u32 = 7;

    pub(super) fn of(subscriber: &SubscriberName, pause_state: &PauseState) -> Self {
        let subscriber = subscriber.clone();
        match pause_state.clone() {
            PauseState::Paused(Pause { why, since, by }) => Self::PauseState {
                subscriber,
                paused: true,
                why: Some(why),
                by: Some(by),
                at: since,
            },
            PauseState::Resumed { at } => {
                Self::PauseState { subscriber, paused: false, why: None, by: None, at }
            }
        }
    }
}

/// The folded state stream.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) struct Recorded {
    pub(super) bindings: Bindings,
    pub(super) pause_states: PauseStates,
    /// Removed subscribers, whose queues may still exist.
    pub(super) removed: BTreeSet<SubscriberName>,
    /// Subscribers of which a daemon has asked who serves them, without an answer yet.
    pub(super) asked: BTreeSet<SubscriberName>,
    /// The store that has history.
    pub(super) store: Option<String>,
    /// The store that has subscribers made over the API.
    pub(super) manager: Option<String>,
    /// Events that history lacks, until its store has that gap.
    pub(super) history_lacks: Option<Lack>,
}

/// The subject of a record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum About {
    Bindings(SubscriberName),
    Pruned(SubscriberName),
    PauseState(SubscriberName),
    Asked(SubscriberName),
    Nothing,
}

impl Recorded {
    /// The patterns bound to this exchange, by subscriber.
    pub(super) fn bound_to(&self, exchange: &str) -> Patterns {
        let bound = self.bindings.iter().filter(|(_, bound)| bound.exchange == exchange);
        bound.map(|(name, bound)| (name.clone(), bound.patterns.clone())).collect()
    }

    /// The fewest records that fold into this state.
    pub(super) fn records(&self) -> Vec<Record> {
        let at = now();
        let removed = |name: &SubscriberName| Record::Removed {
            subscriber: name.clone(),
            removed: true,
            pruned: false,
            at: at.clone(),
        };
        let bound =
            |(name, Bound { exchange, patterns }): (&SubscriberName, &Bound)| Record::Bound {
                subscriber: name.clone(),
                exchange: Some(exchange.clone()),
                patterns: patterns.clone(),
                at: at.clone(),
            };
        let pause_states =
            self.pause_states.iter().map(|(name, pause_state)| Record::of(name, pause_state));
        // A claim answers the question of its subscriber, so that questions come last.
        let store = self.store.iter().map(|store| Record::Store {
            store: store.clone(),
            adopted: false,
            at: at.clone(),
        });
        let manager = self.manager.iter().map(|store| Record::Manages {
            manages: store.clone(),
            adopted: false,
            at: at.clone(),
        });
        let lacks = self.history_lacks.iter().cloned().map(Record::from);
        let asked = self.asked.iter().map(|name| Record::Asked { asked: name.clone() });
        self.removed
            .iter()
            .map(removed)
            .chain(self.bindings.iter().map(bound))
            .chain(pause_states)
            .chain(store)
            .chain(manager)
            .chain(lacks)
            .chain(asked)
            .collect()
    }

    pub(super) fn apply(&mut self, record: Record, exchange: &str) -> About {
        match record {
            Record::Bound { subscriber, exchange: bound_to, patterns, .. } => {
                let exchange = bound_to.unwrap_or_else(|| exchange.to_owned());
                self.removed.remove(&subscriber);
                self.asked.remove(&subscriber);
                self.bindings.insert(subscriber.clone(), Bound { exchange, patterns });
                About::Bindings(subscriber)
            }
            Record::Removed { subscriber, pruned, .. } => {
                self.bindings.remove(&subscriber);
                self.asked.remove(&subscriber);
                if !pruned {
                    self.removed.insert(subscriber.clone());
                    return About::Bindings(subscriber);
                }
                self.removed.remove(&subscriber);
                // A subscriber of the same name starts without a pause.
                Arc::make_mut(&mut self.pause_states).remove(&subscriber);
                About::Pruned(subscriber)
            }
            Record::PauseState { subscriber, paused, why, by, at } => {
                let pause = || Pause {
                    why: why.unwrap_or_default(),
                    since: at,
                    by: by.unwrap_or_default(),
                };
                let pause_state =
                    if paused { PauseState::Paused(pause()) } else { PauseState::Resumed { at } };
                Arc::make_mut(&mut self.pause_states).insert(subscriber.clone(), pause_state);
                About::PauseState(subscriber)
            }
            Record::Asked { asked } => {
                self.asked.insert(asked.clone());
                About::Asked(asked)
            }
            Record::Store { store, adopted, .. } => {
                if adopted && self.manager.is_some() {
                    self.manager = Some(store.clone());
                }
                if adopted || self.store.is_none() {
                    self.store = Some(store);
                }
                About::Nothing
            }
            Record::Manages { manages, adopted, .. } => {
                if adopted || self.manager.is_none() {
                    self.manager = Some(manages);
                }
                About::Nothing
            }
            Record::Unbound { history_lacks: why, since, at } => {
                let known = self.history_lacks.take();
                self.history_lacks = match (known, why.is_empty()) {
                    (known, true) => known.filter(|lack| !lack.is_covered(since, at)),
                    (None, false) => Some(Lack { why, since, at }),
                    (Some(known), false) => Some(known.joined(Lack { why, since, at })),
                };
                About::Nothing
            }
            Record::Mark { .. } => About::Nothing,
        }
    }
}

mod rfc3339 {
    use std::time::SystemTime;

    use serde::{Deserialize as _, Deserializer, Serializer, de::Error as _};

    pub(super) fn serialize<S: Serializer>(at: &SystemTime, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(&crate::clock::rfc3339(*at))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<SystemTime, D::Error> {
        humantime::parse_rfc3339(&String::deserialize(d)?).map_err(D::Error::custom)
    }
}

/// Writes a time that a record may leave out.
fn write_known<S: Serializer>(at: &Option<SystemTime>, s: S) -> Result<S::Ok, S::Error> {
    match at {
        Some(at) => rfc3339::serialize(at, s),
        None => s.serialize_none(),
    }
}

fn read_known<'de, D: Deserializer<'de>>(d: D) -> Result<Option<SystemTime>, D::Error> {
    rfc3339::deserialize(d).map(Some)
}

/// The time in the format of records.
pub(super) fn now() -> String {
    clock::rfc3339_seconds(clock::now())
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn the_last_record_of_a_subscriber_counts() {
        let mut recorded = Recorded::default();
        for line in [
            r##"{"subscriber":"a","patterns":["x.*"],"at":"2026-01-01T00:00:00Z"}"##,
            r##"{"subscriber":"b","patterns":["#"],"at":"2026-01-01T00:00:00Z"}"##,
            r##"{"subscriber":"c","exchange":"old","patterns":["#"],"at":"2026-01-01T00:00:00Z"}"##,
            r#"{"mark":"msg_1"}"#,
            r##"{"subscriber":"a","patterns":["y.#","z"],"at":"2026-01-02T00:00:00Z","new":"field"}"##,
            r#"{"subscriber":"b","removed":true,"at":"2026-01-02T00:00:00Z"}"#,
        ] {
            let about = recorded.apply(serde_json::from_str(line).expect("a record"), "today's");
            assert_eq!(about == About::Nothing, line.contains("mark"));
        }
        let bound = |exchange: &str, patterns: &[&str]| Bound {
            exchange: exchange.to_owned(),
            patterns: patterns.iter().map(|p| (*p).to_owned()).collect(),
        };
        let expected =
            [("a".into(), bound("today's", &["y.#", "z"])), ("c".into(), bound("old", &["#"]))];
        assert_eq!(recorded.bindings, Bindings::from(expected));
    }

    #[test]
    fn a_pause_is_recorded_alongside_the_bindings_and_read_as_it_was() {
        let since = SystemTime::UNIX_EPOCH + Duration::from_millis(1_700_000_000_123);
        let paused =
            PauseState::Paused(Pause { why: "410".to_owned(), since, by: "receiver".to_owned() });
        let resumed = PauseState::Resumed { at: since };
        let mut recorded = Recorded::default();
        recorded.apply(
            serde_json::from_str(
                r##"{"subscriber":"a","patterns":["#"],"at":"2026-01-01T00:00:00Z"}"##,
            )
            .expect("a record"),
            "x",
        );
        for (name, pause_state) in [("a", &paused), ("b", &paused), ("b", &resumed)] {
            let line =
                serde_json::to_string(&Record::of(&name.into(), pause_state)).expect("prints");
            assert_eq!(
                recorded.apply(serde_json::from_str(&line).expect("a record"), "x"),
                About::PauseState(name.into()),
                "{line}"
            );
        }
        assert_eq!(*recorded.pause_states, [("a".into(), paused), ("b".into(), resumed)].into());
        assert_eq!(recorded.bindings.len(), 1);
    }

    #[test]
    fn the_first_store_has_history_until_another_one_is_adopted() {
        let mut recorded = Recorded::default();
        for (line, store) in [
            (r#"{"store":"a","at":"2026-01-01T00:00:00Z"}"#, "a"),
            (r#"{"store":"b","at":"2026-01-01T00:00:01Z"}"#, "a"),
            (r#"{"store":"c","adopted":true,"at":"2026-01-01T00:00:02Z"}"#, "c"),
            (r#"{"store":"a","at":"2026-01-01T00:00:03Z"}"#, "c"),
        ] {
            recorded.apply(serde_json::from_str(line).expect("a record"), "x");
            assert_eq!(recorded.store.as_deref(), Some(store), "{line}");
        }
    }

    #[test]
    fn the_first_store_has_subscribers_until_another_one_adopts_them_or_history() {
        let mut recorded = Recorded::default();
        for (line, manager) in [
            (r#"{"store":"a","adopted":true,"at":"2026-01-01T00:00:00Z"}"#, None),
            (r#"{"manages":"a","at":"2026-01-01T00:00:01Z"}"#, Some("a")),
            (r#"{"manages":"b","at":"2026-01-01T00:00:02Z"}"#, Some("a")),
            (r#"{"manages":"b","adopted":true,"at":"2026-01-01T00:00:03Z"}"#, Some("b")),
            (r#"{"store":"c","at":"2026-01-01T00:00:04Z"}"#, Some("b")),
            (r#"{"store":"c","adopted":true,"at":"2026-01-01T00:00:05Z"}"#, Some("c")),
        ] {
            recorded.apply(serde_json::from_str(line).expect("a record"), "x");
            assert_eq!(recorded.manager.as_deref(), manager, "{line}");
        }
    }

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    fn lack(why: &str, since: Option<u64>, found: u64) -> Lack {
        Lack { why: why.to_owned(), since: since.map(at), at: at(found) }
    }

    #[test]
    fn a_lack_ends_when_its_whole_time_is_in_the_store_and_not_with_the_gap_of_another() {
        let ended = |since, until| lack("", since, until);
        for (records, left) in [
            (vec![lack("a", Some(10), 20), ended(Some(10), 21)], None),
            // Another daemon has found one meanwhile.
            (
                vec![lack("a", Some(10), 20), lack("b", Some(30), 40), ended(Some(10), 21)],
                Some(lack("b", Some(10), 40)),
            ),
            (
                vec![lack("a", Some(10), 20), lack("b", Some(5), 20), ended(Some(10), 21)],
                Some(lack("b", Some(5), 20)),
            ),
            (vec![lack("a", Some(10), 20), lack("b", Some(5), 20), ended(Some(5), 20)], None),
            // Not known since when.
            (vec![lack("a", None, 20), lack("b", Some(5), 20)], Some(lack("b", None, 20))),
            (vec![lack("a", None, 20), ended(Some(19), 20)], None),
            (vec![lack("a", None, 20), ended(Some(18), 19)], Some(lack("a", None, 20))),
            // Of a version without times.
            (vec![lack("a", Some(10), 20), ended(None, 1)], None),
        ] {
            let mut recorded = Recorded::default();
            for record in records.clone() {
                recorded.apply(record.into(), "x");
            }
            assert_eq!(recorded.history_lacks, left, "{records:?}");
        }
    }

    /// The records of the versions before there was a store.
    #[derive(Debug, Deserialize)]
    #[serde(untagged)]
    #[expect(dead_code, reason = "it is only parsed")]
    enum Before {
        Bound { subscriber: String, patterns: BTreeSet<String>, at: String },
        Removed { subscriber: String, removed: bool, at: String },
        PauseState { subscriber: String, paused: bool, at: String },
        Asked { asked: String },
        Mark { mark: String },
    }

    #[test]
    fn an_earlier_version_does_not_take_a_record_of_history_for_another() {
        for record in [
            Record::Store { store: "a".to_owned(), adopted: true, at: now() },
            Record::Manages { manages: "a".to_owned(), adopted: true, at: now() },
            lack("x", Some(1), 2).into(),
            lack("", Some(1), 2).into(),
            lack("x", None, 2).into(),
        ] {
            let line = serde_json::to_string(&record).expect("prints");
            assert!(serde_json::from_str::<Before>(&line).is_err(), "{line}");
            assert_eq!(serde_json::from_str::<Record>(&line).expect("a record"), record);
        }
        assert!(serde_json::from_str::<Record>(r#"{"later":"kind"}"#).is_err());
    }

    #[test]
    fn the_records_of_a_folded_state_fold_into_the_same_state() {
        let mut recorded = Recorded::default();
        for line in [
            r##"{"subscriber":"a","exchange":"x","patterns":["a.*","b"],"at":"2026-01-01T00:00:00Z"}"##,
            r##"{"subscriber":"b","exchange":"old","patterns":["#"],"at":"2026-01-01T00:00:00Z"}"##,
            r#"{"subscriber":"b","removed":true,"at":"2026-01-02T00:00:00Z"}"#,
            r#"{"subscriber":"c","removed":true,"pruned":true,"at":"2026-01-02T00:00:00Z"}"#,
            r#"{"subscriber":"a","paused":true,"why":"410","by":"receiver","at":"2026-01-02T00:00:00.123Z"}"#,
            r#"{"subscriber":"b","paused":false,"at":"2026-01-02T00:00:00Z"}"#,
            r#"{"asked":"a"}"#,
            r#"{"asked":"b"}"#,
            r#"{"store":"s","at":"2026-01-02T00:00:00Z"}"#,
            r#"{"manages":"m","at":"2026-01-02T00:00:00Z"}"#,
            r#"{"history_lacks":"not bound","since":"2026-01-01T23:59:00.123Z","at":"2026-01-02T00:00:00.456Z"}"#,
        ] {
            recorded.apply(serde_json::from_str(line).expect("a record"), "x");
        }
        let records = recorded.records();
        let kinds: HashSet<_> = records.iter().map(std::mem::discriminant).collect();
        assert_eq!(kinds.len(), Record::KINDS as usize);
        let text = serde_json::to_string(&records).expect("prints");
        let mut again = Recorded::default();
        for record in serde_json::from_str::<Vec<Record>>(&text).expect("records") {
            again.apply(record, "another");
        }
        assert_eq!(again, recorded);
        assert_eq!(again.asked.len(), 2);
        let ended = r#"{"history_lacks":"","at":"2026-01-02T00:00:00Z"}"#;
        again.apply(serde_json::from_str(ended).expect("a record"), "x");
        assert_eq!(
            (again.history_lacks, recorded.history_lacks.map(|lack| lack.why)),
            (None, Some("not bound".to_owned()))
        );
    }
}

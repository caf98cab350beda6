//! The differences between two configurations: keys, never values.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use serde::Serialize;

use super::{
    keys::{Affects, Key, Place, ROOT, Reloaded, Shape, fields},
    settings::Config,
    subscriber::Subscriber,
};
use crate::delivery::SubscriberName;

/// The keys whose values differ between two configurations of one subscriber.
#[derive(Debug, Clone)]
pub struct Differences(Vec<(&'static str, &'static [Affects])>);

impl Differences {
    pub fn between(old: &Subscriber, new: &Subscriber) -> Self {
        debug_assert_eq!(old.name, new.name);
        let differing = fields().filter(|(_, field)| (field.differs)(old, new));
        Self(differing.map(|(path, field)| (path, field.affects)).collect())
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether one of the changed keys affects this.
    pub fn affect(&self, what: Affects) -> bool {
        self.0.iter().any(|(_, affects)| affects.contains(&what))
    }

    /// The full names of the keys, such as `retry.max_interval`.
    pub fn paths(&self) -> Vec<&'static str> {
        self.0.iter().map(|(path, _)| *path).collect()
    }
}

/// The changed keys outside of subscribers, and what a running daemon does about each.
fn global_differences(old: &Config, new: &Config) -> Vec<(&'static str, Reloaded)> {
    let group = |key: &'static Key| match (&key.place, &key.shape) {
        (Place::Read, Shape::Table(group)) => *group,
        _ => std::slice::from_ref(key),
    };
    let differing = |key: &'static Key| match &key.place {
        Place::Config(field) if (field.differs)(old, new) => Some((key.path, field.affects)),
        _ => None,
    };
    ROOT.iter().flat_map(group).filter_map(differing).collect()
}

/// The changes that a reload makes, or would make.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Changes {
    /// Sorted by subscriber.
    pub changes: Vec<Change>,
    /// Keys outside of subscribers whose new values are used.
    pub settings: Vec<&'static str>,
    /// Keys whose new values are used after a restart only.
    pub needs_restart: Vec<&'static str>,
}

/// The change of one subscriber.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Change {
    pub subscriber: SubscriberName,
    pub change: Kind,
    /// The changed keys of a changed subscriber, such as `retry.max_interval`.
    pub keys: Vec<&'static str>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    Added,
    Changed,
    Removed,
}

impl Kind {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Added => "added",
            Self::Changed => "changed",
            Self::Removed => "removed",
        }
    }
}

/// The number of subscribers from which on the removal of more than half of them needs an
/// operator's order.
const FEW: usize = 4;

/// Whether so many subscribers disappear at once that missing files are a likelier cause than an
/// intention: all of them, or more than half of at least [`FEW`]. A single subscriber that another
/// replaces was renamed.
pub fn is_drastic(before: &BTreeSet<SubscriberName>, after: &BTreeSet<SubscriberName>) -> bool {
    let gone = before.difference(after).count();
    let all = gone > 0 && gone == before.len() && (gone > 1 || after.is_empty());
    all || (before.len() >= FEW && gone * 2 > before.len())
}

impl Changes {
    /// The subscribers that are removed.
    pub fn removed(&self) -> BTreeSet<SubscriberName> {
        self.changes
            .iter()
            .filter(|c| c.change == Kind::Removed)
            .map(|c| c.subscriber.clone())
            .collect()
    }
}

impl Config {
    /// The subscribers' names.
    pub fn names(&self) -> BTreeSet<SubscriberName> {
        self.subscribers.iter().map(|s| s.name.clone()).collect()
    }

    /// Compares this configuration with `new`.
    ///
    /// # Errors
    /// The changed keys that its queues depend on, which a running daemon cannot change.
    pub fn changes_to(&self, new: &Self) -> Result<Changes, Vec<&'static str>> {
        let global = global_differences(self, new);
        let those = |what: Reloaded| {
            global
                .iter()
                .filter(|(_, reloaded)| *reloaded == what)
                .map(|(path, _)| *path)
                .collect::<Vec<_>>()
        };
        let refused = those(Reloaded::Refused);
        if !refused.is_empty() {
            return Err(refused);
        }
        let by_name = |c: &Self| {
            c.subscribers
                .iter()
                .map(|s| (s.name.clone(), s.clone()))
                .collect::<BTreeMap<_, Arc<Subscriber>>>()
        };
        let (old_ones, new_ones) = (by_name(self), by_name(new));
        let mut changes: Vec<Change> = Vec::new();
        for (name, subscriber) in &new_ones {
            let (change, keys) = match old_ones.get(name) {
                None => (Kind::Added, Vec::new()),
                Some(old) => (Kind::Changed, Differences::between(old, subscriber).paths()),
            };
            if change == Kind::Added || !keys.is_empty() {
                changes.push(Change { subscriber: name.clone(), change, keys });
            }
        }
        let removed = old_ones.into_keys().filter(|name| !new_ones.contains_key(name));
        changes.extend(removed.map(|subscriber| Change {
            subscriber,
            change: Kind::Removed,
            keys: Vec::new(),
        }));
        changes.sort_by(|a, b| a.subscriber.cmp(&b.subscriber));
        Ok(Changes {
            changes,
            settings: those(Reloaded::Used),
            needs_restart: those(Reloaded::AfterRestart),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BEFORE: &str = r#"
        [queue]
        url = "amqp://u:hunter2@localhost/"
        [[subscriber]]
        name = "a"
        url = "https://example.com/one"
        secrets = ["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"]
    "#;

    fn load(text: &str) -> Config {
        crate::config::testing::config(text)
    }

    /// The changed keys when this line is added to the subscriber, or replaces its own.
    fn keys(lines: &str) -> Vec<&'static str> {
        keys_with("", lines)
    }

    /// As [`keys`], where the subscriber has other lines besides.
    fn keys_with(besides: &str, lines: &str) -> Vec<&'static str> {
        let before = format!("{BEFORE}{besides}\n");
        let before_text = &before[..];
        let before = load(before_text);
        let key = lines.split([' ', '=']).next().expect("a key");
        let without: String = before_text
            .lines()
            .filter(|l| !l.trim().starts_with(&format!("{key} =")))
            .map(|l| format!("{l}\n"))
            .collect();
        let without = if key == "url" {
            before_text.replace("url = \"https://example.com/one\"", "")
        } else {
            without
        };
        let mut found = before
            .changes_to(&load(&format!("{without}{lines}\n")))
            .expect("can be changed")
            .changes;
        assert!(found.len() <= 1 && found.iter().all(|c| c.change == Kind::Changed), "{found:?}");
        found.pop().map(|c| c.keys).unwrap_or_default()
    }

    #[test]
    fn each_changed_key_of_a_subscriber_is_reported_and_no_other() {
        let samples = [
            ("url", "\"https://example.com/two\""),
            ("events", "[\"a.*\"]"),
            ("format", "\"jsonl\""),
            ("secrets", "[\"whsec_bmV3IG5ldyBuZXcgbmV3IG5ldyBuZXcgbmV3IG5ldyE=\"]"),
            ("signatures", "[\"mailtrap\"]"),
            ("headers", "{ X-A = \"b\" }"),
            ("auth", "{ bearer = \"t\" }"),
            ("event_ids", "true"),
            ("match", "{ \"/actor/type\" = [\"user\", 7, true] }"),
            ("redact", "[\"/actor/email\"]"),
            ("paused", "true"),
            ("start_from", "\"-7d\""),
            ("batch.max_events", "1"),
            ("batch.max_bytes", "\"2KiB\""),
            ("batch.max_wait", "\"2s\""),
            ("http.timeout", "\"7s\""),
            ("http.connect_timeout", "\"3s\""),
            ("http.concurrency", "3"),
            ("http.success", "\"200\""),
            ("http.compression", "\"gzip\""),
            ("http.rate", "{ events = \"5/s\" }"),
            ("http.allow_http", "true"),
            ("http.allow_private_addresses", "true"),
            ("http.allow_addresses", "[\"10.0.0.0/8\"]"),
            ("http.proxy", "\"http://proxy.example:3128\""),
            ("retry.initial_interval", "\"6s\""),
            ("retry.multiplier", "2.0"),
            ("retry.randomization_factor", "0.1"),
            ("retry.max_interval", "\"5h\""),
            ("retry.max_attempts", "15"),
            ("retry.max_elapsed_time", "\"71h\""),
            ("retry.on_exhausted", "\"pause\""),
            ("circuit_breaker.failures", "4"),
            ("circuit_breaker.open_for", "\"29s\""),
            ("circuit_breaker.max_open_for", "\"9m\""),
        ];
        for (key, value) in samples {
            assert_eq!(keys(&format!("{key} = {value}")), [key]);
        }
        let of_formats = [
            ("content_type", "jsonl", "application/x-ndjson"),
            ("source", "cloudevents_batch", "/two"),
            ("sourcetype", "splunk_hec", "audit"),
            ("index", "splunk_hec", "main"),
        ];
        let key = format!("signing_key = \"{}\"", crate::crypto::signature::new_signing_key());
        assert_eq!(keys(&key), ["signatures", "signing_key"]);
        assert_eq!(
            keys_with("redact = [\"/a\"]", "redact_with = { hmac = \"k\" }"),
            ["redact_with"]
        );
        for (key, format, value) in of_formats {
            let source = if format == "jsonl" { "" } else { "source = \"/one\"\n" };
            let besides = format!("{source}format = \"{format}\"");
            assert_eq!(keys_with(&besides, &format!("{key} = \"{value}\"")), [key]);
        }
        let tried: Vec<_> = samples.iter().map(|(key, _)| *key).collect();
        let tried: Vec<_> = tried.into_iter().chain(of_formats.map(|(key, ..)| key)).collect();
        let untried: Vec<_> =
            crate::config::keys::paths().filter(|path| !tried.contains(path)).collect();
        let why = "a name is another subscriber, `tls` needs files, `tenant` events that have one, `order` another queue, and `preset` changes others";
        assert_eq!(
            untried,
            ["name", "tenant", "signing_key", "tls", "order", "redact_with", "preset"],
            "{why}"
        );
        assert!(
            keys("paused = false").is_empty(),
            "what is written out and means the same is no change"
        );
    }

    #[test]
    fn the_loss_of_all_subscribers_or_of_most_of_many_is_drastic() {
        let names =
            |text: &str| text.split_whitespace().map(SubscriberName::from).collect::<BTreeSet<_>>();
        for (before, after, drastic) in [
            ("", "", false),
            ("", "a", false),
            ("a", "a", false),
            ("a", "", true),
            ("a", "b", false),
            ("a b", "c d", true),
            ("a b", "b", false),
            ("a b c", "c", false),
            ("a b c d", "a b", false),
            ("a b c d", "a", true),
            ("a b c d", "a x y z", true),
            ("a b c d e", "a b c x", false),
        ] {
            assert_eq!(is_drastic(&names(before), &names(after)), drastic, "{before} -> {after}");
        }
    }

    #[test]
    fn added_and_removed_subscribers_and_what_needs_a_restart_are_reported() {
        let before = load(BEFORE);
        let other = BEFORE.replace("name = \"a\"", "name = \"b\"");
        let other =
            other.replace("[queue]", "[queue]\nmanagement_url = \"http://127.0.0.1:15672\"");
        let found = before
            .changes_to(&load(&format!(
                "admin.listen = \"127.0.0.1:1\"\nlog.format = \"json\"\n{other}"
            )))
            .expect("can be");
        let reported: Vec<_> =
            found.changes.iter().map(|c| (c.subscriber.as_str(), c.change)).collect();
        assert_eq!(reported, [("a", Kind::Removed), ("b", Kind::Added)]);
        assert_eq!(found.needs_restart, ["queue.management_url", "admin.listen", "log.format"]);
        let json = serde_json::to_value(&found).expect("prints");
        assert_eq!(json["changes"][1]["change"], "added");
        let found = before
            .changes_to(&load(&format!(
                "shutdown_timeout = \"1s\"\nlog.level = \"debug\"\n{BEFORE}"
            )))
            .expect("can be");
        assert!(found.changes.is_empty() && found.needs_restart.is_empty());
        assert_eq!(found.settings, ["shutdown_timeout", "log.level"]);
    }

    #[test]
    fn keys_that_the_queues_depend_on_cannot_be_changed() {
        let before = load(BEFORE);
        for (line, key) in [
            ("prefix = \"p\"", "queue.prefix"),
            ("exchange = \"e\"", "queue.exchange"),
            ("source_queue = \"q\"", "queue.source_queue"),
        ] {
            let after = load(&BEFORE.replace("[queue]", &format!("[queue]\n{line}")));
            assert_eq!(before.changes_to(&after), Err(vec![key]));
        }
        for url in ["amqp://u:other@localhost/", "embedded"] {
            assert_eq!(
                before.changes_to(&load(&BEFORE.replace("amqp://u:hunter2@localhost/", url))),
                Err(vec!["queue.url"])
            );
        }
    }
}

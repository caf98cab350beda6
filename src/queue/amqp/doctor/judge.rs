//! Judges what an inspection reads, without I/O.

use std::{net::IpAddr, sync::Arc, time::Duration};

use serde_json::Value;

use crate::queue::amqp::{
    management::Node,
    record::Recorded,
    topology::{DELIVERY_LIMIT, DESCRIPTORS_PER_QUEUE, QueueRole},
};
use crate::{
    config::Subscriber,
    crypto::secret::SecretUrl,
    queue::{Sharing, Window},
    telemetry::finding::{Finding, Severity},
};

/// The oldest RabbitMQ whose quorum queues dead-letter at least once.
const OLDEST: (u32, u32) = (3, 10);

/// A note only: the network may be the operator's alone.
pub(super) fn in_the_clear(url: &SecretUrl) -> Option<Finding> {
    let url = url.expose();
    let host = url.host_str().unwrap_or_default().trim_start_matches('[').trim_end_matches(']');
    let here = host == "localhost" || host.parse().is_ok_and(|ip: IpAddr| ip.is_loopback());
    (url.scheme() == "amqp" && !here).then(|| {
        Finding::note("connection", "goes to another machine, and is not encrypted")
            .risking("anyone on the network between can read password and events")
            .with_remedy("amqps://… as [queue] url, where the broker has TLS")
    })
}

/// Judges the product and the version of a broker.
pub(super) fn product(product: &str, version: &str) -> (Option<(u32, u32)>, Finding) {
    let mut numbers = version.split('.').map(str::parse);
    let number = match (product, numbers.next(), numbers.next()) {
        ("RabbitMQ", Some(Ok(major)), Some(Ok(minor))) => Some((major, minor)),
        _ => None,
    };
    let finding = match number {
        Some(number) if number >= OLDEST => Finding::ok("broker", format!("RabbitMQ {version}")),
        Some(_) => {
            Finding::harmful("broker", format!("RabbitMQ {version}; 3.10 or later is supported"))
                .risking("its queues dead-letter at most once: a retry can be lost with a node")
                .with_remedy("upgrade RabbitMQ")
        }
        None => Finding::warning(
            "broker",
            format!(
                "calls itself `{product}` `{version}`; hooktrail is made for RabbitMQ 3.10 or later"
            ),
        )
        .risking("what hooktrail relies on may work in another way"),
    };
    (number, finding)
}

pub(super) fn blocked(found: &str) -> Finding {
    Finding::harmful("broker", found)
        .risking("no event, retry or dead letter can be written until it ends; producers wait")
        .with_remedy("rabbitmq-diagnostics check_alarms; give it memory or disk, or deliver or purge what fills it")
}

pub(super) fn resource(name: &str) -> &str {
    if name == "disk" { "disk space" } else { name }
}

/// The longest time that lanes have a message unacked.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Unsettled {
    pub(super) full_batches: Duration,
    pub(super) single_events: Duration,
}

impl Unsettled {
    pub(super) fn longest(subscribers: &[Arc<Subscriber>]) -> Self {
        let longest = |events: fn(&Subscriber) -> usize| {
            subscribers
                .iter()
                .map(|s| Window::of(s).longest_hold(s, events(s)))
                .max()
                .unwrap_or_default()
        };
        Self { full_batches: longest(|s| s.batch.max_events), single_events: longest(|_| 1) }
    }
}

/// Judges whether a node has file descriptors for the missing queues, if it reports them.
pub(super) fn descriptors(node: &Node, missing: usize) -> Option<Finding> {
    let Node { name, fd_total, fd_used, .. } = node;
    if *fd_total == 0 {
        return None;
    }
    let needed = (DESCRIPTORS_PER_QUEUE * missing) as u64;
    let (about, found) =
        (format!("node {name}"), format!("uses {fd_used} of {fd_total} file descriptors"));
    let risk =
        "a broker without file descriptors answers no new connection, to anybody, and logs nothing";
    let remedy = "raise the limit of the broker's process (LimitNOFILE in its unit, ulimit -n where it is started) and restart it; \
        docs/operations.md says how many are needed";
    if fd_used + needed >= *fd_total {
        let found =
            format!("{found}; the {missing} queues that are to be declared take about {needed}");
        return Some(Finding::harmful(about, found).risking(risk).with_remedy(remedy));
    }
    if (fd_used + needed) * 5 > fd_total * 4 {
        return Some(Finding::warning(about, found).risking(risk).with_remedy(remedy));
    }
    Some(Finding::ok(about, found))
}

/// Judges a policy's key by its effect on a queue. Arguments win over policies, except for numbers,
/// where the smaller wins: so the keys that hooktrail's arguments set have no effect.
pub(super) fn judge(
    role: QueueRole<'_>,
    key: &str,
    value: &Value,
    unsettled: Unsettled,
) -> Option<(Severity, String)> {
    use Severity::{Harmful, Warning};
    let number = value.as_i64().unwrap_or(i64::MAX);
    let works = matches!(role, QueueRole::Main(_) | QueueRole::Retry(_));
    let keeps = matches!(role, QueueRole::Dead(_) | QueueRole::Orphans);
    let (severity, risk) = match key {
        "max-length" | "max-length-bytes" => judge_limit(role),
        "max-age" if role == QueueRole::State => {
            (Warning, "the record is cut: patterns stay bound and pauses are forgotten")
        }
        "message-ttl" if works => (
            Warning,
            "what is not delivered by then becomes a dead letter (`expired`), that of a paused subscriber too",
        ),
        "message-ttl" if keeps => (Harmful, "what is in it is dropped then"),
        "message-ttl" if matches!(role, QueueRole::Level(level) if number < 1000 << level) => {
            (Warning, "batches are tried again too early")
        }
        "message-ttl" if role == QueueRole::Intake => {
            (Harmful, "events that wait for longer, while no daemon runs, are dropped")
        }
        "message-ttl" if role == QueueRole::History => {
            (Warning, "events that wait for longer are dropped before history has them")
        }
        "expires" => {
            (Harmful, "a queue that is unused for that time is deleted with all its messages")
        }
        "delivery-limit" if number >= DELIVERY_LIMIT => return None,
        "delivery-limit" if role == QueueRole::Intake => {
            (Harmful, "events that were requeued more often, as in crashes, are dropped")
        }
        "delivery-limit" if works => (
            Harmful,
            "events that were requeued more often, as in crashes, become dead letters without an attempt",
        ),
        "delivery-limit" if keeps => (Harmful, "a dead letter that was read more often is dropped"),
        // Levels have no key of their own: the message's key is its way through the ladder.
        "dead-letter-routing-key" if matches!(role, QueueRole::Level(_)) => {
            (Harmful, "batches lose their way through the ladder")
        }
        "consumer-timeout" if works => {
            let limit = Duration::from_millis(u64::try_from(number).unwrap_or(0));
            return judge_consumer_timeout(limit, unsettled);
        }
        _ => return None,
    };
    Some((severity, risk.to_owned()))
}

/// Judges a limit of a queue's length.
fn judge_limit(role: QueueRole<'_>) -> (Severity, &'static str) {
    use Severity::{Harmful, Warning};
    match role {
        QueueRole::Intake => {
            (Harmful, "when it is full it refuses events; a producer without confirms loses them")
        }
        QueueRole::Main(_) => (
            Harmful,
            "when it is full it refuses events, for all subscribers of the exchange; a producer without confirms loses them",
        ),
        QueueRole::Retry(_) => (
            Harmful,
            "when it is full failed batches cannot be stored, and the ladder behind it stops for all subscribers",
        ),
        QueueRole::Level(_) => {
            (Harmful, "when it is full no batch can wait for its next attempt, of any subscriber")
        }
        QueueRole::Dead(_) | QueueRole::Orphans => (
            Harmful,
            "when it is full what is in it is dropped, or what should go into it has no place",
        ),
        QueueRole::State => {
            (Warning, "the record is cut: patterns stay bound and pauses are forgotten")
        }
        QueueRole::History => {
            (Warning, "when it is full, events are dropped before history has them")
        }
    }
}

/// Judges a consumer timeout by the longest time that lanes have a message unacked.
fn judge_consumer_timeout(limit: Duration, unsettled: Unsettled) -> Option<(Severity, String)> {
    let Unsettled { full_batches, single_events } = unsettled;
    let (severity, time, which) = if limit < full_batches {
        (Severity::Harmful, full_batches, "with full batches")
    } else if limit < single_events {
        let which = "when batches are of single events and attempts as slow as they may be";
        (Severity::Warning, single_events, which)
    } else {
        return None;
    };
    let risk = format!(
        "hooktrail has a message unacked for up to {} {which}: the broker requeues it meanwhile, and it is sent repeatedly",
        humantime::format_duration(time)
    );
    Some((severity, risk))
}

/// The store of this process.
#[derive(Debug, Clone, Copy)]
pub(super) enum OwnStore<'a> {
    Is(&'a str),
    /// It has none.
    None,
    /// Its id is not known, but perhaps whose subscribers count.
    Unknown(Sharing),
}

/// Judges which store has history, by the record.
pub(super) fn has_history(own: OwnStore<'_>, recorded: &Recorded, prefix: &str) -> Option<Finding> {
    let OwnStore::Is(own) = own else { return None };
    let about = "history";
    Some(match &recorded.store {
        Some(store) if store != own => {
            Finding::harmful(about, format!("another store has the history of prefix `{prefix}`"))
                .risking("this daemon delivers, and keeps no history")
                .with_remedy("give each daemon a [queue] prefix of its own; or move history here: hooktrail store adopt")
        }
        Some(_) => Finding::ok(about, "this store has that of the prefix"),
        None => Finding::ok(about, "no store has that of the prefix yet"),
    })
}

/// Judges which store's subscribers made over the API count, by the record. A daemon that `manages`
/// leaves them to the store of history where none has any yet.
pub(super) fn has_subscribers(
    own: OwnStore<'_>,
    recorded: &Recorded,
    prefix: &str,
    manages: bool,
) -> Option<Finding> {
    let about = "subscribers made over the API";
    let of_history = recorded.store.as_ref().filter(|_| manages);
    let Some(owner) = recorded.manager.as_ref().or(of_history) else {
        return manages.then(|| Finding::ok(about, "no store has any for the prefix yet"));
    };
    let is_own = match own {
        OwnStore::Is(own) => own == owner,
        OwnStore::None | OwnStore::Unknown(Sharing::Elsewhere) => false,
        OwnStore::Unknown(_) => return None,
    };
    if is_own {
        return Some(Finding::ok(about, "those of this store count on the prefix"));
    }
    let found = match &recorded.manager {
        Some(_) => format!("those of another store count on prefix `{prefix}`"),
        None => format!(
            "they are left to the store that has the history of prefix `{prefix}`, which is another one"
        ),
    };
    let finding = match manages {
        true => Finding::harmful(about, found)
            .risking("this daemon changes none, and unbinds nobody: what is removed from its files goes on getting events"),
        // Another daemon manages them, which may be meant.
        false => Finding::note(about, found)
            .risking("this daemon unbinds nobody: what is removed from its files goes on getting events until the daemon of that store unbinds it"),
    };
    let own_prefix = "give each daemon a [queue] prefix of its own";
    Some(finding.with_remedy(match own {
        OwnStore::None => format!("{own_prefix}; or change them with the daemon of that store"),
        _ => format!(
            "{own_prefix}; or change them with the daemon of that store; or have those of this store count: hooktrail store adopt (it copies none: hooktrail subscribers export first)"
        ),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_store_whose_subscribers_count_is_named_with_what_to_do_about_another_one() {
        use Severity::{Harmful, Note, Ok};
        let store = |id: &str| (!id.is_empty()).then(|| id.to_owned());
        let (own, none) = (OwnStore::Is("own"), OwnStore::None);
        let unknown = OwnStore::Unknown;
        for (own, manager, history, manages, expected) in [
            (own, "own", "other", true, Some((Ok, "this store count"))),
            (own, "other", "own", true, Some((Harmful, "another store count on prefix `p`"))),
            (own, "other", "own", false, Some((Note, "another store count on prefix `p`"))),
            // They are left to the store of history.
            (own, "", "other", true, Some((Harmful, "the history of prefix `p`"))),
            (own, "", "own", true, Some((Ok, "this store count"))),
            (own, "", "", true, Some((Ok, "no store has any"))),
            (own, "", "other", false, None),
            (none, "other", "", false, Some((Note, "another store count"))),
            (none, "", "other", false, None),
            // A daemon without history has found out; a command knows no store yet.
            (unknown(Sharing::Elsewhere), "other", "", true, Some((Harmful, "another store"))),
            (unknown(Sharing::Alone), "other", "", true, None),
        ] {
            let recorded =
                Recorded { store: store(history), manager: store(manager), ..Recorded::default() };
            let case = format!("{own:?}, of `{manager}`, history of `{history}`, {manages}");
            let found = has_subscribers(own, &recorded, "p", manages);
            let severity = found.as_ref().map(|found| found.severity);
            assert_eq!(severity, expected.map(|(severity, _)| severity), "{case}");
            let (Some(found), Some((severity, says))) = (found, expected) else { continue };
            assert!(found.found.contains(says), "{case}: {found:?}");
            let remedy = found.remedy.unwrap_or_default();
            let is_other = severity != Ok;
            assert_eq!(remedy.contains("[queue] prefix"), is_other, "{case}: {remedy}");
            let may_adopt = is_other && !matches!(own, OwnStore::None);
            assert_eq!(remedy.contains("hooktrail store adopt"), may_adopt, "{case}: {remedy}");
        }
    }

    #[test]
    fn a_broker_that_is_too_old_is_harmful_and_another_product_is_a_warning() {
        for (name, version, expected) in [
            ("RabbitMQ", "3.10.8", (Some((3, 10)), Severity::Ok)),
            ("RabbitMQ", "4.1.0-rc.1", (Some((4, 1)), Severity::Ok)),
            ("RabbitMQ", "3.9.13", (Some((3, 9)), Severity::Harmful)),
            ("RabbitMQ", "", (None, Severity::Warning)),
            ("LavinMQ", "2.0.0", (None, Severity::Warning)),
        ] {
            let (number, finding) = product(name, version);
            assert_eq!((number, finding.severity), expected, "{name} {version}");
        }
    }

    #[test]
    fn a_connection_in_the_clear_to_another_machine_is_noted() {
        for (url, is_noted) in [
            ("amqp://u:p@127.0.0.1:5672/v", false),
            ("amqp://localhost", false),
            ("amqp://[::1]", false),
            ("amqp://u:p@broker.example/v", true),
            ("amqp://192.0.2.7", true),
            ("amqp://[2001:db8::7]:5672", true),
            ("amqps://u:p@broker.example/v", false),
        ] {
            let found = in_the_clear(&SecretUrl::new(url.parse().expect("a URL")));
            assert_eq!(found.is_some_and(|f| f.severity == Severity::Note), is_noted, "{url}");
        }
    }

    #[test]
    fn a_node_whose_file_descriptors_do_not_suffice_is_named() {
        for (total, used, missing, expected) in [
            (0, 0, 300, None), // it does not report them
            (927, 30, 10, Some(Severity::Ok)),
            (927, 30, 298, Some(Severity::Warning)),
            (927, 30, 299, Some(Severity::Harmful)),
            (927, 800, 0, Some(Severity::Warning)),
            (65_536, 900, 3000, Some(Severity::Ok)),
        ] {
            let node = Node::new("n", total, used);
            assert_eq!(
                descriptors(&node, missing).map(|f| f.severity),
                expected,
                "{used} of {total}, {missing} missing"
            );
        }
    }

    #[test]
    fn a_policys_key_is_judged_by_what_the_queue_is_for() {
        use Severity::{Harmful, Warning};
        let hold = Unsettled {
            full_batches: Duration::from_secs(61),
            single_events: Duration::from_secs(600),
        };
        for (part, key, value, expected) in [
            (QueueRole::Main("a"), "max-length", json!(10), Some(Harmful)),
            (QueueRole::Retry("a"), "max-length-bytes", json!(10), Some(Harmful)),
            (QueueRole::Dead("a"), "max-length", json!(10), Some(Harmful)),
            (QueueRole::Level(3), "max-length", json!(10), Some(Harmful)),
            (QueueRole::State, "max-length-bytes", json!(10), Some(Warning)),
            (QueueRole::Intake, "max-length", json!(10), Some(Harmful)),
            (QueueRole::Intake, "message-ttl", json!(1000), Some(Harmful)),
            (QueueRole::Intake, "delivery-limit", json!(5), Some(Harmful)),
            (QueueRole::Intake, "dead-letter-exchange", json!("x"), None),
            (QueueRole::History, "max-length-bytes", json!(10), Some(Warning)),
            (QueueRole::History, "message-ttl", json!(1000), Some(Warning)),
            (QueueRole::State, "max-age", json!("7D"), Some(Warning)),
            (QueueRole::Main("a"), "message-ttl", json!(1000), Some(Warning)),
            (QueueRole::Dead("a"), "message-ttl", json!(1000), Some(Harmful)),
            (QueueRole::Orphans, "message-ttl", json!(1000), Some(Harmful)),
            (QueueRole::Level(3), "message-ttl", json!(7999), Some(Warning)),
            (QueueRole::Level(3), "message-ttl", json!(8000), None),
            (QueueRole::Level(3), "expires", json!(1000), Some(Harmful)),
            (QueueRole::Main("a"), "delivery-limit", json!(5), Some(Harmful)),
            (QueueRole::Dead("a"), "delivery-limit", json!(20), Some(Harmful)),
            (QueueRole::Main("a"), "delivery-limit", json!(DELIVERY_LIMIT), None),
            (QueueRole::Level(3), "delivery-limit", json!(5), None),
            (QueueRole::Level(3), "dead-letter-routing-key", json!("x"), Some(Harmful)),
            // Arguments win over these.
            (QueueRole::Main("a"), "dead-letter-routing-key", json!("x"), None),
            (QueueRole::Main("a"), "overflow", json!("drop-head"), None),
            (QueueRole::Main("a"), "dead-letter-strategy", json!("at-most-once"), None),
            (QueueRole::Main("a"), "queue-leader-locator", json!("balanced"), None),
            (QueueRole::Main("a"), "consumer-timeout", json!(60_999), Some(Harmful)),
            (QueueRole::Main("a"), "consumer-timeout", json!(61_000), Some(Warning)),
            (QueueRole::Main("a"), "consumer-timeout", json!(600_000), None),
            (QueueRole::Dead("a"), "consumer-timeout", json!(1), None),
        ] {
            let found = judge(part, key, &value, hold);
            assert_eq!(found.map(|(severity, _)| severity), expected, "{part:?} {key} {value}");
        }
    }
}

//! The state of an inspection.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use lapin::uri::AMQPUri;

use crate::queue::amqp::topology::{QueueRole, Topology};
use crate::{
    config::Subscriber,
    delivery::SubscriberName,
    telemetry::finding::{Finding, shell_word},
    wording::counted,
};

/// Queues whose bindings are asked for at once, or that are tried at once.
pub(super) const AT_ONCE: usize = 4;

pub(super) struct Inspection<'a> {
    pub(super) topology: &'a Topology,
    pub(super) subscribers: &'a [Arc<Subscriber>],
    pub(super) uri: AMQPUri,
    pub(super) version: Option<(u32, u32)>,
    /// The expected queues that exist.
    pub(super) there: BTreeSet<String>,
    /// The number of expected queues that are missing.
    pub(super) missing: usize,
    /// A consumer has one of them.
    pub(super) consumed: bool,
    /// Existing queues without consumers and without messages.
    pub(super) idle: Vec<String>,
    pub(super) findings: Vec<Finding>,
}

impl<'a> Inspection<'a> {
    pub(super) fn new(
        topology: &'a Topology,
        subscribers: &'a [Arc<Subscriber>],
        uri: AMQPUri,
    ) -> Self {
        Self {
            topology,
            subscribers,
            uri,
            version: None,
            there: BTreeSet::new(),
            missing: 0,
            consumed: false,
            idle: Vec::new(),
            findings: Vec::new(),
        }
    }
}

impl Inspection<'_> {
    pub(super) fn found(&mut self, finding: Finding) {
        self.findings.push(finding);
    }

    pub(super) fn vhost(&self) -> String {
        shell_word(&self.uri.vhost)
    }

    pub(super) fn too_few_queues(&self, found: String) -> Finding {
        Finding::harmful(format!("vhost `{}`", self.uri.vhost), found)
            .risking("hooktrail cannot declare what it needs, and does not start")
            .with_remedy(format!(
                "rabbitmqctl list_vhost_limits -p {0}; rabbitmqctl set_vhost_limits -p {0} '{{\"max-queues\":N}}'",
                self.vhost()
            ))
    }

    /// Whether a queue of one subscriber that accepts nothing harms the others: producers get no
    /// confirm, or the delay ladder cannot pass on the batches behind.
    pub(super) fn holds_up_all(&self, name: &str) -> bool {
        matches!(self.topology.role(name), Some(QueueRole::Main(_) | QueueRole::Retry(_)))
    }

    /// Reports events, batches and dead letters of subscribers that are not configured.
    pub(super) fn left(&mut self, left: BTreeMap<SubscriberName, [u64; 3]>) {
        let findings = left.into_iter().map(|(name, [events, batches, dead])| {
            let about = format!("subscriber `{name}`");
            if events + batches + dead == 0 {
                return Finding::note(about, "is not configured; its queues are empty")
                    .with_remedy("hooktrail prune deletes them");
            }
            let found = format!(
                "is not configured, and its queues hold {}, {} and {}",
                counted(events, "event(s)"),
                counted(batches, "batch(es) to try again"),
                counted(dead, "dead letter(s)")
            );
            Finding::warning(about, found)
                .risking("no daemon delivers them, and if they are still bound they grow")
                .with_remedy("configure it again, or delete them: hooktrail prune")
        });
        self.findings.extend(findings);
    }
}

//! The inspection of what only the management API shows.

use std::{collections::BTreeMap, time::Duration};

use futures_util::{StreamExt as _, stream};
use tokio::time::sleep;

use super::{
    inspection::{AT_ONCE, Inspection},
    judge::{Unsettled, blocked, descriptors, judge, resource},
};
use crate::queue::amqp::{
    management::{Binding, Management, Node, Row, Unseen},
    topology::QueueRole,
};
use crate::{
    clock,
    config::Subscriber,
    delivery::SubscriberName,
    telemetry::finding::{Finding, Severity, shell_word},
    wording::counted,
};

/// Timeout of the broker's statistics, policies included, which arrive some seconds after a queue
/// is declared.
const STATISTICS: Duration = Duration::from_secs(20);

const NOT_SEEN: &str =
    "policies, bindings, alarms of other nodes, replicas, file descriptors of nodes";

impl Inspection<'_> {
    /// Inspects what the management API shows; `None` if it shows nothing.
    pub(super) async fn management(&mut self) -> Option<Management> {
        let Some(url) = self.topology.management_url() else {
            let set = "set it to the URL of the management plugin: rabbitmq-plugins enable rabbitmq_management";
            self.found(Finding::unseen(NOT_SEEN, "[queue] management_url is not set", set));
            return None;
        };
        let api = Management::try_new(url, &self.uri);
        let seen = match &api {
            Ok(api) => self.inspect_all(api).await,
            Err(e) => Err(e.clone()),
        };
        match seen {
            Ok(()) => api.ok(),
            Err(e) => {
                let why = format!("[queue] management_url {url} is unusable: {e}");
                let user = shell_word(&self.uri.authority.userinfo.username);
                let remedy = match e {
                    Unseen::Unreachable(_) => {
                        "rabbitmq-plugins enable rabbitmq_management; or correct the URL".to_owned()
                    }
                    Unseen::Refused(_) => format!(
                        "rabbitmqctl set_user_tags {user} management; or put a user who has it into the URL"
                    ),
                };
                self.found(Finding {
                    severity: Severity::Warning,
                    ..Finding::unseen(NOT_SEEN, why, remedy)
                });
                None
            }
        }
    }

    /// # Errors
    /// No request is answered. A single refusal becomes a finding.
    async fn inspect_all(&mut self, api: &Management) -> Result<(), Unseen> {
        // A user that may not read alarms may read nothing.
        for a in api.alarms().await? {
            self.found(blocked(&format!(
                "has an alarm: too little {} on node {}",
                resource(&a.resource),
                a.node
            )));
        }
        let rows = match self.rows(api).await {
            Ok(rows) => rows,
            Err(e) => {
                let remedy = format!(
                    "rabbitmqctl list_queues -p {} name policy effective_policy_definition",
                    self.vhost()
                );
                self.refused(
                    "policies of queues, queues of subscribers that are not configured",
                    e,
                    &remedy,
                )?;
                Vec::new()
            }
        };
        self.room(api).await?;
        self.policies(&rows);
        self.not_configured(&rows);
        if let Err(e) = self.replicas(api, &rows).await {
            self.refused(
                "replicas of queues",
                e,
                "rabbitmq-queues check_if_node_is_quorum_critical",
            )?;
        }
        self.bindings(api).await
    }

    fn refused(&mut self, what: &str, why: Unseen, remedy: &str) -> Result<(), Unseen> {
        match why {
            Unseen::Unreachable(_) => Err(why),
            Unseen::Refused(why) => {
                self.found(Finding::unseen(
                    what,
                    format!("management API: {why}"),
                    format!("{remedy}; or give the user the tag that it asks for"),
                ));
                Ok(())
            }
        }
    }

    /// The queues with their statistics, for which this waits a little.
    async fn rows(&self, api: &Management) -> Result<Vec<Row>, Unseen> {
        let begun = clock::instant();
        loop {
            let rows = api.queues(self.topology.prefix()).await?;
            let complete =
                |name: &String| rows.iter().any(|r| r.name == *name && r.definition.is_some());
            if self.there.iter().all(complete) || clock::instant() - begun > STATISTICS {
                return Ok(rows);
            }
            sleep(Duration::from_secs(1)).await;
        }
    }

    /// Inspects what nodes and vhost have left for the queues that are still to be declared.
    async fn room(&mut self, api: &Management) -> Result<(), Unseen> {
        match api.queue_limit().await {
            Ok(Some((max, now))) if now.saturating_add(self.missing as u64) > max => {
                let found = format!(
                    "may have {max} queues and has {now}; {} more are needed",
                    self.missing
                );
                let finding = self.too_few_queues(found);
                self.found(finding);
            }
            Ok(_) => {}
            Err(e) => self.refused(
                "limits of the vhost",
                e,
                &format!("rabbitmqctl list_vhost_limits -p {}", self.vhost()),
            )?,
        }
        match nodes(api).await {
            Ok(nodes) => self
                .findings
                .extend(nodes.iter().filter_map(|node| descriptors(node, self.missing))),
            Err(e) => {
                self.refused("file descriptors of nodes", e, "rabbitmq-diagnostics status")?
            }
        }
        Ok(())
    }

    fn policies(&mut self, rows: &[Row]) {
        let mut inspected = 0;
        let longest = Unsettled::longest(self.subscribers);
        for row in rows {
            let Some(part) = self.topology.role(&row.name) else { continue };
            // A consumer timeout can be an argument too, of a queue that was declared by hand.
            let by_argument = row
                .arguments
                .0
                .get("x-consumer-timeout")
                .and_then(|v| judge(part, "consumer-timeout", v, longest));
            if let Some((severity, risk)) = by_argument {
                let value = &row.arguments.0["x-consumer-timeout"];
                let found = format!("has the argument x-consumer-timeout = {value}");
                self.found(Finding {
                    severity,
                    ..Finding::ok(format!("queue `{}`", row.name), found).risking(risk)
                });
            }
            let Some(definition) = &row.definition else { continue };
            inspected += 1;
            for (key, value) in &definition.0 {
                let Some((severity, risk)) = judge(part, key, value, longest) else { continue };
                let (whose, remedy) = self.policy(row);
                let found = format!("{whose} sets {key} = {value}");
                let finding = Finding {
                    severity,
                    ..Finding::ok(format!("queue `{}`", row.name), found)
                        .risking(risk)
                        .with_remedy(remedy)
                };
                self.found(
                    finding
                        .harming_all(self.holds_up_all(&row.name) && key.starts_with("max-length")),
                );
            }
        }
        let missing =
            rows.iter().filter(|r| r.definition.is_none() && self.there.contains(&r.name)).count();
        if missing > 0 {
            let remedy = format!(
                "run it again; rabbitmqctl list_queues -p {} name policy effective_policy_definition",
                self.vhost()
            );
            self.found(Finding::unseen(
                "policies",
                format!("the broker has no statistics of {} yet", counted(missing, "queue(s)")),
                remedy,
            ));
        }
        if inspected > 0 {
            self.found(Finding::ok(
                "policies",
                format!("checked on {}", counted(inspected, "queue(s)")),
            ));
        }
    }

    /// The policy of a queue, and the remedy.
    fn policy(&self, row: &Row) -> (String, String) {
        let vhost = self.vhost();
        let named = |name: &Option<String>| name.clone().filter(|n| !n.is_empty());
        let narrow = format!(
            "or narrow its pattern so that it does not match `{}.`",
            self.topology.prefix()
        );
        match (named(&row.policy), named(&row.operator_policy)) {
            (Some(p), Some(o)) => (
                format!("policy `{p}` or operator policy `{o}`"),
                format!(
                    "rabbitmqctl clear_policy -p {vhost} {}; rabbitmqctl clear_operator_policy -p {vhost} {}; {narrow}",
                    shell_word(&p),
                    shell_word(&o)
                ),
            ),
            (None, Some(o)) => (
                format!("operator policy `{o}`"),
                format!(
                    "rabbitmqctl clear_operator_policy -p {vhost} {}; {narrow}",
                    shell_word(&o)
                ),
            ),
            (p, None) => {
                let p = p.unwrap_or_default();
                (
                    format!("policy `{p}`"),
                    format!("rabbitmqctl clear_policy -p {vhost} {}; {narrow}", shell_word(&p)),
                )
            }
        }
    }

    /// Reports subscribers that only earlier configurations had.
    fn not_configured(&mut self, rows: &[Row]) {
        let mut left: BTreeMap<SubscriberName, [u64; 3]> = BTreeMap::new();
        for row in rows {
            let (name, kind) = match self.topology.role(&row.name) {
                Some(QueueRole::Main(s)) => (s, 0),
                Some(QueueRole::Retry(s)) => (s, 1),
                Some(QueueRole::Dead(s)) => (s, 2),
                _ => continue,
            };
            let Ok(name) = SubscriberName::try_new(name) else { continue };
            if self.subscribers.iter().all(|s| s.name != name) {
                left.entry(name).or_default()[kind] += row.messages;
            }
        }
        self.left(left);
    }

    async fn replicas(&mut self, api: &Management, rows: &[Row]) -> Result<(), Unseen> {
        for row in rows.iter().filter(|r| r.online.len() < r.members.len()) {
            let down: Vec<_> = row
                .members
                .iter()
                .filter(|m| !row.online.contains(m))
                .map(String::as_str)
                .collect();
            let found = format!(
                "has {} of {} replicas, without {}",
                row.online.len(),
                row.members.len(),
                down.join(", ")
            );
            let finding = Finding::warning(format!("queue `{}`", row.name), found)
                .risking("with fewer than half of them it takes and gives nothing")
                .with_remedy("rabbitmqctl cluster_status; bring the node back")
                .harming_all(self.holds_up_all(&row.name));
            self.found(finding);
            // With all nodes this takes milliseconds.
            let held_back = row.handed_over();
            if held_back > 0 && matches!(self.topology.role(&row.name), Some(QueueRole::Level(_))) {
                let found = format!(
                    "RabbitMQ cannot hand over {} to the next queue",
                    counted(held_back, "due batch(es)")
                );
                let finding = Finding::warning(format!("queue `{}`", row.name), found)
                    .risking("retries come late: RabbitMQ 3 can hold them back as long as a node is lost")
                    .with_remedy("bring the node back; docs/operations.md says how to do without it");
                self.found(finding);
            }
        }
        let single: Vec<_> = rows.iter().filter(|r| r.members.len() == 1).collect();
        if single.is_empty() {
            return Ok(());
        }
        let nodes = api.nodes().await?;
        if nodes.len() < 3 {
            return Ok(());
        }
        for row in single {
            let finding = Finding::warning(
                format!("queue `{}`", row.name),
                format!("has one replica, in a cluster of {} nodes", nodes.len()),
            )
            .risking("what is in it is lost with that node")
            .with_remedy(format!(
                "rabbitmq-queues grow NODE all --vhost-pattern {} --queue-pattern {}",
                self.vhost(),
                shell_word(&row.name)
            ));
            self.found(finding);
        }
        Ok(())
    }

    async fn bindings(&mut self, api: &Management) -> Result<(), Unseen> {
        let names = self
            .subscribers
            .iter()
            .map(|s| (s.clone(), self.topology.main(&s.name), self.topology.retry(&s.name)));
        let names: Vec<_> = names.filter(|(_, main, _)| self.there.contains(main)).collect();
        let asked = names.into_iter().map(|(s, main, retry)| async move {
            (s, api.bindings(&main).await, api.bindings(&retry).await)
        });
        let answers: Vec<_> = stream::iter(asked).buffered(AT_ONCE).collect().await;
        let mut sound = 0;
        for (s, main, retry) in answers {
            match (main, retry) {
                (Ok(main), Ok(retry)) => {
                    let findings = self.bound(&s, &main, &retry);
                    sound += usize::from(findings.is_empty());
                    self.findings.extend(findings);
                }
                (Err(e), _) | (_, Err(e)) => {
                    let remedy = format!("rabbitmqctl list_bindings -p {}", self.vhost());
                    self.refused(&format!("bindings of `{}`", s.name), e, &remedy)?;
                }
            }
        }
        if sound > 0 {
            self.found(Finding::ok(
                "bindings",
                format!("those of {} are as configured", counted(sound, "subscriber(s)")),
            ));
        }
        Ok(())
    }

    fn bound(&self, s: &Subscriber, main: &[Binding], retry: &[Binding]) -> Vec<Finding> {
        let (events, due) = (self.topology.events(), self.topology.due());
        let has = |all: &[Binding], source: &str, key: &str| {
            all.iter().any(|b| b.source == source && b.routing_key == key)
        };
        let about = |queue: String| format!("queue `{queue}`");
        let mut findings = Vec::new();
        for pattern in s.events.iter().filter(|p| !has(main, &events, p.as_str())) {
            let found = format!(
                "is not bound to exchange `{events}` with the pattern `{}`",
                pattern.as_str()
            );
            findings.push(
                Finding::harmful(about(self.topology.main(&s.name)), found)
                    .risking(format!("events that match it miss `{}` and are lost for it", s.name))
                    .with_remedy(format!("hooktrail repair {}", s.name)),
            );
        }
        for b in main {
            if b.source == events && s.events.iter().any(|p| p.as_str() == b.routing_key) {
                continue;
            }
            let found = format!(
                "is bound to exchange `{}` with `{}` too, which is not configured",
                b.source, b.routing_key
            );
            findings.push(
                Finding::warning(about(self.topology.main(&s.name)), found)
                    .risking(format!("`{}` gets events that its configuration does not ask for", s.name))
                    .with_remedy("take it away in the management UI, or restart the daemon if it stands in an earlier configuration; daemons with different configurations do this too"),
            );
        }
        if !has(retry, &due, &format!("#.{}", s.name)) {
            findings.push(
                Finding::harmful(
                    about(self.topology.retry(&s.name)),
                    format!("is not bound to exchange `{due}`"),
                )
                .risking("batches that are due again end among the orphans")
                .with_remedy(format!("hooktrail repair {}", s.name)),
            );
        }
        findings
    }
}

/// The nodes with their figures, for which this waits a little.
async fn nodes(api: &Management) -> Result<Vec<Node>, Unseen> {
    let begun = clock::instant();
    loop {
        let nodes = api.nodes().await?;
        if nodes.iter().all(Node::is_complete) || clock::instant() - begun > STATISTICS {
            return Ok(nodes);
        }
        sleep(Duration::from_secs(1)).await;
    }
}

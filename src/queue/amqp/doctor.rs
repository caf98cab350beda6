//! A look at the broker for what can lose or hold up events: what AMQP shows by itself, and the
//! rest through the management API. Changes nothing: what has to be tried is tried on names that
//! nobody has.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
    time::Duration,
};

use futures_util::{StreamExt as _, future::ready, stream};
use lapin::{
    BasicProperties, Connection, Event,
    options::{BasicPublishOptions, ConfirmSelectOptions},
    types::AMQPValue,
    uri::AMQPUri,
};
use serde_json::Value;
use tokio::time::{sleep, timeout};

use super::{
    AmqpQueue, CONSUMER_TIMEOUT,
    connection::{self, BrokerError, Role},
    management::{Binding, Management, Node, Row, Unseen},
    state,
    topology::{Broker, DELIVERY_LIMIT, DESCRIPTORS_PER_QUEUE, Part, Refused, Topology},
};
use crate::{
    clock,
    config::{Intake, Subscriber},
    crypto::secret::SecretUrl,
    delivery::SubscriberName,
    queue::{QueueError, Window},
    telemetry::finding::{Finding, Severity, shell_word, summarized},
    wording::counted,
};

/// The oldest RabbitMQ whose quorum queues dead-letter at least once.
const OLDEST: (u32, u32) = (3, 10);

/// From here on streams, and with them at-least-once dead-lettering, cannot be switched off.
const STREAMS_FOR_GOOD: (u32, u32) = (3, 12);

/// For one message that the broker should confirm at once.
const CONFIRM: Duration = Duration::from_secs(5);

/// The broker's statistics, policies among them, come some seconds after a queue is declared.
const STATISTICS: Duration = Duration::from_secs(20);

/// Queues whose bindings are asked for at once, or that are tried at once.
const AT_ONCE: usize = 4;

/// For trying to consume queues: one that does not work takes 20 s to say nothing.
const TRIES: Duration = Duration::from_secs(60);

const NOT_SEEN: &str =
    "policies, bindings, alarms of other nodes, replicas, file descriptors of nodes";

/// # Errors
/// The broker cannot be reached.
pub(super) async fn inspect(
    queue: &AmqpQueue,
    subscribers: &[Arc<Subscriber>],
) -> Result<Vec<Finding>, QueueError> {
    let topology = queue.topology();
    // It was parsed before, or there would be no connection.
    let uri: AMQPUri = topology
        .url()
        .expose()
        .as_str()
        .parse()
        .map_err(|_| QueueError::new("[queue] url is not a valid AMQP URL"))?;
    let mut look = Look {
        topology,
        subscribers,
        uri,
        version: None,
        there: BTreeSet::new(),
        missing: 0,
        consumed: false,
        idle: Vec::new(),
        findings: Vec::new(),
    };
    look.broker().await?;
    look.findings.extend(in_the_clear(topology.url()));
    look.permissions(&mut queue.broker()).await;
    look.queues(&mut queue.broker()).await;
    look.idle(queue).await;
    look.start(queue).await;
    let seen = look.management().await;
    if seen.is_none()
        && let Err(e) = look.not_configured_any_more(queue).await
    {
        look.found(Finding::unseen(
            "queues of subscribers that are not configured any more",
            e,
            "hooktrail prune tells of them",
        ));
    }
    look.at_least_once(seen.as_ref()).await;
    look.hold();
    Ok(summarized(look.findings))
}

/// For an operator to know, who may have a network that nobody else is on.
fn in_the_clear(url: &SecretUrl) -> Option<Finding> {
    let url = url.expose();
    let host = url.host_str().unwrap_or_default().trim_start_matches('[').trim_end_matches(']');
    let here = host == "localhost" || host.parse().is_ok_and(|ip: IpAddr| ip.is_loopback());
    (url.scheme() == "amqp" && !here).then(|| {
        Finding::note("connection", "goes to another machine, and is not encrypted")
            .risking("who is on the network between can read password and events")
            .mended("amqps://… as [queue] url, where the broker has TLS")
    })
}

/// Subscribers that have queues under the prefix, as far as the management API tells.
pub(super) async fn names_below(topology: &Topology) -> BTreeSet<SubscriberName> {
    let rows = async {
        let uri = topology.url().expose().as_str().parse().ok()?;
        Management::try_new(topology.management_url()?, &uri)
            .ok()?
            .queues(topology.prefix())
            .await
            .ok()
    };
    let rows = rows.await.unwrap_or_default();
    let name = |row: &Row| match topology.part(&row.name) {
        Some(Part::Main(s) | Part::Retry(s) | Part::Dead(s)) => SubscriberName::try_new(s).ok(),
        _ => None,
    };
    rows.iter().filter_map(name).collect()
}

struct Look<'a> {
    topology: &'a Topology,
    subscribers: &'a [Arc<Subscriber>],
    uri: AMQPUri,
    version: Option<(u32, u32)>,
    /// Queues that were found, of those that there should be.
    there: BTreeSet<String>,
    /// How many were not found.
    missing: usize,
    /// Somebody consumes one of them.
    consumed: bool,
    /// Those of them that nobody consumes and in which nothing is.
    idle: Vec<String>,
    findings: Vec<Finding>,
}

impl Look<'_> {
    fn found(&mut self, finding: Finding) {
        self.findings.push(finding);
    }

    fn vhost(&self) -> String {
        shell_word(&self.uri.vhost)
    }

    /// Which broker it is, and whether it takes messages. On a connection of its own: an alarm
    /// blocks it.
    async fn broker(&mut self) -> Result<(), QueueError> {
        let (connection, greeting) =
            connection::greeted(self.topology.url(), Role::Declaring).await?;
        let about = greeting.server_properties();
        let text = |key: &str| match about.as_ref().and_then(|p| p.inner().get(key)) {
            Some(AMQPValue::LongString(text)) => text.to_string(),
            _ => String::new(),
        };
        let (version, finding) = product(&text("product"), &text("version"));
        self.version = version;
        self.found(finding);
        match take_one(&connection, &self.topology.nobodys()).await {
            Probe::Taken => {
                self.found(Finding::ok("broker", "takes messages"));
                connection::close(&connection).await;
            }
            Probe::Blocked(why) => self.found(blocked(&format!("blocks publishing: {why}"))),
            Probe::Silent => self.found(
                Finding::warning("broker", format!("does not confirm a message within {} s", CONFIRM.as_secs()))
                    .risking("retries and dead letters cannot be written; the events stay in their queues meanwhile")
                    .mended("rabbitmq-diagnostics check_local_alarms; rabbitmq-diagnostics status"),
            ),
            Probe::Forbidden => {
                let grant = self.grant();
                self.found(self.may_not("write to exchange `amq.default`").mended(grant));
                connection::close(&connection).await;
            }
        }
        Ok(())
    }

    fn may_not(&self, what: &str) -> Finding {
        Finding::harmful(
            format!("user `{}`", self.uri.authority.userinfo.username),
            format!("may not {what}"),
        )
        .risking(
            "queues cannot be declared, consumed or written to, so that events are not delivered",
        )
    }

    /// For a user of hooktrail's own: it replaces what the user has.
    fn grant(&self) -> String {
        let literal = |name: &str| name.replace('.', r"\.");
        let own = format!(r"^{}\.", literal(self.topology.prefix()));
        let intake = match self.topology.intake() {
            Intake::Exchange(name) | Intake::SourceQueue(name) => format!("^{}$", literal(name)),
        };
        let rights = [
            format!("{own}|{intake}"),
            format!(r"{own}|{intake}|^amq\.default$"),
            format!("{own}|{intake}"),
        ];
        let rights = rights.iter().map(|r| shell_word(r)).collect::<Vec<_>>().join(" ");
        format!(
            "rabbitmqctl set_permissions -p {} {} {rights}",
            self.vhost(),
            shell_word(&self.uri.authority.userinfo.username)
        )
    }

    async fn permissions(&mut self, broker: &mut Broker<'_>) {
        let forbidden = broker.forbidden(&self.topology.nobodys(), &self.topology.events()).await;
        if forbidden.is_empty() {
            return self.found(Finding::ok(
                format!("user `{}`", self.uri.authority.userinfo.username),
                "may do what hooktrail does",
            ));
        }
        let finding = self.may_not(&forbidden.join(", ")).mended(self.grant());
        self.found(finding);
    }

    /// What AMQP shows of queues and exchange: whether they are there, and with which arguments.
    async fn queues(&mut self, broker: &mut Broker<'_>) {
        if let Err(e) = self.topology.inspect_intake(broker).await {
            let finding =
                Finding::harmful("[queue]", e.what()).risking("no event comes in from there");
            self.found(match e.remedy() {
                Some(remedy) => finding.mended(remedy),
                None => finding,
            });
        }
        let own = self.subscribers.iter().flat_map(|s| self.topology.subscriber_queues(&s.name));
        let expected: Vec<_> = own.chain(self.topology.shared_queues()).collect();
        let mut absent = Vec::new();
        let mut sound = 0;
        for (name, arguments) in expected {
            match broker.depth(&name).await {
                Ok(None) => absent.push(name),
                Err(e) => self.found(
                    Finding::harmful(format!("queue `{name}`"), format!("does not answer: {e}"))
                        .risking("what is in it is not delivered; if events are routed to it, producers get no confirm")
                        .mended("rabbitmqctl cluster_status; if no node is missing: hooktrail repair SUBSCRIBER")
                        .harming_all(self.holds_up_all(&name)),
                ),
                Ok(Some(depth)) => {
                    self.consumed |= depth.consumers > 0;
                    if depth.messages > 0 || depth.consumers > 0 {
                        self.found(Finding::ok(
                            &name,
                            format!("{}, {}", counted(depth.messages, "message(s)"), counted(depth.consumers, "consumer(s)")),
                        ));
                    }
                    match broker.compare(&name, arguments).await {
                        Ok(()) => sound += 1,
                        Err(e) => self.differs(&name, e),
                    }
                    // One that holds something would give it out to whoever tries, and it would
                    // come back out of its order.
                    if depth.consumers == 0 && depth.messages == 0 {
                        self.idle.push(name.clone());
                    }
                    self.there.insert(name);
                }
            }
        }
        if sound > 0 {
            self.found(Finding::ok(
                "queues",
                format!("{sound} have the arguments that hooktrail gives them"),
            ));
        }
        match broker.depth(&self.topology.state()).await {
            Ok(Some(_)) => drop(self.there.insert(self.topology.state())),
            Ok(None) => self.missing += 1,
            Err(e) => self.found(
                Finding::warning(self.topology.state(), format!("does not answer: {e}"))
                    .risking("who is paused is not known"),
            ),
        }
        self.missing += absent.len();
        self.absent(absent);
        if !self.there.is_empty() {
            self.exchanges(broker).await;
        }
    }

    /// Of a prefix that a daemon has run with: those that it has declared and that somebody has
    /// deleted.
    async fn exchanges(&mut self, broker: &mut Broker<'_>) {
        for name in self.topology.exchanges() {
            let about = format!("exchange `{name}`");
            match broker.has_exchange(&name).await {
                Ok(true) => {}
                Ok(false) if name == self.topology.events() => self.found(
                    Finding::harmful(about, "is missing, while a daemon has run with it")
                        .risking("producers cannot publish, or what they publish is lost")
                        .mended("let its owner declare it; a running daemon does after 10 s, `hooktrail repair SUBSCRIBER` at once"),
                ),
                Ok(false) => self.found(
                    Finding::harmful(about, "is missing, while others that belong to it are there")
                        .risking("batches that wait for their next attempt have no way")
                        .mended(
                            "a running daemon declares it within a minute; without one: hooktrail repair SUBSCRIBER, of any subscriber",
                        ),
                ),
                Err(e) => self.found(Finding::unseen(about, e, format!("rabbitmqctl list_exchanges -p {}", self.vhost()))),
            }
        }
    }

    /// The broker answers all questions about a queue that it has lost the use of; only who
    /// consumes it, or publishes to it, gets no answer. One that is consumed works.
    async fn idle(&mut self, queue: &AmqpQueue) {
        // A daemon's lanes consume what it works with, and tell of it themselves. To try it beside
        // them would take an event out of its order.
        if !queue.0.prepared.lock().await.is_empty() {
            return;
        }
        let names = std::mem::take(&mut self.idle);
        let in_all = names.len();
        let attempt = |name: String| async move {
            let outcome = queue.try_once(&name).await;
            (name, outcome)
        };
        let mut tries = stream::iter(names).map(attempt).buffer_unordered(AT_ONCE);
        let mut tried = 0;
        let all = timeout(TRIES, async {
            while let Some((name, outcome)) = tries.next().await {
                tried += 1;
                match outcome {
                    Ok(Err(unusable)) if unusable.is_broken() => self.broken(&name, &unusable.why),
                    Ok(_) => {}
                    Err(e) => self.found(Finding::unseen(
                        format!("queue `{name}`"),
                        e,
                        "hooktrail repair SUBSCRIBER tries it too",
                    )),
                }
            }
        });
        if all.await.is_err() {
            let left = format!("{} were not tried within {} s", in_all - tried, TRIES.as_secs());
            self.found(
                Finding::warning("queues", left)
                    .risking("what is in those that do not work is not delivered"),
            );
        }
    }

    /// What can keep a daemon from starting: limits of the vhost and of the user, which show
    /// themselves to those who come to them.
    async fn start(&mut self, queue: &AmqpQueue) {
        // A daemon that runs has what it needs; beside it this would count what it has.
        if self.consumed || !queue.0.prepared.lock().await.is_empty() {
            return;
        }
        if self.missing > 0
            && let Err(Refused::Other(why)) =
                queue.broker().try_declare(&self.topology.nobodys()).await
            && why.contains("limit")
        {
            let finding =
                self.too_few_queues(format!("does not let this user declare a queue: {why}"));
            self.found(finding);
        }
        // Together with the one that this asks on.
        let relays =
            matches!(self.topology.intake(), Intake::SourceQueue(_)).then_some(Role::Relaying);
        let mut open = Vec::new();
        for role in [Role::Publishing, Role::Consuming].into_iter().chain(relays) {
            match connection::greeted(self.topology.url(), role).await {
                Ok((connection, _)) => open.push(connection),
                Err(e) => {
                    let finding = Finding::harmful(role.connection(), e.what())
                        .risking("a daemon needs one to publish, one to declare, one to consume, and one to relay, at the same time");
                    self.found(finding.mended(e.remedy().unwrap_or("see the broker's log")));
                    break;
                }
            }
        }
        for connection in open {
            connection::close(&connection).await;
        }
    }

    fn too_few_queues(&self, found: String) -> Finding {
        Finding::harmful(format!("vhost `{}`", self.uri.vhost), found)
            .risking("hooktrail cannot declare what it needs, and does not start")
            .mended(format!(
                "rabbitmqctl list_vhost_limits -p {0}; rabbitmqctl set_vhost_limits -p {0} '{{\"max-queues\":N}}'",
                self.vhost()
            ))
    }

    /// What the nodes and the vhost have left for the queues that are still to be declared.
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

    /// Whether a queue of one subscriber that takes nothing harms the others: producers get no
    /// confirm, or the delay ladder cannot hand over what comes after.
    fn holds_up_all(&self, name: &str) -> bool {
        matches!(self.topology.part(name), Some(Part::Main(_) | Part::Retry(_)))
    }

    fn broken(&mut self, name: &str, why: &BrokerError) {
        let whose = match self.topology.part(name) {
            Some(Part::Main(s) | Part::Retry(s) | Part::Dead(s)) => s,
            _ => "SUBSCRIBER, of any subscriber",
        };
        let finding = Finding::harmful(format!("queue `{name}`"), format!("cannot be consumed: {why}"))
            .risking("what is in it is not delivered; if events are routed to it, producers get no confirm")
            .mended(format!("rabbitmqctl cluster_status; if no node is missing and it stays so: hooktrail repair {whose}"))
            .harming_all(self.holds_up_all(name));
        self.found(finding);
    }

    fn differs(&mut self, name: &str, refused: Refused) {
        let finding = match refused {
            Refused::Inequivalent { argument, wanted, found } => {
                let vhost = self.vhost();
                Finding::harmful(format!("queue `{name}`"), format!("exists with {argument} = {found}, where hooktrail needs {wanted}"))
                    .risking("with that it can lose events")
                    .mended(format!(
                        "when it is empty: rabbitmqctl delete_queue -p {vhost} {} --if-empty; or choose another [queue] prefix",
                        shell_word(name)
                    ))
                    .harming_all(self.holds_up_all(name) && argument.starts_with("x-max-length"))
            }
            Refused::Forbidden(_) => Finding::unseen(
                "arguments of queues",
                "the user may not declare them, which would compare them",
                format!("rabbitmqctl list_queues -p {} name arguments", self.vhost()),
            ),
            other => Finding::warning(
                format!("queue `{name}`"),
                other.into_error("queue", name).to_string(),
            ),
        };
        self.found(finding);
    }

    /// A subscriber that was never seen, and a broker that is new, will get what they need from
    /// `run`.
    fn absent(&mut self, absent: Vec<String>) {
        // Any of them: a policy may have deleted all that are seldom used.
        let has_run = !self.there.is_empty();
        for name in absent {
            let subscriber = match self.topology.part(&name) {
                Some(Part::Main(s) | Part::Retry(s) | Part::Dead(s)) => Some(s.to_owned()),
                _ => None,
            };
            let others_are_there = match &subscriber {
                Some(s) => {
                    self.topology.subscriber_queues(s).iter().any(|(q, _)| self.there.contains(q))
                }
                None => has_run,
            };
            if !others_are_there {
                self.found(Finding::note(name, "not there yet; `run` declares it"));
                continue;
            }
            let about = format!("queue `{name}`");
            let missing = "is missing, while others that belong to it are there";
            let finding = match (self.topology.part(&name), subscriber) {
                (Some(Part::Main(_)), Some(s)) => Finding::harmful(about, missing)
                    .risking(format!("events that are published now pass `{s}` by"))
                    .mended(format!("hooktrail repair {s}")),
                (_, Some(s)) => Finding::harmful(about, missing)
                    .risking("what was in it is lost; what is to be tried again, or kept as a dead letter, has no place")
                    .mended(format!("a running daemon declares it within a minute; without one: hooktrail repair {s}")),
                (_, None) => Finding::harmful(about, missing)
                    .risking("what was in it is lost, and batches that wait for their next attempt have no place")
                    .mended("a running daemon declares it within a minute; without one: hooktrail repair SUBSCRIBER, of any subscriber"),
            };
            self.found(finding);
        }
    }

    /// What the management API shows; `None` when it shows nothing at all.
    async fn management(&mut self) -> Option<Management> {
        let Some(url) = self.topology.management_url() else {
            let set = "set it to the URL of the management plugin: rabbitmq-plugins enable rabbitmq_management";
            self.found(Finding::unseen(NOT_SEEN, "[queue] management_url is not set", set));
            return None;
        };
        let api = Management::try_new(url, &self.uri);
        let seen = match &api {
            Ok(api) => self.look_through(api).await,
            Err(e) => Err(e.clone()),
        };
        match seen {
            Ok(()) => api.ok(),
            Err(e) => {
                let why = format!("[queue] management_url {url} is of no use: {e}");
                let user = shell_word(&self.uri.authority.userinfo.username);
                let mend = match e {
                    Unseen::Unreachable(_) => {
                        "rabbitmq-plugins enable rabbitmq_management; or correct the URL".to_owned()
                    }
                    Unseen::Refused(_) => format!(
                        "rabbitmqctl set_user_tags {user} management; or put a user who has it into the URL"
                    ),
                };
                self.found(Finding {
                    severity: Severity::Warning,
                    ..Finding::unseen(NOT_SEEN, why, mend)
                });
                None
            }
        }
    }

    /// # Errors
    /// Nothing can be asked. What alone cannot be looked at becomes a finding.
    async fn look_through(&mut self, api: &Management) -> Result<(), Unseen> {
        // Whoever may not ask this may ask nothing.
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
                let look = format!(
                    "rabbitmqctl list_queues -p {} name policy effective_policy_definition",
                    self.vhost()
                );
                self.refused(
                    "policies of queues, queues of subscribers that are not configured",
                    e,
                    &look,
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

    fn refused(&mut self, what: &str, why: Unseen, look: &str) -> Result<(), Unseen> {
        match why {
            Unseen::Unreachable(_) => Err(why),
            Unseen::Refused(why) => {
                self.found(Finding::unseen(
                    what,
                    format!("management API: {why}"),
                    format!("{look}; or give the user the tag that it asks for"),
                ));
                Ok(())
            }
        }
    }

    /// The queues with their statistics, which are waited for a little.
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

    fn policies(&mut self, rows: &[Row]) {
        let mut looked_at = 0;
        let longest = Held::longest(self.subscribers);
        for row in rows {
            let Some(part) = self.topology.part(&row.name) else { continue };
            // A limit on how long a message may be held can be an argument too, of a queue that was
            // declared by hand.
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
            looked_at += 1;
            for (key, value) in &definition.0 {
                let Some((severity, risk)) = judge(part, key, value, longest) else { continue };
                let (whose, remedy) = self.policy(row);
                let found = format!("{whose} sets {key} = {value}");
                let finding = Finding {
                    severity,
                    ..Finding::ok(format!("queue `{}`", row.name), found)
                        .risking(risk)
                        .mended(remedy)
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
            let look = format!(
                "ask again; rabbitmqctl list_queues -p {} name policy effective_policy_definition",
                self.vhost()
            );
            self.found(Finding::unseen(
                "policies",
                format!("the broker has no statistics of {} yet", counted(missing, "queue(s)")),
                look,
            ));
        }
        if looked_at > 0 {
            self.found(Finding::ok(
                "policies",
                format!("looked at on {}", counted(looked_at, "queue(s)")),
            ));
        }
    }

    /// Which policy it is that a queue has, and how to be rid of it.
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

    /// Of subscribers that only earlier configurations had.
    fn not_configured(&mut self, rows: &[Row]) {
        let mut left: BTreeMap<SubscriberName, [u64; 3]> = BTreeMap::new();
        for row in rows {
            let (name, kind) = match self.topology.part(&row.name) {
                Some(Part::Main(s)) => (s, 0),
                Some(Part::Retry(s)) => (s, 1),
                Some(Part::Dead(s)) => (s, 2),
                _ => continue,
            };
            let Ok(name) = SubscriberName::try_new(name) else { continue };
            if self.subscribers.iter().all(|s| s.name != name) {
                left.entry(name).or_default()[kind] += row.messages;
            }
        }
        self.left(left);
    }

    /// The same by the daemons' own record, which the broker's list of queues would make needless.
    async fn not_configured_any_more(&mut self, queue: &AmqpQueue) -> Result<(), QueueError> {
        let mut broker = queue.broker();
        let Some(record) = broker.depth(&self.topology.state()).await? else { return Ok(()) };
        let mut left = BTreeMap::new();
        for name in state::ever_bound(self.topology, queue.pool(), record.messages).await? {
            if self.subscribers.iter().any(|s| s.name == name) {
                continue;
            }
            let names =
                [self.topology.main(&name), self.topology.retry(&name), self.topology.dead(&name)];
            let mut counts = [0; 3];
            let mut exists = false;
            for (count, queue) in counts.iter_mut().zip(names) {
                if let Some(depth) = broker.depth(&queue).await? {
                    (*count, exists) = (u64::from(depth.messages), true);
                }
            }
            if exists {
                left.insert(name, counts);
            }
        }
        self.left(left);
        Ok(())
    }

    /// Events, batches and dead letters of each.
    fn left(&mut self, left: BTreeMap<SubscriberName, [u64; 3]>) {
        let findings = left.into_iter().map(|(name, [events, batches, dead])| {
            let about = format!("subscriber `{name}`");
            if events + batches + dead == 0 {
                return Finding::note(about, "is not configured; its queues are empty")
                    .mended("hooktrail prune deletes them");
            }
            let found = format!(
                "is not configured, and its queues hold {}, {} and {}",
                counted(events, "event(s)"),
                counted(batches, "batch(es) to try again"),
                counted(dead, "dead letter(s)")
            );
            Finding::warning(about, found)
                .risking("nobody delivers them, and if they are still bound they grow")
                .mended("configure it again, or `hooktrail prune`, which deletes them when told to")
        });
        self.findings.extend(findings);
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
                .mended("rabbitmqctl cluster_status; bring the node back")
                .harming_all(self.holds_up_all(&row.name));
            self.found(finding);
            // With all nodes there that is a matter of milliseconds.
            let held_back = row.handed_over();
            if held_back > 0 && matches!(self.topology.part(&row.name), Some(Part::Level(_))) {
                let found = format!(
                    "RabbitMQ cannot hand over {} to the next queue",
                    counted(held_back, "due batch(es)")
                );
                let finding = Finding::warning(format!("queue `{}`", row.name), found)
                    .risking("retries come late: RabbitMQ 3 can hold them back as long as a node is lost")
                    .mended("bring the node back; docs/operations.md tells how to do without it");
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
            .mended(format!(
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
                    let look = format!("rabbitmqctl list_bindings -p {}", self.vhost());
                    self.refused(&format!("bindings of `{}`", s.name), e, &look)?;
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
                    .risking(format!(
                        "events that match it pass `{}` by and are lost for it",
                        s.name
                    ))
                    .mended(format!("hooktrail repair {}", s.name)),
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
                    .mended("take it away in the management UI, or restart the daemon if it stands in an earlier configuration; daemons with different configurations do this too"),
            );
        }
        if !has(retry, &due, &format!("#.{}", s.name)) {
            findings.push(
                Finding::harmful(
                    about(self.topology.retry(&s.name)),
                    format!("is not bound to exchange `{due}`"),
                )
                .risking("batches that are due again end among the orphans")
                .mended(format!("hooktrail repair {}", s.name)),
            );
        }
        findings
    }

    /// The arguments alone are not enough: without the feature flag the broker falls back to at
    /// most once, silently.
    async fn at_least_once(&mut self, api: Option<&Management>) {
        let about = "at-least-once dead-lettering";
        let look = "rabbitmqctl list_feature_flags; rabbitmqctl enable_feature_flag stream_queue";
        let flags = match (self.version, api) {
            (Some(version), _) if version >= STREAMS_FOR_GOOD => return,
            // The record is a stream, and there would be none without it.
            _ if self.there.contains(&self.topology.state()) => {
                return self.found(Finding::ok(about, "its feature flag is on"));
            }
            (_, None) => {
                return self.found(Finding::unseen(
                    about,
                    "there is no stream yet that would show its feature flag",
                    look,
                ));
            }
            (_, Some(api)) => api.feature_flags().await,
        };
        let finding = match flags {
            Ok(flags) if flags.iter().any(|f| f.name == "stream_queue" && f.state == "enabled") => {
                Finding::ok(about, "its feature flag is on")
            }
            Ok(_) => Finding::harmful(about, "the feature flag `stream_queue` is off")
                .risking(
                    "a retry can be lost on its way through the ladder, and pauses are not kept",
                )
                .mended("rabbitmqctl enable_feature_flag stream_queue"),
            Err(e) => Finding::unseen(about, format!("management API: {e}"), look),
        };
        self.found(finding);
    }

    /// The nodes' own setting is shown by nothing but `rabbitmqctl`.
    fn hold(&mut self) {
        let hold = |s: &Subscriber| Window::of(s).longest_hold(s, s.batch.max_events);
        let Some((hold, s)) =
            self.subscribers.iter().map(|s| (hold(s), s)).max_by_key(|(hold, _)| *hold)
        else {
            return;
        };
        let fewest = Window::of(s).fewest_events(s, CONSUMER_TIMEOUT);
        let mut found = format!(
            "the nodes' own setting is shown by no API and not looked at; RabbitMQ's default is 30 min, and hooktrail holds a message for at \
             most {} with full batches",
            humantime::format_duration(hold)
        );
        if fewest > 1 {
            found += &format!(
                "; with fewer than {fewest} events in each, and attempts as slow as they may be, for longer than that default"
            );
        }
        let look = "rabbitmqctl eval 'application:get_env(rabbit, consumer_timeout).'";
        let mut finding = Finding::note("consumer_timeout", found).mended(look);
        finding.about.push(format!("subscriber `{}`", s.name));
        self.found(finding);
    }
}

/// What a broker says that it is.
fn product(product: &str, version: &str) -> (Option<(u32, u32)>, Finding) {
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
                .mended("upgrade RabbitMQ")
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

fn blocked(found: &str) -> Finding {
    Finding::harmful("broker", found)
        .risking("no event, retry or dead letter can be written until it ends; producers wait")
        .mended("rabbitmq-diagnostics check_alarms; give it memory or disk, or deliver or purge what fills it")
}

fn resource(name: &str) -> &str {
    if name == "disk" { "disk space" } else { name }
}

/// The longest that lanes hold a message.
#[derive(Debug, Clone, Copy, Default)]
struct Held {
    full_batches: Duration,
    single_events: Duration,
}

impl Held {
    fn longest(subscribers: &[Arc<Subscriber>]) -> Self {
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

/// The nodes with their figures, which are waited for a little.
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

/// Whether a node has file descriptors for the queues that are missing, if it tells.
fn descriptors(node: &Node, missing: usize) -> Option<Finding> {
    let Node { name, fd_total, fd_used, .. } = node;
    if *fd_total == 0 {
        return None;
    }
    let needed = (DESCRIPTORS_PER_QUEUE * missing) as u64;
    let (about, found) =
        (format!("node {name}"), format!("uses {fd_used} of {fd_total} file descriptors"));
    let risk =
        "a broker without file descriptors answers no new connection, to anybody, and logs nothing";
    let mend = "raise the limit of the broker's process (LimitNOFILE in its unit, ulimit -n where it is started) and restart it; \
        docs/operations.md tells how many are needed";
    if fd_used + needed >= *fd_total {
        let found =
            format!("{found}; the {missing} queues that are to be declared take about {needed}");
        return Some(Finding::harmful(about, found).risking(risk).mended(mend));
    }
    if (fd_used + needed) * 5 > fd_total * 4 {
        return Some(Finding::warning(about, found).risking(risk).mended(mend));
    }
    Some(Finding::ok(about, found))
}

/// What a policy's key does to a queue, if that is bad. Arguments win over policies, but for
/// numbers, where the smaller wins: so the keys that hooktrail's arguments hold do nothing.
fn judge(part: Part<'_>, key: &str, value: &Value, held: Held) -> Option<(Severity, String)> {
    use Severity::{Harmful, Warning};
    let number = value.as_i64().unwrap_or(i64::MAX);
    let works = matches!(part, Part::Main(_) | Part::Retry(_));
    let keeps = matches!(part, Part::Dead(_) | Part::Orphans);
    let (severity, risk) = match key {
        "max-length" | "max-length-bytes" => match part {
            Part::Main(_) => (
                Harmful,
                "when it is full it refuses events, for all subscribers of the exchange; a producer without confirms loses them",
            ),
            Part::Retry(_) => (
                Harmful,
                "when it is full failed batches cannot be written down, and the ladder behind it stops for all subscribers",
            ),
            Part::Level(_) => (
                Harmful,
                "when it is full no batch can wait for its next attempt, of any subscriber",
            ),
            Part::Dead(_) | Part::Orphans => (
                Harmful,
                "when it is full what is in it is dropped, or what should go into it has no place",
            ),
            Part::State => {
                (Warning, "the record is cut: patterns stay bound and pauses are forgotten")
            }
        },
        "max-age" if part == Part::State => {
            (Warning, "the record is cut: patterns stay bound and pauses are forgotten")
        }
        "message-ttl" if works => (
            Warning,
            "what is not delivered by then becomes a dead letter (`expired`), that of a paused subscriber too",
        ),
        "message-ttl" if keeps => (Harmful, "what is in it is dropped then"),
        "message-ttl" if matches!(part, Part::Level(level) if number < 1000 << level) => {
            (Warning, "batches are tried again too early")
        }
        "expires" => {
            (Harmful, "a queue that nobody uses for so long is deleted with all that is in it")
        }
        "delivery-limit" if number >= DELIVERY_LIMIT => return None,
        "delivery-limit" if works => (
            Harmful,
            "events that were given back so often, as in crashes, become dead letters without one attempt",
        ),
        "delivery-limit" if keeps => {
            (Harmful, "a dead letter that was looked at so often is dropped")
        }
        // Levels have no key of their own: theirs is the message's way.
        "dead-letter-routing-key" if matches!(part, Part::Level(_)) => {
            (Harmful, "batches lose their way through the ladder")
        }
        "consumer-timeout" if works => {
            let limit = Duration::from_millis(u64::try_from(number).unwrap_or(0));
            let told = |hold, which| {
                let hold = humantime::format_duration(hold);
                format!(
                    "hooktrail holds a message for up to {hold} {which}: the broker takes it back meanwhile, and it is sent again and again"
                )
            };
            if limit < held.full_batches {
                return Some((Harmful, told(held.full_batches, "with full batches")));
            }
            if limit < held.single_events {
                return Some((
                    Warning,
                    told(
                        held.single_events,
                        "when batches are of single events and attempts as slow as they may be",
                    ),
                ));
            }
            return None;
        }
        _ => return None,
    };
    Some((severity, risk.to_owned()))
}

/// What became of a message.
enum Probe {
    Taken,
    Blocked(String),
    Forbidden,
    Silent,
}

/// Publishes messages that go nowhere: an alarm shows itself to those who publish, and to nobody
/// else.
async fn take_one(connection: &Connection, to_nobody: &str) -> Probe {
    let mut blocked = std::pin::pin!(connection.events_listener().filter_map(|event| {
        ready(match event {
            Event::ConnectionBlocked(why) => Some(why),
            _ => None,
        })
    }));
    let publish = async {
        let channel = connection.create_channel().await?;
        channel.confirm_select(ConfirmSelectOptions::default()).await?;
        let one = async || {
            let properties = BasicProperties::default();
            channel
                .basic_publish(
                    "".into(),
                    to_nobody.into(),
                    BasicPublishOptions::default(),
                    b"",
                    properties,
                )
                .await?
                .await
        };
        // An alarm takes effect with the first, which may still be confirmed; the second is not.
        one().await?;
        one().await
    };
    tokio::select! {
        biased;
        Some(why) = blocked.next() => Probe::Blocked(why),
        taken = timeout(CONFIRM, publish) => match taken {
            Ok(Ok(_)) => Probe::Taken,
            Ok(Err(e)) if BrokerError::from(&e).code == Some(403) => Probe::Forbidden,
            Ok(Err(_)) | Err(_) => Probe::Silent,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_broker_that_is_too_old_is_harmful_and_another_product_is_told_of() {
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
    fn a_connection_in_the_clear_to_another_machine_is_told_of() {
        for (url, told) in [
            ("amqp://u:p@127.0.0.1:5672/v", false),
            ("amqp://localhost", false),
            ("amqp://[::1]", false),
            ("amqp://u:p@broker.example/v", true),
            ("amqp://192.0.2.7", true),
            ("amqp://[2001:db8::7]:5672", true),
            ("amqps://u:p@broker.example/v", false),
        ] {
            let found = in_the_clear(&SecretUrl::new(url.parse().expect("a URL")));
            assert_eq!(found.is_some_and(|f| f.severity == Severity::Note), told, "{url}");
        }
    }

    #[test]
    fn a_node_whose_file_descriptors_do_not_suffice_is_named() {
        for (total, used, missing, expected) in [
            (0, 0, 300, None), // it does not tell
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
        let hold =
            Held { full_batches: Duration::from_secs(61), single_events: Duration::from_secs(600) };
        for (part, key, value, expected) in [
            (Part::Main("a"), "max-length", json!(10), Some(Harmful)),
            (Part::Retry("a"), "max-length-bytes", json!(10), Some(Harmful)),
            (Part::Dead("a"), "max-length", json!(10), Some(Harmful)),
            (Part::Level(3), "max-length", json!(10), Some(Harmful)),
            (Part::State, "max-length-bytes", json!(10), Some(Warning)),
            (Part::State, "max-age", json!("7D"), Some(Warning)),
            (Part::Main("a"), "message-ttl", json!(1000), Some(Warning)),
            (Part::Dead("a"), "message-ttl", json!(1000), Some(Harmful)),
            (Part::Orphans, "message-ttl", json!(1000), Some(Harmful)),
            (Part::Level(3), "message-ttl", json!(7999), Some(Warning)),
            (Part::Level(3), "message-ttl", json!(8000), None),
            (Part::Level(3), "expires", json!(1000), Some(Harmful)),
            (Part::Main("a"), "delivery-limit", json!(5), Some(Harmful)),
            (Part::Dead("a"), "delivery-limit", json!(20), Some(Harmful)),
            (Part::Main("a"), "delivery-limit", json!(DELIVERY_LIMIT), None),
            (Part::Level(3), "delivery-limit", json!(5), None),
            (Part::Level(3), "dead-letter-routing-key", json!("x"), Some(Harmful)),
            // Arguments win over these.
            (Part::Main("a"), "dead-letter-routing-key", json!("x"), None),
            (Part::Main("a"), "overflow", json!("drop-head"), None),
            (Part::Main("a"), "dead-letter-strategy", json!("at-most-once"), None),
            (Part::Main("a"), "queue-leader-locator", json!("balanced"), None),
            (Part::Main("a"), "consumer-timeout", json!(60_999), Some(Harmful)),
            (Part::Main("a"), "consumer-timeout", json!(61_000), Some(Warning)),
            (Part::Main("a"), "consumer-timeout", json!(600_000), None),
            (Part::Dead("a"), "consumer-timeout", json!(1), None),
        ] {
            let found = judge(part, key, &value, hold);
            assert_eq!(found.map(|(severity, _)| severity), expected, "{part:?} {key} {value}");
        }
    }
}

//! The inspection of what AMQP shows by itself.

use std::{collections::BTreeMap, time::Duration};

use futures_util::{StreamExt as _, future::ready, stream};
use lapin::{
    BasicProperties, Connection, Event,
    options::{BasicPublishOptions, ConfirmSelectOptions},
    types::{AMQPValue, FieldTable},
};
use tokio::time::timeout;

use super::{
    inspection::{AT_ONCE, Inspection},
    judge::{OwnStore, blocked, has_history, has_subscribers, product},
};
use crate::queue::amqp::{
    broker_error::BrokerError,
    connection::{self, Role},
    management::Management,
    requests::{Broker, Refused},
    shared::Shared,
    state_stream,
    topology::QueueRole,
    unusable::try_once,
};
use crate::{
    config::{Intake, Subscriber},
    queue::{CONSUMER_TIMEOUT, QueueError, Window},
    telemetry::finding::{Finding, shell_word},
    wording::counted,
};

/// RabbitMQ version from which streams, and with them at-least-once dead-lettering, cannot be
/// switched off.
const STREAMS_FOR_GOOD: (u32, u32) = (3, 12);

/// Timeout of one message that the broker should confirm at once.
const CONFIRM: Duration = Duration::from_secs(5);

/// Timeout of trying to consume queues: a broken one does not answer for 20 s.
const TRIES: Duration = Duration::from_secs(60);

impl Inspection<'_> {
    /// Inspects the broker's version, and whether it accepts messages. On a connection of its own:
    /// an alarm blocks it.
    pub(super) async fn broker(&mut self) -> Result<(), QueueError> {
        let (connection, greeting) =
            connection::greeted(self.topology.url(), Role::Declaring).await?;
        let about = greeting.server_properties();
        let text = |key: &str| property(about.as_ref(), key);
        let (version, finding) = product(&text("product"), &text("version"));
        self.version = version;
        self.found(finding);
        match take_one(&connection, &self.topology.unused_name()).await {
            Probe::Taken => {
                self.found(Finding::ok("broker", "takes messages"));
                connection::close(&connection).await;
            }
            Probe::Blocked(why) => self.found(blocked(&format!("blocks publishing: {why}"))),
            Probe::Silent => self.found(
                Finding::warning("broker", format!("does not confirm a message within {} s", CONFIRM.as_secs()))
                    .risking("retries and dead letters cannot be written; the events stay in their queues meanwhile")
                    .with_remedy("rabbitmq-diagnostics check_local_alarms; rabbitmq-diagnostics status"),
            ),
            Probe::Forbidden => {
                let grant = self.grant();
                self.found(self.may_not("write to exchange `amq.default`").with_remedy(grant));
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

    /// The command that grants the permissions, for a user of hooktrail's own: it replaces those of
    /// the user.
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

    pub(super) async fn permissions(&mut self, broker: &mut Broker<'_>) {
        let forbidden =
            broker.forbidden(&self.topology.unused_name(), &self.topology.events()).await;
        if forbidden.is_empty() {
            return self.found(Finding::ok(
                format!("user `{}`", self.uri.authority.userinfo.username),
                "may do what hooktrail does",
            ));
        }
        let finding = self.may_not(&forbidden.join(", ")).with_remedy(self.grant());
        self.found(finding);
    }

    /// Inspects whether queues and exchange exist, and with which arguments.
    pub(super) async fn queues(&mut self, broker: &mut Broker<'_>) {
        if let Err(e) = self.topology.inspect_intake(broker).await {
            let finding =
                Finding::harmful("[queue]", e.what()).risking("no event comes in from there");
            self.found(match e.remedy() {
                Some(remedy) => finding.with_remedy(remedy),
                None => finding,
            });
        }
        let own = self.subscribers.iter().flat_map(|s| self.topology.subscriber_queues(&s.name));
        let history = self
            .topology
            .keeps_history()
            .then(|| (self.topology.history(), self.topology.history_arguments()));
        let expected: Vec<_> = own.chain(self.topology.shared_queues()).chain(history).collect();
        let mut absent = Vec::new();
        let mut sound = 0;
        for (name, arguments) in expected {
            match broker.depth(&name).await {
                Ok(None) => absent.push(name),
                Err(e) => self.found(
                    Finding::harmful(format!("queue `{name}`"), format!("does not answer: {e}"))
                        .risking("what is in it is not delivered; if events are routed to it, producers get no confirm")
                        .with_remedy("rabbitmqctl cluster_status; if no node is missing: hooktrail repair SUBSCRIBER")
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
                    // A queue with messages would deliver them to this attempt, and get them back
                    // out of order.
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

    /// Inspects the exchanges of a prefix that a daemon has run with: some may have been deleted.
    async fn exchanges(&mut self, broker: &mut Broker<'_>) {
        for name in self.topology.exchanges() {
            let about = format!("exchange `{name}`");
            match broker.has_exchange(&name).await {
                Ok(true) => {}
                Ok(false) if name == self.topology.events() => self.found(
                    Finding::harmful(about, "is missing, while a daemon has run with it")
                        .risking("producers cannot publish, or what they publish is lost")
                        .with_remedy("let its owner declare it; a running daemon does after 10 s, `hooktrail repair SUBSCRIBER` at once"),
                ),
                Ok(false) => self.found(
                    Finding::harmful(about, "is missing, while others that belong to it are there")
                        .risking("batches that wait for their next attempt have no way")
                        .with_remedy(
                            "a running daemon declares it within a minute; without one: hooktrail repair SUBSCRIBER, of any subscriber",
                        ),
                ),
                Err(e) => self.found(Finding::unseen(about, e, format!("rabbitmqctl list_exchanges -p {}", self.vhost()))),
            }
        }
    }

    /// Tries idle queues. The broker answers all requests about a broken queue; only its consumers
    /// and publishers get no answer. A queue with a consumer works.
    pub(super) async fn idle(&mut self, shared: &Shared) {
        // A daemon's lanes consume its queues, and report their failures. Another consumer would
        // take events out of their order.
        if !shared.prepared.lock().await.is_empty() {
            return;
        }
        let names = std::mem::take(&mut self.idle);
        let in_all = names.len();
        let attempt = |name: String| async move {
            let outcome = match shared.consuming.quarantine().await {
                Ok(connection) => try_once(connection, &name).await,
                Err(e) => Err(e),
            };
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

    /// Inspects what can keep a daemon from starting: limits of the vhost and of the user, which
    /// show only when they are reached.
    pub(super) async fn start(&mut self, shared: &Shared) {
        // A running daemon has what it needs; this would count its connections too.
        if self.consumed || !shared.prepared.lock().await.is_empty() {
            return;
        }
        if self.missing > 0
            && let Err(Refused::Other(why)) =
                shared.broker().try_declare(&self.topology.unused_name()).await
            && why.contains("limit")
        {
            let finding =
                self.too_few_queues(format!("does not let this user declare a queue: {why}"));
            self.found(finding);
        }
        // Together with the connection of this inspection.
        let relays =
            matches!(self.topology.intake(), Intake::SourceQueue(_)).then_some(Role::Relaying);
        let mut open = Vec::new();
        for role in [Role::Publishing, Role::Consuming].into_iter().chain(relays) {
            match connection::greeted(self.topology.url(), role).await {
                Ok((connection, _)) => open.push(connection),
                Err(e) => {
                    let finding = Finding::harmful(role.connection(), e.what())
                        .risking("a daemon needs one to publish, one to declare, one to consume, and one to relay, at the same time");
                    self.found(finding.with_remedy(e.remedy().unwrap_or("see the broker's log")));
                    break;
                }
            }
        }
        if open.len() == 2 + usize::from(relays.is_some()) && self.topology.keeps_history() {
            match connection::greeted(self.topology.url(), Role::Consuming).await {
                Ok((connection, _)) => open.push(connection),
                Err(e) => {
                    let finding = Finding::warning(Role::Consuming.connection(), e.what())
                        .risking("history begins only where one more can be opened for a moment: without it no event is kept, and deliveries go on");
                    self.found(finding.with_remedy(e.remedy().unwrap_or("see the broker's log")));
                }
            }
        }
        for connection in open {
            connection::close(&connection).await;
        }
    }

    fn broken(&mut self, name: &str, why: &BrokerError) {
        let whose = match self.topology.role(name) {
            Some(QueueRole::Main(s) | QueueRole::Retry(s) | QueueRole::Dead(s)) => s,
            _ => "SUBSCRIBER, of any subscriber",
        };
        let finding = Finding::harmful(format!("queue `{name}`"), format!("cannot be consumed: {why}"))
            .risking("what is in it is not delivered; if events are routed to it, producers get no confirm")
            .with_remedy(format!("rabbitmqctl cluster_status; if no node is missing and it stays so: hooktrail repair {whose}"))
            .harming_all(self.holds_up_all(name));
        self.found(finding);
    }

    pub(super) fn differs(&mut self, name: &str, refused: Refused) {
        let finding = match refused {
            Refused::Inequivalent { argument, wanted, found } => {
                let vhost = self.vhost();
                Finding::harmful(format!("queue `{name}`"), format!("exists with {argument} = {found}, where hooktrail needs {wanted}"))
                    .risking("with that it can lose events")
                    .with_remedy(format!(
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

    /// Reports missing queues. `run` declares those of a new subscriber, and of a new broker.
    fn absent(&mut self, absent: Vec<String>) {
        // Any of them: a policy may have deleted those that are seldom used.
        let has_run = !self.there.is_empty();
        for name in absent {
            let subscriber = match self.topology.role(&name) {
                Some(QueueRole::Main(s) | QueueRole::Retry(s) | QueueRole::Dead(s)) => {
                    Some(s.to_owned())
                }
                _ => None,
            };
            let others_are_there = match &subscriber {
                Some(s) => {
                    self.topology.subscriber_queues(s).iter().any(|(q, _)| self.there.contains(q))
                }
                None => has_run,
            };
            if others_are_there && self.topology.role(&name) == Some(QueueRole::History) {
                let found = "is not there: no daemon keeps history, or none has begun to";
                self.found(Finding::note(format!("queue `{name}`"), found));
                continue;
            }
            if !others_are_there {
                self.found(Finding::note(name, "not there yet; `run` declares it"));
                continue;
            }
            let about = format!("queue `{name}`");
            let missing = "is missing, while others that belong to it are there";
            let finding = match (self.topology.role(&name), subscriber) {
                (Some(QueueRole::Main(_)), Some(s)) => Finding::harmful(about, missing)
                    .risking(format!("events that are published now miss `{s}`"))
                    .with_remedy(format!("hooktrail repair {s}")),
                (_, Some(s)) => Finding::harmful(about, missing)
                    .risking("what was in it is lost; what is to be tried again, or kept as a dead letter, has no place")
                    .with_remedy(format!("a running daemon declares it within a minute; without one: hooktrail repair {s}")),
                (_, None) => Finding::harmful(about, missing)
                    .risking("what was in it is lost, and batches that wait for their next attempt have no place")
                    .with_remedy("a running daemon declares it within a minute; without one: hooktrail repair SUBSCRIBER, of any subscriber"),
            };
            self.found(finding);
        }
    }

    /// Compares the store of this process, as far as it is known, with those that have history and
    /// subscribers made over the API by the state stream.
    pub(super) async fn stores(&mut self, shared: &Shared) -> Result<(), QueueError> {
        let Some(record) = shared.broker().depth(&self.topology.state()).await? else {
            return Ok(());
        };
        let (recorded, _) =
            state_stream::inspected(self.topology, &shared.declaring, record.messages).await?;
        let own = match (shared.history.own.get(), self.topology.has_store()) {
            (Some(own), _) => OwnStore::Is(own),
            (None, false) => OwnStore::None,
            // A daemon without history knows no more than whose subscribers count; a command, nothing.
            (None, true) => OwnStore::Unknown(shared.removals.sharing()),
        };
        let prefix = self.topology.prefix();
        let history = self.topology.keeps_history().then(|| has_history(own, &recorded, prefix));
        self.findings.extend(history.flatten());
        self.findings.extend(has_subscribers(own, &recorded, prefix, self.topology.manages()));
        Ok(())
    }

    /// Reports subscribers that only earlier configurations had, by the state stream. Not needed
    /// where the management API lists the queues.
    pub(super) async fn not_configured_any_more(
        &mut self,
        shared: &Shared,
    ) -> Result<(), QueueError> {
        let mut broker = shared.broker();
        let Some(record) = broker.depth(&self.topology.state()).await? else { return Ok(()) };
        let mut left = BTreeMap::new();
        let inspected =
            state_stream::inspected(self.topology, &shared.declaring, record.messages).await?;
        for name in inspected.1 {
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

    /// Inspects the feature flag for at-least-once dead-lettering: without it the broker silently
    /// falls back to at most once, whatever the arguments.
    pub(super) async fn at_least_once(&mut self, api: Option<&Management>) {
        let about = "at-least-once dead-lettering";
        let remedy = "rabbitmqctl list_feature_flags; rabbitmqctl enable_feature_flag stream_queue";
        let flags = match (self.version, api) {
            (Some(version), _) if version >= STREAMS_FOR_GOOD => return,
            // The state stream could not exist without it.
            _ if self.there.contains(&self.topology.state()) => {
                return self.found(Finding::ok(about, "its feature flag is on"));
            }
            (_, None) => {
                return self.found(Finding::unseen(
                    about,
                    "there is no stream yet that would show its feature flag",
                    remedy,
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
                .with_remedy("rabbitmqctl enable_feature_flag stream_queue"),
            Err(e) => Finding::unseen(about, format!("management API: {e}"), remedy),
        };
        self.found(finding);
    }

    /// Reports how long messages are unacked: only `rabbitmqctl` shows the nodes' own timeout.
    pub(super) fn hold(&mut self) {
        let hold = |s: &Subscriber| Window::of(s).longest_hold(s, s.batch.max_events);
        let Some((hold, s)) =
            self.subscribers.iter().map(|s| (hold(s), s)).max_by_key(|(hold, _)| *hold)
        else {
            return;
        };
        let fewest = Window::of(s).fewest_events(s, CONSUMER_TIMEOUT);
        let mut found = format!(
            "the nodes' own setting is shown by no API and was not checked; RabbitMQ's default is 30 min, and hooktrail has a message unacked for at \
             most {} with full batches",
            humantime::format_duration(hold)
        );
        if fewest > 1 {
            found += &format!(
                "; with fewer than {fewest} events in each, and attempts as slow as they may be, for longer than that default"
            );
        }
        let remedy = "rabbitmqctl eval 'application:get_env(rabbit, consumer_timeout).'";
        let mut finding = Finding::note("consumer_timeout", found).with_remedy(remedy);
        finding.about.push(format!("subscriber `{}`", s.name));
        self.found(finding);
    }
}

/// A property of a broker's greeting.
pub(super) fn property(properties: Option<&FieldTable>, key: &str) -> String {
    match properties.and_then(|p| p.inner().get(key)) {
        Some(AMQPValue::LongString(text)) => text.to_string(),
        _ => String::new(),
    }
}

/// The outcome of a test message.
enum Probe {
    Taken,
    Blocked(String),
    Forbidden,
    Silent,
}

/// Publishes messages that no queue gets: an alarm shows only to publishers.
async fn take_one(connection: &Connection, routing_key: &str) -> Probe {
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
                    routing_key.into(),
                    BasicPublishOptions::default(),
                    b"",
                    properties,
                )
                .await?
                .await
        };
        // An alarm takes effect with the first message, which may still be confirmed; the second is
        // not.
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

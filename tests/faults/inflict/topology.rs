//! Faults made by others, of exchanges, queues and bindings. An event that was returned to its
//! producer is not confirmed, and a subscriber is owed nothing that is published while it is not
//! bound; every other event must arrive.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant, SystemTime},
};

use lapin::{
    BasicProperties, Channel, ExchangeKind,
    options::{
        BasicPublishOptions, ExchangeDeclareOptions, ExchangeDeleteOptions, QueueBindOptions,
        QueueDeclareOptions, QueueDeleteOptions,
    },
    types::FieldTable,
};
use rand::RngExt as _;

use crate::{
    fault::Heal,
    oracle::{LEVEL_DELETED, accepted},
    round::{NOTICED, Round},
    subscribers::{Kind, pick},
    support::{broker::Broker, eventually},
    world::{Place, Producer},
};

/// The time within which a deleted object is redeclared: the daemon checks each minute where
/// nothing shows it sooner.
const BACK: Duration = Duration::from_secs(150);

/// Binds a subscriber's queue as its daemon does, so that it does not matter which of the two comes
/// first.
pub(super) async fn bind(channel: &Channel, broker: &Broker, source_queue: bool, kind: Kind) {
    let exchange =
        if source_queue { format!("{}.events", broker.prefix) } else { broker.exchange.clone() };
    let queue = format!("{}.sub.{}", broker.prefix, kind.name());
    let (queue, exchange) = (queue.as_str().into(), exchange.as_str().into());
    channel
        .queue_bind(queue, exchange, "#".into(), QueueBindOptions::default(), FieldTable::default())
        .await
        .expect("binds");
}

impl Round<'_> {
    pub(super) async fn put_foreign_messages_among_retries(&mut self) -> bool {
        // It would wait, or be refused.
        if self.has(&Heal::Alarm) || self.has(&Heal::Permission) {
            return false;
        }
        let kind = *pick(&Kind::ALL, &mut self.rng);
        self.put_into_retries(kind).await;
        self.log(&format!("foreign messages among the retries of {kind:?}"));
        true
    }

    pub(super) async fn make_orphans(&mut self) -> bool {
        // Binding it again needs the permission.
        if self.has(&Heal::Orphans(Kind::Busy)) || self.has(&Heal::Permission) {
            return false;
        }
        let kind = *pick(&[Kind::Busy, Kind::Lines, Kind::Doomed, Kind::Leaving], &mut self.rng);
        self.bad_moods(&[kind]);
        self.retries_come_back(kind, false).await;
        self.lasts(
            Heal::Orphans(kind),
            format!("retries of {kind:?} do not come back"),
            false,
            4000,
        );
        true
    }

    /// Binds the queue of a subscriber's retries to the end of the ladder, or unbinds it: then they
    /// become orphans.
    pub(crate) async fn retries_come_back(&self, kind: Kind, bound: bool) {
        let Place::Broker { broker, .. } = &self.world.place else { return };
        let (name, prefix) = (kind.name(), &broker.prefix);
        let (queue, exchange, key) =
            (format!("{prefix}.sub.{name}.retry"), format!("{prefix}.delay"), format!("#.{name}"));
        let (connection, channel) = broker.channel().await;
        let (queue, exchange, key) =
            (queue.as_str().into(), exchange.as_str().into(), key.as_str().into());
        if bound {
            channel
                .queue_bind(
                    queue,
                    exchange,
                    key,
                    QueueBindOptions::default(),
                    FieldTable::default(),
                )
                .await
                .expect("binds");
        } else {
            channel
                .queue_unbind(queue, exchange, key, FieldTable::default())
                .await
                .expect("unbinds");
        }
        connection.close(200, "done".into()).await.ok();
    }

    /// Messages that no daemon of hooktrail has written and that are no events.
    async fn put_into_retries(&self, kind: Kind) {
        let Place::Broker { broker, .. } = &self.world.place else { return };
        let queue = format!("{}.sub.{}.retry", broker.prefix, kind.name());
        let (connection, channel) = broker.channel().await;
        for _ in 0..3 {
            let (options, properties) =
                (BasicPublishOptions::default(), BasicProperties::default());
            channel
                .basic_publish(
                    "".into(),
                    queue.as_str().into(),
                    options,
                    b"{\"events\":[]}",
                    properties,
                )
                .await
                .expect("publishes");
        }
        connection.close(200, "done".into()).await.ok();
    }

    /// Whether nothing is left in the source queue, if there is one. Nothing is published
    /// meanwhile.
    pub(crate) async fn all_is_relayed(&self) -> bool {
        for _ in 0..6 {
            let queues = self
                .ctl(&["list_queues", "--quiet", "--no-table-headers", "name", "messages"])
                .await;
            let waits = |(name, messages): (&str, &str)| {
                (name == "source" || name.ends_with(".intake")) && messages != "0"
            };
            if !queues.lines().filter_map(|l| l.split_once('\t')).any(waits) {
                return true;
            }
        }
        false
    }

    /// The exchange that the subscribers' queues are bound to.
    fn exchange(&self) -> Option<String> {
        match &self.world.place {
            Place::Broker { broker, source_queue: true, .. } => {
                Some(format!("{}.events", broker.prefix))
            }
            Place::Broker { broker, .. } => Some(broker.exchange.clone()),
            Place::Embedded(_) | Place::Intake { .. } => None,
        }
    }

    /// From now on what is published passes these by.
    fn passes_by(&self, kinds: &[Kind]) {
        self.world.passed_by.lock().expect("not poisoned").extend(kinds.iter().map(|k| k.name()));
    }

    pub(super) async fn redeclare_exchange(&mut self) -> bool {
        let (Place::Broker { broker, .. }, Some(exchange)) = (&self.world.place, self.exchange())
        else {
            return false;
        };
        let broker = broker.clone();
        if !self.is_quiet() {
            return false;
        }
        let gate = self.world.publishing.clone();
        let held = gate.write().await;
        if !self.all_is_relayed().await {
            return false;
        }
        self.passes_by(&Kind::ALL);
        let (connection, channel) = broker.channel().await;
        let deleted = channel
            .exchange_delete(exchange.as_str().into(), ExchangeDeleteOptions::default())
            .await;
        deleted.expect("deletes");
        self.log(&format!("exchange {exchange} is deleted"));
        drop(held);
        let pause = if self.rng.random_bool(0.5) { 0 } else { self.rng.random_range(0..3000) };
        tokio::time::sleep(Duration::from_millis(pause)).await; // a deployment
        let durable = ExchangeDeclareOptions { durable: true, ..ExchangeDeclareOptions::default() };
        let declared = channel
            .exchange_declare(
                exchange.as_str().into(),
                ExchangeKind::Topic,
                durable,
                FieldTable::default(),
            )
            .await;
        declared.expect("declares");
        connection.close(200, "done".into()).await.ok();
        self.log(&format!("exchange {exchange} is declared again after {pause} ms"));
        self.bindings_come_back().await;
        true
    }

    pub(super) async fn unbind_queue(&mut self) -> bool {
        let (Place::Broker { broker, .. }, Some(exchange)) = (&self.world.place, self.exchange())
        else {
            return false;
        };
        let broker = broker.clone();
        if !self.is_quiet() {
            return false;
        }
        let gate = self.world.publishing.clone();
        let held = gate.write().await;
        if !self.all_is_relayed().await {
            return false;
        }
        let kind = *pick(&Kind::ALL, &mut self.rng);
        self.passes_by(&[kind]);
        let queue = format!("{}.sub.{}", broker.prefix, kind.name());
        let (connection, channel) = broker.channel().await;
        let (q, e) = (queue.as_str().into(), exchange.as_str().into());
        channel.queue_unbind(q, e, "#".into(), FieldTable::default()).await.expect("unbinds");
        connection.close(200, "done".into()).await.ok();
        self.log(&format!("{queue} is unbound"));
        drop(held);
        if self.rng.random_bool(0.4) {
            // Before anybody else can put it back: a daemon that starts, or reads its configuration
            // again.
            self.bindings_come_back().await;
        }
        true
    }

    /// Waits until all are bound whose binding was taken away: what is published from then on is
    /// for them.
    pub(crate) async fn bindings_come_back(&mut self) {
        let missing: BTreeSet<String> = self.world.passed_by.lock().expect("not poisoned").clone();
        let Some(exchange) = self.exchange().filter(|_| !missing.is_empty()) else { return };
        let begun = Instant::now();
        loop {
            let bound = self
                .ctl(&[
                    "list_bindings",
                    "--quiet",
                    "--no-table-headers",
                    "source_name",
                    "destination_name",
                ])
                .await;
            let is_bound = |name: &String| {
                bound.lines().any(|l| {
                    l.split_once('\t')
                        .is_some_and(|(s, d)| s == exchange && d.ends_with(&format!(".sub.{name}")))
                })
            };
            let gone: Vec<&String> = missing.iter().filter(|name| !is_bound(name)).collect();
            if gone.is_empty() {
                break;
            }
            if begun.elapsed() > BACK {
                self.complaints.push(format!("not bound again within {BACK:?}: {gone:?}"));
                return;
            }
            self.look_after().await;
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        self.log(&format!("bound again after {:.1} s: {missing:?}", begun.elapsed().as_secs_f64()));
        let gate = self.world.publishing.clone();
        let held = gate.write().await;
        self.all_is_relayed().await;
        self.world.passed_by.lock().expect("not poisoned").clear();
        drop(held);
    }

    /// Deletes a queue of the ladder, with what is in it.
    pub(super) async fn delete_level(&mut self) -> bool {
        let Place::Broker { broker, .. } = &self.world.place else { return false };
        let broker = broker.clone();
        if !self.is_quiet() {
            return false;
        }
        self.bad_moods(&[Kind::Busy, Kind::Lines, Kind::Doomed]);
        let from = SystemTime::now();
        let level = *pick(&["delay.00", "delay.01"], &mut self.rng);
        let queue = format!("{}.{level}", broker.prefix);
        let (connection, channel) = broker.channel().await;
        let deleted = channel
            .queue_delete(queue.as_str().into(), QueueDeleteOptions::default())
            .await
            .expect("deletes");
        connection.close(200, "done".into()).await.ok();
        self.retries_deleted.push(SystemTime::now());
        self.log(&format!("{queue} is deleted; it held {deleted}"));
        let begun = Instant::now();
        loop {
            let (connection, channel) = broker.channel().await;
            let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
            let is_back = channel
                .queue_declare(queue.as_str().into(), passive, FieldTable::default())
                .await
                .is_ok();
            connection.close(200, "done".into()).await.ok();
            if is_back {
                break;
            }
            if begun.elapsed() > BACK {
                self.complaints.push(format!("{queue} was not declared again within {BACK:?}"));
                break;
            }
            self.look_after().await;
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        self.declared = Some(Instant::now());
        self.log(&format!("{queue} is back after {:.1} s", begun.elapsed().as_secs_f64()));
        self.disturbed(LEVEL_DELETED, from, NOTICED);
        true
    }

    /// Deletes an empty queue. Nothing is published until it is there again.
    pub(super) async fn delete_empty_queue(&mut self, producer: &Producer) -> bool {
        // It is needed for this that a daemon can put it back.
        let Place::Broker { broker, source_queue, .. } = &self.world.place else { return false };
        if self.lasting.iter().any(|l| l.disturbs)
            || self.world.daemons.iter_mut().any(|d| d.as_mut().is_none_or(|d| !d.is_running()))
        {
            return false;
        }
        let (broker, source_queue) = (broker.clone(), *source_queue);
        let gate = self.world.publishing.clone();
        let held = gate.write().await;
        let Some(steady) = self.world.subscribers.iter().find(|s| s.kind == Kind::Steady) else {
            return false;
        };
        let wanted = producer.ledger().confirmed;
        let patience = Instant::now();
        while !wanted.is_subset(&accepted(&steady.receiver.requests())) {
            if patience.elapsed() > Duration::from_secs(5) {
                return false;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let from = SystemTime::now();
        let which = *pick(&["sub.steady", "sub.steady.retry"], &mut self.rng);
        let queue = format!("{}.{which}", broker.prefix);
        let (connection, channel) = broker.channel().await;
        let deleted = channel
            .queue_delete(queue.as_str().into(), QueueDeleteOptions::default())
            .await
            .expect("deletes");
        connection.close(200, "done".into()).await.ok();
        self.log(&format!("{queue} is deleted; it held {deleted}"));
        let is_back = async || {
            let (connection, channel) = broker.channel().await;
            let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
            let found = channel
                .queue_declare(queue.as_str().into(), passive, FieldTable::default())
                .await
                .is_ok();
            if found && which == "sub.steady" {
                bind(&channel, &broker, source_queue, Kind::Steady).await;
            }
            connection.close(200, "done".into()).await.ok();
            found
        };
        eventually("the queue is declared again", is_back).await;
        drop(held);
        self.declared = Some(Instant::now());
        self.log(&format!("{queue} is back"));
        self.disturbed("queue deleted", from, NOTICED);
        true
    }
}

//! Declares and binds what the topology names.

use std::collections::BTreeSet;

use lapin::{
    ExchangeKind,
    options::{ExchangeDeclareOptions, ExchangeUnbindOptions},
    types::{AMQPValue, FieldTable},
};

use super::{
    ladder,
    requests::{Broker, Refused},
    topology::{Topology, keeping_arguments, table, text},
};
use crate::{
    config::{Intake, Subscriber},
    failpoint::{Step, reached},
    queue::QueueError,
};

/// The pattern that matches every event.
pub(super) const EVERYTHING: &str = "#";

impl Topology {
    /// Declares what all subscribers share: the exchange of the events, the ladder, the orphans.
    pub(super) async fn ensure_shared(&self, broker: &mut Broker<'_>) -> Result<(), QueueError> {
        self.ensure_events(broker).await?;
        self.ensure_own(broker).await
    }

    /// Declares what is hooktrail's alone: the ladder and the orphans.
    pub(super) async fn ensure_own(&self, broker: &mut Broker<'_>) -> Result<(), QueueError> {
        let orphans = self.orphans();
        broker.ensure_queue(&orphans, keeping_arguments()).await?;
        broker.exchange(&orphans, ExchangeKind::Fanout, FieldTable::default()).await?;
        broker.bind(&orphans, &orphans, "").await?;
        // Without it a message for a subscriber whose retry queue is gone would stick in a level,
        // and 32 of them block it.
        broker
            .exchange(
                &self.due(),
                ExchangeKind::Topic,
                table(&[("alternate-exchange", text(&orphans))]),
            )
            .await?;
        for level in 0..ladder::LEVELS {
            broker.exchange(&self.level(level), ExchangeKind::Topic, FieldTable::default()).await?;
        }
        for level in 0..ladder::LEVELS {
            let name = self.level(level);
            let below = if level == 0 { self.due() } else { self.level(level - 1) };
            broker.ensure_queue(&name, self.level_arguments(level)).await?;
            broker.bind(&name, &name, &ladder::binding_key(level, '1')).await?;
            let bound = broker.bind_exchange(&below, &name, &ladder::binding_key(level, '0')).await;
            bound.map_err(|e| unbound(e, &below))?;
        }
        Ok(())
    }

    /// Whether the exchange that producers publish to exists.
    pub(super) async fn has_events(&self, broker: &mut Broker<'_>) -> Result<bool, QueueError> {
        broker.has_exchange(&self.events()).await
    }

    /// Whether the witness exists: an exchange without messages, bound to the exchange of the
    /// events. It is deleted with its last binding, and so with that exchange: if an operator
    /// deletes the exchange of the events and redeclares it, all bindings are gone, and AMQP shows
    /// nothing else of that.
    pub(super) async fn has_witness(&self, broker: &mut Broker<'_>) -> Result<bool, QueueError> {
        broker.has_exchange(&self.witness()).await
    }

    /// Declares the witness. If the user may not bind it, it is never deleted, and shows nothing.
    pub(super) async fn ensure_witness(&self, broker: &mut Broker<'_>) -> Result<(), QueueError> {
        let witness = self.witness();
        let options = ExchangeDeclareOptions {
            durable: true,
            auto_delete: true,
            ..ExchangeDeclareOptions::default()
        };
        let declared = broker
            .ask(async |c| {
                c.exchange_declare(
                    witness.as_str().into(),
                    ExchangeKind::Fanout,
                    options,
                    FieldTable::default(),
                )
                .await
            })
            .await;
        declared.map_err(|e| e.into_error("exchange", &witness))?;
        reached(Step::Witnessed);
        self.bind_witness(broker).await
    }

    /// Binds the witness, which is not declared: if it was deleted meanwhile, that must be seen. If
    /// the exchange of the events was, the witness is deleted too: one that was unbound at that
    /// moment would seem to say that it was not.
    pub(super) async fn bind_witness(&self, broker: &mut Broker<'_>) -> Result<(), QueueError> {
        let (events, witness) = (self.events(), self.witness());
        let Err(refused) = broker.bind_exchange(&events, &witness, "").await else { return Ok(()) };
        if matches!(refused, Refused::NotFound) {
            // The next check tries again.
            broker.delete_exchange(&witness).await.ok();
        }
        Err(unbound(refused, &events))
    }

    /// Unbinds the witness from an exchange.
    pub(super) async fn release_witness(
        &self,
        broker: &mut Broker<'_>,
        exchange: &str,
    ) -> Result<(), QueueError> {
        let witness = self.witness();
        let unbound = broker.ask(async |c| {
            let options = ExchangeUnbindOptions::default();
            c.exchange_unbind(
                exchange.into(),
                witness.as_str().into(),
                "".into(),
                options,
                FieldTable::default(),
            )
            .await
        });
        match unbound.await {
            Ok(()) | Err(Refused::NotFound) => Ok(()),
            Err(e) => Err(e.into_error("exchange", &witness)),
        }
    }

    /// Finds queues of another configuration with this prefix, in which events wait or may come to,
    /// while events come through a broker into the embedded queue.
    pub(super) async fn find_former(&self, broker: &mut Broker<'_>) -> Result<(), QueueError> {
        let prefix = self.prefix();
        if broker.depth(&self.state()).await?.is_some() {
            return Err(QueueError::needs_operator(format!(
                "there are queues of subscribers with prefix `{prefix}` in RabbitMQ: with [queue] intake nothing is taken from them, and what is published goes on coming into them"
            ))
            .remedied(format!(
                "run with RabbitMQ as [queue] url, and producers stopped, until hooktrail status shows nothing that waits; then, with that configuration, hooktrail prune --all deletes them; or choose another prefix than `{prefix}` where they belong to other daemons"
            )));
        }
        if let Intake::SourceQueue(source) = self.intake() {
            let intake = self.intake_queue();
            // Also an empty one: it is bound, and what is published goes on coming into it.
            if broker.depth(&intake).await?.is_some() {
                return Err(QueueError::needs_operator(format!(
                    "queue `{intake}` gets events, and [queue] source_queue `{source}` is taken from instead"
                ))
                .remedied("run with [queue] exchange, and producers stopped, until it is empty, and delete it: rabbitmqctl delete_queue"));
            }
        }
        Ok(())
    }

    /// Checks the source of the events, and declares nothing that is missing.
    pub(super) async fn inspect_intake(&self, broker: &mut Broker<'_>) -> Result<(), QueueError> {
        match self.intake() {
            Intake::Exchange(_) => {
                if self.has_events(broker).await? {
                    self.ensure_events(broker).await
                } else {
                    Ok(())
                }
            }
            Intake::SourceQueue(_) => self.find_source(broker).await,
        }
    }

    /// Checks that the source queue exists, if events come from one, and can be consumed without a
    /// loss.
    pub(super) async fn find_source(&self, broker: &mut Broker<'_>) -> Result<(), QueueError> {
        let Intake::SourceQueue(queue) = self.intake() else { return Ok(()) };
        if broker.depth(queue).await?.is_none() {
            let missing = format!(
                "[queue] source_queue `{queue}` does not exist; hooktrail takes from it but does not declare it"
            );
            return Err(QueueError::needs_operator(missing));
        }
        if broker.is_stream(queue).await { Err(source_is_stream(queue)) } else { Ok(()) }
    }

    pub(super) async fn ensure_events(&self, broker: &mut Broker<'_>) -> Result<(), QueueError> {
        let events = self.events();
        broker.ensure_exchange(&events).await.map_err(|e| match (&e, self.intake()) {
            (Refused::Inequivalent { argument, wanted, found }, Intake::Exchange(_)) if argument == "type" => {
                QueueError::needs_operator(format!(
                    "exchange `{events}` is of type {found}, not {wanted}: it cannot route by patterns; \
                 bind a queue of your own to it and name that as [queue] source_queue instead of exchange"
                ))
            }
            _ => e.into_error("exchange", &events),
        })
    }

    /// Declares a subscriber's retry and dead queue.
    pub(super) async fn ensure_retry_and_dead(
        &self,
        broker: &mut Broker<'_>,
        subscriber: &str,
    ) -> Result<(), QueueError> {
        let [dead, retry, _] = self.subscriber_queues(subscriber);
        for (queue, arguments) in [dead, retry] {
            broker.ensure_queue(&queue, arguments).await?;
        }
        self.bind_retry(broker, subscriber).await
    }

    /// Declares a subscriber's three queues and their bindings.
    pub(super) async fn ensure_subscriber(
        &self,
        broker: &mut Broker<'_>,
        subscriber: &Subscriber,
    ) -> Result<(), QueueError> {
        let name = &subscriber.name;
        for (queue, arguments) in self.subscriber_queues(name) {
            broker.ensure_queue(&queue, arguments).await?;
        }
        // The retry queue is bound before a batch can be published to the ladder for it.
        self.bind_retry(broker, name).await?;
        for pattern in &subscriber.events {
            broker.bind(&self.main(name), &self.events(), pattern.as_str()).await?;
        }
        Ok(())
    }

    /// Redeclares those queues of a subscriber that are missing, and binds `patterns`.
    pub(super) async fn restore_subscriber(
        &self,
        broker: &mut Broker<'_>,
        name: &str,
        patterns: &BTreeSet<String>,
    ) -> Result<(), QueueError> {
        for (queue, arguments) in self.subscriber_queues(name) {
            if broker.depth(&queue).await?.is_none() {
                broker.ensure_queue(&queue, arguments).await?;
            }
        }
        self.bind_retry(broker, name).await?;
        for pattern in patterns {
            broker.bind(&self.main(name), &self.events(), pattern).await?;
        }
        Ok(())
    }

    pub(super) async fn bind_retry(
        &self,
        broker: &mut Broker<'_>,
        name: &str,
    ) -> Result<(), QueueError> {
        broker.bind(&self.retry(name), &self.due(), &format!("#.{name}")).await
    }

    /// Unbinds the retry queue: from then on nothing comes back from the ladder for this
    /// subscriber.
    pub(super) async fn unbind_retry(
        &self,
        broker: &mut Broker<'_>,
        name: &str,
    ) -> Result<(), QueueError> {
        broker.unbind(&self.retry(name), &self.due(), &format!("#.{name}")).await
    }

    /// Declares the state stream.
    pub(super) async fn ensure_state(&self, broker: &mut Broker<'_>) -> Result<(), QueueError> {
        let arguments = table(&[("x-queue-type", text("stream"))]);
        broker.ensure_queue(&self.state(), arguments).await.map_err(|e| {
            let hint = if e.to_string().contains("feature flag") {
                "; enable it: rabbitmqctl enable_feature_flag stream_queue"
            } else {
                ""
            };
            QueueError::new(format!("{e}{hint}"))
        })
    }

    /// Declares the queue of history, without its binding.
    pub(super) async fn ensure_history(&self, broker: &mut Broker<'_>) -> Result<(), QueueError> {
        broker.ensure_queue(&self.history(), self.history_arguments()).await
    }

    /// Binds the queue of history to all events.
    pub(super) async fn bind_history(&self, broker: &mut Broker<'_>) -> Result<(), QueueError> {
        broker.bind(&self.history(), &self.events(), EVERYTHING).await
    }

    pub(super) async fn unbind_history(&self, broker: &mut Broker<'_>) -> Result<(), QueueError> {
        broker.unbind(&self.history(), &self.events(), EVERYTHING).await
    }

    pub(super) async fn ensure_snapshot(&self, broker: &mut Broker<'_>) -> Result<(), QueueError> {
        let arguments = table(&[
            ("x-queue-type", text("stream")),
            // The newest segment stays in any case, and with it the newest snapshot.
            ("x-max-length-bytes", AMQPValue::LongLongInt(64 << 20)),
            ("x-stream-max-segment-size-bytes", AMQPValue::LongLongInt(16 << 20)),
        ]);
        broker.ensure_queue(&self.snapshot(), arguments).await
    }
}

fn unbound(refused: Refused, exchange: &str) -> QueueError {
    refused.into_error("the binding of exchange", exchange)
}

/// The error for a source queue that is a stream. A stream keeps what was taken: a consumer that
/// returns reads it again from its beginning, or misses what arrived meanwhile.
pub(super) fn source_is_stream(queue: &str) -> QueueError {
    QueueError::needs_operator(format!(
        "[queue] source_queue `{queue}` is a stream: hooktrail keeps no position in it, so that what comes while no daemon reads it \
         would never be delivered"
    ))
    .remedied("bind a quorum queue to the exchange that fills the stream, and name that as source_queue")
}

/// Logs what was redeclared of the queues that all lanes share, and of a lane's retry and dead
/// queue.
pub(super) fn log_redeclared(broker: &mut Broker<'_>) {
    for name in broker.take_declared() {
        tracing::error!(
            name,
            "was missing and is redeclared: batches or dead letters that were in it are lost"
        );
    }
}

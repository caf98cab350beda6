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
    queue::QueueError,
};

impl Topology {
    /// What belongs to no subscriber: the events' exchange, the ladder, the orphans.
    pub(super) async fn ensure_shared(&self, broker: &mut Broker<'_>) -> Result<(), QueueError> {
        self.ensure_events(broker).await?;
        self.ensure_own(broker).await
    }

    /// What of that nobody else has any business with: the ladder and the orphans.
    pub(super) async fn ensure_own(&self, broker: &mut Broker<'_>) -> Result<(), QueueError> {
        let orphans = self.orphans();
        broker.ensure_queue(&orphans, keeping_arguments()).await?;
        broker.exchange(&orphans, ExchangeKind::Fanout, FieldTable::default()).await?;
        broker.bind(&orphans, &orphans, "").await?;
        // Without it a message for a subscriber whose retry queue is gone would stick in a level,
        // and 32 of them wedge it.
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
            broker.bind_exchange(&below, &name, &ladder::binding_key(level, '0')).await?;
        }
        Ok(())
    }

    /// Whether the exchange that producers publish to is there.
    pub(super) async fn has_events(&self, broker: &mut Broker<'_>) -> Result<bool, QueueError> {
        broker.has_exchange(&self.events()).await
    }

    /// Whether the witness is there: an exchange that nobody publishes to, bound to the one of the
    /// events. It is deleted with its last binding, and so with that exchange: whoever deletes the
    /// events' exchange and declares it anew takes all bindings away, and this is the only thing
    /// that AMQP shows of it.
    pub(super) async fn has_witness(&self, broker: &mut Broker<'_>) -> Result<bool, QueueError> {
        broker.has_exchange(&self.witness()).await
    }

    /// Declares the witness. Who may not bind it has one that never goes, and so tells nothing.
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
        broker.bind_exchange(&self.events(), &witness, "").await
    }

    /// From then on the witness is not one of that exchange any more.
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

    /// Looks at where events come from, and declares nothing that is not there.
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

    /// Whether the source queue is there, if events come from one, and can be taken from without a
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

    /// What a subscriber needs beside its events: where its retries and dead letters go.
    pub(super) async fn ensure_ways_back(
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

    /// A subscriber's three queues and their bindings.
    pub(super) async fn ensure_subscriber(
        &self,
        broker: &mut Broker<'_>,
        subscriber: &Subscriber,
    ) -> Result<(), QueueError> {
        let name = &subscriber.name;
        for (queue, arguments) in self.subscriber_queues(name) {
            broker.ensure_queue(&queue, arguments).await?;
        }
        // The retry queue is bound before anything can be sent up the ladder for it.
        self.bind_retry(broker, name).await?;
        for pattern in &subscriber.events {
            broker.bind(&self.main(name), &self.events(), pattern.as_str()).await?;
        }
        Ok(())
    }

    /// The same for a subscriber that had them: declares of its queues those that are missing, and
    /// binds `patterns`.
    pub(super) async fn put_back_subscriber(
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

    /// From then on nothing comes back from the ladder for this subscriber.
    pub(super) async fn unbind_retry(
        &self,
        broker: &mut Broker<'_>,
        name: &str,
    ) -> Result<(), QueueError> {
        broker.unbind(&self.retry(name), &self.due(), &format!("#.{name}")).await
    }

    /// The stream of changes.
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

/// A stream keeps what was taken: who comes back reads it again from its beginning, or misses what
/// came meanwhile.
pub(super) fn source_is_stream(queue: &str) -> QueueError {
    QueueError::needs_operator(format!(
        "[queue] source_queue `{queue}` is a stream: hooktrail keeps no position in it, so that what comes while no daemon reads it \
         would never be delivered"
    ))
    .remedied("bind a quorum queue to the exchange that fills the stream, and name that as source_queue")
}

/// Of what all lanes share, and of a lane's ways back.
pub(super) fn log_put_back(broker: &mut Broker<'_>) {
    for name in broker.take_declared() {
        tracing::error!(
            name,
            "was missing and is declared again: batches or dead letters that were in it are lost"
        );
    }
}

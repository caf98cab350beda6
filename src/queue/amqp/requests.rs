//! Requests to the broker, and its refusals.

use lapin::{
    Channel, ExchangeKind,
    options::{
        BasicGetOptions, ExchangeBindOptions, ExchangeDeclareOptions, ExchangeDeleteOptions,
        ExchangeUnbindOptions, QueueBindOptions, QueueDeclareOptions, QueueDeleteOptions,
    },
    types::FieldTable,
};

use super::{
    broker_error::{BrokerError, NOT_FOUND, answer},
    pool::{Lease, Pool},
    topology::{keeping_arguments, table, text, walk_of},
};
use crate::{
    failpoint::{Step, reached},
    queue::QueueError,
};

/// The number of ready messages and of consumers of a queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Depth {
    pub(super) messages: u32,
    pub(super) consumers: u32,
}

/// Why the broker refused a request.
pub(super) enum Refused {
    NotFound,
    /// It exists with another value of an argument.
    Inequivalent {
        argument: String,
        wanted: String,
        found: String,
    },
    Forbidden(String),
    Other(String),
}

impl Refused {
    fn from_error(e: &BrokerError) -> Self {
        let message = e.to_string();
        match e.code {
            Some(NOT_FOUND) => Self::NotFound,
            Some(403) => Self::Forbidden(message),
            Some(406) => inequivalent(&message).unwrap_or(Self::Other(message)),
            _ => Self::Other(message),
        }
    }

    pub(super) fn into_error(self, what: &str, name: &str) -> QueueError {
        match self {
            Self::NotFound => QueueError::new(format!("{what} `{name}` does not exist")),
            Self::Inequivalent { argument, wanted, found } => QueueError::needs_operator(format!(
                "{what} `{name}` exists with {argument} = {found}, where hooktrail needs {wanted}: with that it can lose events; \
                 delete it when it is empty, or choose another [queue] prefix"
            )),
            Self::Forbidden(why) => QueueError::needs_operator(format!(
                "{what} `{name}`: the user that hooktrail connects as may not do this: {why}"
            )),
            Self::Other(why) => QueueError::new(format!("{what} `{name}`: {why}")),
        }
    }
}

/// Reads the broker's `inequivalent arg 'A' for queue 'Q' in vhost 'V': received 'X' but current is
/// 'Y'`.
fn inequivalent(message: &str) -> Option<Refused> {
    let rest = message.split_once("inequivalent arg '")?.1;
    let (argument, rest) = rest.split_once('\'')?;
    let (_, rest) = rest.split_once("received ")?;
    let (wanted, found) = rest.split_once(" but current is ")?;
    // "none", or "the value 'X' of type 'longstr'", or "'X'".
    let value =
        |s: &str| match s.split('\'').nth(1).unwrap_or(s.split_whitespace().next().unwrap_or(s)) {
            "" => "\"\"".to_owned(), // the default exchange
            value => value.to_owned(),
        };
    Some(Refused::Inequivalent {
        argument: argument.to_owned(),
        wanted: value(wanted),
        found: value(found),
    })
}

/// Makes requests that the broker may refuse, one after the other. A refusal closes the channel,
/// and the next request gets another one.
pub(super) struct Broker<'p> {
    pool: &'p Pool,
    lease: Option<Lease>,
    /// Queues and exchanges that were missing and were declared.
    declared: Vec<String>,
}

impl<'p> Broker<'p> {
    pub(super) fn new(pool: &'p Pool) -> Self {
        Self { pool, lease: None, declared: Vec::new() }
    }

    /// Takes the channel for the next request, if there is none yet.
    ///
    /// # Errors
    /// The broker opens none, which says nothing of what is to be asked.
    pub(super) async fn ready(&mut self) -> Result<(), QueueError> {
        if self.lease.as_ref().is_none_or(|lease| !lease.channel.status().connected()) {
            self.lease = Some(self.pool.lease().await?);
        }
        Ok(())
    }

    /// Takes the queues and exchanges that were declared since the last call.
    pub(super) fn take_declared(&mut self) -> Vec<String> {
        std::mem::take(&mut self.declared)
    }

    pub(super) async fn ask<T>(
        &mut self,
        request: impl AsyncFnOnce(&Channel) -> lapin::Result<T>,
    ) -> Result<T, Refused> {
        let lease = match self.lease.take().filter(|l| l.channel.status().connected()) {
            Some(lease) => lease,
            None => self.pool.lease().await.map_err(|e| Refused::Other(e.to_string()))?,
        };
        let answer = answer(request(&lease.channel)).await.map_err(|e| Refused::from_error(&e))?;
        self.lease = Some(lease);
        reached(Step::Declared);
        Ok(answer)
    }

    /// The counts of a queue; `None` if there is no such queue.
    pub(super) async fn depth(&mut self, queue: &str) -> Result<Option<Depth>, QueueError> {
        let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
        match self
            .ask(async |c| c.queue_declare(queue.into(), passive, FieldTable::default()).await)
            .await
        {
            Ok(q) => Ok(Some(Depth { messages: q.message_count(), consumers: q.consumer_count() })),
            Err(Refused::NotFound) => Ok(None),
            Err(other) => Err(other.into_error("queue", queue)),
        }
    }

    /// Whether a walk reads a queue; see [`walk_of`].
    pub(super) async fn is_walked(&mut self, queue: &str) -> Result<bool, QueueError> {
        let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
        let walk = walk_of(queue);
        match self
            .ask(async |c| {
                c.queue_declare(walk.as_str().into(), passive, FieldTable::default()).await
            })
            .await
        {
            Ok(_) => Ok(true),
            Err(Refused::NotFound) => Ok(false),
            Err(Refused::Other(why)) if why.contains("RESOURCE_LOCKED") => Ok(true),
            Err(other) => Err(other.into_error("queue", &walk)),
        }
    }

    /// Whether an existing queue is a stream: the broker says so when it is declared with a type
    /// that does not exist, which declares nothing. A user that may not declare it gets `false`.
    pub(super) async fn is_stream(&mut self, queue: &str) -> bool {
        let asked = self.compare(queue, table(&[("x-queue-type", text("hooktrail-asks"))])).await;
        matches!(asked, Err(Refused::Inequivalent { argument, found, .. }) if argument == "x-queue-type" && found == "stream")
    }

    /// The number of messages that are ready in a queue; `None` if there is no such queue.
    pub(super) async fn messages(&mut self, queue: &str) -> Result<Option<u64>, QueueError> {
        Ok(self.depth(queue).await?.map(|d| d.messages.into()))
    }

    /// Declares a queue if it is missing, and compares its arguments if it exists.
    pub(super) async fn ensure_queue(
        &mut self,
        queue: &str,
        arguments: FieldTable,
    ) -> Result<(), QueueError> {
        let existed = self.depth(queue).await?.is_some();
        let keeps = arguments == keeping_arguments();
        let durable = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
        match self.ask(async |c| c.queue_declare(queue.into(), durable, arguments).await).await {
            Ok(_) => {
                if !existed {
                    tracing::debug!(queue, "declared");
                    self.declared.push(queue.to_owned());
                }
                Ok(())
            }
            // A user that may not declare can still use what was declared before.
            Err(Refused::Forbidden(_)) if existed => Ok(()),
            // A queue that keeps dead letters and has no limit serves as well without it.
            Err(Refused::Inequivalent { argument, .. }) if keeps && argument == "x-overflow" => {
                Ok(())
            }
            Err(other) => Err(other.into_error("queue", queue)),
        }
    }

    /// Tries whether one more queue could be declared: with an exclusive one that is deleted at
    /// once.
    pub(super) async fn try_declare(&mut self, name: &str) -> Result<(), Refused> {
        let exclusive = QueueDeclareOptions {
            exclusive: true,
            auto_delete: true,
            ..QueueDeclareOptions::default()
        };
        self.ask(async |c| c.queue_declare(name.into(), exclusive, FieldTable::default()).await)
            .await?;
        self.ask(async |c| c.queue_delete(name.into(), QueueDeleteOptions::default()).await)
            .await
            .map(drop)
    }

    /// Compares the arguments of an existing queue. A user that may not declare it is refused.
    pub(super) async fn compare(
        &mut self,
        queue: &str,
        arguments: FieldTable,
    ) -> Result<(), Refused> {
        let durable = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
        self.ask(async |c| c.queue_declare(queue.into(), durable, arguments).await).await.map(drop)
    }

    /// The actions of hooktrail that the user may not do: tried with a queue and a routing key that
    /// do not exist, so that nothing changes. RabbitMQ checks permissions before it checks whether
    /// such a queue exists.
    pub(super) async fn forbidden(&mut self, queue: &str, exchange: &str) -> Vec<String> {
        let mut forbidden = Vec::new();
        let mut refused = |what: &str, answer: Result<(), Refused>| {
            if let Err(Refused::Forbidden(_)) = answer {
                forbidden.push(what.to_owned());
            }
        };
        let unused =
            QueueDeleteOptions { if_unused: true, if_empty: true, ..QueueDeleteOptions::default() };
        refused(
            "configure its queues",
            self.ask(async |c| c.queue_delete(queue.into(), unused).await.map(drop)).await,
        );
        refused(
            "read its queues",
            self.ask(async |c| {
                c.basic_get(queue.into(), BasicGetOptions::default()).await.map(drop)
            })
            .await,
        );
        let unbound = self
            .ask(async |c| {
                c.queue_unbind(queue.into(), exchange.into(), queue.into(), FieldTable::default())
                    .await
            })
            .await;
        let reads_exchange = format!("read exchange `{exchange}`");
        match &unbound {
            Err(Refused::Forbidden(why)) if why.contains("exchange '") => {
                refused(&reads_exchange, unbound)
            }
            _ => refused("write to its queues", unbound),
        }
        let writes = self.ask(async |c| {
            let (to, from) = (exchange.into(), exchange.into());
            c.exchange_unbind(
                to,
                from,
                queue.into(),
                ExchangeUnbindOptions::default(),
                FieldTable::default(),
            )
            .await
        });
        let writes = writes.await;
        if !forbidden.contains(&reads_exchange) && matches!(writes, Err(Refused::Forbidden(_))) {
            forbidden.push(format!("write to exchange `{exchange}`"));
        }
        forbidden
    }

    pub(super) async fn declare_exchange(
        &mut self,
        name: &str,
        kind: ExchangeKind,
        passive: bool,
        arguments: FieldTable,
    ) -> Result<(), Refused> {
        let options =
            ExchangeDeclareOptions { durable: true, passive, ..ExchangeDeclareOptions::default() };
        self.ask(async |c| c.exchange_declare(name.into(), kind, options, arguments).await).await
    }

    /// Whether there is such an exchange, of whatever type.
    pub(super) async fn has_exchange(&mut self, name: &str) -> Result<bool, QueueError> {
        match self.declare_exchange(name, ExchangeKind::Topic, true, FieldTable::default()).await {
            Ok(()) => Ok(true),
            Err(Refused::NotFound) => Ok(false),
            Err(e) => Err(e.into_error("exchange", name)),
        }
    }

    /// Declares the exchange that producers publish to if it is missing; otherwise only its type
    /// matters.
    pub(super) async fn ensure_exchange(&mut self, name: &str) -> Result<(), Refused> {
        let existed = match self
            .declare_exchange(name, ExchangeKind::Topic, true, FieldTable::default())
            .await
        {
            Ok(()) => true,
            Err(Refused::NotFound) => false,
            Err(other) => return Err(other),
        };
        match self.declare_exchange(name, ExchangeKind::Topic, false, FieldTable::default()).await {
            Ok(()) => {
                if !existed {
                    self.declared.push(name.to_owned());
                }
                Ok(())
            }
            // It may have an alternate exchange, or be deleted with its last binding: the owner's
            // choice.
            Err(Refused::Inequivalent { argument, .. }) if existed && argument != "type" => Ok(()),
            Err(Refused::Forbidden(_)) if existed => Ok(()),
            Err(other) => Err(other),
        }
    }

    /// Declares an exchange of hooktrail's own.
    pub(super) async fn exchange(
        &mut self,
        name: &str,
        kind: ExchangeKind,
        arguments: FieldTable,
    ) -> Result<(), QueueError> {
        let exists =
            self.declare_exchange(name, kind.clone(), true, FieldTable::default()).await.is_ok();
        match self.declare_exchange(name, kind, false, arguments).await {
            Err(Refused::Forbidden(_)) if exists => Ok(()),
            Ok(()) if !exists => {
                self.declared.push(name.to_owned());
                Ok(())
            }
            answer => answer.map_err(|e| e.into_error("exchange", name)),
        }
    }

    pub(super) async fn bind(
        &mut self,
        queue: &str,
        exchange: &str,
        key: &str,
    ) -> Result<(), QueueError> {
        let bound = self.ask(async |c| {
            c.queue_bind(
                queue.into(),
                exchange.into(),
                key.into(),
                QueueBindOptions::default(),
                FieldTable::default(),
            )
            .await
        });
        bound.await.map_err(|e| match e {
            Refused::NotFound => {
                QueueError::new(format!("queue `{queue}` cannot be bound: exchange `{exchange}` does not exist, or the queue does not"))
            }
            e => e.into_error("the binding of queue", queue),
        })
    }

    pub(super) async fn unbind(
        &mut self,
        queue: &str,
        exchange: &str,
        key: &str,
    ) -> Result<(), QueueError> {
        let unbound = self.ask(async |c| {
            c.queue_unbind(queue.into(), exchange.into(), key.into(), FieldTable::default()).await
        });
        match unbound.await {
            Ok(()) | Err(Refused::NotFound) => Ok(()),
            Err(e) => Err(e.into_error("the binding of queue", queue)),
        }
    }

    pub(super) async fn delete_queue(&mut self, queue: &str) -> Result<(), QueueError> {
        let deleted =
            self.ask(async |c| c.queue_delete(queue.into(), QueueDeleteOptions::default()).await);
        match deleted.await {
            Ok(_) | Err(Refused::NotFound) => Ok(()),
            Err(e) => Err(e.into_error("queue", queue)),
        }
    }

    pub(super) async fn delete_exchange(&mut self, exchange: &str) -> Result<(), QueueError> {
        let deleted = self.ask(async |c| {
            c.exchange_delete(exchange.into(), ExchangeDeleteOptions::default()).await
        });
        deleted.await.map_err(|e| e.into_error("exchange", exchange))
    }

    pub(super) async fn bind_exchange(
        &mut self,
        to: &str,
        from: &str,
        key: &str,
    ) -> Result<(), Refused> {
        self.ask(async |c| {
            c.exchange_bind(
                to.into(),
                from.into(),
                key.into(),
                ExchangeBindOptions::default(),
                FieldTable::default(),
            )
            .await
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_brokers_text_about_a_conflict_is_understood() {
        for (message, argument, wanted, found) in [
            (
                "PRECONDITION_FAILED - inequivalent arg 'type' for exchange 'audit' in vhost '/': received 'topic' but current is 'fanout' (406)",
                "type",
                "topic",
                "fanout",
            ),
            (
                "PRECONDITION_FAILED - inequivalent arg 'x-delivery-limit' for queue 'q' in vhost '/': received none but current is the value '5' of type 'signedint' (406)",
                "x-delivery-limit",
                "none",
                "5",
            ),
            (
                "PRECONDITION_FAILED - inequivalent arg 'x-queue-type' for queue 'q' in vhost '/': received the value 'quorum' of type 'longstr' but current is none (406)",
                "x-queue-type",
                "quorum",
                "none",
            ),
            (
                "PRECONDITION_FAILED - inequivalent arg 'x-dead-letter-exchange' for queue 'q' in vhost '/': received the value '' of type 'longstr' but current is none (406)",
                "x-dead-letter-exchange",
                "\"\"",
                "none",
            ),
        ] {
            match inequivalent(message) {
                Some(Refused::Inequivalent { argument: a, wanted: w, found: f }) => {
                    assert_eq!((a.as_str(), w.as_str(), f.as_str()), (argument, wanted, found))
                }
                _ => panic!("{message}"),
            }
        }
        assert!(inequivalent("PRECONDITION_FAILED - something else").is_none());
    }
}

//! The inspection of a broker that events come through into the embedded queue.

use tokio::time::timeout;

use super::{
    inspection::Inspection,
    judge::{in_the_clear, product},
};
use crate::queue::amqp::{
    broker_error::RPC_TIMEOUT,
    connection::{self, Role},
    requests::Broker,
    topology::Topology,
};
use crate::{config::Intake, queue::QueueError, telemetry::finding::Finding, wording::counted};

impl Inspection<'_> {
    /// Inspects the version of the broker.
    pub(super) async fn greeting(&mut self) -> Result<(), QueueError> {
        let (connection, greeting) = connection::greeted(self.topology.url(), Role::Intake).await?;
        let about = greeting.server_properties();
        let text = |key: &str| super::broker::property(about.as_ref(), key);
        let (version, finding) = product(&text("product"), &text("version"));
        self.version = version;
        self.found(finding);
        connection::close(&connection).await;
        let in_the_clear = in_the_clear(self.topology.url());
        let remedy = "amqps://… as [queue] intake, where the broker has TLS";
        self.findings.extend(in_the_clear.map(|finding| finding.with_remedy(remedy)));
        Ok(())
    }

    /// Inspects the source of the events and the queue that they are taken from.
    pub(super) async fn intake(&mut self, broker: &mut Broker<'_>, topology: &Topology) {
        for (inspected, risk) in [
            (topology.inspect_intake(broker).await, "no event comes in from there"),
            (
                topology.find_former(broker).await,
                "no event comes in from there, and a daemon that is started now ends at once",
            ),
        ] {
            let Err(e) = inspected else { continue };
            let finding = Finding::harmful("[queue]", e.what()).risking(risk);
            self.found(match e.remedy() {
                Some(remedy) => finding.with_remedy(remedy),
                None => finding,
            });
        }
        let own = topology.intake_queue();
        let queue = match topology.intake() {
            Intake::Exchange(_) => own.clone(),
            Intake::SourceQueue(name) => name.clone(),
        };
        match timeout(RPC_TIMEOUT, broker.depth(&queue)).await {
            Ok(Ok(Some(depth))) => {
                let (messages, consumers) =
                    (counted(depth.messages, "event(s)"), counted(depth.consumers, "consumer(s)"));
                self.found(Finding::ok(
                    format!("queue `{queue}`"),
                    format!("{messages} that wait, {consumers}"),
                ));
                self.there.insert(queue.clone());
            }
            Ok(Ok(None)) => self.found(Finding::note(
                format!("queue `{queue}`"),
                "does not exist yet; a daemon declares it",
            )),
            Ok(Err(e)) => self.silent(&queue, &e.to_string()),
            Err(_) => self.silent(&queue, "no answer"),
        }
        if queue != own || !self.there.contains(&queue) {
            return;
        }
        match broker.compare(&queue, topology.intake_arguments()).await {
            Ok(()) => self.found(Finding::ok(
                format!("queue `{queue}`"),
                "has the arguments that hooktrail gives it",
            )),
            Err(refused) => self.differs(&queue, refused),
        }
        self.found(Finding::note(
            format!("queue `{queue}`"),
            "is for one daemon at a time: another with this prefix waits, and takes from it when that one ends",
        )
        .risking("what the first one has in its own files and has not delivered waits there until it runs again"));
    }

    /// Inspects whether an intake queue is left of a configuration with the embedded queue.
    pub(super) async fn left_intake(&mut self, broker: &mut Broker<'_>) {
        let queue = self.topology.intake_queue();
        // One that does not answer is not needed.
        let Ok(Some(depth)) = broker.depth(&queue).await else { return };
        let found = format!(
            "is of a configuration with [queue] intake, and holds {}",
            counted(depth.messages, "event(s)")
        );
        let finding = Finding::warning(format!("queue `{queue}`"), found)
            .risking("no daemon with this configuration delivers them, and what is published goes on coming into it");
        self.found(finding.with_remedy(
            "run with the embedded queue and [queue] intake until it is empty, and delete it: rabbitmqctl delete_queue",
        ));
    }

    fn silent(&mut self, queue: &str, why: &str) {
        self.found(
            Finding::harmful(format!("queue `{queue}`"), format!("does not answer: {why}"))
                .risking("no event comes in from there, and producers get no confirm")
                .with_remedy("rabbitmqctl cluster_status; rabbitmqctl list_queues name type state"),
        );
    }
}

//! An inspection of the broker for what can lose or hold up events: what AMQP shows by itself, and
//! the rest through the management API. Changes nothing: what has to be tried is tried on names
//! that no queue has.

mod broker;
mod inspection;
mod intake;
mod judge;
mod management;

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use lapin::uri::AMQPUri;
use tokio::{sync::watch, time::timeout};

use self::{inspection::Inspection, judge::in_the_clear};
use super::{
    connection::{Dialer, Role},
    management::{Management, Row},
    pool::Pool,
    requests::Broker,
    shared::Shared,
    topology::{QueueRole, Topology},
};
use crate::{
    clock,
    config::{AmqpConfig, Subscriber},
    delivery::SubscriberName,
    queue::QueueError,
    telemetry::{
        finding::{Finding, summarized},
        metrics::Metrics,
    },
};

/// Timeout of the inspection of a broker before the embedded queue.
const INTAKE_TIMEOUT: Duration = Duration::from_secs(60);

/// # Errors
/// The broker cannot be reached.
pub(super) async fn inspect(
    shared: &Shared,
    subscribers: &[Arc<Subscriber>],
) -> Result<Vec<Finding>, QueueError> {
    let topology = &shared.topology;
    // It was parsed before, or there would be no connection.
    let uri: AMQPUri = topology
        .url()
        .expose()
        .as_str()
        .parse()
        .map_err(|_| QueueError::new("[queue] url is not a valid AMQP URL"))?;
    let mut inspection = Inspection::new(topology, subscribers, uri);
    inspection.broker().await?;
    inspection.findings.extend(in_the_clear(topology.url()));
    inspection.permissions(&mut shared.broker()).await;
    inspection.queues(&mut shared.broker()).await;
    inspection.left_intake(&mut shared.broker()).await;
    inspection.idle(shared).await;
    inspection.start(shared).await;
    let seen = inspection.management().await;
    if seen.is_none()
        && let Err(e) = inspection.not_configured_any_more(shared).await
    {
        inspection.found(Finding::unseen(
            "queues of subscribers that are not configured any more",
            e,
            "hooktrail prune lists them",
        ));
    }
    if let Err(e) = inspection.stores(shared).await {
        let about = "which stores have history and subscribers made over the API";
        inspection.found(Finding::unseen(about, e, "run it again"));
    }
    inspection.at_least_once(seen.as_ref()).await;
    inspection.hold();
    Ok(summarized(inspection.findings))
}

/// Inspects a broker that events come through into the embedded queue.
pub async fn inspect_intake(config: &AmqpConfig) -> Vec<Finding> {
    let topology = Topology::new(config.clone());
    let Ok(uri) = topology.url().expose().as_str().parse() else {
        return vec![Finding::harmful("[queue] intake", "is not a valid AMQP URL")];
    };
    let mut inspection = Inspection::new(&topology, &[], uri);
    let inspected = async {
        inspection.greeting().await?;
        let dialer = Dialer::new(config.url.clone(), Metrics::new(clock::now()));
        let pool = Pool::new(dialer, Role::Intake, &watch::Sender::default());
        let mut broker = Broker::new(&pool);
        inspection.intake(&mut broker, &topology).await;
        drop(broker);
        pool.close().await;
        inspection.management().await;
        Ok(())
    };
    if let Err(e) = timeout(INTAKE_TIMEOUT, inspected).await.unwrap_or_else(|_| Err(slow())) {
        let finding = QueueError::to_finding(&e);
        inspection.found(
            Finding { about: vec!["[queue] intake".to_owned()], ..finding }.risking(
                "no event comes in from there; what is in the embedded queue is delivered",
            ),
        );
    }
    summarized(inspection.findings)
}

fn slow() -> QueueError {
    QueueError::new(format!(
        "the broker did not answer all questions within {} s",
        INTAKE_TIMEOUT.as_secs()
    ))
}

/// Subscribers that have queues under the prefix, as far as the management API shows.
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
    let name = |row: &Row| match topology.role(&row.name) {
        Some(QueueRole::Main(s) | QueueRole::Retry(s) | QueueRole::Dead(s)) => {
            SubscriberName::try_new(s).ok()
        }
        _ => None,
    };
    rows.iter().filter_map(name).collect()
}

//! An inspection of the broker for what can lose or hold up events: what AMQP shows by itself, and
//! the rest through the management API. Changes nothing: what has to be tried is tried on names
//! that no queue has.

mod broker;
mod inspection;
mod judge;
mod management;

use std::{collections::BTreeSet, sync::Arc};

use lapin::uri::AMQPUri;

use self::{inspection::Inspection, judge::in_the_clear};
use super::{
    management::{Management, Row},
    shared::Shared,
    topology::{QueueRole, Topology},
};
use crate::{
    config::Subscriber,
    delivery::SubscriberName,
    queue::QueueError,
    telemetry::finding::{Finding, summarized},
};

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
    let mut inspection = Inspection {
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
    inspection.broker().await?;
    inspection.findings.extend(in_the_clear(topology.url()));
    inspection.permissions(&mut shared.broker()).await;
    inspection.queues(&mut shared.broker()).await;
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

//! `run`: the daemon.

use tokio::signal::unix::{SignalKind, signal};

use super::{Failed, log};
use crate::{config::Config, queue::amqp::AmqpQueue, supervisor};

pub(super) async fn run(config: Config) -> Result<(), Failed> {
    log(config.log);
    if config.subscribers.is_empty() {
        tracing::warn!(config = %config.path.display(), "no [[subscriber]] is configured: nothing will be delivered");
    }
    let queue = AmqpQueue::new(config.queue.clone());
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let shutdown = async move {
        tokio::select! {
            _ = term.recv() => {}
            _ = int.recv() => {}
        }
    };
    tracing::info!(version = env!("CARGO_PKG_VERSION"), config = %config.path.display(), broker = %config.queue.url, "starting");
    supervisor::run(queue, &config.subscribers, shutdown, config.shutdown_timeout).await?;
    Ok(())
}

//! `run`: the daemon.

use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
};

use super::{Failed, log};
use crate::{
    admin::Admin,
    config::{Backend, Config},
    queue::{Queue, amqp::AmqpQueue, embedded::EmbeddedQueue},
    supervisor::{self, Phase},
    systemd,
};

pub(super) async fn run(config: Config, force: bool) -> Result<(), Failed> {
    log(config.log);
    if config.subscribers.is_empty() {
        tracing::warn!(config = %config.path.display(), "no [[subscriber]] is configured: nothing will be delivered");
    }
    match &config.queue.backend {
        Backend::Embedded => {
            let data_dir = config.queue.embedded.data_dir.display();
            tracing::info!(version = env!("CARGO_PKG_VERSION"), config = %config.path.display(), %data_dir, "starting");
            deliver(EmbeddedQueue::for_daemon(&config.queue.embedded)?, &config).await
        }
        Backend::Amqp(amqp) => {
            if !force && EmbeddedQueue::holds_undelivered(&config.queue.embedded).await? {
                return Err(Failed::Usage(format!(
                    "the embedded queue in `{}` holds events that are not delivered; run with [queue] url = \"embedded\" until they are, \
                     or with --force, which leaves them there",
                    config.queue.embedded.data_dir.display()
                )));
            }
            tracing::info!(version = env!("CARGO_PKG_VERSION"), config = %config.path.display(), broker = %amqp.url, "starting");
            deliver(AmqpQueue::new(amqp.clone()), &config).await
        }
    }
}

async fn deliver(queue: impl Queue, config: &Config) -> Result<(), Failed> {
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let shutdown = async move {
        tokio::select! {
            _ = term.recv() => {}
            _ = int.recv() => {}
        }
    };
    let admin = Admin::bind(&config.admin).await.map_err(Failed::Runtime)?;
    let (phase, phases) = watch::channel(Phase::Starting);
    let told = tokio::spawn(systemd::follow(phases.clone()));
    let serving = admin.serve(queue.clone(), &config.subscribers, phases);
    let beside = serving.done_with_the_queue();
    supervisor::run(queue, &config.subscribers, shutdown, config.shutdown_timeout, &phase, beside).await?;
    serving.close().await;
    // It ends when it has told the last phase.
    drop(phase);
    told.await.map_err(|e| Failed::Runtime(e.to_string()))
}

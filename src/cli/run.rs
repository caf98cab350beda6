//! `run`: the daemon.

use tokio::{sync::watch, task::JoinSet};

use super::{Failed, daemon, log};
use crate::{
    admin::Admin,
    clock,
    config::{Backend, Config},
    doctor,
    metrics::Metrics,
    queue::{Queue, amqp::AmqpQueue, embedded::EmbeddedQueue},
    reload::Reloader,
    signal::{self, Files, Hangups, Stops},
    status::Board,
    supervisor::{self, Controls, Phase},
    systemd,
};

pub(super) async fn run(config: Config, force: bool) -> Result<(), Failed> {
    // First of all: a signal that comes while the daemon starts must not end it in another way than later.
    let signals = (signal::stop()?, Hangups::listen()?);
    log(config.log);
    if config.subscribers.is_empty() {
        tracing::warn!(config = %config.path.display(), "no [[subscriber]] is configured: nothing will be delivered");
    }
    let metrics = Metrics::new(clock::now());
    match &config.queue.backend {
        Backend::Embedded => {
            let data_dir = config.queue.embedded.data_dir.display();
            tracing::info!(version = env!("CARGO_PKG_VERSION"), config = %config.path.display(), %data_dir, "starting");
            deliver(EmbeddedQueue::for_daemon(&config.queue.embedded)?, config, metrics, signals).await
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
            deliver(AmqpQueue::new(amqp.clone(), metrics.clone()), config, metrics, signals).await
        }
    }
}

async fn deliver(queue: impl Queue, config: Config, metrics: Metrics, (stops, hangups): (Stops, Hangups)) -> Result<(), Failed> {
    let admin = match Admin::bind(&config.admin).await {
        Ok(admin) => admin,
        Err(why) => return Err(daemon::cannot_listen(&config, &why).await),
    };
    let board = Board::new(metrics.clone());
    let subscribers = config.subscribers.clone();
    let (reloader, changes) = Reloader::new(config, metrics);
    let (phase, phases) = watch::channel(Phase::Starting);
    let told = tokio::spawn(systemd::follow(phases.clone()));
    let serving = admin.serve(queue.clone(), &reloader, &board, phases.clone());
    doctor::look_once(queue.clone(), &subscribers, phase.subscribe());
    let mut asking = JoinSet::new();
    asking.spawn(reload_when_told(reloader.clone(), hangups, phases));
    asking.spawn(reload_when_files_change(reloader.clone()));
    let controls =
        Controls { phase: &phase, changes, board, shutdown_timeout: reloader.shutdown_timeout(), hurry: Box::pin(stops.times(2)) };
    let beside = serving.done_with_the_queue();
    supervisor::run(queue, subscribers, stops.times(1), controls, beside).await?;
    tokio::select! {
        () = serving.close() => {}
        () = stops.times(2) => {}
    }
    // It ends when it has told the last phase.
    drop(phase);
    told.await.map_err(|e| Failed::Runtime(e.to_string()))
}

async fn reload_when_told(reloader: Reloader, mut hangups: Hangups, phases: watch::Receiver<Phase>) {
    let is_running = || *phases.borrow() == Phase::Running;
    loop {
        hangups.next().await;
        let running = is_running();
        if running {
            systemd::reloading();
        }
        // The log has told what came of it.
        drop(reloader.reload("SIGHUP").await);
        if running && is_running() {
            systemd::ready();
        }
    }
}

async fn reload_when_files_change(reloader: Reloader) {
    let mut files = Files::new(reloader.files());
    loop {
        files.changed().await;
        drop(reloader.reload("a file of the configuration has changed").await);
    }
}

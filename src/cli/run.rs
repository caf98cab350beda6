//! `run`: the daemon.

use std::{path::Path, sync::Arc, time::Duration};

use tokio::{sync::watch, task::JoinSet, time::timeout};

use super::{daemon, failed::Failed, keeping::History};
use crate::{
    admin::Admin,
    clock,
    config::{self, Backend, Config, StoreConfig},
    history::{newcomers::Newcomers, replay::Replays},
    queue::{
        Queue, Sharing,
        amqp::{AmqpQueue, Scribe},
        embedded::EmbeddedQueue,
    },
    store::{KeptSubscribers, Store, sqlite::SqliteStore},
    supervisor::{
        fleet::{self, Controls, Phase},
        reload::{Because, Owners, Reloader},
        signal::{self, Files, Hangups, Stops},
        startup_check, systemd,
    },
    telemetry::{
        log::{Level, Log},
        metrics::Metrics,
        resources,
        status::Board,
    },
};

/// The longest that a start waits for the store's subscribers; one that is sound needs no second.
const STORE_TIMEOUT: Duration = Duration::from_secs(10);

pub(super) async fn run(path: &Path, force: bool) -> Result<(), Failed> {
    // First of all: a signal during the start must have the same effect as later.
    let signals = (signal::stop()?, Hangups::listen()?);
    let config = config::load(path);
    let format = config.as_ref().map_or_else(|_| config::log_of(path), |config| config.log);
    let metrics = Metrics::new(clock::now());
    let (log, level) = Log::start(format, metrics.dropped_lines())?;
    let ended = match config {
        Ok(config) => start(config, level, metrics, force, signals).await,
        Err(e) => Err(Failed::Config(e)),
    };
    // Not printed: the daemon must not wait for a log without a reader.
    let ended = ended.map_err(|failed| {
        let error = match &failed {
            Failed::Usage(why) | Failed::Runtime(why) => why.clone(),
            Failed::Config(e) => {
                e.problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
            }
            Failed::Logged(_) => String::new(),
        };
        log.fatal(&error, &failed.to_string());
        Failed::Logged(failed.exit_code())
    });
    log.finish();
    ended
}

async fn start(
    config: Config,
    level: Level,
    metrics: Metrics,
    force: bool,
    signals: (Stops, Hangups),
) -> Result<(), Failed> {
    resources::raise_open_files();
    match &config.queue.backend {
        Backend::Embedded => {
            let data_dir = config.queue.embedded.data_dir.display();
            tracing::info!(version = env!("CARGO_PKG_VERSION"), config = %config.path.display(), %data_dir, "starting");
            let queue =
                EmbeddedQueue::for_daemon(&config.queue.embedded)?.measured_by(metrics.clone());
            let queue = fed(queue, &config, &metrics);
            deliver(queue.await?, config, level, metrics, signals).await
        }
        Backend::Amqp(amqp) => {
            let holds_undelivered = async || {
                let held = EmbeddedQueue::holds_undelivered(&config.queue.embedded).await;
                held.map_err(|e| {
                    Failed::Runtime(format!("{e}; it is not known whether it holds undelivered events; --force starts without that check"))
                })
            };
            if !force && holds_undelivered().await? {
                return Err(Failed::Usage(format!(
                    "the embedded queue in `{}` holds events that are not delivered; run with [queue] url = \"embedded\" until they are, \
                     or with --force, which leaves them there",
                    config.queue.embedded.data_dir.display()
                )));
            }
            tracing::info!(version = env!("CARGO_PKG_VERSION"), config = %config.path.display(), broker = %amqp.url, "starting");
            deliver(AmqpQueue::new(amqp.clone(), metrics.clone()), config, level, metrics, signals)
                .await
        }
    }
}

/// The embedded queue with what brings it events through a RabbitMQ, if that is configured.
async fn fed(
    queue: EmbeddedQueue,
    config: &Config,
    metrics: &Metrics,
) -> Result<EmbeddedQueue, Failed> {
    let Some(intake) = &config.queue.intake else { return Ok(queue) };
    let scribe =
        Scribe::new(intake.as_ref().clone(), config.queue.embedded.tenant.clone(), metrics.clone());
    scribe.may_start().await.map_err(|e| Failed::Usage(e.to_string()))?;
    tracing::info!(broker = %intake.amqp.url, "events come through a broker");
    Ok(queue.fed_by(Arc::new(scribe)))
}

async fn deliver(
    queue: impl Queue,
    config: Config,
    level: Level,
    metrics: Metrics,
    (stops, hangups): (Stops, Hangups),
) -> Result<(), Failed> {
    let admin = match Admin::bind(&config.admin).await {
        Ok(admin) => admin,
        Err(why) => return Err(daemon::cannot_listen(&config, &why).await),
    };
    let history = History::start(&config, &metrics);
    let board = Board::observed(metrics.clone(), history.observers.clone());
    let kept = kept_by(&history.store).await;
    let (reloader, changes) =
        Reloader::new(config, kept, board.clone(), queue.removals().clone(), level);
    let subscribers = reloader.config().subscribers.clone();
    if subscribers.is_empty() {
        tracing::warn!(config = %reloader.config().path.display(), "no [[subscriber]] is configured: nothing will be delivered");
    }
    if !reloader.config().metrics_per_subscriber() {
        tracing::info!(
            subscribers = subscribers.len(),
            "the metrics of all subscribers are counted together, as subscriber=\"*\": see [metrics] per_subscriber"
        );
        metrics.sum_subscribers();
    }
    let (phase, phases) = watch::channel(Phase::Starting);
    let notifying = tokio::spawn(systemd::follow(phases.clone()));
    let replays = Replays::default();
    let (newcomers, announced) = Newcomers::new();
    let serving = admin.serve(
        queue.clone(),
        history.store.clone(),
        replays.clone(),
        &reloader,
        &board,
        phases.clone(),
    );
    startup_check::inspect_once(queue.clone(), &subscribers, phase.subscribe());
    let store = history.store.clone();
    let _following = following(&reloader, &store, &queue, hangups, phases);
    let controls = Controls {
        phase: &phase,
        changes,
        board,
        shutdown_timeout: reloader.shutdown_timeout(),
        newcomers,
        hurry: Box::pin(stops.times(2)),
    };
    let mut keeper = history.keep(&queue, &reloader, replays, announced);
    let limit = reloader.shutdown_timeout();
    let queue_unused = async {
        let drains = serving.done_with_the_queue();
        match &mut keeper {
            Some(keeper) => keeper.done_with_the_queue(drains, &limit).await,
            None => drains.await,
        }
    };
    let ended = fleet::run(queue, subscribers, stops.times(1), controls, queue_unused).await;
    match keeper {
        Some(keeper) => keeper.close(*limit.borrow(), stops.times(2)).await,
        None => store.close(true).await,
    }
    ended?;
    tokio::select! {
        () = serving.close() => {}
        () = stops.times(2) => {}
    }
    // The task ends after it has reported the last phase.
    drop(phase);
    notifying.await.map_err(|e| Failed::Runtime(e.to_string()))
}

/// The subscribers that the store has. The others do not wait for one that hangs: it then counts as
/// one that may have more, whom the queue leaves bound.
async fn kept_by(store: &impl Store) -> KeptSubscribers {
    timeout(STORE_TIMEOUT, store.subscribers()).await.unwrap_or_else(|_| {
        let problem = format!(
            "the store does not answer within {} s: subscribers made over the API get nothing until it does; send SIGHUP then",
            STORE_TIMEOUT.as_secs()
        );
        KeptSubscribers { may_lack: true, problems: vec![problem], ..KeptSubscribers::default() }
    })
}

/// The tasks that give the reloader what changes around it.
fn following(
    reloader: &Reloader,
    store: &SqliteStore,
    queue: &impl Queue,
    hangups: Hangups,
    phases: watch::Receiver<Phase>,
) -> JoinSet<()> {
    let mut tasks = JoinSet::new();
    tasks.spawn(reload_on_hangup(reloader.clone(), store.clone(), hangups, phases));
    tasks.spawn(reload_when_files_change(reloader.clone()));
    let (following, read) = (reloader.clone(), store.clone());
    tasks.spawn(async move { following.follow_store(&read).await });
    let owners = Owners {
        history: queue.history_store(),
        subscribers: queue.subscribers_store(),
        manages: reloader.config().admin.manage,
        has_store: reloader.config().store != StoreConfig::None,
    };
    // Before the queue finds out whom to unbind.
    if owners.subscribers.borrow().is_none() {
        queue.removals().share(Sharing::Unknown);
    }
    let (following, queue, of) = (reloader.clone(), queue.clone(), store.clone());
    tasks.spawn(async move { following.follow_owner(owners, &queue, &of).await });
    tasks
}

async fn reload_on_hangup(
    reloader: Reloader,
    store: impl Store,
    mut hangups: Hangups,
    phases: watch::Receiver<Phase>,
) {
    let is_running = || *phases.borrow() == Phase::Running;
    loop {
        hangups.next().await;
        let running = is_running();
        if running {
            systemd::reloading();
        }
        reloader.read_store(&store).await;
        // The reload has logged its result.
        drop(reloader.reload(Because::Operator("SIGHUP")).await);
        if running && is_running() {
            systemd::ready();
        }
    }
}

async fn reload_when_files_change(reloader: Reloader) {
    let mut files = Files::new(reloader.files());
    loop {
        files.changed().await;
        drop(reloader.reload(Because::Files("a file of the configuration has changed")).await);
    }
}

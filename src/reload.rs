//! Reads the configuration again and hands it to the supervisor; whatever asks for it goes through here.

use std::{collections::BTreeSet, fmt, path::PathBuf, sync::Arc, time::Duration};

use tokio::sync::{Mutex, mpsc, oneshot, watch};

use crate::{
    clock,
    config::{self, Config, ConfigError, Subscribers, changes::Changes},
    metrics::Metrics,
    queue::QueueError,
    supervisor::Change,
    wording::{agreed, counted},
};

/// What is configured, and how that is changed. Clones are the same.
#[derive(Debug, Clone)]
pub struct Reloader(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    current: watch::Sender<Arc<Config>>,
    subscribers: watch::Sender<Subscribers>,
    shutdown_timeout: watch::Sender<Duration>,
    /// What the configuration in use, and the last one that was wrong, are made of.
    files: watch::Sender<Vec<PathBuf>>,
    /// What was wrong with the configuration when it was last read, unless it was right.
    problem: watch::Sender<Option<String>>,
    changes: mpsc::Sender<Change>,
    metrics: Metrics,
    /// One after the other.
    reloading: Mutex<()>,
}

/// What a reload has changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reloaded {
    pub changes: Changes,
    /// Subscribers whose queue could not be bound: that is tried again without end, and events of an exchange pass it by until then.
    pub not_bound: BTreeSet<String>,
}

/// Why the configuration was not changed.
#[derive(Debug)]
pub enum Unchanged {
    /// It is wrong, or what it wants cannot be had without a restart.
    Wrong(String),
    /// The daemon does not take changes now.
    Stopping,
}

impl fmt::Display for Unchanged {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Wrong(why) => f.write_str(why),
            Self::Stopping => f.write_str("hooktrail is starting or stopping; try again"),
        }
    }
}

impl From<ConfigError> for Unchanged {
    fn from(e: ConfigError) -> Self {
        let problems: Vec<String> = e.problems.iter().map(ToString::to_string).collect();
        let count = counted(problems.len(), "problem(s)");
        Self::Wrong(format!("{}\n{count} in the configuration; the one before it stays in use", problems.join("\n")))
    }
}

impl From<QueueError> for Unchanged {
    fn from(e: QueueError) -> Self {
        Self::Wrong(format!("{e}; the configuration before it stays in use"))
    }
}

impl Reloader {
    /// With the configuration that the daemon starts with; the supervisor takes what comes out of the receiver.
    pub fn new(config: Config, metrics: Metrics) -> (Self, mpsc::Receiver<Change>) {
        let (changes, receiver) = mpsc::channel(1);
        metrics.configured(config.subscribers.len(), clock::now());
        let inner = Inner {
            subscribers: watch::Sender::new(config.subscribers.clone()),
            shutdown_timeout: watch::Sender::new(config.shutdown_timeout),
            files: watch::Sender::new(config.files.clone()),
            current: watch::Sender::new(Arc::new(config)),
            problem: watch::Sender::new(None),
            changes,
            metrics,
            reloading: Mutex::default(),
        };
        (Self(Arc::new(inner)), receiver)
    }

    pub fn config(&self) -> Arc<Config> {
        self.0.current.borrow().clone()
    }

    pub fn subscribers(&self) -> watch::Receiver<Subscribers> {
        self.0.subscribers.subscribe()
    }

    pub fn shutdown_timeout(&self) -> watch::Receiver<Duration> {
        self.0.shutdown_timeout.subscribe()
    }

    pub fn files(&self) -> watch::Receiver<Vec<PathBuf>> {
        self.0.files.subscribe()
    }

    /// What was wrong when the configuration was last read.
    pub fn problem(&self) -> Option<String> {
        self.0.problem.borrow().clone()
    }

    /// What a reload would change now.
    ///
    /// # Errors
    /// It would change nothing, and why.
    pub async fn preview(&self) -> Result<Changes, Unchanged> {
        let read = self.read().await;
        self.compare(&read?)
    }

    /// Reads the configuration and puts it into use; `because` is for the log.
    ///
    /// # Errors
    /// Nothing was changed, and why; [`problem`](Self::problem) tells it until it is mended.
    pub async fn reload(&self, because: &str) -> Result<Reloaded, Unchanged> {
        let _one = self.0.reloading.lock().await;
        let reloaded = self.try_reload().await;
        match &reloaded {
            Ok(Reloaded { changes, not_bound }) => {
                self.0.problem.send_replace(None);
                self.0.metrics.reloaded(true);
                self.0.metrics.configured(self.config().subscribers.len(), clock::now());
                tell(changes, not_bound, because);
            }
            Err(Unchanged::Wrong(why)) => {
                self.0.problem.send_replace(Some(why.clone()));
                self.0.metrics.reloaded(false);
                let problems = why.lines().collect::<Vec<_>>().join("; ");
                tracing::error!(because, problems, "the configuration was not reloaded");
            }
            Err(Unchanged::Stopping) => {}
        }
        reloaded
    }

    async fn try_reload(&self) -> Result<Reloaded, Unchanged> {
        let new = match self.read().await {
            Ok(new) => new,
            Err(e) => {
                // So that it is noticed when one of these is mended.
                self.watch_files(e.files.clone());
                return Err(e.into());
            }
        };
        let changes = match self.compare(&new) {
            Ok(changes) => changes,
            Err(refused) => {
                self.watch_files(new.files);
                return Err(refused);
            }
        };
        let (done, answer) = oneshot::channel();
        let change = Change { subscribers: new.subscribers.clone(), done };
        self.0.changes.send(change).await.map_err(|_| Unchanged::Stopping)?;
        let not_bound = answer.await.map_err(|_| Unchanged::Stopping)??;
        let old = self.config();
        // What is not used before a restart stays as it is, so that it is told each time.
        let new = Config { queue: old.queue.clone(), admin: old.admin.clone(), log: old.log, ..new };
        self.0.files.send_replace(new.files.clone());
        self.0.shutdown_timeout.send_replace(new.shutdown_timeout);
        self.0.subscribers.send_replace(new.subscribers.clone());
        self.0.current.send_replace(Arc::new(new));
        Ok(Reloaded { changes, not_bound })
    }

    async fn read(&self) -> Result<Config, ConfigError> {
        let path = self.config().path.clone();
        let reading = tokio::task::spawn_blocking(move || config::load(&path)).await;
        // A panic while reading is one of the caller.
        reading.unwrap_or_else(|e| std::panic::resume_unwind(e.into_panic()))
    }

    fn compare(&self, new: &Config) -> Result<Changes, Unchanged> {
        let changed = self.config().changes_to(new);
        changed.map_err(|keys| {
            Unchanged::Wrong(format!(
                "{}: the {} changed, which needs a restart: events wait in the queues of before; nothing of the new configuration is in use",
                keys.join(", "),
                agreed(&keys.len(), "key(s) (has|have)")
            ))
        })
    }

    fn watch_files(&self, mut also: Vec<PathBuf>) {
        also.extend(self.config().files.iter().cloned());
        also.sort_unstable();
        also.dedup();
        self.0.files.send_replace(also);
    }
}

fn tell(changes: &Changes, not_bound: &BTreeSet<String>, because: &str) {
    if changes.changes.is_empty() {
        tracing::info!(because, "the configuration was read again; it means the same");
    }
    for c in &changes.changes {
        tracing::info!(because, subscriber = c.subscriber, change = c.change.name(), keys = c.keys.join(", "), "reloaded");
    }
    for subscriber in not_bound {
        tracing::error!(
            because,
            subscriber,
            "not bound yet, which is tried again without end: until then events of an exchange pass it by, and a relay waits"
        );
    }
    if !changes.needs_restart.is_empty() {
        tracing::warn!(keys = changes.needs_restart.join(", "), "these keys have changed and are used after a restart");
    }
}

//! Reads the configuration again and passes it to the fleet, for every request of a reload.

use std::{collections::BTreeSet, fmt, path::PathBuf, sync::Arc, time::Duration};

use tokio::sync::{Mutex, mpsc, oneshot, watch};

use crate::{
    clock,
    config::{
        self, Config, ConfigError, LogConfig, Subscribers,
        changes::{Changes, Kind, is_drastic},
    },
    delivery::SubscriberName,
    queue::{QueueError, Removals, some_of},
    supervisor::fleet::Change,
    telemetry::{log, metrics::Metrics},
    wording::{agreed, counted},
};

/// The subscribers of each kind of change that the line about a reload names.
const SHOWN: usize = 10;

/// The configuration in use, and its changes. Clones are the same.
#[derive(Debug, Clone)]
pub struct Reloader(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    current: watch::Sender<Arc<Config>>,
    subscribers: watch::Sender<Subscribers>,
    shutdown_timeout: watch::Sender<Duration>,
    /// The files of the configuration in use, and of the last one that was wrong.
    files: watch::Sender<Vec<PathBuf>>,
    /// The mistakes of the configuration when it was last read, or the queue's refusal of it; `None`
    /// without either.
    problem: watch::Sender<Option<String>>,
    /// The removals that wait for an operator.
    held: watch::Sender<Option<Held>>,
    removals: Removals,
    level: log::Level,
    changes: mpsc::Sender<Change>,
    metrics: Metrics,
    /// Held during a reload: there is one at a time.
    reloading: Mutex<()>,
}

/// The cause of a reload; the text is for the log.
#[derive(Debug, Clone, Copy)]
pub enum Because {
    /// A file has changed, possibly the first of many.
    Files(&'static str),
    /// An operator requests it.
    Operator(&'static str),
}

impl Because {
    const fn text(self) -> &'static str {
        match self {
            Self::Files(text) | Self::Operator(text) => text,
        }
    }
}

/// Removals that wait for an operator.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Held {
    /// The subscribers to remove.
    pub subscribers: BTreeSet<SubscriberName>,
    /// The reason, with the remedy.
    pub why: String,
}

/// The changes of a reload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reloaded {
    pub changes: Changes,
    /// Subscribers whose queue could not be bound. That is retried indefinitely; until then it gets no
    /// events of an exchange.
    pub not_bound: BTreeSet<SubscriberName>,
}

/// Why the configuration was not changed.
#[derive(Debug)]
pub enum Unchanged {
    /// It is wrong or needs a restart, or the queue (such as the broker) refused it.
    Wrong(String),
    /// It would remove so many subscribers that an operator has to request it.
    Held(Held),
    /// The daemon takes no changes now.
    Stopping,
}

impl fmt::Display for Unchanged {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Wrong(why) | Self::Held(Held { why, .. }) => f.write_str(why),
            Self::Stopping => f.write_str("hooktrail is starting or stopping; try again"),
        }
    }
}

impl From<ConfigError> for Unchanged {
    fn from(e: ConfigError) -> Self {
        let problems: Vec<String> = e.problems.iter().map(ToString::to_string).collect();
        let count = counted(problems.len(), "problem(s)");
        Self::Wrong(format!(
            "{}\n{count} in the configuration; the one before it stays in use",
            problems.join("\n")
        ))
    }
}

impl From<QueueError> for Unchanged {
    fn from(e: QueueError) -> Self {
        Self::Wrong(format!("{e}; the configuration before it stays in use"))
    }
}

impl Reloader {
    /// Begins with the configuration that the daemon starts with. The fleet takes the changes from the
    /// receiver.
    pub fn new(
        config: Config,
        metrics: Metrics,
        removals: Removals,
        level: log::Level,
    ) -> (Self, mpsc::Receiver<Change>) {
        let (changes, receiver) = mpsc::channel(1);
        metrics.configured(config.subscribers.len(), clock::now());
        let inner = Inner {
            subscribers: watch::Sender::new(config.subscribers.clone()),
            shutdown_timeout: watch::Sender::new(config.shutdown_timeout),
            files: watch::Sender::new(config.files.clone()),
            current: watch::Sender::new(Arc::new(config)),
            problem: watch::Sender::new(None),
            held: watch::Sender::new(None),
            removals,
            level,
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

    /// The mistakes of the configuration when it was last read, or the queue's refusal of it.
    pub fn problem(&self) -> Option<String> {
        self.0.problem.borrow().clone()
    }

    /// The removals that a reload or the start held, because no operator has requested so many.
    pub fn held(&self) -> Option<Held> {
        let by_reload = self.0.held.borrow().clone();
        by_reload.or_else(|| {
            self.0
                .removals
                .held()
                .map(|held| Held { why: held.to_string(), subscribers: held.missing })
        })
    }

    /// What a reload would change now, and whether a changed file alone would not be enough.
    ///
    /// # Errors
    /// The reload would be refused, and why.
    pub async fn preview(&self) -> Result<(Changes, bool), Unchanged> {
        let new = self.read().await?;
        let changes = self.compare(&new)?;
        Ok((changes, self.is_drastic(&new).is_some()))
    }

    /// Reads the configuration and puts it into use.
    ///
    /// # Errors
    /// Nothing was changed, and why. [`problem`](Self::problem) or [`held`](Self::held) has the reason
    /// until a reload succeeds.
    pub async fn reload(&self, because: Because) -> Result<Reloaded, Unchanged> {
        let _one = self.0.reloading.lock().await;
        let reloaded = self.try_reload(because).await;
        let because = because.text();
        match &reloaded {
            Ok(Reloaded { changes, not_bound }) => {
                self.0.problem.send_replace(None);
                self.0.held.send_replace(None);
                self.0.metrics.reloaded(true);
                self.0.metrics.configured(self.config().subscribers.len(), clock::now());
                log_changes(changes, not_bound, because);
            }
            Err(Unchanged::Wrong(why)) => {
                self.0.problem.send_replace(Some(why.clone()));
                self.0.metrics.reloaded(false);
                let problems = why.lines().collect::<Vec<_>>().join("; ");
                tracing::error!(because, problems, "the configuration was not reloaded");
            }
            Err(Unchanged::Held(held)) => {
                self.0.problem.send_replace(None);
                self.0.metrics.reloaded(false);
                if self.0.held.send_replace(Some(held.clone())).as_ref() != Some(held) {
                    tracing::error!(because, subscribers = ?held.subscribers, "the configuration was not reloaded: {}", held.why);
                }
            }
            Err(Unchanged::Stopping) => {}
        }
        reloaded
    }

    async fn try_reload(&self, because: Because) -> Result<Reloaded, Unchanged> {
        let new = match self.read().await {
            Ok(new) => new,
            Err(e) => {
                // A fix of one of them has to be noticed.
                self.watch_files(e.files.clone());
                return Err(e.into());
            }
        };
        let by_operator = matches!(because, Because::Operator(_));
        let held = self.is_drastic(&new).filter(|_| !by_operator).map(Unchanged::Held);
        let changes = match self.compare(&new).and_then(|changes| held.map_or(Ok(changes), Err)) {
            Ok(changes) => changes,
            Err(refused) => {
                self.watch_files(new.files);
                return Err(refused);
            }
        };
        let changing = self.0.removals.configure(new.names(), by_operator);
        let not_bound = match self.change(new.subscribers.clone()).await {
            Ok(not_bound) => not_bound,
            Err(failed) => {
                changing.undo();
                return Err(failed);
            }
        };
        self.0.level.set(new.log.level);
        let old = self.config();
        // Settings that need a restart stay as they are, so that each reload reports them.
        let log = LogConfig { level: new.log.level, ..old.log };
        let new = Config { queue: old.queue.clone(), admin: old.admin.clone(), log, ..new };
        self.0.files.send_replace(new.files.clone());
        self.0.shutdown_timeout.send_replace(new.shutdown_timeout);
        self.0.subscribers.send_replace(new.subscribers.clone());
        drop(changing); // Until here both configurations' patterns count as bound.
        self.0.current.send_replace(Arc::new(new));
        Ok(Reloaded { changes, not_bound })
    }

    /// Passes the subscribers to the fleet; returns those that are not bound yet.
    async fn change(
        &self,
        subscribers: Subscribers,
    ) -> Result<BTreeSet<SubscriberName>, Unchanged> {
        let (done, answer) = oneshot::channel();
        self.0.changes.send(Change { subscribers, done }).await.map_err(|_| Unchanged::Stopping)?;
        Ok(answer.await.map_err(|_| Unchanged::Stopping)??)
    }

    async fn read(&self) -> Result<Config, ConfigError> {
        let current = self.config();
        let reading = tokio::task::spawn_blocking(move || {
            config::load_again(&current.path, &current.folders)
        })
        .await;
        // A panic of the reader is one of the caller.
        reading.unwrap_or_else(|e| std::panic::resume_unwind(e.into_panic()))
    }

    /// The removals, if they are so many that files may be missing.
    fn is_drastic(&self, new: &Config) -> Option<Held> {
        let (before, after) = (self.config().names(), new.names());
        let subscribers = &before - &after;
        is_drastic(&before, &after).then(|| Held {
            why: format!(
                "{} of the {} current subscribers {} missing from it ({}). A changed file alone does not remove so many: if it is meant, run \
                 `hooktrail reload`, or send SIGHUP or POST /api/v1/reload; until then the configuration before it stays in use",
                subscribers.len(),
                before.len(),
                agreed(&subscribers.len(), "(is|are)"),
                some_of(&subscribers)
            ),
            subscribers,
        })
    }

    fn compare(&self, new: &Config) -> Result<Changes, Unchanged> {
        let changed = self.config().changes_to(new);
        changed.map_err(|keys| {
            Unchanged::Wrong(format!(
                "{}: the {} changed, which needs a restart: events are waiting in the queues of the previous configuration; nothing of the new one is in use",
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

/// Logs a reload: one line, whatever the number of subscribers.
fn log_changes(changes: &Changes, not_bound: &BTreeSet<SubscriberName>, because: &str) {
    let Changes { changes, settings, needs_restart } = changes;
    if changes.is_empty() && settings.is_empty() {
        tracing::info!(because, "the configuration was read again; it means the same");
    } else {
        let of = |kind: Kind| {
            let all: Vec<_> = changes.iter().filter(|c| c.change == kind).collect();
            let keys = |keys: &[&str]| {
                if keys.is_empty() { String::new() } else { format!(" ({})", keys.join(", ")) }
            };
            let mut text: Vec<String> = all
                .iter()
                .take(SHOWN)
                .map(|c| format!("{}{}", c.subscriber, keys(&c.keys)))
                .collect();
            text.extend((all.len() > SHOWN).then(|| format!("{} more", all.len() - SHOWN)));
            (!text.is_empty()).then(|| text.join(", "))
        };
        let settings = (!settings.is_empty()).then(|| settings.join(", "));
        let (added, changed, removed) = (of(Kind::Added), of(Kind::Changed), of(Kind::Removed));
        tracing::info!(because, added, changed, removed, settings, "reloaded");
    }
    for c in changes {
        tracing::debug!(
            because,
            subscriber = c.subscriber.as_str(),
            change = c.change.name(),
            keys = c.keys.join(", "),
            "reloaded a subscriber"
        );
    }
    for subscriber in not_bound {
        tracing::error!(
            because,
            subscriber = subscriber.as_str(),
            "not bound yet, which is retried indefinitely: until then it gets no events of an exchange, and a relay waits"
        );
    }
    if !needs_restart.is_empty() {
        tracing::warn!(
            keys = needs_restart.join(", "),
            "these keys have changed and are used after a restart"
        );
    }
}

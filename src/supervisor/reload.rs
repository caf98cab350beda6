//! Reads the configuration again and passes it to the fleet, for every request of a reload.

mod managing;

pub use self::managing::{ELSEWHERE, Editing, NotStored, Owners, Stored, UNKNOWN, store_id};
use std::{collections::BTreeSet, fmt, path::PathBuf, sync::Arc, time::Duration};

use tokio::sync::{Mutex, mpsc, oneshot, watch};

use crate::{
    clock,
    config::{
        self, AdminConfig, Config, ConfigError, LogConfig, Subscribers,
        changes::{Changes, Kind, is_drastic},
    },
    delivery::SubscriberName,
    queue::{QueueError, Removals, some_of},
    store::KeptSubscribers,
    supervisor::{
        fleet::Change,
        managed::{Entry, Managed},
    },
    telemetry::{log, metrics::Metrics, status::Board},
    wording::{agreed, counted},
};

/// The subscribers of each kind of change that the line about a reload names.
const SHOWN: usize = 10;

/// The configuration in use, and its changes. Clones are the same.
#[derive(Debug, Clone)]
pub struct Reloader(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    /// With all subscribers: those of files, and those that were made over the API.
    current: watch::Sender<Arc<Config>>,
    /// With the subscribers of files alone.
    of_files: watch::Sender<Arc<Config>>,
    managed: watch::Sender<Arc<Managed>>,
    /// `managed` was not taken by the fleet, so that `current` lacks it.
    is_behind: watch::Sender<bool>,
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
    board: Board,
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
    /// Begins with the configuration that the daemon starts with, and with the subscribers that were
    /// made over the API. The fleet takes the changes from the receiver.
    pub fn new(
        of_files: Config,
        kept: KeptSubscribers,
        board: Board,
        removals: Removals,
        level: log::Level,
    ) -> (Self, mpsc::Receiver<Change>) {
        let (changes, receiver) = mpsc::channel(1);
        let managed = Managed::new(kept, &of_files, clock::now());
        let config = managed.compose(&of_files);
        managed.protect(&removals);
        log_managed(&managed, &of_files, &Managed::default());
        board.metrics().configured(config.subscribers.len(), clock::now());
        let inner = Inner {
            subscribers: watch::Sender::new(config.subscribers.clone()),
            shutdown_timeout: watch::Sender::new(config.shutdown_timeout),
            files: watch::Sender::new(config.files.clone()),
            current: watch::Sender::new(Arc::new(config)),
            of_files: watch::Sender::new(Arc::new(of_files)),
            managed: watch::Sender::new(Arc::new(managed)),
            is_behind: watch::Sender::new(false),
            problem: watch::Sender::new(None),
            held: watch::Sender::new(None),
            removals,
            level,
            changes,
            board,
            reloading: Mutex::default(),
        };
        (Self(Arc::new(inner)), receiver)
    }

    fn metrics(&self) -> &Metrics {
        self.0.board.metrics()
    }

    fn log_changes(&self, changes: &Changes, not_bound: &BTreeSet<SubscriberName>, because: &str) {
        log_changes(changes, not_bound, because, |subscriber| {
            self.0.board.batches_waiting(subscriber, clock::instant(), clock::now())
        });
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
        let files = self.read().await?;
        let managed = self.managed().checked_again(&files, clock::now());
        let changes = self.compare(&managed.compose(&files))?;
        Ok((changes, self.is_drastic(&files).is_some()))
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
                self.metrics().reloaded(true);
                self.metrics().configured(self.config().subscribers.len(), clock::now());
                self.log_changes(changes, not_bound, because);
            }
            Err(Unchanged::Wrong(why)) => {
                self.0.problem.send_replace(Some(why.clone()));
                self.metrics().reloaded(false);
                let problems = why.lines().collect::<Vec<_>>().join("; ");
                tracing::error!(because, problems, "the configuration was not reloaded");
            }
            Err(Unchanged::Held(held)) => {
                self.0.problem.send_replace(None);
                self.metrics().reloaded(false);
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
        let managed = self.managed().checked_again(&new, clock::now());
        let held = self.is_drastic(&new).filter(|_| !by_operator).map(Unchanged::Held);
        let compared = self.compare(&managed.compose(&new));
        if let Err(refused) = compared.and_then(|_| held.map_or(Ok(()), Err)) {
            self.watch_files(new.files);
            return Err(refused);
        }
        log_managed(&managed, &new, &self.managed());
        let files = new.files.clone();
        let reloaded = self.put_into_use(new, managed, by_operator).await?;
        self.0.files.send_replace(files);
        Ok(reloaded)
    }

    /// Sets whether the set that counts is not in use; returns whether that is news.
    fn is_behind(&self, now: bool) -> bool {
        self.0.is_behind.send_if_modified(|is_behind| std::mem::replace(is_behind, now) != now)
    }

    /// Puts the subscribers of files, and those that were made over the API, into use as one set.
    async fn put_into_use(
        &self,
        files: Config,
        managed: Managed,
        by_operator: bool,
    ) -> Result<Reloaded, Unchanged> {
        let new = managed.compose(&files);
        let changes = self.compare(&new)?;
        managed.protect(&self.0.removals);
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
        let AdminConfig { max_subscribers, api_subscribers, .. } = new.admin;
        let admin = AdminConfig { max_subscribers, api_subscribers, ..old.admin.clone() };
        let mut queue = old.queue.clone();
        queue.embedded.tenants_required = new.queue.embedded.tenants_required;
        let Config { store, ref store_keys, history, metrics, .. } = *old;
        let store_keys = store_keys.clone();
        let new = Config { queue, store, store_keys, history, admin, metrics, log, ..new };
        self.0.shutdown_timeout.send_replace(new.shutdown_timeout);
        self.0.subscribers.send_replace(new.subscribers.clone());
        drop(changing); // Until here both configurations' patterns count as bound.
        let files = Config { subscribers: files.subscribers, ..new.clone() };
        self.0.of_files.send_replace(Arc::new(files));
        self.0.managed.send_replace(Arc::new(managed));
        self.0.current.send_replace(Arc::new(new));
        self.is_behind(false);
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
        // Those that were made over the API are in no file, so none of them can be missing there.
        let (before, mut after) = (self.of_files().names(), new.names());
        after.extend(&before & &self.managed().names());
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
        let of_others = changed.iter().flat_map(|changes| &changes.changes);
        if let Some(change) = of_others.into_iter().find(|c| c.keys.contains(&"tenant")) {
            return Err(Unchanged::Wrong(format!(
                "subscriber `{}` has another `tenant`: a name keeps its tenant, since what waits for it is of that: give the subscriber another name, or restart \
                 the daemon if the queue has refused it; nothing of the new configuration is in use",
                change.subscriber
            )));
        }
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

/// Logs the subscribers made over the API that do not run, and why; not again what was so before.
fn log_managed(managed: &Managed, files: &Config, before: &Managed) {
    let of_files = files.names();
    for problem in managed.problems().iter().filter(|p| !before.problems().contains(p)) {
        tracing::error!(problem, "the store's subscribers");
    }
    let why = |entry: &Entry| entry.checked.as_ref().err().cloned();
    for (name, entry) in managed.iter() {
        let subscriber = name.as_str();
        let is_known = before.get(subscriber).is_some_and(|before| why(before) == why(entry));
        if of_files.contains(name) {
            tracing::warn!(
                subscriber,
                "shadowed: a file has a subscriber of this name, which wins over the one made over the API"
            );
        } else if let Err(why) = &entry.checked
            && !is_known
        {
            tracing::error!(
                subscriber,
                why,
                "a subscriber made over the API does not run; its events wait"
            );
        }
    }
}

/// Logs a reload: one line, whatever the number of subscribers. `batches`: those of a subscriber that
/// wait for an attempt.
fn log_changes(
    changes: &Changes,
    not_bound: &BTreeSet<SubscriberName>,
    because: &str,
    batches: impl Fn(&str) -> u64,
) {
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
    let is_of_values = |key: &&str| *key == "match" || key.starts_with("redact");
    for c in changes.iter().filter(|c| c.change == Kind::Changed && c.keys.iter().any(is_of_values))
    {
        tracing::info!(
            because,
            subscriber = c.subscriber.as_str(),
            batches = batches(c.subscriber.as_str()),
            "what its `match` and `redact` say now holds for what waits in its queue too; `batches` that wait for an attempt, of retries and of replays, and dead letters keep the bytes that they have"
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

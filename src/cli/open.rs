//! Opens the broker, and finds the subscriber that a command names.

use super::{
    failed::Failed,
    text::{there_are, visible},
};
use crate::{
    clock,
    config::{AmqpConfig, Backend, Config, HistoryConfig, Subscriber},
    queue::{amqp::AmqpQueue, embedded::Log},
    store::{
        EventLog, StoreError,
        sqlite::{OpenLog, SqliteConfig},
    },
    telemetry::metrics::Metrics,
};

/// Connects to the broker; an error if it cannot be reached, since a command must not wait for it
/// indefinitely.
pub(super) async fn reach(config: &AmqpConfig) -> Result<AmqpQueue, Failed> {
    let queue = AmqpQueue::new(config.clone(), Metrics::new(clock::now()));
    queue.ping().await?;
    Ok(queue)
}

pub(super) fn find<'c>(config: &'c Config, name: &str) -> Result<&'c Subscriber, Failed> {
    config.subscribers.iter().find(|s| s.name == name).map(AsRef::as_ref).ok_or_else(|| {
        let names: Vec<&str> = config.subscribers.iter().map(|s| s.name.as_str()).collect();
        let file = config.path.display();
        Failed::Usage(format!(
            "no subscriber `{}` in {file}; {}",
            visible(name),
            there_are(name, &names)
        ))
    })
}

/// What the store of a configuration needs to be opened.
pub(super) fn store_of(config: &Config) -> SqliteConfig {
    let embedded = &config.queue.embedded;
    let history = HistoryConfig { retention: config.history_retention(), ..config.history };
    let log = matches!(config.queue.backend, Backend::Embedded).then(|| -> OpenLog {
        let data_dir = embedded.data_dir.clone();
        std::sync::Arc::new(move || {
            let log = Log::open(&data_dir).map_err(|e| StoreError::new(e.to_string()))?;
            Ok(Box::new(log) as Box<dyn EventLog>)
        })
    });
    SqliteConfig {
        data_dir: embedded.data_dir.clone(),
        history,
        log,
        keys: config.store_keys.clone(),
        without_history: (!config.keeps_history())
            .then(|| "no history is kept: [history] retention is \"0s\"".to_owned()),
    }
}

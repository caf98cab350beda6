//! `store`: what hooktrail remembers, and which store has the history of a RabbitMQ.

use super::{
    failed::Failed,
    open::{reach, store_of},
    text::visible,
};
use crate::{
    config::{Backend, Config, StoreConfig},
    store::sqlite::{Resealed, recorded_id, seal_again},
    wording::counted,
};

#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    /// Give the history of this RabbitMQ prefix to this configuration's store
    ///
    /// One store has the history of a prefix: the first one, or the one that was adopted last. The
    /// daemon of the other goes on delivering, and keeps no more history. Of the subscribers made over
    /// the API those of this store count from then on. Those of the other one are not copied, and are
    /// unbound once its daemon has stopped. Without history this alone is recorded.
    Adopt,
    /// Seal the subscribers made over the API with the first of `[store] keys`
    ///
    /// The daemon must be stopped. Afterwards the other keys are needed for older backups alone.
    Rekey,
}

pub(super) async fn run(config: &Config, command: Command) -> Result<(), Failed> {
    match command {
        Command::Adopt => adopt(config).await,
        Command::Rekey => rekey(config).await,
    }
}

async fn rekey(config: &Config) -> Result<(), Failed> {
    if config.store == StoreConfig::None {
        return Err(Failed::Usage("there is no store: [store] url is \"none\"".to_owned()));
    }
    let result = seal_again(&store_of(config)).await;
    let Resealed { resealed, were, locked, problems } =
        result.map_err(|e| Failed::Runtime(visible(&e.to_string())))?;
    for problem in problems {
        println!("{}", visible(&problem));
    }
    println!(
        "{} sealed with the first key; {were} had it already.",
        counted(resealed, "subscriber(s) (is|are) now")
    );
    match locked.is_empty() {
        true => Ok(()),
        false => Err(Failed::Runtime(format!(
            "{} could not be opened, with any of the keys: {}",
            counted(locked.len(), "subscriber(s)"),
            visible(&locked.join(", "))
        ))),
    }
}

async fn adopt(config: &Config) -> Result<(), Failed> {
    let Backend::Amqp(amqp) = &config.queue.backend else {
        let why = "the embedded queue's history is in its own files: there is nothing to adopt";
        return Err(Failed::Usage(why.to_owned()));
    };
    if config.store == StoreConfig::None {
        return Err(Failed::Usage("there is no store: [store] url is \"none\"".to_owned()));
    }
    let data_dir = &config.queue.embedded.data_dir;
    let id = recorded_id(data_dir).await.map_err(|e| {
        Failed::Runtime(format!(
            "{}; a daemon of this configuration makes the store when it runs for the first time",
            visible(&e.to_string())
        ))
    })?;
    let queue = reach(amqp).await?;
    let is_own = |store: &Option<String>| store.as_ref() == Some(&id);
    let manager = queue.subscribers_store().await?;
    let (prefix, place) = (&amqp.prefix, data_dir.display());
    if config.keeps_history() {
        if is_own(&queue.history_store().await?) && (manager.is_none() || is_own(&manager)) {
            println!("This store has the history of `{prefix}` already.");
            return Ok(());
        }
        queue.adopt_history(&id).await?;
        println!("The history of `{prefix}` goes to the store in `{place}` from now on.");
    } else {
        if is_own(&manager) {
            println!("For `{prefix}` the subscribers of this store count already.");
            return Ok(());
        }
        queue.adopt_subscribers(&id).await?;
        println!(
            "For `{prefix}` the subscribers of the store in `{place}` count from now on. It keeps no history."
        );
    }
    if manager.is_some_and(|other| other != id) {
        println!(
            "Those that were made over the API for another store are not copied, and are unbound once its daemon has stopped."
        );
    }
    Ok(())
}

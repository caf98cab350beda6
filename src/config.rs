//! The configuration file: raw TOML in, checked values out, all mistakes at once.

pub mod changes;
mod document;
pub mod fitting;
mod include;
pub mod keys;
mod limits;
mod listing;
mod loader;
pub mod managed;
pub mod model;
mod optional;
mod reader;
mod schema;
mod settings;
mod spelling;
mod subscriber;
mod variables;

use std::{
    collections::BTreeMap,
    fmt,
    path::{Path, PathBuf},
};

pub(crate) use self::spelling::nearness;
pub use self::{
    document::Problem,
    listing::{global_as_toml, subscriber_as_toml, subscriber_values},
    schema::schema,
    settings::{
        AdminConfig, AmqpConfig, Backend, Config, DEFAULT, EmbeddedConfig, HistoryConfig, Intake,
        IntakeConfig, LogConfig, PublicUrl, QueueConfig, Reach, Role, StoreConfig, Token,
    },
    subscriber::{
        Auth, ClientCredentials, Compression, HttpPolicy, Origin, StartFrom, Subscriber,
        Subscribers, audience,
    },
};
use self::{document::Source, reader::Reader};
use crate::{delivery::SubscriberName, wording::counted};

/// The path of the configuration when neither `--config` nor `$HOOKTRAIL_CONFIG` names one.
pub const DEFAULT_PATH: &str = "config/hooktrail.toml";

/// Everything that is wrong with a configuration.
#[derive(Debug)]
pub struct ConfigError {
    pub problems: Vec<Problem>,
    /// The files that were read until then; see [`Config::files`].
    pub files: Vec<PathBuf>,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for p in &self.problems {
            writeln!(f, "{p}")?;
        }
        write!(
            f,
            "{} in the configuration; nothing was started",
            counted(self.problems.len(), "problem(s)")
        )
    }
}

impl std::error::Error for ConfigError {}

/// Reads and checks the configuration at `path`, its includes, and the secret files they name.
///
/// # Errors
/// All mistakes, each with file, line, column, key and what would be right.
pub fn load(path: &Path) -> Result<Config, ConfigError> {
    load_with(path, &|name| std::env::var(name).ok())
}

/// Does what [`load`] does, for a running daemon whose subscribers came from these
/// [`folders`](Config::folders).
///
/// # Errors
/// Those of [`load`]; and one of the folders is absent, which is no error at a first
/// start.
pub fn load_again(path: &Path, folders: &[PathBuf]) -> Result<Config, ConfigError> {
    let env = |name: &str| std::env::var(name).ok();
    checked(&read(path)?, Reader::after(&env, folders))
}

/// Does what [`load`] does, with the environment given.
///
/// # Errors
/// Those of [`load`].
pub fn load_with(path: &Path, env: &dyn Fn(&str) -> Option<String>) -> Result<Config, ConfigError> {
    checked(&read(path)?, Reader::new(env))
}

fn read(path: &Path) -> Result<Source, ConfigError> {
    let text = std::fs::read_to_string(path).map_err(|e| {
        let message = format!("cannot be read: {e}; {}", remedy_of(e.kind()));
        let problem = Problem { file: path.to_owned(), place: None, key: String::new(), message };
        ConfigError { problems: vec![problem], files: vec![path.to_owned()] }
    })?;
    Ok(Source::file(path.to_owned(), text))
}

/// Reads and checks `text`, whose only other files are `files`; nothing is read from the disk.
///
/// # Errors
/// Those of [`load`].
#[cfg(any(test, fuzzing))]
pub(crate) fn from_text(
    text: &str,
    env: &dyn Fn(&str) -> Option<String>,
    files: &[(&str, &str)],
) -> Result<Config, ConfigError> {
    checked(
        &Source::file("hooktrail.toml".into(), text.to_owned()),
        Reader::without_disk(env, files),
    )
}

fn checked(source: &Source, reader: Reader<'_>) -> Result<Config, ConfigError> {
    reader.depends_on(&source.path);
    let config = loader::config(&reader, source);
    let folders = reader.used();
    let (problems, files) = reader.finish();
    match config {
        Some(config) if problems.is_empty() => Ok(Config { files, folders, ..config }),
        _ => Err(ConfigError { problems, files }),
    }
}

/// The `[admin]` table of a configuration that has mistakes elsewhere: the daemon that runs with
/// the previous configuration is probably reached there.
pub fn admin_of(path: &Path) -> Option<AdminConfig> {
    let env = |name: &str| std::env::var(name).ok();
    let reader = Reader::new(&env);
    let source = read(path).ok()?;
    let document = reader.parse(&source);
    let whole = reader.is_clean();
    let root = reader.root(&source, &document, keys::ROOT);
    // In a part that cannot be parsed there may be an `[admin]`.
    if !whole && root.get("admin").is_none() {
        return None;
    }
    loader::admin(&reader, &root)
}

/// The `[log]` table of a configuration that has mistakes elsewhere; the defaults if that table is
/// wrong too.
pub fn log_of(path: &Path) -> LogConfig {
    let default = LogConfig { json: false, level: tracing::Level::INFO };
    let env = |name: &str| std::env::var(name).ok();
    let reader = Reader::new(&env);
    let Ok(source) = read(path) else { return default };
    let document = reader.parse(&source);
    loader::log(&reader, &reader.root(&source, &document, keys::ROOT)).unwrap_or(default)
}

/// The subscribers' names that can be read; missing secrets and other mistakes do not matter.
pub fn names_of(path: &Path) -> Vec<SubscriberName> {
    let env = |name: &str| std::env::var(name).ok();
    let reader = Reader::new(&env);
    let names = read(path).map(|source| loader::all_names(&reader, &source)).unwrap_or_default();
    names.into_iter().map(|(name, _)| name).collect()
}

/// The file with the subscriber's table: `path`, or one that it includes.
pub fn file_of(path: &Path, subscriber: &str) -> Option<PathBuf> {
    let env = |name: &str| std::env::var(name).ok();
    let reader = Reader::new(&env);
    let names = loader::all_names(&reader, &read(path).ok()?);
    names.into_iter().find(|(name, _)| *name == subscriber).map(|(_, file)| file)
}

/// Where each value of a subscriber that is set comes from: the name of a file with the line, or
/// `preset`. A key that is not there has its default. Empty if the files cannot be read now.
pub fn origins(path: &Path, subscriber: &str) -> BTreeMap<&'static str, String> {
    let env = |name: &str| std::env::var(name).ok();
    let reader = Reader::new(&env);
    read(path).map(|source| loader::origins(&reader, &source, subscriber)).unwrap_or_default()
}

/// The remedy for a configuration that cannot be read.
fn remedy_of(error: std::io::ErrorKind) -> &'static str {
    match error {
        std::io::ErrorKind::PermissionDenied => {
            "run this as a user who may read it, such as the service's (sudo -u hooktrail …)"
        }
        _ => {
            "name a configuration with --config FILE or $HOOKTRAIL_CONFIG, or write one with `hooktrail init`"
        }
    }
}

#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

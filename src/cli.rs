//! The command line: one file a group of commands. What is printed is printed here.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "the command line prints")]

mod check;
mod complete;
mod daemon;
mod dead;
mod demo;
mod init;
mod listen;
mod man;
mod pause;
mod plan;
mod prune;
mod publish;
mod retry;
mod run;
mod status;
mod terminal;
mod test;

use std::{
    fmt,
    path::{Path, PathBuf},
    time::Duration,
};

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use clap::{CommandFactory as _, Parser, Subcommand};

pub use self::complete::answered as completed;
use self::daemon::Asked;
use crate::{
    clock,
    config::{self, AmqpConfig, Backend, Config, ConfigError, Subscriber},
    queue::{
        Queue as _, QueueError,
        amqp::{AmqpQueue, Repaired},
    },
    telemetry::{log, metrics::Metrics},
    wording::{agreed, counted},
};

/// Delivers audit events to webhooks: batched, signed, retried durably, nothing lost.
///
/// Exit codes: 0 done; 1 it failed at run time; 2 usage or configuration.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100)]
pub struct Cli {
    /// The configuration file
    #[arg(long, short, global = true, env = "HOOKTRAIL_CONFIG", default_value = config::DEFAULT_PATH, value_parser = file_name, value_name = "FILE", value_hint = clap::ValueHint::FilePath)]
    config: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the daemon until SIGTERM or SIGINT, then let requests in flight finish
    Run {
        /// Also when the embedded queue holds undelivered events and [queue] url is a RabbitMQ: they stay there
        #[arg(long)]
        force: bool,
    },
    /// Read the configuration, print what can go wrong with it, and what it means for each subscriber
    Check(check::Args),
    /// Show what the configuration would do: retries until a dead letter, memory, requests, and what a reload would change
    Plan(plan::Args),
    /// Write the commented default configuration
    Init(init::Args),
    /// Publish events, one JSON object a line, and wait until the broker has confirmed all of them
    Publish(publish::Args),
    /// A receiver for trying things out: verifies signatures, prints events, fails on request
    Listen(listen::Args),
    /// Send one signed event to a subscriber at once, without queue or daemon, and show what comes of it
    Test(test::Args),
    /// Make a secret for signing and print it
    Secret,
    /// Print a JSON Schema: of what receivers get, or of the configuration, which editors complete and check with it
    Schema {
        /// Of one event, of the body of a request, or of the configuration
        of: Schema,
    },
    /// Print the completions of a shell for this program
    Completions {
        /// Whose
        shell: clap_complete::Shell,
    },
    /// Print the manual page, for packages
    #[command(hide = true)]
    Man,
    /// Ask the running daemon how each subscriber is: state, backlog, retries, dead letters, rates, last error
    Status(status::Args),
    /// Ask the running daemon to send nothing to subscribers until they are resumed; their events wait in the queue
    Pause {
        #[command(flatten)]
        whom: pause::Whom,
        /// For whoever asks later
        #[arg(long, value_name = "TEXT")]
        why: Option<String>,
    },
    /// Ask the running daemon to deliver to paused subscribers again
    Resume {
        #[command(flatten)]
        whom: pause::Whom,
    },
    /// Ask the running daemon to read its configuration again, and print what that has changed
    ///
    /// Unlike a file that changes, this also removes all subscribers, or most of many.
    Reload,
    /// Delete the queues of subscribers that are not configured any more
    Prune(prune::Args),
    /// Delete and declare anew the queues that the broker has lost the use of; sound ones are not touched
    Repair {
        /// The subscriber's name
        #[arg(add = complete::subscribers())]
        subscriber: String,
        /// Also those whose events may come back, because the broker still counts some or a node of the cluster seems to be missing: they are
        /// lost
        #[arg(long)]
        yes: bool,
    },
    /// The whole thing on this machine with no set-up: a queue, two receivers, events, retries, dead letters
    Demo(demo::Args),
    /// Look at what waits for its next attempt, and make that due now
    #[command(subcommand)]
    Retry(retry::Command),
    /// Look at dead letters, send them again, delete them
    #[command(subcommand)]
    Dead(dead::Command),
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Schema {
    Event,
    Payload,
    Config,
}

impl Schema {
    fn text(self) -> String {
        match self {
            // As they stand in the documents.
            Self::Event => include_str!("../docs/schema/event.json").to_owned(),
            Self::Payload => include_str!("../docs/schema/payload.json").to_owned(),
            Self::Config => format!("{:#}\n", config::keys::schema()),
        }
    }
}

/// Why a command did not do what it was asked.
#[derive(Debug)]
pub enum Failed {
    /// Exit code 2.
    Usage(String),
    /// Exit code 2.
    Config(ConfigError),
    /// Exit code 1.
    Runtime(String),
    /// It is said already, in the log or in what was printed; with this exit code.
    Logged(u8),
}

impl Failed {
    /// 2 for usage and configuration, 1 for what failed at run time.
    pub const fn exit_code(&self) -> u8 {
        match self {
            Self::Usage(_) | Self::Config(_) => 2,
            Self::Runtime(_) => 1,
            Self::Logged(code) => *code,
        }
    }
}

/// As it is printed; nothing of what is said already.
impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Usage(why) | Self::Runtime(why) => write!(f, "hooktrail: {why}"),
            Self::Config(e) => write!(f, "{e}"),
            Self::Logged(_) => Ok(()),
        }
    }
}

impl From<QueueError> for Failed {
    fn from(e: QueueError) -> Self {
        // It may name what others chose: a message's id, a type of event.
        Self::Runtime(visible(&e.to_string()))
    }
}

impl From<std::io::Error> for Failed {
    fn from(e: std::io::Error) -> Self {
        Self::Runtime(e.to_string())
    }
}

impl Cli {
    /// Runs the command.
    ///
    /// # Errors
    /// The reason that is to be told, with its exit code.
    pub async fn run(self) -> Result<(), Failed> {
        let load = || config::load(&self.config).map_err(Failed::Config);
        match self.command {
            Command::Run { force } => run::run(&self.config, force).await,
            Command::Listen(args) => listen::run(args).await,
            Command::Demo(args) => Box::pin(demo::run(args)).await,
            Command::Init(args) => init::run(args, &self.config),
            Command::Completions { shell } => Ok(std::io::Write::write_all(&mut std::io::stdout(), &complete::script(shell)?)?),
            Command::Man => man::run(Self::command()),
            Command::Secret => {
                println!("{}", new_secret());
                Ok(())
            }
            Command::Schema { of } => {
                print!("{}", of.text());
                Ok(())
            }
            Command::Status(args) => status::run(&asked(&self.config, &[])?, &args).await,
            Command::Pause { whom, why } => pause::pause(&asked(&self.config, &whom.subscribers)?, &whom, why).await,
            Command::Check(args) => {
                log::to_stderr(tracing::Level::WARN);
                check::run(&self.config, &args).await
            }
            Command::Reload => daemon::reload(&asked(&self.config, &[])?).await,
            Command::Resume { whom } => pause::resume(&asked(&self.config, &whom.subscribers)?, &whom).await,
            other => {
                log::to_stderr(tracing::Level::WARN);
                let config = load()?;
                match other {
                    Command::Plan(args) => plan::run(&config, &args).await,
                    Command::Publish(args) => publish::run(&config, args).await,
                    Command::Repair { subscriber, yes } => repair(&config, &subscriber, yes).await,
                    Command::Test(args) => test::run(&config, &args).await,
                    Command::Prune(args) => prune::run(&config, &args).await,
                    Command::Retry(command) => retry::run(&config, command).await,
                    Command::Dead(command) => dead::run(&config, command).await,
                    Command::Run { .. }
                    | Command::Check(_)
                    | Command::Demo(_)
                    | Command::Init(_)
                    | Command::Completions { .. }
                    | Command::Man
                    | Command::Listen(_)
                    | Command::Secret
                    | Command::Status(_)
                    | Command::Pause { .. }
                    | Command::Reload
                    | Command::Resume { .. }
                    | Command::Schema { .. } => unreachable!("handled above"),
                }
            }
        }
    }
}

/// `whsec_` and the base64 of 32 random bytes.
fn new_secret() -> String {
    format!("whsec_{}", BASE64.encode(rand::random::<[u8; 32]>()))
}

/// The configuration's file, by `--config` or by the environment.
fn file_name(text: &str) -> Result<PathBuf, &'static str> {
    if text.is_empty() {
        return Err("no file is named; give one by --config FILE or HOOKTRAIL_CONFIG=FILE, or unset HOOKTRAIL_CONFIG");
    }
    Ok(text.into())
}

/// A length of time as it is written on the command line: a number alone is of seconds.
fn duration(text: &str) -> Result<Duration, &'static str> {
    const EXPECTED: &str = "write seconds, such as 2 or 0.5, or a time with its unit, such as 500ms, 10s or 1m 30s";
    if text.bytes().all(|b| b.is_ascii_digit() || b == b'.')
        && let Ok(seconds) = text.parse()
    {
        return Duration::try_from_secs_f64(seconds).map_err(|_| EXPECTED);
    }
    humantime::parse_duration(text).map_err(|_| EXPECTED)
}

/// A text as it can be shown: control characters could drive the terminal, so each is spelled out.
fn visible(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() { out.extend(c.escape_unicode()) } else { out.push(c) }
    }
    out
}

/// The broker, after a look whether it can be reached: a command must not wait for it without end.
async fn reach(config: &AmqpConfig) -> Result<AmqpQueue, Failed> {
    let queue = AmqpQueue::new(config.clone(), Metrics::new(clock::now()));
    queue.ping().await?;
    Ok(queue)
}

/// Where the daemon is asked. One that runs goes on when its configuration is given a mistake, and that is no time to be out
/// of reach.
fn asked(path: &Path, subscribers: &[String]) -> Result<Asked, Failed> {
    let of = |admin| Asked { admin, config: path.to_owned() };
    let problems = match config::load(path) {
        Ok(config) => {
            subscribers.iter().try_for_each(|name| find(&config, name).map(drop))?;
            return Ok(of(config.admin));
        }
        Err(problems) => problems,
    };
    // What a name is made of; the rest of the check is the daemon's.
    let is_name = |name: &str| name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
    match config::admin_of(path).filter(|_| subscribers.iter().all(|name| is_name(name))) {
        Some(admin) => {
            eprintln!("warning: the configuration has mistakes, see `hooktrail check`; a daemon that runs goes on with the one before");
            Ok(of(admin))
        }
        None => Err(Failed::Config(problems)),
    }
}

fn find<'c>(config: &'c Config, name: &str) -> Result<&'c Subscriber, Failed> {
    config.subscribers.iter().find(|s| s.name == name).map(AsRef::as_ref).ok_or_else(|| {
        let names: Vec<&str> = config.subscribers.iter().map(|s| s.name.as_str()).collect();
        let file = config.path.display();
        Failed::Usage(format!("no subscriber `{}` in {file}; {}", visible(name), there_are(name, &names)))
    })
}

/// What may have been meant by a name that nobody has, and which names there are.
fn there_are(name: &str, names: &[&str]) -> String {
    const SHOWN: usize = 20;
    if names.is_empty() {
        return "there is none".to_owned();
    }
    let near =
        names.iter().filter(|n| n.len() > 2).filter_map(|n| Some((config::nearness(name, n)?, n))).min_by_key(|(letters, _)| *letters);
    let near = near.map(|(_, n)| format!("did you mean `{n}`? ")).unwrap_or_default();
    let more = names.len().saturating_sub(SHOWN);
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    format!("{near}there are: {}{more}", names[..names.len().min(SHOWN)].join(", "))
}

async fn repair(config: &Config, name: &str, force: bool) -> Result<(), Failed> {
    let subscriber = find(config, name)?;
    let Backend::Amqp(amqp) = &config.queue.backend else {
        return Err(Failed::Usage(
            "`repair` is for the queues of a RabbitMQ; [queue] url is \"embedded\", where an error says itself what to do".to_owned(),
        ));
    };
    let queue = reach(amqp).await?;
    let report = queue.repair(subscriber, force).await?;
    let mut sound = 0_usize;
    for repaired in &report {
        match repaired {
            Repaired::Sound(_) => sound += 1,
            Repaired::Declared(queue) => println!("{queue}: declared; it was missing"),
            Repaired::Redeclared { queue, why } => {
                println!("{queue}: deleted and declared anew, since the broker had lost the use of it: {why}")
            }
        }
    }
    if sound == report.len() {
        println!("all {sound} queues that `{name}` uses are sound; nothing was changed");
    } else {
        println!("{} sound and {} not touched", counted(sound, "queue(s) (is|are)"), agreed(&sound, "(was|were)"));
    }
    queue.close().await;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crypto::{secret::Secret, signature};

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_name_that_nobody_has_is_answered_with_the_one_that_may_be_meant() {
        assert_eq!(there_are("seim", &["crm", "siem"]), "did you mean `siem`? there are: crm, siem");
        assert_eq!(there_are("crm-2", &["crm-01", "crm-20"]), "did you mean `crm-20`? there are: crm-01, crm-20");
        assert_eq!(there_are("b", &["a", "c"]), "there are: a, c");
        assert_eq!(there_are("b", &[]), "there is none");
        let many: Vec<String> = (0..1000).map(|n| format!("s{n:03}")).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        let said = there_are("nobody", &many);
        assert!(said.len() < 200 && said.ends_with("s019 and 980 more"), "{said}");
    }

    #[test]
    fn a_number_alone_is_of_seconds() {
        let ms = Duration::from_millis;
        for (text, expected) in
            [("2", ms(2000)), ("0", ms(0)), ("0.5", ms(500)), ("500ms", ms(500)), ("1m 30s", ms(90_000)), ("2s", ms(2000))]
        {
            assert_eq!(duration(text), Ok(expected), "{text}");
        }
        for text in ["", ".", "1.2.3", "-1", "soon", "1e3", "999999999999999999999999", "inf"] {
            assert!(duration(text).is_err_and(|e| e.contains("500ms")), "{text}");
        }
    }

    #[test]
    fn nothing_that_is_shown_drives_the_terminal() {
        assert_eq!(visible("é \u{1b}[2J\u{7f}\u{9b}1m\t\r\n"), r"é \u{1b}[2J\u{7f}\u{9b}1m\u{9}\u{d}\u{a}");
    }

    #[test]
    fn a_new_secret_is_one_for_standard_webhooks() {
        let (a, b) = (new_secret(), new_secret());
        assert_ne!(a, b);
        assert_eq!(signature::standard_key(&Secret::new(a)).expect("valid").len(), 32);
    }
}

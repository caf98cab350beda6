//! The command line: one file a group of commands. What is printed is printed here.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "the command line prints")]

mod arguments;
mod check;
mod complete;
mod daemon;
mod dead;
mod demo;
mod failed;
mod init;
mod listen;
mod man;
mod open;
mod pause;
mod plan;
mod prune;
mod publish;
mod repair;
mod retry;
mod run;
mod secret;
mod status;
mod terminal;
mod test;
mod text;

use std::path::PathBuf;

use clap::{CommandFactory as _, Parser, Subcommand};

pub use self::failed::Failed;
use self::{arguments::file_name, daemon::asked};
use crate::{config, telemetry::log};

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
        /// Also when the embedded queue holds undelivered events and [queue] url is a RabbitMQ:
        /// they stay there
        #[arg(long)]
        force: bool,
    },
    /// Read the configuration, print what can go wrong with it, and what it means for each
    /// subscriber
    Check(check::Args),
    /// Show what the configuration would do: retries until a dead letter, memory, requests, and
    /// what a reload would change
    Plan(plan::Args),
    /// Write the commented default configuration
    Init(init::Args),
    /// Publish events, one JSON object a line, and wait until the broker has confirmed all of them
    Publish(publish::Args),
    /// A receiver for trying things out: verifies signatures, prints events, fails on request
    Listen(listen::Args),
    /// Send one signed event to a subscriber at once, without queue or daemon, and show what comes
    /// of it
    Test(test::Args),
    /// Make a secret for signing and print it
    Secret,
    /// Print a JSON Schema: of what receivers get, or of the configuration, which editors complete
    /// and check with it
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
    /// Ask the running daemon how each subscriber is: state, backlog, retries, dead letters, rates,
    /// last error
    Status(status::Args),
    /// Ask the running daemon to send nothing to subscribers until they are resumed; their events
    /// wait in the queue
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
    /// Delete and declare anew the queues that the broker has lost the use of; sound ones are not
    /// touched
    Repair {
        /// The subscriber's name
        #[arg(add = complete::subscribers())]
        subscriber: String,
        /// Also those whose events may come back, because the broker still counts some or a node of
        /// the cluster seems to be missing: they are lost
        #[arg(long)]
        yes: bool,
    },
    /// The whole thing on this machine with no set-up: a queue, two receivers, events, retries,
    /// dead letters
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
            Self::Config => format!("{:#}\n", config::schema()),
        }
    }
}

/// Answers a shell that asks what it can complete; false if none does. To be called before there is
/// any other thread: the variable that it asks by is taken out of the environment.
///
/// # Errors
/// The shell is not known, or does not read the answer.
pub fn completed() -> Result<bool, String> {
    complete::answered(Cli::command)
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
            Command::Completions { shell } => {
                Ok(std::io::Write::write_all(&mut std::io::stdout(), &complete::script(shell)?)?)
            }
            Command::Man => man::run(Self::command()),
            Command::Secret => {
                println!("{}", secret::new_secret());
                Ok(())
            }
            Command::Schema { of } => {
                print!("{}", of.text());
                Ok(())
            }
            Command::Status(args) => status::run(&asked(&self.config, &[])?, &args).await,
            Command::Pause { whom, why } => {
                pause::pause(&asked(&self.config, &whom.subscribers)?, &whom, why).await
            }
            Command::Check(args) => {
                log::to_stderr(tracing::Level::WARN);
                check::run(&self.config, &args).await
            }
            Command::Reload => daemon::reload(&asked(&self.config, &[])?).await,
            Command::Resume { whom } => {
                pause::resume(&asked(&self.config, &whom.subscribers)?, &whom).await
            }
            other => {
                log::to_stderr(tracing::Level::WARN);
                let config = load()?;
                match other {
                    Command::Plan(args) => plan::run(&config, &args).await,
                    Command::Publish(args) => publish::run(&config, args).await,
                    Command::Repair { subscriber, yes } => {
                        repair::run(&config, &subscriber, yes).await
                    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}

//! The command line: a file or a folder for each group of commands. All printing is done here.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "the command line prints")]

mod arguments;
mod check;
mod complete;
mod daemon;
mod dead;
mod deliveries;
mod demo;
mod failed;
mod history;
mod init;
mod keeping;
mod listen;
mod man;
mod moment;
mod open;
mod pause;
mod plan;
mod prune;
mod publish;
mod remembered;
mod repair;
mod replay;
mod retry;
mod run;
mod secret;
mod status;
mod store;
mod subscribers;
mod terminal;
mod test;
mod text;
mod whereabouts;

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
        /// Start with RabbitMQ although the embedded queue holds undelivered events, which stay
        /// there
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
    /// Run a receiver for trying things out: it verifies signatures, prints events, fails on
    /// request
    Listen(listen::Args),
    /// Send one signed event to a subscriber at once, without queue or daemon, and show the answer
    /// and what the daemon would do
    Test(test::Args),
    /// Make a signing secret and print it
    Secret(secret::Args),
    /// Print a JSON Schema: of what receivers get, or of the configuration, for editors that
    /// complete and check it
    Schema {
        /// The schema of one event, of a request body, or of the configuration
        of: Schema,
    },
    /// Print the completions of a shell for this program
    Completions {
        /// The shell
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
        /// The reason, which `hooktrail status` shows
        #[arg(long, value_name = "TEXT")]
        why: Option<String>,
    },
    /// Ask the running daemon to deliver to paused subscribers again
    Resume {
        #[command(flatten)]
        whom: pause::Whom,
    },
    /// Ask the running daemon to reload its configuration, and print what has changed
    ///
    /// Unlike a changed file, this also removes all subscribers, or most of many.
    Reload,
    /// Delete the queues of subscribers that are not configured any more
    Prune(prune::Args),
    /// Delete and redeclare the queues that the broker cannot use any more; sound ones are not
    /// touched
    Repair {
        /// The subscriber's name
        #[arg(add = complete::subscribers())]
        subscriber: String,
        /// Also repair queues whose events may come back, because the broker still counts some or a
        /// node of the cluster seems to be missing; those events are lost
        #[arg(long)]
        yes: bool,
    },
    /// Run everything on this machine with no set-up: a queue, two receivers, events, retries, dead
    /// letters
    Demo(demo::Args),
    /// List the events that hooktrail remembers, newest first: who did what, and when
    ///
    /// Asks the running daemon; without one it reads the store's files.
    History(history::Args),
    /// Say for each subscriber whether it has an event, and if not, why
    ///
    /// Exit code 0 only if each subscriber that was to get the event has it.
    Where(whereabouts::Args),
    /// List the batches that were sent and what became of each, or show one with its attempts
    ///
    /// --since and --until mean when a batch was begun: its first attempt, not its last one.
    Deliveries(deliveries::Args),
    /// Send a batch that was delivered again, with the same id and bytes
    ///
    /// A receiver that remembers ids ignores it: `hooktrail replay` makes new batches.
    Resend(replay::ResendArgs),
    /// Send the events of a time to a subscriber again, in new batches; list, continue and cancel
    /// replays
    ///
    /// The running daemon does it, a few batches at a time, between new events.
    Replay(replay::Args),
    /// List the batches that wait for a retry, and make retries due now
    #[command(subcommand)]
    Retry(retry::Command),
    /// Say which store has the history of a RabbitMQ, or seal it with another key
    #[command(subcommand)]
    Store(store::Command),
    /// List all subscribers; show, make, change and remove those that are made over the API
    ///
    /// Asks the running daemon; changes need `[admin] manage = true` in its configuration. Secrets
    /// are read from files or standard input: others on this machine see the arguments of a command.
    #[command(subcommand)]
    Subscribers(subscribers::Command),
    /// List, show, export, replay and purge dead letters
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
            // The files that the documents link to.
            Self::Event => include_str!("../docs/schema/event.json").to_owned(),
            Self::Payload => include_str!("../docs/schema/payload.json").to_owned(),
            Self::Config => format!("{:#}\n", config::schema()),
        }
    }
}

/// Answers a shell that asks for completions; false if none asks. Must be called before there is
/// another thread: it removes the variable by which the shell asks from the environment.
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
    /// The reason, with its exit code.
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
            Command::Secret(args) => secret::run(&args),
            Command::Schema { of } => {
                print!("{}", of.text());
                Ok(())
            }
            Command::Status(args) => status::run(&asked(&self.config, &[])?, &args).await,
            Command::Pause { whom, why } => {
                pause::pause(&asked(&self.config, &whom.subscribers)?, &whom, why).await
            }
            Command::Subscribers(command) => {
                subscribers::run(&asked(&self.config, &[])?, command).await
            }
            Command::Resend(args) => replay::resend(&asked(&self.config, &[])?, &args).await,
            Command::Replay(args) => replay::run(&asked(&self.config, &[])?, &args).await,
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
                    Command::Store(command) => store::run(&config, command).await,
                    Command::History(args) => {
                        history::run(&config, &asked(&self.config, &[])?, &args).await
                    }
                    Command::Where(args) => {
                        whereabouts::run(&config, &asked(&self.config, &[])?, &args).await
                    }
                    Command::Deliveries(args) => {
                        deliveries::run(&config, &asked(&self.config, &[])?, &args).await
                    }
                    Command::Run { .. }
                    | Command::Check(_)
                    | Command::Demo(_)
                    | Command::Init(_)
                    | Command::Completions { .. }
                    | Command::Man
                    | Command::Listen(_)
                    | Command::Secret(_)
                    | Command::Status(_)
                    | Command::Pause { .. }
                    | Command::Reload
                    | Command::Subscribers(_)
                    | Command::Resend(_)
                    | Command::Replay(_)
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

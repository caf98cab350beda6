//! `plan`: the effects of a configuration, computed by the policies of the daemon.

mod forecast;
mod json;
mod print;

use self::{forecast::Plan, json::as_json, print::as_text};
use super::{
    complete,
    daemon::{self, ReloadPreview},
    failed::Failed,
    open::find,
    terminal,
};
use crate::config::{Backend, Config, Subscriber};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Only this subscriber; by default all
    #[arg(add = complete::subscribers())]
    subscriber: Option<String>,
    /// As one JSON object
    #[arg(long)]
    json: bool,
}

pub(super) async fn run(config: &Config, args: &Args) -> Result<(), Failed> {
    let subscribers: Vec<&Subscriber> = match &args.subscriber {
        Some(name) => vec![find(config, name)?],
        None => config.subscribers.iter().map(AsRef::as_ref).collect(),
    };
    let ladder = matches!(config.queue.backend, Backend::Amqp(_));
    let plans: Vec<Plan<'_>> = subscribers.into_iter().map(|s| Plan::new(s, ladder)).collect();
    let preview = daemon::preview_reload(config).await?;
    if args.json {
        println!("{:#}", as_json(config, &plans, &preview));
    } else {
        print!(
            "{}",
            as_text(config, &plans, &preview, terminal::width().unwrap_or(terminal::USUAL))
        );
    }
    match preview {
        ReloadPreview::Refused { .. } => Err(Failed::Runtime(
            "the daemon would refuse a reload; it keeps its configuration until the file is fixed"
                .to_owned(),
        )),
        ReloadPreview::Unknown { .. } | ReloadPreview::Changes { .. } => Ok(()),
    }
}

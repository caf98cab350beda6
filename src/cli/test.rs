//! `test`: sends one event to one subscriber at once, and shows what the daemon would do.

use std::fmt::Write as _;

use super::{
    complete,
    daemon::{Asked, Daemon, is_name},
    failed::Failed,
    open::find,
    text::{as_json, visible},
};
use crate::{
    admin::view::{ChangeRequest, Tested},
    config::Config,
    delivery::DispositionKind,
    endpoint::test_event::send,
};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The subscriber's name
    #[arg(add = complete::subscribers())]
    subscriber: String,
    /// One JSON object instead of text
    #[arg(long)]
    json: bool,
}

pub(super) async fn run(config: &Config, args: &Args) -> Result<(), Failed> {
    let tested = match find(config, &args.subscriber) {
        Ok(subscriber) => Tested::from(&send(subscriber).await.map_err(Failed::Runtime)?),
        // It may have been made over the API, and the daemon alone has its secrets.
        Err(_) if config.admin.manage && is_name(&args.subscriber) => {
            let asked = Asked { admin: config.admin.clone(), config: config.path.clone() };
            let path = format!("subscribers/{}/test", args.subscriber);
            Daemon::of(&asked)?.post::<Tested>(&path, &ChangeRequest::default()).await?
        }
        Err(unknown) => return Err(unknown),
    };
    if args.json {
        println!("{}", as_json(&tested));
    } else {
        print!("{}", as_text(&tested));
    }
    if tested.outcome == DispositionKind::Delivered.name() {
        Ok(())
    } else {
        Err(Failed::Runtime(format!("`{}` did not accept the event", visible(&tested.subscriber))))
    }
}

fn as_text(tested: &Tested) -> String {
    let mut out = String::new();
    let mut line = |text: String| writeln!(out, "{text}").unwrap_or_default();
    line(format!("POST {}", visible(&tested.url)));
    for (name, value) in &tested.headers {
        line(format!("{}: {}", visible(name), visible(value.as_str().unwrap_or_default())));
    }
    line(format!("\n{}\n", visible(tested.body.trim_end())));
    match (tested.status, &tested.answer) {
        (Some(status), Some(text)) if !text.is_empty() => {
            line(format!("answer:  {status}  {}", visible(text)));
        }
        (Some(status), _) => line(format!("answer:  {status}")),
        (None, _) => {
            let failure = [&tested.failure, &tested.error].into_iter().flatten();
            let failure: Vec<String> = failure.map(|text| visible(text)).collect();
            line(format!("failure: {}", failure.join(": ")));
        }
    }
    line(format!("time:    {} ms", tested.duration_ms));
    line(format!("outcome: {}", visible(&tested.verdict)));
    out
}

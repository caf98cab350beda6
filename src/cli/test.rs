//! `test`: sends one event to one subscriber at once, and shows what the daemon would do.

use std::fmt::Write as _;

use super::{
    complete,
    failed::Failed,
    open::find,
    text::{as_json, visible},
};
use crate::{
    admin::view::Tested,
    config::Config,
    endpoint::test_event::{Report, send},
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
    let subscriber = find(config, &args.subscriber)?;
    let report = send(subscriber).await.map_err(Failed::Runtime)?;
    if args.json {
        println!("{}", as_json(&Tested::from(&report)));
    } else {
        print!("{}", as_text(&report));
    }
    if report.is_delivered() {
        Ok(())
    } else {
        Err(Failed::Runtime(format!("`{}` did not accept the event", subscriber.name)))
    }
}

fn as_text(report: &Report) -> String {
    let attempt = &report.attempt;
    let mut out = String::new();
    let mut line = |text: String| writeln!(out, "{text}").unwrap_or_default();
    line(format!("POST {}", report.url));
    for (name, value) in &attempt.headers {
        line(format!(
            "{name}: {}",
            value.as_deref().map_or_else(|| "[redacted]".to_owned(), visible)
        ));
    }
    line(format!("\n{}\n", visible(String::from_utf8_lossy(&report.body).trim_end())));
    match (&attempt.answer, report.failure()) {
        (Some((status, text)), _) if text.is_empty() => line(format!("answer:  {status}")),
        (Some((status, text)), _) => line(format!("answer:  {status}  {}", visible(text))),
        (None, failure) => line(format!(
            "failure: {}",
            visible(&failure.map(ToString::to_string).unwrap_or_default())
        )),
    }
    line(format!("time:    {} ms", report.took.as_millis()));
    line(format!("outcome: {}", report.verdict));
    out
}

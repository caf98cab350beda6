//! `repair`: deletes and redeclares broken queues.

use super::{
    failed::Failed,
    open::{find, reach},
};
use crate::{
    config::{Backend, Config},
    queue::{Queue as _, amqp::Repaired},
    wording::{agreed, counted},
};

pub(super) async fn run(config: &Config, name: &str, force: bool) -> Result<(), Failed> {
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
                println!(
                    "{queue}: deleted and redeclared, because the broker could not use it: {why}"
                )
            }
        }
    }
    if sound == report.len() {
        println!("all {sound} queues that `{name}` uses are sound; nothing was changed");
    } else {
        println!(
            "{} sound and {} not touched",
            counted(sound, "queue(s) (is|are)"),
            agreed(&sound, "(was|were)")
        );
    }
    queue.close().await;
    Ok(())
}

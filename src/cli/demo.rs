//! `demo`: everything on this machine with no set-up. A daemon, a queue and two receivers, one of
//! which fails for a while; at the end every event is accounted for.

mod account;
mod home;
mod narrator;
mod play;
mod receiver;
mod sample;
mod stage;

use std::time::Duration;

use self::{home::Home, play::Play, receiver::Receiver, sample::REFUSED, stage::Stage};
use super::{failed::Failed, open::reach};
use crate::{
    admin::Admin,
    config::{Backend, Config},
    queue::embedded::EmbeddedQueue,
};

/// The period of the failing receiver's outages: it is down from the fourth to the ninth second of
/// each.
const PERIOD: Duration = Duration::from_secs(40);

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// How long to publish events, such as 10m
    #[arg(long = "for", value_name = "DURATION", value_parser = super::arguments::duration, default_value = "15s")]
    publish_for: Duration,
    /// Use this RabbitMQ instead of the embedded queue; the demo deletes at its end what it
    /// declared there. Other users of this machine can see the command line: put a URL with a real
    /// password into the variable
    #[arg(long, value_name = "URL", env = "HOOKTRAIL_DEMO_AMQP_URL", hide_env_values = true)]
    amqp: Option<String>,
}

pub(super) async fn run(args: Args) -> Result<(), Failed> {
    let stage = Stage::new();
    let secret = super::secret::new_secret();
    let siem = Receiver::start("siem", &secret, stage.clone(), |_, _| 200).await?;
    let crm = Receiver::start("crm", &secret, stage.clone(), |elapsed, body| {
        let second = elapsed.as_secs_f64() % PERIOD.as_secs_f64();
        match () {
            () if (4.0..9.0).contains(&second) => 503,
            () if body.windows(REFUSED.len()).any(|w| w == REFUSED.as_bytes()) => 422,
            () => 200,
        }
    })
    .await?;
    let home = Home::new()?;
    let config = home.config(args.amqp.as_deref(), &secret, &[&siem, &crm])?;
    stage.say(&format!(
        "Two receivers on this machine, `siem` and `crm`; {}. Audit events come for {}.",
        match &config.queue.backend {
            Backend::Embedded => format!("the embedded queue in {}", home.0.display()),
            Backend::Amqp(amqp) => format!("a RabbitMQ at {}", amqp.url),
        },
        humantime::format_duration(args.publish_for)
    ));
    let admin = Admin::bind(&config.admin).await.map_err(|e| {
        Failed::Runtime(format!("the console cannot listen on {}: {e}", config.admin.listen))
    })?;
    stage.say(&console_of(&config, &admin));
    let play =
        Play { stage, config: &config, receivers: [&siem, &crm], publish_for: args.publish_for };
    match &config.queue.backend {
        Backend::Embedded => {
            Box::pin(play.run(EmbeddedQueue::for_daemon(&config.queue.embedded)?, admin)).await
        }
        Backend::Amqp(amqp) => {
            let queue = reach(amqp).await?;
            let played = Box::pin(play.run(queue.clone(), admin)).await;
            queue.remove(config.subscribers.iter().map(|s| &s.name), true).await?;
            played
        }
    }
}

/// How to come to the console. The token is made for this run and ends with it, so that it may stand
/// on the terminal: no other does.
fn console_of(config: &Config, admin: &Admin) -> String {
    let token = config.admin.token.as_ref().map_or("", |token| token.expose());
    format!(
        "Meanwhile in a browser: http://{}/console/\n  sign in with the token {token}\n  \
         which ends with the demo; `--for 10m` gives it time.\n",
        admin.listens()
    )
}

//! `check`: what a configuration means, and what there is in the broker.

use std::fmt::Write as _;

use super::{Failed, reach};
use crate::{
    config::{Auth, Backend, Config, EmbeddedConfig, Intake, Subscriber},
    queue::{Finding, Queue, embedded::EmbeddedQueue},
    signature::{Encoding, Scheme},
};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Also ask the broker what it has; exit code 1 if it has something harmful
    #[arg(long)]
    connect: bool,
}

pub(super) async fn run(config: &Config, args: &Args) -> Result<(), Failed> {
    print!("{}", effective(config));
    if args.connect { connect(config).await } else { Ok(()) }
}

async fn connect(config: &Config) -> Result<(), Failed> {
    match &config.queue.backend {
        Backend::Amqp(amqp) => {
            let queue = reach(amqp).await?;
            println!("\n# The broker at {} answers.", amqp.url);
            inspect(queue, config).await
        }
        Backend::Embedded => {
            let embedded = &config.queue.embedded;
            if !EmbeddedQueue::exists(embedded) {
                println!("\n# There is no embedded queue in {} yet; `run` makes it.", embedded.data_dir.display());
                return Ok(());
            }
            let queue = EmbeddedQueue::existing(embedded)?;
            println!("\n# The embedded queue in {} can be read.", embedded.data_dir.display());
            inspect(queue, config).await
        }
    }
}

async fn inspect(queue: impl Queue, config: &Config) -> Result<(), Failed> {
    let mut harmful = 0;
    let mut absent = Vec::new();
    for finding in queue.inspect(&config.subscribers).await? {
        match finding {
            Finding::Queue { name, messages, consumers: Some(consumers) } if messages > 0 || consumers > 0 => {
                println!("# {name}: {messages} messages, {consumers} consumers");
            }
            Finding::Queue { name, messages, consumers: None } => println!("# {name}: {messages}"),
            Finding::Queue { .. } => {}
            Finding::Absent { name } => absent.push(name),
            Finding::Harmful(why) => {
                harmful += 1;
                eprintln!("harmful: {why}");
            }
        }
    }
    if !absent.is_empty() {
        println!("# not there yet, `run` declares them: {}", absent.join(", "));
    }
    queue.close().await;
    if harmful > 0 {
        return Err(Failed::Runtime(format!("{harmful} harmful findings; each says what to do")));
    }
    println!("# Nothing harmful was found.");
    Ok(())
}

/// The configuration with all defaults filled in, as TOML, secrets left out.
fn effective(config: &Config) -> String {
    let mut out = String::new();
    let mut line = |text: String| {
        out.push_str(&text);
        out.push('\n');
    };
    line(format!("# {}: valid", config.path.display()));
    line(format!("shutdown_timeout = \"{}\"", humantime::format_duration(config.shutdown_timeout)));
    let EmbeddedConfig { data_dir, retention } = &config.queue.embedded;
    let data_dir = format!("data_dir = {}", quoted(&data_dir.display().to_string()));
    match &config.queue.backend {
        Backend::Embedded => {
            line(format!("\n[queue]\nurl = \"embedded\"\n{data_dir}"));
            line(format!("retention = \"{}\"", humantime::format_duration(*retention)));
        }
        Backend::Amqp(amqp) => {
            line(format!("\n[queue]\nurl = \"{}\"  # the rest is not shown\n{data_dir}", amqp.url));
            line(match &amqp.intake {
                Intake::Exchange(name) => format!("exchange = {}", quoted(name)),
                Intake::SourceQueue(name) => format!("source_queue = {}", quoted(name)),
            });
            line(format!("prefix = {}", quoted(&amqp.prefix)));
        }
    }
    line(format!("\n[admin]\nlisten = \"{}\"", config.admin.listen));
    if config.admin.token.is_some() {
        line("token = \"[redacted]\"".to_owned());
    }
    line(format!("\n[log]\nformat = \"{}\"", if config.log.json { "json" } else { "text" }));
    line(format!("level = \"{}\"", config.log.level.to_string().to_lowercase()));
    if config.subscribers.is_empty() {
        line("\n# no subscribers".to_owned());
    }
    for s in config.subscribers.iter() {
        line(subscriber(s));
    }
    out
}

fn quoted(text: &str) -> String {
    // What JSON escapes, TOML does too, in the same way.
    serde_json::Value::from(text).to_string().replace("${", "$${")
}

fn subscriber(s: &Subscriber) -> String {
    let mut out = String::from("\n[[subscriber]]\n");
    let mut pair = |key: &str, value: String| {
        // Writing to a string cannot fail.
        writeln!(out, "{key} = {value}").ok();
    };
    let duration = |d| format!("\"{}\"", humantime::format_duration(d));
    let list = |items: Vec<String>| format!("[{}]", items.join(", "));
    pair("name", quoted(&s.name));
    pair("url", format!("\"{}\"  # the rest is not shown", s.url));
    pair("events", list(s.events.iter().map(|p| quoted(p.as_str())).collect()));
    pair("format", quoted(s.format.name()));
    pair("secrets", list(s.secrets.iter().map(|_| "\"[redacted]\"".to_owned()).collect()));
    pair("signatures", list(s.signer.schemes().iter().map(scheme).collect()));
    let redacted = || quoted("[redacted]");
    if !s.headers.is_empty() {
        let header = |(name, _): &(_, _)| format!("{} = {}", quoted(&format!("{name}")), redacted());
        pair("headers", format!("{{ {} }}", s.headers.iter().map(header).collect::<Vec<_>>().join(", ")));
    }
    match &s.auth {
        None => {}
        Some(Auth::Basic { username, .. }) => {
            pair("auth", format!("{{ basic = {{ username = {}, password = {} }} }}", quoted(username), redacted()))
        }
        Some(Auth::Bearer(_)) => pair("auth", format!("{{ bearer = {} }}", redacted())),
    }
    if !s.tls.files.is_empty() {
        let file = |(key, path): &(&str, std::path::PathBuf)| format!("{key} = {}", quoted(&path.display().to_string()));
        pair("tls", format!("{{ {} }}", s.tls.files.iter().map(file).collect::<Vec<_>>().join(", ")));
    }
    pair("event_ids", s.event_ids.to_string());
    pair("paused", s.paused.to_string());
    pair("batch.max_events", s.batch.max_events.to_string());
    pair("batch.max_bytes", format!("\"{}B\"", s.batch.max_bytes));
    pair("batch.max_wait", duration(s.batch.max_wait));
    pair("http.timeout", duration(s.http.timeout));
    pair("http.connect_timeout", duration(s.http.connect_timeout));
    pair("http.concurrency", s.http.concurrency.to_string());
    pair("http.success", quoted(s.http.success.name()));
    pair("http.allow_http", s.http.allow_http.to_string());
    pair("http.allow_private_addresses", s.http.addresses.allow_private.to_string());
    pair("http.allow_addresses", list(s.http.addresses.allow.iter().map(|n| quoted(&n.to_string())).collect()));
    if let Some(proxy) = &s.http.proxy {
        pair("http.proxy", format!("\"{proxy}\"  # the rest is not shown"));
    }
    let r = s.retry.options();
    pair("retry.initial_interval", duration(r.initial_interval));
    pair("retry.multiplier", format!("{:?}", r.multiplier));
    pair("retry.randomization_factor", format!("{:?}", r.randomization_factor));
    pair("retry.max_interval", duration(r.max_interval));
    pair("retry.max_attempts", r.max_attempts.to_string());
    pair("retry.max_elapsed_time", duration(r.max_elapsed_time));
    pair("retry.on_exhausted", quoted(r.on_exhausted.name()));
    pair("circuit_breaker.failures", s.circuit_breaker.failures.to_string());
    pair("circuit_breaker.open_for", duration(s.circuit_breaker.open_for));
    pair("circuit_breaker.max_open_for", duration(s.circuit_breaker.max_open_for));
    out.pop();
    out
}

fn scheme(scheme: &Scheme) -> String {
    match scheme {
        Scheme::StandardWebhooks => quoted("standard-webhooks"),
        Scheme::Mailtrap => quoted("mailtrap"),
        Scheme::Custom { header, prefix, encoding } => {
            let encoding = match encoding {
                Encoding::Hex => "hex",
                Encoding::Base64 => "base64",
            };
            format!("{{ header = {}, prefix = {}, encoding = \"{encoding}\" }}", quoted(header), quoted(prefix))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config;

    #[test]
    fn what_is_printed_is_a_configuration_that_means_the_same_and_shows_no_secret() {
        let dir = tempfile::tempdir().expect("a directory");
        let text = r#"
            [queue]
            url = "amqp://user:hunter2@127.0.0.1/v"
            source_queue = "a.b"
            [admin]
            listen = "[::]:1234"
            token = "hunter2"
            [[subscriber]]
            name = "a"
            url = "https://u:hunter2@example.com/hunter2"
            secrets = ["hunter2"]
            events = ["x.*"]
            signatures = ["mailtrap", { header = "X-A", prefix = "p=" }]
            http = { allow_addresses = ["10.0.0.0/8"] }
            batch = { max_bytes = "5KiB" }
        "#;
        let path = dir.path().join("h.toml");
        std::fs::write(&path, text).expect("writes");
        let a = config::load(&path).expect("valid");
        let printed = effective(&a);
        assert!(!printed.contains("hunter2"), "{printed}");
        std::fs::write(&path, &printed).expect("writes");
        let b = config::load(&path).unwrap_or_else(|e| panic!("{e}\n{printed}"));
        assert_eq!(effective(&b), printed);
        assert_eq!(
            (&a.subscribers[0].batch, &a.subscribers[0].http, &a.queue.embedded, a.admin.listen),
            (&b.subscribers[0].batch, &b.subscribers[0].http, &b.queue.embedded, b.admin.listen)
        );
    }
}

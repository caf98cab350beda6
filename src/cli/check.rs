//! `check`: what a configuration means, and what can go wrong with the queue and the endpoints that it names.

use std::{fmt::Write as _, time::Duration};

use super::{Failed, visible};
use crate::{
    clock,
    config::{Auth, Backend, Config, EmbeddedConfig, Intake, Subscriber},
    endpoint,
    finding::{Finding, Severity, summarized},
    metrics::Metrics,
    queue::{Queue, QueueError, amqp::AmqpQueue, embedded::EmbeddedQueue},
    signature::{Encoding, Scheme},
    wording::{counted, size, span},
};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Also look at the queue and at each subscriber's endpoint, without sending a request: what can go wrong, and what
    /// mends it; exit code 1 if something is harmful
    #[arg(long)]
    connect: bool,
    /// Print what is found as JSON, one finding a line, and nothing else
    #[arg(long, requires = "connect")]
    json: bool,
}

/// For all that a queue is asked; a thousand subscribers take some seconds.
const PATIENCE: Duration = Duration::from_secs(180);

pub(super) async fn run(config: &Config, args: &Args) -> Result<(), Failed> {
    if !args.json {
        print!("{}", effective(config));
    }
    if args.connect { connect(config, args.json).await } else { Ok(()) }
}

async fn connect(config: &Config, json: bool) -> Result<(), Failed> {
    let (mut findings, endpoints) = tokio::join!(look(config), endpoint::inspect(&config.subscribers));
    findings.extend(endpoints);
    let findings = summarized(findings);
    if !json {
        println!();
    }
    for finding in &findings {
        if json {
            println!("{}", serde_json::to_string(finding).map_err(|e| Failed::Runtime(e.to_string()))?);
        } else {
            tell(finding);
        }
    }
    match findings.iter().filter(|f| f.severity == Severity::Harmful).count() {
        0 if json => Ok(()),
        0 => {
            let unseen: Vec<String> = findings.iter().filter(|f| f.is_unseen()).map(Finding::names).collect();
            if unseen.is_empty() {
                println!("# Nothing harmful was found.");
            } else {
                println!(
                    "# Nothing harmful was found in what was looked at. Not looked at, so not known: {}.",
                    visible(&unseen.join("; "))
                );
            }
            Ok(())
        }
        harmful => Err(Failed::Runtime(format!(
            "{}: events can be lost, or cannot be delivered; each says what to do",
            counted(harmful, "harmful finding(s)")
        ))),
    }
}

/// What is good goes behind the configuration as comments, what is bad to stderr.
fn tell(finding: &Finding) {
    let mut text = format!("{}: {}: {}", finding.severity.name(), finding.names(), finding.found);
    for (what, more) in [("risk", &finding.risk), ("mend", &finding.remedy)] {
        if let Some(more) = more {
            // Writing to a string cannot fail.
            write!(text, "\n  {what}: {more}").ok();
        }
    }
    for line in text.split('\n').map(visible) {
        match finding.severity {
            Severity::Ok | Severity::Note => println!("# {line}"),
            Severity::Warning | Severity::Harmful => eprintln!("{line}"),
        }
    }
}

async fn look(config: &Config) -> Vec<Finding> {
    match &config.queue.backend {
        Backend::Amqp(amqp) => inspect(AmqpQueue::new(amqp.clone(), Metrics::new(clock::now())), config).await,
        Backend::Embedded => {
            let embedded = &config.queue.embedded;
            match EmbeddedQueue::exists(embedded) {
                Ok(true) => {}
                Ok(false) => {
                    return vec![Finding::note(
                        "data_dir",
                        format!("there is no embedded queue in {} yet; `run` makes it", embedded.data_dir.display()),
                    )];
                }
                Err(e) => {
                    let risk = "nothing of it was looked at, so it is not known whether events can be lost";
                    return vec![Finding::harmful("data_dir", e.to_string()).risking(risk)];
                }
            }
            match EmbeddedQueue::existing(embedded) {
                Ok(queue) => inspect(queue, config).await,
                Err(e) => vec![no_queue(&e)],
            }
        }
    }
}

async fn inspect(queue: impl Queue, config: &Config) -> Vec<Finding> {
    let findings = match tokio::time::timeout(PATIENCE, queue.inspect(&config.subscribers)).await {
        Ok(Ok(findings)) => findings,
        Ok(Err(e)) => vec![no_queue(&e)],
        Err(_) => vec![Finding::harmful("queue", format!("did not answer all questions within {} s", PATIENCE.as_secs()))],
    };
    queue.close().await;
    findings
}

fn no_queue(e: &QueueError) -> Finding {
    let finding = Finding::harmful("queue", e.what()).risking("nothing is taken in or delivered");
    match e.remedy() {
        Some(remedy) => finding.mended(remedy),
        None => finding,
    }
}

/// The configuration with all defaults filled in, as TOML, secrets left out.
fn effective(config: &Config) -> String {
    let mut out = String::new();
    let mut line = |text: String| {
        out.push_str(&text);
        out.push('\n');
    };
    line(format!("# {}: valid", config.path.display()));
    line(format!("shutdown_timeout = \"{}\"", span(config.shutdown_timeout)));
    let EmbeddedConfig { data_dir, retention } = &config.queue.embedded;
    let data_dir = format!("data_dir = {}", quoted(&data_dir.display().to_string()));
    match &config.queue.backend {
        Backend::Embedded => {
            line(format!("\n[queue]\nurl = \"embedded\"\n{data_dir}"));
            line(format!("retention = \"{}\"", span(*retention)));
        }
        Backend::Amqp(amqp) => {
            line(format!("\n[queue]\nurl = \"{}\"  # the rest is not shown\n{data_dir}", amqp.url));
            line(match &amqp.intake {
                Intake::Exchange(name) => format!("exchange = {}", quoted(name)),
                Intake::SourceQueue(name) => format!("source_queue = {}", quoted(name)),
            });
            line(format!("prefix = {}", quoted(&amqp.prefix)));
            if let Some(url) = &amqp.management_url {
                line(format!("management_url = \"{url}\"  # the rest is not shown"));
            }
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
    let duration = |d| format!("\"{}\"", span(d));
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
    pair("batch.max_bytes", format!("\"{}\"", size(s.batch.max_bytes)));
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
            management_url = "https://user:hunter2@127.0.0.1:15671/hunter2"
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

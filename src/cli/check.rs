//! `check`: the findings of a configuration, of its queue and of its endpoints; and the
//! configuration with all defaults.

use std::{
    io::Write as _,
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime},
};

use super::{
    complete,
    failed::Failed,
    open::{find, store_of},
    text::visible,
};
use crate::{
    clock,
    config::{
        self, Backend, Config, ConfigError, StoreConfig, Subscriber, Token,
        fitting::{Misfit, misfits, model_of},
    },
    endpoint::inspect,
    queue::{
        Queue,
        amqp::{AmqpQueue, inspect_intake},
        embedded::EmbeddedQueue,
    },
    store::{
        Store as _,
        sqlite::{SqliteStore, recorded_id},
    },
    telemetry::{
        finding::{Finding, Severity, summarized},
        metrics::Metrics,
    },
    wording::counted,
};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Only these subscribers, and what all of them share; by default all
    #[arg(value_name = "SUBSCRIBER", add = complete::subscribers())]
    subscribers: Vec<String>,
    /// Also inspect the queue and each subscriber's endpoint, without a request to it: what can
    /// go wrong, and its remedy; exit code 1 if something is harmful
    #[arg(long)]
    connect: bool,
    /// Print only what can go wrong, and nothing if all is well
    #[arg(long, short)]
    quiet: bool,
    /// Print only the findings, as JSON, one a line: also each mistake of the configuration
    #[arg(long)]
    json: bool,
}

/// The timeout of a queue's inspection; a thousand subscribers take some seconds.
const PATIENCE: Duration = Duration::from_secs(180);

/// The timeout of the endpoints' inspection. Each has its own; a thousand that are all silent take a
/// quarter of an hour.
const ENDPOINTS_PATIENCE: Duration = Duration::from_secs(3600);

/// The fewest characters of a token that cannot be guessed.
const SAFE_TOKEN: usize = 16;

pub(super) async fn run(path: &Path, args: &Args) -> Result<(), Failed> {
    let config = match config::load(path) {
        Ok(config) => config,
        Err(problems) => {
            if args.json {
                as_json(&mistakes(&problems))?;
            }
            return Err(Failed::Config(problems));
        }
    };
    let chosen = chosen(&config, &args.subscribers)?;
    let mut findings = if args.connect { inspected(&config, &chosen).await } else { Vec::new() };
    findings.splice(0..0, yet_to_come(&chosen, clock::now()));
    findings.splice(0..0, receivers(&chosen));
    findings.extend(left(&config).await);
    findings.splice(0..0, short_tokens(&config));
    let harmful = findings.iter().filter(|f| f.severity == Severity::Harmful).count();
    // The worst first: a long text is printed below.
    findings.reverse();
    if args.json {
        findings.push(valid(&config, &chosen));
    }
    if args.quiet {
        findings.retain(|f| f.severity >= Severity::Warning);
    }
    if args.json {
        as_json(&findings)?;
    } else {
        findings.iter().for_each(print);
        if args.connect && !args.quiet {
            if harmful == 0 {
                print_out(&nothing_harmful(&findings));
            }
            print_out("");
        }
        if !args.quiet {
            print_out(effective(&config, &chosen).trim_end_matches('\n'));
        }
    }
    match harmful {
        0 => Ok(()),
        _ if args.quiet => Err(Failed::Logged(1)),
        harmful => Err(Failed::Runtime(format!(
            "{}: events can be lost, or cannot be delivered; each has its remedy",
            counted(harmful, "harmful finding(s)")
        ))),
    }
}

/// The chosen subscribers, in the order of the configuration.
fn chosen(config: &Config, names: &[String]) -> Result<Vec<Arc<Subscriber>>, Failed> {
    names.iter().try_for_each(|name| find(config, name).map(drop))?;
    Ok(config
        .subscribers
        .iter()
        .filter(|s| names.is_empty() || names.iter().any(|name| s.name == *name))
        .cloned()
        .collect())
}

/// Inspects the queue and the endpoints; the worst findings are last.
async fn inspected(config: &Config, chosen: &[Arc<Subscriber>]) -> Vec<Finding> {
    // Inspects the queue for all subscribers, whichever were chosen: they share the broker's
    // limits, and any that is consumed shows that a daemon runs.
    let (mut findings, endpoints) =
        tokio::join!(inspect_queue(config), inspect::inspect(chosen, ENDPOINTS_PATIENCE));
    if chosen.len() < config.subscribers.len() {
        findings = without_others(findings, config, chosen);
    }
    findings.extend(endpoints);
    summarized(findings)
}

/// Where subscribers do not fit their receivers.
fn receivers(chosen: &[Arc<Subscriber>]) -> Vec<Finding> {
    let of = |s: &Arc<Subscriber>| {
        let about = format!("subscriber {}", s.name);
        let note = model_of(s).and_then(|model| {
            Some(Finding::note(&about, format!("sends to {}: {}", model.title, model.note?)))
        });
        let warning =
            |misfit: Misfit| Finding::warning(&about, misfit.found).with_remedy(misfit.remedy);
        misfits(s).into_iter().map(warning).chain(note).collect::<Vec<_>>()
    };
    chosen.iter().flat_map(of).collect()
}

/// What begins in the future. To load it is no mistake: the clock of a machine that starts may be
/// behind.
fn yet_to_come(chosen: &[Arc<Subscriber>], now: SystemTime) -> Vec<Finding> {
    let of = |s: &Arc<Subscriber>| {
        let start = s.start_from.map(|start| start.at(now)).filter(|at| *at > now)?;
        let found = format!("start_from, {}, is yet to come", clock::rfc3339(start));
        let finding = Finding::warning(format!("subscriber `{}`", s.name), found);
        let finding = finding.risking("if it is new, it gets nothing from before it is bound");
        Some(finding.with_remedy("write a time that has passed, or leave `start_from` out"))
    };
    chosen.iter().filter_map(of).collect()
}

/// Tokens that are found by trying, whatever slows the trying down.
fn short_tokens(config: &Config) -> Vec<Finding> {
    let of = |token: Token| {
        let is_short = token.secret.expose().len() < SAFE_TOKEN;
        is_short.then(|| {
            let found = format!("has fewer than {SAFE_TOKEN} characters");
            Finding::warning(format!("token `{}` of [admin]", token.name), found)
                .risking("whoever reaches `admin.listen` can find it by trying")
                .with_remedy("make a longer one: `openssl rand -hex 32`")
        })
    };
    config.admin.all_tokens().into_iter().filter_map(of).collect()
}

/// Subscribers made over the API that nobody serves: the store that has them is off.
async fn left(config: &Config) -> Vec<Finding> {
    if config.store != StoreConfig::None {
        return Vec::new();
    }
    let store = SqliteStore::off(store_of(config), "[store] url is \"none\"");
    let problems = store.subscribers().await.problems;
    problems.into_iter().map(|problem| Finding::harmful("store", problem)).collect()
}

/// Removes findings about other subscribers only, unless they harm all.
fn without_others(
    findings: Vec<Finding>,
    config: &Config,
    chosen: &[Arc<Subscriber>],
) -> Vec<Finding> {
    let prefix = match &config.queue.backend {
        Backend::Amqp(amqp) => Some(amqp.prefix.as_str()),
        Backend::Embedded => None,
    };
    let is_meant = |about: &String| {
        subscriber_of(about, prefix).is_none_or(|name| chosen.iter().any(|s| s.name == name))
    };
    let keep = |mut f: Finding| {
        if !f.for_all {
            f.about.retain(is_meant);
        }
        (!f.about.is_empty()).then_some(f)
    };
    findings.into_iter().filter_map(keep).collect()
}

/// The subscriber that a finding is about, if it names one.
fn subscriber_of<'a>(about: &'a str, prefix: Option<&str>) -> Option<&'a str> {
    let quoted = |what: &str| {
        about
            .strip_prefix(what)
            .and_then(|rest| rest.strip_prefix(" `"))
            .and_then(|rest| rest.strip_suffix('`'))
    };
    if let Some(name) = quoted("subscriber").or_else(|| quoted("bindings of")) {
        return Some(name);
    }
    match prefix {
        Some(prefix) => quoted("queue")
            .unwrap_or(about)
            .strip_prefix(prefix)?
            .strip_prefix(".sub.")?
            .split('.')
            .next(),
        None => about.split_once(": ").map(|(name, _)| name),
    }
}

fn nothing_harmful(findings: &[Finding]) -> String {
    let unseen: Vec<String> =
        findings.iter().filter(|f| f.is_unseen()).map(Finding::names).collect();
    if unseen.is_empty() {
        return "# Nothing harmful was found.".to_owned();
    }
    let unseen = visible(&unseen.join("; "));
    format!(
        "# Nothing harmful was found in what was inspected. Not inspected, so not known: {unseen}."
    )
}

fn valid(config: &Config, chosen: &[Arc<Subscriber>]) -> Finding {
    Finding::ok(
        config.path.display().to_string(),
        format!("is valid, with {}", of_them(config, chosen)),
    )
}

/// Each mistake as a finding about its place.
fn mistakes(problems: &ConfigError) -> Vec<Finding> {
    let of = |p: &config::Problem| {
        let place = p.place.map(|(line, column)| format!(":{line}:{column}")).unwrap_or_default();
        let key = if p.key.is_empty() { String::new() } else { format!("{}: ", p.key) };
        Finding::harmful(format!("{}{place}", p.file.display()), format!("{key}{}", p.message))
            .risking("nothing is started with it")
    };
    problems.problems.iter().map(of).collect()
}

fn as_json(findings: &[Finding]) -> Result<(), Failed> {
    for finding in findings {
        print_out(&serde_json::to_string(finding).map_err(|e| Failed::Runtime(e.to_string()))?);
    }
    Ok(())
}

/// Prints a line. A reader that stops early, such as `head`, has the first lines; the exit code
/// says the rest.
fn print_out(line: &str) {
    writeln!(std::io::stdout(), "{line}").ok();
}

fn print_err(line: &str) {
    writeln!(std::io::stderr(), "{line}").ok();
}

/// Prints a finding: good ones as comments, since stdout is a configuration; bad ones to stderr.
fn print(finding: &Finding) {
    let mut text = format!("{}: {}: {}", finding.severity.name(), finding.names(), finding.found);
    for (what, more) in [("risk", &finding.risk), ("remedy", &finding.remedy)] {
        if let Some(more) = more {
            text += &format!("\n  {what}: {more}");
        }
    }
    for line in text.split('\n').map(visible) {
        match finding.severity {
            Severity::Ok | Severity::Note => print_out(&format!("# {line}")),
            Severity::Warning | Severity::Harmful => print_err(&line),
        }
    }
}

async fn inspect_queue(config: &Config) -> Vec<Finding> {
    match &config.queue.backend {
        Backend::Amqp(amqp) => {
            let mut queue = AmqpQueue::new(amqp.clone(), Metrics::new(clock::now()));
            // Without a store of its own there is nothing to compare: no daemon has run here yet.
            if config.store != StoreConfig::None
                && let Ok(id) = recorded_id(&config.queue.embedded.data_dir).await
            {
                queue = queue.with_store(id);
            }
            inspect(queue, &config.subscribers).await
        }
        Backend::Embedded => {
            let mut findings = inspect_embedded(config).await;
            if let Some(intake) = &config.queue.intake {
                findings.extend(inspect_intake(&intake.amqp).await);
            }
            findings
        }
    }
}

async fn inspect_embedded(config: &Config) -> Vec<Finding> {
    let embedded = &config.queue.embedded;
    match EmbeddedQueue::exists(embedded) {
        Ok(true) => {}
        Ok(false) => {
            return vec![Finding::note(
                "data_dir",
                format!(
                    "there is no embedded queue in {} yet; `run` makes it",
                    embedded.data_dir.display()
                ),
            )];
        }
        Err(e) => {
            let risk = "it was not inspected, so it is not known whether events can be lost";
            return vec![Finding::harmful("data_dir", e.to_string()).risking(risk)];
        }
    }
    match EmbeddedQueue::existing(embedded) {
        Ok(queue) => inspect(queue, &config.subscribers).await,
        Err(e) => vec![e.to_finding()],
    }
}

async fn inspect(queue: impl Queue, subscribers: &[Arc<Subscriber>]) -> Vec<Finding> {
    let findings = match tokio::time::timeout(PATIENCE, queue.inspect(subscribers)).await {
        Ok(Ok(findings)) => findings,
        Ok(Err(e)) => vec![e.to_finding()],
        Err(_) => vec![Finding::harmful(
            "queue",
            format!("did not answer all questions within {} s", PATIENCE.as_secs()),
        )],
    };
    queue.close().await;
    findings
}

/// The number of subscribers, and of those chosen if not all are.
fn of_them(config: &Config, chosen: &[Arc<Subscriber>]) -> String {
    let all = counted(config.subscribers.len(), "subscriber(s)");
    if chosen.len() == config.subscribers.len() {
        return all;
    }
    format!("{all}, of which {} asked for", counted(chosen.len(), "(is|are)"))
}

/// The configuration with all defaults, as TOML without secrets; of some subscribers only their
/// part.
fn effective(config: &Config, chosen: &[Arc<Subscriber>]) -> String {
    let subscribers: String = chosen.iter().map(|s| config::subscriber_as_toml(s)).collect();
    if chosen.len() < config.subscribers.len() {
        return format!(
            "# {}: valid, with {}\n{subscribers}",
            config.path.display(),
            of_them(config, chosen)
        );
    }
    let none = if chosen.is_empty() { "\n# no subscribers\n" } else { "" };
    format!(
        "# {}: valid\n{}{subscribers}{none}",
        config.path.display(),
        config::global_as_toml(config)
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::testing;

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
        let printed = effective(&a, &a.subscribers);
        assert!(!printed.contains("hunter2"), "{printed}");
        std::fs::write(&path, &printed).expect("writes");
        let b = config::load(&path).unwrap_or_else(|e| panic!("{e}\n{printed}"));
        assert_eq!(effective(&b, &b.subscribers), printed);
        assert_eq!(
            (&a.subscribers[0].batch, &a.subscribers[0].http, &a.queue.embedded, a.admin.listen),
            (&b.subscribers[0].batch, &b.subscribers[0].http, &b.queue.embedded, b.admin.listen)
        );
    }

    #[test]
    fn a_token_that_can_be_guessed_is_a_warning_that_does_not_show_it() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("h.toml");
        let tables = |own: &str, other: &str| {
            format!(
                "[queue]\nurl = \"embedded\"\n[admin]\ntoken = \"{own}\"\n[[admin.tokens]]\nname = \"ci\"\ntoken = \"{other}\"\nrole = \"read\"\n"
            )
        };
        let (safe, short) = ("0123456789abcdef", "0123456789abcde");
        for (own, other, about) in [
            (safe, "0123456789abcdeg", vec![]),
            (short, safe, vec!["token `token` of [admin]"]),
            (short, "x", vec!["token `token` of [admin]", "token `ci` of [admin]"]),
        ] {
            std::fs::write(&path, tables(own, other)).expect("writes");
            let config = config::load(&path).unwrap_or_else(|e| panic!("{e}"));
            let found = short_tokens(&config);
            assert_eq!(found.iter().map(Finding::names).collect::<Vec<_>>(), about);
            assert!(found.iter().all(|f| f.severity == Severity::Warning));
            assert!(!format!("{found:?}").contains(short), "{found:?}");
        }
    }

    #[test]
    fn what_a_queue_says_of_subscribers_that_were_not_asked_for_is_left_out() {
        let own = |about: &str, prefix| subscriber_of(about, prefix).map(str::to_owned);
        for (about, of_amqp, of_embedded) in [
            ("subscriber `a`", Some("a"), Some("a")),
            ("bindings of `a`", Some("a"), Some("a")),
            ("queue `h.sub.a`", Some("a"), None),
            ("queue `h.sub.a.dead`", Some("a"), None),
            ("h.sub.a.retry", Some("a"), None),
            ("queue `h.delay.07`", None, None),
            ("queue `other.sub.a`", None, None),
            ("a: events to deliver", None, Some("a")),
            ("data_dir", None, None),
            ("broker", None, None),
        ] {
            assert_eq!(own(about, Some("h")).as_deref(), of_amqp, "{about}");
            assert_eq!(own(about, None).as_deref(), of_embedded, "{about}");
        }
        let config = testing::embedded(&["a", "b"].map(|name| testing::table(name, "")).concat());
        let mut of_both = Finding::warning("subscriber `a`", "is odd");
        of_both.about.push("subscriber `b`".to_owned());
        let for_all = Finding::harmful("subscriber `b`", "stops the ladder").harming_all(true);
        let found = vec![
            Finding::ok("b: events to deliver", "1"),
            Finding::ok("data_dir", "is there"),
            of_both,
            for_all,
        ];
        let kept = without_others(
            found,
            &config,
            &chosen(&config, &["a".to_owned()]).expect("it is there"),
        );
        let kept: Vec<_> = kept.iter().map(Finding::names).collect();
        assert_eq!(kept, ["data_dir", "subscriber `a`", "subscriber `b`"]);
    }
}

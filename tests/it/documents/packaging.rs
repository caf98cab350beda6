//! The files shipped with the program: units, container files, examples; and that the documents
//! are true to them.

use std::{collections::BTreeSet, os::unix::net::UnixDatagram, path::Path, time::Duration};

use serde_json::Value;

use crate::support::{
    broker::kill,
    daemon::{QUICK, SECRET, Setup, subscriber},
    run,
};

pub(crate) fn file(path: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// The documents of a YAML text.
pub(crate) fn yaml(text: &str) -> Vec<Value> {
    serde_saphyr::from_multiple(text).unwrap_or_else(|e| panic!("{e}\n{text}"))
}

/// The text of each fenced block of a language.
fn blocks<'t>(document: &'t str, language: &str) -> Vec<&'t str> {
    let fence = format!("\n```{language}\n");
    document
        .split(fence.as_str())
        .skip(1)
        .map(|rest| rest.split("\n```").next().unwrap_or_default())
        .collect()
}

fn duration(text: &str) -> Duration {
    humantime::parse_duration(text).unwrap_or_else(|e| panic!("{text}: {e}"))
}

/// A configuration's value, or the default.
fn shutdown_timeout(config: &str) -> Duration {
    let default = "shutdown_timeout = \"35s\"";
    assert!(
        hooktrail::config::DEFAULT.contains(default),
        "the default has changed: change it here and in docs/operations.md"
    );
    let line = config.lines().find(|l| l.starts_with("shutdown_timeout")).unwrap_or(default);
    duration(line.split('"').nth(1).expect("a value in quotes"))
}

#[test]
fn the_compose_file_gives_the_daemon_longer_to_stop_than_it_takes() {
    let compose = &yaml(&file("docker-compose.yml"))[0];
    let daemon = &compose["services"]["hooktrail"];
    let grace = duration(daemon["stop_grace_period"].as_str().expect("a grace period"));
    assert!(grace > shutdown_timeout(&file("packaging/compose/hooktrail.toml")), "{grace:?}");
    for mount in daemon["volumes"].as_array().expect("its configuration") {
        let source = mount.as_str().and_then(|m| m.split(':').next()).expect("a path");
        file(source.trim_start_matches("./"));
    }
    assert_eq!(
        compose["services"]["hooktrail"]["depends_on"]["rabbitmq"]["condition"],
        "service_healthy"
    );
}

#[test]
fn the_unit_gives_the_daemon_longer_to_stop_than_it_takes() {
    let unit = file("packaging/systemd/hooktrail.service");
    let value = |key: &str| {
        let found = unit.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix('='));
        found.unwrap_or_else(|| panic!("the unit has no {key}"))
    };
    assert!(duration(value("TimeoutStopSec")) > shutdown_timeout(hooktrail::config::DEFAULT));
    assert!(
        duration(value("WatchdogSec")) >= Duration::from_secs(10),
        "a busy machine is not a dead runtime"
    );
    assert_eq!((value("Type"), value("RestartPreventExitStatus")), ("notify", "2"));
    assert_eq!(value("ExecStart"), "/usr/bin/hooktrail --config /etc/hooktrail/hooktrail.toml run");
    assert_eq!(value("StateDirectory"), "hooktrail");
    // scripts/deb writes that directory into the packaged configuration.
    assert_eq!(hooktrail::config::DEFAULT.matches("\ndata_dir = \"data\"\n").count(), 1);
    assert!(file("scripts/deb").contains("data_dir = \"/var/lib/hooktrail\""));
}

#[test]
fn the_service_manager_is_notified_when_the_daemon_is_ready_alive_and_stopping() {
    run(async {
        let setup = Setup::with_text(&format!(
            "[queue]\nurl = \"embedded\"\n{QUICK}{}",
            subscriber("a", "http://127.0.0.1:9/", "")
        ));
        let path = setup.config().with_file_name("notify");
        let socket = UnixDatagram::bind(&path).expect("a socket");
        socket.set_read_timeout(Some(Duration::from_secs(30))).expect("a limit");
        let reported = |what: &str| {
            let mut buffer = [0; 4096];
            let mut all = Vec::new();
            loop {
                let length = socket
                    .recv(&mut buffer)
                    .unwrap_or_else(|e| panic!("never reported `{what}`, but {all:?}: {e}"));
                let text = String::from_utf8_lossy(&buffer[..length]).into_owned();
                let found = text.lines().any(|l| l == what);
                all.push(text);
                if found {
                    return all;
                }
            }
        };
        let daemon = setup.spawn_as(&format!(
            "NOTIFY_SOCKET={} WATCHDOG_USEC=200000 exec \"$0\" \"$@\"",
            path.display()
        ));
        let before = reported("READY=1");
        assert!(before.iter().any(|t| t.contains("STATUS=delivering")), "{before:?}");
        for _ in 0..3 {
            reported("WATCHDOG=1");
        }
        kill("-HUP", daemon.pid());
        let begun = reported("READY=1");
        let begun = begun
            .iter()
            .find(|t| t.contains("RELOADING=1"))
            .expect("a reload that begins before it ends");
        assert!(begun.contains("MONOTONIC_USEC="), "{begun}");
        daemon.terminate();
        reported("STOPPING=1");
        assert!(daemon.stop().await.success());
    });
}

#[test]
fn the_kubernetes_example_is_whole_and_its_configuration_valid() {
    let document = file("docs/operations.md");
    let block = blocks(&document, "yaml")
        .into_iter()
        .find(|b| b.contains("kind: Deployment"))
        .expect("an example");
    let objects = yaml(block);
    let of = |kind: &str, name: &str| {
        let found = objects.iter().find(|o| o["kind"] == kind && o["metadata"]["name"] == name);
        found.unwrap_or_else(|| panic!("no {kind} {name} in\n{block}"))
    };
    let config =
        of("ConfigMap", "hooktrail")["data"]["hooktrail.toml"].as_str().expect("a configuration");
    let pod = &of("Deployment", "hooktrail")["spec"]["template"]["spec"];
    let container = &pod["containers"][0];

    let grace = pod["terminationGracePeriodSeconds"].as_u64().expect("a number");
    assert!(Duration::from_secs(grace) > shutdown_timeout(config));
    assert_eq!(container["livenessProbe"]["httpGet"]["path"], "/healthz");
    assert_eq!(container["readinessProbe"]["httpGet"]["path"], "/readyz");
    let port = &container["ports"][0];
    assert!(
        ["livenessProbe", "readinessProbe"]
            .iter()
            .all(|p| container[p]["httpGet"]["port"] == port["name"])
    );
    assert!(
        config.contains(&format!("listen = \"0.0.0.0:{}\"", port["containerPort"])),
        "{config}"
    );
    assert_eq!(container["securityContext"]["readOnlyRootFilesystem"], true);
    assert_eq!(
        (&pod["securityContext"]["runAsNonRoot"], &pod["securityContext"]["runAsUser"]),
        (&true.into(), &10001.into())
    );

    // The mounted files are there, and the variables that the configuration uses come from the
    // Secret.
    let secret = &of("Secret", "hooktrail")["stringData"];
    assert_eq!(container["envFrom"][0]["secretRef"]["name"], "hooktrail");
    let directory = "file:/run/secrets/hooktrail/";
    let mounted = |name: &str| {
        container["volumeMounts"]
            .as_array()
            .into_iter()
            .flatten()
            .find(|m| m["name"] == name)
            .expect("a mount")
    };
    assert_eq!(
        directory,
        format!("file:{}/", mounted("secrets")["mountPath"].as_str().expect("a path"))
    );
    assert_eq!(mounted("config")["mountPath"], "/etc/hooktrail");
    let files = of("Secret", "hooktrail-secrets")["stringData"].as_object().expect("files");
    let setup = Setup::with_text("");
    for (name, text) in files {
        setup.write(name, text.as_str().expect("text"));
    }
    let here = setup.config();
    let config =
        config.replace(directory, &format!("file:{}/", here.parent().expect("a folder").display()));
    std::fs::write(&here, config).expect("writes");
    let environment: Vec<String> = secret
        .as_object()
        .expect("variables")
        .iter()
        .map(|(k, v)| format!("{k}='{}'", v.as_str().expect("text")))
        .collect();
    let checked = setup.run_as(&format!("{} \"$0\" \"$@\"", environment.join(" ")), &["check"]);
    assert!(checked.status.success(), "{checked:?}");
    assert!(!String::from_utf8_lossy(&checked.stdout).contains(SECRET));
}

#[test]
fn what_the_debian_package_takes_is_there() {
    let manifest: toml::Table = file("Cargo.toml").parse().expect("TOML");
    let deb = &manifest["package"]["metadata"]["deb"];
    let mut made_by_the_script = 0;
    for asset in deb["assets"].as_array().expect("assets") {
        let source = asset[0].as_str().expect("a path");
        match source.strip_prefix("target/package/") {
            Some(name) => {
                assert!(
                    file("scripts/deb").contains(&format!("\"$into/{name}\"")),
                    "scripts/deb does not make {name}"
                );
                made_by_the_script += 1;
            }
            None if source.starts_with("target/release/") => {}
            // A picture is no text.
            None => {
                assert!(Path::new(env!("CARGO_MANIFEST_DIR")).join(source).is_file(), "{source}")
            }
        }
    }
    assert_eq!(made_by_the_script, 5);
    for script in ["postinst", "postrm"] {
        let text = file(&format!("packaging/debian/{script}"));
        assert!(
            text.starts_with("#!/bin/sh\nset -e\n") && text.contains("\n#DEBHELPER#\n"),
            "{script}"
        );
    }
}

#[test]
fn the_links_of_the_operators_document_lead_somewhere() {
    let document = file("docs/operations.md");
    let anchors = anchors(&document);
    let mut links = 0;
    let all = document.split("](").skip(1).filter_map(|rest| rest.split(')').next());
    for link in all.filter(|link| !link.starts_with("https://")) {
        links += 1;
        match link.split_once('#') {
            Some(("", anchor)) => assert!(anchors.contains(anchor), "#{anchor} is no heading"),
            Some((other, anchor)) => {
                let of_other = self::anchors(&file(&format!("docs/{other}")));
                assert!(of_other.contains(anchor), "{link} is no heading");
            }
            None => drop(file(&format!("docs/{link}"))),
        }
    }
    assert!(links > 20, "{links}");
}

/// The anchors that renderers of Markdown give to headings.
pub(crate) fn anchors(document: &str) -> BTreeSet<String> {
    let headings = document
        .lines()
        .filter(|l| l.starts_with('#'))
        .map(|l| l.trim_start_matches('#').trim().to_lowercase());
    headings
        .map(|h| h.replace(' ', "-").chars().filter(|c| c.is_alphanumeric() || *c == '-').collect())
        .collect()
}

/// All code, each string on one line.
fn code(below: &Path, into: &mut String) {
    for entry in std::fs::read_dir(below).expect("a folder") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            code(&path, into);
            continue;
        }
        let text = std::fs::read_to_string(&path).expect("text");
        for (n, part) in text.split("\\\n").enumerate() {
            into.push_str(if n == 0 { part } else { part.trim_start() });
        }
    }
}

#[test]
fn the_messages_that_the_operators_document_explains_are_those_of_the_program() {
    let document = file("docs/operations.md");
    let mut source = String::new();
    code(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut source);
    let table = document.split("\n## Messages\n").nth(1).expect("the section");
    let mut found = 0;
    for row in table.lines().filter(|l| l.starts_with("| `") || l.starts_with("| attempt with")) {
        let quoted = row.split('|').nth(1).expect("a cell").split('`').skip(1).step_by(2);
        for part in
            quoted.flat_map(|q| q.split(['…', '='])).flat_map(|q| q.split("NAME")).map(str::trim)
        {
            let part = part.strip_prefix("N ").unwrap_or(part).trim_start_matches("problems");
            if part.len() > 2 && part != "failure" {
                assert!(source.contains(part), "`{part}` is no message of the program: {row}");
                found += 1;
            }
        }
    }
    assert!(found > 30, "{found}");
}

#[test]
fn the_commands_that_the_documents_name_exist() {
    let help = Setup::with_text("").ok(&["--help"]);
    let commands: BTreeSet<&str> = help
        .lines()
        .filter_map(|l| l.strip_prefix("  ")?.split(' ').next())
        .filter(|c| !c.is_empty())
        .collect();
    let mut seen = 0;
    for path in [
        "docs/operations.md",
        "packaging/prometheus/alerts.yml",
        "packaging/grafana/hooktrail.json",
    ] {
        let text = file(path);
        // In a code span, or a line of a block for a shell.
        let lines = text.split(['`', '\n']).filter_map(|part| {
            part.trim_start().trim_start_matches("sudo -u hooktrail ").strip_prefix("hooktrail ")
        });
        for line in lines.map(|l| {
            l.strip_prefix("--config ")
                .map_or(l, |l| l.split_once(' ').map_or("", |(_, rest)| rest))
        }) {
            let command = line.split([' ', '|']).next().unwrap_or_default();
            if !command.is_empty() && command.chars().all(|c| c.is_ascii_lowercase()) {
                assert!(
                    commands.contains(command),
                    "{path} names `hooktrail {line}`, which is no command"
                );
                seen += 1;
            }
        }
    }
    assert!(seen > 30, "{seen}");
}

//! Holds the code to the layers that `src/lib.rs` draws.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

/// Each file below `src/` and its layer; a file imports only from lower ones.
const LAYERS: &[&[&str]] = &[
    &[
        "address",
        "answer",
        "circuit_breaker",
        "clock",
        "event",
        "failpoint",
        "finding",
        "inflate",
        "payload",
        "resources",
        "retry",
        "secret",
        "turn",
        "wording",
    ],
    &["batch", "delivery", "handshake", "signature", "tls"],
    &["config", "metrics"],
    &["endpoint", "log", "queue", "signal", "webhook"],
    &["status", "verdict"],
    &["rehearsal"],
    &["lane"],
    &["supervisor"],
    &["reload"],
    &["admin", "doctor", "systemd"],
    &["cli"],
    // Not part of the program.
    &["fuzzing"],
];

fn sources(below: &Path, into: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(below).expect("a folder") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            sources(&path, into);
        } else {
            into.push(path);
        }
    }
}

/// The module that a file belongs to, and its text without the tests at its end.
fn modules() -> Vec<(String, PathBuf, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    sources(&root, &mut files);
    let module = |path: PathBuf| {
        let name =
            path.strip_prefix(&root).expect("below").components().next().expect("a name").as_os_str().to_string_lossy().replace(".rs", "");
        let text = std::fs::read_to_string(&path).expect("text");
        let code = text.split("#[cfg(test)]").next().unwrap_or_default().to_owned();
        (name, path, code)
    };
    files.into_iter().map(module).filter(|(name, ..)| !["main", "lib"].contains(&name.as_str())).collect()
}

/// The modules named after `crate::`, groups included.
fn imports(code: &str) -> Vec<String> {
    let word = |text: &str| text.trim_start().chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>();
    let mut names = Vec::new();
    for part in code.split("crate::").skip(1) {
        let Some(group) = part.strip_prefix('{') else {
            names.push(word(part));
            continue;
        };
        let mut depth = 0;
        let mut start = 0;
        for (at, c) in group.char_indices() {
            match c {
                '{' => depth += 1,
                '}' | ',' if depth == 0 => {
                    names.push(word(&group[start..at]));
                    start = at + 1;
                    if c == '}' {
                        break;
                    }
                }
                '}' => depth -= 1,
                _ => {}
            }
        }
    }
    names.retain(|n| !n.is_empty());
    names
}

#[test]
fn a_module_imports_only_from_layers_below_its_own() {
    let layer: BTreeMap<&str, usize> = LAYERS.iter().enumerate().flat_map(|(n, names)| names.iter().map(move |name| (*name, n))).collect();
    let mut seen = 0;
    for (module, path, code) in modules() {
        let own = layer.get(module.as_str()).unwrap_or_else(|| panic!("{} stands in no layer of this test", path.display()));
        for import in imports(&code).iter().filter(|i| **i != module) {
            let other =
                layer.get(import.as_str()).unwrap_or_else(|| panic!("{} imports `{import}`, which stands in no layer", path.display()));
            assert!(other < own, "{} imports `{import}` from its own layer or one above", path.display());
            seen += 1;
        }
    }
    assert!(seen > 30, "only {seen} imports were found: this test reads them wrongly");
}

#[test]
fn each_protocol_is_known_in_one_place() {
    for (name, allowed) in [
        ("lapin", &["src/queue/amqp"][..]),
        ("rusqlite", &["src/queue/embedded"]),
        // The command line asks the daemon with it, and the look at a broker its management API.
        ("reqwest", &["src/webhook", "src/cli/daemon.rs", "src/queue/amqp/management.rs"]),
        ("tokio_rustls", &["src/endpoint.rs", "src/queue/amqp/wire.rs"]),
        // Of its own, it makes the admin listener; of reqwest's errors, it says what they were.
        ("hyper::", &["src/admin/connections.rs", "src/webhook"]),
        ("h2::", &["src/webhook/errors.rs"]),
        ("rustix", &["src/queue/embedded", "src/failpoint.rs", "src/admin/connections.rs", "src/cli/terminal.rs", "src/resources.rs"]),
        ("toml::", &["src/config"]),
        ("backoff::", &["src/retry.rs"]),
        ("clap::", &["src/cli"]),
        ("flate2", &["src/inflate.rs"]),
        ("sd_notify::", &["src/systemd.rs"]),
        ("prometheus_client", &["src/metrics.rs"]),
    ] {
        let mut users = 0;
        for (_, path, code) in modules() {
            let code: String = code.lines().filter(|l| !l.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n");
            if !code.contains(name) {
                continue;
            }
            users += 1;
            let at_home = allowed.iter().any(|a| path.to_string_lossy().contains(a));
            assert!(at_home, "{} uses {name}, which belongs to {allowed:?}", path.display());
        }
        assert!(users > 0, "nobody uses {name}");
    }
}

#[test]
fn only_main_ends_the_process_and_only_the_clock_asks_the_time() {
    for (_, path, code) in modules() {
        assert!(!code.contains("process::exit"), "{}", path.display());
        if !path.ends_with("clock.rs") {
            assert!(!code.contains("SystemTime::now") && !code.contains("Instant::now"), "{}", path.display());
        }
    }
}

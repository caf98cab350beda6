//! The whole output of commands; `support/snapshot.rs` says how a snapshot is changed. The output
//! of `status` and `dead` is in `operating.rs` and `dead_letters.rs`.

use std::{
    collections::BTreeSet,
    process::{Command, Output},
};

use crate::support::{
    daemon::{SECRET, Setup},
    snapshot::{assert_printed, masked, measures, snapshots},
};

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// One with nothing but what it must have, and one that is different in each way.
fn two_subscribers() -> Setup {
    Setup::with_text(&format!(
        r#"
shutdown_timeout = "50s"

[queue]
url = "embedded"
retention = "3d"

[admin]
listen = "127.0.0.1:1"

[[subscriber]]
name = "siem"
url = "https://siem.example/hooks?token=hunter2"
secrets = ["{SECRET}"]

[[subscriber]]
name = "crm"
url = "http://crm.example/"
events = ["activity_log.user.*", "billing.#"]
format = "jsonl"
secrets = ["{SECRET}", "{SECRET}"]
paused = true
batch = {{ max_events = 50, max_bytes = "64KiB", max_wait = "2s" }}
http = {{ timeout = "10s", concurrency = 4, allow_http = true, success = "200" }}
retry = {{ initial_interval = "10s", multiplier = 2.0, max_attempts = 4, on_exhausted = "pause" }}
circuit_breaker = {{ failures = 3, open_for = "1m", max_open_for = "5m" }}
"#
    ))
}

#[test]
fn check_prints_what_a_configuration_means() {
    assert_printed("check", &two_subscribers().ok(&["check"]));
}

#[test]
fn plan_prints_each_attempt_and_what_follows_the_last() {
    assert_printed("plan", &two_subscribers().ok(&["plan"]));
}

#[test]
fn each_mistake_of_a_configuration_is_printed_with_its_place() {
    let setup = Setup::with_text(
        r##"
shutdown_timeout = "soon"

[queue]
url = "amqp://guest:hunter2@127.0.0.1:1/%zz"
prefix = "with spaces"
data_dir = "data"

[admin]
listen = "localhost"

[log]
format = "xml"

[http]
timeuot = "1s"
success = "3xx"
allow_addresses = ["10.0.0.0/40"]

[batch]
max_events = 0
max_bytes = "1PB"

[retry]
multiplier = 0.5
max_attempts = "many"

[[subscriber]]
name = "a.b"
url = "ftp://files.example/"
events = ["a.##"]
secrets = ["short", "${HOOKTRAIL_TEST_NOT_SET}"]

[[subscriber]]
name = "siem"
url = "http://siem.example/"
secrets = []

[[subscriber]]
name = "siem"
url = "https://siem.example/"
signatures = ["none"]
"##,
    );
    let Output { status, stdout, stderr } = setup.run(&["check"]);
    assert_eq!((status.code(), text(&stdout).as_str()), (Some(2), ""));
    assert_printed("configuration_with_mistakes", &text(&stderr));
}

/// The commands that a help text lists.
fn commands(help: &str) -> Vec<String> {
    let lines = help
        .split("\nCommands:\n")
        .nth(1)
        .into_iter()
        .flat_map(str::lines)
        .take_while(|line| !line.is_empty());
    let name = |line: &str| {
        line.strip_prefix("  ")
            .filter(|l| !l.starts_with(' '))
            .and_then(|l| l.split(' ').next())
            .map(str::to_owned)
    };
    lines.filter_map(name).filter(|name| name != "help").collect()
}

#[test]
fn the_program_and_each_command_print_their_help() {
    let mut left = vec![Vec::new()];
    let mut seen = BTreeSet::new();
    while let Some(path) = left.pop() {
        let arguments: Vec<&str> = path.iter().map(String::as_str).chain(["--help"]).collect();
        let mut command = Command::new(env!("CARGO_BIN_EXE_hooktrail"));
        let output = command
            .args(arguments)
            .env_remove("HOOKTRAIL_CONFIG")
            .env("COLUMNS", "100")
            .output()
            .expect("hooktrail runs");
        let help = text(&output.stdout);
        let name = [&["help".to_owned()], &path[..]].concat().join("_");
        assert_printed(&name, &help);
        seen.insert(format!("{name}.snap"));
        left.extend(commands(&help).into_iter().map(|command| [&path[..], &[command]].concat()));
    }
    assert!(seen.len() > 20, "this test reads the help wrongly: {seen:?}");
    let files = std::fs::read_dir(snapshots())
        .expect("a folder")
        .map(|e| e.expect("an entry").file_name().into_string().expect("text"));
    let of_help: BTreeSet<String> = files.filter(|name| name.starts_with("help")).collect();
    assert_eq!(of_help, seen, "a snapshot of a command that is gone is to be deleted");
}

#[test]
fn a_snapshot_hides_what_is_another_each_time_and_nothing_else() {
    let folder = std::env::temp_dir().join(".tmpAbc123/data");
    let printed = format!(
        "msg_0123456789abcdef0123456789abcdef_01 2026-01-31T08:00:00.123Z 127.0.0.1:18999 127.0.0.1:9 {} µs",
        folder.display()
    );
    assert_eq!(
        masked(&printed),
        "msg_[id]_01 [time] 127.0.0.1:[port] 127.0.0.1:9 [folder]/data µs"
    );
    let others = "msg_01 2026-01-31 08:00 127.0.0.2:18999 30s";
    assert_eq!(masked(others), others);
    assert_eq!(
        measures("a  <1ms  1h 2m  99.5% <b> 3"),
        "a  [duration]  [duration]  [number]% <b> 3"
    );
}

//! `hooktrail demo`: on a machine with nothing else, and on a RabbitMQ.

use std::process::{Command, Output, Stdio};

use crate::support::tests_that_need;

tests_that_need!(broker: does_the_same_on_a_rabbitmq);

fn demo(arguments: &[&str]) -> (Output, tempfile::TempDir) {
    let temporary = tempfile::tempdir().expect("a directory");
    let mut c = Command::new(env!("CARGO_BIN_EXE_hooktrail"));
    let output = c
        .arg("demo")
        .args(arguments)
        .env("TMPDIR", temporary.path())
        .stdin(Stdio::null())
        .output()
        .expect("hooktrail runs");
    (output, temporary)
}

fn shows_everything(output: &Output) {
    let reported = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{reported}{}", String::from_utf8_lossy(&output.stderr));
    for part in [
        "events published",
        "signature verified",
        "answered 503: attempt 1 of a batch of",
        "again in",
        "circuit open",
        "circuit closed",
        "a dead letter (too_large)",
        "is halved",
        "is a dead letter (refused)",
        "Every event is accounted for.",
        "Try next:",
    ] {
        assert!(reported.contains(part), "`{part}` is not in:\n{reported}");
    }
    assert!(!reported.contains('\u{1b}'), "a pipe gets plain lines");
    // Its own account, added up again.
    let published: u32 = reported
        .split(" events published to each")
        .next()
        .and_then(|t| t.lines().last())
        .and_then(|n| n.parse().ok())
        .expect("a number");
    let sums: Vec<u32> = reported
        .lines()
        .filter_map(|l| l.split(" in dead letters = ").nth(1))
        .filter_map(|n| n.split(' ').next()?.parse().ok())
        .collect();
    assert_eq!(sums, [published, published], "{reported}");
}

#[test]
fn needs_nothing_and_accounts_for_every_event() {
    let (output, temporary) = demo(&["--for", "12s"]);
    shows_everything(&output);
    let left = std::fs::read_dir(temporary.path()).expect("reads").count();
    assert_eq!(left, 0, "it cleans up after itself");
}

fn does_the_same_on_a_rabbitmq() {
    let url = crate::support::broker::Broker::shared().url.clone();
    let (output, _temporary) = demo(&["--for", "12s", "--amqp", &url]);
    shows_everything(&output);
}

#[test]
fn a_url_that_is_none_is_refused_and_not_repeated() {
    let (output, _temporary) = demo(&["--amqp", "http://u:hunter2@x"]);
    let reported = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "{reported}");
    assert!(
        reported.contains("--amqp is not the URL of a RabbitMQ") && !reported.contains("hunter2"),
        "{reported}"
    );
}

//! `hooktrail demo`: on a machine with nothing else, and on a RabbitMQ.

use std::{
    io::{BufRead as _, BufReader, Read as _},
    process::{Command, Output, Stdio},
};

use super::console::Browser;
use crate::support::{eventually, run, tests_that_need};

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
        "in a browser: http://127.0.0.1:",
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

#[test]
fn its_console_takes_the_token_that_it_prints_and_what_is_done_there_is_not_called_a_loss() {
    let temporary = tempfile::tempdir().expect("a directory");
    let mut demo = Command::new(env!("CARGO_BIN_EXE_hooktrail"))
        .args(["demo", "--for", "6s"])
        .env("TMPDIR", temporary.path())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .expect("hooktrail runs");
    let mut lines = BufReader::new(demo.stdout.take().expect("a pipe"));
    let mut behind = |words: &str| {
        let mut line = String::new();
        while !line.contains(words) {
            line.clear();
            assert!(lines.read_line(&mut line).expect("text") > 0, "`{words}` is not printed");
        }
        line.split(words).nth(1).expect("it is there").trim().to_owned()
    };
    let (address, token) = (behind("in a browser: "), behind("with the token "));
    // No other user reads it in the list of processes.
    let shown = std::fs::read(format!("/proc/{}/cmdline", demo.id())).expect("it runs");
    assert!(!String::from_utf8_lossy(&shown).contains(&token));
    run(async {
        let port = address.split(&[':', '/'][..]).nth(4).and_then(|port| port.parse().ok());
        let port: u16 = port.unwrap_or_else(|| panic!("no port in {address}"));
        let browser = Browser::signed_in_at(port, &token).await;
        eventually("both receivers are shown, and history has events", async || {
            let page = browser.page("/console/").await;
            let has_both = page.contains("/webhooks/siem") && page.contains("/webhooks/crm");
            // The store is being opened at first.
            has_both && browser.get("/console/events").await.text.contains("activity_log.")
        })
        .await;
        let asked = browser.page("/console/webhooks/crm/pause").await;
        let own = super::console::key(&asked);
        let form = [("form_key", own.as_str()), ("why", "a look")];
        let seen = browser.post("/console/webhooks/crm/pause", &form, &[]).await;
        assert_eq!(seen.status, 303, "{}", seen.text);
    });
    let mut rest = String::new();
    lines.read_to_string(&mut rest).expect("text");
    let ended = demo.wait().expect("ends");
    assert!(ended.success() && rest.contains("after what was done in the console"), "{rest}");
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

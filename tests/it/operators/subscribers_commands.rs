//! `hooktrail subscribers`: the API's subscribers from the shell.

use std::{
    io::Write as _,
    process::{Output, Stdio},
};

use serde_json::{Value, json};

use crate::support::{
    api::Api,
    daemon::{QUICK, SECRET, Setup, subscriber},
    eventually,
    queue::{Queue, on_both_queues},
    receiver::{Receiver, event},
};

on_both_queues!(
    one_is_made_shown_changed_exported_and_removed_from_the_shell,
    what_somebody_else_has_changed_meanwhile_is_not_overwritten,
);

/// A daemon that manages subscribers, and has one of its file: `file`.
async fn managing(queue: &Queue, url: &str) -> (Setup, crate::support::daemon::Daemon) {
    let api = Api::new();
    let setup = Setup::new(
        queue,
        &(api.section()
            + "token = \"quite-secret\"\nmanage = true\n"
            + "[admin.api_subscribers]\nallow_http = true\nallow_addresses = [\"127.0.0.0/8\"]\n"
            + QUICK
            + &subscriber("file", url, "events = [\"none\"]")),
    );
    let daemon = setup.start().await;
    // After a start the store is opened while the daemon delivers already.
    eventually("the store is open", async || {
        let made = run(&setup, &["add", "first", "--url", "http://127.0.0.1:9/", "--json"], "");
        made.status.success()
    })
    .await;
    ok(&setup, &["remove", "first", "--backlog", "drop", "--yes"], "");
    (setup, daemon)
}

/// Runs a command of `subscribers` with this standard input.
fn run(setup: &Setup, arguments: &[&str], input: &str) -> Output {
    let arguments: Vec<&str> = ["subscribers"].iter().chain(arguments).copied().collect();
    let mut command = setup.command(&arguments);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("hooktrail runs");
    // One that reads nothing may have ended.
    child.stdin.take().expect("piped").write_all(input.as_bytes()).ok();
    child.wait_with_output().expect("ends")
}

#[track_caller]
fn ok(setup: &Setup, arguments: &[&str], input: &str) -> String {
    let output = run(setup, arguments, input);
    assert!(output.status.success(), "{arguments:?}: {output:?}");
    String::from_utf8(output.stdout).expect("text")
}

/// The error of a command that must fail with this code; nothing is printed but that.
#[track_caller]
fn fails(setup: &Setup, code: i32, arguments: &[&str], input: &str) -> String {
    let output = run(setup, arguments, input);
    assert!(output.status.code() == Some(code) && output.stdout.is_empty(), "{output:?}");
    String::from_utf8(output.stderr).expect("text")
}

fn read(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"))
}

async fn one_is_made_shown_changed_exported_and_removed_from_the_shell(queue: Queue) {
    let receiver = Receiver::accepting().await;
    let (setup, _daemon) = managing(&queue, &receiver.url).await;
    // Everything secret comes from a file or by a pipe.
    let keys = json!({ "headers": { "X-Key": "hunter2" }, "batch": { "max_events": 7 } });
    let keys = setup.write("keys.json", keys.to_string());
    let from = keys.to_str().expect("a path");
    let secret_url = format!("{}?k=hunter2", receiver.url);
    let why = fails(&setup, 2, &["add", "siem", "--url", &secret_url], "");
    assert!(why.contains("--url-file") && !why.contains("hunter2"), "{why}");
    let add = ["add", "siem", "--from", from, "--url-file", "-", "--events", "user.*"];
    let made = ok(&setup, &add, &format!("{secret_url}\n"));
    let secrets: Vec<&str> = made.lines().filter(|line| line.starts_with("whsec_")).collect();
    assert!(secrets.len() == 1 && made.contains("count from"), "{made}");
    assert!(fails(&setup, 1, &add, &secret_url).contains("there is a subscriber of this name"));
    let wrong = ["add", "b", "--url", "ftp://siem.example/", "--format", "xml"];
    let wrong = fails(&setup, 1, &wrong, "");
    assert!(wrong.contains("`url`") && wrong.contains("`format`"), "each mistake: {wrong}");
    queue.publish("user.created", [event(0)]).await;
    let requests = receiver.wait_requests(1).await;
    assert_eq!(requests[0].header("x-key"), "hunter2");

    // It is shown with its version, and without its secrets.
    let shown = ok(&setup, &["show", "siem"], "");
    for part in
        ["# siem: ok", "over the API, version ", "made by token at ", "batch.max_events = 7"]
    {
        assert!(shown.contains(part), "{part}: {shown}");
    }
    let all = read(&ok(&setup, &["list", "--json"], ""));
    let names = |all: &Value| {
        let names = all["subscribers"].as_array().expect("a list").iter();
        names.map(|one| one["subscriber"].as_str().expect("a name").to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(names(&all), ["file", "siem"]);
    let table = ok(&setup, &["list"], "");
    assert!(table.contains("hooktrail.toml:") && table.contains("API, token"), "{table}");

    // Keys that are not named stay.
    let set = ["set", "siem", "--events", "order.*", "--unset", "batch.max_events", "--json"];
    let changed = read(&ok(&setup, &set, ""));
    let details = read(&ok(&setup, &["show", "siem", "--json"], ""));
    assert_eq!(details["origin"]["version"], changed["version"]);
    assert_eq!(details["settings"]["events"], json!(["order.*"]));
    assert_ne!(details["settings"]["batch"]["max_events"], 7);
    ok(&setup, &["set", "siem", "--secret-file", "-"], SECRET);
    receiver.take_requests();
    queue.publish("user.created", [event(1)]).await;
    queue.publish("order.paid", [event(2)]).await;
    let requests = receiver.wait_requests(1).await;
    assert!(requests[0].verified() && requests[0].header("x-key") == "hunter2", "{requests:?}");
    assert_eq!(requests[0].numbers(), [2]);

    // In a file it is the same.
    let exported = ok(&setup, &["export"], "");
    assert!(exported.contains("url = \"${SIEM_URL}\"") && !exported.contains("file"), "{exported}");
    assert!(exported.contains("secrets = [\"${SIEM_SECRET}\"]"), "{exported}");
    for text in [&shown, &table, &exported, &details.to_string(), &all.to_string()] {
        assert!(!text.contains("hunter2") && !text.contains("whsec_"), "{text}");
    }
    let why = fails(&setup, 1, &["export", "siem", "file"], "");
    assert!(why.contains("it is in a file already"), "{why}");

    assert!(fails(&setup, 2, &["remove", "siem", "--backlog", "drop"], "").contains("--yes"));
    let would = ok(&setup, &["remove", "siem", "--backlog", "drop", "--dry-run"], "");
    assert!(would.contains("would remove `siem`") && would.contains("0 events"), "{would}");
    let removed = ok(&setup, &["remove", "siem", "--backlog", "drop", "--yes"], "");
    assert!(removed.contains("with its events"), "{removed}");
    assert!(fails(&setup, 1, &["show", "siem"], "").contains("no subscriber of that name"));
    for command in [
        &["set", "file", "--events", "a"][..],
        &["remove", "file", "--backlog", "keep"],
        &["remove", "file", "--backlog", "keep", "--dry-run"],
    ] {
        assert!(fails(&setup, 1, command, "").contains("hooktrail.toml:"), "{command:?}");
    }
    for command in [
        &["show", "../siem"][..],
        &["set", "siem"],
        &["remove", "siem"],
        &["add", "b", "--from", "-", "--url-file", "-"],
        &["add", "b", "--from", "absent.json"],
        &["add", "b", "--from", from, "--secret-file", "/dev/null"],
    ] {
        fails(&setup, 2, command, "{}");
    }
    assert_eq!(names(&read(&ok(&setup, &["list", "--json"], ""))), ["file"]);
}

async fn what_somebody_else_has_changed_meanwhile_is_not_overwritten(queue: Queue) {
    let receiver = Receiver::accepting().await;
    let (setup, _daemon) = managing(&queue, &receiver.url).await;
    ok(&setup, &["add", "siem", "--url", &receiver.url, "--events", "a", "--paused"], "");
    queue.publish("a", [event(0)]).await;
    queue.wait_backlog("siem", 1).await;
    let version = |shown: &str| {
        let version = shown.split("version ").nth(1).expect("a version").split(',').next();
        version.expect("a number").to_owned()
    };
    let before = version(&ok(&setup, &["show", "siem"], ""));
    ok(&setup, &["set", "siem", "--events", "b", "--if-version", &before], "");
    let now = version(&ok(&setup, &["show", "siem"], ""));
    for command in [
        &["set", "siem", "--events", "c", "--if-version", &before][..],
        &["remove", "siem", "--backlog", "drop", "--yes", "--if-version", &before],
        &["remove", "siem", "--backlog", "drop", "--dry-run", "--if-version", &before],
    ] {
        let why = fails(&setup, 1, command, "");
        for part in ["nothing was done", &now, "API, token", "hooktrail subscribers show siem"] {
            assert!(why.contains(part), "{part}: {why}");
        }
    }
    let details = read(&ok(&setup, &["show", "siem", "--json"], ""));
    assert_eq!(details["settings"]["events"], json!(["b"]));
    let keep = ["remove", "siem", "--backlog", "keep", "--if-version", &now];
    assert!(ok(&setup, &keep, "").contains("are kept"));
    // One of its name would get what is kept.
    let again = ["add", "siem", "--url", &receiver.url];
    let why = fails(&setup, 1, &again, "");
    assert!(why.contains("1 event, ") && why.contains("hooktrail prune siem"), "{why}");
    assert!(receiver.requests().is_empty(), "it was made paused");
}

//! The log, with a reader and without.

use crate::support::{
    api::Api,
    daemon::{QUICK, Setup, subscriber},
    eventually,
    queue::{Queue, Section, on_both_queues},
    receiver::{Receiver, event},
    run,
};

on_both_queues!(a_log_without_a_reader_holds_up_nothing);

const TYPE: &str = "activity_log.user.updated";

async fn a_log_without_a_reader_holds_up_nothing(queue: Queue) {
    /// Each has a line of its own of some 200 bytes: far more than a pipe takes.
    const EVENTS: u64 = 800;
    let (receiver, api) = (Receiver::accepting().await, Api::new());
    let text = queue.section(&["a"])
        + &QUICK.replace("max_wait = \"100ms\"", "max_wait = \"0s\"\nmax_events = 1")
        + &api.section()
        + &subscriber("a", &receiver.url, "");
    let setup = Setup::with_text(&text);
    let mut daemon = setup.piped();
    daemon.read_until("running");
    queue.publish(TYPE, (0..EVENTS).map(event)).await;
    receiver.wait_all(EVENTS).await;
    assert_eq!(api.get("/healthz").await.status, 200);
    let answer = api.post("/api/v1/events", &event(EVENTS)).await;
    assert_eq!(answer.status, 202, "{answer:?}");
    receiver.wait_all(EVENTS + 1).await;
    assert!(daemon.stop().await.success());
}

#[test]
fn what_was_dropped_is_reported_when_it_is_read_again() {
    run(async {
        let api = Api::new();
        // Each refused reload leaves a line as long as this key.
        let long = "x".repeat(4000);
        let text =
            |key: &str| format!("[queue]\nurl = \"embedded\"\n{}[log]\n{key}\n", api.section());
        let setup = Setup::with_text(&text("level = \"info\""));
        let mut daemon = setup.piped();
        daemon.read_until("running");
        std::fs::write(setup.config(), text(&format!("{long} = 1"))).expect("writes");
        let dropped =
            async || api.metric("hooktrail_log_lines_dropped_total").await.expect("a figure");
        assert!(dropped().await < 0.5);
        eventually("lines are dropped", async || {
            for _ in 0..100 {
                assert_eq!(api.post("/api/v1/reload", "{}").await.status, 422);
            }
            dropped().await > 0.5
        })
        .await;
        let counted = dropped().await;
        let line = daemon.read_until("were dropped");
        let number = line.rsplit_once("lines=").expect("how many").1.trim().parse();
        assert_eq!(number, Ok(counted), "{line}");
        assert!(line.contains("WARN"), "{line}");
        assert!(daemon.stop().await.success());
        daemon.read_until("stopped");
    });
}

#[test]
fn a_fatal_error_is_json_where_the_log_is() {
    for (text, code, part) in [
        (
            "[queue]\nurl = \"embedded\"\n[http]\ntimeuot = 1\n",
            2,
            "hooktrail.toml:4:1: http.timeuot",
        ),
        ("[queue]\nurl = \"embedded\"\ndata_dir = \"/dev/null/x\"\n", 1, "/dev/null/x"),
    ] {
        let setup = Setup::with_text(&format!("{text}[log]\nformat = \"json\"\n"));
        let output = setup.run(&["run"]);
        let reported = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{reported}");
        let lines: Vec<serde_json::Value> = reported
            .lines()
            .map(|l| serde_json::from_str(l).unwrap_or_else(|e| panic!("{e}: {l}")))
            .collect();
        let last = lines.last().expect("a line");
        assert!(
            last["level"] == "ERROR" && last["error"].as_str().is_some_and(|e| e.contains(part)),
            "{reported}"
        );
        // In text it is as a command prints it.
        let plain = Setup::with_text(text).run(&["run"]);
        let reported = String::from_utf8_lossy(&plain.stderr).into_owned();
        assert!(
            plain.status.code() == Some(code)
                && reported.contains(part)
                && !reported.contains("ERROR"),
            "{reported}"
        );
    }
}

#[test]
fn the_level_of_the_log_changes_while_the_daemon_runs() {
    run(async {
        let api = Api::new();
        let text = |level: &str| {
            format!("[queue]\nurl = \"embedded\"\n{}[log]\nlevel = \"{level}\"\n", api.section())
        };
        let setup = Setup::with_text(&text("info"));
        let daemon = setup.start().await;
        let reload = |level: &str| {
            std::fs::write(setup.config(), text(level)).expect("writes");
            setup.ok(&["reload"])
        };
        // The daemon may have noticed the file by itself.
        let changed = reload("warn");
        assert!(
            ["changed log.level\n", "Nothing has changed.\n"].contains(&changed.as_str()),
            "{changed}"
        );
        let before = daemon.log();
        reload("warn");
        assert_eq!(daemon.log(), before);
        reload("info");
        daemon.wait_log("settings=\"log.level\"").await;
        assert!(daemon.stop().await.success());
    });
}

#[test]
fn lines_for_the_journal_begin_with_their_priority() {
    run(async {
        let api = Api::new();
        let setup = Setup::with_text(&format!("[queue]\nurl = \"embedded\"\n{}", api.section()));
        // JOURNAL_STREAM as systemd sets it: device and inode of stderr.
        let daemon =
            setup.spawn_as("JOURNAL_STREAM=$(stat -L -c %d:%i /proc/self/fd/2) exec \"$0\" \"$@\"");
        daemon.wait_log("running").await;
        let log = daemon.log();
        for (line, priority) in [("no [[subscriber]]", "<4>"), ("running", "<6>")] {
            let found = log.lines().find(|l| l.contains(line)).expect("logged");
            assert!(found.starts_with(priority), "{found}");
        }
        assert!(daemon.stop().await.success());
        // It was inherited by a process whose stderr is another.
        let daemon = setup.spawn_as("JOURNAL_STREAM=1:1 exec \"$0\" \"$@\"");
        daemon.wait_log("running").await;
        assert!(!daemon.log().contains('<'), "{}", daemon.log());
        assert!(daemon.stop().await.success());
    });
}

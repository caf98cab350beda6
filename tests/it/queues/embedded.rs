//! Promises of the embedded queue only: one daemon and one file.

use std::{
    fs::Permissions,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::Path,
    process::{Command, Output},
    time::{Duration, Instant},
};

use bytes::Bytes;
use rusqlite::Connection;

use crate::support::{
    api::Api,
    broker::{Broker, kill},
    daemon::{QUICK, Setup, subscriber},
    eventually,
    queue::{Embedded, Section as _},
    receiver::{Receiver, event, status},
    run, tests_that_need,
};

tests_that_need!(broker: a_change_to_a_broker_with_events_left_behind_is_refused_unless_it_is_forced);

const TYPE: &str = "activity_log.user.updated";
const NOWHERE: &str = "http://127.0.0.1:9/";

fn events(range: std::ops::Range<u64>) -> impl Iterator<Item = Bytes> {
    range.map(|n| event(n).into())
}

/// A command that must fail: its exit code and what it said.
fn refused(output: &Output) -> (Option<i32>, String) {
    (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
}

fn one(queue: &Embedded, url: &str) -> Setup {
    Setup::new(queue, &(QUICK.to_owned() + &subscriber("a", url, "")))
}

#[test]
fn a_second_daemon_is_refused_and_the_first_notices_nothing() {
    run(async {
        let queue = Embedded::new();
        let receiver = Receiver::accepting().await;
        let setup = one(&queue, &receiver.url);
        assert!(
            setup.ok(&["check", "--connect"]).contains("there is no embedded queue in"),
            "before the first run"
        );
        let daemon = setup.start().await;
        let (code, reported) = refused(&setup.run(&["run"]));
        assert_eq!(code, Some(1), "{reported}");
        for part in [
            "another daemon works on",
            queue.data_dir().to_str().expect("a path"),
            "several share a RabbitMQ",
        ] {
            assert!(reported.contains(part), "{part} is not in {reported}");
        }
        queue.publish(TYPE, None, events(0..10)).await;
        receiver.wait_all(10).await;
        daemon.kill();
        // The lock ends with its process, however that ended.
        let next = setup.start().await;
        assert!(next.stop().await.success());
    });
}

fn a_change_to_a_broker_with_events_left_behind_is_refused_unless_it_is_forced() {
    run(async {
        let queue = Embedded::new();
        let receiver = Receiver::accepting().await;
        let embedded = one(&queue, &receiver.url);
        let nothing = embedded.write("nothing", "");
        embedded.ok(&["publish", nothing.to_str().expect("a path")]);
        queue.publish(TYPE, None, events(0..3)).await;
        let broker = Broker::shared();
        let section =
            broker.section(&["a"]) + &format!("data_dir = \"{}\"\n", queue.data_dir().display());
        let amqp = Setup::with_text(&(section + QUICK + &subscriber("a", &receiver.url, "")));
        let (code, reported) = refused(&amqp.run(&["run"]));
        assert_eq!(code, Some(2), "{reported}");
        for part in [
            "holds events that are not delivered",
            queue.data_dir().to_str().expect("a path"),
            "--force",
        ] {
            assert!(reported.contains(part), "{part} is not in {reported}");
        }
        let forced = amqp.spawn_as("exec \"$0\" \"$@\" --force");
        forced.wait_log("running").await;
        assert!(forced.stop().await.success());
        assert_eq!(queue.backlog("a").await, 3, "they stay where they are");
        // Once they are delivered, nothing stands in the way.
        let daemon = embedded.start().await;
        receiver.wait_all(3).await;
        assert!(daemon.stop().await.success());
        assert!(amqp.start().await.stop().await.success());
        assert_eq!(receiver.count(), 1);
    });
}

#[test]
fn a_backlog_keeps_the_patterns_under_which_it_came_and_a_gap_stays_a_gap() {
    run(async {
        let queue = Embedded::new();
        let hanging = Receiver::start(|_, _| status(200).after(Duration::from_secs(3600))).await;
        let all = Receiver::accepting().await;
        let setup = |patterns: Option<&str>, url: &str| {
            let a = patterns
                .map_or_else(String::new, |p| subscriber("a", url, &format!("events = [\"{p}\"]")));
            Setup::new(&queue, &(QUICK.to_owned() + &subscriber("all", &all.url, "") + &a))
        };
        let (old, new, none) =
            (setup(Some("x.*"), &hanging.url), setup(Some("y.*"), &hanging.url), setup(None, ""));
        let mut next = 0;
        let mut changes = Vec::new();
        for setup in [&old, &new, &none] {
            let daemon = setup.start().await;
            queue.publish("x.1", None, events(next..next + 3)).await;
            queue.publish("y.1", None, events(next + 3..next + 6)).await;
            next += 6;
            all.wait_all(next).await;
            queue.wait("all is settled", async || queue.backlog("all").await == 0).await;
            changes.push(daemon.log());
            daemon.kill(); // what hangs was not delivered
        }
        assert!(changes[1].contains("subscriber `a`: its patterns have changed"), "{}", changes[1]);
        assert!(changes[2].contains("subscriber `a` is not configured any more"), "{}", changes[2]);
        assert_eq!(queue.backlog("a").await, 6);
        let receiver = Receiver::accepting().await;
        let again = setup(Some("y.*"), &receiver.url);
        let daemon = again.start().await;
        queue.publish("y.1", None, events(next..next + 3)).await;
        eventually("nine events", async || receiver.accepted().len() >= 9).await;
        assert!(daemon.stop().await.success());
        assert_eq!(receiver.accepted(), [0, 1, 2, 9, 10, 11, 18, 19, 20]);
        assert_eq!(queue.backlog("a").await, 0);
    });
}

#[test]
fn an_event_that_matches_no_subscriber_is_stored_if_there_is_history_and_survives_a_kill() {
    run(async {
        let receiver = Receiver::accepting().await;
        for (history, stored) in [("", 3_u32), ("[history]\nretention = \"0s\"\n", 0)] {
            let queue = Embedded::new();
            let a = subscriber("a", &receiver.url, "events = [\"x.*\"]");
            let api = Api::new();
            let setup = Setup::new(&queue, &(history.to_owned() + &api.section() + QUICK + &a));
            let pad = "y".repeat(5000);
            let unmatched = format!("{{\"event\":\"y.1\",\"pad\":\"{pad}\"}}");
            let post = async || {
                let answer = api.post("/api/v1/events", &unmatched).await;
                assert_eq!(answer.status, 202, "{}", answer.text);
                assert_eq!(answer.json()["unmatched"], 1);
            };
            let daemon = setup.start().await;
            post().await;
            let file = setup.write("event", &unmatched);
            setup.ok(&["publish", file.to_str().expect("a path")]);
            daemon.kill();
            let daemon = setup.start().await;
            post().await;
            let db = Connection::open(queue.file()).expect("opens");
            let rows = "SELECT count(*) FROM event WHERE only_for = '' AND length(body) > 5000";
            assert_eq!(db.query_row(rows, [], |r| r.get(0)), Ok(stored), "{history}");
            assert_eq!(queue.backlog("a").await, 0, "it waits for nobody");
            assert!(daemon.stop().await.success());
        }
        assert_eq!(receiver.accepted(), [0; 0], "nor is it delivered to anyone");
    });
}

#[test]
fn a_damaged_file_is_named_and_what_to_do_is_told() {
    run(async {
        let queue = Embedded::new();
        let setup = one(&queue, NOWHERE);
        std::fs::create_dir_all(queue.data_dir()).expect("a directory");
        std::fs::write(queue.file(), "this was a database once ".repeat(1000)).expect("writes");
        let event = setup.write("event", event(0));
        for command in [
            &["run"][..],
            &["publish", event.to_str().expect("a path")],
            &["dead", "list", "a"],
            &["check", "--connect"],
        ] {
            let (code, reported) = refused(&setup.run(command));
            assert_eq!(code, Some(1), "{command:?}: {reported}");
            for part in [
                queue.file().to_str().expect("a path"),
                "the file is damaged",
                "keep a copy",
                "Disaster recovery",
            ] {
                assert!(reported.contains(part), "{command:?}: {part} is not in {reported}");
            }
        }
    });
}

#[test]
fn a_file_of_a_later_version_or_of_another_program_is_refused_and_an_empty_one_is_used() {
    run(async {
        let queue = Embedded::new();
        let receiver = Receiver::accepting().await;
        let setup = one(&queue, &receiver.url);
        let refuses = |part: &str| {
            for command in [&["run"][..], &["dead", "list", "a"]] {
                let (code, reported) = refused(&setup.run(command));
                assert_eq!(code, Some(1), "{command:?}: {reported}");
                assert!(
                    reported.contains(part)
                        && reported.contains(queue.file().to_str().expect("a path")),
                    "{command:?}: {reported}"
                );
            }
        };
        std::fs::create_dir_all(queue.data_dir()).expect("a directory");
        let db = |sql: &str| {
            Connection::open(queue.file()).expect("opens").execute_batch(sql).expect("runs")
        };
        for sql in
            ["CREATE TABLE other (x)", "PRAGMA user_version = 7", "PRAGMA application_id = 7"]
        {
            db(sql);
            refuses("another program");
            std::fs::remove_file(queue.file()).expect("removes");
        }
        // Nothing in it: that is how a file begins.
        std::fs::write(queue.file(), "").expect("writes");
        let daemon = setup.start().await;
        queue.publish(TYPE, None, events(0..3)).await;
        receiver.wait_all(3).await;
        assert!(daemon.stop().await.success());
        let version: i64 = Connection::open(queue.file())
            .expect("opens")
            .pragma_query_value(None, "user_version", |r| r.get(0))
            .expect("a version");
        db(&format!("PRAGMA user_version = {}", version + 1));
        refuses("was written by a later version of hooktrail");
        db(&format!("PRAGMA user_version = {version}"));
        assert!(setup.start().await.stop().await.success());
        assert_eq!(receiver.accepted(), [0, 1, 2], "each once");
    });
}

#[test]
fn what_other_processes_write_is_picked_up_within_a_second() {
    run(async {
        let queue = Embedded::new();
        let receiver = Receiver::start(|_, _| status(500)).await;
        let setup = Setup::new(
            &queue,
            &(QUICK.to_owned() + &subscriber("a", &receiver.url, "retry = { max_attempts = 1 }")),
        );
        let _daemon = setup.start().await;
        let file = setup.write("event", event(0));
        let publish = ["publish", file.to_str().expect("a path")];
        // Once the first is settled nothing of the daemon's own goes on any more that could wake
        // it.
        setup.ok(&publish);
        queue.wait("a dead letter", async || queue.dead("a").await == 1).await;
        setup.ok(&publish);
        let start = Instant::now();
        receiver.wait_requests(2).await;
        assert!(start.elapsed() < Duration::from_secs(1), "an event waited {:?}", start.elapsed());
        queue.wait("another one", async || queue.dead("a").await == 2).await;
        receiver.now(|_, _| status(200));
        setup.ok(&["dead", "replay", "a", "@1"]);
        let start = Instant::now();
        receiver.wait_requests(3).await;
        assert!(start.elapsed() < Duration::from_secs(1), "a replay waited {:?}", start.elapsed());
        queue.wait("it is settled", async || queue.retries("a").await == 0).await;
    });
}

#[test]
fn events_are_refused_when_the_file_is_deleted_under_the_daemon_and_what_it_holds_can_be_copied_out()
 {
    run(async {
        let (queue, api) = (Embedded::new(), Api::new());
        let receiver = Receiver::start(|_, _| status(500)).await;
        let setup = Setup::new(
            &queue,
            &(QUICK.to_owned() + &api.section() + &subscriber("a", &receiver.url, "")),
        );
        let mut daemon = setup.start().await;
        assert_eq!(api.post("/api/v1/events", &event(0)).await.status, 202);
        receiver.wait_requests(1).await;
        std::fs::remove_file(queue.file()).expect("removes");

        let mut refused_with = String::new();
        eventually("events are refused", async || {
            let answer = api.post("/api/v1/events", &event(1)).await;
            refused_with = answer.text;
            answer.status == 503
        })
        .await;
        assert!(
            refused_with.contains("is lost") && refused_with.contains("/proc/"),
            "{refused_with}"
        );
        assert_eq!(api.get("/readyz").await.status, 503);
        assert_eq!(api.metric("hooktrail_queue_up").await, Some(0.0));
        eventually("status says so", async || {
            api.get("/api/v1/subscribers").await.json()["queue"]["error"]
                .as_str()
                .is_some_and(|why| why.contains("is lost"))
        })
        .await;
        let file = setup.write("event", event(2));
        for command in [&["publish", file.to_str().expect("a path")][..], &["dead", "list", "a"]] {
            let (code, reported) = refused(&setup.run(command));
            assert!(
                code == Some(1)
                    && reported.contains("is lost")
                    && reported.contains(&daemon.pid().to_string()),
                "{command:?}: {reported}"
            );
        }
        assert!(!queue.file().exists(), "no new file next to the daemon's");

        // The text of the log, and of the page that it names.
        let log = daemon.log();
        let open = |name: &str| {
            let (_, rest) = log
                .split_once(&format!("{name} is "))
                .unwrap_or_else(|| panic!("{name} is not in {log}"));
            rest[..rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '/').expect("an end")]
                .to_owned()
        };
        kill("-STOP", daemon.pid());
        // First, for those that are still at their places are the ones that are copied.
        for left in ["hooktrail.db", "hooktrail.db-wal", "hooktrail.db-shm"] {
            std::fs::remove_file(queue.data_dir().join(left)).ok();
        }
        std::fs::copy(open("hooktrail.db"), queue.file()).expect("copies");
        std::fs::copy(open("hooktrail.db-wal"), queue.data_dir().join("hooktrail.db-wal"))
            .expect("copies");
        daemon.end();
        receiver.now(|_, _| status(200));
        let next = setup.start().await;
        eventually("what was pending is delivered", async || receiver.accepted().contains(&0))
            .await;
        assert_eq!(api.post("/api/v1/events", &event(3)).await.status, 202);
        eventually("and what comes", async || receiver.accepted().contains(&3)).await;
        assert!(next.stop().await.success());
        let wal = std::fs::metadata(queue.data_dir().join("hooktrail.db-wal"));
        assert!(wal.is_err(), "a clean stop leaves everything in the database itself");
    });
}

/// Ignores the signal that comes before the error.
const LIMITED: &str = "trap '' XFSZ; exec";

#[test]
fn when_the_disk_is_full_nothing_is_lost_and_it_goes_on_when_there_is_room() {
    run(async {
        const LIMIT: &str = "--fsize=65536"; // far less than what is written already
        let queue = Embedded::new();
        let receiver = Receiver::accepting().await;
        let setup = Setup::new(
            &queue,
            &("[log]\nlevel = \"debug\"\n".to_owned()
                + QUICK
                + &subscriber("a", &receiver.url, "")),
        );
        let daemon = setup.spawn_as(&format!("{LIMITED} \"$0\" \"$@\""));
        daemon.wait_log("running").await;
        queue.publish(TYPE, None, events(0..500)).await;
        receiver.wait_all(500).await;
        queue.wait("they are settled", async || queue.backlog("a").await == 0).await;

        let limit = |value: &str| {
            let done = Command::new("prlimit")
                .args(["--pid", &daemon.pid().to_string(), value])
                .status()
                .expect("prlimit runs");
            assert!(done.success());
        };
        limit(&format!("{LIMIT}:"));
        // The producer finds it full too.
        let file = setup.write("events", (500..600).map(|n| event(n) + "\n").collect::<String>());
        let publish = ["publish", file.to_str().expect("a path")];
        let (code, reported) =
            refused(&setup.run_as(&format!("{LIMITED} prlimit {LIMIT} \"$0\" \"$@\""), &publish));
        assert!(
            code == Some(1)
                && reported.contains("disk")
                && reported.contains("0 events were confirmed"),
            "{reported}"
        );
        assert_eq!(queue.backlog("a").await, 0, "all or nothing");

        // They are delivered, which cannot be recorded: they are not delivered over and over.
        let before = receiver.count();
        setup.ok(&publish);
        daemon.wait_log("lost its queue").await;
        let log = daemon.log();
        assert!(
            log.contains("disk") && log.contains(queue.file().to_str().expect("a path")),
            "{log}"
        );
        let tries = || daemon.log().matches("the embedded queue still refuses writes").count();
        queue.wait("it was tried again", async || tries() >= 5).await;
        assert!(
            receiver.count() - before <= 4,
            "{} requests whose end could not be written down",
            receiver.count() - before
        );
        assert_eq!(queue.backlog("a").await, 100);

        limit("--fsize=unlimited:");
        daemon.wait_log("has its queue again").await;
        receiver.wait_all(600).await;
        queue.wait("all are settled", async || queue.backlog("a").await == 0).await;
        assert_eq!(queue.dead("a").await, 0);
        assert!(daemon.stop().await.success());
    });
}

#[test]
fn a_user_who_may_not_read_the_database_gets_that_error_and_not_that_there_is_none() {
    run(async {
        let embedded = Embedded::new();
        let setup = Setup::new(&embedded, &(QUICK.to_owned() + &subscriber("a", NOWHERE, "")));
        let file = setup.write("event.jsonl", event(0));
        setup.ok(&["publish", file.to_str().expect("a path")]);
        let data_dir = embedded.data_dir();
        let mode = |path: &Path, mode| {
            std::fs::set_permissions(path, Permissions::from_mode(mode)).expect("its own")
        };
        // Root may read everything, unless it gives that up.
        let is_root = std::fs::metadata("/proc/self").expect("is there").uid() == 0;
        let as_anybody = match is_root {
            true => {
                "exec setpriv --bounding-set=-dac_override,-dac_read_search --inh-caps=-all \"$0\" \"$@\""
            }
            false => "exec \"$0\" \"$@\"",
        };
        // The directory as `StateDirectory` makes it for another user, and the file alone.
        for (path, hidden, seen) in
            [(data_dir.clone(), 0o000, 0o700), (data_dir.join("hooktrail.db"), 0o000, 0o600)]
        {
            mode(&path, hidden);
            for command in [
                &["dead", "list", "a"][..],
                &["publish", "/dev/null"],
                &["check", "--connect"],
                &["run"],
                &["prune"],
            ] {
                let output = setup.run_as(as_anybody, command);
                let reported = format!(
                    "{}{}",
                    String::from_utf8_lossy(&output.stdout),
                    String::from_utf8_lossy(&output.stderr)
                );
                assert_eq!(output.status.code(), Some(1), "{command:?}: {reported}");
                assert!(
                    reported.contains("service's user")
                        && !reported.contains("there is no embedded queue"),
                    "{command:?}: {reported}"
                );
                assert!(!reported.contains("Nothing harmful"), "{command:?}: {reported}");
            }
            mode(&path, seen);
        }
        assert!(setup.ok(&["check", "--connect"]).contains("a: events to deliver: 1"));
    });
}

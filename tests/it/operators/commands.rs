//! The commands that are not the daemon.

use std::{io::Write as _, process::Stdio};

use crate::support::{
    broker::{Broker, kill},
    daemon::{QUICK, SECRET, Setup, subscriber},
    eventually, free_port,
    queue::{Embedded, Queue, on_both_queues},
    receiver::{Receiver, event},
    run, tests_that_need,
};

on_both_queues!(
    publish_confirms_every_event_names_bad_lines_and_warns_of_unmatched_types,
    publish_takes_a_file_as_editors_write_it_and_says_what_of_it_is_not_published,
    publish_takes_arrays_and_request_bodies_and_says_how_to_make_lines_of_the_rest,
    publish_that_is_interrupted_says_what_was_confirmed,
    listen_verifies_prints_and_fails_on_request,
    check_of_one_subscriber_says_nothing_of_another_and_what_is_found_comes_first,
);

tests_that_need!(
    broker:
    check_prints_what_the_configuration_means_and_what_the_broker_has,
    commands_about_a_subscriber_that_is_not_there_say_so,
);

async fn publish_confirms_every_event_names_bad_lines_and_warns_of_unmatched_types(queue: Queue) {
    let receiver = Receiver::accepting().await;
    let setup = Setup::new(
        &queue,
        &(QUICK.to_owned() + &subscriber("a", &receiver.url, "events = [\"activity_log.#\"]")),
    );
    let mut lines: Vec<String> = (0..2500).map(event).collect();
    lines.insert(7, "{\"no\":\"type\"}".to_owned());
    lines.insert(9, String::new());
    lines.push("{\"event\":\"other.thing\"}".to_owned());
    let file = setup.write("events.jsonl", lines.join("\n"));
    // Before the daemon has ever run: the events wait for it.
    let output = setup.run(&["publish", file.to_str().expect("a path")]);
    let (out, err) = (
        String::from_utf8_lossy(&output.stdout).into_owned(),
        String::from_utf8_lossy(&output.stderr).into_owned(),
    );
    assert_eq!(output.status.code(), Some(1), "a line was bad");
    assert!(out.contains("published 2501 events, all confirmed"), "{out}");
    assert!(err.contains("events.jsonl:8: not published: the event has no field `event`"), "{err}");
    assert!(err.contains("no subscriber's patterns match `other.thing` (1 event)"), "{err}");
    let _daemon = setup.start().await;
    receiver.wait_all(2500).await;
    assert_eq!(receiver.accepted(), (0..2500).collect::<Vec<_>>());
}

async fn publish_takes_a_file_as_editors_write_it_and_says_what_of_it_is_not_published(
    queue: Queue,
) {
    let setup =
        Setup::new(&queue, &(QUICK.to_owned() + &subscriber("a", "http://127.0.0.1:9/", "")));
    let large = [
        br#"{"event":"a","pad":""#.to_vec(),
        vec![b'x'; 20 << 20],
        b"\"}\n{\"event\":\"after\"}\n".to_vec(),
    ]
    .concat();
    let utf16: Vec<u8> =
        "\u{feff}{\"event\":\"a\"}".encode_utf16().flat_map(u16::to_le_bytes).collect();
    // (file, its bytes, events published, the line that is not, why, what to do)
    for (name, bytes, published, bad) in [
        ("crlf", b"{\"event\":\"a\"}\r\n\r\n{\"event\":\"b\"}\r\n".to_vec(), 2, None),
        (
            "bom",
            b"\xef\xbb\xbf{\"event\":\"a\"}\n{\"event\":\"b\"}".to_vec(),
            1,
            Some(["byte-order mark", "save the file without one"]),
        ),
        ("utf16", utf16, 0, Some(["not UTF-8 at byte 0", "save the file as UTF-8"])),
        ("large", large, 1, Some(["more than 12582912 bytes", "split it up"])),
    ] {
        let file = setup.write(name, bytes);
        let output = setup.run(&["publish", file.to_str().expect("a path")]);
        let (out, err) = (
            String::from_utf8_lossy(&output.stdout).into_owned(),
            String::from_utf8_lossy(&output.stderr).into_owned(),
        );
        let events = if published == 1 { "event" } else { "events" };
        assert!(
            out.contains(&format!("published {published} {events}, all confirmed")),
            "{name}: {out}{err}"
        );
        assert_eq!(output.status.code(), Some(i32::from(bad.is_some())), "{name}: {err}");
        for part in bad.iter().flatten() {
            assert!(
                err.contains(&format!("{name}:1: not published: the event")) && err.contains(part),
                "{name}: {part} is not in {err}"
            );
            assert!(err.contains("1 line was not published"), "{name}: {err}");
        }
    }
    assert_eq!(queue.backlog("a").await, 4);

    // A file that cannot be read is noticed before anything of the others is published.
    let good = setup.write("good", event(0));
    let [good, folder] =
        [good.as_path(), good.parent().expect("a folder")].map(|p| p.to_str().expect("a path"));
    let output = setup.run(&["publish", good, folder, "nowhere.jsonl"]);
    let reported = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "{reported}");
    for part in [
        &format!("{folder}: is a directory"),
        "nowhere.jsonl: No such file",
        "nothing was published",
    ] {
        assert!(reported.contains(part), "{part} is not in {reported}");
    }
    assert_eq!(queue.backlog("a").await, 4);
}

async fn publish_takes_arrays_and_request_bodies_and_says_how_to_make_lines_of_the_rest(
    queue: Queue,
) {
    let setup =
        Setup::new(&queue, &(QUICK.to_owned() + &subscriber("a", "http://127.0.0.1:9/", "")));
    let all =
        format!("[{}, {}]\n{{\"events\":[{}]}}\n{}\n", event(0), event(1), event(2), event(3));
    let file = setup.write("many.jsonl", all);
    assert!(
        setup
            .ok(&["publish", file.to_str().expect("a path")])
            .contains("published 4 events, all confirmed")
    );
    assert_eq!(queue.backlog("a").await, 4);
    let pretty = setup.write(
        "pretty.json",
        "{\n  \"event\": \"a\",\n  \"x\": [\n".to_owned()
            + &"    1,\n".repeat(100)
            + "    1\n  ]\n}\n",
    );
    let output = setup.run(&["publish", pretty.to_str().expect("a path")]);
    let reported = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{reported}");
    for part in [
        "pretty.json:1: not published: not JSON at column 1",
        "jq -c .",
        "more such lines",
        "106 lines were not published",
    ] {
        assert!(reported.contains(part), "{part} is not in {reported}");
    }
    assert!(reported.lines().count() < 30, "{reported}");
    assert_eq!(queue.backlog("a").await, 4);
}

async fn publish_that_is_interrupted_says_what_was_confirmed(queue: Queue) {
    let setup =
        Setup::new(&queue, &(QUICK.to_owned() + &subscriber("a", "http://127.0.0.1:9/", "")));
    let file = setup.write("first.jsonl", event(9));
    setup.ok(&["publish", file.to_str().expect("a path")]); // the queues are there now
    let mut publish = std::process::Command::new(env!("CARGO_BIN_EXE_hooktrail"))
        .args(["--config", setup.config().to_str().expect("a path"), "publish"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("hooktrail runs");
    let mut input = publish.stdin.take().expect("piped");
    for n in 0..3 {
        writeln!(input, "{}", event(n)).expect("it reads");
    }
    // Events that come slowly are published as they come.
    queue.wait_backlog("a", 4).await;
    kill("-TERM", publish.id());
    let output = publish.wait_with_output().expect("it ends although its input does not");
    let (out, err) = (
        String::from_utf8_lossy(&output.stdout).into_owned(),
        String::from_utf8_lossy(&output.stderr).into_owned(),
    );
    assert_eq!(output.status.code(), Some(1), "{err}");
    assert!(out.contains("published 3 events, all confirmed"), "{out}{err}");
    assert!(err.contains("interrupted") && err.contains("stdin:3"), "{err}");
    drop(input);
}

#[test]
fn listen_refuses_what_it_cannot_do_and_says_what_it_can() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let taken = taken.local_addr().map(|a| (a.to_string(), taken)).expect("an address");
    for (arguments, code, parts) in [
        (["--fail-rate", "2"], 2, ["--fail-rate", "from 0 to 1"]),
        (["--fail-rate", "NaN"], 2, ["--fail-rate", "from 0 to 1"]),
        (["--status", "99"], 2, ["--status", "200..=599"]),
        (["--addr", "nonsense"], 2, ["--addr", "such as 127.0.0.1:9000"]),
        (["--addr", "127.0.0.1:99999"], 2, ["--addr", "from 0 to 65535"]),
        (["--addr", &taken.0], 1, [&taken.0, "choose another with --addr"]),
        (["--delay", "soon"], 2, ["--delay", "soon"]),
        (["--secret", "file:/nowhere"], 2, ["/nowhere", "cannot be read"]),
        (["--secret", ""], 2, ["--secret", "is empty"]),
        (["--secret", "whsec_c2hvcnQ="], 2, ["--secret", "24 to 64 bytes"]),
    ] {
        let output = Setup::with_text("").run(&[&["listen"], &arguments[..]].concat());
        let reported = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {reported}");
        assert!(parts.iter().all(|part| reported.contains(part)), "{arguments:?}: {reported}");
    }
}

#[test]
fn a_wrong_configuration_ends_every_command_with_exit_code_2_and_its_places() {
    let setup = Setup::with_text(
        "[queue]\nurl = \"amqp://127.0.0.1:1\"\n[http]\ntimeuot = \"1s\"\n[[subscriber]]\nname = \"a.b\"\nurl = \"x\"\n",
    );
    for command in [
        &["run"][..],
        &["check"],
        &["publish", "/dev/null"],
        &["dead", "list", "a"],
        &["repair", "a"],
    ] {
        let output = setup.run(command);
        assert_eq!(output.status.code(), Some(2), "{command:?}");
        let reported = String::from_utf8_lossy(&output.stderr).into_owned();
        for place in [
            "hooktrail.toml:4:1: http.timeuot: unknown key; did you mean `timeout`?",
            ":6:8: subscriber[0].name",
            ":7:7: subscriber[0].url",
            ":5:1: subscriber[0].secrets",
            "4 problems",
        ] {
            assert!(reported.contains(place), "{place} is not in {reported}");
        }
    }
    let usage = setup.run(&["dead", "list"]);
    assert_eq!(usage.status.code(), Some(2));
}

fn check_prints_what_the_configuration_means_and_what_the_broker_has() {
    run(async {
        let broker = Broker::shared();
        let setup = Setup::new(
            &broker,
            &(QUICK.to_owned() + &subscriber("a", "http://127.0.0.1:9/token", "")),
        );
        let text = setup.ok(&["check"]);
        assert!(
            text.contains("http.timeout = \"30s\"")
                && text.contains("[redacted]")
                && !text.contains(SECRET)
                && !text.contains("token"),
            "{text}"
        );
        let before = setup.ok(&["check", "--connect"]);
        assert!(
            before.contains("not there yet") && before.contains("Nothing harmful was found"),
            "{before}"
        );
        assert_eq!(broker.depth("sub.a").await, None, "check declares nothing");
        let daemon = setup.start().await;
        eventually("the daemon consumes", async || {
            // One line has all queues of which the same is to be said.
            let inspected = setup.ok(&["check", "--connect"]);
            let mut lines = inspected.lines();
            let is_its = |line: &str| line.contains("sub.a:") || line.contains("sub.a,");
            lines.any(|line| line.contains(": 0 messages, 1 consumer") && is_its(line))
        })
        .await;
        drop(daemon);
    });
}

async fn check_of_one_subscriber_says_nothing_of_another_and_what_is_found_comes_first(
    queue: Queue,
) {
    let receiver = Receiver::accepting().await;
    let both = QUICK.to_owned()
        + &subscriber("siem", &receiver.url, "")
        + &subscriber("crm", "http://127.0.0.1:9/", "");
    let setup = Setup::new(&queue, &both);
    let daemon = setup.start().await;
    queue.publish("a.b", [event(0)]).await;
    receiver.wait_requests(1).await;
    daemon.wait_log("attempt subscriber=\"crm\"").await;
    assert!(daemon.stop().await.success());
    let texts = |arguments: &[&str]| {
        let output = setup.run(arguments);
        (
            output.status.code(),
            String::from_utf8_lossy(&output.stdout).into_owned(),
            String::from_utf8_lossy(&output.stderr).into_owned(),
        )
    };

    let (code, out, _) = texts(&["check", "siem"]);
    assert!(
        code == Some(0)
            && out.contains("name = \"siem\"")
            && !out.contains("crm")
            && !out.contains("[queue]"),
        "{out}"
    );
    let (code, out, err) = texts(&["check", "siem", "--connect"]);
    assert_eq!(code, Some(0), "{err}");
    let place = |part: &str| out.find(part).unwrap_or_else(|| panic!("{part} is not in {out}"));
    assert!(
        place("endpoint of `siem`") < place("# Nothing harmful was found")
            && place("# Nothing harmful") < place("[[subscriber]]"),
        "{out}"
    );
    assert!(!out.contains("crm") && !err.contains("crm"), "{out}{err}");
    assert_eq!(
        texts(&["check", "siem", "--connect", "--quiet"]),
        (Some(0), String::new(), String::new())
    );

    let (code, out, err) = texts(&["check", "--connect", "-q"]);
    assert_eq!((code, &out[..]), (Some(0), ""), "a receiver that is away is no harm yet");
    assert!(
        err.starts_with("warning: endpoint of `crm`: ") && err.contains("\n  remedy: "),
        "{err}"
    );

    let (code, out, _) = texts(&["check", "--json"]);
    let found: serde_json::Value = serde_json::from_str(&out).expect("one JSON line");
    assert_eq!(
        (code, &found["severity"], &found["found"]),
        (Some(0), &"ok".into(), &"is valid, with 2 subscribers".into())
    );
    let (code, out, err) = texts(&["check", "crm", "seim"]);
    assert_eq!((code, &out[..]), (Some(2), ""));
    assert!(
        err.contains("no subscriber `seim` in ")
            && err.contains("did you mean `siem`? there are: siem, crm"),
        "{err}"
    );
}

#[test]
fn a_reader_that_has_left_does_not_change_what_check_returns() {
    let queue = Embedded::new();
    let setup =
        Setup::new(&queue, &(QUICK.to_owned() + &subscriber("a", "http://127.0.0.1:9/", "")));
    for (arguments, code) in
        [(&["--connect"][..], 0), (&["--connect", "--json"], 0), (&["nobody"], 2)]
    {
        let (out, err) = (std::io::pipe().expect("a pipe"), std::io::pipe().expect("a pipe"));
        drop((out.0, err.0));
        let mut check = setup.command(&[&["check"], arguments].concat());
        let status =
            check.stdin(Stdio::null()).stdout(out.1).stderr(err.1).status().expect("it runs");
        assert_eq!(status.code(), Some(code), "{arguments:?}");
    }
}

#[test]
fn check_as_json_names_each_mistake_and_its_place() {
    let setup = Setup::with_text(
        "[queue]\nurl = \"embedded\"\n[http]\ntimeuot = \"1s\"\n[batch]\nmax_events = 0\n",
    );
    let output = setup.run(&["check", "--json"]);
    assert_eq!(output.status.code(), Some(2));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let found: Vec<serde_json::Value> =
        text.lines().map(|l| serde_json::from_str(l).expect("a JSON line")).collect();
    for (n, (place, what)) in
        [(":4:1", "http.timeuot: unknown key"), (":6:14", "batch.max_events: ")]
            .into_iter()
            .enumerate()
    {
        assert_eq!(found[n]["severity"], "harmful");
        assert!(
            found[n]["about"][0]
                .as_str()
                .is_some_and(|a| a.ends_with(&format!("hooktrail.toml{place}"))),
            "{text}"
        );
        assert!(found[n]["found"].as_str().is_some_and(|f| f.starts_with(what)), "{text}");
    }
    assert_eq!(found.len(), 2);
}

fn commands_about_a_subscriber_that_is_not_there_say_so() {
    run(async {
        let broker = Broker::shared();
        let setup =
            Setup::new(&broker, &(QUICK.to_owned() + &subscriber("a", "http://127.0.0.1:9/", "")));
        let repair = setup.run(&["repair", "b"]);
        assert_eq!(repair.status.code(), Some(2));
        assert!(
            String::from_utf8_lossy(&repair.stderr).contains("no subscriber `b`"),
            "{repair:?}"
        );
        let dead = setup.run(&["dead", "list", "b"]);
        assert_eq!(dead.status.code(), Some(1));
        assert!(
            String::from_utf8_lossy(&dead.stderr).contains("sub.b.dead` does not exist"),
            "{dead:?}"
        );
        let bad = setup.run(&["dead", "list", "b.c"]);
        assert_eq!(bad.status.code(), Some(2));
        assert_eq!(broker.depth("delay.00").await, None, "looking declares nothing");
    });
}

async fn listen_verifies_prints_and_fails_on_request(queue: Queue) {
    let port = free_port();
    let log = tempfile::NamedTempFile::new().expect("a file");
    let mut keeps = tempfile::NamedTempFile::new().expect("a file");
    writeln!(keeps, "{SECRET}").expect("writes");
    let mut listen = std::process::Command::new(env!("CARGO_BIN_EXE_hooktrail"))
        .args([
            "listen",
            "--json",
            "--fail-first",
            "1",
            "--addr",
            &format!("127.0.0.1:{port}"),
            "--secret",
            &format!("file:{}", keeps.path().display()),
        ])
        .stdout(log.reopen().expect("opens"))
        .stderr(Stdio::null())
        .spawn()
        .expect("starts");
    eventually("it listens", async || {
        tokio::net::TcpStream::connect(("127.0.0.1", port)).await.is_ok()
    })
    .await;
    let url = format!("http://127.0.0.1:{port}/");
    let other = "secrets = [\"whsec_AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA\"]";
    let stranger = format!(
        "\n[[subscriber]]\nname = \"stranger\"\nurl = \"{url}\"\n{other}\nevents = [\"x\"]\nretry = {{ max_attempts = 1 }}\n"
    );
    let setup = Setup::new(&queue, &(QUICK.to_owned() + &subscriber("a", &url, "") + &stranger));
    let _daemon = setup.start().await;
    queue.publish("a.b", [r#"{"event":"a.b","n":18446744073709551616}"#]).await;
    let lines = || -> Vec<serde_json::Value> {
        let text = std::fs::read_to_string(log.path()).expect("the log");
        text.lines().map(|l| serde_json::from_str(l).expect("a JSON line")).collect()
    };
    eventually("two requests", async || lines().len() == 2).await;
    let seen = lines();
    assert_eq!(
        (&seen[0]["status"], &seen[0]["verified"], &seen[0]["repeat"]),
        (&503.into(), &true.into(), &false.into())
    );
    assert_eq!(
        (&seen[1]["status"], &seen[1]["verified"], &seen[1]["repeat"]),
        (&200.into(), &true.into(), &true.into())
    );
    assert_eq!((&seen[1]["attempt"], &seen[0]["batch_id"]), (&2.into(), &seen[1]["batch_id"]));
    assert!(std::fs::read_to_string(log.path()).expect("the log").contains("18446744073709551616"));
    queue.publish("x", [r#"{"event":"x"}"#]).await;
    eventually("a third and a fourth", async || lines().len() == 4).await;
    let refused =
        lines().into_iter().find(|l| l["verified"] == false).expect("one is not verified");
    assert_eq!(refused["status"], 401);
    assert!(
        refused["unverified_because"].as_str().expect("a reason").contains("does not match"),
        "{refused}"
    );
    kill("-TERM", listen.id());
    assert!(listen.wait().expect("ends").success());
}

#[test]
fn secret_prints_one_for_standard_webhooks() {
    let text = Setup::with_text("").ok(&["secret"]);
    assert!(text.starts_with("whsec_") && text.trim().len() == "whsec_".len() + 44, "{text}");
}

//! The examples of docs/producers.md work as they stand there.

use std::process::{Command, Stdio};

use crate::{
    documents::references::shown,
    receivers::verifiers::{output, repository, verifiers},
    support::{
        api::Api,
        broker::Broker,
        daemon::{QUICK, Setup, subscriber},
        eventually,
        queue::Queue,
        receiver::Receiver,
        run,
    },
};

mod tools {
    #[test]
    fn the_examples_over_http_and_from_a_file_work() {
        super::run(super::the_examples_over_http_and_from_a_file_work());
    }
}

mod amqp {
    #[test]
    fn the_example_over_amqp_works() {
        super::run(super::the_example_over_amqp_works());
    }
}

fn document() -> String {
    std::fs::read_to_string(repository().join("docs/producers.md")).expect("the document")
}

/// The types of the events that came, in no order.
fn types(receiver: &Receiver) -> Vec<String> {
    let all = receiver.requests();
    let mut types: Vec<String> = all
        .iter()
        .flat_map(|r| r.events())
        .map(|e| e["event"].as_str().expect("a type").to_owned())
        .collect();
    types.sort();
    types
}

async fn the_examples_over_http_and_from_a_file_work() {
    let receiver = Receiver::accepting().await;
    let (queue, api) = (Queue::embedded(), Api::new());
    let text = QUICK.to_owned()
        + &api.section()
        + &subscriber("a", &receiver.url, "events = [\"activity_log.#\"]");
    let setup = Setup::new(&queue, &text);
    let _daemon = setup.start().await;
    let document = document();
    let script = shown(&document, "sh")
        .join("\n")
        .replace("127.0.0.1:8787", &format!("127.0.0.1:{}", api.port));
    let dir = tempfile::tempdir().expect("a directory");
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_hooktrail"), dir.path().join("hooktrail"))
        .expect("links");
    let path = format!("{}:{}", dir.path().display(), std::env::var("PATH").unwrap_or_default());
    let mut bash = Command::new("bash");
    bash.args(["-eu", "-o", "pipefail", "-c", &script]).current_dir(dir.path());
    let printed = output(bash.env("PATH", path).env("HOOKTRAIL_CONFIG", setup.config()));
    for part in [
        "202 Accepted",
        "{\"accepted\":1,\"unmatched\":0}",
        "{\"accepted\":2,\"unmatched\":0}",
        "published 1 event",
    ] {
        assert!(printed.contains(part), "`{part}` is not in:\n{printed}");
    }
    let mut expected =
        ["login", "created", "deleted", "login"].map(|t| format!("activity_log.user.{t}"));
    expected.sort();
    eventually("all of them came", async || types(&receiver) == expected).await;
}

async fn the_example_over_amqp_works() {
    let broker = Broker::shared();
    let receiver = Receiver::accepting().await;
    let more = "events = [\"activity_log.#\"]\nevent_ids = true";
    let setup = Setup::new(&broker, &(QUICK.to_owned() + &subscriber("a", &receiver.url, more)));
    let _daemon = setup.start().await;
    let document = document();
    let program = shown(&document, "python").join("\n");
    let program = program.replace("amqp://guest:guest@127.0.0.1:5672/%2f", &broker.url);
    let program = program.replace("\"audit\"", &format!("\"{}\"", broker.exchange));
    let mut python = Command::new(verifiers().join("python/bin/python"));
    let printed = output(python.args(["-c", &program]).stdin(Stdio::null()));
    assert_eq!(printed, "confirmed\n");
    let request = receiver.wait_requests(1).await.remove(0);
    assert_eq!(request.events()[0]["event_id"], "evt_0c6fd3b1a9f44ce6a0b5f0e8d2c7a913");
    assert_eq!(types(&receiver), ["activity_log.user.login"]);
}

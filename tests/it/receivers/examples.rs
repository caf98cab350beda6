//! The whole receivers of docs/receivers.md keep what that page asks of a receiver.

use std::{
    fs::File,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use serde_json::Value;
use tokio::net::TcpStream;

use crate::{
    documents::references::shown,
    receivers::verifiers::repository,
    support::{
        daemon::{QUICK, SECRET, Setup, subscriber},
        eventually, free_port,
        queue::Queue,
        receiver::{Receiver, Request},
        run,
    },
};

mod tools {
    #[test]
    fn the_receiver_in_python_stores_each_batch_once_over_a_restart_and_nothing_forged() {
        super::run(super::stores_each_batch_once("python", "python3", |dir| {
            let printed = std::fs::read_to_string(dir.join("printed")).expect("text");
            printed.lines().map(|l| l.split(' ').next().expect("a type").to_owned()).collect()
        }));
    }

    #[test]
    fn the_receiver_for_node_js_stores_each_batch_once_over_a_restart_and_nothing_forged() {
        super::run(super::stores_each_batch_once("js", "node", super::in_the_file));
    }
}

/// The types of the events in the file of the one for Node.js.
fn in_the_file(dir: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(dir.join("batches.jsonl")).unwrap_or_default();
    let parsed = |text: &str| serde_json::from_str::<Value>(text).expect("JSON");
    let bodies = text
        .lines()
        .filter(|l| !l.is_empty())
        .map(|l| parsed(parsed(l)["events"].as_str().expect("a body")));
    let types = |body: Value| {
        body["events"]
            .as_array()
            .expect("events")
            .iter()
            .map(|e| e["event"].as_str().expect("a type").to_owned())
            .collect()
    };
    bodies.flat_map(types as fn(Value) -> Vec<String>).collect()
}

/// A receiver of the document, running in a folder of its own.
struct Program {
    dir: PathBuf,
    program: &'static str,
    file: &'static str,
    port: u16,
    child: Child,
}

impl Program {
    async fn start(dir: &Path, language: &str, program: &'static str) -> Self {
        let document =
            std::fs::read_to_string(repository().join("docs/receivers.md")).expect("the document");
        let file = if language == "js" { "receiver.js" } else { "receiver.py" };
        // Behind it are functions for those who have a public key.
        let whole = document.split("### With a public key").next().unwrap_or_default();
        let blocks = shown(whole, language);
        assert_eq!(blocks.len(), 2, "the function and what stands below it");
        std::fs::write(dir.join(file), blocks.join("\n\n")).expect("writes");
        // Node takes the kind of its modules from the nearest one, which may be another one further up.
        std::fs::write(dir.join("package.json"), "{}").expect("writes");
        let port = free_port();
        let started = Self {
            dir: dir.to_owned(),
            program,
            file,
            port,
            child: Self::spawn(dir, program, file, port),
        };
        started.listening().await;
        started
    }

    fn spawn(dir: &Path, program: &str, file: &str, port: u16) -> Child {
        let printed =
            File::options().create(true).append(true).open(dir.join("printed")).expect("opens");
        let mut command = Command::new(program);
        command
            .arg(file)
            .current_dir(dir)
            .env("HOOKTRAIL_SECRET", SECRET)
            .env("PORT", port.to_string());
        let log = File::options().create(true).append(true).open(dir.join("log")).expect("opens");
        let spawned = command.stdin(Stdio::null()).stdout(printed).stderr(log).spawn();
        spawned.unwrap_or_else(|e| {
            panic!("{program}: {e}: run scripts/verifiers, as scripts/test does")
        })
    }

    async fn listening(&self) {
        eventually("the receiver listens", async || {
            TcpStream::connect(("127.0.0.1", self.port)).await.is_ok()
        })
        .await;
    }

    async fn kill_and_start(&mut self) {
        self.child.kill().expect("kills");
        self.child.wait().expect("ends");
        self.child = Self::spawn(&self.dir, self.program, self.file, self.port);
        self.listening().await;
    }

    async fn post(&self, request: &Request, body: impl Into<reqwest::Body>) -> u16 {
        let mut post =
            reqwest::Client::new().post(format!("http://127.0.0.1:{}/", self.port)).body(body);
        for name in ["content-type", "webhook-id", "webhook-timestamp", "webhook-signature"] {
            post = post.header(name, request.header(name));
        }
        post.send().await.expect("an answer").status().as_u16()
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
        if std::thread::panicking() {
            eprintln!(
                "--- the receiver's log:\n{}",
                std::fs::read_to_string(self.dir.join("log")).unwrap_or_default()
            );
        }
    }
}

async fn stores_each_batch_once(
    language: &str,
    program: &'static str,
    stored: impl Fn(&Path) -> Vec<String>,
) {
    let dir = tempfile::tempdir().expect("a directory");
    let mut receiver = Program::start(dir.path(), language, program).await;
    let recording = Receiver::accepting().await;
    let url = format!("http://127.0.0.1:{}/", receiver.port);
    let quick = QUICK
        .replace("[batch]", "[batch]\nmax_events = 3")
        .replace("[http]", "[http]\nconcurrency = 4");
    let text = quick
        + &subscriber("a", &url, "events = [\"a.#\"]")
        + &subscriber("b", &recording.url, "events = [\"b.#\"]");
    let queue = Queue::embedded();
    let setup = Setup::new(&queue, &text);
    let _daemon = setup.start().await;

    let mut expected: Vec<String> = (0..40).map(|n| format!("a.{n:02}")).collect();
    for event_type in &expected {
        queue.publish(event_type, [format!("{{\"event\":\"{event_type}\"}}")]).await;
    }
    let sorted = || {
        let mut stored = stored(dir.path());
        stored.sort();
        stored
    };
    eventually("all are stored", async || sorted().len() >= expected.len()).await;
    assert_eq!(sorted(), expected);

    // A genuine request that it has not seen, and the same again.
    queue.publish("b.1", ["{\"event\":\"b.1\"}".to_owned()]).await;
    let request = recording.wait_requests(1).await.remove(0);
    assert_eq!(receiver.post(&request, request.body.clone()).await, 200);
    expected.push("b.1".to_owned());
    eventually("it is stored", async || sorted() == expected).await;
    assert_eq!(receiver.post(&request, request.body.clone()).await, 200);
    assert_eq!(receiver.post(&request, "{\"events\":[{\"event\":\"b.2\"}]}").await, 401);
    receiver.kill_and_start().await;
    assert_eq!(receiver.post(&request, request.body.clone()).await, 200);
    // Events published now are stored behind all earlier ones.
    queue.publish("a.99", ["{\"event\":\"a.99\"}".to_owned()]).await;
    expected.insert(40, "a.99".to_owned());
    eventually("the last is stored", async || sorted().contains(&"a.99".to_owned())).await;
    assert_eq!(sorted(), expected);
}

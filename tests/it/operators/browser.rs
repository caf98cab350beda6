//! The console in a real browser: Chromium, led by the scripts of tests/browser. Here is what only a
//! browser does; the neighbours test over HTTP what pages say and refuse.

use std::{
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use axum::{
    Router,
    extract::State,
    http::{StatusCode, Uri},
};
use serde_json::{Value, json};
use tokio::{
    net::TcpListener,
    sync::{mpsc, oneshot},
};

use super::{console::OTHERS, history::TOKEN};
use crate::{
    receivers::verifiers::{repository, verifiers},
    support::{
        api::Api,
        daemon::{Setup, subscriber},
        queue::Embedded,
        receiver::{Receiver, status},
        run, tests_that_need,
    },
};

tests_that_need!(
    tools:
    a_webhook_is_set_up_watched_mended_and_removed_with_javascript_and_without,
);

/// The longest time of a script: far more than it ever takes.
const PATIENCE: Duration = Duration::from_secs(900);

/// What a script asks of its test: `POST /what` with a text. The answer is a text; `None`: it is not
/// known.
struct Asked {
    what: String,
    with: String,
    answer: oneshot::Sender<Option<String>>,
}

/// A script that runs. It ends with its test, and its browser with it.
struct Script {
    child: Child,
    log: PathBuf,
}

impl Drop for Script {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// Runs a script to its end; `act` does what it asks for.
async fn play(name: &str, given: &Value, mut act: impl AsyncFnMut(&str, &str) -> Option<String>) {
    let (asking, mut asked) = mpsc::channel(1);
    let socket = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let stage = format!("http://{}", socket.local_addr().expect("an address"));
    let app = Router::new().fallback(pass_on).with_state(asking);
    let server = tokio::spawn(async move { axum::serve(socket, app).await.expect("serves") });

    let evidence = Path::new(env!("CARGO_TARGET_TMPDIR")).join("browser").join(name);
    let dir = tempfile::tempdir().expect("a directory");
    let log = dir.path().join("log");
    let file = std::fs::File::create(&log).expect("a log file");
    let child = Command::new("node")
        .arg(repository().join("tests/browser").join(name).with_extension("mjs"))
        .envs([("GIVEN", given.to_string()), ("STAGE", stage)])
        .envs([("VERIFIERS", verifiers()), ("EVIDENCE", evidence)])
        .stdin(Stdio::null())
        .stdout(file.try_clone().expect("a second descriptor"))
        .stderr(file)
        .spawn()
        .expect("node starts");
    let mut script = Script { child, log };
    let start = Instant::now();
    let mut ended: Option<ExitStatus> = None;
    while ended.is_none() {
        assert!(start.elapsed() < PATIENCE, "not within {PATIENCE:?}: {}", script.said());
        tokio::select! {
            Some(Asked { what, with, answer }) = asked.recv() => {
                answer.send(act(&what, &with).await).ok();
            }
            () = tokio::time::sleep(Duration::from_millis(20)) => {}
        }
        ended = script.child.try_wait().expect("waits");
    }
    server.abort();
    let said = script.said();
    assert!(ended.is_some_and(|status| status.success()), "{name}.mjs failed:\n{said}");
    println!("{name}.mjs took {:.1?}:\n{said}", start.elapsed());
}

impl Script {
    fn said(&self) -> String {
        std::fs::read_to_string(&self.log).expect("the log")
    }
}

async fn pass_on(
    State(asking): State<mpsc::Sender<Asked>>,
    uri: Uri,
    with: String,
) -> Result<String, StatusCode> {
    let (answer, answered) = oneshot::channel();
    let what = uri.path().trim_start_matches('/').to_owned();
    asking.send(Asked { what, with, answer }).await.map_err(|_| StatusCode::GONE)?;
    answered.await.ok().flatten().ok_or(StatusCode::NOT_FOUND)
}

/// A batch has one event, so that a replay of many takes its time; one that has failed waits for an hour.
const SETTINGS: &str = "
[batch]
max_events = 1
max_bytes = \"4MiB\"
max_wait = \"0s\"
[http]
allow_http = true
allow_private_addresses = true
[retry]
initial_interval = \"1h\"
max_interval = \"1h\"
[circuit_breaker]
failures = 0
";

fn managing(api: &Api) -> String {
    api.section()
        + &format!("token = \"{TOKEN}\"\nmanage = true\n")
        + "[admin.api_subscribers]\nallow_http = true\nallow_addresses = [\"127.0.0.0/8\"]\n"
        + OTHERS
        + SETTINGS
}

/// What every script is told of its daemon.
fn given(api: &Api, more: Value) -> Value {
    let mut given = json!({
        "origin": format!("http://127.0.0.1:{}", api.port),
        "token": TOKEN,
        "reader": "the-token-that-reads",
    });
    let (Some(all), Value::Object(more)) = (given.as_object_mut(), more) else {
        panic!("two objects")
    };
    all.extend(more);
    given
}

/// One attempt a batch, and events of its own.
const MORTAL: &str = "events = [\"dead.*\"]\nretry = { max_attempts = 1 }\n";

fn a_webhook_is_set_up_watched_mended_and_removed_with_javascript_and_without() {
    run(async {
        let (queue, api) = (Embedded::new(), Api::new());
        let receiver = Receiver::accepting().await;
        let broken = Receiver::start(|_, _| status(500)).await;
        let text = managing(&api) + &subscriber("of-file", &broken.url, MORTAL);
        let setup = Setup::new(&queue, &text);
        let _daemon = setup.start().await;
        let given = given(&api, json!({ "receiver": receiver.url }));
        play("way", &given, async |what, with| answers(&receiver, what, with)).await;
    });
}

/// What a script asks for of a receiver.
fn answers(receiver: &Receiver, what: &str, with: &str) -> Option<String> {
    match what {
        "answer" => {
            let code = with.parse().ok()?;
            receiver.now(move |_, _| status(code));
            Some(String::new())
        }
        "forget" => Some(receiver.take_requests().len().to_string()),
        "count" => Some(receiver.count().to_string()),
        "replayed" => {
            let all = receiver.requests();
            let replayed = all.iter().filter(|r| r.header("x-hooktrail-replay") == "true");
            Some(replayed.count().to_string())
        }
        _ => None,
    }
}

//! The console in a real browser: Chromium, led by the scripts of tests/browser. Here is what only a
//! browser does; the neighbours test over HTTP what pages say and refuse.

use std::{
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    Router,
    extract::State,
    http::{StatusCode, Uri},
};
use serde_json::{Value, json};
use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
    sync::{mpsc, oneshot},
};
use tokio_rustls::TlsAcceptor;

use super::{console::OTHERS, history::TOKEN};
use crate::{
    receivers::verifiers::{repository, verifiers},
    support::{
        api::Api,
        daemon::{Setup, subscriber},
        queue::Embedded,
        receiver::{Receiver, status},
        run, tests_that_need,
        tls::Authority,
    },
};

tests_that_need!(
    tools:
    a_webhook_is_set_up_watched_mended_and_removed_with_javascript_and_without,
    what_strangers_wrote_runs_nothing_loads_nothing_and_breaks_no_page,
    each_page_passes_the_rules_of_wcag_and_is_used_without_a_mouse_and_on_a_narrow_screen,
    other_sites_and_names_and_lesser_tokens_get_nothing_from_a_browser_that_is_signed_in,
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

fn what_strangers_wrote_runs_nothing_loads_nothing_and_breaks_no_page() {
    run(async {
        let (queue, api) = (Embedded::new(), Api::new());
        let setup = Setup::new(&queue, &managing(&api));
        let _daemon = setup.start().await;
        play("inert", &given(&api, json!({})), async |what, with| {
            // With an id of its own, which no event over HTTP has.
            let event: Value = (what == "publish").then(|| serde_json::from_str(with).ok())??;
            let body = event["body"].as_str()?.to_owned();
            queue.publish(event["type"].as_str()?, event["id"].as_str(), [body.into()]).await;
            Some(String::new())
        })
        .await;
    });
}

fn each_page_passes_the_rules_of_wcag_and_is_used_without_a_mouse_and_on_a_narrow_screen() {
    run(async {
        let (queue, api) = (Embedded::new(), Api::new());
        let receiver = Receiver::accepting().await;
        let broken = Receiver::start(|_, _| status(500).body("<b>no</b>")).await;
        let text = managing(&api) + &subscriber("of-file", &broken.url, MORTAL);
        let setup = Setup::new(&queue, &text);
        let _daemon = setup.start().await;
        let given = given(&api, json!({ "receiver": receiver.url }));
        play("pages", &given, async |what, with| answers(&receiver, what, with)).await;
    });
}

/// A proxy with TLS before a daemon: what comes is passed on. Its port.
async fn over_tls(name: &str, port: u16) -> u16 {
    let authority = Authority::new();
    let acceptor = TlsAcceptor::from(Arc::new(authority.server(&authority.sign(name), false)));
    let socket = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let own = socket.local_addr().expect("an address").port();
    tokio::spawn(async move {
        while let Ok((stream, _)) = socket.accept().await {
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                let Ok(mut stream) = acceptor.accept(stream).await else { return };
                let mut daemon = TcpStream::connect(("127.0.0.1", port)).await.expect("it listens");
                copy_bidirectional(&mut stream, &mut daemon).await.ok();
            });
        }
    });
    own
}

fn other_sites_and_names_and_lesser_tokens_get_nothing_from_a_browser_that_is_signed_in() {
    run(async {
        const ANSWER: &str = "the receiver says more than it should";
        let (queue, api) = (Embedded::new(), Api::new());
        let broken = Receiver::start(|_, _| status(500).body(ANSWER)).await;
        let once = subscriber("of-file", &broken.url, "retry = { max_attempts = 1 }");
        let setup = Setup::new(&queue, &(managing(&api) + &once));
        let mut daemon = Some(setup.start().await);

        let (other_queue, behind) = (Embedded::new(), Api::new());
        let public =
            format!("https://hooks.example:{}", over_tls("hooks.example", behind.port).await);
        let text = managing(&behind).replacen(
            "token =",
            &format!("public_url = \"{public}\"\ntoken ="),
            1,
        );
        let other_setup = Setup::new(&other_queue, &(text + &once));
        let _other = other_setup.start().await;

        let behind = format!("http://127.0.0.1:{}", behind.port);
        let given = given(&api, json!({ "public": public, "behind": behind }));
        play("strangers", &given, async |what, _| {
            const CHANGED: &str = "another-token-of-the-tests";
            if what != "change-token" {
                return None;
            }
            assert!(daemon.take()?.stop().await.success());
            let text = std::fs::read_to_string(setup.config()).expect("reads");
            setup.write("hooktrail.toml", text.replace(TOKEN, CHANGED));
            daemon = Some(setup.start().await);
            Some(CHANGED.to_owned())
        })
        .await;
    });
}

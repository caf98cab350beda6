use std::collections::BTreeSet;

use axum::{
    extract::Request,
    middleware::{self, Next},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::mpsc,
};

use super::*;
use crate::{
    config::{self, Config},
    queue::fake::Fake,
    store::KeptSubscribers,
    supervisor::fleet::Change,
    telemetry::{log, metrics::Metrics},
};

/// The timeout of these tests, long enough for any machine.
const PATIENCE: Duration = Duration::from_secs(60);

fn config(dir: &tempfile::TempDir, names: &[&str]) -> Config {
    let table = |name: &&str| config::testing::table(name, "");
    let text =
        "[queue]\nurl = \"embedded\"\n".to_owned() + &names.iter().map(table).collect::<String>();
    let path = dir.path().join("hooktrail.toml");
    std::fs::write(&path, text).expect("writes");
    config::load(&path).unwrap_or_else(|e| panic!("{e}"))
}

/// The API on a port; `ended` gets a message for each request whose handler was dropped.
struct Served {
    queue: Fake,
    board: Board,
    reloader: Reloader,
    changes: mpsc::Receiver<Change>,
    listens: std::net::SocketAddr,
    ended: mpsc::UnboundedReceiver<()>,
}

/// Sends a message when it is dropped.
struct Ends(mpsc::UnboundedSender<()>);

impl Drop for Ends {
    fn drop(&mut self) {
        self.0.send(()).ok();
    }
}

async fn serve(config: Config) -> Served {
    let (queue, board) = (Fake::default(), Board::new(Metrics::new(clock::now())));
    let (reloader, changes) = Reloader::new(
        config,
        KeptSubscribers::default(),
        board.clone(),
        queue.removals().clone(),
        log::Level::default(),
    );
    let phase = watch::Sender::new(Phase::Running).subscribe();
    let (ends, ended) = mpsc::unbounded_channel();
    let watched = middleware::from_fn(move |request: Request, next: Next| {
        let ends = Ends(ends.clone());
        async move {
            let _ends = ends;
            next.run(request).await
        }
    });
    let store = crate::store::fake::FakeStore::default();
    let history = Health::new(&store, board.clone());
    let control =
        Control::new(queue.clone(), store, reloader.clone(), board.clone(), phase, history);
    let app = routes(Arc::new(control)).layer(watched);
    let socket = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let listens = socket.local_addr().expect("an address");
    tokio::spawn(async move { axum::serve(socket, app).await.expect("serves") });
    Served { queue, board, reloader, changes, listens, ended }
}

impl Served {
    async fn post(&self, path: &str) -> TcpStream {
        let mut client = TcpStream::connect(self.listens).await.expect("connects");
        let request = format!(
            "POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{{}}"
        );
        client.write_all(request.as_bytes()).await.expect("asks");
        client
    }

    /// Drops the client during its request, and waits until the server has noticed.
    async fn goes_away(&mut self, client: TcpStream) {
        drop(client);
        timeout(PATIENCE, self.ended.recv()).await.expect("it is noticed").expect("a request");
    }
}

#[tokio::test]
async fn a_pause_and_a_resume_are_made_although_the_client_has_gone() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut served = serve(config(&dir, &["a"])).await;
    let mut pause_states = served.queue.pause_states();
    for (path, paused) in [("/v1/subscribers/a/pause", true), ("/v1/subscribers/a/resume", false)] {
        let recording = served.queue.hold_record();
        let client = served.post(path).await;
        recording.begun().await;
        served.goes_away(client).await;
        recording.go_on();
        let is_made = |all: &Option<_>| {
            all.as_ref().and_then(|all: &crate::delivery::PauseStates| {
                all.get("a").map(|s| s.pause().is_some())
            }) == Some(paused)
        };
        timeout(PATIENCE, pause_states.wait_for(is_made))
            .await
            .expect("it is made to its end")
            .expect("the queue is there");
    }
}

#[tokio::test]
async fn a_pause_and_its_end_are_shown_before_the_lane_has_noticed_them() {
    let dir = tempfile::tempdir().expect("a directory");
    let served = serve(config(&dir, &["a"])).await;
    let lane = served.board.lane(&"a".into());
    let told = async |method: &str, path: &str| {
        let request = format!(
            "{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{{}}"
        );
        let mut client = TcpStream::connect(served.listens).await.expect("connects");
        client.write_all(request.as_bytes()).await.expect("asks");
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.expect("answers");
        answer
    };
    let shows = async |state: &str| {
        let answer = told("GET", "/v1/subscribers").await;
        assert!(answer.contains(&format!(r#""state":"{state}""#)), "{answer}");
    };
    shows("ok").await;
    told("POST", "/v1/subscribers/a/pause").await;
    shows("paused").await;
    let pause =
        served.queue.pause_states().borrow().as_ref().and_then(|all| all["a"].pause().cloned());
    let pause = pause.expect("it is recorded");
    lane.report(&lane_event::LaneEvent::Paused { pause: &pause, known: false });
    told("POST", "/v1/subscribers/a/resume").await;
    shows("ok").await;
}

#[tokio::test]
async fn requests_that_go_on_without_their_clients_do_not_pile_up() {
    let room = Arc::new(Semaphore::new(1));
    let held = to_its_end(&room, async {
        std::future::pending::<()>().await;
        Ok(())
    });
    assert!(timeout(Duration::from_millis(1), held).await.is_err(), "it goes on without a client");
    let refused = timeout(PATIENCE, to_its_end(&room, async { Ok(()) }))
        .await
        .expect("at once")
        .expect_err("there is no room");
    assert_eq!(
        (refused.status, refused.retry_after),
        (StatusCode::TOO_MANY_REQUESTS, Some(crate::admin::answer::AGAIN_SOON))
    );
}

#[tokio::test]
async fn a_reload_is_made_although_the_client_has_gone() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut served = serve(config(&dir, &["a"])).await;
    config(&dir, &["a", "b"]);
    let client = served.post("/v1/reload").await;
    let change =
        timeout(PATIENCE, served.changes.recv()).await.expect("it begins").expect("a change");
    served.goes_away(client).await;
    change.done.send(Ok(BTreeSet::new())).ok(); // the lanes are as is configured now
    let mut subscribers = served.reloader.subscribers();
    timeout(PATIENCE, subscribers.wait_for(|all| all.len() == 2))
        .await
        .expect("it is made to its end")
        .expect("the reloader is there");
    // The next request is answered with the configuration in use.
    let mut client = served.post("/v1/subscribers/b/pause").await;
    let mut answer = [0; 15];
    client.read_exact(&mut answer).await.expect("an answer");
    assert_eq!(&answer, b"HTTP/1.1 200 OK");
}

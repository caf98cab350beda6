//! The admin listener: health, metrics, the requests of operators (`control`), and the intake of
//! events (`intake`).
//!
//! A GET changes nothing. No web page can use a listener on its visitor's machine: requests from
//! another site are refused; a request that changes something needs a `content-type` that a browser
//! does not send there without asking first; and without a token, requests by a name that could be
//! another's are refused, since its owner can make it lead here.

mod answer;
mod body;
mod connections;
mod console;
mod control;
mod dead;
mod ending;
mod export;
mod guard;
mod history;
mod history_health;
mod intake;
mod introduction;
mod operations;
mod query;
mod replays;
mod subscribers;
mod versions;
pub mod view;

use std::{future::Future, net::SocketAddr, sync::Arc, time::Duration};

use axum::{
    Router,
    http::{HeaderMap, StatusCode, header},
    middleware,
    routing::{get, post},
};
use tokio::{
    net::TcpListener,
    sync::{Semaphore, oneshot, watch},
    task::JoinHandle,
    time::timeout,
};

pub use self::answer::{MAX_BODY, MAX_EVENTS};
#[cfg(any(test, fuzzing))]
pub(crate) use self::intake::read_all;
use self::{
    answer::{READ_TIMEOUT, header_text, not_found, wrong_method},
    connections::Bounds,
    console::Console,
    control::Control,
    dead::Letters,
    export::Exporter,
    guard::{Tokens, authorized},
    history::History,
    history_health::Health,
    intake::{Intake, ROOM},
    operations::Recorder,
    replays::Again,
};
use crate::{
    config::AdminConfig,
    history::replay::Replays,
    queue::Queue,
    store::Store,
    supervisor::{fleet::Phase, reload::Reloader},
    telemetry::{metrics, status::Board},
};

/// The limits of connections. A client that keeps its connection sends a request at least that
/// often: Prometheus scrapes each minute.
const BOUNDS: Bounds =
    Bounds { at_a_time: 256, head_within: Duration::from_secs(75), read_within: READ_TIMEOUT };

/// The time for the last answers to leave, at the end of the daemon.
const LAST_ANSWERS: Duration = Duration::from_secs(2);

/// The listener, bound and not serving yet.
#[derive(Debug)]
pub struct Admin {
    socket: TcpListener,
    listens: SocketAddr,
    tokens: Tokens,
}

impl Admin {
    /// # Errors
    /// The address cannot be listened on. No other one takes its place: commands would ask the
    /// program that has it, and send it the token.
    pub async fn bind(config: &AdminConfig) -> std::io::Result<Self> {
        let socket = TcpListener::bind(config.listen).await?;
        let listens = socket.local_addr()?;
        tracing::info!(addr = %listens, "admin listening");
        let tokens = Tokens::new(config.all_tokens()).used_at(config.public_url.clone());
        if tokens.is_empty() {
            tracing::info!(
                remedy = "set [admin] token; `hooktrail init` writes a configuration with one",
                "without a token the API shows no events, deliveries and operations, and manages no subscribers"
            );
        }
        Ok(Self { socket, listens, tokens })
    }

    /// The address that it listens on, with the port that was chosen for port 0.
    pub fn listens(&self) -> SocketAddr {
        self.listens
    }

    /// Serves, and takes events for `queue` while `phase` is [`Phase::Running`].
    pub fn serve<Q: Queue, S: Store>(
        self,
        queue: Q,
        store: S,
        replays: Replays,
        reloader: &Reloader,
        board: &Board,
        phase: watch::Receiver<Phase>,
    ) -> Serving {
        let room = Arc::new(Semaphore::new(ROOM as usize));
        let (readiness, asked, reloads) = (phase.clone(), queue.clone(), reloader.clone());
        let (exposed, polled, holds) = (board.clone(), queue.clone(), reloader.clone());
        let expose = move |format| {
            exposed.metrics().set_queue_up(polled.is_reachable());
            exposed
                .metrics()
                .set_held_removals(holds.held().map_or(0, |held| held.subscribers.len()));
            exposed.expose_as(format)
        };
        let health = Health::new(&store, board.clone());
        let (remembers, measured) = (health.clone(), health.clone());
        let introduction =
            introduction::routes(self.tokens.clone(), self.listens.port(), &reloader.config().path);
        let control = Control::new(
            queue.clone(),
            store.clone(),
            reloader.clone(),
            board.clone(),
            phase.clone(),
            health.clone(),
        );
        let control = Arc::new(control);
        let removing = control.clone();
        let history = History::new(queue.clone(), store.clone(), reloader.clone());
        let history = Arc::new(history);
        let exporter = Arc::new(Exporter::new(store.clone()));
        let again = Again::new(queue.clone(), store.clone(), reloader.clone(), replays);
        let again = Arc::new(again);
        let letters = Letters::new(queue.clone(), reloader.clone(), phase.clone());
        let letters = Arc::new(letters);
        let console = Console::new(
            self.tokens.clone(),
            control.clone(),
            history.clone(),
            again.clone(),
            exporter.clone(),
            letters.clone(),
            store.clone(),
        );
        let console = console::routes(console);
        let again = replays::routes(again);
        let operations = operations::routes(store.clone());
        let intake = Intake::new(
            queue,
            reloader.subscribers(),
            reloader.config().queue.embedded.tenant.clone(),
            phase.clone(),
            board.metrics().clone(),
            room.clone(),
        );
        let api = Router::new()
            .route("/v1/events", post(intake::take_events::<Q>))
            .with_state(Arc::new(intake))
            .merge(control::routes(control.clone()))
            .merge(subscribers::routes(control))
            .merge(dead::routes(letters))
            .merge(history::routes(history))
            .merge(export::routes(exporter))
            .merge(again)
            .merge(operations)
            .layer(middleware::from_fn_with_state(Recorder::new(store), operations::recorded::<S>))
            .fallback(not_found)
            .method_not_allowed_fallback(wrong_method)
            .layer(middleware::from_fn_with_state(self.tokens, authorized))
            .merge(introduction);
        let app = Router::new()
            .route("/healthz", get(async || "ok\n"))
            .route(
                "/readyz",
                get(move || {
                    let history = remembers.trouble();
                    let (phase, up) = (*readiness.borrow(), asked.is_reachable());
                    std::future::ready(ready(phase, up, &reloads, history))
                }),
            )
            .route(
                "/metrics",
                get(async move |headers: HeaderMap| {
                    measured.measure().await;
                    let format =
                        metrics::Exposition::accepted(header_text(&headers, header::ACCEPT));
                    ([(header::CONTENT_TYPE, format.content_type())], expose(format))
                }),
            )
            .nest("/api", api)
            .merge(console)
            .fallback(not_found)
            .method_not_allowed_fallback(wrong_method);
        let (close, closing) = oneshot::channel::<()>();
        tokio::spawn(removing.finish_removals());
        Serving {
            room,
            phase,
            close,
            server: tokio::spawn(connections::serve(self.socket, app, BOUNDS, closing)),
        }
    }
}

/// The listener while it serves.
#[derive(Debug)]
pub struct Serving {
    room: Arc<Semaphore>,
    phase: watch::Receiver<Phase>,
    close: oneshot::Sender<()>,
    server: JoinHandle<()>,
}

impl Serving {
    /// Completes when the daemon drains and no request needs the queue any more.
    pub fn done_with_the_queue(&self) -> impl Future<Output = ()> + use<> {
        let (room, mut phase) = (self.room.clone(), self.phase.clone());
        async move {
            // An error means that the sender of the phase, or the listener, has ended.
            phase.wait_for(|p| *p == Phase::Draining).await.ok();
            room.acquire_many(ROOM).await.ok();
        }
    }

    /// Lets the last answers leave and ends.
    pub async fn close(self) {
        drop(self.close);
        if timeout(LAST_ANSWERS, self.server).await.is_err() {
            tracing::debug!("admin connections were still open at the end");
        }
    }
}

/// The answer of `/readyz`. Mistakes in the configuration do not take the daemon out of service: it
/// works with the one before. Nor does what is wrong with history: deliveries do not need it.
fn ready(
    phase: Phase,
    reachable: bool,
    reloads: &Reloader,
    history: Option<String>,
) -> (StatusCode, String) {
    let (status, word) = readiness(phase, reachable);
    let problem = reloads
        .problem()
        .map(|why| format!("the configuration was not reloaded:\n{why}\n"))
        .unwrap_or_default();
    let held = reloads
        .held()
        .map(|held| format!("removals wait for an operator: {}\n", held.why))
        .unwrap_or_default();
    let history = history.map(|why| format!("{why}\n")).unwrap_or_default();
    (status, format!("{word}\n{problem}{held}{history}"))
}

fn readiness(phase: Phase, reachable: bool) -> (StatusCode, &'static str) {
    match phase {
        Phase::Running if !reachable => (StatusCode::SERVICE_UNAVAILABLE, "without its queue"),
        Phase::Running => (StatusCode::OK, "ready"),
        Phase::Starting => (StatusCode::SERVICE_UNAVAILABLE, "starting"),
        Phase::Draining => (StatusCode::SERVICE_UNAVAILABLE, "draining"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_wrong_configuration_and_one_that_is_held_back_are_reported_and_take_nothing_out_of_service()
     {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("h.toml");
        let write = |text: &str| {
            std::fs::write(&path, format!("[queue]\nurl = \"embedded\"\n{text}")).expect("writes")
        };
        write("[[subscriber]]\nname = \"a\"\nurl = \"https://example.com/\"\nsignatures = []\n");
        let config = crate::config::load(&path).unwrap_or_else(|e| panic!("{e}"));
        let metrics = metrics::Metrics::new(crate::clock::now());
        let (reloader, _changes) = Reloader::new(
            config,
            crate::store::KeptSubscribers::default(),
            Board::new(metrics),
            crate::queue::Removals::default(),
            crate::telemetry::log::Level::default(),
        );
        let ok = (StatusCode::OK, "ready\n".to_owned());
        assert_eq!(ready(Phase::Running, true, &reloader, None), ok);
        let away = Some("history is away: x".to_owned());
        let ok = (StatusCode::OK, "ready\nhistory is away: x\n".to_owned());
        assert_eq!(ready(Phase::Running, true, &reloader, away), ok);
        for (text, parts) in
            [("[x]\n", ["not reloaded", "h.toml:3:2: x"]), ("", ["wait for an operator", "(a)"])]
        {
            write(text);
            assert!(
                reloader.reload(crate::supervisor::reload::Because::Files("test")).await.is_err()
            );
            let (status, text) = ready(Phase::Running, true, &reloader, None);
            assert!(
                status == StatusCode::OK
                    && text.starts_with("ready\n")
                    && parts.iter().all(|p| text.contains(p)),
                "{text}"
            );
        }
        assert_eq!(readiness(Phase::Running, false).0, StatusCode::SERVICE_UNAVAILABLE);
    }
}

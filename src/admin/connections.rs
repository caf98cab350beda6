//! Serves a bounded number of connections, each for a bounded time, so that no client can take the
//! file descriptors that deliveries need.

use std::{net::IpAddr, sync::Arc, time::Duration};

use axum::Router;
use hyper::{
    Request,
    body::Incoming,
    server::conn::http1,
    service::{Service as _, service_fn},
};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::graceful::GracefulShutdown,
    service::TowerToHyperService,
};
use tokio::{net::TcpListener, sync::Semaphore};

/// The address of a request's client, or of the proxy before it: among the request's extensions.
#[derive(Clone, Copy, Debug)]
pub(super) struct Peer(pub(super) IpAddr);

#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    /// The most connections at a time; further ones wait in the system's queue.
    pub(super) at_a_time: usize,
    /// The longest time from the start of a connection, or its last answer, to the end of the next
    /// request's head.
    pub(super) head_within: Duration,
    /// The longest time for which a client may read nothing of its answer.
    pub(super) read_within: Duration,
}

/// Serves until `closing`, then accepts no more and waits for the answers of open requests.
pub(super) async fn serve(
    mut socket: TcpListener,
    app: Router,
    bounds: Bounds,
    closing: impl Future,
) {
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(bounds.head_within);
    let (room, open) = (Arc::new(Semaphore::new(bounds.at_a_time)), GracefulShutdown::new());
    let mut closing = std::pin::pin!(closing);
    loop {
        let next = async {
            let permit = room.clone().acquire_owned().await;
            // It waits by itself while the process has no descriptor left.
            (permit, axum::serve::Listener::accept(&mut socket).await)
        };
        let (permit, (stream, address)) = tokio::select! {
            _ = &mut closing => break,
            next = next => next,
        };
        // TCP_USER_TIMEOUT (Linux, see RFC 5482) also ends connections whose receive window stays
        // at zero.
        let stalls = u32::try_from(bounds.read_within.as_millis()).unwrap_or(u32::MAX);
        if let Err(e) = rustix::net::sockopt::set_tcp_user_timeout(&stream, stalls) {
            tracing::debug!(error = %e, "a connection whose client reads nothing does not end by itself");
        }
        let app = TowerToHyperService::new(app.clone());
        let service = service_fn(move |mut request: Request<Incoming>| {
            request.extensions_mut().insert(Peer(address.ip()));
            app.call(request)
        });
        let connection = http.serve_connection(TokioIo::new(stream), service);
        let connection = open.watch(connection);
        tokio::spawn(async move {
            // Errors of a connection are the client's to report.
            connection.await.ok();
            drop(permit);
        });
    }
    drop(socket);
    open.shutdown().await;
}

#[cfg(test)]
mod tests {
    use axum::routing::get;
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::TcpStream,
        sync::oneshot,
        time::timeout,
    };

    use super::*;

    const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n";
    const PATIENCE: Duration = Duration::from_secs(20);

    async fn start(
        bounds: Bounds,
        app: Router,
    ) -> (u16, oneshot::Sender<()>, tokio::task::JoinHandle<()>) {
        let socket = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let port = socket.local_addr().expect("an address").port();
        let (close, closing) = oneshot::channel();
        (port, close, tokio::spawn(serve(socket, app, bounds, closing)))
    }

    async fn connect(port: u16, send: &[u8]) -> TcpStream {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).await.expect("connects");
        stream.write_all(send).await.expect("written");
        stream
    }

    /// Reads until the connection is closed.
    async fn rest(mut stream: TcpStream) -> String {
        let mut text = String::new();
        timeout(PATIENCE, stream.read_to_string(&mut text))
            .await
            .expect("closed in time")
            .expect("read");
        text
    }

    #[tokio::test]
    async fn a_connection_that_sends_no_request_or_not_all_of_its_head_is_closed() {
        let bounds =
            Bounds { at_a_time: 8, head_within: Duration::from_millis(200), read_within: PATIENCE };
        let (port, _close, _) =
            start(bounds, Router::new().route("/", get(async || "hello"))).await;
        for send in [&b""[..], b"GET / HT", b"GET / HTTP/1.1\r\nhost: localhost\r\nx: "] {
            assert!(!rest(connect(port, send).await).await.contains("hello"), "{send:?}");
        }
        // A connection that is idle after its answer is closed too.
        assert_eq!(rest(connect(port, REQUEST).await).await.matches("hello").count(), 1);
    }

    #[tokio::test]
    async fn a_connection_whose_answers_nobody_reads_is_closed() {
        let bounds =
            Bounds { at_a_time: 1, head_within: PATIENCE, read_within: Duration::from_millis(500) };
        let large = "x".repeat(16 << 20);
        let (port, _close, _) = start(
            bounds,
            Router::new().route("/", get(async || large)).route("/small", get(async || "hello")),
        )
        .await;
        let _unread = connect(port, REQUEST).await;
        // There is room for one connection, so this one is served when the other has ended.
        let mut next =
            connect(port, b"GET /small HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
                .await;
        let mut text = String::new();
        timeout(PATIENCE, next.read_to_string(&mut text))
            .await
            .expect("served in time")
            .expect("read");
        assert!(text.ends_with("hello"), "{text}");
    }

    #[tokio::test]
    async fn more_connections_than_there_is_room_for_wait_and_are_served_when_one_ends() {
        let bounds = Bounds { at_a_time: 2, head_within: PATIENCE, read_within: PATIENCE };
        let (port, _close, _) =
            start(bounds, Router::new().route("/", get(async || "hello"))).await;
        let mut idle = vec![connect(port, b"").await, connect(port, b"").await];
        let mut third = connect(port, REQUEST).await;
        let mut answer = [0; 15];
        assert!(
            timeout(Duration::from_millis(300), third.read_exact(&mut answer)).await.is_err(),
            "it was served although there was no room"
        );
        idle.pop();
        timeout(PATIENCE, third.read_exact(&mut answer))
            .await
            .expect("answered in time")
            .expect("answered");
        assert_eq!(&answer, b"HTTP/1.1 200 OK");
    }

    #[tokio::test]
    async fn the_answer_of_a_request_is_waited_for_at_the_end_and_nobody_is_accepted() {
        let bounds = Bounds { at_a_time: 8, head_within: PATIENCE, read_within: PATIENCE };
        let (began, mut begins) = tokio::sync::mpsc::channel(1);
        let go = Arc::new(Semaphore::new(0));
        let waits = go.clone();
        let app = Router::new().route(
            "/",
            get(move || async move {
                began.send(()).await.expect("the test listens");
                drop(waits.acquire().await);
                "at last"
            }),
        );
        let (port, close, served) = start(bounds, app).await;
        let (idle, busy) = (connect(port, b"").await, connect(port, REQUEST).await);
        begins.recv().await.expect("a request");
        drop(close);
        assert_eq!(rest(idle).await, "");
        assert!(TcpStream::connect(("127.0.0.1", port)).await.is_err(), "it still accepts");
        assert!(!served.is_finished());
        go.add_permits(1);
        assert!(rest(busy).await.ends_with("at last"));
        timeout(PATIENCE, served).await.expect("ends in time").expect("no panic");
    }
}

//! A way to a broker that stops where a test wants something to happen: before one method of AMQP
//! is passed on.

use std::sync::Arc;

use tokio::{
    io::{self, AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream, tcp::OwnedReadHalf, tcp::OwnedWriteHalf},
    sync::Semaphore,
    task::JoinHandle,
};

/// A class of methods and one of them.
pub(crate) type Method = [u16; 2];

pub(crate) const QUEUE_UNBIND: Method = [50, 50];

pub(crate) struct Tap {
    url: String,
    reached: Arc<Semaphore>,
    goes_on: Arc<Semaphore>,
    server: JoinHandle<()>,
}

impl Tap {
    /// To the broker at `url`; what clients send stops before each `method`.
    pub(crate) async fn before(method: Method, url: &str) -> Self {
        let socket = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let mut own = url::Url::parse(url).expect("a URL");
        let broker = (own.host_str().expect("a host").to_owned(), own.port().unwrap_or(5672));
        own.set_host(Some("127.0.0.1")).expect("a host");
        own.set_port(Some(socket.local_addr().expect("an address").port())).expect("a port");
        let (reached, goes_on) = (Arc::new(Semaphore::new(0)), Arc::new(Semaphore::new(0)));
        let (stops, starts) = (reached.clone(), goes_on.clone());
        let server = tokio::spawn(async move {
            loop {
                let (client, _) = socket.accept().await.expect("accepts");
                let broker = TcpStream::connect(&broker).await.expect("the broker is there");
                let ((from_client, mut to_client), (mut from_broker, to_broker)) =
                    (client.into_split(), broker.into_split());
                let (stops, starts) = (stops.clone(), starts.clone());
                // Either ends when its side goes away.
                tokio::spawn(async move {
                    pass_on(from_client, to_broker, method, &stops, &starts).await.ok()
                });
                tokio::spawn(async move { io::copy(&mut from_broker, &mut to_client).await.ok() });
            }
        });
        Self { url: own.into(), reached, goes_on, server }
    }

    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    /// Waits until a client has sent the method.
    pub(crate) async fn reached(&self) {
        tokio::time::timeout(super::PATIENCE, self.reached.acquire())
            .await
            .expect("a client sends it")
            .expect("is not closed")
            .forget();
    }

    /// Lets pass what was reached.
    pub(crate) fn go_on(&self) {
        self.goes_on.add_permits(1);
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        self.server.abort();
    }
}

/// Frame by frame, as the protocol has them: kind, channel, size, payload, end.
async fn pass_on(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    method: Method,
    reached: &Semaphore,
    goes_on: &Semaphore,
) -> io::Result<()> {
    let mut greeting = [0; 8];
    from.read_exact(&mut greeting).await?;
    to.write_all(&greeting).await?;
    let stops_before = [method[0].to_be_bytes(), method[1].to_be_bytes()].concat();
    loop {
        let mut frame = vec![0; 7];
        from.read_exact(&mut frame).await?;
        let size = u32::from_be_bytes([frame[3], frame[4], frame[5], frame[6]]) as usize;
        frame.resize(7 + size + 1, 0);
        from.read_exact(&mut frame[7..]).await?;
        if frame[0] == 1 && frame[7..].starts_with(&stops_before) {
            reached.add_permits(1);
            goes_on.acquire().await.expect("is not closed").forget();
        }
        to.write_all(&frame).await?;
    }
}

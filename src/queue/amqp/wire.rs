//! Between the socket and lapin: TLS where the URL asks for it, a task that reads, and a filter that
//! hands deliveries to their consumers and makes of every other frame one that lapin can read.
//!
//! AMQP lets a producer put any bytes into a short string (a message id, a header's name) and nest
//! tables as deep as a frame holds. lapin reads short strings as UTF-8 and closes the whole
//! connection over one that is not; it reads tables by recursion, and about two thousand levels end
//! the process. Either message would be redelivered, and end the next connection too, for every
//! subscriber on it.
//!
//! Nothing of hooktrail's own depends on what is changed here: bodies are never touched.

pub(super) mod content;
pub(super) mod filter;
mod reader;

use std::{
    fmt, io,
    net::SocketAddr,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
    time::{Duration, Instant},
};

use async_compat::Compat;
use async_rs::{Runtime, Tokio, traits::Reactor, util::RuntimeParts};
use futures_util::{
    Stream,
    future::{Either, select},
    io::{AsyncRead, AsyncWrite},
};
use lapin::{
    AsyncTcpStream, Connection, ConnectionProperties,
    uri::{AMQPScheme, AMQPUri},
};
use rustls::pki_types::ServerName;
use tokio::{runtime::Handle, sync::oneshot, task::JoinHandle};
use tokio_rustls::TlsConnector;

pub(super) use self::{
    content::{Arrival, Consumer, Inboxes},
    filter::Greeting,
};
use self::{
    filter::Filter,
    reader::{ForLapin, Reader},
};
use crate::crypto::tls::{SystemRoots, TlsPolicy};

/// What is known of a connection besides lapin.
#[derive(Debug, Clone, Default)]
pub(super) struct Wire {
    pub(super) greeting: Greeting,
    pub(super) inboxes: Inboxes,
}

/// Connects as lapin does by itself, with TLS and the filter in between. lapin goes on when the
/// caller gives up, so that ends its socket too.
pub(super) async fn connect(
    uri: AMQPUri,
    properties: ConnectionProperties,
) -> lapin::Result<(Connection, Wire)> {
    let runtime = Runtime::new(RuntimeParts::new(Tokio::current(), Streams(Tokio::current())));
    let handle = Handle::current();
    let frame_max = uri.query.frame_max.map_or(usize::MAX, |max| max as usize);
    let trust = match uri.scheme {
        AMQPScheme::AMQP => None,
        AMQPScheme::AMQPS => Some(Trust::of(&uri.authority.host).await?),
    };
    let (connected, waiting) = oneshot::channel();
    let waiting = Mutex::new(Some(waiting));
    let wire = Wire::default();
    let known = wire.clone();
    let connect = async move |uri: AMQPUri, _: Runtime<_>| {
        // Taken once: there is no reconnecting.
        let mut waiting = waiting.lock().unwrap_or_else(PoisonError::into_inner).take();
        let tokio = Runtime::tokio_current();
        let connecting = Box::pin(dial(uri, trust.clone(), &tokio));
        let socket = match &mut waiting {
            None => connecting.await?,
            Some(waiting) => match select(connecting, waiting).await {
                Either::Left((socket, _)) => socket?,
                Either::Right(_) => return Err(gone().into()),
            },
        };
        let Wire { greeting, inboxes } = known.clone();
        let filter = Filter::new(frame_max).hearing(greeting).serving(inboxes);
        let (reader, incoming) = Reader::new(socket.incoming, filter);
        let reading = handle.spawn(reader.run());
        let outgoing = Compat::new(socket.outgoing);
        Ok(AsyncTcpStream::Plain(LapinStream { incoming, reading, outgoing, waiting }))
    };
    let connection = Connection::connector(uri, runtime, connect, properties).await?;
    connected.send(()).ok(); // a stream that is gone already says so by itself
    Ok((connection, wire))
}

fn gone() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, "no task waits for this connection any more")
}

type Incoming = Box<dyn tokio::io::AsyncRead + Send + Unpin>;
type Outgoing = Box<dyn tokio::io::AsyncWrite + Send + Unpin>;

/// The two directions of a connection to the broker.
struct Socket {
    incoming: Incoming,
    outgoing: Outgoing,
}

async fn dial(uri: AMQPUri, trust: Option<Trust>, runtime: &Runtime<Tokio>) -> io::Result<Socket> {
    let stream = runtime
        .tcp_connect(runtime.to_socket_addrs((uri.authority.host, uri.authority.port)))
        .await?
        .into_inner();
    Ok(match trust {
        None => {
            let (incoming, outgoing) = stream.into_split();
            Socket { incoming: Box::new(incoming), outgoing: Box::new(outgoing) }
        }
        Some(Trust { connector, server }) => {
            let (incoming, outgoing) = tokio::io::split(connector.connect(server, stream).await?);
            Socket { incoming: Box::new(incoming), outgoing: Box::new(outgoing) }
        }
    })
}

/// The host that an `amqps://` broker's certificate must name, and the authorities that may have
/// signed it. lapin's own TLS would be the same rustls, but depends on a whole older generation of
/// cryptography, for key stores that are not used here.
#[derive(Clone)]
struct Trust {
    connector: TlsConnector,
    server: ServerName<'static>,
}

impl Trust {
    async fn of(host: &str) -> io::Result<Self> {
        let server = ServerName::try_from(host.to_owned()).map_err(io::Error::other)?;
        let roots =
            tokio::task::spawn_blocking(SystemRoots::load).await.map_err(io::Error::other)?;
        let mut config = TlsPolicy::default()
            .client_config(&roots.map_err(io::Error::other)?)
            .map_err(io::Error::other)?;
        config.alpn_protocols.clear(); // those of HTTP
        Ok(Self { connector: TlsConnector::from(Arc::new(config)), server })
    }
}

/// tokio's reactor with another type of streams, which is the only way to give lapin one.
#[derive(Debug, Clone)]
struct Streams(Tokio);

impl Reactor for Streams {
    type TcpStream = LapinStream;
    type Sleep = <Tokio as Reactor>::Sleep;

    fn register<H: io::Read + io::Write + Send + 'static>(
        &self,
        _: H,
    ) -> io::Result<impl AsyncRead + AsyncWrite + Send + Unpin + 'static> {
        Err::<LapinStream, _>(io::ErrorKind::Unsupported.into()) // lapin brings no sockets of its own
    }

    fn sleep(&self, dur: Duration) -> Self::Sleep {
        self.0.sleep(dur)
    }

    fn interval(&self, dur: Duration) -> impl Stream<Item = Instant> + Send + 'static {
        self.0.interval(dur)
    }

    fn tcp_connect_addr(
        &self,
        _: SocketAddr,
    ) -> impl Future<Output = io::Result<Self::TcpStream>> + Send + 'static {
        std::future::ready(Err(io::ErrorKind::Unsupported.into())) // only `connect` makes connections
    }
}

/// A connection as lapin sees it: what it writes goes to the socket as it is, and it reads what the
/// reader leaves for it.
struct LapinStream {
    incoming: ForLapin,
    reading: JoinHandle<()>,
    outgoing: Compat<Outgoing>,
    /// Until the handshake has ended: reports that, or that no task waits for it any more.
    waiting: Option<oneshot::Receiver<()>>,
}

impl Drop for LapinStream {
    fn drop(&mut self) {
        self.reading.abort();
    }
}

impl fmt::Debug for LapinStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LapinStream").finish_non_exhaustive()
    }
}

impl AsyncRead for LapinStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        out: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        if let Some(Poll::Ready(over)) = this.waiting.as_mut().map(|w| Pin::new(w).poll(cx)) {
            this.waiting = None;
            if over.is_err() {
                return Poll::Ready(Err(gone()));
            }
        }
        this.incoming.poll_read(cx, out)
    }
}

impl AsyncWrite for LapinStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.outgoing).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.outgoing).poll_write_vectored(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.outgoing).poll_flush(cx)
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.outgoing).poll_close(cx)
    }
}

//! The stream between the socket and lapin: TLS where the URL asks for it, and a filter that makes
//! of every message one that lapin can read.
//!
//! AMQP lets a producer put any bytes into a short string (a message id, a header's name) and nest
//! tables as deep as a frame holds. lapin reads short strings as UTF-8 and closes the whole
//! connection over one that is not; it reads tables by recursion, and about two thousand levels end
//! the process. Either message would be redelivered, and end the next connection too, for every
//! subscriber on it.
//!
//! Nothing of hooktrail's own depends on what is changed here: bodies are never touched.

pub(super) mod filter;

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
use tokio::{net::TcpStream, sync::oneshot};
use tokio_rustls::{TlsConnector, client::TlsStream};

use self::filter::Filter;
pub(super) use self::filter::Greeting;
use crate::crypto::tls::{SystemRoots, TlsPolicy};

/// Connects as lapin does by itself, with TLS and the filter in between. lapin goes on when the
/// caller gives up, so that ends its socket too.
pub(super) async fn connect(
    uri: AMQPUri,
    properties: ConnectionProperties,
) -> lapin::Result<(Connection, Greeting)> {
    let runtime = Runtime::new(RuntimeParts::new(Tokio::current(), Filtering(Tokio::current())));
    let frame_max = uri.query.frame_max.map_or(usize::MAX, |max| max as usize);
    let trust = match uri.scheme {
        AMQPScheme::AMQP => None,
        AMQPScheme::AMQPS => Some(Trust::of(&uri.authority.host).await?),
    };
    let (connected, waiting) = oneshot::channel();
    let waiting = Mutex::new(Some(waiting));
    let greeting = Greeting::default();
    let hears = greeting.clone();
    let connect = async move |uri: AMQPUri, _: Runtime<_>| {
        // Taken once: there is no reconnecting.
        let mut waiting = waiting.lock().unwrap_or_else(PoisonError::into_inner).take();
        let tokio = Runtime::tokio_current();
        let connecting = Box::pin(dial(uri, trust.clone(), &tokio));
        let stream = match &mut waiting {
            None => connecting.await?,
            Some(waiting) => match select(connecting, waiting).await {
                Either::Left((stream, _)) => stream?,
                Either::Right(_) => return Err(gone().into()),
            },
        };
        let filter = Filter::new(frame_max).hearing(hears.clone());
        Ok(AsyncTcpStream::Plain(Filtered { waiting, filter, ..Filtered::new(stream, frame_max) }))
    };
    let connection = Connection::connector(uri, runtime, connect, properties).await?;
    connected.send(()).ok(); // a stream that is gone already says so by itself
    Ok((connection, greeting))
}

fn gone() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, "no task waits for this connection any more")
}

type Socket = Either<Compat<TcpStream>, Compat<TlsStream<TcpStream>>>;

async fn dial(uri: AMQPUri, trust: Option<Trust>, runtime: &Runtime<Tokio>) -> io::Result<Socket> {
    let stream = runtime
        .tcp_connect(runtime.to_socket_addrs((uri.authority.host, uri.authority.port)))
        .await?;
    match trust {
        None => Ok(Either::Left(stream)),
        Some(Trust { connector, server }) => {
            Ok(Either::Right(Compat::new(connector.connect(server, stream.into_inner()).await?)))
        }
    }
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
struct Filtering(Tokio);

impl Reactor for Filtering {
    type TcpStream = Filtered<Socket>;
    type Sleep = <Tokio as Reactor>::Sleep;

    fn register<H: io::Read + io::Write + Send + 'static>(
        &self,
        _: H,
    ) -> io::Result<impl AsyncRead + AsyncWrite + Send + Unpin + 'static> {
        Err::<Filtered<Socket>, _>(io::ErrorKind::Unsupported.into()) // lapin brings no sockets of its own
    }

    fn sleep(&self, dur: Duration) -> Self::Sleep {
        self.0.sleep(dur)
    }

    fn interval(&self, dur: Duration) -> impl Stream<Item = Instant> + Send + 'static {
        self.0.interval(dur)
    }

    fn tcp_connect_addr(
        &self,
        addr: SocketAddr,
    ) -> impl Future<Output = io::Result<Self::TcpStream>> + Send + 'static {
        let connecting = self.0.tcp_connect_addr(addr);
        async { Ok(Filtered::new(Either::Left(connecting.await?), usize::MAX)) }
    }
}

/// A stream whose incoming frames are made harmless. It buffers at most one frame.
struct Filtered<S> {
    inner: S,
    filter: Filter,
    ended: bool,
    /// Until the handshake has ended: reports that, or that no task waits for it any more.
    waiting: Option<oneshot::Receiver<()>>,
}

impl<S> Filtered<S> {
    fn new(inner: S, frame_max: usize) -> Self {
        Self { inner, filter: Filter::new(frame_max), ended: false, waiting: None }
    }
}

impl<S> fmt::Debug for Filtered<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Filtered").finish_non_exhaustive()
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Filtered<S> {
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
        loop {
            let n = this.filter.give(out);
            if n > 0 || this.ended || out.is_empty() {
                return Poll::Ready(Ok(n));
            }
            let room = this.filter.room();
            match Pin::new(&mut this.inner).poll_read(cx, room) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Err(e)) => return Poll::Ready(Err(e)),
                Poll::Ready(Ok(0)) => {
                    this.ended = true;
                    this.filter.end();
                }
                Poll::Ready(Ok(n)) => this.filter.filled(n),
            }
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Filtered<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write_vectored(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_close(cx)
    }
}

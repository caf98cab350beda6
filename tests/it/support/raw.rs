//! A receiver that writes the given bytes and speaks no HTTP otherwise.

use std::{
    future::Future,
    io::Result,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};

/// The treatment of one connection; it ends with an error when the client goes away.
pub(crate) type Behaviour = Pin<Box<dyn Future<Output = Result<()>> + Send>>;

pub(crate) struct Raw {
    pub(crate) address: String,
    connections: Arc<AtomicUsize>,
}

impl Raw {
    pub(crate) async fn start(behave: impl Fn(TcpStream) -> Behaviour + Send + 'static) -> Self {
        let socket = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = socket.local_addr().expect("an address").to_string();
        let connections = Arc::new(AtomicUsize::new(0));
        let count = connections.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = socket.accept().await {
                count.fetch_add(1, Ordering::SeqCst);
                tokio::spawn(behave(stream));
            }
        });
        Self { address, connections }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}/", self.address)
    }

    pub(crate) fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }
}

/// Reads one request and forgets it.
pub(crate) async fn read_request(stream: &mut (impl AsyncRead + Unpin)) -> Result<()> {
    let length = read_head(stream).await?;
    stream.read_exact(&mut vec![0; length]).await.map(drop)
}

/// Reads the head of a request; the length of its body.
pub(crate) async fn read_head(stream: &mut (impl AsyncRead + Unpin)) -> Result<usize> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await?);
    }
    let head = String::from_utf8_lossy(&head).to_lowercase();
    Ok(head
        .lines()
        .find_map(|l| l.strip_prefix("content-length: "))
        .and_then(|n| n.parse().ok())
        .expect("a length"))
}

/// Answers every request of a connection with the same bytes.
pub(crate) fn always(answer: &'static [u8]) -> impl Fn(TcpStream) -> Behaviour + Send + 'static {
    move |mut stream| {
        Box::pin(async move {
            loop {
                read_request(&mut stream).await?;
                stream.write_all(answer).await?;
            }
        })
    }
}

/// Answers one request and hangs up.
pub(crate) fn once(answer: &'static [u8]) -> impl Fn(TcpStream) -> Behaviour + Send + 'static {
    move |mut stream| {
        Box::pin(async move {
            read_request(&mut stream).await?;
            stream.write_all(answer).await
        })
    }
}

/// Answers a request with `begin` and then `block` endlessly, as fast as it is read.
pub(crate) fn flood(
    begin: &'static [u8],
    block: Vec<u8>,
) -> impl Fn(TcpStream) -> Behaviour + Send + 'static {
    endless(begin, block, Duration::ZERO)
}

/// Like [`flood`], ten blocks a second.
pub(crate) fn drip(
    begin: &'static [u8],
    block: &[u8],
) -> impl Fn(TcpStream) -> Behaviour + Send + 'static {
    endless(begin, block.to_vec(), Duration::from_millis(100))
}

fn endless(
    begin: &'static [u8],
    block: Vec<u8>,
    pause: Duration,
) -> impl Fn(TcpStream) -> Behaviour + Send + 'static {
    move |mut stream| {
        let block = block.clone();
        Box::pin(async move {
            read_request(&mut stream).await?;
            stream.write_all(begin).await?;
            loop {
                stream.write_all(&block).await?;
                if !pause.is_zero() {
                    tokio::time::sleep(pause).await;
                }
            }
        })
    }
}

/// Answers whatever comes in plain HTTP, a TLS handshake too.
pub(crate) fn plain(mut stream: TcpStream) -> Behaviour {
    Box::pin(async move {
        stream.read_u8().await?;
        stream.write_all(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n").await?;
        std::future::pending().await
    })
}

/// Accepts, reads the first byte and no more.
pub(crate) fn deaf(mut stream: TcpStream) -> Behaviour {
    Box::pin(async move {
        stream.read_u8().await?;
        std::future::pending().await
    })
}

/// One thing that a receiver does with a connection.
#[derive(Debug, Clone)]
pub(crate) enum Step {
    /// Reads a whole request.
    Read,
    /// Reads so many bytes.
    ReadSome(usize),
    Send(&'static [u8]),
    /// Three bytes a second.
    Slowly(&'static [u8]),
    /// Endless, as fast as it is read.
    Forever(Vec<u8>),
    /// Ends the connection with a reset.
    Reset,
    /// Does nothing more and keeps the connection.
    Wait,
}

/// Does these things with each connection, one after the other, and closes it.
pub(crate) fn script(
    steps: impl Into<Vec<Step>>,
) -> impl Fn(TcpStream) -> Behaviour + Send + 'static {
    let steps = steps.into();
    move |mut stream| {
        let steps = steps.clone();
        Box::pin(async move {
            for step in steps {
                match step {
                    Step::Read => read_request(&mut stream).await?,
                    Step::ReadSome(n) => stream.read_exact(&mut vec![0; n]).await.map(drop)?,
                    Step::Send(bytes) => stream.write_all(bytes).await?,
                    Step::Slowly(bytes) => {
                        for byte in bytes {
                            stream.write_u8(*byte).await?;
                            tokio::time::sleep(Duration::from_millis(333)).await;
                        }
                    }
                    Step::Forever(block) => loop {
                        stream.write_all(&block).await?;
                    },
                    Step::Reset => return stream.set_zero_linger(),
                    Step::Wait => std::future::pending().await,
                }
            }
            Ok(())
        })
    }
}

//! A server that speaks TLS in front of a receiver and ends its connections as servers in the field
//! do: without a goodbye, before all that it had announced, when a client uses one again, or with
//! requests unprocessed. Each request that it passes on is answered, so nothing of this is a
//! failure of an attempt.

use std::{
    collections::BTreeSet,
    future::Future,
    io,
    net::SocketAddr,
    path::PathBuf,
    pin::Pin,
    sync::{Arc, Mutex},
    time::Duration,
};

use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncRead, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::{TcpListener, TcpStream},
    sync::mpsc,
    task::JoinHandle,
    time::timeout,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};

use crate::{subscribers::pick, support::tls::Authority};

/// The treatment of connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Manners {
    /// HTTP/1.1: the last answer of a connection does not end well, or a connection is closed when
    /// it is used again.
    Abrupt,
    /// HTTP/2: GOAWAY after some requests, and streams beyond it are not processed; now and then
    /// REFUSED_STREAM.
    Draining,
}

pub(crate) struct Front {
    pub(crate) address: SocketAddr,
    dir: tempfile::TempDir,
    task: JoinHandle<()>,
}

impl Drop for Front {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Front {
    pub(crate) async fn to(receiver: SocketAddr, manners: Manners, seed: u64) -> Self {
        let authority = Authority::new();
        let mut config = authority.server(&authority.sign("127.0.0.1"), false);
        let protocol: &[u8] = if manners == Manners::Draining { b"h2" } else { b"http/1.1" };
        config.alpn_protocols = vec![protocol.to_vec()];
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let dir = tempfile::tempdir().expect("a directory");
        std::fs::write(dir.path().join("ca.pem"), &authority.pem).expect("writes");
        let socket = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = socket.local_addr().expect("an address");
        let mut rng = StdRng::seed_from_u64(seed);
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = socket.accept().await {
                let (acceptor, rng) = (acceptor.clone(), StdRng::seed_from_u64(rng.random()));
                tokio::spawn(async move {
                    stream.set_nodelay(true).ok();
                    let Ok(stream) = acceptor.accept(stream).await else { return };
                    let Ok(receiver) = TcpStream::connect(receiver).await else { return };
                    receiver.set_nodelay(true).ok();
                    // It ends with an error when the client goes away.
                    match manners {
                        Manners::Abrupt => abrupt(stream, receiver, rng).await.ok(),
                        Manners::Draining => draining(stream, receiver, rng).await.ok(),
                    };
                });
            }
        });
        Self { address, dir, task }
    }

    /// The certificate authority to trust.
    pub(crate) fn ca_file(&self) -> PathBuf {
        self.dir.path().join("ca.pem")
    }
}

/// The end of an HTTP/1.1 connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ending {
    /// The last answer has no length: its body ends with the connection, which ends without
    /// close_notify.
    Unannounced,
    /// The last answer announces more than there is.
    TooShort,
    /// … and there is no close_notify either.
    TooShortUnannounced,
    /// When the next request comes, at its first byte.
    AtTheNext,
    /// … or behind its last.
    BehindTheNext,
    /// After a moment without a request, which may be on its way.
    Idle,
}

const ENDINGS: [Ending; 6] = [
    Ending::Unannounced,
    Ending::TooShort,
    Ending::TooShortUnannounced,
    Ending::AtTheNext,
    Ending::BehindTheNext,
    Ending::Idle,
];

async fn abrupt(
    client: TlsStream<TcpStream>,
    receiver: TcpStream,
    mut rng: StdRng,
) -> io::Result<()> {
    let (mut client, mut receiver) = (BufReader::new(client), BufReader::new(receiver));
    let ending = *pick(&ENDINGS, &mut rng);
    // Requests on new connections are answered.
    for _ in 0..rng.random_range(1..5) {
        pass_on(&mut client, &mut receiver).await?;
        let answer = Message::read(&mut receiver).await?;
        answer.write(&mut client).await?;
    }
    match ending {
        Ending::AtTheNext => client.fill_buf().await.map(drop),
        Ending::BehindTheNext => Message::read(&mut client).await.map(drop),
        Ending::Idle => {
            match timeout(Duration::from_millis(rng.random_range(5..80)), client.fill_buf()).await {
                Ok(read) => read.map(drop),
                Err(_) => client.get_mut().shutdown().await,
            }
        }
        Ending::Unannounced | Ending::TooShort | Ending::TooShortUnannounced => {
            pass_on(&mut client, &mut receiver).await?;
            let mut answer = Message::read(&mut receiver).await?;
            let length = (ending != Ending::Unannounced).then(|| answer.body.len() + 10);
            answer.announce(length);
            answer.write(&mut client).await?;
            if ending == Ending::TooShort { client.get_mut().shutdown().await } else { Ok(()) }
        }
    }
}

/// One request.
async fn pass_on(
    client: &mut BufReader<TlsStream<TcpStream>>,
    receiver: &mut BufReader<TcpStream>,
) -> io::Result<()> {
    let request = Message::read(client).await?;
    receiver.write_all(&request.head).await?;
    receiver.write_all(&request.body).await
}

/// A request or an answer of HTTP/1.1, with a length.
struct Message {
    head: Vec<u8>,
    body: Vec<u8>,
}

impl Message {
    async fn read(from: &mut BufReader<impl AsyncRead + Unpin>) -> io::Result<Self> {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            if from.read_until(b'\n', &mut head).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        let text = String::from_utf8_lossy(&head).to_lowercase();
        let length = text
            .lines()
            .find_map(|l| l.strip_prefix("content-length: "))
            .and_then(|n| n.parse().ok())
            .expect("a length");
        let mut body = vec![0; length];
        from.read_exact(&mut body).await?;
        Ok(Self { head, body })
    }

    async fn write(&self, client: &mut BufReader<TlsStream<TcpStream>>) -> io::Result<()> {
        client.write_all(&self.head).await?;
        client.write_all(&self.body).await?;
        client.flush().await
    }

    /// Says another length than that of the body, or none.
    fn announce(&mut self, length: Option<usize>) {
        let text = String::from_utf8_lossy(&self.head).into_owned();
        let others = text
            .lines()
            .filter(|l| !l.is_empty() && !l.to_lowercase().starts_with("content-length:"));
        let mut head: String = others.map(|l| format!("{l}\r\n")).collect();
        if let Some(length) = length {
            head += &format!("content-length: {length}\r\n");
        }
        self.head = (head + "\r\n").into_bytes();
    }
}

/// A frame of HTTP/2, RFC 9113 4.1.
struct Frame {
    kind: u8,
    flags: u8,
    stream: u32,
    payload: Vec<u8>,
}

const PREFACE: usize = 24;
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const GOAWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;
const END_STREAM: u8 = 1;
const NO_ERROR: u32 = 0;
const REFUSED_STREAM: u32 = 7;
const CANCEL: u32 = 8;

impl Frame {
    fn new(kind: u8, stream: u32, numbers: &[u32]) -> Self {
        Self {
            kind,
            flags: 0,
            stream,
            payload: numbers.iter().flat_map(|n| n.to_be_bytes()).collect(),
        }
    }

    async fn read(from: &mut (impl AsyncRead + Unpin)) -> io::Result<Self> {
        let mut head = [0; 9];
        from.read_exact(&mut head).await?;
        let [a, b, c, kind, flags, stream @ ..] = head;
        let mut payload = vec![0; u32::from_be_bytes([0, a, b, c]) as usize];
        from.read_exact(&mut payload).await?;
        Ok(Self { kind, flags, stream: u32::from_be_bytes(stream) & (u32::MAX >> 1), payload })
    }

    fn bytes(&self) -> Vec<u8> {
        let length = u32::try_from(self.payload.len()).expect("short").to_be_bytes();
        [&length[1..], &[self.kind, self.flags], &self.stream.to_be_bytes(), &self.payload].concat()
    }

    fn ends_its_stream(&self) -> bool {
        self.kind == RST_STREAM
            || matches!(self.kind, DATA | HEADERS) && self.flags & END_STREAM != 0
    }
}

/// The streams of a connection, as far as they are known.
#[derive(Debug, Default)]
struct Streams {
    open: BTreeSet<u32>,
    refused: Option<u32>,
    /// The last one that is processed, once that is said.
    last: Option<u32>,
    highest: u32,
    count: usize,
}

impl Streams {
    fn is_ignored(&self, stream: u32) -> bool {
        stream != 0 && (self.refused == Some(stream) || self.last.is_some_and(|last| stream > last))
    }

    fn is_over(&self) -> bool {
        self.last.is_some() && self.open.is_empty()
    }
}

async fn draining(
    client: TlsStream<TcpStream>,
    receiver: TcpStream,
    mut rng: StdRng,
) -> io::Result<()> {
    let (mut from_client, mut to_client) = tokio::io::split(client);
    let (mut from_receiver, mut to_receiver) = receiver.into_split();
    let mut preface = [0; PREFACE];
    from_client.read_exact(&mut preface).await?;
    to_receiver.write_all(&preface).await?;
    let streams = Arc::new(Mutex::new(Streams::default()));
    let (send, mut to_send) = mpsc::unbounded_channel::<Vec<u8>>();
    // A request that was not processed by another connection is among the first of a new one.
    let most = rng.random_range(8..24);
    let refuses = rng.random_bool(0.5).then(|| rng.random_range(6..24));
    let (seen, answers) = (streams.clone(), send.clone());
    let back = async move {
        loop {
            let frame = Frame::read(&mut from_receiver).await?;
            let mut streams = seen.lock().expect("no panic");
            if !streams.is_ignored(frame.stream) {
                answers.send(frame.bytes()).map_err(io::Error::other)?;
            }
            if frame.ends_its_stream() {
                streams.open.remove(&frame.stream);
            }
            if streams.is_over() {
                return answers.send(Vec::new()).map_err(io::Error::other);
            }
        }
    };
    let forth = async move {
        loop {
            let frame = Frame::read(&mut from_client).await?;
            let forward =
                forward(&frame, &mut streams.lock().expect("no panic"), &send, most, refuses);
            if let Some(bytes) = forward {
                to_receiver.write_all(&bytes).await?;
            }
        }
    };
    // Nothing is the end.
    let write = async move {
        while let Some(bytes) = to_send.recv().await.filter(|bytes| !bytes.is_empty()) {
            to_client.write_all(&bytes).await?;
            to_client.flush().await?;
        }
        to_client.shutdown().await
    };
    // It goes on reading until the client has closed: a reset could take the last answers with it.
    let forth: Pin<Box<dyn Future<Output = io::Result<()>> + Send>> = Box::pin(forth);
    tokio::try_join!(back, write, forth).map(drop)
}

/// The part of a client's frame to pass on; the answer to the client is sent.
fn forward(
    frame: &Frame,
    streams: &mut Streams,
    send: &mpsc::UnboundedSender<Vec<u8>>,
    most: usize,
    refuses: Option<usize>,
) -> Option<Vec<u8>> {
    let answer = |frame: Frame| send.send(frame.bytes()).ok();
    if frame.kind == HEADERS && frame.stream > streams.highest {
        streams.count += 1;
        if streams.last.is_none() && streams.count > most {
            streams.last = Some(streams.highest);
            answer(Frame::new(GOAWAY, 0, &[streams.highest, NO_ERROR]));
            if streams.is_over() {
                send.send(Vec::new()).ok();
            }
        } else if streams.last.is_none() {
            streams.highest = frame.stream;
            if refuses == Some(streams.count) {
                // Its headers must arrive all the same: later ones refer to them.
                streams.refused = Some(frame.stream);
                answer(Frame::new(RST_STREAM, frame.stream, &[REFUSED_STREAM]));
                return Some(
                    [frame.bytes(), Frame::new(RST_STREAM, frame.stream, &[CANCEL]).bytes()]
                        .concat(),
                );
            }
            streams.open.insert(frame.stream);
        }
    }
    if !streams.is_ignored(frame.stream) {
        return Some(frame.bytes());
    }
    if frame.kind == DATA && !frame.payload.is_empty() {
        // Its share of the connection's window is free again.
        let length = u32::try_from(frame.payload.len()).expect("short");
        answer(Frame::new(WINDOW_UPDATE, 0, &[length]));
    }
    None
}

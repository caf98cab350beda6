//! A receiver that speaks just enough HTTP/2 (RFC 9113) over TLS to do with a stream what no
//! library does.

use std::{
    io::Result,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, ReadHalf},
    net::TcpStream,
    sync::mpsc,
    time::Instant,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};

use super::{raw::Raw, tls::Authority};

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;

const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;
const ACK: u8 = 1;

pub(crate) const NO_ERROR: u32 = 0;
pub(crate) const REFUSED_STREAM: u32 = 7;
pub(crate) const CANCEL: u32 = 8;

/// The treatment of a complete request.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Reaction {
    /// 200, after this time.
    Accept(Duration),
    /// RST_STREAM with this reason.
    Reset(u32),
    /// GOAWAY with this reason, and that this request was not processed; then the connection ends.
    GoAway(u32),
}

#[derive(Debug, Default)]
struct Counts {
    accepted: AtomicUsize,
    /// Requests under way now, and the most there ever were.
    open: Mutex<(isize, isize)>,
}

pub(crate) struct RawHttp2 {
    raw: Raw,
    counts: Arc<Counts>,
    pub(crate) authority: Authority,
}

impl RawHttp2 {
    /// `react` gets the number of the connection and of the request on it, both from 0. With
    /// `most`, so many streams are allowed at once (SETTINGS_MAX_CONCURRENT_STREAMS).
    pub(crate) async fn start(
        most: Option<u32>,
        react: impl Fn(usize, usize) -> Reaction + Send + Sync + Clone + 'static,
    ) -> Self {
        let authority = Authority::new();
        let mut config = authority.server(&authority.sign("127.0.0.1"), false);
        config.alpn_protocols = vec![b"h2".to_vec()];
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let (counts, connections) = (Arc::new(Counts::default()), Arc::new(AtomicUsize::new(0)));
        let counting = counts.clone();
        let raw = Raw::start(move |stream: TcpStream| {
            let (acceptor, react, counts) = (acceptor.clone(), react.clone(), counting.clone());
            let number = connections.fetch_add(1, Ordering::SeqCst);
            Box::pin(async move {
                serve(
                    acceptor.accept(stream).await?,
                    most,
                    move |request| react(number, request),
                    &counts,
                )
                .await
            })
        })
        .await;
        Self { raw, counts, authority }
    }

    pub(crate) fn url(&self) -> String {
        self.raw.url().replace("http:", "https:")
    }

    pub(crate) fn connections(&self) -> usize {
        self.raw.connections()
    }

    /// Requests that were answered with 200.
    pub(crate) fn accepted(&self) -> usize {
        self.counts.accepted.load(Ordering::SeqCst)
    }

    /// The most requests that were under way at once.
    pub(crate) fn most_at_once(&self) -> isize {
        self.counts.open.lock().expect("not poisoned").1
    }
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).expect("short").to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// A frame as it came: kind, flags, stream, payload.
type Frame = (u8, u8, u32, Vec<u8>);

async fn read_frames(
    mut stream: ReadHalf<TlsStream<TcpStream>>,
    frames: mpsc::UnboundedSender<Frame>,
) -> Result<()> {
    let mut preface = [0; 24];
    stream.read_exact(&mut preface).await?;
    loop {
        let mut head = [0; 9];
        stream.read_exact(&mut head).await?;
        let mut payload = vec![0; u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize];
        stream.read_exact(&mut payload).await?;
        let id = u32::from_be_bytes([head[5], head[6], head[7], head[8]]) & 0x7fff_ffff;
        if frames.send((head[3], head[4], id, payload)).is_err() {
            return Ok(());
        }
    }
}

async fn serve(
    stream: TlsStream<TcpStream>,
    most: Option<u32>,
    react: impl Fn(usize) -> Reaction,
    counts: &Counts,
) -> Result<()> {
    let (reading, mut stream) = tokio::io::split(stream);
    let (sender, mut frames) = mpsc::unbounded_channel();
    tokio::spawn(read_frames(reading, sender));
    let settings = most.map_or_else(Vec::new, |most| [&[0, 3][..], &most.to_be_bytes()].concat());
    stream.write_all(&frame(SETTINGS, 0, 0, &settings)).await?;
    let (mut requests, mut last_answered) = (0, 0);
    // Streams and when their answers are due.
    let mut due: Vec<(Instant, u32)> = Vec::new();
    loop {
        let next = due.iter().map(|(at, _)| *at).min();
        let (kind, flags, id, payload) = tokio::select! {
            biased;
            () = tokio::time::sleep_until(next.unwrap_or_else(Instant::now)), if next.is_some() => {
                let first = due.iter().position(|(at, _)| Some(*at) == next).expect("just found");
                let (_, id) = due.remove(first);
                // `:status: 200` is the eighth of HPACK's static table.
                stream.write_all(&frame(HEADERS, END_STREAM | END_HEADERS, id, &[0x88])).await?;
                last_answered = last_answered.max(id);
                counts.accepted.fetch_add(1, Ordering::SeqCst);
                counts.open.lock().expect("not poisoned").0 -= 1;
                continue;
            }
            frame = frames.recv() => match frame {
                Some(frame) => frame,
                None => return Ok(()),
            },
        };
        if kind == DATA && !payload.is_empty() {
            let read = u32::try_from(payload.len()).expect("short").to_be_bytes();
            stream.write_all(&frame(WINDOW_UPDATE, 0, 0, &read)).await?;
        }
        match kind {
            PING if flags & ACK == 0 => stream.write_all(&frame(PING, ACK, 0, &payload)).await?,
            SETTINGS if flags & ACK == 0 => stream.write_all(&frame(SETTINGS, ACK, 0, &[])).await?,
            HEADERS => {
                let mut open = counts.open.lock().expect("not poisoned");
                open.0 += 1;
                open.1 = open.1.max(open.0);
            }
            RST_STREAM => {
                due.retain(|(_, stream)| *stream != id);
                counts.open.lock().expect("not poisoned").0 -= 1;
            }
            DATA if flags & END_STREAM != 0 => {
                match react(requests) {
                    Reaction::Accept(after) => due.push((Instant::now() + after, id)),
                    Reaction::Reset(reason) => {
                        counts.open.lock().expect("not poisoned").0 -= 1;
                        stream.write_all(&frame(RST_STREAM, 0, id, &reason.to_be_bytes())).await?;
                    }
                    Reaction::GoAway(reason) => {
                        let text = b"secret-text of the receiver";
                        let payload =
                            [&u32::to_be_bytes(last_answered)[..], &reason.to_be_bytes(), text]
                                .concat();
                        stream.write_all(&frame(GOAWAY, 0, 0, &payload)).await?;
                        return stream.shutdown().await;
                    }
                }
                requests += 1;
            }
            _ => {}
        }
    }
}

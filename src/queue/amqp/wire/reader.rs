//! The task that reads a connection.
//!
//! It runs where the consumers do, so that a delivery wakes its lane and no other thread; lapin's
//! own thread sleeps until there is something for it.

use std::{
    io,
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use bytes::{Buf as _, Bytes};
use tokio::{io::AsyncReadExt as _, sync::mpsc};

use super::{Incoming, filter::Filter};
use crate::clock;

/// Reads that may wait for lapin. Then the socket waits too.
const WAITING: usize = 16;

/// The time without a byte after which lapin gets a heartbeat while there are deliveries.
///
/// RabbitMQ sends none while it sends other things, and lapin ends a connection on which it has
/// read nothing for twice the agreed interval, of which the shortest is a second.
const QUIET: Duration = Duration::from_millis(500);

/// Reads a socket until it ends or lapin does.
pub(super) struct Reader {
    incoming: Incoming,
    filter: Filter,
    to_lapin: mpsc::Sender<io::Result<Bytes>>,
    /// When lapin was last given something.
    heard: Instant,
    quiet: Duration,
}

impl Reader {
    pub(super) fn new(incoming: Incoming, filter: Filter) -> (Self, ForLapin) {
        let (to_lapin, chunks) = mpsc::channel(WAITING);
        let heard = clock::instant();
        let reader = Self { incoming, filter, to_lapin, heard, quiet: QUIET };
        (reader, ForLapin { chunks, chunk: Bytes::new() })
    }

    pub(super) async fn run(mut self) {
        loop {
            let read = self.incoming.read(self.filter.room()).await;
            let goes_on = match read {
                Ok(0) => {
                    self.filter.end();
                    self.hand_over().await;
                    return;
                }
                Ok(n) => {
                    self.filter.filled(n);
                    if clock::instant().duration_since(self.heard) >= self.quiet {
                        self.filter.beat();
                    }
                    self.hand_over().await
                }
                Err(e) => {
                    self.to_lapin.send(Err(e)).await.ok(); // lapin may be gone
                    return;
                }
            };
            if !goes_on {
                return;
            }
        }
    }

    /// Gives lapin what is for it. Returns whether it is still there.
    async fn hand_over(&mut self) -> bool {
        let rest = self.filter.take_rest();
        if rest.is_empty() {
            return !self.to_lapin.is_closed();
        }
        self.heard = clock::instant();
        self.to_lapin.send(Ok(rest)).await.is_ok()
    }
}

/// What lapin reads.
pub(super) struct ForLapin {
    chunks: mpsc::Receiver<io::Result<Bytes>>,
    chunk: Bytes,
}

impl ForLapin {
    pub(super) fn poll_read(
        &mut self,
        cx: &mut Context<'_>,
        out: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        while self.chunk.is_empty() {
            match ready!(self.chunks.poll_recv(cx)) {
                Some(chunk) => self.chunk = chunk?,
                None => return Poll::Ready(Ok(0)),
            }
        }
        let n = out.len().min(self.chunk.len());
        self.chunk.copy_to_slice(&mut out[..n]);
        Poll::Ready(Ok(n))
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use tokio::io::AsyncWriteExt as _;

    use super::{super::content::Inboxes, *};

    async fn read(for_lapin: &mut ForLapin, at_most: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; at_most];
        let n = poll_fn(|cx| for_lapin.poll_read(cx, &mut bytes)).await?;
        bytes.truncate(n);
        Ok(bytes)
    }

    /// A socket that fails.
    struct Reset;

    impl tokio::io::AsyncRead for Reset {
        fn poll_read(
            self: std::pin::Pin<&mut Self>,
            _: &mut Context<'_>,
            _: &mut tokio::io::ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()))
        }
    }

    const METHOD: &[u8] = &[1, 0, 1, 0, 0, 0, 4, 0, 60, 0, 21, 0xce];
    const BROKEN: &[u8] = &[1, 0, 1, 0, 0, 0, 4, 0, 60];
    const HEARTBEAT: &[u8] = &[8, 0, 0, 0, 0, 0, 0, 0xce];

    #[tokio::test]
    async fn lapin_reads_everything_to_the_end_in_pieces_of_its_size() {
        let (mut broker, socket) = tokio::io::duplex(1000);
        let (reader, mut for_lapin) = Reader::new(Box::new(socket), Filter::new(4096));
        let reading = tokio::spawn(reader.run());
        broker.write_all(&[METHOD, METHOD, BROKEN].concat()).await.expect("writes");
        assert_eq!(read(&mut for_lapin, 5).await.expect("reads"), METHOD[..5]);
        assert_eq!(
            read(&mut for_lapin, 100).await.expect("reads"),
            [&METHOD[5..], METHOD].concat()
        );
        drop(broker);
        assert_eq!(read(&mut for_lapin, 100).await.expect("reads"), BROKEN);
        assert_eq!(read(&mut for_lapin, 100).await.expect("ends"), b"");
        reading.await.expect("ends");
    }

    #[tokio::test]
    async fn lapin_is_told_why_a_socket_failed() {
        let (reader, mut for_lapin) = Reader::new(Box::new(Reset), Filter::new(4096));
        reader.run().await;
        let error = read(&mut for_lapin, 100).await.expect_err("it failed");
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        assert_eq!(read(&mut for_lapin, 100).await.expect("ends"), b"");
    }

    #[tokio::test]
    async fn deliveries_keep_lapin_alive_and_its_end_ends_the_reader() {
        let deliver =
            [&[1, 0, 1, 0, 0, 0, 17, 0, 60, 0, 60, 1, b'a'], &[0; 9][..], &[0, 0, 0xce]].concat();
        let header = [&[2, 0, 1, 0, 0, 0, 14, 0, 60], &[0; 12][..], &[0xce]].concat();
        let inboxes = Inboxes::default();
        let opened = inboxes.open(1, "a");
        let (mut broker, socket) = tokio::io::duplex(1000);
        let (reader, mut for_lapin) =
            Reader::new(Box::new(socket), Filter::new(4096).serving(inboxes));
        let reading = tokio::spawn(Reader { quiet: Duration::ZERO, ..reader }.run());
        broker.write_all(&[&deliver[..], &header].concat()).await.expect("writes");
        assert_eq!(read(&mut for_lapin, 100).await.expect("reads"), HEARTBEAT);
        assert_eq!(opened.take_arrived().0.len(), 1);
        // Not in the middle of a frame of lapin's, the body of a message that nobody takes.
        broker.write_all(&[3, 0, 1, 0, 0, 0, 2, b'x']).await.expect("writes");
        broker.write_all(&[b'y', 0xce]).await.expect("writes");
        let mut body = Vec::new();
        while !body.ends_with(&[b'y', 0xce]) {
            body.extend(read(&mut for_lapin, 100).await.expect("reads"));
        }
        assert!(body.ends_with(&[3, 0, 1, 0, 0, 0, 2, b'x', b'y', 0xce]), "{body:?}");
        drop(for_lapin);
        broker.write_all(&[&deliver[..], &header].concat()).await.expect("writes");
        reading.await.expect("ends without its socket having ended");
    }
}

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
    heard: Instant,
}

impl Reader {
    pub(super) fn new(incoming: Incoming, filter: Filter) -> (Self, ForLapin) {
        let (to_lapin, chunks) = mpsc::channel(WAITING);
        let reader = Self { incoming, filter, to_lapin, heard: clock::instant() };
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
        let now = clock::instant();
        if now.duration_since(self.heard) > QUIET {
            self.filter.beat();
        }
        let rest = self.filter.take_rest();
        if rest.is_empty() {
            return !self.to_lapin.is_closed();
        }
        self.heard = now;
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

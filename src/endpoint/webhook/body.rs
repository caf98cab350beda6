//! The body of a request, and how far it got on its way.

use std::{
    convert::Infallible,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use hyper::body::{Body, Frame, SizeHint};
use tokio::{sync::Notify, time};

/// What is handed to the connection at once, in bytes. HTTP/1.1 buffers up to 16 of them: the less
/// that is, the better it is known how far a body got.
const PIECE: usize = 16 * 1024;

/// How long after the time of an attempt it is still waited for the connection: its own limit is at
/// most that time, and is to be what is told.
pub(super) const GRACE: Duration = Duration::from_secs(1);

/// How far a request got: told by its body.
#[derive(Debug, Default)]
pub(super) struct Progress {
    begun: AtomicBool,
    /// Wakes who waits for that.
    beginning: Notify,
    whole: AtomicBool,
}

/// Why an attempt is over although nothing came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Late {
    /// The client has a connection and had no place on it.
    Unsent,
    Unanswered,
}

impl Progress {
    /// The client has asked for the body, so its request is on a connection, over HTTP/2 on a
    /// stream.
    pub(super) fn has_begun(&self) -> bool {
        self.begun.load(Ordering::Acquire)
    }

    /// The client has begun to take the body and not taken all of it. What it has taken may still
    /// be in its buffers or the system's.
    pub(super) fn is_sending(&self) -> bool {
        self.has_begun() && !self.whole.load(Ordering::Acquire)
    }

    /// The same request is sent again from its beginning. Its time goes on.
    pub(super) fn again(&self) {
        self.whole.store(false, Ordering::Release);
    }

    fn begins(&self) {
        if !self.begun.swap(true, Ordering::AcqRel) {
            self.beginning.notify_one();
        }
    }

    /// Completes when the time of the attempt is over: `limit` from when the request began, which
    /// has to be within that, too.
    pub(super) async fn late(&self, limit: Duration) -> Late {
        if time::timeout(limit + GRACE, self.beginning.notified()).await.is_err() {
            return Late::Unsent;
        }
        time::sleep(limit).await;
        Late::Unanswered
    }
}

/// A body that tells how far it got.
#[derive(Debug)]
pub(super) struct Outgoing {
    rest: Bytes,
    progress: Arc<Progress>,
}

impl Outgoing {
    pub(super) fn new(body: Bytes, progress: Arc<Progress>) -> Self {
        Self { rest: body, progress }
    }
}

impl Body for Outgoing {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        self.progress.begins();
        let piece = self.rest.len().min(PIECE);
        let piece = self.rest.split_to(piece);
        if self.rest.is_empty() {
            self.progress.whole.store(true, Ordering::Release);
        }
        Poll::Ready((!piece.is_empty()).then_some(Ok(Frame::data(piece))))
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.rest.len() as u64)
    }
}

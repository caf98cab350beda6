//! The body of a request, and how much of it was sent.

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

/// Bytes that the connection gets at once. HTTP/1.1 buffers up to 16 pieces: the smaller they are,
/// the better it is known how much of a body was sent.
const PIECE: usize = 16 * 1024;

/// The wait for a connection beyond the time of an attempt. The connection's own limit is at most
/// that time, and its error is the one to report.
pub(super) const GRACE: Duration = Duration::from_secs(1);

/// The progress of a request, as its body sees it.
#[derive(Debug, Default)]
pub(super) struct Progress {
    begun: AtomicBool,
    /// Notified when it begins.
    beginning: Notify,
    whole: AtomicBool,
}

/// Why an attempt ends without an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Late {
    /// The client has a connection and no place on it.
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

    /// The same request is resent from its beginning. Its time goes on.
    pub(super) fn again(&self) {
        self.whole.store(false, Ordering::Release);
    }

    fn begins(&self) {
        if !self.begun.swap(true, Ordering::AcqRel) {
            self.beginning.notify_one();
        }
    }

    /// Completes when the time of the attempt ends: `limit` after the request began, which has to
    /// begin within `limit` and [`GRACE`].
    pub(super) async fn late(&self, limit: Duration) -> Late {
        if time::timeout(limit + GRACE, self.beginning.notified()).await.is_err() {
            return Late::Unsent;
        }
        time::sleep(limit).await;
        Late::Unanswered
    }
}

/// A body that reports its progress.
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

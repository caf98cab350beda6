//! Compressed requests (RFC 9110, section 8.4.1.3), as long as the receiver takes them.

use std::{
    io::Write as _,
    sync::atomic::{AtomicBool, Ordering},
};

use bytes::Bytes;
use flate2::{Compression as Level, write::GzEncoder};
use http::StatusCode;

/// The value of `content-encoding`.
pub(super) const GZIP: &str = "gzip";

/// Bodies of more bytes are compressed on a thread of their own: it takes milliseconds.
const LARGE: usize = 128 * 1024;

/// Whether a subscriber's requests are compressed. It was refused where an answer was 415 and the
/// same request without compression was accepted.
#[derive(Debug, Default)]
pub(super) struct Compressing {
    refused: AtomicBool,
}

impl Compressing {
    pub(super) fn is_refused(&self) -> bool {
        self.refused.load(Ordering::Relaxed)
    }

    pub(super) fn set_refused(&self, refused: bool) {
        self.refused.store(refused, Ordering::Relaxed);
    }
}

/// How a request was sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Coding {
    Plain,
    Gzip,
    /// Plain, after the receiver refused it compressed.
    PlainAgain,
}

/// Whether a receiver may have answered so because a request was compressed.
pub(super) fn is_about_coding(status: u16) -> bool {
    status == StatusCode::UNSUPPORTED_MEDIA_TYPE.as_u16()
}

/// The body compressed.
pub(super) async fn compressed(body: &Bytes) -> Result<Bytes, String> {
    if body.len() <= LARGE {
        return gzip(body);
    }
    let body = body.clone();
    let compressing = tokio::task::spawn_blocking(move || gzip(&body));
    compressing.await.map_err(|e| format!("the body was not compressed: {e}"))?
}

fn gzip(body: &[u8]) -> Result<Bytes, String> {
    let room = Vec::with_capacity(body.len() / 4 + 64);
    // Events repeat themselves so much that the higher levels cost time and save little.
    let mut encoder = GzEncoder::new(room, Level::fast());
    let written = encoder.write_all(body).and_then(|()| encoder.finish());
    written.map(Bytes::from).map_err(|e| format!("the body was not compressed: {e}"))
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use flate2::read::GzDecoder;

    use super::*;

    #[tokio::test]
    async fn a_compressed_body_inflates_to_the_same_bytes() {
        for length in [0, 1, 400, LARGE, LARGE + 1, 1 << 20] {
            let body: Bytes = r#"{"event":"user.login"},"#.bytes().cycle().take(length).collect();
            let sent = compressed(&body).await.expect("compresses");
            assert!(sent.len() < body.len() || length < 64, "{length}");
            let mut inflated = Vec::new();
            GzDecoder::new(&sent[..]).read_to_end(&mut inflated).expect("gzip");
            assert_eq!(inflated, body);
        }
    }
}

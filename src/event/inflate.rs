//! Compressed bodies, of HTTP requests and of messages.

use std::io::Read;

use flate2::read::{DeflateDecoder, MultiGzDecoder, ZlibDecoder};

/// The encoding of a body, as its producer declares it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Coding {
    Plain,
    /// gzip or deflate; the bytes show which, since some clients declare one and send the other.
    Compressed,
    /// An encoding that is not supported.
    Unknown,
}

/// Charsets and transfer encodings that do not change JSON. Clients declare them as the content
/// encoding of a message, too.
const HARMLESS: [&str; 9] =
    ["", "identity", "utf-8", "utf8", "us-ascii", "ascii", "binary", "8bit", "7bit"];

/// The names that kombu writes into its header `compression`.
const COMPRESSED: [&str; 6] =
    ["gzip", "x-gzip", "deflate", "zlib", "application/x-gzip", "application/x-zlib"];

impl Coding {
    /// Reads a content encoding such as `gzip`, `gzip:UTF-8` (Spring) or `utf-8` (kombu).
    pub fn of(text: &str) -> Self {
        let text = text.to_ascii_lowercase();
        let mut codings =
            text.split([',', ':']).map(str::trim).filter(|part| !HARMLESS.contains(part));
        match (codings.next(), codings.next()) {
            (None, _) => Self::Plain,
            (Some(one), None) if COMPRESSED.contains(&one) => Self::Compressed,
            _ => Self::Unknown,
        }
    }
}

/// The reason why a body cannot be inflated.
#[derive(Debug)]
pub enum Broken {
    TooLong,
    /// The bytes are not of the declared encoding.
    Bytes(std::io::Error),
}

/// Inflates a body that was compressed by gzip.
///
/// # Errors
/// The body is not gzip, or inflates to more than `most` bytes.
pub fn gunzip(body: &[u8], most: usize) -> Result<Vec<u8>, Broken> {
    read(MultiGzDecoder::new(body), most)
}

/// Inflates a [compressed](Coding::Compressed) body.
///
/// # Errors
/// Those of [`gunzip`].
pub fn inflate(body: &[u8], most: usize) -> Result<Vec<u8>, Broken> {
    match *body {
        [0x1f, 0x8b, ..] => gunzip(body, most),
        // RFC 1950, section 2.2: the method, and a checksum over the first two bytes.
        [a, b, ..] if a & 0x0f == 8 && u16::from_be_bytes([a, b]).is_multiple_of(31) => {
            read(ZlibDecoder::new(body), most)
        }
        _ => read(DeflateDecoder::new(body), most),
    }
}

fn read(decoder: impl Read, most: usize) -> Result<Vec<u8>, Broken> {
    let mut out = Vec::new();
    decoder.take(most as u64 + 1).read_to_end(&mut out).map_err(Broken::Bytes)?;
    if out.len() > most { Err(Broken::TooLong) } else { Ok(out) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use flate2::{
        Compression,
        write::{DeflateEncoder, GzEncoder, ZlibEncoder},
    };
    use std::io::Write;

    #[test]
    fn a_content_encoding_is_read_as_clients_write_it() {
        for plain in ["", "identity", "utf-8", "UTF-8", "binary", "us-ascii", "identity, utf-8"] {
            assert_eq!(Coding::of(plain), Coding::Plain, "{plain}");
        }
        for compressed in [
            "gzip",
            "GZIP",
            "x-gzip",
            "gzip:UTF-8",
            "gzip, utf-8",
            "deflate",
            "zlib",
            "application/x-gzip",
        ] {
            assert_eq!(Coding::of(compressed), Coding::Compressed, "{compressed}");
        }
        for unknown in ["br", "gzip,gzip", "zstd", "iso-8859-1", "gzip:br", "application/x-bz2"] {
            assert_eq!(Coding::of(unknown), Coding::Unknown, "{unknown}");
        }
    }

    #[test]
    fn each_kind_is_known_by_its_bytes_and_inflated_no_further_than_allowed() {
        let text = br#"{"event":"a"}"#.repeat(100);
        let mut gzip = GzEncoder::new(Vec::new(), Compression::best());
        let mut zlib = ZlibEncoder::new(Vec::new(), Compression::best());
        let mut raw = DeflateEncoder::new(Vec::new(), Compression::best());
        for writer in [&mut gzip as &mut dyn Write, &mut zlib, &mut raw] {
            writer.write_all(&text).expect("writes");
        }
        for body in [gzip.finish(), zlib.finish(), raw.finish()].map(|done| done.expect("ends")) {
            assert_eq!(inflate(&body, text.len()).expect("inflates"), text);
            assert!(matches!(inflate(&body, text.len() - 1), Err(Broken::TooLong)));
            assert!(
                matches!(inflate(&body[..body.len() / 2], text.len()), Err(Broken::Bytes(_))),
                "it is cut"
            );
        }
        for nothing in [&b""[..], b"x", b"{\"event\":\"a\"}", b"\x1f\x8b"] {
            assert!(matches!(inflate(nothing, 100), Err(Broken::Bytes(_))), "{nothing:?}");
        }
    }
}

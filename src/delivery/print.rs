//! Prints: how a history recognises an event in a batch.

use std::sync::Arc;

use base64::{Engine as _, engine::general_purpose::STANDARD_NO_PAD as BASE64};
use sha2::{Digest as _, Sha256};

/// The first 8 bytes of the SHA-256 of an event's published bytes.
///
/// A request body may hold other bytes: JSON Lines drop line breaks, and `event_ids` adds a field.
/// Two events with the same bytes have the same print. Of a million different events two share one
/// with a probability of 3 in 10^8.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Print([u8; 8]);

/// The prints of a batch's events in their order; `None` if they are not known.
pub type Prints = Option<Arc<[Print]>>;

impl Print {
    /// Bytes of a print.
    pub const LEN: usize = 8;

    /// The number of prints that are stored with a batch. A batch of more events is stored without:
    /// the headers of a message must stay short.
    pub const MAX_STORED: usize = 768;

    /// The longest text of prints, in bytes: 8 KiB.
    pub const MAX_TEXT: usize = Self::MAX_STORED * Self::LEN / 3 * 4;

    pub fn of(event: &[u8]) -> Self {
        Self::from_sha256(&Sha256::digest(event).into())
    }

    /// The print of an event with this SHA-256.
    pub fn from_sha256(digest: &[u8; 32]) -> Self {
        let mut print = [0; Self::LEN];
        print.copy_from_slice(&digest[..Self::LEN]);
        Self(print)
    }

    pub const fn from_bytes(bytes: [u8; Self::LEN]) -> Self {
        Self(bytes)
    }

    pub const fn as_bytes(&self) -> &[u8; Self::LEN] {
        &self.0
    }

    /// The bytes that a queue stores, one print after the other; `None` if they are unknown or more
    /// than [`Self::MAX_STORED`].
    pub(crate) fn to_bytes(prints: &Prints) -> Option<Vec<u8>> {
        let prints = prints.as_ref().filter(|prints| prints.len() <= Self::MAX_STORED)?;
        Some(prints.iter().flat_map(|print| print.0).collect())
    }

    /// Reads the stored prints of a batch of `events` events. Anything else is unknown.
    pub(crate) fn read_bytes(bytes: &[u8], events: u32) -> Prints {
        let (prints, rest) = bytes.as_chunks();
        let is_sound = !prints.is_empty() && rest.is_empty() && prints.len() == events as usize;
        is_sound.then(|| prints.iter().copied().map(Self).collect())
    }

    /// The text that a queue stores: [`Self::to_bytes`] as base64 (RFC 4648, section 4) without
    /// padding.
    pub(crate) fn to_text(prints: &Prints) -> Option<String> {
        Self::to_bytes(prints).map(|bytes| BASE64.encode(bytes))
    }

    /// Reads the stored text of a batch of `events` events. Anything else is unknown: any client of
    /// the broker can write it, and it must not keep the batch from being sent.
    pub(crate) fn read_text(text: &str, events: u32) -> Prints {
        let short = Some(text).filter(|text| text.len() <= Self::MAX_TEXT)?;
        Self::read_bytes(&BASE64.decode(short).ok()?, events)
    }

    /// The prints of the first `at` of `all` events, and of the others. Both are unknown if there is
    /// not one for each event.
    pub(super) fn split(prints: &Prints, at: usize, all: usize) -> [Prints; 2] {
        let prints = prints.as_ref().filter(|prints| prints.len() == all);
        let parts = prints.and_then(|prints| prints.split_at_checked(at));
        parts.map_or([None, None], |(first, second)| [Some(first.into()), Some(second.into())])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prints(n: usize) -> Prints {
        Some((0..n).map(|n| Print::of(&n.to_be_bytes())).collect())
    }

    #[test]
    fn a_print_is_the_beginning_of_the_sha_256() {
        // FIPS 180-4, example "abc".
        let print = Print([0xba, 0x78, 0x16, 0xbf, 0x8f, 0x01, 0xcf, 0xea]);
        assert_eq!(Print::of(b"abc"), print);
    }

    #[test]
    fn prints_are_stored_up_to_8_kib_and_read_back() {
        for n in [1, 2, 3, Print::MAX_STORED] {
            let prints = prints(n);
            let text = Print::to_text(&prints).expect("few enough");
            assert!(text.len() <= 8 * 1024 && !text.contains('='), "{n}: {} bytes", text.len());
            let events = u32::try_from(n).expect("few");
            assert_eq!(Print::read_text(&text, events), prints, "{n}");
            let bytes = Print::to_bytes(&prints).expect("few enough");
            assert_eq!(Print::read_bytes(&bytes, events), prints, "{n}");
            assert_eq!(Print::read_text(&text, events + 1), None, "{n}");
        }
        assert_eq!(Print::MAX_TEXT, 8 * 1024);
        let many = prints(Print::MAX_STORED + 1);
        assert_eq!((Print::to_bytes(&many), Print::to_text(&many)), (None, None));
        assert_eq!(Print::to_text(&None), None);
    }

    #[test]
    fn a_foreign_text_is_unknown() {
        let many = BASE64.encode(vec![0; (Print::MAX_STORED + 1) * Print::LEN]);
        for (text, events) in [
            ("", 0),
            ("", 1),
            ("AAAAAAAAAAA", 0),
            ("AAAAAAAAAAA", 2),
            ("AAAAAAAAAAA=", 1),
            ("AAAAAAAAAAB", 1), // bits beyond the last byte
            ("AAAAAAAAAA", 1),
            ("\u{1b}[2Jé", 1),
            (&many, 769),
        ] {
            assert_eq!(Print::read_text(text, events), None, "{text:?}");
        }
        assert!(Print::read_text("AAAAAAAAAAA", 1).is_some());
    }

    #[test]
    fn halves_have_the_prints_if_there_is_one_for_each_event() {
        let all = prints(3).expect("known");
        let halves = [Some(all[..2].into()), Some(all[2..].into())];
        assert_eq!(Print::split(&Some(all.clone()), 2, 3), halves);
        for (prints, at, all) in
            [(Some(all.clone()), 1, 4), (Some(all.clone()), 1, 2), (Some(all), 4, 3), (None, 1, 3)]
        {
            assert_eq!(Print::split(&prints, at, all), [None, None]);
        }
    }
}

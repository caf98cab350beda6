//! Pages of long lists: how many rows one has, and where the next one begins.

use std::fmt;

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD as BASE64};
use sha2::{Digest as _, Sha256};

/// Rows of a page: the default, and the most.
pub const DEFAULT_LIMIT: usize = 50;
pub const MAX_LIMIT: usize = 500;

/// The first byte of a cursor. A cursor of another version is refused, not guessed at.
const VERSION: u8 = 1;

/// Bytes of a cursor's parts, in their order: version, list, row, checksum.
const CONTENT: usize = 1 + 1 + 8;
const CHECKSUM: usize = 4;

/// A list that has pages. A cursor of one list is not valid for another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum List {
    Events,
    Deliveries,
    Operations,
    Subscribers,
    Replays,
}

impl List {
    const ALL: [Self; 5] =
        [Self::Events, Self::Deliveries, Self::Operations, Self::Subscribers, Self::Replays];

    /// Numbers are public: they stand in cursors that clients keep.
    const fn number(self) -> u8 {
        match self {
            Self::Events => 1,
            Self::Deliveries => 2,
            Self::Operations => 3,
            Self::Subscribers => 4,
            Self::Replays => 5,
        }
    }
}

/// The place in a list at which a page ended. Its text is URL-safe and says nothing to clients.
///
/// The checksum protects from mistakes, such as a text that was cut, and not from forgery: any row
/// that a client may read may be the row of a cursor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cursor {
    pub list: List,
    /// The number of the last row of the page; what comes after it depends on the list's order.
    pub row: i64,
}

/// The error for a text that is no cursor of the list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NotACursor {
    Unreadable,
    /// It was made by a version of hooktrail that writes cursors otherwise.
    OfAnotherVersion,
    OfAnotherList,
}

impl fmt::Display for NotACursor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Unreadable => "must be the `next` of an earlier answer, unchanged",
            Self::OfAnotherVersion => {
                "was made by another version of hooktrail; begin without a cursor"
            }
            Self::OfAnotherList => "is of another list; begin without a cursor",
        })
    }
}

impl std::error::Error for NotACursor {}

impl Cursor {
    /// # Errors
    /// The text is no cursor, or one of another version or of another list.
    pub fn parse(text: &str, list: List) -> Result<Self, NotACursor> {
        let bytes = BASE64.decode(text).map_err(|_| NotACursor::Unreadable)?;
        let (content, given) = bytes.split_last_chunk().ok_or(NotACursor::Unreadable)?;
        if checksum(content) != *given {
            return Err(NotACursor::Unreadable);
        }
        let (version, rest) = content.split_first().ok_or(NotACursor::Unreadable)?;
        if *version != VERSION {
            return Err(NotACursor::OfAnotherVersion);
        }
        let (number, row) = rest.split_first().ok_or(NotACursor::Unreadable)?;
        let row = row.try_into().map(i64::from_be_bytes).map_err(|_| NotACursor::Unreadable)?;
        let of = List::ALL.into_iter().find(|list| list.number() == *number);
        if of != Some(list) {
            return Err(NotACursor::OfAnotherList);
        }
        Ok(Self { list, row })
    }
}

impl fmt::Display for Cursor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut bytes = Vec::with_capacity(CONTENT + CHECKSUM);
        bytes.extend([VERSION, self.list.number()]);
        bytes.extend(self.row.to_be_bytes());
        let sum = checksum(&bytes);
        bytes.extend(sum);
        f.write_str(&BASE64.encode(bytes))
    }
}

fn checksum(content: &[u8]) -> [u8; CHECKSUM] {
    let digest: [u8; 32] =
        Sha256::new().chain_update("hooktrail cursor\n").chain_update(content).finalize().into();
    std::array::from_fn(|n| digest[n])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cursor_is_read_as_it_was_written_and_is_safe_in_a_url() {
        for list in List::ALL {
            for row in [0, 1, 255, 1_234_567, i64::MAX, -1, i64::MIN] {
                let text = Cursor { list, row }.to_string();
                assert_eq!(Cursor::parse(&text, list), Ok(Cursor { list, row }), "{text}");
                let safe = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_');
                assert!(text.bytes().all(safe) && text.len() == 19, "{text}");
            }
        }
        // Clients keep cursors, so their text must not change.
        let text = Cursor { list: List::Events, row: 42 }.to_string();
        assert_eq!(text, "AQEAAAAAAAAAKs4wcT4");
    }

    #[test]
    fn any_other_text_is_refused() {
        let cursor = Cursor { list: List::Events, row: 42 };
        let text = cursor.to_string();
        assert_eq!(Cursor::parse(&text, List::Operations), Err(NotACursor::OfAnotherList));
        for (at, _) in text.char_indices() {
            for other in ['A', 'z', '_', '=', ' ', 'é'] {
                let mut changed = text.clone();
                changed.replace_range(at..=at, &other.to_string());
                if changed != text {
                    assert_eq!(
                        Cursor::parse(&changed, List::Events),
                        Err(NotACursor::Unreadable),
                        "{changed}"
                    );
                }
            }
            assert_eq!(Cursor::parse(&text[..at], List::Events), Err(NotACursor::Unreadable));
        }
        for garbage in ["garbage", "0", "42", &format!("{text}A"), &text.repeat(2), "\u{0}"] {
            assert_eq!(Cursor::parse(garbage, List::Events), Err(NotACursor::Unreadable));
        }
        let mut later = vec![VERSION + 1, 1, 7];
        later.extend(checksum(&later));
        assert_eq!(
            Cursor::parse(&BASE64.encode(later), List::Events),
            Err(NotACursor::OfAnotherVersion)
        );
    }
}

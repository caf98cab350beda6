//! What tells one dead letter from another, on every queue.

use std::{fmt, str::FromStr, time::SystemTime};

use sha2::{Digest as _, Sha256};

use crate::delivery::DeadLetter;

/// The key of a dead letter: 16 bytes of the SHA-256 of what it is, when it died, and why. An id may be
/// absent, or that of several; a number changes when another letter goes. Letters that are alike in all
/// have the same key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key([u8; Self::LEN]);

impl Key {
    const LEN: usize = 16;

    pub fn of(letter: &DeadLetter) -> Self {
        let since = |at: SystemTime| at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        // As precise as both queues store it.
        let died_at = letter.died_at.map_or(0, |at| since(at).as_millis());
        let id = letter.id.as_deref().unwrap_or_default();
        let digest = Sha256::new()
            .chain_update(letter.kind.name())
            .chain_update([0])
            .chain_update(letter.reason.name())
            .chain_update([0])
            .chain_update(id)
            .chain_update([0])
            .chain_update(died_at.to_be_bytes())
            .chain_update(&letter.body)
            .finalize();
        let mut key = [0; Self::LEN];
        key.copy_from_slice(&digest[..Self::LEN]);
        Self(key)
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl FromStr for Key {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const WRONG: &str =
            "must be the key of a dead letter: 32 hexadecimal digits, as its list has it";
        let digits = text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        let all = u128::from_str_radix(text, 16).ok();
        let all = all.filter(|_| digits && text.len() == 2 * Self::LEN);
        all.map(|all| Self(all.to_be_bytes())).ok_or(WRONG)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::delivery::Reason;

    #[test]
    fn a_key_tells_letters_apart_and_is_read_as_it_is_written() {
        let at = SystemTime::UNIX_EPOCH + Duration::from_millis(1500);
        let letter = |body: &'static str, id: Option<&str>, reason, at| {
            let (body, id) = (bytes::Bytes::from_static(body.as_bytes()), id.map(str::to_owned));
            DeadLetter::of_event(body, None, id, reason, String::new(), at)
        };
        let one = letter("{}", Some("a"), Reason::InvalidEvent, at);
        let key = Key::of(&one);
        assert_eq!(key.to_string().parse(), Ok(key));
        // A queue keeps milliseconds.
        let again = DeadLetter { died_at: Some(at + Duration::from_micros(7)), ..one.clone() };
        assert_eq!(Key::of(&again), key);
        for other in [
            letter("{ }", Some("a"), Reason::InvalidEvent, at),
            letter("{}", Some("b"), Reason::InvalidEvent, at),
            letter("{}", None, Reason::InvalidEvent, at),
            letter("{}", Some("a"), Reason::TooLarge, at),
            letter("{}", Some("a"), Reason::InvalidEvent, at + Duration::from_millis(1)),
        ] {
            assert_ne!(Key::of(&other), key, "{other:?}");
        }
        let text = key.to_string();
        for wrong in [
            "",
            "@1",
            &text[1..],
            &format!("{text}0"),
            &text.replace(|_| true, "+"),
            &text.replace(|_| true, "G"),
        ] {
            assert!(wrong.parse::<Key>().is_err(), "{wrong}");
        }
    }
}

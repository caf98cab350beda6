//! The trace that a request belongs to (W3C Trace Context, level 1,
//! <https://www.w3.org/TR/trace-context/#traceparent-header>).

use crate::clock;

/// The `traceparent` of a batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Trace {
    /// None of its events has one.
    None,
    /// All of them have this one.
    Shared(String),
    /// A new one, for events of several traces, or some that have none.
    New(String),
}

impl Trace {
    /// `all`: those of the events, as their producers wrote them.
    pub fn of<'t>(mut all: impl Iterator<Item = Option<&'t str>>) -> Self {
        let Some(first) = all.next() else { return Self::None };
        let (mut any, mut same) = (first.is_some(), true);
        for one in all {
            any |= one.is_some();
            same &= one == first;
        }
        match first {
            _ if !any => Self::None,
            Some(shared) if same => Self::Shared(shared.to_owned()),
            _ => Self::New(clock::traceparent()),
        }
    }

    pub fn into_text(self) -> Option<String> {
        match self {
            Self::None => None,
            Self::Shared(text) | Self::New(text) => Some(text),
        }
    }
}

/// Whether a text is a `traceparent` that may be sent on: a producer is a stranger.
pub fn is_traceparent(text: &str) -> bool {
    let is_hex = |text: &str, length: usize| {
        text.len() == length && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
    };
    let is_id = |text: &str, length| is_hex(text, length) && text.bytes().any(|b| b != b'0');
    let parts: Vec<&str> = text.split('-').collect();
    match parts[..] {
        // Version 00 has these four parts, a later one may have more.
        [version, trace, span, flags, ref more @ ..] => {
            is_hex(version, 2)
                && version != "ff"
                && (version != "00" || more.is_empty())
                && is_id(trace, 32)
                && is_id(span, 16)
                && is_hex(flags, 2)
                && text.is_ascii()
                && !text.contains(|c: char| c.is_control() || c == ' ')
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    const OTHER: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00";

    #[test]
    fn a_trace_is_that_of_all_events_or_a_new_one() {
        let of = |all: &[Option<&str>]| Trace::of(all.iter().copied());
        assert_eq!((of(&[]), of(&[None, None])), (Trace::None, Trace::None));
        assert_eq!(of(&[Some(ONE), Some(ONE)]), Trace::Shared(ONE.to_owned()));
        for several in [&[Some(ONE), Some(OTHER)][..], &[Some(ONE), None], &[None, Some(ONE)]] {
            let Trace::New(text) = of(several) else { panic!("{several:?}") };
            assert!(is_traceparent(&text) && text != ONE && text != OTHER, "{text}");
        }
    }

    #[test]
    fn what_is_no_traceparent_is_not_sent_on() {
        for sound in [
            ONE,
            OTHER,
            &ONE.replacen("00", "01", 1),
            &format!("{}-x", ONE.replacen("00", "cc", 1)),
        ] {
            assert!(is_traceparent(sound), "{sound}");
        }
        for wrong in [
            "",
            "00",
            &ONE.replacen("00", "ff", 1),
            &ONE.to_uppercase(),
            &format!("{ONE}-x"),
            &format!("{ONE}\r\nx: y"),
            &format!("{}-a b", ONE.replacen("00", "01", 1)),
            "00-00000000000000000000000000000000-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
        ] {
            assert!(!is_traceparent(wrong), "{wrong}");
        }
    }
}

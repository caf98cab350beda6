//! Whether a text is one JSON object (RFC 8259), and its fields `event` and `timestamp`, in one pass.
//!
//! A parser that can do more takes several times as long, and each event is checked. This one says
//! nothing of what it does not know: a mistake, and what is rare, is left to the parser, which also
//! has the words for it. It must never take what the parser refuses: the fuzz target `event` and a
//! property test hold it to that.

/// The last `event` and the last `timestamp` of an object, as they are written.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Found<'e> {
    pub(super) event_type: Option<&'e str>,
    pub(super) timestamp: Option<&'e str>,
}

/// Levels of objects and arrays that are followed here.
const LEVELS: u32 = 64;

/// `None`: it is no object, no JSON, nests deep, or has a key with an escape among its fields.
pub(super) fn fields(text: &str) -> Option<Found<'_>> {
    let mut at = Scanner { bytes: text.as_bytes(), at: 0 };
    at.space();
    at.pass(b'{')?;
    let mut found = Found::default();
    at.space();
    if at.peek()? == b'}' {
        at.at += 1;
    } else {
        loop {
            let key = at.key()?;
            let from = at.at;
            at.value()?;
            let value = text.get(from..at.at);
            match key {
                b"event" => found.event_type = value,
                b"timestamp" => found.timestamp = value,
                _ => {}
            }
            at.space();
            match at.next()? {
                b',' => at.space(),
                b'}' => break,
                _ => return None,
            }
        }
    }
    at.space();
    (at.at == text.len()).then_some(found)
}

struct Scanner<'e> {
    bytes: &'e [u8],
    at: usize,
}

impl<'e> Scanner<'e> {
    fn peek(&self) -> Option<u8> {
        self.bytes.get(self.at).copied()
    }

    fn next(&mut self) -> Option<u8> {
        let byte = self.peek()?;
        self.at += 1;
        Some(byte)
    }

    fn pass(&mut self, byte: u8) -> Option<()> {
        (self.next()? == byte).then_some(())
    }

    fn space(&mut self) {
        while let Some(b' ' | b'\n' | b'\t' | b'\r') = self.peek() {
            self.at += 1;
        }
    }

    /// Passes a key and its colon, and what is between. Returns the bytes between its quotes.
    fn key(&mut self) -> Option<&'e [u8]> {
        self.pass(b'"')?;
        let from = self.at;
        if self.text()? {
            return None;
        }
        let key = self.bytes.get(from..self.at - 1)?;
        self.colon()?;
        Some(key)
    }

    fn colon(&mut self) -> Option<()> {
        self.space();
        self.pass(b':')?;
        self.space();
        Some(())
    }

    /// Passes the rest of a text behind its quote. Returns whether it has escapes.
    fn text(&mut self) -> Option<bool> {
        let mut has_escapes = false;
        loop {
            self.plain();
            match self.next()? {
                b'"' => return Some(has_escapes),
                b'\\' => {
                    has_escapes = true;
                    self.escape()?;
                }
                0..0x20 => return None,
                _ => {}
            }
        }
    }

    /// Passes bytes that mean nothing in a text, eight at a time.
    fn plain(&mut self) {
        const ONES: u64 = u64::from_ne_bytes([0x01; 8]);
        const HIGHS: u64 = u64::from_ne_bytes([0x80; 8]);
        // The high bit of each byte that is zero, or below 0x20; bytes above the first of them may be
        // wrong. `!word` leaves out bytes of other than ASCII.
        let zeros = |word: u64| word.wrapping_sub(ONES) & !word & HIGHS;
        while let Some(eight) = self.bytes.get(self.at..).and_then(|b| b.first_chunk::<8>()) {
            let word = u64::from_le_bytes(*eight);
            let quotes = zeros(word ^ u64::from_ne_bytes([b'"'; 8]));
            let backslashes = zeros(word ^ u64::from_ne_bytes([b'\\'; 8]));
            let controls = word.wrapping_sub(u64::from_ne_bytes([0x20; 8])) & !word & HIGHS;
            let stops = quotes | backslashes | controls;
            self.at += (stops.trailing_zeros() / 8) as usize;
            if stops != 0 {
                return;
            }
        }
    }

    /// Passes an escape behind its backslash.
    fn escape(&mut self) -> Option<()> {
        match self.next()? {
            b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't' => Some(()),
            b'u' => {
                let digits = self.bytes.get(self.at..self.at + 4)?;
                self.at += 4;
                digits.iter().all(u8::is_ascii_hexdigit).then_some(())
            }
            _ => None,
        }
    }

    /// Passes a value.
    fn value(&mut self) -> Option<()> {
        // A bit for each level that is open: whether it is an object.
        let (mut objects, mut depth) = (0_u64, 0);
        loop {
            // A value begins here.
            match self.next()? {
                b'"' => {
                    self.text()?;
                }
                opening @ (b'{' | b'[') => {
                    self.space();
                    let is_object = opening == b'{';
                    if self.peek()? == if is_object { b'}' } else { b']' } {
                        self.at += 1;
                    } else {
                        if depth == LEVELS {
                            return None;
                        }
                        depth += 1;
                        objects = objects << 1 | u64::from(is_object);
                        if is_object {
                            self.inner_key()?;
                        }
                        continue;
                    }
                }
                b't' => self.word(b"rue")?,
                b'f' => self.word(b"alse")?,
                b'n' => self.word(b"ull")?,
                first => self.number(first)?,
            }
            // It has ended, and with it perhaps those around it.
            loop {
                if depth == 0 {
                    return Some(());
                }
                self.space();
                let is_object = objects & 1 == 1;
                match self.next()? {
                    b',' => {
                        self.space();
                        if is_object {
                            self.inner_key()?;
                        }
                        break;
                    }
                    b'}' if is_object => {}
                    b']' if !is_object => {}
                    _ => return None,
                }
                depth -= 1;
                objects >>= 1;
            }
        }
    }

    fn inner_key(&mut self) -> Option<()> {
        self.pass(b'"')?;
        self.text()?;
        self.colon()
    }

    fn word(&mut self, rest: &[u8]) -> Option<()> {
        let end = self.at + rest.len();
        let is_it = self.bytes.get(self.at..end)? == rest;
        self.at = end;
        is_it.then_some(())
    }

    /// Passes a number that begins with this byte.
    fn number(&mut self, first: u8) -> Option<()> {
        match if first == b'-' { self.next()? } else { first } {
            b'0' => {}
            b'1'..=b'9' => self.digits(),
            _ => return None,
        }
        if self.peek() == Some(b'.') {
            self.at += 1;
            self.digit()?;
            self.digits();
        }
        if let Some(b'e' | b'E') = self.peek() {
            self.at += 1;
            if let Some(b'+' | b'-') = self.peek() {
                self.at += 1;
            }
            self.digit()?;
            self.digits();
        }
        Some(())
    }

    fn digit(&mut self) -> Option<()> {
        self.next()?.is_ascii_digit().then_some(())
    }

    fn digits(&mut self) {
        while self.peek().is_some_and(|b| b.is_ascii_digit()) {
            self.at += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde::de::Deserializer as _;
    use serde_json::value::RawValue;

    use super::*;
    use crate::event::fields::HeadFields;

    /// The same by the parser.
    fn parsed(text: &str) -> Option<Found<'_>> {
        let mut json = serde_json::Deserializer::from_str(text);
        let (event_type, timestamp) = json.deserialize_map(HeadFields).ok()?;
        json.end().ok()?;
        Some(Found {
            event_type: event_type.map(RawValue::get),
            timestamp: timestamp.map(RawValue::get),
        })
    }

    #[test]
    fn what_it_takes_is_what_the_parser_takes() {
        for text in [
            "{}",
            " { } ",
            r#"{"event":"a","timestamp":1735830138,"x":[{"y":"\u00e9\n"},[],{},[1,2,-0.5e+10]],"z":null}"#,
            "{\"event\" :\t\"a\" ,\r\n\"t\": true , \"f\":false}\n",
            r#"{"event":1,"event":"last"}"#,
            r#"{"s":"a text that is longer than eight bytes, with \"quotes\" and é and 🦀 in it"}"#,
        ] {
            assert!(fields(text).is_some(), "{text}");
            assert_eq!(fields(text), parsed(text), "{text}");
        }
    }

    #[test]
    fn a_mistake_and_what_is_rare_is_left_to_the_parser() {
        for text in [
            "",
            " ",
            "[]",
            "1",
            "{",
            "{\"a\"",
            "{\"a\":",
            "{\"a\":1",
            "{\"a\":1,",
            "{\"a\":1,}",
            "{,}",
            "{\"a\" 1}",
            "{\"a\":01}",
            "{\"a\":-}",
            "{\"a\":1.}",
            "{\"a\":.5}",
            "{\"a\":1e}",
            "{\"a\":1e+}",
            "{\"a\":+1}",
            "{\"a\":tru}",
            "{\"a\":nul}",
            "{\"a\":NaN}",
            "{\"a\":\"\\x\"}",
            "{\"a\":\"\\u12g4\"}",
            "{\"a\":\"\\u12",
            "{\"a\":\"\n\"}",
            "{\"a\":\"1234567\u{1}\"}",
            "{\"a\":[1}",
            "{\"a\":{1]}",
            "{\"a\":[1,]}",
            "{\"a\":{\"b\":1,}}",
            "{\"a\":{1:2}}",
            "{} {}",
            "{}x",
            "{\"a\":1 2}",
            "{a:1}",
            "{\"\\u0065vent\":\"a\"}",
            "{\"a\":\u{a0}1}",
        ] {
            assert_eq!(fields(text), None, "{text}");
        }
        let nested = |n: usize| format!("{{\"a\":{}{}}}", "[".repeat(n), "]".repeat(n));
        assert!(fields(&nested(65)).is_some() && fields(&nested(66)).is_none());
    }

    fn like(pattern: &str) -> impl Strategy<Value = String> + use<> {
        proptest::string::string_regex(pattern).expect("a pattern")
    }

    fn text() -> impl Strategy<Value = String> {
        like("\"([a-z{}\\[\\],:é ]|\\\\[\"\\\\nu/]|\\\\u00e9){0,20}\"")
    }

    fn json() -> impl Strategy<Value = String> {
        let number = like("-?[0-9]{1,3}(\\.[0-9]{0,2})?([eE][+-]?[0-9]{0,2})?");
        let leaf = prop_oneof![text(), number, Just("true".to_owned()), Just("null".to_owned())];
        leaf.prop_recursive(6, 40, 5, |inner| {
            let space = || like("[ \n]{0,2}");
            let values = prop::collection::vec(inner.clone(), 0..5);
            let fields = prop::collection::vec((text(), space(), inner), 0..5);
            prop_oneof![
                (values, space()).prop_map(|(all, space)| {
                    format!("[{space}{}{space}]", all.join(&format!("{space},")))
                }),
                (fields, space()).prop_map(|(all, end)| {
                    let field = |(key, space, value)| format!("{key}{space}:{space}{value}");
                    format!("{{{}{end}}}", all.into_iter().map(field).collect::<Vec<_>>().join(","))
                }),
            ]
        })
    }

    proptest! {
        #[test]
        fn it_takes_nothing_that_the_parser_refuses(
            value in json(),
            at in 0..60_usize,
            removed in 0..3_usize,
            other in like("(|event|[{}\\[\\],:\"\\\\01\\-+.eEu \n\0\u{1f}é])"),
        ) {
            let mut text = format!("{{\"event\" : \"a\",\"x\":{value},\"event\":{value} }}");
            // Mostly with characters, or none, in the place of others.
            let (from, to) = (at.min(text.len()), (at + removed).min(text.len()));
            if text.is_char_boundary(from) && text.is_char_boundary(to) {
                text.replace_range(from..to, &other);
            }
            if let Some(found) = fields(&text) {
                let parsed = parsed(&text);
                prop_assert_eq!(Some(found), parsed);
            }
        }
    }
}

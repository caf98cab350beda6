//! The request body: entries spliced together.
//!
//! An entry is what stands for one event: in most formats the bytes that it was published with, in
//! others what `entry.rs` puts around them or makes of them.

/// The format of the request body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// `{"events":[…]}`, `application/json`.
    Json,
    /// One event a line, each line ended, `application/jsonl` (<https://jsonlines.org>).
    JsonLines,
    /// `[…]`, `application/json`.
    JsonArray,
    /// One event and nothing around it, `application/json`.
    Single,
    /// `{"event":…}{"event":…}`, as Splunk's HTTP Event Collector takes events, `application/json`
    /// (<https://docs.splunk.com/Documentation/Splunk/latest/Data/FormateventsforHTTPEventCollector>).
    SplunkHec,
    /// A JSON batch of CloudEvents 1.0, `application/cloudevents-batch+json`
    /// (<https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/formats/json-format.md>).
    CloudEventsBatch,
    /// `{"text":"…"}`, a line for people of each event, `application/json`
    /// (<https://docs.slack.dev/messaging/sending-messages-using-incoming-webhooks>).
    Slack,
}

/// What is around the entries of a body, and between two of them.
struct Frame {
    head: &'static [u8],
    separator: &'static [u8],
    tail: &'static [u8],
}

impl Format {
    pub const ALL: [Self; 7] = [
        Self::Json,
        Self::JsonLines,
        Self::JsonArray,
        Self::Single,
        Self::SplunkHec,
        Self::CloudEventsBatch,
        Self::Slack,
    ];

    /// All names in the configuration.
    pub const NAMES: [&'static str; Self::ALL.len()] = {
        let (mut names, mut n) = ([""; Self::ALL.len()], 0);
        while n < names.len() {
            names[n] = Self::ALL[n].name();
            n += 1;
        }
        names
    };

    /// The `content-type` of a request in this format, unless the subscriber has another.
    pub const fn content_type(self) -> &'static str {
        match self {
            Self::Json | Self::JsonArray | Self::Single | Self::SplunkHec | Self::Slack => {
                "application/json"
            }
            Self::JsonLines => "application/jsonl",
            Self::CloudEventsBatch => "application/cloudevents-batch+json",
        }
    }

    /// The name in the configuration.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Json => "json",
            Self::JsonLines => "jsonl",
            Self::JsonArray => "json_array",
            Self::Single => "single",
            Self::SplunkHec => "splunk_hec",
            Self::CloudEventsBatch => "cloudevents_batch",
            Self::Slack => "slack",
        }
    }

    /// The media type that a stored batch is labelled with: of several formats with one content
    /// type, it says which.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Json | Self::JsonLines | Self::CloudEventsBatch => self.content_type(),
            Self::JsonArray => "application/json; format=json_array",
            Self::Single => "application/json; format=single",
            Self::SplunkHec => "application/json; format=splunk_hec",
            Self::Slack => "application/json; format=slack",
        }
    }

    /// The format of a stored batch, by its [`label`](Self::label).
    pub fn labelled(label: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|format| format.label() == label)
    }

    /// The most events of a body, if the format limits them.
    pub const fn most_events(self) -> Option<usize> {
        match self {
            Self::Single => Some(1),
            Self::Json
            | Self::JsonLines
            | Self::JsonArray
            | Self::SplunkHec
            | Self::CloudEventsBatch
            | Self::Slack => None,
        }
    }

    const fn frame(self) -> Frame {
        let (head, separator, tail): (&[u8], &[u8], &[u8]) = match self {
            Self::Json => (br#"{"events":["#, b",", b"]}"),
            Self::JsonLines => (b"", b"\n", b"\n"),
            Self::JsonArray | Self::CloudEventsBatch => (b"[", b",", b"]"),
            Self::Single | Self::SplunkHec => (b"", b"", b""),
            // The separator is a line break as JSON spells it.
            Self::Slack => (br#"{"text":""#, br"\n", br#""}"#),
        };
        Frame { head, separator, tail }
    }

    /// An upper bound for the bytes of a body with this number of entries of `bytes` bytes in total.
    ///
    /// Exact but for JSON Lines, which may drop line breaks and be shorter.
    pub const fn body_len(self, entries: usize, bytes: usize) -> usize {
        let Frame { head, separator, tail } = self.frame();
        head.len() + bytes + separator.len() * entries.saturating_sub(1) + tail.len()
    }

    /// Splices entries into one body.
    pub fn splice<'a>(
        self,
        entries: impl ExactSizeIterator<Item = &'a [u8]>,
        bytes: usize,
    ) -> Vec<u8> {
        debug_assert!(self.most_events().is_none_or(|most| entries.len() <= most));
        let Frame { head, separator, tail } = self.frame();
        let mut body = Vec::with_capacity(self.body_len(entries.len(), bytes));
        body.extend_from_slice(head);
        for (n, entry) in entries.enumerate() {
            if n > 0 {
                body.extend_from_slice(separator);
            }
            if self == Self::JsonLines {
                // JSON has no raw line break inside a string, so each one is between tokens and can
                // be dropped without changing a value.
                for part in entry.split(|b| matches!(b, b'\n' | b'\r')) {
                    body.extend_from_slice(part);
                }
            } else {
                body.extend_from_slice(entry);
            }
        }
        body.extend_from_slice(tail);
        body
    }

    /// The first entry of a body that [`splice`](Self::splice) made.
    pub fn first_entry(self, body: &[u8]) -> Option<&[u8]> {
        match self {
            Self::Json | Self::JsonArray | Self::CloudEventsBatch | Self::SplunkHec => {
                let entries = body.strip_prefix(self.frame().head)?;
                let first = serde_json::Deserializer::from_slice(entries)
                    .into_iter::<&serde_json::value::RawValue>()
                    .next()?;
                Some(first.ok()?.get().as_bytes())
            }
            Self::JsonLines => body.split(|b| *b == b'\n').next(),
            Self::Single => Some(body),
            Self::Slack => self.entries(body)?.into_iter().next(),
        }
    }

    /// The entries of a body that [`splice`](Self::splice) made, each with its bytes; `None` for
    /// any other body.
    pub fn entries(self, body: &[u8]) -> Option<Vec<&[u8]>> {
        let Frame { head, tail, .. } = self.frame();
        let entries = body.strip_prefix(head)?.strip_suffix(tail)?;
        match self {
            Self::Json | Self::JsonArray | Self::CloudEventsBatch => between_commas(entries),
            Self::JsonLines => Some(entries.split(|b| *b == b'\n').collect()),
            Self::Single => Some(vec![entries]),
            Self::SplunkHec => objects(entries),
            Self::Slack => between_line_breaks(entries),
        }
    }
}

/// The depth of brackets outside strings, byte by byte.
#[derive(Default)]
struct Nesting {
    depth: usize,
    in_string: bool,
    escaped: bool,
}

impl Nesting {
    /// `None` if a bracket was closed that was not opened.
    fn read(&mut self, b: u8) -> Option<()> {
        match b {
            _ if self.escaped => self.escaped = false,
            b'\\' => self.escaped = self.in_string,
            b'"' => self.in_string = !self.in_string,
            _ if self.in_string => {}
            b'{' | b'[' => self.depth += 1,
            b'}' | b']' => self.depth = self.depth.checked_sub(1)?,
            _ => {}
        }
        Some(())
    }

    const fn is_outside(&self) -> bool {
        self.depth == 0 && !self.in_string
    }
}

/// The parts between commas that are outside of strings, objects and arrays; `None` if brackets do
/// not match.
fn between_commas(text: &[u8]) -> Option<Vec<&[u8]>> {
    let (mut parts, mut start, mut nesting) = (Vec::new(), 0, Nesting::default());
    for (at, b) in text.iter().enumerate() {
        nesting.read(*b)?;
        if *b == b',' && nesting.is_outside() {
            parts.push(&text[start..at]);
            start = at + 1;
        }
    }
    parts.push(&text[start..]);
    nesting.is_outside().then_some(parts)
}

/// The objects of a text that has nothing else; `None` for any other text.
fn objects(text: &[u8]) -> Option<Vec<&[u8]>> {
    let (mut parts, mut start, mut nesting) = (Vec::new(), 0, Nesting::default());
    for (at, b) in text.iter().enumerate() {
        if at == start && *b != b'{' {
            return None;
        }
        nesting.read(*b)?;
        if nesting.is_outside() {
            parts.push(&text[start..=at]);
            start = at + 1;
        }
    }
    (start == text.len() && !parts.is_empty()).then_some(parts)
}

/// The lines of the inside of a JSON string; `None` if it has a raw `"`.
fn between_line_breaks(text: &[u8]) -> Option<Vec<&[u8]>> {
    let (mut parts, mut start, mut escaped) = (Vec::new(), 0, false);
    for (at, b) in text.iter().enumerate() {
        match b {
            b'n' if escaped => {
                parts.push(&text[start..at - 1]);
                start = at + 1;
            }
            b'"' if !escaped => return None,
            _ => {}
        }
        escaped = *b == b'\\' && !escaped;
    }
    parts.push(&text[start..]);
    (!escaped).then_some(parts)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::Value;

    fn splice(format: Format, events: &[&[u8]]) -> Vec<u8> {
        format.splice(events.iter().copied(), events.iter().map(|e| e.len()).sum())
    }

    #[test]
    fn json_keeps_every_byte_of_an_event() {
        let a = br#"{"z":1,"event":"a","n":18446744073709551615,"s":"\u0041\/"}"#;
        let b = b" {\n\"event\" : \"b\" } ";
        let body = splice(Format::Json, &[a, b]);
        let expected = [&b"{\"events\":["[..], a, b",", b, b"]}"].concat();
        assert_eq!(body, expected);
        assert_eq!(body.len(), Format::Json.body_len(2, a.len() + b.len()));
    }

    #[test]
    fn an_array_and_a_single_event_have_nothing_else_in_the_body() {
        let (a, b) = (&b" {\n\"event\" : \"a\" } "[..], &b"{\"event\":\"b\"}"[..]);
        assert_eq!(splice(Format::JsonArray, &[a, b]), [b"[", a, b",", b, b"]"].concat());
        assert_eq!(splice(Format::Single, &[a]), a);
        assert_eq!(Format::Single.entries(a), Some(vec![a]));
        assert_eq!(Format::JsonArray.entries(b"{\"events\":[]}"), None);
    }

    #[test]
    fn each_format_is_known_by_its_label_and_no_other_is() {
        for format in Format::ALL {
            assert_eq!(Format::labelled(format.label()), Some(format));
            assert!(format.label().starts_with(format.content_type()));
        }
        assert_eq!(Format::labelled("application/json; format=xml"), None);
    }

    #[test]
    fn objects_without_separators_and_lines_of_a_string_are_found_again() {
        let (a, b) = (&br#"{"event":{"event":"}{"}}"#[..], &br#"{"event":[{}]}"#[..]);
        let body = splice(Format::SplunkHec, &[a, b]);
        assert_eq!(body, [a, b].concat());
        assert_eq!(Format::SplunkHec.entries(&body), Some(vec![a, b]));
        assert_eq!(Format::SplunkHec.first_entry(&body), Some(a));
        for foreign in [&b""[..], b"7", b"{}7", b"{} {}", b"{", b"{}}", b"{\"}"] {
            assert_eq!(Format::SplunkHec.entries(foreign), None, "{foreign:?}");
        }

        // A backslash and an n are no line break.
        let (a, b) = (&br#"a \\n \" \t"#[..], &br"\\\\"[..]);
        let body = splice(Format::Slack, &[a, b, b""]);
        assert_eq!(body, [br#"{"text":""#, a, br"\n", b, br#"\n"}"#].concat());
        assert_eq!(Format::Slack.entries(&body), Some(vec![a, b, b""]));
        assert_eq!(Format::Slack.first_entry(&body), Some(a));
        for foreign in [&b"{\"text\":\"a\\\"}"[..], b"{\"text\":\"\"\"}", b"{\"text\":1}"] {
            assert_eq!(Format::Slack.entries(foreign), None, "{foreign:?}");
        }
    }

    #[test]
    fn json_lines_strips_only_the_line_breaks_between_tokens() {
        let body =
            splice(Format::JsonLines, &[b"{\r\n \"event\":\n\"a\\n\" }\n", b"{\"event\":\"b\"}"]);
        assert_eq!(body, b"{ \"event\":\"a\\n\" }\n{\"event\":\"b\"}\n");
    }

    #[test]
    fn the_events_of_a_foreign_body_are_not_guessed() {
        for body in [
            &b""[..],
            b"{}",
            b"{ \"events\":[]}",
            b"{\"events\":[{]}",
            b"{\"events\":[\"]}",
            b"{\"events\":[}]}",
        ] {
            assert_eq!(Format::Json.entries(body), None, "{}", String::from_utf8_lossy(body));
        }
        assert_eq!(Format::JsonLines.entries(b"{}"), None, "each line is ended");
    }

    fn event() -> impl Strategy<Value = String> {
        ("[a-z.]{0,8}", "\\PC{0,12}", any::<u64>(), any::<bool>()).prop_map(|(t, s, n, pretty)| {
            let v = serde_json::json!({"event": t, "s": s, "n": n, "a": [n, {"k": s}]});
            if pretty { serde_json::to_string_pretty(&v) } else { serde_json::to_string(&v) }
                .expect("prints")
        })
    }

    proptest! {
        #[test]
        fn a_spliced_body_parses_to_the_values_of_its_events(events in proptest::collection::vec(event(), 1..8)) {
            let raw: Vec<&[u8]> = events.iter().map(|e| e.as_bytes()).collect();
            let values: Vec<Value> = events.iter().map(|e| serde_json::from_str(e).expect("json")).collect();

            let json: Value = serde_json::from_slice(&splice(Format::Json, &raw)).expect("a JSON body");
            prop_assert_eq!(&json["events"], &Value::Array(values.clone()));
            let body = splice(Format::Json, &raw);
            prop_assert_eq!(Format::Json.entries(&body).expect("made by splice"), raw.clone());

            let array = splice(Format::JsonArray, &raw);
            let parsed: Value = serde_json::from_slice(&array).expect("a JSON body");
            prop_assert_eq!(&parsed, &Value::Array(values.clone()));
            prop_assert_eq!(array.len(), Format::JsonArray.body_len(raw.len(), raw.iter().map(|e| e.len()).sum()));
            prop_assert_eq!(Format::JsonArray.entries(&array).expect("made by splice"), raw.clone());

            let lines = splice(Format::JsonLines, &raw);
            prop_assert!(lines.len() <= Format::JsonLines.body_len(raw.len(), raw.iter().map(|e| e.len()).sum()));
            let text = std::str::from_utf8(&lines).expect("utf-8");
            let parsed: Vec<Value> = text.lines().map(|l| serde_json::from_str(l).expect("a line")).collect();
            prop_assert_eq!(&parsed, &values);
            let found = Format::JsonLines.entries(&lines).expect("made by splice");
            prop_assert_eq!(splice(Format::JsonLines, &found), lines.clone());
            prop_assert_eq!(found.len(), raw.len());
            prop_assert_eq!(Format::JsonLines.first_entry(&lines), found.first().copied());
            let first: Value = serde_json::from_slice(Format::Json.first_entry(&body).expect("made by splice")).expect("an event");
            prop_assert_eq!(Some(&first), values.first());
        }
    }
}

//! A subscriber's request bodies: the format, and what goes with some of them.

use http::HeaderValue;

use crate::{
    config::{
        document::{Layer, Layers, Section},
        reader::Reader,
    },
    event::{entry::Metadata, payload::Format},
};

/// The most bytes of a text that is beside each event.
const MAX_TEXT: usize = 255;

/// What a subscriber says of its request bodies.
pub(super) struct Bodies {
    pub(super) format: Format,
    pub(super) content_type: Option<HeaderValue>,
    pub(super) metadata: Metadata,
}

pub(super) fn bodies(
    reader: &Reader<'_>,
    section: &Section<'_>,
    keys: &Layers<'_>,
) -> Option<Bodies> {
    let format =
        reader.one_of(keys.get("format"), &Format::ALL.map(|format| (format.name(), format)))?;
    let content_type = content_type(reader, keys, format);
    const HEC: Format = Format::SplunkHec;
    let source = text(reader, keys, "source", format, &[HEC, Format::CloudEventsBatch]);
    let sourcetype = text(reader, keys, "sourcetype", format, &[HEC]);
    let index = text(reader, keys, "index", format, &[HEC]);
    if format == Format::CloudEventsBatch && source == Some(None) {
        reader.report_missing(
            section,
            "source",
            "is required with format = \"cloudevents_batch\": a URI of what the events come from, such as \"/audit\" or \"https://example.com/audit\"",
        );
        return None;
    }
    let metadata = Metadata { source: source?, sourcetype: sourcetype?, index: index? };
    Some(Bodies { format, content_type: content_type?, metadata })
}

/// The media type that requests have instead of the format's own. Receivers disagree about that of
/// JSON Lines; in the other formats it says how the body is to be read.
fn content_type(
    reader: &Reader<'_>,
    keys: &Layers<'_>,
    format: Format,
) -> Option<Option<HeaderValue>> {
    let Some(value) = keys.get("content_type") else { return Some(None) };
    let text = reader.string(&value)?;
    if !is_of(reader, keys, "content_type", format, &[Format::JsonLines, Format::JsonArray])? {
        return Some(None);
    }
    let found = HeaderValue::from_str(&text).ok().filter(|_| is_media_type(&text));
    if found.is_none() {
        reader.report(
            &value,
            "is not a media type; write one such as \"application/x-ndjson\" or \"application/json; charset=utf-8\"",
        );
    }
    found.map(Some)
}

/// A text of 1 to [`MAX_TEXT`] bytes without control characters.
fn text(
    reader: &Reader<'_>,
    keys: &Layers<'_>,
    key: &'static str,
    format: Format,
    formats: &[Format],
) -> Option<Option<String>> {
    let Some(value) = keys.get(key) else { return Some(None) };
    let text = reader.string(&value)?;
    if !is_of(reader, keys, key, format, formats)? {
        return Some(None);
    }
    let sound = (1..=MAX_TEXT).contains(&text.len()) && !text.contains(char::is_control);
    // CloudEvents 1.0: a non-empty URI reference.
    let is_uri = format != Format::CloudEventsBatch || is_uri_reference(&text);
    if !sound {
        reader.report(
            &value,
            format!("must have 1 to {MAX_TEXT} bytes, and no control characters among them"),
        );
    } else if !is_uri {
        reader.report(
            &value,
            "is not a URI reference, which the `source` of a CloudEvent is; write one such as \"/audit\" or \"https://example.com/audit\"",
        );
    }
    (sound && is_uri).then_some(Some(text))
}

/// Whether a key goes with the format. One of a preset whose format was replaced is left out;
/// elsewhere it is a mistake.
fn is_of(
    reader: &Reader<'_>,
    keys: &Layers<'_>,
    key: &'static str,
    format: Format,
    formats: &[Format],
) -> Option<bool> {
    if formats.contains(&format) {
        return Some(true);
    }
    if keys.layer(key) != Layer::Own {
        return Some(false);
    }
    let names: Vec<String> = formats.iter().map(|f| format!("\"{}\"", f.name())).collect();
    reader.report(
        &keys.get(key)?,
        format!(
            "goes with format = {} alone, and the format is \"{}\"; remove it, or choose another format",
            names.join(" or "),
            format.name()
        ),
    );
    None
}

/// Whether a text can be a URI reference (RFC 3986, section 4.1).
fn is_uri_reference(text: &str) -> bool {
    let is_hex =
        |rest: &str| rest.len() >= 2 && rest.bytes().take(2).all(|b| b.is_ascii_hexdigit());
    let escaped = text.split('%').skip(1).all(is_hex);
    let allowed = |b: u8| b.is_ascii_alphanumeric() || b"-._~:/?#[]@!$&'()*+,;=%".contains(&b);
    let first = text.split(['/', '?', '#']).next().unwrap_or_default();
    // A `:` in the first segment is the end of a scheme.
    let scheme = first.split_once(':').map_or("x", |(scheme, _)| scheme);
    let is_scheme = scheme.starts_with(|c: char| c.is_ascii_alphabetic())
        && scheme.bytes().all(|b| b.is_ascii_alphanumeric() || b"+-.".contains(&b));
    escaped && is_scheme && text.bytes().all(allowed) && text.matches('#').count() < 2
}

/// Whether a text is a media type with or without parameters (RFC 9110, section 8.3.1).
fn is_media_type(text: &str) -> bool {
    let is_token = |text: &str| {
        !text.is_empty()
            && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b))
    };
    let (kind, parameters) = text.split_once(';').unwrap_or((text, "x=x"));
    let (main, sub) = kind.trim_end().split_once('/').unwrap_or_default();
    let parameters = parameters.split(';').all(|parameter| {
        let (name, value) = parameter.trim().split_once('=').unwrap_or_default();
        let quoted = value.strip_prefix('"').and_then(|v| v.strip_suffix('"'));
        is_token(name) && (is_token(value) || quoted.is_some_and(|v| !v.contains(['"', '\\'])))
    });
    is_token(main) && is_token(sub) && parameters
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uri_references_are_told_from_other_texts() {
        for sound in [
            "/audit",
            "audit",
            "a/b:c",
            "urn:audit:1",
            "https://e.example/a?b=%20#c",
            "?x",
            "./a:b",
        ] {
            assert!(is_uri_reference(sound), "{sound}");
        }
        for wrong in
            ["a b", "/a{b}", "/a|b", "<c>", "/%zz", "/%2", "1:2:3", "::", "\\d", "/\u{e9}", "#a#b"]
        {
            assert!(!is_uri_reference(wrong), "{wrong}");
        }
    }

    #[test]
    fn media_types_are_told_from_other_texts() {
        for sound in [
            "application/x-ndjson",
            "application/json; charset=utf-8",
            "application/json;charset=\"utf 8\";v=1",
            "application/vnd.a+json",
        ] {
            assert!(is_media_type(sound), "{sound}");
        }
        for wrong in
            ["", "json", "/json", "a/", "a/b/c", "a b/c", "a/b;", "a/b; x", "a/b; x=\"", " a/b"]
        {
            assert!(!is_media_type(wrong), "{wrong}");
        }
    }
}

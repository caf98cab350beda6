//! The two text formats of an exposition.

use super::definitions::{ALL, Kind, PREFIX};

/// The format of an exposition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exposition {
    /// The text format of Prometheus, 0.0.4, for clients that ask for nothing else.
    Text,
    /// OpenMetrics 1.0.
    OpenMetrics,
}

impl Exposition {
    /// The format that a header `accept` asks for (RFC 9110, section 12.5.1): OpenMetrics if it is
    /// named and plain text is not preferred.
    pub fn accepted(accept: &str) -> Self {
        let quality = |range: &str| {
            let mut parts = range.split(';').map(str::trim);
            let name = parts.next().unwrap_or_default().to_ascii_lowercase();
            let q = parts
                .find_map(|p| p.strip_prefix("q="))
                .map_or(1.0, |q| q.parse::<f32>().unwrap_or(0.0));
            (name, q)
        };
        let ranges: Vec<(String, f32)> = accept.split(',').map(quality).collect();
        let best =
            |name: &str| ranges.iter().filter(|(n, _)| n == name).map(|(_, q)| *q).reduce(f32::max);
        let text =
            best("text/plain").or_else(|| best("text/*")).or_else(|| best("*/*")).unwrap_or(0.0);
        match best("application/openmetrics-text") {
            Some(q) if q > 0.0 && q >= text => Self::OpenMetrics,
            _ => Self::Text,
        }
    }

    pub const fn content_type(self) -> &'static str {
        match self {
            Self::Text => "text/plain; version=0.0.4; charset=utf-8",
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        }
    }
}

/// The lines of an exposition in a stable order: samples of a metric by their labels, buckets of a
/// histogram as they are.
pub(super) fn sorted(text: &str) -> String {
    let labels = |line: &str| {
        let all = line
            .split_once('{')
            .and_then(|(_, rest)| rest.rsplit_once('}'))
            .map_or("", |(labels, _)| labels);
        // A bucket's bound is its first label, and a number.
        let others = all.strip_prefix("le=\"").and_then(|rest| rest.split_once('"'));
        others.map_or(all, |(_, others)| others.trim_start_matches(',')).to_owned()
    };
    let (mut out, mut series) = (String::with_capacity(text.len()), Vec::new());
    let flush = |series: &mut Vec<&str>, out: &mut String| {
        series.sort_by_cached_key(|line| labels(line));
        series.drain(..).for_each(|line| out.extend([line, "\n"]));
    };
    for line in text.lines() {
        if line.starts_with('#') {
            flush(&mut series, &mut out);
            out.extend([line, "\n"]);
        } else {
            series.push(line);
        }
    }
    flush(&mut series, &mut out);
    out
}

/// OpenMetrics in the older format: a counter's name has its suffix in the comments too, and nothing
/// marks the end.
pub(super) fn as_plain_text(open_metrics: &str) -> String {
    let mut out = String::with_capacity(open_metrics.len());
    for line in open_metrics.lines().filter(|line| *line != "# EOF") {
        let about = line.strip_prefix("# HELP ").or_else(|| line.strip_prefix("# TYPE "));
        let name = about.and_then(|rest| rest.split(' ').next()).unwrap_or_default();
        let definition =
            name.strip_prefix(PREFIX).and_then(|name| ALL.iter().find(|d| d.name == name));
        match definition {
            Some(d) if d.kind == Kind::Counter => {
                out.extend([&line.replacen(name, &d.exposed(), 1), "\n"])
            }
            _ => out.extend([line, "\n"]),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_format_is_what_is_asked_for() {
        for (accept, format) in [
            ("", Exposition::Text),
            ("*/*", Exposition::Text),
            ("text/plain", Exposition::Text),
            ("application/openmetrics-text", Exposition::OpenMetrics),
            // As Prometheus asks.
            (
                "application/openmetrics-text;version=1.0.0;q=0.5,application/openmetrics-text;version=0.0.1;q=0.4,\
                 text/plain;version=0.0.4;q=0.3,*/*;q=0.2",
                Exposition::OpenMetrics,
            ),
            (
                "text/plain;version=0.0.4;q=0.6, Application/OpenMetrics-text; version=1.0.0; q=0.5",
                Exposition::Text,
            ),
            ("application/openmetrics-text;q=0, */*", Exposition::Text),
        ] {
            assert_eq!(Exposition::accepted(accept), format, "{accept}");
        }
    }
}

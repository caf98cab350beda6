//! Pictures: SVG in the page with attributes alone, since the policy allows no style. Each has a
//! title, and the page has its numbers as a table too.

use std::time::Duration;

use maud::{Markup, html};

use crate::{
    telemetry::status::LastHour,
    wording::{agreed, counted, grouped, rounded},
};

/// Units of the picture's own: its width on the page is the page's.
const WIDTH: f64 = 720.0;
const MARGIN: f64 = 24.0;

/// The attempts of a batch that always fails, on a line of time that shrinks as it goes on.
pub(super) fn schedule(attempts: &[Duration], is_whole: bool) -> Markup {
    let longest = attempts.last().copied().unwrap_or_default();
    // The first minute must be seen next to days.
    let scaled = |at: Duration| (1.0 + at.as_secs_f64()).ln();
    let room = WIDTH - 2.0 * MARGIN;
    let x = |at: Duration| MARGIN + room * scaled(at) / scaled(longest).max(f64::MIN_POSITIVE);
    let end = if is_whole { "the last after " } else { "and so on, here until " };
    let title = format!("{}, {end}{}", counted(attempts.len(), "attempt(s)"), rounded(longest));
    let marks = [60, 3600, 86_400].map(Duration::from_secs);
    html! {
        svg.chart role="img" aria-label=(title) viewBox=(format!("0 0 {WIDTH} 64")) preserveAspectRatio="xMidYMid meet" {
            title { (title) }
            line x1=(MARGIN) y1="28" x2=(WIDTH - MARGIN) y2="28" stroke="currentColor" stroke-opacity="0.35" stroke-width="2" {}
            @for mark in marks.into_iter().filter(|mark| *mark < longest) {
                line x1=(format!("{:.1}", x(mark))) y1="20" x2=(format!("{:.1}", x(mark))) y2="36" stroke="currentColor" stroke-opacity="0.5" {}
                text x=(format!("{:.1}", x(mark))) y="54" font-size="12" text-anchor="middle" fill="currentColor" fill-opacity="0.75" { (rounded(mark)) }
            }
            @for at in attempts { circle cx=(format!("{:.1}", x(*at))) cy="28" r="5" fill="currentColor" {} }
        }
    }
}

/// A bar of [`bars`].
pub(super) struct Bar {
    /// What it stands for, such as `12:00 to 13:00`.
    pub(super) title: String,
    /// The mark under it, of some.
    pub(super) mark: Option<String>,
    pub(super) events: u64,
    /// Where its number leads to.
    pub(super) link: String,
    /// Whether the list has its events.
    pub(super) is_listed: bool,
}

/// Bars of events, each of which leads to its events.
pub(super) fn bars(name: &str, bars: &[Bar]) -> Markup {
    const HEIGHT: f64 = 72.0;
    const TOP: f64 = 14.0;
    let most = bars.iter().map(|bar| bar.events).max().unwrap_or(0);
    let step = WIDTH / bars.len().max(1) as f64;
    let height = |events: u64| match events {
        0 => 0.0,
        // One event among thousands is seen too.
        events => (HEIGHT * events as f64 / most.max(1) as f64).max(2.0),
    };
    let (base, point) = (TOP + HEIGHT, |at: f64| format!("{at:.1}"));
    html! {
        svg.chart.day role="group" aria-label=(name) viewBox=(format!("0 0 {WIDTH} {}", base + 20.0)) preserveAspectRatio="xMidYMid meet" {
            title { (name) }
            @if most > 0 {
                text x="0" y="10" font-size="11" fill="currentColor" fill-opacity="0.75" { (grouped(most)) }
                line x1="0" y1=(TOP) x2=(WIDTH) y2=(TOP) stroke="currentColor" stroke-opacity="0.15" {}
            }
            line x1="0" y1=(base) x2=(WIDTH) y2=(base) stroke="currentColor" stroke-opacity="0.35" {}
            @for (n, bar) in bars.iter().enumerate() {
                @let (x, tall) = (step * n as f64, height(bar.events));
                @let title = format!("{}: {} {}", bar.title, grouped(bar.events), agreed(&bar.events, "event(s)"));
                @if bar.events > 0 {
                    a href=(bar.link) aria-label=(title) {
                        title { (title) }
                        // The whole column is the target.
                        rect x=(point(x)) y=(TOP) width=(point(step)) height=(HEIGHT) fill="currentColor" fill-opacity="0" {}
                        rect x=(point(x + 2.0)) y=(point(base - tall)) width=(point(step - 4.0)) height=(point(tall)) rx="1" fill="currentColor" fill-opacity=(if bar.is_listed { "1" } else { "0.35" }) {}
                    }
                }
                @if let Some(mark) = &bar.mark {
                    text x=(point(x)) y=(base + 15.0) font-size="11" fill="currentColor" fill-opacity="0.75" { (mark) }
                }
            }
        }
    }
}

/// A subscriber's last hour by the minute: delivered events above the line, and those of failed
/// attempts below it.
pub(super) fn spark(hour: &LastHour) -> Markup {
    const BASE: f64 = 18.0;
    const BELOW: f64 = 8.0;
    let most = |of: &[u64]| of.iter().copied().max().unwrap_or(0).max(1) as f64;
    let (delivered, failed) = (most(&hour.delivered), most(&hour.failed));
    let tall = |events: u64, most: f64, room: f64| (room * events as f64 / most).max(1.5);
    let title = in_words(hour);
    let point = |at: f64| format!("{at:.1}");
    html! {
        svg.spark role="img" aria-label=(title) viewBox="0 0 120 28" width="120" height="28" {
            title { (title) }
            line x1="0" y1=(BASE) x2="120" y2=(BASE) stroke="currentColor" stroke-opacity="0.3" {}
            @for (n, events) in hour.delivered.iter().enumerate().filter(|(_, events)| **events > 0) {
                @let tall = tall(*events, delivered, BASE - 1.0);
                rect.came x=(2 * n) y=(point(BASE - tall)) width="1.6" height=(point(tall)) fill="currentColor" {}
            }
            @for (n, events) in hour.failed.iter().enumerate().filter(|(_, events)| **events > 0) {
                rect.gone x=(2 * n) y=(point(BASE + 1.0)) width="1.6" height=(point(tall(*events, failed, BELOW))) fill="currentColor" {}
            }
        }
    }
}

/// The same in a sentence.
pub(super) fn in_words(hour: &LastHour) -> String {
    let (delivered, failed) = (hour.delivered.iter().sum::<u64>(), hour.failed.iter().sum::<u64>());
    match (delivered, failed) {
        (0, 0) => "Nothing in the last hour".to_owned(),
        _ => format!(
            "In the last hour {} {} delivered, {} in failed attempts",
            grouped(delivered),
            agreed(&delivered, "event(s)"),
            grouped(failed)
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_is_as_tall_as_its_events_and_one_event_is_seen() {
        let bar = |events| Bar {
            title: "12:00 to 13:00".to_owned(),
            mark: None,
            events,
            link: "/x?a=1&b=2".to_owned(),
            is_listed: true,
        };
        let svg = bars("Events", &[bar(0), bar(1), bar(1000)]).into_string();
        assert_eq!(svg.matches("<a ").count(), 2, "an hour without events leads nowhere: {svg}");
        for part in [
            "height=\"2.0\"",
            "height=\"72.0\" rx",
            "12:00 to 13:00: 1 event<",
            "12:00 to 13:00: 1,000 events<",
            "href=\"/x?a=1&amp;b=2\"",
        ] {
            assert!(svg.contains(part), "{part}: {svg}");
        }
        assert!(!bars("None", &[bar(0)]).into_string().contains("<a "));
    }

    #[test]
    fn a_spark_line_says_in_words_what_it_shows() {
        let mut hour = LastHour::default();
        assert!(spark(&hour).into_string().contains("Nothing in the last hour"));
        (hour.delivered[59], hour.delivered[0], hour.failed[3]) = (1, 1999, 7);
        let svg = spark(&hour).into_string();
        assert!(svg.contains("2,000 events delivered, 7 in failed attempts"), "{svg}");
        assert_eq!(svg.matches("<rect").count(), 3, "{svg}");
    }
}

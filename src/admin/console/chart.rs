//! Pictures: SVG in the page with attributes alone, since the policy allows no style. Each has a
//! title, and the page has its numbers as a table too.

use std::time::Duration;

use maud::{Markup, html};

use crate::wording::{counted, rounded};

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

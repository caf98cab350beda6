//! What stands next to the form: the event types that its patterns match, and the request that it
//! makes. Nothing is sent or saved for it.

use maud::{Markup, html};

use super::document::patterns;
use crate::{
    admin::{
        answer::Refusal,
        console::{
            entry::Console,
            form::Form,
            page::{copy, lines, number, of_type, short, text, time},
            table::{
                Column::{Number, Text},
                table,
            },
        },
        history::DayTypes,
        subscribers::{Draft, PLACEHOLDER, Sample, Signed},
        view::Time,
    },
    event::Pattern,
    queue::Queue,
    store::Store,
    wording::{agreed, counted},
};

/// Rows of a table of types.
const SHOWN: usize = 20;

/// The most patterns that are compared with the types: a form has room for thousands.
const MAX_PATTERNS: usize = 100;

/// What stands next to a form.
pub(super) struct Preview {
    types: Result<DayTypes, Refusal>,
    sample: Result<Sample, Refusal>,
}

impl Preview {
    /// Of a form that makes this draft.
    pub(super) async fn of<Q: Queue, S: Store>(console: &Console<Q, S>, draft: Draft) -> Self {
        Self { types: console.history.day_types().await, sample: console.control.sample(draft) }
    }

    /// The types that the form's patterns match.
    pub(super) fn matches(&self, form: &Form) -> Markup {
        html! {
            div id="matches" data-preview {
                @match (&self.types, read(form)) {
                    (_, Err(wrong)) => p role="status" { (text(&wrong)) },
                    (Err(refusal), _) => p role="status" { "It is not known which types the last day had: " (text(&refusal.why)) "." },
                    (Ok(day), Ok(patterns)) => {
                        (matched(day, &patterns))
                        @if patterns.len() < self::patterns(form).len() {
                            p.muted.small { "Only the first " (patterns.len()) " of " (number(self::patterns(form).len() as u64)) " patterns are compared." }
                        }
                    }
                }
            }
        }
    }

    /// The request that a test would make.
    pub(super) fn example(&self) -> Markup {
        html! {
            div id="example" data-preview {
                @match &self.sample {
                    Err(refusal) => p role="status" { "There is none while the form has a mistake: " (text(&first(refusal))) },
                    Ok(sample) => (request(sample)),
                }
            }
        }
    }
}

/// The patterns of a form; what is wrong with the first one that is none.
fn read(form: &Form) -> Result<Vec<Pattern>, String> {
    let typed = patterns(form);
    if typed.is_empty() {
        return Ok(vec![Pattern::all()]);
    }
    let numbered = typed.iter().take(MAX_PATTERNS).enumerate();
    let read = |(n, typed): (usize, &String)| {
        Pattern::try_new(typed).map_err(|why| format!("Pattern {}: {why}.", n + 1))
    };
    numbered.map(read).collect()
}

fn matched(day: &DayTypes, patterns: &[Pattern]) -> Markup {
    let mut all: Vec<(&str, u64)> =
        day.counts.types.iter().map(|(name, events)| (name.as_str(), *events)).collect();
    all.sort_by(|a, b| b.1.cmp(&a.1).then(a.0.cmp(b.0)));
    let (chosen, others): (Vec<_>, Vec<_>) =
        all.into_iter().partition(|(name, _)| patterns.iter().any(|p| p.matches(name)));
    let sum = |of: &[(&str, u64)]| of.iter().map(|(_, events)| events).sum::<u64>();
    let (found, further) = (sum(&chosen), day.counts.others);
    let whole = found + sum(&others) + further;
    // Of the further types it is known how many events they have, and not which they are.
    let is_all = patterns.iter().any(|p| *p == Pattern::all());
    let (events, is_least) = if is_all { (whole, false) } else { (found, further > 0) };
    let has_further = further > 0;
    html! {
        p role="status" {
            @if whole == 0 {
                "History has no event of the last 24 hours."
            } @else {
                "Of " (number(whole)) " " (agreed(&whole, "event(s)")) " of the last 24 hours, " strong { @if is_least { "at least " } (number(events)) " " (agreed(&events, "(fits|fit)")) } ": "
                @if has_further { "at least " }
                (number(chosen.len() as u64)) " " (agreed(&chosen.len(), "type(s)")) " of " @if has_further { "more than " } (number(day.counts.types.len() as u64)) "."
            }
        }
        @if !chosen.is_empty() { (types("Types that match", &chosen)) }
        @if !others.is_empty() {
            details { summary { "Types that do not match" } (types("Types that do not match", &others)) }
        }
        (missing(day))
    }
}

/// A table of types, each of which leads to its events.
fn types(name: &str, all: &[(&str, u64)]) -> Markup {
    html! {
        (table(name, &[Text("Type"), Number("Events")], html! {
            @for (event_type, events) in all.iter().take(SHOWN) {
                tr {
                    th.mono.wide scope="row" {
                        @match of_type(event_type) {
                            Some(to) => a href=(to) { (short(event_type)) },
                            None => (short(event_type)),
                        }
                    }
                    td.number { (number(*events)) }
                }
            }
        }))
        @if all.len() > SHOWN {
            p.muted.small { "And " (counted(all.len() - SHOWN, "type(s)")) " with fewer events." }
        }
    }
}

/// What the counts lack.
fn missing(day: &DayTypes) -> Markup {
    let begins = day.reach.events_from.filter(|at| at.0 > day.from);
    html! {
        @if let Some(at) = day.counts.counted_back_to {
            p.muted.small { "Counted for a moment only, from the latest event back to " (time(Time(at))) "; earlier types are not among them." }
        }
        @if day.counts.others > 0 {
            p.muted.small { (number(day.counts.others)) " " (agreed(&day.counts.others, "event(s)")) " of further types are not told apart." }
        }
        @if let Some(at) = begins {
            p.muted.small { "History of events begins at " (time(at)) ": " (text(&day.reach.why)) "." }
        }
        @for gap in day.reach.gaps.iter().filter(|gap| gap.what == "events" && gap.until.0 > day.from) {
            p.muted.small { "From " (time(gap.from)) " to " (time(gap.until)) " some events may be missing: " (text(&gap.why)) "." }
        }
    }
}

fn request(Sample { request, signed, overlaps }: &Sample) -> Markup {
    html! {
        p.muted.small {
            @match signed {
                Signed::Not => "It is not signed.",
                Signed::Given => "Signed with the secret in the form.",
                Signed::Placeholder => { "Signed with the placeholder " code { (PLACEHOLDER) } ", which is nobody's secret: a receiver can be tried with both." },
            }
            @if *overlaps { " Until the overlap of its secrets is over, the header of a real request has a signature of each, where its scheme has room for more than one." }
            " Besides these, a request has the headers of its connection: " code { "host" } ", " code { "accept" } ", " code { "content-length" } "."
        }
        div.copied { h3 { "Headers" } (copy("example-headers")) }
        pre id="example-headers" role="group" tabindex="0" aria-label="Headers of the example" {
            @for (name, value) in &request.headers { (text(name)) ": " (text(value.as_deref().unwrap_or("[redacted]"))) "\n" }
        }
        div.copied { h3 { "Body, byte for byte" } (copy("example-body")) }
        pre id="example-body" role="group" tabindex="0" aria-label="Body of the example" { (lines(&String::from_utf8_lossy(&request.body))) }
    }
}

/// The first mistake of a draft.
fn first(refusal: &Refusal) -> String {
    let first = refusal.fields.first();
    first.map_or_else(|| refusal.why.clone(), |e| format!("{} {}", e.field, e.detail))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{admin::view::Reach, clock, store::TypeCounts};

    /// What a form matches of this many types of one event each, and of events of further types.
    fn shown(events: &str, types: usize, others: u64) -> String {
        let types = (0..types).map(|n| (format!("user.t{n:04}"), 1)).collect();
        let (events_from, deliveries_from, last_event_at) = (None, None, None);
        let (why, gaps) = (String::new(), Vec::new());
        let preview = Preview {
            types: Ok(DayTypes {
                from: clock::now(),
                counts: TypeCounts { types, others, counted_back_to: None },
                reach: Reach { events_from, deliveries_from, why, last_event_at, gaps },
            }),
            sample: Err(Refusal::bad("none")),
        };
        preview.matches(&Form::default().with("events", events.to_owned())).into_string()
    }

    #[test]
    fn of_types_that_are_not_told_apart_it_says_no_more_than_it_knows() {
        for (events, said) in [
            ("", "<strong>1,500 fit</strong>: at least 1,000 types of more than 1,000."),
            (
                "user.t0001\n#",
                "<strong>1,500 fit</strong>: at least 1,000 types of more than 1,000.",
            ),
            ("user.t0001", "<strong>at least 1 fits</strong>: at least 1 type of more than 1,000."),
        ] {
            let shown = shown(events, 1000, 500);
            assert!(shown.contains("Of 1,500 events") && shown.contains(said), "{events}: {shown}");
        }
        let shown = shown("user.t0001", 3, 0);
        assert!(shown.contains("<strong>1 fits</strong>: 1 type of 3."), "{shown}");
    }

    #[test]
    fn patterns_that_are_not_compared_are_counted() {
        let patterns = |n: usize| (0..n).map(|n| format!("user.t{n:04}\n")).collect::<String>();
        assert!(!shown(&patterns(MAX_PATTERNS), 3, 0).contains("are compared"));
        let shown = shown(&patterns(MAX_PATTERNS + 1), 3, 0);
        assert!(shown.contains("Only the first 100 of 101 patterns are compared."), "{shown}");
    }
}

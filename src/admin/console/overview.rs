//! *Overview*: a row for each subscriber.

use axum::response::Response;
use maud::{Markup, html};

use super::{
    chart,
    page::{Page, Place, Tone, lines, number, path_to, query, short, state, text, time},
    session::Session,
    table::{
        Column::{self, Number, Text},
        table,
    },
};
use crate::{
    admin::view::{Lane, Overview, State, Subscriber, summary::Summary, words},
    telemetry::status::LastHour,
    wording::{agreed, counted},
};

/// Seconds between two refreshes of the page.
const REFRESH: u32 = 5;

/// The page; `hour` is a subscriber's last hour by its name.
pub(super) fn answer(
    session: &Session,
    found: &Overview,
    hour: impl Fn(&str) -> LastHour,
) -> Response {
    let page = Page {
        session,
        place: Place::Overview,
        title: "Overview".to_owned(),
        refresh: Some(REFRESH),
    };
    let summary = Summary::of(&found.subscribers);
    page.answer(html! {
        div.head { h1 { "Overview" } }
        div id="banners" data-live role="status" { (banners(found)) }
        div id="overview" data-live {
            @if let Some(summary) = &summary { (sums(summary, found.subscribers.len())) }
            section.card {
                @if found.subscribers.is_empty() {
                    div.empty {
                        p { "No subscriber is configured." }
                        p { "Add a " code { "[[subscriber]]" } " to " code { (text(&found.config.file)) } ", then run " code { "hooktrail reload" } "." }
                    }
                } @else {
                    @match &summary {
                        None => (rows(found.subscribers.iter(), &hour)),
                        Some(summary) => (rows(summary.worst.iter().copied(), &hour)),
                    }
                }
            }
            (removed(found))
        }
    })
}

fn banners(found: &Overview) -> Markup {
    html! {
        @if !found.queue.up {
            div.note.bad {
                p { strong { "The queue is away. " } "Nothing is delivered until it is back; nothing is lost." }
                @if let Some(why) = &found.queue.error { p { (text(why)) } }
            }
        } @else if let Some(why) = &found.queue.error {
            div.note.warn { p { strong { "The queue has a problem. " } (text(why)) } }
        }
        @if let Some(history) = &found.history {
            @match (history.state.as_str(), &history.why) {
                ("kept" | "opening" | "off", _) => {},
                (state, why) => {
                    div.note.warn {
                        p {
                            strong { "History is " (text(state)) ". " } "Deliveries go on."
                            @if let Some(why) = why { " " (text(why)) }
                        }
                    }
                },
            }
            @if let Some(warning) = &history.warning { div.note.warn { p { (text(warning)) } } }
        }
        @if found.phase != "running" {
            div.note.warn { p { "This daemon is " (text(&found.phase)) "." } }
        }
        @if let Some(problem) = &found.config.problem {
            div.note.bad {
                p { strong { "The configuration was not reloaded. " } "The one before is in use." }
                pre { (lines(problem)) }
            }
        }
        @if let Some(held) = &found.config.held {
            div.note.warn { p { strong { "Removals wait for an operator. " } (text(&held.why)) } }
        }
    }
}

const COLUMNS: [Column; 10] = [
    Text("Subscriber"),
    Text("State"),
    Text("Last hour"),
    Number("Backlog"),
    Number("Oldest"),
    Number("Retrying"),
    Number("Dead"),
    Number("Events/s"),
    Number("Accepted"),
    Text("Last delivered"),
];

/// What many subscribers are together; their list has pages.
fn sums(summary: &Summary<'_>, all: usize) -> Markup {
    let of_state = |state: &State| query(Place::Webhooks.path(), &[("state", state.name())]);
    html! {
        section.card.pad {
            p {
                a href=(Place::Webhooks.path()) { (number(all as u64)) " subscribers" } ": "
                @for (n, (state, count)) in summary.states.iter().enumerate() {
                    @if n > 0 { ", " }
                    a href=(of_state(state)) { (words::states(&[(*state, *count)])) }
                }
            }
            p {
                (number(summary.events)) " " (agreed(&summary.events, "event(s) wait")) " or are in hand, "
                (number(summary.retries)) " " (agreed(&summary.retries, "batch(es) to retry")) ", "
                a href=(Place::DeadLetters.path()) { (number(summary.dead)) " " (agreed(&summary.dead, "dead letter(s)")) } ", "
                (format!("{:.1}", summary.delivered_per_s)) " events/s"
            }
            p.muted.small { "Below are the " (summary.worst.len()) " in the worst state." }
        }
    }
}

fn rows<'a>(
    subscribers: impl Iterator<Item = &'a Subscriber>,
    hour: &impl Fn(&str) -> LastHour,
) -> Markup {
    html! {
        (table("Subscribers", &COLUMNS, html! { @for s in subscribers { (row(s, &hour(&s.subscriber))) } }))
    }
}

fn row(s: &Subscriber, hour: &LastHour) -> Markup {
    let name = s.subscriber.as_str();
    html! {
        tr {
            th scope="row" { a href=(path_to(Place::Webhooks.path(), name)) { (text(name)) } }
            td.wide { (state_of(s)) }
            td { (chart::spark(hour)) }
            @match &s.lane {
                None => td colspan="7" {},
                Some(lane) => (figures(name, lane)),
            }
        }
    }
}

fn figures(name: &str, lane: &Lane) -> Markup {
    let none = html! { span.muted { "–" } };
    let linked = |n: Option<u64>, path: String| match n {
        None => none.clone(),
        Some(0) => html! { "0" },
        Some(n) => html! { a href=(path) { (number(n)) } },
    };
    let retrying = query(Place::Deliveries.path(), &[("subscriber", name), ("state", "retrying")]);
    html! {
        td.number { @match lane.backlog { Some(n) => (number(n + lane.in_hand)), None => (none) } }
        td.number { @match lane.oldest_event_age_s { Some(age) => (words::seconds(age)), None => (none) } }
        td.number { (linked(lane.in_retry, retrying)) }
        td.number { (linked(lane.dead, path_to(Place::DeadLetters.path(), name))) }
        td.number { (format!("{:.1}", lane.delivered_per_s)) }
        td.number { @match lane.success_rate { Some(rate) => { (format!("{:.1}", rate * 100.0)) " %" }, None => (none) } }
        td { @match lane.last_delivered_at { Some(at) => (time(at)), None => (none) } }
    }
}

/// The state of a subscriber, and under it the reason.
pub(super) fn state_of(s: &Subscriber) -> Markup {
    html! {
        (state(tone(&s.state), &words::name(s)))
        @if let Some(reason) = words::reason(s) { span.sub { (short(&reason)) } }
    }
}

pub(super) fn tone(of: &State) -> Tone {
    match of {
        State::Ok => Tone::Good,
        State::Waiting | State::Retrying | State::Held => Tone::Warn,
        State::CircuitOpen | State::QueueFails => Tone::Bad,
        State::Starting | State::Paused | State::Inactive | State::Other(_) => Tone::Quiet,
    }
}

fn removed(found: &Overview) -> Markup {
    html! {
        @if !found.removed.is_empty() {
            h2 { "Removed subscribers with a backlog" }
            section.card {
                (table("Removed subscribers", &[Text("Subscriber"), Text("Left behind")], html! {
                    @for r in &found.removed {
                        tr {
                            th scope="row" { (text(&r.subscriber)) }
                            td { (counted(r.events, "event(s)")) ", " (counted(r.retries, "batch(es) to retry")) ", " (counted(r.dead, "dead letter(s)")) }
                        }
                    }
                }))
                p.pad.muted.small { "Configure the subscriber again to deliver it, or delete it with " code { "hooktrail prune" } "." }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admin::console::{page::testing::body, session};
    use serde_json::{Value, json};

    #[tokio::test]
    async fn of_many_subscribers_those_in_the_worst_state_are_shown_below_the_sums_of_all() {
        let page = async |n: usize| {
            let one = |n: usize| {
                let state = if n == 77 { "circuit_open" } else { "ok" };
                json!({ "subscriber": format!("s{n}"), "state": state, "in_hand": 1, "dead": 2 })
            };
            let all: Vec<Value> = (0..n).map(one).collect();
            let found = json!({ "phase": "running", "queue": { "up": true }, "subscribers": all });
            let found = serde_json::from_value(found).expect("an overview");
            body(answer(&session::of_admin(), &found, |_| LastHour::default())).await
        };
        let rows = |page: &str| page.matches("<th scope=\"row\">").count();
        let (few, many) = (page(100).await, page(1200).await);
        assert_eq!((rows(&few), rows(&many)), (100, 20));
        assert!(!few.contains("in the worst state") && many.contains("in the worst state"));
        for part in [
            "1,200 subscribers",
            "<a href=\"/console/webhooks?state=circuit_open\">1 circuit open</a>, ",
            "1,199 ok",
            "1,200 events wait or are in hand",
            "2,400 dead letters",
            ">s77<",
        ] {
            assert!(many.contains(part), "{part}: {many}");
        }
    }
}

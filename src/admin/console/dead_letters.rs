//! *Dead letters*: how many each subscriber has, and the oldest of one.

use axum::response::Response;
use maud::html;

use super::{
    page::{Page, Place, delivery, number, path_to, query, short, text, time},
    session::Session,
    table::{
        Column::{self, Number, Text},
        table,
    },
};
use crate::admin::{
    answer::Refusal,
    view::{DeadLetter, DeadLetters, Overview, Removed, Subscriber},
};

const COLUMNS: [Column; 6] = [
    Text("Died"),
    Text("Reason"),
    Number("Events"),
    Number("Attempts"),
    Number("Size"),
    Text("Batch or event"),
];

fn page<'a>(session: &'a Session, title: &str) -> Page<'a> {
    Page { session, place: Place::DeadLetters, title: title.to_owned(), refresh: None }
}

/// The page with the number of each subscriber.
pub(super) fn summary(session: &Session, found: &Overview) -> Response {
    let known = |s: &Subscriber| s.lane.as_ref().and_then(|lane| lane.dead);
    let dead = found.subscribers.iter().filter(|s| known(s) != Some(0));
    let dead: Vec<&Subscriber> = dead.collect();
    let removed: Vec<&Removed> = found.removed.iter().filter(|r| r.dead > 0).collect();
    page(session, "Dead letters").answer(html! {
        div.head { h1 { "Dead letters" } }
        @if let Some(why) = &found.queue.error {
            div.note.warn { p { strong { "The queue has a problem. " } (text(why)) } }
        }
        section.card {
            @if dead.is_empty() && removed.is_empty() {
                div.empty { p { "No dead letters." } }
            } @else {
                (table("Subscribers", &[Text("Subscriber"), Number("Dead letters")], html! {
                    @for s in &dead {
                        tr {
                            th scope="row" { a href=(path_to(Place::DeadLetters.path(), &s.subscriber)) { (text(&s.subscriber)) } }
                            td.number { @match known(s) { Some(n) => (number(n)), None => span.muted { "not known yet" } } }
                        }
                    }
                    @for r in &removed {
                        tr {
                            th scope="row" { (text(&r.subscriber)) span.sub { "removed from the configuration" } }
                            td.number { (number(r.dead)) }
                        }
                    }
                }))
            }
        }
    })
}

/// The page of one subscriber.
pub(super) fn of_one(
    session: &Session,
    name: &str,
    found: Result<DeadLetters, Refusal>,
) -> Response {
    let found = match found {
        Ok(found) => found,
        Err(refusal) => return page(session, "Dead letters").refused(&refusal),
    };
    let title = format!("Dead letters of {}", text(name));
    page(session, &title).answer(html! {
        div.head { h1 { (title) } }
        section.card {
            @if found.letters.is_empty() {
                div.empty { p { "There is none." } }
            } @else {
                (table("Dead letters", &COLUMNS, html! { @for letter in &found.letters { (row(letter)) } }))
                @if found.letters.len() < found.dead as usize {
                    div.pager { span.muted { "The oldest " (number(found.letters.len() as u64)) " of " (number(found.dead)) "; " code { "hooktrail dead list" } " shows all." } }
                }
            }
        }
        h2 { "In a shell" }
        pre tabindex="0" aria-label="Commands" { "hooktrail dead show " (text(name)) " 1\nhooktrail dead replay " (text(name)) }
    })
}

fn row(letter: &DeadLetter) -> maud::Markup {
    html! {
        tr {
            td { @match letter.died_at { Some(at) => (time(at)), None => span.muted { "unknown" } } }
            td.main {
                (text(&letter.reason.replace('_', " ")))
                @if let Some(status) = letter.status { " · " (status) }
                span.sub { (short(&letter.error)) }
            }
            td.number { (number(letter.events)) }
            td.number { (number(letter.attempts)) }
            td.number { (crate::wording::rounded_size(letter.bytes as u64)) }
            td.mono.wide {
                @match &letter.id {
                    // An event that never became a batch has the id that its producer gave it.
                    Some(id) if letter.kind == "event" => a href=(query(Place::Events.path(), &[("id", id)])) { (short(id)) },
                    Some(id) => a href=(delivery(id)) { (text(id)) },
                    None => span.muted { "none" },
                }
            }
        }
    }
}

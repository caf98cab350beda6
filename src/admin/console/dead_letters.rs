//! *Dead letters*: how many each subscriber has, and the oldest of one.

use axum::response::Response;
use maud::html;

use super::{
    page::{Page, Place, number, path_to, short, text, time},
    session::Session,
};
use crate::admin::{
    answer::Refusal,
    view::{DeadLetter, DeadLetters, Overview},
};

fn page<'a>(session: &'a Session, title: &str) -> Page<'a> {
    Page { session, place: Place::DeadLetters, title: title.to_owned(), refresh: None }
}

/// The page with all subscribers that have some.
pub(super) fn summary(session: &Session, found: &Overview) -> Response {
    let dead = found.subscribers.iter().filter_map(|s| {
        let n = s.lane.as_ref()?.dead.filter(|n| *n > 0)?;
        Some((s.subscriber.as_str(), n))
    });
    let dead: Vec<(&str, u64)> = dead.collect();
    page(session, "Dead letters").answer(html! {
        div.head { h1 { "Dead letters" } }
        section.card {
            @if dead.is_empty() {
                div.empty { p { "There is none: everything was accepted, or will be tried again." } }
            } @else {
                div.scroll role="region" aria-label="Subscribers" tabindex="0" {
                    table {
                        thead { tr { th scope="col" { "Subscriber" } th.number scope="col" { "Dead letters" } } }
                        tbody {
                            @for (name, n) in &dead {
                                tr {
                                    th scope="row" { a href=(path_to(Place::DeadLetters.path(), name)) { (text(name)) } }
                                    td.number { (number(*n)) }
                                }
                            }
                        }
                    }
                }
            }
        }
    })
}

/// The page with those of one subscriber.
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
                div.scroll role="region" aria-label="Dead letters" tabindex="0" {
                    table {
                        thead {
                            tr {
                                th scope="col" { "Died" }
                                th scope="col" { "Reason" }
                                th.number scope="col" { "Events" }
                                th.number scope="col" { "Attempts" }
                                th.number scope="col" { "Size" }
                                th scope="col" { "Batch" }
                            }
                        }
                        tbody { @for letter in &found.letters { (row(letter)) } }
                    }
                }
                @if found.letters.len() < found.dead as usize {
                    div.pager { span.muted { "The oldest " (number(found.letters.len() as u64)) " of " (number(found.dead)) "; " code { "hooktrail dead list" } " shows all." } }
                }
            }
        }
        h2 { "In a shell" }
        pre tabindex="0" { "hooktrail dead show " (text(name)) " 1\nhooktrail dead replay " (text(name)) }
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
            td.mono.nowrap {
                @match &letter.id {
                    Some(id) => a href=(path_to(Place::Deliveries.path(), id)) { (text(id)) },
                    None => span.muted { "none" },
                }
            }
        }
    }
}

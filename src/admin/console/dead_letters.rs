//! *Dead letters*: how many each subscriber has, those of one, and one with its story.

use std::sync::Arc;

use axum::{
    Router,
    extract::State,
    http::{StatusCode, Uri},
    response::Response,
    routing::get,
};
use maud::{Markup, html};

use super::{
    action,
    dead_actions::{command, list_of, path},
    entry::{Console, SignedIn, This},
    form::Form,
    page::{
        Mistakes, Page, Place, Tone, delivery, lines, number, path_to, query, short, text, time,
    },
    session::Session,
    table::{
        Column::{self, Number, Text},
        table,
    },
};
use crate::{
    admin::{
        answer::Refusal,
        dead::{self, Act, Listed},
        query::Name,
        view::{DeadLetter, DeadLetters, Overview, Removed, Step, Subscriber, WholeLetter},
    },
    delivery::Reason,
    queue::Queue,
    store::Store,
    wording::{counted, rounded_size},
};

const COLUMNS: [Column; 6] = [
    Text("Died"),
    Text("Reason"),
    Number("Events"),
    Number("Attempts"),
    Number("Size"),
    Text("Batch or event"),
];

/// The most bytes of a body that a page shows.
const MAX_BODY: usize = 64 * 1024;

pub(super) fn routes<Q: Queue, S: Store>() -> Router<Arc<Console<Q, S>>> {
    Router::new()
        .route(Place::DeadLetters.path(), get(summarise::<Q, S>))
        .route("/console/dead-letters/{name}", get(list::<Q, S>))
        .route("/console/dead-letters/{name}/{key}", get(show::<Q, S>))
}

fn page<'a>(session: &'a Session, title: &str) -> Page<'a> {
    Page { session, place: Place::DeadLetters, title: title.to_owned(), refresh: None }
}

async fn summarise<Q: Queue, S: Store>(
    State(console): This<Q, S>,
    SignedIn(session): SignedIn,
) -> Response {
    summary(&session, &console.control.overview().await)
}

async fn list<Q: Queue, S: Store>(
    State(console): This<Q, S>,
    SignedIn(session): SignedIn,
    name: Result<Name, Refusal>,
    uri: Uri,
) -> Response {
    let name = match name {
        Ok(Name(name)) => name,
        Err(refusal) => return page(&session, "Dead letters").refused(&refusal),
    };
    let form = Form::of(uri.query().unwrap_or_default()).without("notice");
    let found = match form.read::<Listed>() {
        Ok(listed) => console.letters.list(name.clone(), listed, &session.caller).await,
        Err(refusal) => Err(refusal),
    };
    let notice = console.notices.of(&session, uri.query());
    of_one(&session, notice, &name, &form, found)
}

async fn show<Q: Queue, S: Store>(
    State(console): This<Q, S>,
    SignedIn(session): SignedIn,
    place: Result<dead::Place, Refusal>,
) -> Response {
    let found = match place {
        Ok(dead::Place { name, key }) => console.letters.one(name, key, &session.caller).await,
        Err(refusal) => Err(refusal),
    };
    one(&session, found)
}

/// The page with the number of each subscriber.
fn summary(session: &Session, found: &Overview) -> Response {
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
                            th scope="row" { a href=(list_of(&s.subscriber)) { (text(&s.subscriber)) } }
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
fn of_one(
    session: &Session,
    notice: Option<Markup>,
    name: &str,
    form: &Form,
    found: Result<DeadLetters, Refusal>,
) -> Response {
    let refusal = found.as_ref().err();
    if let Some(refusal) = refusal.filter(|refusal| refusal.fields.is_empty()) {
        return page(session, "Dead letters").refused(refusal);
    }
    let status = refusal.map_or(StatusCode::OK, |refusal| refusal.status);
    let title = format!("Dead letters of {}", text(name));
    let is_empty = found.as_ref().map_or(true, |found| found.letters.is_empty());
    page(session, &title).answer_with(status, html! {
        (notice.unwrap_or_default())
        div.head {
            h1 { (title) }
            @if session.caller.may_change() && !is_empty {
                div.deeds {
                    (action::link(&path(name, Act::Replay, form), if form.is_filled() { "Replay these" } else { "Replay all" }))
                    (action::link(&path(name, Act::Purge, form), if form.is_filled() { "Purge these" } else { "Purge all" }))
                }
            }
        }
        section.card {
            (filters(name, form, &Mistakes(refusal)))
            @if let Ok(found) = &found { (rows(name, form, found)) }
        }
        (action::same(&command(name, "list", None, form)))
    })
}

fn filters(name: &str, form: &Form, mistakes: &Mistakes<'_>) -> Markup {
    const SHOWN: [&str; 5] = ["reason", "status", "type", "since", "until"];
    const FIELDS: [(&str, &str, &str); 4] = [
        ("status", "Last status", "5xx"),
        ("type", "Type of an event", "user.*"),
        ("since", "Died since (UTC)", "2026-01-31T12:00"),
        ("until", "Died until (UTC)", "2026-01-31T12:00"),
    ];
    let reasons = Reason::ALL.map(Reason::name);
    let chosen = form.get("reason");
    html! {
        form.filters method="get" action=(list_of(name)) role="search" {
            div.field {
                label for="reason" { "Reason" }
                select id="reason" name="reason" aria-invalid=[mistakes.is_wrong("reason")] aria-describedby=[mistakes.described_by("reason")] {
                    option value="" selected[chosen.is_empty()] { "all" }
                    @if !chosen.is_empty() && !reasons.contains(&chosen) { option value=(chosen) selected { (short(chosen)) } }
                    @for reason in reasons { option value=(reason) selected[reason == chosen] { (reason.replace('_', " ")) } }
                }
                (mistakes.beside("reason"))
            }
            @for (field, label, example) in FIELDS {
                div.field {
                    label for=(field) { (label) }
                    input id=(field) name=(field) value=(form.get(field)) placeholder=(example)
                        aria-invalid=[mistakes.is_wrong(field)] aria-describedby=[mistakes.described_by(field)];
                    (mistakes.beside(field))
                }
            }
            div.deeds {
                button.first { "Show" }
                @if form.is_filled() { a.button href=(list_of(name)) { "Clear" } }
            }
            (mistakes.of_others(&SHOWN))
            (form.others(&SHOWN))
        }
    }
}

fn rows(name: &str, form: &Form, found: &DeadLetters) -> Markup {
    html! {
        @if !found.letters.is_empty() {
            (table("Dead letters", &COLUMNS, html! { @for letter in &found.letters { (row(name, letter)) } }))
        } @else if found.dead == 0 {
            div.empty { p { "There is none." } }
        } @else if found.complete {
            div.empty { p { "None fits, of " (number(found.dead)) "." } }
        } @else {
            div.empty { p { "None fits among those that were read in 5 seconds; " code { "hooktrail dead list" } " reads all." } }
        }
        @if !found.complete && !found.letters.is_empty() {
            div.pager {
                span.muted {
                    @if form.is_filled() { "The oldest that fit, of " (number(found.dead)) "; there may be more: " }
                    @else { "The oldest " (number(found.letters.len() as u64)) " of " (number(found.dead)) "; " }
                    code { "hooktrail dead list" } " shows all."
                }
            }
        }
    }
}

fn row(name: &str, letter: &DeadLetter) -> Markup {
    html! {
        tr {
            td { a href=(path_to(&list_of(name), &letter.key)) { @match letter.died_at { Some(at) => (time(at)), None => "unknown" } } }
            td.main {
                (why(letter))
                span.sub { (short(&letter.error)) }
            }
            td.number { (number(letter.events)) }
            td.number { (number(letter.attempts)) }
            td.number { (rounded_size(letter.bytes as u64)) }
            td.mono.id { (batch_or_event(letter)) }
        }
    }
}

fn why(letter: &DeadLetter) -> Markup {
    html! {
        (text(&letter.reason.replace('_', " ")))
        @if let Some(status) = letter.status { " · " (status) }
    }
}

fn batch_or_event(letter: &DeadLetter) -> Markup {
    html! {
        @match &letter.id {
            // An event that never became a batch has the id that its producer gave it.
            Some(id) if letter.kind == "event" => a href=(query(Place::Events.path(), &[("id", id)])) { (short(id)) },
            Some(id) => a href=(delivery(id)) { (text(id)) },
            None => span.muted { "none" },
        }
    }
}

/// The page of one letter.
fn one(session: &Session, found: Result<WholeLetter, Refusal>) -> Response {
    let WholeLetter { letter, story, body, body_base64 } = match found {
        Ok(found) => found,
        Err(refusal) => return page(session, "Dead letter").refused(&refusal),
    };
    let name = letter.subscriber.clone().unwrap_or_default();
    let title = format!("{} given up for {}", counted(letter.events, "event(s)"), text(&name));
    let own = Form::default().with("key", letter.key.clone());
    let by = letter.id.clone().unwrap_or_else(|| format!("@{}", letter.number));
    let commands = ["show", "replay", "purge"];
    let commands = commands.map(|verb| command(&name, verb, Some(&by), &Form::default()));
    page(session, &title).answer(html! {
        div.head {
            h1 { (title) }
            @if session.caller.may_change() {
                div.deeds {
                    (action::link(&path(&name, Act::Replay, &own), "Replay"))
                    (action::link(&path(&name, Act::Purge, &own), "Purge"))
                }
            }
        }
        section.card.pad aria-label="Dead letter" {
            dl.facts {
                dt { "Reason" } dd { (why(&letter)) span.sub { (text(&letter.error)) } }
                dt { "Subscriber" } dd { a href=(path_to(Place::Webhooks.path(), &name)) { (text(&name)) } span.sub { a href=(list_of(&name)) { "all its dead letters" } } }
                dt { (if letter.kind == "event" { "Event" } else { "Batch" }) } dd.mono { (batch_or_event(&letter)) }
                dt { "Died" } dd { @match letter.died_at { Some(at) => (time(at)), None => "unknown" } }
                @if let Some(at) = letter.first_attempt_at { dt { "First attempt" } dd { (time(at)) } }
                dt { "Attempts" } dd { (number(letter.attempts)) }
                @if let Some(kind) = &letter.content_type { dt { "Content type" } dd { (short(kind)) } }
                @if let Some(encoding) = &letter.content_encoding { dt { "Content encoding" } dd { (short(encoding)) } }
                dt { "Size" } dd { (rounded_size(letter.bytes as u64)) }
            }
        }
        h2 { "Attempts" }
        section.card.pad aria-label="Attempts" {
            @if story.is_empty() { p.muted { "None is known." } }
            ol.line { @for step in &story { (attempt(step)) } }
        }
        h2 { "Body" }
        section.card.pad aria-label="Body" { (shown(body.as_deref(), body_base64.as_deref())) }
        (action::same(&commands.join("\n")))
    })
}

fn attempt(step: &Step) -> Markup {
    html! {
        @match step.left_out {
            Some(n) => li.(Tone::Quiet.class()) { span.what { (counted(n, "attempt(s) (is|are)")) " not kept" } },
            None => li.(Tone::Bad.class()) {
                span.what {
                    @if let Some(n) = step.attempt { "Attempt " (n) ": " }
                    @match (step.status, &step.failure) {
                        (Some(status), _) => { "answered " (status) },
                        (None, Some(failure)) => (text(&failure.replace('_', " "))),
                        (None, None) => "no answer",
                    }
                }
                @if let Some(at) = step.at { span.sub { (time(at)) } }
            },
        }
    }
}

fn shown(body: Option<&str>, base64: Option<&str>) -> Markup {
    let whole = body.or(base64).unwrap_or_default();
    let part = &whole[..whole.floor_char_boundary(MAX_BODY)];
    html! {
        @if body.is_none() { p.muted { "It is not UTF-8; here as base64." } }
        pre role="group" tabindex="0" aria-label="Body" { (lines(part)) }
        @if part.len() < whole.len() { p.muted.small { "The beginning of it; " code { "hooktrail dead show" } " has all." } }
    }
}

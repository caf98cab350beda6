//! *Deliveries*: the batches, and one of them with its attempts.

use axum::{http::StatusCode, response::Response};
use maud::{Markup, html};

use super::{
    actions,
    events::row as event_row,
    form::Form,
    page::{
        Mistakes, Page, Place, Tone, delivery, number, path_to, query, reach, state, text, time,
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
        view::{Attempt, Delivery, DeliveryList, Event},
    },
    store::DeliveryState,
    wording::{agreed, counted, rounded, rounded_size},
};

/// The most events that the page of a batch lists.
pub(super) const EVENTS: usize = 50;

fn page<'a>(session: &'a Session, title: &str) -> Page<'a> {
    Page { session, place: Place::Deliveries, title: title.to_owned(), refresh: None }
}

pub(super) fn list(
    session: &Session,
    form: &Form,
    subscribers: &[String],
    found: Result<DeliveryList, Refusal>,
) -> Response {
    let refusal = found.as_ref().err();
    let status = refusal.map_or(StatusCode::OK, |refusal| refusal.status);
    page(session, "Deliveries").answer_with(status, html! {
        div.head { h1 { "Deliveries" } }
        section.card {
            (filters(form, subscribers, &Mistakes(refusal)))
            @match &found {
                Err(refusal) if refusal.fields.is_empty() => div.pad { div.note.bad role="alert" { p { (text(&refusal.why)) } } },
                Err(_) => {},
                Ok(list) => (rows(form, list)),
            }
        }
        @if let Ok(list) = &found { div.below { (reach(&list.history, "deliveries")) } }
    })
}

fn filters(form: &Form, subscribers: &[String], mistakes: &Mistakes<'_>) -> Markup {
    const SHOWN: [&str; 4] = ["subscriber", "state", "since", "until"];
    let chosen = form.get("subscriber");
    let is_other = !chosen.is_empty() && !subscribers.iter().any(|name| name == chosen);
    let option = |value: &str, shown: &str, chosen: &str| {
        html! {
            option value=(value) selected[value == chosen] { (text(shown)) }
        }
    };
    html! {
        form.filters method="get" action=(Place::Deliveries.path()) role="search" {
            div.field {
                label for="subscriber" { "Subscriber" }
                select id="subscriber" name="subscriber" aria-invalid=[mistakes.is_wrong("subscriber")] aria-describedby=[mistakes.described_by("subscriber")] {
                    (option("", "all", chosen))
                    @if is_other { (option(chosen, chosen, chosen)) }
                    @for name in subscribers { (option(name, name, chosen)) }
                }
                (mistakes.beside("subscriber"))
            }
            div.field {
                label for="state" { "State" }
                select id="state" name="state" aria-invalid=[mistakes.is_wrong("state")] aria-describedby=[mistakes.described_by("state")] {
                    (option("", "all", form.get("state")))
                    @for name in DeliveryState::NAMES.into_iter().chain([DeliveryState::UNKNOWN]) { (option(name, &name.replace('_', " "), form.get("state"))) }
                }
                (mistakes.beside("state"))
            }
            @for (name, label) in [("since", "Begun since (UTC)"), ("until", "Begun until (UTC)")] {
                div.field {
                    label for=(name) { (label) }
                    input id=(name) name=(name) value=(form.get(name)) placeholder="2026-01-31T12:00"
                        aria-invalid=[mistakes.is_wrong(name)] aria-describedby=[mistakes.described_by(name)];
                    (mistakes.beside(name))
                }
            }
            div.deeds {
                button.first { "Show" }
                @if form.is_filled() { a.button href=(Place::Deliveries.path()) { "Clear" } }
            }
            (mistakes.of_others(&SHOWN))
            (form.others(&SHOWN))
        }
    }
}

fn rows(form: &Form, list: &DeliveryList) -> Markup {
    html! {
        @if list.deliveries.is_empty() {
            div.empty {
                @if form.is_filled() { p { "No delivery fits." } } @else { p { "Nothing was delivered yet." } }
            }
        } @else {
            (batches(&list.deliveries))
        }
        div.pager {
            @if !form.get("cursor").is_empty() { a href=(form.link(Place::Deliveries.path(), None)) { "Newest" } }
            @if let Some(next) = &list.next { a rel="next" href=(form.link(Place::Deliveries.path(), Some(next))) { "Older" } }
            @match (&list.searched_back_to, &list.next) {
                (Some(at), _) => span.muted { "Searched back to " (time(*at)) "; Older searches on." },
                (None, None) => span.muted { "Nothing older." },
                (None, Some(_)) => {},
            }
        }
    }
}

/// A table of batches.
pub(super) fn batches(of: &[Delivery]) -> Markup {
    const COLUMNS: [Column; 8] = [
        Text("Begun"),
        Text("State"),
        Text("Subscriber"),
        Number("Events"),
        Number("Size"),
        Number("Attempts"),
        Text("Last answer"),
        Text("Batch"),
    ];
    table("Deliveries", &COLUMNS, html! { @for one in of { (row(one)) } })
}

fn row(one: &Delivery) -> Markup {
    let last = one.attempts.last();
    html! {
        tr {
            td { a href=(delivery(&one.id)) { (time(one.begun_at)) } }
            td { (became(one)) }
            td.wide { a href=(query(Place::Deliveries.path(), &[("subscriber", &one.subscriber)])) { (text(&one.subscriber)) } }
            td.number { (number(one.events)) }
            td.number { (rounded_size(one.bytes)) }
            td.number { @match last { Some(last) => (last.number), None => "0" } }
            td { @if let Some(last) = last { (answered(last)) } }
            td.mono.nowrap { (text(&one.id)) }
        }
    }
}

fn became(one: &Delivery) -> Markup {
    html! {
        (state(Tone::of_state(&one.state), &one.state))
        @match (&one.why, one.next_attempt_at) {
            (Some(why), _) => span.sub { (text(why)) },
            (None, Some(at)) => span.sub { "next " (time(at)) },
            (None, None) => {},
        }
        @if let Some(reason) = &one.reason { span.sub { (text(&reason.replace('_', " "))) } }
    }
}

/// The answer of an attempt, or why there is none.
fn answered(attempt: &Attempt) -> Markup {
    html! {
        @match (attempt.status, &attempt.failure) {
            (Some(status), _) => (status),
            (None, Some(failure)) => (text(&failure.replace('_', " "))),
            (None, None) => span.muted { "none yet" },
        }
    }
}

/// A page with one batch.
pub(super) fn one(
    session: &Session,
    notice: Option<Markup>,
    found: Result<(Delivery, Vec<Option<Event>>), Refusal>,
) -> Response {
    let (one, events) = match found {
        Ok(found) => found,
        Err(refusal) => return page(session, "Delivery").refused(&refusal),
    };
    let title = format!("{} for {}", counted(one.events, "event(s)"), text(&one.subscriber));
    page(session, &title).answer(html! {
        (notice.unwrap_or_default())
        div.head {
            h1 { (title) }
            (became(&one))
            @if session.caller.may_change() { div.deeds { (actions::link(&query("/console/resend", &[("id", &one.id)]), "Resend")) } }
        }
        section.card.pad aria-label="Batch" {
            dl.facts {
                dt { "Batch" } dd.mono { (text(&one.id)) span.sub { "the receiver got it as " code { "webhook-id" } } }
                dt { "Subscriber" } dd { a href=(path_to(Place::Webhooks.path(), &one.subscriber)) { (text(&one.subscriber)) } }
                @if let Some(parent) = &one.parent { dt { "A half of" } dd.mono { a href=(delivery(parent)) { (text(parent)) } } }
                @if let Some(format) = &one.format { dt { "Format" } dd { (text(format)) } }
                dt { "Size" } dd { (rounded_size(one.bytes)) }
                @if let Some(sha256) = &one.sha256 { dt { "SHA-256" } dd.mono { (text(sha256)) } }
                @if one.replay { dt { "Replay" } dd { "an operator sent it again" } }
                dt { "Begun" } dd { (time(one.begun_at)) }
                @if let Some(at) = one.delivered_at { dt { "Delivered" } dd { (time(at)) } }
                @if let Some(at) = one.next_attempt_at { dt { "Next attempt due" } dd { (time(at)) } }
            }
        }
        h2 { "Attempts" }
        section.card.pad aria-label="Attempts" {
            @if one.attempts.is_empty() { p.muted { "None is known." } }
            ol.line { @for attempt in &one.attempts { (attempt_of(attempt)) } }
            @if one.attempts.windows(2).any(|two| two[1].number > two[0].number + 1) {
                p.muted.small { "Not all attempts are kept: the first is, and the latest." }
            }
        }
        h2 { "Events" }
        (events_of(&one, &events))
        h2 { "In a shell" }
        pre role="group" tabindex="0" aria-label="Commands" { "hooktrail deliveries show " (text(&actions::word(&one.id))) "\nhooktrail resend " (text(&actions::word(&one.id))) }
    })
}

/// The events of a batch, each with a link to where else it went.
fn events_of(one: &Delivery, events: &[Option<Event>]) -> Markup {
    let lacking = events.iter().filter(|event| event.is_none()).count();
    let more = u64::from(one.events).saturating_sub(events.len() as u64);
    html! {
        section.card {
            @if events.len() > lacking {
                (table("Events of the batch", &[Text("Date"), Text("Actor"), Text("Description"), Text("Resource")], html! {
                    @for event in events.iter().flatten() { (event_row(event, false)) }
                }))
            }
            @if lacking > 0 || more > 0 {
                div.pad.muted.small {
                    @if events.is_empty() { p { "History does not know which events are in this batch." } }
                    @else if more > 0 { p { (counted(more, "event(s)")) " more " (agreed(&more, "(is|are)")) " not listed." } }
                    @if lacking > 0 { p { (counted(lacking, "of its events (was|were)")) " not found: removed since, or further back than this page searches." } }
                }
            }
        }
    }
}

fn attempt_of(attempt: &Attempt) -> Markup {
    let is_good = attempt.failure.is_none() && attempt.status.is_some();
    let tone = match (attempt.duration_ms, is_good) {
        (None, _) => Tone::Quiet,
        (Some(_), true) => Tone::Good,
        (Some(_), false) => Tone::Bad,
    };
    html! {
        li.(tone.class()) {
            span.what {
                "Attempt " (attempt.number) ": "
                @match (attempt.status, &attempt.failure, attempt.duration_ms) {
                    (Some(status), _, _) => { "answered " (status) },
                    (None, Some(failure), _) => (text(&failure.replace('_', " "))),
                    (None, None, Some(_)) => "no answer",
                    (None, None, None) => "under way, or its end is not known",
                }
            }
            span.sub {
                (time(attempt.at))
                @if let Some(ms) = attempt.duration_ms { " · took " @if ms == 0 { "less than 1ms" } @else { (rounded(std::time::Duration::from_millis(ms))) } }
                " · by " (text(&attempt.by))
            }
            @if let Some(excerpt) = &attempt.excerpt { pre role="group" tabindex="0" aria-label="Answer" { (text(excerpt)) } }
        }
    }
}

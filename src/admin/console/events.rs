//! *Audit Log*: the events, newest first, and one of them with where it went.

use std::{
    collections::BTreeMap,
    time::{Duration, SystemTime},
};

use axum::{http::StatusCode, response::Response};
use maud::{Markup, html};
use serde::Deserialize;
use serde_json::value::RawValue;

use super::{
    chart,
    form::Form,
    page::{
        Mistakes, Page, Place, Tone, delivery, lines, number, of_tenant, of_type, party, path_to,
        query, reach, short, state, text, time,
    },
    replays,
    session::Session,
    table::{
        Column::{Number, Text},
        table,
    },
};
use crate::{
    admin::{
        answer::Refusal,
        history::Day,
        view::{Event, EventList, EventWhere, Time, Whereabouts},
    },
    clock,
    wording::{agreed, rounded_size},
};

/// The filters of the page: a parameter, its label, and an example.
const FILTERS: [(&str, &str, &str); 6] = [
    ("type", "Type", "user.*"),
    ("actor", "Actor", "id, type or name"),
    ("resource", "Resource", "id, type or name"),
    TENANT,
    ("since", "Since (UTC)", "2026-01-31T12:00"),
    ("until", "Until (UTC)", "2026-01-31T13:00"),
];

/// Shown where events have tenants.
const TENANT: (&str, &str, &str) = ("tenant", "Tenant", "whole, with its case");

fn page<'a>(session: &'a Session, title: &str) -> Page<'a> {
    Page { session, place: Place::Events, title: title.to_owned(), refresh: None }
}

pub(super) fn list(
    session: &Session,
    form: &Form,
    found: Result<EventList, Refusal>,
    day: Option<&Day>,
    tenants: bool,
) -> Response {
    let refusal = found.as_ref().err();
    let status = refusal.map_or(StatusCode::OK, |refusal| refusal.status);
    page(session, "Audit Log").answer_with(status, html! {
        div.head {
            h1 { "Audit Log" }
            @if session.caller.may_change() && found.as_ref().is_ok_and(|list| !list.events.is_empty()) {
                div.deeds { a.button href=(replays::new_of(form)) { @if replays::is_narrowed_otherwise(form) { "Replay this time" } @else { "Replay these" } } }
            }
        }
        section.card {
            (filters(form, &Mistakes(refusal), tenants))
            @match &found {
                Err(refusal) if refusal.fields.is_empty() => div.pad { div.note.bad role="alert" { p { (text(&refusal.why)) } } },
                Err(_) => {},
                Ok(list) => {
                    @if let Some(day) = day { (picture(form, day, list)) }
                    (rows(form, list, tenants))
                },
            }
        }
        @if let Ok(list) = &found { div.below { (reach(&list.history, "events")) } }
    })
}

/// The answer to a wish for a file that there is none of.
pub(super) fn no_file(session: &Session, refusal: &Refusal) -> Response {
    page(session, "Export").refused(refusal)
}

/// Links to all that the filters select, as files.
fn exports(form: &Form) -> Markup {
    let form = form.clone().without("limit");
    let file = |format: &str| {
        form.clone().with("format", format.to_owned()).link("/console/events/export", None)
    };
    html! {
        span.files {
            span.muted { "Export" @if form.is_filled() { " what fits" } }
            a.button href=(file("csv")) download="" { "CSV" }
            a.button href=(file("jsonl")) download="" { "JSON Lines" }
        }
    }
}

fn filters(form: &Form, mistakes: &Mistakes<'_>, tenants: bool) -> Markup {
    let fields = FILTERS.iter().filter(|filter| tenants || **filter != TENANT);
    let mut shown = vec!["text"];
    shown.extend(fields.clone().map(|(name, ..)| *name));
    html! {
        form.filters method="get" action=(Place::Events.path()) role="search" {
            div.field.grow {
                label for="text" { "Search" }
                input id="text" name="text" type="search" value=(form.get("text")) placeholder="words, all of which must occur"
                    aria-invalid=[mistakes.is_wrong("text")] aria-describedby=[mistakes.described_by("text")];
                (mistakes.beside("text"))
            }
            div.deeds {
                button.first { "Search" }
                @if form.is_filled() { a.button href=(Place::Events.path()) { "Clear" } }
            }
            @for (name, label, example) in fields {
                div.field {
                    label for=(name) { (label) }
                    input id=(name) name=(name) value=(form.get(name)) placeholder=(example)
                        aria-invalid=[mistakes.is_wrong(name)] aria-describedby=[mistakes.described_by(name)];
                    (mistakes.beside(name))
                }
            }
            (mistakes.of_others(&shown))
            (form.others(&shown))
        }
    }
}

/// The day of the list by the hour, as a picture and as a table. Each number leads to its events.
fn picture(form: &Form, day: &Day, list: &EventList) -> Markup {
    let bars = hours(form, day);
    let begins = list.history.events_from;
    let link = |from: SystemTime, until: SystemTime| between(form, from, until);
    let before = day.from - day_long();
    let has_before = begins.is_some_and(|begins| begins.0 < day.from);
    let all: u64 = day.counts.hours.iter().sum();
    let name =
        format!("{} from {} to {} UTC", counted_events(all), minute(day.from), minute(day.until()));
    let chosen = chosen_hours(day).map(|n| format!("{} in the chosen time, ", counted_events(n)));
    html! {
        div.pad {
            div.day-head {
                span.muted { @if let Some(chosen) = chosen { strong { (chosen) } "of " } (name) }
                span.deeds {
                    @if has_before { a href=(link(before, day.from)) { "The day before" } }
                    @if !day.is_latest { a href=(form.clone().without("since").without("until").link(Place::Events.path(), None)) { "The latest" } }
                }
            }
            div.scroll role="region" aria-label="Events by the hour" tabindex="0" { (chart::bars(&name, &bars)) }
            @if let Some((from, until)) = day.counts.uncounted {
                p.muted.small { "Not all events from " (time(Time(from))) " to " (time(Time(until))) " are counted." }
            }
            @if begins.is_some_and(|begins| begins.0 > day.from && begins.0 < day.until()) {
                p.muted.small { "History begins in this time, so the hours before have less, or nothing." }
            }
            details {
                summary { "As a table" }
                (table("Events by the hour", &[Text("Hour (UTC)"), Number("Events")], html! {
                    @for bar in &bars {
                        tr {
                            td { (bar.title) }
                            td.number { @if bar.events > 0 { a href=(bar.link) { (number(bar.events)) } } @else { "0" } }
                        }
                    }
                }))
            }
        }
    }
}

/// The events of the list, if its time is narrowed to whole hours of the day.
fn chosen_hours(day: &Day) -> Option<u64> {
    if day.counts.uncounted.is_some() {
        return None;
    }
    let whole = |at: SystemTime| (0..=24).any(|n| day.hour(n) == at);
    let is_narrowed = day.since.is_some_and(|since| since > day.from)
        || day.until.is_some_and(|until| until < day.until());
    let is_whole = day.since.into_iter().chain(day.until).all(whole);
    let listed = (0..).zip(&day.counts.hours).filter(|(n, _)| is_listed(day, *n));
    (is_narrowed && is_whole).then(|| listed.map(|(_, events)| events).sum())
}

fn is_listed(day: &Day, hour: u32) -> bool {
    day.since.is_none_or(|since| since < day.hour(hour + 1))
        && day.until.is_none_or(|until| until > day.hour(hour))
}

fn day_long() -> Duration {
    Duration::from_secs(24 * 3600)
}

fn counted_events(n: u64) -> String {
    format!("{} {}", number(n), agreed(&n, "event(s)"))
}

fn hours(form: &Form, day: &Day) -> Vec<chart::Bar> {
    let bar = |(n, events): (u32, &u64)| {
        let (from, until) = (day.hour(n), day.hour(n + 1));
        let hour = minute(from);
        chart::Bar {
            title: format!("{hour} to {}", minute(until).get(11..).unwrap_or_default()),
            mark: (n % 6 == 0).then(|| hour.get(11..).unwrap_or_default().to_owned()),
            events: *events,
            link: between(form, from, until),
            is_listed: is_listed(day, n),
        }
    };
    (0..).zip(&day.counts.hours).map(bar).collect()
}

/// The list, narrowed to a time.
fn between(form: &Form, from: SystemTime, until: SystemTime) -> String {
    let typed = |at| minute(at).replace(' ', "T");
    let form = form.clone().with("since", typed(from)).with("until", typed(until));
    form.link(Place::Events.path(), None)
}

/// A time to the minute, in UTC.
fn minute(at: SystemTime) -> String {
    let exact = Time(at).to_string();
    exact.get(..16).unwrap_or(&exact).replace('T', " ")
}

fn rows(form: &Form, list: &EventList, tenants: bool) -> Markup {
    let mut columns = vec![Text("Date"), Text("Actor"), Text("Description"), Text("Resource")];
    if tenants {
        columns.push(Text("Tenant"));
    }
    html! {
        @if list.events.is_empty() {
            div.empty {
                @if form.is_filled() { p { "No event fits." } (hints(form)) } @else { p { "No event is in history yet." } }
            }
        } @else {
            (table(
                "Events",
                &columns,
                html! { @for event in &list.events { (row(event, tenants)) } },
            ))
        }
        div.pager {
            @if !form.get("cursor").is_empty() { a href=(form.link(Place::Events.path(), None)) { "Newest" } }
            @if let Some(next) = &list.next { a rel="next" href=(form.link(Place::Events.path(), Some(next))) { "Older" } }
            @match (&list.searched_back_to, &list.next) {
                (Some(at), _) => span.muted { "Searched back to " (time(*at)) "; Older searches on." },
                (None, None) => span.muted { "Nothing older." },
                (None, Some(_)) => {},
            }
            @if !list.events.is_empty() || list.next.is_some() { (exports(form)) }
        }
    }
}

/// What may find more than filters that found nothing.
fn hints(form: &Form) -> Markup {
    let words = |filter: &str| {
        let text = [form.get("text"), form.get(filter)].join(" ").trim().to_owned();
        form.clone().without(filter).with("text", text).link(Place::Events.path(), None)
    };
    html! {
        @for (filter, label) in [("actor", "Actor"), ("resource", "Resource")] {
            @let given = form.get(filter);
            @if !given.is_empty() {
                p { (label) " is compared whole, and with its case. " a href=(words(filter)) { "Search for the words " (short(given)) } " instead." }
            }
        }
        @if !form.get("text").is_empty() { p { "Search finds whole words, in any case; of the last one its beginning is enough." } }
        @if !form.get("type").is_empty() { p { "Type is a pattern: " code { "*" } " is one word, " code { "#" } " any number of words." } }
    }
}

pub(super) fn row(event: &Event, tenants: bool) -> Markup {
    let path = path_to(Place::Events.path(), &event.number.to_string());
    html! {
        tr {
            td { a href=(path) { (time(event.at)) } }
            td.wide { (party(&event.actor, Some((Place::Events.path(), "actor")))) }
            td.main { (description(event)) }
            td.wide { (party(&event.resource, Some((Place::Events.path(), "resource")))) }
            @if tenants { td.wide { @if let Some(tenant) = &event.tenant { (of_tenant(Place::Events, tenant)) } } }
        }
    }
}

/// The event in its own words, and its type.
fn description(event: &Event) -> Markup {
    html! {
        @if let Some(description) = &event.description { (short(description)) " " }
        @match of_type(&event.event) {
            Some(to) => a.sub.mono href=(to) { (short(&event.event)) },
            None => span.sub.mono { (short(&event.event)) },
        }
    }
}

/// A page with one event.
pub(super) fn one(session: &Session, found: Result<EventWhere, Refusal>) -> Response {
    let found = match found {
        Ok(found) => found,
        Err(refusal) => return page(session, "Event").refused(&refusal),
    };
    let event = &found.event;
    let title = event.description.as_deref().unwrap_or(&event.event);
    let body = found.body.as_deref();
    let body = body.and_then(|body| serde_json::from_str::<Published>(body).ok());
    page(session, &short(title)).answer(html! {
        div.head {
            h1 { (text(title)) }
            @if session.caller.may_change() { div.deeds { a.button href=(replay_of(event)) { "Replay this time" } } }
        }
        section.card.pad aria-label="Event" { (facts(event)) }
        h2 { "Where it went" }
        section.card { (went(&found.went)) }
        @if let Some(changes) = body.and_then(|body| body.changes) { (changed(&changes)) }
        h2 { "Published bytes" }
        @match (&found.body, &found.body_base64) {
            (Some(body), _) => pre role="group" tabindex="0" aria-label="Published bytes" { (lines(body)) },
            (None, Some(base64)) => { p.muted { "These are not UTF-8; in base64:" } pre role="group" tabindex="0" aria-label="Published bytes in base64" { (text(base64)) } },
            (None, None) => p.muted { "Not kept: " code { "[history] bodies" } " is false." },
        }
        h2 { "In a shell" }
        pre role="group" tabindex="0" aria-label="Command" { "hooktrail where " (event.number) }
        div.below { (reach(&found.history, "deliveries")) }
    })
}

/// The page of a replay of the time and the type of an event.
fn replay_of(event: &Event) -> String {
    let until = Time(event.at.0 + Duration::from_millis(1));
    let time = [("since", event.at), ("until", until)];
    let form = time
        .into_iter()
        .fold(Form::default(), |form, (field, at)| form.with(field, at.to_string()));
    // A type that is no pattern of itself is left out: its time alone selects.
    let form = match of_type(&event.event) {
        Some(_) => form.with("events", event.event.clone()),
        None => form,
    };
    replays::new_of(&form)
}

/// The part of an event that is shown from its own bytes, so that each number is spelled as it was.
#[derive(Deserialize)]
struct Published {
    changes: Option<BTreeMap<String, Box<RawValue>>>,
}

#[derive(Deserialize)]
struct Change {
    from: Option<Box<RawValue>>,
    to: Option<Box<RawValue>>,
}

fn changed(changes: &BTreeMap<String, Box<RawValue>>) -> Markup {
    html! {
        h2 { "Changes" }
        section.card {
            (table("Changes", &[Text("Field"), Text("From"), Text("To")], html! {
                @for (field, change) in changes {
                    tr {
                        th scope="row" { (short(field)) }
                        @match serde_json::from_str::<Change>(change.get()) {
                            Ok(change) if change.from.is_some() || change.to.is_some() => {
                                td.wide.gone { (value(change.from.as_deref())) }
                                td.wide.came { (value(change.to.as_deref())) }
                            },
                            _ => td.wide colspan="2" { (value(Some(change))) },
                        }
                    }
                }
            }))
        }
    }
}

fn value(of: Option<&RawValue>) -> Markup {
    let Some(of) = of else { return html! { span.muted { "absent" } } };
    match serde_json::from_str::<String>(of.get()) {
        Ok(given) => html! { (short(&given)) },
        Err(_) => html! { code { (short(of.get())) } },
    }
}

fn facts(event: &Event) -> Markup {
    let by_id = query(Place::Events.path(), &[("id", &event.id)]);
    html! {
        dl.facts {
            dt { "At" } dd { (time(event.at)) }
            dt { "Type" } dd.mono { (text(&event.event)) }
            dt { "Actor" } dd { (party(&event.actor, Some((Place::Events.path(), "actor")))) }
            dt { "Resource" } dd { (party(&event.resource, Some((Place::Events.path(), "resource")))) }
            @if let Some(tenant) = &event.tenant { dt { "Tenant" } dd { (of_tenant(Place::Events, tenant)) } }
            @if let Some(description) = &event.description { dt { "Description" } dd { (text(description)) } }
            @if let Some(timestamp) = &event.timestamp {
                dt { "Its own time" }
                dd {
                    @match timestamp.parse().ok().and_then(|seconds| clock::sane(seconds, clock::now())) {
                        Some(at) => { (time(Time(at))) span.sub { "timestamp " (text(timestamp)) } },
                        None => { (text(timestamp)) },
                    }
                }
            }
            dt { "Message id" } dd.mono { a href=(by_id) { (text(&event.id)) } }
            dt { "Number" } dd { (event.number) }
            dt { "Size" } dd { (rounded_size(event.bytes)) }
        }
    }
}

fn went(to: &[Whereabouts]) -> Markup {
    if to.is_empty() {
        return html! { div.empty { p { "No subscriber was or is configured." } } };
    }
    html! {
        (table(
            "Where it went",
            &[Text("Subscriber"), Text("State"), Text("When"), Text("Last attempt"), Text("Batch")],
            html! { @for one in to { (went_to(one)) } },
        ))
    }
}

fn went_to(one: &Whereabouts) -> Markup {
    let reason = one.reason.as_deref().map(|reason| reason.replace('_', " ")).or(one.why.clone());
    let patterns = one.patterns.as_ref().map(|patterns| match patterns.as_slice() {
        [] => "it was not configured then".to_owned(),
        patterns => format!("its patterns: {}", text(&patterns.join(", "))),
    });
    let tenant =
        one.tenant.as_ref().map(|tenant| format!("it gets those of the tenant {}", text(tenant)));
    let paused =
        one.subscriber_paused.as_ref().map(|pause| format!("paused: {}", text(&pause.why)));
    html! {
        tr {
            th scope="row" {
                (text(&one.subscriber))
                @if !one.configured { span.sub { "not configured today" } }
            }
            td.wide {
                (state(Tone::of_state(&one.state), &one.state))
                @for more in [reason, tenant, patterns, paused].into_iter().flatten() { span.sub { (short(&more)) } }
            }
            td {
                @match (one.delivered_at, one.next_attempt_at) {
                    (Some(at), _) => (time(at)),
                    (None, Some(at)) => { "next " (time(at)) },
                    (None, None) => {},
                }
            }
            td { (last_attempt(one.attempt, one.status, one.failure.as_deref())) }
            td.mono.id {
                @if let Some(batch) = &one.batch { a href=(delivery(batch)) { (text(batch)) } }
                @if one.batches.len() > 1 { span.sub { "and " (number(one.batches.len() as u64 - 1)) " more" } }
            }
        }
    }
}

/// The number of an attempt with its answer or its failure.
fn last_attempt(attempt: Option<u32>, status: Option<u16>, failure: Option<&str>) -> Markup {
    html! {
        @if let Some(n) = attempt { "#" (n) " " }
        @match (status, failure) {
            (Some(status), _) => (status),
            (None, Some(failure)) => (text(failure)),
            (None, None) => {},
        }
    }
}

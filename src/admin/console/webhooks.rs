//! *Webhooks*: the subscribers, and one of them with its configuration and its actions.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::{Duration, SystemTime},
};

use axum::{Router, extract::State, http::Uri, response::Response, routing::get};
use maud::{Markup, html};
use tokio::time::timeout;

use super::{
    actions, chart, deliveries,
    entry::{Console, SignedIn, This},
    form::Form,
    overview::state_of,
    page::{
        Mistakes, Page, Place, delivery, form_key, number, of_tenant, path_to, query, short, text,
        time,
    },
    session::Session,
    table::{
        Column::{self, Number, Text},
        table,
    },
    webhook_form,
};
use crate::{
    admin::{
        answer::Refusal,
        control::Which,
        history::Deliveries,
        query::Name,
        view::{
            DeliveryList, Origin, State as SubscriberState, Subscriber, WaitingBatch, WaitingList,
            words,
        },
    },
    config::{self, Subscriber as Configured},
    policy::retry::Next,
    queue::Queue,
    store::Store,
    telemetry::status::LastHour,
    wording::{counted, rounded, rounded_size},
};

/// Rows of a page of webhooks.
const ROWS: usize = 100;

/// Rows of the last deliveries, and of the batches that wait.
const SHOWN: usize = 10;

/// The longest time for which a page waits for the queue, or for the files of the configuration.
const PATIENCE: Duration = Duration::from_secs(5);

/// Attempts of the schedule that are shown of a longer one.
const ATTEMPTS: usize = 16;

/// Keys that only the role `admin` sees.
const OF_ADMIN: [&str; 2] = ["headers", "auth"];

pub(super) fn routes<Q: Queue, S: Store>() -> Router<Arc<Console<Q, S>>> {
    Router::new()
        .route(Place::Webhooks.path(), get(list::<Q, S>))
        .route("/console/webhooks/{name}", get(show::<Q, S>))
}

fn page<'a>(session: &'a Session, title: &str) -> Page<'a> {
    Page { session, place: Place::Webhooks, title: text(title), refresh: None }
}

async fn list<Q: Queue, S: Store>(
    State(console): This<Q, S>,
    SignedIn(session): SignedIn,
    uri: Uri,
) -> Response {
    let form = Form::of(uri.query().unwrap_or_default());
    let (which, refusal) = match form.read::<Which>() {
        Ok(which) => (which, None),
        Err(refusal) => (Which::default(), Some(refusal)),
    };
    let found = console.control.selected(&which.at_most(ROWS)).await;
    let tenants = console.control.has_tenants();
    let all = console.control.configured();
    let all: HashMap<&str, &Configured> = all.iter().map(|s| (s.name.as_str(), &**s)).collect();
    let manages = console.control.manages();
    let page = Page { refresh: Some(5), ..page(&session, "Webhooks") };
    page.answer(html! {
        (console.notices.of(&session, uri.query()).unwrap_or_default())
        div.head {
            h1 { "Webhooks" }
            @if session.caller.may_change() && manages { div.deeds { a.button.first href=(webhook_form::NEW) { "New webhook" } } }
        }
        div id="webhooks" data-live {
            section.card {
                @if form.is_filled() || found.next.is_some() || tenants { (filters(&form, &Mistakes(refusal.as_ref()), tenants)) }
                @if refusal.is_some() {
                } @else if found.subscribers.is_empty() {
                    div.empty { p { @if form.is_filled() { "No webhook fits." } @else { "No subscriber is configured." } } }
                } @else {
                    (table("Webhooks", &columns(tenants), html! {
                        @for s in &found.subscribers { (row(&session, s, all.get(s.subscriber.as_str()).copied(), &console.control.last_hour(&s.subscriber), tenants)) }
                    }))
                }
                @if !form.get("after").is_empty() || found.next.is_some() {
                    div.pager {
                        @if !form.get("after").is_empty() { a href=(form.clone().without("after").link(Place::Webhooks.path(), None)) { "First" } }
                        @if let Some(next) = &found.next { a rel="next" href=(form.clone().with("after", next.clone()).link(Place::Webhooks.path(), None)) { "Next" } }
                    }
                }
            }
        }
        p.below.muted.small {
            "Webhooks are made in " code { (text(&found.config.file)) } " (" code { "hooktrail reload" } " uses a change)"
            @if manages { ", here, and over the API." } @else { ". To make them here too: " code { "manage = true" } " in " code { "[admin]" } ", and a restart." }
        }
    })
}

fn columns(tenants: bool) -> Vec<Column> {
    let mut columns = vec![Text("Webhook"), Text("State"), Text("Last hour"), Text("Events")];
    if tenants {
        columns.push(Text("Tenant"));
    }
    columns.push(Text("Format"));
    columns
}

fn filters(form: &Form, mistakes: &Mistakes<'_>, tenants: bool) -> Markup {
    const SHOWN: [&str; 3] = ["tenant", "state", "after"];
    html! {
        form.filters method="get" action=(Place::Webhooks.path()) role="search" {
            @if tenants {
                div.field {
                    label for="tenant" { "Tenant" }
                    input id="tenant" name="tenant" value=(form.get("tenant")) placeholder="whole, with its case"
                        aria-invalid=[mistakes.is_wrong("tenant")] aria-describedby=[mistakes.described_by("tenant")];
                    (mistakes.beside("tenant"))
                }
            }
            div.field {
                label for="state" { "State" }
                select id="state" name="state" aria-invalid=[mistakes.is_wrong("state")] aria-describedby=[mistakes.described_by("state")] {
                    option value="" { "any" }
                    @for state in SubscriberState::KNOWN { option value=(state.name()) selected[form.get("state") == state.name()] { (state.name().replace('_', " ")) } }
                }
                (mistakes.beside("state"))
            }
            div.deeds {
                button.first { "Filter" }
                @if form.is_filled() { a.button href=(Place::Webhooks.path()) { "Clear" } }
            }
            (mistakes.of_others(&SHOWN))
            (form.others(&SHOWN))
        }
    }
}

fn row(
    session: &Session,
    s: &Subscriber,
    configured: Option<&Configured>,
    hour: &LastHour,
    tenants: bool,
) -> Markup {
    html! {
        tr {
            th scope="row" {
                a href=(path_to(Place::Webhooks.path(), &s.subscriber)) { (text(&s.subscriber)) }
                @if let Some(configured) = configured { span.sub { (url(session, configured)) } }
            }
            td.wide { (state_of(s)) }
            td { (chart::spark(hour)) }
            td.wide.mono { @if let Some(configured) = configured { (patterns(configured)) } }
            @if tenants { td.wide { @match &s.tenant { Some(tenant) => (of_tenant(Place::Webhooks, tenant)), None => span.muted { "all" } } } }
            td { @if let Some(configured) = configured { (configured.format.name()) } }
        }
    }
}

/// The URL as far as the caller may see it.
fn url(session: &Session, configured: &Configured) -> String {
    if session.caller.sees_endpoints() {
        return text(&configured.url.with_path());
    }
    text(&configured.url.to_string())
}

fn patterns(configured: &Configured) -> String {
    let all: Vec<&str> = configured.events.iter().map(|p| p.as_str()).collect();
    short(&all.join(", "))
}

async fn show<Q: Queue, S: Store>(
    State(console): This<Q, S>,
    SignedIn(session): SignedIn,
    name: Result<Name, Refusal>,
    uri: Uri,
) -> Response {
    let found = match name {
        Ok(Name(name)) => {
            let control = &console.control;
            match (control.subscriber(&name), control.one(&name).await) {
                (Ok(configured), Ok(found)) => Ok((configured, found)),
                (Err(refusal), _) | (_, Err(refusal)) => Err(refusal),
            }
        }
        Err(refusal) => Err(refusal),
    };
    let (configured, found) = match found {
        Ok(found) => found,
        Err(refusal) => return page(&session, "Webhook").refused(&refusal),
    };
    let name = found.subscriber.clone();
    let last = console.history.deliveries(Deliveries::latest(&name, SHOWN), &session.caller).await;
    let waits = found.lane.as_ref().and_then(|lane| lane.in_retry) != Some(0);
    let is_asked = Form::of(uri.query().unwrap_or_default()).get("retries") == "show";
    let waiting = match waits && is_asked {
        true => Some(waiting(&console, &name).await),
        false => None,
    };
    let origins = match console.control.origins_of_api(&configured, &found) {
        None => origins(&console, &name).await,
        of_api => of_api,
    };
    page(&session, &name).answer(html! {
        (console.notices.of(&session, uri.query()).unwrap_or_default())
        div.head { h1 { (text(&name)) } (deeds(&session, &found, console.control.manages())) }
        section.card.pad aria-label="State" { (facts(&session, &found, &configured)) }
        h2 { "Last hour" }
        (last_hour(&console.control.last_hour(&name)))
        @if waits { h2 { "Retries" } (retries(&name, waiting.as_ref())) }
        h2 { "Last deliveries" }
        (last_deliveries(&name, &last))
        h2 { "When a batch that fails is tried again" }
        (schedule(&configured))
        h2 { "Configuration" }
        (configuration(&session, &configured, origins.as_ref(), is_of_api(&found)))
        (actions::same(&commands(&session, &found)))
    })
}

/// The batches that wait. The read goes on without a page that waits no longer.
async fn waiting<Q: Queue, S: Store>(
    console: &Console<Q, S>,
    name: &str,
) -> Result<WaitingList, Refusal> {
    let reading = console.control.clone().waiting(name.to_owned(), SHOWN);
    let late = |_| {
        let why = format!(
            "the queue did not answer within {} s; `hooktrail retry list {name}` waits longer",
            PATIENCE.as_secs()
        );
        Refusal::unavailable(why)
    };
    timeout(PATIENCE, reading).await.map_err(late)?
}

/// The places of the values; `None` if the files could not be read in time.
async fn origins<Q: Queue, S: Store>(
    console: &Console<Q, S>,
    name: &str,
) -> Option<BTreeMap<&'static str, String>> {
    let (file, name) = (console.control.file(), name.to_owned());
    let reading = tokio::task::spawn_blocking(move || config::origins(&file, &name));
    timeout(PATIENCE, reading).await.ok()?.ok()
}

/// The commands that show the same, and those that do what a button does without a page of its own.
fn commands(session: &Session, found: &Subscriber) -> String {
    let name = &found.subscriber;
    // `check` and `plan` read the files.
    let shows = ["status", "check", "plan"].into_iter().take(if is_of_api(found) { 1 } else { 3 });
    let all = shows.chain(session.caller.may_change().then_some("test"));
    all.map(|command| format!("hooktrail {command} {name}")).collect::<Vec<_>>().join("\n")
}

fn configuration(
    session: &Session,
    configured: &Configured,
    origins: Option<&BTreeMap<&'static str, String>>,
    is_of_api: bool,
) -> Markup {
    html! {
        section.card {
            (table("Configuration", &[Text("Key"), Text("Value"), Text("From")], html! {
                @for (key, value) in config::subscriber_values(configured) {
                    @if session.caller.sees_endpoints() || !OF_ADMIN.contains(&key) {
                        tr {
                            th.mono scope="row" { (key) }
                            td.wide.mono { (short(&if key == "url" { url(session, configured) } else { value })) }
                            td {
                                @match origins.map(|origins| origins.get(key)) {
                                    Some(Some(place)) => (text(place)),
                                    Some(None) if is_of_api => span.muted { "the daemon's file, or default" },
                                    Some(None) => span.muted { "default" },
                                    None => span.muted { "unknown: the files were not read in time" },
                                }
                            }
                        }
                    }
                }
            }))
        }
    }
}

fn is_of_api(s: &Subscriber) -> bool {
    matches!(s.origin, Some(Origin::Api { .. }))
}

/// The actions, for who may do them.
fn deeds(session: &Session, s: &Subscriber, manages: bool) -> Markup {
    let name = s.subscriber.as_str();
    let action = |action: &str, label: &str| actions::link(&actions::path(name, action), label);
    html! {
        @if session.caller.may_change() {
            div.deeds {
                form method="post" action=(actions::path(name, "test")) { (form_key(session)) button { "Run Test" } }
                @if s.paused().is_some() { (action("resume", "Resume")) } @else { (action("pause", "Pause")) }
                (action("retry", "Retry now"))
                (action("replay", "Replay"))
                @if manages && is_of_api(s) { (action("edit", "Edit")) (action("secret", "New secret")) (action("remove", "Remove")) }
            }
        }
    }
}

fn facts(session: &Session, s: &Subscriber, configured: &Configured) -> Markup {
    let name = s.subscriber.as_str();
    let retrying = query(Place::Deliveries.path(), &[("subscriber", name), ("state", "retrying")]);
    html! {
        dl.facts {
            dt { "State" } dd { (state_of(s)) }
            dt { "URL" } dd.mono { (url(session, configured)) }
            dt { "Events" } dd.mono { (patterns(configured)) }
            @if let Some(tenant) = &s.tenant { dt { "Tenant" } dd { (of_tenant(Place::Webhooks, tenant)) } }
            @if let Some(lane) = &s.lane {
                @if let Some(backlog) = lane.backlog { dt { "Backlog" } dd { (counted(backlog + lane.in_hand, "event(s)")) } }
                @if let Some(age) = lane.oldest_event_age_s { dt { "Oldest undelivered" } dd { (words::seconds(age)) " old" } }
                @if let Some(n) = lane.in_retry { dt { "Retrying" } dd { a href=(retrying) { (counted(n, "batch(es)")) } @if let Some(at) = lane.next_retry_at { ", next " (time(at)) } } }
                @if let Some(n) = lane.dead { dt { "Dead letters" } dd { a href=(path_to(Place::DeadLetters.path(), name)) { (number(n)) } } }
                dt { "Delivered" } dd { (counted(lane.delivered, "event(s)")) " since the daemon started" @if let Some(at) = lane.last_delivered_at { ", last " (time(at)) } }
                @if let (Some(p50), Some(p99)) = (lane.p50_s, lane.p99_s) { dt { "Answers take" } dd { (words::took(p50)) " (median), " (words::took(p99)) " (99 of 100)" } }
                @if lane.compression_refused { dt { "Compression" } dd { "Refused: its receiver answered 415 to gzip. Requests are sent plain until the next reload." } }
                @if let Some(error) = &lane.last_error { dt { "Last failure" } dd { (short(&words::failure(error))) ", " (time(error.at)) } }
            }
        }
    }
}

/// The last hour as a picture and as a table.
fn last_hour(hour: &LastHour) -> Markup {
    let minutes = || (0_u64..60).rev().zip(hour.delivered.iter().zip(&hour.failed));
    let busy = || minutes().filter(|(_, (delivered, failed))| **delivered + **failed > 0);
    html! {
        section.card.pad {
            p { (chart::spark(hour)) }
            p { (text(&chart::in_words(hour))) "." }
            @if busy().next().is_some() {
                details {
                    summary { "As a table" }
                    (table("Last hour", &[Number("Minutes ago"), Number("Delivered events"), Number("Events of failed attempts")], html! {
                        @for (ago, (delivered, failed)) in busy() { tr { td.number { (ago) } td.number { (number(*delivered)) } td.number { (number(*failed)) } } }
                    }))
                }
            }
            p.muted.small { "By this daemon, since it started." }
        }
    }
}

fn last_deliveries(name: &str, found: &Result<DeliveryList, Refusal>) -> Markup {
    html! {
        section.card {
            @match found {
                Err(refusal) => div.pad { p { (text(&refusal.why)) } },
                Ok(list) if list.deliveries.is_empty() => div.empty { p { "History has none." } },
                Ok(list) => {
                    (deliveries::batches(&list.deliveries))
                    div.pager { a href=(query(Place::Deliveries.path(), &[("subscriber", name)])) { "All deliveries" } }
                },
            }
        }
    }
}

/// The batches that wait, if they were asked for.
fn retries(name: &str, found: Option<&Result<WaitingList, Refusal>>) -> Markup {
    const COLUMNS: [Column; 6] = [
        Text("Due"),
        Number("Attempts"),
        Text("Last answer"),
        Number("Events"),
        Number("Size"),
        Text("Batch"),
    ];
    html! {
        section.card {
            @match found {
                None => div.pad {
                    p { a.button href=(query(&path_to(Place::Webhooks.path(), name), &[("retries", "show")])) { "Show the batches that wait" } }
                    p.muted.small { "With RabbitMQ this reads all delay queues, and holds the batches of all subscribers in them for a moment: one that is due meanwhile may be late by that." }
                },
                Some(Err(refusal)) => div.pad { p { (text(&refusal.why)) } },
                Some(Ok(list)) if list.batches.is_empty() => div.empty { p { "No batch waits for a retry." } },
                Some(Ok(list)) => {
                    (table("Retries", &COLUMNS, html! { @for one in &list.batches { (retry(one)) } }))
                    @if list.waiting > list.batches.len() {
                        div.pager { span.muted { "The first due of " (counted(list.waiting, "batch(es)")) "; " code { "hooktrail retry list" } " shows all." } }
                    }
                },
            }
        }
    }
}

fn retry(one: &WaitingBatch) -> Markup {
    html! {
        tr {
            td { @match one.due_at { Some(at) => (time(at)), None => span.muted { "unknown" } } }
            td.number { (number(one.attempts)) }
            td {
                @match (one.status, &one.failure) {
                    (Some(status), _) => (status),
                    (None, Some(failure)) => (text(&failure.replace('_', " "))),
                    (None, None) => {},
                }
            }
            td.number { (number(one.events)) }
            td.number { (rounded_size(one.bytes as u64)) }
            td.mono.id {
                // Without an attempt there is no delivery to look at.
                @if one.attempts > 0 { a href=(delivery(&one.id)) { (text(&one.id)) } } @else { (text(&one.id)) }
            }
        }
    }
}

/// The attempts of a batch that always fails, as a picture and as a table.
fn schedule(configured: &Configured) -> Markup {
    let (attempts, is_whole) = attempts(configured);
    let options = configured.retry.options();
    html! {
        section.card.pad {
            div.scroll role="region" aria-label="Schedule" tabindex="0" { (chart::schedule(&attempts, is_whole)) }
            details {
                summary { "As a table" }
                (table("Attempts", &[Number("Attempt"), Number("Since the first")], html! {
                    @for (n, at) in (1_u64..).zip(&attempts) { tr { td.number { (n) } td.number { (rounded(*at)) } } }
                }))
            }
            p.muted.small {
                @if !is_whole { "It goes on beyond these. " }
                @if options.randomization_factor > 0.0 { "Each delay differs by up to " (format!("{:.0}", options.randomization_factor * 100.0)) " %, at random. " }
                code { "hooktrail plan " (text(configured.name.as_str())) } " has all of it."
            }
        }
    }
}

/// The times of the attempts since the first, and whether these are all.
fn attempts(configured: &Configured) -> (Vec<Duration>, bool) {
    const FIRST: SystemTime = SystemTime::UNIX_EPOCH;
    let (mut at, mut all) = (Duration::ZERO, vec![Duration::ZERO]);
    while all.len() < ATTEMPTS {
        let made = u32::try_from(all.len()).unwrap_or(u32::MAX);
        match configured.retry.next(made, FIRST, FIRST + at, None, 0.5) {
            Next::Exhausted => return (all, true),
            Next::After(delay) => at += delay,
        }
        all.push(at);
    }
    let made = u32::try_from(all.len()).unwrap_or(u32::MAX);
    let is_last = configured.retry.next(made, FIRST, FIRST + at, None, 0.5) == Next::Exhausted;
    (all, is_last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_that_waits_leads_to_its_delivery_once_there_was_an_attempt() {
        let shown = |attempts| {
            let (status, failure, due_at) = (None, None, None);
            let (first_attempt_at, last_attempt_at) = (None, None);
            let id = "msg_1".to_owned();
            let (number, events, bytes) = (1, 1, 1);
            retry(&WaitingBatch {
                number,
                id,
                events,
                attempts,
                status,
                failure,
                first_attempt_at,
                last_attempt_at,
                due_at,
                bytes,
            })
            .into_string()
        };
        assert!(shown(1).contains("href=\"/console/deliveries/msg_1\""));
        assert!(!shown(0).contains("href") && shown(0).contains("msg_1"));
    }
}

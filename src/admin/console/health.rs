//! *Health*: what can go wrong with its remedy, and how the daemon, its store and history are.

use std::{path::PathBuf, sync::Arc, time::Duration};

use axum::{
    Router,
    body::Body,
    extract::State,
    http::HeaderMap,
    response::{IntoResponse as _, Redirect, Response},
    routing::{get, post},
};
use maud::{Markup, html};

use super::{
    actions,
    entry::{Console, SignedIn, This, changing, not_taken},
    overview::tone,
    page::{Page, Place, Tone, form_key, state, text, time},
    session::Session,
    table::{Column::Text, table},
};
use crate::{
    admin::{
        control::inspection::{INSPECT_EVERY, Inspected},
        view::{HistoryHealth, Overview, Subscriber, Time, words},
    },
    queue::Queue,
    store::Store,
    telemetry::finding::{Finding, Severity},
    wording::{counted, rounded, rounded_size},
};

/// Where an inspection is asked for.
const INSPECT: &str = "/console/health/inspect";

pub(super) fn routes<Q: Queue, S: Store>() -> Router<Arc<Console<Q, S>>> {
    Router::new()
        .route(Place::Health.path(), get(show::<Q, S>))
        .route(INSPECT, post(inspect::<Q, S>).get(lead_back))
}

/// The process, as it is now.
struct Process {
    config: PathBuf,
    uptime: Duration,
    /// Bytes; `None` where the system does not say.
    memory: Option<u64>,
}

async fn show<Q: Queue, S: Store>(
    State(console): This<Q, S>,
    SignedIn(session): SignedIn,
) -> Response {
    let found = console.control.overview().await;
    let process = Process {
        config: console.control.file(),
        uptime: console.control.uptime(),
        memory: crate::telemetry::metrics::resident_bytes(),
    };
    page(&session, &found, &process, console.control.inspected().as_deref())
}

/// Inspects, if it is time, and leads to the result: a page that is loaded again connects to nobody.
async fn inspect<Q: Queue, S: Store>(
    State(console): This<Q, S>,
    SignedIn(session): SignedIn,
    headers: HeaderMap,
    body: Body,
) -> Response {
    if let Err(refusal) = changing(&console.tokens, &session, &headers, body).await {
        return not_taken(&refusal);
    }
    match console.control.inspect().await {
        Ok(()) => lead_back().await,
        Err(refusal) => health(&session).refused(&refusal),
    }
}

async fn lead_back() -> Response {
    Redirect::to(Place::Health.path()).into_response()
}

fn health(session: &Session) -> Page<'_> {
    Page { session, place: Place::Health, title: "Health".to_owned(), refresh: None }
}

fn page(
    session: &Session,
    found: &Overview,
    process: &Process,
    inspected: Option<&Inspected>,
) -> Response {
    health(session).answer(html! {
        div.head {
            h1 { "Health" }
            div.deeds {
                form method="post" action=(INSPECT) { (form_key(session)) button { "Inspect queue and endpoints" } }
            }
        }
        section.card.pad aria-label="Daemon" { (daemon(found, process)) }
        @if let Some(history) = &found.history { h2 { "History" } section.card.pad aria-label="History" { (remembered(history)) } }
        h2 { "What can go wrong" }
        section.card {
            @match inspected {
                None => div.empty {
                    p { "Not inspected since the daemon started." }
                    p { "An inspection asks the queue, and connects to each endpoint without a request to it. Where requests need a token, it fetches one." }
                },
                Some(inspected) => {
                    (table("Findings", &[Text("Severity"), Text("About"), Text("Found")], html! {
                        // The worst is last in the list of `check`, where it is read first.
                        @for finding in inspected.findings.iter().rev() { (row(finding)) }
                    }))
                    div.pager { span.muted { "Inspected at " (time(Time(inspected.at))) "; another one is made after " (rounded(INSPECT_EVERY)) " at the earliest." } }
                },
            }
        }
        (actions::same("hooktrail check --connect"))
    })
}

fn row(finding: &Finding) -> Markup {
    let tone = match finding.severity {
        Severity::Ok => Tone::Good,
        Severity::Note => Tone::Quiet,
        Severity::Warning => Tone::Warn,
        Severity::Harmful => Tone::Bad,
    };
    html! {
        tr {
            td { (state(tone, finding.severity.name())) }
            td.wide { (text(&finding.names())) }
            td.main {
                (text(&finding.found))
                @if let Some(risk) = &finding.risk { span.sub { "Risk: " (text(risk)) } }
                @if let Some(remedy) = &finding.remedy { span.sub { "Remedy: " (text(remedy)) } }
            }
        }
    }
}

fn daemon(found: &Overview, process: &Process) -> Markup {
    html! {
        dl.facts {
            dt { "Version" } dd { (text(&found.version)) }
            dt { "Phase" } dd { (text(&found.phase)) ", for " (rounded(process.uptime)) }
            @if let Some(memory) = process.memory { dt { "Memory" } dd { (rounded_size(memory)) } }
            dt { "Configuration" } dd.mono { (text(&process.config.display().to_string())) }
            dt { "Queue" } dd {
                (state(if found.queue.up { Tone::Good } else { Tone::Bad }, if found.queue.up { "up" } else { "away" }))
                @if let Some(why) = &found.queue.error { span.sub { (text(why)) } }
            }
            dt { "Webhooks" } dd { (states(&found.subscribers)) span.sub { a href=(Place::Overview.path()) { "Overview" } } }
            @if let Some(n) = found.queue.delayed_retries { dt { "Delayed retries" } dd { (n) } }
            @if let Some(n) = found.queue.orphans { dt { "Orphans" } dd { (n) @if n > 0 { span.sub { "dead letters of no subscriber: hooktrail dead list @log" } } } }
        }
    }
}

/// Subscribers by their states, and the batches that wait for an attempt.
fn states(of: &[Subscriber]) -> Markup {
    let mut counts: Vec<(String, Tone, u64)> = Vec::new();
    for s in of {
        let name = words::name(s);
        match counts.iter_mut().find(|(known, ..)| *known == name) {
            Some((.., n)) => *n += 1,
            None => counts.push((name, tone(&s.state), 1)),
        }
    }
    let retries: u64 =
        of.iter().filter_map(|s| s.lane.as_ref()).filter_map(|lane| lane.in_retry).sum();
    html! {
        @if of.is_empty() { span.muted { "none" } }
        @for (name, tone, n) in counts { (state(tone, &format!("{n} {name}"))) " " }
        @if retries > 0 { span.sub { (counted(retries, "batch(es) (waits|wait) for an attempt")) } }
    }
}

fn remembered(history: &HistoryHealth) -> Markup {
    let tone = match history.state.as_str() {
        "kept" => Tone::Good,
        "off" | "opening" => Tone::Quiet,
        _ => Tone::Warn,
    };
    html! {
        dl.facts {
            dt { "State" } dd {
                (state(tone, &history.state))
                @for why in [&history.why, &history.warning].into_iter().flatten() { span.sub { (text(why)) } }
            }
            @if let Some(bytes) = history.bytes { dt { "Size" } dd { (rounded_size(bytes)) } }
            @if let Some(from) = history.events_from { dt { "Events since" } dd { (time(from)) @if let Some(why) = &history.begins_there { span.sub { (text(why)) } } } }
            @if let Some(from) = history.deliveries_from { dt { "Deliveries since" } dd { (time(from)) } }
            @if let Some(last) = history.last_event_at { dt { "Last event" } dd { (time(last)) } }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::page::testing::{HOSTILE, is_inert},
        *,
    };

    #[test]
    fn what_an_inspection_found_is_inert() {
        let mut finding = Finding::ok(HOSTILE, HOSTILE);
        finding.risk = Some(HOSTILE.to_owned());
        finding.remedy = Some(HOSTILE.to_owned());
        is_inert(&row(&finding).into_string(), 4);
    }
}

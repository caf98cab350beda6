//! *Health*: what can go wrong with its remedy, and how the daemon, its store and history are.

use std::{path::PathBuf, sync::Arc, time::Duration};

use axum::{Router, extract::State, http::Uri, response::Response, routing::get};
use maud::{Markup, html};

use super::{
    actions,
    entry::{Console, SignedIn, This},
    form::Form,
    page::{Page, Place, Tone, query, state, text, time},
    session::Session,
    table::{Column::Text, table},
};
use crate::{
    admin::{
        answer::Refusal,
        view::{HistoryHealth, Overview},
    },
    queue::Queue,
    store::Store,
    telemetry::finding::{Finding, Severity},
    wording::{rounded, rounded_size},
};

pub(super) fn routes<Q: Queue, S: Store>() -> Router<Arc<Console<Q, S>>> {
    Router::new().route(Place::Health.path(), get(show::<Q, S>))
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
    uri: Uri,
) -> Response {
    let form = Form::of(uri.query().unwrap_or_default());
    // It connects to each endpoint, so it is done when somebody asks for it.
    let findings = match form.get("inspect") {
        "" => None,
        _ => Some(console.control.inspect().await),
    };
    let found = console.control.overview().await;
    let process = Process {
        config: console.control.file(),
        uptime: console.control.uptime(),
        memory: crate::telemetry::metrics::resident_bytes(),
    };
    page(&session, &found, &process, findings)
}

fn page(
    session: &Session,
    found: &Overview,
    process: &Process,
    findings: Option<Result<Vec<Finding>, Refusal>>,
) -> Response {
    let page = Page { session, place: Place::Health, title: "Health".to_owned(), refresh: None };
    let inspect = query(Place::Health.path(), &[("inspect", "now")]);
    page.answer(html! {
        div.head { h1 { "Health" } div.deeds { a.button href=(inspect) { "Inspect queue and endpoints" } } }
        @if let Some(findings) = findings {
            section.card {
                @match &findings {
                    Err(refusal) => div.pad { p { (text(&refusal.why)) } },
                    Ok(findings) => (table("Findings", &[Text("Severity"), Text("About"), Text("Found")], html! {
                        // The worst is last in the list of `check`, where it is read first.
                        @for finding in findings.iter().rev() { (row(finding)) }
                    })),
                }
            }
            div.head {}
        }
        section.card.pad aria-label="Daemon" { (daemon(found, process)) }
        @if let Some(history) = &found.history { h2 { "History" } section.card.pad aria-label="History" { (remembered(history)) } }
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
            @if let Some(n) = found.queue.delayed_retries { dt { "Delayed retries" } dd { (n) } }
            @if let Some(n) = found.queue.orphans { dt { "Orphans" } dd { (n) } }
        }
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

//! The form of a webhook: a new one, a change, a new secret, its removal. What it makes is a document
//! of the API, and what is wrong with it stands beside the field.

mod document;
mod preview;
mod sheet;

use std::sync::Arc;

use axum::{
    Router,
    extract::State,
    http::{StatusCode, Uri},
    response::Response,
    routing::{get, post},
};
use maud::{Markup, html};
use serde_json::Value;
use url::Url;

use self::{
    document::{VERSION, document, filled, patch},
    preview::Preview,
    sheet::Sheet,
};
use super::{
    actions::{self, good, not_done, waits},
    entry::{Console, MayChange, Posted, This},
    form::Form,
    notices::{draft_field, not_sent},
    page::{Page, Place, copy, form_key, number, path_to, text, time},
    session::Session,
};
use crate::{
    admin::{
        answer::Refusal,
        query::Name,
        subscribers::{Backlog, Draft},
        versions::Expected,
        view::{
            NewSecret, Origin, ProblemKind, RotateSecret, SubscriberChange, SubscriberDetails,
            Tested, Time,
        },
    },
    queue::Queue,
    store::Store,
};

/// The page of a new webhook. No webhook can have its address: each has a name of its own below
/// the list.
pub(super) const NEW: &str = "/console/new-webhook";

pub(super) fn routes<Q: Queue, S: Store>() -> Router<Arc<Console<Q, S>>> {
    Router::new()
        .route(NEW, get(ask_new::<Q, S>).post(add::<Q, S>))
        .route("/console/new-webhook/test", post(test_new::<Q, S>).get(ask_new::<Q, S>))
        .route("/console/webhooks/{name}/edit", get(ask_edit::<Q, S>).post(edit::<Q, S>))
        .route("/console/webhooks/{name}/edit/test", post(test_edit::<Q, S>).get(ask_edit::<Q, S>))
        .route("/console/new-webhook/preview", post(preview_new::<Q, S>).get(ask_new::<Q, S>))
        .route(
            "/console/webhooks/{name}/edit/preview",
            post(preview_edit::<Q, S>).get(ask_edit::<Q, S>),
        )
        .route("/console/webhooks/{name}/secret", get(ask_secret::<Q, S>).post(rotate::<Q, S>))
        .route("/console/webhooks/{name}/remove", get(ask_removal::<Q, S>).post(remove::<Q, S>))
}

async fn ask_new<Q: Queue, S: Store>(
    State(console): This<Q, S>,
    MayChange(session): MayChange,
    uri: Uri,
) -> Response {
    if let Err(refusal) = console.control.may_manage() {
        return not_done(&session, Place::Webhooks, &refusal, Place::Webhooks.path());
    }
    match console.drafts.form(&session, uri.query()) {
        Some(kept) => kept_sheet(&console, &session, None, &kept, None).await,
        None => sheet(&console, &session, None, &Form::default(), None).await,
    }
}

/// The page with a form whose session was over when it was sent.
async fn kept_sheet<Q: Queue, S: Store>(
    console: &Console<Q, S>,
    session: &Session,
    name: Option<&str>,
    form: &Form,
    refusal: Option<Refusal>,
) -> Response {
    let preview = Preview::of(console, draft(name, form)).await;
    let (came, tenants) = (refusal.map(Err), console.control.has_tenants());
    Sheet { session, name, form, came, is_kept: true, preview, tenants }.answer()
}

/// The page with a form, and with what came of it.
async fn sheet<Q: Queue, S: Store>(
    console: &Console<Q, S>,
    session: &Session,
    name: Option<&str>,
    form: &Form,
    came: Option<Result<Tested, Refusal>>,
) -> Response {
    let preview = Preview::of(console, draft(name, form)).await;
    let tenants = console.control.has_tenants();
    Sheet { session, name, form, came, is_kept: false, preview, tenants }.answer()
}

/// The webhook that a form describes.
fn draft(name: Option<&str>, form: &Form) -> Draft {
    match name {
        None => Draft::New(document(form)),
        Some(name) => Draft::Change(name.to_owned(), patch(form)),
    }
}

async fn add<Q: Queue, S: Store>(
    State(console): This<Q, S>,
    Posted { session, form }: Posted,
) -> Response {
    match console.control.add(&session.caller, document(&form)).await {
        Ok(change) => changed(&console, &session, &form, change, "The webhook is made."),
        Err(refusal) => sheet(&console, &session, None, &form, Some(Err(refusal))).await,
    }
}

async fn test_new<Q: Queue, S: Store>(
    State(console): This<Q, S>,
    Posted { session, form }: Posted,
) -> Response {
    tested(console, session, None, form).await
}

async fn test_edit<Q: Queue, S: Store>(
    State(console): This<Q, S>,
    name: Result<Name, Refusal>,
    Posted { session, form }: Posted,
) -> Response {
    let name = match name {
        Ok(Name(name)) => name,
        Err(refusal) => return no_such(&session, &refusal),
    };
    tested(console, session, Some(name), form).await
}

async fn preview_new<Q: Queue, S: Store>(
    State(console): This<Q, S>,
    Posted { session, form }: Posted,
) -> Response {
    sheet(&console, &session, None, &form, None).await
}

async fn preview_edit<Q: Queue, S: Store>(
    State(console): This<Q, S>,
    name: Result<Name, Refusal>,
    Posted { session, form }: Posted,
) -> Response {
    match name {
        Ok(Name(name)) => sheet(&console, &session, Some(&name), &form, None).await,
        Err(refusal) => no_such(&session, &refusal),
    }
}

async fn tested<Q: Queue, S: Store>(
    console: Arc<Console<Q, S>>,
    session: Session,
    name: Option<String>,
    form: Form,
) -> Response {
    let ending = console.clone();
    // The browser may leave in the middle: what was sent is recorded.
    let work = async move {
        let came = console.control.test_draft(draft(name.as_deref(), &form)).await;
        if let Ok(tested) = &came {
            // An endpoint that was typed need not be the stored one.
            let to = tested.url.parse::<Url>().map(|url| url.origin().ascii_serialization());
            let details = format!("not saved, to {}", to.unwrap_or_default());
            console.record(&session, "test", tested.subscriber.clone(), details);
        }
        sheet(&console, &session, name.as_deref(), &form, Some(came)).await
    };
    ending.to_its_end(work).await
}

/// A webhook that was made over the API, its document and its version.
async fn known<Q: Queue, S: Store>(
    console: &Console<Q, S>,
    session: &Session,
    name: Result<Name, Refusal>,
) -> Result<(SubscriberDetails, Value, String), Refusal> {
    console.control.may_manage()?;
    let found = console.control.details(&name?.0, &session.caller).await?;
    let version = match &found.status.origin {
        Some(Origin::Api { version, .. }) => version.clone(),
        other => {
            let place = other.as_ref().map_or("a file".to_owned(), ToString::to_string);
            let why = format!("it is configured in {place}; change it there");
            return Err(Refusal::of_kind(StatusCode::CONFLICT, ProblemKind::Exists, why));
        }
    };
    let document = found.document.clone().unwrap_or_default();
    Ok((found, document, version))
}

fn no_such(session: &Session, refusal: &Refusal) -> Response {
    not_done(session, Place::Webhooks, refusal, Place::Webhooks.path())
}

async fn ask_edit<Q: Queue, S: Store>(
    State(console): This<Q, S>,
    MayChange(session): MayChange,
    name: Result<Name, Refusal>,
    uri: Uri,
) -> Response {
    let kept = console.drafts.form(&session, uri.query());
    let asked = name.as_ref().ok().map(|Name(name)| name.clone());
    match (known(&console, &session, name).await, kept, asked) {
        (Ok((found, ..)), Some(kept), _) => {
            kept_sheet(&console, &session, Some(&found.status.subscriber), &kept, None).await
        }
        (Ok((found, document, version)), None, _) => {
            let form = filled(&document, &version);
            sheet(&console, &session, Some(&found.status.subscriber), &form, None).await
        }
        // It was removed meanwhile: what was typed is not lost with it.
        (Err(refusal), Some(kept), Some(name)) if refusal.kind == ProblemKind::Subscriber => {
            kept_sheet(&console, &session, Some(&name), &kept, Some(refusal)).await
        }
        (Err(refusal), ..) => no_such(&session, &refusal),
    }
}

/// The version that a form names: no other is changed.
fn expected(form: &Form) -> Expected {
    Expected::OneOf(form.get(VERSION).parse().into_iter().collect())
}

async fn edit<Q: Queue, S: Store>(
    State(console): This<Q, S>,
    name: Result<Name, Refusal>,
    Posted { session, form }: Posted,
) -> Response {
    let name = match name {
        Ok(Name(name)) => name,
        Err(refusal) => return no_such(&session, &refusal),
    };
    let caller = &session.caller;
    match console.control.patch(caller, &name, expected(&form), patch(&form)).await {
        Ok(change) => changed(&console, &session, &form, change, "Saved."),
        Err(refusal) => sheet(&console, &session, Some(&name), &form, Some(Err(refusal))).await,
    }
}

/// What was made or changed. Its secret stands in this answer alone.
fn changed<Q: Queue, S: Store>(
    console: &Console<Q, S>,
    session: &Session,
    form: &Form,
    change: SubscriberChange,
    said: &str,
) -> Response {
    console.drafts.done(session, form);
    let SubscriberChange { subscriber, bound, secret, overlap_until, why, .. } = change;
    let to = path_to(Place::Webhooks.path(), &subscriber);
    let notice = html! {
        (good(html! { (said) @if bound { " Its events are taken from now on." } }))
        @if !bound {
            div.note.warn role="status" { p { "Its queue does not get its events yet; that is tried until it does. " @if let Some(why) = &why { (text(why)) } } }
        }
    };
    match secret {
        None => console.lead_unrecorded(session, &to, notice),
        Some(secret) => told_once(session, &subscriber, &to, notice, &secret, overlap_until),
    }
}

fn told_once(
    session: &Session,
    name: &str,
    to: &str,
    notice: Markup,
    secret: &NewSecret,
    overlap_until: Option<Time>,
) -> Response {
    let page = Page { session, place: Place::Webhooks, title: text(name), refresh: None };
    page.answer(html! {
        div.head { h1 { (text(name)) } }
        (notice)
        section.card.pad {
            h2 { "Its signing secret" }
            p { strong { "Copy it now: it is not shown again." } " The receiver verifies each request with it." }
            pre id="secret" role="group" tabindex="0" aria-label="Signing secret" { (secret.expose()) }
            p { (copy("secret")) }
            @if let Some(until) = overlap_until { p { "The secret before it signs too, until " (time(until)) ". Give the receiver the new one by then." } }
            p { a.button href=(to) { "To the webhook" } }
        }
    })
}

async fn ask_secret<Q: Queue, S: Store>(
    State(console): This<Q, S>,
    MayChange(session): MayChange,
    name: Result<Name, Refusal>,
    uri: Uri,
) -> Response {
    let kept = console.drafts.form(&session, uri.query());
    let overlap = kept.as_ref().map_or("24h", |kept| kept.get("overlap")).to_owned();
    let found = match known(&console, &session, name).await {
        Ok((found, ..)) => found,
        Err(refusal) => return no_such(&session, &refusal),
    };
    let name = found.status.subscriber.as_str();
    asks(
        &session,
        &format!("New secret for {name}"),
        name,
        "secret",
        html! {
            @if kept.is_some() { (not_sent("")) }
            p { "A new signing secret is made, and shown once. The one in use signs too until the overlap is over, so a receiver that knows either accepts a request." }
            p.muted.small { "Schemes with room for one signature carry that of the new secret." }
        },
        html! {
            (draft_field(&kept.unwrap_or_default()))
            div.field {
                label for="overlap" { "Overlap" }
                input id="overlap" name="overlap" value=(overlap) autocomplete="off";
                span.hint { "Such as 24h or 7days; 0s ends the old secret at once. At most 30days." }
            }
        },
        "Make a new secret",
    )
}

async fn rotate<Q: Queue, S: Store>(
    State(console): This<Q, S>,
    name: Result<Name, Refusal>,
    Posted { session, form }: Posted,
) -> Response {
    let work = async {
        let overlap = Some(form.get("overlap").trim().to_owned()).filter(|text| !text.is_empty());
        let Name(name) = name?;
        console.control.rotate_secret(&session.caller, &name, RotateSecret { overlap }).await
    };
    match work.await {
        Ok(change) => changed(&console, &session, &form, change, "The new secret signs."),
        Err(refusal) => no_such(&session, &refusal),
    }
}

async fn ask_removal<Q: Queue, S: Store>(
    State(console): This<Q, S>,
    MayChange(session): MayChange,
    name: Result<Name, Refusal>,
    uri: Uri,
) -> Response {
    let kept = console.drafts.form(&session, uri.query());
    let is_chosen =
        |backlog: &str| kept.as_ref().is_some_and(|kept| kept.get("backlog") == backlog);
    let (found, _, version) = match known(&console, &session, name).await {
        Ok(found) => found,
        Err(refusal) => return no_such(&session, &refusal),
    };
    let name = found.status.subscriber.as_str();
    let dead = found.status.lane.as_ref().and_then(|lane| lane.dead);
    asks(
        &session,
        &format!("Remove {name}"),
        name,
        "remove",
        html! {
            @if kept.is_some() { (not_sent("")) }
            p { "No event goes to " strong { (text(name)) } " any more. Now " (waits(&found.status)) " wait" @if let Some(dead) = dead { ", and it has " (number(dead)) " dead letters" } "." }
        },
        html! {
            (draft_field(kept.as_ref().unwrap_or(&Form::default())))
            // Not the draft's: this page says what the webhook is now.
            input type="hidden" name=(VERSION) value=(version);
            fieldset {
                legend { "What its queues hold" }
                div.check { input id="keep" name="backlog" type="radio" value="keep" required checked[is_chosen("keep")]; label for="keep" { "is kept, until " code { "hooktrail prune" } "; meanwhile no other webhook can have this name" } }
                div.check { input id="drop" name="backlog" type="radio" value="drop" checked[is_chosen("drop")]; label for="drop" { "is deleted: events, retries and dead letters" } }
            }
        },
        "Remove",
    )
}

async fn remove<Q: Queue, S: Store>(
    State(console): This<Q, S>,
    name: Result<Name, Refusal>,
    Posted { session, form }: Posted,
) -> Response {
    let work = async {
        let backlog = match form.get("backlog") {
            "keep" => Backlog::Keep,
            "drop" => Backlog::Drop,
            _ => Backlog::Unsaid,
        };
        console.control.remove(&session.caller, &name?.0, expected(&form), backlog).await
    };
    match work.await {
        Ok(removed) => {
            console.drafts.done(&session, &form);
            let backlog = match removed.backlog.as_str() {
                "dropped" => "What its queues held is deleted.",
                "dropping" => "What its queues hold is deleted as soon as they are free.",
                _ => "What its queues hold is kept.",
            };
            let name = text(&removed.subscriber);
            let notice = good(html! { (name) " is removed. " (backlog) });
            console.lead_unrecorded(&session, Place::Webhooks.path(), notice)
        }
        Err(refusal) => no_such(&session, &refusal),
    }
}

/// The page that asks before something is done to a webhook.
fn asks(
    session: &Session,
    title: &str,
    name: &str,
    action: &str,
    says: Markup,
    fields: Markup,
    button: &str,
) -> Response {
    let page = Page { session, place: Place::Webhooks, title: text(title), refresh: None };
    page.answer(html! {
        div.head { h1 { (text(title)) } }
        section.card.pad {
            (says)
            form.deed method="post" action=(actions::path(name, action)) {
                (form_key(session))
                (fields)
                div.deeds {
                    button.first { (button) }
                    a.button href=(path_to(Place::Webhooks.path(), name)) { "Back" }
                }
            }
        }
    })
}

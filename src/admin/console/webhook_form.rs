//! The form of a webhook: a new one, a change, a new secret, its removal. What it makes is a document
//! of the API, and what is wrong with it stands beside the field.

use std::{borrow::Cow, sync::Arc};

use axum::{
    Router,
    extract::State,
    http::StatusCode,
    response::Response,
    routing::{get, post},
};
use maud::{Markup, html};
use serde_json::{Value, json};
use url::Url;

use super::{
    actions::{self, good, not_done, report, waits},
    entry::{Console, MayChange, Posted, This},
    form::Form,
    page::{Mistakes, Page, Place, form_key, number, path_to, text, time},
    session::Session,
};
use crate::{
    admin::{
        answer::Refusal,
        query::Name,
        subscribers::{Backlog, Draft},
        versions::Expected,
        view::{
            FieldError, NewSecret, Origin, ProblemKind, RotateSecret, SubscriberChange,
            SubscriberDetails, Tested, Time,
        },
    },
    config::managed::Document,
    queue::Queue,
    store::Store,
};

/// The page of a new webhook. No webhook can have its address: each has a name of its own below
/// the list.
pub(super) const NEW: &str = "/console/new-webhook";

pub(super) fn routes<Q: Queue, S: Store>() -> Router<Arc<Console<Q, S>>> {
    Router::new()
        .route(NEW, get(ask_new::<Q, S>).post(add::<Q, S>))
        .route("/console/new-webhook/test", post(test_new::<Q, S>).get(to_new::<Q, S>))
        .route("/console/webhooks/{name}/edit", get(ask_edit::<Q, S>).post(edit::<Q, S>))
        .route("/console/webhooks/{name}/edit/test", post(test_edit::<Q, S>).get(ask_edit::<Q, S>))
        .route("/console/webhooks/{name}/secret", get(ask_secret::<Q, S>).post(rotate::<Q, S>))
        .route("/console/webhooks/{name}/remove", get(ask_removal::<Q, S>).post(remove::<Q, S>))
}

/// The fields of the form, with the keys of the document whose mistakes stand beside each.
const FIELDS: [(&str, &str); 8] = [
    ("name", "name"),
    ("url", "url"),
    ("format", "format"),
    ("events", "events"),
    ("signature", "signatures"),
    ("secret", "secrets"),
    ("description", "description"),
    ("start_paused", "start_paused"),
];

/// The field with the version that a form changes.
const VERSION: &str = "version";

/// The signature of requests: a value of the form, what people read, and the key of the document.
const SIGNATURES: [(&str, &str, &[&str]); 3] = [
    ("standard-webhooks", "Standard Webhooks", &["standard-webhooks"]),
    ("mailtrap", "Mailtrap", &["mailtrap"]),
    ("none", "None: receivers cannot tell who sent it", &[]),
];

/// The value of what the form has no choice for, and of what a preset sets: it is left alone.
const AS_IT_IS: &str = "as-it-is";

/// The document of a new webhook.
fn document(form: &Form) -> Document {
    let mut document = Document::default();
    for key in ["name", "url", "format", "description"] {
        let typed = form.get(key).trim();
        if !typed.is_empty() {
            document.set(key, typed.into());
        }
    }
    let patterns = patterns(form);
    if !patterns.is_empty() {
        document.set("events", patterns.into());
    }
    match signatures(form) {
        Some([scheme]) if *scheme == SIGNATURES[0].0 => {}
        Some(schemes) => document.set("signatures", json!(schemes)),
        None => {}
    }
    if !form.get("secret").trim().is_empty() {
        document.set("secrets", json!([form.get("secret").trim()]));
    }
    if form.get("start_paused") == "on" {
        document.set("start_paused", true.into());
    }
    document
}

/// The merge patch of a change: what the form has no field for stays as it is.
fn patch(form: &Form) -> Document {
    let mut patch = Document::default();
    let or_null = |text: &str| if text.is_empty() { Value::Null } else { text.into() };
    // A URL is not optional: an empty one is a mistake, not its removal.
    patch.set("url", form.get("url").trim().into());
    patch.set("description", or_null(form.get("description").trim()));
    if form.get("format") != AS_IT_IS {
        patch.set("format", or_null(form.get("format")));
    }
    let patterns = patterns(form);
    patch.set("events", if patterns.is_empty() { Value::Null } else { patterns.into() });
    if let Some(schemes) = signatures(form) {
        patch.set("signatures", json!(schemes));
    }
    if !form.get("secret").trim().is_empty() {
        patch.set("secrets", json!([form.get("secret").trim()]));
    }
    patch
}

fn patterns(form: &Form) -> Vec<String> {
    let apart = |c: char| c == ',' || c.is_whitespace();
    form.get("events").split(apart).filter(|p| !p.is_empty()).map(str::to_owned).collect()
}

fn signatures(form: &Form) -> Option<&'static [&'static str]> {
    let chosen = form.get("signature");
    SIGNATURES.iter().find(|(value, ..)| *value == chosen).map(|(.., schemes)| *schemes)
}

/// The form that shows a document.
fn filled(document: &Value, version: &str) -> Form {
    let text = |key: &str| document.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
    let events = document.get("events").and_then(Value::as_array);
    let events = events.into_iter().flatten().filter_map(Value::as_str).collect::<Vec<_>>();
    let of_preset = |or: &'static str| if document.get("preset").is_some() { AS_IT_IS } else { or };
    let format = document.get("format").and_then(Value::as_str).unwrap_or(of_preset("json"));
    let signature = match document.get("signatures") {
        None => of_preset(SIGNATURES[0].0),
        Some(given) => {
            let known = SIGNATURES.iter().find(|(.., schemes)| json!(schemes) == *given);
            known.map_or(AS_IT_IS, |(value, ..)| *value)
        }
    };
    Form::default()
        .with("url", text("url"))
        .with("format", format.to_owned())
        .with("events", events.join("\n"))
        .with("signature", signature.to_owned())
        .with("description", text("description"))
        .with(VERSION, version.to_owned())
}

/// A refusal whose fields are those of the form.
fn of_form(mut refusal: Refusal) -> Refusal {
    for wrong in &mut refusal.fields {
        let (key, rest) = match wrong.field.find(['[', '.']) {
            Some(at) => wrong.field.split_at(at),
            None => (wrong.field.as_str(), ""),
        };
        let Some((field, _)) = FIELDS.iter().find(|(_, of)| *of == key) else { continue };
        let index = rest.strip_prefix('[').and_then(|rest| rest.split_once(']'));
        let nth = index.and_then(|(n, _)| n.parse::<usize>().ok()).filter(|_| key == "events");
        if let Some(nth) = nth {
            wrong.detail = format!("pattern {}: {}", nth + 1, wrong.detail);
        }
        wrong.field = (*field).to_owned();
    }
    refusal
}

/// The page with the form.
struct Sheet<'a> {
    session: &'a Session,
    /// The webhook that is changed; `None` for a new one.
    name: Option<&'a str>,
    form: &'a Form,
    /// What came of the last request: a test, or why it was not done.
    came: Option<Result<Tested, Refusal>>,
}

impl Sheet<'_> {
    fn answer(self) -> Response {
        let Self { session, name, form, came } = self;
        let came = came.map(|came| came.map_err(of_form));
        let refusal = came.as_ref().and_then(|came| came.as_ref().err());
        let status = refusal.map_or(StatusCode::OK, |refusal| refusal.status);
        let title = name.map_or("New webhook".to_owned(), |name| format!("Edit {name}"));
        let to = name.map_or(NEW.to_owned(), |name| actions::path(name, "edit"));
        let back = name.map_or(Place::Webhooks.path().to_owned(), |name| {
            path_to(Place::Webhooks.path(), name)
        });
        let page = Page { session, place: Place::Webhooks, title: text(&title), refresh: None };
        page.answer_with(status, html! {
            div.head { h1 { (text(&title)) } }
            @if let Some(refusal) = refusal { (problem(refusal, name)) }
            div.sheet {
                section.card.pad aria-label="Configuration" {
                    form.deed id="webhook" method="post" action=(to) {
                        (form_key(session))
                        @if name.is_some() { input type="hidden" name=(VERSION) value=(form.get(VERSION)); }
                        (fields(form, name, &Mistakes(refusal)))
                        div.deeds {
                            button.first { "Save" }
                            a.button href=(back) { "Back" }
                        }
                    }
                }
                section.card.pad aria-labelledby="try" {
                    h2 id="try" { "Test your integration" }
                    p { "One event " code { "hooktrail.test" } " goes to the URL as it is in the form, nothing is saved. Here stands what was sent, byte for byte, and what came back." }
                    p.muted.small { "Without a secret in the form, " @if name.is_some() { "it is signed with the one in use." } @else { "it is signed with one made for the test." } }
                    div.deeds { button form="webhook" formaction=(format!("{to}/test")) { "Run Test" } }
                    @if let Some(Ok(tested)) = &came { (report(tested)) }
                }
            }
        })
    }
}

/// Why it was not done, with the mistakes that no field of the form has.
fn problem(refusal: &Refusal, name: Option<&str>) -> Markup {
    let is_of_form = |e: &&FieldError| FIELDS.iter().any(|(field, _)| *field == e.field);
    let (here, others): (Vec<_>, Vec<_>) = refusal.fields.iter().partition(is_of_form);
    html! {
        div.note.bad role="alert" {
            @match (refusal.kind, name) {
                (ProblemKind::Version, Some(name)) => {
                    p { strong { "Somebody else has changed it meanwhile." } " Nothing was overwritten, and what you typed is still below. "
                        a href=(actions::path(name, "edit")) { "Show how it is now" } "." }
                }
                _ if refusal.fields.is_empty() => p { (text(&refusal.why)) },
                _ => {
                    @if !here.is_empty() { p { "It was not taken: " (here.len()) (if here.len() == 1 { " field has" } else { " fields have" }) " a mistake, which is told there." } }
                    @for e in others { p { code { (text(&e.field)) } " " (text(&e.detail)) } }
                }
            }
        }
    }
}

fn fields(form: &Form, name: Option<&str>, mistakes: &Mistakes<'_>) -> Markup {
    let is_new = name.is_none();
    let chosen = |field: &str, value: &str| form.get(field) == value;
    html! {
        @if is_new {
            (line(form, mistakes, "name", "Name", "siem", "1 to 64 of a-z, 0-9 and -; it names the queues, and stays."))
        }
        @let has_password = matches!(without_password(form.get("url")), Cow::Owned(_));
        (line(form, mistakes, "url", "URL", "https://example.com/hooks", if has_password { "A password is not shown: type it again, behind the name." } else { "Each batch is POSTed there." }))
        div.field {
            label for="format" { "Payload format" }
            select id="format" name="format" aria-invalid=[mistakes.is_wrong("format")] aria-describedby=[mistakes.described_by("format")] {
                @if chosen("format", AS_IT_IS) { option value=(AS_IT_IS) selected { "As it is: from its preset" } }
                option value="json" selected[!chosen("format", AS_IT_IS) && !chosen("format", "jsonl")] { "JSON: {\"events\":[…]}" }
                option value="jsonl" selected[chosen("format", "jsonl")] { "JSON Lines: one event a line" }
            }
            (mistakes.beside("format"))
        }
        div.field {
            label for="events" { "Events" }
            textarea id="events" name="events" rows="3" spellcheck="false" placeholder="user.*" aria-invalid=[mistakes.is_wrong("events")] aria-describedby=[mistakes.described_by("events")] { "\n" (form.get("events")) }
            span.hint { "Patterns of types, one a line: * is one word, # any number of words. Empty: all events." }
            (mistakes.beside("events"))
        }
        div.field {
            label for="signature" { "Signature" }
            select id="signature" name="signature" aria-invalid=[mistakes.is_wrong("signature")] aria-describedby=[mistakes.described_by("signature")] {
                @if chosen("signature", AS_IT_IS) { option value=(AS_IT_IS) selected { "As it is: from its preset, or a header of its own" } }
                @for (value, label, _) in SIGNATURES { option value=(value) selected[chosen("signature", value)] { (label) } }
            }
            (mistakes.beside("signature"))
        }
        div.field {
            label for="secret" { "Signing secret" }
            // It is not shown again, also not to who has typed it.
            input id="secret" name="secret" type="password" autocomplete="new-password" aria-invalid=[mistakes.is_wrong("secret")] aria-describedby=[mistakes.described_by("secret")];
            span.hint { @if is_new { "Empty: one is made, and shown once." } @else { "Empty: the secret in use stays. One that is typed replaces it at once; " a href=(actions::path(name.unwrap_or_default(), "secret")) { "New secret" } " lets both sign for a while." } }
            (mistakes.beside("secret"))
        }
        (line(form, mistakes, "description", "Description", "", ""))
        @if is_new {
            div.check {
                input id="start_paused" name="start_paused" type="checkbox" checked[chosen("start_paused", "on")];
                label for="start_paused" { "Begin paused: events are kept from now on, and sent when it is resumed" }
            }
        }
    }
}

fn line(
    form: &Form,
    mistakes: &Mistakes<'_>,
    field: &str,
    label: &str,
    example: &str,
    hint: &str,
) -> Markup {
    html! {
        div.field {
            label for=(field) { (label) }
            input id=(field) name=(field) value=(without_password(form.get(field))) placeholder=(example) autocomplete="off" spellcheck="false"
                aria-invalid=[mistakes.is_wrong(field)] aria-describedby=[mistakes.described_by(field)];
            @if !hint.is_empty() && mistakes.is_wrong(field).is_none() { span.hint { (hint) } }
            (mistakes.beside(field))
        }
    }
}

/// What was typed, but for the password of a URL.
fn without_password(typed: &str) -> Cow<'_, str> {
    match typed.trim().parse::<Url>() {
        Ok(mut url) if url.password().is_some() => {
            // It has a host, or it would have no password.
            url.set_password(None).ok();
            url.to_string().into()
        }
        _ => typed.into(),
    }
}

async fn ask_new<Q: Queue, S: Store>(
    State(console): This<Q, S>,
    MayChange(session): MayChange,
) -> Response {
    if let Err(refusal) = console.control.may_manage() {
        return not_done(&session, Place::Webhooks, &refusal, Place::Webhooks.path());
    }
    Sheet { session: &session, name: None, form: &Form::default(), came: None }.answer()
}

/// The address of a form that was loaded instead of sent.
async fn to_new<Q: Queue, S: Store>(console: This<Q, S>, session: MayChange) -> Response {
    ask_new(console, session).await
}

async fn add<Q: Queue, S: Store>(
    State(console): This<Q, S>,
    Posted { session, form }: Posted,
) -> Response {
    match console.control.add(&session.caller, document(&form)).await {
        Ok(change) => changed(&console, &session, change, "The webhook is made."),
        Err(refusal) => {
            Sheet { session: &session, name: None, form: &form, came: Some(Err(refusal)) }.answer()
        }
    }
}

async fn test_new<Q: Queue, S: Store>(
    State(console): This<Q, S>,
    Posted { session, form }: Posted,
) -> Response {
    let draft = Draft::New(document(&form));
    tested(console, session, None, form, draft).await
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
    let draft = Draft::Change(name.clone(), patch(&form));
    tested(console, session, Some(name), form, draft).await
}

async fn tested<Q: Queue, S: Store>(
    console: Arc<Console<Q, S>>,
    session: Session,
    name: Option<String>,
    form: Form,
    draft: Draft,
) -> Response {
    let ending = console.clone();
    // The browser may leave in the middle: what was sent is recorded.
    let work = async move {
        let came = console.control.test_draft(draft).await;
        if let Ok(tested) = &came {
            // Where it went: an endpoint that was typed gets the headers that are stored.
            let to = tested.url.parse::<Url>().map(|url| url.origin().ascii_serialization());
            let details = format!("not saved, to {}", to.unwrap_or_default());
            console.record(&session, "test", tested.subscriber.clone(), details);
        }
        Sheet { session: &session, name: name.as_deref(), form: &form, came: Some(came) }.answer()
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
) -> Response {
    match known(&console, &session, name).await {
        Ok((found, document, version)) => {
            let form = filled(&document, &version);
            let name = Some(found.status.subscriber.as_str());
            Sheet { session: &session, name, form: &form, came: None }.answer()
        }
        Err(refusal) => no_such(&session, &refusal),
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
        Ok(change) => changed(&console, &session, change, "Saved."),
        Err(refusal) if refusal.status == StatusCode::NOT_FOUND => no_such(&session, &refusal),
        Err(refusal) => {
            let came = Some(Err(refusal));
            Sheet { session: &session, name: Some(&name), form: &form, came }.answer()
        }
    }
}

/// What was made or changed. Its secret stands in this answer alone.
fn changed<Q: Queue, S: Store>(
    console: &Console<Q, S>,
    session: &Session,
    change: SubscriberChange,
    said: &str,
) -> Response {
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
            pre tabindex="0" aria-label="Signing secret" { (secret.expose()) }
            @if let Some(until) = overlap_until { p { "The secret before it signs too, until " (time(until)) ". Give the receiver the new one by then." } }
            p { a.button href=(to) { "To the webhook" } }
        }
    })
}

async fn ask_secret<Q: Queue, S: Store>(
    State(console): This<Q, S>,
    MayChange(session): MayChange,
    name: Result<Name, Refusal>,
) -> Response {
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
            p { "A new signing secret is made, and shown once. The one in use signs too until the overlap is over, so a receiver that knows either accepts a request." }
            p.muted.small { "Schemes with room for one signature carry that of the new secret." }
        },
        html! {
            div.field {
                label for="overlap" { "Overlap" }
                input id="overlap" name="overlap" value="24h" autocomplete="off";
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
        Ok(change) => changed(&console, &session, change, "The new secret signs."),
        Err(refusal) => no_such(&session, &refusal),
    }
}

async fn ask_removal<Q: Queue, S: Store>(
    State(console): This<Q, S>,
    MayChange(session): MayChange,
    name: Result<Name, Refusal>,
) -> Response {
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
            p { "No event goes to " strong { (text(name)) } " any more. Now " (waits(&found.status)) " wait" @if let Some(dead) = dead { ", and it has " (number(dead)) " dead letters" } "." }
        },
        html! {
            input type="hidden" name=(VERSION) value=(version);
            fieldset {
                legend { "What its queues hold" }
                div.check { input id="keep" name="backlog" type="radio" value="keep" required; label for="keep" { "is kept, until " code { "hooktrail prune" } "; meanwhile no other webhook can have this name" } }
                div.check { input id="drop" name="backlog" type="radio" value="drop"; label for="drop" { "is deleted: events, retries and dead letters" } }
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

#[cfg(test)]
mod tests;

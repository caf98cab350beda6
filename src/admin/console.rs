//! The console: pages for people, under `/console/`. What they show is what the API answers.
//!
//! Every page needs a browser session, which begins with a token ([`session`]). A page is rendered here and
//! works without its module; its whole state is in its URL.

mod assets;
mod dead_letters;
mod deliveries;
mod events;
mod form;
mod overview;
mod page;
mod session;
mod sign_in;

use std::{net::IpAddr, sync::Arc};

use axum::{
    Extension, Router,
    body::Body,
    extract::{self, FromRequestParts},
    http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri, header, request::Parts},
    response::{IntoResponse as _, Redirect, Response},
    routing::{get, post},
};
use maud::html;
use tokio::time::timeout;

use self::{
    form::Form,
    page::{Page, Place},
    session::Session,
    sign_in::{Doorman, Said},
};
use super::{
    answer::{READ_TIMEOUT, Refusal, header_text},
    body,
    connections::Peer,
    control::{Control, MAX_LISTED},
    guard::{Tokens, from_elsewhere},
    history::{Deliveries, Events, History, Id, Number},
    query::Name,
};
use crate::{config::Role, queue::Queue, store::Store};

/// The longest body of a form, in bytes.
const MAX_FORM: usize = 16 * 1024;

struct Console<Q, S> {
    tokens: Tokens,
    doorman: Doorman,
    control: Arc<Control<Q>>,
    history: Arc<History<Q, S>>,
}

type This<Q, S> = extract::State<Arc<Console<Q, S>>>;

pub(super) fn routes<Q: Queue, S: Store>(
    tokens: Tokens,
    control: Arc<Control<Q>>,
    history: Arc<History<Q, S>>,
) -> Router {
    let console = Arc::new(Console { tokens, doorman: Doorman::default(), control, history });
    Router::new()
        .route("/console", get(async || Redirect::permanent(Place::Overview.path())))
        .route(Place::Overview.path(), get(overview::<Q, S>))
        .route(Place::Events.path(), get(list_events::<Q, S>))
        .route("/console/events/{number}", get(show_event::<Q, S>))
        .route(Place::Deliveries.path(), get(list_deliveries::<Q, S>))
        .route("/console/deliveries/{id}", get(show_delivery::<Q, S>))
        .route(Place::DeadLetters.path(), get(summarise_dead::<Q, S>))
        .route("/console/dead-letters/{name}", get(list_dead::<Q, S>))
        .route("/console/sign-in", get(ask::<Q, S>).post(sign_in::<Q, S>))
        .route("/console/sign-out", post(sign_out::<Q, S>).get(nothing::<Q, S>))
        .route("/console/{*elsewhere}", get(nothing::<Q, S>))
        .with_state(console)
        .merge(assets::routes())
}

/// The session of a request for a page. Without one the answer is the page of the sign-in.
struct SignedIn(Session);

impl<Q: Queue, S: Store> FromRequestParts<Arc<Console<Q, S>>> for SignedIn {
    type Rejection = Response;

    async fn from_request_parts(
        parts: &mut Parts,
        console: &Arc<Console<Q, S>>,
    ) -> Result<Self, Response> {
        if console.tokens.is_empty() {
            return Err(sign_in::needs_a_token());
        }
        let is_get = parts.method == Method::GET || parts.method == Method::HEAD;
        let to = parts.uri.path_and_query().filter(|_| is_get).map_or("", |to| to.as_str());
        let header = |name| header_text(&parts.headers, HeaderName::from_static(name));
        let is_own = matches!(header("sec-fetch-site"), "" | "none" | "same-origin");
        // Another site's page may lead here, and may not have the browser fetch a page unseen.
        if !is_own && header("sec-fetch-mode") != "navigate" {
            return Err(sign_in::page(Said::Elsewhere, to));
        }
        let said = if is_own { Said::Nothing } else { Said::FromALink };
        let found = session::of(&parts.headers, &console.tokens);
        found.map(Self).ok_or_else(|| sign_in::page(said, to))
    }
}

async fn overview<Q: Queue, S: Store>(
    extract::State(console): This<Q, S>,
    SignedIn(session): SignedIn,
) -> Response {
    overview::answer(&session, &console.control.overview().await)
}

async fn list_events<Q: Queue, S: Store>(
    extract::State(console): This<Q, S>,
    SignedIn(session): SignedIn,
    uri: Uri,
) -> Response {
    let form = Form::of(uri.query().unwrap_or_default());
    let found = match form.read::<Events>() {
        Ok(wanted) => console.history.events(wanted).await,
        Err(refusal) => Err(refusal),
    };
    events::list(&session, &form, found)
}

async fn show_event<Q: Queue, S: Store>(
    extract::State(console): This<Q, S>,
    SignedIn(session): SignedIn,
    number: Result<Number, Refusal>,
) -> Response {
    let found = match number {
        Ok(Number(number)) => console.history.event(number).await,
        Err(refusal) => Err(refusal),
    };
    events::one(&session, found)
}

async fn list_deliveries<Q: Queue, S: Store>(
    extract::State(console): This<Q, S>,
    SignedIn(session): SignedIn,
    uri: Uri,
) -> Response {
    let form = Form::of(uri.query().unwrap_or_default());
    let found = match form.read::<Deliveries>() {
        Ok(wanted) => console.history.deliveries(wanted, &session.caller).await,
        Err(refusal) => Err(refusal),
    };
    deliveries::list(&session, &form, &console.control.names(), found)
}

async fn show_delivery<Q: Queue, S: Store>(
    extract::State(console): This<Q, S>,
    SignedIn(session): SignedIn,
    id: Result<Id, Refusal>,
) -> Response {
    let found = match id {
        Ok(Id(id)) => console.history.delivery(&id, &session.caller).await,
        Err(refusal) => Err(refusal),
    };
    deliveries::one(&session, found)
}

async fn summarise_dead<Q: Queue, S: Store>(
    extract::State(console): This<Q, S>,
    SignedIn(session): SignedIn,
) -> Response {
    dead_letters::summary(&session, &console.control.overview().await)
}

async fn list_dead<Q: Queue, S: Store>(
    extract::State(console): This<Q, S>,
    SignedIn(session): SignedIn,
    name: Result<Name, Refusal>,
) -> Response {
    let (name, found) = match name {
        Ok(Name(name)) => {
            let control = console.control.clone();
            let found = control.oldest_dead(name.clone(), MAX_LISTED, &session.caller).await;
            (name, found)
        }
        Err(refusal) => (String::new(), Err(refusal)),
    };
    dead_letters::of_one(&session, &name, found)
}

/// The answer to a path without a page.
async fn nothing<Q: Queue, S: Store>(
    extract::State(_): This<Q, S>,
    SignedIn(session): SignedIn,
) -> Response {
    let page = Page {
        session: &session,
        place: Place::Overview,
        title: "Not found".to_owned(),
        refresh: None,
    };
    let why = "no page has this address; the pages are above".to_owned();
    page.refused(&Refusal::new(StatusCode::NOT_FOUND, why))
}

async fn ask<Q: Queue, S: Store>(
    extract::State(console): This<Q, S>,
    session: Result<SignedIn, Response>,
) -> Response {
    match session {
        Ok(_) => Redirect::to(Place::Overview.path()).into_response(),
        Err(_) if console.tokens.is_empty() => sign_in::needs_a_token(),
        Err(_) => sign_in::page(Said::Nothing, ""),
    }
}

async fn sign_in<Q: Queue, S: Store>(
    extract::State(console): This<Q, S>,
    Extension(Peer(address)): Extension<Peer>,
    headers: HeaderMap,
    body: Body,
) -> Response {
    if console.tokens.is_empty() {
        return sign_in::needs_a_token();
    }
    let form = match posted(body).await {
        Ok(form) => form,
        Err(refusal) => return not_taken(&refusal),
    };
    let to = form.get("to");
    if from_elsewhere(&headers, true).is_some() {
        return sign_in::page(Said::Elsewhere, to);
    }
    let Some(token) = console.tokens.known(form.get("token")) else {
        return wrong_token(&console.doorman, address, to).await;
    };
    if !token.role.may(Role::Read) {
        return sign_in::page(Said::MayNotLook, to);
    }
    // A proxy before this listener has the TLS; the browser names the scheme that it sees.
    let encrypted = header_text(&headers, header::ORIGIN).starts_with("https://");
    moved(own_page(to), session::begin(token, encrypted))
}

async fn wrong_token(doorman: &Doorman, address: IpAddr, to: &str) -> Response {
    let said = if doorman.wait(address).await { Said::Wrong } else { Said::TooMany };
    sign_in::page(said, to)
}

async fn sign_out<Q: Queue, S: Store>(
    extract::State(_): This<Q, S>,
    SignedIn(session): SignedIn,
    headers: HeaderMap,
    body: Body,
) -> Response {
    match changing(&session, &headers, body).await {
        Ok(_) => moved("/console/sign-in", session::end(&session)),
        Err(refusal) => not_taken(&refusal),
    }
}

/// The form of a request that changes something, which one of this session's pages has sent.
async fn changing(session: &Session, headers: &HeaderMap, body: Body) -> Result<Form, Refusal> {
    let form = posted(body).await?;
    if let Some(why) = from_elsewhere(headers, true) {
        return Err(Refusal::from_elsewhere(why));
    }
    if form.get("form_key") != session.form_key {
        return Err(Refusal::from_elsewhere("its form is of another session; load the page again"));
    }
    Ok(form)
}

async fn posted(mut body: Body) -> Result<Form, Refusal> {
    let reading = timeout(READ_TIMEOUT, body::read(&mut body, None, MAX_FORM));
    let read = reading.await.map_err(|_| Refusal::late())?;
    let bytes = read.map_err(|_| {
        let why = format!("the form has more than {MAX_FORM} bytes, or ended early");
        Refusal::new(StatusCode::PAYLOAD_TOO_LARGE, why)
    })?;
    Ok(Form::of(&String::from_utf8_lossy(&bytes)))
}

/// The answer to a form that is not taken.
fn not_taken(refusal: &Refusal) -> Response {
    page::outside(
        refusal.status,
        "Not taken",
        html! {
            section.card.pad.sign-in {
                h1 { "This form was not taken" }
                p { (page::text(&refusal.why)) }
                p { a href=(Place::Overview.path()) { "To the overview" } }
            }
        },
    )
}

/// The path of a page here; that of the overview for any other text.
fn own_page(to: &str) -> &str {
    let is_page = to.starts_with("/console/")
        && !to.starts_with("/console/sign-")
        && to.bytes().all(|b| b.is_ascii_graphic() && b != b'\\')
        && !to.split(['/', '?']).any(|part| matches!(part, "." | ".."));
    if is_page { to } else { Place::Overview.path() }
}

fn moved(to: &str, cookie: HeaderValue) -> Response {
    ([(header::SET_COOKIE, cookie)], Redirect::to(to)).into_response()
}

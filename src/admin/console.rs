//! The console: pages for people, under `/console/`. What they show is what the API answers.
//!
//! Every page needs a browser session, which begins with a token ([`session`]). A page is rendered here and
//! works without its module; its whole state is in its URL.

mod action;
mod actions;
mod assets;
mod chart;
mod dead_actions;
mod dead_letters;
mod deliveries;
mod entry;
mod events;
mod form;
mod health;
mod notices;
mod overview;
mod page;
mod replays;
mod sending;
mod session;
mod sign_in;
mod table;
mod webhook_form;
mod webhooks;

use std::{net::IpAddr, sync::Arc};

use axum::{
    Extension, Router,
    body::Body,
    extract,
    http::{HeaderMap, HeaderValue, StatusCode, Uri, header},
    middleware,
    response::{IntoResponse as _, Redirect, Response},
    routing::{get, post},
};

pub(super) use self::entry::Console;
use self::{
    entry::{MAX_SIGN_IN, SignedIn, This, changing, not_taken, of_public_host, posted},
    form::Form,
    page::{Page, Place},
    sign_in::{Doorman, Onward, Said},
};
use super::{
    answer::{Refusal, header_text},
    connections::Peer,
    export::Wanted,
    guard::from_elsewhere,
    history::{Deliveries, Events, Id, Number},
};
use crate::{config::Role, queue::Queue, store::Store};

pub(super) fn routes<Q: Queue, S: Store>(console: Console<Q, S>) -> Router {
    let tokens = console.tokens.clone();
    Router::new()
        .route("/console", get(async || Redirect::permanent(Place::Overview.path())))
        .route(Place::Overview.path(), get(overview::<Q, S>))
        .route(Place::Events.path(), get(list_events::<Q, S>))
        .route("/console/events/export", get(export_events::<Q, S>))
        .route("/console/events/{number}", get(show_event::<Q, S>))
        .route(Place::Deliveries.path(), get(list_deliveries::<Q, S>))
        .route("/console/deliveries/{id}", get(show_delivery::<Q, S>))
        .route("/console/delivery", get(show_odd_delivery::<Q, S>))
        .route("/console/sign-in", get(ask::<Q, S>).post(sign_in::<Q, S>))
        .route("/console/sign-out", post(sign_out::<Q, S>).get(nothing::<Q, S>))
        .route("/console/{*elsewhere}", get(nothing::<Q, S>))
        .merge(webhooks::routes())
        .merge(webhook_form::routes())
        .merge(replays::routes())
        .merge(health::routes())
        .merge(dead_letters::routes())
        .merge(actions::routes())
        .merge(dead_actions::routes())
        .merge(sending::routes())
        .with_state(Arc::new(console))
        .merge(assets::routes())
        .layer(middleware::from_fn_with_state(tokens, of_public_host))
}

async fn overview<Q: Queue, S: Store>(
    extract::State(console): This<Q, S>,
    SignedIn(session): SignedIn,
) -> Response {
    let control = &console.control;
    overview::answer(&session, &control.overview().await, |name| control.last_hour(name))
}

async fn list_events<Q: Queue, S: Store>(
    extract::State(console): This<Q, S>,
    SignedIn(session): SignedIn,
    uri: Uri,
) -> Response {
    let form = Form::of(uri.query().unwrap_or_default());
    let (found, day) = match form.read::<Events>() {
        Ok(wanted) => {
            let day = console.history.day(&wanted).await;
            (console.history.events(wanted).await, day)
        }
        Err(refusal) => (Err(refusal), None),
    };
    let tenants = console.control.has_tenants();
    events::list(&session, &form, found, day.as_ref(), tenants)
}

/// The events that the page's filters select, as a file.
async fn export_events<Q: Queue, S: Store>(
    extract::State(console): This<Q, S>,
    SignedIn(session): SignedIn,
    uri: Uri,
) -> Response {
    let form = Form::of(uri.query().unwrap_or_default());
    let file = match form.read::<Wanted>() {
        Ok(wanted) => console.exporter.file(wanted).await,
        Err(refusal) => Err(refusal),
    };
    file.unwrap_or_else(|refusal| events::no_file(&session, &refusal))
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
    uri: Uri,
) -> Response {
    let found = match id {
        Ok(Id(id)) => {
            console.history.delivery_with_events(&id, deliveries::EVENTS, &session.caller).await
        }
        Err(refusal) => Err(refusal),
    };
    let notice = console.notices.of(&session, uri.query());
    deliveries::one(&session, notice, found)
}

/// A batch whose id cannot stand in a path.
async fn show_odd_delivery<Q: Queue, S: Store>(
    console: This<Q, S>,
    session: SignedIn,
    uri: Uri,
) -> Response {
    let form = Form::whole(uri.query().unwrap_or_default());
    show_delivery(console, session, Ok(Id(form.get("id").to_owned())), uri).await
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
        Err(_) => sign_in::page(Said::Nothing, &Onward::page("")),
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
    let form = match posted(body, MAX_SIGN_IN).await {
        Ok(form) => form,
        Err(refusal) => return not_taken(&refusal),
    };
    if from_elsewhere(&headers, &console.tokens).is_some() {
        return sign_in::page(Said::Elsewhere, &Onward::page(form.get("to")));
    }
    let onward = Onward::carried(&form);
    let Some(token) = console.tokens.known(form.get("token")) else {
        return wrong_token(&console.doorman, address, &onward).await;
    };
    if !token.role.may(Role::Read) {
        return sign_in::page(Said::MayNotLook, &onward);
    }
    // A proxy before this listener has the TLS; the browser names the scheme that it sees.
    let over_tls = header_text(&headers, header::ORIGIN).starts_with("https://");
    let reach = match console.tokens.public_url() {
        Some(_) => session::Reach::OneHost,
        None if over_tls => session::Reach::Tls,
        None => session::Reach::Any,
    };
    let (session, cookie) = session::begin(token, reach);
    let to = own_page(&onward.to);
    if onward.typed.fields().next().is_none() {
        return moved(to, cookie);
    }
    moved(&console.drafts.keep(&session, to, onward.typed), cookie)
}

async fn wrong_token(doorman: &Doorman, address: IpAddr, onward: &Onward) -> Response {
    let said = if doorman.wait(address).await { Said::Wrong } else { Said::TooMany };
    sign_in::page(said, onward)
}

async fn sign_out<Q: Queue, S: Store>(
    extract::State(console): This<Q, S>,
    SignedIn(session): SignedIn,
    headers: HeaderMap,
    body: Body,
) -> Response {
    match changing(&console.tokens, &session, &headers, body).await {
        Ok(_) => moved("/console/sign-in", session::end(&session)),
        Err(refusal) => not_taken(&refusal),
    }
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

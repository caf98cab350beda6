//! The actions on dead letters: replay and purge. Their page counts first, and the form means what was
//! counted.

use std::sync::Arc;

use axum::{Router, http::StatusCode};
use maud::{Markup, html};

use super::{
    action::{Act, Acted, Ask, Asks, Of, REQUEST, good, pair, request_of, word},
    entry::{Console, Done},
    form::Form,
    notices::DRAFT,
    page::{Place, path_to, text},
    session::Session,
};
use crate::{
    admin::{
        answer::Refusal,
        dead::{self, Chosen},
        view::{LettersDone, LettersRequest},
    },
    clock,
    queue::Queue,
    store::Store,
    wording::counted,
};

pub(super) fn routes<Q: Queue, S: Store>() -> Router<Arc<Console<Q, S>>> {
    Router::new()
        .route("/console/dead-letters/{name}/replay", pair::<OnLetters<false>, Q, S>())
        .route("/console/dead-letters/{name}/purge", pair::<OnLetters<true>, Q, S>())
}

/// The page of a subscriber's dead letters.
pub(super) fn list_of(name: &str) -> String {
    path_to(Place::DeadLetters.path(), name)
}

/// The page of an action on those that a form chooses.
pub(super) fn path(name: &str, act: dead::Act, form: &Form) -> String {
    form.link(&path_to(&list_of(name), act.name()), None)
}

/// The command that does the same; `letter` is the id of one, or its number.
pub(super) fn command(name: &str, verb: &str, letter: Option<&str>, form: &Form) -> String {
    let options =
        ["reason", "status", "type", "since", "until"].map(|field| match form.get(field) {
            "" => String::new(),
            given => format!(" --{field} {}", word(given.trim())),
        });
    let letter = letter.map_or_else(String::new, |letter| format!(" {}", word(letter)));
    format!("hooktrail dead {verb} {}{letter}{}", word(name), options.concat())
}

/// An action on dead letters: their purge, or their replay.
struct OnLetters<const IS_PURGE: bool>;

impl<const IS_PURGE: bool> OnLetters<IS_PURGE> {
    const ACT: dead::Act = if IS_PURGE { dead::Act::Purge } else { dead::Act::Replay };
}

impl<const IS_PURGE: bool, Q: Queue, S: Store> Act<Q, S> for OnLetters<IS_PURGE> {
    const PLACE: Place = Place::DeadLetters;

    async fn act(
        console: &Arc<Console<Q, S>>,
        session: &Session,
        of: &Of,
    ) -> Result<Acted, Refusal> {
        act(console, session, of, Self::ACT).await
    }

    fn back(of: &Of) -> String {
        let name = of.name().ok();
        name.map_or_else(|| Place::DeadLetters.path().to_owned(), |name| list(name, &of.form))
    }
}

impl<const IS_PURGE: bool, Q: Queue, S: Store> Asks<Q, S> for OnLetters<IS_PURGE> {
    async fn ask(console: &Arc<Console<Q, S>>, session: &Session, of: &Of) -> Result<Ask, Refusal> {
        ask(console, session, of, Self::ACT).await
    }
}

/// The list that the form was sent from, with its filters.
fn list(name: &str, form: &Form) -> String {
    let form = form.clone().filled();
    let own = ["form_key", REQUEST, DRAFT, "key", "as_of", "most"];
    own.into_iter().fold(form, Form::without).link(&list_of(name), None)
}

async fn ask<Q: Queue, S: Store>(
    console: &Console<Q, S>,
    session: &Session,
    of: &Of,
    act: dead::Act,
) -> Result<Ask, Refusal> {
    let (name, form) = (of.name()?, of.form.clone().filled());
    let Chosen(wanted) = form.read()?;
    let letter = match form.get("key") {
        "" => None,
        key => Some(console.letters.one(name.to_owned(), key.to_owned(), &session.caller).await?),
    };
    let letter = letter.map(|whole| whole.letter);
    let counted = LettersRequest { dry_run: true, ..wanted };
    let counted = console.letters.act(act, name.to_owned(), counted, None).await?.done;
    let title = match act {
        dead::Act::Replay => format!("Replay dead letters of {name}"),
        dead::Act::Purge => format!("Purge dead letters of {name}"),
    };
    let button = match act {
        dead::Act::Replay => "Replay",
        dead::Act::Purge => "Delete for good",
    };
    let id = letter.map(|letter| letter.id.unwrap_or_else(|| format!("@{}", letter.number)));
    Ok(Ask {
        title,
        says: says(act, name, &form, &counted),
        to: path_to(&list_of(name), act.name()),
        fields: fields(&form, &counted),
        button: (counted.letters > 0).then_some(button),
        command: command(name, act.name(), id.as_deref(), &form),
        back: list(name, &form),
    })
}

/// The fields that have the form mean what was counted.
fn fields(form: &Form, done: &LettersDone) -> Markup {
    html! {
        input type="hidden" name=(REQUEST) value=(clock::request_key());
        @for field in ["reason", "status", "type", "since", "until", "key"] {
            @if !form.get(field).is_empty() { input type="hidden" name=(field) value=(form.get(field)); }
        }
        @if let Some(as_of) = done.as_of { input type="hidden" name="as_of" value=(as_of); }
        input type="hidden" name="most" value=(done.letters);
    }
}

fn says(act: dead::Act, name: &str, form: &Form, done: &LettersDone) -> Markup {
    let is_some = ["reason", "status", "type", "since", "until", "key"]
        .iter()
        .any(|field| !form.get(field).is_empty());
    html! {
        @if done.letters == 0 {
            p role="status" { "Nothing to " (act.name()) ": no dead letter of " strong { (text(name)) } @if is_some { " fits" } " now." }
        } @else {
            p role="status" {
                strong { (counted(done.letters, "dead letter(s)")) } " of " strong { (text(name)) }
                @if is_some { ", chosen from " (counted(done.dead, "dead letter(s)")) "," }
                @match act {
                    dead::Act::Replay => " will be sent again: batches with the same bytes and the same ids. Their attempts count from 1.",
                    dead::Act::Purge => " will be deleted for good. Nobody gets them afterwards.",
                }
            }
            @if !done.complete { p { "They are the oldest. There may be more that fit: one request takes no more than " (counted(dead::MAX_LETTERS, "letter(s)")) ", and counting ends after 5 seconds. Ask again afterwards for the rest." } }
            p.muted { "What dies from now on is not among them." }
        }
        @if done.skipped > 0 {
            p { (counted(done.skipped, "letter(s) (fits|fit)")) " and cannot be replayed, and " (if done.skipped == 1 { "stays" } else { "stay" }) ": it never was a batch of hooktrail's." }
        }
    }
}

async fn act<Q: Queue, S: Store>(
    console: &Console<Q, S>,
    session: &Session,
    of: &Of,
    act: dead::Act,
) -> Result<Acted, Refusal> {
    let (name, given) = (of.name()?, request_of(&of.form)?);
    let own = ["form_key", REQUEST, DRAFT];
    let form = own.into_iter().fold(of.form.clone().filled(), Form::without);
    let Chosen(wanted) = form.read()?;
    let Some(most) = wanted.most else {
        return Err(Refusal::bad(
            "the form does not say how many were counted; load its page again",
        ));
    };
    let wanted = LettersRequest { dry_run: false, ..wanted };
    let key = dead::key_of(given, act, name, &wanted, &session.caller);
    let acted = console.letters.act(act, name.to_owned(), wanted, Some(key)).await?;
    let (what, subject) = (act.operation(), name.to_owned());
    if let Some(refusal) = acted.failed {
        console.record(session, what, subject, acted.details);
        return Err(refusal);
    }
    let done = &acted.done;
    if done.letters == 0 {
        let why = "what was counted is not there any more: it was replayed or purged meanwhile, and nothing was done";
        return Err(Refusal::new(StatusCode::CONFLICT, why.to_owned()));
    }
    let gone = most.saturating_sub(done.letters + done.skipped);
    let notice = good(html! {
        (act.says(done.letters)) "."
        @if act == dead::Act::Replay { " What its receiver answers is among the deliveries." }
        @if gone > 0 { " " (counted(gone, "letter(s) (was|were)")) " not there any more." }
    });
    let (to, details, is_new) = (list(name, &form), acted.details.clone(), acted.changed());
    Ok(Acted { to, done: Done { what, subject, details, notice }, is_new })
}

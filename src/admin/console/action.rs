//! The shape of an action: a page that says what will be done and to how much, and the form that does
//! it. A page has a link to an action only for the role `admin`; a form of another role is refused.

use std::sync::Arc;

use axum::{
    extract::State,
    http::Uri,
    response::Response,
    routing::{MethodRouter, post},
};
use maud::{Markup, html};

use super::{
    entry::{Console, Done, MayChange, Posted, This},
    form::Form,
    notices::{DRAFT, draft_field, not_sent},
    page::{Page, Place, form_key, lines, text},
    session::Session,
};
use crate::{
    admin::{answer::Refusal, query::Name},
    queue::Queue,
    store::Store,
};

/// An action. [`pair`] and [`alone`] make its routes.
pub(super) trait Act<Q: Queue, S: Store>: 'static {
    const PLACE: Place;

    /// Does it. It ends, whatever becomes of the browser.
    fn act(
        console: &Arc<Console<Q, S>>,
        session: &Session,
        of: &Of,
    ) -> impl Future<Output = Result<Acted, Refusal>> + Send;

    /// The page to go back to when it was not done.
    fn back(_: &Of) -> String {
        Self::PLACE.path().to_owned()
    }
}

/// An action with a page that asks before it.
pub(super) trait Asks<Q: Queue, S: Store>: Act<Q, S> {
    fn ask(
        console: &Arc<Console<Q, S>>,
        session: &Session,
        of: &Of,
    ) -> impl Future<Output = Result<Ask, Refusal>> + Send;
}

/// What an action is asked to work on: the name or id in its path, and its form.
pub(super) struct Of {
    name: Option<String>,
    pub(super) form: Form,
    /// The form was kept while its browser was signed out.
    is_kept: bool,
}

impl Of {
    fn new(name: Result<Name, Refusal>, form: Form) -> Self {
        Self { name: name.ok().map(|Name(name)| name), form, is_kept: false }
    }

    /// A text that the user has typed before the session was over. An address has none: another
    /// site may have made it.
    pub(super) fn typed(&self, field: &str) -> &str {
        if self.is_kept { self.form.get(field) } else { "" }
    }

    pub(super) fn name(&self) -> Result<&str, Refusal> {
        self.name.as_deref().ok_or_else(|| Refusal::field("name", "must be UTF-8"))
    }
}

/// The page that asks before an action.
pub(super) struct Ask {
    pub(super) title: String,
    /// What will happen, and to how much.
    pub(super) says: Markup,
    pub(super) to: String,
    pub(super) fields: Markup,
    /// `None`: there is nothing to do.
    pub(super) button: Option<&'static str>,
    /// The command that does the same.
    pub(super) command: String,
    pub(super) back: String,
}

/// An action that succeeded.
pub(super) struct Acted {
    /// The page that says what was done.
    pub(super) to: String,
    pub(super) done: Done,
    /// False if this form had done it before: then it is not recorded again.
    pub(super) is_new: bool,
}

/// The page of an action, and its form.
pub(super) fn pair<A: Asks<Q, S>, Q: Queue, S: Store>() -> MethodRouter<Arc<Console<Q, S>>> {
    alone::<A, Q, S>().get(ask::<A, Q, S>)
}

/// The form of an action that another page has.
pub(super) fn alone<A: Act<Q, S>, Q: Queue, S: Store>() -> MethodRouter<Arc<Console<Q, S>>> {
    post(act::<A, Q, S>)
}

async fn ask<A: Asks<Q, S>, Q: Queue, S: Store>(
    State(console): This<Q, S>,
    MayChange(session): MayChange,
    name: Result<Name, Refusal>,
    uri: Uri,
) -> Response {
    // What was typed before the session was over.
    let kept = console.drafts.form(&session, uri.query());
    let field = kept.as_ref().map(draft_field);
    let of = match kept {
        Some(kept) => Of { is_kept: true, ..Of::new(name, kept.without(DRAFT)) },
        // One that is sent or forgotten by now is no part of the form.
        None => Of::new(name, Form::whole(uri.query().unwrap_or_default()).without(DRAFT)),
    };
    match A::ask(&console, &session, &of).await {
        Ok(ask) => ask.answer(&session, A::PLACE, field),
        Err(refusal) => page(&session, A::PLACE, "Not possible").refused(&refusal),
    }
}

async fn act<A: Act<Q, S>, Q: Queue, S: Store>(
    State(console): This<Q, S>,
    name: Result<Name, Refusal>,
    Posted { session, form }: Posted,
) -> Response {
    let of = Of::new(name, form);
    let ending = console.clone();
    // The browser may leave in the middle: what was begun is done, and recorded.
    let work = async move {
        match A::act(&console, &session, &of).await {
            Ok(Acted { to, done, is_new }) => {
                console.drafts.done(&session, &of.form);
                match is_new {
                    true => console.lead(&session, &to, done),
                    false => console.lead_unrecorded(&session, &to, done.notice),
                }
            }
            Err(refusal) => not_done(&session, A::PLACE, &refusal, &A::back(&of)),
        }
    };
    ending.to_its_end(work).await
}

impl Ask {
    fn answer(self, session: &Session, place: Place, kept: Option<Markup>) -> Response {
        let Self { title, says, to, fields, button, command, back } = self;
        page(session, place, &title).answer(html! {
            div.head { h1 { (text(&title)) } }
            @if kept.is_some() { (not_sent("")) }
            section.card.pad {
                (says)
                form.deed method="post" action=(to) {
                    (form_key(session))
                    @if let Some(field) = kept { (field) }
                    (fields)
                    div.deeds {
                        @if let Some(button) = button { button.first { (button) } }
                        a.button href=(back) { "Back" }
                    }
                }
            }
            (same(&command))
        })
    }
}

/// A link that looks like a button, to the page of an action.
pub(super) fn link(to: &str, label: &str) -> Markup {
    html! { a.button href=(to) { (label) } }
}

/// The command that does the same as a page.
pub(super) fn same(command: &str) -> Markup {
    html! {
        h2 { "The same in a shell" }
        pre role="group" tabindex="0" aria-label="Command" { (lines(command)) }
    }
}

/// A word of a command in a shell.
pub(super) fn word(of: &str) -> String {
    let is_plain = |b: u8| b.is_ascii_alphanumeric() || b"-_.:@/+%".contains(&b);
    if !of.is_empty() && !of.starts_with('-') && of.bytes().all(is_plain) {
        return of.to_owned();
    }
    format!("'{}'", of.replace('\'', r"'\''"))
}

pub(super) fn page<'a>(session: &'a Session, place: Place, title: &str) -> Page<'a> {
    Page { session, place, title: text(title), refresh: None }
}

/// The page of an action that was not done.
pub(super) fn not_done(session: &Session, place: Place, refusal: &Refusal, back: &str) -> Response {
    page(session, place, "Not done").answer_with(
        refusal.status,
        html! {
            div.head { h1 { "This was not done" } }
            div.note.bad role="alert" { p { (text(&refusal.why)) } }
            p { a.button href=(back) { "Back" } }
        },
    )
}

pub(super) fn good(content: Markup) -> Markup {
    html! { div.note.good role="status" { p { (content) } } }
}

/// The hidden field with the key of a form: however often it is sent, it does its work once.
pub(super) const REQUEST: &str = "request";

/// The key of a form that was sent.
pub(super) fn request_of(form: &Form) -> Result<String, Refusal> {
    let given = form.get(REQUEST);
    if (1..=crate::admin::replays::MAX_KEY).contains(&given.len()) {
        return Ok(given.to_owned());
    }
    Err(Refusal::bad("the form has no key of its own; load its page again"))
}

#[cfg(test)]
mod tests {
    use super::{
        super::{
            page::testing::{HOSTILE, body, is_inert},
            session,
        },
        *,
    };

    #[tokio::test]
    async fn the_reason_why_an_action_was_not_done_is_inert() {
        let (session, refusal) = (session::of_admin(), Refusal::bad(HOSTILE));
        let page = not_done(&session, Place::Replays, &refusal, "/console/replays");
        is_inert(&body(page).await, 1);
    }
}

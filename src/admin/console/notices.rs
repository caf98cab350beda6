//! What an action has done, shown by the page that the browser is led to afterwards.
//!
//! The address has an id alone: a link that somebody else made shows no text of theirs.

use std::{
    collections::VecDeque,
    sync::{Mutex, PoisonError},
};

use maud::{Markup, html};

use super::{form::Form, page::query, session::Session};
use crate::clock;

/// The most that are remembered. The page shows its notice for as long as it is.
const MAX_KEPT: usize = 64;

/// The parameter, and the field, with the id of a draft.
pub(super) const DRAFT: &str = "draft";

struct Kept<T> {
    id: String,
    /// The form key of the session that it is for.
    session: String,
    content: T,
}

/// What the next page of a session shows, by a parameter of its address.
pub(super) struct Shelf<T> {
    parameter: &'static str,
    kept: Mutex<VecDeque<Kept<T>>>,
}

/// What was done.
pub(super) type Notices = Shelf<Markup>;

/// Forms as they were filled in when their session was over. They have no secrets.
pub(super) type Drafts = Shelf<Form>;

impl<T: Clone> Shelf<T> {
    pub(super) fn new(parameter: &'static str) -> Self {
        Self { parameter, kept: Mutex::default() }
    }

    /// Keeps something; returns the address of a page that shows it.
    pub(super) fn keep(&self, session: &Session, to: &str, content: T) -> String {
        let id = clock::session_id();
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() == MAX_KEPT {
            kept.pop_front();
        }
        let session = session.form_key.clone();
        kept.push_back(Kept { id: id.clone(), session, content });
        query(to, &[(self.parameter, &id)])
    }

    /// What an address names, if it is this session's and still known.
    pub(super) fn of(&self, session: &Session, query: Option<&str>) -> Option<T> {
        self.named(session, query).map(|(_, content)| content)
    }

    /// The same with its id.
    fn named(&self, session: &Session, query: Option<&str>) -> Option<(String, T)> {
        let mut pairs = url::form_urlencoded::parse(query?.as_bytes());
        let id = pairs.find_map(|(name, id)| (name == self.parameter).then_some(id))?;
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let found = kept.iter().find(|kept| kept.id == id && kept.session == session.form_key)?;
        Some((found.id.clone(), found.content.clone()))
    }
}

impl Drafts {
    /// The form that an address names. Its field [`DRAFT`] has the page send the id on.
    pub(super) fn form(&self, session: &Session, query: Option<&str>) -> Option<Form> {
        let (id, form) = self.named(session, query)?;
        Some(form.with(DRAFT, id))
    }

    /// Forgets the draft of a form that was sent and done: its address must not say that it was
    /// not.
    pub(super) fn done(&self, session: &Session, form: &Form) {
        let id = form.get(DRAFT);
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.retain(|kept| kept.id != id || kept.session != session.form_key);
    }
}

/// The hidden field of a form that was kept, for its page to send on; nothing for any other.
pub(super) fn draft_field(form: &Form) -> Markup {
    html! {
        @if !form.get(DRAFT).is_empty() { input type="hidden" name=(DRAFT) value=(form.get(DRAFT)); }
    }
}

/// What the page of a form that was kept says, and what is to be typed again.
pub(super) fn not_sent(again: &str) -> Markup {
    html! {
        div.note.warn role="status" { p { strong { "You were signed out meanwhile, and nothing was sent." } " What you typed is here again" (again) "." } }
    }
}

//! What an action has done, shown by the page that the browser is led to afterwards.
//!
//! The address has an id alone: a link that somebody else made shows no text of theirs.

use std::{
    collections::VecDeque,
    sync::{Mutex, PoisonError},
};

use maud::Markup;

use super::{form::Form, page::query, session::Session};
use crate::clock;

/// The most that are remembered. The page shows its notice for as long as it is.
const MAX_KEPT: usize = 64;

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
        let mut pairs = url::form_urlencoded::parse(query?.as_bytes());
        let id = pairs.find_map(|(name, id)| (name == self.parameter).then_some(id))?;
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let found = kept.iter().find(|kept| kept.id == id)?;
        (found.session == session.form_key).then(|| found.content.clone())
    }
}

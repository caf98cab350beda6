//! What an action has done, shown by the page that the browser is led to afterwards.
//!
//! The address has an id alone: a link that somebody else made shows no text of theirs.

use std::{
    collections::VecDeque,
    sync::{Mutex, PoisonError},
};

use maud::Markup;

use super::{page::query, session::Session};
use crate::clock;

/// The most that are remembered. The page shows its notice for as long as it is.
const MAX_NOTICES: usize = 64;

/// The parameter of a page.
const PARAMETER: &str = "notice";

struct Notice {
    id: String,
    /// The form key of the session that it is for.
    session: String,
    content: Markup,
}

#[derive(Default)]
pub(super) struct Notices(Mutex<VecDeque<Notice>>);

impl Notices {
    /// Keeps a notice; returns the address of a page that shows it.
    pub(super) fn keep(&self, session: &Session, to: &str, content: Markup) -> String {
        let id = clock::session_id();
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() == MAX_NOTICES {
            kept.pop_front();
        }
        let session = session.form_key.clone();
        kept.push_back(Notice { id: id.clone(), session, content });
        query(to, &[(PARAMETER, &id)])
    }

    /// The notice that an address names, if it is this session's and still known.
    pub(super) fn of(&self, session: &Session, query: Option<&str>) -> Option<Markup> {
        let mut pairs = url::form_urlencoded::parse(query?.as_bytes());
        let id = pairs.find_map(|(name, id)| (name == PARAMETER).then_some(id))?;
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let found = kept.iter().find(|notice| notice.id == id)?;
        (found.session == session.form_key).then(|| found.content.clone())
    }
}

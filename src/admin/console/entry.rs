//! What each request for a page goes through: its session, its role, and its form.

use std::sync::Arc;

use axum::{
    body::Body,
    extract::{FromRequest, FromRequestParts, Request, State},
    http::{HeaderMap, HeaderName, Method, StatusCode, header, request::Parts},
    middleware::Next,
    response::{IntoResponse as _, Redirect, Response},
};
use maud::{Markup, html};
use tokio::{sync::Semaphore, time::timeout};

use super::{
    form::Form,
    notices::{DRAFT, Drafts, Notices},
    page::{self, Place},
    session::{self, Session},
    sign_in::{self, Doorman, Onward, Said},
};
use crate::{
    admin::{
        answer::{READ_TIMEOUT, Refusal, header_text},
        body,
        control::{Control, MOST_TO_THEIR_END, to_its_end},
        dead::Letters,
        export::Exporter,
        guard::{Tokens, from_elsewhere},
        history::History,
        operations::record,
        replays::Again,
        view::ProblemKind,
    },
    queue::Queue,
    store::Store,
};

/// The longest body of a form, in bytes.
const MAX_FORM: usize = 16 * 1024;

/// The longest body of the sign-in, which carries another form along.
pub(super) const MAX_SIGN_IN: usize = MAX_FORM + 4096;

/// What the pages show and do.
pub(in crate::admin) struct Console<Q, S> {
    pub(super) tokens: Tokens,
    pub(super) doorman: Doorman,
    pub(super) control: Arc<Control<Q, S>>,
    pub(super) history: Arc<History<Q, S>>,
    pub(super) again: Arc<Again<Q, S>>,
    pub(super) exporter: Arc<Exporter<S>>,
    pub(super) letters: Arc<Letters<Q>>,
    pub(super) notices: Notices,
    pub(super) drafts: Drafts,
    store: S,
    /// Forms whose work ends even if the browser leaves.
    acting: Arc<Semaphore>,
}

pub(super) type This<Q, S> = State<Arc<Console<Q, S>>>;

/// An action that succeeded: its name and its subject in the record of operations, and what that
/// says besides.
pub(super) struct Done {
    pub(super) what: &'static str,
    pub(super) subject: String,
    pub(super) details: String,
    /// What the next page says.
    pub(super) notice: Markup,
}

impl<Q: Queue, S: Store> Console<Q, S> {
    pub(in crate::admin) fn new(
        tokens: Tokens,
        control: Arc<Control<Q, S>>,
        history: Arc<History<Q, S>>,
        again: Arc<Again<Q, S>>,
        exporter: Arc<Exporter<S>>,
        letters: Arc<Letters<Q>>,
        store: S,
    ) -> Self {
        Self {
            tokens,
            doorman: Doorman::default(),
            control,
            history,
            again,
            exporter,
            letters,
            notices: Notices::new("notice"),
            drafts: Drafts::new(DRAFT),
            store,
            acting: Arc::new(Semaphore::new(MOST_TO_THEIR_END)),
        }
    }

    /// Records an action as the API would, and leads the browser to the page that says what was
    /// done.
    pub(super) fn lead(&self, session: &Session, to: &str, done: Done) -> Response {
        let Done { what, subject, details, notice } = done;
        self.record(session, what, subject, details);
        self.lead_unrecorded(session, to, notice)
    }

    pub(super) fn record(
        &self,
        session: &Session,
        what: &'static str,
        subject: String,
        details: String,
    ) {
        record(self.store.clone(), Some(&session.caller), what, subject, details);
    }

    /// Answers a form. The work ends even if the browser leaves: it would be done, and not recorded.
    pub(super) async fn to_its_end(
        &self,
        work: impl Future<Output = Response> + Send + 'static,
    ) -> Response {
        let work = async move { Ok(work.await) };
        to_its_end(&self.acting, work).await.unwrap_or_else(|refusal| not_taken(&refusal))
    }

    pub(super) fn lead_unrecorded(&self, session: &Session, to: &str, notice: Markup) -> Response {
        Redirect::to(&self.notices.keep(session, to, notice)).into_response()
    }
}

/// The session of a request for a page. Without one the answer is the page of the sign-in.
pub(super) struct SignedIn(pub(super) Session);

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
        // A path that takes a form leads to its page as well.
        let to = parts.uri.path_and_query().filter(|_| is_get);
        let to = Onward::page(to.map_or(parts.uri.path(), |to| to.as_str()));
        let header = |name| header_text(&parts.headers, HeaderName::from_static(name));
        let is_own = matches!(header("sec-fetch-site"), "" | "none" | "same-origin");
        // Another site's page may lead here, and may not have the browser fetch a page unseen.
        if !is_own && header("sec-fetch-mode") != "navigate" {
            return Err(sign_in::page(Said::Elsewhere, &to));
        }
        let said = if is_own { Said::Nothing } else { Said::FromALink };
        let found = session::of(&parts.headers, &console.tokens);
        found.map(Self).ok_or_else(|| sign_in::page(said, &to))
    }
}

/// The session of a request for the page of an action, which needs the role `admin`.
pub(super) struct MayChange(pub(super) Session);

impl<Q: Queue, S: Store> FromRequestParts<Arc<Console<Q, S>>> for MayChange {
    type Rejection = Response;

    async fn from_request_parts(
        parts: &mut Parts,
        console: &Arc<Console<Q, S>>,
    ) -> Result<Self, Response> {
        let SignedIn(session) = SignedIn::from_request_parts(parts, console).await?;
        if session.caller.may_change() {
            return Ok(Self(session));
        }
        let why = "this token has the role `read`: it may look, and change nothing";
        let refusal = Refusal::of_kind(StatusCode::FORBIDDEN, ProblemKind::Role, why);
        // A form was sent, or the page of an action was asked for.
        let is_form = parts.method == Method::POST;
        Err(if is_form {
            not_taken(&refusal)
        } else {
            refused(&refusal, "This page is for admins")
        })
    }
}

/// The form of an action, which a page of this session has sent, and whose token has the role
/// `admin`.
pub(super) struct Posted {
    pub(super) session: Session,
    pub(super) form: Form,
}

impl<Q: Queue, S: Store> FromRequest<Arc<Console<Q, S>>> for Posted {
    type Rejection = Response;

    async fn from_request(
        request: Request,
        console: &Arc<Console<Q, S>>,
    ) -> Result<Self, Response> {
        let (mut parts, body) = request.into_parts();
        let session = match MayChange::from_request_parts(&mut parts, console).await {
            Ok(MayChange(session)) => session,
            Err(refused) => return Err(kept(console, &parts, body).await.unwrap_or(refused)),
        };
        let taken = changing(&console.tokens, &session, &parts.headers, body).await;
        taken.map(|form| Self { session, form }).map_err(|refusal| not_taken(&refusal))
    }
}

/// The page of the sign-in for a form whose session is over. It keeps what was typed, and does not
/// send it: that is for the user to do, on the form's page.
async fn kept<Q: Queue, S: Store>(
    console: &Console<Q, S>,
    parts: &Parts,
    body: Body,
) -> Option<Response> {
    let is_over = session::of(&parts.headers, &console.tokens).is_none();
    // What another site has filled in is not shown as the user's own.
    let is_own = from_elsewhere(&parts.headers, &console.tokens).is_none();
    if !is_over || !is_own || console.tokens.is_empty() {
        return None;
    }
    let (said, onward) = match posted(body, MAX_FORM).await {
        Ok(form) => (Said::SignedOut, Onward::form(parts.uri.path(), form)),
        Err(_) => (Said::NotKept, Onward::page(parts.uri.path())),
    };
    Some(sign_in::page(said, &onward))
}

/// The form of a request that changes something, which one of this session's pages has sent.
pub(super) async fn changing(
    tokens: &Tokens,
    session: &Session,
    headers: &HeaderMap,
    body: Body,
) -> Result<Form, Refusal> {
    let form = posted(body, MAX_FORM).await?;
    if let Some(why) = from_elsewhere(headers, tokens) {
        return Err(Refusal::from_elsewhere(why));
    }
    if form.get("form_key") != session.form_key {
        return Err(Refusal::from_elsewhere("its form is of another session; load the page again"));
    }
    Ok(form)
}

pub(super) async fn posted(mut body: Body, most: usize) -> Result<Form, Refusal> {
    let reading = timeout(READ_TIMEOUT, body::read(&mut body, None, most));
    let read = reading.await.map_err(|_| Refusal::late())?;
    let bytes = read.map_err(|_| {
        let why = format!(
            "the form has more than {most} bytes, or ended early; go back in the browser, which may still have what you typed, and shorten it"
        );
        Refusal::new(StatusCode::PAYLOAD_TOO_LARGE, why)
    })?;
    Ok(Form::whole(&String::from_utf8_lossy(&bytes)))
}

/// The answer to a form that is not taken.
pub(super) fn not_taken(refusal: &Refusal) -> Response {
    refused(refusal, "This form was not taken")
}

fn refused(refusal: &Refusal, heading: &str) -> Response {
    page::outside(
        refusal.status,
        heading,
        html! {
            section.card.pad.sign-in {
                h1 { (heading) }
                p { (page::text(&refusal.why)) }
                p { a href=(Place::Overview.path()) { "To the overview" } }
            }
        },
    )
}

/// Lets requests through by the one host at which browsers find the console, if that is configured.
pub(super) async fn of_public_host(
    State(tokens): State<Tokens>,
    request: Request,
    next: Next,
) -> Response {
    let host = header_text(request.headers(), header::HOST);
    match tokens.public_url() {
        Some(public) if !host.eq_ignore_ascii_case(public.host()) => elsewhere(&public.origin()),
        _ => next.run(request).await,
    }
}

fn elsewhere(origin: &str) -> Response {
    let link = format!("{origin}{}", Place::Overview.path());
    page::outside(
        StatusCode::MISDIRECTED_REQUEST,
        "The console is at another address",
        html! {
            section.card.pad.sign-in {
                h1 { "The console is at another address" }
                p { a href=(link) { (link) } }
                p.muted.small { "This daemon answers browsers at " code { "[admin] public_url" } " alone. A proxy must pass the header " code { "Host" } " on." }
            }
        },
    )
}

#[cfg(test)]
mod tests {
    use super::{
        super::page::testing::{HOSTILE, body, is_inert},
        *,
    };

    #[tokio::test]
    async fn the_reason_why_a_form_was_not_taken_is_inert() {
        is_inert(&body(not_taken(&Refusal::bad(HOSTILE))).await, 1);
    }
}

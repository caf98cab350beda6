//! The actions on a webhook: pause, resume, retry now, test.

use std::sync::Arc;

use axum::{Router, response::Redirect};
use maud::{Markup, html};

pub(super) use super::action::{good, link, not_done, same, word};
use super::{
    action::{Act, Acted, Ask, Asks, Of, alone, pair},
    entry::{Console, Done, MayChange, This},
    page::{Place, lines, path_to, text, time},
    session::Session,
};
use crate::{
    admin::{
        answer::Refusal,
        query::Name,
        view::{ChangeRequest, Retried, RetryNow, Subscriber, Tested},
    },
    queue::Queue,
    store::Store,
    wording::{counted, rounded},
};

pub(super) fn routes<Q: Queue, S: Store>() -> Router<Arc<Console<Q, S>>> {
    Router::new()
        .route("/console/webhooks/{name}/pause", pair::<Pause, Q, S>())
        .route("/console/webhooks/{name}/resume", pair::<Resume, Q, S>())
        .route("/console/webhooks/{name}/retry", pair::<Retry, Q, S>())
        .route("/console/webhooks/{name}/test", alone::<Test, Q, S>().get(to_webhook::<Q, S>))
}

/// The path of an action on a subscriber.
pub(super) fn path(name: &str, action: &str) -> String {
    path_to(&path_to(Place::Webhooks.path(), name), action)
}

/// What waits for a subscriber.
pub(super) fn waits(s: &Subscriber) -> String {
    let lane = s.lane.as_ref();
    let events = lane.and_then(|lane| lane.backlog.map(|n| n + lane.in_hand));
    let events =
        events.map_or("an unknown number of events".to_owned(), |n| counted(n, "event(s)"));
    let batches = lane.and_then(|lane| lane.in_retry);
    let batches =
        batches.map_or_else(String::new, |n| format!(" and {}", counted(n, "batch(es) to retry")));
    format!("{events}{batches}")
}

struct Pause;

impl<Q: Queue, S: Store> Asks<Q, S> for Pause {
    async fn ask(console: &Arc<Console<Q, S>>, _: &Session, of: &Of) -> Result<Ask, Refusal> {
        let s = console.control.one(of.name()?).await?;
        let name = &s.subscriber;
        Ok(Ask {
            title: format!("Pause {name}"),
            says: html! {
                p { "No request goes to " strong { (text(name)) } " until it is resumed. Now " (waits(&s)) " wait; what comes waits in its queue, and nothing is lost." }
                @if let Some(pause) = s.paused() { p { "It is paused already, by " (text(&pause.by)) ": " (text(&pause.why)) "." } }
            },
            to: path(name, "pause"),
            fields: html! {
                div.field {
                    label for="why" { "Reason, for whoever looks later" }
                    input id="why" name="why" maxlength="500" placeholder="maintenance of the receiver" value=(of.typed("why"));
                }
            },
            button: Some("Pause"),
            command: format!("hooktrail pause {} --why 'REASON'", word(name)),
            back: path_to(Place::Webhooks.path(), name),
        })
    }
}

impl<Q: Queue, S: Store> Act<Q, S> for Pause {
    const PLACE: Place = Place::Webhooks;

    async fn act(console: &Arc<Console<Q, S>>, _: &Session, of: &Of) -> Result<Acted, Refusal> {
        change(console, of, true).await
    }
}

struct Resume;

impl<Q: Queue, S: Store> Asks<Q, S> for Resume {
    async fn ask(console: &Arc<Console<Q, S>>, _: &Session, of: &Of) -> Result<Ask, Refusal> {
        let s = console.control.one(of.name()?).await?;
        let name = &s.subscriber;
        Ok(Ask {
            title: format!("Resume {name}"),
            says: html! {
                p { "Requests go to " strong { (text(name)) } " again: " (waits(&s)) " wait and will be sent, the oldest first." }
                @if let Some(pause) = s.paused() { p { "Paused by " (text(&pause.by)) " since " (time(pause.since)) ": " (text(&pause.why)) "." } }
                @else { p { "It is not paused. An open circuit, or a hold, is ended by one try." } }
            },
            to: path(name, "resume"),
            fields: html! {},
            button: Some("Resume"),
            command: format!("hooktrail resume {}", word(name)),
            back: path_to(Place::Webhooks.path(), name),
        })
    }
}

impl<Q: Queue, S: Store> Act<Q, S> for Resume {
    const PLACE: Place = Place::Webhooks;

    async fn act(console: &Arc<Console<Q, S>>, _: &Session, of: &Of) -> Result<Acted, Refusal> {
        change(console, of, false).await
    }
}

async fn change<Q: Queue, S: Store>(
    console: &Console<Q, S>,
    of: &Of,
    is_pause: bool,
) -> Result<Acted, Refusal> {
    let why = Some(of.form.get("why").trim().to_owned()).filter(|why| !why.is_empty());
    let (name, wanted) = (of.name()?.to_owned(), ChangeRequest { why });
    let changed = console.control.clone().change(name, wanted, is_pause).await?;
    let subject = changed.subscriber;
    let what = if is_pause { "pause" } else { "resume" };
    let notice = match (is_pause, changed.changed) {
        (true, true) => "Paused.",
        (true, false) => "It was paused already.",
        (false, true) => "Resumed.",
        (false, false) => "It was not paused.",
    };
    let why = changed.paused.map(|pause| pause.why).unwrap_or_default();
    let notice = good(html! { (notice) @if !why.is_empty() { " Reason: " (text(&why)) "." } });
    let to = path_to(Place::Webhooks.path(), &subject);
    let details = String::new();
    Ok(Acted { to, done: Done { what, subject, details, notice }, is_new: true })
}

struct Retry;

impl<Q: Queue, S: Store> Asks<Q, S> for Retry {
    async fn ask(console: &Arc<Console<Q, S>>, _: &Session, of: &Of) -> Result<Ask, Refusal> {
        let s = console.control.one(of.name()?).await?;
        let name = &s.subscriber;
        let waiting = s.lane.as_ref().and_then(|lane| lane.in_retry);
        let waiting = waiting.map_or("The batches".to_owned(), |n| counted(n, "batch(es)"));
        Ok(Ask {
            title: format!("Retry now: {name}"),
            says: html! {
                p { (waiting) " that wait for a retry are due at once. Bytes, ids and the count of attempts stay as they are." }
                p.muted { "Where the circuit is open, or the receiver asked for a wait, one batch is tried first, and the rest follows when it is accepted. A paused subscriber still gets nothing." }
            },
            to: path(name, "retry"),
            fields: html! {},
            button: Some("Retry now"),
            command: format!("hooktrail retry now {}", word(name)),
            back: path_to(Place::Webhooks.path(), name),
        })
    }
}

impl<Q: Queue, S: Store> Act<Q, S> for Retry {
    const PLACE: Place = Place::Webhooks;

    async fn act(console: &Arc<Console<Q, S>>, _: &Session, of: &Of) -> Result<Acted, Refusal> {
        let name = of.name()?.to_owned();
        let done = console.control.clone().retry_now(name, RetryNow::default()).await?;
        let Retried { subscriber: subject, moved, already_due, tried_now, paused, .. } = done;
        let notice = good(html! {
            (counted(moved, "batch(es) made")) " due now, " (already_due) " were due already."
            @if tried_now { " One batch is tried first." }
            @if paused.is_some() { " It is paused: nothing is sent before it is resumed." }
        });
        let to = path_to(Place::Webhooks.path(), &subject);
        let (what, details) = ("retry", String::new());
        Ok(Acted { to, done: Done { what, subject, details, notice }, is_new: true })
    }
}

/// It has no page that asks: its button is on the webhook's page.
struct Test;

impl<Q: Queue, S: Store> Act<Q, S> for Test {
    const PLACE: Place = Place::Webhooks;

    async fn act(console: &Arc<Console<Q, S>>, _: &Session, of: &Of) -> Result<Acted, Refusal> {
        let tested = console.control.test(of.name()?).await?;
        let to = path_to(Place::Webhooks.path(), &tested.subscriber);
        let notice = report(&tested);
        let (what, subject, details) = ("test", tested.subscriber, String::new());
        Ok(Acted { to, done: Done { what, subject, details, notice }, is_new: true })
    }
}

/// The address of a form that was loaded instead of sent.
async fn to_webhook<Q: Queue, S: Store>(
    _: This<Q, S>,
    MayChange(_): MayChange,
    name: Result<Name, Refusal>,
) -> Redirect {
    let back = name.map(|Name(name)| path_to(Place::Webhooks.path(), &name));
    Redirect::to(back.as_deref().unwrap_or(Place::Webhooks.path()))
}

/// A test event, its answer, and what a daemon makes of it.
pub(super) fn report(tested: &Tested) -> Markup {
    let is_good = tested.outcome == "delivered";
    let took = rounded(std::time::Duration::from_millis(tested.duration_ms));
    html! {
        section.note.good[is_good].bad[!is_good] role="status" aria-label="Test" {
            p {
                strong {
                    @match (tested.status, &tested.failure) {
                        (Some(status), _) => { "Test: answered " (status) },
                        (None, Some(failure)) if failure == "connect" => "Test: could not connect",
                        (None, Some(failure)) => { "Test: " (text(&failure.replace('_', " "))) },
                        (None, None) => "Test: no answer",
                    }
                    " after " (took) ". "
                }
                @if is_good { "The receiver accepted it." } @else { "For a batch that means: " (text(&tested.verdict)) "." }
            }
            @if let Some(error) = &tested.error { p { (text(error)) } }
            details {
                summary { "Request and answer" }
                p.muted.small { "POST " (text(&tested.url)) }
                pre role="group" tabindex="0" aria-label="Request" {
                    @for (name, value) in &tested.headers { (text(name)) ": " (text(value.as_str().unwrap_or_default())) "\n" }
                    "\n" (lines(&tested.body))
                }
                @if let Some(answer) = &tested.answer { pre role="group" tabindex="0" aria-label="Answer" { (lines(answer)) } }
            }
        }
    }
}

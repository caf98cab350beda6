//! The actions: for each a page that says what will be done and to how much, and the form that does
//! it. A page has a link to an action only for the role `admin`; a form of another role is refused.

use std::sync::Arc;

use super::{
    entry::{Console, Done, MayChange, Posted, This},
    form::Form,
    page::{Mistakes, Page, Place, delivery, form_key, lines, number, path_to, text, time},
    session::Session,
};
use crate::{
    admin::{
        answer::Refusal,
        history,
        query::{FromQuery, Name, Parameters},
        replays::{self, Begun},
        view::{
            ChangeRequest, Replay, ReplayPreview, ReplayRequest, Retried, RetryNow, Subscriber,
            Tested, Time,
        },
    },
    clock,
    queue::Queue,
    store::{ReplayChange, Store},
    wording::{counted, rounded},
};
use axum::{
    Router,
    extract::State,
    http::{StatusCode, Uri},
    response::{Redirect, Response},
    routing::{get, post},
};
use maud::{Markup, html};

/// The page of the replays.
pub(super) const REPLAYS: &str = Place::Replays.path();

pub(super) fn routes<Q: Queue, S: Store>() -> Router<Arc<Console<Q, S>>> {
    Router::new()
        .route("/console/webhooks/{name}/pause", get(ask_pause::<Q, S>).post(pause::<Q, S>))
        .route("/console/webhooks/{name}/resume", get(ask_resume::<Q, S>).post(resume::<Q, S>))
        .route("/console/webhooks/{name}/retry", get(ask_retry::<Q, S>).post(retry::<Q, S>))
        .route("/console/webhooks/{name}/test", post(test::<Q, S>).get(to_webhook::<Q, S>))
        .route("/console/webhooks/{name}/replay", get(ask_replay::<Q, S>).post(replay::<Q, S>))
        .route("/console/resend", get(ask_resend::<Q, S>).post(resend::<Q, S>))
        .route("/console/replays/{id}/continue", get(ask_continue::<Q, S>).post(go_on::<Q, S>))
        .route("/console/replays/{id}/cancel", get(ask_cancel::<Q, S>).post(cancel::<Q, S>))
}

/// The path of an action on a subscriber.
pub(super) fn path(name: &str, action: &str) -> String {
    path_to(&path_to(Place::Webhooks.path(), name), action)
}

/// A link that looks like a button, to the page of an action.
pub(super) fn link(to: &str, label: &str) -> Markup {
    html! { a.button href=(to) { (label) } }
}

/// The page that asks before an action.
struct Ask<'a> {
    session: &'a Session,
    place: Place,
    title: &'a str,
    /// What will happen, and to how much.
    says: Markup,
    to: String,
    fields: Markup,
    button: &'a str,
    /// The command that does the same.
    command: String,
    back: String,
}

impl Ask<'_> {
    fn answer(self) -> Response {
        let Self { session, place, title, says, to, fields, button, command, back } = self;
        page(session, place, title).answer(html! {
            div.head { h1 { (text(title)) } }
            section.card.pad {
                (says)
                form.deed method="post" action=(to) {
                    (form_key(session))
                    (fields)
                    div.deeds {
                        button.first { (button) }
                        a.button href=(back) { "Back" }
                    }
                }
            }
            (same(&command))
        })
    }
}

/// The command that does the same as a page.
pub(super) fn same(command: &str) -> Markup {
    html! {
        h2 { "The same in a shell" }
        pre tabindex="0" aria-label="Command" { (lines(command)) }
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

fn page<'a>(session: &'a Session, place: Place, title: &str) -> Page<'a> {
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

async fn ask_pause<Q: Queue, S: Store>(
    State(console): This<Q, S>,
    MayChange(session): MayChange,
    name: Result<Name, Refusal>,
) -> Response {
    let found = found(&console, name).await;
    asked(&session, found, |session, s| {
        let name = &s.subscriber;
        let back = path_to(Place::Webhooks.path(), name);
        Ask {
            session,
            place: Place::Webhooks,
            title: &format!("Pause {name}"),
            says: html! {
                p { "No request goes to " strong { (text(name)) } " until it is resumed. Now " (waits(s)) " wait; what comes waits in its queue, and nothing is lost." }
                @if let Some(pause) = s.paused() { p { "It is paused already, by " (text(&pause.by)) ": " (text(&pause.why)) "." } }
            },
            to: path(name, "pause"),
            fields: html! {
                div.field {
                    label for="why" { "Reason, for whoever looks later" }
                    input id="why" name="why" maxlength="500" placeholder="maintenance of the receiver";
                }
            },
            button: "Pause",
            command: format!("hooktrail pause {} --why 'REASON'", word(name)),
            back,
        }
        .answer()
    })
}

async fn ask_resume<Q: Queue, S: Store>(
    State(console): This<Q, S>,
    MayChange(session): MayChange,
    name: Result<Name, Refusal>,
) -> Response {
    let found = found(&console, name).await;
    asked(&session, found, |session, s| {
        let name = &s.subscriber;
        Ask {
            session,
            place: Place::Webhooks,
            title: &format!("Resume {name}"),
            says: html! {
                p { "Requests go to " strong { (text(name)) } " again: " (waits(s)) " wait and will be sent, the oldest first." }
                @if let Some(pause) = s.paused() { p { "Paused by " (text(&pause.by)) " since " (time(pause.since)) ": " (text(&pause.why)) "." } }
                @else { p { "It is not paused. An open circuit, or a hold, is ended by one try." } }
            },
            to: path(name, "resume"),
            fields: html! {},
            button: "Resume",
            command: format!("hooktrail resume {}", word(name)),
            back: path_to(Place::Webhooks.path(), name),
        }
        .answer()
    })
}

async fn ask_retry<Q: Queue, S: Store>(
    State(console): This<Q, S>,
    MayChange(session): MayChange,
    name: Result<Name, Refusal>,
) -> Response {
    let found = found(&console, name).await;
    asked(&session, found, |session, s| {
        let name = &s.subscriber;
        let waiting = s.lane.as_ref().and_then(|lane| lane.in_retry);
        let waiting = waiting.map_or("The batches".to_owned(), |n| counted(n, "batch(es)"));
        Ask {
            session,
            place: Place::Webhooks,
            title: &format!("Retry now: {name}"),
            says: html! {
                p { (waiting) " that wait for a retry are due at once. Bytes, ids and the count of attempts stay as they are." }
                p.muted { "Where the circuit is open, or the receiver asked for a wait, one batch is tried first, and the rest follows when it is accepted. A paused subscriber still gets nothing." }
            },
            to: path(name, "retry"),
            fields: html! {},
            button: "Retry now",
            command: format!("hooktrail retry now {}", word(name)),
            back: path_to(Place::Webhooks.path(), name),
        }
        .answer()
    })
}

async fn found<Q: Queue, S: Store>(
    console: &Console<Q, S>,
    name: Result<Name, Refusal>,
) -> Result<Subscriber, Refusal> {
    console.control.one(&name?.0).await
}

fn asked(
    session: &Session,
    found: Result<Subscriber, Refusal>,
    ask: impl FnOnce(&Session, &Subscriber) -> Response,
) -> Response {
    match found {
        Ok(found) => ask(session, &found),
        Err(refusal) => page(session, Place::Webhooks, "Webhook").refused(&refusal),
    }
}

async fn pause<Q: Queue, S: Store>(
    console: This<Q, S>,
    name: Result<Name, Refusal>,
    posted: Posted,
) -> Response {
    change(console, name, posted, true).await
}

async fn resume<Q: Queue, S: Store>(
    console: This<Q, S>,
    name: Result<Name, Refusal>,
    posted: Posted,
) -> Response {
    change(console, name, posted, false).await
}

async fn change<Q: Queue, S: Store>(
    State(console): This<Q, S>,
    name: Result<Name, Refusal>,
    Posted { session, form }: Posted,
    is_pause: bool,
) -> Response {
    let work = async {
        let name = name?.0;
        let why = Some(form.get("why").trim().to_owned()).filter(|why| !why.is_empty());
        let wanted = ChangeRequest { why };
        console.control.clone().change(name, wanted, is_pause).await
    };
    match work.await {
        Ok(changed) => {
            let name = changed.subscriber.clone();
            let what = if is_pause { "pause" } else { "resume" };
            let notice = match (is_pause, changed.changed) {
                (true, true) => "Paused.",
                (true, false) => "It was paused already.",
                (false, true) => "Resumed.",
                (false, false) => "It was not paused.",
            };
            let details = changed.paused.map(|pause| pause.why).unwrap_or_default();
            let to = path_to(Place::Webhooks.path(), &name);
            let notice = good(
                html! { (notice) @if !details.is_empty() { " Reason: " (text(&details)) "." } },
            );
            console.lead(
                &session,
                &to,
                Done { what, subject: name, details: String::new(), notice },
            )
        }
        Err(refusal) => not_done(&session, Place::Webhooks, &refusal, Place::Webhooks.path()),
    }
}

async fn retry<Q: Queue, S: Store>(
    State(console): This<Q, S>,
    name: Result<Name, Refusal>,
    Posted { session, form: _ }: Posted,
) -> Response {
    let work = async { console.control.clone().retry_now(name?.0, RetryNow::default()).await };
    match work.await {
        Ok(Retried { subscriber, moved, already_due, tried_now, paused, .. }) => {
            let notice = good(html! {
                (counted(moved, "batch(es) made")) " due now, " (already_due) " were due already."
                @if tried_now { " One batch is tried first." }
                @if paused.is_some() { " It is paused: nothing is sent before it is resumed." }
            });
            let to = path_to(Place::Webhooks.path(), &subscriber);
            let (what, details) = ("retry", String::new());
            console.lead(&session, &to, Done { what, subject: subscriber, details, notice })
        }
        Err(refusal) => not_done(&session, Place::Webhooks, &refusal, Place::Webhooks.path()),
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

async fn test<Q: Queue, S: Store>(
    State(console): This<Q, S>,
    name: Result<Name, Refusal>,
    Posted { session, form: _ }: Posted,
) -> Response {
    let work = async { console.control.test(&name?.0).await };
    match work.await {
        Ok(tested) => {
            let to = path_to(Place::Webhooks.path(), &tested.subscriber);
            let notice = report(&tested);
            let (what, subject, details) = ("test", tested.subscriber, String::new());
            console.lead(&session, &to, Done { what, subject, details, notice })
        }
        Err(refusal) => not_done(&session, Place::Webhooks, &refusal, Place::Webhooks.path()),
    }
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
                        (None, Some(failure)) => { "Test: " (text(&failure.replace('_', " "))) },
                        (None, None) => "Test: no answer",
                    }
                    " after " (took) ". "
                }
                "A daemon would say: " (text(&tested.verdict)) "."
            }
            @if let Some(error) = &tested.error { p { (text(error)) } }
            details {
                summary { "Request and answer" }
                p.muted.small { "POST " (text(&tested.url)) }
                pre tabindex="0" aria-label="Request" {
                    @for (name, value) in &tested.headers { (text(name)) ": " (text(value.as_str().unwrap_or_default())) "\n" }
                    "\n" (lines(&tested.body))
                }
                @if let Some(answer) = &tested.answer { pre tabindex="0" aria-label="Answer" { (lines(answer)) } }
            }
        }
    }
}

async fn ask_resend<Q: Queue, S: Store>(
    State(console): This<Q, S>,
    MayChange(session): MayChange,
    uri: Uri,
) -> Response {
    let form = Form::whole(uri.query().unwrap_or_default());
    let one = match console.history.delivery(form.get("id"), &session.caller).await {
        Ok(one) => one,
        Err(refusal) => return page(&session, Place::Deliveries, "Resend").refused(&refusal),
    };
    Ask {
        session: &session,
        place: Place::Deliveries,
        title: "Resend a batch",
        says: html! {
            p { "Batch " code { (text(&one.id)) } " with " (counted(one.events, "event(s)")) " goes to " strong { (text(&one.subscriber)) } " again, with the same id and the same bytes." }
            p { strong { "A receiver that remembers ids ignores it." } " To have it take the events once more, " a href=(path(&one.subscriber, "replay")) { "replay a time" } " to it: those are new batches." }
        },
        to: "/console/resend".to_owned(),
        fields: html! { input type="hidden" name="id" value=(one.id); },
        button: "Resend",
        command: format!("hooktrail resend {}", word(&one.id)),
        back: delivery(&one.id),
    }
    .answer()
}

async fn resend<Q: Queue, S: Store>(
    State(console): This<Q, S>,
    Posted { session, form }: Posted,
) -> Response {
    let id = form.get("id");
    let back = delivery(id);
    match console.again.resend(id).await {
        Ok(resent) => {
            let details = resent.details();
            let notice = good(html! { "It is sent again " (text(&details)) ", with the same id." });
            let (what, subject) = ("resend", resent.id);
            console.lead(&session, &back, Done { what, subject, details, notice })
        }
        Err(refusal) => not_done(&session, Place::Deliveries, &refusal, &back),
    }
}

/// The fields of a replay.
const FIELDS: [(&str, &str, &str); 4] = [
    ("since", "Since (UTC)", "2026-01-31T12:00"),
    ("until", "Until (UTC)", "now"),
    ("events", "Only types", "user.*"),
    ("rate", "Events a second, at most", "no limit"),
];

/// The field with the key of a replay's form: however often it is sent, it begins one replay.
const REQUEST: &str = "request";

/// The replay that a form asks for.
fn wanted(form: &Form) -> Result<ReplayRequest, Refusal> {
    form.read::<ReplayRequest>()
}

impl FromQuery for ReplayRequest {
    fn from_query(given: &mut Parameters) -> Self {
        let time = |text: &str| history::time(text).map(Time);
        Self {
            since: given.take("since", time),
            until: given.take("until", time),
            events: given.take("events", |text| Ok::<_, String>(text.to_owned())),
            rate: given.take("rate", |text| {
                text.trim().parse().map_err(|_| "must be a whole number of events in a second")
            }),
            dry_run: true,
        }
    }
}

async fn ask_replay<Q: Queue, S: Store>(
    State(console): This<Q, S>,
    MayChange(session): MayChange,
    name: Result<Name, Refusal>,
    uri: Uri,
) -> Response {
    let form = Form::of(uri.query().unwrap_or_default());
    let found = found(&console, name).await;
    let subscriber = match &found {
        Ok(found) => found.subscriber.clone(),
        Err(refusal) => return page(&session, Place::Webhooks, "Replay").refused(refusal),
    };
    let counted = match wanted(&form) {
        Ok(_) if !form.is_filled() => None,
        Ok(wanted) => {
            let (bounded, wanted) = bounded(form.clone(), wanted);
            let counted = console.again.preview(&subscriber, wanted, &session.caller).await;
            Some(counted.map(|preview| (bounded, preview)))
        }
        Err(refusal) => Some(Err(refusal)),
    };
    replay_page(&session, &subscriber, &form, counted)
}

/// Ends a replay at the time of the count: what comes later was not confirmed.
fn bounded(form: Form, wanted: ReplayRequest) -> (Form, ReplayRequest) {
    let now = Time(clock::now());
    let is_open = wanted.until.is_none_or(|until| until.0 > now.0);
    // A time that has not begun is refused as it was typed.
    if !is_open || wanted.since.is_none_or(|since| since.0 >= now.0) {
        return (form, wanted);
    }
    (form.with("until", now.to_string()), ReplayRequest { until: Some(now), ..wanted })
}

/// The page of a replay; with the form that was counted, and the number.
fn replay_page(
    session: &Session,
    name: &str,
    form: &Form,
    counted: Option<Result<(Form, ReplayPreview), Refusal>>,
) -> Response {
    let refusal = counted.as_ref().and_then(|counted| counted.as_ref().err());
    let status = refusal.map_or(StatusCode::OK, |refusal| refusal.status);
    let mistakes = Mistakes(refusal);
    let title = format!("Replay to {name}");
    let shown = FIELDS.map(|(field, ..)| field);
    page(session, Place::Webhooks, &title).answer_with(status, html! {
        div.head { h1 { (text(&title)) } }
        section.card {
            div.pad {
                p { "The events of a time go to " strong { (text(name)) } " again, from history, in new batches: its receiver takes them as new ones. Its patterns choose, and new events go on meanwhile." }
            }
            form.filters method="get" action=(path(name, "replay")) {
                @for (field, label, example) in FIELDS {
                    div.field {
                        label for=(field) { (label) }
                        input id=(field) name=(field) value=(form.get(field)) placeholder=(example) required[field == "since"]
                            aria-invalid=[mistakes.is_wrong(field)] aria-describedby=[mistakes.described_by(field)];
                        (mistakes.beside(field))
                    }
                }
                div.deeds { button { "Count" } a.button href=(path_to(Place::Webhooks.path(), name)) { "Back" } }
                (mistakes.of_others(&shown))
            }
            @match &counted {
                Some(Err(refusal)) if refusal.fields.is_empty() => div.pad { div.note.bad role="alert" { p { (text(&refusal.why)) } } },
                Some(Ok((form, preview))) => (confirm_replay(session, name, form, preview)),
                _ => {},
            }
        }
        (same(&replay_command(name, counted.as_ref().and_then(|counted| counted.as_ref().ok()).map_or(form, |(form, _)| form))))
    })
}

fn confirm_replay(session: &Session, name: &str, form: &Form, preview: &ReplayPreview) -> Markup {
    html! {
        div.pad {
            p role="status" {
                strong {
                    @if !preview.complete { "At least " }
                    (number(preview.events)) (if preview.events == 1 { " event" } else { " events" })
                }
                " from before " (text(form.get("until"))) " will be sent."
                @if !preview.complete { " Counting all takes longer than this page waits." }
            }
            form.deed method="post" action=(path(name, "replay")) {
                (form_key(session))
                input type="hidden" name=(REQUEST) value=(clock::request_key());
                @for (field, ..) in FIELDS {
                    @if !form.get(field).is_empty() { input type="hidden" name=(field) value=(form.get(field)); }
                }
                div.deeds { button.first disabled[preview.complete && preview.events == 0] { "Replay" } }
            }
        }
    }
}

fn replay_command(name: &str, form: &Form) -> String {
    let option = |field: &str, option: &str| match form.get(field) {
        "" => String::new(),
        given => format!(" --{option} {}", word(given.trim())),
    };
    let since = match option("since", "since") {
        since if since.is_empty() => " --since TIME".to_owned(),
        since => since,
    };
    let rest = [option("until", "until"), option("events", "events"), option("rate", "rate")];
    format!("hooktrail replay {}{since}{}", word(name), rest.concat())
}

async fn replay<Q: Queue, S: Store>(
    State(console): This<Q, S>,
    name: Result<Name, Refusal>,
    Posted { session, form }: Posted,
) -> Response {
    let name = name.map_or_else(|_| String::new(), |Name(name)| name);
    let given = form.get(REQUEST).to_owned();
    let form = form.without("form_key").without(REQUEST);
    let begun = match wanted(&form) {
        Ok(_) if !(1..=replays::MAX_KEY).contains(&given.len()) => {
            Err(Refusal::bad("the form has no key of its own; load its page again"))
        }
        Ok(wanted) => {
            let wanted = ReplayRequest { dry_run: false, ..wanted };
            let key = replays::key_of(&given, &name, &wanted, &session.caller);
            console.again.begin(&name, wanted, &session.caller, Some(key)).await
        }
        Err(refusal) => Err(refusal),
    };
    let has_begun =
        |id: &str| good(html! { "Replay " code { (text(id)) } " to " (text(&name)) " has begun." });
    match begun {
        Ok(Begun::Now(new)) => {
            let notice = has_begun(&new.id);
            let (what, details) = ("replay", replays::details(&new));
            console.lead(&session, REPLAYS, Done { what, subject: name, details, notice })
        }
        Ok(Begun::Before(made)) => {
            console.lead_unrecorded(&session, REPLAYS, has_begun(&Replay::recorded(&made).id))
        }
        Err(refusal) if !refusal.fields.is_empty() => {
            replay_page(&session, &name, &form, Some(Err(refusal)))
        }
        Err(refusal) => not_done(&session, Place::Webhooks, &refusal, &path(&name, "replay")),
    }
}

async fn ask_continue<Q: Queue, S: Store>(
    console: This<Q, S>,
    MayChange(session): MayChange,
    id: Result<Name, Refusal>,
) -> Response {
    ask_change(console, &session, id, true).await
}

async fn ask_cancel<Q: Queue, S: Store>(
    console: This<Q, S>,
    MayChange(session): MayChange,
    id: Result<Name, Refusal>,
) -> Response {
    ask_change(console, &session, id, false).await
}

async fn ask_change<Q: Queue, S: Store>(
    State(console): This<Q, S>,
    session: &Session,
    id: Result<Name, Refusal>,
    is_continue: bool,
) -> Response {
    let found = match id {
        Ok(Name(id)) => console.again.one(&id).await,
        Err(refusal) => Err(refusal),
    };
    let replay = match found {
        Ok(replay) => replay,
        Err(refusal) => return page(session, Place::Replays, "Replay").refused(&refusal),
    };
    let (verb, title, button, says) = if is_continue {
        ("continue", "Continue a replay", "Continue", "It goes on where it ended")
    } else {
        let says = "It ends; batches that are in the subscriber's queue are still delivered";
        ("cancel", "Cancel a replay", "End it", says)
    };
    let Replay { id, subscriber, enqueued, read, rows, .. } = &replay;
    Ask {
        session,
        place: Place::Replays,
        title,
        says: html! {
            p { "Replay " code { (text(id)) } " to " strong { (text(subscriber)) } ": " (number(*read)) " of " (number(*rows)) " rows of history are read, and " (counted(*enqueued, "event(s)")) " were put into its queue." }
            p { (says) "." }
        },
        to: path_to(&path_to(REPLAYS, id), verb),
        fields: html! {},
        button,
        command: format!("hooktrail replay {verb} {}", word(id)),
        back: REPLAYS.to_owned(),
    }
    .answer()
}

async fn go_on<Q: Queue, S: Store>(
    console: This<Q, S>,
    id: Result<Name, Refusal>,
    posted: Posted,
) -> Response {
    change_replay(console, id, posted, true).await
}

async fn cancel<Q: Queue, S: Store>(
    console: This<Q, S>,
    id: Result<Name, Refusal>,
    posted: Posted,
) -> Response {
    change_replay(console, id, posted, false).await
}

async fn change_replay<Q: Queue, S: Store>(
    State(console): This<Q, S>,
    id: Result<Name, Refusal>,
    Posted { session, form: _ }: Posted,
    is_continue: bool,
) -> Response {
    let (what, said, change) = if is_continue {
        ("continue_replay", "goes on", ReplayChange::Continued)
    } else {
        ("cancel_replay", "is cancelled", ReplayChange::Cancelled)
    };
    let work = async { console.again.change(&id?.0, change).await };
    match work.await {
        Ok(replay) => {
            let notice = good(html! { "Replay " code { (text(&replay.id)) } " " (said) "." });
            let (subject, details) = (replay.id, String::new());
            console.lead(&session, REPLAYS, Done { what, subject, details, notice })
        }
        Err(refusal) => not_done(&session, Place::Replays, &refusal, REPLAYS),
    }
}

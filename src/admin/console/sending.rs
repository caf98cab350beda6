//! The actions that send again: replay of a time, resend of a batch; a replay is continued or
//! cancelled.

use std::sync::Arc;

use axum::{
    Router,
    extract::State,
    http::{StatusCode, Uri},
    response::Response,
    routing::get,
};
use maud::{Markup, html};

use super::{
    action::{
        Act, Acted, Ask, Asks, Of, REQUEST, good, not_done, page, pair, request_of, same, word,
    },
    actions::path,
    entry::{Console, Done, MayChange, Posted, This},
    form::Form,
    notices::{DRAFT, draft_field, not_sent},
    page::{Mistakes, Place, delivery, form_key, number, path_to, text},
    session::Session,
};
use crate::{
    admin::{
        answer::Refusal,
        history,
        query::{FromQuery, Name, Parameters},
        replays::{self, Begun},
        view::{Replay, ReplayPreview, ReplayRequest, Time},
    },
    clock,
    queue::Queue,
    store::{ReplayChange, Store},
    wording::counted,
};

/// The page of the replays.
const REPLAYS: &str = Place::Replays.path();

pub(super) fn routes<Q: Queue, S: Store>() -> Router<Arc<Console<Q, S>>> {
    Router::new()
        .route("/console/webhooks/{name}/replay", get(ask_replay::<Q, S>).post(replay::<Q, S>))
        .route("/console/resend", pair::<Resend, Q, S>())
        .route("/console/replays/{id}/continue", pair::<OnReplay<true>, Q, S>())
        .route("/console/replays/{id}/cancel", pair::<OnReplay<false>, Q, S>())
}

struct Resend;

impl<Q: Queue, S: Store> Asks<Q, S> for Resend {
    async fn ask(console: &Arc<Console<Q, S>>, session: &Session, of: &Of) -> Result<Ask, Refusal> {
        let one = console.history.delivery(of.form.get("id"), &session.caller).await?;
        Ok(Ask {
            title: "Resend a batch".to_owned(),
            says: html! {
                p { "Batch " code { (text(&one.id)) } " with " (counted(one.events, "event(s)")) " goes to " strong { (text(&one.subscriber)) } " again, with the same id and the same bytes." }
                p { strong { "A receiver that remembers ids ignores it." } " To have it take the events once more, " a href=(path(&one.subscriber, "replay")) { "replay a time" } " to it: those are new batches." }
            },
            to: "/console/resend".to_owned(),
            fields: html! { input type="hidden" name="id" value=(one.id); },
            button: Some("Resend"),
            command: format!("hooktrail resend {}", word(&one.id)),
            back: delivery(&one.id),
        })
    }
}

impl<Q: Queue, S: Store> Act<Q, S> for Resend {
    const PLACE: Place = Place::Deliveries;

    async fn act(console: &Arc<Console<Q, S>>, _: &Session, of: &Of) -> Result<Acted, Refusal> {
        let resent = console.again.resend(of.form.get("id")).await?;
        let details = resent.details();
        let notice = good(html! { "It is sent again " (text(&details)) ", with the same id." });
        let (what, subject) = ("resend", resent.id);
        let to = Self::back_of(of);
        Ok(Acted { to, done: Done { what, subject, details, notice }, is_new: true })
    }

    fn back(of: &Of) -> String {
        Self::back_of(of)
    }
}

impl Resend {
    /// The page of the batch.
    fn back_of(of: &Of) -> String {
        delivery(of.form.get("id"))
    }
}

/// A replay that goes on, or is cancelled.
struct OnReplay<const IS_CONTINUE: bool>;

impl<const IS_CONTINUE: bool, Q: Queue, S: Store> Asks<Q, S> for OnReplay<IS_CONTINUE> {
    async fn ask(console: &Arc<Console<Q, S>>, _: &Session, of: &Of) -> Result<Ask, Refusal> {
        ask_change(console, of, IS_CONTINUE).await
    }
}

impl<const IS_CONTINUE: bool, Q: Queue, S: Store> Act<Q, S> for OnReplay<IS_CONTINUE> {
    const PLACE: Place = Place::Replays;

    async fn act(console: &Arc<Console<Q, S>>, _: &Session, of: &Of) -> Result<Acted, Refusal> {
        change(console, of, IS_CONTINUE).await
    }
}

async fn ask_change<Q: Queue, S: Store>(
    console: &Console<Q, S>,
    of: &Of,
    is_continue: bool,
) -> Result<Ask, Refusal> {
    let (verb, title, button, says) = if is_continue {
        ("continue", "Continue a replay", "Continue", "It goes on where it ended")
    } else {
        let says = "It ends; batches that are in the subscriber's queue are still delivered";
        ("cancel", "Cancel a replay", "End it", says)
    };
    let Replay { id, subscriber, enqueued, read, rows, .. } = console.again.one(of.name()?).await?;
    Ok(Ask {
        title: title.to_owned(),
        says: html! {
            p { "Replay " code { (text(&id)) } " to " strong { (text(&subscriber)) } ": " (number(read)) " of " (number(rows)) " rows of history are read, and " (counted(enqueued, "event(s)")) " were put into its queue." }
            p { (says) "." }
        },
        to: path_to(&path_to(REPLAYS, &id), verb),
        fields: html! {},
        button: Some(button),
        command: format!("hooktrail replay {verb} {}", word(&id)),
        back: REPLAYS.to_owned(),
    })
}

async fn change<Q: Queue, S: Store>(
    console: &Console<Q, S>,
    of: &Of,
    is_continue: bool,
) -> Result<Acted, Refusal> {
    let (what, said, change) = if is_continue {
        ("continue_replay", "goes on", ReplayChange::Continued)
    } else {
        ("cancel_replay", "is cancelled", ReplayChange::Cancelled)
    };
    let replay = console.again.change(of.name()?, change).await?;
    let notice = good(html! { "Replay " code { (text(&replay.id)) } " " (said) "." });
    let (subject, details) = (replay.id, String::new());
    let done = Done { what, subject, details, notice };
    Ok(Acted { to: REPLAYS.to_owned(), done, is_new: true })
}

/// The fields of a replay.
const FIELDS: [(&str, &str, &str); 4] = [
    ("since", "Since (UTC)", "2026-01-31T12:00"),
    ("until", "Until (UTC)", "now"),
    ("events", "Only types", "user.*"),
    ("rate", "Events a second, at most", "no limit"),
];

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
    // What was typed before the session was over.
    let kept = console.drafts.form(&session, uri.query());
    let field = kept.as_ref().map(draft_field);
    let form = kept.map_or_else(|| Form::of(uri.query().unwrap_or_default()), Form::filled);
    let form = form.without(DRAFT);
    let found = match name {
        Ok(Name(name)) => console.control.one(&name).await,
        Err(refusal) => Err(refusal),
    };
    let subscriber = match &found {
        Ok(found) => found.subscriber.clone(),
        Err(refusal) => return page(&session, Place::Webhooks, "Replay").refused(refusal),
    };
    let counted = match wanted(&form) {
        Ok(_) if !form.is_filled() => None,
        Ok(wanted) => {
            // As it was counted: `2h` would be another time when it is sent.
            let exact = [("since", wanted.since), ("until", wanted.until)];
            let form = exact.into_iter().fold(form.clone(), |form, (field, at)| match at {
                Some(at) => form.with(field, at.to_string()),
                None => form,
            });
            let (bounded, wanted) = bounded(form, wanted);
            let counted = console.again.preview(&subscriber, wanted, &session.caller).await;
            Some(counted.map(|preview| (bounded, preview)))
        }
        Err(refusal) => Some(Err(refusal)),
    };
    replay_page(&session, &subscriber, &form, counted, field)
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

/// The page of a replay; with the form that was counted, and the number. `kept`: the field of a form
/// that was kept while its browser was signed out.
fn replay_page(
    session: &Session,
    name: &str,
    form: &Form,
    counted: Option<Result<(Form, ReplayPreview), Refusal>>,
    kept: Option<Markup>,
) -> Response {
    let refusal = counted.as_ref().and_then(|counted| counted.as_ref().err());
    let status = refusal.map_or(StatusCode::OK, |refusal| refusal.status);
    let mistakes = Mistakes(refusal);
    let title = format!("Replay to {name}");
    let shown = FIELDS.map(|(field, ..)| field);
    page(session, Place::Webhooks, &title).answer_with(status, html! {
        div.head { h1 { (text(&title)) } }
        @if kept.is_some() { (not_sent("")) }
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
                Some(Ok((form, preview))) => (confirm_replay(session, name, form, preview, kept)),
                _ => {},
            }
        }
        (same(&replay_command(name, counted.as_ref().and_then(|counted| counted.as_ref().ok()).map_or(form, |(form, _)| form))))
    })
}

fn confirm_replay(
    session: &Session,
    name: &str,
    form: &Form,
    preview: &ReplayPreview,
    kept: Option<Markup>,
) -> Markup {
    html! {
        div.pad {
            p role="status" {
                strong {
                    @if !preview.complete { "At least " }
                    (number(preview.events)) (if preview.events == 1 { " event" } else { " events" })
                }
                " from " (text(form.get("since"))) " on and before " (text(form.get("until"))) " will be sent."
                @if !preview.complete { " Counting all takes longer than this page waits." }
            }
            form.deed method="post" action=(path(name, "replay")) {
                (form_key(session))
                @if let Some(field) = kept { (field) }
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
    let ending = console.clone();
    ending.to_its_end(async move { replayed(&console, &session, name, form).await }).await
}

async fn replayed<Q: Queue, S: Store>(
    console: &Console<Q, S>,
    session: &Session,
    name: String,
    form: Form,
) -> Response {
    let (given, sent) = (request_of(&form), form.clone());
    let form = ["form_key", REQUEST, DRAFT].into_iter().fold(form, Form::without);
    let begun = match (wanted(&form), given) {
        (Ok(wanted), Ok(given)) => {
            let wanted = ReplayRequest { dry_run: false, ..wanted };
            let key = replays::key_of(given, &name, &wanted, &session.caller);
            console.again.begin(&name, wanted, &session.caller, Some(key)).await
        }
        (Err(refusal), _) | (_, Err(refusal)) => Err(refusal),
    };
    let has_begun =
        |id: &str| good(html! { "Replay " code { (text(id)) } " to " (text(&name)) " has begun." });
    if begun.is_ok() {
        console.drafts.done(session, &sent);
    }
    match begun {
        Ok(Begun::Now(new)) => {
            let notice = has_begun(&new.id);
            let (what, details) = ("replay", replays::details(&new));
            console.lead(session, REPLAYS, Done { what, subject: name, details, notice })
        }
        Ok(Begun::Before(made)) => {
            console.lead_unrecorded(session, REPLAYS, has_begun(&Replay::recorded(&made).id))
        }
        Err(refusal) if !refusal.fields.is_empty() => {
            replay_page(session, &name, &form, Some(Err(refusal)), None)
        }
        Err(refusal) => not_done(session, Place::Webhooks, &refusal, &path(&name, "replay")),
    }
}

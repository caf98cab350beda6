//! *Replays*: those of history, the latest first, to go on with or to end.

use std::sync::Arc;

use axum::{
    Router,
    extract::State,
    http::{StatusCode, Uri},
    response::{IntoResponse as _, Redirect, Response},
    routing::get,
};
use maud::{Markup, html};

use super::{
    actions,
    entry::{Console, MayChange, SignedIn, This},
    form::Form,
    page::{Page, Place, Tone, number, path_to, query, short, state, text, time},
    session::Session,
    table::{
        Column::{self, Number, Text},
        table,
    },
};
use crate::{
    admin::{
        answer::Refusal,
        replays::Part,
        view::{Replay, ReplayList, ReplayOutcome},
    },
    queue::Queue,
    store::Store,
    wording::agreed,
};

/// The page that asks for the webhook and the time of a new replay.
const NEW: &str = "/console/replays/new";

/// The fields that choose the events of a replay, as the page of the webhook's replay calls them.
const CHOSEN: [&str; 3] = ["since", "until", "events"];

/// The filters of the Audit Log that a replay lacks.
const LACKING: [&str; 6] = ["text", "actor", "resource", "tenant", "id", "by"];

const COLUMNS: [Column; 7] = [
    Text("Begun"),
    Text("Subscriber"),
    Text("State"),
    Text("Time"),
    Number("Enqueued"),
    Text("Batches"),
    Text("Replay"),
];

pub(super) fn routes<Q: Queue, S: Store>() -> Router<Arc<Console<Q, S>>> {
    Router::new().route(Place::Replays.path(), get(list::<Q, S>)).route(NEW, get(ask_new::<Q, S>))
}

/// The page of a new replay of these events. It names the filters that a replay lacks.
pub(super) fn new_of(filters: &Form) -> String {
    filters.link(NEW, None)
}

/// Whether the Audit Log is narrowed by more than a replay can be.
pub(super) fn is_narrowed_otherwise(filters: &Form) -> bool {
    LACKING.iter().any(|name| !filters.get(name).is_empty())
}

/// Leads to the webhook's own page of a replay, once a webhook is chosen.
async fn ask_new<Q: Queue, S: Store>(
    State(console): This<Q, S>,
    MayChange(session): MayChange,
    uri: Uri,
) -> Response {
    let form = Form::of(uri.query().unwrap_or_default());
    let (name, names) = (form.get("subscriber"), console.control.names());
    if names.iter().any(|known| known == name) {
        let given = CHOSEN.map(|field| (field, form.get(field)));
        let given: Vec<_> = given.into_iter().filter(|(_, value)| !value.is_empty()).collect();
        return Redirect::to(&query(&actions::path(name, "replay"), &given)).into_response();
    }
    new(&session, &form, &names)
}

fn new(session: &Session, form: &Form, subscribers: &[String]) -> Response {
    // The Audit Log's filter of types is called otherwise.
    let events = if form.get("events").is_empty() { form.get("type") } else { form.get("events") };
    let gone = !form.get("subscriber").is_empty();
    let fields = [
        ("since", "Since (UTC)", form.get("since"), "2026-01-31 12:00"),
        ("until", "Until (UTC)", form.get("until"), "now"),
        ("events", "Only types", events, "user.*"),
    ];
    let ignored: Vec<_> = form.fields().filter(|(name, _)| LACKING.contains(name)).collect();
    let page =
        Page { session, place: Place::Replays, title: "New replay".to_owned(), refresh: None };
    page.answer(html! {
        div.head { h1 { "New replay" } }
        section.card {
            div.pad {
                p { "The events of a time go to a webhook again, from history, in new batches. The next page counts them before anything is sent." }
                @if !ignored.is_empty() {
                    div.note role="status" {
                        p {
                            "A replay takes all events of a time, or those of some types. It ignores these filters of the Audit Log: "
                            @for (n, (name, value)) in ignored.iter().enumerate() {
                                @if n > 0 { ", " }
                                (short(name)) " " code { (short(value)) }
                            }
                            "."
                        }
                    }
                }
            }
            form.filters method="get" action=(NEW) {
                div.field {
                    label for="subscriber" { "Subscriber" }
                    select id="subscriber" name="subscriber" required aria-invalid=[gone.then_some("true")] aria-describedby=[gone.then_some("no-subscriber")] {
                        option value="" { "choose one" }
                        @for name in subscribers { option value=(name) { (text(name)) } }
                    }
                    @if gone { span.wrong id="no-subscriber" { "no subscriber of that name is configured" } }
                }
                @for (name, label, value, example) in fields {
                    div.field {
                        label for=(name) { (label) }
                        input id=(name) name=(name) value=(value) placeholder=(example) required[name == "since"];
                    }
                }
                div.deeds { button.first { "Count" } a.button href=(Place::Replays.path()) { "Back" } }
            }
        }
        (actions::same("hooktrail replay NAME --since TIME --until TIME --dry-run"))
    })
}

async fn list<Q: Queue, S: Store>(
    State(console): This<Q, S>,
    SignedIn(session): SignedIn,
    uri: Uri,
) -> Response {
    let form = Form::of(uri.query().unwrap_or_default()).without("notice");
    let found = match form.read::<Part>() {
        Ok(Part { before, limit }) => console.again.list(before, limit).await,
        Err(refusal) => Err(refusal),
    };
    let notice = console.notices.of(&session, uri.query());
    shown(&session, notice, &form, found)
}

fn shown(
    session: &Session,
    notice: Option<Markup>,
    form: &Form,
    found: Result<ReplayList, Refusal>,
) -> Response {
    let page =
        Page { session, place: Place::Replays, title: "Replays".to_owned(), refresh: Some(5) };
    let list = match found {
        Ok(list) => list,
        Err(refusal) => return page.refused(&refusal),
    };
    page.answer_with(StatusCode::OK, html! {
        (notice.unwrap_or_default())
        div.head {
            h1 { "Replays" }
            @if session.caller.may_change() { div.deeds { a.button.first href=(NEW) { "New replay" } } }
        }
        p.muted { "A replay puts the events of a time into a webhook's queue again, as new batches. " strong { "Done" } " says that all are there. The column Batches says how they ended." }
        div id="replays" data-live {
            section.card {
                @if list.replays.is_empty() {
                    div.empty { p { "Nothing was replayed." } }
                } @else {
                    (table("Replays", &COLUMNS, html! { @for one in &list.replays { (row(session, one)) } }))
                }
                @if list.next.is_some() || !form.get("cursor").is_empty() {
                    div.pager {
                        @if !form.get("cursor").is_empty() { a href=(Place::Replays.path()) { "Latest" } }
                        @if let Some(next) = &list.next { a rel="next" href=(form.link(Place::Replays.path(), Some(next))) { "Older" } }
                    }
                }
            }
        }
        (actions::same("hooktrail replay list"))
    })
}

/// Done is good only once each batch is delivered. History does not count what became of halves.
fn tone(one: &Replay) -> Tone {
    let ReplayOutcome { dead, waiting, retrying, split, unknown, .. } = one.outcome;
    match one.state.as_str() {
        "failed" | "unreadable" => Tone::Bad,
        "done" if dead > 0 => Tone::Bad,
        "done" if waiting + retrying + split + unknown == 0 => Tone::Good,
        _ => Tone::Quiet,
    }
}

fn row(session: &Session, one: &Replay) -> Markup {
    let action = match one.state.as_str() {
        "running" => Some(("cancel", "Cancel")),
        "cancelled" | "failed" => Some(("continue", "Continue")),
        _ => None,
    };
    html! {
        tr {
            td { (time(one.created_at)) span.sub { @if one.start_from { "start_from" } @else { "by " (text(&one.by)) } } }
            th scope="row" { a href=(path_to(Place::Webhooks.path(), &one.subscriber)) { (text(&one.subscriber)) } }
            td.wide {
                (state(tone(one), &one.state))
                @if let Some(why) = &one.why { span.sub { (short(why)) } }
                @if one.state != "done" && one.rows > 0 { span.sub { (number(one.read)) " of " (number(one.rows)) " rows of history read" } }
                @if one.unusable > 0 { span.sub { (number(one.unusable)) " cannot be sent" } }
                @if one.missing > 0 { span.sub { (number(one.missing)) " rows are missing" } }
            }
            td {
                @if let Some(since) = one.since { (time(since)) }
                span.sub {
                    @match one.until { Some(until) => { "until " (time(until)) }, None => "until it began" }
                    @if let Some(events) = &one.events { " · " (short(events)) }
                }
            }
            td.number { (number(one.enqueued)) span.sub { (agreed(&one.enqueued, "event(s)")) } }
            td { (batches(one)) }
            td.wide {
                @if let Some((action, label)) = action.filter(|_| session.caller.may_change()) {
                    (actions::link(&path_to(&path_to(Place::Replays.path(), &one.id), action), label))
                }
                span.sub.mono { (text(&one.id)) }
            }
        }
    }
}

/// A replay's batches by their states. A number leads to the webhook's deliveries of that state since the
/// replay began, among which they are.
fn batches(one: &Replay) -> Markup {
    let deliveries = |state: &str| {
        let begun = one.created_at.to_string();
        let wanted = [("subscriber", one.subscriber.as_str()), ("state", state), ("since", &begun)];
        query(Place::Deliveries.path(), &wanted)
    };
    html! {
        @if one.batches == 0 { span.muted { "none" } }
        @for (became, n) in one.outcome.states() {
            span.sub {
                @match became {
                    "waiting" => { (number(n)) " waiting" },
                    "unknown" => { (number(n)) " unknown" },
                    _ => a href=(deliveries(became)) { (number(n)) " " (became) },
                }
                @if became == "delivered" { " of " (number(one.batches)) }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{
            page::testing::{HOSTILE, is_inert},
            session,
        },
        *,
    };
    use crate::admin::view::Time;

    #[test]
    fn the_texts_of_a_replay_are_inert() {
        let (hostile, at) = (|| HOSTILE.to_owned(), Time(std::time::SystemTime::UNIX_EPOCH));
        let replay = Replay {
            id: hostile(),
            subscriber: hostile(),
            state: "failed".to_owned(),
            why: Some(hostile()),
            by: hostile(),
            created_at: at,
            changed_at: at,
            since: Some(at),
            until: None,
            events: Some(hostile()),
            rate: None,
            rows: 0,
            read: 0,
            matched: 0,
            enqueued: 0,
            unusable: 0,
            batches: 6,
            outcome: ReplayOutcome::ONE_EACH,
            missing: 0,
            start_from: false,
        };
        is_inert(&row(&session::of_admin(), &replay).into_string(), 5);
    }
}

//! *Replays*: those of history, the latest first, to go on with or to end.

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
    actions,
    entry::{Console, SignedIn, This},
    form::Form,
    page::{Page, Place, Tone, number, path_to, short, state, text, time},
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
        view::{Replay, ReplayList},
    },
    queue::Queue,
    store::Store,
    wording::counted,
};

const COLUMNS: [Column; 7] = [
    Text("Begun"),
    Text("Subscriber"),
    Text("State"),
    Text("Events of"),
    Number("Read"),
    Number("Enqueued"),
    Text("Replay"),
];

pub(super) fn routes<Q: Queue, S: Store>() -> Router<Arc<Console<Q, S>>> {
    Router::new().route(Place::Replays.path(), get(list::<Q, S>))
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
        div.head { h1 { "Replays" } }
        p.muted { "The page of a " a href=(Place::Webhooks.path()) { "webhook" } " replays the events of a time to it. What is enqueued is delivered as all else: see the webhook's deliveries." }
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

fn row(session: &Session, one: &Replay) -> Markup {
    let tone = match one.state.as_str() {
        "done" => Tone::Good,
        "failed" | "unreadable" => Tone::Bad,
        _ => Tone::Quiet,
    };
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
                (state(tone, &one.state))
                @if let Some(why) = &one.why { span.sub { (short(why)) } }
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
            td.number { (number(one.read)) span.sub { "of " (number(one.rows)) } }
            td.number { (number(one.enqueued)) span.sub { (counted(one.batches, "batch(es)")) } }
            td.wide {
                @if let Some((action, label)) = action.filter(|_| session.caller.may_change()) {
                    (actions::link(&path_to(&path_to(Place::Replays.path(), &one.id), action), label))
                }
                span.sub.mono { (text(&one.id)) }
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
            batches: 0,
            unfinished: 0,
            missing: 0,
            start_from: false,
        };
        is_inert(&row(&session::of_admin(), &replay).into_string(), 5);
    }
}

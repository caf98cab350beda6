//! The frame of all pages, and the parts that they share.

use axum::{
    http::{HeaderName, HeaderValue, StatusCode, header},
    response::{Html, IntoResponse, Response},
};
use maud::{DOCTYPE, Markup, PreEscaped, html};

use super::{
    assets::{ICON, MODULE, STYLE},
    session::Session,
};
use crate::{
    admin::{
        answer::Refusal,
        view::{Party, Reach, Time},
    },
    event::Pattern,
    wording::{self, grouped},
};

/// What a browser may do with a page: nothing but show it with its own assets, and send its forms
/// back. <https://www.w3.org/TR/CSP3/>
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'";

/// The most characters of a stranger's text in a list, and under another one.
const SHOWN: usize = 200;
const SHOWN_UNDER: usize = 60;

/// The pages of the navigation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    Overview,
    Events,
    Webhooks,
    Deliveries,
    Replays,
    DeadLetters,
    Health,
}

impl Place {
    const ALL: [Self; 7] = [
        Self::Overview,
        Self::Events,
        Self::Webhooks,
        Self::Deliveries,
        Self::Replays,
        Self::DeadLetters,
        Self::Health,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Overview => "Overview",
            Self::Events => "Audit Log",
            Self::Webhooks => "Webhooks",
            Self::Deliveries => "Deliveries",
            Self::Replays => "Replays",
            Self::DeadLetters => "Dead letters",
            Self::Health => "Health",
        }
    }

    pub(super) const fn path(self) -> &'static str {
        match self {
            Self::Overview => "/console/",
            Self::Events => "/console/events",
            Self::Webhooks => "/console/webhooks",
            Self::Deliveries => "/console/deliveries",
            Self::Replays => "/console/replays",
            Self::DeadLetters => "/console/dead-letters",
            Self::Health => "/console/health",
        }
    }
}

/// A page for a signed-in browser.
pub(super) struct Page<'a> {
    pub(super) session: &'a Session,
    pub(super) place: Place,
    pub(super) title: String,
    /// Seconds between two looks at what is marked as live; `None` if nothing is.
    pub(super) refresh: Option<u32>,
}

impl Page<'_> {
    pub(super) fn answer(self, content: Markup) -> Response {
        self.answer_with(StatusCode::OK, content)
    }

    pub(super) fn answer_with(self, status: StatusCode, content: Markup) -> Response {
        let bar = html! {
            header.bar {
                div.bar-in {
                    a.brand href=(Place::Overview.path()) { (logo()) "hooktrail" }
                    nav aria-label="Pages" {
                        ul {
                            @for place in Place::ALL {
                                li { a href=(place.path()) aria-current=[(place == self.place).then_some("page")] { (place.name()) } }
                            }
                        }
                    }
                    form.who method="post" action="/console/sign-out" {
                        (form_key(self.session))
                        @if let Some(name) = &self.session.caller.token { span { (text(name)) } }
                        button.plain { "Sign out" }
                    }
                }
            }
        };
        answer(status, frame(&self.title, self.refresh, bar, content))
    }

    /// The page of a request that cannot be answered.
    pub(super) fn refused(self, refusal: &Refusal) -> Response {
        let heading = match refusal.status {
            StatusCode::NOT_FOUND => "There is nothing here",
            StatusCode::SERVICE_UNAVAILABLE => "This cannot be shown now",
            _ => "This cannot be shown",
        };
        let content = html! {
            div.head { h1 { (heading) } }
            div.note.bad { p { (text(&refusal.why)) } }
        };
        self.answer_with(refusal.status, content)
    }
}

/// The hidden field that a form needs.
pub(super) fn form_key(session: &Session) -> Markup {
    html! { input type="hidden" name="form_key" value=(session.form_key); }
}

/// A page without a session.
pub(super) fn outside(status: StatusCode, title: &str, content: Markup) -> Response {
    answer(status, frame(title, None, html! {}, content))
}

fn frame(title: &str, refresh: Option<u32>, bar: Markup, content: Markup) -> Markup {
    html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                title { (text(title)) " · hooktrail" }
                link rel="icon" href=(ICON.path);
                link rel="stylesheet" href=(STYLE.path);
                script type="module" src=(MODULE.path) {}
            }
            body data-refresh=[refresh] {
                a.skip href="#main" { "To the content" }
                (bar)
                main id="main" { (content) }
            }
        }
    }
}

fn answer(status: StatusCode, page: Markup) -> Response {
    const HEADERS: [(HeaderName, HeaderValue); 6] = [
        (header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(POLICY)),
        (header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
        // `no-referrer` would have browsers send forms with `origin: null`.
        (header::REFERRER_POLICY, HeaderValue::from_static("same-origin")),
        (header::CACHE_CONTROL, HeaderValue::from_static("no-store")),
        // Pages of other sites, and of other ports here, neither load nor reach into a page.
        (
            HeaderName::from_static("cross-origin-resource-policy"),
            HeaderValue::from_static("same-origin"),
        ),
        (
            HeaderName::from_static("cross-origin-opener-policy"),
            HeaderValue::from_static("same-origin"),
        ),
    ];
    (status, HEADERS, Html(page.into_string())).into_response()
}

pub(super) fn logo() -> Markup {
    // Our own file, and no text of anybody else's.
    PreEscaped(include_str!("assets/icon.svg").replacen("<svg ", "<svg aria-hidden=\"true\" ", 1))
}

/// A stranger's text, with what turns the direction of the page, and what nobody sees, spelled out.
pub(super) fn text(text: &str) -> String {
    wording::visible(text)
}

/// The same with its line breaks.
pub(super) fn lines(given: &str) -> String {
    given.split('\n').map(text).collect::<Vec<_>>().join("\n")
}

/// The same in one line, cut for a list.
pub(super) fn short(given: &str) -> String {
    cut(given, SHOWN)
}

fn cut(given: &str, most: usize) -> String {
    match given.char_indices().nth(most) {
        Some((end, _)) => format!("{}…", text(&given[..end])),
        None => text(given),
    }
}

pub(super) fn number(n: impl Into<u64>) -> String {
    grouped(n)
}

/// A time in UTC to the second.
pub(super) fn time(at: Time) -> Markup {
    let exact = at.to_string();
    // `2026-01-31T12:00:00.000Z`
    let shown = match (exact.get(..10), exact.get(11..19)) {
        (Some(day), Some(time)) => format!("{day} {time} UTC"),
        _ => exact.clone(),
    };
    html! { time.nowrap datetime=(exact) { (shown) } }
}

/// A tenant, as a link to what this place has of it.
pub(super) fn of_tenant(place: Place, tenant: &str) -> Markup {
    html! { a href=(query(place.path(), &[("tenant", tenant)])) { (short(tenant)) } }
}

/// The name of an actor or a resource, with its id and type under it.
pub(super) fn party(party: &Party, link: Option<(&str, &str)>) -> Markup {
    fn seen(part: &Option<String>) -> Option<&str> {
        part.as_deref().filter(|text| !text.trim().is_empty())
    }
    let (id, kind) = (seen(&party.id), seen(&party.kind));
    let Some(first) = seen(&party.name).or(id).or(kind) else {
        return html! { span.muted { "none" } };
    };
    let second = [kind, id].into_iter().flatten().filter(|part| *part != first);
    let second = second.map(|part| cut(part, SHOWN_UNDER)).collect::<Vec<_>>().join(" · ");
    html! {
        @match (id, link) {
            (Some(id), Some((path, parameter))) => a href=(query(path, &[(parameter, id)])) { (short(first)) },
            _ => (short(first)),
        }
        @if !second.is_empty() { span.sub { (second) } }
    }
}

/// A button that copies the text of an element. The module shows it: without scripts it does nothing.
pub(super) fn copy(of: &str) -> Markup {
    html! { button type="button" data-copy=(of) hidden { "Copy" } }
}

/// A path with a query, or with more of one.
pub(super) fn query(path: &str, pairs: &[(&str, &str)]) -> String {
    let pairs = pairs.iter().filter(|(_, value)| !value.is_empty());
    let text = url::form_urlencoded::Serializer::new(String::new()).extend_pairs(pairs).finish();
    let joint = if path.contains('?') { '&' } else { '?' };
    if text.is_empty() { path.to_owned() } else { format!("{path}{joint}{text}") }
}

/// The events of a type. `None`: as a pattern these words select others, or are none.
pub(super) fn of_type(event_type: &str) -> Option<String> {
    let is_exact = Pattern::try_new(event_type).is_ok() && !event_type.contains(['*', '#']);
    is_exact.then(|| query(Place::Events.path(), &[("type", event_type)]))
}

/// A path that ends with a stranger's text. It is neither blank nor a dot or two, which no path can
/// end with: see [`delivery`].
pub(super) fn path_to(base: &str, last: &str) -> String {
    let mut url = url::Url::parse("http://localhost").expect("a URL");
    url.path_segments_mut().expect("it has a path").push(last);
    format!("{base}{}", url.path())
}

/// The page of a batch by its id, which for an event that never became one is any text.
pub(super) fn delivery(id: &str) -> String {
    if id.trim().is_empty() || matches!(id, "." | "..") {
        return query("/console/delivery", &[("id", id)]);
    }
    path_to(Place::Deliveries.path(), id)
}

/// The urgency of a word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Tone {
    Good,
    Warn,
    Bad,
    Quiet,
}

impl Tone {
    pub(super) fn class(self) -> &'static str {
        match self {
            Self::Good => "good",
            Self::Warn => "warn",
            Self::Bad => "bad",
            Self::Quiet => "quiet",
        }
    }

    /// The tone of a state of a delivery, or of an event for one subscriber.
    pub(super) fn of_state(state: &str) -> Self {
        match state {
            "delivered" => Self::Good,
            "retrying" | "interrupted" | "unknown" => Self::Warn,
            "dead" => Self::Bad,
            _ => Self::Quiet,
        }
    }
}

pub(super) fn state(tone: Tone, word: &str) -> Markup {
    html! { span.state.(tone.class()) { (text(&word.replace('_', " "))) } }
}

/// The mistakes of a form, each beside its field.
pub(super) struct Mistakes<'r>(pub(super) Option<&'r Refusal>);

impl Mistakes<'_> {
    fn of(&self, name: &str) -> Option<&str> {
        let fields = &self.0?.fields;
        fields.iter().find(|e| e.field == name).map(|e| e.detail.as_str())
    }

    /// The value of `aria-invalid`.
    pub(super) fn is_wrong(&self, name: &str) -> Option<&'static str> {
        self.of(name).map(|_| "true")
    }

    /// The value of `aria-describedby`.
    pub(super) fn described_by(&self, name: &str) -> Option<String> {
        self.of(name).map(|_| format!("wrong-{name}"))
    }

    /// The text below a field.
    pub(super) fn beside(&self, name: &str) -> Markup {
        html! { @if let Some(wrong) = self.of(name) { span.wrong id=(format!("wrong-{name}")) { (text(wrong)) } } }
    }

    /// The mistakes in parameters that have no field among `shown`.
    pub(super) fn of_others(&self, shown: &[&str]) -> Markup {
        let fields = self.0.iter().flat_map(|refusal| &refusal.fields);
        let others = fields.filter(|e| !shown.contains(&e.field.as_str()));
        html! {
            @for e in others { p.wrong role="alert" { code { (short(&e.field)) } " in the address " (text(&e.detail)) "." } }
        }
    }
}

/// Why history begins where it does, beside the time at which it does.
fn why_there(why: &str) -> &str {
    match why.strip_prefix("history began on ") {
        Some(began) => began.split_once(": ").map_or("nothing was kept before", |(_, why)| why),
        None => why,
    }
}

/// How far history reaches, and what it lacks.
pub(super) fn reach(reach: &Reach, what: &str) -> Markup {
    let begins = if what == "events" { reach.events_from } else { reach.deliveries_from };
    html! {
        @for gap in reach.gaps.iter().filter(|gap| gap.what == what) {
            div.note.warn {
                p {
                    "From " (time(gap.from)) " to " (time(gap.until)) " some " (what) " may be missing"
                    @if let Some(n) = gap.missing { " (" (number(n)) " of them)" }
                    ": " (text(&gap.why)) "."
                }
            }
        }
        p.muted.small {
            @match begins {
                Some(at) => { "History of " (what) " begins at " (time(at)) ": " (text(why_there(&reach.why))) "." },
                None => { "History has no " (what) " yet." },
            }
        }
    }
}

#[cfg(test)]
pub(super) mod testing {
    use axum::response::Response;

    /// A stranger's text that no page may have as it is.
    pub(in super::super) const HOSTILE: &str = "<script>alert(1)</script>\u{202e}\"'";

    /// Checks that a page shows a [`HOSTILE`] text that many times, and only inert.
    pub(in super::super) fn is_inert(page: &str, times: usize) {
        assert_eq!(page.matches("&lt;script&gt;alert(1)&lt;/script&gt;").count(), times, "{page}");
        assert!(!page.contains("<script>alert") && !page.contains('\u{202e}'), "{page}");
    }

    pub(in super::super) async fn body(response: Response) -> String {
        let bytes = axum::body::to_bytes(response.into_body(), usize::MAX).await.expect("a body");
        String::from_utf8(bytes.to_vec()).expect("UTF-8")
    }
}

#[cfg(test)]
mod tests {
    use super::{
        testing::{HOSTILE, body, is_inert},
        *,
    };
    use crate::admin::console::session;

    #[tokio::test]
    async fn the_reason_of_a_refusal_is_inert() {
        let (session, title) = (session::of_admin(), "Replays".to_owned());
        let page = Page { session: &session, place: Place::Replays, title, refresh: None };
        let refusal = Refusal::new(StatusCode::NOT_FOUND, HOSTILE.to_owned());
        is_inert(&body(page.refused(&refusal)).await, 1);
    }

    #[test]
    fn what_strangers_wrote_is_inert() {
        let found = html! { a title=(text(HOSTILE)) href=(path_to("/console/x", "../y?z#é")) { (text(HOSTILE)) } }
            .into_string();
        is_inert(&found, 2);
        assert!(found.contains("\\u{202e}") && found.contains("&quot;"), "{found}");
        assert!(found.contains("/console/x/..%2Fy%3Fz%23%C3%A9"), "{found}");
        let long = short(&"é".repeat(1000));
        assert!(long.ends_with('…') && long.chars().count() == SHOWN + 1);
        assert_eq!(query("/p", &[("a", "x y&z"), ("b", "")]), "/p?a=x+y%26z");
        assert_eq!(query("/p?a=1", &[("b", "2")]), "/p?a=1&b=2");
        for (id, path) in
            [("msg_1", "deliveries/msg_1"), (".", "delivery?id=."), (" ", "delivery?id=+")]
        {
            assert_eq!(delivery(id), format!("/console/{path}"));
        }
    }
}

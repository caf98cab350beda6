//! The page with the form, and beside it the test.

use std::{borrow::Cow, collections::BTreeSet};

use axum::{http::StatusCode, response::Response};
use maud::{Markup, html};

use super::{
    NEW,
    document::{AS_IT_IS, FIELDS, MORE, OF_FORMATS, PRESET_SHOWN, SIGNATURES, VERSION, of_form},
    preview::Preview,
};
use crate::{
    admin::{
        answer::Refusal,
        console::{
            actions::{self, report},
            form::Form,
            notices::{draft_field, not_sent},
            page::{Mistakes, Page, Place, form_key, path_to, text},
            session::Session,
            sign_in::without_userinfo,
        },
        view::{FieldError, ProblemKind, Tested},
    },
    config::model::Model,
};

/// The formats, and what a body is in each; the first is the default.
const FORMATS: [(&str, &str); 7] = [
    ("json", "JSON: {\"events\":[…]}"),
    ("jsonl", "JSON Lines: one event a line"),
    ("json_array", "JSON array: […]"),
    ("single", "Single: one event a request"),
    ("splunk_hec", "Splunk HEC: {\"event\":…}{\"event\":…}"),
    ("cloudevents_batch", "CloudEvents: a JSON batch"),
    ("slack", "Slack: a line of text for each event"),
];

/// The page with the form.
pub(super) struct Sheet<'a> {
    pub(super) session: &'a Session,
    /// The webhook that is changed; `None` for a new one.
    pub(super) name: Option<&'a str>,
    pub(super) form: &'a Form,
    /// What came of the last request: a test, or why it was not done.
    pub(super) came: Option<Result<Tested, Refusal>>,
    /// The form was kept while its browser was signed out.
    pub(super) is_kept: bool,
    pub(super) preview: Preview,
    /// Events have tenants.
    pub(super) tenants: bool,
}

impl Sheet<'_> {
    pub(super) fn answer(self) -> Response {
        let Self { session, name, form, came, is_kept, preview, tenants } = self;
        let came = came.map(|came| came.map_err(of_form));
        let refusal = came.as_ref().and_then(|came| came.as_ref().err());
        let status = refusal.map_or(StatusCode::OK, |refusal| refusal.status);
        let title = name.map_or("New webhook".to_owned(), |name| format!("Edit {name}"));
        let to = name.map_or(NEW.to_owned(), |name| actions::path(name, "edit"));
        let back = name.map_or(Place::Webhooks.path().to_owned(), |name| {
            path_to(Place::Webhooks.path(), name)
        });
        let page = Page { session, place: Place::Webhooks, title: text(&title), refresh: None };
        page.answer_with(status, html! {
            div.head { h1 { (text(&title)) } }
            @if let Some(refusal) = refusal { (problem(refusal, name)) }
            @if is_kept {
                (not_sent(", but for a signing secret, and the name and password in the URL: type those again"))
            }
            div.sheet {
                section.card.pad aria-label="Configuration" {
                    form.deed id="webhook" method="post" action=(to) data-previews=(format!("{to}/preview")) {
                        (form_key(session))
                        (draft_field(form))
                        @if name.is_some() { input type="hidden" name=(VERSION) value=(form.get(VERSION)); }
                        (fields(form, name, &Mistakes(refusal), tenants))
                        div.deeds {
                            button.first { "Save" }
                            a.button href=(back) { "Back" }
                        }
                    }
                }
                div.beside {
                    section.card.pad aria-labelledby="match" {
                        h2 id="match" { "What the patterns match" }
                        (preview.matches(form))
                        div.deeds { button form="webhook" formaction=(format!("{to}/preview#match")) { "Show matches" } }
                    }
                    section.card.pad aria-labelledby="try" {
                        h2 id="try" { "Test your integration" }
                        p { "One event " code { "hooktrail.test" } " goes to the URL as it is in the form, nothing is saved. Here stands what was sent, byte for byte, and what came back." }
                        p.muted.small { "Without a secret in the form, " @if name.is_some() { "it is signed with the one in use." } @else { "it is signed with one made for the test." } }
                        div.deeds { button form="webhook" formaction=(format!("{to}/test#try")) { "Run Test" } }
                        @if let Some(Ok(tested)) = &came { (report(tested)) }
                    }
                    section.card.pad aria-labelledby="sample" {
                        h2 id="sample" { "An example of the payload" }
                        (preview.example())
                    }
                }
            }
        })
    }
}

/// Why it was not done, with the mistakes that no field of the form has.
fn problem(refusal: &Refusal, name: Option<&str>) -> Markup {
    // The name stands in the form of a new webhook alone.
    let is_of_form = |e: &&FieldError| {
        FIELDS.iter().any(|(field, _)| *field == e.field) && (name.is_none() || e.field != "name")
    };
    let (here, others): (Vec<_>, Vec<_>) = refusal.fields.iter().partition(is_of_form);
    let here: BTreeSet<&str> = here.iter().map(|e| e.field.as_str()).collect();
    html! {
        div.note.bad role="alert" {
            @match (refusal.kind, name) {
                (ProblemKind::Subscriber, Some(_)) => {
                    p { strong { "This webhook was removed meanwhile." } " Nothing was saved, and what you typed is still below. "
                        a href=(NEW) { "New webhook" } " makes another one." }
                }
                (ProblemKind::Version, Some(name)) => {
                    p { strong { "Somebody else has changed it meanwhile." } " Nothing was overwritten, and what you typed is still below. "
                        a href=(actions::path(name, "edit")) { "Show how it is now" } "." }
                }
                _ if refusal.fields.is_empty() => p { (text(&refusal.why)) },
                _ => {
                    @if !here.is_empty() { p { "It was not taken: " (here.len()) (if here.len() == 1 { " field has" } else { " fields have" }) " a mistake, which stands next to it." } }
                    @for e in others { p { code { (text(&e.field)) } " " (text(&e.detail)) } }
                }
            }
        }
    }
}

fn fields(form: &Form, name: Option<&str>, mistakes: &Mistakes<'_>, tenants: bool) -> Markup {
    let is_new = name.is_none();
    let chosen = |field: &str, value: &str| form.get(field) == value;
    html! {
        @if is_new {
            (line(form.get("name"), mistakes, "name", "Name", "siem", "1 to 64 of a-z, 0-9 and -, a letter or digit first and last; it names the queues, and stays."))
        }
        @let url = without_userinfo(form.get("url"));
        (line(&url, mistakes, "url", "URL", "https://example.com/hooks", if matches!(url, Cow::Owned(_)) { "Its name and password are not shown: type them again, before the host." } else { "Each batch is POSTed there." }))
        div.field {
            label for="preset" { "Receiver" }
            select id="preset" name="preset" aria-invalid=[mistakes.is_wrong("preset")] aria-describedby=[mistakes.described_by("preset")] {
                option value="" { "Any other" }
                @for model in Model::ALL { option value=(model.name) selected[chosen("preset", model.name)] { (model.title) } }
            }
            span.hint { "A known one brings its format, its limits and how it is signed." }
            (mistakes.beside("preset"))
        }
        div.field {
            label for="format" { "Payload format" }
            select id="format" name="format" aria-invalid=[mistakes.is_wrong("format")] aria-describedby=[mistakes.described_by("format")] {
                @if chosen("format", AS_IT_IS) { option value=(AS_IT_IS) selected { "As it is: from its preset" } }
                @for (name, what) in FORMATS {
                    option value=(name) selected[chosen("format", name) || name == FORMATS[0].0 && chosen("format", "")] { (what) }
                }
            }
            (mistakes.beside("format"))
        }
        (of_formats(form, mistakes))
        div.field {
            label for="events" { "Events" }
            textarea id="events" name="events" rows="3" spellcheck="false" placeholder="user.*" aria-invalid=[mistakes.is_wrong("events")] aria-describedby=[mistakes.described_by("events")] { "\n" (form.get("events")) }
            span.hint { "Patterns of types, one a line: * is one word, # any number of words. Empty: all events." }
            (mistakes.beside("events"))
        }
        @if is_new && (tenants || !form.get("tenant").is_empty()) {
            (line(form.get("tenant"), mistakes, "tenant", "Tenant", "acct-123", "It gets the events of this tenant and no others. Empty: those of all. It cannot be changed later."))
        }
        div.field {
            label for="signature" { "Signature" }
            select id="signature" name="signature" aria-invalid=[mistakes.is_wrong("signature")] aria-describedby=[mistakes.described_by("signature")] {
                @if chosen("signature", AS_IT_IS) { option value=(AS_IT_IS) selected { "As it is: from its preset, or a header of its own" } }
                @for (value, label, _) in SIGNATURES { option value=(value) selected[chosen("signature", value)] { (label) } }
            }
            (mistakes.beside("signature"))
        }
        div.field {
            label for="secret" { "Signing secret" }
            // It is not shown again, also not to who has typed it.
            input id="secret" name="secret" type="password" autocomplete="new-password" aria-invalid=[mistakes.is_wrong("secret")] aria-describedby=[mistakes.described_by("secret")];
            span.hint { @if is_new { "Empty: one is made, and shown once." } @else { "Empty: the secret in use stays. One that is typed replaces it at once; " a href=(actions::path(name.unwrap_or_default(), "secret")) { "New secret" } " lets both sign for a while." } }
            (mistakes.beside("secret"))
        }
        (more(form, mistakes))
        (line(form.get("description"), mistakes, "description", "Description", "", ""))
        @if is_new {
            div.check {
                input id="start_paused" name="start_paused" type="checkbox" checked[chosen("start_paused", "on")];
                label for="start_paused" { "Begin paused: events are kept from now on, and sent when it is resumed" }
            }
        }
    }
}

/// The fields that go with some formats alone.
fn of_formats(form: &Form, mistakes: &Mistakes<'_>) -> Markup {
    let is_wanted = |field: &str| !form.get(field).is_empty() || mistakes.is_wrong(field).is_some();
    let one =
        |field, label, example, hint| line(form.get(field), mistakes, field, label, example, hint);
    html! {
        details.field open[OF_FORMATS.into_iter().any(is_wanted)] {
            summary { "Settings of some formats" }
            (one("content_type", "Content type", "application/x-ndjson", "Of JSON Lines and JSON array. Empty: the format's own."))
            (one("source", "Source", "/audit", "Of CloudEvents, which need one: a URI of what the events come from. Of Splunk HEC: any text, or none."))
            (one("sourcetype", "Source type", "audit", "Of Splunk HEC."))
            (one("index", "Index", "main", "Of Splunk HEC."))
        }
    }
}

/// What most webhooks do without.
fn more(form: &Form, mistakes: &Mistakes<'_>) -> Markup {
    const ALL: [&str; 6] = ["conditions", "redact", "redact_with", "rate", "compression", "order"];
    let is_wanted = |field: &str| !form.get(field).is_empty() || mistakes.is_wrong(field).is_some();
    let area = |field: &str, label: &str, example: &str, hint: &str| {
        html! {
            div.field {
                label for=(field) { (label) }
                textarea id=(field) name=(field) rows="2" spellcheck="false" placeholder=(example) aria-invalid=[mistakes.is_wrong(field)] aria-describedby=[mistakes.described_by(field)] { "\n" (form.get(field)) }
                span.hint { (hint) }
                (mistakes.beside(field))
            }
        }
    };
    html! {
        details.field open[ALL.into_iter().any(is_wanted)] {
            summary { "Values, pace and order" }
            input type="hidden" name=(MORE) value="1";
            input type="hidden" name=(PRESET_SHOWN) value=(form.get(PRESET_SHOWN));
            @if form.get("conditions") == AS_IT_IS {
                input type="hidden" name="conditions" value=(AS_IT_IS);
                p.hint { "It has conditions that this form cannot show. They stay." }
            } @else {
                (area("conditions", "Only events with", "/actor/type = user", "A place in the event and its value, one a line (JSON Pointer). Several lines for one place are alternatives; all places must hold."))
            }
            (area("redact", "Hide", "/actor/email", "Places in the event whose values it does not see, one a line; * is any name or index of one level."))
            (line(form.get("redact_with"), mistakes, "redact_with", "What stands for them", "[FILTERED]", ""))
            (line(form.get("rate"), mistakes, "rate", "At most", "50/s", "Requests a second, or a minute: 30/m. Of events: events 10000/s. Empty: as fast as it goes, or as its receiver takes them."))
            div.field {
                label for="compression" { "Compression of requests" }
                select id="compression" name="compression" aria-invalid=[mistakes.is_wrong("compression")] aria-describedby=[mistakes.described_by("compression")] {
                    @for (value, what) in [("", "As its receiver takes them"), ("none", "None"), ("gzip", "gzip")] {
                        option value=(value) selected[form.get("compression") == value] { (what) }
                    }
                }
                (mistakes.beside("compression"))
            }
            div.check {
                input id="order" name="order" type="checkbox" checked[form.get("order") == "on"] aria-invalid=[mistakes.is_wrong("order")] aria-describedby=[mistakes.described_by("order")];
                label for="order" { "Strict order: no event arrives before an older one has; one that fails holds those behind it" }
            }
            (mistakes.beside("order"))
        }
    }
}

fn line(
    value: &str,
    mistakes: &Mistakes<'_>,
    field: &str,
    label: &str,
    example: &str,
    hint: &str,
) -> Markup {
    html! {
        div.field {
            label for=(field) { (label) }
            input id=(field) name=(field) value=(value) placeholder=(example) autocomplete="off" spellcheck="false"
                aria-invalid=[mistakes.is_wrong(field)] aria-describedby=[mistakes.described_by(field)];
            @if !hint.is_empty() && mistakes.is_wrong(field).is_none() { span.hint { (hint) } }
            (mistakes.beside(field))
        }
    }
}

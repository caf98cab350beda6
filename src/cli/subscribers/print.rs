//! What the commands print of subscribers.

use std::io::Write as _;

use serde_json::Value;

use crate::{
    admin::view::{Origin, Stamp, Subscriber, SubscriberChange, SubscriberDetails},
    cli::{
        failed::Failed,
        history::lines,
        text::{as_json, visible},
    },
};

/// A row for each subscriber.
pub(super) fn table(subscribers: &[Subscriber]) -> String {
    if subscribers.is_empty() {
        return "the daemon has no subscriber\n".to_owned();
    }
    let row = |s: &Subscriber| {
        let (made, version) = match &s.origin {
            None => (String::new(), String::new()),
            Some(origin) => (place(origin), version(origin).unwrap_or_default().to_owned()),
        };
        let tenant = s.tenant.as_deref().map(visible).unwrap_or_default();
        [visible(&s.subscriber), visible(s.state.name()), made, visible(&version), tenant]
    };
    let rows: Vec<_> = subscribers.iter().map(row).collect();
    let has_tenants = subscribers.iter().any(|s| s.tenant.is_some());
    let mut out = if has_tenants {
        lines(&["SUBSCRIBER", "STATE", "FROM", "VERSION", "TENANT"], &rows, None)
    } else {
        let without = |[name, state, made, version, _]: [String; 5]| [name, state, made, version];
        let rows: Vec<_> = rows.into_iter().map(without).collect();
        lines(&["SUBSCRIBER", "STATE", "FROM", "VERSION"], &rows, None)
    };
    for (s, why) in subscribers.iter().filter_map(|s| Some((s, s.why.as_ref()?))) {
        out.push_str(&format!("\n`{}` does not run: {}\n", visible(&s.subscriber), visible(why)));
    }
    out
}

/// A subscriber with its settings, a line each.
pub(super) fn details(of: &SubscriberDetails) -> String {
    let status = &of.status;
    let mut out = format!("# {}: {}\n", visible(&status.subscriber), visible(status.state.name()));
    let mut line = |text: String| out.push_str(&format!("# {text}\n"));
    match &status.origin {
        None => {}
        Some(Origin::File { file, line: n }) => line(format!("from {}:{n}", visible(file))),
        Some(Origin::Api { version, created, changed }) => {
            let of = |what: &str, stamp: &Option<Stamp>| {
                let said = |s: &Stamp| format!(", {what} by {} at {}", visible(&s.by), s.at);
                stamp.as_ref().map(said).unwrap_or_default()
            };
            let stamps = of("made", created) + &of("changed", changed);
            line(format!("over the API, version {}{stamps}", visible(version)));
        }
    }
    if let Some(why) = &status.why {
        line(format!("it does not run: {}", visible(why)));
    }
    if let Some(shadowed) = &of.shadows {
        let version = version(shadowed).unwrap_or_default();
        let made = visible(version);
        line(format!("one made over the API rests, because this one has its name: version {made}"));
    }
    for (key, value) in leaves(of.settings.as_ref().or(of.document.as_ref())) {
        out.push_str(&format!("{} = {}\n", visible(&key), visible(&value.to_string())));
    }
    out
}

/// Prints a change. The secret that was made is shown here alone, so that it must arrive.
pub(super) fn change(change: &SubscriberChange, what: &str, json: bool) -> Result<(), Failed> {
    let name = visible(&change.subscriber);
    let text = if json {
        as_json(change) + "\n"
    } else {
        let mut text = format!("`{name}` is {what}: version {}\n", visible(&change.version));
        if let Some(since) = change.active_since {
            text.push_str(&format!("Its events count from {since}.\n"));
        }
        if let Some(secret) = &change.secret {
            text.push_str("Its signing secret, which is not shown again:\n");
            text.push_str(&format!("{}\n", secret.expose()));
        }
        text
    };
    let mut out = std::io::stdout();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(|e| {
        Failed::Runtime(format!("`{name}` is {what}, and that could not be printed: {e}"))
    })
}

/// The version of one that was made over the API.
pub(super) fn version(origin: &Origin) -> Option<&str> {
    match origin {
        Origin::Api { version, .. } => Some(version),
        Origin::File { .. } => None,
    }
}

/// A file and a line, or who has changed it and when.
pub(super) fn place(origin: &Origin) -> String {
    visible(&origin.to_string())
}

/// Each value that is no table, with its path.
fn leaves(value: Option<&Value>) -> Vec<(String, &Value)> {
    let mut found = Vec::new();
    for (key, value) in value.and_then(Value::as_object).into_iter().flatten() {
        match value {
            Value::Object(_) => {
                let inside = leaves(Some(value)).into_iter();
                found.extend(inside.map(|(rest, value)| (format!("{key}.{rest}"), value)));
            }
            value => found.push((key.clone(), value)),
        }
    }
    found
}

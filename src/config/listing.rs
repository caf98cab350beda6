//! A checked configuration as TOML, with its defaults.

use std::fmt::Write as _;

use super::{
    keys::{Key, Place, ROOT, Shape, fields},
    settings::Config,
    subscriber::Subscriber,
};

/// The keys outside of subscribers as TOML, with their defaults and without secrets.
pub fn global_as_toml(config: &Config) -> String {
    let mut out = String::new();
    let mut line = |text: std::fmt::Arguments<'_>| {
        // Writing to a string cannot fail.
        writeln!(out, "{text}").ok();
    };
    let shown = |key: &Key| match &key.place {
        Place::Config(field) => (field.show)(config),
        Place::Read | Place::Subscriber(_) => None,
    };
    for key in ROOT {
        if let Some(value) = shown(key) {
            line(format_args!("{} = {value}", key.name()));
        }
        if let (Place::Read, Shape::Table(group)) = (&key.place, &key.shape) {
            let mut header = Some(key.name());
            for (key, value) in group.iter().filter_map(|key| Some((key, shown(key)?))) {
                if let Some(name) = header.take() {
                    line(format_args!("\n[{name}]"));
                }
                line(format_args!("{} = {value}", key.name()));
            }
        }
    }
    out
}

/// A subscriber's keys, each with its value as TOML, without secrets.
pub fn subscriber_values(s: &Subscriber) -> impl Iterator<Item = (&'static str, String)> {
    fields().filter_map(move |(path, field)| Some((path, (field.show)(s)?)))
}

/// A subscriber's keys as TOML, with their defaults and without secrets.
pub fn subscriber_as_toml(s: &Subscriber) -> String {
    let mut out = String::from("\n[[subscriber]]\n");
    for (path, value) in subscriber_values(s) {
        // Writing to a string cannot fail.
        writeln!(out, "{path} = {value}").ok();
    }
    out
}

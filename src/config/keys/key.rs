//! A row of the table of keys.

use std::time::Duration;

use crate::config::{settings::Config, subscriber::Subscriber};

/// One key of the configuration.
#[derive(Debug)]
pub struct Key {
    /// The name with its tables, such as `retry.max_interval`; of a subscriber's key, inside
    /// `[[subscriber]]`.
    pub path: &'static str,
    /// One sentence, shown by editors.
    pub summary: &'static str,
    pub shape: Shape,
    pub required: bool,
    pub(in crate::config) place: Place,
}

/// The values that a key takes. Each string may contain `${VAR}`.
#[derive(Debug)]
pub enum Shape {
    Text,
    Flag,
    /// An integer: least and most.
    Whole(i64, i64),
    /// A number: least and most.
    Number(f64, f64),
    /// A duration, at most this long.
    Duration(Option<Duration>),
    /// A number of bytes, with its unit.
    Size,
    Word(&'static [&'static str]),
    List(&'static Self),
    /// A table with these keys.
    Table(&'static [Key]),
    /// A table whose keys are free.
    Map(&'static Self),
    Either(&'static [Self]),
}

/// The place of a key's value in a checked configuration.
#[derive(Debug)]
pub(in crate::config) enum Place {
    /// No place of its own: it is a part of another key's value, names other files, or fills in
    /// other keys.
    Read,
    Config(Field<Config, Reloaded>),
    Subscriber(Field<Subscriber, &'static [Affects]>),
}

#[derive(Debug)]
pub(in crate::config) struct Field<T, A> {
    pub(in crate::config) affects: A,
    pub(in crate::config) differs: fn(&T, &T) -> bool,
    /// The value as TOML, with `[redacted]` for secrets; `None` if it is not set and has no
    /// default.
    pub(in crate::config) show: fn(&T) -> Option<String>,
}

/// What a change of a subscriber's key affects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Affects {
    /// The request or its destination: answers to earlier requests say nothing about later ones.
    Requests,
    /// The connections to the endpoint.
    Connections,
    /// The session of the lane with its queue, which is opened again.
    Session,
    /// The events that the subscriber's queue gets.
    Bindings,
    /// Decisions, each made with the value of that moment.
    Decisions,
}

/// What a running daemon does when a key outside of subscribers changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reloaded {
    /// The new value is used.
    Used,
    /// The new value is used after a restart.
    AfterRestart,
    /// The whole reload is refused: the queues depend on the key.
    Refused,
}

pub(super) const fn read(path: &'static str, summary: &'static str, shape: Shape) -> Key {
    Key { path, summary, shape, required: false, place: Place::Read }
}

pub(super) const fn global(
    path: &'static str,
    summary: &'static str,
    shape: Shape,
    affects: Reloaded,
    differs: fn(&Config, &Config) -> bool,
    show: fn(&Config) -> Option<String>,
) -> Key {
    Key {
        path,
        summary,
        shape,
        required: false,
        place: Place::Config(Field { affects, differs, show }),
    }
}

pub(super) const fn subscriber(
    path: &'static str,
    summary: &'static str,
    shape: Shape,
    affects: &'static [Affects],
    differs: fn(&Subscriber, &Subscriber) -> bool,
    show: fn(&Subscriber) -> Option<String>,
) -> Key {
    Key {
        path,
        summary,
        shape,
        required: false,
        place: Place::Subscriber(Field { affects, differs, show }),
    }
}

impl Key {
    /// The name inside its table.
    pub fn name(&self) -> &'static str {
        self.path.rsplit('.').next().unwrap_or(self.path)
    }

    pub(super) const fn required(mut self) -> Self {
        self.required = true;
        self
    }
}

//! A row of the table of keys.

use std::time::Duration;

use crate::config::{settings::Config, subscriber::Subscriber};

/// One key: its full name, what it says, and which values it takes.
#[derive(Debug)]
pub struct Key {
    /// With the tables that it is in, `retry.max_interval`; those of a subscriber begin inside
    /// `[[subscriber]]`.
    pub path: &'static str,
    /// One sentence, for editors.
    pub what: &'static str,
    pub shape: Shape,
    pub required: bool,
    pub(in crate::config) place: Place,
}

/// Which values a key takes. In each string `${VAR}` stands for the environment's.
#[derive(Debug)]
pub enum Shape {
    Text,
    Flag,
    /// An integer from the first to the second.
    Whole(i64, i64),
    /// A number from the first to the second.
    Number(f64, f64),
    /// At most this long.
    Duration(Option<Duration>),
    /// A number of bytes with its unit.
    Size,
    Word(&'static [&'static str]),
    List(&'static Self),
    /// A table with these keys.
    Table(&'static [Key]),
    /// A table whose keys are free.
    Map(&'static Self),
    Either(&'static [Self]),
}

/// Where a key's value is in a checked configuration.
#[derive(Debug)]
pub(in crate::config) enum Place {
    /// Nowhere by itself: it is a part of another key's value, names other files, or fills in other
    /// keys.
    Read,
    Config(Field<Config, Reloaded>),
    Subscriber(Field<Subscriber, &'static [Affects]>),
}

#[derive(Debug)]
pub(in crate::config) struct Field<T, A> {
    pub(in crate::config) affects: A,
    pub(in crate::config) differs: fn(&T, &T) -> bool,
    /// As TOML, with `[redacted]` for secrets; none where it is not set and has no default.
    pub(in crate::config) show: fn(&T) -> Option<String>,
}

/// What a changed value of a subscriber's key means for what is under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Affects {
    /// What a request is, or whom it reaches: answers to requests of before say nothing of those
    /// that follow.
    Requests,
    /// What connections to the endpoint are made of.
    Connections,
    /// What a lane's session with its queue is opened with.
    Session,
    /// Which events the subscriber's queue gets.
    Bindings,
    /// A decision that is made each time it is needed.
    Decisions,
}

/// What a running daemon does about a changed key that is not a subscriber's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reloaded {
    /// The new value is used.
    Used,
    /// The new value is used after a restart.
    AfterRestart,
    /// The whole reload is refused: the queues depend on it.
    Refused,
}

pub(super) const fn read(path: &'static str, what: &'static str, shape: Shape) -> Key {
    Key { path, what, shape, required: false, place: Place::Read }
}

pub(super) const fn global(
    path: &'static str,
    what: &'static str,
    shape: Shape,
    affects: Reloaded,
    differs: fn(&Config, &Config) -> bool,
    show: fn(&Config) -> Option<String>,
) -> Key {
    Key {
        path,
        what,
        shape,
        required: false,
        place: Place::Config(Field { affects, differs, show }),
    }
}

pub(super) const fn subscriber(
    path: &'static str,
    what: &'static str,
    shape: Shape,
    affects: &'static [Affects],
    differs: fn(&Subscriber, &Subscriber) -> bool,
    show: fn(&Subscriber) -> Option<String>,
) -> Key {
    Key {
        path,
        what,
        shape,
        required: false,
        place: Place::Subscriber(Field { affects, differs, show }),
    }
}

impl Key {
    /// Its name in its table.
    pub fn name(&self) -> &'static str {
        self.path.rsplit('.').next().unwrap_or(self.path)
    }

    pub(super) const fn required(mut self) -> Self {
        self.required = true;
        self
    }
}

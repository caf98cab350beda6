//! The answer to a request that is refused, as RFC 9457 describes it.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The media type of a [`Problem`].
pub const PROBLEM_JSON: &str = "application/problem+json";

/// A refusal, with the reason.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Problem {
    #[serde(rename = "type", default)]
    pub kind: ProblemKind,
    #[serde(default)]
    pub title: String,
    #[serde(default)]
    pub status: u16,
    /// The reason in a sentence. A daemon of an earlier version has it in `error`.
    #[serde(alias = "error")]
    pub detail: String,
    /// The first of `errors`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub field: Option<String>,
    /// The parameters of the query, or the fields of the body, that are not valid.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub errors: Option<Vec<FieldError>>,
    /// The number of invalid events in a request to the intake.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub invalid: Option<usize>,
    /// The first of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub events: Option<Vec<BadEvent>>,
}

/// A parameter or a field that is not valid.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FieldError {
    /// The name of a parameter, or the place in the body with dots, such as `retry.max_attempts`.
    pub field: String,
    pub detail: String,
}

/// An event that is not valid.
#[derive(Debug, Serialize, Deserialize)]
pub struct BadEvent {
    /// In the order of the request, from 0.
    pub index: usize,
    /// The line of JSON Lines, from 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub line: Option<usize>,
    pub reason: String,
}

/// The type of a problem: a URI, with the full path of its name (RFC 9457, section 3.1.1).
/// docs/admin.yaml has the meaning of each.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub enum ProblemKind {
    /// The status says it all. Also a type that only a newer daemon knows.
    #[default]
    Status,
    Field,
    Events,
    Origin,
    Token,
    Role,
    Subscriber,
    Configuration,
    Key,
    Management,
    Exists,
    Limit,
    Backlog,
    Version,
    UnknownOutcome,
}

impl ProblemKind {
    pub const ALL: [Self; 15] = [
        Self::Status,
        Self::Field,
        Self::Events,
        Self::Origin,
        Self::Token,
        Self::Role,
        Self::Subscriber,
        Self::Configuration,
        Self::Key,
        Self::Management,
        Self::Exists,
        Self::Limit,
        Self::Backlog,
        Self::Version,
        Self::UnknownOutcome,
    ];

    pub fn uri(self) -> &'static str {
        match self {
            Self::Status => "about:blank",
            Self::Field => "/problems/field",
            Self::Events => "/problems/events",
            Self::Origin => "/problems/origin",
            Self::Token => "/problems/token",
            Self::Role => "/problems/role",
            Self::Subscriber => "/problems/subscriber",
            Self::Configuration => "/problems/configuration",
            Self::Key => "/problems/idempotency-key",
            Self::Management => "/problems/management",
            Self::Exists => "/problems/exists",
            Self::Limit => "/problems/limit",
            Self::Backlog => "/problems/backlog",
            Self::Version => "/problems/version",
            Self::UnknownOutcome => "/problems/unknown-outcome",
        }
    }

    /// The title, the same for each problem of the kind; `None` for that of the status.
    pub fn title(self) -> Option<&'static str> {
        match self {
            Self::Status => None,
            Self::Field => Some("A parameter or a field is not valid"),
            Self::Events => Some("Events are not valid"),
            Self::Origin => Some("The request may come from a web page"),
            Self::Token => Some("A valid token is needed"),
            Self::Role => Some("The token's role is too small"),
            Self::Subscriber => Some("There is no such subscriber"),
            Self::Configuration => Some("The configuration was not reloaded"),
            Self::Key => Some("The idempotency key belongs to another request"),
            Self::Management => Some("Subscribers are not managed here"),
            Self::Exists => Some("The name is that of another subscriber"),
            Self::Limit => Some("There are as many subscribers as there may be"),
            Self::Backlog => Some("The queues of that name hold messages"),
            Self::Version => Some("The version is needed, or is another one"),
            Self::UnknownOutcome => Some("It is not known whether it was done"),
        }
    }
}

impl fmt::Display for ProblemKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.uri())
    }
}

impl Serialize for ProblemKind {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(self.uri())
    }
}

impl<'de> Deserialize<'de> for ProblemKind {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let uri = String::deserialize(from)?;
        Ok(Self::ALL.into_iter().find(|kind| kind.uri() == uri).unwrap_or_default())
    }
}

//! The query of a request, and its path: each parameter is known, is there once and is valid, or
//! the answer is 400 and names those that are not.
//!
//! A list declares its filters as a type:
//!
//! ```text
//! struct Filters { subscriber: Option<SubscriberName>, limit: usize, after: Option<Cursor> }
//!
//! impl FromQuery for Filters {
//!     fn from_query(given: &mut Parameters) -> Self {
//!         Self {
//!             subscriber: given.take("subscriber", |text| text.parse()),
//!             limit: given.limit(),
//!             after: given.cursor(List::Deliveries),
//!         }
//!     }
//! }
//!
//! async fn list(Query(filters): Query<Filters>) -> Response { … }
//! ```

use std::{fmt::Display, ops::RangeInclusive};

use axum::{
    extract::{FromRequestParts, Path},
    http::request::Parts,
};
use url::form_urlencoded;

use super::{answer::Refusal, view::FieldError};
use crate::page::{Cursor, DEFAULT_LIMIT, List, MAX_LIMIT};

/// The most mistakes that an answer lists.
const MAX_ERRORS: usize = 20;

/// The most characters of an unknown parameter's name that an answer repeats.
const MAX_NAME: usize = 64;

/// A checked query. A request with another one is refused before its handler runs.
#[derive(Debug)]
pub(super) struct Query<F>(pub(super) F);

/// The parameters that a request takes.
pub(super) trait FromQuery: Sized {
    /// Takes each parameter once. Where one is not valid, the result is not used.
    fn from_query(given: &mut Parameters) -> Self;
}

/// The query of a request that takes no parameters.
impl FromQuery for () {
    fn from_query(_: &mut Parameters) -> Self {}
}

/// The parameters of a query, and the mistakes that were found in them.
#[derive(Debug)]
pub(super) struct Parameters {
    given: Vec<(String, String)>,
    taken: Vec<&'static str>,
    errors: Vec<FieldError>,
}

impl Parameters {
    fn new(query: &str) -> Self {
        Self::of(form_urlencoded::parse(query.as_bytes()).into_owned().collect())
    }

    pub(super) fn of(given: Vec<(String, String)>) -> Self {
        Self { given, taken: Vec::new(), errors: Vec::new() }
    }

    fn wrong(&mut self, field: &str, detail: impl Into<String>) {
        if self.errors.len() < MAX_ERRORS {
            let field = field.chars().take(MAX_NAME).collect();
            self.errors.push(FieldError { field, detail: detail.into() });
        }
    }

    /// Takes a parameter. `read` says what it must be; `None` if it is absent or not valid.
    pub(super) fn take<T, E: Display>(
        &mut self,
        name: &'static str,
        read: impl FnOnce(&str) -> Result<T, E>,
    ) -> Option<T> {
        self.taken.push(name);
        let mut all = self.given.iter().filter(|(given, _)| given == name);
        let (_, value) = all.next()?;
        let read = if all.next().is_some() {
            Err("is there more than once".to_owned())
        } else {
            read(value).map_err(|e| e.to_string())
        };
        read.map_err(|detail| self.wrong(name, detail)).ok()
    }

    /// Takes a parameter that must be there.
    pub(super) fn required<T, E: Display>(
        &mut self,
        name: &'static str,
        read: impl FnOnce(&str) -> Result<T, E>,
    ) -> Option<T> {
        let is_there = self.given.iter().any(|(given, _)| given == name);
        let found = self.take(name, read);
        if !is_there {
            self.wrong(name, "is required");
        }
        found
    }

    /// Takes a whole number in a range.
    pub(super) fn number(
        &mut self,
        name: &'static str,
        range: RangeInclusive<usize>,
    ) -> Option<usize> {
        let (least, most) = (*range.start(), *range.end());
        self.take(name, |text| {
            // `parse` takes a plus sign, which in a query is a space besides.
            let digits = text.bytes().all(|b| b.is_ascii_digit());
            let number = text.parse().ok().filter(|n| digits && range.contains(n));
            number.ok_or_else(|| format!("must be a whole number from {least} to {most}"))
        })
    }

    /// Takes `limit`, the number of rows of a page.
    pub(super) fn limit(&mut self) -> usize {
        self.number("limit", 1..=MAX_LIMIT).unwrap_or(DEFAULT_LIMIT)
    }

    /// Takes `cursor`, the place at which the page before ended.
    pub(super) fn cursor(&mut self, list: List) -> Option<Cursor> {
        self.take("cursor", |text| Cursor::parse(text, list))
    }

    pub(super) fn read<F: FromQuery>(mut self) -> Result<F, Refusal> {
        let found = F::from_query(&mut self);
        let is_unknown = |name: &String| !self.taken.iter().any(|taken| taken == name);
        let mut unknown: Vec<String> =
            self.given.iter().map(|(name, _)| name.clone()).filter(is_unknown).collect();
        unknown.dedup();
        if !unknown.is_empty() {
            let known = match self.taken.join("`, `") {
                known if known.is_empty() => "there are none here".to_owned(),
                known => format!("there are `{known}`"),
            };
            for name in unknown {
                self.wrong(&name, format!("is no parameter of this request; {known}"));
            }
        }
        if self.errors.is_empty() { Ok(found) } else { Err(Refusal::fields(self.errors)) }
    }
}

impl<S: Sync, F: FromQuery> FromRequestParts<S> for Query<F> {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Refusal> {
        Parameters::new(parts.uri.query().unwrap_or_default()).read().map(Self)
    }
}

/// The name in a path such as `/v1/subscribers/{name}`.
#[derive(Debug)]
pub(super) struct Name(pub(super) String);

impl<S: Send + Sync> FromRequestParts<S> for Name {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Refusal> {
        let path = Path::<String>::from_request_parts(parts, state).await;
        path.map(|Path(name)| Self(name)).map_err(|_| Refusal::field("name", "must be UTF-8"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq)]
    struct Filters {
        state: Option<bool>,
        limit: usize,
        row: Option<i64>,
    }

    impl FromQuery for Filters {
        fn from_query(given: &mut Parameters) -> Self {
            Self {
                state: given.take("state", |text| text.parse::<bool>()),
                limit: given.limit(),
                row: given.cursor(List::Events).map(|cursor| cursor.row),
            }
        }
    }

    fn read(query: &str) -> Result<Filters, Vec<(String, String)>> {
        Parameters::new(query).read().map_err(|refusal| {
            assert_eq!(refusal.status, 400);
            refusal.fields.into_iter().map(|e| (e.field, e.detail)).collect()
        })
    }

    #[test]
    fn a_valid_query_is_read_and_an_empty_one_has_the_defaults() {
        let none = Filters { state: None, limit: DEFAULT_LIMIT, row: None };
        assert_eq!(read(""), Ok(none));
        let cursor = Cursor { list: List::Events, row: -7 };
        assert_eq!(
            read(&format!("cursor={cursor}&st%61te=true&limit=500")),
            Ok(Filters { state: Some(true), limit: 500, row: Some(-7) })
        );
        assert!(Parameters::new("").read::<()>().is_ok());
    }

    #[test]
    fn each_parameter_that_is_unknown_repeated_or_not_valid_is_named() {
        for (query, field, part) in [
            ("limit=0", "limit", "from 1 to 500"),
            ("limit=501", "limit", "from 1 to 500"),
            ("limit=", "limit", "from 1 to 500"),
            ("limit=-1", "limit", "from 1 to 500"),
            ("limit=%2B1", "limit", "from 1 to 500"),
            ("limit=99999999999999999999999", "limit", "from 1 to 500"),
            ("limit=1&limit=1", "limit", "more than once"),
            ("cursor=garbage", "cursor", "must be the `next` of an earlier answer"),
            ("cursor=", "cursor", "must be the `next` of an earlier answer"),
            ("state=maybe", "state", "was not `true` or `false`"),
            ("page=2", "page", "there are `state`, `limit`, `cursor`"),
            ("Limit=2", "Limit", "is no parameter of this request"),
            ("%FF=2", "\u{fffd}", "is no parameter of this request"),
            ("=2", "", "is no parameter of this request"),
        ] {
            let errors = read(query).expect_err(query);
            assert!(
                errors.len() == 1 && errors[0].0 == field && errors[0].1.contains(part),
                "{query}: {errors:?}"
            );
        }
        let errors = read("x=1&limit=0&state=7").expect_err("all of it is wrong");
        let fields: Vec<&str> = errors.iter().map(|(field, _)| field.as_str()).collect();
        assert_eq!(fields, ["state", "limit", "x"]);
        let none = Parameters::new("limit=1").read::<()>().expect_err("it takes none");
        assert!(none.why.contains("`limit` is no parameter of this request; there are none here"));
        let many: String = (0..1000).map(|n| format!("{n}{}=&", "x".repeat(1000))).collect();
        let many = read(&many).expect_err("unknown");
        assert!(many.len() == MAX_ERRORS && many[0].0.len() == MAX_NAME);
    }
}

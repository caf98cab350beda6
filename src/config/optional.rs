//! Values that may be left out, with their defaults.

use std::time::Duration;

use super::{document::Value, reader::Reader};

impl Reader<'_> {
    /// The meaning of one of these words; the first is the default.
    pub(super) fn one_of<T: Copy>(
        &self,
        value: Option<Value<'_>>,
        words: &[(&str, T)],
    ) -> Option<T> {
        let Some(value) = value else { return Some(words[0].1) };
        let text = self.string(&value)?;
        let found = words.iter().find(|(word, _)| *word == text).map(|(_, v)| *v);
        if found.is_none() {
            let all: Vec<String> = words.iter().map(|(w, _)| format!("\"{w}\"")).collect();
            self.report(&value, format!("must be {}", all.join(" or ")));
        }
        found
    }

    pub(super) fn duration_or(
        &self,
        value: Option<Value<'_>>,
        default_seconds: u64,
        max: Option<Duration>,
    ) -> Option<Duration> {
        match value {
            None => Some(Duration::from_secs(default_seconds)),
            Some(v) => self.duration(&v, max),
        }
    }

    /// A duration that is longer than zero.
    pub(super) fn positive_duration_or(
        &self,
        value: Option<Value<'_>>,
        default_seconds: u64,
        max: Duration,
    ) -> Option<Duration> {
        let found = self.duration_or(value.clone(), default_seconds, Some(max))?;
        if found.is_zero() {
            self.report(value.as_ref()?, "must be longer than 0");
            return None;
        }
        Some(found)
    }

    pub(super) fn integer_or(
        &self,
        value: Option<Value<'_>>,
        default: i64,
        range: std::ops::RangeInclusive<i64>,
    ) -> Option<i64> {
        match value {
            None => Some(default),
            Some(v) => self.integer(&v, range),
        }
    }

    pub(super) fn flag(&self, value: Option<Value<'_>>) -> Option<bool> {
        value.map_or(Some(false), |v| self.bool(&v))
    }
}

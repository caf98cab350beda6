//! The parsed parts of a configuration, each with its place in a file.

use std::{
    fmt,
    ops::Range,
    path::{Path, PathBuf},
    sync::OnceLock,
};

use toml::de::{DeTable, DeValue};

/// One mistake in a configuration file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    pub file: PathBuf,
    /// Line and column, from 1; `None` if the file cannot be read.
    pub place: Option<(usize, usize)>,
    pub key: String,
    /// What is wrong and what would be right, without secrets.
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.file.display())?;
        if let Some((line, column)) = self.place {
            write!(f, ":{line}:{column}")?;
        }
        if !self.key.is_empty() {
            write!(f, ": {}", self.key)?;
        }
        write!(f, ": {}", self.message)
    }
}

/// A file of the configuration and its text.
#[derive(Debug)]
pub(super) struct Source {
    pub(super) path: PathBuf,
    pub(super) text: String,
    /// It is a request of the API, and no file: remedies name what its client can change.
    pub(super) is_request: bool,
    /// Where each line after the first begins, once a place was asked for: each subscriber has one.
    lines: OnceLock<Vec<usize>>,
}

impl Source {
    pub(super) fn file(path: PathBuf, text: String) -> Self {
        Self { path, text, is_request: false, lines: OnceLock::new() }
    }

    pub(super) fn request(text: String) -> Self {
        Self { is_request: true, ..Self::file(PathBuf::from("the request"), text) }
    }

    /// Line and column of a byte, from 1.
    pub(super) fn position(&self, at: usize) -> (usize, usize) {
        let at = at.min(self.text.len());
        let begins = || self.text.match_indices('\n').map(|(n, _)| n + 1).collect();
        let lines = self.lines.get_or_init(begins);
        let before = lines.partition_point(|begin| *begin <= at);
        let begin = before.checked_sub(1).map_or(0, |line| lines[line]);
        (before + 1, self.text[begin..at].chars().count() + 1)
    }

    /// Resolves a path that this file names, relative to the file's folder.
    pub(super) fn relative(&self, path: &str) -> PathBuf {
        self.folder().join(path)
    }

    pub(super) fn folder(&self) -> &Path {
        self.path.parent().unwrap_or(Path::new(""))
    }
}

/// A table.
#[derive(Clone)]
pub(super) struct Section<'d> {
    pub(super) source: &'d Source,
    pub(super) path: String,
    pub(super) span: Range<usize>,
    pub(super) table: &'d DeTable<'d>,
}

/// A value with its place and its full key.
#[derive(Clone)]
pub(super) struct Value<'d> {
    pub(super) source: &'d Source,
    pub(super) key: String,
    pub(super) span: Range<usize>,
    pub(super) value: &'d DeValue<'d>,
}

/// A group of a subscriber, in layers: its own keys win over its preset's, those over the top-level
/// group.
pub(super) struct Layers<'d> {
    pub(super) own: Option<Section<'d>>,
    pub(super) preset: Option<Section<'d>>,
    pub(super) base: Option<Section<'d>>,
}

impl<'d> Layers<'d> {
    pub(super) fn get(&self, key: &str) -> Option<Value<'d>> {
        let of = |s: &Option<Section<'d>>| s.as_ref().and_then(|s| s.get(key));
        of(&self.own).or_else(|| of(&self.preset)).or_else(|| of(&self.base))
    }

    /// The layer that a key's value is from.
    pub(super) fn layer(&self, key: &str) -> Layer {
        let has = |s: &Option<Section<'d>>| s.as_ref().is_some_and(|s| s.get(key).is_some());
        match () {
            () if has(&self.own) => Layer::Own,
            () if has(&self.preset) => Layer::Preset,
            () if has(&self.base) => Layer::Base,
            () => Layer::Default,
        }
    }
}

/// The origin of a value, nearest to the subscriber first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Layer {
    Own,
    Preset,
    Base,
    Default,
}

impl Value<'_> {
    /// File, line and column, as a [`Problem`] prints them.
    pub(super) fn place(&self) -> String {
        let (line, column) = self.source.position(self.span.start);
        format!("{}:{line}:{column}", self.source.path.display())
    }

    /// The name of the file, and the line.
    pub(super) fn line(&self) -> String {
        let path = &self.source.path;
        let name = path.file_name().map_or_else(|| path.into(), std::path::PathBuf::from);
        format!("{}:{}", name.display(), self.source.position(self.span.start).0)
    }
}

impl<'d> Section<'d> {
    pub(super) fn get(&self, key: &str) -> Option<Value<'d>> {
        let (name, value) = self.table.iter().find(|(name, _)| name.get_ref() == key)?;
        debug_assert!(name.span().end <= self.source.text.len());
        Some(Value {
            source: self.source,
            key: self.key_of(key),
            span: value.span(),
            value: value.get_ref(),
        })
    }

    pub(super) fn key_of(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_a_line_and_a_column_of_characters_from_one() {
        let source = Source::file(PathBuf::from("f"), "é = 1\n\nabc\n".to_owned());
        for (at, place) in [
            (0, (1, 1)),
            (2, (1, 2)),
            (6, (1, 6)), // the end of the first line
            (7, (2, 1)),
            (8, (3, 1)),
            (10, (3, 3)),
            (12, (4, 1)), // behind the last line
            (99, (4, 1)),
        ] {
            assert_eq!(source.position(at), place, "byte {at}");
        }
        assert_eq!(Source::request(String::new()).position(0), (1, 1));
    }
}

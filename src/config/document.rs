//! The parts of a configuration as they are written, each with its place.

use std::{
    fmt,
    ops::Range,
    path::{Path, PathBuf},
};

use toml::de::{DeTable, DeValue};

/// One mistake in a configuration file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    pub file: PathBuf,
    /// Line and column, from 1; none for a file that cannot be read.
    pub place: Option<(usize, usize)>,
    pub key: String,
    /// What is wrong and what would be right; never a secret's value.
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
}

impl Source {
    pub(super) fn position(&self, at: usize) -> (usize, usize) {
        let before = &self.text[..at.min(self.text.len())];
        let line_start = before.rfind('\n').map_or(0, |n| n + 1);
        (before.matches('\n').count() + 1, before[line_start..].chars().count() + 1)
    }

    /// A path that this file names: relative ones are relative to it.
    pub(super) fn relative(&self, path: &str) -> PathBuf {
        self.folder().join(path)
    }

    pub(super) fn folder(&self) -> &Path {
        self.path.parent().unwrap_or(Path::new(""))
    }
}

/// A table and the keys it may have.
#[derive(Clone)]
pub(super) struct Section<'d> {
    pub(super) source: &'d Source,
    pub(super) path: String,
    pub(super) span: Range<usize>,
    pub(super) table: &'d DeTable<'d>,
}

/// A value, its place and its full key.
#[derive(Clone)]
pub(super) struct Value<'d> {
    pub(super) source: &'d Source,
    pub(super) key: String,
    pub(super) span: Range<usize>,
    pub(super) value: &'d DeValue<'d>,
}

/// A group of a subscriber over that of its preset over the group of the same name at top level.
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

    /// Which of them the value of a key is from.
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

/// Where a value is from, the nearest to the subscriber first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Layer {
    Own,
    Preset,
    Base,
    Default,
}

impl Value<'_> {
    /// Its file, line and column, as a problem there has it.
    pub(super) fn place(&self) -> String {
        let (line, column) = self.source.position(self.span.start);
        format!("{}:{line}:{column}", self.source.path.display())
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

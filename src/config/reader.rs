//! Reads TOML so that every mistake is found in one go and named by its place.
//!
//! Deserialising into structs would stop at the first mistake and could not say where an override
//! came from; this walks the parsed document with its spans instead.

use std::{
    cell::RefCell,
    collections::BTreeSet,
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use super::{
    document::{Problem, Section, Source, Value},
    keys::Key,
    spelling::distance,
    variables::interpolate,
};
use crate::event::Pattern;

/// Reads values, and collects the problems.
pub(super) struct Reader<'e> {
    env: &'e dyn Fn(&str) -> Option<String>,
    /// The only files that exist, instead of those on the disk.
    memory: Option<&'e [(&'e str, &'e str)]>,
    /// Folders that the current subscribers came from.
    before: &'e [PathBuf],
    problems: RefCell<Vec<Problem>>,
    files: RefCell<BTreeSet<PathBuf>>,
    folders: RefCell<BTreeSet<PathBuf>>,
}

impl<'e> Reader<'e> {
    pub(super) fn new(env: &'e dyn Fn(&str) -> Option<String>) -> Self {
        Self {
            env,
            memory: None,
            before: &[],
            problems: RefCell::default(),
            files: RefCell::default(),
            folders: RefCell::default(),
        }
    }

    /// A reader for a running daemon whose subscribers came from these folders.
    pub(super) fn after(env: &'e dyn Fn(&str) -> Option<String>, before: &'e [PathBuf]) -> Self {
        Self { before, ..Self::new(env) }
    }

    /// A reader for an untrusted configuration, whose paths may name any file.
    #[cfg(any(test, fuzzing))]
    pub(super) fn without_disk(
        env: &'e dyn Fn(&str) -> Option<String>,
        files: &'e [(&'e str, &'e str)],
    ) -> Self {
        Self { memory: Some(files), ..Self::new(env) }
    }

    pub(super) fn has_disk(&self) -> bool {
        self.memory.is_none()
    }

    /// Reads a file that the configuration depends on.
    pub(super) fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        self.depends_on(path);
        let Some(files) = self.memory else { return std::fs::read(path) };
        files
            .iter()
            .find(|(name, _)| path == Path::new(name))
            .map(|(_, text)| text.as_bytes().to_vec())
            .ok_or(io::ErrorKind::NotFound.into())
    }

    /// Does what [`read`](Self::read) does, for UTF-8.
    pub(super) fn read_to_string(&self, path: &Path) -> io::Result<String> {
        String::from_utf8(self.read(path)?)
            .map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "it is not UTF-8"))
    }

    /// Records that the configuration depends on this file, or on the files in this folder.
    pub(super) fn depends_on(&self, path: &Path) {
        self.files.borrow_mut().insert(path.to_owned());
    }

    /// Whether current subscribers came from this folder.
    pub(super) fn is_in_use(&self, folder: &Path) -> bool {
        self.before.iter().any(|f| f == folder)
    }

    /// Records that subscribers come from this folder.
    pub(super) fn uses(&self, folder: &Path) {
        self.folders.borrow_mut().insert(folder.to_owned());
    }

    /// The folders that [`uses`](Self::uses) recorded.
    pub(super) fn used(&self) -> Vec<PathBuf> {
        self.folders.borrow().iter().cloned().collect()
    }

    pub(super) fn is_clean(&self) -> bool {
        self.problems.borrow().is_empty()
    }

    /// Returns the problems, and the files that the configuration depends on.
    pub(super) fn finish(self) -> (Vec<Problem>, Vec<PathBuf>) {
        let files = self.files.take().into_iter().collect();
        (self.into_problems(), files)
    }

    fn into_problems(self) -> Vec<Problem> {
        let mut seen: Vec<Problem> = Vec::new();
        for p in self.problems.into_inner() {
            // Every subscriber that uses a wrong default finds it again.
            if !seen
                .iter()
                .any(|s| s.file == p.file && s.place == p.place && s.message == p.message)
            {
                seen.push(p);
            }
        }
        // The loader finds them key by key; a person reads them line by line.
        let files: Vec<PathBuf> = seen.iter().map(|p| p.file.clone()).collect();
        seen.sort_by_key(|p| (files.iter().position(|f| *f == p.file), p.place));
        seen
    }

    pub(super) fn report_file(&self, file: &Path, message: String) {
        self.problems.borrow_mut().push(Problem {
            file: file.to_owned(),
            place: None,
            key: String::new(),
            message,
        });
    }

    fn report_at(&self, source: &Source, at: usize, key: String, message: String) {
        let place = Some(source.position(at));
        self.problems.borrow_mut().push(Problem { file: source.path.clone(), place, key, message });
    }

    pub(super) fn report(&self, value: &Value<'_>, message: impl Into<String>) {
        self.report_at(
            value.source,
            value.span.start,
            value.key.clone(),
            self.as_written(value, message.into()),
        );
    }

    /// Shows values of the environment as their variables' names: one may be a secret in the wrong
    /// place.
    fn as_written(&self, value: &Value<'_>, message: String) -> String {
        let Some(written) = value.value.as_str().filter(|text| text.contains("${")) else {
            return message;
        };
        let Ok(meant) = interpolate(written, self.env) else { return message };
        let message = message.replace(&format!("`{meant}`"), &format!("`{written}`"));
        // A shorter value is hardly a secret, and may be a word of the message.
        if meant.len() < 8 { message } else { message.replace(&meant, written) }
    }

    pub(super) fn report_missing(&self, section: &Section<'_>, key: &str, message: &str) {
        self.report_at(section.source, section.span.start, section.key_of(key), message.to_owned());
    }

    /// Parses a file: reports syntax errors, and returns the parts that could be parsed.
    pub(super) fn parse<'d>(&self, source: &'d Source) -> Spanned<DeTable<'d>> {
        let (table, errors) = DeTable::parse_recoverable(&source.text);
        for e in errors {
            let at = e.span().map_or(0, |s| s.start);
            self.report_at(
                source,
                at,
                String::new(),
                format!("not valid TOML: {}", e.message().trim_end()),
            );
        }
        table
    }

    pub(super) fn root<'d>(
        &self,
        source: &'d Source,
        table: &'d Spanned<DeTable<'d>>,
        keys: &[Key],
    ) -> Section<'d> {
        let section =
            Section { source, path: String::new(), span: table.span(), table: table.get_ref() };
        self.check_keys(&section, keys);
        section
    }

    /// Reports every unknown key of the section.
    fn check_keys(&self, section: &Section<'_>, keys: &[Key]) {
        let keys: Vec<&str> = keys.iter().map(Key::name).collect();
        for name in section.table.keys().filter(|k| !keys.contains(&k.get_ref().as_ref())) {
            let near = keys
                .iter()
                .map(|k| (distance(k, name.get_ref()), *k))
                .min()
                .filter(|(d, _)| *d <= 3);
            let hint = match near {
                Some((_, key)) => format!("did you mean `{key}`?"),
                None if keys.len() == 1 => format!("the only key here is `{}`", keys[0]),
                None => format!("keys here are {}", keys.join(", ")),
            };
            self.report_at(
                section.source,
                name.span().start,
                section.key_of(name.get_ref()),
                format!("unknown key; {hint}"),
            );
        }
    }

    pub(super) fn section<'d>(&self, value: &Value<'d>, keys: &[Key]) -> Option<Section<'d>> {
        let Some(table) = value.value.as_table() else {
            self.report(value, format!("must be a table, not {}", a(value.value)));
            return None;
        };
        let section = Section {
            source: value.source,
            path: value.key.clone(),
            span: value.span.clone(),
            table,
        };
        self.check_keys(&section, keys);
        Some(section)
    }

    /// The entries of a table whose keys are free.
    pub(super) fn entries<'d>(&self, value: &Value<'d>) -> Option<Vec<(&'d str, Value<'d>)>> {
        let Some(table) = value.value.as_table() else {
            self.report(value, format!("must be a table, not {}", a(value.value)));
            return None;
        };
        let section = Section {
            source: value.source,
            path: value.key.clone(),
            span: value.span.clone(),
            table,
        };
        let entry = |name: &'d str| Some((name, section.get(name)?));
        Some(table.keys().filter_map(|name| entry(name.get_ref().as_ref())).collect())
    }

    pub(super) fn array<'d>(&self, value: &Value<'d>) -> Option<Vec<Value<'d>>> {
        let Some(array) = value.value.as_array() else {
            self.report(value, format!("must be an array, not {}", a(value.value)));
            return None;
        };
        let item = |(n, v): (usize, &'d Spanned<DeValue<'d>>)| Value {
            source: value.source,
            key: format!("{}[{n}]", value.key),
            span: v.span(),
            value: v.get_ref(),
        };
        Some(array.iter().enumerate().map(item).collect())
    }

    /// A subscriber's table with the name in its key instead of the index, which starts at 0 in
    /// each file.
    pub(super) fn named<'d>(&self, table: &Value<'d>) -> Value<'d> {
        let name = table
            .value
            .as_table()
            .and_then(|t| t.iter().find(|(key, _)| key.get_ref() == "name")?.1.get_ref().as_str());
        let is_sound = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
        let shown = |name: &&str| (1..=64).contains(&name.len()) && name.bytes().all(is_sound);
        match name.filter(shown) {
            Some(name) => Value { key: format!("subscriber[{name}]"), ..table.clone() },
            None => table.clone(),
        }
    }

    /// A string, with each `${…}` replaced by the environment's value.
    pub(super) fn string(&self, value: &Value<'_>) -> Option<String> {
        let Some(text) = value.value.as_str() else {
            self.report(value, format!("must be a string, not {}", a(value.value)));
            return None;
        };
        interpolate(text, self.env).map_err(|why| self.report(value, why)).ok()
    }

    /// Topic patterns, at least one.
    pub(super) fn patterns(&self, value: &Value<'_>, if_empty: &str) -> Option<Vec<Pattern>> {
        let items = self.array(value)?;
        if items.is_empty() {
            self.report(value, if_empty);
            return None;
        }
        let pattern = |item: &Value<'_>| {
            let text = self.string(item)?;
            Pattern::try_new(&text).map_err(|why| self.report(item, why)).ok()
        };
        let patterns: Vec<Pattern> = items.iter().filter_map(pattern).collect();
        (patterns.len() == items.len()).then_some(patterns)
    }

    pub(super) fn is_string(value: &Value<'_>) -> bool {
        value.value.is_str()
    }

    pub(super) fn bool(&self, value: &Value<'_>) -> Option<bool> {
        let found = value.value.as_bool();
        if found.is_none() {
            self.report(value, format!("must be true or false, not {}", a(value.value)));
        }
        found
    }

    /// An integer within `range`.
    pub(super) fn integer(
        &self,
        value: &Value<'_>,
        range: std::ops::RangeInclusive<i64>,
    ) -> Option<i64> {
        let found =
            value.value.as_integer().and_then(|i| i64::from_str_radix(i.as_str(), i.radix()).ok());
        match found {
            Some(n) if range.contains(&n) => Some(n),
            _ => {
                self.report(
                    value,
                    format!("must be a whole number from {} to {}", range.start(), range.end()),
                );
                None
            }
        }
    }

    pub(super) fn float(&self, value: &Value<'_>) -> Option<f64> {
        let text = value
            .value
            .as_float()
            .map(|f| f.as_str())
            .or(value.value.as_integer().map(|i| i.as_str()));
        let found = text.and_then(|t| t.parse().ok());
        if found.is_none() {
            self.report(value, format!("must be a number, not {}", a(value.value)));
        }
        found
    }

    /// A duration such as `"30s"`, at most `max`.
    pub(super) fn duration(&self, value: &Value<'_>, max: Option<Duration>) -> Option<Duration> {
        if !value.value.is_str() {
            self.report(
                value,
                format!(
                    "must be a duration in quotes such as \"30s\", \"5m\" or \"72h\", not {}",
                    a(value.value)
                ),
            );
            return None;
        }
        let text = self.string(value)?;
        match (humantime::parse_duration(text.trim()), max) {
            (Ok(d), Some(max)) if d > max => {
                self.report(
                    value,
                    format!("must be at most \"{}\"", humantime::format_duration(max)),
                );
                None
            }
            (Ok(d), _) => Some(d),
            (Err(_), _) => {
                self.report(
                    value,
                    format!(
                        "`{text}` is not a duration; write one such as \"30s\", \"5m\" or \"72h\""
                    ),
                );
                None
            }
        }
    }

    /// A size in bytes such as `"1MiB"`, within `range`.
    pub(super) fn size(
        &self,
        value: &Value<'_>,
        range: std::ops::RangeInclusive<u64>,
    ) -> Option<u64> {
        if !value.value.is_str() {
            self.report(
                value,
                format!(
                    "must be a size in quotes such as \"64KiB\" or \"1MiB\", not {}",
                    a(value.value)
                ),
            );
            return None;
        }
        let text = self.string(value)?;
        match text.parse::<bytesize::ByteSize>() {
            Ok(size) if range.contains(&size.0) => Some(size.0),
            Ok(_) => {
                let show = |n: &u64| bytesize::ByteSize(*n).display().iec().to_string();
                self.report(
                    value,
                    format!("must be from {} to {}", show(range.start()), show(range.end())),
                );
                None
            }
            Err(_) => {
                self.report(
                    value,
                    format!("`{text}` is not a size; write one such as \"64KiB\" or \"1MiB\""),
                );
                None
            }
        }
    }
}

/// The name of a TOML value's type, with its article.
fn a(value: &DeValue<'_>) -> String {
    let kind = value.type_str();
    let article = if kind.starts_with(['a', 'i', 'o']) { "an" } else { "a" };
    format!("{article} {kind}")
}

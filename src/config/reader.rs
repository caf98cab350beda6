//! Reads TOML so that every mistake is found in one go and named by its place.
//!
//! Deserialising into structs would stop at the first mistake and could not say where an override
//! came from; this walks the parsed document with its spans instead.

use std::{
    cell::RefCell,
    collections::BTreeSet,
    fmt, io,
    ops::Range,
    path::{Path, PathBuf},
    time::Duration,
};

use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use super::keys::Key;

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
    fn place(&self, at: usize) -> (usize, usize) {
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

/// Collects the problems and knows the environment.
pub(super) struct Reader<'e> {
    env: &'e dyn Fn(&str) -> Option<String>,
    /// Where there is no disk: the files that there are.
    memory: Option<&'e [(&'e str, &'e str)]>,
    /// Folders that subscribers in use came from.
    before: &'e [PathBuf],
    problems: RefCell<Vec<Problem>>,
    files: RefCell<BTreeSet<PathBuf>>,
    folders: RefCell<BTreeSet<PathBuf>>,
}

/// A table and the keys it may have.
#[derive(Clone)]
pub(super) struct Section<'d> {
    pub(super) source: &'d Source,
    pub(super) path: String,
    span: Range<usize>,
    table: &'d DeTable<'d>,
}

/// A value, its place and its full key.
#[derive(Clone)]
pub(super) struct Value<'d> {
    pub(super) source: &'d Source,
    pub(super) key: String,
    span: Range<usize>,
    value: &'d DeValue<'d>,
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
        let (line, column) = self.source.place(self.span.start);
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

    fn key_of(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) }
    }
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

    /// For a daemon whose subscribers came from these folders.
    pub(super) fn after(env: &'e dyn Fn(&str) -> Option<String>, before: &'e [PathBuf]) -> Self {
        Self { before, ..Self::new(env) }
    }

    /// For a configuration that a stranger wrote, whose paths may name anything.
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

    /// A file that the configuration is made of.
    pub(super) fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        self.depends_on(path);
        let Some(files) = self.memory else { return std::fs::read(path) };
        files
            .iter()
            .find(|(name, _)| path == Path::new(name))
            .map(|(_, text)| text.as_bytes().to_vec())
            .ok_or(io::ErrorKind::NotFound.into())
    }

    /// As [`read`](Self::read).
    pub(super) fn read_to_string(&self, path: &Path) -> io::Result<String> {
        String::from_utf8(self.read(path)?)
            .map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "it is not UTF-8"))
    }

    /// Notes that the configuration is made of this file, or of what is in this folder.
    pub(super) fn depends_on(&self, path: &Path) {
        self.files.borrow_mut().insert(path.to_owned());
    }

    /// Whether subscribers in use came from this folder.
    pub(super) fn is_in_use(&self, folder: &Path) -> bool {
        self.before.iter().any(|f| f == folder)
    }

    /// Notes that subscribers come from this folder.
    pub(super) fn uses(&self, folder: &Path) {
        self.folders.borrow_mut().insert(folder.to_owned());
    }

    /// What [`uses`](Self::uses) has noted.
    pub(super) fn used(&self) -> Vec<PathBuf> {
        self.folders.borrow().iter().cloned().collect()
    }

    pub(super) fn is_clean(&self) -> bool {
        self.problems.borrow().is_empty()
    }

    /// The problems, and the files it depends on.
    pub(super) fn finish(self) -> (Vec<Problem>, Vec<PathBuf>) {
        let files = self.files.take().into_iter().collect();
        (self.into_problems(), files)
    }

    fn into_problems(self) -> Vec<Problem> {
        let mut seen: Vec<Problem> = Vec::new();
        for p in self.problems.into_inner() {
            // A mistake in a default is met again by every subscriber that it applies to.
            if !seen
                .iter()
                .any(|s| s.file == p.file && s.place == p.place && s.message == p.message)
            {
                seen.push(p);
            }
        }
        // Found in the order of the keys' meaning; read in the order of the files' lines.
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
        let place = Some(source.place(at));
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

    /// What the environment holds is shown by the name of its variable: it may be a secret that
    /// stands where it does not belong.
    fn as_written(&self, value: &Value<'_>, message: String) -> String {
        let Some(written) = value.value.as_str().filter(|text| text.contains("${")) else {
            return message;
        };
        let Ok(meant) = interpolate(written, self.env) else { return message };
        let message = message.replace(&format!("`{meant}`"), &format!("`{written}`"));
        // What is shorter is no secret, and may be a word of the message.
        if meant.len() < 8 { message } else { message.replace(&meant, written) }
    }

    pub(super) fn report_missing(&self, section: &Section<'_>, key: &str, message: &str) {
        self.report_at(section.source, section.span.start, section.key_of(key), message.to_owned());
    }

    /// Parses a file; syntax errors are reported, what could be parsed is returned.
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

    /// Reports every key that the section may not have.
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

    /// The keys and values of a table whose keys are free.
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

    /// The table of a subscriber, with its name in its key instead of its number, which counts anew
    /// in each file.
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

    /// A string with its `${…}` replaced by the environment's.
    pub(super) fn string(&self, value: &Value<'_>) -> Option<String> {
        let Some(text) = value.value.as_str() else {
            self.report(value, format!("must be a string, not {}", a(value.value)));
            return None;
        };
        interpolate(text, self.env).map_err(|why| self.report(value, why)).ok()
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

/// The type of a TOML value with its article.
fn a(value: &DeValue<'_>) -> String {
    let kind = value.type_str();
    let article = if kind.starts_with(['a', 'i', 'o']) { "an" } else { "a" };
    format!("{article} {kind}")
}

/// Replaces `${VAR}` and `${VAR:-default}`; `$${` is a literal `${`.
fn interpolate(text: &str, env: &dyn Fn(&str) -> Option<String>) -> Result<String, String> {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find("${") {
        if at > 0 && rest.as_bytes()[at - 1] == b'$' {
            out.push_str(&rest[..at - 1]);
            out.push_str("${");
            rest = &rest[at + 2..];
            continue;
        }
        out.push_str(&rest[..at]);
        let body = &rest[at + 2..];
        let end =
            body.find('}').ok_or("`${` has no closing `}`; write `$${` for a literal `${`")?;
        let (name, default) = match body[..end].split_once(":-") {
            Some((name, default)) => (name, Some(default)),
            None => (&body[..end], None),
        };
        if default.is_some_and(|default| default.contains("${")) {
            return Err(
                "a default cannot hold another `${…}`: it would be taken as it is written; give the value itself, or none".to_owned()
            );
        }
        let first = name.chars().next();
        if !first.is_some_and(|c| c.is_ascii_alphabetic() || c == '_')
            || !name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
        {
            return Err("the name in `${…}` is not that of an environment variable; write `${NAME}` or `${NAME:-default}`".to_owned());
        }
        match (env(name), default) {
            (Some(value), None) => out.push_str(&value),
            (Some(value), Some(_)) if !value.is_empty() => out.push_str(&value),
            (_, Some(default)) => out.push_str(default),
            (None, None) => {
                return Err(format!(
                    "environment variable {name} is not set; set it, or give a default: `${{{name}:-…}}`"
                ));
            }
        }
        rest = &body[end + 1..];
    }
    out.push_str(rest);
    Ok(out)
}

/// Whether `text` may be a mistyped `word`.
/// By how many letters they differ, if that can be a slip.
pub(crate) fn nearness(text: &str, word: &str) -> Option<usize> {
    let is_near = |letters: &usize| *letters <= 2;
    (text.len().abs_diff(word.len()) <= 2).then(|| distance(word, text)).filter(is_near)
}

/// Levenshtein's.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.iter().enumerate() {
            let substitute = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = substitute.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn environment_variables_are_replaced_once() {
        let env = |name: &str| match name {
            "A" => Some("${B}".to_owned()),
            "EMPTY" => Some(String::new()),
            _ => None,
        };
        for (text, expected) in [
            ("x", Ok("x")),
            ("${A}", Ok("${B}")),
            ("a${A}b${A}", Ok("a${B}b${B}")),
            ("${NOPE:-d}", Ok("d")),
            ("${EMPTY:-d}", Ok("d")),
            ("${EMPTY}", Ok("")),
            ("${NOPE:-}", Ok("")),
            ("$${A}", Ok("${A}")),
            ("$A $", Ok("$A $")),
            ("${NOPE}", Err("NOPE is not set")),
            ("${A", Err("no closing")),
            ("${}", Err("not that of an environment variable")),
            ("${1A}", Err("not that of an environment variable")),
            ("${NOPE:-${B}}", Err("a default cannot hold another")),
            ("${A:-${B}}", Err("a default cannot hold another")),
            ("x${A:-y${B:-z}}", Err("a default cannot hold another")),
        ] {
            match (interpolate(text, &env), expected) {
                (Ok(found), Ok(expected)) => assert_eq!(found, expected),
                (Err(found), Err(part)) => assert!(found.contains(part), "{found}"),
                (found, _) => panic!("{text}: {found:?}"),
            }
        }
    }

    #[test]
    fn the_distance_is_levenshteins() {
        for (a, b, d) in [
            ("", "abc", 3),
            ("kitten", "sitting", 3),
            ("timeout", "timeout", 0),
            ("time_out", "timeout", 1),
        ] {
            assert_eq!(distance(a, b), d);
        }
    }
}

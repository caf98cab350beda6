//! Where the values of a subscriber come from.

use std::collections::BTreeMap;

use super::files;
use crate::config::{
    document::{Section, Source, Value},
    keys::{self, Key},
    model::Model,
    reader::Reader,
};

/// The groups that a preset and the top level have too.
const GROUPS: [(&str, &[Key]); 4] = [
    ("batch", keys::BATCH),
    ("http", keys::HTTP),
    ("retry", keys::RETRY),
    ("circuit_breaker", keys::BREAKER),
];

/// The place of each key of a subscriber that is set somewhere: the file's name and the line, or the
/// preset. Any other key has its default.
pub(in crate::config) fn origins(
    reader: &Reader<'_>,
    source: &Source,
    subscriber: &str,
) -> BTreeMap<&'static str, String> {
    let document = reader.parse(source);
    let root = reader.root(source, &document, keys::ROOT);
    if let Some(found) = in_file(reader, &root, &root, subscriber) {
        return found;
    }
    let included = files::included(reader, &root).into_iter().find_map(|path| {
        let text = reader.read_to_string(&path).ok()?;
        let included = Source::file(path, text);
        let document = reader.parse(&included);
        in_file(reader, &reader.root(&included, &document, keys::INCLUDED), &root, subscriber)
    });
    included.unwrap_or_default()
}

fn in_file(
    reader: &Reader<'_>,
    file: &Section<'_>,
    root: &Section<'_>,
    subscriber: &str,
) -> Option<BTreeMap<&'static str, String>> {
    let tables = reader.array(&file.get("subscriber")?)?;
    let section = tables.iter().find_map(|table| {
        let section = reader.section(&reader.named(table), keys::SUBSCRIBER)?;
        let name = section.get("name").and_then(|name| reader.string(&name))?;
        (name == subscriber).then_some(section)
    })?;
    let name = section.get("preset").and_then(|name| reader.string(&name));
    let model = name.and_then(|name| Model::named(&name));
    let preset = Source::file("preset".into(), model.map_or("", |m| m.preset).to_owned());
    let document = reader.parse(&preset);
    let preset = model.map(|_| reader.root(&preset, &document, keys::SUBSCRIBER));
    let place = |path: &str| {
        let own = value(reader, &section, path).map(|value| value.line());
        let of_preset = || {
            preset
                .as_ref()
                .and_then(|preset| value(reader, preset, path))
                .map(|_| "preset".to_owned())
        };
        // The top level has groups alone.
        let base =
            || value(reader, root, path).filter(|_| path.contains('.')).map(|value| value.line());
        own.or_else(of_preset).or_else(base)
    };
    Some(keys::fields().filter_map(|(path, _)| Some((path, place(path)?))).collect())
}

/// The value of a key with its tables.
fn value<'d>(reader: &Reader<'_>, section: &Section<'d>, path: &str) -> Option<Value<'d>> {
    let Some((group, key)) = path.split_once('.') else { return section.get(path) };
    let (_, keys) = GROUPS.iter().find(|(name, _)| *name == group)?;
    reader.section(&section.get(group)?, keys)?.get(key)
}

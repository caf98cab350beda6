//! The files that `include` names.

use std::path::{Path, PathBuf};

use crate::config::{
    document::{Section, Value},
    include,
    reader::Reader,
};

/// The files that `include` names, each once, in order.
pub(super) fn included(reader: &Reader<'_>, root: &Section<'_>) -> Vec<PathBuf> {
    let Some(value) = root.get("include") else { return Vec::new() };
    let mut files = Vec::new();
    for item in reader.array(&value).unwrap_or_default() {
        let Some(pattern) = reader.string(&item) else { continue };
        if include::is_wild(&pattern) {
            files.extend(matching(reader, &item, &pattern, root.source.folder()));
        } else {
            // A missing file is reported when it is read. A file that appears or disappears is a
            // change of its folder.
            let path = root.source.relative(&pattern);
            path.parent().into_iter().for_each(|folder| reader.depends_on(folder));
            files.push(path);
        }
    }
    let mut seen = std::collections::HashSet::new();
    files.retain(|f| seen.insert(f.clone()));
    files
}

/// The files that a pattern of `include` matches. None is fine, unless a folder is absent that the
/// current configuration came from: all of its subscribers would be removed.
fn matching(reader: &Reader<'_>, item: &Value<'_>, pattern: &str, base: &Path) -> Vec<PathBuf> {
    if !reader.has_disk() {
        return Vec::new();
    }
    let found = match include::find(base, pattern) {
        Ok(found) => found,
        Err(e) => {
            reader.report(item, format!("is not a glob pattern: {e}"));
            return Vec::new();
        }
    };
    found.folders.iter().for_each(|folder| reader.depends_on(folder));
    let remedy = "restore it, or remove the pattern from `include`";
    for (path, why) in &found.errors {
        reader.report(item, format!("cannot read the folder {}: {why}; {remedy}", path.display()));
    }
    if found.prefix_is_absent && reader.is_in_use(&found.prefix) {
        reader.report(
            item,
            format!(
                "the folder {} is absent, and current subscribers come from it; {remedy}",
                found.prefix.display()
            ),
        );
    }
    if !found.files.is_empty() {
        reader.uses(&found.prefix);
    }
    found.files
}

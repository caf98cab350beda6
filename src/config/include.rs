//! The files that a pattern of `include` matches.
//!
//! The crate `glob` treats an unreadable folder as an empty one, and a subscriber that is not found
//! is removed. Here every error but "no such file" is reported.

use std::{
    io,
    path::{Path, PathBuf},
};

use glob::{MatchOptions, Pattern};

/// `*` does not match files that editors and other systems put next to a file: `.#a.toml`,
/// `._a.toml`.
const OPTIONS: MatchOptions = MatchOptions {
    case_sensitive: true,
    require_literal_separator: true,
    require_literal_leading_dot: true,
};

/// The result for one pattern.
#[derive(Debug, Default)]
pub(super) struct Found {
    /// Sorted by name.
    pub(super) files: Vec<PathBuf>,
    /// Folders in which a new or a deleted file changes the result.
    pub(super) folders: Vec<PathBuf>,
    /// The folder before the first wildcard.
    pub(super) prefix: PathBuf,
    pub(super) prefix_is_absent: bool,
    /// Folders that could not be read.
    pub(super) errors: Vec<(PathBuf, io::Error)>,
}

/// Whether it has a wildcard; without one it is the name of a single file.
pub(super) fn is_wild(pattern: &str) -> bool {
    pattern.contains(['*', '?', '['])
}

/// Finds the files that `pattern` matches; a relative pattern is relative to `base`.
///
/// # Errors
/// The text is not a pattern.
pub(super) fn find(base: &Path, pattern: &str) -> Result<Found, glob::PatternError> {
    Pattern::new(pattern)?;
    let parts: Vec<&str> =
        pattern.split('/').filter(|part| !part.is_empty() && *part != ".").collect();
    let wild = parts.iter().position(|part| is_wild(part)).unwrap_or(parts.len());
    let root = if pattern.starts_with('/') { Path::new("/") } else { base };
    let prefix = parts[..wild].iter().fold(root.to_owned(), |path, part| path.join(part));
    let parts =
        parts[wild..].iter().map(|part| Pattern::new(part)).collect::<Result<Vec<_>, _>>()?;
    let mut found = Found { prefix: prefix.clone(), ..Found::default() };
    // The working directory has an empty path here.
    let there = if prefix.as_os_str().is_empty() { Path::new(".") } else { &prefix };
    match std::fs::read_dir(there) {
        Ok(_) => found.walk(&prefix, &parts),
        Err(e) => {
            found.folders.push(prefix.clone());
            found.prefix_is_absent = e.kind() == io::ErrorKind::NotFound;
            if !found.prefix_is_absent {
                found.errors.push((prefix, e));
            }
        }
    }
    found.files.sort_unstable();
    found.files.dedup();
    found.folders.sort_unstable();
    found.folders.dedup();
    Ok(found)
}

impl Found {
    fn walk(&mut self, at: &Path, parts: &[Pattern]) {
        let Some((first, rest)) = parts.split_first() else {
            self.files.push(at.to_owned());
            return;
        };
        if first.as_str() == "**" {
            self.walk(at, rest);
            for (name, path) in self.list(at) {
                // Symbolic links are not followed: one may lead back here.
                let is_folder = path.symlink_metadata().is_ok_and(|m| m.is_dir());
                if is_folder && !name.starts_with('.') {
                    self.walk(&path, parts);
                }
            }
        } else if is_wild(first.as_str()) {
            for (name, path) in self.list(at) {
                if first.matches_with(&name, OPTIONS) {
                    self.enter(path, rest);
                }
            }
        } else {
            let path = at.join(first.as_str());
            match path.symlink_metadata() {
                Ok(_) => self.enter(path, rest),
                Err(e) => self.failed(path, e),
            }
        }
    }

    /// Continues below a path, if the pattern goes on and the path is a folder.
    fn enter(&mut self, path: PathBuf, rest: &[Pattern]) {
        if rest.is_empty() {
            self.files.push(path);
            return;
        }
        match path.metadata() {
            Ok(m) if m.is_dir() => self.walk(&path, rest),
            Ok(_) => {}
            Err(e) => self.failed(path, e),
        }
    }

    /// Lists a folder: names and paths.
    fn list(&mut self, folder: &Path) -> Vec<(String, PathBuf)> {
        self.folders.push(folder.to_owned());
        let there = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
        let entries = std::fs::read_dir(there).and_then(Iterator::collect::<io::Result<Vec<_>>>);
        match entries {
            Ok(entries) => entries
                .into_iter()
                .map(|entry| {
                    let name = entry.file_name();
                    (name.to_string_lossy().into_owned(), folder.join(name))
                })
                .collect(),
            Err(e) => {
                self.failed(folder.to_owned(), e);
                Vec::new()
            }
        }
    }

    /// Records an error; a path that does not exist, or not any more, is none.
    fn failed(&mut self, path: PathBuf, e: io::Error) {
        if e.kind() != io::ErrorKind::NotFound {
            self.errors.push((path, e));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::{ffi::OsStrExt as _, fs::symlink};

    fn dir() -> tempfile::TempDir {
        let dir = tempfile::tempdir().expect("a directory");
        for file in [
            "a.toml",
            ".#a.toml",
            "._a.toml",
            "b.txt",
            "one/x.toml",
            "one/deep/y.toml",
            "two/x.toml",
            ".git/x.toml",
        ] {
            let path = dir.path().join(file);
            std::fs::create_dir_all(path.parent().expect("a folder")).expect("makes");
            std::fs::write(path, "").expect("writes");
        }
        std::fs::write(dir.path().join(std::ffi::OsStr::from_bytes(b"\xff.bin")), "")
            .expect("writes");
        dir
    }

    fn names(base: &Path, pattern: &str) -> Vec<String> {
        let found = find(base, pattern).expect("a pattern");
        assert!(found.errors.is_empty() && !found.prefix_is_absent, "{pattern}: {found:?}");
        found
            .files
            .iter()
            .map(|f| f.strip_prefix(base).expect("below").display().to_string())
            .collect()
    }

    #[test]
    fn a_pattern_names_what_is_there_and_no_dot_file_unless_it_is_written() {
        let dir = dir();
        // A folder whose own name could be a pattern.
        let odd = dir.path().join("[x]*");
        std::fs::create_dir(&odd).expect("makes");
        std::fs::write(odd.join("z.toml"), "").expect("writes");
        for (pattern, expected) in [
            ("*.toml", &["a.toml"][..]),
            ("./*.t?t", &["b.txt"]),
            (".*.toml", &[".#a.toml", "._a.toml"]),
            ("*/x.toml", &["one/x.toml", "two/x.toml"]),
            ("o[mn]e/*", &["one/deep", "one/x.toml"]),
            ("one/**/*.toml", &["one/deep/y.toml", "one/x.toml"]),
            ("*/nothing.toml", &[]),
            ("*/*/*/*.toml", &[]),
        ] {
            assert_eq!(names(dir.path(), pattern), expected, "{pattern}");
        }
        assert_eq!(names(&odd, "*.toml"), ["z.toml"]);
        assert_eq!(names(dir.path(), &format!("{}/*.txt", dir.path().display())), ["b.txt"]);
        assert!(find(dir.path(), "a***b").is_err());
    }

    #[test]
    fn an_unreadable_path_is_an_error_and_an_absent_one_is_not() {
        let dir = dir();
        symlink("loop", dir.path().join("loop")).expect("links");
        symlink("nowhere", dir.path().join("dangling")).expect("links");
        for (pattern, part) in [
            ("a.toml/*.toml", "a.toml"),
            ("a.toml/more/*.toml", "a.toml/more"),
            ("loop/*.toml", "loop"),
            ("l*p/*.toml", "loop"),
        ] {
            let found = find(dir.path(), pattern).expect("a pattern");
            let (path, why) = &found.errors[0];
            assert!(
                found.files.is_empty() && *path == dir.path().join(part),
                "{pattern}: {why}: {found:?}"
            );
        }
        for pattern in ["none/*.toml", "none/more/*.toml", "dangling/*.toml"] {
            let found = find(dir.path(), pattern).expect("a pattern");
            assert!(
                found.errors.is_empty()
                    && found.prefix_is_absent
                    && found.folders == [found.prefix],
                "{pattern}"
            );
        }
    }
}

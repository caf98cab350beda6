//! Holds the code to the layers that `src/lib.rs` draws.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

/// A room of the map, and its files and folders where their order counts.
struct Room {
    name: String,
    files: Vec<String>,
    folders: Vec<Folder>,
}

/// A folder of a room, and its files in their order; the file of the folder itself is the last.
struct Folder {
    name: String,
    files: Vec<String>,
}

/// The map at the top of `src/lib.rs`, in its order.
fn map() -> Vec<Room> {
    let text = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/lib.rs"))
        .expect("the map");
    let block = text
        .split("# The rooms")
        .nth(1)
        .and_then(|rest| rest.split("```").nth(1))
        .expect("a block");
    let mut rooms: Vec<Room> = Vec::new();
    for line in block.lines().filter_map(|line| line.strip_prefix("//! ")) {
        if let Some((name, rest)) = line.split_once(' ').filter(|(name, _)| !name.is_empty()) {
            let files = rest
                .trim_start()
                .split("  ")
                .next()
                .filter(|files| files.contains(" · "))
                .unwrap_or_default();
            let name = name.trim_end_matches('/').trim_end_matches(".rs").to_owned();
            rooms.push(Room { name, files: names(files).collect(), folders: Vec::new() });
            continue;
        }
        let Some(room) = rooms.last_mut() else { continue };
        if let Some((name, files)) = line.trim_start().split_once("/ · ") {
            room.folders.push(Folder { name: name.to_owned(), files: names(files).collect() });
        } else if let Some(more) = line.trim_start().strip_prefix("· ") {
            let files = room.folders.last_mut().map_or(&mut room.files, |folder| &mut folder.files);
            files.extend(names(more));
        }
    }
    rooms
}

fn names(list: &str) -> impl Iterator<Item = String> {
    list.split(" · ").filter(|f| !f.is_empty()).map(str::to_owned)
}

fn sources(below: &Path, into: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(below).expect("a folder") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            sources(&path, into);
        } else {
            into.push(path);
        }
    }
}

/// The module that a file belongs to, and its text without the tests at its end. Files that are
/// only for tests are left out.
fn modules() -> Vec<(String, PathBuf, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    sources(&root, &mut files);
    files.retain(|path| !path.ends_with("tests.rs") && !path.ends_with("testing.rs"));
    let module = |path: PathBuf| {
        let name = path
            .strip_prefix(&root)
            .expect("below")
            .components()
            .next()
            .expect("a name")
            .as_os_str()
            .to_string_lossy()
            .replace(".rs", "");
        let text = std::fs::read_to_string(&path).expect("text");
        let code = text.split("#[cfg(test)]").next().unwrap_or_default().to_owned();
        (name, path, code)
    };
    files
        .into_iter()
        .map(module)
        .filter(|(name, ..)| !["main", "lib"].contains(&name.as_str()))
        .collect()
}

/// The paths behind `root`, such as `crate::`, groups included.
fn paths(code: &str, root: &str) -> Vec<String> {
    let mut paths = Vec::new();
    for part in code.split(root).skip(1) {
        expand("", part, &mut paths);
    }
    paths
}

/// The paths behind `root`, each as its first two segments.
fn imports(code: &str, root: &str) -> Vec<(String, String)> {
    let segments = |path: String| {
        let mut segments = path.split("::").map(str::to_owned);
        (segments.next().unwrap_or_default(), segments.next().unwrap_or_default())
    };
    paths(code, root).into_iter().map(segments).filter(|(first, _)| !first.is_empty()).collect()
}

/// Reads one path, or a group of paths, and returns what is behind it.
fn expand<'t>(before: &str, text: &'t str, paths: &mut Vec<String>) -> &'t str {
    let text = text.trim_start();
    let Some(mut group) = text.strip_prefix('{') else {
        let end = text.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(text.len());
        let path = format!("{before}{}", &text[..end]);
        return match text[end..].strip_prefix("::") {
            Some(rest) if !rest.starts_with('<') => expand(&format!("{path}::"), rest, paths),
            _ => {
                paths.push(path);
                &text[end..]
            }
        };
    };
    loop {
        group = expand(before, group, paths);
        // Between two of them: a comma, another name, an asterisk.
        group = group.trim_start_matches(|c| c != ',' && c != '}');
        match group.strip_prefix(',').map(str::trim_start) {
            Some(rest) if !rest.starts_with('}') => group = rest,
            Some(rest) => return &rest[1..],
            None => return group.strip_prefix('}').unwrap_or_default(),
        }
    }
}

#[test]
fn imports_are_read_with_their_groups() {
    let found = imports(
        "use crate::{\n    a,\n    b::{self, c::{D, E as F}, g},\n};\ncrate::h::i(crate::j);",
        "crate::",
    );
    let found: Vec<_> = found.iter().map(|(a, b)| format!("{a}:{b}")).collect();
    assert_eq!(found, ["a:", "b:self", "b:c", "b:c", "b:g", "h:i", "j:"]);
}

#[test]
fn the_map_names_every_room_and_file_of_it() {
    let map = map();
    for room in &map {
        let of_room: Vec<_> =
            modules().into_iter().filter(|(name, ..)| *name == room.name).collect();
        assert!(!of_room.is_empty(), "the map names `{}`, which is not there", room.name);
        let mut there: Vec<String> =
            of_room.iter().map(|(name, path, _)| file_of(name, path)).collect();
        there.sort();
        there.dedup();
        for file in &room.files {
            assert!(
                there.contains(file),
                "the map names `{file}` in `{}`, which is not there",
                room.name
            );
        }
        // The file of the room itself may be only a list of the others.
        let unnamed: Vec<_> = there
            .iter()
            .filter(|f| !room.files.is_empty() && **f != room.name && !room.files.contains(f))
            .collect();
        assert!(unnamed.is_empty(), "of `{}` the map does not name {unnamed:?}", room.name);
    }
}

/// The file of a room, or the folder in it, that a path is of.
fn file_of(room: &str, path: &Path) -> String {
    part(path, 1).unwrap_or_else(|| room.to_owned())
}

/// The part of a path below `src`, without `.rs`.
fn part(path: &Path, n: usize) -> Option<String> {
    let below =
        path.strip_prefix(Path::new(env!("CARGO_MANIFEST_DIR")).join("src")).expect("below");
    below.components().nth(n).map(|c| c.as_os_str().to_string_lossy().replace(".rs", ""))
}

#[test]
fn a_file_of_a_folder_imports_only_from_those_before_it_on_the_map() {
    let modules = modules();
    let mut seen = 0;
    for room in map() {
        for Folder { name, files } in &room.folders {
            let mut there = Vec::new();
            for (_, path, code) in modules
                .iter()
                .filter(|(of, path, _)| *of == room.name && part(path, 1).as_ref() == Some(name))
            {
                let Some(file) = part(path, 2) else { continue };
                let own = files.iter().position(|f| *f == file).unwrap_or_else(|| {
                    panic!("of `{}/{name}` the map does not name `{file}`", room.name)
                });
                there.push(file);
                let mut inside = Vec::new();
                if part(path, 3).is_none() {
                    inside.extend(imports(code, "super::").into_iter().map(|(first, _)| first));
                }
                let folder = format!("{}::{name}", room.name);
                inside.extend(paths(code, "crate::").into_iter().filter_map(|path| {
                    let behind = path.strip_prefix(&folder)?.strip_prefix("::")?;
                    Some(behind.split("::").next().unwrap_or_default().to_owned())
                }));
                for import in inside {
                    let at = files.iter().position(|f| *f == import);
                    assert!(
                        at.is_some_and(|at| at < own),
                        "{} imports `{import}` of its own folder, which is not before it on the map",
                        path.display()
                    );
                    seen += 1;
                }
            }
            let gone: Vec<_> = files.iter().filter(|f| !there.contains(f)).collect();
            assert!(gone.is_empty(), "the map names {gone:?} in `{name}`, which are not there");
        }
    }
    assert!(seen > 10, "only {seen} imports were found: this test reads them wrongly");
}

#[test]
fn a_path_climbs_one_step_or_begins_at_the_crate() {
    for (_, path, code) in modules() {
        let climbs = imports(&code, "super::").iter().any(|(first, _)| first == "super");
        assert!(!climbs, "{} says `super::super`; write `crate::…`", path.display());
    }
}

#[test]
fn a_room_imports_only_from_those_above_it_on_the_map_and_a_file_from_those_before_it() {
    let map = map();
    let place: BTreeMap<&str, usize> =
        map.iter().enumerate().map(|(n, room)| (room.name.as_str(), n)).collect();
    let (mut seen, mut seen_inside) = (0, 0);
    for (room, path, code) in modules() {
        let own = *place
            .get(room.as_str())
            .unwrap_or_else(|| panic!("{} stands in no room of the map", path.display()));
        let files = &map[own].files;
        let file = file_of(&room, &path);
        let is_second_level = path.parent().is_some_and(|p| p.ends_with(&room));
        let mut inside = Vec::new();
        for (other, next) in imports(&code, "crate::") {
            if other == room {
                // Without a second segment it is the room itself, as in `pub(in crate::cli)`.
                inside.extend(Some(next).filter(|next| !next.is_empty()));
                continue;
            }
            let at = *place.get(other.as_str()).unwrap_or_else(|| {
                panic!("{} imports `{other}`, which stands in no room", path.display())
            });
            assert!(
                at < own,
                "{} imports `{other}` from a room below its own on the map",
                path.display()
            );
            seen += 1;
        }
        if is_second_level {
            inside.extend(imports(&code, "super::").into_iter().map(|(first, _)| first));
        }
        // A file of a folder may import from its own folder, whose order another test knows.
        inside.retain(|name| *name != file);
        let Some(own) = files.iter().position(|f| *f == file) else { continue };
        for name in inside {
            // A name that is no file is an item of the room's own file.
            let at = files
                .iter()
                .position(|f| *f == name)
                .or_else(|| files.iter().position(|f| *f == room));
            assert!(
                at.is_some_and(|at| at < own),
                "{} imports `{name}` of its own room, which is not before it on the map",
                path.display()
            );
            seen_inside += 1;
        }
    }
    assert!(
        seen > 30 && seen_inside > 10,
        "only {seen} and {seen_inside} imports were found: this test reads them wrongly"
    );
}

#[test]
fn each_protocol_is_known_in_one_place() {
    for (name, allowed) in [
        ("lapin", &["src/queue/amqp"][..]),
        ("rusqlite", &["src/sqlite", "src/queue/embedded", "src/store/sqlite"]),
        // The command line asks the daemon with it, and the inspection a broker's management API.
        ("reqwest", &["src/endpoint/webhook", "src/cli/daemon.rs", "src/queue/amqp/management.rs"]),
        ("tokio_rustls", &["src/endpoint/inspect.rs", "src/queue/amqp/wire.rs"]),
        // It makes the admin listener, and it is inside reqwest's errors.
        ("hyper::", &["src/admin/connections.rs", "src/endpoint/webhook"]),
        ("h2::", &["src/endpoint/webhook/errors.rs"]),
        (
            "rustix",
            &[
                "src/queue/embedded",
                "src/sqlite/threads.rs",
                "src/store/sqlite/upkeep.rs",
                "src/failpoint.rs",
                "src/admin/connections.rs",
                "src/cli/terminal.rs",
                "src/telemetry/resources.rs",
            ],
        ),
        ("toml::", &["src/config"]),
        ("backoff::", &["src/policy/retry.rs"]),
        ("clap::", &["src/cli"]),
        ("flate2", &["src/event/inflate.rs", "src/endpoint/webhook/compression.rs"]),
        ("sd_notify::", &["src/supervisor/systemd.rs"]),
        ("prometheus_client", &["src/telemetry/metrics"]),
    ] {
        let mut users = 0;
        for (_, path, code) in modules() {
            let code: String = code
                .lines()
                .filter(|l| !l.trim_start().starts_with("//"))
                .collect::<Vec<_>>()
                .join("\n");
            if !code.contains(name) {
                continue;
            }
            users += 1;
            let at_home = allowed.iter().any(|a| path.to_string_lossy().contains(a));
            assert!(at_home, "{} uses {name}, which belongs to {allowed:?}", path.display());
        }
        assert!(users > 0, "no file uses {name}");
    }
}

#[test]
fn only_main_ends_the_process_and_only_the_clock_asks_the_time() {
    for (_, path, code) in modules() {
        assert!(!code.contains("process::exit"), "{}", path.display());
        if !path.ends_with("clock.rs") {
            assert!(
                !code.contains("SystemTime::now") && !code.contains("Instant::now"),
                "{}",
                path.display()
            );
        }
    }
}

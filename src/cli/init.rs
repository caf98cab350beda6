//! `init`: writes the commented default configuration to a file, with a new token.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use super::{failed::Failed, secret::new_token};
use crate::{config, telemetry::finding::shell_word};

/// The file's permissions: it has a token and may get secrets, so only its owner reads it.
const MODE: u32 = 0o600;

/// The line of the default configuration in whose place the new token stands.
const WITHOUT_TOKEN: &str = "\n# token = \"${HOOKTRAIL_ADMIN_TOKEN}\"\n";

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The file to write; by default the one of --config
    #[arg(value_name = "PATH", value_hint = clap::ValueHint::FilePath)]
    path: Option<PathBuf>,
    /// Replace an existing file
    #[arg(long)]
    force: bool,
}

pub(super) fn run(args: Args, configured: &Path) -> Result<(), Failed> {
    let path = args.path.as_deref().unwrap_or(configured);
    write(path, args.force).map_err(|e| match e.kind() {
        io::ErrorKind::AlreadyExists => Failed::Usage(format!(
            "{} exists and was left as it is; name another path, or --force to replace it",
            path.display()
        )),
        _ => Failed::Runtime(format!("{} cannot be written: {e}", path.display())),
    })?;
    let listen = config::load(path).map_err(Failed::Config)?.admin.listen;
    let it = shell_word(&path.to_string_lossy());
    println!(
        "wrote {path}, every key with its default and what it means, and a new [admin] token; only you can read it

Next:
  1. Describe a subscriber: the end of the file shows one. `hooktrail secret` makes its secret.
  2. hooktrail --config {it} check       reports every mistake in it
  3. hooktrail --config {it} plan        shows what it would do: retries, memory, dead letters
  4. hooktrail --config {it} test NAME   sends one signed event to a subscriber
  5. hooktrail --config {it} run         the daemon

While it runs, the console is at http://{listen}/console/ in a browser on this machine.
Sign in with the value of `token` in [admin] of {path}.",
        path = path.display(),
    );
    Ok(())
}

/// Writes the file in one step, so that a daemon that watches it never reads a part.
fn write(path: &Path, force: bool) -> io::Result<()> {
    if let Some(parent) = path.parent().filter(|p| !p.as_os_str().is_empty()) {
        let made = DirBuilder::new().recursive(true).mode(0o755).create(parent);
        // Another kind of error: a file in the place of a directory is not the file to be written.
        made.map_err(|e| io::Error::other(format!("the directory {}: {e}", parent.display())))?;
    }
    if !force {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(MODE).open(path)?;
        return fill(&mut file).inspect_err(|_| drop(fs::remove_file(path)));
    }
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(format!(".{}.new", std::process::id()));
    let mut file = OpenOptions::new().write(true).create_new(true).mode(MODE).open(&temporary)?;
    fill(&mut file)
        .and_then(|()| fs::rename(&temporary, path))
        .inspect_err(|_| drop(fs::remove_file(&temporary)))
}

fn fill(file: &mut File) -> io::Result<()> {
    file.write_all(text().as_bytes())?;
    file.sync_all()
}

/// The default configuration with a new token.
fn text() -> String {
    let token = format!("\ntoken = \"{}\"\n", new_token());
    config::DEFAULT.replacen(WITHOUT_TOKEN, &token, 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn a_file_is_written_for_its_owner_alone_and_never_over_another_unless_forced() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("a/b/h.toml");
        write(&path, false).expect("writes");
        let is_written = || {
            let text = fs::read_to_string(&path).expect("text");
            let (before, rest) =
                config::DEFAULT.split_once(WITHOUT_TOKEN).expect("it has the line");
            text.starts_with(before) && text.ends_with(rest) && text.contains("\ntoken = \"hook")
        };
        assert!(is_written(), "the default with a token");
        assert_eq!(fs::metadata(&path).expect("it is there").permissions().mode() & 0o777, 0o600);
        fs::write(&path, "mine").expect("writes");
        assert_eq!(
            write(&path, false).expect_err("it exists").kind(),
            io::ErrorKind::AlreadyExists
        );
        assert_eq!(fs::read_to_string(&path).expect("text"), "mine");
        write(&path, true).expect("replaces");
        assert!(is_written(), "the default with a token");
        assert_eq!(
            fs::read_dir(path.parent().expect("a folder")).expect("a folder").count(),
            1,
            "no other file is left"
        );
        let first = config::load_with(&path, &|_| None).expect("it is valid as it is").admin.token;
        write(&path, true).expect("replaces");
        let second = config::load_with(&path, &|_| None).expect("it is valid as it is").admin.token;
        assert!(first.is_some() && first != second, "each file has a token of its own");
    }
}

//! The commands of README.md and docs/commands.md work as they stand there, and print what is
//! shown.

use std::{
    os::unix::{fs::PermissionsExt as _, process::CommandExt as _},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::mpsc,
};

use crate::{
    documents::references::shown,
    support::{broker::kill, free_port, tests_that_need},
};

tests_that_need!(tools: its_commands_work_in_a_clean_shell_one_after_the_other_and_print_what_is_shown);

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// A fenced block for the shell, with what stands right before it if that says why it is not run
/// here.
#[derive(Debug)]
struct Block {
    text: String,
    not_run: Option<String>,
}

fn blocks(document: &str) -> Vec<Block> {
    let mut found = Vec::new();
    let mut before = "";
    let mut lines = document.lines();
    while let Some(line) = lines.next() {
        if line == "```sh" {
            let text: Vec<&str> = lines.by_ref().take_while(|l| *l != "```").collect();
            let not_run = before
                .strip_prefix("<!-- not run: ")
                .and_then(|why| why.strip_suffix(" -->"))
                .map(str::to_owned);
            found.push(Block { text: text.join("\n") + "\n", not_run });
        }
        before = line;
    }
    found
}

/// A line without what differs from run to run: numbers with their units, ids, secrets, the width
/// of columns.
fn masked(line: &str) -> String {
    let words: Vec<String> = line.split_whitespace().map(masked_word).collect();
    words.join(" ")
}

fn masked_word(word: &str) -> String {
    let mut masked = String::new();
    let mut rest = word;
    while let Some(c) = rest.chars().next() {
        let random = ["msg_", "whsec_", "v1,"].into_iter().find(|start| rest.starts_with(start));
        if let Some(start) = random {
            masked += start;
            rest = rest[start.len()..]
                .trim_start_matches(|c: char| c.is_ascii_alphanumeric() || "_+/=".contains(c));
        } else if c.is_ascii_digit() {
            masked.push('#');
            rest = rest.trim_start_matches(|c: char| c.is_ascii_digit() || c == '.');
            // "3ms" one time and "1.2s" the other.
            let unit = ["ms", "s"].into_iter().find(|unit| {
                rest.strip_prefix(unit).is_some_and(|r| !r.starts_with(char::is_alphanumeric))
            });
            rest = unit.map_or(rest, |unit| &rest[unit.len()..]);
        } else {
            masked.push(c);
            rest = &rest[c.len_utf8()..];
        }
    }
    masked
}

/// Each line that a document shows is one that was printed; `…` stands for others.
fn assert_printed(shown: &str, printed: &str) {
    for line in shown.lines().filter(|l| !l.trim().is_empty() && *l != "…") {
        let wanted = masked(line);
        assert!(
            printed.lines().any(|l| masked(l) == wanted),
            "`{line}` is shown, and not printed:\n{printed}"
        );
    }
}

/// The lines `$ COMMAND` of a document, each with what is shown below it.
fn console(document: &str) -> Vec<(&str, &str)> {
    let blocks = shown(document, "console").into_iter();
    let commands = blocks.flat_map(|block| {
        block.strip_prefix("$ ").unwrap_or_else(|| panic!("{block}")).split("\n$ ")
    });
    commands.map(|command| command.split_once('\n').unwrap_or((command, ""))).collect()
}

fn its_commands_work_in_a_clean_shell_one_after_the_other_and_print_what_is_shown() {
    let readme = std::fs::read_to_string(repository().join("README.md")).expect("text");
    let blocks = blocks(&readme);
    let left_out: Vec<&str> = blocks.iter().filter_map(|b| b.not_run.as_deref()).collect();
    assert_eq!(
        left_out.len(),
        2,
        "what is not run says why, and is the clone and the tests: {left_out:?}"
    );
    let run: Vec<&str> =
        blocks.iter().filter(|b| b.not_run.is_none()).map(|b| b.text.as_str()).collect();
    assert_eq!(run.len(), 3, "trying it, an event over HTTP, and what became of it: {run:?}");

    let home = tempfile::tempdir().expect("a directory");
    let built = home.path().join("target/release");
    std::fs::create_dir_all(&built).expect("makes it");
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_hooktrail"), built.join("hooktrail"))
        .expect("links");
    // It was built already.
    let tools = home.path().join("tools");
    std::fs::create_dir(&tools).expect("makes it");
    std::fs::write(tools.join("cargo"), "#!/bin/sh\n[ \"$*\" = 'build --release' ]\n")
        .expect("writes");
    std::fs::set_permissions(tools.join("cargo"), std::fs::Permissions::from_mode(0o755))
        .expect("its own");

    // The reader's machine has these ports free; this one may not.
    let (admin, receiver) = (free_port(), free_port());
    let moved = |text: &str| {
        let text = text.replace("127.0.0.1:9000", &format!("127.0.0.1:{receiver}"));
        text.replace("127.0.0.1:8787", &format!("127.0.0.1:{admin}"))
    };
    let trying = moved(run[0]).replacen(
        "[queue]\n",
        &format!("[admin]\nlisten = \"127.0.0.1:{admin}\"\n[queue]\n"),
        1,
    );
    assert!(trying.contains("[admin]"), "it has a configuration");
    // A reader types a block when the one before has done its work.
    let ready = format!("until curl -fsS http://127.0.0.1:{admin}/readyz; do sleep 0.2; done\n");
    let arrived = "until grep -q 'answered 200' printed && grep -q 'outcome=\"delivered\"' printed; do sleep 0.2; done\n";
    let refused = "until hooktrail --config my.toml dead list siem --json | grep -q refused; do sleep 0.2; done\n";
    let mut script = format!(
        "exec > printed 2>&1\n{trying}{ready}{arrived}{}echo\n{refused}{}{refused}export HOOKTRAIL_CONFIG=my.toml\n",
        moved(run[1]),
        run[2]
    );
    let commands = std::fs::read_to_string(repository().join("docs/commands.md")).expect("text");
    let console = console(&commands);
    assert!(console.len() > 15, "only {} were found", console.len());
    for (n, (command, _)) in console.iter().enumerate() {
        script += &format!("echo '=== {n}'\n{{ {command}; }} > printed.{n} 2>&1\n");
    }
    script += "echo; echo all of it worked\n";

    let path = format!("{}:{}", tools.display(), std::env::var("PATH").unwrap_or_default());
    let mut shell = Command::new("bash")
        .args(["--noprofile", "--norc", "-eu", "-o", "pipefail", "-c", &script])
        .env_clear()
        .envs([("PATH", path.as_str()), ("HOME", home.path().to_str().expect("text"))])
        .current_dir(home.path())
        .stdin(Stdio::null())
        .process_group(0)
        .spawn()
        .expect("bash runs");
    let ended = ended_in_time(&mut shell);
    // The receiver and the daemon are in its group, which no other process is in.
    let group = i32::try_from(shell.id()).expect("a process id");
    Command::new("kill").args(["-TERM", "--", &format!("-{group}")]).status().expect("kill runs");
    let text = |name: &str| std::fs::read_to_string(home.path().join(name)).unwrap_or_default();
    let printed = text("printed");
    assert!(ended && printed.contains("all of it worked"), "{printed}");
    for part in
        ["verified (standard-webhooks)", "published 1 event", "\"accepted\":1", "name = \"siem\""]
    {
        assert!(printed.contains(part), "`{part}` is not in:\n{printed}");
    }
    assert!(!printed.contains("NOT VERIFIED") && !printed.contains("whsec_"), "{printed}");
    let outputs: Vec<&str> =
        shown(&readme, "text").into_iter().filter(|b| !b.contains("──►")).collect();
    assert_eq!(outputs.len(), 3, "one for each block that is run: {outputs:?}");
    outputs.iter().for_each(|block| assert_printed(block, &printed));
    for (n, (_, shown)) in console.iter().enumerate() {
        assert_printed(shown, &text(&format!("printed.{n}")));
    }
}

#[test]
fn the_demo_prints_what_is_shown() {
    let readme = std::fs::read_to_string(repository().join("README.md")).expect("text");
    let home = tempfile::tempdir().expect("a directory");
    let demo = Command::new(env!("CARGO_BIN_EXE_hooktrail"))
        .arg("demo")
        .current_dir(home.path())
        .env("TMPDIR", home.path())
        .output();
    let demo = demo.expect("runs");
    assert!(demo.status.success(), "{demo:?}");
    assert_printed(shown(&readme, "text demo")[0], &String::from_utf8_lossy(&demo.stdout));
}

/// Whether it ended well; one that hangs is ended.
fn ended_in_time(shell: &mut std::process::Child) -> bool {
    let (pid, (ended, end)) = (shell.id(), mpsc::channel::<()>());
    let watch = std::thread::spawn(move || {
        let hangs =
            end.recv_timeout(crate::support::PATIENCE) == Err(mpsc::RecvTimeoutError::Timeout);
        if hangs {
            kill("-KILL", pid);
        }
        hangs
    });
    let status = shell.wait().expect("ends");
    drop(ended);
    !watch.join().expect("watches") && status.success()
}

#[test]
fn every_block_for_the_shell_is_a_script_that_bash_reads() {
    let mut documents: Vec<PathBuf> = std::fs::read_dir(repository().join("docs"))
        .expect("a folder")
        .map(|e| e.expect("an entry").path())
        .filter(|p| p.extension().is_some_and(|e| e == "md"))
        .collect();
    documents.extend(
        ["README.md", "SECURITY.md", "CHANGELOG.md", "CONTRIBUTING.md"]
            .map(|name| repository().join(name)),
    );
    let mut seen = 0;
    for document in documents {
        for block in blocks(&std::fs::read_to_string(&document).expect("text")) {
            let read =
                Command::new("bash").args(["-n", "-c", &block.text]).output().expect("bash runs");
            assert!(
                read.status.success(),
                "{}: {}\n{}",
                document.display(),
                String::from_utf8_lossy(&read.stderr),
                block.text
            );
            seen += 1;
        }
    }
    assert!(seen > 15, "only {seen} were found: this test reads the documents wrongly");
}

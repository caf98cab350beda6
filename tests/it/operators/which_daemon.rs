//! Commands ask the daemon of their own configuration, and no other program.

use std::process::Output;

use hooktrail::crypto::{
    handshake::{self, Side},
    secret::Secret,
};
use serde_json::json;

use crate::support::{
    api::Api,
    daemon::{QUICK, Setup, subscriber},
    impostor::Impostor,
    run,
};

const TOKEN: &str = "quite-secret";

/// An embedded queue and one subscriber; `admin` is what `[admin]` says.
fn setup(admin: &str) -> Setup {
    Setup::with_text(&format!(
        "[queue]\nurl = \"embedded\"\n{admin}{QUICK}{}",
        subscriber("a", "http://127.0.0.1:9/", "")
    ))
}

/// A configuration's only token, of a role.
fn one_token(role: &str) -> String {
    format!("[[admin.tokens]]\nname = \"ops\"\ntoken = \"{TOKEN}\"\nrole = \"{role}\"\n")
}

/// On one line: where it breaks is of no interest here.
fn reported(output: &Output) -> String {
    let both = [&output.stdout[..], &output.stderr[..]].concat();
    String::from_utf8_lossy(&both).split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Commands that ask a daemon, with the exit code of one that finds none of its own.
const COMMANDS: [(&[&str], i32); 4] =
    [(&["status"], 1), (&["pause", "a"], 1), (&["resume", "a"], 1), (&["plan"], 0)];

#[test]
fn a_program_that_took_the_daemons_port_does_not_get_the_token_and_is_not_believed() {
    let everything = json!({ "subscribers": [], "removed": [], "phase": "running", "changed": true, "changes": [], "needs_restart": [] });
    type Answers = fn(&str, u16) -> (u16, serde_json::Value);
    let impostors: [(Answers, &str); 5] = [
        (|_, _| (200, json!({ "status": "well" })), "is no hooktrail"),
        (|_, _| (404, json!({})), "is no hooktrail"),
        (|_, _| (401, json!({ "error": "give the token" })), "another token"),
        (
            |_, _| (200, json!({ "version": "1", "config": "/", "pid": 1 })),
            "does not know [admin] token",
        ),
        // The command's own proof is no proof of the other side.
        (
            |head, _| {
                let given = head
                    .lines()
                    .find_map(|l| l.strip_prefix("x-hooktrail-proof: "))
                    .expect("the command proves it first");
                (200, json!({ "version": "1", "config": "/", "pid": 1, "proof": given }))
            },
            "does not know [admin] token",
        ),
    ];
    for (introduces, why) in impostors {
        let everything = everything.clone();
        let impostor = Impostor::start(move |head, port| match head.contains(" /api/v1/daemon ") {
            true => introduces(head, port),
            false => (200, everything.clone()),
        });
        let own = format!("token = \"{TOKEN}\"\n");
        for tokens in [&own, &one_token("admin")] {
            let address = impostor.address();
            let setup = setup(&format!("[admin]\nlisten = \"{address}\"\n{tokens}"));
            for (command, code) in COMMANDS {
                let output = setup.run(command);
                let reported = reported(&output);
                assert!(
                    output.status.code() == Some(code) && reported.contains(why),
                    "{command:?}: {why}: {reported}"
                );
            }
        }
        let asked = impostor.asked();
        assert_eq!(asked.len(), 2 * COMMANDS.len(), "nothing but who it is was asked: {asked:?}");
        assert!(
            asked.iter().all(|head| !head.contains(TOKEN) && !head.contains("authorization")),
            "{asked:?}"
        );
    }
}

#[test]
fn commands_use_the_first_token_of_role_admin_if_admin_has_none_of_its_own() {
    run(async {
        let api = Api::new();
        let first = "[[admin.tokens]]\nname = \"eye\"\ntoken = \"other\"\nrole = \"read\"\n";
        let setup = setup(&(api.section() + first + &one_token("admin")));
        let _daemon = setup.start().await;
        for (command, _) in COMMANDS {
            let output = setup.run(command);
            assert!(output.status.success(), "{command:?}: {}", reported(&output));
        }
        // Without one they cannot ask, and say what is missing.
        let text = std::fs::read_to_string(setup.config()).expect("text");
        setup.write("hooktrail.toml", text.replace("\"admin\"", "\"read\""));
        let output = setup.run(&["status"]);
        assert!(
            output.status.code() == Some(1)
                && reported(&output).contains("one of [[admin.tokens]] with the role `admin`"),
            "{}",
            reported(&output)
        );
    });
}

#[test]
fn a_proof_that_a_daemon_on_another_port_gave_is_not_believed() {
    let impostor = Impostor::start(|head, port| {
        let challenge = head
            .lines()
            .find_map(|l| l.strip_prefix("x-hooktrail-challenge: "))
            .expect("a challenge");
        let proof =
            handshake::proof(&Secret::new(TOKEN), Side::Daemon, challenge, port.wrapping_add(1));
        (200, json!({ "version": "1", "config": "/", "pid": 1, "proof": proof }))
    });
    let output =
        setup(&format!("[admin]\nlisten = \"{}\"\ntoken = \"{TOKEN}\"\n", impostor.address()))
            .run(&["status"]);
    assert!(
        output.status.code() == Some(1)
            && reported(&output).contains("does not know [admin] token"),
        "{output:?}"
    );
    assert!(impostor.asked().iter().all(|head| !head.contains(TOKEN)));
}

#[test]
fn a_second_daemon_on_the_same_address_is_an_error_and_its_commands_leave_the_first_alone() {
    run(async {
        for token in ["", "token = \"quite-secret\"\n"] {
            let api = Api::new();
            let admin = api.section() + token;
            let (first, second) = (setup(&admin), setup(&admin));
            let _daemon = first.start().await;
            let refused = second.run(&["run"]);
            let told_by_daemon = reported(&refused);
            assert_eq!(refused.status.code(), Some(1), "{told_by_daemon}");
            let path = first.config().display().to_string();
            for part in [
                format!("cannot listen on 127.0.0.1:{}", api.port).as_str(),
                &path,
                "[admin] listen = \"127.0.0.1:",
            ] {
                assert!(told_by_daemon.contains(part), "{part} is not in {told_by_daemon}");
            }
            for (command, code) in COMMANDS {
                let output = second.run(command);
                let reported = reported(&output);
                assert!(
                    output.status.code() == Some(code) && reported.contains(&path),
                    "{command:?}: {reported}"
                );
            }
            // The configuration of another place that says the same asks its own.
            assert!(first.ok(&["status"]).contains("ok"), "the first was not paused");
            assert!(first.ok(&["pause", "a"]).contains("is paused"));
            // The other token is not the one that counts.
            let other = setup(&(api.section() + "token = \"another\"\n"));
            let output = other.run(&["status"]);
            assert!(
                output.status.code() == Some(1) && reported(&output).contains("oken"),
                "{output:?}"
            );
        }
    });
}

#[test]
fn a_configuration_is_known_again_by_another_path() {
    run(async {
        let api = Api::new();
        let setup = setup(&api.section());
        let _daemon = setup.start().await;
        let folder = setup.config().parent().expect("a folder").to_owned();
        let link = folder.join("link.toml");
        std::os::unix::fs::symlink(setup.config(), &link).expect("links");
        for path in ["hooktrail.toml", "./link.toml", link.to_str().expect("text")] {
            let output = std::process::Command::new(env!("CARGO_BIN_EXE_hooktrail"))
                .args(["--config", path, "status"])
                .current_dir(&folder)
                .output()
                .expect("hooktrail runs");
            assert!(output.status.success(), "{path}: {}", reported(&output));
        }
    });
}

#[test]
fn a_default_port_that_is_taken_is_an_error_as_one_that_was_asked_for_is() {
    let taken = std::net::TcpListener::bind("127.0.0.1:8787");
    for admin in ["# [admin] is left out.\n", "[admin]\nlisten = \"127.0.0.1:8787\"\n"] {
        let output = setup(admin).run(&["run"]);
        let reported = reported(&output);
        assert_eq!(output.status.code(), Some(1), "{reported}");
        for part in ["cannot listen on 127.0.0.1:8787", "[admin] listen = \"127.0.0.1:8788\""] {
            assert!(reported.contains(part), "{part} is not in {reported}");
        }
    }
    drop(taken); // an error means that another process has it, which is as good
}

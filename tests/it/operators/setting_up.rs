//! From nothing to a configuration, and what it would do: `init`, `completions`, `plan`.

use std::{
    io::Write as _,
    net::TcpListener,
    os::unix::fs::PermissionsExt as _,
    path::PathBuf,
    process::{Command, Output, Stdio},
    sync::{Arc, OnceLock},
};

use crate::support::{
    api::Api,
    daemon::{QUICK, Setup, subscriber},
    impostor::{Impostor, introduction},
    run,
};

/// In a directory where there is nothing.
fn alone(dir: &std::path::Path, arguments: &[&str]) -> Output {
    let mut c = Command::new(env!("CARGO_BIN_EXE_hooktrail"));
    c.args(arguments)
        .env_remove("HOOKTRAIL_CONFIG")
        .current_dir(dir)
        .stdin(Stdio::null())
        .output()
        .expect("hooktrail runs")
}

fn out(output: &Output) -> String {
    assert!(output.status.success(), "{output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn err(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn init_writes_a_configuration_that_check_and_plan_take_and_never_over_another() {
    let dir = tempfile::tempdir().expect("a directory");
    let reported = out(&alone(dir.path(), &["init"]));
    assert!(
        reported.contains("wrote config/hooktrail.toml")
            && reported.contains("hooktrail --config config/hooktrail.toml check"),
        "{reported}"
    );
    let file = dir.path().join("config/hooktrail.toml");
    // It leads to the console, and says where the token stands, and not the token.
    let written = std::fs::read_to_string(&file).expect("text");
    let token = written.split("\ntoken = \"").nth(1).and_then(|rest| rest.split('"').next());
    let token = token.expect("a token");
    for part in [
        "the console is at http://127.0.0.1:8787/console/",
        "`token` in [admin] of config/hooktrail.toml",
    ] {
        assert!(reported.contains(part) && !reported.contains(token), "{part}: {reported}");
    }
    assert_eq!(std::fs::metadata(&file).expect("it is there").permissions().mode() & 0o777, 0o600);
    assert!(out(&alone(dir.path(), &["check"])).contains("no subscribers"));
    assert!(out(&alone(dir.path(), &["plan"])).contains("nothing would be delivered"));

    std::fs::write(&file, "mine").expect("writes");
    let again = alone(dir.path(), &["init"]);
    assert_eq!(again.status.code(), Some(2));
    assert!(
        err(&again).contains("exists and was left as it is") && err(&again).contains("--force"),
        "{again:?}"
    );
    assert_eq!(std::fs::read_to_string(&file).expect("text"), "mine");
    out(&alone(dir.path(), &["init", "--force"]));
    assert!(
        std::fs::read_to_string(&file)
            .expect("text")
            .starts_with("# The configuration of hooktrail.")
    );

    out(&alone(dir.path(), &["--config", "else where/h.toml", "init"]));
    let reported = out(&alone(dir.path(), &["init", "else where/i.toml"]));
    assert!(reported.contains("hooktrail --config 'else where/i.toml' run"), "{reported}");
    let bad = alone(dir.path(), &["init", "config/hooktrail.toml/x"]);
    assert_eq!(bad.status.code(), Some(1));
    assert!(err(&bad).contains("config/hooktrail.toml/x cannot be written"), "{bad:?}");
}

#[test]
fn completions_of_every_shell_need_no_configuration() {
    let dir = tempfile::tempdir().expect("a directory");
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = out(&alone(dir.path(), &["--config", "nowhere.toml", "completions", shell]));
        assert!(
            script.contains("hooktrail") && script.contains("HOOKTRAIL_COMPLETE"),
            "{shell}: {script}"
        );
    }
    let bash = out(&alone(dir.path(), &["completions", "bash"]));
    let mut check =
        Command::new("bash").arg("-n").stdin(Stdio::piped()).spawn().expect("bash runs");
    check.stdin.take().expect("its input").write_all(bash.as_bytes()).expect("writes");
    assert!(check.wait().expect("ends").success(), "what bash reads is a script");
    assert_eq!(alone(dir.path(), &["completions", "csh"]).status.code(), Some(2));
}

/// The words that bash completes the last one to, with the script that `completions` prints.
fn completed(dir: &std::path::Path, config: Option<&str>, words: &[&str]) -> Vec<String> {
    let program = PathBuf::from(env!("CARGO_BIN_EXE_hooktrail"));
    let path = format!(
        "{}:{}",
        program.parent().expect("a folder").display(),
        std::env::var("PATH").expect("a path")
    );
    let script = "source <(hooktrail completions bash) || exit 1; COMP_WORDS=(\"$@\"); COMP_CWORD=$(($# - 1)); COMP_TYPE=9; \
                  _clap_complete_hooktrail hooktrail \"${COMP_WORDS[COMP_CWORD]}\" 2>&1; printf '%s\\n' \"${COMPREPLY[@]}\"";
    let mut bash = Command::new("bash");
    bash.args(["-c", script, "bash", "hooktrail"])
        .args(words)
        .current_dir(dir)
        .env("PATH", path)
        .stdin(Stdio::null());
    match config {
        Some(config) => bash.env("HOOKTRAIL_CONFIG", config),
        None => bash.env_remove("HOOKTRAIL_CONFIG"),
    };
    out(&bash.output().expect("bash runs"))
        .lines()
        .map(|l| l.trim_end().to_owned())
        .filter(|l| !l.is_empty())
        .collect()
}

#[test]
fn bash_completes_commands_the_names_of_subscribers_and_the_reasons_of_dead_letters() {
    let dir = tempfile::tempdir().expect("a directory");
    let write = |name: &str, text: &str| {
        let path = dir.path().join(name);
        std::fs::create_dir_all(path.parent().expect("a folder")).expect("creates");
        std::fs::write(path, text).expect("writes");
    };
    let named = |name: &str| {
        format!(
            "[[subscriber]]\nname = \"{name}\"\nsecrets = [\"file:/nowhere\", \"${{NOT_SET}}\"]\n"
        )
    };
    // Each has mistakes, and its broker is not there.
    write(
        "config/hooktrail.toml",
        &format!("[queue]\nurl = \"amqp://192.0.2.1\"\n{}{}", named("siem"), named("sales")),
    );
    write("other.toml", &format!("include = [\"more/*.toml\"]\nunknown = 1\n{}", named("crm")));
    write("more/a.toml", &named("included"));
    let complete = |config, words: &[&str]| completed(dir.path(), config, words);
    assert!(complete(None, &["che"]).contains(&"check".to_owned()));
    for command in [
        &["status"][..],
        &["check"],
        &["plan"],
        &["test"],
        &["pause"],
        &["resume", "siem"],
        &["retry", "now"],
        &["dead", "list"],
    ] {
        assert_eq!(complete(None, &[command, &["s"]].concat()), ["siem", "sales"], "{command:?}");
    }
    assert_eq!(complete(Some("other.toml"), &["status", "c"]), ["crm"]);
    assert_eq!(complete(Some("other.toml"), &["status", "i"]), ["included"]);
    assert_eq!(complete(None, &["--config", "other.toml", "dead", "show", "c"]), ["crm"]);
    assert_eq!(
        complete(Some("nowhere.toml"), &["status", "s"]),
        [""; 0],
        "and nothing is said of it"
    );
    write("broken.toml", "[[subscriber]\nname = ");
    assert_eq!(complete(Some("broken.toml"), &["status", "s"]), [""; 0]);
    let reasons = complete(None, &["dead", "list", "siem", "--reason", "ex"]);
    assert_eq!(reasons, ["exhausted", "expired"]);
}

/// Introduces itself to a command as the daemon of its configuration, and answers its requests.
fn daemon_that_answers(status: u16, body: &'static str) -> (Impostor, Setup) {
    let config: Arc<OnceLock<PathBuf>> = Arc::default();
    let knows = config.clone();
    let daemon = Impostor::start(move |head, port| match head.contains(" /api/v1/daemon ") {
        true => (
            200,
            introduction(head, port, knows.get().expect("it is set before anybody asks"), TOKEN),
        ),
        false => (status, serde_json::from_str(body).expect("JSON")),
    });
    let setup = setup(&daemon.address().to_string());
    config.set(setup.config()).expect("set once");
    (daemon, setup)
}

const TOKEN: &str = "quite-secret";

fn setup(listen: &str) -> Setup {
    let rest =
        subscriber("a", "https://example.com/", "") + &subscriber("b", "https://example.com/", "");
    Setup::with_text(&format!(
        "[queue]\nurl = \"embedded\"\n[admin]\nlisten = \"{listen}\"\ntoken = \"{TOKEN}\"\n{QUICK}{rest}"
    ))
}

/// The output of `plan`, without its line breaks.
fn plan(setup: &Setup) -> String {
    setup.ok(&["plan"]).split_whitespace().collect::<Vec<_>>().join(" ")
}

#[test]
fn plan_fits_the_terminal() {
    let setup = setup("127.0.0.1:0");
    let widest = |text: &str| text.lines().map(|l| l.chars().count()).max().unwrap_or_default();
    let unknown = setup.ok(&["plan"]);
    assert!((60..=80).contains(&widest(&unknown)), "{unknown}");
    for columns in [60, 100, 140] {
        let output = setup.run_as(&format!("COLUMNS={columns} exec \"$0\" \"$@\""), &["plan"]);
        let reported = String::from_utf8_lossy(&output.stdout);
        assert!((columns - 20..=columns).contains(&widest(&reported)), "{columns}:\n{reported}");
    }
}

#[test]
fn plan_shows_what_a_reload_of_the_running_daemon_would_change() {
    let changes = r#"{"changes":[{"subscriber":"a","change":"changed","keys":["retry.max_interval"]}],"needs_restart":["queue.url"]}"#;
    let (daemon, setup) = daemon_that_answers(200, changes);
    let reported = plan(&setup);
    let asked = daemon.asked();
    let [met, asked] = &asked[..] else { panic!("two requests: {asked:?}") };
    assert!(met.starts_with("GET /api/v1/daemon ") && !met.contains(TOKEN), "{met}");
    assert!(
        asked.starts_with("GET /api/v1/reload ")
            && asked.contains("authorization: Bearer quite-secret"),
        "{asked}"
    );
    for part in [
        "a: a batch that fails each time",
        "b: a batch",
        "all 2 subscribers",
        " a: changed: retry.max_interval",
        "only a restart changes: queue.url",
    ] {
        assert!(reported.contains(part), "{part} is not in {reported}");
    }
    assert!(!reported.contains("quite-secret"));

    let (_daemon, setup) =
        daemon_that_answers(422, r#"{"error":"h.toml:1:1: url: unknown\n1 problem"}"#);
    let refused = setup.run(&["plan", "b"]);
    assert_eq!(
        refused.status.code(),
        Some(1),
        "what would be refused is no plan that can be carried out"
    );
    let reported = String::from_utf8_lossy(&refused.stdout).into_owned();
    assert!(
        reported.contains("would refuse a reload")
            && reported.contains("  h.toml:1:1: url: unknown\n  1 problem"),
        "{reported}"
    );
    assert!(!reported.contains("a: a batch"), "only b was asked for: {reported}");
}

#[test]
fn plan_and_the_daemon_understand_each_other() {
    run(async {
        let api = Api::new();
        let text = format!(
            "[queue]\nurl = \"embedded\"\n{}{}",
            api.section(),
            subscriber("a", "https://example.com/", "")
        );
        let setup = Setup::with_text(&text);
        let _daemon = setup.start().await;
        let reported = plan(&setup);
        assert!(
            reported.contains(&format!(
                "a reload of the daemon at 127.0.0.1:{} would change nothing",
                api.port
            )),
            "{reported}"
        );
        // The daemon may see the new file before it is asked: of this key it says the same then.
        setup.write("hooktrail.toml", text + "[log]\nformat = \"json\"\n");
        let reported = plan(&setup);
        assert!(reported.contains("only a restart changes: log"), "{reported}");
    });
}

#[test]
fn plan_needs_no_daemon_and_says_when_there_is_none() {
    let free = TcpListener::bind("127.0.0.1:0")
        .expect("a port")
        .local_addr()
        .expect("an address")
        .to_string();
    let reported = plan(&setup(&free));
    assert!(
        reported.contains(&format!("no daemon answers at {free} ([admin] listen)")),
        "{reported}"
    );
    let (_daemon, answering) = daemon_that_answers(
        500,
        r#"{"type":"about:blank","title":"Internal Server Error","status":500,"detail":"out of order"}"#,
    );
    let reported = plan(&answering);
    assert!(reported.contains("answered 500") && reported.contains("out of order"), "{reported}");
    assert!(plan(&setup("127.0.0.1:0")).contains("port 0"));
    assert_eq!(setup(&free).run(&["plan", "c"]).status.code(), Some(2));
}

#[test]
fn plan_as_json_has_each_attempt_and_the_end() {
    let setup = Setup::with_text(
        &("[queue]\nurl = \"amqp://127.0.0.1\"\n".to_owned()
            + &subscriber("a", "https://example.com/", "")),
    );
    let plan: serde_json::Value =
        serde_json::from_str(&setup.ok(&["plan", "--json"])).expect("JSON");
    let a = &plan["subscribers"][0];
    assert_eq!(a["attempts"].as_array().map(Vec::len), Some(16));
    assert_eq!(
        a["attempts"][1],
        serde_json::json!({ "attempt": 2, "after_s": 5.0, "after_min_s": 4.0, "after_max_s": 6.0, "since_first_s": 5.0, "hops": 2 })
    );
    assert_eq!(
        (&a["end"]["because"], &a["end"]["then"]),
        (&"max_attempts".into(), &"dead_letter".into())
    );
    assert_eq!(a["circuit_open_s"], serde_json::json!([30.0, 60.0, 120.0, 240.0, 480.0, 600.0]));
    assert_eq!(plan["memory_bytes"]["full_batches"], 5 << 20);
    assert_eq!(plan["daemon"]["reload"], serde_json::Value::Null);
}

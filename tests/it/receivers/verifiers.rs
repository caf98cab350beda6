//! Requests as the daemon sent them, verified by independent libraries and by the snippets of
//! docs/receivers.md, and held against the schemas in docs/.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use serde_json::{Value, json};

use crate::support::{
    assert_not_quick,
    daemon::{QUICK, SECRET, Setup, subscriber},
    queue::Queue,
    receiver::{Receiver, Request, event, status},
    run, tests_that_need,
};

tests_that_need!(
    tools:
    what_is_sent_is_what_the_schemas_and_the_openapi_document_describe,
    the_schema_of_the_configuration_says_what_check_says,
    libraries_that_others_wrote_accept_what_is_sent_and_nothing_else,
    the_sdk_of_cloudevents_reads_what_is_sent,
    who_has_the_public_key_alone_accepts_what_is_sent_and_nothing_else,
    openssl_makes_the_same_signature_of_a_header_of_its_own,
    the_snippets_of_the_document_accept_what_is_sent_and_nothing_else,
);

const NEW_SECRET: &str = "whsec_bmV3IG5ldyBuZXcgbmV3IG5ldyBuZXcgbmV3IG5ldyE=";
const OTHER_SECRET: &str = "whsec_b3RoZXIgb3RoZXIgb3RoZXIgb3RoZXIgb3RoZXIhISE=";

/// A request as it is given to a verifier, and what that must say.
#[derive(Debug, Clone)]
struct Case {
    name: String,
    headers: BTreeMap<String, String>,
    body: Vec<u8>,
    secret: String,
    genuine: bool,
}

impl Case {
    fn genuine(name: &str, request: &Request, secret: &str) -> Self {
        let header = |(name, value): (&axum::http::HeaderName, &axum::http::HeaderValue)| {
            (name.to_string(), value.to_str().expect("text").to_owned())
        };
        let headers = request.headers.iter().map(header).collect();
        Self {
            name: name.to_owned(),
            headers,
            body: request.body.to_vec(),
            secret: secret.to_owned(),
            genuine: true,
        }
    }

    fn forged(&self, how: &str, forge: impl FnOnce(&mut Self)) -> Self {
        let mut forged =
            Self { name: format!("{}, {how}", self.name), genuine: false, ..self.clone() };
        forge(&mut forged);
        forged
    }

    /// This request, and forgeries of it.
    fn and_forged(self) -> Vec<Self> {
        let at = self.body.len() / 2;
        let mut all = vec![
            self.forged("a byte changed", |c| c.body[at] ^= 1),
            self.forged("a byte more", |c| c.body.push(b' ')),
            self.forged("another secret", |c| c.secret = OTHER_SECRET.to_owned()),
        ];
        if let Some(timestamp) =
            self.headers.get("webhook-timestamp").and_then(|t| t.parse::<u64>().ok())
        {
            let set = |c: &mut Self, name: &str, value: String| {
                drop(c.headers.insert(name.to_owned(), value))
            };
            all.push(self.forged("another time", |c| {
                set(c, "webhook-timestamp", (timestamp + 1).to_string())
            }));
            all.push(self.forged("an old time", |c| {
                set(c, "webhook-timestamp", (timestamp - 3600).to_string())
            }));
            all.push(self.forged("another id", |c| set(c, "webhook-id", "msg_another".to_owned())));
            all.push(
                self.forged("no signature", |c| set(c, "webhook-signature", "v1,".to_owned())),
            );
        }
        all.push(self);
        all
    }

    fn standard(&self) -> bool {
        self.headers.contains_key("webhook-signature")
    }
}

/// Events whose bytes a verifier could trip over.
fn tricky() -> Vec<String> {
    vec![
        event(0),
        "{\"event\":\"a.b\",\"n\":1,\"s\":\"\u{e9}\u{1f980}\\u0000\\ud83e\\udd80 \\/ \\\" \u{2028}\"}".to_owned(),
        "{ \"n\" : 2 ,\r\n\t\"event\":\"a.b\", \"big\":18446744073709551617 }\n".to_owned(),
    ]
}

/// Requests that a daemon has really sent: the first attempt of each kind, and a retry.
async fn sent() -> Vec<Case> {
    let queue = Queue::embedded();
    let receiver = async || Receiver::start(|_, n| status(if n == 0 { 503 } else { 200 })).await;
    let kinds = [
        ("json", String::new()),
        ("lines", "format = \"jsonl\"".to_owned()),
        ("array", "format = \"json_array\"".to_owned()),
        ("single", "format = \"single\"".to_owned()),
        ("hec", "format = \"splunk_hec\"\nsource = \"hooktrail\"".to_owned()),
        ("cloud", "format = \"cloudevents_batch\"\nsource = \"/audit\"".to_owned()),
        ("mailtrap", "signatures = [\"mailtrap\"]".to_owned()),
        ("hex", "signatures = [{ header = \"X-Hub-Signature-256\", prefix = \"sha256=\" }]".to_owned()),
        ("base64", "signatures = [{ header = \"X-Hub-Signature-256\", encoding = \"base64\" }]\nformat = \"jsonl\"".to_owned()),
    ];
    let mut receivers = Vec::new();
    for _ in &kinds {
        receivers.push(receiver().await);
    }
    let mut text = QUICK.to_owned();
    for ((name, more), receiver) in kinds.iter().zip(&receivers) {
        text += &subscriber(name, &receiver.url, more);
    }
    let rotating = Receiver::accepting().await;
    text += &subscriber("rotating", &rotating.url, "")
        .replace(SECRET, &format!("{NEW_SECRET}\", \"{SECRET}"));
    let setup = Setup::new(&queue, &text);
    let _daemon = setup.start().await;
    queue.publish("a.b", tricky()).await;

    let mut cases = Vec::new();
    for ((name, _), receiver) in kinds.iter().zip(&receivers) {
        receiver.wait_all(3).await;
        let requests = receiver.requests();
        let again = requests.iter().rposition(|r| r.body == requests[0].body).expect("itself");
        assert!(again > 0, "{name}: the first attempt failed, so it was made again");
        for request in [&requests[0], &requests[again]] {
            let attempt = request.attempt();
            cases.push(Case::genuine(&format!("{name}, attempt {attempt}"), request, SECRET));
            if *name == "json" || *name == "lines" {
                let sent: u64 = request.header("webhook-timestamp").parse().expect("a number");
                let came =
                    request.at.duration_since(std::time::UNIX_EPOCH).expect("after 1970").as_secs();
                assert!(came - sent <= 1, "the timestamp is the attempt's");
                assert_eq!(request.id(), requests[0].id());
            }
        }
    }
    rotating.wait_all(3).await;
    let request = rotating.requests().remove(0);
    for secret in [NEW_SECRET, SECRET] {
        cases.push(Case::genuine(&format!("rotating, with {secret}"), &request, secret));
    }
    cases
}

/// The folder that `scripts/verifiers` installs into.
pub(crate) fn verifiers() -> PathBuf {
    assert_not_quick("tools");
    let target =
        Path::new(env!("CARGO_BIN_EXE_hooktrail")).ancestors().nth(2).expect("the target folder");
    let folder = target.join("verifiers");
    assert!(
        folder.join("stamp").exists(),
        "{} is not there: run scripts/verifiers, as scripts/test does",
        folder.display()
    );
    folder
}

pub(crate) fn repository() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Runs a command that must succeed; its standard output.
pub(crate) fn output(command: &mut Command) -> String {
    let output =
        command.stdin(Stdio::null()).output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("UTF-8")
}

/// A request in the form that the verifiers read.
fn write_cases(dir: &Path, cases: &[Case]) -> PathBuf {
    let file = dir.join("requests.json");
    let request = |c: &Case| json!({ "case": c.name, "headers": c.headers, "body": BASE64.encode(&c.body), "secret": c.secret });
    std::fs::write(&file, Value::from(cases.iter().map(request).collect::<Vec<_>>()).to_string())
        .expect("writes");
    file
}

fn what_is_sent_is_what_the_schemas_and_the_openapi_document_describe() {
    run(async {
        // A header whose name the operator chooses is in no document.
        let mut cases: Vec<Case> = sent()
            .await
            .into_iter()
            .filter(|c| !c.headers.contains_key("x-hub-signature-256"))
            .collect();
        assert!(cases.iter().any(|c| !c.standard()), "one without an id");
        // The document cannot say that they come together.
        for case in &cases {
            for header in ["webhook-id", "webhook-timestamp"] {
                assert_eq!(case.headers.contains_key(header), case.standard(), "{header}");
            }
        }
        assert!(cases.iter().any(Case::standard));
        let first = cases
            .iter()
            .find(|c| c.standard() && c.headers["content-type"] == "application/json")
            .expect("one in JSON")
            .clone();
        let set = |c: &mut Case, name: &str, value: &str| {
            drop(c.headers.insert(name.to_owned(), value.to_owned()))
        };
        cases.extend([
            first.forged("no events", |c| c.body = b"{\"events\":[]}".to_vec()),
            first
                .forged("no event type", |c| c.body = b"{\"events\":[{\"timestamp\":1}]}".to_vec()),
            first.forged("another field", |c| {
                c.body = b"{\"events\":[{\"event\":\"a\"}],\"more\":1}".to_vec()
            }),
            first.forged("a bad actor", |c| {
                c.body = b"{\"events\":[{\"event\":\"a\",\"actor\":\"me\"}]}".to_vec()
            }),
            first.forged("no attempt", |c| drop(c.headers.remove("x-hooktrail-attempt"))),
            first.forged("a bad id", |c| set(c, "webhook-id", "msg_1.2")),
            first.forged("a bad signature", |c| set(c, "webhook-signature", "v1,abc")),
            first.forged("another header", |c| set(c, "x-hooktrail-secret", "1")),
            first.forged("another type", |c| set(c, "content-type", "text/plain")),
        ]);
        let dir = tempfile::tempdir().expect("a directory");
        let file = write_cases(dir.path(), &cases);
        let script = repository().join("tests/verifiers/schemas.py");
        let reported = output(
            Command::new(verifiers().join("python/bin/python"))
                .arg(script)
                .arg(repository().join("docs"))
                .arg(&file),
        );
        let reported: Vec<Value> =
            reported.lines().map(|l| serde_json::from_str(l).expect("a JSON line")).collect();
        assert_eq!(reported.len(), cases.len());
        for (found, case) in reported.iter().zip(&cases) {
            assert_eq!(found["valid"], case.genuine, "{found}");
        }
    });
}

/// A library that others wrote takes them as CloudEvents, and finds the events in them.
fn the_sdk_of_cloudevents_reads_what_is_sent() {
    run(async {
        let is_cloud = |c: &Case| c.headers["content-type"].contains("cloudevents");
        let mut cases: Vec<Case> = sent().await.into_iter().filter(is_cloud).collect();
        assert_eq!(cases.len(), 2, "the first attempt, and the second");
        let first = cases[0].clone();
        let text = String::from_utf8(first.body.clone()).expect("UTF-8");
        for (what, by) in [("\"source\":\"/audit\",", ""), (".2\",\"source\"", ".1\",\"source\"")] {
            assert!(text.contains(what));
            cases.push(first.forged(what, |c| c.body = text.replace(what, by).into()));
        }
        let dir = tempfile::tempdir().expect("a directory");
        let file = write_cases(dir.path(), &cases);
        let found = output(
            Command::new("node")
                .arg(repository().join("tests/verifiers/cloudevents.mjs"))
                .arg(&file)
                .env("VERIFIERS", verifiers()),
        );
        let found: Vec<Value> =
            found.lines().map(|l| serde_json::from_str(l).expect("a JSON line")).collect();
        assert_eq!(found.len(), cases.len());
        for (found, case) in found.iter().zip(&cases) {
            assert_eq!(found["valid"], case.genuine, "{found}");
            if case.genuine {
                let types = [["activity_log.user.updated", "a.b", "a.b"]];
                assert!(types.iter().any(|t| found["types"] == json!(t)), "{found}");
            }
        }
    });
}

#[test]
fn the_documents_name_every_header_and_the_commands_print_the_schemas() {
    let read = |name: &str| {
        std::fs::read_to_string(repository().join("docs").join(name)).expect("the document")
    };
    let (page, api) = (read("receivers.md"), read("openapi.yaml"));
    for header in [
        "webhook-id",
        "webhook-timestamp",
        "webhook-signature",
        "mailtrap-signature",
        "x-hooktrail-attempt",
        "user-agent",
    ] {
        assert!(page.contains(header) && api.contains(&format!("name: {header}")), "{header}");
    }
    let nothing = Setup::with_text("");
    for (name, file) in [("event", "schema/event.json"), ("payload", "schema/payload.json")] {
        assert_eq!(nothing.ok(&["schema", name]), read(file));
    }
}

fn the_schema_of_the_configuration_says_what_check_says() {
    let all = r#"
        include = ["none/*.toml"]
        shutdown_timeout = "${NONE:-35s}"
        [queue]
        url = "amqp://127.0.0.1"
        [log]
        level = "${LEVEL:-info}"
        [[subscriber]]
        name = "a"
        url = "https://example.com/"
        events = ["a.*"]
        secrets = ["s"]
        signatures = ["mailtrap", { header = "X-Signature", prefix = "sha256=", encoding = "hex" }]
        headers = { X-Tenant = "acme" }
        auth = { basic = { username = "u", password = "p" } }
        preset = "mailtrap"
        retry = { max_interval = "1h", multiplier = 2 }
        batch.max_bytes = "64KiB"
    "#;
    let instead = |old: &str, new: &str| all.replacen(old, new, 1);
    let samples = [
        (true, all.to_owned()),
        (
            true,
            std::fs::read_to_string(repository().join("config/hooktrail.toml"))
                .expect("the shipped one"),
        ),
        (false, instead("events", "evnts")),
        (false, instead("name = \"a\"", "")),
        (false, instead("\"64KiB\"", "65536")),
        (false, instead("\"1h\"", "\"an hour\"")),
        (false, instead("multiplier = 2", "multiplier = 0.5")),
        (false, instead("\"mailtrap\", {", "\"mailgun\", {")),
        (false, instead("header = \"X-Signature\"", "headers = \"X-Signature\"")),
        (false, instead("url = \"amqp://127.0.0.1\"", "")),
        (false, instead("encoding = \"hex\"", "encoding = \"HEX\"")),
        (false, instead("basic = { username = \"u\", ", "basic = { ")),
    ];
    let dir = tempfile::tempdir().expect("a directory");
    let schema = dir.path().join("schema.json");
    std::fs::write(&schema, Setup::with_text("").ok(&["schema", "config"])).expect("writes");
    let mut command = Command::new(verifiers().join("python/bin/python"));
    command.arg(repository().join("tests/verifiers/config.py")).arg(&schema);
    for (n, (_, text)) in samples.iter().enumerate() {
        let file = dir.path().join(format!("{n}.toml"));
        std::fs::write(&file, text).expect("writes");
        command.arg(file);
    }
    let found = output(&mut command);
    assert_eq!(found.lines().count(), samples.len());
    for (line, (valid, text)) in found.lines().zip(&samples) {
        let found: Value = serde_json::from_str(line).expect("a JSON line");
        assert_eq!(found["valid"], *valid, "{found}\n{text}");
        assert_eq!(Setup::with_text(text).run(&["check"]).status.success(), *valid, "{text}");
    }
}

fn libraries_that_others_wrote_accept_what_is_sent_and_nothing_else() {
    run(async {
        let genuine = sent().await;
        let cases: Vec<Case> = genuine.into_iter().flat_map(Case::and_forged).collect();
        let dir = tempfile::tempdir().expect("a directory");
        let file = write_cases(dir.path(), &cases);

        let (folder, scripts) = (verifiers(), repository().join("tests/verifiers"));
        let mut reported = output(
            Command::new(folder.join("python/bin/python"))
                .arg(scripts.join("verify.py"))
                .arg(&file),
        );
        reported += &output(
            Command::new("node")
                .arg(scripts.join("verify.mjs"))
                .arg(&file)
                .env("VERIFIERS", &folder),
        );
        reported += &output(Command::new(folder.join("rust/debug/verify")).arg(&file));

        let expected: BTreeMap<&str, bool> =
            cases.iter().map(|c| (c.name.as_str(), c.genuine)).collect();
        let mut looked_at: BTreeMap<String, (usize, usize)> = BTreeMap::new();
        for line in reported.lines() {
            let found: Value = serde_json::from_str(line).expect("a JSON line");
            let genuine = expected[found["case"].as_str().expect("a case")];
            assert_eq!(found["verified"], genuine, "{found}");
            let library = format!(
                "{} {}",
                found["library"].as_str().expect("a name"),
                found["version"].as_str().expect("a version")
            );
            let counts = looked_at.entry(library).or_default();
            if genuine { counts.0 += 1 } else { counts.1 += 1 }
        }
        for (library, (genuine, forged)) in &looked_at {
            println!("{library}: accepted {genuine}, refused {forged}");
            assert!(*genuine >= 2 && *forged >= 6, "{library}: {genuine} and {forged}");
        }
        let names: Vec<&str> = looked_at.keys().map(String::as_str).collect();
        for library in [
            "standardwebhooks (PyPI)",
            "svix (PyPI)",
            "mailtrap (PyPI)",
            "standardwebhooks (npm)",
            "svix (npm)",
            "mailtrap (npm)",
            "@octokit/webhooks-methods (npm)",
            "standardwebhooks (crates.io)",
            "svix (crates.io)",
            "docs/receivers.md: Rust",
        ] {
            assert!(
                names.iter().any(|n| n.starts_with(library)),
                "{library} has verified nothing: {names:?}"
            );
        }
    });
}

fn openssl_makes_the_same_signature_of_a_header_of_its_own() {
    run(async {
        let cases = sent().await;
        let dir = tempfile::tempdir().expect("a directory");
        let file = dir.path().join("body");
        for case in cases.iter().filter(|c| c.headers.contains_key("x-hub-signature-256")) {
            std::fs::write(&file, &case.body).expect("writes");
            let hmac = ["dgst", "-sha256", "-hmac", &case.secret];
            let found = &case.headers["x-hub-signature-256"];
            if case.name.starts_with("hex") {
                let digest = output(Command::new("openssl").args(hmac).arg(&file));
                assert_eq!(
                    found,
                    &format!("sha256={}", digest.trim().rsplit(' ').next().expect("a digest")),
                    "{}",
                    case.name
                );
            } else {
                let digest = Command::new("openssl")
                    .args(hmac)
                    .arg("-binary")
                    .arg(&file)
                    .output()
                    .expect("openssl runs")
                    .stdout;
                assert_eq!(found, &BASE64.encode(digest), "{}", case.name);
            }
        }
    });
}

/// The document's snippet of a language.
fn snippet(language: &str) -> String {
    let text =
        std::fs::read_to_string(repository().join("docs/receivers.md")).expect("the document");
    let snippet =
        text.split(&format!("```{language}\n")).nth(1).and_then(|rest| rest.split("```").next());
    snippet.unwrap_or_else(|| panic!("docs/receivers.md has no snippet in {language}")).to_owned()
}

/// A language of the document: what stands around its snippet, and how that is run. A program gets
/// the secret, a file with a header a line, and a file with the body, and prints `true` or `false`.
struct Language {
    name: &'static str,
    /// Prints a version.
    probe: &'static [&'static str],
    /// Whether the tests cannot do without.
    required: bool,
    files: Vec<(&'static str, String)>,
    build: Option<&'static [&'static str]>,
    run: &'static [&'static str],
}

fn languages() -> Vec<Language> {
    let python = "\nimport sys\nheaders = dict(l.rstrip('\\n').split(': ', 1) for l in open(sys.argv[2], encoding='utf-8'))\n\
                  print(str(verify(sys.argv[1], headers, open(sys.argv[3], 'rb').read())).lower())\n";
    let js = "\nconst { readFileSync } = require('node:fs');\n\
              const [secret, heads, body] = process.argv.slice(2);\n\
              const headers = Object.fromEntries(readFileSync(heads, 'utf8').trimEnd().split('\\n').map((l) => [l.slice(0, l.indexOf(': ')), l.slice(l.indexOf(': ') + 2)]));\n\
              console.log(verify(secret, headers, readFileSync(body)));\n";
    let go = "package main\n\nimport (\n\t\"fmt\"\n\t\"os\"\n\t\"strings\"\n)\n\nfunc main() {\n\theads, _ := os.ReadFile(os.Args[2])\n\tbody, _ := os.ReadFile(os.Args[3])\n\t\
              headers := map[string]string{}\n\tfor _, line := range strings.Split(strings.TrimSpace(string(heads)), \"\\n\") {\n\t\tname, value, _ := strings.Cut(line, \": \")\n\t\theaders[name] = value\n\t}\n\t\
              fmt.Println(verify(os.Args[1], headers, body))\n}\n";
    let php = "\n$headers = [];\nforeach (file($argv[2], FILE_IGNORE_NEW_LINES) as $line) {\n    [$name, $value] = explode(': ', $line, 2);\n    $headers[$name] = $value;\n}\n\
               echo verify($argv[1], $headers, file_get_contents($argv[3])) ? 'true' : 'false';\n";
    let ruby = "\nheaders = File.readlines(ARGV[1], chomp: true).to_h { |l| l.split(': ', 2) }\nputs verify(ARGV[0], headers, File.binread(ARGV[2]))\n";
    let java = "import java.nio.file.*;\nimport java.util.*;\n\npublic class Main {\n    public static void main(String[] args) throws Exception {\n        \
                Map<String, String> headers = new HashMap<>();\n        for (String line : Files.readAllLines(Path.of(args[1]))) {\n            \
                int at = line.indexOf(\": \");\n            headers.put(line.substring(0, at), line.substring(at + 2));\n        }\n        \
                System.out.println(Webhook.verify(args[0], headers, Files.readAllBytes(Path.of(args[2]))));\n    }\n}\n";
    let shell = "\nheader() { sed -n \"s/^$1: //p\" \"$2\"; }\n\
                 ID=$(header webhook-id \"$2\") TIMESTAMP=$(header webhook-timestamp \"$2\") SIGNATURE=$(header webhook-signature \"$2\")\n\
                 if verify \"$1\" \"$3\"; then echo true; else echo false; fi\n";
    let language = |name, probe, required, files, build, run| Language {
        name,
        probe,
        required,
        files,
        build,
        run,
    };
    vec![
        language(
            "python",
            &["python3", "--version"],
            true,
            vec![("verify.py", snippet("python") + python)],
            None,
            &["python3", "verify.py"],
        ),
        language(
            "js",
            &["node", "--version"],
            true,
            vec![("verify.cjs", snippet("js") + js)],
            None,
            &["node", "verify.cjs"],
        ),
        language(
            "sh",
            &["openssl", "version"],
            true,
            vec![("verify.sh", snippet("sh") + shell)],
            None,
            &["sh", "verify.sh"],
        ),
        language(
            "java",
            &["javac", "-version"],
            false,
            vec![("Webhook.java", snippet("java")), ("Main.java", java.to_owned())],
            Some(&["javac", "Webhook.java", "Main.java"]),
            &["java", "-Xshare:auto", "-XX:TieredStopAtLevel=1", "Main"],
        ),
        language(
            "go",
            &["go", "version"],
            false,
            vec![
                ("go.mod", "module verify\n".to_owned()),
                ("verify.go", format!("package main\n\n{}", snippet("go"))),
                ("main.go", go.to_owned()),
            ],
            Some(&["go", "build", "-o", "verify", "."]),
            &["./verify"],
        ),
        language(
            "php",
            &["php", "--version"],
            false,
            vec![("verify.php", format!("<?php\n{}{php}", snippet("php")))],
            None,
            &["php", "verify.php"],
        ),
        language(
            "ruby",
            &["ruby", "--version"],
            false,
            vec![("verify.rb", snippet("ruby") + ruby)],
            None,
            &["ruby", "verify.rb"],
        ),
    ]
}

/// The functions of the document for Ed25519, and `listen`; libraries that know `v1` alone go on.
fn who_has_the_public_key_alone_accepts_what_is_sent_and_nothing_else() {
    run(async {
        let nothing = Setup::with_text("");
        let [key, other] = [(); 2].map(|()| nothing.ok(&["secret", "--ed25519"]).trim().to_owned());
        let public_of = |key: &str| {
            let file = nothing.write("key", key);
            let public = nothing.ok(&["secret", "--public", file.to_str().expect("a path")]);
            public.trim().to_owned()
        };
        let (public, other) = (public_of(&key), public_of(&other));
        assert!(public.starts_with("whpk_") && !key.contains(&public[5..20]), "{public}");
        let (both, alone) = (Receiver::accepting().await, Receiver::accepting().await);
        let signing = format!("signing_key = \"{key}\"");
        let secrets = format!("secrets = [\"{SECRET}\"]\n");
        let text = QUICK.to_owned()
            + &subscriber("both", &both.url, &signing)
            + &subscriber("alone", &alone.url, &signing).replace(&secrets, "");
        let queue = Queue::embedded();
        let setup = Setup::new(&queue, &text);
        let daemon = setup.start().await;
        queue.publish("a.b", tricky()).await;
        let mut genuine = Vec::new();
        for (name, receiver, signatures) in [("both", &both, 2), ("alone", &alone, 1)] {
            receiver.wait_all(3).await;
            let request = receiver.requests().remove(0);
            let given = request.header("webhook-signature");
            assert_eq!(given.split(' ').count(), signatures, "{given}");
            assert_eq!(request.verified(), signatures == 2, "as before, with the secret");
            genuine.push(Case::genuine(name, &request, &public));
        }
        for text in [daemon.log(), setup.ok(&["check"])] {
            assert!(!text.contains(&key[..20]), "{text}");
        }
        let mut cases = Vec::new();
        for case in genuine {
            let set = |c: &mut Case, name: &str, value: &str| {
                drop(c.headers.insert(name.to_owned(), value.to_owned()))
            };
            let at = case.body.len() / 2;
            cases.push(case.forged("a byte changed", |c| c.body[at] ^= 1));
            cases.push(case.forged("another key", |c| c.secret = other.clone()));
            cases.push(case.forged("another id", |c| set(c, "webhook-id", "msg_other")));
            cases.push(case.forged("an old time", |c| set(c, "webhook-timestamp", "1733739084")));
            cases.push(case.forged("v1 alone", |c| set(c, "webhook-signature", "v1,aGVsbG8=")));
            cases.push(case.forged("nonsense", |c| set(c, "webhook-signature", "v1a,aGVsbG8=")));
            cases.push(case);
        }
        let section = std::fs::read_to_string(repository().join("docs/receivers.md"));
        let section = section.expect("the document");
        let (_, section) = section.split_once("### With a public key").expect("the section");
        let dir = tempfile::tempdir().expect("a directory");
        let all = languages();
        let python = verifiers().join("python/bin/python");
        for (language, program) in [("python", python.as_path()), ("js", Path::new("node"))] {
            let (_, code) = section.split_once(&format!("```{language}\n")).expect("a block");
            let (code, _) = code.split_once("\n```").expect("its end");
            // The end of the file is that of the other verifier, which calls the function.
            let known = all.iter().find(|l| l.name == language).expect("is known");
            let (name, whole) = &known.files[0];
            let end = &whole[snippet(language).len()..];
            let file = dir.path().join(name);
            std::fs::write(&file, format!("{code}\n{end}")).expect("writes");
            for case in &cases {
                let (heads, body) = (dir.path().join("headers"), dir.path().join("body"));
                let lines = case.headers.iter().map(|(name, value)| format!("{name}: {value}\n"));
                std::fs::write(&heads, lines.collect::<String>()).expect("writes");
                std::fs::write(&body, &case.body).expect("writes");
                let mut command = Command::new(program);
                let found = output(command.arg(&file).arg(&case.secret).arg(heads).arg(body));
                assert_eq!(found.trim(), case.genuine.to_string(), "{language}: {}", case.name);
            }
        }
        for case in &cases {
            let header = |name: &str| case.headers.get(name).map(String::as_str);
            let now = std::time::SystemTime::now();
            let now = now.duration_since(std::time::UNIX_EPOCH).expect("after 1970").as_secs();
            let public = hooktrail::crypto::secret::Secret::new(&*case.secret);
            let found = hooktrail::crypto::signature::verify(&public, header, &case.body, now);
            assert_eq!(found.is_ok(), case.genuine, "listen: {}: {found:?}", case.name);
        }
    });
}

fn the_snippets_of_the_document_accept_what_is_sent_and_nothing_else() {
    run(async {
        let genuine: Vec<Case> = sent().await.into_iter().filter(Case::standard).collect();
        // One of each format forged in every way; the others as they came.
        let (mut cases, mut forged) = (Vec::new(), BTreeSet::new());
        for case in genuine {
            if forged.insert(case.headers["content-type"].clone()) {
                cases.extend(case.and_forged())
            } else {
                cases.push(case)
            }
        }
        for language in languages() {
            let (program, arguments) = language.probe.split_first().expect("a program");
            let found = Command::new(program).args(arguments).stdin(Stdio::null()).output();
            if !found.is_ok_and(|o| o.status.success()) {
                assert!(
                    !language.required,
                    "{program} is not on this machine: run scripts/verifiers, as scripts/test does"
                );
                println!("{}: {program} is not on this machine", language.name);
                continue;
            }
            let dir = tempfile::tempdir().expect("a directory");
            for (name, text) in &language.files {
                std::fs::write(dir.path().join(name), text).expect("writes");
            }
            let command = |line: &[&str]| {
                let mut c = Command::new(line[0]);
                c.args(&line[1..])
                    .current_dir(dir.path())
                    .env("GOCACHE", dir.path().join("cache"))
                    .env("GOFLAGS", "-mod=mod");
                c
            };
            if let Some(build) = language.build {
                output(&mut command(build));
            }
            for (n, case) in cases.iter().enumerate() {
                let (headers, body) =
                    (dir.path().join(format!("{n}.headers")), dir.path().join(format!("{n}.body")));
                std::fs::write(
                    &headers,
                    case.headers
                        .iter()
                        .map(|(name, value)| format!("{name}: {value}\n"))
                        .collect::<String>(),
                )
                .expect("writes");
                std::fs::write(&body, &case.body).expect("writes");
                let reported =
                    output(command(language.run).arg(&case.secret).arg(headers).arg(body));
                assert_eq!(
                    reported.trim(),
                    case.genuine.to_string(),
                    "{}: {}",
                    language.name,
                    case.name
                );
            }
            println!("{}: {} requests", language.name, cases.len());
        }
    });
}

//! The names in the documents, and their references to each other, are true.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

use lapin::{message::Delivery, types::AMQPValue};
use serde_json::Value;

use crate::{
    documents::packaging::anchors,
    support::{
        broker::Broker,
        daemon::{QUICK, Setup, subscriber},
        eventually,
        receiver::{Receiver, event, status},
        run,
    },
};

mod amqp {
    #[test]
    fn what_the_reference_lists_is_what_a_daemon_declares_and_writes() {
        super::run(super::what_the_reference_lists_is_what_a_daemon_declares_and_writes());
    }
}

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: impl AsRef<Path>) -> String {
    let path = repository().join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn files(folder: &str, ending: &str, into: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(repository().join(folder)).expect("a folder") {
        let name =
            format!("{folder}/{}", entry.expect("an entry").file_name().to_str().expect("text"));
        if repository().join(&name).is_dir() {
            files(&name, ending, into);
        } else if name.ends_with(ending) {
            into.push(name.into());
        }
    }
}

/// Every document, by its path.
fn documents() -> Vec<PathBuf> {
    let mut found = vec![];
    files("docs", ".md", &mut found);
    for entry in std::fs::read_dir(repository()).expect("a folder") {
        let name = entry.expect("an entry").file_name();
        if Path::new(&name).extension().is_some_and(|e| e == "md") {
            found.push(name.into());
        }
    }
    found.push("fuzz/README.md".into());
    found
}

/// The blocks of a document that begin with this line.
pub(crate) fn shown<'d>(document: &'d str, opening: &str) -> Vec<&'d str> {
    let opening = format!("\n```{opening}\n");
    document.split(opening.as_str()).skip(1).filter_map(|rest| rest.split("\n```").next()).collect()
}

/// A document without its code.
fn prose(text: &str) -> String {
    text.split("\n```").step_by(2).collect()
}

#[test]
fn every_link_between_documents_leads_to_a_file_and_a_heading() {
    let mut links = 0;
    for document in documents() {
        let text = prose(&read(&document));
        let folder = document.parent().expect("a folder");
        for link in text
            .split("](")
            .skip(1)
            .filter_map(|rest| rest.split(')').next())
            .filter(|l| !l.contains("://"))
        {
            let (path, anchor) = link.split_once('#').unwrap_or((link, ""));
            let target = if path.is_empty() { document.clone() } else { folder.join(path) };
            let there = repository().join(&target);
            assert!(there.exists(), "{}: {link}: there is no such file", document.display());
            if !anchor.is_empty() {
                assert!(
                    anchors(&read(&target)).contains(anchor),
                    "{}: {link}: there is no such heading",
                    document.display()
                );
            }
            links += 1;
        }
    }
    assert!(links > 60, "only {links} were found: this test reads the documents wrongly");
}

#[test]
fn every_path_that_a_document_names_exists() {
    let mut named = 0;
    for document in documents().iter().filter(|d| !d.ends_with("CHANGELOG.md")) {
        let text = prose(&read(document));
        for path in code(&text).into_iter().filter(|p| {
            ["src/", "tests/", "scripts/", "packaging/", ".ci/"].iter().any(|f| p.starts_with(f))
        }) {
            let path = path.split_whitespace().next().expect("a word");
            // `a::b` is the test `b` in a file `a.rs`.
            assert!(
                repository().join(path).exists() || path.ends_with("/a.rs"),
                "{}: {path}",
                document.display()
            );
            named += 1;
        }
    }
    assert!(named > 60, "only {named} were found: this test reads the documents wrongly");
}

#[test]
fn the_package_brings_every_document() {
    let manifest = read("Cargo.toml");
    let mut found = vec![];
    files("docs", "", &mut found);
    for document in found {
        assert!(
            manifest.contains(&format!("[\"{}\"", document.display())),
            "the Debian package lacks {}",
            document.display()
        );
    }
}

#[test]
fn each_picture_is_shown_by_a_document_and_loads_quickly() {
    let mut found = vec![];
    files("docs/images", "", &mut found);
    assert!(!found.is_empty());
    for picture in found {
        let size = std::fs::metadata(repository().join(&picture)).expect("it is there").len();
        assert!(size < 150 * 1024, "{}: {size} bytes", picture.display());
        let is_shown = documents().iter().any(|document| {
            let link = picture.strip_prefix(document.parent().expect("a folder"));
            link.is_ok_and(|link| read(document).contains(&format!("]({})", link.display())))
        });
        assert!(is_shown, "{} is in no document", picture.display());
    }
}

/// The names in a text that begin with this.
fn names(text: &str, start: &str) -> BTreeSet<String> {
    let is_name = |c: char| c.is_ascii_lowercase() || c == '-';
    let ends = text
        .split(start)
        .skip(1)
        .map(|rest| rest.split(|c| !is_name(c)).next().unwrap_or_default());
    ends.filter(|end| !end.is_empty()).map(|end| format!("{start}{end}")).collect()
}

#[test]
fn the_reference_has_every_header_and_no_other() {
    let mut sources = vec![];
    files("src", ".rs", &mut sources);
    let mut headers = BTreeSet::new();
    for path in sources {
        let code = read(path).split("#[cfg(test)]").next().unwrap_or_default().to_owned();
        headers.append(
            &mut names(&code, "\"x-hooktrail-")
                .iter()
                .map(|n| n.trim_start_matches('"').to_owned())
                .collect(),
        );
    }
    assert!(headers.len() > 12, "{headers:?}");
    assert_eq!(names(&read("docs/rabbitmq.md"), "x-hooktrail-"), headers);
}

/// The rows of the first table below a heading of the reference, by their cells.
fn table(heading: &str) -> Vec<Vec<String>> {
    let text = read("docs/rabbitmq.md");
    let below = text
        .split(&format!("\n{heading}\n"))
        .nth(1)
        .unwrap_or_else(|| panic!("there is no `{heading}`"));
    let rows = below
        .lines()
        .skip_while(|l| !l.starts_with('|'))
        .take_while(|l| l.starts_with('|'))
        .skip(2);
    rows.map(|row| row.trim_matches('|').split('|').map(|cell| cell.trim().to_owned()).collect())
        .collect()
}

/// The texts between backticks.
fn code(cell: &str) -> Vec<&str> {
    cell.split('`').skip(1).step_by(2).collect()
}

/// A name of the reference as it is for this broker, subscriber and level.
fn named(broker: &Broker, name: &str, level: u32) -> String {
    let below = if level == 0 {
        "hooktrail.delay".to_owned()
    } else {
        format!("hooktrail.delay.{:02}", level - 1)
    };
    let name =
        name.replace("BELOW", &below).replace("NAME", "siem").replace("NN", &format!("{level:02}"));
    match name.strip_prefix("hooktrail.") {
        Some(rest) => format!("{}.{rest}", broker.prefix),
        None if name == "audit" => broker.exchange.clone(),
        None => name,
    }
}

/// The levels that a row of the reference stands for.
fn levels(row: &[String]) -> std::ops::Range<u32> {
    if row.iter().any(|cell| cell.contains("NN")) { 0..19 } else { 0..1 }
}

/// The arguments in the cell.
fn arguments(broker: &Broker, cell: &str, level: u32) -> BTreeMap<String, String> {
    let pairs =
        code(cell).into_iter().filter_map(|pair| pair.split_once(" = ").or(pair.split_once(" =")));
    let value = |value: &str| match value {
        "TTL" => (1000_u64 << level).to_string(),
        value => named(broker, value, level),
    };
    pairs.map(|(name, v)| (name.to_owned(), value(v.trim()))).collect()
}

/// This test's objects in the broker, by name.
fn listed(broker: &Broker, command: &[&str]) -> Vec<Value> {
    let text = broker.node().ctl(&[&["--quiet", "--formatter", "json"], command].concat());
    let all: Vec<Value> = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"));
    let is_ours = |v: &Value| {
        v.as_str()
            .is_some_and(|s| s == broker.exchange || s.starts_with(&format!("{}.", broker.prefix)))
    };
    all.into_iter()
        .filter(|row| ["name", "source_name"].iter().any(|column| is_ours(&row[column])))
        .collect()
}

/// Arguments as `rabbitmqctl` lists them: an array of name, type and value for each, or an object.
fn as_arguments(found: &Value) -> BTreeMap<String, String> {
    let text = |v: &Value| v.as_str().map_or_else(|| v.to_string(), str::to_owned);
    match found {
        Value::Object(pairs) => pairs.iter().map(|(name, v)| (name.clone(), text(v))).collect(),
        Value::Array(triples) => triples.iter().map(|t| (text(&t[0]), text(&t[2]))).collect(),
        other => panic!("{other}"),
    }
}

async fn what_the_reference_lists_is_what_a_daemon_declares_and_writes() {
    let broker = Broker::managed().await;
    let failing = Receiver::start(|_, _| status(503)).await;
    let text = QUICK.to_owned()
        + &subscriber(
            "siem",
            &failing.url,
            "events = [\"a.*\", \"b.#\"]\nretry = { max_attempts = 2, initial_interval = \"1h\", randomization_factor = 0.0 }",
        );
    let setup = Setup::new(&broker, &text);
    let _daemon = setup.start().await;
    eventually("the witness is bound", async || {
        let bound = listed(&broker, &["list_bindings", "source_name", "destination_name"]);
        bound.iter().any(|b| b["source_name"] == format!("{}.witness", broker.prefix))
    })
    .await;
    eventually("history is bound", async || {
        let bound = listed(&broker, &["list_bindings", "source_name", "destination_name"]);
        let queue = format!("{}.history", broker.prefix);
        let is_it =
            |b: &Value| b["destination_name"] == queue && b["source_name"] == broker.exchange;
        bound.iter().any(is_it)
    })
    .await;

    let queues: BTreeMap<String, _> = table("## Queues")
        .iter()
        .flat_map(|row| {
            levels(row)
                .map(|n| (named(&broker, code(&row[0])[0], n), arguments(&broker, &row[2], n)))
                .collect::<Vec<_>>()
        })
        .collect();
    let found = listed(&broker, &["list_queues", "name", "arguments"]);
    let found: BTreeMap<String, _> = found
        .iter()
        .map(|q| (q["name"].as_str().expect("a name").to_owned(), as_arguments(&q["arguments"])))
        .collect();
    assert_eq!(found, queues);
    assert_eq!(queues.len(), 3 + 19 + 3);

    let exchanges: BTreeMap<String, _> = table("## Exchanges")
        .iter()
        .flat_map(|row| {
            let one = |n| {
                (
                    named(&broker, code(&row[0])[0], n),
                    (row[1].clone(), arguments(&broker, &row[2], n)),
                )
            };
            levels(row).map(one).collect::<Vec<_>>()
        })
        .collect();
    let found = listed(&broker, &["list_exchanges", "name", "type", "arguments"]);
    let kind = |e: &Value| e["type"].as_str().expect("a type").to_owned();
    let found: BTreeMap<String, _> = found
        .iter()
        .map(|e| {
            (
                e["name"].as_str().expect("a name").to_owned(),
                (kind(e), as_arguments(&e["arguments"])),
            )
        })
        .collect();
    assert_eq!(found, exchanges);

    let mut bindings = BTreeSet::new();
    for row in table("## Bindings") {
        for n in levels(&row) {
            let keys = match code(&row[2])[..] {
                [] => vec![String::new()],
                ["events"] => vec!["a.*".to_owned(), "b.#".to_owned()],
                [key] => vec![key.replace("NAME", "siem")],
                [before, last] => vec![before.repeat((18 - n) as usize) + last],
                _ => panic!("{row:?}"),
            };
            let to = row[1].split_whitespace().next().expect("a kind").to_owned();
            for key in keys {
                bindings.insert((
                    named(&broker, code(&row[0])[0], n),
                    to.clone(),
                    named(&broker, code(&row[1])[0], n),
                    key,
                ));
            }
        }
    }
    let columns = ["source_name", "destination_kind", "destination_name", "routing_key"];
    let found = listed(&broker, &[&["list_bindings"][..], &columns[..]].concat());
    let text = |b: &Value, column: &str| b[column].as_str().expect("text").to_owned();
    let found: BTreeSet<_> = found
        .iter()
        .map(|b| {
            (text(b, columns[0]), text(b, columns[1]), text(b, columns[2]), text(b, columns[3]))
        })
        .collect();
    assert_eq!(found, bindings);

    // An hour is 2^11 s and more: there it enters the ladder.
    broker.publish("a.b", [event(0)]).await;
    broker.wait_depth("delay.11", 1).await;
    let envelope = broker.take("delay.11").await.expect("just counted");
    assert_headers_are_listed(&envelope, "E");
    broker.publish("a.b", ["{\"no\":\"event\"}"]).await;
    broker.wait_depth("sub.siem.dead", 1).await;
    let letter = broker.take("sub.siem.dead").await.expect("just counted");
    assert_headers_are_listed(&letter, "D");
}

/// Each header of a message is in the reference, for this kind of message and with its type.
fn assert_headers_are_listed(message: &Delivery, on: &str) {
    let table = table("### Headers");
    let headers = message.properties.headers().as_ref().expect("headers").inner();
    // The others are the broker's.
    let own: Vec<_> =
        headers.iter().filter(|(name, _)| name.as_str().starts_with("x-hooktrail-")).collect();
    assert!(own.len() > 4, "{own:?}");
    for (name, value) in own {
        let row = table
            .iter()
            .find(|row| code(&row[0]) == [name.as_str()])
            .unwrap_or_else(|| panic!("{name} is not listed"));
        assert!(row[1].contains(on), "{name} is not listed for {on}");
        let wanted = if matches!(value, AMQPValue::LongString(_)) { "string" } else { "integer" };
        assert!(row[2].starts_with(wanted), "{name}: {value:?}");
    }
}

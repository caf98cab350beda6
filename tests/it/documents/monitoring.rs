//! The shipped alerts and the dashboard: what they name exists.

use std::collections::BTreeSet;

use hooktrail::telemetry::metrics::{ALL, Kind};
use serde_json::Value;

use crate::{
    documents::packaging::{anchors, file, yaml},
    support::{
        api::Api,
        daemon::{QUICK, Setup, subscriber},
        eventually, free_port,
        receiver::{Receiver, event},
        run,
    },
};

/// The names of series that a text mentions.
fn names(text: &str) -> BTreeSet<String> {
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == ':';
    text.split(|c| !is_name(c))
        .filter(|word| word.starts_with("hooktrail_"))
        .map(str::to_owned)
        .collect()
}

/// The names of all series, those of histograms with their suffixes.
fn series() -> BTreeSet<String> {
    let suffixes = |kind| match kind {
        Kind::Histogram => &["_bucket", "_sum", "_count"][..],
        Kind::Counter | Kind::Gauge => &[""],
    };
    ALL.iter()
        .flat_map(|d| suffixes(d.kind).iter().map(move |suffix| d.exposed() + suffix))
        .collect()
}

fn rules() -> Vec<Value> {
    let alerts = &yaml(&file("packaging/prometheus/alerts.yml"))[0];
    alerts["groups"]
        .as_array()
        .expect("groups")
        .iter()
        .flat_map(|g| g["rules"].as_array().cloned().expect("rules"))
        .collect()
}

#[test]
fn every_metric_that_alerts_and_dashboard_name_exists() {
    let known = series();
    for (path, least) in [
        ("packaging/prometheus/alerts.yml", 10),
        ("packaging/prometheus/alerts_test.yml", 5),
        ("packaging/grafana/hooktrail.json", 25),
    ] {
        let named = names(&file(path));
        let unknown: Vec<_> = named.difference(&known).collect();
        assert!(
            unknown.is_empty(),
            "{path} names what is not in src/telemetry/metrics/definitions.rs: {unknown:?}"
        );
        assert!(named.len() >= least, "{path}: only {} were found", named.len());
    }
}

/// `name{a="x"}` and `by (a)`: the labels that a query gives to a metric.
#[test]
fn every_label_that_a_selector_names_is_one_of_its_metric() {
    let texts = [
        file("packaging/prometheus/alerts.yml"),
        file("packaging/grafana/hooktrail.json").replace("\\\"", "\""),
    ];
    let mut seen = 0;
    for d in ALL {
        let suffixes: &[&str] =
            if d.kind == Kind::Histogram { &["_bucket", "_sum", "_count"] } else { &[""] };
        for opening in suffixes.iter().map(|s| format!("{}{s}{{", d.exposed())) {
            for selector in texts
                .iter()
                .flat_map(|t| t.split(opening.as_str()).skip(1))
                .filter_map(|rest| rest.split('}').next())
            {
                for label in selector
                    .split(',')
                    .filter_map(|part| part.split(['=', '!']).next())
                    .map(str::trim)
                {
                    assert!(d.labels.contains(&label), "`{}` has no label `{label}`", d.exposed());
                    seen += 1;
                }
            }
        }
    }
    assert!(seen > 20, "only {seen} labels were found");
}

#[test]
fn every_alert_points_to_its_paragraph_and_every_paragraph_has_its_alert() {
    let document = file("docs/operations.md");
    let anchors = anchors(&document);
    let mut alerts = BTreeSet::new();
    for rule in rules() {
        let name = rule["alert"].as_str().expect("an alert's name");
        let anchor = name.to_lowercase();
        assert_eq!(
            rule["annotations"]["runbook_url"],
            format!("docs/operations.md#{anchor}"),
            "{name}"
        );
        assert!(anchors.contains(&anchor), "docs/operations.md has no paragraph {name}");
        for key in ["summary", "description"] {
            assert!(
                rule["annotations"][key].as_str().is_some_and(|t| !t.is_empty()),
                "{name} has no {key}"
            );
        }
        assert!(
            matches!(rule["labels"]["severity"].as_str(), Some("warning" | "critical")),
            "{name}"
        );
        alerts.insert(name.to_owned());
    }
    let paragraphs = document
        .lines()
        .filter_map(|l| l.strip_prefix("### "))
        .filter(|h| h.starts_with("Hooktrail"));
    assert_eq!(paragraphs.map(str::to_owned).collect::<BTreeSet<_>>(), alerts);
}

#[test]
fn the_dashboard_is_one_that_grafana_can_show() {
    let dashboard: Value =
        serde_json::from_str(&file("packaging/grafana/hooktrail.json")).expect("JSON");
    let panels = dashboard["panels"].as_array().expect("panels");
    let ids: BTreeSet<u64> = panels.iter().filter_map(|p| p["id"].as_u64()).collect();
    assert_eq!(ids.len(), panels.len(), "each panel has an id of its own");
    let mut places = BTreeSet::new();
    for panel in panels {
        let (title, place) = (&panel["title"], &panel["gridPos"]);
        let at = |key: &str| place[key].as_u64().unwrap_or_else(|| panic!("{title} has no {key}"));
        assert!(at("x") + at("w") <= 24, "{title} is wider than the page");
        for (x, y) in (at("x")..at("x") + at("w"))
            .flat_map(|x| (at("y")..at("y") + at("h")).map(move |y| (x, y)))
        {
            assert!(places.insert((x, y)), "{title} lies over another panel");
        }
        if panel["type"] != "row" {
            let queries = panel["targets"].as_array().expect("queries");
            assert!(
                queries.iter().all(|q| q["expr"].as_str().is_some_and(|e| !e.is_empty())),
                "{title}"
            );
            assert_eq!(
                panel["datasource"]["uid"], "${datasource}",
                "{title} asks a data source of its own"
            );
        }
    }
}

#[test]
fn a_daemon_that_never_had_its_queue_is_one_to_alert_of() {
    run(async {
        let api = Api::new();
        let setup = Setup::with_text(&format!(
            "[queue]\nurl = \"amqp://127.0.0.1:{}\"\n{}",
            free_port(),
            api.section()
        ));
        let daemon = setup.spawn();
        daemon.wait_log("admin listening").await;
        eventually("the queue is reported as away", async || {
            api.metric("hooktrail_queue_up").await == Some(0.0)
        })
        .await;
    });
}

#[test]
fn whether_history_is_kept_is_in_the_status_the_metrics_and_the_answer_of_readyz() {
    run(async {
        let (api, receiver) = (Api::new(), Receiver::accepting().await);
        let text = |more: &str| {
            format!(
                "[queue]\nurl = \"embedded\"\ndata_dir = \"data\"\n{more}{QUICK}{}{}",
                subscriber("a", &receiver.url, ""),
                api.section()
            )
        };
        let setup = Setup::with_text(&text(""));
        let file = setup.config().with_file_name("data").join("history.db");
        std::fs::create_dir_all(&file).expect("a folder in its place");
        let daemon = setup.start().await;
        let health = async || api.get("/api/v1/subscribers").await.json()["history"].clone();
        let is = async |state: &str| {
            eventually(&format!("history is {state}"), async || health().await["state"] == state)
                .await;
        };
        is("away").await;
        let (health_then, ready) = (health().await, api.get("/readyz").await);
        let why = health_then["why"].as_str().expect("a reason").to_owned();
        assert!(why.contains("history.db"), "{why}");
        assert_eq!(ready.status, 200, "deliveries do not need it");
        assert_eq!(ready.text, format!("ready\nhistory is away: {why}\n"));
        assert_eq!(api.metric("hooktrail_history_up").await, Some(0.0));
        let status = setup.ok(&["status"]);
        assert!(
            status.starts_with(&format!("History is away: {why}\nDeliveries go on.\n")),
            "{status}"
        );
        api.post("/api/v1/events", &event(0)).await;
        receiver.wait_all(1).await;

        std::fs::remove_dir(&file).expect("it is empty");
        is("kept").await;
        api.post("/api/v1/events", &event(1)).await;
        receiver.wait_all(2).await;
        eventually("both are in history", async || {
            let found = health().await;
            let begins = ["events_from", "deliveries_from", "last_event_at", "bytes"];
            begins.iter().all(|key| !found[key].is_null())
        })
        .await;
        assert_eq!(api.metric("hooktrail_history_up").await, Some(1.0));
        for name in ["first_event_timestamp_seconds", "last_event_timestamp_seconds", "size_bytes"]
        {
            let value = api.metric(&format!("hooktrail_history_{name}")).await;
            assert!(value.is_some_and(|value| value > 1000.0), "{name}: {value:?}");
        }
        let status = setup.ok(&["status"]);
        let line = status.lines().find(|l| l.starts_with("history has events from 2"));
        assert!(line.is_some_and(|l| l.contains(" on, deliveries from 2")), "{status}");
        assert_eq!(api.get("/readyz").await.text, "ready\n");
        assert!(daemon.stop().await.success());

        std::fs::write(setup.config(), text("[store]\nurl = \"none\"\n")).expect("writes");
        let _daemon = setup.start().await;
        is("off").await;
        let status = setup.ok(&["status"]);
        assert!(
            status.contains("\nhistory is off (") && status.contains("[store] url"),
            "{status}"
        );
        assert_eq!(api.metric("hooktrail_history_up").await, None);
        assert_eq!(api.get("/readyz").await.text, "ready\n");
    });
}

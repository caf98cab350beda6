//! The Audit Log page: its files and its picture of the day.

use serde_json::Value;

use super::{
    console::{Browser, HOSTILE, OTHERS, Seen, hostile, hostile_ones, links, stage},
    history::TOKEN,
};
use crate::support::{api::Api, eventually, run};

/// Publishes an event for each hostile text, and waits until the page has all.
async fn hostile_events(api: &Api, browser: &Browser) {
    api.publish(TOKEN, hostile_ones()).await;
    eventually("all are shown", async || {
        let events = browser.get("/console/events").await.text;
        events.contains(&format!(">{} events from ", HOSTILE.len()))
    })
    .await;
}

fn assert_file(seen: &Seen, media_type: &str, ending: &str) {
    assert_eq!(seen.status, 200, "{}", seen.text);
    assert!(seen.header("content-type").starts_with(media_type));
    let disposition = seen.header("content-disposition");
    assert!(disposition.starts_with("attachment; filename=\"audit-log-20"), "{disposition}");
    assert!(disposition.ends_with(&format!("Z.{ending}\"")), "{disposition}");
    assert_eq!(seen.header("x-content-type-options"), "nosniff");
    assert_eq!(seen.header("cache-control"), "no-store");
    assert!(seen.header("content-security-policy").contains("sandbox"));
    assert_eq!(seen.header("hooktrail-history-gaps"), "0");
    assert!(seen.header("hooktrail-history-from").starts_with("20"));
}

/// The cells of each line, as RFC 4180 has them.
fn cells(csv: &str) -> Vec<Vec<String>> {
    let (mut lines, mut line, mut cell) = (Vec::new(), Vec::new(), String::new());
    let mut is_quoted = false;
    let mut chars = csv.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '"' if is_quoted && chars.peek() == Some(&'"') => cell.extend(chars.next()),
            '"' => is_quoted = !is_quoted,
            ',' if !is_quoted => line.push(std::mem::take(&mut cell)),
            '\r' if !is_quoted && chars.peek() == Some(&'\n') => {
                chars.next();
                line.push(std::mem::take(&mut cell));
                lines.push(std::mem::take(&mut line));
            }
            c => cell.push(c),
        }
    }
    assert!(cell.is_empty() && line.is_empty() && !is_quoted, "it ends with a line: {csv}");
    lines
}

#[test]
fn the_audit_log_is_exported_as_filtered_and_runs_nowhere() {
    run(async {
        let api = Api::new();
        let admin = format!("token = \"{TOKEN}\"\n{OTHERS}");
        let (_queue, _receiver, _setup, _daemon) = stage(&api, &admin).await;
        let browser = Browser::signed_in(&api, "the-token-that-reads").await;
        hostile_events(&api, &browser).await;

        let page = browser.page("/console/events?type=user.*&limit=2").await;
        let files: Vec<String> =
            links(&page).into_iter().filter(|link| link.contains("/export?")).collect();
        assert_eq!(
            files,
            ["csv", "jsonl"].map(|f| format!("/console/events/export?type=user.*&format={f}"))
        );
        let csv = browser.get(&files[0]).await;
        assert_file(&csv, "text/csv", "csv");
        let lines = cells(&csv.text);
        let (head, rows) = lines.split_first().expect("a head");
        assert_eq!((head.len(), rows.len()), (14, HOSTILE.len()), "{}", csv.text);
        for (row, text) in rows.iter().rev().zip(HOSTILE) {
            assert_eq!(row.len(), head.len(), "{row:?}");
            for cell in row {
                assert!(!cell.starts_with(['=', '+', '-', '@', '\t', '\r', '\n']), "{row:?}");
            }
            let name = head.iter().position(|cell| cell == "actor_name").expect("a column");
            let (shown, text) =
                (row[name].trim_start_matches('\''), text.replace('\0', "\u{fffd}"));
            assert_eq!(shown, text.trim_start_matches('\''), "{row:?}");
        }

        let jsonl = browser.get(&files[1]).await;
        assert_file(&jsonl, "application/jsonl", "jsonl");
        let lines: Vec<Value> =
            jsonl.text.lines().map(|l| serde_json::from_str(l).expect("JSON")).collect();
        assert_eq!(lines.len(), HOSTILE.len());
        for (n, (line, text)) in lines.iter().rev().zip(HOSTILE).enumerate() {
            assert_eq!(line["actor"]["name"], text);
            assert_eq!(line["body"], hostile(n, text), "the published bytes");
        }
        let one = browser.get("/console/events/export?format=jsonl&text=3+script").await;
        assert_eq!(one.text.lines().count(), 1, "{}", one.text);
        let none = browser.get("/console/events/export?format=csv&type=none").await;
        assert_eq!(cells(&none.text).len(), 1, "its head alone");

        // The API has the same, for a token that may read.
        for (token, path, status) in [
            (TOKEN, "format=csv", 200),
            ("the-token-that-reads", "format=jsonl&since=2020-01-01T00:00:00Z", 200),
            ("the-token-that-publishes", "format=csv", 403),
            (TOKEN, "format=xml", 400),
            (TOKEN, "format=csv&limit=7", 400),
        ] {
            let bearer = format!("Bearer {token}");
            let headers = [("authorization", bearer.as_str())];
            let path = format!("/api/v1/events/export?{path}");
            let answer = api.send("GET", &path, &headers, "").await;
            assert_eq!(answer.status, status, "{token} {path}: {answer:?}");
        }
        let stranger = Browser::new(&api).get(&files[0]).await;
        assert!(
            stranger.status == 401 && !stranger.text.contains("user.changed"),
            "{}",
            stranger.text
        );
        let wrong = browser.get("/console/events/export?format=csv&since=last+week").await;
        assert!(wrong.status == 400 && wrong.text.contains("is no time"), "{}", wrong.text);
    });
}

#[test]
fn the_audit_log_shows_its_day_by_the_hour_and_each_number_leads_to_its_events() {
    run(async {
        let api = Api::new();
        let admin = format!("token = \"{TOKEN}\"\n{OTHERS}");
        let (_queue, _receiver, _setup, _daemon) = stage(&api, &admin).await;
        let browser = Browser::signed_in(&api, "the-token-that-reads").await;
        eventually("the store is open, and empty", async || {
            browser.get("/console/events").await.text.contains(">0 events from ")
        })
        .await;
        hostile_events(&api, &browser).await;
        let page = browser.page("/console/events").await;
        let all = format!(">{} events from ", HOSTILE.len());
        assert!(page.contains("<svg class=\"chart day\"") && page.contains(&all), "{page}");
        assert!(page.contains("History begins in this time"), "{page}");
        assert!(!page.contains("are counted"), "nothing is left out: {page}");
        // The hours that have events, one, or two if an hour ended meanwhile, in picture and table.
        let hours: Vec<String> =
            links(&page).into_iter().filter(|link| link.contains("until=")).collect();
        assert!(matches!(hours.len(), 1 | 2), "{hours:?}");
        let mut rows = 0;
        for hour in &hours {
            assert_eq!(page.matches(&hour.replace('&', "&amp;")).count(), 2, "{hour}");
            let narrowed = browser.page(hour).await;
            assert!(narrowed.contains(&all), "the day stays: {narrowed}");
            rows += narrowed.matches("<td class=\"main\">").count();
        }
        assert_eq!(rows, HOSTILE.len());
        let one = browser.page("/console/events?text=3+script").await;
        assert!(one.contains(">1 event from "), "{one}");
        let before = browser.page("/console/events?until=2020-02-02").await;
        assert!(before.contains(">0 events from 2020-02-01 00:00 to 2020-02-02 00:00 UTC<"));
        let by_event = browser.page("/console/events?by=event-time").await;
        assert!(!by_event.contains("<svg class=\"chart day\""), "{by_event}");

        // A webhook's last hour.
        eventually("its attempts have failed", async || {
            browser.get("/console/webhooks").await.text.contains("in failed attempts</title>")
        })
        .await;
        let all = browser.page("/console/").await;
        assert!(
            all.contains("Last hour</th>") && all.contains("in failed attempts</title>"),
            "{all}"
        );
        let one = browser.page("/console/webhooks/siem").await;
        assert!(one.contains("<svg class=\"spark\"") && one.contains("Minutes ago"), "{one}");
    });
}

//! `dead list` without a name: the number of dead letters of each subscriber, by reason, with the
//! oldest and newest.

use std::{collections::BTreeMap, time::SystemTime};

use serde_json::{Value, json};

use super::walk::{each, until_second_interrupt};
use crate::{
    cli::{
        failed::Failed,
        text::{print, time},
    },
    clock,
    config::Config,
    letters::{Choice, Selection},
    queue::Queue,
    supervisor::signal::{self, Stops},
    wording::counted,
};

/// The dead letters of one subscriber that pass the filters.
struct Tally {
    subscriber: String,
    configured: bool,
    letters: usize,
    reasons: BTreeMap<&'static str, usize>,
    oldest: Option<SystemTime>,
    newest: Option<SystemTime>,
}

/// Walks through the dead letters of all subscribers one after the other, also of removed ones.
pub(super) async fn list(
    queue: impl Queue,
    config: &Config,
    selection: &Selection,
    json: bool,
) -> Result<(), Failed> {
    let stops = signal::stop()?;
    let depths = queue.depths(&config.subscribers).await?;
    let all = depths
        .subscribers
        .iter()
        .map(|found| (found, true))
        .chain(depths.removed.iter().map(|found| (found, false)));
    let mut tallies = Vec::new();
    for ((name, _), configured) in all.filter(|((_, depth), _)| depth.dead > 0) {
        let tally = tally(&queue, name, configured, selection, &stops);
        let tally = until_second_interrupt(&stops, tally).await?;
        tallies.extend((tally.letters > 0).then_some(tally));
    }
    queue.close().await;
    if json {
        tallies.iter().all(|t| print(&as_json(t).to_string()));
    } else {
        print(as_text(&tallies, depths.orphans).trim_end());
    }
    Ok(())
}

async fn tally(
    queue: &impl Queue,
    name: &str,
    configured: bool,
    selection: &Selection,
    stops: &Stops,
) -> Result<Tally, Failed> {
    let (reasons, (oldest, newest)) = (BTreeMap::new(), (None, None));
    let mut tally =
        Tally { subscriber: name.to_owned(), configured, letters: 0, reasons, oldest, newest };
    let letters = queue.dead_letters(name).await?;
    each(letters, &mut Choice::new(selection), stops, |_, held| {
        tally.letters += 1;
        *tally.reasons.entry(held.letter.reason.name()).or_default() += 1;
        let died_at = held.letter.died_at;
        tally.oldest = tally.oldest.into_iter().chain(died_at).min();
        tally.newest = tally.newest.max(died_at);
        true
    })
    .await?;
    Ok(tally)
}

fn as_json(t: &Tally) -> Value {
    json!({
        "subscriber": t.subscriber,
        "configured": t.configured,
        "dead": t.letters,
        "reasons": t.reasons,
        "oldest_died_at": t.oldest.map(clock::rfc3339),
        "newest_died_at": t.newest.map(clock::rfc3339),
    })
}

fn as_text(tallies: &[Tally], orphans: u64) -> String {
    let mut out = String::new();
    let mut line = |text: &str| {
        out.push_str(text.trim_end());
        out.push('\n');
    };
    if tallies.is_empty() {
        line("no dead letters");
    } else {
        let width = tallies
            .iter()
            .map(|t| t.subscriber.len())
            .max()
            .unwrap_or_default()
            .max("SUBSCRIBER".len());
        line(&format!(
            "{:<width$}  {:>6}  {:<20}  {:<20}  REASONS",
            "SUBSCRIBER", "DEAD", "OLDEST", "NEWEST"
        ));
        for t in tallies {
            let mut reasons: Vec<(&str, usize)> =
                t.reasons.iter().map(|(reason, n)| (*reason, *n)).collect();
            reasons.sort_by_key(|(_, n)| std::cmp::Reverse(*n));
            let reasons: Vec<String> =
                reasons.iter().map(|(reason, n)| format!("{n} {reason}")).collect();
            let (oldest, newest) = (time(t.oldest, "-"), time(t.newest, "-"));
            let gone = if t.configured { "" } else { "; not configured any more" };
            line(&format!(
                "{:<width$}  {:>6}  {oldest:<20}  {newest:<20}  {}{gone}",
                t.subscriber,
                t.letters,
                reasons.join(", ")
            ));
        }
        let letters: usize = tallies.iter().map(|t| t.letters).sum();
        let (letters, whose) =
            (counted(letters, "dead letter(s)"), counted(tallies.len(), "subscriber(s)"));
        line(&format!("\n{letters} of {whose}; `hooktrail dead list NAME` shows each"));
    }
    if orphans > 0 {
        line(&format!("\n{}: `hooktrail dead list @log`", counted(orphans, "orphan(s)")));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_summary_has_a_line_for_each_with_its_commonest_reason_first() {
        let at = |s| Some(SystemTime::UNIX_EPOCH + Duration::from_secs(s));
        let tally = |subscriber: &str, configured, reasons: &[(&'static str, usize)]| Tally {
            subscriber: subscriber.to_owned(),
            configured,
            letters: reasons.iter().map(|(_, n)| n).sum(),
            reasons: reasons.iter().copied().collect(),
            oldest: at(0),
            newest: at(60),
        };
        let text = as_text(
            &[
                tally("siem", true, &[("exhausted", 2), ("refused", 10)]),
                tally("gone", false, &[("expired", 1)]),
            ],
            1,
        );
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(
            lines[1],
            "siem            12  1970-01-01T00:00:00Z  1970-01-01T00:01:00Z  10 refused, 2 exhausted"
        );
        assert_eq!(
            lines[2],
            "gone             1  1970-01-01T00:00:00Z  1970-01-01T00:01:00Z  1 expired; not configured any more"
        );
        assert!(
            text.contains("13 dead letters of 2 subscribers;") && text.contains("1 orphan:"),
            "{text}"
        );
        assert_eq!(as_text(&[], 0), "no dead letters\n");
    }
}

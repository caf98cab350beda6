//! `history`: the events that hooktrail remembers, newest first.

use std::io::{IsTerminal as _, Write as _};

use clap::builder::NonEmptyStringValueParser;

use super::{
    daemon::Asked,
    failed::Failed,
    moment::{Span, Zone},
    remembered::Remembered,
    terminal,
    text::{as_json, visible},
};
use crate::{
    admin::view::{Event, EventList, Party, Reach, Time},
    clock,
    config::Config,
    csv,
    event::{Pattern, Tenant},
    page::MAX_LIMIT,
    store::{By, EventFilter},
    wording::counted,
};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Events whose type matches this pattern, such as `user.*` or `#.deleted`
    #[arg(long = "type", value_name = "PATTERN", value_parser = Pattern::try_new)]
    event_type: Option<Pattern>,
    /// Events whose actor has this id or name
    #[arg(long, value_name = "ID", value_parser = NonEmptyStringValueParser::new())]
    actor: Option<String>,
    /// Events whose resource has this id or name
    #[arg(long, value_name = "ID", value_parser = NonEmptyStringValueParser::new())]
    resource: Option<String>,
    /// Events of this tenant
    #[arg(long, value_name = "TENANT")]
    tenant: Option<Tenant>,
    /// Events with this message id, or `sha256-` and the digest of their bytes
    #[arg(long, value_name = "ID", value_parser = NonEmptyStringValueParser::new())]
    id: Option<String>,
    /// Events that have all of these words; the last one may be the begin of a word
    #[arg(long, value_name = "WORDS")]
    text: Option<String>,
    #[command(flatten)]
    span: Span,
    /// The time that --since and --until mean: `at`, when the event was published, or
    /// `event-time`, its field `timestamp`
    #[arg(long, value_name = "TIME", default_value = "at", value_parser = ["at", "event-time"])]
    by: String,
    /// The most events
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    limit: u32,
    /// The events and how far history reaches, as one JSON object
    #[arg(long, conflicts_with = "csv")]
    json: bool,
    /// The events as comma-separated values (RFC 4180)
    #[arg(long)]
    csv: bool,
}

pub(super) async fn run(config: &Config, asked: &Asked, args: &Args) -> Result<(), Failed> {
    let times = args.span.read(clock::now())?;
    let text = args.text.clone();
    if text.as_ref().is_some_and(|text| !text.chars().any(char::is_alphanumeric)) {
        let why = "--text has no word to search for: words are letters and digits";
        return Err(Failed::Usage(why.to_owned()));
    }
    let filter = EventFilter {
        event_type: args.event_type.clone(),
        actor: args.actor.clone(),
        resource: args.resource.clone(),
        tenant: args.tenant.clone(),
        id: args.id.clone(),
        text,
        since: times.since,
        until: times.until,
        by: if args.by == "at" { By::At } else { By::EventTime },
    };
    let remembered = Remembered::open(config, asked).await?;
    let found = all(&remembered, &filter, args.limit as usize).await?;
    let shown = if args.json {
        as_json(&found) + "\n"
    } else if args.csv {
        csv(&found.events)
    } else {
        table(&found, &times.zone, terminal::width().filter(|_| is_terminal()))
    };
    write(&shown)?;
    if args.csv {
        // What is missing must not be missed, and is no line of the table.
        eprint!("{}", footer(&found, &times.zone));
    }
    Ok(())
}

fn is_terminal() -> bool {
    std::io::stdout().is_terminal()
}

/// Writes to standard output; a reader that has left ends nothing.
pub(super) fn write(text: &str) -> Result<(), Failed> {
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        written => Ok(written?),
    }
}

/// Reads as many parts as it takes.
pub(super) async fn all(
    remembered: &Remembered<'_>,
    filter: &EventFilter,
    limit: usize,
) -> Result<EventList, Failed> {
    let progress = super::terminal::progress("searching");
    let mut found = remembered.events(filter, limit.min(MAX_LIMIT), None).await?;
    while found.events.len() < limit
        && let Some(next) = found.next.take()
    {
        if let Some(back_to) = found.searched_back_to {
            progress.set_message(format!("searched back to {back_to}"));
        }
        let left = (limit - found.events.len()).min(MAX_LIMIT);
        let mut more = remembered.events(filter, left, Some(&next)).await?;
        more.events.splice(0..0, found.events);
        found = more;
    }
    progress.finish_and_clear();
    Ok(found)
}

const COLUMNS: [&str; 6] = ["NUMBER", "DATE", "TYPE", "ACTOR", "RESOURCE", "DESCRIPTION"];

fn table(found: &EventList, zone: &Zone, width: Option<usize>) -> String {
    let row = |e: &Event| {
        [
            e.number.to_string(),
            zone.show(e.at.0),
            visible(&e.event),
            party(&e.actor),
            party(&e.resource),
            e.description.as_deref().map(visible).unwrap_or_default(),
        ]
    };
    let rows: Vec<[String; 6]> = found.events.iter().map(row).collect();
    let mut out = if rows.is_empty() { String::new() } else { lines(&COLUMNS, &rows, width) };
    if rows.is_empty() {
        out.push_str("no event\n");
    }
    out + &footer(found, zone)
}

/// An actor or a resource for people: its name, else its id.
fn party(party: &Party) -> String {
    visible(party.name.as_ref().or(party.id.as_ref()).map_or("", String::as_str))
}

/// Rows under their headings. With a width the last columns are cut where they are too long.
pub(super) fn lines<const N: usize>(
    columns: &[&str; N],
    rows: &[[String; N]],
    width: Option<usize>,
) -> String {
    let heads = columns.map(str::to_owned);
    let length = |text: &String| text.chars().count();
    let mut widths: [usize; N] = std::array::from_fn(|n| {
        rows.iter().chain([&heads]).map(|row| length(&row[n])).max().unwrap_or(0)
    });
    if let Some(width) = width {
        fit(&mut widths, &heads.each_ref().map(length), width);
    }
    let mut out = String::new();
    for row in std::iter::once(&heads).chain(rows) {
        let mut line = String::new();
        for (text, width) in row.iter().zip(widths) {
            line.push_str(&cut(text, width));
            let blank = width.saturating_sub(length(text)) + 2;
            line.extend(std::iter::repeat_n(' ', blank));
        }
        out.push_str(line.trim_end());
        out.push('\n');
    }
    out
}

/// Narrows the widest columns until all fit; no column below its heading or 8.
fn fit<const N: usize>(widths: &mut [usize; N], heads: &[usize; N], room: usize) {
    let room = room.saturating_sub(2 * (N - 1));
    while widths.iter().sum::<usize>() > room {
        let narrowable = (2..N).filter(|n| widths[*n] > heads[*n].max(8));
        let Some(widest) = narrowable.max_by_key(|n| widths[*n]) else { return };
        widths[widest] -= 1;
    }
}

fn cut(text: &str, width: usize) -> String {
    if text.chars().count() <= width {
        return text.to_owned();
    }
    text.chars().take(width.saturating_sub(1)).chain(['…']).collect()
}

fn footer(found: &EventList, zone: &Zone) -> String {
    let more = more(found.searched_back_to, found.next.is_some(), zone);
    more + &reach(&found.history, "events", zone)
}

/// How far a list was searched, and how to go on.
pub(super) fn more(searched_back_to: Option<Time>, there_is: bool, zone: &Zone) -> String {
    // Shown times are cut to the second: with the next one nothing is left out.
    let shown = |Time(at)| (zone.show(at), zone.show(at + std::time::Duration::from_secs(1)));
    match searched_back_to.map(shown) {
        Some((at, next)) => format!(
            "\nsearched back to {at}; there may be more: raise --limit, or give --until {next}\n"
        ),
        None if there_is => "\nthere are more: raise --limit, or give --until\n".to_owned(),
        None => String::new(),
    }
}

/// How far history reaches, and what it lacks.
pub(super) fn reach(reach: &Reach, what: &str, zone: &Zone) -> String {
    let from = if what == "events" { reach.events_from } else { reach.deliveries_from };
    let mut out = match from {
        Some(from) => {
            format!("\nhistory has {what} from {} on: {}\n", zone.show(from.0), visible(&reach.why))
        }
        None => format!("\nhistory has no {what} yet\n"),
    };
    for gap in reach.gaps.iter().filter(|gap| gap.what == what) {
        let missing = gap.missing.map(|n| format!(" ({} at least)", counted(n, "missing")));
        out.push_str(&format!(
            "gap: {what} may be missing from {} to {}{}: {}\n",
            zone.show(gap.from.0),
            zone.show(gap.until.0),
            missing.unwrap_or_default(),
            visible(&gap.why)
        ));
    }
    out
}

fn csv(events: &[Event]) -> String {
    let head = csv::line(Event::COLUMNS);
    std::iter::once(head).chain(events.iter().map(Event::to_csv)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_search_that_ended_early_says_how_far_it_came_and_how_to_go_on() {
        let zone = Zone::new(false);
        let at = Some(Time(std::time::SystemTime::UNIX_EPOCH));
        let early = more(at, true, &zone);
        assert!(
            early.contains("searched back to 1970-01-01T00:00:00Z")
                && early.contains("--until 1970-01-01T00:00:01Z"),
            "{early}"
        );
        assert!(more(None, true, &zone).contains("raise --limit"));
        assert_eq!(more(None, false, &zone), "");
    }

    #[test]
    fn long_columns_are_cut_to_the_terminal_and_the_number_and_the_date_never() {
        let row =
            ["1234567", "2025-01-02T15:02:18Z", "user.logged_in", "Ada", "r", &"x".repeat(99)]
                .map(str::to_owned);
        let whole = lines(&COLUMNS, std::slice::from_ref(&row), None);
        assert!(whole.contains(&"x".repeat(99)));
        let cut = lines(&COLUMNS, std::slice::from_ref(&row), Some(80));
        assert!(cut.lines().all(|l| l.chars().count() <= 80), "{cut}");
        assert!(cut.contains("1234567  2025-01-02T15:02:18Z  user.logged_in") && cut.contains('…'));
        let narrow = lines(&COLUMNS, &[row], Some(20));
        assert!(narrow.contains("1234567  2025-01-02T15:02:18Z"), "{narrow}");
    }
}

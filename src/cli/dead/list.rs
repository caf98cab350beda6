//! `dead list NAME`: a line for each dead letter.

use super::{choice::all_found, walk::each};
use crate::{
    admin::view::DeadLetter,
    cli::{
        failed::Failed,
        text::{as_json, print, time, visible},
    },
    letters::{Choice, Selection},
    queue::{DeadLetters, Held},
    supervisor::signal::Stops,
};

pub(super) async fn list(
    letters: impl DeadLetters,
    selection: &Selection,
    json: bool,
    stops: &Stops,
) -> Result<(), Failed> {
    let mut choice = Choice::new(selection);
    let mut head = !json;
    // Orphans have a column for their subscriber; the subscriber of dead letters is an argument.
    let whose =
        |text: &str| if selection.orphans { format!("{text:<16}  ") } else { String::new() };
    let row = |number: usize, held: &Held| {
        if json {
            return print(&as_json(&DeadLetter::new(number, held)));
        }
        if std::mem::take(&mut head)
            && !print(&format!(
                "{:>6}  {:<20}  {:<14}  {:>6}  {:>8}  {}{:<36}  ERROR",
                "NUMBER",
                "DIED AT",
                "REASON",
                "EVENTS",
                "ATTEMPTS",
                whose("SUBSCRIBER"),
                "ID"
            ))
        {
            return false;
        }
        let l = &held.letter;
        let error: String = visible(&l.error).chars().take(80).collect();
        let id = l.id.as_deref().map_or_else(|| "-".to_owned(), visible);
        let number = format!("@{number}");
        let (died, whose) = (
            time(l.died_at, "-"),
            whose(&held.subscriber.as_deref().map_or_else(|| "-".to_owned(), visible)),
        );
        print(&format!(
            "{number:>6}  {died:<20}  {:<14}  {:>6}  {:>8}  {whose}{id:<36}  {error}",
            l.reason.name(),
            l.events,
            l.attempts
        ))
    };
    let Some(shown) = each(letters, &mut choice, stops, row).await? else { return Ok(()) };
    all_found(&choice)?;
    if shown == 0 && !json {
        print(if selection.orphans { "no orphans" } else { "no dead letters" });
    }
    Ok(())
}

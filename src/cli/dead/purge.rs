//! `dead purge`: deletes dead letters for good.

use indicatif::ProgressBar;

use super::{
    choice::all_found,
    report::{finished, progress},
    walk::to_its_end,
};
use crate::{
    cli::{arguments::Destructive, failed::Failed, terminal::confirm},
    letters::{Purge, Selection, Watcher},
    queue::DeadLetters,
    supervisor::signal::Stops,
};

impl Watcher for ProgressBar {
    fn passed(&mut self) {
        self.inc(1);
    }
}

/// Purges at most `most`: letters that died after the count were not confirmed.
pub(super) async fn purge(
    letters: impl DeadLetters,
    selection: &Selection,
    Destructive { dry_run, json, .. }: Destructive,
    most: usize,
    stops: &Stops,
) -> Result<(), Failed> {
    let total = letters.left() as usize;
    let bar = progress(letters.left());
    let mut purge = Purge::new(selection, stops, bar.clone()).dry_run(dry_run).at_most(most);
    let done = purge.run(letters).await;
    bar.finish_and_clear();
    let done = done?;
    let of = if stops.is_asked() || most < usize::MAX { total } else { done.passed };
    finished("purge", done, of, selection, dry_run, json);
    to_its_end(stops)?;
    all_found(purge.choice())
}

pub(super) fn confirm_purge(chosen: usize, selection: &Selection) -> Result<(), Failed> {
    let all = if selection.is_all() { "all " } else { "" };
    confirm("purge", &format!("Delete {all}{chosen} {} for good?", selection.noun(chosen)))
}

//! `dead purge`: deletes dead letters for good.

use super::{
    choice::{Choice, Which},
    group::{GROUP_LETTERS, Group},
    report::{finished, progress},
    walk::{close, to_its_end},
};
use crate::{
    cli::{arguments::Destructive, failed::Failed, terminal::confirm},
    queue::DeadLetters,
    supervisor::signal::Stops,
};

/// Purges at most `most`: letters that died after the count were not confirmed.
pub(super) async fn purge(
    mut letters: impl DeadLetters,
    which: &Which,
    Destructive { dry_run, json, .. }: Destructive,
    most: usize,
    stops: &Stops,
) -> Result<(), Failed> {
    let total = letters.left() as usize;
    let bar = progress(letters.left());
    let (mut choice, mut purged, mut group) = (Choice::new(which), 0, Group::new(GROUP_LETTERS));
    let walk = async {
        while !stops.is_asked()
            && purged + group.items.len() < most
            && let Some(held) = letters.next().await?
        {
            bar.inc(1);
            if !choice.includes(&held) {
                continue;
            }
            if dry_run {
                purged += 1;
                continue;
            }
            let bytes = held.letter.body.len();
            if let Some(full) = group.push(held, bytes) {
                purged += full.len();
                letters.purge(full).await?;
            }
        }
        let rest = group.take();
        purged += rest.len();
        if rest.is_empty() { Ok(()) } else { letters.purge(rest).await }
    };
    let walked = walk.await;
    bar.finish_and_clear();
    close(letters, walked).await?;
    let of = if stops.is_asked() || most < usize::MAX { total } else { choice.number };
    finished("purge", purged, 0, of, &choice, dry_run, json);
    to_its_end(stops)?;
    choice.complete()
}

pub(super) fn confirm_purge(chosen: usize, which: &Which) -> Result<(), Failed> {
    let all = if which.all() { "all " } else { "" };
    confirm("purge", &format!("Delete {all}{chosen} {} for good?", which.what(chosen)))
}

//! `dead replay`: sends dead letters again.

use indicatif::ProgressBar;

use super::{
    choice::{all_found, arguments},
    report::{finished, progress},
};
use crate::{
    cli::{failed::Failed, text::visible},
    letters::{self, Selection, Staying, Watcher},
    queue::{DeadLetters, QueueError},
    supervisor::signal::Stops,
    wording::counted,
};

/// Skipped letters that are listed; the rest are only counted.
const MOST_SHOWN: usize = 100;

pub(super) struct Options {
    pub(super) rate: Option<f64>,
    pub(super) dry_run: bool,
    pub(super) json: bool,
}

pub(super) async fn replay<D: DeadLetters>(
    first: D,
    open: impl AsyncFn() -> Result<D, QueueError>,
    selection: &Selection,
    Options { rate, dry_run, json }: Options,
    stops: &Stops,
) -> Result<(), Failed> {
    let total = first.left();
    let bar = progress(total);
    let reporter = Reporter { selection, bar: bar.clone(), skipped: 0 };
    let replay = letters::Replay::new(selection, stops, reporter);
    let mut replay = replay.dry_run(dry_run).rate(rate);
    let done = replay.run(first, open).await;
    bar.finish_and_clear();
    let done = done.map_err(|e| match (Failed::from(e), replay.replayed()) {
        (Failed::Runtime(why), n) if n > 0 => {
            Failed::Runtime(format!("{why}; {n} were replayed before"))
        }
        (other, _) => other,
    })?;
    let of = if stops.is_asked() { total as usize } else { done.passed };
    finished("replay", done, of, selection, dry_run, json);
    if stops.is_asked() {
        return Err(Failed::Runtime(
            "interrupted: the others are where they were, in their order; run it again for them"
                .to_owned(),
        ));
    }
    all_found(replay.choice())?;
    if done.skipped > 0 && !selection.names.is_empty() {
        return Err(Failed::Runtime(format!(
            "{} cannot be replayed; see above for the remedy",
            counted(done.skipped, "letter(s)")
        )));
    }
    Ok(())
}

/// Shows the progress, and the letters that stay.
struct Reporter<'s> {
    selection: &'s Selection,
    bar: ProgressBar,
    skipped: usize,
}

impl Watcher for Reporter<'_> {
    fn passed(&mut self) {
        self.bar.inc(1);
    }

    fn stays(&mut self, &Staying { held, number, left, why }: &Staying<'_>) {
        self.skipped += 1;
        if self.skipped > MOST_SHOWN {
            if self.skipped == MOST_SHOWN + 1 {
                self.bar.suspend(|| {
                    eprintln!("more such letters follow; they are counted and not shown")
                });
            }
            return;
        }
        let arguments = arguments(self.selection);
        let error = visible(&held.letter.error);
        if self.selection.orphans {
            let name = held.letter.id.as_deref().map_or_else(|| format!("@{number}"), visible);
            self.bar.suspend(|| {
                eprintln!("`{name}` is not replayed: {why} ({error}); inspect it with `hooktrail dead show {arguments} {name}`, delete it with `hooktrail dead purge {arguments} {name}`");
            });
            return;
        }
        let moved = if left == number { String::new() } else { format!(" (@{left} from now on)") };
        self.bar.suspend(|| {
            eprintln!(
                "@{number}{moved} is not replayed, {why}: {error}; inspect it with `hooktrail dead show {arguments} @{left}`, then delete it with `hooktrail dead purge {arguments} @{left}`"
            );
        });
    }
}

//! The progress bar and the result of a replay or a purge.

use std::io::IsTerminal as _;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::json;

use crate::{
    cli::text::print,
    letters::{Done, Selection},
};

/// A progress bar, visible if stderr is a terminal.
pub(super) fn progress(total: u32) -> ProgressBar {
    let target = if std::io::stderr().is_terminal() {
        ProgressDrawTarget::stderr()
    } else {
        ProgressDrawTarget::hidden()
    };
    let style = ProgressStyle::with_template("{bar:40} {pos}/{len} letters, {per_sec}, {eta} left");
    ProgressBar::with_draw_target(Some(total.into()), target)
        .with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

pub(super) fn finished(
    what: &str,
    Done { letters, skipped, .. }: Done,
    of: usize,
    selection: &Selection,
    dry_run: bool,
    json: bool,
) {
    if json {
        let result = json!({
            "command": what, "subscriber": selection.subscriber, "orphans": selection.orphans, "dry_run": dry_run,
            "chosen": letters, "skipped": skipped, "of": of,
        });
        print(&result.to_string());
        return;
    }
    let verb = match (what, dry_run) {
        // The receiver answers later.
        ("replay", false) => "queued",
        ("replay", true) => "would queue",
        (_, false) => "purged",
        (_, true) => "would purge",
    };
    let rest = if skipped > 0 { format!(", skipped {skipped}") } else { String::new() };
    print(&format!("{verb} {letters} of {of} {}{rest}", selection.noun(of)));
}

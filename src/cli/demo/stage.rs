//! The demo's output: lines, and on a terminal a last line that changes.

use std::{
    io::{IsTerminal as _, Write as _},
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressStyle};

use crate::clock;

/// Prints lines, and on a terminal a last line that changes.
#[derive(Clone)]
pub(super) struct Stage {
    /// The time of the first event.
    begin: Arc<OnceLock<Instant>>,
    bar: Option<ProgressBar>,
    colours: bool,
}

#[derive(Clone, Copy)]
pub(super) enum Tone {
    Good,
    Waiting,
    Bad,
}

impl Stage {
    pub(super) fn new() -> Self {
        let terminal = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
        let bar = terminal.then(|| {
            let bar = ProgressBar::new_spinner();
            bar.set_draw_target(indicatif::ProgressDrawTarget::stdout());
            bar.set_style(
                ProgressStyle::with_template("{spinner} {msg}")
                    .unwrap_or_else(|_| ProgressStyle::default_spinner()),
            );
            bar.enable_steady_tick(Duration::from_millis(120));
            bar
        });
        Self { begin: Arc::default(), bar, colours: terminal }
    }

    /// Starts the time, at the first event.
    pub(super) fn begin(&self) {
        self.begin.get_or_init(clock::instant);
    }

    /// The time since the first event: a slow broker must not use up the receiver's outage.
    pub(super) fn elapsed(&self) -> Duration {
        self.begin.get().map_or(Duration::ZERO, |begin| clock::instant() - *begin)
    }

    pub(super) fn say(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.println(line),
            // The reader may have left, as with `| head`.
            None => drop(writeln!(std::io::stdout(), "{line}")),
        }
    }

    pub(super) fn report(&self, who: &str, tone: Tone, what: &str) {
        let (on, off) = match (self.colours, tone) {
            (false, _) => ("", ""),
            (true, Tone::Good) => ("\u{1b}[32m", "\u{1b}[0m"),
            (true, Tone::Waiting) => ("\u{1b}[33m", "\u{1b}[0m"),
            (true, Tone::Bad) => ("\u{1b}[31m", "\u{1b}[0m"),
        };
        self.say(&format!("{:>5.1}s  {who:<6} {on}{what}{off}", self.elapsed().as_secs_f64()));
    }

    pub(super) fn status(&self, text: String) {
        if let Some(bar) = &self.bar {
            bar.set_message(text);
        }
    }

    pub(super) fn end(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

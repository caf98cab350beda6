//! The terminal's width, text that fits it, and questions on it.

use std::io::IsTerminal as _;

use indicatif::{ProgressBar, ProgressDrawTarget};

use super::failed::Failed;

/// Columns of a terminal whose width is not known.
pub(super) const USUAL: usize = 80;

/// The fewest columns; a narrower text is not readable.
const LEAST: usize = 40;

/// Columns by `$COLUMNS`, else of the terminal on standard output; `None` without either.
pub(super) fn width() -> Option<usize> {
    let said = std::env::var("COLUMNS").ok().and_then(|n| n.parse().ok());
    let is = || {
        rustix::termios::tcgetwinsize(std::io::stdout()).ok().map(|size| usize::from(size.ws_col))
    };
    said.or_else(is).filter(|columns| *columns > 0).map(|columns| columns.max(LEAST))
}

/// Breaks a text between words so that no line is longer than `width`; continued lines are indented
/// by two more columns.
pub(super) fn wrapped(text: &str, width: usize) -> String {
    let words = text.trim_start_matches(' ');
    hanging(text, width, text.len() - words.len() + 2)
}

/// As [`wrapped`], with continued lines at column `further`.
pub(super) fn hanging(text: &str, width: usize, further: usize) -> String {
    let words = text.trim_start_matches(' ');
    let indent = text.len() - words.len();
    let mut out = " ".repeat(indent);
    let (mut column, mut begin) = (indent, indent);
    for (n, word) in words.split(' ').enumerate() {
        let length = word.chars().count();
        if n > 0 && column + 1 + length > width && column > begin {
            out.truncate(out.trim_end_matches(' ').len());
            out.push('\n');
            out.push_str(&" ".repeat(further));
            (column, begin) = (further, further);
        } else if n > 0 {
            out.push(' ');
            column += 1;
        }
        out.push_str(word);
        column += length;
    }
    out
}

/// A sign on standard error that something goes on; on a terminal only.
pub(super) fn progress(what: &'static str) -> ProgressBar {
    // Hides itself where standard error is no terminal.
    let bar = ProgressBar::new_spinner().with_message(what);
    bar.set_draw_target(ProgressDrawTarget::stderr());
    bar.enable_steady_tick(std::time::Duration::from_millis(200));
    bar
}

/// An error if `command` cannot ask before it deletes something.
pub(super) fn can_ask(command: &str) -> Result<(), Failed> {
    if std::io::stdin().is_terminal() {
        return Ok(());
    }
    Err(Failed::Usage(format!(
        "{command} deletes for good and cannot ask here; use --yes to delete, or --dry-run to see what would be deleted"
    )))
}

/// Asks whether `command` is to delete something; an error if the answer is no.
pub(super) fn confirm(command: &str, question: &str) -> Result<(), Failed> {
    can_ask(command)?;
    if ask(question)? { Ok(()) } else { Err(Failed::Usage("nothing was deleted".to_owned())) }
}

/// Asks, and returns whether the answer is yes.
pub(super) fn ask(question: &str) -> Result<bool, Failed> {
    eprint!("{question} [y/N] ");
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer)?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_broken_between_words_and_a_word_that_is_too_long_stays_whole() {
        assert_eq!(wrapped("  one two three four", 11), "  one two\n    three\n    four");
        assert_eq!(wrapped("one", 1), "one");
        assert_eq!(wrapped("", 10), "");
        assert_eq!(wrapped("a averylongwordindeed b", 10), "a\n  averylongwordindeed\n  b");
        assert_eq!(wrapped("über alle Maßen", 10), "über alle\n  Maßen");
        assert_eq!(hanging("name:  one two three", 14, 7), "name:  one two\n       three");
        for width in 1..60 {
            let text = "   each word is there, in its order, however  narrow it is";
            let back = wrapped(text, width).split_whitespace().collect::<Vec<_>>().join(" ");
            assert_eq!(back, text.split_whitespace().collect::<Vec<_>>().join(" "));
        }
    }
}

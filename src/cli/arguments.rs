//! Values of the command line.

use std::{path::PathBuf, time::Duration};

/// Checks the configuration's path, from `--config` or the environment.
pub(super) fn file_name(text: &str) -> Result<PathBuf, &'static str> {
    if text.is_empty() {
        return Err(
            "no file is named; give one by --config FILE or HOOKTRAIL_CONFIG=FILE, or unset HOOKTRAIL_CONFIG",
        );
    }
    Ok(text.into())
}

/// The flags of each command that deletes something.
#[derive(Debug, Clone, Copy, clap::Args)]
pub(super) struct Destructive {
    /// Say what would be deleted, and do nothing
    #[arg(long)]
    pub(super) dry_run: bool,
    /// Do not ask
    #[arg(long)]
    pub(super) yes: bool,
    /// The result as a JSON object
    #[arg(long)]
    pub(super) json: bool,
}

/// Parses a duration of the command line: a number alone is in seconds.
pub(super) fn duration(text: &str) -> Result<Duration, &'static str> {
    const EXPECTED: &str =
        "write seconds, such as 2 or 0.5, or a time with its unit, such as 500ms, 10s or 1m 30s";
    if text.bytes().all(|b| b.is_ascii_digit() || b == b'.')
        && let Ok(seconds) = text.parse()
    {
        return Duration::try_from_secs_f64(seconds).map_err(|_| EXPECTED);
    }
    humantime::parse_duration(text).map_err(|_| EXPECTED)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_alone_is_of_seconds() {
        let ms = Duration::from_millis;
        for (text, expected) in [
            ("2", ms(2000)),
            ("0", ms(0)),
            ("0.5", ms(500)),
            ("500ms", ms(500)),
            ("1m 30s", ms(90_000)),
            ("2s", ms(2000)),
        ] {
            assert_eq!(duration(text), Ok(expected), "{text}");
        }
        for text in ["", ".", "1.2.3", "-1", "soon", "1e3", "999999999999999999999999", "inf"] {
            assert!(duration(text).is_err_and(|e| e.contains("500ms")), "{text}");
        }
    }
}

//! Completions for a shell: commands, options, names of subscribers, reasons, and other values of
//! short lists.
//!
//! The shell's script runs this program with a variable in the environment, so names are those of
//! the configuration at that moment. Only its files are read: no daemon and no broker is asked, and
//! mistakes in them are ignored.

use std::{ffi::OsString, io, path::PathBuf};

use clap_complete::{
    CompleteEnv, Shell,
    engine::{ArgValueCandidates, CompletionCandidate},
    env::Shells,
};

use crate::config;

/// The variable that a shell's script sets to the shell's name. The usual `COMPLETE` could be set
/// for another program.
const VARIABLE: &str = "HOOKTRAIL_COMPLETE";

const PROGRAM: &str = "hooktrail";

/// Answers a shell that asks for completions of `command`; false if none asks.
pub(super) fn answered(command: impl Fn() -> clap::Command) -> Result<bool, String> {
    let env = CompleteEnv::with_factory(command).var(VARIABLE).bin(PROGRAM).completer(PROGRAM);
    let folder = std::env::current_dir().ok();
    env.try_complete(std::env::args_os(), folder.as_deref()).map_err(|e| e.to_string())
}

/// The script with which a shell asks for completions.
pub(super) fn script(shell: Shell) -> io::Result<Vec<u8>> {
    let mut script = Vec::new();
    let known = Shells::builtins();
    let asks = known
        .completer(&shell.to_string())
        .ok_or_else(|| io::Error::other(format!("{shell} is not known")))?;
    asks.write_registration(VARIABLE, PROGRAM, PROGRAM, PROGRAM, &mut script)?;
    if shell == Shell::Zsh {
        // As a file in `fpath` it runs at the first completion, and must answer that one.
        script.extend_from_slice(
            b"[[ $funcstack[1] == _hooktrail ]] && _clap_dynamic_completer_hooktrail\n",
        );
    }
    Ok(script)
}

/// Completes an argument that is a subscriber's name.
pub(super) fn subscribers() -> ArgValueCandidates {
    ArgValueCandidates::new(|| {
        let words: Vec<OsString> =
            std::env::args_os().skip_while(|word| word != "--").skip(1).collect();
        config::names_of(&configuration(&words, std::env::var_os("HOME")))
            .into_iter()
            .map(|name| CompletionCandidate::new(name.as_str()))
            .collect()
    })
}

/// The configuration that a command with these words would read. A completer gets the words as they
/// were typed, so `~` at the begin of a word is replaced by `home`.
fn configuration(words: &[OsString], home: Option<OsString>) -> PathBuf {
    let expanded =
        |word: &OsString| match (word.to_str().and_then(|word| word.strip_prefix("~/")), &home) {
            (Some(rest), Some(home)) => PathBuf::from(home).join(rest),
            _ => word.into(),
        };
    let named = words.iter().enumerate().find_map(|(n, word)| match word.to_str()? {
        "--config" | "-c" => words.get(n + 1).map(expanded),
        word => word
            .strip_prefix("--config=")
            .or_else(|| word.strip_prefix("-c").filter(|_| !word.starts_with("--")))
            .map(PathBuf::from),
    });
    let by_environment =
        || std::env::var_os("HOOKTRAIL_CONFIG").filter(|path| !path.is_empty()).map(PathBuf::from);
    named.or_else(by_environment).unwrap_or_else(|| config::DEFAULT_PATH.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configuration_is_the_one_that_the_words_name() {
        for (words, path) in [
            (&["hooktrail", "--config", "a.toml", "status"][..], "a.toml"),
            (&["hooktrail", "status", "--config=b.toml"], "b.toml"),
            (&["hooktrail", "-c", "c.toml"], "c.toml"),
            (&["hooktrail", "-cd.toml", "pause"], "d.toml"),
            (&["hooktrail", "--config", "~/e.toml"], "/home/e/e.toml"),
            (&["hooktrail", "-c", "~/f/f.toml", "pause"], "/home/e/f/f.toml"),
            (&["hooktrail", "-c", "~other/f.toml"], "~other/f.toml"),
            // No shell expands `~` there.
            (&["hooktrail", "--config=~/g.toml"], "~/g.toml"),
        ] {
            let words: Vec<OsString> = words.iter().map(OsString::from).collect();
            assert_eq!(configuration(&words, Some("/home/e".into())), PathBuf::from(path));
        }
    }
}

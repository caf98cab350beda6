//! `man`: the manual page for packages, made from the definitions of `--help`.

use std::io::Write as _;

use super::failed::Failed;

pub(super) fn run(command: clap::Command) -> Result<(), Failed> {
    Ok(std::io::stdout().write_all(&page(command)?)?)
}

/// The program, then each command with its options.
fn page(command: clap::Command) -> std::io::Result<Vec<u8>> {
    let mut out = Vec::new();
    let mut command = command.name("hooktrail");
    command.build();
    clap_mangen::Man::new(command.clone()).render(&mut out)?;
    commands(&command, "hooktrail", &mut out)?;
    Ok(out)
}

fn commands(of: &clap::Command, path: &str, out: &mut Vec<u8>) -> std::io::Result<()> {
    for command in of.get_subcommands().filter(|c| !c.is_hide_set() && c.get_name() != "help") {
        let path = format!("{path} {}", command.get_name());
        let help =
            command.clone().disable_help_flag(true).term_width(72).render_long_help().to_string();
        writeln!(out, ".SH \"{}\"\n.nf", path.to_uppercase())?;
        for line in help.lines() {
            // A line that begins with a dot or a quote would be a request of the formatter; `\\&`
            // is nothing.
            writeln!(out, "\\&{}", line.replace('\\', "\\e").replace('-', "\\-"))?;
        }
        writeln!(out, ".fi")?;
        commands(command, &path, out)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn the_page_has_every_command_and_no_line_that_the_formatter_takes_for_its_own() {
        let page =
            String::from_utf8(page(crate::cli::Cli::command()).expect("a page")).expect("text");
        for part in [
            ".TH hooktrail 1",
            ".SH \"HOOKTRAIL DEAD REPLAY\"",
            ".SH \"HOOKTRAIL PAUSE\"",
            "\\-\\-rate",
        ] {
            assert!(page.contains(part), "{part} is not in the page");
        }
        assert!(!page.contains("HOOKTRAIL MAN"));
        let body = page.split(".SH \"HOOKTRAIL RUN\"").nth(1).expect("a section");
        let requests = body.lines().filter(|l| !l.starts_with("\\&"));
        assert!(
            requests
                .clone()
                .all(|l| l.is_empty() || l == ".nf" || l == ".fi" || l.starts_with(".SH ")),
            "{:?}",
            requests.collect::<Vec<_>>()
        );
    }
}

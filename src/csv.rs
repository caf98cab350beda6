//! Comma-separated values (RFC 4180) in which no spreadsheet finds a formula.

/// A line of cells, with its end.
pub fn line<T: AsRef<str>>(cells: impl IntoIterator<Item = T>) -> String {
    let mut out = String::new();
    for (n, text) in cells.into_iter().enumerate() {
        if n > 0 {
            out.push(',');
        }
        push(text.as_ref(), &mut out);
    }
    out.push_str("\r\n");
    out
}

/// Appends a cell. A text that a spreadsheet would run as a formula begins with an apostrophe
/// instead; signs of full width count as their narrow ones in some spreadsheets.
fn push(text: &str, out: &mut String) {
    const RUNS: [char; 11] = ['=', '+', '-', '@', '\t', '\r', '\n', '＝', '＋', '－', '＠'];
    // A blank or an unseen character before the sign may be dropped when the file is opened.
    let is_skipped = |c: char| c == ' ' || c == '\u{a0}' || c == '\u{feff}' || c == '\0';
    let runs = text.starts_with(RUNS) || text.trim_start_matches(is_skipped).starts_with(RUNS);
    let is_quoted = runs || text.contains([',', '"', '\r', '\n', ';', '\'', '\t']);
    if is_quoted {
        out.push('"');
    }
    if runs {
        out.push('\'');
    }
    for c in text.chars() {
        match c {
            '"' => out.push_str("\"\""),
            // It ends the text in some programs.
            '\0' => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    if is_quoted {
        out.push('"');
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn cell(text: &str) -> String {
        line([text]).trim_end_matches("\r\n").to_owned()
    }

    #[test]
    fn a_cell_runs_in_no_spreadsheet_and_ends_no_line() {
        for (text, expected) in [
            ("plain", "plain"),
            ("", ""),
            ("=1+1", "\"'=1+1\""),
            ("+1", "\"'+1\""),
            ("-1", "\"'-1\""),
            ("@SUM(A1)", "\"'@SUM(A1)\""),
            ("\t=1", "\"'\t=1\""),
            ("\r=1", "\"'\r=1\""),
            (" =1", "\"' =1\""),
            ("\u{feff}=1", "\"'\u{feff}=1\""),
            ("\0=1", "\"'\u{fffd}=1\""),
            ("＝1", "\"'＝1\""),
            ("=1\",=2", "\"'=1\"\",=2\""),
            ("a,b", "\"a,b\""),
            ("a;b", "\"a;b\""),
            ("a\"b", "\"a\"\"b\""),
            ("a\r\nb", "\"a\r\nb\""),
            ("1=1", "1=1"),
        ] {
            assert_eq!(cell(text), expected, "{text:?}");
        }
        assert_eq!(line(["a", "", "b,c"]), "a,,\"b,c\"\r\n");
    }

    /// Reads a line as RFC 4180 has it.
    fn read(line: &str) -> Vec<String> {
        let (mut cells, mut cell, mut is_quoted) = (Vec::new(), String::new(), false);
        let mut chars = line.strip_suffix("\r\n").expect("an end").chars().peekable();
        while let Some(c) = chars.next() {
            match c {
                '"' if is_quoted && chars.peek() == Some(&'"') => cell.extend(chars.next()),
                '"' => is_quoted = !is_quoted,
                ',' if !is_quoted => cells.push(std::mem::take(&mut cell)),
                c => cell.push(c),
            }
        }
        cells.push(cell);
        cells
    }

    proptest! {
        #[test]
        fn whatever_the_texts_are_the_line_has_them_and_no_formula(
            texts in proptest::collection::vec("[-=+@\t\r\n,;\"'＝ \0a-c\\PC]{0,8}", 1..6)
        ) {
            let cells = read(&line(&texts));
            prop_assert_eq!(cells.len(), texts.len());
            for (cell, text) in cells.iter().zip(&texts) {
                prop_assert!(!cell.starts_with(['=', '+', '-', '@', '\t', '\r', '\n', '＝']), "{:?}", cell);
                let text = text.replace('\0', "\u{fffd}");
                prop_assert!(*cell == text || *cell == format!("'{text}"), "{:?} {:?}", cell, text);
            }
        }
    }
}

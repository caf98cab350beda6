//! Suggestions for mistyped words.

/// The number of letters by which they differ, if `text` can be `word` mistyped.
pub(crate) fn nearness(text: &str, word: &str) -> Option<usize> {
    let is_near = |letters: &usize| *letters <= 2;
    (text.len().abs_diff(word.len()) <= 2).then(|| distance(word, text)).filter(is_near)
}

/// The Levenshtein distance.
pub(super) fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.iter().enumerate() {
            let substitute = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = substitute.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_distance_is_levenshteins() {
        for (a, b, d) in [
            ("", "abc", 3),
            ("kitten", "sitting", 3),
            ("timeout", "timeout", 0),
            ("time_out", "timeout", 1),
        ] {
            assert_eq!(distance(a, b), d);
        }
    }
}

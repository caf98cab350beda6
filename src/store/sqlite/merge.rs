//! The subscribers of the store and those of its copy, made one set.

use super::sealed::{Rows, SealedRow};
use crate::crypto::seal::SealKeys;

/// The rows of the store and of its copy together.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Merged {
    pub(super) rows: Rows,
    /// Those that the store has to get from the copy.
    pub(super) put_back: Vec<SealedRow>,
    /// Subscribers that the store lacked.
    pub(super) lost: Vec<String>,
    /// Subscribers of which the store had an older version.
    pub(super) older: Vec<String>,
    /// Deleted subscribers that the store still had.
    pub(super) undead: Vec<String>,
}

/// Takes the later row of each name; of two with the same version the one that can be opened.
pub(super) fn merge(stored: Rows, copied: &Rows, keys: &SealKeys) -> Merged {
    let mut merged = Merged { rows: stored, ..Merged::default() };
    for (name, copy) in copied {
        let row = merged.rows.get(name);
        let is_open = |row: &SealedRow| row.open(keys).is_none_or(|opened| opened.is_ok());
        let wins = row.is_none_or(|row| {
            row.version < copy.version
                || (row.version == copy.version && !is_open(row) && is_open(copy))
        });
        if !wins {
            continue;
        }
        let is_kept = row.is_some_and(|row| row.sealed.is_some());
        match (is_kept, copy.sealed.is_some()) {
            (false, true) => merged.lost.push(name.clone()),
            (true, true) if row.is_some_and(|row| row.version < copy.version) => {
                merged.older.push(name.clone());
            }
            (true, false) => merged.undead.push(name.clone()),
            (true, true) | (false, false) => {}
        }
        merged.put_back.push(copy.clone());
        merged.rows.insert(name.clone(), copy.clone());
    }
    merged
}

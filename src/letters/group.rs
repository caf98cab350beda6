//! Dead letters that are replayed or purged together.

/// The most letters, and the most bytes, that are replayed together, with one confirm for all.
pub const GROUP_LETTERS: usize = 50;
const GROUP_BYTES: usize = 4 * 1024 * 1024;

/// Collects letters that are settled together: large ones one at a time, small ones many at once.
pub(super) struct Group<T> {
    pub(super) items: Vec<T>,
    bytes: usize,
    pub(super) most: usize,
}

impl<T> Group<T> {
    pub(super) fn new(most: usize) -> Self {
        Self { items: Vec::new(), bytes: 0, most }
    }

    /// Adds an item; returns the full group before it, if it does not fit into that.
    pub(super) fn push(&mut self, item: T, bytes: usize) -> Option<Vec<T>> {
        let full = self.items.len() == self.most || self.bytes + bytes > GROUP_BYTES;
        let before = if full { self.take() } else { Vec::new() };
        self.items.push(item);
        self.bytes += bytes;
        (!before.is_empty()).then_some(before)
    }

    pub(super) fn take(&mut self) -> Vec<T> {
        self.bytes = 0;
        std::mem::take(&mut self.items)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_is_as_large_as_its_letters_or_bytes_allow_and_a_letter_is_never_too_large() {
        let groups = |sizes: &[usize]| {
            let mut group = Group::new(GROUP_LETTERS);
            let mut all: Vec<Vec<usize>> =
                sizes.iter().filter_map(|bytes| group.push(*bytes, *bytes)).collect();
            all.push(group.take());
            all.iter().map(Vec::len).collect::<Vec<_>>()
        };
        let mib = 1024 * 1024;
        assert_eq!(groups(&[1000; 120]), [50, 50, 20]);
        assert_eq!(groups(&[mib; 9]), [4, 4, 1]);
        assert_eq!(groups(&[12 * mib; 3]), [1, 1, 1]);
        assert_eq!(groups(&[1, 12 * mib, 1, 1]), [1, 1, 2]);
    }
}

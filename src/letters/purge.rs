//! Deletes dead letters for good.

use std::fmt;

use super::{
    choice::{Choice, Selection},
    group::{GROUP_LETTERS, Group},
    walk::{Done, Stop, Watcher, close},
};
use crate::queue::{DeadLetters, Held, QueueError};

/// A purge of the chosen letters, the oldest first.
pub struct Purge<'s, S, W> {
    choice: Choice<'s>,
    stop: &'s S,
    watcher: W,
    dry_run: bool,
    most: usize,
    purged: usize,
}

impl<S, W> fmt::Debug for Purge<'_, S, W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Purge").field("choice", &self.choice).finish_non_exhaustive()
    }
}

impl<'s, S: Stop, W: Watcher> Purge<'s, S, W> {
    pub fn new(selection: &'s Selection, stop: &'s S, watcher: W) -> Self {
        let (choice, most) = (Choice::new(selection), usize::MAX);
        Self { choice, stop, watcher, dry_run: false, most, purged: 0 }
    }

    /// Only counts.
    pub fn dry_run(mut self, dry_run: bool) -> Self {
        self.dry_run = dry_run;
        self
    }

    /// Deletes at most so many: letters that died after a count were not confirmed.
    pub fn at_most(mut self, most: usize) -> Self {
        self.most = most;
        self
    }

    /// # Errors
    /// The queue was lost; [`purged`](Self::purged) says how many were deleted before, at least.
    pub async fn run(&mut self, mut letters: impl DeadLetters) -> Result<Done, QueueError> {
        let walked = self.walk(&mut letters).await;
        close(letters, walked).await?;
        let (passed, latest) = (self.choice.number, self.choice.latest);
        Ok(Done { letters: self.purged, skipped: 0, passed, latest })
    }

    /// The number of letters that were deleted so far.
    pub fn purged(&self) -> usize {
        self.purged
    }

    /// The choice so far, which knows what was not found.
    pub fn choice(&self) -> &Choice<'s> {
        &self.choice
    }

    async fn walk(&mut self, letters: &mut impl DeadLetters) -> Result<(), QueueError> {
        let mut group = Group::new(GROUP_LETTERS);
        while !self.stop.is_asked()
            && self.purged + group.items.len() < self.most
            && let Some(held) = letters.next().await?
        {
            self.watcher.passed();
            if !self.choice.includes(&held) {
                continue;
            }
            if self.dry_run {
                self.purged += 1;
                continue;
            }
            let bytes = held.letter.body.len();
            if let Some(full) = group.push(held, bytes) {
                self.delete(letters, full).await?;
            }
        }
        self.delete(letters, group.take()).await
    }

    async fn delete(
        &mut self,
        letters: &mut impl DeadLetters,
        group: Vec<Held>,
    ) -> Result<(), QueueError> {
        if group.is_empty() {
            return Ok(());
        }
        let count = group.len();
        letters.purge(group).await?;
        self.purged += count;
        Ok(())
    }
}

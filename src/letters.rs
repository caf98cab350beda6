//! Dead letters as operators work on them: chosen by name and filter, counted, replayed, purged.
//!
//! Commands and the daemon do it in the same way: one walk from the oldest letter on, which settles a
//! group at a time and leaves the others in their order. They differ in who may end it early
//! ([`Stop`]), and in who is told of its steps ([`Watcher`]).

mod choice;
mod group;
mod key;
mod purge;
mod replay;
mod walk;

pub use self::{
    choice::{Choice, Filters, Name, Selection, Statuses},
    group::GROUP_LETTERS,
    key::Key,
    purge::Purge,
    replay::Replay,
    walk::{Done, Staying, Stop, Watcher, close, each},
};

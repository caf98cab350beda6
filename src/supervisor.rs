//! The daemon around the lanes: start, reload, restart after a panic, drain.

pub mod fleet;
pub mod managed;
pub mod reload;
pub mod signal;
pub mod startup_check;
pub mod systemd;

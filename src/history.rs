//! History: what fills the store, and what answers from it.

pub mod deliveries;
pub mod whereabouts;

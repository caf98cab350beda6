//! Decisions without I/O. Time and randomness are arguments, so that each can be tested without
//! waiting.

pub mod address;
pub mod answer;
pub mod batching;
pub mod circuit_breaker;
pub mod rate;
pub mod retry;
pub mod turn;
pub mod verdict;

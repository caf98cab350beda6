pub mod address;
pub mod batch;
pub mod circuit_breaker;
pub mod event;
pub mod payload;
pub mod retry;
pub mod secret;
pub mod signature;

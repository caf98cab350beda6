//! Secrets, what seals them, signatures and certificates.

pub mod seal;
pub mod secret;
pub mod signature;
pub mod tls;

pub mod handshake;

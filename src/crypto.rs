//! Secrets, signatures and certificates.

pub mod secret;
pub mod signature;
pub mod tls;

pub mod handshake;

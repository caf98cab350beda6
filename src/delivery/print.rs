//! Prints: how a history recognises an event in a batch.

use std::sync::Arc;

use sha2::{Digest as _, Sha256};

/// The first 8 bytes of the SHA-256 of an event's published bytes.
///
/// Two events with the same bytes have the same print. Of a million different events two share one
/// with a probability of 3 in 10^8.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Print([u8; 8]);

impl Print {
    /// Bytes of a print.
    pub const LEN: usize = 8;

    pub fn of(event: &[u8]) -> Self {
        let digest = Sha256::digest(event);
        let mut print = [0; Self::LEN];
        print.copy_from_slice(&digest[..Self::LEN]);
        Self(print)
    }

    pub const fn from_bytes(bytes: [u8; Self::LEN]) -> Self {
        Self(bytes)
    }

    pub const fn as_bytes(&self) -> &[u8; Self::LEN] {
        &self.0
    }
}

/// The prints of a batch's events in their order; `None` if they are not known.
pub type Prints = Option<Arc<[Print]>>;

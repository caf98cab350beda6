//! A new signing secret.

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};

/// `whsec_` and the base64 of 32 random bytes.
pub(super) fn new_secret() -> String {
    format!("whsec_{}", BASE64.encode(rand::random::<[u8; 32]>()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crypto::{secret::Secret, signature};

    #[test]
    fn a_new_secret_is_one_for_standard_webhooks() {
        let (a, b) = (new_secret(), new_secret());
        assert_ne!(a, b);
        assert_eq!(signature::standard_key(&Secret::new(a)).expect("valid").len(), 32);
    }
}

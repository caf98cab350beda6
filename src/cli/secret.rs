//! A new signing secret, and a new token of the admin API.

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};

pub(super) use crate::crypto::signature::new_secret;

/// `hooktrail_` and 32 random bytes: scanners for secrets can find it by its beginning.
pub(super) fn new_token() -> String {
    format!("hooktrail_{}", URL_SAFE_NO_PAD.encode(rand::random::<[u8; 32]>()))
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

    #[test]
    fn a_new_token_is_safe_in_a_header_and_in_a_configuration() {
        let (a, b) = (new_token(), new_token());
        assert!(a != b && a.len() == 53, "{a}");
        assert!(a.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_')), "{a}");
    }
}

//! The proof that a command and a daemon know the same `admin.token`, before either sends it.
//!
//! The command proves it first: a process without the token gets no proof from a daemon, from which
//! it could guess the token. The daemon proves it in its answer: a process that took its port gets
//! no token. Each proof is an HMAC-SHA256 (RFC 2104) over the side, the command's challenge and the
//! port, keyed with the token. With the port in it, a proof of another daemon cannot be passed on.

use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::Sha256;

use crate::crypto::secret::Secret;

/// The headers of a command's request.
pub const CHALLENGE: &str = "x-hooktrail-challenge";
pub const PROOF: &str = "x-hooktrail-proof";

/// The longest challenge that is answered, in bytes.
const MAX_CHALLENGE: usize = 128;

/// The side that proves it: one side's proof is not valid for the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    Command,
    Daemon,
}

/// A new random challenge.
pub fn challenge() -> String {
    hex(&rand::random::<[u8; 32]>())
}

/// The proof that `side` sends, in lowercase hexadecimal digits. `port` is the daemon's.
pub fn proof(token: &Secret, side: Side, challenge: &str, port: u16) -> String {
    hex(&mac(token, side, challenge, port).finalize().into_bytes())
}

/// Whether `given` proves knowledge of the token; compared in constant time. An empty challenge, or
/// one longer than those of [`challenge`], proves nothing.
pub fn is_proven(token: &Secret, side: Side, challenge: &str, port: u16, given: &str) -> bool {
    let bytes: Option<Vec<u8>> =
        given.is_ascii().then(|| given.as_bytes().chunks(2).map(byte).collect()).flatten();
    let sound = (1..=MAX_CHALLENGE).contains(&challenge.len());
    sound
        && bytes.is_some_and(|given| mac(token, side, challenge, port).verify_slice(&given).is_ok())
}

fn mac(token: &Secret, side: Side, challenge: &str, port: u16) -> Hmac<Sha256> {
    let mut mac = Hmac::<Sha256>::new_from_slice(token.expose().as_bytes())
        .expect("HMAC takes a key of any length");
    let side = match side {
        Side::Command => "command",
        Side::Daemon => "daemon",
    };
    // No header contains a line break, so two different inputs never give the same text.
    mac.update(format!("hooktrail {side}\n{port}\n{challenge}").as_bytes());
    mac
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn byte(digits: &[u8]) -> Option<u8> {
    u8::from_str_radix(std::str::from_utf8(digits).ok().filter(|d| d.len() == 2)?, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_proof_is_of_one_token_one_side_one_challenge_and_one_port() {
        let (token, other) = (Secret::new("hunter2"), Secret::new("hunter3"));
        let fresh = challenge();
        assert_ne!(fresh, challenge());
        let given = proof(&token, Side::Daemon, &fresh, 8787);
        assert!(is_proven(&token, Side::Daemon, &fresh, 8787, &given));
        assert!(!is_proven(&other, Side::Daemon, &fresh, 8787, &given));
        assert!(!is_proven(&token, Side::Command, &fresh, 8787, &given));
        assert!(!is_proven(&token, Side::Daemon, &challenge(), 8787, &given));
        assert!(!is_proven(&token, Side::Daemon, &fresh, 8788, &given));
        for nonsense in ["", "é", "0", &given[1..], &format!("{given}00"), "hunter2"] {
            assert!(!is_proven(&token, Side::Daemon, &fresh, 8787, nonsense), "{nonsense}");
        }
        for bad in [String::new(), "x".repeat(MAX_CHALLENGE + 1)] {
            assert!(!is_proven(
                &token,
                Side::Daemon,
                &bad,
                8787,
                &proof(&token, Side::Daemon, &bad, 8787)
            ));
        }
    }
}

//! Sealing: a text is encrypted, and bound to what it belongs to.
//!
//! AES-256-GCM, with a random nonce in front of each sealed text. The cipher's key and the id by which
//! a sealed text names it are derived from the configured key, so that neither tells the other.

use std::fmt;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use hkdf::Hkdf;
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use sha2::Sha256;

use super::secret::Secret;

/// Bytes of a key.
const KEY: usize = 32;

/// Bytes of the id of a key.
const ID: usize = 8;

/// A key that seals. It does not print itself.
#[derive(Clone, PartialEq, Eq)]
pub struct SealKey([u8; KEY]);

impl SealKey {
    /// Reads a key as it is written: 32 bytes in base64.
    ///
    /// # Errors
    /// It is none; the text is not quoted.
    pub fn try_new(text: &Secret) -> Result<Self, String> {
        let bytes = STANDARD.decode(text.expose().trim()).ok();
        let key = bytes.and_then(|bytes| <[u8; KEY]>::try_from(bytes).ok()).map(Self);
        key.ok_or_else(|| {
            "must be 32 bytes in base64, such as those of `openssl rand -base64 32`".to_owned()
        })
    }

    /// The key of 32 random bytes.
    pub const fn of(random: [u8; KEY]) -> Self {
        Self(random)
    }

    /// The key as it is written.
    pub fn text(&self) -> Secret {
        Secret::new(STANDARD.encode(self.0))
    }

    /// Names the key without telling anything of it.
    pub fn id(&self) -> String {
        let id: [u8; ID] = self.derive(b"hooktrail store key id");
        id.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    fn cipher(&self) -> LessSafeKey {
        let key: [u8; KEY] = self.derive(b"hooktrail store key aes-256-gcm");
        LessSafeKey::new(UnboundKey::new(&AES_256_GCM, &key).expect("a key of the right length"))
    }

    fn derive<const N: usize>(&self, purpose: &[u8]) -> [u8; N] {
        let mut derived = [0; N];
        Hkdf::<Sha256>::new(None, &self.0)
            .expand(purpose, &mut derived)
            .expect("less than HKDF can give");
        derived
    }
}

impl fmt::Debug for SealKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SealKey({})", self.id())
    }
}

/// A sealed text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sealed {
    /// The id of its key.
    pub key: String,
    /// Nonce, ciphertext and tag.
    pub bytes: Vec<u8>,
}

/// Why a sealed text cannot be opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unopened {
    /// No key has the id that it names.
    NoKey,
    /// It is damaged, or belongs to something else.
    Damaged,
}

/// Keys: the first seals, all open.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SealKeys(Vec<SealKey>);

impl SealKeys {
    pub const fn new(keys: Vec<SealKey>) -> Self {
        Self(keys)
    }

    /// The key that seals; `None` if there is none.
    pub fn first(&self) -> Option<&SealKey> {
        self.0.first()
    }

    /// Seals a text that belongs to `what`; `None` without a key. A nonce must be random, and is used
    /// once.
    pub fn seal(&self, text: &Secret, what: &[u8], nonce: [u8; NONCE_LEN]) -> Option<Sealed> {
        let key = self.first()?;
        let mut sealed = text.expose().as_bytes().to_vec();
        key.cipher()
            .seal_in_place_append_tag(
                Nonce::assume_unique_for_key(nonce),
                Aad::from(what),
                &mut sealed,
            )
            .expect("less than the cipher can take");
        Some(Sealed { key: key.id(), bytes: [&nonce, &*sealed].concat() })
    }

    /// Opens what was sealed for `what`.
    ///
    /// # Errors
    /// Its key is not there, or it is damaged.
    pub fn open(&self, sealed: &Sealed, what: &[u8]) -> Result<Secret, Unopened> {
        let key = self.0.iter().find(|key| key.id() == sealed.key).ok_or(Unopened::NoKey)?;
        let (nonce, text) = sealed.bytes.split_first_chunk().ok_or(Unopened::Damaged)?;
        let mut text = text.to_vec();
        let opened = key.cipher().open_in_place(
            Nonce::assume_unique_for_key(*nonce),
            Aad::from(what),
            &mut text,
        );
        let opened = opened.map_err(|_| Unopened::Damaged)?;
        std::str::from_utf8(opened).map(Secret::new).map_err(|_| Unopened::Damaged)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(n: u8) -> SealKey {
        SealKey::of([n; KEY])
    }

    #[test]
    fn a_sealed_text_opens_with_its_key_and_for_what_it_belongs_to_alone() {
        let keys = SealKeys::new(vec![key(2), key(1)]);
        let text = Secret::new("https://example.com/hook/TOKEN");
        let sealed = keys.seal(&text, b"a 1", [7; NONCE_LEN]).expect("a key");
        assert_eq!(keys.open(&sealed, b"a 1"), Ok(text));
        assert_eq!(sealed.key, key(2).id(), "the first one seals");
        assert!(!String::from_utf8_lossy(&sealed.bytes).contains("TOKEN"));
        assert_eq!(keys.open(&sealed, b"a 2"), Err(Unopened::Damaged));
        assert_eq!(SealKeys::new(vec![key(1)]).open(&sealed, b"a 1"), Err(Unopened::NoKey));
        for at in 0..sealed.bytes.len() {
            let mut damaged = sealed.clone();
            damaged.bytes[at] ^= 1;
            assert_eq!(keys.open(&damaged, b"a 1"), Err(Unopened::Damaged), "byte {at}");
        }
        for short in [0, 5, NONCE_LEN, NONCE_LEN + 3] {
            let cut = Sealed { bytes: sealed.bytes[..short].to_vec(), ..sealed.clone() };
            assert_eq!(keys.open(&cut, b"a 1"), Err(Unopened::Damaged));
        }
        // The key under another one's id.
        let renamed = Sealed { key: key(1).id(), ..sealed };
        assert_eq!(keys.open(&renamed, b"a 1"), Err(Unopened::Damaged));
        assert_eq!(SealKeys::default().seal(&Secret::new(""), b"", [0; NONCE_LEN]), None);
    }

    #[test]
    fn a_key_is_read_as_it_is_written_and_never_printed() {
        let text = key(9).text();
        assert_eq!(SealKey::try_new(&text), Ok(key(9)));
        assert_eq!(SealKey::try_new(&Secret::new(format!("{}\n", text.expose()))), Ok(key(9)));
        for wrong in ["", "short", "CQkJ", &format!("{}A", text.expose())] {
            let refused = SealKey::try_new(&Secret::new(wrong)).expect_err("is none");
            assert!(refused.contains("32 bytes in base64"), "{refused}");
        }
        let printed = format!("{:?} {:?}", key(9), SealKeys::new(vec![key(9)]));
        assert!(!printed.contains(text.expose()) && !printed.contains("9, 9"), "{printed}");
    }
}

//! A new signing secret, and a new token of the admin API.

use std::{
    io::Read as _,
    path::{Path, PathBuf},
};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};

pub(super) use crate::crypto::signature::new_secret;
use crate::{
    cli::failed::Failed,
    crypto::{
        secret::Secret,
        signature::{SigningKey, new_signing_key},
    },
};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Make a key of Ed25519 instead, whsk_…, for `signing_key`
    #[arg(long, conflicts_with = "public")]
    ed25519: bool,
    /// Print the public half of the key in this file, which receivers verify with; `-` is standard
    /// input
    #[arg(long, value_name = "FILE", num_args = 0..=1, default_missing_value = "-", value_hint = clap::ValueHint::FilePath)]
    public: Option<PathBuf>,
}

pub(super) fn run(args: &Args) -> Result<(), Failed> {
    let text = match &args.public {
        Some(file) => public_of(file)?,
        None if args.ed25519 => new_signing_key(),
        None => new_secret(),
    };
    println!("{text}");
    Ok(())
}

fn public_of(file: &Path) -> Result<String, Failed> {
    let (mut text, name) = (String::new(), file.display());
    let read = if file == Path::new("-") {
        std::io::stdin().take(MAX_FILE).read_to_string(&mut text)
    } else {
        std::fs::File::open(file).and_then(|f| f.take(MAX_FILE).read_to_string(&mut text))
    };
    read.map_err(|e| Failed::Usage(format!("{name} cannot be read: {e}")))?;
    let key = SigningKey::parse(&Secret::new(text.trim()));
    let key = key.map_err(|why| {
        Failed::Usage(format!("the key in {name} {why}; `hooktrail secret --ed25519` makes one"))
    })?;
    Ok(key.public())
}

/// The most bytes of a file with a key.
const MAX_FILE: u64 = 64 * 1024;

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

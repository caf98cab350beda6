//! The keys that seal subscribers: those of the configuration, or one in a file next to the store.

use std::{
    fs::File,
    io::{ErrorKind, Write as _},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use super::{
    copy,
    schema::{KEY_FILE, PART},
};
use crate::{
    clock,
    crypto::{
        seal::{SealKey, SealKeys},
        secret::Secret,
    },
    sqlite::{self, with_suffix},
    store::StoreError,
};

/// Where the keys are.
#[derive(Debug, Clone)]
pub(super) struct Keyring {
    /// Those of the configuration.
    configured: SealKeys,
    file: PathBuf,
}

impl Keyring {
    pub(super) fn new(configured: SealKeys, data_dir: &Path) -> Self {
        Self { configured, file: data_dir.join(KEY_FILE) }
    }

    /// Where a missing key belongs, for a message.
    pub(super) fn place(&self) -> String {
        match self.configured.first() {
            Some(_) => "[store] keys".to_owned(),
            None => format!("`{}`", self.file.display()),
        }
    }

    /// The keys; none if there is no file yet. Blocks its thread.
    ///
    /// # Errors
    /// The file cannot be read, others may read it, or it holds no key.
    pub(super) fn read(&self) -> Result<SealKeys, StoreError> {
        if self.configured.first().is_some() {
            return Ok(self.configured.clone());
        }
        let file = self.file.display();
        let denied = |e: &std::io::Error| {
            StoreError::new(sqlite::denied(&format!("`{file}` cannot be read"), e).to_string())
        };
        let text = match std::fs::metadata(&self.file) {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(SealKeys::default()),
            Err(e) => return Err(denied(&e)),
            Ok(about) if about.mode() & 0o077 != 0 => {
                return Err(StoreError::new(format!(
                    "`{file}` may be read by others (mode {:o}), who could open what it seals; run `chmod 600 {file}`",
                    about.mode() & 0o777
                )));
            }
            Ok(_) => std::fs::read_to_string(&self.file).map_err(|e| denied(&e))?,
        };
        match SealKey::try_new(&Secret::new(text)) {
            Ok(key) => Ok(SealKeys::new(vec![key])),
            Err(why) => Err(StoreError::new(format!(
                "`{file}` holds no key: it {why}; put it back from a backup"
            ))),
        }
    }

    /// Removes what an interrupted making has left: a second name of the key, or half of one. No other
    /// process may make the file.
    pub(super) fn clean(&self) {
        copy::remove_part(&self.file);
    }

    /// Makes the file, whole or not at all. Blocks its thread.
    ///
    /// # Errors
    /// It cannot be made.
    pub(super) fn make(&self) -> Result<SealKeys, StoreError> {
        let made = self.write(&SealKey::of(clock::secret_bytes()));
        made.map_err(|e| {
            let what = format!("`{}` cannot be made", self.file.display());
            StoreError::new(sqlite::denied(&what, &e).to_string())
        })?;
        tracing::info!(
            file = %self.file.display(),
            "a key was made that seals the subscribers of the API: back it up apart from the store"
        );
        self.read()
    }

    fn write(&self, key: &SealKey) -> std::io::Result<()> {
        let part = with_suffix(&self.file, PART);
        match std::fs::remove_file(&part) {
            Err(e) if e.kind() != ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let mut file = File::options().create_new(true).write(true).mode(0o600).open(&part)?;
        writeln!(file, "{}", key.text().expose())?;
        file.sync_all()?;
        // Unlike a rename it replaces no key.
        std::fs::hard_link(&part, &self.file)?;
        std::fs::remove_file(&part)?;
        File::open(self.file.parent().unwrap_or(Path::new(".")))?.sync_all()
    }
}

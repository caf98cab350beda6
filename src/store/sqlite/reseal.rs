//! Seals all subscribers with another key.

use rusqlite::Connection;

use super::{
    kept::{Kept, blocking},
    open::{self, Precious, SqliteConfig},
    schema::STORE_FILE,
    sealed,
};
use crate::{
    clock,
    crypto::seal::SealKeys,
    sqlite::{self, Database},
    store::{KeptSubscribers, StoreError},
};

/// What came of sealing all subscribers again.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Resealed {
    /// The number of those that another key had sealed.
    pub resealed: usize,
    /// The number of those that the first key had sealed.
    pub were: usize,
    /// Those that cannot be opened.
    pub locked: Vec<String>,
    /// What else is wrong with them.
    pub problems: Vec<String>,
}

/// Seals all subscribers with the first key, in the store and in its copy; without a daemon.
///
/// # Errors
/// A daemon has the store, or it cannot be read or written, or there is no key.
pub async fn seal_again(config: &SqliteConfig) -> Result<Resealed, StoreError> {
    let path = config.data_dir.join(STORE_FILE);
    if !path.exists() {
        return Err(StoreError::new(format!("there is no store `{}`", path.display())));
    }
    let held = open::lock_store(&config.data_dir)?;
    let resealed = seal_locked(config).await;
    // Also if it has failed: the lock would say that a daemon was killed.
    if held.ended_well {
        held.ends_well();
    }
    resealed
}

async fn seal_locked(config: &SqliteConfig) -> Result<Resealed, StoreError> {
    let with = config.clone();
    let opened = blocking(move || Precious::open(&with)).await;
    let db = opened.map_err(|e| StoreError::new(e.to_string()))?.db;
    let resealed = Kept::new(config).seal_again(&db).await;
    db.close().await;
    resealed
}

impl Kept {
    async fn seal_again(&self, db: &Database) -> Result<Resealed, StoreError> {
        // First of all what one of the two lacks: the copy is written from the store below.
        let (KeptSubscribers { problems, .. }, in_step) =
            self.read_until(Ok(db.clone()), self.until()).await;
        if !in_step {
            let why =
                "the store and its copy cannot be brought into step, and nothing is sealed again";
            return Err(StoreError::new(format!("{why}: {}", problems.join("; "))));
        }
        let keyring = self.keyring.clone();
        let keys = blocking(move || keyring.read()).await?;
        if keys.first().is_none() {
            return Err(StoreError::new(format!("{} has no key", self.keyring.place())));
        }
        let failed = |e: sqlite::Error| StoreError::new(e.to_string());
        let seal = move |db: &Connection| seal_rows(db, &keys);
        let mut resealed = db.write(seal).await.map_err(failed)?;
        resealed.problems = problems;
        let rows = db.read(sealed::all).await.map_err(failed)?;
        let mut copy = self.copy.clone().lock_owned().await;
        let of = copy.path().display().to_string();
        blocking(move || copy.rewrite(rows.values())).await.map_err(|e| {
            StoreError::new(
                sqlite::denied(
                    &format!("`{of}` cannot be written; the old key is needed for it"),
                    &e,
                )
                .to_string(),
            )
        })?;
        Ok(resealed)
    }
}

fn seal_rows(db: &Connection, keys: &SealKeys) -> rusqlite::Result<Resealed> {
    let mut result = Resealed::default();
    for mut row in sealed::all(db)?.into_values().filter(|row| row.sealed.is_some()) {
        match row.seal_again(keys, clock::secret_bytes()) {
            Ok(true) => {
                sealed::write(db, &row)?;
                result.resealed += 1;
            }
            Ok(false) => result.were += 1,
            Err(_) => result.locked.push(row.name),
        }
    }
    Ok(result)
}

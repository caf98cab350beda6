//! The schema of a file: checked, and migrated to today's.
//!
//! No crate does this: `rusqlite_migration` fits rusqlite up to 0.40, and SQLite may be linked only
//! once; and it reads the version before it begins a transaction, so that two processes could
//! migrate a new file at once.

use std::{
    fs::File,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use rusqlite::{Connection, TransactionBehavior};

use super::error::{Error, Kind, denied};

/// The schema that a program expects of a file.
#[derive(Debug, Clone, Copy)]
pub struct Schema {
    /// Mark of the program's files (`PRAGMA application_id`).
    pub application_id: i32,
    /// Migrations, each by one version of the schema (`PRAGMA user_version`); the first from an
    /// empty file. Never changed once released.
    pub migrations: &'static [&'static str],
}

impl Schema {
    fn version(&self) -> u32 {
        u32::try_from(self.migrations.len()).unwrap_or(u32::MAX)
    }

    /// The version of a file's schema. The inner error: the file is not one of this program, or one
    /// of a later version.
    fn check(&self, db: &Connection, path: &Path) -> rusqlite::Result<Result<u32, Error>> {
        let version: u32 = db.pragma_query_value(None, "user_version", |row| row.get(0))?;
        let id: i32 = db.pragma_query_value(None, "application_id", |row| row.get(0))?;
        let is_empty: bool =
            db.query_row("SELECT NOT EXISTS (SELECT 1 FROM sqlite_master)", [], |row| row.get(0))?;
        if id != self.application_id && (version > 0 || id != 0 || !is_empty) {
            let text = format!(
                "`{}` is a database of another program; choose another [queue] data_dir",
                path.display()
            );
            return Ok(Err(Error::for_operator(Kind::Foreign, text)));
        }
        let known = self.version();
        if version > known {
            let text = format!(
                "`{}` was written by a later version of hooktrail (schema {version}; this one knows {known}); run that version, or a newer one",
                path.display()
            );
            return Ok(Err(Error::for_operator(Kind::Later, text)));
        }
        Ok(Ok(version))
    }

    /// Checks a file that this process may not migrate.
    pub(super) fn expect(
        &self,
        db: &Connection,
        path: &Path,
    ) -> rusqlite::Result<Result<(), Error>> {
        let known = self.version();
        Ok(self.check(db, path)?.and_then(|version| {
            if version == known {
                return Ok(());
            }
            Err(Error::for_operator(
                Kind::Earlier,
                format!(
                    "`{}` was written by an earlier version of hooktrail (schema {version}; this one knows {known}); start the daemon of this version once",
                    path.display()
                ),
            ))
        }))
    }

    /// Migrates a file, in one transaction.
    pub(super) fn migrate(
        &self,
        db: &mut Connection,
        path: &Path,
    ) -> rusqlite::Result<Result<(), Error>> {
        // For writing at once: two processes may open a new file together.
        let change = db.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let version = match self.check(&change, path)? {
            Ok(version) => version,
            Err(e) => return Ok(Err(e)),
        };
        if version < self.version() {
            for migration in &self.migrations[version as usize..] {
                change.execute_batch(migration)?;
            }
            change.pragma_update(None, "user_version", self.version())?;
            change.pragma_update(None, "application_id", self.application_id)?;
        }
        change.commit().map(Ok)
    }

    /// Copies a file that is about to be migrated, to `NAME.before-N`, where N is its version. The
    /// caller keeps other processes from migrating it meanwhile.
    pub(super) fn back_up(
        &self,
        db: &Connection,
        path: &Path,
    ) -> rusqlite::Result<Result<(), Error>> {
        let version = match self.check(db, path)? {
            Ok(version) if version > 0 && version < self.version() => version,
            Ok(_) => return Ok(Ok(())),
            Err(e) => return Ok(Err(e)),
        };
        let copy = with_suffix(path, &format!(".before-{version}"));
        let part = with_suffix(&copy, ".part");
        let Some(part_name) = part.to_str() else {
            let e = std::io::Error::other("its name is not UTF-8");
            return Ok(Err(uncopied(path, &copy, &e)));
        };
        // SQLite takes an empty file; others must not read the copy.
        let made = match std::fs::remove_file(&part) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e),
            _ => File::options().create_new(true).write(true).mode(0o600).open(&part),
        };
        let made = match made {
            Ok(file) => file,
            Err(e) => return Ok(Err(uncopied(path, &part, &e))),
        };
        db.execute("VACUUM INTO ?1", [part_name])?;
        let durable = made
            .sync_all()
            .and_then(|()| std::fs::rename(&part, &copy))
            .and_then(|()| File::open(copy.parent().unwrap_or(Path::new("."))))
            .and_then(|dir| dir.sync_all());
        Ok(durable.map_err(|e| uncopied(path, &copy, &e)))
    }
}

fn uncopied(path: &Path, copy: &Path, e: &std::io::Error) -> Error {
    let (path, copy) = (path.display(), copy.display());
    denied(&format!("`{path}` cannot be copied to `{copy}` before its schema is changed"), e)
}

/// A file next to another one, of the same name with an addition.
pub fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

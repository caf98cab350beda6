//! The copy of the sealed subscribers: what the daemon goes on with while the store is away, or lacks
//! some of them.
//!
//! A text file, a line for each change, the latest of a name last; rewritten when it has grown. Each
//! line begins with a checksum: a line that a power cut has torn is left out.

use std::{
    fs::File,
    io::{ErrorKind, Read as _, Seek as _, SeekFrom, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::{
    fault::{millis, time},
    schema::{self, ASIDE, COPY_FILE, PART},
    sealed::{Rows, SealedRow},
};
use crate::{crypto::seal::Sealed, sqlite::with_suffix, store::Stamp};

/// The first line.
const HEADER: &str = "hooktrail subscribers 1";

/// Hexadecimal digits of a checksum.
const DIGITS: usize = 16;

/// Bytes that the file may grow by before it is rewritten.
const GROWTH: u64 = 1 << 20;

/// A row as it is written.
#[derive(Serialize, Deserialize)]
struct Line {
    name: String,
    version: u64,
    key: Option<String>,
    sealed: Option<String>,
    created_at: i64,
    created_by: String,
    changed_at: i64,
    changed_by: String,
}

impl From<&SealedRow> for Line {
    fn from(row: &SealedRow) -> Self {
        Self {
            name: row.name.clone(),
            version: row.version,
            key: row.sealed.as_ref().map(|sealed| sealed.key.clone()),
            sealed: row.sealed.as_ref().map(|sealed| STANDARD.encode(&sealed.bytes)),
            created_at: millis(row.created.at),
            created_by: row.created.by.clone(),
            changed_at: millis(row.changed.at),
            changed_by: row.changed.by.clone(),
        }
    }
}

impl Line {
    fn row(self) -> Option<SealedRow> {
        let bytes = self.sealed.map(|text| STANDARD.decode(text).ok());
        let sealed = match (self.key, bytes) {
            (Some(key), Some(Some(bytes))) => Some(Sealed { key, bytes }),
            (None, None) => None,
            _ => return None,
        };
        Some(SealedRow {
            name: self.name,
            version: self.version,
            sealed,
            created: Stamp { at: time(self.created_at), by: self.created_by },
            changed: Stamp { at: time(self.changed_at), by: self.changed_by },
        })
    }
}

/// The rows of the file.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Contents {
    pub(super) rows: Rows,
    pub(super) is_there: bool,
    pub(super) lines: usize,
    /// Lines that cannot be read.
    pub(super) damaged: usize,
    /// Its last line is not whole: the process was ended while it was written. The store had it
    /// before.
    pub(super) is_torn: bool,
}

/// The file.
#[derive(Debug)]
pub(super) struct Copy {
    path: PathBuf,
    /// Its bytes when it was written whole, or read and sound; `None` before that.
    whole: Option<u64>,
}

impl Copy {
    pub(super) fn new(data_dir: &Path) -> Self {
        Self::at(data_dir.join(COPY_FILE))
    }

    pub(super) fn at(path: PathBuf) -> Self {
        Self { path, whole: None }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Reads it. A file that is missing is empty.
    ///
    /// # Errors
    /// It cannot be read.
    pub(super) fn read(&mut self) -> std::io::Result<Contents> {
        self.whole = None;
        let mut text = Vec::new();
        match File::open(&self.path) {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Contents::default()),
            opened => opened?.read_to_end(&mut text)?,
        };
        let mut contents = Contents { is_there: true, ..Contents::default() };
        let mut lines = text.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
        if lines.next() != Some(HEADER.as_bytes()) {
            contents.damaged += 1;
        }
        let mut lines = lines.peekable();
        while let Some(line) = lines.next() {
            contents.lines += 1;
            let Some(row) = read_line(line) else {
                if lines.peek().is_none() && text.last() != Some(&b'\n') {
                    contents.is_torn = true;
                } else {
                    contents.damaged += 1;
                }
                continue;
            };
            let known = contents.rows.get(&row.name);
            // A row that is sealed again has the version that it had.
            if known.is_none_or(|known| known.version <= row.version) {
                contents.rows.insert(row.name.clone(), row);
            }
        }
        let is_whole = contents.damaged == 0 && !contents.is_torn;
        self.whole = is_whole.then_some(text.len() as u64);
        Ok(contents)
    }

    /// Moves a damaged file away: it may have what nothing else has.
    ///
    /// # Errors
    /// It is where it was.
    pub(super) fn set_aside(&mut self) -> std::io::Result<PathBuf> {
        self.whole = None;
        let aside = schema::aside_path(&self.path);
        std::fs::rename(&self.path, &aside)?;
        Ok(aside)
    }

    /// The damaged files that were moved away and that nobody has removed.
    ///
    /// # Errors
    /// The directory cannot be read: it may have some.
    pub(super) fn aside(&self) -> std::io::Result<Vec<PathBuf>> {
        let dir = self.path.parent().unwrap_or(Path::new("."));
        let prefix = format!("{COPY_FILE}{ASIDE}");
        let mut aside = Vec::new();
        let entries = match std::fs::read_dir(dir) {
            Ok(entries) => entries,
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(aside),
            Err(e) => return Err(e),
        };
        for entry in entries {
            let entry = entry?;
            if entry.file_name().to_string_lossy().starts_with(&prefix) {
                aside.push(entry.path());
            }
        }
        aside.sort_unstable();
        Ok(aside)
    }

    /// Removes what an interrupted write has left. No other process may write the file.
    pub(super) fn clean(&self) {
        remove_part(&self.path);
    }

    /// Adds a row, durably; false, and it is not added, if the file has to be written whole.
    ///
    /// # Errors
    /// It is not certain whether it is there.
    pub(super) fn append(&mut self, row: &SealedRow) -> std::io::Result<bool> {
        // Until it is done: a line may be torn.
        let Some(whole) = self.whole.take() else { return Ok(false) };
        let mut file = match File::options().read(true).append(true).open(&self.path) {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(false),
            opened => opened?,
        };
        let bytes = file.metadata()?.len();
        if bytes < whole || bytes > 2 * whole + GROWTH {
            return Ok(false);
        }
        let mut last = [b'\n'];
        file.seek(SeekFrom::End(-1))?;
        file.read_exact(&mut last)?;
        // Behind a torn line.
        let begin = if last == [b'\n'] { "" } else { "\n" };
        file.write_all(format!("{begin}{}\n", line(row)?).as_bytes())?;
        file.sync_data()?;
        self.whole = Some(whole);
        Ok(true)
    }

    /// Writes the file anew with these rows, durably.
    ///
    /// # Errors
    /// The file is as it was, or as it should be.
    pub(super) fn rewrite<'r>(
        &mut self,
        rows: impl IntoIterator<Item = &'r SealedRow>,
    ) -> std::io::Result<()> {
        self.whole = None;
        let part = with_suffix(&self.path, PART);
        match std::fs::remove_file(&part) {
            Err(e) if e.kind() != ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let mut text = format!("{HEADER}\n");
        for row in rows {
            text += &line(row)?;
            text.push('\n');
        }
        let mut file = File::options().create_new(true).write(true).mode(0o600).open(&part)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        std::fs::rename(&part, &self.path)?;
        File::open(self.path.parent().unwrap_or(Path::new(".")))?.sync_all()?;
        self.whole = Some(text.len() as u64);
        Ok(())
    }
}

/// Removes the half-written file next to a path, if there is one.
pub(super) fn remove_part(path: &Path) {
    match std::fs::remove_file(with_suffix(path, PART)) {
        Err(e) if e.kind() != ErrorKind::NotFound => {
            tracing::debug!(file = %path.display(), error = %e, "a half-written file stays next to it");
        }
        _ => {}
    }
}

fn line(row: &SealedRow) -> std::io::Result<String> {
    let json = serde_json::to_string(&Line::from(row))?;
    Ok(format!("{} {json}", checksum(json.as_bytes())))
}

fn read_line(line: &[u8]) -> Option<SealedRow> {
    let (sum, json) = line.split_at_checked(DIGITS)?;
    let json = json.strip_prefix(b" ")?;
    let line: Line = serde_json::from_slice(json).ok()?;
    (sum == checksum(json).as_bytes()).then(|| line.row()).flatten()
}

fn checksum(json: &[u8]) -> String {
    let sum = Sha256::digest(json);
    sum.iter().take(DIGITS / 2).map(|byte| format!("{byte:02x}")).collect()
}

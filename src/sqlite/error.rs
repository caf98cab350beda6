//! What failed, in words for an operator, and as a kind for the code.

use std::{
    fmt,
    path::{Path, PathBuf},
};

use rusqlite::ErrorCode;

/// A failure of a SQLite file. Names the file, says what was found and what to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Error {
    text: String,
    kind: Kind,
    for_operator: bool,
    is_unknown: bool,
}

/// The kind of a failure, where a caller may want to act on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// There is no such file.
    Missing,
    /// The file is of another program.
    Foreign,
    /// The file has the schema of a later version.
    Later,
    /// The file has the schema of an earlier version, and this process may not migrate it.
    Earlier,
    /// The file is corrupt, or no database at all.
    Damaged,
    /// The disk is full. It goes on when there is room.
    DiskFull,
    /// Another process holds the file.
    Busy,
    /// The database is closed, or was opened for reading only.
    Closed,
    Other,
}

impl Error {
    pub(super) fn for_operator(kind: Kind, text: String) -> Self {
        Self { text, kind, for_operator: true, is_unknown: false }
    }

    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Whether the change may be on the disk all the same: its commit has failed half-way.
    pub fn is_unknown(&self) -> bool {
        self.is_unknown
    }

    /// Whether the failure stays until an operator changes something.
    pub fn is_for_operator(&self) -> bool {
        self.for_operator
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for Error {}

/// Returns the error for a file or directory that is unusable for this process, with the remedy.
pub fn denied(what: &str, e: &std::io::Error) -> Error {
    let remedy = match e.kind() {
        std::io::ErrorKind::PermissionDenied => {
            "; run this as the service's user (sudo -u hooktrail …)"
        }
        _ => "",
    };
    Error::for_operator(Kind::Other, format!("{what}: {e}{remedy}"))
}

/// What a failure says of its file.
#[derive(Debug, Clone)]
pub(super) struct About {
    pub(super) label: &'static str,
    pub(super) path: PathBuf,
    pub(super) damaged: &'static str,
}

/// A failure without its file.
#[derive(Debug, Clone)]
pub(super) struct Fault {
    why: String,
    kind: Kind,
    is_unknown: bool,
}

impl Fault {
    pub(super) fn new(kind: Kind, why: &str) -> Self {
        Self { why: why.to_owned(), kind, is_unknown: false }
    }
}

impl About {
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The error of a request to an open database.
    pub(super) fn error(&self, fault: Fault) -> Error {
        let Fault { why, kind, is_unknown } = fault;
        Error { text: self.text(&why), kind, for_operator: false, is_unknown }
    }

    /// The error of opening it.
    pub(super) fn unopened(&self, e: &rusqlite::Error) -> Error {
        let Fault { why, kind, .. } = self.explain(e);
        Error::for_operator(kind, self.text(&why))
    }

    fn text(&self, why: &str) -> String {
        format!("{} `{}`: {why}", self.label, self.path.display())
    }

    /// Explains an error of SQLite, with the remedy where it is known.
    pub(super) fn explain(&self, e: &rusqlite::Error) -> Fault {
        let (kind, remedy) = match e.sqlite_error_code() {
            Some(ErrorCode::DiskFull) => (
                Kind::DiskFull,
                "the disk is full; nothing is lost, and it goes on when there is room again"
                    .to_owned(),
            ),
            Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => {
                (Kind::Damaged, format!("the file is damaged: {}", self.damaged))
            }
            Some(ErrorCode::ReadOnly | ErrorCode::CannotOpen | ErrorCode::PermissionDenied) => (
                Kind::Other,
                "check the permissions of the directory and its files, and run this as the service's user (sudo -u hooktrail …)".to_owned(),
            ),
            Some(ErrorCode::SystemIoFailure) => {
                (Kind::Other, "the disk failed or is full; check it".to_owned())
            }
            _ if is_busy(e) => {
                let file = self.path.file_name().unwrap_or_default().to_string_lossy();
                let remedy = format!(
                    "another process holds it: wait until that is done; `fuser {file}` in that directory shows which one it is. If it is the \
                     running hooktrail daemon, do not end it"
                );
                (Kind::Busy, remedy)
            }
            _ => return Fault::new(Kind::Other, &e.to_string()),
        };
        Fault::new(kind, &format!("{e}: {remedy}"))
    }

    /// Explains why a commit failed. Where the disk has failed it may have taken all of it.
    pub(super) fn explain_commit(&self, e: &rusqlite::Error) -> Fault {
        let is_unknown = e.sqlite_error_code() == Some(ErrorCode::SystemIoFailure);
        Fault { is_unknown, ..self.explain(e) }
    }
}

pub(super) fn is_busy(e: &rusqlite::Error) -> bool {
    matches!(e.sqlite_error_code(), Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked))
}

//! A disk that fails and a clock that jumps, for one daemon: see `environment.c`.

use std::{
    fs::File,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
    time::Duration,
};

/// As `errno` has them.
pub(crate) const EIO: i32 = 5;
pub(crate) const ENOSPC: i32 = 28;

/// The library, compiled once: a machine that builds SQLite has a C compiler.
fn library() -> &'static Path {
    static LIBRARY: OnceLock<PathBuf> = OnceLock::new();
    LIBRARY.get_or_init(|| compiled("environment.c", "environment", &["-shared", "-fPIC", "-ldl"]))
}

/// What the C compiler makes of a file here, for this process.
pub(crate) fn compiled(source: &str, name: &str, options: &[&str]) -> PathBuf {
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/faults").join(source);
    let to = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}-{}", std::process::id()));
    let mut cc = Command::new("cc");
    cc.args(["-O1", "-Wall", "-Werror", "-o"]).arg(&to).arg(from).args(options);
    let done = cc.status().expect("a C compiler");
    assert!(done.success(), "{source} does not compile");
    to
}

pub(crate) struct Environment {
    dir: tempfile::TempDir,
    control: File,
}

impl Environment {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        std::fs::write(dir.path().join("control"), [0; 40]).expect("writes");
        let control =
            File::options().write(true).read(true).open(dir.path().join("control")).expect("opens");
        Self { dir, control }
    }

    /// The part of a shell line before `exec`.
    pub(crate) fn variables(&self) -> String {
        format!(
            "LD_PRELOAD={} HOOKTRAIL_TEST_ENVIRONMENT={}/control",
            library().display(),
            self.dir.path().display()
        )
    }

    /// Writes to the embedded queue fail with `error`, but for so many between two of them.
    pub(crate) fn disk_fails(&self, error: i32, one_in: i32) {
        self.control.write_all_at(&one_in.to_ne_bytes(), 4).expect("writes");
        self.control.write_all_at(&error.to_ne_bytes(), 0).expect("writes");
    }

    pub(crate) fn disk_works(&self) {
        self.disk_fails(0, 0);
    }

    /// Writes to history and the store fail with `error`, but for so many between two of them.
    pub(crate) fn store_fails(&self, error: i32, one_in: i32) {
        self.control.write_all_at(&one_in.to_ne_bytes(), 28).expect("writes");
        self.control.write_all_at(&error.to_ne_bytes(), 24).expect("writes");
    }

    /// Each write to history and the store takes so much longer.
    pub(crate) fn store_is_slow(&self, each: Duration) {
        let each = i32::try_from(each.as_micros()).expect("short");
        self.control.write_all_at(&each.to_ne_bytes(), 36).expect("writes");
    }

    pub(crate) fn store_works(&self) {
        self.store_fails(0, 0);
        self.store_is_slow(Duration::ZERO);
    }

    /// The clock is so many seconds ahead, or behind.
    pub(crate) fn clock_is_ahead(&self, seconds: i64) {
        self.control.write_all_at(&seconds.to_ne_bytes(), 8).expect("writes");
    }
}

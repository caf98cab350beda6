//! hooktrail as a real process, with a configuration of its own.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    os::fd::{AsFd as _, OwnedFd},
    path::PathBuf,
    process::{Child, ChildStderr, Command, ExitStatus, Output, Stdio},
    sync::{Arc, Condvar, Mutex},
    thread::JoinHandle,
};

use super::{broker::kill, eventually, queue::Section};

pub(crate) const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";

/// A configuration file and what is run with it.
pub(crate) struct Setup {
    dir: tempfile::TempDir,
}

impl Setup {
    /// `[queue]` for this one, then `rest`; short times unless `rest` says otherwise.
    pub(crate) fn new(queue: &impl Section, rest: &str) -> Self {
        let name = |line: &'_ str| {
            line.trim().strip_prefix("name = \"").map(|n| n.trim_end_matches('"').to_owned())
        };
        let names: Vec<String> = rest.lines().filter_map(name).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        Self::with_text(&(queue.section(&names) + rest))
    }

    /// The whole text, and a free port to listen on unless it says which.
    pub(crate) fn with_text(text: &str) -> Self {
        let admin =
            if text.contains("[admin]") { "" } else { "\n[admin]\nlisten = \"127.0.0.1:0\"\n" };
        let text = format!("{text}{admin}");
        let dir = tempfile::tempdir().expect("a directory");
        std::fs::write(dir.path().join("hooktrail.toml"), text).expect("writes");
        Self { dir }
    }

    pub(crate) fn config(&self) -> PathBuf {
        self.dir.path().join("hooktrail.toml")
    }

    pub(crate) fn write(&self, name: &str, text: impl AsRef<[u8]>) -> PathBuf {
        let path = self.dir.path().join(name);
        std::fs::write(&path, text).expect("writes");
        path
    }

    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut c = Command::new(program());
        c.arg("--config")
            .arg(self.config())
            .args(arguments)
            .env_remove("HOOKTRAIL_CONFIG")
            .current_dir(self.dir.path());
        c
    }

    /// Runs a command to its end.
    pub(crate) fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).stdin(Stdio::null()).output().expect("hooktrail runs")
    }

    /// Runs a command that must succeed; its standard output.
    pub(crate) fn ok(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert!(
            output.status.success(),
            "{arguments:?}: {}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// The dead letters of a subscriber as `dead list --json` prints them.
    pub(crate) fn dead(&self, subscriber: &str) -> Vec<serde_json::Value> {
        self.ok(&["dead", "list", subscriber, "--json"])
            .lines()
            .map(|l| serde_json::from_str(l).expect("a JSON line"))
            .collect()
    }

    /// Starts a daemon and waits until its lanes run.
    pub(crate) async fn start(&self) -> Daemon {
        let mut daemon = self.spawn();
        eventually("the lanes run", async || {
            let ended = !daemon.is_running();
            assert!(!ended, "the daemon ended at once: {}", daemon.log());
            daemon.log().contains("running")
        })
        .await;
        daemon
    }

    /// Runs a command to its end by a line for the shell, in which `"$0" "$@"` stands for it.
    pub(crate) fn run_as(&self, shell: &str, arguments: &[&str]) -> Output {
        self.by_shell(shell, arguments).stdin(Stdio::null()).output().expect("a shell runs")
    }

    fn by_shell(&self, shell: &str, arguments: &[&str]) -> Command {
        let plain = self.command(arguments);
        let mut c = Command::new("sh");
        c.args(["-c", shell])
            .arg(plain.get_program())
            .args(plain.get_args())
            .env_remove("HOOKTRAIL_CONFIG")
            .current_dir(self.dir.path());
        c
    }

    /// Starts a daemon and does not wait.
    pub(crate) fn spawn(&self) -> Daemon {
        self.spawn_as("exec \"$0\" \"$@\"")
    }

    /// Starts a daemon whose log goes into a pipe: the owner of its other end reads it, or does
    /// not.
    pub(crate) fn piped(&self) -> Piped {
        let mut child = self
            .command(&["run"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the daemon starts");
        let log = BufReader::new(child.stderr.take().expect("piped"));
        Piped { child, log }
    }

    /// Starts a daemon by a line for the shell, which must become it.
    pub(crate) fn spawn_as(&self, shell: &str) -> Daemon {
        let log = self.dir.path().join(format!("{}.log", super::unique()));
        let file = std::fs::File::create(&log).expect("a log file");
        let child = self
            .by_shell(shell, &["run"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(file)
            .spawn()
            .expect("the daemon starts");
        Daemon { child, log, reader: None }
    }

    /// Like [`spawn_as`](Self::spawn_as); its log is a pipe with a reader or without: see
    /// [`Daemon::leave_log_unread`].
    pub(crate) fn spawn_piped(&self, shell: &str) -> Daemon {
        let log = self.dir.path().join(format!("{}.log", super::unique()));
        let mut file = std::fs::File::create(&log).expect("a log file");
        let mut command = self.by_shell(shell, &["run"]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("the daemon starts");
        let mut stderr = child.stderr.take().expect("a pipe");
        let pipe = stderr.as_fd().try_clone_to_owned().expect("a descriptor");
        let stands = Arc::new(Stands::default());
        let still = stands.clone();
        let task = std::thread::spawn(move || {
            let mut buffer = [0; 16 << 10];
            loop {
                still.wait_for_end();
                match stderr.read(&mut buffer) {
                    Ok(n @ 1..) => file.write_all(&buffer[..n]).expect("writes"),
                    _ => return,
                }
            }
        });
        Daemon { child, log, reader: Some(Reader { stands, pipe, task: Some(task) }) }
    }
}

/// Whether a reader reads nothing now.
#[derive(Default)]
struct Stands(Mutex<bool>, Condvar);

impl Stands {
    fn set(&self, stands: bool) {
        *self.0.lock().expect("no panic") = stands;
        self.1.notify_all();
    }

    fn wait_for_end(&self) {
        drop(
            self.1
                .wait_while(self.0.lock().expect("no panic"), |stands| *stands)
                .expect("no panic"),
        );
    }
}

/// The reader of a daemon's log.
struct Reader {
    stands: Arc<Stands>,
    pipe: OwnedFd,
    task: Option<JoinHandle<()>>,
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.stands.set(false);
    }
}

/// A daemon whose log is read only when a test asks for it.
pub(crate) struct Piped {
    child: Child,
    log: BufReader<ChildStderr>,
}

impl Piped {
    /// Reads until a line has this text; that line.
    pub(crate) fn read_until(&mut self, text: &str) -> String {
        let mut line = String::new();
        while !line.contains(text) {
            line.clear();
            assert!(
                self.log.read_line(&mut line).expect("text") > 0,
                "the log ended without `{text}`"
            );
        }
        line
    }

    /// Sends SIGTERM, and waits for its end, with a reader of the log or without.
    pub(crate) async fn stop(&mut self) -> ExitStatus {
        kill("-TERM", self.child.id());
        let mut status = None;
        eventually("the daemon ends", async || {
            status = self.child.try_wait().expect("waits");
            status.is_some()
        })
        .await;
        status.expect("just seen")
    }
}

impl Drop for Piped {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// The program under test: the one that was built with the tests, or the one that the environment
/// names, such as an installed one.
fn program() -> PathBuf {
    std::env::var_os("HOOKTRAIL_TEST_PROGRAM")
        .map_or_else(|| env!("CARGO_BIN_EXE_hooktrail").into(), PathBuf::from)
}

pub(crate) struct Daemon {
    child: Child,
    log: PathBuf,
    /// The pipe of a log.
    reader: Option<Reader>,
}

impl Daemon {
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn peak_mib(&self) -> f64 {
        super::peak_mib(self.pid())
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(&self.log).expect("the log")
    }

    pub(crate) async fn wait_log(&self, text: &str) {
        eventually(&format!("`{text}` in the log:\n{}", self.log()), async || {
            self.log().contains(text)
        })
        .await;
    }

    /// Ends it as a crash does.
    pub(crate) fn kill(mut self) {
        self.end();
    }

    pub(crate) fn end(&mut self) {
        self.child.kill().expect("kills");
        self.child.wait().expect("ends");
        self.is_read_to_the_end();
    }

    /// From now on its log has no reader, or has one again.
    pub(crate) fn leave_log_unread(&self, unread: bool) {
        self.reader.as_ref().expect("a pipe").stands.set(unread);
    }

    /// The bytes of its log that are not read yet.
    pub(crate) fn unread(&self) -> u64 {
        rustix::io::ioctl_fionread(&self.reader.as_ref().expect("a pipe").pipe).expect("a pipe")
    }

    /// It has ended: all that it has written is in the log then.
    fn is_read_to_the_end(&mut self) {
        if let Some(reader) = &mut self.reader {
            reader.stands.set(false);
            if let Some(task) = reader.task.take() {
                task.join().expect("the reader of the log");
            }
        }
    }

    /// SIGTERM, and waits for its end.
    pub(crate) async fn stop(mut self) -> ExitStatus {
        self.terminate();
        self.wait().await
    }

    pub(crate) fn terminate(&self) {
        kill("-TERM", self.child.id());
    }

    pub(crate) async fn wait(&mut self) -> ExitStatus {
        let mut status = None;
        eventually("the daemon ends", async || {
            status = self.child.try_wait().expect("waits");
            status.is_some()
        })
        .await;
        self.is_read_to_the_end();
        status.expect("just seen")
    }

    pub(crate) fn is_running(&mut self) -> bool {
        self.child.try_wait().expect("waits").is_none()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
        if std::thread::panicking() {
            eprintln!("--- the daemon's log:\n{}", self.log());
        }
    }
}

/// A subscriber's table: local, unsigned checks aside as in production, with `more` lines.
pub(crate) fn subscriber(name: &str, url: &str, more: &str) -> String {
    format!(
        "\n[[subscriber]]\nname = \"{name}\"\nurl = \"{url}\"\nsecrets = [\"{SECRET}\"]\n{more}\n"
    )
}

/// Groups for tests: local receivers, short waits, a breaker that stays out of the way.
pub(crate) const QUICK: &str = "
[batch]
max_wait = \"100ms\"
[http]
allow_http = true
allow_private_addresses = true
[retry]
initial_interval = \"1s\"
multiplier = 1.0
randomization_factor = 0.0
[circuit_breaker]
failures = 0
";

/// A batch has one event, and one that has failed waits for an hour.
pub(crate) const SLOW: &str = "
[batch]
max_events = 1
max_wait = \"0s\"
[http]
allow_http = true
allow_private_addresses = true
[retry]
initial_interval = \"1h\"
max_interval = \"1h\"
multiplier = 1.0
randomization_factor = 0.0
[circuit_breaker]
failures = 0
";

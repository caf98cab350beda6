//! The log: what it looks like, how much of it there is, and who writes it.
//!
//! The daemon's lines are written by a thread of their own, behind a bounded queue: when nobody
//! reads them, as with a container runtime that hangs or a paused terminal, lines are dropped and
//! counted, and nothing that delivers events waits.

use std::{
    collections::VecDeque,
    fmt,
    io::{self, IsTerminal as _, Write},
    os::unix::fs::MetadataExt as _,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

use tracing::{Event, Subscriber};
use tracing_subscriber::{
    Registry,
    filter::Targets,
    fmt::{
        FmtContext, MakeWriter,
        format::{FormatEvent, FormatFields, Writer},
    },
    layer::SubscriberExt as _,
    registry::LookupSpan,
    reload,
    util::SubscriberInitExt as _,
};

use crate::config::LogConfig;

/// So many bytes of lines wait to be written, at most; about 20,000 lines.
const MAX_WAITING: usize = 4 * 1024 * 1024;

/// What a line takes beside its text.
const OF_A_LINE: usize = 64;

/// How long at most the end of the daemon waits for its last lines to be read.
const GOODBYE: Duration = Duration::from_secs(1);

/// Who writes to a terminal that somebody else has made non-blocking tries again after so long.
const AGAIN: Duration = Duration::from_millis(10);

/// How much is logged; can be changed while the program runs. Clones are the same, and the default
/// changes nothing.
#[derive(Debug, Clone, Default)]
pub struct Level(Option<reload::Handle<Targets, Registry>>);

impl Level {
    pub fn set(&self, level: tracing::Level) {
        if let Some(handle) = &self.0 {
            // It fails when the log is gone, and its level with it.
            handle.reload(targets(level)).ok();
        }
    }
}

/// Only hooktrail's own: its libraries log whole messages, bodies included.
fn targets(level: tracing::Level) -> Targets {
    Targets::new().with_target("hooktrail", level)
}

/// Log events go to stderr, and who logs waits until they are written. For commands.
pub fn to_stderr(level: tracing::Level) {
    install(LogConfig { json: false, level }, io::stderr);
}

/// The daemon's log.
#[derive(Debug)]
pub struct Log {
    lines: Arc<Lines>,
    json: bool,
}

impl Log {
    /// Log events go to stderr, and nobody waits for that. So does what a panic says. `dropped` is
    /// given numbers of lines that were not written.
    ///
    /// # Errors
    /// The system has no thread to write with.
    pub fn start(
        config: LogConfig,
        dropped: impl Fn(u64) + Send + Sync + 'static,
    ) -> io::Result<(Self, Level)> {
        let lines = Arc::new(Lines::new(dropped));
        let writing = lines.clone();
        thread::Builder::new()
            .name("log".to_owned())
            .spawn(move || writing.write_to(&mut io::stderr()))?;
        let line = lines.clone();
        let level = install(config, move || Line(line.clone()));
        std::panic::set_hook(Box::new(|panic| {
            let place = panic.location().map(ToString::to_string);
            let backtrace = std::backtrace::Backtrace::capture();
            let backtrace = (backtrace.status() == std::backtrace::BacktraceStatus::Captured)
                .then(|| backtrace.to_string());
            tracing::error!(
                place,
                backtrace,
                "panicked: {}",
                panic.payload_as_str().unwrap_or("no text")
            );
        }));
        Ok((Self { lines, json: config.json }, level))
    }

    /// The last thing that is said of a run that failed: a log event where machines read, else
    /// `text` as a command prints it.
    pub fn fatal(&self, error: &str, text: &str) {
        if self.json {
            tracing::error!(error, "hooktrail ends");
        } else {
            self.lines.push(format!("{text}\n").into_bytes());
        }
    }

    /// Waits until what was logged is written, but not for long: whoever does not read it keeps
    /// nothing from its end.
    pub fn finish(self) {
        self.lines.wait_written(GOODBYE);
    }
}

/// The first one in a process stays, which only tests notice.
fn install<W: for<'w> MakeWriter<'w> + Send + Sync + 'static>(
    config: LogConfig,
    writer: W,
) -> Level {
    let (filter, level) = reload::Layer::new(targets(config.level));
    let registry = tracing_subscriber::registry().with(filter);
    let layer = tracing_subscriber::fmt::layer().with_writer(writer).with_target(false);
    let ansi = io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let installed = if config.json {
        registry.with(layer.json().flatten_event(true).with_current_span(false)).try_init()
    } else if is_the_journal() {
        let format = tracing_subscriber::fmt::format().with_target(false);
        registry.with(layer.with_ansi(false).event_format(Prioritized(format))).try_init()
    } else {
        registry.with(layer.with_ansi(ansi)).try_init()
    };
    Level(installed.is_ok().then_some(level))
}

/// Whether what is written to stderr comes into the journal of systemd, as systemd.exec(5) tells of
/// `$JOURNAL_STREAM`.
fn is_the_journal() -> bool {
    let Ok(stream) = std::env::var("JOURNAL_STREAM") else { return false };
    // What is inherited may be of another process, whose stderr this one's is not.
    std::fs::metadata("/proc/self/fd/2")
        .is_ok_and(|stderr| stream == format!("{}:{}", stderr.dev(), stderr.ino()))
}

/// Lines that begin with their priority as sd-daemon(3) has it, which the journal shows and filters
/// by.
struct Prioritized<F>(F);

impl<S, N, F> FormatEvent<S, N> for Prioritized<F>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
    F: FormatEvent<S, N>,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let priority = match *event.metadata().level() {
            tracing::Level::ERROR => 3,
            tracing::Level::WARN => 4,
            tracing::Level::INFO => 6,
            _ => 7,
        };
        write!(writer, "<{priority}>")?;
        self.0.format_event(context, writer, event)
    }
}

/// Lines on their way to whoever reads them.
struct Lines {
    state: Mutex<Waiting>,
    /// There is something to write, or all is written.
    changed: Condvar,
    dropped: Box<dyn Fn(u64) + Send + Sync>,
}

#[derive(Debug, Default)]
struct Waiting {
    lines: VecDeque<Vec<u8>>,
    bytes: usize,
    /// Since somebody was told of them.
    dropped: u64,
    /// Some were taken and are not written yet.
    writing: bool,
}

impl fmt::Debug for Lines {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lines").finish_non_exhaustive()
    }
}

impl Lines {
    fn new(dropped: impl Fn(u64) + Send + Sync + 'static) -> Self {
        Self { state: Mutex::default(), changed: Condvar::new(), dropped: Box::new(dropped) }
    }

    fn state(&self) -> MutexGuard<'_, Waiting> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn drop_lines(&self, state: &mut Waiting, lines: u64) {
        state.dropped += lines;
        (self.dropped)(lines);
    }

    fn push(&self, line: Vec<u8>) {
        let mut state = self.state();
        if state.bytes + line.len() + OF_A_LINE > MAX_WAITING {
            self.drop_lines(&mut state, 1);
            return;
        }
        state.bytes += line.len() + OF_A_LINE;
        state.lines.push_back(line);
        self.changed.notify_all();
    }

    /// Waits for lines and takes all there are.
    fn take(&self) -> VecDeque<Vec<u8>> {
        let mut state = self.state();
        while state.lines.is_empty() {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.bytes = 0;
        state.writing = true;
        std::mem::take(&mut state.lines)
    }

    /// So many of those that were taken could not be written. Returns how many are to be told of.
    fn written(&self, lost: u64) -> u64 {
        let mut state = self.state();
        if lost > 0 {
            self.drop_lines(&mut state, lost);
        }
        state.writing = false;
        self.changed.notify_all();
        // While writing fails, so would the line about it.
        if lost > 0 { 0 } else { std::mem::take(&mut state.dropped) }
    }

    fn wait_written(&self, at_most: Duration) {
        let unwritten = |state: &mut Waiting| state.writing || !state.lines.is_empty();
        drop(self.changed.wait_timeout_while(self.state(), at_most, unwritten));
    }

    /// Writes without end.
    fn write_to(&self, to: &mut impl Write) {
        loop {
            let lines = self.take();
            let lost = lines.into_iter().filter(|line| write_line(to, line).is_err()).count();
            let untold = self.written(lost as u64);
            if untold > 0 {
                tracing::warn!(
                    lines = untold,
                    "lines of the log were dropped: nobody read it, or it could not be written"
                );
            }
        }
    }
}

fn write_line(to: &mut impl Write, mut line: &[u8]) -> io::Result<()> {
    while !line.is_empty() {
        match to.write(line) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(n) => line = &line[n..],
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => thread::park_timeout(AGAIN),
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// Takes one line; each is written at once.
struct Line(Arc<Lines>);

impl Write for Line {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.0.push(line.to_vec());
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{
        atomic::{AtomicU64, Ordering},
        mpsc,
    };

    /// Writes a line when it is told to, or fails.
    struct Reader {
        go_on: mpsc::Receiver<io::Result<()>>,
        read: mpsc::Sender<usize>,
    }

    impl Write for Reader {
        fn write(&mut self, line: &[u8]) -> io::Result<usize> {
            self.go_on.recv().expect("the test lives")?;
            self.read.send(line.len()).expect("the test lives");
            Ok(line.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn lines_that_nobody_reads_are_dropped_and_counted_and_nobody_waits_for_them() {
        let counted = Arc::new(AtomicU64::new(0));
        let counter = counted.clone();
        let lines = Arc::new(Lines::new(move |n| {
            counter.fetch_add(n, Ordering::SeqCst);
        }));
        let (go_on, told) = mpsc::channel();
        let (read, seen) = mpsc::channel();
        let writing = lines.clone();
        thread::spawn(move || writing.write_to(&mut Reader { go_on: told, read }));
        let line = || vec![b'x'; 1024 - OF_A_LINE];
        let room = MAX_WAITING / 1024;
        for _ in 0..2 * room + 100 {
            lines.push(line());
        }
        let dropped = counted.load(Ordering::SeqCst);
        // What the writer took before it stood still has made room; at most that is as much again.
        let most = room as u64 + 100;
        assert!((100..=most).contains(&dropped), "{dropped}");
        lines.wait_written(Duration::from_millis(1));
        // One of them fails.
        go_on.send(Err(io::ErrorKind::BrokenPipe.into())).expect("it is there");
        for _ in 1..2 * room as u64 + 100 - dropped {
            go_on.send(Ok(())).expect("it is there");
            assert_eq!(seen.recv().expect("it is there"), line().len());
        }
        lines.wait_written(Duration::from_secs(60));
        assert_eq!(counted.load(Ordering::SeqCst), dropped + 1);
        assert_eq!(lines.state().bytes, 0);
    }
}
